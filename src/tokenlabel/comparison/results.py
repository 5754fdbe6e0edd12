"""What a comparison found: tables with intervals, differences in words, charts and learning curves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from tokenlabel.comparison.metrics import METRICS
from tokenlabel.comparison.records import RunRecord
from tokenlabel.comparison.spread import Spread, paired, spread_of
from tokenlabel.comparison.tables import Table

# A claim needs so many seeds.
SEEDS_OF_A_CLAIM = 5
# Panels of a table's chart.
NUM_CHARTED = 3
# What is summed up beside the first metric of a table.
_ALSO_IN_SHORT = ("probe_accuracy",)


@dataclass(frozen=True, kw_only=True)
class Found:
    """The figures of a table's finished runs: `values[row][metric][seed]`, and each run's record by row and seed."""

    table: Table
    num_seeds: int
    values: Mapping[str, Mapping[str, Mapping[int, float]]]
    runs: Mapping[str, Mapping[int, RunRecord]]

    def missing(self) -> dict[str, list[int]]:
        """Return the seeds of each row that are not there."""
        lacking = {
            row: [seed for seed in range(self.num_seeds) if seed not in self.runs[row]] for row in self.runs
        }
        return {row: seeds for row, seeds in lacking.items() if seeds}

    def metrics(self) -> list[str]:
        """Return the metrics that any run has, in the table's order."""
        return [name for name in self.table.metrics if any(self.values[row].get(name) for row in self.values)]

    def headlines(self) -> list[str]:
        """Return the metrics that a summary names: the table's first, and the probe of what the tokens know."""
        return [name for name in self.metrics() if name in (self.table.metrics[0], *_ALSO_IN_SHORT)]

    def charted(self) -> list[str]:
        """Return the metrics of the chart, in the table's order: the headlines, then others."""
        first = dict.fromkeys([*self.headlines(), *self.metrics()])
        return [name for name in self.metrics() if name in [*first][:NUM_CHARTED]]

    def differences(self) -> Iterator[tuple[str, str, dict[str, Spread]]]:
        """Yield pairs of rows and, for each metric that both have, the spread of first minus second."""
        for ours, theirs in self.table.differences:
            spreads = {
                name: spread
                for name in self.metrics()
                if (spread := paired(self.values[ours].get(name, {}), self.values[theirs].get(name, {})))
            }
            if spreads:
                yield ours, theirs, spreads


def as_json(found: Found) -> dict[str, Any]:
    """Return everything that was found, for programs."""
    return {
        "table": found.table.name,
        "title": found.table.title,
        "rows": {
            row: {"title": found.table.rows[row].title, "figures": metrics}
            for row, metrics in found.values.items()
        },
        "differences": [
            {
                "row": ours,
                "against": theirs,
                "metric": name,
                "mean": spread.mean,
                "half_interval": spread.half if len(spread.values) > 1 else None,
                "each": spread.values,
                "larger_than_spread": spread.is_resolved,
            }
            for ours, theirs, spreads in found.differences()
            for name, spread in spreads.items()
        ],
        "not_run": found.missing(),
    }


def as_markdown(found: Found, *, images: Sequence[str] = ()) -> str:
    """Return a table with its differences in words. `images`: links to its charts."""
    table = found.table
    lines = [f"## {table.title}", "", table.question, ""]
    lines += [f"The twin of {table.twin}.", ""] if table.twin else []
    lines += [*_table_lines(found), ""]
    lines += [f"![{table.title}]({image})\n" for image in images]
    sentences = [f"- {_sentence(table, *difference)}" for difference in found.differences()]
    if sentences:
        lines += ["Seed by seed, mean difference ± half of its 95% interval:", "", *sentences, ""]
    lines += [table.limits, ""] if table.limits else []
    missing = found.missing()
    if missing:
        named = "; ".join(
            table.rows[row].title
            if len(seeds) == found.num_seeds
            else f"{table.rows[row].title} (seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))})"
            for row, seeds in missing.items()
        )
        lines += [f"Not run: {named}.", ""]
    return "\n".join(lines)


def summary(all_found: Sequence[Found]) -> str:
    """Return a table of all differences in the tables' headlines, in bold those of which a claim can be made.

    Tables that compare the same runs say so once.
    """
    names = list(dict.fromkeys(name for found in all_found for name in found.headlines()))
    said: set[tuple[frozenset[str], str]] = set()
    lines = []
    for found in all_found:
        for ours, theirs, spreads in found.differences():
            plans = frozenset(run.plan for row in (ours, theirs) for run in found.runs[row].values())
            new = [name for name in found.headlines() if name in spreads and (plans, name) not in said]
            said |= {(plans, name) for name in new}
            if new:
                titles = [found.table.rows[row].title for row in (ours, theirs)]
                seeds = min(len(spreads[name].values) for name in new)
                cells = [_claim(name, spreads[name]) if name in new else "" for name in names]
                lines.append(f"| {' | '.join([*titles, str(seeds), *cells])} |")
    if not lines:
        return ""
    headings = [METRICS[name].title for name in names]
    return "\n".join(
        [
            f"In bold: larger than its spread over at least {SEEDS_OF_A_CLAIM} seeds. Whatever else exists cannot be "
            "seen at this scale.",
            "",
            f"| {' | '.join(['trained with', 'against', 'seeds', *headings])} |",
            "|---" * (3 + len(names)) + "|",
            *lines,
        ]
    )


