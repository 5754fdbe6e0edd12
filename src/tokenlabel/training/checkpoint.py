"""Checkpoints: tensors as safetensors, the rest as JSON; written atomically, read only with correct checksums.

RUN/checkpoints/00001200/ holds the state after 1,200 steps:

    model.safetensors      weights and buffers
    ema.safetensors        their averages, if the recipe has optim.ema_decay
    optimizer.safetensors  one tensor for each entry of the optimizer's state, named INDEX.ENTRY
    state.json             step, recipe, class names, versions, and the SHA-256 of the files above

The link RUN/checkpoints/best points to the best evaluated one. Sharded tensors are gathered before they are written,
so a run may continue on any number of processes.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from tokenlabel.data.classes import ClassList
from tokenlabel.models.load import LoadedModel, load_model
from tokenlabel.models.runs import CHECKPOINT_FORMAT, list_checkpoints, newest_checkpoint, read_state, read_tensors
from tokenlabel.models.weights import load_all
from tokenlabel.runtime.configuration import config_as_dict, config_from_dict
from tokenlabel.runtime.distributed import current_ranks
from tokenlabel.runtime.errors import ModelError
from tokenlabel.training.recipe import Recipe, TrainingConfig

PACKAGES = ("tokenlabel", "torch", "torchvision", "timm")


@dataclass(frozen=True, eq=False)
class TrainState:
    """The state in a checkpoint: everything in a run that is not a function of its recipe and step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: ModelEmaV3 | None
    scaler: torch.amp.GradScaler | None = None
    """Scales the loss if the precision is fp16."""


def save_checkpoint(
    run: Path,
    step: int,
    state: TrainState,
    *,
    recipe: TrainingConfig,
    class_names: list[str],
    token_classes: ClassList | None = None,
) -> Path:
    """Write a checkpoint; return its folder. All ranks must call this; the first one writes, and the others wait.

    The folder gets its name when everything in it is on the disk, so a kill or a full disk at any moment leaves the
    earlier checkpoints intact. Raises ModelError.
    """
    folder, ranks = run / "checkpoints" / f"{step:08d}", current_ranks()
    files = _tensors(state, here=ranks.is_first)
    about = {"class_names": class_names, "token_classes": token_classes and asdict(token_classes)}
    ranks.on_main(lambda: _write(folder, step, state, files, recipe=recipe, about=about))
    return folder


