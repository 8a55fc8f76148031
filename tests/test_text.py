"""Texts and numbers that must agree: printed text, help, docstrings, the README, the video's times, constants."""
import ast
import re
from datetime import timedelta

import numpy as np
import pytest
import torch
from conftest import ROOT, SAMPLE, SCRIPTS, json_of, run_here, script

import common
import support

PATHS = [*ROOT.glob("*.py"), ROOT / "README.md", *ROOT.glob("tests/*.py")]
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in PATHS if path.name != "test_text.py"}
BANNED = (r"(?i:\b(mend(s|ed|ing)?|goe?s? on|going on|afresh|hangs on|vouch\w*|untaught|no picture|one's own|over-fit"
          r"|the other way round|in one heap|as it comes|dead link|a guess costs|images to validate|made from other"
          r"|taken for|paid for itself|no plain file|less the mean|has gone|sledge hammer)\b)|\bNotice: ")


def printed_by(folder):
    """What each script must print on the sample, from plain torch and from the files that it wrote to the folder."""
    model, x = common.load_vgg16("imagenet"), torch.from_numpy(np.load(folder / "inputs_try.npy"))
    frozen, training = f"{sum(param.numel() for param in model.parameters()) - 1000 * 4097:,}", {}
    zero_shot, *metrics = (json_of(folder / f"{x}.json") for x in ["02_zero_shot", "03_metrics", "04_metrics"])
    for i, m in enumerate(metrics):
        curve = enumerate(zip(m["train_loss"], m["train_accuracy"], strict=True), 1)
        training[i] = [f"epoch {k:2}/{2 + i}  loss {a:.4f}  accuracy {b:.4f}  " for k, (a, b) in curve] + [
            f"test on 8 images  loss {m['valid_loss']:.4f}  accuracy {m['valid_accuracy']:.4f}\n"]
    once = 16 / json_of(folder / "conv_feat_train.json")["images_per_second"]
    probs, names = np.load(folder / "probs_try.npy"), np.array(common.IMAGENET.meta["categories"], dtype=object)
    order, animals = np.argsort(-probs)[:, :5], common.CLASSES
    five = ["".join([f"\n  {animals[i // 4]}:", *(f"  {names[k]} {probs[i, k]:.3f}" for k in order[i]), "\n"])
            for i in range(5)]
    confusion = [f"of 4 {animal}: {row[0]} predicted as cats, {row[1]} as dogs\n"
                 for animal, row in zip(animals, zero_shot["confusion"], strict=True)]
    gpu, cats = torch.cuda.is_available() or torch.backends.mps.is_available(), sorted(SAMPLE.glob("train/cats/*"))
    return [
        ["  train/cats                8 images\n  train/dogs                8 images\n  valid/cats                4 im",
         f"torch {torch.__version__}\n", f"GPU found: {gpu}\n", f"\n{SAMPLE}\n", "'train': 16, 'valid': 8}\n",
         "['cats', 'dogs']\nclass_to_idx: {'cats': 0, 'dogs': 1}\n", *(f"\n  {(str(path), 0)}\n" for path in cats[:5]),
         f"{common.imagenet_format}\n", "loader_valid: 2\n", "first batch: tensor([0, 0, 0, 0, 1])\n", f":\n{x[0]}\n",
         "inputs_try.shape: (5, 3, 224, 224)\n"],
        [*five, f"predicted class: {[*names[order[:, 0]]]}\n", "(5, 1000)\n", "torch.sum(probs, 1): tensor([1",
         f"vals_try: {torch.from_numpy(probs.max(axis=1))}\n", f"dic_imagenet[:4]: {[*names[:4]]}\n", *confusion,
         f"\naccuracy {zero_shot['valid_accuracy']:.4f} on 8 validation images\n",
         f"neither cats nor dogs: {zero_shot['outside']:.4f} on average\n"],
        [f"{model}\n", f"{common.freeze_and_replace_head(model).classifier}\n", "NLLLoss()\nSGD (", "    lr: 0.001\n",
         f"trainable parameters: 8,194 (2 x 4096 weights + 2 biases); frozen: {frozen}\n", *training[0],
         f"frozen: 0 of {frozen} parameters changed\ntrainable: ", "tensor([0, 0, 0, 0, 1, 1, 1, 1])\n",
         "only 2 updates on 16 images", "learn: python 04_precompute.py --sample --layer fc7\n"],
        ["(5, 512, 7, 7)\n", "(16, 512, 7, 7)\n", "the last layer continues from 03_head.pt", *training[1],
         f"an epoch on features: {metrics[1]['seconds_per_epoch']:.3f} s\n", f"once: {once:.1f} s; this ",
         f"an epoch on images, in 03_finetune_head.py: {metrics[0]['seconds_per_epoch']:.3f} s\n"],
        [f"  zero-shot accuracy      {zero_shot['valid_accuracy']:.4f}  (02_vgg_imagenet.py --zero-shot)\n"]]


