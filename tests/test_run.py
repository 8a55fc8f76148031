"""support/run.py, options.py and progress.py: how a script starts, its options, headings, and progress."""
import errno
import io
import itertools
import os
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest
from conftest import ROOT, WITH_WINDOWS, message, posix, raise_, run_here

from support.options import option_parser
from support.progress import progress
from support.run import banner, start_run


@pytest.mark.parametrize("name, options, says", [
    ("01_data.py", ["--seed=-1"], "--seed: -1 is not between 0 and 9,223,372,036,854,775,807"),
    ("01_data.py", ["--num-workers=-1"], "--num-workers: -1 is not between 0 and 256"),
    ("01_data.py", ["--limit=1"], "--limit: 1 is not between 2 and 1,000,000"),
    ("01_data.py", ["--limit=2", "--sample"], "--sample: not allowed with argument --limit"),
    ("05_analysis.py", ["--n-view=0"], "--n-view: 0 is not between 1 and 100"),
    *[(name, [option], says) for name in ["03_finetune_head.py", "04_precompute.py"] for option, says in [
        ("--epochs=0", "--epochs: 0 is not between 1 and 1,000,000"),
        ("--batch-size=0", "--batch-size: 0 is not between 1 and 1,000,000"),
        ("--epochs=x", "--epochs: invalid int value: 'x'"), ("--lr=x", "--lr: invalid float value: 'x'"),
        ("--lr=1001", "--lr: 1001 is not between 0 and 1,000")]]])
def test_a_wrong_option_is_named(capsys, name, options, says):
    """Better no run than one that divides by 0 or waits for 10,000 processes."""
    with pytest.raises(SystemExit, match="2"):
        run_here(name, *options)
    assert capsys.readouterr().err.endswith(f"error: argument {says}\n")


