"""What a run folder records about its images and labels, so that it does not continue on others.

RUN/images.json holds a digest of the images and which of them do not decode, RUN/images.gz the list of the training
images, so that an error can name what has changed.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import zlib
from collections.abc import Callable, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from tokenlabel.data.decoding import ImageCheck, find_broken, leave_out
from tokenlabel.data.images import ImageSource
from tokenlabel.models.runs import list_checkpoints, read_state
from tokenlabel.runtime.configuration import flattened
from tokenlabel.runtime.distributed import current_ranks
from tokenlabel.runtime.errors import ConfigError, refuse
from tokenlabel.runtime.process import listed, say, write_whole

_LABELS_HASHED = 256  # as many maps as a cold disk gives in a few seconds
IMAGES_FILE, LIST_FILE = "images.json", "images.gz"


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
                refuse_classes(self.run, read_state(checkpoints[-1])["class_names"], self.class_names)
                self._refuse_others(self.run, read_images(self.run))
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

    def check(self, run: Path) -> None:
        """Raise ConfigError that names the differences if training images or labels are not those of a run.

        Another order of the same images is said only.
        """
        before, order = read_images(run), self.entries["train"]["order"]
        if not before:
            say(f"{run}: holds no {IMAGES_FILE}; images and labels are taken to be those that it began with")
        elif before["train"].get("order", order) != order:
            say(
                f"{run}: the training images come in another order than before; it does not go on as an unbroken "
                "run would, and in an epoch that is under way some come twice, others not at all"
            )
        self._refuse_others(run, before)

    def record(self, run: Path) -> None:
        """Write what was found into the folder of a run."""
        write_whole(run / IMAGES_FILE, json.dumps(self.entries) + "\n")
        write_whole(run / LIST_FILE, [self.packed_list])

    def _refuse_others(self, run: Path, before: dict[str, Any]) -> None:
        unlike: list[str] = []
        if before and before["train"]["digest"] != self.entries["train"]["digest"]:
            try:
                unlike += _unlike_lists((run / LIST_FILE).read_bytes(), self.packed_list)
            except (OSError, EOFError, zlib.error):
                unlike.append(f"the images ({LIST_FILE}, their list, is missing or damaged)")
        theirs, ours = (flattened(entries.get("labels", {})) for entries in (before, self.entries))

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


def refuse_classes(run: Path, before: Sequence[str], now: Sequence[str]) -> None:
    """Raise ConfigError that names the differences if the classes are not those of a run."""
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
