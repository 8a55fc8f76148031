"""The helpers of common.py, each against an oracle: plain torchvision, plain torch, numpy or the closed formula."""
import argparse
import io
import os
import shutil
import sys
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import make_dataset, script
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, TensorDataset
from torchvision import datasets, models

import common


# ------------------------------------------------------------------------------------------------------------ images
def noise(height=224, width=224):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_imagenet_format_is_the_lectures():
    """Crop, scale, normalize: from Pillow and numpy alone."""
    image = noise(300, 400)
    pixels = np.asarray(image.crop((88, 38, 88 + 224, 38 + 224)), dtype=np.float32) / 255
    normal = (pixels - np.float32([0.485, 0.456, 0.406])) / np.float32([0.229, 0.224, 0.225])
    assert np.allclose(common.imagenet_format(image), normal.transpose(2, 0, 1), atol=1e-6)


@pytest.mark.parametrize("title, shown", [("a $title", "a $title"), (0, "0"), (None, "")])
def test_imshow_undoes_the_normalization(title, shown):
    image = noise()
    plt.figure()
    common.imshow(common.imagenet_format(image), title)
    assert np.allclose(plt.gca().get_images()[0].get_array(), np.asarray(image) / 255, atol=1e-6)
    assert plt.gca().get_title() == shown and not plt.gca().axison
    plt.close()


def test_imshow_writes_each_name_of_a_list_over_its_own_image():
    plt.figure()
    common.imshow(torch.zeros(3, 100, 300), ["cats", "dogs", "birds"])
    texts = {text.get_text(): text.get_position() for text in plt.gca().texts}
    assert {name: x for name, (x, _) in texts.items()} == {"cats": 50, "dogs": 150, "birds": 250}
    assert all(y < 0 for _, y in texts.values()) and plt.gca().get_title() == ""
    plt.close()


def test_order_is_imagefolders(tmp_path):
    """Features and predictions go by the order of sorted paths: cat.10 before cat.2."""
    dset = datasets.ImageFolder(make_dataset(tmp_path, train=11, valid=1) / "train")
    assert [os.path.basename(path) for path, _ in dset.imgs[:4]] == ["cat.0.jpg", "cat.1.jpg", "cat.10.jpg", "cat.2.jpg"]
    assert dset.classes == common.CLASSES


# ------------------------------------------------------------------------------------------------------------- VGG16
def test_vgg16_is_torchvisions(vgg_file):
    oracle, model = models.vgg16(), common.load_vgg16("imagenet")
    oracle.load_state_dict(torch.load(vgg_file, weights_only=True))
    inputs = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        assert torch.equal(model.eval()(inputs), oracle.eval()(inputs))
    assert type(model) is models.VGG and all(param.requires_grad for param in model.parameters())


def test_untrained_is_always_the_same():
    one, _, two = common.load_vgg16("untrained"), torch.manual_seed(5), common.load_vgg16("untrained")
    assert all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())
    assert one.features[0].weight.std() > 0


def test_the_new_head_is_8194_numbers_and_gives_log_probabilities(vgg):
    trainable = {name: param.numel() for name, param in vgg.named_parameters() if param.requires_grad}
    assert trainable == {"classifier.6.weight": 2 * 4096, "classifier.6.bias": 2}
    rows = torch.randn(3, 4096)
    assert torch.allclose(vgg.classifier[6:](rows), torch.log_softmax(vgg.classifier[6](rows), dim=1))


