"""The scripts on a GPU: these tests run if there is one that can compute (CUDA or MPS), and are skipped elsewhere.
They compare with the CPU; a tensor that is left there by mistake stops a script with an error."""
import re

import numpy as np
import pytest
import torch
from conftest import PHOTO, json_of, make_dataset, not_painted, run_here

import common

GPU = common.get_device("auto").type
pytestmark = pytest.mark.skipif(GPU == "cpu", reason="there is no GPU here that can compute")
# NVIDIA GPUs multiply in TF32 inside convolutions: 10 bits of the fraction instead of float32's 23.
FEATURES, PROBABILITIES = 0.01, 0.005  # tolerances: of the largest feature; absolute
TRAINING = ["--epochs", 1, "--lr", 0]  # a learning rate of 0 leaves the last layer as it is


@pytest.fixture(scope="module")
def results(tmp_path_factory, vgg_file):
    """A function that runs 02 to 05 on a device, and returns the folder of results. 04 starts from 03's last layer."""
    photos = make_dataset(tmp_path_factory.mktemp("photos"), train=12, valid=12)
    (photos / "test1").mkdir()
    (photos / "test1" / "1.jpg").write_bytes(PHOTO.read_bytes())
    folders = {}

    def results(device):
        if device in folders:
            return folders[device]
        folder = folders[device] = tmp_path_factory.mktemp(device)
        with not_painted():
            for name, *own in [["02_vgg_imagenet.py", "--zero-shot", "--image", PHOTO],
                               ["03_finetune_head.py", *TRAINING], ["04_precompute.py", *TRAINING],
                               ["05_analysis.py", "--image", PHOTO, "--submission"]]:
                run_here(name, "--data-dir", photos, "--output-dir", folder, "--device", device, *own)
        return folder

    results.photos = photos
    return results


def assert_close(results, name, tolerance):
    """A file of the GPU has the numbers of the CPU."""
    gpu, cpu = (np.load(results(device) / name) for device in [GPU, "cpu"])
    assert gpu.shape == cpu.shape and np.abs(gpu - cpu).max() < tolerance


def test_02_gives_the_probabilities_of_the_cpu(results):
    """For the first batch and, with --zero-shot, for all images."""
    assert_close(results, "probs_try.npy", PROBABILITIES)
    gpu, cpu = (json_of(results(device) / "02_zero_shot.json") for device in [GPU, "cpu"])
    assert abs(gpu["outside"] - cpu["outside"]) < PROBABILITIES


def test_03_gives_the_probabilities_of_the_cpu(results):
    """The same last layer must give the same answer for every image, also when batches are copied in the background."""
    heads = [torch.load(results(device) / "03_head.pt")["weight"] for device in [GPU, "cpu"]]
    assert torch.equal(*heads)
    assert np.ptp(np.load(results("cpu") / "03_all_proba.npy")) > 2 * PROBABILITIES  # the images differ by more
    assert_close(results, "03_all_proba.npy", PROBABILITIES)


@pytest.mark.parametrize("x", ["train", "valid"])
def test_04_gives_the_features_of_the_cpu(results, x):
    """Features that were computed on Colab's GPU must serve on a laptop."""
    largest = np.load(results("cpu") / f"conv_feat_{x}.npy").max()
    assert_close(results, f"conv_feat_{x}.npy", FEATURES * largest)


def test_records_of_the_gpu_fit_on_the_cpu(results, tmp_path, capsys):
    """A laptop continues where Colab stopped: nothing is computed again, and 04 starts from 03's last layer."""
    for path in results(GPU).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    options = ["--data-dir", results.photos, "--output-dir", tmp_path, "--device", "cpu", *TRAINING]
    with not_painted():
        run_here("04_precompute.py", *options)
    printed = capsys.readouterr().out
    assert printed.count("already computed from the same images, layers, transform and precision") == 2
    assert "the last layer starts from 03_head.pt" in printed


def test_04_after_03_gives_the_probabilities_of_the_cpu(results):
    """The last layer that was loaded is on the GPU, too, and the same as 03's."""
    heads = [torch.load(results(GPU) / f"{step}_head.pt")["weight"] for step in ["03", "04"]]
    assert torch.equal(*heads)
    assert_close(results, "04_all_proba.npy", PROBABILITIES)


def test_05_gives_the_submission_of_the_cpu(results):
    """The trained network on new photos; --image uses the same one."""
    gpu, cpu = (re.findall(r"0\.\d+", (results(device) / "submission.csv").read_text()) for device in [GPU, "cpu"])
    assert len(gpu) == 1 and abs(float(gpu[0]) - float(cpu[0])) < PROBABILITIES


def test_training_lowers_the_loss_and_changes_only_the_last_layer(results, tmp_path, figures):
    """Several small batches one after another: none may be overwritten while it is copied."""
    options = ["--data-dir", results.photos, "--output-dir", tmp_path, "--device", GPU, "--epochs", 8, "--lr", 0.05]
    names = run_here("03_finetune_head.py", *options, "--batch-size", 3, "--num-workers", 2)
    assert names["changed"]["frozen"] == 0 < names["changed"]["trainable"]
    assert names["metrics"]["valid_loss"] < -np.log(0.5) - 0.03  # better than guessing
