"""What is in a label store: figures, likely label errors, broken records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import numpy as np
from tqdm import tqdm

from tokenlabel.core.scores import Kind
from tokenlabel.data.classes import ids_among, say_order, strangers
from tokenlabel.data.images import ImageSource
from tokenlabel.labels.fingerprints import find_replaced
from tokenlabel.labels.manifest import Manifest, read_manifest
from tokenlabel.labels.store import LabelStore
from tokenlabel.labels.summaries import MapSummary, best_class, by_doubt, class_finder, summarize
from tokenlabel.runtime.coercion import COUNT, check_numbers, coerced_fields
from tokenlabel.runtime.errors import StoreError
from tokenlabel.runtime.process import listed, say

MAX_SUM = 1.001
# Longer texts are cut where people read them.
MAX_TEXT = 60


@dataclass(frozen=True, kw_only=True)
@coerced_fields
class InspectConfig:
    """How closely to look at a label store."""

    sample: int = 1_500
    """Labels that the figures are taken from, drawn at random: so many take less than a second; 0 takes all."""
    num_suspects: int = 20
    """Images named whose labels agree least with their class, and of those that the teacher is least certain of."""
    verify: bool = False
    """Read every label against its checksum and look for what no teacher writes; with images, read those as well:
    whether they are still what was labelled."""

    def __post_init__(self) -> None:
        check_numbers(self, sample=COUNT, num_suspects=COUNT)


@dataclass(frozen=True, kw_only=True)
class Suspect:
    """An image whose labels disagree with its class: perhaps the class is wrong."""

    key: str
    class_name: str
    prob: float
    """Mean probability of its own class over all places, as far as they kept it."""
    top_class_name: str
    top_prob: float


@dataclass(frozen=True, kw_only=True)
class Uncertain:
    """An image that its teacher is not certain of: one to draw a mask for next."""

    key: str
    entropy_bits: float
    """Mean over its places."""
    below_half: float
    """Share of its places whose most probable class has less than .5."""


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """Figures of a label store; those from `num_sampled` on are means over the labels that were drawn."""

    num_images: int
    num_classes: int
    kind: str
    topk: int
    encoding: str
    teacher: dict[str, Any]
    preprocessing: dict[str, Any]
    num_failures: int
    num_superseded: int
    """Labels in the files that count no more, since newer or equal ones do."""
    num_replaced: int | None
    """Images that are no longer those that were labelled, as far as size and time tell; None without images."""
    replaced: tuple[str, ...]
    """The first of these."""
    num_unsure: int | None
    """Images that have kept their size and were modified since, too many to read (`verify` reads them)."""
    num_files: int
    bytes_per_image: float
    num_sampled: int
    map_sizes: dict[str, int]
    """How many maps have which size (rows x columns)."""
    classes_per_map: float
    top1_prob: float
    """Probability of a place's most probable class."""
    rest: float
    """Probability that places have left for the classes that they don't keep."""
    entropy_bits: float
    empty: float
    """Share of places that keep nothing."""
    class_agreement: float | None
    """Share of the images whose most probable class, over all places, is their own; None if that is unknown."""
    place_agreement: float | None
    """Share of the places whose most probable class is the image's."""
    num_judged: int
    """Labels of images whose class is known, which agreement and suspects are taken from."""
    agreement_missing: str | None
    """Why no agreement is known, if none is."""
    suspects: tuple[Suspect, ...]
    """The images whose own class is the least probable beside their best one, the least so first."""
    uncertain: tuple[Uncertain, ...]
    """The images of the highest entropy among those looked at, the highest first."""
    num_verified: int | None
    broken: tuple[str, ...]
    """What `verify` found wrong, a line each."""

    def as_dict(self) -> dict[str, Any]:
        """Return the figures under their names, for JSON."""
        return asdict(self)


def inspect_store(
    store: LabelStore, config: InspectConfig = InspectConfig(), *, source: ImageSource | None = None
) -> Inspection:
    """Return the figures of a store.

    `source`: the images, to know their classes; without it an image's class is the first folder of its key,
    where that is the name of a class.
    """
    manifest = store.manifest
    replaced = find_replaced(store, source, read_all=config.verify) if source else None
    gone = replaced.indices[: config.num_suspects] if replaced else []
    encodings = dict.fromkeys(read_manifest(folder).encoding.value for folder in store.folders)
    broken = dict(verify(store)) if config.verify else {}
    summaries = [summarize(key, store[key]) for key in _sampled(store, config.sample) if key not in broken]
    if source is not None and source.class_names:
        _say_what_differs(manifest, source.class_names)
    class_of = class_finder(store, source)
    classes = ((summary, class_of(summary.key)) for summary in summaries)
    known = [(summary, class_id) for summary, class_id in classes if class_id is not None]
    suspects = by_doubt(known)[: config.num_suspects]
    return Inspection(
        num_images=len(store),
        num_classes=manifest.num_classes,
        kind=manifest.kind.value,
        topk=manifest.topk,
        encoding=" + ".join(encodings),
        teacher=manifest.teacher,
        preprocessing=manifest.preprocessing,
        num_failures=len(store.failures()),
        num_superseded=store.num_superseded,
        num_replaced=len(replaced.indices) if replaced else None,
        replaced=tuple(source.keys[i] for i in gone) if source else (),
        num_unsure=replaced.num_unsure if replaced else None,
        num_files=len(store.shards),
        bytes_per_image=store.num_bytes() / max(1, len(store)),
        **_means(summaries),
        **_agreement(known),
        agreement_missing=None if known else _why_unknown(store, source, [summary.key for summary in summaries]),
        suspects=tuple(_suspect(summary, class_id, store) for summary, class_id in suspects),
        uncertain=tuple(by_entropy(summaries)[: config.num_suspects]),
        num_verified=len(store) if config.verify else None,
        broken=tuple(broken.values()),
    )


