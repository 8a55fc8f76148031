"""The five scripts as a student runs them, on the bundled sample, and their files against the contract."""
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, make_dataset, run_here, script
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, models

import common

SCRIPTS = ["01_data.py", "02_vgg_imagenet.py", "03_finetune_head.py", "04_precompute.py", "05_analysis.py"]
N, M = 16, 8  # train and valid images of the bundled sample
ARRAYS = {
    "inputs_try.npy": ((5, 3, 224, 224), np.float32), "labels_try.npy": ((5,), np.int64),
    "probs_try.npy": ((5, 1000), np.float32),
    "conv_feat_train.npy": ((N, 512, 7, 7), np.float32), "conv_feat_valid.npy": ((M, 512, 7, 7), np.float32),
    "labels_train.npy": ((N,), np.int64), "labels_valid.npy": ((M,), np.int64),
    **{f"{step}_{name}.npy": value for step in ("03", "04") for name, value in {
        "predictions": ((M,), np.int64), "all_proba": ((M, 2), np.float32), "all_classes": ((M,), np.int64)}.items()},
}
FIGURES = ["01_valid_batch", "01_train_batch", "02_predictions", "02_zero_shot", "02_images", "03_training",
           "03_valid_batch", "04_training", "04_valid_batch", "05_correct", "05_incorrect", "05_most_correct_cats",
           "05_most_correct_dogs", "05_most_incorrect_cats", "05_most_incorrect_dogs", "05_most_uncertain",
           "05_confusion", "05_histogram", "05_images"]


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays(outputs, name):
    array = np.load(outputs[0] / name, allow_pickle=False)
    assert (array.shape, array.dtype) == ARRAYS[name]
    assert np.isfinite(array).all()
    if "prob" in name:
        assert np.allclose(array.sum(axis=1), 1, atol=1e-5) and (array >= 0).all()


def test_nothing_else_is_left(outputs):
    expected = {*ARRAYS, *(f"{name}.png" for name in FIGURES), "03_head.pt", "04_head.pt", "03_metrics.json",
                "04_metrics.json", "02_zero_shot.json", "conv_feat_train.json", "conv_feat_valid.json"}
    assert {path.name for path in outputs[0].iterdir()} == expected


@pytest.mark.parametrize("name", FIGURES)
def test_figures(outputs, name):
    image = Image.open(outputs[0] / f"{name}.png").convert("RGB")
    assert 400 <= image.width <= 2000 and 200 <= image.height <= 2000
    assert np.asarray(image).std() > 1  # not blank


@pytest.mark.parametrize("step", ["03", "04"])
def test_results_belong_together(outputs, step):
    folder = outputs[0]
    predictions, all_proba, all_classes = (np.load(folder / f"{step}_{name}.npy")
                                           for name in ("predictions", "all_proba", "all_classes"))
    assert np.array_equal(all_classes, [0] * 4 + [1] * 4)
    assert np.array_equal(predictions, all_proba.argmax(axis=1))
    head = torch.load(folder / f"{step}_head.pt", weights_only=True)
    assert {name: tuple(value.shape) for name, value in head.items()} == {"weight": (2, 4096), "bias": (2,)}
    metrics = json.loads((folder / f"{step}_metrics.json").read_text())
    assert metrics["valid_accuracy"] == pytest.approx((predictions == all_classes).mean())
    loss = -np.log(all_proba[np.arange(M), all_classes].astype(float)).mean()
    assert metrics["valid_loss"] == pytest.approx(loss, abs=1e-5)
    assert metrics["pretrained"] and metrics["weights"] == "imagenet" and metrics["dataset_sizes"]["train"] == N
    assert len(metrics["train_loss"]) == len(metrics["train_accuracy"]) == metrics["options"]["epochs"]


