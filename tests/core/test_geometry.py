import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from label_cases import draw_view
from PIL import Image

from tokenlabel.core.geometry import Box, View, stack_views

seeds = st.integers(0, 2**32 - 1)
fractions = st.floats(0, 1, allow_nan=False)
sizes_px = st.tuples(st.integers(10, 200), st.integers(10, 200))


@st.composite
def changes(draw):
    """A change of an image: its view, and the way back of one point, step by step in plain arithmetic."""
    kind = draw(st.sampled_from(["crop", "mirror", "flip", "rotate", "shear", "translate"]))
    width_px, height_px = size_px = draw(sizes_px)
    a, b = draw(st.floats(-0.5, 0.5)), draw(st.floats(-0.5, 0.5))
    if kind == "crop":
        left, top = draw(st.floats(-0.3, 0.7)), draw(st.floats(-0.3, 0.7))
        width, height = draw(st.floats(0.1, 1)), draw(st.floats(0.1, 1))
        box = Box(left, top, left + width, top + height)
        return View.crop(box), lambda x, y: (left + x * (box.right - left), top + y * (box.bottom - top))
    if kind == "mirror":
        return View.flip_horizontal(), lambda x, y: (1 - x, y)
    if kind == "flip":
        return View.flip_vertical(), lambda x, y: (x, 1 - y)
    if kind == "translate":
        return View.translation(a, b), lambda x, y: (x - a, y - b)
    if kind == "shear":
        return View.shear(a, b, img_size=size_px[::-1]), lambda x, y: (
            (x * width_px + a * y * height_px) / width_px,
            (y * height_px + b * x * width_px) / height_px,
        )
    degrees = 360 * a

    def turn_back(x, y):
        right_px, down_px = (x - 0.5) * width_px, (y - 0.5) * height_px
        radius, angle = math.hypot(right_px, down_px), math.atan2(-down_px, right_px)
        angle -= math.radians(degrees)  # angles count counter-clockwise, as on paper
        return 0.5 + radius * math.cos(angle) / width_px, 0.5 - radius * math.sin(angle) / height_px

    return View.rotation(degrees, img_size=size_px[::-1]), turn_back


@given(st.lists(changes(), min_size=1, max_size=5), st.lists(st.tuples(fractions, fractions), min_size=1))
def test_chained_views_lead_back_step_by_step(chain, points):
    view = View.identity()
    for change, _ in chain:
        view = view.then(change)
    for point in points:
        place, inside, clear = point, True, True
        for _, way_back in reversed(chain):
            place = way_back(*place)
            inside &= all(0 <= value <= 1 for value in place)
            clear &= all(min(abs(value), abs(value - 1)) > 1e-4 for value in place)
        assert view.to_source(np.array(point)) == pytest.approx(place, abs=1e-9)
        if clear:  # not on an edge, where rounding decides
            assert view.covers(np.array(point)) == inside


@given(seeds)
def test_then_is_associative(seed):
    rng = np.random.default_rng(seed)
    a, b, c = (draw_view(rng, int(rng.integers(1, 4))) for _ in range(3))
    left_first, right_first = a.then(b).then(c), a.then(b.then(c))
    points = rng.random((200, 2))
    np.testing.assert_allclose(left_first.matrix, right_first.matrix, atol=1e-12)
    np.testing.assert_array_equal(left_first.covers(points), right_first.covers(points))


def test_identity_changes_nothing():
    view = draw_view(np.random.default_rng(3), 3)
    points = np.random.default_rng(4).random((200, 2))
    for same in (view.then(View.identity()), View.identity().then(view)):
        np.testing.assert_allclose(same.matrix, view.matrix, atol=1e-15)
        np.testing.assert_array_equal(same.covers(points), view.covers(points))


def test_turning_and_turning_back_loses_the_corners():
    there, back = View.rotation(30, img_size=(64, 64)), View.rotation(-30, img_size=(64, 64))
    view = there.then(back)
    np.testing.assert_allclose(view.matrix, View.identity().matrix, atol=1e-12)
    points = np.array([[0.02, 0.02], [0.98, 0.02], [0.02, 0.98], [0.98, 0.98], [0.5, 0.5], [0.5, 0.05]])
    assert view.covers(points).tolist() == [False, False, False, False, True, True]


@given(seeds)
def test_crops_and_flips_inside_the_image_add_no_frame(seed):
    rng = np.random.default_rng(seed)
    turned = View.rotation(20, img_size=(40, 50))
    for view in (View.identity(), turned):
        for _ in range(3):
            left, top, right, bottom = *rng.uniform(0, 0.4, 2), *rng.uniform(0.6, 1, 2)
            view = view.then(View.crop(Box(left, top, right, bottom)))
            view = view.then(View.flip_horizontal() if rng.random() < 0.5 else View.flip_vertical())
        assert len(view.frames) == 1


