"""The five scripts as a student runs them: files, numbers, options, own weights, and the prompt afterwards."""
import contextlib
import copy
import io
import json
import pickle
import re
import runpy
import shutil
import signal
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import (PHOTO, ROOT, SCRIPTS, VALID, arguments, fake_results, json_of, make_dataset,
                      message, not_painted, outputs_of, run_here, save_weights, see)
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import common
import small_vgg

TIMES = ["0:19:35", "", "", "0:25:50", "0:40:51", "", "0:45:55", "0:49:50", "", "", "0:57:40", "", "1:03:39", "", ""]
ARRAYS = {
    "inputs_try": ("float32", 5, 3, 224, 224), "labels_try": ("int64", 5), "probs_try": ("float32", 5, 1000),
    "conv_feat_train": ("float32", 16, 512, 7, 7), "conv_feat_valid": ("float32", 8, 512, 7, 7),
    "labels_train": ("int64", 16), "labels_valid": ("int64", 8),
    "03_all_classes": ("int64", 8), "03_predictions": ("int64", 8), "03_all_proba": ("float64", 8, 2),
    "04_all_classes": ("int64", 8), "04_predictions": ("int64", 8), "04_all_proba": ("float64", 8, 2)}
OTHERS = {"02_zero_shot.json", "03_head.pt", "03_metrics.json", "04_head.pt", "04_metrics.json", "conv_feat_train.json",
          "conv_feat_valid.json"}


def test_the_files_are_those_of_the_contract_and_no_others(lesson):
    """A student's own code, and the next script, depend on names, shapes and types."""
    files = {path.name for path in lesson.folder.iterdir()}
    assert files == {f"{name}.npy" for name in ARRAYS} | OTHERS | lesson.figures.keys()
    arrays = {name: np.load(lesson.folder / f"{name}.npy", allow_pickle=False) for name in ARRAYS}
    assert {name: (array.dtype.name, *array.shape) for name, array in arrays.items()} == ARRAYS


def test_labels_are_those_of_the_images(lesson):
    """In all files of labels, four or eight cats come first."""
    for name, n_cats, n_dogs in [("labels_try", 4, 1), ("labels_train", 8, 8), ("labels_valid", 4, 4),
                                 ("03_all_classes", 4, 4), ("04_all_classes", 4, 4)]:
        assert np.load(lesson.folder / f"{name}.npy").tolist() == [0] * n_cats + [1] * n_dogs, name


def test_headings_are_the_lectures(lesson):
    """Each heading is a cell, and a banner with its time in the video, if it has one."""
    banners = re.findall(r"^[=-]{80}\n(.+)\n(?:  video from (\S+),)?", "".join(lesson.printed.values()), re.M)
    banners = [(heading.partition(":")[0], time) for heading, time in banners]
    assert banners == list(zip(lesson.headings, TIMES, strict=True))


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_ready_for_the_workers_of_macos_and_windows(lesson, capsys, name):
    """There, a worker is a new Python: it imports the script, whose body must not run, and is sent the dataset."""
    runpy.run_path(str(ROOT / name), run_name="__mp_main__")
    assert capsys.readouterr().out == ""
    pickle.dumps(lesson.names[name]["dsets"])


