"""Beyond the lecture: Kaggle's own files, one's own photos, the views, the submission."""
import contextlib
import os
import re
import shutil

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import ROOT, make_dataset, message, run_here, script
from PIL import Image
from test_faults import analyse, fake_results

import common

data, analysis = script("01_data"), script("05_analysis")


# ------------------------------------------------------------------------------------------------------ Kaggle's files
def make_kaggle(folder, cats, dogs, tests=(), test="test1"):
    """What Kaggle gives, unzipped: train/cat.N.jpg, train/dog.N.jpg, test1/N.jpg; each file holds its own name."""
    (folder / "train").mkdir(parents=True)
    (folder / test).mkdir()
    for name, ids in (("train/cat.", cats), ("train/dog.", dogs), (f"{test}/", tests)):
        for i in ids:
            (folder / f"{name}{i}.jpg").write_text(f"{name}{i}.jpg")
    return folder


def ids(folder):
    return sorted(int(path.stem.split(".")[-1]) for path in folder.iterdir())


def test_kaggle_whole(tmp_path):
    kaggle = make_kaggle(tmp_path / "kaggle", range(12_500), range(12_500), range(1, 12_501))
    before = sorted(os.listdir(kaggle / "train"))
    data.get_dataset(tmp_path / "dogscats", kaggle)
    for name, count in data.COUNTS.items():
        assert len(os.listdir(tmp_path / "dogscats" / name)) == count
    for animal in ("cats", "dogs"):
        assert ids(tmp_path / "dogscats" / "valid" / animal) == list(range(11_500, 12_500))
        assert ids(tmp_path / "dogscats" / "sample" / "valid" / animal) == list(range(11_500, 11_504))
    assert sorted(os.listdir(kaggle / "train")) == before
    moved = tmp_path / "dogscats" / "valid" / "dogs" / "dog.12499.jpg"
    assert moved.read_text() == "train/dog.12499.jpg" and os.path.samefile(moved, kaggle / "train" / "dog.12499.jpg")


def test_kaggle_partial_with_gaps(tmp_path):
    """The last 8 % by number, not by name: 9 comes before 10."""
    kaggle = make_kaggle(tmp_path / "kaggle", [*range(0, 60, 2), 1000], [3, 9, 10], [7, 70], test="test")
    data.get_dataset(tmp_path / "dogscats", kaggle)
    found = {name: ids(tmp_path / "dogscats" / name) for name in data.COUNTS}
    assert found["valid/cats"] == [58, 1000] and len(found["train/cats"]) == 29
    assert found["valid/dogs"] == [10] and found["train/dogs"] == [3, 9]
    assert found["sample/train/cats"] == list(range(0, 16, 2)) and found["sample/train/dogs"] == [3, 9]
    assert found["test1"] == [7, 70]


def test_kaggle_on_another_file_system(tmp_path, monkeypatch):
    def link(*args):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", link)
    kaggle = make_kaggle(tmp_path / "kaggle", range(4), range(4))
    data.get_dataset(tmp_path / "dogscats", kaggle)
    copy = tmp_path / "dogscats" / "train" / "cats" / "cat.0.jpg"
    assert copy.read_text() == "train/cat.0.jpg" and not os.path.samefile(copy, kaggle / "train" / "cat.0.jpg")


def test_kaggle_never_mixes_with_a_dataset(tmp_path):
    kaggle = make_kaggle(tmp_path / "kaggle", range(4), range(4))
    there = make_dataset(tmp_path / "dogscats", train=1, valid=1)
    with pytest.raises(common.UserError, match="is not empty"):
        data.get_dataset(there, kaggle)
    shutil.rmtree(there)
    there.mkdir()  # empty is fine
    data.get_dataset(there, kaggle)
    common.check_dataset(there)


@pytest.mark.parametrize("cats, dogs", [((), ()), (range(5), ()), (range(5), [1])])
def test_kaggle_needs_two_of_each(tmp_path, cats, dogs):
    kaggle = make_kaggle(tmp_path / "kaggle", cats, dogs)
    with pytest.raises(common.UserError, match="two of each class"):
        data.get_dataset(tmp_path / "dogscats", kaggle)
    assert not (tmp_path / "dogscats").exists()


def test_kaggle_through_the_script(tmp_path, capsys):
    kaggle = tmp_path / "kaggle"
    (kaggle / "train").mkdir(parents=True)
    for path in (ROOT / "sample").rglob("*.jpg"):
        shutil.copy(path, kaggle / "train")
    options = ["--data-dir", tmp_path / "dogscats", "--output-dir", tmp_path / "out", "--from-kaggle", kaggle]
    run_here("01_data.py", *options)
    printed = capsys.readouterr().out
    assert "dset_sizes: {'train': 22, 'valid': 2}" in printed and re.search(r"test1 +0 images", printed)
    with pytest.raises(common.UserError, match="is not empty"):
        run_here("01_data.py", *options)
    with pytest.raises(SystemExit):
        run_here("01_data.py", "--sample", *options)


