"""The five scripts as a student runs them: files, numbers, figures, options, and the prompt afterwards."""
import itertools
import re
import signal
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import (PHOTO, ROOT, SAMPLE, SCRIPTS, analyse, arguments, dsets_of, fake_results, json_of,
                      make_dataset, message, run_here, save_weights, script)
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchvision import datasets, models, transforms

import common
import small_vgg

TIMES = ["0:19:35", "", "", "0:25:50", "0:40:51", "0:45:55", "0:49:50", "", "", "0:57:40", "", "1:03:39", ""]
TRAIN, VALID = (sorted((SAMPLE / x).rglob("*.jpg")) for x in ["train", "valid"])  # 16 and 8 images
ARRAYS = {
    "inputs_try": ("float32", 5, 3, 224, 224), "labels_try": ("int64", 5), "probs_try": ("float32", 5, 1000),
    "conv_feat_train": ("float32", 16, 512, 7, 7), "conv_feat_valid": ("float32", 8, 512, 7, 7),
    "labels_train": ("int64", 16), "labels_valid": ("int64", 8), "03_all_classes": ("int64", 8),
    "03_predictions": ("int64", 8), "03_all_proba": ("float64", 8, 2), "04_all_classes": ("int64", 8),
    "04_predictions": ("int64", 8), "04_all_proba": ("float64", 8, 2)}
FIGURES = {  # without .png
    "01_valid_batch", "01_train_batch", "02_predictions", "02_zero_shot", "02_images", "03_blocks", "03_training",
    "03_valid_batch", "04_training", "04_valid_batch", *(f"05_{view}" for view in [
        "correct", "incorrect", "most_correct_cats", "most_correct_dogs", "most_incorrect_cats",
        "most_incorrect_dogs", "most_uncertain", "confusion", "histogram", "images"])}
OTHERS = {"02_zero_shot.json", "03_head.pt", "04_head.pt", *(f"{name}.json" for name in [
    "03_metrics", "04_metrics", "conv_feat_train", "conv_feat_valid"])}


def plain_vgg(file, seed):
    """The notebook's own network as a row of layers, from 31 in `features` to a new last layer and LogSoftmax."""
    with torch.device("meta"):  # not initialized
        vgg = models.vgg16()
    vgg.load_state_dict(torch.load(file, weights_only=True), assign=True)
    torch.manual_seed(seed)
    vgg.classifier[6] = nn.Linear(4096, 2)
    model = nn.Sequential(*vgg.features, vgg.avgpool, nn.Flatten(), *vgg.classifier, nn.LogSoftmax(dim=1))
    return model.to(memory_format=torch.channels_last).eval()


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
    row, texts = shown_in(figure.axes[0]), [text.get_text() for text in figure.axes[0].texts]
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
    expected = {f"{name}.npy" for name in ARRAYS} | {f"{name}.png" for name in FIGURES} | OTHERS
    assert {path.name for path in lesson.folder.iterdir()} == expected
    assert not (SAMPLE / ".images-checked").exists()
    arrays = {name: np.load(lesson.folder / f"{name}.npy", allow_pickle=False) for name in ARRAYS}
    assert {name: (array.dtype.name, *array.shape) for name, array in arrays.items()} == ARRAYS
    images = [Image.open(lesson.folder / f"{name}.png").convert("RGB") for name in FIGURES]
    assert all(400 <= x.width <= 2000 and 200 <= x.height <= 2000 and np.asarray(x).std() > 1 for x in images)


def test_headings_are_the_lectures_and_show_opens_each_figure(lesson):
    """Each heading is a cell, and a banner with its time in the video, if it has one."""
    banners = re.findall(r"^[=-]{80}\n(.+)\n(?:  video from (\S+),)?", "".join(lesson.printed.values()), re.M)
    assert banners == list(zip(lesson.headings, TIMES, strict=True))
    assert list(lesson.figures.values()) == lesson.shown and {name[:-4] for name in lesson.figures} == FIGURES


