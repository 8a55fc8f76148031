"""Getting the dataset and the weights: with the one downloader, from a local web server that misbehaves, and from the
files of Kaggle and Microsoft. The archive is a small one; its size, hash and counts replace those of the real one."""
import contextlib
import gzip
import hashlib
import http.server
import io
import os
import random
import shutil
import socket
import struct
import sys
import tarfile
import threading
import time
import urllib.request
from pathlib import Path
from unittest import mock

import pytest
from conftest import SAMPLE, full_disk, message, raise_, run_here, script
from PIL import Image

import common
import support

data = script("01_data")
posix = pytest.mark.skipif(sys.modules.get("resource", os.name) in (None, "nt"), reason="Windows: open files, links")
COUNTS = {"train/cats": 3, "train/dogs": 3, "valid/cats": 2, "valid/dogs": 2, "test1": 2}


def make_archive(name="dogscats", kind=tarfile.DIRTYPE):
    """A dogscats.tgz of 3 MB: COUNTS images of noise, and a member of another kind; always the same bytes."""
    noise, buffer, last = random.Random(0), io.BytesIO(), tarfile.TarInfo(name)
    last.type, last.linkname, last.mode = kind, "../outside", 0o755
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for path in [f"dogscats/{place}/{i}.bmp" for place, count in COUNTS.items() for i in range(count)]:
            image, member = io.BytesIO(), tarfile.TarInfo(path)
            Image.frombytes("RGB", (288, 288), noise.randbytes(288 * 288 * 3)).save(image, "BMP")
            member.size = image.tell()
            image.seek(0)
            tar.addfile(member, image)
        tar.addfile(last)
    return gzip.compress(buffer.getvalue(), mtime=0)


