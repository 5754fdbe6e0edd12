"""Mixing pairs of images: MixToken on the token grid, CutMix on pixels, Mixup by one number for the whole image.

A plan is drawn first; then the model mixes its inputs and `mix_targets` the targets by the same plan. The model mixes
patch embeddings (MixToken with a stem whose patches overlap) or pixels (`mix_images`). A token's target takes the
partner's in the proportion in which its cell shows the partner.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from tokenlabel.core.batch import moved
from tokenlabel.core.config import Mixing
from tokenlabel.core.targets import TokenTargets
from tokenlabel.runtime.coercion import NATURAL, POSITIVE, Size, check_number, coerced, described, pair


@dataclass(frozen=True, eq=False)
class MixPlan:
    """Which part of each image comes from which other image of the batch.

    `mask` [B, rows, columns]: the fraction that comes from the partner, in [0, 1], on a grid of any resolution
    over the image: the token grid for MixToken, pixels for CutMix, 1 x 1 for Mixup.
    `partner` [B]: the index of each image's partner.
    `on_tokens`: the mask lies on the token grid, so a model may apply it to its token embeddings.

    >>> left_half = torch.tensor([[[1.0, 0.0]]]).expand(2, 1, 2)
    >>> plan = tl.MixPlan(left_half, partner=torch.tensor([1, 0]), on_tokens=False)
    >>> plan.partner_fraction((1, 1)).flatten().tolist()
    [0.5, 0.5]
    """

    mask: Float[Tensor, "B rows columns"]
    partner: Int[Tensor, " B"]
    on_tokens: bool

    def __post_init__(self) -> None:
        mask, partner = self.mask, self.partner
        are_tensors = isinstance(mask, Tensor) and isinstance(partner, Tensor) and mask.dtype == torch.float32
        if not are_tensors or mask.ndim != 3 or partner.shape != mask.shape[:1]:
            raise ValueError(
                "a plan needs a mask [B, rows, columns] of float32 and a partner [B] of int64, both tensors; got "
                f"{described(mask)} and {described(partner)}"
            )

    def partner_fraction(self, grid: Size) -> Float[Tensor, "B N"]:
        """Return the fraction of each cell of another grid (h, w) that comes from the partner; (1, 1) for all.

        Exact for any two grids, so that the mean over cells is the share of the image.
        """
        return cell_means(self.mask, pair(grid, name="grid"))

    def to(self, device: torch.device | str) -> MixPlan:
        """Return the plan on another device."""
        return MixPlan(moved(self.mask, device), moved(self.partner, device), self.on_tokens)


def sample_mix(
    mixing: Mixing | str,
    num_images: int,
    *,
    grid: Size,
    img_size: Size,
    alpha: float = 1.0,
    per_sample: bool = False,
    generator: torch.Generator | None = None,
) -> MixPlan | None:
    """Draw a plan for a batch; None for `Mixing.NONE`.

    `mixing`: none, mixtoken, cutmix or mixup. `grid` (h, w) counts tokens, `img_size` (height, width) pixels.
    lambda ~ Beta(alpha, alpha) is the share that an image keeps. The box that it loses has the image's aspect ratio and
    a uniformly random centre, and is clipped at the edges. As published, all images share one draw, and the partners
    are the batch in reverse order; `per_sample` draws both for each image. `generator`: PyTorch's default if None.

    >>> generator = torch.Generator().manual_seed(0)
    >>> tl.sample_mix("mixtoken", 4, grid=14, img_size=224, generator=generator).mask.shape
    torch.Size([4, 14, 14])
    """
    mixing, grid, img_size = Mixing(mixing), pair(grid, name="grid"), pair(img_size)
    if mixing is Mixing.NONE:
        return None
    num_images = coerced(num_images, int, name="num_images")
    check_number(num_images, NATURAL, name="num_images")
    check_number(alpha, POSITIVE, name="alpha")
    # PyTorch samples no Beta distribution from a generator, so its generator seeds NumPy's.
    rng = np.random.default_rng(int(torch.randint(1 << 62, (), generator=generator)))
    draws = num_images if per_sample else 1
    lost = 1 - rng.beta(alpha, alpha, draws)  # [draws]
    match mixing:
        case Mixing.MIXUP:
            mask = lost[:, None, None]
        case Mixing.MIXTOKEN:
            mask = _boxes(lost, grid, rng)
        case Mixing.CUTMIX:
            mask = _boxes(lost, img_size, rng)
    partner = rng.permutation(num_images) if per_sample else np.arange(num_images)[::-1].copy()
    return MixPlan(
        mask=torch.from_numpy(mask.astype(np.float32)).expand(num_images, -1, -1),
        partner=torch.from_numpy(partner),
        on_tokens=mixing is Mixing.MIXTOKEN,
    )


def join_plans(plans: Sequence[MixPlan | None], group_size: int) -> MixPlan | None:
    """Return the plan of a batch of groups of `group_size` images, each mixed within itself by its own plan.

    Plans are of one kind, or CutMix and Mixup; a group without one is not mixed. None where no group is.
    """
    first = next((plan for plan in plans if plan is not None), None)
    if first is None or len(plans) == 1:
        return first
    no_mix = MixPlan(torch.zeros_like(first.mask), torch.arange(group_size), first.on_tokens)
    of_groups = [plan or no_mix for plan in plans]
    rows, columns = (max(plan.mask.shape[axis] for plan in of_groups) for axis in (1, 2))
    return MixPlan(
        mask=torch.cat([plan.mask.expand(-1, rows, columns) for plan in of_groups]),
        partner=torch.cat([plan.partner + i * group_size for i, plan in enumerate(of_groups)]),
        on_tokens=first.on_tokens,
    )


def mix_images(images: Float[Tensor, "B c height width"], plan: MixPlan | None) -> Float[Tensor, "B c height width"]:
    """Mix pixels by the plan, its mask drawn to the size of the images; without one they stay as they are.

    For patches that don't overlap this equals mixing their embeddings (MixToken).

    >>> plan = tl.MixPlan(torch.full((2, 1, 1), 0.5), torch.tensor([1, 0]), on_tokens=False)  # Mixup by halves
    >>> tl.mix_images(torch.tensor([0.0, 1.0]).view(2, 1, 1, 1), plan).flatten()
    tensor([0.5000, 0.5000])
    """
    if plan is None:
        return images
    _check_plan(plan)
    if not (isinstance(images, Tensor) and images.is_floating_point()):
        raise ValueError(f"images: expected normalised images as a tensor, got {described(images)}")
    if len(images) != len(plan.partner):
        raise ValueError(f"the plan is of {len(plan.partner)} images, got {len(images)}")
    mask = F.interpolate(plan.mask[:, None], size=images.shape[2:], mode="nearest-exact").to(images.dtype)
    return images.lerp(images[plan.partner], mask)


def mix_tokens(tokens: Float[Tensor, "B h w D"], plan: MixPlan) -> Float[Tensor, "B h w D"]:
    """Mix token embeddings by a plan on the token grid (MixToken)."""
    if plan.mask.shape[1:] != tokens.shape[1:3]:
        raise ValueError(
            f"the plan's mask is {tuple(plan.mask.shape[1:])}, the token grid {tuple(tokens.shape[1:3])}; "
            "make the plan for the grid that the model reports"
        )
    return tokens.lerp(tokens.index_select(0, plan.partner), plan.mask[..., None].to(tokens.dtype))


def mix_targets(targets: TokenTargets, plan: MixPlan | None, grid: Size) -> TokenTargets:
    """Mix targets on a token grid (h, w) by location; (1, 1) mixes class targets by area.

    >>> plan = tl.MixPlan(torch.full((2, 1, 1), 0.5), torch.tensor([1, 0]), on_tokens=False)  # Mixup by halves
    >>> tl.mix_targets(tl.class_targets([0, 1]), plan, (1, 1)).dense(2)[:, 0]
    tensor([[0.5000, 0.5000],
            [0.5000, 0.5000]])
    """
    if plan is None:
        return targets
    _check_plan(plan)
    if not isinstance(targets, TokenTargets):
        raise ValueError(f"targets: expected what align or class_targets returns, got {described(targets)}")
    if targets.grid not in (None, grid := pair(grid, name="grid")):
        raise ValueError(f"targets on a grid of {targets.grid} tokens (h, w), got the grid {grid}; mix on their own")
    return targets.blended(targets.of_images(plan.partner), plan.partner_fraction(grid))


def _check_plan(plan: MixPlan) -> None:
    if not isinstance(plan, MixPlan):
        raise ValueError(f"plan: expected what sample_mix returns, got {plan!r}")


def _boxes(area: NDArray[np.float64], size: tuple[int, int], rng: np.random.Generator) -> NDArray[np.bool_]:
    """Return masks [draws, rows, columns], true inside a box of (about) the given share of the area."""
    inside = []
    for length in size:  # rows, then columns
        half = (np.sqrt(area) * length).astype(int) // 2  # boxes of an even size, as in the published code
        centre = rng.integers(length, size=len(area))
        index = np.arange(length)
        inside.append((index >= (centre - half)[:, None]) & (index < (centre + half)[:, None]))
    rows, columns = inside
    return rows[:, :, None] & columns[:, None, :]


def cell_means(mask: Float[Tensor, "B rows columns"], grid: tuple[int, int]) -> Float[Tensor, "B N"]:
    """Return the mean of a mask over each cell of a grid (h, w), exact for any two grids."""
    rows, columns = (_overlaps(grid[axis], mask.shape[1 + axis], mask.device).to(mask.dtype) for axis in (0, 1))
    # Autocast would round the shares of targets to half precision.
    with torch.autocast(mask.device.type, enabled=False):
        return (rows @ mask @ columns.T).flatten(1)


def _overlaps(num_cells: int, num_pieces: int, device: torch.device) -> Float[Tensor, "cells pieces"]:
    """Divide a length into equal cells and into equal pieces; return the share of each cell that each piece covers."""
    # In units of 1 / (cells * pieces) all ends are whole numbers.
    cells = num_pieces * torch.arange(num_cells + 1, device=device)
    pieces = num_cells * torch.arange(num_pieces + 1, device=device)
    end, start = torch.minimum(cells[1:, None], pieces[1:]), torch.maximum(cells[:-1, None], pieces[:-1])
    return (end - start).clamp_min(0) / num_pieces
