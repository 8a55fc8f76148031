"""support.py: errors in one line, options, progress, images, complete files, records."""
import errno
import hashlib
import io
import os
import pickle
import re
import runpy
import shutil
import struct
import sys
import warnings
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import PHOTO, ROOT, Killed, dsets_of, full_disk, message, raise_, run_here
from PIL import Image, ImageOps
from torch import nn
from torchvision import transforms

import common
import support
from support import UserError

MEMORY = "out of memory: close other programs, or add --num-workers 0, or add --device cpu"


@pytest.mark.parametrize("error, line", [
    (UserError("Caught UserError in worker 0.\nTraceback:\nsupport.UserError: a.jpg: bad:\nfix"), "a.jpg: bad: fix"),
    (OSError(errno.EMFILE, "Too many", "x"), "x: Too many: close other programs, or add --num-workers 0"),
    (OSError(errno.ENOSPC, "No space"), "a file: No space: free some space, or choose another folder"),
    (OSError("strange"), "a file: strange: fix this, or choose another folder"),
    (OSError(errno.EACCES, "no", "x"), "x: no: .* close it if it is open in another Python or notebook, or choose .*"),
    (RuntimeError("unable to allocate shared memory(shm)"), "too little shared memory .*: add --num-workers 0"),
    (RuntimeError("DataLoader worker (pid 1) is killed"), "a worker process died .*: add --num-workers 0"),
    (BrokenPipeError(errno.EPIPE, "Broken pipe"), "a worker process died .*: add --num-workers 0"),
    (RuntimeError("CUDA out of memory"), MEMORY), (MemoryError("Unable to allocate 9 GiB"), MEMORY),
    (RuntimeError("not enough memory"), MEMORY), (RuntimeError("Cannot allocate memory"), MEMORY),
    (RuntimeError("Invalid buffer size: 9 GB"), MEMORY)])
def test_an_error_is_one_line_with_advice_that_the_script_can_follow(monkeypatch, error, line):
    """02 and 05 have no --batch-size, so they must not recommend it."""
    monkeypatch.setattr(support, "script_options", {"--num-workers", "--device"})
    assert re.fullmatch(f"error: {line}", message(raise_, error))
    monkeypatch.setattr(support, "script_options", {"--batch-size"})
    assert ("or try a smaller --batch-size" in message(raise_, error)) == (line == MEMORY)


def test_the_end_of_a_script_depends_on_its_reason(monkeypatch, capsys):
    """Ctrl-C is not an error, a bug keeps its traceback, and at the prompt of python -i nothing is hidden or ended."""
    def printed(error):
        support.report(type(error), error, None)
        return capsys.readouterr().err

    assert printed(ValueError("a bug")) == "ValueError: a bug\n"
    with pytest.raises(SystemExit, match="130"):
        printed(KeyboardInterrupt())
    assert capsys.readouterr().err == "\nstopped by Ctrl-C\n"
    monkeypatch.setattr(sys, "flags", SimpleNamespace(interactive=1))
    assert printed(KeyboardInterrupt()) == "\nstopped by Ctrl-C\n"
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    assert printed(UserError("typed")) + printed(KeyboardInterrupt()) == "support.UserError: typed\nKeyboardInterrupt\n"
    assert UserError("a.jpg: bad")._render_traceback_() == ["error: a.jpg: bad"]  # IPython prints this


def test_huge_images_and_old_pythons_end_in_one_line(monkeypatch, tmp_path):
    """Instead of gigabytes of memory, or an error after the training. Pytest resets the filters for warnings."""
    Image.new("1", (12_000, 12_000)).save(tmp_path / "huge.png")
    monkeypatch.setattr(sys, "excepthook", None)
    with warnings.catch_warnings():
        fresh = runpy.run_path(str(ROOT / "support.py"))
        with pytest.raises(fresh["UserError"], match=r"huge.png: cannot be read .*DecompressionBombWarning"):
            fresh["load_image"](tmp_path / "huge.png")
        assert sys.excepthook is fresh["report"]
        monkeypatch.setattr(sys, "version_info", (3, 9, 1))
        with pytest.raises(SystemExit, match=r"error: Python 3\.10 or newer is needed; this is "):
            runpy.run_path(str(ROOT / "support.py"))


