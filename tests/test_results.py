"""What passes from one script to the next (features, heads, predictions, and records of what they were made from), and
what survives if a run is stopped, or something has changed in between."""
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
from conftest import (PHOTO, ROOT, SCRIPTS, Killed, analyse, arguments, fake_results, json_of, make_dataset, message,
                      posix, raise_, record_of, run_here)
from torch.utils.data import DataLoader
from torchvision import transforms

import common
from support.features import FeatureFile
from support.files import load, save
from support.images import load_image

SCRIPT_OF = {"03": "03_finetune_head.py", "04": "04_precompute.py"}
PROBA_DOG = [0.1, 0.2, 0.7, 0.4]  # for the four validation images of the fixture `dataset`
ONE_EPOCH = ["--epochs", 1, "--lr", 0]  # a learning rate of 0 leaves the last layer as it is


def test_features_after_a_kill_are_those_of_an_unbroken_run(tmp_path, out, figures, monkeypatch, capsys, watched):
    """An hour of work is kept. Here the third batch of 8 is killed."""
    options = ["--data-dir", make_dataset(tmp_path / "data", train=9), "--output-dir", out, "--epochs", 1]
    loaded, append, calls = [], FeatureFile.append, watched("support.progress")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(FeatureFile, "append", lambda file, rows: (
            append(file, rows) if file.done < 16 else file.file.close() or raise_(Killed)))
        run_here("04_precompute.py", *options)
    calls.clear()
    monkeypatch.setattr(common, "load_image", lambda path: loaded.append(path) or load_image(path))
    names = run_here("04_precompute.py", *options)
    assert "conv_feat_train.npy: resuming after the first 16 of 18 images" in capsys.readouterr().out
    assert sum("train" in Path(path).parts for path in loaded) == 18 - 16
    assert calls[:2] == [(1, 18 - 16, "images"), (1, 4, "images")]  # progress counts what is left to do
    unbroken, _ = names["preconvfeat"](DataLoader(names["dsets"]["train"], batch_size=8))
    assert np.array_equal(np.load(out / "conv_feat_train.npy"), unbroken)


@pytest.mark.parametrize("step", ["03", "04"])
def test_05_sends_the_student_to_the_script_whose_results_are_missing(dataset, options, out, step):
    """Whatever file is gone: the message has the command to run."""
    again = f": run python {SCRIPT_OF[step]} with the same options"
    assert message("05_analysis.py", *options, "--step", step) == (
        f"error: {out / f'{step}_metrics.json'} is missing{again}")
    for name in ["predictions", "all_proba", "all_classes"]:
        fake_results(out, dataset, PROBA_DOG, step)
        (out / f"{step}_{name}.npy").unlink()
        assert message("05_analysis.py", *options, "--step", step) == (
            f"error: {out / f'{step}_{name}.npy'} is missing{again}")


def test_05_takes_the_results_of_04_if_there_are_any(dataset, options, out, figures, capsys):
    """Else those of 03, unless --step asks for them."""
    fake_results(out, dataset, PROBA_DOG, "03")
    for more, step in [([], "03"), ([], "04"), (["--step", "03"], "03")]:
        if step == "04":
            fake_results(out, dataset, PROBA_DOG, "04")
        run_here("05_analysis.py", *options, *more)
        assert f"\nsummary of script {step}\n" in capsys.readouterr().out


def test_05_refuses_a_training_that_was_stopped(dataset, options, out):
    """There is a last layer, but there are no predictions."""
    fake_results(out, dataset, PROBA_DOG, step="03")
    save(out, {"04_unfinished_metrics.json": {"train_loss": [0.7, 0.6, 0.5]}})
    assert message("05_analysis.py", *options) == (
        f"error: {out / '04_unfinished_metrics.json'}: script 04 was stopped before its test (finished epochs: 3): "
        "run python 04_precompute.py with the same options")


def test_05_says_that_its_results_are_older_than_a_training_that_was_stopped(dataset, out, figures, capsys):
    """A student tries --epochs 5000 and presses Ctrl-C: the results of the hour before are still there."""
    fake_results(out, dataset, PROBA_DOG)
    save(out, {"04_unfinished_metrics.json": {"train_loss": [0.7]}})
    analyse(dataset, out)
    printed = capsys.readouterr().out
    assert ("NOTICE: script 04 was stopped before its test (finished epochs: 1). These are the results of an earlier "
            "run.\n") in printed
    assert "\nsummary of script 04\n" in printed


@pytest.mark.parametrize("step", ["03", "04"])
def test_05_refuses_results_of_other_images(dataset, options, out, step):
    """Old predictions would stand under new images."""
    record = fake_results(out, dataset, PROBA_DOG, step)
    changed = {**record, "validation images": "others", "validation transform": "another"}
    fake_results(out, dataset, PROBA_DOG, step, made_from=changed)
    assert message("05_analysis.py", *options, "--step", step) == (
        f"error: {out / f'{step}_predictions.npy'}: made with different validation images and a different validation "
        f"transform: run python {SCRIPT_OF[step]} with the same options")
    assert not list(out.glob("05_*"))


