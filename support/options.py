"""The options of the scripts."""
import argparse

from support.errors import UserError
from support.files import HERE, absolute_path


def number(least, most, kind=int):
    """Return a type for argparse: a number from least to most."""
    def parse(text):
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not between {least:,} and {most:,}")
        return value
    parse.__name__ = kind.__name__  # argparse prints it
    return parse


def weights_option(text):
    """Return "imagenet", "untrained" or the absolute path of a file. A type for argparse."""
    if text not in ("imagenet", "untrained") and not absolute_path(text).is_file():
        raise UserError(f"--weights: there is no file {absolute_path(text)}: check the name")
    return text if text in ("imagenet", "untrained") else str(absolute_path(text))


def option_parser(script, doc, network=True):
    """Return a parser with the options of every script; if `network`, also those of the scripts that run VGG16."""
    parser = argparse.ArgumentParser(script, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    common = parser.add_argument_group("common options")
    add, size = common.add_argument, common.add_mutually_exclusive_group().add_argument
    size("--sample", action="store_true", help="use 24 images: the dataset's sample folder, else the bundled drawings")
    size("--limit", type=number(2, 1_000_000), metavar="N", help="use N training and 200 validation images (all if "
         "there are fewer), the same number of each class")
    add("--data-dir", type=absolute_path, metavar="DIR", default=str(HERE / "data" / "dogscats"),
        help="folder that contains train/ and valid/ (default: data/dogscats)")
    add("--output-dir", type=absolute_path, metavar="DIR",
        help="folder for the results (default: outputs/full, outputs/sample or outputs/limit-N)")
    add("--seed", type=number(0, 2**63 - 1), default=0, metavar="N",
        help="random seed; does not affect --weights untrained (default: 0)")
    add("--num-workers", type=number(0, 256), metavar="N",
        help="processes that load images (default: 0 on a CPU, with --sample and in 01, else one per core, at most 16)")
    add("--show", action="store_true", help="also open each figure in a window; close the window to continue")
    add("--pause", action="store_true", help="wait for Enter at each heading that has a time in the video")
    if network:
        add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto",
            help="cuda: NVIDIA GPU, mps: GPU of a Mac, auto: a GPU if there is one (default: auto)")
        add("--weights", type=weights_option, default="imagenet", metavar="imagenet|untrained|FILE",
            help="ImageNet's (553 MB), random, or a .pth file (default: imagenet; in 05, those of the results)")
        add("--bf16", action="store_true", help="run the frozen layers in bfloat16: less precise, but faster on "
            "GPUs that support it and on CPUs with AVX-512 BF16 or AMX (slower on others)")
    return parser
