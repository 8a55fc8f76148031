"""A figure is a claim: what it shows, under which title, on which axes, and in which colors."""
import re

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import (PHOTO, SAMPLE, SECOND_PHOTO, TRAIN, VALID, analyse, fake_results, json_of, make_dataset,
                      not_painted, outputs_of, run_here)
from matplotlib.colors import to_hex
from PIL import Image
from torch import nn
from torchvision import transforms
from torchvision.utils import make_grid

import common

LN_2 = float(np.log(2))  # the loss of guessing


def cropped(path):
    """What the network sees of a file."""
    return np.asarray(transforms.CenterCrop(224)(Image.open(path).convert("RGB")))


def shown_in(axes):
    """The image of an axes as 8-bit numbers, whether it was given as these or in [0, 1]."""
    image = np.asarray(axes.get_images()[0].get_array())
    return image if image.dtype == np.uint8 else np.uint8(np.round(255 * image))


def in_grid(figure):
    """For each image of a row from make_grid: its file in the sample, and the text above it."""
    axes, = figure.axes
    files = {cropped(path).tobytes(): path for path in TRAIN + VALID}
    row, size, found = shown_in(axes), 226, []  # 224 pixels and a border of 2
    for i, text in enumerate(axes.texts):
        image = row[2:size, i * size + 2:(i + 1) * size]
        x, _ = text.get_position()
        assert i * size < x < (i + 1) * size and text.get_ha() == "center" and not axes.axison
        found.append((files[image.tobytes()], text.get_text()))
    assert row.shape[1] == len(found) * size + 2
    return found


def assert_shows(figure, paths, proba, seen=Image.open):
    """These images in this order; above each its class, the prediction, in red if it is wrong, and the file's name."""
    for axes, path, p in zip(figure.axes, paths, proba, strict=True):
        true, pred = path.name.split(".")[0], ["cat", "dog"][p.argmax()]
        assert axes.get_title() == f"true: {true}\npredicted: {pred}, {p.max():.3f}\n{path.name}"
        assert axes.title.get_color() == ("black" if true == pred else "red")
        assert np.array_equal(shown_in(axes), seen(path)) and not axes.axison


def labels(axes):
    return axes.get_xlabel(), axes.get_ylabel(), axes.get_title()


def texts(found):
    return [text.get_text() for text in found]


# ------------------------------------------------------------------------------------------- the figures of a lesson
def test_show_opens_each_figure_that_is_saved(lesson):
    """Once each, in the order of the scripts."""
    assert list(lesson.figures.values()) == lesson.shown
    assert list(lesson.figures) == sorted(lesson.figures, key=lambda name: name[:2])


def test_each_figure_fits_on_a_screen(lesson):
    """And is not empty."""
    for name in lesson.figures:
        image = Image.open(lesson.folder / name).convert("RGB")
        assert 400 <= image.width <= 2000 and 200 <= image.height <= 2000 and np.asarray(image).std() > 1, name


def test_01_names_the_class_of_each_image(lesson):
    """The first validation batch in order, and eight images of a shuffled batch."""
    assert in_grid(lesson.figures["01_valid_batch.png"]) == [(path, path.parent.name) for path in VALID[:5]]
    train = in_grid(lesson.figures["01_train_batch.png"])
    assert len(train) == 8 and all(path.parent.name == name for path, name in train)
    assert [path for path, _ in train] != TRAIN[:8]


def test_02_names_what_vgg16_sees_in_each_image(lesson):
    """A wrong title would make a right network look wrong."""
    figure, probs = lesson.figures["02_predictions.png"], np.load(lesson.folder / "probs_try.npy")
    names = [common.IMAGENET.meta["categories"][p.argmax()] for p in probs]
    expected = []
    for path, name, p in zip(VALID[:5], names, probs, strict=True):
        expected.append((path, f"true: {path.parent.name.removesuffix('s')}\n{name}\n{p.max():.3f}"))
    assert in_grid(figure) == expected
    assert figure.get_suptitle() == "True class; VGG16's most likely ImageNet class and its probability"


