"""Run the frozen layers once, save their outputs (the features), and train on those.

The lecture's "Speeding up the learning by precomputing features" (video from 0:57:40,
https://youtu.be/ZhC-DIrCe6A?t=3460).

  python 04_precompute.py --sample                     24 images, less than a minute
  python 04_precompute.py --limit 1000 --layer fc7     1,000 images: minutes on a CPU
  python 04_precompute.py                              all 25,000 images; if interrupted, run it again to resume

Reads the dataset, and the results of 03_finetune_head.py if there are any. Writes to the output folder
conv_feat_train.npy (N, 512, 7, 7) and conv_feat_valid.npy (M, 512, 7, 7) for N training and M validation images (2.5 GB
for all; with --layer fc7: fc7_feat_train.npy (N, 4096) and fc7_feat_valid.npy (M, 4096), 0.4 GB), labels_train.npy,
labels_valid.npy, and the same files as 03 (04_head.pt, ...), except 03_blocks.png.
"""
# %% Imports and options. Imports that the script does not use are there so that you can type the video's commands.
from support.run import banner, print_options, start_run  # first: it checks the environment
import math

import matplotlib.pyplot as plt
import numpy as np
import torch
import torchvision
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchvision import datasets, models, transforms

from common import (four_of_each, freeze_and_replace_head, get_weights, imshow, load_data, load_state, load_vgg16,
                    log_loss, plot_training, save_figure, save_results, show_predictions, test_model, to_device,
                    train_model)
from support.features import FeatureFile
from support.files import load, save
from support.options import number, option_parser
from support.progress import progress
from support.records import differences, make_record

if __name__ == "__main__":  # worker processes, which load images, import this file again and must not run the rest
    parser = option_parser("04_precompute.py", __doc__)
    parser.add_argument("--epochs", type=number(1, 10**6), default=50, metavar="N", help="epochs (default: 50)")
    parser.add_argument("--lr", type=number(0, 1_000, float), default=0.001, help="learning rate (default: 0.001)")
    parser.add_argument("--batch-size", type=number(1, 10**6), default=128, metavar="N",
                        help="training images per batch, that is, per update (default: 128)")
    parser.add_argument("--layer", choices=["conv", "fc7"], default="conv", help="precompute up to this layer: "
                        "conv (all convolutions, as in the lecture) or fc7 (all layers but the last); default: conv")
    args = start_run(parser)
    device, dsets, loader_train, loader_valid = load_data(args)  # as in 01_data.py
    dset_sizes = {x: len(dsets[x]) for x in ["train", "valid"]}
    dset_classes = dsets["train"].classes
    args.weights = get_weights(args.weights, args.sample)
    print_options(args)
    note = " (untrained weights)" if args.weights == "untrained" else ""

