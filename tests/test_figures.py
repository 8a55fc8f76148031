"""A figure is a claim: what it shows, under which title, on which axes, and in which colors."""
import contextlib
import io
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import PHOTO, SECOND_PHOTO, TRAIN, VALID, fake_results, json_of, make_dataset, not_painted, run_here
from matplotlib.colors import to_hex
from PIL import Image
from torchvision import transforms
from torchvision.utils import make_grid

import common

NAMES = common.IMAGENET.meta["categories"]


def cropped(path):
    """What the network sees of a file."""
    return np.asarray(transforms.CenterCrop(224)(Image.open(path).convert("RGB")))


def shown_in(axes):
    """The image of an axes as 8-bit numbers, whether it was given as these or in [0, 1]."""
    image = np.asarray(axes.get_images()[0].get_array())
    return image if image.dtype == np.uint8 else np.uint8(np.round(255 * image))


def in_grid(figure):
    """For each image of a row from make_grid: its file in the sample, and the text above it."""
    files = {cropped(path).tobytes(): path for path in TRAIN + VALID}
    axes, = figure.axes
    found = []
    for i, text in enumerate(axes.texts):
        left = 226 * i + 2  # 224 pixels and a border of 2
        x, y = text.get_position()
        assert x == pytest.approx(left + 112, abs=2) and -20 < y < 0 and text.get_ha() == "center"
        found.append((files[shown_in(axes)[2:226, left:left + 224].tobytes()], text.get_text()))
    return found


def assert_shows(figure, paths, proba, seen=Image.open):
    """Rows of four images; above each its class, the prediction, in red if it is wrong, and the name of the file."""
    n_rows = (len(paths) + 3) // 4
    assert figure.get_figheight() == pytest.approx(3.6 * n_rows + 0.4)  # the rows and the heading
    for i, (axes, path, p) in enumerate(zip(figure.axes, paths, proba, strict=True)):
        true, pred = path.name.split(".")[0], ["cat", "dog"][p.argmax()]
        assert axes.get_title() == f"true: {true}\npredicted: {pred}, {p.max():.3f}\n{path.name}"
        assert axes.title.get_color() == ("black" if true == pred else "red")
        assert not axes.title.get_parse_math()  # a file name may contain $
        assert np.array_equal(shown_in(axes), seen(path)) and not axes.axison
        place = axes.get_subplotspec()
        assert (place.rowspan.start, place.colspan.start) == divmod(i, 4) and axes.get_anchor() == "N"


def labels(axes):
    return axes.get_xlabel(), axes.get_ylabel(), axes.get_title()


def texts(found):
    return [text.get_text() for text in found]


def test_each_figure_is_shown_once_and_fits_on_a_screen(lesson):
    """And none is empty."""
    assert list(lesson.figures.values()) == lesson.shown
    for name in lesson.figures:
        image = Image.open(lesson.folder / name).convert("RGB")
        assert 400 <= image.width <= 2000 and 200 <= image.height <= 2000 and np.asarray(image).std() > 1, name


def test_01_and_02_name_each_image(lesson):
    """The first validation batch, in order, and eight images of a shuffled batch: a wrong name would mislead."""
    assert in_grid(lesson.figures["01_valid_batch.png"]) == [(path, path.parent.name) for path in VALID[:5]]
    train = in_grid(lesson.figures["01_train_batch.png"])
    assert len(train) == 8 and all(path.parent.name == name for path, name in train)
    assert [path for path, _ in train] != TRAIN[:8]
    figure, probs = lesson.figures["02_predictions.png"], np.load(lesson.folder / "probs_try.npy")
    titles = [f"true: {animal}\n{NAMES[p.argmax()]}\n{p.max():.3f}"
              for animal, p in zip(["cat"] * 4 + ["dog"], probs, strict=True)]
    assert in_grid(figure) == list(zip(VALID[:5], titles, strict=True))
    assert figure.get_suptitle() == "True class; VGG16's most likely ImageNet class and its probability"


