"""The helpers of common.py, each against an oracle: plain torchvision, plain torch, numpy or the closed formula."""
import io
import os
import shutil
import sys
from argparse import Namespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import json_of
from PIL import Image
from torch import nn
from torch.utils.data import RandomSampler, SequentialSampler
from torchvision import datasets, transforms

import common


@pytest.fixture(autouse=True)
def figures_are_closed():
    yield
    plt.close("all")


@pytest.mark.parametrize("title, above, names", [
    ("a $title", "a $title", []), (0, "0", []), (None, "", []), (["cats", "dogs"], "", [("cats", 56), ("dogs", 168)])])
def test_imagenet_format_is_the_lectures_and_imshow_undoes_it(title, above, names):
    """Crop, scale, normalize: from Pillow and numpy alone. Each name of a list stands over its own part of the image."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8))
    pixels = np.asarray(image.crop((88, 38, 88 + 224, 38 + 224)), dtype=np.float32) / 255
    normal = (pixels - np.float32([0.485, 0.456, 0.406])) / np.float32([0.229, 0.224, 0.225])
    inputs = common.imagenet_format(image)
    assert np.allclose(inputs, normal.transpose(2, 0, 1), atol=1e-6)
    common.imshow(inputs, title)
    ax = plt.gca()
    assert np.allclose(ax.get_images()[0].get_array(), pixels, atol=1e-6)
    assert ax.get_title() == above and not ax.axison
    assert [(text.get_text(), text.get_position()[0]) for text in ax.texts if text.get_position()[1] < 0] == names


def test_untrained_is_always_the_same():
    one, two = (common.load_vgg16("untrained").state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one) and one["features.0.weight"].std() > 0


def test_the_new_head_is_8194_numbers_and_gives_log_probabilities(vgg):
    trainable = {name: param.numel() for name, param in vgg.named_parameters() if param.requires_grad}
    assert trainable == {"classifier.6.weight": 2 * 4096, "classifier.6.bias": 2}
    rows = torch.randn(3, 4096)
    assert torch.allclose(vgg.classifier[6:](rows), torch.log_softmax(vgg.classifier[6](rows), dim=1))


def test_bfloat16_takes_and_gives_float32(vgg):
    inputs = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        exact = vgg(inputs).exp()
        common.to_device(vgg, torch.device("cpu"), bf16=True)
        features = vgg.features(inputs)
        log_proba = vgg.classifier(features.flatten(1))
    assert features.dtype == log_proba.dtype == vgg.classifier[6].weight.dtype == torch.float32
    assert vgg.features[0].weight.dtype == vgg.classifier[3].weight.dtype == torch.bfloat16
    assert 0 < (log_proba.exp() - exact).abs().max() < 0.01


def test_a_device_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(common.UserError, match="--device cuda"):
        common.get_device("cuda")


INPUTS = torch.randn(37, 8, generator=torch.Generator().manual_seed(1))
CLASSES = (INPUTS[:, 0] > 0).long()
BATCHES = list(zip(INPUTS.split(10), CLASSES.split(10), strict=True))  # the last one has 7 images


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 2), nn.LogSoftmax(dim=1))


def test_training_is_plain_sgd_with_dropout(monkeypatch):
    """Weights to the last bit; loss (of the criterion given) and accuracy are sums over the images, each batch's before
    its own step, divided by the size given: 40 here, though there are 37. The seconds are those of each epoch."""
    clock, history, sums = [100.0], [], []
    model, oracle = small_model().eval(), small_model().train()
    optimizer, plain = (torch.optim.SGD(network.parameters(), lr=0.1) for network in (model, oracle))
    monkeypatch.setattr(common.time, "perf_counter", lambda: clock[0])

    def criterion(outputs, classes):
        clock[0] += 2
        return 2 * nn.functional.nll_loss(outputs, classes)

    torch.manual_seed(3)
    common.train_model(model, BATCHES, size=40, epochs=3, optimizer=optimizer, criterion=criterion, history=history)
    torch.manual_seed(3)
    for inputs, classes in BATCHES * 3:
        outputs = oracle(inputs)
        loss = criterion(outputs, classes)
        plain.zero_grad()
        loss.backward()
        plain.step()
        sums.append((loss.item() * len(classes), (outputs.argmax(dim=1) == classes).sum().item(), 2))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(model.parameters(), oracle.parameters(), strict=True))
    expected = np.reshape(sums, (3, 4, 3)).sum(axis=1) / (40, 40, 1)  # 3 epochs of 4 batches: loss, accuracy, seconds
    assert np.allclose(history, expected, atol=1e-6) and history[2][0] < history[0][0]
    with pytest.raises(AttributeError, match="zero_grad"):  # without an optimizer: the lecture's function does the same
        common.train_model(model, BATCHES, size=37)


def test_testing_is_plain_torch_without_dropout(capsys):
    """What is returned is as long as the size given, 40, by which what is printed is divided; there are 37 images."""
    model = small_model().train()
    results = common.test_model(model, BATCHES, size=40)
    *_, loss, _, accuracy = capsys.readouterr().out.split()
    proba, classes = np.exp(small_model().eval()(INPUTS).detach().numpy()), CLASSES.numpy()
    for array, plain in zip(results, (proba.argmax(axis=1), proba, classes), strict=True):
        assert len(array) == 40 and np.allclose(array[:37], plain, atol=1e-6)
    assert float(loss) == pytest.approx(-np.log(proba[np.arange(37), classes]).sum() / 40, abs=1e-4)
    assert float(accuracy) == pytest.approx((proba.argmax(axis=1) == classes).sum() / 40, abs=1e-4)
    assert not model.training


def parse(patch, here, *options, program="03_finetune_head.py"):
    """parse_options with what the scripts' own parsers add, for scripts that lie in the folder `here`."""
    parser = common.option_parser("doc")
    for name, kind in (("--epochs", int), ("--lr", float), ("--batch-size", int), ("--n-view", int)):
        parser.add_argument(name, type=kind)
    patch.setattr(common, "HERE", here)
    patch.setattr(sys, "argv", [program, *map(str, options)])
    return common.parse_options(parser)


