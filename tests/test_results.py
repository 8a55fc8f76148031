"""What passes from one script to the next (features, heads, predictions, and records of what they were made from), and
what survives if a run is stopped, or something has changed in between."""
import io
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import (PHOTO, SCRIPTS, Killed, arguments, fake_results, json_of, make_dataset, message, posix,
                      record_of, run_here)
from torch.utils.data import DataLoader
from torchvision import transforms

import common
from support.features import FeatureFile
from support.files import load, save

SCRIPT_OF = {"03": "03_finetune_head.py", "04": "04_precompute.py"}
PROBA_DOG = [0.1, 0.2, 0.7, 0.4]  # for the four validation images of the fixture `dataset`
ONE_EPOCH = ["--epochs", 1, "--lr", 0]  # a learning rate of 0 leaves the last layer as it is


def test_features_after_a_kill_are_those_of_an_unbroken_run(tmp_path, out, figures, monkeypatch, capsys, watched):
    """An hour of work is kept. Here the third batch of 8 is killed."""
    options = ["--data-dir", make_dataset(tmp_path / "data", train=9), "--output-dir", out, "--epochs", 1]
    append = FeatureFile.append

    def killed_after_two_batches(file, rows):
        if file.done == 2 * 8:
            file.file.close()
            raise Killed
        append(file, rows)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(FeatureFile, "append", killed_after_two_batches)
        run_here("04_precompute.py", *options)
    calls = watched("support.progress")
    names = run_here("04_precompute.py", *options)
    assert "conv_feat_train.npy: resuming after the first 16 of 18 images" in capsys.readouterr().out
    assert calls[0] == (1, 2, "images")  # progress counts what is left to do: one batch of two images
    unbroken, _ = names["preconvfeat"](DataLoader(names["dsets"]["train"], batch_size=8))
    assert np.array_equal(np.load(out / "conv_feat_train.npy"), unbroken)


@pytest.mark.parametrize("step", ["03", "04"])
@pytest.mark.parametrize("name", ["metrics.json", "predictions.npy", "all_proba.npy", "all_classes.npy"])
def test_05_sends_the_student_to_the_script_whose_results_are_missing(dataset, options, out, step, name):
    """Whatever file is gone: the message has the command to run."""
    fake_results(out, dataset, PROBA_DOG, step)
    (out / f"{step}_{name}").unlink()
    assert message(run_here, "05_analysis.py", *options, "--step", step) == (
        f"error: {out / f'{step}_{name}'} is missing: run python {SCRIPT_OF[step]} with the same options")


@pytest.mark.parametrize("steps, more, chosen", [(["03"], [], "03"), (["03", "04"], [], "04"),
                                                 (["03", "04"], ["--step", "03"], "03")])
def test_05_takes_the_results_of_04_if_there_are_any(dataset, options, out, figures, capsys, steps, more, chosen):
    """Without them, those of 03; --step 03 always takes those of 03."""
    for step in steps:
        fake_results(out, dataset, PROBA_DOG, step)
    run_here("05_analysis.py", *options, *more)
    assert f"\nsummary of script {chosen}\n" in capsys.readouterr().out


def test_05_refuses_a_training_that_was_stopped(dataset, options, out):
    """There is a last layer, but there are no predictions."""
    fake_results(out, dataset, PROBA_DOG, step="03")
    save(out, {"04_unfinished_metrics.json": {"train_loss": [0.7, 0.6, 0.5]}})
    assert message(run_here, "05_analysis.py", *options) == (
        f"error: {out / '04_unfinished_metrics.json'}: script 04 was stopped before its test (finished epochs: 3): "
        "run python 04_precompute.py with the same options")


def test_05_says_that_its_results_are_older_than_a_training_that_was_stopped(dataset, options, out, figures, capsys):
    """A student tries --epochs 5000 and presses Ctrl-C: the results of the hour before are still there."""
    fake_results(out, dataset, PROBA_DOG)
    save(out, {"04_unfinished_metrics.json": {"train_loss": [0.7]}})
    run_here("05_analysis.py", *options)
    assert ("NOTICE: script 04 was stopped before its test (finished epochs: 1). These are the results of an earlier "
            "run.\n") in capsys.readouterr().out


