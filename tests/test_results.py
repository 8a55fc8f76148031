"""What passes from one script to the next (features, heads, predictions, and records of what they were made from), and
what survives if a run is stopped, a disk is full, or something has changed in between."""
import io
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (PHOTO, ROOT, SCRIPTS, Killed, analyse, arguments, fake_results, full_disk, json_of, make_dataset,
                      message, posix, raise_, record_of, run_here)
from torch.utils.data import DataLoader
from torchvision import transforms

import common
import support

ROWS = np.random.default_rng(0).normal(size=(60, 4, 7, 7)).astype(np.float32)
RECORD = {"transform": "t", "training images": "i", "frozen layers": "f", "precision": "p", "network": "n"}
OTHER_LAYERS = {**RECORD, "frozen layers": "others"}
PROBA_DOG = [0.1, 0.2, 0.7, 0.4]  # for the four validation images of the fixture `dataset`


@pytest.fixture
def path(tmp_path):
    return tmp_path / "conv_feat_train.npy"


def begin(path, rows=ROWS, record=RECORD, stop=60):
    """A FeatureFile to which rows were added in batches of 8, as 04_precompute.py does it, up to row `stop`."""
    file = support.FeatureFile(path, rows.shape, record, 8)
    file.resumed_at = file.done
    for i in range(file.done, min(stop, len(rows)), 8):
        file.append(rows[i:i + 8])
    return file


def keep(path, rows=ROWS, record=RECORD):
    """The same to the end: nothing but these rows is left. Return how many of them were computed."""
    file = begin(path, rows, record)
    assert np.array_equal(file.finish(), rows) and np.array_equal(np.load(path), rows)
    assert sorted(os.listdir(path.parent)) == ["conv_feat_train.json", "conv_feat_train.npy"]
    return len(rows) - file.resumed_at


def test_features_after_a_kill_are_those_of_an_unbroken_run(tmp_path, out, figures, monkeypatch, capsys):
    """An hour of work is kept. Here the third batch of 8 is killed."""
    loaded, load_image, append = [], support.load_image, support.FeatureFile.append
    options = ["--data-dir", make_dataset(tmp_path / "data", train=9), "--output-dir", out, "--epochs", 1]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(support.FeatureFile, "append", lambda file, rows: (
            append(file, rows) if file.done < 16 else file.file.close() or raise_(Killed)))
        run_here("04_precompute.py", *options)
    monkeypatch.setattr(common, "load_image", lambda path: loaded.append(path) or load_image(path))
    names = run_here("04_precompute.py", *options)
    assert "conv_feat_train.npy: resuming after the first 16 of 18 images" in capsys.readouterr().out
    assert sum("train" in Path(path).parts for path in loaded) == 18 - 16 and not list(out.glob("*.part"))
    unbroken, _ = names["preconvfeat"](DataLoader(names["dsets"]["train"], batch_size=8))
    assert np.array_equal(np.load(out / "conv_feat_train.npy"), unbroken)


def test_features_after_a_full_disk_are_whole(path):
    """The message names the file, and the same command continues; also if the disk contains more than the rows."""
    file = begin(path, stop=24)
    with full_disk(20_000):
        text = message(file.append, ROWS[24:32])
    file.file.detach().close()  # as a kill: without what is in the buffer
    assert f"error: {file.part}: cannot be written" in text
    with begin(path).file as file:
        file.write(b"more")
    assert keep(path) == 60 - 56  # the last batch is always computed again
    np.save(path.with_name("plain"), ROWS)
    assert path.read_bytes() == path.with_name("plain.npy").read_bytes()


@pytest.mark.parametrize("place, old_features", [
    ("os.fsync", True), ("pathlib.Path.unlink", True), ("support.save", False), ("os.replace", False)])
