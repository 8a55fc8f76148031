"""VGG16 as it comes, trained on ImageNet, on the first batch of images.

The lecture's "Creating VGG Model" (video from 0:40:51, https://youtu.be/ZhC-DIrCe6A?t=2451).

  python 02_vgg_imagenet.py --sample                 5 images: what does VGG16 see?
  python 02_vgg_imagenet.py --sample --image my.jpg  your own photos too
  python 02_vgg_imagenet.py --zero-shot              cats against dogs on all validation images, with no training

Reads inputs_try.npy and labels_try.npy, which 01_data.py left, or else the dataset. Leaves in the output folder
probs_try.npy and 02_predictions.png; 02_zero_shot.json and 02_zero_shot.png; 02_images.png.
"""
from pathlib import Path

from common import (CLASSES, IMAGENET, UserError, banner, check_dataset, choose_weights, files_hash, get_device,
                    imagenet_format, imshow, load, load_image, load_vgg16, loader_options, option_parser, parse_options,
                    progress, save, save_figure, show_images, to_device)
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets

# ImageNet's classes of house cats (tabby to Egyptian cat) and of dogs (Chihuahua to Mexican hairless).
CATS, DOGS = slice(281, 286), slice(151, 269)


def cat_and_dog_sums(outputs):
    """From VGG16's outputs (B, 1000), the sums of the probabilities of all cats, all dogs and all else: (B, 3)."""
    probs = nn.Softmax(dim=1)(outputs.double())
    cats, dogs = probs[:, CATS].sum(dim=1), probs[:, DOGS].sum(dim=1)
    return torch.stack([cats, dogs, probs.sum(dim=1) - cats - dogs], dim=1)


