"""The five scripts as a student runs them: files, numbers, figures, options, and the prompt afterwards."""
import contextlib
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import zipfile
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import (PHOTO, SAMPLE, SCRIPTS, analyse, arguments, dsets_of, fake_results, json_of, keep_figures,
                      make_dataset, message, run_here, script)
from matplotlib.text import Text
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchvision import datasets, models, transforms

import common
import small_vgg

HEADINGS = {  # of the lecture, in the order of the video, with their seconds in it
    "Using CNN for dogs vs cats": 1175, "Imports": None, "Downloading the data": None, "Data processing": 1550,
    "Creating VGG Model": 2451, "Modifying the last layer and setting the gradient false to all layers": 2755,
    "Training the fully connected module": 2990, "Creating loss function and optimizer": None,
    "Training the model": None, "Speeding up the learning by precomputing features": 3460,
    "Creating a new data generator": None, "Viewing model prediction (qualitative analysis)": 3819, "Conclusion": None}
TRAIN, VALID = (sorted((SAMPLE / x).rglob("*.jpg")) for x in ["train", "valid"])  # 16 and 8 images
RESULTS = {"predictions": ((8,), "int64"), "all_proba": ((8, 2), "float64"), "all_classes": ((8,), "int64")}
ARRAYS = {
    "inputs_try": ((5, 3, 224, 224), "float32"), "labels_try": ((5,), "int64"), "probs_try": ((5, 1000), "float32"),
    "conv_feat_train": ((16, 512, 7, 7), "float32"), "conv_feat_valid": ((8, 512, 7, 7), "float32"),
    "labels_train": ((16,), "int64"), "labels_valid": ((8,), "int64"),
    **{f"{step}_{name}": kind for step in ("03", "04") for name, kind in RESULTS.items()}}
FIGURES = {  # without .png
    "01_valid_batch", "01_train_batch", "02_predictions", "02_zero_shot", "02_images", "03_blocks", "03_training",
    "03_valid_batch", "04_training", "04_valid_batch", *(f"05_{view}" for view in [
        "correct", "incorrect", "most_correct_cats", "most_correct_dogs", "most_incorrect_cats",
        "most_incorrect_dogs", "most_uncertain", "confusion", "histogram", "images"])}
OTHERS = {"02_zero_shot.json", "03_head.pt", "03_metrics.json", "04_head.pt", "04_metrics.json", "conv_feat_train.json",
          "conv_feat_valid.json"}


def plain_vgg(file, seed):
    """The notebook's own network: frozen, with a new last layer, the only random one."""
    model = models.vgg16()
    model.load_state_dict(torch.load(file, weights_only=True))
    model.requires_grad_(False)
    torch.manual_seed(seed)
    model.classifier[6] = nn.Linear(4096, 2)
    model.classifier.append(nn.LogSoftmax(dim=1))
    return model.eval()


def see(folder):
    return datasets.ImageFolder(folder, common.imagenet_format)


