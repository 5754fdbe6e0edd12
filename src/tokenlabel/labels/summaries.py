"""The figures of one score map: how sure its teacher was, and which classes it says of the whole image. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenlabel.core.scores import Kind, ScoreMap
from tokenlabel.data.classes import composed, ids_among
from tokenlabel.data.images import ImageSource, has_classes
from tokenlabel.labels.store import LabelStore


@dataclass(frozen=True, eq=False)
class MapSummary:
    """The figures of one map.

    `class_ids` [U]: its classes. `class_probs` [U]: their mean over its places, as far as these kept them.
    `class_shares` [U]: the same with their parts of the rest where a place did not. `even_share`: the mean of such
    parts, so of any class that no place kept. Places that say nothing count 0 in all of them.
    """

    key: str
    size: str
    num_classes: int
    top1_prob: float
    rest: float
    entropy_bits: float
    below_half: float
    empty: float
    class_ids: NDArray[np.integer[Any]]
    class_probs: NDArray[np.float64]
    class_shares: NDArray[np.float64]
    even_share: float
    top_class_ids: NDArray[np.integer[Any]]


def summarize(key: str, score_map: ScoreMap) -> MapSummary:
    """Return the figures of an image's map."""
    score_map = as_probabilities(score_map)
    probs = score_map.probs.astype(np.float64)
    kept = probs > 0
    rest = np.clip(1 - probs.sum(axis=2), 0, None)
    num_others = score_map.num_classes - kept.sum(axis=2)
    # The rest is spread evenly: its entropy has a closed form, without a number for each class.
    entropy = -np.sum(probs * np.log2(np.where(kept, probs, 1)), axis=2)
    entropy -= rest * np.log2(np.where(rest > 0, rest / np.maximum(num_others, 1), 1))
    height, width, _ = probs.shape
    even_shares = (kept.any(axis=2) | score_map.empty_is_even) * rest / np.maximum(num_others, 1)  # [H, W]

    def mean_by_class(entries: NDArray[np.float64]) -> NDArray[np.float64]:
        sums = np.bincount(score_map.codes.ravel(), entries.ravel(), minlength=len(score_map.palette))
        return sums / (height * width)

    class_probs, even_share = mean_by_class(probs), float(even_shares.mean())
    return MapSummary(
        key=key,
        size=f"{height} x {width}",
        num_classes=len(np.unique(score_map.codes[kept])),
        top1_prob=float(probs.max(axis=2).mean()),
        rest=float(rest.mean()),
        entropy_bits=float(entropy.mean()),
        below_half=float((probs.max(axis=2) < 0.5).mean()),
        empty=float(1 - kept.any(axis=2).mean()),
        class_ids=score_map.palette,
        class_probs=class_probs,
        class_shares=class_probs + even_share - mean_by_class(kept * even_shares[:, :, None]),
        even_share=even_share,
        top_class_ids=np.where(kept.any(axis=2), score_map.top_class_ids, -1),
    )


def as_probabilities(score_map: ScoreMap) -> ScoreMap:
    """Return a map of logits as probabilities, classes that a cell did not keep at logit 0; others as they are."""
    if score_map.kind is Kind.PROBABILITIES:
        return score_map
    logits = score_map.probs.astype(np.float64)
    largest = np.maximum(logits.max(axis=2, keepdims=True), 0)
    kept = np.exp(logits - largest)
    absent = (score_map.num_classes - logits.shape[2]) * np.exp(-largest)
    probs = kept / (kept.sum(axis=2, keepdims=True) + absent)
    return replace(score_map, probs=probs.astype(np.float32), kind=Kind.PROBABILITIES)


def class_finder(store: LabelStore, source: ImageSource | None = None) -> Callable[[str], int | None]:
    """Return what gives the class of an image by its key, among the store's classes; None where it is unknown.

    `source`: the images, which know their classes; without it the first folder of a key names the class. If the store
    does not name its classes, they are those of as many classes of images, in order.
    """
    names, num_classes = store.manifest.class_names, store.manifest.num_classes
    if source is None:
        of_folder = {composed(name): class_id for class_id, name in enumerate(names)}
        return lambda key: of_folder.get(composed(key.split("/", 1)[0]))
    own_ids = ids_among(source.class_names, names)
    if not names:
        own_ids = list(range(num_classes)) if len(source.class_names) == num_classes else []
    entries = zip(source.keys, source.class_ids.tolist(), has_classes(source), strict=True) if own_ids else ()
    class_ids = {key: own_ids[class_id] for key, class_id, known in entries if known}
    return lambda key: class_id if (class_id := class_ids.get(key, -1)) >= 0 else None


def best_class(summary: MapSummary) -> int:
    """Return the most probable class of a map, over all places; -1 of one that says nothing."""
    if not summary.class_probs.max() > 0:
        return -1
    return int(summary.class_ids[summary.class_probs.argmax()])


def by_doubt(known: Sequence[tuple[MapSummary, int]]) -> list[tuple[MapSummary, int]]:
    """Return those maps with the classes of their images that say another class, the most doubtful first.

    Doubtful is a class whose mean probability is small beside the best one's: their quotient finds more of the wrong
    classes than their difference, which puts maps that are sure of everything first.
    """

    def doubt(pair: tuple[MapSummary, int]) -> tuple[float, float]:
        summary, class_id = pair
        own = summary.class_shares[summary.class_ids == class_id].sum() or summary.even_share
        # To more digits than records have; what is equal then goes by the certainty of the other class.
        return round(float(own / summary.class_shares.max()), 4), -float(summary.class_probs.max())

    def says_another(summary: MapSummary, class_id: int) -> bool:
        return bool(summary.class_probs[summary.class_ids == class_id].sum() < summary.class_probs.max())

    return sorted((pair for pair in known if says_another(*pair)), key=doubt)
