"""What steps say, collected and reported now and then: means over steps and ranks, speed, memory, divergence."""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from tokenlabel.runtime.distributed import Ranks


@dataclass(frozen=True, eq=False)
class StepResult:
    """What a step said: its losses and the norm of its gradient, and the keys of this rank's images."""

    values: dict[str, Tensor]
    keys: Sequence[str]


@dataclass(frozen=True)
class Divergence:
    """The first step at which `what` (loss or gradient) was not finite, on the rank that had it first."""

    step: int
    what: str
    value: float
    keys: Sequence[str]


@dataclass(eq=False)
class Window:
    """Collects what steps say until it is asked for, so that the device need not be waited for at each."""

    ranks: Ranks
    results: list[StepResult] = field(default_factory=list)

    def add(self, result: StepResult) -> None:
        """Take in the result of one more step."""
        self.results.append(result)

    def means(self, done: int) -> tuple[dict[str, float], Divergence | None]:
        """Return the mean of each value over the window's steps and all ranks, and forget them.

        `done`: the number of steps that the run has done. All ranks call this.
        """
        results, self.results = self.results, []
        values = {
            name: torch.stack([result.values[name].float() for result in results]).tolist()
            for name in results[0].values
        }
        every = self.ranks.all_gather(values)
        means = {name: float(np.mean([rank[name] for rank in every])) for name in values}
        for name, what in (("loss", "loss"), ("gradient_norm", "norm of the gradient")):
            if math.isfinite(means.get(name, 0.0)):
                continue
            of_steps = np.array([rank[name] for rank in every])  # [ranks, steps]
            number = int(np.argmin(np.isfinite(of_steps).all(axis=0)))
            rank = int(np.argmin(np.isfinite(of_steps[:, number])))
            keys = self.ranks.all_gather(results[number].keys)[rank]
            return means, Divergence(done - len(results) + number, what, of_steps[rank, number], keys)
        return means, None


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory that tensors on a GPU, or this process on the CPU, ever held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