def test_images_stand_under_their_own_titles(lesson):
    """A wrong title would make a right network look wrong."""
    figures, probs = lesson.figures, np.load(lesson.folder / "probs_try.npy")
    assert in_grid(figures["01_valid_batch.png"]) == [(path, path.parent.name) for path in VALID[:5]]
    train = in_grid(figures["01_train_batch.png"])
    assert len(train) == 8 and all(path.parent.name == name for path, name in train)
    names = [common.IMAGENET.meta["categories"][p.argmax()] for p in probs]
    assert in_grid(figures["02_predictions.png"]) == [
        (VALID[i], f"true: {VALID[i].parent.name[:-1]}\n{names[i]}\n{probs[i].max():.3f}") for i in range(5)]
    for step, of in [("03", "images"), ("04", "features")]:
        all_proba = np.load(lesson.folder / f"{step}_all_proba.npy")
        assert_shows(figures[f"{step}_valid_batch.png"], VALID, all_proba, cropped)
        assert figures[f"{step}_training.png"].get_suptitle() == f"Training the last layer on {of}"


def test_the_image_is_shown_after_each_block(lesson):
    """The lecture's picture of VGG16: a student reads off where the image shrinks, and where the parameters are."""
    shapes = ["8 x 112 x 112", "16 x 56 x 56", "16 x 28 x 28", "32 x 14 x 14", "512 x 7 x 7", "64", "4096", "1000"]
    counts = ["808", "3,488", "6,960", "23,136", "166,464", "1,605,696", "266,240", "4,097,000"]
    printed = re.findall(r"^  block (.): .{24} (.*?) +(\S+)$", lesson.printed["03_finetune_head.py"], re.M)
    assert printed == [(str(i + 1), shapes[i], counts[i]) for i in range(8)]
    first, *blocks = lesson.figures["03_blocks.png"].axes
    assert first.get_title() == "input" and np.array_equal(shown_in(first), cropped(VALID[0]))
    assert [(axes.get_title(), axes.get_xlabel()) for axes in blocks] == [
        (f"block {i + 1}", f"{shapes[i]}\n{counts[i]} parameters") for i in range(5)]
    x = outputs_of(common.load_vgg16("imagenet").features, SAMPLE / "valid")[0]
    assert np.allclose(blocks[4].get_images()[0].get_array(), x.mean(dim=0), atol=1e-5)


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


def test_01_uses_its_options(photos, tmp_path, figures, workers):
    """--limit and --seed select and shuffle the images; --num-workers is for both DataLoaders."""
    names = run_here("01_data.py", "--data-dir", photos, "--output-dir", tmp_path, "--limit", 6, "--seed", 5,
                     "--num-workers", 1)
    assert workers == [1, 1] and names["dset_sizes"] == {"train": 6, "valid": 12}
    torch.manual_seed(5)
    valid, _ = next(iter(DataLoader(see(photos / "valid"), batch_size=5)))
    train, _ = next(iter(DataLoader(Subset(see(photos / "train"), [0, 1, 2, 4, 5, 6]), batch_size=64, shuffle=True)))
    assert np.array_equal(np.load(tmp_path / "inputs_try.npy"), valid) and torch.equal(names["inputs"], train)