ARCHIVE, PART = make_archive(), "dogscats.tgz.part"
SIZE = len(ARCHIVE)
PAGE = b"<html>Welcome to the cafe, please log in</html>"
BODIES = {"login page": PAGE, "login page without length": PAGE, "longer": ARCHIVE + b"?", "damaged": bytes(SIZE)}
nothing, urlopen = contextlib.nullcontext(), urllib.request.urlopen
impatient = mock.patch("urllib.request.urlopen", lambda url, timeout: urlopen(url, timeout={30: 0.5}[timeout]))
no_dns = mock.patch("socket.getaddrinfo", side_effect=socket.gaierror(socket.EAI_NONAME, "Name or service not known"))
refused, no_url = (mock.patch.dict("os.environ", DOGSCATS_URL=url) for url in ("http://127.0.0.1:9/mine", "nonsense"))


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves the archive, or the rest of it if a Range is requested; or a fault, server.mode."""
    log_message = mock.Mock()

    def do_GET(self):
        mode, asked, body = self.server.mode, self.headers.get("Range"), BODIES.get(self.server.mode, ARCHIVE)
        self.server.ranges.append(asked)
        start = int(asked[6:-1]) if asked and body is ARCHIVE and mode != "no range" else 0
        if mode in (404, 500) or (mode == 416 and asked) or start >= len(body):
            self.send_error(mode if isinstance(mode, int) else 416)
            return
        end = (start + len(body)) // 2 if mode in ("close", "reset", "stall") else len(body)
        self.send_response(206 if start else 200)
        if mode != "login page without length":
            self.send_header("Content-Length", len(body) - start)
        self.end_headers()
        self.wfile.write(body[start:end])
        if mode == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        if mode == "stall":
            self.rfile.read(1)  # there is none: it waits until the client gives up


@pytest.fixture
def server(monkeypatch):
    """A web server on this machine: for 01_data.py the second of two links, whose archive is the whole dataset."""
    real = {"SIZE": SIZE, "COUNTS": COUNTS, "HASH": ["md5", hashlib.md5(ARCHIVE[:2**20]).hexdigest(), 2**20]}
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.handle_error, server.mode, server.ranges = mock.Mock(), "whole", []
        server.url = f"http://127.0.0.1:{server.server_port}/x.tgz"
        monkeypatch.delenv("DOGSCATS_URL", raising=False)
        for name, value in {**real, "UNPACKED": 4_000_000, "URLS": ["http://127.0.0.1:9/", server.url]}.items():
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
    served = {name: getattr(data, name) for name in ("SIZE", "HASH", "COUNTS", "URLS")}  # not the real archive
    monkeypatch.setattr(sys, "served", served, raising=False)
    edits = {"    print_options(args)\n": "    globals().update(sys.served)\n"}
    options, events, replace = ["--data-dir", tmp_path / "x" / "dogscats", "--output-dir", tmp_path], [], os.replace
    monkeypatch.setattr(os, "fsync", lambda file: events.append("fsync"))
    monkeypatch.setattr(os, "replace", lambda a, b: events.append(Path(b).name) or replace(a, b))
    assert run_here("01_data.py", *options, edits=edits)["dset_sizes"] == {"train": 6, "valid": 4}
    printed, archive = capsys.readouterr().out, tmp_path / "x" / "dogscats.tgz"
    assert events[:3] == ["fsync", "dogscats.tgz", "dogscats"]  # safe on the disk before it gets its name
    assert f"downloading {SIZE:,} bytes to {archive}\n" in printed
    assert f"created {tmp_path / 'x' / 'dogscats'}; {archive} is no longer needed" in printed
    assert "checking that all 12 images can be read (once)" in printed and "train/cats                3 im" in printed
    archive.unlink()
    run_here("01_data.py", *options, edits=edits)
    printed = capsys.readouterr().out
    assert "downloading" not in printed and "checking" not in printed and server.ranges == [None]


@pytest.mark.parametrize("begun, mode, wrong, says, kept", [
    pytest.param(0, "close", nothing, "the connection closed after", SIZE // 2, id="closed half-way"),
    pytest.param(0, "reset", nothing, "", None, id="reset, which may also lose what was sent"),
    pytest.param(0, "stall", impatient, "timed out", 2**20, id="silent for 30 s"),
    pytest.param(0, 404, nothing, "404", 0, id="not found"), pytest.param(0, 500, nothing, "500", 0, id="server error"),
    pytest.param(0, "whole", refused, "127.0.0.1:9/mine", 0, id="refused"),
    pytest.param(0, "whole", no_url, "nonsense", 0, id="not a URL"),
    pytest.param(0, "whole", no_dns, "Name or service not known", 0, id="no DNS"),
    pytest.param(0, "login page", nothing, "did not send this file", 0, id="login page"),
    pytest.param(0, "login page without length", nothing, "require a login?", 0, id="without length"),
    pytest.param(1_500_000, "login page", nothing, "did not send", 1_500_000, id="login page when it resumes"),
    pytest.param(0, "longer", nothing, "did not send this file", 0, id="a longer file"),
    pytest.param(0, "damaged", nothing, "wrong checksum), and has been removed", 0, id="damaged"),
    pytest.param(0, "whole", full_disk(1_500_000), "", 1_500_000, id="disk full")])
def test_a_download_that_fails_is_one_line_and_is_resumed(server, tmp_path, capsys, begun, mode, wrong, says, kept):
    """With a slow network, no byte is downloaded twice; and the message has the way that needs no download at all."""
    part, server.mode = tmp_path / PART, mode
    if begun:
        part.write_bytes(ARCHIVE[:begun])
    with wrong:
        left = fails(tmp_path, says, "cannot be downloaded", f"About {SIZE - begun + 4_000_000:,} bytes of free space",
                     f"again to resume, or save the file with a browser as {tmp_path / 'dogscats.tgz'}")
    size = part.stat().st_size if left else 0
    assert left in ([], [PART]) and kept in (size, None)
    server.mode = "whole"
    capsys.readouterr()
    works(tmp_path)
    assert server.ranges[-1] == (f"bytes={size}-" if size else None)
    assert (f"resuming after the first {size:,}\n" in capsys.readouterr().out) == (size > 0)


@pytest.mark.parametrize("mode, begun", [("whole", 0), ("no range", 2_000_000)])
def test_a_killed_download_is_resumed(server, tmp_path, monkeypatch, mode, begun):
    """A part file is never cut: another run may be writing it, and a server that starts again sends the same bytes."""
    (tmp_path / PART).write_bytes(ARCHIVE[:begun])
    server.mode = mode
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(support, "progress", lambda chunks, *_: (chunk or raise_(KeyboardInterrupt) for chunk in (
            next(chunks), b"")))
        data.get_dataset(tmp_path / "dogscats", None)
    kept = max(begun, 2**20)
    assert os.listdir(tmp_path) == [PART] and (tmp_path / PART).read_bytes() == ARCHIVE[:kept]
    server.mode = "whole"
    works(tmp_path)
    assert server.ranges[-1] == f"bytes={kept}-"


@pytest.mark.parametrize("left, content, mode, ranges", [
    pytest.param(PART, ARCHIVE[:1_500_000], "no range", ["bytes=1500000-"], id="range ignored"),
    pytest.param(PART, ARCHIVE[:1_500_000], 416, ["bytes=1500000-", None], id="range refused"),
    pytest.param(PART, ARCHIVE, "whole", [], id="a whole part file"),
    pytest.param(PART, bytes(SIZE), "whole", [None], id="a damaged part file"),
    pytest.param(PART, ARCHIVE + bytes(100), "whole", [f"bytes={SIZE + 100}-", None], id="a longer part file"),
    pytest.param("dogscats.tgz", ARCHIVE, "whole", [], id="saved with a browser")])
def test_what_is_already_there_is_used(server, tmp_path, left, content, mode, ranges):
    """The archive is whole at the end, whatever an earlier run or the student has left and the server supports."""
    (tmp_path / left).write_bytes(content)
    server.mode = mode
    works(tmp_path)
    assert server.ranges == ranges


def test_too_little_space_is_reported_before_the_download(server, tmp_path, monkeypatch):
    """The missing bytes of the archive and the unpacked files have to fit: after 839 MB it is late to find out."""
    (tmp_path / PART).write_bytes(ARCHIVE[:1_000_000])
    needed = SIZE - 1_000_000 + 4_000_000
    monkeypatch.setattr(shutil, "disk_usage", lambda path: mock.Mock(free=needed - 1))
    assert fails(tmp_path, f"{needed:,} bytes are needed, but only {needed - 1:,} are free: free some space") == [PART]
    assert server.ranges == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: mock.Mock(free=needed))
    works(tmp_path)


def test_the_script_tries_both_links_and_reports_them_in_one_line(tmp_path, capsys):
    """Without a network, a student sees what is wrong and what to do, and not a traceback."""
    text = message("01_data.py", "--data-dir", tmp_path / "dogscats", "--output-dir", tmp_path / "out")
    assert text.index("https://s3.amazonaws.com") < text.index("http://files.fast.ai")
    assert "downloading 839,285,364 bytes" in capsys.readouterr().out and os.listdir(tmp_path) == ["out"]


def test_the_weights_are_downloaded_by_the_same_rules(server, tmp_path, monkeypatch):
    """528 MiB that break off after 400 do not start again from the beginning."""
    path = tmp_path / "hub" / "checkpoints" / "vgg16.pth"
    monkeypatch.setattr(common, "IMAGENET_FILE", path)
    monkeypatch.setattr(common, "IMAGENET_SIZE", SIZE)
    monkeypatch.setattr(common.IMAGENET.value, "url", server.url)
    monkeypatch.setattr(support, "digest_matches", lambda part, *hashed: (
        hashed == ("sha256", "397923af") and part.read_bytes() == ARCHIVE))
    server.mode = "close"
    assert f"with a browser as {path}, or use --weights FILE" in message(common.get_weights, "imagenet")
    server.mode = "whole"
    assert [common.get_weights("imagenet") for _ in range(2)] == ["imagenet"] * 2
    assert path.read_bytes() == ARCHIVE and os.listdir(path.parent) == [path.name]
    assert server.ranges == [None, f"bytes={SIZE // 2}-"]


@posix
@pytest.mark.parametrize("module", [support, data], ids=["downloads", "unpacks"])
def test_a_second_run_while_the_first_one(server, tmp_path, monkeypatch, module):
    """Two prompts, or a notebook and a prompt: neither run harms the other, and the dataset is whole."""
    progress, runs = module.progress, ["first"]

    def second_run_in_the_middle(items, *args):
        for i, item in enumerate(progress(items, *args)):
            if (i, runs) == (1, ["first"]):
                runs.append("second")
                data.get_dataset(tmp_path / "dogscats", None)
            yield item

    monkeypatch.setattr(module, "progress", second_run_in_the_middle)
    works(tmp_path)
    assert runs == ["first", "second"]


@pytest.mark.parametrize("name, ages, kept", [
    (".part-x", (2, 2), False), (".part-x", (0.9, 2), True), (".part-x", (2, 0.9), True), ("x.part", (9, 9), True)])
def test_what_killed_runs_unpacked_is_removed_after_an_hour(server, tmp_path, name, ages, kept):
    """A gigabyte of half a dataset does not stay; a run that is still unpacking, or the student, keeps the files."""
    (tmp_path / name / "train").mkdir(parents=True)
    for place, hours in zip((tmp_path / name, tmp_path / name / "train"), ages, strict=True):
        os.utime(place, (time.time() - 3600 * hours,) * 2)
    works(tmp_path, *[name] * kept)


@pytest.mark.parametrize("name, kind", [
    ("dogscats/../../outside", tarfile.REGTYPE), ("/outside", tarfile.REGTYPE), ("dogscats/C:outside", tarfile.REGTYPE),
    ("dogscats\\..\\..\\outside", tarfile.REGTYPE), ("dogscats/a", tarfile.SYMTYPE), ("dogscats/b", tarfile.LNKTYPE),
    ("dogscats/c", tarfile.CHRTYPE), ("dogscats/d", tarfile.FIFOTYPE)])
def test_an_archive_cannot_write_outside_its_folder(server, tmp_path, monkeypatch, name, kind):
    """An archive from an unknown mirror could otherwise replace any file of the student."""
    archive = make_archive(name, kind)
    (tmp_path / "dogscats.tgz").write_bytes(archive)
    monkeypatch.setattr(data, "SIZE", len(archive))
    assert fails(tmp_path, repr(name), "delete it") == ["dogscats.tgz"] and not (tmp_path.parent / "outside").exists()


@pytest.mark.parametrize("place, content, wrong, says", [
    pytest.param(slice(0, None), b"my thesis", nothing, "size or checksum", id="the student's own file"),
    pytest.param(slice(SIZE, None), bytes(1), nothing, "size or checksum", id="longer"),
    pytest.param(slice(4, 8), b"time", nothing, "size or checksum", id="different first MiB"),
    pytest.param(slice(2_000_000, 2_000_100), bytes(100), nothing, "move it away", id="different bytes"),
    pytest.param(slice(2_000_000, 2_900_000), bytes(900_000), nothing, "move it away", id="zeros"),
    pytest.param(slice(-8, -4), bytes(4), nothing, "move it away", id="gzip's own checksum"),
    pytest.param(slice(0, 0), b"", mock.patch.dict(COUNTS, test1=3), "'test1': 2", id="too few files"),
    pytest.param(slice(0, 0), b"", full_disk(200_000), "4,000,000 bytes of free space are needed", id="disk full")])
def test_a_damaged_archive_leaves_no_half_dataset(server, tmp_path, place, content, wrong, says):
    """Half a dataset would train without an error. The archive stays: it may be a file of the student's."""
    archive = bytearray(ARCHIVE)
    archive[place] = content
    (tmp_path / "dogscats.tgz").write_bytes(archive)
    with wrong:
        assert fails(tmp_path, says) == ["dogscats.tgz"]
    assert (tmp_path / "dogscats.tgz").read_bytes() == archive and server.ranges == []


