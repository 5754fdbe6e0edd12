"""Opening images: folders, tar files and list files, by one function."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np

from tokenlabel.data.classes import named_classes
from tokenlabel.data.folders import EXTENSIONS, UNREAD_PICTURES, holds_images_alone, in_brackets, list_images, part_of
from tokenlabel.data.hf_datasets import HFImages, as_hf_dataset
from tokenlabel.data.images import ImageFiles, ImageFolder, ImageSource, describe, has_classes, without_classes
from tokenlabel.data.remote import open_remote
from tokenlabel.data.tar_index import INDEX_NAME
from tokenlabel.data.tars import TarImages, read_index, tar_files
from tokenlabel.runtime.coercion import check_path
from tokenlabel.runtime.errors import DataError
from tokenlabel.runtime.process import listed, say
from tokenlabel.runtime.urls import as_url, expanded

LIST_SUFFIXES = (".txt", ".tsv", ".csv", ".lst")

_NUM_LOOKED_FOR = 100  # files of a list whose presence is checked at the start


def open_images(path: str | Path, *, classes: bool = True) -> ImageSource:
    """Return the images of a folder with one folder a class, of tar files, or of a list file.

    `path`: an image folder (see `ImageFolder`), or one that holds images alone, which then have no classes, a `.tar`
    file or a folder of them (see `TarImages`; the index that `tars.write_index` leaves there opens a million images in
    seconds), a list (`.txt`, `.tsv`, `.csv`, `.lst`; see `ListedImages`), or the URL of tar files, with braces for
    many: `s3://bucket/train-{000..127}.tar` (see `open_remote`), or `hf-dataset:NAME:SPLIT`, a dataset of Hugging Face
    (see `HFImages`). `classes`: False for images of any layout, whose classes, if any, are not looked at.
    Raises DataError for anything else, RemoteError for what cannot be had from a URL.

    >>> source = tl.open_images("images")
    >>> len(source), source.class_names, source.keys[0]
    (8, ['ant', 'bee'], 'ant/0.png')
    """
    check_path(path, name="path")
    if name := as_hf_dataset(path):
        return HFImages(name, classes=classes)
    if images := _packed_or_listed(path):
        return images if classes else without_classes(images)
    path = Path(path)
    return ImageFolder(path, classes=classes and not (path.is_dir() and holds_images_alone(path)))


def _packed_or_listed(path: str | Path) -> ImageSource | None:
    """Return the images of tar files or of a list; None for any other folder, and for nothing at a path."""
    if url := as_url(path):
        return open_remote(url)
    path = Path(path)
    if not path.exists() and len(names := expanded(str(path))) > 1:
        return TarImages(sorted(names))
    if path.is_file() and path.suffix.lower() == ".tar":
        return TarImages([path])
    if path.is_file() and path.suffix.lower() in LIST_SUFFIXES:
        return ListedImages(path)
    if path.is_file():
        raise DataError(
            f"{path}: expected a folder of images, a .tar file (not compressed) or a list "
            f"({', '.join(LIST_SUFFIXES)}); unpack archives of other kinds"
        )
    tars = tar_files(path) if path.is_dir() else []
    if not tars:
        return None
    if images := list_images(path).images:
        raise DataError(
            f"{path}: holds tar files ({tars[0].name}) and images ({images[0]}); which are meant? Move one kind "
            "elsewhere"
        )
    return read_index(path, tars) if (path / INDEX_NAME).exists() else TarImages(tars)


def open_aloud(path: str | Path, *, classes: bool = True) -> ImageSource:
    """Open images; print how many there are, of which classes, and what was skipped. Every command starts with it.

    Raises DataError as `open_images` does, and for a list of which no file is there.
    """
    path = as_url(path) or path
    source = open_images(path, classes=classes)
    say(describe(source, path))
    if isinstance(source, ListedImages):
        some = np.unique(np.linspace(0, len(source) - 1, _NUM_LOOKED_FOR).astype(int))
        looked_for = [source.keys[int(i)] for i in some]
        absent = [key for key in looked_for if not _is_file(source.root / key)]
        if len(absent) == len(looked_for):
            raise DataError(
                f"{path}: no such files as it lists ({listed(absent)}); paths are relative to the list's folder, "
                f"{source.root}, or absolute"
            )
        if absent:
            say(f"{path}: of {len(looked_for)} files that were looked for, {len(absent)} are absent ({listed(absent)})")
    return source


def refuse_single_class(source: ImageSource, place: str | Path) -> None:
    """Raise DataError for images to train a classifier on that are not of two classes at least."""
    ids = np.unique(source.class_ids[has_classes(source)])
    names = [source.class_names[i] for i in ids]
    if len(names) < 2:
        found = f"one class only ({names[0]})" if names else "no classes"
        raise DataError(
            f"{place}: its images have {found}, so there is nothing to learn; expected one folder a class, or a list "
            "with a class behind each path"
        )


class ListedImages(ImageFiles):
    """Images that a text file lists, one per line: a path, and its class behind a tab, comma, semicolon or space.

    Paths are relative to the list's folder (or absolute) and are the keys, without "./" and with "/" for a backslash.
    Classes are names, or numbers if all of them are; images may have none, all or some of them: a teacher can label
    them all the same. What spreadsheets write is understood: quotes, a byte-order mark, UTF-16, and a first
    line of headings, by which path and class are found among more columns. Lines that begin with # are skipped.
    Raises DataError that names the line. `remarks`: what was assumed.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        data = path.read_bytes()
        content = blake2b(data, digest_size=16).hexdigest()
        if self._recalled("list", path, lambda about: about["content"] == content):
            return
        remarks, skipped = list[str](), Counter[str]()
        entries = _distinct_entries(path, data, remarks, skipped)
        keys, named = [key for key, _ in entries], [name for _, name in entries if name is not None]
        parts = {name: part_of(name) for name in set(named)}
        if len(set(parts.values())) > 1 and all(parts.values()):
            raise DataError(f"{path}: {listed(sorted(parts))} are parts of a data set, no classes; list each apart")
        try:
            class_names, ids = named_classes(named) if named else ([], np.zeros(0, np.int64))
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
        has_class, class_ids = (np.array([name is not None for _, name in entries]), np.zeros(len(keys), np.int64))
        class_ids[has_class] = ids
        super().__init__(path.parent, keys, class_ids, class_names, skipped, has_class)
        self.remarks = remarks
        if not any("\0" in key for key in keys):  # which ends each key where they are kept
            self._remember("list", path, content=content)