def _write(
    folder: Path,
    step: int,
    state: TrainState,
    files: dict[str, dict[str, Tensor]],
    *,
    recipe: TrainingConfig,
    about: dict[str, Any],
) -> None:
    # Written under another name and renamed when complete: a folder with this name is a whole checkpoint.
    temporary = folder.with_name(f".writing-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for name, tensors in files.items():
            save_file(tensors, temporary / name)
        content = {
            "format": CHECKPOINT_FORMAT,
            "step": step,
            "recipe": config_as_dict(recipe),
            **about,
            "loss_scale": state.scaler.state_dict() if state.scaler else {},
            "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
            "sha256": {
                path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(temporary.iterdir())
            },
        }
        (temporary / "state.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        for path in temporary.iterdir():
            path.chmod((temporary / "state.json").stat().st_mode)  # safetensors lets the owner alone read its files
            _flush(path)
        _flush(temporary)
    except (OSError, SafetensorError) as error:  # safetensors raises its own error for a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise ModelError(
            f"{folder}: could not be written ({reason}); earlier checkpoints are intact; "
            "make room and run the same command to continue"
        ) from error
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    _flush(folder.parent)  # else a power cut could undo the rename


def prune_checkpoints(run: Path, spared: Collection[int], *, best: int | None) -> None:
    """Remove the checkpoints of all steps not in `spared`; point the link `best` to that of step `best`."""
    unfinished = (run / "checkpoints").glob(".writing-*")  # of a run that was killed
    for folder in (*list_checkpoints(run), *unfinished):
        if folder.name.startswith(".") or int(folder.name) not in spared:
            shutil.rmtree(folder)
    if best is not None:
        link = run / "checkpoints" / "best"
        temporary = link.with_name(".best")  # replaced in one step: the link always points somewhere
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(f"{best:08d}", target_is_directory=True)
        if link.is_dir() and not link.is_symlink():  # in a copied run: many tools copy the target of a link
            shutil.rmtree(link)
        temporary.replace(link)


def load_checkpoint(folder: Path, state: TrainState) -> int:
    """Load a checkpoint into model, optimizer and EMA; return its step.

    Raises ModelError if a file is missing, truncated or altered, or does not fit the model.
    """
    saved = read_state(folder)
    modules = {"model": state.model} | ({"ema": state.ema.module} if state.ema is not None else {})
    for name, module in modules.items():
        tensors, now = read_tensors(folder, f"{name}.safetensors", saved), module.state_dict()
        load_all(module, {key: _placed(tensor, now.get(key)) for key, tensor in tensors.items()}, name=str(folder))
    try:
        _load_optimizer(state.optimizer, read_tensors(folder, "optimizer.safetensors", saved))
    except IndexError as error:
        raise ModelError(
            f"{folder}/optimizer.safetensors is of more parameters than are trained here; start a run of your own "
            "with model.weights set to this checkpoint"
        ) from error
    if state.scaler is not None and saved["loss_scale"]:  # empty if the precision was another
        state.scaler.load_state_dict(saved["loss_scale"])
    return saved["step"]


def load_run(path: str | Path, kind: type[TrainingConfig] = Recipe) -> LoadedModel:
    """Return the model of a run folder (its newest checkpoint) or of a checkpoint folder, with its recipe.

    `kind`: type of the recipe. The weights are the EMA weights, if there are any. Raises ModelError, also for a run of
    the other task.
    """
    newest_checkpoint(path)  # raises: without a checkpoint, load_model would take the path for the name of a network
    return with_recipe(load_model(path, segments=kind is not Recipe), kind)


def with_recipe(loaded: LoadedModel, kind: type[TrainingConfig] = Recipe) -> LoadedModel:
    """Return a loaded model with its recipe, if it has one, as a dataclass instead of plain data."""
    if loaded.recipe is None:
        return loaded
    return replace(loaded, recipe=config_from_dict(loaded.recipe, kind, name=f"recipe of {loaded.name}"))


def _tensors(state: TrainState, *, here: bool) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of each file of a checkpoint, on the CPU and contiguous as safetensors needs them.

    `here`: this rank needs them. All ranks must call this: gathering sharded tensors is a collective operation.
    """
    optimizer = {
        f"{index}.{entry}": value
        for index, entries in state.optimizer.state_dict()["state"].items()
        for entry, value in entries.items()
    }
    files: dict[str, Mapping[str, Tensor]] = {
        "model.safetensors": state.model.state_dict(),
        "optimizer.safetensors": optimizer,
    }
    if state.ema is not None:
        files["ema.safetensors"] = state.ema.module.state_dict()
    whole: dict[str, dict[str, Tensor]] = {name: {} for name in files}
    for name, tensors in files.items():
        for key, tensor in tensors.items():
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if here:
                whole[name][key] = full.detach().cpu().contiguous()
    return whole


def _placed(saved: Tensor, like: Tensor | None) -> Tensor:
    """Return a saved tensor, sharded as `like` is."""
    if isinstance(like, DTensor) and saved.shape == like.shape:
        return distribute_tensor(saved.to(like.device), like.device_mesh, like.placements)
    return saved


def _load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Tensor]) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in saved.items():
        index, entry = name.split(".", 1)
        like = parameters[int(index)]
        if tensor.shape == like.shape:
            # The memory layout of an unbroken run (channels last): another order of sums would differ in the last bit.
            tensor = torch.empty_like(like).copy_(_placed(tensor, like))
        state.setdefault(int(index), {})[entry] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _flush(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
