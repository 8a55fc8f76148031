"""Getting the dataset and the weights: with the one downloader, from a local web server that misbehaves, and from the
files of Kaggle and Microsoft. The archive is a small one; its size, hash and counts replace those of the real one."""
import contextlib
import gzip
import hashlib
import http.server
import io
import os
import random
import re
import shutil
import sys
import tarfile
import threading
import time
import urllib.request
from pathlib import Path
from unittest import mock

import pytest
from conftest import PHOTO, SAMPLE, full_disk, message, posix, raise_, run_here, script

import support

data = script("01_data")
COUNTS = {"train/cats": 3, "train/dogs": 3, "valid/cats": 2, "valid/dogs": 2, "test1": 2}


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


ARCHIVE, PART = make_archive(), "dogscats.tgz.part"
SIZE = len(ARCHIVE)
REAL = {"SIZE": SIZE, "COUNTS": COUNTS, "HASH": ["md5", hashlib.md5(ARCHIVE[:2**20]).hexdigest(), 2**20], "URLS": None,
        "UNPACKED": 4_000_000}  # what replaces the numbers of the real archive
BODIES = {"damaged": bytes(SIZE), **dict.fromkeys(["login page", "login page without length"], b"<html>Welcome")}
nothing, urlopen = contextlib.nullcontext(), urllib.request.urlopen
impatient = mock.patch("urllib.request.urlopen", lambda url, timeout: urlopen(url, timeout={30: 0.5}[timeout]))
no_url = mock.patch.dict("os.environ", DOGSCATS_URL="nonsense")


def only_text(value):  # in the name of a test
    return value if isinstance(value, str) else ""


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves the archive, or the rest of it if a Range is requested; or a fault, server.mode."""
    log_message = mock.Mock()

    def do_GET(self):
        mode, asked, body = self.server.mode, self.headers.get("Range"), BODIES.get(self.server.mode, ARCHIVE)
        self.server.ranges.append(asked)
        start = int(asked[6:-1]) if asked and body is ARCHIVE and "no range" not in mode else 0
        if mode == "404" or (mode == "416" and asked) or start >= len(body):
            self.send_error(404 if mode == "404" else 416)
            return
        end = (start + len(body)) // 2 if mode[:5] in ("close", "stall") else len(body)
        self.send_response(206 if start else 200)
        if mode != "login page without length":
            self.send_header("Content-Length", len(body) - start)
        self.end_headers()
        self.wfile.write(body[start:end])
        if mode == "stall":
            self.rfile.read(1)  # there is none: it waits until the client gives up


@pytest.fixture
def server(monkeypatch):
    """A web server on this machine: for 01_data.py the second of two links, whose archive is the whole dataset."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.handle_error, server.mode, server.ranges = mock.Mock(), "whole", []
        server.url = f"http://127.0.0.1:{server.server_port}/x.tgz"
        monkeypatch.delenv("DOGSCATS_URL", raising=False)
        for name, value in {**REAL, "URLS": ["http://127.0.0.1:9/", server.url]}.items():
            monkeypatch.setattr(data, name, value)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


def fails(folder, *says, kaggle=None):
    """Getting the dataset ends in one line that contains all this. Return the names of the files that it leaves."""
    text = message(data.get_dataset, folder / "dogscats", kaggle)
    assert [part for part in (*says, str(folder)) if part not in text] == [], text
    return sorted(os.listdir(folder))


def works(folder, *left):
    """Getting the dataset ends with the whole dataset, the archive, and what else was `left` there before."""
    data.get_dataset(folder / "dogscats", None)
    assert {name: len(os.listdir(folder / "dogscats" / name)) for name in COUNTS} == COUNTS
    assert sorted(os.listdir(folder)) == sorted(["dogscats", "dogscats.tgz", *left])
    assert (folder / "dogscats.tgz").read_bytes() == ARCHIVE


