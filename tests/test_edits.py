"""A student changes a line and runs the scripts again: this works, or ends in one line that says what to do."""
import functools
import random
import shutil

import numpy as np
import pytest
import torch
from conftest import PHOTO, SCRIPTS, Killed, dsets_of, make_dataset, message, raise_, run_here
from PIL import ImageFilter
from torchvision import models, transforms
from torchvision.models import vgg as torchvision_vgg
from torchvision.transforms.functional import adjust_brightness

import common
from support.features import FeatureFile
from support.files import load
from support.records import differences, make_record

DATA, NETWORK, HEAD, PRECOMPUTE, ANALYSIS = SCRIPTS
STEPS = common.imagenet_format.transforms  # CenterCrop, ToTensor, Normalize
ONE_EPOCH, ONE_VIEW, UNTRAINED = ["--epochs", 1], ["--n-view", 1], ["--weights", "untrained"]
CHANGED = "a different training transform and a different validation transform"
LOADED = "    args.weights = get_weights"  # the line of the scripts after load_data


def refused(name, *options, edits=None):
    """The one line that an edited script ends in."""
    return message(lambda: run_here(name, *options, edits=edits))


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
@pytest.mark.parametrize("factor, difference", [(1.5, ""), (1.6, CHANGED)], ids=["same", "changed"])
def test_transforms_are_the_same_if_they_compute_the_same(dataset, make, factor, difference):
    """However they are printed: else 04 would compute the features in each run, or use those of the old code."""
    assert differences(record_with(dataset, make(1.5)), record_with(dataset, make(factor))) == difference


@pytest.mark.parametrize("change", [
    lambda image: image.rotate(0.3), lambda image: image.filter(ImageFilter.BoxBlur(1)),
    lambda image: image.transpose(0), lambda image: image.convert("L").convert("RGB")],
    ids=["rotated", "blurred", "mirrored", "gray"])
def test_a_small_change_of_load_image_is_noticed(dataset, change):
    """It belongs to what is done to an image before the network sees it, though it is not printed."""
    dsets = dsets_of(dataset)
    before, load_image = make_record(dsets), dsets["train"].loader
    dsets["train"].loader = lambda path: change(load_image(path))
    assert differences(before, make_record(dsets)) == "a different training transform"


@pytest.mark.parametrize("number", [lambda: torch.rand(1).item(), random.random, np.random.random],
                         ids=["torch", "random", "numpy"])
def test_a_random_transform_is_the_same_in_each_run(dataset, monkeypatch, number):
    """Whichever module its random numbers come from. Those of the training do not change, nor do those of a GPU."""
    seeds = [torch.default_generator.manual_seed, random.seed, np.random.seed]
    monkeypatch.setattr(torch, "manual_seed", lambda seed: raise_(AssertionError))  # it seeds all devices
    [seed(5) for seed in seeds]
    expected = number()
    before = record_with(dataset, lambda image: image.rotate(30 * number()))
    [seed(5) for seed in seeds]
    assert differences(before, record_with(dataset, lambda image: image.rotate(30 * number()))) == ""
    assert number() == expected


def test_an_interrupted_run_resumes_with_a_class_of_ones_own(tmp_path, out, figures, monkeypatch, capsys):
    """Most features of 25,000 photos are there; only the address of the transform is different."""
    options = ["--data-dir", make_dataset(tmp_path / "data", train=5), "--output-dir", out, *ONE_EPOCH]
    monkeypatch.setattr(common, "imagenet_format", transforms.Compose([Brighter(1.5), *STEPS]))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(FeatureFile, "finish", lambda file: file.file.close() or raise_(Killed))
        run_here(PRECOMPUTE, *options)
    monkeypatch.setattr(common, "imagenet_format", transforms.Compose([Brighter(1.5), *STEPS]))
    run_here(PRECOMPUTE, *options)
    assert "conv_feat_train.npy: resuming after the first 8 of 10 images\n" in capsys.readouterr().out


def test_a_transform_that_the_script_replaces_is_noticed(options, figures, capsys):
    """Augmentation for the training images only: their old features are not used, the others are."""
    run_here(PRECOMPUTE, *options, *ONE_EPOCH)
    gray = "    dsets['train'].transform = transforms.Compose([transforms.Grayscale(3), dsets['train'].transform])\n"
    run_here(PRECOMPUTE, *options, *ONE_EPOCH, edits={LOADED: gray + LOADED})
    printed = capsys.readouterr().out
    assert "conv_feat_train.npy was computed with a different training transform: recomputing\n" in printed
    assert "conv_feat_valid.npy: already computed" in printed


@pytest.mark.parametrize("size", [192, 256])
def test_another_crop_is_pooled_as_in_the_network(options, out, figures, monkeypatch, size):
    """avgpool, which changes nothing at 224 pixels, makes 7 x 7 of all sizes."""
    monkeypatch.setattr(common, "imagenet_format", transforms.Compose([transforms.CenterCrop(size), *STEPS[1:]]))
    names = run_here(PRECOMPUTE, *options, *ONE_EPOCH)
    network, image = names["model_vgg"], names["dsets"]["valid"][0][0]
    expected = network.avgpool(network.features(image[None]))
    assert np.allclose(load(out / "conv_feat_valid.npy", "")[:1], expected, atol=1e-5)


