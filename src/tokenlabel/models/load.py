"""Load a trained network: from a run, a checkpoint, a file of weights, a folder for the hub, or by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from timm.data.config import resolve_data_config
from timm.models import get_pretrained_cfg
from torch import nn

from tokenlabel.core.config import Inference
from tokenlabel.core.outputs import TokenModel
from tokenlabel.data.class_names import imagenet_names
from tokenlabel.data.classes import ClassList
from tokenlabel.data.config import Interpolation
from tokenlabel.models import create_model, register_with_timm
from tokenlabel.models.adapter import TimmAdapter
from tokenlabel.models.names import PlainClassifier, check_classes, is_embedding, network_by_name, why_unknown
from tokenlabel.models.options import SegmentModelConfig
from tokenlabel.models.runs import (
    description_of,
    is_run,
    newest_checkpoint,
    read_description,
    read_state,
    read_weights,
    refuse_other_task,
    token_classes_of,
)
from tokenlabel.models.segmentation import SegmentationModel, create_segmentation_model
from tokenlabel.models.weight_files import Weights, names_in_order, read_class_names
from tokenlabel.models.weights import load, load_all
from tokenlabel.runtime.coercion import Size, pair
from tokenlabel.runtime.configuration import config_from_dict
from tokenlabel.runtime.errors import ModelError
from tokenlabel.runtime.hub import local_name, options_without_weights
from tokenlabel.runtime.process import listed, say
from tokenlabel.runtime.urls import as_url


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedModel:
    """A trained network in evaluation mode, and how it is used: as it was trained or evaluated.

    `model`: a TimmAdapter, a PlainClassifier around a network without a token head, or a SegmentationModel. Each has a
    `backbone` (of the first two timm's own module), and the `mean` and `std` of its images. `class_names`: empty if
    unknown; `names_assumed`: they are ImageNet's, taken from the number of classes alone. `img_size`: (height, width)
    of its images, or of the windows of segmentation. `heads`: the kinds of inference that were trained, the default
    first. `has_token_head`: its token head was trained. `token_classes`: the classes of the tokens, if they differ
    from the images'. `is_embedding`: its outputs are an embedding, not classes. `licence`: of the weights, by timm.
    `recipe`, `step`: of the run, else None; the recipe is plain data (`training.checkpoint.load_run` makes it a
    Recipe).
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
    is_embedding: bool = False
    licence: str = ""
    recipe: Any = None
    step: int | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes, or width of the embedding."""
        return self.model.num_classes

    @property
    def segments(self) -> bool:
        """True for a segmentation model."""
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
    the like, or any name for `timm.create_model`. `weights`: a file, checkpoint or run for a network's name; by default
    timm's. `img_size`: size of its images, for networks that are built for one size; by default their own.
    `at_test_size`: use timm's test size and crop where they differ from those of training. `as_backbone`: also take
    networks without classes, and let those that can (timm's `dynamic_img_size`) take images of any size. `segments`:
    whether a run must be of segmentation (True) or classification (False); None takes either.
    Raises ModelError for an unknown name, weights that cannot be loaded, and a run or checkpoint that is damaged, or of
    the other task.
    """
    size = None if img_size is None else pair(img_size)
    given, name = as_url(name) or str(name), local_name(name)
    if is_run(name):
        if weights is not None:
            raise ModelError(f"{given} is a run and has weights of its own; leave --weights out (one of several: '')")
        loaded = _load_run(given, size, segments=segments)
    else:
        register_with_timm()
        reason = why_unknown(name, weights_option="--weights")
        if reason is not None:
            raise ModelError(
                f"no network {name!r}: neither a run folder with a checkpoint, nor a model that timm knows"
                + (f"; {reason}" if reason else "")
            )
        path = None if weights is None else local_name(weights).removeprefix("local-dir:")
        if path is not None and not Path(path).exists():
            raise ModelError(f"{path}: no such file; --weights takes a checkpoint file, a checkpoint folder or a run")
        loaded = _load_by_name(name, path, size, at_test_size=at_test_size, as_backbone=as_backbone)
    return replace(loaded, name=given)  # not the folder that it was downloaded to


def _load_run(name: str, img_size: tuple[int, int] | None, *, segments: bool | None) -> LoadedModel:
    folder = newest_checkpoint(name)
    state = read_state(folder)
    recipe, names, step = state["recipe"], state["class_names"], state["step"]
    if segments is not None:
        refuse_other_task(name, state, segments=segments)
    tensors = read_weights(folder, state)
    config = {**recipe["model"], "options": options_without_weights(recipe["model"]["options"])}
    if "layout" in recipe["data"]:
        typed = config_from_dict(config, SegmentModelConfig, name=f"{folder}/state.json")
        model = create_segmentation_model(typed, num_classes=len(names)).eval()
        load_all(model, tensors, name=name)
        use = {"img_size": typed.img_size, "precision": recipe["precision"]}
        return LoadedModel(name=name, model=model, class_names=tuple(names), recipe=recipe, step=step, **use)
    others = None if state.get("token_classes") is None else token_classes_of(state)

    def _create(size: Size) -> TokenModel:
        options = {"img_size": size, **config["options"]}
        count = None if others is None else others.count
        return create_model(config["name"], num_classes=len(names), num_token_classes=count, **options)

    own_size = pair(config["img_size"])
    model = _create(own_size)  # also for another size: its grid is that of the saved position embeddings
    if img_size in (None, own_size):
        load_all(model, tensors, name=name)
    else:
        grid, model = model.grid, _create(img_size)
        parts = [
            {key.removeprefix(part): tensor for key, tensor in tensors.items() if key.startswith(part)}
            for part in ("backbone.", "token_head.")
        ]
        load(model, Weights(Path(name), "backbone.", *parts), grid=grid, tokens="same" if others else "classes")
    loaded = of_run(model, recipe, names, step=step, name=name, token_classes=others)
    return replace(loaded, img_size=img_size or loaded.img_size)


def of_run(
    model: Any,
    recipe: Mapping[str, Any],
    class_names: Sequence[str],
    *,
    step: int,
    name: str = "run",
    token_classes: ClassList | None = None,
) -> LoadedModel:
    """Return the classifier of a run as a LoadedModel. `recipe`: the run's, as plain data."""
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
    if preset is not None and not as_backbone:  # before the download
        check_classes(name, asdict(preset))
    if preset is not None and not preset.has_weights:
        raise ModelError(f"{name} has no weights that could be downloaded; give a checkpoint file by --weights")
    about = read_description(weights) if weights is not None else {}
    if about.get("model") != name:  # of another network only this is of use
        about = {"uses_token_labels": about.get("uses_token_labels", True)}
    stage = about.get("options", {}).get("stage")
    model, options = network_by_name(name, weights, about, img_size=img_size, as_backbone=as_backbone)
    network = model.backbone if isinstance(model, TimmAdapter) else model
    config = {**network.pretrained_cfg, "num_classes": model.num_classes}
    others = ClassList.from_dict(about["token_classes"]) if about.get("token_classes") else None
    if not (as_backbone or others):
        check_classes(name, config)
    use = _preprocessing(network, about, options, at_test_size=at_test_size)
    own_head = getattr(network, "aux_head", None)
    if isinstance(own_head, nn.Linear) and own_head.weight.any():  # all zeros: not trained
        model = TimmAdapter(network, name=name, num_classes=network.num_classes, img_size=use["img_size"])
    has_token_head = isinstance(model, TimmAdapter)
    usual = Inference(about.get("inference", Inference.COMBINED))  # as published for LV-ViT
    class_names, assumed = _class_names(model.num_classes, weights, config)
    return LoadedModel(
        name=name,
        model=(model if has_token_head else PlainClassifier(model, stage=stage)).eval(),
        class_names=class_names,
        names_assumed=assumed and preset is None,  # timm's own weights are ImageNet's
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
    """Return image size and crop of a network: as its file states, else as timm does for training or testing.

    `about`: the description in the file. `options`: the network's constructor arguments.
    """
    fixed_size = bool(network.pretrained_cfg.get("fixed_input_size")) and "dynamic_img_size" not in options
    data = resolve_data_config({}, model=network, use_test_size=at_test_size and not fixed_size)
    bilinear = about.get("interpolation", data["interpolation"]) == "bilinear"
    return {
        "img_size": pair(options.get("img_size") or about.get("img_size") or data["input_size"][1:]),
        "crop_fraction": about.get("crop_fraction", data["crop_pct"]),
        "interpolation": Interpolation.BILINEAR if bilinear else Interpolation.BICUBIC,
    }


def _class_names(num_classes: int, weights: str | None, config: Mapping[str, Any]) -> tuple[tuple[str, ...], bool]:
    """Return the class names of a network, from its file or timm's configuration, and whether they are a guess."""
    stated = read_class_names(weights) if weights is not None else ()
    stated = stated or names_in_order(config.get("label_names"))
    if len(stated) == num_classes:
        return stated, False
    if stated:
        say(
            f"the weights come with {len(stated):,} class names ({listed(list(stated))}) for {num_classes:,} classes: "
            "not used"
        )
    names = imagenet_names(num_classes)  # a guess: the ImageNet subset of this size
    return names, bool(names)
