"""Open and check images."""
import contextlib
import hashlib
import os
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

from PIL import Image, ImageOps
from torchvision.datasets.folder import IMG_EXTENSIONS, is_image_file

from support.errors import UserError, on_error
from support.progress import progress

warnings.simplefilter("error", Image.DecompressionBombWarning)  # above 89 million pixels: gigabytes of memory
warnings.filterwarnings("ignore", "Palette images with Transparency")  # harmless


def load_image(path, rotate=False):
    """Return the RGB PIL image in a file, rotated according to its EXIF data if `rotate`. Raises UserError."""
    advice = "replace it with a JPEG, or move it to another folder" if os.path.exists(path) else "check the name"
    with on_error(path, "cannot be read as an image", advice), Image.open(path) as image:
        if rotate:
            image = ImageOps.exif_transpose(image)
        if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
            raise ValueError("the range of 32-bit pixels is unknown")
        if image.mode.startswith("I"):  # 16 bits per pixel: convert("RGB") would turn all values above 255 white
            image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
        return image.convert("RGB")


def photo(text):
    """Return the path of a photo that can be read. A type for argparse. Raises UserError if it cannot."""
    if not os.path.isfile(text):
        raise UserError(f"--image: {text} is not a file on this computer: give the name of each photo")
    load_image(text, rotate=True)
    return text


def numbered_images(folder, prefix=""):
    """Return the images in a folder whose names are the prefix and a number, such as cat.9.jpg, in numeric order. If
    there are none, look in a folder of the same name inside it, as in test1/test1."""
    images = [path for path in folder.glob(f"{prefix}*") if is_image_file(path.name)]
    numbers = {path: path.stem.removeprefix(prefix) for path in images}
    found = sorted((path for path in images if numbers[path].isdecimal()), key=lambda path: int(numbers[path]))
    return found or (numbered_images(folder / folder.name, prefix) if (folder / folder.name).is_dir() else [])


def dataset_near(data_dir):
    """Return data_dir if it contains train and valid, else a folder one level away that does, else None."""
    inside = [place for place in data_dir.glob("*/") if place.name != "sample"]
    for place in [data_dir, data_dir.parent, data_dir.parent.parent, *inside]:
        if os.path.isdir(place / "train") and os.path.isdir(place / "valid"):  # False if lost+found is unreadable
            return place


def check_folders(data_dir, classes):
    """Raise UserError if ImageFolder would find no images of a class, or mistake something for a class or an image."""
    near = dataset_near(data_dir)
    if near != data_dir:
        advice = f"use --data-dir {near}" if near else "run python 01_data.py with the same --data-dir, or use --sample"
        raise UserError(f"--data-dir: {data_dir} does not contain train and valid: {advice}")
    for folder in [data_dir / "train", data_dir / "valid"]:
        files = {place.name: os.listdir(place) for place in folder.iterdir() if place.is_dir()}
        if sorted(files) != classes:
            raise UserError(f"{folder}: contains {sorted(files)} instead of {classes}: add what is missing and move "
                            "the others elsewhere, use a different --data-dir, or edit CLASSES in common.py (in "
                            "alphabetical order)")
        for name in classes:
            if not any(map(is_image_file, files[name])):
                endings = sorted({os.path.splitext(file)[1] or "none" for file in files[name]})[:5]
                raise UserError(f"{folder / name}: none of the {len(files[name])} files is an image (endings found: "
                                f"{endings}; used: {', '.join(IMG_EXTENSIONS)}): add images, or convert them to JPEG")
        for path in folder.glob("*/*"):
            if not path.is_file():  # ImageFolder enters folders, and would open a broken link during the training
                raise UserError(f"{path}: a folder or a broken link among the images: move it to another place")


def check_images(data_dir, remember):
    """Open every image once, and print those that cannot be read; raises UserError if there are any. If `remember`, a
    file in data_dir records that this was done; it is valid until the name or size of an image changes."""
    images = [path for pattern in ["train/*/*", "valid/*/*", "test1/*"] for path in sorted(data_dir.glob(pattern))
              if is_image_file(path.name)]
    files = [(path.relative_to(data_dir).as_posix(), path.stat().st_size) for path in images]
    digest = hashlib.sha256(str(files).encode()).hexdigest().encode()
    checked = data_dir / ".images-checked"
    with contextlib.suppress(OSError):  # missing, or another user's: check again
        if checked.read_bytes() == digest:
            return

    def problem(path):
        try:
            load_image(path)
        except UserError as error:
            if getattr(error.__cause__, "errno", None):
                raise  # the disk is the problem, not the image
            return str(error)

    print(f"checking that all {len(images):,} images can be read" + (" (only the first time)" if remember else ""))
    pool = ThreadPoolExecutor()
    results = map(problem, images)
    try:
        with contextlib.suppress(RuntimeError):  # this system may allow no more threads
            results = pool.map(problem, images)
        problems = [text for text in progress(results, len(images), len(images)) if text]
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C, do not open the other images
    if problems:
        print(*problems[:20], sep="\n", file=sys.stderr)
        raise UserError(f"{data_dir}: {len(problems):,} of {len(images):,} images cannot be read (at most 20 are "
                        "listed): replace or move them, then run python 01_data.py again (omit --from-kaggle)")
    if remember:
        with contextlib.suppress(OSError):  # a dataset on a read-only disk is checked every time
            checked.write_bytes(digest)
