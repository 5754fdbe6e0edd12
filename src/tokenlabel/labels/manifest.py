"""What a label store says about itself: FOLDER/manifest.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from tokenlabel.labels.encoding import Encoding
from tokenlabel.labels.shards import StoreError, write_atomically
from tokenlabel.method.scores import Kind

MANIFEST_FILE = "manifest.json"
FORMAT_VERSION = 1
MAX_MANIFEST_BYTES = 1 << 28

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Failure:
    """An image without a label, and why."""

    key: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What holds for all labels of a store.

    `class_names`: of the labels, in the order of their ids; empty where they have none. `topk`: classes that
    a cell keeps at the most. `kind`: see `scores.Kind`. `encoding`: of what is written from now on; each
    record says its own. `teacher`, `preprocessing`: what made the labels and what it saw, for people and for
    comparison. `failures`: the images that the last call could not label.
    """

    num_classes: int
    class_names: tuple[str, ...] = ()
    topk: int
    kind: Kind = Kind.PROBABILITIES
    encoding: Encoding = Encoding.COMPACT
    teacher: dict[str, Any] = field(default_factory=dict)
    preprocessing: dict[str, Any] = field(default_factory=dict)
    failures: tuple[Failure, ...] = ()

    def __post_init__(self) -> None:
        for name in ("teacher", "preprocessing"):  # as they will be read back: no tuples
            object.__setattr__(self, name, json.loads(json.dumps(getattr(self, name))))
        if self.num_classes < 2 or self.topk < 1:
            raise StoreError(
                f"labels need 2 classes and 1 kept a cell at least; got {self.num_classes} and {self.topk}"
            )
        if self.class_names and len(self.class_names) != self.num_classes:
            raise StoreError(f"{self.num_classes} classes, but {len(self.class_names)} class names")

    @property
    def saw_images(self) -> bool:
        """Whether the teacher decoded the images; masks and files of others were made without."""
        return self.teacher.get("name") not in ("masks", "published label files")

    def origin(self) -> dict[str, Any]:
        """Return what made the labels, for people and for comparison."""
        names = ("num_classes", "kind", "topk", "teacher", "preprocessing")
        return {name: _without_names(getattr(self, name)) for name in names}

    def differences(self, other: Manifest) -> list[str]:
        """Return in words what keeps labels of two manifests from being of one kind."""
        unlike = []
        for name in ("num_classes", "class_names", "kind", "topk", "teacher", "preprocessing"):
            ours, theirs = _without_names(getattr(self, name)), _without_names(getattr(other, name))
            if isinstance(ours, dict):
                keys = sorted(ours.keys() | theirs.keys())
                unlike += [(f"{name}.{key}", ours.get(key), theirs.get(key)) for key in keys]
            else:
                unlike.append((name, ours, theirs))
        return [f"{name} is {_short(a)} there, {_short(b)} here" for name, a, b in unlike if a != b]


def _without_names(described: Any) -> Any:
    """Return a description without the name of any network that is known by its weights: a path may be spelt anew."""
    if isinstance(described, list):
        return [_without_names(entry) for entry in described]
    if not isinstance(described, dict):
        return described
    return {
        key: _without_names(value)
        for key, value in described.items()
        if key != "name" or "weights" not in described
    }


def update_failures(folder: str | Path, failures: Sequence[Failure]) -> None:
    """Write to a store's manifest which images could not be labelled, in place of those it had."""
    manifest = read_manifest(folder)
    write_manifest(Path(folder), replace(manifest, failures=tuple(failures)))


def read_manifest(folder: str | Path) -> Manifest:
    """Return the manifest of a store. Raises StoreError if there is none or it cannot be understood."""
    path = Path(folder) / MANIFEST_FILE
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise StoreError(f"{path}: {path.stat().st_size} bytes are too many for a manifest")
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreError(
            f"{folder}: no label store (it has no {MANIFEST_FILE}); `tokenlabel annotate` makes one"
        ) from None
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path}: is not JSON ({error})") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise StoreError(f"{path}: format {version!r}, this version of tokenlabel reads {FORMAT_VERSION}")
    try:
        return _manifest(content)
    except StoreError as error:
        raise StoreError(f"{path}: {error}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise StoreError(f"{path}: an entry is missing or of the wrong type ({error})") from error


def _manifest(content: dict[str, Any]) -> Manifest:
    return Manifest(
        num_classes=_of_type(content["num_classes"], int),
        class_names=tuple(_of_type(name, str) for name in _of_type(content["class_names"], list)),
        topk=_of_type(content["topk"], int),
        kind=Kind(content["kind"]),
        encoding=_encoding(content["encoding"]),
        teacher=_of_type(content["teacher"], dict),
        preprocessing=_of_type(content["preprocessing"], dict),
        failures=tuple(
            Failure(_of_type(failure["key"], str), _of_type(failure["reason"], str))
            for failure in _of_type(content["failures"], list)
        ),
    )


def _encoding(name: Any) -> Encoding:
    known = [encoding.value for encoding in Encoding]
    if name not in known:
        raise StoreError(
            f"labels in encoding {name!r}, this version of tokenlabel reads {' and '.join(known)}; annotate again"
        )
    return Encoding(name)


def _of_type(value: Any, kind: type[T]) -> T:
    if type(value) is not kind:
        raise TypeError(f"{_short(value)} is not of type {kind.__name__}")
    return value


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of a store, whole or not at all."""
    content = {"format_version": FORMAT_VERSION, **asdict(manifest)}
    write_atomically(folder / MANIFEST_FILE, [(json.dumps(content, indent=1) + "\n").encode()])


def _short(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, (dict, tuple, list)) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
