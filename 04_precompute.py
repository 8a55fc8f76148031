"""Compute what the frozen layers give once, save it, and train on that.

The lecture's "Speeding up the learning by precomputing features" (video from 0:57:40,
https://youtu.be/ZhC-DIrCe6A?t=3460).

  python 04_precompute.py --sample       24 images, some seconds
  python 04_precompute.py                all 25,000; stopped, it goes on where it was
  python 04_precompute.py --layer fc7    one step further: what is trained is a simple logistic regression

Reads the dataset, and 03_head.pt where it fits. Leaves in the output folder conv_feat_train.npy, conv_feat_valid.npy
(2.6 GB for all images; fc7_feat_*.npy: 0.4 GB) with a .json each that says what they were made from,
labels_train.npy, labels_valid.npy, and as 03 does 04_head.pt, 04_predictions.npy, 04_all_proba.npy,
04_all_classes.npy, 04_metrics.json, 04_training.png and 04_valid_batch.png.
"""
import hashlib
import json
import math
import os
import time
import warnings

from common import (UserError, banner, check_dataset, choose_weights, files_hash, freeze_and_replace_head,
                    get_device, imagenet_format, load, load_image, load_state, load_vgg16,
                    loader_options, option_parser, parse_options, progress, save, save_figure, show_images,
                    test_model, to_device, train_model, weights_hash)
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, Subset, TensorDataset
from torchvision import datasets


def made_already(path, made_from):
    """Whether the features in path are there and were computed from `made_from`, by the .json beside them; says so."""
    record = path.with_suffix(".json")
    if not (path.exists() and record.exists()):
        return False
    made = load(record, "delete it and run again")
    changed = [key for key, value in made_from.items() if made.get(key) != value]
    print(f"{path.name} was made from other {' and '.join(changed)}: computing it again" if changed else
          f"{path.name}: used again, computed from the same files, weights, transform and precision")
    return not changed


def preconvfeat(frozen, dset, path, made_from, row_shape, device, options):
    """Compute the frozen layers' output for every image of dset, in its order. Each batch goes to the disk as it comes:
    memory does not grow with N, and a run that was stopped goes on after its last whole batch. `made_from` goes into a
    .json beside path, with "images_per_second". Leaves (N, *row_shape) float32 in path."""
    # the part file's name tells what it is made from, so that rows of two kinds never mix
    digest = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:16]
    part, record = path.with_suffix(f".{digest}.part"), path.with_suffix(".json")
    batch_size = 8 if device.type == "cpu" else 64  # on a CPU more is slower, and takes more memory
    row_bytes = 4 * math.prod(row_shape)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for other in set(path.parent.glob(f"{path.stem}.*.part")) - {part}:
            other.unlink()
        with open(part, "r+b" if part.exists() else "w+b") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            np.lib.format.write_array_header_1_0(
                file, {"descr": "<f4", "fortran_order": False, "shape": (len(dset), *row_shape)})
            header = file.tell()
            done = min(max(size - header, 0) // row_bytes, len(dset) - 1) // batch_size * batch_size
            file.truncate(header + done * row_bytes)
            file.seek(0, os.SEEK_END)
            if done:
                print(f"{path.name}: going on after the first {done:,} of {len(dset):,} images")

            loader = DataLoader(Subset(dset, range(done, len(dset))), batch_size=batch_size, **options)
            dtype = next(frozen.parameters()).dtype
            start = time.perf_counter()
            with torch.inference_mode():
                for inputs, _ in progress(loader, len(loader)):
                    x = frozen(inputs.to(device, dtype, non_blocking=True))  # (B, *row_shape)
                    file.write(x.float().cpu().contiguous().numpy())
                    file.flush()
            os.fsync(file.fileno())
        seconds = time.perf_counter() - start
        record.unlink(missing_ok=True)  # without its record a file is made again: a new one never goes by an old record
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"{path}: can't be written ({error.strerror}); {len(dset) * row_bytes:,} bytes are needed in "
                        "all. Make room and run again: it goes on from here") from error
    images_per_second = (len(dset) - done) / seconds
    save(path.parent, {record.name: {**made_from, "images_per_second": images_per_second}})
    print(f"saved {path}: {len(dset) - done:,} images computed in {seconds:.1f} s, {images_per_second:.1f} images/s")


def feature_loader(features, labels, batch_size, shuffle):
    """A DataLoader of (inputs (B, D), classes (B,)) that reads a batch from the file in one go, by its row numbers."""
    warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nothing here writes to it
    dataset = TensorDataset(torch.from_numpy(features).flatten(1), torch.from_numpy(labels))
    sampler = RandomSampler(dataset) if shuffle else SequentialSampler(dataset)
    return DataLoader(dataset, batch_size=None, sampler=BatchSampler(sampler, batch_size, drop_last=False))