def test_bfloat16_takes_and_gives_float32(vgg):
    inputs = torch.randn(4, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        exact = vgg(inputs).exp()
        common.to_device(vgg, torch.device("cpu"), bf16=True)
        close, features = vgg(inputs).exp(), vgg.features(inputs)
        log_proba = vgg.classifier(features.flatten(1))
    assert features.dtype == log_proba.dtype == vgg.classifier[6].weight.dtype == torch.float32
    assert vgg.features[0].weight.dtype == vgg.classifier[3].weight.dtype == torch.bfloat16
    assert 0 < (close - exact).abs().max() < 0.01 and torch.allclose(log_proba.exp(), close)


@pytest.mark.parametrize("has, notices", [(True, 0), (False, 1)])
def test_slow_bfloat16_is_said_before_it_starts(monkeypatch, capsys, has, notices):
    monkeypatch.setattr(common, "cpu_has_bfloat16", lambda: has)
    assert common.get_device("cpu", bf16=True) == torch.device("cpu")
    assert capsys.readouterr().out.count("NOTICE: --bf16") == notices


def test_a_device_that_is_not_there():
    if torch.cuda.is_available():
        pytest.skip("it is there")
    with pytest.raises(common.UserError, match="--device cuda"):
        common.get_device("cuda")


# ---------------------------------------------------------------------------------------------- training and testing
def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 2), nn.LogSoftmax(dim=1))


def batches(n=37, size=10):
    """37 images in batches of 10: the last one has 7."""
    inputs = torch.randn(n, 8, generator=torch.Generator().manual_seed(1))
    return list(DataLoader(TensorDataset(inputs, (inputs[:, 0] > 0).long()), batch_size=size))


def sgd(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr=lr)


def test_training_is_plain_sgd_with_dropout():
    """Weights to the last bit; loss (of the criterion given) and accuracy are sums over the images, each batch's before
    its own step, divided by the size given: 40 here, though there are 37."""
    model, oracle, data, history, expected = small_model().eval(), small_model(), batches(), [], []

    def criterion(outputs, classes):
        return 2 * nn.functional.nll_loss(outputs, classes)

    torch.manual_seed(3)
    common.train_model(model, data, size=40, epochs=3, optimizer=sgd(model), criterion=criterion, history=history)
    torch.manual_seed(3)
    optimizer = sgd(oracle)
    for _ in range(3):
        loss_sum = n_right = 0
        for inputs, classes in data:
            outputs = oracle.train()(inputs)
            loss = criterion(outputs, classes)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss_sum, n_right = loss_sum + loss.item() * len(classes), n_right + (outputs.argmax(1) == classes).sum().item()
        expected.append((loss_sum / 40, n_right / 40))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(model.parameters(), oracle.parameters(), strict=True))
    assert np.allclose([epoch[:2] for epoch in history], expected, atol=1e-6) and expected[2][0] < expected[0][0]


def test_seconds_are_those_of_each_epoch(monkeypatch):
    clock, model, history = [100.0], small_model(), []

    class Slow(list):
        def __iter__(self):
            for batch in list.__iter__(self):
                clock[0] += 2
                yield batch

    monkeypatch.setattr(common.time, "perf_counter", lambda: clock[0])
    common.train_model(model, Slow(batches()), size=37, epochs=3, optimizer=sgd(model), history=history)
    assert [seconds for *_, seconds in history] == [8, 8, 8]  # four batches


def test_training_needs_an_optimizer():
    with pytest.raises(ValueError, match="optimizer"):
        common.train_model(small_model(), batches(), size=37)


def test_testing_against_numpy(capsys):
    """What is returned is as long as the size given, 40, by which what is printed is divided; there are 37 images."""
    model = small_model().train()  # dropout must go off
    results = common.test_model(model, batches(), size=40)
    loss = float(capsys.readouterr().out.split()[1])
    assert type(results) is tuple and [(array.shape, array.dtype) for array in results] == [
        ((40,), np.int64), ((40, 2), np.float32), ((40,), np.int64)]
    predictions, all_proba, all_classes = (array[:37] for array in results)
    inputs, classes = (torch.cat(parts).numpy() for parts in zip(*batches(), strict=True))
    one, two = ({name: p.detach().numpy() for name, p in model[i].named_parameters()} for i in (0, 3))
    logits = np.maximum(inputs @ one["weight"].T + one["bias"], 0) @ two["weight"].T + two["bias"]
    proba = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert np.allclose(all_proba, proba, atol=1e-6) and np.array_equal(predictions, proba.argmax(axis=1))
    assert np.array_equal(all_classes, classes) and not model.training
    assert loss == pytest.approx(-np.log(proba[np.arange(37), classes]).sum() / 40, abs=1e-4)
    common.test_model(model, batches(), size=37)
    assert float(capsys.readouterr().out.split()[-1]) == pytest.approx((predictions == classes).mean(), abs=1e-4)


