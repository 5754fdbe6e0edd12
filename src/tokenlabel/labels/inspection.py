"""What is in a label store: statistics, likely label errors, corrupt records. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from tokenlabel.core.scores import Kind, ScoreMap, check_map
from tokenlabel.data.classes import composed, ids_among, say_order, strangers
from tokenlabel.data.images import ImageSource, has_classes
from tokenlabel.labels.fingerprints import find_replaced
from tokenlabel.labels.manifest import Manifest, read_manifest
from tokenlabel.labels.store import LabelStore
from tokenlabel.runtime.coercion import COUNT, check_numbers, coerced_fields
from tokenlabel.runtime.process import listed, say

MAX_TEXT = 60  # longer texts are shortened in messages


@dataclass(frozen=True, kw_only=True)
@coerced_fields
class InspectConfig:
    """How closely to look at a label store."""

    sample: int = 1_500
    """Labels, drawn at random, that the statistics are computed on: so many take less than a second; 0 for all."""
    num_suspects: int = 20
    """How many images to list whose labels agree least with their class, and of which the teacher is least certain."""
    verify: bool = False
    """Read every label, verify its checksum and look for values that no teacher writes; with images, read those too, to
    see whether they are still the ones that were labelled."""

    def __post_init__(self) -> None:
        check_numbers(self, sample=COUNT, num_suspects=COUNT)


@dataclass(frozen=True, kw_only=True)
class Suspect:
    """An image whose labels disagree with its class: perhaps the class is wrong."""

    key: str
    class_name: str
    prob: float
    """Mean probability of its own class over all cells, counting those that keep it."""
    top_class_name: str
    top_prob: float


@dataclass(frozen=True, kw_only=True)
class Uncertain:
    """An image that the teacher is not certain of: a candidate for the next mask to draw.

    `entropy_bits`: the mean over its cells. `below_half`: the share of cells without a class of at least .5.
    """

    key: str
    entropy_bits: float
    below_half: float


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """Statistics of a label store; those from `num_sampled` on are means over the sampled labels."""

    num_images: int
    num_classes: int
    kind: str
    topk: int
    encoding: str
    teacher: dict[str, Any]
    preprocessing: dict[str, Any]
    num_failures: int
    num_superseded: int
    """Records that are not used, since another one has the same key."""
    num_replaced: int | None
    """Images whose files changed after they were labelled, by size and modification time; None without images."""
    replaced: tuple[str, ...]  # the first of these
    num_unsure: int | None
    """Images with another modification time and the same size, too many to read (`verify` reads them)."""
    num_files: int
    bytes_per_image: float
    num_sampled: int
    map_sizes: dict[str, int]
    """How many maps have which size (rows x columns)."""
    classes_per_map: float
    top1_prob: float
    """Probability of a cell's most probable class."""
    rest: float
    """Probability that cells leave to the classes that they do not keep."""
    entropy_bits: float
    empty: float
    """Share of cells that keep nothing."""
    class_agreement: float | None
    """Share of the images whose most probable class, over all cells, is their own; None if that is unknown."""
    place_agreement: float | None
    """Share of the cells whose most probable class is the image's."""
    num_judged: int
    """Labels of images whose class is known, which agreement and suspects are computed on."""
    agreement_missing: str | None
    """Why there is no agreement, if there is none."""
    suspects: tuple[Suspect, ...]
    """The images whose own class is the least probable relative to their most probable one, the most doubtful first."""
    uncertain: tuple[Uncertain, ...]
    """The images of the highest entropy among the sampled ones, the highest first."""
    num_verified: int | None
    broken: tuple[str, ...]
    """What `verify` found wrong, a message each."""

    def as_dict(self) -> dict[str, Any]:
        """Return the statistics by their names, for JSON."""
        return asdict(self)


