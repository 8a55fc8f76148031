"""The downloader, with a local web server that misbehaves. It gets a file of 3 MB."""
import errno
import hashlib
import http.server
import os
import random
import threading
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from conftest import full_disk, message, posix, raise_

import support.download
from support.download import digest_matches, download, open_url

SIZE, BEGUN = 3_000_000, 1_500_000
CONTENT = random.Random(0).randbytes(SIZE)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
CLOSED_PORT = "http://127.0.0.1:9/x.tgz"


@pytest.fixture
def path(tmp_path, server):
    server.content = CONTENT
    return tmp_path / "x.tgz"


@pytest.fixture
def part(path):
    return path.with_name("x.tgz.part")


def get(path, urls, room=0):
    urls = urls if isinstance(urls, list) else [urls]
    download(urls, path, SIZE, ["sha256", SHA256[:8]], room)  # as for VGG16: the first digits are in the file's name


def assert_complete(path):
    assert path.read_bytes() == CONTENT and os.listdir(path.parent) == [path.name]


def test_a_file_gets_its_name_only_when_it_is_safe_on_the_disk(server, path, part, monkeypatch, capsys):
    """After a power failure, no half file may look like a whole one."""
    events, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: events.append("fsync") or fsync(file))
    monkeypatch.setattr(os, "replace", lambda a, b: events.append((a, b)) or replace(a, b))
    get(path, server.url)
    assert_complete(path)
    assert events == ["fsync", (part, path)]
    assert capsys.readouterr().out == f"downloading 3,000,000 bytes to {path}\n"


def test_the_second_link_is_used_if_the_first_does_not_work(server, path):
    """The lecture's link may be gone one day."""
    get(path, [CLOSED_PORT, server.url])
    assert_complete(path)


@pytest.mark.parametrize("mode, reason", [
    ("404", "HTTP Error 404: Not Found"),
    ("closes halfway", "the connection closed after 1,500,000 of 3,000,000 bytes"),
    ("stalls halfway", "timed out"),
    ("login page", "the server did not send this file; does this internet connection require a login?"),
    ("login page without length", "the server did not send this file; does this internet connection require a login?"),
    ("damaged", "the file was damaged (wrong checksum), and has been removed")])
def test_one_line_says_why_a_download_failed_and_how_to_go_on(server, path, monkeypatch, mode, reason):
    """The network of a school has its own ways to fail; a student must know what to do next."""
    urlopen = urllib.request.urlopen
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: urlopen(url, timeout={30: 0.5}[timeout]))
    server.mode = mode
    assert message(get, path, server.url) == (
        f"error: x.tgz cannot be downloaded ({server.url}: {reason}): run this script again to resume, or save the "
        f"file with a browser as {path}")
    assert not path.exists()


def test_what_is_no_address_is_named(path):
    """A typing error in DOGSCATS_URL."""
    assert "(nonsense: unknown url type: 'nonsense')" in message(get, path, "nonsense")


