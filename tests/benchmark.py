"""Measure the scripts against the lecture's own loops and against the bare network, side by side in one run.

  python tests/benchmark.py        about ten minutes on 2 cores; prints a table in Markdown, asserts nothing

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
from torch.utils.data import DataLoader, TensorDataset
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


def run_here(name, *options):
    """Run a script's body in this process, quietly; returns its variables."""
    variables, argv = {"__name__": "__main__", "__doc__": ""}, sys.argv
    sys.argv = [name, *map(str, options)]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile((ROOT / name).read_text(), name, "exec"), variables)
    finally:
        sys.argv = argv
    return variables


LECTURE_03 = """
import sys, numpy as np, torch, torchvision, matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
from torch import nn
from torchvision import datasets, models, transforms
sys.path[:0] = [{root!r}, {tests!r}]
import benchmark
form = benchmark.common.imagenet_format
dsets = {{x: datasets.ImageFolder({sample!r} + "/" + x, form) for x in ["train", "valid"]}}
loaders = {{x: torch.utils.data.DataLoader(dsets[x], batch_size=size, shuffle=x == "train", num_workers=6)
           for x, size in (("train", 64), ("valid", 5))}}
model = benchmark.make_lecture_vgg({weights!r})
for _ in range(2):
    benchmark.lecture_train(model, loaders["train"], model.classifier[6])
model.eval()
for inputs, classes in loaders["valid"]:
    model(inputs)
inputs, classes = next(iter(loaders["valid"]))
print(torch.exp(model(inputs)))
plt.imshow(torchvision.utils.make_grid(inputs).numpy().transpose((1, 2, 0)).clip(0, 1))
plt.savefig({out!r} + "/lecture.png")
"""


def make_lecture_vgg(weights):
    """The lecture's model: torchvision's default memory layout, float32."""
    model = models.vgg16()
    model.load_state_dict(torch.load(weights, weights_only=True))
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


def bare_train(model, head, inputs, classes, batch_size=128):
    """The forward pass and the head's step alone, on data in memory."""
    criterion, optimizer = nn.NLLLoss(), sgd(head)
    model.train()
    for batch, labels in zip(inputs.split(batch_size), classes.split(batch_size), strict=True):
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


