"""Checkpoints: tensors as safetensors, the rest as JSON; written whole or not at all, read only if intact.

RUN/checkpoints/00001200/ holds the state after 1,200 steps:

    model.safetensors      weights and buffers
    ema.safetensors        the averaged ones, where the recipe wants them
    optimizer.safetensors  one tensor for each entry of the optimizer's state, named INDEX.ENTRY
    state.json             the step, the recipe, the class names, versions, and the SHA-256 of the files above
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save_file
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from tokenlabel.models import TokenModel, create_model
from tokenlabel.recipe import Recipe, recipe_as_dict, recipe_from_dict

FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint that is missing, incomplete or altered."""


@dataclass(frozen=True, eq=False)
class Trained:
    """What a checkpoint holds: everything about a run that is not a function of its recipe and step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: ModelEmaV3 | None


def save_checkpoint(
    run: Path, step: int, trained: Trained, *, recipe: Recipe, class_names: list[str], keep: int = 2
) -> Path:
    """Write a checkpoint and drop all but the newest `keep`; return its folder.

    The folder appears under its name only when everything in it is on the disk, so a kill or a full disk at any
    moment leaves the earlier ones as they are.
    """
    folder = run / "checkpoints" / f"{step:08d}"
    temporary = folder.with_name(f".writing-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for name, tensors in _tensors(trained).items():
            save_file(tensors, temporary / name)
        state = {
            "format": FORMAT,
            "step": step,
            "recipe": recipe_as_dict(recipe),
            "class_names": class_names,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "sha256": {path.name: _sha256(path.read_bytes()) for path in sorted(temporary.iterdir())},
        }
        (temporary / "state.json").write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
        for path in (*temporary.iterdir(), temporary):
            _flush(path)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"{folder}: could not be written ({error.strerror or error}); earlier checkpoints are intact; "
            "make room and run the same command to continue"
        ) from error
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    _flush(folder.parent)
    for old in list_checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    return folder


def list_checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first."""
    return sorted(path for path in (run / "checkpoints").glob("[0-9]*") if path.is_dir())


def load_checkpoint(folder: Path, trained: Trained) -> int:
    """Load a checkpoint into a model, its optimizer and its average; return its step.

    Raises CheckpointError if a file is missing, was cut short or altered, or does not fit the model.
    """
    state = _read_state(folder)
    trained.model.load_state_dict(_read_tensors(folder, "model.safetensors", state))
    if trained.ema is not None:
        trained.ema.module.load_state_dict(_read_tensors(folder, "ema.safetensors", state))
    _load_optimizer(trained.optimizer, _read_tensors(folder, "optimizer.safetensors", state))
    return state["step"]


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """A model out of a run, with what it needs to be used."""

    model: TokenModel
    recipe: Recipe
    class_names: list[str]
    step: int


def load_model(path: Path) -> TrainedModel:
    """Return the model of a run folder (its newest checkpoint) or of one checkpoint folder, in evaluation mode.

    Its weights are the averaged ones where the recipe made an average.
    """
    folder = path
    if not (path / "state.json").exists():
        checkpoints = list_checkpoints(path)
        if not checkpoints:
            raise CheckpointError(
                f"{path}: holds no checkpoint; give a run folder that `tokenlabel train` made, "
                "or one of its checkpoints"
            )
        folder = checkpoints[-1]
    state = _read_state(folder)
    recipe = recipe_from_dict(state["recipe"], name=f"{folder}/state.json")
    model = create_model(
        recipe.model.name,
        num_classes=len(state["class_names"]),
        size_px=recipe.model.size_px,
        **recipe.model.options,
    )
    name = "ema.safetensors" if "ema.safetensors" in state["sha256"] else "model.safetensors"
    model.load_state_dict(_read_tensors(folder, name, state))
    return TrainedModel(model.eval(), recipe, state["class_names"], state["step"])


def _tensors(trained: Trained) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of each file of a checkpoint, on the CPU and contiguous as safetensors wants them."""
    optimizer = {
        f"{index}.{entry}": value
        for index, entries in trained.optimizer.state_dict()["state"].items()
        for entry, value in entries.items()
    }
    files: dict[str, Mapping[str, Tensor]] = {
        "model.safetensors": trained.model.state_dict(),
        "optimizer.safetensors": optimizer,
    }
    if trained.ema is not None:
        files["ema.safetensors"] = trained.ema.module.state_dict()
    return {
        name: {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        for name, tensors in files.items()
    }


def _load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Tensor]) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in saved.items():
        index, entry = name.split(".", 1)
        like = parameters[int(index)]
        if tensor.shape == like.shape:
            # The same memory layout as an unbroken run has (channels last), so that not a bit differs.
            tensor = torch.empty_like(like).copy_(tensor)
        state.setdefault(int(index), {})[entry] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _read_state(folder: Path) -> dict[str, Any]:
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}/state.json cannot be read ({error}); {_ADVICE}") from error
    if state.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder}: checkpoint format {state.get('format')}, this version of tokenlabel reads {FORMAT}"
        )
    return state


def _read_tensors(folder: Path, name: str, state: dict[str, Any]) -> dict[str, Tensor]:
    path = folder / name
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); {_ADVICE}") from error
    if _sha256(data) != state["sha256"].get(name):
        raise CheckpointError(f"{path}: was cut short or altered (its checksum is another); {_ADVICE}")
    return load(data)


_ADVICE = "remove this folder to continue from the checkpoint before it"


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _flush(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
