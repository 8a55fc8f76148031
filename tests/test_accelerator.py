"""The scripts on a GPU: these tests run if there is one that can compute (CUDA or MPS), and are skipped elsewhere."""
import numpy as np
import pytest
import torch
from conftest import json_of, make_dataset, run_here

import common

GPU = common.get_device("auto").type
pytestmark = pytest.mark.skipif(GPU == "cpu", reason="there is no GPU here that can compute")
# NVIDIA GPUs multiply in TF32 inside convolutions: 10 bits of the fraction instead of float32's 23.
FEATURES, PROBABILITIES = 0.01, 0.005  # tolerances: of the largest feature; absolute


@pytest.fixture
def photos(tmp_path):
    return make_dataset(tmp_path / "data", train=12, valid=12)


def results_of(script, device, photos, folder):
    run_here(script, "--data-dir", photos, "--output-dir", folder, "--device", device, "--epochs", 1, "--lr", 0)
    return folder


def test_features_agree_with_those_of_the_cpu(photos, tmp_path, figures):
    """Features that were computed on Colab's GPU must serve on a laptop."""
    gpu = results_of("04_precompute.py", GPU, photos, tmp_path / "gpu")
    cpu = results_of("04_precompute.py", "cpu", photos, tmp_path / "cpu")
    for name in ("conv_feat_train.npy", "conv_feat_valid.npy"):
        features = np.load(cpu / name)
        assert np.abs(np.load(gpu / name) - features).max() < FEATURES * features.max()
    assert json_of(gpu / "04_metrics.json")["made_from"] == json_of(cpu / "04_metrics.json")["made_from"]


def test_probabilities_agree_with_those_of_the_cpu(photos, tmp_path, figures):
    """The same last layer must give the same answer for every image, also when batches are copied in the background."""
    gpu = results_of("03_finetune_head.py", GPU, photos, tmp_path / "gpu")
    cpu = results_of("03_finetune_head.py", "cpu", photos, tmp_path / "cpu")
    assert torch.equal(*(torch.load(folder / "03_head.pt")["weight"] for folder in (gpu, cpu)))
    proba = np.load(cpu / "03_all_proba.npy")
    assert np.ptp(proba) > 2 * PROBABILITIES  # the images differ by more than the tolerance
    assert np.abs(np.load(gpu / "03_all_proba.npy") - proba).max() < PROBABILITIES


def test_training_lowers_the_loss_and_changes_only_the_last_layer(photos, tmp_path, figures):
    """Several small batches one after another: none may be overwritten while it is copied."""
    options = ["--data-dir", photos, "--output-dir", tmp_path, "--device", GPU, "--epochs", 8, "--lr", 0.05]
    names = run_here("03_finetune_head.py", *options, "--batch-size", 3, "--num-workers", 2)
    assert names["changed"]["frozen"] == 0 < names["changed"]["trainable"]
    assert names["metrics"]["valid_loss"] < -np.log(0.5) - 0.03  # better than guessing
