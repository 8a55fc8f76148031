"""Beyond the lecture: Kaggle's own files, zero-shot, one's own photos, the submission; and what 05 draws and prints."""
import contextlib
import io
import os
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import analyse, fake_results, json_of, keep_figures, make_dataset, message, run_here, script
from PIL import Image
from test_scripts import SAMPLE, assert_shows
from torch.utils.data import DataLoader
from torchvision import datasets

import common

data, vgg_imagenet = script("01_data"), script("02_vgg_imagenet")


@pytest.mark.skipif(os.name == "nt", reason="Windows lets not every user make links")
@pytest.mark.parametrize("test, links", [("test1", False), ("test", True)])
def test_41_kaggles_files_are_sorted_by_their_numbers(tmp_path, test, links):
    """The last 8 % of each class validate: 1,000 of all 12,500, here of every hundredth; and 9 comes before 10. What are
    relative links there are files in the dataset; other files are left alone."""
    kaggle, store = tmp_path / "kaggle", tmp_path / "store" if links else tmp_path / "kaggle"
    for folder in (kaggle, store):
        (folder / "train").mkdir(parents=True, exist_ok=True)
        (folder / test).mkdir(exist_ok=True)
    for name, ids in (("train/cat.", range(125)), ("train/dog.", [3, 9, 10]), (f"{test}/", [7, 70])):
        for i in ids:
            (store / f"{name}{i}.jpg").write_text(f"{name}{i}.jpg")
            if links:
                (kaggle / f"{name}{i}.jpg").symlink_to(f"../../store/{name}{i}.jpg")
        (kaggle / f"{name}4 (1).jpg").write_text("a copy")
    data.get_dataset(tmp_path / "dogscats", kaggle)
    found = {name: sorted(int(path.stem.split(".")[-1]) for path in (tmp_path / "dogscats" / name).iterdir())
             for name in data.COUNTS}
    assert found == {
        "train/cats": [*range(115)], "valid/cats": [*range(115, 125)], "train/dogs": [3, 9], "valid/dogs": [10],
        "sample/train/cats": [*range(8)], "sample/valid/cats": [*range(115, 119)], "sample/train/dogs": [3, 9],
        "sample/valid/dogs": [10], "test1": [7, 70]}
    moved = tmp_path / "dogscats" / "valid" / "dogs" / "dog.10.jpg"
    assert moved.read_text() == "train/dog.10.jpg" and not moved.is_symlink() and len(os.listdir(kaggle / "train")) == 130
    (store / "train" / "dog.3.jpg").unlink()
    (kaggle / "train" / "dog.4.jpg").symlink_to("nowhere.jpg")
    assert "; mend it" in message(data.get_dataset, tmp_path / "again", kaggle) and not (tmp_path / "again").exists()


def test_kaggle_through_the_script(tmp_path, figures):
    """Two of each class at the least, into an empty folder, and never into one that holds something."""
    dogscats, kaggle, pictures = tmp_path / "dogscats", tmp_path / "kaggle", sorted(SAMPLE.rglob("*.jpg"))
    dogscats.mkdir()
    (kaggle / "train").mkdir(parents=True)
    options = ["--data-dir", dogscats, "--output-dir", tmp_path / "out", "--from-kaggle", kaggle]
    for path in pictures[:9]:
        shutil.copy(path, kaggle / "train")
    assert "needs two or more images like train/dog.0.jpg, and holds 1" in message("01_data.py", *options)
    assert sorted(os.listdir(tmp_path)) == ["dogscats", "kaggle", "out"] and not os.listdir(dogscats)
    for path in pictures[9:]:
        shutil.copy(path, kaggle / "train")
    assert run_here("01_data.py", *options)["dset_sizes"] == {"train": 22, "valid": 2}
    assert "is not empty, and the two must not mix" in message("01_data.py", *options)


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
    args, record = SimpleNamespace(output_dir=tmp_path, show=False, weights="imagenet"), {"valid images": "as they are"}
    loader = DataLoader(datasets.ImageFolder(dataset / "valid", common.imagenet_format), batch_size=5)
    vgg_imagenet.zero_shot(args, vgg, torch.device("cpu"), loader, record, "")

    result = json_of(tmp_path / "02_zero_shot.json")
    assert result["valid_accuracy"] == 5 / 8 and result["confusion"] == [[2, 2], [1, 3]]
    assert result["outside"] == pytest.approx(1 - sums.sum(axis=1).mean(), abs=1e-5)
    assert result["made_from"] == common.made_from(record, vgg)
    worst = [dataset / "valid" / name for name in ("dogs/dog.0.jpg", "cats/cat.1.jpg", "cats/cat.2.jpg")]
    assert_shows(figures["02_zero_shot.png"], worst, sums[[4, 1, 2]])


