"""Teachers: what says of every place of an image which classes it shows, found by name."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from tokenlabel.core.batch import normalize_images
from tokenlabel.data.config import Interpolation
from tokenlabel.evaluation.pretrained import Pretrained, load_pretrained
from tokenlabel.models import TimmAdapter, TokenModel
from tokenlabel.runtime.coercion import coerced, coerced_fields
from tokenlabel.teachers.dense import (
    ClassifierNetwork,
    DenseLogits,
    DenseNetwork,
    NoDenseMapError,
    TokenNetwork,
)
from tokenlabel.teachers.input import TeacherInput
from tokenlabel.training.checkpoint import is_run, load_model


class TeacherError(ValueError):
    """A teacher that does not exist, has no dense map, or does not fit the images' classes."""


class Teacher(ABC):
    """Gives every place of an image a distribution over `num_classes` classes.

    `input`: what it has to be given of an image. `class_names`: empty if it does not know them; `names_assumed`: they
    are ImageNet's, by their number alone.
    `description`: who it is, for the manifest of a store; labels of teachers with equal descriptions may
    share a store.
    """

    num_classes: int
    class_names: tuple[str, ...]
    names_assumed: bool = False
    input: TeacherInput
    description: dict[str, Any]

    @abstractmethod
    def check(self, images: UInt8[Tensor, "B 3 height width"]) -> str:
        """Return in a sentence how the places agree with what is said of the whole images.

        Raises TeacherError where they must agree and don't.
        """

    @abstractmethod
    def probabilities(self, images: UInt8[Tensor, "B 3 height width"]) -> Float[Tensor, "B h w C"]:
        """Return the distribution of each place of images that `input` made, in float32."""