# ------------------------------------------------------------------------------------------------- what is computed
@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A dataset whose classes differ in size, with more than four validation images of each."""
    return make_dataset(tmp_path_factory.mktemp("photos"), train=(4, 5), valid=(6, 5))


def test_01_is_plain_torchvision(photos, tmp_path, figures, workers):
    """The first batches, with every option."""
    names = run_here("01_data.py", "--data-dir", photos, "--output-dir", tmp_path, "--limit", 6, "--seed", 5,
                     "--num-workers", 1)
    assert workers == [1, 1]
    torch.manual_seed(5)
    valid, _ = next(iter(DataLoader(see(photos / "valid"), batch_size=5)))
    limited = Subset(see(photos / "train"), [0, 1, 2, 4, 5, 7])  # three of four cats, three of five dogs
    train, _ = next(iter(DataLoader(limited, batch_size=64, shuffle=True)))
    assert np.array_equal(np.load(tmp_path / "inputs_try.npy"), valid)
    assert torch.equal(names["inputs"], train)


# 03 reads the images 3 times to train and once to test. 04 reads a first batch and both sets, then the features 3 times
# to train, 3 times to test after an epoch, and once to test at the end.
@pytest.mark.parametrize("name, more, n_frozen, passes_of_images, passes_of_features", [
    ("03_finetune_head.py", [], 0, 4, 0), ("04_precompute.py", ["--layer", "conv"], 31, 3, 7),
    ("04_precompute.py", ["--layer", "fc7"], 39, 3, 7)])
def test_03_and_04_are_plain_torchvision(
        vgg, photos, tmp_path, figures, workers, name, more, n_frozen, passes_of_images, passes_of_features):
    """With every option. The seed is set before the new layer and before the training."""
    run_here(name, "--data-dir", photos, "--output-dir", tmp_path, "--seed", 7, "--epochs", 3, "--lr", 0.05,
             "--batch-size", 3, "--num-workers", 1, *more)
    assert workers == [1] * passes_of_images + [0] * passes_of_features  # which are loaded without worker processes

    torch.manual_seed(7)
    last = nn.Linear(4096, 2)
    plain = nn.Sequential(*vgg.features, vgg.avgpool, nn.Flatten(), *vgg.classifier[:6], last, nn.LogSoftmax(dim=1))
    features = outputs_of(plain[:n_frozen], photos / "train")  # the images themselves, if no layer is left out
    data = TensorDataset(features, torch.tensor(see(photos / "train").targets))
    optimizer = torch.optim.SGD(last.parameters(), lr=0.05)
    torch.manual_seed(7)
    plain.train()
    for _ in range(3):
        for inputs, classes in DataLoader(data, batch_size=3, shuffle=True):
            optimizer.zero_grad()
            nn.functional.nll_loss(plain[n_frozen:](inputs), classes).backward()
            optimizer.step()

    head = torch.load(tmp_path / f"{name[:2]}_head.pt", weights_only=True)
    assert torch.allclose(head["weight"], last.weight, atol=1e-5)
    all_proba = np.load(tmp_path / f"{name[:2]}_all_proba.npy")
    assert np.allclose(all_proba, outputs_of(plain.eval(), photos / "valid").exp(), atol=1e-4)
    assert np.array_equal(np.load(tmp_path / f"{name[:2]}_predictions.npy"), all_proba.argmax(axis=1))


def test_03_counts_the_parameters_that_changed(lesson, vgg):
    """The proof that freezing works. The new layer before the training is known from the seed."""
    trained, new = lesson.names["03_finetune_head.py"]["model_vgg"].classifier[6], vgg.classifier[6]
    changed = sum(int((trained.state_dict()[key] != value).sum()) for key, value in new.state_dict().items())
    assert changed > 0
    assert (f"\nfrozen: 0 of 2,072,792 parameters changed\ntrainable: {changed:,} of 8,194 parameters changed\n"
            in lesson.printed["03_finetune_head.py"])


def test_04_tests_after_each_epoch(lesson):
    """A picture of overfitting."""
    metrics = json_of(lesson.folder / "04_metrics.json")
    for name in ["valid_loss", "valid_accuracy"]:
        assert metrics[f"{name}_per_epoch"][-1] == metrics[name]


@pytest.mark.parametrize("on_images, verdict", [
    (1110, "; this pays off after epoch 3"),  # each epoch saves 1,100 of the 2,500 seconds
    (1260, "; this pays off after epoch 2"),  # 1,250 of them: exactly half
    (10, "; this does not pay off")])
def test_04_says_when_precomputing_pays_off(lesson, tmp_path, figures, monkeypatch, capsys, on_images, verdict):
    """The point of the lecture's section, in numbers of the student's own machine."""
    shutil.copytree(lesson.folder, tmp_path, dirs_exist_ok=True)
    for name, known in [("03_metrics.json", {"seconds_per_epoch": on_images}),
                        ("conv_feat_train.json", {"images_per_second": 16 / 2500})]:
        (tmp_path / name).write_text(json.dumps({**json_of(tmp_path / name), **known}))
    epoch = {"loss": 0.5, "accuracy": 0.5, "seconds": 10, "valid_loss": 0.5, "valid_accuracy": 0.5}
    monkeypatch.setattr(common, "train_model", lambda *args, **options: [epoch])
    run_here("04_precompute.py", "--sample", "--output-dir", tmp_path)
    assert (f"\nan epoch on features: 10.000 s\nan epoch on images, in 03_finetune_head.py: {on_images}.000 s\n"
            f"computing the features of the training images, once: 2500.0 s{verdict}\n") in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------- other weights
@pytest.fixture(scope="module")
def untrained(tmp_path_factory, vgg_file):
    """What 02 to 05 give with untrained weights in bfloat16, on a device that is only asked for."""
    out, seen = tmp_path_factory.mktemp("untrained"), SimpleNamespace(printed={}, asked=[])
    seen.out, seen.photos, cpu = out, make_dataset(out / "photos", train=1, valid=1), torch.device("cpu")
    weights = ["--weights", "untrained", "--bf16"]
    training = [*weights, "--epochs", 1, "--lr", 0]  # which leaves the last layer as it is
    options = [[*weights, "--zero-shot", "--image", PHOTO], training, training, ["--image", PHOTO]]
    with pytest.MonkeyPatch.context() as patch, not_painted() as seen.figures:
        patch.setattr(common, "get_device", lambda *args: seen.asked.append(args) or cpu)
        for name, more in zip(SCRIPTS[1:], options, strict=True):
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                run_here(name, "--data-dir", seen.photos, "--output-dir", out, "--device", "mps", *more)
            seen.printed[name] = printed.getvalue()
    return seen


def test_02_to_04_are_plain_torchvision_with_other_weights_and_bf16(untrained):
    """In evaluation mode, with the softmax of 02. The new last layer was not changed."""
    model = common.to_device(common.load_vgg16("untrained"), torch.device("cpu"), bf16=True).eval()
    probs = outputs_of(model, untrained.photos / "valid").softmax(dim=1)
    assert np.allclose(np.load(untrained.out / "probs_try.npy"), probs, rtol=1e-4, atol=0)
    torch.manual_seed(0)
    proba = outputs_of(common.freeze_and_replace_head(model), untrained.photos / "valid").exp()
    for step in ["03", "04"]:
        assert np.allclose(np.load(untrained.out / f"{step}_all_proba.npy"), proba, rtol=1e-4, atol=0)


def test_the_device_and_bf16_reach_every_script(untrained):
    """05 finds out from the results that they were made in bfloat16, and asks for the device again."""
    assert untrained.asked == [("mps", True)] * 3 + [("mps", False), ("mps", True)]
    for name in ["02_zero_shot.json", "03_metrics.json", "04_metrics.json"]:
        assert json_of(untrained.out / name)["made_from"]["precision"] == "bfloat16"


def is_marked(figure):
    return any("untrained weights" in text.get_text() for text in figure.findobj(plt.Text))


def test_all_that_untrained_weights_give_is_marked(untrained):
    """Nobody may believe these numbers: every figure and the last line of every script say so."""
    for printed in untrained.printed.values():
        assert "\nNOTICE: untrained weights. VGG16 is random" in printed
        assert "\nDone (untrained weights). Next" in printed
    assert "\nsummary of script 04, untrained weights\n" in untrained.printed["05_analysis.py"]
    assert untrained.figures and all(map(is_marked, untrained.figures.values()))


def test_nothing_that_a_students_own_weights_give_is_marked(vgg_file, options, figures, capsys):
    """They were trained. 05 takes the file's name from the results."""
    run_here("03_finetune_head.py", *options, "--weights", vgg_file, "--epochs", 1)
    run_here("05_analysis.py", *options, "--image", PHOTO)
    printed = capsys.readouterr().out
    assert printed.count(f" weights={vgg_file} ") == 2 and "untrained" not in printed
    assert figures and not any(map(is_marked, figures.values()))


