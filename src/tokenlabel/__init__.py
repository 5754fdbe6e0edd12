"""Train vision models with token labeling: one soft label for every output token.

Names of axes: B images of a batch, N = h * w tokens in a grid of h rows and w columns, H and W rows and columns
of a score map, D width of a token, C classes, K classes kept in a cell of a score map, U entries of a palette.
Points and boxes are (x, y) in fractions of an image; sizes in pixels are (height, width) where tensors are
meant and say so where they are not. *Labels* are ground truth, *scores* come from a teacher, *targets* train,
*logits* leave the model.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenlabel.data.augment import AugmentConfig, TrainTransform
    from tokenlabel.data.batches import (
        BatchSampler,
        TokenLabelDataset,
        collate,
        make_loader,
        normalize_images,
    )
    from tokenlabel.data.sources import open_images
    from tokenlabel.labels.store import LabelStore, LabelStoreWriter
    from tokenlabel.method.alignment import align, collate_score_maps
    from tokenlabel.method.geometry import Box, View, stack_views
    from tokenlabel.method.losses import sparse_cross_entropy, token_label_loss
    from tokenlabel.method.mixing import MixPlan, mix_images, mix_targets, sample_mix
    from tokenlabel.method.scores import ScoreMap
    from tokenlabel.method.targets import TokenTargets, class_targets
    from tokenlabel.models import Outputs, create_model
    from tokenlabel.teachers.annotation import AnnotateConfig, annotate

# Public names and where they live: imported when first asked for, so that reading a store takes no torch.
_HOMES = {
    "method.alignment": ("align", "collate_score_maps"),
    "teachers.annotation": ("AnnotateConfig", "annotate"),
    "data.augment": ("AugmentConfig", "TrainTransform"),
    "data.batches": ("BatchSampler", "TokenLabelDataset", "collate", "make_loader", "normalize_images"),
    "method.geometry": ("Box", "View", "stack_views"),
    "method.losses": ("sparse_cross_entropy", "token_label_loss"),
    "method.mixing": ("MixPlan", "mix_images", "mix_targets", "sample_mix"),
    "models": ("Outputs", "create_model"),
    "method.scores": ("ScoreMap",),
    "data.sources": ("open_images",),
    "labels.store": ("LabelStore", "LabelStoreWriter"),
    "method.targets": ("TokenTargets", "class_targets"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AnnotateConfig",
    "AugmentConfig",
    "BatchSampler",
    "Box",
    "LabelStore",
    "LabelStoreWriter",
    "MixPlan",
    "Outputs",
    "ScoreMap",
    "TokenLabelDataset",
    "TokenTargets",
    "TrainTransform",
    "View",
    "align",
    "annotate",
    "class_targets",
    "collate",
    "collate_score_maps",
    "create_model",
    "make_loader",
    "mix_images",
    "mix_targets",
    "normalize_images",
    "open_images",
    "sample_mix",
    "sparse_cross_entropy",
    "stack_views",
    "token_label_loss",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"tokenlabel.{_HOME_OF[name]}"), name)
