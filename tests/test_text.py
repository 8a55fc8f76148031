"""Texts that must agree: help, docstrings, the README, the video's times, constants of the dataset."""
import re
import shlex
from datetime import timedelta

import pytest
from conftest import ROOT, SCRIPTS

import common
from support import dataset as data

FILES = [*SCRIPTS, "common.py", "README.md", *(f"support/{path.name}" for path in (ROOT / "support").glob("*.py"))]
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in FILES}


@pytest.mark.parametrize("name, defaults", [
    ("01_data.py", {}), ("02_vgg_imagenet.py", {"zero_shot": False, "weights": "imagenet"}),
    ("03_finetune_head.py", {"epochs": 2, "lr": 0.001, "batch_size": 64, "weights": "imagenet"}),
    ("04_precompute.py", {"epochs": 50, "lr": 0.001, "batch_size": 128, "layer": "conv", "weights": "imagenet"}),
    ("05_analysis.py", {"step": None, "n_view": 8, "submission": False, "weights": None})])
def test_defaults_are_those_of_the_lecture_and_of_the_help(lesson, name, defaults):
    """A script without options does what the video does, waits for nobody, and says so."""
    parser, always = lesson.names[name]["parser"], {"sample": False, "limit": None, "seed": 0, "num_workers": None}
    found = {action.dest: action.default for action in parser._actions}
    expected = {**always, **defaults, "show": False, "pause": False}
    assert {option: found.get(option, "missing") for option in expected} == expected
    said = {action.dest: value for action in parser._actions
            for value in re.findall(r"default: ([\w.]+)\)?$", action.help)}
    numbers = {option for option, value in expected.items() if type(value) in (int, float)}
    assert said == {option: str(found[option]) for option in said} and numbers <= said.keys()


@pytest.mark.parametrize("name", sorted(name for name in TEXTS if re.search(r"python 0\d", TEXTS[name])))
def test_every_command_in_the_texts_can_be_typed(lesson, monkeypatch, name):
    """A student copies commands from the README, from docstrings and from messages."""
    monkeypatch.setattr("os.path.isfile", lambda path: True)  # there is no my.jpg
    monkeypatch.setattr("support.images.load_image", lambda path, rotate: None)
    text = re.sub(r"[ \n]*\n *", " ", TEXTS[name]).replace('", "', " ").replace("--help", "")
    commands = re.findall(r"""\b(0\d_\w+\.py)((?: -[-\w]+(?:[ =](?!again|python)(?:"[^"\n]*"|[\w./~]+))*)*)""", text)
    assert commands
    for script, options in commands:
        lesson.names[script]["parser"].parse_args(shlex.split(options))


def test_every_time_is_that_of_a_heading_and_every_link_leads_there():
    """A student who follows a link sees the step in the video."""
    text = "\n".join(TEXTS.values())
    headings = re.findall(r'banner\(".*", "(\d:\d\d:\d\d)", args\.pause\)', text)
    assert set(re.findall(r"\d:\d\d:\d\d", text)) == set(headings)
    links = re.findall(r"(\d:\d\d:\d\d)[],]\s*\(?https://youtu\.be/ZhC-DIrCe6A\?t=(\d+)", text)
    assert len(links) == len(re.findall(r"\?t=\d", text)) and {time for time, _ in links} == set(headings)
    assert all(time == str(timedelta(seconds=int(seconds))) for time, seconds in links)


def test_the_functions_that_the_scripts_send_the_reader_to_exist():
    """'search for def train_model' must find it."""
    sent_to = {*re.findall(r"[a-z,] def (\w+)", "".join(TEXTS[name] for name in SCRIPTS))}
    assert sent_to == {"imshow", "train_model", "test_model"}
    assert sent_to <= {*re.findall(r"^def (\w+)", TEXTS["common.py"], re.M)}


def test_the_workflow_runs_the_commands_of_the_readme():
    """What the README promises first is tried on Linux, macOS and Windows, and exactly as a student types it."""
    commands = re.findall(r"^```sh\n(.*?)\n```$", TEXTS["README.md"], re.M | re.S)
    workflow = (ROOT / ".github" / "workflows" / "tests.yml").read_text()
    job = re.search(r"^  readme:\n(.*?)^  \w", workflow, re.M | re.S)[1]
    assert len(commands) == 2 and re.findall(r"^ +- run: (.*)$", job, re.M) == commands


def test_sizes_and_counts_are_those_of_the_real_archive():
    """A wrong size or checksum costs a download of 839 MB."""
    assert (data.SIZE, data.HASH) == (839_285_364, ["md5", "3e483c8d6ef2175e9d395a6027eb92b7", 2**20])
    assert data.N_FILES == 2 * 11_500 + 2 * 1_000 + 12_500 + 2 * 8 + 2 * 4
    assert common.IMAGENET_FILE.name == common.IMAGENET.url.rpartition("/")[2] == "vgg16-397923af.pth"
