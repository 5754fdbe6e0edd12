"""The memory layout of a timm model's features, found by running the model once."""

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

# Raised by timm models for image sizes and options that they do not support.
REFUSALS = (RuntimeError, AssertionError, TypeError, ValueError, IndexError)


class FeatureLayout(StrEnum):
    """Axes of a model's features."""

    MAP = "B D h w"
    CHANNELS_LAST_MAP = "B h w D"
    SEQUENCE = "B M D"  # prefix tokens, then h * w tokens row by row


@dataclass(frozen=True, slots=True)
class Features:
    """The layout of a model's features.

    `from_stage`: index for `forward_intermediates`; None if the classifier's own input has the tokens.
    `num_prefix`: tokens of a sequence before those of the grid.
    """

    layout: FeatureLayout
    grid: tuple[int, int]
    width: int
    from_stage: int | None = None
    num_prefix: int = 0


def classifier_features(seen: Any, grid: tuple[int, int]) -> Features | None:
    """Return the layout of the classifier's input `seen`; None if it has no token grid."""
    if not isinstance(seen, Tensor):  # a network of several branches
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
    """Return features [B * h * w, ...] of images that have the features of one position everywhere.

    The prefix tokens of a sequence are copies of it, too: heads may read the class token, several tokens, or the mean
    of the others.
    """
    match features.layout:
        case FeatureLayout.MAP:
            return seen.permute(0, 2, 3, 1).flatten(0, 2)[:, :, None, None]  # [B * h * w, D, 1, 1]
        case FeatureLayout.CHANNELS_LAST_MAP:
            return seen.flatten(0, 2)[:, None, None, :]  # [B * h * w, 1, 1, D]
        case FeatureLayout.SEQUENCE:
            positions = seen[:, features.num_prefix :].flatten(0, 1)[:, None, :]
            return positions.expand(-1, features.num_prefix + 1, -1)  # [B * N, P + 1, D], a view without copies


def run_blank(
    backbone: Any, img_size: tuple[int, int], *, stage: int, name: str, where: str = ""
) -> tuple[Any, Float[Tensor, "1 D h w"]]:
    """Return the classifier's input for one blank image, and the output map of a stage.

    Running the model is the only way that works for all of timm's. Raises ValueError for an unsupported size.
    """
    image = next(backbone.parameters()).new_zeros(1, 3, *img_size)
    try:
        with evaluating(backbone), torch.no_grad():
            seen, (features,) = backbone.forward_intermediates(image, indices=[stage])
    except REFUSALS as error:
        size = f"{img_size[0]} x {img_size[1]} pixels{where}"
        raise ValueError(f"{name} cannot take images of {size}: {first_line(error)}") from error
    return seen, features


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode, and restore the mode of each submodule afterwards: some may be frozen."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training
