"""Code shared by the five scripts: transforms, imshow, VGG16 and its new last layer, training, testing, the device,
loading data, figures. Code that is not part of the lecture, such as options and error messages, is in support/.

Letters in shapes: B images in a batch, N training images, M validation images, C classes, H x W pixels."""
import os
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn
from torchvision import datasets, models, transforms

from support.download import download
from support.errors import UserError, on_error
from support.files import load, save
from support.images import check_folders, load_image
from support.progress import progress
from support.records import differences, file_sizes, make_record

CLASSES = sorted(["cats", "dogs"])  # labels 0 and 1: ImageFolder numbers the folders in alphabetical order
ANIMALS = [name.removesuffix("s") for name in CLASSES]  # the class of a single image: cat, dog

# Mean and standard deviation of red, green and blue in ImageNet, the set of photos that VGG16 was trained on.
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

imagenet_format = transforms.Compose([
    transforms.CenterCrop(224),
    transforms.ToTensor(),
    transforms.Normalize(mean=MEAN, std=STD),
])

IMAGENET = models.VGG16_Weights.IMAGENET1K_V1  # torchvision's description of the pretrained weights
IMAGENET_FILE = Path(torch.hub.get_dir(), "checkpoints", "vgg16-397923af.pth")  # torchvision uses the same file
IMAGENET_SIZE = 553_433_881  # bytes


# In the video: from 0:25:50
def imshow(image, title=None):
    """Show a normalized image, a (3, H, W) tensor, on the current axes. If it is a grid of images (from make_grid), the
    title may be a list of names, each to be written above its image."""
    image = image.cpu().numpy().transpose((1, 2, 0))  # (H, W, 3), the order that matplotlib expects
    image = np.array(STD) * image + np.array(MEAN)  # undo Normalize
    image = np.clip(image, 0, 1)
    plt.imshow(image)
    plt.axis("off")
    if isinstance(title, list):
        columns = min(len(title), 8)  # make_grid starts a new row after 8 images
        size = image.shape[1] / columns  # pixels
        for i, name in enumerate(title):
            row, column = divmod(i, 8)
            plt.text((column + 0.5) * size, row * size - 14, name, ha="center", backgroundcolor="white")
    elif title is not None:
        plt.title(title, parse_math=False)


# ------------------------------------------------------------------------------------------------ VGG16 and its layers
def load_vgg16(weights):
    """Return torchvision's VGG16. weights: "imagenet", "untrained" (random, always the same) or a .pth file. Raises
    UserError if the file is missing, damaged, or belongs to a different network."""
    torch.manual_seed(0)
    # On the device "meta", no random numbers are drawn: the file would replace them anyway.
    with torch.device("cpu" if weights == "untrained" else "meta"):
        model = models.vgg16()
    if weights == "imagenet":
        return load_state(model, IMAGENET_FILE, "delete it if it exists, and run this script again")
    if weights != "untrained":
        return load_state(model, Path(weights), "give a different file to --weights")
    return model


def load_state(module, path, advice):
    """Return the module with the parameters from a state dict file. Raises UserError if the file is missing or damaged
    (advice: what to do then), or was saved from a different network."""
    state_dict = load(path, advice)
    with on_error(path, f"saved from a different network, not from this {type(module).__name__}",
                  "use a file that was saved from this network, or train again (--weights untrained needs no file)"):
        module.load_state_dict(state_dict, assign=True)
    module.float()
    if not all(value.sum().isfinite() for value in module.parameters()):  # value.isfinite() would need more memory
        raise UserError(f"{path}: contains numbers that are not finite: {advice}")
    return module


def freeze_and_replace_head(model):
    """Freeze VGG16 and replace its last layer with a new one for CLASSES. Explained in 03_finetune_head.py."""
    for param in model.parameters():
        param.requires_grad = False
    model.classifier[6] = nn.Linear(4096, len(CLASSES))
    model.classifier.append(nn.LogSoftmax(dim=1))
    return model


