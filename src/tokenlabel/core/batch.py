"""What the data hand to a step: score maps, samples and batches as tensors, and pixels as models take them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Integer, UInt8
from torch import Tensor

from tokenlabel.core.geometry import View
from tokenlabel.core.scores import SUM_TOLERANCE, Kind, ScoreMap, check_map
from tokenlabel.core.targets import TokenTargets, class_targets
from tokenlabel.runtime.coercion import check_several, described


@dataclass(frozen=True, eq=False)
class ScoreMapBatch:
    """Score maps of a batch as tensors, padded to the largest map and palette of the batch.

    `classes`: palettes. `codes`, `probs`: as in ScoreMap; maps sit in the top left corner of the padded ones.
    `sizes`: (W, H) of each map. `shapes`: the same as (H, W) in Python ints, which take no device sync to read.
    `regions`: (left, top, right, bottom) of what the teacher saw. `empty_is_even`: see `ScoreMap`. `kind`: what `probs`
    are; padding is 0, or minus infinity among logits.
    """

    classes: Int[Tensor, "B U"]
    codes: Integer[Tensor, "B H W K"]
    probs: Float[Tensor, "B H W K"]
    sizes: Float[Tensor, "B 2"]
    regions: Float[Tensor, "B 4"]
    empty_is_even: Bool[Tensor, " B"]
    num_classes: int
    shapes: tuple[tuple[int, int], ...]
    kind: Kind = Kind.PROBABILITIES

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", Kind(self.kind))

    def to(self, device: torch.device | str) -> ScoreMapBatch:
        """Return the batch on another device."""
        return self._each(lambda tensor: moved(tensor, device))

    def pin_memory(self) -> ScoreMapBatch:
        """Return the batch in page-locked memory (the data loader calls this)."""
        return self._each(Tensor.pin_memory)

    def are_known(self) -> Bool[Tensor, " B"]:
        """Return which images have a map of their own; `scores.unknown_map` of the others lies outside of the image."""
        return (self.regions[:, :2] < 1).all(dim=1)

    def of_images(self, images: slice | list[int]) -> ScoreMapBatch:
        """Return the maps of some images of the batch; those of a slice are not copied."""
        numbers = range(len(self.shapes))[images] if isinstance(images, slice) else images
        shapes = tuple(self.shapes[number] for number in numbers)
        return replace(self._each(lambda tensor: tensor[images]), shapes=shapes)

    def _each(self, change: Callable[[Tensor], Tensor]) -> ScoreMapBatch:
        names = ("classes", "codes", "probs", "sizes", "regions", "empty_is_even")
        return replace(self, **{name: change(getattr(self, name)) for name in names})


def collate_score_maps(score_maps: Sequence[ScoreMap]) -> ScoreMapBatch:
    """Stack the score maps of a batch, which may differ in size, palette and K.

    Raises ValueError for maps over different numbers of classes, for maps of logits among others, and for values that
    no `ScoreMap` has: probabilities with a sum above 1, codes beyond the palette.

    >>> store = tl.LabelStore("labels")
    >>> maps = tl.collate_score_maps([store["ant/0.png"], store["bee/1.png"]])
    >>> maps.num_classes
    2
    """
    check_several(score_maps, ScoreMap, name="score_maps", made_by="store[key]")
    counts = sorted({m.num_classes for m in score_maps})
    if len(counts) > 1:
        raise ValueError(f"score maps over {counts} classes in one batch; all must be over the same classes")
    kind = score_maps[0].kind
    if any(m.kind is not kind for m in score_maps):
        raise ValueError("score maps of logits and of probabilities in one batch; take one label store for all images")
    num_maps = len(score_maps)
    height, width, topk = (max(m.codes.shape[axis] for m in score_maps) for axis in range(3))
    classes = np.zeros((num_maps, max(len(m.palette) for m in score_maps)), np.int64)
    codes = np.zeros((num_maps, height, width, topk), np.result_type(*(m.codes for m in score_maps)))
    padding = 0 if kind is Kind.PROBABILITIES else -np.inf
    probs = np.full((num_maps, height, width, topk), padding, np.float32)
    for i, m in enumerate(score_maps):
        h, w, k = m.codes.shape
        classes[i, : len(m.palette)] = m.palette
        codes[i, :h, :w, :k] = m.codes
        probs[i, :h, :w, :k] = m.probs
    # All at once, in a fraction of the time of `check_map`, which says what is wrong, and with which map.
    are_codes = codes.dtype.kind in "iu" and codes.min() >= 0
    are_codes = are_codes and all(codes.reshape(num_maps, -1).max(axis=1) < [len(m.palette) for m in score_maps])
    are_sound = are_codes and 0 <= classes.min() <= classes.max() < counts[0]
    if kind is Kind.PROBABILITIES:
        are_sound = are_sound and probs.min() >= 0 and np.einsum("bhwk->bhw", probs).max() <= 1 + SUM_TOLERANCE
    if not are_sound:
        for number, score_map in enumerate(score_maps):
            check_map(score_map, name=f"score_maps[{number}]")
    regions = [(m.region.left, m.region.top, m.region.right, m.region.bottom) for m in score_maps]
    return ScoreMapBatch(
        classes=torch.from_numpy(classes),
        codes=torch.from_numpy(codes),
        probs=torch.from_numpy(probs),
        sizes=torch.tensor([m.codes.shape[1::-1] for m in score_maps], dtype=torch.float32),
        regions=torch.tensor(regions, dtype=torch.float32),
        empty_is_even=torch.tensor([m.empty_is_even for m in score_maps]),
        num_classes=counts[0],
        shapes=tuple((m.codes.shape[0], m.codes.shape[1]) for m in score_maps),
        kind=kind,
    )


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One augmented image.

    `image`: [3, height, width] uint8. `view`: what of the upright source image it shows. `score_map`: that of the
    whole upright source image, or None without a store. `key`: the image's key in its source. `has_class`: whether
    its class is known; `class_id` is 0 where it is not.
    """

    image: UInt8[Tensor, "3 height width"]
    class_id: int
    num_classes: int
    view: View
    score_map: ScoreMap | None
    key: str
    has_class: bool = True


