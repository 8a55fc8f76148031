"""Beyond the lecture: Kaggle's own files, zero-shot, one's own photos, the submission; and what 05 draws and prints."""
import errno
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, make_dataset, message, run_here, script
from PIL import Image
from test_faults import analyse, fake_results, json_of
from torch.utils.data import DataLoader
from torchvision import datasets

import common

data, vgg_imagenet = script("01_data"), script("02_vgg_imagenet")


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
    """Of all 12,500 of a class the last 1,000; here of every hundredth."""
    kaggle = make_kaggle(tmp_path / "kaggle", range(125), range(125), range(1, 126))
    data.get_dataset(tmp_path / "dogscats", kaggle)
    for name in ("train/cats", "train/dogs", "valid/cats", "valid/dogs", "test1"):
        assert len(os.listdir(tmp_path / "dogscats" / name)) == data.COUNTS[name] // 100
    for animal in ("cats", "dogs"):
        assert ids(tmp_path / "dogscats" / "valid" / animal) == list(range(115, 125))
        assert ids(tmp_path / "dogscats" / "sample" / "valid" / animal) == list(range(115, 119))
        assert len(os.listdir(tmp_path / "dogscats" / "sample" / "train" / animal)) == 8
    moved = tmp_path / "dogscats" / "valid" / "dogs" / "dog.124.jpg"
    assert moved.read_text() == "train/dog.124.jpg" and os.path.samefile(moved, kaggle / "train" / "dog.124.jpg")
    assert len(os.listdir(kaggle / "train")) == 250


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
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", link)
    kaggle = make_kaggle(tmp_path / "kaggle", range(4), range(4))
    data.get_dataset(tmp_path / "dogscats", kaggle)
    copy = tmp_path / "dogscats" / "train" / "cats" / "cat.0.jpg"
    assert copy.read_text() == "train/cat.0.jpg" and not os.path.samefile(copy, kaggle / "train" / "cat.0.jpg")


@pytest.mark.parametrize("cats, dogs", [((), ()), (range(5), ()), (range(5), [1])])
def test_kaggle_needs_two_of_each(tmp_path, cats, dogs):
    kaggle = make_kaggle(tmp_path / "kaggle", cats, dogs)
    with pytest.raises(common.UserError, match="two of each class"):
        data.get_dataset(tmp_path / "dogscats", kaggle)
    assert [path.name for path in tmp_path.iterdir()] == ["kaggle"]


def test_kaggle_through_the_script(tmp_path):
    """Into an empty folder, and never into one that holds something."""
    kaggle = make_kaggle(tmp_path / "kaggle", (), ())
    for path in (ROOT / "sample").rglob("*.jpg"):
        shutil.copy(path, kaggle / "train")
    (tmp_path / "dogscats").mkdir()
    options = ["--data-dir", tmp_path / "dogscats", "--output-dir", tmp_path / "out", "--from-kaggle", kaggle]
    assert run_here("01_data.py", *options)["dset_sizes"] == {"train": 22, "valid": 2}
    assert "is not empty, and the two must not mix" in message("01_data.py", *options)
    with pytest.raises(SystemExit):
        run_here("01_data.py", "--sample", *options)


# ------------------------------------------------------------------------------------------------- what a figure shows
@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved, {file name: Figure}, to look at what was drawn; the files are not written."""
    figures = {}

    def save(folder, files):
        figures.update({name: content for name, content in files.items() if name.endswith(".png")})
        others = {name: content for name, content in files.items() if not name.endswith(".png")}
        if others:
            write(folder, others)

    write = common.save
    monkeypatch.setattr(common, "save", save)
    return figures


def drawn(figure):
    """For each picture of a figure: its pixels, its title line by line, and the title's colour."""
    return [(np.asarray(axes.get_images()[0].get_array()), axes.get_title().splitlines(), axes.title.get_color())
            for axes in figure.axes if axes.get_images()]


def assert_shows(figure, dataset, names, proba_dog=None):
    """These images of valid/ in this order, each whole, under its own name and class, red where the prediction is wrong."""
    shown = drawn(figure)
    assert [title[-1] for _, title, _ in shown] == names
    for pixels, (true, predicted, name), colour in shown:
        animal = name.split(".")[0]
        assert np.array_equal(pixels, np.asarray(Image.open(dataset / "valid" / f"{animal}s" / name)))
        assert true == f"true: {animal}" and (colour == "red") == (animal not in predicted)
        if proba_dog is not None:
            p = dict(zip(sorted(path.name for path in dataset.glob("valid/*/*")), proba_dog, strict=True))[name]
            assert predicted == f"predicted: {'dog' if p > 0.5 else 'cat'}, {max(p, 1 - p):.3f}"