@pytest.mark.parametrize("step", ["03", "04"])
def test_gives_the_lectures_numbers(outputs, vgg_file, step):
    """The notebook's own loop, in the default memory layout, with batches of 5 and the head that was saved."""
    folder = outputs[0]
    model = models.vgg16()
    model.load_state_dict(torch.load(vgg_file, weights_only=True))
    model.classifier[6] = nn.Linear(4096, 2)
    model.classifier.add_module("7", nn.LogSoftmax(dim=1))
    model.classifier[6].load_state_dict(torch.load(folder / f"{step}_head.pt", weights_only=True))
    model.eval()
    dset = datasets.ImageFolder(ROOT / "sample" / "valid", common.imagenet_format)
    with torch.no_grad():
        features = torch.cat([model.features(inputs) for inputs, _ in DataLoader(dset, batch_size=5)])
        proba = model.classifier(features.reshape(M, -1)).exp().numpy()
    assert np.abs(np.load(folder / "conv_feat_valid.npy") - features.numpy()).max() < 1e-4
    assert np.abs(np.load(folder / f"{step}_all_proba.npy") - proba).max() < 1e-4


def test_the_same_seed_gives_the_same_results(outputs, tmp_path, monkeypatch):
    """To the last bit, from whatever folder, with worker processes or without."""
    monkeypatch.chdir(tmp_path)
    run_here("03_finetune_head.py", "--sample", "--output-dir", "here", "--num-workers", 1)
    for name in ("03_head.pt", "03_all_proba.npy", "03_predictions.npy"):
        assert (tmp_path / "here" / name).read_bytes() == (outputs[0] / name).read_bytes()


def test_first_batch_and_its_probabilities(outputs, vgg_file):
    dset = datasets.ImageFolder(ROOT / "sample" / "valid", common.imagenet_format)
    inputs = torch.stack([dset[i][0] for i in range(5)])
    assert np.array_equal(np.load(outputs[0] / "inputs_try.npy"), inputs.numpy())
    assert np.array_equal(np.load(outputs[0] / "labels_try.npy"), dset.targets[:5])
    model = models.vgg16().eval()
    model.load_state_dict(torch.load(vgg_file, weights_only=True))
    with torch.no_grad():
        probs = torch.softmax(model(inputs), dim=1).numpy()
    assert np.abs(np.load(outputs[0] / "probs_try.npy") - probs).max() < 1e-4


def test_training_changes_the_last_layer_alone(vgg, dataset):
    dset = datasets.ImageFolder(dataset / "train", common.imagenet_format)
    before = {name: value.clone() for name, value in vgg.state_dict().items()}
    optimizer = torch.optim.SGD(vgg.classifier[6].parameters(), lr=0.1)
    common.train_model(vgg, DataLoader(dset, batch_size=3), optimizer, 1)
    changed = {name for name, value in vgg.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"classifier.6.weight", "classifier.6.bias"}
    assert all(param.grad is None for name, param in vgg.named_parameters() if not name.startswith("classifier.6"))


def test_04_goes_on_from_03(outputs):
    metrics = json.loads((outputs[0] / "04_metrics.json").read_text())
    assert metrics["from_03_head"]
    printed = outputs[1]["04_precompute.py"]
    assert "goes on from 03_head.pt" in printed and "paid for itself after epoch" in printed


@pytest.mark.parametrize("name", SCRIPTS)
def test_headings_of_the_video(outputs, name):
    printed = outputs[1][name]
    minutes = {"01_data.py": [1175, 1550], "02_vgg_imagenet.py": [2451], "03_finetune_head.py": [2755, 2990],
               "04_precompute.py": [3460], "05_analysis.py": [3819]}[name]
    places = [printed.index(f"https://youtu.be/ZhC-DIrCe6A?t={second}\n") for second in minutes]
    assert places == sorted(places)
    assert printed.startswith("options: ") and "untrained" not in printed
    assert printed.splitlines()[-1].startswith("Done. Next, with the same options: " if name != "05_analysis.py" else "Done. Next: ")


def test_what_the_lecture_prints(outputs):
    printed = outputs[1]
    assert "dset_sizes: {'train': 16, 'valid': 8}" in printed["01_data.py"]
    assert "class_to_idx, their labels: {'cats': 0, 'dogs': 1}" in printed["01_data.py"]
    assert "['tench', 'goldfish', 'great white shark', 'tiger shark']" in printed["02_vgg_imagenet.py"]
    assert "outputs_try.shape: (5, 1000)" in printed["02_vgg_imagenet.py"]
    assert "trainable parameters: 8,194 " in printed["03_finetune_head.py"]
    assert "x_try.shape: (5, 512, 7, 7)" in printed["04_precompute.py"]
    assert "zero-shot accuracy" in printed["05_analysis.py"]


