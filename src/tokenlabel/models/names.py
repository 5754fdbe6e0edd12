"""Models by name: ours registered with timm, what is wrong with a name, and networks with pretrained weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from jaxtyping import Float
from timm.data.config import resolve_data_config
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    get_arch_pretrained_cfgs,
    get_pretrained_cfg,
    register_model,
)
from torch import Tensor, nn

from tokenlabel.core.outputs import Outputs
from tokenlabel.models.adapter import TimmAdapter
from tokenlabel.models.features import REFUSALS
from tokenlabel.models.lvvit import LVVIT_CONFIGS, LVViT
from tokenlabel.models.positions import fit_pretrained_positions, grid_of, resize_all_positions, resize_positions
from tokenlabel.models.runs import is_run
from tokenlabel.models.t2t_vit import T2T_VIT_CONFIGS, T2TViT
from tokenlabel.models.vision_transformer import VisionTransformer
from tokenlabel.models.weight_files import find_weights, read_class_names
from tokenlabel.models.weights import build_with, count_classes, load, misfit
from tokenlabel.runtime.coercion import pair
from tokenlabel.runtime.errors import ModelError, first_line
from tokenlabel.runtime.hub import hub_or_cache, options_without_weights
from tokenlabel.runtime.process import listed

FILE_ENDINGS = (".pth", ".pt", ".tar", ".safetensors", ".npz", ".bin", ".onnx", ".ckpt")

# Parts of timm's names of image-text networks. Their head projects into the text embedding space, whose width timm
# calls num_classes; the same networks fine-tuned on ImageNet ("_ft_in1k") have classes.
IMAGE_TEXT, FINE_TUNED = re.compile("clip|pe_core"), "_ft_in"

OUR_MODELS = (*LVVIT_CONFIGS, *T2T_VIT_CONFIGS)

# timm reads this global of the module that registers a model.
default_cfgs = generate_default_cfgs(
    {
        name: {
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "fixed_input_size": True,  # the constructor takes `img_size`
            "crop_pct": 0.9,
            "interpolation": "bicubic",
            "mean": VisionTransformer.mean,
            "std": VisionTransformer.std,
            "first_conv": "patch_embed.conv1" if name in LVVIT_CONFIGS else None,
            "classifier": ("head", "aux_head"),
        }
        for name in OUR_MODELS
    }
)


def register_with_timm() -> None:
    """Register our models, so that `timm.create_model("lvvit_t")` works; calling it again does nothing."""
    for name in OUR_MODELS:
        if not timm.is_model(name):
            register_model(_entry_point(name))


def _entry_point(name: str) -> Callable[..., nn.Module]:
    kind, configs = (LVViT, LVVIT_CONFIGS) if name in LVVIT_CONFIGS else (T2TViT, T2T_VIT_CONFIGS)

    def _create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build_model_with_cfg(
            kind,
            name,
            pretrained,
            config=configs[name],
            pretrained_filter_fn=_fit_weights,
            feature_cfg={"out_indices": 4, "feature_cls": "getter"},
            **kwargs,
        )

    _create.__name__ = name  # timm registers a model under its function's name
    return _create


def _fit_weights(tensors: dict[str, Any], model: VisionTransformer) -> dict[str, Tensor]:
    """Return a checkpoint's tensors for a model of another image size; timm itself adapts the number of classes."""
    inner = tensors.get("state_dict", tensors)
    found = {name.removeprefix("module."): tensor for name, tensor in inner.items()}
    _, height_px, width_px = model.pretrained_cfg["input_size"]  # of the saved weights
    grid = (height_px // model.patch_size_px, width_px // model.patch_size_px)
    fits = found["pos_embed"].shape[1] == 1 + grid[0] * grid[1]
    resize_all_positions(found, model, grid=grid if fits else None, name="the pretrained weights")
    # A missing token head becomes zeros: class logits + 0.5 * max(0) are class logits. Without classes there is none.
    for part in ("weight", "bias") if "head.weight" in found else ():
        found.setdefault(f"aux_head.{part}", torch.zeros_like(found[f"head.{part}"]))
    return found


def why_unknown(name: str, *, weights_option: str) -> str | None:
    """Return why a name is no model, with a suggestion ("" if none comes close); None if it is one.

    `weights_option`: the option that takes a file of weights.
    """
    if name in OUR_MODELS or name.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        return None
    architecture, dot, tag = name.partition(".")
    tags = [known.partition(".")[2] for known in get_arch_pretrained_cfgs(architecture)]
    if timm.is_model(architecture) and (not dot or tag in tags):
        return None  # even if there is a folder of this name
    path, advice = Path(name), f"give the name of its network, and the file by {weights_option} {name}"
    if path.is_dir():
        return _about_folder(path, weights_option)
    if path.is_file() and (path.parent / "state.json").exists():
        return f"it is a file of a checkpoint: give its folder, {path.parent}"
    if path.is_file():
        return f"it is a file: {advice}"
    if name.endswith(FILE_ENDINGS):
        return f"there is no such file; if there were, {advice}"
    if re.fullmatch(r"[\w-]+/[\w.-]+", name):
        return f"there is no such folder; a model of the Hugging Face hub is hf://{name}"
    if "/" in name or name.startswith((".", "~")):
        return "there is no such folder"
    if timm.is_model(architecture):
        if not any(tags):
            return f"{architecture} comes without a tag"
        near = get_close_matches(tag, tags) or [known for known in tags if known]
        return f"Invalid pretrained tag ({tag}) for {architecture}, which has {listed(near)}"
    models = sorted({*OUR_MODELS, *timm.list_models()})
    near = get_close_matches(name.lower(), models) or get_close_matches(architecture.lower(), models)
    return f"did you mean {' or '.join(near)}?" if near else ""


def _about_folder(folder: Path, weights_option: str) -> str:
    if not any(folder.iterdir()):
        return "it is an empty folder"
    if is_run(folder):
        return f"it is a run: {weights_option} {folder} takes its weights, and its network where none is named"
    if folder.name == "checkpoints":
        return f"did you mean the run, {folder.parent}?"
    if (folder / "recipe.yaml").exists():
        return "it is a run that has no checkpoint yet"
    if (folder / "config.json").exists():
        return f"did you mean local-dir:{folder}?"
    return "that folder holds neither checkpoints nor a config.json"


def check_classes(name: str, preset: Mapping[str, Any]) -> None:
    """Raise ModelError for a network without classes, by its pretrained configuration in timm.

    It has no classifier, or it is an image-text network whose outputs are its embedding.
    """
    num_classes = preset["num_classes"]
    of_embedding = is_embedding(preset)
    if num_classes and not of_embedding:
        return
    what = f"{num_classes} outputs are an embedding, not classes" if of_embedding else "weights have no classifier"
    published = get_arch_pretrained_cfgs(preset.get("architecture") or "")
    others = [o for o, config in published.items() if config.num_classes and not is_embedding(vars(config))]
    raise ModelError(
        f"{name}: its {what}, so it predicts no classes; as a teacher it needs a head (`tokenlabel fit-head IMAGES "
        f"head.safetensors --backbone {name} --from words`, then --teacher head.safetensors), to predict classes "
        "it must be fine-tuned (`tokenlabel train --model.name ... --model.options.pretrained true`)"
        + (f", or take weights that were trained to classify ({listed(others)})" if others else "")
    )


def is_embedding(preset: Mapping[str, Any]) -> bool:
    """Return True if a network's outputs are an embedding, by its pretrained configuration in timm."""
    architecture = preset.get("architecture") or ""
    embeddings = {
        config.num_classes
        for full_name, config in get_arch_pretrained_cfgs(architecture).items()
        if IMAGE_TEXT.search(full_name) and FINE_TUNED not in full_name
    }
    is_image_text = IMAGE_TEXT.search(f"{architecture}.{preset.get('tag')}") and not preset.get("label_names")
    return bool(is_image_text) and preset["num_classes"] in embeddings - {0}


class PlainClassifier(nn.Module):
    """A timm classifier as a model of `Outputs`: its logits are also those of the only token.

    `stage`: of the tokens that `with_tokens` returns, see `TimmAdapter`.
    """

    def __init__(self, backbone: Any, *, stage: int | None = None) -> None:
        super().__init__()
        self.stage = stage
        data = resolve_data_config({}, model=backbone)
        self.backbone, self.mean, self.std = backbone, tuple(data["mean"]), tuple(data["std"])
        self.num_classes: int = backbone.num_classes

    def forward(self, images: Float[Tensor, "B 3 height width"]) -> Outputs:
        """Return the network's logits for normalised images."""
        logits = self.backbone(images)
        return Outputs(logits, logits[:, None], nn.Identity(), (1, 1))

    def with_tokens(self, name: str, img_size: tuple[int, int]) -> TimmAdapter:
        """Return the network with its tokens, whose head is untrained. Raises ValueError if it has no token grid."""
        return TimmAdapter(self.backbone, name=name, num_classes=self.num_classes, img_size=img_size, stage=self.stage)


def network_by_name(
    name: str, weights: str | None, about: Mapping[str, Any], *, img_size: tuple[int, int] | None, as_backbone: bool
) -> tuple[Any, dict[str, Any]]:
    """Return a network with timm's pretrained weights or those of a file, and its constructor arguments.

    `about`: the description in the file, see `runs.description_of`.
    """
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
            network = timm.create_model(name, pretrained=True, **options)
        fit_pretrained_positions(network)
        return network, options
    except Exception as error:  # timm, the hub and HTTP libraries raise errors of many kinds
        advice = "give a checkpoint file by --weights" if weights is None else "is it of this model?"
        raise ModelError(f"the weights of {name} cannot be loaded ({first_line(error)}); {advice}") from error


def _takes_any_size(name: str, options: Mapping[str, Any]) -> bool:
    """Return True if the model supports timm's `dynamic_img_size`."""
    try:
        with torch.device("meta"):  # without memory or initialisation
            timm.create_model(name, **{**options, "dynamic_img_size": True})
    except REFUSALS:  # timm does not say which models have the option
        return False
    return True


def _from_file(name: str, path: str, options: dict[str, Any], about: Mapping[str, Any], *, img_size: Any) -> Any:
    """Return a network with a file's weights: a TimmAdapter if they have a trained token head, else timm's module."""
    stage = options.pop("stage", None)
    create = partial(timm.create_model, name, **options)
    stated = read_class_names(path)
    with hub_or_cache(online=False):
        network: Any = create(**({"num_classes": len(stated)} if stated else {}))
    weights = find_weights(path, network.state_dict(), average=None)
    num_classes = count_classes(weights, network)
    # Created once more only for another number of classes, or below where timm has to adapt the tensors.
    if num_classes != network.num_classes:
        with hub_or_cache(online=False):
            network = create(num_classes=num_classes)
    if weights.token_head and about["uses_token_labels"]:
        size = pair(img_size or network.pretrained_cfg["input_size"][1:])
        others = about.get("token_classes")
        model = TimmAdapter(
            network,
            name=name,
            num_classes=num_classes,
            img_size=size,
            stage=stage,
            num_token_classes=others and others["count"],
        )
        model.rebuild = create
        new_heads = load(model, weights, tokens="same" if others else "classes").new_heads
        untrained = any(name.startswith("token_head.") for name in new_heads)
        return network if untrained else model
    if hasattr(network, "aux_head"):
        network.aux_head = None  # the file has no trained one
    own = getattr(network, "grid", None) or getattr(getattr(network, "patch_embed", None), "grid_size", None)
    if own is not None and (grid := grid_of(network, own, weights)) is not None:
        positions = resize_positions(weights.backbone["pos_embed"], grid, own)
        weights = replace(weights, backbone={**weights.backbone, "pos_embed": positions})
    if weights.path.suffix == ".npz" or misfit(weights.backbone, network.state_dict(), spared=()):
        network = build_with(create, replace(weights, token_head={}), like=network)
        if hasattr(network, "aux_head"):
            network.aux_head = None
    else:
        network.load_state_dict(weights.backbone, strict=False)  # files may lack BatchNorm's counts of batches
    return network
