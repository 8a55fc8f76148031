"""Look at what the trained model gets right, what it gets wrong, and what it is unsure about.

The lecture's "Viewing model prediction (qualitative analysis)" (video from 1:03:39,
https://youtu.be/ZhC-DIrCe6A?t=3819) and "Conclusion".

  python 05_analysis.py --sample                     the results of 04_precompute.py --sample, or of 03
  python 05_analysis.py --sample --image my.jpg      cat or dog? Your own photos
  python 05_analysis.py --submission                 the submission to Kaggle: submission.csv

Reads the dataset and the results of 04 (or 03). Writes to the output folder a figure for each view (05_correct.png,
...), 05_histogram.png and 05_confusion.png; with --image also 05_images.png, with --submission submission.csv.
"""
# %% Imports and options. Imports that the script does not use are there so that you can type the video's commands.
from support.run import banner, print_options, start_run  # first: it checks the environment
import copy

import matplotlib.pyplot as plt
import numpy as np
import torch
import torchvision
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, models, transforms

from common import (ANIMALS, CLASSES, IMAGENET, freeze_and_replace_head, get_device, get_weights, imshow, load_data,
                    load_results, load_state, load_vgg16, log_loss, save_figure, show_photos, show_predictions,
                    to_device, to_log_proba)
from support.errors import UserError
from support.files import load, save
from support.images import load_image, numbered_images, photo
from support.options import number, option_parser
from support.progress import progress
from support.records import differences, make_record

if __name__ == "__main__":  # worker processes, which load images, import this file again and must not run the rest
    parser = option_parser("05_analysis.py", __doc__)
    parser.add_argument("--step", choices=["03", "04"], help="results to analyze (default: 04 if it has run, else 03)")
    parser.add_argument("--n-view", type=number(1, 100), default=8, metavar="N", help="images per view (default: 8)")
    parser.add_argument("--image", type=photo, nargs="+", action="extend", default=[], metavar="FILE",
                        help="also classify your own photos")
    parser.add_argument("--submission", action="store_true", help="predict test1 and write submission.csv for Kaggle")
    parser.set_defaults(weights=None)  # default: the weights used for the results
    args = start_run(parser)
    device, dsets, loader_train, loader_valid = load_data(args)  # as in 01_data.py
    dset_sizes = {x: len(dsets[x]) for x in ["train", "valid"]}
    dset_classes = dsets["valid"].classes
    if len(CLASSES) != 2:
        raise UserError(f"05_analysis.py compares two classes, but CLASSES in common.py has {len(CLASSES)}: look at "
                        "the figures of 03 and 04 instead")
    step = args.step or ("04" if list(args.output_dir.glob("04_*metrics.json")) else "03")
    metrics, predictions, all_proba, all_classes = load_results(args, step, dsets)
    args.weights = args.weights or metrics["weights"]
    args.bf16 = args.bf16 or metrics["made_from"]["precision"] == "bfloat16"
    print_options(args)
    note = "" if metrics["pretrained"] else " (untrained weights)"
    of_script = f"script {step}" if metrics["pretrained"] else f"script {step}, untrained weights"

