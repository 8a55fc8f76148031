"""Get the dataset and look at it.

The lecture's introduction (video from 0:19:35, https://youtu.be/ZhC-DIrCe6A?t=1175), "Downloading the data" and
"Data processing" (from 0:25:50).

  python 01_data.py --sample                  24 images, no download
  python 01_data.py                           25,000 images; downloads 839 MB if needed
  python 01_data.py --from-kaggle ~/kaggle    build the dataset from Kaggle's files, already unzipped in ~/kaggle

Writes the dataset to data/dogscats (or --data-dir). Writes to the output folder: inputs_try.npy, labels_try.npy,
01_valid_batch.png and 01_train_batch.png. To download from a mirror, set DOGSCATS_URL in the environment.
"""
# %% Options. Some imports are not used below: they are needed for commands typed in the video.
import gzip
import os
import shutil
import sys
import tarfile
import zlib
from pathlib import PureWindowsPath

import matplotlib.pyplot as plt
import numpy as np
import torch
import torchvision
from torch import nn
from torchvision import datasets, models, transforms
from torchvision.datasets.folder import IMG_EXTENSIONS, is_image_file

from common import CLASSES, MEAN, STD, imshow, limit_images, save_figure
from support import (MIB, UserError, absolute_path, banner, check_folder, check_images, digest_matches, download,
                     load_image, numbered_images, option_parser, print_options, progress, remedy, replace, save,
                     start_run, temporary_folder)

# region Downloading and unpacking the files. Not part of the lecture, which begins below: fold this region.
URLS = ["https://s3.amazonaws.com/fast-ai-sample/dogscats.tgz",
        "http://files.fast.ai/data/examples/dogscats.tgz"]  # the lecture's link, to the same file
SIZE = 839_285_364  # bytes of the archive
UNPACKED = 900_000_000  # about this many bytes on the disk
HASH = ["md5", "3e483c8d6ef2175e9d395a6027eb92b7", MIB]  # of the first MiB
COUNTS = {"train/cats": 11_500, "train/dogs": 11_500, "valid/cats": 1_000, "valid/dogs": 1_000, "test1": 12_500,
          "sample/train/cats": 8, "sample/train/dogs": 8, "sample/valid/cats": 4, "sample/valid/dogs": 4}


def unpack(archive, folder):
    """Check the archive and unpack it to the folder. Raises UserError if it is damaged or has links or unsafe names."""
    try:
        if archive.stat().st_size != SIZE or not digest_matches(archive, *HASH):
            raise EOFError("wrong size or checksum")
        with gzip.open(archive) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
            tar.extraction_filter = getattr(tarfile, "data_filter", None)  # Python's built-in safety filter, if any
            n_files = sum(COUNTS.values())
            for member in progress(tar, n_files, n_files, "files"):
                path = PureWindowsPath(member.name)  # understands both "/" and "\"
                if not (member.isfile() or member.isdir()) or path.anchor or ".." in path.parts or ":" in member.name:
                    raise UserError(f"{archive}: {member.name!r} is not a file of the dataset: delete the archive")
                member.name = "/".join(path.parts[1:])  # without the leading dogscats/
                tar.extract(member, folder)
            while stream.read(MIB):  # to the end, where gzip verifies its checksum
                pass
        found = {name: len(list((folder / name).glob("*"))) for name in COUNTS}
        if found != COUNTS:
            raise EOFError(f"it contains {found}")
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{archive}: incomplete or damaged ({error}): delete it and run this script again") from error


