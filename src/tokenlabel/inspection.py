"""What is in a label store: figures, likely label errors, broken records, pictures."""

from __future__ import annotations

import base64
import html
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tokenlabel.images import ImageSource, decode_image
from tokenlabel.pictures import with_cells
from tokenlabel.scores import Kind, ScoreMap
from tokenlabel.store import LabelStore, StoreError

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
class _Look:
    """The figures of one map; `class_probs` are means over its places."""

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
    broken = dict(verify(store)) if config.verify else {}
    keys = _sampled([key for key in store.keys() if key not in broken], config.sample)  # noqa: SIM118
    looks = [_look(key, store[key]) for key in keys]
    class_of = _classes_of_images(store, source)
    known = [(look, class_of[look.key]) for look in looks if look.key in class_of]
    suspects = sorted(
        (_suspect(look, class_id, store) for look, class_id in known), key=lambda s: s.prob - s.top_prob
    )
    return Inspection(
        num_images=len(store),
        num_classes=manifest.num_classes,
        kind=manifest.kind.value,
        topk=manifest.topk,
        encoding=manifest.encoding.value,
        teacher=manifest.teacher,
        preprocessing=manifest.preprocessing,
        num_failures=len(manifest.failures),
        num_files=len(store.shards),
        bytes_per_image=store.num_bytes() / max(1, len(store)),
        num_sampled=len(looks),
        map_sizes=dict(Counter(look.size for look in looks).most_common(10)),
        classes_per_map=_mean([look.num_classes for look in looks]),
        top1_prob=_mean([look.top1_prob for look in looks]),
        rest=_mean([look.rest for look in looks]),
        entropy_bits=_mean([look.entropy_bits for look in looks]),
        class_agreement=_mean([_best(look) == own for look, own in known]) if known else None,
        place_agreement=_mean([(look.top_class_ids == own).mean() for look, own in known]) if known else None,
        suspects=tuple(s for s in suspects if s.prob < s.top_prob)[: config.num_suspects],
        num_verified=len(store) if config.verify else None,
        broken=tuple(broken.values()),
    )


def verify(store: LabelStore) -> Iterator[tuple[str, str]]:
    """Read every label against its checksum; yield the key of each that cannot be right, and what is wrong."""
    for key in store.keys():  # noqa: SIM118  (a store is no dict)
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


def write_pictures(store: LabelStore, source: ImageSource, output: Path, *, count: int = 12) -> None:
    """Write an HTML page of maps over their images: the most certain ones first, then the least certain.

    Certain is what has a high probability of the best class, on average over the places of a map; the maps
    are looked for among 2,000 drawn at random.
    """
    places = {key: place for place, key in enumerate(source.keys)}
    keys = _sampled([key for key in store.keys() if key in places], 2000)  # noqa: SIM118
    if not keys:
        raise StoreError(
            f"{output}: none of the {len(source):,} images has a label in this store; give its own images"
        )
    by_certainty = sorted(keys, key=lambda key: -_look(key, store[key]).top1_prob)
    names = store.manifest.class_names or tuple(map(str, range(store.manifest.num_classes)))
    groups = {"Most certain": by_certainty[:count], "Least certain": by_certainty[::-1][:count]}
    sections = []
    for title, members in groups.items():
        figures = [_figure(key, store[key], source.read(places[key]), names) for key in members]
        sections.append(f"<h2>{title}</h2>\n<div>{''.join(figures)}</div>")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(_PAGE.format(body="\n".join(sections)), encoding="utf-8")


def _look(key: str, score_map: ScoreMap) -> _Look:
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
    return _Look(
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


def _classes_of_images(store: LabelStore, source: ImageSource | None) -> dict[str, int]:
    if source is not None:
        if not source.class_names:
            return {}
        return dict(zip(source.keys, source.class_ids.tolist(), strict=True))
    ids = {name: class_id for class_id, name in enumerate(store.manifest.class_names)}
    folders = ((key, key.split("/", 1)[0]) for key in store.keys())  # noqa: SIM118
    return {key: ids[folder] for key, folder in folders if folder in ids}


def _best(look: _Look) -> int:
    return int(look.class_ids[look.class_probs.argmax()])


def _suspect(look: _Look, class_id: int, store: LabelStore) -> Suspect:
    names = store.manifest.class_names
    own = look.class_probs[look.class_ids == class_id]
    best = _best(look)
    return Suspect(
        key=look.key,
        class_name=names[class_id] if names else str(class_id),
        prob=float(own.sum()),
        top_class_name=names[best] if names else str(best),
        top_prob=float(look.class_probs.max()),
    )


def _figure(key: str, score_map: ScoreMap, data: bytes, names: Sequence[str]) -> str:
    image = decode_image(data, key)
    region = score_map.region
    part_px = (
        round(region.left * image.width),
        round(region.top * image.height),
        round(region.right * image.width),
        round(region.bottom * image.height),
    )
    seen = np.asarray(image.crop(part_px))
    map_over_image = with_cells(seen, as_probabilities(score_map).dense(), names)
    look = _look(key, score_map)
    words = f"{names[_best(look)]} {look.class_probs.max():.0%}, certainty {look.top1_prob:.0%}"
    pictures = _img(Image.fromarray(seen).resize(map_over_image.size)) + _img(map_over_image)
    caption = f"{html.escape(key)}<br>{html.escape(words)}"
    return f"<figure>{pictures}<figcaption>{caption}</figcaption></figure>"


def _img(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f'<img src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}" alt="">'


def _sampled(keys: list[str], count: int) -> list[str]:
    if count == 0 or len(keys) <= count:
        return keys
    return [keys[i] for i in np.random.default_rng(0).choice(len(keys), count, replace=False)]


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 0.0


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>tokenlabel: labels</title>
<style>
body {{ font: 14px sans-serif; margin: 2em auto; max-width: 1000px; }}
div {{ display: flex; flex-wrap: wrap; gap: 1em; }}
figure {{ margin: 0; width: 460px; overflow-wrap: anywhere; }}
img {{ width: 224px; margin-right: 4px; }}
</style></head><body>
<h1>Labels over their images</h1>
{body}
</body></html>
"""
