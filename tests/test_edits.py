"""A student changes a line and runs the scripts again: this works, or ends in one line that says what to do."""
import functools
import random
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import PHOTO, SCRIPTS, dsets_of, message, raise_, run_here
from PIL import Image, ImageFilter
from torch import nn
from torchvision import models, transforms
from torchvision.models import vgg as torchvision_vgg
from torchvision.transforms.functional import adjust_brightness

import common
from support.files import load
from support.records import differences, make_record

DATA, NETWORK, HEAD, PRECOMPUTE, ANALYSIS = SCRIPTS
STEPS = common.imagenet_format.transforms  # CenterCrop, ToTensor, Normalize
ONE_EPOCH = ["--epochs", 1]
LOADED = "    args.weights = get_weights"  # the line of the scripts after load_data
NETWORK_LINE = "    model_vgg = load_vgg16(args.weights)  # as in 02_vgg_imagenet.py\n"
CALL = "    history = train_model("
TRAIN_MODEL = "    def train_model(model, dataloader, size, epochs=1, optimizer=None): pass\n"  # no history


def record_with(dataset, first):
    """What results are made from if imagenet_format begins with a transform of the student's own."""
    return make_record(dsets_of(dataset, transforms.Compose([first, *STEPS])))


class Brighter:
    """Python prints it as <Brighter object at 0x7f...>, with another address in each run."""
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, image):
        return adjust_brightness(image, self.factor)


@pytest.mark.parametrize("make", [
    Brighter, lambda factor: functools.partial(adjust_brightness, brightness_factor=factor),
    lambda factor: lambda image: adjust_brightness(image, factor),
    lambda factor: transforms.Lambda(lambda image: adjust_brightness(image, factor))],
    ids=["class", "partial", "function", "Lambda"])
def test_transforms_are_the_same_if_they_compute_the_same(dataset, make):
    """However they are printed: otherwise, 04 would compute the features in each run, or use those of the old code."""
    before = record_with(dataset, make(1.5))
    assert differences(before, record_with(dataset, make(1.5))) == ""
    changed = "a different training transform and a different validation transform"
    assert differences(before, record_with(dataset, make(1.6))) == changed


@pytest.mark.parametrize("change", [
    lambda image: image.rotate(0.3), lambda image: image.filter(ImageFilter.BoxBlur(1)),
    lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), lambda image: image.convert("L").convert("RGB")],
    ids=["rotated", "blurred", "mirrored", "grey"])
def test_a_small_change_of_load_image_is_noticed(dataset, change):
    """It belongs to what is done to an image before the network sees it, though it is not printed."""
    dsets = dsets_of(dataset)
    before, load_image = make_record(dsets), dsets["train"].loader
    dsets["train"].loader = lambda path: change(load_image(path))
    assert differences(before, make_record(dsets)) == "a different training transform"


@pytest.mark.parametrize("number", [lambda: torch.rand(1).item(), random.random, np.random.random])
def test_a_random_transform_is_the_same_in_each_run(dataset, monkeypatch, number):
    """Whichever module its random numbers come from. Those of the training do not change, nor do those of a GPU."""
    monkeypatch.setattr(torch, "manual_seed", lambda seed: raise_(AssertionError))  # it seeds all devices
    before = record_with(dataset, lambda image: image.rotate(30 * number()))
    drawn = number()
    assert differences(before, record_with(dataset, lambda image: image.rotate(30 * number()))) == ""
    assert number() != drawn


def test_what_other_edits_gave_is_not_used(options, figures, capsys):
    """03's last layer, after edits of 03 alone; the features of images that are augmented, but not the others."""
    gray = "    dsets['train'].transform = transforms.Compose([transforms.Grayscale(3), dsets['train'].transform])\n"
    fewer = "    dsets['train'].samples = dsets['train'].samples[1:]\n"
    dropout = "    model_vgg.classifier[2] = nn.Dropout(0.2)\n"
    run_here(HEAD, *options, *ONE_EPOCH, edits={LOADED: fewer + LOADED, NETWORK_LINE: NETWORK_LINE + dropout})
    changed = "03_head.pt was trained with different training images and a different network"
    assert changed in message(run_here, ANALYSIS, *options, "--n-view", 1, "--image", PHOTO)
    run_here(PRECOMPUTE, *options, *ONE_EPOCH)
    run_here(PRECOMPUTE, *options, *ONE_EPOCH, edits={LOADED: gray + LOADED})
    printed = capsys.readouterr().out
    assert f"random weights: {changed}\n" in printed
    assert "conv_feat_train.npy was computed with a different training transform: recomputing\n" in printed
    assert "conv_feat_valid.npy: already computed" in printed


