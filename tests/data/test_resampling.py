import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tokenlabel.core.geometry import View
from tokenlabel.data.config import Interpolation
from tokenlabel.data.resampling import MEAN_COLOUR, RESAMPLING, slid_rows, warp

BOTH = pytest.mark.parametrize("interpolation", [Interpolation.BILINEAR, Interpolation.BICUBIC])
SIZES = st.tuples(st.integers(1, 30), st.integers(1, 30))  # (width, height)


def noise(size_px, seed):
    width, height = size_px
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def pillows(pixels, view, interpolation):
    """Return what Pillow's affine transform, which works on whole images pixel by pixel, makes of a view."""
    height, width = pixels.shape[:2]
    matrix = view.matrix * [[width], [height]] * [1 / width, 1 / height, 1]
    return np.asarray(
        Image.fromarray(pixels).transform(
            (width, height),
            Image.Transform.AFFINE,
            matrix.ravel().tolist(),
            RESAMPLING[interpolation],
            fillcolor=MEAN_COLOUR,
        )
    )


@BOTH
@given(
    size_px=SIZES,
    shear=st.floats(-0.6, 0.6),
    moved=st.floats(-1.2, 1.2),
    along_y=st.booleans(),
    seed=st.integers(0, 99),
)
def test_shears_and_translations_make_pillows_pixels(interpolation, size_px, shear, moved, along_y, seed):
    pixels = noise(size_px, seed)
    shears, moves = ((0, shear), (0, moved)) if along_y else ((shear, 0), (moved, 0))
    view = View.shear(*shears, img_size=size_px[::-1]).then(View.translation(*moves))
    view = View(view.frames[-1:])  # what several warps cut off is not Pillow's business
    shown, expected = warp(pixels, view, interpolation), pillows(pixels, view, interpolation)
    off = np.abs(shown.astype(int) - expected).max(axis=2)
    # Where a source point lies within rounding of an edge, one of the two may see the image and the other not.
    assert (off > 1).mean() <= 0.02


@BOTH
@given(size_px=SIZES, seed=st.integers(0, 99), scale=st.sampled_from([0.3, 3.0, 50.0]))
def test_slid_rows_show_what_lies_further_right(interpolation, size_px, seed, scale):
    pixels, rng = noise(size_px, seed), np.random.default_rng(seed)
    height, width = pixels.shape[:2]
    shifts = rng.normal(0, scale, height)
    shown = slid_rows(pixels, shifts, interpolation)
    for y in range(height):
        for x in range(width):
            centre = x + 0.5 + shifts[y]
            if not 0 <= centre < width:
                assert tuple(shown[y, x]) == MEAN_COLOUR
                continue
            whole = math.floor(x + shifts[y])
            part = x + shifts[y] - whole
            if interpolation is Interpolation.BILINEAR:
                weights = {0: 1 - part, 1: part}
            else:
                weights = {k: keys(part - k) for k in (-1, 0, 1, 2)}
            value = sum(w * pixels[y, min(max(whole + k, 0), width - 1)] for k, w in weights.items())
            assert np.abs(shown[y, x] - np.clip(value, 0, 255)).max() <= 1


def keys(distance):
    """Return Keys' cubic kernel with a = -1 (Keys 1981, equation 4, for another a)."""
    d = abs(distance)
    if d < 1:
        return d**3 - 2 * d**2 + 1
    return -(d**3) + 5 * d**2 - 8 * d + 4 if d < 2 else 0


@BOTH
def test_flat_colours_stay_as_they_are(interpolation):
    pixels = np.full((20, 30, 3), (7, 100, 254), np.uint8)
    shown = slid_rows(pixels, np.linspace(-3, 3, 20), interpolation)
    assert {tuple(pixel) for pixel in shown.reshape(-1, 3).tolist()} <= {(7, 100, 254), MEAN_COLOUR}