@pytest.mark.parametrize("step", ["03", "04"])
def test_03_and_04_show_four_of_each_class(lesson, step):
    """With the answers of the trained network."""
    figure = lesson.figures[f"{step}_valid_batch.png"]
    assert_shows(figure, VALID, np.load(lesson.folder / f"{step}_all_proba.npy"), cropped)
    assert figure.get_suptitle() == "Validation images: true class, prediction and its probability"


@pytest.mark.parametrize("name", ["03_finetune_head.py", "04_precompute.py"])
def test_03_and_04_show_the_right_images_of_a_larger_class(tmp_path, figures, name):
    """Six cats come before the first dog."""
    dataset = make_dataset(tmp_path / "data", train=1, valid=(6, 5))
    run_here(name, "--data-dir", dataset, "--output-dir", tmp_path, "--epochs", 1)
    shown, paths = [0, 1, 2, 3, 6, 7, 8, 9], sorted(dataset.glob("valid/*/*"))
    proba = np.load(tmp_path / f"{name[:2]}_all_proba.npy")
    figure = figures[f"{name[:2]}_valid_batch.png"]
    assert_shows(figure, [paths[i] for i in shown], proba[shown], cropped)


def test_03_shows_the_image_after_each_block(lesson):
    """The lecture's picture of VGG16: a student reads off where the image shrinks, and where the parameters are."""
    figure, features = lesson.figures["03_blocks.png"], common.load_vgg16("imagenet").features
    first, *blocks = figure.axes
    assert figure.get_suptitle() == "A validation image after each block of VGG16"
    large = next(i for i, path in enumerate(VALID) if min(Image.open(path).size) >= 224)
    assert first.get_title() == "input" and np.array_equal(shown_in(first), cropped(VALID[large]))
    ends = [i + 1 for i, layer in enumerate(features) if isinstance(layer, nn.MaxPool2d)]
    shapes = ["8 x 112 x 112", "16 x 56 x 56", "16 x 28 x 28", "32 x 14 x 14", "512 x 7 x 7"]
    counts = ["808", "3,488", "6,960", "23,136", "166,464"]
    for i, (axes, end, shape, count) in enumerate(zip(blocks, ends, shapes, counts, strict=True), 1):
        x = outputs_of(features[:end], SAMPLE / "valid")[large]
        assert np.allclose(axes.get_images()[0].get_array(), x.mean(dim=0), atol=1e-4)
        assert labels(axes) == (f"{shape}\n{count} parameters", "", f"block {i}")
        assert len(axes.get_xticks()) == len(axes.get_yticks()) == 0


def test_03_shows_an_image_without_black_borders(tmp_path, figures):
    """Of the first images, one that is large enough."""
    dataset = make_dataset(tmp_path / "data", train=1, valid=3)
    first, second, third = sorted((dataset / "valid" / "cats").iterdir())
    for path, size in [(first, (223, 300)), (second, (300, 223)), (third, (224, 224))]:
        Image.open(path).resize(size).save(path)
    run_here("03_finetune_head.py", "--data-dir", dataset, "--output-dir", tmp_path, "--epochs", 1)
    assert np.array_equal(shown_in(figures["03_blocks.png"].axes[0]), cropped(third))


@pytest.mark.parametrize("step, of, validation", [
    ("03", "images", "validation, at the end"), ("04", "features", "validation, after the epoch")])
def test_03_and_04_plot_their_own_training(lesson, step, of, validation):
    """The points are those of the metrics."""
    figure, metrics = lesson.figures[f"{step}_training.png"], json_of(lesson.folder / f"{step}_metrics.json")
    assert figure.get_suptitle() == f"Training the last layer on {of}"
    for axes, name in zip(figure.axes, ["loss", "accuracy"], strict=True):
        lines = {line.get_label(): line.get_ydata() for line in axes.lines}
        at_the_end = [metrics[f"valid_{name}"]]
        assert list(lines["training, during the epoch"]) == metrics[f"train_{name}"]
        assert list(lines[validation]) == metrics.get(f"valid_{name}_per_epoch", at_the_end)


