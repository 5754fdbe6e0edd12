"""Augmentation: pixels, and the view that says exactly where they came from.

A transform takes an RGB image (Pillow's, or its pixels) and a source of randomness; it returns pixels
[height, width, 3] uint8 and their `View`. Pixels are cropped and resized once (antialiased), warped once, by all warps
together, and then change colour; with `order: before_crop` the crop comes last. What a warp moves in from outside of
the image gets `MEAN_COLOUR`, and the view does not cover it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tokenlabel.core.geometry import Box, View
from tokenlabel.data.colours import (
    ColourChange,
    blurred,
    brightened,
    contrasted,
    greyed,
    saturated,
    solarized,
    turned_hue,
)
from tokenlabel.data.config import AugmentConfig, ColourJitter, Interpolation, Order, WarpConfig
from tokenlabel.data.randaugment import parse_randaugment
from tokenlabel.data.resampling import RESAMPLING, flipped, resize, warp
from tokenlabel.runtime.coercion import PART, Size, check_number, coerced, pair


class TrainTransform:
    """The random transform of training images, to pixels of `img_size` (height, width).

    >>> transform = tl.TrainTransform(tl.AugmentConfig(horizontal_flip=0), (32, 48))
    >>> tl.TokenLabelDataset(tl.open_images("images"), transform)[0].image.shape
    torch.Size([3, 32, 48])
    """

    def __init__(self, config: AugmentConfig, img_size: Size) -> None:
        config = coerced(config, AugmentConfig, name="config")
        self.config, self.img_size = config, pair(img_size)
        self._randaugment = None if config.randaugment is None else parse_randaugment(config.randaugment)

    def __call__(
        self, image: Image.Image | NDArray[np.uint8], rng: np.random.Generator
    ) -> tuple[NDArray[np.uint8], View]:
        """Return pixels [height, width, 3] and the view that they show."""
        config, pixels = self.config, _pixels(image)
        interpolation = config.interpolation
        if interpolation is Interpolation.RANDOM:
            interpolation = Interpolation.BICUBIC if rng.random() < 0.5 else Interpolation.BILINEAR
        if config.order is Order.BEFORE_CROP:
            pixels, change = self._warp_and_recolour(pixels, interpolation, rng)
            pixels, crop = self._crop_and_flip(pixels, interpolation, rng)
            view = crop if change is None else change.then(crop)
        else:
            pixels, crop = self._crop_and_flip(pixels, interpolation, rng)
            pixels, change = self._warp_and_recolour(pixels, interpolation, rng)
            view = crop if change is None else crop.then(change)
        colours = [_draw_three_augment(rng)] if config.three_augment else []
        if rng.random() < config.jitter.probability:
            colours += _draw_jitter(config.jitter, rng)
        return recoloured(pixels, colours) if colours else pixels, view

    def _crop_and_flip(
        self, pixels: NDArray[np.uint8], interpolation: Interpolation, rng: np.random.Generator
    ) -> tuple[NDArray[np.uint8], View]:
        config, (height_px, width_px) = self.config, pixels.shape[:2]
        left, top, width, height = draw_crop(
            (width_px, height_px), scale=config.crop_scale, ratio=config.crop_ratio, rng=rng
        )
        right, bottom = left + width, top + height
        view = View.crop(Box(left / width_px, top / height_px, right / width_px, bottom / height_px))
        resized = resize(pixels[top:bottom, left:right], self.img_size, interpolation)
        if rng.random() < config.horizontal_flip:
            resized, view = flipped(resized, axis=1), view.then(View.flip_horizontal())
        if rng.random() < config.vertical_flip:
            resized, view = flipped(resized, axis=0), view.then(View.flip_vertical())
        return resized, view

    def _warp_and_recolour(
        self, pixels: NDArray[np.uint8], interpolation: Interpolation, rng: np.random.Generator
    ) -> tuple[NDArray[np.uint8], View | None]:
        """Apply the random warp and RandAugment: all warps at once (None for none), then the changes of colour."""
        img_size = (pixels.shape[0], pixels.shape[1])
        warps, colours = list[View](), list[ColourChange]()
        if rng.random() < self.config.warp.probability:
            warps += _draw_warps(self.config.warp, rng, img_size=img_size)
        if self._randaugment is not None:
            changes = self._randaugment.draw(rng, img_size=img_size)
            warps, colours = warps + changes.warps, changes.colours
        view = one_view(warps) if warps else None
        if view is not None:
            pixels = warp(pixels, view, interpolation)
        return recoloured(pixels, colours) if colours else pixels, view


class EvalTransform:
    """The transform of evaluation to pixels of `img_size` (height, width): resized, the centre cut out.

    The crop keeps `crop_fraction` of the resized image's shorter side, as timm does it.

    >>> transform = tl.EvalTransform(32, crop_fraction=0.9)
    >>> dataset = tl.TokenLabelDataset(tl.open_images("images"), transform)
    >>> dataset[0].image.shape
    torch.Size([3, 32, 32])
    """

    def __init__(
        self,
        img_size: Size,
        *,
        crop_fraction: float = 0.875,
        interpolation: Interpolation | str = Interpolation.BICUBIC,
    ) -> None:
        interpolation = Interpolation(interpolation)
        check_number(crop_fraction, PART, name="crop_fraction")
        if interpolation is Interpolation.RANDOM:
            raise ValueError("evaluation needs one interpolation: bilinear or bicubic, not random")
        self.img_size, self.crop_fraction, self.interpolation = pair(img_size), crop_fraction, interpolation

    def __call__(
        self, image: Image.Image | NDArray[np.uint8], rng: np.random.Generator | None = None
    ) -> tuple[NDArray[np.uint8], View]:
        """Return pixels [height, width, 3] and the view that they show; nothing is drawn."""
        pixels, (height, width) = _pixels(image), self.img_size
        resized_width, resized_height = self._resized_px(pixels.shape[1], pixels.shape[0])
        # By Pillow, to the last level: figures agree with those that timm finds.
        resized = np.array(
            Image.fromarray(pixels).resize((resized_width, resized_height), RESAMPLING[self.interpolation])
        )
        left, top = round((resized_width - width) / 2), round((resized_height - height) / 2)
        box = Box.from_pixels(
            left_px=left, top_px=top, width_px=width, height_px=height, img_size=(resized_height, resized_width)
        )
        return np.ascontiguousarray(resized[top : top + height, left : left + width]), View.crop(box)

    def _resized_px(self, width_px: int, height_px: int) -> tuple[int, int]:
        """Return the size (width, height) that an image is resized to before the crop, its aspect kept."""
        least_height, least_width = (math.floor(side / self.crop_fraction) for side in self.img_size)
        if width_px * least_height <= height_px * least_width:
            return least_width, int(least_width * height_px / width_px)
        return int(least_height * width_px / height_px), least_height


def draw_crop(
    image_size_px: tuple[int, int], *, scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Return left, top, width and height of a random crop of an image of (width, height), all in whole
    pixels.

    The area is drawn evenly from the `scale` range of the image's, the logarithm of width / height from that
    of the `ratio` range. After ten draws that don't fit, the crop is the largest in the centre whose ratio
    lies in the range. Source: Szegedy et al., 2015, as in torchvision and timm.
    """
    image_width, image_height = image_size_px
    for _ in range(10):
        area = rng.uniform(*scale) * image_width * image_height
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < width <= image_width and 0 < height <= image_height:
            left, top = rng.integers(image_width - width + 1), rng.integers(image_height - height + 1)
            return int(left), int(top), width, height
    width = min(image_width, max(1, round(image_height * ratio[1])))
    height = min(image_height, max(1, round(image_width / ratio[0])))
    return (image_width - width) // 2, (image_height - height) // 2, width, height


