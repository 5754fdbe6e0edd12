"""Check that a run may continue in its folder: a lock, and comparisons of recipe, classes, images and labels.

RUN/recipe.yaml holds the recipe of the last start; what is recorded about images stands in `training.run_images`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from tokenlabel.data.classes import ClassList
from tokenlabel.models.options import SegmentModelConfig
from tokenlabel.models.runs import list_checkpoints, read_state, token_classes_of
from tokenlabel.runtime.configuration import flattened, read_yaml, settings, write_config
from tokenlabel.runtime.distributed import Ranks
from tokenlabel.runtime.errors import ConfigError, refuse
from tokenlabel.runtime.hub import options_without_weights
from tokenlabel.runtime.process import say
from tokenlabel.runtime.runlog import RECIPE_FILE
from tokenlabel.training.recipe import ModelConfig, TrainingConfig
from tokenlabel.training.run_images import RunImages, refuse_classes

Config = TypeVar("Config", ModelConfig, SegmentModelConfig)

LOCK_FILE = ".lock"

# Fields that do not change what is learnt and may differ when a run continues. Images and labels are compared by their
# content, not by their paths.
_FREE = (
    "checkpoint.", "eval.", "data.train", "data.masks", "data.root", "data.val", "data.unlabelled", "data.val_masks",
    "data.val_split", "data.labels", "data.check",
    "data.max_missing", "data.num_workers",
)  # fmt: skip
# Fields that change rounding, or which images share a mix or the statistics of BatchNorm.
_NUMERICS = (
    "micro_batch_size", "compile", "precision", "grad_checkpointing", "sharded", "sync_batchnorm", "mix.group_size",
    "loss.teacher.compile", "loss.teacher.precision",
)  # fmt: skip
# Fields of an evaluation that change no figures, and those that add figures to the ones by which checkpoints compare.
_NO_FIGURES, _MORE_FIGURES = ("every_epochs", "batch_size", "windows_at_once"), ("labels", "probe", "probe_test")

Changes = dict[str, tuple[Any, Any]]
"""Values before and now of the fields that differ, by name."""


def check_apart(run: Path, *images: str | None) -> None:
    """Raise ConfigError for a run folder inside a folder of images, where its pictures would be taken for images."""
    for folder in filter(None, images):
        if run.resolve().is_relative_to(Path(folder).resolve()):
            raise ConfigError(
                f"--out {run}: is inside the images {folder}, where the pictures of a run would be taken for images of "
                "a class; choose a folder outside of it"
            )


def initial_model(config: Config, run: Path | None) -> Config:
    """Return the model section of a recipe as a start in `run` needs it: without weights where it has a checkpoint.

    Its weights replace the initial ones, whose files may be gone by now.
    """
    if run is None or not list_checkpoints(run):
        return config
    changes: dict[str, Any] = {"weights": None, "options": options_without_weights(config.options)}
    return replace(config, **changes)


@contextmanager
def locked(run: Path, ranks: Ranks) -> Iterator[None]:
    """Create a run folder and lock it for this job. Raises ConfigError if another process trains there.

    The system releases the lock when the process ends, even if it is killed. A new folder in which nothing has been
    written goes when the start is refused.
    """
    descriptors: list[int] = []
    is_new, is_held, path = not run.exists(), False, run / LOCK_FILE

    def _lock() -> None:
        nonlocal is_held
        try:
            run.mkdir(parents=True, exist_ok=True)
            descriptors.append(os.open(path, os.O_RDWR | os.O_CREAT, 0o666))
        except OSError as error:
            raise ConfigError(
                f"{run}: cannot be made or written to ({error.strerror}); choose another --out"
            ) from error
        try:
            fcntl.flock(descriptors[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not path.exists() or not os.path.samestat(os.fstat(descriptors[0]), path.stat()):
                raise BlockingIOError  # a start that was refused has just removed it, and another one may hold the next
            is_held = True
        except (BlockingIOError, PermissionError):
            raise ConfigError(
                f"{run}: another process trains in this folder; wait until it has ended, or choose another --out"
            ) from None
        except OSError as error:  # some network file systems have no locks
            say(f"{run}: its file system has no locks ({error.strerror}); let no other process train there")

    try:
        ranks.on_main(_lock)
        yield
    finally:
        with suppress(OSError):
            if is_new and is_held and [*run.iterdir()] == [path]:
                path.unlink()
        for descriptor in descriptors:
            os.close(descriptor)  # which releases the lock
        with suppress(
            OSError
        ):  # only an empty folder can be removed; after closing, as NFS keeps open files until then
            if is_new and is_held:
                run.rmdir()


def check_run_folder(
    run: Path,
    recipe: TrainingConfig,
    class_names: Sequence[str],
    images: RunImages | None,
    *,
    token_classes: ClassList | None = None,
    changed_numerics: bool = False,
) -> Changes:
    """Check that a run may continue in a folder with this recipe, and record it there.

    Returns how rounding, or which images share a forward pass, changed since the newest checkpoint.
    Before the first checkpoint everything may change. After it workers, checkpoints, evaluation and paths may, if
    classes, images and labels are the same, and with `changed_numerics` also what changes rounding or which images
    share a forward pass. Raises ConfigError that names all other differences. Called on the first rank only.
    """
    changes: Changes = {}
    checkpoints = list_checkpoints(run)
    if checkpoints:
        state = read_state(checkpoints[-1])
        changes = _changes(state["recipe"], recipe)
        last = _changes(read_yaml(run / RECIPE_FILE), recipe) if (run / RECIPE_FILE).exists() else changes
        # A start with other numerics that failed, perhaps for lack of memory, can be repeated and undone.
        _refuse_fields(run, changes, {*_NUMERICS} if changed_numerics else {*_NUMERICS} - last.keys())
        refuse_classes(run, state["class_names"], class_names)
        before = token_classes_of(state)
        now = token_classes or ClassList.of(class_names)
        if not before.is_same(now):
            raise ConfigError(
                f"{run}: its tokens were trained on {before.described()}, these labels are about {now.described()}; "
                "give labels by the same head, or choose another --out"
            )
        if images is not None:
            images.check(run)
    write_config(recipe, run / RECIPE_FILE)
    if images is not None:
        images.record(run)
    return {name: values for name, values in changes.items() if name in _NUMERICS}


def evaluated_as(recipe: Any, images: RunImages | None, metric: str) -> str:
    """Return two hashes with a `/` between: of what decides the figure `metric` of an evaluation, and of all figures.

    Settings count only if they are not the defaults: a later version may have more of them. To the first the val images
    are their keys and classes, wherever they lie.
    """
    usual = settings(type(recipe.eval)())
    chosen = {k: v for k, v in settings(recipe.eval).items() if v != usual.get(k) and k not in _NO_FIGURES}
    chosen["images"] = images and images.entries.get("val", {}).get("digest")
    of_metric = {k: v for k, v in chosen.items() if k not in _MORE_FIGURES or metric not in ("top1", "miou")}
    places = {k: v for k, v in settings(recipe.data).items() if k.startswith(("val", "root"))}
    texts = (json.dumps(part, sort_keys=True, default=str).encode() for part in (of_metric, chosen | places))
    return "/".join(hashlib.blake2b(text, digest_size=4).hexdigest() for text in texts)


def _changes(before: dict[str, Any], recipe: TrainingConfig) -> Changes:
    """Return the fields of a recipe that differ from those of a nested dict, and may not without being asked for."""
    theirs, ours = flattened(before), settings(recipe)
    # A field that the run does not know is newer than the run; options of models are free-form.
    names = [name for name in theirs | ours if name in theirs or ".options." in name]
    both = {name: (theirs.get(name), ours.get(name)) for name in names if theirs.get(name) != ours.get(name)}
    return {name: values for name, values in both.items() if not _is_free(name, *values)}


def _is_free(name: str, before: Any, now: Any) -> bool:
    if name == "data.labels":  # other paths are fine, but not training with labels instead of without
        return bool(before) == bool(now)
    return any(name == free or (free.endswith(".") and name.startswith(free)) for free in _FREE)


def _refuse_fields(run: Path, changes: Changes, allowed: set[str]) -> None:
    said = "; ".join(f"{name}: {before} there, {now} here" for name, (before, now) in changes.items())
    refuse(
        {
            f"{run} holds a run of another recipe ({said}); use its settings, or choose another --out, which may start "
            f"from its weights (--model.weights {run})": changes.keys() - {*_NUMERICS},
            f"{run} holds a run of another recipe ({said}); this changes rounding, or which images share a forward "
            "pass: --changed-numerics continues anyway, and records it in metrics.jsonl": changes.keys() - allowed,
        }
    )
