"""Images in tar files, as WebDataset writes them, read in place; and an index that spares looking through them."""

from __future__ import annotations

import os
import re
import tarfile
import zlib
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from tokenlabel.data.folders import (
    EXTENSIONS,
    DataError,
    is_named_as_mask,
    mistaken_layout,
    part_of,
    passed_over_text,
    why_passed_over,
    without_masks,
)
from tokenlabel.data.images import ImageError, Strings, describe, named_classes, sorted_classes
from tokenlabel.runtime.process import listed, say

INDEX_NAME = "tokenlabel-index.npz"

_NUM_OPEN = 64  # tar files that a process keeps open
_BLOCK_BYTES = 512  # of a tar file's headers


@dataclass(frozen=True, eq=False)
class TarIndex:
    """What is where in tar files: `places` [n, 3] are the file's number, the first byte and the bytes of each image.

    `passed_over`: how many other files there are, by kind.
    """

    keys: Strings
    places: NDArray[np.int64]
    class_names: list[str]
    class_ids: NDArray[np.int64]
    passed_over: dict[str, int]


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
        self._read_ahead = False
        self._open: OrderedDict[int, _OpenFile] = OrderedDict()

    @property
    def keys(self) -> Sequence[str]:
        """The path of each image in its tar file."""
        return self.index.keys

    @property
    def class_ids(self) -> NDArray[np.int64]:
        """The class of each image."""
        return self.index.class_ids

    @property
    def class_names(self) -> list[str]:
        """The names of the first folders, or the numbers of the `.cls` files."""
        return self.index.class_names

    @property
    def passed_over(self) -> Mapping[str, int]:
        """How many other files lie in the tar files, by kind."""
        return self.index.passed_over

    @property
    def groups(self) -> NDArray[np.int64]:
        """The number of the tar file that each image lies in."""
        return self.index.places[:, 0]

    def streamed(self) -> TarImages:
        """Return the same images, for reading tar file by tar file: the first image asked for fetches its whole file.

        The system then reads each file once from end to end, ahead of who asks, into memory that it may take
        back. Only for an order that stays within a few files at a time (`shard_order`).
        """
        streamed = TarImages(self.paths, self.index)
        streamed._read_ahead = True
        return streamed

    def read(self, index: int) -> bytes:
        """Return the encoded image. Raises ImageError if the tar file is gone or was cut short."""
        place, start, length = self.index.places[index].tolist()
        try:
            file = self._opened(place)  # held until it is read: another thread may let go of it meanwhile
            data = os.pread(file.descriptor, length, start)
        except OSError as error:
            raise ImageError(f"{self._name(place)}: cannot be read ({error.strerror})") from error
        if len(data) != length:
            raise ImageError(f"{self._name(place)}: {self.keys[index]} is cut short")
        return data

    def stat(self, index: int) -> tuple[int, int]:
        """Return the bytes of the image, and when its tar file was modified, in ns. Raises OSError if that is gone."""
        place, _, length = self.index.places[index].tolist()
        return length, self.paths[place].stat().st_mtime_ns

    def __len__(self) -> int:
        """Return how many images there are."""
        return len(self.index.keys)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}  # another process opens files of its own

    def _opened(self, place: int) -> _OpenFile:
        """Return an open tar file; threads may get the same one, and it closes when the last lets go of it."""
        file = self._open.get(place)
        if file is None:
            file = _OpenFile(self._path(place), read_ahead=self._read_ahead)
            for other in [other for other, old in list(self._open.items()) if old.is_removed()]:
                self._open.pop(other, None)  # from a cache, which has given its room to others
            self._open[place] = file
            while len(self._open) > _NUM_OPEN:
                self._open.popitem(last=False)
        return file

    def _path(self, place: int) -> Path:
        """Return where a tar file is, now that it is to be read."""
        return self.paths[place]

    def _name(self, place: int) -> str:
        return str(self.paths[place])


class _OpenFile:
    """A file that is open for as long as somebody holds this."""

    def __init__(self, path: Path, *, read_ahead: bool) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)
        if read_ahead and hasattr(os, "posix_fadvise"):  # not on macOS
            os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_WILLNEED)

    def is_removed(self) -> bool:
        """Say whether the file has no name any longer, and its room on the disk goes with this."""
        return os.fstat(self.descriptor).st_nlink == 0

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def tar_files(folder: Path) -> list[Path]:
    """Return the tar files in a folder. Raises DataError if they are of several parts of a data set."""
    tars = sorted(path for path in folder.iterdir() if _is_tar(path))
    refuse_parts(folder, [path.name for path in tars])
    return tars


