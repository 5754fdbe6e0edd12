"""Self-contained HTML pages: sections, tables, line charts, and pictures with a common legend of class colours.

Each photograph is stored once, on its album's contact sheet, of which a CSS background shows the part; a class map is a
tiny image that the browser scales over it. No torch; matplotlib is imported for charts only.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from tokenlabel.drawing.pictures import Album, ClassGrid, class_colour
from tokenlabel.runtime.errors import ConfigError
from tokenlabel.runtime.process import is_replaced, why_unwritable, write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Number of classes with a colour of their own: more colours could not be told apart. All other classes share one.
NUM_COLOURS = 20
_OTHER_COLOUR = (128, 128, 128)
# Opacity of a cell at chance level and of a certain one; colour and opacity of a cell without a label.
_FAINTEST, _STRONGEST, _UNLABELLED = 70, 195, (0, 0, 0, 165)
# Smaller photographs are scaled without smoothing.
_SMALL_PX = 128
# Shorter headings are not broken into lines; longer names lose their middle.
_SHORT, _LONG = 12, 64
# Pictures of more tiles take the full width of the page.
_FEW_TILES = 3

Picture = Mapping[str, Any]


class Page:
    """A page under construction. `albums`: all that it may show, so that a class has one colour on the whole page."""

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
        """Return the classes in the maps of pictures with their colours as HTML, the most frequent first."""
        pictures = list(pictures)
        shown = _by_frequency(pictures)
        named = [name for name in shown if name in self._colours]
        chips = [_chip(name, self._colours[name]) for name in named]
        if num_others := len(shown) - len(named):
            chips.append(_chip(f"{num_others:,} others", _OTHER_COLOUR))
        maps = (album.class_map(tile) for album, picture in pictures for tile in picture["tiles"])
        if any(found is not None and ((found.ids < 0).any() or found.region != (0, 0, 1, 1)) for found in maps):
            chips.append('<span><i class="unsaid"></i>no label</span>')
        return f'<p class="legend">{"".join(chips)}</p>' if chips else ""

    def figure(self, tiles: Iterable[tuple[Album, Mapping[str, Any]]], caption: str) -> str:
        """Return tiles side by side, each over its text, with a common caption (HTML)."""
        shown = "".join(
            f"<div>{self._tile(album, tile)}<small>{html.escape(tile['text'])}</small></div>" for album, tile in tiles
        )
        return f'<figure><div class="tiles">{shown}</div><figcaption>{caption}</figcaption></figure>'

    def add_album(self, title: str, album: Album) -> None:
        """Add a section with all pictures of an album."""
        pictures = [(album, picture) for picture in album.about["pictures"]]
        figures = [
            self.figure([(album, tile) for tile in picture["tiles"]], caption(picture)) for _, picture in pictures
        ]
        broad = " broad" if any(len(picture["tiles"]) > _FEW_TILES for _, picture in pictures) else ""
        self.add(title, self.legend(pictures), f'<div class="pictures{broad}">{"".join(figures)}</div>')

    def write(self, output: Path) -> None:
        """Write the page, or replace an older one. Raises ConfigError, see `check_output`."""
        check_output(output)
        sheets = "\n".join(
            f".s{name} {{ background-image: url(data:image/jpeg;base64,{base64.b64encode(sheet).decode()}) }}"
            for name, sheet in self._sheets.items()
        )
        text = _PAGE.format(
            title=html.escape(self.title), heading=_breakable(self.title), sheets=sheets, body="\n".join(self.sections)
        )
        try:
            write_whole(output, [text.encode("utf-8", "backslashreplace")])  # file names may not be UTF-8
        except OSError as error:
            raise _unwritable(output, error.strerror or str(error)) from error

    def _tile(self, album: Album, tile: Mapping[str, Any]) -> str:
        self._sheets[album.name] = album.sheet
        left, top, width, height = album.about["photos"][tile["photo"]]
        sheet_width, sheet_height = album.about["size"]
        # CSS: percentages of a background's position refer to its size minus that of the tile.
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
        """Return a map as an <img> of one pixel a cell, placed over its region of the photograph."""
        colours = [*(self._colours.get(name, _OTHER_COLOUR) for name in names), (0, 0, 0)]  # the last for id -1
        strength = np.ones(classes.ids.shape) if classes.strength is None else classes.strength
        pixels = np.empty((*classes.ids.shape, 4), np.uint8)
        pixels[..., :3] = np.array(colours, np.uint8)[classes.ids]
        pixels[..., 3] = _FAINTEST + (_STRONGEST - _FAINTEST) * strength
        pixels[classes.ids < 0] = _UNLABELLED
        left, top, right, bottom = (100 * edge for edge in classes.region)
        style = f"left: {left:.3f}%; top: {top:.3f}%; width: {right - left:.3f}%; height: {bottom - top:.3f}%"
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
        source = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        return f'<img alt="" style="{style}" src="{source}">'


def caption(picture: Picture) -> str:
    """Return the key of a picture's image and its caption as HTML."""
    text = f", {picture['caption']}" if picture.get("caption") else ""
    return f"<b>{html.escape(picture['key'])}</b>{html.escape(text)}"