@pytest.mark.parametrize("script", ["03_finetune_head.py", "04_precompute.py"])
def test_03_and_04_show_four_of_each_class(tmp_path, figures, script):
    """Six cats come before the first dog."""
    dataset = make_dataset(tmp_path / "data", train=1, valid=(6, 5))
    run_here(script, "--data-dir", dataset, "--output-dir", tmp_path, "--epochs", 1)
    shown, paths = [0, 1, 2, 3, 6, 7, 8, 9], sorted(dataset.glob("valid/*/*"))
    figure, proba = figures[f"{script[:2]}_valid_batch.png"], np.load(tmp_path / f"{script[:2]}_all_proba.npy")
    assert_shows(figure, [paths[i] for i in shown], proba[shown], cropped)
    assert figure.get_suptitle() == "Validation images: true class, prediction and its probability"


def test_03_shows_the_image_after_each_block(lesson):
    """A student reads off where the image shrinks, and where the parameters are. The first image would be too small."""
    figure, features = lesson.figures["03_blocks.png"], common.load_vgg16("imagenet").features
    assert figure.get_suptitle() == "A validation image after each block of VGG16"
    first, *blocks = figure.axes
    assert first.get_title() == "input" and np.array_equal(shown_in(first), cropped(VALID[1]))
    image = common.imagenet_format(Image.open(VALID[1]))
    sizes = ["8 x 112 x 112", "16 x 56 x 56", "16 x 28 x 28", "32 x 14 x 14", "512 x 7 x 7"]
    counts = ["808", "3,488", "6,960", "23,136", "166,464"]
    ends = [5, 10, 17, 24, 31]  # a block ends with a pooling layer
    for i, (axes, end, size, count) in enumerate(zip(blocks, ends, sizes, counts, strict=True), 1):
        mean = features[:end](image[None])[0].mean(dim=0).detach()
        assert np.allclose(axes.get_images()[0].get_array(), mean, atol=1e-4)
        assert labels(axes) == (f"{size}\n{count} parameters", "", f"block {i}")
        assert len(axes.get_xticks()) == len(axes.get_yticks()) == 0


@pytest.mark.parametrize("step, of, epochs, validation, tested", [
    ("03", "images", [1, 2], "validation, at the end", [2]),
    ("04", "features", [1, 2, 3], "validation, after the epoch", [1, 2, 3])])
def test_03_and_04_plot_their_training(lesson, step, of, epochs, validation, tested):
    """The lines of the right plot are not those of the left one, and each has the color of the legend."""
    figure, metrics = lesson.figures[f"{step}_training.png"], json_of(lesson.folder / f"{step}_metrics.json")
    assert figure.get_suptitle() == f"Training the last layer on {of}"
    legend, = figure.legends
    keys = [line.get_color() for line in legend.get_lines()]
    assert texts(legend.get_texts()) == ["training, during the epoch", validation, "guessing"]
    assert len({to_hex(color) for color in keys}) == 3
    for axes, name, guess in zip(figure.axes, ["loss", "accuracy"], [np.log(2), 0.5], strict=True):
        training, valid, guessing = axes.lines
        assert [line.get_color() for line in axes.lines] == keys
        assert (list(training.get_xdata()), list(training.get_ydata())) == (epochs, metrics[f"train_{name}"])
        measured = metrics.get(f"valid_{name}_per_epoch", [metrics[f"valid_{name}"]])
        assert (list(valid.get_xdata()), list(valid.get_ydata())) == (tested, measured)
        assert guessing.get_ydata() == [guess, guess] and guessing.get_linestyle() == ":"
        assert labels(axes) == ("epoch", "loss (mean per image)" if name == "loss" else "accuracy", "")
        assert all(tick == int(tick) for tick in axes.get_xticks())


@pytest.mark.parametrize("losses, scale, limits", [
    ([0.9, 0.6], "linear", (0, 1.1 * 0.9)), ([0.3, 0.2], "linear", (0, 1.1 * np.log(2))),  # of guessing
    ([5.0] + [0.4] * 9, "log", (0.35, 5.7))])