COMMON = [("--seed", 0, 2**63 - 1, -1), ("--num-workers", 0, 256, -1), ("--limit", 2, 10**6, 1)]
TRAINING = [("--epochs", 1, 10**6, 0), ("--batch-size", 1, 10**6, 0),
            ("--lr", 0.0, 1000.0, -1e-9), ("--lr", 0.0, 1.0, "nan")]


@pytest.mark.parametrize("name, ranges", [
    ("01_data.py", COMMON), ("02_vgg_imagenet.py", COMMON), ("03_finetune_head.py", COMMON + TRAINING),
    ("04_precompute.py", COMMON + TRAINING), ("05_analysis.py", [*COMMON, ("--n-view", 1, 100, 0)])])
def test_numbers_out_of_range_and_contradictions_are_wrong_options(monkeypatch, capsys, name, ranges):
    """Better no run than one that divides by 0 or waits for 10,000 processes."""
    monkeypatch.setattr(support, "start_run", lambda parser: raise_(Killed(parser)))
    with pytest.raises(Killed) as stopped:
        run_here(name)
    parser, = stopped.value.args
    wrong = [(["--sample", "--limit", "10"], "not allowed with argument")]
    for option, least, most, below in ranges:
        values = [vars(parser.parse_args([f"{option}={x}"]))[option[2:].replace("-", "_")] for x in (least, most)]
        assert values == [least, most] and type(values[0]) is type(least)
        wrong += [([f"{option}={x}"], f"argument {option}: {x} is not from ") for x in (below, 10**19)]
        wrong += [([f"{option}=x"], f"argument {option}: invalid {type(least).__name__} value: 'x'")]
    for command_line, problem in wrong:
        with pytest.raises(SystemExit, match="2"):
            parser.parse_args(command_line)
        assert problem in capsys.readouterr().err


@pytest.fixture
def start(monkeypatch, tmp_path):
    """A function that starts a run as the scripts do, with tmp_path as the folder of the scripts and of the user."""
    def start(*options, program="03_finetune_head.py", network=True):
        monkeypatch.setattr(sys, "argv", [program, *map(str, options)])
        return support.start_run(support.option_parser("doc", network))

    (tmp_path / "03_finetune_head.py").touch()
    monkeypatch.setattr(support, "HERE", tmp_path)
    monkeypatch.setattr(support, "script_options", set())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    with plt.rc_context():
        yield start


@pytest.mark.parametrize("options, out, data_dir", [
    ([], "outputs/full", "data/dogscats"), (["--limit", 100], "outputs/limit-100", "data/dogscats"),
    (["--sample"], "outputs/sample", "sample"), (["--sample"], "outputs/sample", "data/dogscats/sample"),
    (["--data-dir=~/dogs", "--output-dir", "a/../b", "--weights", "my.pth"], "b", "dogs"),
    *[(["--data-dir=~nobody-here"], "outputs/full", "~nobody-here")] * (os.name != "nt")])  # as a shell leaves it
def test_folders_are_absolute_and_the_options_are_printed(start, tmp_path, capsys, options, out, data_dir):
    """The next script must find the results, wherever it is started; ~ is the home folder, not a folder's name."""
    (tmp_path / data_dir).mkdir(parents=True)
    args = start(*options, network=bool(options))
    assert (args.output_dir, args.data_dir, args.show) == (tmp_path / out, tmp_path / data_dir, False)
    assert args.output_dir.is_dir() and capsys.readouterr().out == ""
    assert "--num-workers" in support.script_options and ("--device" in support.script_options) == bool(options)
    assert not options or args.weights == (str(tmp_path / "my.pth") if "my.pth" in options else "imagenet")
    args.image = []
    support.print_options(args)
    given = [f"{name}={value}" for name, value in vars(args).items() if str(value) not in ("None", "[]", "False")]
    assert capsys.readouterr().out == f"options: {' '.join(given)}\n" and "seed=0" in given
    args.image = [tmp_path / "a.jpg"]
    support.print_options(args)
    assert "Path(" not in capsys.readouterr().out  # a path as the user knows it


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


INLINE = "module://matplotlib_inline.backend_inline"


@pytest.mark.parametrize("options, session, before, after, shows", [
    ([], "", "qtagg", "Agg", False), (["--show"], "", "qtagg", "qtagg", True), (["--show"], "", "agg", "agg", False),
    (["--show"], "", INLINE, "Agg", False), (["--show"], "", "broken", "Agg", False), ([], "a", INLINE, INLINE, True),
    ([], "a", "qtagg", "qtagg", False), (["--show"], "a", "qtagg", "qtagg", True)])
