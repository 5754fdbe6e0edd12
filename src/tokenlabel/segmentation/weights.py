"""Weights to begin with: backbones of our runs, published backbones, and whole segmentation models, published or ours.

Published LV-ViT + UPerNet files name the backbone's parameters `backbone.NAME` (ours: `backbone.backbone.NAME`), with
the neck's among them (`backbone.side_layer1` to `4`; ours: `neck.side_layer1`), the head's `decode_head.NAME` and the
second head's `auxiliary_head.NAME`.
"""

from __future__ import annotations

import logging
from pathlib import Path

from torch import Tensor

from tokenlabel.models.runs import is_run, newest_checkpoint
from tokenlabel.models.weights import (
    adapter_name,
    load_published,
    misfit,
    read_checkpoint,
    resize_all_positions,
)
from tokenlabel.runtime.errors import ModelError
from tokenlabel.segmentation.model import SegmentationModel

LOGGER = logging.getLogger(__name__)

PUBLISHED_NECK, NECK = "backbone.side_layer", "neck.side_layer"
HEAD = "decode_head."
SECOND_HEAD = "auxiliary_head."


def load_weights(model: SegmentationModel, path: str | Path, *, average: bool = False) -> frozenset[str]:
    """Load what a file or a run holds, a backbone or a whole segmentation model; return what starts anew.

    `path`: a published file (`.pth`, `.safetensors`), a run folder or one of its checkpoints; of these the averaged
    weights, where there are some. `average`: take the average in a published file. Position embeddings are
    resized bicubically. Classifiers for other classes are left out and start anew, with a warning.
    Raises ModelError, and leaves the model alone, where anything else does not fit: it lists the names.
    """
    path = newest_checkpoint(path) if is_run(path) else Path(path)
    if path.is_dir():
        average = (path / "ema.safetensors").exists()
    found = read_checkpoint(path, average=average)
    if any(key.startswith(HEAD) for key in found):
        return _load_all(model, found, name=str(path))
    spared = {key.removeprefix("backbone.") for key in model.unreached}
    load_published(model.backbone, path, average=average, spared=spared)
    return frozenset(name for name, _ in model.named_parameters() if not name.startswith("backbone."))


def _load_all(model: SegmentationModel, found: dict[str, Tensor], *, name: str) -> frozenset[str]:
    found = {
        NECK + key.removeprefix(PUBLISHED_NECK) if key.startswith(PUBLISHED_NECK) else key: tensor
        for key, tensor in found.items()
    }
    if model.auxiliary_head is None:
        found = {key: tensor for key, tensor in found.items() if not key.startswith(SECOND_HEAD)}
    of_backbone = {
        adapter_name(key.removeprefix("backbone.")): tensor
        for key, tensor in found.items()
        if key.startswith("backbone.")
    }
    resize_all_positions(of_backbone, model.backbone, name=name)
    found = {key: tensor for key, tensor in found.items() if not key.startswith("backbone.")}
    found |= {f"backbone.{key}": tensor for key, tensor in of_backbone.items()}
    wanted = model.state_dict()
    other_classes = {
        key
        for key in found.keys() & wanted.keys()
        if "conv_seg." in key
        and found[key].shape[1:] == wanted[key].shape[1:]
        and found[key].shape != wanted[key].shape
    }
    spared = model.unreached | other_classes
    if complaint := misfit(found, wanted, spared=spared):
        raise ModelError(f"{name} is for another model or other options: {complaint}")
    model.load_state_dict({key: found[key] for key in found if key not in spared}, strict=False)
    if other_classes:
        LOGGER.warning("%s is for other classes: %s start anew", name, ", ".join(sorted(other_classes)))
    return frozenset(other_classes)
