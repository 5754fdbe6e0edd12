"""Checkpoints: tensors as safetensors, the rest as JSON; written whole or not at all, read only if intact.

RUN/checkpoints/00001200/ holds the state after 1,200 steps:

    model.safetensors      weights and buffers
    ema.safetensors        the averaged ones, where the recipe wants them
    optimizer.safetensors  one tensor for each entry of the optimizer's state, named INDEX.ENTRY
    state.json             the step, the recipe, what the heads are about, versions, and the SHA-256 of the files above

The link RUN/checkpoints/best leads to the one that evaluated best. Tensors that are divided among processes are
put together before they are written, so a run may continue on any number of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from tokenlabel.data.classes import ClassList
from tokenlabel.models import TokenModel, create_model
from tokenlabel.runtime.configuration import config_as_dict, config_from_dict
from tokenlabel.runtime.distributed import Ranks
from tokenlabel.training.recipe import Recipe, TrainingConfig

FORMAT = 2
PACKAGES = ("tokenlabel", "torch", "torchvision", "timm")


class CheckpointError(ValueError):
    """A checkpoint that is missing, incomplete or altered."""


@dataclass(frozen=True, eq=False)
class TrainState:
    """What a checkpoint holds: everything about a run that is not a function of its recipe and step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: ModelEmaV3 | None
    scaler: torch.amp.GradScaler | None = None
    """Scales the loss where the precision is fp16."""