def test_figures_open_if_they_can(start, monkeypatch, capsys, options, session, before, after, shows):
    """Without a display, they are only saved; in a notebook, %run shows them with the user's own settings."""
    backends = [before]
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: session))
    monkeypatch.setattr(plt, "get_backend", lambda: backends[-1])
    monkeypatch.setattr(plt, "switch_backend", lambda name: raise_(ImportError()) if name == "broken" else
                        backends.append(name))
    plt.rcParams.update({"image.origin": "lower", "text.usetex": True})  # as from a matplotlibrc
    assert start(*options).show == shows and backends[-1] == after
    settings = plt.rcParams["image.origin"], plt.rcParams["text.usetex"]
    assert settings == (("lower", True) if session else ("upper", False))
    assert ("there is no display here" in capsys.readouterr().out) == (bool(options) and not shows)


@pytest.mark.parametrize("seconds, pause, on_terminal, waits", [
    (1175, True, True, 1), (1175, True, False, 0), (1175, False, True, 0), (0, True, True, 0), (1175, True, None, 0)])
def test_a_heading_waits_for_enter_if_it_has_a_time(monkeypatch, capsys, seconds, pause, on_terminal, waits):
    """--pause lets a student watch a section of the video; without a terminal, nothing may wait."""
    read, stdin = [], SimpleNamespace(isatty=lambda: on_terminal, readline=lambda: read.append("Enter"))
    monkeypatch.setattr(sys, "stdin", None if on_terminal is None else stdin)
    support.banner("a heading", seconds, pause)
    link = ["  video from 0:19:35, https://youtu.be/ZhC-DIrCe6A?t=1175"] * bool(seconds)
    assert capsys.readouterr().out.splitlines() == ["", ("=" if seconds else "-") * 80, "a heading", *link,
                                                    *["press Enter to continue "] * waits] and len(read) == waits


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


@pytest.mark.parametrize("name, image", [
    *[(f"colour.{name}", RGB) for name in ["jpg", "JPG", "png", "bmp", "gif", "tif", "ppm", "mpo"]], ("l.jpg", L),
    ("cmyk.jpg", RGB.convert("CMYK")), ("rgba.png", RGB.convert("RGBA")), ("palette.png", RGB.quantize(256)),
    ("la.png", L.convert("LA")), ("deep.png", DEEP), ("deep.tif", DEEP), ("1.png", L.convert("1", dither=0))])
def test_photos_in_every_usual_form_keep_their_colours(tmp_path, name, image):
    """A student's photos come from phones, scanners and screens."""
    image.save(tmp_path / name)
    expected = np.asarray(RGB) if image.mode in ("RGB", "CMYK", "RGBA", "P") else np.stack([GREY] * 3, axis=2)
    expected = expected // 128 * 255 if image.mode == "1" else expected
    loaded = support.load_image(tmp_path / name)
    assert loaded.mode == "RGB" and np.abs(np.asarray(loaded).astype(int) - expected).mean() < 8


@pytest.mark.parametrize("name, content", [
    ("empty.jpg", b""), ("text.jpg", b"no image"), ("._cat.0.jpg", b"\0\5\x16\7\0"), ("bad\udcff\nname.jpg", b""),
    ("half.png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"), ("float.tif", Image.fromarray(GREY.astype(np.float32))),
    ("int.tif", Image.fromarray(GREY.astype(np.int32))), ("missing.jpg", None)], ids=ascii)
def test_a_file_that_is_not_a_usable_image_is_named(tmp_path, name, content):
    """Never a black image in its place, and never a page of traceback."""
    try:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else b"")
    except OSError:
        pytest.skip("this file system does not allow such names")
    (tmp_path / name).unlink() if content is None else None
    content.save(tmp_path / name) if isinstance(content, Image.Image) else None
    advice = "check the name" if content is None else "replace it (by a JPEG, for example) or remove it"
    assert re.fullmatch(f"error: {re.escape(str(tmp_path / name[:3]))}.*: cannot be read as an image [(].*[)]: "
                        f"{re.escape(advice)}", message(support.load_image, tmp_path / name))


