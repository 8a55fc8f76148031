"""What the five scripts share. First the lecture's own: images, VGG16, training and testing. From "To keep the scripts
short" on, what spares them the rest: options, the checks of a dataset, figures, files that are whole or not there."""
import argparse
import contextlib
import hashlib
import io
import json
import os
import socket
import sys
import tempfile
import time
import warnings
from datetime import timedelta
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import nn
from torchvision import datasets, models, transforms

# ImageNet's mean and standard deviation of red, green and blue, for pixels in [0, 1]: VGG16 was trained with these.
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

imagenet_format = transforms.Compose([
    transforms.CenterCrop(224),
    transforms.ToTensor(),
    transforms.Normalize(mean=MEAN, std=STD),
])


def imshow(image, title=None):
    """Show a normalized image, a (3, H, W) tensor, or a PIL image as it is, on the current axes. For a row of images
    from make_grid the title may be a list of names: each is written over its own image."""
    if isinstance(image, torch.Tensor):
        image = np.clip(np.array(STD) * image.numpy().transpose((1, 2, 0)) + np.array(MEAN), 0, 1)  # (H, W, 3)
    plt.imshow(image)
    plt.axis("off")
    if isinstance(title, list):
        for i, name in enumerate(title):
            plt.text((i + 0.5) * image.shape[1] / len(title), -8, name, ha="center")
    elif title is not None:
        title = str(title).encode(errors="backslashreplace").decode()  # a file's name may be no Unicode
        plt.title(title, fontsize="medium", parse_math=False)


def load_vgg16(weights):
    """torchvision's VGG16; weights: "imagenet", "untrained" (random, always the same) or a file, else UserError."""
    if weights == "untrained":
        torch.manual_seed(0)
        return models.vgg16()
    with torch.device("meta"):  # takes no memory or time: 138 million random numbers would only be overwritten
        model = models.vgg16()
    if weights == "imagenet":
        return load_state(model, IMAGENET_FILE, "delete it if it is there, and run again")
    return load_state(model, Path(weights), "give another file to --weights")


def freeze_and_replace_head(model):
    """The steps of 03_finetune_head.py: freeze VGG16 and make its last layer a new one for 2 classes."""
    for param in model.parameters():
        param.requires_grad = False
    model.classifier[6] = nn.Linear(4096, 2)
    model.classifier.append(nn.LogSoftmax(dim=1))
    return model


def to_device(model, device, bf16=False):
    """Move VGG16 to the device. With bf16 its layers but the last compute in bfloat16; they take and give float32."""
    if bf16:  # cast once: autocast would cast the frozen weights again at every batch
        for part in (model.features, model.classifier[:6]):
            part.to(torch.bfloat16)
            part[0].register_forward_pre_hook(lambda layer, inputs: inputs[0].bfloat16())
            part[-1].register_forward_hook(lambda layer, inputs, outputs: outputs.float())
    # channels_last, a pixel's channels side by side, is faster but for MPS, where some layers get it wrong
    return model.to(device, memory_format=torch.contiguous_format if device.type == "mps" else torch.channels_last)


def train_model(model, dataloader, size, epochs=1, optimizer=None, criterion=nn.NLLLoss(), history=None):
    """Train what the optimizer holds on `size` images, batches of (inputs, classes). A line per epoch: mean loss per
    image and accuracy, measured while it learns, with dropout on; `history`, a list, gets (loss, accuracy, seconds)."""
    model.train()
    device = next(model.parameters()).device
    for epoch in range(1, epochs + 1):
        start = time.perf_counter()
        running_loss = 0.0
        running_corrects = 0
        for inputs, classes in progress(dataloader, len(dataloader)):
            inputs = inputs.to(device, non_blocking=True)
            classes = classes.to(device, non_blocking=True)
            outputs = model(inputs)  # (B, 2) log-probabilities
            loss = criterion(outputs, classes)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            preds = outputs.argmax(dim=1)
            # statistics; they stay on the device: .item() would make a GPU wait at every batch
            running_loss += loss.detach() * len(classes)  # the loss is the mean of a batch
            running_corrects += (preds == classes).sum()
        epoch_loss = running_loss.item() / size
        epoch_acc = running_corrects.item() / size
        seconds = time.perf_counter() - start
        print(f"epoch {epoch:2}/{epochs}  loss {epoch_loss:.4f}  accuracy {epoch_acc:.4f}  {seconds:.2f} s")
        if history is not None:
            history.append((epoch_loss, epoch_acc, seconds))


