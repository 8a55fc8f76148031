"""The five scripts as a student runs them, whole and cell by cell, on the bundled sample; their files, figures, names."""
import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
import textwrap
import zipfile
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import ROOT, make_dataset, run_here, script
from matplotlib.text import Text
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, TensorDataset
from torchvision import datasets, models, transforms

import common
import small_vgg

HEADINGS = {  # of the lecture, with their seconds in the video
    "01_data.py": [("Using CNN for dogs vs cats", 1175), ("Imports", None), ("Downloading the data", None),
                   ("Data processing", 1550)],
    "02_vgg_imagenet.py": [("Creating VGG Model", 2451)],
    "03_finetune_head.py": [("Modifying the last layer and setting the gradient false to all layers", 2755),
                            ("Training the fully connected module", 2990), ("Creating loss function and optimizer", None),
                            ("Training the model", None)],
    "04_precompute.py": [("Speeding up the learning by precomputing features", 3460), ("Creating a new data generator", None)],
    "05_analysis.py": [("Viewing model prediction (qualitative analysis)", 3819), ("Conclusion", None)],
}
SCRIPTS = list(HEADINGS)
N, M = 16, 8  # train and valid images of the bundled sample
ARRAYS = {
    "inputs_try.npy": ((5, 3, 224, 224), np.float32), "labels_try.npy": ((5,), np.int64), "probs_try.npy": ((5, 1000), np.float32),
    "conv_feat_train.npy": ((N, 512, 7, 7), np.float32), "conv_feat_valid.npy": ((M, 512, 7, 7), np.float32),
    "labels_train.npy": ((N,), np.int64), "labels_valid.npy": ((M,), np.int64),
    **{f"{step}_{name}.npy": value for step in ("03", "04") for name, value in {
        "predictions": ((M,), np.int64), "all_proba": ((M, 2), np.float32), "all_classes": ((M,), np.int64)}.items()},
}
FIGURES = ["01_valid_batch", "01_train_batch", "02_predictions", "02_zero_shot", "02_images", "03_training", "03_valid_batch",
           "04_training", "04_valid_batch", "05_correct", "05_incorrect", "05_most_correct_cats", "05_most_correct_dogs",
           "05_most_incorrect_cats", "05_most_incorrect_dogs", "05_most_uncertain", "05_confusion", "05_histogram", "05_images"]
VALID = sorted((ROOT / "sample" / "valid").rglob("*.jpg"))


def plain_vgg(weights):
    """The lecture's network from torchvision alone: frozen, with a new last layer as the last step of randomness."""
    model = models.vgg16()
    model.load_state_dict(torch.load(weights, weights_only=True))
    for param in model.parameters():
        param.requires_grad = False
    torch.manual_seed(7)
    model.classifier[6] = nn.Linear(4096, 2)
    model.classifier.append(nn.LogSoftmax(dim=1))
    return model.to(memory_format=torch.channels_last)


def plain_training(model, head, loader, epochs, lr):
    optimizer = torch.optim.SGD(head.parameters(), lr=lr)
    torch.manual_seed(7)
    model.train()
    for _ in range(epochs):
        for inputs, classes in loader:
            optimizer.zero_grad()
            nn.functional.nll_loss(model(inputs), classes).backward()
            optimizer.step()
    return model.eval()


def plain_loader(folder, **options):
    return DataLoader(datasets.ImageFolder(folder, common.imagenet_format), **options)


def load_head(path):
    return torch.load(path, weights_only=True)


def same_head(one, two):
    return all(torch.equal(one[name], two[name]) for name in ("weight", "bias"))


def keep_figures(patch, figures):
    """From now on figures are kept as they are, by name, instead of being drawn into files."""
    save = common.save
    patch.setattr(common, "save", lambda folder, files: (save(folder, files), figures.update(files))[0])
    patch.setitem(common.WRITERS, ".png", lambda file, figure: None)


