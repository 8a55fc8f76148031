"""support/features.py: rows of features in a file, and what survives if a run is stopped or the layers have changed."""
import itertools
import json
import os

import numpy as np
import pytest
from conftest import Killed, full_disk, json_of, message, posix, raise_

from support.features import FeatureFile

N_ROWS, BATCH = 64, 8  # a multiple of the batch size: a run may be killed when the last row is written
ROWS = np.random.default_rng(0).normal(size=(N_ROWS, 4, 4, 4)).astype(np.float32)
ROW_BYTES, HEADER_BYTES = 4 * 4 * 4 * 4, 128  # a batch is less than what Python keeps in a buffer
RECORD = {"training images": "i", "frozen layers": "f"}
OTHER = {**RECORD, "frozen layers": "others"}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "conv_feat_train.npy"


def begin(path, rows=ROWS, record=RECORD, stop=N_ROWS):
    """A FeatureFile to which rows were added as 04_precompute.py does it, up to row `stop`."""
    file = FeatureFile(path, rows.shape, record, BATCH)
    file.resumed_at = file.done
    for i in range(file.done, min(stop, len(rows)), BATCH):
        file.append(rows[i:min(i + BATCH, stop)])
    return file


def kill(file):
    """The process ends: what is still in its buffer is lost. Return the name of the part file."""
    os.close(file.file.fileno())
    with pytest.raises(OSError):
        file.file.close()
    return file.part


def finish(path, rows=ROWS, record=RECORD):
    """Add the rows that are missing. Nothing but all rows is left. Return how many were computed."""
    file = begin(path, rows, record)
    assert np.array_equal(file.finish(), rows) and np.array_equal(np.load(path), rows)
    assert sorted(os.listdir(path.parent)) == ["conv_feat_train.json", "conv_feat_train.npy"]
    return len(rows) - file.resumed_at


@pytest.mark.parametrize("n_rows, stop, kept", [
    (64, 24, 24), (64, 27, 24), (64, 64, 56), (60, 60, 56), (8, 8, 0), (64, 0, 0)])
def test_a_run_that_was_killed_is_resumed(path, capsys, n_rows, stop, kept):
    """An hour of work is kept. What is left of a batch is computed again, and always the last one: it is timed."""
    kill(begin(path, ROWS[:n_rows], stop=stop))
    capsys.readouterr()
    assert finish(path, ROWS[:n_rows]) == n_rows - kept
    resuming = [f"conv_feat_train.npy: resuming after the first {kept} of {n_rows} images"] if kept else []
    assert [line for line in capsys.readouterr().out.splitlines() if "resuming" in line] == resuming


def test_a_full_disk_is_one_line_and_the_run_is_resumed(path):
    """The message names the file; the student frees some space."""
    file = begin(path, stop=24)
    with full_disk(HEADER_BYTES + 25 * ROW_BYTES):
        assert message(file.append, ROWS[24:32]).startswith(f"error: {file.part}: cannot be written (")
    kill(file)
    assert finish(path) == N_ROWS - 24


@pytest.mark.parametrize("record, computed, printed", [
    (RECORD, 0, "conv_feat_train.npy: already computed from the same images, layers, transform and precision\n"),
    (OTHER, N_ROWS, "conv_feat_train.npy was computed with different frozen layers: recomputing\n")])
def test_features_are_computed_once_for_the_same_layers(path, capsys, record, computed, printed):
    """The second run begins with the training."""
    np.save(path, ROWS + 3)  # without a record, they may be anything
    assert finish(path) == N_ROWS
    assert finish(path, record=record) == computed and printed in capsys.readouterr().out


@pytest.mark.parametrize("complete, record, reason", [
    (True, RECORD, "not needed now"),
    (True, OTHER, "it was started with different frozen layers"),
    (False, OTHER, "it was started with different frozen layers")])
def test_a_part_file_that_is_of_no_use_is_removed(path, capsys, complete, record, reason):
    """Rows of two kinds never mix, and no gigabytes stay. One of two runs may have been killed, or an edit undone."""
    if complete:
        finish(path)
    part = path.with_suffix(".01234567.part")
    part.write_bytes(bytes(HEADER_BYTES + 24 * ROW_BYTES))
    part.with_suffix(".json").write_text(json.dumps(record))
    assert finish(path) == (0 if complete else N_ROWS)
    assert f"conv_feat_train.01234567.part removed: {reason}\n" in capsys.readouterr().out


def test_a_part_file_whose_record_is_damaged(path):
    """The advice leads on, and no gigabytes stay."""
    record = kill(begin(path, stop=24)).with_suffix(".json")
    record.write_text("{")
    text = message(begin, path)
    assert text.startswith(f"error: {record}: ") and text.endswith(": delete it and run this script again")
    record.unlink()
    assert finish(path) == N_ROWS


def test_other_files_stay(path):
    """04 was stopped, and is run with --layer fc7 in between; or a student has copied a file."""
    others = [path.with_name(name) for name in ["conv_feat_valid.npy", "fc7_feat_train.npy"]]
    for other in others:
        kill(begin(other, stop=24))
    copy = path.with_suffix(".copy.json")
    copy.touch()
    begin(path).finish()
    assert [begin(other).resumed_at for other in others] == [24, 24] and copy.exists()


@pytest.mark.parametrize("place, old_features", [
    ("os.fsync", True), ("pathlib.Path.unlink", True), ("support.features.save", False),
    ("support.features.replace", False)])
def test_features_never_stand_beside_a_record_that_is_not_theirs(path, monkeypatch, place, old_features):
    """Wherever the end of a run is broken off: the old features are there with their record, or none are."""
    finish(path)
    file = begin(path, ROWS + 1, OTHER)
    with monkeypatch.context() as patch, pytest.raises(Killed), file.file:
        patch.setattr(place, lambda *args, **options: raise_(Killed))
        file.finish()
    assert path.exists() == old_features
    assert finish(path, ROWS + 1, OTHER) == BATCH  # it would be 0 if the old features had the new record


@posix  # Windows lets nobody rename or remove a file that another program has open
def test_the_slower_of_two_runs_is_told(path):
    """One of them is told, and the features that are left are whole."""
    first = begin(path, stop=40)
    finish(path)
    first.append(ROWS[40:])
    with first.file:
        assert message(first.finish) == (
            f"error: {path}: cannot be written (No such file or directory): is another run writing here? Wait for it, "
            "then run this script again")
    assert finish(path) == 0


@pytest.mark.parametrize("n_rows, stop, images_per_second", [(64, 0, 4), (64, 24, 4), (8, 0, None)])
def test_the_speed_is_that_of_all_batches_but_the_first(path, monkeypatch, n_rows, stop, images_per_second):
    """04 uses it to calculate when precomputing pays off. The first batch includes the start of the workers."""
    kill(begin(path, ROWS[:n_rows], stop=stop))
    clock = itertools.count(100, BATCH / 4)  # seconds, at the end of each batch
    monkeypatch.setattr("support.features.time.perf_counter", lambda: next(clock))
    finish(path, ROWS[:n_rows])
    assert json_of(path.with_suffix(".json")) == {**RECORD, "images_per_second": images_per_second}
