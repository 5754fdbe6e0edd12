"""A label store for people: its statistics as text, and an HTML page of score maps over their images. No torch."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tokenlabel.core.scores import Orientation, ScoreMap, turned_map
from tokenlabel.data.class_names import with_words
from tokenlabel.data.decoding import decode_pixels, orientation_of
from tokenlabel.data.images import ImageSource
from tokenlabel.drawing.page import Page, check_output
from tokenlabel.drawing.pictures import ClassGrid, Tile, make_album, top_classes
from tokenlabel.labels.inspection import MapSummary, as_probabilities, by_doubt, class_finder, shortened_path, summarize
from tokenlabel.labels.manifest import members_of
from tokenlabel.labels.store import LabelStore
from tokenlabel.runtime.errors import ImageError, StoreError
from tokenlabel.runtime.process import listed, printable, say

MAX_KEY = 200  # longer ones are shortened
SAMPLE = 2000
NUM_NAMED = 4
SECTIONS = {
    "Most certain": "The best class of a location has the highest probability here, on average over the map.",
    "Least certain": "The best class of a location has the lowest probability here.",
    "Least agreement": "The most probable class of the map is not the image's: perhaps that one is wrong.",
}


def as_text(figures: Mapping[str, Any]) -> str:
    """Return the statistics of `Inspection.as_dict`, and what `inspect` adds (masks, out of fold), as lines of text."""
    reasons = ": manifest.json says why" if figures["num_failures"] else ""
    failed = "image" if figures["num_failures"] == 1 else "images"
    lines = [
        f"{figures['num_images']:,} labels ({figures['kind']}), top {figures['topk']} of {figures['num_classes']:,} "
        f"classes; {figures['num_failures']:,} {failed} failed{reasons}",
        *(f"{name:<24}{text}".rstrip() for name, text in (*_about_store(figures), *_about_maps(figures))),
    ]
    if figures["uncertain"]:
        sampled = "" if figures["num_sampled"] == figures["num_images"] else " of those looked at (--sample 0: all)"
        lines += ["", f"least certain{sampled}: a mask of these would teach most"]
    lines += [
        f"  {shortened_path(image['key'], MAX_KEY)}: {image['entropy_bits']:.2f} bits a place, "
        f"{image['below_half']:.0%} of the places below 50%"
        for image in figures["uncertain"]
    ]
    lines += _suspect_lines("least agreement: perhaps their class is wrong", figures["suspects"])
    if folds := figures.get("out_of_fold"):
        agree = f"{folds['agreement']:.1%} of {folds['num_images']:,} images have the class that they look like"
        lines += ["", f"out of fold, {agree}", *_suspect_lines("least of all", folds["suspects"])[1:]]
    if figures["num_verified"] is not None:
        lines += ["", f"verified {figures['num_verified']:,} labels, {len(figures['broken']):,} broken"]
    return "\n".join(map(printable, [*lines, *(f"  {line}" for line in figures["broken"])]))


def _about_store(figures: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what holds for the whole store; first what is to be known before the statistics are trusted."""
    if count := figures["num_superseded"]:
        yield "superseded", f"{count:,} records, by newer, equal or earlier ones; merge leaves them out"
    if count := figures["num_replaced"]:
        names = listed(figures["replaced"])
        yield "replaced", f"{count:,} of the images since labelling ({names}): annotate --again changed"
    if count := figures["num_unsure"]:
        yield ("modified", f"{count:,} of the images since labelling, which kept their size: --verify reads them")
    size, num_files = figures["bytes_per_image"], figures["num_files"]
    yield "size", f"{size:,.0f} bytes an image, files: {num_files:,}, encoding {figures['encoding']}"
    yield "teacher", _in_a_line(figures["teacher"])
    yield "preprocessing", _in_a_line(figures["preprocessing"])
    yield "", ""


