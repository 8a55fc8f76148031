"""Faults 12 to 51: weights, images, results, how a run ends, and what a result was made from. Each test is named after
the number of its fault; 1 to 11 are in test_download.py."""
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import types
from argparse import Namespace
from multiprocessing.context import SpawnProcess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (ROOT, analyse, assert_one_line, fake_results, full_disk, json_of, make_dataset, message, record_of, run_here,
                      script)
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchvision import models, transforms

import common

data, precompute = script("01_data"), script("04_precompute")
posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals, links and permissions")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def options(dataset, out):
    return ["--data-dir", dataset, "--output-dir", out]


def raise_(error):
    raise error


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """Where the ImageNet weights are kept: a folder of this test's own, without them."""
    path = tmp_path / "hub" / "vgg16-397923af.pth"
    monkeypatch.setattr(common, "IMAGENET_FILE", path)
    return path


def test_12_no_network_full_run(cached, options, out):
    text = message("03_finetune_head.py", *options)
    assert str(cached) in text and "--weights" in text and sorted(os.listdir(out)) == []


def test_13_no_network_sample(cached, tmp_path, out, figures, capsys):
    make_dataset(tmp_path / "sample", train=2, valid=1)
    run_here("03_finetune_head.py", "--sample", "--data-dir", tmp_path, "--output-dir", out, "--epochs", 1)
    printed = capsys.readouterr().out
    assert "can't be downloaded" in printed and "NOTICE: untrained weights" in printed
    assert printed.splitlines()[-1].startswith("Done, untrained weights") and not json_of(out / "03_metrics.json")["pretrained"]


@pytest.mark.parametrize("content", [None, b"", "truncated", b"<html>no</html>", pickle.dumps(["a list"])])
def test_14_damaged_weights(cached, vgg_file, content):
    cached.parent.mkdir()
    if content is not None:
        cached.write_bytes(vgg_file.read_bytes()[:2**20] if content == "truncated" else content)
    for weights, remedy in (("imagenet", "delete it"), (str(cached), "give another file to --weights")):
        assert re.search(f"error: {re.escape(str(cached))}: missing, damaged or unsafe .*: {remedy}", message(common.load_vgg16, weights))


class Payload:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


@pytest.mark.parametrize("name", ["zipped.pt", "legacy.pt", "pickle.pt", "x.npy", "pickle.npy", "x.json", "list.json"])
def test_15_29_files_that_run_code_or_are_no_result(tmp_path, name):
    mark, path = tmp_path / "mark", tmp_path / name
    if name in ("zipped.pt", "legacy.pt"):
        torch.save({"features.0.weight": Payload(mark)}, path, _use_new_zipfile_serialization=name == "zipped.pt")
    elif name == "x.npy":
        np.save(path, np.array([Payload(mark)], dtype=object), allow_pickle=True)
    else:
        path.write_bytes(b"[1, 2]" if name == "list.json" else pickle.dumps(Payload(mark)))
    assert f"{path}: missing, damaged or unsafe" in message(common.load, path, "run that") and not mark.exists()


@pytest.mark.parametrize("state", [{"weight": torch.zeros(3, 4096), "bias": torch.zeros(3)}, [1, 2], {"weight": 1, "bias": 2}])
def test_16_another_network_or_a_head_of_another_shape(tmp_path, state):
    torch.save(state, tmp_path / "x.pt")
    for module, name in ((nn.Linear(4096, 2), "Linear"), (models.squeezenet1_0(), "SqueezeNet")):
        assert f"error: {tmp_path / 'x.pt'}: holds other layers than {name}'s" in message(common.load_state, module, tmp_path / "x.pt", "")


def test_weights_are_downloaded_whole_or_not_at_all(cached, tmp_path, monkeypatch):
    """torch.hub checks the hash; the value of the Weights API is all that is replaced."""
    source = tmp_path / "vgg16-397923af.pth"
    monkeypatch.setattr(common.IMAGENET.value, "url", source.as_uri())
    for problem in ("can't be downloaded", "hash"):
        assert problem in message(common.choose_weights, Namespace(weights="imagenet", sample=False))
        assert sorted(os.listdir(cached.parent)) == []
        source.write_bytes(b"not the weights")


