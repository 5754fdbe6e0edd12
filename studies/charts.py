"""Line charts, drawn with matplotlib; imported where one is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

Points = Sequence[tuple[float, float]]


def curve_chart(panels: Mapping[str, tuple[str, Mapping[str, Points]]], *, columns: int = 3) -> Figure:
    """Return line charts: for each panel's heading the name of its x axis and the points of each line.

    A name has the same colour in every panel, and stands once in the legend below them.
    """
    columns = min(columns, len(panels))
    num_rows = -(-len(panels) // columns)
    names = list(dict.fromkeys(name for _, lines in panels.values() for name, points in lines.items() if points))
    legend_rows = -(-len(names) // 2)
    size = (10 if columns > 2 else 8.5, 3.4 * num_rows + 0.18 * legend_rows)  # wide enough for two long names
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(num_rows, columns, squeeze=False).flatten()
    drawn: dict[str, Line2D] = {}
    for axis, (heading, (x_name, lines)) in zip(axes, panels.items(), strict=False):
        for name in (name for name in names if lines.get(name)):
            drawn[name] = _draw_line(axis, lines[name], number=names.index(name))
        axis.set_title(heading, fontsize=10)
        axis.set_xlabel(x_name, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    if drawn:
        figure.legend(
            [drawn[name] for name in names], names, loc="outside lower center", ncols=2, fontsize=8, frameon=False
        )
    return figure


def _draw_line(axis: Axes, points: Points, *, number: int) -> Line2D:
    """Draw the line of a number: ten colours, then the same dashed. A single point makes no line, and is a dot."""
    style, marker = "-" if number < 10 else "--", "o" if len(points) == 1 else ""
    (line,) = axis.plot(
        *zip(*points, strict=True), linewidth=1.3, color=f"C{number % 10}", linestyle=style, marker=marker, markersize=4
    )
    return line
