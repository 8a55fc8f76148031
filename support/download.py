"""Download a file, resume an interrupted download, and check the result."""
import base64
import contextlib
import hashlib
import math
import os
import shutil
import urllib.error
import urllib.request
from http.client import HTTPException
from urllib.parse import unquote, urlsplit

from support.errors import UserError, on_error
from support.files import MIB, replace
from support.progress import progress


def open_url(url, done):
    """Return the response for a URL, which may contain NAME:PASSWORD@, from byte `done` on if the server can resume."""
    headers = {"User-Agent": "torch.hub"}  # some servers refuse Python's own name
    if done:
        headers["Range"] = f"bytes={done}-"
    parts = urlsplit(url)
    login, _, host = parts.netloc.rpartition("@")
    if login:
        headers["Authorization"] = "Basic " + base64.b64encode(unquote(login).encode()).decode()
    request = urllib.request.Request(parts._replace(netloc=host).geturl(), headers=headers)
    try:
        return urllib.request.urlopen(request, timeout=30)  # seconds without data
    except urllib.error.HTTPError:
        if not done:
            raise
        return open_url(url, 0)


def fetch(url, part, size):
    """Download the rest of the file `part`, up to `size` bytes. Raises UserError if the disk is the problem."""
    done = part.stat().st_size if part.exists() else 0
    if done == size:
        return
    with open_url(url, done if done < size else 0) as response:
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


def download(urls, path, size, algorithm, digest, n_bytes=None, room=0):
    """Download a file of `size` bytes from the first URL that works, resuming after the bytes that path.part contains.
    digest: first digits of the hash of its first n_bytes, or of all. room: bytes needed later. Raises UserError."""
    part = path.with_name(path.name + ".part")
    with on_error(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        done = part.stat().st_size if part.exists() else 0
        needed, free = max(size - done, 0) + room, 0
        with contextlib.suppress(OSError):  # some disks do not report it, or report 0
            free = shutil.disk_usage(path.parent).free
        if 0 < free < needed:
            raise UserError(f"{path.parent}: needs about {needed:,} bytes, but only {free:,} are free: free some "
                            "space, or choose another folder")
        part.touch()  # before the download, as the folder may be read-only
    print(f"downloading {size:,} bytes to {path}" + (f", resuming after the first {done:,}" if done else ""))
    failures = []
    for url in urls:
        try:
            fetch(url, part, size)
            with open(part, "rb") as file:
                hashed = hashlib.new(algorithm, file.read(n_bytes), usedforsecurity=False)
            if not hashed.hexdigest().startswith(digest):
                part.unlink()
                raise OSError("the file was damaged (wrong checksum), and has been removed")
            replace(part, path)
            return
        except (OSError, HTTPException, ValueError) as error:
            if path.exists() and not part.exists():
                return  # another run has finished the download
            shown = url.rpartition("@")[2].partition("?")[0]  # without a password or a key
            failures.append(f"{shown}: {str(error) or type(error).__name__}")
    raise UserError(f"{path.name} cannot be downloaded ({'; '.join(failures)}): run this script again to resume, or "
                    f"save the file with a browser as {path}")
