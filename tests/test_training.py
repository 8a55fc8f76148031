"""common.py: train_model, test_model and save_results, each compared with plain torch and numpy."""
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import json_of, message, raise_, run_here
from torch import nn

import common


def on_gpu(tensor):
    """A tensor that must be copied to the CPU before anything else is done with it."""
    return SimpleNamespace(cpu=lambda: tensor, dtype=tensor.dtype)


INPUTS = torch.randn(37, 8, generator=torch.Generator().manual_seed(1))
LABELS = (INPUTS[:, 0] > 0).long()
BATCHES = list(zip(INPUTS.split(10), LABELS.split(10), strict=True))  # the last one has 7 images


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 2), nn.LogSoftmax(dim=1))


def sgd(model, lr=0.0):
    return torch.optim.SGD(model.parameters(), lr=lr)


def test_each_epoch_has_its_own_loss_accuracy_and_time(monkeypatch, capsys, watched):
    """The mean over images, not over batches; a clock shows 0 and 2 s for the first epoch, 10 and 15 s for the next."""
    model, clock, calls = small_model(), iter([0, 2, 10, 15]), watched("common")
    criterion = nn.CrossEntropyLoss(label_smoothing=0.5)
    monkeypatch.setattr(common, "time", SimpleNamespace(perf_counter=clock.__next__))
    history = common.train_model(model, BATCHES, 37, epochs=2, optimizer=sgd(model), criterion=criterion)
    loss = criterion(model(INPUTS), LABELS).item()
    accuracy = np.mean((model(INPUTS).argmax(dim=1) == LABELS).numpy())
    assert history == [{"loss": pytest.approx(loss), "accuracy": accuracy, "seconds": t} for t in (2, 5)]
    assert capsys.readouterr().out.splitlines() == [
        f"epoch  {i}/2  loss {loss:.4f}  accuracy {accuracy:.4f}  {t} s" for i, t in [(1, "2.00"), (2, "5.00")]]
    assert calls == [(4, 37, "images")] * 2


def test_every_epoch_trains_with_dropout_although_a_test_is_between(capsys):
    """after_epoch gets the history so far; a test in it switches dropout off."""
    seen, model = [], small_model()
    model.register_forward_pre_hook(lambda model, inputs: seen.append(model.training))

    def after_epoch(history):
        seen.append(len(history))
        model.eval()

    common.train_model(model, BATCHES[:1], 10, 2, sgd(model), after_epoch=after_epoch)
    assert seen == [True, 1, True, 2]


def test_a_loss_that_is_no_number_ends_the_training():
    """Too large a learning rate: the remaining hours would be lost."""
    model = small_model()
    assert message(common.train_model, model, BATCHES, 37, 9, sgd(model, lr=1e38)) == (
        "error: the training loss is inf: use a smaller --lr, or LogSoftmax if it is negative")


@pytest.mark.parametrize("kind", ["cpu", "cuda", "mps"])
def test_batches_are_copied_in_the_background_to_cuda_alone(kind):
    """On MPS, the network could see a different batch."""
    copies, model = [], small_model()

    class Batch(torch.Tensor):
        def to(self, device, non_blocking=False):
            copies.append((device.type, non_blocking))
            return self.as_subclass(torch.Tensor)

    batch = [tensor.as_subclass(Batch) for tensor in BATCHES[0]]
    optimizer = sgd(model)
    model.parameters = lambda: iter([SimpleNamespace(device=torch.device(kind))])
    common.train_model(model, [batch], 10, 1, optimizer)
    assert copies == [(kind, kind == "cuda")] * 2  # images and classes
    common.test_model(model, [batch], 10)
    assert copies[2:] == [(kind, False)]  # the images


def test_results_of_the_test_are_in_order_and_its_loss_is_finite(capsys, watched):
    """A large learning rate can make a probability 0: what is printed and what 05 computes must agree."""
    model, tiny, calls = small_model().append(nn.Identity()), np.finfo(np.float64).tiny, watched("common")
    model[0].weight.data *= 1000
    proba = torch.cat([model(inputs) for inputs, _ in BATCHES]).detach().double().exp().numpy()
    true = proba[range(37), LABELS]  # probabilities of the true classes
    model[2].forward = on_gpu
    preds, all_proba, all_classes = common.test_model(model, BATCHES, size=37)
    assert not model.training and calls == [(4, 37, "images")]
    assert true.min() == 0 and np.allclose(all_proba, proba.clip(tiny), 1e-9, 0)
    assert np.array_equal(preds, proba.argmax(axis=1)) and np.array_equal(all_classes, LABELS)
    assert [preds.dtype, all_proba.dtype, all_classes.dtype] == ["int64", "float64", "int64"]
    loss = -np.log(true.clip(tiny)).mean()
    assert capsys.readouterr().out == f"test on 37 images  loss {loss:.4f}  accuracy {(true > 0.5).mean():.4f}\n"
    assert common.log_loss(all_proba, all_classes) == common.log_loss(proba, all_classes) == pytest.approx(loss)


