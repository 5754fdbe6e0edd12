"""The options of `tokenlabel eval`. No torch: help comes at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tokenlabel.runtime.coercion import COUNT, NATURAL, PART, check_numbers, coerced_fields
from tokenlabel.runtime.errors import ConfigError, refuse


@dataclass(frozen=True, kw_only=True)
@coerced_fields
class EvalOptions:
    """What to evaluate a network on, and how."""

    data: Path | None = None
    """Images; the run's own val images by default."""
    set: Literal["folder", "imagenet-v2", "imagenet-a", "imagenet-r", "imagenet-c"] = "folder"
    """How the images lie and which classes compete. folder: class folders named after the model's classes, all of them
    or some (ImageNet-1k, ImageNet-Sketch, your own)."""
    real: Path | None = None
    """real.json: the ReaL accuracy as well (images of ImageNet's val set)."""
    multi_labels: Path | None = None
    """JSON of {"path of an image below --data": [classes]}: mean average precision in place of accuracy."""
    masks: Path | None = None
    """True dense labels of the images (PNG class ids): what the tokens get right."""
    ignore_index: int | None = None
    """The id in masks of pixels without a class; by default 255, with more than 255 classes 65535."""
    labels: Path | None = None
    """A teacher's labels of the images: how far the tokens agree with it; those of the run's val images by default."""
    probe: Path | None = None
    """A few images with classes, any: how well a linear probe of frozen features and nearest neighbours name them."""
    probe_test: Path | None = None
    """Images that the probes are tested on; by default every other image of `probe`, which learns from the rest."""
    weights: str | None = None
    """Checkpoint file, for a model's name; timm's pretrained weights by default."""
    class_order: str | None = None
    """The classes of a network that does not say their names: `sorted` or `natural` for those of the images in this
    order, else a file with its class names (see `annotate`)."""
    size: int | None = None
    """Images are size x size px; by default as in training, or as timm validates."""
    crop_fraction: float | None = None
    """Share of the resized image's shorter side that the centre crop keeps; the network's own by default."""
    inference: Literal["class", "tokens", "combined", "all"] | None = None
    """class token, mean of the tokens, class + 0.5 max over tokens, or all three; what the recipe says by default."""
    per_class: bool = False
    """Top-1 of each class as well."""
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    """bf16 and fp16 run the network under autocast; by default what its recipe says, else fp32."""
    batch_size: int = 256
    """Images a step, in each process."""
    num_workers: int = 2
    """Processes that decode images."""
    skip_broken: bool | None = None
    """Leave out images that cannot be decoded; as the run did by default."""

    def check(self) -> None:
        """Raise ConfigError for options that do not go together, or mean nothing."""
        of_images = ("real", "masks", "labels", "per_class")
        if self.set == "imagenet-c":
            self.leave_out("--set imagenet-c measures the top-1 alone", "multi_labels", *of_images)
        if self.multi_labels is not None:
            self.leave_out("--multi-labels measures the average precision alone", *of_images)
        refuse(
            {
                f"--multi-labels is of any images, --set {self.set} of images with one class each": self.multi_labels
                is not None
                and self.set != "folder",
                "--probe-test tests probes that learn from --probe; name that folder, too": self.probe is None
                and self.probe_test is not None,
                "--ignore-index is an id in masks; give --masks, or leave it out": self.masks is None
                and self.ignore_index is not None,
            }
        )
        check_numbers(self, "--", batch_size=NATURAL, num_workers=COUNT, size=NATURAL, crop_fraction=PART)

    def leave_out(self, reason: str, *names: str) -> None:
        """Raise ConfigError, for a reason, if any of some options is given."""
        given = [f"--{name.replace('_', '-')}" for name in names if getattr(self, name)]
        if given:
            raise ConfigError(f"{reason}; leave {', '.join(given)} out")
