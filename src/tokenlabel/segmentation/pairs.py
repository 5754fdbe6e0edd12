"""Images with masks, by index: the classes that the values in masks stand for, and whether masks fit their images."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
import yaml
from jaxtyping import Int16, Integer, UInt8
from numpy.typing import NDArray

from tokenlabel.data.decoding import DECODE_ALL_UP_TO, decode_pixels, orientation_of
from tokenlabel.data.images import ImageFiles, ImageSource, ImageSubset
from tokenlabel.data.listings import Strings
from tokenlabel.data.masks import MAX_CLASSES, CocoMasks, check_upright, decode_mask, palette_of, unlabelled_value
from tokenlabel.drawing.pictures import class_colour
from tokenlabel.runtime.errors import DataError, ImageError, refuse
from tokenlabel.runtime.process import listed, say

IGNORED = -1  # the class id of pixels that neither train nor count
_UNKNOWN = -2  # of values that must not occur
_NUM_VALUES = 65_536  # of masks with 16 bits
_BACKGROUND_COLOUR = (40, 40, 40)
_NUM_CHECKED = 1_000  # pairs of a larger data set that are decoded before training
# Values that are no class: in ADE20K all but its 150 classes, in Pascal VOC the outlines of objects, in Cityscapes all
# but the 19 classes of the benchmark (its licence plates, -1, are stored as 255).
_IGNORED_VALUES = {"ade20k": [0], "voc": [255], "cityscapes": [*range(34), 255]}


@dataclass(frozen=True, eq=False)
class Classes:
    """The classes of masks.

    `names`: at most 32,767. `colours` [C, 3]: RGB. `ids_of_values` [65536]: the class id of each value in a mask file,
    -1 (`IGNORED`) for ignored pixels, -2 for values that must not occur. `is_assumed`: the user did not say which value
    is ignored.
    """

    names: list[str]
    colours: UInt8[NDArray[np.uint8], "C 3"]
    ids_of_values: Int16[NDArray[np.int16], " values"]
    is_assumed: bool = False

    def ids(self, values: NDArray[np.integer], *, name: str) -> NDArray[np.int16]:
        """Return the class ids [height, width] of a mask's values. Raises DataError that begins with `name`."""
        in_range = not values.size or (values.min() >= 0 and values.max() < _NUM_VALUES)
        ids = self.ids_of_values[values] if in_range else None
        if ids is None or (ids == _UNKNOWN).any():
            raise DataError(f"{name}: {self.unknown(np.unique(values).tolist())}")
        return ids

    def id_of(self, value: int) -> int:
        """Return the class id of a value in masks, -1 if it is ignored, -2 if it is unknown."""
        return int(self.ids_of_values[value]) if 0 <= value < _NUM_VALUES else _UNKNOWN

    def unknown(self, values: Sequence[int]) -> str:
        """Return "holds the values 7, 9, which are no class; ..." for the unknown ones of `values`, "" without any."""
        found = [str(value) for value in values if self.id_of(value) == _UNKNOWN]
        if not found:
            return ""
        plural, are = ("", "is") if len(found) == 1 else ("s", "are")
        known = _ranges(np.flatnonzero(self.ids_of_values != _UNKNOWN).tolist())
        return (
            f"holds the value{plural} {listed(found)}, which {are} no class; {len(self.names)} classes have the values "
            f"{known}"
        )

    def table(self, pixels: Mapping[int, int]) -> list[tuple[str, str, str, str]]:
        """Return (value, class, pixels, share) of each value in masks, then the classes that no mask holds.

        `pixels`: the number of pixels by value.
        """
        total = max(1, sum(pixels.values()))
        rows, held = [], set()
        for value, count in sorted(pixels.items()):
            held.add(class_id := self.id_of(value))
            name = "(ignored)" if class_id == IGNORED else self.names[class_id]
            rows.append((str(value), name, f"{count:,}", f"{count / total:.1%}"))
        for class_id, name in enumerate(self.names):
            if class_id not in held:
                values = _ranges(np.flatnonzero(self.ids_of_values == class_id).tolist())
                rows.append((values, name, "0", "in no mask"))
        return rows


