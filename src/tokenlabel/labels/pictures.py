"""A page of score maps over their images: the most and the least certain, and those that disagree with their class.

No torch.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tokenlabel.core.scores import Orientation, ScoreMap, turned_map
from tokenlabel.data.class_names import with_words
from tokenlabel.data.decoding import decode_pixels, orientation_of
from tokenlabel.data.images import ImageSource
from tokenlabel.drawing.page import Page, check_output
from tokenlabel.drawing.pictures import ClassMap, Tile, make_album, top_classes
from tokenlabel.labels.inspection import MapSummary, as_probabilities, by_doubt, class_finder, summarize
from tokenlabel.labels.store import LabelStore, StoreError
from tokenlabel.runtime.errors import ImageError
from tokenlabel.runtime.process import say

SAMPLE = 2000
NUM_NAMED = 4
SECTIONS = {
    "Most certain": "The best class of a location has the highest probability here, on average over the map.",
    "Least certain": "The best class of a location has the lowest probability here.",
    "Least agreement": "The map says another class than the image's: perhaps that class is wrong.",
}


def map_of_scores(score_map: ScoreMap) -> ClassMap:
    """Return the most probable class of each cell of a score map, over the part of the image that the teacher saw."""
    probs = as_probabilities(score_map).probs
    best = probs.argmax(axis=2, keepdims=True)
    found = top_classes(
        score_map.top_class_ids, np.take_along_axis(probs, best, 2)[..., 0], score_map.num_classes
    )
    region = score_map.region
    return replace(found, region=(region.left, region.top, region.right, region.bottom))


def write_pictures(store: LabelStore, source: ImageSource, output: Path, *, count: int = 12) -> None:
    """Write an HTML page of maps over their images, `count` a section (see `SECTIONS`).

    The maps are looked for among 2,000 drawn at random. Raises StoreError if none of the images has a label,
    ConfigError for a file that cannot be written.
    """
    check_output(output)
    places = {key: place for place, key in enumerate(source.keys)}
    keys = [key for key in store.keys() if key in places]  # noqa: SIM118  (a store is no dict)
    if not keys:
        raise StoreError(
            f"{output}: none of the {len(source):,} images has a label in this store; give its own images"
        )
    drawn = np.random.default_rng(0).permutation(len(keys))[:SAMPLE].tolist()
    summaries = [summarize(keys[i], store[keys[i]]) for i in drawn]
    class_of = class_finder(store, source)
    by_certainty = sorted(summaries, key=lambda summary: -summary.top1_prob)
    known = [(summary, class_id) for summary in summaries if (class_id := class_of(summary.key)) is not None]
    members = {
        "Most certain": by_certainty[:count],
        "Least certain": by_certainty[::-1][:count],
        "Least agreement": [summary for summary, _ in by_doubt(known)[:count]],
    }
    names = [with_words(name) for name in store.manifest.class_names] or [
        *map(str, range(store.manifest.num_classes))
    ]
    pictures = {}
    for summary in {summary.key: summary for shown in members.values() for summary in shown}.values():
        try:
            tiles = _tiles(store, summary.key, source.read(places[summary.key]))
            pictures[summary.key] = (
                tiles,
                {"key": summary.key, "caption": _caption(summary, names, class_of(summary.key))},
            )
        except ImageError as error:  # it was sound when the teacher saw it
            say(f"{error}: its picture is left out")
    album = make_album(pictures.values(), names)
    of_keys: dict[str, dict[str, Any]] = {picture["key"]: picture for picture in album.about["pictures"]}
    page = Page("Labels of " + " + ".join(map(str, store.folders)), [album])
    page.sections.append(
        f"<p>{_about(store, len(summaries), len(keys))}</p>{page.legend((album, p) for p in of_keys.values())}"
    )
    for title, shown in members.items():
        found = [of_keys[summary.key] for summary in shown if summary.key in of_keys]
        figures = [
            page.figure([(album, tile) for tile in picture["tiles"]], picture["caption"]) for picture in found
        ]
        if figures:
            page.add(title, f"<p>{SECTIONS[title]}</p>", f'<div class="pictures">{"".join(figures)}</div>')
    page.write(output)


def _about(store: LabelStore, num_looks: int, num_keys: int) -> str:
    whole = "all of them were looked at" if num_looks == len(store) else f"these are from {num_looks:,}"
    how = " drawn at random" if num_keys > num_looks else ""
    return (
        f"{len(store):,} labels; {whole}{how}. Right of each image its map: each cell in the colour of its most "
        "probable class, the stronger the more probable; dark where the teacher did not look or the cell keeps "
        "nothing. Below: the classes with the highest probability over the whole map."
    )


def _tiles(store: LabelStore, key: str, data: bytes) -> list[Tile]:
    score_map, pixels = store[key], decode_pixels(data, key)
    if store.manifest.orientation == Orientation.STORED:
        score_map = turned_map(score_map, orientation_of(data))
    return [Tile(pixels, ""), Tile(pixels, "", map_of_scores(score_map))]


def _caption(summary: MapSummary, names: Sequence[str], class_id: int | None) -> str:
    """Return as HTML which image it is, its class, and the classes that have most of its map."""
    best = np.argsort(-summary.class_probs, kind="stable")[:NUM_NAMED].tolist()
    shares = [
        (names[int(summary.class_ids[i])], float(summary.class_probs[i]))
        for i in best
        if summary.class_probs[i] > 0
    ]
    own = "" if class_id is None else f", class {html.escape(names[class_id])}"
    said = " · ".join(f"{html.escape(name)} {share:.0%}" for name, share in shares)
    return f"<b>{html.escape(summary.key)}</b>{own}, certainty {summary.top1_prob:.0%}<br>{said}"
