"""The options of `tokenlabel eval`, and figures of evaluations as text. No torch, so that help comes at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokenlabel.runtime.coercion import COUNT, NATURAL, PART, check_numbers, coerced_fields
from tokenlabel.runtime.errors import ConfigError, refuse


@dataclass(frozen=True, kw_only=True)
@coerced_fields
class EvalOptions:
    """What to evaluate a network on, and how to predict."""

    data: Path | None = None
    """Images; the run's own val images by default."""
    set: Literal["folder", "imagenet-v2", "imagenet-a", "imagenet-r", "imagenet-c"] = "folder"
    """The layout of the images, and among which classes the model chooses. folder: class folders named after all or
    some of the model's classes (ImageNet-1k, ImageNet-Sketch, your own)."""
    real: Path | None = None
    """real.json of ImageNet's val images: report the ReaL accuracy, too."""
    multi_labels: Path | None = None
    """JSON of {"path of an image below --data": [classes]}: mean average precision instead of accuracy."""
    masks: Path | None = None
    """True masks of the images (PNG class ids): accuracy and mean IoU of the tokens."""
    ignore_index: int | None = None
    """The id in masks of pixels without a class; by default 255, with more than 255 classes 65535."""
    labels: Path | None = None
    """A teacher's labels of the images: agreement of the tokens with it; by default those of the run's val images."""
    probe: Path | None = None
    """A few images with any classes: accuracy of a linear probe and of nearest neighbours on frozen features."""
    probe_test: Path | None = None
    """Images to test the probes on; by default every other image of `probe`, and the rest trains them."""
    weights: str | None = None
    """Checkpoint file, for the name of a model; timm's pretrained weights by default."""
    class_order: str | None = None
    """The classes of a network that does not name them: `sorted` or `natural` for those of the images in this order,
    else a file with its class names (see `annotate`)."""
    size: int | None = None
    """Images are size x size px; by default as in training, or as timm validates."""
    crop_fraction: float | None = None
    """Share of the shorter side of the resized image that the centre crop keeps; the network's own by default."""
    inference: Literal["class", "tokens", "combined", "all"] | None = None
    """class token, mean of the tokens, class + 0.5 max over tokens, or all three; by default that of the recipe."""
    per_class: bool = False
    """Report the top-1 of each class, too."""
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    """bf16 and fp16 run the network under autocast; by default the recipe's precision, else fp32."""
    batch_size: int = 256
    """Images a batch, in each process."""
    num_workers: int = 2
    """Processes that decode images."""
    skip_broken: bool | None = None
    """Leave out images that do not decode; by default as the run did."""

    def check(self) -> None:
        """Raise ConfigError for options that exclude each other, or have no effect."""
        of_images = ("real", "masks", "labels", "per_class")
        if self.set == "imagenet-c":
            self.leave_out("--set imagenet-c measures the top-1 alone", "multi_labels", "probe", *of_images)
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
        """Raise ConfigError with this reason if any of the options is given."""
        given = [f"--{name.replace('_', '-')}" for name in names if getattr(self, name)]
        if given:
            raise ConfigError(f"{reason}; leave {', '.join(given)} out")


def as_text(figures: Mapping[str, Any]) -> str:
    """Return figures as text, one a line; those of classes come last, from the worst to the best."""
    of_classes = {name: value for name, value in figures.items() if isinstance(value, dict)}
    if len(of_classes) == len(figures):  # of each way to predict
        return "\n\n".join(as_text(of_head) for of_head in figures.values())
    lines = [f"{name:<20} {_shown(name, value)}" for name, value in figures.items() if name not in of_classes]
    if of_classes:
        first = next(iter(of_classes.values()))
        width = max(map(len, ("class", *first)))
        lines += ["", f"{'class':<{width}}  {'  '.join(of_classes)}"]
        for name in sorted(first, key=lambda name: (first[name] is None, first[name])):
            cells = (f"{_shown(column, found[name]):>{len(column)}}" for column, found in of_classes.items())
            lines.append(f"{name:<{width}}  {'  '.join(cells)}")
    return "\n".join(lines)


def _shown(name: str, value: Any) -> str:
    if isinstance(value, list):
        return " x ".join(map(str, value)) if name == "img_size" else ", ".join(value) or "none"
    if not isinstance(value, float):
        return "-" if value is None else str(value)
    if name == "loss" or name.startswith(("mce", "ce_")):
        return f"{value:.4f}"
    return f"{value:,.1f}" if name == "images_per_s" else f"{value:.2%}"
