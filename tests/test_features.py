"""support/features.py: rows of features in a file, and what survives if a run is stopped or the layers have changed."""
import json
import os

import numpy as np
import pytest
from conftest import Killed, full_disk, json_of, message, posix, raise_

from support.features import FeatureFile

N_ROWS, BATCH = 64, 8  # a multiple of the batch size: a run may be killed when the last row is written
ROWS = np.random.default_rng(0).normal(size=(N_ROWS, 4, 7, 7)).astype(np.float32)
ROW_BYTES, HEADER_BYTES = 4 * 4 * 7 * 7, 128
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
        file.append(rows[i:i + BATCH])
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


def test_the_file_is_the_one_that_numpy_writes(path):
    """A student's own code reads it with np.load."""
    finish(path)
    np.save(path.with_name("plain"), ROWS)
    assert path.read_bytes() == path.with_name("plain.npy").read_bytes()


@pytest.mark.parametrize("n_rows, stop, kept", [
    (N_ROWS, 24, 24), (N_ROWS, N_ROWS, N_ROWS - BATCH), (60, 60, 56), (BATCH, BATCH, 0), (N_ROWS, 0, 0)])
def test_a_run_that_was_killed_is_resumed(path, capsys, n_rows, stop, kept):
    """An hour of work is kept. The last batch is always computed again, as the speed is measured with it."""
    kill(begin(path, ROWS[:n_rows], stop=stop))
    capsys.readouterr()
    assert finish(path, ROWS[:n_rows]) == n_rows - kept
    resuming = f"conv_feat_train.npy: resuming after the first {kept} of {n_rows} images\n"
    assert capsys.readouterr().out.startswith(resuming) == (kept > 0)


def test_half_a_batch_is_computed_again(path):
    """The power failed in the middle of a row."""
    part = kill(begin(path, stop=24))
    with open(part, "ab") as file:
        file.write(bytes(3 * ROW_BYTES + 5))
    assert finish(path) == N_ROWS - 24


def test_a_batch_is_in_the_file_at_once(path):
    """Else a kill would cost the last batches."""
    file = begin(path, stop=40)
    file.append(ROWS[40:41])  # less than what Python keeps in a buffer
    assert file.part.stat().st_size == HEADER_BYTES + 41 * ROW_BYTES
    file.file.close()


def test_a_full_disk_is_one_line_and_the_run_is_resumed(path):
    """The message names the file; the student frees some space."""
    file = begin(path, stop=24)
    with full_disk(HEADER_BYTES + 25 * ROW_BYTES):
        text = message(file.append, ROWS[24:32])
    assert text.startswith(f"error: {file.part}: cannot be written (")
    kill(file)
    assert finish(path) == N_ROWS - 24


def test_features_are_computed_once(path, capsys):
    """The second run begins with the training."""
    assert finish(path) == N_ROWS and finish(path) == 0
    assert capsys.readouterr().out.endswith(
        "conv_feat_train.npy: already computed from the same images, layers, transform and precision\n")


def test_features_without_a_record_are_computed_again(path):
    """They may be anything."""
    np.save(path, ROWS + 3)
    assert finish(path) == N_ROWS


def test_features_of_other_layers_are_computed_again(path, capsys):
    """And the reason is printed."""
    finish(path)
    assert finish(path, ROWS + 1, OTHER) == N_ROWS
    assert "conv_feat_train.npy was computed with different frozen layers: recomputing\n" in capsys.readouterr().out


def test_a_part_file_of_other_layers_is_removed(path, capsys):
    """Rows of two kinds never mix."""
    part = kill(begin(path, stop=24))
    assert finish(path, ROWS + 1, OTHER) == N_ROWS
    assert f"{part.name} removed: it was started with different frozen layers\n" in capsys.readouterr().out


def test_a_part_file_is_removed_when_the_features_are_complete(path, capsys):
    """Two runs at once: one was killed, the other finished."""
    finish(path)
    part = path.with_suffix(".01234567.part")
    part.touch()
    part.with_suffix(".json").write_text(json.dumps(RECORD))
    assert finish(path) == 0
    assert "conv_feat_train.01234567.part removed: not needed now\n" in capsys.readouterr().out


def test_a_part_file_whose_record_is_damaged(path):
    """The advice leads on, and no gigabytes stay; what the student has copied under a name of its own stays."""
    part = kill(begin(path, stop=24))
    copy = path.with_suffix(".copy.json")
    for file in (part.with_suffix(".json"), copy):
        file.write_text("{")
    assert message(begin, path).endswith(": delete it and run this script again")
    part.with_suffix(".json").unlink()
    assert np.array_equal(begin(path).finish(), ROWS) and not part.exists() and copy.exists()


def test_part_files_of_the_other_layer_and_set_stay(path):
    """04 was stopped, and is run with --layer fc7 in between: the convolutional features are resumed afterwards."""
    others = [path.with_name(name) for name in ["conv_feat_valid.npy", "fc7_feat_train.npy"]]
    left = [kill(begin(other, stop=24)) for other in others]
    begin(path).finish()
    assert all(part.exists() for part in left)
    for other in others:
        assert begin(other).resumed_at == 24


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
    if old_features:
        assert np.array_equal(np.load(path), ROWS) and json_of(path.with_suffix(".json"))["frozen layers"] == "f"
    assert finish(path, ROWS + 1, OTHER) == BATCH and finish(path, ROWS + 1, OTHER) == 0


@posix  # Windows lets nobody rename or remove a file that another program has open
@pytest.mark.parametrize("record", [RECORD, OTHER], ids=["the same", "other layers"])
def test_two_runs_at_once(path, record):
    """One of them is told, and the features that are left are whole: nothing is cut off rows that are being written."""
    first = begin(path, stop=40)
    written = HEADER_BYTES + 40 * ROW_BYTES
    begin(path, record=record, stop=0).file.close()
    assert os.fstat(first.file.fileno()).st_size == written
    finish(path, record=record)
    first.append(ROWS[40:])
    with first.file:
        assert message(first.finish) == (
            f"error: {path}: cannot be written (No such file or directory): is another run writing here? Wait for it "
            "to finish, then run this script again")
    assert finish(path, record=record) == 0


@pytest.mark.parametrize("stop", [0, 24, 48])
def test_the_speed_of_a_resumed_run_is_that_of_an_unbroken_one(path, monkeypatch, stop):
    """04 calculates with it when precomputing pays off. The first batch, which starts the workers, does not count."""
    kill(begin(path, stop=stop))
    timed, images_per_second = N_ROWS - stop - BATCH, 4
    clock = iter([100, 100 + timed / images_per_second])  # at the end of the first batch, and of the last one
    monkeypatch.setattr("support.features.time.perf_counter", lambda: next(clock))
    finish(path)
    assert json_of(path.with_suffix(".json"))["images_per_second"] == pytest.approx(images_per_second)


def test_a_single_batch_has_no_speed(path):
    """It includes the start of the workers, and would mislead."""
    finish(path, ROWS[:BATCH])
    assert json_of(path.with_suffix(".json")) == {**RECORD, "images_per_second": None}


def test_a_part_file_of_an_edit_that_was_undone_is_removed(path):
    """Up to 2.3 GB would stay for ever."""
    finish(path)
    kill(begin(path, record=OTHER, stop=BATCH))
    finish(path)
    assert sorted(os.listdir(path.parent)) == ["conv_feat_train.json", "conv_feat_train.npy"]
