"""Networks that were trained elsewhere, by name: ours out of a checkpoint file, timm's with their weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from timm.data.config import resolve_data_config
from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset
from timm.models import get_pretrained_cfg

from tokenlabel.data.augment import Interpolation
from tokenlabel.models import OWN_MODELS, create_model
from tokenlabel.models.hub import hub_or_cache, why_unknown
from tokenlabel.models.weights import load_published, read_checkpoint
from tokenlabel.runtime.errors import first_line


class PretrainedError(ValueError):
    """A name that means no network, or weights that cannot be loaded."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Pretrained:
    """A trained network and how it was evaluated.

    `model`: a TokenModel, or timm's own. `class_names`: empty unless the weights' source says them. `size_px`: (height,
    width) of the images that it is for; `fixed_size`: it takes no others. `mean`, `std`: of its images, scaled to
    0..1. `has_token_head`: one for tokens that was trained.
    """

    model: Any
    num_classes: int
    class_names: tuple[str, ...]
    size_px: tuple[int, int]
    fixed_size: bool
    crop_fraction: float
    interpolation: Interpolation
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    has_token_head: bool


def load_pretrained(
    name: str, *, weights: str | None = None, size: int | None = None, at_test_size: bool = False
) -> Pretrained:
    """Return a network by its name: `lvvit_s` and the like, or whatever `timm.create_model` takes.

    `weights`: a checkpoint file; timm's own if None. `size`: of the square images, in px, for networks that are made
    for one size; their own if None. `at_test_size`: the size and crop that timm validates at where they differ from
    those of training. Raises PretrainedError.
    """
    if name in OWN_MODELS:
        return _own(name, weights, size or 224)
    reason = why_unknown(name, OWN_MODELS, weights_option="--weights")
    if reason is not None:
        raise PretrainedError(
            f"no network {name!r}: neither a run folder with a checkpoint, nor a model that timm knows"
            + (f"; {reason}" if reason else "")
        )
    return _timm(name, weights, size, at_test_size=at_test_size)


def _own(name: str, weights: str | None, size: int) -> Pretrained:
    if weights is None:
        raise PretrainedError(
            f"{name} has no weights that could be downloaded; give a checkpoint file by --weights"
        )
    classifier = read_checkpoint(weights).get("head.weight")
    if classifier is None:
        raise PretrainedError(f"{weights}: has no classifier (head.weight), so it is no {name}")
    model = create_model(name, num_classes=len(classifier), size_px=(size, size))
    loaded = load_published(model, weights)
    return Pretrained(
        model=model,
        num_classes=len(classifier),
        class_names=(),
        size_px=(size, size),
        fixed_size=True,
        crop_fraction=0.9,
        interpolation=Interpolation.BICUBIC,
        mean=model.mean,
        std=model.std,
        has_token_head=hasattr(model, "aux_head") and not loaded.new_heads,
    )


def _timm(name: str, weights: str | None, size: int | None, *, at_test_size: bool) -> Pretrained:
    preset = get_pretrained_cfg(name, allow_unregistered=True)
    options: dict[str, Any] = {}
    if size is not None and preset is not None and preset.fixed_input_size:
        options["img_size"] = size
    if weights is not None:
        options["pretrained_cfg_overlay"] = _file_overlay(weights, preset)
    elif preset is not None and not preset.has_weights:
        raise PretrainedError(
            f"{name} has no weights that could be downloaded; give a checkpoint file by --weights"
        )
    try:
        with hub_or_cache(online=weights is None and not name.startswith("local-dir:")):
            model: Any = timm.create_model(name, pretrained=True, **options)
    except Exception as error:  # timm, the hub and its network library raise whatever they run into
        advice = "give a checkpoint file by --weights" if weights is None else "is it of this model?"
        raise PretrainedError(
            f"the weights of {name} cannot be loaded ({first_line(error)}); {advice}"
        ) from error
    fixed = bool(model.pretrained_cfg.get("fixed_input_size"))
    data = resolve_data_config({}, model=model, use_test_size=at_test_size and not fixed)
    _, height_px, width_px = data["input_size"]
    subset = infer_imagenet_subset(model) if weights is None else None
    given_px = options.get("img_size")
    return Pretrained(
        model=model,
        num_classes=model.num_classes,
        class_names=tuple(ImageNetInfo(subset).label_names()) if subset else (),
        size_px=(given_px or height_px, given_px or width_px),
        fixed_size=fixed,
        crop_fraction=data["crop_pct"],
        interpolation=Interpolation.BILINEAR
        if data["interpolation"] == "bilinear"
        else Interpolation.BICUBIC,
        mean=data["mean"],
        std=data["std"],
        has_token_head=getattr(model, "aux_head", None) is not None,
    )


def _file_overlay(path: str, preset: Any) -> dict[str, Any]:
    """Return what timm has to be told so that it takes its pretrained weights from a file."""
    if not Path(path).is_file():
        raise PretrainedError(
            f"{path}: no such file; expected weights as .safetensors, .pth, .pth.tar or .npz"
        )
    overlay: dict[str, Any] = {"file": path, "source": "file"}
    if path.endswith(".npz"):  # of the original ViTs, which timm reads its own way
        return overlay
    classifier = preset.classifier if preset is not None else None
    name = classifier if isinstance(classifier, str) else classifier[0] if classifier else ""
    weight = read_checkpoint(path).get(f"{name}.weight")
    if weight is not None:
        overlay["num_classes"] = len(weight)
    return {**overlay, "custom_load": False}