def test_outputs_without_a_softmax_are_understood():
    """A student replaces LogSoftmax and NLLLoss by CrossEntropyLoss: "probabilities" of 7 would be nonsense."""
    outputs = torch.tensor([[2.0, 1.0, -3.0], [0.0, 0.5, 0.1]])
    expected = outputs.double().log_softmax(dim=1)
    assert torch.allclose(common.to_log_proba(outputs), expected)
    assert torch.allclose(common.to_log_proba(expected.float()), expected, atol=1e-6)


def test_outputs_that_are_no_numbers_end_the_run():
    """Instead of an accuracy of 50%."""
    assert message(common.to_log_proba, torch.tensor([[torch.nan, 0.0]])) == (
        "error: the network's outputs are NaN (not a number): use a smaller --lr, or different weights")


# --------------------------------------------------------------------------------------------------------- results
HISTORY = [{"loss": 0.7, "accuracy": 0.5, "seconds": 2.0}, {"loss": 0.6, "accuracy": 0.75, "seconds": 6.0}]
OF_HISTORY = {"seconds_per_epoch": 4.0, "train_loss": [0.7, 0.6], "train_accuracy": [0.5, 0.75]}
RESULTS = np.array([0, 0, 1]), np.array([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6]]), np.array([0, 1, 1])
WEIGHT = torch.rand(2, 4096)


def save_results(folder, name, history, *results):
    """The metrics, after save_results with a last layer that is on a GPU."""
    layer = SimpleNamespace(state_dict=lambda: {"weight": on_gpu(WEIGHT)})
    args = Namespace(output_dir=folder, data_dir=folder / "data", weights="imagenet")
    metrics = common.save_results(args, "04", Namespace(classifier=[*"012345", layer]), {"x": "y"}, history, *results)
    assert torch.equal(torch.load(folder / f"{name}_head.pt", weights_only=True)["weight"], WEIGHT)
    read = json_of(folder / f"{name}_metrics.json")
    assert read == {**metrics, "options": {name: str(value) for name, value in vars(args).items()},
                    "dataset": str(folder / "data")}
    return {name: value for name, value in read.items() if name not in ("options", "dataset")}


SAME = {"weights": "imagenet", "pretrained": True, "made_from": {"x": "y"}}


def test_metrics_and_predictions_are_saved_after_the_test(tmp_path, capsys):
    """The files from which 05 and a student's own code start."""
    loss = -np.log([0.9, 0.2, 0.6]).mean()
    assert save_results(tmp_path, "04", HISTORY, RESULTS) == {
        **SAME, **OF_HISTORY, "valid_loss": pytest.approx(loss), "valid_accuracy": 2 / 3}
    for name, array in zip(["predictions", "all_proba", "all_classes"], RESULTS, strict=True):
        assert np.array_equal(np.load(tmp_path / f"04_{name}.npy"), array)
    assert capsys.readouterr().out.count("saved") == 1


def test_metrics_during_the_training_are_marked_as_unfinished(tmp_path, capsys, monkeypatch):
    """A run is stopped after two epochs: the head is there. Saving takes no time and no line."""
    monkeypatch.setattr("os.fsync", lambda file: raise_(AssertionError))
    history = [{**epoch, "valid_loss": 0.5, "valid_accuracy": 0.8} for epoch in HISTORY]
    assert save_results(tmp_path, "04_unfinished", history) == {
        **SAME, **OF_HISTORY, "valid_loss_per_epoch": [0.5, 0.5], "valid_accuracy_per_epoch": [0.8, 0.8]}
    assert capsys.readouterr().out == ""
    monkeypatch.undo()
    save_results(tmp_path, "04", history, RESULTS)
    assert not list(tmp_path.glob("*unfinished*"))


def test_the_lectures_own_train_model_may_return_nothing(tmp_path):
    """A student pastes it from the notebook."""
    assert save_results(tmp_path, "04_unfinished", None) == SAME


def test_a_test_model_that_returns_logarithms_loses_no_training(options, out, figures, monkeypatch):
    """The lecture's does, and 04's training, without our train_model, is not saved after each epoch."""
    monkeypatch.setattr(common, "test_model", lambda model, loader, size: (
        np.zeros(size), np.full((size, 2), np.log(0.5)), np.zeros(size)))
    edits = {", after_epoch=after_epoch": ""}
    line = message(lambda: run_here("04_precompute.py", *options, "--epochs", 1, edits=edits))
    assert "put outputs.exp() in all_proba" in line and (out / "04_unfinished_head.pt").exists()