@pytest.fixture(scope="module")
def cells(torch_home, tmp_path_factory):
    """The five scripts cell by cell, each in one namespace, as a notebook's kernel runs them, with --show."""
    seen = SimpleNamespace(folder=tmp_path_factory.mktemp("cells"), names={}, files={}, shown=[], banners={}, markers={})
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        keep_figures(patch, seen.files)
        plt.switch_backend("svg")  # any that is not the one for no display
        patch.setattr(plt, "show", lambda: seen.shown.append(plt.gcf()))
        for name in SCRIPTS:
            banners = seen.banners[name] = []
            patch.setattr(common, "banner", lambda *heading, to=banners: to.append(heading))
            patch.setattr(sys, "argv", [name, "--sample", "--show", "--pause", "--output-dir", str(seen.folder),
                                        *(["--epochs", "3"] if name[:2] == "04" else [])])
            before, *parts = re.split(r"^# %% (.*)\n", (ROOT / name).read_text(), flags=re.MULTILINE)
            seen.markers[name], variables = parts[::2], {"__name__": "__main__", "__doc__": ""}
            for part in (before, *parts[1::2]):
                exec(compile(textwrap.dedent(part), name, "exec"), variables)
            seen.names[name] = variables
        plt.switch_backend("Agg")
    return seen


# ------------------------------------------------------------------------------------------------- what a run leaves
@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_are_the_contracts(outputs, name):
    array = np.load(outputs[0] / name, allow_pickle=False)
    assert (array.shape, array.dtype) == ARRAYS[name] and np.isfinite(array).all()
    if "prob" in name:
        assert np.allclose(array.sum(axis=1), 1, atol=1e-5) and (array >= 0).all()


def test_nothing_else_is_left(outputs):
    expected = {*ARRAYS, *(f"{name}.png" for name in FIGURES), "03_head.pt", "04_head.pt", "03_metrics.json",
                "04_metrics.json", "02_zero_shot.json", "conv_feat_train.json", "conv_feat_valid.json"}
    assert {path.name for path in outputs[0].iterdir()} == expected


@pytest.mark.parametrize("name", FIGURES)
def test_figures_fit_a_screen(outputs, name):
    image = Image.open(outputs[0] / f"{name}.png").convert("RGB")
    assert 400 <= image.width <= 2000 and 200 <= image.height <= 2000 and np.asarray(image).std() > 1  # not blank


@pytest.mark.parametrize("step, epochs", [("03", 2), ("04", 3)])
def test_results_belong_together(outputs, step, epochs):
    predictions, all_proba, all_classes = (
        np.load(outputs[0] / f"{step}_{name}.npy") for name in ("predictions", "all_proba", "all_classes"))
    metrics = json.loads((outputs[0] / f"{step}_metrics.json").read_text())
    assert np.array_equal(all_classes, [0] * 4 + [1] * 4) and np.array_equal(predictions, all_proba.argmax(axis=1))
    assert metrics["valid_accuracy"] == pytest.approx((predictions == all_classes).mean())
    assert metrics["valid_loss"] == pytest.approx(-np.log(all_proba[np.arange(M), all_classes]).mean(), abs=1e-5)
    assert metrics["pretrained"] and metrics["weights"] == "imagenet" and metrics["options"]["epochs"] == epochs
    assert len(metrics["train_loss"]) == len(metrics["train_accuracy"]) == epochs
    assert metrics["seconds_per_epoch"] * epochs == pytest.approx(metrics["train_seconds"])


def test_the_first_batch_and_its_probabilities(outputs, vgg_file):
    inputs, labels = next(iter(plain_loader(ROOT / "sample" / "valid", batch_size=5)))
    model = models.vgg16()
    model.load_state_dict(torch.load(vgg_file, weights_only=True))
    with torch.inference_mode():
        probs = torch.softmax(model.eval()(inputs), dim=1).numpy()
    assert np.array_equal(np.load(outputs[0] / "inputs_try.npy"), inputs)
    assert np.array_equal(np.load(outputs[0] / "labels_try.npy"), labels)
    assert np.abs(np.load(outputs[0] / "probs_try.npy") - probs).max() < 1e-4


def test_cell_by_cell_gives_what_a_whole_run_gives(cells, outputs):
    for name in ARRAYS:
        assert np.array_equal(np.load(cells.folder / name), np.load(outputs[0] / name)), name
    for name in ("03_head.pt", "04_head.pt"):
        assert same_head(load_head(cells.folder / name), load_head(outputs[0] / name))