# --------------------------------------------------------------------------------------------------- train and test
# In the video: from 0:49:50
def train_model(model, dataloader, size, epochs=1, optimizer=None, criterion=nn.NLLLoss(), after_epoch=None):
    """Train on `size` images, in batches (inputs, classes). Only the optimizer's parameters change. For each epoch,
    print and return the mean loss per image and the accuracy, both measured during training, and the time in seconds.
    After each epoch, call after_epoch(history), if it is given. Raises UserError if the loss is negative or not finite.
    """
    device = next(model.parameters()).device
    non_blocking = device.type == "cuda"  # copy in the background (on MPS, data could be used before it arrives)
    history = []
    for epoch in range(1, epochs + 1):  # an epoch: every image is used once
        # Switch dropout on: a random half of a dense layer's outputs become 0, to reduce overfitting. The lecture does
        # this once, before the loop; here, after_epoch may have switched it off.
        model.train()
        start = time.perf_counter()
        running_loss = 0.0
        running_corrects = 0
        for inputs, classes in progress(dataloader, len(dataloader), size):  # a batch: B images, processed together
            inputs = inputs.to(device, non_blocking=non_blocking)  # (B, 3, 224, 224), or (B, ...) features
            classes = classes.to(device, non_blocking=non_blocking)  # (B,)
            outputs = model(inputs)  # (B, C) log-probabilities
            loss = criterion(outputs, classes)  # mean over the batch
            # An update, the heart of the training:
            optimizer.zero_grad()  # clear the gradients of the previous batch
            loss.backward()  # compute new ones: how the loss changes with each trainable parameter
            optimizer.step()  # change each parameter a little, so that the loss gets smaller
            preds = outputs.argmax(dim=1)  # the predicted class: the one with the highest probability
            # Statistics. `loss` is a mean over the batch: multiply it by the batch size here, and divide by the number
            # of images below. The lecture forgets to multiply: its losses are about 64 times smaller in 03's training,
            # which has batches of 64 images, 5 times smaller in 03's test, and 128 times smaller in 04.
            # Both sums stay on the device: .item() here would make the CPU wait for the GPU in every batch.
            running_loss += loss.detach() * len(classes)
            running_corrects += (preds == classes).sum()
        epoch_loss = running_loss.item() / size
        epoch_acc = running_corrects.item() / size
        seconds = time.perf_counter() - start
        if not 0 <= epoch_loss < np.inf:
            raise UserError(f"the training loss is {epoch_loss}: use a smaller --lr, or LogSoftmax if it is negative")
        print(f"epoch {epoch:2}/{epochs}  loss {epoch_loss:.4f}  accuracy {epoch_acc:.4f}  {seconds:.2f} s")
        history.append({"loss": epoch_loss, "accuracy": epoch_acc, "seconds": seconds})
        if after_epoch:
            after_epoch(history)
    return history


# In the video: from 0:49:50, after train_model
@torch.inference_mode()  # no gradients: testing changes nothing
def test_model(model, dataloader, size, criterion=nn.NLLLoss()):
    """Test on `size` images, print the mean loss and the accuracy, and return, in the order of the dataloader,
    predictions (size,) int64, all_proba (size, C) float64 probabilities and all_classes (size,) int64."""
    model.eval()  # switches dropout off
    device = next(model.parameters()).device
    predictions = np.zeros(size, dtype=np.int64)
    all_classes = np.zeros(size, dtype=np.int64)
    all_proba = []
    i = 0
    running_loss = 0.0
    running_corrects = 0
    for inputs, classes in progress(dataloader, len(dataloader), size):
        outputs = to_log_proba(model(inputs.to(device)))  # (B, C) float64, on the CPU
        preds = outputs.argmax(dim=1)
        running_loss += criterion(outputs, classes).item() * len(classes)
        running_corrects += (preds == classes).sum().item()
        predictions[i:i + len(classes)] = preds.numpy()
        all_classes[i:i + len(classes)] = classes.numpy()
        all_proba.append(outputs.exp().numpy())  # probabilities; the lecture keeps their logarithms
        i += len(classes)
    print(f"test on {size:,} images  loss {running_loss / size:.4f}  accuracy {running_corrects / size:.4f}")
    return predictions, np.concatenate(all_proba), all_classes


