"""Position embeddings for other token grids: resized bicubically, one by one or all that a file has."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from tokenlabel.models.runs import read_description
from tokenlabel.models.weight_files import Weights
from tokenlabel.runtime.coercion import pair
from tokenlabel.runtime.errors import ModelError
from tokenlabel.runtime.process import say


def resize_positions(
    positions: Float[Tensor, "1 M D"], grid: tuple[int, int], new_grid: tuple[int, int]
) -> Float[Tensor, "1 M2 D"]:
    """Return position embeddings for another token grid (h, w), resized bicubically.

    The last h * w embeddings are those of the grid, row by row; what comes before (a class token's) stays.
    """
    if grid == new_grid:
        return positions
    num_prefix = positions.shape[1] - grid[0] * grid[1]
    planes = positions[:, num_prefix:].unflatten(1, grid).permute(0, 3, 1, 2)  # [1, D, h, w]
    resized = F.interpolate(planes.float(), size=new_grid, mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :num_prefix], resized.to(positions.dtype).flatten(2).transpose(1, 2)], dim=1)


def resize_all_positions(
    found: dict[str, Tensor], model: Any, *, grid: tuple[int, int] | None = None, name: str
) -> tuple[str, ...]:
    """Resize the position embeddings in `found` to the model's grid, in place, and return their names.

    `grid`: theirs, (h, w); None where it has to be found out. `name`: what errors call the file.
    """
    resized = []
    for key, ours in model.state_dict().items():
        theirs = found.get(key)
        if theirs is None or key.rpartition(".")[2] != "pos_embed" or theirs.ndim != ours.ndim:
            continue
        if ours.ndim == 4 and theirs.shape != ours.shape:  # a map: VOLO's channels last, PiT's channels first
            found[key] = _resize_map(theirs, ours.shape)
            resized.append(key)
        if ours.ndim != 3:
            continue
        num_prefix = ours.shape[1] - model.grid[0] * model.grid[1]
        num_positions = theirs.shape[1] - num_prefix
        old_grid = grid or _guess_grid(num_positions, model.grid, name=name)
        if old_grid[0] * old_grid[1] != num_positions:
            raise ModelError(f"{name}: {num_positions} positions are not a grid of {old_grid}")
        if old_grid != model.grid:
            found[key] = resize_positions(theirs, old_grid, model.grid)
            resized.append(key)
    return tuple(resized)


def _resize_map(positions: Tensor, shape: torch.Size) -> Tensor:
    if positions.shape[1] == shape[1]:
        return F.interpolate(positions.float(), size=tuple(shape[2:]), mode="bicubic")
    planes = positions.permute(0, 3, 1, 2).float()
    return F.interpolate(planes, size=tuple(shape[1:3]), mode="bicubic").permute(0, 2, 3, 1)


def _guess_grid(num_positions: int, new_grid: tuple[int, int], *, name: str) -> tuple[int, int]:
    if num_positions == new_grid[0] * new_grid[1]:
        return new_grid
    side = math.isqrt(max(0, num_positions))
    if side * side != num_positions or side == 0:
        raise ModelError(f"{name}: {num_positions} positions are no square; say their grid (h, w) by `grid`")
    return side, side


def grid_of(backbone: Any, grid: tuple[int, int], weights: Weights) -> tuple[int, int] | None:
    """Return the grid of a file's position embeddings where their number alone would mislead.

    `grid`: the backbone's own. The file's is that of the image size in its description; without one, a square of as
    many positions, if they vary less from cell to cell as that (what was trained is smooth), which is said.
    """
    size = read_description(weights.path).get("img_size")
    patch = getattr(backbone, "patch_size_px", getattr(getattr(backbone, "patch_embed", None), "patch_size", None))
    positions, own = (tensors.get("pos_embed") for tensors in (weights.backbone, backbone.state_dict()))
    if positions is None or own is None or positions.ndim != 3 or own.ndim != 3:
        return None
    num_cells = grid[0] * grid[1]
    num_prefix = own.shape[1] - num_cells
    num_positions = positions.shape[1] - num_prefix
    if size is not None and patch is not None:
        (height, width), (patch_height, patch_width) = size, pair(patch)
        stated = (height // patch_height, width // patch_width)
        if stated[0] * stated[1] == num_positions:
            return stated if stated != grid and (stated[0] != stated[1] or num_positions == num_cells) else None
    square = _square_of(num_positions, grid)
    # 24 x 24 of 384 px are as many as 18 x 32 of 288 x 512.
    if square is None or _roughness(positions, square) > 0.8 * _roughness(positions, grid):
        return None
    h, w = grid
    found = f"position embeddings of a grid of {square[0]} x {square[1]}, by what they hold"
    say(f"{weights.path}: {found}; resized to {h} x {w}")
    return square


def _square_of(num_positions: int, grid: tuple[int, int]) -> tuple[int, int] | None:
    """Return the square of as many cells as a grid that is none; None if there is no such square."""
    side = math.isqrt(max(0, num_positions))
    return (side, side) if grid[0] != grid[1] and num_positions == grid[0] * grid[1] == side * side else None


def _roughness(positions: Float[Tensor, "1 M D"], grid: tuple[int, int]) -> float:
    """Return the mean squared difference between neighbouring cells of a grid."""
    cells = positions[0, positions.shape[1] - grid[0] * grid[1] :].float().unflatten(0, grid)  # [h, w, D]
    return sum(float(cells.diff(dim=dim).square().mean()) for dim in (0, 1) if cells.shape[dim] > 1)


def fit_pretrained_positions(backbone: Any) -> None:
    """Resize, in place, pretrained position embeddings of a square that timm put into another grid of as many cells."""
    grid = getattr(getattr(backbone, "patch_embed", None), "grid_size", None)
    own = backbone.state_dict().get("pos_embed")
    _, height, width = backbone.pretrained_cfg.get("input_size", (3, 0, 0))
    if own is None or own.ndim != 3 or grid is None or height != width:
        return
    square = _square_of(grid[0] * grid[1], grid)
    if square is not None:
        own.copy_(resize_positions(own, square, grid))