def test_a_photo_is_rotated_as_the_camera_was_held_but_the_dataset_is_not(tmp_path, monkeypatch):
    """The lecture's images are not rotated; a photo with damaged EXIF data is named before any work."""
    exif = Image.Exif()
    exif[0x0112] = 6
    RGB.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(support.load_image(tmp_path / "a.png"), RGB)
    rotated = support.load_image(tmp_path / "a.png", rotate=True)
    assert np.array_equal(rotated, RGB.transpose(Image.Transpose.ROTATE_270))
    options = ["--data-dir", tmp_path / "none", "--output-dir", tmp_path, "--image", PHOTO]
    for name, error in [("02_vgg_imagenet.py", struct.error()), ("05_analysis.py", TypeError())]:
        monkeypatch.setattr(ImageOps, "exif_transpose", lambda image, error=error: raise_(error))
        assert f"error: {PHOTO}: cannot be read as an image" in message(name, *options)


@pytest.mark.parametrize("change, problem", [
    (lambda train: shutil.rmtree(train), " is missing: run python 01_data.py first, or use --sample"),
    (lambda train: (train / ".ipynb_checkpoints").mkdir(), ": must contain images in the folders ['cats', "),
    (lambda train: shutil.rmtree(train / "cats"), ": must contain images in the folders"),
    (lambda train: [path.rename(path.with_suffix(".txt")) for path in train.glob("dogs/*")], ": must contain images"),
    (lambda train: (train / "cats" / "@eaDir").mkdir(), f"{os.sep}cats{os.sep}@eaDir: a folder or a broken link"),
    (lambda train: (train / "cats" / "x.jpg").symlink_to("no"), f"{os.sep}cats{os.sep}x.jpg: a folder or a broken ")])
def test_a_dataset_with_unexpected_or_missing_folders_is_refused(dataset, change, problem):
    """ImageFolder would shift the labels, train on thumbnails, or stop at a broken link in the middle."""
    train = dataset / "train"
    (train / "notes.txt").touch()
    if os.name != "nt":  # not every user of Windows can make links
        (train / "dogs" / "link.jpg").symlink_to("dog.0.jpg")
    assert support.check_folder(train, ["cats", "dogs"]) is None
    change(train)
    assert message(support.check_folder, train, ["cats", "dogs"]).startswith(f"error: {train}{problem}")


class Payload:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return open, self.call


@pytest.mark.parametrize("name", ["zipped.pt", "legacy.pt", "pickle.pt", "x.npy", "pickle.npy", "x.json", "list.json"])
def test_a_file_that_runs_code_or_is_not_a_result_is_refused(tmp_path, name):
    """A file from the internet must never run code when it is loaded."""
    mark, path = tmp_path / "mark", tmp_path / name
    payload = Payload(str(mark), "w")
    path.write_bytes(b"[1, 2]" if name == "list.json" else pickle.dumps(payload, protocol=2))
    if name in ("zipped.pt", "legacy.pt"):
        torch.save({"weight": payload}, path, _use_new_zipfile_serialization=name == "zipped.pt")
    elif name == "x.npy":
        np.save(path, np.array([payload], dtype=object), allow_pickle=True)
    assert re.fullmatch(f"error: {re.escape(str(path))}: missing, damaged or unsafe .*: run that",
                        message(support.load, path, "run that")) and not mark.exists()


def results(value):
    return {"a.npy": np.full(3000, value), "b.pt": {"x": torch.full((8000,), value)}, "c.txt": "x\n",
            "m.json": {"m": value}}


def test_results_are_complete_files_of_which_the_last_is_written_last(tmp_path, monkeypatch, capsys):
    """Whenever a run is killed or the power fails, metrics never stand beside results that are not theirs."""
    folder, calls, fsync, replace = tmp_path / "new", [], os.fsync, os.replace
    support.save(folder, results(1.0))
    assert capsys.readouterr().out == "\n  ".join(["saved", *(str(folder / name) for name in results(1))]) + "\n"
    array, state, metrics = (support.load(folder / name, "") for name in ["a.npy", "b.pt", "m.json"])
    assert np.array_equal(array, np.ones(3000)) and torch.equal(state["x"], torch.ones(8000)) and metrics == {"m": 1}
    assert not isinstance(array, np.memmap) and (folder / "c.txt").read_bytes() == b"x\n"
    monkeypatch.setattr(support, "MIB", 0)  # a large array stays in its file; what is changed in it does not
    array = support.load(folder / "a.npy", "")
    array[0] = 2
    assert isinstance(array, np.memmap) and np.array_equal(np.load(folder / "a.npy"), np.ones(3000))
    del array

    def rename(source, target):
        calls.append(f"{os.path.basename(target)}, {(folder / 'm.json').exists()}")
        return replace(source, target) if len(calls) < 7 else raise_(Killed)

    monkeypatch.setattr(os, "fsync", lambda file: calls.append("fsync") or fsync(file))
    monkeypatch.setattr(os, "replace", rename)
    with pytest.raises(Killed):
        support.save(folder, results(2.0))
    assert calls == [*["fsync"] * 4, "a.npy, False", "b.pt, False", "c.txt, False"]
    assert sorted(os.listdir(folder)) == ["a.npy", "b.pt", "c.txt"]