TINY = np.finfo(np.float64).tiny  # the smallest probability used: 0 would make the loss infinite


def to_log_proba(outputs):
    """Return log-probabilities, (B, C) float64 on the CPU. If the network does not end with LogSoftmax (as for
    CrossEntropyLoss), apply log_softmax to its outputs. Raises UserError if some outputs are NaN (not a number)."""
    outputs = outputs.cpu().double()
    if outputs.isnan().any():
        raise UserError("the network's outputs are NaN (not a number): use a smaller --lr, or different weights")
    if not torch.allclose(outputs.exp().sum(dim=1), torch.ones(len(outputs), dtype=torch.float64), atol=0.01):
        outputs = outputs.log_softmax(dim=1)
    return outputs.clamp(min=np.log(TINY))  # -708.4


def log_loss(all_proba, all_classes):
    """Return the mean of -log(p), where p is the probability of an image's true class: NLLLoss, and Kaggle's score."""
    p = all_proba[np.arange(len(all_classes)), all_classes]
    return float(-np.log(p.clip(TINY)).mean())


def save_results(args, step, model, record, history, results=()):
    """Save the last layer, how it was trained and, after the test, the results of test_model. Return the metrics.
    Before the test, when there are no results, the files have names of their own, such as 03_unfinished_head.pt: a run
    that is stopped keeps its finished epochs, and does not overwrite the results of an earlier run."""
    metrics = {"options": vars(args), "weights": args.weights, "pretrained": args.weights != "untrained",
               "dataset": args.data_dir, "made_from": record}
    if history:  # not if it is None, from a train_model that returns nothing, such as the lecture's
        metrics["seconds_per_epoch"] = np.mean([epoch["seconds"] for epoch in history])
        names = {"loss": "train_loss", "accuracy": "train_accuracy", "valid_loss": "valid_loss_per_epoch",
                 "valid_accuracy": "valid_accuracy_per_epoch"}
        metrics |= {names[key]: [epoch[key] for epoch in history] for key in names if key in history[0]}
    head = {name: value.cpu() for name, value in model.classifier[6].state_dict().items()}
    unfinished = {f"{step}_unfinished_head.pt": head, f"{step}_unfinished_metrics.json": metrics}
    if not results:
        save(args.output_dir, unfinished, quiet=True, fsync=False)
        return metrics
    predictions, all_proba, all_classes = results[0].astype(np.int64), results[1], results[2].astype(np.int64)
    if not np.allclose(all_proba.sum(axis=1), 1, atol=0.01):  # as from the lecture's own test_model
        raise UserError("test_model must return probabilities: put outputs.exp() in all_proba, not outputs")
    if all_proba.shape[1] != len(CLASSES):
        raise UserError(f"the network has {all_proba.shape[1]} outputs, but CLASSES in common.py has {len(CLASSES)} "
                        "names: give nn.Linear(4096, 2) as many outputs as there are names")
    metrics["valid_loss"] = log_loss(all_proba, all_classes)
    metrics["valid_accuracy"] = np.mean(predictions == all_classes)
    save(args.output_dir, {f"{step}_head.pt": head, f"{step}_predictions.npy": predictions,
                           f"{step}_all_proba.npy": all_proba, f"{step}_all_classes.npy": all_classes,
                           f"{step}_metrics.json": metrics})
    for name in unfinished:
        (args.output_dir / name).unlink(missing_ok=True)
    return metrics