def test_features_never_stand_beside_a_record_that_is_not_theirs(path, monkeypatch, capsys, place, old_features):
    """Wherever the end of a run is broken off, the next one neither uses wrong features nor computes all again."""
    np.save(path, ROWS + 3)  # without a record it may be anything
    assert keep(path) == 60
    file, replace = begin(path, ROWS + 1, OTHER_LAYERS), os.replace
    assert "conv_feat_train.npy was computed with different frozen layers: recomputing" in capsys.readouterr().out
    kill = {"os.replace": lambda a, b: replace(a, b) if b.suffix == ".json" else raise_(Killed)}
    with monkeypatch.context() as patch, pytest.raises(Killed), file.file:
        patch.setattr(place, kill.get(place, lambda *args, **options: raise_(Killed)))
        file.finish()
    assert path.exists() == old_features
    if old_features:
        assert np.array_equal(np.load(path), ROWS) and json_of(path.with_suffix(".json"))["frozen layers"] == "f"
    assert keep(path, ROWS + 1, OTHER_LAYERS) == 60 - 56 and keep(path, ROWS + 1, OTHER_LAYERS) == 0
    assert "conv_feat_train.npy: already computed from the same" in capsys.readouterr().out


@posix  # Windows lets nobody rename or remove a file that another program has open
@pytest.mark.parametrize("record", [RECORD, OTHER_LAYERS], ids=["the same", "other layers"])
def test_two_runs_of_04_at_once(path, capsys, record):
    """One of them is told, and the features that are left are whole: nothing is cut off rows that are being written."""
    first = begin(path, stop=40)
    first.append(ROWS[40:44])
    assert first.part.stat().st_size == 128 + 44 * 784  # each batch is in the file at once, as a kill may come
    begin(path, record=record, stop=0).file.close()
    assert os.fstat(first.file.fileno()).st_size == 128 + 44 * 784
    assert (".part was started with different images" in capsys.readouterr().out) == (record == OTHER_LAYERS)
    keep(path, record=record)
    first.append(ROWS[44:])
    with first.file:
        text = message(first.finish)
    assert text.startswith(f"error: {path}: cannot be written (No such file") and "is another run writing here?" in text
    assert keep(path, record=record) == 0


@pytest.mark.parametrize("stop", [0, 24, 48])
def test_the_speed_of_a_resumed_run_is_that_of_an_unbroken_one(path, monkeypatch, stop):
    """04 calculates with it when precomputing pays off. The first batch, which starts the workers, does not count."""
    begin(path, stop=stop).file.close()
    ticks = iter([100, 100 + 0.25 * (60 - stop - 8)])  # at the end of the first batch of 8, and of the last one
    monkeypatch.setattr(support.time, "perf_counter", lambda: next(ticks))
    assert keep(path) == 60 - stop and json_of(path.with_suffix(".json"))["images_per_second"] == pytest.approx(4)


def test_05_needs_results_that_fit(dataset, options, out, figures, capsys):
    """Old predictions would stand under new images. Each message has the command to run, or the option to leave out."""
    assert re.search("03_metrics.json: missing.*No such file.*: run python 03", message("05_analysis.py", *options))
    record = fake_results(out, dataset, PROBA_DOG)
    (out / "04_all_proba.npy").unlink()
    assert re.search("04_all_proba.npy: missing.*: run python 04", message("05_analysis.py", *options))
    support.save(out, {"04_metrics.json": {"made_from": record}})
    assert "script was stopped before its test was complete: run python 04" in message("05_analysis.py", *options)
    changed = {**record, "transform": "another", "validation images": "others"}
    for step in ("03", "04"):
        fake_results(out, dataset, PROBA_DOG, step=step, made_from=changed)
        text = message("05_analysis.py", *options, "--step", step)
        assert f"made with a different transform and different validation images: run python {step}" in text
    record["training images"] = "others"  # predictions do not depend on them, but a head does
    fake_results(out, dataset, PROBA_DOG, made_from=record)
    text = message("05_analysis.py", *options, "--weights", "untrained")
    assert "--weights untrained: script 04 used imagenet: omit --weights" in text and not list(out.glob("05_*"))
    for layers, shown in [(record["frozen layers"], 1), ("others", 0)]:
        capsys.readouterr()
        made_from = {**record, "frozen layers": layers}
        support.save(out, {"02_zero_shot.json": {"valid_accuracy": 0.8125, "made_from": made_from}})
        analyse(dataset, out, "--weights", "imagenet")
        assert capsys.readouterr().out.count("zero-shot accuracy      0.8125") == shown
    text = message("05_analysis.py", *options, "--image", PHOTO)
    changed = "different training images and different frozen layers"
    assert f"04_head.pt was trained with {changed} (--weights imagenet" in text


