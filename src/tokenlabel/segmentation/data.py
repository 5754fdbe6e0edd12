"""From pairs of images and masks to batches, as a function of (seed, epoch, index)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int16, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from tokenlabel.segmentation.augment import SegmentTransform
from tokenlabel.segmentation.pairs import ImageMaskPairs

# What the draws of a sample are for: other than the order of the images and the samples of a classifier.
_FOR_SEGMENT_SAMPLE = 2


@dataclass(frozen=True, slots=True, eq=False)
class SegmentSample:
    """An image and the class id of each of its pixels, -1 where none counts."""

    image: UInt8[Tensor, "3 height width"]
    mask: Int16[Tensor, "height width"]
    key: str


@dataclass(frozen=True, eq=False)
class SegmentBatch:
    """B images of one size with their masks of class ids, -1 where none counts."""

    images: UInt8[Tensor, "B 3 height width"]
    masks: Int16[Tensor, "B height width"]
    keys: list[str]

    def to(self, device: torch.device) -> SegmentBatch:
        """Return the batch on another device."""
        images, masks = (part.to(device, non_blocking=True) for part in (self.images, self.masks))
        return SegmentBatch(images, masks, self.keys)

    def pin_memory(self) -> SegmentBatch:
        """Return the batch in page-locked memory (the data loader calls this)."""
        return SegmentBatch(self.images.pin_memory(), self.masks.pin_memory(), self.keys)


class SegmentDataset(Dataset[SegmentSample]):
    """Pairs as `dataset[epoch, index]`: augmented by a transform, or as they are without one."""

    def __init__(self, pairs: ImageMaskPairs, transform: SegmentTransform | None, *, seed: int = 0) -> None:
        self.pairs, self.transform, self.seed = pairs, transform, seed

    def __getitem__(self, epoch_and_index: tuple[int, int]) -> SegmentSample:
        epoch, index = epoch_and_index
        pixels, mask = self.pairs.read(index)
        if self.transform is not None:
            rng = np.random.default_rng((self.seed, _FOR_SEGMENT_SAMPLE, epoch, index))
            pixels, mask = self.transform(pixels, mask, rng)
        return SegmentSample(
            image=torch.from_numpy(pixels).permute(2, 0, 1),
            mask=torch.from_numpy(mask),
            key=self.pairs.keys[index],
        )

    def __len__(self) -> int:
        """Return how many pairs there are."""
        return len(self.pairs)


def collate(samples: Sequence[SegmentSample]) -> SegmentBatch:
    """Stack samples of one size; images are laid out channels last in memory."""
    pixels = torch.stack([sample.image.permute(1, 2, 0) for sample in samples])  # [B, height, width, 3]
    return SegmentBatch(
        images=pixels.permute(0, 3, 1, 2),
        masks=torch.stack([sample.mask for sample in samples]),
        keys=[sample.key for sample in samples],
    )