def load_results(args, step, dsets):
    """Return metrics, predictions (M,), all_proba (M, C) and all_classes (M,) of script 03 or 04. Raises UserError if
    they are missing, unfinished, or were made from different images or with a different transform."""
    again = f"run python {'03_finetune_head.py' if step == '03' else '04_precompute.py'} with the same options"
    path = args.output_dir / f"{step}_metrics.json"
    unfinished = args.output_dir / f"{step}_unfinished_metrics.json"
    if unfinished.exists():
        n_epochs = len(load(unfinished, again).get("train_loss", []))
        stopped = f"script {step} was stopped before its test (finished epochs: {n_epochs})"
        if not path.exists():
            raise UserError(f"{unfinished}: {stopped}: {again}")
        print(f"NOTICE: {stopped}. These are the results of an earlier run.")
    metrics = load(path, again)
    now = make_record({"valid": dsets["valid"]})  # the predictions can be shown without the training images
    if changed := differences(metrics.get("made_from", {}), now):
        raise UserError(f"{args.output_dir / f'{step}_predictions.npy'}: made with {changed}: {again}")
    if args.weights in ("imagenet", "untrained") and args.weights != metrics["weights"]:
        raise UserError(f"--weights {args.weights}: script {step} used {metrics['weights']}: omit --weights")
    predictions = load(args.output_dir / f"{step}_predictions.npy", again)
    all_proba = load(args.output_dir / f"{step}_all_proba.npy", again)
    all_classes = load(args.output_dir / f"{step}_all_classes.npy", again)
    return metrics, predictions, all_proba, all_classes


# ----------------------------------------------------------------------------------------------- weights and device
def get_weights(weights, sample=False):
    """Return "imagenet", "untrained" or the path of a file. For "imagenet", download the file if it is missing. If that
    fails, a run on the sample continues with "untrained"; any other run ends with a UserError."""
    if weights == "imagenet":
        try:
            if not os.path.exists(IMAGENET_FILE):
                download([os.environ.get("VGG16_URL") or IMAGENET.url], IMAGENET_FILE, IMAGENET_SIZE,
                         "sha256", "397923af")
            with on_error(IMAGENET_FILE, "cannot be read"), open(IMAGENET_FILE, "rb"):
                pass
        except UserError as error:
            if not sample:
                raise UserError(f"{error}, or use --weights FILE or --weights untrained") from error
            print(error)
            weights = "untrained"
    if weights == "untrained":
        print("*" * 80, "NOTICE: untrained weights. VGG16 is random: the scripts run, but their predictions are",
              "meaningless, and the numbers below do not show how good the lecture's network is.", "*" * 80, sep="\n")
    return weights


def get_device(name="auto", bf16=False):
    """Return the torch.device for cpu, cuda (an NVIDIA GPU), mps (the GPU of a Mac) or auto (a GPU if there is one).
    Raises UserError if it cannot be used, or if `bf16` is true and it does not support bfloat16."""
    def can_compute(name):  # a GPU that is too old for this version of torch is found, but cannot compute
        try:
            return (torch.ones(1, device=name) + 1).item() == 2
        except Exception:
            return False

    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        elif torch.backends.mps.is_available():
            name = "mps"
        else:
            name = "cpu"
        if not can_compute(name):
            print(f"NOTICE: a GPU ({name}) was found, but this version of PyTorch cannot use it: using the CPU")
            name = "cpu"
    if not can_compute(name):
        raise UserError(f"--device {name}: this version of PyTorch cannot use such a device here: use --device cpu")
    if bf16 and name == "mps":
        raise UserError("--bf16: not tested on mps: omit it, or add --device cpu")
    if bf16 and name == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError("--bf16: this GPU does not support bfloat16: omit it, or add --device cpu")
    # a private function, because the public get_cpu_capability() does not report this
    if bf16 and name == "cpu" and not getattr(torch.cpu, "_is_avx512_bf16_supported", bool)():
        print("NOTICE: --bf16: this CPU has no AVX-512 BF16. Unless it is an Arm CPU with bfloat16, expect the run to "
              "be several times slower than without --bf16")
    return torch.device(name)


