"""Mixing two images: MixToken on the token grid, CutMix on pixels, Mixup by one number.

A plan is made outside the model. Whoever mixes inputs (the model for MixToken with an overlapping patch
embedding, `mix_images` for everything else) and whoever mixes targets follow the same plan, by place: a token
takes its partner's target by the part of its cell that shows the partner.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from tokenlabel.targets import TokenTargets


class Mixing(StrEnum):
    """Which mix to draw. MixToken: Jiang et al. 2021, section 3.2; CutMix: Yun et al. 2019; Mixup: Zhang et al. 2018."""

    NONE = "none"
    MIXTOKEN = "mixtoken"
    CUTMIX = "cutmix"
    MIXUP = "mixup"


@dataclass(frozen=True, eq=False)
class MixPlan:
    """Which part of each image comes from which other image of the batch.

    `mask` [B, rows, columns]: the fraction that comes from the partner, in [0, 1], on a grid of any fineness laid
    over the image: the token grid for MixToken, pixels for CutMix, 1 x 1 for Mixup.
    `partner` [B]: the index of each image's partner.
    `on_tokens`: the mask lies on the token grid, so a model may apply it to its token embeddings.
    """

    mask: Float[Tensor, "B rows columns"]
    partner: Int[Tensor, " B"]
    on_tokens: bool

    def share(self, grid: tuple[int, int]) -> Float[Tensor, "B N"]:
        """Return the fraction of each cell of another grid (h, w) that comes from the partner; (1, 1) for all."""
        return F.adaptive_avg_pool2d(self.mask, grid).flatten(1)


def sample_mix(
    mixing: Mixing,
    num_images: int,
    *,
    grid: tuple[int, int],
    size_px: tuple[int, int],
    alpha: float = 1.0,
    per_sample: bool = False,
    generator: torch.Generator,
) -> MixPlan | None:
    """Draw a plan for a batch; None for `Mixing.NONE`.

    `grid` (h, w) counts tokens, `size_px` (height, width) pixels. lambda ~ Beta(alpha, alpha) is the share that an
    image keeps; the box that it loses has its aspect, any centre, and is cut at the edges. As published, one draw
    serves the whole batch and its reverse is the partner; `per_sample` draws both anew for each image.
    """
    if mixing is Mixing.NONE:
        return None
    draws = num_images if per_sample else 1
    lost = 1 - _beta(alpha, draws, generator)  # [draws]
    match mixing:
        case Mixing.MIXUP:
            mask = lost[:, None, None]
        case Mixing.MIXTOKEN:
            mask = _boxes(lost, grid, generator)
        case Mixing.CUTMIX:
            mask = _boxes(lost, size_px, generator)
    reverse = torch.arange(num_images - 1, -1, -1)
    partner = torch.randperm(num_images, generator=generator) if per_sample else reverse
    return MixPlan(mask.expand(num_images, -1, -1), partner, on_tokens=mixing is Mixing.MIXTOKEN)


def mix_images(images: Float[Tensor, "B c height width"], plan: MixPlan) -> Float[Tensor, "B c height width"]:
    """Mix pixels by the plan, its mask drawn to the size of the images.

    For patches that don't overlap this equals mixing their embeddings (MixToken).
    """
    mask = F.interpolate(plan.mask[:, None], size=images.shape[2:], mode="nearest-exact").to(images.dtype)
    return images.lerp(images[plan.partner], mask)


def mix_tokens(tokens: Float[Tensor, "B h w D"], plan: MixPlan) -> Float[Tensor, "B h w D"]:
    """Mix token embeddings by a plan on the token grid (MixToken)."""
    if plan.mask.shape[1:] != tokens.shape[1:3]:
        raise ValueError(
            f"the plan's mask is {tuple(plan.mask.shape[1:])}, the token grid {tuple(tokens.shape[1:3])}; "
            "make the plan for the grid that the model reports"
        )
    return tokens.lerp(tokens[plan.partner], plan.mask[..., None].to(tokens.dtype))


def mix_targets(targets: TokenTargets, plan: MixPlan | None, grid: tuple[int, int]) -> TokenTargets:
    """Mix targets on a token grid (h, w) by place; (1, 1) mixes class targets by area."""
    if plan is None:
        return targets
    return targets.blended(targets.of_images(plan.partner), plan.share(grid))


def _beta(alpha: float, count: int, generator: torch.Generator) -> Float[Tensor, " count"]:
    """Draw from Beta(alpha, alpha), as a ratio of gamma variates from the given generator."""
    gammas = torch._standard_gamma(torch.full((count, 2), float(alpha)), generator=generator)
    return gammas[:, 0] / gammas.sum(dim=1)


def _boxes(
    area: Float[Tensor, " draws"], size: tuple[int, int], generator: torch.Generator
) -> Float[Tensor, "draws rows columns"]:
    """Return masks that are 1 inside a box of (about) the given share of the area and 0 outside."""
    masks = []
    for length in size:  # rows, then columns
        half = (area.sqrt() * length).floor().div(2, rounding_mode="floor")
        centre = torch.randint(length, area.shape, generator=generator)
        place = torch.arange(length)
        inside = (place >= (centre - half)[:, None]) & (place < (centre + half)[:, None])
        masks.append(inside.float())
    rows, columns = masks
    return rows[:, :, None] * columns[:, None, :]
