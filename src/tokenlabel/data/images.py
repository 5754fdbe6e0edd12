"""Sources of encoded images with keys and classes: files, folders, parts of other sources, and several as one."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from tokenlabel.data.classes import equal_looking
from tokenlabel.data.folders import (
    EXTENSIONS,
    IF_NO_CLASSES,
    NEED_CLASSES,
    Listing,
    doubtful_layout,
    in_brackets,
    list_images,
    mistaken_layout,
    skipped_text,
    without_masks,
)
from tokenlabel.data.listings import MANY_IMAGES, Strings, are_settled, are_unchanged, recall, remember
from tokenlabel.runtime.errors import DataError, ImageError
from tokenlabel.runtime.process import listed, printable
from tokenlabel.runtime.remote import RemoteFile

# The modification time that a source gives if it knows only the sizes of its images.
NO_TIME = -1

_KEPT = ("class_names", "skipped", "remarks")  # what is kept of a listing beside its arrays


@runtime_checkable
class ImageSource(Protocol):
    """Encoded images with a key and a class each, read by index.

    `keys` are unique and name the same image for ever: label stores file its scores under them. `class_ids`
    [n] index into `class_names`. A source is sent to data loader processes, so it must pickle, and cheaply.

    Optional attributes: `skipped`, the number of other files beside the images, by kind. `has_class` [n], True where
    the class is known (see `has_classes`); other images have class id 0. `groups` [n], the number of the file that
    each image lies in, and `files`, the `RemoteFile` of each group behind a URL. `streamed()` returns the same images
    for reading group by group (see `TarImages.streamed`). `stat(index)` returns the size of an image in bytes and its
    modification time in ns. `remarks` are lines to print.
    """

    @property
    def keys(self) -> Sequence[str]:
        """The name of each image."""
        ...

    @property
    def class_ids(self) -> NDArray[np.int64]:
        """The class of each image."""
        ...

    @property
    def class_names(self) -> list[str]:
        """The name of each class."""
        ...

    def read(self, index: int) -> bytes:
        """Return the encoded image."""
        ...

    def __len__(self) -> int:
        """Return how many images there are."""
        ...


def has_classes(source: ImageSource) -> NDArray[np.bool_]:
    """Return a mask [n] of the images whose class is known: all or none, unless the source has `has_class`."""
    known = getattr(source, "has_class", None)
    return np.full(len(source), bool(source.class_names)) if known is None else known


class ImageFiles:
    """Images that are files of their own. Keys are their paths, relative to `root` or absolute.

    The class id of an image without a class is 0; without any class, `class_names` is empty.
    """

    def __init__(
        self,
        root: Path,
        keys: Sequence[str],
        class_ids: NDArray[np.int64],
        class_names: Sequence[str],
        skipped: Mapping[str, int] | None = None,
        has_class: NDArray[np.bool_] | None = None,
    ) -> None:
        self.root, self.class_ids, self.class_names = root, class_ids, list(class_names)
        self.keys = keys if isinstance(keys, Strings) else Strings(keys)
        self.skipped, self.has_class, self.remarks = dict(skipped or {}), has_class, list[str]()

    def _recalled(self, kind: str, path: Path, is_true: Callable[[dict[str, Any]], bool]) -> bool:
        """Take what an earlier process found at a path if that is still true; return True if it is."""
        found = recall(kind, path)
        if found is None or not is_true(found[1]):
            return False
        arrays, about = found
        self.root, self.keys = path if path.is_dir() else path.parent, Strings.unpacked(arrays["keys"])
        self.class_ids, self.has_class = arrays["class_ids"], arrays.get("has_class")
        self.class_names, self.skipped, self.remarks = (about[name] for name in _KEPT)
        return True

    def _remember(self, kind: str, path: Path, **proof: Any) -> None:
        """Keep what was found for the next process, with the proof by which `_recalled` knows that it is still true."""
        if len(self) >= MANY_IMAGES:
            arrays = {"keys": self.keys.packed(), "class_ids": self.class_ids}
            arrays |= {} if self.has_class is None else {"has_class": self.has_class}
            remember(kind, path, arrays, {name: getattr(self, name) for name in _KEPT} | proof)

    def read(self, index: int) -> bytes:
        """Return the encoded image. Raises ImageError if the file is gone or can't be read."""
        path = self.root / self.keys[index]
        try:
            return path.read_bytes()
        except OSError as error:
            raise ImageError(f"{path}: cannot be read ({error.strerror})") from error

    def stat(self, index: int) -> tuple[int, int]:
        """Return the bytes of the image's file and when it was modified, in ns. Raises OSError if it is gone."""
        status = (self.root / self.keys[index]).stat()
        return status.st_size, status.st_mtime_ns

    def __len__(self) -> int:
        """Return how many images there are."""
        return len(self.keys)


