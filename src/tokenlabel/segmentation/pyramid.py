"""Feature maps of several scales: from the stages of a network that has some, else by a neck from several depths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokenlabel.models import TimmAdapter, TokenModel
from tokenlabel.runtime.coercion import Choice

NUM_LEVELS = 4
# The published necks read the last block and three before it, three blocks apart.
PUBLISHED_SPACING = 3


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


def find_levels(
    backbone: TokenModel, img_size: tuple[int, int], *, layers: Sequence[int] | None = None
) -> Levels:
    """Find out which layers of a backbone to read, by running it once on a blank image of (height, width).

    `layers`: these, in place of our choice: the last layer of each of the four coarsest stages, or, in a network of
    one scale, four blocks: the last and those 3, 6 and 9 before it, or evenly spread ones if it is less deep.
    Raises ValueError for a backbone that does not say what its layers are.
    """
    num_layers, multiple_px = _layers_of(backbone)
    asked = tuple(layers) if layers is not None else tuple(range(num_layers))
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
        chosen = _spread_depths(num_layers)
    return Levels(
        layers=tuple(asked[i] for i in chosen),
        widths=tuple(shapes[i][2] for i in chosen),
        multiple_px=multiple_px,
        has_stages=has_stages,
    )


def _layers_of(backbone: TokenModel) -> tuple[int, int]:
    """Return how many layers a backbone counts, and the pixels that its coarsest map's cells are wide."""
    stages = getattr(backbone.backbone, "feature_info", None) if isinstance(backbone, TimmAdapter) else None
    if not stages:
        raise ValueError(
            f"{getattr(backbone, 'name', type(backbone).__name__)} does not say which layers it has "
            "(timm's feature_info); choose another backbone"
        )
    return len(stages), max(int(stage["reduction"]) for stage in stages)


def _spread_depths(num_layers: int) -> list[int]:
    published = [num_layers - 1 - PUBLISHED_SPACING * i for i in range(NUM_LEVELS)][::-1]
    evenly = sorted({-(-(i + 1) * num_layers // NUM_LEVELS) - 1 for i in range(NUM_LEVELS)})
    return published if published[0] > 0 else evenly


def _finer(width: int, new_width: int, *, factor: int) -> list[nn.Module]:
    deconvolution = nn.ConvTranspose2d(width, width, factor, stride=factor, bias=False)
    return [deconvolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True), *_mapped(width, new_width)]


def _mapped(width: int, new_width: int) -> list[nn.Module]:
    return [nn.Conv2d(width, new_width, 1, bias=False), nn.BatchNorm2d(new_width), nn.ReLU(inplace=True)]
