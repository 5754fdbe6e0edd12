"""What a label store says about itself: FOLDER/manifest.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, get_type_hints

from tokenlabel.core.scores import Kind, Orientation
from tokenlabel.data.classes import ClassList, composed
from tokenlabel.labels.encoding import DEFAULT_TOLERANCE, Encoding
from tokenlabel.labels.shards import SHARD_SUFFIX, write_atomically
from tokenlabel.runtime.coercion import coerced, coerced_fields
from tokenlabel.runtime.errors import StoreError
from tokenlabel.runtime.process import listed, locked

MANIFEST_FILE = "manifest.json"
FORMAT_VERSION = 1  # raised when older versions would misread a store
MAX_MANIFEST_BYTES = 1 << 28
# The entry of a class map that says what became of the probability of classes that it leaves out.
OUTSIDE = "teacher.class_map.nowhere"

_REPAIR = "put a copy back: the command that made these labels writes an equal one first thing, into another folder"


@dataclass(frozen=True, slots=True)
@coerced_fields
class Failure:
    """An image without a label, and why."""

    key: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
@coerced_fields
class Manifest:
    """What holds for all labels of a store.

    `class_names`: of the labels, in the order of their ids; empty where they have none (see `words`). `topk`: what a
    cell keeps at the most. `kind`: see `scores.Kind`. `encoding`: of what is written from now on; each
    record says its own. `teacher`, `preprocessing`: what made the labels and what it saw, for people and for
    comparison. `tolerance`: of new compact records, see `encoding.pack`. `orientation`: how maps lie on images whose
    files have a tag. `failures`: the images that the last call could not label.

    >>> manifest = tl.Manifest(num_classes=2, class_names=("ant", "bee"), topk=2)
    >>> manifest.differences(tl.Manifest(num_classes=3, topk=2))[0]
    'num_classes is 2 there, 3 here'
    """

    num_classes: int
    class_names: tuple[str, ...] = ()
    topk: int
    kind: Kind = Kind.PROBABILITIES
    encoding: Encoding = Encoding.COMPACT
    tolerance: float = DEFAULT_TOLERANCE
    teacher: dict[str, Any] = field(default_factory=dict)
    preprocessing: dict[str, Any] = field(default_factory=dict)
    orientation: Orientation = Orientation.UPRIGHT
    failures: tuple[Failure, ...] = ()

    def __post_init__(self) -> None:
        for name in ("teacher", "preprocessing"):  # as they will be read back: no tuples
            object.__setattr__(self, name, json.loads(json.dumps(getattr(self, name))))
        problem = ""
        if self.num_classes < 2 or self.topk < 1:
            problem = f"labels need 2 classes and 1 kept a cell at least; got {self.num_classes} and {self.topk}"
        elif not 0 <= self.tolerance < 1:
            problem = f"the tolerance of labels must be at least 0 and below 1, got {self.tolerance}"
        elif self.class_names and len(self.class_names) != self.num_classes:
            problem = f"{self.num_classes} classes, but {len(self.class_names)} class names"
        if problem:
            raise StoreError(problem)

    @property
    def classes(self) -> ClassList:
        """What the labels are about."""
        return ClassList(self.num_classes, self.class_names, self.words)

    @property
    def empty_is_even(self) -> bool:
        """Whether cells that keep nothing are even distributions: unless a class map left out what they show."""
        class_map = self.teacher.get("class_map")
        return not (isinstance(class_map, dict) and class_map.get("nowhere") == "renormalise")

    @property
    def saw_images(self) -> bool:
        """Whether the teacher decoded the images; masks and files of others were made without."""
        return self.teacher.get("name") not in ("masks", "published label files")

    @property
    def words(self) -> str:
        """The hash of the head whose visual words the classes are, which tells them from those of any other head.

        "" where they are classes with names, or without.
        """
        return str(self.teacher.get("words", ""))

    def origin(self) -> dict[str, Any]:
        """Return what made the labels, for people and for comparison."""
        names = ("num_classes", "kind", "topk", "teacher", "preprocessing")
        return {name: _without_names(getattr(self, name)) for name in names}

    def differences(self, other: Manifest) -> list[str]:
        """Return in words what keeps labels of two manifests from being of one kind."""
        compared = ("num_classes", "class_names", "kind", "topk", "orientation", "teacher", "preprocessing")
        ours, theirs = ({name: _without_names(getattr(m, name)) for name in compared} for m in (self, other))
        unlike = [difference for name in compared for difference in _unlike(name, ours[name], theirs[name])]
        # An option mends this one, if it is the only one.
        unlike.sort(key=lambda difference: difference[0] == OUTSIDE)
        return [_in_words(*difference) for difference in unlike]


def _unlike(name: str, ours: Any, theirs: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield every entry in which two descriptions differ: its name, and what it is in each."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in sorted(ours.keys() | theirs.keys()):
            yield from _unlike(f"{name}.{key}", ours.get(key), theirs.get(key))
    elif isinstance(ours, (list, tuple)) and isinstance(theirs, (list, tuple)):
        if len(ours) != len(theirs):
            yield f"the length of {name}", len(ours), len(theirs)
        for index, (a, b) in enumerate(zip(ours, theirs, strict=False)):
            yield from _unlike(f"{name}[{index}]", a, b)
    elif ours != theirs:
        yield name, ours, theirs


def _in_words(name: str, ours: Any, theirs: Any) -> str:
    if name == OUTSIDE:
        there, here = (str(value).removesuffix(" evenly") for value in (ours, theirs))
        return f"made with --outside {there} there, {here} here; `--outside {there}` goes on with that store"
    return f"{name} is {_short(ours)} there, {_short(theirs)} here"


def _without_names(described: Any) -> Any:
    """Return a description without the name of any network that is known by its weights: a path may be spelt anew."""
    if isinstance(described, str):
        return composed(described)
    if isinstance(described, (list, tuple)):
        return [_without_names(entry) for entry in described]
    if not isinstance(described, dict):
        return described
    return {
        key: _without_names(value) for key, value in described.items() if key != "name" or "weights" not in described
    }


def update_failures(
    folder: str | Path, failures: Sequence[Failure], *, others: Callable[[str], bool] = lambda key: False
) -> None:
    """Write to a store's manifest which images could not be labelled, in place of those it had.

    `others`: whether the failure of a key that it had stays. Nothing is written if nothing changes.
    """
    with locked(Path(folder)):
        manifest = read_manifest(folder)
        new = {failure.key for failure in failures}
        kept = [f for f in manifest.failures if f.key not in new and others(f.key)]
        if (all_failures := (*kept, *failures)) != manifest.failures:
            write_manifest(Path(folder), replace(manifest, failures=all_failures))


def read_manifest(folder: str | Path) -> Manifest:
    """Return the manifest of a store. Raises StoreError if there is none or it cannot be understood."""
    path = Path(folder) / MANIFEST_FILE
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise StoreError(f"{path}: {path.stat().st_size} bytes are too many for a manifest")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise StoreError(no_store(Path(folder))) from None
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error.strerror})") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise StoreError(f"{path}: is not JSON ({error}); {_REPAIR}") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    known = [encoding.value for encoding in Encoding]
    if version != FORMAT_VERSION:
        problem = f"format {version!r}, this version of tokenlabel reads {FORMAT_VERSION}"
    elif (name := content.get("encoding")) not in known:
        problem = f"labels in encoding {name!r}, this version of tokenlabel reads {' and '.join(known)}; annotate again"
    else:
        try:
            return _manifest(content)
        except (ValueError, TypeError, KeyError) as error:
            problem = str(error)
            if not isinstance(error, StoreError):
                problem = f"an entry is missing or of the wrong type ({error})"
    raise StoreError(f"{path}: {problem}")


def _manifest(content: dict[str, Any]) -> Manifest:
    # The first stores kept every entry, and had no word for the orientation.
    found = {"tolerance": 0.0, "orientation": Orientation.STORED, **content}
    kinds = get_type_hints(Manifest)
    return Manifest(**{name: coerced(found[name], kind, name=name) for name, kind in kinds.items()})


def no_store(folder: Path) -> str:
    """Return why a path without a manifest is no label store, and what may have been meant."""
    if folder.is_file():
        meant = f"; did you mean {folder.parent}?" if (folder.parent / MANIFEST_FILE).exists() else ""
        return f"{folder}: is a file, and a label store is a folder{meant}"
    if any(folder.glob(f"*{SHARD_SUFFIX}")):
        return f"{folder}: holds {SHARD_SUFFIX} files, but no {MANIFEST_FILE}; {_REPAIR}"
    if inner := sorted(path.parent.name for path in folder.glob(f"*/{MANIFEST_FILE}")):
        return f"{folder}: no label store (it has no {MANIFEST_FILE}), but has some in it ({listed(inner)}); name those"
    return f"{folder}: no label store (it has no {MANIFEST_FILE}); `tokenlabel annotate` makes one"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of a store, whole or not at all."""
    content = {"format_version": FORMAT_VERSION, **asdict(manifest)}
    write_atomically(folder / MANIFEST_FILE, [(json.dumps(content, indent=1) + "\n").encode()])


def _short(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, (dict, tuple, list, StrEnum)) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
