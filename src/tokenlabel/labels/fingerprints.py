"""Finds images that changed after they were labelled, by size and modification time, or by a checksum."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal
from zlib import crc32

import numpy as np

from tokenlabel.data.images import NO_TIME, ImageSource, ImageSubset
from tokenlabel.labels.shards import UNKNOWN, Fingerprint
from tokenlabel.labels.store import LabelStore
from tokenlabel.runtime.errors import ImageError
from tokenlabel.runtime.process import in_threads, listed, say

# Files with another modification time and the same size may have been copied or replaced; up to this many are read.
MAX_READ = 10_000

_MOST_SAMPLED = 200  # images that are looked at before training
_NUM_THREADS = 16  # a network file system answers 16 requests at once as fast as one
_SIZE_MASK = 0xFFFFFFFF  # records have 32 bits for the size


@dataclass(frozen=True, kw_only=True)
class Replaced:
    """The indices of the images that are not the ones that were labelled."""

    indices: list[int]
    num_unsure: int
    """Images with another modification time and the same size, too many to read."""
    num_unknown: int
    """Images whose labels have no fingerprint."""


class FingerprintedImages(ImageSubset):
    """The images of another source; keeps the fingerprint of each image that is read, until it is taken."""

    def __init__(self, source: ImageSource) -> None:
        super().__init__(source)
        self._taken: dict[str, Fingerprint] = {}

    def read(self, index: int) -> bytes:
        """Return the encoded image."""
        status = _stat(self._source, index)  # before the bytes: a file that is replaced in between has another time
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
    """Find the images that changed after they were labelled, as far as the store has their fingerprints.

    An image of another size has changed; one of the same size and modification time has not. Up to `max_read` others
    (None: all) are read and compared by checksum. `read_all`: compare all by checksum. An image that cannot be read
    counts as unchanged.
    """

    def _state_of(index: int) -> Literal["same", "replaced", "unsure", "unknown"]:
        known = store.image(source.keys[index])
        if known is None or known == UNKNOWN:
            return "same" if known is None else "unknown"
        status = _stat(source, index)
        if status and status[0] & _SIZE_MASK != known.num_bytes:
            return "replaced"
        is_other = status is not None and status[1] not in (NO_TIME, known.time_ns)
        return "unsure" if read_all or is_other else "same"

    def _differs(index: int) -> bool:
        known = store.image(source.keys[index])
        assert known is not None
        try:
            return crc32(source.read(index)) != known.crc32
        except ImageError:
            return False

    num_threads = max(_NUM_THREADS, os.cpu_count() or 1)
    states = in_threads(_state_of, range(len(source)), num_threads)
    replaced, unsure = ([i for i, state in enumerate(states) if state == wanted] for wanted in ("replaced", "unsure"))
    if read_all or max_read is None or len(unsure) <= max_read:
        is_other = in_threads(_differs, unsure, num_threads)
        replaced += [index for index, other in zip(unsure, is_other, strict=True) if other]
        unsure = []
    return Replaced(indices=sorted(replaced), num_unsure=len(unsure), num_unknown=states.count("unknown"))


def say_replaced(store: LabelStore, source: ImageSource) -> None:
    """Say how many of up to 200 images, evenly spread, are no longer those that were labelled.

    Training on maps of other pixels gives no error, only a poor model.
    """
    sampled = np.linspace(0, len(source) - 1, min(len(source), _MOST_SAMPLED)).astype(np.int64)
    sample = ImageSubset(source, sampled)
    # To read one image of a tar file behind a URL is to fetch the file: there sizes have to do.
    replaced = find_replaced(store, sample, max_read=0 if getattr(source, "files", None) else None).indices
    if len(replaced) == len(sample) > 1:
        say(
            f"all {len(sample):,} images that were looked at are others than those that were labelled "
            f"({listed([sample.keys[i] for i in replaced])}). Copies of another size or format may keep their maps; "
            "other images of the same names need labels of their own, from `tokenlabel annotate` into another folder"
        )
    elif replaced:
        say(
            f"{len(replaced):,} of {len(sample):,} images that were looked at are not those that were labelled "
            f"({listed([sample.keys[i] for i in replaced])}): their maps are of other pixels; `tokenlabel annotate "
            "--again changed` labels them anew"
        )


def _stat(source: ImageSource, index: int) -> tuple[int, int] | None:
    """Return size in bytes and modification time in ns; None if the image is gone or the source does not know them."""
    try:
        return source.stat(index) if hasattr(source, "stat") else None  # type: ignore[attr-defined]
    except OSError:
        return None
