"""Faults 12 to 33: weights, images, results, and how a run ends. Each test is named after the fault's number."""
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import ROOT, full_disk, make_dataset, message, run, run_here, script
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, models

import common

precompute = script("04_precompute")


# ------------------------------------------------------------------------------------------------- weights and heads
def test_12_no_network_full_run(tmp_path, dataset, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    text = message("03_finetune_head.py", "--data-dir", dataset, "--output-dir", tmp_path / "out")
    assert str(tmp_path / "torch" / "hub" / "checkpoints" / "vgg16-397923af.pth") in text
    assert "--weights" in text and not (tmp_path / "out").exists()


def test_13_no_network_sample(tmp_path, monkeypatch, capsys):
    make_dataset(tmp_path / "sample", train=2, valid=1)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    run_here("03_finetune_head.py", "--sample", "--data-dir", tmp_path, "--output-dir", tmp_path / "out", "--epochs", 1)
    printed = capsys.readouterr().out
    assert "can't be downloaded" in printed and "NOTICE: untrained weights" in printed
    assert printed.splitlines()[-1].startswith("Done, untrained weights")
    assert not json.loads((tmp_path / "out" / "03_metrics.json").read_text())["pretrained"]


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """Where torch.hub keeps the ImageNet weights: an empty folder of this test's own."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / "vgg16-397923af.pth"
    path.parent.mkdir(parents=True)
    return path


@pytest.mark.parametrize("content", ["empty", "truncated", "HTML", "an object"])
def test_14_damaged_weights(cached, vgg_file, content, monkeypatch):
    with open(vgg_file, "rb") as file:
        cached.write_bytes({"empty": b"", "truncated": file.read(2**20), "HTML": b"<html>no</html>",
                            "an object": pickle.dumps(["a list"])}[content])
    for weights, remedy in (("imagenet", "delete it"), (str(cached), "give another file to --weights")):
        with pytest.raises(common.UserError, match=remedy) as caught:
            common.load_vgg16(weights)
        assert str(cached) in str(caught.value) and "\n" not in str(caught.value)


def test_14_weights_that_are_not_there(tmp_path):
    with pytest.raises(common.UserError, match=r"none\.pth is missing: give another file to --weights"):
        common.load_vgg16(str(tmp_path / "none.pth"))


class Payload:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


@pytest.mark.parametrize("legacy", [False, True])
def test_15_weights_that_run_code(cached, tmp_path, legacy):
    torch.save({"features.0.weight": Payload(tmp_path / "mark")}, cached, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(common.UserError, match="unsafe"):
        common.load_vgg16("imagenet")
    assert not (tmp_path / "mark").exists()


def test_16_weights_of_another_network(cached):
    torch.save(models.squeezenet1_0().state_dict(), cached)
    with pytest.raises(common.UserError, match="other layers than VGG's") as caught:
        common.load_vgg16("imagenet")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("state", [{"weight": torch.zeros(3, 4096), "bias": torch.zeros(3)}, {"weight": 1}, [1, 2],
                                   {"weight": torch.zeros(2, 4096)}, {"weight": 1, "bias": 2}])
def test_16_head_of_another_shape(tmp_path, state):
    torch.save(state, tmp_path / "03_head.pt")
    with pytest.raises(common.UserError, match=r"03_head.pt holds other layers than Linear's: run it again"):
        common.load_state(nn.Linear(4096, 2), tmp_path / "03_head.pt", "run it again")


# ------------------------------------------------------------------------------------------------------------ images
@pytest.mark.parametrize("workers", [0, 2])
def test_17_truncated_jpeg(dataset, workers):
    path = dataset / "valid" / "cats" / "cat.1.jpg"
    path.write_bytes(path.read_bytes()[:5000])
    text = message("01_data.py", "--data-dir", dataset, "--output-dir", dataset / "out", "--num-workers", workers)
    assert str(path) in text and "replace or remove it" in text


@pytest.mark.parametrize("name, content", [("empty.jpg", b""), ("text.jpg", b"no image"), ("._cat.0.jpg", b"\0\5\x16\7\0"),
                                           ("half.png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")])
def test_18_what_is_no_image(dataset, name, content):
    path = dataset / "valid" / "cats" / name
    path.write_bytes(content)
    dset = datasets.ImageFolder(dataset / "valid", loader=common.load_image)
    with pytest.raises(common.UserError) as caught:
        list(dset)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("part, name", [("train", ".ipynb_checkpoints"), ("valid", "birds")])
@pytest.mark.parametrize("images", [0, 1])
def test_19_another_folder(dataset, part, name, images):
    (dataset / part / name).mkdir()
    if images:
        shutil.copy(dataset / "train" / "cats" / "cat.0.jpg", dataset / part / name)
    with pytest.raises(common.UserError, match=f"an unexpected, .*'{name}': {images}") as caught:
        common.check_dataset(dataset)
    assert str(dataset / part) in str(caught.value)


def test_18_a_name_of_two_lines_and_of_no_unicode(dataset):
    """Such files come from old archives and other systems."""
    path = os.fsencode(dataset / "valid" / "cats") + b"/bad\xff\nname.jpg"
    try:
        with open(path, "wb"):
            pass
    except OSError:
        pytest.skip("this file system takes no such names")
    text = message("01_data.py", "--data-dir", dataset, "--output-dir", dataset / "out", "--num-workers", 1)
    assert str(dataset / "valid" / "cats" / "bad") in text
    plt.figure()
    common.imshow(Image.new("RGB", (9, 9)), os.fsdecode(path))
    plt.gcf().savefig(io.BytesIO())
    plt.close()


@pytest.mark.parametrize("folder", ["train/cats", "valid/dogs", "valid"])
@pytest.mark.parametrize("left", ["nothing", "no image"])
def test_20_classes_missing_or_empty(dataset, folder, left):
    shutil.rmtree(dataset / folder)
    if left == "no image":
        (dataset / folder).mkdir()
        (dataset / folder / "notes.txt").write_text("no image")
    with pytest.raises(common.UserError, match=r"01_data\.py" if folder == "valid" and left == "nothing" else r"\{.*\}") as caught:
        common.check_dataset(dataset)
    assert str(dataset / folder.split("/")[0]) in str(caught.value)


def test_21_all_kinds_of_images(tmp_path):
    """Each comes out as RGB in its own colours, and as 224 x 224 numbers."""
    grey = np.tile(np.linspace(0, 255, 100).astype(np.uint8), (90, 1))  # smaller than 224
    rgb = Image.fromarray(np.stack([grey] * 3, axis=2))
    kinds = {"grey.png": Image.fromarray(grey), "cmyk.jpg": rgb.convert("CMYK"), "rgba.png": rgb.convert("RGBA"),
             "palette.png": rgb.quantize(), "deep.png": Image.fromarray(grey.astype(np.uint16) * 257),
             "deep.tif": Image.fromarray(grey.astype(np.uint16) * 257), "one.png": rgb.convert("1")}
    for name, image in kinds.items():
        image.save(tmp_path / name)
        loaded = common.load_image(tmp_path / name)
        assert loaded.mode == "RGB" and loaded.size == (100, 90)
        assert common.imagenet_format(loaded).shape == (3, 224, 224)
        if name != "one.png":
            assert np.abs(np.asarray(loaded)[..., 0].astype(int) - grey).mean() < 4, name


def test_22_decompression_bomb(dataset, tmp_path):
    """Pillow only warns up to twice its limit; in a process of its own, because pytest keeps warnings to itself."""
    bomb = dataset / "valid" / "cats" / "cat.0.png"
    Image.new("1", (20_000, 20_000)).save(bomb)
    with pytest.raises(common.UserError, match=r"cat\.0\.png: can't be read as a picture"):
        common.load_image(bomb)
    Image.new("1", (12_000, 12_000)).save(bomb)
    done = run("01_data.py", "--data-dir", dataset, "--output-dir", tmp_path, status=1)
    assert f"{bomb}: can't be read as a picture" in done.stderr


posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL, and no Ctrl-C for another process group")


def kill_worker(batch):
    os.kill(os.getpid(), signal.SIGKILL)


@posix
def test_23_a_worker_is_killed():
    assert "--num-workers 0" in message(lambda: list(DataLoader(range(4), num_workers=1, collate_fn=kill_worker)))


# ----------------------------------------------------------------------------------------------------------- results
def small_layers():
    """Something that is quick in the place of VGG16's convolutions: (B, 3, 224, 224) -> (B, 4, 7, 7)."""
    torch.manual_seed(0)
    return nn.Conv2d(3, 4, 32, stride=32).eval()


MADE_FROM = {"layer": "conv", "files": "f", "weights": "w", "transform": "t", "precision": "float32"}


def features(dataset, path, made_from=MADE_FROM, layers=None, part="train"):
    dset, layers = datasets.ImageFolder(dataset / part, common.imagenet_format, loader=common.load_image), layers or small_layers()
    if not precompute.made_already(path, made_from):
        precompute.preconvfeat(layers, dset, path, made_from, (layers.out_channels, 7, 7), torch.device("cpu"),
                               common.loader_options(len(dset), 0, torch.device("cpu")))
    return common.load(path, "run again")


def test_features_are_the_rows_of_the_dataset_in_its_order(dataset, tmp_path):
    rows = features(dataset, tmp_path / "conv_feat_train.npy")
    dset = datasets.ImageFolder(dataset / "train", common.imagenet_format)
    with torch.inference_mode():
        direct = small_layers()(torch.stack([image for image, _ in dset])).numpy()
    assert np.allclose(rows, direct, atol=1e-5) and isinstance(rows, np.memmap)


def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    """200 images with rows four times as large as VGG16's: kept in memory they would take 80 MB."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("this system does not tell a process how much memory it uses in /proc")

    def anonymous_memory(*_):
        used.append(1024 * int(next(line for line in status.read_text().splitlines() if "RssAnon" in line).split()[1]))

    dataset, used = make_dataset(tmp_path / "data", train=100, valid=1), []
    layers = nn.Conv2d(3, 2048, 32, stride=32).eval()
    layers.register_forward_pre_hook(anonymous_memory)
    rows = features(dataset, tmp_path / "conv_feat_train.npy", layers=layers)
    anonymous_memory()
    assert rows.nbytes > 80_000_000 and len(used) == 26
    assert max(used[8:]) - used[8] < 25_000_000


DRIVER = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import os, signal, test_faults
layers, calls = test_faults.small_layers(), []
def die(module, inputs):
    calls.append(1)
    if len(calls) == 5: os.kill(os.getpid(), signal.SIGKILL)
layers.register_forward_pre_hook(die)
test_faults.features(test_faults.common.Path({dataset!r}), test_faults.common.Path({path!r}), layers=layers)
"""


@posix
def test_24_killed_in_the_middle_of_the_features(tmp_path, capsys):
    """Killed in the fifth batch of 8, and the last 1.5 rows lost: the first three batches are kept, and the file comes
    out as from an unbroken run."""
    dataset = make_dataset(tmp_path / "data", train=30, valid=1)
    path = tmp_path / "killed" / "conv_feat_train.npy"
    code = DRIVER.format(root=str(ROOT), tests=str(ROOT / "tests"), dataset=str(dataset), path=str(path))
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == -signal.SIGKILL
    part, = path.parent.iterdir()
    os.truncate(part, part.stat().st_size - 6 * 49 * 4)

    decoded = []
    layers = small_layers()
    layers.register_forward_pre_hook(lambda module, inputs: decoded.append(len(inputs[0])))
    features(dataset, path, layers=layers)
    assert sum(decoded) == 60 - 24 and "after the first 24 of 60 images" in capsys.readouterr().out
    features(dataset, tmp_path / "unbroken" / "conv_feat_train.npy")
    assert path.read_bytes() == (tmp_path / "unbroken" / "conv_feat_train.npy").read_bytes()
    assert {p.name for p in path.parent.iterdir()} == {"conv_feat_train.npy", "conv_feat_train.json"}


def test_24_killed_before_the_last_rename(dataset, tmp_path):
    """All rows are there, or even more bytes: the last batch is computed again and the file is whole."""
    path = tmp_path / "conv_feat_train.npy"
    whole = features(dataset, path).tobytes()
    digest = precompute.hashlib.sha256(json.dumps(MADE_FROM).encode()).hexdigest()[:16]
    path.rename(tmp_path / f"conv_feat_train.{digest}.part")
    with open(tmp_path / f"conv_feat_train.{digest}.part", "ab") as file:
        file.write(b"more")
    assert features(dataset, path).tobytes() == whole


def test_25_disk_full_while_writing_features(tmp_path):
    dataset, path = make_dataset(tmp_path / "data", train=30, valid=1), tmp_path / "conv_feat_train.npy"
    with full_disk(30_000), pytest.raises(common.UserError, match=r"conv_feat_train.npy: .* 47,040 bytes are needed"):
        features(dataset, path)
    assert not path.exists()
    resumed = features(dataset, path).tobytes()
    assert resumed == features(dataset, tmp_path / "other" / "conv_feat_train.npy").tobytes()


def test_25_disk_full_while_saving_results(tmp_path):
    """All of a set or none of it: the old files stay as they were, and no part file stays."""
    def results(value):
        plt.figure()
        return {"a.npy": np.full(3000, value), "f.png": plt.gcf(), "b.pt": {"x": torch.full((5000,), value)},
                "m.json": {"value": value}}

    common.save(tmp_path, results(1.0))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {"a.npy", "f.png", "b.pt", "m.json"}
    for size in (5, 1000, 10_000):
        with full_disk(size), pytest.raises(common.UserError, match="make room or change --output-dir"):
            common.save(tmp_path, results(2.0))
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    plt.close("all")


def test_25_output_folder_that_can_not_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(common.UserError, match="can't be written"):
        common.save(tmp_path / "file" / "folder", {"a.json": {}})


def test_25_half_a_set_of_results_has_no_metrics(tmp_path, monkeypatch):
    """Broken off between two renames: the last file, which vouches for the rest, is gone."""
    common.save(tmp_path, {"a.json": {"a": 1}, "m.json": {"m": 1}})
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: replace(a, b) if "a.json" in str(b) else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        common.save(tmp_path, {"a.json": {"a": 2}, "m.json": {"m": 2}})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 2} and not (tmp_path / "m.json").exists()


