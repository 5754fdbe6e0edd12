"""Score maps + views + a token grid -> the soft label of every token.

The map of one image names few distinct classes, so it becomes one plane of excess per palette entry and one
plane of floor. Each token reads these planes at a few points that the image's view leads to: its target is a
weighted sum of map cells.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Integer
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import roi_align

from tokenlabel.core.blocks import blocks
from tokenlabel.core.geometry import TOLERANCE
from tokenlabel.core.scores import Kind, ScoreMap
from tokenlabel.core.targets import TokenTargets
from tokenlabel.runtime.coercion import Choice, Size, pair


class LogitsMode(Choice):
    """What maps of logits mean; maps of probabilities don't ask.

    ZERO: each cell's softmax, classes that it did not keep counting as logit 0. KEPT: each cell's softmax
    over the classes that it kept. PUBLISHED: as in the published toolboxes, the softmax comes last, after
    logits were sampled as `roi_align` does it; for crops and flips only.
    """

    ZERO = "zero"
    KEPT = "kept"
    PUBLISHED = "published"


@dataclass(frozen=True, eq=False)
class ScoreMapBatch:
    """Score maps of a batch as tensors, padded to the largest map and palette of the batch.

    `classes`: palettes. `codes`, `probs`: as in ScoreMap; maps sit in the top left corner of the padded ones.
    `sizes`: (W, H) of each map, `shapes` the same as (H, W) for the host, which waits for no device to know them.
    `regions`: (left, top, right, bottom) of what the teacher saw. `empty_is_even`: see `ScoreMap`. `kind`: what `probs`
    are; padding is 0, or minus infinity among logits.
    """

    classes: Int[Tensor, "B U"]
    codes: Integer[Tensor, "B H W K"]
    probs: Float[Tensor, "B H W K"]
    sizes: Float[Tensor, "B 2"]
    regions: Float[Tensor, "B 4"]
    empty_is_even: Bool[Tensor, " B"]
    num_classes: int
    shapes: tuple[tuple[int, int], ...]
    kind: Kind = Kind.PROBABILITIES

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", Kind(self.kind))

    def to(self, device: torch.device | str) -> ScoreMapBatch:
        """Return the batch on another device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> ScoreMapBatch:
        """Return the batch in page-locked memory (the data loader calls this)."""
        return self._each(Tensor.pin_memory)

    def are_known(self) -> Bool[Tensor, " B"]:
        """Say which maps are about anything: those of unknown images lie beside them (`scores.unknown_map`)."""
        return (self.regions[:, :2] < 1).all(dim=1)

    def of_images(self, images: slice | list[int]) -> ScoreMapBatch:
        """Return the maps of some images of the batch; those of a slice are not copied."""
        numbers = range(len(self.shapes))[images] if isinstance(images, slice) else images
        shapes = tuple(self.shapes[number] for number in numbers)
        return replace(self._each(lambda tensor: tensor[images]), shapes=shapes)

    def _each(self, change: Callable[[Tensor], Tensor]) -> ScoreMapBatch:
        names = ("classes", "codes", "probs", "sizes", "regions", "empty_is_even")
        return replace(self, **{name: change(getattr(self, name)) for name in names})


def collate_score_maps(score_maps: Sequence[ScoreMap]) -> ScoreMapBatch:
    """Stack the score maps of a batch, which may differ in size, palette and K.

    Raises ValueError for maps over different numbers of classes, and for maps of logits among others.
    """
    counts = sorted({m.num_classes for m in score_maps})
    if len(counts) > 1:
        raise ValueError(f"score maps over {counts} classes in one batch; all must be over the same classes")
    kind = score_maps[0].kind
    if any(m.kind is not kind for m in score_maps):
        raise ValueError(
            "score maps of logits and of probabilities in one batch; take one label store for all images"
        )
    num_maps = len(score_maps)
    height, width, topk = (max(m.codes.shape[axis] for m in score_maps) for axis in range(3))
    classes = np.zeros((num_maps, max(len(m.palette) for m in score_maps)), np.int64)
    codes = np.zeros((num_maps, height, width, topk), np.result_type(*(m.codes for m in score_maps)))
    padding = 0 if kind is Kind.PROBABILITIES else -np.inf
    probs = np.full((num_maps, height, width, topk), padding, np.float32)
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
        empty_is_even=torch.tensor([m.empty_is_even for m in score_maps]),
        num_classes=counts[0],
        shapes=tuple((m.codes.shape[0], m.codes.shape[1]) for m in score_maps),
        kind=kind,
    )


