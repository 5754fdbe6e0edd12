"""Changes of colour by Pillow's operations, as in timm and torchvision: each gives an RGB image of the same size."""

from __future__ import annotations

from collections.abc import Callable

from PIL import Image, ImageEnhance, ImageFilter, ImageOps

ColourChange = Callable[[Image.Image], Image.Image]
"""Makes an RGB image of the same size with other colours."""


def posterized(bits: int) -> ColourChange:
    """Return a change that keeps the upper bits of each value; 0 bits leave black, 8 and more change nothing."""
    # Pillow's own refuses 0 bits, which timm's range includes; its large magnitudes go beyond 8.
    mask = 256 - (1 << (8 - min(max(bits, 0), 8)))
    return lambda image: image.point([value & mask for value in range(256)] * 3)


def solarized(threshold: int) -> ColourChange:
    """Return a change that inverts values of at least a threshold."""
    return lambda image: ImageOps.solarize(image, threshold)


def solarize_added(added: int) -> ColourChange:
    """Return a change that adds to values below 128."""
    table = [min(255, value + added) if value < 128 else value for value in range(256)]
    return lambda image: image.point(table * 3)


def brightened(factor: float) -> ColourChange:
    """Return a change of brightness: 0 is black, 1 changes nothing."""
    return lambda image: ImageEnhance.Brightness(image).enhance(factor)


def contrasted(factor: float) -> ColourChange:
    """Return a change of contrast: 0 is the mean grey, 1 changes nothing."""
    return lambda image: ImageEnhance.Contrast(image).enhance(factor)


def saturated(factor: float) -> ColourChange:
    """Return a change of saturation: 0 is grey, 1 changes nothing."""
    return lambda image: ImageEnhance.Color(image).enhance(factor)


def sharpened(factor: float) -> ColourChange:
    """Return a change of sharpness: 0 is smooth, 1 changes nothing."""
    return lambda image: ImageEnhance.Sharpness(image).enhance(factor)


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