def to_device(model, device, bf16=False):
    """Move VGG16 to the device. If `bf16`, all layers but the last compute in bfloat16 (16-bit numbers, faster on some
    processors); inputs and outputs stay float32."""
    if bf16:  # converted once: torch.autocast would convert the frozen weights again for every batch
        for part in (model.features, model.classifier[:6]):
            part.to(torch.bfloat16)
            part[0].register_forward_pre_hook(lambda layer, inputs: inputs[0].bfloat16())
            part[-1].register_forward_hook(lambda layer, inputs, outputs: outputs.float())
    # channels_last stores the channels of a pixel side by side, which is faster, but can give wrong results on MPS
    return model.to(device, memory_format=torch.contiguous_format if device.type == "mps" else torch.channels_last)


# --------------------------------------------------------------------------------------------------------- the data
def limit_images(dsets, n):
    """Keep n training and 200 validation images, the same number of each class, taken at even intervals from the list;
    all images if there are fewer."""
    for x, n_images in [("train", n), ("valid", 200)]:
        kept = []
        for label in range(len(CLASSES)):
            of_class = [sample for sample in dsets[x].samples if sample[1] == label]
            n_class = min((n_images + label) // len(CLASSES), len(of_class))  # if n is odd, one more dog
            kept += [of_class[i * len(of_class) // n_class] for i in range(n_class)]
        dsets[x].samples = dsets[x].imgs = kept  # ImageFolder has one list under both names
        dsets[x].targets = [label for _, label in kept]


def load_data(args, batch_size=64):
    """Do the steps of 01_data.py; return device, dsets, loader_train, loader_valid."""
    device = get_device(args.device, args.bf16)
    check_folders(args.data_dir, CLASSES)
    dsets = {x: datasets.ImageFolder(args.data_dir / x, imagenet_format, loader=load_image) for x in ["train", "valid"]}
    if args.limit:
        limit_images(dsets, args.limit)
    for x in dsets:
        dsets[x].sizes = file_sizes(dsets[x])  # for make_record; taken now, as the files may change during the run
    print(f"{len(dsets['train']):,} training images, {len(dsets['valid']):,} validation images; device: {device}")
    workers = args.num_workers
    if workers is None:  # a GPU would wait for images; on a CPU, loading takes only 1 or 2% of the time
        workers = 0 if device.type == "cpu" or args.sample else min(torch.get_num_threads(), 16)
    # pinned memory: can be copied to a CUDA GPU in the background
    options = {"num_workers": workers, "pin_memory": device.type == "cuda"}
    loader_train = torch.utils.data.DataLoader(dsets["train"], batch_size=batch_size, shuffle=True, **options)
    loader_valid = torch.utils.data.DataLoader(dsets["valid"], batch_size=5, shuffle=False, **options)
    return device, dsets, loader_train, loader_valid


# ------------------------------------------------------------------------------------------------------ the figures
def save_figure(path, show=False):
    """Save the current figure, open it in a window if `show`, and close it."""
    save(path.parent, {path.name: plt.gcf()})
    if show:
        plt.show()
    plt.close()


def short_name(path):
    """Return the file's name for a title: at most 30 characters, all of which can be drawn."""
    name = Path(path).name.encode(errors="backslashreplace").decode()
    return name if len(name) <= 30 else f"{name[:14]}...{name[-13:]}"


def four_of_each(dset):
    """Return the indices of the first four images of each class."""
    targets = np.array(dset.targets, dtype=np.int64)
    return np.concatenate([np.where(targets == label)[0][:4] for label in range(len(CLASSES))]).tolist()


def show_predictions(images, paths, classes, proba, heading):
    """Draw images (normalized tensors or PIL images) under a heading. Above each: its true class, the predicted class
    with its probability, and the file's name; in red if the prediction is wrong. proba: (B, C)."""
    rows = max((len(images) + 3) // 4, 1)
    plt.figure(figsize=(12, 3.6 * rows + 0.4), layout="constrained")
    plt.gcf().get_layout_engine().set(h_pad=0.1)  # inches: space between the heading and the first titles
    plt.suptitle(heading)
    for i, image in enumerate(images):
        true, pred = ANIMALS[int(classes[i])], ANIMALS[proba[i].argmax()]
        plt.subplot(rows, 4, i + 1, anchor="N")  # N (north): images of different heights are aligned at the top
        if isinstance(image, torch.Tensor):
            imshow(image)
        else:
            plt.imshow(image)
            plt.axis("off")
        plt.title(f"true: {true}\npredicted: {pred}, {proba[i].max():.3f}\n{short_name(paths[i])}", fontsize="medium",
                  color="black" if pred == true else "red", parse_math=False)
    if len(images) == 0:
        plt.axis("off")
        plt.text(0.5, 0.5, "none", ha="center", size="xx-large")


def show_photos(paths, answers, heading):
    """Print the answers, and draw them beside the photos. Each answer maps class names to probabilities."""
    print("\nBeyond the lecture: your own photos, resized and cropped as in torchvision's evaluation of VGG16")
    height = min(3 * len(paths), 600)  # inches; a PNG cannot be much higher
    figure, rows = plt.subplots(len(paths), 2, squeeze=False, figsize=(10, height), layout="constrained")
    figure.suptitle(heading)
    for path, answer, (left, right) in zip(paths, answers, rows, strict=True):
        print(f"  {path}:", *(f"{name} {p:.3f}" for name, p in answer.items()), sep="\n    ")
        photo = load_image(path, rotate=True)
        photo.thumbnail((600, 600))
        left.imshow(photo)
        left.axis("off")
        left.set_title(short_name(path), fontsize="medium", parse_math=False)
        bars = right.barh(list(answer), list(answer.values()))
        right.bar_label(bars, fmt="%.3f", padding=2)
        right.set(xlim=(0, 1.15), xlabel="probability")
        right.invert_yaxis()  # the first bar on top


def plot_training(metrics, title):
    """Plot the loss and the accuracy of the training for each epoch, and those of the validation images: the loss for
    each epoch if it is known (04), else only at the end (03). A dotted line shows what guessing would give."""
    if "train_loss" not in metrics:
        print("no curves: train_model returned no history")
        return
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 4.4), layout="constrained")
    figure.suptitle(title)
    epochs = range(1, len(metrics["train_loss"]) + 1)
    guessing = {"loss": np.log(len(CLASSES)), "accuracy": 1 / len(CLASSES)}
    for ax, name in zip(axes, ["loss", "accuracy"], strict=True):
        ax.plot(epochs, metrics[f"train_{name}"], "o-", markersize=4, label="training, during the epoch")
        if f"valid_{name}_per_epoch" in metrics:
            ax.plot(epochs, metrics[f"valid_{name}_per_epoch"], ".-", markersize=4, label="validation, after the epoch")
        else:
            ax.plot(len(epochs), metrics[f"valid_{name}"], "s", markersize=10, fillstyle="none",
                    label="validation, at the end")
        ax.axhline(guessing[name], color="grey", linestyle=":", label="guessing")
        ax.set(xlabel="epoch", ylabel=f"{name} (mean per image)" if name == "loss" else name)
        ax.xaxis.get_major_locator().set_params(integer=True)
    axes[1].set_ylim(0, 1.05)
    if max(metrics["train_loss"]) > 10 * np.median(metrics["train_loss"]):  # high losses would flatten all others
        axes[0].set_yscale("log")
    else:
        axes[0].set_ylim(0, 1.1 * axes[0].dataLim.ymax)  # with the line of guessing
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
