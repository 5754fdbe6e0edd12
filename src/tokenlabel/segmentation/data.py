"""From images with masks, label maps or both to batches, as a function of (seed, epoch, index)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int16, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from tokenlabel.core.batch import ScoreMapBatch, collate_score_maps
from tokenlabel.core.geometry import View, stack_views
from tokenlabel.core.scores import Orientation, ScoreMap, turned_map, unknown_map
from tokenlabel.labels.store import LabelStore
from tokenlabel.segmentation.augment import SegmentTransform
from tokenlabel.segmentation.pairs import ImageMaskPairs

# What the draws of a sample are for: other than the order of the images and the samples of a classifier.
_FOR_SEGMENT_SAMPLE = 2


@dataclass(frozen=True, slots=True, eq=False)
class SegmentSample:
    """An image and the class id of each of its pixels, -1 where none counts.

    `score_map`: of the whole upright image, for images that have no mask to learn from; `view`: what of it is shown.
    """

    image: UInt8[Tensor, "3 height width"]
    mask: Int16[Tensor, "height width"]
    key: str
    view: View
    score_map: ScoreMap | None = None


@dataclass(frozen=True, eq=False)
class SegmentBatch:
    """B images of one size, and what they learn from.

    `masks`: class ids, -1 where none counts. `masked`, `soft`: the numbers of the images that have a mask, and of those
    that learn from a label map instead, of which `score_maps` and `views` are. Every image is one or the other.
    """

    images: UInt8[Tensor, "B 3 height width"]
    masks: Int16[Tensor, "B height width"]
    keys: list[str]
    masked: list[int]
    soft: list[int]
    views: Float[Tensor, "S F 2 3"] | None = None
    score_maps: ScoreMapBatch | None = None

    def to(self, device: torch.device) -> SegmentBatch:
        """Return the batch on another device."""
        images, masks = (part.to(device, non_blocking=True) for part in (self.images, self.masks))
        views = None if self.views is None else self.views.to(device, non_blocking=True)
        score_maps = None if self.score_maps is None else self.score_maps.to(device)
        return replace(self, images=images, masks=masks, views=views, score_maps=score_maps)

    def pin_memory(self) -> SegmentBatch:
        """Return the batch in page-locked memory (the data loader calls this)."""
        return replace(
            self,
            images=self.images.pin_memory(),
            masks=self.masks.pin_memory(),
            views=None if self.views is None else self.views.pin_memory(),
            score_maps=None if self.score_maps is None else self.score_maps.pin_memory(),
        )


class SegmentDataset(Dataset[SegmentSample]):
    """Images as `dataset[epoch, index]`: augmented by a transform, or as they are without one.

    `store`: label maps of images without a mask, by their keys; one that has neither learns from nothing.
    """

    def __init__(
        self,
        pairs: ImageMaskPairs,
        transform: SegmentTransform | None,
        *,
        seed: int = 0,
        store: LabelStore | None = None,
    ) -> None:
        self.pairs, self.transform, self.seed, self.store = pairs, transform, seed, store

    def __getitem__(self, epoch_and_index: tuple[int, int]) -> SegmentSample:
        epoch, index = epoch_and_index
        pixels, mask = self.pairs.read(index)
        has_mask, view = self.pairs.has_mask(index), View.identity()
        if self.transform is not None:
            rng = np.random.default_rng((self.seed, _FOR_SEGMENT_SAMPLE, epoch, index))
            pixels, mask, view = self.transform(pixels, mask if has_mask else None, rng)
        return SegmentSample(
            image=torch.from_numpy(pixels).permute(2, 0, 1),
            mask=torch.from_numpy(mask),
            key=self.pairs.keys[index],
            view=view,
            score_map=None if has_mask else self._score_map(index),
        )

    def __len__(self) -> int:
        """Return how many images there are."""
        return len(self.pairs)

    def _score_map(self, index: int) -> ScoreMap:
        """Return the upright score map of an image; of one without a label a map that says nothing."""
        key, store = self.pairs.keys[index], self.store
        assert store is not None
        if key not in store:
            return unknown_map(store.manifest.num_classes, kind=store.manifest.kind)
        is_stored = store.manifest.orientation == Orientation.STORED
        return turned_map(store[key], self.pairs.orientation(index) if is_stored else 1)


def collate(samples: Sequence[SegmentSample]) -> SegmentBatch:
    """Stack samples of one size; images are laid out channels last in memory."""
    pixels = torch.stack([sample.image.permute(1, 2, 0) for sample in samples])  # [B, height, width, 3]
    soft = [number for number, sample in enumerate(samples) if sample.score_map is not None]
    maps = [sample.score_map for sample in samples if sample.score_map is not None]
    return SegmentBatch(
        images=pixels.permute(0, 3, 1, 2),
        masks=torch.stack([sample.mask for sample in samples]),
        keys=[sample.key for sample in samples],
        masked=[number for number, sample in enumerate(samples) if sample.score_map is None],
        soft=soft,
        views=torch.from_numpy(stack_views([samples[number].view for number in soft])) if soft else None,
        score_maps=collate_score_maps(maps) if maps else None,
    )