# ----------------------------------------------------------------------------------------------- options, and banners
def parse(monkeypatch, *options, program="03_finetune_head.py"):
    """parse_options with what the scripts' own parsers add."""
    parser = common.option_parser("doc")
    for name, kind in (("--epochs", int), ("--lr", float), ("--batch-size", int), ("--n-view", int)):
        parser.add_argument(name, type=kind)
    monkeypatch.setattr(sys, "argv", [program, *map(str, options)])
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    return common.parse_options(parser)


@pytest.mark.parametrize("option, least, most, below, above", [
    ("--seed", 0, 2**63 - 1, -1, 2**63), ("--num-workers", 0, 256, -1, 257), ("--limit", 2, 1_000_000, 1, 1_000_001),
    ("--epochs", 1, 1_000_000, 0, 1_000_001), ("--batch-size", 1, 1_000_000, 0, 1_000_001), ("--n-view", 1, 100, 0, 101),
    ("--lr", 0, 1_000, -1e-9, 1_000.1), ("--lr", 1e-9, 1, "nan", "inf")])
def test_numbers_out_of_range_are_wrong_options(monkeypatch, tmp_path, capsys, option, least, most, below, above):
    for value in (least, most):
        args = parse(monkeypatch, "--output-dir", tmp_path, f"{option}={value}")
        assert getattr(args, option[2:].replace("-", "_")) == value
    for value in (below, above):
        with pytest.raises(SystemExit) as ended:
            parse(monkeypatch, "--output-dir", tmp_path, f"{option}={value}")
        assert ended.value.code == 2 and f"argument {option}: " in capsys.readouterr().err