@pytest.mark.parametrize("name", ["02_vgg_imagenet.py", "05_analysis.py"])
def test_49_photos_of_ones_own(vgg, tmp_path, figures, name):
    """Stored turned or mirrored, in all ways, they are seen and shown upright. Beside each are the bars that the weights'
    own transforms and the network give for it: the likeliest on top, or cats before dogs."""
    dataset, photos = make_dataset(tmp_path / "data", train=1, valid=1), []
    upright = [Image.open(path) for path in sorted(dataset.glob("train/*/*"))]
    inputs = torch.stack([common.IMAGENET.transforms()(image) for image in upright])
    fake_results(tmp_path / "out", dataset, [0.1, 0.9], model=vgg)
    for orientation, turn in enumerate(["FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_90",
                                        "TRANSVERSE", "ROTATE_270"], start=2):
        exif = Image.Exif()
        exif[0x0112] = orientation  # of what the camera stored
        photos.append(tmp_path / f"{orientation}.png")
        upright[orientation % 2].transpose(Image.Transpose[turn]).save(photos[-1], exif=exif)
    run_here(name, "--data-dir", dataset, "--output-dir", tmp_path / "out", "--image", photos[0], "--image", *photos[1:])

    with torch.inference_mode():
        if name == "02_vgg_imagenet.py":
            vals, preds = torch.softmax(common.load_vgg16("imagenet").eval()(inputs), dim=1).topk(5)
            answers = np.array(common.IMAGENET.meta["categories"])[preds].tolist()
        else:
            vals, answers = vgg(inputs).exp(), [["cats", "dogs"]] * 2
    assert not np.allclose(*vals, atol=0)
    axes = figures[f"{name[:2]}_images.png"].axes
    for photo, picture, beside in zip(photos, axes[::2], axes[1::2], strict=True):
        i = int(photo.stem) % 2
        assert picture.get_title() == photo.name and np.array_equal(picture.get_images()[0].get_array(), upright[i])
        assert [label.get_text() for label in beside.get_yticklabels()] == answers[i] and beside.yaxis_inverted()
        assert np.allclose([bar.get_width() for bar in beside.patches], vals[i], atol=0)


def test_submission(tmp_path, vgg, figures):
    """Rows sorted by number, probabilities of dog within the bounds, the same as the network gives directly."""
    dataset, pictures = make_dataset(tmp_path / "data", train=1, valid=1), sorted(SAMPLE.rglob("*.jpg"))[:6]
    (dataset / "test1").mkdir()
    options = [dataset, tmp_path / "out", "--submission"]
    assert "test1: no images there; run python 01_data.py" in message(analyse, *options)
    numbers = [1, 2, 3, 10, 11, 20]
    for number, path in zip([*numbers, "no number"], [*pictures, pictures[0]], strict=True):
        shutil.copy(path, dataset / "test1" / f"{number}.jpg")
    inputs = torch.stack([common.imagenet_format(common.load_image(path)) for path in pictures])
    with torch.inference_mode():  # a last layer so steep, around the mean of these images, that clipping has work to do
        vgg.classifier[6].weight *= 3000
        vgg.classifier[6].bias -= vgg.classifier[:7](vgg.features(inputs).flatten(1)).mean(dim=0)
        direct = vgg(inputs).exp()[:, 1].numpy()
    fake_results(tmp_path / "out", dataset, [0.1, 0.9], model=vgg)
    analyse(*options)
    header, *rows = (tmp_path / "out" / "submission.csv").read_text().splitlines()
    assert header == "id,label" and [int(row.split(",")[0]) for row in rows] == numbers
    assert np.allclose([float(row.split(",")[1]) for row in rows], direct.clip(0.005, 0.995), atol=1e-3)
    assert direct.max() > 0.995 and direct.min() < 0.005


