"""The five scripts as a student runs them, whole and cell by cell, on the bundled sample; their files, figures, names."""
import contextlib
import io
import re
import subprocess
import sys
import textwrap
import zipfile
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import ROOT, json_of, keep_figures, make_dataset, run_here, script
from matplotlib.text import Text
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchvision import datasets, models, transforms

import common
import small_vgg

SCRIPTS = ["01_data.py", "02_vgg_imagenet.py", "03_finetune_head.py", "04_precompute.py", "05_analysis.py"]
HEADINGS = {  # of the lecture, in the order of the video, with their seconds in it
    "Using CNN for dogs vs cats": 1175, "Imports": None, "Downloading the data": None, "Data processing": 1550,
    "Creating VGG Model": 2451,
    "Modifying the last layer and setting the gradient false to all layers": 2755,
    "Training the fully connected module": 2990, "Creating loss function and optimizer": None, "Training the model": None,
    "Speeding up the learning by precomputing features": 3460, "Creating a new data generator": None,
    "Viewing model prediction (qualitative analysis)": 3819, "Conclusion": None}
SAMPLE = ROOT / "sample"
VALID = sorted((SAMPLE / "valid").rglob("*.jpg"))
N, M = 16, 8  # train and valid images of the bundled sample
RESULTS = {"predictions": ((M,), "int64"), "all_proba": ((M, 2), "float32"), "all_classes": ((M,), "int64")}
ARRAYS = {
    "inputs_try": ((5, 3, 224, 224), "float32"), "labels_try": ((5,), "int64"), "probs_try": ((5, 1000), "float32"),
    "conv_feat_train": ((N, 512, 7, 7), "float32"), "conv_feat_valid": ((M, 512, 7, 7), "float32"),
    "labels_train": ((N,), "int64"), "labels_valid": ((M,), "int64"),
    **{f"{step}_{name}": kind for step in ("03", "04") for name, kind in RESULTS.items()}}
FIGURES = {
    "01_valid_batch", "01_train_batch", "02_predictions", "02_zero_shot", "02_images", "03_training", "03_valid_batch",
    "04_training", "04_valid_batch", "05_correct", "05_incorrect", "05_most_correct_cats", "05_most_correct_dogs",
    "05_most_incorrect_cats", "05_most_incorrect_dogs", "05_most_uncertain", "05_confusion", "05_histogram", "05_images"}


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """The five scripts cell by cell, each in one namespace, as a notebook's kernel runs them, with --show."""
    seen = SimpleNamespace(folder=tmp_path_factory.mktemp("cells"), names={}, shown=[], banners=[], markers=[])
    more = {"02_vgg_imagenet.py": ["--zero-shot", "--image", str(VALID[7])], "04_precompute.py": ["--epochs", "3"],
            "05_analysis.py": ["--image", str(VALID[7])]}
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        seen.figures = keep_figures(patch)
        plt.switch_backend("svg")  # any that is not the one for no display
        patch.setattr(plt, "show", lambda: seen.shown.append(plt.gcf()))
        patch.setattr(common, "banner", lambda *heading: seen.banners.append(heading))
        for name in SCRIPTS:
            patch.setattr(sys, "argv", [name, "--sample", "--show", "--pause", "--output-dir", str(seen.folder),
                                        *more.get(name, [])])
            before, *parts = re.split(r"^# %% (.*)\n", (ROOT / name).read_text(), flags=re.MULTILINE)
            variables = seen.names[name] = {"__name__": "__main__", "__doc__": ""}
            seen.markers += parts[::2]
            for part in (before, *parts[1::2]):
                exec(compile(textwrap.dedent(part), name, "exec"), variables)
        plt.switch_backend("Agg")
    return seen


