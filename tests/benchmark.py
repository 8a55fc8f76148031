"""Measure the scripts against the lecture's own loops and against the bare network, side by side in one run.

  python tests/benchmark.py        five to ten minutes on 2 cores; prints a table in Markdown, asserts nothing

It makes photo-sized JPEGs and a VGG16 of seeded random weights (speed does not depend on their values), in a temporary
folder. What is compared is measured in turns, ROUNDS times, so that a noisy machine disturbs both sides alike; the
table holds medians.
"""
import contextlib
import importlib
import io
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, models

import common

precompute = importlib.import_module("04_precompute")
ROUNDS = 3
N_IMAGES = 64  # a batch of the lecture
N_FEATURES = 1024
DEVICE = common.get_device("auto")


def make_images(folder, n):
    """n photo-sized JPEGs in two classes for train, 2 for valid: smooth random shapes under a little noise."""
    rng = np.random.default_rng(0)
    for part, count in (("train", n), ("valid", 2)):
        for i in range(count):
            path = folder / part / common.CLASSES[i % 2] / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
            pixels = np.asarray(small.resize((500, 375))) + rng.normal(0, 6, (375, 500, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return folder


def link_images(source, folder, n):
    """A dataset of n images in train, each a link to one of those in source."""
    for part, count in (("train", n), ("valid", 2)):
        for i in range(count):
            animal = common.CLASSES[i % 2]
            (folder / part / animal).mkdir(parents=True, exist_ok=True)
            os.link(source / part / animal / f"{i % (N_IMAGES if part == 'train' else 2)}.jpg", folder / part / animal / f"{i}.jpg")
    return folder


def make_vgg(bf16=False):
    """Our model, as the scripts prepare it."""
    return common.to_device(common.freeze_and_replace_head(common.load_vgg16("untrained")), DEVICE, bf16)


def make_lecture_vgg():
    """The lecture's model: torchvision's default memory layout, float32."""
    torch.manual_seed(0)
    model = models.vgg16()
    for param in model.parameters():
        param.requires_grad = False
    model.classifier[6] = nn.Linear(4096, 2)
    model.classifier.add_module("7", nn.LogSoftmax(dim=1))
    return model.to(DEVICE)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.001)


def lecture_train(model, loader, head):
    """An epoch as the notebook writes it."""
    criterion, optimizer = nn.NLLLoss(), sgd(head)
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


def lecture_feature_loader(features, labels):
    """The notebook's list of samples."""
    samples = [(torch.from_numpy(row).reshape(-1), torch.tensor(label)) for row, label in zip(features, labels, strict=True)]
    return DataLoader(samples, batch_size=128, shuffle=True)


def bare_forward(layers, inputs, batch_size):
    """The network alone, on data in memory."""
    with torch.inference_mode():
        for batch in inputs.split(batch_size):
            layers(batch)


def bare_train(model, head, inputs, classes):
    """The classifier's forward and the head's step alone, on data in memory."""
    criterion, optimizer = nn.NLLLoss(), sgd(head)
    model.train()
    for batch, labels in zip(inputs.split(128), classes.split(128), strict=True):
        loss = criterion(model(batch), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def seconds(work):
    """Seconds that work() takes, what it prints kept quiet."""
    synchronize = torch.cuda.synchronize if DEVICE.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        work()
    synchronize()
    return time.perf_counter() - start


def in_turns(works):
    """{name: seconds, the median of ROUNDS}; the works take turns, after one turn to warm up."""
    for work in works.values():
        seconds(work)
    rounds = [{name: seconds(work) for name, work in works.items()} for _ in range(ROUNDS)]
    return {name: statistics.median(times[name] for times in rounds) for name in works}


def row(what, against, ours, theirs, reach):
    print(f"| {what} | {against} | {ours} | {theirs[0]} | {theirs[1]} | {reach} |", flush=True)


def speed_rows(folder):
    dset = datasets.ImageFolder(make_images(folder / "images", N_IMAGES) / "train", common.imagenet_format,
                                loader=common.load_image)
    cores = min(6, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    ours_options = common.loader_options(23_000, None, DEVICE)  # as for the whole dataset
    lecture_loader = DataLoader(dset, batch_size=64, shuffle=True, num_workers=cores)
    our_loader = DataLoader(dset, batch_size=64, shuffle=True, **ours_options)
    lecture, f32, bf16 = make_lecture_vgg(), make_vgg(), make_vgg(bf16=True)
    inputs = torch.stack([image for image, _ in dset]).to(DEVICE)
    batch_size = 8 if DEVICE.type == "cpu" else 64

    def our_precompute(model, name):
        path = folder / f"{name}_feat_train.npy"
        path.with_suffix(".json").unlink(missing_ok=True)
        precompute.preconvfeat(model.features, dset, path, {"files": name}, (512, 7, 7), DEVICE, ours_options)

    t = in_turns({
        "lecture": lambda: lecture_precompute(lecture, lecture_loader),
        "f32": lambda: our_precompute(f32, "f32"), "bf16": lambda: our_precompute(bf16, "bf16"),
        "bare f32": lambda: bare_forward(f32.features, inputs, batch_size),
        "bare bf16": lambda: bare_forward(bf16.features, inputs.bfloat16(), batch_size)})
    speed = {name: N_IMAGES / time for name, time in t.items()}
    for name, target in (("f32", "1.7x"), ("bf16", "3.2x")):
        row(f"precompute, {name}", "lecture's loop", f"{speed[name]:.1f} img/s",
            (f"{speed['lecture']:.1f} img/s", f"{speed[name] / speed['lecture']:.2f}x"), target)
    for name in ("f32", "bf16"):
        row(f"precompute, {name}", "bare forward", f"{speed[name]:.1f} img/s",
            (f"{speed['bare ' + name]:.1f} img/s", f"{speed[name] / speed['bare ' + name]:.0%}"), "90%")

    t = in_turns({
        "lecture": lambda: lecture_train(lecture, lecture_loader, lecture.classifier[6]),
        "f32": lambda: common.train_model(f32, our_loader, sgd(f32.classifier[6]), 1),
        "bf16": lambda: common.train_model(bf16, our_loader, sgd(bf16.classifier[6]), 1)})
    for name, target in (("f32", "1.7x"), ("bf16", "3.2x")):
        row(f"epoch on images, {name}", "lecture's loop", f"{N_IMAGES / t[name]:.1f} img/s",
            (f"{N_IMAGES / t['lecture']:.1f} img/s", f"{t['lecture'] / t[name]:.2f}x"), target)

    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, N_FEATURES)
    loaders = {}
    for name, shape in (("conv", (512, 7, 7)), ("fc7", (4096,))):
        np.save(folder / f"{name}.npy", rng.random((N_FEATURES, *shape), dtype=np.float32))
        loaders[name] = precompute.feature_loader(np.load(folder / f"{name}.npy", mmap_mode="r"), labels, 128, shuffle=True)
    conv = np.load(folder / "conv.npy")
    list_loader, classes = lecture_feature_loader(conv, labels), torch.from_numpy(labels).to(DEVICE)
    conv = torch.from_numpy(conv).flatten(1).to(DEVICE)
    t = in_turns({
        "lecture": lambda: lecture_train(lecture.classifier, list_loader, lecture.classifier[6]),
        "f32": lambda: common.train_model(f32.classifier, loaders["conv"], sgd(f32.classifier[6]), 1),
        "bf16": lambda: common.train_model(bf16.classifier, loaders["conv"], sgd(bf16.classifier[6]), 1),
        "bare": lambda: bare_train(f32.classifier, f32.classifier[6], conv, classes),
        "fc7": lambda: common.train_model(f32.classifier[6:], loaders["fc7"], sgd(f32.classifier[6]), 1)})
    speed = {name: N_FEATURES / time for name, time in t.items()}
    row("epoch on conv features, f32", "bare classifier", f"{speed['f32']:,.0f} img/s",
        (f"{speed['bare']:,.0f} img/s", f"{speed['f32'] / speed['bare']:.0%}"), "90%")
    for name, against, target in (("bf16", "lecture", "3.5x"), ("fc7", "f32", "100x")):
        row(f"epoch on {'fc7' if name == 'fc7' else 'conv'} features{'' if name == 'fc7' else ', ' + name}",
            "epoch on conv features" if name == "fc7" else "lecture's loop", f"{speed[name]:,.0f} img/s",
            (f"{speed[against]:,.0f} img/s", f"{speed[name] / speed[against]:.{0 if name == 'fc7' else 2}f}x"), target)


def run_script(*command):
    """Run a script; returns its seconds and, on Linux, the peak of its anonymous memory in bytes (else 0)."""
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)

    def watch():
        nonlocal peak
        while process.poll() is None:
            with contextlib.suppress(OSError, StopIteration):
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
                peak = max(peak, 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1]))
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    process.wait()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{command} failed")
    return time.perf_counter() - start, peak


