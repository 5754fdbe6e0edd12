"""Label maps of a store as segmentation targets: checks against the masks, the grid, and the target of each cell."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Int, Int16
from numpy.typing import NDArray

from tokenlabel.core.align import align
from tokenlabel.core.config import TokenChoice
from tokenlabel.core.step import are_confident
from tokenlabel.core.targets import TokenTargets
from tokenlabel.data.classes import difference, same_classes
from tokenlabel.labels.fingerprints import say_replaced
from tokenlabel.labels.store import LabelStore
from tokenlabel.runtime.distributed import current_ranks
from tokenlabel.runtime.errors import DataError
from tokenlabel.runtime.process import listed, say
from tokenlabel.segmentation.data import SegmentBatch, fitted_size
from tokenlabel.segmentation.pairs import IGNORED, ImageMaskPairs
from tokenlabel.segmentation.recipe import SegmentAugmentConfig, SegmentDataConfig, SegmentLossConfig

_NUM_COMPARED = 100  # masks that are compared with the cells of label maps
_MOST_FINER = 4  # the default grid of label maps is at most this many times as fine as the head's


def soft_targets(batch: SegmentBatch, grid: tuple[int, int], config: SegmentLossConfig) -> TokenTargets:
    """Return the targets at each cell of a grid (h, w) of the images in `batch.soft`.

    Maps are aligned with the augmented pixels. Cells outside an image, and images without a map, have weight 0.
    """
    assert batch.score_maps is not None
    assert batch.views is not None
    targets = align(batch.score_maps, batch.views, grid)
    if config.tokens is TokenChoice.CONFIDENT:
        are_sure = are_confident(targets, config.token_threshold)
        targets = targets.scaled(are_sure.to(targets.weight.dtype))
    return targets.hardened() if config.hard else targets


def open_labels(config: SegmentDataConfig, pairs: ImageMaskPairs) -> LabelStore | None:
    """Return the label store for images without masks, None if the recipe names none.

    Raises DataError for labels of other classes than those of the masks.
    """
    folders = config.label_folders
    if not folders:
        return None
    # Opened on the first rank and sent to all: labels may be added meanwhile, and all ranks must see the same ones.
    store = current_ranks().on_main(lambda: LabelStore(*folders))
    names, theirs = pairs.classes.names, store.manifest.classes
    if theirs.words or (theirs.names and not same_classes(theirs.names, names)) or theirs.count != len(names):
        unlike = (
            f"they are about {theirs.described()}"
            if theirs.words
            else difference(theirs.names, names, count=theirs.count, them="the labels")
        )
        raise DataError(
            f"{', '.join(folders)}: labels of other classes than the masks': {unlike}; let `tokenlabel annotate` make "
            "them by a teacher of these classes, or give these as data.class_names"
        )
    return store


def check_labels(store: LabelStore, pairs: ImageMaskPairs) -> int:
    """Return how many images have neither mask nor label; print that, changed images, and classes too small for maps.

    Raises DataError if no image without a mask has a label.
    """
    bare = pairs.unmasked
    missing = [key for key in bare.keys if key not in store]
    counts = f"{len(missing):,} of {len(bare):,} images without a mask have no label ({listed(missing)})"
    if missing and len(missing) == len(bare):
        raise DataError(
            f"{counts}; the store is of other images, or keys are relative to another folder: give the store that "
            "`tokenlabel annotate` made of data.train"
        )
    if missing:
        say(f"{counts}: nothing is learnt from these; `tokenlabel annotate` labels what is missing")
    if len(bare):
        say_replaced(store, bare)
    else:
        say("all images have masks, and learn from these: the labels are not used")
    idle, too_small = _compared(store, pairs)
    if idle:
        say(
            f"the masks of {len(idle):,} labelled images, of up to {_NUM_COMPARED} that were looked at, hold nothing "
            f"that counts ({listed(idle)}): nothing is learnt from these images; without such a mask an image learns "
            "from its label map"
        )
    for name, share, grid in too_small:
        say(
            f"label maps of {grid[0]} x {grid[1]} cells are coarser than the objects of {name!r}: {share:.0%} of its "
            "pixels in masks lie in cells that show more of another class; `annotate --cells` makes finer maps"
        )
    return len(missing)


def finer_for_maps(
    store: LabelStore, pairs: ImageMaskPairs, augment: SegmentAugmentConfig, crop: tuple[tuple[int, int], ...]
) -> int:
    """Return how many times as fine as the head's grid label maps are along a side, at most `_MOST_FINER`.

    `crop`: (height, width) of a training crop, and (rows, columns) of the head for it. Measured on the first image with
    a label, at the geometric mean of the range of scales.
    """
    index = next((i for i, key in enumerate(pairs.keys) if key in store and not pairs.has_mask(i)), None)
    if index is None:
        return 1
    size_px = pairs.read(index)[0].shape[:2]
    factor = math.sqrt(augment.scale[0] * augment.scale[1])
    shown_px = fitted_size(size_px, augment.short_side_px, max_aspect=augment.max_aspect, factor=factor)
    cells = store[pairs.keys[index]].codes.shape[:2]
    finer = [
        side_cells / side_px * crop_px / head_cells
        for side_cells, side_px, crop_px, head_cells in zip(cells, shown_px, *crop, strict=True)
    ]
    return min(max(1, round(math.sqrt(finer[0] * finer[1]))), _MOST_FINER)


def _compared(store: LabelStore, pairs: ImageMaskPairs) -> tuple[list[str], list[tuple[str, float, tuple[int, int]]]]:
    """Look at some masks beside label maps: return what the ones lack that the others have, and the other way round.

    First the images with a label in whose masks nothing counts. Then the classes most of whose pixels are in cells of
    label maps that show more of another class, each with the share of these pixels and a map's (rows, columns); masks
    are compared with the grid of their own maps, or of any other map where they have none.
    """
    others = next((key for key in pairs.keys if key in store), None)
    if others is None or not pairs.with_mask:
        return [], []
    idle = list[str]()
    num_classes = len(pairs.classes.names)
    lost, pixels, grid = np.zeros(num_classes), np.zeros(num_classes), (1, 1)
    chosen = np.linspace(0, len(pairs.with_mask) - 1, min(_NUM_COMPARED, len(pairs.with_mask))).astype(int)
    for index in np.array(pairs.with_mask)[chosen].tolist():
        key, (_, mask) = pairs.keys[index], pairs.read(index)
        if key in store and not (mask != IGNORED).any():
            idle.append(key)
        height, width = store[key if key in store else others].codes.shape[:2]
        grid = (height, width)
        counts = _class_counts(mask, grid, num_classes)
        is_most = counts.argmax(axis=1)[:, None] == np.arange(num_classes)
        lost += (counts * ~is_most).sum(axis=0)
        pixels += counts.sum(axis=0)
    shares = lost / np.maximum(pixels, 1)
    return idle, [(pairs.classes.names[i], float(shares[i]), grid) for i in np.flatnonzero(shares > 0.5)]


def _class_counts(
    mask: Int16[NDArray[np.int16], "height width"], grid: tuple[int, int], num_classes: int
) -> Int[NDArray[np.int64], "N C"]:
    """Return the number of pixels of each class in each cell of a grid (h, w) over a mask, row by row."""
    rows, columns = ((np.arange(side) * cells) // side for side, cells in zip(mask.shape, grid, strict=True))
    cells = rows[:, None] * grid[1] + columns
    counted = mask != IGNORED
    # A number for each pair of cell and class, so that one bincount does it.
    places = cells[counted] * num_classes + mask[counted]
    return np.bincount(places, minlength=grid[0] * grid[1] * num_classes).reshape(-1, num_classes)