def _claim(name: str, spread: Spread) -> str:
    text = _signed(name, spread)
    return f"**{text}**" if spread.is_resolved and len(spread.values) >= SEEDS_OF_A_CLAIM else text


def interval_panels(found: Found, names: Sequence[str]) -> dict[str, dict[str, Spread | None]]:
    """Return for each metric the spread of every row that has any of them, in the units of the tables."""
    rows = {row: of for row, of in found.values.items() if any(of.get(name) for name in names)}
    panels = {}
    for name in names:
        metric = METRICS[name]
        heading = f"{metric.title} ({metric.unit.strip()})" if metric.unit else metric.title
        panels[heading] = {
            found.table.rows[row].title: spread_of([metric.scale * value for value in values])
            if (values := of.get(name, {}).values())
            else None
            for row, of in rows.items()
        }
    return panels


def learning_curves(found: Found) -> dict[str, tuple[str, dict[str, list[tuple[float, float]]]]]:
    """Return the mean top-1 on the val images of each row against steps and against time."""
    by_step, by_time = {}, {}
    for row, runs in found.runs.items():
        curves = [dict(run.curve) for run in runs.values()]
        steps = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
        points = [(float(step), 100 * fmean(curve[step] for curve in curves)) for step in steps]
        title = found.table.rows[row].title
        by_step[title] = points
        seconds = found.values[row].get("step_s", {})
        if seconds:
            step_s = fmean(seconds.values())
            by_time[title] = [(step * step_s, top1) for step, top1 in points]
    panels = {"top-1 on val (%) against steps": ("step", by_step)}
    if by_time:
        panels["against time"] = ("seconds of one core, or of the GPU", by_time)
    return panels


def _table_lines(found: Found) -> Iterator[str]:
    names = found.metrics()
    headings = [
        f"{METRICS[n].title}{f', {METRICS[n].unit.strip()}' if METRICS[n].unit else ''}" for n in names
    ]
    yield f"| trained with | seeds | {' | '.join(headings)} |"
    yield "|---" * (2 + len(names)) + "|"
    for row, metrics in found.values.items():
        shown = [_cell(name, metrics.get(name, {})) for name in names]
        yield f"| {found.table.rows[row].title} | {len(found.runs[row])} | {' | '.join(shown)} |"


def _cell(name: str, values: Mapping[int, float]) -> str:
    if not values:
        return "–"
    metric, spread = METRICS[name], spread_of([*values.values()])
    if len(values) == 1 or spread.half == 0:
        return metric.shown(spread.mean)
    return f"{metric.shown(spread.mean)} ± {metric.shown(spread.half)}"


def _sentence(table: Table, ours: str, theirs: str, spreads: Mapping[str, Spread]) -> str:
    """Say how two rows differ, and in what the difference is larger than its spread."""
    num_seeds = min(len(spread.values) for spread in spreads.values())
    head = f"**{table.rows[ours].title}** against {table.rows[theirs].title}"
    if num_seeds < 2:
        values = ", ".join(
            f"{METRICS[name].title} {_signed(name, spread)}" for name, spread in spreads.items()
        )
        return f"{head} (one seed, no spread): {values}."
    clear, unclear, fixed = [], [], []
    for name, spread in spreads.items():
        text = f"{METRICS[name].title} {_signed(name, spread)}"
        if spread.half == spread.mean == 0:
            continue
        if spread.half == 0:
            fixed.append(f"{METRICS[name].title} {_signed(name, spread, interval=False)}")
        elif spread.is_resolved:
            better = (spread.mean < 0) == METRICS[name].lower
            clear.append(f"{text} ({'better' if better else 'worse'})")
        else:
            unclear.append(text)
    parts = [f"larger than its spread: {', '.join(clear)}"] if clear else []
    parts += [f"smaller: {', '.join(unclear)}"] if unclear else []
    parts += [f"the same for every seed: {', '.join(fixed)}"] if fixed else []
    return f"{head} ({num_seeds} seeds): {'; '.join(parts) or 'no difference'}."


def _signed(name: str, spread: Spread, *, interval: bool = True) -> str:
    metric = METRICS[name]
    mean = f"{metric.scale * spread.mean:+.{metric.digits}f}"
    return f"{mean} ± {metric.shown(spread.half)}" if interval and len(spread.values) > 1 else mean


def found_in(table: Table, num_seeds: int, runs: Mapping[str, Mapping[int, RunRecord]]) -> Found:
    """Return what is there of a table: the records of its finished runs by row and seed."""
    values = {
        row: {
            name: {
                seed: value for seed, run in of_row.items() if (value := run.figures.get(name)) is not None
            }
            for name in table.metrics
        }
        for row, of_row in runs.items()
    }
    return Found(table=table, num_seeds=num_seeds, values=values, runs=runs)
