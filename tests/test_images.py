"""support/images.py: opening images in every usual form, and checking photos, folders and datasets before any work."""
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import PHOTO, make_dataset, message, raise_, run_here
from PIL import Image

from support.dataset import get_dataset
from support.errors import UserError
from support.images import check_folders, check_images, dataset_near, load_image, photo

GREY = np.tile(np.linspace(0, 255, 100).astype(np.uint8), (90, 1))
RGB = Image.fromarray(np.stack([GREY, GREY[:, ::-1], GREY // 2], axis=2))
L, DEEP = Image.fromarray(GREY), Image.fromarray(GREY.astype(np.uint16) * 257)
UPRIGHT = b"Exif\0\0MM\0*\0\0\0\x08\0\1\x01\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"  # a camera's note: rotate this


@pytest.mark.parametrize("name, image", [
    *[(f"color.{name}", RGB) for name in ["jpg", "JPG", "png", "bmp", "gif", "tif", "ppm", "mpo"]], ("l.jpg", L),
    ("cmyk.jpg", RGB.convert("CMYK")), ("rgba.png", RGB.convert("RGBA")), ("palette.png", RGB.quantize(256)),
    ("la.png", L.convert("LA")), ("deep.png", DEEP), ("deep.tif", DEEP)])
def test_images_in_every_usual_form_keep_their_colors_and_are_not_rotated(tmp_path, name, image):
    """Photos come from phones, scanners and screens; the lecture does not rotate those of the dataset."""
    image.save(tmp_path / name, **{} if name.endswith("tif") else {"exif": UPRIGHT})
    expected = RGB if image.mode in ("RGB", "CMYK", "RGBA", "P") else L.convert("RGB")
    loaded = load_image(tmp_path / name)
    assert loaded.mode == "RGB" and np.abs(np.subtract(loaded, expected, dtype=float)).mean() < 8


@pytest.mark.parametrize("name, content", [
    ("empty.jpg", b""), ("text.jpg", b"no image"), ("._cat.0.jpg", b"\0\5\x16\7\0"), ("exif.png", RGB),
    ("half.png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"), ("float.tif", L.convert("F")), ("int.tif", L.convert("I"))])
@pytest.mark.parametrize("script", ["02_vgg_imagenet.py", "05_analysis.py"])
def test_a_photo_that_is_not_usable_is_named_before_any_work(tmp_path, script, name, content):
    """Never a black image in its place, and never a page of traceback. The second of two photos is checked too."""
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        content.save(tmp_path / name, **{"exif": b"Exif\0\0nonsense"} if name == "exif.png" else {})
    text = message(run_here, script, "--data-dir", tmp_path / "none", "--image", PHOTO, tmp_path / name)
    assert text.startswith(f"error: {tmp_path / name}: cannot be read as an image (")
    assert text.endswith("): replace it with a JPEG, or move it to another folder")


@pytest.mark.parametrize("text", ["https://x.org/cat.jpg", ".", "no*.jpg", "cat.jpg"])
def test_what_is_no_photo_is_named(tmp_path, monkeypatch, text):
    """A web address, a folder, a name that this terminal does not expand, a typing error."""
    monkeypatch.chdir(tmp_path)
    assert message(photo, text) == (
        f"error: --image: {text} is not a file on this computer: give the name of each photo")


@pytest.mark.parametrize("change, place, problem", [
    (lambda train: (train / ".ipynb_checkpoints").mkdir(), "",
     "contains ['.ipynb_checkpoints', 'cats', 'dogs'] instead of ['cats', 'dogs']: add what is missing and "),
    (lambda train: (train / "cats").rename(train / "x"), "", "or edit CLASSES in common.py (in alphabetical order)"),
    (lambda train: [path.rename(path.with_suffix(".HEIC")) for path in sorted(train.glob("dogs/*"))], "dogs",
     "none of the 2 files is an image (endings found: ['.HEIC']; used: .jpg, "),
    (lambda train: [path.rename(path.with_name(path.stem[-1])) for path in sorted(train.glob("dogs/*"))], "dogs",
     "none of the 2 files is an image (endings found: ['none']; used: .jpg, "),
    (lambda train: (train / "cats" / "@eaDir").mkdir(), "cats/@eaDir", "a folder or a broken link among the images"),
    (lambda train: (train / "cats" / "x.jpg").symlink_to("no"), "cats/x.jpg", "a folder or a broken link among the")])
@pytest.mark.parametrize("part", ["train", "valid"])
def test_a_dataset_with_unexpected_folders_is_refused(tmp_path, part, change, place, problem):
    """ImageFolder would shift the labels, train on thumbnails, or stop at a broken link in the middle."""
    dataset = make_dataset(tmp_path, train=2, valid=2)
    (dataset / part / "notes.txt").touch()
    check_folders(dataset, ["cats", "dogs"])
    change(dataset / part)
    text = message(check_folders, dataset, ["cats", "dogs"])
    assert text.startswith(f"error: {dataset / part / place}: ") and problem in text


@pytest.mark.parametrize("given, says", [
    *[(given, "--data-dir: {folder} does not contain train and valid: use --data-dir {dataset}")
      for given in ["train", "train/cats", ".."]],
    ("../none/a/b", "--data-dir: {folder} does not contain train and valid: run python 01_data.py with the same "
     "--data-dir, or use --sample")])
def test_a_folder_without_a_dataset_is_corrected(dataset, given, says):
    """The usual mistakes: one folder too deep, one too high, or to begin with the second script."""
    folder = (dataset / given).resolve()
    assert message(check_folders, folder, ["cats", "dogs"]) == f"error: {says.format(folder=folder, dataset=dataset)}"


def test_an_unreadable_folder_is_no_dataset(tmp_path, monkeypatch):
    """A new volume has a lost+found that belongs to root."""
    (tmp_path / "lost+found").mkdir()
    is_dir = Path.is_dir
    monkeypatch.setattr(Path, "is_dir", lambda path, **options: (
        raise_(PermissionError(13, "denied")) if "lost+found/" in path.as_posix() else is_dir(path, **options)))
    assert dataset_near(tmp_path) is None


@pytest.mark.parametrize("given, image, source", [
    ("train", "train/cat.0.jpg", ""), ("", "PetImages/Cat/0.jpg", ""),
    ("PetImages/Cat", "PetImages/Cat/0.jpg", "PetImages")])
def test_a_folder_of_kaggles_or_microsofts_photos_is_told_how_to_use_them(tmp_path, given, image, source):
    """Nobody should rename Downloads, or download 839 MB of photos that are already there."""
    (tmp_path / image).parent.mkdir(parents=True)
    (tmp_path / image).touch()
    assert message(get_dataset, tmp_path / given, None).endswith(
        f": use a new folder, such as --data-dir {tmp_path / source / 'dogscats'} --from-kaggle {tmp_path / source}")


def test_companion_files_of_macos_are_not_images(dataset, tmp_path, monkeypatch):
    """On an exFAT disk, macOS adds ._cat.0.jpg to cat.0.jpg. It cannot be read, and is invisible in the Finder."""
    (dataset / "train" / "cats" / "._cat.0.jpg").touch()
    monkeypatch.setattr("support.dataset.from_kaggle", lambda source, folder: shutil.copytree(dataset, folder))
    get_dataset(tmp_path / "dogscats", tmp_path)
    assert sorted(os.listdir(tmp_path / "dogscats" / "train" / "cats")) == ["cat.0.jpg", "cat.1.jpg", "cat.2.jpg"]


def test_images_that_cannot_be_read_are_listed_before_hours_are_spent(dataset, options, figures, capsys):
    """03 or 04 would stop there. At most 20 lines, which fit on a screen; unused files are counted."""
    bad = [dataset / "test1" / f"{i:02}.jpg" for i in range(22)]
    bad[0].parent.mkdir()
    bad[0].with_suffix(".heic").touch()
    for path in bad:
        path.write_bytes(PHOTO.read_bytes()[:5000])
    with pytest.raises(UserError, match=r": 22 of 32 images cannot be read \(at most 20 are listed\): replace"):
        run_here("01_data.py", *options)
    out, err = capsys.readouterr()
    assert [line.partition(": cannot be read as an image")[0] for line in err.splitlines()] == [*map(str, bad[:20])]
    assert "  test1                    22 images\n    1 other files are not used: they do not end with .jpg " in out
    assert not (dataset / ".images-checked").exists()


def test_that_all_images_can_be_read_is_remembered_until_one_changes(dataset, capsys, watched):
    """The check of 37,500 images takes a minute. The bundled sample is small, and stays as it is."""
    image, calls = dataset / "valid" / "dogs" / "dog.0.jpg", watched("support.images")

    def checked(remember):
        check_images(dataset, remember)
        return "checking that all 10 images can be read" in capsys.readouterr().out

    assert checked(remember=False) and not (dataset / ".images-checked").exists()
    assert checked(remember=True) and not checked(remember=True)
    image.write_bytes(image.read_bytes() + b"1")
    assert checked(remember=True) and not checked(remember=True)
    image.rename(image.with_name("dog.9.jpg"))
    assert checked(remember=True)
    assert calls == [(10, 10, "images")] * 4


def test_images_on_a_read_only_disk_are_checked_every_time(dataset, capsys):
    """A class shares the teacher's dataset."""
    (dataset / ".images-checked").mkdir()  # can be neither read nor written
    check_images(dataset, remember=True)
    assert "checking that all 10 images can be read" in capsys.readouterr().out


def test_images_are_checked_without_threads_if_none_is_allowed(dataset, monkeypatch):
    """01 has no option for this: it must continue by itself."""
    monkeypatch.setattr("threading.Thread.start", lambda thread: raise_(RuntimeError("can't start new thread")))
    check_images(dataset, remember=True)
    assert (dataset / ".images-checked").exists()


def test_a_disk_that_fails_is_not_32_bad_images(dataset, monkeypatch):
    """The student would delete good photos."""
    monkeypatch.setattr("support.images.Image.open", lambda path: raise_(OSError(5, "Input/output error")))
    line = message(check_images, dataset, True)
    assert line.endswith("(Input/output error): check the disk or the network drive, and run this script again")
