"""Faults 1 to 11: getting the dataset, from a local web server that misbehaves. The archive is a small one of the
same form; its size, checksum and counts stand in for the real ones."""
import contextlib
import functools
import gzip
import hashlib
import http.server
import io
import random
import shutil
import socket
import struct
import tarfile
import threading
from unittest import mock

import pytest
from conftest import full_disk, message, script

import common

data = script("01_data")
COUNTS = {"train/cats": 3, "train/dogs": 3, "valid/cats": 2, "valid/dogs": 2, "test1": 2}


def make_archive(*extra):
    """A dogscats.tgz of 3 MB: COUNTS files of noise, and `extra` members; always the same bytes."""
    noise, buffer = random.Random(0), io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, count in COUNTS.items():
            for i in range(count):
                member = tarfile.TarInfo(f"dogscats/{name}/{i}.jpg")
                member.size = 250_000
                tar.addfile(member, io.BytesIO(noise.randbytes(member.size)))
        for member in extra:
            tar.addfile(member)
    return gzip.compress(buffer.getvalue(), mtime=0)


ARCHIVE, PART = make_archive(), "dogscats.tgz.part"
PAGE = b"<html>Welcome to the cafe, please log in</html>"
BODIES = {"page": PAGE, "page without length": PAGE, "another archive": ARCHIVE + bytes(1)}
nothing = contextlib.nullcontext()
environment = functools.partial(mock.patch.dict, "os.environ")
impatient = mock.patch("urllib.request.urlopen", functools.partial(data.urllib.request.urlopen, timeout=0.5))
no_dns = mock.patch("socket.getaddrinfo", side_effect=socket.gaierror(socket.EAI_NONAME, "Name or service not known"))


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves the archive, from a Range on if it is asked to, or what server.mode says: a status, or what goes wrong."""
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
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        if mode != "page without length":
            self.send_header("Content-Length", len(body) - start)
        self.end_headers()
        self.wfile.write(body[start:end])
        if mode == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        if mode == "stall":
            self.rfile.read(1)  # there is none: it waits until the other side gives up


@pytest.fixture
def server(monkeypatch):
    """A web server on this machine; for 01_data.py it is the second of two links, and its archive the real one."""
    monkeypatch.setattr(data, "SIZE", len(ARCHIVE))
    monkeypatch.setattr(data, "UNPACKED", 4_000_000)
    monkeypatch.setattr(data, "MD5_OF_FIRST_MIB", hashlib.md5(ARCHIVE[:2**20]).hexdigest())
    monkeypatch.setattr(data, "COUNTS", COUNTS)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.handle_error, server.mode, server.ranges = mock.Mock(), "whole", []
        monkeypatch.setattr(data, "URLS", ["http://127.0.0.1:9/", f"http://127.0.0.1:{server.server_port}/x.tgz"])
        monkeypatch.delenv("DOGSCATS_URL", raising=False)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


def fails(folder, *says):
    """Getting the dataset ends in one line that `says` all this; returns the names of what it leaves."""
    with pytest.raises(common.UserError) as caught:
        data.get_dataset(folder / "dogscats", None)
    text = str(caught.value)
    assert all(part in text for part in (*says, str(folder))) and "\n" not in text, f"{says}: {text}"
    return [path.name for path in folder.iterdir()]


def works(folder):
    data.get_dataset(folder / "dogscats", None)
    assert {name: len(list((folder / "dogscats" / name).iterdir())) for name in COUNTS} == COUNTS
    assert sorted(path.name for path in folder.iterdir()) == ["dogscats", "dogscats.tgz"]
    assert (folder / "dogscats.tgz").read_bytes() == ARCHIVE


def test_download_and_never_again(server, tmp_path):
    works(tmp_path)
    works(tmp_path)
    assert server.ranges == [None]
    assert (tmp_path / "dogscats" / "train" / "cats" / "0.jpg").read_bytes() == random.Random(0).randbytes(250_000)


@pytest.mark.parametrize("begun, mode, wrong, says, kept", [
    pytest.param(0, "close", nothing, "the connection closed after", len(ARCHIVE) // 2, id="01 closes half-way"),
    pytest.param(0, "reset", nothing, "", None, id="02 resets, which may also lose what was sent"),
    pytest.param(0, "stall", impatient, "timed out", 2**20, id="03 stalls"),
    pytest.param(0, 404, nothing, "404", 0, id="05 not found"),
    pytest.param(0, 500, nothing, "500", 0, id="05 error of the server"),
    pytest.param(0, "whole", environment(DOGSCATS_URL="http://127.0.0.1:9/mine"), "127.0.0.1:9/mine", 0, id="05 refused"),
    pytest.param(0, "whole", environment(DOGSCATS_URL="nonsense"), "nonsense", 0, id="05 no URL"),
    pytest.param(0, "whole", no_dns, "Name or service not known", 0, id="05 no DNS"),
    pytest.param(0, "page", nothing, "not the archive", 0, id="06 web page"),
    pytest.param(0, "page without length", nothing, "not the archive", 0, id="06 web page without length"),
    pytest.param(0, "another archive", nothing, "not the archive", 0, id="06 another archive"),
    pytest.param(1_500_000, "page", nothing, "not the archive", 1_500_000, id="06 web page when it goes on"),
    pytest.param(0, "whole", full_disk(1_500_000), "bytes of room", 1_500_000, id="08 disk full")])
def test_01_02_03_05_06_07_08_download_fails_and_goes_on(server, tmp_path, begun, mode, wrong, says, kept):
    assert socket.getdefaulttimeout() == 30
    part, server.mode = tmp_path / PART, mode
    if begun:
        part.write_bytes(ARCHIVE[:begun])
    with wrong:
        left = fails(tmp_path, "Run this again to go on", "save the file with a browser as", says)
    size = part.stat().st_size if left else 0
    assert left in ([], [PART]) and kept in (size, None)
    server.mode = "whole"
    works(tmp_path)
    assert server.ranges[-1] == (f"bytes={size}-" if size else None)


def test_04_killed_then_run_again(server, tmp_path):
    """A kill leaves what the disk holds at that moment, here after the first MiB, as a copy keeps it."""
    folder, killed = tmp_path / "stopped", tmp_path / "killed"

    def progress(chunks, *args):
        yield next(chunks)
        shutil.copytree(folder, killed)
        raise KeyboardInterrupt

    with mock.patch.object(data, "progress", progress), pytest.raises(KeyboardInterrupt):
        data.get_dataset(folder / "dogscats", None)
    assert [path.name for path in killed.iterdir()] == [PART]
    works(killed)
    assert server.ranges[-1] == f"bytes={2**20}-"


def test_05_both_links_refused_is_one_line_https_first(tmp_path, capsys):
    text = message("01_data.py", "--data-dir", tmp_path / "dogscats", "--output-dir", tmp_path / "out")
    assert text.index("https://s3.amazonaws.com") < text.index("http://files.fast.ai")
    assert "839,285,364 bytes" in capsys.readouterr().out


@pytest.mark.parametrize("left, content, mode, last_range", [
    pytest.param(PART, ARCHIVE[:1_500_000], "no range", ["bytes=1500000-"], id="07 range ignored"),
    pytest.param(PART, ARCHIVE[:1_500_000], 416, [None], id="07 range refused"),
    pytest.param(PART, ARCHIVE, "whole", [], id="07 as long as the archive"),
    pytest.param(PART, ARCHIVE + bytes(100), "whole", [None], id="07 longer"),
    pytest.param(".01_data-unpacks-here/train/cats/x.jpg", b"x", "whole", [None], id="11 killed while unpacking")])
def test_07_11_what_an_earlier_run_left(server, tmp_path, left, content, mode, last_range):
    (tmp_path / left).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / left).write_bytes(content)
    server.mode = mode
    works(tmp_path)
    assert server.ranges[-1:] == last_range


def test_08_too_little_room_is_said_before_it_starts(server, tmp_path, monkeypatch):
    monkeypatch.setattr(data.shutil, "disk_usage", lambda path: mock.Mock(free=1_000_000))
    assert fails(tmp_path, f"needs about {len(ARCHIVE) + 4_000_000:,} bytes") == server.ranges == []


@pytest.mark.parametrize("name, kind", [
    ("dogscats/../../outside", tarfile.REGTYPE), ("/outside", tarfile.REGTYPE), ("dogscats/C:outside", tarfile.REGTYPE),
    ("dogscats\\..\\..\\outside", tarfile.REGTYPE), ("dogscats/a", tarfile.SYMTYPE), ("dogscats/b", tarfile.LNKTYPE),
    ("dogscats/c", tarfile.CHRTYPE), ("dogscats/d", tarfile.FIFOTYPE)])
def test_09_members_that_reach_outside(server, tmp_path, monkeypatch, name, kind):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, "../outside"
    archive = make_archive(member)
    (tmp_path / "dogscats.tgz").write_bytes(archive)
    monkeypatch.setattr(data, "SIZE", len(archive))
    assert fails(tmp_path, repr(name)) == ["dogscats.tgz"]
    assert not (tmp_path.parent / "outside").exists()


@pytest.mark.parametrize("place, content, wrong, says", [
    pytest.param(slice(2_000_000, None), b"", nothing, "size or checksum", id="10 truncated"),
    pytest.param(slice(len(ARCHIVE), None), bytes(1), nothing, "size or checksum", id="10 longer"),
    pytest.param(slice(4, 8), b"time", nothing, "size or checksum", id="10 other first MiB"),
    pytest.param(slice(2_000_000, 2_000_100), bytes(100), nothing, "move it away", id="10 other bytes"),
    pytest.param(slice(2_000_000, 3_000_000), bytes(1_000_000), nothing, "move it away", id="10 zeros"),
    pytest.param(slice(-8, -4), bytes(4), nothing, "move it away", id="10 gzip's own checksum"),
    pytest.param(slice(0, 0), b"", mock.patch.dict(COUNTS, test1=3), "'test1': 2", id="10 too few files"),
    pytest.param(slice(0, 0), b"", mock.patch.dict(COUNTS, new=8), "'new': 0", id="10 no such folder"),
    pytest.param(slice(0, 0), b"", full_disk(200_000), "4,000,000 bytes of room are needed", id="08 disk full")])
def test_08_10_unpacking_fails_and_leaves_the_archive(server, tmp_path, place, content, wrong, says):
    archive = bytearray(ARCHIVE)
    archive[place] = content
    (tmp_path / "dogscats.tgz").write_bytes(archive)
    with wrong:
        assert fails(tmp_path, says) == ["dogscats.tgz"]
    assert (tmp_path / "dogscats.tgz").read_bytes() == archive


def test_a_folder_with_something_else_is_not_touched(server, tmp_path):
    (tmp_path / "dogscats").mkdir()
    (tmp_path / "dogscats" / "thesis.doc").write_text("mine")
    assert fails(tmp_path, "lacks train or valid; move what is there away") == ["dogscats"]
    assert server.ranges == [] and (tmp_path / "dogscats" / "thesis.doc").read_text() == "mine"
