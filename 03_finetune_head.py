"""Freeze VGG16, replace its last layer, train only that layer, and test the result.

The lecture's "Modifying the last layer and setting the gradient false to all layers" (video from 0:45:55,
https://youtu.be/ZhC-DIrCe6A?t=2755) and "Training the fully connected module" (from 0:49:50).

  python 03_finetune_head.py --sample    24 images, less than a minute
  python 03_finetune_head.py             all 25,000 images: minutes on a GPU, hours on a CPU

Reads the dataset. Writes to the output folder 03_head.pt (state dict of the last layer), 03_predictions.npy (M,),
03_all_proba.npy (M, 2) and 03_all_classes.npy (M,) for M validation images, 03_metrics.json (options, losses,
accuracies, seconds), 03_blocks.png, 03_training.png and 03_valid_batch.png.
"""
# %% Imports and options. Imports that the script does not use are there so that you can type the video's commands.
from support.run import banner, print_options, start_run  # first: it checks the environment
import matplotlib.pyplot as plt
import numpy as np
import torch
import torchvision
from torch import nn
from torchvision import datasets, models, transforms

from common import (four_of_each, get_weights, imshow, load_data, load_vgg16, plot_training, save_figure, save_results,
                    show_predictions, test_model, to_device, to_log_proba, train_model)
from support.images import load_image
from support.options import number, option_parser
from support.records import make_record

if __name__ == "__main__":  # worker processes, which load images, import this file again and must not run the rest
    parser = option_parser("03_finetune_head.py", __doc__)
    parser.add_argument("--epochs", type=number(1, 10**6), default=2, metavar="N", help="epochs (default: 2)")
    parser.add_argument("--lr", type=number(0, 1_000, float), default=0.001, help="learning rate (default: 0.001)")
    parser.add_argument("--batch-size", type=number(1, 10**6), default=64, metavar="N",
                        help="training images per batch, that is, per update (default: 64)")
    args = start_run(parser)
    device, dsets, loader_train, loader_valid = load_data(args, args.batch_size)  # as in 01_data.py
    dset_sizes = {x: len(dsets[x]) for x in ["train", "valid"]}
    dset_classes = dsets["train"].classes
    args.weights = get_weights(args.weights, args.sample)
    print_options(args)
    note = " (untrained weights)" if args.weights == "untrained" else ""

# %% Modifying the last layer and setting the gradient false to all layers
    banner("Modifying the last layer and setting the gradient false to all layers", "0:45:55", args.pause)
    model_vgg = load_vgg16(args.weights)  # as in 02_vgg_imagenet.py
    print(model_vgg)

    # The lecture's diagram of VGG16. Convolutions detect small patterns anywhere in the image. Pooling, at the end of
    # each of the first blocks, halves width and height, so small shifts matter less. Dense layers (Linear) combine
    # patterns from the whole image; the first one contains 103 million of the 138 million parameters.
    blocks = []
    first = 0
    for i, layer in enumerate(model_vgg.features):
        if isinstance(layer, (nn.MaxPool2d, nn.AvgPool2d)):  # AvgPool2d: if you replace the pooling
            blocks.append(model_vgg.features[first:i + 1])  # a slice: not a copy, but the same layers
            first = i + 1
    n_drawn = len(blocks)  # 5
    # Blocks 6 to 8 are the dense layers. avgpool changes nothing here: its input is already 7 x 7. Flatten turns its
    # output, 512 x 7 x 7, into the 25,088 numbers in a row that Linear expects.
    blocks += [nn.Sequential(model_vgg.avgpool, nn.Flatten(), model_vgg.classifier[:2]),
               model_vgg.classifier[3:5], model_vgg.classifier[6]]
    # Among the first 20 validation images, look for one of at least 224 x 224 pixels: it has no black borders.
    large = [i for i in range(min(dset_sizes["valid"], 20)) if min(load_image(dsets["valid"].imgs[i][0]).size) >= 224]
    image, _ = dsets["valid"][large[0] if large else 0]  # (3, 224, 224)
    plt.figure(figsize=(15, 3.6), layout="constrained")
    plt.suptitle(f"A validation image after each block of VGG16{note}")
    plt.subplot(1, n_drawn + 1, 1, anchor="N")
    imshow(image, "input")
    print("\neach block: output shape for one image, and number of parameters")
    x = image[None]  # the network expects a batch; [None] makes a batch of one: (1, 3, 224, 224)
    model_vgg.eval()  # switches dropout off, as in 02
    for i, block in enumerate(blocks, 1):
        with torch.inference_mode():
            x = block(x)
        shape = " x ".join(str(length) for length in x.shape[1:])
        n_convolutions = sum(isinstance(layer, nn.Conv2d) for layer in block.modules())
        name = f"{n_convolutions} convolutions, pooling" if n_convolutions else "dense"
        n_params = sum(param.numel() for param in block.parameters())
        print(f"  block {i}: {name:<24} {shape:<15} {n_params:11,}")
        if i <= n_drawn:
            plt.subplot(1, n_drawn + 1, i + 1, anchor="N")
            plt.imshow(x[0].mean(dim=0).numpy())  # the mean over the channels, from dark blue (low) to yellow (high)
            plt.gca().set(xticks=[], yticks=[], title=f"block {i}", xlabel=f"{shape}\n{n_params:,} parameters")
    save_figure(args.output_dir / "03_blocks.png", args.show)

    # Freeze all parameters: they get no gradients, so training never changes them.
    for param in model_vgg.parameters():
        param.requires_grad = False
    # Keep all layers but the last, which is classifier[6] in the printout above; replace it with a new layer that has 2
    # outputs instead of 1,000. (The old layer's 4.1 million weights, for ImageNet's classes, are discarded.)
    # classifier[6] is the lecture's classifier._modules['6'], and append adds its _modules['7'].
    # Before you read on: how many parameters does the new layer have?
    torch.manual_seed(args.seed)  # the new layer starts from random weights
    model_vgg.classifier[6] = nn.Linear(4096, 2)
    # LogSoftmax is the logarithm of 02's Softmax. NLLLoss, below, expects these log-probabilities.
    model_vgg.classifier.append(nn.LogSoftmax(dim=1))
    print("\nthe classifier with its new last layer:", model_vgg.classifier, sep="\n")
    n_trainable = sum(param.numel() for param in model_vgg.parameters() if param.requires_grad)
    n_frozen = sum(param.numel() for param in model_vgg.parameters() if not param.requires_grad)
    shapes = " + ".join(" x ".join(map(str, param.shape)) for param in model_vgg.classifier[6].parameters())
    print(f"trainable parameters: {n_trainable:,} (new last layer: {shapes}); frozen: {n_frozen:,}")

    model_vgg = to_device(model_vgg, device, args.bf16)

