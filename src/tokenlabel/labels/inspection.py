"""What is in a label store: figures, likely label errors, broken records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from tokenlabel.core.scores import Kind, ScoreMap
from tokenlabel.data.class_names import with_words
from tokenlabel.data.classes import composed, ids_among, say_order, strangers
from tokenlabel.data.images import ImageSource, has_classes
from tokenlabel.labels.fingerprints import find_replaced
from tokenlabel.labels.store import LabelStore, Manifest, StoreError, read_manifest
from tokenlabel.runtime.coercion import COUNT, check_numbers, coerced_fields
from tokenlabel.runtime.process import listed, say

MAX_SUM = 1.001
# Longer texts are cut where people read them.
MAX_TEXT, MAX_KEY = 60, 200


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


def inspect_store(
    store: LabelStore, config: InspectConfig = InspectConfig(), *, source: ImageSource | None = None
) -> Inspection:
    """Return the figures of a store.

    `source`: the images, to know their classes; without it an image's class is the first folder of its key,
    where that is the name of a class.
    """
    manifest = store.manifest
    found = find_replaced(store, source, read_all=config.verify) if source else None
    encodings = dict.fromkeys(read_manifest(folder).encoding.value for folder in store.folders)
    broken = dict(verify(store)) if config.verify else {}
    summaries = [summarize(key, store[key]) for key in _sampled(store, config.sample) if key not in broken]
    class_of = class_finder(store, source)
    if source is not None and source.class_names:
        _say_what_differs(manifest, source.class_names)
    classes = ((summary, class_of(summary.key)) for summary in summaries)
    known = [(summary, class_id) for summary, class_id in classes if class_id is not None]
    suspects = [_suspect(summary, class_id, store) for summary, class_id in by_doubt(known)]
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
        num_replaced=len(found.indices) if found else None,
        replaced=tuple(source.keys[i] for i in found.indices[: config.num_suspects])
        if source and found
        else (),
        num_unsure=found.num_unsure if found else None,
        num_files=len(store.shards),
        bytes_per_image=store.num_bytes() / max(1, len(store)),
        num_sampled=len(summaries),
        map_sizes=dict(Counter(summary.size for summary in summaries).most_common(10)),
        classes_per_map=_mean([summary.num_classes for summary in summaries]),
        top1_prob=_mean([summary.top1_prob for summary in summaries]),
        rest=_mean([summary.rest for summary in summaries]),
        entropy_bits=_mean([summary.entropy_bits for summary in summaries]),
        empty=_mean([summary.empty for summary in summaries]),
        class_agreement=_mean([best_class(summary) == own for summary, own in known]) if known else None,
        place_agreement=_mean([(summary.top_class_ids == own).mean() for summary, own in known])
        if known
        else None,
        num_judged=len(known),
        agreement_missing=None
        if known
        else _why_unknown(store, source, [summary.key for summary in summaries]),
        suspects=tuple(suspects[: config.num_suspects]),
        uncertain=tuple(by_entropy(summaries)[: config.num_suspects]),
        num_verified=len(store) if config.verify else None,
        broken=tuple(broken.values()),
    )


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


def summarize(key: str, score_map: ScoreMap) -> MapSummary:
    """Return the figures of an image's map."""
    score_map = as_probabilities(score_map)
    probs = score_map.probs.astype(np.float64)
    kept = probs > 0
    rest = np.clip(1 - probs.sum(axis=2), 0, None)
    num_others = score_map.num_classes - kept.sum(axis=2)
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


def _why_unknown(store: LabelStore, source: ImageSource | None, keys: Sequence[str]) -> str:
    """Say why no image of a store has a class that is known. `keys`: of labels that were looked at."""
    names, count = store.manifest.class_names, store.manifest.num_classes
    if not keys:
        return "no label was looked at"
    ours = listed([repr(_tail(key)) for key in keys])
    if source is None:
        classes = (
            f"none of its classes ({listed(list(names))})" if names else "no classes: these have no names"
        )
        return f"the first folders of its keys ({ours}) are {classes}; name the images by --images"
    if not source.class_names:
        return "the images have no classes"
    if not set(source.keys).intersection(keys):
        theirs = listed([repr(_tail(key)) for key in islice(source.keys, 4)])
        return f"no label looked at is of one of the images: its keys are {ours}, theirs {theirs}"
    if not names:
        return f"the labels are about {count:,} classes without names, the images have {len(source.class_names):,}"
    return f"the labels' classes ({listed(list(names))}) are not those of the images ({listed(source.class_names)})"


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


def best_class(summary: MapSummary) -> int:
    """Return the most probable class of a map, over all places; -1 of one that says nothing."""
    if not summary.class_probs.max() > 0:
        return -1
    return int(summary.class_ids[summary.class_probs.argmax()])


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