def _distinct_entries(
    path: Path, data: bytes, remarks: list[str], skipped: Counter[str]
) -> list[tuple[str, str | None]]:
    """Return the key and the class of each image of a list, once. Raises DataError for none, and for two classes."""
    try:
        entries = [*_entries(path, data, remarks, skipped)]
    except csv.Error as error:
        raise DataError(f"{path}: cannot be read as a list ({error})") from error
    if not entries:
        raise DataError(f"{path}: lists no images{in_brackets(skipped)}")
    strange = next((key for key, _ in entries if "\\" in key and "/" not in key), None)
    if strange is not None and not _is_file(path.parent / strange):  # written on Windows
        entries = [(key.replace("\\", "/"), name) for key, name in entries]
    distinct = dict.fromkeys((key.removeprefix("./"), name) for key, name in entries)
    if len(distinct) < len(entries):  # a line for each object, say
        skipped["listed again"] += len(entries) - len(distinct)
    found = _in_utf8([*distinct], path, remarks)
    twice, times = Counter(key for key, _ in found).most_common(1)[0]
    if times > 1:
        classes = sorted({str(name) for key, name in found if key == twice})
        raise DataError(f"{path}: {twice} is listed with {len(classes)} classes ({listed(classes)}); an image has one")
    return found


def _entries(path: Path, data: bytes, remarks: list[str], skipped: Counter[str]) -> Iterator[tuple[str, str | None]]:
    """Yield the path and the class of each image that a list of some content names."""
    lines = _lines(data)
    rows = list(_rows(path, lines))
    columns = None
    if len(rows) > 1 and _are_headings(rows[0][1]):
        columns = _columns(path, rows, remarks)
        rows = rows[1:]
    for number, cells in rows:
        if columns is not None:
            cells = [cells[i] if i < len(cells) else "" for i in columns]
        while cells and not cells[-1]:
            cells = cells[:-1]
        if unread := [cell for cell in cells if cell.lower().endswith(UNREAD_PICTURES)]:
            skipped[Path(unread[0]).suffix.lower()] += 1
            continue
        of_images = [i for i, cell in enumerate(cells) if _is_image(cell)]
        if len(of_images) != 1 or len(cells) > 2:
            many = "; more columns need a first line that names them, such as path,label" if len(cells) > 2 else ""
            raise DataError(
                f"{path}, line {number}: expected the path of an image ({', '.join(EXTENSIONS)}), or a path and a "
                f"class (with a tab between where the class has spaces or commas{many}); got {lines[number - 1]!r}"
            )
        yield cells[of_images[0]], cells[1 - of_images[0]] or None if len(cells) == 2 else None


