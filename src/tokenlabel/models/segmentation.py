"""Segmentation models: a backbone, a neck, a head, and a second head for training; and the weights they begin with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

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
    UPerNetHead,
    find_levels,
)
from tokenlabel.models.features import evaluating
from tokenlabel.models.options import HeadKind, NeckKind, SegmentModelConfig
from tokenlabel.models.runs import is_run, newest_checkpoint
from tokenlabel.models.weight_files import Weights, find_weights, read_checkpoint
from tokenlabel.models.weights import LOGGER, class_rows, fit_heads, load, misfit
from tokenlabel.runtime.errors import ModelError
from tokenlabel.runtime.process import say


@dataclass(frozen=True, eq=False)
class SegmentOutputs:
    """Outputs of the heads; `second` is None in evaluation mode and without a second head."""

    head: HeadOutputs
    second: HeadOutputs | None

    @property
    def logits(self) -> Float[Tensor, "B C h w"]:
        """The logits on the head's grid, computed at each access."""
        return self.head.logits

    @property
    def auxiliary(self) -> Float[Tensor, "B C h2 w2"] | None:
        """The logits of the second head."""
        return None if self.second is None else self.second.logits


class SegmentationModel(nn.Module):
    """A backbone, a neck if it has no stages, a head, and a second head that is used only in training.

    `mean`, `std`: normalisation of pixels in [0, 1]. `multiple_px`: the sides of images must be multiples of it.
    `unreached`: entries of the state dict on which no output depends (the backbone's last norm, its classifier); they
    are not trained.
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
        """Return the outputs of the heads for normalised images."""
        maps = self.maps(images)
        head = self.decode_head.outputs(maps)  # first: both heads draw random numbers for dropout
        auxiliary_head = self.auxiliary_head if self.training else None
        return SegmentOutputs(head, None if auxiliary_head is None else auxiliary_head.outputs(maps))

    def maps(self, images: Float[Tensor, "B 3 height width"]) -> list[Float[Tensor, "B _ _ _"]]:
        """Return the feature maps for the heads, the finest first, channels first."""
        found = self.backbone.intermediates(images, self.levels.layers)
        maps = [features.permute(0, 3, 1, 2) for features in found]  # [B, D, h, w]
        return self.neck(maps) if self.neck is not None else maps

    @torch.no_grad()
    def grid_for(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Return the (rows, columns) of the head's grid for images of (height, width), multiples of `multiple_px`.

        Runs the model on a blank image.
        """
        with evaluating(self):
            logits = self(next(self.parameters()).new_zeros(1, 3, *img_size)).logits
        return logits.shape[2], logits.shape[3]

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters without weight decay, beside biases and norms."""
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()}

    def layers(self) -> dict[str, int]:
        """Return the layer of each parameter by name: the backbone's own, the last one for neck and heads."""
        layers = {f"backbone.{name}": layer for name, layer in self.backbone.layers().items()}
        top = max(layers.values())
        return {name: layers.get(name, top) for name, _ in self.named_parameters()}

    def freeze_backbone(self) -> None:
        """Freeze the backbone for good: no gradients, and evaluation mode (BatchNorm, drop path)."""
        self.backbone.requires_grad_(False)
        self._backbone_is_frozen = True
        self.train(self.training)

    def train(self, mode: bool = True) -> SegmentationModel:
        """Set training or evaluation mode; a frozen backbone stays in evaluation mode."""
        super().train(mode)
        if self._backbone_is_frozen:
            self.backbone.eval()
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations of the backbone's blocks in the backward pass instead of storing them."""
        self.backbone.set_grad_checkpointing(enable)


