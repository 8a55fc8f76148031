"""Make .github/overview.png, the picture in the README, from figures that the scripts save.

  python tests/draw_overview.py        half a minute; needs no download

The scripts run on the 24 drawings, with an untrained VGG16: what it shows, everybody gets.
"""
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 1100  # pixels
RUNS = [["01_data.py"],
        ["04_precompute.py", "--weights", "untrained", "--layer", "fc7", "--lr", "0.1", "--epochs", "200"],
        ["05_analysis.py", "--n-view", "4"]]
ROWS = [["01_train_batch"], ["04_training", "05_confusion"], ["05_most_uncertain"]]


def paste_row(paths, width):
    """The pictures beside each other, at one height, `width` pixels wide in all."""
    pictures = [Image.open(path).convert("RGB") for path in paths]
    height = int(width / sum(picture.width / picture.height for picture in pictures))
    row, x = Image.new("RGB", (width, height), "white"), 0
    for picture in pictures:
        picture = picture.resize((picture.width * height // picture.height, height), Image.Resampling.LANCZOS)
        row.paste(picture, (x, 0))
        x += picture.width
    return row


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for script, *options in RUNS:
            subprocess.run([sys.executable, ROOT / script, "--sample", "--output-dir", folder, *options], check=True)
        rows = [paste_row([Path(folder, f"{name}.png") for name in names], WIDTH) for names in ROWS]
    overview, y = Image.new("RGB", (WIDTH, sum(row.height for row in rows)), "white"), 0
    for row in rows:
        overview.paste(row, (0, y))
        y += row.height
    target = ROOT / ".github" / "overview.png"
    target.parent.mkdir(exist_ok=True)
    overview.quantize(256).save(target, optimize=True)
    print(f"saved {target}: {overview.width} x {overview.height}, {target.stat().st_size // 1000} KB")