@pytest.mark.parametrize("key", MADE_FROM)
def test_26_features_made_from_something_else(dataset, tmp_path, capsys, key):
    path = tmp_path / "conv_feat_train.npy"
    features(dataset, path)
    stamp = path.stat().st_mtime_ns
    features(dataset, path)
    assert path.stat().st_mtime_ns == stamp and "used again" in capsys.readouterr().out
    features(dataset, path, {**MADE_FROM, key: "another"})
    assert f"was made from other {key}: computing it again" in capsys.readouterr().out
    assert path.stat().st_mtime_ns != stamp
    assert json.loads(path.with_suffix(".json").read_text())[key] == "another"


def test_26_a_part_file_of_other_weights_is_not_gone_on_with(tmp_path):
    dataset, path = make_dataset(tmp_path / "data", train=30, valid=1), tmp_path / "conv_feat_train.npy"
    with full_disk(30_000), pytest.raises(common.UserError):
        features(dataset, path)
    torch.manual_seed(1)
    other = nn.Conv2d(3, 4, 32, stride=32).eval()
    rows = features(dataset, path, {**MADE_FROM, "weights": "other"}, layers=other)
    assert np.array_equal(rows, features(dataset, tmp_path / "b" / "conv_feat_train.npy", layers=other))


def test_26_features_without_a_record_are_made_again(dataset, tmp_path):
    path = tmp_path / "conv_feat_train.npy"
    whole = features(dataset, path).tobytes()
    path.with_suffix(".json").unlink()
    path.write_bytes(b"old")
    assert features(dataset, path).tobytes() == whole