def inspect_store(
    store: LabelStore, config: InspectConfig = InspectConfig(), *, source: ImageSource | None = None
) -> Inspection:
    """Return the statistics of a store.

    `source`: the images, for their classes; without it an image's class is the first folder of its key, if that is the
    name of a class.
    """
    manifest, count = store.manifest, config.num_suspects
    replaced = find_replaced(store, source, read_all=config.verify) if source else None
    broken, numbers = dict(verify(store)) if config.verify else {}, range(len(store))
    if 0 < config.sample < len(store):
        numbers = np.random.default_rng(0).choice(len(store), config.sample, replace=False).tolist()
    keys = map(store.key_at, numbers)
    summaries = [summarize(key, store[key]) for key in keys if key not in broken]
    if source is not None and source.class_names:
        _say_what_differs(manifest, source.class_names)
    class_of = class_finder(store, source)
    known = [(summary, own) for summary in summaries if (own := class_of(summary.key)) is not None]
    uncertain = sorted((s for s in summaries if s.entropy_bits > 0), key=lambda s: (-s.entropy_bits, s.key))[:count]
    return Inspection(
        num_images=len(store),
        **{n: getattr(manifest, n) for n in ("num_classes", "kind", "topk", "teacher", "preprocessing")},
        encoding=" + ".join(dict.fromkeys(read_manifest(folder).encoding for folder in store.folders)),
        num_failures=len(store.failures()),
        num_superseded=store.num_superseded,
        num_replaced=len(replaced.indices) if replaced else None,
        replaced=tuple(source.keys[i] for i in replaced.indices[:count]) if source and replaced else (),
        num_unsure=replaced.num_unsure if replaced else None,
        num_files=len(store.shards),
        bytes_per_image=store.num_bytes() / max(1, len(store)),
        **_means(summaries, known),
        agreement_missing=None if known else _why_unknown(store, source, [summary.key for summary in summaries]),
        suspects=tuple(_suspect(summary, own, manifest) for summary, own in by_doubt(known)[:count]),
        uncertain=tuple(Uncertain(key=s.key, entropy_bits=s.entropy_bits, below_half=s.below_half) for s in uncertain),
        num_verified=len(store) if config.verify else None,
        broken=tuple(broken.values()),
    )


def verify(store: LabelStore) -> Iterator[tuple[str, str]]:
    """Read every label and verify its checksum; yield the key of each that cannot be right, and what is wrong."""
    for key in tqdm(store.keys(), total=len(store), desc="verify", unit="label", disable=None):
        try:
            check_map(store[key], name=key)
        except ValueError as error:
            yield key, str(error)


@dataclass(frozen=True, eq=False)
class MapSummary:
    """The statistics of one score map, means over its cells; a cell that keeps nothing counts as 0.

    `class_ids` [U]: the classes that cells keep. `class_probs` [U]: their probability, counting the cells that keep
    them. `class_shares` [U]: the same, counting their shares of the rest of the other cells, too. `even_share`: that of
    a class that no cell keeps. `top_class_ids` [H, W]: of each cell; -1 for cells that keep nothing.
    """

    key: str
    size: str
    classes_per_map: int
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

    @property
    def best_class(self) -> int:
        """The most probable class over all cells; -1 for a map that keeps nothing."""
        return int(self.class_ids[self.class_probs.argmax()]) if self.class_probs.max() > 0 else -1

    def prob_of(self, class_id: int) -> float:
        """Return the mean probability of a class over the cells, counting those that keep it."""
        return float(self.class_probs[self.class_ids == class_id].sum())


def summarize(key: str, score_map: ScoreMap) -> MapSummary:
    """Return the statistics of an image's map."""
    score_map = as_probabilities(score_map)
    probs = score_map.probs.astype(np.float64)
    kept = probs > 0
    rest = np.clip(1 - probs.sum(axis=2), 0, None)
    num_others = score_map.num_classes - kept.sum(axis=2)
    # The rest is spread evenly, so its entropy has a closed form that needs no number for each class.
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
        classes_per_map=len(np.unique(score_map.codes[kept])),
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
    """Return a map of logits as probabilities, with logit 0 for the classes that a cell did not keep."""
    if score_map.kind is Kind.PROBABILITIES:
        return score_map
    logits = score_map.probs.astype(np.float64)
    largest = np.maximum(logits.max(axis=2, keepdims=True), 0)  # subtracted, so that exp cannot overflow
    kept = np.exp(logits - largest)
    absent = (score_map.num_classes - logits.shape[2]) * np.exp(-largest)
    probs = kept / (kept.sum(axis=2, keepdims=True) + absent)
    return replace(score_map, probs=probs.astype(np.float32), kind=Kind.PROBABILITIES)