@pytest.mark.parametrize("workers", [0, 2])
def test_17_truncated_jpeg(dataset, options, workers):
    path = dataset / "valid" / "cats" / "cat.1.jpg"
    path.write_bytes(path.read_bytes()[:5000])
    text = message("01_data.py", *options, "--num-workers", workers)
    assert str(path) in text and "replace or remove it" in text


@pytest.mark.parametrize("name, content", [
    ("empty.jpg", b""), ("text.jpg", b"no image"), ("._cat.0.jpg", b"\0\5\x16\7\0"), ("half.png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"),
    ("bad\udcff\nname.jpg", b"")], ids=ascii)  # the last one of two lines and no Unicode: old archives have such names
def test_18_what_is_no_image(tmp_path, name, content):
    try:
        (tmp_path / name).write_bytes(content)
    except OSError:
        pytest.skip("this file system takes no such names")
    assert f"error: {tmp_path / name.split(chr(0xdcff))[0]}" in message(common.load_image, tmp_path / name)


@pytest.mark.parametrize("place", ["train/.ipynb_checkpoints", "valid/birds"])
def test_19_another_folder(dataset, place):
    (dataset / place).mkdir()
    assert f"error: {(dataset / place).parent}: an unexpected, missing or empty class" in message(common.check_dataset, dataset)


def test_20_classes_missing_or_empty(dataset):
    shutil.rmtree(dataset / "train" / "cats")
    assert f"error: {dataset / 'train'}: an unexpected, missing or empty class" in message(common.check_dataset, dataset)
    (dataset / "train" / "cats").mkdir()
    (dataset / "train" / "cats" / "notes.txt").write_text("no image")
    assert f"error: {dataset / 'train'}: an unexpected, missing or empty class" in message(common.check_dataset, dataset)
    shutil.rmtree(dataset / "train")
    assert f"error: {dataset / 'train'} is missing: run python 01_data.py" in message(common.check_dataset, dataset)


def test_21_all_kinds_of_images(tmp_path):
    """Each comes out as RGB in its own colours, and as 224 x 224 numbers."""
    grey = np.tile(np.linspace(0, 255, 100).astype(np.uint8), (90, 1))  # smaller than 224
    rgb, deep = Image.fromarray(np.stack([grey] * 3, axis=2)), Image.fromarray(grey.astype(np.uint16) * 257)
    kinds = {"grey.png": Image.fromarray(grey), "cmyk.jpg": rgb.convert("CMYK"), "rgba.png": rgb.convert("RGBA"),
             "palette.png": rgb.quantize(), "deep.png": deep, "deep.tif": deep, "one.png": rgb.convert("1")}
    for name, image in kinds.items():
        image.save(tmp_path / name)
        loaded = common.load_image(tmp_path / name)
        assert loaded.mode == "RGB" and loaded.size == (100, 90) and common.imagenet_format(loaded).shape == (3, 224, 224)
        assert name == "one.png" or np.abs(np.asarray(loaded)[..., 0].astype(int) - grey).mean() < 4, name


@posix
def test_23_a_worker_is_killed():
    loader = DataLoader(range(4), num_workers=1, collate_fn=lambda batch: os.kill(os.getpid(), signal.SIGKILL))
    assert "--num-workers 0" in message(list, loader)


RECORD = {"transform": "t", "train images": "i", "frozen layers": "f", "precision": "p"}
ROWS = np.random.default_rng(0).normal(size=(60, 4, 7, 7)).astype(np.float32)


def keep(path, rows=ROWS, record=RECORD, stop=None):
    """Rows through a FeatureFile in batches of 8, as 04_precompute.py does it: (the file's rows, how many were made)."""
    file = precompute.FeatureFile(path, rows.shape, record, 8)
    done = file.done
    for i in range(done, len(rows), 8):
        if i == stop:
            file.file.close()
            return file, done
        file.extend(rows[i:i + 8])
    return np.asarray(file), len(rows) - done


