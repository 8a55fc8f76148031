"""What the tests share: the scripts as processes and as modules, small datasets, a small VGG16 and its weights."""
import contextlib
import importlib
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SMALL = ROOT / "tests" / "small_vgg"
sys.path[:0] = [str(ROOT), str(SMALL)]
os.environ["MPLBACKEND"] = "Agg"
# No test may reach the network: what tries meets a closed port of this machine.
os.environ.update(dict.fromkeys(["http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"], "http://127.0.0.1:9"),
                  no_proxy="127.0.0.1", PYTHONPATH=str(SMALL))

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import models

import common
import small_vgg

torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.5  # seconds, not 5, until a worker that failed is given up


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: needs the real VGG16 (553 MB); leave out with -m 'not slow'")


def script(name):
    """A script as a module: its functions, without running its body."""
    return importlib.import_module(name)


def run(name, *options, status=0, **kwargs):
    """Run a script as a user would; returns what it printed. With status 1, checks for one line and no more."""
    command = [sys.executable, str(ROOT / name), *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, **kwargs)
    assert done.returncode == status, done.stdout[-2000:] + done.stderr[-4000:]
    if status == 1:
        assert_one_line(done.stderr)
    return done


def run_here(name, *options):
    """Run a script's body in this process, which saves the seconds of importing torch; returns its variables."""
    path, argv = ROOT / name, sys.argv
    variables = {"__name__": "__main__", "__doc__": script(path.stem).__doc__}
    sys.argv = [str(path), *map(str, options)]
    try:
        exec(compile(path.read_text(), path, "exec"), variables)
    finally:
        sys.argv = argv
    return variables


def message(name, *options, one_line=True):
    """What a user reads on stderr when a script, or a function, fails: as `run` with status 1, but in this process."""
    stderr = io.TextIOWrapper(io.BytesIO(), "ascii", "backslashreplace", write_through=True)
    with contextlib.redirect_stderr(stderr):
        try:
            name(*options) if callable(name) else run_here(name, *options)
        except Exception as error:
            common.report(type(error), error, error.__traceback__)
    text = stderr.buffer.getvalue().decode()
    if one_line:
        assert_one_line(text)
    return text


def assert_one_line(stderr):
    assert "Traceback" not in stderr
    lines = [line for line in stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), stderr
    assert lines[0].isascii()


@contextlib.contextmanager
def full_disk(size):
    """The disk is full, as far as this process can tell: no file can grow beyond `size` bytes."""
    resource = pytest.importorskip("resource", reason="this system can't limit the size of a process's files")
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def make_dataset(folder, train=3, valid=2, test1=0):
    """A small dataset in the lecture's layout: bright noise for cats, dark noise for dogs."""
    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("valid", valid)):
        for name, level in (("cat", 150), ("dog", 20)):
            place = folder / part / f"{name}s"
            place.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(level, level + 90, (240, 260, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{name}.{i}.jpg")
    for i in range(1, test1 + 1):
        (folder / "test1").mkdir(exist_ok=True)
        shutil.copy(folder / "valid" / "cats" / "cat.0.jpg", folder / "test1" / f"{i}.jpg")
    return folder


def save_weights(home, seed=1):
    """Seeded random numbers in the place and the form of VGG16's ImageNet weights below a TORCH_HOME; their path."""
    path = home / "hub" / "checkpoints" / "vgg16-397923af.pth"
    path.parent.mkdir(parents=True)
    torch.manual_seed(seed)
    torch.save(models.vgg16().state_dict(), path, _use_new_zipfile_serialization=False)  # as the real file
    return path


@pytest.fixture
def dataset(tmp_path):
    return make_dataset(tmp_path / "data set")  # in a folder with a space


@pytest.fixture(scope="session")
def torch_home(tmp_path_factory):
    """A TORCH_HOME with weights for the small VGG16, in force for the whole session."""
    home = tmp_path_factory.mktemp("torch")
    save_weights(home)
    os.environ["TORCH_HOME"] = str(home)
    return home


@pytest.fixture(scope="session")
def vgg_file(torch_home):
    return torch_home / "hub" / "checkpoints" / "vgg16-397923af.pth"


@pytest.fixture
def vgg(vgg_file):
    """The small VGG16 with the weights in torch_home and a seeded new last layer, in eval mode."""
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
def outputs(torch_home, tmp_path_factory):
    """The five scripts, run in their order on the bundled sample: the folder of results, and what each printed."""
    folder, printed = tmp_path_factory.mktemp("outputs"), {}
    photo = ROOT / "sample" / "valid" / "dogs" / "dog.8.jpg"
    options = {"01_data.py": [], "02_vgg_imagenet.py": ["--zero-shot", "--image", photo], "03_finetune_head.py": [],
               "04_precompute.py": ["--epochs", 3], "05_analysis.py": ["--image", photo]}
    for name, more in options.items():
        stdout = io.StringIO()
        with contextlib.redirect_stdout(stdout):
            run_here(name, "--sample", "--output-dir", folder, *more)
        printed[name] = stdout.getvalue()
    return folder, printed
