"""support.py: errors in one line, options, progress, images, complete files, records."""
import errno
import hashlib
import io
import os
import re
import runpy
import sys
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import PHOTO, ROOT, Killed, dsets_of, message, raise_, run_here
from PIL import Image
from torchvision import transforms

import support


@pytest.mark.parametrize("error, line", [
    (support.UserError("Caught UserError in worker 0.\nsupport.UserError: a.jpg: bad:\nfix"), "a.jpg: bad: fix"),
    (OSError(errno.EMFILE, "Too many", "x"), "x: Too many: close other programs, or add --num-workers 0"),
    (OSError(errno.ENOSPC, "No space"), "a file: No space: free some space, or choose another folder"),
    (OSError(errno.EACCES, "no", "x"), "x: no: .* close it if it is open in another Python or notebook, or choose .*"),
    (OSError("strange"), "a file: strange: fix this, or choose another folder"),
    (RuntimeError("unable to allocate shared memory(shm)"), "too little shared memory .*: add --num-workers 0"),
    (RuntimeError("DataLoader worker (pid 1) is killed"), "a worker process died .*: add --num-workers 0"),
    (BrokenPipeError(errno.EPIPE, "Broken pipe"), "a worker process died .*: add --num-workers 0"),
    *[(error, "out of memory: close other programs, or add --num-workers 0, or add --device cpu") for error in [
        RuntimeError("CUDA out of memory"), MemoryError("Unable to allocate 9 GiB"), RuntimeError("not enough memory"),
        RuntimeError("Cannot allocate memory"), RuntimeError("Invalid buffer size: 9 GB")]]])
def test_an_error_is_one_line_with_advice_that_the_script_can_follow(monkeypatch, error, line):
    """02 and 05 have no --batch-size, so they must not recommend it."""
    monkeypatch.setattr(support, "script_options", {"--num-workers", "--device"})
    assert re.fullmatch(f"error: {line}", message(raise_, error))
    monkeypatch.setattr(support, "script_options", {"--batch-size"})
    assert ("or try a smaller --batch-size" in message(raise_, error)) == line.startswith("out of memory")


def test_a_bug_keeps_its_traceback_and_an_old_python_is_named(monkeypatch, capsys):
    """What a student cannot fix must not look like an error of the student. IPython prints errors in its own way."""
    support.report(ValueError, ValueError("a bug"), None)
    assert capsys.readouterr().err == "ValueError: a bug\n"
    assert support.UserError("a.jpg: bad")._render_traceback_() == ["error: a.jpg: bad"]
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    with pytest.raises(SystemExit, match=r"error: Python 3\.10 or newer is needed; this is "):
        runpy.run_path(str(ROOT / "support.py"))


COMMON = {"--seed": "0 and 9,223,372,036,854,775,807", "--num-workers": "0 and 256", "--limit": "2 and 1,000,000"}
TRAINING = COMMON | {"--epochs": "1 and 1,000,000", "--batch-size": "1 and 1,000,000", "--lr": "0 and 1,000"}


@pytest.mark.parametrize("name, ranges", [
    ("01_data.py", COMMON), ("02_vgg_imagenet.py", COMMON), ("03_finetune_head.py", TRAINING),
    ("04_precompute.py", TRAINING), ("05_analysis.py", COMMON | {"--n-view": "1 and 100"})])
def test_numbers_out_of_range_and_contradictions_are_wrong_options(capsys, name, ranges):
    """Better no run than one that divides by 0 or waits for 10,000 processes."""
    wrong = {(f"{option}={x}",): f"argument {option}: {x} is not between {limits}\n"
             for option, limits in ranges.items() for x in (-1, 10**19)}
    wrong |= {("--seed=x",): "invalid int value: 'x'", ("--sample", "--limit=10"): "not allowed with argument"}
    for options, problem in wrong.items():
        with pytest.raises(SystemExit, match="2"):
            run_here(name, *options)
        assert problem in capsys.readouterr().err


@pytest.fixture
def start(monkeypatch, tmp_path):
    """A function that starts a run as the scripts do, with tmp_path as the folder of the scripts and of the user."""
    def start(*options, program="03_finetune_head.py"):
        monkeypatch.setattr(sys, "argv", [program, *options])
        return support.start_run(support.option_parser("doc"))

    (tmp_path / "03_finetune_head.py").touch()
    monkeypatch.setattr(support, "HERE", tmp_path)
    monkeypatch.setattr(support, "script_options", set())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("USERPROFILE" if os.name == "nt" else "HOME", str(tmp_path))
    with plt.rc_context():
        yield start


