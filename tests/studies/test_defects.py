"""Each defect puts labels where the published code puts them, and nowhere else."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from label_cases import dense_map, draw_box, draw_score_map

from studies.defects import DEFECTS, nearest, shifted, stretched, swapped
from tokenlabel.core.align import align
from tokenlabel.core.batch import Sample, collate_score_maps
from tokenlabel.core.geometry import Box, View, stack_views


def sample_of(view, score_map=None):
    image = torch.zeros(3, 4, 4, dtype=torch.uint8)
    return Sample(image=image, class_id=0, num_classes=9, view=view, score_map=score_map, key="a.jpg")


def targets(sample, grid, samples=None):
    views = torch.from_numpy(stack_views([sample.view]))
    return align(collate_score_maps([sample.score_map]), views, grid, samples=samples).dense(9)[0].numpy()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.booleans(), st.booleans())
def test_swapped_reads_top_left_height_width_for_x1_y1_x2_y2(seed, over, upside_down):
    """As the published code does: crop by the swapped box, then turn over what the image was turned over by."""
    box = draw_box(np.random.default_rng(seed))
    view = View.crop(box)
    view = view.then(View.flip_horizontal()) if over else view
    view = view.then(View.flip_vertical()) if upside_down else view
    points = np.random.default_rng(seed).random((5, 2))
    x, y = points.T
    x, y = (1 - x if over else x), (1 - y if upside_down else y)
    expected = np.stack([box.top + x * box.height, box.left + y * box.width], axis=1)
    np.testing.assert_allclose(swapped(sample_of(view)).view.to_source(points), expected, atol=1e-12)


def test_swapped_leaves_square_crops_on_the_diagonal_alone():
    view = View.crop(Box(0.2, 0.2, 0.7, 0.7))
    np.testing.assert_allclose(swapped(sample_of(view)).view.matrix, view.matrix)


def test_a_crop_of_the_top_right_is_labelled_with_the_bottom_left():
    """REFERENCE: a crop of the top right corner is labelled with the bottom left."""
    centre = np.array([[0.5, 0.5]])
    view = View.crop(Box(0.5, 0.0, 1.0, 0.5))
    np.testing.assert_allclose(swapped(sample_of(view)).view.to_source(centre), [[0.25, 0.75]])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_shifted_says_at_a_place_what_lies_half_a_cell_after_it(seed):
    """Tokens on the cells of the map: the middle between two cells is the mean of both."""
    score_map = draw_score_map(np.random.default_rng(seed), 9, size=(4, 5))
    found = targets(shifted(sample_of(View.identity(), score_map)), (4, 5), samples=1).reshape(4, 5, 9)
    full = dense_map(score_map)
    mean = (full[:-1, :-1] + full[1:, :-1] + full[:-1, 1:] + full[1:, 1:]) / 4
    np.testing.assert_allclose(found[:-1, :-1], mean, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_nearest_reads_the_cell_that_a_point_lies_in(seed):
    rng = np.random.default_rng(seed)
    score_map, box = draw_score_map(rng, 9, size=(3, 4)), draw_box(rng)
    grid = (4, 4)
    found = targets(nearest(sample_of(View.crop(box), score_map)), grid, samples=1).reshape(*grid, 9)
    full, clear = dense_map(score_map), 0
    for i in range(4):
        for j in range(4):
            x, y = box.left + (j + 0.5) / 4 * box.width, box.top + (i + 0.5) / 4 * box.height
            column, row = x * 4, y * 3
            if min(abs(column - round(column)), abs(row - round(row))) > 1 / 16:  # away from the cells' edges
                np.testing.assert_allclose(found[i, j], full[int(row), int(column)], atol=1e-5)
                clear += 1
    assert clear > 0


def test_stretched_forgets_which_part_the_teacher_saw():
    rng = np.random.default_rng(0)
    part = draw_score_map(rng, 9, size=(3, 3), region=Box(0.1, 0.1, 0.9, 0.9))
    found = targets(stretched(sample_of(View.identity(), part)), (3, 3), samples=1)
    np.testing.assert_allclose(found, dense_map(part).reshape(9, 9), atol=1e-5)


@pytest.mark.parametrize("defect", ["shifted", "stretched", "nearest"])
def test_a_defect_of_labels_needs_labels(defect):
    with pytest.raises(ValueError, match=r"a\.jpg has no score map"):
        DEFECTS[defect](sample_of(View.identity()))
