"""Images with a mask each, by index: what they hold, and whether masks fit their images and the classes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import Int16, Integer, UInt8
from numpy.typing import NDArray

from tokenlabel.data.decoding import DECODE_ALL_UP_TO, decode_pixels, orientation_of
from tokenlabel.data.listings import Strings
from tokenlabel.data.masks import CocoMasks, check_upright, decode_mask, palette_of
from tokenlabel.runtime.errors import DataError, ImageError
from tokenlabel.runtime.process import listed, say
from tokenlabel.segmentation.classes import IGNORED, Classes

# Pairs of a larger set that are looked at before training.
NUM_DRAWN = 1_000


class ImageMaskPairs:
    """Images and the masks of their classes, files in a folder or in COCO's file, by index.

    `keys`, `mask_names`: the paths of the images and of their masks, relative to their roots; a mask's is "" where
    there is none. `pixels`: how many each value has in the masks that `check` looked at. Pickles, and cheaply.
    """

    def __init__(
        self, classes: Classes, images: Path, masks: Path | CocoMasks, names: Sequence[tuple[str, str]]
    ) -> None:
        self.classes = classes
        self._images, self._masks = images, masks
        self.keys = Strings([image for image, _ in names])
        self.mask_names = Strings([mask for _, mask in names])
        self.pixels: dict[int, int] = {}

    def __len__(self) -> int:
        """Return how many pairs there are."""
        return len(self.keys)

    @property
    def with_mask(self) -> list[int]:
        """The indices of the images that have a mask."""
        return [index for index in range(len(self)) if self.has_mask(index)]

    def has_mask(self, index: int) -> bool:
        """Say whether an image has a mask."""
        return bool(self.mask_names[index])

    def read(
        self, index: int
    ) -> tuple[UInt8[NDArray[np.uint8], "height width 3"], Int16[NDArray[np.int16], "height width"]]:
        """Return RGB pixels and class ids, -1 where none counts, as everywhere without a mask.

        Raises ImageError or DataError, by name.
        """
        pixels, values = self._decoded(index)
        if values is None:
            return pixels, np.full(pixels.shape[:2], IGNORED, np.int16)
        return pixels, self.classes.ids(values, name=self._mask(self.mask_names[index]))

    def orientation(self, index: int) -> int:
        """Return the orientation tag of an image's file."""
        return orientation_of(_bytes(self._images / self.keys[index]))

    def check(self, *, to_train: bool = True) -> None:
        """Look at every pair of up to `DECODE_ALL_UP_TO`, at some of more; say which classes no mask holds.

        Images without a mask are left to the teacher that labelled them, which saw them all.
        Raises what `read` would raise later, with the count, and DataError where no pixel counts, or none that could
        teach: masks of 0 and 255 with two class names, say.
        """
        with_mask = np.array(self.with_mask, np.int64)
        if not len(with_mask):
            return
        is_all = len(with_mask) <= DECODE_ALL_UP_TO
        drawn = with_mask if is_all else with_mask[np.linspace(0, len(with_mask) - 1, NUM_DRAWN).astype(int)]
        # Threads: decoding lets go of Python's lock.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
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
                f"{self._images}: an orientation tag turns {num_turned:,} of {len(looks):,} images looked at; their "
                "masks are taken to lie upright, as people see the images"
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
        """Hold the values of masks, by name and with their numbers of pixels, against the classes."""
        classes, values = self.classes, Counter[int]()
        for counts in masks.values():
            values.update(counts)
        self.pixels = dict(values)
        if unknown := classes.unknown(sorted(values)):
            names = [name for name, counts in masks.items() if classes.unknown([*counts])]
            raise DataError(
                f"{self._mask(names[0])}: {unknown}{_advice(classes, sorted(values))} ({len(names):,} of "
                f"{len(masks):,} masks)"
            )
        held = {classes.id_of(value) for value in values} - {IGNORED}
        ignored = sorted(value for value in values if classes.id_of(value) == IGNORED)
        of_none = listed([str(value) for value in ignored])
        if not held and is_all:
            raise DataError(f"{self._masks}: no pixel of {len(masks):,} masks counts: all are {of_none}")
        if to_train and classes.is_assumed and ignored and len(held) == 1 < len(classes.names):
            raise DataError(
                f"{self._masks}: {len(masks):,} masks hold {listed([str(v) for v in sorted(values)])} alone, of which "
                f"{of_none} does not count: only {classes.names[held.pop()]!r} would be learnt"
                f"{_advice(classes, sorted(values))}; if it is meant, say --data.ignore-index {of_none}"
            )
        absent = [name for class_id, name in enumerate(classes.names) if class_id not in held]
        if absent:
            share = sum(values[value] for value in ignored) / values.total()
            apart = f"; {share:.0%} of the pixels are {of_none} and do not count" if ignored else ""
            if ignored and len(values) == len(classes.names):
                apart += _advice(classes, sorted(values))
            say(
                f"{self._masks}: none of {len(masks):,} masks holds {len(absent):,} of {len(classes.names):,} classes "
                f"({listed(absent)}){apart}"
            )

    def _decoded(
        self, index: int
    ) -> tuple[UInt8[NDArray[np.uint8], "height width 3"], Integer[NDArray[np.integer], "height width"] | None]:
        """Return RGB pixels and the values of their mask, if there is one."""
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
        """Return the pixels of each value of a mask, its colour, and whether a tag turns the image; or an error."""
        try:
            _, values = self._decoded(index)
            is_turned = self.orientation(index) != 1
        except ValueError as error:
            return error
        assert values is not None
        found, counts = np.unique(values, return_counts=True)
        colours = []
        if isinstance(self._masks, Path):
            colours = palette_of(_bytes(self._masks / self.mask_names[index]))
        counts = dict(zip(found.tolist(), counts.tolist(), strict=True))
        return counts, {value: colours[value] for value in counts if value < len(colours)}, is_turned


def _advice(classes: Classes, found: list[int]) -> str:
    """Return which settings would give the values in masks a meaning; "" where the data set says it."""
    if not classes.is_assumed:
        return ""
    names, of_classes = len(classes.names), [value for value in found if value]
    last_is_none = ""
    if found == [*range(names), found[-1]]:
        last_is_none = f"; if {found[-1]} is none, say --data.ignore-index {found[-1]}"
        if found[-1] >= 255:
            return last_is_none
    if len(found) == names:
        return f"; if these are the classes in order, say --data.class-values={_plain(found)}"
    if len(of_classes) == names:
        first_is_none = f"--data.class-values={_plain(of_classes)} --data.ignore-index 0"
        return f"{last_is_none}; if 0 is none of them, say {first_is_none}"
    if len(of_classes) == names + 1 and found[-1] == 255:
        return f"; if 0 and 255 are none, say --data.class-values={_plain(of_classes[:-1])} --data.ignore-index=[0,255]"
    return "; --data.class-values says which value is which class, --data.ignore-index which are none"


def _plain(values: list[int]) -> str:
    return f"[{','.join(map(str, values))}]"


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
