"""Reading a label store: a folder of immutable files that maps an image's key to its score map. NumPy only.

FOLDER/manifest.json says who made the labels and of which classes; every other file (see `shards`) was
written by one writer and holds records. Writers (`writer`) never touch each other's files and readers only ever see
whole ones, so any number of processes may write and read at once, and a kill costs no more than the records
of the open files. Where files hold several records of a key, that of the highest generation counts, and of those
the one in the first file by name.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from tokenlabel.core.scores import ScoreMap
from tokenlabel.labels.encoding import unpack
from tokenlabel.labels.manifest import Failure, Manifest, read_manifest
from tokenlabel.labels.shards import SHARD_SUFFIX, Fingerprint, Shard, key_bytes, key_hash, key_text, open_shard
from tokenlabel.runtime.cache import local_copy
from tokenlabel.runtime.errors import StoreError
from tokenlabel.runtime.hub import is_hub_name, local_name
from tokenlabel.runtime.process import listed, say


class LabelStore:
    """Reads score maps by the keys of their images, out of one folder or several as if they were one.

    `store[key]` returns a ScoreMap, checked against its checksum. Sixteen bytes a record are held in memory; files are
    mapped when they are first read. It stays as it was opened, whatever is added to its folders; so it does in
    another process, which opens the same files. `duplicates`: what is done where files hold different records of a key
    in one generation: "first" takes that of the first file by name and says so, "refuse" refuses. A folder behind a URL
    is fetched once (`local_copy`). Raises StoreError if there is no store, if folders hold labels of different kinds,
    or if a file is broken.

    >>> store = tl.LabelStore("labels")
    >>> len(store), store.manifest.num_classes
    (8, 2)
    >>> store["ant/0.png"].dense().shape
    (7, 9, 2)
    """

    def __init__(self, folder: str | Path, *more_folders: str | Path, duplicates: str = "first") -> None:
        if duplicates not in ("first", "refuse"):
            raise ValueError(f"duplicates: expected first or refuse, got {duplicates!r}")
        local = [Path(local_name(f)) if is_hub_name(f) else local_copy(f) for f in (folder, *more_folders)]
        folders = {f.resolve(): f for f in local}  # one given twice is one
        self.folders = tuple(folders.values())
        self.manifest = _common_manifest(self.folders)
        paths = [path for folder in self.folders for path in _shard_paths(folder)]
        contested = self._open(sorted(paths, key=lambda path: (path.name, path)))
        if contested and duplicates == "refuse":
            raise StoreError(
                f"{self._where()}: {_contested(contested)}; remove files, or leave out `--duplicates refuse`"
            )
        if contested:
            say(f"{self._where()}: {_contested(contested)}; that of the first file by name counts")

    def _open(self, paths: Sequence[Path], superseded: NDArray[np.int64] | None = None) -> list[str]:
        """Open files in the order in which they count; return the keys that they hold different records of.

        `superseded`: the rows that do not count, file by file, where that is known.
        """
        # Of equal generations the order is that of the paths: a record comes before those that it takes the place of.
        opened = sorted(map(open_shard, paths), key=lambda shard_and_hashes: -shard_and_hashes[0].generation)
        self.shards = [shard for shard, _ in opened]
        self._first_numbers = [0, *accumulate(shard.num_records for shard in self.shards)]
        hashes = np.concatenate([np.zeros(0, np.uint64), *(of_shard for _, of_shard in opened)])
        # One number for the file and the row in it: sorted along with the hashes, 16 bytes a record are all there is.
        rows = [
            np.arange(shard.num_records, dtype=np.uint64) | np.uint64(i << 32) for i, shard in enumerate(self.shards)
        ]
        locations = np.concatenate([np.zeros(0, np.uint64), *rows])
        # Stable, so that of equal hashes the record of the file that counts more stays in front.
        order, contested = np.argsort(hashes, kind="stable"), []
        if superseded is None:
            positions, contested = _find_duplicates(self.shards, hashes[order], locations[order])
            superseded = np.sort(order[positions])
        if len(superseded):
            counts = np.ones(len(hashes), np.bool_)
            counts[superseded] = False
            order = order[counts[order]]
        # How many rows to pass over before a label that is counted without them (`key_at`).
        self._passed_over = (superseded - np.arange(len(superseded))).data
        hashes, locations = hashes[order], locations[order]
        self._shift, self._starts = _starts_by_first_bits(hashes)
        # Memory views give Python ints, which bisect compares faster than NumPy's own search starts.
        self._hashes, self._locations = hashes.data, locations.data
        return contested

    def __getitem__(self, key: str) -> ScoreMap:
        record = self.packed(key)
        try:
            return unpack(record, num_classes=self.manifest.num_classes, empty_is_even=self.manifest.empty_is_even)
        except StoreError as error:
            raise StoreError(f"{self._where()}: the record of {key!r} cannot be used: {error}") from error

    def __contains__(self, key: str) -> bool:
        return self._find(key) is not None

    def __len__(self) -> int:
        return len(self._hashes)

    def __iter__(self) -> Iterator[str]:
        return self.keys()

    def __getstate__(self) -> dict[str, Any]:
        """Name the files: the same are opened elsewhere, even if others have been added."""
        return {
            "folders": self.folders,
            "manifest": self.manifest,
            "paths": [shard.path for shard in self.shards],
            "superseded": np.asarray(self._passed_over) + np.arange(len(self._passed_over)),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.folders, self.manifest = state["folders"], state["manifest"]
        self._open(state["paths"], state["superseded"])

    def keys(self) -> Iterator[str]:
        """Yield all keys, file by file."""
        return map(self.key_at, range(len(self)))

    def key_at(self, number: int) -> str:
        """Return the key of one of the labels, which count from 0, file by file."""
        number += bisect_right(self._passed_over, number)
        number_of_file = bisect_right(self._first_numbers, number) - 1
        return key_text(self.shards[number_of_file].key(number - self._first_numbers[number_of_file]))

    @property
    def num_superseded(self) -> int:
        """How many records count no more, since others of their keys do."""
        return len(self._passed_over)

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Return those of the given keys that have no label here."""
        keys = list(keys)
        return [key for key, held in zip(keys, self.holds(keys), strict=True) if not held]

    def holds(self, keys: Sequence[str]) -> NDArray[np.bool_]:
        """Say of which keys [N] there is a label, by their 64-bit hashes alone: a million takes seconds."""
        wanted = np.fromiter((key_hash(key_bytes(key)) for key in keys), np.uint64, len(keys))
        hashes = np.asarray(self._hashes)
        # Two keys of one hash are chance in 1e-7 stores of a million.
        if not len(hashes):
            return np.zeros(len(keys), np.bool_)
        return hashes[np.searchsorted(hashes, wanted).clip(max=len(hashes) - 1)] == wanted

    def packed(self, key: str) -> bytes:
        """Return the record of an image as it is stored, its checksum verified."""
        found = self._find(key)
        if found is None:
            raise StoreError(
                f"{self._where()}: holds no label of {key!r}; `tokenlabel annotate` with the same folders labels "
                "what is missing"
            )
        shard, row = found
        return shard.read(row)

    def image(self, key: str) -> Fingerprint | None:
        """Return what an image was when it was labelled, UNKNOWN if its label does not say; None if it has none."""
        found = self._find(key)
        return None if found is None else found[0].image(found[1])

    def generation(self, key: str) -> int | None:
        """Return the generation of an image's label; None if it has none."""
        found = self._find(key)
        return None if found is None else found[0].generation

    def answers(self, again: str) -> set[str]:
        """Return the keys that were labelled anew for one request, by labels that may be superseded."""
        shards = (shard for shard in self.shards if shard.again == again)
        return {key_text(shard.key(row)) for shard in shards for row in range(shard.num_records)}

    def failures(self) -> list[Failure]:
        """Return the images that have no label since labelling them failed, in any of the folders."""
        failures = {f.key: f for folder in self.folders for f in read_manifest(folder).failures}
        return [failure for failure in failures.values() if failure.key not in self]

    def num_bytes(self) -> int:
        """Size of all label files on the disk."""
        return sum(shard.num_bytes for shard in self.shards)

    def _find(self, key: str) -> tuple[Shard, int] | None:
        """Return the file and the row in it of a key; None if no row is of this key."""
        name = key_bytes(key)
        wanted = key_hash(name)
        first_bits = wanted >> self._shift
        position, end = self._starts[first_bits], self._starts[first_bits + 1]
        position = bisect_left(self._hashes, wanted, position, end)
        # Several keys may have this hash; the row knows its own.
        while position < end and self._hashes[position] == wanted:
            location = self._locations[position]  # the file's number, then 32 bits of the row's
            shard, row = self.shards[location >> 32], location & 0xFFFFFFFF
            if shard.key(row) == name:
                return shard, row
            position += 1
        return None

    def _where(self) -> str:
        return " + ".join(map(str, self.folders))


