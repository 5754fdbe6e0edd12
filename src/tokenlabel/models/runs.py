"""Read run folders, their checkpoints, and the description of the network in checkpoints and exported files.

`training/checkpoint.py` documents the format of checkpoints, and writes them.
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
from tokenlabel.runtime.errors import ModelError, refuse
from tokenlabel.runtime.hub import local_name
from tokenlabel.runtime.urls import as_url

CHECKPOINT_FORMAT = 2

_GO_BACK = "remove this folder to continue from the checkpoint before it"


def list_checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first."""
    folders = (run / "checkpoints").glob("[0-9]*")
    return sorted(path for path in folders if path.is_dir() and path.name.isdecimal())  # not a copy of one


def is_run(path: str | Path) -> bool:
    """Return True if a path is a run folder with a checkpoint, or a checkpoint folder."""
    path = Path(local_name(path))
    return (path / "state.json").exists() or bool(list_checkpoints(path))


def newest_checkpoint(path: str | Path) -> Path:
    """Return the newest checkpoint of a run folder, or the path itself if it is a checkpoint. Raises ModelError."""
    folder = Path(local_name(path))
    if (folder / "state.json").exists():
        return folder
    checkpoints = list_checkpoints(folder)
    if not checkpoints:
        raise ModelError(
            f"{as_url(path) or path}: holds no checkpoint; give a run folder that `tokenlabel train` "
            "made, or one of its checkpoints"
        )
    return checkpoints[-1]


def checkpoint_or_file(path: str | Path) -> Path:
    """Return the newest checkpoint of a run folder; any other path unchanged."""
    return newest_checkpoint(path) if is_run(path) else Path(local_name(path).removeprefix("local-dir:"))


def read_weights(folder: Path, state: dict[str, Any]) -> dict[str, Tensor]:
    """Return the weights of a checkpoint for evaluation: its EMA weights, if there are any."""
    name = "ema.safetensors" if "ema.safetensors" in state["sha256"] else "model.safetensors"
    return read_tensors(folder, name, state)


def refuse_other_task(name: str, state: Mapping[str, Any], *, segments: bool) -> None:
    """Raise ModelError for a checkpoint's state of a classifier, or, unless `segments`, of a segmentation model."""
    is_segmentation = "layout" in state["recipe"]["data"]
    refuse(
        {
            f"{name}: holds a segmentation model, and a classifier is expected here: eval, export, push and fit-head "
            "take no other. `tokenlabel segment eval` evaluates it, annotate --teacher labels images with it, and "
            "training may begin with it (--model.weights)": is_segmentation and not segments,
            f"{name}: holds a classifier; `tokenlabel segment train` makes segmentation models": segments
            and not is_segmentation,
        },
        ModelError,
    )


def token_classes_of(state: dict[str, Any]) -> ClassList:
    """Return the classes of the tokens of a checkpoint, by its state: those of the images unless it names others."""
    others, names = state.get("token_classes"), state["class_names"]
    return ClassList.of(names) if others is None else ClassList.from_dict(others)


def read_state(folder: Path) -> dict[str, Any]:
    """Return the state.json of a checkpoint folder. Raises ModelError."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}/state.json cannot be read ({error}); {_GO_BACK}") from error
    keys, found = {"format", "step", "recipe", "class_names", "sha256"}, state if isinstance(state, dict) else {}
    refuse(
        {
            f"{folder}/state.json was altered: it lacks entries of a checkpoint; {_GO_BACK}": not keys <= found.keys(),
            f"{folder}: checkpoint format {found.get('format')}, this version of tokenlabel reads {CHECKPOINT_FORMAT}; "
            "train in another folder, or continue with the version that wrote it": found.get("format")
            != CHECKPOINT_FORMAT,
        },
        ModelError,
    )
    return state


def read_tensors(folder: Path, name: str, state: dict[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint's file. Raises ModelError, also if its checksum differs."""
    path = folder / name
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); {_GO_BACK}") from error
    if hashlib.sha256(data).hexdigest() != state["sha256"].get(name):
        raise ModelError(f"{path}: was cut short or altered (its checksum is another); {_GO_BACK}")
    # safetensors' order differs between processes, but loading sharded tensors needs one collective call for each.
    return dict(sorted(load(data).items()))


def description_of(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the description of a network in exported files, from its recipe as plain data."""
    model, loss = recipe["model"], recipe["loss"]
    has_labels = recipe["data"]["labels"] is not None or loss["teacher"]["name"] is not None
    return {
        "model": model["name"],
        "img_size": model["img_size"],
        "options": model["options"],
        "crop_fraction": recipe["eval"]["crop_fraction"],
        "interpolation": "bicubic",  # in every recipe
        "inference": recipe["eval"]["inference"],
        "precision": recipe["precision"],
        "uses_token_labels": has_labels and loss["beta"] > 0,
    }


def read_description(path: str | Path) -> dict[str, Any]:
    """Return the description of a network in a file or checkpoint of ours, see `description_of`; else an empty dict.

    It may also hold `token_classes`, if the tokens have other classes than the images.
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