def test_files_are_the_contracts_and_no_others(outputs):
    """Figures are not blank and fit a screen."""
    expected = {*(f"{name}.npy" for name in ARRAYS), *(f"{name}.png" for name in FIGURES), "02_zero_shot.json", "03_head.pt",
                "03_metrics.json", "04_head.pt", "04_metrics.json", "conv_feat_train.json", "conv_feat_valid.json"}
    assert {path.name for path in outputs[0].iterdir()} == expected
    for name, kind in ARRAYS.items():
        array = np.load(outputs[0] / f"{name}.npy", allow_pickle=False)
        assert (array.shape, array.dtype) == kind and np.isfinite(array).all(), name
        assert "prob" not in name or (np.allclose(array.sum(axis=1), 1, atol=1e-5) and (array >= 0).all()), name
    for name in FIGURES:
        image = Image.open(outputs[0] / f"{name}.png").convert("RGB")
        assert 400 <= image.width <= 2000 and 200 <= image.height <= 2000 and np.asarray(image).std() > 1, name
    for name, of in (("03", "images, in 03_finetune_head.py"), ("04", "features")):
        metrics = json_of(outputs[0] / f"{name}_metrics.json")
        assert metrics["weights"] == "imagenet" and metrics["pretrained"] is True
        assert f"an epoch on {of}: {metrics['seconds_per_epoch']:.3f} s" in outputs[1]["04_precompute.py"]


def test_cell_by_cell_gives_what_a_whole_run_gives(cells, outputs):
    for name in ARRAYS:
        assert np.array_equal(np.load(cells.folder / f"{name}.npy"), np.load(outputs[0] / f"{name}.npy")), name


def test_untrained_weights_are_marked(tmp_path, figures, capsys):
    """To the last line of each script, in the metrics and on every figure."""
    make_dataset(tmp_path / "sample", train=2, valid=1)
    for name in SCRIPTS[1:]:
        step, more = name[:2], ["--epochs", 1] if name[:2] in ("03", "04") else []
        run_here(name, "--sample", "--data-dir", tmp_path, "--output-dir", tmp_path, "--weights", "untrained", *more)
        printed = capsys.readouterr().out
        assert printed.splitlines()[-1].startswith("Done, untrained weights. Next")
        assert ("NOTICE: untrained weights" in printed) == (step != "05")
        assert not more or json_of(tmp_path / f"{step}_metrics.json")["pretrained"] is False
    assert len(figures) == 14
    for name, figure in figures.items():
        assert any("untrained weights" in text.get_text() for text in figure.findobj(Text)), name


def plain_vgg(file):
    """The notebook's own network: frozen, with a new last layer, which is the last step that is random."""
    model = models.vgg16()
    model.load_state_dict(torch.load(file, weights_only=True))
    for param in model.parameters():
        param.requires_grad = False
    torch.manual_seed(7)
    model.classifier[6] = nn.Linear(4096, 2)
    model.classifier.append(nn.LogSoftmax(dim=1))
    return model.eval()


def see(folder):
    return datasets.ImageFolder(folder, common.imagenet_format)


@torch.inference_mode()
def outputs_of(model, folder):
    return torch.cat([model(inputs) for inputs, _ in DataLoader(see(folder), batch_size=5)])


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("photos"), train=4, valid=6)


@pytest.fixture
def workers(monkeypatch):
    """How many workers each DataLoader is asked to start. None is started, which takes half a second."""
    asked = []
    recorder = property(lambda loader: 0, lambda loader, number: asked.append(number))
    monkeypatch.setattr(DataLoader, "num_workers", recorder, raising=False)
    return asked


def test_01_hears_its_options(photos, tmp_path, monkeypatch, figures, workers):
    """With the --output-dir from where the student is."""
    monkeypatch.chdir(tmp_path)
    names = run_here("01_data.py", "--data-dir", photos, "--output-dir", "here", "--limit", 6, "--seed", 5,
                     "--num-workers", 3)
    assert workers == [3, 3] and names["dset_sizes"] == {"train": 6, "valid": 2}
    torch.manual_seed(5)
    valid, labels = next(iter(DataLoader(Subset(see(photos / "valid"), [0, 6]), batch_size=5)))
    train, _ = next(iter(DataLoader(Subset(see(photos / "train"), [0, 1, 2, 4, 5, 6]), batch_size=64, shuffle=True)))
    assert np.array_equal(np.load(tmp_path / "here" / "inputs_try.npy"), valid)
    assert np.array_equal(np.load(tmp_path / "here" / "labels_try.npy"), labels) and torch.equal(names["inputs"], train)


