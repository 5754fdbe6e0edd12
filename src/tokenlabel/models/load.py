"""One way to a trained network: a run, a checkpoint, a file of weights, a folder for the hub, timm's names, ours."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from jaxtyping import Float
from timm.data.config import resolve_data_config
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg
from torch import Tensor, nn

from tokenlabel.core.config import Inference
from tokenlabel.core.outputs import Outputs
from tokenlabel.data.class_names import imagenet_names
from tokenlabel.data.classes import ClassList
from tokenlabel.data.config import Interpolation
from tokenlabel.models import create_model, register_with_timm
from tokenlabel.models.adapter import REFUSALS, TimmAdapter
from tokenlabel.models.hub import why_unknown
from tokenlabel.models.registration import OUR_MODELS
from tokenlabel.models.runs import (
    is_run,
    newest_checkpoint,
    read_state,
    read_weights,
    token_classes_of,
)
from tokenlabel.models.weight_files import description_of, options_without_weights
from tokenlabel.models.weights import (
    build_with,
    count_classes,
    find_weights,
    load,
    misfit,
    names_in_order,
    read_class_names,
    read_description,
    resize_all_positions,
)
from tokenlabel.runtime.coercion import Size, pair
from tokenlabel.runtime.errors import ModelError, first_line
from tokenlabel.runtime.hub import hub_or_cache, local_name
from tokenlabel.runtime.process import listed, say

# In timm's names of networks trained on images and texts. Their head projects into the space of the texts, and timm
# calls the width of that space num_classes; the same networks fine-tuned on ImageNet ("_ft_in1k") have classes.
IMAGE_TEXT, FINE_TUNED = re.compile("clip|pe_core"), "_ft_in"


class PlainClassifier(nn.Module):
    """Any timm classifier, asked for its own logits alone; the one token that it has repeats them."""

    def __init__(self, backbone: Any, *, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.backbone, self.mean, self.std = backbone, tuple(mean), tuple(std)
        self.num_classes: int = backbone.num_classes

    def forward(self, images: Float[Tensor, "B 3 height width"]) -> Outputs:
        """Return the network's logits of normalised images."""
        logits = self.backbone(images)
        return Outputs(logits, logits[:, None], nn.Identity(), (1, 1))


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedModel:
    """A trained network in evaluation mode, and how it is used: what it was trained with, or evaluated by.

    `model`: a TimmAdapter, or a PlainClassifier around a network without a head for its tokens; both have a `backbone`,
    timm's own module, and the `mean` and `std` of its images. `class_names`: empty where nobody says them;
    `names_assumed`: they are ImageNet's, by their number alone. `img_size`: (height, width) of the images that it is
    for; `fixed_size`: it takes no others. `heads`: the ways to predict that were trained, the usual one first.
    `has_token_head`: whether its head for tokens was. `token_classes`: what the tokens are about, if not its classes.
    `is_embedding`: its outputs are a vector, as those of texts, not classes. `licence`: of its weights, says timm.
    `recipe`, `step`: of the run that it comes from, None of another; plain data (`training.checkpoint.load_run` makes
    it a Recipe).
    """

    name: str
    model: Any
    class_names: tuple[str, ...]
    img_size: tuple[int, int]
    crop_fraction: float
    interpolation: Interpolation
    heads: tuple[Inference, ...] = (Inference.CLASS,)
    has_token_head: bool = False
    token_classes: ClassList | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    names_assumed: bool = False
    fixed_size: bool = False
    is_embedding: bool = False
    licence: str = ""
    recipe: Any = None
    step: int | None = None

    @property
    def num_classes(self) -> int:
        """How many classes it tells apart, or how wide its embedding is."""
        return self.model.num_classes


def load_model(
    name: str | Path,
    *,
    weights: str | Path | None = None,
    img_size: Size | None = None,
    at_test_size: bool = False,
    as_backbone: bool = False,
) -> LoadedModel:
    """Return a trained network, on the CPU.

    `name`: a run folder (its newest checkpoint), a checkpoint folder, `hf://USER/NAME`, `local-dir:...`, `lvvit_s` and
    the like, or whatever `timm.create_model` takes. `weights`: a file, checkpoint or run beside a network's name;
    timm's own if None. `img_size`: of the images that it shall see, for networks that are made for one size; their own
    if None. `at_test_size`: the size and crop that timm validates at where they differ from those of training.
    `as_backbone`: take networks without classes as well, and let those that can (timm's `dynamic_img_size`) take images
    of any size.
    Raises ModelError for a name that means nothing, weights that cannot be loaded, and a run or
    checkpoint that is damaged, or of segmentation.
    """
    size = None if img_size is None else pair(img_size)
    given, name = str(name), local_name(name)
    if name != given:  # the folder that it was downloaded to says nothing to people
        loaded = load_model(
            name, weights=weights, img_size=size, at_test_size=at_test_size, as_backbone=as_backbone
        )
        return replace(loaded, name=given)
    if is_run(name):
        if weights is not None:
            raise ModelError(
                f"{name} is a run and has weights of its own; leave --weights out (one of several: '')"
            )
        return _load_run(name, size)
    register_with_timm()
    reason = why_unknown(name, OUR_MODELS, weights_option="--weights")
    if reason is not None:
        raise ModelError(
            f"no network {name!r}: neither a run folder with a checkpoint, nor a model that timm knows"
            + (f"; {reason}" if reason else "")
        )
    weights = None if weights is None else local_name(weights).removeprefix("local-dir:")
    if weights is not None and not Path(weights).exists():
        raise ModelError(
            f"{weights}: no such file; --weights takes a checkpoint file, a checkpoint folder or a run"
        )
    return _load_by_name(name, weights, size, at_test_size=at_test_size, as_backbone=as_backbone)


