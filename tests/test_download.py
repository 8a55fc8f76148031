"""Faults 1 to 11: getting the dataset, from a local web server that misbehaves. The archive is a small one of the
same form; its size, checksum and counts stand in for the real ones."""
import hashlib
import http.server
import io
import os
import random
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time

import pytest
from conftest import ROOT, full_disk, message, script

import common

data = script("01_data")
UNPACKS = ".01_data-unpacks-here"
COUNTS = {"train/cats": 3, "train/dogs": 3, "valid/cats": 2, "valid/dogs": 2, "test1": 2}


def make_archive(counts=COUNTS, extra=()):
    """A dogscats.tgz of about 3 MB: `counts` files of noise in each folder, and `extra` members, (TarInfo, bytes)."""
    noise, buffer = random.Random(0), io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, count in counts.items():
            for i in range(count):
                member = tarfile.TarInfo(f"dogscats/{name}/{i}.jpg")
                member.size = 250_000
                tar.addfile(member, io.BytesIO(noise.randbytes(member.size)))
        for member, content in extra:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves server.body in the way that server.mode says; knows Range, unless it is told not to."""

    def do_GET(self):
        server, body = self.server, self.server.body
        asked = self.headers.get("Range")
        server.ranges.append(asked)
        mode = server.mode.pop(0) if len(server.mode) > 1 else server.mode[0]
        if isinstance(mode, int):
            return self.send_error(mode)
        if mode == "page":
            body, asked = b"<html>Welcome to the cafe, please log in</html>", None
        if mode == "no range":
            asked = None
        if mode == "416" and asked:
            return self.send_error(416)
        start = int(asked[6:-1]) if asked else 0
        self.send_response(206 if asked else 200)
        if asked:
            shift = 7 if mode == "other range" else 0
            self.send_header("Content-Range", f"bytes {start + shift}-{len(body) - 1}/{len(body)}")
        if mode != "page without length":
            self.send_header("Content-Length", str(len(body) - start))
        else:
            body = b"<html>Welcome to the cafe, please log in</html>"
        self.end_headers()
        end = start + (len(body) - start) // 2 if mode in ("close", "reset", "stall") else len(body)
        for i in range(start, end, 65536):
            self.wfile.write(body[i:min(i + 65536, end)])
            if mode == "slow":
                time.sleep(0.04)
        if mode == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        if mode == "stall":
            server.stalled.wait(20)
        return None

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    """A web server on this machine, and a 01_data.py that takes its archive for the real one."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *args: None
    server.body, server.mode, server.ranges, server.stalled = make_archive(), ["whole"], [], threading.Event()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_port}/dogscats.tgz"
    use(monkeypatch, server.body)
    monkeypatch.setenv("DOGSCATS_URL", server.url)
    yield server
    server.stalled.set()
    server.shutdown()
    server.server_close()


def use(monkeypatch, archive):
    monkeypatch.setattr(data, "SIZE", len(archive))
    monkeypatch.setattr(data, "UNPACKED", 4_000_000)
    monkeypatch.setattr(data, "MD5_OF_FIRST_MIB", hashlib.md5(archive[:2**20]).hexdigest())
    monkeypatch.setattr(data, "COUNTS", COUNTS)


def fails(folder, text=""):
    with pytest.raises(common.UserError) as caught:
        data.get_dataset(folder / "dogscats", None)
    assert text in str(caught.value) and "\n" not in str(caught.value) and str(folder) in str(caught.value)
    assert not (folder / "dogscats").exists(), "half a dataset under the final name"
    return str(caught.value)


def works(folder):
    data.get_dataset(folder / "dogscats", None)
    found = {name: len(os.listdir(folder / "dogscats" / name)) for name in COUNTS}
    assert found == COUNTS and not (folder / UNPACKS).exists()


def test_download_and_never_again(server, tmp_path):
    works(tmp_path)
    data.get_dataset(tmp_path / "dogscats", None)
    assert server.ranges == [None]
    assert (tmp_path / "dogscats" / "train" / "cats" / "0.jpg").read_bytes() == random.Random(0).randbytes(250_000)


