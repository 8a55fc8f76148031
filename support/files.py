"""Write files completely or not at all, and load them without running code that they may contain."""
import contextlib
import io
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from support.errors import UserError, on_error

HERE = Path(__file__).resolve().parent.parent  # the folder of the scripts
MIB = 2**20


def absolute_path(text):
    """Return an absolute path for a text, which may begin with ~ (home). Raises UserError for a broken link in it."""
    path = Path(os.path.expanduser(text)).absolute()
    for place in [path, *path.parents]:
        if place.is_symlink() and not os.path.exists(place):
            raise UserError(f"{place}: a broken link to {os.path.realpath(place)}: connect that disk, or "
                            "create that folder")
    return path.resolve()


def replace(source, target):
    """Rename as os.replace does. Try for 3 s: on Windows, it fails while a virus scanner has one of the files open."""
    for _ in range(6):
        with contextlib.suppress(PermissionError):
            return os.replace(source, target)
        time.sleep(0.5)
    return os.replace(source, target)


def temporary_folder(parent):
    """Create a folder in `parent` for this run, and remove those that killed runs left behind: those unchanged for an
    hour. Raises UserError if `parent` cannot be written."""
    with on_error(parent):
        parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".part-", dir=parent))
    for old in parent.glob(".part-*"):
        with contextlib.suppress(OSError):  # another run may be removing it too
            changed = max(place.stat().st_mtime for place in [old, *old.glob("**/")])  # of the folders in it
            if folder.stat().st_mtime - changed > 3600:  # seconds, by the clock of that disk
                shutil.rmtree(old)
    return folder


def encode(name, content):
    """Return the bytes of a file in the format given by the extension of its name."""
    buffer = io.BytesIO()  # in memory: on a full disk, torch.save and np.save raise all kinds of errors
    if name.endswith(".npy"):
        np.save(buffer, content, allow_pickle=False)
    elif name.endswith(".pt"):
        torch.save(content, buffer)
    elif name.endswith(".png"):
        content.savefig(buffer, format="png")
    elif name.endswith(".json"):
        buffer.write(json.dumps(content, indent=1, default=os.fspath, allow_nan=False).encode())
    else:
        buffer.write(content.encode())
    return buffer.getvalue()


def save(folder, files, quiet=False, fsync=True):
    """Write {name: content} to the folder, each file completely or not at all; raises UserError if that fails. The last
    of several files marks the set as complete: its old copy is removed first, and the new one is written last."""
    parts = temporary_folder(folder)
    try:
        for name, content in files.items():
            with on_error(folder / name), open(parts / name, "wb") as file:
                file.write(encode(name, content))
                file.flush()
                if fsync:  # wait until it is on the disk
                    os.fsync(file.fileno())
        last = folder / list(files)[-1]
        with on_error(last):
            if len(files) > 1:
                last.unlink(missing_ok=True)
        for name in files:
            with on_error(folder / name):
                replace(parts / name, folder / name)
    finally:
        shutil.rmtree(parts, ignore_errors=True)
    if not quiet:
        print("saved", *(folder / name for name in files), sep="\n  " if len(files) > 1 else " ")


def load(path, advice):
    """Return a saved array, dict or state dict. Raises UserError if it is missing, damaged or could run code. A large
    array stays in its file (memory-mapped), if the disk supports this; changes to it stay in memory."""
    with on_error(path, "damaged or unsafe", advice):
        if path.suffix == ".json":
            return dict(json.loads(path.read_text()))
        if path.suffix != ".npy":
            return torch.load(path, map_location="cpu", weights_only=True)
        if path.stat().st_size > 64 * MIB:  # not a small array: on Windows, a later run could not replace a mapped file
            with contextlib.suppress(OSError):  # this disk may not support it
                return np.load(path, mmap_mode="c", allow_pickle=False)
        return np.load(path, allow_pickle=False)
