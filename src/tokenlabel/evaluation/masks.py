"""Masks read like a label store, and the agreement of a store's maps with them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tokenlabel.core.align import align
from tokenlabel.core.batch import collate_score_maps
from tokenlabel.core.geometry import View, stack_views
from tokenlabel.core.scores import Orientation, ScoreMap, from_mask, turned_map
from tokenlabel.core.targets import TokenTargets
from tokenlabel.data.class_names import CLASSES_FILE, read_class_names, unlike_list
from tokenlabel.data.classes import are_numbers, say_order
from tokenlabel.data.decoding import orientation_of
from tokenlabel.data.images import ImageSource
from tokenlabel.data.masks import (
    COCO_SUFFIX,
    CocoMasks,
    check_upright,
    decode_mask,
    find_masks,
    is_stretched,
    mask_names,
    unlabelled_value,
)
from tokenlabel.evaluation.evaluators import object_tokens
from tokenlabel.labels.store import LabelStore
from tokenlabel.runtime.errors import DataError
from tokenlabel.runtime.process import listed, say

# Masks that are checked before the work begins.
NUM_CHECKED = 64


class MaskFolder:
    """True dense labels: a folder of masks laid out like the images, or COCO's file of them, read like a label store.

    The mask of `3/0001.jpg` is `3/0001.png` (see `mask_names`): one channel of class ids. `ignore_index`: the id of
    pixels without a class; by default 255, or 65535 if 255 is a class. `source`: the images, to refuse masks in the
    orientation of the stored pixels if an EXIF tag rotates these. `class_names`: the names of COCO's categories that
    have an id, in their order; all of them if empty.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        num_classes: int,
        ignore_index: int | None = None,
        source: ImageSource | None = None,
        class_names: Sequence[str] = (),
    ) -> None:
        folder = Path(folder)
        self._coco = CocoMasks(folder) if folder.suffix == COCO_SUFFIX else None
        if self._coco is None and not folder.is_dir():
            raise ValueError(f"{folder}: no such folder of masks")
        self.is_assumed = ignore_index is None and self._coco is None
        self._ignored = unlabelled_value(num_classes) if ignore_index is None else ignore_index
        if 0 <= self._ignored < num_classes:
            raise ValueError(
                f"{folder}: --ignore-index {self._ignored} is one of the {num_classes:,} classes, which have the ids 0 "
                f"to {num_classes - 1:,}; write other ids into the masks (or give `annotate` a --class-map FILE)"
            )
        self.folder, self.num_classes, self._source = folder, num_classes, source
        if self._coco is not None:
            self._ids = self._coco.ids_of(class_names, unlabelled=self._ignored)

    def __getitem__(self, key: str) -> ScoreMap:
        """Return the mask of an image as a score map whose probabilities are 1."""
        path, values = self._read(key)
        return from_mask(values, num_classes=self.num_classes, unlabelled=self._ignored, name=str(path))

    def __contains__(self, key: str) -> bool:
        """Return True if an image has a mask."""
        return key in self._coco_names if self._coco else self._path(key).exists()

    def check(
        self,
        class_names: Sequence[str],
        *,
        all_needed: bool = True,
        overrule: str | None = "write these classes' ids if not",
        whose: str = "the images'",
        given: str | None = None,
    ) -> None:
        """Raise DataError if masks are missing (`all_needed`), or if some of them hold ids that are no class.

        Also where classes.txt beside them lists other classes (unless `given` is the option that names these), and for
        masks of only 0 and 255 of images of several classes: there 255 probably is a class. Print which masks belong to
        no image, which have other shapes than their images, and in which order their classes are taken if nothing says
        so (`overrule`: what to do about it; None if the classes are the masks' own; `whose` they are else).
        """
        source = self._source
        # With a class map ids are others, and classes without names may be any.
        are_theirs = self._coco is None and len(class_names) == self.num_classes and not are_numbers(class_names)
        if unlike := are_theirs and unlike_list(self.folder, class_names):
            if given is None:
                raise DataError(f"{unlike}; number the masks as these classes, or mend the file if it is wrong")
            say(f"{unlike}; {given} holds")
        if are_theirs and overrule is not None and not stated_classes(self.folder):
            say_order(class_names, them="the masks'", overrule=overrule, whose=whose)
        if source is None:
            return
        if self._coco is None:
            found, others = find_masks(self.folder, source.keys)
            others = [name for name in others if name not in found]  # images beside their masks
        else:
            found = {key: self._coco_names.get(key, "") for key in source.keys}
            others = sorted({*self._coco.names}.difference(found.values()))
        # A path from elsewhere (an absolute one in a list) has its mask beside it.
        missing = [key for key, mask in found.items() if not mask and key not in self] if all_needed else []
        if missing:
            expected = "" if self._coco else f"; expected {next(mask_names(missing[0]))} for {missing[0]}"
            raise DataError(
                f"{self.folder}: {len(missing):,} of {len(source):,} images have no mask there "
                f"({listed(missing)}){expected}"
            )
        if others and any(found.values()):
            say(f"{self.folder}: {len(others):,} masks belong to no image and are skipped ({listed(others)})")
        there = np.array([i for i, mask in enumerate(found.values()) if mask] or range(len(source)))
        drawn = there[np.linspace(0, len(there) - 1, min(len(there), NUM_CHECKED)).astype(int)]
        held = self._held(source, drawn.tolist())
        if strange := sorted({*held} - {*range(self.num_classes), self._ignored}):
            raise DataError(
                f"{held[strange[0]]}: holds {listed(list(map(str, strange)))}, which is no id of {self.num_classes:,} "
                f"classes (0 = {class_names[0]} to {self.num_classes - 1} = {class_names[-1]}) nor of none "
                f"({self._ignored}): --ignore-index sets the id of none, --class-map FILE of `annotate` maps all others"
            )
        if self.is_assumed and self.num_classes > 255 and max(held, default=0) == 255:
            say(f"{self.folder}: 255 is the class {class_names[255]!r} of {self.num_classes:,}, nothing is 65535")
        elif self.is_assumed and {*held} == {0, 255} and len(np.unique(source.class_ids[drawn])) > 1:
            raise DataError(
                f"{self.folder}: masks hold 0 and 255 alone, and 255 stands for no class: only {class_names[0]!r} (0) "
                f"would be seen, never {listed(list(class_names[1:]))}; write class ids into the masks, or say "
                "--ignore-index 255 if this is what they mean"
            )

    def _held(self, source: ImageSource, indices: list[int]) -> dict[int, str]:
        """Return the values in masks, each with the path of one; print which masks are stretched over their image."""
        held, stretched = dict[int, str](), list[str]()
        for index in indices:
            with suppress(ValueError):  # the error is raised when this mask or image is used
                path, values = self._read(key := source.keys[index])
                held |= dict.fromkeys(np.unique(values).tolist(), str(path))
                stretched += [key] if is_stretched(values.shape, source.read(index), image=key) else []
        if stretched:
            say(
                f"{self.folder}: {len(stretched):,} of {len(indices):,} masks that were looked at have another aspect "
                f"ratio than their image ({listed(stretched)}), over which they are stretched"
            )
        return held

    def _read(self, key: str) -> tuple[Path, NDArray[np.integer]]:
        """Return the path of an image's mask, and its values [height, width]."""
        if self._coco is not None:
            name = self._coco_names.get(key)
            if name is None:
                raise DataError(f"{self.folder}: has no mask of {key}")
            path, mask, values = self.folder, f"{self.folder}: the mask of {name}", self._ids[self._coco.read(name)]
        else:
            mask = str(path := self._path(key))
            try:
                data = path.read_bytes()
            except OSError as error:
                raise DataError(f"{path}: the mask of {key} cannot be read ({error.strerror})") from error
            values = decode_mask(data, mask)
        if self._source is not None and (index := self._indices.get(key)) is not None:
            check_upright(values.shape, self._source.read(index), mask=mask, image=key)
        return path, values

    def _path(self, key: str) -> Path:
        paths = [self.folder / name for name in mask_names(key)]
        return next((path for path in paths if path.exists()), paths[0])

    @cached_property
    def _coco_names(self) -> dict[str, str]:
        """The names of the images in COCO's file, by their keys."""
        assert self._coco is not None
        return self._coco.names_of(self._coco.names if self._source is None else self._source.keys)

    @cached_property
    def _indices(self) -> dict[str, int]:
        return {} if self._source is None else {key: i for i, key in enumerate(self._source.keys)}

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the indices of the images when pickled: they may be large, and each process makes its own."""
        own = ("_indices", "_coco_names")
        return {name: value for name, value in vars(self).items() if name not in own}


def stated_classes(masks: Path) -> list[str]:
    """Return the classes of the values of masks: COCO's categories, or the list in classes.txt beside a folder.

    Empty where there is no such list.
    """
    if masks.suffix == COCO_SUFFIX:
        return CocoMasks(masks).class_names
    path = masks.parent / CLASSES_FILE
    return read_class_names(path, of_masks=True) if path.is_file() else []


def agreement(guess: TokenTargets, truth: TokenTargets, num_classes: int) -> tuple[int, int]:
    """Return for how many object tokens `guess` (aligned scores of a teacher) is right, and how many it labels.

    Tokens outside of what the teacher saw have no label, and do not count.
    """
    objects, classes = object_tokens(truth)
    objects &= guess.weight > 0
    right = objects & (guess.dense(num_classes).argmax(dim=2) == classes)
    return int(right.sum()), int(objects.sum())


def mask_agreement(
    store: LabelStore, masks: str | Path, *, source: ImageSource | None = None, ignore_index: int | None = None
) -> float:
    """Return the share of a store's cells, of those whose mask shows an object, whose best class is the mask's.

    `masks`, `ignore_index`: see `MaskFolder`. Prints how many images have a mask; the others are left out. `source`:
    the images, for their orientation.
    """
    num_classes, names = store.manifest.num_classes, store.manifest.class_names
    truth_of = MaskFolder(masks, num_classes=num_classes, ignore_index=ignore_index, source=source, class_names=names)
    teacher = store.manifest.teacher
    are_masks_own = "masks" in (teacher.get("name"), (teacher.get("head_fitted") or {}).get("from"))
    overrule = None if are_masks_own else "write the ids of the labels' classes if not"
    every = names or tuple(map(str, range(num_classes)))
    truth_of.check(every, all_needed=False, overrule=overrule, whose="the labels'")
    is_stored, indices = store.manifest.orientation == Orientation.STORED, {}
    if is_stored and source is not None:
        indices = {key: index for index, key in enumerate(source.keys)}
    elif is_stored:
        say("the maps lie as the files store their pixels: name the images (--images) if any have an orientation tag")
    keys = [*store.keys()]
    with_mask = [key for key in keys if key in truth_of]
    if not with_mask:
        expected = f"; expected {next(mask_names(keys[0]))} for {keys[0]}" if keys else ""
        raise ValueError(f"{masks}: no mask of any of {len(keys):,} labelled images there ({listed(keys)}){expected}")
    if len(with_mask) < len(keys):
        say(f"{masks}: {len(with_mask):,} of {len(keys):,} labelled images have a mask there; these are compared")
    right = total = 0
    for key in with_mask:
        score_map = store[key]
        if source is not None and key in indices:
            score_map = turned_map(score_map, orientation_of(source.read(indices[key])))
        height, width, _ = score_map.codes.shape
        # In a view of the teacher's region, and on a grid of the map's size, each token is one cell.
        seen = torch.from_numpy(stack_views([View.crop(score_map.region)]))
        guess, truth = (align(collate_score_maps([m]), seen, (height, width)) for m in (score_map, truth_of[key]))
        counts = agreement(guess, truth, num_classes)
        right, total = right + counts[0], total + counts[1]
    if not total:
        raise ValueError(f"{masks}: no mask shows an object in any cell of the maps")
    return right / total
