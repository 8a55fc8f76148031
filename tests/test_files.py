"""support/files.py and records.py: files that are complete or not there, and what a result was made from."""
import contextlib
import errno
import hashlib
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, Killed, dsets_of, message, posix, raise_
from PIL import Image
from torch import nn

from support.files import absolute_path, load, replace, save
from support.records import differences, make_record

FILES = {"a.npy": np.ones(3), "b.pt": {"x": torch.ones(2)}, "c.txt": "x\n", "m.json": {"x": 1}}


@posix
@pytest.mark.parametrize("link", ["data", "data/dogscats"])
def test_a_link_that_leads_nowhere_is_named(tmp_path, link):
    """A student's data is on another disk; if that is not connected, nothing may be downloaded to this one."""
    (tmp_path / link).parent.mkdir(exist_ok=True)
    (tmp_path / link).symlink_to(tmp_path / "disk")
    line = message(absolute_path, tmp_path / "data" / "dogscats")
    assert line == (
        f"error: {tmp_path / link}: a broken link to {tmp_path / 'disk'}: connect that disk, or create that folder")
    (tmp_path / "disk").mkdir()
    assert absolute_path(tmp_path / link) == tmp_path / "disk"


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


def test_what_is_saved_is_loaded_and_named(tmp_path, capsys):
    """In a folder that need not exist; a student looks for the files."""
    folder = tmp_path / "new" / "folder"
    save(folder, FILES)
    assert sorted(os.listdir(folder)) == sorted(FILES)
    assert capsys.readouterr().out == "\n  ".join(["saved", *(str(folder / name) for name in FILES)]) + "\n"
    assert np.array_equal(load(folder / "a.npy", ""), [1, 1, 1]) and load(folder / "b.pt", "")["x"].tolist() == [1, 1]
    assert (folder / "c.txt").read_text() == "x\n" and load(folder / "m.json", "") == {"x": 1}


@pytest.mark.parametrize("call, left", [
    ("fsync", ["a.npy", "b.pt", "c.txt", "m.json"]), ("replace", ["a.npy", "b.pt", "c.txt"])])
def test_if_a_file_cannot_be_written_the_others_stay(tmp_path, monkeypatch, call, left):
    """No temporary file is left. Once the first may be replaced, the last, which marks the set as complete, is gone."""
    save(tmp_path, FILES)
    monkeypatch.setattr(os, call, lambda *args: raise_(OSError(errno.ENOSPC, "No space left on device")))
    line = message(save, tmp_path, FILES)
    assert f"{tmp_path / 'a.npy'}: cannot be written (No space left on device): free some space" in line
    assert sorted(os.listdir(tmp_path)) == left


def test_the_last_of_several_files_is_written_last(tmp_path, monkeypatch):
    """If a run is killed or the power fails, no metrics stand beside results that are not theirs."""
    rename = os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: raise_(Killed) if new.name == "m.json" else rename(old, new))
    with pytest.raises(Killed):
        save(tmp_path, FILES)
    assert sorted(os.listdir(tmp_path)) == ["a.npy", "b.pt", "c.txt"]


@pytest.mark.parametrize("failures, waits, left, outcome", [
    (0, 0, "b", contextlib.nullcontext()), (6, 6, "b", contextlib.nullcontext()),
    (7, 6, "a", pytest.raises(PermissionError))], ids=["at once", "after 3 s", "too late"])
def test_a_rename_is_tried_for_three_seconds(tmp_path, monkeypatch, failures, waits, left, outcome):
    """On Windows, a virus scanner has each new file open for a moment."""
    waited, errors, rename = [], [PermissionError()] * failures, os.replace
    monkeypatch.setattr("support.files.time", SimpleNamespace(sleep=waited.append))
    monkeypatch.setattr(os, "replace", lambda a, b: raise_(errors.pop()) if errors else rename(a, b))
    (tmp_path / "a").touch()
    with outcome:
        replace(tmp_path / "a", tmp_path / "b")
    assert waited == [0.5] * waits and os.listdir(tmp_path) == [left]


