"""A teacher in the step: a network that looks at augmented images as they come out of the loader."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from tokenlabel.core.config import OnlineTeacherConfig
from tokenlabel.runtime.errors import ModelError
from tokenlabel.teachers.classmap import ClassMap
from tokenlabel.teachers.ensemble import class_map_of, name_classes
from tokenlabel.teachers.networks import NetworkTeacher, TeacherConfig, load_teacher


class NetworkOnlineTeacher:
    """A network teacher that is shown augmented images, resized to what it takes.

    `size`: it sees them at an area of about size x size pixels and their own aspect, each side a multiple of its
    stride; at their own size if None. A network of fixed size always gets that. `class_map`: where its classes go.
    """

    def __init__(self, teacher: NetworkTeacher, *, size: int | None = None, class_map: ClassMap | None = None) -> None:
        self.teacher, self.size, self.class_map = teacher, size, class_map

    @torch.no_grad()  # not inference_mode: its targets are kept for the backward pass
    def probabilities(
        self, images: UInt8[Tensor, "B 3 height width"]
    ) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B h w C"]]:
        """Return the distributions of whole images and of every location of them, in float32.

        All 0 where a class map leaves out what is shown.
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

    Raises ModelError or ConfigError for what does not exist or fit.
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
        what = "says visual words, not classes" if teacher.words else "holds a segmentation model"
        raise ModelError(
            f"loss.teacher.name {config.name}: {what}; label the images once (`tokenlabel annotate IMAGES labels "
            f"--teacher {config.name}`) and give data.labels"
        )
    name_classes(teacher, config.class_order, class_names, option="--loss.teacher.class-order")
    class_map = class_map_of(teacher, config.class_map, class_names, options="--loss.teacher.")
    class_map = class_map and replace(class_map, outside=config.outside)
    return NetworkOnlineTeacher(teacher, size=config.size, class_map=class_map)
