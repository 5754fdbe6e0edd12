"""At which size a teacher sees whole images as it sees the crops that it was evaluated on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from PIL import Image

from tokenlabel.data.decoding import decode_image
from tokenlabel.data.images import ImageSource
from tokenlabel.runtime.errors import ImageError, ModelError
from tokenlabel.teachers.input import TeacherInput
from tokenlabel.teachers.labelling import TeacherImage, as_tensor
from tokenlabel.teachers.networks import NetworkTeacher

NUM_TRIED = 128
ENOUGH_IMAGES = 10_000
"""So many images are worth trying sizes out, which costs what labelling some 750 does."""

_FACTORS = (1.25, 1.5)
_MIN_GAIN = 4  # images; fewer of 128 may well be chance


def proposed_size(
    teacher: NetworkTeacher, source: ImageSource, indices: Sequence[int], device: torch.device
) -> str | None:
    """Return in one line which size agrees better with the network's own crops on the first images; None if none does.

    The crops are those that the network was evaluated on, and what it says of one is its own output, the mean over the
    locations what it says of a whole image. Nothing is said of teachers whose size or crop somebody chose.
    """
    crop = teacher.evaluated_on
    if crop is None or teacher.input.size is None:
        return None
    images: list[Image.Image] = []
    for index in indices[:NUM_TRIED]:
        try:
            images.append(decode_image(source.read(index), source.keys[index]))
        except ImageError:
            continue
    own = [_class_of(teacher, crop, image, device, whole=False) for image in images]

    def agreeing(input: TeacherInput) -> int:
        found = (_class_of(teacher, input, image, device, whole=True) for image in images)
        return sum(ours == theirs for ours, theirs in zip(own, found, strict=True))

    size, stride_px = teacher.input.size, teacher.input.stride_px
    others = [round(size * factor / stride_px) * stride_px for factor in _FACTORS]
    try:
        counts = {other: agreeing(replace(teacher.input, size=other)) for other in [size, *others]}
    except (ModelError, ValueError):  # a network that takes no larger images
        return None
    best = max(counts, key=lambda other: (counts[other], -other))  # of equal ones the smallest, which costs least
    if counts[best] - counts[size] < _MIN_GAIN:
        return None
    return (
        f"{teacher.description['name']}: of {len(images)} whole images at {size} px it names the class of its own crop "
        f"in {counts[size]}, at {best} px in {counts[best]}: --size {best}, into another folder, may label better, for "
        f"{(best / size) ** 2:.1f} times the work"
    )


def _class_of(
    teacher: NetworkTeacher, input: TeacherInput, image: Image.Image, device: torch.device, *, whole: bool
) -> int:
    """Return the class that a teacher names in an image: by all locations of the `whole`, or by its own output."""
    with torch.inference_mode():
        logits = teacher.logits(as_tensor([TeacherImage("", *input.of(image))], device))
    scores = logits.locations.float().mean(dim=(1, 2)) if whole else logits.image.float()
    return int(scores.argmax(dim=1))
