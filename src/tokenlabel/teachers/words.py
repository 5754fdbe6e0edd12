"""Visual words: spherical k-means of the vectors of locations, so that a backbone is a teacher without any label."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from tokenlabel.teachers.dense import MAX_LOGITS

NUM_ROUNDS = 8
"""Passes of mini-batch k-means over the sample."""

INERTIA = 4.0
"""A word of the round before counts as at most so many vectors, so that later rounds forget where it started."""

KEPT_MASS = 0.9


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
    center = _mean(vectors)

    def _unit(rows: Tensor | slice) -> Float[Tensor, "b D"]:
        return normalize(vectors[rows].float() - center, dim=1)

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
            words[present] = normalize(sums[present], dim=1)
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


def _mean(vectors: Float[Tensor, "n D"]) -> Float[Tensor, " D"]:
    total = torch.zeros(vectors.shape[1], dtype=torch.float64, device=vectors.device)
    for block in vectors.split(1 << 14):
        total += block.double().sum(dim=0)
    return (total / len(vectors)).float()


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
