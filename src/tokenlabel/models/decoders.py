"""Decoders for semantic segmentation: from a backbone's feature maps to the logits of every location.

A backbone with stages (a CNN, Swin) has maps of several scales; for one without, a neck makes them. A head (UPerNet,
FCN, or one linear layer) turns the maps into logits. Parameters have the names of the published checkpoints:
`side_layer1` to `4` in the neck, `conv` and `bn` in each block, `conv_seg` for the classifier.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from tokenlabel.models.adapter import TimmAdapter
from tokenlabel.models.features import evaluating
from tokenlabel.models.options import NeckKind

NUM_LEVELS = 4
# The published necks read the last block and three before it, three blocks apart.
PUBLISHED_SPACING = 3
POOL_SCALES = (1, 2, 3, 6)


@dataclass(frozen=True, slots=True)
class Levels:
    """The layers of a backbone that a head reads.

    `layers`: indices for `TokenModel.intermediates`, the finest map first. `widths`: channels of each map.
    `multiple_px`: the sides of images must be multiples of it. `has_stages`: the maps differ in scale.
    """

    layers: tuple[int, ...]
    widths: tuple[int, ...]
    multiple_px: int
    has_stages: bool


def find_levels(backbone: TimmAdapter, img_size: tuple[int, int], *, layers: Sequence[int] | None = None) -> Levels:
    """Choose the layers that a head reads by running the backbone once on a blank image of (height, width).

    By default the last layer of each of the four coarsest stages, or, where all layers have one scale, four blocks:
    the last and those 3, 6 and 9 before it, or evenly spread ones in a shallower network. `layers`: these instead.
    Raises ValueError for a backbone without timm's `feature_info`.
    """
    stages = getattr(backbone.backbone, "feature_info", None)
    if not stages:
        raise ValueError(f"{backbone.name} lacks timm's feature_info, which lists its layers; choose another backbone")
    asked = tuple(layers) if layers is not None else tuple(range(len(stages)))
    image = next(backbone.parameters()).new_zeros(1, 3, *img_size)
    with evaluating(backbone), torch.no_grad():
        shapes = [tuple(features.shape[1:]) for features in backbone.intermediates(image, asked)]
    has_stages = len(set(shapes)) > 1
    # Stages end where the next map is of another size.
    chosen = list(range(len(asked)))
    if layers is None and has_stages:
        ends = [i for i in chosen if i + 1 == len(shapes) or shapes[i] != shapes[i + 1]]
        chosen = ends[-NUM_LEVELS:]
    elif layers is None:
        published = [len(stages) - 1 - PUBLISHED_SPACING * i for i in range(NUM_LEVELS)][::-1]
        evenly = sorted({-(-(i + 1) * len(stages) // NUM_LEVELS) - 1 for i in range(NUM_LEVELS)})
        chosen = published if published[0] > 0 else evenly
    return Levels(
        layers=tuple(asked[i] for i in chosen),
        widths=tuple(shapes[i][2] for i in chosen),
        multiple_px=max(int(stage["reduction"]) for stage in stages),
        has_stages=has_stages,
    )


class Neck(nn.Module):
    """Maps of several scales from maps of one: strides 4, 8, 16, 16 for patches of 16 pixels.

    The first two maps are upsampled by a transposed convolution, BatchNorm, ReLU and a 1 x 1 convolution with both.
    `kind` FCN: only the last map is upsampled, by 2. Parameters have the names of the published checkpoints, where
    they belong to the backbone.
    """

    def __init__(self, width: int, *, kind: NeckKind | str, last_width: int) -> None:
        super().__init__()
        if NeckKind(kind) is NeckKind.PYRAMID:
            self.side_layer1 = nn.Sequential(*_finer(width, width, factor=4))
            self.side_layer2 = nn.Sequential(*_finer(width, width, factor=2))
            self.side_layer4 = nn.Sequential(*_mapped(width, last_width))
        else:
            self.side_layer1 = nn.Identity()
            self.side_layer2 = nn.Identity()
            self.side_layer4 = nn.Sequential(*_finer(width, last_width, factor=2))
        self.side_layer3 = nn.Sequential(*_mapped(width, width))
        self.widths = (width, width, width, last_width)

    def forward(self, maps: Sequence[Float[Tensor, "B D h w"]]) -> list[Float[Tensor, "B _ _ _"]]:
        """Return four maps; where there are fewer, some are used more than once."""
        sides = (self.side_layer1, self.side_layer2, self.side_layer3, self.side_layer4)
        # Evenly: of two maps each is used twice.
        return [side(maps[index * len(maps) // NUM_LEVELS]) for index, side in enumerate(sides)]


def _finer(width: int, new_width: int, *, factor: int) -> list[nn.Module]:
    deconvolution = nn.ConvTranspose2d(width, width, factor, stride=factor, bias=False)
    return [deconvolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True), *_mapped(width, new_width)]


def _mapped(width: int, new_width: int) -> list[nn.Module]:
    return [nn.Conv2d(width, new_width, 1, bias=False), nn.BatchNorm2d(new_width), nn.ReLU(inplace=True)]


class DecodeHead(nn.Module, ABC):
    """Logits of every location from feature maps at several scales, the finest first."""

    def __init__(self, width: int, num_classes: int, *, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout2d(dropout) if dropout > 0 else nn.Identity()
        self.conv_seg = nn.Conv2d(width, num_classes, 1)

    @abstractmethod
    def features(self, maps: Sequence[Float[Tensor, "B _ _ _"]]) -> Float[Tensor, "B D h w"]:
        """Return the features that `conv_seg` classifies."""

    def outputs(self, maps: Sequence[Float[Tensor, "B _ _ _"]]) -> HeadOutputs:
        """Return the features after dropout, and their classifier."""
        return HeadOutputs(self.dropout(self.features(maps)), self.conv_seg)

    def forward(self, maps: Sequence[Float[Tensor, "B _ _ _"]]) -> Float[Tensor, "B C h w"]:
        """Return logits on the head's grid."""
        return self.outputs(maps).logits


