"""Weights to begin with: backbones of our runs, published backbones, and whole segmentation models, published or ours.

Published LV-ViT + UPerNet files name the backbone's parameters `backbone.NAME` (ours: `backbone.backbone.NAME`), with
the neck's among them (`backbone.side_layer1` to `4`; ours: `neck.side_layer1`), the head's `decode_head.NAME` and the
second head's `auxiliary_head.NAME`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from tokenlabel.models.runs import is_run, newest_checkpoint
from tokenlabel.models.weight_files import Weights, read_checkpoint
from tokenlabel.models.weights import load, load_published, misfit
from tokenlabel.runtime.errors import ModelError
from tokenlabel.segmentation.model import SegmentationModel

LOGGER = logging.getLogger(__name__)

PUBLISHED_NECK, NECK = "backbone.side_layer", "neck.side_layer"
HEAD = "decode_head."
SECOND_HEAD = "auxiliary_head."


def load_weights(model: SegmentationModel, path: str | Path, *, average: bool = False) -> frozenset[str]:
    """Load what a file or a run holds, a backbone or a whole segmentation model; return what starts anew.

    `path`: a published file (`.pth`, `.safetensors`), a run folder or one of its checkpoints; of these the averaged
    weights, where there are some. `average`: take the average in a published file. The backbone adapts to another image
    size as in `load_published`. Classifiers for other classes are left out and start anew, with a warning.
    Raises ModelError, and leaves the model alone, where anything else does not fit: it lists the names.
    """
    path = newest_checkpoint(path) if is_run(path) else Path(path)
    if path.is_dir():
        average = (path / "ema.safetensors").exists()
    found = read_checkpoint(path, average=average)
    spared = {key.removeprefix("backbone.") for key in model.unreached}
    if not any(key.startswith(HEAD) for key in found):
        load_published(model.backbone, path, average=average, spared=spared)
        return frozenset(name for name, _ in model.named_parameters() if not name.startswith("backbone."))
    backbone, heads = _divided(found, path)
    if model.auxiliary_head is None:
        heads = {key: tensor for key, tensor in heads.items() if not key.startswith(SECOND_HEAD)}
    wanted = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith("backbone.")}
    other_classes = {
        key
        for key in heads.keys() & wanted.keys()
        if "conv_seg." in key
        and heads[key].shape[1:] == wanted[key].shape[1:]
        and heads[key].shape != wanted[key].shape
    }
    if complaint := misfit(heads, wanted, spared=model.unreached | other_classes):
        raise ModelError(f"{path} is for another model or other options: {complaint}")
    load(model.backbone, backbone, spared=spared)  # all of it or, with an error, nothing
    model.load_state_dict({key: heads[key] for key in heads.keys() - other_classes}, strict=False)
    if other_classes:
        LOGGER.warning("%s is for other classes: %s start anew", path, ", ".join(sorted(other_classes)))
    return frozenset(other_classes)


def _divided(found: Mapping[str, Tensor], path: Path) -> tuple[Weights, dict[str, Tensor]]:
    """Return the tensors of a whole model as those of its backbone and, by our names, those of neck and heads."""
    backbone, token_head, heads = {}, {}, {}
    for key, tensor in found.items():
        inner = key.removeprefix("backbone.").removeprefix("backbone.")
        if key.startswith(PUBLISHED_NECK):
            heads[NECK + key.removeprefix(PUBLISHED_NECK)] = tensor
        elif not key.startswith("backbone."):
            heads[key] = tensor
        elif inner.startswith("token_head."):
            token_head[inner.removeprefix("token_head.")] = tensor
        else:
            backbone[inner] = tensor
    return Weights(path, "backbone.", backbone, token_head), heads