# ------------------------------------------------------------------------------------------------ beyond the lecture
def test_the_submission_is_what_kaggle_expects(tmp_path, vgg, figures, workers, watched):
    """Rows sorted by number, not by name; the network's probabilities of dog, clipped; any image format."""
    dataset, images = make_dataset(tmp_path / "data", train=1, valid=1), VALID[2:6]
    (dataset / "test1").mkdir()
    names = ["1.jpg", "2.JPG", "03.png", "10.jpeg", "no number.jpg", "4.txt"]
    for name, path in zip(names, [*images, PHOTO, PHOTO], strict=True):
        Image.open(path).save(dataset / "test1" / name, format="PNG")  # not compressed again
    inputs = torch.stack([common.imagenet_format(Image.open(path)) for path in images])
    with torch.inference_mode():  # a last layer so steep, around the mean of these images, that clipping has work to do
        vgg.classifier[6].weight *= 3000
        vgg.classifier[6].bias -= vgg.classifier[:7](vgg.features(inputs).flatten(1)).mean(dim=0)
        dog = vgg(inputs).exp()[:, 1].numpy()
    assert dog.min() < 0.005 and dog.max() > 0.995
    fake_results(tmp_path, dataset, [0.1, 0.9], model=vgg)
    calls = watched("support.progress")
    workers.clear()
    run_here("05_analysis.py", "--data-dir", dataset, "--output-dir", tmp_path, "--submission", "--num-workers", 1)
    header, *rows = (tmp_path / "submission.csv").read_text().splitlines()
    ids, probabilities = zip(*(row.split(",") for row in rows), strict=True)
    assert (header, ids) == ("id,label", ("1", "2", "3", "10"))
    assert np.allclose(np.array(probabilities, float), dog.clip(0.005, 0.995), atol=1e-3)
    assert workers == [1, 1, 1] and calls == [(1, 4, "images")]  # 05 first checks its last layer on validation images