def test_the_axes_neither_magnify_nor_flatten(losses, scale, limits):
    """A small change must not look large; a first spike must not flatten the rest."""
    common.plot_training({"train_loss": losses, "train_accuracy": losses, "valid_loss": 0.5, "valid_accuracy": 0.5}, "")
    loss, accuracy = plt.gcf().axes
    assert accuracy.get_ylim() == (0, 1.05) and loss.get_yscale() == scale
    assert loss.get_ylim() == pytest.approx(limits, rel=0.01)


@pytest.mark.parametrize("script, classes, heading", [
    ("02_vgg_imagenet.py", NAMES, "What VGG16 sees"), ("05_analysis.py", ["cats", "dogs"], "Cat or dog? (script 04)")])
def test_photos_stand_beside_their_own_answers(vgg, dataset, tmp_path, figures, capsys, script, classes, heading):
    """And upright, for the network and the student: a phone stores them rotated, with EXIF data that says so."""
    upright, exif = Image.open(SECOND_PHOTO), Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "phone.png", exif=exif)
    photos = {PHOTO: Image.open(PHOTO), tmp_path / "phone.png": upright}
    fake_results(tmp_path, dataset, [0.1, 0.1, 0.9, 0.9], model=vgg)
    model = run_here(script, "--data-dir", dataset, "--output-dir", tmp_path, "--image", *photos)["model_vgg"]
    figure, printed = figures[f"{script[:2]}_images.png"], capsys.readouterr().out
    assert figure.get_suptitle() == heading
    for (path, photo), left, right in zip(photos.items(), figure.axes[::2], figure.axes[1::2], strict=True):
        p = model(common.IMAGENET.transforms()(photo)[None])[0].softmax(dim=0).tolist()
        order = range(2) if len(p) == 2 else np.argsort(p)[::-1][:5]  # the best first
        answers = [f"{classes[k]} {p[k]:.3f}" for k in order]
        assert "\n    ".join([f"  {path}:", *answers]) + "\n" in printed
        assert np.array_equal(shown_in(left), photo) and left.get_title() == path.name and not left.axison
        names, widths = texts(right.get_yticklabels()), [f"{bar.get_width():.3f}" for bar in right.patches]
        assert [f"{name} {width}" for name, width in zip(names, widths, strict=True)] == answers
        assert texts(right.texts) == widths and right.yaxis_inverted()  # the first on top
        assert right.get_xlim() == (0, 1.15) and labels(right) == ("probability", "", "")


def test_all_photos_are_shown_however_they_are_given(lesson):
    """After one --image (05), or each after its own (02)."""
    for name in ["02_images.png", "05_images.png"]:
        assert [axes.get_title() for axes in lesson.figures[name].axes[::2]] == [PHOTO.name, SECOND_PHOTO.name]


def test_02_shows_the_worst_mistakes_of_zero_shot(tmp_path, figures, monkeypatch, vgg, capsys, watched):
    """Sorted by how far the wrong sum exceeds the right one: cat.1 comes before cat.2, whose wrong sum is larger."""
    dataset = make_dataset(tmp_path / "data", train=1, valid=(3, 2))
    sums = np.array([[.6, .1], [.05, .45], [.44, .52], [.8, .1], [.1, .6]])  # of cats and of dogs, for 3 cats, 2 dogs
    probs = np.full((5, 1000), 2e-12)
    for p, (cat, dog) in zip(probs, sums, strict=True):  # on the first and last cats and dogs, and on their neighbours
        p[[281, 285]], p[[151, 268]], p[[150, 269, 280, 286]] = cat / 2, dog / 2, (1 - cat - dog) / 4
    vgg.forward = lambda inputs: torch.tensor(np.log(probs[:len(inputs)]), dtype=torch.float32)
    monkeypatch.setattr(common, "load_vgg16", lambda weights: vgg)
    calls = watched("support.progress")
    run_here("02_vgg_imagenet.py", "--data-dir", dataset, "--output-dir", tmp_path, "--zero-shot")
    assert calls == [(1, 5, "images")]
    assert ("\naccuracy 0.4000 on 5 validation images\nof 3 cats: 1 predicted as cats, 2 as dogs\n"
            "of 2 dogs: 1 predicted as cats, 1 as dogs\nprobability of all other classes, neither cats nor dogs: "
            "0.2480 on average\n") in capsys.readouterr().out
    saved = json_of(tmp_path / "02_zero_shot.json")
    assert (saved["valid_accuracy"], saved["confusion"]) == (0.4, [[1, 2], [1, 1]])
    assert saved["outside"] == pytest.approx(0.248)
    worst = [dataset / "valid" / name for name in ("dogs/dog.0.jpg", "cats/cat.1.jpg", "cats/cat.2.jpg")]
    figure = figures["02_zero_shot.png"]
    assert_shows(figure, worst, sums[[3, 1, 2]])
    assert figure.get_suptitle() == "Zero-shot, worst mistakes: total probability of the predicted class"


