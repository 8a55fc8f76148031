"""What the tests share: the scripts as processes and as modules, small datasets, a small VGG16 and its weights."""
import contextlib
import importlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
SMALL = ROOT / "tests" / "small_vgg"
sys.path[:0] = [str(ROOT), str(SMALL)]
os.environ["MPLBACKEND"] = "Agg"
# No test may reach the network: what tries meets a closed port of this machine.
os.environ.update(dict.fromkeys(["http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"], "http://127.0.0.1:9"),
                  no_proxy="127.0.0.1", PYTHONPATH=str(SMALL), TORCH_HOME=tempfile.mkdtemp(prefix="torch"))

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import datasets, models

import common
import small_vgg

torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.5  # seconds, not 5, until a worker that failed is given up


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: needs the real VGG16 (553 MB); leave out with -m 'not slow'")


def pytest_unconfigure(config):
    shutil.rmtree(os.environ["TORCH_HOME"])


script = importlib.import_module  # a script as a module: its functions, without running its body


def run_here(name, *options, edits=None):
    """Run a script's body in this process, which saves the seconds of importing torch, after a student's edits, {old:
    new}; returns its variables. Images are loaded without workers, unless the options say otherwise."""
    path, argv = ROOT / name, sys.argv
    text, variables = path.read_text(), {"__name__": "__main__", "__doc__": script(path.stem).__doc__}
    for old, new in (edits or {}).items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    sys.argv = [str(path), "--num-workers", "0", *map(str, options)]
    try:
        exec(compile(text, path, "exec"), variables)
    finally:
        sys.argv = argv
    return variables


def message(name, *options):
    """What a user reads on stderr when a script, or a function, fails in this process: one line and no more."""
    stderr = io.TextIOWrapper(io.BytesIO(), "ascii", "backslashreplace", write_through=True)
    with contextlib.redirect_stderr(stderr):
        try:
            name(*options) if callable(name) else run_here(name, *options)
        except Exception as error:
            common.report(type(error), error, error.__traceback__)
    return assert_one_line(stderr.buffer.getvalue().decode())


def assert_one_line(stderr):
    line, = filter(str.strip, stderr.splitlines())
    assert line.startswith("error: ") and line.isascii()
    return line


@contextlib.contextmanager
def full_disk(size):
    """The disk is full, as far as this process can tell: no file can grow beyond `size` bytes."""
    resource = pytest.importorskip("resource", reason="this system can't limit the size of a process's files")
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
    """Seeded random numbers in the place and the form of VGG16's ImageNet weights below a TORCH_HOME; their path."""
    path = home / "hub" / "checkpoints" / "vgg16-397923af.pth"
    path.parent.mkdir(parents=True)
    torch.manual_seed(1)
    torch.save(models.vgg16().state_dict(), path, _use_new_zipfile_serialization=False)  # as the real file
    return path


def json_of(path):
    return json.loads(path.read_text())


def record_of(dataset, model=None):
    """What a result is made from, as the scripts write it; without a model, of the least that a record needs of one."""
    dsets = {x: datasets.ImageFolder(dataset / x, common.imagenet_format) for x in ("train", "valid")}
    return common.made_from(common.identify(dsets), model or SimpleNamespace(features=[nn.Conv2d(3, 1, 1)], state_dict=dict))


def fake_results(folder, dataset, proba_dog, step="04", model=None, **metrics):
    """Made-up results of a step, for 05_analysis.py to look at; returns their record."""
    proba, record = np.float32([(1 - p, p) for p in proba_dog]), record_of(dataset, model)
    head = model.classifier[6] if model else nn.Linear(4096, 2)
    common.save(folder, {
        f"{step}_head.pt": head.state_dict(), f"{step}_predictions.npy": proba.argmax(axis=1), f"{step}_all_proba.npy": proba,
        f"{step}_all_classes.npy": np.array(datasets.ImageFolder(dataset / "valid").targets),
        f"{step}_metrics.json": {"made_from": record, "pretrained": True, "weights": "imagenet", "train_accuracy": [0.5, 0.75],
                                 "valid_loss": 0.5, "valid_accuracy": 0.625, **metrics}})
    return record


def analyse(dataset, folder, *options):
    return run_here("05_analysis.py", "--data-dir", dataset, "--output-dir", folder, *options)


def keep_figures(patch):
    """From now on figures are kept as they are, {file name: Figure}, instead of being painted into files."""
    figures, save = {}, common.save  # a figure is saved by itself

    def keep(folder, files):
        figures.update(files) if ".png" in str(files) else save(folder, files)

    patch.setattr(common, "save", keep)
    return figures


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved, to look at what was drawn: painting them takes most of the time of a run on few images."""
    return keep_figures(monkeypatch)


@pytest.fixture
def dataset(tmp_path):
    return make_dataset(tmp_path / "data set")  # in a folder with a space


@pytest.fixture(scope="session", autouse=True)
def vgg_file():
    """The file of the small VGG16's weights, where the scripts look for ImageNet's."""
    return save_weights(Path(os.environ["TORCH_HOME"]))


@pytest.fixture
def vgg(vgg_file):
    """The small VGG16 with the weights of vgg_file and a seeded new last layer, in eval mode."""
    model = common.load_vgg16("imagenet")
    torch.manual_seed(0)
    return common.freeze_and_replace_head(model).eval()


@pytest.fixture(scope="session", autouse=True)
def real_run(request, tmp_path_factory):
    """`python 03_finetune_head.py --sample` with the real VGG16, for the slow tests: it takes longest, so it begins before
    all others and runs beside them. The file of its weights, the folder of its results, and the process."""
    if not any(item.get_closest_marker("slow") for item in request.session.items):
        yield None
        return
    home, folder = tmp_path_factory.mktemp("real"), tmp_path_factory.mktemp("real_outputs")
    with small_vgg.real():
        weights = save_weights(home)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"TORCH_HOME": str(home)}
    command = [sys.executable, ROOT / "03_finetune_head.py", "--sample", "--output-dir", folder]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env) as process:
        yield weights, folder, process
        process.kill()
    shutil.rmtree(home)


@pytest.fixture(scope="session")
def outputs(vgg_file, tmp_path_factory):
    """The five scripts, run in their order on the bundled sample: the folder of results, and what each printed."""
    folder, printed = tmp_path_factory.mktemp("outputs"), {}
    photo = ["--image", ROOT / "sample" / "valid" / "dogs" / "dog.8.jpg"]
    for name, options in {"01_data.py": [], "02_vgg_imagenet.py": ["--zero-shot", *photo], "03_finetune_head.py": [],
                          "04_precompute.py": ["--epochs", 3], "05_analysis.py": photo}.items():
        with contextlib.redirect_stdout(io.StringIO()) as stdout:
            run_here(name, "--sample", "--output-dir", folder, *options)
        printed[name] = stdout.getvalue()
    return folder, printed
