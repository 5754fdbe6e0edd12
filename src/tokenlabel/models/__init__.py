"""Models that give every token its own logits: LV-ViT, T2T-ViT and any timm classifier with a token grid."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tokenlabel.models.lvvit import CONFIGS, LVViT, LVViTConfig
from tokenlabel.models.outputs import Inference, Outputs, TokenModel

__all__ = ["Inference", "LVViT", "LVViTConfig", "Outputs", "TokenModel", "create_model"]


def create_model(name: str, *, num_classes: int, size_px: tuple[int, int], **options: Any) -> TokenModel:
    """Return a new model; see docs/models.md for the names and what each takes.

    `size_px`: (height, width) of the images. `options`: the fields of `LVViTConfig` for LV-ViT.
    """
    return LVViT(replace(CONFIGS[name], **options), num_classes=num_classes, size_px=size_px)
