"""What was found in large folders and lists, kept in the cache and taken from there while it is true."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from tokenlabel.runtime.errors import RemoteError
from tokenlabel.runtime.remote import cached_index

MANY_IMAGES = 10_000
"""Fewer are found as fast as what is kept of them."""

_TICK_S = 2.0  # a folder that was changed so shortly before may change again within its file system's clock


def recall(kind: str, place: Path) -> tuple[dict[str, NDArray[Any]], dict[str, Any]] | None:
    """Return the arrays and the rest that were kept of a place; None if nothing was."""
    try:
        with _path(kind, place, make=False).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            found = dict(arrays)
        return found, json.loads(found.pop("about").tobytes())
    except (OSError, ValueError, KeyError, EOFError, BadZipFile, RemoteError):
        return None


def remember(kind: str, place: Path, arrays: Mapping[str, NDArray[Any]], about: Mapping[str, Any]) -> None:
    """Keep what was found at a place, whole or not at all; without a cache that can be written, nothing is kept."""
    with suppress(OSError, RemoteError, UnicodeError):
        path = _path(kind, place, make=True)
        temporary = path.with_name(f".{os.urandom(4).hex()}.npz")
        try:
            text = np.frombuffer(json.dumps(about).encode(), np.uint8)
            np.savez(temporary, about=text, **arrays)  # type: ignore[arg-type]
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def are_unchanged(root: Path, folders: Mapping[str, int]) -> bool:
    """Say whether folders below a root are those that were read: nothing came, went or was renamed in them.

    `folders`: the time of each, in ns.
    """
    try:
        return all((root / name).stat().st_mtime_ns == time_ns for name, time_ns in folders.items())
    except OSError:
        return False


def are_settled(folders: Mapping[str, int], began_s: float) -> bool:
    """Say whether a change of folders after they were read, which began at `began_s`, would show in their times."""
    return max(folders.values(), default=0) < (began_s - _TICK_S) * 1e9


def _path(kind: str, place: Path, *, make: bool) -> Path:
    text = f"{kind}\n{place}\n{os.path.realpath(place)}\n{_rules()}"
    digest = blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
    return cached_index(digest, make=make)


@cache
def _rules() -> str:
    """Return what tells apart versions of the code that decides what images and classes are."""
    code = (Path(__file__).with_name(f"{name}.py").read_bytes() for name in ("folders", "images", "sources"))
    return blake2b(b"".join(code), digest_size=8).hexdigest()