def refuse_parts(folder: str | Path, names: Sequence[str]) -> None:
    """Raise DataError for names of tar files that are of several parts of a data set."""
    parts: dict[str, str] = {}
    for name in names:
        for word in re.findall(r"[a-z]+", name.lower().removesuffix(".tar")):
            if part := part_of(word):
                parts.setdefault(part, name)
    if len(parts) > 1:
        some = listed([*parts.values()])
        raise DataError(
            f"{folder}: holds tar files of several parts of a data set ({some}); give each a folder"
        )


def _is_tar(path: Path) -> bool:
    return path.suffix.lower() == ".tar" and not path.name.startswith(".") and path.is_file()


def scan_tars(names: Sequence[str | Path], local: Callable[[int], Path] | None = None) -> TarIndex:
    """Return what is in tar files, by looking at the header of every member.

    `local`: where the file of a number is, for names that are no paths.
    """
    where = str(names[0]) if len(names) == 1 else str(names[0]).rpartition("/")[0] or "."
    images: dict[str, tuple[int, int, int]] = {}
    numbers: dict[tuple[int, str], str] = {}  # by sample: tar file and stem
    passed_over: Counter[str] = Counter()
    for place, path in enumerate(names):
        for name, kind, start, length, text in _members(local(place) if local else Path(path), path):
            if text is not None:
                sample, number = (place, _stem(name)), _class_number(text, where=f"{path}: {name}")
                if numbers.setdefault(sample, number) != number:
                    raise DataError(
                        f"{path}: {_stem(name)} has two classes in .cls files, {numbers[sample]} and {number}"
                    )
            elif kind is not None:
                passed_over[kind] += 1
            elif name in images:
                raise DataError(f"{path}: {name} is there twice (also in {names[images[name][0]]})")
            else:
                images[name] = (place, start, length)
    beside = f"; {passed_over_text(passed_over)}" if passed_over else ""
    if not images:
        raise DataError(f"{where}: no images ({', '.join(EXTENSIONS)}) in {len(names)} tar files{beside}")
    folders = sorted({key.split("/", 1)[0] for key in images if "/" in key})
    mistake = mistaken_layout(where, folders, [*images], packed=True)
    if mistake and (not numbers or len({part_of(name) for name in folders} - {None}) > 1):
        raise DataError(mistake)
    if numbers:
        keys = _images_of_samples(images, passed_over, where=where)
    else:
        keys, num_masks = without_masks(sorted(images))
        if num_masks:
            passed_over["named as masks or thumbnails of images beside them"] = num_masks
        bare = [key for key in keys if "/" not in key]
        if bare and len(bare) < len(keys):
            advice = (
                "; if each tar file is a class, unpack it into a folder of its name" if len(names) > 1 else ""
            )
            raise DataError(
                f"{where}: {len(bare):,} of {len(keys):,} images have neither a .cls file nor a folder that names "
                f"their class ({listed(bare)}){advice}{beside}"
            )
    places = np.array([images[key] for key in keys], np.int64)
    if numbers:
        of_image = [
            numbers.get((int(place), _stem(key))) for key, place in zip(keys, places[:, 0], strict=True)
        ]
        known = [number for number in of_image if number is not None]
        if lacking := [key for key, number in zip(keys, of_image, strict=True) if number is None]:
            raise DataError(
                f"{where}: {len(lacking):,} of {len(keys):,} images have no .cls file ({listed(lacking)})"
            )
        class_names, class_ids = named_classes(known)
    elif "/" not in keys[0]:  # none lies in a folder: no classes
        class_names, class_ids = [], np.zeros(len(keys), np.int64)
    else:
        class_names, class_ids = sorted_classes([key.split("/", 1)[0] for key in keys])
    return TarIndex(Strings(keys), places, class_names, class_ids, dict(passed_over))


def _images_of_samples(
    images: Mapping[str, tuple[int, int, int]], passed_over: Counter[str], *, where: str
) -> list[str]:
    """Return the path of the image of each sample, sorted; count the sample's other pictures, such as masks."""
    samples: defaultdict[tuple[int, str], list[str]] = defaultdict(list)
    for key, (place, _, _) in images.items():
        samples[place, _stem(key)].append(key)
    chosen: list[str] = []
    for (_, stem), found in samples.items():
        own = found
        if len(found) > 1:
            own = [key for key in found if key.count(".", len(stem)) == 1]
            own = own or [key for key in found if not is_named_as_mask(key)]
        if len(own) != 1:
            raise DataError(
                f"{where}: the sample {stem} has {len(found)} images ({listed(found)}), and nothing says which is "
                f"meant; name it {stem}.jpg or .png and the others {stem}.WORD.png, or leave them out"
            )
        chosen += own
        passed_over.update(
            f"{key[len(stem) :].lower()} beside the sample's image" for key in found if key not in own
        )
    return sorted(chosen)


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


