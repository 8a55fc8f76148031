"""Look at what the trained model gets right, what it gets wrong, and what it is unsure about.

The lecture's "Viewing model prediction (qualitative analysis)" (video from 1:03:39,
https://youtu.be/ZhC-DIrCe6A?t=3819) and "Conclusion".

  python 05_analysis.py --sample                     the results of 04_precompute.py --sample, or of 03
  python 05_analysis.py --sample --image my.jpg      cat or dog? Your own photos
  python 05_analysis.py --submission                 the submission to Kaggle: submission.csv

Reads the dataset and the results of 04 (or 03). Writes to the output folder a figure for each view (05_correct.png,
...), 05_histogram.png and 05_confusion.png; with --image also 05_images.png, with --submission submission.csv.
"""
# %% Options. Some imports are not used below: they are needed for commands typed in the video.
import matplotlib.pyplot as plt
import numpy as np
import torch
import torchvision
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets, models, transforms

from common import (CLASSES, IMAGENET, freeze_and_replace_head, get_device, get_weights, imagenet_format, imshow,
                    load_data, load_state, load_vgg16, log_loss, save_figure, show_photos, show_predictions, to_device)
from support import (UserError, banner, differences, load, load_image, make_record, number, numbered_images,
                     option_parser, print_options, progress, save, start_run)

CLIP = 0.005, 0.995  # bounds of the probabilities that are sent to Kaggle


def load_results(args, step, dsets):
    """Return metrics, predictions (M,), all_proba (M, 2) and all_classes (M,) of script 03 or 04. Raises UserError if
    they are missing, or were made from different images or with a different transform."""
    again = f"run python {'03_finetune_head.py' if step == '03' else '04_precompute.py'} with the same options"
    path = args.output_dir / f"{step}_metrics.json"
    metrics = load(path, again)
    if "valid_loss" not in metrics:
        raise UserError(f"{path}: the script was stopped before its test was complete: {again}")
    now = make_record({"valid": dsets["valid"]})  # the predictions can be shown without the training images
    if changed := differences(metrics.get("made_from", {}), now):
        raise UserError(f"{args.output_dir / f'{step}_predictions.npy'}: made with {changed}: {again}")
    if args.weights in ("imagenet", "untrained") and args.weights != metrics["weights"]:
        raise UserError(f"--weights {args.weights}: script {step} used {metrics['weights']}: omit --weights")
    predictions = load(args.output_dir / f"{step}_predictions.npy", again)
    all_proba = load(args.output_dir / f"{step}_all_proba.npy", again)
    all_classes = load(args.output_dir / f"{step}_all_classes.npy", again)
    return metrics, predictions, all_proba, all_classes


def plot_confusion(confusion, title):
    """Draw how many images of each true class (row) were predicted as each class (column); confusion: (2, 2)."""
    plt.figure(figsize=(5, 4.5), layout="constrained")
    plt.imshow(confusion, cmap="Blues", vmin=0)
    for true in [0, 1]:
        for pred in [0, 1]:
            count = confusion[true, pred]
            share = count / max(confusion[true].sum(), 1)
            plt.text(pred, true, f"{count:,}\n{share:.1%} of {CLASSES[true]}", ha="center", va="center",
                     color="white" if count > confusion.max() / 2 else "black")
    plt.xticks([0, 1], CLASSES)
    plt.yticks([0, 1], CLASSES)
    plt.gca().set(xlabel="predicted class", ylabel="true class", title=title)


def plot_histogram(all_proba, all_classes, title):
    """Plot a histogram of the predicted probability of dog. Two well-separated peaks are good; images on the wrong side
    of 0.5 are errors."""
    plt.figure(figsize=(7, 4), layout="constrained")
    plt.hist([all_proba[all_classes == 0, 1], all_proba[all_classes == 1, 1]], bins=20, range=(0, 1), label=CLASSES)
    plt.axvline(0.5, color="grey", linestyle="--")
    plt.yscale("symlog")
    plt.gca().yaxis.set_major_formatter("{x:.0f}")
    plt.gca().set(xlabel="predicted probability of dog", ylabel="validation images (log scale)", title=title)
    plt.legend(title="true class", loc="upper left", bbox_to_anchor=(1, 1))  # beside the bars


def load_trained(args, step, metrics, dsets):
    """Return VGG16 with the last layer that the script trained, and its device. Raises UserError unless all other
    layers, the images and the precision are the same as in training."""
    device = get_device(args.device, args.bf16)
    model_vgg = freeze_and_replace_head(load_vgg16(get_weights(args.weights)))
    model_vgg = to_device(model_vgg, device, args.bf16)
    path = args.output_dir / f"{step}_head.pt"
    if changed := differences(metrics["made_from"], make_record(dsets, model_vgg)):
        raise UserError(f"{path} was trained with {changed} (--weights {metrics['weights']}): use the same options, or "
                        "train it again")
    load_state(model_vgg.classifier[6], path, "run the script that trained it again")
    return model_vgg.to(device).eval(), device  # load_state leaves the new parameters on the CPU


