"""Look at what the trained model gets right, what it gets wrong, and what it can't decide.

The lecture's "Viewing model prediction (qualitative analysis)" (video from 1:03:39,
https://youtu.be/ZhC-DIrCe6A?t=3819) and its "Conclusion".

  python 05_analysis.py --sample                     the results of 04_precompute.py --sample, else of 03
  python 05_analysis.py --sample --image my.jpg      cat or dog? Your own photos
  python 05_analysis.py --submission                 the Kaggle entry: submission.csv

Reads the dataset and what 04 (or 03) left. Leaves in the output folder a figure of each view (05_correct.png and so
on), 05_histogram.png and 05_confusion.png; with --image 05_images.png, with --submission submission.csv.
"""
import copy

import matplotlib.pyplot as plt
import numpy as np
import torch
import torchvision  # an import that this script does not use is for what the video types
from torch.utils.data import DataLoader
from torchvision import datasets, models, transforms

from common import (CLASSES, UserError, banner, choose_weights, differences, freeze_and_replace_head, identify, imshow,
                    load, load_data, load_image, load_state, load_vgg16, log_loss, made_from, option_parser,
                    parse_options, progress, save, save_figure, show_photos, show_predictions, to_device)


def load_results(args, step, images):
    """metrics, predictions (M,), all_proba (M, 2), all_classes (M,) of a step; UserError unless they fit the images."""
    again = f"run python {'03_finetune_head.py' if step == '03' else '04_precompute.py'} with the same options"
    metrics = load(args.output_dir / f"{step}_metrics.json", again)
    if "valid_loss" not in metrics:
        raise UserError(f"{args.output_dir / f'{step}_metrics.json'}: stopped before the test; {again}")
    now = {name: images[name] for name in ["transform", "valid images"]}
    if changed := differences(metrics.get("made_from", {}), now):
        raise UserError(f"{args.output_dir / f'{step}_predictions.npy'}: made with other {changed}; {again}")
    names = ["predictions", "all_proba", "all_classes"]
    return metrics, *[load(args.output_dir / f"{step}_{name}.npy", again) for name in names]


def plot_confusion(confusion, title):
    """How many of each true class (row) were predicted as each class (column); confusion: (2, 2)."""
    plt.figure(figsize=(5, 4.5), layout="constrained")
    plt.imshow(confusion, cmap="Blues", vmin=0)
    for (true, pred), count in np.ndenumerate(confusion):
        plt.text(pred, true, f"{count:,}\n{count / max(confusion[true].sum(), 1):.1%} of {CLASSES[true]}", ha="center",
                 va="center", color="white" if count > confusion.max() / 2 else "black")
    plt.xticks([0, 1], CLASSES)
    plt.yticks([0, 1], CLASSES)
    plt.xlabel("predicted class")
    plt.ylabel("true class")
    plt.title(title)


def plot_histogram(all_proba, all_classes, title):
    """How sure it is of each image: two heaps far apart are good; what is on the other's side of 0.5 is wrong."""
    plt.figure(figsize=(7, 4), layout="constrained")
    plt.hist([all_proba[all_classes == k, 1] for k in [0, 1]], bins=20, range=(0, 1), label=CLASSES)
    plt.axvline(0.5, color="grey", linestyle="--")
    plt.yscale("symlog")
    plt.gca().yaxis.set_major_formatter("{x:.0f}")
    plt.xlabel("predicted probability of dog")
    plt.ylabel("validation images (log scale)")
    plt.title(title)
    plt.legend(title="true class", loc="upper center")


def load_trained(args, step, metrics, images, device):
    """VGG16 with the last layer that `step` trained; UserError unless all below it, and the images, are the same."""
    choose_weights(args)
    model_vgg = to_device(freeze_and_replace_head(load_vgg16(args.weights)), device, args.bf16)
    if changed := differences(metrics["made_from"], made_from(images, model_vgg)):
        raise UserError(f"{args.output_dir / f'{step}_head.pt'} was trained with other {changed} (--weights "
                        f"{metrics['weights']}); give the same options, or train it again")
    load_state(model_vgg.classifier[6], args.output_dir / f"{step}_head.pt", f"run the script of step {step} again")
    return model_vgg.to(device).eval()


