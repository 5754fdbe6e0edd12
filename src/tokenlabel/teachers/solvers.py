"""The two fits of heads on frozen vectors: logistic regression for classes, spherical k-means for visual words.

Regression: multinomial, by L-BFGS, with the best of some weight decays; in multiple-instance form for images whose
class only some locations show. The words are clusters of the vectors of locations, so a backbone is a teacher without
any label.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from tokenlabel.teachers.dense import MAX_LOGITS

DECAYS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
"""Weight decays that are tried, the strongest first: each fit starts from the one before it."""

MAX_ITERATIONS = 60

NUM_ROUNDS = 8
"""Passes of mini-batch k-means over the sample."""

INERTIA = 4.0
"""A word of the round before counts as at most so many vectors, so that later rounds forget where it started."""

KEPT_MASS = 0.9


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
            # backward() for each block: the graph of one block at a time is in memory.
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
    pooled = logits.logsumexp(dim=1) - math.log(logits.shape[1])  # a bag of one vector keeps its logits
    return (F.cross_entropy(pooled, block.targets, reduction="none") * block.weights).sum()


def _moments(vectors: Float[Tensor, "n L D"]) -> tuple[Float[Tensor, " D"], Float[Tensor, " D"]]:
    """Return mean and standard deviation of each component."""
    # In float64, by blocks: the sample is in half precision, and a copy in double would take four times its memory.
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


@dataclass(frozen=True, eq=False)
class Words:
    """Visual words: unit vectors `matrix` [W, D] of vectors minus `center` [D], and the scale of the cosines.

    `cosine`: mean cosine of a location and its word. `num_unused`: words that are the nearest one of no location.
    """

    matrix: Float[Tensor, "W D"]
    center: Float[Tensor, " D"]
    scale: float
    cosine: float
    num_unused: int


def fit_words(vectors: Float[Tensor, "n D"], num_words: int, *, topk: int, seed: int) -> Words:
    """Return the words of a sample of vectors (any precision), the same for the same sample and seed.

    Mini-batch k-means on the sphere: a word is the direction of the mean of its vectors. Words that are the nearest of
    no vector in a round are moved to vectors far from theirs (drawn as in k-means++). The scale is chosen so that the
    `topk` most probable words of a location hold .9 of the probability. Needs at least `num_words` vectors; beside the
    sample it takes 2 x words x width numbers and MAX_LOGITS cosines.
    """
    generator = torch.Generator().manual_seed(seed)
    center, _ = _moments(vectors[:, None])

    def _unit(rows: Tensor | slice) -> Float[Tensor, "b D"]:
        return F.normalize(vectors[rows].float() - center, dim=1)

    start = torch.randperm(len(vectors), generator=generator)[:num_words].to(vectors.device)
    words = _unit(start)
    counts = torch.ones(num_words, device=vectors.device)
    cosines = torch.empty(len(vectors), device=vectors.device)
    size = max(64, MAX_LOGITS // num_words)
    for number in range(NUM_ROUNDS):
        sums, taken = words * counts.clamp(max=INERTIA)[:, None], torch.zeros_like(counts)
        # Drawn on the CPU: the generators of different GPUs give different numbers.
        for rows in torch.randperm(len(vectors), generator=generator).split(size):
            rows = rows.to(vectors.device)
            x = _unit(rows)
            cosines[rows], nearest = (x @ words.T).max(dim=1)
            present, part, number_of = _sums(x, nearest)
            sums[present] += part
            taken[present] += number_of
            words[present] = F.normalize(sums[present], dim=1)
        counts = taken
        unused = (taken == 0).nonzero()[:, 0]
        if len(unused) and number < NUM_ROUNDS - 1:
            words[unused] = _unit(_far(cosines, len(unused), generator))
            counts[unused] = 1
    return Words(
        words,
        center,
        scale=_scale(_unit(_spread(len(vectors), MAX_LOGITS // num_words)) @ words.T, topk),
        cosine=float(cosines.mean()),
        num_unused=int((counts == 0).sum()),
    )


def _sums(
    x: Float[Tensor, "b D"], nearest: Int[Tensor, " b"]
) -> tuple[Int[Tensor, " u"], Float[Tensor, "u D"], Float[Tensor, " u"]]:
    """Return the words that have vectors, and the sum and the number of these."""
    # By sorted segments: `index_add_` is not deterministic on a GPU.
    order = nearest.argsort(stable=True)
    present, lengths = nearest[order].unique_consecutive(return_counts=True)
    return present, torch.segment_reduce(x[order], "sum", lengths=lengths), lengths.float()


def _far(cosines: Float[Tensor, " n"], count: int, generator: torch.Generator) -> Int[Tensor, " count"]:
    """Draw vectors without repetition, with probabilities proportional to 1 - cosine (the Gumbel top-k trick)."""
    uniform = torch.rand(len(cosines), generator=generator).clamp_min(1e-30)
    keys = (1 - cosines.cpu()).clamp_min(1e-12).log() - (-uniform.log()).log()
    return keys.topk(count).indices.to(cosines.device)


def _spread(num_vectors: int, most: int) -> Int[Tensor, " m"]:
    """Return the rows of at most `most` (and 4,096) vectors, evenly spaced over the sample."""
    count = min(num_vectors, 4096, max(1, most))
    return torch.linspace(0, num_vectors - 1, count).long()


def _scale(cosines: Float[Tensor, "m W"], topk: int) -> float:
    """Return the inverse temperature at which the topk words of a location hold .9 of the probability on average."""
    k = min(topk, max(1, cosines.shape[1] // 4))  # topk of few words could hold .9 at any scale
    cosines = cosines.sort(dim=1, descending=True).values
    low, high = 1.0, 1e4
    for _ in range(30):  # bisection of the logarithm, far below what a float tells apart
        scale = math.sqrt(low * high)
        kept = float((cosines * scale).softmax(dim=1)[:, :k].sum(dim=1).mean())
        low, high = (low, scale) if kept > KEPT_MASS else (scale, high)
    return math.sqrt(low * high)
