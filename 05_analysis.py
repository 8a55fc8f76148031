"""Look at what the trained model gets right, what it gets wrong, and what it can't decide.

The lecture's "Viewing model prediction (qualitative analysis)" (video from 1:03:39,
https://youtu.be/ZhC-DIrCe6A?t=3819) and its "Conclusion".

  python 05_analysis.py --sample                     the results of 04_precompute.py --sample, else of 03
  python 05_analysis.py --sample --image my.jpg      cat or dog? Your own photos
  python 05_analysis.py --submission                 the Kaggle entry: submission.csv

Reads the dataset and 04_predictions.npy, 04_all_proba.npy, 04_all_classes.npy, 04_metrics.json (or 03_...), and for
photos and the submission 04_head.pt. Leaves in the output folder 05_correct.png, 05_incorrect.png,
05_most_correct_cats.png, 05_most_correct_dogs.png, 05_most_incorrect_cats.png, 05_most_incorrect_dogs.png,
05_most_uncertain.png, 05_histogram.png, 05_confusion.png; 05_images.png; submission.csv.
"""
from pathlib import Path

from common import (CLASSES, IMAGENET, UserError, banner, check_dataset, choose_weights, files_hash,
                    freeze_and_replace_head, get_device, imagenet_format, imshow, load, load_image,
                    load_state, load_vgg16, loader_options, option_parser, parse_options, progress, save,
                    save_figure, show_images, to_device, weights_hash)
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.utils.data import DataLoader
from torchvision import datasets


def log_loss(proba_true):
    """Kaggle's score, the less the better: the mean of -log(p), p the probability given to the true class, (M,)."""
    with np.errstate(divide="ignore"):  # p = 0 costs infinitely much
        return -np.log(proba_true.astype(np.float64)).mean()


def test_images(folder):
    """The images of test1, which has no classes and so is no ImageFolder: 1.jpg, 2.jpg, 10.jpg, by their numbers."""
    paths = list(folder.glob("*.jpg"))
    if not paths:
        raise UserError(f"{folder}: no images there; run python 01_data.py first, and leave out --sample")
    if strange := [path for path in paths if not path.stem.isdecimal()]:
        raise UserError(f"{strange[0]}: its name is no number, and so no id; move it away")
    return sorted(paths, key=lambda path: int(path.stem))


def load_batch(paths):
    """Image files named by numbers, as in test1 -> ids (B,), inputs (B, 3, 224, 224)."""
    ids = torch.tensor([int(path.stem) for path in paths])
    return ids, torch.stack([imagenet_format(load_image(path)) for path in paths])


def load_trained(step, metrics, args, device):
    """VGG16 with the last layer that `step` trained; UserError where the weights below it are not the same now."""
    model_vgg = load_vgg16(choose_weights(args.weights, args.sample))
    if weights_hash(model_vgg) != metrics.get("weights_sha256"):
        raise UserError(f"--weights {args.weights}: {step}_head.pt was trained on other weights "
                        f"({metrics.get('weights')}); give those, or train it again")
    model_vgg = freeze_and_replace_head(model_vgg)
    load_state(model_vgg.classifier[6], args.output_dir / f"{step}_head.pt", f"run the script of step {step} again")
    return to_device(model_vgg, device, args.bf16).eval()