def find_test_images(folder):
    """The images of test1, which has no classes and so is no ImageFolder: 1.jpg, 2.jpg, 10.jpg, by their numbers."""
    paths = [path for path in folder.glob("*.jpg") if path.stem.isdecimal()]
    if not paths:
        raise UserError(f"{folder}: no images there; run python 01_data.py first, and leave out --sample")
    return sorted(paths, key=lambda path: int(path.stem))


@torch.inference_mode()
def write_submission(args, model, device, dset, test_paths):
    """Predict test1 and write submission.csv for Kaggle, which scores the log loss: one image wrong at p = 0 would cost
    infinitely much. With p clipped to [0.005, 0.995], an error costs -log(0.005) = 5.3 at most."""
    print(f"\nBeyond the lecture: the Kaggle submission for {len(test_paths):,} images of test1 (Kaggle's are 12,500)")
    dset_test = copy.copy(dset)
    dset_test.samples = [(path, int(path.stem)) for path in test_paths]  # in place of the classes their numbers
    loader_test = DataLoader(dset_test, batch_size=16, num_workers=args.num_workers)
    rows = ["id,label"]
    for inputs, ids in progress(loader_test, len(loader_test)):
        dog = model(inputs.to(device)).exp()[:, 1].clip(0.005, 0.995).tolist()
        rows += [f"{i},{p:.6f}" for i, p in zip(ids.tolist(), dog, strict=True)]
    save(args.output_dir, {"submission.csv": "\n".join(rows) + "\n"})


if __name__ == "__main__":
    parser = option_parser(__doc__)
    parser.add_argument("--step", choices=["03", "04"], help="whose results (default: 04 where it has run, else 03)")
    parser.add_argument("--n-view", type=int, default=8, metavar="N", help="images a view, 100 at most (default: 8)")
    parser.add_argument("--image", nargs="+", action="extend", default=[], metavar="FILE", help="photos of your own")
    parser.add_argument("--submission", action="store_true", help="predict test1 and write submission.csv for Kaggle")
    args = parse_options(parser)
    test_paths = find_test_images(args.data_dir / "test1") if args.submission else []
    device, dsets, loader_train, loader_valid = load_data(args)  # as in 01_data.py
    dset_sizes = {x: len(dsets[x]) for x in ["train", "valid"]}
    dset_classes = dsets["valid"].classes
    images = identify(dsets)
    step = args.step or ("04" if (args.output_dir / "04_metrics.json").exists() else "03")
    metrics, predictions, all_proba, all_classes = load_results(args, step, images)
    note = "" if metrics["pretrained"] else ", untrained weights"
    of_step = f"step {step}{note}"

