"""What passes from one script to the next (features, heads, predictions, and records of what they were made from), and
what survives if a run is stopped, a disk is full, or something has changed in between."""
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
from multiprocessing.context import SpawnProcess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (PHOTO, ROOT, SCRIPTS, Killed, analyse, arguments, assert_one_line, fake_results, full_disk,
                      json_of, make_dataset, message, raise_, record_of, run_here)
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms

import common
import support

posix = pytest.mark.skipif(sys.modules.get("resource", os.name) in (None, "nt"), reason="Windows has no such signals")
ROWS = np.random.default_rng(0).normal(size=(60, 4, 7, 7)).astype(np.float32)
RECORD = {"transform": "t", "train images": "i", "frozen layers": "f", "precision": "p", "network": "n"}
FIELDS = ["transform", "train images", "valid images", "frozen layers", "precision"]
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
    """An hour of work is kept. Here the third batch of 8 is killed, and half of the second was not yet on the disk."""
    dataset, load_image, loaded = make_dataset(tmp_path / "data", train=12, valid=2), support.load_image, []
    options, files, append = ["--data-dir", dataset, "--epochs", 1, "--output-dir", out], [], support.FeatureFile.append
    monkeypatch.setattr(support.FeatureFile, "append", lambda file, rows: files.append(file) or append(file, rows))
    monkeypatch.setattr(common, "load_image", lambda path: loaded.append(path) or (
        load_image(path) if len(loaded) < 24 else raise_(Killed)))  # 4 images to validate, then 20 to train on
    with pytest.raises(Killed):
        run_here("04_precompute.py", *options)
    files[0].file.truncate(files[0].part.stat().st_size - 4 * 512 * 49 * 4)
    files[0].file.close()

    loaded.clear()
    monkeypatch.setattr(common, "load_image", lambda path: loaded.append(path) or load_image(path))
    names = run_here("04_precompute.py", *options)
    assert "conv_feat_train.npy: resuming after the first 8 of 24 images" in capsys.readouterr().out
    assert sum("train" in Path(path).parts for path in loaded) == 24 - 8 and not list(out.glob("*.part"))
    unbroken, _ = names["preconvfeat"](DataLoader(names["dsets"]["train"], batch_size=8))
    assert np.array_equal(np.load(out / "conv_feat_train.npy"), unbroken)


def test_a_part_file_that_is_too_long_gives_a_whole_file(path):
    """After a kill the disk may contain more than the rows. The last batch is always computed again."""
    with begin(path, ROWS[:56]).file as file:
        file.write(b"more")
    assert keep(path, ROWS[:56]) == 56 - 48
    np.save(path.with_name("plain"), ROWS[:56])
    assert path.read_bytes() == path.with_name("plain.npy").read_bytes()


def test_a_full_disk_costs_no_features(path):
    """The message names the file, and after some space was freed the same command continues."""
    file = begin(path, stop=24)
    with full_disk(20_000):
        text = message(file.append, ROWS[24:32])
    file.file.detach().close()  # as a kill: without what is in the buffer
    assert f"error: {file.part}: cannot be written" in text and keep(path) == 60 - 24


@pytest.mark.parametrize("field", RECORD)
def test_features_of_something_else_are_computed_again(path, capsys, field):
    """Features of different images or layers would train without an error. Complete or not: the student sees why."""
    np.save(path, ROWS + 3)  # without a record it may be anything
    assert keep(path) == 60
    assert keep(path) == 0 and "conv_feat_train.npy: already computed from the same" in capsys.readouterr().out
    file = begin(path, ROWS + 1, {**RECORD, field: "another"}, stop=24)
    file.file.close()
    assert f"conv_feat_train.npy was computed with a different {field}: recomputing" in capsys.readouterr().out
    assert keep(path, ROWS + 2, {**RECORD, field: "a third"}) == 60
    assert f"{file.part.name} was begun with different" in capsys.readouterr().out
    assert json_of(path.with_suffix(".json"))[field] == "a third"


@pytest.mark.parametrize("place, old_features", [
    ("os.fsync", True), ("pathlib.Path.unlink", True), ("support.save", False), ("os.replace", False)])
