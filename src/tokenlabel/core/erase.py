"""Random erasing: boxes of noise in normalised images, drawn and filled on the device for a whole batch.

Source: Zhong et al., "Random Erasing Data Augmentation", AAAI 2020; ranges and modes as in timm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from tokenlabel.core.targets import TokenTargets
from tokenlabel.runtime.coercion import Choice, coerced_fields

_NUM_ATTEMPTS = 10  # boxes drawn until one fits into the image


class ErasingMode(Choice):
    """What fills a box: CONST the mean colour, RAND one random colour, PIXEL a random colour for each pixel."""

    CONST = "const"
    RAND = "rand"
    PIXEL = "pixel"


@dataclass(frozen=True, kw_only=True)
@coerced_fields
class ErasingConfig:
    """Whether and how parts of images are erased."""

    probability: float = 0.0
    """Share of the images of which something is erased."""
    mode: ErasingMode = ErasingMode.PIXEL
    """const (the mean colour), rand (one random colour a box) or pixel (one a pixel)."""
    area: tuple[float, float] = (0.02, 1 / 3)
    """Range of the share of the image that is erased."""
    min_aspect: float = 0.3
    """Least height / width of a box; the largest is 1 / min_aspect."""
    max_boxes: int = 1
    """The number of boxes is drawn from 1 to this; they share the area."""
    ignore_erased: bool = False
    """Take erased tokens out of the loss by their erased share; by default they keep their label."""

    def __post_init__(self) -> None:
        low, high = self.area
        if not (0 <= self.probability <= 1 and 0 < low <= high < 1):
            raise ValueError(
                f"erasing needs a probability of 0 to 1 and an area range inside 0 to 1, got {self}"
            )
        if not 0 < self.min_aspect <= 1 or self.max_boxes < 1:
            raise ValueError(
                f"erasing needs a min_aspect above 0 and up to 1 and at least one box, got {self}"
            )


@dataclass(frozen=True, eq=False)
class Erased:
    """Images after erasing, and which pixels show nothing of the image any more."""

    images: Float[Tensor, "B c height width"]
    mask: Bool[Tensor, "B height width"]

    def reweight(self, targets: TokenTargets, grid: tuple[int, int]) -> TokenTargets:
        """Return the targets of a token grid (h, w) with each token's weight lowered by its erased share."""
        share = F.adaptive_avg_pool2d(self.mask[:, None].to(targets.weight.dtype), grid).flatten(1)  # [B, N]
        return targets.scaled(1 - share)


def erase(
    images: Float[Tensor, "B c height width"], config: ErasingConfig, *, generator: torch.Generator
) -> Erased:
    """Fill random boxes of normalised images with (normal) noise, a pure function of its arguments.

    `generator` is on the CPU; the noise itself is drawn on the images' device, from a seed that it gives.
    """
    boxes = draw_boxes(len(images), (images.shape[2], images.shape[3]), config, generator)
    masks = box_masks(
        boxes.to(images.device), (images.shape[2], images.shape[3])
    )  # [boxes, B, height, width]
    seed = int(torch.randint(2**62, (), generator=generator))
    noise = torch.Generator(images.device).manual_seed(seed)
    for mask in masks:
        fill = _fill(images, config.mode, noise)
        images = torch.where(mask[:, None], fill, images)
    return Erased(images, masks.any(dim=0))


def draw_boxes(
    num_images: int, size_px: tuple[int, int], config: ErasingConfig, generator: torch.Generator
) -> Int[Tensor, "boxes B 4"]:
    """Return top, left, height and width of each box in pixels of images of (height, width); 0 high is none."""
    height_px, width_px = size_px
    shape = (config.max_boxes, num_images, _NUM_ATTEMPTS)
    count = torch.randint(1, config.max_boxes + 1, (num_images,), generator=generator)
    area = _uniform(shape, *config.area, generator) * (height_px * width_px) / count[:, None]
    extent = -math.log(config.min_aspect)
    aspect = _uniform(shape, -extent, extent, generator).exp()
    heights, widths = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
    fits = (heights < height_px) & (widths < width_px)  # [boxes, B, attempts]
    first = fits.long().argmax(dim=2, keepdim=True)
    height, width = heights.gather(2, first)[..., 0], widths.gather(2, first)[..., 0]  # [boxes, B]
    chosen = torch.rand(num_images, generator=generator) < config.probability
    there = chosen & fits.any(dim=2) & (torch.arange(config.max_boxes)[:, None] < count)
    top = (torch.rand(height.shape, generator=generator) * (height_px - height + 1)).long()
    left = (torch.rand(width.shape, generator=generator) * (width_px - width + 1)).long()
    return torch.stack([top, left, height, width], dim=2) * there[..., None]


def box_masks(
    boxes: Int[Tensor, "boxes B 4"], size_px: tuple[int, int]
) -> Bool[Tensor, "boxes B height width"]:
    """Return which pixels of images of (height, width) lie in each box."""
    top, left, height, width = boxes.unbind(dim=2)  # each [boxes, B]
    y, x = (torch.arange(side, device=boxes.device) for side in size_px)
    rows = (y >= top[..., None]) & (y < (top + height)[..., None])  # [boxes, B, height]
    columns = (x >= left[..., None]) & (x < (left + width)[..., None])  # [boxes, B, width]
    return rows[..., :, None] & columns[..., None, :]


def _fill(images: Tensor, mode: ErasingMode, noise: torch.Generator) -> Tensor:
    match mode:
        case ErasingMode.CONST:
            return images.new_zeros(())
        case ErasingMode.RAND:
            shape = (*images.shape[:2], 1, 1)
        case ErasingMode.PIXEL:
            shape = images.shape
    return torch.randn(shape, generator=noise, dtype=images.dtype, device=images.device)


def _uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)