# %% Viewing model prediction (qualitative analysis)
    banner("Viewing model prediction (qualitative analysis)", "1:03:39", args.pause)
    # Judge a model on images it was not trained on. If it does much better on the training images, it is overfitting.
    # First make a model that can overfit; only then add regularization (such as dropout) and augmentation (random
    # changes to the images in every epoch; impossible with precomputed features).
    if "train_accuracy" in metrics:
        print(f"training accuracy in the last epoch ({of_script}): {metrics['train_accuracy'][-1]:.4f}")

    # The views help to find problems: wrong labels, animals outside the central 224 x 224 pixels, rare breeds. They
    # show the photos uncropped (the lecture also shows the cropped images of the first view, as a batch).
    n_view = args.n_view  # number of images in each view
    permutation = np.random.default_rng(args.seed).permutation  # the lecture's permutation, with a seed
    cats, dogs = dset_classes  # the names "cats" and "dogs", or those of your own classes

    def view(idx, title, name):
        """Save a figure of the validation images idx, uncropped, with the true and the predicted class of each."""
        paths = [dsets["valid"].imgs[x][0] for x in idx]
        show_predictions([load_image(path) for path in paths], paths, all_classes[idx], all_proba[idx],
                         f"{title} ({of_script})")
        save_figure(args.output_dir / name, args.show)

    # 1. A few correct predictions, at random
    correct = np.where(predictions == all_classes)[0]  # np.where returns a tuple, with one array per dimension
    print(f"accuracy on {dset_sizes['valid']:,} validation images: {len(correct) / dset_sizes['valid']:.4f}")
    idx = permutation(correct)[:n_view]
    view(idx, "Correct, at random", "05_correct.png")

    # 2. A few incorrect predictions, at random
    incorrect = np.where(predictions != all_classes)[0]
    view(permutation(incorrect)[:n_view], "Incorrect, at random", "05_incorrect.png")

    # 3. Most confident correct predictions: lowest probability of the other class first (stable: ties stay in order)
    correct_cats = np.where((predictions == 0) & (predictions == all_classes))[0]
    most_correct_cats = np.argsort(all_proba[correct_cats, 1], kind="stable")[:n_view]  # positions in correct_cats
    view(correct_cats[most_correct_cats], f"Most correct {cats}, most confident first", f"05_most_correct_{cats}.png")
    correct_dogs = np.where((predictions == 1) & (predictions == all_classes))[0]
    most_correct_dogs = np.argsort(all_proba[correct_dogs, 0], kind="stable")[:n_view]
    view(correct_dogs[most_correct_dogs], f"Most correct {dogs}, most confident first", f"05_most_correct_{dogs}.png")

    # 4. Most confident incorrect predictions. incorrect_cats: dogs predicted as cats; incorrect_dogs: cats as dogs
    incorrect_cats = np.where((predictions == 0) & (predictions != all_classes))[0]
    most_incorrect_cats = np.argsort(all_proba[incorrect_cats, 1], kind="stable")[:n_view]
    view(incorrect_cats[most_incorrect_cats],
         f"Most incorrect {cats}: {dogs} predicted as {cats}, most confident first", f"05_most_incorrect_{cats}.png")
    incorrect_dogs = np.where((predictions == 1) & (predictions != all_classes))[0]
    most_incorrect_dogs = np.argsort(all_proba[incorrect_dogs, 0], kind="stable")[:n_view]
    view(incorrect_dogs[most_incorrect_dogs],
         f"Most incorrect {dogs}: {cats} predicted as {dogs}, most confident first", f"05_most_incorrect_{dogs}.png")

    # 5. The most uncertain predictions: probability closest to 0.5
    most_uncertain = np.argsort(np.abs(all_proba[:, 1] - 0.5), kind="stable")[:n_view]
    view(most_uncertain, "Most uncertain", "05_most_uncertain.png")

# %% Conclusion
    banner("Conclusion")
    # Before you read on: a network of 134 million parameters made these predictions. How many of them did we train?
    # (A logistic regression exactly with --layer fc7. Otherwise dropout changes its inputs a little in each epoch.)
    # 02_vgg_imagenet.py showed that VGG16 can name breeds of cats and dogs, so it is not surprising that its features
    # distinguish cats from dogs.
    print("We trained a simple logistic regression: 2 x 4096 + 2 = 8,194 parameters, for which any CPU is enough.\n"
          "We used a sledgehammer to kill a fly: VGG16 had learned from 1.2 million photos, many of cats and dogs.\n"
          "Still, these were the steps of a real project: get the data, set up the machine, prepare the images,\n"
          "compute the features once, and keep them for the next experiment.")

