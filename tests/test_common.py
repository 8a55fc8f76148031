"""The functions of common.py, each compared with plain torch, torchvision, numpy or a closed formula."""
import re
from argparse import Namespace
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import json_of, message, raise_
from PIL import Image
from torch import nn
from torch.utils.data import RandomSampler, SequentialSampler
from torchvision import models
from torchvision.utils import make_grid

import common
import support


def on_gpu(tensor):
    """A tensor that must be copied to the CPU before anything else is done with it."""
    return SimpleNamespace(cpu=lambda: tensor)


@pytest.mark.parametrize("title, shown", [("a $title$", "a $title$"), (0, "0"), (None, "")])
def test_imagenet_format_crops_and_normalizes_and_imshow_undoes_it(caplog, title, shown):
    """VGG16 gets the numbers that it was trained on, and a figure shows the original colours."""
    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    cropped = np.float32(pixels[38:-38, 88:-88]) / 255
    inputs = common.imagenet_format(Image.fromarray(pixels))
    normal = (cropped - np.float32([0.485, 0.456, 0.406])) / np.float32([0.229, 0.224, 0.225])
    assert np.allclose(inputs, normal.transpose(2, 0, 1), atol=1e-6)
    common.imshow(on_gpu(inputs), title)
    assert np.allclose((ax := plt.gca()).get_images()[0].get_array(), cropped, atol=1e-6)
    common.imshow(inputs * 3)
    assert caplog.text == ""  # matplotlib warns of values that are not from 0 to 1
    assert (ax.get_title(), ax.title.get_parse_math(), ax.axison) == (shown, title is None, False)