def test_untrained_weights_are_marked(torch_home, tmp_path, monkeypatch, capsys):
    """To the last line of each script, in the metrics and on every figure."""
    make_dataset(tmp_path / "sample", train=2, valid=1)
    keep_figures(monkeypatch, files := {})
    for name in SCRIPTS[1:]:
        run_here(name, "--sample", "--data-dir", tmp_path, "--output-dir", tmp_path / "out", "--weights", "untrained",
                 *(["--epochs", 1] if name[:2] in ("03", "04") else []))
        printed = capsys.readouterr().out
        assert printed.splitlines()[-1].startswith("Done, untrained weights. Next")
        assert ("NOTICE: untrained weights" in printed) == (name[:2] != "05")
    assert not files["03_metrics.json"]["pretrained"] and not files["04_metrics.json"]["pretrained"]
    for name in (name for name in files if name.endswith(".png")):
        assert any("untrained weights" in text.get_text() for text in files[name].findobj(Text)), name


# ------------------------------------------------------------------------------- training, against plain torchvision
@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("photos"), train=4, valid=6)


OPTIONS = ["--seed", 7, "--epochs", 2, "--lr", 0.05, "--batch-size", 3, "--num-workers", 1]


def test_03_is_plain_torchvision_to_the_last_bit(vgg_file, photos, tmp_path):
    """The same seed before the new layer and before training; every option is heard; nothing else is trained."""
    torch.manual_seed(99)
    ours = run_here("03_finetune_head.py", "--data-dir", photos, "--output-dir", tmp_path, *OPTIONS)
    model = plain_vgg(vgg_file)
    plain_training(model, model.classifier[6], plain_loader(photos / "train", batch_size=3, shuffle=True), 2, 0.05)
    assert same_head(load_head(tmp_path / "03_head.pt"), model.classifier[6].state_dict())
    with torch.inference_mode():
        proba = torch.cat([model(inputs).exp() for inputs, _ in plain_loader(photos / "valid", batch_size=5)])
    assert np.allclose(np.load(tmp_path / "03_all_proba.npy"), proba, atol=1e-6)
    assert ours["loader_train"].num_workers == ours["loader_valid"].num_workers == 1
    assert ours["idx"] == [0, 1, 2, 3, 8, 9, 10, 11]  # the first four cats, the last four dogs


@pytest.mark.parametrize("layer", ["conv", "fc7"])
def test_04_is_plain_torchvision_on_its_features(vgg_file, photos, tmp_path, layer):
    torch.manual_seed(99)
    ours = run_here("04_precompute.py", "--data-dir", photos, "--output-dir", tmp_path, "--layer", layer, *OPTIONS)
    model = plain_vgg(vgg_file).eval()
    frozen = nn.Sequential(model.features, *([] if layer == "conv" else [nn.Flatten(), model.classifier[:6]]))
    trained = model.classifier if layer == "conv" else model.classifier[6:]
    for x in ("train", "valid"):
        features = np.load(tmp_path / f"{layer}_feat_{x}.npy")
        with torch.inference_mode():
            expected = torch.cat([frozen(inputs) for inputs, _ in plain_loader(photos / x, batch_size=5)]).numpy()
        assert features.shape == expected.shape and np.abs(features - expected).max() < 1e-4
        assert np.array_equal(np.load(tmp_path / f"labels_{x}.npy"), datasets.ImageFolder(photos / x).targets)
    rows = torch.from_numpy(np.load(tmp_path / f"{layer}_feat_train.npy")).flatten(1)
    data = TensorDataset(rows, torch.from_numpy(np.load(tmp_path / "labels_train.npy")))
    plain_training(trained, model.classifier[6], DataLoader(data, batch_size=3, shuffle=True), 2, 0.05)
    assert same_head(load_head(tmp_path / "04_head.pt"), model.classifier[6].state_dict())
    with torch.inference_mode():
        proba = torch.cat([model(inputs).exp() for inputs, _ in plain_loader(photos / "valid", batch_size=5)])
    assert np.abs(np.load(tmp_path / "04_all_proba.npy") - proba.numpy()).max() < 1e-4
    assert ours["loader"].num_workers == 1 and ours["idx"] == [0, 1, 2, 3, 8, 9, 10, 11]


