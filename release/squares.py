"""Write a few hundred images of coloured squares into class folders: something to train on that needs no package.

Usage: python squares.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 70, 220)}


def write_squares(folder: Path, *, count: int, seed: int) -> None:
    """Write `count` images of 96 px of each class: a square of its colour somewhere on noise."""
    rng = np.random.default_rng(seed)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = rng.integers(0, 160, (96, 96, 3), dtype=np.uint8)
            top, left = rng.integers(0, 56, 2)
            pixels[top : top + 40, left : left + 40] = colour
            Image.fromarray(pixels).save(folder / name / f"{index:03}.png")


if __name__ == "__main__":
    write_squares(Path(sys.argv[1], "train"), count=20, seed=0)
    write_squares(Path(sys.argv[1], "val"), count=8, seed=1)
