"""Opening images: folders, WebDataset tar files read in place, and list files."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from tokenlabel.images import EXTENSIONS, DataError, ImageError, ImageFolder, ImageSource, Strings

LIST_SUFFIXES = (".txt", ".tsv", ".csv", ".lst")


def open_images(path: str | Path) -> ImageSource:
    """Return the images of a folder with one folder a class, of tar files, or of a list file.

    `path`: an image folder (see `ImageFolder`), a `.tar` file or a folder of them (see `TarImages`), or a
    list (`.txt`, `.tsv`, `.csv`, `.lst`; see `ListedImages`). Raises DataError for anything else.
    """
    path = Path(path)
    if path.suffix == ".tar":
        return TarImages([path])
    if path.is_dir() and (tars := sorted(path.glob("*.tar"))):
        return TarImages(tars)
    if path.suffix in LIST_SUFFIXES and path.is_file():
        return ListedImages(path)
    return ImageFolder(path)


class TarImages:
    """Images in tar files, as WebDataset writes them, without unpacking.

    A key is the whole path of the image in its tar file, the same as relative to the folder that it would be
    unpacked to. The class is the number in the `.cls` file beside the image (the same path up to the first
    dot of the name), or, where there is none, the first folder of the path. Images are sorted by key. Raises
    DataError for tar files that cannot be read, that hold no images, or hold a path twice, and where only
    some images have a class.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        images: dict[str, tuple[int, int, int]] = {}
        numbers: dict[str, int] = {}
        for place, path in enumerate(self.paths):
            for name, start, length, text in _members(path):
                if text is not None:
                    numbers[_stem(name)] = _class_number(text, where=f"{path}: {name}")
                elif name in images:
                    raise DataError(f"{path}: {name} is there twice (also in {self.paths[images[name][0]]})")
                else:
                    images[name] = (place, start, length)
        if not images:
            raise DataError(
                f"{self.paths[0].parent}: no images ({', '.join(EXTENSIONS)}) in {len(self.paths)} tar files"
            )
        keys = sorted(images)
        self._keys = Strings(keys)
        self._places = np.array([images[key] for key in keys], np.int64)  # [n, 3] tar file, first byte, bytes
        self._class_names, self._class_ids = _classes(keys, numbers, where=str(self.paths[0].parent))

    @property
    def keys(self) -> Sequence[str]:
        """The path of each image in its tar file."""
        return self._keys

    @property
    def class_ids(self) -> NDArray[np.int64]:
        """The class of each image."""
        return self._class_ids

    @property
    def class_names(self) -> list[str]:
        """The names of the first folders, or the numbers of the `.cls` files."""
        return self._class_names

    def read(self, index: int) -> bytes:
        """Return the encoded image. Raises ImageError if the tar file is gone or was cut short."""
        place, start, length = self._places[index].tolist()
        path = self.paths[place]
        try:
            with path.open("rb", buffering=0) as file:
                data = os.pread(file.fileno(), length, start)
        except OSError as error:
            raise ImageError(f"{path}: cannot be read ({error.strerror})") from error
        if len(data) != length:
            raise ImageError(f"{path}: {self._keys[index]} is cut short")
        return data

    def __len__(self) -> int:
        """Return how many images there are."""
        return len(self._keys)


