"""What is in a label store: figures, likely label errors, broken records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from tokenlabel.data.images import ImageSource
from tokenlabel.labels.store import LabelStore, StoreError, read_manifest
from tokenlabel.method.scores import Kind, ScoreMap
from tokenlabel.runtime.ranges import COUNT, check_numbers

MAX_SUM = 1.001


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """How closely to look at a label store."""

    sample: int = 1_500
    """Labels that the figures are taken from, drawn at random: so many take less than a second; 0 takes all."""
    num_suspects: int = 20
    """Images named whose labels agree least with their class."""
    verify: bool = False
    """Read every label against its checksum and look for what no teacher writes."""

    def __post_init__(self) -> None:
        check_numbers(self, sample=COUNT, num_suspects=COUNT)


@dataclass(frozen=True, kw_only=True)
class Suspect:
    """An image whose labels disagree with its class: perhaps the class is wrong."""

    key: str
    class_name: str
    prob: float
    """Mean probability of its own class over all places."""
    top_class_name: str
    top_prob: float


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
    class_agreement: float | None
    """Share of the images whose most probable class, over all places, is their own; None if that is unknown."""
    place_agreement: float | None
    """Share of the places whose most probable class is the image's."""
    suspects: tuple[Suspect, ...]
    num_verified: int | None
    broken: tuple[str, ...]
    """What `verify` found wrong, a line each."""

    def as_dict(self) -> dict[str, Any]:
        """Return the figures under their names, for JSON."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Look:
    """The figures of one map. `class_ids` [U], `class_probs` [U]: its classes, and their mean over its places."""

    key: str
    size: str
    num_classes: int
    top1_prob: float
    rest: float
    entropy_bits: float
    class_ids: NDArray[np.integer[Any]]
    class_probs: NDArray[np.float64]
    top_class_ids: NDArray[np.integer[Any]]


def inspect_store(
    store: LabelStore, config: InspectConfig = InspectConfig(), *, source: ImageSource | None = None
) -> Inspection:
    """Return the figures of a store.

    `source`: the images, to know their classes; without it an image's class is the first folder of its key,
    where that is the name of a class.
    """
    manifest = store.manifest
    encodings = dict.fromkeys(read_manifest(folder).encoding.value for folder in store.folders)
    broken = dict(verify(store)) if config.verify else {}
    looks = [look_at(key, store[key]) for key in _sampled(store, config.sample) if key not in broken]
    class_of = class_finder(store, source)
    classes = ((look, class_of(look.key)) for look in looks)
    known = [(look, class_id) for look, class_id in classes if class_id is not None]
    suspects = sorted(
        (_suspect(look, class_id, store) for look, class_id in known), key=lambda s: s.prob - s.top_prob
    )
    return Inspection(
        num_images=len(store),
        num_classes=manifest.num_classes,
        kind=manifest.kind.value,
        topk=manifest.topk,
        encoding=" + ".join(encodings),
        teacher=manifest.teacher,
        preprocessing=manifest.preprocessing,
        num_failures=len(store.failures()),
        num_files=len(store.shards),
        bytes_per_image=store.num_bytes() / max(1, len(store)),
        num_sampled=len(looks),
        map_sizes=dict(Counter(look.size for look in looks).most_common(10)),
        classes_per_map=_mean([look.num_classes for look in looks]),
        top1_prob=_mean([look.top1_prob for look in looks]),
        rest=_mean([look.rest for look in looks]),
        entropy_bits=_mean([look.entropy_bits for look in looks]),
        class_agreement=_mean([best_class(look) == own for look, own in known]) if known else None,
        place_agreement=_mean([(look.top_class_ids == own).mean() for look, own in known]) if known else None,
        suspects=tuple(s for s in suspects if s.prob < s.top_prob)[: config.num_suspects],
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


def look_at(key: str, score_map: ScoreMap) -> Look:
    """Return the figures of an image's map."""
    score_map = as_probabilities(score_map)
    probs = score_map.probs.astype(np.float64)
    kept = probs > 0
    rest = np.clip(1 - probs.sum(axis=2), 0, None)
    num_others = score_map.num_classes - kept.sum(axis=2)
    entropy = -np.sum(probs * np.log2(np.where(kept, probs, 1)), axis=2)
    entropy -= rest * np.log2(np.where(rest > 0, rest / np.maximum(num_others, 1), 1))
    class_probs = np.bincount(
        score_map.codes.ravel(), weights=probs.ravel(), minlength=len(score_map.palette)
    )
    height, width, _ = probs.shape
    return Look(
        key=key,
        size=f"{height} x {width}",
        num_classes=len(np.unique(score_map.codes[kept])),
        top1_prob=float(probs.max(axis=2).mean()),
        rest=float(rest.mean()),
        entropy_bits=float(entropy.mean()),
        class_ids=score_map.palette,
        class_probs=class_probs / (height * width),
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

    `source`: the images, which know their classes; without it the first folder of a key names the class.
    """
    names = store.manifest.class_names
    ids = {name: class_id for class_id, name in enumerate(names)}
    if source is None:
        return lambda key: ids.get(key.split("/", 1)[0])
    num_classes = store.manifest.num_classes
    own_ids = [
        ids.get(name, -1) if names else (class_id if class_id < num_classes else -1)
        for class_id, name in enumerate(source.class_names)
    ]
    known = zip(source.keys, source.class_ids.tolist(), strict=True) if source.class_names else ()
    class_ids = {key: own_ids[class_id] for key, class_id in known}
    return lambda key: class_id if (class_id := class_ids.get(key, -1)) >= 0 else None


def best_class(look: Look) -> int:
    """Return the most probable class of a map, over all places; -1 of one that says nothing."""
    if not look.class_probs.max() > 0:
        return -1
    return int(look.class_ids[look.class_probs.argmax()])


def _suspect(look: Look, class_id: int, store: LabelStore) -> Suspect:
    names = store.manifest.class_names
    own = look.class_probs[look.class_ids == class_id]
    best = best_class(look)
    return Suspect(
        key=look.key,
        class_name=names[class_id] if names else str(class_id),
        prob=float(own.sum()),
        top_class_name=names[best] if names else str(best),
        top_prob=float(look.class_probs.max()),
    )


def as_text(figures: Mapping[str, Any]) -> str:
    """Return the figures of `Inspection.as_dict` for people; a figure more may be there, `mask_agreement`."""
    reasons = ": manifest.json says why" if figures["num_failures"] else ""
    lines = [
        f"{figures['num_images']:,} labels ({figures['kind']}), top {figures['topk']} of {figures['num_classes']:,} "
        f"classes; {figures['num_failures']:,} images failed{reasons}",
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
    if figures["suspects"]:
        lines += ["", "least agreement: perhaps their class is wrong"]
    lines += [
        f"  {s['key']}: {s['class_name']} has {s['prob']:.1%}, {s['top_class_name']} {s['top_prob']:.1%}"
        for s in figures["suspects"]
    ]
    if figures["num_verified"] is not None:
        lines += ["", f"verified {figures['num_verified']:,} labels, {len(figures['broken']):,} broken"]
    return "\n".join([*lines, *(f"  {line}" for line in figures["broken"])])


def _in_a_line(settings: Mapping[str, Any]) -> str:
    if "members" in settings:
        members = " + ".join(_in_a_line(member) for member in settings["members"])
        return f"{members}; {_in_a_line({k: v for k, v in settings.items() if k != 'members'})}"
    return ", ".join(f"{name} {value}" for name, value in settings.items() if value not in (None, False))


def _sampled(store: LabelStore, count: int) -> Iterator[str]:
    """Return the keys of labels drawn at random, of all if `count` is 0 or more than there are."""
    if count == 0 or len(store) <= count:
        return store.keys()
    return (
        store.key_at(i) for i in np.random.default_rng(0).choice(len(store), count, replace=False).tolist()
    )


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 0.0