def class_finder(store: LabelStore, source: ImageSource | None = None) -> Callable[[str], int | None]:
    """Return a function from the key of an image to the id of its class in the store; None if that is unknown.

    `source`: the images, which know their classes; without it the first folder of a key is the name of the class. If
    the store does not name its classes and the images have as many, they are taken to be in the same order.
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


def by_doubt(known: Sequence[tuple[MapSummary, int]]) -> list[tuple[MapSummary, int]]:
    """Return the maps whose best class is not the given class of their image, the most doubtful first.

    Doubt is the mean probability of the image's class divided by that of the best class. The quotient finds more wrong
    classes than the difference, which puts maps first that are certain of everything.
    """

    def doubt(pair: tuple[MapSummary, int]) -> tuple[float, float]:
        summary, own = pair
        share = summary.class_shares[summary.class_ids == own].sum() or summary.even_share
        # Rounded, since records are not more exact; ties are ordered by the certainty of the best class.
        return round(float(share / summary.class_shares.max()), 4), -float(summary.class_probs.max())

    return sorted((pair for pair in known if pair[0].prob_of(pair[1]) < pair[0].class_probs.max()), key=doubt)


def _means(summaries: Sequence[MapSummary], known: Sequence[tuple[MapSummary, int]]) -> dict[str, Any]:
    """Return the means of `Inspection`. `known`: the maps of images whose class is known, and the class."""
    names = ("classes_per_map", "top1_prob", "rest", "entropy_bits", "empty")
    means = {name: float(np.mean([getattr(s, name) for s in summaries])) if summaries else 0.0 for name in names}
    return {
        "num_sampled": len(summaries),
        "map_sizes": dict(Counter(summary.size for summary in summaries).most_common(10)),
        **means,
        "class_agreement": float(np.mean([s.best_class == own for s, own in known])) if known else None,
        "place_agreement": float(np.mean([(s.top_class_ids == own).mean() for s, own in known])) if known else None,
        "num_judged": len(known),
    }


def _suspect(summary: MapSummary, own: int, manifest: Manifest) -> Suspect:
    names, top = manifest.class_names or range(manifest.num_classes), float(summary.class_probs.max())
    names = str(names[own]), str(names[summary.best_class])
    return Suspect(
        key=summary.key, class_name=names[0], prob=summary.prob_of(own), top_class_name=names[1], top_prob=top
    )


def _why_unknown(store: LabelStore, source: ImageSource | None, keys: Sequence[str]) -> str:
    """Return why the class of no image is known. `keys`: of the sampled labels."""
    names, count = store.manifest.class_names, store.manifest.num_classes
    if not keys:
        return "no label was looked at"
    ours = listed([repr(shortened_path(key)) for key in keys])
    if source is None:
        classes = f"none of its classes ({listed(names)})" if names else "no classes: these have no names"
        return f"the first folders of its keys ({ours}) are {classes}; name the images by --images"
    if not set(source.keys).intersection(keys):
        theirs = listed([repr(shortened_path(key)) for key in islice(source.keys, 4)])
        return f"no label looked at is of one of the images: its keys are {ours}, theirs {theirs}"
    if not source.class_names:
        return "the images have no classes"
    if not names:
        return f"the labels are about {count:,} classes without names, the images have {len(source.class_names):,}"
    return f"the labels' classes ({listed(names)}) are not those of the images ({listed(source.class_names)})"


def _say_what_differs(manifest: Manifest, ours: Sequence[str]) -> None:
    """Print which classes of the images the labels lack, or that classes without names are assumed to be these."""
    theirs, count = manifest.class_names, manifest.num_classes
    if theirs and -1 in (ids := ids_among(ours, theirs)):
        unknown = strangers(ours, theirs, ids, count=count, them="the labels")
        say(f"{unknown}; agreement is that of the images of other classes")
    elif not theirs and count == len(ours):
        say_order(ours, them="the labels'", overrule="class_names in their manifest.json would settle it")


def shortened_path(text: str, most: int = MAX_TEXT) -> str:
    """Return the text, or the end of a long one."""
    return text if len(text) <= most else f"...{text[-most:]}"
