"""Reading a label store: a folder of immutable files that maps an image's key to its score map. NumPy only.

FOLDER/manifest.json describes what made the labels and which classes they are about. Every other file (see `shards`) is
written once by one writer and holds records. Writers (`writer`) never touch each other's files and readers only ever
see whole ones, so any number of processes may write and read at once, and a kill loses only the records of the files
that were not finished. If several records have the same key, the one of the highest generation is used, and among
those the one in the first file by name.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenlabel.core.scores import ScoreMap
from tokenlabel.labels.encoding import unpack
from tokenlabel.labels.manifest import Failure, read_manifest
from tokenlabel.labels.shards import SHARD_SUFFIX, Fingerprint, Shard, key_bytes, key_hash, key_text, open_shard
from tokenlabel.runtime.cache import local_copy
from tokenlabel.runtime.coercion import check_path
from tokenlabel.runtime.errors import StoreError
from tokenlabel.runtime.hub import is_hub_name, local_name
from tokenlabel.runtime.process import listed, say


class LabelStore:
    """Reads score maps by the keys of their images, from one folder or from several as if they were one.

    `store[key]` returns a ScoreMap whose checksum was verified. The index takes 16 bytes of memory a record; files are
    memory-mapped when they are first read. An open store does not see what is added to its folders later; a pickled one
    opens the same files. `duplicates`: what happens if files hold different records of a key in one generation:
    "first" uses the first file by name and prints a line, "refuse" raises. A folder behind a URL is downloaded once
    (`local_copy`). Raises StoreError if there is no store, if the folders hold labels of different kinds, or if a file
    is broken.

    >>> store = tl.LabelStore("labels")
    >>> len(store), store.manifest.num_classes
    (8, 2)
    >>> store["ant/0.png"].dense().shape
    (7, 9, 2)
    """

    def __init__(self, folder: str | Path, *more_folders: str | Path, duplicates: str = "first") -> None:
        if duplicates not in ("first", "refuse"):
            raise ValueError(f"duplicates: expected first or refuse, got {duplicates!r}")
        for name in (folder, *more_folders):
            check_path(name, name="folder")
        local = map(store_folder, (folder, *more_folders))
        folders = {f.resolve(): f for f in local}  # a folder given twice is opened once
        self.folders = tuple(folders.values())
        self.manifest, *others = map(read_manifest, self.folders)
        for other_folder, other in zip(self.folders[1:], others, strict=True):
            if differences := self.manifest.differences(other):
                raise StoreError(f"{self.folders[0]} and {other_folder} cannot be read as one store: {differences[0]}")
        paths = [path for folder in self.folders for path in folder.glob(f"*{SHARD_SUFFIX}") if path.name[0] != "."]
        contested = self._open(sorted(paths, key=lambda path: (path.name, path)))
        if contested:
            noun = "1 image has" if len(contested) == 1 else f"{len(contested):,} images have"
            problem = f"{self._where()}: {noun} different labels in several files ({listed(contested)})"
            if duplicates == "refuse":
                raise StoreError(f"{problem}; remove files, or leave out `--duplicates refuse`")
            say(f"{problem}; that of the first file by name counts")

    def _open(self, paths: Sequence[Path], superseded: NDArray[np.int64] | None = None) -> list[str]:
        """Open files in the order of their names; return the keys of which they hold different records.

        `superseded`: the numbers of the records that are not used, if they are known.
        """
        # The sort is stable: files of one generation stay in the order of their names.
        opened = sorted(map(open_shard, paths), key=lambda shard_and_hashes: -shard_and_hashes[0].generation)
        self.shards = [shard for shard, _ in opened]
        self._first_numbers = [0, *accumulate(shard.num_records for shard in self.shards)]
        hashes = np.concatenate([np.zeros(0, np.uint64), *(of_shard for _, of_shard in opened)])
        # File and row in one number, sorted along with the hashes: 16 bytes a record are the whole index.
        rows = [
            np.arange(shard.num_records, dtype=np.uint64) | np.uint64(i << 32) for i, shard in enumerate(self.shards)
        ]
        locations = np.concatenate([np.zeros(0, np.uint64), *rows])
        # Stable, so that among equal hashes the record that is used comes first.
        order, contested = np.argsort(hashes, kind="stable"), []
        if superseded is None:
            positions, contested = _find_duplicates(self.shards, hashes[order], locations[order])
            superseded = np.sort(order[positions])
        if len(superseded):
            is_used = np.ones(len(hashes), np.bool_)
            is_used[superseded] = False
            order = order[is_used[order]]
        # For `key_at`: entry i is how many used records come before the i-th superseded one.
        self._before_superseded = (superseded - np.arange(len(superseded))).data
        hashes, locations = hashes[order], locations[order]
        self._shift, self._starts = _starts_by_first_bits(hashes)
        # Memory views yield Python ints, on which `bisect` is faster than a call of np.searchsorted for one number.
        self._hashes, self._locations = hashes.data, locations.data
        self._empty_is_even = bool(self.manifest.empty_is_even)  # looked up once, not for every image
        return contested

    def __getitem__(self, key: str) -> ScoreMap:
        record = self.packed(key)
        try:
            return unpack(record, num_classes=self.manifest.num_classes, empty_is_even=self._empty_is_even)
        except StoreError as error:
            raise StoreError(f"{self._where()}: the record of {key!r} cannot be used: {error}") from error

    def __contains__(self, key: str) -> bool:
        return self._find(key) is not None

    def __len__(self) -> int:
        return len(self._hashes)

    def __iter__(self) -> Iterator[str]:
        return self.keys()

    def __getstate__(self) -> dict[str, Any]:
        """Return the names of the files, so that another process opens the same ones, whatever was added since."""
        return {
            "folders": self.folders,
            "manifest": self.manifest,
            "paths": [shard.path for shard in self.shards],
            "superseded": np.asarray(self._before_superseded) + np.arange(len(self._before_superseded)),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.folders, self.manifest = state["folders"], state["manifest"]
        self._open(state["paths"], state["superseded"])

    def keys(self) -> Iterator[str]:
        """Yield all keys, file by file."""
        return map(self.key_at, range(len(self)))

    def key_at(self, number: int) -> str:
        """Return the key of the label with this number; labels are numbered from 0, file by file."""
        number += bisect_right(self._before_superseded, number)
        number_of_file = bisect_right(self._first_numbers, number) - 1
        return key_text(self.shards[number_of_file].key(number - self._first_numbers[number_of_file]))

    @property
    def num_superseded(self) -> int:
        """How many records are not used, since another one has the same key."""
        return len(self._before_superseded)

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Return the given keys that have no label here."""
        keys = list(keys)
        return [key for key, held in zip(keys, self.holds(keys), strict=True) if not held]

    def holds(self, keys: Sequence[str]) -> NDArray[np.bool_]:
        """Return which of the keys [N] have a label, by their 64-bit hashes alone: a million takes seconds."""
        wanted = np.fromiter((key_hash(key_bytes(key)) for key in keys), np.uint64, len(keys))
        hashes = np.asarray(self._hashes)
        # A store of a million has two keys of one hash with a probability of 1e-7.
        if not len(hashes):
            return np.zeros(len(keys), np.bool_)
        return hashes[np.searchsorted(hashes, wanted).clip(max=len(hashes) - 1)] == wanted

    def packed(self, key: str) -> bytes:
        """Return the record of an image as it is stored. Raises StoreError if its checksum is wrong."""
        found = self._find(key)
        if found is None:
            raise StoreError(
                f"{self._where()}: holds no label of {key!r}; `tokenlabel annotate` with the same folders labels "
                "what is missing"
            )
        shard, row = found
        return shard.read(row)

    def image(self, key: str) -> Fingerprint | None:
        """Return the fingerprint of an image when it was labelled (UNKNOWN if not stored); None if it has no label."""
        found = self._find(key)
        return None if found is None else found[0].image(found[1])

    def generation(self, key: str) -> int | None:
        """Return the generation of an image's label; None if it has none."""
        found = self._find(key)
        return None if found is None else found[0].generation

    def answers(self, again: str) -> set[str]:
        """Return the keys that were labelled again for one request, even if newer labels have replaced these."""
        shards = (shard for shard in self.shards if shard.again == again)
        return {key_text(shard.key(row)) for shard in shards for row in range(shard.num_records)}

    def failures(self) -> list[Failure]:
        """Return the images that could not be labelled and have no label in any of the folders."""
        failures = {f.key: f for folder in self.folders for f in read_manifest(folder).failures}
        return [failure for failure in failures.values() if failure.key not in self]

    def num_bytes(self) -> int:
        """Size of all label files on the disk."""
        return sum(shard.num_bytes for shard in self.shards)

    def _find(self, key: str) -> tuple[Shard, int] | None:
        """Return the file and the row that hold a key; None if there is none."""
        # Hashes are uniform, so their first bits are a good index: a binary search among about four is left.
        name = key_bytes(key)
        wanted = key_hash(name)
        first_bits = wanted >> self._shift
        position, end = self._starts[first_bits], self._starts[first_bits + 1]
        position = bisect_left(self._hashes, wanted, position, end)
        # Several keys may have this hash; the file has the key itself.
        while position < end and self._hashes[position] == wanted:
            location = self._locations[position]  # the file's number, then 32 bits of the row's
            shard, row = self.shards[location >> 32], location & 0xFFFFFFFF
            if shard.key(row) == name:
                return shard, row
            position += 1
        return None

    def _where(self) -> str:
        return " + ".join(map(str, self.folders))


