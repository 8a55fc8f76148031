"""Freeze VGG16, replace its last layer, train that layer alone, test the result.

The lecture's "Modifying the last layer and setting the gradient false to all layers" (video from 0:45:55,
https://youtu.be/ZhC-DIrCe6A?t=2755) and "Training the fully connected module" (from 0:49:50).

  python 03_finetune_head.py --sample    24 images, some seconds
  python 03_finetune_head.py             all 25,000: minutes on a GPU, hours on a CPU

Reads the dataset. Leaves in the output folder 03_head.pt, 03_predictions.npy, 03_all_proba.npy, 03_all_classes.npy,
03_metrics.json, 03_training.png and 03_valid_batch.png.
"""
import matplotlib.pyplot as plt
import numpy as np
import torch
import torchvision  # an import that this script does not use is for what the video types
from torch import nn
from torchvision import datasets, models, transforms

from common import (banner, choose_weights, identify, imshow, load_data, load_vgg16, made_from, option_parser,
                    parse_options, plot_training, save_figure, save_results, show_predictions, test_model,
                    to_device, train_model)

if __name__ == "__main__":
    parser = option_parser(__doc__)
    parser.add_argument("--epochs", type=int, default=2, metavar="N", help="default: 2")
    parser.add_argument("--lr", type=float, default=0.001, help="learning rate (default: 0.001)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="default: 64")
    args = parse_options(parser)
    device, dsets, loader_train, loader_valid = load_data(args, args.batch_size)  # as in 01_data.py
    dset_sizes = {x: len(dsets[x]) for x in ["train", "valid"]}
    dset_classes = dsets["train"].classes
    images = identify(dsets)
    note = choose_weights(args)

# %% Modifying the last layer and setting the gradient false to all layers
    banner("Modifying the last layer and setting the gradient false to all layers", 2755, args.pause)
    model_vgg = load_vgg16(args.weights)  # as in 02_vgg_imagenet.py
    print(model_vgg)

    # Convolutions look for small patterns locally, the same ones all over the picture. Pooling halves its width and
    # height, so that small shifts matter less. Dense layers (Linear) combine what was found everywhere; the first of
    # them holds 103 of the 138 million numbers.
    print("\nthe size of one image after each block, and how many numbers to learn the block holds:")
    x, block, n_params = torch.zeros(1, 3, 224, 224), 0, 0
    with torch.inference_mode():
        for layer in [*model_vgg.features, model_vgg.avgpool, nn.Flatten(), *model_vgg.classifier]:
            x = layer(x)
            n_params += sum(param.numel() for param in layer.parameters())
            if isinstance(layer, (nn.MaxPool2d, nn.Linear)):  # the end of a block
                block += 1
                kind = "dense" if isinstance(layer, nn.Linear) else "convolutions, pooling"
                print(f"  {block} {kind:<22} {tuple(x.shape[1:])!s:<16} {n_params:12,}")
                n_params = 0

    # Notice: no gradient is computed for what is frozen, and no step changes it.
    for param in model_vgg.parameters():
        param.requires_grad = False
    # All that VGG16 has learned is kept; only the number of its outputs changes, from 1000 classes to 2.
    torch.manual_seed(args.seed)  # the new layer starts from random numbers
    model_vgg.classifier[6] = nn.Linear(4096, 2)
    # LogSoftmax turns the outputs into log-probabilities, which is what NLLLoss expects.
    model_vgg.classifier.append(nn.LogSoftmax(dim=1))
    print("\nthe classifier with its new last layer:", model_vgg.classifier, sep="\n")
    n_trainable = sum(param.numel() for param in model_vgg.parameters() if param.requires_grad)
    n_frozen = sum(param.numel() for param in model_vgg.parameters() if not param.requires_grad)
    print(f"trainable parameters: {n_trainable:,} (2 x 4096 weights + 2 biases); frozen: {n_frozen:,}")

    model_vgg = to_device(model_vgg, device, args.bf16)

# %% Training the fully connected module
    banner("Training the fully connected module", 2990, args.pause)

# %% Creating loss function and optimizer
    banner("Creating loss function and optimizer")
    # NLLLoss: minus the log-probability of the true class. A guess, one half for each, costs ln 2 = 0.69.
    criterion = nn.NLLLoss()
    # SGD: each number takes a step against its gradient, lr times as long. Notice: it is given the last layer alone.
    lr = args.lr
    optimizer_vgg = torch.optim.SGD(model_vgg.classifier[6].parameters(), lr=lr)
    print(criterion, optimizer_vgg, sep="\n")

# %% Training the model
    banner("Training the model")
    # train_model and test_model are the lecture's own functions, written out in common.py, near the top. The accuracy
    # of an epoch is measured while it learns, with dropout on: that of the test can well be higher.
    before = {name: param.detach().clone() for name, param in model_vgg.named_parameters()}
    torch.manual_seed(args.seed)  # shuffling and dropout
    history = []
    train_model(model_vgg, loader_train, size=dset_sizes["train"], epochs=args.epochs, optimizer=optimizer_vgg,
                criterion=criterion, history=history)

    # The proof: which numbers have changed?
    for kind, learns in [("frozen", False), ("trainable", True)]:
        params = {name: param for name, param in model_vgg.named_parameters() if param.requires_grad == learns}
        n_changed = sum(int((param != before[name]).sum()) for name, param in params.items())
        print(f"of {sum(param.numel() for param in params.values()):,} {kind} numbers {n_changed:,} changed")
    record = made_from(images, model_vgg)
    save_results(args, "03", model_vgg, record, history)  # now: the test may meet a bad image

    predictions, all_proba, all_classes = test_model(model_vgg, loader_valid, size=dset_sizes["valid"])
    metrics = save_results(args, "03", model_vgg, record, history, (predictions, all_proba, all_classes))

    # The first four cats and the last four dogs to validate; the first batch of loader_valid holds hardly any dog
    n_images = 8
    every = range(dset_sizes["valid"])
    idx = sorted({*every[:n_images // 2], *every[-n_images // 2:]})
    inputs = torch.stack([dsets["valid"][i][0] for i in idx])  # (8, 3, 224, 224)
    classes = torch.tensor([dsets["valid"].targets[i] for i in idx])
    with torch.inference_mode():
        outputs = model_vgg(inputs.to(device))  # (8, 2)
    print(f"\nprobabilities of cat and dog for {len(idx)} images, torch.exp(outputs):", torch.exp(outputs), sep="\n")
    print("their classes:", classes)
    show_predictions(inputs, [dsets["valid"].imgs[i][0] for i in idx], classes, outputs.exp().cpu(),
                     f"Validation images: true class, prediction and its probability{note}")
    save_figure(args.output_dir / "03_valid_batch.png", args.show)

    plot_training(metrics, f"Training the last layer on images{note}")
    save_figure(args.output_dir / "03_training.png", args.show)

    n_steps = args.epochs * len(loader_train)
    if args.sample and n_steps < 10:
        print(f"\n{n_steps} steps on {dset_sizes['train']} images: it runs, it has not learned yet.")
        untrained = " --weights untrained --lr 0.1" if note else ""
        print(f"To see it learn: python 04_precompute.py --sample --layer fc7{untrained}")
    print(f"\nDone{note}. Next, with the same common options: python 04_precompute.py")
