"""Run folders and their checkpoints, read, and what these and exported files say of their network.

`training/checkpoint.py` says what is in a checkpoint, and writes it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor

from tokenlabel.data.classes import ClassList
from tokenlabel.runtime.errors import ModelError
from tokenlabel.runtime.hub import local_name

CHECKPOINT_FORMAT = 2

_GO_BACK = "remove this folder to continue from the checkpoint before it"


def list_checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first."""
    folders = (run / "checkpoints").glob("[0-9]*")
    return sorted(path for path in folders if path.is_dir() and path.name.isdecimal())  # not a copy of one


def is_run(path: str | Path) -> bool:
    """Say whether a path is a run folder with a checkpoint, or a checkpoint folder."""
    path = Path(local_name(path))
    return (path / "state.json").exists() or bool(list_checkpoints(path))


def newest_checkpoint(path: str | Path) -> Path:
    """Return the newest checkpoint of a run folder; a checkpoint folder itself is returned as it is."""
    path = Path(local_name(path))
    if (path / "state.json").exists():
        return path
    checkpoints = list_checkpoints(path)
    if not checkpoints:
        raise ModelError(
            f"{path}: holds no checkpoint; give a run folder that `tokenlabel train` made, or one of its checkpoints"
        )
    return checkpoints[-1]


def checkpoint_or_file(path: str | Path) -> Path:
    """Return the newest checkpoint of a run folder; any other path as it is."""
    return newest_checkpoint(path) if is_run(path) else Path(local_name(path).removeprefix("local-dir:"))


def read_weights(folder: Path, state: dict[str, Any]) -> dict[str, Tensor]:
    """Return the weights to use of a checkpoint: the averaged ones where there are some."""
    name = "ema.safetensors" if "ema.safetensors" in state["sha256"] else "model.safetensors"
    return read_tensors(folder, name, state)


def token_classes_of(state: dict[str, Any]) -> ClassList:
    """Return what the tokens of a checkpoint are about, by its state."""
    others, names = state.get("token_classes"), state["class_names"]
    return ClassList(len(names), tuple(names)) if others is None else ClassList.from_dict(others)


def read_state(folder: Path) -> dict[str, Any]:
    """Return the state.json of a checkpoint folder. Raises ModelError."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}/state.json cannot be read ({error}); {_GO_BACK}") from error
    if not isinstance(state, dict) or not {"format", "step", "recipe", "class_names", "sha256"} <= state.keys():
        raise ModelError(f"{folder}/state.json was altered: it lacks what a checkpoint says; {_GO_BACK}")
    if state["format"] != CHECKPOINT_FORMAT:
        raise ModelError(
            f"{folder}: checkpoint format {state['format']}, this version of tokenlabel reads "
            f"{CHECKPOINT_FORMAT}; train anew in another folder, or go on with the version that wrote it"
        )
    return state


def read_tensors(folder: Path, name: str, state: dict[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a file of a checkpoint, its checksum checked. Raises ModelError."""
    path = folder / name
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); {_GO_BACK}") from error
    if hashlib.sha256(data).hexdigest() != state["sha256"].get(name):
        raise ModelError(f"{path}: was cut short or altered (its checksum is another); {_GO_BACK}")
    # safetensors returns them in another order in each process; ranks meet once for each that is divided among them.
    return dict(sorted(load(data).items()))


def options_without_weights(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's options for a model whose weights are at hand, so that timm fetches and reads none."""
    return {k: v for k, v in options.items() if k not in ("pretrained", "checkpoint_path", "cache_dir")}


def description_of(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a recipe, as plain data, says of its network and of how that is used, as exports state it."""
    model, loss = recipe["model"], recipe["loss"]
    taught = recipe["data"]["labels"] is not None or loss["teacher"]["name"] is not None
    return {
        "model": model["name"],
        "img_size": model["img_size"],
        "options": model["options"],
        "crop_fraction": recipe["eval"]["crop_fraction"],
        "interpolation": "bicubic",  # of every recipe
        "inference": recipe["eval"]["inference"],
        "precision": recipe["precision"],
        "uses_token_labels": taught and loss["beta"] > 0,
    }


def read_description(path: str | Path) -> dict[str, Any]:
    """Return what a file or checkpoint of ours says of its network, see `description_of`; nothing of another's.

    `token_classes`: what the tokens are about, where it is something else than what the class token is about.
    """
    path = checkpoint_or_file(path)
    state = (path if path.is_dir() else path.parent) / "state.json"
    with suppress(OSError, ValueError, SafetensorError, KeyError, TypeError):
        if state.exists() and (path.is_dir() or path.name in ("model.safetensors", "ema.safetensors")):
            about = json.loads(state.read_text("utf-8"))
            return {**description_of(about["recipe"]), "token_classes": about.get("token_classes")}
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
            if metadata.keys() >= {"model", "options", "img_size"}:
                return {key: json.loads(value) for key, value in metadata.items() if key != "format"}
    return {}
