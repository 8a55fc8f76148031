"""Texts that must agree: help, docstrings, the README, the video's times, constants of the dataset."""
import ast
import re
import shlex

import pytest
from conftest import ROOT, SCRIPTS

import common
from support import dataset as data

ROOMS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "support").glob("*.py"))
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in [*SCRIPTS, "common.py", *ROOMS, "README.md"]}
WITH_COMMANDS = [name for name in TEXTS if re.search(r"python 0\d", TEXTS[name])]


@pytest.mark.parametrize("name", SCRIPTS)
def test_defaults_are_those_of_the_help(lesson, name):
    """A default that differs from its help text makes a student wait for hours, or doubt the result."""
    actions = lesson.names[name]["parser"]._actions
    stated = {action.dest: (re.search(r"default: ([\w.]+)\)?$", action.help), action.default) for action in actions}
    found = {dest: (match[1], str(default)) for dest, (match, default) in stated.items() if match}
    assert found["seed"] == ("0", "0") and all(text == default for text, default in found.values())


@pytest.mark.parametrize("name, defaults", [
    ("01_data.py", {"from_kaggle": None}),
    ("02_vgg_imagenet.py", {"zero_shot": False, "image": [], "weights": "imagenet"}),
    ("03_finetune_head.py", {"epochs": 2, "lr": 0.001, "batch_size": 64, "weights": "imagenet"}),
    ("04_precompute.py", {"epochs": 50, "lr": 0.001, "batch_size": 128, "layer": "conv", "weights": "imagenet"}),
    ("05_analysis.py", {"step": None, "n_view": 8, "image": [], "submission": False, "weights": None})])
def test_defaults_are_those_of_the_lecture(lesson, name, defaults):
    """A script without options does what the video does, and waits for nobody."""
    parser = lesson.names[name]["parser"]
    always = {"sample": False, "limit": None, "seed": 0, "num_workers": None, "show": False, "pause": False}
    assert {option: parser.get_default(option) for option in {**always, **defaults}} == {**always, **defaults}


@pytest.mark.parametrize("name", WITH_COMMANDS)
def test_every_command_in_the_texts_can_be_typed(lesson, monkeypatch, name):
    """A student copies commands from the README, from docstrings and from messages."""
    monkeypatch.setattr("support.images.load_image", lambda path, rotate: None)  # there is no my.jpg
    text = re.sub(r"[ \n]*\n *", " ", TEXTS[name]).replace('", "', " ").replace("--help", "")
    commands = re.findall(r"""\b(0\d_\w+\.py)((?: -[-\w]+(?:[ =](?!again|python)(?:"[^"\n]*"|[\w./~]+))*)*)""", text)
    assert commands
    for script_name, options in commands:
        lesson.names[script_name]["parser"].parse_args(shlex.split(options))


def test_the_workflow_runs_the_commands_of_the_readme():
    """What the README promises first is tried on Linux, macOS and Windows, and exactly as a student types it."""
    commands = re.findall(r"^```sh\n(.*?)\n```$", TEXTS["README.md"], re.M | re.S)
    workflow = (ROOT / ".github" / "workflows" / "tests.yml").read_text()
    job = re.search(r"^  readme:\n(.*?)^  \w", workflow, re.M | re.S)[1]
    assert len(commands) == 2 and re.findall(r"^ +- run: (.*)$", job, re.M) == commands


def test_times_are_those_of_the_video():
    """Minutes in docstrings, links and banners lead to the same place in the video."""
    link, starts = r"https://youtu\.be/ZhC-DIrCe6A\?t=(\d+)", set()
    for name in SCRIPTS:
        times = re.findall(r'banner\(".*", "(\d:\d\d:\d\d)", args\.pause\)', TEXTS[name])
        doc = ast.get_docstring(ast.parse(TEXTS[name]))
        assert re.findall(r"\d:\d\d:\d\d", doc) == times and re.findall(link, doc) == [seconds_of(times[0])]
        starts |= {*times}
    linked = re.findall(r"\[(\d:\d\d:\d\d)\]\(" + link, TEXTS["README.md"])
    assert linked and all(time in starts and seconds_of(time) == seconds for time, seconds in linked)
    in_common = re.findall(r"^# In the video: from (\d:\d\d:\d\d).*\n(?:@.*\n)?def (\w+)", TEXTS["common.py"], re.M)
    assert in_common == [("0:25:50", "imshow"), ("0:49:50", "train_model"), ("0:49:50", "test_model")]


def seconds_of(time):
    hours, minutes, seconds = map(int, time.split(":"))
    return str(3600 * hours + 60 * minutes + seconds)


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_functions_that_a_script_sends_the_reader_to_exist(name):
    """'search for def train_model' must find it."""
    for function in re.findall(r"search\s+(?:#\s+)?for\s+(?:#\s+)?def (\w+)", TEXTS[name]):
        assert f"\ndef {function}(" in TEXTS["common.py"]


def test_sizes_and_counts_are_those_of_the_real_archive():
    """A wrong size or checksum costs a download of 839 MB; wrong counts refuse a good archive."""
    assert (data.SIZE, data.HASH) == (839_285_364, ["md5", "3e483c8d6ef2175e9d395a6027eb92b7", 2**20])
    assert data.COUNTS == {
        "train/cats": 11_500, "train/dogs": 11_500, "valid/cats": 1_000, "valid/dogs": 1_000, "test1": 12_500,
        "sample/train/cats": 8, "sample/train/dogs": 8, "sample/valid/cats": 4, "sample/valid/dogs": 4}
    assert common.IMAGENET_FILE.name == common.IMAGENET.url.rpartition("/")[2] == "vgg16-397923af.pth"
