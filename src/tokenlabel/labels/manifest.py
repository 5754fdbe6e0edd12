"""The manifest of a label store, FOLDER/manifest.json: what made its labels, and which classes they are about."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, get_type_hints

from tokenlabel.core.scores import Kind, Orientation
from tokenlabel.data.classes import ClassList, composed
from tokenlabel.labels.encoding import DEFAULT_TOLERANCE, Encoding
from tokenlabel.labels.shards import SHARD_SUFFIX, write_atomically
from tokenlabel.runtime.coercion import coerced, coerced_fields
from tokenlabel.runtime.errors import StoreError, refuse
from tokenlabel.runtime.process import listed, locked

MANIFEST_FILE = "manifest.json"
FORMAT_VERSION = 1  # incremented when older versions would misread a store
MAX_MANIFEST_BYTES = 1 << 28
# What a class map does with the probability of classes that it maps to none (`annotate --outside`).
OUTSIDE = "teacher.class_map.nowhere"
# Settings of evaluation that change no label. Earlier versions of `segment predict --store` wrote them all the same.
WITHOUT_EFFECT = ("every_epochs", "windows_at_once")

_SIZE, _CROP = "preprocessing.size", "preprocessing.crop_fraction"
# Entries that an option decides: of `annotate`, the last two of `import-labels`.
_OPTION_OF = {
    _SIZE: "--size", _CROP: "--crop", "preprocessing.ignore_index": "--ignore-index", "teacher.cells": "--cells",
    OUTSIDE: "--outside", "preprocessing.region": "--region", "preprocessing.layout": "--layout",
}  # fmt: skip
# What follows from another size: a network whose position embeddings were resized has another hash of its weights.
_BY_SIZE = re.compile(r"teacher\b.*\.(weights|short_side_px)|preprocessing\.(stride_px|fixed_size_px).*")

_REPAIR = "restore a copy: the command that made these labels starts by writing an equal one, into another folder"


@dataclass(frozen=True, slots=True)
@coerced_fields
class Failure:
    """An image without a label, and why."""

    key: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
@coerced_fields
class Manifest:
    """The settings that all labels of a store have in common.

    `class_names`: in the order of the class ids; empty if the classes have no names (see `words`). `topk`: the most
    classes that a cell keeps. `kind`: see `scores.Kind`. `encoding`: of new records; each record names its own.
    `teacher`, `preprocessing`: what made the labels and what it was shown, to be read and compared. `tolerance`: of new
    compact records, see `encoding.pack`. `orientation`: how maps lie on images whose files have an EXIF orientation.
    `failures`: the images that the last call could not label. `empty_is_even`: whether a cell that keeps nothing is an
    even distribution or says nothing, see `ScoreMap`; by default even for labels of a teacher, whose cells all say
    something, unless a class map drops what they show.

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
    empty_is_even: bool | None = None

    def __post_init__(self) -> None:
        for name in ("teacher", "preprocessing"):  # as they are read back from JSON: with lists, not tuples
            object.__setattr__(self, name, json.loads(json.dumps(getattr(self, name))))
        if self.empty_is_even is None:
            object.__setattr__(self, "empty_is_even", bool(self.teacher) and not _drops_classes(self.teacher))
        count, names = self.num_classes, self.class_names
        faults = {
            f"labels need 2 classes and 1 kept a cell at least; got {count} and {self.topk}": count < 2
            or self.topk < 1,
            f"the tolerance of labels must be at least 0 and below 1, got {self.tolerance}": not 0
            <= self.tolerance
            < 1,
            f"{count} classes, but {len(names)} class names": names and len(names) != count,
        }
        refuse(faults, StoreError)

    @property
    def classes(self) -> ClassList:
        """The classes of the labels."""
        return ClassList(self.num_classes, self.class_names, self.words)

    @property
    def saw_images(self) -> bool:
        """Whether the teacher decoded the images; masks and imported label files do not need them."""
        return self.teacher.get("name") not in ("masks", "published label files")

    @property
    def words(self) -> str:
        """The hash of the head whose visual words the classes are; "" if they are classes of other kinds."""
        return str(self.teacher.get("words", ""))

    def origin(self) -> dict[str, Any]:
        """Return what made the labels, which checkpoints compare and reports show."""
        names = ("num_classes", "kind", "topk", "teacher", "preprocessing")
        return {name: _without_names(getattr(self, name)) for name in names}

    def differences(self, other: Manifest) -> list[str]:
        """Return why labels of two manifests cannot be used together, a message for each difference."""
        compared = (
            "num_classes", "class_names", "kind", "topk", "orientation", "teacher", "preprocessing", "empty_is_even",
        )  # fmt: skip
        ours, theirs = ({name: _without_names(getattr(m, name)) for name in compared} for m in (self, other))
        for described in (ours["preprocessing"], theirs["preprocessing"]):
            for name in WITHOUT_EFFECT:
                described.pop(name, None)
        unlike = [difference for name in compared for difference in _unlike(name, ours[name], theirs[name])]
        resized = any(name == _SIZE for name, *_ in unlike)
        others = [*_other_teacher(self.teacher, other.teacher, resized=resized)] if unlike else []
        unlike.sort(key=lambda difference: _rank(difference, resized=resized))
        advice = "" if others else _continuing(unlike, self.preprocessing.get("fixed_size_px"))
        return others + [_difference_text(*each) + (advice if _is_option(*each) else "") for each in unlike]