def test_26_new_features_never_go_by_an_old_record(dataset, tmp_path, monkeypatch):
    """Killed between the last rename and the new record."""
    path = tmp_path / "conv_feat_train.npy"
    old = features(dataset, path).tobytes()
    torch.manual_seed(1)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(precompute, "save", lambda *args: 1 / 0)
        features(dataset, path, {**MADE_FROM, "weights": "other"}, layers=nn.Conv2d(3, 4, 32, stride=32).eval())
    assert path.read_bytes()[-len(old):] != old
    assert features(dataset, path).tobytes() == old


def test_26_04_makes_them_again(torch_home, tmp_path, capsys):
    """Through the whole script: another image, and another precision."""
    sample = make_dataset(tmp_path / "data" / "sample", train=2, valid=1)
    options = ["--sample", "--data-dir", sample.parent, "--output-dir", tmp_path / "out", "--epochs", 1]
    run_here("04_precompute.py", *options)
    capsys.readouterr()
    shutil.copy(sample / "train" / "cats" / "cat.1.jpg", sample / "train" / "cats" / "cat.0.jpg")
    run_here("04_precompute.py", *options)
    printed = capsys.readouterr().out
    assert "conv_feat_train.npy was made from other files: computing it again" in printed
    assert "conv_feat_valid.npy: used again" in printed
    feat = np.load(tmp_path / "out" / "conv_feat_train.npy")
    assert np.array_equal(feat[0], feat[1])
    run_here("04_precompute.py", *options, "--bf16")
    printed = capsys.readouterr().out
    assert printed.count("was made from other precision: computing it again") == 2
    close = np.load(tmp_path / "out" / "conv_feat_train.npy")
    assert close.dtype == np.float32 and 0 < np.abs(close - feat).max() < 0.05 * np.abs(feat).max()
    np.save(tmp_path / "out" / "conv_feat_train.npy", close[:2])
    assert "conv_feat_train.npy has another shape than it should: delete it" in message("04_precompute.py", *options, "--bf16")