@pytest.mark.parametrize("name, heading", [
    ("02_images.png", "What VGG16 sees"), ("05_images.png", "Cat or dog? (script 04)")])
def test_photos_stand_beside_their_own_answers(lesson, name, heading):
    """Two photos: the second has its own name and answer."""
    figure, script = lesson.figures[name], {"02": "02_vgg_imagenet.py", "05": "05_analysis.py"}[name[:2]]
    printed = lesson.printed[script].partition("Beyond the lecture: your own photos")[2]
    assert figure.get_suptitle() == heading
    rows = [figure.axes[:2], figure.axes[2:]]
    for (left, right), path in zip(rows, [PHOTO, SECOND_PHOTO], strict=True):
        answers = re.findall(r"^    (.*) (\d\.\d{3})$", printed.partition(f"  {path}:\n")[2].partition("  /")[0], re.M)
        names, numbers = zip(*answers[:len(right.patches)], strict=True)
        assert left.get_title() == path.name and not left.axison
        assert np.array_equal(left.get_images()[0].get_array(), Image.open(path).convert("RGB"))
        assert texts(right.get_yticklabels()) == list(names) and right.yaxis_inverted()  # the first on top
        assert tuple(texts(right.texts)) == tuple(f"{bar.get_width():.3f}" for bar in right.patches) == numbers
        assert right.get_xlim() == (0, 1.15) and labels(right) == ("probability", "", "")


# -------------------------------------------------------------------------------------------- 02's and 05's analysis
def test_02_shows_the_worst_mistakes_of_zero_shot(tmp_path, figures, monkeypatch, vgg, capsys, watched):
    """The worst mistake is not where the wrong sum is largest, but where it exceeds the right one by most: cat.1."""
    dataset = make_dataset(tmp_path / "data", train=1, valid=(5, 4))
    sums = np.array([[.6, .1], [.05, .45], [.44, .52], [.5, .2], [.7, .2],  # five cats: sums of cats and of dogs
                     [.8, .1], [.1, .6], [.0, .9], [.1, .3]])
    probs = np.full((9, 1000), 2e-12)
    for p, (cat, dog) in zip(probs, sums, strict=True):  # on the first and last cats and dogs, and on their neighbours
        p[[281, 285]], p[[151, 268]], p[[150, 269, 280, 286]] = cat / 2, dog / 2, (1 - cat - dog) / 4
    outputs = torch.tensor(np.log(probs.clip(1e-12)), dtype=torch.float32)
    batches = iter([outputs[:5], outputs[:5], outputs[5:], outputs[:1]])  # inputs_try, all images, the record
    vgg.forward = lambda inputs: next(batches)
    monkeypatch.setattr(common, "load_vgg16", lambda weights: vgg)
    calls = watched("support.progress")
    run_here("02_vgg_imagenet.py", "--data-dir", dataset, "--output-dir", tmp_path, "--zero-shot")
    assert calls == [(2, 9, "images")]
    outside = 1 - sums.sum(axis=1).mean()
    saved = json_of(tmp_path / "02_zero_shot.json")
    assert saved["valid_accuracy"] == 6 / 9 and saved["confusion"] == [[3, 2], [1, 3]]
    assert saved["outside"] == pytest.approx(outside)
    assert ("\naccuracy 0.6667 on 9 validation images\nof 5 cats: 3 predicted as cats, 2 as dogs\n"
            "of 4 dogs: 1 predicted as cats, 3 as dogs\nprobability of all other classes, neither cats nor dogs: "
            f"{outside:.4f} on average\n") in capsys.readouterr().out
    worst = [dataset / "valid" / name for name in ("dogs/dog.0.jpg", "cats/cat.1.jpg", "cats/cat.2.jpg")]
    assert_shows(figures["02_zero_shot.png"], worst, sums[[5, 1, 2]])
    assert figures["02_zero_shot.png"].get_suptitle() == (
        "Zero-shot, worst mistakes: total probability of the predicted class")


# The probability of dog for five cats and seven dogs.
CATS, DOGS = [.3, .11, .6, .11, .9], [.13, .8, .002, .97, .42, .35, .95]
PROBA_DOG = np.array(CATS + DOGS)