def _lines(data: bytes) -> list[str]:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):  # what Excel calls Unicode text
        text = data.decode("utf-16", "replace")
    else:
        text = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def _rows(path: Path, lines: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """Yield the number and the cells of each line that says something."""
    says = [i for i, line in enumerate(lines) if line.strip() and not line.startswith("#")]
    delimiter = None
    if says and (given := re.fullmatch(r"sep=(.)", lines[says[0]].strip('" '), re.IGNORECASE)):  # Excel's own
        delimiter = given[1]
        says = says[1:]
    # A first line that names a file as it stands is a path with a comma in it, not two cells.
    some = [lines[i].strip() for i in says[:2]]
    if delimiter is None and some and not (_is_image(some[0]) and _is_file(path.parent / some[0])):
        delimiter = next((mark for mark in "\t;," if any(_splits(line, mark) for line in some)), None)
    if delimiter is None:
        for i in says:
            line = lines[i].strip()
            quoted = line.startswith('"') and next(csv.reader([line], delimiter=" "))
            yield (i + 1, quoted or ([line] if _is_image(line) else [cell.strip() for cell in line.rsplit(" ", 1)]))
        return
    first = says[0] if says else 0
    reader = csv.reader(
        ("\n" if line.startswith("#") else f"{line}\n" for line in lines[first:]),
        delimiter=delimiter,
        skipinitialspace=delimiter != "\t",
        strict=True,
    )
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells) and not cells[0].startswith("#"):
                yield first + reader.line_num, [cell.strip() for cell in cells]
    except csv.Error as error:
        raise DataError(f"{path}, line {first + reader.line_num}: cannot be read as CSV ({error})") from error


def _splits(line: str, mark: str) -> bool:
    cells = next(csv.reader([line], delimiter=mark, skipinitialspace=True))
    return len(cells) > 1 and any(_is_picture(cell.strip()) for cell in cells)


def _are_headings(cells: Sequence[str]) -> bool:
    """Return True if the first row of a list names its columns."""
    if any(_is_picture(cell) for cell in cells):
        return False
    words = {re.sub(r"[^a-z]", "", cell.lower()) for cell in cells}
    return bool(words & (_PATH_HEADINGS | _CLASS_HEADINGS)) or not any("." in cell or "/" in cell for cell in cells)


def _in_utf8(entries: list[tuple[str, str | None]], path: Path, remarks: list[str]) -> list[tuple[str, str | None]]:
    """Return entries with what is not UTF-8 read as spreadsheets of Windows write it, unless a path is a file so."""

    def decoded(text: str) -> str:
        return text.encode("utf-8", "surrogateescape").decode("cp1252", "replace")

    strange = {text for entry in entries for text in entry if text and _is_escaped(text)}
    read = {text: decoded(text) for text in strange if not _is_file(path.parent / text)}
    if read:
        remarks.append(f"not UTF-8, read as Windows-1252: {listed(sorted(read.values()))}")
    return [(read.get(key, key), name and read.get(name, name)) for key, name in entries]


def _is_escaped(text: str) -> bool:
    """Return True if a text has bytes that are not UTF-8."""
    return not text.isascii() and any("\udc80" <= sign <= "\udcff" for sign in text)


def _columns(path: Path, rows: Sequence[tuple[int, list[str]]], remarks: list[str]) -> list[int]:
    """Return which columns hold path and class, by the headings in the first row; the path alone without a class."""
    (number, headings), (_, first) = rows[0], rows[1]
    words = [re.sub(r"[^a-z]", "", heading.lower()) for heading in headings]
    paths = [i for i, cell in enumerate(first) if i < len(words) and _is_picture(cell)]
    if not paths:
        raise DataError(
            f"{path}, line {number}: no column ({', '.join(headings)}) holds paths of images, which end in "
            f"{', '.join(EXTENSIONS)}; the next line is {', '.join(first)}"
        )
    if len(paths) > 1:
        paths = [i for i in paths if words[i] in _PATH_HEADINGS]
    others = [i for i, word in enumerate(words) if word and i not in paths]
    classes = others if len(others) < 2 else [i for i in others if words[i] in _CLASS_HEADINGS]
    if len(paths) != 1 or len(classes) > 1 or (others and not classes):
        raise DataError(
            f"{path}, line {number}: which columns are path and class? Call one path and one label, and no other so; "
            f"got {', '.join(headings)}"
        )
    for i in others:
        found = {part for _, cells in rows[1:] if i < len(cells) and (part := part_of(cells[i]))}
        if len(found) > 1:
            raise DataError(f"{path}: its column {headings[i]} says {listed(sorted(found))}; write a list of each part")
    chosen = [*paths, *classes]
    unread = [headings[i] for i in others if i not in chosen]
    said = f"path from column {headings[paths[0]]}" + (f", class from {headings[classes[0]]}" if classes else "")
    remarks.append(said + (f"; not read: {listed(unread)}" if unread else ""))
    return chosen


_PATH_HEADINGS = {
    "path", "file", "filename", "filepath", "image", "img", "imagepath", "imgpath", "imagefile", "imagename", "name",
}  # fmt: skip
_CLASS_HEADINGS = {
    "class", "label", "category", "target", "classid", "labelid", "classname", "labelname", "classes", "labels", "y",
}  # fmt: skip


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # its name is too long, say
        return False


def _is_image(path: str) -> bool:
    return path.lower().endswith(EXTENSIONS)


def _is_picture(path: str) -> bool:
    return path.lower().endswith(EXTENSIONS + UNREAD_PICTURES)
