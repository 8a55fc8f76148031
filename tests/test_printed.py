"""What the five scripts print of the lecture's variables. On the sample: 16 training and 8 validation images."""
import json
import re
import sys

import numpy as np
import pytest
import torch
from conftest import (PHOTO, SAMPLE, SECOND_PHOTO, TRAIN, VALID, analyse, fake_results, make_dataset, run_here)
from PIL import Image
from torch import nn

import common

DATA, VGG, FINETUNE, PRECOMPUTE, ANALYSIS = [
    "01_data.py", "02_vgg_imagenet.py", "03_finetune_head.py", "04_precompute.py", "05_analysis.py"]


def see(path):
    return common.imagenet_format(Image.open(path).convert("RGB"))


@pytest.fixture
def assert_printed(lesson):
    """A function: the script has printed these lines one after another."""
    def assert_printed(name, *lines):
        assert "\n".join(["", *lines, ""]) in "\n" + lesson.printed[name]
    return assert_printed


@pytest.mark.parametrize("name, following", [
    (DATA, ", with the same options (--sample, --limit, ...): python 02_vgg_imagenet.py"),
    (VGG, ", with the same options (--sample, --limit, ...): python 03_finetune_head.py"),
    (FINETUNE, ", with the same options (--sample, --limit, ...): python 04_precompute.py"),
    (PRECOMPUTE, ", with the same options (--sample, --limit, ...): python 05_analysis.py"),
    (ANALYSIS, ": change a line and run the script again; the README has exercises")])
def test_each_script_prints_its_options_and_leads_to_the_next(lesson, name, following):
    """A student knows what was run, and what comes next."""
    assert f"options: sample=True data_dir={SAMPLE} output_dir={lesson.folder} seed=0 " in lesson.printed[name]
    assert lesson.printed[name].endswith(f"\nDone. Next{following}\n")


def test_01_prints_versions_and_the_gpu(assert_printed):
    """The first question when somebody helps."""
    gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    assert_printed(DATA, f"torch {torch.__version__}", f"Python {sys.version}", f"GPU found: {gpu}")


def test_01_counts_the_images_of_each_folder(assert_printed):
    """With the folder, in which a student looks for them."""
    assert_printed(DATA, str(SAMPLE), *(f"  {folder:<20} {count:6} images" for folder, count in [
        ("train/cats", 8), ("train/dogs", 8), ("valid/cats", 4), ("valid/dogs", 4)]))


def test_01_prints_the_transform_the_classes_and_their_files(assert_printed):
    """The layout of the folders becomes the labels."""
    assert_printed(DATA, str(common.imagenet_format))
    assert_printed(DATA, "", "classes: ['cats', 'dogs']", "class_to_idx: {'cats': 0, 'dogs': 1}",
                   "the first 5 (file, label) pairs of imgs:", *(f"  {(str(path), 0)}" for path in TRAIN[:5]),
                   "dset_sizes: {'train': 16, 'valid': 8}")


def test_01_prints_the_first_batch_and_what_an_image_is(assert_printed):
    """Four cats and a dog; the numbers in the middle of the first image."""
    assert_printed(DATA, "", "batches in loader_valid: 2", "labels_try, the first batch: tensor([0, 0, 0, 0, 1])",
                   "inputs_try.shape: (5, 3, 224, 224)", "",
                   "What is an image for your computer? The central 4 x 4 pixels of inputs_try[0]:",
                   str(see(VALID[0])[:, 110:114, 110:114]))


def test_02_prints_outputs_and_probabilities(lesson, assert_printed):
    """Outputs are no probabilities: these are positive, and their sum is 1."""
    names, classes = lesson.names[VGG], common.IMAGENET.meta["categories"]
    outputs, probs = names["outputs_try"], names["probs"]
    assert_printed(VGG, f"the first 4 of the 1,000 classes, dic_imagenet[:4]: {classes[:4]}")
    assert_printed(VGG, "outputs_try:", *str(outputs).split("\n"), "outputs_try.shape: (5, 1000)")
    assert_printed(VGG, f"sum of the probabilities for each image, torch.sum(probs, 1): {probs.sum(dim=1)}",
                   f"highest probability, vals_try: {probs.amax(dim=1)}",
                   f"predicted class: {[classes[k] for k in probs.argmax(dim=1)]}")
    assert torch.allclose(probs.sum(dim=1), torch.ones(5))


