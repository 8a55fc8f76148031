"""support/files.py and records.py: files that are complete or not there, and what a result was made from."""
import errno
import hashlib
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import Killed, dsets_of, message, raise_
from torch import nn
from torchvision import transforms

import common
from support.files import load, replace, save
from support.records import differences, make_record


class Payload:
    def __reduce__(self):
        return open, ("mark", "w")  # when it is unpickled, this makes a file in the current folder


@pytest.mark.parametrize("name", ["zipped.pt", "legacy.pt", "x.npy", "x.json"])
def test_a_file_that_runs_code_or_is_not_a_result_is_refused(tmp_path, monkeypatch, name):
    """A file from the internet must never run code when it is loaded."""
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": Payload()}, name, _use_new_zipfile_serialization=name == "zipped.pt")
    if name == "x.npy":
        np.save(name, np.array([Payload()], dtype=object), allow_pickle=True)
    text = message(load, tmp_path / name, "run that")
    assert text.startswith(f"error: {tmp_path / name}: damaged or unsafe (") and text.endswith("): run that")
    assert os.listdir() == [name]


FILES = {"a.npy": np.ones(3), "b.pt": {"x": torch.ones(2)}, "c.txt": "x\n", "m.json": {"x": 1}}


def test_what_is_saved_is_loaded_and_named(tmp_path, capsys):
    """In a folder that need not exist; a student looks for the files."""
    folder = tmp_path / "new" / "folder"
    save(folder, FILES)
    assert sorted(os.listdir(folder)) == sorted(FILES)
    assert capsys.readouterr().out == "\n  ".join(["saved", *(str(folder / name) for name in FILES)]) + "\n"
    assert np.array_equal(load(folder / "a.npy", ""), [1, 1, 1]) and load(folder / "b.pt", "")["x"].tolist() == [1, 1]
    assert (folder / "c.txt").read_text() == "x\n" and load(folder / "m.json", "") == {"x": 1}


def test_a_full_disk_leaves_the_old_files(tmp_path, monkeypatch):
    """And no temporary ones."""
    save(tmp_path, FILES)
    monkeypatch.setattr(os, "fsync", lambda file: raise_(OSError(errno.ENOSPC, "No space left on device")))
    assert message(save, tmp_path, FILES) == (f"error: {tmp_path / 'a.npy'}: cannot be written (No space left on "
                                              "device): free some space, or choose another folder")
    assert sorted(os.listdir(tmp_path)) == sorted(FILES)


def test_the_last_of_several_files_is_removed_first_and_written_last(tmp_path, monkeypatch):
    """If a run is killed or the power fails, no metrics stand beside results that are not theirs."""
    save(tmp_path, FILES)
    events, fsync, rename = [], os.fsync, os.replace

    def noted(source, target):
        if target.name == "m.json":
            raise Killed
        events.append(f"{target.name}, m.json {'exists' if (tmp_path / 'm.json').exists() else 'is gone'}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", lambda file: events.append("fsync") or fsync(file))
    monkeypatch.setattr(os, "replace", noted)
    with pytest.raises(Killed):
        save(tmp_path, FILES)
    assert events == [*["fsync"] * 4, "a.npy, m.json is gone", "b.pt, m.json is gone", "c.txt, m.json is gone"]
    assert sorted(os.listdir(tmp_path)) == ["a.npy", "b.pt", "c.txt"]


def test_saving_quietly_and_without_waiting_for_the_disk(tmp_path, monkeypatch, capsys):
    """For what is saved after every epoch: 200 epochs on the sample take seconds."""
    monkeypatch.setattr(os, "fsync", lambda file: raise_(AssertionError))
    save(tmp_path, FILES, quiet=True, fsync=False)
    assert capsys.readouterr().out == "" and sorted(os.listdir(tmp_path)) == sorted(FILES)


@pytest.mark.parametrize("failures", [0, 6, 7])
def test_a_rename_is_tried_for_three_seconds(tmp_path, monkeypatch, failures):
    """On Windows, a virus scanner has each new file open for a moment."""
    waited, left, rename = [], ["denied"] * failures, os.replace
    monkeypatch.setattr("support.files.time", SimpleNamespace(sleep=waited.append))
    monkeypatch.setattr(os, "replace", lambda a, b: raise_(PermissionError(left.pop())) if left else rename(a, b))
    (tmp_path / "a").touch()
    if failures == 7:
        with pytest.raises(PermissionError):
            replace(tmp_path / "a", tmp_path / "b")
    else:
        replace(tmp_path / "a", tmp_path / "b")
        assert os.listdir(tmp_path) == ["b"]
    assert waited == [0.5] * min(failures, 6)