def one_view(warps: Sequence[View]) -> View:
    """Return the view of several warps, which remembers what each of them cut off."""
    return reduce(View.then, warps)


def recoloured(pixels: NDArray[np.uint8], changes: Sequence[ColourChange]) -> NDArray[np.uint8]:
    """Return pixels [height, width, 3] after changes of colour."""
    image = Image.fromarray(pixels)
    for change in changes:
        image = change(image)
    return np.array(image)


def _pixels(image: Image.Image | NDArray[np.uint8]) -> NDArray[np.uint8]:
    pixels = np.array(image.convert("RGB")) if isinstance(image, Image.Image) else image
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[2:] != (3,) or not pixels.size:
        what = f"{getattr(pixels, 'dtype', type(pixels).__name__)} of shape {tuple(getattr(pixels, 'shape', ()))}"
        raise ValueError(f"expected an image of Pillow or pixels [height, width, 3] as NumPy's uint8, got {what}")
    return pixels


def _draw_warps(config: WarpConfig, rng: np.random.Generator, *, img_size: tuple[int, int]) -> list[View]:
    """Draw the random warp of an image of `img_size` (height, width)."""
    degrees = rng.uniform(-config.degrees, config.degrees)
    shear_x, shear_y = rng.uniform(-config.shear, config.shear, 2)
    right, down = rng.uniform(-config.translate, config.translate, 2)
    return [
        View.rotation(degrees, img_size=img_size),
        View.shear(shear_x, shear_y, img_size=img_size),
        View.translation(right, down),
    ]


def _draw_three_augment(rng: np.random.Generator) -> ColourChange:
    """Draw one of the three changes of DeiT III (Touvron et al., 2022, section 3.3)."""
    choice = rng.integers(3)
    if choice == 0:
        return greyed
    if choice == 1:
        return solarized(128)
    return blurred(rng.uniform(0.1, 2))


def _draw_jitter(config: ColourJitter, rng: np.random.Generator) -> list[ColourChange]:
    """Draw changes of colour in random order, those of a range above 0."""
    changes = [
        change(rng.uniform(max(0, 1 - extent), 1 + extent))
        for change, extent in (
            (brightened, config.brightness),
            (contrasted, config.contrast),
            (saturated, config.saturation),
        )
        if extent > 0
    ]
    if config.hue > 0:
        changes.append(turned_hue(rng.uniform(-config.hue, config.hue)))
    return [changes[i] for i in rng.permutation(len(changes))]
