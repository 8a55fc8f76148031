"""What the five scripts share: options, images, VGG16 and its head, the train and test loops, files."""
import argparse
import hashlib
import io
import json
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
import warnings
from datetime import timedelta
from pathlib import Path


class UserError(Exception):
    """A problem that the user can mend. Its one message names the file or the option and says what to do."""


def report(kind, error, traceback):
    """How a script ends: one line and status 1 where the user can mend it, 130 after Ctrl-C, a traceback for a bug."""
    text = str(error).strip()
    if sys.stderr.isatty():
        print(file=sys.stderr)  # a progress line may stand there
    if issubclass(kind, KeyboardInterrupt):
        print("stopped by Ctrl-C", file=sys.stderr)
        if not (sys.flags.interactive or hasattr(sys, "ps1")):  # python -i stays at its prompt
            raise SystemExit(130)
    elif issubclass(kind, UserError):
        # a DataLoader hands on a worker's error as a long text that ends in "common.UserError: message"
        print("error:", *text.rpartition("common.UserError: ")[2].splitlines(), file=sys.stderr)
    elif issubclass(kind, PermissionError):
        print(f"error: {error.filename}: permission denied; mend that, or take another folder", file=sys.stderr)
    elif issubclass(kind, RuntimeError) and text.startswith("DataLoader worker"):
        print("error: a worker process was killed (is memory short?): try --num-workers 0", file=sys.stderr)
    elif issubclass(kind, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text):
        print("error: out of memory: try a smaller --batch-size, or --device cpu", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = report  # before the slow imports, so that Ctrl-C during them is one line too
if multiprocessing.parent_process():  # a worker that imports this again, on macOS and Windows: the main process ends it
    signal.signal(signal.SIGINT, signal.SIG_IGN)

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import nn
from torchvision import datasets, models, transforms

HERE = Path(__file__).resolve().parent
CLASSES = ["cats", "dogs"]
IMAGENET = models.VGG16_Weights.IMAGENET1K_V1
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of ImageNet's red, green and blue, for values in [0, 1]

imagenet_format = transforms.Compose([
    transforms.CenterCrop(224),
    transforms.ToTensor(),
    transforms.Normalize(mean=MEAN, std=STD),
])

socket.setdefaulttimeout(30)  # seconds; torch.hub sets none, and a server that stalls would hang it for ever
warnings.simplefilter("error", Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", "Detected pickle protocol")  # of a file that torch.load goes on to refuse


# ------------------------------------------------------------------------------------------------ options and output
LIMITS = {"seed": (0, 2**63 - 1), "num_workers": (0, 256), "epochs": (1, 1_000_000), "lr": (0, 1_000),
          "batch_size": (1, 1_000_000), "n_view": (1, 100)}


def option_parser(doc, network=True):
    """The options of every script; with `network`, also those of the scripts that run VGG16."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("common options").add_argument
    add("--sample", action="store_true", help="run on 24 images: DIR/sample, else those that come with the scripts")
    add("--data-dir", type=Path, metavar="DIR", help="where train/ and valid/ are (default: data/dogscats)")
    add("--output-dir", type=Path, metavar="DIR", help="where results go (default: outputs/full, or outputs/sample)")
    add("--seed", type=int, default=0, metavar="N", help="seed of all randomness (default: 0)")
    add("--num-workers", type=int, metavar="N", help="processes that load images (default: by machine)")
    add("--show", action="store_true", help="also open each figure in a window; close it to go on")
    add("--pause", action="store_true", help="wait for Enter at each heading of the lecture")
    if network:
        add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="auto: a GPU if there is one")
        add("--weights", default="imagenet", metavar="imagenet|untrained|FILE",
            help="VGG16's weights: ImageNet's (528 MB, downloaded once), random ones, or a .pth file of yours")
        add("--bf16", action="store_true", help="frozen layers in bfloat16: faster, and the last digits change")
    return parser


def parse_options(parser):
    """Parse the command line, find the folders and print the options in force; returns argparse's namespace."""
    args = parser.parse_args()
    for name, (least, most) in LIMITS.items():
        value = getattr(args, name, None)
        if value is not None and not least <= value <= most:
            parser.error(f"argument --{name.replace('_', '-')}: {value} is not from {least} to {most}")
    args.output_dir = args.output_dir or HERE / "outputs" / ("sample" if args.sample else "full")
    args.data_dir = args.data_dir or HERE / "data" / "dogscats"
    if args.sample:
        args.data_dir = args.data_dir / "sample" if (args.data_dir / "sample").is_dir() else HERE / "sample"
    if hasattr(sys.stdout, "reconfigure"):  # not in IDLE or a notebook
        sys.stdout.reconfigure(errors="backslashreplace")  # a path may hold what the console can't print
    if not args.show:
        plt.switch_backend("Agg")  # draws without a display
    print("options:", *(f"{name}={value}" for name, value in vars(args).items() if value is not None))
    return args


def banner(heading, seconds, pause=False):
    """Print a heading of the lecture and where in the video its part begins; wait for Enter if `pause`."""
    video = f"video from {timedelta(seconds=seconds)}, https://youtu.be/ZhC-DIrCe6A?t={seconds}"
    print(f"\n{'=' * 80}\n{heading}\n  {video}\n{'=' * 80}")
    if pause and sys.stdin and sys.stdin.isatty():
        print("press Enter to go on ", end="", flush=True)
        sys.stdin.readline()


def progress(batches, total, unit="images", size=lambda batch: len(batch[-1])):
    """Hand on `total` batches; say on stderr how far it is, in place on a terminal, in a log in ever fewer lines."""
    end, due = ("\r", 0.2) if sys.stderr.isatty() else ("\n", 30)
    start, done = time.monotonic(), 0
    for i, batch in enumerate(batches, 1):
        yield batch
        done += size(batch)
        seconds = time.monotonic() - start
        if seconds >= due:
            left = timedelta(seconds=round(seconds / i * (total - i)))
            text = f"  {i / total:4.0%}, {done:,.0f} {unit}, {done / seconds:,.1f} {unit}/s, {left} left"
            print(f"{text:<59}", end=end, file=sys.stderr, flush=True)
            due = seconds + 0.2 if end == "\r" else 2 * seconds
    if end == "\r":
        print(" " * 59, end="\r", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------------------ images
def load_image(path, upright=False):
    """The RGB PIL image in a file, turned by its EXIF data if `upright`; UserError if damaged, no picture or huge."""
    try:
        with Image.open(path) as image:
            if upright:
                image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bits a pixel: convert("RGB") would turn all above 255 white
                image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"{path}: can't be read as a picture ({error}); replace or remove it") from error


def imshow(image, title=None):
    """Show a normalized image, a (3, H, W) tensor, or a PIL image as it is, on the current axes."""
    if isinstance(image, torch.Tensor):
        image = np.clip(np.array(STD) * image.numpy().transpose((1, 2, 0)) + np.array(MEAN), 0, 1)  # (H, W, 3)
    plt.imshow(image)
    plt.axis("off")
    title = str(title or "").encode(errors="backslashreplace").decode()  # a file's name may be no Unicode
    plt.title(title, fontsize="medium", parse_math=False)


def show_images(images, titles, heading):
    """A new figure: the images, as for imshow, each under its title and all under a heading."""
    columns = len(images) if len(images) in (1, 2, 3, 5) else 4
    rows = max(1, -(-len(images) // columns))
    plt.figure(figsize=(3 * max(columns, 3), 3.4 * rows + 0.4), layout="constrained")
    plt.suptitle(heading if len(images) else f"{heading}: none")
    for i, (image, title) in enumerate(zip(images, titles, strict=True), 1):
        plt.subplot(rows, columns, i)
        imshow(image, title)


def check_dataset(data_dir):
    """UserError unless train and valid each hold just cats and dogs, none empty. Decodes no image."""
    for folder in (data_dir / "train", data_dir / "valid"):
        if not folder.is_dir():
            raise UserError(f"{folder} is missing: run python 01_data.py first, or use --sample")
        counts = {entry.name: sum(map(datasets.folder.is_image_file, os.listdir(entry)))
                  for entry in os.scandir(folder) if entry.is_dir()}
        if sorted(counts) != CLASSES or 0 in counts.values():  # ImageFolder makes any folder a class, and shifts labels
            raise UserError(f"{folder}: an unexpected, missing or empty class: must hold {CLASSES}, does hold {counts}")


def loader_options(n_images, num_workers, device):
    """The DataLoader arguments that depend on the machine."""
    if num_workers is None:
        # one process decodes faster than a CPU runs VGG16, a GPU needs many; few images are done before they start
        num_workers = 0 if n_images < 500 else 1 if device.type == "cpu" else min(torch.get_num_threads(), 16)
    return {"num_workers": num_workers, "pin_memory": device.type == "cuda"}


# -------------------------------------------------------------------------------------------- device, VGG16, its head
def get_device(name, bf16=False):
    """The torch.device for auto, cpu, cuda or mps; UserError where the machine lacks it, or it can't do bfloat16."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(name for name in available if available[name])
    if not available[name]:
        raise UserError(f"--device {name}: this machine, or this torch, has none; use --device cpu")
    if bf16 and (name == "mps" or (name == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False))):
        raise UserError(f"--bf16: {name} does no bfloat16 on this machine; leave it out, or add --device cpu")
    if name == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 where the GPU has it, as cuDNN's convolutions do by default
    return torch.device(name)


def weights_file(weights):
    """The path of the weights: for "imagenet" the one where torch.hub keeps them, else `weights` itself."""
    return Path(torch.hub.get_dir(), "checkpoints", "vgg16-397923af.pth") if weights == "imagenet" else Path(weights)


def choose_weights(weights, sample):
    """Download VGG16's ImageNet weights (528 MB) if they are asked for and not there yet. Returns `weights`, or where
    they can't be had "untrained", after a loud notice, in a --sample run, and UserError in a full one."""
    path = weights_file("imagenet")
    if weights == "imagenet" and not path.exists():
        print(f"downloading VGG16's ImageNet weights (528 MB) to {path}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(IMAGENET.url, path, "397923af", progress=sys.stderr.isatty())
        except Exception as error:  # the disk, the network in all its ways, or another hash than in the file's name
            problem = (f"VGG16's ImageNet weights can't be downloaded ({error}): get {IMAGENET.url} with a browser and "
                       f"save it as {path}, or use --weights FILE or --weights untrained")
            if not sample:
                raise UserError(problem) from error
            print(problem)
            weights = "untrained"
    if weights == "untrained":
        print("*" * 80, "NOTICE: untrained weights. VGG16 is random here: every step runs, but what it predicts",
              "means nothing, and no number below says how well the lecture's network does.", "*" * 80, sep="\n")
    return weights


def load_vgg16(weights):
    """torchvision's VGG16; weights: "imagenet", "untrained" (random, always the same) or a file, else UserError."""
    if weights == "untrained":
        torch.manual_seed(0)
        return models.vgg16()
    with torch.device("meta"):  # takes no memory or time: 138 million random numbers would only be overwritten
        model = models.vgg16()
    remedy = "delete it if it is there and run again" if weights == "imagenet" else "give another file to --weights"
    return load_state(model, weights_file(weights), remedy)


def freeze_and_replace_head(model):
    """Freeze all of VGG16, then make its last layer a new, trainable one for 2 classes, with log-probabilities out."""
    for param in model.parameters():
        param.requires_grad = False
    model.classifier[6] = nn.Linear(4096, 2)
    model.classifier.add_module("7", nn.LogSoftmax(dim=1))
    return model


def to_device(model, device, bf16=False):
    """Move VGG16 to the device; with bf16, all layers but the last are bfloat16 and the last one is given float32."""
    if bf16:  # cast once: autocast would cast the frozen weights again at every batch
        model.features.to(torch.bfloat16)
        model.classifier[:6].to(torch.bfloat16)
        model.classifier[6].register_forward_pre_hook(lambda layer, inputs: inputs[0].float())
    # channels_last, a pixel's channels side by side, is faster but for MPS, where some layers get it wrong
    return model.to(device, memory_format=torch.contiguous_format if device.type == "mps" else torch.channels_last)


# ---------------------------------------------------------------------------------------------- train and test loops
def train_model(model, loader, optimizer, epochs, criterion=nn.NLLLoss()):
    """Train what the optimizer holds on the loader's (inputs, classes), with a line per epoch. Returns [(mean loss per
    image, accuracy), ...], one per epoch, measured as it trains: with dropout on."""
    model.train()
    first = next(model.parameters())  # inputs go to its device and type
    history = []
    for epoch in range(1, epochs + 1):
        start = time.perf_counter()
        running_loss = running_corrects = size = 0
        for inputs, classes in progress(loader, len(loader)):
            inputs = inputs.to(first.device, first.dtype, non_blocking=True)
            classes = classes.to(first.device, non_blocking=True)
            outputs = model(inputs)  # (B, 2) log-probabilities
            loss = criterion(outputs, classes)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            preds = outputs.argmax(dim=1)
            # statistics; they stay on the device: .item() would make a GPU wait at every batch
            running_loss += loss.detach() * len(classes)
            running_corrects += (preds == classes).sum()
            size += len(classes)
        epoch_loss, epoch_acc = running_loss.item() / size, running_corrects.item() / size
        seconds = time.perf_counter() - start
        print(f"epoch {epoch:2}/{epochs}  loss {epoch_loss:.4f}  accuracy {epoch_acc:.4f}  {seconds:.2f} s")
        history.append((epoch_loss, epoch_acc))
    return history


@torch.inference_mode()
def test_model(model, loader, criterion=nn.NLLLoss()):
    """Run the model over the loader, in eval mode and without gradients. Returns predictions (M,) int64, all_proba
    (M, 2) float32 probabilities, all_classes (M,) int64, and the mean loss per image and the accuracy."""
    model.eval()
    first = next(model.parameters())
    batches = [(model(inputs.to(first.device, first.dtype, non_blocking=True)).cpu(), classes)
               for inputs, classes in progress(loader, len(loader))]
    outputs, all_classes = (torch.cat(parts) for parts in zip(*batches, strict=True))  # (M, 2), (M,)
    predictions = outputs.argmax(dim=1)
    loss, accuracy = criterion(outputs, all_classes).item(), (predictions == all_classes).double().mean().item()
    print(f"loss {loss:.4f}  accuracy {accuracy:.4f}")
    return predictions.numpy(), outputs.exp().numpy(), all_classes.numpy(), loss, accuracy


# ------------------------------------------------------------------------------------------------------------- files
WRITERS = {
    ".npy": lambda file, array: np.save(file, array, allow_pickle=False),
    ".pt": lambda file, state_dict: torch.save(state_dict, file),
    ".png": lambda file, figure: figure.savefig(file),
    ".json": lambda file, content: file.write(json.dumps(content, indent=1, default=str).encode()),
    ".csv": lambda file, text: file.write(text.encode()),
}


def save(folder, files):
    """Write {name: content}, all whole or none; UserError where the disk refuses. The last of several vouches for the
    rest: it goes first and comes back last, so that half a set never passes for a whole one."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".part", dir=folder) as parts:
            for name, content in files.items():
                buffer = io.BytesIO()  # on a full disk torch.save and np.save raise all kinds of errors, a file OSError
                WRITERS[Path(name).suffix](buffer, content)
                with open(Path(parts, name), "wb") as file:
                    file.write(buffer.getbuffer())
                    file.flush()
                    os.fsync(file.fileno())
            if len(files) > 1:
                (folder / name).unlink(missing_ok=True)
            for name in files:
                os.replace(Path(parts, name), folder / name)
    except OSError as error:
        raise UserError(f"{folder}: can't be written ({error.strerror}); make room or change --output-dir") from error
    print("saved", *(folder / name for name in files), sep="\n  " if len(files) > 1 else " ")


def save_figure(path, show=False):
    """Save the current figure, open it in a window if `show`, and close it."""
    save(path.parent, {path.name: plt.gcf()})
    if show:
        plt.show()
    plt.close()


def load(path, remedy):
    """A saved array (memory-mapped), dict or state dict; UserError where it is missing, damaged, or could run code."""
    if not path.is_file():
        raise UserError(f"{path} is missing: {remedy}")
    try:
        if path.suffix == ".npy":
            return np.load(path, mmap_mode="r", allow_pickle=False)
        if path.suffix == ".json":
            return dict(json.loads(path.read_text()))
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can set off any
        raise UserError(f"{path} is damaged or unsafe ({type(error).__name__}): {remedy}") from error


def load_state(module, path, remedy):
    """The module with the tensors of a state dict file in place of its own; UserError unless names and shapes fit."""
    try:
        module.load_state_dict(load(path, remedy), assign=True)
        return module.float()
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UserError(f"{path} holds other layers than {type(module).__name__}'s: {remedy}") from error


def weights_hash(model):
    """SHA-256 of a model's weights."""
    hashes = [hashlib.sha256(value.numpy()).digest() for value in model.state_dict().values()]
    return hashlib.sha256(b"".join(hashes)).hexdigest()


def files_hash(dset):
    """SHA-256 of the names, sizes and times of an ImageFolder's files, in its order."""
    files = [(os.path.relpath(path, dset.root), os.path.getsize(path), os.path.getmtime(path)) for path, _ in dset.imgs]
    return hashlib.sha256(str(files).encode()).hexdigest()
