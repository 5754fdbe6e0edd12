"""The label store: a folder of immutable files that maps an image's key to its score map. NumPy only.

FOLDER/manifest.json says who made the labels and of which classes; every other file (see `shards`) was
written by one writer and holds records. Writers never touch each other's files and readers only ever see
whole ones, so any number of processes may write and read at once, and a kill costs no more than the records
of the open files. Where files hold several records of a key, that of the highest generation counts, and of those
the one in the first file by name.
"""

from __future__ import annotations

import os
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import accumulate, groupby
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from tokenlabel.core.scores import ScoreMap
from tokenlabel.labels.duplicates import find_duplicates
from tokenlabel.labels.encoding import Encoding, pack, unpack
from tokenlabel.labels.manifest import (
    MANIFEST_FILE,
    Failure,
    Manifest,
    held,
    no_store,
    read_manifest,
    update_failures,
    write_manifest,
)
from tokenlabel.labels.shards import (
    SHARD_SUFFIX,
    UNKNOWN,
    Fingerprint,
    Shard,
    StoreError,
    key_bytes,
    key_hash,
    key_text,
    open_shard,
    write_shard,
)
from tokenlabel.runtime.hub import is_hub_name, local_name
from tokenlabel.runtime.process import UNFINISHED, listed, say
from tokenlabel.runtime.remote import as_url, local_copy

__all__ = [
    "Failure",
    "LabelStore",
    "LabelStoreWriter",
    "Manifest",
    "StoreError",
    "merge_stores",
    "pack_for",
    "read_manifest",
    "remove_leftovers",
    "update_failures",
]

T = TypeVar("T")


class LabelStoreWriter:
    """Adds labels to a store, which it makes if there is none in the folder.

    A context manager; records are kept in memory until they make a file: after `max_shard_bytes`, or
    `max_shard_s` seconds after the file's first record, whichever comes first, and at the end.
    `generation`: labels of a higher one take the place of those that images had before (see `Shard`).
    Raises StoreError if the folder holds something else, or labels of another kind.

    >>> even = np.full((4, 4, 2), 0.5, np.float32)  # of both classes in each of 4 x 4 cells
    >>> score_map = tl.ScoreMap(np.array([0, 1]), np.zeros((4, 4, 2), np.uint8) + [0, 1], even, num_classes=2)
    >>> with tl.LabelStoreWriter("own labels", tl.Manifest(num_classes=2, topk=2)) as writer:
    ...     writer.add("ant/0.png", score_map)
    >>> len(tl.LabelStore("own labels"))
    1
    """

    def __init__(
        self,
        folder: str | Path,
        manifest: Manifest,
        *,
        max_shard_bytes: int = 1 << 26,
        max_shard_s: float = 300.0,
        generation: int = 0,
        again: str = "",
    ) -> None:
        self.folder = Path(folder)
        self.manifest = manifest
        self._generation, self._again = generation, again
        self._max_shard_bytes = max_shard_bytes
        self._max_shard_s = max_shard_s
        self._open: list[tuple[str, bytes]] = []
        self._images: list[Fingerprint] = []
        self._open_bytes = 0
        self._open_since_s = 0.0
        self._keys: set[str] = set()
        _make_store(self.folder, manifest)

    def add(self, key: str, score_map: ScoreMap, image: Fingerprint = UNKNOWN) -> None:
        """Add the label of an image. Raises StoreError for a map of other classes and a key given twice."""
        self.add_record(key, pack_for(self.manifest, key, score_map), image)

    def add_record(self, key: str, record: bytes, image: Fingerprint = UNKNOWN) -> None:
        """Add a label that `pack_for` has packed already; `image`: what it was made of."""
        key = os.fspath(key)
        if key in self._keys:
            raise StoreError(f"{self.folder}: {key} was given twice")
        self._keys.add(key)
        self._open_since_s = time.monotonic() if not self._open else self._open_since_s
        self._open.append((key, record))
        self._images.append(image)
        self._open_bytes += len(record)
        if (
            self._open_bytes >= self._max_shard_bytes
            or time.monotonic() - self._open_since_s >= self._max_shard_s
        ):
            self.flush()

    def flush(self) -> None:
        """Write the records that are still in memory as one file."""
        if self._open:
            write_shard(
                self.folder,
                self._open,
                images=self._images,
                generation=self._generation,
                again=self._again,
            )
        self._open, self._images, self._open_bytes = [], [], 0

    def __enter__(self) -> LabelStoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not isinstance(error, StoreError):  # a full disk would only fail again
            self.flush()