# %% Training the fully connected module
    banner("Training the fully connected module", "0:49:50", args.pause)

# %% Creating loss function and optimizer
    banner("Creating loss function and optimizer")
    # NLLLoss: minus the log-probability of the true class. Guessing 50:50 costs -log(0.5) = 0.69.
    criterion = nn.NLLLoss()
    # SGD: each parameter p becomes p - lr * gradient. Note: the optimizer receives only the last layer's parameters.
    lr = args.lr
    optimizer_vgg = torch.optim.SGD(model_vgg.classifier[6].parameters(), lr=lr)

# %% Training the model
    banner("Training the model")
    # The lecture's train_model is in common.py: search for def train_model. It also explains why the video's losses are
    # smaller. An epoch uses every training image once, in batches; each batch gives one update of the parameters. The
    # accuracy of an epoch is measured during training, with dropout on, so the validation accuracy can be higher.
    before = {name: param.detach().clone() for name, param in model_vgg.named_parameters()}  # to see which ones change

    def after_epoch(history):  # save what is done, in case the run is stopped
        if len(history) < args.epochs:  # the last epoch is saved below
            record = make_record(dsets, model_vgg, model_vgg.classifier[6])  # what the results depend on
            save_results(args, "03", model_vgg, record, history)

    history = []  # used if you replace the call below by the lecture's, which has no "history ="
    torch.manual_seed(args.seed)  # for shuffling and dropout
    # criterion and after_epoch are not the lecture's: its function uses the script's variable criterion.
    history = train_model(model_vgg, loader_train, size=dset_sizes["train"], epochs=args.epochs,
                          optimizer=optimizer_vgg, criterion=criterion, after_epoch=after_epoch)

    # Check: which parameters changed?
    changed = {"frozen": 0, "trainable": 0}
    total = {"frozen": 0, "trainable": 0}
    for name, param in model_vgg.named_parameters():
        kind = "trainable" if param.requires_grad else "frozen"
        changed[kind] += int((param != before[name]).sum())
        total[kind] += param.numel()
    for kind in ["frozen", "trainable"]:
        print(f"{kind}: {changed[kind]:,} of {total[kind]:,} parameters changed")
    record = make_record(dsets, model_vgg, model_vgg.classifier[6])  # later scripts check that it is still the same
    save_results(args, "03", model_vgg, record, history)  # save now, in case the test stops at a damaged image

    # test_model is in common.py, too: search for def test_model.
    predictions, all_proba, all_classes = test_model(model_vgg, loader_valid, size=dset_sizes["valid"])
    metrics = save_results(args, "03", model_vgg, record, history, (predictions, all_proba, all_classes))

    # Four cats and four dogs. (The lecture shows the first batch of loader_valid, 5 cats.)
    n_images = 8
    idx = four_of_each(dsets["valid"])
    inputs = torch.stack([dsets["valid"][i][0] for i in idx])  # (8, 3, 224, 224)
    classes = torch.tensor([dsets["valid"].targets[i] for i in idx])
    with torch.inference_mode():
        outputs = to_log_proba(model_vgg(inputs.to(device)))  # (8, 2)
    print(f"\nprobabilities of {' and '.join(dset_classes)} for {len(idx)} images, torch.exp(outputs):")
    print(torch.exp(outputs))
    print("their classes:", classes)
    show_predictions(inputs, [dsets["valid"].imgs[i][0] for i in idx], classes, all_proba[idx],
                     f"Validation images: true class, prediction and its probability{note}")
    save_figure(args.output_dir / "03_valid_batch.png", args.show)

    plot_training(metrics, f"Training the last layer on images{note}")
    save_figure(args.output_dir / "03_training.png", args.show)

    n_updates = args.epochs * len(loader_train)
    if args.sample and n_updates < 10:
        print(f"\nOnly {n_updates} updates, on {dset_sizes['train']} images: the code works, but the model has learned "
              "almost nothing.")
        untrained = " --weights untrained --lr 0.1" if note else ""
        print(f"To see it learn, you can also run python 04_precompute.py --sample --layer fc7 --epochs 200{untrained}")
    print(f"\nDone{note}. Next, with the same options (--sample, --limit, ...): python 04_precompute.py")
