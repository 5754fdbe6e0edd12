"""Where images come from: sources of encoded images with keys and classes, and the check that they decode."""

from __future__ import annotations

import io
import os
import re
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, overload, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from tokenlabel.core.geometry import turned
from tokenlabel.data.folders import (
    EXTENSIONS,
    NEED_CLASSES,
    DataError,
    Listing,
    doubtful_layout,
    list_images,
    mistaken_layout,
    passed_over_text,
    refuse_equal_looking,
    without_masks,
)
from tokenlabel.data.listings import MANY_IMAGES, are_settled, are_unchanged, recall, remember
from tokenlabel.runtime.coercion import Choice
from tokenlabel.runtime.errors import ImageError
from tokenlabel.runtime.process import listed, say
from tokenlabel.runtime.remote import RemoteFile

try:
    import simplejpeg
except ImportError:  # the extra "fast"
    simplejpeg = None

# Up to this many images `check_images` decodes every one by default (about 10 ms each for 500 x 375 JPEGs).
DECODE_ALL_UP_TO = 10_000
# The time of modification that sources give which know the sizes of their images only.
NO_TIME = -1

_ORIENTATION = 0x0112  # the tag of EXIF data
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')


# More classes than this, numbers in a list or in .cls files are something else: 21,841 are in all of ImageNet.
_MAX_CLASSES = 1_000_000


@runtime_checkable
class ImageSource(Protocol):
    """Encoded images with a key and a class each, read by index.

    `keys` are unique and name the same image for ever: label stores file its scores under them. `class_ids`
    [n] index into `class_names`. A source is sent to data loader processes, so it must pickle, and cheaply.
    `passed_over`, which a source may have, counts by kind the files beside the images that are none. `has_class` [n],
    which it may have, says of which images the class is known (see `has_classes`); the class id of others is 0.
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
    """Return of which images [n] of a source the class is known: of all or of none, where it does not say."""
    known = getattr(source, "has_class", None)
    return np.full(len(source), bool(source.class_names)) if known is None else known


class Strings(Sequence[str]):
    """A sequence of strings in one buffer, so that a million of them take their text and 8 bytes each.

    Python's own would also be copied page by page into every process that counts references to them.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        encoded = [s.encode("utf-8", "surrogateescape") for s in strings]
        self._ends = np.cumsum([0, *map(len, encoded)])
        self._text = b"".join(encoded)

    @classmethod
    def unpacked(cls, text: NDArray[np.uint8]) -> Strings:
        """Return the strings of what `packed` returned, at a hundredth of the time that it takes one by one."""
        made, zeros = cls(()), np.flatnonzero(text == 0)
        made._ends = np.append(0, zeros - np.arange(len(zeros)))
        made._text = text.tobytes().translate(None, b"\0")
        return made

    def packed(self) -> NDArray[np.uint8]:
        """Return the strings as one array of bytes, each ended by a zero, which no path holds."""
        assert b"\0" not in self._text
        return np.insert(np.frombuffer(self._text, np.uint8), self._ends[1:], 0)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __iter__(self) -> Iterator[str]:
        for start, end in pairwise(self._ends.tolist()):  # ten times as fast as by index
            yield self._text[start:end].decode("utf-8", "surrogateescape")

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} strings")
        index %= len(self)
        return self._text[self._ends[index] : self._ends[index + 1]].decode("utf-8", "surrogateescape")


