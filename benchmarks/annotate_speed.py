"""What writing labels costs the teacher: images a second with and without, over the same decoded batches.

Bare is the teacher's forward pass, from uint8 pixels on the CPU to the distribution of every place;
annotating adds the top 5, the packing of score maps and a label store on the disk. NFNet-F6 at 576 px in bf16
on a GPU; ResNet-50 at 224 px on a CPU, where the teacher leaves one core to the rest, as a GPU leaves it all
of its host's. Both have random weights, which take as long as trained ones, with logits scaled until the best
class of a place has a probability of 0.5 on average: flat maps would pack faster.
"""

from __future__ import annotations

import itertools
import math
import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor

from benchmarks.measure import Row, Settings, interleave, ratios
from tokenlabel.core.geometry import WHOLE_IMAGE
from tokenlabel.data.config import Interpolation
from tokenlabel.labels.manifest import Manifest
from tokenlabel.labels.writer import LabelStoreWriter
from tokenlabel.teachers.dense import ClassifierNetwork
from tokenlabel.teachers.input import TeacherInput
from tokenlabel.teachers.labelling import TeacherImage, label_batches
from tokenlabel.teachers.networks import NetworkTeacher


def run(settings: Settings) -> list[Row]:
    """Measure the bare teacher and annotating in turns."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(max(1, min(num_threads, (os.cpu_count() or 1) - 1)))
    try:
        if settings.device.type == "cuda":
            return rows_of("dm_nfnet_f6", 576, 64, settings)
        return rows_of("resnet50", 224, 8, settings)
    finally:
        torch.set_num_threads(num_threads)


def rows_of(name: str, size: int, batch_size: int, settings: Settings, **options: Any) -> list[Row]:
    """Measure one teacher at one size; `options` are timm's."""
    num_batches = 2 if settings.quick else 4
    teacher = _teacher(name, size, settings, options)
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 256, (batch_size, size, size, 3), dtype=np.uint8) for _ in range(num_batches)]
    batches = [
        [TeacherImage(f"{b}/{i}.jpg", image, WHOLE_IMAGE) for i, image in enumerate(batch)]
        for b, batch in enumerate(pixels)
    ]
    _sharpen(teacher, torch.from_numpy(pixels[0]).permute(0, 3, 1, 2).to(settings.device))
    counter = itertools.count()
    with tempfile.TemporaryDirectory() as folder:

        def annotated() -> None:
            _annotate(teacher, batches, Path(folder) / str(next(counter)), settings)

        ways = {"bare teacher": lambda: _bare(teacher, batches, settings), "annotating": annotated}
        seconds = interleave(ways, settings, rounds=3 if settings.quick else 11)
    num_images = num_batches * batch_size
    rows = [Row(f"{name}, {way}", [num_images / s for s in values], "images/s") for way, values in seconds.items()]
    share = ratios(seconds["bare teacher"], seconds["annotating"])
    return [*rows, Row(f"{name}, annotating / bare teacher", share, "x", aim="at least 0.97")]


class Unchecked(NetworkTeacher):
    """A teacher whose first batch takes as long as the others."""

    def check(self, images: Tensor) -> str:
        """Say that nothing was checked."""
        return "random weights"


def _teacher(name: str, size: int, settings: Settings, options: Mapping[str, Any]) -> NetworkTeacher:
    network = ClassifierNetwork(timm.create_model(name, **options), name=name).eval().to(settings.device)
    input = TeacherInput(
        size=size,
        stride_px=32,
        fixed_size_px=None,
        crop_fraction=None,
        interpolation=Interpolation.BICUBIC,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )
    precision = "bf16" if settings.device.type == "cuda" else "fp32"
    network = network.to(memory_format=torch.channels_last)
    return Unchecked(network, input, description={"name": name}, precision=precision)


@torch.inference_mode()
def _sharpen(teacher: NetworkTeacher, images: Tensor) -> None:
    """Scale the classifier so that the best class of a place has a probability of 0.5 on average."""
    logits = teacher.logits(images).locations.float()
    low, high = 1.0, 1e6
    for _ in range(30):
        middle = math.sqrt(low * high)
        above = float((middle * logits).softmax(dim=3).amax(dim=3).mean()) > 0.5
        low, high = (low, middle) if above else (middle, high)
    backbone: Any = teacher.dense.get_submodule("backbone")
    for parameter in backbone.get_classifier().parameters():
        parameter.mul_(low)


@torch.inference_mode()
def _bare(teacher: NetworkTeacher, batches: list[list[TeacherImage]], settings: Settings) -> None:
    for batch in batches:
        images = torch.from_numpy(np.stack([seen.pixels for seen in batch])).permute(0, 3, 1, 2)
        images = (images.pin_memory() if settings.device.type == "cuda" else images).to(settings.device)
        teacher.probabilities(images)


def _annotate(teacher: NetworkTeacher, batches: list[list[TeacherImage]], folder: Path, settings: Settings) -> None:
    manifest = Manifest(num_classes=teacher.num_classes, topk=5, teacher=teacher.description)
    labels = label_batches(teacher, batches, manifest, device=settings.device, num_workers=2, cells=Counter())
    with LabelStoreWriter(folder, manifest) as writer:
        for key, record in labels:
            writer.add_record(key, record)
