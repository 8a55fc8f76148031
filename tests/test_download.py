"""The downloader, with a local web server that misbehaves. It gets a file of 3 MB."""
import errno
import hashlib
import os
import random
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import Handler, full_disk, message, raise_

from support.download import download, open_url

SIZE, BEGUN = 3_000_000, 1_700_000
CONTENT = random.Random(0).randbytes(SIZE)
HASH = ["sha256", hashlib.sha256(CONTENT).hexdigest()[:8]]  # as for VGG16: the first digits are in the file's name
NOT_SENT = "the server did not send this file; does this internet connection require a login?"


@pytest.fixture
def path(tmp_path, server):
    server.content = CONTENT
    return tmp_path / "x.tgz"


@pytest.fixture
def part(path):
    return path.with_name("x.tgz.part")


def get(path, *urls):
    """Download the file. It is whole, and nothing else is left."""
    download(urls, path, SIZE, *HASH)
    assert path.read_bytes() == CONTENT and os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("mode, reason, kept, pieces", [
    ("404", "HTTP Error 404: Not Found", BEGUN, 2),
    ("closes halfway", "the connection closed after 2,350,000 of 3,000,000 bytes", 2_350_000, 1),
    ("no ranges, closes halfway", "the connection closed after 1,500,000 of 3,000,000 bytes", BEGUN, 2),
    ("stalls halfway", "timed out", BEGUN, 2),  # less than a piece is lost
    ("login page", NOT_SENT, BEGUN, 2),
    ("login page without length", NOT_SENT, BEGUN, 2),
    ("damaged", "the file was damaged (wrong checksum), and has been removed", 0, 3)])
def test_one_line_says_why_a_download_failed_and_the_next_run_resumes_it(
        server, path, part, monkeypatch, capsys, watched, mode, reason, kept, pieces):
    """The network of a school has its own ways to fail. On a slow line, 839 MB take a night: no byte is sent twice."""
    urlopen = urllib.request.urlopen
    monkeypatch.setattr("urllib.request.urlopen", lambda request, timeout: urlopen(request, timeout=0.5))
    part.write_bytes(CONTENT[:BEGUN])
    server.mode = mode
    assert message(get, path, server.url) == (
        f"error: x.tgz cannot be downloaded ({server.url}: {reason}): run this script again to resume, or save the "
        f"file with a browser as {path}")
    server.mode, server.ranges, calls = "whole", [], watched("support.download")
    get(path, server.url)
    assert server.ranges == [f"bytes={kept}-" if kept else None]
    assert calls == [(pieces, (SIZE - kept) / 1e6, "MB")]  # of up to one MiB
    assert capsys.readouterr().out.endswith(f"x.tgz, resuming after the first {kept:,}\n" if kept else "x.tgz\n")


@pytest.mark.parametrize("address, shown", [
    ("http://me:SECRET@127.0.0.1:9/x", "127.0.0.1:9/x: "),
    ("http://me:S@ECRET@127.0.0.1:9/x", "127.0.0.1:9/x: "),
    ("me:SECRET@127.0.0.1:9/x", "127.0.0.1:9/x: "),
    ("http://127.0.0.1:9/x?key=SECRET", "http://127.0.0.1:9/x: "),
    ("nonsense", "nonsense: unknown url type: 'nonsense'")])
def test_an_address_is_named_without_its_secrets(path, address, shown):
    """There may be a typing error in DOGSCATS_URL. Students copy error messages to forums."""
    text = message(get, path, address)
    assert f"({shown}" in text and "ECRET" not in text


def test_what_a_server_is_asked(monkeypatch):
    """A school's mirror may need a login. Some servers refuse Python's own name."""
    requests = []
    monkeypatch.setattr("urllib.request.urlopen", lambda request, timeout: requests.append((request, timeout)))
    open_url("http://me:p%40ss@school.example/x.tgz", 7)
    (request, timeout), = requests
    assert timeout == 30 and request.full_url == "http://school.example/x.tgz"
    me_p_ss = "Basic bWU6cEBzcw=="
    assert request.headers == {"Authorization": me_p_ss, "Range": "bytes=7-", "User-agent": "torch.hub"}


def test_a_download_works_through_a_proxy_that_leaves_out_the_length(server, path, monkeypatch):
    """It would end with "does this internet connection require a login?" for ever."""
    monkeypatch.setattr(Handler, "send_header", lambda *args: None)
    get(path, server.url)


def test_a_full_disk_keeps_what_was_downloaded(server, path, part):
    """The student frees some space and runs the same command again."""
    with full_disk(BEGUN):
        assert message(get, path, server.url).startswith(f"error: {part}: cannot be written (")
    assert part.read_bytes() == CONTENT[:BEGUN]


@pytest.mark.parametrize("left, mode, ranges", [
    (CONTENT[:BEGUN], "no ranges", [f"bytes={BEGUN}-"]),
    (CONTENT[:BEGUN], "416", [f"bytes={BEGUN}-", None]),
    (CONTENT, "whole", []),
    (bytes(SIZE), "whole", [None]),
    (CONTENT + bytes(100), "whole", [None])], ids=["no ranges", "416", "whole", "damaged", "too long"])
def test_the_file_is_whole_whatever_an_earlier_run_has_left(server, path, part, left, mode, ranges):
    """And whatever the server supports."""
    part.write_bytes(left)
    server.mode = mode
    get(path, server.url, server.url)
    assert server.ranges == ranges


@pytest.mark.parametrize("answer", [lambda: SimpleNamespace(free=0), lambda: raise_(OSError(errno.ENOSYS, "missing"))],
                         ids=["zero", "not implemented"])
def test_a_disk_that_does_not_tell_its_free_space_is_used(server, path, monkeypatch, answer):
    """Some network drives report 0 bytes, or an error."""
    monkeypatch.setattr("shutil.disk_usage", lambda folder: answer())
    get(path, server.url)


def test_a_folder_that_cannot_be_written_is_no_failed_download(path, monkeypatch):
    """"Run this script again to resume" would send the student in a circle."""
    monkeypatch.setattr(Path, "touch", lambda path: raise_(OSError(errno.EACCES, "Permission denied")))
    assert message(get, path, "http://127.0.0.1:9/x.tgz").startswith(
        f"error: {path.parent}: cannot be written (Permission denied): check its permissions, ")