@pytest.fixture(scope="module")
def analysis(tmp_path_factory):
    """05 with results of a known answer: 3 of 5 cats and 3 of 7 dogs are right. Return its figures, and the photos."""
    folder = tmp_path_factory.mktemp("analysis")
    dataset = make_dataset(folder, train=1, valid=(5, 7))
    fake_results(folder, dataset, 1 - PROBA_DOG, step="03")  # 03 has run too
    fake_results(folder, dataset, PROBA_DOG)
    with not_painted() as figures:
        analyse(dataset, folder, "--n-view", 2, "--seed", 1)
    return figures, sorted(dataset.glob("valid/*/*"))


RANDOM = np.random.default_rng(1)
VIEWS = {
    "correct": ("Correct, at random", RANDOM.permutation([0, 1, 3, 6, 8, 11])[:2]),
    "incorrect": ("Incorrect, at random", RANDOM.permutation([2, 4, 5, 7, 9, 10])[:2]),
    "most_correct_cats": ("Most correct cats, most confident first", [1, 3]),  # the same probability: in order
    "most_correct_dogs": ("Most correct dogs, most confident first", [8, 11]),
    "most_incorrect_cats": ("Most incorrect cats: dogs predicted as cats, most confident first", [7, 5]),
    "most_incorrect_dogs": ("Most incorrect dogs: cats predicted as dogs, most confident first", [4, 2]),
    "most_uncertain": ("Most uncertain", [9, 2])}


@pytest.mark.parametrize("view", VIEWS)
def test_05_shows_what_the_title_says(analysis, view):
    """The lecture's five views. The images are uncropped, so that a student sees what the network did not."""
    (figures, paths), (title, idx) = analysis, VIEWS[view]
    all_proba = np.transpose([1 - PROBA_DOG, PROBA_DOG])
    assert_shows(figures[f"05_{view}.png"], [paths[i] for i in idx], all_proba[idx])
    assert figures[f"05_{view}.png"].get_suptitle() == f"{title} (script 04)"


def test_05_shows_the_confusion_matrix(analysis):
    """A row for each true class: two cats are taken for dogs. Numbers can be read on light and dark."""
    axes, = analysis[0]["05_confusion.png"].axes
    assert labels(axes) == ("predicted class", "true class", "Confusion matrix (script 04)")
    assert axes.get_images()[0].get_array().tolist() == [[3, 2], [4, 3]]
    assert axes.get_images()[0].get_clim() == (0, 4) and axes.get_images()[0].get_cmap().name == "Blues"
    shown = {text.get_position(): (text.get_text(), text.get_color()) for text in axes.texts}
    assert shown == {  # (column, row)
        (0, 0): ("3\n60.0% of cats", "white"), (1, 0): ("2\n40.0% of cats", "black"),
        (0, 1): ("4\n57.1% of dogs", "white"), (1, 1): ("3\n42.9% of dogs", "white")}
    for ticks in [axes.xaxis, axes.yaxis]:
        assert ticks.get_ticklocs().tolist() == [0, 1] and texts(ticks.get_ticklabels()) == ["cats", "dogs"]


def test_05_shows_how_sure_the_network_is(analysis):
    """A bar for each class and twentieth; the legend has the colors of the bars."""
    axes, = analysis[0]["05_histogram.png"].axes
    assert labels(axes) == ("predicted probability of dog", "validation images",
                            "Probability of dog by true class (script 04)")
    assert axes.get_legend().get_title().get_text() == "true class"
    assert texts(axes.get_legend().get_texts()) == ["cats", "dogs"]
    for bars, key, proba in zip(axes.containers, axes.get_legend().get_patches(), [CATS, DOGS], strict=True):
        counts, edges = np.histogram(proba, bins=20, range=(0, 1))
        assert [bar.get_height() for bar in bars] == counts.tolist()
        assert all(low <= bar.get_x() < bar.get_x() + bar.get_width() <= high + 1e-9
                   for bar, low, high in zip(bars, edges[:-1], edges[1:], strict=True))
        assert {bar.get_facecolor() for bar in bars} == {key.get_facecolor()}
    cats, dogs = axes.get_legend().get_patches()
    assert cats.get_facecolor() != dogs.get_facecolor()
    assert [line.get_xdata() for line in axes.lines] == [[0.5, 0.5]]
    assert axes.get_yscale() == "linear" and all(tick == int(tick) for tick in axes.get_yticks())