class ImageFiles:
    """Images that are files of their own. Keys are their paths, relative to `root` or absolute."""

    def __init__(
        self,
        root: Path,
        keys: Sequence[str],
        class_ids: NDArray[np.int64],
        class_names: Sequence[str],
        passed_over: Mapping[str, int] | None = None,
        has_class: NDArray[np.bool_] | None = None,
    ) -> None:
        self.root, self.passed_over, self.has_class = root, dict(passed_over or {}), has_class
        self._keys = keys if isinstance(keys, Strings) else Strings(keys)
        self._class_ids, self._class_names = class_ids, list(class_names)
        self.remarks: list[str] = []

    def _recalled(self, kind: str, place: Path, is_true: Callable[[dict[str, Any]], bool]) -> bool:
        """Take what an earlier process found at a place, if it is true by what was kept with it; say whether."""
        found = recall(kind, place)
        if found is None or not is_true(found[1]):
            return False
        arrays, about = found
        ImageFiles.__init__(
            self,
            place if place.is_dir() else place.parent,
            Strings.unpacked(arrays["keys"]),
            arrays["class_ids"],
            about["class_names"],
            about["passed_over"],
            arrays.get("has_class"),
        )
        self.remarks = about["remarks"]
        return True

    def _remember(self, kind: str, place: Path, **proof: Any) -> None:
        """Keep what was found, with what says whether it is still true, for the next process."""
        if len(self) >= MANY_IMAGES:
            arrays = {"keys": self._keys.packed(), "class_ids": self._class_ids}
            arrays |= {} if self.has_class is None else {"has_class": self.has_class}
            about = {name: getattr(self, name) for name in ("class_names", "passed_over", "remarks")}
            remember(kind, place, arrays, about | proof)

    def _remember_folders(self, kind: str, listing: Listing, began_s: float) -> None:
        if not listing.num_links and are_settled(listing.read, began_s):
            self._remember(kind, self.root, folders=listing.read)

    @property
    def keys(self) -> Sequence[str]:
        """The path of each image."""
        return self._keys

    @property
    def class_ids(self) -> NDArray[np.int64]:
        """The class of each image; 0 if it has none."""
        return self._class_ids

    @property
    def class_names(self) -> list[str]:
        """The name of each class; empty if there are none."""
        return self._class_names

    def read(self, index: int) -> bytes:
        """Return the encoded image. Raises ImageError if the file is gone or can't be read."""
        path = self.root / self._keys[index]
        try:
            return path.read_bytes()
        except OSError as error:
            raise ImageError(f"{path}: cannot be read ({error.strerror})") from error

    def stat(self, index: int) -> tuple[int, int]:
        """Return the bytes of the image's file and when it was modified, in ns. Raises OSError if it is gone."""
        status = (self.root / self._keys[index]).stat()
        return status.st_size, status.st_mtime_ns

    def __len__(self) -> int:
        """Return how many images there are."""
        return len(self._keys)


class ImageFolder(ImageFiles):
    """A folder with one folder a class (the ordinary layout of ImageNet), images at any depth below it.

    Keys are whole paths relative to the root, with "/" and the extension, sorted by class, then by path.
    Class ids follow the sorted names of the class folders, as in torchvision. Names that begin with a dot, what file
    systems leave behind and masks beside their images are passed over, links are followed (see `list_images`). Raises
    DataError for a root that is missing, empty or has no class folders, for class folders without images, for images
    that lie in no class folder, and for folders that clearly are something else than classes (see `mistaken_layout`).
    """

    def __init__(self, root: str | Path) -> None:
        root = Path(root)
        if not root.is_dir():
            raise DataError(f"{root}: no such folder of images")
        if self._recalled("classes", root, lambda about: are_unchanged(root, about["folders"])):
            return
        began_s, listing = time.time(), list_images(root)
        class_names = sorted(listing.folders)
        if mistake := mistaken_layout(root, class_names, listing.images):
            raise DataError(mistake)
        stray = sorted(path for path in listing.images if "/" not in path)
        if stray:
            above = "" if class_names else f"; if {root.absolute().name} is a class, name the folder above"
            raise DataError(
                f"{root}: {_count(stray, 'image')} outside of any class folder; {NEED_CLASSES}{above}"
            )
        beside = f" ({passed_over_text(listing.passed_over)})" if listing.passed_over else ""
        if not class_names:
            raise DataError(f"{root}: expected one folder a class with images in it, found no folder{beside}")
        refuse_equal_looking(class_names, root)
        images, num_masks = without_masks(listing.images)
        if num_masks:
            listing.passed_over["named as masks or thumbnails of images beside them"] = num_masks
        of_class: dict[str, list[str]] = {name: [] for name in class_names}
        for path in images:
            of_class[path.split("/", 1)[0]].append(path)
        empty = [name for name, paths in of_class.items() if not paths]
        if empty:
            raise DataError(
                f"{root}: {_count(empty, 'class folder')} without images "
                f"({', '.join(EXTENSIONS)}){beside}; fill or remove them"
            )
        class_ids = np.repeat(np.arange(len(of_class)), [len(paths) for paths in of_class.values()])
        keys = [path for paths in of_class.values() for path in sorted(paths)]
        super().__init__(root, keys, class_ids, class_names, listing.passed_over)
        self.remarks = doubtful_layout(root, class_names, keys)
        self._remember_folders("classes", listing, began_s)