@given(seeds, st.tuples(st.integers(1, 30), st.integers(1, 30)))
def test_covered_pixels_are_those_whose_centres_are_covered(seed, size_px):
    view = draw_view(np.random.default_rng(seed), 3)
    height, width = size_px
    covered = [
        [bool(view.covers(np.array([(x + 0.5) / width, (y + 0.5) / height]))) for x in range(width)]
        for y in range(height)
    ]
    np.testing.assert_array_equal(view.covered_pixels(size_px), covered)


def test_a_turn_after_a_crop_keeps_the_crop_in_mind():
    view = View.crop(Box(0.4, 0.4, 0.6, 0.6)).then(View.rotation(45, img_size=(30, 30)))
    assert len(view.frames) == 2
    corner = np.array([0.01, 0.01])
    assert np.all((view.to_source(corner) > 0) & (view.to_source(corner) < 1))  # inside the source ...
    assert not view.covers(corner)  # ... but the crop had thrown it away


@pytest.mark.parametrize("size_px", [(40, 24), (24, 40), (33, 33)])
@pytest.mark.parametrize("degrees", [0, 10, 45, 90, 135, 180, -30, 271.5])
def test_rotation_is_pillows(size_px, degrees):
    _assert_same_places(
        View.rotation(degrees, img_size=size_px[::-1]),
        size_px,
        lambda image: image.rotate(degrees, Image.Resampling.BILINEAR, fillcolor=-1),
    )


@pytest.mark.parametrize("size_px", [(40, 24), (24, 40)])
@pytest.mark.parametrize(
    ("x", "y", "right_px", "down_px"), [(0.3, 0, 0, 0), (0, -0.25, 0, 0), (0, 0, 7, -3), (0, 0, -5.5, 2)]
)
def test_shear_and_translation_are_pillows_affine_transforms(size_px, x, y, right_px, down_px):
    translation = View.translation(right_px / size_px[0], down_px / size_px[1])
    view = View.shear(x, y, img_size=size_px[::-1]).then(translation) if x or y else translation
    coefficients = (1, x, -right_px, y, 1, -down_px)
    _assert_same_places(
        view,
        size_px,
        lambda image: image.transform(
            image.size, Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR, fillcolor=-1
        ),
    )


def test_crop_is_pillows_crop_and_resize():
    box = Box.from_pixels(left_px=9, top_px=3, width_px=20, height_px=12, img_size=(24, 40))
    _assert_same_places(
        View.crop(box), (40, 24), lambda image: image.resize((60, 36), Image.Resampling.BILINEAR, box=(9, 3, 29, 15))
    )


def _assert_same_places(view, size_px, change):
    """Compare with images whose pixels say where they are: bilinear resampling of them gives the place exactly."""
    width_px, height_px = size_px
    x, y = np.meshgrid((np.arange(width_px) + 0.5) / width_px, (np.arange(height_px) + 0.5) / height_px)
    shown = np.stack([np.asarray(change(Image.fromarray(axis.astype(np.float32)))) for axis in (x, y)], axis=2)
    new_height_px, new_width_px = shown.shape[:2]
    points = np.stack(
        np.meshgrid((np.arange(new_width_px) + 0.5) / new_width_px, (np.arange(new_height_px) + 0.5) / new_height_px),
        axis=2,
    )
    sources = view.to_source(points)
    margin = 1 / np.array(size_px)  # the outermost pixels are blended with what lies outside
    inner = ((sources > margin) & (sources < 1 - margin)).all(axis=2)
    assert inner.mean() > 0.3
    np.testing.assert_allclose(shown[inner], sources[inner], atol=2e-4)
    outer = ((sources < -margin) | (sources > 1 + margin)).any(axis=2)
    assert (shown[outer] == -1).all()
    assert not view.covers(points)[outer].any()
    assert view.covers(points)[inner].all()


def test_box_of_pixels():
    box = Box.from_pixels(left_px=10, top_px=5, width_px=20, height_px=10, img_size=(20, 40))
    assert box == Box(0.25, 0.25, 0.75, 0.75)
    assert (box.width, box.height) == (0.5, 0.5)


@pytest.mark.parametrize(
    "sides", [(0.5, 0, 0.5, 1), (0.6, 0, 0.5, 1), (0, 1, 1, 0), (math.nan, 0, 1, 1), (0, 0, math.inf, 1)]
)
def test_empty_or_endless_boxes_are_refused(sides):
    with pytest.raises(ValueError, match="left < right"):
        Box(*sides)


def test_stacked_views_end_with_the_source():
    short, long = (
        View.flip_horizontal(),
        View.rotation(10, img_size=(30, 20)).then(View.shear(0.2, 0, img_size=(30, 20))),
    )
    stacked = stack_views([short, long])
    assert stacked.shape == (2, 2, 2, 3)
    assert stacked.dtype == np.float32
    np.testing.assert_array_equal(stacked[0], np.stack([View.identity().matrix, short.matrix]).astype(np.float32))
    np.testing.assert_array_equal(stacked[1], long.frames.astype(np.float32))


def test_geometry_and_scores_come_without_torch():
    code = "import sys, tokenlabel.core.geometry, tokenlabel.core.scores; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
