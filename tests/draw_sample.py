"""Draw the 24 drawings in sample/: cats and dogs, in the lecture's layout, our own work.

  python tests/draw_sample.py [FOLDER]    default: sample/ beside tests/

The same seed gives the same drawings. Cats: pricked ears, slit pupils, small nose, whiskers. Dogs: hanging ears, long
muzzle, large nose, tongue. Coat, background, size, place and tilt are drawn from the same lists for both, so that
none of them gives the class away.
"""
import random
import sys
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

COATS = [(222, 148, 70), (120, 84, 58), (62, 58, 60), (168, 164, 160), (232, 214, 182), (196, 120, 84), (98, 104, 116),
         (240, 236, 228), (146, 108, 70), (84, 66, 54), (208, 176, 128), (128, 128, 124)]
# (top colour, bottom colour, share of the height where the floor begins)
SCENES = [((150, 196, 232), (104, 152, 84), 0.6), ((226, 208, 184), (150, 104, 72), 0.75),
          ((70, 92, 120), (44, 56, 78), 0.8), ((236, 228, 214), (188, 176, 206), 0.65),
          ((128, 168, 128), (84, 116, 72), 0.5), ((210, 160, 150), (120, 80, 84), 0.7)]
SIZES = [(499, 375), (320, 240), (375, 499), (300, 200), (450, 338), (260, 350), (400, 300), (205, 300), (500, 333),
         (350, 263), (333, 480), (288, 216)]
UNIT = 400  # pixels of the square on which an animal is drawn


def shade(colour, factor):
    return tuple(min(255, int(value * factor)) for value in colour)


def ellipse(draw, x, y, rx, ry, fill):
    draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill=fill)


def draw_head(animal, coat, rng, head, marks_y):
    """An ellipse, head, with stripes, patches or a plain coat around the height marks_y, kept inside what is drawn."""
    ellipse(ImageDraw.Draw(animal), *head, coat)
    marks = Image.new("RGBA", animal.size)
    draw = ImageDraw.Draw(marks)
    dark, kind = shade(coat, 0.62), rng.choice(["plain", "stripes", "patch", "patch"])
    if kind == "stripes":
        for dx in (-34, -12, 12, 34):
            draw.line((200 + dx, marks_y - 95, 200 + dx * 0.8, marks_y - 42), fill=dark, width=9)
        for side, dy in product((-1, 1), (8, 30)):
            draw.line((200 + side * 112, marks_y + dy, 200 + side * 74, marks_y + dy - 6), fill=dark, width=8)
    elif kind == "patch":
        ellipse(draw, 200 + rng.choice([-1, 1]) * 52, marks_y - 28, 46, 52, rng.choice([dark, shade(coat, 1.5)]))
    marks.putalpha(ImageChops.multiply(marks.getchannel("A"), animal.getchannel("A")))
    animal.alpha_composite(marks)


def draw_eyes(draw, y, apart, radius, iris, slit):
    for x in (200 - apart, 200 + apart):
        ellipse(draw, x, y, radius * 1.15, radius, (250, 250, 245))
        ellipse(draw, x, y, radius * 0.95, radius * 0.95, iris)
        ellipse(draw, x, y, radius * (0.28 if slit else 0.6), radius * (0.9 if slit else 0.6), (15, 12, 12))
        ellipse(draw, x - radius * 0.3, y - radius * 0.35, radius * 0.2, radius * 0.2, (255, 255, 255))


def draw_cat(animal, draw, coat, rng):
    tip, out, pink = rng.randint(40, 62), rng.randint(96, 122), (224, 160, 158)
    for side in (-1, 1):  # pricked ears
        draw.polygon([(200 + side * 118, 190), (200 + side * out, tip), (200 + side * 28, 122)], fill=shade(coat, 0.88))
        draw.polygon([(200 + side * 103, 172), (200 + side * (out - 5), tip + 28), (200 + side * 48, 130)], fill=pink)
    draw_head(animal, coat, rng, (200, 205, rng.randint(118, 128), rng.randint(98, 106)), 205)
    size, colour = rng.randint(22, 26), rng.choice([(120, 180, 80), (214, 170, 50), (90, 150, 200)])
    draw_eyes(draw, 190, 52, size, colour, slit=True)
    for x in (177, 223):  # a short muzzle
        ellipse(draw, x, 250, 29, 23, shade(coat, 1.3))
    draw.polygon([(186, 227), (214, 227), (200, 243)], fill=(214, 120, 130))
    draw.line((200, 243, 200, 256), fill=(70, 45, 45), width=4)
    draw.arc((172, 244, 200, 268), 0, 150, fill=(70, 45, 45), width=4)
    draw.arc((200, 244, 228, 268), 30, 180, fill=(70, 45, 45), width=4)
    whisker = (250, 250, 250) if sum(coat) < 480 else (60, 55, 55)
    for side, dy in product((-1, 1), (-14, 2, 18)):
        end = (200 + side * rng.randint(140, 165), 246 + dy * 1.7)
        draw.line((200 + side * 40, 250 + dy * 0.4, *end), fill=whisker, width=3)


