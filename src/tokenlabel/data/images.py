"""Where images come from: sources of encoded images with keys and classes, and the check that they decode."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import StrEnum
from itertools import pairwise
from pathlib import Path
from typing import Protocol, overload, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

try:
    import simplejpeg
except ImportError:  # the extra "fast"
    simplejpeg = None

EXTENSIONS = (
    ".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp",
)  # fmt: skip

# Up to this many images `check_images` decodes every one by default (about 10 ms each for 500 x 375 JPEGs).
DECODE_ALL_UP_TO = 10_000

_NUM_NAMED = 3  # how many offenders an error names


class DataError(ValueError):
    """A folder of images that can't be used as it is."""


class ImageError(ValueError):
    """An image that does not decode. The message names it."""


@runtime_checkable
class ImageSource(Protocol):
    """Encoded images with a key and a class each, read by index.

    `keys` are unique and name the same image for ever: label stores file its scores under them. `class_ids`
    [n] index into `class_names`. A source is sent to data loader processes, so it must pickle, and cheaply.
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


class Strings(Sequence[str]):
    """A sequence of strings in one buffer, so that a million of them take their text and 8 bytes each.

    Python's own would also be copied page by page into every process that counts references to them.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        encoded = [s.encode("utf-8", "surrogateescape") for s in strings]
        self._ends = np.cumsum([0, *map(len, encoded)])
        self._text = b"".join(encoded)

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
        self, root: Path, keys: Sequence[str], class_ids: NDArray[np.int64], class_names: Sequence[str]
    ) -> None:
        self.root = root
        self._keys, self._class_ids, self._class_names = Strings(keys), class_ids, list(class_names)

    @property
    def keys(self) -> Sequence[str]:
        """The path of each image."""
        return self._keys

    @property
    def class_ids(self) -> NDArray[np.int64]:
        """The class of each image; all 0 if they have none."""
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

    def __len__(self) -> int:
        """Return how many images there are."""
        return len(self._keys)


class ImageFolder(ImageFiles):
    """A folder with one folder a class (the ordinary layout of ImageNet), images at any depth below it.

    Keys are whole paths relative to the root, with "/" and the extension, sorted by class, then by path.
    Class ids follow the sorted names of the class folders, as in torchvision. Names that begin with a dot are
    passed over, links are followed. Raises DataError for a root that is missing, empty or has no class
    folders, for class folders without images, and for images that lie in no class folder.
    """

    def __init__(self, root: str | Path) -> None:
        root = Path(root)
        if not root.is_dir():
            raise DataError(f"{root}: no such folder of images")
        with os.scandir(root) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".")]
        class_names = sorted(entry.name for entry in visible if entry.is_dir())
        stray = sorted(entry.name for entry in visible if entry.is_file() and _is_image(entry.name))
        if stray:
            raise DataError(
                f"{root}: {_count(stray, 'image')} outside of any class folder; "
                "put each into a folder named after its class"
            )
        if not class_names:
            raise DataError(f"{root}: expected one folder a class with images in it, found no folder")
        of_class = [sorted(_image_paths(root, name)) for name in class_names]
        empty = [name for name, paths in zip(class_names, of_class, strict=True) if not paths]
        if empty:
            raise DataError(
                f"{root}: {_count(empty, 'class folder')} without images "
                f"({', '.join(EXTENSIONS)}); fill or remove them"
            )
        class_ids = np.repeat(np.arange(len(of_class)), [len(paths) for paths in of_class])
        super().__init__(root, [path for paths in of_class for path in paths], class_ids, class_names)