@pytest.mark.parametrize("name, layer", [
    ("03_finetune_head.py", None), ("04_precompute.py", "conv"), ("04_precompute.py", "fc7")])
def test_03_and_04_are_plain_torchvision_to_the_last_bit(vgg_file, photos, tmp_path, figures, workers, name, layer):
    """The same seed before the new layer and before training; every option is heard; nothing else is trained."""
    torch.manual_seed(99)
    names = run_here(name, "--data-dir", photos, "--output-dir", tmp_path, "--seed", 7, "--epochs", 2, "--lr", 0.05,
                     "--batch-size", 3, "--num-workers", 3, *(["--layer", layer] if layer else []))
    assert workers == ([3, 3, 3, 3, 0, 0] if layer else [3, 3])  # in 04 also to compute features; none for the features
    model = plain_vgg(vgg_file).to(memory_format=torch.channels_last)
    trained, data = model, see(photos / "train")
    if layer:
        frozen = [model.features] if layer == "conv" else [model.features, nn.Flatten(), model.classifier[:6]]
        for x in ("train", "valid"):
            features, expected = np.load(tmp_path / f"{layer}_feat_{x}.npy"), outputs_of(nn.Sequential(*frozen), photos / x)
            assert features.shape == expected.shape and np.allclose(features, expected, atol=1e-4)
            assert np.array_equal(np.load(tmp_path / f"labels_{x}.npy"), see(photos / x).targets)
        trained = model.classifier if layer == "conv" else model.classifier[6:]
        rows = torch.from_numpy(np.load(tmp_path / f"{layer}_feat_train.npy")).flatten(1)
        data = TensorDataset(rows, torch.tensor(data.targets))

    optimizer = torch.optim.SGD(model.classifier[6].parameters(), lr=0.05)
    torch.manual_seed(7)
    trained.train()
    for _ in range(2):
        for inputs, classes in DataLoader(data, batch_size=3, shuffle=True):
            optimizer.zero_grad()
            nn.functional.nll_loss(trained(inputs), classes).backward()
            optimizer.step()
    head = torch.load(tmp_path / f"{name[:2]}_head.pt", weights_only=True)
    assert all(torch.equal(head[key], value) for key, value in model.classifier[6].state_dict().items())

    predictions, all_proba, all_classes = (np.load(tmp_path / f"{name[:2]}_{result}.npy") for result in RESULTS)
    assert np.allclose(all_proba, outputs_of(model.eval(), photos / "valid").exp(), atol=1e-4)
    assert np.array_equal(predictions, all_proba.argmax(axis=1)) and list(all_classes) == see(photos / "valid").targets
    assert names["idx"] == [0, 1, 2, 3, 8, 9, 10, 11]  # the first four cats, the last four dogs


def test_03_counts_what_training_has_changed(photos, tmp_path, figures, capsys):
    """Training that changes nothing by itself; three numbers of a frozen layer are harmed, and half of the last layer."""
    run_here("03_finetune_head.py", "--data-dir", photos, "--output-dir", tmp_path, "--lr", 0, edits={
        "    history = []\n": "    history = []\n    model_vgg.features[2].bias[:3] += 1\n"
                             "    model_vgg.classifier[6].weight.data[1] += 1\n"})
    n_frozen = sum(param.numel() for param in models.vgg16().parameters()) - 1000 * 4097
    assert re.findall(r"of ([\d,]+) (\w+) numbers ([\d,]+) changed", capsys.readouterr().out) == [
        (f"{n_frozen:,}", "frozen", "3"), ("8,194", "trainable", "4,096")]


def test_03_tells_the_size_of_each_block(outputs):
    model, x, expected = models.vgg16(), torch.zeros(1, 3, 224, 224), []
    for block in [*(model.features[i:j] for i, j in ((0, 5), (5, 10), (10, 17), (17, 24), (24, 31))),
                  nn.Sequential(nn.Flatten(), model.classifier[0]), model.classifier[3], model.classifier[6]]:
        x = block(x)
        n_params = sum(param.numel() for param in block.parameters())
        expected.append((str(tuple(x.shape[1:])), f"{n_params:,}"))
    rows = re.findall(r"^ +\d [a-z, ]+ (\(.*\)) +([\d,]+)$", outputs[1]["03_finetune_head.py"], re.MULTILINE)
    assert rows == expected


