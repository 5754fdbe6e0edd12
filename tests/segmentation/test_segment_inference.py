"""Sliding, whole, at several scales and flipped, against loops; figures from the confusion matrix."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from tokenlabel.core.scores import from_probabilities
from tokenlabel.models.decoders import HeadOutputs
from tokenlabel.models.segmentation import SegmentationModel, SegmentOutputs
from tokenlabel.runtime.errors import OutputError
from tokenlabel.segmentation.inference import (
    Segmenter,
    confusion,
    figures_of,
    most_probable,
    slide_logits,
    whole_logits,
    window_starts,
)
from tokenlabel.segmentation.pairs import IGNORED
from tokenlabel.segmentation.recipe import SegmentEvalConfig


def outputs_of(logits: torch.Tensor) -> SegmentOutputs:
    """What a model returns that has these logits."""
    return SegmentOutputs(HeadOutputs(logits, nn.Identity()), None)


class Local(SegmentationModel):
    """A stand-in for a model: logits of each pixel from its own colour, on a grid of `stride` pixels."""

    def __init__(self, *, num_classes: int = 5, multiple_px: int = 1, stride: int = 1) -> None:
        nn.Module.__init__(self)
        self._backbone_is_frozen = False
        self.multiple_px, self.stride = multiple_px, stride
        self.mean, self.std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(num_classes, 3, generator=generator), requires_grad=False)
        self.seen: list[tuple[int, ...]] = []

    def forward(self, images: torch.Tensor) -> SegmentOutputs:
        self.seen.append(tuple(images.shape))
        assert images.shape[2] % self.multiple_px == images.shape[3] % self.multiple_px == 0
        pooled = F.avg_pool2d(images, self.stride)
        return outputs_of(torch.einsum("cd,bdhw->bchw", self.weight, pooled))


class Placed(Local):
    """One whose logits depend on the place within what it sees, too."""

    def forward(self, images: torch.Tensor) -> SegmentOutputs:
        logits = super().forward(images).logits
        height, width = logits.shape[2:]
        ramp = torch.arange(height)[:, None] * 0.3 + torch.arange(width) * 0.7
        return outputs_of(logits + ramp)


@settings(max_examples=50)
@given(st.integers(1, 70), st.integers(1, 30), st.integers(1, 30))
def test_windows_cover_a_side_and_stay_within(length: int, window: int, stride: int) -> None:
    stride = min(stride, window)
    starts = window_starts(length, window, stride)
    covered = {place for start in starts for place in range(start, start + min(window, length))}
    assert covered == set(range(length))
    assert starts == sorted(set(starts))
    assert all(b - a <= stride for a, b in itertools.pairwise(starts))


def test_windows_are_those_of_the_published_inference() -> None:
    assert window_starts(683, 512, 341) == [0, 171]
    assert window_starts(512, 512, 341) == [0]
    assert window_starts(1200, 512, 341) == [0, 341, 682, 688]


@pytest.mark.parametrize("windows_at_once", [1, 3])
@pytest.mark.parametrize(("height", "width"), [(9, 14), (8, 8), (5, 20), (3, 4)])
def test_sliding_is_the_mean_over_windows(height: int, width: int, windows_at_once: int) -> None:
    model = Placed()
    images = torch.randn(1, 3, height, width)
    found = slide_logits(model, images, window_px=(8, 6), stride_px=(5, 4), windows_at_once=windows_at_once)
    window = (min(8, height), min(6, width))
    total, seen = torch.zeros(1, 5, height, width), torch.zeros(height, width)
    for top in window_starts(height, window[0], 5):
        for left in window_starts(width, window[1], 4):
            piece = model(images[:, :, top : top + window[0], left : left + window[1]]).logits
            for row in range(window[0]):
                for column in range(window[1]):
                    total[:, :, top + row, left + column] += piece[:, :, row, column]
                    seen[top + row, left + column] += 1
    torch.testing.assert_close(found, total / seen)


@settings(max_examples=20)
@given(st.integers(1, 21), st.integers(1, 21))
def test_a_model_of_pixels_says_the_same_whole_and_sliding(height: int, width: int) -> None:
    model = Local()
    images = torch.randn(1, 3, height, width)
    whole = whole_logits(model, images)
    slid = slide_logits(model, images, window_px=(7, 7), stride_px=(4, 4), windows_at_once=2)
    torch.testing.assert_close(whole, torch.einsum("cd,bdhw->bchw", model.weight, images))
    torch.testing.assert_close(slid, whole, rtol=1e-4, atol=1e-5)


def test_images_are_filled_up_to_what_a_model_takes() -> None:
    model = Local(multiple_px=16, stride=4)
    assert whole_logits(model, torch.randn(2, 3, 17, 40)).shape == (2, 5, 17, 40)
    assert model.seen == [(2, 3, 32, 48)]


@settings(max_examples=20)
@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=3),
    st.integers(1, 40),
    st.integers(0, 99),
)
def test_the_most_probable_class_of_several_views(grids: list[tuple[int, int]], num_classes: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    views = [4 * torch.randn(num_classes, *grid, generator=generator) for grid in grids]
    found = most_probable(views, (7, 9))
    mean = torch.zeros(num_classes, 7, 9)
    for view in views:
        mean += F.interpolate(view[None], size=(7, 9), mode="bilinear", align_corners=False)[0].softmax(0)
    best, said = mean.max(dim=0).values, mean.gather(0, found[None])[0]
    torch.testing.assert_close(said, best)  # ties and roundings aside


def segmenter(model: Local, **config: Any) -> Segmenter:
    return Segmenter(model, SegmentEvalConfig(**config), window_px=(8, 8))


def test_a_picture_gets_a_class_for_every_pixel_of_its_own_size() -> None:
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 13, 22), dtype=np.uint8))
    model = Local()
    expected = torch.einsum("cd,dhw->chw", model.weight, pixels / 255).argmax(dim=0)
    for mode in ("slide", "whole"):
        assert (segmenter(model, mode=mode)(pixels) == expected).float().mean() > 0.999
    said = segmenter(Local(multiple_px=4, stride=4), short_side_px=16, scales=(0.5, 1.0), flip=True)(pixels)
    assert said.shape == (13, 22)


def test_outputs_that_are_no_numbers_are_refused() -> None:
    model = Local()
    model.weight[2] = torch.nan  # no comparison with it holds: every pixel would be of class 0
    with pytest.raises(OutputError, match=r"a\.png: the outputs of the network for this image are not finite"):
        segmenter(model)(torch.zeros(3, 13, 22, dtype=torch.uint8), name="a.png")


def test_flipping_and_scaling_look_at_what_they_say() -> None:
    model = Local(multiple_px=1)
    pixels = torch.zeros(3, 20, 30, dtype=torch.uint8)
    list(segmenter(model, mode="whole", short_side_px=10, scales=(1.0, 2.0), flip=True).views(pixels))
    assert [shape[2:] for shape in model.seen] == [(10, 15), (10, 15), (20, 30), (20, 30)]


def test_a_mirrored_view_is_mirrored_back() -> None:
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 6, 8), dtype=np.uint8))
    plain, mirrored = segmenter(Local(), mode="whole", flip=True).views(pixels)
    torch.testing.assert_close(plain, mirrored)


@settings(max_examples=20)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.booleans(), st.integers(0, 99))
def test_soft_predictions_are_means_over_the_pixels_of_cells_and_over_views(
    rows: int, columns: int, cell_px: int, flip: bool, seed: int
) -> None:
    size_px = (rows * cell_px, columns * cell_px)
    pixels = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (3, *size_px), dtype=np.uint8))
    model = Placed()
    found = segmenter(model, mode="whole", flip=flip).probabilities(pixels, (rows, columns))
    logits = [model(pixels[None] / 255).logits[0]]
    if flip:
        logits.append(model(pixels.flip(2)[None] / 255).logits[0].flip(2))
    for row, column in itertools.product(range(rows), range(columns)):
        total = torch.zeros(5)
        for view, y, x in itertools.product(logits, range(cell_px), range(cell_px)):
            total += view[:, row * cell_px + y, column * cell_px + x].softmax(dim=0)
        torch.testing.assert_close(found[row, column], total / (len(logits) * cell_px**2))


@pytest.mark.parametrize("mode", ["slide", "whole"])
def test_soft_predictions_lie_on_the_grid_of_the_head(mode: Any) -> None:
    pixels = torch.zeros(3, 26, 41, dtype=torch.uint8)
    found = segmenter(Local(multiple_px=8, stride=4), mode=mode).probabilities(pixels)
    assert found.shape == (7, 11, 5)
    torch.testing.assert_close(found.sum(dim=2), torch.ones(7, 11))
    score_map = from_probabilities(found.numpy(), 3)
    assert (score_map.num_classes, score_map.codes.shape) == (5, (7, 11, 3))
    resized = segmenter(Local(stride=4), mode=mode, short_side_px=13)
    assert resized.grid_of((26, 41)) == (4, 5)


def test_strides_are_two_thirds_by_default() -> None:
    assert Segmenter(Local(), SegmentEvalConfig(), window_px=(512, 512)).stride_px == (341, 341)


def test_looks_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"eval\.scales"):
        SegmentEvalConfig(scales=())
    with pytest.raises(ValueError, match=r"eval\.stride_px"):
        SegmentEvalConfig(stride_px=(0, 5))
    with pytest.raises(ValueError, match=r"eval\.short_side_px must be at least 1, got -5"):
        SegmentEvalConfig(short_side_px=-5)
    with pytest.raises(ValueError, match=r"eval\.max_aspect must be at least 1"):
        SegmentEvalConfig(max_aspect=0.5)
    with pytest.raises(ValueError, match="windows of 512 x 512 px at a stride of 512 x 600 px leave pixels out"):
        Segmenter(Local(), SegmentEvalConfig(stride_px=(512, 600)), window_px=(512, 512))
    whole = SegmentEvalConfig(mode="whole", stride_px=(600, 600))
    Segmenter(Local(), whole, window_px=(512, 512))


@settings(max_examples=30)
@given(st.integers(1, 6), st.integers(1, 40), st.integers(0, 99))
def test_the_confusion_matrix_counts_each_pixel(num_classes: int, num_pixels: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = rng.integers(IGNORED, num_classes, num_pixels).astype(np.int16)
    said = rng.integers(0, num_classes, num_pixels)
    expected = np.zeros((num_classes, num_classes), np.int64)
    for one_said, one_true in zip(said, truth, strict=True):
        if one_true != IGNORED:
            expected[one_true, one_said] += 1
    found = confusion(torch.from_numpy(said), torch.from_numpy(truth), num_classes)
    assert found.tolist() == expected.tolist()


@settings(max_examples=30)
@given(st.integers(1, 5), st.integers(0, 99))
def test_figures_are_those_of_sets_of_pixels(num_classes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth, said = rng.integers(0, num_classes, (2, 30)).astype(np.int16)
    found = figures_of(confusion(torch.from_numpy(said.astype(np.int64)), torch.from_numpy(truth), num_classes))
    ious, accuracies = [], []
    for c in range(num_classes):
        mine, theirs = set(np.flatnonzero(said == c)), set(np.flatnonzero(truth == c))
        ious.append(len(mine & theirs) / len(mine | theirs) if mine | theirs else None)
        accuracies.append(len(mine & theirs) / len(theirs) if theirs else None)
    assert found["class_iou"] == pytest.approx(ious)
    assert found["class_accuracy"] == pytest.approx(accuracies)
    assert found["miou"] == pytest.approx(np.mean([x for x in ious if x is not None]))
    assert found["mean_accuracy"] == pytest.approx(np.mean([x for x in accuracies if x is not None]))
    assert found["pixel_accuracy"] == pytest.approx(np.mean(truth == said))


def test_masks_without_any_class_have_no_figures() -> None:
    with pytest.raises(ValueError, match="no pixel"):
        figures_of(torch.zeros(3, 3, dtype=torch.long))