if __name__ == "__main__":
    parser = option_parser(__doc__)
    parser.add_argument("--zero-shot", action="store_true", help="measure how well it tells cats from dogs, untaught")
    parser.add_argument("--image", nargs="+", default=[], metavar="FILE", help="photos of your own, 100 at most")
    args = parse_options(parser)
    if len(args.image) > 100:
        parser.error("argument --image: 100 at most, for a figure to hold them")
    device = get_device(args.device, args.bf16)
    for path in args.image:
        load_image(path, upright=True)  # a bad file is said now, not after all the work
    try_files = [args.output_dir / "inputs_try.npy", args.output_dir / "labels_try.npy"]
    from_01 = all(path.exists() for path in try_files)
    if args.zero_shot or not from_01:
        check_dataset(args.data_dir)
        dset_valid = datasets.ImageFolder(args.data_dir / "valid", imagenet_format, loader=load_image)
        options = loader_options(len(dset_valid), args.num_workers, device)
    args.weights = choose_weights(args.weights, args.sample)
    note = ", untrained weights" if args.weights == "untrained" else ""

    banner("Creating VGG Model", 2451, args.pause)
    model_vgg = load_vgg16(args.weights)
    model_vgg.eval()  # without dropout: in training mode it would predict at random
    dic_imagenet = IMAGENET.meta["categories"]
    print(f"{len(dic_imagenet)} ImageNet categories, the first four:", dic_imagenet[:4])

    if from_01:
        print(f"the first batch: inputs_try.npy and labels_try.npy in {args.output_dir}, as 01_data.py left them")
        inputs_try, labels_try = (torch.from_numpy(np.array(load(path, "run python 01_data.py"))) for path in try_files)
        if inputs_try.ndim != 4 or inputs_try.shape[1] != 3 or labels_try.shape != inputs_try.shape[:1]:
            raise UserError(f"{try_files[0]} is no batch of images: run python 01_data.py")
    else:
        print(f"the first batch: taken from {args.data_dir / 'valid'}")
        inputs_try, labels_try = next(iter(DataLoader(dset_valid, batch_size=5)))

    model_vgg = to_device(model_vgg, device, args.bf16)
    dtype = model_vgg.features[0].weight.dtype
    with torch.inference_mode():  # no gradients are needed to predict
        outputs_try = model_vgg(inputs_try.to(device, dtype)).cpu()  # (5, 1000)
    print("\noutputs_try:", outputs_try, f"outputs_try.shape: {tuple(outputs_try.shape)}", sep="\n")

    # Softmax turns the outputs into probabilities.
    m_softm = nn.Softmax(dim=1)
    probs = m_softm(outputs_try)  # (5, 1000)
    vals_try, preds_try = torch.max(probs, dim=1)
    print("\nprobabilities: each row sums to 1:", torch.sum(probs, 1))
    print("the largest of each image, vals_try:", vals_try)
    print("the class it belongs to:", [dic_imagenet[i] for i in preds_try])
    print("\nthe five most likely classes of each image:")
    for label, row in zip(labels_try, probs, strict=True):
        five = [f"{dic_imagenet[i]} {val:.3f}" for val, i in zip(*row.topk(5), strict=True)]
        print(f"  {CLASSES[label]}:", ", ".join(five))

    titles = [f"{CLASSES[label]}\n{dic_imagenet[i]}, {val:.3f}"
              for label, i, val in zip(labels_try, preds_try, vals_try, strict=True)]
    show_images(inputs_try, titles, f"True class, VGG16's most likely ImageNet class and its probability{note}")
    save_figure(args.output_dir / "02_predictions.png", args.show)
    save(args.output_dir, {"probs_try.npy": probs.numpy()})

    if args.zero_shot:
        # The lecture concludes that VGG16 knows cats and dogs already; this measures it.
        print("\nBeyond the lecture: zero-shot. The sum of the probabilities of ImageNet's 118 kinds of dogs against\n"
              "that of its 5 kinds of cats; nothing is trained.")
        loader_valid = DataLoader(dset_valid, batch_size=16, **options)
        with torch.inference_mode():
            sums = torch.cat([cat_and_dog_sums(model_vgg(inputs.to(device, dtype)).cpu())
                              for inputs, _ in progress(loader_valid, len(loader_valid))]).numpy()  # (M, 3)
        all_classes = np.array(dset_valid.targets)
        predictions = (sums[:, 1] > sums[:, 0]).astype(int)
        accuracy = (predictions == all_classes).mean()
        confusion = np.bincount(2 * all_classes + predictions, minlength=4).reshape(2, 2)
        print(f"accuracy {accuracy:.4f} on {len(all_classes):,} validation images{note}")
        print("confusion matrix (row: true class, column: predicted), cats and dogs:", confusion, sep="\n")
        print(f"share of the probability outside both groups: {sums[:, 2].mean():.4f} on average")
        # Most wrong: how much more it gives to the wrong animal than to the true one.
        margin = np.where(all_classes == 1, sums[:, 0] - sums[:, 1], sums[:, 1] - sums[:, 0])
        worst = [i for i in np.argsort(-margin, kind="stable")[:8] if predictions[i] != all_classes[i]]
        paths = [Path(dset_valid.imgs[i][0]) for i in worst]
        titles = [f"{CLASSES[all_classes[i]]}\ncats {sums[i, 0]:.3f}, dogs {sums[i, 1]:.3f}\n{path.name}"
                  for i, path in zip(worst, paths, strict=True)]
        show_images([load_image(path) for path in paths], titles, f"Zero-shot: most wrong{note}")
        save_figure(args.output_dir / "02_zero_shot.png", args.show)
        save(args.output_dir, {"02_zero_shot.json": {
            "weights": args.weights, "pretrained": args.weights != "untrained", "dataset": args.data_dir,
            "files_sha256": {"valid": files_hash(dset_valid)}, "valid_accuracy": accuracy,
            "confusion": confusion.tolist(), "outside": sums[:, 2].mean(), "options": vars(args)}})

    if args.image:
        print("\nBeyond the lecture: your own photos, turned upright, resized to 256 and cropped to 224 (the\n"
              "weights' own transforms)")
        plt.figure(figsize=(10, 3 * len(args.image)), layout="constrained")
        plt.suptitle(f"What VGG16 sees{note}")
        for row, path in enumerate(args.image):
            photo = load_image(path, upright=True)
            inputs = IMAGENET.transforms()(photo)[None]  # (1, 3, 224, 224)
            with torch.inference_mode():
                vals, preds = m_softm(model_vgg(inputs.to(device, dtype)).cpu())[0].topk(5)
            names = [dic_imagenet[i] for i in preds]
            print(f"  {path}:", ", ".join(f"{name} {val:.3f}" for name, val in zip(names, vals, strict=True)))
            plt.subplot(len(args.image), 2, 2 * row + 1)
            photo.thumbnail((600, 600))
            imshow(photo, Path(path).name)
            plt.subplot(len(args.image), 2, 2 * row + 2)
            plt.barh(range(5, 0, -1), vals.numpy())
            plt.yticks(range(5, 0, -1), names)
            plt.xlim(0, 1)
            plt.xlabel("probability")
        save_figure(args.output_dir / "02_images.png", args.show)
    print(f"\nDone{note}. Next, with the same options: python 03_finetune_head.py")
