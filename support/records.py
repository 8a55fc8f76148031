"""What a result was made from. Later scripts compare records: if something differs, they do not use the result."""
import hashlib
import os
import random
import re
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d

from support.errors import UserError


def behavior(thing, outputs):
    """Return how something is printed, without addresses in memory, and 24 averages of its outputs for a fixed input.
    Both are needed: a Lambda, for example, is printed the same whatever it computes."""
    outputs = torch.as_tensor(np.asarray(outputs)).float()
    averages = adaptive_avg_pool2d(outputs.reshape(1, -1, outputs.shape[-1]), (6, 4)).flatten()
    return {"printed": re.sub(r" at 0x\w+", "", str(thing)),
            "outputs": " ".join(f"{average:.4g}" for average in averages)}


def file_sizes(dset):
    """Return the size in bytes of each image of an ImageFolder, {path: size}. Raises UserError if some are empty."""
    sizes = {path: os.stat(path).st_size for path, _ in dset.samples}
    empty = [Path(path).relative_to(dset.root).as_posix() for path in sizes if sizes[path] == 0]
    if empty:
        raise UserError(f"{dset.root}: {len(empty)} empty files (at most 20 are listed): {', '.join(empty[:20])}: "
                        "replace or remove them")
    return sizes


def transformed(dset):
    """Return what the loader and the transform of an ImageFolder make of a fixed image. A random transform makes the
    same of it in each run, and the run's own random numbers do not change."""
    image = str(Path(__file__).with_name("fixed_image.png"))  # blocks of random colors, with sharp edges
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(0)
        np.random.seed(0)
        torch.default_generator.manual_seed(0)  # torch.manual_seed would also change the random numbers of a GPU
        outputs = dset.transform(dset.loader(image))
    random.setstate(states[0])
    np.random.set_state(states[1])
    return behavior(dset.transform, outputs)


@torch.inference_mode()
def make_record(dsets, network=None, last_layer=nn.Identity()):
    """Return what a result is made from: the SHA-256 of the names (with "/") and sizes (as in load_data) of the images,
    the transforms and, with a network, what it is and computes, its precision, and the SHA-256 of its parameters, but
    for those of last_layer, which is trained. Switches the network to evaluation mode."""
    record = {}
    for x, dset in dsets.items():
        files = [(Path(os.path.relpath(path, dset.root)).as_posix(), dset.sizes.get(path)) for path, _ in dset.samples]
        name = {"train": "training", "valid": "validation"}[x]
        record |= {f"{name} images": hashlib.sha256(str(files).encode()).hexdigest(),
                   f"{name} transform": transformed(dset)}
    if network is None:
        return record
    trained = {*last_layer.parameters(), *last_layer.buffers()}
    digest = hashlib.sha256()
    for value in [*network.parameters(), *network.buffers()]:
        if value not in trained:
            digest.update(value.cpu().flatten().view(torch.uint8).numpy())
    weight = next(network.parameters())
    inputs = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    reached = []  # the inputs of the last layer, or the outputs of a network without one
    with last_layer.register_forward_pre_hook(lambda layer, inputs: reached.extend(inputs)):
        reached.append(network.eval()(inputs.to(weight.device)))
    return {**record, "network": behavior(network, reached[0].float().cpu()), "frozen layers": digest.hexdigest(),
            "precision": str(weight.dtype).removeprefix("torch.")}


def equal(old, new):
    """Return whether two entries of records are the same. Averages may differ a little, as machines round differently:
    by up to 0.0001 of the largest with a GPU's TF32, and 0.001 with bfloat16."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return old == new
    averages, expected = np.array(old["outputs"].split(), float), np.array(new["outputs"].split(), float)
    return old["printed"] == new["printed"] and np.allclose(
        averages, expected, rtol=0, atol=0.003 * np.nanmax(np.abs(expected)), equal_nan=True)


def differences(record, now):
    """Return what differs between a record and the current one, such as "different training images", or ""."""
    changed = [name for name in now if not equal(record.get(name), now[name])]
    return " and ".join(f"different {name}" if name.endswith("s") else f"a different {name}" for name in changed)