def test_05_needs_no_training_images_to_show_predictions(dataset, options, out, figures):
    """Only the head, which --image uses, depends on them."""
    record = {**record_of(dataset), "training images": "others"}
    fake_results(out, dataset, PROBA_DOG, made_from=record)
    run_here("05_analysis.py", *options)
    assert message("05_analysis.py", *options, "--image", PHOTO).startswith(
        f"error: {out / '04_head.pt'} was trained with different training images and a different network and different "
        "frozen layers (--weights imagenet): use the same options, or train it again")


def test_05_uses_the_weights_of_the_results(dataset, options, out, figures):
    """Other weights would not belong to the head."""
    fake_results(out, dataset, PROBA_DOG)
    assert message("05_analysis.py", *options, "--weights", "untrained") == (
        "error: --weights untrained: script 04 used imagenet: omit --weights")
    assert run_here("05_analysis.py", *options, "--weights", "imagenet")["args"].weights == "imagenet"


@pytest.mark.parametrize("changed, shown", [
    ({}, True), ({"network": "with another last layer"}, True), ({"frozen layers": "others"}, False),
    ({"validation images": "others"}, False)])
def test_05_compares_with_zero_shot_on_the_same_images(dataset, out, figures, capsys, changed, shown):
    """A number of other images or weights would mislead."""
    record = fake_results(out, dataset, PROBA_DOG)
    save(out, {"02_zero_shot.json": {"valid_accuracy": 0.8125, "made_from": {**record, **changed}}})
    analyse(dataset, out)
    line = "\n  zero-shot accuracy      0.8125  (02_vgg_imagenet.py --zero-shot)\n"
    assert (line in capsys.readouterr().out) == shown


@pytest.fixture
def after_03(tmp_path, out, figures):
    """The options of a run after 03, with more than one batch of training images, and its last layer."""
    options = ["--data-dir", make_dataset(tmp_path / "data", train=5), "--output-dir", out]
    run_here("03_finetune_head.py", *options, "--epochs", 1)
    return options, load(out / "03_head.pt", "")["weight"]


def test_04_starts_from_the_last_layer_of_03(after_03, out, capsys):
    """As in the lecture. And the times of both are compared."""
    options, head_03 = after_03
    capsys.readouterr()
    names = run_here("04_precompute.py", *options, *ONE_EPOCH)
    printed = capsys.readouterr().out
    assert torch.equal(names["model_vgg"].classifier[6].weight, head_03)
    assert "the last layer starts from 03_head.pt, trained on the same images with the same frozen layers\n" in printed
    assert "\ncomputing the features of the training images, once: " in printed


def test_records_of_03_04_and_features_agree(after_03, out):
    """By these, later scripts know what fits."""
    options, _ = after_03
    run_here("04_precompute.py", *options, *ONE_EPOCH)
    record, features = json_of(out / "03_metrics.json")["made_from"], json_of(out / "conv_feat_valid.json")
    assert list(record) == ["training images", "training transform", "validation images", "validation transform",
                            "network", "frozen layers", "precision"]
    assert record == json_of(out / "04_metrics.json")["made_from"]
    for name in ["validation images", "validation transform", "precision"]:
        assert features[name] == record[name]
    assert features["images_per_second"] is None  # it was one batch


def test_after_a_change_of_the_transform_nothing_old_is_used(after_03, out, monkeypatch, capsys):
    """An exercise: 05 refuses the predictions, 04 recomputes the features and does not take 03's last layer."""
    options, head_03 = after_03
    run_here("04_precompute.py", *options, *ONE_EPOCH)
    resize = transforms.Compose([transforms.Resize(256), *common.imagenet_format.transforms])
    monkeypatch.setattr(common, "imagenet_format", resize)
    for step in ["03", "04"]:
        assert message("05_analysis.py", *options, "--step", step) == (
            f"error: {out / f'{step}_predictions.npy'}: made with a different validation transform: run python "
            f"{SCRIPT_OF[step]} with the same options")
    capsys.readouterr()
    names = run_here("04_precompute.py", *options, *ONE_EPOCH)
    printed = capsys.readouterr().out
    for x, part in [("train", "training"), ("valid", "validation")]:
        assert f"\nconv_feat_{x}.npy was computed with a different {part} transform: recomputing\n" in printed
    assert ("\nthe last layer starts from random weights: 03_head.pt was trained with a different training transform "
            "and a different validation transform\n") in printed
    assert "\nan epoch on features: " in printed and "once: " not in printed  # its time does not fit either
    assert not torch.equal(names["model_vgg"].classifier[6].weight, head_03)