# %% Speeding up the learning by precomputing features
    banner("Speeding up the learning by precomputing features", "0:57:40", args.pause)
    model_vgg = load_vgg16(args.weights)  # as in 02_vgg_imagenet.py
    torch.manual_seed(args.seed)
    model_vgg = to_device(freeze_and_replace_head(model_vgg), device, args.bf16)  # as in 03_finetune_head.py

    # Note: without dropout, frozen layers give the same output for an image in every epoch, so they need to run only
    # once. Before you read on: how many numbers are the features of one image?
    if args.layer == "conv":
        # avgpool changes nothing here, because its input is already 7 x 7; the lecture leaves it out.
        frozen, trained = nn.Sequential(model_vgg.features, model_vgg.avgpool), model_vgg.classifier
    else:
        # The frozen dense layers run only once too, without dropout. VGG16's authors call its three dense layers fc6,
        # fc7 and fc8. Only fc8, the last one, is left to train. A dense layer and LogSoftmax on fixed features: that is
        # a logistic regression. ([:6] is not a copy: a slice of a Sequential shares its layers.)
        frozen = nn.Sequential(model_vgg.features, model_vgg.avgpool, nn.Flatten(), model_vgg.classifier[:6])
        trained = model_vgg.classifier[6:]
    frozen.eval()
    inputs_try, labels_try = next(iter(loader_valid))
    inputs_try = inputs_try.to(device)
    with torch.inference_mode():
        x_try = frozen(inputs_try)
    print("features of the first batch, x_try.shape:", tuple(x_try.shape))  # (5, 512, 7, 7) or (5, 4096)
    print(f"numbers for one image: {x_try[0].numel():,} (the image itself: {inputs_try[0].numel():,})")

    @torch.inference_mode()
    def preconvfeat(dataloader):
        """Return the features of the dataloader's images, (N, 512, 7, 7) or (N, 4096) float32, and a list of labels."""
        conv_features = []
        labels_list = []
        for inputs, labels in dataloader:
            inputs = inputs.to(device, non_blocking=device.type == "cuda")  # as in train_model
            x = frozen(inputs)
            conv_features.extend(x.cpu().numpy())
            labels_list.extend(labels.numpy())
        conv_features = np.array(conv_features)
        return conv_features, labels_list

    # The lecture calls conv_feat_train, labels_train = preconvfeat(loader_train). This keeps all features in memory, in
    # shuffled order, and loses them at the end. The loop below does the same, one batch at a time ([batch] works like a
    # dataloader), in fixed order, so that row i belongs to image i. It saves each batch to a file, so that an
    # interrupted run can be resumed. You can follow the video without understanding the details of this loop.
    batch_size = 8 if device.type == "cpu" else 64  # on a CPU, larger batches are slower and need more memory
    conv_feat = {}
    of_frozen = make_record({}, frozen)  # what the frozen layers are and compute
    for x in ["train", "valid"]:
        made_from = make_record({x: dsets[x]}) | of_frozen  # if any of this changes, the features are computed again
        file = FeatureFile(args.output_dir / f"{args.layer}_feat_{x}.npy", (dset_sizes[x], *x_try.shape[1:]), made_from,
                           batch_size)
        remaining = Subset(dsets[x], range(file.done, dset_sizes[x]))  # skip what an earlier run has computed
        loader = DataLoader(remaining, batch_size=batch_size, num_workers=loader_train.num_workers,
                            pin_memory=loader_train.pin_memory)
        for batch in progress(loader, len(loader), len(remaining)):
            features, _ = preconvfeat([batch])
            file.append(features)
        conv_feat[x] = file.finish()
    conv_feat_train, conv_feat_valid = conv_feat["train"], conv_feat["valid"]
    print("conv_feat_train.shape:", conv_feat_train.shape)  # (N, 512, 7, 7) or (N, 4096)
    labels_train = np.array(dsets["train"].targets, dtype=np.int64)  # (N,)
    labels_valid = np.array(dsets["valid"].targets, dtype=np.int64)  # (M,)
    save(args.output_dir, {"labels_train.npy": labels_train, "labels_valid.npy": labels_valid})

