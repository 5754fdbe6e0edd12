"""A backbone of this package under a segmentation head: feature maps, neck, head, and a second head for training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokenlabel.models import TimmAdapter, create_model
from tokenlabel.models.decoders import (
    NUM_LEVELS,
    DecodeHead,
    FCNHead,
    HeadOutputs,
    Levels,
    LinearHead,
    Neck,
    NeckKind,
    UPerNetHead,
    find_levels,
)
from tokenlabel.models.runs import is_run, newest_checkpoint
from tokenlabel.models.weight_files import Weights, read_checkpoint
from tokenlabel.models.weights import LOGGER, load, load_published, misfit
from tokenlabel.runtime.coercion import COUNT, NATURAL, POSITIVE, Choice, check_numbers, coerced_fields
from tokenlabel.runtime.errors import ModelError


class HeadKind(Choice):
    """UPERNET: pooling pyramid and feature pyramid. FCN: two convolutions. LINEAR: one linear map of each location."""

    UPERNET = "upernet"
    FCN = "fcn"
    LINEAR = "linear"


@dataclass(frozen=True, kw_only=True)
@coerced_fields
class SegmentModelConfig:
    """Which network to train."""

    name: str
    """Backbone: `lvvit_t`, `lvvit_s`, `lvvit_m`, `lvvit_l`, `t2t_vit_14`, ..., or the name of any timm model."""
    img_size: tuple[int, int] = (512, 512)
    """Height and width of the crops that it is trained on."""
    options: dict[str, Any] = field(default_factory=dict)
    """What else the backbone's constructor takes, such as `drop_path`, or `pretrained` for timm's."""
    weights: str | None = None
    """Weights to begin with: a run of `tokenlabel train` or `segment train`, or a published file."""
    average: bool = False
    """Take the running average (EMA) in that file; of our own runs it is taken anyway, where there is one."""
    layers: tuple[int, ...] | None = None
    """Which layers of the backbone the head reads, from 0; by default four as published, or the last stages."""
    norm_eps: float | None = None
    """Epsilon of the backbone's LayerNorms (1e-6 in the published models); none leaves it as the backbone has it."""
    freeze_backbone: bool = False
    """Train the head alone."""
    neck: NeckKind = NeckKind.AUTO
    """pyramid, fcn, none, or auto: what the head wants of a backbone that has no stages."""
    neck_width: int = 2048
    """Channels of the neck's last map."""
    head: HeadKind = HeadKind.UPERNET
    """upernet, fcn, or linear."""
    head_width: int = 256
    """Channels inside the heads."""
    dropout: float = 0.1
    """Share of the channels that the heads drop before they classify."""
    auxiliary: bool = True
    """Train a second, small FCN head on the last map but one; it is not used afterwards."""

    def __post_init__(self) -> None:
        check_numbers(self, "model.", img_size=NATURAL, neck_width=NATURAL, head_width=NATURAL)
        check_numbers(self, "model.", layers=COUNT, norm_eps=POSITIVE, dropout="[0, 1)")


@dataclass(frozen=True, eq=False)
class SegmentOutputs:
    """What the heads end with; `second` is None in evaluation and without a second head."""

    head: HeadOutputs
    second: HeadOutputs | None

    @property
    def logits(self) -> Float[Tensor, "B C h w"]:
        """The logits on the grid that the head ends on, computed anew at each access."""
        return self.head.logits

    @property
    def auxiliary(self) -> Float[Tensor, "B C h2 w2"] | None:
        """The logits of the second head."""
        return None if self.second is None else self.second.logits