def test_a_large_array_stays_in_its_file(tmp_path, monkeypatch):
    """2.5 GB of features need not fit in memory. On Windows, a file that is read like this cannot be replaced."""
    path = tmp_path / "a.npy"
    save(tmp_path, {"a.npy": np.ones(3)})
    size_in_64ths = path.stat().st_size / 64
    monkeypatch.setattr("support.files.MIB", size_in_64ths)  # the limit is 64 MiB
    assert not isinstance(load(path, ""), np.memmap)
    monkeypatch.setattr("support.files.MIB", size_in_64ths - 0.01)
    features = load(path, "")
    assert isinstance(features, np.memmap)
    features[0] = 7  # a student's experiment does not change the file
    assert np.load(path).tolist() == [1, 1, 1]


# ---------------------------------------------------------------------------------------------------------- records
def test_a_record_has_the_names_and_sizes_of_the_images(dataset, tmp_path):
    """Images that are copied, or unpacked again, are the same images, on Windows too."""
    before = make_record(dsets_of(dataset))
    assert list(before) == ["training images", "training transform", "validation images", "validation transform"]
    for x, part in [("train", "training"), ("valid", "validation")]:
        files = [(f"{path.parent.name}/{path.name}", path.stat().st_size) for path in sorted(dataset.glob(f"{x}/*/*"))]
        assert before[f"{part} images"] == hashlib.sha256(str(files).encode()).hexdigest()
    assert make_record(dsets_of(dataset.rename(tmp_path / "moved"))) == before


def test_a_record_changes_with_one_image(dataset):
    """An image of the validation set is renamed: the training set is the same."""
    before = make_record(dsets_of(dataset))
    (dataset / "valid" / "dogs" / "dog.1.jpg").rename(dataset / "valid" / "dogs" / "dog.2.jpg")
    assert differences(before, make_record(dsets_of(dataset))) == "different validation images"


@pytest.mark.parametrize("transform", [
    transforms.ToTensor(),
    transforms.Compose([transforms.Resize(256), *common.imagenet_format.transforms]),
    transforms.Compose([*common.imagenet_format.transforms, transforms.Lambda(lambda x: 1.1 * x)])])
def test_a_record_changes_with_the_transform(dataset, transform):
    """Exercise 3. Two Lambdas are printed the same, but compute something else."""
    other = transforms.Compose([*common.imagenet_format.transforms, transforms.Lambda(lambda x: x)])
    before = make_record(dsets_of(dataset, other))
    assert differences(before, make_record(dsets_of(dataset, transform))) == (
        "a different training transform and a different validation transform")
    assert differences(before, make_record(dsets_of(dataset, other))) == ""


def test_a_record_leaves_the_random_numbers_as_they_are(dataset):
    """A random transform is recorded too, and the training is the same with and without a record."""
    random = transforms.Compose([transforms.RandomCrop(224), transforms.ToTensor()])
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    before = make_record(dsets_of(dataset, random))
    assert torch.rand(1) == expected and differences(before, make_record(dsets_of(dataset, random))) == ""


def test_a_record_depends_on_each_frozen_layer(vgg, dataset):
    """Not on the last layer, which is trained, nor on the order of the parameters in memory."""
    dsets, last = dsets_of(dataset), vgg.classifier[6]
    vgg.features.append(nn.BatchNorm2d(512))  # as a student might; it has a number without dimensions
    record = make_record(dsets, vgg, last)
    assert record["precision"] == "float32"
    assert differences(record, make_record(dsets, vgg.to(memory_format=torch.channels_last), last)) == ""
    for name, value in vgg.state_dict().items():
        value += 1
        now = make_record(dsets, vgg, last)
        changed = "" if name.startswith("classifier.6.") else "different frozen layers"
        assert differences(record, now).removeprefix("a different network and ") == changed, name
        record = now


def test_a_record_depends_on_what_the_network_computes(vgg, dataset):
    """An activation has no parameters. The precision is that of the frozen layers."""
    dsets = dsets_of(dataset)
    before = make_record(dsets, vgg, vgg.classifier[6])
    vgg.classifier[4].forward = torch.tanh
    assert differences(before, make_record(dsets, vgg, vgg.classifier[6])) == "a different network"
    common.to_device(vgg, torch.device("cpu"), bf16=True)
    assert make_record(dsets, vgg, vgg.classifier[6])["precision"] == "bfloat16"


def test_averages_of_a_record_may_differ_a_little():
    """Machines round differently: features from Colab's GPU must serve on a laptop."""
    old = {"network": {"printed": "VGG", "outputs": "1.0 -100.0 0"}}

    def changed(printed, outputs):
        return differences(old, {"network": {"printed": printed, "outputs": outputs}})

    assert changed("VGG", "1.2 -100.2 0") == ""  # 0.3% of the largest
    assert changed("VGG", "1.4 -100.0 0") == changed("VGG16", "1.0 -100.0 0") == "a different network"
