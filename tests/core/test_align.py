import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from label_cases import TensorSizes, aligned_point_by_point, dense_map, draw_box, draw_score_map, draw_view
from PIL import Image
from torchvision.ops import roi_align

from tokenlabel.core import kernels
from tokenlabel.core.align import align, enough_samples, image_labels, whole_views
from tokenlabel.core.batch import collate_score_maps
from tokenlabel.core.geometry import Box, View, stack_views
from tokenlabel.core.mix import MixPlan, mix_targets
from tokenlabel.core.scores import Kind, ScoreMap, from_mask, from_probabilities, from_top

seeds = st.integers(0, 2**32 - 1)
grids = st.tuples(st.integers(1, 6), st.integers(1, 6))


def align_one(score_map, view, grid, **options):
    return align(collate_score_maps([score_map]), torch.from_numpy(stack_views([view])), grid, **options)


@settings(max_examples=25)
@given(seeds, grids, st.integers(1, 3), st.sampled_from([2, 10, 30]))
def test_batches_of_any_maps_and_views_agree_point_by_point(seed, grid, samples, num_classes):
    """Maps of other sizes, palettes, K and regions in one batch, some with empty cells; any crops, flips and warps."""
    rng = np.random.default_rng(seed)
    maps = [draw_score_map(rng, num_classes, region=draw_box(rng, 0.6)) for _ in range(3)]
    for score_map in maps[1:]:
        score_map.probs[rng.random(score_map.probs.shape[:2]) < 0.3] = 0
    views = [draw_view(rng, int(rng.integers(0, 4))) for _ in maps]
    stacked = stack_views(views)
    targets = align(collate_score_maps(maps), torch.from_numpy(stacked), grid, samples=samples)
    dense = targets.dense(num_classes)
    for score_map, frames, got, weight in zip(maps, stacked.astype(float), dense, targets.weight, strict=True):
        expected, expected_weight = aligned_point_by_point(score_map, frames, grid, samples)
        np.testing.assert_allclose(got, expected, atol=1e-5)
        np.testing.assert_allclose(weight, expected_weight, atol=1e-6)
    torch.testing.assert_close(dense.sum(dim=2), targets.weight)


def test_cells_that_keep_nothing_carry_no_loss():
    """Three cells side by side, the middle one empty: a point halfway into it has half a weight, of its neighbour."""
    kept = np.array([[[0.6], [0.0], [1.0]]])
    score_map = from_top(np.array([[[1], [1], [0]]]), kept, num_classes=3)
    targets = align_one(score_map, View.identity(), (1, 3), samples=1)
    torch.testing.assert_close(targets.weight, torch.tensor([[1.0, 0, 1]]))
    torch.testing.assert_close(
        targets.dense(3)[0], torch.tensor([[0.2, 0.6, 0.2], [0, 0, 0], [1, 0, 0]]), atol=1e-6, rtol=0
    )
    between = align_one(score_map, View.identity(), (1, 6), samples=1)  # a quarter of a cell off each middle
    torch.testing.assert_close(between.weight, torch.tensor([[1.0, 0.75, 0.25, 0.25, 0.75, 1]]))
    torch.testing.assert_close(between.dense(3).sum(dim=2), between.weight)
    even = align_one(replace(score_map, empty_is_even=True), View.identity(), (1, 3), samples=1)
    assert even.weight.tolist() == [[1, 1, 1]]
    torch.testing.assert_close(even.dense(3)[0, 1], torch.full((3,), 1 / 3))
    nothing = from_mask(np.full((2, 2), 255), num_classes=3)
    assert not align_one(nothing, View.identity(), (2, 2)).weight.any()
    views = whole_views(2, torch.device("cpu"))
    image, says = image_labels(collate_score_maps([score_map, nothing]), views, torch.tensor([2, 2]))
    assert says.tolist() == [True, False]
    torch.testing.assert_close(image, torch.tensor([[0.6, 0.3, 0.1], [0, 0, 1]]))  # of what says something


