"""Getting the dataset: from the archive, or from the files of Kaggle and Microsoft. The archive is a small one; its
size and hash replace those of the real one."""
import errno
import gzip
import hashlib
import io
import os
import re
import shutil
import tarfile
import tempfile
import time
from types import SimpleNamespace
from unittest import mock

import pytest
from conftest import PHOTO, SAMPLE, TRAIN, VALID, message, posix, raise_, run_here

from support import dataset as data
from support.images import check_folders
from support.progress import progress

COUNTS = {"train/cats": 3, "train/dogs": 3, "valid/cats": 2, "valid/dogs": 2, "test1": 2}
UNPACKED = 4_000_000


def make_archive(name="dogscats", kind=tarfile.DIRTYPE):
    """A dogscats.tgz with COUNTS images and a last member. It is not compressed: all such files have the same size."""
    buffer, last = io.BytesIO(), tarfile.TarInfo(name)
    last.type, last.linkname, last.mode = kind, "../outside", 0o755
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for path in [f"dogscats/{folder}/{i}.jpg" for folder, count in COUNTS.items() for i in range(count)]:
            tar.add(PHOTO, path)
        tar.addfile(last)
    return gzip.compress(buffer.getvalue(), compresslevel=0, mtime=0)


ARCHIVE = make_archive()
SIZE = len(ARCHIVE)


@pytest.fixture(autouse=True)
def small_archive(server, monkeypatch):
    """The lecture's first link does not work, and the second leads to the small archive."""
    server.content = ARCHIVE
    monkeypatch.delenv("DOGSCATS_URL", raising=False)
    urls, hashed = ["http://127.0.0.1:9/", server.url], ["md5", hashlib.md5(ARCHIVE[:1000]).hexdigest(), 1000]
    small = {"URLS": urls, "SIZE": SIZE, "HASH": hashed, "N_FILES": 12, "UNPACKED": UNPACKED}
    for name, value in small.items():
        monkeypatch.setattr(data, name, value)


@pytest.fixture
def archive(tmp_path):
    """An archive that was saved with a browser."""
    path = tmp_path / "dogscats.tgz"
    path.write_bytes(ARCHIVE)
    return path


def files(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def fails(folder, kaggle=None):
    """Getting the dataset ends in one line, and changes no file, be it damaged or precious. Return the line."""
    def as_in_01():
        data.get_dataset(folder / "dogscats", kaggle)
        check_folders(folder / "dogscats", ["cats", "dogs"])

    before = files(folder)
    line = message(as_in_01)
    assert files(folder) == before
    return line


def assert_works(folder, *left):
    """Getting the dataset ends with the whole dataset, the archive, and what else was `left` there before."""
    data.get_dataset(folder / "dogscats", None)
    assert {name: len(os.listdir(folder / "dogscats" / name)) for name in COUNTS} == COUNTS
    assert {*os.listdir(folder)} == {"dogscats", "dogscats.tgz", *left}


def test_the_script_downloads_unpacks_and_checks_the_dataset_only_once(server, tmp_path, figures, capsys):
    """A student runs 01 again and again: the network, and the check of all images, are needed the first time alone."""
    folder, archive = tmp_path / "my" / "data" / "dogscats", tmp_path / "my" / "data" / "dogscats.tgz"
    options = ["--data-dir", folder, "--output-dir", tmp_path]
    assert run_here("01_data.py", *options)["dset_sizes"] == {"train": 6, "valid": 4}
    printed = capsys.readouterr().out
    for line in [f"downloading {SIZE:,} bytes to {archive}\n",
                 f"created {folder}; {archive} is no longer needed and can be deleted\n",
                 "checking that all 12 images can be read (only the first time)\n"]:
        assert line in printed
    assert re.findall(r"^  (\S+) +(\d+) images$", printed, re.M) == [
        (os.path.normpath(name), str(count)) for name, count in sorted(COUNTS.items())]
    archive.unlink()
    run_here("01_data.py", *options)
    assert not re.search("downloading|checking", capsys.readouterr().out) and server.ranges == [None]


def test_an_address_of_ones_own_replaces_the_links(server, tmp_path, monkeypatch):
    """A school has a copy on its server."""
    monkeypatch.setattr(data, "URLS", [])
    monkeypatch.setenv("DOGSCATS_URL", server.url)
    assert_works(tmp_path)


def test_an_archive_saved_with_a_browser_is_used(server, tmp_path, archive, watched):
    """The advice for a network in which Python cannot download. A student decides by the progress whether to wait."""
    calls = watched("support.dataset")
    assert_works(tmp_path)
    assert server.ranges == [] and archive.read_bytes() == ARCHIVE
    assert calls == [(12, 12, "files")]


@pytest.mark.parametrize("done", [0, 1000])
def test_too_little_space_is_noticed_before_the_download(tmp_path, monkeypatch, done):
    """After 839 MB, it is too late. What counts is the disk of the folder, and what is already on it."""
    needed = SIZE - done + UNPACKED
    free = {tmp_path: needed - 1}
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=free[folder]))
    (tmp_path / "dogscats.tgz.part").write_bytes(ARCHIVE[:done])
    assert fails(tmp_path) == (f"error: {tmp_path}: needs about {needed:,} bytes, but only {needed - 1:,} are free: "
                               "free some space, or choose another folder")