def make_sure(vgg, inputs, factor):
    """Steepen the last layer, around the mean of these inputs: some become cats, some dogs."""
    with torch.no_grad():
        vgg.classifier[6].weight *= factor
        vgg.classifier[6].bias -= vgg.classifier[:7](vgg.features(inputs).flatten(1)).mean(dim=0)


# ---------------------------------------------------------------------------------------------------------- zero-shot
def test_zero_shot_against_numpy(tmp_path, vgg, figures):
    """Hand-made outputs: mass on the first and last of the cats and dogs, and on their neighbours, which are neither. The
    worst is not where the wrong sum is largest, but where it is most above the true one: cat.1 before cat.2."""
    dataset = make_dataset(tmp_path / "data", train=1, valid=4)
    sums = np.array([[.6, .1], [.05, .45], [.44, .52], [.5, .2], [.8, .1], [.1, .6], [.0, .9], [.1, .3]])  # cats, dogs
    probs = np.full((8, 1000), 1e-12)
    for i, (cat, dog) in enumerate(sums):
        probs[i, [281, 285]], probs[i, [151, 268]] = cat / 2, dog / 2
        probs[i, [150, 269, 280, 286]] = (1 - cat - dog) / 4
    outputs = iter(torch.tensor(np.log(probs + 1e-12), dtype=torch.float32).split(5))
    vgg.forward = lambda inputs: next(outputs)
    args = common.argparse.Namespace(output_dir=tmp_path, show=False, weights="imagenet")
    dset = datasets.ImageFolder(dataset / "valid", common.imagenet_format)
    record = {"valid images": "as they are"}
    vgg_imagenet.zero_shot(args, vgg, torch.device("cpu"), DataLoader(dset, batch_size=5), record, "")

    result = json_of(tmp_path / "02_zero_shot.json")
    assert result["valid_accuracy"] == 5 / 8 and result["confusion"] == [[2, 2], [1, 3]]
    assert result["outside"] == pytest.approx(1 - sums.sum(axis=1).mean(), abs=1e-5)
    assert result["made_from"] == common.made_from(record, vgg)
    assert_shows(figures["02_zero_shot.png"], dataset, ["dog.0.jpg", "cat.1.jpg", "cat.2.jpg"])
    assert [title[1] for _, title, _ in drawn(figures["02_zero_shot.png"])] == [
        "predicted: cat, 0.800", "predicted: dog, 0.450", "predicted: dog, 0.520"]


# -------------------------------------------------------------------------------------------------------- own photos
def bars(axes):
    """{name: length} of horizontal bars, from the top down."""
    names = {place: label.get_text() for place, label in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)}
    places = {bar.get_y() + bar.get_height() / 2: bar.get_width() for bar in axes.patches}
    return {names[place]: places[place] for place in sorted(places, reverse=True)}


@pytest.mark.parametrize("name, step", [("02_vgg_imagenet.py", "02"), ("05_analysis.py", "05")])
def test_photos_of_ones_own(torch_home, vgg, tmp_path, figures, name, step):
    """Beside each photo the bars that the weights' own transforms and the network give for it, the likeliest on top."""
    dataset = make_dataset(tmp_path / "data", train=2, valid=1)
    photos = [dataset / "train" / "cats" / "cat.0.jpg", dataset / "train" / "dogs" / "dog.1.jpg"]
    transform = common.IMAGENET.transforms()
    make_sure(vgg, torch.stack([transform(Image.open(path)) for path in photos]), 10)
    fake_results(tmp_path / "out", dataset, [0.1, 0.9], model=vgg)
    run_here(name, "--data-dir", dataset, "--output-dir", tmp_path / "out", "--image", *photos)
    whole, (left, right) = common.load_vgg16("imagenet").eval(), (figures[f"{step}_images.png"].axes[i::2] for i in (0, 1))
    answers = []
    for path, picture, beside in zip(photos, left, right, strict=True):
        inputs = transform(Image.open(path))[None]
        with torch.inference_mode():
            vals, preds = torch.softmax(whole(inputs), dim=1)[0].topk(5)
            proba = vgg(inputs)[0].exp().tolist()
        categories = [common.IMAGENET.meta["categories"][i] for i in preds]
        expected = dict(zip(*((categories, vals.tolist()) if step == "02" else (["cats", "dogs"], proba)), strict=True))
        answers.append(bars(beside))
        assert list(answers[-1]) == list(expected) and answers[-1] == pytest.approx(expected, abs=1e-4)
        assert picture.get_title() == path.name
        assert np.array_equal(picture.get_images()[0].get_array(), np.asarray(Image.open(path)))
    assert answers[0] != pytest.approx(answers[1], abs=1e-3)


