"""The scripts on a GPU: these tests run if there is one that can compute (CUDA or MPS), and are skipped elsewhere.
They compare with the CPU; a tensor that is left there by mistake stops a script with an error."""
import shutil

import numpy as np
import pytest
from conftest import PHOTO, json_of, make_dataset, not_painted, run_here

import common

GPU = common.get_device("auto").type
pytestmark = pytest.mark.skipif(GPU == "cpu", reason="there is no GPU here that can compute")
TRAINING = ["--epochs", 1, "--lr", 0]  # a learning rate of 0 leaves the last layer as it is
READ = {".npy": np.load, ".json": lambda path: json_of(path)["outside"],
        ".csv": lambda path: np.loadtxt(path, delimiter=",", skiprows=1)}


@pytest.fixture(scope="module")
def results(tmp_path_factory, vgg_file):
    """The photos, and the results of 02 to 05 on each device, {name: folder}. 04 starts from 03's last layer."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ["photos", GPU, "cpu"]}
    photos = make_dataset(folders["photos"], train=12, valid=12)
    (photos / "test1").mkdir()
    shutil.copy(PHOTO, photos / "test1" / "1.jpg")
    for device in [GPU, "cpu"]:
        for name, *own in [["02_vgg_imagenet.py", "--zero-shot", "--image", PHOTO], ["03_finetune_head.py", *TRAINING],
                           ["04_precompute.py", *TRAINING], ["05_analysis.py", "--image", PHOTO, "--submission"]]:
            with not_painted():
                run_here(name, "--data-dir", photos, "--output-dir", folders[device], "--device", device, *own)
    return folders


@pytest.mark.parametrize("name, tolerance", [
    ("probs_try.npy", 0.01), ("02_zero_shot.json", 0.01), ("conv_feat_train.npy", 0.01), ("conv_feat_valid.npy", 0.01),
    ("03_all_proba.npy", 0.001), ("04_all_proba.npy", 0.001), ("submission.csv", 0.001)])
def test_a_gpu_gives_the_numbers_of_the_cpu(results, name, tolerance):
    """Up to a fraction of the largest value: NVIDIA GPUs multiply in TF32 inside convolutions, with 10 bits instead of
    23. The probabilities of a last layer that is not trained differ little between images, and must agree better."""
    gpu, cpu = (READ[(results[device] / name).suffix](results[device] / name) for device in [GPU, "cpu"])
    assert np.shape(gpu) == np.shape(cpu) and np.abs(gpu - cpu).max() < tolerance * np.max(cpu)


def test_records_of_the_gpu_fit_on_the_cpu(results, tmp_path, capsys, figures):
    """A laptop continues where Colab stopped: nothing is computed again, and 04 starts from 03's last layer."""
    folder = shutil.copytree(results[GPU], tmp_path / "out")
    run_here("04_precompute.py", "--data-dir", results["photos"], "--output-dir", folder, "--device", "cpu", *TRAINING)
    printed = capsys.readouterr().out
    assert printed.count("already computed from the same images, layers, transform and precision") == 2
    assert "the last layer starts from 03_head.pt" in printed


def test_training_beats_guessing_and_changes_only_the_last_layer(results, tmp_path, figures):
    """Several small batches one after another: none may be overwritten while it is copied."""
    options = ["--data-dir", results["photos"], "--output-dir", tmp_path, "--device", GPU, "--epochs", 8, "--lr", 0.05]
    names = run_here("03_finetune_head.py", *options, "--batch-size", 3, "--num-workers", 2)
    assert names["changed"]["frozen"] == 0 < names["changed"]["trainable"]
    assert names["metrics"]["valid_loss"] < -np.log(0.5) - 0.03  # better than guessing