@posix
def test_two_runs_at_once_end_with_a_whole_dataset(server, tmp_path, monkeypatch):
    """Two prompts, or a notebook and a prompt: neither run harms the other."""
    def another_run_in_the_middle(pieces, *args):
        monkeypatch.setattr("support.download.progress", progress)
        yield next(pieces)
        data.get_dataset(tmp_path / "dogscats", None)
        yield from pieces

    monkeypatch.setattr("support.download.MIB", 1000)
    monkeypatch.setattr("support.download.progress", another_run_in_the_middle)
    assert_works(tmp_path)
    assert len(server.ranges) == 2


@pytest.mark.parametrize("name, hours, hours_inside, left", [
    (".part-x", 2, 2, []), (".part-x", 0.9, 2, [".part-x"]), (".part-x", 2, 0.9, [".part-x"]),
    ("x.part", 9, 9, ["x.part"])])
def test_what_killed_runs_unpacked_is_removed_after_an_hour(tmp_path, archive, name, hours, hours_inside, left):
    """Half a dataset does not stay; the files of a run that is still unpacking, and the student's own, do."""
    (tmp_path / name / "train").mkdir(parents=True)
    now = time.time()
    for place, age in [(tmp_path / name, hours), (tmp_path / name / "train", hours_inside)]:
        os.utime(place, (now - 3600 * age, now - 3600 * age))
    assert_works(tmp_path, *left)


def test_the_clock_that_counts_is_the_disks(tmp_path, archive, monkeypatch):
    """A file server's clock is two hours behind: another run's folder, in use, would look old."""
    two_hours_ago, others, ours = time.time() - 7200, tmp_path / ".part-another_run", tmp_path / ".part-this_run"
    for folder in [others, ours]:
        folder.mkdir()
        os.utime(folder, (two_hours_ago, two_hours_ago))
    monkeypatch.setattr(tempfile, "mkdtemp", lambda **options: ours)
    assert_works(tmp_path, others.name)


@pytest.mark.parametrize("content, reason", [
    (b"my thesis" + ARCHIVE[9:], "Not a gzipped file (b'my')"),
    (ARCHIVE + b"?", f"{SIZE + 1:,} bytes instead of {SIZE:,}"),
    (ARCHIVE[:50_000] + bytes(SIZE - 50_000), "Error -3 while decompressing"),
    (ARCHIVE[:-8] + bytes(4) + ARCHIVE[-4:], "CRC check failed")],
    ids=["a different file", "a byte more", "half of it is empty", "gzip's checksum is wrong"])
def test_a_damaged_archive_leaves_no_half_dataset(tmp_path, archive, content, reason):
    """Half a dataset would train without an error."""
    archive.write_bytes(content)
    line = fails(tmp_path)
    assert line.startswith(f"error: {archive}: incomplete or damaged ({reason}")
    assert line.endswith("): move it away and run this again")


def test_a_disk_that_is_full_while_unpacking_leaves_no_half_dataset(tmp_path, archive, monkeypatch):
    """The message says how much space is needed."""
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr("tarfile.copyfileobj", lambda *args: raise_(full))  # the folders are already there
    assert fails(tmp_path) == (
        f"error: {tmp_path / 'dogscats'}: the disk is full: free about 4,000,000 bytes, or use a different --data-dir")


@pytest.mark.parametrize("name, kind", [
    ("dogscats/../../x", tarfile.REGTYPE), ("/x", tarfile.REGTYPE), ("dogscats/C:x", tarfile.REGTYPE),
    ("dogscats\\..\\..\\x", tarfile.REGTYPE), ("dogscats/a", tarfile.SYMTYPE), ("dogscats/b", tarfile.LNKTYPE),
    ("dogscats/c", tarfile.FIFOTYPE)])
def test_an_archive_cannot_write_outside_its_folder(tmp_path, archive, name, kind):
    """An archive from an unknown mirror could otherwise replace any file of the student."""
    archive.write_bytes(make_archive(name, kind))
    assert fails(tmp_path).endswith(f"dogscats.tgz: {name!r} is not a file of the dataset: move the archive away")


def test_a_dataset_that_cannot_be_moved_is_kept(tmp_path, archive, monkeypatch):
    """Windows moves no folder in which one of 37,500 files is open."""
    monkeypatch.setattr(data, "replace", lambda *paths: raise_(PermissionError(13, "Access is denied")))
    text = message(data.get_dataset, tmp_path / "dogscats", None)
    folder = next(tmp_path.glob(".part-*")) / "dogscats"
    assert text == (f"error: {folder} contains the complete dataset, but cannot be moved to {tmp_path / 'dogscats'} "
                    "(Access is denied): close the programs that use it, and move it yourself")
    assert len(list(folder.rglob("*.jpg"))) == sum(COUNTS.values())