class ImageFolder(ImageFiles):
    """A folder with one folder a class (the ordinary layout of ImageNet), images at any depth below it.

    Keys are whole paths relative to the root, with "/" and the extension, sorted by class, then by path.
    Class ids follow the sorted names of the class folders, as in torchvision. Names that begin with a dot, what file
    systems leave behind and masks beside their images are skipped, links are followed (see `list_images`).
    `classes`: False takes all images, whatever the folders in it are called, and none has a class. Raises
    DataError for a root that is missing or holds no images and, with classes, for anything but class folders with
    images in each, and for folders that clearly are something else than classes (see `mistaken_layout`).
    """

    def __init__(self, root: str | Path, *, classes: bool = True) -> None:
        root, kind = Path(root), "classes" if classes else "plain"
        if not root.is_dir():
            raise DataError(f"{root}: no such folder of images")
        if self._recalled(kind, root, lambda about: are_unchanged(root, about["folders"])):
            return
        began_s, listing = time.time(), list_images(root)
        names = sorted(listing.folders) if classes else []
        images = without_masks(listing.images, listing.skipped)
        problem = _wrong_with(root, listing, names, images) if classes else None
        if not classes and not images:
            problem = f"{root}: no images ({', '.join(EXTENSIONS)}) in it{in_brackets(listing.skipped)}"
        if problem:
            raise DataError(problem)
        if classes:
            # By class first: as whole paths, "a b/1" would come before "a/1".
            images.sort(key=lambda path: path.split("/", 1))
            sizes = Counter(path.split("/", 1)[0] for path in images)
            class_ids = np.repeat(np.arange(len(names)), [sizes[name] for name in names])
        else:
            images.sort()
            class_ids = np.zeros(len(images), np.int64)
        super().__init__(root, images, class_ids, names, listing.skipped)
        self.remarks = doubtful_layout(root, names, images) if classes else []
        if not listing.num_links and are_settled(listing.read, began_s):
            self._remember(kind, root, folders=listing.read)


def _wrong_with(root: Path, listing: Listing, names: Sequence[str], images: Sequence[str]) -> str | None:
    """Return what is wrong with a folder of class folders called `names`; None if each holds images."""
    if mistake := mistaken_layout(root, names, listing.images):
        return mistake
    if stray := sorted(path for path in listing.images if "/" not in path):
        advice = f". {IF_NO_CLASSES}" if names else f"; if {root.absolute().name} is a class, name the folder above"
        return f"{root}: {counted(stray, 'image')} outside of any class folder; {NEED_CLASSES}{advice}"
    beside = in_brackets(listing.skipped)
    if not names:
        return f"{root}: expected one folder a class with images in it, found no folder{beside}"
    if alike := equal_looking(names):
        return f"{root}: {alike}"
    filled = {path.split("/", 1)[0] for path in images}
    empty = [name for name in names if name not in filled]
    without = f"{counted(empty, 'class folder')} without images ({', '.join(EXTENSIONS)}){beside}; fill or remove them"
    return f"{root}: {without}" if empty else None


class ImageSubset:
    """Some of the images of another source, all if `indices` is None; with its classes, or with others.

    `class_ids` and `has_class` [n] are of these images, `class_names` may name classes that have no image left.
    """

    def __init__(
        self,
        source: ImageSource,
        indices: NDArray[np.integer] | None = None,
        *,
        class_ids: NDArray[np.int64] | None = None,
        class_names: Sequence[str] | None = None,
        has_class: NDArray[np.bool_] | None = None,
    ) -> None:
        self._source, self._indices = source, np.arange(len(source)) if indices is None else indices
        # Taken once: a million of them take milliseconds, and keys one by one a second.
        self.keys = source.keys if indices is None else Strings([source.keys[int(i)] for i in indices])
        self.class_ids = source.class_ids[self._indices] if class_ids is None else class_ids
        self.has_class = has_classes(source)[self._indices] if has_class is None else has_class
        self.class_names = source.class_names if class_names is None else list(class_names)

    @property
    def groups(self) -> NDArray[np.int64] | None:
        """The group (file) that each image lies in, if the other source says so."""
        groups = getattr(self._source, "groups", None)
        return None if groups is None else groups[self._indices]

    @property
    def files(self) -> Mapping[int, RemoteFile] | None:
        """The file behind a URL of each group, if they are there."""
        return getattr(self._source, "files", None)

    @property
    def skipped(self) -> Mapping[str, int]:
        """How many files the other source skipped, by kind, and how many of its images are not among these."""
        left_out = len(self._source) - len(self)
        others: Mapping[str, int] = getattr(self._source, "skipped", {})
        return {**others, "left out": others.get("left out", 0) + left_out} if left_out else others

    def streamed(self) -> ImageSource:
        """Return the same images, for reading group by group (see `TarImages.streamed`)."""
        return ImageSubset(
            streamed(self._source),
            self._indices,
            class_ids=self.class_ids,
            class_names=self.class_names,
            has_class=self.has_class,
        )

    def read(self, index: int) -> bytes:
        """Return the encoded image."""
        return self._source.read(int(self._indices[index]))

    def stat(self, index: int) -> tuple[int, int] | None:
        """Return the bytes of the image and when it was modified, in ns, if the other source knows them."""
        stat = getattr(self._source, "stat", None)
        return None if stat is None else stat(int(self._indices[index]))

    def __len__(self) -> int:
        """Return how many images there are."""
        return len(self._indices)


