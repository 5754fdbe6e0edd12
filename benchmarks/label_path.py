"""The label path: from score maps and views to targets, and on to the loss's gradient.

Our sparse form against the dense computation of the published toolboxes, written plainly: a zero-filled
B x C x H x W map, roi_align to the token grid, softmax, soft cross entropy over B x N x C. Both start from
the same sparse labels and the same crops.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import roi_align

from benchmarks.measure import Row, Settings, interleave, peak_bytes, ratios
from tokenlabel.core.align import align
from tokenlabel.core.batch import ScoreMapBatch, collate_score_maps
from tokenlabel.core.config import Mixing
from tokenlabel.core.geometry import Box, View, stack_views
from tokenlabel.core.losses import sparse_cross_entropy
from tokenlabel.core.mix import mix_targets, sample_mix
from tokenlabel.core.scores import ScoreMap, from_top
from tokenlabel.core.targets import TokenTargets

NUM_IMAGES = 64
GRID = (14, 14)
MAP_SIZE = 18
TOPK = 5


@dataclass(frozen=True, eq=False)
class Case:
    """The labels and crops of one batch in both forms."""

    score_maps: ScoreMapBatch
    views: Tensor  # [B, 1, 2, 3]
    class_ids: Tensor  # [B, H, W, K]
    scores: Tensor  # [B, H, W, K]
    boxes: Tensor  # [B, 5] image, left, top, right, bottom, in map cells
    num_classes: int


def run(settings: Settings) -> list[Row]:
    """Measure the targets alone and targets + loss + backward, time and peak memory, both forms.

    With 10 classes the dense form has little to do; both take a few milliseconds.
    """
    rows = []
    for num_classes in (1000,) if settings.quick else (10, 1000):
        case = make_case(num_classes, settings)
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(NUM_IMAGES, GRID[0] * GRID[1], num_classes, generator=generator)
        logits = logits.to(settings.device).requires_grad_()
        aims = ("at least 25", "at least 20", "at least 6") if num_classes == 1000 else ("", "", "")
        rows += _compare(
            f"targets, {num_classes:,} classes",
            sparse=lambda case=case: align(case.score_maps, case.views, GRID),
            dense=lambda case=case: dense_targets(case),
            settings=settings,
            aims=aims[:2],
        )
        rows += _compare(
            f"targets + loss + backward, {num_classes:,} classes",
            sparse=lambda case=case, logits=logits: _sparse_step(case, logits),
            dense=lambda case=case, logits=logits: _dense_step(case, logits),
            settings=settings,
            aims=(aims[2], ""),
        )
        whole = interleave({"sparse": lambda case=case: _mixed_targets(case)}, settings)["sparse"]
        name = f"targets, smoothed and mixed by MixToken, {num_classes:,} classes: sparse"
        rows.append(Row(name, [1e3 * s for s in whole], "ms"))
    num_images = 8 if settings.quick else NUM_IMAGES
    many = make_case(21_841, settings, num_images)
    ways = {"sparse": lambda: align(many.score_maps, many.views, GRID), "dense": lambda: dense_targets(many)}
    for way, function in ways.items():
        mib = peak_bytes(function, settings) / 2**20
        name = f"targets, 21,841 classes, {num_images} images: {way} peak"
        rows.append(Row(name, [mib], "MiB", "megabytes" if way == "sparse" else ""))
    return rows


def _compare(
    name: str, *, sparse: Callable[[], object], dense: Callable[[], object], settings: Settings, aims: tuple[str, str]
) -> list[Row]:
    seconds = interleave({"sparse": sparse, "dense": dense}, settings)
    mib = {"sparse": peak_bytes(sparse, settings) / 2**20, "dense": peak_bytes(dense, settings) / 2**20}
    rows = [Row(f"{name}: {way}", [1e3 * s for s in values], "ms") for way, values in seconds.items()]
    rows.append(Row(f"{name}: dense / sparse", ratios(seconds["dense"], seconds["sparse"]), "x", aims[0]))
    rows += [Row(f"{name}: {way} peak", [value], "MiB") for way, value in mib.items()]
    rows.append(Row(f"{name}: dense / sparse peak", [mib["dense"] / mib["sparse"]], "x", aims[1]))
    return rows


def make_case(num_classes: int, settings: Settings, num_images: int = NUM_IMAGES) -> Case:
    """Draw labels with palettes of 20 to 60 classes (or all there are) and crops with sides of .35 to 1."""
    rng = np.random.default_rng(0)
    maps = [draw_score_map(rng, num_classes, int(rng.integers(20, 61))) for _ in range(num_images)]
    boxes = draw_boxes(rng, num_images)
    in_cells = [[i, *(MAP_SIZE * side for side in (b.left, b.top, b.right, b.bottom))] for i, b in enumerate(boxes)]
    device = settings.device
    return Case(
        score_maps=collate_score_maps(maps).to(device),
        views=torch.from_numpy(stack_views([View.crop(box) for box in boxes])).to(device),
        class_ids=torch.from_numpy(np.stack([m.class_ids for m in maps])).to(device),
        scores=torch.from_numpy(np.stack([m.probs for m in maps])).to(device),
        boxes=torch.tensor(in_cells, dtype=torch.float32, device=device),
        num_classes=num_classes,
    )


def draw_score_map(rng: np.random.Generator, num_classes: int, num_named: int) -> ScoreMap:
    """Draw a map of 18 x 18 cells that keeps 5 of `num_named` classes in each (or of all there are)."""
    palette = rng.permutation(num_classes)[:num_named]
    order = rng.random((MAP_SIZE, MAP_SIZE, len(palette))).argsort(axis=2)[..., :TOPK]
    probs = rng.dirichlet(np.ones(TOPK + 1), (MAP_SIZE, MAP_SIZE))[..., :TOPK]
    return from_top(palette[order], probs, num_classes=num_classes)


def draw_boxes(rng: np.random.Generator, count: int) -> list[Box]:
    """Draw crops with sides of .35 to 1."""
    boxes = []
    for _ in range(count):
        width, height = rng.uniform(0.35, 1, 2)
        left, top = rng.uniform(0, 1 - width), rng.uniform(0, 1 - height)
        boxes.append(Box(left, top, left + width, top + height))
    return boxes


def _sparse_step(case: Case, logits: Tensor) -> None:
    targets = align(case.score_maps, case.views, GRID)
    torch.autograd.grad(sparse_cross_entropy(logits, targets).mean(), logits)


def _mixed_targets(case: Case) -> TokenTargets:
    """Return the targets as a training step has them."""
    generator = torch.Generator().manual_seed(1)
    plan = sample_mix(Mixing.MIXTOKEN, len(case.views), grid=GRID, img_size=(224, 224), generator=generator)
    targets = align(case.score_maps, case.views, GRID).smoothed(0.1, case.num_classes)
    return mix_targets(targets, plan and plan.to(case.views.device), GRID)


def dense_targets(case: Case) -> Tensor:
    """Return the published toolboxes' targets [B, N, C]."""
    num_images = len(case.views)
    dense = torch.zeros(num_images, case.num_classes, MAP_SIZE, MAP_SIZE, device=case.views.device)
    for i in range(num_images):
        dense[i].scatter_(0, case.class_ids[i].permute(2, 0, 1), case.scores[i].permute(2, 0, 1))
    cropped = roi_align(dense, case.boxes, GRID)  # [B, C, h, w]
    return cropped.softmax(dim=1).flatten(2).transpose(1, 2)


def _dense_step(case: Case, logits: Tensor) -> None:
    targets = dense_targets(case)
    loss = (-targets * F.log_softmax(logits, dim=2)).sum(dim=2).mean()
    torch.autograd.grad(loss, logits)