class ListedImages:
    """Images that a text file lists, one a line: a path, and its class behind a tab, comma or space.

    Paths are relative to the list's folder (or absolute) and are the keys, as they are written. Classes are
    names, or numbers if all of them are; without any, the images have no classes, which is enough to annotate
    them by a teacher's. Lines that begin with # are passed over. Raises DataError that names the line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        entries = list(_entries(path))
        keys = [key for key, _ in entries]
        if not entries:
            raise DataError(f"{path}: lists no images")
        if len(set(keys)) < len(keys):
            twice = next(key for place, key in enumerate(keys) if key in set(keys[:place]))
            raise DataError(f"{path}: {twice} is listed twice")
        self._keys = Strings(keys)
        named = [name for _, name in entries if name is not None]
        if named and len(named) < len(entries):
            raise DataError(f"{path}: {len(entries) - len(named):,} of {len(entries):,} images have no class")
        self._class_names, self._class_ids = (
            _class_ids(named) if named else ([], np.zeros(len(keys), np.int64))
        )

    @property
    def keys(self) -> Sequence[str]:
        """The path of each image, as it is listed."""
        return self._keys

    @property
    def class_ids(self) -> NDArray[np.int64]:
        """The class of each image; all 0 if there are none."""
        return self._class_ids

    @property
    def class_names(self) -> list[str]:
        """The name of each class; empty if the list has none."""
        return self._class_names

    def read(self, index: int) -> bytes:
        """Return the encoded image. Raises ImageError if the file is gone or can't be read."""
        path = self.path.parent / self._keys[index]
        try:
            return path.read_bytes()
        except OSError as error:
            raise ImageError(f"{path}: cannot be read ({error.strerror})") from error

    def __len__(self) -> int:
        """Return how many images there are."""
        return len(self._keys)


def _members(path: Path) -> Iterator[tuple[str, int, int, bytes | None]]:
    """Yield the name of each image and class file of a tar file, where its bytes are, and a class file's content."""
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                name = member.name.removeprefix("./")
                if not member.isfile() or PurePosixPath(name).name.startswith("."):
                    continue
                if name.endswith(".cls"):
                    content = tar.extractfile(member)
                    yield name, 0, 0, content.read(32) if content else b""
                elif name.lower().endswith(EXTENSIONS):
                    yield name, member.offset_data, member.size, None
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"{path}: cannot be read as a tar file ({error})") from error


def _stem(name: str) -> str:
    """Return a path up to the first dot of its last part, by which WebDataset tells what belongs together."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.split(".", 1)[0]


def _class_number(text: bytes, *, where: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise DataError(f"{where}: expected the number of a class, got {text!r}") from error


def _classes(keys: list[str], numbers: dict[str, int], *, where: str) -> tuple[list[str], NDArray[np.int64]]:
    if not numbers:
        if any("/" not in key for key in keys):
            raise DataError(f"{where}: images have neither a .cls file nor a folder that names their class")
        return _sorted_classes([key.split("/", 1)[0] for key in keys])
    lacking = [key for key in keys if _stem(key) not in numbers]
    if lacking:
        raise DataError(
            f"{where}: {len(lacking):,} of {len(keys):,} images have no .cls file ({lacking[0]}, ...)"
        )
    return _class_ids([str(numbers[_stem(key)]) for key in keys])


def _class_ids(names: Sequence[str]) -> tuple[list[str], NDArray[np.int64]]:
    """Return class names and ids: numbers stand for themselves, names are sorted."""
    if all(name.isdecimal() for name in names):
        ids = np.array([int(name) for name in names], np.int64)
        return [str(number) for number in range(int(ids.max()) + 1)], ids
    return _sorted_classes(names)


def _sorted_classes(names: Sequence[str]) -> tuple[list[str], NDArray[np.int64]]:
    """Return class names and ids in the order of the names, as those of class folders are."""
    distinct = sorted(set(names))
    ids = {name: class_id for class_id, name in enumerate(distinct)}
    return distinct, np.array([ids[name] for name in names], np.int64)


def _entries(path: Path) -> Iterator[tuple[str, str | None]]:
    for number, raw in enumerate(
        path.read_text(encoding="utf-8", errors="surrogateescape").splitlines(), start=1
    ):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        if line.lower().endswith(EXTENSIONS):
            yield line, None
            continue
        separator = "\t" if "\t" in line else "," if "," in line else " "
        key, _, name = line.rpartition(separator)
        if not key.strip():
            raise DataError(f"{path}, line {number}: expected a path, or a path and a class; got {raw!r}")
        yield key.strip(), name.strip()