@pytest.fixture
def path(tmp_path):
    return tmp_path / "conv_feat_train.npy"


class Killed(BaseException):
    """As if the process ended here: nothing in the scripts sees it."""


def test_24_killed_in_the_middle_of_the_features(tmp_path, out, figures, monkeypatch):
    """Killed in the third batch of 8, and the last 1.5 rows lost: the first batch is kept, and the file comes out as
    from an unbroken run."""
    dataset, load_image = make_dataset(tmp_path / "data", train=12, valid=2), common.load_image
    options, loaded = ["--data-dir", dataset, "--epochs", 1, "--output-dir", out], []
    monkeypatch.setattr(common, "load_image", lambda path: loaded.append(path) or (load_image(path) if len(loaded) < 24 else raise_(Killed)))
    with pytest.raises(Killed):  # the first batch to validate had 4 images, two and a half batches to train 20
        run_here("04_precompute.py", *options)
    part, = out.iterdir()
    os.truncate(part, part.stat().st_size - 6 * 512 * 49)

    loaded.clear()
    monkeypatch.setattr(common, "load_image", lambda path: loaded.append(path) or load_image(path))
    there = run_here("04_precompute.py", *options)
    assert sum("train" in Path(path).parts for path in loaded) == 24 - 8 and not list(out.glob("*.part"))
    unbroken, _ = there["preconvfeat"](DataLoader(there["dsets"]["train"], batch_size=8))
    assert np.array_equal(np.load(out / "conv_feat_train.npy"), unbroken)


def test_24_killed_before_the_last_rename(path):
    """All rows are there, and even more bytes: the last batch is computed again and the file is whole."""
    part = keep(path, ROWS[:56], stop=48)[0].part
    keep(path, ROWS[:56])
    whole = path.read_bytes()
    part.write_bytes(whole + b"more")
    path.unlink()
    assert keep(path, ROWS[:56])[1] == 56 - 48 and path.read_bytes() == whole


def test_25_disk_full_while_writing_features(path):
    with full_disk(30_000):
        text = message(keep, path)
    assert str(path.parent / "conv_feat_train.") in text and "mend that" in text and not path.exists()
    rows, made = keep(path)
    assert made == 60 - 32 and np.array_equal(rows, ROWS) and sorted(os.listdir(path.parent)) == ["conv_feat_train.json", path.name]


def test_25_disk_full_while_saving_results(tmp_path):
    """All of a set or none of it: the old files stay as they were, and no part file stays."""
    def results(value):
        return {"a.npy": np.full(3000, value), "b.pt": {"x": torch.full((8000,), value)}, "m.json": {"value": value}}

    common.save(tmp_path, results(1.0))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {"a.npy", "b.pt", "m.json"}
    for size, name in ((5, "a.npy"), (1000, "a.npy"), (24_200, "b.pt")):
        with full_disk(size):
            assert f"error: {tmp_path / name}: " in message(common.save, tmp_path, results(2.0))
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_25_half_a_set_of_results_has_no_metrics(tmp_path, monkeypatch):
    """Broken off between two renames: the last file, which vouches for the rest, is gone."""
    common.save(tmp_path, {"a.json": {"a": 1}, "m.json": {"m": 1}})
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: replace(a, b) if "a.json" in str(b) else raise_(Killed))
    with pytest.raises(Killed):
        common.save(tmp_path, {"a.json": {"a": 2}, "m.json": {"m": 2}})
    assert json_of(tmp_path / "a.json") == {"a": 2} and sorted(os.listdir(tmp_path)) == ["a.json"]