def from_kaggle(source, folder):
    """Fill the folder with copies of Kaggle's train/cat.0.jpg ... and test1/1.jpg ..., or of Microsoft's
    PetImages/Cat/0.jpg ...; the last 8% of each class are for validation. Raises UserError if `source` has neither."""
    places = {"test1": numbered_images(source / "test1") or numbered_images(source / "test")}
    for name, kaggle, microsoft in [("cats", "cat", "Cat"), ("dogs", "dog", "Dog")]:
        images = (numbered_images(source / "train", f"{kaggle}.") or numbered_images(source / "PetImages" / microsoft)
                  or numbered_images(source / microsoft))
        if len(images) < 2:
            raise UserError(f"{source}: must contain two or more images such as train/{kaggle}.0.jpg (Kaggle) or "
                            f"PetImages/{microsoft}/0.jpg (Microsoft), but contains {len(images)}")
        n_valid = max(1, len(images) * 8 // 100)
        train, valid = images[:-n_valid], images[-n_valid:]
        places |= {f"train/{name}": train, f"valid/{name}": valid}
        places |= {f"sample/train/{name}": train[:8], f"sample/valid/{name}": valid[:4]}
    for name, images in places.items():
        (folder / name).mkdir(parents=True)
        for image in progress(images, len(images), len(images)):
            shutil.copyfile(image, folder / name / image.name)


def get_dataset(data_dir, kaggle):
    """Make sure that data_dir contains the dataset; never download or overwrite what is already there. A new dataset is
    made in a temporary folder beside data_dir, and moved when it is complete. Raises UserError if this fails."""
    if data_dir.exists() and any(data_dir.iterdir()):
        if kaggle:
            raise UserError(f"--from-kaggle: {data_dir} is not empty: omit --from-kaggle to use its contents, or "
                            "rename it to build a new dataset")
        if not all((data_dir / x).is_dir() for x in ["train", "valid"]):
            raise UserError(f"{data_dir}: train or valid is missing: rename {data_dir.name} and run this script again")
        return
    if os.path.ismount(data_dir):
        raise UserError(f"--data-dir: {data_dir} is a mounted folder, which cannot be replaced: choose a new folder "
                        f"inside it, such as {data_dir / 'dogscats'}")
    archive = data_dir.with_name("dogscats.tgz")
    data_dir.parent.mkdir(parents=True, exist_ok=True)
    if not kaggle and not archive.exists():
        urls = [os.environ["DOGSCATS_URL"]] if "DOGSCATS_URL" in os.environ else URLS
        download(urls, archive, SIZE, HASH, room=UNPACKED)
    temporary = temporary_folder(data_dir.parent)
    folder = temporary / "dogscats"
    try:
        if kaggle:
            from_kaggle(kaggle, folder)
        else:
            unpack(archive, folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"{error.filename or data_dir}: {error.strerror}: {remedy(error)}. About {UNPACKED:,} "
                            "bytes of free space are needed") from error
        raise
    try:
        if data_dir.exists():  # empty: fill it, as it may be the current folder
            for name in sorted(os.listdir(folder)):
                replace(folder / name, data_dir / name)
        else:
            replace(folder, data_dir)
    except OSError as error:
        if not (data_dir / "valid").is_dir():  # otherwise another run has created it already
            raise UserError(f"{folder} contains the complete dataset, but cannot be moved to {data_dir} "
                            f"({error.strerror}): close the programs that use it, and move it yourself") from error
    shutil.rmtree(temporary, ignore_errors=True)
    print(f"created {data_dir}" + ("" if kaggle else f"; {archive} is no longer needed and can be deleted"))
# endregion


if __name__ == "__main__":  # worker processes, which load images, import this file again and must not run the rest
    parser = option_parser(__doc__, network=False)
    parser.add_argument("--from-kaggle", type=absolute_path, metavar="DIR",
                        help="build the dataset from Kaggle's or Microsoft's unzipped files in DIR")
    args = start_run(parser)
    if args.sample and args.from_kaggle:
        parser.error("--from-kaggle builds the full dataset: omit --sample")
    print_options(args)

# %% Using CNN for dogs vs cats
    banner("Using CNN for dogs vs cats", 1175, args.pause)
    # The lecture in one sentence: reuse a network that was already trained on different photos.
    print("Kaggle's Dogs vs. Cats competition: 25,000 labeled photos for training, 12,500 unlabeled ones to classify.\n"
          "When it was launched, in 2013, the state of the art was said to be above 80% accuracy.")

# %% Imports
    banner("Imports")
    # The imports are at the top of the file.
    print("torch", torch.__version__)
    print("Python", sys.version)
    # Without a GPU, use --sample (seconds) or a subset (--limit 1000, minutes); the full dataset takes hours.
    if torch.cuda.is_available():  # an NVIDIA GPU
        device = torch.device("cuda")
    elif torch.backends.mps.is_available():  # MPS: the GPU of a Mac
        device = torch.device("mps")
    else:
        device = torch.device("cpu")
    print("GPU found:", device.type != "cpu")  # the other scripts also test whether it works: get_device in common.py

# %% Downloading the data
    banner("Downloading the data")
    # Kaggle's labeled photos are all in one folder. Jeremy Howard (fast.ai) sorted them into cats and dogs and set some
    # of them aside for validation: of the 25,000 photos, 23,000 are for training and 2,000 for validation. test1
    # contains the 12,500 without labels. The sample, 24 images, is only there to show that the code runs: 03 makes only
    # two updates on it, so expect about 50% accuracy.
    data_dir = args.data_dir
    if not args.sample:
        get_dataset(data_dir, args.from_kaggle)
    for x in ["train", "valid"]:
        check_folder(data_dir / x, CLASSES)
    print(data_dir)
    for name in COUNTS:  # the folders of the dataset
        if (data_dir / name).is_dir():
            files = os.listdir(data_dir / name)
            n_images = sum(map(is_image_file, files))
            print(f"  {name:<20} {n_images:6,} images")
            if n_images < len(files):
                print(f"    {len(files) - n_images:,} other files are not used: they do not end with", *IMG_EXTENSIONS)
    check_images(data_dir, remember=not args.sample)  # else a damaged image could stop the training hours later

# %% Data processing
    banner("Data processing", 1550, args.pause)
    # VGG16 expects images like those it was trained on: at least 224 x 224 pixels, values scaled to [0, 1], minus
    # ImageNet's mean, divided by its standard deviation. Most other networks of torchvision expect the same.
    normalize = transforms.Normalize(mean=MEAN, std=STD)
    # Compose applies its transforms in order. Random flips, crops or color changes would be added here.
    # The other scripts import the same imagenet_format from common.py: if you change it here, change it there too.
    imagenet_format = transforms.Compose([
        transforms.CenterCrop(224),  # keep only the central 224 x 224 pixels (smaller images get black borders)
        transforms.ToTensor(),  # a tensor of shape (3, 224, 224) with values in [0, 1]
        normalize,
    ])
    # To see it again at the prompt (start with python -i 01_data.py --sample), type imagenet_format.
    print(imagenet_format)

    # ImageFolder pairs each file with a label. At the prompt, help(datasets.ImageFolder) shows its documentation.
    dsets = {x: datasets.ImageFolder(data_dir / x, imagenet_format, loader=load_image) for x in ["train", "valid"]}
    if args.limit:
        limit_images(dsets, args.limit)
    # The names of the folders become the names of the classes: this is why the layout matters.
    print("\nclasses:", dsets["train"].classes)
    print("class_to_idx:", dsets["train"].class_to_idx)
    print("the first 5 (file, label) pairs of imgs:", *dsets["train"].imgs[:5], sep="\n  ")
    dset_sizes = {x: len(dsets[x]) for x in ["train", "valid"]}
    print("dset_sizes:", dset_sizes)
    dset_classes = dsets["train"].classes

    # A DataLoader loads the images, in num_workers separate processes (0: in this one), and stacks them into batches:
    # shuffled for training, in fixed order for validation. 5 images fit in one figure; batches of 64 make better use of
    # the processor, and still fit in memory.
    torch.manual_seed(args.seed)  # the same "random" order in every run
    workers = args.num_workers or 0  # the lecture uses 6, which needs 6 processor cores
    loader_train = torch.utils.data.DataLoader(dsets["train"], batch_size=64, shuffle=True, num_workers=workers)
    loader_valid = torch.utils.data.DataLoader(dsets["valid"], batch_size=5, shuffle=False, num_workers=workers)

    # Before you read on: what does next(iter(loader_valid)) return? If batches = iter(loader_valid), how many times can
    # you call next(batches)? (Answers: the first batch; 400 times, as 2,000 images are 400 batches of 5.)
    inputs_try, labels_try = next(iter(loader_valid))
    print("\nbatches in loader_valid:", len(loader_valid))
    print("labels_try, the first batch:", labels_try)
    print("inputs_try.shape:", tuple(inputs_try.shape))  # (5, 3, 224, 224)

    # An image is an array of numbers with the dimensions (color, row, column); a batch adds a first dimension, (image).
    # Negative values are darker than ImageNet's average.
    print("\nWhat is an image for your computer? inputs_try[0]:", inputs_try[0], sep="\n")

    # Make a grid of the first batch of the validation data. imshow, in common.py, undoes normalize and draws the grid.
    out = torchvision.utils.make_grid(inputs_try)
    plt.figure(figsize=(10, 2.4), layout="constrained")
    imshow(out, title=[dset_classes[x] for x in labels_try])
    save_figure(args.output_dir / "01_valid_batch.png", args.show)

    # Get a batch of training data, and make a grid of it.
    inputs, classes = next(iter(loader_train))
    n_images = 8
    out = torchvision.utils.make_grid(inputs[:n_images])
    plt.figure(figsize=(14, 2.2), layout="constrained")
    imshow(out, title=[dset_classes[x] for x in classes[:n_images]])
    save_figure(args.output_dir / "01_train_batch.png", args.show)

    save(args.output_dir, {"inputs_try.npy": inputs_try.numpy(), "labels_try.npy": labels_try.numpy()})
    print("\nDone. Next, with the same options (--sample, --limit, ...): python 02_vgg_imagenet.py")