class TestImages(Dataset):
    """The unlabeled images of test1, which ImageFolder cannot load, in numeric order. Item i: (3, 224, 224). Raises
    UserError if there are none."""

    def __init__(self, folder):
        self.paths = numbered_images(folder)
        if not self.paths:
            raise UserError(f"{folder}: contains no numbered images: run python 01_data.py first, and omit --sample")

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        return imagenet_format(load_image(self.paths[i]))


@torch.inference_mode()
def write_submission(args, model, device, dset_test, num_workers):
    """Predict test1 and write submission.csv for Kaggle. The score is the log loss, which is infinite if any true class
    has probability 0. Clipping the probabilities to CLIP limits it to -log(0.005) = 5.3 per image."""
    print(f"\nBeyond the lecture: Kaggle submission for {len(dset_test):,} images of test1 (Kaggle expects 12,500)")
    loader_test = DataLoader(dset_test, batch_size=16, num_workers=num_workers)
    dog = []
    for inputs in progress(loader_test, len(loader_test), len(dset_test)):
        dog.extend(model(inputs.to(device)).exp()[:, 1].clip(*CLIP).tolist())
    rows = [f"{int(path.stem)},{p:.6f}\n" for path, p in zip(dset_test.paths, dog, strict=True)]
    save(args.output_dir, {"submission.csv": "".join(["id,label\n", *rows])})


if __name__ == "__main__":  # worker processes, which load images, import this file again and must not run the rest
    parser = option_parser(__doc__)
    parser.add_argument("--step", choices=["03", "04"], help="results to analyze (default: 04 if it has run, else 03)")
    parser.add_argument("--n-view", type=number(1, 100), default=8, metavar="N", help="images per view (default: 8)")
    parser.add_argument("--image", nargs="+", action="extend", default=[], metavar="FILE", help="your own photos")
    parser.add_argument("--submission", action="store_true", help="predict test1 and write submission.csv for Kaggle")
    parser.set_defaults(weights=None)  # default: the weights used for the results
    args = start_run(parser)
    dset_test = TestImages(args.data_dir / "test1") if args.submission else None
    device, dsets, loader_train, loader_valid = load_data(args)  # as in 01_data.py
    dset_sizes = {x: len(dsets[x]) for x in ["train", "valid"]}
    dset_classes = dsets["valid"].classes
    step = args.step or ("04" if (args.output_dir / "04_metrics.json").exists() else "03")
    metrics, predictions, all_proba, all_classes = load_results(args, step, dsets)
    args.weights = args.weights or metrics["weights"]
    args.bf16 = args.bf16 or metrics["made_from"]["precision"] == "bfloat16"
    print_options(args)
    note = "" if metrics["pretrained"] else " (untrained weights)"
    of_script = f"script {step}" if metrics["pretrained"] else f"script {step}, untrained weights"

