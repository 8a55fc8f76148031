"""Compute what the frozen layers give once, save it, and train on that.

The lecture's "Speeding up the learning by precomputing features" (video from 0:57:40,
https://youtu.be/ZhC-DIrCe6A?t=3460).

  python 04_precompute.py --sample                     24 images, some seconds
  python 04_precompute.py --limit 1000 --layer fc7     minutes on a CPU, and the lecture's result in sight
  python 04_precompute.py                              all 25,000; stopped, it goes on where it was

Reads the dataset, and 03_head.pt where it fits. Leaves in the output folder conv_feat_train.npy, conv_feat_valid.npy
(2.5 GB for all images; fc7_feat_*.npy: 0.4 GB), labels_train.npy, labels_valid.npy, and 04_head.pt and so on, as 03.
"""
import hashlib
import math
import os
import time

import matplotlib.pyplot as plt
import numpy as np
import torch
import torchvision  # an import that this script does not use is for what the video types
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchvision import datasets, models, transforms

from common import (UserError, banner, choose_weights, differences, freeze_and_replace_head, identify, imshow, load,
                    load_data, load_state, load_vgg16, made_from, naming, option_parser, parse_options, plot_training,
                    progress, save, save_figure, save_results, show_predictions, test_model, to_device, train_model)


class FeatureFile:
    """A list of features that is kept in a .npy file, (N, ...) float32, and outlives the run: rows are appended as they
    come, so that memory does not grow with N, and a run that was stopped goes on after its last whole batch. A .json
    beside it says what it was made from, and how fast ("images_per_second", None if it was one batch)."""

    def __init__(self, path, shape, record, batch_size):
        self.path, self.record, self.json = path, record, path.with_suffix(".json")
        self.done, self.part, self.since = shape[0], None, None
        if path.exists() and self.json.exists():
            changed = differences(load(self.json, "delete it and run again"), record)
            if not changed:
                print(f"{path.name}: used again, computed from the same images, layers, transform and precision")
                return
            print(f"{path.name} was made from other {changed}: computing it again")
        # the part file's name tells what it is made from, so that rows of two kinds never mix
        digest = hashlib.sha256(str([shape, record]).encode()).hexdigest()[:16]
        self.part = path.with_suffix(f".{digest}.part")
        for other in set(path.parent.glob(f"{path.stem}.*.part")) - {self.part}:
            print(f"{other.name} was begun with other images, layers, transform or precision: thrown away")
            other.unlink()
        self.file = open(self.part, "r+b" if self.part.exists() else "w+b")  # noqa: SIM115 it stays open till the end
        np.lib.format.write_array_header_1_0(self.file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        header, row_bytes = self.file.tell(), 4 * math.prod(shape[1:])
        rows = (self.file.seek(0, os.SEEK_END) - header) // row_bytes
        self.done = min(rows, shape[0] - 1) // batch_size * batch_size  # a batch is left at least, to end with
        self.file.truncate(self.file.seek(header + self.done * row_bytes))
        if self.done:
            print(f"{path.name}: going on after the first {self.done:,} of {shape[0]:,} images")

    def extend(self, rows):
        """Append a batch of rows, and give it to the system at once: should this run be killed, it is kept."""
        with naming(self.part):
            self.file.write(np.ascontiguousarray(rows, dtype=np.float32))
            self.file.flush()
        self.done += len(rows)
        # the first batch is not timed: before it come the start of the workers, and what a device does only once
        self.since = self.since or (time.perf_counter(), self.done)

    def __array__(self, dtype=None, copy=None):
        """np.asarray calls this: finish a new file, and give all rows, memory-mapped (read as they are needed)."""
        if self.part:
            start, timed_from = self.since
            speed = (self.done - timed_from) / (time.perf_counter() - start) if self.done > timed_from else None
            if not self.part.exists():
                raise UserError(f"{self.part} has gone: does another run write here? Let it end, and run this again")
            with naming(self.part):
                os.fsync(self.file.fileno())
                self.file.close()
                self.json.unlink(missing_ok=True)  # a file without one is made again: no new rows with an old record
                os.replace(self.part, self.path)
            self.part = None
            save(self.path.parent, {self.json.name: {**self.record, "images_per_second": speed}})
            print(f"saved {self.path}" + (f": {speed:.1f} images/s" if speed else ""))
        return load(self.path, "delete it and run again")


if __name__ == "__main__":
    parser = option_parser(__doc__)
    parser.add_argument("--epochs", type=int, default=50, metavar="N", help="default: 50")
    parser.add_argument("--lr", type=float, default=0.001, help="learning rate (default: 0.001)")
    parser.add_argument("--batch-size", type=int, default=128, metavar="N", help="default: 128")
    parser.add_argument("--layer", choices=["conv", "fc7"], default="conv",
                        help="compute once the convolutions, as in the lecture (default), or all but the last layer")
    args = parse_options(parser)
    device, dsets, loader_train, loader_valid = load_data(args)  # as in 01_data.py
    dset_sizes = {x: len(dsets[x]) for x in ["train", "valid"]}
    dset_classes = dsets["train"].classes
    images = identify(dsets)
    note = choose_weights(args)

# %% Speeding up the learning by precomputing features
    banner("Speeding up the learning by precomputing features", 3460, args.pause)
    model_vgg = load_vgg16(args.weights)  # as in 02_vgg_imagenet.py
    torch.manual_seed(args.seed)
    model_vgg = to_device(freeze_and_replace_head(model_vgg), device, args.bf16)  # as in 03_finetune_head.py
    record = made_from(images, model_vgg)

    # Notice: what is frozen gives the same for an image in every epoch, so it need not run more than once.
    if args.layer == "conv":
        frozen, trained = model_vgg.features, model_vgg.classifier  # avgpool, between them, leaves 7 x 7 as it is
    else:
        # The frozen dense layers too run once, without dropout. What is left to train is a simple logistic regression.
        frozen = nn.Sequential(model_vgg.features, model_vgg.avgpool, nn.Flatten(), model_vgg.classifier[:6])
        trained = model_vgg.classifier[6:]
    frozen.eval()
    inputs_try, labels_try = next(iter(loader_valid))
    inputs_try = inputs_try.to(device)
    with torch.inference_mode():
        x_try = frozen(inputs_try)
    print("features of the first batch, x_try.shape:", tuple(x_try.shape))  # (5, 512, 7, 7) or (5, 4096)

    def preconvfeat(dataloader, conv_features=None):
        """What the frozen layers make of the dataloader's images, (N, 512, 7, 7) or (N, 4096) float32, and the labels.
        conv_features is what the rows are added to: by default a list; below a list that is kept in a file."""
        conv_features = [] if conv_features is None else conv_features
        labels_list = []
        with torch.inference_mode():
            for inputs, labels in progress(dataloader, len(dataloader)):
                x = frozen(inputs.to(device, non_blocking=True))
                conv_features.extend(x.cpu().numpy())
                labels_list.extend(labels.numpy())
        return np.asarray(conv_features), labels_list  # of a FeatureFile: its __array__, which also finishes the file

    # In the order of the images, where the lecture takes the shuffled loader_train: so each row's image is known.
    batch_size = 8 if device.type == "cpu" else 64  # on a CPU more is slower, and takes more memory
    conv_feat = {}
    for x in ["train", "valid"]:
        hangs_on = {name: record[name] for name in ["transform", f"{x} images", "frozen layers", "precision"]}
        hangs_on["network"] = str(frozen)
        rows = FeatureFile(args.output_dir / f"{args.layer}_feat_{x}.npy", (dset_sizes[x], *x_try.shape[1:]), hangs_on,
                           batch_size)
        left = Subset(dsets[x], range(rows.done, dset_sizes[x]))  # all, unless an earlier run has begun or done it
        loader = DataLoader(left, batch_size=batch_size, num_workers=args.num_workers, pin_memory=device.type == "cuda")
        conv_feat[x], _ = preconvfeat(loader, rows)
    conv_feat_train, conv_feat_valid = conv_feat["train"], conv_feat["valid"]
    labels_train, labels_valid = np.array(dsets["train"].targets), np.array(dsets["valid"].targets)  # (N,), (M,)
    save(args.output_dir, {"labels_train.npy": labels_train, "labels_valid.npy": labels_valid})
    print("conv_feat_train.shape:", conv_feat_train.shape)  # (N, 512, 7, 7) or (N, 4096)

# %% Creating a new data generator
    banner("Creating a new data generator")
    # No image is loaded any more. If these lines are unclear, go on: all they do is hand over the saved rows.
    datasetfeat_train = TensorDataset(torch.from_numpy(conv_feat_train).flatten(1), torch.from_numpy(labels_train))
    loaderfeat_train = DataLoader(datasetfeat_train, batch_size=args.batch_size, shuffle=True)
    datasetfeat_valid = TensorDataset(torch.from_numpy(conv_feat_valid).flatten(1), torch.from_numpy(labels_valid))
    loaderfeat_valid = DataLoader(datasetfeat_valid, batch_size=args.batch_size, shuffle=False)

    # As in the lecture the last layer goes on from where 03_finetune_head.py left it, if what it has learned fits.
    path_03, again = args.output_dir / "03_metrics.json", "run python 03_finetune_head.py again"
    metrics_03 = load(path_03, again) if path_03.exists() else {}
    changed = differences(metrics_03.get("made_from", {}), record)
    if from_03 := not changed:
        load_state(model_vgg.classifier[6], args.output_dir / "03_head.pt", again).to(device)
        print("the last layer goes on from 03_head.pt: trained on the same images, through the same layers")
    else:
        why = f"03_head.pt was trained with other {changed}" if metrics_03 else "there is no 03_head.pt here"
        print("the last layer starts afresh:", why)
    criterion = nn.NLLLoss()
    optimizer_vgg = torch.optim.SGD(model_vgg.classifier[6].parameters(), lr=args.lr)
    torch.manual_seed(args.seed)  # shuffling and dropout
    history = []
    train_model(trained, loaderfeat_train, size=dset_sizes["train"], epochs=args.epochs, optimizer=optimizer_vgg,
                criterion=criterion, history=history)

    predictions, all_proba, all_classes = test_model(trained, loaderfeat_valid, size=dset_sizes["valid"])
    record = made_from(images, model_vgg)  # again: whoever edits the lines above may train more layers
    metrics = save_results(args, "04", model_vgg, record, history, (predictions, all_proba, all_classes))

    # What precomputing saves
    on_features = metrics["seconds_per_epoch"]
    speed = load(args.output_dir / f"{args.layer}_feat_train.json", "run again")["images_per_second"]
    print(f"\nan epoch on features: {on_features:.3f} s")
    if from_03 and speed:
        on_images, once = metrics_03["seconds_per_epoch"], dset_sizes["train"] / speed
        print(f"an epoch on images, in 03_finetune_head.py: {on_images:.3f} s")
        saves = on_images - on_features  # seconds, in each epoch
        paid = f"has paid for itself after epoch {math.ceil(once / saves)}" if saves > 0 else "does not pay"
        print(f"computing the features of the training images, once: {once:.1f} s; this {paid}")

    plot_training(metrics, f"Training the last layer on features{note}")
    save_figure(args.output_dir / "04_training.png", args.show)

    # The first four cats and the last four dogs to validate
    every = range(dset_sizes["valid"])
    idx = sorted({*every[:4], *every[-4:]})
    show_predictions([dsets["valid"][i][0] for i in idx], [dsets["valid"].imgs[i][0] for i in idx], all_classes[idx],
                     all_proba[idx], f"Validation images: true class, prediction and its probability{note}")
    save_figure(args.output_dir / "04_valid_batch.png", args.show)

    print(f"\nDone{note}. Next, with the same common options: python 05_analysis.py")
