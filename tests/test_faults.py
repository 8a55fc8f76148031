"""Clusters, companion files, links: faults of other people's disks, networks and systems, each brought about here. What
they share: a student can follow the advice once, and the next run works. Those of downloads are in test_download.py."""
import errno
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import PHOTO, ROOT, SAMPLE, message, posix, raise_

import common
from support.dataset import get_dataset
from support.errors import one_line
from support.files import absolute_path, load, save, temporary_folder
from support.images import check_folders, check_images, dataset_near, load_image
from support.options import option_parser
from support.run import set_up_figures, start_run, try_workers

MEMORY, DISK = "close other programs, or add --num-workers 0", "check the disk or the network drive, and run this"
PERMISSION = "check its permissions, close it if it is open in another Python or notebook, or choose another folder"


def system_error(code):
    return OSError(code, os.strerror(code))


def long_temporary_folder(monkeypatch, tmp_path):
    folder = tmp_path / ("x" * 90)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setitem(multiprocessing.current_process()._config, "tempdir", None)  # made anew


def no_semaphores(monkeypatch, tmp_path):
    monkeypatch.setattr("multiprocessing.synchronize.SemLock.__init__",
                        lambda *args, **options: raise_(system_error(errno.ENOENT)))


@pytest.fixture(params=[pytest.param(long_temporary_folder, marks=posix), no_semaphores])
def no_workers(request, monkeypatch, tmp_path):
    """A system on which worker processes cannot run."""
    request.param(monkeypatch, tmp_path)


def test_workers_that_cannot_run_are_noticed_at_the_start(no_workers):
    """On a cluster with a long TMPDIR, the run would hang without a word."""
    assert "use --num-workers 0, or set TMPDIR to a short path" in message(try_workers, Namespace(num_workers=2))


def test_a_run_goes_on_without_workers_unless_it_must_have_them(no_workers, capsys):
    """A student who did not ask for workers does not need them."""
    args = Namespace(num_workers=None)
    try_workers(args)
    assert args.num_workers == 0 and capsys.readouterr().out.startswith("NOTICE: worker processes cannot be used here")


@pytest.mark.parametrize("error, advice", [
    (RuntimeError("can't start new thread"), MEMORY), (system_error(errno.EAGAIN), MEMORY),
    (system_error(errno.ENOMEM), "add --num-workers 0"), (MemoryError(), "add --num-workers 0")], ids=repr)
def test_a_refused_process_or_thread_is_one_line(error, advice):
    """A login node allows few processes. Python's own message does not say what to do."""
    assert advice in one_line(error)


def test_images_are_checked_without_threads_if_none_is_allowed(dataset, monkeypatch):
    """01 has no option for this: it must continue by itself."""
    monkeypatch.setattr("threading.Thread.start", lambda thread: raise_(RuntimeError("can't start new thread")))
    check_images(dataset, remember=True)
    assert (dataset / ".images-checked").exists()


def test_companion_files_of_macos_are_not_images(tmp_path, monkeypatch):
    """On an exFAT disk, macOS adds ._0.jpg to 0.jpg: a good archive would be "damaged: delete it"."""
    copyfile = shutil.copyfile

    def copy_with_companion(source, target):
        copyfile(source, target)
        target.with_name(f"._{target.name}").write_bytes(b"")

    for name in ["cat.0", "cat.1", "dog.0", "dog.1"]:
        (tmp_path / "train").mkdir(exist_ok=True)
        shutil.copy(PHOTO, tmp_path / "train" / f"{name}.jpg")
    monkeypatch.setattr("shutil.copyfile", copy_with_companion)
    get_dataset(tmp_path / "dogscats", tmp_path)
    assert len(list((tmp_path / "dogscats" / "train").rglob("*.jpg"))) == 2


@posix
@pytest.mark.parametrize("link", ["data", "data/dogscats"])
def test_links_are_followed_before_any_work(tmp_path, link):
    """A student's data is on another disk; if that is not connected, nothing may be downloaded to this one."""
    (tmp_path / link).parent.mkdir(exist_ok=True)
    (tmp_path / link).symlink_to(tmp_path / "disk")
    assert message(absolute_path, tmp_path / "data/dogscats") == (
        f"error: {tmp_path / link} is a link to {tmp_path / 'disk'}, which does not exist: connect that disk, or "
        "create that folder")
    (tmp_path / "disk").mkdir()
    assert absolute_path(tmp_path / link) == tmp_path / "disk"


