"""Segmentation models as teachers: what they say of every pixel, as distributions over their own classes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from tokenlabel.data.config import Interpolation
from tokenlabel.models.runs import is_run, newest_checkpoint, read_state
from tokenlabel.models.weights import fingerprint
from tokenlabel.runtime.distributed import autocast
from tokenlabel.runtime.errors import ModelError
from tokenlabel.segmentation.inference import Segmenter
from tokenlabel.segmentation.task import load_segmenter
from tokenlabel.teachers.input import TeacherInput, cells_of
from tokenlabel.teachers.networks import Teacher, TeacherConfig


class SegmenterTeacher(Teacher):
    """A segmentation model as teacher. It looks at images as in its evaluation: whole or by windows, at its scales.

    `cells`: maps have about cells x cells cells at the image's aspect, each the mean over its pixels; None for the grid
    that the model's head ends on.
    """

    own_classes = True

    def __init__(
        self, segmenter: Segmenter, input: TeacherInput, *, cells: int | None, precision: str
    ) -> None:
        self.segmenter, self.input, self.cells, self.precision = segmenter, input, cells, precision

    def check(self, images: UInt8[Tensor, "B 3 height width"]) -> str:
        """Return how large the maps of the first images are."""
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

    def top(
        self, images: UInt8[Tensor, "B 3 height width"], k: int
    ) -> tuple[Int[Tensor, "B h w K"], Float[Tensor, "B h w K"]]:
        """Return the k most probable classes of each cell, image by image: all classes of a batch may be gigabytes."""
        tops = [self.probabilities(image[None]).topk(k, dim=3) for image in images]
        return torch.cat([top.indices for top in tops]), torch.cat([top.values for top in tops])

    def _grid(self, size_px: tuple[int, int]) -> tuple[int, int]:
        return self.segmenter.grid_of(size_px) if self.cells is None else cells_of(size_px, self.cells)


def is_segmenter(name: str) -> bool:
    """Say whether a name is that of a run folder, or a checkpoint, of a segmentation model."""
    path = Path(name)
    return is_run(path) and "layout" in read_state(newest_checkpoint(path))["recipe"]["data"]


def load_segmenter_teacher(
    name: str, config: TeacherConfig, device: torch.device, *, weights: str | None
) -> SegmenterTeacher:
    """Return the segmentation model of a run as teacher. Raises ModelError for options that it cannot follow."""
    of_others = {
        "--weights": weights is not None,
        "--crop": config.crop != "none",
        "--head": config.head != "auto",
    }
    if given := [option for option, is_given in of_others.items() if is_given]:
        raise ModelError(
            f"{name} is a segmentation run, for which there is no {', '.join(given)}; leave it out"
        )
    trained = load_segmenter(name)
    model, looks = trained.model.to(device).requires_grad_(False), trained.recipe.eval
    if config.scales:
        looks = replace(looks, scales=tuple(config.scales))
    if config.size is not None:
        looks = replace(looks, short_side_px=None)  # the size is the one that was asked for
    if config.compile:
        model.compile()
    teacher = SegmenterTeacher(
        Segmenter(model, looks, window_px=trained.recipe.model.img_size),
        TeacherInput(
            size=config.size,
            stride_px=1 if config.size is None else model.multiple_px,
            fixed_size_px=None,
            crop_fraction=None,
            interpolation=Interpolation.BILINEAR,
            mean=model.mean,
            std=model.std,
        ),
        cells=config.cells,
        precision=config.precision,
    )
    teacher.num_classes, teacher.class_names = len(trained.class_names), tuple(trained.class_names)
    looked = {"mode": looks.mode, "scales": list(looks.scales), "flip": looks.flip, "cells": config.cells}
    teacher.description = {
        "name": name,
        "weights": fingerprint(model),
        "answers_with": "pixels",
        **looked,
        "short_side_px": looks.short_side_px,
        "stride_px": list(teacher.segmenter.stride_px),
    }
    return teacher