def draw_dog(animal, draw, coat, rng):
    draw_head(animal, coat, rng, (200, 185, rng.randint(98, 110), rng.randint(104, 114)), 175)
    ears, length = shade(coat, rng.choice([0.55, 0.7, 0.78])), rng.randint(82, 112)
    for side in (-1, 1):  # hanging ears
        ear = Image.new("RGBA", animal.size)
        ellipse(ImageDraw.Draw(ear), 200 + side * 112, 112 + length, 36, length, ears)
        animal.alpha_composite(ear.rotate(side * rng.randint(4, 14), center=(200 + side * 95, 110)))
    draw_eyes(draw, 165, 42, rng.randint(16, 20), rng.choice([(96, 60, 30), (60, 40, 30), (130, 90, 40)]), slit=False)
    if rng.random() < 0.7:
        draw.rounded_rectangle((182, 285, 218, rng.randint(330, 352)), 18, fill=(232, 110, 124))
    ellipse(draw, 200, 250, rng.randint(58, 66), rng.randint(56, 64), shade(coat, 1.28))  # a long muzzle
    ellipse(draw, 200, 222, 33, 24, (28, 24, 26))
    ellipse(draw, 190, 214, 9, 5, (120, 116, 118))
    draw.line((200, 244, 200, 276), fill=(45, 30, 30), width=5)
    draw.arc((152, 246, 200, 290), 10, 120, fill=(45, 30, 30), width=5)
    draw.arc((200, 246, 248, 290), 60, 170, fill=(45, 30, 30), width=5)


def draw_picture(draw_animal, size, coat, scene, rng):
    """An animal before a wall and a floor, or sky and grass, with some round things out of focus: an RGB PIL image."""
    (width, height), (top, bottom, horizon) = size, scene
    image = Image.new("RGB", size, shade(top, rng.uniform(0.85, 1.1)))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, int(height * horizon), width, height), fill=shade(bottom, rng.uniform(0.85, 1.1)))
    for _ in range(rng.randint(3, 7)):
        r = rng.randint(10, width // 5)
        x, y, flat = rng.randint(0, width), rng.randint(0, height), rng.uniform(0.5, 1)
        ellipse(draw, x, y, r, r * flat, shade(rng.choice([top, bottom]), rng.uniform(0.7, 1.3)))
    image = image.filter(ImageFilter.GaussianBlur(width / 60))

    animal = Image.new("RGBA", (UNIT, UNIT + 60))
    draw = ImageDraw.Draw(animal)
    ellipse(draw, 200, 405, rng.randint(95, 125), rng.randint(125, 145), shade(coat, 0.9))  # shoulders and chest
    if rng.random() < 0.5:
        ellipse(draw, 200, 400, 48, 90, shade(coat, 1.35))
    draw_animal(animal, draw, coat, rng)
    animal = animal.rotate(rng.uniform(-14, 14), resample=Image.Resampling.BICUBIC, center=(200, 300))
    side = int(min(size) * rng.uniform(0.85, 1.1))
    animal = animal.resize((side, side * (UNIT + 60) // UNIT), Image.Resampling.LANCZOS)
    x = int((width - side) * rng.uniform(0.3, 0.7)) if width > side else (width - side) // 2
    image.paste(animal, (x, height - animal.height + int(side * rng.uniform(0.08, 0.14))), animal)
    noise = np.random.default_rng(rng.randrange(2**32)).normal(0, 5, (height, width, 1))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


def main(folder):
    for draw_animal, name, seed in ((draw_cat, "cat", 1), (draw_dog, "dog", 2)):
        rng = random.Random(seed)
        coats, sizes, scenes = rng.sample(COATS, 12), rng.sample(SIZES, 12), rng.sample(SCENES * 2, 12)
        for i in range(12):
            place = folder / ("train" if i < 8 else "valid") / f"{name}s"
            place.mkdir(parents=True, exist_ok=True)
            draw_picture(draw_animal, sizes[i], coats[i], scenes[i], rng).save(place / f"{name}.{i}.jpg", quality=72)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent / "sample")
