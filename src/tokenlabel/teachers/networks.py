"""Teachers: networks that predict a distribution over classes for every location of an image, and how to load them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from tokenlabel.core.batch import normalize_images
from tokenlabel.data.config import Interpolation
from tokenlabel.models.load import LoadedModel, load_model
from tokenlabel.models.weights import fingerprint
from tokenlabel.runtime.coercion import coerced
from tokenlabel.runtime.distributed import autocast
from tokenlabel.runtime.errors import ModelError
from tokenlabel.runtime.hub import local_name
from tokenlabel.segmentation.inference import Segmenter
from tokenlabel.segmentation.recipe import SegmentRecipe
from tokenlabel.teachers.backbone import backbone_of, check_locations
from tokenlabel.teachers.dense import (
    ClassifierNetwork,
    DenseLogits,
    DenseNetwork,
    HeadNetwork,
    TokenNetwork,
    TopClasses,
)
from tokenlabel.teachers.heads import Head
from tokenlabel.teachers.input import TeacherInput, cells_of, input_of, made_for
from tokenlabel.teachers.options import HEAD_SUFFIX, TeacherConfig
from tokenlabel.training.checkpoint import with_recipe


class Teacher(ABC):
    """Predicts a distribution over `num_classes` classes for every location of an image.

    `input`: how images become its input. `class_names`: empty if they are unknown; `names_assumed`: taken to be
    ImageNet's, by their number alone. `words`: the hash of the head whose visual words the classes are, "" for other
    classes. `of_places`: it learnt what stands at places, from masks or token labels alone: its classes may be others
    than the images'. `own_classes`: its labels are about its own classes, not those of the images' folders.
    `description`: for the manifest of a store; only labels of teachers with equal descriptions share a store.
    """

    num_classes: int
    class_names: tuple[str, ...]
    names_assumed: bool = False
    words: str = ""
    of_places: bool = False
    own_classes: bool = False
    input: TeacherInput
    description: dict[str, Any]

    @abstractmethod
    def check(self, images: UInt8[Tensor, "B 3 height width"]) -> str:
        """Return a sentence on how the locations agree with the whole images; ModelError if they must, and do not."""

    @abstractmethod
    def probabilities(self, images: UInt8[Tensor, "B 3 height width"]) -> Float[Tensor, "B h w C"]:
        """Return the distribution of each location of images that `input` made, in float32."""

    def top(self, images: UInt8[Tensor, "B 3 height width"], k: int) -> TopClasses:
        """Return the k most probable classes of each location and their probabilities, the most probable first."""
        top = self.probabilities(images).topk(k, dim=3)
        return top.indices, top.values


class NetworkTeacher(Teacher):
    """A classifier, or a backbone with a head, as teacher.

    `evaluated_on`: the crops that it was evaluated on, if it sees whole images by default; `proposed_size` uses it.
    """

    evaluated_on: TeacherInput | None = None

    def __init__(
        self,
        dense: DenseNetwork,
        input: TeacherInput,
        *,
        description: dict[str, Any],
        class_names: tuple[str, ...] = (),
        words: str = "",
        precision: Literal["fp32", "bf16"] = "fp32",
    ) -> None:
        self.dense, self.input, self.num_classes = dense, input, dense.num_classes
        self.class_names, self.words = class_names, words
        self.description = {**description, **({"words": words} if words else {})}
        self.precision = coerced(precision, Literal["fp32", "bf16"], name="precision")

    def logits(self, images: UInt8[Tensor, "B 3 height width"]) -> DenseLogits:
        """Return the logits of images and their locations."""
        with self._autocast(images):
            return self.dense(self.normalised(images))

    def _autocast(self, images: Tensor) -> torch.autocast:
        return torch.autocast(images.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def normalised(self, images: UInt8[Tensor, "B 3 height width"]) -> Float[Tensor, "B 3 height width"]:
        """Return images as the network takes them, in float32 and channels-last memory format."""
        normalised = normalize_images(images, mean=self.input.mean, std=self.input.std)
        return normalised.contiguous(memory_format=torch.channels_last)

    def check(self, images: UInt8[Tensor, "B 3 height width"]) -> str:
        """Compare the mean over locations with the network's own output; see `check_locations`."""
        with self._autocast(images):
            return check_locations(
                self.dense, self.normalised(images), name=self.description["name"], precision=self.precision
            )

    def top(self, images: UInt8[Tensor, "B 3 height width"], k: int) -> TopClasses:
        """Return the k most probable classes of each location and their probabilities, the most probable first."""
        with self._autocast(images):
            return self.dense.top(self.normalised(images), k)

    def probabilities(self, images: UInt8[Tensor, "B 3 height width"]) -> Float[Tensor, "B h w C"]:
        """Return the distribution of each location of images that `input` made, in float32."""
        return self.logits(images).locations.float().softmax(dim=3)


