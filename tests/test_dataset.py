"""Getting the dataset: from the archive, or from the files of Kaggle and Microsoft. The archive is a small one; its
size, hash and counts replace those of the real one."""
import errno
import gzip
import hashlib
import io
import os
import random
import re
import shutil
import tarfile
import time
from types import SimpleNamespace
from unittest import mock

import pytest
from conftest import PHOTO, SAMPLE, message, posix, raise_, run_here

from support import dataset as data

COUNTS = {"train/cats": 3, "train/dogs": 3, "valid/cats": 2, "valid/dogs": 2, "test1": 2}
UNPACKED = 4_000_000


def make_archive(name="dogscats", kind=tarfile.DIRTYPE):
    """A dogscats.tgz of 3 MB: COUNTS images, which end with noise, and a last member; always the same bytes."""
    noise, buffer, last = random.Random(0), io.BytesIO(), tarfile.TarInfo(name)
    last.type, last.linkname, last.mode = kind, "../outside", 0o755
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for path in [f"dogscats/{place}/{i}.jpg" for place, count in COUNTS.items() for i in range(count)]:
            content, member = PHOTO.read_bytes() + noise.randbytes(250_000), tarfile.TarInfo(path)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        tar.addfile(last)
    return gzip.compress(buffer.getvalue(), mtime=0)


ARCHIVE = make_archive()
SIZE = len(ARCHIVE)


@pytest.fixture(autouse=True)
def small_archive(server, monkeypatch):
    """The lecture's first link does not work, and the second leads to the small archive."""
    server.content = ARCHIVE
    monkeypatch.delenv("DOGSCATS_URL", raising=False)
    monkeypatch.setattr(data, "URLS", ["http://127.0.0.1:9/", server.url])
    monkeypatch.setattr(data, "SIZE", SIZE)
    monkeypatch.setattr(data, "HASH", ["md5", hashlib.md5(ARCHIVE[:2**20]).hexdigest(), 2**20])
    monkeypatch.setattr(data, "COUNTS", COUNTS)
    monkeypatch.setattr(data, "UNPACKED", UNPACKED)


def fails(folder, kaggle=None):
    """Getting the dataset ends in one line: return it."""
    return message(data.get_dataset, folder / "dogscats", kaggle)


def assert_works(folder, *left):
    """Getting the dataset ends with the whole dataset, the archive, and what else was `left` there before."""
    data.get_dataset(folder / "dogscats", None)
    assert {name: len(os.listdir(folder / "dogscats" / name)) for name in COUNTS} == COUNTS
    assert sorted(os.listdir(folder)) == sorted(["dogscats", "dogscats.tgz", *left])
    assert (folder / "dogscats.tgz").read_bytes() == ARCHIVE


def test_the_script_downloads_unpacks_and_checks_the_dataset_only_once(server, tmp_path, figures, capsys):
    """A student runs 01 again and again: the network, and the check of all images, are needed the first time alone."""
    folder = tmp_path / "x" / "dogscats"
    options, archive = ["--data-dir", folder, "--output-dir", tmp_path], tmp_path / "x" / "dogscats.tgz"
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


def test_an_archive_saved_with_a_browser_is_used(server, tmp_path):
    """The advice for a network in which Python cannot download."""
    (tmp_path / "dogscats.tgz").write_bytes(ARCHIVE)
    assert_works(tmp_path)
    assert server.ranges == []


def test_space_is_needed_for_the_archive_and_the_unpacked_files(server, tmp_path, monkeypatch):
    """Else the disk would be full in the middle of unpacking."""
    needed = SIZE + UNPACKED
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=needed - 1))
    assert f"about {needed:,} bytes are needed, but only {needed - 1:,} are free" in fails(tmp_path)
    assert server.ranges == [] and os.listdir(tmp_path) == []


@posix
def test_two_runs_that_unpack_at_once_end_with_a_whole_dataset(tmp_path, monkeypatch):
    """Two prompts, or a notebook and a prompt: neither run harms the other."""
    progress, runs = data.progress, ["first"]

    def second_run_in_the_middle(*args):
        for item in progress(*args):
            yield item
            if runs == ["first"]:
                runs.append("second")
                data.get_dataset(tmp_path / "dogscats", None)

    monkeypatch.setattr(data, "progress", second_run_in_the_middle)
    assert_works(tmp_path)
    assert runs == ["first", "second"]


@pytest.mark.parametrize("name, hours, hours_inside, kept", [
    (".part-x", 2, 2, False),
    (".part-x", 0.9, 2, True),
    (".part-x", 2, 0.9, True),
    ("x.part", 9, 9, True)])