def test_26_a_first_batch_that_is_none(torch_home, tmp_path):
    common.save(tmp_path, {"inputs_try.npy": np.zeros((5, 224, 224)), "labels_try.npy": np.zeros(5)})
    text = message("02_vgg_imagenet.py", "--sample", "--output-dir", tmp_path)
    assert "inputs_try.npy is no batch of images: run python 01_data.py" in text


def fake_results(folder, dataset, proba_dog, step="04", **metrics):
    """Made-up results of a step, for 05_analysis.py to look at."""
    dset = datasets.ImageFolder(dataset / "valid")
    proba = np.stack([1 - np.float64(proba_dog), proba_dog], axis=1).astype(np.float32)
    common.save(folder, {
        f"{step}_head.pt": nn.Linear(4096, 2).state_dict(), f"{step}_predictions.npy": proba.argmax(axis=1),
        f"{step}_all_proba.npy": proba, f"{step}_all_classes.npy": np.array(dset.targets),
        f"{step}_metrics.json": {"files_sha256": {"valid": common.files_hash(dset)}, "pretrained": True,
                                 "weights": "imagenet", "weights_sha256": "w", "valid_loss": 0.5, **metrics}})


def analyse(dataset, folder, *options):
    return run_here("05_analysis.py", "--data-dir", dataset, "--output-dir", folder, *options)