def test_an_image_is_deleted_during_the_training(dataset, options, out, figures, monkeypatch):
    """The training is not lost, and what is recorded are the images that were trained on."""
    train_model, image, record = common.train_model, dataset / "valid" / "dogs" / "dog.1.jpg", record_of(dataset)
    monkeypatch.setattr(common, "train_model", lambda *args, **options: image.unlink() or train_model(*args, **options))
    assert message("03_finetune_head.py", *options, "--epochs", 1) == f"error: {image} is missing: check the name"
    assert (out / "03_unfinished_head.pt").exists()
    metrics = json_of(out / "03_unfinished_metrics.json")
    assert len(metrics["train_loss"]) == 1 and metrics["made_from"]["validation images"] == record["validation images"]


@pytest.mark.parametrize("name", ["03_finetune_head.py", "04_precompute.py"])
def test_each_epoch_is_saved(options, out, figures, monkeypatch, name):
    """Ctrl-C in the third of 50 epochs on all images: two are not lost, nor are the results of an earlier run."""
    run_here(name, *options, "--epochs", 1)
    before, train_model = {path.name: path.read_bytes() for path in out.glob(f"{name[:2]}_*")}, common.train_model

    def killed_later(*args, epochs, after_epoch, **more):
        def and_kill(history):
            after_epoch(history)
            if len(history) == 2:
                raise Killed
        train_model(*args, epochs=epochs, after_epoch=and_kill, **more)

    monkeypatch.setattr(common, "train_model", killed_later)
    with pytest.raises(Killed):
        run_here(name, *options, "--epochs", 50)
    assert len(json_of(out / f"{name[:2]}_unfinished_metrics.json")["train_loss"]) == 2
    assert (out / f"{name[:2]}_unfinished_head.pt").exists()
    assert all((out / file).read_bytes() == content for file, content in before.items())


@pytest.mark.parametrize("name", SCRIPTS[1:])
def test_folders_are_checked_before_any_work(tmp_path, monkeypatch, name):
    """Not after hours of it. A student who starts in the middle is sent to the beginning."""
    options = ["--data-dir", tmp_path / "none", "--output-dir", tmp_path / "out"]
    assert message(name, *options).endswith("--data-dir, or use --sample")
    monkeypatch.setattr("tempfile.mkdtemp", lambda *args, **options: raise_(PermissionError(13, "Permission denied")))
    assert message(name, *options).startswith(
        f"error: {tmp_path / 'out'}: cannot be written (Permission denied): check its permissions")


@pytest.mark.parametrize("name", SCRIPTS[1:4])
def test_without_network_the_sample_continues_and_a_full_run_stops(options, out, figures, monkeypatch, capsys, name):
    """02, 03 and 04: the first try of the course needs no network; hours with random weights would be lost."""
    monkeypatch.setattr(common, "IMAGENET_FILE", out / "none.pth")
    few = [] if name == "02_vgg_imagenet.py" else ["--epochs", 1]
    assert message(name, *options, *few).endswith(", or use --weights FILE or --weights untrained")
    assert not list(out.glob("0*"))
    names = run_here(name, "--sample", "--output-dir", out, *few)
    printed = capsys.readouterr().out
    assert names["args"].weights == "untrained" and "\nNOTICE: untrained weights." in printed
    assert "weights=untrained" in printed and "\nDone (untrained weights). Next" in printed


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
    assert re.fullmatch(r"conv_feat_train\.(\w{8})\.json conv_feat_train\.\1\.part", " ".join(sorted(os.listdir(out))))


def test_workers_that_are_started_as_on_macos_and_windows(dataset, options, out, figures, monkeypatch, vgg, capfd):
    """There, a worker is a new Python that imports the script: it finds its functions, and does not run its body."""
    main, method = types.ModuleType("__main__"), torch.multiprocessing.get_start_method(allow_none=True)
    main.__file__ = str(ROOT / "05_analysis.py")
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(sys, "argv", arguments("05_analysis.py", [*options, "--submission", "--num-workers", 1]))
    main.__doc__ = "python 05_analysis.py"
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
def test_a_console_that_cannot_print_a_path(tmp_path, out, figures, monkeypatch):
    """A user named Müller."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    run_here("01_data.py", "--data-dir", make_dataset(tmp_path / "M\u00fcller \u732b"), "--output-dir", out)
    assert re.search(r"M\\xfcller \\u732b(.|\n)*Done[.] Next", sys.stdout.buffer.getvalue().decode())


@posix
@pytest.mark.parametrize("unbuffered", [False, True])  # True: with PYTHONUNBUFFERED=1, as in Docker
def test_a_console_that_is_closed(options, figures, monkeypatch, capfd, unbuffered):
    """Output that is piped into head: no traceback, and the status of a program that a closed pipe has ended."""
    read, write = os.pipe()
    os.close(read)
    raw = io.FileIO(write, "w")
    pipe = io.TextIOWrapper(raw if unbuffered else io.BufferedWriter(raw), write_through=unbuffered)
    with pipe, pytest.raises(SystemExit, match="141"):
        monkeypatch.setattr(sys, "stdout", pipe)
        message("01_data.py", *options)
    assert capfd.readouterr().err == ""