def test_a_network_of_ones_own_is_not_taken_for_model_vgg(options, figures):
    """04 trains it, but saves the last layer of model_vgg: 05 must not use that for new photos."""
    own = "    trained = nn.Sequential(nn.Linear(25088, 2), nn.LogSoftmax(dim=1))\n"
    edits = {"    frozen.eval()\n": own + "    frozen.eval()\n", "model_vgg.classifier[6].param": "trained.param"}
    run_here(PRECOMPUTE, *options, "--epochs", 9, "--lr", 0.1, edits=edits)
    line = message(run_here, ANALYSIS, *options, "--n-view", 1, "--image", PHOTO)
    assert "04_head.pt: does not give the predictions of script 04, which trained a different network: train" in line


def test_a_random_transform_is_not_taken_for_another_network(out, figures, monkeypatch, capsys):
    """The saved predictions are those of other random crops."""
    options, crop = ["--sample", "--output-dir", out], transforms.RandomResizedCrop(224, scale=(0.01, 1))
    monkeypatch.setattr(common, "imagenet_format", transforms.Compose([crop, *STEPS[1:]]))
    run_here(PRECOMPUTE, *options, "--layer", "fc7", "--epochs", 100, "--lr", 1)
    run_here(ANALYSIS, *options, "--n-view", 1, "--image", PHOTO)
    assert f"\n  {PHOTO}:\n" in capsys.readouterr().out


def test_another_crop_is_pooled_as_in_the_network(options, figures, monkeypatch):
    """avgpool, which changes nothing at 224 pixels, makes 7 x 7 of all sizes."""
    monkeypatch.setattr(common, "imagenet_format", transforms.Compose([transforms.CenterCrop(256), *STEPS[1:]]))
    assert run_here(PRECOMPUTE, *options, *ONE_EPOCH)["conv_feat_valid"].shape == (4, 512, 7, 7)


def test_a_hidden_layer_belongs_to_what_is_trained(vgg):
    """With it before the last layer, 04 can continue from 03, and 05 can use both."""
    vgg.classifier[6] = nn.Sequential(nn.Linear(4096, 16), nn.ReLU(), nn.Linear(16, 2))
    before = make_record({}, vgg, vgg.classifier[6])
    nn.init.zeros_(vgg.classifier[6][2].weight)
    assert differences(before, make_record({}, vgg, vgg.classifier[6])) == ""


@pytest.mark.parametrize("name, key, sizes, scripts", [
    ("vgg13", "B", [2, 2, 2, 2, 2], [HEAD]), ("vgg19", "E", [2, 2, 4, 4, 4], [HEAD]),
    ("vgg16_bn", "D", [2, 2, 3, 3, 3], [HEAD, PRECOMPUTE, ANALYSIS])])
def test_another_network_is_described(options, figures, monkeypatch, capsys, name, key, sizes, scripts):
    """The table and the figure of 03 are made from its layers; 04 and 05 use it, too."""
    layers = [layer for size in sizes for layer in [8] * size + ["M"]]
    monkeypatch.setitem(torchvision_vgg.cfgs, key, [*layers[:-2], 512, "M"])
    monkeypatch.setattr(models, "vgg16", getattr(models, name))
    more = {HEAD: ONE_EPOCH, PRECOMPUTE: ONE_EPOCH, ANALYSIS: ["--n-view", 1, "--image", PHOTO]}
    for script in scripts:
        run_here(script, *options, *more[script], "--weights", "untrained")
    table = re.findall(r"^  block (\d): (\d) convolutions, pooling ", capsys.readouterr().out, re.M)
    assert table == [(str(i), str(n)) for i, n in enumerate(sizes, 1)]
    assert [axes.get_title() for axes in figures["03_blocks.png"].axes] == ["input", *(f"block {i}" for i, _ in table)]


def test_cross_entropy_gives_probabilities(options, out, figures):
    """It needs no LogSoftmax. The saved and the printed probabilities are those of the network."""
    edits = {"nn.NLLLoss()": "nn.CrossEntropyLoss()", "    model_vgg.classifier.append(nn.LogSoftmax(dim=1))\n": ""}
    printed = run_here(HEAD, *options, *ONE_EPOCH, edits=edits)["outputs"].exp().numpy()
    assert np.allclose(printed.sum(axis=1), 1) and np.allclose(printed, load(out / "03_all_proba.npy", ""), atol=1e-5)