@pytest.mark.parametrize("call, code", [("fsync", errno.EINVAL), ("fsync", errno.ENOSYS), ("replace", errno.EXDEV)])
def test_a_folder_that_cannot_keep_results_is_refused_at_the_start(options, out, monkeypatch, call, code):
    """Some network drives refuse fsync, others a rename: better now than after an hour of features."""
    monkeypatch.setattr(os, call, lambda *args: raise_(system_error(code)))
    assert f"{out / '.test'}: cannot be written (" in message("04_precompute.py", *options)
    assert os.listdir(out) == []


def test_an_array_is_read_whole_if_it_cannot_be_mapped(tmp_path, monkeypatch):
    """Features on such a disk would be "damaged" after each run."""
    save(tmp_path, {"x.npy": np.arange(3)})
    numpy_load = np.load
    monkeypatch.setattr("support.files.MIB", 0)  # every array counts as large
    monkeypatch.setattr(np, "load", lambda path, mmap_mode=None, **options: (
        raise_(system_error(errno.ENODEV)) if mmap_mode else numpy_load(path, **options)))
    assert load(tmp_path / "x.npy", "").tolist() == [0, 1, 2]


def test_another_users_note_that_images_were_checked_is_no_error(dataset, monkeypatch, capsys):
    """Two students share a dataset."""
    monkeypatch.setattr(Path, "read_bytes", lambda path: raise_(system_error(errno.EACCES)))
    check_images(dataset, remember=True)
    assert "checking that all 10 images can be read" in capsys.readouterr().out


def test_the_clock_that_counts_is_the_disks(tmp_path, monkeypatch):
    """A file server's clock is two hours behind: another run's folder, in use, would look old."""
    mkdtemp, now = tempfile.mkdtemp, 1_000_000_000

    def mkdtemp_on_the_server(**options):
        folder = mkdtemp(**options)
        os.utime(folder, (now, now))
        return folder

    monkeypatch.setattr(tempfile, "mkdtemp", mkdtemp_on_the_server)
    other = temporary_folder(tmp_path)
    temporary_folder(tmp_path)
    assert other.exists()
    now += 3601
    temporary_folder(tmp_path)
    assert not other.exists()


@pytest.mark.parametrize("code, advice", [(errno.EIO, DISK), (errno.ESTALE, DISK), (errno.EACCES, PERMISSION),
                                          (errno.ENOMEM, MEMORY)], ids=errno.errorcode.get)
def test_a_photo_is_not_blamed_for_the_disk(monkeypatch, code, advice):
    """A student must never delete good photos because a network drive failed."""
    monkeypatch.setattr("support.images.Image.open", lambda path: raise_(system_error(code)))
    text = message(load_image, PHOTO)
    assert f"({os.strerror(code)}): {advice}" in text and "replace" not in text and "move" not in text


def test_a_photo_is_not_blamed_for_too_little_memory(monkeypatch):
    """A bare MemoryError has no text at all."""
    monkeypatch.setattr("support.images.Image.open", lambda path: raise_(MemoryError()))
    assert message(load_image, PHOTO).startswith("error: out of memory: close other programs")


@pytest.mark.parametrize("ending", [".HEIC", ".jfif", ""])
def test_endings_that_are_not_used_are_named(dataset, ending):
    """A phone's photos: "contains no images" would be untrue for who sees them."""
    for image in (dataset / "train" / "cats").iterdir():
        image.rename(image.with_name(image.stem.replace(".", "") + ending))
    text = message(check_folders, dataset, ["cats", "dogs"])
    assert f"none of the 3 files is an image (endings found: ['{ending or 'none'}']; used: .jpg, .jpeg" in text


@pytest.mark.parametrize("given, image, source", [
    ("", "train/cat.0.jpg", ""), ("train", "train/cat.0.jpg", ""), ("", "PetImages/Cat/0.jpg", ""),
    ("PetImages", "PetImages/Cat/0.jpg", "PetImages"), ("PetImages/Cat", "PetImages/Cat/0.jpg", "PetImages")])
def test_a_folder_of_kaggles_or_microsofts_photos_is_told_how_to_use_them(tmp_path, given, image, source):
    """Nobody should rename Downloads, or download 839 MB of photos that are already there."""
    (tmp_path / image).parent.mkdir(parents=True)
    (tmp_path / image).touch()
    assert message(get_dataset, tmp_path / given, None) == (
        f"error: --data-dir: {tmp_path / given} is not empty or cannot be replaced: use a new folder, such as "
        f"--data-dir {tmp_path / source / 'dogscats'} --from-kaggle {tmp_path / source}")