def known_classes(data_set: str) -> Classes:
    """Return the classes of `ade20k`, `voc` or `cityscapes`, with their usual colours."""
    text = (files("tokenlabel.segmentation") / "class_tables.yaml").read_text(encoding="utf-8")
    table = yaml.safe_load(text)[data_set]
    ids_of_values = np.full(_NUM_VALUES, _UNKNOWN, np.int16)
    ids_of_values[_IGNORED_VALUES[data_set]] = IGNORED
    ids_of_values[[value for value, _ in table.values()]] = np.arange(len(table))
    colours = np.array([list(bytes.fromhex(colour)) for _, colour in table.values()], np.uint8)
    return Classes(list(table), colours, ids_of_values)


def numbered_classes(
    names: Sequence[str],
    *,
    background: str | None = None,
    values: Sequence[int] = (),
    ignored: Sequence[int] | None = None,
) -> Classes:
    """Return classes whose values in a mask are `values`, by default 0, 1, 2, ...

    `ignored`: values of pixels that do not count; by default 255, or 65535 where there are more than 255 classes.
    `background`: name of one more class, of the pixels of that default value. Raises DataError for no names, too many,
    or the same twice, and for values that do not fit.
    """
    every = [*names, *([background] if background is not None else [])]
    unlabelled = unlabelled_value(len(names))
    of_classes = [*(values or range(len(names))), *([unlabelled] if background is not None else [])]
    of_none = ignored if ignored is not None else {unlabelled} - {*of_classes}
    both = {*of_classes} & {*of_none}
    fit = len({*of_classes}) == len(of_classes) and {*of_classes, *of_none} <= {*range(_NUM_VALUES)}
    refuse(
        {
            f"expected 1 to {MAX_CLASSES:,} different names of classes, got {len(every):,}: {every[:5]}": not every
            or len(every) > MAX_CLASSES
            or len(set(every)) < len(every),
            f"data.class_values holds {len(values)} values of {len(names)} classes; give one a class": values
            and len(values) != len(names),
            f"data.class_values {of_classes[:5]}: expected different values, and data.ignore_index with them from 0 "
            f"to {_NUM_VALUES - 1:,}": not fit,
            f"data.ignore_index {min(both, default=0)} is the value of a class; leave it out": both,
        },
        DataError,
    )
    ids_of_values = np.full(_NUM_VALUES, _UNKNOWN, np.int16)
    ids_of_values[of_classes] = np.arange(len(every))
    ids_of_values[list(of_none)] = IGNORED
    colours = [class_colour(class_id) for class_id in range(len(names))]
    colours += [_BACKGROUND_COLOUR] if background is not None else []
    is_assumed = ignored is None and not values and background is None
    return Classes(every, np.array(colours, np.uint8), ids_of_values, is_assumed)


def _ranges(values: list[int]) -> str:
    """Return "0-9, 255" for ascending numbers."""
    starts = [v for i, v in enumerate(values) if i == 0 or values[i - 1] != v - 1]
    ends = [v for i, v in enumerate(values) if i + 1 == len(values) or values[i + 1] != v + 1]
    return ", ".join(f"{a}-{b}" if a < b else str(a) for a, b in zip(starts, ends, strict=True))