@pytest.mark.parametrize("changed, more, problem", [
    ({"validation images": "others"}, [], "04_predictions.npy: made with different validation images: run python 04"),
    ({"training images": "others"}, ["--image", PHOTO], "04_head.pt was trained with different training images ("),
    ({}, ["--weights", "untrained"], "--weights untrained: script 04 used imagenet: omit --weights")])
def test_05_refuses_what_does_not_fit_its_results(dataset, options, out, figures, vgg, changed, more, problem):
    """Old predictions would stand under new images. Only the head, which --image uses, depends on training images."""
    fake_results(out, dataset, PROBA_DOG, model=vgg, made_from={**record_of(dataset, vgg), **changed})
    assert problem in message(run_here, "05_analysis.py", *options, *more)


def test_05_shows_the_zero_shot_accuracy_that_02_printed(lesson):
    """What 02 writes is what 05 expects."""
    accuracy, = re.findall(r"^accuracy (\S+) on 8 validation images$", lesson.printed["02_vgg_imagenet.py"], re.M)
    assert f"\n  zero-shot accuracy      {accuracy}  " in lesson.printed["05_analysis.py"]


@pytest.mark.parametrize("other", ["frozen layers", "validation images"])
def test_05_does_not_compare_with_zero_shot_on_other_images_or_weights(dataset, options, out, figures, capsys, other):
    """A number of other images or weights would mislead."""
    fake_results(out, dataset, PROBA_DOG)
    made_from = {**record_of(dataset), other: "others"}
    save(out, {"02_zero_shot.json": {"valid_accuracy": 0.8125, "made_from": made_from}})
    run_here("05_analysis.py", *options)
    assert "zero-shot" not in capsys.readouterr().out


@pytest.fixture
def after_03(tmp_path, out, figures):
    """The options of a run after 03, with more than one batch of training images."""
    options = ["--data-dir", make_dataset(tmp_path / "data", train=5), "--output-dir", out]
    run_here("03_finetune_head.py", *options, "--epochs", 1)
    return options


def test_04_starts_from_the_last_layer_of_03(after_03, out, capsys):
    """As in the lecture. And the times of both are compared."""
    names = run_here("04_precompute.py", *after_03, *ONE_EPOCH)
    printed = capsys.readouterr().out
    assert torch.equal(names["model_vgg"].classifier[6].weight, load(out / "03_head.pt", "")["weight"])
    assert "the last layer starts from 03_head.pt, trained on the same images with the same frozen layers\n" in printed
    assert "\ncomputing the features of the training images, once: " in printed


def test_after_a_change_of_transform_and_weights_nothing_old_is_used(after_03, monkeypatch, capsys):
    """An exercise: 05 refuses the predictions, 04 recomputes the features and does not take 03's last layer."""
    run_here("04_precompute.py", *after_03, *ONE_EPOCH)
    resize = transforms.Compose([transforms.Resize(256), *common.imagenet_format.transforms])
    monkeypatch.setattr(common, "imagenet_format", resize)
    assert ": made with a different validation transform: run " in message(run_here, "05_analysis.py", *after_03)
    capsys.readouterr()
    run_here("04_precompute.py", *after_03, *ONE_EPOCH, "--weights", "untrained")
    printed, more = capsys.readouterr().out, "a different network and different frozen layers"
    assert f"conv_feat_train.npy was computed with a different training transform and {more}: recomputing" in printed
    assert f"conv_feat_valid.npy was computed with a different validation transform and {more}: recomputing" in printed
    assert ("\nthe last layer starts from random weights: 03_head.pt was trained with a different training transform "
            f"and a different validation transform and {more}\n") in printed
    assert "once: " not in printed  # the time of 03 does not fit either


def test_an_image_deleted_during_the_training_costs_no_epoch(dataset, options, out, figures, monkeypatch):
    """The training is not lost, and what is recorded are the images that were trained on."""
    train_model, image, record = common.train_model, dataset / "valid" / "dogs" / "dog.1.jpg", record_of(dataset)
    monkeypatch.setattr(common, "train_model", lambda *args, **options: image.unlink() or train_model(*args, **options))
    line = message(run_here, "03_finetune_head.py", *options, "--epochs", 1)
    assert line == f"error: {image} is missing: check the name"
    metrics = json_of(out / "03_unfinished_metrics.json")
    assert len(metrics["train_loss"]) == 1 and metrics["made_from"]["validation images"] == record["validation images"]


