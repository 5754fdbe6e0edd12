"""What a recipe says of a segmentation model. No torch, so that help comes at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tokenlabel.runtime.coercion import COUNT, NATURAL, POSITIVE, Choice, check_numbers, coerced_fields


class NeckKind(Choice):
    """The neck between a backbone without stages and the head: a pyramid of four scales, FCN's, or none.

    AUTO: by the head; none for a backbone with stages.
    """

    AUTO = "auto"
    PYRAMID = "pyramid"
    FCN = "fcn"
    NONE = "none"


class HeadKind(Choice):
    """UPERNET: pooling pyramid and feature pyramid. FCN: two convolutions. LINEAR: one linear layer."""

    UPERNET = "upernet"
    FCN = "fcn"
    LINEAR = "linear"


@dataclass(frozen=True, kw_only=True)
@coerced_fields
class SegmentModelConfig:
    """Backbone, neck and head of a segmentation model."""

    name: str
    """Backbone: `lvvit_t`, `lvvit_s`, `lvvit_m`, `lvvit_l`, `t2t_vit_14`, ..., or the name of any timm model."""
    img_size: tuple[int, int] = (512, 512)
    """Height and width of the training crops."""
    options: dict[str, Any] = field(default_factory=dict)
    """Other arguments of the backbone's constructor, such as `drop_path`, or `pretrained` for timm's."""
    weights: str | None = None
    """Initial weights: a run of `tokenlabel train` or `segment train`, or a published file."""
    average: bool = False
    """Take the EMA weights in that file; from our own runs they are taken anyway."""
    layers: tuple[int, ...] | None = None
    """Layers of the backbone that the head reads, from 0; by default four as published, or the last stages."""
    norm_eps: float | None = None
    """Epsilon of the backbone's LayerNorms (1e-6 in the published models); by default the backbone's own."""
    freeze_backbone: bool = False
    """Train only neck and heads."""
    neck: NeckKind = NeckKind.AUTO
    """pyramid, fcn, none, or auto: by the head, for a backbone without stages."""
    neck_width: int = 2048
    """Channels of the neck's last map."""
    head: HeadKind = HeadKind.UPERNET
    """upernet, fcn, or linear."""
    head_width: int = 256
    """Channels inside the heads."""
    dropout: float = 0.1
    """Dropout of channels before the classifier of each head."""
    auxiliary: bool = True
    """Add a small FCN head on the last map but one for training."""

    def __post_init__(self) -> None:
        check_numbers(self, "model.", img_size=NATURAL, neck_width=NATURAL, head_width=NATURAL)
        check_numbers(self, "model.", layers=COUNT, norm_eps=POSITIVE, dropout="[0, 1)")
