"""The functions of common.py, each compared with plain torch, torchvision, numpy or a closed formula."""
import re
from argparse import Namespace
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import dsets_of, json_of, message, raise_
from PIL import Image
from torch import nn
from torchvision import models
from torchvision.utils import make_grid

import common
from support.errors import UserError
from support.records import differences, make_record


def on_gpu(tensor):
    """A tensor that must be copied to the CPU before anything else is done with it."""
    return SimpleNamespace(cpu=lambda: tensor, dtype=tensor.dtype)


def test_imagenet_format_crops_and_normalizes_and_imshow_undoes_it(caplog):
    """VGG16 gets the numbers that it was trained on; a figure shows the original colours, and names above images."""
    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    cropped = np.float32(pixels[38:-38, 88:-88]) / 255
    inputs = common.imagenet_format(Image.fromarray(pixels))
    normal = (cropped - np.float32([0.485, 0.456, 0.406])) / np.float32([0.229, 0.224, 0.225])
    assert np.allclose(inputs, normal.transpose(2, 0, 1), atol=1e-6)
    common.imshow(on_gpu(inputs), "a $title$")
    axes = plt.gca()
    assert np.allclose(axes.get_images()[0].get_array(), cropped, atol=1e-6)
    assert (axes.get_title(), axes.title.get_parse_math(), axes.axison) == ("a $title$", False, False)
    common.imshow(make_grid([inputs * 3] * 10), list("abcdefghij"))
    assert "".join(text.get_text() for text in axes.texts) == "abcdefghij"
    for i, text in enumerate(axes.texts):
        x, y = text.get_position()
        assert abs(x - 226 * (i % 8) - 114) < 3 and -20 < y - 226 * (i // 8) < 0 and text.get_ha() == "center"
    common.imshow(inputs, 0)
    assert axes.get_title() == "0" and caplog.text == ""  # matplotlib warns of values that are not from 0 to 1


@pytest.mark.parametrize("kind", ["untrained", "half", "channels_last", "gpu"])
def test_weights_are_those_asked_for_however_their_file_was_saved(tmp_path, monkeypatch, kind):
    """Untrained weights are random, and the same in every script; a student's .pth file may come from a GPU."""
    torch.manual_seed(0)
    model = models.vgg16().to(memory_format=torch.channels_last if kind == "channels_last" else None)
    state = (model.half() if kind == "half" else model).state_dict()
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0" if kind == "gpu" else "cpu")
    torch.save(state, tmp_path / "my.pth")
    torch.manual_seed(1)
    ours = common.load_vgg16(kind if kind == "untrained" else str(tmp_path / "my.pth")).state_dict()
    assert all(ours[name].dtype == torch.float32 and torch.equal(ours[name], state[name].float()) for name in state)


@pytest.mark.parametrize("content", [None, b"", b"<html>", {"weight": torch.zeros(3)}, [1, 2]])
def test_unusable_weights_are_named_in_one_line_with_what_to_do(tmp_path, monkeypatch, content):
    """A stopped download, a login page, a different network: torch's own message has a line for each layer."""
    path, problem = tmp_path / "x.pth", "missing, damaged or unsafe"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        torch.save(content, path)
        problem = "does not contain the layers of this VGG"
    monkeypatch.setattr(common, "IMAGENET_FILE", path)
    for weights, advice in [("imagenet", "delete it if it exists, and run this script again"),
                            (str(path), "give a different file to --weights")]:
        text = message(common.load_vgg16, weights)
        assert text.startswith(f"error: {path}: {problem} (") and text.endswith(f"): {advice}")


def test_without_network_a_run_ends_but_the_sample_continues_untrained(tmp_path, monkeypatch, capsys):
    """The first try of the course needs no network; a real run must not continue with random weights."""
    monkeypatch.chdir(tmp_path)
    assert [common.get_weights(x) for x in ("imagenet", "my.pth")] == ["imagenet", str(tmp_path / "my.pth")]
    assert capsys.readouterr().out == ""  # ImageNet's are there
    monkeypatch.setattr(common, "IMAGENET_FILE", tmp_path / "none.pth")
    monkeypatch.setattr(common, "download", lambda *args: raise_(UserError("no net")))
    assert message(common.get_weights, "imagenet") == "error: no net, or use --weights FILE or --weights untrained"
    assert common.get_weights("imagenet", sample=True) == "untrained"
    assert re.fullmatch(r"no net\n\*+\nNOTICE: untrained weights[^*]*\*+\n", capsys.readouterr().out)


def test_only_the_new_last_layer_is_trained_and_bf16_layers_take_and_return_float32(vgg):
    """Nearly the same probabilities in bfloat16; no channels_last on MPS, which computes some layers wrongly."""
    assert [name for name, param in vgg.named_parameters() if param.requires_grad] == [
        "classifier.6.weight", "classifier.6.bias"]
    inputs = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    exact = vgg(inputs).exp()
    features = common.to_device(vgg, torch.device("cpu"), bf16=True).features(inputs)
    log_proba = vgg.classifier(features.flatten(1))
    assert features.dtype == log_proba.dtype == vgg.classifier[6].weight.dtype == torch.float32
    assert vgg.features[0].weight.dtype == vgg.classifier[3].weight.dtype == torch.bfloat16
    assert 0 < (log_proba.exp() - exact).abs().max() < 0.01
    model = SimpleNamespace(to=lambda device, memory_format: memory_format)
    layouts = [common.to_device(model, torch.device(kind)) for kind in ("cpu", "cuda", "mps")]
    assert layouts == [torch.channels_last, torch.channels_last, torch.contiguous_format]


def test_a_record_depends_on_each_frozen_layer(vgg, dataset):
    """Not on the last layer, which is trained, nor on the order of the parameters in memory, nor on the device."""
    dsets = dsets_of(dataset)
    vgg.features.append(nn.BatchNorm2d(512))  # as a student might; it has a number without dimensions
    record = make_record(dsets, vgg)
    state = {name: on_gpu(value.clone()) for name, value in vgg.state_dict().items()}
    assert make_record(dsets, SimpleNamespace(state_dict=lambda: state)) == record
    assert make_record(dsets, vgg.to(memory_format=torch.channels_last)) == record
    for name, value in vgg.state_dict().items():
        value += 1
        record, before = make_record(dsets, vgg), record
        changed = "" if name.startswith("classifier.6.") else "different frozen layers"
        assert differences(before, record) == changed, name


@pytest.mark.parametrize("name, bf16, computes, expected", [
    ("auto", "", {"cpu": 1, "cuda": 1, "mps": 1}, "cuda"), ("auto", "", {"cpu": 1, "mps": 1}, "mps"),
    ("auto", "", {"cpu": 1}, "cpu"), ("cpu", "", {"cpu": 1, "cuda": 1}, "cpu"),
    ("mps", "", {"cpu": 1, "cuda": 1, "mps": 1}, "mps"),
    ("auto", "", {"cpu": 1, "cuda": 0}, r"NOTICE: a GPU \(cuda\) was found, .*: using the CPU\ncpu"),
    ("auto", "", {"cpu": 1, "mps": 0}, r"NOTICE: a GPU \(mps\) was found, .*: using the CPU\ncpu"),
    ("cuda", "", {"cpu": 1}, "error: --device cuda: .*: use --device cpu"),
    ("cuda", "", {"cpu": 1, "cuda": 0}, "error: --device cuda: .*: use --device cpu"),
    ("cpu", "emulated", {"cpu": 1}, r"NOTICE: --bf16: .*\ncpu"), ("cpu", "native", {"cpu": 1}, "cpu"),
    ("cuda", "emulated", {"cuda": 1}, "error: --bf16: cuda .* --device cpu"), ("cuda", "native", {"cuda": 1}, "cuda"),
    ("mps", "native", {"mps": 1}, "error: --bf16: mps does not support bfloat16 here: .* --device cpu")])
def test_a_gpu_is_used_if_it_can_compute(monkeypatch, capsys, name, bf16, computes, expected):
    """An old GPU is found, and its results are missing or wrong (here: 0); an emulated bfloat16 is very slow."""
    ones, native = torch.ones, bf16 == "native"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in computes)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in computes)
    monkeypatch.setattr(torch, "ones", lambda size, device: ones(size) * computes[device])
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    if expected.startswith("error"):
        assert re.fullmatch(expected, message(common.get_device, name, bool(bf16)))
    else:
        device = common.get_device(name, bool(bf16))
        assert re.fullmatch(expected, capsys.readouterr().out + device.type)