def _find_duplicates(
    shards: Sequence[Shard], hashes: NDArray[np.uint64], locations: NDArray[np.uint64]
) -> tuple[NDArray[np.int64], list[str]]:
    """Find the records of keys that have several, among hashes [N] in order; the first of each key counts.

    Returns the positions of those that do not count, and the keys that have different ones in one generation.
    """
    alike = hashes[1:] == hashes[:-1]
    positions = np.flatnonzero(np.append(alike, False) | np.insert(alike, 0, False))
    if not len(positions):
        return positions, []
    # The rows of these records, with their keys in one buffer; files without any are not read again.
    numbers = (locations[positions] >> np.uint64(32)).astype(np.int64)
    tables = {i: shards[i].table() for i in np.unique(numbers).tolist()}
    keys = np.concatenate([of_shard for _, of_shard in tables.values()])
    first_rows, first_keys = np.zeros((2, len(shards)), np.int64)
    first_rows[[*tables]] = [0, *accumulate(len(rows) for rows, _ in tables.values())][:-1]
    first_keys[[*tables]] = [0, *accumulate(len(of_shard) for _, of_shard in tables.values())][:-1]
    row_numbers = first_rows[numbers] + (locations[positions] & np.uint64(0xFFFFFFFF)).astype(np.int64)
    rows = np.concatenate([rows for rows, _ in tables.values()])[row_numbers]
    starts, lengths = first_keys[numbers] + rows["key_start"], rows["key_length"].astype(np.int64)

    def text(i: int) -> str:
        return key_text(keys[starts[i] : starts[i] + lengths[i]].tobytes())

    # Which of its neighbours has the same key, and not only the same hash.
    same = np.append(False, rows["hash"][1:] == rows["hash"][:-1]) & (lengths == np.roll(lengths, 1))
    for length in np.unique(lengths[same]).tolist():
        second = np.flatnonzero(same & (lengths == length))
        windows = sliding_window_view(keys, length) if length else np.zeros((len(keys) + 1, 0))
        same[second] = (windows[starts[second]] == windows[starts[second - 1]]).all(axis=1)
    # The record that counts for each, which is the last one before it that is not like its neighbour ...
    counts = np.maximum.accumulate(np.where(same, 0, np.arange(len(rows))))
    # ... but where keys share a hash, which is chance in 1e-7 stores of a million, those of one may lie apart.
    shared = ~same & np.append(False, rows["hash"][1:] == rows["hash"][:-1])
    for wanted in np.unique(rows["hash"][shared]):
        firsts: dict[str, int] = {}
        for i in np.flatnonzero(rows["hash"] == wanted).tolist():
            counts[i] = firsts.setdefault(text(i), i)
    superseded = counts != np.arange(len(rows))
    generations = np.array([shard.generation for shard in shards])[numbers]
    differ = superseded & (generations == generations[counts])
    differ &= (rows["record_length"] != rows["record_length"][counts]) | (rows["checksum"] != rows["checksum"][counts])
    return positions[superseded], sorted(map(text, np.unique(counts[differ]).tolist()))


