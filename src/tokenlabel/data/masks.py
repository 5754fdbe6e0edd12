"""Masks: files that hold a class number for every pixel. What they are called, and what may be in them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from tokenlabel.core.geometry import turned
from tokenlabel.data.decoding import orientation_of
from tokenlabel.runtime.errors import DataError

MAX_CLASSES = 32_767  # ids of training masks have 16 bits with a sign
SUFFIXES = (".png", ".PNG", ".tif", ".tiff", ".bmp", ".gif", ".pgm")  # formats that keep numbers as they are
# What tools put between the name of an image and that of its mask.
_ENDINGS = ("_mask", "_seg", "_segmentation", "_gt", "_label", "_labels", "_L", ".mask", ".seg")
_LOSSY = ("JPEG", "MPO", "WEBP", "AVIF")


def unlabelled_value(num_classes: int) -> int:
    """Return the value in masks of pixels of no class, where nobody says it: 255, or 65535 where 255 is a class."""
    return 255 if num_classes <= 255 else 65_535


def mask_names(key: str) -> Iterator[str]:
    """Yield what the mask of `a/1.jpg` may be called: first `a/1.png`, then `a/1.jpg.png`, last `a/1_mask.png`."""
    path = PurePosixPath(key)
    yield from (path.with_suffix(suffix).as_posix() for suffix in SUFFIXES)
    yield f"{key}.png"
    for ending in _ENDINGS:
        yield path.with_name(f"{path.stem}{ending}.png").as_posix()


def decode_mask(data: bytes, name: str) -> NDArray[np.integer]:
    """Return the values [height, width] of an encoded mask; of one with a palette, the numbers of its colours.

    Channels of red, green and blue that are equal are the values of a grey one, as many tools save it. A mask with an
    orientation tag is turned upright, as images are. Raises DataError for anything else.
    """
    try:
        image = Image.open(io.BytesIO(data))
        values = np.asarray(image)
        orientation = orientation_of(data, image)
    except Exception as error:  # Pillow's decoders raise whatever their parsing runs into
        reason = "it is of no known format" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(f"{name}: does not decode as an image ({reason or type(error).__name__})") from error
    if image.format in _LOSSY:
        raise DataError(f"{name}: is a {image.format}, which rounds the numbers of classes; save masks as PNG")
    if values.ndim == 3 and _is_grey(values):
        values = values[:, :, 0]
    if values.ndim == 3:
        num_colours = len(np.unique(values.reshape(-1, values.shape[2]), axis=0))
        raise DataError(
            f"{name}: has {values.shape[2]} channels; a mask has one channel of class numbers: turn its "
            f"{num_colours:,} colours ({image.mode}) into numbers first"
        )
    if values.dtype.kind == "f" and not (np.isfinite(values) & (values == np.rint(values))).all():
        raise DataError(f"{name}: holds fractions; a mask holds whole numbers of classes")
    return turned(values if values.dtype.kind in "iu" else values.astype(np.int64), orientation)


def _is_grey(values: NDArray[np.integer]) -> bool:
    """Say whether channels show one grey, opaque: only then do they hold class numbers."""
    num_colours = 1 if values.shape[2] == 2 else 3  # two channels are grey and alpha
    colours, alpha = values[:, :, :num_colours], values[:, :, num_colours:]
    return bool((colours == colours[:, :, :1]).all() and (alpha == 255).all())


def palette_of(data: bytes) -> list[bytes]:
    """Return the colours (RGB) of an encoded mask's palette; none of a mask without one."""
    image = Image.open(io.BytesIO(data))
    colours = bytes(image.getpalette("RGB") or ()) if image.mode == "P" else b""
    return [colours[start : start + 3] for start in range(0, len(colours), 3)]


def check_upright(size_px: tuple[int, ...], data: bytes, *, mask: str, image: str) -> None:
    """Raise DataError for a mask of (height, width) that has the sides of its image as stored, not as people see it.

    `data`: the encoded image. Half turns and mirror images have the same sides: nothing tells them apart.
    """
    orientation = orientation_of(data)
    if orientation < 5:
        return
    width, height = Image.open(io.BytesIO(data)).size
    if _fits(size_px, (height, width)) and not _fits(size_px, (width, height)):
        raise DataError(
            f"{mask}: lies as {image} stores its pixels ({height} x {width}, height x width), but people see the "
            f"photograph turned to {width} x {height} by its orientation tag (EXIF {orientation}); turn the mask "
            "likewise, or remove the tag if the stored pixels are upright"
        )


def _fits(mask_px: tuple[int, ...], image_px: tuple[int, int]) -> bool:
    """Say whether a mask has the aspect of an image, up to the rounding of its sides."""
    return abs(mask_px[0] * image_px[1] - mask_px[1] * image_px[0]) <= max(image_px)