def test_02_prints_the_five_most_likely_classes(lesson, assert_printed):
    """The best first, beside the true class."""
    classes, lines = common.IMAGENET.meta["categories"], []
    for animal, p in zip(["cats"] * 4 + ["dogs"], np.load(lesson.folder / "probs_try.npy"), strict=True):
        lines.append("  ".join([f"  {animal}:", *(f"{classes[k]} {p[k]:.3f}" for k in np.argsort(-p)[:5])]))
    assert_printed(VGG, *lines)


def test_03_prints_each_block(assert_printed):
    """The shape for one image and the number of parameters; the last is still ImageNet's."""
    blocks = [("2 convolutions, pooling", "8 x 112 x 112", "808"), ("2 convolutions, pooling", "16 x 56 x 56", "3,488"),
              ("3 convolutions, pooling", "16 x 28 x 28", "6,960"),
              ("3 convolutions, pooling", "32 x 14 x 14", "23,136"),
              ("3 convolutions, pooling", "512 x 7 x 7", "166,464"), ("dense", "64", "1,605,696"),
              ("dense", "4096", "266,240"), ("dense", "1000", "4,097,000")]
    assert_printed(FINETUNE, "each block: output shape for one image, and number of parameters", *(
        f"  block {i}: {name:<24} {shape:<15} {count:>11}" for i, (name, shape, count) in enumerate(blocks, 1)))


def test_03_prints_the_network_before_and_after(lesson, assert_printed):
    """1,000 classes become two: 8,194 parameters are trained."""
    classifier = lesson.names[FINETUNE]["model_vgg"].classifier
    assert isinstance(classifier[6], nn.Linear) and classifier[6].out_features == 2
    assert_printed(FINETUNE, str(common.load_vgg16("imagenet")))
    assert_printed(FINETUNE, "", "the classifier with its new last layer:", str(classifier))
    assert re.search(r"^trainable parameters: 8,194 \(.*\); frozen: 2,072,792$", lesson.printed[FINETUNE], re.M)


def test_03_prints_probabilities_and_not_their_logarithms(lesson, assert_printed):
    """Each row has the sum 1, and agrees with what is saved."""
    proba = torch.exp(lesson.names[FINETUNE]["outputs"])
    assert np.allclose(proba, np.load(lesson.folder / "03_all_proba.npy"), atol=1e-5)
    assert_printed(FINETUNE, "", "probabilities of cats and dogs for 8 images, torch.exp(outputs):", str(proba),
                   "their classes: tensor([0, 0, 0, 0, 1, 1, 1, 1])")


def test_03_says_that_two_updates_are_not_enough(lesson):
    """One batch in each of two epochs. Accuracy on the sample is no result."""
    advice = lesson.printed[FINETUNE].partition("\nOnly 2 updates, on 16 images: ")[2]
    assert " python 04_precompute.py --sample --layer fc7 --epochs 200\n" in advice


def test_04_prints_shapes_and_where_it_starts(assert_printed):
    """Six times fewer numbers than an image has."""
    assert_printed(PRECOMPUTE, "features of the first batch, x_try.shape: (5, 512, 7, 7)",
                   "numbers for one image: 25,088 (the image itself: 150,528)")
    assert_printed(PRECOMPUTE, "conv_feat_train.shape: (16, 512, 7, 7)")
    assert_printed(PRECOMPUTE,
                   "the last layer starts from 03_head.pt, trained on the same images with the same frozen layers")


@pytest.mark.parametrize("name, step, n_epochs, n_tests", [(FINETUNE, "03", 2, 1), (PRECOMPUTE, "04", 3, 4)])
def test_the_numbers_on_the_screen_are_those_of_the_files(lesson, name, step, n_epochs, n_tests):
    """A student compares them with those of others."""
    metrics = json.loads((lesson.folder / f"{step}_metrics.json").read_text())
    epochs = re.findall(r"^epoch +(\d+)/(\d+)  loss (\S+)  accuracy (\S+)  \S+ s$", lesson.printed[name], re.M)
    curves = zip(metrics["train_loss"], metrics["train_accuracy"], strict=True)
    assert epochs == [(str(i), str(n_epochs), f"{loss:.4f}", f"{accuracy:.4f}")
                      for i, (loss, accuracy) in enumerate(curves, 1)]
    tests = re.findall(r"^test on 8 images  loss (\S+)  accuracy (\S+)$", lesson.printed[name], re.M)
    assert len(tests) == n_tests and tests[-1] == (f"{metrics['valid_loss']:.4f}", f"{metrics['valid_accuracy']:.4f}")


