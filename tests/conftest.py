"""What the tests share: the scripts as modules and as processes, small datasets, a small VGG16 and its weights.
They run on the CPU, so that results can be compared exactly; only test_accelerator.py uses a GPU, if there is one."""
import contextlib
import copy
import http.server
import io
import json
import os
import re
import sys
import tempfile
import textwrap
import threading
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
SMALL = ROOT / "tests" / "small_vgg"
sys.path[:0] = [str(ROOT), str(SMALL)]
TORCH_HOME = tempfile.TemporaryDirectory(prefix="torch")  # removed at the end
# No test may reach the network: a request meets a closed port of this machine. Small networks need only one thread.
os.environ.update(dict.fromkeys(["http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"], "http://127.0.0.1:9"),
                  no_proxy="127.0.0.1", PYTHONPATH=str(SMALL), TORCH_HOME=TORCH_HOME.name,
                  MPLBACKEND="Agg", OMP_NUM_THREADS="1")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, models

import common
import small_vgg  # noqa: F401  from here on, VGG16 is small
from support.errors import report
from support.files import save
from support.records import file_sizes, make_record

torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.5  # seconds, not 5, until a dead worker is noticed

SCRIPTS = ["01_data.py", "02_vgg_imagenet.py", "03_finetune_head.py", "04_precompute.py", "05_analysis.py"]
SAMPLE = ROOT / "sample"
PHOTO, SECOND_PHOTO = SAMPLE / "valid" / "dogs" / "dog.8.jpg", SAMPLE / "train" / "cats" / "cat.0.jpg"
TRAIN, VALID = (sorted((SAMPLE / x).rglob("*.jpg")) for x in ["train", "valid"])  # 16 and 8 images
WITH_WINDOWS = "module://matplotlib.backends.backend_agg"  # stands for a backend of matplotlib that opens windows
posix = pytest.mark.skipif(sys.modules.get("resource", os.name) in (None, "nt"),  # None: a test that imitates Windows
                           reason="Windows has no such links and signals, and renames no open file")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: needs the real VGG16 (553 MB); leave out with -m 'not slow'")
    config.addinivalue_line("filterwarnings", "ignore:.*multi-threaded, use of fork")  # Python 3.12, of torch's workers


def arguments(name, options):
    """The command line of a script in a test: on the CPU and without worker processes, unless the options differ."""
    device = [] if name == "01_data.py" else ["--device", "cpu"]
    return [str(ROOT / name), "--num-workers", "0", *device, *map(str, options)]


def run_here(name, *options, edits=None):
    """Run a script's body in this process, after a student's edits, {old: new}. Return its variables."""
    text, variables = (ROOT / name).read_text(encoding="utf-8"), {"__name__": "__main__"}
    for old, new in (edits or {}).items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", arguments(name, options))
        exec(compile(text, ROOT / name, "exec"), variables)
    return variables


def message(function, *args, **options):
    """The one line that a user reads on stderr when a function, such as run_here, fails."""
    stderr = io.TextIOWrapper(io.BytesIO(), "ascii", "backslashreplace", write_through=True)
    with contextlib.redirect_stderr(stderr):
        try:
            function(*args, **options)
        except Exception as error:
            report(type(error), error, error.__traceback__)
    line, = filter(str.strip, stderr.buffer.getvalue().decode().splitlines())
    assert line.startswith("error: ") and line.isascii()
    return line


def raise_(error):
    raise error


class Killed(BaseException):
    """As if the process ended here: nothing in the scripts catches it."""


