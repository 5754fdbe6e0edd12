"""Writing a label store: a new one, more labels into an existing one, several stores into one. NumPy only."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from types import TracebackType

from tokenlabel.core.scores import Kind, ScoreMap, check_map
from tokenlabel.labels.encoding import Encoding, pack
from tokenlabel.labels.manifest import MANIFEST_FILE, Manifest, no_store, read_manifest, update_failures, write_manifest
from tokenlabel.labels.shards import SHARD_SUFFIX, UNKNOWN, Fingerprint, write_shard
from tokenlabel.labels.store import LabelStore
from tokenlabel.runtime.coercion import check_path, coerced, described
from tokenlabel.runtime.errors import StoreError
from tokenlabel.runtime.process import ABANDONED_S, UNFINISHED, locked
from tokenlabel.runtime.urls import as_url


class LabelStoreWriter:
    """Adds labels to a store, which is created if the folder has none. A context manager.

    Records stay in memory until they are written as one file: after `max_shard_bytes`, or `max_shard_s` seconds after
    its first record, whichever comes first, and at the end. `generation`: labels of a higher one replace those that
    images had before (see `Shard`). An existing store keeps its manifest, and with it how records are packed. Raises
    StoreError if the folder holds something else, or labels of another kind.

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
        self.folder = coerced(folder, Path, name="folder")
        self.manifest = _manifest_in(self.folder, coerced(manifest, Manifest, name="manifest"))
        self._generation, self._again = generation, again
        self._max_shard_bytes, self._max_shard_s = max_shard_bytes, max_shard_s
        self._open: list[tuple[str, bytes]] = []
        self._images: list[Fingerprint] = []
        self._open_bytes, self._open_since_s = 0, 0.0
        self._keys: set[str] = set()
        self._has_failed = False

    def add(self, key: str, score_map: ScoreMap, image: Fingerprint = UNKNOWN) -> None:
        """Add the label of an image.

        Raises StoreError for a map of other classes, for one whose empty cells mean something else than the store's,
        and for a key given twice; ValueError for values that `ScoreMap` does not allow.
        """
        record = pack_for(self.manifest, key, score_map)
        even, its = self.manifest.empty_is_even, score_map.empty_is_even
        if its != even and score_map.kind is not Kind.LOGITS and not (score_map.probs > 0).any(axis=2).all():
            raise StoreError(
                f"{key}: empty_is_even is {its} of this map with cells that keep nothing, {even} of the store; make "
                f"the store with Manifest(empty_is_even={its}), or change the map's"
            )
        self.add_record(key, record, image)

    def add_record(self, key: str, record: bytes, image: Fingerprint = UNKNOWN) -> None:
        """Add a record made by `pack_for`. `image`: the fingerprint of the image."""
        key = os.fspath(key)
        if key in self._keys:
            raise StoreError(f"{self.folder}: {key} was given twice")
        self._keys.add(key)
        # Counted from the first record, not from the last file: a kill loses at most `max_shard_s` seconds of work.
        self._open_since_s = time.monotonic() if not self._open else self._open_since_s
        self._open.append((key, record))
        self._images.append(image)
        self._open_bytes += len(record)
        if self._open_bytes >= self._max_shard_bytes or time.monotonic() - self._open_since_s >= self._max_shard_s:
            self.flush()

    def flush(self) -> None:
        """Write the records that are in memory as one file."""
        if self._open:
            try:
                write_shard(
                    self.folder, self._open, images=self._images, generation=self._generation, again=self._again
                )
            except StoreError:  # a full disk, say: at the end it would only fail again
                self._has_failed = True
                raise
        self._open, self._images, self._open_bytes, self._has_failed = [], [], 0, False

    def __enter__(self) -> LabelStoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._has_failed:
            self.flush()


def pack_for(manifest: Manifest, key: str, score_map: ScoreMap) -> bytes:
    """Return the record of an image's score map. Raises ValueError for one that the store cannot hold."""
    if not isinstance(score_map, ScoreMap):
        raise ValueError(f"{key}: expected a ScoreMap, got {described(score_map)}")
    check_map(score_map, name=key)
    topk = score_map.codes.shape[2]
    got = (score_map.num_classes, score_map.kind.value, f"topk {topk}")
    expected = (manifest.num_classes, manifest.kind.value, f"topk {manifest.topk}")
    if got[:2] != expected[:2] or topk > manifest.topk:
        raise StoreError(f"{key}: a map of (classes, kind, topk) {got} in a store of {expected}")
    try:
        score_map = replace(score_map, empty_is_even=bool(manifest.empty_is_even))
        return pack(score_map, manifest.encoding, tolerance=manifest.tolerance)
    except StoreError as error:
        raise StoreError(f"{key}: {error}") from error


