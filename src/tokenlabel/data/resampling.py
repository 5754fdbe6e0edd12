"""Resampling: pixels resized, flipped and warped, all on uint8 and within a level of Pillow's."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional as F

from tokenlabel.core.geometry import View
from tokenlabel.data.config import Interpolation

# The mean of ImageNet's pixels, which timm fills with, too.
MEAN_COLOUR = (124, 116, 104)

_FILL = np.array(MEAN_COLOUR, np.uint8)
_ROUNDING = np.float32(1e-3)  # keeps a whole number that float32 takes for a little less from being rounded down


RESAMPLING = {Interpolation.BILINEAR: Image.Resampling.BILINEAR, Interpolation.BICUBIC: Image.Resampling.BICUBIC}


def resize(
    pixels: NDArray[np.uint8], size_px: tuple[int, int], interpolation: Interpolation | str
) -> NDArray[np.uint8]:
    """Resize pixels [h, w, 3] to (height, width), with antialiasing.

    Within a level of Pillow's (bicubic: but for single pixels beside hard edges that overshoot), and several
    times as fast: torch keeps to uint8 and vectorises.
    """
    # Torch's fast path wants one image, channels last, without gaps between its rows.
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous(memory_format=torch.channels_last)
    mode = Interpolation(interpolation).value
    resized = F.interpolate(image, size=size_px, mode=mode, antialias=True)
    return resized[0].permute(1, 2, 0).contiguous().numpy()


def flipped(pixels: NDArray[np.uint8], *, axis: int) -> NDArray[np.uint8]:
    """Return pixels [height, width, 3] in reverse order along an axis."""
    # Ten times as fast as a copy of NumPy's reversed view.
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].flip(axis + 2)[0].permute(1, 2, 0).numpy()


def warp(pixels: NDArray[np.uint8], view: View, interpolation: Interpolation | str) -> NDArray[np.uint8]:
    """Resample pixels [height, width, 3] once to show a view of them; what it does not cover gets `MEAN_COLOUR`.

    That includes what was cut off on the way, as if each warp had been done by itself: pixels and labels agree.
    """
    interpolation = Interpolation(interpolation)
    height, width = pixels.shape[:2]
    to_px = np.array([[width], [height]])  # the view's fractions, of x and y
    matrix = view.matrix * to_px * np.array([1 / width, 1 / height, 1])
    (to_x, y_to_x, x), (x_to_y, to_y, y) = matrix.tolist()
    if _same((to_x, x_to_y, to_y, y), (1, 0, 1, 0)):  # shears and translations along x alone
        shown = slid_rows(pixels, y_to_x * (np.arange(height) + 0.5) + x, interpolation)
    elif _same((to_y, y_to_x, to_x, x), (1, 0, 1, 0)):  # the same along y
        columns = slid_rows(_transposed(pixels), x_to_y * (np.arange(width) + 0.5) + y, interpolation)
        shown = _transposed(columns)
    else:
        image = Image.fromarray(pixels)
        resampling = RESAMPLING[interpolation]
        affine = Image.Transform.AFFINE
        shown = np.array(
            image.transform((width, height), affine, matrix.ravel().tolist(), resampling, fillcolor=MEAN_COLOUR)
        )
    if len(view.frames) > 1:
        shown[~view.covered_pixels((height, width))] = MEAN_COLOUR
    return shown


def slid_rows(
    pixels: UInt8[NDArray[np.uint8], "height width 3"],
    shifts_px: Float[NDArray[np.float64], " height"],
    interpolation: Interpolation,
) -> UInt8[NDArray[np.uint8], "height width 3"]:
    """Return pixels [height, width, 3] each row of which shows what lies `shifts_px` further right.

    What a shift brings in from outside of the image gets `MEAN_COLOUR`. The pixels are those of Pillow's affine
    transform, which goes the long way for every map.
    """
    height, width = pixels.shape[:2]
    shifts_px = shifts_px.clip(-width - 1, width + 1)
    whole = np.floor(shifts_px).astype(np.int64)
    first, weights = _taps((shifts_px - whole).astype(np.float32), interpolation)
    rows = _rows_from(pixels, whole + first, width + len(weights) - 1)  # [height, 3 * (width + taps - 1)]
    sums = rows[:, : width * 3] * weights[0][:, None]
    part = np.empty_like(sums)
    for tap, weight in enumerate(weights[1:], start=1):
        sums += np.multiply(rows[:, tap * 3 : (tap + width) * 3], weight[:, None], out=part)
    shown = np.clip(sums, 0, 255, out=sums).astype(np.uint8).reshape(height, width, 3)
    centres = np.arange(width) + 0.5 + shifts_px[:, None]  # [height, width]
    shown[(centres < 0) | (centres >= width)] = _FILL
    return shown


def _same(some: Iterable[float], others: Iterable[float]) -> bool:
    return all(abs(a - b) < 1e-9 for a, b in zip(some, others, strict=True))


def _taps(parts: NDArray[np.float32], interpolation: Interpolation) -> tuple[int, list[NDArray[np.float32]]]:
    """Return the first of the pixels that a point between two is made of, and what each counts.

    `parts`: how far the points lie beyond pixel 0. Bicubic is Keys' with a = -1, as in Pillow's transforms.
    """
    if interpolation is Interpolation.BILINEAR:
        return 0, [1 - parts, parts]
    squares, cubes = parts**2, parts**3
    return -1, [-parts + 2 * squares - cubes, 1 - 2 * squares + cubes, parts + squares - cubes, cubes - squares]


def _rows_from(pixels: NDArray[np.uint8], starts: NDArray[np.int64], num_pixels: int) -> NDArray[np.float32]:
    """Return `num_pixels` pixels of each row from a start on, [height, 3 * num_pixels]; the edges go on outside."""
    height, width = pixels.shape[:2]
    left, right = max(0, -int(starts.min())), max(0, int(starts.max()) + num_pixels - width)
    padded = np.empty((height, left + width + right, 3), np.uint8)
    padded[:, left : left + width] = pixels
    padded[:, :left] = pixels[:, :1]
    padded[:, left + width :] = pixels[:, -1:]
    flat = padded.reshape(height, -1)
    # A view: each row of the image is read from its own start, without an index for every pixel.
    windows = np.lib.stride_tricks.sliding_window_view(flat, num_pixels * 3, axis=1)[:, ::3]
    return np.add(windows[np.arange(height), starts + left], _ROUNDING, dtype=np.float32)


def _transposed(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Exchange rows and columns; Pillow does so in half of the time that NumPy takes."""
    return np.array(Image.fromarray(pixels).transpose(Image.Transpose.TRANSPOSE))
