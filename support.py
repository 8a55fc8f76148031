"""Code that is not part of the lecture: one-line errors, options, progress, images, safe writing of files, records,
features on disk, downloads. To follow the lecture, read the scripts and common.py."""
import argparse
import contextlib
import errno
import hashlib
import io
import json
import math
import os
import shutil
import sys
import tempfile
import time
import urllib.error
import urllib.request
import warnings
from datetime import timedelta
from multiprocessing.pool import ThreadPool
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.datasets.folder import is_image_file

if sys.version_info < (3, 10):  # noqa: UP036 the scripts would fail later, after the training
    raise SystemExit(f"error: Python 3.10 or newer is needed; this is {sys.version.split()[0]}")

HERE = Path(__file__).resolve().parent
MIB = 2**20
warnings.simplefilter("error", Image.DecompressionBombWarning)  # a huge image would take gigabytes of memory
warnings.filterwarnings("ignore", "Palette images with Transparency|Glyph .* missing")  # harmless
warnings.filterwarnings("ignore", "Detected pickle protocol")  # torch.load refuses the file anyway


# ---------------------------------------------------------------------------------------------------------- errors
class UserError(Exception):
    """A problem that the user can fix. The message names the file or option and says what to do."""

    def _render_traceback_(self):  # IPython prints this instead of a traceback
        return [f"error: {self}"]


def remedy(error):
    """Return what to do about an OSError."""
    advice = {errno.EMFILE: "close other programs, or add --num-workers 0",
              errno.ENOSPC: "free some space, or choose another folder",
              errno.EACCES: "check its permissions, close it if it is open in another Python or notebook, or choose "
                            "another folder"}
    return advice.get(error.errno, "fix this, or choose another folder")