@contextlib.contextmanager
def full_disk(size):
    """The disk is full, as far as this process can tell: no file can grow beyond `size` bytes."""
    resource = pytest.importorskip("resource", reason="this system cannot limit the size of files")
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def make_dataset(folder, train=3, valid=2):
    """A small dataset in the lecture's layout: bright noise for cats, dark noise for dogs. train, valid: how many of
    each class, or (cats, dogs)."""
    rng = np.random.default_rng(0)
    for part, counts in (("train", train), ("valid", valid)):
        cats, dogs = counts if isinstance(counts, tuple) else (counts, counts)
        for name, level, count in (("cat", 150, cats), ("dog", 20, dogs)):
            place = folder / part / f"{name}s"
            place.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(level, level + 90, (240, 260, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{name}.{i}.jpg")
    return folder


def save_weights(home):
    """Write random weights in the place and form of ImageNet's, below a TORCH_HOME. Return the path. As with the real
    ones, the answers differ from image to image: the last layer is steep, around its answer for a grey image."""
    path = home / "hub" / "checkpoints" / "vgg16-397923af.pth"
    path.parent.mkdir(parents=True)
    torch.manual_seed(1)
    model = models.vgg16().eval()
    with torch.no_grad():
        model.classifier[6].weight *= 300
        model.classifier[6].bias -= model(torch.zeros(1, 3, 224, 224))[0]
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=False)  # as the real file
    return path


def json_of(path):
    return json.loads(path.read_text())


def dsets_of(dataset, transform=None):
    """The datasets as load_data makes them."""
    dsets = {x: datasets.ImageFolder(dataset / x, transform or common.imagenet_format) for x in ("train", "valid")}
    for x in dsets:
        dsets[x].sizes = file_sizes(dsets[x])
    return dsets


def record_of(dataset, model=None):
    """What a result is made from, as the scripts write it; without a model, that part of it is made up."""
    if model:
        return make_record(dsets_of(dataset), model, model.classifier[6])
    network = {"printed": "VGG", "outputs": "1 2 3"}
    return {**make_record(dsets_of(dataset)), "network": network, "frozen layers": "f", "precision": "float32"}


def fake_results(folder, dataset, proba_dog, step="04", model=None, **metrics):
    """Results of script 03 or 04, for 05_analysis.py to look at: those of the model, or made-up ones without it."""
    proba = np.array([(1 - p, p) for p in proba_dog], dtype=np.float64)
    if model:
        proba = outputs_of(model, dataset / "valid").exp().double().numpy()
    head = model.classifier[6] if model else nn.Linear(4096, 2)
    classes = np.array(datasets.ImageFolder(dataset / "valid").targets, dtype=np.int64)
    save(folder, {
        f"{step}_head.pt": head.state_dict(), f"{step}_predictions.npy": proba.argmax(axis=1),
        f"{step}_all_proba.npy": proba, f"{step}_all_classes.npy": classes,
        f"{step}_metrics.json": {"made_from": record_of(dataset, model), "pretrained": True, "weights": "imagenet",
                                 "train_accuracy": [0.5, 0.75], "valid_loss": 0.5, "valid_accuracy": 0.625, **metrics}})


def see(folder):
    """The images of a folder, as the network sees them."""
    return datasets.ImageFolder(folder, common.imagenet_format)


@torch.inference_mode()
def outputs_of(model, folder):
    return torch.cat([model(inputs) for inputs, _ in DataLoader(see(folder), batch_size=5)])


@contextlib.contextmanager
def not_painted():
    """The figures that are saved, {file name: Figure}. They are not painted, which would take most of a run's time."""
    figures = {}

    def keep(path, show=False):
        figures[path.name] = plt.gcf()
        plt.close()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "save_figure", keep)
        yield figures


@pytest.fixture
def figures():
    """The figures that a test saves. They are not painted: most tests take this fixture only to be fast."""
    with not_painted() as figures:
        yield figures


