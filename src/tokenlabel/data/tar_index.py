"""What lies where in tar files: found by looking at the header of every member, and kept in a file beside them."""

from __future__ import annotations

import os
import tarfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tokenlabel.data.classes import named_classes, sorted_classes
from tokenlabel.data.folders import (
    EXTENSIONS,
    in_brackets,
    is_named_as_mask,
    mistaken_layout,
    part_of,
    skipped_text,
    why_skipped,
    without_masks,
)
from tokenlabel.data.listings import UNREADABLE, Strings, read_arrays, write_arrays
from tokenlabel.runtime.errors import DataError
from tokenlabel.runtime.process import listed, say

INDEX_NAME = "tokenlabel-index.npz"

_BLOCK_BYTES = 512  # of a tar file's headers

_Place = tuple[int, int, int]  # the number of a tar file, the first byte and the bytes of an image in it


@dataclass(frozen=True, eq=False)
class TarIndex:
    """What is where in tar files: `places` [n, 3] are the file's number, the first byte and the bytes of each image.

    `skipped`: how many other files there are, by kind.
    """

    keys: Strings
    places: NDArray[np.int64]
    class_names: list[str]
    class_ids: NDArray[np.int64]
    skipped: dict[str, int]


def scan_tars(names: Sequence[str | Path], local: Callable[[int], Path] | None = None) -> TarIndex:
    """Return what is in tar files, by looking at the header of every member.

    `local`: where the file of a number is, for names that are no paths. Raises DataError as `TarImages` does.
    """
    where = str(names[0]) if len(names) == 1 else str(names[0]).rpartition("/")[0] or "."
    images, numbers, skipped = dict[str, _Place](), dict[tuple[int, str], str](), Counter[str]()
    for tar, called in enumerate(names):
        for name, kind, start, num_bytes, text in _members(local(tar) if local else Path(called), called):
            if text is not None:
                number = _class_number(text, f"{called}: {name}")
                other = numbers.setdefault((tar, _stem(name)), number)
                if other != number:
                    raise DataError(f"{called}: {_stem(name)} has two classes in .cls files, {other} and {number}")
                continue
            if kind is None and name in images:
                raise DataError(f"{called}: {name} is there twice (also in {names[images[name][0]]})")
            if kind is None:
                images[name] = (tar, start, num_bytes)
            else:
                skipped[kind] += 1
    if not images:
        raise DataError(f"{where}: no images ({', '.join(EXTENSIONS)}) in {len(names)} tar files{in_brackets(skipped)}")
    folders = sorted({key.split("/", 1)[0] for key in images if "/" in key})
    mistake = mistaken_layout(where, folders, [*images], packed=True)
    # Where .cls files say the classes, folders may be called as they like, unless they are several parts of a data set.
    if mistake and (not numbers or len({part_of(name) for name in folders} - {None}) > 1):
        raise DataError(mistake)
    keys = _images_of_samples(images, skipped, where) if numbers else without_masks(sorted(images), skipped)
    class_names, class_ids = _classes(keys, images, numbers, where, len(names), skipped)
    places = np.array([images[key] for key in keys], np.int64)
    return TarIndex(Strings(keys), places, class_names, class_ids, dict(skipped))