@dataclass(frozen=True, eq=False)
class HeadOutputs:
    """The last features of a head and the 1 x 1 convolution that turns them into logits.

    They are kept apart so that a loss can compute the logits in chunks.
    """

    features: Float[Tensor, "B D h w"]
    classifier: nn.Module

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the features."""
        return (self.features.shape[2], self.features.shape[3])

    @property
    def logits(self) -> Float[Tensor, "B C h w"]:
        """The logits of every location, computed at each access."""
        return self.classifier(self.features)

    def enlarged(self, times: int) -> HeadOutputs:
        """Return outputs on a grid `times` as fine, interpolated bilinearly."""
        # A 1 x 1 convolution commutes with interpolation, so the large logits need not exist.
        size = (times * self.grid[0], times * self.grid[1])
        finer = F.interpolate(self.features, size=size, mode="bilinear", align_corners=False)
        return HeadOutputs(finer, self.classifier)

    def of_images(self, numbers: list[int]) -> HeadOutputs:
        """Return the outputs of some images of the batch, given in ascending order."""
        if len(numbers) == len(self.features):
            return self  # indexing would copy the features of all, and their gradient once more
        return HeadOutputs(self.features[numbers], self.classifier)


class UPerNetHead(DecodeHead):
    """UPerNet: pyramid pooling of the coarsest map, then a feature pyramid down to the finest, the head's grid.

    `widths`: channels of the maps, at least one.
    Source: Xiao et al., "Unified Perceptual Parsing for Scene Understanding", 2018.
    """

    def __init__(self, widths: Sequence[int], num_classes: int, *, width: int, dropout: float = 0.1) -> None:
        super().__init__(width, num_classes, dropout=dropout)
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), ConvBlock(widths[-1], width)) for scale in POOL_SCALES
        )
        self.bottleneck = ConvBlock(widths[-1] + len(POOL_SCALES) * width, width, kernel_px=3)
        self.lateral_convs = nn.ModuleList(ConvBlock(finer, width) for finer in widths[:-1])
        self.fpn_convs = nn.ModuleList(ConvBlock(width, width, kernel_px=3) for _ in widths[:-1])
        self.fpn_bottleneck = ConvBlock(len(widths) * width, width, kernel_px=3)
        self.apply(_initialise)

    def features(self, maps: Sequence[Float[Tensor, "B _ _ _"]]) -> Float[Tensor, "B D h w"]:
        """Return features on the grid of the finest map."""
        pooled = [resized(pool(maps[-1]), maps[-1]) for pool in self.psp_modules]
        levels = [lateral(finer) for lateral, finer in zip(self.lateral_convs, maps[:-1], strict=True)]
        levels.append(self.bottleneck(torch.cat([maps[-1], *pooled], dim=1)))
        for coarse in range(len(levels) - 1, 0, -1):  # top-down pathway of the feature pyramid
            levels[coarse - 1] = levels[coarse - 1] + resized(levels[coarse], levels[coarse - 1])
        smooth = [conv(level) for conv, level in zip(self.fpn_convs, levels[:-1], strict=True)]
        together = [resized(level, levels[0]) for level in (*smooth, levels[-1])]
        return self.fpn_bottleneck(torch.cat(together, dim=1))


class FCNHead(DecodeHead):
    """FCN: two convolutions of one of the maps, `maps[level]`, whose result is concatenated with the map.

    `auxiliary`: a single convolution without concatenation, for the second head of training.
    Source: Long et al., "Fully Convolutional Networks for Semantic Segmentation", 2015.
    """

    def __init__(
        self,
        widths: Sequence[int],
        num_classes: int,
        *,
        width: int,
        dropout: float = 0.1,
        level: int = -1,
        auxiliary: bool = False,
    ) -> None:
        super().__init__(width, num_classes, dropout=dropout)
        self.level = level
        inner = [widths[level]] if auxiliary else [widths[level], width]
        self.convs = nn.Sequential(*(ConvBlock(before, width, kernel_px=3) for before in inner))
        self.conv_cat = ConvBlock(widths[level] + width, width, kernel_px=3) if not auxiliary else None
        self.apply(_initialise)

    def features(self, maps: Sequence[Float[Tensor, "B _ _ _"]]) -> Float[Tensor, "B D h w"]:
        """Return features on the grid of the map."""
        features = self.convs(maps[self.level])
        if self.conv_cat is not None:
            features = self.conv_cat(torch.cat([maps[self.level], features], dim=1))
        return features


class LinearHead(DecodeHead):
    """BatchNorm and one linear layer on the last map: a linear probe of the features."""

    def __init__(self, widths: Sequence[int], num_classes: int) -> None:
        super().__init__(widths[-1], num_classes, dropout=0.0)
        self.bn = nn.BatchNorm2d(widths[-1])
        self.apply(_initialise)

    def features(self, maps: Sequence[Float[Tensor, "B _ _ _"]]) -> Float[Tensor, "B D h w"]:
        """Return features on the grid of the last map."""
        return self.bn(maps[-1])


class ConvBlock(nn.Module):
    """Convolution without bias and with padding, BatchNorm, ReLU."""

    def __init__(self, width: int, new_width: int, *, kernel_px: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, new_width, kernel_px, padding=kernel_px // 2, bias=False)
        self.bn = nn.BatchNorm2d(new_width)

    def forward(self, features: Float[Tensor, "B D h w"]) -> Float[Tensor, "B D2 h w"]:
        """Return features of `new_width` channels on the same grid."""
        return F.relu_(self.bn(self.conv(features)))


def resized(features: Float[Tensor, "B D h w"], like: Float[Tensor, "B D2 h2 w2"]) -> Float[Tensor, "B D h2 w2"]:
    """Return features resized bilinearly to the grid of another map."""
    if features.shape[2:] == like.shape[2:]:
        return features
    return F.interpolate(features, size=like.shape[2:], mode="bilinear", align_corners=False)


def _initialise(module: nn.Module) -> None:
    # As the published heads: the classifier (the one with a bias) near 0, the others for ReLU.
    if not isinstance(module, nn.Conv2d):
        return
    if module.bias is None:
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    else:
        nn.init.normal_(module.weight, std=0.01)
        nn.init.zeros_(module.bias)
