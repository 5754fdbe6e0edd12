"""Score maps + views + a token grid -> the soft label of every token.

The map of one image names few distinct classes, so it becomes one plane of excess per palette entry and one
plane of floor; these are sampled through the image's view like any feature map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from tokenlabel.geometry import TOLERANCE
from tokenlabel.scores import Kind, ScoreMap
from tokenlabel.targets import TokenTargets


@dataclass(frozen=True, eq=False)
class ScoreMapBatch:
    """Score maps of a batch as tensors, padded to the largest map and palette of the batch.

    `classes`: palettes. `codes`, `probs`: as in ScoreMap; maps sit in the top left corner of the padded ones.
    `sizes`: (W, H) of each map. `regions`: (left, top, right, bottom) of what the teacher saw.
    """

    classes: Int[Tensor, "B U"]
    codes: Int[Tensor, "B H W K"]
    probs: Float[Tensor, "B H W K"]
    sizes: Float[Tensor, "B 2"]
    regions: Float[Tensor, "B 4"]
    num_classes: int

    def to(self, device: torch.device) -> ScoreMapBatch:
        """Return the batch on another device."""
        tensors = (self.classes, self.codes, self.probs, self.sizes, self.regions)
        return ScoreMapBatch(*(t.to(device, non_blocking=True) for t in tensors), num_classes=self.num_classes)

    def pin_memory(self) -> ScoreMapBatch:
        """Return the batch in page-locked memory (the data loader calls this)."""
        tensors = (self.classes, self.codes, self.probs, self.sizes, self.regions)
        return ScoreMapBatch(*(t.pin_memory() for t in tensors), num_classes=self.num_classes)


def collate_score_maps(score_maps: Sequence[ScoreMap]) -> ScoreMapBatch:
    """Stack the score maps of a batch. Maps may differ in size, palette and K, not in the number of classes."""
    num_classes = score_maps[0].num_classes
    if any(m.num_classes != num_classes or m.kind is not Kind.PROBABILITIES for m in score_maps):
        raise ValueError("the score maps of a batch must be probabilities over the same number of classes")
    num_maps = len(score_maps)
    height, width, topk = (max(m.codes.shape[axis] for m in score_maps) for axis in range(3))
    classes = np.zeros((num_maps, max(len(m.palette) for m in score_maps)), np.int64)
    codes = np.zeros((num_maps, height, width, topk), np.int64)
    probs = np.zeros((num_maps, height, width, topk), np.float32)
    for i, m in enumerate(score_maps):
        h, w, k = m.codes.shape
        classes[i, : len(m.palette)] = m.palette
        codes[i, :h, :w, :k] = m.codes
        probs[i, :h, :w, :k] = m.probs
    regions = [(m.region.left, m.region.top, m.region.right, m.region.bottom) for m in score_maps]
    return ScoreMapBatch(
        classes=torch.from_numpy(classes),
        codes=torch.from_numpy(codes),
        probs=torch.from_numpy(probs),
        sizes=torch.tensor([m.codes.shape[1::-1] for m in score_maps], dtype=torch.float32),
        regions=torch.tensor(regions, dtype=torch.float32),
        num_classes=num_classes,
    )


def align(
    score_maps: ScoreMapBatch, views: Float[Tensor, "B F 2 3"], grid: tuple[int, int], *, samples: int | None = None
) -> TokenTargets:
    """Return the soft label of every token of the augmented images.

    `views`: from `geometry.stack_views`, fractions of the image, (x, y). `grid`: the model's tokens (h, w).
    Each token's cell is sampled at `samples` x `samples` points (by default enough to touch every map cell when
    the view shows the whole map, and at least 2 x 2); each point reads the map bilinearly, like
    `torchvision.ops.roi_align(aligned=True)`, the outermost cells reaching out to the map's edge. Points that
    show nothing of the source, or nothing of the teacher's region, are not covered: they count in no target and
    lower the token's weight.
    """
    height, width = score_maps.codes.shape[1:3]
    samples = samples or max(2, math.ceil(height / grid[0]), math.ceil(width / grid[1]))
    points, covered = _sample_points(score_maps, views, (grid[0] * samples, grid[1] * samples))
    planes = _planes(score_maps)  # [B, U + 1, H, W]
    sampled = F.grid_sample(planes, points, mode="bilinear", padding_mode="border", align_corners=False)
    weights = covered[:, None].to(sampled.dtype)
    pooled = F.avg_pool2d(sampled * weights, samples).flatten(2)  # [B, U + 1, N]
    return TokenTargets(
        classes=score_maps.classes,
        excess=pooled[:, :-1].transpose(1, 2),
        floor=pooled[:, -1],
        weight=F.avg_pool2d(weights, samples).flatten(1),
    )


def _planes(score_maps: ScoreMapBatch) -> Float[Tensor, "B U+1 H W"]:
    """Return one plane of excess per palette entry, and the plane of the floor as the last."""
    kept = score_maps.probs > 0  # [B, H, W, K]
    num_others = score_maps.num_classes - kept.sum(dim=3)
    rest = (1 - score_maps.probs.sum(dim=3)).clamp_min(0)
    floor = torch.where(num_others > 0, rest / num_others.clamp_min(1), 0.0)  # [B, H, W]
    excess = (score_maps.probs - floor[..., None]) * kept
    num_images, num_entries = score_maps.classes.shape
    planes = floor.new_zeros(num_images, num_entries + 1, *floor.shape[1:])
    planes[:, -1] = floor
    planes.scatter_add_(1, score_maps.codes.permute(0, 3, 1, 2), excess.permute(0, 3, 1, 2))
    return planes


def _sample_points(
    score_maps: ScoreMapBatch, views: Float[Tensor, "B F 2 3"], points_grid: tuple[int, int]
) -> tuple[Float[Tensor, "B rows columns 2"], Bool[Tensor, "B rows columns"]]:
    """Return where the points of a regular grid over the augmented image fall on the padded maps, and which count.

    Places are in `grid_sample`'s units: -1 and 1 are the outer edges of the padded map.
    """
    rows, columns = points_grid
    y = (torch.arange(rows, device=views.device) + 0.5) / rows
    x = (torch.arange(columns, device=views.device) + 0.5) / columns
    frames = views[:, :, :, :, None, None]  # [B, F, 2, 3, 1, 1]
    places = frames[:, :, :, 0] * x + frames[:, :, :, 1] * y[:, None] + frames[:, :, :, 2]  # [B, F, 2, rows, columns]
    inside = ((places >= -TOLERANCE) & (places <= 1 + TOLERANCE)).all(dim=2).all(dim=1)

    start, end = score_maps.regions[:, :2, None, None], score_maps.regions[:, 2:, None, None]
    in_region = (places[:, -1] - start) / (end - start)  # [B, 2, rows, columns], fractions of the region
    covered = inside & ((in_region >= -TOLERANCE) & (in_region <= 1 + TOLERANCE)).all(dim=1)
    sizes = score_maps.sizes[:, :, None, None]
    cells = (in_region * sizes).clamp_min(0.5).minimum(sizes - 0.5)  # the outermost cells reach to the edge
    padded = sizes.new_tensor([score_maps.codes.shape[2], score_maps.codes.shape[1]])[:, None, None]
    return (2 * cells / padded - 1).permute(0, 2, 3, 1), covered