def as_text(figures: Mapping[str, Any]) -> str:
    """Return the figures of `Inspection.as_dict` for people, and of those that inspect adds (masks, out of fold)."""
    reasons = ": manifest.json says why" if figures["num_failures"] else ""
    failed = "image" if figures["num_failures"] == 1 else "images"
    lines = [
        f"{figures['num_images']:,} labels ({figures['kind']}), top {figures['topk']} of {figures['num_classes']:,} "
        f"classes; {figures['num_failures']:,} {failed} failed{reasons}",
        *_doubts(figures),
        f"{'size':<24}{figures['bytes_per_image']:,.0f} bytes an image, files: {figures['num_files']:,}, "
        f"encoding {figures['encoding']}",
        f"{'teacher':<24}{_in_a_line(figures['teacher'])}",
        f"{'preprocessing':<24}{_in_a_line(figures['preprocessing'])}",
        "",
        f"{'looked at':<24}{figures['num_sampled']:,} labels",
        f"{'rows x columns':<24}{', '.join(f'{size} ({n:,})' for size, n in figures['map_sizes'].items())}",
        f"{'distinct classes':<24}{figures['classes_per_map']:.1f} a map",
        f"{'certainty':<24}{figures['top1_prob']:.1%} (probability of a place's best class)",
        f"{'rest':<24}{figures['rest']:.1%} (probability of the classes that a place did not keep)",
        f"{'entropy':<24}{figures['entropy_bits']:.2f} bits a place",
    ]
    if figures["empty"]:
        lines.append(f"{'empty':<24}{figures['empty']:.1%} of the places keep nothing")
    agreements = {
        "class_agreement": "of the images' best class is their own",
        "place_agreement": "of the places' best class is the image's",
        "mask_agreement": "of the places' best class is what the masks show there",
    }
    lines += [
        f"{'agreement':<24}{figures[name]:.1%} {words}"
        for name, words in agreements.items()
        if figures.get(name) is not None
    ]
    if figures["agreement_missing"]:
        lines.append(f"{'agreement':<24}unknown: {figures['agreement_missing']}")
    elif figures["num_judged"] < figures["num_sampled"]:
        lines.append(f"{'':<24}of {figures['num_judged']:,} labels, whose images' class is known")
    if figures["uncertain"]:
        sampled = (
            "" if figures["num_sampled"] == figures["num_images"] else " of those looked at (--sample 0: all)"
        )
        lines += ["", f"least certain{sampled}: a mask of these would teach most"]
    lines += [
        f"  {_tail(image['key'], MAX_KEY)}: {image['entropy_bits']:.2f} bits a place, {image['below_half']:.0%} of the "
        "places below 50%"
        for image in figures["uncertain"]
    ]
    lines += _suspect_lines("least agreement: perhaps their class is wrong", figures["suspects"])
    if folds := figures.get("out_of_fold"):
        agree = (
            f"{folds['agreement']:.1%} of {folds['num_images']:,} images have the class that they look like"
        )
        lines += ["", f"out of fold, {agree}", *_suspect_lines("least of all", folds["suspects"])[1:]]
    if figures["num_verified"] is not None:
        lines += ["", f"verified {figures['num_verified']:,} labels, {len(figures['broken']):,} broken"]
    return "\n".join([*lines, *(f"  {line}" for line in figures["broken"])])


def _suspect_lines(title: str, suspects: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        f"  {_tail(s['key'], MAX_KEY)}: {with_words(s['class_name'])} has {s['prob']:.1%}, "
        f"{with_words(s['top_class_name'])} {s['top_prob']:.1%}"
        for s in suspects
    ]
    return ["", title, *lines] if lines else []


def _doubts(figures: Mapping[str, Any]) -> Iterator[str]:
    """Yield what people should know of the labels before they trust the figures."""
    if count := figures["num_superseded"]:
        yield f"{'superseded':<24}{count:,} records, by newer, equal or earlier ones; merge leaves them out"
    if count := figures["num_replaced"]:
        names = listed(list(figures["replaced"]))
        yield f"{'replaced':<24}{count:,} of the images since labelling ({names}): annotate --again changed"
    if count := figures["num_unsure"]:
        yield f"{'modified':<24}{count:,} of the images since labelling, which kept their size: --verify reads them"


def _tail(text: str, most: int = MAX_TEXT) -> str:
    """Return a path, of a long one its end."""
    return text if len(text) <= most else f"...{text[-most:]}"


def _in_a_line(settings: Mapping[str, Any]) -> str:
    if "members" in settings:
        members = [_in_a_line(member) for member in settings["members"]]
        more = f" + {len(members) - 3} more" if len(members) > 3 else ""
        return f"{' + '.join(members[:3])}{more}; {_in_a_line({k: v for k, v in settings.items() if k != 'members'})}"
    return ", ".join(
        f"{name} {_in_short(value)}" for name, value in settings.items() if value not in (None, False)
    )


def _in_short(value: Any) -> str:
    """Return a value of a manifest as people want to read it: the size of a class map, the start of a list."""
    if isinstance(value, Mapping) and "targets" in value:
        places = [place for place in value["targets"] if place >= 0]
        return f"{len(places):,} of {len(value['targets']):,} classes to {len(set(places)):,} ({value.get('nowhere')})"
    if isinstance(value, list) and len(value) > 4:
        return f"[{listed([_in_short(entry) for entry in value])}]"
    return _tail(str(value))


def _sampled(store: LabelStore, count: int) -> Iterator[str]:
    """Return the keys of labels drawn at random, of all if `count` is 0 or more than there are."""
    if count == 0 or len(store) <= count:
        return store.keys()
    return (
        store.key_at(i) for i in np.random.default_rng(0).choice(len(store), count, replace=False).tolist()
    )


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 0.0
