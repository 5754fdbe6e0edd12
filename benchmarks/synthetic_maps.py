"""Synthetic score maps, as smooth and as varied as those of a strong ImageNet teacher, from a fixed seed.

An image has 3 to 8 objects, each a soft blob on the 18 x 18 grid with a class and 4 others that it is easily taken
for; everywhere else, faint smooth fields of all classes decide. Logits are scaled image by image so that the mean
probability of the best class is 0.5; images of fewer than 20 or more than 60 distinct classes are drawn again.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from tokenlabel.core.scores import ScoreMap, from_probabilities

GRID = (18, 18)
NUM_CLASSES = 1000
TOPK = 5
DISTINCT_CLASSES = (20, 60)
MEAN_TOP_PROB = 0.5
_BACKGROUND = 0.05  # standard deviation of the faint fields; an object's peak is 1


def synthetic_maps(count: int, *, seed: int = 0) -> Iterator[ScoreMap]:
    """Yield score maps of 18 x 18 cells, 1000 classes, top 5."""
    rng = np.random.default_rng(seed)
    while count:
        score_map = from_probabilities(synthetic_probabilities(rng), TOPK)
        if DISTINCT_CLASSES[0] <= len(score_map.palette) <= DISTINCT_CLASSES[1]:
            yield score_map
            count -= 1


def synthetic_probabilities(rng: np.random.Generator) -> NDArray[np.float32]:
    """Return the distribution of every cell of one image [H, W, C]."""
    fields = rng.normal(scale=_BACKGROUND, size=(2, 2, NUM_CLASSES))
    logits = np.einsum("ia,jb,abc->ijc", *(_ramp(length) for length in GRID), fields, optimize=True)
    y, x = ((np.arange(length) + 0.5) / length for length in GRID)
    for _ in range(rng.integers(3, 9)):
        centre_y, centre_x = rng.uniform(0, 1, 2)
        height, width = rng.uniform(0.08, 0.3, 2)
        blob = np.exp(-0.5 * (((y - centre_y) / height)[:, None] ** 2 + ((x - centre_x) / width) ** 2))
        classes = rng.choice(NUM_CLASSES, 5, replace=False)
        logits[:, :, classes] += blob[:, :, None] * np.array([1, *rng.uniform(0.3, 0.8, 4)])
    logits = logits.astype(np.float32)
    return _softmax(_scale(logits) * logits)


def _scale(logits: NDArray[np.float32]) -> np.float32:
    """Return the factor by which the best class's mean probability becomes MEAN_TOP_PROB, by bisection."""
    low, high = np.float32(0.1), np.float32(200)
    for _ in range(12):
        middle = np.sqrt(low * high)
        above = _softmax(middle * logits).max(axis=2).mean() > MEAN_TOP_PROB
        low, high = (low, middle) if above else (middle, high)
    return np.sqrt(low * high)


def _ramp(length: int) -> NDArray[np.float64]:
    """Return weights [length, 2] that go from one end's value to the other's."""
    share = (np.arange(length) + 0.5) / length
    return np.stack([1 - share, share], axis=1)


def _softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    exp = np.exp(logits - logits.max(axis=2, keepdims=True))
    return exp / exp.sum(axis=2, keepdims=True)