def test_features_never_stand_beside_a_record_that_is_not_theirs(path, monkeypatch, place, old_features):
    """Wherever the end of a run is broken off, the next one neither uses wrong features nor computes them all again."""
    keep(path)
    other, replace = {**RECORD, "frozen layers": "others"}, os.replace
    file = begin(path, ROWS + 1, other)
    kill = {"os.replace": lambda a, b: replace(a, b) if b.suffix == ".json" else raise_(Killed)}
    with monkeypatch.context() as patch, pytest.raises(Killed), file.file:
        patch.setattr(place, kill.get(place, lambda *args, **options: raise_(Killed)))
        file.finish()
    assert path.exists() == old_features
    if old_features:
        assert np.array_equal(np.load(path), ROWS) and json_of(path.with_suffix(".json"))["frozen layers"] == "f"
    assert keep(path, ROWS + 1, other) == 60 - 56


@posix  # Windows lets nobody rename or remove a file that another program has open
@pytest.mark.parametrize("record", [RECORD, {**RECORD, "frozen layers": "others"}], ids=["the same", "other weights"])
def test_two_runs_of_04_at_once(path, record):
    """One of them is told, and the features that are left are whole: nothing is cut off rows that are being written."""
    first = begin(path, stop=40)
    first.append(ROWS[40:44])
    size = os.stat(path.parent / first.file.name).st_size
    second = support.FeatureFile(path, ROWS.shape, record, 8)
    assert os.fstat(first.file.fileno()).st_size == size == 128 + 44 * 784  # each batch is in the file at once
    for i in range(second.done, 60, 8):
        second.append(ROWS[i:i + 8])
    second.finish()
    first.append(ROWS[44:])
    with first.file:
        assert "Is another run writing here? Wait for it to finish" in message(first.finish)
    assert keep(path, ROWS, record) == 0


@pytest.mark.parametrize("stop", [0, 24, 48])
def test_the_speed_of_a_resumed_run_is_that_of_an_unbroken_one(path, monkeypatch, stop):
    """04 calculates with it when precomputing pays off. Images take 0.25 s; the start of workers, 100 s in each run,
    and the time between two runs do not count."""
    clock, append = [0.0], support.FeatureFile.append

    def timed(file, rows):
        clock[0] += 100 if file.timed_from is None else 0.25 * len(rows)
        append(file, rows)

    monkeypatch.setattr(support.FeatureFile, "append", timed)
    monkeypatch.setattr(support.time, "perf_counter", lambda: clock[0])
    begin(path, stop=stop).file.close()
    assert keep(path) == 60 - stop and json_of(path.with_suffix(".json"))["images_per_second"] == pytest.approx(4)


def test_05_needs_results_that_fit_the_dataset(dataset, options, out, figures):
    """Old predictions would stand under new images. Each message has the command to run."""
    assert re.search("03_metrics.json: missing.*No such file.*: run python 03", message("05_analysis.py", *options))
    record = fake_results(out, dataset, PROBA_DOG)
    (out / "04_all_proba.npy").unlink()
    assert re.search("04_all_proba.npy: missing.*: run python 04", message("05_analysis.py", *options))
    support.save(out, {"04_metrics.json": {"made_from": record}})
    assert "script was stopped before its test: run python 04" in message("05_analysis.py", *options)
    changed = {**record, "transform": "another", "valid images": "others"}
    for step in ("03", "04"):
        fake_results(out, dataset, PROBA_DOG, step=step, made_from=changed)
        text = message("05_analysis.py", *options, "--step", step)
        assert f"{step}_predictions.npy: made with a different transform and valid images: run python {step}" in text
    assert not list(out.glob("05_*"))
    fake_results(out, dataset, PROBA_DOG, made_from={**record, "train images": "others"})
    assert "correct" in analyse(dataset, out)  # predictions do not depend on the training images


@pytest.mark.parametrize("name", SCRIPTS[1:])
def test_without_a_dataset_each_script_names_the_first_one(options, out, name):
    """A student who starts in the middle is sent to the beginning."""
    text = message(name, "--data-dir", out / "none", "--output-dir", out)
    assert f"{out / 'none' / 'train'} is missing: run python 01_data.py first" in text