def test_05_prints_the_answers_for_own_photos(lesson):
    """For each photo both classes."""
    proba = torch.stack([common.IMAGENET.transforms()(Image.open(path)) for path in [PHOTO, SECOND_PHOTO]])
    model = lesson.names[ANALYSIS]["model_vgg"]
    with torch.inference_mode():
        answers = model(proba).exp().tolist()
    lines = [f"  {path}:\n    cats {cat:.3f}\n    dogs {dog:.3f}\n"
             for path, (cat, dog) in zip([PHOTO, SECOND_PHOTO], answers, strict=True)]
    assert "".join(lines) in lesson.printed[ANALYSIS]


def test_02_prints_five_answers_for_each_photo(lesson):
    """The probabilities of the original network."""
    classes, model = common.IMAGENET.meta["categories"], common.load_vgg16("imagenet").eval()
    for path in [PHOTO, SECOND_PHOTO]:
        with torch.inference_mode():
            p = model(common.IMAGENET.transforms()(Image.open(path))[None])[0].softmax(dim=0).numpy()
        answers = "".join(f"    {classes[k]} {p[k]:.3f}\n" for k in np.argsort(-p)[:5])
        assert f"  {path}:\n{answers}" in lesson.printed[VGG]


def test_05_prints_a_summary(tmp_path, figures, capsys):
    """Of results with a known answer: 2 of 5 cats and 4 of 7 dogs are wrong."""
    dataset = make_dataset(tmp_path, train=1, valid=(5, 7))
    dog = np.array([.3, .11, .6, .11, .9, .13, .8, .002, .97, .42, .35, .95])
    true = np.where(np.arange(12) < 5, 1 - dog, dog)  # the probability of the true class
    fake_results(tmp_path, dataset, dog)
    analyse(dataset, tmp_path)
    printed = capsys.readouterr().out
    assert ("\ntraining accuracy in the last epoch (script 04): 0.7500\n") in printed
    assert "\naccuracy on 12 validation images: 0.5000\n" in printed
    assert ("\nsummary of script 04\n"
            f"  log loss                {-np.log(true).mean():.4f}  (NLLLoss, as in training)\n"
            f"  log loss, clipped       {-np.log(true.clip(.005, .995)).mean():.4f}  (as in --submission)\n"
            "  cats predicted as dogs  2 of 5\n"
            "  dogs predicted as cats  4 of 7\n") in printed


@pytest.mark.parametrize("name", ["02_vgg_imagenet.py", "05_analysis.py"])
def test_a_photo_of_a_phone_is_seen_upright(vgg, tmp_path, figures, capsys, name):
    """It is stored rotated, with EXIF data that says so: network and student see it the right way up."""
    dataset, exif, photo = make_dataset(tmp_path / "data", train=1, valid=1), Image.Exif(), tmp_path / "photo.png"
    upright, exif[0x0112] = Image.open(PHOTO).crop((0, 0, 200, 240)), 6  # the camera was held upright
    upright.transpose(Image.Transpose.ROTATE_90).save(photo, exif=exif)
    upright.save(tmp_path / "upright.png")
    fake_results(tmp_path, dataset, [0.1, 0.9], model=vgg)
    run_here(name, "--data-dir", dataset, "--output-dir", tmp_path, "--image", photo, tmp_path / "upright.png")
    answers = re.findall(r"png:\n((?:    .+\n)+)", capsys.readouterr().out)
    assert answers[0] == answers[1]
    left, *_ = figures[f"{name[:2]}_images.png"].axes
    assert np.array_equal(left.get_images()[0].get_array(), upright)


HINT = "To see it learn:\npython 04_precompute.py --sample --layer fc7 --epochs 200 --weights untrained --lr 0.1\n"


@pytest.mark.parametrize("layer", ["conv", "fc7"])
@pytest.mark.parametrize("loss, hint", [(0.69, True), (0.3, False)])
def test_04_says_how_to_see_the_untrained_network_learn(out, figures, monkeypatch, capsys, layer, loss, hint):
    """Who has no weights sees a loss near 0.69, and may think that the code is wrong."""
    monkeypatch.setattr(common, "log_loss", lambda all_proba, all_classes: loss)
    run_here("04_precompute.py", "--sample", "--weights", "untrained", "--output-dir", out, "--epochs", 1, "--layer",
             layer)
    assert (HINT in capsys.readouterr().out) == hint
