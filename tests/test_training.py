"""common.py: train_model, test_model and save_results, each compared with plain torch and numpy."""
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import json_of, message, raise_, run_here
from torch import nn

import common

INPUTS = torch.randn(37, 8, generator=torch.Generator().manual_seed(1))
LABELS = (INPUTS[:, 0] > 0).long()
BATCHES = list(zip(INPUTS.split(10), LABELS.split(10), strict=True))  # the last one has 7 images
TINY = np.finfo(np.float64).tiny


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 2), nn.LogSoftmax(dim=1))


def train(model, lr=0.0, criterion=nn.NLLLoss()):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    return common.train_model(model, BATCHES, 37, 2, optimizer, criterion)


def test_each_epoch_has_its_own_loss_accuracy_and_time(monkeypatch, capsys, watched):
    """The mean over images, not over batches; a clock shows 0 and 2 s for the first epoch, 10 and 15 s for the next."""
    model, clock, calls = small_model().eval(), iter([0, 2, 10, 15]), watched("common")
    criterion = nn.CrossEntropyLoss(label_smoothing=0.5)
    monkeypatch.setattr(common, "time", SimpleNamespace(perf_counter=clock.__next__))
    history = train(model, criterion=criterion)
    assert model.training  # with dropout
    loss = criterion(model(INPUTS), LABELS).item()
    accuracy = np.mean((model(INPUTS).argmax(dim=1) == LABELS).numpy())
    assert history == [{"loss": pytest.approx(loss), "accuracy": accuracy, "seconds": t} for t in (2, 5)]
    assert capsys.readouterr().out.splitlines() == [
        f"epoch  {i}/2  loss {loss:.4f}  accuracy {accuracy:.4f}  {t} s" for i, t in [(1, "2.00"), (2, "5.00")]]
    assert calls == [(4, 37, "images")] * 2


@pytest.mark.parametrize("last_layer, lr, loss", [(nn.LogSoftmax(dim=1), 1e38, "inf"), (nn.Softmax(dim=1), 0, "-0.")])
def test_a_loss_that_cannot_be_right_ends_the_training(last_layer, lr, loss):
    """Too large a learning rate, or the wrong last layer: the remaining hours would be lost."""
    model = small_model()
    model[1] = last_layer
    text = message(train, model, lr)
    assert text.startswith(f"error: the training loss is {loss}")
    assert text.endswith(": use a smaller --lr, or LogSoftmax if it is negative")


@pytest.mark.parametrize("kind", ["cpu", "cuda", "mps"])
def test_batches_are_copied_in_the_background_to_cuda_alone(kind):
    """On MPS, the network could see a different batch."""
    copies, model = [], small_model()

    class Batch(torch.Tensor):
        def to(self, device, non_blocking=False):
            copies.append((device.type, non_blocking))
            return self.as_subclass(torch.Tensor)

    batch = [tensor.as_subclass(Batch) for tensor in BATCHES[0]]
    optimizer = torch.optim.SGD(model.parameters())
    model.parameters = lambda: iter([SimpleNamespace(device=torch.device(kind))])
    common.train_model(model, [batch], 10, 1, optimizer)
    assert copies == [(kind, kind == "cuda")] * 2  # images and classes


def test_results_of_the_test_are_in_order_and_its_loss_is_finite(capsys, watched):
    """A large learning rate can make a probability 0: what is printed and what 05 computes must agree."""
    model, calls = small_model(), watched("common")
    model[0].weight.data *= 1000
    proba = torch.cat([model(inputs) for inputs, _ in BATCHES]).detach().double().exp().clip(TINY).numpy()
    predictions, all_proba, all_classes = common.test_model(model, BATCHES, size=37)
    assert not model.training and calls == [(4, 37, "images")]
    assert np.array_equal(predictions, proba.argmax(axis=1)) and np.array_equal(all_classes, LABELS)
    assert np.allclose(all_proba, proba, rtol=1e-9, atol=0)
    of_true_class = proba[range(37), LABELS]
    loss, accuracy = -np.log(of_true_class).mean(), np.mean(of_true_class > 0.5)
    assert of_true_class.min() == TINY and common.log_loss(all_proba, all_classes) == pytest.approx(loss)
    assert capsys.readouterr().out == f"test on 37 images  loss {loss:.4f}  accuracy {accuracy:.4f}\n"


