"""Augmentation of images together with their masks, as published for ADE20K: resize, crop, flip, distort colours."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int16, UInt8
from numpy.typing import NDArray
from PIL import Image

from tokenlabel.core.geometry import Box, View
from tokenlabel.data.config import Interpolation
from tokenlabel.data.resampling import MEAN_COLOUR, resize
from tokenlabel.runtime.coercion import Size, pair
from tokenlabel.segmentation.classes import IGNORED
from tokenlabel.segmentation.recipe import SegmentAugmentConfig

Pixels = UInt8[NDArray[np.uint8], "height width 3"]
Mask = Int16[NDArray[np.int16], "height width"]  # class ids, -1 where none counts
# Of another size than what they were made from.
NewPixels = UInt8[NDArray[np.uint8], "new_height new_width 3"]
NewMask = Int16[NDArray[np.int16], "new_height new_width"]

NUM_CROP_TRIES = 10
# Photometric distortion, as published; each change happens to half of the images.
BRIGHTNESS = 32.0  # levels of 255, added
CONTRAST = SATURATION = (0.5, 1.5)  # factors
HUE = 18 / 180  # of the colour circle


class SegmentTransform:
    """The random transform of training images and masks, to `img_size` (height, width)."""

    def __init__(self, config: SegmentAugmentConfig, img_size: Size) -> None:
        self.config, self.img_size = config, pair(img_size)

    def __call__(self, pixels: Pixels, mask: Mask | None, rng: np.random.Generator) -> tuple[NewPixels, NewMask, View]:
        """Return pixels and class ids of one size, and the view of the image that they show.

        What lies outside of the image has the mean colour and no class. Without a mask no pixel has a class, and the
        first crop is taken: nothing says how much of it one class covers.
        """
        config = self.config
        factor = rng.uniform(*config.scale)
        size_px = fitted_size(pixels.shape[:2], config.short_side_px, max_aspect=config.max_aspect, factor=factor)
        max_ratio = 1.0 if mask is None else config.category_max_ratio
        mask = np.full(size_px, IGNORED, np.int16) if mask is None else resize_mask(mask, size_px)
        top, left = draw_crop(mask, self.img_size, max_ratio=max_ratio, rng=rng)
        pixels = resize(pixels, size_px, Interpolation.BILINEAR)
        window = (slice(top, top + self.img_size[0]), slice(left, left + self.img_size[1]))
        pixels, mask = pixels[window], mask[window]
        is_flipped = rng.random() < config.horizontal_flip
        if is_flipped:
            pixels, mask = pixels[:, ::-1], mask[:, ::-1]
        view = _view(size_px, (top, left), mask.shape, is_flipped=is_flipped, padded_px=self.img_size)
        if config.photometric:
            pixels = distorted(pixels, rng)
        return *padded(pixels, mask, self.img_size), view


def _view(
    size_px: tuple[int, int],
    corner: tuple[int, int],
    window_px: tuple[int, ...],
    *,
    is_flipped: bool,
    padded_px: tuple[int, int],
) -> View:
    """Return the view of a window of an image, mirrored or not, that was filled up at the right and at the bottom.

    All are (rows, columns): the image's size, the window's top left corner and size, and the size in the end.
    """
    (top, left), (height, width) = corner, window_px
    box = Box.from_pixels(left_px=left, top_px=top, width_px=width, height_px=height, img_size=size_px)
    view = View.crop(box)
    if is_flipped:
        view = view.then(View.flip_horizontal())
    return view.then(View.crop(Box(right=padded_px[1] / width, bottom=padded_px[0] / height)))


def fitted_size(
    size_px: tuple[int, ...], short_side_px: int | None, *, max_aspect: float, factor: float = 1.0
) -> tuple[int, int]:
    """Return the size (height, width) that an image is resized to, its aspect kept.

    Its shorter side becomes `short_side_px` (its own for None), or its longer one `max_aspect` times that where this
    makes it smaller; then `factor` times either.
    """
    height, width = size_px
    if short_side_px is not None:
        factor *= min(short_side_px / min(height, width), max_aspect * short_side_px / max(height, width))
    return max(1, round(height * factor)), max(1, round(width * factor))


def resize_mask(mask: Mask, size_px: tuple[int, int]) -> NewMask:
    """Return a mask of another size (height, width): each pixel takes the class at its centre."""
    rows, columns = (
        ((np.arange(new) + 0.5) * (old / new)).astype(np.int64) for new, old in zip(size_px, mask.shape, strict=True)
    )
    return mask[rows[:, None], columns]


def draw_crop(mask: Mask, size_px: tuple[int, int], *, max_ratio: float, rng: np.random.Generator) -> tuple[int, int]:
    """Return top and left of a random crop of (height, width), whole if the image is large enough.

    Crops that show one class alone, or one on more than `max_ratio` of the pixels that count, are drawn again, up
    to ten times.
    """
    height, width = size_px
    top = left = 0
    for _ in range(NUM_CROP_TRIES):
        top, left = (int(rng.integers(max(0, have - want) + 1)) for have, want in zip(mask.shape, size_px, strict=True))
        if max_ratio >= 1:
            break
        window = mask[top : top + height, left : left + width]
        # The published rule, which keeps large areas (sky, road) from filling most crops.
        counts = np.bincount((window - IGNORED).ravel())[1:]  # of the classes: bincount takes no -1
        if np.count_nonzero(counts) > 1 and counts.max() < max_ratio * counts.sum():
            break
    return top, left


def padded(pixels: Pixels, mask: Mask, size_px: tuple[int, int]) -> tuple[NewPixels, NewMask]:
    """Return image and mask of (height, width), filled up at the right and at the bottom where they are smaller."""
    height, width = mask.shape
    full_pixels = np.full((*size_px, 3), MEAN_COLOUR, np.uint8)
    full_mask = np.full(size_px, IGNORED, np.int16)
    full_pixels[:height, :width], full_mask[:height, :width] = pixels, mask
    return full_pixels, full_mask


def distorted(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    """Return pixels with another brightness, contrast, saturation and hue, each changed with probability 1/2.

    Contrast multiplies all levels, before or after the other two. Source: Howard, "Some Improvements on Deep
    Convolutional Neural Network Based Image Classification", 2013, in the form of SSD and its successors.
    """
    happens = rng.random(5) < 0.5
    brightness, contrast = rng.uniform(-BRIGHTNESS, BRIGHTNESS), rng.uniform(*CONTRAST)
    saturation, hue = rng.uniform(*SATURATION), rng.uniform(-HUE, HUE)
    contrast_first = bool(happens[4])
    levels = pixels
    if happens[0]:
        levels = _clipped(levels + np.float32(brightness))
    if happens[1] and contrast_first:
        levels = _clipped(levels * np.float32(contrast))
    if happens[2] or happens[3]:
        levels = _recoloured(levels, saturation if happens[2] else 1.0, hue if happens[3] else 0.0)
    if happens[1] and not contrast_first:
        levels = _clipped(levels * np.float32(contrast))
    return levels


def _recoloured(pixels: Pixels, saturation: float, hue: float) -> Pixels:
    hsv = np.array(Image.fromarray(np.ascontiguousarray(pixels)).convert("HSV"))
    hsv[..., 0] += np.uint8(round(hue * 256) % 256)  # hues wrap around
    hsv[..., 1] = _clipped(hsv[..., 1] * np.float32(saturation))
    return np.array(Image.fromarray(hsv, "HSV").convert("RGB"))


def _clipped(levels: NDArray[np.floating]) -> NDArray[np.uint8]:
    return levels.clip(0, 255).astype(np.uint8)