@pytest.fixture
def workers(monkeypatch):
    """The number of worker processes that each DataLoader asks for when it begins; none is started."""
    numbers, get_iterator = [], DataLoader._get_iterator

    def without_workers(loader):
        numbers.append(loader.num_workers)
        loader = copy.copy(loader)
        loader.num_workers = 0
        return get_iterator(loader)

    monkeypatch.setattr(DataLoader, "_get_iterator", without_workers)
    return numbers


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves server.content, or the rest of it if a Range is requested. server.mode says what goes wrong."""
    log_message = mock.Mock()

    def do_GET(self):
        mode, asked = self.server.mode, self.headers.get("Range")
        self.server.ranges.append(asked)
        body = self.server.content
        if "login page" in mode:
            body = b"<html>Welcome"
        elif mode == "damaged":
            body = bytes(len(body))
        can_resume = "no ranges" not in mode and "login page" not in mode
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and can_resume else 0
        if mode == "404" or (mode == "416" and asked) or start >= len(body):
            self.send_error(404 if mode == "404" else 416)
            return
        self.send_response(206 if start else 200)
        if mode == "login page without length":
            self.send_header("Content-Type", "text/html")
        else:
            self.send_header("Content-Length", len(body) - start)
        self.end_headers()
        stops_at = (start + len(body)) // 2 if "halfway" in mode else len(body)
        self.wfile.write(body[start:stops_at])
        if mode == "stalls halfway":
            self.rfile.read(1)  # there is none: it waits until the client gives up


@pytest.fixture
def server():
    """A web server on this machine. It notes the ranges that it is asked for."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.handle_error, server.mode, server.ranges = mock.Mock(), "whole", []
        server.url = f"http://127.0.0.1:{server.server_port}/x.tgz"
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def watched(monkeypatch):
    """A function that returns the list of what a module's loops show as progress: (items, total, unit) for each."""
    def watch(module):
        calls = []

        def progress(items, n_items, total, unit="images"):
            calls.append((n_items, total, unit))
            return items

        monkeypatch.setattr(f"{module}.progress", progress)
        return calls
    return watch


@pytest.fixture(autouse=True)
def figures_are_closed():
    yield
    plt.close("all")


@pytest.fixture
def dataset(tmp_path):
    return make_dataset(tmp_path / "data set")  # in a folder with a space


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def options(dataset, out):
    return ["--data-dir", dataset, "--output-dir", out]


@pytest.fixture(scope="session", autouse=True)
def vgg_file():
    """The file of the small VGG16's weights, where the scripts look for ImageNet's."""
    return save_weights(Path(TORCH_HOME.name))


@pytest.fixture
def vgg(vgg_file):
    """The small VGG16 with the weights of vgg_file and a seeded new last layer, in evaluation mode."""
    model = common.load_vgg16("imagenet")
    torch.manual_seed(0)
    return common.freeze_and_replace_head(model).eval()


@pytest.fixture(scope="session")
def lesson(vgg_file, tmp_path_factory):
    """The five scripts on the sample with --show, cell by cell as in a notebook: the folder of results, the headings of
    the cells, what each script printed, its variables, all figures, and those that were shown."""
    folder = tmp_path_factory.mktemp("lesson")
    seen = SimpleNamespace(folder=folder, headings=[], printed={}, names={}, figures={}, shown=[])
    more = {"02_vgg_imagenet.py": ["--zero-shot", "--image", PHOTO, "--image", SECOND_PHOTO],
            "04_precompute.py": ["--epochs", 3], "05_analysis.py": ["--image", PHOTO, SECOND_PHOTO]}
    save_figure, backend = common.save_figure, plt.get_backend()

    def keep(path, show):
        seen.figures[path.name] = plt.gcf()
        save_figure(path, show)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "save_figure", keep)
        patch.setattr(plt, "show", lambda: seen.shown.append(plt.gcf()))
        plt.switch_backend(WITH_WINDOWS)
        for name in SCRIPTS:
            options = ["--sample", "--show", "--output-dir", folder, *more.get(name, [])]
            patch.setattr(sys, "argv", arguments(name, options))
            _, *parts = re.split(r"^# %% (.*)\n", (ROOT / name).read_text(), flags=re.MULTILINE)
            variables = {"__name__": "__main__", "__doc__": None}  # in a notebook, it is not that of the script
            seen.names[name] = variables
            seen.headings += parts[2::2]  # but for the first, before the imports
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                for cell in parts[1::2]:
                    exec(compile(textwrap.dedent(cell), name, "exec"), variables)
            seen.printed[name] = printed.getvalue()
        plt.switch_backend(backend)
    return seen