if __name__ == "__main__":
    parser = option_parser(__doc__)
    parser.add_argument("--step", choices=["03", "04"], help="whose results (default: 04 where it has run, else 03)")
    parser.add_argument("--n-view", type=int, default=8, metavar="N", help="images a view, 100 at most (default: 8)")
    parser.add_argument("--image", nargs="+", default=[], metavar="FILE", help="photos of your own, 100 at most")
    parser.add_argument("--submission", action="store_true", help="predict test1 and write submission.csv for Kaggle")
    args = parse_options(parser)
    if len(args.image) > 100:
        parser.error("argument --image: 100 at most, for a figure to hold them")
    device = get_device(args.device, args.bf16)
    for path in args.image:
        load_image(path, upright=True)  # a bad file is said now, not after all the work
    check_dataset(args.data_dir)
    test_paths = test_images(args.data_dir / "test1") if args.submission else []
    dset_valid = datasets.ImageFolder(args.data_dir / "valid", imagenet_format, loader=load_image)

    step = args.step or ("04" if (args.output_dir / "04_metrics.json").exists() else "03")
    command = {"03": "python 03_finetune_head.py", "04": "python 04_precompute.py"}[step]
    metrics, predictions, all_proba, all_classes = (
        load(args.output_dir / f"{step}_{name}", f"run {command} first, with the same options")
        for name in ["metrics.json", "predictions.npy", "all_proba.npy", "all_classes.npy"])
    shapes, n_valid = (predictions.shape, all_proba.shape, all_classes.shape), len(dset_valid)
    files_sha256 = files_hash(dset_valid)
    if metrics.get("files_sha256", {}).get("valid") != files_sha256 or shapes != ((n_valid,), (n_valid, 2), (n_valid,)):
        raise UserError(f"{args.output_dir / f'{step}_predictions.npy'}: made from other images than those in "
                        f"{dset_valid.root}; run {command} again")
    note = "" if metrics.get("pretrained") else ", untrained weights"

    banner("Viewing model prediction (qualitative analysis)", 3819, args.pause)
    print(f"the predictions of step {step} on {len(predictions):,} validation images{note}")
    n_view = args.n_view
    permutation = np.random.default_rng(args.seed).permutation

    def view(idx, title, name):
        """Save a figure of the validation images idx, each whole, with all that it takes to judge it."""
        titles = [f"{CLASSES[all_classes[x]]}, predicted {CLASSES[predictions[x]]}\n"
                  f"probability {all_proba[x, predictions[x]]:.4f}\n{Path(dset_valid.imgs[x][0]).name}" for x in idx]
        show_images([load_image(dset_valid.imgs[x][0]) for x in idx], titles, f"{title} (step {step}{note})")
        save_figure(args.output_dir / name, args.show)

    # 1. A few correct labels at random
    correct = np.where(predictions == all_classes)[0]
    print(f"correct: {len(correct):,} of {len(predictions):,}, {len(correct) / len(predictions):.4f}")
    view(permutation(correct)[:n_view], "Correct, at random", "05_correct.png")

    # 2. A few incorrect labels at random
    incorrect = np.where(predictions != all_classes)[0]
    print(f"incorrect: {len(incorrect):,}")
    view(permutation(incorrect)[:n_view], "Incorrect, at random", "05_incorrect.png")

    # 3. The images we were most confident in, and rightly: sorted by the probability of the other class
    correct_cats = np.where((predictions == 0) & (predictions == all_classes))[0]
    most_correct_cats = correct_cats[np.argsort(all_proba[correct_cats, 1], kind="stable")[:n_view]]
    view(most_correct_cats, "Most correct cats", "05_most_correct_cats.png")
    correct_dogs = np.where((predictions == 1) & (predictions == all_classes))[0]
    most_correct_dogs = correct_dogs[np.argsort(all_proba[correct_dogs, 0], kind="stable")[:n_view]]
    view(most_correct_dogs, "Most correct dogs", "05_most_correct_dogs.png")

    # 4. The images we were most confident in, and wrongly
    incorrect_cats = np.where((predictions == 0) & (predictions != all_classes))[0]
    most_incorrect_cats = incorrect_cats[np.argsort(all_proba[incorrect_cats, 1], kind="stable")[:n_view]]
    view(most_incorrect_cats, "Most incorrect cats: predicted cats, in truth dogs", "05_most_incorrect_cats.png")
    incorrect_dogs = np.where((predictions == 1) & (predictions != all_classes))[0]
    most_incorrect_dogs = incorrect_dogs[np.argsort(all_proba[incorrect_dogs, 0], kind="stable")[:n_view]]
    view(most_incorrect_dogs, "Most incorrect dogs: predicted dogs, in truth cats", "05_most_incorrect_dogs.png")

    # 5. The most uncertain labels: the probability closest to 0.5
    most_uncertain = np.argsort(np.abs(all_proba[:, 1] - 0.5), kind="stable")[:n_view]
    view(most_uncertain, "Most uncertain", "05_most_uncertain.png")

    # The confusion matrix: row the true class, column the predicted one.
    confusion = np.bincount(2 * all_classes + predictions, minlength=4).reshape(2, 2)
    plt.figure(figsize=(5, 4.5), layout="constrained")
    plt.imshow(confusion, cmap="Blues", vmin=0)
    for (true, pred), count in np.ndenumerate(confusion):
        plt.text(pred, true, f"{count:,}\n{count / max(confusion[true].sum(), 1):.1%} of {CLASSES[true]}", ha="center",
                 va="center", color="white" if count > confusion.max() / 2 else "black")
    plt.xticks([0, 1], CLASSES)
    plt.yticks([0, 1], CLASSES)
    plt.xlabel("predicted class")
    plt.ylabel("true class")
    plt.title(f"Confusion matrix (step {step}{note})")
    save_figure(args.output_dir / "05_confusion.png", args.show)

    # How sure it is of each image: two heaps far apart are good, and what lies beyond 0.5 is wrong.
    plt.figure(figsize=(7, 4), layout="constrained")
    plt.hist([all_proba[all_classes == k, 1] for k in [0, 1]], bins=20, range=(0, 1), label=CLASSES)
    plt.axvline(0.5, color="grey", linestyle="--")
    plt.yscale("symlog")
    plt.gca().yaxis.set_major_formatter("{x:.0f}")
    plt.xlabel("predicted probability of dog")
    plt.ylabel("validation images (log scale)")
    plt.title(f"Probability of dog by true class (step {step}{note})")
    plt.legend(title="true class")
    save_figure(args.output_dir / "05_histogram.png", args.show)

    proba_true = all_proba[np.arange(len(all_classes)), all_classes]
    print(f"\nsummary of step {step}{note}")
    print(f"  accuracy             {len(correct) / len(predictions):.4f}")
    print(f"  loss                 {metrics['valid_loss']:.4f}  (NLLLoss, as in training)")
    print(f"  log loss             {log_loss(proba_true):.4f}  (from the saved probabilities)")
    print(f"  log loss, clipped    {log_loss(proba_true.clip(0.005, 0.995)):.4f}  (to [0.005, 0.995], as submitted)")
    for k in [0, 1]:
        print(f"  {CLASSES[k]} taken for {CLASSES[1 - k]}  {confusion[k, 1 - k]:,} of {confusion[k].sum():,}")
    if (args.output_dir / "02_zero_shot.json").exists():
        zero_shot = load(args.output_dir / "02_zero_shot.json", "run python 02_vgg_imagenet.py --zero-shot again")
        if zero_shot.get("files_sha256") == {"valid": files_sha256}:
            print(f"  zero-shot accuracy   {zero_shot['valid_accuracy']:.4f}  (02_vgg_imagenet.py --zero-shot"
                  f"{'' if zero_shot['pretrained'] else ', untrained weights'})")

    banner("Conclusion", 3819, args.pause)
    print("What was trained is a simple logistic regression: 2 x 4096 weights + 2 biases = 8,194 parameters, on 4096\n"
          "numbers that VGG16 computes from each image. ImageNet's 118 kinds of dogs and 5 of cats are why those do.")

    if args.image or args.submission:
        model_vgg = load_trained(step, metrics, args, device)
        dtype = model_vgg.features[0].weight.dtype

    if args.image:
        print("\nBeyond the lecture: your own photos, turned upright, resized to 256 and cropped to 224 (the\n"
              "weights' own transforms)")
        plt.figure(figsize=(8, 3 * len(args.image)), layout="constrained")
        plt.suptitle(f"Cat or dog? (step {step}{note})")
        for row, path in enumerate(args.image):
            photo = load_image(path, upright=True)
            with torch.inference_mode():
                proba = model_vgg(IMAGENET.transforms()(photo)[None].to(device, dtype)).exp().cpu()[0]  # (2,)
            print(f"  {path}: {CLASSES[proba.argmax()][:-1]}, probability {proba.max():.4f}{note}")
            plt.subplot(len(args.image), 2, 2 * row + 1)
            photo.thumbnail((600, 600))
            imshow(photo, Path(path).name)
            plt.subplot(len(args.image), 2, 2 * row + 2)
            plt.barh(CLASSES, proba.numpy())
            plt.xlim(0, 1)
            plt.xlabel("probability")
        save_figure(args.output_dir / "05_images.png", args.show)

    if args.submission:
        # Kaggle scores log loss, the mean of -log(p of the true class): one image wrong at p = 0 costs infinitely much.
        # With p clipped to [0.005, 0.995], an error costs -log(0.005) = 5.3 at most.
        print(f"\nBeyond the lecture: the Kaggle submission for {len(test_paths):,} images of test1")
        loader_test = DataLoader(test_paths, batch_size=16, collate_fn=load_batch,
                                 **loader_options(len(test_paths), args.num_workers, device))
        rows = ["id,label"]
        with torch.inference_mode():
            for ids, inputs in progress(loader_test, len(loader_test)):
                dog = model_vgg(inputs.to(device, dtype)).exp()[:, 1].clip(0.005, 0.995).cpu()
                rows += [f"{i},{p:.6f}" for i, p in zip(ids.tolist(), dog.tolist(), strict=True)]
        save(args.output_dir, {"submission.csv": "\n".join(rows) + "\n"})
        if len(test_paths) != 12_500:
            print(f"note: Kaggle expects 12,500 rows, these are {len(test_paths):,}")
    print(f"\nDone{note}. Next: change a line and run it again; the README has exercises")