@pytest.fixture
def start(monkeypatch, tmp_path):
    """A function that starts a run as the scripts do, with tmp_path as the folder of the scripts and of the user."""
    def start(*options, command_line=("03_finetune_head.py",)):
        monkeypatch.setattr(sys, "argv", [*command_line, *options])
        return start_run(option_parser("03_finetune_head.py", ""))

    (tmp_path / "03_finetune_head.py").touch()
    for module in ["run", "options"]:
        monkeypatch.setattr(f"support.{module}.HERE", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("USERPROFILE" if os.name == "nt" else "HOME", str(tmp_path))
    with plt.rc_context():
        yield start


@pytest.mark.parametrize("options, out, data_dir", [
    ([], "outputs/full", "data/dogscats"), (["--limit", "100"], "outputs/limit-100", "data/dogscats"),
    (["--sample"], "outputs/sample", "sample"), (["--sample"], "outputs/sample", "data/dogscats/sample"),
    (["--data-dir=~/dogs", "--output-dir", "a/../b"], "b", "dogs"),
    pytest.param(["--data-dir=~nobody-here"], "outputs/full", "~nobody-here", marks=posix)])  # as a shell leaves it
def test_folders_are_absolute(start, tmp_path, options, out, data_dir):
    """The next script must find the results, wherever it is started; ~ is the home folder, not a folder's name."""
    (tmp_path / "data" / "dogscats" / "sample").mkdir(parents=True)  # an interrupted copy is not the sample
    for x in ["train", "valid"]:
        (tmp_path / data_dir / x).mkdir(parents=True)
    args = start(*options)
    assert (args.output_dir, args.data_dir) == (tmp_path / out, tmp_path / data_dir)
    assert list(args.output_dir.iterdir()) == []


@pytest.mark.parametrize("folder", ["dogs/out", "sample/train/cats"])
def test_results_inside_a_dataset_are_refused(start, tmp_path, folder):
    """The next run would see figures as images of cats. Also in the bundled sample."""
    for name in ["dogs", "sample"]:
        (tmp_path / name / "train").mkdir(parents=True)
    assert message(start, "--data-dir", "dogs", "--output-dir", folder) == (
        f"error: --output-dir: {tmp_path / folder} is inside the dataset: choose a folder outside it")


def test_weights_may_be_a_file_which_must_exist(start, tmp_path):
    """Noticed before the dataset is read; later scripts, started elsewhere, find it."""
    path = tmp_path / "my.pth"
    assert message(start, "--weights", "my.pth") == f"error: --weights: there is no file {path}: check the name"
    path.touch()
    assert start("--weights", "my.pth").weights == str(path)


@pytest.mark.parametrize("call, code", [
    ("tempfile.mkdtemp", errno.EACCES), ("os.fsync", errno.EINVAL), ("os.replace", errno.EXDEV)])
def test_a_folder_that_cannot_keep_results_is_refused_at_the_start(start, tmp_path, monkeypatch, call, code):
    """Some network drives refuse fsync, others a rename: better now than after an hour of features."""
    monkeypatch.setattr(call, lambda *args, **options: raise_(OSError(code, "refused")))
    line = message(start, "--output-dir", "out")
    assert line.startswith(f"error: {tmp_path / 'out'}") and ": cannot be written (" in line and "refused" in line


@pytest.mark.parametrize("command_line", [
    ["/x/ipykernel_launcher.py", "-f", "x.json"], ["/x/ipykernel/__main__.py", "-f", "x.json"], [""], []])
def test_a_notebook_runs_on_the_sample_and_shows_figures(start, monkeypatch, tmp_path, command_line):
    """Or none, inside another program. Cells run on the sample with figures; how to change this is printed."""
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # as in a notebook: not a real file
    plt.switch_backend(WITH_WINDOWS)
    args = start(command_line=command_line)
    assert (args.sample, args.show, args.output_dir) == (True, True, tmp_path / "outputs" / "sample")
    assert 'sys.argv = ["03_finetune_head.py", "--limit", "1000", "--show"]' in sys.stdout.getvalue()


@pytest.mark.parametrize("program", [
    "03_finetune_head.py", "/x/03_finetune_head.py", "-", pytest.param("bin/train", marks=posix)])
def test_a_script_is_recognized_however_it_is_started(start, tmp_path, program):
    """By python, %run or runpy, from standard input, or through a link: its options are used."""
    if program == "bin/train":
        (tmp_path / "bin").mkdir()
        (tmp_path / program).symlink_to(tmp_path / "03_finetune_head.py")
    assert start("--seed", 7, command_line=[program]).seed == 7  # in a notebook, sys.argv may contain a number


@pytest.mark.parametrize("options, session, before, after, shows", [
    ([], "", "qtagg", "agg", False), (["--show"], "", "qtagg", "qtagg", True), (["--show"], "", "pgf", "agg", False),
    (["--show"], "", "inline", "agg", False), (["--show"], "", "broken", "agg", False),
    ([], "a", "qtagg", "qtagg", False), (["--show"], "a", "qtagg", "qtagg", True), ([], "a", "inline", "inline", True)],
    ids=["not asked", "window", "files only", "inline", "no display", "IPython", "IPython, --show", "notebook"])
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
    notice = "--show: figures cannot be opened in windows here; they are only saved\n"
    assert (notice in capsys.readouterr().out) == (bool(options) and not shows)


def test_figures_are_saved_with_an_unknown_backend():
    """A line in a teacher's .bashrc, or a typing error. matplotlib cannot be imported then."""
    code = ("import sys, unittest.mock as mock\n"
            "for name in ['torch', 'torchvision', 'torchvision.datasets', 'torchvision.datasets.folder']:\n"
            "    sys.modules[name] = mock.MagicMock()  # which take seconds to import\n"
            "import support.run; print(support.run.plt.get_backend())")
    env = {**os.environ, "MPLBACKEND": "nonsense", "PYTHONPATH": ""}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.stdout == "NOTICE: MPLBACKEND=nonsense is unknown: the figures are only saved\nagg\n"


@pytest.mark.parametrize("name", ["multiprocessing.Lock", "multiprocessing.connection.Listener"])
def test_a_run_goes_on_without_workers(start, monkeypatch, capsys, name):
    """In some containers, or on a cluster with a long TMPDIR, it would hang without a word."""
    monkeypatch.setattr(name, lambda: raise_(OSError("AF_UNIX path too long")))
    for options in [[], ["--num-workers", "2"]]:
        assert start(*options).num_workers == 0
        printed = capsys.readouterr().out
        assert printed.startswith("NOTICE: worker processes cannot be used here (AF_UNIX path too long; temporary "
                                  f"folder: {tempfile.gettempdir()}): --num-workers 0 is used. If a path is too long, "
                                  "set TMPDIR to a short one on a local disk\n")
    start("--num-workers", "0")
    assert "NOTICE" not in capsys.readouterr().out


@pytest.mark.parametrize("time, pause, terminal, waits", [
    ("0:19:35", True, True, True), ("0:19:35", False, True, False), ("0:19:35", True, False, False),
    (None, True, True, False)])
def test_a_heading_waits_for_enter_if_it_has_a_time(monkeypatch, capsys, time, pause, terminal, waits):
    """--pause lets a student watch a section of the video; without a terminal, nothing may wait."""
    stdin = io.StringIO("\nnot read")
    stdin.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stdin", stdin)
    banner("Title", time, pause)
    link = "  video from 0:19:35, https://youtu.be/ZhC-DIrCe6A?t=1175\n"
    heading = f"\n{'=' * 80}\nTitle\n{link}" if time else f"\n{'-' * 80}\nTitle\n"
    assert capsys.readouterr().out == heading + ("press Enter to continue " if waits else "")
    assert stdin.read() == ("not read" if waits else "\nnot read")


def written(monkeypatch, items, seconds, on_terminal, unit="images"):
    """What progress writes to stderr if `seconds` pass between any two looks at the clock. Each item is 50 units."""
    stderr, times = io.StringIO(), itertools.count(step=seconds)
    stderr.isatty = lambda: on_terminal
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr("support.progress.time", SimpleNamespace(monotonic=lambda: next(times)))
    assert list(progress(items, len(items), 50 * len(items), unit)) == list(items)
    return stderr.getvalue()


@pytest.mark.parametrize("unit, on_terminal, end, count, second, last", [
    ("images", True, "\r", 100, "    2%  5.0 images/s  0:16:20 left", ""),
    ("MB", False, "\n", 17, "    7%  5.0 MB/s  0:15:30 left", "   97%  5.0 MB/s  0:00:30 left")],
    ids=["terminal", "log"])
def test_progress_shows_speed_and_time_left(monkeypatch, unit, on_terminal, end, count, second, last):
    """On a terminal one line, which is cleared at the end; a line per minute in a log. Here 50 units take 10 s."""
    *lines, rest = written(monkeypatch, range(100), 10, on_terminal, unit).split(end)
    first, then, *_, final = [line.rstrip() for line in lines]
    assert (first, then, final, rest) == (f"    1%  5.0 {unit}/s  0:16:30 left", second, last, "")
    assert [len(line) for line in lines] == [60] * count  # each covers the one before


@pytest.mark.parametrize("items, seconds", [("abc", 1), ("a", 10), ("abc", 0)])
def test_progress_is_silent_if_there_is_nothing_to_wait_for(monkeypatch, items, seconds):
    """Quick work, a single step; and a clock that does not move must not end in a division by 0."""
    assert written(monkeypatch, items, seconds, on_terminal=True) == ""
