"""support/run.py, options.py and progress.py: how a script starts, its options, headings, and progress."""
import io
import os
import re
import sys
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest
from conftest import ROOT, SCRIPTS, WITH_WINDOWS, message, raise_, run_here

from support.options import option_parser
from support.progress import progress
from support.run import banner, print_options, start_run

SEED, WORKERS, LIMIT, EPOCHS = "0 and 9,223,372,036,854,775,807", "0 and 256", "2 and 1,000,000", "1 and 1,000,000"
COMMON = {"--seed": SEED, "--num-workers": WORKERS, "--limit": LIMIT}
TRAINING = {**COMMON, "--epochs": EPOCHS, "--batch-size": EPOCHS, "--lr": "0 and 1,000"}
TOO_SMALL, TOO_LARGE = -1, 10**19


def wrong_option(capsys, name, *options):
    """What argparse says about options that cannot be."""
    with pytest.raises(SystemExit, match="2"):
        run_here(name, *options)
    return capsys.readouterr().err


@pytest.mark.parametrize("name, ranges", [
    ("01_data.py", COMMON), ("02_vgg_imagenet.py", COMMON), ("03_finetune_head.py", TRAINING),
    ("04_precompute.py", TRAINING), ("05_analysis.py", {**COMMON, "--n-view": "1 and 100"})])
def test_numbers_out_of_range_are_wrong_options(capsys, name, ranges):
    """Better no run than one that divides by 0 or waits for 10,000 processes."""
    for option, limits in ranges.items():
        for value in [TOO_SMALL, TOO_LARGE]:
            text = wrong_option(capsys, name, f"{option}={value}")
            assert text.endswith(f"argument {option}: {value} is not between {limits}\n")


def test_a_number_must_be_a_number(capsys):
    """And argparse says which kind."""
    assert "argument --seed: invalid int value: 'x'" in wrong_option(capsys, "01_data.py", "--seed=x")
    assert "argument --lr: invalid float value: 'x'" in wrong_option(capsys, "03_finetune_head.py", "--lr=x")


def test_sample_and_limit_exclude_each_other(capsys):
    """Else one of them would be ignored without a word."""
    text = wrong_option(capsys, "01_data.py", "--sample", "--limit=10")
    assert "argument --limit: not allowed with argument --sample" in text


@pytest.fixture
def start(monkeypatch, tmp_path):
    """A function that starts a run as the scripts do, with tmp_path as the folder of the scripts and of the user."""
    def start(*options, program="03_finetune_head.py"):
        monkeypatch.setattr(sys, "argv", [program, *options])
        return start_run(option_parser("03_finetune_head.py", ""))

    (tmp_path / "03_finetune_head.py").touch()
    for room in ["run", "options"]:
        monkeypatch.setattr(f"support.{room}.HERE", tmp_path)
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
    for x in ["train", "valid"]:
        (tmp_path / data_dir / x).mkdir(parents=True)
    args = start(*options)
    assert (args.output_dir, args.data_dir) == (tmp_path / out, tmp_path / data_dir)
    assert list(args.output_dir.iterdir()) == []


def test_a_run_does_nothing_special_unless_asked(start):
    """No windows, no waiting, ImageNet's weights, full precision."""
    args = start("--num-workers", "0")
    found = {name: value for name, value in vars(args).items() if name not in ("data_dir", "output_dir")}
    assert found == {"sample": False, "limit": None, "seed": 0, "num_workers": 0, "show": False, "pause": False,
                     "device": "auto", "weights": "imagenet", "bf16": False}


def test_a_link_that_leads_nowhere_is_named(start, tmp_path):
    """The external disk is not connected: nothing may be downloaded to the internal one."""
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    assert message(start, "--data-dir", "link/dogs").startswith(
        f"error: {tmp_path / 'link'} is a link to {tmp_path / 'disk'}, which does not exist: connect that disk")


def test_results_inside_the_dataset_are_refused(start, tmp_path):
    """The next run would see them as images."""
    for part in ["train", "valid"]:
        (tmp_path / "dogs" / part).mkdir(parents=True)
    assert message(start, "--data-dir", "dogs", "--output-dir", "dogs/out") == (
        f"error: --output-dir: {tmp_path / 'dogs' / 'out'} is inside the dataset: choose a folder outside it")


def test_weights_may_be_a_file_which_must_exist(start, tmp_path):
    """Noticed before the dataset is read; later scripts, started elsewhere, find it."""
    path = tmp_path / "my.pth"
    assert message(start, "--weights", "my.pth") == f"error: --weights: there is no file {path}: check the name"
    path.touch()
    assert start("--weights", "my.pth").weights == str(path)
    assert start("--weights", "untrained").weights == "untrained"


@pytest.mark.parametrize("program", [
    "/x/ipykernel_launcher.py", "/x/colab_kernel_launcher.py", "", "/x/ipykernel/__main__.py", "/x/pydevconsole.py"])
def test_a_notebook_has_a_command_line_of_its_own(start, monkeypatch, tmp_path, program):
    """In Jupyter, Colab, Spyder and PyCharm, cells run on the sample with figures; how to change this is printed."""
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # as in a notebook: not a real file
    plt.switch_backend(WITH_WINDOWS)
    args = start("-f", "x.json", program=program)
    assert (args.sample, args.show, args.output_dir) == (True, True, tmp_path / "outputs" / "sample")
    assert 'sys.argv = ["03_finetune_head.py", "--limit", "1000", "--show"]' in sys.stdout.getvalue()