def cropped(path):
    """What the network sees of a file."""
    return np.asarray(transforms.CenterCrop(224)(Image.open(path).convert("RGB")))


def shown_in(axes):
    """The picture of an axes as 8-bit numbers, whether it was given so or in [0, 1]."""
    picture = np.asarray(axes.get_images()[0].get_array())
    return picture if picture.dtype == np.uint8 else np.uint8(np.round(255 * picture))


def in_grid(figure):
    """For each image of a row from make_grid: its file in the sample, and what is written over it."""
    files = {cropped(path).tobytes(): path for path in SAMPLE.rglob("*.jpg")}
    axes, = figure.axes
    row, texts = shown_in(axes), {int(text.get_position()[0] // 226): text.get_text() for text in axes.texts}
    return [(files[row[2:226, 226 * i + 2:226 * (i + 1)].tobytes()], texts[i]) for i in range(row.shape[1] // 226)]


def assert_shows(figure, paths, proba, seen=Image.open):
    """These images in this order, each under its own class, what was predicted, red where that is wrong, and its name."""
    for axes, path, p in zip(figure.axes, paths, proba, strict=True):
        assert np.array_equal(shown_in(axes), seen(path))
        true, pred = path.name.split(".")[0], ["cat", "dog"][p.argmax()]
        above, answer, below = axes.get_title().splitlines()
        assert (above, answer[:-5], below) == (f"true: {true}", f"predicted: {pred}, ", path.name)
        assert float(answer[-5:]) == pytest.approx(p.max(), abs=1e-3)
        assert axes.title.get_color() == ("black" if true == pred else "red")


def test_show_opens_each_figure_that_is_saved(cells):
    assert list(cells.figures.values()) == cells.shown and {name.removesuffix(".png") for name in cells.figures} == FIGURES


def test_pictures_stand_under_their_own_titles(cells):
    assert in_grid(cells.figures["01_valid_batch.png"]) == [(path, path.parent.name) for path in VALID[:5]]
    train, in_order = in_grid(cells.figures["01_train_batch.png"]), sorted((SAMPLE / "train").rglob("*.jpg"))[:8]
    assert len(train) == 8 and all(path.parent.name == name for path, name in train)
    assert [path for path, _ in train] != in_order  # they are shuffled
    probs = outputs_of(common.load_vgg16("imagenet").eval(), SAMPLE / "valid")[:5].softmax(dim=1).numpy()
    assert np.allclose(np.load(cells.folder / "probs_try.npy"), probs, atol=1e-4)
    answers = np.array(common.IMAGENET.meta["categories"])[probs.argmax(axis=1)]
    assert in_grid(cells.figures["02_predictions.png"]) == [
        (path, f"true: {path.parent.name[:-1]}\n{answer}\n{p:.3f}")
        for path, answer, p in zip(VALID[:5], answers, probs.max(axis=1), strict=True)]
    for step in ("03", "04"):
        all_proba = np.load(cells.folder / f"{step}_all_proba.npy")
        assert_shows(cells.figures[f"{step}_valid_batch.png"], VALID, all_proba, cropped)


def test_headings_are_the_lectures_in_the_order_of_the_video(cells):
    """Those with a minute of their own also wait for Enter where --pause is given."""
    assert cells.markers == list(HEADINGS)
    assert cells.banners == [(heading, seconds, True) if seconds else (heading,) for heading, seconds in HEADINGS.items()]


@pytest.mark.parametrize("name, typed", [  # as in the lecture's notebook
    ("01_data.py", "imshow(out, title=[dset_classes[x] for x in classes[0:n_images]])"),
    ("02_vgg_imagenet.py", """
        vals_try, preds_try = torch.max(m_softm(model_vgg(inputs_try)), dim=1)
        imshow(torchvision.utils.make_grid(inputs_try), [dset_classes[x] for x in labels_try.data.cpu()])"""),
    ("03_finetune_head.py", """
        optimizer_vgg = torch.optim.SGD(model_vgg.classifier[6].parameters(), lr=lr)
        train_model(model_vgg, loader_train, size=dset_sizes['train'], epochs=1, optimizer=optimizer_vgg)
        predictions, all_proba, all_classes = test_model(model_vgg, loader_valid, size=dset_sizes['valid'])"""),
    ("04_precompute.py", """
        conv_feat_valid, labels_valid = preconvfeat(loader_valid)
        assert conv_feat_valid.shape == (8, 512, 7, 7) and list(labels_valid) == [0] * 4 + [1] * 4
        train_model(model_vgg.classifier, loaderfeat_train, dset_sizes['train'], epochs=2, optimizer=optimizer_vgg)
        test_model(model_vgg.classifier, loaderfeat_valid, dset_sizes['valid'])"""),
    ("05_analysis.py", """
        idx = permutation(correct)[:n_view]
        DataLoader([dsets['valid'][x] for x in idx], batch_size=n_view), all_proba[correct_dogs, 0]""")])
def test_what_the_lecture_types_works_after_the_script(cells, name, typed):
    exec(textwrap.dedent(typed), cells.names[name])
    plt.close("all")


def test_python_i_stays_at_the_prompt(tmp_path):
    command = [sys.executable, "-i", ROOT / "03_finetune_head.py", "--sample", "--output-dir", tmp_path, "--epochs", "1"]
    typed = "print('there:', predictions.shape, len(dset_classes))\n1 / 0\nprint('still there')\n"
    done = subprocess.run(command, input=typed, capture_output=True, text=True)
    assert "there: (8,) 2" in done.stdout and "still there" in done.stdout and "ZeroDivisionError" in done.stderr


@pytest.mark.parametrize("name, defaults", [
    ("01_data.py", {"seed": 0, "from_kaggle": None}), ("02_vgg_imagenet.py", {"weights": "imagenet", "device": "auto"}),
    ("03_finetune_head.py", {"epochs": 2, "lr": 0.001, "batch_size": 64}),
    ("04_precompute.py", {"epochs": 50, "lr": 0.001, "batch_size": 128, "layer": "conv"}),
    ("05_analysis.py", {"n_view": 8, "step": None})])
def test_defaults_are_the_contracts_and_help_is_a_manual(monkeypatch, capsys, name, defaults):
    with pytest.raises(SystemExit, match="0"):
        run_here(name, "--help")
    assert script(name.removesuffix(".py")).__doc__ in capsys.readouterr().out
    found = {}
    monkeypatch.setattr(common, "parse_options", lambda parser: found.update(vars(parser.parse_args([]))) or sys.exit())
    with pytest.raises(SystemExit):
        run_here(name)
    assert {option: found[option] for option in defaults} == defaults


def test_the_sample_pictures_are_our_own(tmp_path):
    """tests/draw_sample.py draws what is in sample/: same names and, but for the JPEG encoder, the same pixels."""
    script("draw_sample").main(tmp_path)
    ours, drawn = (sorted(folder.rglob("*.jpg")) for folder in (SAMPLE, tmp_path))
    assert len(ours) == N + M
    for one, two in zip(ours, drawn, strict=True):
        assert one.relative_to(SAMPLE) == two.relative_to(tmp_path) and one.stat().st_size < 25_000
        assert np.abs(np.subtract(Image.open(one), Image.open(two), dtype=float)).mean() < 3


@pytest.mark.slow
def test_03_as_the_readme_runs_it_gives_the_lectures_numbers(real_run):
    """From a file of the form that torchvision offers: not zipped, 553 MB."""
    weights, folder, process = real_run
    assert not zipfile.is_zipfile(weights) and weights.stat().st_size > 500e6
    printed = process.communicate(timeout=240)[0]
    assert process.returncode == 0, printed
    assert "134,260,544 frozen numbers" in printed and "8,194" in printed and "102,764,544" in printed
    with small_vgg.real():
        model = plain_vgg(weights)
    model.classifier[6].load_state_dict(torch.load(folder / "03_head.pt", weights_only=True))
    assert np.allclose(np.load(folder / "03_all_proba.npy"), outputs_of(model, SAMPLE / "valid").exp(), atol=1e-4)
