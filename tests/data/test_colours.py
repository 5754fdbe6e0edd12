import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from tokenlabel.data import colours

SIZES = st.tuples(st.integers(1, 20), st.integers(1, 20))  # (width, height)


def noise(size_px, seed):
    width, height = size_px
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@given(size_px=SIZES, seed=st.integers(0, 99), bits=st.integers(1, 8), threshold=st.integers(0, 256))
def test_tables_change_each_value_by_itself(size_px, seed, bits, threshold):
    image = noise(size_px, seed)
    np.testing.assert_array_equal(colours.posterized(bits)(image), ImageOps.posterize(image, bits))
    np.testing.assert_array_equal(colours.solarized(threshold)(image), ImageOps.solarize(image, threshold))
    pixels = np.asarray(image).astype(int)
    added = np.where(pixels < 128, np.minimum(pixels + 100, 255), pixels)
    np.testing.assert_array_equal(colours.solarize_added(100)(image), added)


def test_no_bits_leave_black():
    assert not np.asarray(colours.posterized(0)(noise((5, 4), 0))).any()
    np.testing.assert_array_equal(colours.posterized(9)(noise((5, 4), 0)), noise((5, 4), 0))


def test_a_whole_turn_of_the_hue_changes_next_to_nothing_and_half_a_turn_makes_red_cyan():
    red = Image.new("RGB", (2, 2), (250, 10, 10))
    assert colours.turned_hue(0.5)(red).getpixel((0, 0)) == pytest.approx((10, 250, 250), abs=4)
    assert colours.turned_hue(0)(red).getpixel((0, 0)) == pytest.approx((250, 10, 10), abs=4)