@pytest.mark.parametrize("field", RECORD)
def test_26_47_features_made_from_something_else(path, capsys, field):
    """Whole ones are made again, begun ones are thrown away, and each is said."""
    other = {**RECORD, field: "another"}
    keep(path)
    assert keep(path, ROWS + 1)[1] == 0 and np.array_equal(np.load(path), ROWS)  # used again
    file, _ = keep(path, ROWS + 1, other, stop=24)
    assert f"was made from other {field}: computing it again" in capsys.readouterr().out
    rows, made = keep(path, ROWS + 2, {**RECORD, field: "a third"})
    assert f"{file.part.name} was begun with other" in capsys.readouterr().out and not file.part.exists()
    assert made == 60 and np.array_equal(rows, ROWS + 2) and json_of(path.with_suffix(".json"))[field] == "a third"


def test_26_new_features_never_go_by_an_old_record(path, monkeypatch):
    """Killed between the last rename and the new record: what has no record is made again."""
    keep(path)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(precompute, "save", lambda *args: raise_(Killed))
        keep(path, ROWS + 1, {**RECORD, "frozen layers": "other"})
    assert np.array_equal(np.load(path), ROWS + 1)
    assert keep(path)[1] == 60 and np.array_equal(np.load(path), ROWS)


def test_27_28_predictions_that_do_not_fit_or_are_missing(dataset, options, out):
    assert re.search("03_metrics.json: missing.*(No such file.*): run python 03", message("05_analysis.py", *options))
    record = fake_results(out, dataset, [0.1, 0.2, 0.7, 0.4])
    (out / "04_all_proba.npy").unlink()
    assert re.search("04_all_proba.npy: missing.*: run python 04", message("05_analysis.py", *options))
    shutil.copy(dataset / "train" / "cats" / "cat.1.jpg", dataset / "valid" / "cats" / "cat.1.jpg")
    assert f"{out / '04_predictions.npy'}: made with other valid images; run" in message("05_analysis.py", *options)
    common.save(out, {"04_metrics.json": {"made_from": record}})
    assert f"{out / '04_metrics.json'}: stopped before the test; run python 04" in message("05_analysis.py", *options)
    assert not list(out.glob("05_*"))
    for name in ("02_vgg_imagenet.py", "03_finetune_head.py", "04_precompute.py", "05_analysis.py"):
        assert "run python 01_data.py" in message(name, "--data-dir", out / "none", "--output-dir", out)


@posix
def test_30_ctrl_c_with_workers_keeps_the_part_file(tmp_path, out):
    """The signal goes to the whole process group, as from a terminal; what a shell starts in the background ignores it."""
    dataset, two_batches = make_dataset(tmp_path / "data", train=150, valid=1), 2 * 8 * 512 * 49 * 4
    command = [sys.executable, ROOT / "04_precompute.py", "--data-dir", dataset, "--output-dir", out, "--num-workers", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    for _ in range(3000):
        if any(path.stat().st_size > two_batches for path in out.glob("*.part")):
            break
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr.strip()) == (130, "stopped by Ctrl-C"), stdout + stderr
    with pytest.raises(ProcessLookupError):  # no orphan workers
        os.killpg(process.pid, 0)
    assert re.fullmatch(r"conv_feat_train\.\w{16}\.part", *os.listdir(out))


def test_30_what_ctrl_c_does_to_a_workers_threads_is_not_said(monkeypatch, capsys):
    """multiprocessing's resource_sharer calls sys.excepthook in the worker when its main process has gone."""
    monkeypatch.setattr(torch.utils.data._utils.worker, "_worker_info", object())
    common.report(ConnectionResetError, ConnectionResetError(104, "Connection reset by peer"), None)
    assert capsys.readouterr().err == ""