@pytest.mark.parametrize("layer, n_frozen", [(None, 0), ("conv", 31), ("fc7", 39)])
def test_03_and_04_are_plain_torchvision(vgg_file, photos, tmp_path, figures, workers, capsys, layer, n_frozen):
    """To the last bit: the seed is set before the new layer and before training; every option is used."""
    name, own = ("04_precompute.py", ["--layer", layer]) if layer else ("03_finetune_head.py", [])
    torch.manual_seed(99)
    names = run_here(name, "--data-dir", photos, "--output-dir", tmp_path, "--seed", 7, "--epochs", 3, "--lr", 0.05,
                     "--batch-size", 3, "--num-workers", 1, *own)
    assert workers == ([1] * 3 + [0] * 4 if layer else [1] * 4)  # features are loaded without worker processes

    plain, data = plain_vgg(vgg_file, 7), see(photos / "train")
    frozen, trained, last = plain[:n_frozen], plain[n_frozen:], plain[-2]
    if layer:
        features = torch.from_numpy(np.load(tmp_path / f"{layer}_feat_train.npy"))
        assert torch.allclose(features, outputs_of(frozen, photos / "train"), atol=1e-4)
        data = TensorDataset(features, torch.tensor(data.targets))
    new = {key: value.clone() for key, value in last.state_dict().items()}
    optimizer = torch.optim.SGD(last.parameters(), lr=0.05)
    torch.manual_seed(7)
    trained.train()
    for inputs, classes in itertools.chain(*[DataLoader(data, batch_size=3, shuffle=True)] * 3):
        optimizer.zero_grad()
        nn.functional.nll_loss(trained(inputs), classes).backward()
        optimizer.step()

    head = torch.load(tmp_path / f"{name[:2]}_head.pt", weights_only=True)
    assert all(torch.equal(head[key], value) for key, value in last.state_dict().items())
    predictions, all_proba, all_classes = (
        np.load(tmp_path / f"{name[:2]}_{result}.npy") for result in ["predictions", "all_proba", "all_classes"])
    assert np.allclose(all_proba, outputs_of(plain.eval(), photos / "valid").exp(), atol=1e-4)
    assert np.array_equal(predictions, all_proba.argmax(axis=1)) and list(all_classes) == see(photos / "valid").targets
    assert names["idx"] == [0, 1, 2, 3, 6, 7, 8, 9]  # the first four cats, the first four dogs
    changed = sum(int((head[key] != new[key]).sum()) for key in new)
    assert ("the last layer starts from random weights" if layer else
            f"parameters changed\ntrainable: {changed:,} of 8,194 parameters changed") in capsys.readouterr().out


@pytest.mark.parametrize("on_images, end", [(1110, "pays off after epoch 3"), (10, "does not pay off")])
def test_04_says_when_precomputing_pays_off(lesson, capsys, on_images, end):
    """2,500 seconds for the features, and 1,100 saved per epoch: the third epoch is the first that is worth it."""
    _, line, more = (ROOT / "04_precompute.py").read_text().partition("    on_features =")
    known = {"metrics": {"seconds_per_epoch": 10}, "metrics_03": {"seconds_per_epoch": on_images},
             "load": lambda path, advice: {"images_per_second": 16 / 2500}}
    exec(textwrap.dedent(line + more.partition("\n\n")[0]), lesson.names["04_precompute.py"] | known)
    assert capsys.readouterr().out == (
        f"\nan epoch on features: 10.000 s\nan epoch on images, in 03_finetune_head.py: {on_images:.3f} s\n"
        f"computing the features of the training images, once: 2500.0 s; this {end}\n")


@pytest.mark.parametrize("weights, bf16", [("own.pth", ["--bf16"]), ("untrained", [])])
def test_weights_precision_and_device_of_the_options_are_used(out, figures, monkeypatch, capsys, weights, bf16):
    """05 takes them from the results. All that untrained weights give is marked: nobody may believe these numbers."""
    photos, cpu, asked = make_dataset(out, train=1, valid=1), torch.device("cpu"), []
    note = r".{1,2}untrained weights\W?" if weights == "untrained" else ""
    monkeypatch.chdir(out)
    monkeypatch.setattr(common, "get_device", lambda *args: asked.append(args) or cpu)
    torch.manual_seed(5)
    torch.save(models.vgg16().state_dict(), "own.pth")
    model = common.to_device(common.load_vgg16(weights), cpu, bool(bf16)).eval()
    expected = {"probs_try": outputs_of(model, photos / "valid").softmax(dim=1)}
    torch.manual_seed(0)
    common.freeze_and_replace_head(model)
    expected["03_all_proba"] = expected["04_all_proba"] = outputs_of(model, photos / "valid").exp()

    given, training = ["--weights", weights, *bf16], ["--epochs", 1, "--lr", 0]
    for name, own in zip(SCRIPTS[1:], [[*given, "--zero-shot", "--image", PHOTO], given + training, given + training,
                                       ["--image", PHOTO]], strict=True):
        run_here(name, "--data-dir", photos, "--output-dir", out, "--device", "mps", *own)
        printed = capsys.readouterr().out
        assert re.search(rf"\nDone{note}\. Next.*\n$", printed) and not plt.get_fignums()  # figures are closed
        assert ("NOTICE: untrained weights" in printed) == bool(note)
    assert "zero-shot accuracy" in printed and re.search(f"\nsummary of script 04{note}\n", printed)
    assert json_of(out / "03_metrics.json")["made_from"] == json_of(out / "04_metrics.json")["made_from"]
    assert asked == [("mps", bool(bf16))] * 3 + [("mps", False), ("mps", bool(bf16))]
    assert all(np.allclose(np.load(f"{name}.npy"), expected[name], atol=2e-3) for name in expected)
    assert len(figures) == len(FIGURES) - 2  # those of 01
    for name, figure in figures.items():
        assert any("untrained weights" in text.get_text() for text in figure.findobj(plt.Text)) == bool(note), name


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


