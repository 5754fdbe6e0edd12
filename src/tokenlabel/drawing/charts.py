"""Line charts, drawn with matplotlib; imported where one is drawn."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Points = Sequence[tuple[float, float]]


def curve_chart(panels: Mapping[str, tuple[str, Mapping[str, Points]]], *, columns: int = 3) -> Figure:
    """Return line charts: for each panel's heading the name of its x axis and the points of each line."""
    num_rows = -(-len(panels) // columns)
    figure = Figure(figsize=(10 if columns > 2 else 8.5, 3.4 * num_rows), layout="constrained")
    axes = figure.subplots(num_rows, columns, squeeze=False).flatten()
    colours: dict[str, str] = {}
    for axis, (heading, (x_name, lines)) in zip(axes, panels.items(), strict=False):
        _draw_lines(axis, lines, colours)
        axis.set_title(heading, fontsize=10)
        axis.set_xlabel(x_name, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    return figure


def _draw_lines(axis: Axes, lines: Mapping[str, Points], colours: dict[str, str]) -> None:
    """Draw named lines; a name has the same colour in every panel."""
    for name, points in lines.items():
        if points:
            colour = colours.setdefault(name, f"C{len(colours)}")
            axis.plot(*zip(*points, strict=True), label=name, linewidth=1.3, color=colour)
    if axis.lines:
        axis.legend(fontsize=7)


def as_svg(figure: Figure) -> str:
    """Return a figure as an <svg> element, the same for the same figure."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "tokenlabel"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]
