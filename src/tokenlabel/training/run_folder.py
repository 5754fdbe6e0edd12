"""Whose a run folder is: the lock, the recipe, the classes and the images of the run that may go on there.

RUN/recipe.yaml holds the recipe as it was last run, RUN/images.json what is known of the images (a digest, and which of
them do not decode), RUN/images.gz the list of the training images, from which an error names what has changed.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path
from typing import Any

from tokenlabel.data.classes import ClassList
from tokenlabel.data.decoding import ImageCheck, find_broken, leave_out
from tokenlabel.data.images import ImageSource
from tokenlabel.models.runs import list_checkpoints, read_state, token_classes_of
from tokenlabel.runtime.configuration import flattened, read_yaml, settings, write_config
from tokenlabel.runtime.distributed import Ranks, current_ranks
from tokenlabel.runtime.errors import ConfigError
from tokenlabel.runtime.process import listed, say, write_whole
from tokenlabel.runtime.runlog import RECIPE_FILE
from tokenlabel.training.recipe import TrainingConfig

IMAGES_FILE, LIST_FILE, LOCK_FILE = "images.json", "images.gz", ".lock"

# Fields that change nothing about what is learnt: a run goes on with others. Those of images are compared by what lies
# there, wherever that is.
_FREE = (
    "checkpoint.", "eval.", "data.train", "data.masks", "data.root", "data.val", "data.unlabelled", "data.val_masks",
    "data.val_split", "data.labels", "data.check",
    "data.max_missing", "data.num_workers",
)  # fmt: skip
# Fields that change the rounding, or which images share a mix or the statistics of BatchNorm.
_NUMERICS = (
    "micro_batch_size", "compile", "precision", "grad_checkpointing", "sharded", "sync_batchnorm", "mix.group_size",
    "loss.teacher.compile", "loss.teacher.precision",
)  # fmt: skip
# Of the free ones, those that change the figures of an evaluation.
_FIGURES = ("eval.", "data.val", "data.root")
_NO_FIGURES = ("eval.every_epochs", "eval.batch_size")

Changes = dict[str, tuple[Any, Any]]
"""Values of fields that differ, before and now, by the field's name."""


def check_apart(run: Path, *images: str | None) -> None:
    """Raise ConfigError for a run folder in a folder of images, where its pictures would be images of a class."""
    for folder in filter(None, images):
        if run.resolve().is_relative_to(Path(folder).resolve()):
            raise ConfigError(
                f"--out {run}: lies in the images {folder}, and the pictures of a run would be taken for images of a "
                "class; choose a folder outside of it"
            )


@contextmanager
def locked(run: Path, ranks: Ranks) -> Iterator[None]:
    """Keep a run folder, which is made, to this job. Raises ConfigError where another process trains.

    The system lets go of the lock with the process, so a kill leaves nothing behind.
    """
    descriptors: list[int] = []

    def take() -> None:
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
        except OSError as error:  # some network file systems cannot
            say(f"{run}: its file system has no locks ({error.strerror}); let no other process train there")

    try:
        ranks.on_main(take)
        yield
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


class RunImages:
    """What a run knows of its images: the first rank looks at them once, and writes it down with the run.

    `run`: where an earlier start may have written it down. `entries`: what images.json is to hold, on the first rank
    alone: `digest`, `check` and `broken` (keys) of the images of `train` and of `val`, and what the labels are.
    """

    def __init__(self, run: Path | None, class_names: Sequence[str]) -> None:
        self.run, self.class_names = run, class_names
        self.entries: dict[str, Any] = {}
        self.packed_list = b""

    def note_labels(self, store: Any, **counts: int) -> None:
        """Take in which labels of a `LabelStore` the run learns from: on other ones it must not go on.

        `counts`: what else has to stay as it is.
        """
        # Labels that were made anew since are other labels.
        newest = max((shard.generation for shard in store.shards), default=0)
        self.entries["labels"] = {**counts, "annotated_again": newest or None, **store.manifest.origin()}

    def broken(
        self,
        split: str,
        keys: Sequence[str],
        classes: Sequence[str],
        *,
        check: str,
        find: Callable[[list[int] | None], list[int]],
    ) -> list[int]:
        """Return, on all ranks, the numbers of the images that do not decode.

        `classes`: the class of each image; empty where they have none. `find`: looks at the images of some numbers, or
        at all, and says which are broken. `check`: how. What an earlier start found is found again; before the first
        checkpoint broken images may have been repaired, and are looked at again. Raises ConfigError for training images
        and classes that are not those of the run in the folder.
        """

        def look() -> list[int]:
            text = _list_of(keys, classes)
            entry = {"digest": hashlib.sha256(text).hexdigest(), "check": check, "broken": []}
            if split == "train":
                self.packed_list = gzip.compress(text, 1)
            self.entries[split] = entry
            checkpoints = list_checkpoints(self.run) if self.run else []
            if self.run and checkpoints and split == "train":
                _refuse_classes(self.run, read_state(checkpoints[-1])["class_names"], self.class_names)
                _refuse_images(self.run, self)
            found = read_images(self.run).get(split) if self.run else None
            if found is None or found["digest"] != entry["digest"]:
                numbers = find(None)
            elif checkpoints or found["check"] == check:
                known, entry["check"] = {*found["broken"]}, found["check"]
                numbers = [number for number, key in enumerate(keys) if key in known] if known else []
                numbers = find(numbers) if numbers and not checkpoints else numbers
            else:
                numbers = find(None)
            entry["broken"] = [keys[number] for number in numbers]
            return numbers

        return current_ranks().on_main(look)