def speed_rows(folder, weights):
    dset = datasets.ImageFolder(make_images(folder / "images", N_IMAGES) / "train", common.imagenet_format,
                                loader=common.load_image)
    cores = min(6, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    ours_options = common.loader_options(23_000, None, DEVICE)  # as for the whole dataset
    lecture_loader = DataLoader(dset, batch_size=64, shuffle=True, num_workers=cores)
    our_loader = DataLoader(dset, batch_size=64, shuffle=True, **ours_options)
    options = ["--data-dir", folder / "images", "--output-dir", folder / "speed", "--weights", weights, "--epochs", 1]
    scripts = {"f32": run_here("04_precompute.py", *options), "bf16": run_here("04_precompute.py", *options, "--bf16")}
    lecture, f32, bf16 = make_lecture_vgg(weights), scripts["f32"]["model_vgg"], scripts["bf16"]["model_vgg"]
    inputs, classes = (torch.stack(parts) for parts in zip(*[(image, torch.tensor(label)) for image, label in dset], strict=True))
    inputs, classes = inputs.to(DEVICE), classes.to(DEVICE)
    batch_size = scripts["f32"]["batch_size"]

    def our_precompute(name):
        rows = precompute.FeatureFile(folder / f"{name}_feat_{time.time()}.npy", (N_IMAGES, 512, 7, 7), {}, batch_size)
        scripts[name]["preconvfeat"](DataLoader(dset, batch_size=batch_size, **ours_options), rows)

    t = in_turns({
        "lecture": lambda: lecture_precompute(lecture, lecture_loader),
        "f32": lambda: our_precompute("f32"), "bf16": lambda: our_precompute("bf16"),
        "bare f32": lambda: bare_forward(f32.features, inputs, batch_size),
        "bare bf16": lambda: bare_forward(bf16.features, inputs, batch_size)})
    speed = {name: N_IMAGES / time for name, time in t.items()}
    for name, target in (("f32", "1.7x"), ("bf16", "3.2x")):
        row(f"precompute, {name}", "lecture's loop", f"{speed[name]:.1f} img/s",
            (f"{speed['lecture']:.1f} img/s", f"{speed[name] / speed['lecture']:.2f}x"), target)
    for name in ("f32", "bf16"):
        row(f"precompute, {name}", "bare forward", f"{speed[name]:.1f} img/s",
            (f"{speed['bare ' + name]:.1f} img/s", f"{speed[name] / speed['bare ' + name]:.0%}"), "90%")

    t = in_turns({
        "lecture": lambda: lecture_train(lecture, lecture_loader, lecture.classifier[6]),
        "f32": lambda: common.train_model(f32, our_loader, N_IMAGES, 1, sgd(f32.classifier[6])),
        "bf16": lambda: common.train_model(bf16, our_loader, N_IMAGES, 1, sgd(bf16.classifier[6])),
        "bare f32": lambda: bare_train(f32, f32.classifier[6], inputs, classes, 64),
        "bare bf16": lambda: bare_train(bf16, bf16.classifier[6], inputs, classes, 64)})
    for name, target in (("f32", "1.7x"), ("bf16", "3.2x")):
        row(f"epoch on images, {name}", "lecture's loop", f"{N_IMAGES / t[name]:.1f} img/s",
            (f"{N_IMAGES / t['lecture']:.1f} img/s", f"{t['lecture'] / t[name]:.2f}x"), target)
    for name in ("f32", "bf16"):
        row(f"epoch on images, {name}", "bare network", f"{N_IMAGES / t[name]:.1f} img/s",
            (f"{N_IMAGES / t['bare ' + name]:.1f} img/s", f"{t['bare ' + name] / t[name]:.0%}"), "90%")

    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, N_FEATURES)
    loaders = {}
    for name, shape in (("conv", (512, 7, 7)), ("fc7", (4096,))):
        np.save(folder / f"{name}.npy", rng.random((N_FEATURES, *shape), dtype=np.float32))
        rows = torch.from_numpy(np.load(folder / f"{name}.npy", mmap_mode="r")).flatten(1)
        loaders[name] = DataLoader(TensorDataset(rows, torch.from_numpy(labels)), batch_size=128, shuffle=True)
    conv = np.load(folder / "conv.npy")
    list_loader, classes = lecture_feature_loader(conv, labels), torch.from_numpy(labels).to(DEVICE)
    conv = torch.from_numpy(conv).flatten(1).to(DEVICE)
    t = in_turns({
        "lecture": lambda: lecture_train(lecture.classifier, list_loader, lecture.classifier[6]),
        "f32": lambda: common.train_model(f32.classifier, loaders["conv"], N_FEATURES, 1, sgd(f32.classifier[6])),
        "bf16": lambda: common.train_model(bf16.classifier, loaders["conv"], N_FEATURES, 1, sgd(bf16.classifier[6])),
        "bare": lambda: bare_train(f32.classifier, f32.classifier[6], conv, classes),
        "fc7": lambda: common.train_model(f32.classifier[6:], loaders["fc7"], N_FEATURES, 1, sgd(f32.classifier[6]))})
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
        weights = folder / "vgg16.pth"
        torch.save(common.load_vgg16("untrained").state_dict(), weights)
        speed_rows(folder, weights)
        peaks = {}
        for n in (200, 2000):
            data_dir = link_images(folder / "images", folder / str(n), n)
            _, peaks[n] = run_script(ROOT / "04_precompute.py", "--data-dir", data_dir, "--output-dir", folder / "out",
                                     "--weights", weights, "--epochs", 1)
        if all(peaks.values()):
            row("peak memory of 04, 2,000 images", "200 images", f"{peaks[2000] / 1e9:.2f} GB",
                (f"{peaks[200] / 1e9:.2f} GB", f"{peaks[2000] / peaks[200]:.3f}"), "within 5 %, < 1.6 GB")
        lecture = folder / "lecture.py"
        lecture.write_text(LECTURE_03.format(root=str(ROOT), tests=str(ROOT / "tests"), sample=str(ROOT / "sample"),
                                             weights=str(weights), out=str(folder)))
        options = ["--sample", "--weights", weights, "--output-dir", folder / "out"]
        times = [(run_script(ROOT / "03_finetune_head.py", *options)[0], run_script(lecture)[0]) for _ in range(ROUNDS)]
        ours, theirs = (statistics.median(side) for side in zip(*times, strict=True))
        row("03 --sample, whole process", "lecture's cells", f"{ours:.1f} s", (f"{theirs:.1f} s", f"{theirs / ours:.2f}x"), "1x")


if __name__ == "__main__":
    main()