def check_output(output: Path) -> None:
    """Raise ConfigError if a page cannot be written, or would replace a file that is no page."""
    try:
        if reason := why_unwritable(output):
            raise _unwritable(output, reason)
        replaced = is_replaced(output, PAGE[1])
    except OSError as error:
        raise _unwritable(output, error.strerror or str(error)) from error
    if not replaced:
        raise ConfigError(f"{output}: exists and is no {PAGE[0]}; choose another file, or remove it")


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table as HTML, the first column left-aligned, the others right-aligned."""
    head = "".join(
        f"<th{' class=short' if len(heading) <= _SHORT else ''}>{_breakable(heading)}</th>" for heading in headings
    )
    body = "".join("<tr>" + "".join(f"<td>{_breakable(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _breakable(text: str) -> str:
    """Return text as HTML that may break after the parts of long names of runs and settings."""
    return re.sub(r"([/,=_]|\.(?=[a-z]))(?=\w)", r"\1<wbr>", html.escape(text))


def shortened(name: str) -> str:
    """Return a name, or the start and the end of a very long one."""
    return name if len(name) <= _LONG else f"{name[: _LONG // 2]}...{name[-_LONG // 3 :]}"


def _by_frequency(pictures: Iterable[tuple[Album, Picture]]) -> list[str]:
    """Return the classes in the maps of pictures, the most frequent first; each map has the same weight."""
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


def line_chart(title: str, x_name: str, of_runs: Sequence[Sequence[tuple[float, float]]]) -> Iterator[str]:
    """Yield a line chart as SVG without the runs of which all values are 0, a loss that they do not use; or nothing.

    `of_runs`: points (x, y) of each run, as in `run_legend`.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    of_runs = [points if any(y for _, y in points) else [] for points in of_runs]
    if not any(of_runs):
        return
    figure = Figure(figsize=(4.6, 2.9), layout="constrained")
    figure.patch.set_alpha(0)
    axis = figure.subplots()
    axis.patch.set_alpha(0)
    for number, points in enumerate(of_runs):
        if points:  # a single point is no line: draw a dot
            line, dot = "-" if number < 10 else "--", "o" if len(points) == 1 else ""
            x, y = zip(*points, strict=True)
            axis.plot(x, y, linewidth=1.4, color=f"C{number % 10}", linestyle=line, marker=dot, markersize=4)
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(x_name, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=x_name == "step", min_n_ticks=1))
    axis.grid(alpha=0.3)
    yield as_svg(figure).replace("#000000", "currentColor")  # black axes follow the page's dark or light text


def as_svg(figure: Figure) -> str:
    """Return a figure as an <svg> element."""
    import matplotlib as mpl

    buffer = io.StringIO()
    # Without salt and date the same figure would differ between calls.
    with mpl.rc_context({"svg.hashsalt": "tokenlabel"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]


def run_legend(names: Sequence[str]) -> str:
    """Return the colours of runs in `line_chart` as HTML."""
    from matplotlib.colors import to_hex

    chips = (
        f'<span><i style="background: {to_hex(f"C{number % 10}")}"></i>{html.escape(name)}'
        f"{' (dashed)' if number >= 10 else ''}</span>"
        for number, name in enumerate(names)
    )
    return f'<p class="legend">{"".join(chips)}</p>'


_START = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>"""
PAGE = ("page of tokenlabel's", re.escape(_START).encode())
"""What is written, and how it begins: such a file is replaced."""
_PAGE = (
    _START
    + """{title}</title><style>
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