class PlainImages(ImageFiles):
    """All images of a folder, at any depth and whatever the folders in it are called: none has a class.

    Keys are paths relative to the root, sorted, the same as those of class folders. Raises DataError for a root that is
    missing or empty.
    """

    def __init__(self, root: str | Path) -> None:
        root = Path(root)
        if not root.is_dir():
            raise DataError(f"{root}: no such folder of images")
        if self._recalled("plain", root, lambda about: are_unchanged(root, about["folders"])):
            return
        began_s, listing = time.time(), list_images(root)
        images, num_masks = without_masks(sorted(listing.images))
        if num_masks:
            listing.passed_over["named as masks or thumbnails of images beside them"] = num_masks
        if not images:
            beside = f" ({passed_over_text(listing.passed_over)})" if listing.passed_over else ""
            raise DataError(f"{root}: no images ({', '.join(EXTENSIONS)}) in it{beside}")
        super().__init__(root, images, np.zeros(len(images), np.int64), [], listing.passed_over)
        self._remember_folders("plain", listing, began_s)


class ImageSubset:
    """Some of the images of another source, with its classes."""

    def __init__(self, source: ImageSource, indices: NDArray[np.integer]) -> None:
        self._source, self._indices = source, indices
        self._class_ids = source.class_ids[indices]  # once: a million of them take milliseconds
        self.has_class = has_classes(source)[indices]
        self._keys = Strings([source.keys[int(i)] for i in indices])

    @property
    def keys(self) -> Sequence[str]:
        """The keys of these images in the other source."""
        return self._keys

    @property
    def class_ids(self) -> NDArray[np.int64]:
        """The class of each image."""
        return self._class_ids

    @property
    def class_names(self) -> list[str]:
        """The names of the other source's classes, also of those that have no image left."""
        return self._source.class_names

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
    def passed_over(self) -> Mapping[str, int]:
        """How many files the other source passed over, by kind, and how many of its images are not among these."""
        left_out = len(self._source) - len(self._indices)
        others: Mapping[str, int] = getattr(self._source, "passed_over", {})
        return {**others, "left out": others.get("left out", 0) + left_out} if left_out else others

    def streamed(self) -> ImageSource:
        """Return the same images, for reading group by group (see `TarImages.streamed`)."""
        streamed = getattr(self._source, "streamed", None)
        return self if streamed is None else ImageSubset(streamed(), self._indices)

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


class WithoutClasses(ImageSubset):
    """The images of another source, none of which has a class; `class_names`: which it might have."""

    def __init__(self, source: ImageSource, class_names: Sequence[str] = ()) -> None:
        super().__init__(source, np.arange(len(source)))
        self._names = list(class_names)
        self._class_ids, self.has_class = np.zeros(len(source), np.int64), np.zeros(len(source), bool)

    @property
    def class_names(self) -> list[str]:
        """The classes that the images might have."""
        return self._names

    def streamed(self) -> ImageSource:
        """Return the same images, for reading group by group (see `TarImages.streamed`)."""
        return WithoutClasses(super().streamed(), self._names)