@torch.inference_mode()
def test_model(model, dataloader, size, criterion=nn.NLLLoss()):
    """Run the model over `size` images without dropout or gradients; print mean loss and accuracy. Returns predictions
    (size,) int64, all_proba (size, 2) float32 probabilities, all_classes (size,) int64."""
    model.eval()
    device = next(model.parameters()).device
    predictions = np.zeros(size, dtype=np.int64)
    all_classes = np.zeros(size, dtype=np.int64)
    all_proba = np.zeros((size, 2), dtype=np.float32)
    i = 0
    running_loss = 0.0
    for inputs, classes in progress(dataloader, len(dataloader)):
        outputs = model(inputs.to(device, non_blocking=True)).cpu()  # (B, 2) log-probabilities
        running_loss += criterion(outputs, classes).item() * len(classes)
        predictions[i:i + len(classes)] = outputs.argmax(dim=1).numpy()
        all_classes[i:i + len(classes)] = classes.numpy()
        all_proba[i:i + len(classes)] = outputs.exp().numpy()
        i += len(classes)
    accuracy = np.sum(predictions[:i] == all_classes[:i]) / size
    print(f"test on {size:,} images  loss {running_loss / size:.4f}  accuracy {accuracy:.4f}")
    return predictions, all_proba, all_classes


# ======================================================================================== To keep the scripts short
HERE = Path(__file__).resolve().parent
CLASSES = ["cats", "dogs"]
IMAGENET = models.VGG16_Weights.IMAGENET1K_V1
IMAGENET_FILE = Path(torch.hub.get_dir(), "checkpoints", "vgg16-397923af.pth")  # where torchvision keeps them too
LIMITS = {"seed": (0, 2**63 - 1), "num_workers": (0, 256), "limit": (2, 1_000_000), "epochs": (1, 1_000_000),
          "lr": (0, 1_000), "batch_size": (1, 1_000_000), "n_view": (1, 100)}

