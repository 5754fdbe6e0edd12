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
    from tokenlabel.core.align import align
    from tokenlabel.core.batch import collate_score_maps, normalize_images
    from tokenlabel.core.config import (
        ClassTarget,
        ErasingConfig,
        ErasingMode,
        Extent,
        Inference,
        LogitsMode,
        Mixing,
        TokenChoice,
    )
    from tokenlabel.core.geometry import Box, View, stack_views
    from tokenlabel.core.losses import sparse_cross_entropy, token_label_loss
    from tokenlabel.core.mix import MixPlan, mix_images, mix_targets, sample_mix
    from tokenlabel.core.outputs import Outputs
    from tokenlabel.core.scores import Kind, ScoreMap
    from tokenlabel.core.targets import TokenTargets, class_targets
    from tokenlabel.data.augment import EvalTransform, TrainTransform
    from tokenlabel.data.batches import TokenLabelDataset, collate, make_loader
    from tokenlabel.data.config import AugmentConfig, Interpolation, Order
    from tokenlabel.data.decoding import ImageCheck, check_images
    from tokenlabel.data.samplers import BatchSampler
    from tokenlabel.data.sources import open_images
    from tokenlabel.labels.encoding import Encoding
    from tokenlabel.labels.manifest import Manifest
    from tokenlabel.labels.store import LabelStore
    from tokenlabel.labels.writer import LabelStoreWriter, merge_stores
    from tokenlabel.models.creation import create_model
    from tokenlabel.teachers.annotation import annotate
    from tokenlabel.teachers.fitting import fit_head
    from tokenlabel.teachers.heads import Head
    from tokenlabel.teachers.options import AnnotateConfig, FitConfig

__version__ = "0.2.0"  # the one place: the wheel, `tokenlabel --version` and CITATION.cff follow

# Public names and where they live: imported when first asked for, so that reading a store takes no torch.
_HOMES = {
    "data.augment": ("EvalTransform", "TrainTransform"),
    "data.config": ("AugmentConfig", "Interpolation", "Order"),
    "data.samplers": ("BatchSampler",),
    "data.batches": ("TokenLabelDataset", "collate", "make_loader"),
    "data.decoding": ("ImageCheck", "check_images"),
    "data.sources": ("open_images",),
    "labels.encoding": ("Encoding",),
    "labels.manifest": ("Manifest",),
    "labels.store": ("LabelStore",),
    "labels.writer": ("LabelStoreWriter", "merge_stores"),
    "core.align": ("align",),
    "core.batch": ("collate_score_maps", "normalize_images"),
    "core.geometry": ("Box", "View", "stack_views"),
    "core.losses": ("sparse_cross_entropy", "token_label_loss"),
    "core.mix": ("MixPlan", "mix_images", "mix_targets", "sample_mix"),
    "core.outputs": ("Outputs",),
    "core.scores": ("Kind", "ScoreMap"),
    "core.targets": ("TokenTargets", "class_targets"),
    "models.creation": ("create_model",),
    "teachers.annotation": ("annotate",),
    "teachers.fitting": ("fit_head",),
    "teachers.heads": ("Head",),
    "teachers.options": ("AnnotateConfig", "FitConfig"),
    "core.config": (
        "ClassTarget",
        "ErasingConfig",
        "ErasingMode",
        "Extent",
        "Inference",
        "LogitsMode",
        "Mixing",
        "TokenChoice",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AnnotateConfig",
    "AugmentConfig",
    "BatchSampler",
    "Box",
    "ClassTarget",
    "Encoding",
    "ErasingConfig",
    "ErasingMode",
    "EvalTransform",
    "Extent",
    "FitConfig",
    "Head",
    "ImageCheck",
    "Inference",
    "Interpolation",
    "Kind",
    "LabelStore",
    "LabelStoreWriter",
    "LogitsMode",
    "Manifest",
    "MixPlan",
    "Mixing",
    "Order",
    "Outputs",
    "ScoreMap",
    "TokenChoice",
    "TokenLabelDataset",
    "TokenTargets",
    "TrainTransform",
    "View",
    "align",
    "annotate",
    "check_images",
    "class_targets",
    "collate",
    "collate_score_maps",
    "create_model",
    "fit_head",
    "make_loader",
    "merge_stores",
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