def pack_for(manifest: Manifest, key: str, score_map: ScoreMap) -> bytes:
    """Return the record of an image's score map, which must be of the manifest's classes, kind and topk."""
    topk = score_map.codes.shape[2]
    got, expected = (
        (score_map.num_classes, score_map.kind.value, f"topk {topk}"),
        (manifest.num_classes, manifest.kind.value, f"topk {manifest.topk}"),
    )
    if got[:2] != expected[:2] or topk > manifest.topk:
        raise StoreError(f"{key}: a map of (classes, kind, topk) {got} in a store of {expected}")
    try:
        score_map = replace(score_map, empty_is_even=manifest.empty_is_even)
        return pack(score_map, manifest.encoding, tolerance=manifest.tolerance)
    except StoreError as error:
        raise StoreError(f"{key}: {error}") from error


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
        rows = [
            np.arange(shard.num_records, dtype=np.uint64) | np.uint64(i << 32)
            for i, shard in enumerate(self.shards)
        ]
        places = np.concatenate([np.zeros(0, np.uint64), *rows])
        order, contested = np.argsort(hashes, kind="stable"), []
        if superseded is None:
            positions, contested = find_duplicates(self.shards, hashes[order], places[order])
            superseded = np.sort(order[positions])
        if len(superseded):
            counts = np.ones(len(hashes), np.bool_)
            counts[superseded] = False
            order = order[counts[order]]
        # How many rows to pass over before a label that is counted without them (`key_at`).
        self._passed_over = (superseded - np.arange(len(superseded))).data
        hashes, places = hashes[order], places[order]
        self._shift, self._starts = _starts_by_first_bits(hashes)
        # Memory views give Python ints, which bisect compares faster than NumPy's own search starts.
        self._hashes, self._places = hashes.data, places.data
        return contested

    def __getitem__(self, key: str) -> ScoreMap:
        record = self.packed(key)
        try:
            return unpack(
                record, num_classes=self.manifest.num_classes, empty_is_even=self.manifest.empty_is_even
            )
        except StoreError as error:
            raise StoreError(f"{self._where()}: the record of {key!r} cannot be used: {error}") from error

    def __contains__(self, key: str) -> bool:
        return self._find(key_bytes(key), Shard.holds) is not None

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
        place = bisect_right(self._first_numbers, number) - 1
        return key_text(self.shards[place].key(number - self._first_numbers[place]))

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
        if not len(hashes):
            return np.zeros(len(keys), np.bool_)
        return hashes[np.searchsorted(hashes, wanted).clip(max=len(hashes) - 1)] == wanted

    def packed(self, key: str) -> bytes:
        """Return the record of an image as it is stored, its checksum verified."""
        record = self._find(key_bytes(key), Shard.read)
        if record is None:
            raise StoreError(
                f"{self._where()}: holds no label of {key!r}; `tokenlabel annotate` with the same folders labels "
                "what is missing"
            )
        return record

    def image(self, key: str) -> Fingerprint | None:
        """Return what an image was when it was labelled, UNKNOWN if its label does not say; None if it has none."""
        return self._find(key_bytes(key), Shard.image)

    def generation(self, key: str) -> int | None:
        """Return the generation of an image's label; None if it has none."""
        return self._find(key_bytes(key), Shard.generation_of)

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

    def _find(self, name: bytes, read: Callable[[Shard, int, bytes], T | None]) -> T | None:
        """Return what `look` finds in the row of a key; None if no row is of this key."""
        wanted = key_hash(name)
        first_bits = wanted >> self._shift
        position, end = self._starts[first_bits], self._starts[first_bits + 1]
        position = bisect_left(self._hashes, wanted, position, end)
        # Several keys may have this hash; the row knows its own.
        while position < end and self._hashes[position] == wanted:
            place = self._places[position]  # the file's number, then 32 bits of the row's
            found = read(self.shards[place >> 32], place & 0xFFFFFFFF, name)
            if found is not None:
                return found
            position += 1
        return None

    def _where(self) -> str:
        return " + ".join(map(str, self.folders))


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
    return 64 - num_bits, starts.astype(np.uint32).data


