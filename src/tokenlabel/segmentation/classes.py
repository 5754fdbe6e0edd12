"""The classes of a segmentation data set: their names, their colours, and what the values in a mask mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

import numpy as np
import yaml
from jaxtyping import Int16, UInt8
from numpy.typing import NDArray

from tokenlabel.drawing.pictures import class_colour

IGNORED = 255  # the class id of pixels that neither train nor count
NUM_VALUES = 256
_BACKGROUND_COLOUR = (40, 40, 40)
_UNKNOWN = -1


class MaskError(ValueError):
    """A mask that cannot be read as classes. The message names it."""


@dataclass(frozen=True, eq=False)
class Classes:
    """The classes that masks show.

    `names`: at most 255. `colours` [C, 3]: RGB. `ids_of_values` [256]: the class id of each value in a mask file,
    `IGNORED` for pixels that don't count, -1 for values that must not occur.
    """

    names: list[str]
    colours: UInt8[NDArray[np.uint8], "C 3"]
    ids_of_values: Int16[NDArray[np.int16], " 256"]

    def ids(self, values: NDArray[np.integer], *, name: str) -> NDArray[np.uint8]:
        """Return the class ids [height, width] of a mask's values; `name` is what errors call the mask."""
        if values.size and (int(values.min()) < 0 or int(values.max()) >= NUM_VALUES):
            raise MaskError(f"{name}: holds the value {int(values.max())}; masks hold values from 0 to 255")
        ids = self.ids_of_values[values]
        if (ids == _UNKNOWN).any():
            found = np.unique(values[ids == _UNKNOWN]).tolist()
            known = np.flatnonzero(self.ids_of_values != _UNKNOWN)
            raise MaskError(
                f"{name}: holds {_values(found)}, which {'is' if len(found) == 1 else 'are'} no class; "
                f"{len(self.names)} classes have the values {_ranges(known.tolist())}"
            )
        return ids.astype(np.uint8)


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


def numbered_classes(names: Sequence[str], *, background: str | None = None) -> Classes:
    """Return classes whose values in a mask are their numbers, 255 being none of them.

    `background`: the name of one more class, that of the pixels of value 255; None leaves them out.
    Raises MaskError for no names, too many, or the same twice.
    """
    every = [*names, *([background] if background is not None else [])]
    if not every or len(every) > IGNORED or len(set(every)) < len(every):
        raise MaskError(f"expected 1 to {IGNORED} different names of classes, got {len(every)}: {every[:5]}")
    ids_of_values = np.full(NUM_VALUES, _UNKNOWN, np.int16)
    ids_of_values[: len(names)] = np.arange(len(names))
    ids_of_values[255] = IGNORED if background is None else len(names)
    colours = [class_colour(class_id) for class_id in range(len(names))]
    colours += [_BACKGROUND_COLOUR] if background is not None else []
    return Classes(every, np.array(colours, np.uint8), ids_of_values)


def _values(found: list[int]) -> str:
    more = ", ..." if len(found) > 3 else ""
    return f"the value{'' if len(found) == 1 else 's'} {', '.join(map(str, found[:3]))}{more}"


def _ranges(values: list[int]) -> str:
    """Return "0-9, 255" for ascending numbers."""
    starts = [v for i, v in enumerate(values) if i == 0 or values[i - 1] != v - 1]
    ends = [v for i, v in enumerate(values) if i + 1 == len(values) or values[i + 1] != v + 1]
    return ", ".join(f"{a}-{b}" if a < b else str(a) for a, b in zip(starts, ends, strict=True))