def plot_training(history, valid_loss, valid_accuracy, seconds, title):
    """Loss and accuracy per epoch; seconds of an epoch, {what it runs on: seconds}."""
    plt.figure(figsize=(13, 4), layout="constrained")
    plt.suptitle(title)
    for i, (name, valid) in enumerate([("loss (mean per image)", valid_loss), ("accuracy", valid_accuracy)]):
        plt.subplot(1, 3, i + 1)
        plt.plot(range(1, len(history) + 1), [epoch[i] for epoch in history], ".-", label="train, during the epoch")
        plt.plot(len(history), valid, "s", label="valid, after training")
        plt.xlabel("epoch")
        plt.ylabel(name)
        plt.legend()
    plt.subplot(1, 3, 3)
    plt.bar_label(plt.bar(list(seconds), list(seconds.values())), fmt="%.2g s")
    plt.ylabel("seconds per epoch")


if __name__ == "__main__":
    parser = option_parser(__doc__)
    parser.add_argument("--epochs", type=int, default=50, metavar="N", help="default: 50")
    parser.add_argument("--lr", type=float, default=0.001, help="learning rate (default: 0.001)")
    parser.add_argument("--batch-size", type=int, default=128, metavar="N", help="default: 128")
    parser.add_argument("--layer", choices=["conv", "fc7"], default="conv", help="what is computed once: the "
                        "convolutions, as in the lecture, or all but the last layer (default: conv)")
    args = parse_options(parser)
    device = get_device(args.device, args.bf16)
    check_dataset(args.data_dir)
    args.weights = choose_weights(args.weights, args.sample)
    note = ", untrained weights" if args.weights == "untrained" else ""

    # As in 03_finetune_head.py: the images, VGG16 frozen, with a new last layer.
    dsets = {x: datasets.ImageFolder(args.data_dir / x, imagenet_format, loader=load_image) for x in ["train", "valid"]}
    dset_sizes = {x: len(dsets[x]) for x in ["train", "valid"]}
    dset_classes = dsets["train"].classes
    files_sha256 = {x: files_hash(dsets[x]) for x in ["train", "valid"]}
    options = loader_options(dset_sizes["train"], args.num_workers, device)
    inputs_try, labels_try = next(iter(DataLoader(dsets["valid"], batch_size=5)))
    model_vgg = load_vgg16(args.weights)
    weights_sha256 = weights_hash(model_vgg)
    torch.manual_seed(args.seed)
    model_vgg = freeze_and_replace_head(model_vgg)
    path_03, again = args.output_dir / "03_metrics.json", "run python 03_finetune_head.py again"
    metrics_03 = load(path_03, again) if path_03.exists() else {}
    from_03 = metrics_03.get("weights_sha256") == weights_sha256 and metrics_03.get("files_sha256") == files_sha256
    if from_03:
        load_state(model_vgg.classifier[6], args.output_dir / "03_head.pt", again)
    model_vgg = to_device(model_vgg, device, args.bf16)

    banner("Speeding up the learning by precomputing features", 3460, args.pause)
    # Notice: frozen gives the same for an image in every epoch, so it need not run more than once.
    if args.layer == "conv":
        frozen, trained = model_vgg.features, model_vgg.classifier
    else:
        # The frozen fully connected layers run once too, in eval mode: their dropout no longer makes each epoch
        # see other features. What is left to train is the last layer alone, on 4096 fixed numbers an image.
        frozen = nn.Sequential(model_vgg.features, model_vgg.avgpool, nn.Flatten(), model_vgg.classifier[:6])
        trained = model_vgg.classifier[6:]
    frozen.eval()
    frozen_dtype = next(frozen.parameters()).dtype
    with torch.inference_mode():
        x_try = frozen(inputs_try.to(device, frozen_dtype))
    print(f"features of the first batch, x_try.shape: {tuple(x_try.shape)}")  # (5, 512, 7, 7) or (5, 4096)

    paths = {x: args.output_dir / f"{args.layer}_feat_{x}.npy" for x in ["train", "valid"]}
    conv_feat = {}
    for x in ["train", "valid"]:
        made_from = {"layer": args.layer, "files": files_sha256[x], "weights": weights_sha256,
                     "transform": str(imagenet_format), "precision": f"{frozen_dtype} on {device.type}"}
        if not made_already(paths[x], made_from):
            preconvfeat(frozen, dsets[x], paths[x], made_from, x_try.shape[1:], device, options)
        conv_feat[x] = load(paths[x], "delete it and run again")
        if conv_feat[x].shape != (dset_sizes[x], *x_try.shape[1:]):
            raise UserError(f"{paths[x]} has another shape than it should: delete it and run again")
    conv_feat_train, conv_feat_valid = conv_feat["train"], conv_feat["valid"]  # memory-mapped, read as they are needed
    labels_train, labels_valid = (np.array(dsets[x].targets) for x in ["train", "valid"])  # (N,), (M,)
    save(args.output_dir, {"labels_train.npy": labels_train, "labels_valid.npy": labels_valid})
    print("conv_feat_train.shape:", conv_feat_train.shape)  # (N, 512, 7, 7) or (N, 4096)

    banner("Creating a new data generator", 3460, args.pause)
    # No image is loaded any more.
    loaderfeat_train = feature_loader(conv_feat_train, labels_train, args.batch_size, shuffle=True)
    loaderfeat_valid = feature_loader(conv_feat_valid, labels_valid, args.batch_size, shuffle=False)
    print(f"{len(loaderfeat_train)} batches of {args.batch_size} rows of {math.prod(x_try.shape[1:]):,} numbers")

    if from_03:
        print("the last layer goes on from 03_head.pt: trained on the same images, with the same weights")
    else:
        print("the last layer starts afresh: there is no 03_head.pt for these images and weights")
    criterion = nn.NLLLoss()
    optimizer_vgg = torch.optim.SGD(model_vgg.classifier[6].parameters(), lr=args.lr)
    torch.manual_seed(args.seed)  # shuffling and dropout
    start = time.perf_counter()
    history = train_model(trained, loaderfeat_train, optimizer_vgg, args.epochs, criterion)
    train_seconds = time.perf_counter() - start
    print(f"\nThe test on the {dset_sizes['valid']:,} validation images:")
    predictions, all_proba, all_classes, valid_loss, valid_accuracy = test_model(trained, loaderfeat_valid, criterion)

    save(args.output_dir, {
        "04_head.pt": {name: value.cpu() for name, value in model_vgg.classifier[6].state_dict().items()},
        "04_predictions.npy": predictions,
        "04_all_proba.npy": all_proba,
        "04_all_classes.npy": all_classes,
        "04_metrics.json": {
            "options": vars(args), "device": str(device),
            "weights": args.weights, "pretrained": args.weights != "untrained", "weights_sha256": weights_sha256,
            "dataset": args.data_dir, "dataset_sizes": dset_sizes, "files_sha256": files_sha256,
            "from_03_head": from_03, "train_seconds": train_seconds, "seconds_per_epoch": train_seconds / args.epochs,
            "train_loss": [loss for loss, _ in history], "train_accuracy": [accuracy for _, accuracy in history],
            "valid_loss": valid_loss, "valid_accuracy": valid_accuracy,
        },
    })

    # What precomputing saves.
    seconds = {"on features": train_seconds / args.epochs}
    once = dset_sizes["train"] / load(paths["train"].with_suffix(".json"), "run again")["images_per_second"]
    print(f"\ntraining, per epoch on features: {seconds['on features']:.2f} s; computing them once: {once:.1f} s")
    if from_03 and (metrics_03["device"], metrics_03["options"]["bf16"]) == (str(device), args.bf16):
        seconds["on images"] = metrics_03["seconds_per_epoch"]
        saved = seconds["on images"] - seconds["on features"]
        print(f"training, per epoch on images (03_finetune_head.py): {seconds['on images']:.2f} s; precomputing has "
              + (f"paid for itself after epoch {math.ceil(once / saved)}" if saved > 0 else "not paid for itself"))
    else:
        print("to compare with training on images, run python 03_finetune_head.py with the same options before")

    plot_training(history, valid_loss, valid_accuracy, seconds, f"Training the last layer on features{note}")
    save_figure(args.output_dir / "04_training.png", args.show)
    idx = np.unique(np.linspace(0, dset_sizes["valid"] - 1, 8).astype(int))  # of both classes
    titles = [f"{dset_classes[all_classes[x]]}\npredicted {dset_classes[predictions[x]]}, {all_proba[x].max():.3f}"
              for x in idx]
    show_images([dsets["valid"][x][0] for x in idx], titles,
                f"Validation images: true class, prediction and its probability{note}")
    save_figure(args.output_dir / "04_valid_batch.png", args.show)

    print(f"\nDone{note}. Next, with the same options: python 05_analysis.py")