INPUTS = torch.randn(37, 8, generator=torch.Generator().manual_seed(1))
LABELS = (INPUTS[:, 0] > 0).long()
BATCHES = list(zip(INPUTS.split(10), LABELS.split(10), strict=True))  # the last one has 7 images


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 2), nn.LogSoftmax(dim=1))


@pytest.mark.parametrize("kind", ["cpu", "cuda", "mps"])
def test_each_epoch_has_its_own_loss_accuracy_and_time(monkeypatch, capsys, kind):
    """Batches are copied in the background to CUDA alone: on MPS, the network could see a different batch."""
    copies, model, clock = [], small_model(), iter([0, 2, 10, 15])

    class Batch(torch.Tensor):
        def to(self, device, non_blocking=False):
            copies.append((device.type, non_blocking))
            return self.as_subclass(torch.Tensor)

    batches = [[tensor.as_subclass(Batch) for tensor in batch] for batch in BATCHES]
    optimizer, criterion = torch.optim.SGD(model.parameters(), lr=0), nn.CrossEntropyLoss(label_smoothing=0.5)
    model.parameters = lambda: iter([SimpleNamespace(device=torch.device(kind))])
    monkeypatch.setattr(common, "time", SimpleNamespace(perf_counter=clock.__next__))
    history = common.train_model(model, batches, 37, epochs=2, optimizer=optimizer, criterion=criterion)
    loss = criterion(model(INPUTS), LABELS).item()
    accuracy = np.mean((model(INPUTS).argmax(dim=1) == LABELS).numpy())
    assert history == [{"loss": pytest.approx(loss), "accuracy": accuracy, "seconds": t} for t in (2, 5)]
    assert capsys.readouterr().out.splitlines() == [
        f"epoch  {i}/2  loss {loss:.4f}  accuracy {accuracy:.4f}  {t} s" for i, t in [(1, "2.00"), (2, "5.00")]]
    common.test_model(model, batches, 37)
    assert copies == [(kind, kind == "cuda")] * 16 + [(kind, False)] * 4