def test_31_spawn_start_method(tmp_path, out, figures, monkeypatch, vgg, capfd):
    """As on macOS and Windows: a worker is a new Python that imports the script, finds its functions, and doesn't run it."""
    dataset, main = make_dataset(tmp_path / "data set", train=1, valid=2), types.ModuleType("__main__")
    started, spawn = [], SpawnProcess._Popen
    (dataset / "test1").mkdir()
    shutil.copy(dataset / "valid" / "cats" / "cat.0.jpg", dataset / "test1" / "1.jpg")
    fake_results(out, dataset, [0.1, 0.2, 0.7, 0.4], model=vgg)
    analyse(dataset, out, "--submission")
    alone = (out / "submission.csv").read_bytes()
    (out / "submission.csv").unlink()
    main.__file__ = str(ROOT / "05_analysis.py")
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(SpawnProcess, "_Popen", lambda process: started.append(process) or spawn(process))
    capfd.readouterr()
    torch.multiprocessing.set_start_method("spawn", force=True)
    try:
        analyse(dataset, out, "--submission", "--num-workers", 1)
    finally:
        torch.multiprocessing.set_start_method(None, force=True)
    printed = capfd.readouterr()
    assert len(started) == 1 and printed.err == "" and printed.out.count("options: ") == 1
    assert (out / "submission.csv").read_bytes() == alone


