"""Images in tar files, as WebDataset writes them, read in place; and an index, so that they open at once."""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenlabel.data.folders import part_of
from tokenlabel.data.images import describe
from tokenlabel.data.tar_index import INDEX_NAME, TarIndex, last_starts, load_index, mark_of, save_index, scan_tars
from tokenlabel.runtime.errors import DataError, ImageError
from tokenlabel.runtime.process import listed, say

_NUM_OPEN = 64  # tar files that a process keeps open


class TarImages:
    """Images in tar files, as WebDataset writes them, without unpacking.

    A key is the whole path of the image in its tar file, the same as relative to the folder that it would be
    unpacked to. The class is the number in the `.cls` file beside the image (the same path up to the first
    dot of the name, which is one sample), or, where there is none, the first folder of the path. A sample has one
    image: of x.png and x.seg.png the one whose name has no word more. Images are sorted by key. Raises
    DataError for tar files that cannot be read, that hold no images, hold a path twice or several images of one
    sample, and where only some images have a class. `index`: what is in the files, where it is known already.
    """

    def __init__(self, paths: Sequence[str | Path], index: TarIndex | None = None) -> None:
        self.paths = [Path(path) for path in paths]
        self.index = scan_tars(self.paths) if index is None else index
        self.keys, self.class_ids, self.class_names = (self.index.keys, self.index.class_ids, self.index.class_names)
        self.skipped = self.index.skipped
        self._read_ahead = False
        self._open: OrderedDict[int, _OpenFile] = OrderedDict()

    @property
    def groups(self) -> NDArray[np.int64]:
        """The number of the tar file that each image lies in."""
        return self.index.places[:, 0]

    def streamed(self) -> TarImages:
        """Return the same images, for reading tar file by tar file: the first image asked for fetches its whole file.

        The kernel then reads each file once, sequentially and ahead of use, into its page cache. Only for an order
        that stays within a few files at a time (`shard_order`).
        """
        streamed = TarImages(self.paths, self.index)
        streamed._read_ahead = True
        return streamed

    def read(self, index: int) -> bytes:
        """Return the encoded image. Raises ImageError if the tar file is gone or was cut short."""
        tar, start, length = self.index.places[index].tolist()
        try:
            file = self._opened(tar)  # held until it is read: another thread may let go of it meanwhile
            data = os.pread(file.descriptor, length, start)
        except OSError as error:
            raise ImageError(f"{self._name(tar)}: cannot be read ({error.strerror})") from error
        if len(data) != length:
            raise ImageError(f"{self._name(tar)}: {self.keys[index]} is cut short")
        return data

    def stat(self, index: int) -> tuple[int, int]:
        """Return the bytes of the image, and when its tar file was modified, in ns. Raises OSError if that is gone."""
        tar, _, length = self.index.places[index].tolist()
        return length, self.paths[tar].stat().st_mtime_ns

    def __len__(self) -> int:
        """Return how many images there are."""
        return len(self.index.keys)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}  # another process opens files of its own

    def _opened(self, tar: int) -> _OpenFile:
        """Return an open tar file; threads may get the same one, and it closes when the last lets go of it."""
        file = self._open.get(tar)
        if file is None:
            file = _OpenFile(self._path(tar), read_ahead=self._read_ahead)
            for other in [other for other, old in list(self._open.items()) if old.is_removed()]:
                self._open.pop(other, None)  # from a cache, which has given its room to others
            self._open[tar] = file
            while len(self._open) > _NUM_OPEN:
                self._open.popitem(last=False)
        return file

    def _path(self, tar: int) -> Path:
        """Return where a tar file is, now that it is to be read."""
        return self.paths[tar]

    def _name(self, tar: int) -> str:
        return str(self.paths[tar])


class _OpenFile:
    """A file that stays open as long as any thread holds this."""

    def __init__(self, path: Path, *, read_ahead: bool) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)
        if read_ahead and hasattr(os, "posix_fadvise"):  # not on macOS
            os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_WILLNEED)

    def is_removed(self) -> bool:
        """Return True if the file was deleted: its space on the disk is freed when this closes."""
        return os.fstat(self.descriptor).st_nlink == 0

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def tar_files(folder: Path) -> list[Path]:
    """Return the tar files in a folder. Raises DataError if they are of several parts of a data set."""
    tars = sorted(p for p in folder.glob("[!.]*") if p.suffix.lower() == ".tar" and p.is_file())
    refuse_parts(folder, [path.name for path in tars])
    return tars


def refuse_parts(folder: str | Path, names: Sequence[str]) -> None:
    """Raise DataError for names of tar files that are of several parts of a data set."""
    parts: dict[frozenset[str], str] = {}
    for name in names:
        words = re.findall(r"[a-z]+", name.lower().removesuffix(".tar"))
        if found := frozenset(filter(None, map(part_of, words))):  # of train-unlabelled-000.tar two, and of all alike
            parts.setdefault(found, name)
    if len(parts) > 1:
        some = listed([*parts.values()])
        raise DataError(f"{folder}: holds tar files of several parts of a data set ({some}); give each a folder")


def write_index(folder: str | Path) -> Path:
    """Look through the tar files of a folder once and write what is in them beside them; return the index's path.

    `open_images` then opens the folder by reading that file alone. Raises DataError as `TarImages` does.
    """
    folder = Path(folder)
    paths = tar_files(folder) if folder.is_dir() else []
    if not paths:
        raise DataError(f"{folder}: no tar files to index; expected a folder of .tar files")
    index, path = scan_tars(paths), folder / INDEX_NAME
    say(describe(TarImages(paths, index), folder))
    save_index(path, index, [path.name for path in paths], *_fingerprints(paths, index.places))
    return path


def read_index(folder: Path, paths: Sequence[Path]) -> TarImages:
    """Return the images of a folder's tar files by its index. Raises DataError if it is of other files."""
    path = folder / INDEX_NAME
    index, tars, sizes, marks = load_index(path)
    if tars == [path.name for path in paths]:
        found = _fingerprints(paths, index.places)
        if np.array_equal(found[0], sizes) and np.array_equal(found[1], marks):
            return TarImages(paths, index)
    raise DataError(f"{path}: the tar files beside it have changed since; write it again, or delete it")


def _fingerprints(paths: Sequence[Path], places: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the bytes of each tar file, and a checksum of the header of the last image in it."""
    sizes, marks = np.empty(len(paths), np.int64), np.empty(len(paths), np.int64)
    for i, (path, start) in enumerate(zip(paths, last_starts(places, len(paths)), strict=True)):
        sizes[i], marks[i] = path.stat().st_size, mark_of(path, start)
    return sizes, marks
