"""How right predicted masks are: the confusion matrix, the figures that follow, and a model's over pairs of files."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Int, Int16
from torch import Tensor

from tokenlabel.data.batches import make_loader
from tokenlabel.data.samplers import EvalBatchSampler
from tokenlabel.runtime.distributed import Ranks
from tokenlabel.segmentation.classes import IGNORED
from tokenlabel.segmentation.data import SegmentDataset, SegmentSample
from tokenlabel.segmentation.inference import Segmenter
from tokenlabel.segmentation.pairs import ImageMaskPairs

# Images come in lists of this many: their sizes differ, so they are not stacked.
_IMAGES_AT_ONCE = 4


def evaluate_segmentation(
    segmenter: Segmenter,
    pairs: ImageMaskPairs,
    *,
    device: torch.device,
    autocast: AbstractContextManager[Any],
    num_workers: int = 0,
    ranks: Ranks = Ranks(),  # noqa: B008  (immutable)
    on_sample: Callable[[SegmentSample, Int[Tensor, "height width"]], None] = lambda sample, predicted: None,
) -> dict[str, Any]:
    """Return mIoU, mean accuracy and pixel accuracy over all pixels of all images, at the images' own sizes.

    Each rank looks at a share of the images; the counts of all are added, so the figures are those of one process.
    The result also has `num_images`, `images_per_s` (of all ranks together), `class_iou` and `class_accuracy`, by
    name, and `absent_classes`: those that no mask holds. mIoU leaves out those of them that were not predicted either,
    mean accuracy all. `on_sample` is called with each sample of this rank and its predicted classes. The model is left
    in evaluation mode.
    """
    segmenter.model.eval()
    sampler = EvalBatchSampler(
        num_images=len(pairs), batch_size=_IMAGES_AT_ONCE, rank=ranks.rank, world_size=ranks.world_size
    )
    samples: Iterable[Sequence[SegmentSample]] = make_loader(
        SegmentDataset(pairs, None), sampler, num_workers=num_workers, collate_fn=list
    )
    names = pairs.classes.names
    matrix = torch.zeros(len(names), len(names), dtype=torch.long, device=device)
    started = time.perf_counter()
    with autocast:
        for sample in (one for some in samples for one in some):
            predicted = segmenter(sample.image.to(device))
            matrix += confusion(predicted, sample.mask.to(device), len(names))
            on_sample(sample, predicted)
    matrices = ranks.all_gather(matrix.cpu())
    figures = asdict(figures_of(torch.stack(matrices).sum(dim=0)))
    by_class = {kind: dict(zip(names, figures.pop(kind), strict=True)) for kind in ("class_iou", "class_accuracy")}
    absent = [name for name, accuracy in by_class["class_accuracy"].items() if accuracy is None]
    seconds = time.perf_counter() - started
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
    """Return how many pixels of each true class (rows) were predicted as each class (columns).

    Pixels whose true class is -1 don't count.
    """
    counts = truth != IGNORED
    # A number for each pair of classes, so that one bincount makes the matrix.
    pairs = truth[counts].long() * num_classes + predicted[counts].long()
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


@dataclass(frozen=True, kw_only=True)
class SegmentFigures:
    """Figures over the pixels of all images together; shares are in [0, 1].

    `class_iou` and `class_accuracy` hold None for classes that neither occur nor were predicted (that do not occur);
    the means leave these out.
    """

    miou: float
    mean_accuracy: float
    pixel_accuracy: float
    class_iou: list[float | None]
    class_accuracy: list[float | None]


def figures_of(matrix: Int[Tensor, "C C"]) -> SegmentFigures:
    """Return intersection over union, accuracy by class and of all pixels, from a confusion matrix.

    Raises ValueError if no pixel counts.
    """
    if not int(matrix.sum()):
        raise ValueError("no pixel of these masks has a class that counts")
    right, true, predicted = matrix.diag().tolist(), matrix.sum(dim=1).tolist(), matrix.sum(dim=0).tolist()
    unions = [t + p - r for r, t, p in zip(right, true, predicted, strict=True)]
    class_iou = [r / union if union else None for r, union in zip(right, unions, strict=True)]
    class_accuracy = [r / t if t else None for r, t in zip(right, true, strict=True)]
    return SegmentFigures(
        miou=_mean(class_iou),
        mean_accuracy=_mean(class_accuracy),
        pixel_accuracy=sum(right) / sum(true),
        class_iou=class_iou,
        class_accuracy=class_accuracy,
    )


def _mean(shares: list[float | None]) -> float:
    known = [share for share in shares if share is not None]
    return sum(known) / len(known)