@pytest.mark.parametrize("program", ["03_finetune_head.py", "/x/03_finetune_head.py", "-", "a link"])
def test_a_script_has_its_options(start, tmp_path, program):
    """However it is started: python, %run, runpy, from standard input, or through a link."""
    if program == "a link":
        (tmp_path / program).symlink_to(tmp_path / "03_finetune_head.py")
    assert start("--seed", "7", program=program).seed == 7


@pytest.mark.parametrize("options, session, before, after, shows", [
    ([], "", "qtagg", "agg", False), (["--show"], "", "qtagg", "qtagg", True), (["--show"], "", "agg", "agg", False),
    (["--show"], "", "inline", "agg", False), (["--show"], "", "broken", "agg", False),
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
    notice = "--show: figures cannot be opened in windows here; they are only saved\n"
    assert (notice in capsys.readouterr().out) == (bool(options) and not shows)


def test_the_options_that_hold_are_printed(capsys):
    """Those that were chosen, and those chosen automatically; what is off is left out. 0 is not off."""
    print_options(SimpleNamespace(sample=True, limit=None, seed=0, show=False, image=[], weights="untrained"))
    assert capsys.readouterr().out == "options: sample=True seed=0 weights=untrained\n"


LINK = "  video from 0:19:35, https://youtu.be/ZhC-DIrCe6A?t=1175\n"


@pytest.mark.parametrize("time, pause, terminal, printed, waits", [
    ("0:19:35", True, True, f"\n{'=' * 80}\nTitle\n{LINK}press Enter to continue ", True),
    ("0:19:35", False, True, f"\n{'=' * 80}\nTitle\n{LINK}", False),
    ("0:19:35", True, False, f"\n{'=' * 80}\nTitle\n{LINK}", False),
    (None, True, True, f"\n{'-' * 80}\nTitle\n", False)],
    ids=["with a time", "without --pause", "without a terminal", "without a time"])
def test_a_heading_waits_for_enter_if_it_has_a_time(monkeypatch, capsys, time, pause, terminal, printed, waits):
    """--pause lets a student watch a section of the video; without a terminal, nothing may wait."""
    stdin = io.StringIO("\n" * 9)
    stdin.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stdin", stdin)
    banner("Title", time, pause)
    assert capsys.readouterr().out == printed and stdin.tell() == waits


@pytest.mark.parametrize("name", SCRIPTS)
def test_pause_reaches_every_heading_with_a_time(name):
    """A heading that does not wait is a section that a student misses."""
    banners = re.findall(r'^    banner\(".*", ("0:\d\d:\d\d"|"1:\d\d:\d\d"), (.*)\)$', (ROOT / name).read_text(), re.M)
    assert banners and {pause for _, pause in banners} == {"args.pause"}


@pytest.fixture
def terminal(monkeypatch):
    """A function that returns what is written to stderr: a terminal, or the log of a program."""
    def terminal(is_one):
        stderr = io.StringIO()
        stderr.isatty = lambda: is_one
        monkeypatch.setattr(sys, "stderr", stderr)
        return stderr
    return terminal


def clock(monkeypatch, seconds):
    """Let this many seconds pass between any two looks at the clock."""
    now = iter(range(0, 10**6, seconds)) if seconds else iter([0] * 10**4)
    monkeypatch.setattr("support.progress.time", SimpleNamespace(monotonic=lambda: next(now)))


@pytest.mark.parametrize("on_terminal, count, second", [
    (True, 99, "  2%  5.0 images/s  0:16:20"), (False, 17, "  7%  5.0 images/s  0:15:30")])
def test_progress_shows_speed_and_time_left(monkeypatch, terminal, on_terminal, count, second):
    """On a terminal one line, which is cleared at the end; a line per minute in a log. Here 50 images take 10 s."""
    stderr = terminal(on_terminal)
    clock(monkeypatch, 10)
    assert list(progress(range(100), 100, 5000)) == [*range(100)]
    lines = stderr.getvalue().split("\r" if on_terminal else "\n")
    assert lines[:2] == [f"{f'  {text} left':<60}" for text in ("  1%  5.0 images/s  0:16:30", second)]
    assert lines[count:] == ([" " * 60, ""] if on_terminal else [""])


def test_progress_has_the_unit_of_the_loop(monkeypatch, terminal):
    """A download is measured in megabytes."""
    stderr = terminal(False)
    clock(monkeypatch, 100)
    list(progress("ab", 2, 3000, "MB"))
    assert stderr.getvalue() == f"{'   50%  15.0 MB/s  0:01:40 left':<60}\n"


@pytest.mark.parametrize("items, seconds", [("a", 10), ("abc", 1), ("abc", 0)],
                         ids=["one step", "quick work", "a clock that does not move"])
def test_progress_is_silent_if_there_is_nothing_to_wait_for(monkeypatch, terminal, items, seconds):
    """And what it passes on is not changed."""
    stderr = terminal(True)
    clock(monkeypatch, seconds)
    assert list(progress(items, len(items), 1)) == list(items) and stderr.getvalue() == ""
