"""Linear heads: multinomial logistic regression on frozen vectors by L-BFGS, with the best of some weight decays."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from tokenlabel.teachers.dense import MAX_LOGITS

DECAYS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
"""Weight decays that are tried, the strongest first: each fit starts from the one before it."""

MAX_ITERATIONS = 60


@dataclass(frozen=True, eq=False)
class Examples:
    """Bags of vectors [n, L, D] in any precision, their targets, and their weights.

    `targets`: class ids [n] (int64), or a distribution over the classes each [n, C]. The logits of a bag are the smooth
    maximum, log(mean(exp)), of those of its vectors, class by class: one of them has to show the class, not all
    (multiple-instance learning).
    """

    vectors: Float[Tensor, "n L D"]
    targets: Tensor
    weights: Float[Tensor, " n"]
    num_classes: int

    def __len__(self) -> int:
        """Return n."""
        return len(self.vectors)

    def of(self, rows: Bool[Tensor, " n"] | slice) -> Examples:
        """Return some of the bags."""
        return Examples(self.vectors[rows], self.targets[rows], self.weights[rows], self.num_classes)

    def blocks(self) -> Iterator[Examples]:
        """Yield blocks of bags whose logits and vectors have at most MAX_LOGITS numbers."""
        _, length, width = self.vectors.shape
        size = max(1, MAX_LOGITS // (length * max(width, self.num_classes)))
        for start in range(0, len(self), size):
            yield self.of(slice(start, start + size))


@dataclass(frozen=True, eq=False)
class LinearFit:
    """A linear head, `x @ matrix.T + bias`, and the decay that it was fitted with."""

    matrix: Float[Tensor, "C D"]
    bias: Float[Tensor, " C"]
    decay: float

    def logits(self, vectors: Float[Tensor, "*n D"]) -> Float[Tensor, "*n C"]:
        """Return the logits of vectors."""
        return F.linear(vectors.float(), self.matrix, self.bias)


def choose_decay(train: Examples, loss: Callable[[LinearFit], float]) -> LinearFit:
    """Return the head, fitted on `train` with each of DECAYS, that has the smallest loss (on held-out images)."""
    return min(_fits(train, DECAYS), key=loss)


def fit_linear(examples: Examples, decay: float) -> LinearFit:
    """Return the head fitted with one of DECAYS."""
    return _fits(examples, DECAYS[: DECAYS.index(decay) + 1])[-1]


@torch.no_grad()
def cross_entropy(fit: LinearFit, examples: Examples) -> float:
    """Return the mean cross-entropy of bags, in nats."""
    total = sum(float(_loss(fit.matrix, fit.bias, block)) for block in examples.blocks())
    return total / float(examples.weights.sum())


def _fits(examples: Examples, decays: tuple[float, ...]) -> list[LinearFit]:
    """Return a head for each decay, each started from the one before it.

    Fitted on standardised vectors: L-BFGS converges fast, and a decay means the same for any backbone.
    """
    mean, std = _moments(examples.vectors)
    num_classes, width = examples.num_classes, examples.vectors.shape[2]
    weight, offset = (
        examples.weights.new_zeros(size, requires_grad=True) for size in ((num_classes, width), num_classes)
    )
    total = examples.weights.sum()
    found: list[LinearFit] = []
    for decay in decays:
        optimizer = torch.optim.LBFGS(
            [weight, offset],
            max_iter=MAX_ITERATIONS,
            tolerance_grad=1e-6,
            tolerance_change=1e-8,
            line_search_fn="strong_wolfe",
        )

        # The weights are standardised instead of the vectors, which stay as they are, in half precision.
        def _closure(decay: float = decay, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            penalty = decay / 2 * weight.square().sum()
            penalty.backward()
            value = penalty.detach()
            for block in examples.blocks():
                matrix = weight / std
                loss = _loss(matrix, offset - matrix @ mean, block) / total
                loss.backward()
                value = value + loss.detach()
            return value

        optimizer.step(_closure)
        matrix = (weight / std).detach()
        found.append(LinearFit(matrix, (offset - matrix @ mean).detach(), decay))
    return found


def _loss(matrix: Float[Tensor, "C D"], bias: Float[Tensor, " C"], block: Examples) -> Float[Tensor, ""]:
    """Return the weighted sum of the cross-entropies of bags."""
    logits = F.linear(block.vectors.to(matrix.dtype), matrix, bias)  # [b, L, C]
    pooled = logits.logsumexp(dim=1) - math.log(logits.shape[1])
    return (F.cross_entropy(pooled, block.targets, reduction="none") * block.weights).sum()


def _moments(vectors: Float[Tensor, "n L D"]) -> tuple[Float[Tensor, " D"], Float[Tensor, " D"]]:
    """Return mean and standard deviation of each component, summed in float64, by blocks."""
    count = vectors.shape[0] * vectors.shape[1]
    total = vectors.new_zeros(vectors.shape[2], dtype=torch.float64)
    squares = torch.zeros_like(total)
    for block in vectors.flatten(0, 1).split(1 << 14):
        total += block.double().sum(dim=0)
        squares += block.double().square().sum(dim=0)
    mean = total / count
    std = (squares / count - mean.square()).clamp_min(0).sqrt()
    least = 1e-3 * float(std.max()) or 1.0  # a constant component is not divided by 0
    return mean.float(), std.clamp_min(least).float()
