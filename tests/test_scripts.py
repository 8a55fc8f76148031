"""The five scripts as a student runs them: files, numbers, options, own weights, and the prompt afterwards."""
import contextlib
import copy
import io
import itertools
import json
import re
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
from conftest import (PHOTO, SAMPLE, SCRIPTS, VALID, analyse, arguments, fake_results, json_of,
                      make_dataset, message, not_painted, outputs_of, run_here, save_weights, see)
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchvision import models

import common
import small_vgg

TIMES = ["0:19:35", "", "", "0:25:50", "0:40:51", "", "0:45:55", "0:49:50", "", "", "0:57:40", "", "1:03:39", "", ""]
ARRAYS = {
    "inputs_try": ("float32", 5, 3, 224, 224), "labels_try": ("int64", 5), "probs_try": ("float32", 5, 1000),
    "conv_feat_train": ("float32", 16, 512, 7, 7), "conv_feat_valid": ("float32", 8, 512, 7, 7),
    "labels_train": ("int64", 16), "labels_valid": ("int64", 8), "03_all_classes": ("int64", 8),
    "03_predictions": ("int64", 8), "03_all_proba": ("float64", 8, 2), "04_all_classes": ("int64", 8),
    "04_predictions": ("int64", 8), "04_all_proba": ("float64", 8, 2)}
FIGURES = {f"{name}.png" for name in [
    "01_valid_batch", "01_train_batch", "02_predictions", "02_zero_shot", "02_images", "03_blocks", "03_training",
    "03_valid_batch", "04_training", "04_valid_batch", "05_correct", "05_incorrect", "05_most_correct_cats",
    "05_most_correct_dogs", "05_most_incorrect_cats", "05_most_incorrect_dogs", "05_most_uncertain", "05_confusion",
    "05_histogram", "05_images"]}
OTHERS = {"02_zero_shot.json", "03_head.pt", "04_head.pt", "03_metrics.json", "04_metrics.json",
          "conv_feat_train.json", "conv_feat_valid.json"}


def test_the_files_are_those_of_the_contract_and_no_others(lesson):
    """A student's own code, and the next script, depend on names, shapes and types."""
    assert {path.name for path in lesson.folder.iterdir()} == {f"{name}.npy" for name in ARRAYS} | FIGURES | OTHERS
    assert not (SAMPLE / ".images-checked").exists()
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