def test_04_goes_on_from_03_only_where_every_field_of_the_record_is_the_same(outputs, tmp_path, monkeypatch):
    """With a learning rate of 0 the layer stays what it began as: 03's, or a new one."""
    folder = shutil.copytree(outputs[0], tmp_path / "out")
    keep_figures(monkeypatch, files := {})
    metrics, head_03 = json.loads((folder / "03_metrics.json").read_text()), load_head(folder / "03_head.pt")
    assert set(metrics["made_from"]) == {"transform", "train images", "valid images", "frozen layers", "precision"}
    for field in [None, *metrics["made_from"]]:
        other = {**metrics, "made_from": {**metrics["made_from"], **({field: "another"} if field else {})}}
        (folder / "03_metrics.json").write_text(json.dumps(other))
        run_here("04_precompute.py", "--sample", "--output-dir", folder, "--epochs", 1, "--lr", 0)
        assert json.loads((folder / "04_metrics.json").read_text())["from_03_head"] == (field is None)
        assert same_head(load_head(folder / "04_head.pt"), head_03) == (field is None), field
        assert len(files["04_training.png"].axes) == (3 if field is None else 2)  # speeds of unlike runs aren't compared


@pytest.mark.parametrize("on_images, paid", [(10.5, "paid for itself after epoch 10\n"), (0, "not paid for itself\n")])
def test_what_precomputing_saves(outputs, tmp_path, monkeypatch, capsys, on_images, paid):
    """Features that took 95 s, and save 10 s or a little more in each epoch."""
    folder = shutil.copytree(outputs[0], tmp_path / "out")
    keep_figures(monkeypatch, files := {})
    for name, changes in (("03_metrics.json", {"seconds_per_epoch": on_images}),
                          ("conv_feat_train.json", {"images_per_second": N / 95})):
        (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **changes}))
    run_here("04_precompute.py", "--sample", "--output-dir", folder, "--epochs", 2)
    assert paid in capsys.readouterr().out
    loss, accuracy, bars = files["04_training.png"].axes
    metrics = json.loads((folder / "04_metrics.json").read_text())
    assert [bar.get_height() for bar in bars.patches] == [metrics["seconds_per_epoch"], on_images]
    assert np.array_equal(loss.lines[0].get_ydata(), metrics["train_loss"])
    assert np.array_equal(accuracy.lines[0].get_ydata(), metrics["train_accuracy"])


# --------------------------------------------------------------------------------------------- what 03 tells in numbers
def numbers_about_change(printed):
    return {number for line in printed.splitlines() if "changed" in line for number in re.findall(r"[\d,]*\d", line)}


def n_below_the_last_layer():
    return f"{sum(param.numel() for param in models.vgg16().parameters()) - 1000 * 4097:,}"


def test_03_counts_what_training_has_changed(photos, torch_home, tmp_path, monkeypatch, capsys):
    """Another train_model, which harms a frozen layer and trains half of the last one."""
    def train_model(model, *args, history, **kwargs):
        history.append((0.7, 0.5, 1.0))
        with torch.no_grad():
            model.features[2].bias[:3] += 1
            model.classifier[6].weight[1] += 1

    monkeypatch.setattr(common, "train_model", train_model)
    run_here("03_finetune_head.py", "--data-dir", photos, "--output-dir", tmp_path)
    assert numbers_about_change(capsys.readouterr().out) == {"3", n_below_the_last_layer(), "4,096", "8,194"}


def test_03_changes_the_new_numbers_alone(outputs):
    torch.manual_seed(0)
    fresh, head = nn.Linear(4096, 2).state_dict(), load_head(outputs[0] / "03_head.pt")
    n_changed = sum(int((head[name] != fresh[name]).sum()) for name in head)
    printed = outputs[1]["03_finetune_head.py"]
    assert numbers_about_change(printed) == {"0", n_below_the_last_layer(), f"{n_changed:,}", "8,194"} and n_changed > 4096