def test_the_slower_of_two_runs_ends_as_usual(tmp_path, archive, monkeypatch, capsys):
    """The other has just moved the dataset to its place."""
    def as_after_the_other_run(source, target):
        (target / "valid").mkdir(parents=True)
        raise OSError(errno.ENOTEMPTY, "Directory not empty", source, None, target)

    monkeypatch.setattr(data, "replace", as_after_the_other_run)
    data.get_dataset(tmp_path / "dogscats", None)
    assert capsys.readouterr().out.startswith(f"created {tmp_path / 'dogscats'}; ")
    assert {*os.listdir(tmp_path)} == {"dogscats", "dogscats.tgz"}


@pytest.mark.parametrize("inside, kaggle, mounted, says", [
    (["thesis"], None, False, "is not empty or cannot be replaced: use a new folder, such as --data-dir "),
    ([], None, True, "is not empty or cannot be replaced: use a new folder, such as --data-dir "),
    (["train", "valid"], SAMPLE, False, "contains a dataset: omit --from-kaggle and use --data-dir "),
    (["x", "x/train", "x/valid"], None, False, "does not contain train and valid: use --data-dir ")])
def test_what_cannot_work_is_refused_before_the_download(tmp_path, inside, kaggle, mounted, says):
    """After 839 MB, it is too late. A wrong --data-dir must not cost a student any file."""
    for name in [".", *inside]:
        (tmp_path / "dogscats" / name).mkdir()
    with mock.patch("os.path.ismount", return_value=mounted):
        assert says in fails(tmp_path, kaggle)


@pytest.mark.parametrize("cat, dog, test", [
    ("train/cat.", "train/dog.", "test1/"),
    ("train/cat.", "train/dog.", "test1/test1/"),
    ("train/cat.", "train/dog.", "test/"),
    ("PetImages/Cat/", "PetImages/Dog/", "test/"),
    ("Cat/", "Dog/", "test/")])
def test_kaggles_and_microsofts_files_are_sorted_by_their_numbers(tmp_path, watched, cat, dog, test):
    """The last 8% of each class are for validation, 9 before 10. Other files are left out."""
    folder, calls = tmp_path / "dogscats", watched("support.dataset")
    for start, numbers in [(cat, [*range(125), "4 (1)"]), (dog, [3, 9, 10]), (test, [7, "x", 70])]:
        for number in numbers:
            path = tmp_path / "source" / f"{start}{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(str(number))
    data.get_dataset(folder, tmp_path / "source")
    shutil.rmtree(tmp_path / "source")  # the dataset has copies
    expected = {"train/cats": [*range(115)], "valid/cats": [*range(115, 125)], "valid/dogs": [10], "test1": [7, 70],
                "sample/train/cats": [*range(8)], "sample/valid/cats": [*range(115, 119)]}
    assert {name: sorted(int(path.read_text()) for path in (folder / name).iterdir()) for name in expected} == expected
    assert calls[:3] == [(2, 2, "images"), (115, 115, "images"), (10, 10, "images")]  # test1, train/cats, valid/cats


def test_the_script_builds_the_dataset_in_the_current_folder(tmp_path, monkeypatch, figures, capsys):
    """A folder may be empty, `.`, or `~/...`."""
    folder, train = tmp_path / "dogscats", tmp_path / "kaggle" / "train"
    folder.mkdir()
    train.mkdir(parents=True)
    for path in [*TRAIN, *VALID]:
        shutil.copy(path, train)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("USERPROFILE" if os.name == "nt" else "HOME", str(tmp_path))
    names = run_here("01_data.py", "--data-dir", ".", "--output-dir", "~/out", "--from-kaggle", "~/kaggle")
    assert names["dset_sizes"] == {"train": 22, "valid": 2}
    assert f"created {folder}\n" in capsys.readouterr().out and {"train", "valid"} < {*os.listdir()}


def test_the_sample_is_not_built(capsys):
    """It is part of this project."""
    with pytest.raises(SystemExit, match="2"):
        run_here("01_data.py", "--sample", "--from-kaggle", SAMPLE)
    assert "--from-kaggle builds the full dataset: omit --sample" in capsys.readouterr().err


def test_two_images_of_each_class_are_needed(tmp_path):
    """One for training and one for validation. What the folder must contain is said for both sources."""
    (tmp_path / "train").mkdir()
    for name in ["cat.0.jpg", "cat.1.jpg", "dog.1.jpg"]:
        (tmp_path / "train" / name).touch()
    assert fails(tmp_path, tmp_path).endswith(
        f"{tmp_path} must contain two or more images such as train/dog.0.jpg or PetImages/Dog/0.jpg: give the folder "
        "that contains train or PetImages")