def _load_run(path: str, img_size: tuple[int, int] | None) -> LoadedModel:
    folder = newest_checkpoint(path)
    state = read_state(folder)
    recipe = state["recipe"]
    if "layout" in recipe["data"]:
        raise ModelError(
            f"{path}: holds a segmentation model; the verbs of `tokenlabel segment` take it, and --model.weights"
        )
    others = None if state.get("token_classes") is None else token_classes_of(state)
    create = partial(_model_of, recipe, len(state["class_names"]), others)
    model, tensors = create(), read_weights(folder, state)
    if img_size not in (None, pair(recipe["model"]["img_size"])):
        other = create(img_size=img_size)
        resize_all_positions(tensors, other, grid=model.grid, name=str(path))
        model = other
    model.load_state_dict(tensors)
    loaded = of_run(
        model, recipe, state["class_names"], step=state["step"], name=str(path), token_classes=others
    )
    return replace(loaded, img_size=img_size or loaded.img_size)


def _model_of(
    recipe: Mapping[str, Any], num_classes: int, token_classes: ClassList | None, **changes: Any
) -> Any:
    config, count = recipe["model"], None if token_classes is None else token_classes.count
    given = {"img_size": config["img_size"], **options_without_weights(config["options"]), **changes}
    return create_model(config["name"], num_classes=num_classes, num_token_classes=count, **given)


def of_run(
    model: Any,
    recipe: Mapping[str, Any],
    class_names: Sequence[str],
    *,
    step: int,
    name: str = "run",
    token_classes: ClassList | None = None,
) -> LoadedModel:
    """Return the model of a run with what its recipe, as plain data, says of its use."""
    about = description_of(recipe)
    usual = Inference(about["inference"])
    return LoadedModel(
        name=name,
        model=model.eval(),
        class_names=tuple(class_names),
        img_size=pair(about["img_size"]),
        crop_fraction=about["crop_fraction"],
        interpolation=Interpolation(about["interpolation"]),
        heads=_heads(usual) if about["uses_token_labels"] and token_classes is None else (Inference.CLASS,),
        has_token_head=about["uses_token_labels"],
        token_classes=token_classes,
        precision=about["precision"],
        recipe=recipe,
        step=step,
    )


def _heads(usual: Inference) -> tuple[Inference, ...]:
    return (usual, *(head for head in Inference if head is not usual))


def _load_by_name(
    name: str,
    weights: str | Path | None,
    img_size: tuple[int, int] | None,
    *,
    at_test_size: bool,
    as_backbone: bool,
) -> LoadedModel:
    preset = get_pretrained_cfg(name, allow_unregistered=True)
    if weights is None and preset is not None and not as_backbone:  # before anything is downloaded
        check_classes(name, asdict(preset))
    if weights is None and preset is not None and not preset.has_weights:
        raise ModelError(
            f"{name} has no weights that could be downloaded; give a checkpoint file by --weights"
        )
    about = read_description(weights) if weights is not None else {}
    about = (
        about if about.get("model") == name else {"uses_token_labels": about.get("uses_token_labels", True)}
    )
    model, options = _network_by_name(name, weights, about, img_size=img_size, as_backbone=as_backbone)
    network = model.backbone if isinstance(model, TimmAdapter) else model
    preset_now = {**network.pretrained_cfg, "num_classes": model.num_classes}
    others = about.get("token_classes") and ClassList.from_dict(about["token_classes"])
    if not (as_backbone or others):
        check_classes(name, preset_now)
    fixed = bool(network.pretrained_cfg.get("fixed_input_size")) and "dynamic_img_size" not in options
    data = resolve_data_config({}, model=network, use_test_size=at_test_size and not fixed)
    size = pair(options.get("img_size") or about.get("img_size") or data["input_size"][1:])
    own_head = getattr(network, "aux_head", None)
    if isinstance(own_head, nn.Linear) and own_head.weight.any():  # of zeros: nobody trained it
        model = TimmAdapter(network, name=name, num_classes=network.num_classes, img_size=size)
    stated = read_class_names(weights) if weights is not None else ()
    stated = stated or names_in_order(network.pretrained_cfg.get("label_names"))
    class_names, assumed = _names(model.num_classes, stated)
    interpolation = about.get("interpolation", data["interpolation"])
    both_heads = isinstance(model, TimmAdapter) and not others
    if not isinstance(model, TimmAdapter):
        model = PlainClassifier(model, mean=data["mean"], std=data["std"])
    return LoadedModel(
        name=name,
        model=model.eval(),
        class_names=class_names,
        names_assumed=assumed and not (weights is None and preset is not None),  # timm's own are ImageNet's
        img_size=size,
        fixed_size=fixed,
        crop_fraction=about.get("crop_fraction", data["crop_pct"]),
        interpolation=Interpolation.BILINEAR if interpolation == "bilinear" else Interpolation.BICUBIC,
        heads=_heads(Inference(about.get("inference", Inference.COMBINED)))
        if both_heads
        else (Inference.CLASS,),
        has_token_head=isinstance(model, TimmAdapter),
        token_classes=others or None,
        precision=about.get("precision", "fp32"),
        is_embedding=_is_embedding(preset_now),
        licence=network.pretrained_cfg.get("license") or "",
    )