socket.setdefaulttimeout(30)  # seconds; torch.hub sets none, and a server that stalls would hang it for ever
warnings.simplefilter("error", Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", "Detected pickle protocol")  # of a file that torch.load goes on to refuse


class UserError(Exception):
    """A problem that the user can mend. Its one message names the file or the option and says what to do."""


@contextlib.contextmanager
def naming(path, problem="can't be written", remedy="mend that, or take another folder"):
    """Turn any error inside it into a UserError that names the file, which a full disk's does not, and the remedy."""
    try:
        yield
    except Exception as error:  # a damaged file can set off any
        why = (error.strerror or error) if isinstance(error, OSError) else type(error).__name__
        raise UserError(f"{path}: {problem} ({why}): {remedy}") from error


def report(kind, error, traceback):
    """How a script ends: one line and status 1 where the user can mend it, 130 after Ctrl-C, a traceback for a bug."""
    if torch.utils.data.get_worker_info():
        return  # called by a thread of a worker that Ctrl-C has cut off; the main process says what there is to say
    text = str(error).strip()
    if issubclass(kind, BrokenPipeError):  # whoever reads the output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141)  # as a shell reports it of other programs
    if issubclass(kind, KeyboardInterrupt):
        line = "\nstopped by Ctrl-C"  # a terminal has shown ^C
    elif issubclass(kind, UserError):
        # a DataLoader hands on a worker's error as a long text that ends in "common.UserError: message"
        line = "error: " + " ".join(text.rpartition("common.UserError: ")[2].splitlines())
    elif issubclass(kind, OSError):
        line = f"error: {error.filename or 'a file'}: {error.strerror or text}; mend that, or take another folder"
    elif issubclass(kind, RuntimeError) and text.startswith("DataLoader worker"):
        line = "error: a worker process was killed (is memory short?): try --num-workers 0"
    elif issubclass(kind, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text):
        line = "error: out of memory: try a smaller --batch-size, or --device cpu"
    else:
        sys.__excepthook__(kind, error, traceback)
        return
    print(line, file=sys.stderr)
    if issubclass(kind, KeyboardInterrupt) and not (sys.flags.interactive or hasattr(sys, "ps1")):
        raise SystemExit(130)  # python -i stays at its prompt


sys.excepthook = report


# ---------------------------------------------------------------------------------------------------------- options
def option_parser(doc, network=True):
    """The options of every script; with `network`, also those of the scripts that run VGG16."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    common = parser.add_argument_group("common options")
    size = common.add_mutually_exclusive_group().add_argument
    size("--sample", action="store_true", help="run on 24 images: DIR/sample, else those that come with the scripts")
    size("--limit", type=int, metavar="N", help="run on N training images, half of each class, and N/10 to validate")
    add = common.add_argument
    add("--data-dir", type=Path, metavar="DIR", help="where train/ and valid/ are (default: data/dogscats)")
    add("--output-dir", type=Path, metavar="DIR", help="where results go (default: outputs/full, sample or limit-N)")
    add("--seed", type=int, default=0, metavar="N", help="seed of all randomness but --weights untrained (default: 0)")
    add("--num-workers", type=int, metavar="N", help="processes that load images (default: 0 without a GPU)")
    add("--show", action="store_true", help="also open each figure in a window; close it to go on")
    add("--pause", action="store_true", help="wait for Enter at each heading that has its minute in the video")
    if network:
        add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="auto: a GPU if there is one")
        add("--weights", default="imagenet", metavar="imagenet|untrained|FILE",
            help="VGG16's weights: ImageNet's (528 MiB, downloaded once), random ones, or a .pth file of yours")
        add("--bf16", action="store_true", help="frozen layers in bfloat16, for GPUs that have it and CPUs with "
            "AVX-512 BF16 or AMX: faster there, several times slower on other CPUs; the last digits change")
    return parser


def parse_options(parser):
    """Parse the command line, find the folders, print the options in force; returns argparse's namespace. What would
    stop the script at its end is tried first: OSError where no results can be written, UserError for a bad photo."""
    in_notebook = Path(sys.argv[0]).stem == "ipykernel_launcher"
    args = parser.parse_args(["--sample", "--show"] if in_notebook else None)
    for name, (least, most) in LIMITS.items():
        value = getattr(args, name, None)
        if value is not None and not least <= value <= most:
            parser.error(f"argument --{name.replace('_', '-')}: {value} is not from {least} to {most}")
    size = "sample" if args.sample else f"limit-{args.limit}" if args.limit else "full"
    args.output_dir = args.output_dir or HERE / "outputs" / size
    args.data_dir = args.data_dir or HERE / "data" / "dogscats"
    if args.sample:
        args.data_dir = args.data_dir / "sample" if (args.data_dir / "sample").is_dir() else HERE / "sample"
    if args.num_workers is None:  # a GPU needs many; a CPU that runs VGG16 loads an image in 1 or 2 % of the time
        on_gpu = torch.accelerator.is_available() and getattr(args, "device", "cpu") != "cpu"
        args.num_workers = min(torch.get_num_threads(), 16) if on_gpu and not args.sample else 0
    if hasattr(sys.stdout, "reconfigure"):  # not in IDLE or a notebook
        # a path may hold what the console can't print; and a closed pipe is noticed at the next line
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    print("options:", *(f"{name}={value}" for name, value in vars(args).items() if value is not None))
    if in_notebook:
        print('In a notebook the options are --sample --show. For others, type before the first cell: import sys;\n'
              'sys.argv = ["script", "--limit", "1000", "--show"]. Or run a whole script: %run SCRIPT --limit 1000')
    try:
        inline = "inline" in os.environ.get("MPLBACKEND", "")  # the one of notebooks
        plt.switch_backend(plt.get_backend() if args.show or inline else "Agg")  # Agg draws without a display
    except ImportError:  # the backend in MPLBACKEND needs one
        plt.switch_backend("Agg")
    if args.show and plt.get_backend().lower() == "agg":
        print("--show: there is no display here; the figures are only saved")
        args.show = False
    args.output_dir.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryDirectory(dir=args.output_dir).cleanup()
    for path in getattr(args, "image", []):
        load_image(path, upright=True)
    return args


def banner(heading, seconds=None, pause=False):
    """Print a heading of the lecture. With `seconds`, where in the video it begins, also wait for Enter if `pause`."""
    print(f"\n{('=' if seconds else '-') * 80}\n{heading}")
    if seconds:
        print(f"  video from {timedelta(seconds=seconds)}, https://youtu.be/ZhC-DIrCe6A?t={seconds}")
        if pause and sys.stdin and sys.stdin.isatty():
            print("press Enter to go on ", end="", flush=True)
            sys.stdin.readline()


def progress(batches, total):
    """Hand on `total` batches; say on stderr how far it is: after 10 seconds, and again at 1.5 times that."""
    start, due = time.monotonic(), 10
    for i, batch in enumerate(batches, 1):
        yield batch
        seconds = time.monotonic() - start
        if seconds >= due and i < total:
            left = timedelta(seconds=round(seconds / i * (total - i)))
            print(f"  {i / total:4.0%}, {left} left", file=sys.stderr)
            due = 1.5 * seconds


# -------------------------------------------------------------------------------------- images, device and weights
def load_image(path, upright=False):
    """The RGB PIL image in a file, turned by its EXIF data if `upright`; UserError if damaged, no picture or huge."""
    with naming(path, "can't be read as a picture", "mend, replace or remove it"), Image.open(path) as image:
        if upright:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits a pixel: convert("RGB") would turn all above 255 white
            image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
        return image.convert("RGB")


def check_dataset(data_dir):
    """UserError unless train and valid each hold images of cats and of dogs, and no other folders or dead links, which
    ImageFolder would take for classes or images. Opens no image."""
    for folder in (data_dir / "train", data_dir / "valid"):
        if not folder.is_dir():
            raise UserError(f"{folder} is missing: run python 01_data.py first, or use --sample")
        counts = {place.name: sum(map(datasets.folder.is_image_file, os.listdir(place)))
                  for place in folder.iterdir() if place.is_dir()}
        if sorted(counts) != CLASSES or 0 in counts.values():  # ImageFolder makes any folder a class, and shifts labels
            raise UserError(f"{folder}: an unexpected, missing or empty class: must hold {CLASSES}, does hold {counts}")
        for path in folder.glob("*/*"):
            if not path.is_file():  # ImageFolder goes into folders, and meets dead links in the middle of the work
                raise UserError(f"{path}: a folder, or a link to nothing, among the images; move it away")


def limit_images(dsets, n):
    """Keep n training images, half of each class, and n / 10 to validate, at least one of each, evenly spaced."""
    for x, n_images in (("train", n), ("valid", n // 10)):
        kept = []
        for label in [0, 1]:
            of_class = [sample for sample in dsets[x].samples if sample[1] == label]
            n_class = min(max(1, (n_images + label) // 2), len(of_class))  # of an odd number one dog more
            kept += [of_class[i * len(of_class) // n_class] for i in range(n_class)]
        dsets[x].samples = dsets[x].imgs = kept  # ImageFolder has one list under both names
        dsets[x].targets = [label for _, label in kept]


def load_data(args, batch_size=64):
    """The steps of 01_data.py, for the scripts that follow: device, dsets, loader_train, loader_valid."""
    device = get_device(args.device, args.bf16)
    check_dataset(args.data_dir)
    dsets = {x: datasets.ImageFolder(args.data_dir / x, imagenet_format, loader=load_image) for x in ["train", "valid"]}
    if args.limit:
        limit_images(dsets, args.limit)
    options = {"num_workers": args.num_workers, "pin_memory": device.type == "cuda"}
    print(f"{len(dsets['train']):,} images to train, {len(dsets['valid']):,} to validate")
    loader_train = torch.utils.data.DataLoader(dsets["train"], batch_size=batch_size, shuffle=True, **options)
    loader_valid = torch.utils.data.DataLoader(dsets["valid"], batch_size=5, shuffle=False, **options)
    return device, dsets, loader_train, loader_valid


def get_device(name, bf16=False):
    """The torch.device for auto, cpu, cuda or mps; UserError where there is none, or a GPU that can't do bfloat16."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = "cuda" if available["cuda"] else "mps" if available["mps"] else "cpu"
    if not available[name]:
        raise UserError(f"--device {name}: this machine, or this torch, has none; use --device cpu")
    if bf16 and (name == "mps" or (name == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False))):
        raise UserError(f"--bf16: {name} does no bfloat16 on this machine; leave it out, or add --device cpu")
    if bf16 and name == "cpu" and not torch.cpu._is_avx512_bf16_supported():  # get_cpu_capability() can't tell
        print("NOTICE: --bf16: this CPU has no AVX-512 BF16: unless it is an Arm CPU with bfloat16, expect it to be "
              "several times slower than without --bf16")
    return torch.device(name)