def save_index(
    path: Path, index: TarIndex, names: Sequence[str], sizes: NDArray[np.int64], marks: NDArray[np.int64]
) -> None:
    """Write what is in tar files: their names, and the sizes and marks by which they are known again."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp.npz")
    np.savez(
        temporary,
        tars=_packed(names),
        sizes=sizes,
        marks=marks,
        keys=index.keys.packed(),
        places=index.places,
        class_names=_packed(index.class_names),
        class_ids=index.class_ids,
        passed_over=_packed(list(index.passed_over)),
        num_passed_over=np.array([*index.passed_over.values()], np.int64),
    )
    temporary.replace(path)


def load_index(path: Path) -> tuple[TarIndex, list[str], NDArray[np.int64], NDArray[np.int64]]:
    """Return what `save_index` wrote. Raises DataError if it is damaged."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            index = TarIndex(
                keys=Strings.unpacked(arrays["keys"]),
                places=arrays["places"],
                class_names=_unpacked(arrays["class_names"]),
                class_ids=arrays["class_ids"],
                passed_over=dict(
                    zip(_unpacked(arrays["passed_over"]), arrays["num_passed_over"].tolist(), strict=True)
                ),
            )
            return index, _unpacked(arrays["tars"]), arrays["sizes"], arrays["marks"]
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise DataError(
            f"{path}: cannot be read as an index of tar files; write it again, or delete it"
        ) from error


def read_index(folder: Path, paths: Sequence[Path]) -> TarImages:
    """Return the images of a folder's tar files by its index. Raises DataError if it is of other files."""
    path = folder / INDEX_NAME
    index, tars, sizes, marks = load_index(path)
    if tars == [path.name for path in paths]:
        found = _fingerprints(paths, index.places)
        if np.array_equal(found[0], sizes) and np.array_equal(found[1], marks):
            return TarImages(paths, index)
    raise DataError(f"{path}: the tar files beside it have changed since; write it again, or delete it")


def _fingerprints(
    paths: Sequence[Path], places: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the bytes of each tar file, and a checksum of the header of the last image in it."""
    sizes, marks = np.empty(len(paths), np.int64), np.empty(len(paths), np.int64)
    for i, (path, start) in enumerate(zip(paths, last_starts(places, len(paths)), strict=True)):
        sizes[i], marks[i] = path.stat().st_size, mark_of(path, start)
    return sizes, marks


def last_starts(places: NDArray[np.int64], num_tars: int) -> list[int]:
    """Return the first byte of the last image in each tar file."""
    starts = np.full(num_tars, _BLOCK_BYTES)
    np.maximum.at(starts, places[:, 0], places[:, 1])
    return starts.tolist()


def mark_of(path: Path, start: int) -> int:
    """Return the checksum of the header of the image that begins at a byte of a tar file."""
    with path.open("rb", buffering=0) as file:
        return zlib.crc32(os.pread(file.fileno(), _BLOCK_BYTES, start - _BLOCK_BYTES))


def _packed(names: Sequence[str]) -> NDArray[np.uint8]:
    """Return names as one array of bytes, each ended by a zero, which no name of a tar file's member holds."""
    return Strings(names).packed()


def _unpacked(text: NDArray[np.uint8]) -> list[str]:
    return list(Strings.unpacked(text))


def _members(path: Path, called: str | Path) -> Iterator[tuple[str, str | None, int, int, bytes | None]]:
    """Yield of each file in a tar file: name, why it is passed over, where its bytes are, a class file's content."""
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                name = member.name.removeprefix("./").lstrip("/")
                if member.isdir():
                    continue
                kind = why_passed_over(name) if member.isfile() else "links or special"
                content = tar.extractfile(member) if kind == ".cls" else None
                text = content.read(32) if content else None
                yield name, kind, member.offset_data, member.size, text
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"{called}: cannot be read as a tar file, uncompressed ({error})") from error


def _stem(name: str) -> str:
    """Return a path up to the first dot of its last part, by which WebDataset tells what belongs together."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.split(".", 1)[0]


def _class_number(text: bytes, *, where: str) -> str:
    try:
        number = int(text)
    except ValueError as error:
        raise DataError(f"{where}: expected the number of a class, got {text!r}") from error
    if number < 0:
        raise DataError(f"{where}: {number} is no class; numbers of classes are 0 and up")
    return str(number)
