"""Random erasing: boxes of noise in normalised images, drawn and filled on the device for a whole batch.

Source: Zhong et al., "Random Erasing Data Augmentation", AAAI 2020; ranges and modes as in timm.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokenlabel.core.config import ErasingConfig, ErasingMode

_NUM_ATTEMPTS = 10  # boxes drawn until one fits into the image
_MIN_ASPECT = 0.3  # least height / width of a box; the largest is its inverse


def erase(
    images: Float[Tensor, "B c height width"], config: ErasingConfig, *, generator: torch.Generator
) -> tuple[Float[Tensor, "B c height width"], Bool[Tensor, "B height width"]]:
    """Fill random boxes of normalised images; return new images, and which pixels were erased.

    `generator` is on the CPU; the noise is drawn on the images' device, seeded from it.
    """
    boxes = draw_boxes(len(images), (images.shape[2], images.shape[3]), config, generator)
    masks = box_masks(boxes.to(images.device), (images.shape[2], images.shape[3]))  # [boxes, B, height, width]
    seed = int(torch.randint(2**62, (), generator=generator))
    noise = torch.Generator(images.device).manual_seed(seed)
    for mask in masks:
        fill = _fill(images, config.mode, noise)
        images = torch.where(mask[:, None], fill, images)
    return images, masks.any(dim=0)


def draw_boxes(
    num_images: int, img_size: tuple[int, int], config: ErasingConfig, generator: torch.Generator
) -> Int[Tensor, "boxes B 4"]:
    """Return top, left, height and width of each box in pixels of images of (height, width); height 0 means no box."""
    height_px, width_px = img_size
    shape = (config.max_boxes, num_images, _NUM_ATTEMPTS)
    count = torch.randint(1, config.max_boxes + 1, (num_images,), generator=generator)
    area = _uniform(shape, *config.area, generator) * (height_px * width_px) / count[:, None]
    extent = -math.log(_MIN_ASPECT)
    aspect = _uniform(shape, -extent, extent, generator).exp()
    heights, widths = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
    fits = (heights < height_px) & (widths < width_px)  # [boxes, B, attempts]
    # Draw all attempts at once, then take the first that fits: argmax returns the first True.
    first = fits.long().argmax(dim=2, keepdim=True)
    height, width = heights.gather(2, first)[..., 0], widths.gather(2, first)[..., 0]  # [boxes, B]
    chosen = torch.rand(num_images, generator=generator) < config.probability
    there = chosen & fits.any(dim=2) & (torch.arange(config.max_boxes)[:, None] < count)
    top = (torch.rand(height.shape, generator=generator) * (height_px - height + 1)).long()
    left = (torch.rand(width.shape, generator=generator) * (width_px - width + 1)).long()
    return torch.stack([top, left, height, width], dim=2) * there[..., None]


def box_masks(boxes: Int[Tensor, "boxes B 4"], img_size: tuple[int, int]) -> Bool[Tensor, "boxes B height width"]:
    """Return which pixels of images of (height, width) lie in each box."""
    top, left, height, width = boxes.unbind(dim=2)  # each [boxes, B]
    y, x = (torch.arange(side, device=boxes.device) for side in img_size)
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