def save_checkpoint(
    run: Path,
    step: int,
    state: TrainState,
    *,
    recipe: TrainingConfig,
    class_names: list[str],
    token_classes: ClassList | None = None,
    ranks: Ranks = Ranks(),  # noqa: B008  (immutable)
) -> Path:
    """Write a checkpoint; return its folder. All ranks call this, the first one writes.

    The folder appears under its name only when everything in it is on the disk, so a kill or a full disk at any
    moment leaves the earlier ones as they are.
    """
    folder = run / "checkpoints" / f"{step:08d}"
    files = _tensors(state, here=ranks.is_first)
    # All ranks wait until the first has written it.
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
    temporary = folder.with_name(f".writing-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for name, tensors in files.items():
            save_file(tensors, temporary / name)
        content = {
            "format": FORMAT,
            "step": step,
            "recipe": config_as_dict(recipe),
            **about,
            "loss_scale": state.scaler.state_dict() if state.scaler else {},
            "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
            "sha256": {path.name: _sha256(path.read_bytes()) for path in sorted(temporary.iterdir())},
        }
        (temporary / "state.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        for path in (*temporary.iterdir(), temporary):
            _flush(path)
    except (OSError, SafetensorError) as error:  # the library's own error hides that of the system
        shutil.rmtree(temporary, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"{folder}: could not be written ({reason}); earlier checkpoints are intact; "
            "make room and run the same command to continue"
        ) from error
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    _flush(folder.parent)


def list_checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first."""
    folders = (run / "checkpoints").glob("[0-9]*")
    return sorted(path for path in folders if path.is_dir() and path.name.isdecimal())  # not a copy of one


def prune_checkpoints(run: Path, spared: Collection[int], *, best: int | None) -> None:
    """Remove the checkpoints of all steps but the spared ones; let the link `best` lead to that of step `best`."""
    unfinished = (run / "checkpoints").glob(".writing-*")  # of a run that was killed
    for folder in (*list_checkpoints(run), *unfinished):
        if folder.name.startswith(".") or int(folder.name) not in spared:
            shutil.rmtree(folder)
    if best is not None:
        link = run / "checkpoints" / "best"
        temporary = link.with_name(".best")
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(f"{best:08d}", target_is_directory=True)
        if link.is_dir() and not link.is_symlink():  # of a copied run: many tools copy what a link leads to
            shutil.rmtree(link)
        temporary.replace(link)


def load_checkpoint(folder: Path, state: TrainState) -> int:
    """Load a checkpoint into a model, its optimizer and its average; return its step.

    Raises CheckpointError if a file is missing, was cut short or altered, or does not fit the model.
    """
    saved = read_state(folder)
    _load_module(state.model, read_tensors(folder, "model.safetensors", saved))
    if state.ema is not None:
        _load_module(state.ema.module, read_tensors(folder, "ema.safetensors", saved))
    try:
        _load_optimizer(state.optimizer, read_tensors(folder, "optimizer.safetensors", saved))
    except IndexError as error:
        raise CheckpointError(
            f"{folder}/optimizer.safetensors is of more parameters than are trained here; start a run of your own "
            "with model.weights set to this checkpoint"
        ) from error
    if state.scaler is not None and saved["loss_scale"]:  # none where the precision was another
        state.scaler.load_state_dict(saved["loss_scale"])
    return saved["step"]


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """A model out of a run, with what it needs to be used."""

    model: TokenModel
    recipe: Recipe
    class_names: list[str]
    step: int
    token_classes: ClassList | None = None
    """What the tokens are about, where these are other classes."""

    @property
    def token_names(self) -> list[str]:
        """The names of what the tokens are about; numbers where nobody says them."""
        others = self.token_classes
        return (
            self.class_names
            if others is None
            else list(others.names) or [str(i) for i in range(others.count)]
        )


def token_classes_of(state: dict[str, Any]) -> ClassList:
    """Return what the tokens of a checkpoint are about, by its state."""
    others, names = state.get("token_classes"), state["class_names"]
    return ClassList(len(names), tuple(names)) if others is None else ClassList.from_dict(others)


def load_model(path: str | Path) -> TrainedModel:
    """Return the model of a run folder (its newest checkpoint) or of one checkpoint folder, in evaluation mode.

    Its weights are the averaged ones where the recipe made an average.
    """
    folder = newest_checkpoint(Path(path))
    state = read_state(folder)
    if "layout" in state["recipe"]["data"]:
        raise CheckpointError(
            f"{path}: holds a segmentation model; the verbs of `tokenlabel segment` take it, and --model.weights"
        )
    recipe = config_from_dict(state["recipe"], Recipe, name=f"{folder}/state.json")
    others = None if state.get("token_classes") is None else token_classes_of(state)
    model = create_model(
        recipe.model.name,
        num_classes=len(state["class_names"]),
        num_token_classes=None if others is None else others.count,
        img_size=recipe.model.img_size,
        **options_without_weights(recipe.model.options),
    )
    model.load_state_dict(read_weights(folder, state))
    return TrainedModel(model.eval(), recipe, state["class_names"], state["step"], others)


def options_without_weights(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's options for a model whose weights are at hand, so that timm fetches and reads none."""
    return {k: v for k, v in options.items() if k not in ("pretrained", "checkpoint_path", "cache_dir")}


def is_run(path: Path) -> bool:
    """Say whether a path is a run folder with a checkpoint, or a checkpoint folder."""
    return (path / "state.json").exists() or bool(list_checkpoints(path))


def newest_checkpoint(path: Path) -> Path:
    """Return the newest checkpoint of a run folder; a checkpoint folder itself is returned as it is."""
    if (path / "state.json").exists():
        return path
    checkpoints = list_checkpoints(path)
    if not checkpoints:
        raise CheckpointError(
            f"{path}: holds no checkpoint; give a run folder that `tokenlabel train` made, or one of its checkpoints"
        )
    return checkpoints[-1]


def read_weights(folder: Path, state: dict[str, Any]) -> dict[str, Tensor]:
    """Return the weights to use of a checkpoint: the averaged ones where there are some."""
    name = "ema.safetensors" if "ema.safetensors" in state["sha256"] else "model.safetensors"
    return read_tensors(folder, name, state)


def _tensors(state: TrainState, *, here: bool) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of each file of a checkpoint, on the CPU and contiguous as safetensors wants them.

    `here`: whether this rank needs them. All ranks must call this where tensors are divided among them.
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


def _load_module(module: nn.Module, saved: dict[str, Tensor]) -> None:
    now = module.state_dict()
    module.load_state_dict({name: _placed(tensor, now.get(name)) for name, tensor in saved.items()})


def _placed(saved: Tensor, like: Tensor | None) -> Tensor:
    """Return a saved tensor divided among the ranks as `like` is."""
    if isinstance(like, DTensor) and not isinstance(saved, DTensor):
        return distribute_tensor(saved.to(like.device), like.device_mesh, like.placements)
    return saved


def _load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Tensor]) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in saved.items():
        index, entry = name.split(".", 1)
        like = parameters[int(index)]
        if tensor.shape == like.shape:
            # The same memory layout as an unbroken run has (channels last), so that not a bit differs.
            tensor = torch.empty_like(like).copy_(_placed(tensor, like))
        state.setdefault(int(index), {})[entry] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def read_state(folder: Path) -> dict[str, Any]:
    """Return the state.json of a checkpoint folder. Raises CheckpointError."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}/state.json cannot be read ({error}); {_ADVICE}") from error
    if (
        not isinstance(state, dict)
        or not {"format", "step", "recipe", "class_names", "sha256"} <= state.keys()
    ):
        raise CheckpointError(f"{folder}/state.json was altered: it lacks what a checkpoint says; {_ADVICE}")
    if state["format"] != FORMAT:
        raise CheckpointError(
            f"{folder}: checkpoint format {state['format']}, this version of tokenlabel reads {FORMAT}; train anew in "
            "another folder, or go on with the version that wrote it"
        )
    return state


def read_tensors(folder: Path, name: str, state: dict[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a file of a checkpoint, its checksum checked. Raises CheckpointError."""
    path = folder / name
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); {_ADVICE}") from error
    if _sha256(data) != state["sha256"].get(name):
        raise CheckpointError(f"{path}: was cut short or altered (its checksum is another); {_ADVICE}")
    # safetensors returns them in another order in each process; ranks meet once for each that is divided among them.
    return dict(sorted(load(data).items()))


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
