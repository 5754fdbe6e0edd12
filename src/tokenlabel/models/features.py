"""How the features of a timm model are laid out: found by running it once, not by knowing its name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokenlabel.runtime.errors import first_line

# What timm models raise for sizes and options that they cannot take.
REFUSALS = (RuntimeError, AssertionError, TypeError, ValueError, IndexError)


class FeatureLayout(StrEnum):
    """How a model's features are laid out."""

    MAP = "B D h w"
    CHANNELS_LAST_MAP = "B h w D"
    SEQUENCE = "B M D"  # prefix tokens, then h * w tokens row by row


@dataclass(frozen=True, slots=True)
class Features:
    """What one run of a model shows about its features.

    `from_stage`: None if the tokens are in what the classifier gets, else the index that
    `forward_intermediates` takes. `num_prefix`: tokens of a sequence before those of the grid.
    """

    layout: FeatureLayout
    grid: tuple[int, int]
    width: int
    from_stage: int | None = None
    num_prefix: int = 0


def classifier_features(seen: Any, grid: tuple[int, int]) -> Features | None:
    """Say how the features that the classifier gets hold the grid; None if they don't."""
    if not isinstance(seen, Tensor):  # several branches
        return None
    if seen.ndim == 4 and tuple(seen.shape[2:]) == grid:
        return Features(FeatureLayout.MAP, grid, seen.shape[1])
    if seen.ndim == 4 and tuple(seen.shape[1:3]) == grid:
        return Features(FeatureLayout.CHANNELS_LAST_MAP, grid, seen.shape[3])
    num_prefix = seen.shape[1] - grid[0] * grid[1]
    if seen.ndim == 3 and num_prefix >= 0:
        return Features(FeatureLayout.SEQUENCE, grid, seen.shape[2], num_prefix=num_prefix)
    return None  # pooled, or only class tokens are left


def one_position_each(seen: Tensor, features: Features) -> Tensor:
    """Return features [B * h * w, ...] of images that show one position's features everywhere.

    In a sequence the prefix tokens are copies as well, so heads on the class token, on several, and on the
    mean of the others all see this position.
    """
    match features.layout:
        case FeatureLayout.MAP:
            return seen.permute(0, 2, 3, 1).flatten(0, 2)[:, :, None, None]  # [B * h * w, D, 1, 1]
        case FeatureLayout.CHANNELS_LAST_MAP:
            return seen.flatten(0, 2)[:, None, None, :]  # [B * h * w, 1, 1, D]
        case FeatureLayout.SEQUENCE:
            positions = seen[:, features.num_prefix :].flatten(0, 1)[:, None, :]
            return positions.expand(-1, features.num_prefix + 1, -1)  # [B * N, P + 1, D]


def run_blank(
    backbone: Any, img_size: tuple[int, int], *, stage: int, name: str, where: str = ""
) -> tuple[Any, Float[Tensor, "1 D h w"]]:
    """Return what a classifier gets of one blank image, and the map that a stage ends with.

    A model's own answer is the only one that holds for all of timm's. Raises ValueError for a size that it cannot take.
    """
    image = next(backbone.parameters()).new_zeros(1, 3, *img_size)
    try:
        with _evaluating(backbone), torch.no_grad():
            seen, (features,) = backbone.forward_intermediates(image, indices=[stage])
    except REFUSALS as error:
        size = f"{img_size[0]} x {img_size[1]} pixels{where}"
        raise ValueError(f"{name} cannot take images of {size}: {first_line(error)}") from error
    return seen, features


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode, and each of its parts back into its own mode afterwards."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training
