"""One self-contained HTML page: sections, tables, curves, and pictures of albums under one legend of colours. No torch.

A photograph is in the page once, on its album's sheet, however often it is shown; a map is a tiny image that the
browser stretches over it.
"""

from __future__ import annotations

import base64
import html
import io
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tokenlabel.drawing.pictures import Album, ClassGrid, class_colour
from tokenlabel.runtime.errors import ConfigError
from tokenlabel.runtime.process import write_whole

# So many classes have a colour of their own; the others share one, or nobody could tell them apart.
NUM_COLOURS = 20
OTHERS, _OTHER_COLOUR = "others", (128, 128, 128)
# Opacity of a cell, from one that is hardly more than chance to a certain one. (0, 0, 0): where nothing is said.
_FAINTEST, _STRONGEST, _UNSAID = 70, 195, (0, 0, 0, 165)
# Photographs this small are shown with their pixels sharp.
_SMALL_PX = 128
# Headings of so many letters are not broken; names longer than `_LONG` lose their middle.
_SHORT, _LONG = 12, 64
# More tiles than these take a row of the page for themselves.
_FEW_TILES = 3

Picture = Mapping[str, Any]


class Page:
    """A page in the making. `albums`: all whose pictures it may show: a class has one colour on the whole page."""

    def __init__(self, title: str, albums: Iterable[Album] = ()) -> None:
        self.title = title
        self.sections: list[str] = []
        self._sheets: dict[str, bytes] = {}
        self._colours: dict[str, tuple[int, int, int]] = {}
        albums = list(albums)
        for album in albums:
            if album.about["colours"]:
                own = zip(album.about["classes"], map(tuple, album.about["colours"]), strict=True)
                self._colours |= dict(own)
        shown = _by_frequency((album, picture) for album in albums for picture in album.about["pictures"])
        free = (name for name in shown if name not in self._colours)
        self._colours |= {name: class_colour(i) for i, name in zip(range(NUM_COLOURS), free, strict=False)}

    def add(self, title: str, *parts: str) -> None:
        """Add a section under a heading."""
        self.sections.append(f"<section><h2>{_breakable(title)}</h2>{''.join(parts)}</section>")

    def legend(self, pictures: Iterable[tuple[Album, Picture]]) -> str:
        """Return the classes that the maps of pictures show, with their colours, the most frequent first."""
        pictures = list(pictures)
        shown = _by_frequency(pictures)
        named = [name for name in shown if name in self._colours]
        chips = [_chip(name, self._colours[name]) for name in named]
        if num_others := len(shown) - len(named):
            chips.append(_chip(f"{num_others:,} {OTHERS}", _OTHER_COLOUR))
        maps = (album.class_map(tile) for album, picture in pictures for tile in picture["tiles"])
        if any(found is not None and ((found.ids < 0).any() or found.region != (0, 0, 1, 1)) for found in maps):
            chips.append('<span><i class="unsaid"></i>no label</span>')
        return f'<p class="legend">{"".join(chips)}</p>' if chips else ""

    def figure(self, tiles: Iterable[tuple[Album, Mapping[str, Any]]], caption: str) -> str:
        """Return tiles side by side over one caption (HTML). Each tile's own text stands below it."""
        shown = "".join(
            f"<div>{self._tile(album, tile)}<small>{html.escape(tile['text'])}</small></div>" for album, tile in tiles
        )
        return f'<figure><div class="tiles">{shown}</div><figcaption>{caption}</figcaption></figure>'

    def add_album(self, title: str, album: Album) -> None:
        """Add a section with all pictures of an album, each with all its tiles in a row."""
        pictures = [(album, picture) for picture in album.about["pictures"]]
        figures = [
            self.figure([(album, tile) for tile in picture["tiles"]], caption(picture)) for _, picture in pictures
        ]
        broad = " broad" if any(len(picture["tiles"]) > _FEW_TILES for _, picture in pictures) else ""
        self.add(title, self.legend(pictures), f'<div class="pictures{broad}">{"".join(figures)}</div>')

    def write(self, output: Path) -> None:
        """Write the page, which needs no other file and no network, in place of an older one.

        Raises ConfigError for a path that cannot be written to and for a file that is no page.
        """
        check_output(output)
        sheets = "\n".join(
            f".s{name} {{ background-image: url(data:image/jpeg;base64,{base64.b64encode(sheet).decode()}) }}"
            for name, sheet in self._sheets.items()
        )
        text = _PAGE.format(
            title=html.escape(self.title), heading=_breakable(self.title), sheets=sheets, body="\n".join(self.sections)
        )
        try:
            write_whole(output, [text.encode("utf-8", "backslashreplace")])  # names of files need not be UTF-8
        except OSError as error:
            raise _unwritable(output, error.strerror or str(error)) from error

    def _tile(self, album: Album, tile: Mapping[str, Any]) -> str:
        self._sheets[album.name] = album.sheet
        left, top, width, height = album.about["photos"][tile["photo"]]
        sheet_width, sheet_height = album.about["size"]
        # Percentages of a background's position are of what is left over of it beside the tile.
        across, down = (
            100 * start / max(1, whole - part)
            for start, part, whole in ((left, width, sheet_width), (top, height, sheet_height))
        )
        style = (
            f"aspect-ratio: {width} / {height}; max-width: calc(20rem * {width / height:.4f}); "
            f"background-size: {100 * sheet_width / width:.3f}% {100 * sheet_height / height:.3f}%; "
            f"background-position: {across:.4f}% {down:.4f}%"
        )
        small = " small" if max(width, height) < _SMALL_PX else ""
        classes = album.class_map(tile)
        over = "" if classes is None else self._map(classes, album.about["classes"])
        label = html.escape(tile["text"], quote=True)
        return f'<div class="tile s{album.name}{small}" role="img" aria-label="{label}" style="{style}">{over}</div>'

    def _map(self, classes: ClassGrid, names: Sequence[str]) -> str:
        """Return a map as an image of one pixel a cell, laid over the part of the photograph that it is about."""
        colours = [*(self._colours.get(name, _OTHER_COLOUR) for name in names), (0, 0, 0)]  # -1 takes the last
        strength = np.ones(classes.ids.shape) if classes.strength is None else classes.strength
        pixels = np.empty((*classes.ids.shape, 4), np.uint8)
        pixels[..., :3] = np.array(colours, np.uint8)[classes.ids]
        pixels[..., 3] = _FAINTEST + (_STRONGEST - _FAINTEST) * strength
        pixels[classes.ids < 0] = _UNSAID
        left, top, right, bottom = (100 * edge for edge in classes.region)
        style = f"left: {left:.3f}%; top: {top:.3f}%; width: {right - left:.3f}%; height: {bottom - top:.3f}%"
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
        source = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        return f'<img alt="" style="{style}" src="{source}">'


