"""Run the original VGG16, trained on ImageNet, on the first batch of images.

The lecture's "Creating VGG Model" (video from 0:40:51, https://youtu.be/ZhC-DIrCe6A?t=2451).

  python 02_vgg_imagenet.py --sample                 5 images: what does VGG16 see?
  python 02_vgg_imagenet.py --sample --image my.jpg  also your own photos
  python 02_vgg_imagenet.py --zero-shot              cats vs. dogs on all validation images, without further training

Reads the dataset. Writes to the output folder probs_try.npy (5, 1000) and 02_predictions.png; with --zero-shot also
02_zero_shot.json and 02_zero_shot.png, with --image 02_images.png.
"""
# %% Imports and options. Imports that the script does not use are there so that you can type the video's commands.
from support.run import banner, print_options, start_run  # first: it checks the environment
import matplotlib.pyplot as plt
import numpy as np
import torch
import torchvision
from torch import nn
from torchvision import datasets, models, transforms

from common import (ANIMALS, CLASSES, IMAGENET, get_weights, imshow, load_data, load_vgg16, save_figure, show_photos,
                    show_predictions, to_device)
from support.errors import UserError
from support.files import save
from support.images import load_image, photo
from support.options import option_parser
from support.progress import progress
from support.records import make_record

if __name__ == "__main__":  # worker processes, which load images, import this file again and must not run the rest
    parser = option_parser("02_vgg_imagenet.py", __doc__)
    parser.add_argument("--zero-shot", action="store_true",
                        help="also use the original VGG16 to classify all validation images as cat or dog")
    parser.add_argument("--image", type=photo, nargs="+", action="extend", default=[], metavar="FILE",
                        help="also classify your own photos")
    args = start_run(parser)
    device, dsets, loader_train, loader_valid = load_data(args)  # as in 01_data.py
    dset_classes = dsets["train"].classes
    args.weights = get_weights(args.weights, args.sample)
    print_options(args)
    note = " (untrained weights)" if args.weights == "untrained" else ""

# %% Creating VGG Model
    banner("Creating VGG Model", "0:40:51", args.pause)
    # VGG16 was trained on ImageNet: 1.2 million photos of 1,000 classes. The pretrained weights are downloaded once (by
    # get_weights above) and then read from disk; the network is the same as models.vgg16(weights="DEFAULT").
    model_vgg = load_vgg16(args.weights)
    dic_imagenet = IMAGENET.meta["categories"]  # the lecture downloads the same names as a JSON file
    print("the first 4 of the 1,000 classes, dic_imagenet[:4]:", dic_imagenet[:4])

    inputs_try, labels_try = next(iter(loader_valid))  # the first batch, as in 01_data.py
    inputs_try, labels_try = inputs_try.to(device), labels_try.to(device)
    model_vgg = to_device(model_vgg, device, args.bf16)  # the lecture's model_vgg.to(device), and --bf16

    # The lecture forgets this: switch off dropout, which sets a random half of a dense layer's outputs to 0 during
    # training.
    model_vgg.eval()
    with torch.inference_mode():  # no gradients are needed to predict
        outputs_try = model_vgg(inputs_try)
    print("\noutputs_try:", outputs_try, sep="\n")
    print("outputs_try.shape:", tuple(outputs_try.shape))  # (5, 1000)

    # Softmax turns the outputs for an image into "probabilities": positive numbers whose sum is 1.
    m_softm = nn.Softmax(dim=1)
    probs = m_softm(outputs_try)  # (5, 1000)
    vals_try, preds_try = torch.max(probs, dim=1)  # two tensors: the largest value for each image, and its class
    print("\nsum of the probabilities for each image, torch.sum(probs, 1):", torch.sum(probs, 1))
    print("highest probability, vals_try:", vals_try)
    # Before you read on: ImageNet has no class "cat". What will VGG16 answer for one?
    print("predicted class:", [dic_imagenet[i] for i in preds_try])

    titles = [f"true: {ANIMALS[labels_try[i]]}\n{dic_imagenet[preds_try[i]]}\n{vals_try[i]:.3f}"
              for i in range(len(labels_try))]
    plt.figure(figsize=(14, 3.75), layout="constrained")
    plt.suptitle(f"True class; VGG16's most likely ImageNet class and its probability{note}")
    out = torchvision.utils.make_grid(inputs_try.cpu())  # imshow, below, is in common.py: search for def imshow
    imshow(out, title=titles)
    plt.gca().set_anchor("S")  # at the bottom (south): the titles need the space above
    save_figure(args.output_dir / "02_predictions.png", args.show)
    save(args.output_dir, {"probs_try.npy": probs.cpu().numpy()})

