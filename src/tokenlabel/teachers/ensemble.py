"""Several teachers as one: their distributions averaged, over mirror images too, and mapped to other classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn import functional as F

from tokenlabel.data.class_names import class_order
from tokenlabel.data.classes import same_classes
from tokenlabel.runtime.errors import ModelError, refuse
from tokenlabel.runtime.process import listed, say
from tokenlabel.teachers.classmap import ClassMap, class_map_for
from tokenlabel.teachers.dense import MAX_LOGITS
from tokenlabel.teachers.input import cells_of
from tokenlabel.teachers.networks import SegmenterTeacher, Teacher, TeacherConfig, load_teacher


class Ensemble(Teacher):
    """Averages the distributions of its members.

    Images are made for the first member; others get them resized where they need another size. Maps of
    different grids are resampled to the finest, or to about cells x `cells`: bilinearly, or averaged where that is
    coarser. `flip`: members also see the mirror image, and their maps of it are turned back. `class_map`: where the
    members' classes go in the end. Raises ModelError for members of different classes.
    """

    def __init__(
        self,
        members: Sequence[Teacher],
        *,
        flip: bool = False,
        cells: int | None = None,
        class_map: ClassMap | None = None,
    ) -> None:
        self.members = list(members)
        self.flip, self.cells = flip, cells
        self.class_map = class_map
        # Who knows its classes speaks for all.
        first = min(self.members, key=lambda member: (not member.class_names, member.names_assumed))
        for other in self.members:
            _check_alike(first, other)
        self.num_classes = class_map.num_classes if class_map else first.num_classes
        self.words = "" if class_map else first.words
        self.own_classes = first.own_classes and class_map is None
        self.class_names = () if class_map else first.class_names
        self.names_assumed = class_map is None and first.names_assumed
        # Of a size that every member takes.
        stride_px = math.lcm(*(member.input.stride_px for member in self.members))
        self.input = replace(self.members[0].input, stride_px=stride_px)
        self.description = {
            "members": [member.description for member in self.members],
            "flip": flip,
            "class_map": class_map and class_map.description,
            **({"words": self.words} if self.words else {}),
            **({"cells": cells} if cells else {}),
        }

    @property
    def renormalises(self) -> bool:
        """Whether probability that the class map sends to no class is left out."""
        return self.class_map is not None and self.class_map.renormalises

    def check(self, images: UInt8[Tensor, "B 3 height width"]) -> str:
        """Check each member."""
        return "; ".join(member.check(member.input.resized(images, mode="bilinear")) for member in self.members)

    def top(
        self, images: UInt8[Tensor, "B 3 height width"], k: int
    ) -> tuple[Int[Tensor, "B h w K"], Float[Tensor, "B h w K"]]:
        """Return the k most probable classes of each location, by blocks of images where the classes are very many."""
        num_locations = images[0, 0].numel() // min(member.input.stride_px for member in self.members) ** 2
        size = max(1, MAX_LOGITS // (num_locations * max(member.num_classes for member in self.members)))
        class_ids, probs = zip(*(super(Ensemble, self).top(block, k) for block in images.split(size)), strict=True)
        return torch.cat(class_ids), torch.cat(probs)

    def probabilities(self, images: UInt8[Tensor, "B 3 height width"]) -> Float[Tensor, "B h w C"]:
        """Return the average distribution of each location of images, in float32."""
        maps = []
        for member in self.members:
            seen = member.input.resized(images, mode="bilinear")
            maps.append(member.probabilities(seen))
            if self.flip:
                maps.append(member.probabilities(seen.flip(3)).flip(2))
        grid = max(((m.shape[1], m.shape[2]) for m in maps), key=math.prod)
        if self.cells is not None:
            grid = cells_of((images.shape[2], images.shape[3]), self.cells)
        mean = torch.stack([_resampled(m, grid) for m in maps]).mean(dim=0)
        return mean if self.class_map is None else self.class_map.apply(mean)


def _check_alike(first: Teacher, other: Teacher) -> None:
    """Raise ModelError for teachers whose distributions are about different classes."""
    known = first.class_names and other.class_names
    refuse(
        {
            f"teachers of {first.num_classes:,} and of {other.num_classes:,} classes cannot be averaged": (
                other.num_classes != first.num_classes
            ),
            "teachers whose classes have different names or orders cannot be averaged: "
            f"{listed(list(first.class_names))} against {listed(list(other.class_names))}": known
            and not same_classes(first.class_names, other.class_names),
            "visual words of one head mean nothing to another teacher; average heads of one class list": (
                other.words != first.words
            ),
        },
        ModelError,
    )


def load_teachers(config: TeacherConfig, class_names: Sequence[str], device: torch.device) -> Teacher:
    """Return the teacher or teachers of a configuration as one, over the classes of the images.

    `class_names`: of the images; empty if they have no classes. Raises ModelError or ConfigError for what
    does not exist or fit.
    """
    members = _load_members(config, device)
    for member in members:
        name_classes(member, config.class_order, class_names)
    # A segmentation model makes maps of any number of cells itself, out of what it says of pixels.
    cells = None if all(isinstance(member, SegmenterTeacher) for member in members) else config.cells
    alone = len(members) == 1 and not config.flip and cells is None
    teacher = members[0] if alone else Ensemble(members, flip=config.flip, cells=cells)
    for member in members:
        if teacher.class_names and not member.class_names:
            pairs = [f"{i} = {name}" for i, name in enumerate(teacher.class_names)]
            say(
                f"assuming {member.description['name']}'s {member.num_classes:,} classes are the other teacher's in "
                f"its order: {listed(pairs)}; overrule with --class-order natural, sorted or FILE"
            )
    if (teacher.words or teacher.own_classes) and config.class_map is None:  # the labels are about these
        return teacher
    class_map = class_map_of(teacher, config.class_map, class_names)
    if class_map is not None:
        class_map = replace(class_map, outside=config.outside)
        teacher = Ensemble(members, flip=config.flip, cells=cells, class_map=class_map)
    if class_names:  # those of the images from now on, whatever it was that paired them
        teacher.class_names, teacher.names_assumed = tuple(class_names), False
    return teacher


def _load_members(config: TeacherConfig, device: torch.device) -> list[Teacher]:
    names = [config.teacher] if isinstance(config.teacher, str) else config.teacher
    files = config.weights if isinstance(config.weights, list) else [config.weights]
    if files == [None]:
        files = [None] * len(names)
    if len(files) != len(names):
        raise ModelError(f"{len(names)} teachers, but {len(files)} files of weights; give one for each, in order")
    members = [
        load_teacher(name, config, device, weights=file or None) for name, file in zip(names, files, strict=True)
    ]
    if config.scales and not all(isinstance(member, SegmenterTeacher) for member in members):
        raise ModelError("--scales is for segmentation runs; leave it out")
    return members


def class_map_of(
    teacher: Teacher, spec: str | None, class_names: Sequence[str], *, options: str = "--"
) -> ClassMap | None:
    """Return how a teacher's classes become those of the images; see `class_map_for`."""
    return class_map_for(
        spec,
        teacher.class_names,
        class_names,
        num_theirs=teacher.num_classes,
        assumed=teacher.names_assumed,
        options=options,
    )


def name_classes(
    teacher: Teacher, order: str | None, class_names: Sequence[str], *, option: str = "--class-order"
) -> None:
    """Let a teacher's classes be what the user says that they are, if he does; see `class_order`."""
    if order is not None:
        known = () if teacher.names_assumed else teacher.class_names
        names = class_order(order, class_names, known, count=teacher.num_classes, option=option)
        teacher.class_names, teacher.names_assumed = tuple(names), False


def _resampled(probs: Float[Tensor, "B h w C"], grid: tuple[int, int]) -> Float[Tensor, "B rows columns C"]:
    if probs.shape[1:3] == grid:
        return probs
    planes = probs.permute(0, 3, 1, 2)
    if grid[0] <= probs.shape[1] and grid[1] <= probs.shape[2]:
        planes = F.adaptive_avg_pool2d(planes, grid)
    else:
        planes = F.interpolate(planes, size=grid, mode="bilinear", align_corners=False)
    return planes.permute(0, 2, 3, 1)