def test_05_has_a_logarithmic_axis_for_many_images(tmp_path, figures):
    """Which shows the few errors beside hundreds of correct predictions."""
    dataset = make_dataset(tmp_path / "data", train=1, valid=1)
    for x in range(100):
        (dataset / "valid" / "cats" / f"cat.{x + 1}.jpg").hardlink_to(dataset / "valid" / "cats" / "cat.0.jpg")
    fake_results(tmp_path, dataset, [0.1] * 101 + [0.9])
    analyse(dataset, tmp_path, "--n-view", 1)
    axes, = figures["05_histogram.png"].axes
    assert axes.get_yscale() == "symlog" and axes.get_ylabel() == "validation images (log scale)"
    assert axes.yaxis.get_major_formatter()(100) == "100"


# --------------------------------------------------------------------------------------------- the parts of a figure
def test_imshow_shows_the_original_colors_without_axes(caplog):
    """And a title as it is, although matplotlib would read $ as a formula."""
    pixels = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    inputs = common.imagenet_format(Image.fromarray(pixels))
    common.imshow(inputs, "a $title$")
    assert np.array_equal(shown_in(plt.gca()), pixels)
    assert (plt.gca().get_title(), plt.gca().title.get_parse_math(), plt.gca().axison) == ("a $title$", False, False)
    common.imshow(inputs * 3, 0)
    assert plt.gca().get_title() == "0" and caplog.text == ""  # matplotlib warns of values that are not from 0 to 1


def test_imshow_writes_names_above_the_images_of_a_grid():
    """make_grid begins a new row after eight images."""
    common.imshow(make_grid(torch.zeros(10, 3, 224, 224)), list("abcdefghij"))
    for i, text in enumerate(plt.gca().texts):
        row, column, size = i // 8, i % 8, 226
        x, y = text.get_position()
        assert text.get_text() == "abcdefghij"[i] and text.get_ha() == "center"
        assert abs(x - (column + 0.5) * size) < 3 and -20 < y - row * size < 0
    assert len(plt.gca().texts) == 10


