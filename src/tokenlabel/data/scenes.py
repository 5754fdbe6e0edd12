"""The embedded data set: cluttered scenes of real handwritten digits, with true dense labels.

The handwriting is scikit-learn's bundled "Optical Recognition of Handwritten Digits" (UCI, 1998: 1,797 digits
of 8 x 8 pixels). A scene shows several digits on a textured background and is called after the largest. It is
written as an ordinary image folder, so that everything after it is an ordinary command on ordinary data.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tokenlabel.runtime.errors import DataError, import_extra
from tokenlabel.runtime.process import naming

SIZE_PX = 48
NUM_CLASSES = 10
BACKGROUND = 255  # the id of a mask's pixels that show no digit
DESCRIPTION_NAME = "scenes.json"

# The same parameters make the same pixels; raise this when that changes.
_SCENES_FORMAT = 1
_VAL_SHARE = 0.3  # of the 1,797 handwritten digits
_NUM_DIGITS = (4, 6)
_LARGEST_PX = (21, 29)  # height of the largest digit
_SMALLEST_PX = 10
_MARGIN = 1.25  # the largest digit is at least this many times as high as any other


def write_scenes(root: str | Path, *, num_train: int, num_val: int, seed: int) -> None:
    """Write scenes under the folder `root`, and their true masks beside them.

    Images are `train/CLASS/NAME.png` and `val/CLASS/NAME.png` (48 x 48 RGB), masks
    `masks/train/CLASS/NAME.png` and so on (class ids, 255 for background). Classes are balanced; no digit of
    a val scene occurs in a train scene. The folder appears at once and whole; if it already holds these very
    scenes, nothing happens. Raises DataError if it holds anything else or scikit-learn is not installed.
    """
    root = Path(root)
    description = {"format": _SCENES_FORMAT, "num_train": num_train, "num_val": num_val, "seed": seed}
    if _holds(root, description):
        return
    train_digits, val_digits = _load_digits(seed)
    root.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        with naming(root):
            _write_split(unfinished, "train", train_digits, num_scenes=num_train, seed=(seed, 0))
            _write_split(unfinished, "val", val_digits, num_scenes=num_val, seed=(seed, 1))
            (unfinished / DESCRIPTION_NAME).write_text(json.dumps(description, indent=2) + "\n")
        unfinished.chmod(0o755)  # mkdtemp makes folders that only their owner can read
        unfinished.rename(root)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def draw_scene(
    digits: Sequence[Sequence[Image.Image]], class_id: int, rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return the pixels [48, 48, 3] and the true mask [48, 48] of a scene; its largest digit is a `class_id`.

    `digits` lists for each class images of single digits, ink on 0 (mode L), cut to the ink.
    """
    while True:
        pixels = _texture(rng)
        mask = np.full((SIZE_PX, SIZE_PX), BACKGROUND, np.uint8)
        largest_px = int(rng.integers(_LARGEST_PX[0], _LARGEST_PX[1] + 1))
        num_digits = int(rng.integers(_NUM_DIGITS[0], _NUM_DIGITS[1] + 1))
        placed = _place(pixels, mask, digits[class_id], class_id=class_id, height_px=largest_px, rng=rng)
        for _ in range(num_digits - 1):
            other = int(rng.integers(NUM_CLASSES))
            height_px = int(rng.integers(_SMALLEST_PX, int(largest_px / _MARGIN) + 1))
            placed += _place(pixels, mask, digits[other], class_id=other, height_px=height_px, rng=rng)
        if placed == num_digits:
            return pixels.round().clip(0, 255).astype(np.uint8), mask


def _place(
    pixels: NDArray[np.float32],
    mask: NDArray[np.uint8],
    images: Sequence[Image.Image],
    *,
    class_id: int,
    height_px: int,
    rng: np.random.Generator,
) -> bool:
    """Draw one of the digits on free space, in place; return False if there is none."""
    image = images[int(rng.integers(len(images)))]
    width_px = max(3, round(image.width * height_px / image.height))
    ink = np.asarray(image.resize((width_px, height_px), Image.Resampling.BICUBIC), np.float32) / 255
    for _ in range(30):
        top = int(rng.integers(SIZE_PX - height_px + 1))
        left = int(rng.integers(SIZE_PX - width_px + 1))
        place = (slice(top, top + height_px), slice(left, left + width_px))
        if (mask[place] == BACKGROUND).all():
            opacity = ink[..., None] * rng.uniform(0.7, 1)
            colour = rng.uniform(130, 256, 3).astype(np.float32)
            pixels[place] += opacity * (colour - pixels[place])
            mask[place][ink > 0.4] = class_id
            return True
    return False


def _texture(rng: np.random.Generator) -> NDArray[np.float32]:
    """Return a background [48, 48, 3]: blurred patches of a few sizes about one colour, and grain."""
    pixels = np.zeros((SIZE_PX, SIZE_PX, 3), np.float32)
    for patches in (3, 8, 16):
        coarse = Image.fromarray(rng.integers(0, 256, (patches, patches, 3), dtype=np.uint8))
        fine = coarse.resize((SIZE_PX, SIZE_PX), Image.Resampling.BICUBIC)
        pixels += (np.asarray(fine, np.float32) - 128) * rng.uniform(0.05, 0.2)
    grain = rng.normal(0, rng.uniform(2, 9), (SIZE_PX, SIZE_PX, 1))
    return pixels + rng.uniform(20, 110, 3).astype(np.float32) + grain.astype(np.float32)


def _write_split(
    root: Path, split: str, digits: Sequence[Sequence[Image.Image]], *, num_scenes: int, seed: tuple[int, int]
) -> None:
    folders = [(root / split / str(c), root / "masks" / split / str(c)) for c in range(NUM_CLASSES)]
    for folder in (folder for pair in folders for folder in pair):
        folder.mkdir(parents=True)
    for number in range(num_scenes):
        class_id = number % NUM_CLASSES
        rng = np.random.default_rng((*seed, number))
        for folder, array in zip(folders[class_id], draw_scene(digits, class_id, rng), strict=True):
            Image.fromarray(array).save(folder / f"{number:05d}.png", compress_level=1)


def _load_digits(seed: int) -> tuple[list[list[Image.Image]], list[list[Image.Image]]]:
    """Return the handwritten digits for train scenes and those for val scenes, by class, cut to the ink."""
    datasets = import_extra("sklearn.datasets", "demo", "scikit-learn, which the embedded data needs,")
    images, class_ids = datasets.load_digits(return_X_y=True)
    train, val = [], []
    for class_id in range(NUM_CLASSES):
        ink = (images[class_ids == class_id].reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
        order = np.random.default_rng((seed, class_id)).permutation(len(ink))
        cut = [_cut_to_ink(ink[i]) for i in order]
        num_val = round(len(cut) * _VAL_SHARE)
        val.append(cut[:num_val])
        train.append(cut[num_val:])
    return train, val


def _cut_to_ink(ink: NDArray[np.uint8]) -> Image.Image:
    image = Image.fromarray(ink)
    return image.crop(Image.fromarray((ink > 48).astype(np.uint8)).getbbox())


def _holds(root: Path, description: dict[str, int]) -> bool:
    """Return True if the folder already holds the described scenes. Raises DataError if it holds anything else."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    remedy = "name another folder or delete this one"
    try:
        found = json.loads((root / DESCRIPTION_NAME).read_text())
    except (OSError, ValueError):
        found = None
    if found == description:
        return True
    other = f"holds scenes made with {found}, asked for {description}"
    raise DataError(f"{root}: {other if found else 'expected a new folder or one with scenes in it'}; {remedy}")
