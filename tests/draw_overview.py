"""Make .github/overview.png, the picture in the README, from figures that the scripts save.

  python tests/draw_overview.py        half a minute; needs no download

The scripts run on the 24 drawings, with an untrained VGG16: what it shows, everybody gets.
"""
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 1100  # pixels
RUNS = [["01_data.py"],
        ["04_precompute.py", "--weights", "untrained", "--layer", "fc7", "--lr", "0.1", "--epochs", "200"],
        ["05_analysis.py", "--n-view", "4"]]
ROWS = [["01_train_batch"], ["04_training", "05_confusion"], ["05_most_uncertain"]]

if __name__ == "__main__":
    target, rows = ROOT / ".github" / "overview.png", []
    with tempfile.TemporaryDirectory() as folder:
        for script, *options in RUNS:
            subprocess.run([sys.executable, ROOT / script, "--sample", "--output-dir", folder, *options], check=True)
        for names in ROWS:  # beside each other, at one height
            pictures = [Image.open(Path(folder, f"{name}.png")).convert("RGB") for name in names]
            height = int(WIDTH / sum(picture.width / picture.height for picture in pictures))
            row = np.hstack([picture.resize((picture.width * height // picture.height, height), Image.Resampling.LANCZOS)
                             for picture in pictures])
            rows.append(np.pad(row, ((0, 0), (0, WIDTH - row.shape[1]), (0, 0)), constant_values=255))
    Image.fromarray(np.vstack(rows)).quantize(256).save(target, optimize=True)
    print(f"saved {target}: {target.stat().st_size // 1000} KB")