class ImageSubset:
    """Some of the images of another source, with its classes."""

    def __init__(self, source: ImageSource, indices: NDArray[np.integer]) -> None:
        self._source, self._indices = source, indices
        self._keys = Strings([source.keys[int(i)] for i in indices])

    @property
    def keys(self) -> Sequence[str]:
        """The keys of these images in the other source."""
        return self._keys

    @property
    def class_ids(self) -> NDArray[np.int64]:
        """The class of each image."""
        return self._source.class_ids[self._indices]

    @property
    def class_names(self) -> list[str]:
        """The names of the other source's classes, also of those that have no image left."""
        return self._source.class_names

    @property
    def groups(self) -> NDArray[np.int64] | None:
        """The group (file) that each image lies in, if the other source says so."""
        groups = getattr(self._source, "groups", None)
        return None if groups is None else groups[self._indices]

    def streamed(self) -> ImageSource:
        """Return the same images, for reading group by group (see `TarImages.streamed`)."""
        streamed = getattr(self._source, "streamed", None)
        return self if streamed is None else ImageSubset(streamed(), self._indices)

    def read(self, index: int) -> bytes:
        """Return the encoded image."""
        return self._source.read(int(self._indices[index]))

    def __len__(self) -> int:
        """Return how many images there are."""
        return len(self._indices)


class ImageCheck(StrEnum):
    """How closely to look at images before training.

    DECODE decodes every image: certain, and costs what an epoch's decoding costs. ENDS reads every image and
    looks at its header and last bytes, which finds what downloads and full disks leave behind (empty, cut
    off, not an image) at about the cost of reading the files once. NONE trusts them, for instance because the
    teacher has already decoded every image that has a label. AUTO decodes sources of up to `DECODE_ALL_UP_TO`
    images and looks at the ENDS of larger ones.
    """

    AUTO = "auto"
    DECODE = "decode"
    ENDS = "ends"
    NONE = "none"


def decode_image(data: bytes, name: str) -> Image.Image:
    """Decode to RGB; `name` is what the ImageError calls an image that does not decode.

    Transparency is dropped, 16-bit greys keep their upper byte, of an animation the first picture counts, and
    orientation tags are ignored, so that pixels lie where the file has them, as in torchvision and timm.
    """
    try:
        return _as_rgb(Image.open(io.BytesIO(data)))
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
            return simplejpeg.decode_jpeg(data)
        except ValueError:
            pass  # four inks, say, or damage: what can be done is for Pillow to decide
    return np.array(decode_image(data, name))


def check_images(
    source: ImageSource,
    *,
    skip_broken: bool = False,
    check: ImageCheck = ImageCheck.AUTO,
    option: str | None = "skip_broken=True",
) -> ImageSource:
    """Return the source if all its images are sound, or those that are if `skip_broken`.

    `option`: how to skip broken images, where the error is read. Raises DataError that counts and names broken images.
    """
    return leave_out(source, find_broken(source, check), skip_broken=skip_broken, option=option)


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
    return ImageSubset(source, np.delete(np.arange(len(source)), broken))


def named_classes(names: Sequence[str]) -> tuple[list[str], NDArray[np.int64]]:
    """Return class names and ids: numbers stand for themselves, names are sorted."""
    if all(name.isdecimal() for name in names):
        ids = np.array([int(name) for name in names], np.int64)
        return [str(number) for number in range(int(ids.max()) + 1)], ids
    return sorted_classes(names)


def sorted_classes(names: Sequence[str]) -> tuple[list[str], NDArray[np.int64]]:
    """Return class names and ids in the order of the names, as those of class folders are."""
    distinct = sorted(set(names))
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


def _image_paths(root: Path, class_name: str) -> Iterator[str]:
    """Yield the paths of a class's images relative to the root, in no particular order."""
    for folder, subfolders, names in os.walk(root / class_name, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        relative = Path(folder).relative_to(root).as_posix()
        yield from (f"{relative}/{name}" for name in names if _is_image(name))


def _is_image(name: str) -> bool:
    return not name.startswith(".") and name.lower().endswith(EXTENSIONS)


def _count(names: Sequence[str], noun: str) -> str:
    """Return "5 images (a, b, c, ...)", for error messages."""
    more = ", ..." if len(names) > _NUM_NAMED else ""
    plural = "" if len(names) == 1 else "s"
    return f"{len(names):,} {noun}{plural} ({', '.join(names[:_NUM_NAMED])}{more})"
