"""Predict the class of every pixel of an image of any size, and evaluate the predictions: mIoU and accuracies.

Images are seen as a whole or through sliding windows, at one or several scales, and mirrored if asked.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int, Int16, UInt8
from torch import Tensor
from torch.nn import functional as F

from tokenlabel.core.batch import normalize_images
from tokenlabel.data.batches import make_loader
from tokenlabel.data.config import Interpolation
from tokenlabel.data.resampling import resize
from tokenlabel.data.samplers import EvalBatchSampler
from tokenlabel.models.load import LoadedModel
from tokenlabel.models.segmentation import SegmentationModel
from tokenlabel.runtime.coercion import Size, pair
from tokenlabel.runtime.distributed import Ranks
from tokenlabel.runtime.errors import OutputError
from tokenlabel.segmentation.data import SegmentDataset, SegmentSample, fitted_size
from tokenlabel.segmentation.pairs import IGNORED, ImageMaskPairs
from tokenlabel.segmentation.recipe import SegmentEvalConfig

# Classes whose logits are resized to the image at once: bounds the memory of a large photograph.
_CLASSES_AT_ONCE = 16
# Images of a batch of evaluation. They are lists, not tensors, as sizes differ.
_IMAGES_AT_ONCE = 4


class Segmenter:
    """A model and how it sees images. `window_px`: (height, width) of the sliding windows."""

    def __init__(self, model: SegmentationModel, config: SegmentEvalConfig, *, window_px: Size) -> None:
        self.model, self.config, self.window_px = model, config, pair(window_px, name="window_px")
        down, across = self.window_px
        self.stride_px = config.stride_px or (max(1, down * 2 // 3), max(1, across * 2 // 3))
        if config.mode == "slide" and (self.stride_px[0] > down or self.stride_px[1] > across):
            raise ValueError(
                f"windows of {down} x {across} px at a stride of {self.stride_px[0]} x {self.stride_px[1]} px leave "
                "pixels out; choose a stride of no more than the window"
            )

    @torch.inference_mode()
    def __call__(self, image: UInt8[Tensor, "3 height width"], *, name: str = "image") -> Int[Tensor, "height width"]:
        """Return the most probable class of each pixel of an RGB image, on the image's device.

        Raises OutputError with the image's `name` for outputs that are not finite.
        """
        views = [logits.float() for logits in self.views(image)]
        if not all(logits.isfinite().all() for logits in views):  # class 0 would be the most probable one
            raise OutputError(f"{name}: the outputs of the network for this image are not finite")
        return most_probable(views, (image.shape[1], image.shape[2]))

    @torch.inference_mode()
    def probabilities(
        self, image: UInt8[Tensor, "3 height width"], grid: tuple[int, int] | None = None
    ) -> Float[Tensor, "h w C"]:
        """Return class probabilities in each cell of a grid over an RGB image, in float32, on the image's device.

        They are means over the pixels of a cell and over the views. `grid`: (rows, columns), by default that of the
        model's head (`grid_of`). `from_probabilities` makes a score map of them.
        """
        grid = grid or self.grid_of((image.shape[1], image.shape[2]))
        pooled = [F.adaptive_avg_pool2d(logits.float().softmax(dim=0), grid) for logits in self.views(image)]
        return torch.stack(pooled).mean(dim=0).permute(1, 2, 0)

    def grid_of(self, size_px: tuple[int, int]) -> tuple[int, int]:
        """Return the (rows, columns) of the head's output for an image of (height, width) seen as a whole."""
        scaled = fitted_size(size_px, self.config.short_side_px, max_aspect=self.config.max_aspect)
        height, width = (-(-side // cell) for side, cell in zip(scaled, self._cell_px, strict=True))
        return max(1, int(height)), max(1, int(width))

    @cached_property  # it runs the model
    def _cell_px(self) -> tuple[float, float]:
        """Height and width of a cell of the head's grid, in pixels of the model's input."""
        multiple = self.model.multiple_px
        height, width = (side + -side % multiple for side in self.window_px)
        rows, columns = self.model.grid_for((height, width))
        return height / rows, width / columns

    def views(self, image: UInt8[Tensor, "3 height width"]) -> Iterator[Float[Tensor, "C _ _"]]:
        """Yield the logits of the image at each scale, and mirrored, each at its own size."""
        model, config = self.model, self.config
        pixels = image.permute(1, 2, 0).cpu().contiguous().numpy()
        for scale in config.scales:
            size_px = fitted_size(pixels.shape[:2], config.short_side_px, max_aspect=config.max_aspect, factor=scale)
            scaled = pixels if size_px == pixels.shape[:2] else resize(pixels, size_px, Interpolation.BILINEAR)
            batch = torch.from_numpy(scaled).permute(2, 0, 1)[None].to(image.device)
            images = normalize_images(batch, mean=model.mean, std=model.std)
            yield self._logits(images)[0]
            if config.flip:
                yield self._logits(images.flip(3))[0].flip(2)

    def _logits(self, images: Float[Tensor, "1 3 height width"]) -> Float[Tensor, "1 C height width"]:
        if self.config.mode == "whole":
            return whole_logits(self.model, images)
        windows_at_once = self.config.windows_at_once
        return slide_logits(
            self.model, images, window_px=self.window_px, stride_px=self.stride_px, windows_at_once=windows_at_once
        )


def segmenter_of(network: LoadedModel, device: torch.device) -> Segmenter:
    """Return the model of a run, moved to `device`, as a Segmenter by the run's recipe."""
    return Segmenter(network.model.to(device), network.recipe.eval, window_px=network.img_size)


def whole_logits(
    model: SegmentationModel, images: Float[Tensor, "B 3 height width"]
) -> Float[Tensor, "B C height width"]:
    """Return the logits of each pixel of normalised images, each seen as a whole.

    Images are padded at the right and bottom to multiples of `model.multiple_px`.
    """
    height, width = images.shape[2:]
    multiple = model.multiple_px
    filled = F.pad(images, (0, -width % multiple, 0, -height % multiple))  # 0 is the mean colour of normalised images
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
    """Return the logits of each pixel of a normalised image: the mean over the windows that contain it.

    Windows of (height, width) are `stride_px` (down, across) apart; the last ones end where the image ends.
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

    `views`: logits of the image at any sizes. Each view is resized to the image, then probabilities are averaged.
    """

    def _resized(view: Tensor, group: slice) -> Tensor:
        if view.shape[1:] == size_px:
            return view[group]
        return F.interpolate(view[None, group], size=size_px, mode="bilinear", align_corners=False)[0]

    device, num_classes = views[0].device, views[0].shape[0]
    # In groups of classes: all of them at the size of a photograph would take gigabytes.
    groups = [slice(start, start + _CLASSES_AT_ONCE) for start in range(0, num_classes, _CLASSES_AT_ONCE)]
    best = torch.full(size_px, -torch.inf, device=device)
    classes = torch.zeros(size_px, dtype=torch.long, device=device)
    log_sums = []  # the softmax denominators; one view is ranked by its logits alone
    for view in views if len(views) > 1 else ():
        log_sum = torch.full(size_px, -torch.inf, device=device)
        for group in groups:
            log_sum = torch.logaddexp(log_sum, _resized(view, group).logsumexp(dim=0))
        log_sums.append(log_sum)
    for group in groups:
        scores = _resized(views[0], group)
        if log_sums:  # added one by one, so that only two views of a group are in memory
            scores = (scores - log_sums[0]).exp()
            for view, log_sum in zip(views[1:], log_sums[1:], strict=True):
                scores += (_resized(view, group) - log_sum).exp()
        highest, place = scores.max(dim=0)
        better = highest > best
        best = torch.where(better, highest, best)
        classes = torch.where(better, place + group.start, classes)
    return classes


def evaluate_segmentation(
    segmenter: Segmenter,
    pairs: ImageMaskPairs,
    *,
    autocast: AbstractContextManager[Any],
    num_workers: int = 0,
    ranks: Ranks = Ranks(),  # noqa: B008  (immutable)
    on_sample: Callable[[SegmentSample, Int[Tensor, "height width"]], object] = lambda sample, predicted: None,
) -> dict[str, Any]:
    """Return mIoU, mean accuracy and pixel accuracy over all pixels of all images, at the images' own sizes.

    Ranks share the images, and their counts are summed: the figures are those of one process. Beside the entries of
    `figures_of` the result has `num_images`, `images_per_s` (of all ranks together), `absent_classes` (in no mask),
    and `class_iou` and `class_accuracy` by class name. `on_sample` is called with each sample of this rank and its
    predicted classes. Leaves the model in evaluation mode. Raises OutputError, on all ranks, see `Segmenter`.
    """
    device = next(segmenter.model.eval().parameters()).device
    sampler = EvalBatchSampler(
        num_images=len(pairs), batch_size=_IMAGES_AT_ONCE, rank=ranks.rank, world_size=ranks.world_size
    )
    samples: Iterable[Sequence[SegmentSample]] = make_loader(
        SegmentDataset(pairs, None), sampler, num_workers=num_workers, collate_fn=list
    )
    names = pairs.classes.names
    matrix = torch.zeros(len(names), len(names), dtype=torch.long, device=device)
    started = time.perf_counter()
    bad = list[str]()
    with autocast:
        for sample in (one for some in samples for one in some):
            try:
                predicted = segmenter(sample.image.to(device), name=sample.key)
            except OutputError as error:
                bad.append(str(error))
                continue
            matrix += confusion(predicted, sample.mask.to(device), len(names))
            on_sample(sample, predicted)
    if every := [line for lines in ranks.all_gather(bad) for line in lines]:
        raise OutputError(f"{every[0]} ({len(every):,} of {len(pairs):,} images)")
    figures = figures_of(torch.stack(ranks.all_gather(matrix.cpu())).sum(dim=0))
    seconds = time.perf_counter() - started
    by_class = {kind: dict(zip(names, figures.pop(kind), strict=True)) for kind in ("class_iou", "class_accuracy")}
    absent = [name for name, accuracy in by_class["class_accuracy"].items() if accuracy is None]
    return {
        "num_images": len(pairs),
        "images_per_s": len(pairs) / seconds,
        **figures,
        "absent_classes": absent,
        **by_class,
    }


def confusion(
    predicted: Int[Tensor, "*places"], truth: Int16[Tensor, "*places"], num_classes: int
) -> Int[Tensor, "C C"]:
    """Return how many pixels of each true class (rows) were predicted as each class (columns), without ignored ones."""
    counts = truth != IGNORED
    # A number for each pair of classes, so that one bincount makes the matrix.
    pairs = truth[counts].long() * num_classes + predicted[counts].long()
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def figures_of(matrix: Int[Tensor, "C C"]) -> dict[str, Any]:
    """Return `miou`, `mean_accuracy`, `pixel_accuracy`, `class_iou` and `class_accuracy` of a confusion matrix.

    All are in [0, 1]. The IoU of a class that neither occurs nor is predicted is None, as is the accuracy of one that
    does not occur; means leave these out. Raises ValueError for a matrix of zeros.
    """
    if not int(matrix.sum()):
        raise ValueError("no pixel of these masks has a class that counts")
    right, true, predicted = matrix.diag().tolist(), matrix.sum(dim=1).tolist(), matrix.sum(dim=0).tolist()
    unions = [t + p - r for r, t, p in zip(right, true, predicted, strict=True)]
    class_iou = [r / union if union else None for r, union in zip(right, unions, strict=True)]
    class_accuracy = [r / t if t else None for r, t in zip(right, true, strict=True)]
    means = []
    for shares in (class_iou, class_accuracy):
        known = [share for share in shares if share is not None]
        means.append(sum(known) / len(known))
    return {
        "miou": means[0],
        "mean_accuracy": means[1],
        "pixel_accuracy": sum(right) / sum(true),
        "class_iou": class_iou,
        "class_accuracy": class_accuracy,
    }