def test_sample_and_limit_exclude_each_other(monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(monkeypatch, "--sample", "--limit", 100)
    assert ended.value.code == 2 and "--limit" in capsys.readouterr().err


@pytest.mark.parametrize("options, folder", [([], "full"), (["--sample"], "sample"), (["--limit", 100], "limit-100")])
def test_default_folders_stand_beside_the_scripts(monkeypatch, tmp_path, options, folder):
    monkeypatch.setattr(common, "HERE", tmp_path)
    args = parse(monkeypatch, *options)
    assert args.output_dir == tmp_path / "outputs" / folder and args.output_dir.is_dir()
    assert args.data_dir == tmp_path / ("sample" if folder == "sample" else "data/dogscats")


def test_sample_of_the_dataset_goes_before_the_bundled_one(monkeypatch, tmp_path):
    (tmp_path / "sample").mkdir()
    assert parse(monkeypatch, "--sample", "--data-dir", tmp_path, "--output-dir", tmp_path).data_dir == tmp_path / "sample"


def test_the_options_in_force_are_printed(monkeypatch, tmp_path):
    args = parse(monkeypatch, "--output-dir", tmp_path, "--seed", 7)
    printed = sys.stdout.getvalue().splitlines()[0]
    assert {f"{name}={value}" for name, value in vars(args).items() if value is not None} < {"options:", *printed.split()}


def test_in_a_notebook_there_is_no_command_line(monkeypatch, tmp_path):
    """Its stdout is no real file, and its argv is Jupyter's own."""
    monkeypatch.setattr(common, "HERE", tmp_path)
    plt.switch_backend("svg")  # any that is not the one for no display
    args = parse(monkeypatch, "-f", "x.json", program="/lib/ipykernel_launcher.py")
    plt.switch_backend("Agg")
    assert args.sample and args.show


def test_show_without_a_display_is_said(monkeypatch, tmp_path):
    assert not parse(monkeypatch, "--show", "--output-dir", tmp_path).show
    assert "there is no display here" in sys.stdout.getvalue()


def test_without_show_figures_need_no_display(monkeypatch, tmp_path):
    plt.switch_backend("svg")
    parse(monkeypatch, "--output-dir", tmp_path)
    assert plt.get_backend().lower() == "agg"


@pytest.mark.parametrize("seconds, pause, at_terminal, waits", [
    (1175, True, True, True), (1175, True, False, False), (1175, False, True, False), (None, True, True, False),
    (1175, True, None, False)])
def test_a_banner_waits_for_enter_where_it_has_a_minute(monkeypatch, capsys, seconds, pause, at_terminal, waits):
    read = []
    stdin = SimpleNamespace(isatty=lambda: at_terminal, readline=lambda: read.append("Enter"))
    monkeypatch.setattr(sys, "stdin", stdin if at_terminal is not None else None)  # there may be none at all
    common.banner("a heading", seconds, pause)
    printed = capsys.readouterr().out
    assert ("0:19:35, https://youtu.be/ZhC-DIrCe6A?t=1175\n" in printed) == (seconds is not None) == ("====" in printed)
    assert "a heading" in printed and bool(read) == waits


def test_progress_says_nothing_of_quick_work(capsys):
    list(common.progress([("inputs", [0])], 1))
    assert capsys.readouterr().err == ""


def test_progress_in_a_log_is_a_few_lines(monkeypatch, capsys):
    clock = iter(range(0, 100_000, 10))  # ten seconds a batch
    monkeypatch.setattr(common.time, "monotonic", lambda: next(clock))
    batches = [("inputs", [0] * 5)] * 100
    assert list(common.progress(batches, 100)) == batches
    lines = capsys.readouterr().err.splitlines()
    assert 3 <= len(lines) <= 6
    assert lines[0].split() == ["3%,", "15", "images,", "0.5", "images/s,", "0:16:10", "left"]


# -------------------------------------------------------------------------------------------------- dataset, loaders
@pytest.mark.parametrize("n, kept_train, kept_valid", [
    (2, (1, 1), (1, 1)), (10, (5, 5), (1, 1)), (11, (5, 6), (1, 1)), (40, (20, 20), (2, 2)), (60, (30, 30), (3, 3)),
    (100, (30, 40), (5, 5)), (1_000_000, (30, 40), (9, 9))])
def test_limit_keeps_half_of_each_class_evenly_spaced(tmp_path, n, kept_train, kept_valid):
    for name, count in (("train/cats", 30), ("train/dogs", 40), ("valid/cats", 9), ("valid/dogs", 9)):
        (tmp_path / name).mkdir(parents=True)
        for i in range(count):
            (tmp_path / name / f"{i:02}.jpg").touch()
    dsets = {x: datasets.ImageFolder(tmp_path / x) for x in ("train", "valid")}
    before = {x: list(dsets[x].imgs) for x in dsets}
    common.limit_images(dsets, n)
    for x, kept in (("train", kept_train), ("valid", kept_valid)):
        assert (dsets[x].targets.count(0), dsets[x].targets.count(1)) == kept and len(dsets[x]) == sum(kept)
        assert dsets[x].imgs == dsets[x].samples == sorted(dsets[x].samples)
        assert dsets[x].targets == [label for _, label in dsets[x].imgs]
        for label in (0, 1):
            places = [i for i, sample in enumerate(before[x]) if sample[1] == label]
            of_class = [before[x].index(sample) for sample in dsets[x].imgs if sample[1] == label]
            gaps = np.diff([*of_class, places[-1] + 1])
            assert of_class[0] == places[0] and gaps.max() - gaps.min() <= 1


def test_loaders_shuffle_to_train_and_keep_the_order_to_validate(dataset):
    args = SimpleNamespace(device="cpu", bf16=False, data_dir=dataset, limit=None, num_workers=1)
    _, dsets, loader_train, loader_valid = common.load_data(args, batch_size=7)
    assert type(loader_train.sampler) is RandomSampler and type(loader_valid.sampler) is SequentialSampler
    assert (loader_train.batch_size, loader_valid.batch_size) == (7, 5)
    assert loader_train.num_workers == loader_valid.num_workers == 1
    assert loader_train.dataset is dsets["train"] and loader_valid.dataset is dsets["valid"]
    assert len(dsets["train"]) == 6
    args.limit = 2
    assert {x: len(dset) for x, dset in common.load_data(args)[1].items()} == {"train": 2, "valid": 2}


def test_workers_are_for_the_machine():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert common.loader_options(24, None, cpu)["num_workers"] == 0
    assert common.loader_options(23_000, None, cpu)["num_workers"] == 1
    assert 1 <= common.loader_options(23_000, None, cuda)["num_workers"] <= (os.cpu_count() or 1)
    assert common.loader_options(23_000, 3, cpu)["num_workers"] == 3


# ------------------------------------------------------------------------------------------- what a result hangs on
def both(folder, transform=common.imagenet_format):
    return {x: datasets.ImageFolder(folder / x, transform) for x in ("train", "valid")}


def test_the_record_sees_each_images_name_size_and_time(dataset):
    def changed(since):
        return common.differences(since, common.identify(both(dataset)))

    assert changed(common.identify(both(dataset))) == ""
    for path in sorted(dataset.rglob("*.jpg")):
        part, now = f"{path.parent.parent.name} images", os.stat(path)
        same = common.identify(both(dataset))
        os.utime(path, ns=(now.st_atime_ns, now.st_mtime_ns + 1000))
        assert changed(same) == part
        same, now = common.identify(both(dataset)), os.stat(path)
        with open(path, "ab") as file:
            file.write(b"0")
        os.utime(path, ns=(now.st_atime_ns, now.st_mtime_ns))
        assert changed(same) == part
        same = common.identify(both(dataset))
        path.rename(path.with_name(f"{path.stem}_.jpg"))
        assert changed(same) == part


def test_the_record_sees_transform_and_limit_and_not_the_place(dataset, tmp_path):
    dsets = both(dataset)
    whole = common.identify(dsets)
    assert common.identify(both(shutil.copytree(dataset, tmp_path / "copy"))) == whole
    assert common.differences(whole, common.identify(both(dataset, common.transforms.ToTensor()))) == "transform"
    common.limit_images(dsets, 4)
    assert common.differences(whole, common.identify(dsets)) == "train images and valid images"


def test_the_record_sees_every_frozen_layer_and_not_the_last(vgg):
    record = common.made_from({}, vgg)
    for name, value in vgg.state_dict().items():
        kept = value.flatten()[-1].clone()
        value.view(-1)[-1] += 1
        changed = common.differences(record, common.made_from({}, vgg))
        assert changed == ("" if name.startswith("classifier.6.") else "frozen layers"), name
        value.view(-1)[-1] = kept


def test_the_record_sees_the_precision_and_not_the_memory_format(vgg):
    record = common.made_from({"transform": "T"}, vgg)
    assert common.made_from({"transform": "T"}, vgg.to(memory_format=torch.channels_last)) == record
    changed = common.differences(record, common.made_from({"transform": "T"}, common.to_device(vgg, torch.device("cpu"), True)))
    assert changed == "frozen layers and precision"


@pytest.mark.parametrize("record, changed", [
    ({"a": 1, "b": 2}, ""), ({"a": 1, "b": 3}, "b"), ({"a": 2, "b": 2}, "a"), ({}, "a and b"), ({"a": 1, "b": 2, "c": 3}, "")])
def test_differences_compares_each_field(record, changed):
    assert common.differences(record, {"a": 1, "b": 2}) == changed


def test_metrics_hold_seconds_per_epoch(vgg, tmp_path):
    args = argparse.Namespace(output_dir=tmp_path, data_dir=tmp_path, weights="imagenet")
    metrics = common.save_head(args, "03", vgg, {"transform": "T"}, [(0.7, 0.5, 2.0), (0.6, 0.75, 6.0)])
    assert (metrics["seconds_per_epoch"], metrics["train_seconds"]) == (4, 8)
    assert (metrics["train_loss"], metrics["train_accuracy"]) == ([0.7, 0.6], [0.5, 0.75])


def test_images_per_second_leaves_out_the_first_batch(monkeypatch, tmp_path):
    """Before the first batch come the start of the workers, and what a device does only once."""
    clock, four = [50.0], script("04_precompute")
    monkeypatch.setattr(four.time, "perf_counter", lambda: clock[0])
    rows = four.FeatureFile(tmp_path / "feat.npy", (20, 3), {}, 8)
    for count in (8, 8, 4):
        clock[0] += 2
        rows.extend(np.zeros((count, 3)))
    assert np.asarray(rows).shape == (20, 3)
    assert common.load(tmp_path / "feat.json", "")["images_per_second"] == 12 / 4


def test_log_loss_is_the_closed_formula():
    proba = np.float32([[0.9, 0.1], [0.4, 0.6], [0.99, 0.01]])
    assert common.log_loss(proba, [0, 1, 1]) == pytest.approx(-(np.log(0.9) + np.log(0.6) + np.log(0.01)) / 3)
    assert common.log_loss(np.float32([[0, 1]]), [0]) == np.inf


# ----------------------------------------------------------------------------------------------------------- figures
@pytest.fixture
def axes():
    """The axes of the figure that a helper draws, in their order."""
    yield lambda: plt.gcf().axes
    plt.close("all")


def test_predictions_stand_over_their_images_red_where_wrong(axes):
    images = [Image.new("RGB", (20, 20), (value, 0, 0)) for value in (10, 20, 30)]
    proba = np.float32([[0.9, 0.1], [0.2, 0.8], [0.375, 0.625]])
    common.show_predictions(images, ["x/a.jpg", "x/b.jpg", "x/c.jpg"], [0, 0, 1], proba, "a heading")
    assert [ax.get_title() for ax in axes()] == [
        "true: cat\npredicted: cat, 0.900\na.jpg", "true: cat\npredicted: dog, 0.800\nb.jpg",
        "true: dog\npredicted: dog, 0.625\nc.jpg"]
    assert [ax.title.get_color() for ax in axes()] == ["black", "red", "black"]
    assert [ax.get_images()[0].get_array()[0, 0, 0] for ax in axes()] == [10, 20, 30]
    assert plt.gcf().get_suptitle() == "a heading"


def test_an_empty_view_says_none(axes):
    common.show_images([], [], "Incorrect, at random")
    assert [text.get_text() for text in axes()[0].texts] == ["none"] and plt.gcf().get_suptitle() == "Incorrect, at random"


METRICS = {"train_loss": [0.9, 0.6, 0.5], "train_accuracy": [0.25, 0.5, 0.75], "valid_loss": 0.4, "valid_accuracy": 0.625}


def test_training_is_drawn_as_the_metrics_say(axes):
    common.plot_training(METRICS, "a title", {"on features": 0.5, "on images": 8})
    for ax, name in zip(axes(), ("loss", "accuracy"), strict=False):
        train, valid = ax.lines[:2]
        assert np.array_equal(train.get_xydata(), [*zip([1, 2, 3], METRICS[f"train_{name}"], strict=True)])
        assert np.array_equal(valid.get_xydata(), [[3, METRICS[f"valid_{name}"]]])
        assert [text.get_text().split(",")[0] for text in ax.get_legend().get_texts()] == ["train", "valid"]
        assert name in ax.get_ylabel() and ax.get_xlabel() == "epoch"
    bars = axes()[2]
    assert [bar.get_height() for bar in bars.patches] == [0.5, 8]
    assert [label.get_text() for label in bars.get_xticklabels()] == ["on features", "on images"]


def test_accuracy_goes_from_0_to_1_with_a_line_at_a_guess(axes):
    common.plot_training(METRICS, "a title")
    low, high = axes()[1].get_ylim()
    assert low == 0 and 1 <= high < 1.1
    assert set(axes()[1].lines[2].get_ydata()) == {0.5}
    assert len(axes()[0].lines) == 2 and len(axes()) == 2  # no line in the loss, no bars without seconds