def _about_maps(figures: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the statistics of the sampled maps."""
    yield "looked at", f"{figures['num_sampled']:,} labels"
    yield "rows x columns", ", ".join(f"{size} ({n:,})" for size, n in figures["map_sizes"].items())
    yield "distinct classes", f"{figures['classes_per_map']:.1f} a map"
    yield "certainty", f"{figures['top1_prob']:.1%} (probability of a place's best class)"
    yield "rest", f"{figures['rest']:.1%} (probability of the classes that a place did not keep)"
    yield "entropy", f"{figures['entropy_bits']:.2f} bits a place"
    if figures["empty"]:
        yield "empty", f"{figures['empty']:.1%} of the places keep nothing"
    agreements = {
        "class_agreement": "of the images' best class is their own",
        "place_agreement": "of the places' best class is the image's",
        "mask_agreement": "of the places' best class is what the masks show there",
    }
    for name, words in agreements.items():
        if figures.get(name) is not None:
            yield "agreement", f"{figures[name]:.1%} {words}"
    if figures["agreement_missing"]:
        yield "agreement", f"unknown: {figures['agreement_missing']}"
    elif figures["num_judged"] < figures["num_sampled"]:
        yield "", f"of {figures['num_judged']:,} labels, whose images' class is known"


def _suspect_lines(title: str, suspects: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        f"  {shortened_path(s['key'], MAX_KEY)}: {with_words(s['class_name'])} has {s['prob']:.1%}, "
        f"{with_words(s['top_class_name'])} {s['top_prob']:.1%}"
        for s in suspects
    ]
    return ["", title, *lines] if lines else []


def _in_a_line(settings: Mapping[str, Any]) -> str:
    if (several := members_of(settings)) != [settings]:
        members = [_in_a_line(member) for member in several]
        more = f" + {len(members) - 3} more" if len(members) > 3 else ""
        return f"{' + '.join(members[:3])}{more}; {_in_a_line({k: v for k, v in settings.items() if k != 'members'})}"
    return ", ".join(
        f"{name} {_shortened(value)}" for name, value in settings.items() if value is not None and value is not False
    )


def _shortened(value: Any) -> str:
    """Return a value of a manifest as text: the size of a class map, the start of a list, the end of a path."""
    if isinstance(value, Mapping) and "targets" in value:
        kept = [target for target in value["targets"] if target >= 0]
        return f"{len(kept):,} of {len(value['targets']):,} classes to {len(set(kept)):,} ({value.get('nowhere')})"
    if isinstance(value, Mapping):
        return f"({_in_a_line(value)})"
    if isinstance(value, list) and len(value) > 4:
        return f"[{listed([_shortened(entry) for entry in value])}]"
    return shortened_path(str(value))


def map_of_scores(score_map: ScoreMap) -> ClassGrid:
    """Return the most probable class of each cell, placed on the part of the image that the teacher saw."""
    highest, region = as_probabilities(score_map).probs.max(axis=2), score_map.region
    found = top_classes(score_map.top_class_ids, highest, score_map.num_classes)
    return replace(found, region=(region.left, region.top, region.right, region.bottom))


def write_pictures(store: LabelStore, source: ImageSource, output: Path, *, count: int = 12) -> None:
    """Write an HTML page of maps over their images, `count` in each of `SECTIONS`, from 2,000 drawn at random.

    Raises StoreError if none of the images has a label, ConfigError if the file cannot be written.
    """
    check_output(output)
    index_of = {key: index for index, key in enumerate(source.keys)}
    keys = [key for key in store.keys() if key in index_of]  # noqa: SIM118  (a store is no dict)
    if not keys:
        raise StoreError(f"{output}: none of the {len(source):,} images has a label in this store; give its own images")
    drawn = np.random.default_rng(0).permutation(len(keys))[:SAMPLE].tolist()
    summaries = [summarize(keys[i], store[keys[i]]) for i in drawn]
    class_of, manifest = class_finder(store, source), store.manifest
    by_certainty = sorted(summaries, key=lambda summary: -summary.top1_prob)
    known = [(summary, own) for summary in summaries if (own := class_of(summary.key)) is not None]
    doubtful = [summary for summary, _ in by_doubt(known)[:count]]
    members = dict(zip(SECTIONS, (by_certainty[:count], by_certainty[::-1][:count], doubtful), strict=True))
    names = [*map(with_words, manifest.classes.labels)]
    pictures = {}
    for summary in {summary.key: summary for shown in members.values() for summary in shown}.values():
        try:
            tiles = _tiles(store, summary.key, source.read(index_of[summary.key]))
            caption = _caption(summary, names, class_of(summary.key))
            pictures[summary.key] = (tiles, {"key": summary.key, "caption": caption})
        except ImageError as error:  # corrupted after it was labelled
            say(f"{error}: its picture is left out")
    album = make_album(pictures.values(), names)
    of_keys: dict[str, dict[str, Any]] = {picture["key"]: picture for picture in album.about["pictures"]}
    page = Page("Labels of " + " + ".join(map(str, store.folders)), [album])
    legend = page.legend((album, picture) for picture in of_keys.values())
    page.sections.append(f"<p>{_about(store, len(summaries), len(keys))}</p>{legend}")
    for title, shown in members.items():
        found = [of_keys[summary.key] for summary in shown if summary.key in of_keys]
        figures = [page.figure([(album, tile) for tile in each["tiles"]], each["caption"]) for each in found]
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
    """Return the HTML caption of a map: key, class, certainty, and the most probable classes over the whole map."""
    best = np.argsort(-summary.class_probs, kind="stable")[:NUM_NAMED].tolist()
    shares = [
        (names[int(summary.class_ids[i])], float(summary.class_probs[i])) for i in best if summary.class_probs[i] > 0
    ]
    own = "" if class_id is None else f", class {html.escape(names[class_id])}"
    said = " · ".join(f"{html.escape(name)}: {share:.0%}" for name, share in shares)
    return f"<b>{html.escape(summary.key)}</b>{own}, certainty {summary.top1_prob:.0%}<br>{said}"