def test_22_32_console_that_can_not_print_non_ascii(tmp_path):
    """And 22, a picture so large that Pillow warns of it: pytest keeps warnings to itself, so it takes a process."""
    dataset = make_dataset(tmp_path / "M\u00fcller \u732b", train=1, valid=1)
    Image.new("1", (12_000, 12_000)).save(dataset / "valid" / "cats" / "cat.0.png")
    command = [sys.executable, ROOT / "01_data.py", "--data-dir", dataset, "--output-dir", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    line = assert_one_line(done.stderr)
    assert done.returncode == 1 and all("M\\xfcller" in text for text in (done.stdout, line)) and "cat.0.png: can't be read" in line


@pytest.mark.parametrize("proba_dog, loss", [([0.0, 0.1, 0.9, 1.0], "0.0552"), ([1.0, 0.9, 0.1, 0.0], "3.8005")])
def test_33_no_correct_or_no_incorrect_predictions(dataset, tmp_path, figures, capsys, proba_dog, loss):
    fake_results(tmp_path, dataset, proba_dog)
    analyse(dataset, tmp_path)
    printed = capsys.readouterr()
    assert printed.err == "" and len(figures) == 9 and f"log loss, clipped   {loss}" in printed.out


def test_34_a_layer_below_the_last_one_trained(dataset, options, out, figures):
    """The README's exercise: 04 has other layers below than 03's head was trained on, and so has 05, also after 04."""
    photo = dataset / "valid" / "cats" / "cat.0.jpg"
    for name in ("03_finetune_head.py", "04_precompute.py"):
        run_here(name, *options, "--epochs", 1, "--lr", 0.1, edits={
            "    criterion = nn.NLLLoss()": "    model_vgg.classifier[3].requires_grad_(True)\n    criterion = nn.NLLLoss()",
            "SGD(model_vgg.classifier[6].parameters()": "SGD(model_vgg.classifier[3:].parameters()"})
        assert "_head.pt was trained with other frozen layers" in message("05_analysis.py", *options, "--image", photo)
    assert not run_here("04_precompute.py", *options, "--epochs", 1)["from_03"]
    analyse(dataset, out, "--image", photo)  # what 04 trained is used, on the layers that 04 had


FIELDS = ["transform", "train images", "valid images", "frozen layers", "precision"]


def test_34_35_46_04_goes_on_from_03_only_where_all_is_the_same(options, out, figures, capsys):
    """With a learning rate of 0 the layer stays what it began as: 03's, or a new one. Only after 03's are epochs compared:
    one on features takes next to nothing, and the features of the 6 images took 450 s."""
    run_here("03_finetune_head.py", *options, "--epochs", 1)
    metrics, head_03 = json_of(out / "03_metrics.json"), common.load(out / "03_head.pt", "")
    assert list(metrics["made_from"]) == FIELDS
    for field in [None, *FIELDS]:
        other = {**metrics["made_from"], **({field: "another"} if field else {})}
        common.save(out, {"03_metrics.json": {**metrics, "made_from": other, "seconds_per_epoch": 100.0}})
        capsys.readouterr()
        from_03 = run_here("04_precompute.py", *options, "--epochs", 1, "--lr", 0)["from_03"]
        head = common.load(out / "04_head.pt", "")
        assert from_03 == torch.equal(head["weight"], head_03["weight"]) == (field is None)
        speed = json_of(out / "conv_feat_train.json")
        if field is None:  # 6 images in a single batch: no speed yet
            common.save(out, {"conv_feat_train.json": {**speed, "images_per_second": 6 / 450}})
            assert speed["images_per_second"] is None and "paid for itself" not in capsys.readouterr().out
            run_here("04_precompute.py", *options, "--epochs", 1)
        paid = re.findall(r"once: (\S+) s.*paid for itself after epoch (\d+)", capsys.readouterr().out)
        assert paid == ([("450.0", "5")] if field is None else [])


def test_34_05_uses_a_head_only_where_all_is_the_same(dataset, options, out, vgg, figures):
    record, photo = fake_results(out, dataset, [0.1, 0.2, 0.7, 0.4], model=vgg), dataset / "valid" / "cats" / "cat.0.jpg"
    analyse(dataset, out, "--image", photo)
    for field in ("train images", "frozen layers", "precision"):
        fake_results(out, dataset, [0.1, 0.2, 0.7, 0.4], model=vgg, made_from={**record, field: "another"})
        assert f"04_head.pt was trained with other {field} " in message("05_analysis.py", *options, "--image", photo)


def test_35_the_transform_changed(options, out, figures, monkeypatch, capsys):
    for name in ("03_finetune_head.py", "04_precompute.py"):
        run_here(name, *options, "--epochs", 1)
    monkeypatch.setattr(common, "imagenet_format", transforms.Compose([transforms.Resize(256), *common.imagenet_format.transforms]))
    for step in ("03", "04"):
        assert f"{step}_predictions.npy: made with other transform" in message("05_analysis.py", *options, "--step", step)
    capsys.readouterr()
    assert not run_here("04_precompute.py", *options, "--epochs", 1)["from_03"]
    assert capsys.readouterr().out.count("was made from other transform: computing it again") == 2
    run_here("05_analysis.py", *options)


def test_36_what_this_program_did_not_make_is_left_as_it_is(tmp_path):
    (tmp_path / "dogscats.part").mkdir()
    for name in ("dogscats.part/thesis.doc", "dogscats.tgz"):
        (tmp_path / name).write_text("mine")
    text = message(data.get_dataset, tmp_path / "dogscats", None)
    assert str(tmp_path / "dogscats.tgz") in text and "move it away" in text
    assert all((tmp_path / name).read_text() == "mine" for name in ("dogscats.part/thesis.doc", "dogscats.tgz"))
    assert sorted(os.listdir(tmp_path)) == ["dogscats.part", "dogscats.tgz"]


@pytest.mark.parametrize("fault", ["deleted", "changed"])
@pytest.mark.parametrize("name", ["03_finetune_head.py", "04_precompute.py"])
def test_37_an_image_deleted_or_changed_while_it_trains(dataset, options, out, figures, monkeypatch, fault, name):
    """The head is there, and the record is of the images that it was trained on."""
    train_model, record, step = common.train_model, record_of(dataset), name[:2]
    image = dataset / "valid" / "dogs" / "dog.1.jpg"

    def train(*args, **kwargs):
        train_model(*args, **kwargs)
        image.unlink() if fault == "deleted" else shutil.copy(dataset / "train" / "cats" / "cat.1.jpg", image)

    monkeypatch.setattr(common, "train_model", train)
    if fault == "deleted":  # in 04 it is met in the figure at the end, after the test on saved features
        assert str(image) in message(name, *options, "--epochs", 1)
    else:
        run_here(name, *options, "--epochs", 1)
    metrics = json_of(out / f"{step}_metrics.json")
    assert all(metrics["made_from"][field] == record[field] for field in ("train images", "valid images"))
    assert len(metrics["train_loss"]) == 1 and (out / f"{step}_head.pt").exists()
    assert ("valid_loss" in metrics) == (fault == "changed" or step == "04")


@posix
def test_38_an_output_folder_that_can_not_be_written():
    """As a user who is not root, for whom permissions don't count."""
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        os.seteuid(user or 65534)
        try:
            text = message("03_finetune_head.py", "--data-dir", "none", "--output-dir", folder)
        finally:
            os.seteuid(user)
    assert f"error: {folder}" in text and "Permission denied; mend that, or take another folder" in text


@pytest.mark.parametrize("name", sorted(path.name for path in ROOT.glob("0*.py")))
def test_38_an_output_folder_that_can_not_be_made(tmp_path, name):
    """Said before any work: before the missing dataset is noticed, let alone downloaded."""
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "results"):
        text = message(name, "--data-dir", tmp_path / "none", "--output-dir", folder)
        assert f"error: {folder}: " in text and "take another folder" in text and not (tmp_path / "none").exists()