class NetworkTeacher(Teacher):
    """A network as teacher; `dense` is what makes it one."""

    def __init__(
        self,
        dense: DenseNetwork,
        input: TeacherInput,
        *,
        description: dict[str, Any],
        class_names: tuple[str, ...] = (),
        names_assumed: bool = False,
        precision: Literal["fp32", "bf16"] = "fp32",
    ) -> None:
        self.dense = dense
        self.input = input
        self.num_classes = dense.num_classes
        self.class_names, self.names_assumed = class_names, names_assumed
        self.description = description
        self.precision = coerced(precision, Literal["fp32", "bf16"], name="precision")

    def logits(self, images: UInt8[Tensor, "B 3 height width"]) -> DenseLogits:
        """Return the logits of images and their places."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.dense(self.normalised(images))

    def normalised(self, images: UInt8[Tensor, "B 3 height width"]) -> Float[Tensor, "B 3 height width"]:
        """Return images as the network takes them, in float32, channels last in memory."""
        normalised = normalize_images(images, mean=self.input.mean, std=self.input.std)
        return normalised.contiguous(memory_format=torch.channels_last)

    def check(self, images: UInt8[Tensor, "B 3 height width"]) -> str:
        """Hold the mean over places against the network's own output.

        They must be equal where the network averages features and its head is linear.
        """
        logits = self.logits(images)
        own, mean = logits.image.float(), logits.places.float().mean(dim=(1, 2))
        tolerance = (1e-3 if self.precision == "fp32" else 5e-2) * float(own.abs().max())
        off = float((own - mean).abs().max())
        name = self.description["name"]
        if self.dense.averages_linearly(self.normalised(images)):
            if not off <= tolerance:
                raise TeacherError(
                    f"{name}: averages its features, yet the mean of its map's logits is {off:.3g} off its own output"
                )
            return f"{name}: the mean of the map's logits is its own output (off by {off:.1g} at most)"
        share = float((own.argmax(dim=1) == mean.argmax(dim=1)).float().mean())
        return (
            f"{name}: the mean of the map's logits has its own top-1 for {share:.0%} of {len(images)} images"
        )

    def probabilities(self, images: UInt8[Tensor, "B 3 height width"]) -> Float[Tensor, "B h w C"]:
        """Return the distribution of each place of images that `input` made, in float32."""
        return self.logits(images).places.float().softmax(dim=3)


@dataclass(frozen=True, kw_only=True)
@coerced_fields
class TeacherConfig:
    """Which network labels the images, and what it sees of them."""

    teacher: str | list[str]
    """A run folder, or the name of a model (timm's, lvvit_s and the like); several are averaged. masks:DIR takes
    segmentation masks (PNG ids, laid out like the images) in place of a network."""
    weights: str | list[str] | None = None
    """Checkpoint file (.safetensors, or .pth without code in it), one for each teacher ("" for one that needs none);
    timm's pretrained weights if none."""
    size: int | None = None
    """The image is seen at an area of size x size pixels, masks are averaged down to size x size cells; the teacher's
    own size if none."""
    crop: Literal["none", "center"] = "none"
    """none: the whole image at its own aspect; center: the square that it was evaluated on, as published."""
    head: Literal["auto", "classifier", "tokens"] = "auto"
    """Which head answers for the places; auto: one for tokens where it was trained, else the classifier."""
    flip: bool = False
    """Average with what the teacher says of the mirror image."""
    class_map: str | None = None
    """How the teacher's classes become those of the images: a file with a pair of names or ids a line; `names` to
    match equal names; `order` if they are the same by another name. By default they must be the same."""
    outside: Literal["renormalise", "spread"] = "renormalise"
    """What becomes of the probability that a class map sends to no class. renormalise: the others are scaled to sum to
    1, and a place with less than .001 of its probability on them keeps nothing; spread: all classes share it evenly."""
    class_order: str | None = None
    """The classes of a teacher that does not say their names: `sorted` or `natural` (10 behind 9, as timm's scripts
    sort folders) for those of the images in this order; else a file with its class names, one a line, or `.json`."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 runs the teacher under autocast."""
    compile: bool = False
    """Compile the teacher (torch.compile); pays off on a GPU for images of one shape."""

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise TeacherError(f"size must be at least 1, got {self.size}; none takes the teacher's own")


def load_teacher(
    name: str, config: TeacherConfig, device: torch.device, *, weights: str | None = None
) -> NetworkTeacher:
    """Return one network as teacher, by its name.

    `name`: a run folder that `tokenlabel train` made or one of its checkpoints, `lvvit_s` and the like (with
    weights), or whatever `timm.create_model` takes. Raises PretrainedError if there is none, TeacherError if it has
    no dense map.
    """
    if not is_run(Path(name)):
        found = load_pretrained(name, weights=weights, size=config.size)
    elif weights is None:
        found = _from_run(Path(name))
    else:
        raise TeacherError(
            f"{name} is a run and has weights of its own; leave --weights out (one of several: '')"
        )
    network = _dense_network(found, name, config.head).eval().to(device).requires_grad_(False)
    network = network.to(memory_format=torch.channels_last)
    input = _input(found, network, config)
    description = {"name": name, "weights": _fingerprint(network), "answers_with": network.answers_with}
    if config.compile:
        network.compile()
    return NetworkTeacher(
        network,
        input,
        description=description,
        class_names=found.class_names,
        names_assumed=found.names_assumed,
        precision=config.precision,
    )


def _from_run(path: Path) -> Pretrained:
    trained = load_model(path)
    model, recipe = trained.model, trained.recipe
    return Pretrained(
        model=model,
        num_classes=model.num_classes,
        class_names=tuple(trained.class_names),
        img_size=recipe.model.img_size,
        fixed_size=False,
        crop_fraction=recipe.eval.crop_fraction,
        interpolation=Interpolation.BICUBIC,
        mean=model.mean,
        std=model.std,
        has_token_head=recipe.uses_token_labels,
    )


def _dense_network(found: Pretrained, name: str, head: str) -> DenseNetwork:
    if head == "tokens" and not found.has_token_head:
        raise TeacherError(f"{name} has no trained head for its tokens; leave --head out")
    by_tokens = found.has_token_head and head != "classifier"
    model = found.model
    if by_tokens and not isinstance(model, TokenModel):
        model = TimmAdapter(model, name=name, num_classes=model.num_classes, img_size=found.img_size)
    if by_tokens:
        return TokenNetwork(model)
    return ClassifierNetwork(model.backbone if isinstance(model, TimmAdapter) else model, name=name)


def _input(found: Pretrained, network: DenseNetwork, config: TeacherConfig) -> TeacherInput:
    size = config.size or max(found.img_size)
    try:
        stride_px = _stride(found.img_size[1], network.grid_for(found.img_size)[1])
        fixed = found.fixed_size or not _takes(network, (size, size + stride_px))
        network.grid_for((size, size))
    except NoDenseMapError:
        raise
    except ValueError as error:
        raise TeacherError(f"{error}; leave --size out") from error
    return TeacherInput(
        size=size,
        stride_px=stride_px,
        fixed_size_px=(size, size) if fixed else None,
        crop_fraction=found.crop_fraction if config.crop == "center" else None,
        interpolation=found.interpolation,
        mean=found.mean,
        std=found.std,
    )


def _stride(length_px: int, num_places: int) -> int:
    """Return the stride that makes so many places of a side; that of a convolutional net where it does not divide."""
    return (
        2 ** round(math.log2(length_px / num_places)) if length_px % num_places else length_px // num_places
    )


def _takes(network: DenseNetwork, img_size: tuple[int, int]) -> bool:
    try:
        network.grid_for(img_size)
    except ValueError:
        return False
    return True


def _fingerprint(network: nn.Module) -> str:
    """Return a hash of all weights, by which labels of another training of the same network are told apart."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return f"blake2b:{digest.hexdigest()}"
