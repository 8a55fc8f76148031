"""What the tests share: the scripts as modules and as processes, small datasets, a small VGG16 and its weights.

The tests run on the CPU wherever they run, because what they compare with was computed there; only
test_accelerator.py uses a GPU, if there is one that works."""
import contextlib
import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
SMALL = ROOT / "tests" / "small_vgg"
sys.path[:0] = [str(ROOT), str(SMALL)]
# No test may reach the network: a request meets a closed port of this machine.
os.environ.update(dict.fromkeys(["http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"], "http://127.0.0.1:9"),
                  no_proxy="127.0.0.1", PYTHONPATH=str(SMALL), TORCH_HOME=tempfile.mkdtemp(prefix="torch"),
                  MPLBACKEND="Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import datasets, models

import common
import small_vgg
import support

torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.5  # seconds, not 5, until a dead worker is noticed

SCRIPTS = ["01_data.py", "02_vgg_imagenet.py", "03_finetune_head.py", "04_precompute.py", "05_analysis.py"]
SAMPLE = ROOT / "sample"
PHOTO = SAMPLE / "valid" / "dogs" / "dog.8.jpg"


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: needs the real VGG16 (553 MB); leave out with -m 'not slow'")


def pytest_unconfigure(config):
    shutil.rmtree(os.environ["TORCH_HOME"])


script = importlib.import_module  # a script as a module: its functions, without running its body


def arguments(name, options):
    """The command line of a script in a test: on the CPU and without worker processes, unless the options differ."""
    device = [] if name == "01_data.py" else ["--device", "cpu"]
    return [str(ROOT / name), "--num-workers", "0", *device, *map(str, options)]


def run_here(name, *options, edits=None):
    """Run a script's body in this process, which saves importing torch, after a student's edits, {old: new}. Return its
    variables."""
    text = (ROOT / name).read_text()
    variables = {"__name__": "__main__", "__doc__": script(Path(name).stem).__doc__}
    for old, new in (edits or {}).items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", arguments(name, options))
        exec(compile(text, ROOT / name, "exec"), variables)
    return variables


def message(name, *options):
    """The one line that a user reads on stderr when a script, or a function, fails in this process."""
    stderr = io.TextIOWrapper(io.BytesIO(), "ascii", "backslashreplace", write_through=True)
    with contextlib.redirect_stderr(stderr):
        try:
            name(*options) if callable(name) else run_here(name, *options)
        except Exception as error:
            support.report(type(error), error, error.__traceback__)
    return assert_one_line(stderr.buffer.getvalue().decode())


def assert_one_line(stderr):
    line, = filter(str.strip, stderr.splitlines())
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
    """A small dataset in the lecture's layout: bright noise for cats, dark noise for dogs."""
    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("valid", valid)):
        for name, level in (("cat", 150), ("dog", 20)):
            place = folder / part / f"{name}s"
            place.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(level, level + 90, (240, 260, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{name}.{i}.jpg")
    return folder


def save_weights(home):
    """Write seeded random numbers, in the place and form of VGG16's ImageNet weights, below a TORCH_HOME. Return the
    path."""
    path = home / "hub" / "checkpoints" / "vgg16-397923af.pth"
    path.parent.mkdir(parents=True)
    torch.manual_seed(1)
    torch.save(models.vgg16().state_dict(), path, _use_new_zipfile_serialization=False)  # as the real file
    return path


def json_of(path):
    return json.loads(path.read_text())


def dsets_of(dataset, transform=None):
    """The datasets as load_data makes them."""
    dsets = {x: datasets.ImageFolder(dataset / x, transform or common.imagenet_format) for x in ("train", "valid")}
    for x in dsets:
        dsets[x].fingerprint = support.fingerprint(dsets[x])
    return dsets


def record_of(dataset, model=None):
    """What a result is made from, as the scripts write it."""
    return support.make_record(dsets_of(dataset), model or nn.Sequential(nn.Conv2d(3, 1, 1), nn.Linear(4096, 2)))


def fake_results(folder, dataset, proba_dog, step="04", model=None, **metrics):
    """Made-up results of script 03 or 04, for 05_analysis.py to look at. Return their record."""
    proba = np.array([(1 - p, p) for p in proba_dog], dtype=np.float64)
    record = record_of(dataset, model)
    head = model.classifier[6] if model else nn.Linear(4096, 2)
    classes = np.array(datasets.ImageFolder(dataset / "valid").targets, dtype=np.int64)
    support.save(folder, {
        f"{step}_head.pt": head.state_dict(), f"{step}_predictions.npy": proba.argmax(axis=1),
        f"{step}_all_proba.npy": proba, f"{step}_all_classes.npy": classes,
        f"{step}_metrics.json": {"made_from": record, "pretrained": True, "weights": "imagenet",
                                 "train_accuracy": [0.5, 0.75], "valid_loss": 0.5, "valid_accuracy": 0.625, **metrics}})
    return record


def analyse(dataset, folder, *options):
    return run_here("05_analysis.py", "--data-dir", dataset, "--output-dir", folder, *options)


def keep_figures(patch):
    """From now on, keep the figures in a dictionary {file name: Figure} instead of painting them into files."""
    figures, save = {}, common.save

    def keep(folder, files):
        figures.update(files) if ".png" in str(files) else save(folder, files)  # a figure is saved by itself

    patch.setattr(common, "save", keep)
    return figures


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved, to look at what was drawn. Painting them would take most of the time of a run."""
    return keep_figures(monkeypatch)


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
    return save_weights(Path(os.environ["TORCH_HOME"]))


@pytest.fixture
def vgg(vgg_file):
    """The small VGG16 with the weights of vgg_file and a seeded new last layer, in evaluation mode."""
    model = common.load_vgg16("imagenet")
    torch.manual_seed(0)
    return common.freeze_and_replace_head(model).eval()


@pytest.fixture(scope="session", autouse=True)
def real_run(request, tmp_path_factory):
    """`python 03_finetune_head.py --sample` with the real VGG16, for the slow test: it takes longest, so it begins before
    all other tests and runs beside them. Weights, folder of results, and process."""
    if not any(item.get_closest_marker("slow") for item in request.session.items):
        yield None
        return
    home, folder = tmp_path_factory.mktemp("real"), tmp_path_factory.mktemp("real_outputs")
    with small_vgg.real():
        weights = save_weights(home)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"TORCH_HOME": str(home)}
    command = [sys.executable, *arguments("03_finetune_head.py", ["--sample", "--output-dir", folder])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env) as process:
        yield SimpleNamespace(weights=weights, folder=folder, process=process)
        process.kill()
    shutil.rmtree(home)


@pytest.fixture(scope="session")
def lesson(vgg_file, tmp_path_factory):
    """The five scripts on the bundled sample with --show --pause, cell by cell as in a notebook: the folder of results
    and, for each script, what it printed and its variables; all figures, those that were shown, the headings."""
    seen = SimpleNamespace(folder=tmp_path_factory.mktemp("lesson"), printed={}, names={}, figures={}, shown=[],
                           banners=[], markers=[])
    more = {"02_vgg_imagenet.py": ["--zero-shot", "--image", PHOTO], "04_precompute.py": ["--epochs", 3],
            "05_analysis.py": ["--image", PHOTO]}
    save, banner, backend = common.save, support.banner, plt.get_backend()

    def keep(folder, files):
        seen.figures |= {name: figure for name, figure in files.items() if name.endswith(".png")}
        save(folder, files)

    def heading(*args):
        seen.banners.append(args)
        banner(*args[:2])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "save", keep)
        patch.setattr(support, "banner", heading)
        patch.setattr(plt, "show", lambda: seen.shown.append(plt.gcf()))
        plt.switch_backend("svg")  # any that is not the one for no display
        for name in SCRIPTS:
            options = ["--sample", "--show", "--pause", "--output-dir", seen.folder, *more.get(name, [])]
            patch.setattr(sys, "argv", arguments(name, options))
            _, *parts = re.split(r"^# %% (.*)\n", (ROOT / name).read_text(), flags=re.MULTILINE)
            seen.names[name] = variables = {"__name__": "__main__", "__doc__": script(Path(name).stem).__doc__}
            seen.markers += parts[2::2]  # but for the first, before the imports
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                for cell in parts[1::2]:
                    exec(compile(textwrap.dedent(cell), name, "exec"), variables)
            seen.printed[name] = printed.getvalue()
        plt.switch_backend(backend)
    return seen