# The probability of dog for 5 cats and 97 dogs: more than 100 images, for a logarithmic axis.
CATS, DOGS = [.3, .11, .6, .11, .9], [.13, .8, .002, .97, .42, .35, .95] + [.7] * 90
PROBA_DOG = np.array(CATS + DOGS)
C, D = range(5), range(5, 102)  # the numbers of their images: D[2] is that of the third dog
RANDOM = np.random.default_rng(1)


@pytest.fixture(scope="module")
def analysis(tmp_path_factory):
    """05 with these results: the sorted photos, its figures, and what it printed."""
    folder = tmp_path_factory.mktemp("analysis")
    dataset = make_dataset(folder, train=1, valid=(5, 97))
    fake_results(folder, dataset, PROBA_DOG)
    with not_painted() as figures, contextlib.redirect_stdout(io.StringIO()) as printed:
        run_here("05_analysis.py", "--data-dir", dataset, "--output-dir", folder, "--n-view", 2, "--seed", 1)
    return SimpleNamespace(paths=sorted(dataset.glob("valid/*/*")), figures=figures, printed=printed.getvalue())


@pytest.mark.parametrize("name, title, idx", [
    ("correct", "Correct, at random", RANDOM.permutation([C[0], C[1], C[3], D[1], D[3], D[6], *D[7:]])[:2]),
    ("incorrect", "Incorrect, at random", RANDOM.permutation([C[2], C[4], D[0], D[2], D[4], D[5]])[:2]),
    ("most_correct_cats", "Most correct cats, most confident first", [C[1], C[3]]),  # the same probability: in order
    ("most_correct_dogs", "Most correct dogs, most confident first", [D[3], D[6]]),
    ("most_incorrect_cats", "Most incorrect cats: dogs predicted as cats, most confident first", [D[2], D[0]]),
    ("most_incorrect_dogs", "Most incorrect dogs: cats predicted as dogs, most confident first", [C[4], C[2]]),
    ("most_uncertain", "Most uncertain", [D[4], C[2]])])
def test_05_shows_what_the_title_says(analysis, name, title, idx):
    """The lecture's five views. The images are uncropped, so that a student sees what the network did not."""
    figure, proba = analysis.figures[f"05_{name}.png"], np.transpose([1 - PROBA_DOG, PROBA_DOG])
    assert_shows(figure, [analysis.paths[i] for i in idx], proba[idx])
    assert figure.get_suptitle() == f"{title} (script 04)"


def test_05_prints_a_summary(analysis):
    """What a student tells others: 2 of 5 cats and 4 of 97 dogs are wrong."""
    true = np.array([1 - p for p in CATS] + DOGS)  # the probability of the true class
    assert "\ntraining accuracy in the last epoch (script 04): 0.7500\n" in analysis.printed
    assert "\naccuracy on 102 validation images: 0.9412\n" in analysis.printed
    assert ("\nsummary of script 04\n"
            f"  log loss                {-np.log(true).mean():.4f}  (NLLLoss, as in training)\n"
            f"  log loss, clipped       {-np.log(true.clip(.005, .995)).mean():.4f}  (as in --submission)\n"
            "  cats predicted as dogs  2 of 5\n"
            "  dogs predicted as cats  4 of 97\n") in analysis.printed