def test_03_tells_the_size_of_each_block(outputs):
    expected, n_params = [], 0

    def count(layer, inputs, output):
        nonlocal n_params
        n_params += sum(param.numel() for param in layer.parameters())
        if isinstance(layer, (nn.MaxPool2d, nn.Linear)):
            expected.append((str(tuple(output.shape[1:])), f"{n_params:,}"))
            n_params = 0

    model = models.vgg16()
    for layer in model.modules():
        if not list(layer.children()):
            layer.register_forward_hook(count)
    model(torch.zeros(1, 3, 224, 224))
    rows = re.findall(r"^ +\d [a-z, ]+ (\(.*\)) +([\d,]+)$", outputs[1]["03_finetune_head.py"], re.MULTILINE)
    assert rows == expected and len(rows) == 8


# ----------------------------------------------------------------------------------------------------------- figures
def pixels(path):
    """What the network sees of a file, in [0, 1]."""
    return np.asarray(transforms.CenterCrop(224)(Image.open(path).convert("RGB"))) / 255


def drawn(ax):
    return np.asarray(ax.get_images()[0].get_array())


def test_show_opens_each_figure_that_is_saved(cells):
    saved = [content for name, content in cells.files.items() if name.endswith(".png")]
    assert len(saved) > 10 and cells.shown == saved


