"""The class of every pixel of an image of any size: whole or by sliding windows, at several scales, flipped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn import functional as F

from tokenlabel.core.batch import normalize_images
from tokenlabel.data.config import Interpolation
from tokenlabel.data.resampling import resize
from tokenlabel.models.load import LoadedModel
from tokenlabel.models.segmentation import SegmentationModel
from tokenlabel.runtime.coercion import Size, pair
from tokenlabel.segmentation.augment import fitted_size
from tokenlabel.segmentation.recipe import SegmentEvalConfig

# Classes whose logits are made as large as the image at once: what bounds the memory that a large photo takes.
_CLASSES_AT_ONCE = 16


class Segmenter:
    """A model with a way to look at images. `window_px`: (height, width) of the windows that it slides."""

    def __init__(self, model: SegmentationModel, config: SegmentEvalConfig, *, window_px: Size) -> None:
        self.model, self.config, self.window_px = model, config, pair(window_px, name="window_px")
        down, across = self.window_px
        self.stride_px = config.stride_px or (max(1, down * 2 // 3), max(1, across * 2 // 3))
        if config.mode == "slide" and (self.stride_px[0] > down or self.stride_px[1] > across):
            raise ValueError(
                f"windows of {down} x {across} px that lie {self.stride_px[0]} and {self.stride_px[1]} px apart leave "
                "pixels out; choose a stride of no more than the window"
            )

    @torch.inference_mode()
    def __call__(self, image: UInt8[Tensor, "3 height width"]) -> Int[Tensor, "height width"]:
        """Return the most probable class of every pixel of an RGB image, on the image's device."""
        size_px = (image.shape[1], image.shape[2])
        return most_probable([logits.float() for logits in self.views(image)], size_px)

    @torch.inference_mode()
    def probabilities(
        self, image: UInt8[Tensor, "3 height width"], grid: tuple[int, int] | None = None
    ) -> Float[Tensor, "h w C"]:
        """Return the distribution over classes in each cell of a grid over an RGB image, in float32, on its device.

        The mean over the pixels of a cell, and over the views. `grid`: (rows, columns); by default the head's own
        (see `grid_of`). `from_probabilities` makes a score map of it.
        """
        grid = grid or self.grid_of((image.shape[1], image.shape[2]))
        pooled = [F.adaptive_avg_pool2d(logits.float().softmax(dim=0), grid) for logits in self.views(image)]
        return torch.stack(pooled).mean(dim=0).permute(1, 2, 0)

    def grid_of(self, size_px: tuple[int, int]) -> tuple[int, int]:
        """Return the (rows, columns) that the head ends on for an image of (height, width), looked at in one piece."""
        scaled = fitted_size(size_px, self.config.short_side_px, max_aspect=self.config.max_aspect)
        height, width = (-(-side // cell) for side, cell in zip(scaled, self._cell_px, strict=True))
        return max(1, int(height)), max(1, int(width))

    @cached_property
    def _cell_px(self) -> tuple[float, float]:
        """Height and width of a cell of the head's grid, in pixels of what the model looks at."""
        multiple = self.model.multiple_px
        height, width = (side + -side % multiple for side in self.window_px)
        rows, columns = self.model.grid_for((height, width))
        return height / rows, width / columns

    def views(self, image: UInt8[Tensor, "3 height width"]) -> Iterator[Float[Tensor, "C _ _"]]:
        """Yield the logits of the image at each scale, and mirrored, each in its own size."""
        pixels = image.permute(1, 2, 0).cpu().contiguous().numpy()
        for scale in self.config.scales:
            size_px = fitted_size(
                pixels.shape[:2], self.config.short_side_px, max_aspect=self.config.max_aspect, factor=scale
            )
            scaled = pixels if size_px == pixels.shape[:2] else resize(pixels, size_px, Interpolation.BILINEAR)
            batch = torch.from_numpy(scaled).permute(2, 0, 1)[None].to(image.device)
            images = normalize_images(batch, mean=self.model.mean, std=self.model.std)
            yield self.logits(images)[0]
            if self.config.flip:
                yield self.logits(images.flip(3))[0].flip(2)

    def logits(self, images: Float[Tensor, "1 3 height width"]) -> Float[Tensor, "1 C height width"]:
        """Return the logits of every pixel of a normalised image, by the configured mode."""
        if self.config.mode == "whole":
            return whole_logits(self.model, images)
        return slide_logits(
            self.model,
            images,
            window_px=self.window_px,
            stride_px=self.stride_px,
            windows_at_once=self.config.windows_at_once,
        )


def segmenter_of(network: LoadedModel, device: torch.device) -> Segmenter:
    """Return the model of a run, moved to a device, with the way in which its recipe looks at images."""
    return Segmenter(network.model.to(device), network.recipe.eval, window_px=network.img_size)


def whole_logits(
    model: SegmentationModel, images: Float[Tensor, "B 3 height width"]
) -> Float[Tensor, "B C height width"]:
    """Return the logits of every pixel of normalised images, each looked at as a whole.

    Images are filled up to what the model does not cut, at the right and at the bottom, with the mean colour.
    """
    height, width = images.shape[2:]
    multiple = model.multiple_px
    filled = F.pad(images, (0, -width % multiple, 0, -height % multiple))
    logits = model(filled).logits
    logits = F.interpolate(logits, size=filled.shape[2:], mode="bilinear", align_corners=False)
    return logits[:, :, :height, :width]


def slide_logits(
    model: SegmentationModel,
    images: Float[Tensor, "1 3 height width"],
    *,
    window_px: tuple[int, int],
    stride_px: tuple[int, int],
    windows_at_once: int = 1,
) -> Float[Tensor, "1 C height width"]:
    """Return the logits of every pixel of a normalised image: the mean over the windows that show it.

    Windows of (height, width) lie `stride_px` (down, across) apart; the last ones end where the image ends.
    """
    height, width = images.shape[2:]
    size = (min(window_px[0], height), min(window_px[1], width))
    corners = [
        (top, left)
        for top in window_starts(height, size[0], stride_px[0])
        for left in window_starts(width, size[1], stride_px[1])
    ]
    total, seen = None, images.new_zeros(1, 1, height, width)
    for start in range(0, len(corners), windows_at_once):
        some = corners[start : start + windows_at_once]
        windows = torch.cat([images[:, :, top : top + size[0], left : left + size[1]] for top, left in some])
        found = whole_logits(model, windows).float()  # [windows, C, size]
        if total is None:
            total = found.new_zeros(1, found.shape[1], height, width)
        for logits, (top, left) in zip(found, some, strict=True):
            total[0, :, top : top + size[0], left : left + size[1]] += logits
            seen[0, 0, top : top + size[0], left : left + size[1]] += 1
    assert total is not None
    return total / seen  # logits, not probabilities, are averaged, as published


def window_starts(length_px: int, window_px: int, stride_px: int) -> list[int]:
    """Return where windows along one side start so that they cover it; the last ends where the side ends."""
    num_windows = -(-max(0, length_px - window_px) // stride_px) + 1
    return [min(i * stride_px, max(0, length_px - window_px)) for i in range(num_windows)]


def most_probable(views: Sequence[Float[Tensor, "C _ _"]], size_px: tuple[int, int]) -> Int[Tensor, "height width"]:
    """Return the most probable class of each pixel of an image of `size_px` (height, width).

    `views`: logits of the image in any sizes. Each view is resized to the image's, then probabilities are averaged.
    Works through the classes in groups: all classes in the size of a photo would take gigabytes.
    """
    groups = [slice(start, start + _CLASSES_AT_ONCE) for start in range(0, views[0].shape[0], _CLASSES_AT_ONCE)]
    log_sums = [None] * len(views) if len(views) == 1 else [_log_sum(view, groups, size_px) for view in views]
    best = torch.full(size_px, -torch.inf, device=views[0].device)
    classes = torch.zeros(size_px, dtype=torch.long, device=views[0].device)
    for group in groups:
        scores = torch.zeros(())
        for view, log_sum in zip(views, log_sums, strict=True):
            logits = _enlarged(view[group], size_px)
            # One view is ranked by its logits alone; several by the sum of their probabilities.
            scores = logits if log_sum is None else scores.to(logits) + (logits - log_sum).exp()
        highest, place = scores.max(dim=0)
        better = highest > best
        best = torch.where(better, highest, best)
        classes = torch.where(better, place + group.start, classes)
    return classes


def _log_sum(
    view: Float[Tensor, "C h w"], groups: Sequence[slice], size_px: tuple[int, int]
) -> Float[Tensor, "height width"]:
    """Return the logarithm of the sum of a view's exponentials over all classes, in the size of the image."""
    total = torch.full(size_px, -torch.inf, device=view.device)
    for group in groups:
        total = torch.logaddexp(total, _enlarged(view[group], size_px).logsumexp(dim=0))
    return total


def _enlarged(view: Float[Tensor, "C h w"], size_px: tuple[int, int]) -> Float[Tensor, "C height width"]:
    if view.shape[1:] == size_px:
        return view
    return F.interpolate(view[None], size=size_px, mode="bilinear", align_corners=False)[0]
