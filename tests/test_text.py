"""Texts and numbers that must agree: printed text, help, docstrings, the README, the video's times, constants."""
import ast
import re
import shlex
from datetime import timedelta

import numpy as np
import pytest
import torch
from conftest import PHOTO, ROOT, SAMPLE, SCRIPTS, script

import common

TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in [*SCRIPTS, "common.py", "support.py", "README.md"]}


def test_what_is_printed(lesson):
    """Each script shows what it found and points to the next one; numbers on the screen are those of the files."""
    probs, categories = np.load(lesson.folder / "probs_try.npy"), np.array(common.IMAGENET.meta["categories"])
    best = [[f"{categories[k]} {p[k]:.3f}" for k in np.argsort(-p)[:5]] for p in probs]
    expected = [
        ["\n  train/cats                8 images\n", "\n  valid/dogs                4 images\n", f"\n{SAMPLE}\n",
         f"GPU found: {torch.cuda.is_available() or torch.backends.mps.is_available()}\n", "loader_valid: 2\n",
         "{'cats': 0, 'dogs': 1}\n", f"\n  {(str(SAMPLE / 'train' / 'cats' / 'cat.0.jpg'), 0)}\n",
         "{'train': 16, 'valid': 8}\n", "(5, 3, 224, 224)\n"],
        [*("  ".join([f"\n  {animal}:", *best[i]]) for i, animal in [(0, "cats"), (4, "dogs")]),
         f"predicted class: {[categories[k].item() for k in probs.argmax(axis=1)]}\n"],
        ["trainable parameters: 8,194 (2 x 4096 weights + 2 biases); frozen: 2,072,792\n", "frozen: 0 of 2,072,792 par",
         "updates: 2, on 16 images", "python 04_precompute.py --sample --layer fc7\n"],
        ["(5, 512, 7, 7)\n", "(16, 512, 7, 7)\n", "the last layer continues from 03_head.pt"],
        [f"  {PHOTO}:\n    cats 0."]]
    following = [*(f", with the same options (--sample, --limit, ...): python {name}" for name in SCRIPTS[1:]),
                 ": change a line and run the script again; the README has exercises"]
    for i, name in enumerate(SCRIPTS):
        options = f"options: sample=True data_dir={SAMPLE} output_dir={lesson.folder} seed=0 "
        for text in [options, f"\nDone. Next{following[i]}\n", *expected[i]]:
            assert text in lesson.printed[name]


@pytest.mark.parametrize("name", SCRIPTS)
def test_defaults_are_those_of_the_help(lesson, name):
    """A default that differs from its help text makes a student wait for hours, or doubt the result."""
    actions = lesson.names[name]["parser"]._actions
    stated = [(re.search(r"default: ([\w.]+)\)?$", action.help), action.default) for action in actions]
    found = [(match[1], str(default)) for match, default in stated if match]
    assert ("0", "0") in found and all(text == default for text, default in found)


@pytest.mark.parametrize("name", TEXTS)
def test_every_command_in_the_texts_can_be_typed(lesson, name):
    """A student copies commands from the README, from docstrings and from messages."""
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
    link, starts = r"https://youtu\.be/ZhC-DIrCe6A\?t=(\d+)", {}
    for name in SCRIPTS:
        seconds = re.findall(r'banner\(".*", (\d+), args\.pause\)', TEXTS[name])
        times = [str(timedelta(seconds=int(start))) for start in seconds]
        doc = ast.get_docstring(ast.parse(TEXTS[name]))
        assert re.findall(r"\d:\d\d:\d\d", doc) == times and re.findall(link, doc) == seconds[:1]
        starts |= dict(zip(times, seconds, strict=True))
    linked = re.findall(r"\[(\d:\d\d:\d\d)\]\(" + link, TEXTS["README.md"])
    assert linked and all(starts[time] == seconds for time, seconds in linked)


def test_sizes_and_counts_agree(monkeypatch):
    """A wrong size or checksum costs a download of 839 MB; wrong counts refuse a good archive."""
    data, calls = script("01_data"), []
    assert (data.SIZE, data.HASH) == (839_285_364, ["md5", "3e483c8d6ef2175e9d395a6027eb92b7", 2**20])
    assert list(data.COUNTS.values()) == [11_500, 11_500, 1_000, 1_000, 12_500, 8, 8, 4, 4]
    assert common.IMAGENET_FILE.name == common.IMAGENET.url.rpartition("/")[2] == "vgg16-397923af.pth"
    monkeypatch.setattr(common, "IMAGENET_FILE", ROOT / "missing")
    monkeypatch.setattr(common, "download", lambda *args: calls.append(args))
    common.get_weights("imagenet")
    assert calls == [([common.IMAGENET.url], ROOT / "missing", 553_433_881, ["sha256", "397923af"])]  # 528 MiB