class JoinedImages:
    """The images of several sources, one after the other; the classes are those of the first, the others have none.

    Raises DataError for a key that two of them have: label stores file an image's labels under it.
    """

    def __init__(self, *sources: ImageSource) -> None:
        first, *others = sources
        self._sources = [first, *(WithoutClasses(other) for other in others)]
        self._starts = np.cumsum([0, *map(len, sources)])
        keys = [key for source in sources for key in source.keys]
        if len(set(keys)) < len(keys):
            twice, _ = Counter(keys).most_common(1)[0]
            raise DataError(
                f"{twice} is the name of two images, one with classes and one without, which their labels could not be "
                "told apart by; move one kind into a folder of another name"
            )
        self._keys, self._class_names = Strings(keys), first.class_names
        self._class_ids = np.concatenate([source.class_ids for source in self._sources])
        self.has_class = np.concatenate([has_classes(source) for source in self._sources])

    @property
    def keys(self) -> Sequence[str]:
        """The keys of all images."""
        return self._keys

    @property
    def class_ids(self) -> NDArray[np.int64]:
        """The class of each image; 0 of those without."""
        return self._class_ids

    @property
    def class_names(self) -> list[str]:
        """The names of the first source's classes."""
        return self._class_names

    @property
    def groups(self) -> NDArray[np.int64] | None:
        """The group (file) that each image lies in, if all sources say so."""
        found, first = list[NDArray[np.int64]](), 0
        for source in self._sources:
            groups = getattr(source, "groups", None)
            if groups is None:
                return None
            found.append(groups + first)
            first += int(groups.max()) + 1
        return np.concatenate(found)

    @property
    def files(self) -> Mapping[int, RemoteFile]:
        """The file behind a URL of each group that is one."""
        found, first = dict[int, RemoteFile](), 0
        for source in self._sources:
            if (groups := getattr(source, "groups", None)) is None:
                return {}
            files: Mapping[int, RemoteFile] = getattr(source, "files", None) or {}
            found |= {first + group: file for group, file in files.items()}
            first += int(groups.max()) + 1
        return found

    def streamed(self) -> ImageSource:
        """Return the same images, for reading group by group (see `TarImages.streamed`)."""
        return JoinedImages(*(s.streamed() if hasattr(s, "streamed") else s for s in self._sources))

    def read(self, index: int) -> bytes:
        """Return the encoded image."""
        place = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._sources[place].read(int(index - self._starts[place]))

    def __len__(self) -> int:
        """Return how many images there are."""
        return int(self._starts[-1])


class ImageCheck(Choice):
    """How closely to look at images before training.

    DECODE decodes every image: certain, and costs what an epoch's decoding costs. ENDS reads every image and
    looks at its header and last bytes, which finds what downloads and full disks leave behind (empty, cut
    off, not an image) at about the cost of reading the files once. NONE trusts them, for instance because the
    teacher has already decoded every image that has a label. AUTO decodes sources of up to `DECODE_ALL_UP_TO`
    images and looks at the ENDS of larger ones.

    >>> [str(check) for check in tl.ImageCheck]
    ['auto', 'decode', 'ends', 'none']
    """

    AUTO = "auto"
    DECODE = "decode"
    ENDS = "ends"
    NONE = "none"


def decode_image(data: bytes, name: str) -> Image.Image:
    """Decode to RGB; `name` is what the ImageError calls an image that does not decode.

    Transparency is dropped, 16-bit greys keep their upper byte, and of an animation the first picture counts.
    Pixels lie upright, as people see them: the orientation tag (EXIF) is applied, other than in torchvision and timm.
    """
    try:
        image = Image.open(io.BytesIO(data))
        rgb = _as_rgb(image)
        orientation = orientation_of(data, image)
        if orientation == 1:
            return rgb
        return Image.fromarray(np.ascontiguousarray(turned(np.asarray(rgb), orientation)))
    except UnidentifiedImageError as error:
        raise ImageError(f"{name}: does not decode as an image (it is of no known format)") from error
    except Exception as error:  # Pillow's decoders raise whatever their parsing runs into
        raise ImageError(f"{name}: does not decode as an image ({error or type(error).__name__})") from error


def decode_pixels(data: bytes, name: str) -> NDArray[np.uint8]:
    """Decode to RGB pixels [height, width, 3], as `decode_image` does.

    JPEGs take simplejpeg where it is installed: the same pixels, without Pillow's copy of them.
    """
    if simplejpeg is not None and data.startswith(b"\xff\xd8\xff"):
        try:
            return np.ascontiguousarray(turned(simplejpeg.decode_jpeg(data), orientation_of(data)))
        except ValueError:
            pass  # four inks, say, or damage: what can be done is for Pillow to decide
    return np.array(decode_image(data, name))