# %% Viewing model prediction (qualitative analysis)
    banner("Viewing model prediction (qualitative analysis)", 3819, args.pause)
    # Judge a model on images it was not trained on. If it does much better on the training images, it is overfitting.
    # First make a model that can overfit; only then add regularization (such as dropout) and
    # augmentation (random changes to the images in every epoch; impossible with precomputed features).
    print(f"training accuracy in the last epoch ({of_script}): {metrics['train_accuracy'][-1]:.4f}")

    # The views help to find problems: wrong labels, animals outside the central 224 x 224 pixels, rare breeds. They
    # show the photos uncropped (the lecture also shows the cropped images of the first view, as a batch).
    n_view = args.n_view  # number of images in each view
    permutation = np.random.default_rng(args.seed).permutation  # the lecture's permutation, with a seed

    def view(idx, title, name):
        """Save a figure of the validation images idx, uncropped, with the true and the predicted class of each."""
        paths = [dsets["valid"].imgs[x][0] for x in idx]
        show_predictions([load_image(path) for path in paths], paths, all_classes[idx], all_proba[idx],
                         f"{title} ({of_script})")
        save_figure(args.output_dir / name, args.show)

    # 1. A few correct predictions, at random
    correct = np.where(predictions == all_classes)[0]
    print(f"accuracy on {dset_sizes['valid']:,} validation images: {len(correct) / dset_sizes['valid']:.4f}")
    idx = permutation(correct)[:n_view]
    view(idx, "Correct, at random", "05_correct.png")

    # 2. A few incorrect predictions, at random
    incorrect = np.where(predictions != all_classes)[0]
    view(permutation(incorrect)[:n_view], "Incorrect, at random", "05_incorrect.png")

    # 3. Most confident correct predictions: lowest probability of the other class first (stable: ties stay in order)
    correct_cats = np.where((predictions == 0) & (predictions == all_classes))[0]
    most_correct_cats = np.argsort(all_proba[correct_cats, 1], kind="stable")[:n_view]  # positions in correct_cats
    view(correct_cats[most_correct_cats], "Most correct cats, most confident first", "05_most_correct_cats.png")
    correct_dogs = np.where((predictions == 1) & (predictions == all_classes))[0]
    most_correct_dogs = np.argsort(all_proba[correct_dogs, 0], kind="stable")[:n_view]
    view(correct_dogs[most_correct_dogs], "Most correct dogs, most confident first", "05_most_correct_dogs.png")

    # 4. Most confident incorrect predictions. incorrect_cats: dogs predicted as cats; incorrect_dogs: cats as dogs
    incorrect_cats = np.where((predictions == 0) & (predictions != all_classes))[0]
    most_incorrect_cats = np.argsort(all_proba[incorrect_cats, 1], kind="stable")[:n_view]
    view(incorrect_cats[most_incorrect_cats], "Most incorrect cats: dogs predicted as cats, most confident first",
         "05_most_incorrect_cats.png")
    incorrect_dogs = np.where((predictions == 1) & (predictions != all_classes))[0]
    most_incorrect_dogs = np.argsort(all_proba[incorrect_dogs, 0], kind="stable")[:n_view]
    view(incorrect_dogs[most_incorrect_dogs], "Most incorrect dogs: cats predicted as dogs, most confident first",
         "05_most_incorrect_dogs.png")

    # 5. The most uncertain predictions: probability closest to 0.5
    most_uncertain = np.argsort(np.abs(all_proba[:, 1] - 0.5), kind="stable")[:n_view]
    view(most_uncertain, "Most uncertain", "05_most_uncertain.png")

    # All images in four numbers: a row for each true class, a column for each predicted class
    confusion = np.array([[len(correct_cats), len(incorrect_dogs)], [len(incorrect_cats), len(correct_dogs)]])
    plot_confusion(confusion, f"Confusion matrix ({of_script})")
    save_figure(args.output_dir / "05_confusion.png", args.show)
    plot_histogram(all_proba, all_classes, f"Probability of dog by true class ({of_script})")
    save_figure(args.output_dir / "05_histogram.png", args.show)
    print(f"\nsummary of {of_script}")
    print(f"  log loss                {log_loss(all_proba, all_classes):.4f}  (NLLLoss, as in training)")
    print(f"  log loss, clipped       {log_loss(all_proba.clip(*CLIP), all_classes):.4f}  (as in --submission)")
    print(f"  cats predicted as dogs  {confusion[0, 1]:,} of {confusion[0].sum():,}")
    print(f"  dogs predicted as cats  {confusion[1, 0]:,} of {confusion[1].sum():,}")
    path = args.output_dir / "02_zero_shot.json"
    if path.exists():
        zero_shot = load(path, "run python 02_vgg_imagenet.py --zero-shot again")
        if not differences(zero_shot.get("made_from", {}), metrics["made_from"]):  # the same images and weights
            print(f"  zero-shot accuracy      {zero_shot['valid_accuracy']:.4f}  (02_vgg_imagenet.py --zero-shot)")

# %% Conclusion
    banner("Conclusion")
    # 02_vgg_imagenet.py showed that VGG16 can name breeds of cats and dogs, so it is not surprising that its features
    # distinguish cats from dogs.
    print("We trained a simple logistic regression: 2 x 4096 + 2 = 8,194 parameters, for which any CPU is enough.\n"
          "We used a sledgehammer to kill a fly: VGG16 had learned from 1.2 million photos, many of cats and dogs.\n"
          "Still, these were the steps of a real project: get the data, set up the machine, prepare the images,\n"
          "compute the features once, and keep them for the next experiment.")

    if args.image or args.submission:
        model_vgg, device = load_trained(args, step, metrics, dsets)
    if args.image:
        answers = []
        for path in args.image:
            photo = load_image(path, rotate=True)
            inputs = IMAGENET.transforms()(photo)[None]  # resized and cropped; a batch of one: (1, 3, 224, 224)
            with torch.inference_mode():
                cat, dog = model_vgg(inputs.to(device))[0].exp().tolist()
            answers.append({"cats": cat, "dogs": dog})
        show_photos(args.image, answers, f"Cat or dog? ({of_script})")
        save_figure(args.output_dir / "05_images.png", args.show)
    if args.submission:
        write_submission(args, model_vgg, device, dset_test, loader_valid.num_workers)
    print(f"\nDone{note}. Next: change a line and run the script again; the README has exercises")