def test_photos_are_turned_upright(tmp_path, figures):
    """What the camera stored turned or mirrored, in all eight ways, is seen and shown like the upright one."""
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)).resize((300, 200))
    turn = Image.Transpose  # from upright to how it is stored
    stored = {1: None, 2: turn.FLIP_LEFT_RIGHT, 3: turn.ROTATE_180, 4: turn.FLIP_TOP_BOTTOM, 5: turn.TRANSPOSE,
              6: turn.ROTATE_90, 7: turn.TRANSVERSE, 8: turn.ROTATE_270}
    for orientation, turned in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        (upright if turned is None else upright.transpose(turned)).save(tmp_path / f"{orientation}.jpg", exif=exif, quality=95)
    assert common.load_image(tmp_path / "6.jpg").size == (200, 300)  # in the dataset they stay as they are
    seen = []
    common.show_photos(sorted(tmp_path.glob("*.jpg")), lambda inputs: (seen.append(inputs), (["a"], [1.0]))[1], "photos")
    common.save_figure(tmp_path / "photos.png")
    shown = drawn(figures["photos.png"])
    assert len(seen) == len(shown) == 8
    for inputs, (pixels, _, _) in zip(seen, shown, strict=True):
        assert np.abs(pixels.astype(float) - np.asarray(upright, dtype=float)).mean() < 4
        assert (inputs - common.IMAGENET.transforms()(upright)[None]).abs().mean() < 0.1


def test_a_photo_that_is_no_image(tmp_path):
    (tmp_path / "notes.jpg").write_text("no image")
    for name in ("notes.jpg", "none.jpg"):
        text = message("02_vgg_imagenet.py", "--sample", "--output-dir", tmp_path, "--image",
                       ROOT / "sample" / "valid" / "dogs" / "dog.8.jpg", tmp_path / name)
        assert f"error: {tmp_path / name}: can't be read as a picture" in text


# ------------------------------------------------------------------------------------------------------------ 05's views
def test_views_with_a_known_answer(tmp_path, figures):
    dataset, proba_dog = make_dataset(tmp_path / "data", train=1, valid=4), [.30, .10, .90, .60, .95, .20, .55, .44]
    fake_results(tmp_path / "out", dataset, proba_dog)  # of cat.0 to cat.3, dog.0 to dog.3
    analyse(dataset, tmp_path / "out", "--n-view", 2, "--seed", 1)
    for view, names in {"most_correct_cats": ["cat.1.jpg", "cat.0.jpg"], "most_correct_dogs": ["dog.0.jpg", "dog.2.jpg"],
                        "most_incorrect_cats": ["dog.1.jpg", "dog.3.jpg"], "most_incorrect_dogs": ["cat.2.jpg", "cat.3.jpg"],
                        "most_uncertain": ["dog.2.jpg", "dog.3.jpg"]}.items():
        assert_shows(figures[f"05_{view}.png"], dataset, names, proba_dog)
        assert view.replace("_", " ") in figures[f"05_{view}.png"].get_suptitle().lower()
    for view, right in (("correct", True), ("incorrect", False)):
        shown = [title[-1] for _, title, _ in drawn(figures[f"05_{view}.png"])]
        assert_shows(figures[f"05_{view}.png"], dataset, shown, proba_dog)
        assert len(set(shown)) == 2 and {colour for *_, colour in drawn(figures[f"05_{view}.png"])} == {"black" if right else "red"}


def test_random_views_go_by_the_seed(tmp_path, figures):
    dataset, shown = make_dataset(tmp_path / "data", train=1, valid=8), []
    fake_results(tmp_path / "out", dataset, [0.1] * 16)
    for seed in (0, 0, 1):
        analyse(dataset, tmp_path / "out", "--n-view", 4, "--seed", seed)
        shown.append([[title[-1] for _, title, _ in drawn(figures[f"05_{name}.png"])] for name in ("correct", "incorrect")])
    assert shown[0] == shown[1] != shown[2]
    for k, animal in enumerate(("cat", "dog")):  # not just the first ones
        assert all(views[k] != [f"{animal}.{i}.jpg" for i in range(4)] for views in shown)


def test_ties_keep_the_order_of_the_dataset_and_none_is_said(tmp_path, figures):
    dataset = make_dataset(tmp_path / "data", train=1, valid=3)
    fake_results(tmp_path / "out", dataset, [0.25] * 3 + [0.75] * 3)
    analyse(dataset, tmp_path / "out")
    cats, dogs = ([f"{animal}.{i}.jpg" for i in range(3)] for animal in ("cat", "dog"))
    for view, names in {"most_uncertain": cats + dogs, "most_correct_cats": cats, "most_correct_dogs": dogs}.items():
        assert_shows(figures[f"05_{view}.png"], dataset, names)
    for view in ("incorrect", "most_incorrect_cats", "most_incorrect_dogs"):
        assert [text.get_text() for text in figures[f"05_{view}.png"].axes[0].texts] == ["none"]


