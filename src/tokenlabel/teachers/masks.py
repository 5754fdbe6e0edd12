"""Segmentation masks in place of a teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from tokenlabel.core.scores import ScoreMap, from_mask, from_top
from tokenlabel.data.images import ImageSource
from tokenlabel.evaluation.masks import MaskFolder
from tokenlabel.teachers.classmap import ClassMap
from tokenlabel.teachers.input import cells_of

MAX_IDS = 65_536  # ids of a mask, which has up to 16 bits


class MaskTeacher:
    """Turns masks into score maps.

    `class_names`: of the labels. `size`: masks of more than size x size pixels are averaged down to cells of that
    area, at their own aspect ratio: a cell has the share of each class in it, and the share of pixels without a class
    is spread evenly over all classes. None keeps every pixel. `class_map`: from the masks' ids to the classes; ids that
    it maps to none are unlabelled. `folder`, `ignore_index`, `source`: see `MaskFolder`.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        class_names: Sequence[str],
        size: int | None = None,
        class_map: ClassMap | None = None,
        ignore_index: int | None = None,
        source: ImageSource | None = None,
    ) -> None:
        self.class_names, self.num_classes = tuple(class_names), len(class_names)
        self._size, self._class_map = size, class_map
        about = None
        if class_map:  # without the ids behind the last one that is mapped (but at least 255): the manifest stays small
            num_used = max(255, 1 + int(np.flatnonzero(class_map.targets >= 0).max(initial=0)))
            about = replace(class_map, targets=class_map.targets[:num_used], outside="spread").description
        self.masks = MaskFolder(
            Path(folder),
            num_classes=MAX_IDS if class_map else self.num_classes,
            ignore_index=-1 if class_map else ignore_index,  # with a class map, ids that it does not map are no class
            source=source,
            class_names=() if class_map else class_names,
        )
        self.held: set[int] = set()  # the classes that masks have shown so far
        self.description: dict[str, Any] = {"name": "masks", "class_map": about, "unlabelled": "spread evenly"}
        self.preprocessing: dict[str, Any] = {"size": size}
        if ignore_index is not None:
            self.preprocessing["ignore_index"] = ignore_index

    def score_map(self, key: str, topk: int) -> ScoreMap:
        """Return the score map of an image, at most `topk` classes a cell.

        Raises DataError for a mask that cannot be read, another ValueError for ids that are no class.
        """
        mask = self.masks[key]
        grid = (height, width) = mask.codes.shape[:2]
        if self._size is not None and height * width > self._size**2:
            grid = cells_of(grid, self._size)
        planes = shares(mask, grid)  # [h, w, U]
        ids = mask.palette if self._class_map is None else self._class_map.targets[mask.palette]
        found, entry = np.unique(ids[ids >= 0], return_inverse=True)
        if len(found) == 0:
            nothing = np.full(planes.shape[:2], -1)
            return from_mask(nothing, num_classes=self.num_classes, unlabelled=-1, name=key)
        # Several ids may be mapped to one class: a product with one-hot rows adds up their shares.
        merged = planes[:, :, ids >= 0] @ np.eye(len(found), dtype=np.float32)[entry]  # [h, w, classes]
        self.held.update(found[merged.any(axis=(0, 1))].tolist())
        unlabelled = 1 - merged.sum(axis=2, keepdims=True)
        # The unlabelled share is spread evenly: kept classes get their part here, the others as the cell's rest.
        merged += np.where(merged > 0, unlabelled / self.num_classes, 0)
        num_kept = min(topk, max(1, int((merged > 0).sum(axis=2).max())))
        kept = np.argsort(-merged, axis=2, kind="stable")[:, :, :num_kept]
        probs = np.take_along_axis(merged, kept, axis=2)
        return from_top(found[kept], probs, num_classes=self.num_classes, name=key)


def shares(score_map: ScoreMap, grid: tuple[int, int]) -> NDArray[np.float32]:
    """Return the probability of each palette entry on another grid [h, w, U], averaged over areas."""
    height, width, _ = score_map.codes.shape
    planes = np.zeros((len(score_map.palette), height, width), np.float32)
    rows, columns = np.ogrid[:height, :width]
    np.add.at(planes, (score_map.codes, rows[..., None], columns[..., None]), score_map.probs)
    averaged = F.adaptive_avg_pool2d(torch.from_numpy(planes), grid)
    return averaged.permute(1, 2, 0).numpy()