def align(
    score_maps: ScoreMapBatch | None,
    views: Float[Tensor, "B F 2 3"] | Float[NDArray[np.float32], "B F 2 3"],
    grid: Size,
    *,
    samples: int | None = None,
    logits: LogitsMode | str = LogitsMode.ZERO,
) -> TokenTargets:
    """Return the soft label of every token of the augmented images.

    `views`: from `geometry.stack_views`, fractions of the image, (x, y). `grid`: the model's tokens (h, w).
    Each token's cell is sampled at `samples` x `samples` points (by default `enough_samples` of its image's own map,
    whatever other maps are in the batch); each point reads the map bilinearly, like
    `torchvision.ops.roi_align(aligned=True)`, the outermost cells reaching out to the map's edge. Points that
    show nothing of the source, or nothing of the teacher's region, are not covered: they count in no target
    and lower the token's weight, as cells that say nothing do. `logits`: what to make of maps of logits: zero, kept or
    published. Raises ValueError where there are no score maps, and for the published mode where there are no logits or
    where views are more than crops and flips.
    """
    logits, grid = LogitsMode(logits), pair(grid, name="grid")
    if score_maps is None:
        raise ValueError("the batch has no score maps to align; give the data set a label store (store=)")
    views = torch.as_tensor(views, device=score_maps.probs.device)
    if logits is LogitsMode.PUBLISHED:
        return _align_as_published(score_maps, views, grid)
    if score_maps.kind is Kind.LOGITS:
        score_maps = _probabilities_of_cells(score_maps, logits)
    (num_images, height, width), num_tokens = score_maps.codes.shape[:3], grid[0] * grid[1]
    num_planes, frames = score_maps.classes.shape[1] + 1, _with_region(views, score_maps.regions)
    pooled = score_maps.probs.new_empty(num_images, num_tokens, num_planes)  # [B, N, U + 1]
    weight = score_maps.probs.new_empty(num_images, num_tokens)
    of_counts: dict[int, list[int]] = {}
    for number, shape in enumerate(score_maps.shapes):
        of_counts.setdefault(samples or enough_samples(shape, grid), []).append(number)
    for count, numbers in of_counts.items():
        points, num_reads = _sample_points(grid, count, views.device), 4 * count**2 * num_tokens
        # Of each read, cell and share, as they are made and by token.
        numbers_each = (height * width + num_tokens) * num_planes + 4 * num_reads
        for block in blocks(len(numbers), numbers_each, pooled.device):
            images = block if len(of_counts) == 1 else numbers[block]  # a slice copies nothing
            pooled[images], weight[images] = _pooled(score_maps.of_images(images), frames[images], points)
    return TokenTargets(score_maps.classes, excess=pooled[..., :-1], floor=pooled[..., -1], weight=weight)


def enough_samples(shape: tuple[int, int], grid: tuple[int, int]) -> int:
    """Return how many samples a token and axis touch every cell of a map (h, w) that is seen as a whole.

    One of 2, 3, 4, 6, 8, 12, 16, ...: images of a few sizes then have a number in common, and go together.
    """
    needed = max(2, math.ceil(shape[0] / grid[0]), math.ceil(shape[1] / grid[1]))
    power = 1 << (needed - 1).bit_length()
    return power * 3 // 4 if needed <= power * 3 // 4 else power


def _pooled(
    score_maps: ScoreMapBatch, frames: Float[Tensor, "B F 2 3"], points: Float[Tensor, "2 S N"]
) -> tuple[Float[Tensor, "B N planes"], Float[Tensor, "B N"]]:
    """Return each token's weighted sum over the map's planes, and the sum of its weights."""
    num_images, num_tokens = len(frames), points.shape[2]
    cells, shares = _cells_of_tokens(score_maps, frames, points)
    says_something = (score_maps.probs > 0).any(dim=3) | score_maps.empty_is_even[:, None, None]  # [B, H, W]
    # By 1 where it does, which changes no bit. A selection of floats takes a sixth of the time of indexing booleans.
    counts = says_something.float().flatten().index_select(0, cells.flatten()).view_as(shares)
    shares = shares * counts
    planes = _planes(score_maps).flatten(0, 2)  # [B * H * W, U + 1]
    sums = F.embedding_bag(cells, planes, per_sample_weights=shares, mode="sum")  # [B * N, U + 1]
    return sums.view(num_images, num_tokens, -1), shares.sum(dim=1).view(num_images, num_tokens)


