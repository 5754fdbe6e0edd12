"""A page of score maps over their images: the most and the least certain, and those that disagree with their class."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from tokenlabel.core.scores import Orientation, ScoreMap, turned_map
from tokenlabel.data.images import ImageError, ImageSource, decode_image, orientation_of
from tokenlabel.drawing.pictures import class_colour, with_cells
from tokenlabel.labels.inspection import MapSummary, as_probabilities, by_doubt, class_finder, summarize
from tokenlabel.labels.store import LabelStore, StoreError
from tokenlabel.labels.wordnet import with_words
from tokenlabel.runtime.notices import say

SAMPLE = 2000
NUM_NAMED = 4
SECTIONS = {
    "Most certain": "The best class of a place has the highest probability here, on average over the map.",
    "Least certain": "The best class of a place has the lowest probability here.",
    "Least agreement": "The map says another class than the image's: perhaps that class is wrong.",
}


def write_pictures(store: LabelStore, source: ImageSource, output: Path, *, count: int = 12) -> None:
    """Write an HTML page of maps over their images, `count` a section (see `SECTIONS`).

    The maps are looked for among 2,000 drawn at random. Raises StoreError if none of the images has a label.
    """
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
    names = store.manifest.class_names or tuple(map(str, range(store.manifest.num_classes)))
    sections = []
    for title, shown in members.items():
        figures = []
        for summary in shown:
            try:
                data, score_map = source.read(places[summary.key]), store[summary.key]
                if store.manifest.orientation == Orientation.STORED:
                    score_map = turned_map(score_map, orientation_of(data))
                figures.append(_figure(summary, score_map, data, names, class_of(summary.key)))
            except ImageError as error:  # it was sound when the teacher saw it
                say(f"{error}: its picture is left out")
        if figures:
            sections.append(f"<h2>{title}</h2>\n<p>{SECTIONS[title]}</p>\n<div>{''.join(figures)}</div>")
    whole = (
        "all of them were looked at" if len(summaries) == len(store) else f"these are from {len(summaries):,}"
    )
    how = " drawn at random" if len(keys) > len(summaries) else ""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(
        _PAGE.format(
            title=html.escape(" + ".join(map(str, store.folders))),
            about=f"{len(store):,} labels; {whole}{how}.",
            body="\n".join(sections),
        ),
        encoding="utf-8",
        errors="backslashreplace",  # names of files need not be UTF-8
    )


def _figure(
    summary: MapSummary, score_map: ScoreMap, data: bytes, names: Sequence[str], class_id: int | None
) -> str:
    image = decode_image(data, summary.key)
    region = score_map.region
    part_px = (
        round(region.left * image.width),
        round(region.top * image.height),
        round(region.right * image.width),
        round(region.bottom * image.height),
    )
    seen = np.asarray(image.crop(part_px))
    probs = as_probabilities(score_map)
    says_something = (probs.probs.max(axis=2, keepdims=True) > 0) | probs.empty_is_even
    over_image = with_cells(seen, probs.dense() * says_something, names)
    best = np.argsort(-summary.class_probs, kind="stable")[:NUM_NAMED]
    shares = [(int(summary.class_ids[entry]), float(summary.class_probs[entry])) for entry in best]
    chips = "".join(
        f'<span><i style="background: rgb{class_colour(found)}"></i>{html.escape(with_words(names[found]))} '
        f"{share:.0%}</span>"
        for found, share in shares
        if share > 0
    )
    own = "" if class_id is None else f", class {html.escape(with_words(names[class_id]))}"
    return (
        f"<figure>{_img(Image.fromarray(seen).resize(over_image.size))}{_img(over_image)}"
        f"<figcaption><b>{html.escape(summary.key)}</b>{own}, certainty {summary.top1_prob:.0%}<br>{chips}</figcaption>"
        "</figure>"
    )


def _img(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f'<img src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}" alt="">'


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Labels of {title}</title>
<style>
body {{ font: 14px/1.4 system-ui, sans-serif; margin: 2em auto; padding: 0 1em; max-width: 1000px; color: #222; }}
h1 {{ font-size: 22px; }} h2 {{ font-size: 18px; margin: 1.6em 0 0; }} p {{ margin: .3em 0 .8em; color: #555; }}
div {{ display: flex; flex-wrap: wrap; gap: 1.2em 2em; }}
figure {{ margin: 0; width: 456px; overflow-wrap: anywhere; }}
img {{ width: 224px; max-height: 320px; object-fit: contain; object-position: left top; margin-right: 4px;
      vertical-align: top; }}
figcaption {{ font-size: 13px; margin-top: 3px; }}
span {{ margin-right: .9em; white-space: nowrap; }}
i {{ display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 4px; }}
</style></head><body>
<h1>Labels over their images</h1>
<p>{title}: {about} Left: what the teacher saw. Right: each cell of the map in the colour of its most probable
class, the stronger the more probable. Below: the classes with the highest probability over the whole map.</p>
{body}
</body></html>
"""
