"""Segmentation that learns from label maps: the loss against a dense oracle, and runs as users start them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from tokenlabel.core.align import enough_samples
from tokenlabel.core.config import TokenChoice
from tokenlabel.core.geometry import EDGE_TOLERANCE
from tokenlabel.core.scores import from_probabilities, unknown_map
from tokenlabel.models.decoders import HeadOutputs
from tokenlabel.segmentation.data import SegmentSample, SegmentTransform, collate
from tokenlabel.segmentation.pairs import IGNORED
from tokenlabel.segmentation.recipe import SegmentAugmentConfig, SegmentLossConfig
from tokenlabel.segmentation.task import head_loss

CROP_PX = (24, 18)
GRID = (6, 5)
LOSS = SegmentLossConfig()


def sample_of(seed: int, num_classes: int, *, kind: str) -> SegmentSample:
    """An augmented image with a mask, a label map, or neither; scaled, flipped, and often smaller than its crop."""
    rng = np.random.default_rng(seed)
    size = tuple(rng.integers(10, 40, 2))
    pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    mask = rng.integers(0, num_classes + 1, size).astype(np.int16)
    mask[mask == num_classes] = IGNORED
    transform = SegmentTransform(SegmentAugmentConfig(scale=(0.5, 1.5)), CROP_PX)
    shown, classes, view = transform(pixels, mask if kind == "mask" else None, rng)
    probs = rng.dirichlet([0.4] * num_classes, size=(4, 7)).astype(np.float32)
    score_map = {"mask": None, "map": from_probabilities(probs, topk=2), "unknown": unknown_map(num_classes)}[kind]
    image = torch.from_numpy(np.ascontiguousarray(shown)).permute(2, 0, 1)
    return SegmentSample(image, torch.from_numpy(classes), f"{seed}.png", view, score_map)


def dense_target(sample: SegmentSample, grid: tuple[int, int], num_classes: int):
    """Return the soft label of every cell by loops over its samples, [h, w, C], each times its weight."""
    score_map, (rows, columns) = sample.score_map, grid
    assert score_map is not None
    dense, region = np.asarray(score_map.dense(), np.float64), score_map.region
    says = np.asarray((score_map.probs > 0).any(axis=2))
    height, width = dense.shape[:2]
    count = enough_samples((height, width), grid)
    target = np.zeros((rows, columns, num_classes))
    for row, column, i, j in np.ndindex(rows, columns, count, count):
        point = np.array([(column + (j + 0.5) / count) / columns, (row + (i + 0.5) / count) / rows])
        x, y = sample.view.to_source(point)
        edge = EDGE_TOLERANCE  # as `covers` takes it
        is_seen = region.left - edge <= x <= region.right + edge and region.top - edge <= y <= region.bottom + edge
        if not (sample.view.covers(point) and is_seen):
            continue
        x, y = np.clip(x * width - 0.5, 0, width - 1), np.clip(y * height - 0.5, 0, height - 1)
        for near_y, near_x in np.ndindex(2, 2):
            at_y, at_x = min(int(y) + near_y, height - 1), min(int(x) + near_x, width - 1)
            share = (y % 1 if near_y else 1 - y % 1) * (x % 1 if near_x else 1 - x % 1)
            target[row, column] += says[at_y, at_x] * share * dense[at_y, at_x] / count**2
    return target


def oracle(samples: list[SegmentSample], logits: torch.Tensor, finer: int = 1) -> torch.Tensor:
    """The mean over images of the cross entropy: over the pixels of a mask, or over the cells of a dense soft label."""
    grid = (finer * GRID[0], finer * GRID[1])
    losses = []
    for sample, of_image in zip(samples, logits, strict=True):
        if sample.score_map is None:
            size = list(sample.mask.shape)
            large = F.interpolate(of_image[None], size=size, mode="bilinear", align_corners=False)
            per_pixel = F.cross_entropy(large, sample.mask[None].long(), ignore_index=IGNORED, reduction="none")
            losses.append(per_pixel.mean())
        else:
            target = torch.from_numpy(dense_target(sample, grid, len(of_image)))
            large = F.interpolate(of_image[None], size=grid, mode="bilinear", align_corners=False)[0]
            losses.append(-(target * large.permute(1, 2, 0).log_softmax(dim=2)).sum(dim=2).mean())
    return torch.stack(losses).mean()


def outputs_for(num_images: int, num_classes: int, width: int, seed: int) -> HeadOutputs:
    torch.manual_seed(seed)
    features = torch.randn(num_images, width, *GRID, dtype=torch.float64, requires_grad=True)
    return HeadOutputs(features, nn.Conv2d(width, num_classes, 1).double())


kinds = st.lists(st.sampled_from(["mask", "map", "map", "unknown"]), min_size=1, max_size=4)


@settings(max_examples=15, deadline=None)
@given(kinds, st.sampled_from([(3, 8), (12, 4)]), st.sampled_from([1, 2]), st.integers(0, 999))
def test_the_soft_loss_is_that_of_a_dense_oracle_beside_masks(kinds, sizes, finer, seed):
    """Under scales, flips and crops over the edge; with more classes than channels the fused form is taken."""
    num_classes, width = sizes
    samples = [sample_of(seed + i, num_classes, kind=kind) for i, kind in enumerate(kinds)]
    outputs = outputs_for(len(samples), num_classes, width, seed)
    wanted = [outputs.features, *outputs.classifier.parameters()]
    loss = head_loss(outputs, collate(samples), SegmentLossConfig(finer=finer))
    expected = oracle(samples, outputs.logits, finer)
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=0, check_dtype=False)
    for ours, theirs in zip(torch.autograd.grad(loss, wanted), torch.autograd.grad(expected, wanted), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_the_loss_of_a_batch_is_the_mean_of_its_parts():
    samples = [sample_of(i, 3, kind=kind) for i, kind in enumerate(["map", "mask", "mask", "unknown"])]
    outputs = outputs_for(4, 3, 8, seed=0)
    outputs = HeadOutputs(outputs.features.detach(), outputs.classifier.requires_grad_(False))
    whole = head_loss(outputs, collate(samples), LOSS)
    parts = [
        head_loss(outputs.of_images([*some]), collate([samples[i] for i in some]), LOSS)
        for some in ((0, 1), (2, 3), (0, 3), (1, 2))
    ]
    assert float((parts[0] + parts[1]) / 2) == pytest.approx(float(whole), rel=1e-6)
    assert float((parts[2] + parts[3]) / 2) == pytest.approx(float(whole), rel=1e-6)


def test_cells_of_which_the_teacher_is_not_sure_and_hard_labels():
    still = SegmentAugmentConfig(scale=(1.0, 1.0), horizontal_flip=0.0, photometric=False)
    pixels, rng = np.zeros((8, 8, 3), np.uint8), np.random.default_rng(0)
    shown, mask, view = SegmentTransform(still, (8, 8))(pixels, None, rng)
    probs = np.array([[[0.9, 0.1, 0.0], [0.5, 0.3, 0.2]]], np.float32)
    image = torch.from_numpy(shown).permute(2, 0, 1)
    sample = SegmentSample(image, torch.from_numpy(mask), "a", view, from_probabilities(probs, topk=3))
    logits = torch.randn(1, 3, 1, 2, dtype=torch.float64)
    outputs = HeadOutputs(logits, nn.Identity())
    # One sample of two, at the middle of its half: the first cell has its own label to three quarters.
    batch, log_probs = collate([sample]), logits[0, :, 0].log_softmax(dim=0)  # [C, 2]
    soft = torch.from_numpy(dense_target(sample, (1, 2), 3))[0]  # [2, C]
    of_cells = -(soft * log_probs.T).sum(dim=1)
    assert float(head_loss(outputs, batch, LOSS)) == pytest.approx(float(of_cells.mean()), rel=1e-6)
    confident = SegmentLossConfig(tokens=TokenChoice.CONFIDENT, token_threshold=0.7)
    assert float(head_loss(outputs, batch, confident)) == pytest.approx(float(of_cells[0]) / 2, rel=1e-6)
    hard = SegmentLossConfig(hard=True)
    assert float(head_loss(outputs, batch, hard)) == pytest.approx(-float(log_probs[0].mean()), rel=1e-6)
