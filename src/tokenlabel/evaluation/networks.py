"""Networks to evaluate: a run, one of its checkpoints, or a model by its name, with how it looks at images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from jaxtyping import Float
from timm.data.config import resolve_data_config
from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from tokenlabel.data.augment import Interpolation
from tokenlabel.models import Inference, Outputs, TokenModel, create_model, load_published
from tokenlabel.models.lvvit import CONFIGS as LVVIT_CONFIGS
from tokenlabel.models.t2t_vit import CONFIGS as T2T_VIT_CONFIGS
from tokenlabel.models.weights import read_checkpoint, resize_all_positions
from tokenlabel.runtime.errors import first_line
from tokenlabel.training.checkpoint import list_checkpoints, load_model
from tokenlabel.training.recipe import Recipe


class NetworkError(ValueError):
    """A network that does not exist, cannot be loaded, or cannot do what is asked of it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Network:
    """A network with what its evaluation needs. `size_px`: (height, width) of the images that it is given.

    `class_names`: empty if nobody knows them. `heads`: the ways to predict that were trained, the usual one first.
    `recipe`, `step`: of the run that it comes from.
    """

    name: str
    model: TokenModel | PlainClassifier
    num_classes: int
    class_names: tuple[str, ...]
    size_px: tuple[int, int]
    crop_fraction: float
    interpolation: Interpolation
    heads: tuple[Inference, ...]
    recipe: Recipe | None = None
    step: int | None = None

    def chosen_heads(self, wanted: str | None) -> tuple[Inference, ...]:
        """Return the ways to predict that `wanted` means: one by name, `all`, or the usual one.

        Raises NetworkError for a head that was never trained.
        """
        if wanted is None:
            return self.heads[:1]
        if wanted == "all":
            return tuple(head for head in Inference if head in self.heads)
        if Inference(wanted) not in self.heads:
            raise NetworkError(
                f"{self.name} was trained without token labels, so its token head says nothing; "
                "evaluate it with --inference class"
            )
        return (Inference(wanted),)