@pytest.mark.parametrize("step", ["03", "04"])
def test_each_epoch_is_saved(options, out, figures, monkeypatch, step):
    """Ctrl-C in the third of 50 epochs on all images: two are not lost, nor are the results of an earlier run."""
    run_here(SCRIPT_OF[step], *options, "--epochs", 1)
    before, save_results = {path: path.read_bytes() for path in out.glob(f"{step}_*")}, common.save_results

    def killed_in_the_third_epoch(args, step, model, record, history):
        if len(history) == 3:
            raise Killed
        save_results(args, step, model, record, history)

    monkeypatch.setattr(common, "save_results", killed_in_the_third_epoch)
    with pytest.raises(Killed):
        run_here(SCRIPT_OF[step], *options, "--epochs", 50)
    assert len(json_of(out / f"{step}_unfinished_metrics.json")["train_loss"]) == 2
    assert (out / f"{step}_unfinished_head.pt").exists()
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("name", SCRIPTS[1:])
def test_a_student_who_starts_in_the_middle_is_sent_to_the_beginning(tmp_path, name):
    """Before any work."""
    options = ["--data-dir", tmp_path / "none", "--output-dir", tmp_path / "out"]
    assert message(run_here, name, *options).endswith("--data-dir, or use --sample")


@pytest.mark.parametrize("name", SCRIPTS[1:4])
def test_without_network_the_sample_continues_and_a_full_run_stops(options, out, figures, monkeypatch, capsys, name):
    """The first try of the course needs no network; hours with random weights would be lost."""
    monkeypatch.setattr(common, "IMAGENET_FILE", out / "none.pth")
    few = [] if name == "02_vgg_imagenet.py" else ["--epochs", 1]
    assert message(run_here, name, *options).endswith(", or use --weights FILE or --weights untrained")
    run_here(name, "--sample", "--output-dir", out, *few)
    printed = capsys.readouterr().out
    assert "\nNOTICE: untrained weights." in printed and " weights=untrained" in printed


@posix
def test_ctrl_c_keeps_the_part_file_and_leaves_no_workers(tmp_path, out):
    """One line. The signal goes to the whole process group, as from a terminal."""
    dataset, two_batches = make_dataset(tmp_path / "data", train=100, valid=1), 2 * 8 * 512 * 49 * 4
    script_04 = arguments("04_precompute.py", ["--data-dir", dataset, "--output-dir", out, "--num-workers", 2])
    with subprocess.Popen([sys.executable, *script_04], stdout=-1, stderr=-1, text=True, start_new_session=True,
                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) as process:
        while process.poll() is None and not any(path.stat().st_size > two_batches for path in out.glob("*.part")):
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr.strip()) == (130, "stopped by Ctrl-C"), stdout + stderr
    with pytest.raises(ProcessLookupError):  # no orphan workers
        os.killpg(process.pid, 0)
    assert re.fullmatch(r"conv_feat_train\.(\w{8})\.json conv_feat_train\.\1\.part", " ".join(sorted(os.listdir(out))))


@posix
def test_a_path_that_the_console_cannot_print_is_escaped(tmp_path, out, figures, monkeypatch):
    """A user named Müller."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    run_here("01_data.py", "--data-dir", make_dataset(tmp_path / "M\u00fcller \u732b"), "--output-dir", out)
    assert re.search(r"M\\xfcller \\u732b(.|\n)*Done[.] Next", sys.stdout.buffer.getvalue().decode())


@posix
@pytest.mark.parametrize("unbuffered", [False, True])  # True: with PYTHONUNBUFFERED=1, as in Docker
def test_a_closed_console_ends_the_run_quietly(options, figures, monkeypatch, capfd, unbuffered):
    """Output that is piped into head: no traceback, and the status of a program that a closed pipe has ended."""
    read, write = os.pipe()
    os.close(read)
    raw = io.FileIO(write, "w")
    pipe = io.TextIOWrapper(raw if unbuffered else io.BufferedWriter(raw), write_through=unbuffered)
    with pipe, pytest.raises(SystemExit, match="141"):
        monkeypatch.setattr(sys, "stdout", pipe)
        message(run_here, "01_data.py", *options)
    assert capfd.readouterr().err == ""
