"""Networks that were trained elsewhere, by name: ours out of a checkpoint file, timm's with their weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
from timm.data.config import resolve_data_config
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg

from tokenlabel.data.classes import imagenet_names
from tokenlabel.data.config import Interpolation
from tokenlabel.models import create_model, register_with_timm
from tokenlabel.models.hub import hub_or_cache, why_unknown
from tokenlabel.models.registration import OUR_MODELS
from tokenlabel.models.weights import load_published, names_in_order, read_checkpoint, read_class_names
from tokenlabel.runtime.errors import first_line
from tokenlabel.runtime.notices import listed, say

# In timm's names of networks trained on images and texts. Their head projects into the space of the texts, and timm
# calls the width of that space num_classes; the same networks fine-tuned on ImageNet ("_ft_in1k") have classes.
IMAGE_TEXT, FINE_TUNED = re.compile("clip|pe_core"), "_ft_in"


class PretrainedError(ValueError):
    """A name that means no network, or weights that cannot be loaded."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Pretrained:
    """A trained network and how it was evaluated.

    `model`: a TokenModel, or timm's own. `class_names`: empty where nobody says them; `names_assumed`: they are
    ImageNet's, by their number alone. `size_px`: (height, width) of the images that it is for; `fixed_size`: it takes
    no others. `mean`, `std`: of its images, scaled to 0..1. `has_token_head`: one for tokens that was trained.
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
    names_assumed: bool = False


def load_pretrained(
    name: str, *, weights: str | None = None, size: int | None = None, at_test_size: bool = False
) -> Pretrained:
    """Return a network by its name: `lvvit_s` and the like, or whatever `timm.create_model` takes.

    `weights`: a checkpoint file; timm's own if None. `size`: of the square images, in px, for networks that are made
    for one size; their own if None. `at_test_size`: the size and crop that timm validates at where they differ from
    those of training. Raises PretrainedError.
    """
    if name in OUR_MODELS:
        return _own(name, weights, size or 224)
    reason = why_unknown(name, OUR_MODELS, weights_option="--weights")
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
    class_names, names_assumed = _names(len(classifier), read_class_names(weights))
    return Pretrained(
        model=model,
        num_classes=len(classifier),
        class_names=class_names,
        names_assumed=names_assumed,
        size_px=(size, size),
        fixed_size=True,
        crop_fraction=0.9,
        interpolation=Interpolation.BICUBIC,
        mean=model.mean,
        std=model.std,
        has_token_head=hasattr(model, "aux_head") and not loaded.new_heads,
    )


def _timm(name: str, weights: str | None, size: int | None, *, at_test_size: bool) -> Pretrained:
    register_with_timm()  # a folder may hold an LV-ViT
    preset = get_pretrained_cfg(name, allow_unregistered=True)
    if weights is None and preset is not None:  # before anything is downloaded
        check_classes(name, asdict(preset))
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
    check_classes(name, {**model.pretrained_cfg, "num_classes": model.num_classes})
    fixed = bool(model.pretrained_cfg.get("fixed_input_size"))
    data = resolve_data_config({}, model=model, use_test_size=at_test_size and not fixed)
    _, height_px, width_px = data["input_size"]
    stated = read_class_names(weights) if weights is not None else ()
    stated = stated or names_in_order(model.pretrained_cfg.get("label_names"))
    class_names, names_assumed = _names(model.num_classes, stated)
    given_px = options.get("img_size")
    return Pretrained(
        model=model,
        num_classes=model.num_classes,
        class_names=class_names,
        names_assumed=names_assumed
        and not (weights is None and preset is not None),  # timm's own are ImageNet's
        size_px=(given_px or height_px, given_px or width_px),
        fixed_size=fixed,
        crop_fraction=data["crop_pct"],
        interpolation=Interpolation.BILINEAR
        if data["interpolation"] == "bilinear"
        else Interpolation.BICUBIC,
        mean=tuple(data["mean"]),  # lists where a folder's config.json says them
        std=tuple(data["std"]),
        has_token_head=getattr(model, "aux_head", None) is not None,
    )


def check_classes(name: str, preset: Mapping[str, Any]) -> None:
    """Raise PretrainedError for a network without classes, by its pretrained configuration in timm.

    That is one without a classifier, or an image-text network as wide as its embeddings (unless its configuration
    names classes).
    """
    architecture, num_classes = preset.get("architecture") or "", preset["num_classes"]
    published = get_arch_pretrained_cfgs(architecture)
    embeddings = {
        config.num_classes
        for full_name, config in published.items()
        if IMAGE_TEXT.search(full_name) and FINE_TUNED not in full_name
    }
    is_image_text = IMAGE_TEXT.search(f"{architecture}.{preset.get('tag')}") and not preset.get("label_names")
    if num_classes and not (is_image_text and num_classes in embeddings):
        return
    what = (
        f"{num_classes} outputs are an embedding, not classes"
        if num_classes
        else "weights have no classifier"
    )
    others = [other for other, config in published.items() if config.num_classes not in {0, *embeddings}]
    raise PretrainedError(
        f"{name}: its {what}, so it says nothing of classes; take weights that were trained to classify"
        f"{f' ({listed(others)})' if others else ''}, or fine-tune it (`tokenlabel train --model.name {name} "
        "--model.options.pretrained true`) and name that run"
    )


def _names(num_classes: int, stated: tuple[str, ...]) -> tuple[tuple[str, ...], bool]:
    """Return the class names of a network, by what its weights' source states, and whether they are a guess."""
    if len(stated) == num_classes:
        return stated, False
    if stated:
        say(
            f"the weights come with {len(stated):,} class names ({listed(list(stated))}) for {num_classes:,} classes: "
            "not used"
        )
    names = imagenet_names(num_classes)
    return names, bool(names)


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