def test_39_weights_saved_from_a_channels_last_model(vgg_file, dataset, options, tmp_path, figures):
    model = common.load_vgg16("imagenet")
    torch.save(model.to(memory_format=torch.channels_last).state_dict(), tmp_path / "mine.pth")
    variables = run_here("04_precompute.py", *options, "--epochs", 1, "--weights", tmp_path / "mine.pth")
    assert variables["record"] == record_of(dataset, model)  # the same numbers, whatever their order in memory


def test_an_edit_of_what_is_computed_once(options, out, figures, capsys):
    """Features of the same shape by other layers: fc6 in place of fc7. They are made again, and it is said."""
    run_here("04_precompute.py", *options, "--layer", "fc7", "--epochs", 1)
    run_here("04_precompute.py", *options, "--layer", "fc7", "--epochs", 1, edits={
        "model_vgg.classifier[:6])\n": "model_vgg.classifier[:2], nn.Linear(64, 4096))\n"})
    assert capsys.readouterr().out.count("was made from other network: computing it again") == 2


def test_a_record_of_any_network(vgg):
    """A student tries another one: what training has cost must not be lost at the record."""
    vgg.features.append(nn.BatchNorm2d(512))  # holds a number without dimensions, the count of its batches
    before = common.made_from({}, vgg)
    vgg.features[-1].num_batches_tracked += 1
    assert common.differences(before, common.made_from({}, vgg)) == "frozen layers"


@posix
def test_40_43_a_dangling_link_or_a_folder_among_the_images(dataset, options):
    bad = dataset / "valid" / "dogs" / "dog.9.jpg"
    bad.symlink_to("nowhere.jpg")
    for name in ("01_data.py", "04_precompute.py", "05_analysis.py"):
        assert f"error: {bad}: a folder, or a link to nothing" in message(name, *options)
    bad.unlink()
    bad.symlink_to("dog.0.jpg")  # to something is fine
    common.check_dataset(dataset)
    (dataset / "train" / "cats" / "@eaDir").mkdir()
    assert f"error: {dataset / 'train' / 'cats' / '@eaDir'}: a folder" in message(common.check_dataset, dataset)


@pytest.mark.parametrize("error", [struct.error("unpack requires"), TypeError("'int'"), MemoryError()])
def test_42_damaged_exif_data_in_a_photo_of_ones_own(tmp_path, monkeypatch, error):
    """What Pillow raises differs from version to version."""
    monkeypatch.setattr(common.ImageOps, "exif_transpose", lambda image: raise_(error))
    photo = ROOT / "sample" / "valid" / "cats" / "cat.8.jpg"
    for name in ("02_vgg_imagenet.py", "05_analysis.py"):
        text = message(name, "--data-dir", tmp_path / "none", "--output-dir", tmp_path, "--image", photo)
        assert f"error: {photo}: can't be read as a picture" in text
    common.load_image(photo)  # in the dataset EXIF data are not used


@pytest.mark.parametrize("error, says", [
    (OSError(24, "Too many open files", "x.npy"), "x.npy: Too many open files"), (OSError("strange"), "a file: strange")])
