"""Heads that turn feature maps into a class for every location: UPerNet, FCN and one linear map.

Parameters are named as in the published checkpoints: `conv` and `bn` in each block, `conv_seg` for the classifier.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

POOL_SCALES = (1, 2, 3, 6)


class Head(nn.Module, ABC):
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


class UPerNetHead(Head):
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


class FCNHead(Head):
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


class LinearHead(Head):
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


def resized(
    features: Float[Tensor, "B D h w"], like: Float[Tensor, "B D2 h2 w2"]
) -> Float[Tensor, "B D h2 w2"]:
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
