"""Whether images are still those that were labelled: by size and time of their files, or by their bytes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import Enum
from functools import partial
from zlib import crc32

from tokenlabel.data.images import NO_TIME, ImageSource, ImageSubset
from tokenlabel.labels.shards import UNKNOWN, Fingerprint
from tokenlabel.labels.store import LabelStore
from tokenlabel.runtime.errors import ImageError
from tokenlabel.runtime.process import in_threads

# Files that have another time and the same size may have been copied or replaced: up to so many are read to know.
MAX_READ = 10_000

_NUM_THREADS = 16  # a file system on the network answers many as fast as one
_SIZE_MASK = 0xFFFFFFFF  # records have 32 bits for the size


@dataclass(frozen=True, kw_only=True)
class Replaced:
    """The indices of the images that are no longer those that were labelled."""

    indices: list[int]
    num_unsure: int
    """Images of another time and the same size, too many to read."""
    num_unknown: int
    """Images whose labels do not say what they were made of."""


class _State(Enum):
    """Whether an image is the labelled one: it is (or has no label), it is not, its bytes must say it, nobody knows."""

    SAME = 0
    REPLACED = 1
    UNSURE = 2
    UNKNOWN = 3


class FingerprintedImages(ImageSubset):
    """The images of another source, which remembers the fingerprint of each that is read until it is taken."""

    def __init__(self, source: ImageSource) -> None:
        super().__init__(source)
        self._taken: dict[str, Fingerprint] = {}

    def read(self, index: int) -> bytes:
        """Return the encoded image."""
        status = _stat(self._source, index)  # before the bytes: what replaces them meanwhile has another time
        data = self._source.read(index)
        time_ns = max(0, status[1]) if status else 0  # NO_TIME is 0 in records
        self._taken[self.keys[index]] = Fingerprint(time_ns, len(data) & _SIZE_MASK, crc32(data))
        return data

    def take(self, key: str) -> Fingerprint:
        """Return the fingerprint of an image and forget it; UNKNOWN if the image was not read."""
        return self._taken.pop(key, UNKNOWN)


def find_replaced(
    store: LabelStore, source: ImageSource, *, max_read: int | None = MAX_READ, read_all: bool = False
) -> Replaced:
    """Find the images that are others than when they were labelled, as far as the store says what they were.

    Images of another size are; those of the same size and time are not; up to `max_read` others (None: all) are read
    and compared by their bytes. `read_all`: compare every image by its bytes. What cannot be read counts as it was.
    """
    num_threads = max(_NUM_THREADS, os.cpu_count() or 1)
    states = in_threads(partial(_compare, store, source, read_all), range(len(source)), num_threads)
    of_state = {state: [index for index, of_index in enumerate(states) if of_index is state] for state in _State}
    replaced, unsure = of_state[_State.REPLACED], of_state[_State.UNSURE]
    if read_all or max_read is None or len(unsure) <= max_read:
        looks = in_threads(partial(_differs, store, source), unsure, num_threads)
        replaced += [index for index, differs in zip(unsure, looks, strict=True) if differs]
        unsure = []
    num_unknown = len(of_state[_State.UNKNOWN])
    return Replaced(indices=sorted(replaced), num_unsure=len(unsure), num_unknown=num_unknown)


def _compare(store: LabelStore, source: ImageSource, read_all: bool, index: int) -> _State:
    """Say what is known of an image without reading it."""
    known = store.image(source.keys[index])
    if known is None:
        return _State.SAME
    if known == UNKNOWN:
        return _State.UNKNOWN
    status = _stat(source, index)
    if status and status[0] & _SIZE_MASK != known.num_bytes:
        return _State.REPLACED
    is_other = status is not None and status[1] not in (NO_TIME, known.time_ns)
    return _State.UNSURE if read_all or is_other else _State.SAME


def _differs(store: LabelStore, source: ImageSource, index: int) -> bool:
    known = store.image(source.keys[index])
    assert known is not None
    try:
        return crc32(source.read(index)) != known.crc32
    except ImageError:
        return False


def _stat(source: ImageSource, index: int) -> tuple[int, int] | None:
    """Return an image's bytes and time in ns; None if it is gone, and for sources that do not know them."""
    try:
        return source.stat(index) if hasattr(source, "stat") else None  # type: ignore[attr-defined]
    except OSError:
        return None