def test_44_an_error_of_the_system_says_what_is_wrong(error, says):
    text = message(raise_, error)
    assert f"error: {says}; mend that" in text and "room" not in text


@posix  # Windows lets nobody rename or throw away a file that another has open
@pytest.mark.parametrize("record", [RECORD, {**RECORD, "frozen layers": "others"}], ids=["the same", "other weights"])
def test_44_two_runs_of_04_at_once(path, record):
    """One of them is told; the features that are left are whole, and of the one that ended well."""
    first = precompute.FeatureFile(path, ROWS.shape, RECORD, 8)
    first.extend(ROWS[:24])
    keep(path, ROWS, record)
    first.extend(ROWS[24:])
    assert "does another run write here?" in message(np.asarray, first)
    assert np.array_equal(np.load(path), ROWS) and keep(path, ROWS, record)[1] == 0


@pytest.mark.parametrize("has, said", [(False, True), (True, False)])
def test_45_bf16_on_a_cpu_that_has_none(options, out, figures, monkeypatch, capsys, has, said):
    """Said before the work, which then goes on."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has)
    run_here("03_finetune_head.py", *options, "--epochs", 1, "--bf16", "--device", "cpu")
    before_work = capsys.readouterr().out.partition("Modifying the last layer")[0]
    assert ("this CPU has no AVX-512 BF16" in before_work and "several times slower" in before_work) == said
    assert "bfloat16" in json_of(out / "03_metrics.json")["made_from"]["precision"]


@pytest.mark.parametrize("stop", [0, 24, 48])
def test_46_the_speed_of_a_resumed_run(path, monkeypatch, stop):
    """A batch of 8 takes 2 s; what comes before the first one, 100 s, and the time between two runs don't count."""
    clock = [0.0]
    monkeypatch.setattr(precompute.time, "perf_counter", lambda: clock[0])
    for first, last in ((0, stop), (stop, 60)):
        file = precompute.FeatureFile(path, ROWS.shape, RECORD, 8)
        assert file.done == first
        for i in range(first, last, 8):
            clock[0] += 0.25 * len(ROWS[i:i + 8]) if i > first else 100
            file.extend(ROWS[i:i + 8])
    assert np.array_equal(file, ROWS) and json_of(path.with_suffix(".json"))["images_per_second"] == pytest.approx(4)


@pytest.mark.parametrize("field", [None, "no record", *FIELDS])
def test_48_a_zero_shot_result_made_from_something_else(dataset, out, figures, capsys, field):
    made_from = fake_results(out, dataset, [0.1, 0.2, 0.7, 0.4])
    if field in FIELDS:
        made_from[field] = "another"
    common.save(out, {"02_zero_shot.json": {"valid_accuracy": 0.8125} | ({} if field == "no record" else {"made_from": made_from})})
    analyse(dataset, out)
    assert ("0.8125" in capsys.readouterr().out) == (field is None)


@posix
def test_50_output_piped_into_head(options, monkeypatch, capfd):
    """Nobody reads any more: no word, and the status of a program that a closed pipe has ended."""
    read, write = os.pipe()
    os.close(read)
    monkeypatch.setattr(sys, "stdout", open(write, "w"))  # noqa: SIM115
    with pytest.raises(SystemExit) as ended:
        message("01_data.py", *options)
    sys.stdout.close()  # what is left to write goes nowhere, without an error
    assert ended.value.code == 141 and capfd.readouterr().err == ""


def test_51_show_without_a_display(options, figures, capsys):
    run_here("01_data.py", *options, "--show")
    assert capsys.readouterr().out.count("there is no display here") == 1 and len(figures) == 2


def test_a_bug_keeps_its_traceback_and_out_of_memory_is_one_line(capsys):
    common.report(ValueError, ValueError("a bug"), None)
    assert capsys.readouterr().err == "ValueError: a bug\n"
    assert "--batch-size" in message(lambda: torch.empty(2**60))