def test_a_virus_scanner_does_not_cost_the_unpacked_files(server, tmp_path, monkeypatch):
    """Windows renames no folder in which one of 37,500 fresh files is open: wait, or let the student rename it."""
    replace, denied = os.replace, [PermissionError(13, "Access is denied")] * 10
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(os, "replace", lambda a, b: (
        raise_(denied.pop()) if b.name == "dogscats" and denied else replace(a, b)))
    folder, _ = fails(tmp_path, "(Access is denied): close the programs that use it, and rename it yourself")
    assert len(list((tmp_path / folder / "dogscats").rglob("*.bmp"))) == 12
    works(tmp_path, folder)  # 7 attempts failed, and now 3 more


@pytest.mark.parametrize("kaggle, says", [
    (None, "train or valid is missing: move away what is there"), (SAMPLE, "is not empty: leave out --from-kaggle")])
def test_a_folder_with_something_else_is_not_touched(server, tmp_path, kaggle, says):
    """A wrong --data-dir must not cost a student any file."""
    (tmp_path / "dogscats" / "thesis").mkdir(parents=True)
    assert fails(tmp_path, says, kaggle=kaggle) == ["dogscats"] and os.listdir(tmp_path / "dogscats") == ["thesis"]


def test_a_mounted_folder_is_refused_before_the_download(server, tmp_path, monkeypatch):
    """It cannot be renamed, which would only show after 839 MB. (pathlib cannot tell on Windows before Python 3.12.)"""
    (tmp_path / "dogscats").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: raise_(NotImplementedError("unsupported on this system")))
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "dogscats")
    assert fails(tmp_path, f"such as {tmp_path / 'dogscats' / 'dogscats'}") == ["dogscats"] and server.ranges == []
    monkeypatch.setattr(os.path, "ismount", lambda path: False)
    works(tmp_path)


