"""How images are augmented, as data. No torch: a recipe is read, and explained, without it."""

from __future__ import annotations

from dataclasses import dataclass, field

from tokenlabel.data.randaugment import parse_randaugment
from tokenlabel.runtime.coercion import COUNT, ONE_OPTION, PART, POSITIVE, SHARE, Choice, check_numbers, coerced_fields


class Interpolation(Choice):
    """How pixels are resampled; RANDOM draws one of the other two for each image.

    >>> [str(interpolation) for interpolation in tl.Interpolation]
    ['bilinear', 'bicubic', 'random']
    """

    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    RANDOM = "random"


class Order(Choice):
    """Whether warps and RandAugment change the crop (fast) or the whole image before it (published).

    >>> [str(order) for order in tl.Order]
    ['after_crop', 'before_crop']
    """

    AFTER_CROP = "after_crop"
    BEFORE_CROP = "before_crop"


@dataclass(frozen=True, kw_only=True)
@coerced_fields
class ColourJitter:
    """Random changes of colour, in random order; each factor is drawn evenly from 1 - range to 1 + range."""

    brightness: float = 0.0
    """Range of the factor of brightness."""
    contrast: float = 0.0
    """Range of the factor of contrast."""
    saturation: float = 0.0
    """Range of the factor of saturation."""
    hue: float = 0.0
    """Range of the turn of the hue, as a fraction of the colour circle; at most 0.5."""
    probability: float = 1.0
    """Share of the images that are changed."""


@dataclass(frozen=True, kw_only=True)
@coerced_fields
class WarpConfig:
    """A random affine warp: rotation, then shear, then translation, in one resampling."""

    probability: float = 0.0
    """Share of the images that are warped."""
    degrees: float = 0.0
    """Rotation about the centre is drawn evenly from minus to plus this."""
    shear: float = 0.0
    """Shear along both axes is drawn evenly from minus to plus this: 0.3 moves a point 0.3 px for each px."""
    translate: float = 0.0
    """Translation along both axes is drawn evenly from minus to plus this, a fraction of width and height."""


@dataclass(frozen=True, kw_only=True)
@coerced_fields
class AugmentConfig:
    """How training images are augmented.

    >>> config = tl.AugmentConfig(crop_scale=(0.25, 1.0), order="before_crop")
    >>> config.order
    <Order.BEFORE_CROP: 'before_crop'>
    """

    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Range of the share of the image's area that the crop keeps."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of the crop's width / height, before it is resized to the model's input."""
    interpolation: Interpolation = Interpolation.RANDOM
    """bilinear, bicubic, or random: one of the two for each image."""
    horizontal_flip: float = 0.5
    """Probability that left and right change places."""
    vertical_flip: float = 0.0
    """Probability that top and bottom change places."""
    warp: WarpConfig = field(default_factory=WarpConfig, metadata=ONE_OPTION)
    """Random rotation, shear and translation beside RandAugment's."""
    randaugment: str | None = None
    """RandAugment by timm's name, such as rand-m9-mstd0.5-inc1; none by default."""
    three_augment: bool = False
    """Turn each image grey, solarize or blur it (3-Augment of DeiT III; give it a jitter of 0.3 as well)."""
    jitter: ColourJitter = field(default_factory=ColourJitter, metadata=ONE_OPTION)
    """Random changes of brightness, contrast, saturation and hue, after everything else."""
    order: Order = Order.AFTER_CROP
    """Whether warp and RandAugment work on the crop (after_crop) or on the whole image (before_crop)."""

    def __post_init__(self) -> None:
        for name in ("crop_scale", "crop_ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} must be two numbers with 0 < first <= second, got {low} and {high}")
        check_numbers(self, crop_scale=PART, crop_ratio=POSITIVE, horizontal_flip=SHARE, vertical_flip=SHARE)
        check_numbers(self.warp, "warp.", probability=SHARE, degrees=COUNT, shear=COUNT, translate=COUNT)
        check_numbers(self.jitter, "jitter.", brightness=COUNT, contrast=COUNT, saturation=COUNT)
        check_numbers(self.jitter, "jitter.", hue="[0, 0.5]", probability=SHARE)
        if self.randaugment is not None:
            parse_randaugment(self.randaugment)