@pytest.mark.parametrize("part, n_images", [("valid", 5), ("train", 8)])
def test_01_writes_the_class_over_each_image(cells, part, n_images):
    ax = cells.files[f"01_{part}_batch.png"].axes[0]
    files, names = sorted((ROOT / "sample" / part).rglob("*.jpg")), []
    texts = {int(text.get_position()[0] // 226): text.get_text() for text in ax.texts}  # each image is 226 wide, with its frame
    for i in range(n_images):
        image = drawn(ax)[2:226, 226 * i + 2:226 * (i + 1)]
        found = [path for path in files if np.allclose(pixels(path), image, atol=1e-5)]
        assert len(found) == 1 and texts[i] == found[0].parent.name
        names.append(found[0])
    assert len(texts) == n_images and (names == files[:n_images]) == (part == "valid")  # those to train are shuffled


def test_02_tells_class_and_answer_over_each_image(cells):
    probs, categories = np.load(cells.folder / "probs_try.npy"), common.IMAGENET.meta["categories"]
    axes = cells.files["02_predictions.png"].axes
    for ax, path, row in zip(axes, VALID, probs, strict=False):
        assert np.allclose(drawn(ax), pixels(path), atol=1e-5)
        assert ax.get_title() == f"true: {path.parent.name[:-1]}\n{categories[row.argmax()]}, {row.max():.3f}"
    assert len(axes) == 5


@pytest.mark.parametrize("step", ["03", "04"])
def test_predictions_stand_over_their_images(cells, step):
    all_proba, axes = np.load(cells.folder / f"{step}_all_proba.npy"), cells.files[f"{step}_valid_batch.png"].axes
    for ax, path, proba in zip(axes, VALID, all_proba, strict=True):
        assert np.allclose(drawn(ax), pixels(path), atol=1e-5)
        true, pred = path.parent.name[:-1], ["cat", "dog"][proba.argmax()]
        title = re.fullmatch(rf"true: {true}\npredicted: {pred}, (\d\.\d+)\n{path.name}", ax.get_title())
        assert float(title[1]) == pytest.approx(proba.max(), abs=2e-3)
        assert ax.title.get_color() == ("black" if true == pred else "red")


# -------------------------------------------------------------------------------------------- the lecture, at the prompt
def test_headings_are_the_lectures_in_the_order_of_the_video(cells):
    """Those with a minute of their own also wait for Enter where --pause is given."""
    for name, headings in HEADINGS.items():
        assert cells.banners[name] == [(heading, seconds, True) if seconds else (heading,) for heading, seconds in headings]
    assert cells.markers == {name: [heading for heading, _ in headings] for name, headings in HEADINGS.items()}


def test_01_and_the_other_scripts_see_images_alike(cells):
    assert repr(cells.names["01_data.py"]["imagenet_format"]) == repr(common.imagenet_format)


def test_loaders_shuffle_to_train_alone(cells):
    for name, kind in (("01_data.py", "loader"), ("03_finetune_head.py", "loader"), ("04_precompute.py", "loaderfeat")):
        assert type(cells.names[name][f"{kind}_train"].sampler) is RandomSampler
        assert type(cells.names[name][f"{kind}_valid"].sampler) is SequentialSampler


TYPED = {  # as in the lecture's notebook
    "01_data.py": "imshow(out, title=[dset_classes[x] for x in classes[0:n_images]]); dsets['train'].imgs[:5]; device; data_dir",
    "02_vgg_imagenet.py": "vals_try, preds_try = torch.max(m_softm(model_vgg(inputs_try)), dim=1); dic_imagenet[preds_try[0]]; "
                          "imshow(torchvision.utils.make_grid(inputs_try), [dset_classes[x] for x in labels_try.data.cpu()])",
    "03_finetune_head.py": "optimizer_vgg = torch.optim.SGD(model_vgg.classifier[6].parameters(), lr=lr); train_model(model_vgg, "
                           "loader_train, size=dset_sizes['train'], epochs=1, optimizer=optimizer_vgg); predictions, all_proba, "
                           "all_classes = test_model(model_vgg, loader_valid, size=dset_sizes['valid']); classes[:n_images]",
    "04_precompute.py": "train_model(model_vgg.classifier, dataloader=loaderfeat_train, size=dset_sizes['train'], epochs=2, "
                        "optimizer=optimizer_vgg); test_model(model_vgg.classifier, loaderfeat_valid, dset_sizes['valid'])",
    "05_analysis.py": "idx = permutation(correct)[:n_view]; [dsets['valid'].imgs[x][0] for x in idx]; torch.utils.data.DataLoader("
                      "[dsets['valid'][x] for x in idx], batch_size=n_view); most_correct_cats, all_proba[correct_dogs, 0]",
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_the_lecture_types_works_after_the_script(cells, name):
    exec(TYPED[name], cells.names[name])
    plt.close("all")


def test_preconvfeat_gives_features_and_labels_of_a_loader(cells):
    names = cells.names["04_precompute.py"]
    exec("conv_feat_valid, labels_valid = preconvfeat(loader_valid)", names)
    assert names["conv_feat_valid"].shape == (M, 512, 7, 7) and list(names["labels_valid"]) == [0] * 4 + [1] * 4
    assert np.allclose(names["conv_feat_valid"], np.load(cells.folder / "conv_feat_valid.npy"), atol=1e-4)
    exec("conv_feat_train, labels_train = preconvfeat(loader_train)", names)
    assert names["conv_feat_train"].shape == (N, 512, 7, 7) and sum(names["labels_train"]) == N / 2


def test_python_i_stays_at_the_prompt(torch_home, tmp_path):
    command = [sys.executable, "-i", ROOT / "03_finetune_head.py", "--sample", "--output-dir", tmp_path, "--epochs", "1"]
    typed = "print('there:', predictions.shape, len(dset_classes))\n1 / 0\nprint('still there')\n"
    done = subprocess.run(command, input=typed, capture_output=True, text=True)
    assert "there: (8,) 2" in done.stdout and "still there" in done.stdout and "ZeroDivisionError" in done.stderr


# ------------------------------------------------------------------------------------------------------ command lines
def test_01_hears_its_options(tmp_path, monkeypatch):
    """--seed, --num-workers, and an --output-dir from where the student is."""
    monkeypatch.chdir(tmp_path)
    names = run_here("01_data.py", "--sample", "--output-dir", "here", "--seed", 5, "--num-workers", 1)
    loaders = [plain_loader(ROOT / "sample" / x, batch_size=64, shuffle=x == "train") for x in ("valid", "train")]
    torch.manual_seed(5)
    (inputs, _), (expected, _) = (next(iter(loader)) for loader in loaders)
    assert torch.equal(names["inputs"], expected) and names["loader_train"].num_workers == 1
    assert np.array_equal(np.load(tmp_path / "here" / "inputs_try.npy"), inputs[:5])


def test_01_limits_the_images(photos, tmp_path):
    names = run_here("01_data.py", "--data-dir", photos, "--output-dir", tmp_path, "--limit", 2)
    assert names["dset_sizes"] == {"train": 2, "valid": 2}


COMMON = {"sample": False, "limit": None, "data_dir": None, "output_dir": None, "seed": 0, "num_workers": None,
          "show": False, "pause": False}
NETWORK = {**COMMON, "device": "auto", "weights": "imagenet", "bf16": False}


@pytest.mark.parametrize("name, defaults", [*zip(SCRIPTS, [
    {**COMMON, "from_kaggle": None}, {**NETWORK, "zero_shot": False, "image": []},
    {**NETWORK, "epochs": 2, "lr": 0.001, "batch_size": 64},
    {**NETWORK, "epochs": 50, "lr": 0.001, "batch_size": 128, "layer": "conv"},
    {**NETWORK, "step": None, "n_view": 8, "image": [], "submission": False}], strict=True)])
def test_options_are_the_contracts(monkeypatch, name, defaults):
    found = []
    monkeypatch.setattr(common, "parse_options", lambda parser: (found.append(vars(parser.parse_args([]))), sys.exit()))
    with pytest.raises(SystemExit):
        run_here(name)
    assert found == [defaults]


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_is_a_manual_with_an_example(name, capsys):
    module = script(name.removesuffix(".py"))
    assert not hasattr(module, "args")  # to import it, as workers do, runs nothing
    with pytest.raises(SystemExit) as ended:
        run_here(name, "--help")
    printed = capsys.readouterr().out
    assert ended.value.code == 0 and module.__doc__ in printed and "--limit N" in printed
    assert f"python {name} --sample" in printed and f"https://youtu.be/ZhC-DIrCe6A?t={HEADINGS[name][0][1]}" in printed


@pytest.mark.parametrize("name, option, value", [
    ("01_data.py", "--seed", -1), ("02_vgg_imagenet.py", "--device", "gpu"), ("03_finetune_head.py", "--epochs", 0),
    ("03_finetune_head.py", "--epochs", "two"), ("03_finetune_head.py", "--lr", "nan"), ("04_precompute.py", "--batch-size", 0),
    ("04_precompute.py", "--layer", "fc6"), ("05_analysis.py", "--n-view", 101)])
def test_wrong_options_end_with_2(name, option, value, capsys):
    with pytest.raises(SystemExit) as ended:
        run_here(name, "--sample", option, value)
    assert ended.value.code == 2 and f"argument {option}: " in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ the repository
def test_nothing_but_the_contract_at_the_top_level():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    allowed = {*SCRIPTS, "common.py", "sample", "tests", "requirements.txt", "README.md", "LICENSE"}
    assert {top for name in tracked.stdout.split() if not (top := name.split("/")[0]).startswith(".")} == allowed


def test_the_sample_pictures_are_our_own(tmp_path):
    """tests/draw_sample.py draws what is in sample/: same names and, but for the JPEG encoder, the same pixels."""
    script("draw_sample").main(tmp_path)
    ours, theirs = ([*sorted(path.relative_to(folder) for path in folder.rglob("*.jpg"))] for folder in (ROOT / "sample", tmp_path))
    assert ours == theirs and len(ours) == N + M
    for path in ours:
        one, two = (np.asarray(Image.open(folder / path), dtype=float) for folder in (ROOT / "sample", tmp_path))
        assert np.abs(one - two).mean() < 3 and (ROOT / "sample" / path).stat().st_size < 25_000


# --------------------------------------------------------------------------------------------------- the real network
@pytest.mark.slow
def test_03_as_the_readme_runs_it_gives_the_lectures_numbers(real_run):
    """From a file of the form that torchvision offers: not zipped, 553 MB."""
    weights, folder, process = real_run
    assert not zipfile.is_zipfile(weights) and weights.stat().st_size > 500e6
    printed = process.communicate(timeout=240)[0]
    assert process.returncode == 0, printed
    assert "134,260,544 frozen numbers" in printed and "8,194" in printed and "102,764,544" in printed

    with small_vgg.real():
        model = plain_vgg(weights).to(memory_format=torch.contiguous_format).eval()  # the notebook's own network
    model.classifier[6].load_state_dict(load_head(folder / "03_head.pt"))
    with torch.inference_mode():
        proba = torch.cat([model(inputs).exp() for inputs, _ in plain_loader(ROOT / "sample" / "valid", batch_size=5)])
    assert np.abs(np.load(folder / "03_all_proba.npy") - proba.numpy()).max() < 1e-4