KAGGLE, MICROSOFT = ("train/cat.", "train/dog.", "test1/"), ("PetImages/Cat/", "PetImages/Dog/", "PetImages/x/")


@pytest.mark.parametrize("inside, names, links", [
    ("", KAGGLE, False), pytest.param("", (*KAGGLE[:2], "test/"), True, marks=posix), ("", MICROSOFT, False),
    ("PetImages", MICROSOFT, False)], ids=["Kaggle's", "relative links", "Microsoft's", "PetImages itself"])
def test_kaggles_and_microsofts_files_are_sorted_by_their_numbers(tmp_path, inside, names, links):
    """The last 8 % of each class are for validation, 9 before 10; other files are left out. A broken link is named."""
    source, store = tmp_path / "source", tmp_path / "store" if links else tmp_path / "source"
    for name, numbers in zip(names, [[*range(125), "4 (1)"], [3, 9, 10], [7, 70, "x"]], strict=True):
        for file in [f"{name}{number}.jpg" for number in numbers]:
            for folder in (store, source):
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (store / file).write_text(file)
            if links:
                (source / file).symlink_to(f"../../store/{file}")
    data.get_dataset(tmp_path / "dogscats", source / inside)
    found = {name: sorted(int(path.stem.split(".")[-1]) for path in (tmp_path / "dogscats" / name).iterdir())
             for name in data.COUNTS}
    assert found == {
        "train/cats": [*range(115)], "valid/cats": [*range(115, 125)], "train/dogs": [3, 9], "valid/dogs": [10],
        "sample/train/cats": [*range(8)], "sample/valid/cats": [*range(115, 119)], "sample/train/dogs": [3, 9],
        "sample/valid/dogs": [10], "test1": [7, 70] if "train/cat." in names else []}
    copy, = (tmp_path / "dogscats" / "valid" / "dogs").iterdir()
    (store / f"{names[1]}10.jpg").unlink()
    assert copy.read_text() == f"{names[1]}10.jpg"
    if links:
        text = message(data.get_dataset, tmp_path / "again", source)
        assert "dog.10.jpg: No such file or directory: fix this" in text and not (tmp_path / "again").exists()


