"""The classes of a segmentation data set: their names, their colours, and what the values in a mask mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files

import numpy as np
import yaml
from jaxtyping import Int16, UInt8
from numpy.typing import NDArray

from tokenlabel.data.masks import MAX_CLASSES, unlabelled_value
from tokenlabel.drawing.pictures import class_colour
from tokenlabel.runtime.errors import DataError
from tokenlabel.runtime.process import listed

IGNORED = -1  # the class id of pixels that neither train nor count
NUM_VALUES = 65_536  # of masks with 16 bits
_BACKGROUND_COLOUR = (40, 40, 40)
_UNKNOWN = -2


@dataclass(frozen=True, eq=False)
class Classes:
    """The classes that masks show.

    `names`: at most 32,767. `colours` [C, 3]: RGB. `ids_of_values` [values]: the class id of each value in a mask file,
    -1 (`IGNORED`) for pixels that don't count, -2 for values that must not occur. `is_assumed`: nobody said which value
    is no class.
    """

    names: list[str]
    colours: UInt8[NDArray[np.uint8], "C 3"]
    ids_of_values: Int16[NDArray[np.int16], " values"]
    is_assumed: bool = False

    def ids(self, values: NDArray[np.integer], *, name: str) -> NDArray[np.int16]:
        """Return the class ids [height, width] of a mask's values; `name` is what errors call the mask."""
        is_within = not values.size or (values.min() >= 0 and values.max() < NUM_VALUES)
        ids = self.ids_of_values[values] if is_within else None
        if ids is None or (ids == _UNKNOWN).any():
            raise DataError(f"{name}: {self.unknown(np.unique(values).tolist())}")
        return ids

    def unknown(self, values: Sequence[int]) -> str:
        """Return "holds the values 7, 9, which are no class; ..." of masks' values; empty if each has a meaning."""
        found = [value for value in values if self.id_of(value) == _UNKNOWN]
        if not found:
            return ""
        known = np.flatnonzero(self.ids_of_values != _UNKNOWN).tolist()
        return (
            f"holds the value{'' if len(found) == 1 else 's'} {listed([str(value) for value in found])}, which "
            f"{'is' if len(found) == 1 else 'are'} no class; {len(self.names)} classes have the values {_ranges(known)}"
        )

    def table(self, pixels: Mapping[int, int]) -> list[tuple[str, str, str, str]]:
        """Return the value, its class, the number and the share of the pixels of each value in masks; then what lacks.

        `pixels`: the number of pixels of each value that masks hold.
        """
        total = max(1, sum(pixels.values()))
        rows = [
            (str(value), self._meaning(value), f"{count:,}", f"{count / total:.1%}")
            for value, count in sorted(pixels.items())
        ]
        held = {self.id_of(value) for value in pixels}
        for class_id, name in enumerate(self.names):
            if class_id not in held:
                values = _ranges(np.flatnonzero(self.ids_of_values == class_id).tolist())
                rows.append((values, name, "0", "no mask holds it"))
        return rows

    def _meaning(self, value: int) -> str:
        class_id = self.id_of(value)
        return "(does not count)" if class_id == IGNORED else self.names[class_id]

    def id_of(self, value: int) -> int:
        """Return the class id of a value in masks, `IGNORED` or -2."""
        return int(self.ids_of_values[value]) if 0 <= value < NUM_VALUES else _UNKNOWN


def known_classes(data_set: str) -> Classes:
    """Return the classes of `ade20k`, `voc` or `cityscapes`, with their customary colours."""
    text = (files("tokenlabel.segmentation") / "class_tables.yaml").read_text(encoding="utf-8")
    table = yaml.safe_load(text)[data_set]
    ids_of_values = np.full(NUM_VALUES, _UNKNOWN, np.int16)
    match data_set:
        case "ade20k":  # 0: what is none of the 150
            ids_of_values[0] = IGNORED
        case "voc":  # 255: the outlines of objects
            ids_of_values[255] = IGNORED
        case "cityscapes":  # of 34 kinds of things, 19 count; a licence plate, -1, is written as 255
            ids_of_values[:34] = ids_of_values[255] = IGNORED
    values = [value for value, _ in table.values()]
    ids_of_values[values] = np.arange(len(values))
    colours = np.array([list(bytes.fromhex(colour)) for _, colour in table.values()], np.uint8)
    return Classes(list(table), colours, ids_of_values)


def numbered_classes(
    names: Sequence[str],
    *,
    background: str | None = None,
    values: Sequence[int] = (),
    ignored: Sequence[int] | None = None,
) -> Classes:
    """Return classes whose values in a mask are their numbers, or `values`; 255 is none of them.

    Of more than 255 names 255 is one, and 65535 is none. `background`: the name of one more class, that of the pixels
    of this value. `ignored`: values of pixels that do not count, in its place. Raises DataError for no names, too many,
    or the same twice, and for values that cannot be.
    """
    every = [*names, *([background] if background is not None else [])]
    if not every or len(every) > MAX_CLASSES or len(set(every)) < len(every):
        raise DataError(f"expected 1 to {MAX_CLASSES:,} different names of classes, got {len(every):,}: {every[:5]}")
    if values and len(values) != len(names):
        raise DataError(f"data.class_values holds {len(values)} values of {len(names)} classes; give one a class")
    none = unlabelled_value(len(names))
    of_classes = [*(values or range(len(names))), *([none] if background is not None else [])]
    of_none = ignored if ignored is not None else {none} - {*of_classes}
    if len({*of_classes}) < len(of_classes) or not {*of_classes, *of_none} <= {*range(NUM_VALUES)}:
        raise DataError(
            f"data.class_values {of_classes[:5]}: expected different values, and data.ignore_index with them from 0 "
            f"to {NUM_VALUES - 1:,}"
        )
    if both := {*of_classes} & {*of_none}:
        raise DataError(f"data.ignore_index {min(both)} is the value of a class; leave it out")
    ids_of_values = np.full(NUM_VALUES, _UNKNOWN, np.int16)
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