@pytest.mark.parametrize("n", [1, 2, 10])
def test_each_name_in_a_list_of_titles_stands_above_its_image(n):
    """A grid has 8 images in a row; a name above a different image would teach the wrong class."""
    common.imshow(make_grid(torch.zeros(n, 3, 224, 224)), [f"name {i}" for i in range(n)])
    assert [text.get_text() for text in plt.gca().texts] == [f"name {i}" for i in range(n)]
    for i, text in enumerate(plt.gca().texts):
        x, y = text.get_position()
        assert abs(x - 226 * (i % 8) - 114) < 3 and -20 < y - 226 * (i // 8) < 0 and text.get_ha() == "center"


@pytest.mark.parametrize("weights", ["imagenet", "untrained", "half", "channels_last", "gpu"])
def test_weights_are_those_asked_for_however_their_file_was_saved(vgg_file, tmp_path, monkeypatch, weights):
    """Untrained weights are random, and the same in every script; a student's .pth file may come from a GPU."""
    torch.manual_seed(0)
    model = models.vgg16().to(memory_format=torch.channels_last if weights == "channels_last" else None)
    state = (model.half() if weights == "half" else model).state_dict()
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0" if weights == "gpu" else "cpu")
    torch.save(state, tmp_path / "my.pth")
    state = torch.load(vgg_file, weights_only=True) if weights == "imagenet" else state
    torch.manual_seed(1)
    ours = common.load_vgg16(weights if "i" in weights else str(tmp_path / "my.pth")).state_dict()
    assert ours.keys() == state.keys() and ours["features.0.weight"].std() > 0
    assert all(ours[name].dtype == torch.float32 and torch.equal(ours[name], state[name].float()) for name in ours)


@pytest.mark.parametrize("content", [None, b"", b"<html>", b"truncated", {"weight": torch.zeros(3)}, [1, 2]])
def test_unusable_weights_are_named_in_one_line_with_what_to_do(vgg_file, tmp_path, monkeypatch, content):
    """A stopped download, a login page, a different network: torch's own message has a line for each layer."""
    path, problem = tmp_path / "x.pth", "missing, damaged or unsafe"
    if isinstance(content, bytes):
        path.write_bytes(vgg_file.read_bytes()[:2**20] if content == b"truncated" else content)
    elif content:
        torch.save(content, path)
        problem = "does not contain the layers of this VGG"
    monkeypatch.setattr(common, "IMAGENET_FILE", path)
    for weights, advice in [("imagenet", "delete it if it exists, and run this script again"),
                            (str(path), "give a different file to --weights")]:
        assert re.fullmatch(f"error: {re.escape(str(path))}: {problem} [(].*[)]: {advice}",
                            message(common.load_vgg16, weights))


def test_without_network_a_run_ends_but_the_sample_continues_untrained(vgg_file, tmp_path, monkeypatch, capsys):
    """The first try of the course needs no network; a real run must not continue with random weights."""
    imagenet = models.VGG16_Weights.IMAGENET1K_V1
    assert vgg_file == common.IMAGENET_FILE and vgg_file.name == imagenet.url.rpartition("/")[2]  # torchvision's place
    assert common.get_weights("imagenet") == "imagenet" and capsys.readouterr().out == ""  # it is there: no download
    downloads, path = [], tmp_path / vgg_file.name
    monkeypatch.setattr(common, "IMAGENET_FILE", path)
    monkeypatch.setattr(common, "download", lambda *args: downloads.append(args) or raise_(support.UserError("no net")))
    assert message(common.get_weights, "imagenet") == "error: no net, or use --weights FILE or --weights untrained"
    assert common.get_weights("imagenet", sample=True) == "untrained"
    assert re.fullmatch(r"no net\n\*+\nNOTICE: untrained weights[^*]*\*+\n", capsys.readouterr().out)
    assert common.get_weights("untrained") == "untrained" and "NOTICE: untrained" in capsys.readouterr().out
    assert common.get_weights("my.pth", sample=True) == "my.pth" and capsys.readouterr().out == ""
    assert downloads == 2 * [([imagenet.url], path, 553_433_881, ["sha256", "397923af"])]


def test_only_the_new_last_layer_is_trained_and_bf16_layers_take_and_return_float32(vgg):
    """8,194 parameters, log-probabilities, nearly the same ones in bfloat16; no channels_last on MPS, which errs."""
    trainable = {name: param.shape for name, param in vgg.named_parameters() if param.requires_grad}
    assert trainable == {"classifier.6.weight": (2, 4096), "classifier.6.bias": (2,)}
    inputs = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        exact = torch.softmax(vgg.classifier[:7](vgg.features(inputs).flatten(1)), dim=1)
        assert torch.allclose(vgg(inputs).exp(), exact)
        features = common.to_device(vgg, torch.device("cpu"), bf16=True).features(inputs)
        log_proba = vgg.classifier(features.flatten(1))
    assert features.dtype == log_proba.dtype == vgg.classifier[6].weight.dtype == torch.float32
    assert vgg.features[0].weight.dtype == vgg.classifier[3].weight.dtype == torch.bfloat16
    assert 0 < (log_proba.exp() - exact).abs().max() < 0.01
    model = SimpleNamespace(to=lambda device, memory_format: (device.type, memory_format))
    for kind, layout in [("cpu", torch.channels_last), ("cuda", torch.channels_last), ("mps", torch.contiguous_format)]:
        assert common.to_device(model, torch.device(kind)) == (kind, layout)


def pretend(patch, found, **factors):
    """Torch finds these GPUs, and computes on these devices (a wrong result if the factor is not 1)."""
    ones = torch.ones
    patch.setattr(torch.cuda, "is_available", lambda: "cuda" in found)
    patch.setattr(torch.backends.mps, "is_available", lambda: "mps" in found)
    patch.setattr(torch, "ones", lambda size, device: ones(size) * factors[device])


@pytest.mark.parametrize("name, found, factors, expected", [
    ("auto", "cuda mps", {"cpu": 1, "cuda": 1, "mps": 1}, "cuda"), ("auto", "mps", {"cpu": 1, "mps": 1}, "mps"),
    ("auto", "", {"cpu": 1}, "cpu"), ("cpu", "cuda", {"cpu": 1, "cuda": 1}, "cpu"),
    ("mps", "cuda mps", {"cpu": 1, "cuda": 1, "mps": 1}, "mps"), ("auto", "cuda", {"cpu": 1}, "cpu, not cuda"),
    ("auto", "mps", {"cpu": 1, "mps": 0}, "cpu, not mps"), ("cuda", "", {"cpu": 1}, "error"),
    ("cuda", "cuda", {"cpu": 1, "cuda": 0}, "error")])
def test_a_gpu_is_used_if_it_can_compute(monkeypatch, capsys, name, found, factors, expected):
    """An old GPU is found but cannot compute: auto continues on the CPU, and a named device is an error."""
    pretend(monkeypatch, found, **factors)
    device, _, bad = expected.partition(", not ")
    if device == "error":
        assert re.fullmatch(f"error: --device {name}: .*: use --device cpu", message(common.get_device, name))
    else:
        assert common.get_device(name).type == device
        assert re.match(rf"NOTICE: a GPU \({bad}\) was found" if bad else "$", capsys.readouterr().out)


def test_bf16_is_refused_or_announced_if_the_device_lacks_it(monkeypatch, capsys):
    """An emulated bfloat16 is several times slower than float32: this is shown before the run."""
    pretend(monkeypatch, "cuda mps", cpu=1, cuda=1, mps=1)
    native = False
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    for name in ["cuda", "mps"]:
        assert f"error: --bf16: {name} does not support bfloat16" in message(common.get_device, name, True)
    assert common.get_device("cpu", bf16=True).type == "cpu" and "NOTICE: --bf16: " in capsys.readouterr().out
    native = True
    assert [common.get_device(name, bf16=True).type for name in ("cuda", "cpu")] == ["cuda", "cpu"]
    assert capsys.readouterr().out == ""


INPUTS = torch.randn(37, 8, generator=torch.Generator().manual_seed(1))
LABELS = (INPUTS[:, 0] > 0).long()
BATCHES = list(zip(INPUTS.split(10), LABELS.split(10), strict=True))  # the last one has 7 images


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 2), nn.LogSoftmax(dim=1))


