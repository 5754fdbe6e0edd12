"""What a study makes worse on purpose, for comparisons: labels on wrong places, a token head that begins anew.

No recipe names a defect and no option of training makes one. Each of `DEFECTS` is a function from a correct sample to a
sample that is labelled as published code would have it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from tokenlabel.classification.task import ClassifierTask
from tokenlabel.core.batch import Sample
from tokenlabel.core.geometry import Box, View
from tokenlabel.core.scores import ScoreMap
from tokenlabel.data.batches import SampleIndex, TokenLabelDataset

# How far `shifted` moves labels, in cells of the map along both axes: half a cell is what a reader of maps loses
# who takes a cell's corner for its centre, a whole one what two such errors make.
SHIFT_CELLS = 0.5
# Cells become so many times as many, all alike, so that reading between them finds the nearest.
_COPIES = 16


def swapped(sample: Sample) -> Sample:
    """Take x for y in the place and the size of the crop (top, left, height, width for x1, y1, x2, y2).

    Crops and flips only, as in the published code; other warps are left out.
    """
    scale = np.diagonal(sample.view.matrix[:, :2])  # (x, y); negative where the crop was turned over afterwards
    start = sample.view.matrix[:, 2] + np.minimum(scale, 0)
    (left, top), (width, height) = start[::-1], abs(scale)[::-1]
    view = View.crop(Box(left, top, left + width, top + height))
    for turned, flip in zip(scale < 0, (View.flip_horizontal(), View.flip_vertical()), strict=True):
        view = view.then(flip) if turned else view
    return replace(sample, view=view)


def shifted(sample: Sample) -> Sample:
    """Read the map half a cell to the right of and below the place."""
    score_map = _map_of(sample)
    height, width = score_map.codes.shape[:2]
    region = score_map.region
    right, down = SHIFT_CELLS * region.width / width, SHIFT_CELLS * region.height / height
    moved = Box(region.left - right, region.top - down, region.right - right, region.bottom - down)
    return replace(sample, score_map=replace(score_map, region=moved))


def stretched(sample: Sample) -> Sample:
    """Take the map of the part that the teacher saw for a map of the whole image."""
    return replace(sample, score_map=replace(_map_of(sample), region=Box()))


def nearest(sample: Sample) -> Sample:
    """Read the map cell that is nearest to each point, without interpolation."""
    score_map = _map_of(sample)
    codes, probs = (
        array.repeat(_COPIES, axis=0).repeat(_COPIES, axis=1) for array in (score_map.codes, score_map.probs)
    )
    return replace(sample, score_map=replace(score_map, codes=codes, probs=probs))


DEFECTS: dict[str, Callable[[Sample], Sample]] = {
    "swapped": swapped,
    "shifted": shifted,
    "stretched": stretched,
    "nearest": nearest,
}

# A token head that begins with random weights where it would begin as the classifier of the weights' file.
NEW_TOKEN_HEAD = "new_token_head"


def make_worse(task: ClassifierTask, defect: str, *, seed: int) -> None:
    """Give a task a defect, before it is trained."""
    if defect != NEW_TOKEN_HEAD:
        task.train_set = DefectiveDataset(task.train_set, defect)
        return
    head = task.model.token_head
    assert isinstance(head, nn.Linear), f"{defect}: the token head is no linear layer"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        nn.init.trunc_normal_(head.weight.data, std=0.02)
    nn.init.zeros_(head.bias.data)


class DefectiveDataset(TokenLabelDataset):
    """A training set whose labels have a defect; images, classes and random draws are those of the original."""

    def __init__(self, dataset: TokenLabelDataset, defect: str) -> None:
        super().__init__(dataset.source, dataset.transform, seed=dataset.seed, store=dataset.store)
        self.defect = defect

    def __getitems__(self, indices: Sequence[SampleIndex]) -> list[Sample]:
        """Return samples with wrongly placed labels."""
        return [DEFECTS[self.defect](sample) for sample in super().__getitems__(indices)]


def _map_of(sample: Sample) -> ScoreMap:
    if sample.score_map is None:
        raise ValueError(f"{sample.key} has no score map: a defect of labels needs a run with token labels")
    return sample.score_map