def test_05_shows_the_confusion_matrix(analysis):
    """A row for each true class: two cats are taken for dogs. Numbers can be read on light and dark."""
    axes, = analysis.figures["05_confusion.png"].axes
    assert labels(axes) == ("predicted class", "true class", "Confusion matrix (script 04)")
    image, = axes.get_images()
    assert image.get_array().tolist() == [[3, 2], [4, 93]]
    assert image.get_clim() == (0, 93) and image.get_cmap().name == "Blues"
    assert {text.get_position(): (text.get_text(), text.get_color()) for text in axes.texts} == {  # (column, row)
        (0, 0): ("3\n60.0% of cats", "black"), (1, 0): ("2\n40.0% of cats", "black"),
        (0, 1): ("4\n4.1% of dogs", "black"), (1, 1): ("93\n95.9% of dogs", "white")}
    for ticks in [axes.xaxis, axes.yaxis]:
        assert ticks.get_ticklocs().tolist() == [0, 1] and texts(ticks.get_ticklabels()) == ["cats", "dogs"]


def test_05_shows_how_sure_the_network_is(analysis, lesson):
    """A bar for each class and twentieth. A logarithmic axis shows the few errors beside many correct predictions."""
    axes, = analysis.figures["05_histogram.png"].axes
    assert labels(axes) == ("predicted probability of dog", "validation images (log scale)",
                            "Probability of dog by true class (script 04)")
    legend = axes.get_legend()
    assert [legend.get_title().get_text(), *texts(legend.get_texts())] == ["true class", "cats", "dogs"]
    for bars, key, proba in zip(axes.containers, legend.get_patches(), [CATS, DOGS], strict=True):
        counts, edges = np.histogram(proba, bins=20, range=(0, 1))
        assert [bar.get_height() for bar in bars] == counts.tolist()
        assert all(low <= bar.get_x() and bar.get_x() + bar.get_width() < low + 0.0501
                   for bar, low in zip(bars, edges[:-1], strict=True))
        assert {to_hex(bar.get_facecolor()) for bar in bars} == {to_hex(key.get_facecolor())}
    assert len({to_hex(key.get_facecolor()) for key in legend.get_patches()}) == 2
    assert [line.get_xdata() for line in axes.lines] == [[0.5, 0.5]]
    assert axes.get_yscale() == "symlog" and axes.yaxis.get_major_formatter()(100) == "100"
    of_few, = lesson.figures["05_histogram.png"].axes
    assert (of_few.get_yscale(), of_few.get_ylabel()) == ("linear", "validation images")
    assert all(tick == int(tick) for tick in of_few.get_yticks())


def test_a_view_without_images_says_so_in_one_row():
    """There are no mistakes: not an empty page."""
    common.show_predictions([], [], [], np.zeros((0, 2)), "Incorrect")
    axes, = plt.gcf().axes
    assert texts(axes.texts) == ["none"] and not axes.axison
    assert (plt.gcf().get_suptitle(), plt.gcf().get_figheight()) == ("Incorrect", pytest.approx(4.0))


def test_names_stand_above_their_own_row_of_a_grid():
    """A student shows ten images: make_grid begins a new row after eight."""
    common.imshow(make_grid(torch.zeros(10, 3, 20, 20)), title=list("abcdefghij"))
    place = {text.get_text(): text.get_position() for text in plt.gca().texts}
    x, y = place["a"]
    assert place["i"] == (x, pytest.approx(y + 20 + 2, abs=1))  # an image and its border lower


def test_a_long_or_strange_name_is_made_to_fit_above_an_image():
    """A phone's names are long; a letter that cannot be drawn would end the run."""
    assert common.short_name("x/IMG_20240131_115959_of_our_cat_0123456789.jpg") == "IMG_20240131_1...123456789.jpg"
    assert common.short_name(f"x/{'a' * 30}") == "a" * 30
    assert common.short_name("x/bad\udcff.jpg") == "bad\\udcff.jpg"