@pytest.mark.parametrize("part, i, new", [
    ("features", 1, "LeakyReLU(0.2)"), ("features", 4, "AvgPool2d(2)"), ("classifier", 2, "Dropout(0.2)")])
def test_other_layers_without_parameters_are_another_network(vgg, part, i, new):
    """Features or a last layer of one network mean nothing to another."""
    before = make_record({}, vgg, vgg.classifier[6])
    getattr(vgg, part)[i] = eval(f"torch.nn.{new}")
    assert differences(before, make_record({}, vgg, vgg.classifier[6])) == "a different network"


def test_a_last_layer_belongs_to_the_network_that_it_was_trained_with(options, figures, capsys):
    """The network is changed in 03 alone: 05 does not use its last layer, nor does 04."""
    line = "    model_vgg = load_vgg16(args.weights)  # as in 02_vgg_imagenet.py\n"
    run_here(HEAD, *options, *ONE_EPOCH, edits={line: line + "    model_vgg.features[1] = nn.LeakyReLU(0.2)\n"})
    assert "03_head.pt was trained with a different network" in refused(ANALYSIS, *options, *ONE_VIEW, "--image", PHOTO)
    run_here(PRECOMPUTE, *options, *ONE_EPOCH)
    assert "random weights: 03_head.pt was trained with a different network\n" in capsys.readouterr().out


def test_a_hidden_layer_belongs_to_what_is_trained(options, figures):
    """With it before the last layer, 04 can continue from 03, and 05 can use both."""
    hidden = "nn.Sequential(nn.Linear(4096, 16), nn.ReLU(), nn.Linear(16, 2))"
    network = run_here(HEAD, *options, *ONE_EPOCH, edits={"nn.Linear(4096, 2)": hidden})["model_vgg"]
    before = make_record({}, network, network.classifier[6])
    torch.nn.init.zeros_(network.classifier[6][2].weight)
    assert differences(before, make_record({}, network, network.classifier[6])) == ""


@pytest.mark.parametrize("name, key, sizes", [
    ("vgg13", "B", [2, 2, 2, 2, 2]), ("vgg16_bn", "D", [2, 2, 3, 3, 3]), ("vgg19", "E", [2, 2, 4, 4, 4])])
def test_another_network_needs_no_weights(options, vgg_file, figures, monkeypatch, capsys, name, key, sizes):
    """The table and the figure of 03 are made from its layers. ImageNet's good file, 528 MB, is not to be deleted."""
    layers = [layer for size in sizes for layer in [8] * size + ["M"]]
    monkeypatch.setitem(torchvision_vgg.cfgs, key, [*layers[:-2], 512, "M"])
    monkeypatch.setattr(models, "vgg16", getattr(models, name))
    line = refused(NETWORK, *options)
    assert "different network" in line and "--weights untrained" in line and "delete" not in line and vgg_file.exists()
    run_here(HEAD, *options, *ONE_EPOCH, *UNTRAINED)
    table, drawn = capsys.readouterr().out, figures["03_blocks.png"].axes  # the input, and each block
    assert all(f"  block {i}: {n} convolutions, pooling" in table for i, n in enumerate(sizes, 1)) and len(drawn) == 6
    run_here(PRECOMPUTE, *options, *ONE_EPOCH, *UNTRAINED)
    run_here(ANALYSIS, *options, *ONE_VIEW, "--image", PHOTO)


@pytest.mark.parametrize("edits", [{}, {"    model_vgg.classifier.append(nn.LogSoftmax(dim=1))\n": ""}],
                         ids=["LogSoftmax", "no LogSoftmax"])
def test_cross_entropy_gives_probabilities(options, out, figures, edits):
    """It takes both. The saved and the printed probabilities are those of the network."""
    names = run_here(HEAD, *options, *ONE_EPOCH, edits={"nn.NLLLoss()": "nn.CrossEntropyLoss()", **edits})
    images = torch.stack([image for image, _ in names["dsets"]["valid"]])
    expected = names["model_vgg"](images).softmax(dim=1).detach()
    for probabilities in [load(out / "03_all_proba.npy", ""), names["outputs"].exp().numpy()]:
        assert np.allclose(probabilities, expected, atol=1e-5)


CALL, OUR_ARGUMENTS = "    history = train_model(", ", criterion=criterion, after_epoch=after_epoch"
TRAIN_MODEL = """
    def train_model(model,dataloader,size,epochs=1,optimizer=None):
        model.train()
        for inputs,classes in dataloader:
            loss = criterion(model(inputs.to(device)),classes.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
"""


