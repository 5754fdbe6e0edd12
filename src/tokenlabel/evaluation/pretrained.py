"""Networks that were trained elsewhere, by name: ours out of a checkpoint file, timm's with their weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import timm
import torch
from timm.data.config import resolve_data_config
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg

from tokenlabel.data.classes import ClassList, imagenet_names
from tokenlabel.data.config import Interpolation
from tokenlabel.models import TimmAdapter, create_model, register_with_timm
from tokenlabel.models.adapter import REFUSALS
from tokenlabel.models.hub import hub_or_cache, why_unknown
from tokenlabel.models.registration import OUR_MODELS
from tokenlabel.models.weights import (
    build_with,
    count_classes,
    find_weights,
    load,
    names_in_order,
    read_class_names,
    read_description,
)
from tokenlabel.runtime.coercion import pair
from tokenlabel.runtime.errors import first_line
from tokenlabel.runtime.process import listed, say

# In timm's names of networks trained on images and texts. Their head projects into the space of the texts, and timm
# calls the width of that space num_classes; the same networks fine-tuned on ImageNet ("_ft_in1k") have classes.
IMAGE_TEXT, FINE_TUNED = re.compile("clip|pe_core"), "_ft_in"


class PretrainedError(ValueError):
    """A name that means no network, or weights that cannot be loaded."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Pretrained:
    """A trained network and how it was evaluated.

    `model`: a TokenModel, or timm's own. `class_names`: empty where nobody says them; `names_assumed`: they are
    ImageNet's, by their number alone. `img_size`: (height, width) of the images that it is for; `fixed_size`: it takes
    no others. `mean`, `std`: of its images, scaled to 0..1. `has_token_head`: one for tokens that was trained.
    `is_embedding`: its outputs are a vector, as those of texts, not classes. `licence`: of its weights, says timm.
    `token_classes`: what its tokens are about, where these are others than its classes.
    """

    model: Any
    num_classes: int
    class_names: tuple[str, ...]
    img_size: tuple[int, int]
    fixed_size: bool
    crop_fraction: float
    interpolation: Interpolation
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    has_token_head: bool
    names_assumed: bool = False
    is_embedding: bool = False
    token_classes: ClassList | None = None
    licence: str = ""


def load_pretrained(
    name: str,
    *,
    weights: str | None = None,
    size: int | None = None,
    at_test_size: bool = False,
    as_backbone: bool = False,
) -> Pretrained:
    """Return a network by its name: `lvvit_s` and the like, or whatever `timm.create_model` takes.

    `weights`: a checkpoint file; timm's own if None. `size`: of the square images, in px, for networks that are made
    for one size; their own if None. `at_test_size`: the size and crop that timm validates at where they differ from
    those of training. `as_backbone`: take networks without classes as well, and let those that can (timm's
    `dynamic_img_size`) take images of any size. Raises PretrainedError.
    """
    register_with_timm()
    reason = why_unknown(name, OUR_MODELS, weights_option="--weights")
    if reason is not None:
        raise PretrainedError(
            f"no network {name!r}: neither a run folder with a checkpoint, nor a model that timm knows"
            + (f"; {reason}" if reason else "")
        )
    return _timm(name, weights, size, at_test_size=at_test_size, as_backbone=as_backbone)


