"""Score maps: what a teacher says about every location of one image. NumPy only.

A score map keeps the K most probable classes of each cell. The *rest*, 1 minus the sum of their probabilities, is
spread evenly over the classes that the cell did not keep, so a map of any K is a distribution over all C classes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenlabel.core.geometry import WHOLE_IMAGE, Box, turned, turned_box
from tokenlabel.runtime.coercion import Choice, described

# Sums of half precision probabilities miss 1 by this much at the most.
SUM_TOLERANCE = 0.01


class Kind(Choice):
    """What the numbers of a score map are.

    >>> [str(kind) for kind in tl.Kind]
    ['probabilities', 'logits']
    """

    PROBABILITIES = "probabilities"
    LOGITS = "logits"  # imported label files only; they become probabilities before they are aligned


class Orientation(Choice):
    """How maps lie on images whose files have an orientation tag: on the upright image, or on the stored pixels."""

    UPRIGHT = "upright"
    STORED = "stored"


@dataclass(frozen=True, slots=True, eq=False)
class ScoreMap:
    """One image's dense scores, sparse in the classes.

    `palette` [U] int: the distinct class ids of the kept entries, ascending.
    `codes` [H, W, K] unsigned int: indices into the palette, distinct among the kept entries of a cell.
    `probs` [H, W, K] float32: probabilities in [0, 1] with a sum of at most 1 a cell, in any order.
    An entry of probability 0 is not kept: its code means nothing, and its class shares the rest. (For
    `Kind.LOGITS` the values are the logits of the kept classes, and every entry is kept.)
    `empty_is_even`: a cell that keeps nothing is an even distribution, as unlabelled pixels are in stores of masks;
    by default it says nothing, and tokens get no label of it.
    The constructor checks types and shapes only; what writes and reads label stores, and `collate_score_maps`, check
    the values, too.
    `region`: the part of the upright image that the teacher saw; cell (row i, column j) covers
    x in [j/W, (j+1)/W), y in [i/H, (i+1)/H) of it.

    >>> codes, probs = np.array([[[0, 1], [1, 0]]], np.uint8), np.array([[[0.8, 0.1], [0.9, 0.0]]], np.float32)
    >>> score_map = tl.ScoreMap(np.array([3, 7]), codes, probs, num_classes=10)
    >>> score_map.top_class_ids
    array([[3, 7]])
    >>> round(float(score_map.dense().sum()), 3)  # two cells: the rest is spread over the other classes
    2.0
    """

    palette: NDArray[np.integer[Any]]
    codes: NDArray[np.unsignedinteger[Any]]
    probs: NDArray[np.float32]
    num_classes: int
    region: Box = WHOLE_IMAGE
    kind: Kind = Kind.PROBABILITIES
    empty_is_even: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", Kind(self.kind))
        given = (self.palette, self.codes, self.probs, self.num_classes, self.region)
        kinds = (np.ndarray, np.ndarray, np.ndarray, (int, np.integer), Box)
        if not all(map(isinstance, given, kinds)):
            raise ValueError(
                "a score map needs palette, codes and probs as NumPy arrays, num_classes as an int and a region as a "
                f"Box; got {', '.join(map(described, given))}"
            )
        shapes = self.palette.shape, self.codes.shape, self.probs.shape
        if [*map(len, shapes)] != [1, 3, 3] or shapes[1] != shapes[2] or not (self.palette.size and self.codes.size):
            raise ValueError(
                "a score map needs a palette [U], codes [H, W, K] and probs [H, W, K], none empty; got the shapes "
                f"{shapes[0]}, {shapes[1]} and {shapes[2]}"
            )

    @property
    def class_ids(self) -> NDArray[np.integer[Any]]:
        """The class ids [H, W, K] of the entries (any of the palette for an entry that is not kept)."""
        return self.palette[self.codes]

    @property
    def top_class_ids(self) -> NDArray[np.integer[Any]]:
        """The most probable class of each cell [H, W]."""
        best = self.probs.argmax(axis=2, keepdims=True)
        return self.palette[np.take_along_axis(self.codes, best, axis=2)[..., 0]]

    def dense(self) -> NDArray[np.float32]:
        """Return the probability of every class [H, W, C], the rest spread out; even in a cell that keeps nothing.

        For pictures and tests.
        """
        if self.kind is not Kind.PROBABILITIES:
            raise ValueError("a map of logits has no probabilities before it is aligned")
        kept = self.probs > 0
        num_others = self.num_classes - kept.sum(axis=2)
        rest = np.clip(1 - self.probs.sum(axis=2), 0, None)
        floor = np.where(num_others > 0, rest / np.maximum(num_others, 1), 0).astype(np.float32)
        full = np.repeat(floor[..., None], self.num_classes, axis=2)
        rows, columns, entries = np.nonzero(kept)
        full[rows, columns, self.class_ids[rows, columns, entries]] = self.probs[rows, columns, entries]
        return full


def turned_map(score_map: ScoreMap, orientation: int) -> ScoreMap:
    """Return a score map of a file's stored pixels as that of the upright image, exactly.

    `orientation`: the file's EXIF tag, 1 to 8; `geometry.OPPOSITE[orientation]` turns the map back.
    """
    if orientation == 1:
        return score_map
    codes, probs = (np.ascontiguousarray(turned(values, orientation)) for values in (score_map.codes, score_map.probs))
    return replace(score_map, codes=codes, probs=probs, region=turned_box(score_map.region, orientation))


def from_top(
    class_ids: NDArray[np.integer[Any]],
    scores: NDArray[np.floating[Any]],
    *,
    num_classes: int,
    region: Box = WHOLE_IMAGE,
    kind: Kind | str = Kind.PROBABILITIES,
    name: str = "scores",
) -> ScoreMap:
    """Build a score map from the kept classes of each cell.

    `class_ids` [H, W, K] ints in [0, num_classes), distinct within a cell where the score is not 0;
    `scores` [H, W, K]: probabilities (a cell's sum at most 1; of a cell that names all classes, they are rescaled to a
    sum of 1) or logits, as `kind` says.
    `name` is what error messages call the map: give the image's key.
    Raises ValueError for what `ScoreMap` cannot hold.
    """
    kind = Kind(kind)
    if class_ids.ndim != 3 or class_ids.shape != scores.shape or 0 in class_ids.shape:
        raise ValueError(
            f"{name}: class ids and scores must both be [H, W, K] and not empty; "
            f"got {class_ids.shape} and {scores.shape}"
        )
    if class_ids.min() < 0 or class_ids.max() >= num_classes:
        raise ValueError(
            f"{name}: class ids run from {class_ids.min()} to {class_ids.max()}, expected 0 to {num_classes - 1}"
        )
    _check_cells(class_ids, scores, kind=kind, name=name)
    if kind is Kind.PROBABILITIES:
        sums = scores.sum(axis=2, dtype=np.float64)
        complete = (scores > 0).sum(axis=2) == num_classes  # no other class can take the rest: the sum must be 1
        scores = (scores / np.where(complete, sums, np.maximum(sums, 1))[..., None]).astype(np.float32)
    order = np.argsort(-scores, axis=2, kind="stable")
    class_ids, scores = (np.take_along_axis(class_ids, order, axis=2), np.take_along_axis(scores, order, axis=2))
    kept = (scores > 0) | (kind is Kind.LOGITS)
    palette = np.unique(class_ids[kept]) if kept.any() else class_ids[0, 0, :1]
    codes = np.where(kept, np.searchsorted(palette, class_ids), 0)
    return ScoreMap(
        palette=palette,
        codes=codes.astype(np.min_scalar_type(len(palette) - 1)),
        probs=scores.astype(np.float32),
        num_classes=num_classes,
        region=region,
        kind=kind,
    )


def from_probabilities(
    probs: NDArray[np.floating[Any]], topk: int, *, region: Box = WHOLE_IMAGE, name: str = "scores"
) -> ScoreMap:
    """Build a score map from full distributions [H, W, C], keeping the `topk` most probable classes a cell.

    Raises ValueError for numbers that are not finite, also among those that would be dropped, and for cells
    that are not distributions (logits, for example).
    """
    if probs.ndim != 3 or 0 in probs.shape or topk < 1:
        raise ValueError(
            f"{name}: probabilities must be [H, W, C] and not empty, and at least 1 class a cell kept; "
            f"got {probs.shape} and topk {topk}"
        )
    _check_finite(probs, name=name)  # before classes are dropped
    sums = probs.sum(axis=2, dtype=np.float64)
    if probs.min() < 0 or abs(sums - 1).max() > SUM_TOLERANCE:
        raise ValueError(
            f"{name}: the probabilities of all classes must be at least 0 and sum to 1 a cell; "
            f"got a smallest of {probs.min():.3g} and sums from {sums.min():.3g} to {sums.max():.3g}"
        )
    num_classes = probs.shape[2]
    topk = min(topk, num_classes)
    class_ids = np.argpartition(-probs, topk - 1, axis=2)[..., :topk]
    kept = np.take_along_axis(probs, class_ids, axis=2)
    return from_top(class_ids, kept, num_classes=num_classes, region=region, name=name)


def from_mask(
    mask: NDArray[np.integer[Any]], *, num_classes: int, unlabelled: int = 255, name: str = "mask"
) -> ScoreMap:
    """Build a score map of certainties from a mask [H, W] of class ids.

    A pixel of the id `unlabelled` keeps no class. With more than 255 classes say
    which id that is (-1 if none). Raises ValueError where it is the id of a class.
    """
    if 0 <= unlabelled < num_classes:
        raise ValueError(
            f"{name}: {unlabelled} stands for unlabelled pixels, but it is one of the {num_classes} class "
            "ids; give another number, or -1 if all pixels are labelled"
        )
    labelled = mask != unlabelled
    class_ids = np.where(labelled, mask, 0).astype(np.int64)
    return from_top(class_ids[..., None], labelled[..., None].astype(np.float32), num_classes=num_classes, name=name)


def unknown_map(num_classes: int, *, kind: Kind = Kind.PROBABILITIES) -> ScoreMap:
    """Return the map of an image of which nothing is known: one cell beside the image, so that no token reads it."""
    nothing = np.zeros((1, 1, 1))
    return from_top(nothing.astype(np.int64), nothing, num_classes=num_classes, region=Box(2, 2, 3, 3), kind=kind)


def check_map(score_map: ScoreMap, *, name: str) -> None:
    """Raise ValueError for a map whose values are not what `ScoreMap` says; messages begin with `name`."""
    palette, codes, probs = score_map.palette, score_map.codes, score_map.probs
    ids, last = palette.astype(np.int64), score_map.num_classes - 1
    if palette.dtype.kind not in "iu" or ids[0] < 0 or ids[-1] > last or (np.diff(ids) <= 0).any():
        shown = ids.tolist() if len(ids) < 9 else f"{len(ids)} from {ids.min()} to {ids.max()}"
        raise ValueError(f"{name}: the palette must be ascending class ids from 0 to {last}; got {shown}")
    if codes.dtype.kind not in "iu" or codes.min() < 0 or codes.max() >= len(ids):
        raise ValueError(
            f"{name}: codes must be indices into a palette of {len(ids)}; got {codes.dtype} from {codes.min()} to "
            f"{codes.max()}"
        )
    _check_cells(codes, probs, kind=score_map.kind, name=name)


def _check_finite(scores: NDArray[np.floating[Any]], *, name: str) -> None:
    num_finite = np.count_nonzero(np.isfinite(scores))
    if num_finite < scores.size:
        raise ValueError(f"{name}: {scores.size - num_finite} of {scores.size} scores are not finite")


def _check_cells(
    class_ids: NDArray[np.integer[Any]], scores: NDArray[np.floating[Any]], *, kind: Kind, name: str
) -> None:
    """Raise ValueError for scores that are not finite or no distribution, and for a cell that names a class twice."""
    _check_finite(scores, name=name)
    if kind is Kind.PROBABILITIES:
        sums = scores.sum(axis=2, dtype=np.float64)
        if scores.min() < 0 or sums.max() > 1 + SUM_TOLERANCE:
            raise ValueError(
                f"{name}: probabilities must be at least 0 and sum to at most 1 a cell; "
                f"got a smallest of {scores.min():.3g} and a largest sum of {sums.max():.3g}"
            )
    # Entries of score 0 get distinct negative ids here, so that none of them looks like a repeated class.
    entries = np.where(scores != 0, class_ids.astype(np.int64), -1 - np.arange(class_ids.shape[2]))
    if (np.diff(np.sort(entries, axis=2), axis=2) == 0).any():
        raise ValueError(f"{name}: a cell names the same class twice")
