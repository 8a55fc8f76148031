"""What the five scripts print of the lecture's variables. On the sample: 16 training and 8 validation images."""
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SAMPLE, SCRIPTS, TRAIN, VALID, json_of, run_here
from PIL import Image
from torchvision import models

import common

DATA, VGG, FINETUNE, PRECOMPUTE, ANALYSIS = SCRIPTS
NAMES = common.IMAGENET.meta["categories"]
GPU = torch.cuda.is_available() or torch.backends.mps.is_available()


def assert_printed(lesson, script, *lines):
    """The script has printed these lines one after another."""
    assert "\n".join(["", *lines, ""]) in "\n" + lesson.printed[script]


def test_each_script_prints_its_options_and_leads_to_the_next(lesson):
    """A student knows what was run, and what comes next."""
    endings = [*(f", with the same options (--sample, --limit, ...): python {script}" for script in SCRIPTS[1:]),
               ": change a line and run the script again; the README has exercises"]
    for script, ending in zip(SCRIPTS, endings, strict=True):
        assert f"options: sample=True data_dir={SAMPLE} output_dir={lesson.folder} seed=0 " in lesson.printed[script]
        assert lesson.printed[script].endswith(f"\nDone. Next{ending}\n")


@pytest.mark.parametrize("script, lines", [
    (DATA, [f"torch {torch.__version__}", f"Python {sys.version}", f"GPU found: {GPU}"]),
    (DATA, [str(SAMPLE), *(f"  {Path(folder)!s:<20} {count:6} images" for folder, count in [
        ("train/cats", 8), ("train/dogs", 8), ("valid/cats", 4), ("valid/dogs", 4)])]),
    (DATA, [str(common.imagenet_format)]),
    (DATA, ["classes: ['cats', 'dogs']", "class_to_idx: {'cats': 0, 'dogs': 1}",
            "the first 5 (file, label) pairs of imgs:", *(f"  {(str(path), 0)}" for path in TRAIN[:5]),
            "dset_sizes: {'train': 16, 'valid': 8}"]),
    (DATA, ["batches in loader_valid: 2", "labels_try, the first batch: tensor([0, 0, 0, 0, 1])",
            "inputs_try.shape: (5, 3, 224, 224)"]),
    (DATA, ["What is an image for your computer? The central 4 x 4 pixels of inputs_try[0]:",
            str(common.imagenet_format(Image.open(VALID[0]))[:, 110:114, 110:114])]),
    (VGG, [f"the first 4 of the 1,000 classes, dic_imagenet[:4]: {NAMES[:4]}"]),
    (FINETUNE, [str(models.vgg16())]),
    (FINETUNE, ["each block: output shape for one image, and number of parameters",
                "  block 1: 2 convolutions, pooling  8 x 112 x 112           808",
                "  block 2: 2 convolutions, pooling  16 x 56 x 56          3,488",
                "  block 3: 3 convolutions, pooling  16 x 28 x 28          6,960",
                "  block 4: 3 convolutions, pooling  32 x 14 x 14         23,136",
                "  block 5: 3 convolutions, pooling  512 x 7 x 7         166,464",
                "  block 6: dense                    64                1,605,696",
                "  block 7: dense                    4096                266,240",
                "  block 8: dense                    1000              4,097,000"]),
    (FINETUNE, ["  (6): Linear(in_features=4096, out_features=2, bias=True)", "  (7): LogSoftmax(dim=1)", ")",
                "trainable parameters: 8,194 (new last layer: 2 x 4096 + 2); frozen: 2,072,792"]),
    (FINETUNE, ["Only 2 updates, on 16 images: the code works, but the model has learned almost nothing.",
                "To see it learn, you can also run python 04_precompute.py --sample --layer fc7 --epochs 200"]),
    (PRECOMPUTE, ["features of the first batch, x_try.shape: (5, 512, 7, 7)",
                  "numbers for one image: 25,088 (the image itself: 150,528)"]),
    (PRECOMPUTE, ["conv_feat_train.shape: (16, 512, 7, 7)"])],
    ids=lambda value: value if isinstance(value, str) else value[0].partition(":")[0])
def test_the_lectures_variables_are_printed(lesson, script, lines):
    """A student compares them with the video, and shows them to whoever helps."""
    assert_printed(lesson, script, *lines)


def test_04_says_how_an_untrained_network_learns_something(out, figures, capsys):
    """Otherwise a first try without network would end with 50%."""
    run_here(PRECOMPUTE, "--sample", "--output-dir", out, "--weights", "untrained", "--epochs", 1)
    assert ("almost nothing in this time. To see it learn:\npython 04_precompute.py --sample --layer fc7 --epochs 200 "
            "--weights untrained --lr 0.1\n") in capsys.readouterr().out


def test_02_and_03_print_probabilities(lesson):
    """Neither outputs nor log-probabilities: these are positive, and their sum is 1."""
    outputs = lesson.names[VGG]["outputs_try"]
    probs, proba = outputs.softmax(dim=1), lesson.names[FINETUNE]["outputs"].exp()
    assert_printed(lesson, VGG, "outputs_try:", str(outputs), "outputs_try.shape: (5, 1000)")
    assert_printed(lesson, VGG, f"sum of the probabilities for each image, torch.sum(probs, 1): {probs.sum(dim=1)}",
                   f"highest probability, vals_try: {probs.amax(dim=1)}",
                   f"predicted class: {[NAMES[k] for k in probs.argmax(dim=1)]}")
    for animal, p in zip(["cats"] * 4 + ["dogs"], probs, strict=True):
        best = p.argsort(descending=True)[:5]
        assert_printed(lesson, VGG, "  ".join([f"  {animal}:", *(f"{NAMES[k]} {p[k]:.3f}" for k in best)]))
    assert np.allclose(proba, np.load(lesson.folder / "03_all_proba.npy"), atol=1e-5)
    assert_printed(lesson, FINETUNE, "probabilities of cats and dogs for 8 images, torch.exp(outputs):", str(proba),
                   "their classes: tensor([0, 0, 0, 0, 1, 1, 1, 1])")


@pytest.mark.parametrize("script, n_epochs", [(FINETUNE, 2), (PRECOMPUTE, 3)])
def test_the_numbers_on_the_screen_are_those_of_the_files(lesson, script, n_epochs):
    """A student compares them with those of others."""
    metrics = json_of(lesson.folder / f"{script[:2]}_metrics.json")
    for i in range(n_epochs):
        loss, accuracy = metrics["train_loss"][i], metrics["train_accuracy"][i]
        assert f"\nepoch {i + 1:2}/{n_epochs}  loss {loss:.4f}  accuracy {accuracy:.4f}  " in lesson.printed[script]
    assert_printed(lesson, script,
                   f"test on 8 images  loss {metrics['valid_loss']:.4f}  accuracy {metrics['valid_accuracy']:.4f}")