@pytest.mark.parametrize("change", ["an image", "fewer predictions"])
def test_27_predictions_of_other_images(dataset, tmp_path, change):
    fake_results(tmp_path / "out", dataset, [0.1, 0.2, 0.7, 0.4])
    if change == "an image":
        shutil.copy(dataset / "train" / "cats" / "cat.1.jpg", dataset / "valid" / "cats" / "cat.1.jpg")
    else:
        np.save(tmp_path / "out" / "04_predictions.npy", np.zeros(3, dtype=np.int64))
    with pytest.raises(common.UserError, match=r"made from other images .*; run python 04_precompute.py again"):
        analyse(dataset, tmp_path / "out")
    assert not (tmp_path / "out" / "05_correct.png").exists()


def test_28_a_step_whose_input_is_missing(dataset, tmp_path):
    text = message("05_analysis.py", "--data-dir", dataset, "--output-dir", tmp_path / "out")
    assert "03_metrics.json is missing: run python 03_finetune_head.py" in text
    fake_results(tmp_path / "out", dataset, [0.1, 0.2, 0.7, 0.4])
    (tmp_path / "out" / "04_all_proba.npy").unlink()
    with pytest.raises(common.UserError, match=r"04_all_proba.npy is missing: run python 04_precompute.py"):
        analyse(dataset, tmp_path / "out")
    with pytest.raises(common.UserError, match=r"run python 01_data.py"):
        analyse(tmp_path / "none", tmp_path / "out")


