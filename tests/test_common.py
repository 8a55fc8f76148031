"""common.py: the transform, weights, devices and datasets. (Training and figures have files of their own.)"""
import re
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import dsets_of, message, raise_
from PIL import Image
from torch import nn
from torch.utils.data import RandomSampler, SequentialSampler
from torchvision import models

import common
from support.errors import UserError
from support.records import differences, make_record


def test_imagenet_format_crops_and_normalizes():
    """VGG16 gets the numbers that it was trained on."""
    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    center = np.float32(pixels[38:-38, 88:-88]) / 255  # 224 x 224
    expected = (center - np.float32([0.485, 0.456, 0.406])) / np.float32([0.229, 0.224, 0.225])
    inputs = common.imagenet_format(Image.fromarray(pixels))
    assert np.allclose(inputs, expected.transpose(2, 0, 1), atol=1e-6)


# ---------------------------------------------------------------------------------------------------------- weights
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


OTHER_NETWORK = "use a file that was saved from this network, or train again (--weights untrained needs no file)"


@pytest.mark.parametrize("content, problem, remedy", [
    (None, " is missing: ", ""), (b"", ": damaged or unsafe (", ""), (b"<html>", ": damaged or unsafe (", ""),
    ({"weight": torch.zeros(3)}, ": saved from a different network, not from this VGG (", OTHER_NETWORK),
    ([1, 2], ": saved from a different network, not from this VGG (", OTHER_NETWORK)],
    ids=["missing", "empty", "a login page", "another network", "no network"])
@pytest.mark.parametrize("weights, advice", [
    ("imagenet", "delete it if it exists, and run this script again"),
    ("my.pth", "give a different file to --weights")])
def test_unusable_weights_are_named_in_one_line(tmp_path, monkeypatch, weights, advice, content, problem, remedy):
    """torch's own message has a line for each layer."""
    path = tmp_path / "my.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        torch.save(content, path)
    monkeypatch.setattr(common, "IMAGENET_FILE", path)
    text = message(common.load_vgg16, weights if weights == "imagenet" else str(path))
    assert text.startswith(f"error: {path}{problem}") and text.endswith(f": {remedy or advice}")


def test_weights_that_are_no_numbers_are_refused(tmp_path):
    """After a training with too large a learning rate."""
    layer = nn.Linear(2, 2)
    torch.save({"weight": torch.full((2, 2), torch.nan), "bias": torch.zeros(2)}, tmp_path / "x.pt")
    assert message(common.load_state, layer, tmp_path / "x.pt", "train again") == (
        f"error: {tmp_path / 'x.pt'}: contains numbers that are not finite: train again")


def test_weights_that_are_there_need_no_network(capsys):
    """And nothing is said about them."""
    assert common.get_weights("imagenet") == "imagenet" and common.get_weights("my.pth") == "my.pth"
    assert capsys.readouterr().out == ""


@pytest.fixture
def offline(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "IMAGENET_FILE", tmp_path / "none.pth")
    monkeypatch.setattr(common, "download", lambda *args: raise_(UserError("no net")))


def test_without_network_a_full_run_ends(offline):
    """Hours with random weights would be lost."""
    assert message(common.get_weights, "imagenet") == "error: no net, or use --weights FILE or --weights untrained"


def test_without_network_the_sample_continues_untrained(offline, capsys):
    """The first try of the course needs no network, but says in large letters what it shows."""
    assert common.get_weights("imagenet", sample=True) == "untrained"
    assert re.fullmatch(r"no net\n\*{80}\nNOTICE: untrained weights[^*]*\*{80}\n", capsys.readouterr().out)


@pytest.mark.parametrize("mirror", [None, "http://school.example/vgg16.pth"])
def test_weights_are_downloaded_from_torchvision_or_a_mirror(tmp_path, monkeypatch, mirror):
    """A wrong size or hash costs a download of 553 MB."""
    calls, path = [], tmp_path / "none.pth"
    monkeypatch.setattr(common, "IMAGENET_FILE", path)
    monkeypatch.setattr(common, "download", lambda *args: calls.append(args) or path.touch())
    monkeypatch.delenv("VGG16_URL", raising=False)
    if mirror:
        monkeypatch.setenv("VGG16_URL", mirror)
    assert common.get_weights("imagenet") == "imagenet"
    assert calls == [([mirror or common.IMAGENET.url], path, 553_433_881, ["sha256", "397923af"])]
    assert common.IMAGENET.url.endswith("/vgg16-397923af.pth")


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
def test_channels_last_but_on_mps(kind, layout):
    """It is faster, but MPS computes some layers wrongly with it."""
    model = SimpleNamespace(to=lambda device, memory_format: (device.type, memory_format))
    assert common.to_device(model, torch.device(kind)) == (kind, layout)


@pytest.fixture
def machine(monkeypatch):
    """A function that makes this machine look like another. too_old: the GPU is found, but its results are wrong.
    fast_bf16: the CPU and the GPU support bfloat16 (a GPU that does not can emulate it, which is slow)."""
    def machine(*gpus, too_old=False, fast_bf16=False):
        def ones(size, device):
            if device != "cpu" and device not in gpus:
                raise RuntimeError("no such device")
            return real_ones(size) * (0 if too_old and device != "cpu" else 1)

        monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in gpus)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in gpus)
        monkeypatch.setattr(torch, "ones", ones)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                            lambda including_emulation=True: including_emulation or fast_bf16)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast_bf16, raising=False)

    real_ones = torch.ones
    return machine


