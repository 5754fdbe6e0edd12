"""The chart of a comparison, drawn with matplotlib; imported where it is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from tokenlabel.comparison.spread import Spread


def interval_chart(spreads: Mapping[str, Sequence[tuple[str, Spread]]]) -> Figure:
    """Return one panel a metric: a point for each row's mean, a line for its 95% interval, a dot for each seed.

    `spreads`: for each panel's heading its rows, from the top.
    """
    num_rows = max(len(rows) for rows in spreads.values())
    figure = Figure(figsize=(3.0 + 2.7 * len(spreads), 0.9 + 0.32 * num_rows), layout="constrained")
    panels = figure.subplots(1, len(spreads), sharey=True, squeeze=False)[0]
    for panel, (heading, rows) in zip(panels, spreads.items(), strict=True):
        for place, (_, spread) in enumerate(rows):
            panel.plot(spread.values, [place] * len(spread.values), ".", color="#b3bccd", markersize=4)
            if len(spread.values) > 1:
                panel.plot(
                    [spread.mean - spread.half, spread.mean + spread.half], [place] * 2, color="#3457a6"
                )
            panel.plot([spread.mean], [place], "o", color="#3457a6", markersize=4.5)
        panel.set_title(heading, fontsize=9)
        panel.tick_params(labelsize=8)
        panel.grid(axis="x", alpha=0.3)
    first_rows = next(iter(spreads.values()))
    panels[0].set_yticks(range(len(first_rows)), [title for title, _ in first_rows])
    panels[0].invert_yaxis()
    return figure
