"""Decoders: from a backbone's feature maps to a class for every location.

A backbone with stages (a CNN, Swin) has maps of several scales; for one without, a neck makes them. A head (UPerNet,
FCN, or one linear map) turns the maps into logits. Parameters are named as in the published checkpoints: `side_layer1`
to `4` in the neck, `conv` and `bn` in each block, `conv_seg` for the classifier.
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
from tokenlabel.runtime.coercion import Choice

NUM_LEVELS = 4
# The published necks read the last block and three before it, three blocks apart.
PUBLISHED_SPACING = 3
POOL_SCALES = (1, 2, 3, 6)


class NeckKind(Choice):
    """What stands between a network without stages and the head: the neck of four scales, FCN's, or nothing.

    AUTO: what the head wants, and nothing where there are stages.
    """

    AUTO = "auto"
    PYRAMID = "pyramid"
    FCN = "fcn"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Levels:
    """Which layers of a backbone give the maps that a head reads.

    `layers`: as `TokenModel.intermediates` counts them, the finest map first. `widths`: of each map.
    `multiple_px`: images whose sides are multiples of it are not cut anywhere on the way.
    `has_stages`: whether the maps differ in scale already.
    """

    layers: tuple[int, ...]
    widths: tuple[int, ...]
    multiple_px: int
    has_stages: bool


def find_levels(backbone: TimmAdapter, img_size: tuple[int, int], *, layers: Sequence[int] | None = None) -> Levels:
    """Find out which layers of a backbone to read, by running it once on a blank image of (height, width).

    `layers`: these, in place of our choice: the last layer of each of the four coarsest stages, or, in a network of
    one scale, four blocks: the last and those 3, 6 and 9 before it, or evenly spread ones if it is less deep.
    Raises ValueError for a backbone that does not say what its layers are.
    """
    stages = getattr(backbone.backbone, "feature_info", None)
    if not stages:
        raise ValueError(
            f"{backbone.name} does not say which layers it has (timm's feature_info); choose another backbone"
        )
    asked = tuple(layers) if layers is not None else tuple(range(len(stages)))
    image = next(backbone.parameters()).new_zeros(1, 3, *img_size)
    was_training = backbone.training
    with torch.no_grad():
        shapes = [tuple(features.shape[1:]) for features in backbone.eval().intermediates(image, asked)]
    backbone.train(was_training)
    has_stages = len(set(shapes)) > 1
    chosen = list(range(len(asked)))
    if layers is None and has_stages:
        ends = [i for i in chosen if i + 1 == len(shapes) or shapes[i] != shapes[i + 1]]
        chosen = ends[-NUM_LEVELS:]
    elif layers is None:
        chosen = _spread_depths(len(stages))
    return Levels(
        layers=tuple(asked[i] for i in chosen),
        widths=tuple(shapes[i][2] for i in chosen),
        multiple_px=max(int(stage["reduction"]) for stage in stages),
        has_stages=has_stages,
    )


def _spread_depths(num_layers: int) -> list[int]:
    """Return four blocks as published, or evenly spread where the network is too shallow for that."""
    published = [num_layers - 1 - PUBLISHED_SPACING * i for i in range(NUM_LEVELS)][::-1]
    evenly = sorted({-(-(i + 1) * num_layers // NUM_LEVELS) - 1 for i in range(NUM_LEVELS)})
    return published if published[0] > 0 else evenly


class Neck(nn.Module):
    """Maps of several scales from maps of one: strides 4, 8, 16, 16 under a patch of 16.

    Deconvolutions make the first two finer; each is followed by BatchNorm, ReLU, and a linear map with both, again.
    `kind` FCN: the first two stay as they are, the last is made finer by 2. Parameters are named as in the
    published checkpoints, where they lie in the backbone.
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
        """Return the four maps; of fewer than four, some serve twice."""
        sides = (self.side_layer1, self.side_layer2, self.side_layer3, self.side_layer4)
        return [side(features) for side, features in zip(sides, spread(maps), strict=True)]