def create_segmentation_model(config: SegmentModelConfig, *, num_classes: int) -> SegmentationModel:
    """Return a new model; `config.weights` are loaded by `load_segmentation_weights`.

    Raises ValueError for names, options, sizes and layers that do not exist or do not fit together.
    """
    backbone = _create_backbone(config)
    levels = find_levels(backbone, config.img_size, layers=config.layers)
    neck = _create_neck(config, levels)
    widths = neck.widths if neck is not None else levels.widths
    width, dropout = config.head_width, config.dropout
    auxiliary_head = None
    # Created before the other head, always: the order of random draws decides the initial weights.
    if config.auxiliary and config.head is not HeadKind.LINEAR:
        level = -min(2, len(widths))  # the last map but one, where there are two
        auxiliary_head = FCNHead(widths, num_classes, width=width, dropout=dropout, level=level, auxiliary=True)
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
    """Freeze the parameters on which no head depends; return the entries of the state dict of such modules.

    DDP would wait for their gradients forever.
    """
    image = next(model.parameters()).new_zeros(1, 3, *img_size)
    heads = [head for head in (model.decode_head, model.auxiliary_head) if head is not None]
    with evaluating(model):
        maps = model.maps(image)
        pending = [head(maps).grad_fn for head in heads]
    # Walk back from the outputs through the autograd graph; the leaf node of a parameter holds it as `variable`.
    seen, reached = set(), set()
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            reached.add(id(getattr(node, "variable", None)))
            pending.extend(before for before, _ in node.next_functions)
    unreached: set[str] = set()
    # Whole modules only: a checkpoint must have all of a module that is used in part.
    for prefix, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if p.requires_grad]
        if own and not any(id(parameter) in reached for parameter in own):
            inner = tuple(f"{name}." for name, _ in module.named_children())
            unreached |= {f"{prefix}.{name}" for name in module.state_dict() if not name.startswith(inner)}
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.requires_grad and id(parameter) in reached)
    return frozenset(unreached)


# Published LV-ViT + UPerNet files name the backbone's parameters `backbone.NAME` (ours: `backbone.backbone.NAME`), with
# the neck's among them (`backbone.side_layer1` to `4`; ours: `neck.side_layer1`); the heads have our names.
_PUBLISHED_NECK, _NECK = "backbone.side_layer", "neck.side_layer"


def load_segmentation_weights(
    model: SegmentationModel, path: str | Path, *, class_names: Sequence[str] = (), average: bool = False
) -> frozenset[str]:
    """Load a backbone or a whole segmentation model from a file or a run; return the parameters that stay new.

    `path`: a published file (`.pth`, `.safetensors`), a run folder or one of its checkpoints (their EMA weights, if
    any). `class_names`: of the model, empty if unknown. `average`: take the EMA weights of a published file. The
    backbone adapts to another image size as in `load_published`. Classifiers take the rows of the classes that model
    and file share by name, else all if they are as many, else none, with a warning; those that share only some of their
    classes with the file are returned, too. Raises ModelError that lists the names if anything else does not fit; the
    model is then unchanged.
    """
    path = newest_checkpoint(path) if is_run(path) else Path(path)
    if path.is_dir():
        average = (path / "ema.safetensors").exists()
    own = model.state_dict()
    published = {name.replace("backbone.backbone.", "backbone.", 1).replace(_NECK, _PUBLISHED_NECK) for name in own}
    found, skipped = read_checkpoint(path, own.keys() | published, average=average)
    spared = {key.removeprefix("backbone.") for key in model.unreached}
    if not any(key.startswith("decode_head.") for key in found):
        weights = find_weights(path, model.backbone.backbone.state_dict(), average=average)
        load(model.backbone, weights, spared=spared)
        return frozenset(name for name, _ in model.named_parameters() if not name.startswith("backbone."))
    if skipped:
        say(skipped)
    backbone, heads = _backbone_and_heads(found, path)
    if model.auxiliary_head is None:
        heads = {key: tensor for key, tensor in heads.items() if not key.startswith("auxiliary_head.")}
    wanted = {key: tensor for key, tensor in own.items() if not key.startswith("backbone.")}
    classifiers = [
        key
        for key in heads.keys() & wanted.keys()
        if "conv_seg." in key and heads[key].shape[1:] == wanted[key].shape[1:]
    ]
    if complaint := misfit(heads, wanted, spared=model.unreached.union(classifiers)):
        raise ModelError(f"{path} is for another model or other options: {complaint}")
    load(model.backbone, backbone, spared=spared)  # loads nothing if it raises
    new, mixed = fit_heads(heads, wanted, classifiers, path, partial(class_rows, path, class_names), classifiers)
    model.load_state_dict(heads, strict=False)
    if new:
        LOGGER.warning("%s is for other classes: %s are newly initialised", path, ", ".join(sorted(new)))
    return frozenset(new | mixed)


def _backbone_and_heads(found: Mapping[str, Tensor], path: Path) -> tuple[Weights, dict[str, Tensor]]:
    """Split the tensors of a whole model into those of its backbone and, by our names, of neck and heads."""
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