def test_zero_shot_against_numpy(tmp_path, vgg, figures, capsys):
    """The worst mistake is not where the wrong sum is largest, but where it exceeds the right one by most: cat.1."""
    dataset = make_dataset(tmp_path / "data", train=1, valid=4)
    sums = np.array([[.6, .1], [.05, .45], [.44, .52], [.5, .2], [.8, .1], [.1, .6], [.0, .9], [.1, .3]])  # cats, dogs
    probs = np.full((8, 1000), 2e-12)
    for i, (cat, dog) in enumerate(sums):  # on the first and last cats and dogs, and on their neighbours
        probs[i, [281, 285]], probs[i, [151, 268]] = cat / 2, dog / 2
        probs[i, [150, 269, 280, 286]] = (1 - cat - dog) / 4
    outputs = iter(torch.tensor(np.log(probs.clip(1e-12)), dtype=torch.float32).split(5))
    vgg.forward = lambda inputs: next(outputs)
    args, dsets = SimpleNamespace(output_dir=tmp_path, show=False, weights="imagenet"), dsets_of(dataset)
    script("02_vgg_imagenet").zero_shot(args, vgg, torch.device("cpu"), dsets, DataLoader(dsets["valid"], 5), "")
    assert json_of(tmp_path / "02_zero_shot.json")["valid_accuracy"] == 5 / 8
    assert ("\naccuracy 0.6250 on 8 validation images\nof 4 cats: 2 predicted as cats, 2 as dogs\n"
            "of 4 dogs: 1 predicted as cats, 3 as dogs\nprobability assigned to neither cats nor dogs: "
            f"{1 - sums.sum(axis=1).mean():.4f} on average\n") in capsys.readouterr().out
    worst = [dataset / "valid" / name for name in ("dogs/dog.0.jpg", "cats/cat.1.jpg", "cats/cat.2.jpg")]
    assert_shows(figures["02_zero_shot.png"], worst, sums[[4, 1, 2]])


@pytest.mark.parametrize("name", ["02_vgg_imagenet.py", "05_analysis.py"])
def test_own_photos_get_the_answers_of_the_network(vgg, tmp_path, figures, capsys, name):
    """A phone stores photos rotated, with EXIF data that says so: network and student see them the right way up."""
    dataset, exif, photo = make_dataset(tmp_path / "data", train=1, valid=1), Image.Exif(), tmp_path / "photo.png"
    image, exif[0x0112] = Image.open(PHOTO).crop((0, 0, 200, 240)), 6  # the camera was held upright
    image.transpose(Image.Transpose.ROTATE_90).save(photo, exif=exif)
    fake_results(tmp_path, dataset, [0.1, 0.9], model=vgg)
    run_here(name, "--data-dir", dataset, "--output-dir", tmp_path, "--image", photo)
    inputs = common.IMAGENET.transforms()(image)[None]
    vals, names = vgg(inputs)[0].exp(), ["cats", "dogs"]
    if name == "02_vgg_imagenet.py":
        vals, preds = common.load_vgg16("imagenet").eval()(inputs)[0].softmax(dim=0).topk(5)
        names = [common.IMAGENET.meta["categories"][i] for i in preds]
    left, right = figures[f"{name[:2]}_images.png"].axes
    printed = re.findall(r"(\S.*?) (\d\.\d{3})[,\n]", capsys.readouterr().out.partition(f"\n  {photo}:")[2])
    assert printed[:len(names)] == [(x, f"{y:.3f}") for x, y in zip(names, vals, strict=True)]
    assert np.array_equal(left.get_images()[0].get_array(), image)
    assert [label.get_text() for label in right.get_yticklabels()] == names and right.yaxis_inverted()


