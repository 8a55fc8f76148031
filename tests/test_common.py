"""common.py: the transform, weights, devices and datasets. (Training and figures have files of their own.)"""
import re
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import message, raise_
from PIL import Image
from torch.utils.data import RandomSampler, SequentialSampler
from torchvision import models

import common


def test_imagenet_format_crops_and_normalizes():
    """VGG16 gets the numbers that it was trained on."""
    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    center = np.float32(pixels[38:-38, 88:-88]) / 255  # 224 x 224
    expected = (center - np.float32([0.485, 0.456, 0.406])) / np.float32([0.229, 0.224, 0.225])
    inputs = common.imagenet_format(Image.fromarray(pixels))
    assert np.allclose(inputs, expected.transpose(2, 0, 1), atol=1e-6)


# ---------------------------------------------------------------------------------------------------------- weights
@pytest.mark.parametrize("kind", ["untrained", "half", "gpu"])
def test_weights_are_those_asked_for_however_their_file_was_saved(tmp_path, monkeypatch, kind):
    """Untrained weights are random, and the same in every script; a student's .pth file may come from a GPU."""
    torch.manual_seed(0)
    model = models.vgg16()
    state = (model.half() if kind == "half" else model).state_dict()
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0" if kind == "gpu" else "cpu")
    torch.save(state, tmp_path / "my.pth")
    torch.manual_seed(1)
    ours = common.load_vgg16(kind if kind == "untrained" else str(tmp_path / "my.pth")).state_dict()
    assert all(ours[name].dtype == torch.float32 and torch.equal(ours[name], state[name].float()) for name in state)


@pytest.mark.parametrize("weights, save, problem, advice", [
    ("imagenet", lambda path: None, "is missing", "delete it if it exists, and run this script again"),
    ("my.pth", lambda path: path.write_text("<html>"), "damaged or unsafe", "give a different file to --weights"),
    ("my.pth", lambda path: torch.save({"weight": torch.zeros(3)}, path), "from a different network, not from this VGG",
     "use a file that was saved from this network, or train again (--weights untrained needs no file)")],
    ids=["missing", "a login page", "another network"])
def test_unusable_weights_are_named_in_one_line(tmp_path, monkeypatch, weights, save, problem, advice):
    """torch's own message has a line for each layer."""
    path = tmp_path / "my.pth"
    save(path)
    monkeypatch.setattr(common, "IMAGENET_FILE", path)
    text = message(common.load_vgg16, weights if weights == "imagenet" else str(path))
    assert text.startswith(f"error: {path}") and problem in text and text.endswith(f": {advice}")


def test_weights_that_are_not_numbers_are_refused(tmp_path):
    """After a training with too large a learning rate."""
    path = tmp_path / "x.pt"
    torch.save({"weight": torch.full((2, 2), torch.nan), "bias": torch.zeros(2)}, path)
    assert message(common.load_state, torch.nn.Linear(2, 2), path, "train again") == (
        f"error: {path}: contains numbers that are not finite: train again")


@pytest.mark.parametrize("mirror", [None, "", "http://school.example/vgg16.pth"])
def test_weights_are_downloaded_once_from_torchvision_or_a_mirror(tmp_path, monkeypatch, mirror):
    """A wrong size or hash costs a download of 553 MB."""
    calls, path = [], tmp_path / "vgg16.pth"
    monkeypatch.setattr(common.os, "environ", {} if mirror is None else {"VGG16_URL": mirror})
    monkeypatch.setattr(common, "IMAGENET_FILE", path)
    monkeypatch.setattr(common, "download", lambda *args: calls.append(args) or path.touch())
    assert common.get_weights("imagenet") == common.get_weights("imagenet") == "imagenet"
    url = mirror or "https://download.pytorch.org/models/vgg16-397923af.pth"
    assert calls == [([url], path, 553_433_881, "sha256", "397923af")]


@pytest.fixture
def unreadable(monkeypatch):
    """In a container with another user, the file of the weights is there, and cannot be opened."""
    monkeypatch.setattr("common.open", lambda *args: raise_(PermissionError(13, "Permission denied")), raising=False)


def test_unreadable_weights_are_not_called_damaged(unreadable):
    """Deleting 553 MB would not help."""
    text = message(common.get_weights, "imagenet")
    assert text.startswith(f"error: {common.IMAGENET_FILE}: cannot be read (Permission denied): check its permissions")
    assert text.endswith(", or use --weights FILE or --weights untrained")


