"""Soft labels of whole images: a score map averaged over the part that a view shows, and functions of such labels."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokenlabel.core.align import align
from tokenlabel.core.batch import ScoreMapBatch
from tokenlabel.core.config import LogitsMode
from tokenlabel.core.targets import TokenTargets


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
    labels = pooled.dense(score_maps.num_classes)[:, 0] / pooled.weight.clamp_min(1e-12)
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


def every_class(probs: Float[Tensor, "B C"]) -> TokenTargets:
    """Return distributions over all classes as the targets of one token an image."""
    ones = probs.new_ones(len(probs), 1)
    classes = torch.arange(probs.shape[1], device=probs.device).expand(len(probs), -1)
    return TokenTargets(classes, excess=probs[:, None], floor=torch.zeros_like(ones), weight=ones)
