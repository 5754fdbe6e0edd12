"""Weights from files: published checkpoints, other image sizes, other class counts.

Files are never allowed to run code: pickles are read with `weights_only=True`.
"""

from __future__ import annotations

import json
import logging
import math
from argparse import Namespace
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from tokenlabel.models.vision_transformer import resize_positions

LOGGER = logging.getLogger(__name__)

# Heads for tokens: a checkpoint of a model without token labels has none, and they start anew.
TOKEN_HEADS = ("token_head.",)

# Names under which checkpoints keep their tensors, and their running average of them.
WEIGHTS_KEYS = ("state_dict", "model")
AVERAGE_KEYS = ("state_dict_ema", "model_ema")


class WeightsError(ValueError):
    """A file that holds no weights, or weights of another model."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """What became of a file's tensors, apart from those that were simply taken.

    `new_heads`: parameters of the model that start anew, since the file's heads are for another number of
    classes, or since it has none for tokens. `resized`: position embeddings that were resized to another grid.
    """

    new_heads: tuple[str, ...]
    resized: tuple[str, ...]


def load_published(
    model: Any, path: str | Path, *, average: bool = False, grid: tuple[int, int] | None = None
) -> Loaded:
    """Load a checkpoint, published or our own, into a model of another image size or class count, too.

    `model`: any of ours, with its `num_classes` and its `grid`. `path`: `.safetensors`, `.pth`, `.pth.tar`, or one
    of our checkpoint folders. `average`: take the running average (EMA) of the weights in the file.
    `grid`: the token grid (h, w) of the file's position embeddings; left out, it is the model's where the number
    fits, else square. Position embeddings are resized bicubically. Heads for another number of classes are left
    out and start anew, with a warning. Raises WeightsError, and leaves the model alone, where anything else does
    not fit.
    """
    path = Path(path)
    found = {adapter_name(name): tensor for name, tensor in read_checkpoint(path, average=average).items()}
    wanted = model.state_dict()
    resized = resize_all_positions(found, model, grid=grid, name=str(path))
    other_heads = _other_heads(found, wanted, num_classes=model.num_classes)
    found = {name: tensor for name, tensor in found.items() if name not in other_heads}
    token_head = {name for name in wanted.keys() - found.keys() if name.startswith(TOKEN_HEADS)}
    _check_fit(found, wanted, new_heads=other_heads | token_head, path=path)
    model.load_state_dict(found, strict=False)
    new_heads = tuple(sorted(other_heads | token_head))
    if new_heads:
        LOGGER.warning("%s has nothing for %s: they start anew", path, ", ".join(new_heads))
    if resized:
        LOGGER.info("%s: resized to other images: %s", path, ", ".join(resized))
    return Loaded(new_heads=new_heads, resized=resized)


def adapter_name(name: str) -> str:
    """Return what a `TimmAdapter` calls a tensor of a file: of its own checkpoints, or of its backbone's."""
    if name.startswith(("backbone.", "token_head.")):
        return name
    head, dot, rest = name.partition("aux_head.")
    return f"token_head.{rest}" if dot and not head else f"backbone.{name}"


def read_checkpoint(path: str | Path, *, average: bool = False) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by name, without the `module.` that parallel training puts before.

    `path`: a file, or a folder with `model.safetensors` (the average: `ema.safetensors`), as our runs write.

    Raises WeightsError for what cannot be read without running its code, and for a file without `average`.
    """
    path = Path(path)
    if path.is_dir():
        path, average = path / ("ema.safetensors" if average else "model.safetensors"), False
    if not path.is_file():
        raise WeightsError(f"{path}: no such file; expected weights as .safetensors, .pth or .pth.tar")
    contents = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    keys = AVERAGE_KEYS if average else WEIGHTS_KEYS
    inner = next((contents[key] for key in keys if key in contents), None)
    if inner is None and average:
        raise WeightsError(
            f"{path} has no averaged weights (none of {', '.join(AVERAGE_KEYS)}); load it without"
        )
    tensors = {
        name.removeprefix("module."): value
        for name, value in (contents if inner is None else inner).items()
        if isinstance(value, Tensor)
    }
    if not tensors:
        raise WeightsError(f"{path} holds no tensors; it has {', '.join(map(str, contents)) or 'nothing'}")
    return tensors


_NAMES_KEYS = ("class_names", "classes", "class_to_idx", "idx_to_class", "id2label", "label2id")


def read_class_names(path: str | Path) -> tuple[str, ...]:
    """Return the class names that come with a file of weights; none if nobody says them.

    They are in the metadata of our exports, beside our checkpoints, in the config.json of a folder for timm, and where
    people put them in a .pth: `class_names`, `classes`, or a mapping such as `class_to_idx`.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    found: Any = None
    with suppress(OSError, ValueError, SafetensorError, AttributeError, TypeError):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                found = json.loads((file.metadata() or {}).get("class_names", "null"))
        elif path.is_file() and path.suffix != ".npz":  # of the original ViTs
            contents = _read_pickle(path)
            stated = (
                contents[key] for key in _NAMES_KEYS if isinstance(contents.get(key), (list, tuple, dict))
            )
            found = next(stated, None)
        if found is None and (path.is_dir() or path.name in ("model.safetensors", "ema.safetensors")):
            state = folder / "state.json"
            beside = json.loads((state if state.exists() else folder / "config.json").read_text("utf-8"))
            beside = {**beside.get("pretrained_cfg", {}), **beside}
            found = beside.get("class_names") or beside.get("label_names")
    return names_in_order(found)