@pytest.mark.parametrize("option, least, most, below, above", [
    ("--seed", 0, 2**63 - 1, -1, 2**63), ("--num-workers", 0, 256, -1, 257), ("--limit", 2, 1_000_000, 1, 1_000_001),
    ("--epochs", 1, 1_000_000, 0, 1_000_001), ("--batch-size", 1, 1_000_000, 0, 1_000_001), ("--n-view", 1, 100, 0, 101),
    ("--lr", 0, 1_000, -1e-9, 1_000.1), ("--lr", 1e-9, 1, "nan", "inf")])
def test_numbers_out_of_range_are_wrong_options(monkeypatch, tmp_path, capsys, option, least, most, below, above):
    for value in (least, most):
        assert vars(parse(monkeypatch, tmp_path, option, value))[option[2:].replace("-", "_")] == value
    for value in (below, above):
        with pytest.raises(SystemExit, match="2"):
            parse(monkeypatch, tmp_path, f"{option}={value}")
        assert f"argument {option}: {value} is not from " in capsys.readouterr().err


@pytest.mark.parametrize("options, threads, size, data_dir, workers", [
    ([], None, "full", "data/dogscats", 0), ([], 64, "full", "data/dogscats", 16),
    (["--limit", 100], 8, "limit-100", "data/dogscats", 8), (["--num-workers", 0], 8, "full", "data/dogscats", 0),
    (["--device", "cpu"], 64, "full", "data/dogscats", 0), (["--sample"], 8, "sample", "sample", 0),
    (["--sample", "--num-workers", 3], None, "sample", "data/dogscats/sample", 3)])
def test_folders_and_workers_by_default(monkeypatch, tmp_path, capsys, options, threads, size, data_dir, workers):
    """Where the dataset has a sample it goes before the bundled one. A machine has a GPU where its threads are told."""
    (tmp_path / data_dir).mkdir(parents=True)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: threads is not None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads or 8)
    args = parse(monkeypatch, tmp_path, *options)
    assert args.output_dir == tmp_path / "outputs" / size and args.output_dir.is_dir()
    assert args.data_dir == tmp_path / data_dir and args.num_workers == workers
    in_force = [f"{name}={value}" for name, value in vars(args).items() if value is not None]
    assert capsys.readouterr().out == f"options: {' '.join(in_force)}\n"
    with pytest.raises(SystemExit, match="2"):
        parse(monkeypatch, tmp_path, "--sample", "--limit", 100)