def merge_stores(
    folders: Sequence[str | Path],
    output: str | Path,
    *,
    encoding: Encoding | str | None = None,
    tolerance: float | None = None,
    duplicates: str = "first",
) -> LabelStore:
    """Copy the labels of several stores into a new one with few files, verify each record, and return the new store.

    Superseded records are left out; generations are kept. `encoding`: encode all records again in this one; by default
    they stay as they are. `tolerance`: encode them again as compact records of this tolerance. `duplicates`: as for
    LabelStore. An existing output is continued: its labels stay unless the stores have one of a higher generation.
    Raises StoreError for stores of different kinds of labels, and for an output that is the only store, lies inside
    one, or holds labels in another encoding or of another tolerance than requested.

    >>> len(tl.merge_stores(["labels"], "merged"))
    8
    """
    folders = [folders] if isinstance(folders, (str, Path)) else folders or ()
    for name in (*folders, output):
        check_path(name, name="folders and output")
    _check_output(folders, output)
    encoding = encoding and Encoding(encoding)
    if tolerance is not None:
        if encoding is Encoding.RAW:
            raise ValueError("--tolerance is of compact records; leave --encoding out")
        encoding = Encoding.COMPACT
    store = LabelStore(*folders, duplicates=duplicates)
    wanted = {"encoding": encoding, "tolerance": tolerance}
    wanted = {name: value for name, value in wanted.items() if value is not None}
    manifest = replace(store.manifest, **wanted)
    with LabelStoreWriter(output, manifest):
        present = LabelStore(output)
    for name, value in wanted.items():  # an existing output keeps its own manifest
        if (there := getattr(present.manifest, name)) != value:
            of = f"of tolerance {there:g}" if name == "tolerance" else f"in encoding {there}"
            raise StoreError(f"{output}: holds labels {of}; choose another folder")
    for generation, keys in groupby(store.keys(), key=store.generation):  # `keys` yields them in this order
        assert generation is not None
        with LabelStoreWriter(output, manifest, generation=generation) as writer:
            for key in keys:
                if (there := present.generation(key)) is None or there < generation:
                    record = store.packed(key) if encoding is None else pack_for(writer.manifest, key, store[key])
                    writer.add_record(key, record, store.image(key) or UNKNOWN)
    update_failures(output, store.failures(), others=lambda key: key not in present and key not in store)
    return LabelStore(output)


def _check_output(folders: Sequence[str | Path], output: str | Path) -> None:
    """Refuse an output that is the only store to copy, or lies inside of one."""
    if not folders:
        raise ValueError("folders: expected at least one store to copy")
    whole, stores = Path(output).resolve(), {Path(folder).resolve(): folder for folder in folders}
    problem = "is the store that is to be copied; choose another folder" if {*stores} == {whole} else ""
    for parent in whole.parents:
        if parent in stores:
            problem = f"lies in the store {stores[parent]}; choose a folder outside of it"
    if problem:
        raise StoreError(f"{output}: {problem}")


def remove_leftovers(folder: Path) -> None:
    """Remove the unfinished files of killed writers: those that were not written to for a while."""
    for path in folder.glob(UNFINISHED):
        with suppress(OSError):  # another process may have removed it, or the folder may be read-only
            if time.time() - path.stat().st_mtime > ABANDONED_S:
                path.unlink()


def _manifest_in(folder: Path, manifest: Manifest) -> Manifest:
    """Return the manifest of a store: of a new one `manifest`, which is written; of one with labels like it its own."""
    if as_url(folder):
        raise StoreError(f"{as_url(folder)}: labels are written to a folder of this machine; copy it there afterwards")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        is_file = isinstance(error, (FileExistsError, NotADirectoryError))
        raise StoreError(no_store(folder) if is_file else f"{folder}: cannot be made ({error.strerror})") from error
    with locked(folder):  # if two processes create it at once, the second one finds the manifest of the first
        if (folder / MANIFEST_FILE).exists():
            began = read_manifest(folder)
            differences, manifest = began.differences(manifest), began
            problem = f"{folder}: holds other labels ({differences[0]}); choose another folder" if differences else ""
        elif any(folder.glob(f"*{SHARD_SUFFIX}")):
            problem = no_store(folder)
        elif {*folder.iterdir()} - {*folder.glob(UNFINISHED)}:
            problem = f"{folder}: is not empty and no label store; choose another folder"
        else:
            problem = ""
            write_manifest(folder, manifest)
    if problem:
        raise StoreError(problem)
    return manifest