def test_a_submission_needs_the_unlabeled_images(dataset, options, out, vgg, figures):
    """The sample has none."""
    fake_results(out, dataset, [0.1, 0.9, 0.1, 0.9], model=vgg)
    assert message(run_here, "05_analysis.py", *options, "--submission") == (
        f"error: {dataset / 'test1'}: contains no numbered images: omit --sample, and use Kaggle's or the "
        "lecture's files")


# ------------------------------------------------------------------------------------------------------- at the prompt
@pytest.mark.parametrize("name, typed", [  # as in the lecture's notebook
    ("01_data.py", "imshow(out, title=[dset_classes[x] for x in classes[0:n_images]]), nn, models, transforms"),
    ("02_vgg_imagenet.py", "dic_imagenet[torch.max(m_softm(model_vgg(inputs_try)), dim=1)[1][0]]"),
    ("03_finetune_head.py", """
        optimizer_vgg = torch.optim.SGD(model_vgg.classifier[6].parameters(), lr=lr)
        train_model(model_vgg, loader_train, size=dset_sizes['train'], epochs=1, optimizer=optimizer_vgg)
        predictions, all_proba, all_classes = test_model(model_vgg, loader_valid, size=dset_sizes['valid'])"""),
    ("04_precompute.py", """
        in_order = conv_feat_train
        conv_feat_train, labels_train = preconvfeat(loader_train)
        dog = [np.abs(in_order - x).max(axis=(1, 2, 3)).argmin() >= 8 for x in conv_feat_train]
        assert list(labels_train) == dog and sorted(dog) != dog and conv_feat_train.shape == (16, 512, 7, 7)
        train_model(model_vgg.classifier, loaderfeat_train, dset_sizes['train'], epochs=2, optimizer=optimizer_vgg)
        test_model(model_vgg.classifier, loaderfeat_valid, dset_sizes['valid'])"""),
    ("05_analysis.py", "DataLoader([dsets['valid'][x] for x in permutation(correct)[:n_view]]), all_proba[correct]")])
def test_what_the_lecture_types_works_after_the_script(lesson, name, typed):
    """A student types along at the prompt (python -i); preconvfeat gives a shuffled epoch there, as in the video."""
    model_vgg = copy.deepcopy(lesson.names[name].get("model_vgg"))  # other tests look at the script's own
    torch.manual_seed(0)
    exec(textwrap.dedent(typed), {**lesson.names[name], "model_vgg": model_vgg})


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot send Ctrl-C to one process")
def test_the_prompt_is_kept_after_ctrl_c(tmp_path):
    """A student at python -i stops a long training and continues by hand; typing errors there look as usual."""
    script_03 = arguments("03_finetune_head.py", ["--sample", "--output-dir", tmp_path, "--epochs", 3000])
    typed = "print('there:', len(dsets['train']), model_vgg.classifier[6].out_features)\n1 / 0\nopen('no file')\n"
    with subprocess.Popen([sys.executable, "-i", *script_03], stdin=-1, stdout=-1, stderr=-1, text=True,
                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) as process:
        next(line for line in process.stdout if line.startswith("epoch "))
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(typed, timeout=120)
    assert "there: 16 2" in stdout and "\nstopped by Ctrl-C\n" in stderr
    assert stderr.count("Traceback") == 2  # those of the typing errors


@pytest.mark.slow
def test_the_real_vgg16_has_the_lectures_numbers_of_parameters(vgg_file, tmp_path, figures, monkeypatch, capsys):
    """All other tests use a small VGG16, and its small file."""
    dataset = make_dataset(tmp_path, train=1, valid=1)
    with small_vgg.real():
        monkeypatch.setattr(common, "IMAGENET_FILE", save_weights(vgg_file.parent))  # removed with it
        run_here("03_finetune_head.py", "--data-dir", dataset, "--output-dir", tmp_path, "--epochs", 1)
    printed = capsys.readouterr().out
    assert "frozen: 134,260,544\n" in printed and " 8,194 " in printed and "4096            102,764,544\n" in printed