def store_folder(name: str | Path) -> Path:
    """Return the folder of a store on this machine; one behind a URL is downloaded once."""
    return Path(local_name(name)) if is_hub_name(name) else local_copy(name)


def _find_duplicates(
    shards: Sequence[Shard], hashes: NDArray[np.uint64], locations: NDArray[np.uint64]
) -> tuple[NDArray[np.int64], list[str]]:
    """Find keys with several records, given all hashes [N] in order; the first record of each key is used.

    Returns the positions of the others, and the keys that have different records in one generation.
    """
    alike = hashes[1:] == hashes[:-1]
    positions = np.flatnonzero(np.append(alike, False) | np.insert(alike, 0, False))
    first_of: dict[bytes, int] = {}
    superseded, contested, last_hash = [], set[str](), -1
    # Only records that share a hash: two keys may do so by chance, so the keys themselves are compared.
    for position, hash_, location in zip(
        positions.tolist(), hashes[positions].tolist(), locations[positions].tolist(), strict=True
    ):
        if hash_ != last_hash:
            first_of, last_hash = {}, hash_
        shard, row = shards[location >> 32], location & 0xFFFFFFFF
        first = first_of.setdefault(name := shard.key(row), location)
        if first == location:
            continue
        superseded.append(position)
        used, used_row = shards[first >> 32], first & 0xFFFFFFFF
        if shard.generation == used.generation and shard.checksum(row) != used.checksum(used_row):
            contested.add(key_text(name))
    return np.array(superseded, np.int64), sorted(contested)


def _starts_by_first_bits(hashes: NDArray[np.uint64]) -> tuple[int, memoryview]:
    """Return how far to shift a hash right to get its first bits, and where in `hashes` (sorted) each value begins."""
    num_bits = max(1, len(hashes).bit_length() - 3)  # about four hashes share them, so a search is short
    firsts = np.arange(1 << num_bits, dtype=np.uint64) << np.uint64(64 - num_bits)
    starts = np.append(np.searchsorted(hashes, firsts), len(hashes))
    return 64 - num_bits, starts.astype(np.uint32).data  # half of the memory: no store has 2**32 records