def test_a_notebook_has_no_command_line_and_the_rest_needs_no_display(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # a notebook's is no real file
    plt.switch_backend("svg")  # any that is not the one for no display
    args = parse(monkeypatch, tmp_path, "-f", "x.json", program="/lib/ipykernel_launcher.py")
    assert args.sample and args.show and plt.get_backend().lower() == "svg"
    assert not parse(monkeypatch, tmp_path).show and plt.get_backend().lower() == "agg"


@pytest.mark.parametrize("seconds, pause, at_terminal, waits", [
    (1175, True, True, 1), (1175, True, False, 0), (1175, False, True, 0), (None, True, True, 0), (1175, True, None, 0)])
def test_a_heading_waits_for_enter_where_it_has_a_minute(monkeypatch, capsys, seconds, pause, at_terminal, waits):
    read = []
    stdin = Namespace(isatty=lambda: at_terminal, readline=lambda: read.append("Enter"))
    monkeypatch.setattr(sys, "stdin", None if at_terminal is None else stdin)  # there may be none at all
    common.banner("a heading", seconds, pause)
    minute = ["  video from 0:19:35, https://youtu.be/ZhC-DIrCe6A?t=1175"] if seconds else []
    expected = ["", ("=" if seconds else "-") * 80, "a heading", *minute, *["press Enter to go on "] * waits]
    assert capsys.readouterr().out.splitlines() == expected and len(read) == waits


def test_progress_is_a_few_lines_and_none_for_quick_work(monkeypatch, capsys):
    batches = [("inputs", [0] * 5)] * 100
    assert list(common.progress(batches, 100)) == batches and capsys.readouterr().err == ""
    ten_seconds_a_batch = iter(range(0, 100_000, 10))
    monkeypatch.setattr(common.time, "monotonic", lambda: next(ten_seconds_a_batch))
    list(common.progress(batches[:1], 1))  # is done when it could be told
    assert list(common.progress(batches, 100)) == batches
    first, *lines = capsys.readouterr().err.splitlines()
    assert first.split() == ["1%,", "0:16:30", "left"] and 8 <= len(lines) <= 12


@pytest.mark.parametrize("n, train, valid", [
    (2, (1, 1), (1, 1)), (11, (5, 6), (1, 1)), (50, (25, 25), (2, 3)), (100, (30, 40), (5, 5)), (10**6, (30, 40), (9, 9))])
def test_limit_keeps_half_of_each_class_evenly_spaced(n, train, valid):
    counts = {"train": (30, 40), "valid": (9, 9)}
    dsets = {x: Namespace(samples=[(i, label) for label in (0, 1) for i in range(counts[x][label])]) for x in counts}
    common.limit_images(dsets, n)
    for x, kept in (("train", train), ("valid", valid)):
        evenly = [(int(i), label) for label in (0, 1) for i in np.linspace(0, counts[x][label], kept[label], endpoint=False)]
        assert dsets[x].samples == dsets[x].imgs == evenly and dsets[x].targets == [label for _, label in evenly]


def test_loaders_shuffle_to_train_and_keep_the_order_to_validate(dataset):
    args = Namespace(device="cpu", bf16=False, data_dir=dataset, limit=None, num_workers=1)
    _, dsets, *loaders = common.load_data(args, batch_size=7)
    assert [(type(loader.sampler), loader.batch_size, loader.num_workers) for loader in loaders] == [
        (RandomSampler, 7, 1), (SequentialSampler, 5, 1)]
    assert [loader.dataset for loader in loaders] == [dsets["train"], dsets["valid"]] and len(dsets["train"]) == 6
    args.limit = 2
    _, limited, *_ = common.load_data(args)
    assert {x: len(limited[x]) for x in limited} == {"train": 2, "valid": 2}
    assert common.differences(common.identify(dsets), common.identify(limited)) == "train images and valid images"


def identify(folder, transform=common.imagenet_format):
    return common.identify({x: datasets.ImageFolder(folder / x, transform) for x in ("train", "valid")})


@pytest.mark.parametrize("more, later, suffix", [(b"0", 0, ""), (b"", 1000, ""), (b"", 0, "_")])
def test_the_record_sees_each_image_and_the_transform_but_not_the_place(dataset, tmp_path, more, later, suffix):
    for path in sorted(dataset.rglob("*.jpg")):
        before, time = identify(dataset), path.stat().st_mtime_ns + later
        path.write_bytes(path.read_bytes() + more)
        os.utime(path, ns=(time, time))
        path.rename(path.with_stem(path.stem + suffix))
        assert common.differences(before, identify(dataset)) == f"{path.parent.parent.name} images"
    assert common.differences(identify(dataset), identify(dataset, transforms.ToTensor())) == "transform"
    assert identify(shutil.copytree(dataset, tmp_path / "copy")) == identify(dataset)


def test_the_record_sees_the_frozen_layers_and_the_precision(vgg):
    """Each layer but the last one, which is what is trained; and not the order of the numbers in memory."""
    record = common.made_from({"transform": "T"}, vgg)
    for name, value in vgg.state_dict().items():
        number = value.view(-1)[-1]
        number.neg_()
        changed = common.differences(record, common.made_from({"transform": "T"}, vgg))
        assert changed == ("" if name.startswith("classifier.6.") else "frozen layers"), name
        number.neg_()
    assert common.made_from({"transform": "T"}, vgg.to(memory_format=torch.channels_last)) == record
    now = common.made_from({"transform": "T"}, common.to_device(vgg, torch.device("cpu"), bf16=True))
    assert common.differences(record, now) == "frozen layers and precision"


def test_results_are_saved_before_the_test_and_after_it(vgg, tmp_path):
    args = Namespace(output_dir=tmp_path, data_dir=tmp_path, weights="imagenet")
    history = [(0.7, 0.5, 2.0), (0.6, 0.75, 6.0)]
    metrics = common.save_results(args, "04", vgg, {"transform": "T"}, history)
    assert {path.name for path in tmp_path.iterdir()} == {"04_head.pt", "04_metrics.json"}
    assert json_of(tmp_path / "04_metrics.json").keys() == metrics.keys()
    assert (metrics["train_loss"], metrics["train_accuracy"]) == ([0.7, 0.6], [0.5, 0.75])
    assert metrics["seconds_per_epoch"] == 4
    proba = np.float32([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6]])
    arrays = {"04_predictions": np.array([0, 0, 1]), "04_all_proba": proba, "04_all_classes": np.array([0, 1, 1])}
    common.save_results(args, "04", vgg, {"transform": "T"}, history, tuple(arrays.values()))
    tested = json_of(tmp_path / "04_metrics.json")
    assert {name: tested[name] for name in tested if name not in metrics} == pytest.approx({
        "valid_loss": -np.log([0.9, 0.2, 0.6]).mean(), "valid_accuracy": 2 / 3})
    loaded = {name: common.load(tmp_path / f"{name}.npy", "") for name in arrays}  # not read into memory
    assert all(isinstance(loaded[name], np.memmap) and np.array_equal(loaded[name], arrays[name]) for name in arrays)
    assert common.log_loss(np.float32([[0, 1]]), [0]) == np.inf