@contextlib.contextmanager
def on_error(path, problem="cannot be written", advice="fix this, or choose another folder"):
    """Convert any error raised inside the block to a UserError that names the file (a disk-full error does not) and
    says what to do: `advice` if the file is missing or its content is the problem, else the remedy of the OSError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a damaged file can cause any error
        text = f"{type(error).__name__}: {error}"
        if isinstance(error, OSError) and error.errno:
            text = error.strerror
            advice = advice if error.errno == errno.ENOENT else remedy(error)
        raise UserError(f"{path}: {problem} ({' '.join(text.split())[:120]}): {advice}") from error


script_options = set()  # of the running script, such as "--device": no other option is ever recommended


def one_line(error):
    """Return one line that tells the user what to do about an error, or None if the error is a bug."""
    text = str(error).strip()
    if isinstance(error, UserError):
        # a DataLoader passes on an error of a worker as a long text that ends with "UserError: " and the message
        return " ".join(text.rpartition("UserError: ")[2].splitlines())
    if isinstance(error, OSError) and not isinstance(error, ConnectionError):
        return f"{error.filename or 'a file'}: {error.strerror or text}: {remedy(error)}"
    if "shared memory" in text:
        return "too little shared memory for worker processes: add --num-workers 0"
    if isinstance(error, ConnectionError) or text.startswith("DataLoader worker"):
        return "a worker process died (was there too little memory?): add --num-workers 0"
    if any(sign in text for sign in ["out of memory", "llocate memory", "nable to allocate", "not enough memory",
                                     "Invalid buffer size"]):
        advice = ["close other programs", "try a smaller --batch-size", "add --num-workers 0", "add --device cpu"]
        return "out of memory: " + ", or ".join(
            text for text in advice if "--" not in text or script_options.intersection(text.split()))
    return None


def report(kind, error, traceback):
    """End a script: one line and status 1 for a problem that the user can fix, 130 after Ctrl-C, a traceback for a
    bug."""
    if torch.utils.data.get_worker_info():
        return  # a thread of a worker that lost its main process, which reports the reason itself
    if isinstance(error, OSError) and error.errno in (errno.EPIPE, errno.EINVAL):
        try:
            sys.stdout.flush()
        except OSError:  # the reader of our output, such as head, has closed it
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(141) from None  # the status that a shell reports after SIGPIPE
    line = one_line(error)
    stopped = issubclass(kind, KeyboardInterrupt)
    if hasattr(sys, "ps1") or not (line or stopped):  # ps1: typed at the prompt of python -i
        sys.__excepthook__(kind, error, traceback)
        return
    print("\nstopped by Ctrl-C" if stopped else f"error: {line}", file=sys.stderr)
    if stopped and not sys.flags.interactive:
        raise SystemExit(130)


sys.excepthook = report


# ---------------------------------------------------------------------------------------------------------- options
def number(least, most, kind=int):
    """Return a type for argparse: a number from least to most."""
    def parse(text):
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not between {least:,} and {most:,}")
        return value
    parse.__name__ = kind.__name__  # argparse prints it
    return parse


def absolute_path(text):
    """Return an absolute path for a text, which may be relative or begin with ~ (home). A type for argparse."""
    return Path(os.path.expanduser(text)).resolve()


def option_parser(doc, network=True):
    """Return a parser with the options of every script; if `network`, also those of the scripts that run VGG16."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    common = parser.add_argument_group("common options")
    size = common.add_mutually_exclusive_group().add_argument
    size("--sample", action="store_true", help="use 24 images: sample/ of the dataset, if any, or the bundled drawings")
    size("--limit", type=number(2, 1_000_000), metavar="N",
         help="use N training images and 200 validation images, half of them cats (all if there are fewer)")
    add = common.add_argument
    add("--data-dir", type=absolute_path, metavar="DIR", default=HERE / "data" / "dogscats",
        help="folder that contains train/ and valid/ (default: data/dogscats)")
    add("--output-dir", type=absolute_path, metavar="DIR",
        help="folder for the results (default: outputs/full, outputs/sample or outputs/limit-N)")
    add("--seed", type=number(0, 2**63 - 1), default=0, metavar="N",
        help="random seed; does not affect --weights untrained (default: 0)")
    add("--num-workers", type=number(0, 256), metavar="N",
        help="processes that load images (default: 0 on a CPU or with --sample, else one per core, at most 16)")
    add("--show", action="store_true", help="also open each figure in a window; close the window to continue")
    add("--pause", action="store_true", help="wait for Enter at each heading that has a time in the video")
    if network:
        add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto",
            help="cuda: NVIDIA GPU, mps: GPU of a Mac, auto: a GPU if there is one (default: auto)")
        add("--weights", default="imagenet", metavar="imagenet|untrained|FILE",
            help="ImageNet's (528 MiB, downloaded once), random, or from a .pth file (default: imagenet; in 05, those "
            "of the results)")
        add("--bf16", action="store_true", help="run the frozen layers in bfloat16 (16 bits, less precise): faster on "
            "GPUs that support it and on CPUs with AVX-512 BF16 or AMX, slower on others")
    return parser


def start_run(parser):
    """Parse the command line and prepare the run: choose the folders, set up the figures, and check that results can be
    written and that photos given by --image can be read. Return argparse's namespace. Raises UserError or OSError."""
    # A notebook or an editor has a command line of its own (ipykernel_launcher.py -f x.json, or an empty name).
    own_command_line = (HERE / Path(sys.argv[0]).name).is_file()
    args = parser.parse_args(None if own_command_line else ["--sample", "--show"])
    script_options.update("--" + name.replace("_", "-") for name in vars(args))
    if args.output_dir is None:
        size = "sample" if args.sample else f"limit-{args.limit}" if args.limit else "full"
        args.output_dir = HERE / "outputs" / size
    if args.sample:
        args.data_dir = args.data_dir / "sample" if (args.data_dir / "sample").is_dir() else HERE / "sample"
    if hasattr(sys.stdout, "reconfigure"):  # not in IDLE or a notebook
        # a path may contain characters that the console cannot print; each line appears at once, even in a pipe
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    if not own_command_line:
        print("In a notebook, the options are --sample --show. To choose others, run this and then the cells again:\n"
              'import sys; sys.argv = ["03_finetune_head.py", "--limit", "1000", "--show"]')
    set_up_figures(args)
    with on_error(args.output_dir):
        args.output_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(dir=args.output_dir).cleanup()
    for path in getattr(args, "image", []):
        load_image(path, rotate=True)
    return args


