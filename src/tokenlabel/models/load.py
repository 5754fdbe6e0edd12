"""One way to a trained network: a run, a checkpoint, a file of weights, a folder for the hub, timm's names, ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from timm.data.config import resolve_data_config
from timm.models import get_pretrained_cfg
from torch import nn

from tokenlabel.core.config import Inference
from tokenlabel.data.class_names import imagenet_names
from tokenlabel.data.classes import ClassList
from tokenlabel.data.config import Interpolation
from tokenlabel.models import create_model, register_with_timm
from tokenlabel.models.adapter import TimmAdapter
from tokenlabel.models.names import check_classes, is_embedding, why_unknown
from tokenlabel.models.positions import resize_all_positions
from tokenlabel.models.pretrained import PlainClassifier, network_by_name
from tokenlabel.models.runs import (
    description_of,
    is_run,
    newest_checkpoint,
    options_without_weights,
    read_description,
    read_state,
    read_weights,
    token_classes_of,
)
from tokenlabel.models.segmentation import SegmentationModel, SegmentModelConfig, create_segmentation_model
from tokenlabel.models.weight_files import names_in_order, read_class_names
from tokenlabel.runtime.coercion import Size, pair
from tokenlabel.runtime.configuration import config_from_dict
from tokenlabel.runtime.errors import ModelError
from tokenlabel.runtime.hub import local_name
from tokenlabel.runtime.process import listed, say


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedModel:
    """A trained network in evaluation mode, and how it is used: what it was trained with, or evaluated by.

    `model`: a TimmAdapter, a PlainClassifier around a network without a head for its tokens, or a SegmentationModel;
    each has a `backbone` (of the first two timm's own module), and the `mean` and `std` of its images. `class_names`:
    empty where nobody says them; `names_assumed`: they are ImageNet's, by their number alone. `img_size`: (height,
    width) of the images, or of the windows, that it is for; `fixed_size`: it takes no others. `heads`: the ways to
    predict that were trained, the usual one first. `has_token_head`: whether its head for tokens was. `token_classes`:
    what the tokens are about, if not its classes. `is_embedding`: its outputs are a vector, as those of texts, not
    classes. `licence`: of its weights, says timm. `recipe`, `step`: of the run that it comes from, None of another;
    plain data (`training.checkpoint.load_run` makes it a Recipe).
    """

    name: str
    model: Any
    class_names: tuple[str, ...]
    img_size: tuple[int, int]
    crop_fraction: float = 1.0
    interpolation: Interpolation = Interpolation.BILINEAR
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

    @property
    def segments(self) -> bool:
        """Whether it gives every pixel a class, not the image."""
        return isinstance(self.model, SegmentationModel)


def load_model(
    name: str | Path,
    *,
    weights: str | Path | None = None,
    img_size: Size | None = None,
    at_test_size: bool = False,
    as_backbone: bool = False,
    segments: bool | None = False,
) -> LoadedModel:
    """Return a trained network, on the CPU.

    `name`: a run folder (its newest checkpoint), a checkpoint folder, `hf://USER/NAME`, `local-dir:...`, `lvvit_s` and
    the like, or whatever `timm.create_model` takes. `weights`: a file, checkpoint or run beside a network's name;
    timm's own if None. `img_size`: of the images that it shall see, for networks that are made for one size; their own
    if None. `at_test_size`: the size and crop that timm validates at where they differ from those of training.
    `as_backbone`: take networks without classes as well, and let those that can (timm's `dynamic_img_size`) take images
    of any size. `segments`: whether the run has to be of segmentation, or of a classifier; None takes either.
    Raises ModelError for a name that means nothing, weights that cannot be loaded, and a run or checkpoint that is
    damaged, or of the other task.
    """
    size = None if img_size is None else pair(img_size)
    given, name = str(name), local_name(name)
    if is_run(name):
        if weights is not None:
            raise ModelError(f"{name} is a run and has weights of its own; leave --weights out (one of several: '')")
        loaded = _load_run(name, size, segments=segments)
    else:
        weights = _known(name, weights)
        loaded = _load_by_name(name, weights, size, at_test_size=at_test_size, as_backbone=as_backbone)
    return replace(loaded, name=given)  # the folder that it was downloaded to says nothing to people


def _known(name: str, weights: str | Path | None) -> str | None:
    """Return the path of the weights. Raises ModelError for a name that means no network, and weights not there."""
    register_with_timm()
    reason = why_unknown(name, weights_option="--weights")
    if reason is not None:
        raise ModelError(
            f"no network {name!r}: neither a run folder with a checkpoint, nor a model that timm knows"
            + (f"; {reason}" if reason else "")
        )
    weights = None if weights is None else local_name(weights).removeprefix("local-dir:")
    if weights is not None and not Path(weights).exists():
        raise ModelError(f"{weights}: no such file; --weights takes a checkpoint file, a checkpoint folder or a run")
    return weights


def _load_run(path: str, img_size: tuple[int, int] | None, *, segments: bool | None) -> LoadedModel:
    folder = newest_checkpoint(path)
    state = read_state(folder)
    recipe, names = state["recipe"], state["class_names"]
    of_segmentation = "layout" in recipe["data"]
    if of_segmentation and segments is False:
        raise ModelError(
            f"{path}: holds a segmentation model; the verbs of `tokenlabel segment` take it, and --model.weights"
        )
    if segments and not of_segmentation:
        raise ModelError(f"{path}: holds a classifier; `tokenlabel segment train` makes segmentation models")
    if of_segmentation:
        model = _segmentation_network(recipe["model"], len(names), name=f"{folder}/state.json")
        model.load_state_dict(read_weights(folder, state))
        return LoadedModel(
            name=path,
            model=model.eval(),
            class_names=tuple(names),
            img_size=pair(recipe["model"]["img_size"]),
            precision=recipe["precision"],
            recipe=recipe,
            step=state["step"],
        )
    others = None if state.get("token_classes") is None else token_classes_of(state)
    create = partial(_classifier, recipe["model"], len(names), others)
    model, tensors = create(), read_weights(folder, state)
    if img_size not in (None, pair(recipe["model"]["img_size"])):
        other = create(img_size=img_size)
        resize_all_positions(tensors, other, grid=model.grid, name=path)
        model = other
    model.load_state_dict(tensors)
    loaded = of_run(model, recipe, names, step=state["step"], name=path, token_classes=others)
    return replace(loaded, img_size=img_size or loaded.img_size)


def _segmentation_network(config: Mapping[str, Any], num_classes: int, *, name: str) -> SegmentationModel:
    config = {**config, "options": options_without_weights(config["options"])}
    return create_segmentation_model(config_from_dict(config, SegmentModelConfig, name=name), num_classes=num_classes)


def _classifier(config: Mapping[str, Any], num_classes: int, token_classes: ClassList | None, **changes: Any) -> Any:
    given = {"img_size": config["img_size"], **options_without_weights(config["options"]), **changes}
    count = None if token_classes is None else token_classes.count
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
    name: str, weights: str | None, img_size: tuple[int, int] | None, *, at_test_size: bool, as_backbone: bool
) -> LoadedModel:
    preset = get_pretrained_cfg(name, allow_unregistered=True) if weights is None else None
    if preset is not None and not as_backbone:  # before anything is downloaded
        check_classes(name, asdict(preset))
    if preset is not None and not preset.has_weights:
        raise ModelError(f"{name} has no weights that could be downloaded; give a checkpoint file by --weights")
    about = _stated(name, weights)
    model, options = network_by_name(name, weights, about, img_size=img_size, as_backbone=as_backbone)
    network = model.backbone if isinstance(model, TimmAdapter) else model
    config = {**network.pretrained_cfg, "num_classes": model.num_classes}
    others = ClassList.from_dict(about["token_classes"]) if about.get("token_classes") else None
    if not (as_backbone or others):
        check_classes(name, config)
    use = _preprocessing(network, about, options, at_test_size=at_test_size)
    own_head = getattr(network, "aux_head", None)
    if isinstance(own_head, nn.Linear) and own_head.weight.any():  # of zeros: nobody trained it
        model = TimmAdapter(network, name=name, num_classes=network.num_classes, img_size=use["img_size"])
    has_token_head = isinstance(model, TimmAdapter)
    usual = Inference(about.get("inference", Inference.COMBINED))
    class_names, assumed = _class_names(model.num_classes, weights, config)
    return LoadedModel(
        name=name,
        model=(model if has_token_head else PlainClassifier(model)).eval(),
        class_names=class_names,
        names_assumed=assumed and preset is None,  # timm's own are ImageNet's
        heads=_heads(usual) if has_token_head and others is None else (Inference.CLASS,),
        has_token_head=has_token_head,
        token_classes=others,
        precision=about.get("precision", "fp32"),
        is_embedding=is_embedding(config),
        licence=config.get("license") or "",
        **use,
    )


def _preprocessing(
    network: Any, about: Mapping[str, Any], options: Mapping[str, Any], *, at_test_size: bool
) -> dict[str, Any]:
    """Return the size and the crop of the images that a network was trained on, or with `at_test_size` evaluated on.

    `about`: what its file says of them, which comes before what timm says. `options`: what it was made with.
    """
    fixed_size = bool(network.pretrained_cfg.get("fixed_input_size")) and "dynamic_img_size" not in options
    data = resolve_data_config({}, model=network, use_test_size=at_test_size and not fixed_size)
    bilinear = about.get("interpolation", data["interpolation"]) == "bilinear"
    return {
        "img_size": pair(options.get("img_size") or about.get("img_size") or data["input_size"][1:]),
        "fixed_size": fixed_size,
        "crop_fraction": about.get("crop_fraction", data["crop_pct"]),
        "interpolation": Interpolation.BILINEAR if bilinear else Interpolation.BICUBIC,
    }


def _stated(name: str, weights: str | None) -> dict[str, Any]:
    """Return what a file of weights says of the network of this name: of another's only if tokens were trained."""
    about = read_description(weights) if weights is not None else {}
    if about.get("model") == name:
        return about
    return {"uses_token_labels": about.get("uses_token_labels", True)}


def _class_names(num_classes: int, weights: str | None, config: Mapping[str, Any]) -> tuple[tuple[str, ...], bool]:
    """Return the class names of a network, as its weights or timm state them, and whether they are a guess."""
    stated = read_class_names(weights) if weights is not None else ()
    stated = stated or names_in_order(config.get("label_names"))
    if len(stated) == num_classes:
        return stated, False
    if stated:
        say(
            f"the weights come with {len(stated):,} class names ({listed(list(stated))}) for {num_classes:,} classes: "
            "not used"
        )
    names = imagenet_names(num_classes)
    return names, bool(names)