def _network_by_name(
    name: str,
    weights: str | Path | None,
    about: Mapping[str, Any],
    *,
    img_size: tuple[int, int] | None,
    as_backbone: bool,
) -> tuple[Any, dict[str, Any]]:
    """Return a network with pretrained weights or those of a file, and the options that it was made with."""
    preset = get_pretrained_cfg(name, allow_unregistered=True)
    options = options_without_weights(about.get("options", {}))
    wanted = img_size or about.get("img_size")
    if preset is not None and preset.fixed_input_size:
        if as_backbone and _takes_any_size(name, options):
            options["dynamic_img_size"] = True
        elif wanted:
            options["img_size"] = pair(wanted)
    try:
        if weights is not None:
            return _from_file(name, weights, options, about, img_size=wanted), options
        with hub_or_cache(online=not name.startswith("local-dir:")):
            return timm.create_model(name, pretrained=True, **options), options
    except Exception as error:  # timm, the hub and its network library raise whatever they run into
        advice = "give a checkpoint file by --weights" if weights is None else "is it of this model?"
        raise ModelError(f"the weights of {name} cannot be loaded ({first_line(error)}); {advice}") from error


def _takes_any_size(name: str, options: Mapping[str, Any]) -> bool:
    """Say whether timm can make the model so that it takes images of any size, resizing its position embeddings."""
    try:
        with torch.device("meta"):
            timm.create_model(name, **{**options, "dynamic_img_size": True})
    except REFUSALS:  # models without that option are not told apart otherwise
        return False
    return True


def _from_file(
    name: str, path: str | Path, options: dict[str, Any], about: Mapping[str, Any], *, img_size: Any
) -> Any:
    """Return a network with a file's weights: an adapter where these have a trained token head, else timm's own.

    It is made once, unless the file has another number of classes than it says, or timm has to adapt its tensors.
    """
    stage = options.pop("stage", None)
    create = partial(timm.create_model, name, **options)
    stated = read_class_names(path)
    with hub_or_cache(online=False):
        network: Any = create(**({"num_classes": len(stated)} if stated else {}))
    weights = find_weights(path, network.state_dict(), average=None)
    num_classes = count_classes(weights, network)
    if num_classes != network.num_classes:
        with hub_or_cache(online=False):
            network = create(num_classes=num_classes)
    if weights.token_head and about["uses_token_labels"]:
        size = pair(img_size or network.pretrained_cfg["input_size"][1:])
        others, sizes = about.get("token_classes"), {"img_size": size, "num_classes": num_classes}
        count = others and others["count"]
        model = TimmAdapter(network, name=name, stage=stage, num_token_classes=count, **sizes)
        model.rebuild = create
        new_heads = load(model, weights, tokens="same" if others else "classes").new_heads
        untrained = any(name.startswith("token_head.") for name in new_heads)
        return network if untrained else model
    if hasattr(network, "aux_head"):
        network.aux_head = None  # it would be one that says nothing
    if weights.path.suffix == ".npz" or misfit(weights.backbone, network.state_dict(), spared=()):
        network = build_with(create, replace(weights, token_head={}), like=network)
        if hasattr(network, "aux_head"):
            network.aux_head = None
    else:
        network.load_state_dict(weights.backbone, strict=False)  # counts of batches may be left out
    return network


def check_classes(name: str, preset: Mapping[str, Any]) -> None:
    """Raise ModelError for a network without classes, by its pretrained configuration in timm.

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
    raise ModelError(
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