# %% Beyond the lecture
    banner("Beyond the lecture")
    # All images in four numbers: a row for each true class, a column for each predicted class
    confusion = np.array([[len(correct_cats), len(incorrect_dogs)], [len(incorrect_cats), len(correct_dogs)]])
    plt.figure(figsize=(5, 4.5), layout="constrained")
    plt.imshow(confusion, cmap="Blues", vmin=0)
    for true in [0, 1]:
        for pred in [0, 1]:
            count = confusion[true, pred]
            share = count / max(confusion[true].sum(), 1)
            plt.text(pred, true, f"{count:,}\n{share:.1%} of {dset_classes[true]}", ha="center", va="center",
                     color="white" if count > confusion.max() / 2 else "black")
    plt.xticks([0, 1], dset_classes)
    plt.yticks([0, 1], dset_classes)
    plt.gca().set(xlabel="predicted class", ylabel="true class", title=f"Confusion matrix ({of_script})")
    save_figure(args.output_dir / "05_confusion.png", args.show)

    # How sure is the model? Two well-separated peaks are good; images on the wrong side of 0.5 are errors.
    plt.figure(figsize=(7, 4), layout="constrained")
    dog_proba = all_proba[:, 1]
    plt.hist([dog_proba[all_classes == 0], dog_proba[all_classes == 1]], bins=20, range=(0, 1), label=dset_classes)
    plt.axvline(0.5, color="grey", linestyle="--")
    plt.gca().set(xlabel=f"predicted probability of {ANIMALS[1]}", ylabel="validation images",
                  title=f"Probability of {ANIMALS[1]} by true class ({of_script})")
    plt.gca().yaxis.get_major_locator().set_params(integer=True)
    if dset_sizes["valid"] > 100:  # a logarithmic axis shows the few errors beside hundreds of correct predictions
        plt.yscale("symlog")
        plt.gca().yaxis.set_major_formatter("{x:.0f}")
        plt.ylabel("validation images (log scale)")
    plt.legend(title="true class", loc="upper left", bbox_to_anchor=(1, 1))  # beside the bars
    save_figure(args.output_dir / "05_histogram.png", args.show)

    clip = 0.005, 0.995  # bounds of the probabilities that are sent to Kaggle, see below
    print(f"\nsummary of {of_script}")
    print(f"  log loss                {log_loss(all_proba, all_classes):.4f}  (NLLLoss, as in training)")
    print(f"  log loss, clipped       {log_loss(all_proba.clip(*clip), all_classes):.4f}  (as in --submission)")
    print(f"  {cats} predicted as {dogs}  {confusion[0, 1]:,} of {confusion[0].sum():,}")
    print(f"  {dogs} predicted as {cats}  {confusion[1, 0]:,} of {confusion[1].sum():,}")
    path = args.output_dir / "02_zero_shot.json"
    if path.exists():
        zero_shot = load(path, "run python 02_vgg_imagenet.py --zero-shot again")
        same = {name: metrics["made_from"][name] for name in metrics["made_from"] if name != "network"}
        if not differences(zero_shot.get("made_from", {}), same):  # the same images and weights
            print(f"  zero-shot accuracy      {zero_shot['valid_accuracy']:.4f}  (02_vgg_imagenet.py --zero-shot)")

    if args.image or args.submission:
        device = get_device(args.device, args.bf16)
        model_vgg = freeze_and_replace_head(load_vgg16(get_weights(args.weights)))
        model_vgg = to_device(model_vgg, device, args.bf16)
        path = args.output_dir / f"{step}_head.pt"
        # The last layer fits only the network, the images and the precision with which it was trained.
        now = make_record(dsets, model_vgg, model_vgg.classifier[6])
        if changed := differences(metrics["made_from"], now):
            raise UserError(f"{path} was trained with {changed} (--weights {metrics['weights']}): use the same "
                            "options, or train it again (repeat your edits of its network in common.py)")
        load_state(model_vgg.classifier[6], path, "run the script that trained it again")
        model_vgg.to(device).eval()  # load_state leaves the new parameters on the CPU
        # Check: on the first batch, the network must give the saved predictions, up to rounding (0.01 in bfloat16).
        # They cannot be compared if a random transform makes other images of the same files each time.
        inputs, _ = next(iter(loader_valid))
        inputs_again, _ = next(iter(loader_valid))
        with torch.inference_mode():
            proba = to_log_proba(model_vgg(inputs.to(device))).exp()
        if torch.equal(inputs, inputs_again) and not np.allclose(proba, all_proba[:len(inputs)], atol=0.05):
            raise UserError(f"{path}: does not give the predictions of script {step}, which trained a different "
                            "network: train model_vgg there, or omit --image and --submission")
    if args.image:
        answers = []
        for path in args.image:
            inputs = IMAGENET.transforms()(load_image(path, rotate=True))[None]  # a batch of one: (1, 3, 224, 224)
            with torch.inference_mode():
                proba = to_log_proba(model_vgg(inputs.to(device)))[0].exp().tolist()
            answers.append(dict(zip(dset_classes, proba, strict=True)))
        show_photos(args.image, answers, f"{ANIMALS[0].capitalize()} or {ANIMALS[1]}? ({of_script})")
        save_figure(args.output_dir / "05_images.png", args.show)
    if args.submission:
        paths = numbered_images(args.data_dir / "test1")
        if not paths:
            raise UserError(f"{args.data_dir / 'test1'}: contains no numbered images: omit --sample, and use Kaggle's "
                            "or the lecture's files")
        print(f"Kaggle submission for {len(paths):,} images of test1 (Kaggle expects 12,500)")
        dset_test = copy.copy(dsets["valid"])  # the same loader and transform; the labels, here 0, are unknown
        dset_test.samples = [(str(path), 0) for path in paths]
        loader_test = DataLoader(dset_test, batch_size=16, num_workers=loader_valid.num_workers)
        dog = []
        for inputs, _ in progress(loader_test, len(loader_test), len(paths)):
            with torch.inference_mode():
                dog += to_log_proba(model_vgg(inputs.to(device))).exp()[:, 1].tolist()
        # The score is the log loss, which is infinite if the model gives probability 0 to the true class of any image.
        # Clipping the probabilities limits it to -log(0.005) = 5.3 per image.
        rows = [f"{int(path.stem)},{p:.6f}\n" for path, p in zip(paths, np.clip(dog, *clip), strict=True)]
        save(args.output_dir, {"submission.csv": "".join(["id,label\n", *rows])})
    print(f"\nDone{note}. Next: change a line and run the script again; the README has exercises")
