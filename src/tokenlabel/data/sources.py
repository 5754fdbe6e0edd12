"""Opening images: folders, tar files and list files, by one function."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tokenlabel.data.images import (
    EXTENSIONS,
    DataError,
    ImageFiles,
    ImageFolder,
    ImageSource,
    named_classes,
)
from tokenlabel.data.tars import INDEX_NAME, TarImages, read_index

LIST_SUFFIXES = (".txt", ".tsv", ".csv", ".lst")


def open_images(path: str | Path) -> ImageSource:
    """Return the images of a folder with one folder a class, of tar files, or of a list file.

    `path`: an image folder (see `ImageFolder`), a `.tar` file or a folder of them (see `TarImages`; the index
    that `tars.write_index` leaves there opens a million images in seconds), or a list (`.txt`, `.tsv`, `.csv`,
    `.lst`; see `ListedImages`). Raises DataError for anything else.
    """
    path = Path(path)
    if path.suffix == ".tar":
        return TarImages([path])
    if path.is_dir() and (tars := sorted(path.glob("*.tar"))):
        if folder := next((sub for sub in path.iterdir() if sub.is_dir() and _holds_images(sub)), None):
            raise DataError(
                f"{path}: holds tar files ({tars[0].name}) and folders of images ({folder.name}); which are "
                "meant? Move one kind elsewhere"
            )
        return read_index(path, tars) if (path / INDEX_NAME).exists() else TarImages(tars)
    if path.suffix in LIST_SUFFIXES and path.is_file():
        return ListedImages(path)
    return ImageFolder(path)


def _holds_images(folder: Path) -> bool:
    if folder.name.startswith("."):
        return False
    return any(path.suffix.lower() in EXTENSIONS for path in folder.rglob("*"))


class ListedImages(ImageFiles):
    """Images that a text file lists, one a line: a path, and its class behind a tab, comma or space.

    Paths are relative to the list's folder (or absolute) and are the keys, as they are written. Classes are
    names, or numbers if all of them are; without any, the images have no classes, which is enough to annotate
    them by a teacher's. Lines that begin with # are passed over. Raises DataError that names the line.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        entries = list(_entries(path))
        keys = [key for key, _ in entries]
        if not entries:
            raise DataError(f"{path}: lists no images")
        if len(set(keys)) < len(keys):
            twice = Counter(keys).most_common(1)[0][0]
            raise DataError(f"{path}: {twice} is listed twice")
        named = [name for _, name in entries if name is not None]
        if named and len(named) < len(entries):
            raise DataError(f"{path}: {len(entries) - len(named):,} of {len(entries):,} images have no class")
        class_names, class_ids = named_classes(named) if named else ([], np.zeros(len(keys), np.int64))
        super().__init__(path.parent, keys, class_ids, class_names)


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
        if not key.strip().lower().endswith(EXTENSIONS):
            raise DataError(
                f"{path}, line {number}: expected the path of an image ({', '.join(EXTENSIONS)}), or a path and a "
                f"class (with a tab between where the class has spaces or commas); got {raw!r}"
            )
        yield key.strip(), name.strip()