@settings(max_examples=25)
@given(seeds, grids, st.integers(1, 3), st.booleans(), st.booleans())
def test_crops_and_flips_equal_roi_align(seed, grid, samples, mirrored, upside_down):
    rng = np.random.default_rng(seed)
    score_map, box = draw_score_map(rng, 8), draw_box(rng)
    height, width = score_map.codes.shape[:2]
    dense = torch.from_numpy(dense_map(score_map)).permute(2, 0, 1)[None]  # [1, C, H, W]
    rois = torch.tensor([[0, box.left * width, box.top * height, box.right * width, box.bottom * height]])
    expected = roi_align(dense, rois.double(), grid, sampling_ratio=samples, aligned=True)
    view = View.crop(box)
    if mirrored:
        view, expected = view.then(View.flip_horizontal()), expected.flip(3)
    if upside_down:
        view, expected = view.then(View.flip_vertical()), expected.flip(2)
    targets = align_one(score_map, view, grid, samples=samples)
    torch.testing.assert_close(targets.dense(8).double(), expected.flatten(2).transpose(1, 2), atol=1e-5, rtol=0)
    torch.testing.assert_close(targets.weight, torch.ones(1, grid[0] * grid[1]))


@pytest.mark.parametrize("grid", [(2, 2), (1, 3), (4, 2)])
@pytest.mark.parametrize("size", [(8, 8), (6, 10), (4, 14)])
@pytest.mark.parametrize(("right", "down"), [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_a_crop_of_a_corner_gets_the_labels_of_that_corner(right, down, size, grid):
    """Published toolboxes label a crop of the top right with the bottom left."""
    rows, columns = np.indices(size)
    quarters = 2 * (rows >= size[0] / 2) + (columns >= size[1] / 2)  # 0 1 / 2 3
    view = View.crop(Box(0.6 * right, 0.6 * down, 0.6 * right + 0.4, 0.6 * down + 0.4))
    dense = align_one(from_mask(quarters, num_classes=4), view, grid).dense(4)[0]  # [N, 4]
    assert (dense.argmax(dim=1) == 2 * down + right).all()
    assert dense[:, 2 * down + right].min() > 0.7


def test_the_whole_map_on_its_own_grid_comes_back():
    score_map = draw_score_map(np.random.default_rng(0), 9, size=(4, 6))
    targets = align_one(score_map, View.identity(), (4, 6), samples=1)
    np.testing.assert_allclose(targets.dense(9)[0].view(4, 6, 9), score_map.dense(), atol=1e-6)


def test_maps_of_the_part_that_the_teacher_saw_lie_there():
    """A teacher that saw the centre crop of a wide image says nothing of the sides."""
    region = Box(0.125, 0, 0.875, 1)
    score_map = from_top(np.array([[[0], [1]]]), np.ones((1, 2, 1)), num_classes=3, region=region)
    targets = align_one(score_map, View.identity(), (1, 8))
    np.testing.assert_allclose(targets.weight[0], [0, 1, 1, 1, 1, 1, 1, 0])
    dense = targets.dense(3)[0]
    assert dense.sum(dim=1)[[0, 7]].tolist() == [0, 0]
    assert dense.argmax(dim=1)[1:7].tolist() == [0, 0, 0, 1, 1, 1]
    inside = align_one(score_map, View.crop(region), (1, 8))  # cropped to what the teacher saw: all of it counts
    whole = from_top(np.array([[[0], [1]]]), np.ones((1, 2, 1)), num_classes=3)
    torch.testing.assert_close(inside.dense(3), align_one(whole, View.identity(), (1, 8)).dense(3))
    assert (inside.weight == 1).all()


def test_weights_are_the_covered_parts_of_the_tokens():
    score_map = from_mask(np.array([[2]]), num_classes=3)
    moved = View.translation(right=0.25, down=0)  # the left quarter shows nothing
    targets = align_one(score_map, moved, (2, 2), samples=4)
    torch.testing.assert_close(targets.weight, torch.tensor([[0.5, 1.0, 0.5, 1.0]]))
    torch.testing.assert_close(targets.dense(3)[0, 0], torch.tensor([0, 0, 0.5]))
    padded = View.crop(Box(-1, 0, 1, 1))
    assert align_one(score_map, padded, (1, 2)).weight.tolist() == [[0, 1]]


def test_what_a_warp_lost_on_the_way_is_not_labelled():
    size_px = (40, 40)
    view = View.rotation(40, img_size=size_px[::-1]).then(View.rotation(-40, img_size=size_px[::-1]))
    weight = align_one(from_mask(np.array([[1]]), num_classes=2), view, (8, 8)).weight.view(8, 8)
    assert weight[[0, 0, -1, -1], [0, -1, 0, -1]].tolist() == [0, 0, 0, 0]
    assert (weight[2:6, 2:6] == 1).all()


@pytest.mark.parametrize(("size", "grid"), [((12, 9), (3, 2)), ((12, 1), (2, 1)), ((1, 12), (1, 2))])
def test_fine_maps_on_coarse_grids_leave_no_cell_out(size, grid):
    """By default there are enough samples for the whole map, so that each cell counts about the same."""
    num_cells = size[0] * size[1]
    class_ids = np.arange(num_cells).reshape(*size, 1)
    score_map = from_top(class_ids, np.ones((*size, 1)), num_classes=num_cells)
    dense = align_one(score_map, View.identity(), grid).dense(num_cells)
    share = dense.mean(dim=(0, 1)) * num_cells
    assert share.min() > 0.5
    assert share.max() < 1.5


@pytest.mark.parametrize("size_px", [(96, 60), (60, 96)])
@pytest.mark.parametrize("change", ["rotate", "shear", "translate"])
def test_labels_move_as_the_pixels_of_wide_and_tall_images_do(change, size_px):
    """An image whose pixels are class ids is warped by Pillow; the labels of pure tokens must say the same."""
    width_px, height_px = size_px
    rows, columns = np.indices((height_px // 12, width_px // 12))
    mask = (rows * 3 + columns) % 7
    image = Image.fromarray(mask.astype(np.uint8)).resize(size_px, Image.Resampling.NEAREST)
    if change == "rotate":
        warped, view = image.rotate(25, fillcolor=7), View.rotation(25, img_size=size_px[::-1])
    else:
        x, right_px, down_px = (0.3, 0, 0) if change == "shear" else (0, 14, -7)
        coefficients = (1, x, -right_px, 0, 1, -down_px)
        warped = image.transform(size_px, Image.Transform.AFFINE, coefficients, fillcolor=7)
        moved = View.translation(right_px / width_px, down_px / height_px)
        view = View.shear(x, 0, img_size=size_px[::-1]) if x else moved
    grid = (height_px // 3, width_px // 3)
    targets = align_one(from_mask(mask, num_classes=7), view, grid)
    tokens = np.asarray(warped).reshape(grid[0], 3, grid[1], 3).transpose(0, 2, 1, 3).reshape(-1, 9)
    pure = (tokens == tokens[:, :1]).all(axis=1)
    labelled = pure & (tokens[:, 0] < 7)
    assert labelled.mean() > 0.3
    predicted = targets.dense(7)[0].argmax(dim=1).numpy()
    assert (predicted == tokens[:, 0])[labelled].mean() > 0.99
    assert targets.weight[0].numpy()[pure & (tokens[:, 0] == 7)].max(initial=0) < 0.5
    assert targets.weight[0].numpy()[labelled].min() > 0.5


def test_all_classes_kept_leaves_no_floor():
    probs = np.random.default_rng(0).dirichlet(np.ones(10), (3, 4))
    targets = align_one(from_probabilities(probs, 10), View.identity(), (3, 4), samples=1)
    np.testing.assert_allclose(targets.dense(10)[0], probs.reshape(12, 10), atol=1e-6)
    assert targets.floor.abs().max() == 0


def test_a_stored_sum_a_little_over_1_makes_no_negative_floor():
    score_map = ScoreMap(np.array([0, 3]), np.array([[[0, 1]]], np.uint8), np.array([[[0.7, 0.302]]], np.float32), 5)
    assert align_one(score_map, View.identity(), (1, 1)).floor.min() == 0


@given(st.integers(1, 200), st.integers(1, 200), grids)
def test_samples_are_enough_to_touch_every_cell_and_few(height, width, grid):
    count = enough_samples((height, width), grid)
    needed = max(2, math.ceil(height / grid[0]), math.ceil(width / grid[1]))
    assert needed <= count < 1.5 * needed
    assert count in {base << power for base in (2, 3) for power in range(8)}


@given(seeds)
def test_an_image_is_aligned_alike_in_any_company_and_any_block(seed):
    rng = np.random.default_rng(seed)
    maps = [draw_score_map(rng, 10) for _ in range(4)]
    views = [draw_view(rng, 2) for _ in maps]
    alone = [align_one(m, v, (3, 2)).dense(10)[0] for m, v in zip(maps, views, strict=True)]
    for block_size in (1, 1 << 20):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(kernels.BLOCK_SIZE, "cpu", block_size)
            stacked = torch.from_numpy(stack_views(views))
            together = align(collate_score_maps(maps), stacked, (3, 2))
        torch.testing.assert_close(together.dense(10), torch.stack(alone), atol=1e-6, rtol=1e-5)


def test_no_dense_map_or_target_is_ever_made():
    """21,841 classes: all that is made together stays far below the one dense map (or target) of the batch."""
    num_classes, grid = 21_841, (14, 14)
    rng = np.random.default_rng(0)
    maps = [draw_score_map(rng, num_classes, size=(18, 18), topk=5) for _ in range(4)]
    batch, views = collate_score_maps(maps), torch.from_numpy(stack_views([View.identity()] * 4))
    with TensorSizes() as made:
        align(batch, views, grid)
    assert made.largest < 4 * 18 * 18 * 20  # a palette of at most 12, not 21,841 classes
    assert sum(made.fresh) < 4 * 14 * 14 * num_classes / 10


def test_number_of_operations_does_not_grow_with_the_batch():
    """No loop over images, entries or classes."""
    rng = np.random.default_rng(0)
    counts = []
    for num_images in (2, 16):
        maps = [draw_score_map(rng, 50, size=(6, 6)) for _ in range(num_images)]
        views = torch.from_numpy(stack_views([View.identity()] * num_images))
        with TensorSizes() as made:
            align(collate_score_maps(maps), views, (4, 4))
        counts.append(made.num_calls)
    assert counts[0] == counts[1]


def test_class_ids_beyond_half_precision_survive():
    class_ids = np.array([[[2049], [21_840]]])
    dense = align_one(from_top(class_ids, np.ones((1, 2, 1)), num_classes=21_841), View.identity(), (1, 2), samples=1)
    assert dense.dense(21_841)[0].argmax(dim=1).tolist() == [2049, 21_840]


def test_batches_are_small_to_send():
    batch = collate_score_maps([draw_score_map(np.random.default_rng(0), 1000) for _ in range(3)])
    assert batch.codes.dtype == torch.uint8
    assert batch.to(torch.device("cpu")).num_classes == 1000


def test_targets_stay_in_float32_where_the_default_is_float64():
    maps, views = collate_score_maps([draw_score_map(np.random.default_rng(0), 3)]), stack_views([View.identity()])
    plan = MixPlan(torch.full((1, 2, 2), 0.5), torch.tensor([0]), on_tokens=True)
    expected = mix_targets(align(maps, views, 2), plan, 2)
    torch.set_default_dtype(torch.float64)
    try:
        found = mix_targets(align(maps, views, 2), plan, 2)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found.excess, expected.excess)
    assert torch.equal(found.weight, expected.weight)


def test_maps_that_do_not_belong_together_are_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"over \[10, 12\] classes"):
        collate_score_maps([draw_score_map(rng, 12), draw_score_map(rng, 10)])
    logits = from_top(np.zeros((1, 1, 1), int), np.ones((1, 1, 1)), num_classes=10, kind=Kind.LOGITS)
    with pytest.raises(ValueError, match="logits"):
        collate_score_maps([draw_score_map(rng, 10), logits])
