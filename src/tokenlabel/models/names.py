"""The names of models: ours under timm's roof (`timm.create_model("lvvit_s")`), what a name means, and why none."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, get_arch_pretrained_cfgs, register_model
from torch import Tensor, nn

from tokenlabel.models.lvvit import LVVIT_CONFIGS, LVViT
from tokenlabel.models.positions import resize_all_positions
from tokenlabel.models.t2t_vit import T2T_VIT_CONFIGS, T2TViT
from tokenlabel.models.vision_transformer import VisionTransformer
from tokenlabel.runtime.errors import ModelError
from tokenlabel.runtime.process import listed

FILE_ENDINGS = (".pth", ".pt", ".tar", ".safetensors", ".npz", ".bin", ".onnx", ".ckpt")

# In timm's names of networks trained on images and texts. Their head projects into the space of the texts, and timm
# calls the width of that space num_classes; the same networks fine-tuned on ImageNet ("_ft_in1k") have classes.
IMAGE_TEXT, FINE_TUNED = re.compile("clip|pe_core"), "_ft_in"

OUR_MODELS = (*LVVIT_CONFIGS, *T2T_VIT_CONFIGS)

# Read by timm when a model of this module is registered.
default_cfgs = generate_default_cfgs(
    {
        name: {
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "fixed_input_size": True,  # the model takes `img_size`
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
    """Make `timm.create_model("lvvit_t")` and its sisters work; calling it again does nothing."""
    for name in OUR_MODELS:
        if not timm.is_model(name):
            register_model(_entry_point(name))


def _entry_point(name: str) -> Callable[..., nn.Module]:
    kind, configs = (LVViT, LVVIT_CONFIGS) if name in LVVIT_CONFIGS else (T2TViT, T2T_VIT_CONFIGS)

    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build_model_with_cfg(
            kind,
            name,
            pretrained,
            config=configs[name],
            pretrained_filter_fn=_fit_weights,
            feature_cfg={"out_indices": 4, "feature_cls": "getter"},
            **kwargs,
        )

    create.__name__ = name  # timm registers a model under its function's name
    return create


def _fit_weights(tensors: dict[str, Any], model: VisionTransformer) -> dict[str, Tensor]:
    """Return a checkpoint's tensors for a model of this image size; timm itself sees to the class count.

    A file without a head for tokens gets one that says nothing: class logits + 0.5 * max(0) are class logits.
    """
    inner = tensors.get("state_dict", tensors)
    found = {name.removeprefix("module."): tensor for name, tensor in inner.items()}
    _, height_px, width_px = model.pretrained_cfg["input_size"]  # of the images that they were saved for
    grid = (height_px // model.patch_size_px, width_px // model.patch_size_px)
    fits = found["pos_embed"].shape[1] == 1 + grid[0] * grid[1]
    resize_all_positions(found, model, grid=grid if fits else None, name="the pretrained weights")
    for part in ("weight", "bias") if "head.weight" in found else ():  # one without classes has no heads
        found.setdefault(f"aux_head.{part}", torch.zeros_like(found[f"head.{part}"]))
    return found


def why_unknown(name: str, *, weights_option: str) -> str | None:
    """Return why a name means no model, and what was meant perhaps ("" if nothing comes close); None if it means one.

    `weights_option`: where a file of weights belongs.
    """
    if name in OUR_MODELS or name.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        return None
    architecture, dot, tag = name.partition(".")
    tags = [known.partition(".")[2] for known in get_arch_pretrained_cfgs(architecture)]
    if timm.is_model(architecture) and (not dot or tag in tags):
        return None  # whatever folder of this name there may be
    path, advice = Path(name), f"give the name of its network, and the file by {weights_option} {name}"
    if path.is_dir():
        return _about_folder(path)
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


def _about_folder(folder: Path) -> str:
    if not any(folder.iterdir()):
        return "it is an empty folder"
    if folder.name == "checkpoints":
        return f"did you mean the run, {folder.parent}?"
    if (folder / "recipe.yaml").exists():
        return "it is a run that has no checkpoint yet"
    if (folder / "config.json").exists():
        return f"did you mean local-dir:{folder}?"
    return "that folder holds neither checkpoints nor a config.json"


def check_classes(name: str, preset: Mapping[str, Any]) -> None:
    """Raise ModelError for a network without classes, by its pretrained configuration in timm.

    That is one without a classifier, or an image-text network as wide as its embeddings (unless its configuration
    names classes).
    """
    num_classes = preset["num_classes"]
    of_embedding = is_embedding(preset)
    if num_classes and not of_embedding:
        return
    what = f"{num_classes} outputs are an embedding, not classes" if of_embedding else "weights have no classifier"
    published = get_arch_pretrained_cfgs(preset.get("architecture") or "")
    others = [o for o, config in published.items() if config.num_classes and not is_embedding(vars(config))]
    raise ModelError(
        f"{name}: its {what}, so it says nothing of classes; as a teacher it needs a head (`tokenlabel fit-head IMAGES "
        f"head.safetensors --backbone {name} --from words`, then --teacher head.safetensors), to predict classes "
        "it must be fine-tuned (`tokenlabel train --model.name ... --model.options.pretrained true`)"
        + (f", or take weights that were trained to classify ({listed(others)})" if others else "")
    )


def is_embedding(preset: Mapping[str, Any]) -> bool:
    """Say whether a network's outputs are an embedding, by its pretrained configuration in timm."""
    architecture = preset.get("architecture") or ""
    embeddings = {
        config.num_classes
        for full_name, config in get_arch_pretrained_cfgs(architecture).items()
        if IMAGE_TEXT.search(full_name) and FINE_TUNED not in full_name
    }
    is_image_text = IMAGE_TEXT.search(f"{architecture}.{preset.get('tag')}") and not preset.get("label_names")
    return bool(is_image_text) and preset["num_classes"] in embeddings - {0}