def test_results_of_the_test_are_in_order_and_its_loss_is_finite(capsys):
    """A large learning rate can make a probability 0: what is printed and what 05 computes must agree."""
    model, tiny = small_model().append(nn.Identity()), np.finfo(np.float64).tiny
    model[0].weight.data *= 1000
    proba = torch.cat([model(inputs) for inputs, _ in BATCHES]).detach().double().exp().numpy()
    true = proba[range(37), LABELS]  # probabilities of the true classes
    model[2].forward = on_gpu
    preds, all_proba, all_classes = common.test_model(model, BATCHES, size=37)
    assert true.min() == 0 and np.allclose(all_proba, proba.clip(tiny), 1e-9, 0)
    assert np.array_equal(preds, proba.argmax(axis=1)) and np.array_equal(all_classes, LABELS)
    loss = -np.log(true.clip(tiny)).mean()
    assert capsys.readouterr().out == f"test on 37 images  loss {loss:.4f}  accuracy {(true > 0.5).mean():.4f}\n"
    assert common.log_loss(all_proba, all_classes) == common.log_loss(proba, all_classes) == pytest.approx(loss)


def test_metrics_are_saved_and_plotted(tmp_path):
    """Means per epoch, and the points of each; one mark for the validation images. The last layer may be on a GPU."""
    history = [{"loss": 0.7, "accuracy": 0.5, "seconds": 2.0}, {"loss": 0.6, "accuracy": 0.75, "seconds": 6.0}]
    results = np.array([0, 0, 1]), np.array([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6]]), np.array([0, 1, 1])
    args, weight = Namespace(output_dir=tmp_path, data_dir=tmp_path / "data", weights="imagenet"), torch.rand(2, 4096)
    layer = SimpleNamespace(state_dict=lambda: {"weight": on_gpu(weight)})
    metrics = common.save_results(args, "04", Namespace(classifier=[*"012345", layer]), {"x": "y"}, history, results)
    assert torch.equal(torch.load(tmp_path / "04_head.pt", weights_only=True)["weight"], weight)
    loss = pytest.approx(-np.log([0.9, 0.2, 0.6]).mean())
    assert json_of(tmp_path / "04_metrics.json") == {
        "options": {name: str(value) for name, value in vars(args).items()}, "weights": "imagenet", "pretrained": True,
        "dataset": str(tmp_path / "data"), "made_from": {"x": "y"}, "seconds_per_epoch": 4, "train_loss": [0.7, 0.6],
        "train_accuracy": [0.5, 0.75], "valid_loss": loss, "valid_accuracy": 2 / 3}
    common.plot_training(metrics, "a title")
    curves = [line.get_xydata().tolist() for ax in plt.gcf().axes for line in ax.lines[:2]]
    assert curves == [[[1, 0.7], [2, 0.6]], [[2, loss]], [[1, 0.5], [2, 0.75]], [[2, 2 / 3]]]