def orientation_of(data: bytes, image: Image.Image | None = None) -> int:
    """Return the orientation tag of an encoded image, 1 to 8: see `geometry.turned`; 1 where it has none.

    `image`: what Pillow opened of it, where it has; a PNG may name its orientation behind its pixels.
    """
    if data.startswith(b"\xff\xd8\xff"):
        return _orientation_of_jpeg(data)
    if data.startswith(b"\x89PNG") and not any(word in data for word in (b"eXIf", b"exif", b"xmp")):
        return 1  # without a word of it Pillow would decode all pixels to look behind them
    try:
        image = image or Image.open(io.BytesIO(data))
        # Pillow turns TIFFs itself, when it decodes them.
        tag = 1 if image.format == "TIFF" else image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a broken tag is none
        return 1
    return tag if tag in range(1, 9) else 1


def check_images(
    source: ImageSource,
    *,
    skip_broken: bool = False,
    check: ImageCheck | str = ImageCheck.AUTO,
    option: str | None = "skip_broken=True",
) -> ImageSource:
    """Return the source if all its images are sound, or those that are if `skip_broken`.

    `option`: how to skip broken images, where the error is read. Raises DataError that counts and names broken images.

    >>> len(tl.check_images(tl.open_images("images"), check="decode"))
    8
    """
    return leave_out(source, find_broken(source, ImageCheck(check)), skip_broken=skip_broken, option=option)


def find_broken(
    source: ImageSource, check: ImageCheck = ImageCheck.AUTO, among: Sequence[int] | None = None
) -> list[int]:
    """Return the indices of the images that do not decode, of all or of those `among` them.

    All cores take part, tar file by tar file.
    """
    indices = np.arange(len(source)) if among is None else np.array(among, np.int64)
    if check is ImageCheck.AUTO:
        check = ImageCheck.DECODE if len(indices) <= DECODE_ALL_UP_TO else ImageCheck.ENDS
    if check is ImageCheck.NONE:
        return []
    look = _decodes if check is ImageCheck.DECODE else _has_sound_ends
    groups = getattr(source, "groups", None)
    order = indices if groups is None else indices[np.argsort(groups[indices], kind="stable")]
    stretches = [order[i : i + 256].tolist() for i in range(0, len(order), 256)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda stretch: [i for i in stretch if not look(source, i)], stretches)
        return sorted(index for of_stretch in found for index in of_stretch)


def leave_out(
    source: ImageSource, broken: Sequence[int], *, skip_broken: bool, option: str | None = None
) -> ImageSource:
    """Return the images that are not broken. Raises DataError for any that are, unless `skip_broken`, and for all."""
    if not broken:
        return source
    names = [source.keys[index] for index in broken]
    if not skip_broken or len(broken) == len(source):
        advice = f", or leave them out with {option}" if option and not skip_broken else ""
        raise DataError(
            f"{_count(names, 'image')} that cannot be decoded, of {len(source):,}; repair or remove them{advice}"
        )
    rest = ImageSubset(source, np.delete(np.arange(len(source)), broken))
    before, after = (images.class_ids[has_classes(images)] for images in (source, rest))
    gone = np.setdiff1d(before, after)
    more = _count([source.class_names[i] for i in gone], "class", "classes") if len(gone) else ""
    more = more and f"; none is left of {more}"
    say(f"{len(names):,} of {len(source):,} images do not decode, and are left out: {listed(names)}{more}")
    return rest


def describe(source: ImageSource, place: str | Path) -> str:
    """Return how many images of which classes a source has, and what it passed over, in one line for people."""
    names, line = source.class_names, f"{place}: {_plural(len(source), 'image')}"
    known = has_classes(source)
    if names:
        there = np.bincount(source.class_ids[known], minlength=len(names)) > 0
        line += "" if known.all() else f", {known.sum():,} of them"
        line += f" of {_count([names[i] for i in np.flatnonzero(there)], 'class', 'classes')}"
        line += "" if known.all() else f", {(~known).sum():,} without a class"
        if not there.all():
            line += f"; no image of {_count([names[i] for i in np.flatnonzero(~there)], 'class', 'classes')}"
        if not there[0] and names[0] == "0":
            line += ": numbers are class ids, from 0"
    else:
        line += " without classes"
    if passed_over := getattr(source, "passed_over", None):
        line += f"; {passed_over_text(passed_over)}"
    line = "; ".join([line, *getattr(source, "remarks", ())])
    return re.sub(r"[\x00-\x1f]", "?", line).encode("utf-8", "backslashreplace").decode()