def _means(summaries: Sequence[MapSummary]) -> dict[str, Any]:
    """Return the figures of `Inspection` that are means over maps."""
    return {
        "num_sampled": len(summaries),
        "map_sizes": dict(Counter(summary.size for summary in summaries).most_common(10)),
        "classes_per_map": _mean([summary.num_classes for summary in summaries]),
        "top1_prob": _mean([summary.top1_prob for summary in summaries]),
        "rest": _mean([summary.rest for summary in summaries]),
        "entropy_bits": _mean([summary.entropy_bits for summary in summaries]),
        "empty": _mean([summary.empty for summary in summaries]),
    }


def _agreement(known: Sequence[tuple[MapSummary, int]]) -> dict[str, Any]:
    """Return the figures of `Inspection` that compare maps with the classes of their images."""
    of_images = [best_class(summary) == own for summary, own in known]
    of_places = [(summary.top_class_ids == own).mean() for summary, own in known]
    return {
        "class_agreement": _mean(of_images) if known else None,
        "place_agreement": _mean(of_places) if known else None,
        "num_judged": len(known),
    }


def verify(store: LabelStore) -> Iterator[tuple[str, str]]:
    """Read every label against its checksum; yield the key of each that cannot be right, and what is wrong."""
    for key in tqdm(store.keys(), total=len(store), desc="verify", unit="label", disable=None):
        try:
            score_map = store[key]
        except StoreError as error:
            yield key, str(error)
            continue
        probs = score_map.probs
        sums = probs.sum(axis=2)
        entries = np.where(probs != 0, score_map.codes.astype(np.int64), -1 - np.arange(probs.shape[2]))
        if score_map.kind is Kind.PROBABILITIES and (probs.min() < 0 or sums.max() > MAX_SUM):
            yield key, f"{key}: the probabilities of a cell sum to {sums.max():.4f}"
        elif (np.diff(np.sort(entries, axis=2), axis=2) == 0).any():
            yield key, f"{key}: a cell names the same class twice"


def _why_unknown(store: LabelStore, source: ImageSource | None, keys: Sequence[str]) -> str:
    """Say why no image of a store has a class that is known. `keys`: of labels that were looked at."""
    names, count = store.manifest.class_names, store.manifest.num_classes
    if not keys:
        return "no label was looked at"
    ours = listed([repr(shortened_path(key)) for key in keys])
    if source is None:
        classes = f"none of its classes ({listed(list(names))})" if names else "no classes: these have no names"
        return f"the first folders of its keys ({ours}) are {classes}; name the images by --images"
    if not source.class_names:
        return "the images have no classes"
    if not set(source.keys).intersection(keys):
        theirs = listed([repr(shortened_path(key)) for key in islice(source.keys, 4)])
        return f"no label looked at is of one of the images: its keys are {ours}, theirs {theirs}"
    if not names:
        return f"the labels are about {count:,} classes without names, the images have {len(source.class_names):,}"
    return f"the labels' classes ({listed(list(names))}) are not those of the images ({listed(source.class_names)})"


def by_entropy(summaries: Sequence[MapSummary]) -> list[Uncertain]:
    """Return the images whose maps leave anything open, those of the highest mean entropy first."""
    found = [
        Uncertain(key=summary.key, entropy_bits=summary.entropy_bits, below_half=summary.below_half)
        for summary in summaries
        if summary.entropy_bits > 0
    ]
    return sorted(found, key=lambda image: (-image.entropy_bits, image.key))


def _say_what_differs(manifest: Manifest, ours: Sequence[str]) -> None:
    """Say which classes of the images the labels don't know, or that theirs are taken to be the images'."""
    if not manifest.class_names:
        if manifest.num_classes == len(ours):
            say_order(ours, them="the labels'", overrule="class_names in their manifest.json would settle it")
        return
    ids = ids_among(ours, manifest.class_names)
    if -1 in ids:
        count = manifest.num_classes
        unknown = strangers(ours, manifest.class_names, ids, count=count, them="the labels")
        say(f"{unknown}; agreement is that of the images of other classes")


def _suspect(summary: MapSummary, class_id: int, store: LabelStore) -> Suspect:
    names = store.manifest.class_names
    own = summary.class_probs[summary.class_ids == class_id]
    best = best_class(summary)
    return Suspect(
        key=summary.key,
        class_name=names[class_id] if names else str(class_id),
        prob=float(own.sum()),
        top_class_name=names[best] if names else str(best),
        top_prob=float(summary.class_probs.max()),
    )


def _sampled(store: LabelStore, count: int) -> Iterator[str]:
    """Return the keys of labels drawn at random, of all if `count` is 0 or more than there are."""
    if count == 0 or len(store) <= count:
        return store.keys()
    return (store.key_at(i) for i in np.random.default_rng(0).choice(len(store), count, replace=False).tolist())


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 0.0


def shortened_path(text: str, most: int = MAX_TEXT) -> str:
    """Return a path, of a long one its end."""
    return text if len(text) <= most else f"...{text[-most:]}"