@pytest.mark.parametrize("old, new, advice", [
    (LOADED, "    dsets['train'].transform = transforms.ToTensor()\n" + LOADED, "add a crop to it"),
    (LOADED, "    dsets['train'].transform = transforms.CenterCrop(224)\n" + LOADED, "add transforms.ToTensor()"),
    ("lr = args.lr", "lr = 1e38", "use a smaller --lr"),
    ("nn.LogSoftmax", "nn.Softmax", "or LogSoftmax if it is negative"),
    (CALL, TRAIN_MODEL + CALL, "criterion and after_epoch: remove both")],
    ids=["no crop", "no ToTensor", "infinite loss", "negative loss", "the lecture's train_model with our call"])
def test_a_training_that_cannot_work_ends_in_one_line(out, figures, old, new, advice):
    """In the first epochs: more would waste hours."""
    assert advice in refused(HEAD, "--sample", "--output-dir", out, "--epochs", 9, edits={old: new})


@pytest.mark.parametrize("name", [HEAD, PRECOMPUTE])
def test_the_lectures_train_model_trains_the_same_layer(options, out, figures, capsys, name):
    """It returns nothing: the run ends as it should, without curves."""
    expected = run_here(name, *options, *ONE_EPOCH)["model_vgg"].classifier[6].weight
    run_here(name, *options, *ONE_EPOCH, edits={CALL: TRAIN_MODEL + "    train_model(", OUR_ARGUMENTS: ""})
    assert torch.equal(load(out / f"{name[:2]}_head.pt", "")["weight"], expected)
    assert "no curves: train_model returned no history\n" in capsys.readouterr().out


@pytest.fixture
def classes(dataset, options, monkeypatch):
    """A function that changes CLASSES and the folders of the dataset. It returns the options."""
    def change(*names):
        for part in [dataset / "train", dataset / "valid"]:
            for name in names:
                shutil.copytree(part / ("dogs" if name == "bees" else "cats"), part / name)
            for name in ["cats", "dogs"]:
                shutil.rmtree(part / name)
        monkeypatch.setattr(common, "CLASSES", list(names))
        monkeypatch.setattr(common, "ANIMALS", [name.removesuffix("s") for name in names])
        return options
    return change


def test_two_classes_of_ones_own_run_through_all_scripts(classes, figures, capsys):
    """What is printed and drawn says ants and bees."""
    options = classes("ants", "bees")
    for name, more in zip(SCRIPTS, [[], [], ONE_EPOCH, ONE_EPOCH, ONE_VIEW], strict=True):
        run_here(name, *options, *more)
    assert "\n  ants predicted as bees  " in capsys.readouterr().out
    titles = {ax.get_title().split("\n")[0] for figure in figures.values() for ax in figure.axes}
    assert {"true: ant", "true: bee"} <= titles and not titles & {"true: cat", "true: dog"}


def test_three_classes_are_trained_and_tested(classes, out, figures):
    """With 3 in nn.Linear of 03; 04 takes it from CLASSES. The views of 05 are for two."""
    options = classes("ants", "bees", "flies")
    run_here(HEAD, *options, *ONE_EPOCH, edits={"nn.Linear(4096, 2)": "nn.Linear(4096, 3)"})
    run_here(PRECOMPUTE, *options, *ONE_EPOCH)
    assert [load(out / f"{step}_all_proba.npy", "").shape for step in ["03", "04"]] == [(6, 3), (6, 3)]
    assert "05_analysis.py compares two classes, but CLASSES in common.py has 3" in refused(ANALYSIS, *options)


@pytest.mark.parametrize("names, advice", [
    (["ants", "bees", "flies"], "the 2 of nn.Linear(4096, 2) must be the number of CLASSES"),
    (["bees", "ants"], "change CLASSES in common.py (in alphabetical order)")], ids=["three", "wrong order"])
def test_classes_that_do_not_fit_end_in_one_line(classes, figures, names, advice):
    """Labels are positions in the alphabet, and the last layer has an output for each."""
    assert advice in refused(HEAD, *classes(*names))


@pytest.mark.filterwarnings("ignore:Got pickle error")
def test_a_lambda_cannot_go_to_worker_processes(options, figures, monkeypatch):
    """On macOS and Windows, where a worker is a new Python. A Mac's GPU uses workers by default."""
    monkeypatch.setattr(common, "imagenet_format", transforms.Compose([lambda image: image, *STEPS]))
    loader = functools.partial(torch.utils.data.DataLoader, multiprocessing_context="spawn")
    monkeypatch.setattr(torch.utils.data, "DataLoader", loader)
    assert "--num-workers 0, or use a function with a name" in refused(NETWORK, *options, "--num-workers", 1)


def test_images_that_the_script_leaves_out_are_noticed(options, figures, capsys):
    """A student tries 03 with fewer images, after load_data: 04 does not take its last layer for one of all images."""
    fewer = "    dsets['train'].samples = dsets['train'].samples[1:]\n"
    run_here(HEAD, *options, *ONE_EPOCH, edits={LOADED: fewer + LOADED})
    run_here(PRECOMPUTE, *options, *ONE_EPOCH)
    assert "03_head.pt was trained with different training images\n" in capsys.readouterr().out