def test_04_continues_from_03_until_the_transform_is_changed(tmp_path, out, figures, monkeypatch, capsys):
    """An exercise. (A learning rate of 0 leaves the last layer as it is.) 04 compares its time only if 03 fits."""
    options = ["--data-dir", make_dataset(tmp_path / "data", train=5), "--output-dir", out]  # 10: more than one batch
    run_here("03_finetune_head.py", *options, "--epochs", 1)
    names = run_here("04_precompute.py", *options, "--epochs", 1, "--lr", 0)
    printed, head_03 = capsys.readouterr().out, support.load(out / "03_head.pt", "")["weight"]
    assert torch.equal(names["model_vgg"].classifier[6].weight, head_03)
    assert "the last layer continues from 03_head.pt, trained on the same images" in printed
    assert "\ncomputing the features of the training images, once: " in printed
    record, features = json_of(out / "03_metrics.json")["made_from"], json_of(out / "conv_feat_valid.json")
    assert list(record) == ["transform", "training images", "validation images", "frozen layers", "precision"]
    assert record == json_of(out / "04_metrics.json")["made_from"]
    assert {**features, "training images": record["training images"]} == {
        **record, "network": str(names["frozen"]), "images_per_second": None}  # it was one batch
    resize = transforms.Compose([transforms.Resize(256), *common.imagenet_format.transforms])
    monkeypatch.setattr(common, "imagenet_format", resize)
    for step in ("03", "04"):
        text = message("05_analysis.py", *options, "--step", step)
        assert f"{step}_predictions.npy: made with a different transform: run python {step}" in text
    capsys.readouterr()
    names = run_here("04_precompute.py", *options, "--epochs", 1, "--lr", 0)
    printed = capsys.readouterr().out
    assert printed.count("was computed with a different transform: recomputing") == 2
    assert "from random weights: 03_head.pt was trained with a different transform\n" in printed
    assert "\nan epoch on features: " in printed and "once: " not in printed
    assert not torch.equal(names["model_vgg"].classifier[6].weight, head_03)


def test_one_layer_more_is_trained(options, figures):
    """The head needs the layers below it as they are after the training, which are not saved: 05 notices."""
    edits = {"    criterion = nn.NLL": "    model_vgg.classifier[3].requires_grad_(True)\n    criterion = nn.NLL",
             "SGD(model_vgg.classifier[6].parameters()": "SGD(model_vgg.classifier[3:].parameters()"}  # as in README
    for name in ("03_finetune_head.py", "04_precompute.py"):
        run_here(name, *options, "--epochs", 1, "--lr", 0.1, edits=edits)
        text = message("05_analysis.py", *options, "--image", PHOTO)
        assert f"{name[:2]}_head.pt was trained with different frozen layers (--weights imagenet)" in text


