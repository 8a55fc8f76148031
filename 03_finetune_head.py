"""Freeze VGG16, replace its last layer, train that layer alone, test the result.

The lecture's "Modifying the last layer and setting the gradient false to all layers" (video from 0:45:55,
https://youtu.be/ZhC-DIrCe6A?t=2755) and "Training the fully connected module" (from 0:49:50).

  python 03_finetune_head.py --sample    24 images, some seconds
  python 03_finetune_head.py             all 25,000: minutes on a GPU, an hour and more on a CPU

Reads the dataset. Leaves in the output folder 03_head.pt, 03_predictions.npy, 03_all_proba.npy, 03_all_classes.npy,
03_metrics.json, 03_training.png and 03_valid_batch.png.
"""
import time

from common import (banner, check_dataset, choose_weights, files_hash, freeze_and_replace_head, get_device,
                    imagenet_format, load_image, load_vgg16, loader_options, option_parser, parse_options, save,
                    save_figure, show_images, test_model, to_device, train_model, weights_hash)
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets


def plot_training(history, valid_loss, valid_accuracy, title):
    """Loss and accuracy per epoch while training, and on the validation set after it."""
    plt.figure(figsize=(10, 4), layout="constrained")
    plt.suptitle(title)
    epochs = range(1, len(history) + 1)
    for i, (name, valid) in enumerate([("loss (mean per image)", valid_loss), ("accuracy", valid_accuracy)]):
        plt.subplot(1, 2, i + 1)
        plt.plot(epochs, [epoch[i] for epoch in history], "o-", label="train, during the epoch")
        plt.plot(len(history), valid, "s", label="valid, after training")
        plt.xlabel("epoch")
        plt.ylabel(name)
        plt.xticks(epochs)
        plt.legend()


if __name__ == "__main__":
    parser = option_parser(__doc__)
    parser.add_argument("--epochs", type=int, default=2, metavar="N", help="default: 2")
    parser.add_argument("--lr", type=float, default=0.001, help="learning rate (default: 0.001)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="default: 64")
    args = parse_options(parser)
    device = get_device(args.device, args.bf16)
    check_dataset(args.data_dir)
    args.weights = choose_weights(args.weights, args.sample)
    note = ", untrained weights" if args.weights == "untrained" else ""

    # As in 01_data.py and 02_vgg_imagenet.py.
    dsets = {x: datasets.ImageFolder(args.data_dir / x, imagenet_format, loader=load_image) for x in ["train", "valid"]}
    dset_sizes = {x: len(dsets[x]) for x in ["train", "valid"]}
    dset_classes = dsets["train"].classes
    options = loader_options(dset_sizes["train"], args.num_workers, device)
    loader_train = DataLoader(dsets["train"], batch_size=args.batch_size, shuffle=True, **options)
    loader_valid = DataLoader(dsets["valid"], batch_size=5, shuffle=False, **options)
    inputs_try, labels_try = next(iter(DataLoader(dsets["valid"], batch_size=5)))
    model_vgg = load_vgg16(args.weights)
    weights_sha256 = weights_hash(model_vgg)

    banner("Modifying the last layer and setting the gradient false to all layers", 2755, args.pause)
    print(model_vgg)

    # Notice: with the gradient switched off, backprop computes nothing for these layers, and no step changes them.
    torch.manual_seed(args.seed)  # the new layer starts from random numbers
    model_vgg = freeze_and_replace_head(model_vgg)
    print("\nThe classifier with its new last layer:", model_vgg.classifier, sep="\n")
    n_trainable = sum(param.numel() for param in model_vgg.parameters() if param.requires_grad)
    n_params = sum(param.numel() for param in model_vgg.parameters())
    print(f"\ntrainable parameters: {n_trainable:,} (2 x 4096 weights + 2 biases), of {n_params:,}")

    # The model goes to the GPU, where there is one.
    model_vgg = to_device(model_vgg, device, args.bf16)

    banner("Training the fully connected module", 2990, args.pause)
    banner("Creating loss function and optimizer", 2990, args.pause)
    criterion = nn.NLLLoss()
    # Notice: the optimizer is given the last layer alone.
    optimizer_vgg = torch.optim.SGD(model_vgg.classifier[6].parameters(), lr=args.lr)
    print(criterion, optimizer_vgg, sep="\n")

    banner("Training the model", 2990, args.pause)
    torch.manual_seed(args.seed)  # shuffling and dropout
    start = time.perf_counter()
    history = train_model(model_vgg, loader_train, optimizer_vgg, args.epochs, criterion)
    train_seconds = time.perf_counter() - start
    print(f"{args.epochs} epochs on {dset_sizes['train']:,} images: {train_seconds:.1f} s")

    print(f"\nThe test on the {dset_sizes['valid']:,} validation images:")
    predictions, all_proba, all_classes, valid_loss, valid_accuracy = test_model(model_vgg, loader_valid, criterion)

    save(args.output_dir, {
        "03_head.pt": {name: value.cpu() for name, value in model_vgg.classifier[6].state_dict().items()},
        "03_predictions.npy": predictions,
        "03_all_proba.npy": all_proba,
        "03_all_classes.npy": all_classes,
        "03_metrics.json": {
            "options": vars(args), "device": str(device),
            "weights": args.weights, "pretrained": args.weights != "untrained", "weights_sha256": weights_sha256,
            "dataset": args.data_dir, "dataset_sizes": dset_sizes,
            "files_sha256": {x: files_hash(dsets[x]) for x in ["train", "valid"]},
            "train_seconds": train_seconds, "seconds_per_epoch": train_seconds / args.epochs,
            "train_loss": [loss for loss, _ in history], "train_accuracy": [accuracy for _, accuracy in history],
            "valid_loss": valid_loss, "valid_accuracy": valid_accuracy,
        },
    })

    # Some validation images of both classes; the lecture's first batch holds cats alone.
    n_images = 8
    idx = np.unique(np.linspace(0, dset_sizes["valid"] - 1, n_images).astype(int))
    inputs = torch.stack([dsets["valid"][i][0] for i in idx])  # (8, 3, 224, 224)
    with torch.inference_mode():
        outputs = model_vgg(inputs.to(device, model_vgg.features[0].weight.dtype)).cpu()  # (8, 2)
    print("\nprobabilities of cats and dogs for some of them, exp(outputs):", torch.exp(outputs), sep="\n")
    print("their classes:", all_classes[idx])
    titles = [f"{dset_classes[all_classes[x]]}\npredicted {dset_classes[predictions[x]]}, {all_proba[x].max():.3f}"
              for x in idx]
    show_images(inputs, titles, f"Validation images: true class, prediction and its probability{note}")
    save_figure(args.output_dir / "03_valid_batch.png", args.show)

    plot_training(history, valid_loss, valid_accuracy, f"Training the last layer on images{note}")
    save_figure(args.output_dir / "03_training.png", args.show)

    print(f"\nDone{note}. Next, with the same options: python 04_precompute.py")