def sound_images(
    source: ImageSource,
    *,
    skip_broken: bool,
    check: ImageCheck,
    option: str | None,
    find: Callable[[], list[int]] | None = None,
) -> ImageSource:
    """Return the images that decode, and say how many do not. All ranks call this, the first one looks.

    `find`: looks otherwise. Raises DataError for images that do not, unless `skip_broken`, which is spelt as `option`.
    """
    broken = find() if find else current_ranks().on_main(lambda: find_broken(source, check))
    return leave_out(source, broken, skip_broken=skip_broken, option=option)


def read_images(run: Path) -> dict[str, Any]:
    """Return what images.json of a run holds; nothing where there is none. Raises ConfigError if it is damaged."""
    path = run / IMAGES_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ConfigError(
            f"{path}: is damaged ({error}); remove it, and the next start looks at the images anew"
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
    """Make a folder that of a run, or make sure that the run that it holds may go on so; return what has changed.

    Before its first checkpoint everything may change. After it workers, checkpoints, evaluation and paths may, if
    classes, images and labels are the same; and, with `changed_numerics`, what changes rounding or which images go
    through the model together. Raises ConfigError that names all that differs beyond this. For the first rank alone.
    """
    changes: Changes = {}
    checkpoints = list_checkpoints(run)
    if checkpoints:
        state = read_state(checkpoints[-1])
        changes = _changes(run, recipe, state["recipe"])
        _refuse_fields(run, changes, changed_numerics)
        _refuse_classes(run, state["class_names"], class_names)
        before = token_classes_of(state)
        now = token_classes or ClassList(len(class_names), tuple(class_names))
        if not before.is_same(now):
            raise ConfigError(
                f"{run}: its tokens learnt {before.described()}, these labels are about {now.described()}; give labels "
                "by the head that it had, or choose another --out"
            )
        if images is not None:
            if not read_images(run):
                say(f"{run}: holds no {IMAGES_FILE}; images and labels are taken to be those that it began with")
            _refuse_images(run, images)
    write_config(recipe, run / RECIPE_FILE)
    if images is not None:
        write_whole(run / IMAGES_FILE, json.dumps(images.entries) + "\n")
        write_whole(run / LIST_FILE, [images.packed_list])
    return changes


def numerics(changes: Changes) -> Changes:
    """Return the changes of rounding, and of which images go through the model together."""
    return {name: values for name, values in changes.items() if name in _NUMERICS}


def changes_figures(changes: Changes) -> bool:
    """Whether an evaluation that was made before the changes has to be made again."""
    return any(name.startswith(_FIGURES) and name not in _NO_FIGURES for name in changes)


def _changes(run: Path, recipe: TrainingConfig, of_checkpoint: dict[str, Any]) -> Changes:
    """Return all fields that differ from those of the last start.

    Those that matter are compared with those of the newest checkpoint as well, and the nearer ones count: a start that
    failed, for want of memory say, may be taken back.
    """
    path, ours, of_each = run / RECIPE_FILE, settings(recipe), []
    for nested in [of_checkpoint] + ([read_yaml(path)] if path.exists() else []):
        theirs = flattened(nested)
        names = [name for name in theirs | ours if name in theirs or ".options." in name]  # else younger than the run
        unlike = [name for name in names if theirs.get(name) != ours.get(name)]
        of_each.append({name: (theirs.get(name), ours.get(name)) for name in unlike})
    # Free fields differ from the last start; the others from whichever is nearer, see above.
    held = [{k: v for k, v in changes.items() if not _is_free(k, *v)} for changes in of_each]
    return {k: v for k, v in of_each[-1].items() if _is_free(k, *v)} | min(held, key=len)


def _is_free(name: str, before: Any, now: Any) -> bool:
    if name == "data.labels":
        return bool(before) == bool(now)
    return any(name == free or (free.endswith(".") and name.startswith(free)) for free in _FREE)


def _refuse_fields(run: Path, changes: Changes, changed_numerics: bool) -> None:
    held = {name: values for name, values in changes.items() if not _is_free(name, *values)}
    said = "; ".join(f"{name}: {before} there, {now} here" for name, (before, now) in held.items())
    if held.keys() - {*_NUMERICS}:
        raise ConfigError(
            f"{run} holds a run of another recipe ({said}); give what it has, or choose another --out, which may begin "
            f"from its weights (--model.weights {run})"
        )
    if held and not changed_numerics:
        raise ConfigError(
            f"{run} holds a run of another recipe ({said}); this changes rounding, or which images go through the "
            "model together: --changed-numerics goes on so, and notes it in metrics.jsonl"
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
        "class ids would mean others; give the images that it had, or choose another --out"
    )


def _refuse_images(run: Path, images: RunImages) -> None:
    """Raise ConfigError where training images or labels are not those that a run began with, and name them."""
    before, now = read_images(run), images.entries
    unlike: list[str] = []
    if before and before["train"]["digest"] != now["train"]["digest"]:
        try:
            unlike += _unlike_lists((run / LIST_FILE).read_bytes(), images.packed_list)
        except (OSError, EOFError, zlib.error):
            unlike.append(f"the images, of which {LIST_FILE} no longer says what they were")
    theirs, ours = (flattened(entries.get("labels", {})) for entries in (before, now))
    names = [name for name in theirs | ours if theirs.get(name) != ours.get(name)] if theirs and ours else []
    unlike += [f"labels.{name}: {_short(theirs.get(name))} there, {_short(ours.get(name))} here" for name in names]
    if unlike:
        raise ConfigError(
            f"{run} was trained on other images or labels: {'; '.join(unlike)}; give those that it had, or choose "
            f"another --out, which may begin from its weights (--model.weights {run})"
        )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


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
    """Return a line for each image, its key and class, in the order of the keys wherever they come from."""
    lines = map("\t".join, zip(keys, classes or repeat(""), strict=False))
    return "\n".join(sorted(lines)).encode("utf-8", "surrogateescape")