def test_the_script_downloads_unpacks_and_checks_the_dataset_only_once(server, tmp_path, figures, capsys, monkeypatch):
    """A student runs 01 again and again: the network, and the check of all images, are needed the first time alone."""
    monkeypatch.setattr(sys, "served", {name: getattr(data, name) for name in REAL}, raising=False)
    edits = {"    print_options(args)\n": "    globals().update(sys.served)\n"}  # not the real archive
    folder, events, replace = tmp_path / "x" / "dogscats", [], os.replace
    options, archive = ["--data-dir", folder, "--output-dir", tmp_path], tmp_path / "x" / "dogscats.tgz"
    monkeypatch.setattr(os, "fsync", lambda file: events.append("fsync"))
    monkeypatch.setattr(os, "replace", lambda a, b: events.append(Path(b).name) or replace(a, b))
    assert run_here("01_data.py", *options, edits=edits)["dset_sizes"] == {"train": 6, "valid": 4}
    assert events[:3] == ["fsync", "dogscats.tgz", "dogscats"]  # safe on the disk before it gets its name
    printed = capsys.readouterr().out
    for line in (f"downloading {SIZE:,} bytes to {archive}\n", f"created {folder}; {archive} is no longer needed",
                 "checking that all 12 images can be read (done once)\n", "  train/cats                3 images\n"):
        assert line in printed
    archive.unlink()
    run_here("01_data.py", *options, edits=edits)
    assert not re.search("downloading|checking", capsys.readouterr().out) and server.ranges == [None]