@pytest.mark.parametrize("name", ["x.npy", "x.pt", "x.json"])
def test_29_files_with_a_pickle_inside(tmp_path, name):
    mark, path = tmp_path / "mark", tmp_path / name
    if name == "x.npy":
        np.save(path, np.array([Payload(mark)], dtype=object), allow_pickle=True)
    else:
        path.write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(common.UserError, match="run that"):
        common.load(path, "run that")
    assert not mark.exists()


# ----------------------------------------------------------------------------------------------------- how a run ends
def interrupt(process, seconds_after_line, line):
    """Press Ctrl-C, as the terminal does: the signal goes to the whole process group."""
    for printed in process.stdout:
        if line in printed:
            break
    time.sleep(seconds_after_line)
    os.killpg(process.pid, signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stdout + stderr
    assert stderr.strip() == "stopped by Ctrl-C"
    with pytest.raises(ProcessLookupError):  # no orphan workers
        os.killpg(process.pid, 0)


def listen_to_ctrl_c():
    """What a shell starts in the background ignores Ctrl-C, and so do its children: not what is tested here."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def popen(*command, **kwargs):
    return subprocess.Popen([sys.executable, "-u", *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, start_new_session=True, preexec_fn=listen_to_ctrl_c, **kwargs)


@posix
def test_30_ctrl_c_while_training(torch_home, dataset, tmp_path):
    process = popen(ROOT / "03_finetune_head.py", "--data-dir", dataset, "--output-dir", tmp_path, "--num-workers", 2,
                    "--epochs", 1000, "--batch-size", 2)
    interrupt(process, 1, "epoch ")
    assert list(tmp_path.glob("03_*")) == []


@posix
def test_30_ctrl_c_while_importing(tmp_path):
    code = "import sys; sys.path.insert(0, sys.argv[1]); print('now', flush=True); import common; import time; time.sleep(9)"
    interrupt(popen("-c", code, ROOT), 0.7, "now")


@posix
def test_30_ctrl_c_keeps_the_part_file(torch_home, dataset, tmp_path):
    many = make_dataset(tmp_path / "many", train=40, valid=1)
    process = popen(ROOT / "04_precompute.py", "--data-dir", many, "--output-dir", tmp_path / "out")
    for _ in range(600):
        if any(path.stat().st_size > 500_000 for path in tmp_path.glob("out/*.part")):
            break
        time.sleep(0.05)
    interrupt(process, 0, "x_try.shape")
    part, = (tmp_path / "out").glob("conv_feat_train.*.part")
    assert part.stat().st_size > 8 * 512 * 49 * 4


def test_31_spawn_start_method(torch_home, tmp_path):
    """As on macOS and Windows: a worker imports the script, finds its functions, and doesn't run it."""
    dataset = make_dataset(tmp_path / "data set", train=1, valid=2, test1=1)
    fake_results(tmp_path / "out", dataset, [0.1, 0.2, 0.7, 0.4], weights_sha256=common.weights_hash(common.load_vgg16("imagenet")))
    options = ["--data-dir", dataset, "--output-dir", tmp_path / "out", "--submission"]
    run_here("05_analysis.py", *options, "--num-workers", 0)
    alone = (tmp_path / "out" / "submission.csv").read_bytes()
    (tmp_path / "out" / "submission.csv").unlink()
    spawn = ("import multiprocessing, runpy, sys; multiprocessing.set_start_method('spawn'); sys.argv = sys.argv[1:];"
             "process = multiprocessing.process.BaseProcess; start = process.start;"
             "process.start = lambda self: print('a worker') or start(self);"
             "runpy.run_path(sys.argv[0], run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", spawn, ROOT / "05_analysis.py", *map(str, options), "--num-workers", "1"],
                          capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and done.stdout.count("a worker") == done.stdout.count("options: sample=") == 1
    assert (tmp_path / "out" / "submission.csv").read_bytes() == alone


def test_32_console_that_can_not_print_non_ascii(tmp_path):
    dataset = make_dataset(tmp_path / "M\u00fcller \u732b", train=1, valid=1)
    (dataset / "valid" / "cats" / "cat.0.jpg").write_bytes(b"")
    done = run("01_data.py", "--data-dir", dataset, "--output-dir", tmp_path / "out", status=1,
               env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert "M\\xfcller" in done.stdout and "M\\xfcller" in done.stderr


@pytest.mark.parametrize("proba_dog", [[0.0, 0.1, 0.9, 1.0], [1.0, 0.9, 0.1, 0.0]], ids=["no errors", "nothing right"])
def test_33_no_correct_or_no_incorrect_predictions(dataset, tmp_path, capsys, proba_dog):
    fake_results(tmp_path, dataset, proba_dog)
    analyse(dataset, tmp_path)
    printed = capsys.readouterr()
    assert printed.err == "" and len(list(tmp_path.glob("05_*.png"))) == 9
    right = proba_dog[0] == 0
    assert f"correct: {4 if right else 0} of 4" in printed.out
    assert ("log loss             inf" in printed.out) != right


# ----------------------------------------------------------------------------------------------------- beyond the list
def raise_(error):
    raise error


@posix
def test_what_may_not_be_read_or_written():
    """As a user who is not root, for whom permissions don't count."""
    with tempfile.TemporaryDirectory() as name:
        folder, root = Path(name), os.geteuid() == 0
        folder.chmod(0o755)
        dataset = make_dataset(folder / "data", train=1, valid=1)
        image = dataset / "valid" / "cats" / "cat.0.jpg"
        image.chmod(0)
        (folder / "closed").mkdir()
        (folder / "closed").chmod(0o444)
        closed, errors = folder / "closed", []
        if root:
            os.seteuid(65534)
        try:
            for call in (lambda: common.load_image(image), lambda: common.save(closed, {"a.json": {}}),
                         lambda: common.check_dataset(closed / "x")):
                with pytest.raises((common.UserError, PermissionError)) as caught:
                    call()
                errors.append(caught.value)
        finally:
            if root:
                os.seteuid(0)
            closed.chmod(0o755)
    for error, text in zip(errors, (f"{image}: can't be read as a picture", f"{closed}: can't be written (Permission denied)",
                                    f"{closed / 'x' / 'train'}"), strict=True):
        assert text in message(raise_, error)


def bug(batch):
    raise RuntimeError("a bug")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bug_keeps_its_traceback(workers):
    text = message(lambda: list(DataLoader(range(4), num_workers=workers, collate_fn=bug)), one_line=False)
    assert text.startswith("Traceback") and "RuntimeError: a bug" in text


def test_out_of_memory_is_one_line():
    assert "--batch-size" in message(lambda: torch.empty(2**60))


def test_metrics_that_are_no_dict(tmp_path):
    (tmp_path / "m.json").write_text("[1, 2]")
    with pytest.raises(common.UserError, match="damaged"):
        common.load(tmp_path / "m.json", "run that")


def test_weights_are_downloaded_whole_or_not_at_all(cached, monkeypatch):
    """torch.hub checks the hash; the value of the Weights API is all that is replaced."""
    monkeypatch.setattr(common.IMAGENET.value, "url", "file:///dev/null/vgg16-397923af.pth")
    with pytest.raises(common.UserError, match="can't be downloaded"):
        common.choose_weights("imagenet", sample=False)
    source = cached.parent.parent / "vgg16-397923af.pth"
    source.write_bytes(b"not the weights")
    monkeypatch.setattr(common.IMAGENET.value, "url", source.as_uri())
    with pytest.raises(common.UserError, match="hash"):
        common.choose_weights("imagenet", sample=False)
    assert list(cached.parent.iterdir()) == []