@pytest.mark.parametrize("n, train", [(2, (1, 1)), (11, (5, 6)), (100, (30, 50)), (10**6, (30, 70))])
def test_limit_keeps_n_training_and_200_validation_images_evenly_spaced(n, train):
    """Half of each class, so that guessing stays at 50%, and not only the first photos."""
    counts = {"train": (30, 70), "valid": (150, 90)}
    dsets = {x: Namespace(samples=[(i, label) for label in (0, 1) for i in range(counts[x][label])]) for x in counts}
    common.limit_images(dsets, n)
    for x, kept in [("train", train), ("valid", (100, 90))]:
        evenly = [(i * counts[x][label] // kept[label], label) for label in (0, 1) for i in range(kept[label])]
        assert dsets[x].samples == dsets[x].imgs == evenly and dsets[x].targets == [label for _, label in evenly]


def load_data(dataset, **options):
    args = {"device": "cpu", "bf16": False, "sample": False, "data_dir": dataset, "limit": None, "num_workers": 0}
    return common.load_data(Namespace(**args | options))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("kind, threads, options, workers", [
    ("cpu", 64, {}, 0), ("cuda", 64, {}, 16), ("mps", 8, {}, 8), ("cuda", 8, {"sample": True}, 0),
    ("cuda", 8, {"num_workers": 0}, 0), ("cpu", 8, {"sample": True, "num_workers": 3}, 3)])
def test_workers_by_default_only_for_a_gpu(dataset, monkeypatch, capsys, kind, threads, options, workers):
    """A GPU waits for images unless several processes load them; on a CPU they would only cost memory."""
    monkeypatch.setattr(common, "get_device", lambda name, bf16: torch.device(kind))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    _, dsets, *loaders = load_data(dataset, limit=2, **{"num_workers": None, **options})
    assert [(loader.num_workers, loader.pin_memory) for loader in loaders] == 2 * [(workers, kind == "cuda")]
    assert capsys.readouterr().out == f"2 training images, 4 validation images; device: {kind}\n"
    changed = differences(make_record(dsets_of(dataset)), make_record(dsets))
    assert changed == "different training images"  # results of a subset never mix with those of all images


def test_empty_and_truncated_photos_are_named(dataset):
    """A copy that failed is noticed before the training; torch's message for an error in a worker has no file name."""
    path, names = dataset / "valid" / "cats" / "cat.1.jpg", [f"dogs/x.{i:02}.jpg" for i in range(25)]
    path.write_bytes(path.read_bytes()[:5000])
    *_, loader = load_data(dataset, num_workers=1)
    assert message(list, loader).startswith(f"error: {path}: cannot be read as an image (")
    for name in names:
        (dataset / "valid" / name).touch()
    assert message(load_data, dataset) == (f"error: {dataset / 'valid'}: 25 empty files, {', '.join(names[:20])} and 5 "
                                           "more: replace or remove them")


def test_a_figure_is_saved_as_png_then_shown_and_closed(tmp_path, monkeypatch):
    """Whatever format a matplotlibrc asks for, and however strange or long the names of photos are."""
    shown, path = [], tmp_path / "a.png"
    monkeypatch.setattr(plt, "show", lambda: shown.append((path.read_bytes()[:4], plt.gca().get_title())))
    names = ["x/$^$.jpg", "x/bad\udcff.jpg", "x/IMG_20240131_115959_of_our_cat_0123456789.jpg"]
    common.show_predictions([Image.new("RGB", (2, 2))] * 3, names, [0, 0, 1], np.full((3, 2), 0.5), "heading")
    with plt.rc_context({"savefig.format": "pdf"}):
        common.save_figure(path, show=True)
    title = "true: dog\npredicted: cat, 0.500\nIMG_20240131_1...123456789.jpg"
    assert shown == [(b"\x89PNG", title)] and plt.get_fignums() == []