def set_up_figures(args):
    """Choose how matplotlib draws: inline in a notebook, in windows with --show, else only into files."""
    ipython = sys.modules.get("IPython")
    if ipython and ipython.get_ipython():  # the session keeps its own settings
        args.show = args.show or "inline" in plt.get_backend()  # in a notebook, %run shows the figures too
    else:
        plt.style.use("default")  # not the user's matplotlibrc: the figures look the same everywhere
        try:  # Agg needs no display. A notebook passes its inline backend on to !python, which cannot use it.
            plt.switch_backend(plt.get_backend() if args.show and "inline" not in plt.get_backend() else "Agg")
        except ImportError:  # the backend needs a display
            plt.switch_backend("Agg")
    if args.show and plt.get_backend().lower() == "agg":
        print("--show: there is no display here; the figures are only saved")
        args.show = False


def print_options(args):
    """Print the options of this run, as they are after the preparations."""
    given = {name: value for name, value in vars(args).items() if value is not False and value not in (None, [])}
    print("options:", *(f"{name}={value}" for name, value in given.items()))


def banner(heading, seconds=None, pause=False):
    """Print a heading of the lecture. If it has a time in the video, `seconds`, print a link and, if `pause`, wait for
    Enter."""
    print(f"\n{('=' if seconds else '-') * 80}\n{heading}")
    if seconds:
        print(f"  video from {timedelta(seconds=seconds)}, https://youtu.be/ZhC-DIrCe6A?t={seconds}")
        if pause and sys.stdin and sys.stdin.isatty():
            print("press Enter to continue ", end="", flush=True)
            sys.stdin.readline()


# --------------------------------------------------------------------------------------------------------- progress
def progress(items, n_items, total, unit="images"):
    """Yield the items. Print to stderr how much of the work is done and its speed in units per second (`total` is the
    number of units): on a terminal in one line, about once a second; elsewhere a line per minute; never before 5 s."""
    on_terminal = sys.stderr.isatty()
    start = time.monotonic()
    due = start + 5
    for i, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now >= due and i < n_items:
            due = now + (1 if on_terminal else 60)
            seconds = now - start
            left = timedelta(seconds=round(seconds / i * (n_items - i)))
            line = f"  {i / n_items:4.0%}  {total * i / n_items / seconds:,.1f} {unit}/s  {left} left"
            print(f"{line:<60}", end="\r" if on_terminal else "\n", file=sys.stderr, flush=True)
    if on_terminal and due > start + 5:
        print(" " * 60, end="\r", file=sys.stderr, flush=True)


# ----------------------------------------------------------------------------------------------------------- images
def load_image(path, rotate=False):
    """Return the RGB PIL image in a file, rotated according to its EXIF data if `rotate`. Raises UserError if it is
    damaged, not an image, larger than 89 million pixels, or has 32-bit pixels."""
    advice = "replace it (with a JPEG, for example) or remove it" if os.path.exists(path) else "check the name"
    with on_error(path, "cannot be read as an image", advice), Image.open(path) as image:
        if rotate:
            image = ImageOps.exif_transpose(image)
        if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
            raise ValueError("the range of 32-bit pixels is unknown")
        if image.mode.startswith("I"):  # 16 bits per pixel: convert("RGB") would turn all values above 255 white
            image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
        return image.convert("RGB")


def check_folder(folder, classes):
    """Raise UserError unless the folder contains one folder of images per class and nothing else that ImageFolder would
    mistake for a class or an image. Do not open the images."""
    if not folder.is_dir():
        raise UserError(f"{folder} is missing: run python 01_data.py first, or use --sample")
    counts = {place.name: sum(map(is_image_file, os.listdir(place))) for place in folder.iterdir() if place.is_dir()}
    if sorted(counts) != classes or 0 in counts.values():
        raise UserError(f"{folder}: must contain images in the folders {classes}, and no other folders, but contains "
                        f"{counts}: rename or move what is different")
    for path in folder.glob("*/*"):
        if not path.is_file():  # ImageFolder enters folders, and would open a broken link in the middle of the training
            raise UserError(f"{path}: a folder or a broken link among the images: delete it or move it elsewhere")


