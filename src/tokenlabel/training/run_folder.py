"""Check that a run may continue in its folder: a lock, and comparisons of recipe, classes, images and labels.

RUN/recipe.yaml holds the recipe of the last start, RUN/images.json a digest of the images and which of them do not
decode, RUN/images.gz the list of the training images, so that an error can name what has changed.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import json
import math
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from tokenlabel.data.classes import ClassList
from tokenlabel.data.decoding import ImageCheck, find_broken, leave_out
from tokenlabel.data.images import ImageSource
from tokenlabel.models.runs import list_checkpoints, read_state, token_classes_of
from tokenlabel.models.segmentation import SegmentModelConfig
from tokenlabel.runtime.configuration import flattened, read_yaml, settings, write_config
from tokenlabel.runtime.distributed import Ranks, current_ranks
from tokenlabel.runtime.errors import ConfigError, refuse
from tokenlabel.runtime.hub import options_without_weights
from tokenlabel.runtime.process import listed, say, write_whole
from tokenlabel.runtime.runlog import RECIPE_FILE
from tokenlabel.training.recipe import ModelConfig, TrainingConfig

Config = TypeVar("Config", ModelConfig, SegmentModelConfig)

_LABELS_HASHED = 256  # as many maps as a cold disk gives in a few seconds
IMAGES_FILE, LIST_FILE, LOCK_FILE = "images.json", "images.gz", ".lock"

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

    The system releases the lock when the process ends, even if it is killed.
    """
    descriptors: list[int] = []

    def _lock() -> None:
        try:
            run.mkdir(parents=True, exist_ok=True)
            descriptors.append(os.open(run / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666))
        except OSError as error:
            raise ConfigError(
                f"{run}: cannot be made or written to ({error.strerror}); choose another --out"
            ) from error
        try:
            fcntl.flock(descriptors[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
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
        for descriptor in descriptors:
            os.close(descriptor)  # which releases the lock


class RunImages:
    """What a run folder records about images and labels, checked once by the first rank.

    `run`: the folder, where an earlier start may have recorded them. `entries`: the content of images.json, on the
    first rank only: `digest`, `check` and `broken` (keys) for `train` and `val`, and the origin of the labels.
    """

    def __init__(self, run: Path | None, class_names: Sequence[str]) -> None:
        self.run, self.class_names = run, class_names
        self.entries: dict[str, Any] = {}
        self.packed_list = b""

    def note_labels(self, store: Any, keys: Sequence[str], **counts: int) -> None:
        """Record the labels of a `LabelStore`, so that the run does not continue on others.

        `keys`: of the images. `counts`: other numbers that must not change.
        """
        # The generation grows when images are annotated again.
        newest = max((shard.generation for shard in store.shards), default=0)
        origin = {"annotated_again": newest or None, "content": _content_of(store, keys), **store.manifest.origin()}
        self.entries["labels"] = counts | origin

    def broken(
        self,
        split: str,
        keys: Sequence[str],
        classes: Sequence[str],
        *,
        check: str,
        find: Callable[[list[int] | None], list[int]],
    ) -> list[int]:
        """Return, on all ranks, the indices of the images that do not decode.

        `classes`: the class of each image; empty if they have none. `find`: returns the broken ones among some indices,
        or of all images for None. `check`: its method. The result of an earlier start is reused; before the first
        checkpoint broken images may have been repaired, and are checked again. Raises ConfigError for training images
        or classes that are not those of the run in the folder.
        """

        def _find() -> list[int]:
            text = _list_of(keys, classes)
            entry = {"digest": hashlib.sha256(text).hexdigest(), "check": check, "broken": []}
            entry["order"] = hashlib.sha256("\n".join(keys).encode("utf-8", "surrogateescape")).hexdigest()
            if split == "train":
                self.packed_list = gzip.compress(text, 1)  # the fastest level: a list may have millions of lines
            self.entries[split] = entry
            checkpoints = list_checkpoints(self.run) if self.run else []
            if self.run and checkpoints and split == "train":
                _refuse_classes(self.run, read_state(checkpoints[-1])["class_names"], self.class_names)
                _refuse_images(self.run, self)
            found = read_images(self.run).get(split, {}) if self.run else {}
            if found.get("digest") == entry["digest"] and (checkpoints or found["check"] == check):
                known, entry["check"] = {*found["broken"]}, found["check"]
                numbers = [number for number, key in enumerate(keys) if key in known] if known else []
                numbers = find(numbers) if numbers and not checkpoints else numbers
            else:
                numbers = find(None)
            entry["broken"] = [keys[number] for number in numbers]
            return numbers

        return current_ranks().on_main(_find)


def sound_images(
    source: ImageSource,
    *,
    skip_broken: bool,
    check: ImageCheck,
    option: str | None,
    find: Callable[[], list[int]] | None = None,
) -> ImageSource:
    """Return the images that decode, and print how many do not. All ranks must call this; the first one checks.

    `find`: another function that returns the broken ones. `option`: the name of `skip_broken` in messages. Raises
    DataError for broken images without `skip_broken`.
    """
    broken = find() if find else current_ranks().on_main(lambda: find_broken(source, check))
    return leave_out(source, broken, skip_broken=skip_broken, option=option)


def read_images(run: Path) -> dict[str, Any]:
    """Return the content of images.json of a run; empty without the file. Raises ConfigError if it is damaged."""
    path = run / IMAGES_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        refuse({f"expected a mapping, got {type(found).__name__}": not isinstance(found, dict)}, ValueError)
        return found
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ConfigError(
            f"{path}: is damaged ({error}); remove it, and the next start checks the images again"
        ) from error


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
        _refuse_classes(run, state["class_names"], class_names)
        before = token_classes_of(state)
        now = token_classes or ClassList(len(class_names), tuple(class_names))
        if not before.is_same(now):
            raise ConfigError(
                f"{run}: its tokens were trained on {before.described()}, these labels are about {now.described()}; "
                "give labels by the same head, or choose another --out"
            )
        if images is not None:
            known, order = read_images(run), images.entries["train"]["order"]
            if not known:
                say(f"{run}: holds no {IMAGES_FILE}; images and labels are taken to be those that it began with")
            elif known["train"].get("order", order) != order:
                say(
                    f"{run}: the training images come in another order than before; it does not go on as an unbroken "
                    "run would, and in an epoch that is under way some come twice, others not at all"
                )
            _refuse_images(run, images)
    write_config(recipe, run / RECIPE_FILE)
    if images is not None:
        write_whole(run / IMAGES_FILE, json.dumps(images.entries) + "\n")
        write_whole(run / LIST_FILE, [images.packed_list])
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


def _refuse_classes(run: Path, before: Sequence[str], now: Sequence[str]) -> None:
    if list(before) == list(now):
        return
    gone, new = ([name for name in a if name not in {*b}] for a, b in ((before, now), (now, before)))
    number = next((i for i, pair in enumerate(zip(before, now, strict=False)) if pair[0] != pair[1]), None)
    what = [f"gone: {listed(gone)}"] * bool(gone) + [f"new: {listed(new)}"] * bool(new)
    if number is not None:
        what.append(f"class {number} was {before[number]!r}, and is {now[number]!r}")
    raise ConfigError(
        f"{run} was trained on other classes, {len(before):,} there, {len(now):,} here ({'; '.join(what)}): "
        "class ids would mean other classes; give its images, or choose another --out"
    )


def _refuse_images(run: Path, images: RunImages) -> None:
    """Raise ConfigError that names the differences if training images or labels are not those of the run."""
    before, now = read_images(run), images.entries
    unlike: list[str] = []
    if before and before["train"]["digest"] != now["train"]["digest"]:
        try:
            unlike += _unlike_lists((run / LIST_FILE).read_bytes(), images.packed_list)
        except (OSError, EOFError, zlib.error):
            unlike.append(f"the images ({LIST_FILE}, their list, is missing or damaged)")
    theirs, ours = (flattened(entries.get("labels", {})) for entries in (before, now))

    def _short(value: Any) -> str:
        return text if len(text := str(value)) <= 60 else f"{text[:57]}..."

    names = [name for name in theirs | ours if theirs.get(name) != ours.get(name)] if theirs and ours else []
    if "content" not in theirs:  # a run of an earlier version
        names = [name for name in names if name != "content"]
    unlike += [f"labels.{name}: {_short(theirs.get(name))} there, {_short(ours.get(name))} here" for name in names]
    if unlike:
        raise ConfigError(
            f"{run} was trained on other images or labels: {'; '.join(unlike)}; give those of the run, or choose "
            f"another --out, which may start from its weights (--model.weights {run})"
        )


def _content_of(store: Any, keys: Sequence[str]) -> str:
    """Return a hash of the maps of some images, the same ones each time, by which other labels are told."""
    keys = sorted(keys)
    keys, digest = keys[:: math.ceil(len(keys) / _LABELS_HASHED) or 1], hashlib.blake2b(digest_size=8)
    for key in (key for key in keys if key in store):
        score_map = store[key]
        for array in (score_map.palette, score_map.codes, score_map.probs):
            digest.update(f"{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _unlike_lists(before: bytes, now: bytes) -> list[str]:
    texts = (gzip.decompress(packed).decode("utf-8", "surrogateescape") for packed in (before, now))
    theirs, ours = (
        {key: name for key, _, name in (line.rpartition("\t") for line in text.split("\n"))} for text in texts
    )
    gone, new = sorted(theirs.keys() - ours.keys()), sorted(ours.keys() - theirs.keys())
    moved = sorted(key for key in theirs.keys() & ours.keys() if theirs[key] != ours[key])
    parts = (("gone", gone), ("new", new), ("of another class", moved))
    counts = f"{len(theirs):,} images there, {len(ours):,} here"
    return [counts, *(f"{len(keys):,} {what} ({listed(keys)})" for what, keys in parts if keys)]


def _list_of(keys: Sequence[str], classes: Sequence[str]) -> bytes:
    """Return a line with key and class for each image, sorted, so that it does not depend on the order of files."""
    lines = map("\t".join, zip(keys, classes or repeat(""), strict=False))
    return "\n".join(sorted(lines)).encode("utf-8", "surrogateescape")