class PlainClassifier(nn.Module):
    """Any timm classifier, asked for its own logits alone; the one token that it has repeats them."""

    def __init__(self, backbone: nn.Module, *, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.backbone, self.mean, self.std = backbone, tuple(mean), tuple(std)

    def forward(self, images: Float[Tensor, "B 3 height width"]) -> Outputs:
        """Return the network's logits of normalised images."""
        logits = self.backbone(images)
        return Outputs(logits, logits[:, None], nn.Identity(), (1, 1))


def find_network(name: str, *, weights: str | None = None, size: int | None = None) -> Network:
    """Return a network by the path of a run or checkpoint, or by the name of a model, in evaluation mode.

    `weights`: a checkpoint file for a model's name; timm's pretrained weights if None. `size`: of the square images
    that it shall see, in px; its own by default (timm's models: the size that timm validates at). Raises
    NetworkError for a name that means nothing and weights that cannot be loaded.
    """
    path = Path(name)
    if (path / "state.json").exists() or list_checkpoints(path):
        if weights is not None:
            raise NetworkError(f"{name} is a run and has weights of its own; leave --weights out")
        return _from_run(path, size)
    if name in LVVIT_CONFIGS or name in T2T_VIT_CONFIGS:
        return _from_own_name(name, weights, size or 224)
    if ":" not in name and not timm.is_model(name):  # a colon: timm's "hf-hub:" and "local-dir:"
        raise NetworkError(
            f"no network {name!r}: neither a run folder with a checkpoint, nor a model that timm knows"
        )
    return _from_timm(name, weights, size)


def _from_run(path: Path, size: int | None) -> Network:
    trained = load_model(path)
    recipe, model = trained.recipe, trained.model
    size_px = (size, size) if size else recipe.model.size_px
    if size_px != recipe.model.size_px:
        tensors = model.state_dict()
        other = create_model(
            recipe.model.name, num_classes=model.num_classes, size_px=size_px, **recipe.model.options
        )
        resize_all_positions(tensors, other, grid=model.grid, name=str(path))
        other.load_state_dict(tensors)
        model = other
    usual = recipe.eval.inference
    heads = dict.fromkeys([usual, *Inference] if recipe.uses_token_labels else [Inference.CLASS])
    return Network(
        name=str(path),
        model=model.eval(),
        num_classes=model.num_classes,
        class_names=tuple(trained.class_names),
        size_px=size_px,
        crop_fraction=recipe.eval.crop_fraction,
        interpolation=Interpolation.BICUBIC,
        heads=tuple(heads),
        recipe=recipe,
        step=trained.step,
    )


def _from_own_name(name: str, weights: str | None, size: int) -> Network:
    if weights is None:
        raise NetworkError(
            f"{name} has no weights that could be downloaded; give a checkpoint file by --weights"
        )
    classifier = read_checkpoint(weights).get("head.weight")
    if classifier is None:
        raise NetworkError(f"{weights}: has no classifier (head.weight), so it is no {name}")
    model = create_model(name, num_classes=len(classifier), size_px=(size, size))
    loaded = load_published(model, weights)
    with_tokens = hasattr(model, "aux_head") and not loaded.new_heads
    return Network(
        name=name,
        model=model.eval(),
        num_classes=len(classifier),
        class_names=_imagenet_names(len(classifier)),
        size_px=(size, size),
        crop_fraction=0.9,
        interpolation=Interpolation.BICUBIC,
        heads=(Inference.COMBINED, Inference.CLASS, Inference.TOKENS) if with_tokens else (Inference.CLASS,),
    )


def _from_timm(name: str, weights: str | None, size: int | None) -> Network:
    preset = get_pretrained_cfg(name, allow_unregistered=True)
    options: dict[str, Any] = {}
    if size is not None and preset is not None and preset.fixed_input_size:
        options["img_size"] = size
    if weights is not None:
        options["pretrained_cfg_overlay"] = file_overlay(weights, preset)
    try:
        model: Any = timm.create_model(name, pretrained=True, **options)
    except Exception as error:  # timm, the hub and its network library raise whatever they run into
        advice = "give a checkpoint file by --weights" if weights is None else "is it of this model?"
        raise NetworkError(
            f"the weights of {name} cannot be loaded ({first_line(error)}); {advice}"
        ) from error
    fixed = bool(model.pretrained_cfg.get("fixed_input_size"))
    data = resolve_data_config({}, model=model, use_test_size=not fixed)
    _, height_px, width_px = data["input_size"]
    return Network(
        name=name,
        model=PlainClassifier(model, mean=data["mean"], std=data["std"]).eval(),
        num_classes=model.num_classes,
        class_names=_imagenet_names(model.num_classes),
        size_px=(size, size) if size else (height_px, width_px),
        crop_fraction=data["crop_pct"],
        interpolation=Interpolation.BILINEAR
        if data["interpolation"] == "bilinear"
        else Interpolation.BICUBIC,
        heads=(Inference.CLASS,),
    )


def file_overlay(path: str, preset: Any) -> dict[str, Any]:
    """Return what timm has to be told so that it takes its pretrained weights from a file."""
    overlay: dict[str, Any] = {"file": path, "source": "file"}
    if path.endswith(".npz"):  # of the original ViTs, which timm reads its own way
        return overlay
    classifier = preset.classifier if preset is not None else None
    name = classifier if isinstance(classifier, str) else classifier[0] if classifier else ""
    weight = read_checkpoint(path).get(f"{name}.weight")
    if weight is not None:
        overlay["num_classes"] = len(weight)
    return {**overlay, "custom_load": False}


def _imagenet_names(num_classes: int) -> tuple[str, ...]:
    """Return ImageNet's names of so many classes (WordNet ids); none for another number."""
    subset = infer_imagenet_subset({"num_classes": num_classes})
    return tuple(ImageNetInfo(subset).label_names()) if subset else ()


def move(network: Network, device: torch.device) -> None:
    """Move a network's model to a device, channels last in memory, with nothing to train."""
    model: nn.Module = network.model.to(device).requires_grad_(False)
    model.to(memory_format=torch.channels_last)
