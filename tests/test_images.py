"""support/images.py: opening images in every usual form, and checking photos, folders and datasets before any work."""
import os
import shutil

import numpy as np
import pytest
from conftest import PHOTO, message, raise_, run_here
from PIL import Image

from support.errors import UserError
from support.images import check_folders, check_images, load_image, photo

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
    text = message(script, "--data-dir", tmp_path / "none", "--image", PHOTO, tmp_path / name)
    assert text.startswith(f"error: {tmp_path / name}: cannot be read as an image (")
    assert text.endswith("): replace it with a JPEG, or move it to another folder")


@pytest.mark.parametrize("text, problem", [
    ("https://x.org/cat.jpg", "is a web address: save the photo with a browser, and give the file's name"),
    (".", "is a folder: give the names of photos in it"),
    ("no*.jpg", ": no files match, or this terminal does not expand *: give the names in full"),
    ("cat.jpg", " is missing: check the name")])
def test_what_is_no_photo_is_named(tmp_path, monkeypatch, text, problem):
    """Each has a different remedy."""
    monkeypatch.chdir(tmp_path)
    line = message(photo, text)
    assert line.startswith("error: ") and text in line and line.endswith(problem)


@pytest.mark.parametrize("change, place, problem", [
    (lambda train: (train / ".ipynb_checkpoints").mkdir(), "",
     "must contain images in the folders ['cats', 'dogs'], and no other folders, but contains {"),
    (lambda train: shutil.copytree(train / "cats", train / "birds"), "", "'birds': 3"),
    (lambda train: (train / "cats").rename(train / "x"), "", "or change CLASSES in common.py (in alphabetical order)"),
    (lambda train: [path.rename(path.with_suffix(".txt")) for path in train.glob("dogs/*")], "dogs",
     "none of the 3 files is an image (endings found: ['.txt']; used: .jpg, "),
    (lambda train: (train / "cats" / "@eaDir").mkdir(), "cats/@eaDir", "a folder or a broken link among the images"),
    (lambda train: (train / "cats" / "x.jpg").symlink_to("no"), "cats/x.jpg", "a folder or a broken link among the")],
    ids=["a hidden folder", "a third class", "a class renamed", "no images", "a folder in a class", "a broken link"])
@pytest.mark.parametrize("part", ["train", "valid"])
def test_a_dataset_with_unexpected_folders_is_refused(dataset, part, change, place, problem):
    """ImageFolder would shift the labels, train on thumbnails, or stop at a broken link in the middle."""
    for path in (dataset / "train").glob("*/*.2.jpg"):
        shutil.copy(path, dataset / "valid" / path.parent.name)  # three of each class in both parts
    (dataset / part / "notes.txt").touch()
    check_folders(dataset, ["cats", "dogs"])
    change(dataset / part)
    text = message(check_folders, dataset, ["cats", "dogs"])
    assert text.startswith(f"error: {dataset / part / place}: ") and problem in text


def test_a_missing_dataset_sends_the_student_to_the_first_script(tmp_path):
    """Who starts in the middle."""
    assert message(check_folders, tmp_path / "none", ["cats", "dogs"]) == (
        f"error: {tmp_path / 'none'}: train or valid is missing: run python 01_data.py first, with the same "
        "--data-dir, or use --sample")


@pytest.mark.parametrize("given", ["train", "train/cats", ".."])
def test_a_folder_near_the_dataset_is_corrected(dataset, given):
    """The usual mistakes: one folder too deep, or one too high."""
    folder = (dataset / given).resolve()
    assert message(check_folders, folder, ["cats", "dogs"]) == (
        f"error: --data-dir: {folder} does not contain train and valid: use --data-dir {dataset}")


PROBLEM = ": cannot be read as an image"


def test_images_that_cannot_be_read_are_listed_before_hours_are_spent(dataset, options, figures, capsys):
    """03 or 04 would stop there. At most 20 lines, which fit on a screen; unused files are counted."""
    bad = [dataset / "test1" / f"{i:02}.jpg" for i in range(22)]
    bad[0].parent.mkdir()
    bad[0].with_suffix(".heic").touch()
    for path in bad:
        path.write_bytes(PHOTO.read_bytes()[:5000])
    with pytest.raises(UserError) as found:
        run_here("01_data.py", *options)
    assert str(found.value) == (
        f"{dataset}: 22 of 32 images cannot be read (only the first 20 are listed): replace them or move "
        "them to another folder, then run python 01_data.py again (omit --from-kaggle)")
    out, err = capsys.readouterr()
    assert [line.partition(PROBLEM)[0] for line in err.splitlines()] == [str(path) for path in bad[:20]]
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


def test_a_disk_that_fails_is_not_32_bad_images(dataset, monkeypatch):
    """The student would delete good photos."""
    monkeypatch.setattr("support.images.Image.open", lambda path: raise_(OSError(5, "Input/output error")))
    assert "(Input/output error): check the disk or the network drive, and run this script again" in message(
        check_images, dataset, True)
    assert len(os.listdir(dataset / "train" / "cats")) == 3
