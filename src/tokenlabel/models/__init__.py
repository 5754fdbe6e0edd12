"""Models with logits for every token: LV-ViT, T2T-ViT and any timm classifier with a token grid."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenlabel.core.config import Inference
    from tokenlabel.core.outputs import Outputs, TokenModel
    from tokenlabel.models.adapter import TimmAdapter
    from tokenlabel.models.creation import create_model
    from tokenlabel.models.lvvit import LVViT, LVViTConfig
    from tokenlabel.models.names import register_with_timm
    from tokenlabel.models.t2t_vit import T2TViT, T2TViTConfig
    from tokenlabel.models.weights import load_published

# Imported when first asked for, so that a recipe, which reads `options.py` alone, takes no torch.
_MODULE_OF = {
    "Inference": "core.config",
    "LVViT": "models.lvvit",
    "LVViTConfig": "models.lvvit",
    "Outputs": "core.outputs",
    "T2TViT": "models.t2t_vit",
    "T2TViTConfig": "models.t2t_vit",
    "TimmAdapter": "models.adapter",
    "TokenModel": "core.outputs",
    "create_model": "models.creation",
    "load_published": "models.weights",
    "register_with_timm": "models.names",
}

__all__ = [
    "Inference",
    "LVViT",
    "LVViTConfig",
    "Outputs",
    "T2TViT",
    "T2TViTConfig",
    "TimmAdapter",
    "TokenModel",
    "create_model",
    "load_published",
    "register_with_timm",
]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"tokenlabel.{_MODULE_OF[name]}"), name)