def numbered_images(folder, prefix=""):
    """Return the images in a folder whose names are the prefix and a number, such as cat.9.jpg, in numeric order."""
    images = [path for path in folder.glob(f"{prefix}*") if is_image_file(path.name)]
    numbers = {path: path.stem.removeprefix(prefix) for path in images}
    return sorted((path for path in images if numbers[path].isdecimal()), key=lambda path: int(numbers[path]))


def check_images(data_dir, remember):
    """Open every image once, and print those that cannot be read; raises UserError if there are any. If `remember`, a
    file in data_dir records that this was done; it is valid until the name or size of an image changes."""
    images = [path for pattern in ["train/*/*", "valid/*/*", "test1/*"] for path in sorted(data_dir.glob(pattern))
              if is_image_file(path.name)]
    files = [(path.relative_to(data_dir).as_posix(), path.stat().st_size) for path in images]
    digest = hashlib.sha256(str(files).encode()).hexdigest().encode()
    checked = data_dir / ".images-checked"
    if checked.exists() and checked.read_bytes() == digest:
        return

    def problem(path):
        try:
            load_image(path)
        except UserError as error:
            return str(error)

    print(f"checking that all {len(images):,} images can be read" + (" (done once)" if remember else ""))
    with ThreadPool() as pool:
        problems = [text for text in progress(pool.imap(problem, images), len(images), len(images)) if text]
    if problems:
        print(*problems[:20], sep="\n", file=sys.stderr)
        more = " (only the first 20 are listed)" if len(problems) > 20 else ""
        raise UserError(f"{data_dir}: {len(problems):,} of {len(images):,} images cannot be read{more}: replace or "
                        "delete them, then run python 01_data.py again (omit --from-kaggle)")
    if remember:
        with contextlib.suppress(OSError):  # a dataset on a read-only disk is checked every time
            checked.write_bytes(digest)


# ------------------------------------------------------------------------------------------------------ whole files
def replace(source, target):
    """Rename as os.replace does. On Windows, a virus scanner or another program may have the file open: try for 3 s."""
    for _ in range(6):
        with contextlib.suppress(PermissionError):
            return os.replace(source, target)
        time.sleep(0.5)
    return os.replace(source, target)


def temporary_folder(parent):
    """Create a folder in `parent` for this run only. Remove those of killed runs, unchanged for an hour."""
    for old in parent.glob(".part-*"):
        with contextlib.suppress(OSError):  # another run may be removing it too
            changed = max(place.stat().st_mtime for place in [old, *old.glob("**/")])  # of the folders in it
            if time.time() - changed > 3600:
                shutil.rmtree(old)
    return Path(tempfile.mkdtemp(prefix=".part-", dir=parent))


def encode(name, content):
    """Return the bytes of a file in the format given by the extension of its name."""
    buffer = io.BytesIO()  # in memory: on a full disk, torch.save and np.save raise all kinds of errors
    suffix = Path(name).suffix
    if suffix == ".npy":
        np.save(buffer, content, allow_pickle=False)
    elif suffix == ".pt":
        torch.save(content, buffer)
    elif suffix == ".png":
        content.savefig(buffer, format="png")
    elif suffix == ".json":
        buffer.write(json.dumps(content, indent=1, default=os.fspath).encode())
    else:
        buffer.write(content.encode())
    return buffer.getvalue()


def save(folder, files):
    """Write {name: content} to the folder, each file completely or not at all; raises UserError if that fails. The last
    of several files marks the set as complete: its old copy is removed first, and the new one is written last."""
    with on_error(folder):
        folder.mkdir(parents=True, exist_ok=True)
        parts = temporary_folder(folder)
    try:
        for name, content in files.items():
            encoded = encode(name, content)
            with on_error(folder / name), open(parts / name, "wb") as file:
                file.write(encoded)
                file.flush()
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
    print("saved", *(folder / name for name in files), sep="\n  " if len(files) > 1 else " ")