@torch.inference_mode()
def outputs_of(model, folder):
    return torch.cat([model(inputs) for inputs, _ in DataLoader(see(folder), batch_size=5)])


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
    row, texts = shown_in(axes), {int(text.get_position()[0] // 226): text.get_text() for text in axes.texts}
    return [(files[row[2:226, 226 * i + 2:226 * (i + 1)].tobytes()], texts[i]) for i in range(row.shape[1] // 226)]


def assert_shows(figure, paths, proba, seen=Image.open):
    """These images in this order; above each its class, the prediction, in red if it is wrong, and the file's name."""
    for axes, path, p in zip(figure.axes, paths, proba, strict=True):
        true, pred = path.name.split(".")[0], ["cat", "dog"][p.argmax()]
        assert axes.get_title() == f"true: {true}\npredicted: {pred}, {p.max():.3f}\n{path.name}"
        assert axes.title.get_color() == ("black" if true == pred else "red")
        assert np.array_equal(shown_in(axes), seen(path))


def test_the_files_are_those_of_the_contract_and_no_others(lesson):
    """A student's own code, and the next script, depend on names, shapes and types."""
    names = {path.name for path in lesson.folder.iterdir()}
    assert names == {f"{name}.npy" for name in ARRAYS} | {f"{name}.png" for name in FIGURES} | OTHERS
    arrays = {name: np.load(lesson.folder / f"{name}.npy", allow_pickle=False) for name in ARRAYS}
    assert {name: (array.shape, array.dtype.name) for name, array in arrays.items()} == ARRAYS
    for name in ["probs_try", "03_all_proba", "04_all_proba"]:
        assert np.allclose(arrays[name].sum(axis=1), 1, atol=1e-5) and arrays[name].min() >= 0
    for name in FIGURES:
        image = Image.open(lesson.folder / f"{name}.png").convert("RGB")
        assert 400 <= image.width <= 2000 and 200 <= image.height <= 2000 and np.asarray(image).std() > 1, name


def test_headings_are_the_lectures_and_show_opens_each_figure(lesson):
    """Each heading is a cell and a banner; --pause waits at those that have a time in the video."""
    assert lesson.markers == list(HEADINGS)
    assert lesson.banners == [(text, time, True) if time else (text,) for text, time in HEADINGS.items()]
    assert list(lesson.figures.values()) == lesson.shown and {name[:-4] for name in lesson.figures} == FIGURES


def test_images_and_curves_stand_under_their_own_titles(lesson):
    """A wrong title would make a right network look wrong."""
    figures = lesson.figures
    assert in_grid(figures["01_valid_batch.png"]) == [(path, path.parent.name) for path in VALID[:5]]
    train = in_grid(figures["01_train_batch.png"])
    assert len(train) == 8 and all(path.parent.name == name for path, name in train)
    assert [path for path, _ in train] != TRAIN[:8]  # they are shuffled
    probs = outputs_of(common.load_vgg16("imagenet").eval(), SAMPLE / "valid")[:5].softmax(dim=1).numpy()
    assert np.allclose(np.load(lesson.folder / "probs_try.npy"), probs, atol=1e-4)
    assert in_grid(figures["02_predictions.png"]) == [
        (path, f"true: {path.parent.name[:-1]}\n{common.IMAGENET.meta['categories'][p.argmax()]}\n{p.max():.3f}")
        for path, p in zip(VALID[:5], probs, strict=True)]
    for step, of in [("03", "images"), ("04", "features")]:
        proba = np.load(lesson.folder / f"{step}_all_proba.npy")
        assert_shows(figures[f"{step}_valid_batch.png"], VALID, proba, cropped)
        training, metrics = figures[f"{step}_training.png"], json_of(lesson.folder / f"{step}_metrics.json")
        assert list(training.axes[0].lines[0].get_ydata()) == metrics["train_loss"]
        assert training.get_suptitle() == f"Training the last layer on {of}"


def test_the_image_is_shown_after_each_block(lesson):
    """The lecture's picture of VGG16: a student reads off where the image shrinks, and where the parameters are."""
    model, x = common.load_vgg16("imagenet").requires_grad_(False), see(SAMPLE / "valid")[0][0][None]
    first, *others = lesson.figures["03_blocks.png"].axes
    assert first.get_title() == "input" and np.array_equal(shown_in(first), cropped(VALID[0])) and len(others) == 5
    dense = [nn.Sequential(nn.Flatten(), *model.classifier[:2]), model.classifier[3:5], model.classifier[6]]
    blocks = [model.features[i:j] for i, j in [(0, 5), (5, 10), (10, 17), (17, 24), (24, 31)]] + dense
    for i, (block, axes) in enumerate(zip(blocks, others + [None] * 3, strict=True), 1):
        x = block(x)
        shape, n = " x ".join(map(str, x.shape[1:])), sum(param.numel() for param in block.parameters())
        assert re.search(rf"^  block {i}: .{{24}} {shape} +{n:,}$", lesson.printed["03_finetune_head.py"], re.M)
        assert axes is None or (axes.get_title(), axes.get_xlabel()) == (f"block {i}", f"{shape}\n{n:,} parameters")
        assert axes is None or np.allclose(axes.get_images()[0].get_array(), x[0].mean(dim=0), atol=1e-5)


@pytest.mark.parametrize("name, typed", [  # as in the lecture's notebook
    ("01", "imshow(out, title=[dset_classes[x] for x in classes[0:n_images]]); nn, models, transforms, inputs_try"),
    ("02", "vals_try, preds_try = torch.max(m_softm(model_vgg(inputs_try)), dim=1); dic_imagenet[preds_try[0]]"),
    ("03", """
        optimizer_vgg = torch.optim.SGD(model_vgg.classifier[6].parameters(), lr=lr)
        train_model(model_vgg, loader_train, size=dset_sizes['train'], epochs=1, optimizer=optimizer_vgg)
        predictions, all_proba, all_classes = test_model(model_vgg, loader_valid, size=dset_sizes['valid'])
        assert predictions.shape == (8,) and list(all_classes) == [0] * 4 + [1] * 4"""),
    ("04", """
        in_order = conv_feat_train
        conv_feat_train, labels_train = preconvfeat(loader_train)
        dog = [np.abs(in_order - x).max(axis=(1, 2, 3)).argmin() >= 8 for x in conv_feat_train]
        assert list(labels_train) == dog and sorted(dog) != dog and conv_feat_train.shape == (16, 512, 7, 7)
        train_model(model_vgg.classifier, loaderfeat_train, dset_sizes['train'], epochs=2, optimizer=optimizer_vgg)
        test_model(model_vgg.classifier, loaderfeat_valid, dset_sizes['valid'])"""),
    ("05", "DataLoader([dsets['valid'][x] for x in permutation(correct)[:n_view]]), all_proba[correct_dogs, 0]")])
def test_what_the_lecture_types_works_after_the_script(lesson, name, typed):
    """A student types along at the prompt (python -i); preconvfeat gives a shuffled epoch there, as in the video."""
    exec(textwrap.dedent(typed), dict(next(names for file, names in lesson.names.items() if file.startswith(name))))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("photos"), train=4, valid=6)


def test_01_uses_its_options(photos, tmp_path, monkeypatch, figures):
    """A path is taken from where the student is; --limit and --seed select and shuffle the images."""
    monkeypatch.chdir(tmp_path)
    names = run_here("01_data.py", "--data-dir", photos, "--output-dir", "here", "--limit", 6, "--seed", 5,
                     "--num-workers", 1)
    assert names["dset_sizes"] == {"train": 6, "valid": 12}
    assert names["loader_train"].num_workers == names["loader_valid"].num_workers == 1
    torch.manual_seed(5)
    valid, labels = next(iter(DataLoader(see(photos / "valid"), batch_size=5)))
    train, _ = next(iter(DataLoader(Subset(see(photos / "train"), [0, 1, 2, 4, 5, 6]), batch_size=64, shuffle=True)))
    assert np.array_equal(np.load(tmp_path / "here" / "inputs_try.npy"), valid)
    assert np.array_equal(np.load(tmp_path / "here" / "labels_try.npy"), labels) and torch.equal(names["inputs"], train)


@pytest.mark.parametrize("name, layer", [
    ("03_finetune_head.py", None), ("04_precompute.py", "conv"), ("04_precompute.py", "fc7")])
def test_03_and_04_are_plain_torchvision_to_the_last_bit(vgg_file, photos, tmp_path, figures, capsys, name, layer):
    """The same seed before the new layer and before training; every option is used; nothing else is trained."""
    torch.manual_seed(99)
    names = run_here(name, "--data-dir", photos, "--output-dir", tmp_path, "--seed", 7, "--epochs", 3, "--lr", 0.05,
                     "--batch-size", 3, *(["--layer", layer] if layer else []))
    model = plain_vgg(vgg_file, 7).to(memory_format=torch.channels_last)
    trained, data = model, see(photos / "train")
    if layer:
        frozen = [model.features] if layer == "conv" else [model.features, nn.Flatten(), model.classifier[:6]]
        for x in ("train", "valid"):
            features = np.load(tmp_path / f"{layer}_feat_{x}.npy")
            expected = outputs_of(nn.Sequential(*frozen), photos / x)
            assert features.shape == expected.shape and np.allclose(features, expected, atol=1e-4)
        trained = model.classifier if layer == "conv" else model.classifier[6:]
        rows = torch.from_numpy(np.load(tmp_path / f"{layer}_feat_train.npy")).flatten(1)
        data = TensorDataset(rows, torch.tensor(data.targets))
        assert "from random weights: there are no results of 03_finetune_head.py here" in capsys.readouterr().out

    optimizer = torch.optim.SGD(model.classifier[6].parameters(), lr=0.05)
    torch.manual_seed(7)
    trained.train()
    for inputs, classes in itertools.chain(*[DataLoader(data, batch_size=3, shuffle=True)] * 3):  # three epochs
        optimizer.zero_grad()
        nn.functional.nll_loss(trained(inputs), classes).backward()
        optimizer.step()
    head = torch.load(tmp_path / f"{name[:2]}_head.pt", weights_only=True)
    assert all(torch.equal(head[key], value) for key, value in model.classifier[6].state_dict().items())
    predictions, all_proba, all_classes = (np.load(tmp_path / f"{name[:2]}_{result}.npy") for result in RESULTS)
    assert np.allclose(all_proba, outputs_of(model.eval(), photos / "valid").exp(), atol=1e-4)
    assert np.array_equal(predictions, all_proba.argmax(axis=1)) and list(all_classes) == see(photos / "valid").targets
    assert names["idx"] == [0, 1, 2, 3, 6, 7, 8, 9]  # the first four cats, the first four dogs


@pytest.mark.parametrize("on_images, end", [(1000, "s; this pays off after epoch 3"), (0, "s; this does not pay off")])
def test_04_says_when_precomputing_pays_off(lesson, tmp_path, figures, capsys, on_images, end):
    """2,500 seconds for the features, and 1,000 saved per epoch: the third epoch is the first that is worth it."""
    shutil.copytree(lesson.folder, tmp_path, dirs_exist_ok=True)
    for name, change in [("03_metrics.json", {"seconds_per_epoch": on_images}),
                         ("conv_feat_train.json", {"images_per_second": 16 / 2500})]:
        (tmp_path / name).write_text(json.dumps(json_of(tmp_path / name) | change))
    run_here("04_precompute.py", "--sample", "--output-dir", tmp_path, "--epochs", 1)
    printed = capsys.readouterr().out
    assert (f"in 03_finetune_head.py: {on_images:.3f} s\ncomputing the features of the training images, once: "
            f"2500.0 {end}\n") in printed


def test_03_counts_the_parameters_that_training_has_changed(photos, out, figures, capsys):
    """The check must be able to fail: here a student's edit changes frozen parameters, and half of the last layer."""
    edit = "    model_vgg.features[2].bias[:3] += 1\n    model_vgg.classifier[6].weight.data[1] += 1\n"
    options = ["--data-dir", photos, "--output-dir", out, "--epochs", 1, "--lr", 0]
    run_here("03_finetune_head.py", *options, edits={"    # Check: which parameters changed?\n": edit})
    assert "frozen: 3 of 2,072,792 parameters changed\ntrainable: 4,096 of 8,194 par" in capsys.readouterr().out


@pytest.mark.parametrize("weights, bf16", [("own.pth", []), ("imagenet", ["--bf16"]), ("untrained", [])])
def test_weights_precision_and_device_of_the_options_are_used(vgg, out, figures, monkeypatch, capsys, weights, bf16):
    """No script falls back to ImageNet's weights or to float32; 05 takes both from the results. Nobody may take the
    numbers of untrained weights for those of the lecture: these are marked in text, metrics and figures."""
    photos = make_dataset(out / "sample", train=1, valid=3)
    fake_results(out, photos, [0.5] * 6, step="03", model=vgg, seconds_per_epoch=1)  # of ImageNet's, in float32
    monkeypatch.chdir(out)
    torch.manual_seed(5)
    torch.save(models.vgg16().state_dict(), "own.pth")
    asked, cpu, note = [], torch.device("cpu"), ", untrained weights" if weights == "untrained" else ""
    atol = 2e-3 if bf16 else 1e-4  # batches of a different size are rounded differently
    monkeypatch.setattr(common, "get_device", lambda *args: asked.append(args) or cpu)
    expected = outputs_of(common.to_device(common.load_vgg16(weights), cpu, bool(bf16)).eval(), photos / "valid")
    model, image = common.load_vgg16(weights), common.IMAGENET.transforms()(Image.open(PHOTO))[None]
    torch.manual_seed(0)
    model = common.to_device(common.freeze_and_replace_head(model), cpu, bool(bf16)).eval()
    (cat, dog), printed = model(image)[0].exp(), ""
    for name, *own in [(SCRIPTS[1], "--zero-shot", "--image", PHOTO), (SCRIPTS[3], "--epochs", 1, "--lr", 0),
                       (SCRIPTS[2], "--epochs", 1, "--lr", 0), (SCRIPTS[4], "--step", "03", "--image", PHOTO)]:
        more = [] if name == SCRIPTS[4] else ["--weights", weights, *bf16]
        run_here(name, "--sample", "--data-dir", out, "--output-dir", out, "--device", "mps", *more, *own)
        printed += (text := capsys.readouterr().out)
        assert f"data_dir={photos} " in text and text.splitlines()[-1].startswith(f"Done{note}. Next")
        assert ("NOTICE: untrained weights" in text) == bool(note) and not plt.get_fignums()  # each figure is closed
    assert np.allclose(np.load("probs_try.npy"), expected[:5].softmax(dim=1), atol=atol)
    for step in ["04", "03"]:
        metrics, proba = json_of(out / f"{step}_metrics.json"), np.load(f"{step}_all_proba.npy")
        assert np.allclose(proba, outputs_of(model, photos / "valid").exp(), atol=atol)
        assert metrics["weights"] == (str(out / weights) if weights == "own.pth" else weights)
        assert metrics["pretrained"] is json_of(out / "02_zero_shot.json")["pretrained"] is (not note)
        assert metrics["made_from"]["precision"] == ("bfloat16" if bf16 else "float32")
    for text in [f"03_head.pt was trained with different frozen layers{' and a different precision' if bf16 else ''}\n",
                 f"  {PHOTO}: cats {cat:.3f}, dogs {dog:.3f}\n", "zero-shot accuracy", f"summary of script 03{note}\n",
                 f"validation images{note}\n", f"--layer fc7{' --weights untrained --lr 0.1' if note else ''}\n"]:
        assert text in printed
    assert asked == [("mps", bool(bf16))] * 3 + [("mps", False), ("mps", bool(bf16))] and len(figures) == 18
    for name, figure in figures.items():
        assert any("untrained weights" in text.get_text() for text in figure.findobj(Text)) == bool(note), name


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot send Ctrl-C to one process")
def test_the_prompt_is_kept_after_ctrl_c(tmp_path):
    """A student at python -i stops a long training and continues by hand; typing errors there look as usual."""
    script_03 = arguments("03_finetune_head.py", ["--sample", "--output-dir", tmp_path, "--epochs", 1_000_000])
    typed = "print('there:', len(dsets['train']), model_vgg.classifier[6].out_features)\n1 / 0\nopen('no file')\n"
    with subprocess.Popen([sys.executable, "-i", *script_03], stdin=-1, stdout=-1, stderr=-1, text=True) as process:
        next(line for line in process.stdout if line.startswith("epoch "))
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(typed)
    assert "there: 16 2" in stdout and stderr.count("Traceback") == 2 and process.returncode == 0
    assert "\nstopped by Ctrl-C\n" in stderr and "ZeroDivisionError" in stderr and "FileNotFoundError" in stderr


def test_zero_shot_against_numpy(tmp_path, vgg, figures, capsys):
    """Probability on the first and last of the cats and dogs, and on their neighbours, which are neither. The worst
    mistake is not where the wrong sum is largest, but where it exceeds the right one by most: cat.1 before cat.2."""
    dataset = make_dataset(tmp_path / "data", train=1, valid=4)
    sums = np.array([[.6, .1], [.05, .45], [.44, .52], [.5, .2], [.8, .1], [.1, .6], [.0, .9], [.1, .3]])  # cats, dogs
    probs = np.full((8, 1000), 2e-12)
    for i, (cat, dog) in enumerate(sums):
        probs[i, [281, 285]], probs[i, [151, 268]] = cat / 2, dog / 2
        probs[i, [150, 269, 280, 286]] = (1 - cat - dog) / 4
    outputs = iter(torch.tensor(np.log(probs.clip(1e-12)), dtype=torch.float32).split(5))
    vgg.forward = lambda inputs: next(outputs)
    args, dsets = SimpleNamespace(output_dir=tmp_path, show=False, weights="imagenet"), dsets_of(dataset)
    loader = DataLoader(dsets["valid"], batch_size=5)
    script("02_vgg_imagenet").zero_shot(args, vgg, torch.device("cpu"), dsets, loader, "")
    result = json_of(tmp_path / "02_zero_shot.json")
    assert result["valid_accuracy"] == 5 / 8 and result["confusion"] == [[2, 2], [1, 3]]
    assert result["outside"] == pytest.approx(1 - sums.sum(axis=1).mean(), abs=1e-5)
    assert "of 4 cats: 2 predicted as cats, 2 as dogs\nof 4 dogs: 1 predicted as cats, 3 " in capsys.readouterr().out
    worst = [dataset / "valid" / name for name in ("dogs/dog.0.jpg", "cats/cat.1.jpg", "cats/cat.2.jpg")]
    assert_shows(figures["02_zero_shot.png"], worst, sums[[4, 1, 2]])


@pytest.mark.parametrize("name", ["02_vgg_imagenet.py", "05_analysis.py"])
def test_own_photos_get_the_answers_of_the_network(vgg, tmp_path, figures, capsys, name):
    """A phone stores photos rotated, with EXIF data that says so: the network and the student see them the right way
    up. Printed and drawn are the probabilities, the most likely on top, or cats before dogs."""
    dataset, exif, options = make_dataset(tmp_path / "data", train=1, valid=1), Image.Exif(), []
    images = [Image.open(path).crop((0, 0, 200, 240)) for path in sorted(dataset.glob("train/*/*"))]
    exif[0x0112] = 6  # the camera was held upright
    for i, image in enumerate(images):
        options += ["--image", tmp_path / f"{i}.png"]
        image.transpose(Image.Transpose.ROTATE_90).save(options[-1], exif=exif)
    fake_results(tmp_path, dataset, [0.1, 0.9], model=vgg)
    run_here(name, "--data-dir", dataset, "--output-dir", tmp_path, *options)
    inputs = torch.stack([common.IMAGENET.transforms()(image) for image in images])
    vals, preds = torch.softmax(common.load_vgg16("imagenet").eval()(inputs), dim=1).topk(5)
    answers, between = np.array(common.IMAGENET.meta["categories"])[preds].tolist(), "  "
    if name == "05_analysis.py":
        vals, answers, between = vgg(inputs).exp(), [["cats", "dogs"]] * 2, ", "
    vals, printed, axes = vals.detach().numpy(), capsys.readouterr().out, figures[f"{name[:2]}_images.png"].axes
    for i, (left, right) in enumerate(zip(axes[::2], axes[1::2], strict=True)):
        line = between.join(f"{x} {y:.3f}" for x, y in zip(answers[i], vals[i], strict=True))
        assert f"  {tmp_path / f'{i}.png'}: {line}" in printed and left.get_title() == f"{i}.png"
        assert np.array_equal(left.get_images()[0].get_array(), images[i]) and right.yaxis_inverted()
        assert [label.get_text() for label in right.get_yticklabels()] == answers[i]
        assert np.allclose([bar.get_width() for bar in right.patches], vals[i], atol=0)


def test_the_submission_is_what_kaggle_expects(tmp_path, vgg, figures):
    """Rows sorted by number, not by name; probabilities of dog, clipped, and those of the network; any image format."""
    dataset, images = make_dataset(tmp_path / "data", train=1, valid=1), VALID[:6]
    (dataset / "test1").mkdir()
    assert "test1: no images there: run python 01_data.py" in message(analyse, dataset, tmp_path, "--submission")
    names = ["1.jpg", "2.JPG", "03.png", "10.jpeg", "11.jpg", f"{10**19}.jpg", "no number.jpg", "4.txt"]
    for name, path in zip(names, [*images, PHOTO, PHOTO], strict=True):
        Image.open(path).save(dataset / "test1" / name, format="PNG")  # not compressed again
    inputs = torch.stack([common.imagenet_format(Image.open(path)) for path in images])
    with torch.inference_mode():  # a last layer so steep, around the mean of these images, that clipping has work to do
        vgg.classifier[6].weight *= 3000
        vgg.classifier[6].bias -= vgg.classifier[:7](vgg.features(inputs).flatten(1)).mean(dim=0)
        direct = vgg(inputs).exp()[:, 1].numpy()
    fake_results(tmp_path, dataset, [0.1, 0.9], model=vgg)
    analyse(dataset, tmp_path, "--submission")
    header, *rows = (tmp_path / "submission.csv").read_text().splitlines()
    assert header == "id,label" and [row.split(",")[0] for row in rows] == ["1", "2", "3", "10", "11", str(10**19)]
    assert np.allclose([float(row.split(",")[1]) for row in rows], direct.clip(0.005, 0.995), atol=1e-3)
    assert direct.max() > 0.995 and direct.min() < 0.005
    axes, = figures["05_most_incorrect_cats.png"].axes  # of results without a mistake
    assert [text.get_text() for text in axes.texts] == ["none"]


PROBA_DOG = np.array([.3, .11, .6, .11, .9, .13, .8, .002, .97, .42, .35, .95])  # cat.0 to cat.5, dog.0 to dog.5


@pytest.fixture(scope="module")
def analysed(tmp_path_factory):
    """05 with made-up results of 04, in which 4 of 6 cats are right and 3 of 6 dogs. 03 has run too."""
    dataset = make_dataset(tmp_path_factory.mktemp("data"), train=1, valid=6)
    fake_results(dataset / "out", dataset, PROBA_DOG)
    fake_results(dataset / "out", dataset, 1 - PROBA_DOG, step="03")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        figures = keep_figures(patch)
        analyse(dataset, dataset / "out", "--n-view", 2, "--seed", 1)
    return SimpleNamespace(paths=sorted(dataset.glob("valid/*/*")), figures=figures, printed=printed.getvalue())


def test_views_with_a_known_answer(analysed):
    """Random ones depend on the seed; of two images with the same probability, the first in the dataset comes first."""
    random = np.random.default_rng(1)
    for view, idx in {"correct": random.permutation([0, 1, 3, 5, 6, 8, 11])[:2],
                      "incorrect": random.permutation([2, 4, 7, 9, 10])[:2],
                      "most_correct_cats": [1, 3], "most_correct_dogs": [8, 11], "most_incorrect_cats": [7, 10],
                      "most_incorrect_dogs": [4, 2], "most_uncertain": [9, 2]}.items():
        figure = analysed.figures[f"05_{view}.png"]
        assert_shows(figure, [analysed.paths[i] for i in idx], np.transpose([1 - PROBA_DOG, PROBA_DOG])[idx])
        title = figure.get_suptitle().lower().replace(",", "")
        assert view.replace("_", " ") in title and "(script 04)" in title


def test_confusion_histogram_and_summary(analysed):
    """Rows are the true classes; two swapped numbers would tell a student the opposite."""
    axes, = analysed.figures["05_confusion.png"].axes
    assert np.array_equal(axes.get_images()[0].get_array(), [[4, 2], [3, 3]])
    assert {text.get_position(): text.get_text() for text in axes.texts} == {  # (column, row)
        (0, 0): "4\n66.7% of cats", (1, 0): "2\n33.3% of cats", (0, 1): "3\n50.0% of dogs", (1, 1): "3\n50.0% of dogs"}
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")
    axes, = analysed.figures["05_histogram.png"].axes
    for bars, name, proba in zip(axes.containers, ("cats", "dogs"), PROBA_DOG.reshape(2, 6), strict=True):
        assert bars.patches[0].get_label() == name
        assert [bar.get_height() for bar in bars] == np.histogram(proba, bins=20, range=(0, 1))[0].tolist()
    true, printed = np.where(np.arange(12) < 6, 1 - PROBA_DOG, PROBA_DOG), analysed.printed
    assert re.findall(r"^  (\D+?) +(\d.*?)(?:  .*)?$", printed.partition("summary of script 04\n")[2], re.M) == [
        ("accuracy", "0.5833"), ("log loss", f"{-np.log(true).mean():.4f}"),
        ("log loss, clipped", f"{-np.log(true.clip(.005, .995)).mean():.4f}"),
        ("cats predicted as dogs", "2 of 6"), ("dogs predicted as cats", "3 of 6")]
    assert "script 04, in the last epoch of training: 0.7500\ncorrect of 12 validation images: 0.5833\n" in printed


def test_the_drawings_of_the_sample_can_be_drawn_again(tmp_path):
    """tests/draw_sample.py draws what is in sample/: same names and, but for the JPEG encoder, the same pixels."""
    script("draw_sample").main(tmp_path)
    for one, two in zip(TRAIN + VALID, sorted(tmp_path.rglob("*.jpg")), strict=True):
        assert one.relative_to(SAMPLE) == two.relative_to(tmp_path) and one.stat().st_size < 25_000
        assert np.abs(np.subtract(Image.open(one), Image.open(two), dtype=float)).mean() < 3


@pytest.mark.slow
def test_03_with_the_real_vgg16_gives_the_numbers_of_the_lecture(real_run):
    """From a file of the form that torchvision offers: not zipped, 553 MB."""
    assert not zipfile.is_zipfile(real_run.weights) and real_run.weights.stat().st_size > 500e6
    printed = real_run.process.communicate(timeout=240)[0]
    assert real_run.process.returncode == 0, printed
    assert "frozen: 134,260,544\n" in printed and " 8,194 " in printed and "4096            102,764,544\n" in printed
    with small_vgg.real():
        model = plain_vgg(real_run.weights, 0)
    model.classifier[6].load_state_dict(torch.load(real_run.folder / "03_head.pt", weights_only=True))
    expected = outputs_of(model, SAMPLE / "valid").exp()
    assert np.allclose(np.load(real_run.folder / "03_all_proba.npy"), expected, atol=1e-4)