@pytest.mark.parametrize("size, name", [(5, "a.npy"), (1000, "a.npy"), (24_200, "b.pt")])
def test_on_a_full_disk_the_old_results_stay(tmp_path, size, name):
    """All of a set or none of it is replaced, and nothing else is left in the folder."""
    support.save(tmp_path, results(1.0))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with full_disk(size):
        assert f"error: {tmp_path / name}: cannot be written (" in message(support.save, tmp_path, results(2.0))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("refusals", [0, 6, 7])
def test_a_file_that_is_open_elsewhere_is_replaced_a_little_later(tmp_path, monkeypatch, refusals):
    """On Windows, a virus scanner has new files open for a moment, and a notebook for longer."""
    waits, busy, replace = [], iter([PermissionError(errno.EACCES, "Access is denied")] * refusals), os.replace
    monkeypatch.setattr(support.time, "sleep", waits.append)
    monkeypatch.setattr(os, "replace", lambda *names: raise_(error) if (error := next(busy, None)) else replace(*names))
    if refusals < 7:
        support.save(tmp_path, {"m.txt": "m"})
        assert sum(waits) == refusals / 2
    else:
        assert "open in another Python or notebook" in message(support.save, tmp_path, {"m.txt": "m"})
    assert os.listdir(tmp_path) == ["m.txt"] * (refusals < 7)


@pytest.mark.parametrize("change", ["size", "name", "time and place"])
def test_a_record_depends_on_names_and_sizes_of_images_and_the_transform(dataset, tmp_path, change):
    """Images that are copied, or unpacked again, are the same images; any other change must be noticed."""
    before = now = support.make_record(dsets_of(dataset))
    files = [(f"{path.parent.name}/{path.name}", path.stat().st_size) for path in sorted(dataset.glob("train/*/*"))]
    assert before["train images"] == hashlib.sha256(str(files).encode()).hexdigest()  # the same on Windows
    for path in sorted(dataset.rglob("*.jpg")):
        path.write_bytes(path.read_bytes() + b"0" * (change == "size"))
        os.utime(path, (0, 0))
        path.rename(path.with_stem(path.stem + "_" * (change == "name")))
        then, now = now, support.make_record(dsets_of(dataset))
        assert support.differences(then, now) == f"{path.parent.parent.name} images" * (change in ("size", "name"))
    assert support.make_record(dsets_of(dataset.rename(tmp_path / "moved"))) == now
    other = support.make_record(dsets_of(tmp_path / "moved", transforms.ToTensor()))
    assert support.differences(now, other) == "transform"


def test_a_record_depends_on_the_frozen_layers_and_the_precision(vgg, dataset):
    """Not on the last layer, which is trained, nor on the order of the parameters in memory, nor on the device."""
    dsets = dsets_of(dataset)
    vgg.features.append(nn.BatchNorm2d(512))  # as a student might; it has a number without dimensions
    record = support.make_record(dsets, vgg)
    for name, value in vgg.state_dict().items():
        original = value.clone()
        value.view(-1)[-1] += 1
        changed = support.differences(record, support.make_record(dsets, vgg))
        assert changed == ("" if name.startswith("classifier.6.") else "frozen layers"), name
        value.copy_(original)
    on_gpu = {name: SimpleNamespace(cpu=value.clone, dtype=value.dtype) for name, value in vgg.state_dict().items()}
    assert support.make_record(dsets, SimpleNamespace(state_dict=lambda: on_gpu)) == record
    assert support.make_record(dsets, vgg.to(memory_format=torch.channels_last)) == record
    now = support.make_record(dsets, common.to_device(vgg, torch.device("cpu"), bf16=True))
    assert support.differences(record, now) == "frozen layers and precision"
    assert (record["precision"], now["precision"]) == ("float32", "bfloat16")  # as 05 compares it