def caption(picture: Picture) -> str:
    """Return as HTML which image a picture is of, and what its album says of it."""
    text = f", {picture['caption']}" if picture.get("caption") else ""
    return f"<b>{html.escape(picture['key'])}</b>{html.escape(text)}"


def check_output(output: Path) -> None:
    """Raise ConfigError where a page cannot be written, and for a file that is there and is no page."""
    try:
        with output.open("rb") as file:
            start = file.read(len(_START)).decode("utf-8", "replace")
    except FileNotFoundError:
        folder = next((folder for folder in output.absolute().parents if folder.exists()), output)
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise _unwritable(output, f"{folder} is no folder that can be written to") from None
        return
    except OSError as error:
        raise _unwritable(output, error.strerror or str(error)) from error
    if start and start != _START:
        raise ConfigError(f"{output}: is there and no page; choose another file, or remove it")
    if not os.access(output.absolute().parent, os.W_OK):
        raise _unwritable(output, f"{output.absolute().parent} cannot be written to")


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; the first column is set to the left, the others to the right."""
    head = "".join(
        f"<th{' class=short' if len(heading) <= _SHORT else ''}>{_breakable(heading)}</th>" for heading in headings
    )
    body = "".join("<tr>" + "".join(f"<td>{_breakable(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _breakable(text: str) -> str:
    """Return text as HTML in which long names of runs and settings break behind their parts, not amid a word."""
    return re.sub(r"([/,=_]|\.(?=[a-z]))(?=\w)", r"\1<wbr>", html.escape(text))


def shortened(name: str) -> str:
    """Return a name; of a very long one its start and its end, by which it is told from others."""
    return name if len(name) <= _LONG else f"{name[: _LONG // 2]}...{name[-_LONG // 3 :]}"


def _by_frequency(pictures: Iterable[tuple[Album, Picture]]) -> list[str]:
    """Return the classes in the maps of pictures, the most frequent first: each map counts 1, however fine it is."""
    counts: dict[str, float] = {}
    for album, picture in pictures:
        for tile in picture["tiles"]:
            if (classes := album.class_map(tile)) is not None:
                found, sizes = np.unique(classes.ids[classes.ids >= 0], return_counts=True)
                for i, size in zip(found.tolist(), sizes.tolist(), strict=True):
                    name = album.about["classes"][i]
                    counts[name] = counts.get(name, 0) + size / classes.ids.size
    return sorted(counts, key=lambda name: -counts[name])


def _chip(name: str, colour: tuple[int, int, int]) -> str:
    return f'<span><i style="background: rgb{colour}"></i>{html.escape(shortened(name))}</span>'


def _unwritable(output: Path, reason: str) -> ConfigError:
    return ConfigError(f"{output}: cannot be written ({reason}); choose another file")


_START = "<!doctype html>"
_PAGE = (
    _START
    + """
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>{title}</title><style>
:root {{ --text: #1d2330; --faint: #5b6478; --line: #dde1ea; --page: #fff }}
@media (prefers-color-scheme: dark) {{
  :root {{ --text: #dfe4ee; --faint: #9aa5ba; --line: #333b4b; --page: #13161d }}
}}
* {{ box-sizing: border-box }}
body {{ font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page) }}
body {{ max-width: 1100px; margin: 1.5rem auto; padding: 0 1rem; overflow-wrap: anywhere }}
h1 {{ font-size: 1.4rem }} h2 {{ font-size: 1.15rem; margin: 2.2rem 0 .8rem }} h3 {{ font-size: 1rem }}
h2 {{ border-bottom: 1px solid var(--line); padding-bottom: .3rem }} p {{ max-width: 46rem }}
.wide {{ overflow-x: auto }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; overflow-wrap: break-word }}
th, td {{ text-align: right; padding: .3rem .7rem; border-bottom: 1px solid var(--line); max-width: 22rem }}
th {{ color: var(--faint); font-weight: 600; vertical-align: bottom; overflow-wrap: anywhere }}
th:not(.short) {{ min-width: 6.5rem; max-width: 10rem }} .short {{ white-space: nowrap }}
th:first-child, td:first-child {{ text-align: left; padding-left: 0 }}
th:first-child, td:first-child {{ position: sticky; left: 0; background: var(--page) }}
td:first-child {{ overflow-wrap: anywhere; min-width: min(11rem, 36vw); max-width: min(22rem, 50vw) }}
.curves {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem }}
.curves figure, figure {{ margin: 0 }} .curves svg {{ width: 100%; height: auto; display: block; fill: currentColor }}
.pictures {{ display: grid; gap: 1.3rem 1.6rem }}
.pictures {{ grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)) }}
.pictures.broad {{ grid-template-columns: 1fr }}
.tiles {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(6.2rem, 1fr)); gap: .5rem }}
.broad .tiles {{ grid-template-columns: repeat(auto-fill, minmax(max(6.2rem, 15%), 1fr)) }}
.tile {{ position: relative; overflow: hidden; border-radius: 4px; background-repeat: no-repeat }}
.tile img {{ position: absolute; image-rendering: pixelated; box-shadow: 0 0 0 100rem rgb(0 0 0 / .6) }}
.small {{ image-rendering: pixelated }}
.tile, .legend i {{ print-color-adjust: exact; -webkit-print-color-adjust: exact }}
small, figcaption, .note {{ font-size: 12.5px; line-height: 1.35; color: var(--faint); display: block }}
figcaption {{ margin-top: .2rem }} figcaption b, small b {{ color: var(--text); font-weight: 600 }}
.legend {{ display: flex; flex-wrap: wrap; gap: .25rem .9rem; max-width: none; font-size: 13px }}
.legend i {{ display: inline-block; width: .8em; height: .8em; border-radius: 3px; margin-right: .35em }}
.legend i {{ outline: 1px solid var(--line) }}
.unsaid {{ background: rgb(0 0 0 / .65); border: 1px solid var(--faint) }}
{sheets}
</style></head><body><h1>{heading}</h1>
{body}
</body></html>
"""
)