def test_both_links_are_tried_https_first(server, tmp_path, monkeypatch):
    assert [url.split(":")[0] for url in data.URLS] == ["https", "http"]
    monkeypatch.delenv("DOGSCATS_URL")
    monkeypatch.setattr(data, "URLS", ["http://127.0.0.1:9/", server.url])
    works(tmp_path)


@pytest.mark.parametrize("mode, says", [("close", "the connection closed after"), ("reset", "Run this again to go on")])
def test_01_02_server_closes_or_resets_half_way(server, tmp_path, mode, says):
    server.mode = [mode]
    fails(tmp_path, says)
    server.mode = ["whole"]
    works(tmp_path)
    assert mode == "reset" or server.ranges[1] == f"bytes={len(server.body) // 2}-"  # a reset may also lose what was sent


def test_03_server_stalls(server, tmp_path, monkeypatch):
    assert socket.getdefaulttimeout() == 30
    socket.setdefaulttimeout(0.5)
    server.mode = ["stall"]
    try:
        fails(tmp_path, "timed out")
    finally:
        socket.setdefaulttimeout(30)
    server.stalled.set()
    server.mode = ["whole"]
    works(tmp_path)


DRIVER = """
import sys, importlib
from pathlib import Path
sys.path.insert(0, {root!r})
data = importlib.import_module("01_data")
data.SIZE, data.UNPACKED, data.MD5_OF_FIRST_MIB, data.COUNTS = {constants!r}
data.get_dataset(Path({folder!r}) / "dogscats", None)
"""


def test_04_killed_then_run_again(server, tmp_path):
    server.mode, part = ["slow"], tmp_path / "dogscats.tgz.part"
    constants = (data.SIZE, data.UNPACKED, data.MD5_OF_FIRST_MIB, data.COUNTS)
    process = subprocess.Popen([sys.executable, "-c", DRIVER.format(root=str(ROOT), constants=constants,
                                                                    folder=str(tmp_path))], stdout=subprocess.DEVNULL)
    for _ in range(3000):
        if part.exists() and part.stat().st_size > 1_000_000:
            break
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not (tmp_path / "dogscats.tgz").exists()
    server.mode = ["whole"]
    works(tmp_path)
    assert server.ranges[1].startswith("bytes=1")


@pytest.mark.parametrize("mode, url", [(404, None), (500, None), ("whole", "http://127.0.0.1:9/x.tgz"), ("whole", "nonsense")])
def test_05_errors_of_the_server_or_none(server, tmp_path, monkeypatch, mode, url):
    server.mode = [mode]
    if url:
        monkeypatch.setenv("DOGSCATS_URL", url)
    assert "save the file with a browser as" in fails(tmp_path, url or str(mode))


def test_05_no_dns(server, tmp_path, monkeypatch):
    def getaddrinfo(*args, **kwargs):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    fails(tmp_path, "Name or service not known")


def test_05_both_links_refused_is_one_line(tmp_path, capsys):
    text = message("01_data.py", "--data-dir", tmp_path / "dogscats", "--output-dir", tmp_path / "out")
    assert "https://s3.amazonaws.com" in text and "http://files.fast.ai" in text
    assert "839,285,364 bytes" in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["page", "page without length", "whole"])
def test_06_a_web_page_or_another_archive(server, tmp_path, mode):
    server.mode, server.body = [mode], make_archive({"train/cats": 1})
    fails(tmp_path, "not the archive")
    assert list(tmp_path.iterdir()) == []


def test_06_07_what_is_wrong_leaves_a_good_part_file_alone(server, tmp_path):
    (tmp_path / "dogscats.tgz.part").write_bytes(server.body[:1_500_000])
    for mode, says in (("page", "not the archive"), ("other range", "another part")):
        server.mode = [mode]
        fails(tmp_path, says)
    server.mode = ["whole"]
    works(tmp_path)
    assert server.ranges[-1] == "bytes=1500000-"