def test_an_unreadable_folder_is_no_dataset(tmp_path, monkeypatch):
    """A new volume has a lost+found that belongs to root."""
    (tmp_path / "lost+found").mkdir()
    is_dir = Path.is_dir
    monkeypatch.setattr(Path, "is_dir", lambda path, **options: (
        raise_(system_error(errno.EACCES)) if "lost+found/" in path.as_posix() else is_dir(path, **options)))
    assert dataset_near(tmp_path) is None


@pytest.fixture
def started(monkeypatch, tmp_path):
    """A function that starts a run with this command line."""
    def started(*command_line):
        monkeypatch.setattr(sys, "argv", [*command_line])
        monkeypatch.setattr("support.run.set_up_figures", lambda args: None)
        return start_run(option_parser("03_finetune_head.py", ""))
    return started


def test_a_sample_folder_without_train_is_not_the_sample(started, dataset, out):
    """An interrupted copy: the bundled drawings are used."""
    (dataset / "sample").mkdir()
    assert started("-", "--sample", "--data-dir", str(dataset), "--output-dir", str(out)).data_dir == SAMPLE


def test_results_inside_the_bundled_sample_are_refused(started):
    """The next run would train on figures as cats."""
    folder = SAMPLE / "train" / "cats"
    assert message(started, "-", "--sample", "--output-dir", str(folder)) == (
        f"error: --output-dir: {folder} is inside the dataset: choose a folder outside it")


@pytest.mark.parametrize("program", ["link", "-"])
def test_a_script_keeps_its_options_whatever_it_is_called(started, out, tmp_path, program):
    """Options that are thrown away would start a run that the student did not ask for."""
    if program == "link":
        program = tmp_path / "train"
        program.symlink_to(ROOT / "03_finetune_head.py")
    assert started(program, "--seed", 7, "--output-dir", out).seed == 7  # in a notebook, a number and a Path


def test_a_program_without_a_command_line_is_a_notebook(started, monkeypatch, tmp_path):
    """Python inside another program."""
    monkeypatch.setattr("support.run.HERE", tmp_path)
    assert started().sample


def test_figures_are_saved_with_an_unknown_backend(tmp_path):
    """A line in a teacher's .bashrc, or a typing error. matplotlib cannot be imported then."""
    code = ("import sys, unittest.mock as mock\n"
            "for name in ['torch', 'torchvision', 'torchvision.datasets', 'torchvision.datasets.folder']:\n"
            "    sys.modules[name] = mock.MagicMock()  # which take seconds to import\n"
            "import support.run; print(support.run.plt.get_backend())")
    env = {**os.environ, "MPLBACKEND": "nonsense", "PYTHONPATH": ""}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.stdout == "NOTICE: MPLBACKEND=nonsense is unknown: the figures are only saved\nagg\n"


def test_a_backend_without_windows_cannot_show(monkeypatch, capsys):
    """pgf needs LaTeX: the run would end with a traceback at its first figure."""
    monkeypatch.setattr(plt, "get_backend", lambda backends=iter(["pgf"]): next(backends, "agg"))
    chosen = []
    monkeypatch.setattr(plt, "switch_backend", chosen.append)
    args = Namespace(show=True)
    with plt.rc_context():
        set_up_figures(args)
    assert chosen == ["agg"] and not args.show
    assert capsys.readouterr().out.startswith("--show: figures cannot be opened in windows here")


def test_bf16_does_not_need_a_private_function(monkeypatch, capsys):
    """A later torch may not have it; the notice then comes on every CPU."""
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)
    assert common.get_device("cpu", bf16=True).type == "cpu"
    assert capsys.readouterr().out.startswith("NOTICE: --bf16")


@pytest.fixture
def unreadable_weights(monkeypatch):
    """In a container with another user, the file is there and cannot be opened."""
    monkeypatch.setattr("common.open", lambda *args: raise_(system_error(errno.EACCES)), raising=False)


def test_the_sample_goes_on_without_unreadable_weights(unreadable_weights):
    """The first run of a student must work."""
    assert common.get_weights("imagenet", sample=True) == "untrained"


def test_unreadable_weights_are_no_damaged_weights(unreadable_weights):
    """Deleting 528 MiB would not help."""
    assert message(common.get_weights, "imagenet") == (
        f"error: {common.IMAGENET_FILE}: cannot be read (Permission denied): {PERMISSION}, or use --weights FILE or "
        "--weights untrained")
