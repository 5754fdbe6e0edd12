"""Line charts of several runs as SVG, for HTML reports. No torch."""

from __future__ import annotations

import html
import io
from collections.abc import Iterator, Sequence

import matplotlib as mpl
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


def line_chart(title: str, x_name: str, of_runs: Sequence[Sequence[tuple[float, float]]]) -> Iterator[str]:
    """Yield a line chart as SVG in the text's own colour, light or dark; nothing without points.

    `of_runs`: the points (x, y) of each run, in the order of `run_legend`.
    """
    if not any(of_runs):
        return
    figure = Figure(figsize=(4.6, 2.9), layout="constrained")
    figure.patch.set_alpha(0)
    axis = figure.subplots()
    axis.patch.set_alpha(0)
    for number, points in enumerate(of_runs):
        if points:  # a single point makes no line, and is a dot
            line, dot = "-" if number < 10 else "--", "o" if len(points) == 1 else ""
            x, y = zip(*points, strict=True)
            axis.plot(x, y, linewidth=1.4, color=f"C{number % 10}", linestyle=line, marker=dot, markersize=4)
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(x_name, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=x_name == "step", min_n_ticks=1))
    axis.grid(alpha=0.3)
    yield as_svg(figure).replace("#000000", "currentColor")


def as_svg(figure: Figure) -> str:
    """Return a figure as an <svg> element, the same for the same figure."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "tokenlabel"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]


def run_legend(names: Sequence[str]) -> str:
    """Return as HTML which colour is which run's."""
    chips = (
        f'<span><i style="background: {to_hex(f"C{number % 10}")}"></i>{html.escape(name)}'
        f"{' (dashed)' if number >= 10 else ''}</span>"
        for number, name in enumerate(names)
    )
    return f'<p class="legend">{"".join(chips)}</p>'