class SegmenterTeacher(Teacher):
    """A segmentation model as teacher; it predicts as in its evaluation: whole images or windows, at several scales.

    `cells`: maps have about cells x cells cells at the image's aspect ratio, each the mean over its pixels; None for
    the grid of the model's head.
    """

    own_classes = True

    def __init__(self, found: LoadedModel, config: TeacherConfig, device: torch.device) -> None:
        model, looks = found.model.to(device).requires_grad_(False), found.recipe.eval
        if config.scales:
            looks = replace(looks, scales=tuple(config.scales))
        if config.size is not None:
            looks = replace(looks, short_side_px=None)  # --size replaces it
        if config.compile:
            model.compile()
        self.segmenter = Segmenter(model, looks, window_px=found.img_size)
        self.cells, self.precision = config.cells, config.precision
        self.input = TeacherInput(
            size=config.size,
            stride_px=1 if config.size is None else model.multiple_px,
            fixed_size_px=None,
            crop_fraction=None,
            interpolation=Interpolation.BILINEAR,
            mean=model.mean,
            std=model.std,
        )
        self.num_classes, self.class_names = len(found.class_names), found.class_names
        self.description = {
            "name": found.name,
            "weights": fingerprint(model),
            "answers_with": "pixels",
            "mode": looks.mode,
            "scales": list(looks.scales),
            "flip": looks.flip,
            "cells": config.cells,
            "short_side_px": looks.short_side_px,
            "stride_px": list(self.segmenter.stride_px),
        }

    def check(self, images: UInt8[Tensor, "B 3 height width"]) -> str:
        """Return the size of the maps of the first images."""
        grid = self._grid((images.shape[2], images.shape[3]))
        return (
            f"{self.description['name']}: {grid[0]} x {grid[1]} cells for an image of {images.shape[2]} x "
            f"{images.shape[3]} pixels, {self.num_classes:,} classes"
        )

    def probabilities(self, images: UInt8[Tensor, "B 3 height width"]) -> Float[Tensor, "B h w C"]:
        """Return the distribution of each cell of images that `input` made, in float32."""
        grid = self._grid((images.shape[2], images.shape[3]))
        with autocast(images.device, self.precision):
            return torch.stack([self.segmenter.probabilities(image, grid) for image in images])

    def top(self, images: UInt8[Tensor, "B 3 height width"], k: int) -> TopClasses:
        """Return the k most probable classes of each cell, image by image: all classes of a batch may be gigabytes."""
        tops = [self.probabilities(image[None]).topk(k, dim=3) for image in images]
        return torch.cat([top.indices for top in tops]), torch.cat([top.values for top in tops])

    def _grid(self, size_px: tuple[int, int]) -> tuple[int, int]:
        return self.segmenter.grid_of(size_px) if self.cells is None else cells_of(size_px, self.cells)


def load_teacher(name: str, config: TeacherConfig, device: torch.device, *, weights: str | None = None) -> Teacher:
    """Return one network as teacher.

    `name`: a run folder of `tokenlabel train` or `segment train` or one of its checkpoints, `lvvit_s` and the like
    (with weights), a name for `timm.create_model`, or a head file. Raises ModelError if there is none, for a head that
    does not fit its backbone, for a network without a dense map, and for options that do not apply.
    """
    if local_name(name).endswith(HEAD_SUFFIX):
        return _by_head(name, config, device, weights=weights)
    found = load_model(name, weights=weights, img_size=made_for(name, config.size), segments=None)
    if found.segments:
        if given := [f"--{option}" for option in ("crop", "head") if getattr(config, option) not in ("none", "auto")]:
            raise ModelError(f"{name} is a segmentation run, for which there is no {', '.join(given)}; leave it out")
        return SegmenterTeacher(with_recipe(found, SegmentRecipe), config, device)
    network = _dense_network(found, name, config.head).eval().to(device).requires_grad_(False)
    network = network.to(memory_format=torch.channels_last)
    input = input_of(found, network, size=config.size, crop=config.crop)
    description = {"name": name, "weights": fingerprint(network), "answers_with": network.answers_with}
    if weights is None and found.licence:  # of timm's weights; those in a file may be anybody's
        description["licence"] = found.licence
    if config.compile:
        network.compile()
    others = found.token_classes if isinstance(network, TokenNetwork) else None
    words = others.words if others is not None else ""
    chosen = config.size is not None or config.crop != "none" or input.fixed_size_px is not None
    names = found.class_names if others is None else others.names
    teacher = NetworkTeacher(
        network, input, description=description, class_names=names, words=words, precision=config.precision
    )
    teacher.names_assumed, teacher.of_places = found.names_assumed, not found.num_classes
    if not chosen and not words:
        teacher.evaluated_on = input_of(found, network, size=None, crop="center")
    return teacher


def _by_head(name: str, config: TeacherConfig, device: torch.device, *, weights: str | None) -> NetworkTeacher:
    """Return a head and its backbone as a teacher. The head's file describes everything but the weights."""
    if config.head != "auto":
        raise ModelError(f"{name} is a head itself; leave --head out")
    head = Head.load(name)
    backbone = backbone_of(head, name, device, weights=weights, size=config.size, crop=config.crop)
    network = HeadNetwork(backbone.network, head.to(device)).eval()
    fitted = {key: value for key, value in head.fitted.items() if key != "asked"}
    if config.compile:
        network.backbone.compile()
    teacher = NetworkTeacher(
        network,
        backbone.input,
        description={
            "name": name,
            "weights": head.backbone["weights"],
            "answers_with": network.answers_with,
            "head": head.hash,
            "head_fitted": {"from": head.kind, "scale": head.scale, **fitted},
            "backbone": {key: head.backbone[key] for key in ("name", "licence") if key in head.backbone},
        },
        class_names=head.class_names,
        words=head.hash if head.kind == "words" else "",
        precision=config.precision,
    )
    teacher.of_places = head.kind == "masks"
    return teacher


def _dense_network(found: LoadedModel, name: str, head: str) -> DenseNetwork:
    if head == "tokens" and not found.has_token_head:
        raise ModelError(f"{name} has no trained head for its tokens; leave --head out")
    if found.has_token_head and head != "classifier":
        return TokenNetwork(found.model, has_one_list=found.token_classes is None)
    if not found.num_classes:
        raise ModelError(f"{name} has no classifier; leave --head out, and its tokens answer")
    return ClassifierNetwork(found.model.backbone, name=name)