class SegmentationModel(nn.Module):
    """A backbone, a neck where it has no stages, a head, and a second head that only training uses.

    What no head reaches (the backbone's last norm, its classifier) is kept, but not trained.
    `mean`, `std`: what pixels in [0, 1] are normalised with. `multiple_px`: images with sides of multiples of it are
    not cut at the edges. `unreached`: the entries of the model's state that nothing depends on.
    """

    def __init__(
        self,
        backbone: TimmAdapter,
        levels: Levels,
        *,
        neck: Neck | None,
        decode_head: DecodeHead,
        auxiliary_head: DecodeHead | None,
    ) -> None:
        super().__init__()
        self._backbone_is_frozen = False
        self.backbone, self.levels, self.neck = backbone, levels, neck
        self.decode_head, self.auxiliary_head = decode_head, auxiliary_head
        self.mean, self.std, self.multiple_px = backbone.mean, backbone.std, levels.multiple_px
        self.unreached: frozenset[str] = frozenset()

    def forward(self, images: Float[Tensor, "B 3 height width"]) -> SegmentOutputs:
        """Return what the heads make of normalised images."""
        maps = self.maps(images)
        use_auxiliary = self.training and self.auxiliary_head is not None
        return SegmentOutputs(
            head=self.decode_head.outputs(maps),
            second=self.auxiliary_head.outputs(maps) if use_auxiliary and self.auxiliary_head else None,
        )

    def maps(self, images: Float[Tensor, "B 3 height width"]) -> list[Float[Tensor, "B _ _ _"]]:
        """Return the maps that the heads read, the finest first, channels first."""
        found = self.backbone.intermediates(images, self.levels.layers)
        maps = [features.permute(0, 3, 1, 2) for features in found]  # [B, D, h, w]
        return self.neck(maps) if self.neck is not None else maps

    @torch.no_grad()
    def grid_for(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Return the (rows, columns) that the head ends on, found by running the model on a blank image.

        `img_size`: (height, width), multiples of `multiple_px`.
        """
        was_training = self.training
        logits = self.eval()(next(self.parameters()).new_zeros(1, 3, *img_size)).logits
        self.train(was_training)
        return logits.shape[2], logits.shape[3]

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters that weight decay leaves alone, beside biases and norms."""
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()}

    def layers(self) -> dict[str, int]:
        """Return the layer of each parameter by its name: the backbone's own, and the highest for neck and heads."""
        layers = {f"backbone.{name}": layer for name, layer in self.backbone.layers().items()}
        top = max(layers.values())
        return {name: layers.get(name, top) for name, _ in self.named_parameters()}

    def freeze_backbone(self) -> None:
        """Stop the backbone from training: no gradients, no new statistics, no drop path, from now on."""
        self.backbone.requires_grad_(False)
        self._backbone_is_frozen = True
        self.train(self.training)

    def train(self, mode: bool = True) -> SegmentationModel:
        """Set training or evaluation mode, as PyTorch does, but leave a frozen backbone in evaluation mode."""
        super().train(mode)
        if self._backbone_is_frozen:
            self.backbone.eval()
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep no activations inside the backbone's blocks, compute them again in the backward pass."""
        self.backbone.set_grad_checkpointing(enable)

    def fsdp_blocks(self) -> list[nn.Module]:
        """Return the blocks that the backbone repeats: what sharded training wraps one by one."""
        return self.backbone.fsdp_blocks()


def create_segmentation_model(config: SegmentModelConfig, *, num_classes: int) -> SegmentationModel:
    """Return a new model with the weights that it is born with (`config.weights` are for `load_segmentation_weights`).

    Raises ValueError for names, options, sizes and layers that do not exist or do not go together.
    """
    backbone = _create_backbone(config)
    levels = find_levels(backbone, config.img_size, layers=config.layers)
    neck = _create_neck(config, levels)
    widths = neck.widths if neck is not None else levels.widths
    width, dropout = config.head_width, config.dropout
    auxiliary_head = None
    # Created before the other head: what either draws decides the initial weights.
    if config.auxiliary and config.head is not HeadKind.LINEAR:
        level = -min(2, len(widths))  # the last map but one, where there are two
        auxiliary_head = FCNHead(
            widths, num_classes, width=width, dropout=dropout, num_convs=1, concatenate=False, level=level
        )
    match config.head:
        case HeadKind.UPERNET:
            decode_head = UPerNetHead(widths, num_classes, width=width, dropout=dropout)
        case HeadKind.FCN:
            decode_head = FCNHead(widths, num_classes, width=width, dropout=dropout)
        case HeadKind.LINEAR:
            decode_head = LinearHead(widths, num_classes)
    model = SegmentationModel(backbone, levels, neck=neck, decode_head=decode_head, auxiliary_head=auxiliary_head)
    model.unreached = _leave_unreached(model, config.img_size)
    if config.freeze_backbone:
        model.freeze_backbone()
    return model


def _create_backbone(config: SegmentModelConfig) -> TimmAdapter:
    create = partial(create_model, config.name, num_classes=1, img_size=config.img_size)  # its head is not used
    try:  # timm's ViTs take images of other sizes only if told so
        backbone = create(**{"dynamic_img_size": True, **config.options})
    except ValueError:  # other networks do not know the option
        backbone = create(**config.options)
    assert isinstance(backbone, TimmAdapter)
    if config.norm_eps is not None:
        for module in backbone.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = config.norm_eps
    return backbone


def _create_neck(config: SegmentModelConfig, levels: Levels) -> Neck | None:
    kind = config.neck
    if kind is NeckKind.AUTO:
        of_head = {HeadKind.UPERNET: NeckKind.PYRAMID, HeadKind.FCN: NeckKind.FCN}
        kind = NeckKind.NONE if levels.has_stages else of_head.get(config.head, NeckKind.NONE)
    if kind is NeckKind.NONE:
        return None
    if len(set(levels.widths)) > 1:
        raise ValueError(
            f"model.neck is {kind}, but the maps of {config.name} differ in width "
            f"({', '.join(map(str, levels.widths))}): a neck is for backbones of one scale; leave it out"
        )
    if len(levels.layers) > NUM_LEVELS:
        raise ValueError(
            f"model.layers names {len(levels.layers)} layers ({', '.join(map(str, levels.layers))}); a neck takes "
            f"{NUM_LEVELS} at the most"
        )
    return Neck(levels.widths[-1], kind=kind, last_width=config.neck_width)