PROBA_DOG = np.array([.3, .11, .6, .11, .9, .13, .8, .002, .97, .42, .35, .95])  # cat.0 to cat.5, dog.0 to dog.5


@pytest.fixture(scope="module")
def analysed(tmp_path_factory):
    """What 05 draws and prints of made-up results, in which 4 of 6 cats are right and 3 of 6 dogs. Step 03 has run too."""
    dataset = make_dataset(tmp_path_factory.mktemp("data"), train=1, valid=6)
    fake_results(dataset / "out", dataset, PROBA_DOG, valid_loss=0.1234)
    fake_results(dataset / "out", dataset, 1 - PROBA_DOG, step="03")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        figures = keep_figures(patch)
        analyse(dataset, dataset / "out", "--n-view", 2, "--seed", 1)
    return SimpleNamespace(paths=sorted(dataset.glob("valid/*/*")), figures=figures, printed=printed.getvalue())


def test_views_with_a_known_answer(analysed):
    """Those at random go by the seed; of two that are alike, the first in the dataset comes first."""
    random = np.random.default_rng(1)
    for view, idx in {"correct": random.permutation([0, 1, 3, 5, 6, 8, 11])[:2],
                      "incorrect": random.permutation([2, 4, 7, 9, 10])[:2],
                      "most_correct_cats": [1, 3], "most_correct_dogs": [8, 11], "most_incorrect_cats": [7, 10],
                      "most_incorrect_dogs": [4, 2], "most_uncertain": [9, 2]}.items():
        figure = analysed.figures[f"05_{view}.png"]
        assert_shows(figure, [analysed.paths[i] for i in idx], np.transpose([1 - PROBA_DOG, PROBA_DOG])[idx])
        title = figure.get_suptitle().lower().replace(",", "")
        assert view.replace("_", " ") in title and "(step 04)" in title


def test_confusion_and_histogram(analysed):
    axes, = analysed.figures["05_confusion.png"].axes
    assert np.array_equal(axes.get_images()[0].get_array(), [[4, 2], [3, 3]])
    assert {text.get_position(): text.get_text() for text in axes.texts} == {  # (column, row)
        (0, 0): "4\n66.7% of cats", (1, 0): "2\n33.3% of cats", (0, 1): "3\n50.0% of dogs", (1, 1): "3\n50.0% of dogs"}
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")
    assert [label.get_text() for label in [*axes.get_xticklabels(), *axes.get_yticklabels()]] == ["cats", "dogs"] * 2
    axes, = analysed.figures["05_histogram.png"].axes
    for heap, name, proba in zip(axes.containers, ("cats", "dogs"), np.float32(PROBA_DOG).reshape(2, 6), strict=True):
        assert heap.patches[0].get_label() == name
        assert [bar.get_height() for bar in heap] == np.histogram(proba, bins=20, range=(0, 1))[0].tolist()


def test_every_number_that_is_printed(analysed):
    """The loss and the accuracies of training are the metrics'."""
    summary = analysed.printed.partition("summary of step 04")[2]
    true = np.where(np.arange(12) < 6, 1 - PROBA_DOG, PROBA_DOG).clip(.005, .995)
    assert re.findall(r"^  (\D+?) +(\d.*?)(?:  .*)?$", summary, re.MULTILINE) == [
        ("accuracy", "0.5833"), ("log loss", "0.1234"), ("log loss, clipped", f"{-np.log(true).mean():.4f}"),
        ("cats taken for dogs", "2 of 6"), ("dogs taken for cats", "3 of 6")]
    assert "in the last epoch of training: 0.7500\ncorrect of 12 validation images: 0.5833" in analysed.printed
