"""Score maps + views + a token grid -> the soft label of every token, and of whole images (last in this file).

The map of one image names few distinct classes, so it becomes one plane of excess per palette entry and one
plane of floor. Each token samples these planes at a few points, which the image's view takes back to the source image:
its target is a weighted sum of map cells.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from tokenlabel.core.batch import ScoreMapBatch
from tokenlabel.core.config import LogitsMode
from tokenlabel.core.geometry import EDGE_TOLERANCE
from tokenlabel.core.kernels import blocks
from tokenlabel.core.published import align_as_published, probabilities_of_cells
from tokenlabel.core.scores import Kind
from tokenlabel.core.targets import TokenTargets
from tokenlabel.runtime.coercion import NATURAL, Size, check_number, coerced, described, pair


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
    whatever other maps are in the batch). Each sample interpolates the map bilinearly, like
    `torchvision.ops.roi_align(aligned=True)`; beyond the centres of the outermost cells their value is repeated.
    Samples outside of the source image or of the teacher's region are not covered: they add nothing to the target
    and lower the token's weight, as empty cells do. `logits`: how maps of logits become probabilities: zero, kept or
    published. Raises ValueError where there are no score maps, and for the published mode where there are no logits or
    where views are more than crops and flips.

    >>> maps = tl.collate_score_maps([tl.LabelStore("labels")["ant/0.png"]])
    >>> views = tl.stack_views([tl.View.crop(tl.Box(right=0.5))])
    >>> tl.align(maps, views, grid=(4, 4)).dense(2).shape
    torch.Size([1, 16, 2])
    """
    logits, grid = LogitsMode(logits), pair(grid, name="grid")
    if score_maps is None:
        raise ValueError("the batch has no score maps to align; give the data set a label store (store=)")
    if not isinstance(score_maps, ScoreMapBatch):
        raise ValueError(f"score_maps: expected what collate_score_maps returns, got {described(score_maps)}")
    if (shape := np.shape(views))[2:] != (2, 3) or shape[0] != len(score_maps.codes) or not shape[1]:
        raise ValueError(
            f"views: expected [B, F, 2, 3] for the {len(score_maps.codes)} score maps, as stack_views makes them, got "
            f"{described(views)}"
        )
    check_number(samples := coerced(samples, int | None, name="samples"), NATURAL, name="samples")
    views = torch.as_tensor(views, dtype=score_maps.probs.dtype, device=score_maps.probs.device)
    if logits is LogitsMode.PUBLISHED:
        return align_as_published(score_maps, views, grid)
    if score_maps.kind is Kind.LOGITS:
        score_maps = probabilities_of_cells(score_maps, logits)
    return _sampled(score_maps, views, grid, samples)


def _sampled(
    score_maps: ScoreMapBatch, views: Float[Tensor, "B F 2 3"], grid: tuple[int, int], samples: int | None
) -> TokenTargets:
    """Return the targets of maps of probabilities: each token's mean over its samples, block by block of images."""
    (num_images, height, width), num_tokens = score_maps.codes.shape[:3], grid[0] * grid[1]
    num_planes, (start, end) = score_maps.classes.shape[1] + 1, score_maps.regions[..., None].split(2, dim=1)
    # The teacher's region is one more frame, the last: points outside of it are not covered, without further code.
    in_region = torch.cat([views[:, -1, :, :2], views[:, -1, :, 2:] - start], dim=2) / (end - start)  # [B, 2, 3]
    frames = torch.cat([views, in_region[:, None]], dim=1)  # [B, F + 1, 2, 3]
    pooled = score_maps.probs.new_empty(num_images, num_tokens, num_planes)  # [B, N, U + 1]
    weight = score_maps.probs.new_empty(num_images, num_tokens)
    by_count: dict[int, list[int]] = {}
    # Images that need the same number of samples are processed together. If all took the number of the finest map, an
    # image's targets would depend on the rest of its batch.
    for index, shape in enumerate(score_maps.shapes):
        by_count.setdefault(samples or enough_samples(shape, grid), []).append(index)
    for count, indices in by_count.items():
        points, num_reads = _sample_points(grid, count, views), 4 * count**2 * num_tokens
        # Memory of an image: map and pooled planes, and 4 numbers a read: cell index and share, before and after
        # they are reordered by token.
        numbers_each = (height * width + num_tokens) * num_planes + 4 * num_reads
        for block in blocks(len(indices), numbers_each, pooled.device):
            images = block if len(by_count) == 1 else indices[block]  # a slice copies nothing
            pooled[images], weight[images] = _pooled(score_maps.of_images(images), frames[images], points)
    return TokenTargets(
        score_maps.classes,
        excess=pooled[..., :-1],
        floor=pooled[..., -1],
        weight=weight,
        num_classes=score_maps.num_classes,
        grid=grid,
    )