def _probabilities_of_cells(score_maps: ScoreMapBatch, mode: LogitsMode) -> ScoreMapBatch:
    """Return maps of logits as probabilities, cell by cell."""
    largest = score_maps.probs.amax(dim=3, keepdim=True).clamp_min(0)
    kept = (score_maps.probs - largest).exp()  # [B, H, W, K]
    num_absent = score_maps.num_classes - score_maps.probs.isfinite().sum(dim=3, keepdim=True)
    absent = num_absent * (-largest).exp() if mode is LogitsMode.ZERO else 0.0
    total = kept.sum(dim=3, keepdim=True) + absent
    return replace(score_maps, probs=kept / total.clamp_min(1e-30), kind=Kind.PROBABILITIES)


def _align_as_published(
    score_maps: ScoreMapBatch, views: Float[Tensor, "B F 2 3"], grid: tuple[int, int]
) -> TokenTargets:
    """Return what the published toolboxes make of logits, x and y in the right order, in the form of our targets.

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
    turned = (scale < 0)[:, :, None, None, None].unbind(dim=1)
    planes = torch.cat([pooled, weight], dim=1)
    for dim, mirrored in ((3, turned[0]), (2, turned[1])):
        planes = torch.where(mirrored, planes.flip(dim), planes)
    planes = planes.flatten(2).transpose(1, 2)  # [B, N, U + 1]
    pooled, weight = planes[..., :-1], planes[..., -1]

    largest = pooled.amax(dim=2, keepdim=True).clamp_min(0)
    unnamed = (-largest).exp()  # of a class at logit 0, before the division by Z
    above = (pooled - largest).exp() - unnamed
    per_unit = weight[..., None] / (score_maps.num_classes * unnamed + above.sum(dim=2, keepdim=True))
    return TokenTargets(score_maps.classes, above * per_unit, (unnamed * per_unit)[..., 0], weight)


def _roi_align(
    score_maps: ScoreMapBatch,
    first: Float[Tensor, "B 2"],
    last: Float[Tensor, "B 2"],
    grid: tuple[int, int],
) -> Float[Tensor, "B U h w"]:
    """Return the maps of logits of all palette entries, 0 where a cell did not keep them, cropped to boxes.

    `first`, `last`: corners (x, y) of the boxes, in fractions of the maps.
    """
    num_images, height, width = score_maps.codes.shape[:3]
    logits = score_maps.probs.nan_to_num(neginf=0.0)
    planes = logits.new_zeros(num_images, height, width, score_maps.classes.shape[1])
    planes = planes.scatter_add_(3, score_maps.codes.long(), logits).permute(0, 3, 1, 2)
    boxes = torch.cat([first * score_maps.sizes - 0.5, last * score_maps.sizes - 0.5], dim=1)
    pooled = planes.new_empty(num_images, planes.shape[1], *grid)
    for w, h in {(int(w), int(h)) for w, h in score_maps.sizes.tolist()}:  # one size, one call
        (rows,) = torch.where((score_maps.sizes == score_maps.sizes.new_tensor([w, h])).all(dim=1))
        corners = torch.cat([torch.arange(len(rows), device=boxes.device)[:, None], boxes[rows]], dim=1)
        pooled[rows] = roi_align(planes[rows, :, :h, :w].contiguous(), corners, output_size=grid)
    return pooled


def _covered(first: Float[Tensor, " B"], last: Float[Tensor, " B"], count: int) -> Float[Tensor, "B parts"]:
    """Return how much of each of `count` equal parts of an interval lies between 0 and 1."""
    steps = torch.linspace(0, 1, count + 1, device=first.device)
    edges = first[:, None] + (last - first)[:, None] * steps
    return edges.clamp(0, 1).diff(dim=1) * (count / (last - first))[:, None]


def _planes(score_maps: ScoreMapBatch) -> Float[Tensor, "B H W planes"]:
    """Return for each map cell the excess of every palette entry, and the floor as the last."""
    kept = score_maps.probs > 0  # [B, H, W, K]
    num_others = score_maps.num_classes - kept.sum(dim=3)
    rest = (1 - score_maps.probs.sum(dim=3)).clamp_min(0)
    floor = torch.where(num_others > 0, rest / num_others.clamp_min(1), 0.0)  # [B, H, W]
    excess = (score_maps.probs - floor[..., None]) * kept
    planes = floor.new_zeros(*floor.shape, score_maps.classes.shape[1] + 1)
    planes[..., -1] = floor
    return planes.scatter_add_(3, score_maps.codes.long(), excess)


def _cells_of_tokens(
    score_maps: ScoreMapBatch, frames: Float[Tensor, "B F 2 3"], points: Float[Tensor, "2 S N"]
) -> tuple[Int[Tensor, "tokens reads"], Float[Tensor, "tokens reads"]]:
    """Return which map cells each of the B * N tokens reads, and how much of each.

    Every sample reads the four cells around it. Cells are counted through the whole batch, row by row.
    """
    height, width = score_maps.codes.shape[1:3]
    num_images, (num_samples, num_tokens) = len(frames), points.shape[1:]
    places, covered = _sample_places(score_maps, frames, points)
    before = places.floor()  # [B, 2, S, N]
    fraction = places.sub_(before)
    after = (before + 1).minimum(score_maps.sizes[:, :, None, None] - 1)
    x, y = torch.stack([before, after], dim=2).int().unbind(dim=1)  # each [B, 2, S, N]
    share_x, share_y = torch.stack([1 - fraction, fraction], dim=2).unbind(dim=1)
    first = torch.arange(num_images, device=frames.device, dtype=torch.int32) * (height * width)
    rows = y * width + first[:, None, None, None]
    cells = rows[:, :, None] + x[:, None]  # [B, 2, 2, S, N]
    shares = (share_y * (covered / num_samples)[:, None])[:, :, None] * share_x[:, None]

    def by_token(reads: Tensor) -> Tensor:
        return reads.reshape(num_images, -1, num_tokens).transpose(1, 2).reshape(num_images * num_tokens, -1)

    return by_token(cells), by_token(shares)


def _sample_points(grid: tuple[int, int], samples: int, device: torch.device) -> Float[Tensor, "2 S N"]:
    """Return the points (x, y) of an augmented image at which its tokens are sampled, S = samples**2 a token."""
    h, w = grid
    y = (torch.arange(h * samples, device=device) + 0.5).div(h * samples).view(h, samples).T
    x = (torch.arange(w * samples, device=device) + 0.5).div(w * samples).view(w, samples).T
    shape = (samples, samples, h, w)
    return torch.stack([x[None, :, None, :].expand(shape), y[:, None, :, None].expand(shape)]).view(
        2, samples**2, h * w
    )


def _with_region(
    views: Float[Tensor, "B F 2 3"], regions: Float[Tensor, "B 4"]
) -> Float[Tensor, "B frames 2 3"]:
    """Return the frames of the views and, as the last, the way to fractions of the teacher's region."""
    start, end = regions[:, :2], regions[:, 2:]
    in_region = views[:, -1].clone()  # [B, 2, 3]
    in_region[..., 2] -= start
    return torch.cat([views, (in_region / (end - start)[..., None])[:, None]], dim=1)


def _sample_places(
    score_maps: ScoreMapBatch, frames: Float[Tensor, "B F 2 3"], points: Float[Tensor, "2 S N"]
) -> tuple[Float[Tensor, "B 2 S N"], Bool[Tensor, "B S N"]]:
    """Return where points of the augmented images fall on the maps, and which of them lie inside all frames.

    Places (x, y) are in map cells, (0, 0) in the middle of the top left one.
    """
    x, y = points
    by_x, by_y, origin = frames[..., None, None].unbind(dim=3)  # each [B, F, 2, 1, 1]
    on_the_way = torch.addcmul(
        torch.addcmul(origin, by_x, x), by_y, y
    )  # [B, F, 2, S, N], fractions of frames
    sizes = score_maps.sizes[:, :, None, None]
    places = (on_the_way[:, -1] * sizes).sub_(0.5).clamp_min_(0)
    covered = on_the_way.sub_(0.5).abs_().amax(dim=(1, 2)) <= 0.5 + TOLERANCE
    return places.minimum(sizes - 1), covered