def merge_stores(
    folders: Sequence[str | Path],
    output: str | Path,
    *,
    encoding: Encoding | str | None = None,
    tolerance: float | None = None,
    duplicates: str = "first",
) -> LabelStore:
    """Copy the labels of several stores into a new one with few files, each record checked; return it.

    Only records that count are copied, with their generations. `encoding`: write all records anew in this one; by
    default they stay as they are. `tolerance`: write them anew as compact records of this tolerance. `duplicates`: as
    for LabelStore. An output that is there already is continued: its labels stay where the stores have none of a higher
    generation. Raises StoreError for stores of different labels, and for an output that is the only store, lies in one,
    or has labels in another encoding, or of another tolerance, than what was asked for.

    >>> len(tl.merge_stores(["labels"], "merged"))
    8
    """
    folders = [folders] if isinstance(folders, (str, Path)) else folders
    if not folders:
        raise ValueError("folders: expected at least one store to copy")
    whole = Path(output).resolve()
    if {Path(folder).resolve() for folder in folders} == {whole}:
        raise StoreError(f"{output}: is the store that is to be copied; choose another folder")
    for folder in folders:
        if Path(folder).resolve() in whole.parents:
            raise StoreError(f"{output}: lies in the store {folder}; choose a folder outside of it")
    store = LabelStore(*folders, duplicates=duplicates)
    if tolerance is not None:
        encoding = Encoding(encoding or Encoding.COMPACT)
        if encoding is not Encoding.COMPACT:
            raise ValueError("--tolerance is of compact records; leave --encoding out")
    manifest = replace(
        store.manifest,
        encoding=encoding or store.manifest.encoding,
        tolerance=store.manifest.tolerance if tolerance is None else tolerance,
    )
    with LabelStoreWriter(output, manifest):
        present = LabelStore(output)
    if encoding is not None and present.manifest.encoding != encoding:
        raise StoreError(
            f"{output}: holds labels in encoding {present.manifest.encoding}; choose another folder"
        )
    if tolerance is not None and present.manifest.tolerance != tolerance:
        raise StoreError(
            f"{output}: holds labels of tolerance {present.manifest.tolerance:g}; choose another folder"
        )

    for generation, keys in groupby(store.keys(), key=store.generation):  # files come in this order
        assert generation is not None
        with LabelStoreWriter(output, manifest, generation=generation) as writer:
            for key in keys:
                if (there := present.generation(key)) is None or there < generation:
                    record = store.packed(key) if encoding is None else pack_for(manifest, key, store[key])
                    writer.add_record(key, record, store.image(key) or UNKNOWN)
    update_failures(output, store.failures(), others=lambda key: key not in present and key not in store)
    return LabelStore(output)


def remove_leftovers(folder: Path, *, older_than_s: float = 600.0) -> None:
    """Remove what writers that were killed left behind: unfinished files that nobody has touched for a while."""
    for path in folder.glob(UNFINISHED):
        with suppress(OSError):  # another process may have been faster, and a folder may be for reading only
            if time.time() - path.stat().st_mtime > older_than_s:
                path.unlink()


def _make_store(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of a new store; of one that is there, see that it has labels of the same kind."""
    if as_url(folder):
        raise StoreError(
            f"{as_url(folder)}: labels are written to a folder of this machine; copy it there afterwards"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise StoreError(no_store(folder)) from None
    except OSError as error:
        raise StoreError(f"{folder}: cannot be made ({error.strerror})") from error
    with held(folder):  # of two that make it at once, the second finds what the first has made
        if (folder / MANIFEST_FILE).exists():
            differences = read_manifest(folder).differences(manifest)
            if differences:
                raise StoreError(f"{folder}: holds other labels ({differences[0]}); choose another folder")
        elif any(folder.glob(f"*{SHARD_SUFFIX}")):
            raise StoreError(no_store(folder))
        elif {*folder.iterdir()} - {*folder.glob(UNFINISHED)}:
            raise StoreError(f"{folder}: is not empty and no label store; choose another folder")
        else:
            write_manifest(folder, manifest)


def _common_manifest(folders: Sequence[Path]) -> Manifest:
    manifests = [read_manifest(folder) for folder in folders]
    for folder, manifest in zip(folders[1:], manifests[1:], strict=True):
        differences = manifests[0].differences(manifest)
        if differences:
            raise StoreError(f"{folders[0]} and {folder} cannot be read as one store: {differences[0]}")
    return manifests[0]


def _shard_paths(folder: Path) -> list[Path]:
    return [path for path in folder.glob(f"*{SHARD_SUFFIX}") if not path.name.startswith(".")]