def test_what_killed_runs_unpacked_is_removed_after_an_hour(tmp_path, name, hours, hours_inside, kept):
    """A gigabyte of half a dataset does not stay; a run that is still unpacking, or the student, keeps the files."""
    (tmp_path / ".part-y").touch()  # no folder, like one that another run has just removed
    (tmp_path / name / "train").mkdir(parents=True)
    now = time.time()
    for place, age in [(tmp_path / name, hours), (tmp_path / name / "train", hours_inside)]:
        os.utime(place, (now - 3600 * age, now - 3600 * age))
    assert_works(tmp_path, ".part-y", *[name] * kept)


@pytest.mark.parametrize("archive, says", [
    (b"my thesis" + ARCHIVE[9:], "incomplete or damaged (wrong size or checksum): move it away and run this again"),
    (ARCHIVE + b"?", "incomplete or damaged (wrong size or checksum): move it away and run this again"),
    (ARCHIVE[:2_000_000] + bytes(900_000) + ARCHIVE[2_900_000:], "): move it away and run this again"),
    (ARCHIVE[:-8] + bytes(4) + ARCHIVE[-4:], "): move it away and run this again")],
    ids=["a different file", "a byte more", "damaged in the middle", "gzip's own checksum is wrong"])
def test_a_damaged_archive_leaves_no_half_dataset(server, tmp_path, archive, says):
    """Half a dataset would train without an error."""
    (tmp_path / "dogscats.tgz").write_bytes(archive)
    text = fails(tmp_path)
    assert text.startswith(f"error: {tmp_path / 'dogscats.tgz'}: incomplete or damaged (") and text.endswith(says)
    assert os.listdir(tmp_path) == ["dogscats.tgz"] and server.ranges == []
    assert (tmp_path / "dogscats.tgz").read_bytes() == archive  # it may be something else, and precious


def test_an_archive_with_too_few_images_is_refused(tmp_path, monkeypatch):
    """The archive of a mirror that left some out."""
    monkeypatch.setattr(data, "COUNTS", {**COUNTS, "test1": 3})
    assert "incomplete or damaged (it contains {'train/cats': 3," in fails(tmp_path)
    assert os.listdir(tmp_path) == ["dogscats.tgz"]


def test_a_disk_that_is_full_while_unpacking_leaves_no_half_dataset(tmp_path, monkeypatch):
    """The message says how much space is needed."""
    (tmp_path / "dogscats.tgz").write_bytes(ARCHIVE)
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr("tarfile.copyfileobj", lambda *args: raise_(full))  # the folders are already there
    assert fails(tmp_path) == (f"error: {tmp_path / 'dogscats'}: the disk is full: free about 4,000,000 bytes, or "
                               "choose another folder with --data-dir")
    assert os.listdir(tmp_path) == ["dogscats.tgz"]


@pytest.mark.parametrize("name, kind", [
    ("dogscats/../../x", tarfile.REGTYPE), ("/x", tarfile.REGTYPE), ("dogscats/C:x", tarfile.REGTYPE),
    ("dogscats\\..\\..\\x", tarfile.REGTYPE), ("dogscats/a", tarfile.SYMTYPE), ("dogscats/b", tarfile.LNKTYPE),
    ("dogscats/c", tarfile.FIFOTYPE)])
def test_an_archive_cannot_write_outside_its_folder(tmp_path, monkeypatch, name, kind):
    """An archive from an unknown mirror could otherwise replace any file of the student."""
    archive = make_archive(name, kind)
    monkeypatch.setattr(data, "SIZE", len(archive))
    (tmp_path / "dogscats.tgz").write_bytes(archive)
    assert fails(tmp_path).endswith(f"dogscats.tgz: {name!r} is not a file of the dataset: move the archive away")
    assert os.listdir(tmp_path) == ["dogscats.tgz"] and not (tmp_path.parent / "x").exists()


def test_a_dataset_that_cannot_be_moved_is_kept(tmp_path, monkeypatch):
    """Windows moves no folder in which one of 37,500 files is open."""
    monkeypatch.setattr(data, "replace", lambda *paths: raise_(PermissionError(13, "Access is denied")))
    text = fails(tmp_path)
    folder = next(tmp_path.glob(".part-*")) / "dogscats"
    assert text == (f"error: {folder} contains the complete dataset, but cannot be moved to {tmp_path / 'dogscats'} "
                    "(Access is denied): close the programs that use it, and move it yourself")
    assert len(list(folder.rglob("*.jpg"))) == sum(COUNTS.values())


@pytest.mark.parametrize("inside, kaggle, mounted, says", [
    (["thesis"], None, False, "is not empty or cannot be replaced: use a new folder, such as --data-dir "),
    ([], None, True, "is not empty or cannot be replaced: use a new folder, such as --data-dir "),
    (["train", "valid"], SAMPLE, False, "contains a dataset: omit --from-kaggle, or add --data-dir "),
    (["x", "x/train", "x/valid"], None, False, "does not contain train and valid: use --data-dir "),
    (["Cat"], None, False, " --from-kaggle ")])