def _members(path: Path, called: str | Path) -> Iterator[tuple[str, str | None, int, int, bytes | None]]:
    """Yield each file in a tar file: its name, why it is skipped (None for an image), its first byte and its length.

    Last, what a .cls file holds, None for others.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isdir():
                    continue
                name = member.name.removeprefix("./").lstrip("/")
                kind = why_skipped(name) if member.isfile() else "links or special"
                content = tar.extractfile(member) if kind == ".cls" else None
                yield name, kind, member.offset_data, member.size, content.read(32) if content else None
            end = tar.offset  # here two blocks of zeros should begin; Python does not mind if there is nothing
        if end >= path.stat().st_size:
            say(f"{called}: has no end, so perhaps it was cut short; what is in it so far is used")
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"{called}: cannot be read as a tar file, uncompressed ({error})") from error


def _classes(
    keys: Sequence[str],
    images: Mapping[str, _Place],
    numbers: Mapping[tuple[int, str], str],
    where: str,
    num_tars: int,
    skipped: Counter[str],
) -> tuple[list[str], NDArray[np.int64]]:
    """Return the class names, and the class id of each image: by .cls files, or, without any, by the first folder."""
    if numbers:
        of_images = [numbers.get((images[key][0], _stem(key))) for key in keys]
    else:
        of_images = [key.split("/", 1)[0] if "/" in key else None for key in keys]
    lacking = [key for key, name in zip(keys, of_images, strict=True) if name is None]
    if not lacking:
        return (named_classes if numbers else sorted_classes)([name for name in of_images if name is not None])
    few = f"{where}: {len(lacking):,} of {len(keys):,} images have"
    if numbers:
        raise DataError(f"{few} no .cls file ({listed(lacking)})")
    if len(lacking) < len(keys):
        advice = "; if each tar file is a class, unpack it into a folder of its name" if num_tars > 1 else ""
        beside = f"; {skipped_text(skipped)}" if skipped else ""
        raise DataError(
            f"{few} neither a .cls file nor a folder that names their class ({listed(lacking)}){advice}{beside}"
        )
    return [], np.zeros(len(keys), np.int64)


def _images_of_samples(images: Mapping[str, _Place], skipped: Counter[str], where: str) -> list[str]:
    """Return the path of the image of each sample, sorted; count the sample's other pictures, such as masks."""
    samples: defaultdict[tuple[int, str], list[str]] = defaultdict(list)
    for key, (tar, _, _) in images.items():
        samples[tar, _stem(key)].append(key)
    chosen: list[str] = []
    for (_, stem), found in samples.items():
        own = [key for key in found if key.count(".", len(stem)) == 1] if len(found) > 1 else found
        own = own or [key for key in found if not is_named_as_mask(key)]
        if len(own) != 1:
            raise DataError(
                f"{where}: the sample {stem} has {len(found)} images ({listed(found)}), and nothing says which is "
                f"meant; name it {stem}.jpg or .png and the others {stem}.WORD.png, or leave them out"
            )
        chosen += own
        skipped.update(f"{key[len(stem) :].lower()} beside the sample's image" for key in found if key not in own)
    return sorted(chosen)


def _class_number(text: bytes, where: str) -> str:
    number = text.decode("ascii", "replace").strip()
    if not number.isdecimal():
        raise DataError(f"{where}: expected the number of a class, 0 or above, got {text!r}")
    return str(int(number))


def _stem(name: str) -> str:
    """Return a path up to the first dot of its last part, by which WebDataset tells what belongs together."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.split(".", 1)[0]


def save_index(
    path: Path, index: TarIndex, names: Sequence[str], sizes: NDArray[np.int64], marks: NDArray[np.int64]
) -> None:
    """Write what is in tar files: their names, and the sizes and marks by which they are known again."""
    arrays = {
        "tars": Strings(names).packed(),
        "sizes": sizes,
        "marks": marks,
        "keys": index.keys.packed(),
        "places": index.places,
        "class_names": Strings(index.class_names).packed(),
        "class_ids": index.class_ids,
        "passed_over": Strings(list(index.skipped)).packed(),
        "num_passed_over": np.array([*index.skipped.values()], np.int64),
    }
    write_arrays(path, arrays)


def load_index(path: Path) -> tuple[TarIndex, list[str], NDArray[np.int64], NDArray[np.int64]]:
    """Return what `save_index` wrote. Raises DataError if it is damaged."""
    try:
        arrays = read_arrays(path)
        tars, class_names, kinds = (
            [*Strings.unpacked(arrays[name])] for name in ("tars", "class_names", "passed_over")
        )
        skipped = dict(zip(kinds, arrays["num_passed_over"].tolist(), strict=True))
        keys = Strings.unpacked(arrays["keys"])
        index = TarIndex(keys, arrays["places"], class_names, arrays["class_ids"], skipped)
        return index, tars, arrays["sizes"], arrays["marks"]
    except UNREADABLE as error:
        raise DataError(f"{path}: cannot be read as an index of tar files; write it again, or delete it") from error


def last_starts(places: NDArray[np.int64], num_tars: int) -> list[int]:
    """Return the first byte of the last image in each tar file."""
    starts = np.full(num_tars, _BLOCK_BYTES)  # of a file without images, the first header's end
    np.maximum.at(starts, places[:, 0], places[:, 1])
    return starts.tolist()


def mark_of(path: Path, start: int) -> int:
    """Return the checksum of the header of the image that begins at a byte of a tar file."""
    # It holds the image's name, size and time: enough to tell files of one length apart without reading them.
    with path.open("rb", buffering=0) as file:
        return zlib.crc32(os.pread(file.fileno(), _BLOCK_BYTES, start - _BLOCK_BYTES))