def named_classes(names: Sequence[str]) -> tuple[list[str], NDArray[np.int64]]:
    """Return class names and ids: numbers stand for themselves (also 3.0, as pandas writes them), names are sorted.

    Raises DataError for numbers below 0 or far too large, and for numbers with missing values among them.
    """
    numbers = {name for name in set(names) if re.fullmatch(r"[+-]?\d+(\.0*)?", name)}
    others = set(names) - numbers
    if not others:
        of_name = {name: int(name.split(".")[0]) for name in numbers}
        wrong = [name for name, number in of_name.items() if not 0 <= number < _MAX_CLASSES]
        if wrong:
            raise DataError(
                f"{wrong[0]} is no class: numbers of classes are ids, 0 and up, below {_MAX_CLASSES:,}"
            )
        ids = np.array([of_name[name] for name in names], np.int64)
        return [str(number) for number in range(int(ids.max()) + 1)], ids
    if numbers and (
        missing := [name for name in others if name.lower() in ("nan", "none", "null", "na", "n/a")]
    ):
        raise DataError(f"{missing[0]} is no class among numbers such as {min(numbers)}; remove these images")
    return sorted_classes(names)


def sorted_classes(names: Sequence[str]) -> tuple[list[str], NDArray[np.int64]]:
    """Return class names and ids in the order of the names, as those of class folders are."""
    distinct = sorted(set(names))
    refuse_equal_looking(distinct, "the images")
    ids = {name: class_id for class_id, name in enumerate(distinct)}
    return distinct, np.array([ids[name] for name in names], np.int64)


def _decodes(source: ImageSource, index: int) -> bool:
    try:
        decode_image(source.read(index), source.keys[index])
    except ImageError:
        return False
    return True


def _has_sound_ends(source: ImageSource, index: int) -> bool:
    """Say whether header and end look right; decode where an end does not say by itself that it is one."""
    try:
        data = source.read(index)
    except ImageError:
        return False
    is_png = data.startswith(b"\x89PNG\r\n\x1a\n") and data.endswith(b"IEND\xaeB`\x82")
    is_jpeg = data.startswith(b"\xff\xd8\xff") and data.endswith(b"\xff\xd9")
    return is_png or is_jpeg or _decodes(source, index)


def _orientation_of_jpeg(data: bytes) -> int:
    """Return the orientation that a JPEG's EXIF data name, or else its XMP data; in microseconds, from its head."""
    place, of_xmp = 2, 1
    while data[place : place + 1] == b"\xff" and place + 4 <= len(data):
        marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4])
        if marker == 0xFF:  # a byte of filling
            place += 1
            continue
        if marker == 0xDA:  # the pixels
            break
        if marker == 0xE1:
            segment = data[place + 4 : place + 2 + length]
            if segment.startswith(b"Exif\0\0") and (tag := _orientation_of_exif(segment[6:])) is not None:
                return tag if tag in range(1, 9) else 1
            if found := _XMP_ORIENTATION.search(segment):
                of_xmp = int(found[1])
        place += 2 + length
    return of_xmp


def _orientation_of_exif(tiff: bytes) -> int | None:
    """Return the orientation that EXIF data name, whatever it is; None if they name none or are broken."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return None
    try:
        (start,) = struct.unpack_from(f"{order}I", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(f"{order}HH", tiff, entry)
            if tag == _ORIENTATION:
                return struct.unpack_from(f"{order}{'I' if kind == 4 else 'H'}", tiff, entry + 8)[0]
    except struct.error:
        pass
    return None


def _as_rgb(image: Image.Image) -> Image.Image:
    is_wide_pgm = image.mode == "I" and image.format == "PPM"  # which Pillow opens so, scaled to 16 bits
    if image.mode in ("I", "F") and not is_wide_pgm:
        raise ValueError("its pixels have 32 bits, which nothing says the range of; save it with 8 or 16")
    if image.mode.startswith("I;16") or is_wide_pgm:
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # without this step Pillow warns
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


def _count(names: Sequence[str], noun: str, plural: str | None = None) -> str:
    """Return "5 images (a, b, c, ...)"."""
    return f"{_plural(len(names), noun, plural)} ({listed(list(names))})"


def _plural(count: int, noun: str, plural: str | None = None) -> str:
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"