@pytest.mark.parametrize("options, out, data_dir", [
    ([], "outputs/full", "data/dogscats"), (["--limit", "100"], "outputs/limit-100", "data/dogscats"),
    (["--sample"], "outputs/sample", "sample"), (["--sample"], "outputs/sample", "data/dogscats/sample"),
    (["--data-dir=~/dogs", "--output-dir", "a/../b"], "b", "dogs"),
    *[(["--data-dir=~nobody-here"], "outputs/full", "~nobody-here")] * (os.name != "nt")])  # as a shell leaves it
def test_folders_are_absolute(start, tmp_path, options, out, data_dir):
    """The next script must find the results, wherever it is started; ~ is the home folder, not a folder's name."""
    (tmp_path / data_dir).mkdir(parents=True)
    args = start(*options)
    assert (args.output_dir, args.data_dir, args.show) == (tmp_path / out, tmp_path / data_dir, False)
    assert list(args.output_dir.iterdir()) == [] and {"--num-workers", "--device"} < support.script_options


@pytest.mark.parametrize("program", [
    "/x/ipykernel_launcher.py", "/x/colab_kernel_launcher.py", "", "/x/ipykernel/__main__.py", "/x/pydevconsole.py"])
def test_a_notebook_has_a_command_line_of_its_own(start, monkeypatch, tmp_path, program):
    """In Jupyter, Colab, Spyder and PyCharm, cells run on the sample with figures; how to change this is printed."""
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # as in a notebook: not a real file
    plt.switch_backend("svg")
    args = start("-f", "x.json", program=program)
    assert (args.sample, args.show, args.output_dir) == (True, True, tmp_path / "outputs" / "sample")
    assert 'sys.argv = ["03_finetune_head.py", "--limit", "1000", "--show"]' in sys.stdout.getvalue()
    assert not start(program=str(tmp_path / "03_finetune_head.py")).sample  # python, %run and runpy: the script's path


@pytest.mark.parametrize("options, session, before, after, shows", [
    ([], "", "qtagg", "Agg", False), (["--show"], "", "qtagg", "qtagg", True), (["--show"], "", "agg", "agg", False),
    (["--show"], "", "inline", "Agg", False), (["--show"], "", "broken", "Agg", False),
    ([], "a", "qtagg", "qtagg", False), (["--show"], "a", "qtagg", "qtagg", True), ([], "a", "inline", "inline", True)])
def test_figures_open_if_they_can(start, monkeypatch, capsys, options, session, before, after, shows):
    """Without a display, they are only saved; in a notebook, %run shows them with the user's own settings."""
    backends = [before]
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: session))
    monkeypatch.setattr(plt, "get_backend", lambda: backends[-1])
    monkeypatch.setattr(plt, "switch_backend",
                        lambda name: backends.append(name) if name != "broken" else raise_(ImportError()))
    plt.rcParams["image.origin"] = "lower"  # as from a matplotlibrc
    assert start(*options).show == shows and backends[-1] == after
    assert plt.rcParams["image.origin"] == ("lower" if session else "upper")
    assert ("there is no display here" in capsys.readouterr().out) == (bool(options) and not shows)


def test_a_heading_waits_for_enter_if_it_has_a_time(monkeypatch, capsys):
    """--pause lets a student watch a section of the video; without a terminal, nothing may wait."""
    stdin = io.StringIO("\n" * 9)
    monkeypatch.setattr(sys, "stdin", stdin)
    support.banner("a", 1175, pause=True)
    stdin.isatty = lambda: True
    support.banner("b", pause=True)
    support.banner("c", 1175)
    assert stdin.tell() == 0
    support.banner("d", 1175, pause=True)
    texts = [f"\n{'=' * 80}\n{x}\n  video from 0:19:35, https://youtu.be/ZhC-DIrCe6A?t=1175\n" for x in "acd"]
    texts.insert(1, f"\n{'-' * 80}\nb\n")
    assert stdin.tell() == 1 and capsys.readouterr().out == "".join(texts) + "press Enter to continue "