# %% Viewing model prediction (qualitative analysis)
    banner("Viewing model prediction (qualitative analysis)", 3819, args.pause)
    # Judge a model by images that it did not learn from: if it does much better on those that it did, it over-fits.
    # First make a model that can over-fit; only then care about regularization and augmentation. (Augmentation alters
    # the images anew in every epoch: features that are computed once can't follow it.)
    print(f"accuracy of {of_step}, in the last epoch of training: {metrics['train_accuracy'][-1]:.4f}")

    # The views are for finding faults: wrong labels, odd crops, what it has never seen.
    n_view = args.n_view  # number of images of each view
    permutation = np.random.default_rng(args.seed).permutation

    def view(idx, title, name):
        """Save a figure of the validation images idx, each whole, with its true class and what was predicted."""
        paths = [dsets["valid"].imgs[x][0] for x in idx]
        show_predictions([load_image(path) for path in paths], paths, all_classes[idx], all_proba[idx],
                         f"{title} ({of_step})")
        save_figure(args.output_dir / name, args.show)

    # 1. A few correct labels at random
    correct = np.where(predictions == all_classes)[0]
    print(f"correct of {dset_sizes['valid']:,} validation images: {len(correct) / dset_sizes['valid']:.4f}")
    idx = permutation(correct)[:n_view]
    view(idx, "Correct, at random", "05_correct.png")

    # 2. A few incorrect labels at random
    incorrect = np.where(predictions != all_classes)[0]
    view(permutation(incorrect)[:n_view], "Incorrect, at random", "05_incorrect.png")

    # 3. The images we were most confident in, and rightly: the least probability of the other class comes first
    correct_cats = np.where((predictions == 0) & (predictions == all_classes))[0]
    most_correct_cats = np.argsort(all_proba[correct_cats, 1], kind="stable")[:n_view]  # places in correct_cats
    view(correct_cats[most_correct_cats], "Most correct cats", "05_most_correct_cats.png")
    correct_dogs = np.where((predictions == 1) & (predictions == all_classes))[0]
    most_correct_dogs = np.argsort(all_proba[correct_dogs, 0], kind="stable")[:n_view]
    view(correct_dogs[most_correct_dogs], "Most correct dogs", "05_most_correct_dogs.png")

    # 4. The images we were most confident in, and wrongly
    incorrect_cats = np.where((predictions == 0) & (predictions != all_classes))[0]
    most_incorrect_cats = np.argsort(all_proba[incorrect_cats, 1], kind="stable")[:n_view]
    view(incorrect_cats[most_incorrect_cats], "Most incorrect cats: taken for cats", "05_most_incorrect_cats.png")
    incorrect_dogs = np.where((predictions == 1) & (predictions != all_classes))[0]
    most_incorrect_dogs = np.argsort(all_proba[incorrect_dogs, 0], kind="stable")[:n_view]
    view(incorrect_dogs[most_incorrect_dogs], "Most incorrect dogs: taken for dogs", "05_most_incorrect_dogs.png")

    # 5. The most uncertain labels: the probability closest to 0.5
    most_uncertain = np.argsort(np.abs(all_proba[:, 1] - 0.5), kind="stable")[:n_view]
    view(most_uncertain, "Most uncertain", "05_most_uncertain.png")

    # In numbers: row the true class, column the predicted one
    confusion = np.array([[len(correct_cats), len(incorrect_dogs)], [len(incorrect_cats), len(correct_dogs)]])
    plot_confusion(confusion, f"Confusion matrix ({of_step})")
    save_figure(args.output_dir / "05_confusion.png", args.show)
    plot_histogram(all_proba, all_classes, f"Probability of dog by true class ({of_step})")
    save_figure(args.output_dir / "05_histogram.png", args.show)
    print(f"\nsummary of {of_step}")
    print(f"  accuracy            {len(correct) / dset_sizes['valid']:.4f}")
    print(f"  log loss            {metrics['valid_loss']:.4f}  (NLLLoss, as in training)")
    print(f"  log loss, clipped   {log_loss(all_proba.clip(0.005, 0.995), all_classes):.4f}  (as Kaggle scores)")
    print(f"  cats taken for dogs {confusion[0, 1]:,} of {confusion[0].sum():,}")
    print(f"  dogs taken for cats {confusion[1, 0]:,} of {confusion[1].sum():,}")
    if (args.output_dir / "02_zero_shot.json").exists():
        zero_shot = load(args.output_dir / "02_zero_shot.json", "run python 02_vgg_imagenet.py --zero-shot again")
        if not differences(zero_shot.get("made_from", {}), metrics["made_from"]):
            print(f"  zero-shot accuracy  {zero_shot['valid_accuracy']:.4f}  (02_vgg_imagenet.py --zero-shot)")

# %% Conclusion
    banner("Conclusion")
    # Step 02 saw VGG16 name breeds already, so it is no surprise that its features tell cats from dogs.
    print("What was trained is a simple logistic regression: 2 x 4096 weights + 2 biases = 8,194 numbers, and any CPU\n"
          "can train those. A fly was killed with a sledge hammer: VGG16 had learned from 1.2 million photos, many\n"
          "of cats and dogs. Still, every step of a real project was there: get the data, set up the machine, prepare\n"
          "the images, compute features once, keep them for the next experiment.")

    if args.image or args.submission:
        model_vgg = load_trained(args, step, metrics, images, device)
    if args.image:
        show_photos(args.image, lambda inputs: (CLASSES, model_vgg(inputs.to(device))[0].exp().tolist()),
                    f"Cat or dog? ({of_step})")
        save_figure(args.output_dir / "05_images.png", args.show)
    if args.submission:
        write_submission(args, model_vgg, device, dsets["valid"], test_paths)
    print(f"\nDone{note}. Next: change a line and run it again; the README has exercises")