@dataclass(frozen=True, eq=False)
class Batch:
    """B augmented images; `score_maps` and `views` make the labels of their tokens (`align`).

    `images` are laid out channels last in memory. `has_class`: of which the class is known; the class target of the
    others has weight 0.
    """

    images: UInt8[Tensor, "B 3 height width"]
    class_ids: Int[Tensor, " B"]
    num_classes: int
    views: Float[Tensor, "B F 2 3"]
    score_maps: ScoreMapBatch | None
    keys: list[str]
    has_class: Bool[Tensor, " B"]

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on another device; itself where it lies there."""
        if self.images.device == torch.device(device):
            return self
        return self._each(lambda tensor: moved(tensor, device), self.score_maps and self.score_maps.to(device))

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory (the data loader calls this)."""
        return self._each(Tensor.pin_memory, self.score_maps and self.score_maps.pin_memory())

    def class_targets(self) -> TokenTargets:
        """Return the ground truth as class targets; those of images without a class have weight 0."""
        targets = class_targets(self.class_ids, num_classes=self.num_classes or None)
        return targets.scaled(self.has_class[:, None].float())

    def _each(self, change: Callable[[Tensor], Tensor], score_maps: ScoreMapBatch | None) -> Batch:
        names = ("images", "class_ids", "has_class", "views")
        return replace(self, score_maps=score_maps, **{name: change(getattr(self, name)) for name in names})

    def __getstate__(self) -> dict[str, Any]:
        """Pickle all but the images as NumPy arrays: each tensor in shared memory costs 0.1 ms in both processes."""
        maps = self.score_maps
        names = [field.name for field in fields(maps)] if maps is not None else []
        sent = {"images": self.images, "score_maps": {name: _by_value(getattr(maps, name)) for name in names} or None}
        return sent | {name: _by_value(value) for name, value in vars(self).items() if name not in sent}

    def __setstate__(self, state: dict[str, Any]) -> None:
        sent = {name: _as_tensor(value) for name, value in state.items()}
        if state["images"].is_shared():  # the worker will write there again (`workers.Slabs`)
            sent["images"] = state["images"].clone()
        if maps := state["score_maps"]:
            sent["score_maps"] = ScoreMapBatch(**{name: _as_tensor(value) for name, value in maps.items()})
        self.__dict__.update(sent)


def moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return a tensor on another device, without waiting where that is a GPU."""
    # A copy to the CPU that nobody waits for may be read before it is there.
    return tensor.to(device, non_blocking=torch.device(device).type != "cpu")


def _by_value(value: Any) -> Any:
    return value.numpy() if isinstance(value, Tensor) and value.device.type == "cpu" else value


def _as_tensor(value: Any) -> Any:
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def normalize_images(
    images: UInt8[Tensor, "B 3 height width"],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "B 3 height width"]:
    """Return (pixels / 255 - mean) / std, channel by channel, on the images' device and laid out channels last.

    `mean` and `std` are for pixels in [0, 1]. Computed in float32 whatever the `dtype` of the result.
    Raises ValueError for images that are not uint8, and for a mean or std of pixels in 0 to 255.

    >>> images = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    >>> tl.normalize_images(images, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)).unique()
    tensor([1.])
    """
    if not (isinstance(images, Tensor) and images.dtype == torch.uint8 and images.ndim == 4 and images.shape[1] == 3):
        raise ValueError(
            "expected pixels from 0 to 255 as a torch.uint8 tensor [B, 3, height, width], got "
            f"{described(images)}; pass a batch's images as they are"
        )
    are_three = all(hasattr(numbers, "__len__") and len(numbers) == 3 for numbers in (mean, std))
    if not are_three or not all(0 <= m <= 1 and 0 < s <= 1 for m, s in zip(mean, std, strict=True)):
        raise ValueError(
            f"mean and std: expected three numbers each, for pixels in [0, 1], got {mean} and {std}; divide those for "
            "pixels from 0 to 255 by 255"
        )
    width_px = images.shape[3]
    # The channels of a whole row side by side: broadcasting three numbers at a time is ten times as slow.
    # Made on the CPU: on a GPU, torch.tensor would wait for the device.
    scale = moved(torch.tensor([1 / (255 * s) for s in std]), images.device).repeat(width_px)
    shift = moved(torch.tensor([-m / s for m, s in zip(mean, std, strict=True)]), images.device)
    rows = images.permute(0, 2, 3, 1).flatten(2).float()  # [B, height, width * 3]
    rows = rows.mul_(scale).add_(shift.repeat(width_px)).to(dtype)
    return rows.unflatten(2, (width_px, 3)).permute(0, 3, 1, 2)
