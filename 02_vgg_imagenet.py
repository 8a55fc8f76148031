"""VGG16 as it comes, trained on ImageNet, on the first batch of images.

The lecture's "Creating VGG Model" (video from 0:40:51, https://youtu.be/ZhC-DIrCe6A?t=2451).

  python 02_vgg_imagenet.py --sample                 5 images: what does VGG16 see?
  python 02_vgg_imagenet.py --sample --image my.jpg  your own photos too
  python 02_vgg_imagenet.py --zero-shot              cats against dogs on all validation images, with no training

Reads the dataset. Leaves in the output folder probs_try.npy and 02_predictions.png; with --zero-shot 02_zero_shot.json
and 02_zero_shot.png, with --image 02_images.png.
"""
import matplotlib.pyplot as plt
import numpy as np
import torch
import torchvision  # an import that this script does not use is for what the video types
from torch import nn
from torchvision import datasets, models, transforms

from common import (IMAGENET, banner, choose_weights, identify, imshow, load_data, load_image, load_vgg16, made_from,
                    option_parser, parse_options, progress, save, save_figure, show_photos, show_predictions,
                    to_device)

# ImageNet's classes of house cats (tabby to Egyptian cat) and of dogs (Chihuahua to Mexican hairless).
CATS, DOGS = slice(281, 286), slice(151, 269)


@torch.inference_mode()
def zero_shot(args, model, device, loader_valid, images, note):
    """Beyond the lecture: how well does VGG16 tell cats from dogs untaught? Leaves 02_zero_shot.json and .png."""
    print("\nBeyond the lecture: zero-shot. The sum of the probabilities of ImageNet's 118 kinds of dogs against\n"
          "that of its 5 kinds of cats; nothing is trained.")
    dset, sums = loader_valid.dataset, []
    for inputs, _ in progress(loader_valid, len(loader_valid)):
        probs = nn.Softmax(dim=1)(model(inputs.to(device)).cpu())  # (B, 1000)
        sums.append(torch.stack([probs[:, CATS].sum(dim=1), probs[:, DOGS].sum(dim=1)], dim=1))
    sums = torch.cat(sums).numpy()  # (M, 2)
    predictions, all_classes = sums.argmax(axis=1), np.array(dset.targets)
    accuracy = np.mean(predictions == all_classes)
    outside = float(1 - sums.sum(axis=1).mean())
    confusion = [[int(np.sum(predictions[all_classes == true] == pred)) for pred in [0, 1]] for true in [0, 1]]
    print(f"accuracy {accuracy:.4f} on {len(all_classes):,} validation images{note}")
    for name, counts in zip(dset.classes, confusion, strict=True):
        print(f"of {sum(counts):,} {name}: {counts[0]:,} taken for cats, {counts[1]:,} for dogs")
    print(f"share of the probability given to neither: {outside:.4f} on average")

    # The worst first: where the wrong animal's sum is most above the true one's.
    lead = sums[np.arange(len(sums)), 1 - all_classes] - sums[np.arange(len(sums)), all_classes]
    worst = [i for i in np.argsort(-lead, kind="stable")[:8] if predictions[i] != all_classes[i]]
    paths = [dset.imgs[i][0] for i in worst]
    show_predictions([load_image(path) for path in paths], paths, all_classes[worst], sums[worst],
                     f"Zero-shot, most wrong: the summed probability of what it was taken for{note}")
    save_figure(args.output_dir / "02_zero_shot.png", args.show)
    save(args.output_dir, {"02_zero_shot.json": {
        "options": vars(args), "pretrained": args.weights != "untrained", "made_from": made_from(images, model),
        "valid_accuracy": accuracy, "confusion": confusion, "outside": outside}})


if __name__ == "__main__":
    parser = option_parser(__doc__)
    parser.add_argument("--zero-shot", action="store_true", help="measure how well it tells cats from dogs, untaught")
    parser.add_argument("--image", nargs="+", action="extend", default=[], metavar="FILE", help="photos of your own")
    args = parse_options(parser)
    device, dsets, loader_train, loader_valid = load_data(args)  # as in 01_data.py
    dset_classes = dsets["train"].classes
    note = choose_weights(args)

# %% Creating VGG Model
    banner("Creating VGG Model", 2451, args.pause)
    # ImageNet: 1.2 million photos of 1,000 classes. The weights learned from them are downloaded once (above), and read
    # from the disk after that: load_vgg16, in common.py, gives the network that models.vgg16(weights="DEFAULT") gives.
    model_vgg = load_vgg16(args.weights)
    dic_imagenet = IMAGENET.meta["categories"]
    print("the first of 1,000 categories, dic_imagenet[:4]:", dic_imagenet[:4])

    inputs_try, labels_try = next(iter(loader_valid))  # the first batch, as in 01_data.py
    inputs_try, labels_try = inputs_try.to(device), labels_try.to(device)
    model_vgg = to_device(model_vgg, device, args.bf16)

    model_vgg.eval()  # without dropout, which would change what it predicts at every call
    with torch.inference_mode():  # no gradients are needed to predict
        outputs_try = model_vgg(inputs_try)
    print("\noutputs_try:", outputs_try, sep="\n")
    print("outputs_try.shape:", tuple(outputs_try.shape))  # (5, 1000)

    # Softmax turns the outputs of an image into 'probabilities': positive, with a sum of 1.
    m_softm = nn.Softmax(dim=1)
    probs = m_softm(outputs_try)  # (5, 1000)
    vals_try, preds_try = torch.max(probs, dim=1)
    print("\nthe sum of each image, torch.sum(probs, 1):", torch.sum(probs, 1))
    print("the largest of each image, vals_try:", vals_try)
    print("the class it belongs to:", [dic_imagenet[i] for i in preds_try])

    print("\nthe five most likely classes of each image:")
    vals, preds = probs.topk(5)  # (5, 5)
    for i, label in enumerate(labels_try):
        print(f"  {dset_classes[label]}:", ", ".join(f"{dic_imagenet[preds[i, k]]} {vals[i, k]:.3f}" for k in range(5)))

    titles = [f"true: {dset_classes[labels_try[i]][:-1]}\n{dic_imagenet[preds_try[i]]}\n{vals_try[i]:.3f}"
              for i in range(len(labels_try))]  # [:-1]: cat for cats
    plt.figure(figsize=(14, 4), layout="constrained")
    plt.suptitle(f"True class; VGG16's most likely ImageNet class and its probability{note}")
    imshow(torchvision.utils.make_grid(inputs_try.cpu()), title=titles)
    save_figure(args.output_dir / "02_predictions.png", args.show)
    save(args.output_dir, {"probs_try.npy": probs.cpu().numpy()})

    if args.zero_shot:
        zero_shot(args, model_vgg, device, loader_valid, identify(dsets), note)
    if args.image:
        def five_most_likely(inputs):
            vals, preds = m_softm(model_vgg(inputs.to(device)))[0].topk(5)
            return [dic_imagenet[i] for i in preds], vals.tolist()

        show_photos(args.image, five_most_likely, f"What VGG16 sees{note}")
        save_figure(args.output_dir / "02_images.png", args.show)
    print(f"\nDone{note}. Next, with the same common options: python 03_finetune_head.py")
