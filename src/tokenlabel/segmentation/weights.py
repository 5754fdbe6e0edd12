"""Weights to begin with: backbones of our runs, published backbones, and whole segmentation models, published or ours.

Published LV-ViT + UPerNet files name the backbone's parameters `backbone.NAME` (ours: `backbone.backbone.NAME`), with
the neck's among them (`backbone.side_layer1` to `4`; ours: `neck.side_layer1`), the head's `decode_head.NAME` and the
second head's `auxiliary_head.NAME`.
"""

from __future__ import annotations

import logging
from collections.abc import Set
from pathlib import Path

from torch import Tensor

from tokenlabel.models import WeightsError
from tokenlabel.models.weights import adapter_name, read_checkpoint, resize_all_positions
from tokenlabel.segmentation.model import SegmentationModel
from tokenlabel.training.checkpoint import is_run, newest_checkpoint

LOGGER = logging.getLogger(__name__)

PUBLISHED_NECK, NECK = "backbone.side_layer", "neck.side_layer"
HEAD = "decode_head."
SECOND_HEAD = "auxiliary_head."


def load_weights(model: SegmentationModel, path: str | Path, *, average: bool = False) -> frozenset[str]:
    """Load what a file or a run holds, a backbone or a whole segmentation model; return what starts anew.

    `path`: a published file (`.pth`, `.safetensors`), a run folder or one of its checkpoints; of these the averaged
    weights, where there are some. `average`: take the average in a published file. Position embeddings are
    resized bicubically. Classifiers for other classes are left out and start anew, with a warning.
    Raises WeightsError, and leaves the model alone, where anything else does not fit: it lists the names.
    """
    found, name = _read(Path(path), average=average)
    if any(key.startswith(HEAD) for key in found):
        return _load_all(model, found, name=name)
    return _load_backbone(model, found, name=name)


def _read(path: Path, *, average: bool) -> tuple[dict[str, Tensor], str]:
    if is_run(path):
        path = newest_checkpoint(path)
    if path.is_dir():
        average = (path / "ema.safetensors").exists()
    return read_checkpoint(path, average=average), str(path)


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
    _check_fit(found, wanted, spared=spared, name=name)
    model.load_state_dict({key: found[key] for key in found if key not in spared}, strict=False)
    if other_classes:
        LOGGER.warning("%s is for other classes: %s start anew", name, ", ".join(sorted(other_classes)))
    return frozenset(other_classes)


def _load_backbone(model: SegmentationModel, found: dict[str, Tensor], *, name: str) -> frozenset[str]:
    backbone, found = model.backbone, {adapter_name(key): tensor for key, tensor in found.items()}
    spared = {key.removeprefix("backbone.") for key in model.unreached if key.startswith("backbone.")}
    resize_all_positions(found, backbone, name=name)
    _check_fit(found, backbone.state_dict(), spared=spared, name=name)
    backbone.load_state_dict({key: found[key] for key in found if key not in spared}, strict=False)
    return frozenset(name for name, _ in model.named_parameters() if not name.startswith("backbone."))


def _check_fit(found: dict[str, Tensor], wanted: dict[str, Tensor], *, spared: Set[str], name: str) -> None:
    lacks = [
        key
        for key in wanted
        if key not in found and key not in spared and not key.endswith("num_batches_tracked")
    ]
    others = [
        f"{key} ({_size(found[key])}, not {_size(wanted[key])})"
        for key in wanted.keys() & found.keys() - spared
        if found[key].shape != wanted[key].shape
    ]
    complaints = [
        f"{what} {', '.join(sorted(keys))}"
        for what, keys in (
            ("it lacks", lacks),
            ("it has", [key for key in found if key not in wanted]),
            ("sizes differ:", others),
        )
        if keys
    ]
    if complaints:
        raise WeightsError(f"{name} is for another model or other options: {'; '.join(complaints)}")


def _size(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "a number"
