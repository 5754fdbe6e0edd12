"""What a run trains: a model, its images, its loss and its evaluation. The engine does the rest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tokenlabel.data.samplers import BatchSampler
from tokenlabel.models import TokenModel
from tokenlabel.runtime.distributed import Ranks
from tokenlabel.runtime.runlog import Stopwatch
from tokenlabel.training.recipe import TrainingConfig
from tokenlabel.training.run_folder import RunImages

RecipeT = TypeVar("RecipeT", bound=TrainingConfig)
_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class Part:
    """The images that a process takes through the model at once: those from place `start` on of a step's batch."""

    seed: int
    step: int
    start: int

    def random_seed(self, place: int = 0) -> int:
        """Return the seed of everything random about the images from the given place within the part on."""
        entropy = np.random.SeedSequence([self.seed, self.step, self.start + place])
        return int(entropy.generate_state(1, np.uint64)[0] >> 1)

    def generator(self, place: int = 0) -> torch.Generator:
        """Return a source of random numbers on the CPU with that seed."""
        return torch.Generator().manual_seed(self.random_seed(place))


class Task(ABC, Generic[RecipeT]):
    """What a run trains.

    `model` lies on `device`. `metric` names the figure of `evaluate` that is better the higher it is. `images`: what
    is known of the images, for the run folder.
    """

    recipe: RecipeT
    model: TokenModel
    class_names: list[str]
    num_images: int
    device: torch.device
    metric: str
    images: RunImages | None = None

    @abstractmethod
    def batches(self, sampler: BatchSampler) -> Iterable[Any]:
        """Return the sampler's batches; each has `keys`, the names of its images, and `to(device)`."""

    def order(self) -> Callable[[int], NDArray[np.int64]] | None:
        """Return the permutation of the images of each epoch by its number; None for a plain random one."""
        return None

    @abstractmethod
    def losses(self, model: nn.Module, batch: Any, part: Part, watch: Stopwatch) -> dict[str, Tensor]:
        """Return `loss`, the mean over the images that is to be lowered, and its parts under names of their own.

        `model` is the task's model. Everything random follows from the part; the model's own draws are seeded.
        """

    @abstractmethod
    def evaluate(self, model: nn.Module, ranks: Ranks) -> dict[str, Any]:
        """Return the figures of a model (the averaged one) over all ranks; none where there is nothing to ask."""

    def autocast(self) -> torch.autocast:
        """Return the context of the forward pass in the recipe's precision."""
        dtype = _DTYPES[self.recipe.precision]
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)