def _contested(keys: list[str]) -> str:
    noun = "1 image has different labels" if len(keys) == 1 else f"{len(keys):,} images have different labels"
    return f"{noun} in several files ({listed(keys)})"


def _starts_by_first_bits(hashes: NDArray[np.uint64]) -> tuple[int, memoryview]:
    """Return how far to shift a hash to get its first bits, and where the hashes of each first bits begin.

    Of hashes [N] in order; about four share their first bits, so a search among them is short.
    """
    num_bits = max(1, len(hashes).bit_length() - 3)
    firsts = np.arange(1 << num_bits, dtype=np.uint64) << np.uint64(64 - num_bits)
    starts = np.append(np.searchsorted(hashes, firsts), len(hashes))
    return 64 - num_bits, starts.astype(np.uint32).data  # half of the memory: no store has 2**32 records


def _common_manifest(folders: Sequence[Path]) -> Manifest:
    manifests = [read_manifest(folder) for folder in folders]
    for folder, manifest in zip(folders[1:], manifests[1:], strict=True):
        differences = manifests[0].differences(manifest)
        if differences:
            raise StoreError(f"{folders[0]} and {folder} cannot be read as one store: {differences[0]}")
    return manifests[0]


def _shard_paths(folder: Path) -> list[Path]:
    return [path for path in folder.glob(f"*{SHARD_SUFFIX}") if not path.name.startswith(".")]
