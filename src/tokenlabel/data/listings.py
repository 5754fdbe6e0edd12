"""Millions of names: compact in memory, and cached on disk for the next process."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any, overload
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from tokenlabel.runtime.cache import cached_index
from tokenlabel.runtime.errors import RemoteError
from tokenlabel.runtime.process import naming

MANY_IMAGES = 10_000
"""Below this number, listing a folder again is as fast as reading the cache."""

UNREADABLE = (OSError, ValueError, KeyError, EOFError, BadZipFile)
"""What `read_arrays`, and a lookup in what it returns, raise for a file that is damaged or of another kind."""

_DECIDING = ("classes", "folders", "images", "sources")  # modules that decide what is an image, and of which class
_TICK_S = 2.0  # file systems round times, so a later change of a folder may get the time of one so shortly before


class Strings(Sequence[str]):
    """A sequence of strings in one buffer: each takes its UTF-8 bytes and 8 more."""

    # A list of str would cost 50 bytes more for each, and every forked worker would get its own copy of it: counting
    # references writes to the pages that the strings lie in.

    def __init__(self, strings: Sequence[str]) -> None:
        encoded = [s.encode("utf-8", "surrogateescape") for s in strings]
        self._ends = np.cumsum([0, *map(len, encoded)])
        self._text = b"".join(encoded)

    @classmethod
    def unpacked(cls, text: NDArray[np.uint8]) -> Strings:
        """Return the strings of what `packed` returned, at a hundredth of the time that it takes one by one."""
        made, zeros = cls(()), np.flatnonzero(text == 0)
        made._ends = np.append(0, zeros - np.arange(len(zeros)))  # as if the zeros before each were not there
        made._text = text.tobytes().translate(None, b"\0")
        return made

    def packed(self) -> NDArray[np.uint8]:
        """Return the strings as one array of bytes, each ended by a zero, which no path holds."""
        assert b"\0" not in self._text
        return np.insert(np.frombuffer(self._text, np.uint8), self._ends[1:], 0)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __iter__(self) -> Iterator[str]:
        for start, end in pairwise(self._ends.tolist()):  # ten times as fast as by index
            yield self._text[start:end].decode("utf-8", "surrogateescape")

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        places = range(len(self))[index]  # raises IndexError, and counts from the end, as for any sequence
        if isinstance(places, range):
            return [self[i] for i in places]
        return self._text[self._ends[places] : self._ends[places + 1]].decode("utf-8", "surrogateescape")


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays to a .npz file, whole or not at all."""
    temporary = path.with_name(f".{os.urandom(4).hex()}.npz")  # np.savez appends .npz to any other name
    try:
        with naming(path):
            np.savez(temporary, **arrays)  # type: ignore[arg-type]
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Return what `write_arrays` wrote. Raises one of UNREADABLE."""
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


def recall(kind: str, path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, Any]] | None:
    """Return the arrays and the rest that were kept of a path; None if nothing was."""
    try:
        found = read_arrays(_path(kind, path, make=False))
        return found, json.loads(found.pop("about").tobytes())
    except (*UNREADABLE, RemoteError):
        return None


def remember(kind: str, path: Path, arrays: Mapping[str, NDArray[Any]], about: Mapping[str, Any]) -> None:
    """Keep what was found at a path; without a cache that can be written, nothing is kept."""
    with suppress(OSError, RemoteError, UnicodeError):
        text = np.frombuffer(json.dumps(about).encode(), np.uint8)
        write_arrays(_path(kind, path, make=True), {"about": text, **arrays})


def are_unchanged(root: Path, folders: Mapping[str, int]) -> bool:
    """Return True if folders below a root are as they were read: nothing was added, removed or renamed in them.

    `folders`: the modification time of each, in ns.
    """
    try:
        return all((root / name).stat().st_mtime_ns == time_ns for name, time_ns in folders.items())
    except OSError:
        return False


def are_settled(folders: Mapping[str, int], began_s: float) -> bool:
    """Return True if any change to folders since they were read, from `began_s` on, will show in their times."""
    return max(folders.values(), default=0) < (began_s - _TICK_S) * 1e9


def _path(kind: str, path: Path, *, make: bool) -> Path:
    # Also by the real path: a link that leads elsewhere now is another place.
    text = f"{kind}\n{path}\n{os.path.realpath(path)}\n{_rules()}"
    digest = blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
    return cached_index(digest, make=make)


@cache
def _rules() -> str:
    """Return a hash of the code that decides what images and classes are: another version lists anew."""
    code = (Path(__file__).with_name(f"{name}.py").read_bytes() for name in _DECIDING)
    return blake2b(b"".join(code), digest_size=8).hexdigest()
