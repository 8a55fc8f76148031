"""Get the dataset: the archive that the lecture uses, or the files of Kaggle or Microsoft."""
import errno
import gzip
import os
import shutil
import tarfile
import zlib
from pathlib import PureWindowsPath

from support.download import download
from support.errors import UserError
from support.files import MIB, replace, temporary_folder
from support.images import dataset_near, numbered_images
from support.progress import progress

URLS = ["https://s3.amazonaws.com/fast-ai-sample/dogscats.tgz",
        "http://files.fast.ai/data/examples/dogscats.tgz"]  # the lecture's link, to the same file
SIZE = 839_285_364  # bytes of the archive
UNPACKED = 900_000_000  # about this many bytes on the disk
HASH = ["md5", "3e483c8d6ef2175e9d395a6027eb92b7", MIB]  # of the first MiB
N_FILES = 37_524  # train: 23,000, valid: 2,000, test1: 12,500, sample: 24


def unpack(archive, folder):
    """Unpack the archive to the folder. Raises UserError if it is damaged or has links or unsafe names."""
    try:  # the size and gzip's checksum show that no file is missing or damaged
        if archive.stat().st_size != SIZE:
            raise EOFError(f"{archive.stat().st_size:,} bytes instead of {SIZE:,}")
        with gzip.open(archive) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
            tar.extraction_filter = getattr(tarfile, "data_filter", None)  # Python's built-in safety filter, if any
            for member in progress(tar, N_FILES, N_FILES, "files"):
                path = PureWindowsPath(member.name)  # understands both "/" and "\"
                if not (member.isfile() or member.isdir()) or path.anchor or ".." in path.parts or ":" in member.name:
                    raise UserError(f"{archive}: {member.name!r} is not a file of the dataset: move the archive away")
                member.name = "/".join(path.parts[1:])  # without the leading dogscats/
                tar.extract(member, folder)
            while stream.read(MIB):  # to the end, where gzip verifies its checksum
                pass
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{archive}: incomplete or damaged ({error}): move it away and run this again") from error


def from_kaggle(source, folder):
    """Fill the folder with copies of Kaggle's train/cat.0.jpg ... and test1/1.jpg ..., or of Microsoft's
    PetImages/Cat/0.jpg ...; the last 8% of each class are for validation. Raises UserError if `source` has neither."""
    places = {"test1": numbered_images(source / "test1") or numbered_images(source / "test")}
    for name, kaggle, microsoft in [("cats", "cat", "Cat"), ("dogs", "dog", "Dog")]:
        images = (numbered_images(source / "train", f"{kaggle}.") or numbered_images(source / "PetImages" / microsoft)
                  or numbered_images(source / microsoft))
        if len(images) < 2:
            raise UserError(f"--from-kaggle: {source} must contain two or more images such as train/{kaggle}.0.jpg or "
                            f"PetImages/{microsoft}/0.jpg: give the folder that contains train or PetImages")
        n_valid = max(1, len(images) * 8 // 100)
        train, valid = images[:-n_valid], images[-n_valid:]
        places |= {f"train/{name}": train, f"valid/{name}": valid}
        places |= {f"sample/train/{name}": train[:8], f"sample/valid/{name}": valid[:4]}
    for name, images in places.items():
        (folder / name).mkdir(parents=True)
        for image in progress(images, len(images), len(images)):
            shutil.copyfile(image, folder / name / image.name)


def get_dataset(data_dir, kaggle):
    """Make sure that data_dir, or a folder near it, contains the dataset; never overwrite anything. A new dataset is
    made in a temporary folder beside data_dir, and moved when it is complete. Raises UserError if this fails."""
    near = dataset_near(data_dir)
    if near and not kaggle:
        return  # if it is near, but not data_dir, check_folders says so
    if near:
        raise UserError(f"--from-kaggle: {near} contains a dataset: omit --from-kaggle and use --data-dir {near}, or "
                        "use a different --data-dir")
    if os.path.ismount(data_dir) or (data_dir.exists() and any(data_dir.iterdir())):
        sources = [place for place in [data_dir, data_dir.parent]
                   if any(os.path.exists(place / x) for x in ["train/cat.0.jpg", "PetImages/Cat", "Cat"])]
        kaggle_option = f" --from-kaggle {sources[0]}" if sources else ""
        raise UserError(f"--data-dir: {data_dir} is not empty or cannot be replaced: use a new folder, such as "
                        f"--data-dir {[*sources, data_dir][0] / 'dogscats'}{kaggle_option}")
    archive = data_dir.with_name("dogscats.tgz")
    if not kaggle and not archive.exists():
        urls = [os.environ["DOGSCATS_URL"]] if os.environ.get("DOGSCATS_URL") else URLS
        download(urls, archive, SIZE, *HASH, room=UNPACKED)
    folder = temporary_folder(data_dir.parent) / "dogscats"
    try:
        if kaggle:
            from_kaggle(kaggle, folder)
        else:
            unpack(archive, folder)
        for companion in folder.glob("**/._*"):  # on some disks, macOS adds one to each file
            companion.unlink(missing_ok=True)
    except BaseException as error:
        shutil.rmtree(folder.parent, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{data_dir}: the disk is full: free about {UNPACKED:,} bytes, or use a different "
                            "--data-dir") from error
        raise
    try:
        if data_dir.exists():  # empty: fill it, as it may be the current folder
            for name in sorted(os.listdir(folder)):
                replace(folder / name, data_dir / name)
        else:
            replace(folder, data_dir)
    except OSError as error:
        if not (data_dir / "valid").is_dir():  # otherwise another run has created it already
            raise UserError(f"{folder} contains the complete dataset, but cannot be moved to {data_dir} "
                            f"({error.strerror}): close the programs that use it, and move it yourself") from error
    shutil.rmtree(folder.parent, ignore_errors=True)
    print(f"created {data_dir}" + ("" if kaggle else f"; {archive} is no longer needed and can be deleted"))