def _timm(
    name: str, weights: str | None, size: int | None, *, at_test_size: bool, as_backbone: bool
) -> Pretrained:
    preset = get_pretrained_cfg(name, allow_unregistered=True)
    if weights is None and preset is not None and not as_backbone:  # before anything is downloaded
        check_classes(name, asdict(preset))
    options: dict[str, Any] = {}
    said = read_description(weights) if weights is not None else {}
    trained_head = said.get("uses_token_labels", True)
    if said.get("model") == name:  # an export of ours
        factory = ("pretrained", "checkpoint_path", "cache_dir")
        options = {key: value for key, value in said["options"].items() if key not in factory}
    else:
        said = {}
    img_size = (size, size) if size else said.get("img_size")
    if preset is not None and preset.fixed_input_size:
        if as_backbone and _takes_any_size(name, options):
            options["dynamic_img_size"] = True
        elif img_size:
            options["img_size"] = img_size
    advice = "give a checkpoint file by --weights" if weights is None else "is it of this model?"
    if weights is None and preset is not None and not preset.has_weights:
        raise PretrainedError(f"{name} has no weights that could be downloaded; {advice}")
    try:
        if weights is not None:
            model = _from_file(name, weights, options, trained_head=trained_head, img_size=img_size)
        else:
            with hub_or_cache(online=not name.startswith("local-dir:")):
                model: Any = timm.create_model(name, pretrained=True, **options)
    except Exception as error:  # timm, the hub and its network library raise whatever they run into
        raise PretrainedError(
            f"the weights of {name} cannot be loaded ({first_line(error)}); {advice}"
        ) from error
    network = model.backbone if isinstance(model, TimmAdapter) else model
    preset_now = {**network.pretrained_cfg, "num_classes": model.num_classes}
    if not as_backbone:
        check_classes(name, preset_now)
    fixed = bool(network.pretrained_cfg.get("fixed_input_size")) and "dynamic_img_size" not in options
    data = resolve_data_config({}, model=network, use_test_size=at_test_size and not fixed)
    stated = read_class_names(weights) if weights is not None else ()
    stated = stated or names_in_order(network.pretrained_cfg.get("label_names"))
    class_names, names_assumed = _names(model.num_classes, stated)
    return Pretrained(
        model=model,
        num_classes=model.num_classes,
        class_names=class_names,
        names_assumed=names_assumed
        and not (weights is None and preset is not None),  # timm's own are ImageNet's
        img_size=pair(options.get("img_size") or said.get("img_size") or data["input_size"][1:]),
        fixed_size=fixed,
        crop_fraction=said.get("crop_fraction", data["crop_pct"]),
        interpolation=Interpolation.BILINEAR
        if data["interpolation"] == "bilinear" and not said  # runs see theirs bicubically
        else Interpolation.BICUBIC,
        mean=tuple(data["mean"]),  # lists where a folder's config.json says them
        std=tuple(data["std"]),
        has_token_head=isinstance(model, TimmAdapter) or getattr(model, "aux_head", None) is not None,
        is_embedding=_is_embedding(preset_now),
        licence=network.pretrained_cfg.get("license") or "",
    )


def _takes_any_size(name: str, options: Mapping[str, Any]) -> bool:
    """Say whether timm can make the model so that it takes images of any size, resizing its position embeddings."""
    try:
        with torch.device("meta"):
            timm.create_model(name, **{**options, "dynamic_img_size": True})
    except REFUSALS:  # models without that option are not told apart otherwise
        return False
    return True


def _from_file(name: str, path: str, options: dict[str, Any], *, trained_head: bool, img_size: Any) -> Any:
    """Return a network with a file's weights: an adapter where these have a trained token head, else timm's own."""
    stage = options.pop("stage", None)
    create = partial(timm.create_model, name, **options)
    with hub_or_cache(online=False):
        plain: Any = create()
    weights = find_weights(path, plain.state_dict(), average=None)
    if not (weights.token_head and trained_head):
        network: Any = build_with(create, replace(weights, token_head={}), like=plain)
        if hasattr(network, "aux_head"):
            network.aux_head = None  # it would be one that says nothing
        return network
    options["img_size"] = img_size or plain.pretrained_cfg["input_size"][1:]
    model = create_model(name, num_classes=count_classes(weights, plain), stage=stage, **options)
    untrained = any(name.startswith("token_head.") for name in load(model, weights).new_heads)
    return model.backbone if untrained else model


def check_classes(name: str, preset: Mapping[str, Any]) -> None:
    """Raise PretrainedError for a network without classes, by its pretrained configuration in timm.

    That is one without a classifier, or an image-text network as wide as its embeddings (unless its configuration
    names classes).
    """
    num_classes = preset["num_classes"]
    is_embedding = _is_embedding(preset)
    if num_classes and not is_embedding:
        return
    what = (
        f"{num_classes} outputs are an embedding, not classes"
        if is_embedding
        else "weights have no classifier"
    )
    published = get_arch_pretrained_cfgs(preset.get("architecture") or "")
    others = [o for o, config in published.items() if config.num_classes and not _is_embedding(vars(config))]
    raise PretrainedError(
        f"{name}: its {what}, so it says nothing of classes; as a teacher it needs a head (`tokenlabel fit-head IMAGES "
        f"head.safetensors --backbone {name} --from words`, then --teacher head.safetensors), to predict classes "
        "it must be fine-tuned (`tokenlabel train --model.name ... --model.options.pretrained true`)"
        + (f", or take weights that were trained to classify ({listed(others)})" if others else "")
    )


def _is_embedding(preset: Mapping[str, Any]) -> bool:
    """Say whether a network's outputs are an embedding, by its pretrained configuration in timm."""
    architecture = preset.get("architecture") or ""
    embeddings = {
        config.num_classes
        for full_name, config in get_arch_pretrained_cfgs(architecture).items()
        if IMAGE_TEXT.search(full_name) and FINE_TUNED not in full_name
    }
    is_image_text = IMAGE_TEXT.search(f"{architecture}.{preset.get('tag')}") and not preset.get("label_names")
    return bool(is_image_text) and preset["num_classes"] in embeddings - {0}


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