def enough_samples(shape: tuple[int, int], grid: tuple[int, int]) -> int:
    """Return how many samples, per token and axis, read every cell of a map (h, w) of which the view shows all.

    Rounded up to one of 2, 3, 4, 6, 8, 12, 16, ..., so that images of different sizes often share one number.
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
    is_labelled = (score_maps.probs > 0).any(dim=3) | score_maps.empty_is_even[:, None, None]  # [B, H, W]
    # Cells without a label count 0. Multiplying by 1 is exact, and index_select of floats takes a sixth of the time of
    # boolean indexing.
    counts = is_labelled.float().flatten().index_select(0, cells.flatten()).view_as(shares)
    shares = shares * counts
    planes = _planes(score_maps).flatten(0, 2)  # [B * H * W, U + 1]
    # A weighted sum of rows is what embedding_bag computes, without a copy of the rows: [B * N, reads, U + 1].
    sums = F.embedding_bag(cells, planes, per_sample_weights=shares, mode="sum")  # [B * N, U + 1]
    return sums.view(num_images, num_tokens, -1), shares.sum(dim=1).view(num_images, num_tokens)


def _planes(score_maps: ScoreMapBatch) -> Float[Tensor, "B H W planes"]:
    """Return for each map cell the excess of every palette entry, and the floor as the last."""
    kept = score_maps.probs > 0  # [B, H, W, K]
    num_others = score_maps.num_classes - kept.sum(dim=3)
    rest = (1 - score_maps.probs.sum(dim=3)).clamp_min(0)
    floor = torch.where(num_others > 0, rest / num_others.clamp_min(1), 0.0)  # [B, H, W]
    excess = (score_maps.probs - floor[..., None]) * kept
    planes = floor.new_zeros(*floor.shape, score_maps.classes.shape[1] + 1)
    planes[..., -1] = floor
    # Entries that are not kept add 0, wherever their code points.
    return planes.scatter_add_(3, score_maps.codes.long(), excess)


def _cells_of_tokens(
    score_maps: ScoreMapBatch, frames: Float[Tensor, "B F 2 3"], points: Float[Tensor, "2 S N"]
) -> tuple[Int[Tensor, "tokens reads"], Float[Tensor, "tokens reads"]]:
    """Return which map cells each of the B * N tokens reads, and their shares, the weights of the sum over them.

    Every sample reads the four cells around it, bilinearly. Cells are flat indices into [B, H, W].
    """
    height, width = score_maps.codes.shape[1:3]
    num_images, (num_samples, num_tokens) = len(frames), points.shape[1:]
    locations, covered = _sample_locations(score_maps, frames, points)
    before = locations.floor()  # [B, 2, S, N]
    fraction = locations.sub_(before)
    after = (before + 1).minimum(score_maps.sizes[:, :, None, None] - 1)
    x, y = torch.stack([before, after], dim=2).int().unbind(dim=1)  # each [B, 2, S, N]
    share_x, share_y = torch.stack([1 - fraction, fraction], dim=2).unbind(dim=1)
    # int32 halves the memory of the indices, the largest tensors here.
    first = torch.arange(num_images, device=frames.device, dtype=torch.int32) * (height * width)
    rows = y * width + first[:, None, None, None]
    cells = rows[:, :, None] + x[:, None]  # [B, 2, 2, S, N]
    shares = (share_y * covered.to(share_y.dtype).div(num_samples)[:, None])[:, :, None] * share_x[:, None]
    cells, shares = (
        reads.reshape(num_images, -1, num_tokens).transpose(1, 2).reshape(num_images * num_tokens, -1)
        for reads in (cells, shares)
    )
    return cells, shares


def _sample_points(grid: tuple[int, int], samples: int, like: Tensor) -> Float[Tensor, "2 S N"]:
    """Return the points (x, y) of an augmented image at which its tokens are sampled, S = samples**2 a token.

    They have the dtype and the device of `like`.
    """
    h, w = grid
    ends = (torch.arange(side * samples, dtype=like.dtype, device=like.device) for side in grid)
    y, x = ((end + 0.5).div(len(end)).view(-1, samples).T for end in ends)
    shape = (samples, samples, h, w)
    return torch.stack([x[None, :, None, :].expand(shape), y[:, None, :, None].expand(shape)]).view(
        2, samples**2, h * w
    )


def _sample_locations(
    score_maps: ScoreMapBatch, frames: Float[Tensor, "B F 2 3"], points: Float[Tensor, "2 S N"]
) -> tuple[Float[Tensor, "B 2 S N"], Bool[Tensor, "B S N"]]:
    """Return the locations of points of the augmented images on the maps, and which points lie inside all frames.

    Locations (x, y) are in map cells, (0, 0) the centre of the top left one.
    """
    x, y = points
    by_x, by_y, origin = frames[..., None, None].unbind(dim=3)  # each [B, F, 2, 1, 1]
    in_frames = torch.addcmul(torch.addcmul(origin, by_x, x), by_y, y)  # [B, F, 2, S, N], fractions
    sizes = score_maps.sizes[:, :, None, None]
    locations = (in_frames[:, -1] * sizes).sub_(0.5).clamp_min_(0)
    # Last, since it overwrites `in_frames`, one of the largest tensors here.
    covered = in_frames.sub_(0.5).abs_().amax(dim=(1, 2)) <= 0.5 + EDGE_TOLERANCE
    return locations.minimum(sizes - 1), covered


def whole_views(num_images: int, device: torch.device) -> Float[Tensor, "B 1 2 3"]:
    """Return views that show whole images as they are."""
    return torch.eye(2, 3, device=device).expand(num_images, 1, 2, 3)


def image_labels(
    score_maps: ScoreMapBatch,
    views: Float[Tensor, "B F 2 3"],
    class_ids: Int[Tensor, " B"],
    *,
    map_mode: LogitsMode | str = LogitsMode.ZERO,
) -> tuple[Float[Tensor, "B C"], Bool[Tensor, " B"]]:
    """Return one soft label an image: the mean of its map over the part of the teacher's region that the view shows.

    Also return which images show any of it; the label of the others is the ground truth.
    Source: Yun et al., "Re-labeling ImageNet", CVPR 2021.
    """
    pooled = align(score_maps, views, (1, 1), logits=map_mode)
    labels = pooled.dense()[:, 0] / pooled.weight.clamp_min(1e-12)
    return torch.where(pooled.weight > 0, labels, one_hot(class_ids, labels)), pooled.weight[:, 0] > 0


def softened(probs: Float[Tensor, "B C"], temperature: float) -> Float[Tensor, "B C"]:
    """Return the distributions of the same logits divided by a temperature: p ** (1 / temperature), summing to 1."""
    return probs if temperature == 1 else (probs.log() / temperature).softmax(dim=1)


def most_probable(probs: Float[Tensor, "B C"]) -> Float[Tensor, "B C"]:
    """Return one-hot rows of each row's most probable class."""
    return one_hot(probs.argmax(dim=1), probs)


def one_hot(class_ids: Int[Tensor, " B"], like: Float[Tensor, "B C"]) -> Float[Tensor, "B C"]:
    """Return rows of probability 1 for the given classes."""
    return torch.zeros_like(like).scatter_(1, class_ids[:, None], 1.0)