@pytest.mark.parametrize("begun, mode, wrong, says, kept", [
    (0, "close", nothing, "the connection closed after", SIZE // 2), (0, "stall", impatient, "timed out", 2**20),
    (2_000_000, "close, no range", nothing, "the connection closed after", 2_000_000),
    (0, "404", nothing, "404", 0), (0, "not a URL", no_url, "nonsense", 0),
    (0, "login page", nothing, "the server did not send this file", 0),
    (0, "login page without length", nothing, "does this internet connection require a login?", 0),
    (1_500_000, "login page", nothing, "the server did not send this file", 1_500_000),
    (0, "damaged", nothing, "wrong checksum), and has been removed", 0),
    (0, "full disk", full_disk(1_500_000), "", 1_500_000)])
def test_a_download_that_fails_is_one_line_and_is_resumed(server, tmp_path, capsys, begun, mode, wrong, says, kept):
    """No byte is downloaded twice. A part file is never cut: another run may be writing it."""
    part, server.mode = tmp_path / PART, mode
    if begun:
        part.write_bytes(ARCHIVE[:begun])
    with wrong:
        left = fails(tmp_path, says, "cannot be downloaded", f"About {SIZE - begun + 4_000_000:,} bytes of free space",
                     f"again to resume, or save the file with a browser as {tmp_path / 'dogscats.tgz'}")
    assert left in ([], [PART]) and kept == (part.stat().st_size if left else 0)
    server.mode = "whole"
    capsys.readouterr()
    works(tmp_path)
    assert server.ranges[-1] == (f"bytes={kept}-" if kept else None)
    assert (f"resuming after the first {kept:,}\n" in capsys.readouterr().out) == (kept > 0)


@pytest.mark.parametrize("left, content, mode, ranges", [
    (PART, ARCHIVE[:1_500_000], "no range", ["bytes=1500000-"]),
    (PART, ARCHIVE[:1_500_000], "416", ["bytes=1500000-", None]), (PART, ARCHIVE, "whole", []),
    (PART, bytes(SIZE), "damaged part file", [None]),
    (PART, ARCHIVE + bytes(100), "longer part file", [f"bytes={SIZE + 100}-", None]),
    ("dogscats.tgz", ARCHIVE, "saved with a browser", [])], ids=only_text)
def test_what_is_already_there_is_used(server, tmp_path, left, content, mode, ranges):
    """The archive is whole at the end, whatever an earlier run or the student has left and the server supports."""
    (tmp_path / left).write_bytes(content)
    server.mode = mode
    works(tmp_path)
    assert server.ranges == ranges


@posix
@pytest.mark.parametrize("module", [support, data], ids=["downloads", "unpacks"])
def test_a_second_run_while_the_first_one(server, tmp_path, monkeypatch, module):
    """Two prompts, or a notebook and a prompt: neither run harms the other, and the dataset is whole."""
    progress, runs = module.progress, ["first"]

    def second_run_in_the_middle(*args):
        for item in progress(*args):
            yield item
            if runs == ["first"]:
                runs.append("second")
                data.get_dataset(tmp_path / "dogscats", None)

    monkeypatch.setattr(module, "progress", second_run_in_the_middle)
    works(tmp_path)
    assert runs == ["first", "second"]


@pytest.mark.parametrize("name, ages, kept", [
    (".part-x", (2, 2), False), (".part-x", (0.9, 2), True), (".part-x", (2, 0.9), True), ("x.part", (9, 9), True)])
def test_what_killed_runs_unpacked_is_removed_after_an_hour(server, tmp_path, name, ages, kept):
    """A gigabyte of half a dataset does not stay; a run that is still unpacking, or the student, keeps the files."""
    (tmp_path / ".part-y").touch()  # no folder, like one that another run has just removed
    (tmp_path / name / "train").mkdir(parents=True)
    for place, hours in zip((tmp_path / name, tmp_path / name / "train"), ages, strict=True):
        os.utime(place, (time.time() - 3600 * hours,) * 2)
    works(tmp_path, ".part-y", *[name] * kept)


OUTSIDE = [*((name, tarfile.REGTYPE) for name in ("dogscats/../../x", "/x", "dogscats/C:x", "dogscats\\..\\..\\x")),
           ("dogscats/a", tarfile.SYMTYPE), ("dogscats/b", tarfile.LNKTYPE), ("dogscats/c", tarfile.FIFOTYPE)]


@pytest.mark.parametrize("archive, wrong, says", [
    (b"my thesis" + ARCHIVE[9:], nothing, "size or checksum"), (ARCHIVE + b"?", nothing, "size or checksum"),
    (ARCHIVE[:2_000_000] + bytes(900_000) + ARCHIVE[2_900_000:], nothing, "delete it and run this script again"),
    (ARCHIVE[:-8] + bytes(4) + ARCHIVE[-4:], nothing, "delete it and run this script again"),  # gzip's own checksum
    (ARCHIVE, mock.patch.dict(COUNTS, test1=3), "'test1': 2"),
    (ARCHIVE, full_disk(200_000), "4,000,000 bytes of free space are needed"),
    *[(make_archive(*last), nothing, f"{last[0]!r} is not a file of the dataset: delete the archive")
      for last in OUTSIDE]
], ids=only_text)
def test_a_damaged_or_dangerous_archive_leaves_no_half_dataset(server, tmp_path, monkeypatch, archive, wrong, says):
    """Half would train without an error; a file from an unknown mirror could replace any file of the student."""
    monkeypatch.setattr(data, "SIZE", len(archive) if "delete the archive" in says else SIZE)
    (tmp_path / "dogscats.tgz").write_bytes(archive)
    with wrong:
        assert fails(tmp_path, says) == ["dogscats.tgz"] and not (tmp_path.parent / "x").exists()
    assert (tmp_path / "dogscats.tgz").read_bytes() == archive and server.ranges == []


def test_a_dataset_that_cannot_be_moved_is_kept(server, tmp_path, monkeypatch):
    """Windows moves no folder in which one of 37,500 files is open. (support.replace waits for virus scanners.)"""
    monkeypatch.setattr(data, "replace", lambda *paths: raise_(PermissionError(13, "Access is denied")))
    folder, _ = fails(tmp_path, "(Access is denied): close the programs that use it, and move it yourself")
    assert len(list((tmp_path / folder / "dogscats").rglob("*.jpg"))) == 12


@pytest.mark.parametrize("inside, kaggle, wrong, says", [
    (["thesis"], None, nothing, "train or valid is missing: rename"),
    (["thesis"], SAMPLE, nothing, "is not empty: omit --from-kaggle"),
    ([], None, mock.patch("os.path.ismount", return_value=True), "a mounted folder, which cannot be replaced: choose"),
    ([], None, mock.patch("shutil.disk_usage", return_value=mock.Mock(free=SIZE + 2_999_999)),
     f"{SIZE + 3_000_000:,} bytes are needed, but only {SIZE + 2_999_999:,} are free")])
def test_what_cannot_work_is_refused_before_the_download(server, tmp_path, inside, kaggle, wrong, says):
    """After 839 MB it is late to find out. A wrong --data-dir must not cost a student any file."""
    for name in [".", *inside]:
        (tmp_path / "dogscats" / name).mkdir()
    (tmp_path / PART).write_bytes(ARCHIVE[:1_000_000])
    with wrong:
        assert fails(tmp_path, says, kaggle=kaggle) == ["dogscats", PART]
    assert os.listdir(tmp_path / "dogscats") == inside and server.ranges == []


@pytest.mark.parametrize("inside, names", [
    ("", ("train/cat.", "train/dog.", "test1/")), ("", ("train/cat.", "train/dog.", "test/")),
    ("", ("PetImages/Cat/", "PetImages/Dog/", "x/")), ("PetImages", ("PetImages/Cat/", "PetImages/Dog/", "x/"))])
def test_kaggles_and_microsofts_files_are_sorted_by_their_numbers(tmp_path, inside, names):
    """The last 8% of each class are for validation, 9 before 10; other files are left out, and links are followed."""
    for name, numbers in zip(names, [[*range(125), "4 (1)"], [3, 9, 10], [7, "x", 70]], strict=True):
        for path in [tmp_path / "source" / f"{name}{number}.jpg" for number in numbers]:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(path.name)
    if os.name != "nt":  # not every user of Windows can make links
        path.rename(tmp_path / "elsewhere")
        path.symlink_to("../../elsewhere")
    data.get_dataset(tmp_path / "dogscats", tmp_path / "source" / inside)
    places = {name: list((tmp_path / "dogscats" / name).iterdir()) for name in data.COUNTS}
    assert {name: sorted(int(path.stem.split(".")[-1]) for path in paths) for name, paths in places.items()} == {
        "train/cats": [*range(115)], "valid/cats": [*range(115, 125)], "train/dogs": [3, 9], "valid/dogs": [10],
        "sample/train/cats": [*range(8)], "sample/valid/cats": [*range(115, 119)], "sample/train/dogs": [3, 9],
        "sample/valid/dogs": [10], "test1": [7, 70] if "train/cat." in names else []}
    assert all(path.read_text() == path.name and not path.is_symlink() for paths in places.values() for path in paths)


def test_the_script_builds_the_dataset_in_the_current_folder(tmp_path, monkeypatch, figures, capsys):
    """Two images of each class are needed. A folder may be empty, `.`, or `~/...`; the sample is not built."""
    train, folder = tmp_path / "kaggle" / "train", tmp_path / "dogscats"
    train.mkdir(parents=True)
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("USERPROFILE" if os.name == "nt" else "HOME", str(tmp_path))
    options = ["--data-dir", ".", "--output-dir", "~/out", "--from-kaggle", "~/kaggle"]
    for path in [*SAMPLE.rglob("cat.*.jpg"), *SAMPLE.rglob("dog.0.jpg")]:
        shutil.copy(path, train)
    text = message("01_data.py", *options)
    assert "two or more images such as train/dog.0.jpg (Kaggle)" in text and "contains 1" in text and os.listdir() == []
    shutil.copy(PHOTO, train)
    assert run_here("01_data.py", *options)["dset_sizes"] == {"train": 12, "valid": 2}
    assert f"created {folder}\n" in capsys.readouterr().out and {"train", "valid"} < {*os.listdir()}
    with pytest.raises(SystemExit, match="2"):
        run_here("01_data.py", "--sample", "--from-kaggle", tmp_path)


def test_images_that_cannot_be_read_are_listed_before_hours_are_spent(dataset, options, figures, capsys):
    """03 or 04 would stop there. That all is well is remembered until a size changes; unused files are counted."""
    bad = [dataset / "test1" / f"{i:02}.jpg" for i in range(22)]
    bad[0].parent.mkdir()
    bad[0].with_suffix(".heic").touch()
    photo = (dataset / "valid" / "dogs" / "dog.0.jpg").read_bytes()
    for path in bad:
        path.write_bytes(photo[:5000])
    with pytest.raises(support.UserError, match=r"22 of 32 images cannot be read \(only the first 20 are listed"):
        run_here("01_data.py", *options)
    out, err = capsys.readouterr()
    assert [line.partition(": cannot be read as an image")[0] for line in err.splitlines()] == [*map(str, bad[:20])]
    assert "  test1                    22 images\n    1 other files are not used: they do not end with .jpg" in out
    for content, remember, checked in [(b"1", False, 1), (b"2", True, 1), (b"3", True, 0), (b"44", True, 1)]:
        for path in bad:
            path.write_bytes(photo + content)
        data.check_images(dataset, remember)
        assert capsys.readouterr().out.count("checking that all 32 images can be read") == checked
        assert (dataset / ".images-checked").exists() == remember
    assert len(list(dataset.rglob("*.jpg"))) == 32
