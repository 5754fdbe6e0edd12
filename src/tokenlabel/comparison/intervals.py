"""The chart of a comparison, drawn with matplotlib; imported where it is drawn."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tokenlabel.comparison.spread import Spread


def interval_chart(panels: Mapping[str, Mapping[str, Spread | None]]) -> Figure:
    """Return one panel a metric: a point for each row's mean, a line for its 95% interval, a dot for each seed.

    `panels`: for each panel's heading the same rows, from the top; None for a row that has no such figure.
    """
    titles = list(next(iter(panels.values())))
    figure = Figure(figsize=(3.0 + 2.7 * len(panels), 0.9 + 0.32 * len(titles)), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (heading, rows) in zip(axes, panels.items(), strict=True):
        for place, title in enumerate(titles):
            spread = rows[title]
            if spread is not None:
                _draw_spread(axis, place, spread)
        axis.set_title(heading, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(titles)), titles)
    axes[0].set_ylim(len(titles) - 0.5, -0.5)
    return figure


def _draw_spread(axis: Axes, place: int, spread: Spread) -> None:
    axis.plot(spread.values, [place] * len(spread.values), ".", color="#b3bccd", markersize=4)
    if len(spread.values) > 1:
        axis.plot([spread.mean - spread.half, spread.mean + spread.half], [place] * 2, color="#3457a6")
    axis.plot([spread.mean], [place], "o", color="#3457a6", markersize=4.5)