def test_the_sample_continues_without_weights_and_says_so(unreadable, capsys):
    """The first try of the course must work; the reason stands above, and large letters say what it shows."""
    assert common.get_weights("imagenet", sample=True) == "untrained"
    assert re.search(r"cannot be read .*\n\*{80}\nNOTICE: untrained weights[^*]*\*{80}\n$", capsys.readouterr().out)


# ---------------------------------------------------------------------------------------------------------- devices
def test_only_the_new_last_layer_is_trained(vgg):
    """All other layers are frozen."""
    trained = [name for name, param in vgg.named_parameters() if param.requires_grad]
    assert trained == ["classifier.6.weight", "classifier.6.bias"]


def test_bf16_layers_take_and_return_float32(vgg):
    """Nearly the same probabilities; the last layer, which is trained, is exact."""
    inputs = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    exact = vgg(inputs).exp()
    features = common.to_device(vgg, torch.device("cpu"), bf16=True).features(inputs)
    log_proba = vgg.classifier(features.flatten(1))
    assert features.dtype == log_proba.dtype == vgg.classifier[6].weight.dtype == torch.float32
    assert vgg.features[0].weight.dtype == vgg.classifier[3].weight.dtype == torch.bfloat16
    assert 0 < (log_proba.exp() - exact).abs().max() < 0.01


@pytest.mark.parametrize("kind, layout", [
    ("cpu", torch.channels_last), ("cuda", torch.channels_last), ("mps", torch.contiguous_format)])
def test_channels_last_except_on_mps(kind, layout):
    """It is faster, but MPS computes some layers wrongly with it."""
    model = SimpleNamespace(to=lambda device, memory_format: (device.type, memory_format))
    assert common.to_device(model, torch.device(kind)) == (kind, layout)


@pytest.fixture
def machine(monkeypatch):
    """A function that makes this machine look like another. gpus: the GPUs that torch finds, and whether each can
    compute (one that is too old cannot). fast_bf16: whether CPU and GPU have instructions for bfloat16; None: torch
    cannot tell."""
    def machine(fast_bf16=False, **gpus):
        works = {"cpu": True, **gpus}
        monkeypatch.setattr(torch, "ones", lambda size, device: torch.full([size], works[device], dtype=torch.int64))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in gpus)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in gpus)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: (
            including_emulation or fast_bf16))
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast_bf16, raising=False)
        if fast_bf16 is None:  # a later torch may not have this private function
            monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    return machine


@pytest.mark.parametrize("gpus, asked, expected, notice", [
    ({"cuda": True, "mps": True}, "auto", "cuda", ""), ({"mps": True}, "auto", "mps", ""), ({}, "auto", "cpu", ""),
    ({"cuda": True, "mps": True}, "mps", "mps", ""), ({"cuda": True}, "cpu", "cpu", ""),
    ({"cuda": False}, "auto", "cpu",
     "NOTICE: a GPU (cuda) was found, but this version of PyTorch cannot use it: using the CPU\n")])
def test_a_gpu_is_used_if_one_works_and_no_other_device_is_asked_for(machine, capsys, gpus, asked, expected, notice):
    """It is ten times faster or more. If it is too old, the student learns why the run is slow."""
    machine(**gpus)
    assert common.get_device(asked).type == expected and capsys.readouterr().out == notice


@pytest.mark.parametrize("gpus, name, bf16, problem", [
    ({}, "cuda", False, "device cuda: this version of PyTorch cannot use such a device here: use --device cpu"),
    ({"mps": False}, "mps", False,
     "device mps: this version of PyTorch cannot use such a device here: use --device cpu"),
    ({"cuda": True}, "cuda", True, "bf16: this GPU does not support bfloat16: omit it, or add --device cpu"),
    ({"mps": True}, "mps", True, "bf16: not tested on mps: omit it, or add --device cpu")])
def test_what_a_gpu_cannot_do_ends_the_run(machine, gpus, name, bf16, problem):
    """Someone who asks for a GPU does not want to wait for hours. Emulated bfloat16 is slower than float32."""
    machine(**gpus)
    assert message(common.get_device, name, bf16) == f"error: --{problem}"