def names_in_order(names: Any) -> tuple[str, ...]:
    """Return class names as files state them: a list, names by id, which may have gaps, or ids by name."""
    if isinstance(names, dict):
        is_by_name = all(isinstance(place, int) for place in names.values())
        pairs = [(place, name) if is_by_name else (name, place) for name, place in names.items()]
        by_id = {int(place): name for place, name in pairs if str(place).isdecimal()}
        names = [by_id.get(i, str(i)) for i in range(max(by_id, default=-1) + 1)]
    return tuple(map(str, names)) if isinstance(names, (list, tuple)) else ()


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise WeightsError(f"{path} is damaged or no safetensors file ({error}); get it again") from error


def _read_pickle(path: Path) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals([Namespace]):  # the options of the run, beside the weights
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise WeightsError(
            f"{path} holds more than tensors, and reading it could run any code. If you trust where it is from, "
            f"convert it once: python -c \"import torch; f = torch.load('{path}', weights_only=False); "
            f"keys = {WEIGHTS_KEYS + AVERAGE_KEYS}; torch.save({{k: v for k, v in f.items() "
            f"if k in keys or torch.is_tensor(v)}}, '{path}.tensors.pth')\""
        ) from error
    except (RuntimeError, EOFError, OSError, LookupError, TypeError, ValueError) as error:
        raise WeightsError(f"{path} is damaged or no checkpoint ({error}); get it again") from error
    if not isinstance(contents, dict):
        raise WeightsError(f"{path} holds a {type(contents).__name__}, expected a dictionary of tensors")
    return contents


def resize_all_positions(
    found: dict[str, Tensor], model: Any, *, grid: tuple[int, int] | None = None, name: str
) -> tuple[str, ...]:
    """Resize the position embeddings in `found` to the model's grid, in place, and return their names.

    `grid`: theirs, see `load_published`. `name`: what errors call the file.
    """
    resized = []
    for key, ours in model.state_dict().items():
        theirs = found.get(key)
        if theirs is None or key.rpartition(".")[2] != "pos_embed" or theirs.ndim != 3:
            continue
        num_prefix = ours.shape[1] - model.grid[0] * model.grid[1]
        num_positions = theirs.shape[1] - num_prefix
        old_grid = grid or _guess_grid(num_positions, model.grid, name=name)
        if old_grid[0] * old_grid[1] != num_positions:
            raise WeightsError(f"{name}: {num_positions} positions are not a grid of {old_grid}")
        if old_grid != model.grid:
            found[key] = resize_positions(theirs, old_grid, model.grid)
            resized.append(key)
    return tuple(resized)


def _guess_grid(num_positions: int, new_grid: tuple[int, int], *, name: str) -> tuple[int, int]:
    if num_positions == new_grid[0] * new_grid[1]:
        return new_grid
    side = math.isqrt(max(0, num_positions))
    if side * side != num_positions or side == 0:
        raise WeightsError(
            f"{name}: {num_positions} positions are no square; say their grid (h, w) by `grid`"
        )
    return side, side


def _other_heads(found: dict[str, Tensor], wanted: dict[str, Tensor], *, num_classes: int) -> set[str]:
    """Return the names of what differs in the number of classes and in nothing else."""
    return {
        name
        for name in found.keys() & wanted.keys()
        if wanted[name].shape[:1] == (num_classes,)
        and found[name].shape[:1] != (num_classes,)
        and found[name].shape[1:] == wanted[name].shape[1:]
    }


def _check_fit(
    found: dict[str, Tensor], wanted: dict[str, Tensor], *, new_heads: set[str], path: Path
) -> None:
    lacks = [
        name
        for name in wanted
        if name not in found and name not in new_heads and not name.endswith("num_batches_tracked")
    ]
    unknown = [name for name in found if name not in wanted]
    others = [
        f"{name} ({' x '.join(map(str, found[name].shape))}, not {' x '.join(map(str, wanted[name].shape))})"
        for name in found.keys() & wanted.keys()
        if found[name].shape != wanted[name].shape
    ]
    complaints = [
        f"{what} {', '.join(sorted(names)[:3])}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        for what, names in (("it lacks", lacks), ("it has", unknown), ("sizes differ:", others))
        if names
    ]
    if complaints:
        raise WeightsError(f"{path} is for another model or other options: {'; '.join(complaints)}")