def test_predictions_stand_over_their_images_red_where_wrong():
    images = [Image.new("RGB", (20, 20), (value, 0, 0)) for value in (10, 20, 30)]
    proba = np.float32([[0.9, 0.1], [0.2, 0.8], [0.375, 0.625]])
    common.show_predictions(images, ["x/a.jpg", "x/b.jpg", "x/c.jpg"], [0, 0, 1], proba, "Correct, at random")
    shown = [(ax.get_images()[0].get_array()[0, 0, 0], ax.get_title(), ax.title.get_color()) for ax in plt.gcf().axes]
    assert shown == [(10, "true: cat\npredicted: cat, 0.900\na.jpg", "black"),
                     (20, "true: cat\npredicted: dog, 0.800\nb.jpg", "red"),
                     (30, "true: dog\npredicted: dog, 0.625\nc.jpg", "black")]
    assert not any(ax.texts for ax in plt.gcf().axes)
    common.show_predictions([], [], [], [], "Incorrect, at random")
    axes, = plt.gcf().axes  # a notebook shows no figure without axes
    assert [text.get_text() for text in axes.texts] == ["none"] and plt.gcf().get_suptitle() == "Incorrect, at random"


def test_training_is_drawn_as_the_metrics_say():
    metrics = {"train_loss": [0.9, 0.6, 0.5], "train_accuracy": [0.2, 0.5, 0.8], "valid_loss": 0.4, "valid_accuracy": 0.6}
    common.plot_training(metrics, "a title")
    for ax, name in zip(plt.gcf().axes, ("loss", "accuracy"), strict=True):
        train, valid, *guess = ax.lines
        assert np.array_equal(train.get_xydata(), [*zip([1, 2, 3], metrics[f"train_{name}"], strict=True)])
        assert np.array_equal(valid.get_xydata(), [[3, metrics[f"valid_{name}"]]])
        assert [text.get_text().split(",")[0] for text in ax.get_legend().get_texts()] == ["train", "valid"]
        assert ax.get_ylabel().startswith(name) and ax.get_xlabel() == "epoch"
        assert [set(line.get_ydata()) for line in guess] == ([{0.5}] if name == "accuracy" else [])
    assert plt.gca().get_ylim() == (0, 1.05) and plt.gcf().get_suptitle() == "a title"