def test_fc7_features_give_the_probabilities_of_the_whole_network(outputs, vgg, dataset, tmp_path):
    """conv and fc7 features, sent through the layers above them, against the network on the images."""
    run_here("04_precompute.py", "--data-dir", dataset, "--output-dir", tmp_path, "--layer", "fc7", "--epochs", 2)
    vgg.classifier[6].load_state_dict(torch.load(tmp_path / "04_head.pt", weights_only=True))
    dset = datasets.ImageFolder(dataset / "valid", common.imagenet_format)
    inputs = torch.stack([image for image, _ in dset])
    with torch.inference_mode():
        direct = vgg(inputs).exp().numpy()
        fc7 = vgg.classifier[:6](vgg.features(inputs).flatten(1)).numpy()
    assert np.abs(np.load(tmp_path / "fc7_feat_valid.npy") - fc7).max() < 1e-4
    assert np.abs(np.load(tmp_path / "04_all_proba.npy") - direct).max() < 1e-4
    assert not json.loads((tmp_path / "04_metrics.json").read_text())["from_03_head"]


def test_python_i_leaves_the_lectures_names(torch_home, dataset, tmp_path):
    names = ("dsets", "dset_sizes", "dset_classes", "loader_train", "loader_valid", "inputs_try", "labels_try", "model_vgg",
             "criterion", "optimizer_vgg", "predictions", "all_proba", "all_classes")
    command = [sys.executable, "-i", ROOT / "03_finetune_head.py", "--data-dir", dataset, "--output-dir", tmp_path,
               "--epochs", "1"]
    typed = f"print('there:', *({','.join(names)},)[5].shape, predictions.shape)\n1 / 0\nprint('still there')\n"
    done = subprocess.run(command, input=typed, capture_output=True, text=True)
    assert "there: 4 3 224 224 (4,)" in done.stdout and "still there" in done.stdout
    assert "ZeroDivisionError" in done.stderr


def test_help_is_a_manual_with_an_example(capsys):
    with pytest.raises(SystemExit) as ended:
        run_here("04_precompute.py", "--help")
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    for text in ("python 04_precompute.py --sample", "04_head.pt", "common options", "--layer {conv,fc7}", "default: 50"):
        assert text in printed
    for name in SCRIPTS:  # --help begins with the docstring
        doc = script(name.removesuffix(".py")).__doc__
        assert f"python {name} --sample" in doc and "https://youtu.be/ZhC-DIrCe6A?t=" in doc


@pytest.mark.parametrize("options", [["--epochs", "0"], ["--epochs", "two"], ["--seed", "-1"], ["--device", "gpu"]])
def test_wrong_options_end_with_2(options, capsys):
    with pytest.raises(SystemExit) as ended:
        run_here("03_finetune_head.py", "--sample", *options)
    assert ended.value.code == 2 and f"argument {options[0]}: " in capsys.readouterr().err


def test_untrained_weights_are_marked(torch_home, tmp_path, capsys):
    """To the last line of each script, and in the metrics."""
    make_dataset(tmp_path / "sample", train=2, valid=1)
    options = ["--sample", "--data-dir", tmp_path, "--output-dir", tmp_path / "out", "--weights", "untrained"]
    for name in SCRIPTS[1:]:
        more = ["--epochs", 1] if name[:2] in ("03", "04") else []
        run_here(name, *options[:-2 if name[:2] == "05" else None], *more)
        lines = capsys.readouterr().out.splitlines()
        assert lines[-1].startswith("Done, untrained weights. Next")
        if name[:2] != "05":
            assert any("NOTICE: untrained weights" in line for line in lines)
        if name[:2] in ("03", "04"):
            assert json.loads((tmp_path / "out" / f"{name[:2]}_metrics.json").read_text())["pretrained"] is False


def test_nothing_but_the_contract_at_the_top_level():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    top = {name.split("/")[0] for name in tracked.stdout.split()}
    allowed = {*SCRIPTS, "common.py", "sample", "tests", "requirements.txt", "README.md", "LICENSE"}
    assert {name for name in top if not name.startswith(".")} == allowed


def test_scripts_import_without_running():
    for name in SCRIPTS:
        assert not hasattr(script(name.removesuffix(".py")), "args")
    assert os.path.samefile(common.HERE, ROOT)