@pytest.mark.parametrize("i", range(5))
def test_what_each_script_prints(lesson, i):
    """The numbers on the screen are those of the files; the last line leads from one script to the next."""
    following = [f", with the same options (--sample, --limit, ...): python {name}\n" for name in SCRIPTS[1:]]
    texts = [f"options: sample=True data_dir={SAMPLE} ", "Done. Next" + [*following, ": change a line and run"][i]]
    for text in texts + printed_by(lesson.folder)[i]:
        assert text in lesson.printed[SCRIPTS[i]]


@pytest.fixture(scope="module")
def parsers():
    """The parser of each script, without a run."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(support, "start_run", lambda parser: found.update({name: parser}) or 1 / 0)
        for name in SCRIPTS:
            with pytest.raises(ZeroDivisionError):
                run_here(name)
    return found


def test_defaults_are_those_of_the_contract_and_of_the_help(parsers):
    """A default that differs from its help text makes a student wait for hours, or doubt the result."""
    options = {"sample": False, "limit": None, "data_dir": ROOT / "data" / "dogscats", "output_dir": None, "seed": 0,
               "num_workers": None, "show": False, "pause": False}
    network = {"device": "auto", "weights": "imagenet", "bf16": False}
    training = network | {"epochs": 2, "lr": 0.001, "batch_size": 64}
    for name, own in zip(SCRIPTS, [
            {"from_kaggle": None}, network | {"zero_shot": False, "image": []}, training,
            training | {"epochs": 50, "batch_size": 128, "layer": "conv"},
            network | {"weights": None, "step": None, "n_view": 8, "image": [], "submission": False}], strict=True):
        assert vars(parsers[name].parse_args([])) == options | own
        for action in parsers[name]._actions:
            stated = re.search(r"default: ([\w.]+)\)?$", action.help)
            assert not stated or stated[1] == str(action.default), action.dest


def test_every_command_in_the_texts_can_be_typed(parsers):
    """A student copies commands from the README, from docstrings and from messages."""
    texts = [TEXTS[name] for name in [*SCRIPTS, "support.py", "common.py"]] + [re.sub(r"\s+", " ", TEXTS["README.md"])]
    command = r"\b(0\d_\w+\.py)((?: -[-\w]+(?:[ =](?!again|python)[\w./~]+)*)*)"
    found = [match for text in texts for match in re.findall(command, text.replace('", "', " "))]
    assert len(found) > 30
    for name, options in found:
        parsers[name].parse_args(options.split())


def test_times_are_those_of_the_video():
    """Minutes in docstrings, links and banners lead to the same place in the video."""
    pattern, started = r"(\d:\d\d:\d\d)(?:[,\]( ]*https://youtu\.be/ZhC-DIrCe6A\?t=(\d+))?", {}
    for name in SCRIPTS:
        times = {str(timedelta(seconds=int(time))): (heading, time) for heading, time in re.findall(
            r'banner\("(.*)", (\d+), args\.pause\)', TEXTS[name])}
        doc = ast.get_docstring(ast.parse(TEXTS[name])).replace("\n", " ")
        in_doc = re.findall(pattern, doc)
        assert [time for time, _ in in_doc] == list(times) and in_doc[0][1] == times[in_doc[0][0]][1]
        assert [*times.values()][-1][0] in doc
        started |= {time: seconds for time, (_, seconds) in times.items()}
    for time, seconds in re.findall(pattern, TEXTS["README.md"]):
        assert seconds in ("", started[time])
    assert set(re.findall(r"youtu\.be/ZhC-DIrCe6A\?t=(\d+)", TEXTS["README.md"])) <= set(started.values())


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
    conv, fc7 = (f"{25_000 * n * 4 / 1e9:.1f} GB" for n in [512 * 7 * 7, 4096])
    assert f"({conv} for all images" in TEXTS["04_precompute.py"] and f"npy, {fc7})" in TEXTS["04_precompute.py"]


@pytest.mark.parametrize("name", TEXTS)
def test_lines_are_short_and_words_are_plain(name):
    """Students read the scripts in a second language, beside a video."""
    assert not re.search(BANNED, TEXTS[name])
    assert name == "README.md" or max(map(len, TEXTS[name].splitlines())) <= 120


@pytest.mark.parametrize("name, allowed", [("support.py", set()), ("common.py", {"support"}),
                                           *((name, {"support", "common"}) for name in SCRIPTS)])
def test_imports_go_one_way(name, allowed):
    """Whoever reads a script needs two other files at most; what is imported from them is used."""
    tree = ast.parse(TEXTS[name])
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    modules = {getattr(node, "module", None) or alias.name for node in imports for alias in node.names}
    assert modules & {path.stem for path in PATHS} <= allowed
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} | {"imshow"}  # for what the video types
    assert {alias.name for node in imports for alias in node.names if getattr(node, "module", None) in allowed} <= used
