"""One self-contained HTML page: sections, tables, curves and pictures inside the file."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from tokenlabel.runtime.configuration import settings


def write_page(title: str, sections: Sequence[str], output: Path) -> None:
    """Write sections under a title to an HTML file, which needs no other file and no network."""
    output.parent.mkdir(parents=True, exist_ok=True)
    page = _PAGE.format(title=html.escape(title), body="\n".join(sections))
    output.write_text(page, encoding="utf-8", errors="backslashreplace")  # names of files need not be UTF-8


def section(title: str, body: str) -> str:
    """Return a part of the page under a heading."""
    return f"<section><h2>{html.escape(title)}</h2>{body}</section>"


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; the first column is set to the left, the others to the right."""
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in headings)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def settings_table(recipes: Sequence[tuple[str, Any]]) -> str:
    """Return the settings in which recipes, each with the name of its run, differ; all of a single one."""
    columns = [settings(recipe) for _, recipe in recipes]
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [[name, *(str(column.get(name, "–")) for column in columns)] for name in names]
    differing = [row for row in rows if len(recipes) == 1 or len(set(row[1:])) > 1]
    return table(["setting", *(name for name, _ in recipes)], differing)


def gallery(pictures: Iterable[tuple[Image.Image, str]]) -> str:
    """Return pictures with captions, four a row."""
    figures = (
        f'<figure><img src="{_data_uri(image)}" alt="{html.escape(caption)}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        for image, caption in pictures
    )
    return f'<div class="gallery">{"".join(figures)}</div>'


def svg(figure: Figure) -> str:
    """Return a figure as a part of the page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #1d2330; background: #fff }}
body {{ max-width: 1000px; margin: 2rem auto; padding: 0 1rem }}
h1 {{ font-size: 1.5rem }} h2 {{ font-size: 1.15rem; margin-top: 2.2rem }}
h2 {{ border-bottom: 1px solid #dde1ea; padding-bottom: .3rem }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
th, td {{ text-align: right; padding: .3rem .8rem; border-bottom: 1px solid #e8ebf1 }}
th:first-child, td:first-child {{ text-align: left }} thead th {{ color: #5b6478; font-weight: 600 }}
.gallery {{ display: grid; grid-template-columns: repeat(4, 1fr); gap: .9rem }}
figure {{ margin: 0 }} img {{ width: 100%; border-radius: 4px; display: block }}
figcaption {{ font-size: 12px; color: #5b6478; overflow-wrap: anywhere }} svg {{ max-width: 100%; height: auto }}
.gallery img {{ max-height: 20rem; object-fit: contain; object-position: left top }}
</style></head><body><h1>{title}</h1>
{body}
</body></html>
"""