def test_the_script_builds_the_dataset_in_the_current_folder(tmp_path, monkeypatch, figures, capsys):
    """Two images of each class are needed. A folder may be empty, `.`, or `~/...`; the sample is not built."""
    (tmp_path / "kaggle" / "train").mkdir(parents=True)
    (tmp_path / "dogscats").mkdir()
    monkeypatch.chdir(tmp_path / "dogscats")
    monkeypatch.setenv("USERPROFILE" if os.name == "nt" else "HOME", str(tmp_path))
    options = ["--data-dir", ".", "--output-dir", "~/out", "--from-kaggle", "~/kaggle"]
    for path in sorted(SAMPLE.rglob("*.jpg"))[:9]:
        shutil.copy(path, tmp_path / "kaggle" / "train")
    text = message("01_data.py", *options)
    assert f"{tmp_path / 'kaggle'}: must contain two or more images such as train/dog.0.jpg (Kaggle)" in text
    assert sorted(os.listdir(tmp_path)) == ["dogscats", "kaggle", "out"] and os.listdir(tmp_path / "dogscats") == []
    for path in sorted(SAMPLE.rglob("*.jpg"))[9:]:
        shutil.copy(path, tmp_path / "kaggle" / "train")
    assert run_here("01_data.py", *options)["dset_sizes"] == {"train": 22, "valid": 2}
    assert f"created {tmp_path / 'dogscats'}\n" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        run_here("01_data.py", "--sample", "--from-kaggle", tmp_path)
    assert "leave out --sample" in capsys.readouterr().err


