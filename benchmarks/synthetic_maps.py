"""Synthetic score maps that resemble those of a real ImageNet teacher, from a fixed seed.

An image has a few objects, each a soft blob on the 18 x 18 grid with a class and others that it is easily taken for.
Over all of it lie features that change smoothly from cell to cell, of a rank far below the number of classes, stronger
in some places than in others, of which every class reads its own mixture. The constants were searched for; the page
docs/benchmarks.md shows these maps beside real ones. `sharpness` multiplies logits: a more certain teacher.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from tokenlabel.core.scores import ScoreMap, from_probabilities

GRID = (18, 18)
NUM_CLASSES = 1000
TOPK = 5
_RANK, _DECAY, _REACH = 16, 0.75, 3.2
_FEATURES, _UNEVENNESS = 0.52, 0.25  # how strong the features are, and how unevenly
_COMMON = 0.28  # share of their variance that all cells of an image have in common
_MAX_OBJECTS, _OBJECT_SIDES = 10, (0.05, 0.2)
_PEAK, _PEAK_SPREAD = 12.0, 0.11  # logit of an object's class at its middle, and how it varies
_CLASSES_OF_AN_OBJECT, _OTHERS = 9, (0.32, 0.8)  # the others' parts of that logit


def synthetic_maps(count: int, *, seed: int = 0, sharpness: float = 1.0) -> Iterator[ScoreMap]:
    """Yield score maps of 18 x 18 cells, 1000 classes, top 5."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield from_probabilities(synthetic_probabilities(rng, sharpness=sharpness), TOPK)


def synthetic_probabilities(rng: np.random.Generator, *, sharpness: float = 1.0) -> NDArray[np.float32]:
    """Return the distribution of every cell of one image [H, W, C]."""
    shares = np.arange(1.0, _RANK + 1) ** -_DECAY
    of_class = rng.normal(size=(_RANK, NUM_CLASSES)) * np.sqrt(shares / shares.sum())[:, None]
    features = np.sqrt(1 - _COMMON) * _smooth(rng, _RANK) + np.sqrt(_COMMON) * rng.normal(size=_RANK)
    strength = _FEATURES * np.exp(_UNEVENNESS * _smooth(rng, 1))
    logits = (strength * features) @ of_class
    y, x = ((np.arange(length) + 0.5) / length for length in GRID)
    for _ in range(rng.integers(1, _MAX_OBJECTS + 1)):
        centre_y, centre_x = rng.uniform(0, 1, 2)
        height, width = rng.uniform(*_OBJECT_SIDES, 2)
        blob = np.exp(-0.5 * (((y - centre_y) / height)[:, None] ** 2 + ((x - centre_x) / width) ** 2))
        classes = rng.choice(NUM_CLASSES, _CLASSES_OF_AN_OBJECT, replace=False)
        peak = _PEAK * np.exp(_PEAK_SPREAD * rng.normal())
        others = rng.uniform(*_OTHERS, _CLASSES_OF_AN_OBJECT - 1)
        logits[:, :, classes] += peak * blob[:, :, None] * np.array([1, *others])
    return _softmax((sharpness * logits).astype(np.float32))


def _smooth(rng: np.random.Generator, count: int) -> NDArray[np.float64]:
    """Return standard normal fields [H, W, count] whose correlation falls off with the distance of cells."""
    distances = (np.abs(np.subtract.outer(np.arange(length), np.arange(length))) for length in GRID)
    rows, columns = (np.linalg.cholesky(np.exp(-((d / _REACH) ** 1.2)) + 1e-6 * np.eye(len(d))) for d in distances)
    return np.einsum("ia,jb,abk->ijk", rows, columns, rng.normal(size=(*GRID, count)), optimize=True)


def _softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    exp = np.exp(logits - logits.max(axis=2, keepdims=True))
    return exp / exp.sum(axis=2, keepdims=True)