def test_a_large_array_stays_in_its_file(tmp_path, monkeypatch):
    """2.5 GB of features need not fit in memory. On Windows, a file that is read like this cannot be replaced."""
    save(tmp_path, FILES)
    assert not isinstance(load(tmp_path / "a.npy", ""), np.memmap)
    monkeypatch.setattr("support.files.MIB", 0)  # the limit is 64 MiB
    features = load(tmp_path / "a.npy", "")
    features[0] = 7  # a student's experiment does not change the file
    assert isinstance(features, np.memmap) and load(tmp_path / "a.npy", "").tolist() == [1, 1, 1]


def test_an_array_is_read_whole_if_it_cannot_be_mapped(tmp_path, monkeypatch):
    """Features on such a disk would be "damaged" after each run."""
    save(tmp_path, FILES)
    numpy_load = np.load
    monkeypatch.setattr("support.files.MIB", 0)  # every array counts as large
    monkeypatch.setattr(np, "load", lambda path, mmap_mode=None, **options: (
        raise_(OSError(errno.ENODEV, "no such device")) if mmap_mode else numpy_load(path, **options)))
    assert load(tmp_path / "a.npy", "").tolist() == [1, 1, 1]


def test_the_fixed_image_of_a_record_has_sharp_edges():
    """In a smooth image, a slight blur or rotation changes too little to be noticed. Other pixels: other records."""
    blocks = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    with Image.open(ROOT / "support" / "fixed_image.png") as image:
        assert np.array_equal(image, blocks.repeat(40, axis=0).repeat(40, axis=1))


def test_a_record_has_the_names_and_sizes_of_the_images(dataset, tmp_path):
    """Images that are copied, or unpacked again, are the same images, on Windows too."""
    files = [(f"{path.parent.name}/{path.name}", path.stat().st_size) for path in sorted(dataset.glob("valid/*/*"))]
    before = make_record(dsets_of(dataset))
    assert before["validation images"] == hashlib.sha256(str(files).encode()).hexdigest()
    moved = dataset.rename(tmp_path / "moved")
    assert make_record(dsets_of(moved)) == before
    (moved / "valid" / "dogs" / "dog.1.jpg").rename(moved / "valid" / "dogs" / "dog.2.jpg")
    assert differences(before, make_record(dsets_of(moved))) == "different validation images"


def test_a_record_depends_on_each_frozen_layer(vgg):
    """Not on the last layer, which is trained, nor on the order of the parameters in memory. An activation has none."""
    last = vgg.classifier[6]
    vgg.features.append(nn.BatchNorm2d(512))  # as a student might; it has a number without dimensions
    record = make_record({}, vgg, last)
    assert differences(record, make_record({}, vgg.to(memory_format=torch.channels_last), last)) == ""
    for name, value in vgg.state_dict().items():
        value += 1
        before, record = record, make_record({}, vgg, last)
        is_frozen = not name.startswith("classifier.6.")
        assert (record["frozen layers"] != before["frozen layers"]) == is_frozen, name
    vgg.classifier[4].forward = torch.tanh  # instead of ReLU
    assert differences(record, make_record({}, vgg, last)) == "a different network"


@pytest.mark.parametrize("printed, outputs, difference", [
    ("VGG", "1.2 -100.2 0", ""), ("VGG", "1.4 -100.0 0", "a different network"),
    ("VGG16", "1.0 -100.0 0", "a different network")])
def test_averages_of_a_record_may_differ_a_little(printed, outputs, difference):
    """Machines round differently: features from Colab's GPU must serve on a laptop. Up to 0.3% of the largest."""
    old = {"network": {"printed": "VGG", "outputs": "1.0 -100.0 0"}}
    assert differences(old, {"network": {"printed": printed, "outputs": outputs}}) == difference