def test_images_that_cannot_be_read_are_listed_before_hours_are_spent(dataset, options, figures, capsys):
    """03 or 04 would stop there. Nothing is deleted. That all is well is remembered until the size of one changes."""
    bad = [dataset / "test1" / f"{i:02}.jpg" for i in range(22)]
    bad[0].parent.mkdir()
    photo = (dataset / "valid" / "dogs" / "dog.0.jpg").read_bytes()
    for path in bad:
        path.write_bytes(photo[:5000])
    (dataset / "test1" / "notes.txt").write_text("not an image")
    for _ in range(2):  # a check that found something is not remembered
        with pytest.raises(support.UserError, match=r"22 of 32 images cannot be read \(the first 20 .* 2 more are not"):
            run_here("01_data.py", *options)
        listed = [line.partition(": cannot be read as an image")[0] for line in capsys.readouterr().err.splitlines()]
        assert listed == [*map(str, bad[:20])]
    for path in bad:
        path.write_bytes(photo)
    for more, checked in [(b"", True), (b"", False), (b"0", True)]:
        bad[0].write_bytes(photo + more)
        data.check_images(dataset, remember=True)
        assert ("checking that all 32 images can be read (once)" in capsys.readouterr().out) == checked
    (dataset / ".images-checked").unlink()
    data.check_images(dataset, remember=False)  # as for the sample
    assert not (dataset / ".images-checked").exists() and len(list(dataset.rglob("*.jpg"))) == 32


def test_files_that_are_not_used_are_counted(dataset, options, figures, capsys):
    """Phones save .heic and .jfif, which ImageFolder leaves out: a student would wonder where the photos are."""
    for name in ("a.heic", "b.jfif"):
        (dataset / "train" / "dogs" / name).write_bytes(b"")
    run_here("01_data.py", *options)
    printed = capsys.readouterr().out
    assert "train/dogs                3 images\n    2 other files are not used: they do not end with .jpg" in printed
