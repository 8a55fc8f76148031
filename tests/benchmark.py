"""Measure the scripts against the lecture's own loops and against the bare network, side by side in one run.

  python tests/benchmark.py        10 to 25 minutes on 2 cores; prints a table in Markdown, asserts nothing

It makes photo-sized JPEGs and a VGG16 with seeded random weights (speed does not depend on their values), in a
temporary folder. What is compared runs in turns, ROUNDS times, so that a noisy machine disturbs both sides alike; the
table shows medians.

Measured with an earlier version of the scripts, in images per second (in parentheses: the bare network; the lecture's
loop). On a CPU in float32, the scripts are about as fast as the bare network; the H100 waits for the images.

  2 cores, AMD EPYC (AVX2), torch 2.14        precompute 4.3 (4.1; 2.7), epoch on images 3.9 (3.8; 2.9),
                                              on conv features 361 (348), on fc7 features 74,372
  4 cores, Intel Xeon (AMX), torch 2.11       precompute 14.3 (15.7; 11.0), epoch on images 13.7 (13.7; 9.9);
                                              with --bf16 39.7 (57.1) and 43.2 (48.7)
  NVIDIA H100, 16 cores, torch 2.11           precompute 1,358 (5,179; 1,370), epoch on images 1,823 (4,883; 1,701)
"""
import io
import os
import platform
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout, suppress
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision import datasets, models, utils

import common
from support.features import FeatureFile

ROUNDS = 3
N_FEATURES = 1024
DEVICE = common.get_device("auto")
N_IMAGES = 64 if DEVICE.type == "cpu" else 2048  # a batch of the lecture; a GPU needs more, to be kept busy
# Elsewhere --bf16 is several times slower, and these rows would take an hour.
HAS_BF16 = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()  # a private function: see common.py
BF16 = ["bf16"] if DEVICE.type == "cuda" or HAS_BF16 else []