def load(path, advice):
    """Return a saved array, dict or state dict. Raises UserError if it is missing, damaged or could run code. A large
    array stays in its file (memory-mapped); changes to it stay in memory."""
    with on_error(path, "missing, damaged or unsafe", advice):
        if path.suffix == ".npy":
            # a small one is read whole: on Windows, a mapped file cannot be replaced by a later run
            return np.load(path, mmap_mode="c" if path.stat().st_size > 64 * MIB else None, allow_pickle=False)
        if path.suffix == ".json":
            return dict(json.loads(path.read_text()))
        return torch.load(path, map_location="cpu", weights_only=True)


# ---------------------------------------------------------------------------------------------------------- records
def fingerprint(dset):
    """Return the SHA-256 of the names (with "/") and sizes (bytes) of an ImageFolder's images. Raises UserError if some
    files are empty."""
    files = [(Path(path).relative_to(dset.root).as_posix(), os.stat(path).st_size) for path, _ in dset.imgs]
    empty = [name for name, size in files if size == 0]
    if empty:
        more = f" and {len(empty) - 20} more" if len(empty) > 20 else ""
        raise UserError(f"{dset.root}: {len(empty)} empty files, {', '.join(empty[:20])}{more}: replace or remove them")
    return hashlib.sha256(str(files).encode()).hexdigest()


IMAGES = {"train": "training images", "valid": "validation images"}


def make_record(dsets, model=None):
    """Return what a result is made from: the transform, the images (their fingerprints when they were found) and, with
    a model, the SHA-256 of all its layers but the last, and their precision. Later scripts compare records."""
    record = {"transform": str(dsets["valid"].transform)}
    record |= {IMAGES[x]: dset.fingerprint for x, dset in dsets.items()}
    if model is None:
        return record
    state_dict = model.state_dict()
    last_layer = list(state_dict)[-1].rpartition(".")[0]
    digest = hashlib.sha256()
    for name, value in state_dict.items():
        if name.rpartition(".")[0] != last_layer:
            digest.update(value.cpu().flatten().view(torch.uint8).numpy())
    first_weight = next(iter(state_dict.values()))
    return {**record, "frozen layers": digest.hexdigest(), "precision": str(first_weight.dtype).removeprefix("torch.")}


def differences(record, now):
    """Return what differs between a record and the current one, such as "different training images", or "" if nothing
    does."""
    changed = [name for name in now if record.get(name) != now[name]]
    return " and ".join(f"different {name}" if name.endswith("s") else f"a different {name}" for name in changed)