def main():
    gpu = f", {torch.cuda.get_device_name()}" if DEVICE.type == "cuda" else ""
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads{gpu}, torch {torch.__version__}\n")
    print("| what | against | ours | theirs | ratio | aim |\n| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stderr(io.StringIO()):
        folder = Path(name)
        speed_rows(folder)
        weights = folder / "vgg16.pth"
        torch.save(common.load_vgg16("untrained").state_dict(), weights)
        peaks = {}
        for n in (200, 2000):
            data_dir = link_images(folder / "images", folder / str(n), n)
            _, peaks[n] = run_script(ROOT / "04_precompute.py", "--data-dir", data_dir, "--output-dir", folder / "out",
                                     "--weights", weights, "--epochs", 1)
        if all(peaks.values()):
            row("peak memory of 04, 2,000 images", "200 images", f"{peaks[2000] / 1e9:.2f} GB",
                (f"{peaks[200] / 1e9:.2f} GB", f"{peaks[2000] / peaks[200]:.3f}"), "within 5 %, < 1.6 GB")
        times = [run_script(ROOT / "03_finetune_head.py", "--sample", "--weights", weights, "--output-dir", folder / "out")[0]
                 for _ in range(3)]
        row("03 --sample, whole process", "-", f"{statistics.median(times):.1f} s", ("-", "-"), "< 12 s")


if __name__ == "__main__":
    main()
