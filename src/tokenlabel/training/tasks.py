"""What a run trains: a model, its images, its loss and its evaluation. The engine does the rest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from tokenlabel.core.step import Part
from tokenlabel.data.classes import ClassList
from tokenlabel.data.samplers import BatchSampler
from tokenlabel.drawing.pictures import Album
from tokenlabel.models import TokenModel
from tokenlabel.runtime.distributed import Ranks
from tokenlabel.training.recipe import TrainingConfig
from tokenlabel.training.run_images import RunImages

RecipeT = TypeVar("RecipeT", bound=TrainingConfig)


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a dry run says of a task, and a table under a title, headings first."""

    network: str
    images: str
    targets: str
    title: str = ""
    table: Sequence[Sequence[str]] = ()


class Task(ABC, Generic[RecipeT]):
    """What a run trains.

    `model` lies on `device`. `step` is called as `step(batch, part, watch)` (see `core.step.TrainStep`) and returns
    `loss`, the mean over the images that is to be lowered, and its parts under names of their own. `metric` names the
    figure of `evaluate` that is better the higher it is. `images`: what is known of the images, for the run folder.
    `token_classes`: what the tokens are about where these are other classes than `class_names`. `zero_means`: what is
    wrong if a part of the loss, by its name, is 0 in all of the first steps.
    """

    recipe: RecipeT
    model: TokenModel
    step: nn.Module
    class_names: list[str]
    token_classes: ClassList | None = None
    num_images: int
    device: torch.device
    metric: str
    images: RunImages | None = None
    zero_means: Mapping[str, str] = {}

    @abstractmethod
    def batches(self, sampler: BatchSampler) -> Iterable[Any]:
        """Return the sampler's batches; each has `keys`, the names of its images, and `to(device)`."""

    def order(self) -> Callable[[int], NDArray[np.int64]] | None:
        """Return the permutation of the images of each epoch by its number; None for a plain random one."""
        return None

    def picture(self, batch: Any, part: Part, indices: Sequence[tuple[int, int]]) -> Album | None:
        """Return pictures of a batch as the part of a step that it is trained on; None if there are none to show.

        `indices`: epoch and index of each image. Must draw no random numbers but those of the part.
        """
        return None

    @abstractmethod
    def summary(self) -> Summary:
        """Return what a dry run says of the task."""

    @abstractmethod
    def evaluate(self, model: nn.Module, ranks: Ranks, *, run: Path | None = None, **about: Any) -> dict[str, Any]:
        """Return the figures of a model (the averaged one) over all ranks; none where there is nothing to ask.

        The first rank writes what is to be seen of it into `run`, a run folder: pictures, to which `about` is added,
        and the answers to all images.
        """