# ------------------------------------------------------------------------------------------------- features on disk
class FeatureFile:
    """A .npy file of features, (N, ...) float32, to which rows are appended batch by batch, so that memory use does not
    grow with N. If a run is killed, the next one resumes after the last complete batch, `done` rows. A .json file
    beside it contains the record of what it was made from, and "images_per_second" (None if it was a single batch)."""

    def __init__(self, path, shape, record, batch_size):
        self.path, self.shape, self.record, self.json = path, shape, record, path.with_suffix(".json")
        self.timed_from = None
        self.part = None  # the file that rows are appended to; None if all are there
        self.done = shape[0]
        if path.exists() and self.json.exists():
            changed = differences(load(self.json, "delete it and run this script again"), record)
            if not changed:
                print(f"{path.name}: already computed from the same images, layers, transform and precision")
                return
            print(f"{path.name} was computed with {changed}: recomputing")
        # the name of the part file depends on the record, so that rows of two kinds never mix
        digest = hashlib.sha256(str([shape, record]).encode()).hexdigest()[:16]
        self.part = path.with_suffix(f".{digest}.part")
        for other in set(path.parent.glob(f"{path.stem}.*.part")) - {self.part}:
            print(f"{other.name} was started with different images, layers, transform or precision: removed")
            with on_error(other, "cannot be removed"):
                other.unlink()
        with on_error(self.part):
            self.part.touch()
            # kept open until finish(), and never truncated on opening: another run may be writing the same rows
            self.file = open(self.part, "r+b")  # noqa: SIM115
            size = self.file.seek(0, os.SEEK_END)
            self.file.seek(0)
            np.lib.format.write_array_header_1_0(self.file, {"descr": "<f4", "fortran_order": False, "shape": shape})
            header, row_bytes = self.file.tell(), 4 * math.prod(shape[1:])
            rows = max(size - header, 0) // row_bytes
            self.done = min(rows, shape[0] - 1) // batch_size * batch_size  # at least one batch is left to compute
            self.file.seek(header + self.done * row_bytes)
        if self.done:
            print(f"{path.name}: resuming after the first {self.done:,} of {shape[0]:,} images")

    def append(self, rows):
        """Append a batch of rows. Flush at once, so that it survives if the run is killed."""
        with on_error(self.part):
            self.file.write(np.ascontiguousarray(rows, dtype=np.float32))
            self.file.flush()
        self.done += len(rows)
        if self.timed_from is None:  # the first batch is not timed: it includes the start of workers and device
            self.timed_from = (time.perf_counter(), self.done)

    def finish(self):
        """Give the complete file its name, and return its rows."""
        if self.part:
            start, rows = self.timed_from
            speed = (self.done - rows) / (time.perf_counter() - start) if self.done > rows else None
            # This order ensures that features never lie beside a wrong record, even if the run is killed.
            advice = "is another run writing here? Wait for it to finish, then run this script again"
            with on_error(self.path, advice=advice):
                self.file.truncate()
                os.fsync(self.file.fileno())
                self.file.close()
                os.stat(self.part)  # if another run has just renamed it, stop before its features are removed
                self.path.unlink(missing_ok=True)
                save(self.path.parent, {self.json.name: {**self.record, "images_per_second": speed}})
                replace(self.part, self.path)
            print(f"saved {self.path}" + (f": {speed:.1f} images/s" if speed else ""))
        return load(self.path, "delete it and run this script again")


# --------------------------------------------------------------------------------------------------------- download
def digest_matches(path, algorithm, digest, n_bytes=None):
    """Return whether the hash of a file, or of its first n_bytes, begins with this hexadecimal digest."""
    content = np.memmap(path, np.uint8, "r")[:n_bytes]
    return hashlib.new(algorithm, content, usedforsecurity=False).hexdigest().startswith(digest)


def fetch(url, part, size):
    """Download the rest of the file `part`, up to `size` bytes. Raises OSError or HTTPException if that fails."""
    done = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        response = urllib.request.urlopen(request, timeout=30)  # seconds of silence
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        response = urllib.request.urlopen(url, timeout=30)  # cannot resume, or part is too long: download everything
    with response:
        if response.status != 206:  # the server sends the whole file
            done = 0
        if response.headers.get("Content-Length") != str(size - done):
            raise OSError("the server did not send this file; does this internet connection require a login?")
        part.touch()
        with open(part, "r+b") as file:  # never truncated on opening: another run may be writing too
            file.seek(done)
            chunks = iter(lambda: response.read(MIB), b"")
            for chunk in progress(chunks, math.ceil((size - done) / MIB), (size - done) / 1e6, "MB"):
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
    needed, free = max(size - done, 0) + room, shutil.disk_usage(path.parent).free
    if needed > free:
        raise UserError(f"{path.parent}: about {needed:,} bytes are needed, but only {free:,} are free: free some "
                        "space, or choose another folder")
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
        except Exception as error:  # any network or disk error
            if path.exists() and not part.exists():
                return  # another run has finished the download
            failures.append(f"{url}: {str(error) or type(error).__name__}")
    raise UserError(f"{path.name} cannot be downloaded ({'; '.join(failures)}). About {needed:,} bytes of free space "
                    f"are needed. Run this script again to resume, or save the file with a browser as {path}")