def make_images(folder, n):
    """n photo-sized JPEGs for train, 2 for valid: smooth random shapes under noise. After the first 64 come links."""
    rng = np.random.default_rng(0)
    for part, count in (("train", n), ("valid", 2)):
        for i in range(count):
            path = folder / part / common.CLASSES[i % 2] / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            if i >= 64:
                os.link(path.with_name(f"{i % 64}.jpg"), path)
                continue
            small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
            pixels = np.asarray(small.resize((500, 375))) + rng.normal(0, 6, (375, 500, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return folder


def sgd(model):
    return torch.optim.SGD(model.classifier[6].parameters(), lr=0.001)


def lecture_train(model, loader, optimizer):
    """An epoch as the notebook writes it."""
    criterion = nn.NLLLoss()
    running_loss = running_corrects = 0
    model.train()
    for inputs, classes in loader:
        inputs, classes = inputs.to(DEVICE), classes.to(DEVICE)
        outputs = model(inputs)
        loss = criterion(outputs, classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        running_loss += loss.item()
        running_corrects += torch.sum(outputs.argmax(1) == classes).item()


def lecture_precompute(model, loader):
    """Features as the notebook computes them: Python lists, and one array at the end."""
    features, labels = [], []
    for inputs, classes in loader:
        features.extend(model.features(inputs.to(DEVICE)).detach().cpu().numpy())
        labels.extend(classes.numpy())
    return np.concatenate([[row] for row in features]), labels


def lecture_03(weights, figure):
    """The notebook's cells of which 03_finetune_head.py is made, on the sample; run in a separate process."""
    plt.switch_backend("Agg")
    dsets = {x: datasets.ImageFolder(ROOT / "sample" / x, common.imagenet_format) for x in ["train", "valid"]}
    loader_train = DataLoader(dsets["train"], batch_size=64, shuffle=True, num_workers=6)
    loader_valid = DataLoader(dsets["valid"], batch_size=5, shuffle=False, num_workers=6)
    model = models.vgg16()
    model.load_state_dict(torch.load(weights, weights_only=True))
    model = common.freeze_and_replace_head(model).to(DEVICE)
    for _ in range(2):
        lecture_train(model, loader_train, sgd(model))
    model.eval()
    for inputs, _ in loader_valid:
        model(inputs.to(DEVICE))
    inputs, _ = next(iter(loader_valid))
    print(torch.exp(model(inputs.to(DEVICE))))
    plt.imshow(utils.make_grid(inputs).numpy().transpose((1, 2, 0)).clip(0, 1))
    plt.savefig(figure)


def bare_train(model, inputs, classes, batch_size, optimizer):
    """Only the forward pass and the update of the last layer, on data in memory."""
    model.train()
    for batch, labels in zip(inputs.split(batch_size), classes.split(batch_size), strict=True):
        optimizer.zero_grad()
        nn.functional.nll_loss(model(batch), labels).backward()
        optimizer.step()


def row(*cells):
    print("|", " | ".join(cells), "|", file=sys.__stdout__, flush=True)  # sys.stdout swallows what the scripts print


def seconds(work):
    start = time.perf_counter()
    work()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(works, aims, n=None):
    """Run the works, {name: function}, on n images each, in turns, after one turn to warm up. Print a row of the table
    for each (ours, theirs, aim); what follows a comma in the name of theirs is not printed."""
    turns = [{name: seconds(work) for name, work in works.items()} for _ in range(1 + ROUNDS)][1:]
    times = {name: statistics.median(turn[name] for turn in turns) for name in works}
    for ours, theirs, aim in aims:
        speeds = [f"{n / times[name]:,.1f} img/s" if n else f"{times[name]:.1f} s" for name in (ours, theirs)]
        ratio = times[theirs] / times[ours]
        row(ours, theirs.split(",")[0], *speeds, f"{ratio:.0%}" if "%" in aim else f"{ratio:.2f}x", aim)


def speed_rows(folder, weights):
    sys.argv = [str(ROOT / "04_precompute.py"), "--data-dir", str(make_images(folder / "images", N_IMAGES)),
                "--output-dir", str(folder / "speed"), "--weights", str(weights), "--epochs", "1"]
    script = {"f32": runpy.run_path(sys.argv[0], run_name="__main__")}  # the variables of 04, run in this process
    if BF16:
        sys.argv.append("--bf16")
        script["bf16"] = runpy.run_path(sys.argv[0], run_name="__main__")
    vgg = {x: script[x]["model_vgg"] for x in script}
    lecture = common.freeze_and_replace_head(common.load_vgg16(weights)).to(DEVICE)  # torchvision's memory layout
    loader, batch_size = script["f32"]["loader_train"], script["f32"]["batch_size"]
    in_order = DataLoader(loader.dataset, batch_size, num_workers=loader.num_workers, pin_memory=loader.pin_memory)
    cores = min(6, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    their_loader = DataLoader(loader.dataset, batch_size=64, shuffle=True, num_workers=cores)
    inputs, classes = (part.to(DEVICE) for part in next(iter(DataLoader(loader.dataset, N_IMAGES))))

    def precompute(x):
        file = FeatureFile(folder / f"{time.time()}.npy", (N_IMAGES, 512, 7, 7), {}, batch_size)
        for batch in in_order:
            features, _ = script[x]["preconvfeat"]([batch])
            file.append(features)
        file.finish()

    @torch.inference_mode()
    def bare_forward(x):
        for batch in inputs.split(batch_size):
            vgg[x].features(batch)

    for what, bare, lectures, ours, bares in [
            ("precompute", "bare forward", lambda: lecture_precompute(lecture, their_loader), precompute, bare_forward),
            ("epoch on images", "bare network", lambda: lecture_train(lecture, their_loader, sgd(lecture)),
             lambda x: common.train_model(vgg[x], loader, N_IMAGES, 1, sgd(vgg[x])),
             lambda x: bare_train(vgg[x], inputs, classes, 64, sgd(vgg[x])))]:
        works = {f"{what}, {x}": partial(ours, x) for x in vgg} | {f"{bare}, {x}": partial(bares, x) for x in vgg}
        compare({"lecture's loop": lectures, **works}, [
            *((f"{what}, {x}", f"{bare}, {x}", "90%") for x in vgg),
            *((f"{what}, {x}", "lecture's loop", {"f32": "1.7x", "bf16": "3.2x"}[x]) for x in vgg)], N_IMAGES)

    rng = np.random.default_rng(0)
    labels = torch.from_numpy(rng.integers(0, 2, N_FEATURES))
    for name, size in (("conv", 512 * 7 * 7), ("fc7", 4096)):
        np.save(folder / f"{name}.npy", rng.random((N_FEATURES, size), dtype=np.float32))
    rows = [torch.from_numpy(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in ("conv", "fc7")]
    conv, fc7 = (DataLoader(TensorDataset(x, labels), batch_size=128, shuffle=True) for x in rows)
    their_loader = DataLoader(list(zip(rows[0].clone(), labels, strict=True)), batch_size=128, shuffle=True)
    inputs, classes = rows[0].to(DEVICE, copy=True), labels.to(DEVICE)
    f32 = vgg["f32"]
    compare({
        "lecture's loop": lambda: lecture_train(lecture.classifier, their_loader, sgd(lecture)),
        "epoch on conv features, f32": lambda: common.train_model(f32.classifier, conv, N_FEATURES, 1, sgd(f32)),
        **{f"epoch on conv features, {x}": lambda x=x: common.train_model(vgg[x].classifier, conv, N_FEATURES, 1,
                                                                         sgd(vgg[x])) for x in BF16},
        "bare classifier": lambda: bare_train(f32.classifier, inputs, classes, 128, sgd(f32)),
        "epoch on fc7 features": lambda: common.train_model(f32.classifier[6:], fc7, N_FEATURES, 1, sgd(f32)),
    }, [("epoch on conv features, f32", "bare classifier", "90%"),
        *((f"epoch on conv features, {x}", "lecture's loop", "3.5x") for x in BF16),
        ("epoch on fc7 features", "epoch on conv features, f32", "100x")], N_FEATURES)


def run_script(*command):
    """Run a script. Return, on Linux, the peak of its anonymous memory in bytes (elsewhere 0)."""
    peak, command = 0, [sys.executable, *map(str, command)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        with suppress(OSError, IndexError):  # not Linux, or the process has just ended
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = max(peak, 1024 * int(status.partition("RssAnon:")[2].split()[0]))
        time.sleep(0.01)
    if process.returncode:
        raise SystemExit(f"{command} failed")
    return peak


def main():
    gpu = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "no GPU"
    processor = platform.processor() or platform.machine()
    print(f"{processor}, {torch.get_num_threads()} threads, {gpu}, torch {torch.__version__}")
    print("\n| what | against | ours | theirs | ratio | aim |\n| --- | --- | --- | --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory() as name, redirect_stdout(io.StringIO()) as quiet, redirect_stderr(quiet):
        folder, weights = Path(name), Path(name, "vgg16.pth")
        torch.save(common.load_vgg16("untrained").state_dict(), weights)
        speed_rows(folder, weights)
        options = ["--weights", weights, "--output-dir", folder / "out"]
        few, many = (run_script(ROOT / "04_precompute.py", "--data-dir", make_images(folder / str(n), n), *options,
                                "--epochs", 1) for n in (200, 2000))
        if few:
            row("peak memory of 04, 2,000 images", "200 images", f"{many / 1e9:.2f} GB", f"{few / 1e9:.2f} GB",
                f"{many / few:.3f}", "within 5 %, < 1.6 GB")
        compare({
            "03 --sample, whole process": lambda: run_script(ROOT / "03_finetune_head.py", "--sample", *options),
            "lecture's cells": lambda: run_script(__file__, weights, folder / "lecture.png"),
        }, [("03 --sample, whole process", "lecture's cells", "1x")])


if __name__ == "__main__":
    lecture_03(*sys.argv[1:]) if sys.argv[1:] else main()