def test_training_is_plain_sgd_with_dropout(monkeypatch, capsys):
    """The weights equal a plain loop's to the last bit, and each epoch has its own loss, accuracy and time."""
    clock, sums = [100.0], []
    model, oracle = small_model().eval(), small_model().train()
    optimizer, plain = (torch.optim.SGD(network.parameters(), lr=0.1) for network in (model, oracle))
    monkeypatch.setattr(common, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def criterion(outputs, classes):
        clock[0] += 2
        return 2 * nn.functional.nll_loss(outputs, classes)

    torch.manual_seed(3)
    history = common.train_model(model, BATCHES, size=40, epochs=3, optimizer=optimizer, criterion=criterion)
    torch.manual_seed(3)
    for inputs, classes in BATCHES * 3:
        outputs = oracle(inputs)
        loss = criterion(outputs, classes)
        plain.zero_grad()
        loss.backward()
        plain.step()
        sums.append((loss.item() * len(classes), (outputs.argmax(dim=1) == classes).sum().item(), 2))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(model.parameters(), oracle.parameters(), strict=True))
    expected = np.reshape(sums, (3, 4, 3)).sum(axis=1) / (40, 40, 1)  # 3 epochs of 4 batches; 40 images, as given
    ours = [[epoch["loss"], epoch["accuracy"], epoch["seconds"]] for epoch in history]
    assert np.allclose(ours, expected, atol=1e-6) and ours[2][0] < ours[0][0]
    assert capsys.readouterr().out.splitlines() == [
        f"epoch  {i + 1}/3  loss {ours[i][0]:.4f}  accuracy {ours[i][1]:.4f}  8.00 s" for i in range(3)]


def test_testing_is_plain_torch_without_dropout(capsys):
    """The results are those of the test images in their order, also if the network runs on a GPU."""
    network = small_model().train().append(nn.Identity())
    network[-1].forward = on_gpu
    results = common.test_model(network, BATCHES, size=40)  # 37 images: the missing ones count as wrong
    plain = small_model().eval()
    proba = torch.cat([plain(inputs) for inputs, _ in BATCHES]).detach().double().exp().numpy()
    preds, labels = proba.argmax(axis=1), LABELS.numpy()
    for array, expected in zip(results, [preds, proba, labels], strict=True):
        assert len(array) == 40 and array.dtype == expected.dtype and np.allclose(array[:37], expected, 1e-12, 0)
    loss, accuracy = -np.log(proba[np.arange(37), labels]).sum() / 40, (preds == labels).sum() / 40
    assert capsys.readouterr().out == f"test on 40 images  loss {loss:.4f}  accuracy {accuracy:.4f}\n"
    assert not network.training


