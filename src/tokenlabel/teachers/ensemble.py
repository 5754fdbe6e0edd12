"""Teachers over the classes of the images: ensembles, for labels that are stored, and one that runs in each step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from tokenlabel.core.config import OnlineTeacherConfig
from tokenlabel.data.class_names import class_order
from tokenlabel.data.classes import ids_among, same_classes
from tokenlabel.runtime.errors import ModelError, refuse
from tokenlabel.runtime.process import listed, say
from tokenlabel.teachers.classmap import ClassMap, class_map_for
from tokenlabel.teachers.dense import MAX_LOGITS, TopClasses
from tokenlabel.teachers.input import cells_of
from tokenlabel.teachers.networks import NetworkTeacher, SegmenterTeacher, Teacher, load_teacher
from tokenlabel.teachers.options import TeacherConfig


class Ensemble(Teacher):
    """Averages the distributions of its members.

    `input` is that of the first member; others get its images resized if they need another size. Maps of different
    grids are resampled to the finest one, or to about `cells` x `cells`: bilinearly, or averaged if that is coarser.
    `flip`: also average with the mirrored maps of the mirrored images. `class_map`: applied to the average. Raises
    ModelError for members of different classes.
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
        # The classes of all are those of a member that names its own.
        first = min(self.members, key=lambda member: (not member.class_names, member.names_assumed))
        for other in self.members:
            _check_alike(first, other)
        self.num_classes = class_map.num_classes if class_map else first.num_classes
        self.words = "" if class_map else first.words
        self.own_classes = first.own_classes and class_map is None
        self.class_names = () if class_map else first.class_names
        self.names_assumed = class_map is None and first.names_assumed
        # Sides that are a multiple of the strides of all members.
        stride_px = math.lcm(*(member.input.stride_px for member in self.members))
        self.input = replace(self.members[0].input, stride_px=stride_px)
        self.description = {
            "members": [member.description for member in self.members],
            "flip": flip,
            "class_map": class_map and class_map.description,
            **({"words": self.words} if self.words else {}),
            **({"cells": cells} if cells else {}),
        }

    def check(self, images: UInt8[Tensor, "B 3 height width"]) -> str:
        """Check each member."""
        return "; ".join(member.check(member.input.resized(images, mode="bilinear")) for member in self.members)

    def top(self, images: UInt8[Tensor, "B 3 height width"], k: int) -> TopClasses:
        """Return the k most probable classes of each location, by blocks of images if there are very many classes."""
        # The dense distributions of a batch over 65,536 words would take gigabytes.
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
            if self.flip:  # both are mirrored along the width: axis 3 of images, axis 2 of maps
                maps.append(member.probabilities(seen.flip(3)).flip(2))
        grid = max(((m.shape[1], m.shape[2]) for m in maps), key=math.prod)
        if self.cells is not None:
            grid = cells_of((images.shape[2], images.shape[3]), self.cells)
        mean = torch.stack([_resampled(m, grid) for m in maps]).mean(dim=0)
        return mean if self.class_map is None else self.class_map.apply(mean)


def _check_alike(first: Teacher, other: Teacher) -> None:
    """Raise ModelError for teachers of different classes."""
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
    """Return the teacher or the ensemble of a configuration, over the classes of the images.

    `class_names`: of the images; empty if they have no classes. Raises ModelError or ConfigError if a teacher does not
    exist, or its classes do not match.
    """
    members = _load_members(config, device)
    for member in members:
        name_classes(member, config.class_order, class_names)
    # A segmentation model predicts pixels, so it makes maps of any number of cells itself.
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
    of_places = class_names and all(member.of_places for member in members)
    if of_places and max(ids_among(class_names, teacher.class_names)) < 0 and config.class_map is None:
        say(f"labels are about the teacher's classes ({listed(teacher.class_names)}), none of which is the images'")
        teacher.own_classes = True
    if (teacher.words or teacher.own_classes) and config.class_map is None:  # labels are about its own classes
        return teacher
    class_map = class_map_of(teacher, config.class_map, class_names)
    if class_map is not None:
        class_map = replace(class_map, outside=config.outside)
        teacher = Ensemble(members, flip=config.flip, cells=cells, class_map=class_map)
    if class_names:  # the classes match by now, though their names may be spelled otherwise
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
    """Set the class names of a teacher if the user gives them; see `class_order`."""
    if order is not None:
        known = () if teacher.names_assumed else teacher.class_names
        names = class_order(order, class_names, known, count=teacher.num_classes, option=option)
        teacher.class_names, teacher.names_assumed = tuple(names), False


def _resampled(probs: Float[Tensor, "B h w C"], grid: tuple[int, int]) -> Float[Tensor, "B rows columns C"]:
    if probs.shape[1:3] == grid:
        return probs
    planes = probs.permute(0, 3, 1, 2)
    # Averaged if coarser: interpolation would read only some of the cells. Both keep the sum of 1 at each location.
    if grid[0] <= probs.shape[1] and grid[1] <= probs.shape[2]:
        planes = F.adaptive_avg_pool2d(planes, grid)
    else:
        planes = F.interpolate(planes, size=grid, mode="bilinear", align_corners=False)
    return planes.permute(0, 2, 3, 1)


class NetworkOnlineTeacher:
    """A teacher that runs in the training step, on the augmented images, resized to what it takes.

    `size`: images are resized to an area of about size x size pixels at their own aspect ratio, each side a multiple of
    the teacher's stride; None keeps their size. A network of fixed size always gets that. `class_map`: applied to the
    predictions.
    """

    def __init__(self, teacher: NetworkTeacher, *, size: int | None = None, class_map: ClassMap | None = None) -> None:
        self.teacher, self.size, self.class_map = teacher, size, class_map

    @torch.no_grad()  # not inference_mode: autograd could not save its targets for the backward pass
    def probabilities(
        self, images: UInt8[Tensor, "B 3 height width"]
    ) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B h w C"]]:
        """Return the distributions of whole images and of all their locations, in float32.

        They are 0 if the class map drops what is shown.
        """
        logits = self.teacher.logits(self.teacher.input.resized(images, size=self.size, mode="bicubic"))
        of_images, of_locations = logits.image.float().softmax(dim=1), logits.locations.float().softmax(dim=3)
        if self.class_map is None:
            return of_images, of_locations
        return self.class_map.apply(of_images), self.class_map.apply(of_locations)


def load_online_teacher(
    config: OnlineTeacherConfig, class_names: Sequence[str], device: torch.device
) -> NetworkOnlineTeacher | None:
    """Return the teacher of a configuration over the classes of the images; None if it names none.

    Raises ModelError or ConfigError if the teacher does not exist, or its classes do not match.
    """
    if config.name is None:
        return None
    teacher = load_teacher(
        config.name,
        TeacherConfig(
            teacher=config.name, size=config.size, head=config.head, precision=config.precision, compile=config.compile
        ),
        device,
        weights=config.weights,
    )
    if teacher.words or not isinstance(teacher, NetworkTeacher):
        what = "predicts visual words, not classes" if teacher.words else "holds a segmentation model"
        raise ModelError(
            f"loss.teacher.name {config.name}: {what}; label the images once (`tokenlabel annotate IMAGES labels "
            f"--teacher {config.name}`) and give data.labels"
        )
    name_classes(teacher, config.class_order, class_names, option="--loss.teacher.class-order")
    class_map = class_map_of(teacher, config.class_map, class_names, options="--loss.teacher.")
    class_map = class_map and replace(class_map, outside=config.outside)
    return NetworkOnlineTeacher(teacher, size=config.size, class_map=class_map)
