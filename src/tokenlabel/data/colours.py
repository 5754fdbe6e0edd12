"""Changes of colour: each takes an RGB image and returns one of the same size with other pixels.

The pixels are those of Pillow's own enhancers, which timm and torchvision use, in a fraction of their time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps

ColourChange = Callable[[Image.Image], Image.Image]
"""Makes an RGB image of the same size with other colours."""

_VALUES = np.arange(256, dtype=np.uint8)


def posterized(bits: int) -> ColourChange:
    """Return a change that keeps the upper bits of each value; 0 bits leave black."""
    # Pillow's own refuses 0 bits, which timm's range includes.
    mask = 256 - (1 << (8 - max(bits, 0)))
    return _looked_up([value & mask for value in range(256)])


def solarized(threshold: int) -> ColourChange:
    """Return a change that inverts values of at least a threshold."""
    return lambda image: ImageOps.solarize(image, threshold)


def solarize_added(added: int) -> ColourChange:
    """Return a change that adds to values below 128."""
    return _looked_up([min(255, value + added) if value < 128 else value for value in range(256)])


def brightened(factor: float) -> ColourChange:
    """Return a change of brightness: 0 is black, 1 changes nothing."""
    return _looked_up(_blend(0, _VALUES, factor).tolist())


def contrasted(factor: float) -> ColourChange:
    """Return a change of contrast: 0 is the mean grey, 1 changes nothing."""

    def change(image: Image.Image) -> Image.Image:
        counts = np.array(image.convert("L").histogram())
        mean = int((counts * _VALUES).sum() / counts.sum() + 0.5)
        return _looked_up(_blend(mean, _VALUES, factor).tolist())(image)

    return change


def saturated(factor: float) -> ColourChange:
    """Return a change of saturation: 0 is grey, 1 changes nothing."""
    return lambda image: Image.blend(greyed(image), image, factor)


def sharpened(factor: float) -> ColourChange:
    """Return a change of sharpness: 0 is smooth, 1 changes nothing."""

    def change(image: Image.Image) -> Image.Image:
        pixels = np.asarray(image)
        return Image.fromarray(_blend(_smooth(pixels), pixels, factor))

    return change


def blurred(radius_px: float) -> ColourChange:
    """Return a Gaussian blur."""
    return lambda image: image.filter(ImageFilter.GaussianBlur(radius_px))


def turned_hue(turn: float) -> ColourChange:
    """Return a change that moves hues by a fraction of the colour circle."""

    def change(image: Image.Image) -> Image.Image:
        hue, saturation, value = image.convert("HSV").split()
        steps = round(turn * 255) % 256
        turned = hue.point([(h + steps) % 256 for h in range(256)])
        return Image.merge("HSV", (turned, saturation, value)).convert("RGB")

    return change


def greyed(image: Image.Image) -> Image.Image:
    """Return the image without its colours."""
    return image.convert("L").convert("RGB")


def _looked_up(table: Sequence[int]) -> ColourChange:
    """Return a change that looks each value up in a table."""
    return lambda image: image.point([*table] * 3)


def _blend(low: int | NDArray[np.uint8], high: NDArray[np.uint8], factor: float) -> NDArray[np.uint8]:
    """Return low + factor * (high - low), in float32 and rounded towards zero, as Pillow blends."""
    mixed = np.subtract(high, low, dtype=np.float32)
    mixed *= np.float32(factor)
    mixed += low
    return np.clip(mixed, 0, 255, out=mixed).astype(np.uint8)


def _smooth(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return pixels [height, width, 3] after Pillow's SMOOTH: 3 x 3, the centre weighs 5 of 13, edges stay."""
    wide = pixels.astype(np.uint16)
    rows = wide[:, :-2] + wide[:, 1:-1] + wide[:, 2:]
    sums = rows[:-2] + rows[1:-1] + rows[2:] + 4 * wide[1:-1, 1:-1]
    smooth = pixels.copy()
    smooth[1:-1, 1:-1] = (sums + 6) // 13
    return smooth