def without_classes(source: ImageSource, class_names: Sequence[str] = ()) -> ImageSource:
    """Return the images of a source, none of which has a class; `class_names`: which they might have."""
    ids, unknown = np.zeros(len(source), np.int64), np.zeros(len(source), bool)
    return ImageSubset(source, class_ids=ids, class_names=class_names, has_class=unknown)


def streamed(source: ImageSource) -> ImageSource:
    """Return the images of a source for reading group by group, where it can do that (see `TarImages.streamed`)."""
    return source.streamed() if hasattr(source, "streamed") else source  # type: ignore[attr-defined]


class JoinedImages:
    """The images of several sources, one after the other; the classes are those of the first, the others have none.

    Raises DataError for a key that two of them have: label stores file an image's labels under it.
    """

    def __init__(self, *sources: ImageSource) -> None:
        first, *others = sources
        self._sources = [first, *map(without_classes, others)]
        self._starts = np.cumsum([0, *map(len, sources)])
        keys = [key for source in sources for key in source.keys]
        if len(set(keys)) < len(keys):
            twice, _ = Counter(keys).most_common(1)[0]
            raise DataError(
                f"{twice} is the name of two images, one with classes and one without, which their labels could not be "
                "told apart by; move one kind into a folder of another name"
            )
        self.keys, self.class_names = Strings(keys), first.class_names
        self.class_ids = np.concatenate([source.class_ids for source in self._sources])
        self.has_class = np.concatenate([has_classes(source) for source in self._sources])
        groups: list[Any] = [getattr(source, "groups", None) for source in self._sources]
        self.groups: NDArray[np.int64] | None = None
        self.files: dict[int, RemoteFile] = {}
        if all(of_source is not None for of_source in groups):
            # The groups of each source are numbered on from those of the sources before it.
            firsts = [0, *accumulate(int(of_source.max()) + 1 for of_source in groups)]
            self.groups = np.concatenate([of_source + first for of_source, first in zip(groups, firsts, strict=False)])
            for source, first in zip(self._sources, firsts, strict=False):
                files = getattr(source, "files", None) or {}
                self.files |= {first + group: file for group, file in files.items()}

    def streamed(self) -> ImageSource:
        """Return the same images, for reading group by group (see `TarImages.streamed`)."""
        return JoinedImages(*map(streamed, self._sources))

    def read(self, index: int) -> bytes:
        """Return the encoded image."""
        source, index = self._at(index)
        return source.read(index)

    def stat(self, index: int) -> tuple[int, int] | None:
        """Return the bytes of the image and when it was modified, in ns, if its source knows them."""
        source, index = self._at(index)
        return source.stat(index) if hasattr(source, "stat") else None  # type: ignore[attr-defined]

    def _at(self, index: int) -> tuple[ImageSource, int]:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._sources[number], int(index - self._starts[number])

    def __len__(self) -> int:
        """Return how many images there are."""
        return int(self._starts[-1])


def describe(source: ImageSource, place: str | Path) -> str:
    """Return how many images of which classes a source has, and what it skipped, in one line for people."""
    names, line = source.class_names, f"{place}: {_plural(len(source), 'image')}"
    known = has_classes(source)
    if names:
        there = np.bincount(source.class_ids[known], minlength=len(names)) > 0
        line += "" if known.all() else f", {known.sum():,} of them"
        line += f" of {counted([names[i] for i in np.flatnonzero(there)], 'class', 'classes')}"
        line += "" if known.all() else f", {(~known).sum():,} without a class"
        if not there.all():
            line += f"; no image of {counted([names[i] for i in np.flatnonzero(~there)], 'class', 'classes')}"
        if not there[0] and names[0] == "0":
            line += ": numbers are class ids, from 0"
    else:
        line += " without classes"
    if skipped := getattr(source, "skipped", None):
        line += f"; {skipped_text(skipped)}"
    return printable("; ".join([line, *getattr(source, "remarks", ())]))


def counted(names: Sequence[str], noun: str, plural: str | None = None) -> str:
    """Return "5 images (a, b, c, ...)"."""
    return f"{_plural(len(names), noun, plural)} ({listed(names)})"


def _plural(count: int, noun: str, plural: str | None = None) -> str:
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"