def test_confusion_histogram_and_numbers(tmp_path, figures, capsys):
    """Of 5 cats 4 are right, of 5 dogs 3; every number that is printed, against numpy."""
    dataset, proba_dog = make_dataset(tmp_path / "data", train=1, valid=5), [.11, .12, .13, .3, .6, .002, .4, .9, .95, .97]
    fake_results(tmp_path / "out", dataset, proba_dog)
    analyse(dataset, tmp_path / "out")
    axes, = figures["05_confusion.png"].axes
    assert np.array_equal(axes.get_images()[0].get_array(), [[4, 1], [2, 3]])
    assert {text.get_position(): text.get_text() for text in axes.texts} == {  # (column, row)
        (0, 0): "4\n80.0% of cats", (1, 0): "1\n20.0% of cats", (0, 1): "2\n40.0% of dogs", (1, 1): "3\n60.0% of dogs"}
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")
    assert [label.get_text() for label in [*axes.get_xticklabels(), *axes.get_yticklabels()]] == ["cats", "dogs"] * 2
    axes, = figures["05_histogram.png"].axes
    for k, heap in enumerate(axes.containers):
        assert heap.patches[0].get_label() == ["cats", "dogs"][k]
        expected, _ = np.histogram(np.float32(proba_dog[5 * k:5 * k + 5]), bins=20, range=(0, 1))
        assert [bar.get_height() for bar in heap] == expected.tolist()
    printed = capsys.readouterr().out
    numbers = {name.strip(): number for name, number in re.findall(r"^  (\D+?) +(\d\S*)", printed.partition("summary of")[2], re.M)}
    true = np.where(np.arange(10) < 5, 1 - np.array(proba_dog), proba_dog)
    assert numbers == {"accuracy": "0.7000", "log loss": f"{-np.log(true).mean():.4f}", "cats taken for dogs": "1",
                       "log loss, clipped": f"{-np.log(true.clip(.005, .995)).mean():.4f}", "dogs taken for cats": "2"}
    assert "correct: 0.7000" in printed and "in the last epoch: 0.7500; on validation images: 0.6250" in printed  # the metrics


def test_which_step(dataset, tmp_path, figures):
    """04 where it has run, else 03, else what --step says; untrained weights are named in every heading."""
    fake_results(tmp_path, dataset, [0.1, 0.2, 0.7, 0.9], step="03")
    assert analyse(dataset, tmp_path)["of_step"] == "step 03"
    fake_results(tmp_path, dataset, [0.1, 0.2, 0.7, 0.4], pretrained=False)
    assert analyse(dataset, tmp_path)["of_step"] == "step 04, untrained weights"
    assert "(step 04, untrained weights)" in figures["05_correct.png"].get_suptitle()
    assert len(analyse(dataset, tmp_path, "--step", "03")["correct"]) == 4


# -------------------------------------------------------------------------------------------------------- submission
def test_submission(torch_home, tmp_path, vgg, figures):
    """Rows sorted by number, probabilities of dog within the bounds, the same as the network gives directly."""
    dataset, pictures = make_dataset(tmp_path / "data", train=1, valid=1), sorted((ROOT / "sample").rglob("*.jpg"))
    (dataset / "test1").mkdir()
    numbers = [1, 2, 3, 10, 11, 20]
    for number, path in zip(numbers, pictures, strict=False):
        shutil.copy(path, dataset / "test1" / f"{number}.jpg")
    inputs = torch.stack([common.imagenet_format(common.load_image(path)) for path in pictures[:6]])
    make_sure(vgg, inputs, 3000)  # so that the clipping has work to do
    fake_results(tmp_path / "out", dataset, [0.1, 0.9], model=vgg)
    analyse(dataset, tmp_path / "out", "--submission")
    header, *rows = (tmp_path / "out" / "submission.csv").read_text().splitlines()
    assert header == "id,label" and [int(row.split(",")[0]) for row in rows] == numbers
    labels = np.array([float(row.split(",")[1]) for row in rows])
    with torch.inference_mode():
        direct = vgg(inputs).exp()[:, 1].numpy()
    assert np.allclose(labels, direct.clip(0.005, 0.995), atol=1e-3)
    assert direct.max() > 0.995 and direct.min() < 0.005


def test_submission_without_what_it_needs(dataset, tmp_path):
    options = ["--data-dir", dataset, "--output-dir", tmp_path / "out", "--submission"]
    (dataset / "test1").mkdir()
    assert "test1: no images there; run python 01_data.py" in message("05_analysis.py", *options)
    Path(dataset, "test1", "one.jpg").write_text("")
    assert "one.jpg: its name is no number" in message("05_analysis.py", *options)