def spread(maps: Sequence[Tensor]) -> list[Tensor]:
    """Return four maps out of one to four, in order, each as often as evenly goes."""
    return [maps[index * len(maps) // NUM_LEVELS] for index in range(NUM_LEVELS)]


def _finer(width: int, new_width: int, *, factor: int) -> list[nn.Module]:
    deconvolution = nn.ConvTranspose2d(width, width, factor, stride=factor, bias=False)
    return [deconvolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True), *_mapped(width, new_width)]


def _mapped(width: int, new_width: int) -> list[nn.Module]:
    return [nn.Conv2d(width, new_width, 1, bias=False), nn.BatchNorm2d(new_width), nn.ReLU(inplace=True)]


class DecodeHead(nn.Module, ABC):
    """Logits of every location from feature maps of one image at several scales, the finest first."""

    def __init__(self, width: int, num_classes: int, *, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout2d(dropout) if dropout > 0 else nn.Identity()
        self.conv_seg = nn.Conv2d(width, num_classes, 1)

    @abstractmethod
    def features(self, maps: Sequence[Float[Tensor, "B _ _ _"]]) -> Float[Tensor, "B D h w"]:
        """Return the features that are classified, on the grid that the head ends on."""

    def outputs(self, maps: Sequence[Float[Tensor, "B _ _ _"]]) -> HeadOutputs:
        """Return the features, of which dropout has taken its share, and what classifies them."""
        return HeadOutputs(self.dropout(self.features(maps)), self.conv_seg)

    def forward(self, maps: Sequence[Float[Tensor, "B _ _ _"]]) -> Float[Tensor, "B C h w"]:
        """Return logits on the grid that the head ends on."""
        return self.outputs(maps).logits


@dataclass(frozen=True, eq=False)
class HeadOutputs:
    """The last features of a head and the 1 x 1 convolution that makes logits of them.

    They are kept apart so that a loss can work through the logits in pieces.
    """

    features: Float[Tensor, "B D h w"]
    classifier: nn.Module

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the features."""
        return (self.features.shape[2], self.features.shape[3])

    @property
    def logits(self) -> Float[Tensor, "B C h w"]:
        """The logits of every location, computed anew at each access."""
        return self.classifier(self.features)

    def enlarged(self, times: int) -> HeadOutputs:
        """Return outputs on a grid so many times as fine, interpolated bilinearly.

        Of features: a 1 x 1 convolution of them is the interpolated logits, which need not exist.
        """
        size = (times * self.grid[0], times * self.grid[1])
        finer = F.interpolate(self.features, size=size, mode="bilinear", align_corners=False)
        return HeadOutputs(finer, self.classifier)

    def of_images(self, numbers: list[int]) -> HeadOutputs:
        """Return the outputs of some images of the batch, in ascending order."""
        if len(numbers) == len(self.features):
            return self  # indexing would copy the features of all, and their gradient once more
        return HeadOutputs(self.features[numbers], self.classifier)


class UPerNetHead(DecodeHead):
    """UPerNet: pyramid pooling over the coarsest map, then a feature pyramid down to the finest.

    `widths`: of the maps that it gets, at least one. Logits come on the grid of the first.
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
        for coarse in range(len(levels) - 1, 0, -1):  # what a level knows goes to the next finer one
            levels[coarse - 1] = levels[coarse - 1] + resized(levels[coarse], levels[coarse - 1])
        smooth = [conv(level) for conv, level in zip(self.fpn_convs, levels[:-1], strict=True)]
        together = [resized(level, levels[0]) for level in (*smooth, levels[-1])]
        return self.fpn_bottleneck(torch.cat(together, dim=1))


class FCNHead(DecodeHead):
    """FCN: convolutions over one of the maps, the `level`-th.

    `concatenate`: classify from the map and the convolutions' result side by side.
    Source: Long et al., "Fully Convolutional Networks for Semantic Segmentation", 2015.
    """

    def __init__(
        self,
        widths: Sequence[int],
        num_classes: int,
        *,
        width: int,
        dropout: float = 0.1,
        num_convs: int = 2,
        concatenate: bool = True,
        level: int = -1,
    ) -> None:
        super().__init__(width, num_classes, dropout=dropout)
        self.level = level
        inner = [widths[level]] + [width] * (num_convs - 1)
        self.convs = nn.Sequential(*(ConvBlock(before, width, kernel_px=3) for before in inner))
        self.conv_cat = ConvBlock(widths[level] + width, width, kernel_px=3) if concatenate else None
        self.apply(_initialise)

    def features(self, maps: Sequence[Float[Tensor, "B _ _ _"]]) -> Float[Tensor, "B D h w"]:
        """Return features on the grid of the map that the head reads."""
        features = self.convs(maps[self.level])
        if self.conv_cat is not None:
            features = self.conv_cat(torch.cat([maps[self.level], features], dim=1))
        return features


class LinearHead(DecodeHead):
    """One linear map of the last features, normalised channel by channel: what is there to be read off."""

    def __init__(self, widths: Sequence[int], num_classes: int) -> None:
        super().__init__(widths[-1], num_classes, dropout=0.0)
        self.bn = nn.BatchNorm2d(widths[-1])
        self.apply(_initialise)

    def features(self, maps: Sequence[Float[Tensor, "B _ _ _"]]) -> Float[Tensor, "B D h w"]:
        """Return features on the grid of the last map."""
        return self.bn(maps[-1])


class ConvBlock(nn.Module):
    """A convolution without bias that keeps the size, BatchNorm, ReLU."""

    def __init__(self, width: int, new_width: int, *, kernel_px: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, new_width, kernel_px, padding=kernel_px // 2, bias=False)
        self.bn = nn.BatchNorm2d(new_width)

    def forward(self, features: Float[Tensor, "B D h w"]) -> Float[Tensor, "B D2 h w"]:
        """Return the new features."""
        return F.relu_(self.bn(self.conv(features)))


def resized(features: Float[Tensor, "B D h w"], like: Float[Tensor, "B D2 h2 w2"]) -> Float[Tensor, "B D h2 w2"]:
    """Return a map on the grid of another, resized bilinearly."""
    if features.shape[2:] == like.shape[2:]:
        return features
    return F.interpolate(features, size=like.shape[2:], mode="bilinear", align_corners=False)


def _initialise(module: nn.Module) -> None:
    """Start convolutions as the published heads do: the classifier near 0, the others for ReLU."""
    if not isinstance(module, nn.Conv2d):
        return
    if module.bias is None:
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    else:
        nn.init.normal_(module.weight, std=0.01)
        nn.init.zeros_(module.bias)
