"""The input of a teacher: the size and the crop of an image, and the region that the crop covers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from tokenlabel.core.geometry import WHOLE_IMAGE, Box
from tokenlabel.data.augment import EvalTransform
from tokenlabel.data.config import Interpolation
from tokenlabel.data.resampling import RESAMPLING
from tokenlabel.models.load import LoadedModel
from tokenlabel.models.runs import is_run
from tokenlabel.runtime.coercion import coerced_fields
from tokenlabel.runtime.errors import ModelError
from tokenlabel.teachers.dense import DenseNetwork


@dataclass(frozen=True, slots=True, kw_only=True)
@coerced_fields
class TeacherInput:
    """How images become a teacher's input.

    By default the whole image, resized with antialiasing to an area of about `size` x `size` pixels at its own aspect
    ratio, each side a multiple of `stride_px`; at its own size if `size` is None. With `fixed_size_px` (height, width)
    the whole image, resized to that. With `crop_fraction` the centred square whose sides are this fraction of the
    shorter side, at `size` x `size`. `mean`, `std`: pixels in [0, 1] are normalised with these afterwards.
    """

    size: int | None
    stride_px: int
    fixed_size_px: tuple[int, int] | None
    crop_fraction: float | None
    interpolation: Interpolation
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def size_px(self, image_size_px: tuple[int, int]) -> tuple[int, int]:
        """Return the (height, width) at which an image of (width, height) pixels is seen."""
        if self.fixed_size_px is not None:
            return self.fixed_size_px
        if self.size is None:
            return image_size_px[1], image_size_px[0]
        if self.crop_fraction is not None:
            return self.size, self.size
        aspect = math.sqrt(image_size_px[0] / image_size_px[1])  # the root: the area is the same at any aspect ratio
        return self._rounded(self.size / aspect), self._rounded(self.size * aspect)

    def of(self, image: Image.Image) -> tuple[NDArray[np.uint8], Box]:
        """Return the pixels [height, width, 3] that the teacher gets of an RGB image, and the region they show."""
        height_px, width_px = self.size_px(image.size)
        if self.crop_fraction is None:
            seen = image.resize((width_px, height_px), RESAMPLING[self.interpolation])
            return np.array(seen), WHOLE_IMAGE
        centre = EvalTransform(
            (height_px, width_px), crop_fraction=self.crop_fraction, interpolation=self.interpolation
        )
        pixels, view = centre(image, np.random.default_rng(0))  # not random: the generator is not used
        (width, _, left), (_, height, top) = view.matrix.tolist()  # of a view that only crops and resizes
        return pixels, Box(left=left, top=top, right=left + width, bottom=top + height)

    def resized(
        self, images: UInt8[Tensor, "B 3 height width"], *, size: int | None = None, mode: str
    ) -> UInt8[Tensor, "B 3 h w"]:
        """Resize tensors of images by `mode` to the nearest size that the network takes.

        `size`: to an area of about size x size pixels; that of the images if None.
        """
        height_px, width_px = images.shape[2:]
        scale = 1.0 if size is None else size / (height_px * width_px) ** 0.5
        img_size = self.fixed_size_px or (self._rounded(height_px * scale), self._rounded(width_px * scale))
        if img_size == (height_px, width_px):
            return images
        found = F.interpolate(images.float(), img_size, mode=mode, antialias=True, align_corners=False)
        return found.round().clamp(0, 255).to(torch.uint8)

    def _rounded(self, side_px: float) -> int:
        return max(1, round(side_px / self.stride_px)) * self.stride_px


def cells_of(size_px: tuple[int, ...], cells: int) -> tuple[int, int]:
    """Return rows and columns of a grid of about cells x cells at the aspect ratio of an image of (height, width)."""
    scale = cells / math.sqrt(math.prod(size_px))
    return max(1, round(size_px[0] * scale)), max(1, round(size_px[1] * scale))


def made_for(name: str, size: int | None) -> int | None:
    """Return the image size to build a network for: None for a run, which is built for its own size."""
    return None if is_run(name) else size


def input_of(
    found: LoadedModel, network: DenseNetwork, *, size: int | None, crop: Literal["none", "center"]
) -> TeacherInput:
    """Return how images become a network's input. Raises ModelError for a size that it does not take."""
    fixed_size_px, size = (size, size) if size else found.img_size, size or max(found.img_size)
    try:
        width_px, columns = found.img_size[1], network.grid_for(found.img_size)[1]
        # Convolutions with padding may give columns that do not divide the width; their strides are powers of 2.
        stride_px = 2 ** round(math.log2(width_px / columns)) if width_px % columns else width_px // columns
        # Tried, as timm's `fixed_input_size` says only that a network is built for a size: LV-ViT takes any other, too.
        fixed = not _takes(network, (size, size + stride_px))
        network.grid_for(fixed_size_px if fixed else (size, size))
    except ModelError:
        raise
    except ValueError as error:
        raise ModelError(f"{error}; leave --size out") from error
    return TeacherInput(
        size=size,
        stride_px=stride_px,
        fixed_size_px=fixed_size_px if fixed else None,
        crop_fraction=found.crop_fraction if crop == "center" else None,
        interpolation=found.interpolation,
        mean=found.model.mean,
        std=found.model.std,
    )


def _takes(network: DenseNetwork, img_size: tuple[int, int]) -> bool:
    try:
        network.grid_for(img_size)
    except ValueError:
        return False
    return True