@pytest.mark.parametrize("gpus, expected", [(["cuda", "mps"], "cuda"), (["mps"], "mps"), ([], "cpu")])
def test_a_gpu_is_used_if_there_is_one(machine, capsys, gpus, expected):
    """It is ten times faster or more."""
    machine(*gpus)
    assert common.get_device("auto").type == expected and capsys.readouterr().out == ""


@pytest.mark.parametrize("gpu", ["cuda", "mps"])
def test_a_gpu_that_is_too_old_is_not_used(machine, capsys, gpu):
    """It is found, but every result would be wrong. The student learns why the run is slow."""
    machine(gpu, too_old=True)
    assert common.get_device("auto").type == "cpu"
    assert capsys.readouterr().out == (
        f"NOTICE: a GPU ({gpu}) was found, but this version of PyTorch cannot use it: using the CPU\n")


@pytest.mark.parametrize("name", ["cpu", "mps"])
def test_the_device_that_is_asked_for_is_used(machine, name):
    """Although auto would take another."""
    machine("cuda", "mps")
    assert common.get_device(name).type == name


@pytest.mark.parametrize("gpus", [[], ["cuda"]], ids=["there is none", "too old"])
def test_a_device_that_cannot_be_used_ends_the_run(machine, gpus):
    """Who asked for a GPU does not want to wait for hours."""
    machine(*gpus, too_old=True)
    assert message(common.get_device, "cuda") == (
        "error: --device cuda: this version of PyTorch cannot use such a device here: use --device cpu")


@pytest.mark.parametrize("name, fast, problem", [
    ("cuda", True, None),
    ("cuda", False, "error: --bf16: this GPU does not support bfloat16: omit it, or add --device cpu"),
    ("mps", True, "error: --bf16: not tested on mps: omit it, or add --device cpu")])
def test_bf16_on_a_gpu(machine, name, fast, problem):
    """An emulated bfloat16 would be slower than none."""
    machine(name, fast_bf16=fast)
    if problem:
        assert message(common.get_device, name, True) == problem
    else:
        assert common.get_device(name, bf16=True).type == name


@pytest.mark.parametrize("fast", [True, False])
def test_bf16_on_a_cpu(machine, capsys, fast):
    """Only a notice: on some Arm CPUs it is fast, and torch does not tell."""
    machine(fast_bf16=fast)
    assert common.get_device("cpu", bf16=True).type == "cpu"
    assert capsys.readouterr().out.startswith("NOTICE: --bf16: this CPU has no AVX-512 BF16.") == (not fast)


# --------------------------------------------------------------------------------------------------------- the data
N_CATS, N_DOGS = {"train": 30, "valid": 150}, {"train": 70, "valid": 90}


@pytest.mark.parametrize("n, cats, dogs", [(2, 1, 1), (11, 5, 6), (100, 30, 50), (10**6, 30, 70)])
def test_limit_keeps_as_many_of_each_class_evenly_spaced(n, cats, dogs):
    """So that guessing stays at 50%, and not only the first photos are used. 200 validation images, if there are."""
    dsets = {x: Namespace(samples=[(f"cat {i}", 0) for i in range(N_CATS[x])] +
                                  [(f"dog {i}", 1) for i in range(N_DOGS[x])]) for x in ["train", "valid"]}
    common.limit_images(dsets, n)
    for x, kept_cats, kept_dogs in [("train", cats, dogs), ("valid", 100, 90)]:
        expected = ([(f"cat {i * N_CATS[x] // kept_cats}", 0) for i in range(kept_cats)] +
                    [(f"dog {i * N_DOGS[x] // kept_dogs}", 1) for i in range(kept_dogs)])
        assert dsets[x].samples == dsets[x].imgs == expected
        assert dsets[x].targets == [label for _, label in expected]


def load_data(dataset, *batch_size, **options):
    args = {"device": "cpu", "bf16": False, "sample": False, "data_dir": dataset, "limit": None, "num_workers": 0}
    return common.load_data(Namespace(**args | options), *batch_size)


@pytest.mark.parametrize("given, batch_size", [([], 64), ([7], 7)])
def test_training_images_are_shuffled_and_validation_images_are_not(dataset, given, batch_size):
    """A batch would be all cats; and predictions must be in the order of the images. The batches of the lecture."""
    _, dsets, loader_train, loader_valid = load_data(dataset, *given)
    assert (loader_train.batch_size, type(loader_train.sampler)) == (batch_size, RandomSampler)
    assert (loader_valid.batch_size, type(loader_valid.sampler)) == (5, SequentialSampler)
    assert loader_train.dataset is dsets["train"] and loader_valid.dataset is dsets["valid"]
    assert make_record(dsets) == make_record(dsets_of(dataset))


def test_a_subset_is_recorded_as_other_images(dataset, capsys):
    """Results of a subset never mix with those of all images."""
    _, dsets, *_ = load_data(dataset, limit=2)
    assert differences(make_record(dsets_of(dataset)), make_record(dsets)) == "different training images"
    assert capsys.readouterr().out == "2 training images, 4 validation images; device: cpu\n"


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
    assert message(load_data, dataset) == (f"error: {dataset / 'valid'}: 25 empty files, {', '.join(names[:20])} and 5 "
                                           "more: replace or remove them")


def test_the_first_four_of_each_class_are_shown_whatever_their_numbers():
    """In 03 and 04; with classes of different size, no cat is taken for a dog."""
    assert common.four_of_each(Namespace(targets=[0] * 6 + [1] * 9)) == [0, 1, 2, 3, 6, 7, 8, 9]
    assert common.four_of_each(Namespace(targets=[0] * 2 + [1])) == [0, 1, 2]