def test_05_uses_a_head_only_with_the_layers_it_was_trained_on(dataset, options, out, vgg, figures):
    """Any other layers give different features, and the head wrong answers."""
    changed = dict.fromkeys(["train images", "frozen layers", "precision"], "others")
    fake_results(out, dataset, PROBA_DOG, made_from={**fake_results(out, dataset, PROBA_DOG, model=vgg), **changed})
    text = message("05_analysis.py", *options, "--image", PHOTO)
    assert f"04_head.pt was trained with a different {' and '.join(changed)} (--weights imagenet): use the same" in text


@pytest.mark.parametrize("more", [["untrained"], ["mine.pth", "--bf16"]], ids=" ".join)
def test_05_takes_weights_and_precision_from_the_results(tmp_path, options, monkeypatch, capsys, figures, more):
    """After a run with other weights, no option needs to be repeated for own photos, and nothing is downloaded."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(5)
    torch.save(common.models.vgg16().state_dict(), "mine.pth")
    monkeypatch.setattr(common, "IMAGENET_FILE", tmp_path / "none.pth")
    names = run_here("03_finetune_head.py", *options, "--epochs", 1, "--lr", 1, "--weights", *more)
    with torch.inference_mode(), Image.open(PHOTO) as photo:
        cat, dog = names["model_vgg"](common.IMAGENET.transforms()(photo)[None])[0].exp().tolist()
    for explicit in [[], ["--weights", more[0]]]:
        capsys.readouterr()
        run_here("05_analysis.py", *options, "--image", PHOTO, *explicit)
        assert f"{PHOTO}: cats {cat:.3f}, dogs {dog:.3f}\n" in capsys.readouterr().out
    text = message("05_analysis.py", *options, "--weights", "imagenet")
    assert re.search(rf"--weights imagenet: script 03 used \S*{more[0]}: leave out --weights", text)


@pytest.mark.parametrize("field", [None, "no record", "frozen layers", "valid images"])
def test_a_zero_shot_result_of_something_else_is_not_shown(dataset, out, figures, capsys, field):
    """What training brings can only be seen beside an accuracy on the same images with the same layers."""
    record = fake_results(out, dataset, PROBA_DOG)
    zero_shot = {} if field == "no record" else {"made_from": {**record, **({field: "another"} if field else {})}}
    support.save(out, {"02_zero_shot.json": {"valid_accuracy": 0.8125, **zero_shot}})
    analyse(dataset, out)
    assert ("zero-shot accuracy      0.8125" in capsys.readouterr().out) == (field is None)


@pytest.mark.parametrize("changed", [[], FIELDS], ids=["the same", "different"])
def test_04_continues_from_03_only_if_all_is_the_same(options, out, figures, capsys, changed):
    """With a learning rate of 0 the layer remains what it started as: that of 03, or a new one."""
    run_here("03_finetune_head.py", *options, "--epochs", 1)
    metrics, head_03 = json_of(out / "03_metrics.json"), support.load(out / "03_head.pt", "")["weight"]
    record = metrics["made_from"]
    assert list(record) == FIELDS
    support.save(out, {"03_metrics.json": {**metrics, "made_from": {**record, **dict.fromkeys(changed, "another")}}})
    run_here("04_precompute.py", *options, "--epochs", 1, "--lr", 0)
    started = f"starts from random weights: 03_head.pt was trained with a different {' and '.join(changed)}\n"
    started = started if changed else "continues from 03_head.pt, which was trained on the same images"
    assert f"the last layer {started}" in capsys.readouterr().out
    assert torch.equal(support.load(out / "04_head.pt", "")["weight"], head_03) == (changed == [])
    assert json_of(out / "04_metrics.json")["made_from"] == record


LAYER_3 = {  # as in the README
    "    criterion = nn.NLL": "    model_vgg.classifier[3].requires_grad_(True)\n    criterion = nn.NLL",
    "SGD(model_vgg.classifier[6].parameters()": "SGD(model_vgg.classifier[3:].parameters()"}


def test_one_layer_more_is_trained(dataset, options, out, figures, capsys):
    """The head needs the layers below it as they are after the training, which are not saved: 05 and 04 notice."""
    for name in ("03_finetune_head.py", "04_precompute.py"):
        run_here(name, *options, "--epochs", 1, "--lr", 0.1, edits=LAYER_3)
        text = message("05_analysis.py", *options, "--image", PHOTO)
        assert f"{name[:2]}_head.pt was trained with a different frozen layers" in text
    capsys.readouterr()
    run_here("04_precompute.py", *options, "--epochs", 1)
    printed = capsys.readouterr().out
    assert "random weights: 03_head.pt was trained with a different frozen layers" in printed
    assert printed.count("already computed") == 2  # the convolutions are the same
    analyse(dataset, out, "--image", PHOTO)
    assert f"{PHOTO}: cats 0." in capsys.readouterr().out


def test_the_transform_is_changed(options, out, figures, monkeypatch, capsys):
    """Also an exercise: 05 refuses old predictions; 04 computes the features again and starts a new layer."""
    for name in ("03_finetune_head.py", "04_precompute.py"):
        run_here(name, *options, "--epochs", 1)
    resize = transforms.Compose([transforms.Resize(256), *common.imagenet_format.transforms])
    monkeypatch.setattr(common, "imagenet_format", resize)
    for step in ("03", "04"):
        text = message("05_analysis.py", *options, "--step", step)
        assert f"{step}_predictions.npy: made with a different transform: run python {step}" in text
    capsys.readouterr()
    run_here("04_precompute.py", *options, "--epochs", 1)
    printed = capsys.readouterr().out
    assert printed.count("was computed with a different transform: recomputing") == 2
    assert "random weights: 03_head.pt was trained with a different transform" in printed


def test_what_is_computed_once_is_changed(options, figures, capsys):
    """Features of the same shape from different layers are computed again: a student tries the first dense layer."""
    run_here("04_precompute.py", *options, "--layer", "fc7", "--epochs", 1)
    run_here("04_precompute.py", *options, "--layer", "fc7", "--epochs", 1, edits={
        "model_vgg.classifier[:6])\n": "model_vgg.classifier[:2], nn.Linear(64, 4096))\n"})
    assert capsys.readouterr().out.count("was computed with a different network: recomputing") == 2


@pytest.mark.parametrize("fault", ["deleted", "changed"])
@pytest.mark.parametrize("name", ["03_finetune_head.py", "04_precompute.py"])
def test_an_image_is_deleted_or_changed_during_the_training(dataset, options, out, figures, monkeypatch, fault, name):
    """The training is not lost, and what is recorded are the images that were trained on."""
    train_model, record, step = common.train_model, record_of(dataset), name[:2]
    image = dataset / "valid" / "dogs" / "dog.1.jpg"

    def train(*args, **options):
        image.unlink() if fault == "deleted" else shutil.copy(dataset / "train" / "cats" / "cat.1.jpg", image)
        return train_model(*args, **options)

    monkeypatch.setattr(common, "train_model", train)
    if fault == "deleted":  # in 04 it is missing in the figure at the end, after the test on saved features
        assert f"{image}: cannot be read as an image (No such file" in message(name, *options, "--epochs", 1)
    else:
        run_here(name, *options, "--epochs", 1)
    metrics = json_of(out / f"{step}_metrics.json")
    assert all(metrics["made_from"][field] == record[field] for field in ("train images", "valid images"))
    assert len(metrics["train_loss"]) == 1 and (out / f"{step}_head.pt").exists()
    assert ("valid_loss" in metrics) == (fault == "changed" or step == "04")


@posix
def test_an_output_folder_that_cannot_be_written():
    """Reported before hours of work, not after. As a user who is not root, for whom permissions do not count."""
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        os.seteuid(user or 65534)
        try:
            text = message("03_finetune_head.py", "--data-dir", "none", "--output-dir", folder)
        finally:
            os.seteuid(user)
    assert f"error: {folder}: cannot be written (Permission denied): check its permissions" in text


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_output_folder_that_cannot_be_made(tmp_path, name):
    """Reported before any work: before the missing dataset is noticed, let alone downloaded."""
    (tmp_path / "file").write_text("")
    text = message(name, "--data-dir", tmp_path / "none", "--output-dir", tmp_path / "file" / "results")
    assert f"error: {tmp_path / 'file' / 'results'}: " in text and "choose another folder" in text
    assert os.listdir(tmp_path) == ["file"]


@posix
def test_ctrl_c_keeps_the_part_file_and_leaves_no_workers(tmp_path, out):
    """One line, and the next run resumes. The signal goes to the whole process group, as from a terminal."""
    dataset, two_batches = make_dataset(tmp_path / "data", train=150, valid=1), 2 * 8 * 512 * 49 * 4
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


def test_a_worker_without_its_main_process_is_quiet(monkeypatch, capsys):
    """After Ctrl-C, a thread of each worker would add a traceback: multiprocessing calls sys.excepthook there."""
    monkeypatch.setattr(torch.utils.data._utils.worker, "_worker_info", object())
    support.report(ConnectionResetError, ConnectionResetError(104, "Connection reset by peer"), None)
    assert capsys.readouterr().err == ""


def kill_worker(batch):
    os.kill(os.getpid(), signal.SIGKILL)


@posix
def test_a_killed_worker_is_one_line():
    """Linux kills a process if memory runs out, Windows and Docker have other limits: fewer processes help."""
    loader = DataLoader(range(4), num_workers=1, collate_fn=kill_worker)
    assert "a worker process died (was there too little memory?): add --num-workers 0" in message(list, loader)


def test_workers_that_are_started_as_on_macos_and_windows(dataset, options, out, figures, monkeypatch, vgg, capfd):
    """There, a worker is a new Python that imports the script: it finds its functions, and does not run its body."""
    main, started, spawn = types.ModuleType("__main__"), [], SpawnProcess._Popen
    main.__file__ = str(ROOT / "05_analysis.py")
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(SpawnProcess, "_Popen", lambda process: started.append(process) or spawn(process))
    monkeypatch.setattr(sys, "argv", arguments("05_analysis.py", [*options, "--submission", "--num-workers", 1]))
    (dataset / "test1").mkdir()
    shutil.copy(PHOTO, dataset / "test1" / "1.jpg")
    fake_results(out, dataset, PROBA_DOG, model=vgg)
    analyse(dataset, out, "--submission")
    alone = (out / "submission.csv").read_bytes()
    (out / "submission.csv").unlink()
    capfd.readouterr()
    method = torch.multiprocessing.get_start_method(allow_none=True)
    torch.multiprocessing.set_start_method("spawn", force=True)
    try:
        exec(compile((ROOT / "05_analysis.py").read_text(), main.__file__, "exec"), vars(main))
    finally:
        torch.multiprocessing.set_start_method(method, force=True)
    printed = capfd.readouterr()
    assert len(started) == 1 and printed.err == "" and printed.out.count("options: ") == 1
    assert (out / "submission.csv").read_bytes() == alone


def test_a_console_that_cannot_print_a_path(tmp_path):
    """A user named Müller. The image is so large that Pillow would only warn: pytest hides that, a process does not."""
    dataset = make_dataset(tmp_path / "M\u00fcller \u732b", train=1, valid=1)
    Image.new("1", (12_000, 12_000)).save(dataset / "valid" / "cats" / "cat.0.png")
    command = [sys.executable, ROOT / "01_data.py", "--data-dir", dataset, "--output-dir", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True,
                          env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    bad, line = done.stderr.splitlines()
    assert done.returncode == 1 and "M\\xfcller" in done.stdout and "cat.0.png: cannot be read as an image" in bad
    assert "M\\xfcller" in assert_one_line(line)


@posix
def test_output_piped_into_head(options, monkeypatch, capfd):
    """Nobody reads any more: the script ends with the status of a program that a closed pipe has ended."""
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as pipe, pytest.raises(SystemExit, match="141"):
        monkeypatch.setattr(sys, "stdout", pipe)
        message("01_data.py", *options)
    assert capfd.readouterr().err == ""