def choose_weights(args):
    """Download VGG16's ImageNet weights if they are asked for and not there; where that fails a --sample run goes on
    untrained (args.weights tells), others end in UserError. Returns "" or ", untrained weights", for titles."""
    if args.weights == "imagenet" and not IMAGENET_FILE.exists():
        print(f"downloading VGG16's ImageNet weights (528 MiB) to {IMAGENET_FILE}")
        try:
            IMAGENET_FILE.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(IMAGENET.url, IMAGENET_FILE, "397923af", progress=sys.stderr.isatty())
        except Exception as error:  # the disk, the network in all its ways, or another hash than in the file's name
            problem = (f"VGG16's ImageNet weights can't be downloaded ({error}): get {IMAGENET.url} with a browser and "
                       f"save it as {IMAGENET_FILE}, or use --weights FILE or --weights untrained")
            if not args.sample:
                raise UserError(problem) from error
            print(problem)
            args.weights = "untrained"
    if args.weights != "untrained":
        return ""
    print("*" * 80, "NOTICE: untrained weights. VGG16 is random here: every step runs, but what it predicts",
          "means nothing, and no number below says how well the lecture's network does.", "*" * 80, sep="\n")
    return ", untrained weights"


# ----------------------------------------------------------------------------------------------------------- figures
def show_predictions(images, paths, classes, proba, heading):
    """A figure of images, as for imshow, under a heading: over each its true class, the prediction with its
    probability and the file's name, in red where that is wrong. proba: (B, 2), for cats and dogs."""
    rows = (len(images) + 3) // 4
    plt.figure(figsize=(12, 3.6 * max(rows, 1) + 0.4), layout="constrained")
    plt.gcf().get_layout_engine().set(h_pad=0.1)  # inches, without which a high image's title may touch the heading
    plt.suptitle(heading)
    for i, image in enumerate(images):
        true, pred = CLASSES[classes[i]][:-1], CLASSES[proba[i].argmax()][:-1]  # [:-1]: cat for cats
        plt.subplot(rows, 4, i + 1)
        imshow(image, f"true: {true}\npredicted: {pred}, {proba[i].max():.3f}\n{Path(paths[i]).name}")
        plt.gca().title.set_color("black" if pred == true else "red")
    if len(images) == 0:
        plt.axis("off")  # a notebook shows no figure without axes
        plt.text(0.5, 0.5, "none", ha="center", size="xx-large")


