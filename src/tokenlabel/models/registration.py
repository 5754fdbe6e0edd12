"""LV-ViT and T2T-ViT under timm's roof: `timm.create_model("lvvit_s")` once they are registered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from tokenlabel.models.lvvit import LVVIT_CONFIGS, LVViT
from tokenlabel.models.t2t_vit import T2T_VIT_CONFIGS, T2TViT
from tokenlabel.models.vision_transformer import VisionTransformer
from tokenlabel.models.weights import resize_all_positions

__all__ = ["OUR_MODELS", "register_with_timm"]

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