@pytest.mark.parametrize("mode, kept", [("closes halfway", SIZE // 2), ("login page", BEGUN)])
def test_no_byte_is_downloaded_twice(server, path, part, capsys, watched, mode, kept):
    """On a slow line, 839 MB take a night. The second run asks only for the rest, and its progress is that of the rest.
    """
    if mode == "login page":
        part.write_bytes(CONTENT[:BEGUN])
    server.mode = mode
    message(get, path, server.url)
    assert part.read_bytes() == CONTENT[:kept]
    server.mode, server.ranges, calls = "whole", [], watched("support.download")
    capsys.readouterr()
    get(path, server.url)
    assert_complete(path)
    assert server.ranges == [f"bytes={kept}-"] and calls == [(2, 1.5, "MB")]  # two pieces of up to one MiB
    assert capsys.readouterr().out.endswith(f"x.tgz, resuming after the first {kept:,}\n")


def test_a_full_disk_keeps_what_was_downloaded(server, path, part):
    """The student frees some space and runs the same command again."""
    with full_disk(BEGUN):
        assert f"{part}: cannot be written (" in message(get, path, server.url)
    assert part.read_bytes() == CONTENT[:BEGUN]


def test_a_part_file_is_never_cut(server, path, part):
    """A server that cannot resume begins again, and breaks off: another run may be writing the same file."""
    part.write_bytes(CONTENT[:2_000_000])
    server.mode = "no ranges, closes halfway"
    message(get, path, server.url)
    assert part.stat().st_size == 2_000_000


@pytest.mark.parametrize("left, mode, ranges", [
    (CONTENT[:BEGUN], "no ranges", [f"bytes={BEGUN}-"]),
    (CONTENT[:BEGUN], "416", [f"bytes={BEGUN}-", None]),
    (CONTENT, "a whole part file", []),
    (bytes(SIZE), "a damaged part file", [None]),
    (CONTENT + bytes(100), "a longer part file", [None])], ids=lambda value: value if isinstance(value, str) else "")
def test_the_file_is_whole_whatever_an_earlier_run_has_left(server, path, part, left, mode, ranges):
    """And whatever the server supports."""
    part.write_bytes(left)
    server.mode = mode
    get(path, [server.url, server.url])
    assert_complete(path)
    assert server.ranges == ranges


@pytest.mark.parametrize("done", [0, BEGUN])
def test_too_little_space_is_noticed_before_the_download(server, path, part, monkeypatch, done):
    """After 839 MB it is late to find out. What counts is the disk of the file, and what is already on it."""
    room = 4_000_000
    needed = SIZE - done + room
    free = {path.parent: needed - 1}  # bytes on the disk of a folder
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=free[place]))
    if done:
        part.write_bytes(CONTENT[:done])
    assert message(get, path, server.url, room) == (
        f"error: {path.parent}: about {needed:,} bytes are needed, but only {needed - 1:,} are free: free some space, "
        "or choose another folder")
    assert server.ranges == []
    free[path.parent] = needed
    get(path, server.url, room)
    assert_complete(path)


@posix
def test_two_runs_at_once_end_with_one_whole_file(server, path, monkeypatch):
    """A notebook and a prompt: neither run harms the other."""
    progress, runs = support.download.progress, ["first"]

    def second_run_in_the_middle(*args):
        for item in progress(*args):
            yield item
            if runs == ["first"]:
                runs.append("second")
                get(path, server.url)

    monkeypatch.setattr("support.download.progress", second_run_in_the_middle)
    get(path, server.url)
    assert_complete(path)
    assert runs == ["first", "second"]


def test_name_and_password_of_an_address_are_sent_and_never_shown(monkeypatch, path):
    """A school's mirror may need a login; a message that a student copies to a forum must not contain it."""
    requests = []
    monkeypatch.setattr("urllib.request.urlopen", lambda request, timeout: requests.append(request))
    open_url("http://me:p%40ss@school.example/x.tgz", 7)
    request, = requests
    assert request.full_url == "http://school.example/x.tgz"
    assert request.headers["Authorization"] == "Basic bWU6cEBzcw=="  # me:p@ss
    assert request.headers["Range"] == "bytes=7-"
    text = message(get, path, "http://me:p%40ss@127.0.0.1:9/x.tgz")
    assert "(127.0.0.1:9/x.tgz: " in text and "me:" not in text and "ss@" not in text


def test_a_hash_may_be_that_of_the_first_bytes_or_given_by_its_first_digits(path):
    """The archive is checked by its first MiB, VGG16 by the digits in the file's name."""
    path.write_bytes(b"first and more")
    first = hashlib.md5(b"first").hexdigest()
    assert digest_matches(path, "md5", first, 5) and digest_matches(path, "md5", first[:6], 5)
    assert not digest_matches(path, "md5", first) and not digest_matches(path, "md5", first[1:], 5)


class Proxy(http.server.BaseHTTPRequestHandler):
    """A school's proxy: no Content-Length, and no answer for Python's own name."""
    log_message = mock.Mock()

    def do_GET(self):
        refused = "Python" in self.headers["User-Agent"]
        self.send_response(403 if refused else 200)
        self.end_headers()
        self.wfile.write(b"" if refused else b"1234567890")


def test_a_download_works_through_a_schools_proxy(tmp_path):
    """It would end with "does this internet connection require a login?" or "Forbidden", for ever."""
    with http.server.HTTPServer(("127.0.0.1", 0), Proxy) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/x"
        download([url], tmp_path / "x", 10, ["md5", "e807f1fcf82d132f9bb018ca6738a19f"])
    assert (tmp_path / "x").read_bytes() == b"1234567890"


@pytest.mark.parametrize("address", ["http://me:SECRET@127.0.0.1:9/x", "http://me:S@ECRET@127.0.0.1:9/x",
                                     "me:SECRET@127.0.0.1:9/x", "http://127.0.0.1:9/x?key=SECRET"])
def test_a_secret_in_an_address_is_not_printed(tmp_path, address):
    """Students copy error messages to forums."""
    assert "ECRET" not in message(download, [address], tmp_path / "x", 10, ["md5", ""])


def test_a_folder_that_cannot_be_written_is_no_failed_download(tmp_path, monkeypatch):
    """"Run this script again to resume" would send the student in a circle."""
    monkeypatch.setattr(Path, "touch", lambda path: raise_(OSError(errno.EACCES, "Permission denied")))
    assert message(download, ["http://127.0.0.1:9/x"], tmp_path / "x", 10, ["md5", ""]).startswith(
        f"error: {tmp_path}: cannot be written (Permission denied): check its permissions, ")


@pytest.mark.parametrize("answer", [lambda: SimpleNamespace(free=0), lambda: raise_(OSError(errno.ENOSYS, "missing"))],
                         ids=["zero", "not implemented"])
def test_a_disk_that_does_not_tell_its_free_space_is_used(tmp_path, monkeypatch, answer):
    """Some network drives report 0 bytes, or an error."""
    monkeypatch.setattr("shutil.disk_usage", lambda folder: answer())
    assert "cannot be downloaded" in message(download, ["http://127.0.0.1:9/x"], tmp_path / "x", 10, ["md5", ""])