class ImageMaskPairs:
    """Images and their masks by index: files in a folder, or what COCO's file says.

    `keys`, `mask_names`: paths of images and masks, relative to their folders; "" for an image without a mask.
    `pixels`: the number of pixels of each value in the masks that `check` decoded. Cheap to pickle.
    """

    def __init__(
        self, classes: Classes, images: Path, masks: Path | CocoMasks, names: Sequence[tuple[str, str]]
    ) -> None:
        self.classes = classes
        self._images, self._masks = images, masks
        # `Strings` are one buffer each: workers of the data loader need not pickle and copy a million objects.
        self.keys = Strings([image for image, _ in names])
        self.mask_names = Strings([mask for _, mask in names])
        self.pixels: dict[int, int] = {}

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.keys)

    @property
    def with_mask(self) -> list[int]:
        """The indices of the images that have a mask."""
        return [index for index in range(len(self)) if self.has_mask(index)]

    @property
    def unmasked(self) -> ImageSource:
        """The images without a mask, as label stores know them."""
        files = ImageFiles(self._images, self.keys, np.zeros(len(self), np.int64), ())
        return ImageSubset(files, np.array([i for i in range(len(self)) if not self.has_mask(i)], np.int64))

    def has_mask(self, index: int) -> bool:
        """Return True if an image has a mask."""
        return bool(self.mask_names[index])

    def read(
        self, index: int
    ) -> tuple[UInt8[NDArray[np.uint8], "height width 3"], Int16[NDArray[np.int16], "height width"]]:
        """Return RGB pixels and class ids; -1 where a pixel is ignored, and everywhere without a mask.

        Raises ImageError or DataError that names the file.
        """
        pixels, values = self._decoded(index)
        if values is None:
            return pixels, np.full(pixels.shape[:2], IGNORED, np.int16)
        return pixels, self.classes.ids(values, name=self._mask(self.mask_names[index]))

    def orientation(self, index: int) -> int:
        """Return the EXIF orientation tag of an image."""
        return orientation_of(_bytes(self._images / self.keys[index]))

    def check(self, *, to_train: bool = True) -> None:
        """Decode all pairs, or a sample where there are more than `DECODE_ALL_UP_TO`; print which classes are absent.

        Images without a mask are not decoded here: the teacher that labelled them has decoded them all. Raises what
        `read` would raise later, with the number of such pairs; DataError if every pixel is ignored, or if the model
        could learn only one class of several, as from masks of 0 and 255 with two class names.
        """
        with_mask = np.array(self.with_mask, np.int64)
        if not len(with_mask):
            return
        # Evenly spaced, not the first ones: sorted files of one class or scene come together.
        is_all = len(with_mask) <= DECODE_ALL_UP_TO
        drawn = with_mask if is_all else with_mask[np.linspace(0, len(with_mask) - 1, _NUM_CHECKED).astype(int)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # threads: decoders release the GIL
            looks = dict(zip(drawn.tolist(), pool.map(self._look, drawn.tolist()), strict=True))
        errors = {self.keys[index]: look for index, look in looks.items() if isinstance(look, ValueError)}
        if errors:
            _, *others = errors
            first = next(iter(errors.values()))
            more = f" (and {len(others):,} more of {len(looks):,} pairs: {listed(others)})" if others else ""
            raise type(first)(f"{first}{more}") from first
        masks = {self.mask_names[index]: look for index, look in looks.items() if not isinstance(look, ValueError)}
        if num_turned := sum(is_turned for *_, is_turned in masks.values()):
            say(
                f"{self._images}: an orientation tag turns {num_turned:,} of {len(looks):,} checked images; their "
                "masks are assumed to be upright, as images are displayed"
            )
        self._check_values({name: counts for name, (counts, *_) in masks.items()}, is_all=is_all, to_train=to_train)
        colour_of: dict[int, tuple[bytes, str]] = {}
        for name, (_, colours, _) in masks.items():
            for value, colour in colours.items():
                first_colour, first_name = colour_of.setdefault(value, (colour, name))
                if colour != first_colour:
                    say(
                        f"{self._masks}: {value} is #{first_colour.hex()} in {first_name} and #{colour.hex()} in "
                        f"{name}; masks are read by their numbers, which mean other classes if palettes differ"
                    )
                    return

    def _check_values(self, masks: dict[str, dict[int, int]], *, is_all: bool, to_train: bool) -> None:
        """Compare the values of masks, given as numbers of pixels by mask and value, with the classes."""
        classes, counts = self.classes, Counter[int]()
        for of_mask in masks.values():
            counts.update(of_mask)
        self.pixels, values = dict(counts), sorted(counts)
        if unknown := classes.unknown(values):
            names = [name for name, of_mask in masks.items() if classes.unknown([*of_mask])]
            raise DataError(
                f"{self._mask(names[0])}: {unknown}{_advice(classes, values)} ({len(names):,} of {len(masks):,} masks)"
            )
        held = {classes.id_of(value) for value in values} - {IGNORED}
        ignored = [value for value in values if classes.id_of(value) == IGNORED]
        of_none = listed([str(value) for value in ignored])
        if not held and is_all:
            raise DataError(f"{self._masks}: no pixel of {len(masks):,} masks counts: all are {of_none}")
        if to_train and classes.is_assumed and ignored and len(held) == 1 < len(classes.names):
            raise DataError(
                f"{self._masks}: {len(masks):,} masks hold {listed([str(v) for v in values])} alone, of which "
                f"{of_none} does not count: only {classes.names[held.pop()]!r} would be learnt"
                f"{_advice(classes, values)}; if that is intended, set --data.ignore-index {of_none}"
            )
        absent = [name for class_id, name in enumerate(classes.names) if class_id not in held]
        if absent:
            share = sum(counts[value] for value in ignored) / counts.total()
            apart = f"; {share:.0%} of the pixels are {of_none} and do not count" if ignored else ""
            if ignored and len(values) == len(classes.names):
                apart += _advice(classes, values)
            say(
                f"{self._masks}: none of {len(masks):,} masks holds {len(absent):,} of {len(classes.names):,} classes "
                f"({listed(absent)}){apart}"
            )

    def _decoded(
        self, index: int
    ) -> tuple[UInt8[NDArray[np.uint8], "height width 3"], Integer[NDArray[np.integer], "height width"] | None]:
        """Return RGB pixels and the values of the mask, if there is one."""
        image, mask = self._images / self.keys[index], self._mask(self.mask_names[index])
        data = _bytes(image)
        try:
            pixels = decode_pixels(data, str(image))
        except ImageError as error:
            raise ImageError(f"{error}; repair it, or remove it and its mask") from error
        if not self.has_mask(index):
            return pixels, None
        if isinstance(self._masks, CocoMasks):
            values = self._masks.read(self.mask_names[index])
        else:
            values = decode_mask(_bytes(Path(mask)), mask)
        if values.shape != pixels.shape[:2]:
            check_upright(values.shape, data, mask=mask, image=str(image))
            raise DataError(
                f"{mask}: has {values.shape[0]} x {values.shape[1]} pixels (height x width), its image {image} "
                f"{pixels.shape[0]} x {pixels.shape[1]}; they must be the same"
            )
        return pixels, values

    def _mask(self, name: str) -> str:
        """Return what messages call a mask."""
        return f"{self._masks}: {name}" if isinstance(self._masks, CocoMasks) else str(self._masks / name)

    def _look(self, index: int) -> tuple[dict[int, int], dict[int, bytes], bool] | ValueError:
        """Return pixels by value of a mask, palette colours by value, and whether a tag turns the image; or an error.

        The error is returned, not raised: `check` counts all of them.
        """
        try:
            _, values = self._decoded(index)
            is_turned = self.orientation(index) != 1
        except ValueError as error:
            return error
        assert values is not None
        found, sizes = np.unique(values, return_counts=True)
        counts = dict(zip(found.tolist(), sizes.tolist(), strict=True))
        colours = []
        if isinstance(self._masks, Path):
            colours = palette_of(_bytes(self._masks / self.mask_names[index]))
        return counts, {value: colours[value] for value in counts if value < len(colours)}, is_turned


def _advice(classes: Classes, found: list[int]) -> str:
    """Return which settings would give the values found in masks a meaning; "" where the data set defines it."""
    if not classes.is_assumed:
        return ""

    def _plain(values: list[int]) -> str:
        return f"[{','.join(map(str, values))}]"

    names, of_classes = len(classes.names), [value for value in found if value]
    last_is_none = ""
    if found == [*range(names), found[-1]]:
        last_is_none = f"; if {found[-1]} is none, set --data.ignore-index {found[-1]}"
        if found[-1] >= 255:
            return last_is_none
    if len(found) == names:
        return f"; if these are the classes in order, set --data.class-values={_plain(found)}"
    if len(of_classes) == names:
        first_is_none = f"--data.class-values={_plain(of_classes)} --data.ignore-index 0"
        return f"{last_is_none}; if 0 is none of them, set {first_is_none}"
    if len(of_classes) == names + 1 and found[-1] == 255:
        return f"; if 0 and 255 are none, set --data.class-values={_plain(of_classes[:-1])} --data.ignore-index=[0,255]"
    return "; --data.class-values says which value is which class, --data.ignore-index which are none"


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