# %% Beyond the lecture
    banner("Beyond the lecture")
    print("the five most likely classes of each image")
    vals, preds = probs.topk(5)  # (5, 5)
    for i, label in enumerate(labels_try):
        print(f"  {dset_classes[label]}:", end="")
        for k in range(5):
            print(f"  {dic_imagenet[preds[i, k]]} {vals[i, k]:.3f}", end="")
        print()

    if args.zero_shot:
        print("\nzero-shot: total probability of the 5 cat classes against the 118 dog classes")
        if CLASSES != ["cats", "dogs"]:
            raise UserError("--zero-shot compares cats with dogs: omit it, as CLASSES in common.py are different")
        cats, dogs = slice(281, 286), slice(151, 269)  # ImageNet's tabby to Egyptian cat, Chihuahua to Mexican hairless
        sums = []
        for inputs, _ in progress(loader_valid, len(loader_valid), len(dsets["valid"])):
            with torch.inference_mode():
                p = m_softm(model_vgg(inputs.to(device))).cpu()  # (B, 1000) for a batch of B images
            sums.append(torch.stack([p[:, cats].sum(dim=1), p[:, dogs].sum(dim=1)], dim=1))
        sums = torch.cat(sums).double().numpy()  # (M, 2): 5 cat classes, 118 dog classes
        predictions = sums.argmax(axis=1)
        all_classes = np.array(dsets["valid"].targets, dtype=np.int64)
        accuracy = np.mean(predictions == all_classes)
        print(f"accuracy {accuracy:.4f} on {len(all_classes):,} validation images{note}")
        confusion = []
        for label, name in enumerate(dset_classes):
            counts = np.bincount(predictions[all_classes == label], minlength=2).tolist()  # predicted as cats, as dogs
            print(f"of {sum(counts):,} {name}: {counts[0]:,} predicted as cats, {counts[1]:,} as dogs")
            confusion.append(counts)
        outside = np.mean(1 - sums.sum(axis=1))
        print(f"probability of all other classes, neither cats nor dogs: {outside:.4f} on average")

        # Worst mistakes first: the largest lead of the wrong animal's probability over the right one's.
        wrong = np.where(predictions != all_classes)[0]
        lead = np.abs(sums[wrong, 1] - sums[wrong, 0])
        worst = wrong[np.argsort(-lead, kind="stable")[:8]]  # stable: ties keep the order of the images
        paths = [dsets["valid"].imgs[i][0] for i in worst]
        show_predictions([load_image(path) for path in paths], paths, all_classes[worst], sums[worst],
                         f"Zero-shot, worst mistakes: total probability of the predicted class{note}")
        save_figure(args.output_dir / "02_zero_shot.png", args.show)
        save(args.output_dir, {"02_zero_shot.json": {
            "options": vars(args), "pretrained": args.weights != "untrained",
            "made_from": make_record(dsets, model_vgg, model_vgg.classifier[6]),
            "valid_accuracy": accuracy, "confusion": confusion, "outside": outside}})

    if args.image:
        answers = []
        for path in args.image:
            inputs = IMAGENET.transforms()(load_image(path, rotate=True))[None]  # a batch of one: (1, 3, 224, 224)
            with torch.inference_mode():
                vals, preds = m_softm(model_vgg(inputs.to(device)))[0].topk(5)
            answers.append({dic_imagenet[preds[i]]: vals[i].item() for i in range(5)})
        show_photos(args.image, answers, f"What VGG16 sees{note}")
        save_figure(args.output_dir / "02_images.png", args.show)
    print(f"\nDone{note}. Next, with the same options (--sample, --limit, ...): python 03_finetune_head.py")