SLOW = ("NOTICE: --bf16: this CPU has no AVX-512 BF16. Unless it is an Arm CPU with bfloat16, expect the run to be "
        "several times slower than without --bf16\n")


@pytest.mark.parametrize("device, fast, notice", [
    ("cuda", True, ""), ("cpu", True, ""), ("cpu", False, SLOW), ("cpu", None, SLOW)])
def test_bf16_may_be_slow_on_a_cpu(machine, capsys, device, fast, notice):
    """Only a notice: on some Arm CPUs it is fast, and torch does not tell."""
    machine(fast, cuda=True)
    assert common.get_device(device, bf16=True).type == device
    assert capsys.readouterr().out == notice


# --------------------------------------------------------------------------------------------------------- the data
@pytest.mark.parametrize("n, cats, dogs", [
    (2, [0], [0]), (5, [0, 1], [0, 2, 4]), (12, [0, 1, 2], [0, 1, 2, 3, 4, 5]), (99, [0, 1, 2], range(7))])
def test_limit_keeps_as_many_of_each_class_evenly_spaced(n, cats, dogs):
    """So that guessing stays at 50%, and not only the first photos are used. At most 200 validation images."""
    train = Namespace(samples=[(f"cat{i}", 0) for i in range(3)] + [(f"dog{i}", 1) for i in range(7)])
    valid = Namespace(samples=[("cat", 0)] * 150 + [("dog", 1)] * 90)
    common.limit_images({"train": train, "valid": valid}, n)
    assert train.samples == train.imgs == [(f"cat{i}", 0) for i in cats] + [(f"dog{i}", 1) for i in dogs]
    assert train.targets == [0] * len(cats) + [1] * len(dogs)
    assert valid.targets == [0] * 100 + [1] * 90


def load_data(dataset, *batch_size, **options):
    args = {"device": "cpu", "bf16": False, "sample": False, "data_dir": dataset, "limit": None, "num_workers": 0}
    return common.load_data(Namespace(**args | options), *batch_size)


@pytest.mark.parametrize("given, batch_size", [([], 64), ([7], 7)])
def test_training_images_are_shuffled_and_validation_images_are_not(dataset, capsys, given, batch_size):
    """A batch would be all cats; and predictions must be in the order of the images. The batches of the lecture."""
    _, _, loader_train, loader_valid = load_data(dataset, *given, limit=5)
    assert (loader_train.batch_size, type(loader_train.sampler)) == (batch_size, RandomSampler)
    assert (loader_valid.batch_size, type(loader_valid.sampler)) == (5, SequentialSampler)
    assert (len(loader_train.dataset), len(loader_valid.dataset)) == (5, 4)
    assert capsys.readouterr().out == "5 training images, 4 validation images; device: cpu\n"


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("kind, threads, options, workers", [
    ("cpu", 64, {}, 0), ("cuda", 64, {}, 16), ("mps", 8, {}, 8), ("cuda", 8, {"sample": True}, 0),
    ("cuda", 8, {"num_workers": 0}, 0), ("cpu", 8, {"sample": True, "num_workers": 3}, 3)])
def test_workers_by_default_only_for_a_gpu(dataset, monkeypatch, kind, threads, options, workers):
    """A GPU waits for images unless several processes load them; on a CPU they would only cost memory."""
    monkeypatch.setattr(common, "get_device", lambda name, bf16: torch.device(kind))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    device, _, *loaders = load_data(dataset, **{"num_workers": None, **options})
    assert device.type == kind
    assert [(loader.num_workers, loader.pin_memory) for loader in loaders] == [(workers, kind == "cuda")] * 2


def test_a_truncated_photo_is_named_by_a_worker(dataset):
    """torch's message for an error in a worker has no file name."""
    path = dataset / "valid" / "cats" / "cat.1.jpg"
    path.write_bytes(path.read_bytes()[:5000])
    *_, loader_valid = load_data(dataset, num_workers=1)
    assert message(list, loader_valid).startswith(f"error: {path}: cannot be read as an image (")


def test_empty_files_are_named(dataset):
    """A copy that failed is noticed before the training."""
    names = [f"dogs/x.{i:02}.jpg" for i in range(25)]
    for name in names:
        (dataset / "valid" / name).touch()
    assert message(load_data, dataset) == (
        f"error: {dataset / 'valid'}: 25 empty files (at most 20 are listed): {', '.join(names[:20])}: "
        "replace or remove them")