@pytest.mark.parametrize("on_terminal, count, second", [(True, 99, "  2%  5.0 images/s  0:16:20"),
                                                        (False, 17, "  7%  5.0 images/s  0:15:30")])
def test_progress_shows_speed_and_time_left(monkeypatch, on_terminal, count, second):
    """One line on a terminal, a line per minute in a log, and nothing for quick work or when all is done."""
    stderr, ticks = io.StringIO(), iter(range(0, 100_000, 10))  # each of 100 batches of 50 images takes 10 s
    stderr.isatty = lambda: on_terminal
    monkeypatch.setattr(sys, "stderr", stderr)
    assert list(support.progress("abc", 3, 3)) == [*"abc"]
    monkeypatch.setattr(support, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    assert list(support.progress("a", 1, 1)) == ["a"] and stderr.getvalue() == ""
    assert list(support.progress(range(100), 100, 5000)) == [*range(100)]
    lines = stderr.getvalue().split("\r" if on_terminal else "\n")
    assert lines[:2] == [f"{f'  {text} left':<60}" for text in ("  1%  5.0 images/s  0:16:30", second)]
    assert lines[count:] == ([" " * 60, ""] if on_terminal else [""])


GREY = np.tile(np.linspace(0, 255, 100).astype(np.uint8), (90, 1))
RGB = Image.fromarray(np.stack([GREY, GREY[:, ::-1], GREY // 2], axis=2))
L, DEEP = Image.fromarray(GREY), Image.fromarray(GREY.astype(np.uint16) * 257)
UPRIGHT = b"Exif\0\0MM\0*\0\0\0\x08\0\1\x01\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"  # a camera's note: rotate this


@pytest.mark.parametrize("name, image", [
    *[(f"colour.{name}", RGB) for name in ["jpg", "JPG", "png", "bmp", "gif", "tif", "ppm", "mpo"]], ("l.jpg", L),
    ("cmyk.jpg", RGB.convert("CMYK")), ("rgba.png", RGB.convert("RGBA")), ("palette.png", RGB.quantize(256)),
    ("la.png", L.convert("LA")), ("deep.png", DEEP), ("deep.tif", DEEP)])
def test_images_in_every_usual_form_keep_their_colours_and_are_not_rotated(tmp_path, name, image):
    """Photos come from phones, scanners and screens; the lecture does not rotate those of the dataset."""
    image.save(tmp_path / name, **{} if name.endswith("tif") else {"exif": UPRIGHT})
    expected = RGB if image.mode in ("RGB", "CMYK", "RGBA", "P") else L.convert("RGB")
    loaded = support.load_image(tmp_path / name)
    assert loaded.mode == "RGB" and np.abs(np.subtract(loaded, expected, dtype=float)).mean() < 8


@pytest.mark.parametrize("name, content", [
    ("empty.jpg", b""), ("text.jpg", b"no image"), ("._cat.0.jpg", b"\0\5\x16\7\0"), ("exif.png", RGB),
    ("half.png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"), ("float.tif", L.convert("F")), ("int.tif", L.convert("I"))])
def test_a_photo_that_is_not_usable_is_named_before_any_work(tmp_path, name, content):
    """Never a black image in its place, and never a page of traceback."""
    options = ["--data-dir", tmp_path / "none", "--output-dir", tmp_path, "--image", PHOTO, tmp_path / name]
    problem = f"error: {tmp_path / name}: cannot be read as an image ("
    assert message("02_vgg_imagenet.py", *options) == f"{problem}No such file or directory): check the name"
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        content.save(tmp_path / name, **{"exif": b"Exif\0\0nonsense"} if name == "exif.png" else {})
    text = message("05_analysis.py", *options)
    assert text.startswith(problem) and text.endswith("): replace it (with a JPEG, for example) or remove it")


@pytest.mark.parametrize("change, problem", [
    (lambda train: train.rename(train.with_name("x")), " is missing: run python 01_data.py first, or use --sample"),
    (lambda train: (train / ".ipynb_checkpoints").mkdir(), ": must contain images in the folders ['cats', "),
    (lambda train: (train / "cats").rename(train / "x"), ": must contain images in the folders"),
    (lambda train: [path.rename(path.with_suffix(".txt")) for path in train.glob("dogs/*")], ": must contain images"),
    (lambda train: (train / "cats" / "@eaDir").mkdir(), f"{os.sep}cats{os.sep}@eaDir: a folder or a broken link"),
    (lambda train: (train / "cats" / "x.jpg").symlink_to("no"), f"{os.sep}cats{os.sep}x.jpg: a folder or a broken ")])
def test_a_dataset_with_unexpected_or_missing_folders_is_refused(dataset, change, problem):
    """ImageFolder would shift the labels, train on thumbnails, or stop at a broken link in the middle."""
    train = dataset / "train"
    (train / "notes.txt").touch()
    support.check_folder(train, ["cats", "dogs"])
    change(train)
    assert message(support.check_folder, train, ["cats", "dogs"]).startswith(f"error: {train}{problem}")


class Payload:
    def __reduce__(self):
        return open, ("mark", "w")  # when it is unpickled, this makes a file in the current folder


@pytest.mark.parametrize("name", ["zipped.pt", "legacy.pt", "x.npy", "x.json"])
def test_a_file_that_runs_code_or_is_not_a_result_is_refused(tmp_path, monkeypatch, name):
    """A file from the internet must never run code when it is loaded."""
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": Payload()}, name, _use_new_zipfile_serialization=name == "zipped.pt")
    if name == "x.npy":
        np.save(name, np.array([Payload()], dtype=object), allow_pickle=True)
    text = message(support.load, tmp_path / name, "run that")
    assert f"error: {tmp_path / name}: missing, damaged or unsafe (" in text and text.endswith("): run that")
    assert os.listdir() == [name]


def test_results_are_complete_files_of_which_the_last_is_written_last(tmp_path, monkeypatch, capsys):
    """If the disk is full, a run is killed or the power fails, no metrics stand beside results that are not theirs."""
    folder, calls, fsync, replace = tmp_path / "new", [], os.fsync, os.replace
    files = {"a.npy": np.ones(3), "b.pt": {"x": torch.ones(2)}, "c.txt": "x\n", "m.json": {"x": 1}}
    support.save(folder, files)
    assert capsys.readouterr().out == "\n  ".join(["saved", *(str(folder / name) for name in files)]) + "\n"
    monkeypatch.setattr(os, "fsync", lambda file: raise_(OSError(errno.ENOSPC, "No space left on device")))
    assert f"error: {folder / 'a.npy'}: cannot be written (No space left" in message(support.save, folder, files)
    assert sorted(os.listdir(folder)) == sorted(files)

    def rename(source, target):
        calls.append(f"{os.path.basename(target)}, {(folder / 'm.json').exists()}")
        return replace(source, target) if len(calls) < 7 else raise_(Killed)

    monkeypatch.setattr(os, "fsync", lambda file: calls.append("fsync") or fsync(file))
    monkeypatch.setattr(os, "replace", rename)
    with pytest.raises(Killed):
        support.save(folder, files)
    assert calls == [*["fsync"] * 4, "a.npy, False", "b.pt, False", "c.txt, False"]
    assert sorted(os.listdir(folder)) == ["a.npy", "b.pt", "c.txt"]
    assert not isinstance(support.load(folder / "a.npy", ""), np.memmap)  # on Windows, it could not be replaced
    monkeypatch.setattr(support, "MIB", 0)
    assert isinstance(support.load(folder / "a.npy", ""), np.memmap)  # 2.5 GB of features need not fit in memory


def test_a_record_depends_on_names_and_sizes_of_images_and_the_transform(dataset, tmp_path):
    """Images that are copied, or unpacked again, are the same images; any other change must be noticed."""
    before = support.make_record(dsets_of(dataset))
    files = [(f"{path.parent.name}/{path.name}", path.stat().st_size) for path in sorted(dataset.glob("train/*/*"))]
    assert before["training images"] == hashlib.sha256(str(files).encode()).hexdigest()  # the same on Windows
    moved = dataset.rename(tmp_path / "moved")
    (moved / "valid" / "dogs" / "dog.1.jpg").rename(moved / "valid" / "dogs" / "dog.2.jpg")
    now = support.make_record(dsets_of(moved, transforms.ToTensor()))
    assert support.differences(before, now) == "a different transform and different validation images"