# -------------------------------------------------------------------------------------------------------- own photos
@pytest.mark.parametrize("name", ["02_vgg_imagenet.py", "05_analysis.py"])
def test_photos_are_turned_upright(torch_home, outputs, tmp_path, monkeypatch, name):
    """A picture that the camera stored turned or mirrored, in all eight ways, looks the same as the upright one."""
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)).resize((300, 200))
    turn = Image.Transpose  # from upright to how it is stored
    stored = {1: None, 2: turn.FLIP_LEFT_RIGHT, 3: turn.ROTATE_180, 4: turn.FLIP_TOP_BOTTOM, 5: turn.TRANSPOSE,
              6: turn.ROTATE_90, 7: turn.TRANSVERSE, 8: turn.ROTATE_270}
    paths = [tmp_path / f"{orientation}.jpg" for orientation in stored]
    for path, (orientation, turned) in zip(paths, stored.items(), strict=True):
        exif = Image.Exif()
        exif[0x0112] = orientation
        (upright.transpose(turned) if turned is not None else upright).save(path, exif=exif, quality=95)
    assert common.load_image(tmp_path / "6.jpg").size == (200, 300)  # in the dataset they stay as they are

    seen, shown, transforms = [], [], common.IMAGENET.transforms()
    monkeypatch.setattr(common.IMAGENET.value, "transforms", lambda: lambda photo: seen.append(photo.copy()) or transforms(photo))
    monkeypatch.setattr(plt, "imshow", lambda image, **_: shown.append(image))
    run_here(name, "--sample", "--output-dir", shutil.copytree(outputs[0], tmp_path / "out"), "--image", *paths)
    assert len(seen) == 8
    for photo in seen + shown[-8:]:
        assert photo.size == upright.size
        assert np.abs(np.asarray(photo, dtype=float) - np.asarray(upright, dtype=float)).mean() < 4


def test_photos_of_ones_own(outputs, vgg, vgg_file):
    """The names and probabilities that are printed are those of the weights' own transforms."""
    folder, printed = outputs
    photo = Image.open(ROOT / "sample" / "valid" / "dogs" / "dog.8.jpg")
    inputs = common.IMAGENET.transforms()(photo)[None]
    vgg.classifier[6].load_state_dict(torch.load(folder / "04_head.pt", weights_only=True))
    whole = common.load_vgg16("imagenet").eval()
    with torch.inference_mode():
        vals, preds = torch.softmax(whole(inputs), dim=1)[0].topk(1)
        proba = vgg(inputs).exp()[0]
    assert f"dog.8.jpg: {common.IMAGENET.meta['categories'][preds[0]]} {vals[0]:.3f}, " in printed["02_vgg_imagenet.py"]
    answer = f"dog.8.jpg: {['cat', 'dog'][proba.argmax()]}, probability {proba.max():.4f}"
    assert answer in printed["05_analysis.py"]


def test_a_photo_that_is_no_image(dataset, tmp_path):
    (tmp_path / "notes.jpg").write_text("no image")
    good = ROOT / "sample" / "valid" / "dogs" / "dog.8.jpg"
    for name in ("notes.jpg", "none.jpg"):
        text = message("02_vgg_imagenet.py", "--sample", "--image", good, tmp_path / name)
        assert f"{name}: can't be read as a picture" in text


def test_a_photo_with_damaged_exif_data(tmp_path):
    Image.new("RGB", (300, 200)).save(tmp_path / "exif.jpg", exif=b"Exif\0\0damaged")
    with contextlib.suppress(common.UserError):  # newer versions of Pillow raise SyntaxError, older ones overlook it
        assert common.load_image(tmp_path / "exif.jpg", upright=True).size == (300, 200)


# ------------------------------------------------------------------------------------------------------------- views
@pytest.fixture
def shown(monkeypatch):
    """What is drawn: {heading: file names in their order}."""
    shown, show_images = {}, common.show_images

    def spy(images, titles, heading):
        shown[heading.partition(" (step")[0]] = [title.splitlines()[-1] for title in titles]
        show_images(images, titles, heading)

    monkeypatch.setattr(common, "show_images", spy)
    return shown


def test_views_with_a_known_answer(tmp_path, shown):
    dataset = make_dataset(tmp_path / "data", train=1, valid=4)
    #           cat.0 cat.1 cat.2 cat.3 dog.0 dog.1 dog.2 dog.3
    proba_dog = [0.30, 0.10, 0.90, 0.60, 0.95, 0.20, 0.55, 0.44]
    fake_results(tmp_path / "out", dataset, proba_dog)
    analyse(dataset, tmp_path / "out", "--n-view", "2")
    assert shown["Most correct cats"] == ["cat.1.jpg", "cat.0.jpg"]
    assert shown["Most correct dogs"] == ["dog.0.jpg", "dog.2.jpg"]
    assert shown["Most incorrect cats: predicted cats, in truth dogs"] == ["dog.1.jpg", "dog.3.jpg"]
    assert shown["Most incorrect dogs: predicted dogs, in truth cats"] == ["cat.2.jpg", "cat.3.jpg"]
    assert shown["Most uncertain"] == ["dog.2.jpg", "dog.3.jpg"]
    assert set(shown["Correct, at random"]) < {"cat.0.jpg", "cat.1.jpg", "dog.0.jpg", "dog.2.jpg"}
    assert len(shown["Incorrect, at random"]) == 2


