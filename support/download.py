"""Download a file, resume an interrupted download, and check the result."""
import base64
import contextlib
import hashlib
import math
import os
import shutil
import urllib.error
import urllib.request
from urllib.parse import unquote, urlsplit

from support.errors import UserError, on_error
from support.files import MIB, replace
from support.progress import progress


def digest_matches(path, algorithm, digest, n_bytes=None):
    """Return whether the hash of a file, or of its first n_bytes, begins with this hexadecimal digest."""
    with open(path, "rb") as file:
        content = file.read(n_bytes)
    return hashlib.new(algorithm, content, usedforsecurity=False).hexdigest().startswith(digest)


def open_url(url, done):
    """Return the response for a URL, which may contain NAME:PASSWORD@, from byte `done` on."""
    headers = {"User-Agent": "torch.hub"}  # some servers refuse Python's own name
    if done:
        headers["Range"] = f"bytes={done}-"
    parts = urlsplit(url)
    login, _, host = parts.netloc.rpartition("@")
    if login:
        headers["Authorization"] = "Basic " + base64.b64encode(unquote(login).encode()).decode()
    request = urllib.request.Request(parts._replace(netloc=host).geturl(), headers=headers)
    return urllib.request.urlopen(request, timeout=30)  # seconds without data


def fetch(url, part, size):
    """Download the rest of the file `part`, up to `size` bytes. Raises OSError or HTTPException if that fails, or
    UserError if the disk is the problem."""
    done = part.stat().st_size if part.exists() else 0
    try:
        response = open_url(url, done if done < size else 0)
    except urllib.error.HTTPError:
        if not done:
            raise
        response = open_url(url, 0)  # the server cannot resume: download everything
    with response:
        if response.status != 206:  # the server sends the whole file
            done = 0
        length = response.headers.get("Content-Length", str(size - done))  # a proxy may leave it out
        if length != str(size - done) or response.headers.get_content_type() == "text/html":
            raise OSError("the server did not send this file; does this internet connection require a login?")
        part.touch()
        with open(part, "r+b") as file:  # never truncated on opening: another run may be writing too
            file.seek(done)
            chunks = iter(lambda: response.read(MIB), b"")
            for chunk in progress(chunks, math.ceil((size - done) / MIB), (size - done) / 1e6, "MB"):
                with on_error(part):
                    file.write(chunk)
            if file.tell() != size:
                raise OSError(f"the connection closed after {file.tell():,} of {size:,} bytes")
            file.truncate()
            os.fsync(file.fileno())


def download(urls, path, size, hashed, room=0):
    """Download a file of `size` bytes from the first URL that works, resuming after the bytes that path.part contains.
    hashed: arguments of digest_matches. room: bytes that are needed afterwards. Raises UserError if it fails."""
    part = path.with_name(path.name + ".part")
    with on_error(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        done = part.stat().st_size if part.exists() else 0
        needed, free = max(size - done, 0) + room, 0
        with contextlib.suppress(OSError):  # some disks do not report it, or report 0
            free = shutil.disk_usage(path.parent).free
        if 0 < free < needed:
            raise UserError(f"{path.parent}: about {needed:,} bytes are needed, but only {free:,} are free: free some "
                            "space, or choose another folder")
        part.touch()  # before the download, as the folder may be read-only
    print(f"downloading {size:,} bytes to {path}" + (f", resuming after the first {done:,}" if done else ""))
    failures = []
    for url in urls:
        try:
            if done != size:
                fetch(url, part, size)
            done = 0
            if not digest_matches(part, *hashed):
                part.unlink()
                raise OSError("the file was damaged (wrong checksum), and has been removed")
            replace(part, path)
            return
        except UserError:
            raise
        except Exception as error:  # any network error
            if path.exists() and not part.exists():
                return  # another run has finished the download
            shown = url.rpartition("@")[2].partition("?")[0]  # without a password or a key
            failures.append(f"{shown}: {str(error) or type(error).__name__}")
    raise UserError(f"{path.name} cannot be downloaded ({'; '.join(failures)}): run this script again to resume, or "
                    f"save the file with a browser as {path}")