def test_the_submission_is_what_kaggle_expects(tmp_path, vgg, figures):
    """Rows sorted by number, not by name; probabilities of dog, clipped, and those of the network; any image format."""
    dataset, images = make_dataset(tmp_path / "data", train=1, valid=1), VALID[:6]
    (dataset / "test1").mkdir()
    assert re.search("test1: .*: run python 01_data.py", message(analyse, dataset, tmp_path, "--submission"))
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
    assert figures["05_most_incorrect_cats.png"].axes[0].texts[0].get_text() == "none"  # there are no mistakes


def test_views_confusion_histogram_and_summary_with_a_known_answer(tmp_path, figures, capsys):
    """4 of 6 cats and 3 of 6 dogs are right. Of two images with the same probability, the first comes first."""
    dataset, random = make_dataset(tmp_path, train=1, valid=6), np.random.default_rng(1)
    dog = np.array([.3, .11, .6, .11, .9, .13, .8, .002, .97, .42, .35, .95])  # cat.0 to cat.5, dog.0 to dog.5
    all_proba, paths = np.transpose([1 - dog, dog]), sorted(dataset.glob("valid/*/*"))
    fake_results(tmp_path, dataset, 1 - dog, step="03")  # 03 has run too
    fake_results(tmp_path, dataset, dog)
    analyse(dataset, tmp_path, "--n-view", 2, "--seed", 1)
    for view, idx in {"correct": random.permutation([0, 1, 3, 5, 6, 8, 11])[:2],
                      "incorrect": random.permutation([2, 4, 7, 9, 10])[:2],
                      "most_correct_cats": [1, 3], "most_correct_dogs": [8, 11], "most_incorrect_cats": [7, 10],
                      "most_incorrect_dogs": [4, 2], "most_uncertain": [9, 2]}.items():
        assert_shows(figures[f"05_{view}.png"], [paths[i] for i in idx], all_proba[idx])
        assert view.replace("_", " ") in figures[f"05_{view}.png"].get_suptitle().lower().replace(",", "")

    axes, = figures["05_confusion.png"].axes
    assert {text.get_position(): text.get_text() for text in axes.texts} == {  # (column, row)
        (0, 0): "4\n66.7% of cats", (1, 0): "2\n33.3% of cats", (0, 1): "3\n50.0% of dogs", (1, 1): "3\n50.0% of dogs"}
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")
    axes, = figures["05_histogram.png"].axes
    for bars, name, p in zip(axes.containers, ["cats", "dogs"], dog.reshape(2, 6), strict=True):
        assert bars.patches[0].get_label() == name
        assert [bar.get_height() for bar in bars] == np.histogram(p, bins=20, range=(0, 1))[0].tolist()
    true, printed = all_proba[range(12), [0] * 6 + [1] * 6], capsys.readouterr().out
    for text in ["training accuracy in the last epoch (script 04): 0.7500\naccuracy on 12 validation images: 0.5833\n",
                 f"log loss                {-np.log(true).mean():.4f}  ",
                 f"log loss, clipped       {-np.log(true.clip(.005, .995)).mean():.4f}  ",
                 "cats predicted as dogs  2 of 6\n", "dogs predicted as cats  3 of 6\n"]:
        assert text in printed


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