def _leave_unreached(model: SegmentationModel, img_size: tuple[int, int]) -> frozenset[str]:
    """Stop the parameters from training that no head depends on: parallel training waits for the gradient of each.

    Return the entries of the model's state that belong to such parts.
    """
    image = next(model.parameters()).new_zeros(1, 3, *img_size)
    was_training = model.training
    maps = model.eval().maps(image)
    heads = [head for head in (model.decode_head, model.auxiliary_head) if head is not None]
    pending = [head(maps).grad_fn for head in heads]
    model.train(was_training)
    # From the heads' outputs back through the graph of gradients; a node that is a parameter's holds it as `variable`.
    seen, reached = set(), set()
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            reached.add(id(getattr(node, "variable", None)))
            pending.extend(before for before, _ in node.next_functions)
    unreached: set[str] = set()
    # Whole modules only: one of which a head reaches anything has to be in a file.
    for prefix, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if p.requires_grad]
        if own and not any(id(parameter) in reached for parameter in own):
            unreached |= {f"{prefix}.{name}" for name in _own_entries(module)}
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.requires_grad and id(parameter) in reached)
    return frozenset(unreached)


def _own_entries(module: nn.Module) -> list[str]:
    """Return the entries of a module's state that do not belong to modules inside it."""
    inner = tuple(f"{name}." for name, _ in module.named_children())
    return [name for name in module.state_dict() if not name.startswith(inner)]


# Published LV-ViT + UPerNet files name the backbone's parameters `backbone.NAME` (ours: `backbone.backbone.NAME`), with
# the neck's among them (`backbone.side_layer1` to `4`; ours: `neck.side_layer1`); the heads have our names.
_PUBLISHED_NECK, _NECK = "backbone.side_layer", "neck.side_layer"


def load_segmentation_weights(model: SegmentationModel, path: str | Path, *, average: bool = False) -> frozenset[str]:
    """Load what a file or a run holds, a backbone or a whole segmentation model; return what starts anew.

    `path`: a published file (`.pth`, `.safetensors`), a run folder or one of its checkpoints; of these the averaged
    weights, where there are some. `average`: take the average in a published file. The backbone adapts to another image
    size as in `load_published`. Classifiers for other classes are left out and start anew, with a warning.
    Raises ModelError, and leaves the model alone, where anything else does not fit: it lists the names.
    """
    path = newest_checkpoint(path) if is_run(path) else Path(path)
    if path.is_dir():
        average = (path / "ema.safetensors").exists()
    found = read_checkpoint(path, average=average)
    spared = {key.removeprefix("backbone.") for key in model.unreached}
    if not any(key.startswith("decode_head.") for key in found):
        load_published(model.backbone, path, average=average, spared=spared)
        return frozenset(name for name, _ in model.named_parameters() if not name.startswith("backbone."))
    backbone, heads = _backbone_and_heads(found, path)
    if model.auxiliary_head is None:
        heads = {key: tensor for key, tensor in heads.items() if not key.startswith("auxiliary_head.")}
    wanted = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith("backbone.")}
    other_classes = {
        key
        for key in heads.keys() & wanted.keys()
        if "conv_seg." in key
        and heads[key].shape[1:] == wanted[key].shape[1:]
        and heads[key].shape != wanted[key].shape
    }
    if complaint := misfit(heads, wanted, spared=model.unreached | other_classes):
        raise ModelError(f"{path} is for another model or other options: {complaint}")
    load(model.backbone, backbone, spared=spared)  # all of it or, with an error, nothing
    model.load_state_dict({key: heads[key] for key in heads.keys() - other_classes}, strict=False)
    if other_classes:
        LOGGER.warning("%s is for other classes: %s start anew", path, ", ".join(sorted(other_classes)))
    return frozenset(other_classes)


def _backbone_and_heads(found: Mapping[str, Tensor], path: Path) -> tuple[Weights, dict[str, Tensor]]:
    """Return the tensors of a whole model as those of its backbone and, by our names, those of neck and heads."""
    backbone, token_head, heads = {}, {}, {}
    for key, tensor in found.items():
        inner = key.removeprefix("backbone.").removeprefix("backbone.")
        if key.startswith(_PUBLISHED_NECK):
            heads[_NECK + key.removeprefix(_PUBLISHED_NECK)] = tensor
        elif not key.startswith("backbone."):
            heads[key] = tensor
        elif inner.startswith("token_head."):
            token_head[inner.removeprefix("token_head.")] = tensor
        else:
            backbone[inner] = tensor
    return Weights(path, "backbone.", backbone, token_head), heads