@pytest.mark.parametrize("old, new, advice", [
    (LOADED, "    dsets['train'].transform = transforms.ToTensor()\n" + LOADED, "add a crop to the transform"),
    (LOADED, "    dsets['train'].transform = transforms.CenterCrop(224)\n" + LOADED, "add transforms.ToTensor()"),
    (LOADED, "    dsets['train'].transform = transforms.Compose([transforms.CenterCrop(224), transforms.PILToTensor(), "
     "transforms.Normalize(mean=[0], std=[1])])\n" + LOADED, "use transforms.ToTensor(), not PILToTensor"),
    (NETWORK_LINE, "    model_vgg = models.resnet18()\n", "such as models.vgg13"),
    (CALL, TRAIN_MODEL + CALL, "criterion and after_epoch: remove both")],
    ids=["no crop", "no ToTensor", "whole numbers", "no features", "the lecture's train_model with our call"])
def test_a_training_that_cannot_work_ends_in_one_line(out, figures, old, new, advice):
    """The student does not look for the error in a traceback."""
    assert advice in message(run_here, HEAD, "--sample", "--output-dir", out, edits={old: new})


@pytest.mark.parametrize("name", [HEAD, PRECOMPUTE])
def test_the_lectures_train_model_can_be_pasted(options, out, figures, capsys, name):
    """It returns nothing: the run ends as it should, without curves."""
    edits = {CALL: TRAIN_MODEL + "    train_model(", ", criterion=criterion, after_epoch=after_epoch": ""}
    network = run_here(name, *options, *ONE_EPOCH, edits=edits)["model_vgg"]
    assert torch.equal(load(out / f"{name[:2]}_head.pt", "")["weight"], network.classifier[6].weight)
    assert "no curves: train_model returned no history\n" in capsys.readouterr().out


@pytest.fixture
def classes(dataset, options, monkeypatch):
    """A function that changes CLASSES and the folders of the dataset. It returns the options."""
    def change(*names):
        for part in [dataset / "train", dataset / "valid"]:
            for name in names:
                shutil.copytree(part / "cats", part / name)
            shutil.rmtree(part / "cats")
            shutil.rmtree(part / "dogs")
        monkeypatch.setattr(common, "CLASSES", list(names))
        monkeypatch.setattr(common, "ANIMALS", [name.removesuffix("s") for name in names])
        return options
    return change


def test_two_classes_of_ones_own_run_through_all_scripts(classes, figures, capsys):
    """What is printed and drawn says ants and bees."""
    options = classes("ants", "bees")
    for name, more in zip(SCRIPTS, [[], [], ONE_EPOCH, ONE_EPOCH, ["--n-view", 4]], strict=True):
        run_here(name, *options, *more)
    assert "\n  ants predicted as bees  " in capsys.readouterr().out
    titles = {ax.get_title().split("\n")[0] for figure in figures.values() for ax in figure.axes}
    assert {"true: ant", "true: bee"} <= titles and not titles & {"true: cat", "true: dog"}


def test_three_classes_are_trained_and_tested(classes, out, figures):
    """With 3 in nn.Linear of 03, as it says otherwise; 04 takes it from CLASSES. The views of 05 are for two."""
    options = classes("ants", "bees", "flies")
    assert "the 2 of nn.Linear(4096, 2) must be the number of CLASSES" in message(run_here, HEAD, *options)
    run_here(HEAD, *options, *ONE_EPOCH, edits={"nn.Linear(4096, 2)": "nn.Linear(4096, 3)"})
    run_here(PRECOMPUTE, *options, *ONE_EPOCH)
    assert [load(out / f"{step}_all_proba.npy", "").shape for step in ["03", "04"]] == [(6, 3), (6, 3)]
    line = message(run_here, ANALYSIS, *options)
    assert "05_analysis.py compares two classes, but CLASSES in common.py has 3" in line


@pytest.mark.filterwarnings("ignore:Got pickle error")
def test_a_lambda_cannot_go_to_worker_processes(options, figures, monkeypatch):
    """On macOS and Windows, where a worker is a new Python. A Mac's GPU uses workers by default."""
    monkeypatch.setattr(common, "imagenet_format", transforms.Compose([lambda image: image, *STEPS]))
    loader = functools.partial(torch.utils.data.DataLoader, multiprocessing_context="spawn")
    monkeypatch.setattr(torch.utils.data, "DataLoader", loader)
    assert "--num-workers 0, or use a function with a name" in message(run_here, NETWORK, *options, "--num-workers", 1)
