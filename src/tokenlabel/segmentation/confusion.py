"""How right masks are: which classes are taken for which, and the figures that follow."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int, Int16
from torch import Tensor

from tokenlabel.segmentation.classes import IGNORED


def confusion(
    predicted: Int[Tensor, "*places"], truth: Int16[Tensor, "*places"], num_classes: int
) -> Int[Tensor, "C C"]:
    """Return how many pixels of each true class (rows) were predicted as each class (columns).

    Pixels whose true class is -1 don't count.
    """
    counts = truth != IGNORED
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