def _drops_classes(teacher: Any) -> bool:
    class_map = teacher.get("class_map") if isinstance(teacher, dict) else None
    return isinstance(class_map, dict) and class_map.get("nowhere") == "renormalise"


def _unlike(name: str, ours: Any, theirs: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield the name and both values of every entry in which two descriptions differ."""
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


def _rank(difference: tuple[str, Any, Any], *, resized: bool) -> int:
    """Order differences: those whose text names an option, which helps only if no other is left, after the others.

    What follows from an option comes behind it.
    """
    name = difference[0]
    late = (_is_option(*difference), resized and _BY_SIZE.fullmatch(name), name == "empty_is_even")
    return max((number for number, is_so in enumerate(late, 1) if is_so), default=0)


def _is_option(name: str, ours: Any, theirs: Any) -> bool:
    is_of_network = name == _CROP and ours is not None and theirs is not None  # `--crop center` of both
    return name in _OPTION_OF and not is_of_network


def _continuing(unlike: Sequence[tuple[str, Any, Any]], fixed_size_px: Sequence[int] | None) -> str:
    """Return what to type for labels like ours, of which a network of fixed size saw that."""
    given, left_out = list[str](), list[str]()
    for name, ours, _ in (difference for difference in unlike if _is_option(*difference)):
        # `--size` makes squares: others are the network's own.
        is_own = name == _SIZE and isinstance(fixed_size_px, (list, tuple)) and len({*fixed_size_px}) > 1
        if ours is None or is_own:
            left_out.append(_OPTION_OF[name])
        else:
            given.append(f"{_OPTION_OF[name]} {'center' if name == _CROP else _as_typed(ours)}")
    what = f"`{' '.join(given)}`" if given else "the command"
    without = f" without {' and '.join(left_out)}" if left_out else ""
    are_unsure = any(name.endswith(".weights") for name, *_ in unlike)
    return f"; {what}{without} continues that store{', if the weights are the same' if are_unsure else ''}"


def _as_typed(value: Any) -> str:
    return str(value).removesuffix(" evenly")  # as OUTSIDE has it


def _difference_text(name: str, ours: Any, theirs: Any) -> str:
    if name == OUTSIDE:
        return f"made with --outside {_as_typed(ours)} there, {_as_typed(theirs)} here"
    advice = f"; Manifest(empty_is_even={ours}) continues that store" if name == "empty_is_even" else ""
    return f"{name} is {_short(ours)} there, {_short(theirs)} here{advice}"


def _other_teacher(ours: Mapping[str, Any], theirs: Mapping[str, Any], *, resized: bool) -> Iterator[str]:
    """Yield how two teachers are called, if they are other networks, or others of several are beside them.

    `resized`: they see other sizes, so hashes of the same weights may differ.
    """
    there, here = ([(m.get("weights"), m.get("head")) for m in members_of(teacher)] for teacher in (ours, theirs))
    if there == here and ("members" in ours) == ("members" in theirs):
        return
    first, second = _teacher_text(ours), _teacher_text(theirs)
    if resized and first == second and [head for _, head in there] == [head for _, head in here]:
        return
    yield f"the teacher is {first} there, {second} here" + (", another one of the same name" if first == second else "")


def members_of(teacher: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the descriptions of the networks that a teacher is made of: itself, unless it says that it has several."""
    members = teacher.get("members")
    if not isinstance(members, list) or not all(isinstance(member, dict) for member in members):
        return [teacher]  # a teacher of one's own may describe itself in any way
    return members or [teacher]


def _teacher_text(teacher: Mapping[str, Any]) -> str:
    names = " + ".join(str(member.get("name", "one without a name")) for member in members_of(teacher))
    options = [name.replace("_", "-") for name in ("flip", "cells", "class_map") if teacher.get(name)]
    return names + (f" with --{' and --'.join(options)}" if options else "")


def _without_names(described: Any) -> Any:
    """Drop the names and licences of networks that have a hash of their weights.

    The path to the same weights may change, and stores made before did not name the licence.
    """
    if isinstance(described, str):
        return composed(described)
    if isinstance(described, (list, tuple)):
        return [_without_names(entry) for entry in described]
    if not isinstance(described, dict):
        return described
    dropped = ("name", "licence") if "weights" in described else ()
    return {key: _without_names(value) for key, value in described.items() if key not in dropped}


def update_failures(
    folder: str | Path, failures: Sequence[Failure], *, others: Callable[[str], bool] = lambda key: False
) -> None:
    """Replace the failures in a store's manifest, which is written only if they change.

    `others`: whether an earlier failure of this key is kept.
    """
    with locked(Path(folder)):
        manifest = read_manifest(folder)
        new = {failure.key for failure in failures}
        kept = [f for f in manifest.failures if f.key not in new and others(f.key)]
        if (all_failures := (*kept, *failures)) != manifest.failures:
            write_manifest(Path(folder), replace(manifest, failures=all_failures))


def read_manifest(folder: str | Path) -> Manifest:
    """Return the manifest of a store. Raises StoreError if there is none, or if it cannot be read or is invalid."""
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
            # Defaults for the first stores, which kept every entry, and named neither the orientation nor what an empty
            # cell is.
            even = not _drops_classes(content.get("teacher"))
            found = {"tolerance": 0.0, "orientation": Orientation.STORED, "empty_is_even": even, **content}
            hints = get_type_hints(Manifest)
            return Manifest(**{name: coerced(found[name], kind, name=name) for name, kind in hints.items()})
        except (ValueError, TypeError, KeyError) as error:
            problem = str(error)
            if not isinstance(error, StoreError):
                problem = f"an entry is missing or of the wrong type ({error})"
    raise StoreError(f"{path}: {problem}")


def no_store(folder: Path) -> str:
    """Return the message for a path without a manifest: why it is no label store, and what may have been meant."""
    if folder.is_file():
        meant = f"; did you mean {folder.parent}?" if (folder.parent / MANIFEST_FILE).exists() else ""
        return f"{folder}: is a file, and a label store is a folder{meant}"
    if file := next((parent for parent in folder.parents if parent.is_file()), None):
        return f"{folder}: {file} is a file, and a label store is a folder; name another place"
    if any(folder.glob(f"*{SHARD_SUFFIX}")):
        return f"{folder}: holds {SHARD_SUFFIX} files, but no {MANIFEST_FILE}; {_REPAIR}"
    if inner := sorted(path.parent.name for path in folder.glob(f"*/{MANIFEST_FILE}")):
        return f"{folder}: no label store (it has no {MANIFEST_FILE}), but has some in it ({listed(inner)}); name those"
    return f"{folder}: no label store (it has no {MANIFEST_FILE}); `tokenlabel annotate` makes one"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of a store atomically."""
    content = {"format_version": FORMAT_VERSION, **asdict(manifest)}
    write_atomically(folder / MANIFEST_FILE, [(json.dumps(content, indent=1) + "\n").encode()])


def _short(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, (dict, tuple, list, StrEnum)) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
