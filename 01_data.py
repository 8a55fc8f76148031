"""Get the dataset and look at it.

The lecture's introduction (video from 0:19:35, https://youtu.be/ZhC-DIrCe6A?t=1175), "Downloading the data" and
"Data processing" (from 0:25:50).

  python 01_data.py --sample                  24 images, no download
  python 01_data.py                           25,000 images; downloads 839 MB if needed
  python 01_data.py --from-kaggle ~/kaggle    build the dataset from Kaggle's files, already unzipped in ~/kaggle

Writes the dataset to data/dogscats (or --data-dir). Writes to the output folder inputs_try.npy, the first batch
(5, 3, 224, 224), labels_try.npy (5,), 01_valid_batch.png and 01_train_batch.png. To download from a mirror, set
DOGSCATS_URL in the environment.
"""
# %% Imports and options. Imports that the script does not use are there so that you can type the video's commands.
from support.run import banner, print_options, start_run  # first: it checks the environment
import os
import sys

import matplotlib.pyplot as plt
import numpy as np
import torch
import torchvision
from torch import nn
from torchvision import datasets, models, transforms
from torchvision.datasets.folder import IMG_EXTENSIONS, is_image_file

from common import CLASSES, MEAN, STD, imshow, limit_images, save_figure
from support.dataset import get_dataset
from support.files import absolute_path, save
from support.images import check_folders, check_images, load_image
from support.options import option_parser

if __name__ == "__main__":  # worker processes, which load images, import this file again and must not run the rest
    parser = option_parser("01_data.py", __doc__, network=False)
    parser.add_argument("--from-kaggle", type=absolute_path, metavar="DIR",
                        help="build the dataset from Kaggle's or Microsoft's unzipped files in DIR")
    args = start_run(parser)
    if args.sample and args.from_kaggle:
        parser.error("--from-kaggle builds the full dataset: omit --sample")
    print_options(args)

# %% Using CNN for dogs vs cats
    banner("Using CNN for dogs vs cats", "0:19:35", args.pause)
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
    # of them aside for validation:
    #
    #   dogscats
    #   |-- train
    #   |   |-- cats    11,500 images, to learn from
    #   |   `-- dogs    11,500
    #   |-- valid
    #   |   |-- cats     1,000 images, to judge what was learned
    #   |   `-- dogs     1,000
    #   |-- test1       12,500 images without labels
    #   `-- sample      24 images in train and valid, only there to show that the code runs: 03 makes only two updates
    #                   on them, so expect about 50% accuracy
    data_dir = args.data_dir
    if not args.sample:
        get_dataset(data_dir, args.from_kaggle)
    check_folders(data_dir, CLASSES)
    print(data_dir)
    for folder, _, files in sorted(os.walk(data_dir)):
        n_images = sum(is_image_file(name) for name in files)
        if n_images:
            print(f"  {os.path.relpath(folder, data_dir):<20} {n_images:6,} images")
        if 0 < n_images < len(files):
            print(f"    {len(files) - n_images:,} other files are not used: they do not end with", *IMG_EXTENSIONS)
    check_images(data_dir, remember=not args.sample)  # a damaged image could stop the training hours later

# %% Data processing
    banner("Data processing", "0:25:50", args.pause)
    # VGG16 expects images like those it was trained on: at least 224 x 224 pixels, values scaled to [0, 1], then
    # normalized: for each color, minus ImageNet's mean, divided by its standard deviation.
    # Before you read on: why ImageNet's mean, and not the mean of our own photos?
    normalize = transforms.Normalize(mean=MEAN, std=STD)  # ImageNet's, a number for each color (printed below)
    # Compose applies its transforms in order. Random flips, crops or color changes would need a second Compose, for the
    # training images only: this one also serves the validation images.
    # The other scripts import the same imagenet_format from common.py: if you change it here, change it there too.
    imagenet_format = transforms.Compose([
        transforms.CenterCrop(224),  # keep only the central 224 x 224 pixels (smaller images get black borders)
        transforms.ToTensor(),  # a tensor of shape (3, 224, 224) with values in [0, 1]
        normalize,
    ])
    # To see it again at the prompt (start with python -i 01_data.py --sample), type imagenet_format.
    print(imagenet_format)
    print("ImageNet's mean, because VGG16 was trained with it: a color must have the same value now as it had then.")

    # ImageFolder pairs each file with a label. At the prompt, help(datasets.ImageFolder) shows its documentation.
    # data_dir (set above, for the download) / x is the lecture's os.path.join(data_dir, x). load_image opens a file, or
    # names it if it is damaged.
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

    # A DataLoader loads the images, in num_workers separate processes (0: in this one), and stacks them into batches.
    # shuffle=True: in a new random order in each epoch; otherwise a batch would be all cats, as the files are sorted.
    # 5 images fit in one figure; batches of 64 make better use of the processor, and still fit in memory.
    torch.manual_seed(args.seed)  # the same "random" order in every run
    workers = args.num_workers or 0  # 0 by default; the lecture uses 6. More than the number of cores does not help
    loader_train = torch.utils.data.DataLoader(dsets["train"], batch_size=64, shuffle=True, num_workers=workers)
    loader_valid = torch.utils.data.DataLoader(dsets["valid"], batch_size=5, shuffle=False, num_workers=workers)

    # iter(loader_valid) starts a pass over the batches; next gives one of them: the first, as nothing is shuffled here.
    inputs_try, labels_try = next(iter(loader_valid))
    print("\nbatches in loader_valid:", len(loader_valid))  # all 2,000 validation images: 400 batches of 5
    print("labels_try, the first batch:", labels_try)
    print("inputs_try.shape:", tuple(inputs_try.shape))  # (5, 3, 224, 224)

    # An image is an array of numbers with the dimensions (color, row, column); a batch adds a first dimension, (image).
    # Negative values are darker than ImageNet's average.
    print("\nWhat is an image for your computer? The central 4 x 4 pixels of inputs_try[0]:")
    print(inputs_try[0, :, 110:114, 110:114])

    # Make a grid of the first validation batch. imshow, in common.py (search for def imshow), also undoes normalize.
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
