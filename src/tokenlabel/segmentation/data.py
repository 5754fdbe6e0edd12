"""Training samples: augment an image with its mask or label map, and collate batches, by (seed, epoch, index)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int16, UInt8
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from tokenlabel.core.batch import ScoreMapBatch, collate_score_maps
from tokenlabel.core.geometry import Box, View, stack_views
from tokenlabel.core.scores import Orientation, ScoreMap, turned_map, unknown_map
from tokenlabel.data.config import Interpolation
from tokenlabel.data.resampling import MEAN_COLOUR, resize
from tokenlabel.labels.store import LabelStore
from tokenlabel.runtime.coercion import Size, pair
from tokenlabel.segmentation.pairs import IGNORED, ImageMaskPairs
from tokenlabel.segmentation.recipe import SegmentAugmentConfig

Pixels = UInt8[NDArray[np.uint8], "height width 3"]
Mask = Int16[NDArray[np.int16], "height width"]  # class ids, -1 where a pixel is ignored
# Of another size than their input.
NewPixels = UInt8[NDArray[np.uint8], "new_height new_width 3"]
NewMask = Int16[NDArray[np.int16], "new_height new_width"]

NUM_CROP_TRIES = 10
# Photometric distortion as published; each change is applied with probability 1/2.
BRIGHTNESS = 32.0  # added, in levels of 255
CONTRAST = SATURATION = (0.5, 1.5)  # factors
HUE = 18 / 180  # fraction of the colour circle

# Keys the random generator of a sample, so that it shares no draws with the image order or a classifier's samples.
_FOR_SEGMENT_SAMPLE = 2


class SegmentTransform:
    """Random resize, crop, flip and colour distortion, as published for ADE20K. `img_size`: (height, width)."""

    def __init__(self, config: SegmentAugmentConfig, img_size: Size) -> None:
        self.config, self.img_size = config, pair(img_size)

    def __call__(self, pixels: Pixels, mask: Mask | None, rng: np.random.Generator) -> tuple[NewPixels, NewMask, View]:
        """Return the augmented pixels and class ids, both of `img_size`, and the view that maps them to the image.

        Pixels outside the image have the mean colour and are ignored. Without a mask all pixels are ignored, and the
        first random crop is taken.
        """
        config = self.config
        factor = rng.uniform(*config.scale)
        size_px = fitted_size(pixels.shape[:2], config.short_side_px, max_aspect=config.max_aspect, factor=factor)
        max_ratio = 1.0 if mask is None else config.category_max_ratio
        mask = np.full(size_px, IGNORED, np.int16) if mask is None else resize_mask(mask, size_px)
        top, left = draw_crop(mask, self.img_size, max_ratio=max_ratio, rng=rng)
        pixels = resize(pixels, size_px, Interpolation.BILINEAR)
        window = (slice(top, top + self.img_size[0]), slice(left, left + self.img_size[1]))
        pixels, mask = pixels[window], mask[window]
        height, width = mask.shape
        box = Box.from_pixels(left_px=left, top_px=top, width_px=width, height_px=height, img_size=size_px)
        view = View.crop(box)
        if rng.random() < config.horizontal_flip:
            pixels, mask, view = pixels[:, ::-1], mask[:, ::-1], view.then(View.flip_horizontal())
        # A "crop" beyond the right and bottom edges is the padding.
        view = view.then(View.crop(Box(right=self.img_size[1] / width, bottom=self.img_size[0] / height)))
        if config.photometric:
            pixels = distorted(pixels, rng)
        return *padded(pixels, mask, self.img_size), view


def fitted_size(
    size_px: tuple[int, ...], short_side_px: int | None, *, max_aspect: float, factor: float = 1.0
) -> tuple[int, int]:
    """Return the (height, width) to resize an image to, keeping its aspect ratio.

    The shorter side becomes `short_side_px` (None: unchanged), but the longer one at most `max_aspect` times that;
    both are then multiplied by `factor`.
    """
    height, width = size_px
    if short_side_px is not None:
        factor *= min(short_side_px / min(height, width), max_aspect * short_side_px / max(height, width))
    return max(1, round(height * factor)), max(1, round(width * factor))


def resize_mask(mask: Mask, size_px: tuple[int, int]) -> NewMask:
    """Return a mask resized to (height, width): each pixel takes the class at its centre."""
    rows, columns = (
        ((np.arange(new) + 0.5) * (old / new)).astype(np.int64) for new, old in zip(size_px, mask.shape, strict=True)
    )
    return mask[rows[:, None], columns]


def draw_crop(mask: Mask, size_px: tuple[int, int], *, max_ratio: float, rng: np.random.Generator) -> tuple[int, int]:
    """Return top and left of a random crop of (height, width) that lies inside the image where that is large enough.

    A crop that shows only one class, or one class on more than `max_ratio` of its labelled pixels, is drawn again, up
    to ten times.
    """
    height, width = size_px
    top = left = 0
    for _ in range(NUM_CROP_TRIES):
        top, left = (int(rng.integers(max(0, have - want) + 1)) for have, want in zip(mask.shape, size_px, strict=True))
        if max_ratio >= 1:
            break
        window = mask[top : top + height, left : left + width]
        # The published rule, which keeps large areas (sky, road) from filling most crops.
        counts = np.bincount((window - IGNORED).ravel())[1:]  # bincount takes no negative numbers
        if np.count_nonzero(counts) > 1 and counts.max() < max_ratio * counts.sum():
            break
    return top, left


def padded(pixels: Pixels, mask: Mask, size_px: tuple[int, int]) -> tuple[NewPixels, NewMask]:
    """Return image and mask padded at the right and bottom to (height, width): mean colour, ignored."""
    height, width = mask.shape
    full_pixels = np.full((*size_px, 3), MEAN_COLOUR, np.uint8)
    full_mask = np.full(size_px, IGNORED, np.int16)
    full_pixels[:height, :width], full_mask[:height, :width] = pixels, mask
    return full_pixels, full_mask


def distorted(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    """Return pixels with changed brightness, contrast, saturation and hue, each with probability 1/2.

    Contrast multiplies all levels, before or after saturation and hue. Source: Howard, "Some Improvements on Deep
    Convolutional Neural Network Based Image Classification", 2013, in the form of SSD and its successors.
    """
    # All numbers are drawn whatever is applied, so the generator moves on by the same amount for every image.
    *happens, contrast_first = (rng.random(5) < 0.5).tolist()
    brightness, contrast = rng.uniform(-BRIGHTNESS, BRIGHTNESS), rng.uniform(*CONTRAST)
    saturation, hue = rng.uniform(*SATURATION), rng.uniform(-HUE, HUE)
    levels = pixels
    if happens[0]:
        levels = _clipped(levels + np.float32(brightness))
    if happens[1] and contrast_first:
        levels = _clipped(levels * np.float32(contrast))
    if happens[2] or happens[3]:
        hsv = np.array(Image.fromarray(np.ascontiguousarray(levels)).convert("HSV"))
        if happens[3]:
            hsv[..., 0] += np.uint8(round(hue * 256) % 256)  # overflow of uint8 is the wrap around of hues
        if happens[2]:
            hsv[..., 1] = _clipped(hsv[..., 1] * np.float32(saturation))
        levels = np.array(Image.fromarray(hsv, "HSV").convert("RGB"))
    if happens[1] and not contrast_first:
        levels = _clipped(levels * np.float32(contrast))
    return levels


def _clipped(levels: NDArray[np.floating]) -> NDArray[np.uint8]:
    return levels.clip(0, 255).astype(np.uint8)


@dataclass(frozen=True, slots=True, eq=False)
class SegmentSample:
    """An image and the class id of each pixel, -1 where it is ignored.

    `view` maps the augmented image to the original. `score_map`, of the whole upright image, takes the place of the
    mask for images without one.
    """

    image: UInt8[Tensor, "3 height width"]
    mask: Int16[Tensor, "height width"]
    key: str
    view: View
    score_map: ScoreMap | None = None


@dataclass(frozen=True, eq=False)
class SegmentBatch:
    """A batch of B images of one size with their targets.

    `masks`: class ids, -1 where ignored. `masked`: indices of the images with a mask; `soft`: of the S others, which
    learn from the label maps in `score_maps`, seen through `views`.
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
        maps = None if self.score_maps is None else self.score_maps.to(device)
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=True), maps)

    def pin_memory(self) -> SegmentBatch:
        """Return the batch in page-locked memory; called by the data loader."""
        return self._mapped(Tensor.pin_memory, None if self.score_maps is None else self.score_maps.pin_memory())

    def _mapped(self, function: Callable[[Tensor], Tensor], score_maps: ScoreMapBatch | None) -> SegmentBatch:
        views = None if self.views is None else function(self.views)
        images, masks = function(self.images), function(self.masks)
        return replace(self, images=images, masks=masks, views=views, score_maps=score_maps)


class SegmentDataset(Dataset[SegmentSample]):
    """Samples as `dataset[epoch, index]`, augmented by `transform` if there is one.

    `store`: label maps by key, for images without a mask. An image with neither has weight 0.
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
        """Return the number of images."""
        return len(self.pairs)

    def _score_map(self, index: int) -> ScoreMap:
        """Return the upright score map of an image; one of weight 0 for an image without a label."""
        key, store = self.pairs.keys[index], self.store
        assert store is not None
        if key not in store:
            return unknown_map(store.manifest.num_classes, kind=store.manifest.kind)
        # Old stores hold maps of the pixels as the file stores them, before its orientation tag is applied.
        is_stored = store.manifest.orientation == Orientation.STORED
        return turned_map(store[key], self.pairs.orientation(index) if is_stored else 1)


def collate(samples: Sequence[SegmentSample]) -> SegmentBatch:
    """Stack samples of one size; images are channels last in memory."""
    # Stacking [height, width, 3] and permuting gives channels_last strides without another copy.
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
