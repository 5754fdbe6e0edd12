"""A teacher that is exactly predictable, and ranks that annotate with it in processes of their own."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from tokenlabel.data.config import Interpolation
from tokenlabel.data.images import ImageFolder
from tokenlabel.teachers.annotation import annotate_by
from tokenlabel.teachers.input import TeacherInput
from tokenlabel.teachers.networks import Teacher
from tokenlabel.teachers.options import AnnotateConfig

CPU = torch.device("cpu")


class ByColour(Teacher):
    """Says of each cell how red, green and blue it is."""

    class_names = ("blue", "green", "red")
    num_classes = 3

    def __init__(self, *, cell_px: int = 4, size: int = 16, seconds_a_batch: float = 0.0, **input) -> None:
        self.input = TeacherInput(
            **{
                "size": size,
                "stride_px": cell_px,
                "fixed_size_px": None,
                "crop_fraction": None,
                "interpolation": Interpolation.BILINEAR,
                "mean": (0.0, 0.0, 0.0),
                "std": (1.0, 1.0, 1.0),
                **input,
            }
        )
        self.cell_px = cell_px
        self.seconds_a_batch = seconds_a_batch
        self.description = {"name": "by colour"}
        self.num_seen = 0

    def check(self, images):
        return "by colour: certain"

    def probabilities(self, images):
        self.num_seen += len(images)
        time.sleep(self.seconds_a_batch)
        colours = torch.nn.functional.avg_pool2d(images.flip(1).float() + 1, self.cell_px)
        return (colours / colours.sum(dim=1, keepdim=True)).permute(0, 2, 3, 1)


def run_rank(rank: int, world_size: int, port: int, images: Path, labels: Path) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    config = AnnotateConfig(teacher="by colour", batch_size=2, num_workers=1, shard_s=0.05)
    annotate_by(ByColour(seconds_a_batch=0.01), ImageFolder(images), labels, config=config, device=CPU)


def start_ranks(world_size: int, images: Path, labels: Path) -> Sequence[BaseProcess]:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    context = get_context("forkserver")
    context.set_forkserver_preload(["tokenlabel.teachers.annotation"])  # imports torch once, not once a rank
    ranks = [
        context.Process(target=run_rank, args=(rank, world_size, port, images, labels)) for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    return ranks