def test_what_cannot_work_is_refused_before_the_download(server, tmp_path, inside, kaggle, mounted, says):
    """After 839 MB it is late to find out. A wrong --data-dir must not cost a student any file."""
    for name in [".", *inside]:
        (tmp_path / "dogscats" / name).mkdir()
    with mock.patch("os.path.ismount", return_value=mounted):
        assert says in fails(tmp_path, kaggle)
    found = {path.relative_to(tmp_path / "dogscats").as_posix() for path in (tmp_path / "dogscats").rglob("*")}
    assert os.listdir(tmp_path) == ["dogscats"] and found == set(inside) and server.ranges == []


def numbers_in(folder):
    return sorted(int(path.stem.split(".")[-1]) for path in folder.iterdir())


@pytest.mark.parametrize("inside, cat, dog, test", [
    ("", "train/cat.", "train/dog.", "test1/"),
    ("", "train/cat.", "train/dog.", "test1/test1/"),
    ("", "train/cat.", "train/dog.", "test/"),
    ("", "PetImages/Cat/", "PetImages/Dog/", None),
    ("PetImages", "PetImages/Cat/", "PetImages/Dog/", None)])
def test_kaggles_and_microsofts_files_are_sorted_by_their_numbers(tmp_path, monkeypatch, inside, cat, dog, test):
    """The last 8% of each class are for validation, 9 before 10; other files are left out, and links are followed."""
    files = [(cat, range(125)), (cat, ["4 (1)"]), (dog, [3, 9, 10])] + [(test, [7, "x", 70])] * bool(test)
    for start, numbers in files:
        for path in [tmp_path / "source" / f"{start}{number}.jpg" for number in numbers]:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(path.name)
    if os.name != "nt":  # not every user of Windows can make links
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    data.get_dataset(tmp_path / "dogscats", tmp_path / "source" / inside)
    expected = {"train/cats": [*range(115)], "valid/cats": [*range(115, 125)], "train/dogs": [3, 9],
                "valid/dogs": [10], "sample/train/cats": [*range(8)], "sample/valid/cats": [*range(115, 119)],
                "sample/train/dogs": [3, 9], "sample/valid/dogs": [10], "test1": [7, 70] if test else []}
    assert {name: numbers_in(tmp_path / "dogscats" / name) for name in expected} == expected
    for path in (tmp_path / "dogscats").rglob("*.jpg"):
        assert path.read_text() == path.name and not path.is_symlink()


def test_the_script_builds_the_dataset_in_the_current_folder(tmp_path, monkeypatch, figures, capsys):
    """A folder may be empty, `.`, or `~/...`; the sample is not built."""
    train, folder = tmp_path / "kaggle" / "train", tmp_path / "dogscats"
    train.mkdir(parents=True)
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("USERPROFILE" if os.name == "nt" else "HOME", str(tmp_path))
    for path in SAMPLE.rglob("*.jpg"):
        shutil.copy(path, train)
    names = run_here("01_data.py", "--data-dir", ".", "--output-dir", "~/out", "--from-kaggle", "~/kaggle")
    assert names["dset_sizes"] == {"train": 22, "valid": 2}
    assert f"created {folder}\n" in capsys.readouterr().out and {"train", "valid"} < {*os.listdir()}
    with pytest.raises(SystemExit, match="2"):
        run_here("01_data.py", "--sample", "--from-kaggle", tmp_path)
    assert "--from-kaggle builds the full dataset: omit --sample" in capsys.readouterr().err


def test_two_images_of_each_class_are_needed(tmp_path):
    """One for training and one for validation. What the folder must contain is said for both sources."""
    train = tmp_path / "kaggle" / "train"
    train.mkdir(parents=True)
    for path in [*SAMPLE.rglob("cat.*.jpg"), *SAMPLE.rglob("dog.0.jpg")]:
        shutil.copy(path, train)
    assert ("must contain two or more images such as train/dog.0.jpg (Kaggle) or PetImages/Dog/0.jpg (Microsoft), but "
            "contains 1: give the folder") in fails(tmp_path, tmp_path / "kaggle")
    assert os.listdir(tmp_path) == ["kaggle"]


def test_progress_of_unpacking_and_copying(tmp_path, monkeypatch, watched):
    """A student decides by it whether to wait. 37,500 files are the whole of unpacking."""
    calls = watched("support.dataset")
    assert_works(tmp_path)
    source = tmp_path / "kaggle" / "train"
    source.mkdir(parents=True)
    for path in SAMPLE.rglob("*.jpg"):
        shutil.copy(path, source)
    data.get_dataset(tmp_path / "second", tmp_path / "kaggle")
    assert calls[0] == (12, 12, "files")
    assert calls[1:] == [(n, n, "images") for n in [0, 11, 1, 8, 1, 11, 1, 8, 1]]
