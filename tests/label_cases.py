"""Random score maps and views for the tests, and what they mean, written out place by place in float64."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tokenlabel.core.geometry import Box, View
from tokenlabel.core.scores import ScoreMap, from_top
from tokenlabel.core.targets import TokenTargets


def draw_score_map(
    rng: np.random.Generator,
    num_classes: int,
    *,
    size: tuple[int, int] | None = None,
    topk: int | None = None,
    region: Box | None = None,
) -> ScoreMap:
    """Draw a map of up to 7 x 7 cells that keeps up to 5 classes of a palette of at most 12."""
    height, width = size or rng.integers(1, 8, 2)
    palette = rng.permutation(num_classes)[:12]
    topk = topk or int(rng.integers(1, min(len(palette), 5) + 1))
    order = rng.random((height, width, len(palette))).argsort(axis=2)[..., :topk]
    probs = rng.dirichlet(np.ones(topk + 1), (height, width))[..., :topk]
    return from_top(palette[order], probs, num_classes=num_classes, region=region or Box())


def draw_box(rng: np.random.Generator, smallest: float = 0.2) -> Box:
    width, height = rng.uniform(smallest, 1, 2)
    left, top = rng.uniform(0, 1 - width), rng.uniform(0, 1 - height)
    return Box(left, top, left + width, top + height)


def draw_view(rng: np.random.Generator, num_changes: int) -> View:
    view = View.identity()
    for _ in range(num_changes):
        view = view.then(draw_change(rng))
    return view


def draw_change(rng: np.random.Generator) -> View:
    width_px, height_px = (int(side) for side in rng.integers(20, 90, 2))
    match int(rng.integers(6)):
        case 0:
            return View.crop(draw_box(rng))
        case 1:
            return View.flip_horizontal()
        case 2:
            return View.flip_vertical()
        case 3:
            return View.rotation(rng.uniform(-50, 50), img_size=(height_px, width_px))
        case 4:
            return View.shear(*rng.uniform(-0.4, 0.4, 2), img_size=(height_px, width_px))
        case _:
            return View.translation(*rng.uniform(-0.4, 0.4, 2))


def dense_map(score_map: ScoreMap) -> np.ndarray:
    """The distribution of every cell: kept classes have their probability, all others an equal part of the rest."""
    height, width, topk = score_map.codes.shape
    full = np.zeros((height, width, score_map.num_classes))
    for i in range(height):
        for j in range(width):
            kept = {}
            for k in range(topk):
                if score_map.probs[i, j, k] > 0:
                    kept[int(score_map.palette[score_map.codes[i, j, k]])] = float(score_map.probs[i, j, k])
            others = [c for c in range(score_map.num_classes) if c not in kept]
            for c in others:
                full[i, j, c] = max(0.0, 1 - sum(kept.values())) / len(others)
            for c, probability in kept.items():
                full[i, j, c] = probability
    return full


def aligned_point_by_point(
    score_map: ScoreMap, frames: np.ndarray, grid: tuple[int, int], samples: int
) -> tuple[np.ndarray, np.ndarray]:
    """The targets [N, C] and weights [N] of one image: the mean over sample points.

    Points that are not covered count 0, and so do cells that keep nothing, each by its share in a point.
    """
    full = dense_map(score_map)
    full[score_map.probs.max(axis=2) == 0] = 0
    targets, weights = [], []
    for i in range(grid[0]):
        for j in range(grid[1]):
            target, weight = np.zeros(score_map.num_classes), 0.0
            for a in range(samples):
                for b in range(samples):
                    x, y = (j + (b + 0.5) / samples) / grid[1], (i + (a + 0.5) / samples) / grid[0]
                    scores = _scores_at(full, score_map.region, frames, x, y)
                    if scores is not None:
                        target += scores / samples**2
                        weight += scores.sum() / samples**2  # a cell's probabilities add up to 1, or to 0
            targets.append(target)
            weights.append(weight)
    return np.stack(targets), np.array(weights)


def _scores_at(full: np.ndarray, region: Box, frames: np.ndarray, x: float, y: float) -> np.ndarray | None:
    """The scores at a point of the augmented image, None where it shows nothing that the teacher saw."""
    on_the_way = [(a * x + b * y + c, d * x + e * y + f) for (a, b, c), (d, e, f) in frames]
    if not all(0 <= value <= 1 for point in on_the_way for value in point):
        return None
    source_x, source_y = on_the_way[-1]
    if not (region.left <= source_x <= region.right and region.top <= source_y <= region.bottom):
        return None
    height, width = full.shape[:2]
    column = (source_x - region.left) / (region.right - region.left) * width - 0.5
    row = (source_y - region.top) / (region.bottom - region.top) * height - 0.5
    column, row = min(max(column, 0), width - 1), min(max(row, 0), height - 1)
    j, i = math.floor(column), math.floor(row)
    next_j, next_i = min(j + 1, width - 1), min(i + 1, height - 1)
    right, down = column - j, row - i
    above = (1 - right) * full[i, j] + right * full[i, next_j]
    below = (1 - right) * full[next_i, j] + right * full[next_i, next_j]
    return (1 - down) * above + down * below


def draw_targets(
    rng: np.random.Generator, shape: tuple[int, int], num_classes: int, *, num_entries: int = 4, weighted: bool = False
) -> TokenTargets:
    """Draw float64 targets of (images, tokens): proper distributions, palettes padded and of random length."""
    num_images, num_tokens = shape
    num_entries = min(num_entries, num_classes)
    classes = np.zeros((num_images, num_entries + 2), np.int64)  # two entries are padding
    excess = np.zeros((num_images, num_tokens, num_entries + 2))
    for b in range(num_images):
        classes[b, :num_entries] = rng.permutation(num_classes)[:num_entries]
        excess[b, :, :num_entries] = rng.dirichlet(np.ones(num_entries + 1), num_tokens)[:, :-1]
    floor = (1 - excess.sum(axis=2)) / num_classes
    weight = rng.uniform(0, 1, shape) if weighted else np.ones(shape)
    return TokenTargets(
        classes=torch.from_numpy(classes),
        excess=torch.from_numpy(excess * weight[..., None]),
        floor=torch.from_numpy(floor * weight),
        weight=torch.from_numpy(weight),
    )


def dense_targets(targets: TokenTargets, num_classes: int) -> torch.Tensor:
    """The targets [B, N, C] in float64, summed entry by entry."""
    classes, excess = targets.classes.tolist(), targets.excess.double()
    full = targets.floor.double()[..., None].repeat(1, 1, num_classes)
    for b, palette in enumerate(classes):
        for u, class_id in enumerate(palette):
            full[b, :, class_id] += excess[b, :, u]
    return full


class TensorSizes(TorchDispatchMode):
    """Counts calls while it is active, and notes how many numbers each tensor has that gets new memory."""

    def __init__(self) -> None:
        super().__init__()
        self.fresh: list[int] = []
        self.num_calls = 0
        self._made: list[torch.Tensor] = []  # kept, so that no address is used twice

    @property
    def largest(self) -> int:
        return max(self.fresh)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.num_calls += 1
        result = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in (*self._made, *_tensors((args, kwargs)))}
        for tensor in _tensors(result):
            if tensor.untyped_storage().data_ptr() not in known:
                self._made.append(tensor)
                self.fresh.append(tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def _tensors(values: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]