@torch.inference_mode()
def show_photos(paths, predict, heading):
    """A figure of photos of one's own, each beside a bar per answer; prints the answers too. `predict` gives names and
    probabilities (K,) for inputs (1, 3, 224, 224), from the weights' own transforms: resized, then cropped."""
    print("\nBeyond the lecture: your own photos, turned upright and resized, as these weights are tested")
    height = min(3 * len(paths), 600)  # no picture file can be much higher
    figure, rows = plt.subplots(len(paths), 2, squeeze=False, figsize=(10, height), layout="constrained")
    figure.suptitle(heading)
    for path, (left, right) in zip(paths, rows, strict=True):
        photo = load_image(path, upright=True)
        names, probs = predict(IMAGENET.transforms()(photo)[None])
        print(f"  {path}:", ", ".join(f"{name} {p:.3f}" for name, p in zip(names, probs, strict=True)))
        photo.thumbnail((600, 600))
        plt.sca(left)
        imshow(photo, Path(path).name)
        right.bar_label(right.barh(names, probs), fmt="%.3f", padding=2)
        right.set(xlim=(0, 1.15), xlabel="probability")
        right.invert_yaxis()  # the first one on top


def plot_training(metrics, title):
    """A figure of loss and accuracy per epoch, and on the validation set at the end."""
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 4), layout="constrained")
    figure.suptitle(title)
    epochs = range(1, len(metrics["train_loss"]) + 1)
    for ax, name in zip(axes, ["loss", "accuracy"], strict=True):
        ax.plot(epochs, metrics[f"train_{name}"], "o-", markersize=4, label="train, during the epoch")
        ax.plot(len(epochs), metrics[f"valid_{name}"], "s", markersize=10, fillstyle="none", label="valid, at the end")
        ax.set(xlabel="epoch", ylabel=f"{name} (mean per image)" if name == "loss" else name)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.legend(loc="best" if name == "loss" else "lower right")
    axes[1].set_ylim(0, 1.05)
    axes[1].axhline(0.5, color="grey", linestyle=":")  # a guess