@pytest.mark.parametrize("kind", ["cpu", "cuda", "mps"])
def test_batches_are_copied_in_the_background_to_cuda_alone(kind):
    """On MPS, such a copy can come too late: the network would see a different batch."""
    copies, model = [], small_model()

    class Batch(torch.Tensor):
        def to(self, device, non_blocking=False):
            copies.append((device.type, non_blocking))
            return self.as_subclass(torch.Tensor)

    inputs, labels = (tensor.as_subclass(Batch) for tensor in BATCHES[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.parameters = lambda: iter([SimpleNamespace(device=torch.device(kind))])
    common.train_model(model, [(inputs, labels)], 10, optimizer=optimizer)
    common.test_model(model, [(inputs, BATCHES[0][1])], 10)
    assert copies == 2 * [(kind, kind == "cuda")] + [(kind, False)]


def test_a_probability_that_underflows_gives_one_finite_loss(capsys):
    """With a large learning rate a probability becomes 0: what is printed, saved and computed later must agree."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    model[0].weight.data = torch.eye(2)
    rows = [(torch.tensor([[-1000.0, 0.0], [0.0, -2000.0]]), torch.tensor([0, 0]))]
    results, loss = common.test_model(model, rows, size=2), -np.log(np.finfo(np.float64).tiny) / 2
    assert f"loss {loss:.4f}  accuracy 0.5000" in capsys.readouterr().out
    assert common.log_loss(*results[1:]) == pytest.approx(loss)
    assert common.log_loss(np.array([[0, 1], [0.75, 0.25]]), [0, 1]) == pytest.approx(loss - np.log(0.25) / 2)


@pytest.mark.parametrize("weights, tested", [("untrained", False), ("imagenet", True)])
def test_results_are_saved_before_the_test_and_after_it(tmp_path, weights, tested):
    """If the test stops at a damaged image, the training is not lost; the last layer may be on a GPU."""
    state = {"weight": torch.rand(2, 4096), "bias": torch.rand(2)}
    layer = SimpleNamespace(state_dict=lambda: {name: on_gpu(value) for name, value in state.items()})
    args = Namespace(output_dir=tmp_path, data_dir=tmp_path / "data", weights=weights)
    history = [{"loss": 0.7, "accuracy": 0.5, "seconds": 2.0}, {"loss": 0.6, "accuracy": 0.75, "seconds": 6.0}]
    results = {"predictions": np.array([0, 0, 1]), "all_proba": np.array([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6]]),
               "all_classes": np.array([0, 1, 1])} if tested else {}
    returned = common.save_results(args, "04", SimpleNamespace(classifier=[*"012345", layer]), {"transform": "T"},
                                   history, tuple(results.values()))
    metrics, head = json_of(tmp_path / "04_metrics.json"), torch.load(tmp_path / "04_head.pt", weights_only=True)
    validation = [metrics.pop(name, None) for name in ("valid_loss", "valid_accuracy")]
    assert validation == ([pytest.approx(-np.log([0.9, 0.2, 0.6]).mean()), 2 / 3] if tested else [None, None])
    assert metrics == {"options": {name: str(value) for name, value in vars(args).items()}, "weights": weights,
                       "pretrained": tested, "dataset": str(tmp_path / "data"), "made_from": {"transform": "T"},
                       "seconds_per_epoch": 4, "train_loss": [0.7, 0.6], "train_accuracy": [0.5, 0.75]}
    assert head.keys() == state.keys() and all(torch.equal(head[name], state[name]) for name in state)
    assert all(np.array_equal(np.load(tmp_path / f"04_{name}.npy"), results[name]) for name in results)
    assert len([*tmp_path.iterdir()]) == 2 + len(results) and returned.get("valid_accuracy") == validation[1]


@pytest.mark.parametrize("n, train", [(2, (1, 1)), (11, (5, 6)), (100, (30, 50)), (10**6, (30, 70))])
def test_limit_keeps_n_training_and_200_validation_images_evenly_spaced(n, train):
    """Half of each class, so that guessing stays at 50 %, and not only the first photos."""
    counts = {"train": (30, 70), "valid": (150, 90)}
    dsets = {x: Namespace(samples=[(i, label) for label in (0, 1) for i in range(counts[x][label])]) for x in counts}
    common.limit_images(dsets, n)
    for x, kept in [("train", train), ("valid", (100, 90))]:
        evenly = [(i * counts[x][label] // kept[label], label) for label in (0, 1) for i in range(kept[label])]
        assert dsets[x].samples == dsets[x].imgs == evenly and dsets[x].targets == [label for _, label in evenly]


def load_data(dataset, batch_size=64, **options):
    args = Namespace(device="cpu", bf16=False, sample=False, data_dir=dataset, limit=None, num_workers=0)
    vars(args).update(options)
    return common.load_data(args, batch_size)


def test_loaders_shuffle_for_training_and_keep_the_order_for_validation(dataset, capsys):
    """Row i of every result belongs to image i, and results of a subset never mix with those of all images."""
    _, dsets, train, valid = load_data(dataset, batch_size=4)
    assert capsys.readouterr().out == "6 training images, 4 validation images; device: cpu\n"
    assert (type(train.sampler), type(valid.sampler), valid.batch_size) == (RandomSampler, SequentialSampler, 5)
    assert [len(labels) for _, labels in train] == [4, 2]
    (inputs, labels), = valid
    images = [common.imagenet_format(Image.open(path)) for path in sorted(dataset.glob("valid/*/*"))]
    assert torch.equal(inputs, torch.stack(images)) and labels.tolist() == [0, 0, 1, 1]
    _, limited, train, _ = load_data(dataset, limit=2)
    assert len(train.dataset) == 2 and train.batch_size == 64
    assert support.differences(support.make_record(dsets), support.make_record(limited)) == "train images"


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("kind, threads, options, workers", [
    ("cpu", 64, {}, 0), ("cuda", 64, {}, 16), ("mps", 8, {}, 8), ("cuda", 8, {"sample": True}, 0),
    ("cuda", 8, {"num_workers": 0}, 0), ("cpu", 8, {"sample": True, "num_workers": 3}, 3)])
def test_workers_by_default_only_for_a_gpu(dataset, monkeypatch, kind, threads, options, workers):
    """A GPU waits for images unless several processes load them; on a CPU they would only cost memory."""
    monkeypatch.setattr(common, "get_device", lambda name, bf16: torch.device(kind))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    _, _, *loaders = load_data(dataset, **{"num_workers": None, **options})
    assert [(loader.num_workers, loader.pin_memory) for loader in loaders] == 2 * [(workers, kind == "cuda")]


@pytest.mark.parametrize("workers", [0, 1])
def test_empty_and_truncated_photos_are_named(dataset, workers):
    """A copy that failed is noticed before the training; torch's message for an error in a worker has no file name."""
    path, names = dataset / "valid" / "cats" / "cat.1.jpg", [f"dogs/x.{i:02}.jpg" for i in range(25)]
    path.write_bytes(path.read_bytes()[:5000])
    *_, loader = load_data(dataset, num_workers=workers)
    assert message(list, loader).startswith(f"error: {path}: cannot be read as an image (")
    for name in names:
        (dataset / "valid" / name).touch()
    assert message(load_data, dataset) == (f"error: {dataset / 'valid'}: 25 empty files, {', '.join(names[:20])} and 5 "
                                           "more: replace or remove them")


@pytest.mark.parametrize("show", [False, True])
def test_a_figure_is_saved_as_png_then_shown_and_closed(tmp_path, monkeypatch, show):
    """Whatever format a matplotlibrc asks for; figures that stay open would fill the memory."""
    shown, figure, path = [], plt.figure(), tmp_path / "a.png"
    monkeypatch.setattr(plt, "show", lambda: shown.append((plt.gcf(), path.exists())))
    with plt.rc_context({"savefig.format": "pdf"}):
        common.save_figure(path, show)
    assert shown == [(figure, True)] * show and not plt.get_fignums() and path.read_bytes().startswith(b"\x89PNG")


def test_titles_of_predictions_can_be_drawn_and_do_not_overlap():
    """Phones make long names, old archives make names that are not Unicode; without images, "none" is drawn."""
    paths = ["x/$a$.jpg", "x/bad\udcff.jpg", "x/IMG_20240131_115959_of_our_cat_0123456789.jpg"]
    images, proba = [Image.new("RGB", (2, 2))] * 3, np.array([[0.9, 0.1], [0.2, 0.8], [0.375, 0.625]])
    common.show_predictions(images, paths, [0, 0, 1], proba, "heading")
    assert [(ax.get_title(), ax.title.get_color(), ax.title.get_parse_math()) for ax in plt.gcf().axes] == [
        ("true: cat\npredicted: cat, 0.900\n$a$.jpg", "black", False),
        ("true: cat\npredicted: dog, 0.800\nbad\\udcff.jpg", "red", False),
        ("true: dog\npredicted: dog, 0.625\nIMG_20240131_1...123456789.jpg", "black", False)]
    common.show_predictions([], [], [], [], "heading")  # a notebook shows no figure without axes
    assert [text.get_text() for text in plt.gca().texts] == ["none"]


def test_training_is_plotted_with_the_validation_at_the_end():
    """Points of each epoch, and one mark for the validation images after the last epoch."""
    metrics = {"train_loss": [0.9, 0.6], "train_accuracy": [0.2, 0.5], "valid_loss": 0.4, "valid_accuracy": 0.6}
    common.plot_training(metrics, "a title")
    for ax, name in zip(plt.gcf().axes, ["loss", "accuracy"], strict=True):
        train, valid = metrics[f"train_{name}"], metrics[f"valid_{name}"]
        assert [line.get_xydata().tolist() for line in ax.lines[:2]] == [[[1, train[0]], [2, train[1]]], [[2, valid]]]
        assert [text.get_text()[:5] for text in ax.get_legend().get_texts()] == ["train", "valid"]
        assert ax.get_ylabel().startswith(name)
