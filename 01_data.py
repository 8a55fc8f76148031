"""Get the dataset and look at it.

The lecture's introduction (video from 0:19:35, https://youtu.be/ZhC-DIrCe6A?t=1175), its "Downloading the data" and
its "Data processing" (from 0:25:50).

  python 01_data.py --sample                  24 images, no download
  python 01_data.py                           25,000 images: downloads 839 MB where they are missing
  python 01_data.py --from-kaggle ~/kaggle    makes them from Kaggle's own train/ and test1/, unzipped there

Leaves the dataset in data/dogscats (or --data-dir), and in the output folder inputs_try.npy, labels_try.npy,
01_valid_batch.png and 01_train_batch.png. DOGSCATS_URL in the environment names a mirror of the archive.
"""
import gzip
import hashlib
import os
import shutil
import sys
import tarfile
import urllib.error
import urllib.request
import zlib
from pathlib import Path, PureWindowsPath

import matplotlib.pyplot as plt
import numpy as np
import torch
import torchvision  # an import that this script does not use is for what the video types
from torch import nn
from torchvision import datasets, models, transforms

from common import (CLASSES, MEAN, STD, UserError, banner, check_dataset, imshow, limit_images, load_image,
                    option_parser, parse_options, progress, save, save_figure)

# region How the files are got, all behind get_dataset(); an editor folds it away. The lecture begins at "# %%" below.
URLS = ["https://s3.amazonaws.com/fast-ai-sample/dogscats.tgz",
        "http://files.fast.ai/data/examples/dogscats.tgz"]  # the lecture's link, to the same file
SIZE = 839_285_364  # bytes of the archive
UNPACKED = 900_000_000  # bytes on the disk, about: JPEGs hardly compress, and each takes whole blocks
MD5_OF_FIRST_MIB = "3e483c8d6ef2175e9d395a6027eb92b7"
COUNTS = {"train/cats": 11_500, "train/dogs": 11_500, "valid/cats": 1_000, "valid/dogs": 1_000, "test1": 12_500,
          "sample/train/cats": 8, "sample/train/dogs": 8, "sample/valid/cats": 4, "sample/valid/dogs": 4}
MIB = 2**20