def test_an_image_is_deleted_during_the_training(dataset, options, out, figures, monkeypatch):
    """The training is not lost, and what is recorded are the images that were trained on."""
    train_model, image, record = common.train_model, dataset / "valid" / "dogs" / "dog.1.jpg", record_of(dataset)
    monkeypatch.setattr(common, "train_model", lambda *args, **options: image.unlink() or train_model(*args, **options))
    text = message("03_finetune_head.py", *options, "--epochs", 1)
    assert f"{image}: cannot be read as an image (No such file" in text and (out / "03_head.pt").exists()
    metrics = json_of(out / "03_metrics.json")
    assert len(metrics["train_loss"]) == 1 and metrics["made_from"]["validation images"] == record["validation images"]


@pytest.mark.parametrize("name", SCRIPTS[1:])
def test_folders_are_checked_before_any_work(tmp_path, monkeypatch, name):
    """Not after hours of it. A student who starts in the middle is sent to the beginning."""
    options = ["--data-dir", tmp_path / "none", "--output-dir", tmp_path]
    assert f"error: {tmp_path / 'none' / 'train'} is missing: run python 01_data.py" in message(name, *options)
    monkeypatch.setattr("tempfile.mkdtemp", lambda *args, **options: raise_(PermissionError(13, "Permission denied")))
    assert f"error: {tmp_path}: cannot be written (Permission denied): check its permissions" in message(name, *options)


@posix
def test_ctrl_c_keeps_the_part_file_and_leaves_no_workers(tmp_path, out):
    """One line, and the next run resumes. The signal goes to the whole process group, as from a terminal."""
    dataset, two_batches = make_dataset(tmp_path / "data", train=100, valid=1), 2 * 8 * 512 * 49 * 4
    command = [sys.executable, ROOT / "04_precompute.py", "--data-dir", dataset, "--output-dir", out,
               "--num-workers", "2", "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) as process:
        while process.poll() is None and not any(path.stat().st_size > two_batches for path in out.glob("*.part")):
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr.strip()) == (130, "stopped by Ctrl-C"), stdout + stderr
    with pytest.raises(ProcessLookupError):  # no orphan workers
        os.killpg(process.pid, 0)
    assert re.fullmatch(r"conv_feat_train\.\w{16}\.part", *os.listdir(out))


def test_workers_that_are_started_as_on_macos_and_windows(dataset, options, out, figures, monkeypatch, vgg, capfd):
    """There, a worker is a new Python that imports the script: it finds its functions, and does not run its body."""
    main, method = types.ModuleType("__main__"), torch.multiprocessing.get_start_method(allow_none=True)
    main.__file__ = str(ROOT / "05_analysis.py")
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(sys, "argv", arguments("05_analysis.py", [*options, "--submission", "--num-workers", 1]))
    (dataset / "test1").mkdir()
    (dataset / "test1" / "1.jpg").write_bytes(PHOTO.read_bytes())
    fake_results(out, dataset, PROBA_DOG, model=vgg)
    capfd.readouterr()
    torch.multiprocessing.set_start_method("spawn", force=True)
    try:
        exec(compile((ROOT / "05_analysis.py").read_text(), main.__file__, "exec"), vars(main))
    finally:
        torch.multiprocessing.set_start_method(method, force=True)
    printed = capfd.readouterr()
    assert printed.err == "" and printed.out.count("options: ") == 1
    assert (out / "submission.csv").read_text().startswith("id,label\n1,0.")


@posix
def test_a_console_that_cannot_print_a_path_or_is_closed(tmp_path, out, figures, monkeypatch, capfd):
    """A user named Müller; and output that is piped into head. Each line appears at once, also in a pipe."""
    options = ["--data-dir", make_dataset(tmp_path / "M\u00fcller \u732b"), "--output-dir", out]
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    run_here("01_data.py", *options)
    assert re.search(r"M\\xfcller \\u732b(.|\n)*Done[.] Next", sys.stdout.buffer.getvalue().decode())
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as pipe, pytest.raises(SystemExit, match="141"):  # as a program that a closed pipe has ended
        monkeypatch.setattr(sys, "stdout", pipe)
        message("01_data.py", *options)
    assert capfd.readouterr().err == ""