@pytest.mark.parametrize("mode", ["no range", "416", "whole"])
def test_07_range_ignored_or_refused(server, tmp_path, mode):
    (tmp_path / "dogscats.tgz.part").write_bytes(server.body[:1_500_000])
    server.mode = [mode]
    works(tmp_path)
    assert (tmp_path / "dogscats.tgz").read_bytes() == server.body


@pytest.mark.parametrize("size", [0, 100])
def test_07_part_file_as_long_as_the_archive_or_longer(server, tmp_path, size):
    (tmp_path / "dogscats.tgz.part").write_bytes(server.body + bytes(size))
    works(tmp_path)
    assert (tmp_path / "dogscats.tgz").read_bytes() == server.body


def test_08_too_little_room_is_said_before_it_starts(server, tmp_path, monkeypatch):
    monkeypatch.setattr(data.shutil, "disk_usage", lambda path: common.argparse.Namespace(free=1_000_000))
    fails(tmp_path, f"about {len(server.body) + 4_000_000:,} bytes are needed")
    assert server.ranges == []


def test_08_disk_full_while_downloading(server, tmp_path):
    with full_disk(1_500_000):
        fails(tmp_path, "bytes of room")
    works(tmp_path)
    assert server.ranges[-1] == "bytes=1500000-"


def test_08_disk_full_while_unpacking(server, tmp_path):
    (tmp_path / "dogscats.tgz").write_bytes(server.body)
    with full_disk(200_000):
        fails(tmp_path, "4,000,000 bytes of room are needed")
    assert [path.name for path in tmp_path.iterdir()] == ["dogscats.tgz"]
    works(tmp_path)


def member(name, kind=tarfile.REGTYPE, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize("bad", [
    member("dogscats/../../outside"), member("/outside"), member("dogscats/a", tarfile.SYMTYPE, "/etc/passwd"),
    member("dogscats/b", tarfile.LNKTYPE, "../outside"), member("dogscats/c", tarfile.CHRTYPE),
    member("dogscats/d", tarfile.FIFOTYPE), member("dogscats\\..\\..\\outside"), member("dogscats/C:outside")],
    ids=lambda info: info.name)
def test_09_members_that_reach_outside(server, tmp_path, monkeypatch, bad):
    server.body = make_archive(extra=[(bad, b"" if bad.type != tarfile.REGTYPE else b"x")])
    use(monkeypatch, server.body)
    (tmp_path / "in").mkdir()
    fails(tmp_path / "in", repr(bad.name))
    assert [path.name for path in tmp_path.rglob("*")] == ["in", "dogscats.tgz"]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "early end", "counts"])
def test_10_damaged_archive(server, tmp_path, monkeypatch, damage):
    body = bytearray(make_archive({**COUNTS, "valid/dogs": 1}) if damage == "counts" else server.body)
    if damage == "truncated":
        del body[2_000_000:]
    elif damage != "counts":
        body[2_000_000 if damage == "flipped" else -5] ^= 1  # -5: in gzip's own checksum
    server.body = bytes(body)
    use(monkeypatch, server.body)
    fails(tmp_path, "valid/dogs holds 1 files, not 2" if damage == "counts" else "delete it, or move it away if you need it")
    assert [path.name for path in tmp_path.iterdir()] == ["dogscats.tgz"]


def test_11_killed_while_unpacking(server, tmp_path):
    half = tmp_path / UNPACKS / "train" / "cats"
    half.mkdir(parents=True)
    (half / "0.jpg").write_bytes(b"half")
    (half / "stray.jpg").write_bytes(b"left over")
    (tmp_path / "dogscats.tgz").write_bytes(server.body)
    works(tmp_path)


def test_a_folder_with_something_else_is_not_touched(server, tmp_path):
    (tmp_path / "dogscats").mkdir()
    (tmp_path / "dogscats" / "thesis.doc").write_text("mine")
    with pytest.raises(common.UserError, match="lacks train or valid; move what is there away"):
        data.get_dataset(tmp_path / "dogscats", None)
    assert server.ranges == [] and (tmp_path / "dogscats" / "thesis.doc").read_text() == "mine"