# %% Creating a new data generator
    banner("Creating a new data generator")
    # From here on, no images are loaded: the training uses the features. Don't worry if these lines are unclear: they
    # only make batches of the saved features, flattened from (N, 512, 7, 7) to (N, 25088).
    datasetfeat_train = TensorDataset(torch.from_numpy(conv_feat_train).flatten(1), torch.from_numpy(labels_train))
    loaderfeat_train = DataLoader(datasetfeat_train, batch_size=args.batch_size, shuffle=True)
    datasetfeat_valid = TensorDataset(torch.from_numpy(conv_feat_valid).flatten(1), torch.from_numpy(labels_valid))
    # A random generator of its own: the tests after each epoch must not change the random numbers of the training.
    loaderfeat_valid = DataLoader(datasetfeat_valid, batch_size=args.batch_size, generator=torch.Generator())

    # As in the lecture, the training starts from the last layer that 03 trained, if 03 used the same images and frozen
    # layers.
    record = make_record(dsets, model_vgg, model_vgg.classifier[6])  # what a result depends on
    head_03, path_03 = args.output_dir / "03_head.pt", args.output_dir / "03_metrics.json"
    if not path_03.exists():  # of a run of 03 that was stopped
        head_03, path_03 = args.output_dir / "03_unfinished_head.pt", args.output_dir / "03_unfinished_metrics.json"
    metrics_03 = load(path_03, "run python 03_finetune_head.py again") if path_03.exists() else None
    if metrics_03 is None:
        print("the last layer starts from random weights: no results of 03_finetune_head.py were found")
    elif changed := differences(metrics_03.get("made_from", {}), record):
        print(f"the last layer starts from random weights: {head_03.name} was trained with {changed}")
        metrics_03 = None
    else:
        print(f"the last layer starts from {head_03.name}, trained on the same images with the same frozen layers")
        load_state(model_vgg.classifier[6], head_03, "run python 03_finetune_head.py again")
        model_vgg.to(device)  # load_state leaves the new parameters on the CPU

    def after_epoch(history):  # test, to see when overfitting begins, and save what is done
        predictions, all_proba, all_classes = test_model(trained, loaderfeat_valid, size=dset_sizes["valid"])
        history[-1]["valid_loss"] = log_loss(all_proba, all_classes)
        history[-1]["valid_accuracy"] = np.mean(predictions == all_classes)
        save_results(args, "04", model_vgg, {}, history)  # without a record: it is used by no other script

    # Train for 50 epochs (03: 2), as an epoch on features takes a fraction of the time (printed below). As in 03, the
    # optimizer receives only the last layer's parameters. (In common.py, search for def train_model, def test_model.)
    criterion = nn.NLLLoss()
    optimizer_vgg = torch.optim.SGD(model_vgg.classifier[6].parameters(), lr=args.lr)
    history = []  # used if you replace the call below by the lecture's, which has no "history ="
    torch.manual_seed(args.seed)  # for shuffling and dropout
    history = train_model(trained, loaderfeat_train, size=dset_sizes["train"], epochs=args.epochs,
                          optimizer=optimizer_vgg, criterion=criterion, after_epoch=after_epoch)

    save_results(args, "04", model_vgg, {}, history)  # save now, in case a test_model of your own stops
    # The lecture's call. It repeats the test after the last epoch.
    predictions, all_proba, all_classes = test_model(trained, loaderfeat_valid, size=dset_sizes["valid"])
    record = make_record(dsets, model_vgg, model_vgg.classifier[6])  # again: your edits may have changed other layers
    metrics = save_results(args, "04", model_vgg, record, history, (predictions, all_proba, all_classes))

    # The time gained by precomputing. If an earlier run computed the features, their .json file contains its speed.
    speed = load(args.output_dir / f"{args.layer}_feat_train.json", "run this script again")["images_per_second"]
    on_images = metrics_03.get("seconds_per_epoch") if metrics_03 else None
    on_features = metrics.get("seconds_per_epoch")
    if on_features:
        print(f"\nan epoch on features: {on_features:.3f} s")
    if on_features and on_images and speed:
        once = dset_sizes["train"] / speed
        print(f"an epoch on images, in 03_finetune_head.py: {on_images:.3f} s")
        print(f"computing the features of the training images, once: {once:.1f} s", end="")
        if on_images > on_features:
            print(f"; this pays off after epoch {math.ceil(once / (on_images - on_features))}")
        else:
            print("; this does not pay off")

    plot_training(metrics, f"Training the last layer on features{note}")
    save_figure(args.output_dir / "04_training.png", args.show)

    idx = four_of_each(dsets["valid"])  # four cats and four dogs
    show_predictions([dsets["valid"][i][0] for i in idx], [dsets["valid"].imgs[i][0] for i in idx], all_classes[idx],
                     all_proba[idx], f"Validation images: true class, prediction and its probability{note}")
    save_figure(args.output_dir / "04_valid_batch.png", args.show)
    if args.sample and note and metrics["valid_loss"] > 0.6:
        print("\nThe untrained network has learned almost nothing in this time. To see it learn:\n"
              "python 04_precompute.py --sample --layer fc7 --epochs 200 --weights untrained --lr 0.1")
    print(f"\nDone{note}. Next, with the same options (--sample, --limit, ...): python 05_analysis.py")