def test_the_loss_of_a_probability_of_0_is_finite():
    """JSON has no infinity."""
    assert common.log_loss(np.array([[1, 0]]), np.array([1])) == pytest.approx(-np.log(TINY))


def test_outputs_without_a_softmax_are_understood():
    """A student replaces LogSoftmax and NLLLoss by CrossEntropyLoss: "probabilities" of 7 would be nonsense."""
    outputs = torch.tensor([[2.0, 1.0, -3.0], [0.0, 0.5, 0.1]])
    expected = outputs.double().log_softmax(dim=1)
    on_mps = SimpleNamespace(cpu=lambda: outputs)  # has no float64
    assert torch.allclose(common.to_log_proba(on_mps), expected)
    assert torch.allclose(common.to_log_proba(expected.float()), expected, atol=1e-6)


def test_outputs_that_are_not_numbers_end_the_run():
    """Instead of an accuracy of 50%."""
    assert message(common.to_log_proba, torch.tensor([[torch.nan, 0.0]])) == (
        "error: the network's outputs are NaN (not a number): use a smaller --lr, or different weights")


# --------------------------------------------------------------------------------------------------------- results
HISTORY = [{"loss": 0.7, "accuracy": 0.5, "seconds": 2.0, "valid_loss": 0.5, "valid_accuracy": 0.8},
           {"loss": 0.6, "accuracy": 0.75, "seconds": 6.0, "valid_loss": 0.4, "valid_accuracy": 0.9}]
RESULTS = np.array([0, 0, 1]), np.array([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6]]), np.array([0, 1, 1])


def save_results(folder, *results):
    on_gpu = SimpleNamespace(cpu=lambda: torch.ones(2, 4096))
    layer = SimpleNamespace(state_dict=lambda: {"weight": on_gpu})
    args = Namespace(output_dir=folder, data_dir="data", weights="imagenet")
    common.save_results(args, "04", Namespace(classifier=[*"012345", layer]), {"x": "y"}, HISTORY, *results)


def test_saving_after_an_epoch_does_not_wait_for_the_disk_and_prints_nothing(tmp_path, capsys, monkeypatch):
    """The last layer is there if a run is stopped after two of fifty epochs."""
    monkeypatch.setattr("os.fsync", lambda file: raise_(AssertionError))
    save_results(tmp_path)
    assert capsys.readouterr().out == ""
    assert torch.load(tmp_path / "04_unfinished_head.pt")["weight"].sum() == 2 * 4096


def test_metrics_and_predictions_are_saved_after_the_test(tmp_path):
    """The files from which 05 and a student's own code start. What was saved before the test is removed."""
    save_results(tmp_path)
    save_results(tmp_path, RESULTS)
    assert json_of(tmp_path / "04_metrics.json") == {
        "options": {"output_dir": str(tmp_path), "data_dir": "data", "weights": "imagenet"}, "weights": "imagenet",
        "pretrained": True, "dataset": "data", "made_from": {"x": "y"}, "seconds_per_epoch": 4.0,
        "train_loss": [0.7, 0.6], "train_accuracy": [0.5, 0.75], "valid_loss_per_epoch": [0.5, 0.4],
        "valid_accuracy_per_epoch": [0.8, 0.9], "valid_loss": pytest.approx(-np.log([0.9, 0.2, 0.6]).mean()),
        "valid_accuracy": 2 / 3}
    for name, array in zip(["predictions", "all_proba", "all_classes"], RESULTS, strict=True):
        assert np.array_equal(np.load(tmp_path / f"04_{name}.npy"), array)
    assert not list(tmp_path.glob("*unfinished*"))


def test_a_test_model_that_returns_logarithms_loses_no_training(options, out, figures, monkeypatch):
    """The lecture's does, and 04's training, without our train_model, is not saved after each epoch."""
    monkeypatch.setattr(common, "test_model", lambda model, loader, size: (
        np.zeros(size), np.full((size, 2), np.log(0.5)), np.zeros(size)))
    edits = {", after_epoch=after_epoch": ""}
    line = message(run_here, "04_precompute.py", *options, "--epochs", 1, edits=edits)
    assert "put outputs.exp() in all_proba" in line and (out / "04_unfinished_head.pt").exists()