def test_ties_keep_the_order_of_the_dataset(tmp_path, shown):
    dataset = make_dataset(tmp_path / "data", train=1, valid=3)
    fake_results(tmp_path / "out", dataset, [0.25] * 3 + [0.75] * 3)
    analyse(dataset, tmp_path / "out")
    assert shown["Most uncertain"] == [f"cat.{i}.jpg" for i in range(3)] + [f"dog.{i}.jpg" for i in range(3)]
    assert shown["Most correct cats"] == [f"cat.{i}.jpg" for i in range(3)]
    assert shown["Incorrect, at random"] == []


def test_which_step(dataset, tmp_path, capsys):
    """04 where it has run, else 03, else what --step says; and the numbers of the summary against numpy."""
    fake_results(tmp_path, dataset, [0.1, 0.2, 0.7, 0.4], step="03")
    analyse(dataset, tmp_path)
    assert "predictions of step 03" in capsys.readouterr().out
    fake_results(tmp_path, dataset, [0.1, 0.2, 0.7, 0.004], pretrained=False)
    analyse(dataset, tmp_path)
    printed = capsys.readouterr().out
    assert "predictions of step 04" in printed and "summary of step 04, untrained weights" in printed
    true = np.array([0.9, 0.8, 0.7, 0.004])
    assert f"log loss             {-np.log(true).mean():.4f}" in printed
    assert f"log loss, clipped    {-np.log(true.clip(0.005, 0.995)).mean():.4f}" in printed
    assert "dogs taken for cats  1 of 2" in printed and "accuracy             0.7500" in printed
    analyse(dataset, tmp_path, "--step", "03")
    assert "predictions of step 03" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------------- submission
def test_log_loss_is_the_closed_formula():
    p = np.array([0.9, 0.6, 0.01])
    assert analysis.log_loss(p) == pytest.approx(-(np.log(0.9) + np.log(0.6) + np.log(0.01)) / 3)
    assert analysis.log_loss(np.float32([0, 1])) == np.inf


def test_submission(torch_home, tmp_path, vgg, capsys):
    """Rows sorted by number, probabilities of dog within the bounds, the same as the network gives directly."""
    dataset = make_dataset(tmp_path / "data", train=1, valid=1)
    (dataset / "test1").mkdir()
    pictures = sorted((ROOT / "sample").rglob("*.jpg"))
    numbers = [1, 2, 3, 10, 11, 20]
    for number, path in zip(numbers, pictures, strict=False):
        shutil.copy(path, dataset / "test1" / f"{number}.jpg")
    fake_results(tmp_path / "out", dataset, [0.1, 0.9], weights_sha256=common.weights_hash(common.load_vgg16("imagenet")))
    vgg.classifier[6].weight.data *= 3000  # sure of itself, so that the clipping has work to do
    common.save(tmp_path / "out", {"04_head.pt": vgg.classifier[6].state_dict()})
    analyse(dataset, tmp_path / "out", "--submission")
    assert "Kaggle expects 12,500 rows, these are 6" in capsys.readouterr().out

    header, *rows = (tmp_path / "out" / "submission.csv").read_text().splitlines()
    assert header == "id,label" and [int(row.split(",")[0]) for row in rows] == numbers
    labels = np.array([float(row.split(",")[1]) for row in rows])
    inputs = torch.stack([common.imagenet_format(common.load_image(path)) for path in pictures[:6]])
    with torch.inference_mode():
        direct = vgg(inputs).exp()[:, 1].numpy()
    assert np.allclose(labels, direct.clip(0.005, 0.995), atol=1e-3)
    assert (direct > 0.995).any() or (direct < 0.005).any()


def test_submission_without_what_it_needs(torch_home, dataset, tmp_path):
    (dataset / "test1").mkdir()
    fake_results(tmp_path, dataset, [0.1, 0.2, 0.7, 0.4])
    with pytest.raises(common.UserError, match=r"test1: no images there; run python 01_data.py"):
        analyse(dataset, tmp_path, "--submission")
    (dataset / "test1" / "one.jpg").write_text("")
    with pytest.raises(common.UserError, match=r"one.jpg: its name is no number"):
        analyse(dataset, tmp_path, "--submission")
    (dataset / "test1" / "one.jpg").rename(dataset / "test1" / "1.jpg")
    with pytest.raises(common.UserError, match=r"04_head.pt was trained on other weights \(imagenet\)"):
        analyse(dataset, tmp_path, "--submission")