# ------------------------------------------------------------------------------------------------- what is computed
def plain_vgg(file, seed):
    """The notebook's own network as a row of layers, from 31 in `features` to a new last layer and LogSoftmax."""
    with torch.device("meta"):  # not initialized
        vgg = models.vgg16()
    vgg.load_state_dict(torch.load(file, weights_only=True), assign=True)
    torch.manual_seed(seed)
    vgg.classifier[6] = nn.Linear(4096, 2)
    model = nn.Sequential(*vgg.features, vgg.avgpool, nn.Flatten(), *vgg.classifier, nn.LogSoftmax(dim=1))
    return model.to(memory_format=torch.channels_last).eval()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A dataset whose classes differ in size, with more than four validation images of each."""
    return make_dataset(tmp_path_factory.mktemp("photos"), train=(4, 5), valid=(6, 5))


def test_01_is_plain_torchvision(photos, tmp_path, figures, workers):
    """The first batches, to the last bit: every option is used."""
    torch.manual_seed(99)
    names = run_here("01_data.py", "--data-dir", photos, "--output-dir", tmp_path, "--limit", 6, "--seed", 5,
                     "--num-workers", 1)
    assert workers == [1, 1] and names["dset_sizes"] == {"train": 6, "valid": 11}
    torch.manual_seed(5)
    valid, _ = next(iter(DataLoader(see(photos / "valid"), batch_size=5)))
    of_limit = [0, 1, 2, 4, 5, 7]  # three of four cats, three of five dogs
    train, _ = next(iter(DataLoader(Subset(see(photos / "train"), of_limit), batch_size=64, shuffle=True)))
    assert np.array_equal(np.load(tmp_path / "inputs_try.npy"), valid) and torch.equal(names["inputs"], train)
    assert names["loader_train"].batch_size == 64


def test_02_is_plain_torchvision(lesson):
    """The original network in evaluation mode; probabilities are the softmax of its outputs."""
    names = lesson.names["02_vgg_imagenet.py"]
    outputs = outputs_of(common.load_vgg16("imagenet").eval(), SAMPLE / "valid")
    assert torch.allclose(names["outputs_try"], outputs[:5], atol=1e-4)
    probs = torch.from_numpy(np.load(lesson.folder / "probs_try.npy"))
    assert torch.allclose(probs, outputs[:5].softmax(dim=1), atol=1e-5) and torch.equal(probs, names["probs"])
    assert torch.equal(names["vals_try"], probs.amax(dim=1)) and torch.equal(names["preds_try"], probs.argmax(dim=1))


@pytest.mark.parametrize("layer, n_frozen", [(None, 0), ("conv", 31), ("fc7", 39)])
def test_03_and_04_are_plain_torchvision(vgg_file, photos, tmp_path, figures, workers, layer, n_frozen):
    """To the last bit: the seed is set before the new layer and before training; every option is used."""
    name, own = ("04_precompute.py", ["--layer", layer]) if layer else ("03_finetune_head.py", [])
    torch.manual_seed(99)
    run_here(name, "--data-dir", photos, "--output-dir", tmp_path, "--seed", 7, "--epochs", 3, "--lr", 0.05,
             "--batch-size", 3, "--num-workers", 1, *own)
    on_images, on_features = ([1] * 3, [0] * 7) if layer else ([1] * 4, [])
    assert workers == on_images + on_features  # features are loaded without worker processes

    plain, data = plain_vgg(vgg_file, 7), see(photos / "train")
    frozen, trained, last = plain[:n_frozen], plain[n_frozen:], plain[-2]
    if layer:
        features = torch.from_numpy(np.load(tmp_path / f"{layer}_feat_train.npy"))
        assert torch.allclose(features, outputs_of(frozen, photos / "train"), atol=1e-4)
        data = TensorDataset(features, torch.tensor(data.targets))
    optimizer = torch.optim.SGD(last.parameters(), lr=0.05)
    torch.manual_seed(7)
    trained.train()
    for inputs, classes in itertools.chain(*[DataLoader(data, batch_size=3, shuffle=True)] * 3):
        optimizer.zero_grad()
        nn.functional.nll_loss(trained(inputs), classes).backward()
        optimizer.step()

    head = torch.load(tmp_path / f"{name[:2]}_head.pt", weights_only=True)
    assert all(torch.equal(head[key], value) for key, value in last.state_dict().items())
    all_proba = np.load(tmp_path / f"{name[:2]}_all_proba.npy")
    assert np.allclose(all_proba, outputs_of(plain.eval(), photos / "valid").exp(), atol=1e-4)
    assert np.array_equal(np.load(tmp_path / f"{name[:2]}_predictions.npy"), all_proba.argmax(axis=1))
    assert np.load(tmp_path / f"{name[:2]}_all_classes.npy").tolist() == [0] * 6 + [1] * 5


def test_03_counts_the_parameters_that_changed(lesson, vgg_file, capsys):
    """The proof that freezing works. The new layer before the training is known from the seed."""
    names = lesson.names["03_finetune_head.py"]
    head, new = names["model_vgg"].classifier[6].state_dict(), plain_vgg(vgg_file, 0)[-2].state_dict()
    changed = sum(int((head[key] != new[key]).sum()) for key in new)
    assert changed > 0
    assert (f"\nfrozen: 0 of 2,072,792 parameters changed\ntrainable: {changed:,} of 8,194 parameters changed\n"
            in lesson.printed["03_finetune_head.py"])


def test_04_tests_after_each_epoch_without_moving_the_training(photos, tmp_path, figures, monkeypatch):
    """A picture of overfitting. The head is the same as without these tests."""
    options = ["--data-dir", photos, "--layer", "fc7", "--epochs", 3, "--lr", 0.1, "--seed", 4]
    names = run_here("04_precompute.py", *options, "--output-dir", tmp_path / "a")
    metrics = json_of(tmp_path / "a" / "04_metrics.json")
    assert metrics["valid_loss_per_epoch"][-1] == metrics["valid_loss"] != metrics["valid_loss_per_epoch"][0]
    assert metrics["valid_accuracy_per_epoch"][-1] == metrics["valid_accuracy"]
    train_model = common.train_model
    monkeypatch.setattr(common, "train_model", lambda *args, after_epoch, **more: train_model(*args, **more))
    without = run_here("04_precompute.py", *options, "--output-dir", tmp_path / "b")
    weights = [run["model_vgg"].classifier[6].weight for run in (names, without)]
    assert torch.equal(*weights)


FEATURES_S, ON_FEATURES = 2500, 10  # seconds: for the features of the training images, for an epoch on features


@pytest.mark.parametrize("on_images, end", [
    (1110, "; this pays off after epoch 3"),  # each epoch saves 1,100 of the 2,500 seconds
    (1260, "; this pays off after epoch 2"),  # 1,250 of them: exactly half
    (10, "; this does not pay off")])
def test_04_says_when_precomputing_pays_off(lesson, tmp_path, figures, monkeypatch, capsys, on_images, end):
    """The point of the lecture's section, in numbers of the student's own machine."""
    shutil.copytree(lesson.folder, tmp_path, dirs_exist_ok=True)
    for name, known in [("03_metrics.json", {"seconds_per_epoch": on_images}),
                        ("conv_feat_train.json", {"images_per_second": 16 / FEATURES_S})]:
        (tmp_path / name).write_text(json.dumps({**json_of(tmp_path / name), **known}))
    epoch = {"loss": 0.5, "accuracy": 0.5, "seconds": ON_FEATURES, "valid_loss": 0.5, "valid_accuracy": 0.5}
    monkeypatch.setattr(common, "train_model", lambda *args, **options: [epoch])
    run_here("04_precompute.py", "--sample", "--output-dir", tmp_path)
    assert (f"\nan epoch on features: 10.000 s\nan epoch on images, in 03_finetune_head.py: {on_images}.000 s\n"
            f"computing the features of the training images, once: 2500.0 s{end}\n") in capsys.readouterr().out


# ------------------------------------------------------------------------------------------ own weights, bf16, device
def run_course(out, weights, *bf16):
    """Run 02 to 05 with these weights, on a device that is only asked for. Return what was seen."""
    seen, cpu = SimpleNamespace(photos=make_dataset(out / "photos", train=1, valid=1), printed={}, asked=[]), "cpu"
    training = ["--weights", weights, *bf16, "--epochs", 1, "--lr", 0]  # which leaves the last layer as it is
    options = {"02_vgg_imagenet.py": ["--weights", weights, *bf16, "--zero-shot", "--image", PHOTO],
               "03_finetune_head.py": training, "04_precompute.py": training, "05_analysis.py": ["--image", PHOTO]}
    with pytest.MonkeyPatch.context() as patch, not_painted() as seen.figures:
        patch.setattr(common, "get_device", lambda *args: seen.asked.append(args) or torch.device(cpu))
        for name in options:
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                run_here(name, "--data-dir", seen.photos, "--output-dir", out, "--device", "mps", *options[name])
            seen.printed[name] = printed.getvalue()
            assert not plt.get_fignums()  # figures are closed
    return seen


@pytest.fixture(scope="module")
def own(tmp_path_factory, vgg_file):
    """The course with a file of weights, in bfloat16."""
    out = tmp_path_factory.mktemp("own")
    torch.manual_seed(5)
    torch.save(models.vgg16().state_dict(), out / "own.pth")
    return out, run_course(out, out / "own.pth", "--bf16")


@pytest.fixture(scope="module")
def untrained(tmp_path_factory, vgg_file):
    """The course with untrained weights."""
    out = tmp_path_factory.mktemp("untrained")
    return out, run_course(out, "untrained")


def assert_network(out, photos, weights, bf16):
    """The results in the folder are those of this network."""
    model = common.to_device(common.load_vgg16(weights), torch.device("cpu"), bf16).eval()
    assert np.allclose(np.load(out / "probs_try.npy"), outputs_of(model, photos / "valid").softmax(dim=1), atol=2e-3)
    torch.manual_seed(0)
    proba = outputs_of(common.freeze_and_replace_head(model), photos / "valid").exp()
    for step in ["03", "04"]:
        assert np.allclose(np.load(out / f"{step}_all_proba.npy"), proba, atol=2e-3)


def test_own_weights_in_bfloat16_reach_the_network(own):
    """And the record of 03 and 04 says so."""
    out, seen = own
    assert_network(out, seen.photos, str(out / "own.pth"), bf16=True)
    records = [json_of(out / f"{step}_metrics.json")["made_from"] for step in ["03", "04"]]
    assert records[0] == records[1] and records[0]["precision"] == "bfloat16"


def test_untrained_weights_reach_the_network(untrained):
    """They are the same in every script."""
    out, seen = untrained
    assert_network(out, seen.photos, "untrained", bf16=False)


def test_the_device_is_asked_for_with_bf16(own, untrained):
    """05 finds out from the results that they were made in bfloat16, and asks again."""
    assert own[1].asked == [("mps", True)] * 3 + [("mps", False), ("mps", True)]
    assert untrained[1].asked == [("mps", False)] * 5


def test_05_takes_weights_and_precision_from_the_results(own):
    """The head fits only the network with which it was trained."""
    out, seen = own
    line, = re.findall("^options: .*$", seen.printed["05_analysis.py"], re.M)
    assert f" weights={out / 'own.pth'} " in line and " bf16=True " in line


def test_all_that_untrained_weights_give_is_marked(untrained):
    """Nobody may believe these numbers: every figure and the last line of every script say so."""
    _, seen = untrained
    for name in SCRIPTS[1:]:
        assert "\nNOTICE: untrained weights. VGG16 is random" in seen.printed[name]
        assert "\nDone (untrained weights). Next" in seen.printed[name]
    assert "\nsummary of script 04, untrained weights\n" in seen.printed["05_analysis.py"]
    for name, figure in seen.figures.items():
        assert any("untrained weights" in text.get_text() for text in figure.findobj(plt.Text)), name


def test_nothing_that_a_students_own_weights_give_is_marked(own):
    """They were trained."""
    _, seen = own
    assert "untrained" not in "".join(seen.printed.values())
    assert "\nsummary of script 04\n" in seen.printed["05_analysis.py"]
    assert seen.figures.keys() == {name for name in FIGURES if not name.startswith("01")}
    for name, figure in seen.figures.items():
        assert not any("untrained" in text.get_text() for text in figure.findobj(plt.Text)), name


def test_02_saves_what_zero_shot_gave(own):
    """05 compares with it."""
    out, seen = own
    zero_shot = json_of(out / "02_zero_shot.json")
    record = json_of(out / "03_metrics.json")["made_from"]
    assert list(zero_shot) == ["options", "pretrained", "made_from", "valid_accuracy", "confusion", "outside"]
    assert zero_shot["options"]["weights"] == str(out / "own.pth") and zero_shot["pretrained"] is True
    assert all(zero_shot["made_from"][name] == record[name] for name in record if name != "network")
    assert f"zero-shot accuracy      {zero_shot['valid_accuracy']:.4f}  " in seen.printed["05_analysis.py"]


# ------------------------------------------------------------------------------------------------ beyond the lecture
def test_the_submission_is_what_kaggle_expects(tmp_path, vgg, figures, workers, capsys, watched):
    """Rows sorted by number, not by name; probabilities of dog, clipped, and those of the network; any image format."""
    dataset, images = make_dataset(tmp_path / "data", train=1, valid=1), VALID[:6]
    (dataset / "test1").mkdir()
    names = ["1.jpg", "2.JPG", "03.png", "10.jpeg", "11.jpg", f"{10**19}.jpg", "no number.jpg", "4.txt"]
    for name, path in zip(names, [*images, PHOTO, PHOTO], strict=True):
        Image.open(path).save(dataset / "test1" / name, format="PNG")  # not compressed again
    inputs = torch.stack([common.imagenet_format(Image.open(path)) for path in images])
    with torch.inference_mode():  # a last layer so steep, around the mean of these images, that clipping has work to do
        vgg.classifier[6].weight *= 3000
        vgg.classifier[6].bias -= vgg.classifier[:7](vgg.features(inputs).flatten(1)).mean(dim=0)
        direct = vgg(inputs).exp()[:, 1].numpy()
    fake_results(tmp_path, dataset, [0.1, 0.9], model=vgg)
    calls = watched("support.progress")
    analyse(dataset, tmp_path, "--submission", "--num-workers", 1)
    header, *rows = (tmp_path / "submission.csv").read_text().splitlines()
    assert header == "id,label" and [row.split(",")[0] for row in rows] == ["1", "2", "3", "10", "11", str(10**19)]
    assert np.allclose([float(row.split(",")[1]) for row in rows], direct.clip(0.005, 0.995), atol=1e-3)
    assert direct.max() > 0.995 and direct.min() < 0.005
    assert workers == [1] and calls == [(1, 6, "images")]
    assert "\nKaggle submission for 6 images of test1 (Kaggle expects 12,500)\n" in capsys.readouterr().out


def test_a_submission_needs_the_unlabeled_images(dataset, tmp_path, vgg, figures):
    """The sample has none."""
    fake_results(tmp_path, dataset, [0.1, 0.9, 0.1, 0.9], model=vgg)
    assert message(analyse, dataset, tmp_path, "--submission") == (
        f"error: {dataset / 'test1'}: contains no numbered images: omit --sample, and use Kaggle's or the "
        "lecture's files")


# ------------------------------------------------------------------------------------------------------- at the prompt
@pytest.mark.parametrize("name, typed", [  # as in the lecture's notebook
    ("01_data.py", """
        imshow(out, title=[dset_classes[x] for x in classes[0:n_images]])
        nn, models, transforms, inputs_try"""),
    ("02_vgg_imagenet.py", """
        vals_try, preds_try = torch.max(m_softm(model_vgg(inputs_try)), dim=1)
        dic_imagenet[preds_try[0]]"""),
    ("03_finetune_head.py", """
        optimizer_vgg = torch.optim.SGD(model_vgg.classifier[6].parameters(), lr=lr)
        train_model(model_vgg, loader_train, size=dset_sizes['train'], epochs=1, optimizer=optimizer_vgg)
        predictions, all_proba, all_classes = test_model(model_vgg, loader_valid, size=dset_sizes['valid'])
        assert predictions.shape == (8,) and list(all_classes) == [0] * 4 + [1] * 4"""),
    ("04_precompute.py", """
        in_order = conv_feat_train
        conv_feat_train, labels_train = preconvfeat(loader_train)
        dog = [np.abs(in_order - x).max(axis=(1, 2, 3)).argmin() >= 8 for x in conv_feat_train]
        assert list(labels_train) == dog and sorted(dog) != dog and conv_feat_train.shape == (16, 512, 7, 7)
        train_model(model_vgg.classifier, loaderfeat_train, dset_sizes['train'], epochs=2, optimizer=optimizer_vgg)
        test_model(model_vgg.classifier, loaderfeat_valid, dset_sizes['valid'])"""),
    ("05_analysis.py", """
        DataLoader([dsets['valid'][x] for x in permutation(correct)[:n_view]])
        all_proba[correct_dogs, 0]""")])
def test_what_the_lecture_types_works_after_the_script(lesson, name, typed):
    """A student types along at the prompt (python -i); preconvfeat gives a shuffled epoch there, as in the video."""
    names = dict(lesson.names[name])
    with torch.random.fork_rng():
        if "model_vgg" in names:
            names["model_vgg"] = copy.deepcopy(names["model_vgg"])  # other tests look at the script's own
        torch.manual_seed(0)
        exec(textwrap.dedent(typed), names)


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
    assert "there: 16 2" in stdout and stderr.count("Traceback") == 2 and process.returncode == 0
    assert "\nstopped by Ctrl-C\n" in stderr and "ZeroDivisionError" in stderr and "FileNotFoundError" in stderr


@pytest.mark.slow
def test_03_with_the_real_vgg16_gives_the_numbers_of_the_lecture(vgg_file, tmp_path, figures, monkeypatch, capsys):
    """All other tests use a small VGG16, and its small file."""
    dataset = make_dataset(tmp_path, train=1, valid=1)
    with small_vgg.real():
        monkeypatch.setattr(common, "IMAGENET_FILE", save_weights(vgg_file.parent))  # removed with it
        run_here("03_finetune_head.py", "--data-dir", dataset, "--output-dir", tmp_path, "--epochs", 1)
    printed = capsys.readouterr().out
    assert "frozen: 134,260,544\n" in printed and " 8,194 " in printed and "4096            102,764,544\n" in printed
    assert np.load(tmp_path / "03_all_proba.npy").sum(axis=1) == pytest.approx([1, 1])
