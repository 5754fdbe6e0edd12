"""Models that give every token its own logits: LV-ViT, T2T-ViT and any timm classifier with a token grid."""

from __future__ import annotations

from dataclasses import fields, replace
from difflib import get_close_matches
from typing import Any, TypeVar

from tokenlabel.method.outputs import Inference, Outputs, TokenModel
from tokenlabel.models.adapter import NoTokenGridError, TimmAdapter, create_timm_adapter
from tokenlabel.models.hub import why_unknown
from tokenlabel.models.lvvit import CONFIGS as LVVIT_CONFIGS
from tokenlabel.models.lvvit import LVViT, LVViTConfig
from tokenlabel.models.t2t_vit import CONFIGS as T2T_VIT_CONFIGS
from tokenlabel.models.t2t_vit import T2TViT, T2TViTConfig
from tokenlabel.models.timm_models import register_with_timm
from tokenlabel.models.weights import WeightsError, load_published

__all__ = [
    "Inference",
    "LVViT",
    "LVViTConfig",
    "NoTokenGridError",
    "Outputs",
    "T2TViT",
    "T2TViTConfig",
    "TimmAdapter",
    "TokenModel",
    "WeightsError",
    "create_model",
    "load_published",
    "register_with_timm",
]


OWN_MODELS = (*LVVIT_CONFIGS, *T2T_VIT_CONFIGS)

Config = TypeVar("Config", LVViTConfig, T2TViTConfig)


def create_model(name: str, *, num_classes: int, size_px: tuple[int, int], **options: Any) -> TokenModel:
    """Return a new model; docs/models.md lists what there is.

    `name`: `lvvit_t|s|m|l`, `t2t_vit_14|19|24`, or any that timm knows. `size_px`: (height, width) of the images.
    `options`: the fields of `LVViTConfig` or `T2TViTConfig`; for timm's models `stage` (see `TimmAdapter`) and whatever
    `timm.create_model` takes. Raises ValueError for unknown names and options, and for sizes that the model
    cannot take.
    """
    if name in LVVIT_CONFIGS:
        config = _configured(name, LVVIT_CONFIGS[name], options)
        return LVViT(config, num_classes=num_classes, size_px=size_px)
    if name in T2T_VIT_CONFIGS:
        config = _configured(name, T2T_VIT_CONFIGS[name], options)
        return T2TViT(config, num_classes=num_classes, size_px=size_px)
    reason = why_unknown(name, OWN_MODELS, weights_option="--model.weights")
    if reason is not None:
        raise ValueError(f"there is no model {name!r}; {reason or 'see docs/models.md for what there is'}")
    if ":" in name:  # timm's "hf-hub:" and "local-dir:"; what lies there may be an LV-ViT
        register_with_timm()
    return create_timm_adapter(name, num_classes=num_classes, size_px=size_px, **options)


def _configured(name: str, config: Config, options: dict[str, Any]) -> Config:
    known = [field.name for field in fields(config)]
    for option in options.keys() - set(known):
        hint = _suggestion(get_close_matches(option, known)) or f"it has {', '.join(known)}"
        raise ValueError(f"{name} has no option {option!r}; {hint}")
    return replace(config, **options)


def _suggestion(near: list[str]) -> str | None:
    return f"did you mean {' or '.join(near)}?" if near else None