# --------------------------------------------------------------------------------------------- what a result hangs on
def identify(dsets):
    """Which images the datasets hold, by names, sizes and times, and how they are seen: the first part of a record.
    Taken before the work, since files may change under it."""
    images = {"transform": str(dsets["valid"].transform)}
    for x, dset in dsets.items():
        stats = [(os.path.relpath(path, dset.root), os.stat(path)) for path, _ in dset.imgs]
        files = str([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
        images[f"{x} images"] = hashlib.sha256(files.encode()).hexdigest()
    return images


def made_from(images, model):
    """The record that goes with every result: the images (from `identify`), the layers below the last one as they are
    now (their SHA-256), precision and device. A later step compares records with `differences`."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        if not name.startswith("classifier.6."):
            digest.update(value.cpu().flatten().view(torch.uint8).numpy())
    first = model.features[0].weight
    return {**images, "frozen layers": digest.hexdigest(), "precision": f"{first.dtype} on {first.device.type}"}


def differences(record, now):
    """The names of what differs between a record and what holds now, "" if nothing does."""
    return " and ".join(name for name in now if record.get(name) != now[name])


# ------------------------------------------------------------------------------------------------------------- files
WRITERS = {
    ".npy": lambda file, array: np.save(file, array, allow_pickle=False),
    ".pt": lambda file, state_dict: torch.save(state_dict, file),
    ".png": lambda file, figure: figure.savefig(file),
    ".json": lambda file, content: file.write(json.dumps(content, indent=1, default=os.fspath).encode()),
    ".csv": lambda file, text: file.write(text.encode()),
}


def save(folder, files):
    """Write {name: content}, each file whole or not at all; UserError or OSError where the disk refuses. The last of
    several vouches for the rest: its old copy goes first, its new one comes last, so no half set passes for whole."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".part", dir=folder) as parts:
        for name, content in files.items():
            buffer = io.BytesIO()  # on a full disk torch.save and np.save raise all kinds of errors
            WRITERS[Path(name).suffix](buffer, content)
            with naming(folder / name), open(Path(parts, name), "wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
        if len(files) > 1:
            (folder / list(files)[-1]).unlink(missing_ok=True)
        for name in files:
            os.replace(Path(parts, name), folder / name)
    print("saved", *(folder / name for name in files), sep="\n  " if len(files) > 1 else " ")


def save_figure(path, show=False):
    """Save the current figure, open it in a window if `show`, and close it."""
    save(path.parent, {path.name: plt.gcf()})
    if show:
        plt.show()
    plt.close()


def save_results(args, step, model, record, history, result=()):
    """Save the last layer, how it was trained and, once there is one, the result of test_model; returns the metrics.
    03 calls it before the test too: the test may fail, and the training is not lost then."""
    losses, accuracies, seconds = np.transpose(history).tolist()
    metrics = {"options": vars(args), "weights": args.weights, "pretrained": args.weights != "untrained",
               "dataset": args.data_dir, "made_from": record, "seconds_per_epoch": np.mean(seconds),
               "train_loss": losses, "train_accuracy": accuracies}
    files = {f"{step}_head.pt": {name: value.cpu() for name, value in model.classifier[6].state_dict().items()}}
    if result:
        predictions, all_proba, all_classes = result
        metrics["valid_loss"] = log_loss(all_proba, all_classes)
        metrics["valid_accuracy"] = np.mean(predictions == all_classes)
        files |= {f"{step}_predictions.npy": predictions, f"{step}_all_proba.npy": all_proba,
                  f"{step}_all_classes.npy": all_classes}
    save(args.output_dir, {**files, f"{step}_metrics.json": metrics})
    return metrics


def log_loss(all_proba, all_classes):
    """The mean of -log(p), p the probability given to the true class: NLLLoss per image, and Kaggle's score."""
    return nn.functional.nll_loss(torch.tensor(all_proba).double().log(), torch.tensor(all_classes)).item()


def load(path, remedy):
    """A saved array, dict or state dict; UserError where it is missing, damaged, or could run code. An array stays in
    its file, memory-mapped: what is changed of it is changed in memory alone."""
    with naming(path, "missing, damaged or unsafe", remedy):
        if path.suffix == ".npy":
            return np.load(path, mmap_mode="c", allow_pickle=False)
        if path.suffix == ".json":
            return dict(json.loads(path.read_text()))
        return torch.load(path, map_location="cpu", weights_only=True)


def load_state(module, path, remedy):
    """The module with the tensors of a state dict file in place of its own; UserError unless names and shapes fit."""
    state_dict = load(path, remedy)
    with naming(path, f"holds other layers than {type(module).__name__}'s", remedy):
        module.load_state_dict(state_dict, assign=True)
    return module.float()