@pytest.mark.parametrize("n_images, n_rows", [(1, 1), (4, 1), (5, 2)])
def test_predictions_stand_in_rows_of_four_at_one_height(n_images, n_rows):
    """Images of different heights too: the titles of a row are aligned."""
    images = [Image.new("RGB", (100, 60 + 20 * i)) for i in range(n_images)]
    common.show_predictions(images, ["cat.jpg"] * n_images, [0] * n_images, np.full((n_images, 2), 0.5), "heading")
    axes = plt.gcf().axes
    places = [(place.rowspan.start, place.colspan.start) for place in (ax.get_subplotspec() for ax in axes)]
    assert places == [(i // 4, i % 4) for i in range(n_images)] and {ax.get_anchor() for ax in axes} == {"N"}
    assert plt.gcf().get_suptitle() == "heading"
    assert plt.gcf().get_figheight() == pytest.approx(3.6 * n_rows + 0.4)


def test_a_view_without_images_says_so_in_one_row():
    """There are no mistakes: not an empty page."""
    common.show_predictions([], [], [], np.zeros((0, 2)), "Incorrect")
    axes, = plt.gcf().axes
    assert texts(axes.texts) == ["none"] and not axes.axison and plt.gcf().get_suptitle() == "Incorrect"
    assert plt.gcf().get_figheight() == pytest.approx(4.0)


def test_strange_and_long_names_of_photos_can_be_drawn(tmp_path):
    """A file name may contain anything; at most 30 characters fit above an image."""
    names = {"x/$^$.jpg": "$^$.jpg", "x/bad\udcff.jpg": "bad\\udcff.jpg",
             "x/IMG_20240131_115959_of_our_cat_0123456789.jpg": "IMG_20240131_1...123456789.jpg",
             f"x/{'a' * 26}.jpg": f"{'a' * 26}.jpg"}
    common.show_predictions([Image.new("RGB", (2, 2))] * 4, list(names), [0] * 4, np.full((4, 2), 0.5), "heading")
    assert [ax.get_title().splitlines()[-1] for ax in plt.gcf().axes] == list(names.values())
    plt.gcf().savefig(tmp_path / "a.png")


def test_a_figure_is_saved_as_png_then_shown_and_closed(tmp_path, monkeypatch):
    """Whatever format a matplotlibrc asks for."""
    shown, path = [], tmp_path / "a.png"
    monkeypatch.setattr(plt, "show", lambda: shown.append(path.read_bytes()[:4]))
    for show in [False, True]:
        plt.figure()
        with plt.rc_context({"savefig.format": "pdf"}):
            common.save_figure(path, show)
    assert shown == [b"\x89PNG"] and plt.get_fignums() == []


CURVES = {"train_loss": [0.9, 0.6], "train_accuracy": [0.5, 0.75], "valid_loss": 0.55, "valid_accuracy": 0.8}
PER_EPOCH = {"valid_loss_per_epoch": [0.8, 0.55], "valid_accuracy_per_epoch": [0.6, 0.8]}
GUESSING = {"loss": [LN_2, LN_2], "accuracy": [0.5, 0.5]}


@pytest.mark.parametrize("metrics, validation, points, loss_axis, accuracy_axis", [
    (CURVES, "validation, at the end", [2], [0.55], [0.8]),
    ({**CURVES, **PER_EPOCH}, "validation, after the epoch", [1, 2], [0.8, 0.55], [0.6, 0.8])], ids=["03", "04"])
def test_curves_of_a_training(metrics, validation, points, loss_axis, accuracy_axis):
    """The lines of the right plot are not those of the left one, and each has the color of the legend."""
    common.plot_training(metrics, "a title")
    figure, shown = plt.gcf(), {"loss": loss_axis, "accuracy": accuracy_axis}
    assert figure.get_suptitle() == "a title"
    legend, = figure.legends
    keys = [line.get_color() for line in legend.get_lines()]
    colors = dict(zip(texts(legend.get_texts()), keys, strict=True))
    assert list(colors) == ["training, during the epoch", validation, "guessing"]
    assert len({to_hex(color) for color in keys}) == 3
    for axes, name in zip(figure.axes, ["loss", "accuracy"], strict=True):
        training, valid, guessing = axes.lines
        assert (list(training.get_xdata()), list(training.get_ydata())) == ([1, 2], metrics[f"train_{name}"])
        assert (list(valid.get_xdata()), list(valid.get_ydata())) == (points, shown[name])
        assert guessing.get_ydata() == GUESSING[name] and guessing.get_linestyle() == ":"
        assert {line.get_label(): line.get_color() for line in axes.lines} == colors
        assert labels(axes) == ("epoch", "loss (mean per image)" if name == "loss" else "accuracy", "")
        assert all(tick == int(tick) for tick in axes.get_xticks())


@pytest.mark.parametrize("losses, scale, limits", [
    ([0.9, 0.6], "linear", (0, 1.1 * 0.9)), ([0.3, 0.2], "linear", (0, 1.1 * LN_2)),
    ([5.0] + [0.4] * 9, "log", None)], ids=["usual", "low: the line of guessing is in sight", "a high first loss"])
def test_limits_of_the_axes(losses, scale, limits):
    """A small change must not look large; a first spike must not flatten the rest."""
    common.plot_training({**CURVES, "train_loss": losses, "train_accuracy": [0.5] * len(losses)}, "a title")
    loss, accuracy = plt.gcf().axes
    assert accuracy.get_ylim() == (0, 1.05) and loss.get_yscale() == scale
    assert limits is None or loss.get_ylim() == pytest.approx(limits)


def test_no_curves_without_a_history(capsys):
    """The lecture's own train_model returns nothing: the script continues."""
    common.plot_training({}, "a title")
    assert capsys.readouterr().out == "no curves: train_model returned no history\n"