def fetch(url, part):
    """Get what the file `part` still lacks of the archive; OSError or HTTPException where the connection breaks."""
    done = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        response = urllib.request.urlopen(request)  # gives up after 30 s of silence: see socket in common.py
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        response = urllib.request.urlopen(url)  # it can't go on from there, or the part is too long: all of it, then
    with response:
        if response.status != 206:  # the whole file: nothing is there yet, or the server knows no Range
            done = 0
        if response.headers.get("Content-Length") != str(SIZE - done):
            raise OSError("what it sends is not the archive; does this network want you to log in?")
        with open(part, "ab") as file:
            file.truncate(done)
            chunks = iter(lambda: response.read(MIB), b"")
            for chunk in progress(chunks, (SIZE - done) // MIB + 1):
                file.write(chunk)
    if part.stat().st_size != SIZE:
        raise OSError(f"the connection closed after {part.stat().st_size:,} of {SIZE:,} bytes")


def download(archive):
    """Download the archive, from where an earlier run stopped; UserError where no link works."""
    part = archive.with_name(archive.name + ".part")
    done = part.stat().st_size if part.exists() else 0
    needed, free = max(SIZE - done, 0) + UNPACKED, shutil.disk_usage(part.parent).free
    if needed > free:
        raise UserError(f"{part.parent}: needs about {needed:,} bytes, {free:,} are free; make room, or use --data-dir")
    print(f"downloading {SIZE:,} bytes to {archive}" + (f", going on after the first {done:,}" if done else ""))
    failures = []
    for url in [os.environ["DOGSCATS_URL"]] if "DOGSCATS_URL" in os.environ else URLS:
        try:
            if done != SIZE:
                fetch(url, part)
            return os.replace(part, archive)
        except Exception as error:  # the network in all its ways, or the disk
            failures.append(f"{url}: {str(error) or type(error).__name__}")
    raise UserError(f"the dataset can't be downloaded ({'; '.join(failures)}). About {needed:,} bytes of room are "
                    f"needed. Run this again to go on where it stopped, or save the file with a browser as {archive}")


def unpack(archive, folder):
    """Check the archive and unpack it into folder; UserError where it is damaged, or holds what may reach outside."""
    with open(archive, "rb") as file:
        md5 = hashlib.md5(file.read(MIB), usedforsecurity=False).hexdigest()
    try:
        if archive.stat().st_size != SIZE or md5 != MD5_OF_FIRST_MIB:
            raise EOFError("another size or checksum")
        with gzip.open(archive) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
            tar.extraction_filter = getattr(tarfile, "data_filter", None)  # Python's own guard, where it has one
            for member in progress(tar, sum(COUNTS.values())):
                path = PureWindowsPath(member.name)  # which also knows "/"
                plain = member.isfile() or member.isdir()  # no link, device or pipe
                if not plain or path.anchor or ".." in path.parts or ":" in member.name:
                    raise UserError(f"{archive}: holds {member.name!r}, no plain file of the dataset: don't use it")
                member.name = "/".join(path.parts[1:])  # without the leading dogscats/
                tar.extract(member, folder)
            while stream.read(MIB):  # on to the end, where gzip checks its sum
                pass
        found = {name: len(list((folder / name).glob("*"))) for name in COUNTS}
        if found != COUNTS:
            raise EOFError(f"it holds {found}")
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{archive}: not the whole dataset ({error}); move it away, and run this again") from error


def from_kaggle(source, folder):
    """Fill folder from Kaggle's train/cat.0.jpg ... and test1/1.jpg ...; the last 8 % of each class go to valid."""
    def numbered(pattern):
        paths = [path for path in source.glob(pattern) if path.name.split(".")[-2].isdecimal()]  # 9 of cat.9.jpg
        return sorted(paths, key=lambda path: int(path.name.split(".")[-2]))

    places = {"test1": numbered("test1/*.jpg") or numbered("test/*.jpg")}  # folder of the lecture -> files of Kaggle
    for name in CLASSES:
        images = numbered(f"train/{name[:-1]}.*.jpg")
        n_valid = max(1, len(images) * 8 // 100)
        train, valid = images[:-n_valid], images[-n_valid:]
        if not train:
            raise UserError(f"{source}: needs two or more images like train/{name[:-1]}.0.jpg, and holds {len(images)}")
        places |= {f"train/{name}": train, f"valid/{name}": valid}
        places |= {f"sample/train/{name}": train[:8], f"sample/valid/{name}": valid[:4]}
    for name, images in places.items():
        (folder / name).mkdir(parents=True)
        for image in progress(images, len(images)):
            shutil.copyfile(image, folder / name / image.name)


def get_dataset(data_dir, kaggle):
    """Make sure that data_dir holds a dataset; what is there already is never fetched again or overwritten. A new one
    is made in a folder beside it, which gets the final name when all is there; UserError where that fails."""
    if data_dir.exists() and any(data_dir.iterdir()):
        if kaggle:
            raise UserError(f"--from-kaggle: {data_dir} is not empty, and the two must not mix; move it away")
        if not all((data_dir / x).is_dir() for x in ["train", "valid"]):
            raise UserError(f"{data_dir}: lacks train or valid; move what is there away, and run this again")
        return
    archive, folder = data_dir.with_name("dogscats.tgz"), data_dir.with_name(".01_data-unpacks-here")
    data_dir.parent.mkdir(parents=True, exist_ok=True)
    if not kaggle and not archive.exists():
        download(archive)
    try:
        shutil.rmtree(folder, ignore_errors=True)  # left by a run that was killed: no other program uses this name
        if kaggle:
            from_kaggle(kaggle, folder)
        else:
            unpack(archive, folder)
        if data_dir.exists():
            data_dir.rmdir()  # empty
        os.replace(folder, data_dir)
    except OSError as error:
        raise UserError(f"{error.filename or data_dir}: {error.strerror}; {data_dir} can't be made. About {UNPACKED:,} "
                        "bytes of room are needed; mend it and run this again, or choose another --data-dir") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"made {data_dir}" + ("" if kaggle else f"; {archive} is not needed any more, you may delete it"))
# endregion


if __name__ == "__main__":
    parser = option_parser(__doc__, network=False)
    parser.add_argument("--from-kaggle", type=Path, metavar="DIR", help="make the dataset from Kaggle's unzipped files")
    args = parse_options(parser)
    if args.sample and args.from_kaggle:
        parser.error("--from-kaggle makes the whole dataset: leave out --sample")

# %% Using CNN for dogs vs cats
    banner("Using CNN for dogs vs cats", 1175, args.pause)
    # The whole lecture in a sentence: take a network that others have trained on other photos, and reuse it.
    print("Kaggle's competition Dogs vs Cats: 25,000 photos with labels to learn from, 12,500 without to predict.\n"
          "When it began, at the end of 2013, the best programs were said to get above 80 % of them right.")

# %% Imports
    banner("Imports")
    print("torch", torch.__version__)
    print("Python", sys.version)
    # Without a GPU take --sample (seconds) or some of the photos (--limit 1000: minutes), or expect hours for all.
    gpu = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else None
    device = torch.device(gpu or "cpu")
    print("Using gpu:", device.type != "cpu")

# %% Downloading the data
    banner("Downloading the data")
    # Kaggle's files come in one heap. Jeremy Howard (fast.ai) has sorted them into cats and dogs, and put some aside to
    # validate: 23,000 of the 25,000 with labels are for training, 2,000 for validation; test1 holds 12,500 without.
    # The sample, 24 images, only shows that the code runs: after the two steps of 03 expect to be right half the time.
    if not args.sample:
        get_dataset(args.data_dir.resolve(), args.from_kaggle)
    check_dataset(args.data_dir)
    data_dir = args.data_dir
    print(data_dir)
    for name in COUNTS:
        if (data_dir / name).is_dir():
            print(f"  {name:<20} {len(os.listdir(data_dir / name)):6,} files")

# %% Data processing
    banner("Data processing", 1550, args.pause)
    # Every network of torchvision expects what it was trained with: pixels in [0, 1], less ImageNet's mean and divided
    # by its standard deviation, at least 224 of them wide and high. CenterCrop takes the middle: all get one size.
    normalize = transforms.Normalize(mean=MEAN, std=STD)
    # Compose runs its steps in order. Random flips, crops or jitter of the colours would go here.
    # The later scripts take the same steps from common.py: what you change here, change there too.
    imagenet_format = transforms.Compose([
        transforms.CenterCrop(224),
        transforms.ToTensor(),
        normalize,
    ])
    print(imagenet_format)  # typed at the prompt, its name alone shows the steps again

    # ImageFolder pairs each file with a label. At the prompt help(datasets.ImageFolder) tells what it offers.
    dsets = {x: datasets.ImageFolder(data_dir / x, imagenet_format, loader=load_image) for x in ["train", "valid"]}
    if args.limit:
        limit_images(dsets, args.limit)
    # The names of the folders become the names of the classes: that is why the layout matters.
    print("\nclasses:", dsets["train"].classes)
    print("class_to_idx:", dsets["train"].class_to_idx)
    print("the first 5 of imgs, (file, label):", *dsets["train"].imgs[:5], sep="\n  ")
    dset_sizes = {x: len(dsets[x]) for x in ["train", "valid"]}
    print("dset_sizes:", dset_sizes)
    dset_classes = dsets["train"].classes

    # A DataLoader reads the images, in num_workers processes of their own if there are any, and stacks them into
    # batches: shuffled to train, in their order to validate.
    torch.manual_seed(args.seed)
    workers = args.num_workers
    loader_train = torch.utils.data.DataLoader(dsets["train"], batch_size=64, shuffle=True, num_workers=workers)
    loader_valid = torch.utils.data.DataLoader(dsets["valid"], batch_size=5, shuffle=False, num_workers=workers)

    # Before you read on: what does next(iter(loader_valid)) give? And after it = iter(loader_valid), how many times
    # could you ask for next(it)?
    inputs_try, labels_try = next(iter(loader_valid))
    print("\nbatches in loader_valid:", len(loader_valid))
    print("labels_try, of the first one:", labels_try)
    print("inputs_try.shape:", tuple(inputs_try.shape))  # (5, 3, 224, 224)

    # An image is a block of numbers (colour, row, column); a batch puts (image) before them. Negative is dark.
    print("\nWhat is an image for your computer? inputs_try[0]:", inputs_try[0], sep="\n")

    # Make a grid from the first batch of the validation data; imshow, in common.py, undoes normalize and shows it all
    out = torchvision.utils.make_grid(inputs_try)
    plt.figure(figsize=(10, 2.4), layout="constrained")
    imshow(out, title=[dset_classes[x] for x in labels_try])
    save_figure(args.output_dir / "01_valid_batch.png", args.show)

    # Get a batch of training data, and make a grid from it
    inputs, classes = next(iter(loader_train))
    n_images = 8
    out = torchvision.utils.make_grid(inputs[:n_images])
    plt.figure(figsize=(14, 2.2), layout="constrained")
    imshow(out, title=[dset_classes[x] for x in classes[:n_images]])
    save_figure(args.output_dir / "01_train_batch.png", args.show)

    save(args.output_dir, {"inputs_try.npy": inputs_try.numpy(), "labels_try.npy": labels_try.numpy()})
    print("\nDone. Next, with the same common options: python 02_vgg_imagenet.py")
