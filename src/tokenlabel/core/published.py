"""Maps of logits, as in the label files of 2021: softmax of each cell (`zero`, `kept`), or as then `published`.

`align` calls these functions; nothing else computes with logits of maps.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor
from torchvision.ops import roi_align

from tokenlabel.core.batch import ScoreMapBatch
from tokenlabel.core.config import LogitsMode
from tokenlabel.core.scores import Kind
from tokenlabel.core.targets import TokenTargets


def probabilities_of_cells(score_maps: ScoreMapBatch, mode: LogitsMode) -> ScoreMapBatch:
    """Return maps of logits as probabilities, cell by cell."""
    largest = score_maps.probs.amax(dim=3, keepdim=True)
    # Classes that a cell did not keep stand at logit 0; without them the largest kept one is taken off, however low.
    largest = largest.clamp_min(0) if mode is LogitsMode.ZERO else largest.nan_to_num(neginf=0.0)
    kept = (score_maps.probs - largest).exp()  # [B, H, W, K]
    num_absent = score_maps.num_classes - score_maps.probs.isfinite().sum(dim=3, keepdim=True)
    absent = num_absent * (-largest).exp() if mode is LogitsMode.ZERO else 0.0
    total = kept.sum(dim=3, keepdim=True) + absent
    return replace(score_maps, probs=kept / total.clamp_min(1e-30), kind=Kind.PROBABILITIES)


def align_as_published(
    score_maps: ScoreMapBatch, views: Float[Tensor, "B F 2 3"], grid: tuple[int, int]
) -> TokenTargets:
    """Return the targets that the published toolboxes compute from maps of logits, but with x and y in the right order.

    They spread the kept logits into maps of zeros over all classes, crop these by `roi_align` (ceil(cells /
    tokens) samples a token and axis) and apply softmax to each token. A class that no cell kept stays at
    logit 0, so its probability is 1 / Z, and the sum Z over all classes needs the logits of the palette only.
    """
    if score_maps.kind is not Kind.LOGITS:
        raise ValueError(
            "the published mode is for labels of logits, these are probabilities; take the mode `zero` or `kept`"
        )
    scale, start = views[:, -1].diagonal(dim1=1, dim2=2), views[:, -1, :, 2]  # [B, 2]
    if views.shape[1] > 1 or (views[:, -1, 0, 1] != 0).any() or (views[:, -1, 1, 0] != 0).any():
        raise ValueError("the published mode knows crops and flips only; leave rotation and the like out")
    region_start, region_end = score_maps.regions[:, :2], score_maps.regions[:, 2:]
    extent = region_end - region_start
    first = (start + scale.clamp_max(0) - region_start) / extent  # fractions of the region
    last = (start + scale.clamp_min(0) - region_start) / extent
    pooled = _roi_align(score_maps, first, last, grid)  # [B, U, h, w]
    covered_x, covered_y = (_covered(first[:, i], last[:, i], grid[1 - i]) for i in (0, 1))
    weight = covered_y[:, None, :, None] * covered_x[:, None, None, :]  # [B, 1, h, w]
    mirrored_x, mirrored_y = (scale < 0)[:, :, None, None, None].unbind(dim=1)
    planes = torch.cat([pooled, weight], dim=1)
    for dim, mirrored in ((3, mirrored_x), (2, mirrored_y)):
        planes = torch.where(mirrored, planes.flip(dim), planes)
    planes = planes.flatten(2).transpose(1, 2)  # [B, N, U + 1]
    pooled, weight = planes[..., :-1], planes[..., -1]

    largest = pooled.amax(dim=2, keepdim=True).clamp_min(0)
    # exp(logit - largest), not yet divided by Z: `unnamed` of a class at logit 0, `above` what each class of the
    # palette has beyond that.
    unnamed = (-largest).exp()
    above = (pooled - largest).exp() - unnamed
    per_unit = weight[..., None] / (score_maps.num_classes * unnamed + above.sum(dim=2, keepdim=True))
    floor, count = (unnamed * per_unit)[..., 0], score_maps.num_classes
    return TokenTargets(score_maps.classes, above * per_unit, floor, weight, num_classes=count, grid=grid)


def _roi_align(
    score_maps: ScoreMapBatch, first: Float[Tensor, "B 2"], last: Float[Tensor, "B 2"], grid: tuple[int, int]
) -> Float[Tensor, "B U h w"]:
    """Return the maps of logits of all palette entries, 0 where a cell did not keep them, cropped to boxes.

    `first`, `last`: corners (x, y) of the boxes, in fractions of the maps.
    """
    num_images, height, width = score_maps.codes.shape[:3]
    logits = score_maps.probs.nan_to_num(neginf=0.0)  # padding is minus infinity; here it must add 0
    planes = logits.new_zeros(num_images, height, width, score_maps.classes.shape[1])
    planes = planes.scatter_add_(3, score_maps.codes.long(), logits).permute(0, 3, 1, 2)
    # As published: `aligned=False` after a shift of half a cell, which makes boxes of less than a cell one cell wide.
    boxes = torch.cat([first * score_maps.sizes - 0.5, last * score_maps.sizes - 0.5], dim=1)
    pooled = planes.new_empty(num_images, planes.shape[1], *grid)
    for h, w in set(score_maps.shapes):  # one size, one call; `sizes` would wait for the device
        (rows,) = torch.where((score_maps.sizes == score_maps.sizes.new_tensor([w, h])).all(dim=1))
        corners = torch.cat([torch.arange(len(rows), device=boxes.device)[:, None], boxes[rows]], dim=1)
        pooled[rows] = roi_align(planes[rows, :, :h, :w].contiguous(), corners, output_size=grid)
    return pooled


def _covered(first: Float[Tensor, " B"], last: Float[Tensor, " B"], count: int) -> Float[Tensor, "B parts"]:
    """Return how much of each of `count` equal parts of an interval lies between 0 and 1."""
    steps = torch.linspace(0, 1, count + 1, device=first.device)
    edges = first[:, None] + (last - first)[:, None] * steps
    return edges.clamp(0, 1).diff(dim=1) * (count / (last - first))[:, None]
