"""What a study found: a page, figures and charts of each table, and one page of all.

Differences between rows are taken seed by seed, and are claimed only where they are larger than their spread. Runs that
an earlier version of a table or testbed left in the same folder do not count. The page of all has a part for each
testbed; a study writes its own and leaves the others. What people have to say of the figures stands beside the page
(results.md: results.TESTBED.md) and introduces the part.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from matplotlib.figure import Figure
from scipy.special import stdtrit

from studies.charts import curve_chart
from studies.measures import METRICS
from studies.records import Records, RunRecord
from studies.tables import Study, StudyError, Table
from tokenlabel.drawing.page import as_svg
from tokenlabel.runtime.process import write_whole

# A claim needs so many seeds.
SEEDS_OF_A_CLAIM = 5
# Panels of a table's chart.
NUM_CHARTED = 3
# What is summed up beside the first metric of a table.
_ALSO_IN_SHORT = ("probe_accuracy",)

_METHOD = """\
Each part is what its command writes, which continues where it was stopped. Every row is trained with several seeds; a
seed gives all rows the same initial weights, order of images, crops and mixes wherever they can be the same.
Figures are means over seeds ± half of a 95% interval (Student's t). A difference is taken seed by seed, and is called
larger than its spread where its interval leaves out 0; of twenty that do not exist, one looks so by chance. Time a step
is that of the core or GPU that a run had, where and when it ran: rows that were trained on different machines do not
compare in it."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Mean of some values and half of its 95% interval; infinite for a single value."""

    values: tuple[float, ...]
    mean: float
    half: float

    @property
    def is_resolved(self) -> bool:
        """Whether the interval leaves out 0: the mean is larger than its spread."""
        return abs(self.mean) > self.half


def spread_of(values: Sequence[float]) -> Spread:
    """Return the mean of values and the half width of its 95% interval by Student's t; NaN ± infinity if one of them
    is not finite.
    """
    half = math.inf
    if not all(map(math.isfinite, values)):
        return Spread(values=tuple(values), mean=math.nan, half=half)
    if len(values) > 1:
        # To three digits, as printed tables have it.
        half = round(float(stdtrit(len(values) - 1, 0.975)), 3) * stdev(values) / math.sqrt(len(values))
    return Spread(values=tuple(values), mean=fmean(values), half=half)


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Spread | None:
    """Return the spread of ours - theirs over the seeds (the keys) that both have; None if there are none.

    A seed gives both rows the same initial weights, order of images, crops and mixes wherever they can be the
    same, so differences vary less than the values.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    return spread_of([ours[seed] - theirs[seed] for seed in seeds]) if seeds else None


@dataclass(frozen=True, kw_only=True)
class Found:
    """A table and the records of its finished runs by row and seed."""

    table: Table
    num_seeds: int
    runs: Mapping[str, Mapping[int, RunRecord]]

    def values(self, row: str, metric: str) -> dict[int, float]:
        """Return a figure of a row's runs by seed, of those that have it."""
        figures = {seed: run.figures.get(metric) for seed, run in self.runs[row].items()}
        return {seed: value for seed, value in figures.items() if value is not None}

    def missing(self) -> dict[str, list[int]]:
        """Return the seeds of each row that are not there."""
        seeds = range(self.num_seeds)
        lacking = {row: [seed for seed in seeds if seed not in runs] for row, runs in self.runs.items()}
        return {row: seeds for row, seeds in lacking.items() if seeds}

    def metrics(self) -> list[str]:
        """Return the metrics that any run has, in the table's order."""
        return [name for name in self.table.metrics if any(self.values(row, name) for row in self.runs)]

    def headlines(self) -> list[str]:
        """Return the metrics that a summary names: the table's first, and the probe of what the tokens know."""
        return [name for name in self.metrics() if name in (self.table.metrics[0], *_ALSO_IN_SHORT)]

    def charted(self) -> list[str]:
        """Return the metrics of the chart, in the table's order: the headlines, then others."""
        first = dict.fromkeys([*self.headlines(), *self.metrics()])
        return [name for name in self.metrics() if name in [*first][:NUM_CHARTED]]

    def differences(self) -> Iterator[tuple[str, str, dict[str, Spread]]]:
        """Yield pairs of rows and, for each metric of both, the spread of first minus second."""
        for ours, theirs in self.table.differences:
            pairs = {name: paired(self.values(ours, name), self.values(theirs, name)) for name in self.metrics()}
            spreads = {name: spread for name, spread in pairs.items() if spread}
            if spreads:
                yield ours, theirs, spreads


def found_in(study: Study, table: Table, records: Records) -> Found:
    """Return what is there of a table."""
    seeds = range(study.num_seeds(table))
    runs = {
        row: {seed: records[plan.digest, seed] for seed in seeds if (plan.digest, seed) in records}
        for row, plan in study.plans[table.name].items()
    }
    return Found(table=table, num_seeds=len(seeds), runs=runs)


def write_results(study: Study, records: Records, *, page: Path | None, command: str) -> None:
    """Write OUT/TABLE.md, .json and .svg of each table from the records of finished runs, and the page of all.

    `command`: what makes the page, as it says itself.
    """
    everything = [found_in(study, table, records) for table in study.tables]
    started = [found for found in everything if any(found.runs.values())]
    for found in everything:
        name = found.table.name
        write_whole(study.out / f"{name}.json", json.dumps(as_json(found), indent=1) + "\n")
        text = as_markdown(found, images=_write_charts(found, study.out, name))
        write_whole(study.out / f"{name}.md", text)
        print(text)
    if page is None:
        return
    notes = page.with_suffix(f".{study.testbed.name}.md")
    lines = [f"## {study.testbed.title or study.testbed.name}", "", study.testbed.about.strip(), ""]
    lines += [f"    {command}", ""]
    lines += [notes.read_text(encoding="utf-8").strip(), ""] if notes.is_file() else []
    lines += ["### Every difference in short", "", summary(everything), ""]
    unstarted = [found.table.title for found in everything if found not in started]
    lines += [f"Tables of which nothing was run: {', '.join(unstarted)}.", ""] if unstarted else []
    for found in started:
        images = _write_charts(found, page.parent / "images", f"results-{found.table.name}")
        lines.append(as_markdown(found, images=[f"images/{image}" for image in images], heading="###"))
    parts = parts_of(page)
    # A new part comes first: what a reader should see first is what was studied last.
    parts = ({} if study.testbed.name in parts else {study.testbed.name: ""}) | parts
    parts[study.testbed.name] = "\n".join(lines)
    texts = [f"<!-- part: {name} -->\n\n{part.strip()}\n" for name, part in parts.items()]
    write_whole(page, "\n".join(["# Results", "", _METHOD, "", *texts]))


def parts_of(page: Path) -> dict[str, str]:
    """Return the parts of a page by their testbeds, in its order; none if there is no such file.

    Raises StudyError for a file of something else, which would be lost.
    """
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    _, *found = re.split(r"^<!-- part: (\w+) -->$", text, flags=re.MULTILINE)
    if text and not found:
        raise StudyError(f"{page}: no page of results, and would be overwritten; choose another --results or remove it")
    return dict(zip(found[::2], found[1::2], strict=True))


def _write_charts(found: Found, folder: Path, name: str) -> list[str]:
    """Write a table's charts, if there is anything to draw; return the names of their files."""
    if not found.metrics():
        return []
    intervals, curves = interval_chart(found, found.charted()), curve_chart(learning_curves(found), columns=2)
    write_whole(folder / f"{name}.svg", as_svg(intervals))
    write_whole(folder / f"{name}-curves.svg", as_svg(curves))
    return [f"{name}.svg", f"{name}-curves.svg"]


def as_json(found: Found) -> dict[str, Any]:
    """Return everything that was found, for programs."""

    def difference(ours: str, theirs: str, metric: str, spread: Spread) -> dict[str, Any]:
        half = spread.half if len(spread.values) > 1 else None
        names = {"row": ours, "against": theirs, "metric": metric}
        figures = {"mean": spread.mean, "half_interval": half, "each": spread.values}
        return names | figures | {"larger_than_spread": spread.is_resolved}

    table = found.table
    rows = {
        row: {"title": of.title, "figures": {name: found.values(row, name) for name in table.metrics}}
        for row, of in table.rows.items()
    }
    differences = [
        difference(ours, theirs, name, spread)
        for ours, theirs, spreads in found.differences()
        for name, spread in spreads.items()
    ]
    return {
        "table": table.name,
        "title": table.title,
        "rows": rows,
        "differences": differences,
        "not_run": found.missing(),
    }


def as_markdown(found: Found, *, images: Sequence[str] = (), heading: str = "##") -> str:
    """Return a table with its differences in words. `images`: links to its charts."""
    table, missing = found.table, found.missing()
    lines = [f"{heading} {table.title}", "", table.question, ""]
    lines += [f"The twin of {table.twin}.", ""] if table.twin else []
    lines += [*_table_lines(found), ""]
    lines += [f"![{table.title}]({image})\n" for image in images]
    sentences = [f"- {_sentence(table, *difference)}" for difference in found.differences()]
    if sentences:
        lines += ["Seed by seed, mean difference ± half of its 95% interval:", "", *sentences, ""]
    lines += [table.limits, ""] if table.limits else []
    if missing:
        named = [
            table.rows[row].title
            if len(seeds) == found.num_seeds
            else f"{table.rows[row].title} (seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))})"
            for row, seeds in missing.items()
        ]
        lines += [f"Not run: {'; '.join(named)}.", ""]
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
                lines.append(_cells([*titles, str(seeds), *cells]))
    if not lines:
        return ""
    heading = _cells(["trained with", "against", "seeds", *(METRICS[name].title for name in names)])
    said_of_bold = (
        f"In bold: larger than its spread over at least {SEEDS_OF_A_CLAIM} seeds. Whatever else exists cannot be "
        "seen at this scale."
    )
    return "\n".join([said_of_bold, "", heading, "|---" * (3 + len(names)) + "|", *lines])


def _claim(name: str, spread: Spread) -> str:
    text = _signed(name, spread)
    return f"**{text}**" if spread.is_resolved and len(spread.values) >= SEEDS_OF_A_CLAIM else text


def _table_lines(found: Found) -> Iterator[str]:
    names = found.metrics()
    units = [f", {METRICS[name].unit.strip()}" if METRICS[name].unit else "" for name in names]
    headings = [METRICS[name].title + unit for name, unit in zip(names, units, strict=True)]
    yield _cells(["trained with", "seeds", *headings])
    yield "|---" * (2 + len(names)) + "|"
    for row, runs in found.runs.items():
        if not runs and names:  # a row of dashes says less than "Not run" below the table
            continue
        shown = [_cell(name, [*found.values(row, name).values()]) for name in names]
        yield _cells([found.table.rows[row].title, str(len(runs)), *shown])


def _cells(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(name: str, values: Sequence[float]) -> str:
    if not values:
        return "–"
    metric, spread = METRICS[name], spread_of(values)
    if len(values) == 1 or spread.half == 0:
        return metric.shown(spread.mean)
    return f"{metric.shown(spread.mean)} ± {metric.shown(spread.half)}"


def _sentence(table: Table, ours: str, theirs: str, spreads: Mapping[str, Spread]) -> str:
    """Say how two rows differ, and in what the difference is larger than its spread."""
    num_seeds = min(len(spread.values) for spread in spreads.values())
    head = f"**{table.rows[ours].title}** against {table.rows[theirs].title}"
    texts = {name: f"{METRICS[name].title} {_signed(name, spread)}" for name, spread in spreads.items()}
    if num_seeds < 2:
        return f"{head} (one seed, no spread): {', '.join(texts.values())}."
    groups: dict[str, list[str]] = {"larger than its spread": [], "smaller": [], "the same for every seed": []}
    for name, spread in spreads.items():
        if spread.half == 0:
            groups["the same for every seed"] += [texts[name].partition(" ±")[0]] if spread.mean else []
        elif spread.is_resolved:
            better = (spread.mean < 0) == METRICS[name].lower
            groups["larger than its spread"].append(f"{texts[name]} ({'better' if better else 'worse'})")
        else:
            groups["smaller"].append(texts[name])
    parts = [f"{what}: {', '.join(of_group)}" for what, of_group in groups.items() if of_group]
    return f"{head} ({num_seeds} seeds): {'; '.join(parts) or 'no difference'}."


def _signed(name: str, spread: Spread) -> str:
    mean = METRICS[name].shown(spread.mean, sign="+")
    return f"{mean} ± {METRICS[name].shown(spread.half)}" if len(spread.values) > 1 else mean


def interval_chart(found: Found, names: Sequence[str]) -> Figure:
    """Return one panel a metric: a point for each row's mean, a line for its 95% interval, a dot for each seed.

    Rows that have none of the metrics are left out.
    """
    rows = [row for row in found.runs if any(found.values(row, name) for name in names)]
    figure = Figure(figsize=(3.0 + 2.7 * len(names), 0.9 + 0.32 * len(rows)), layout="constrained")
    axes = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axis, metric, name in zip(axes, [METRICS[name] for name in names], names, strict=True):
        for place, row in enumerate(rows):
            values = [metric.scale * value for value in found.values(row, name).values()]
            if not values:
                continue
            spread = spread_of(values)
            axis.plot(values, [place] * len(values), ".", color="#b3bccd", markersize=4)
            if len(values) > 1:
                ends = [spread.mean - spread.half, spread.mean + spread.half]
                axis.plot(ends, [place] * 2, color="#3457a6")
            axis.plot([spread.mean], [place], "o", color="#3457a6", markersize=4.5)
        axis.set_title(f"{metric.title} ({metric.unit.strip()})" if metric.unit else metric.title, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(rows)), [found.table.rows[row].title for row in rows])
    axes[0].set_ylim(len(rows) - 0.5, -0.5)
    return figure


def learning_curves(found: Found) -> dict[str, tuple[str, dict[str, list[tuple[float, float]]]]]:
    """Return the mean figure of the val images of each row against steps and against time."""
    by_step, by_time = {}, {}
    for row, runs in found.runs.items():
        curves = [dict(run.curve) for run in runs.values()]
        steps = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
        points = [(float(step), 100 * fmean(curve[step] for curve in curves)) for step in steps]
        title = found.table.rows[row].title
        by_step[title] = points
        if seconds := found.values(row, "step_s").values():
            by_time[title] = [(step * fmean(seconds), value) for step, value in points]
    figure = METRICS["miou" if "miou" in found.table.metrics else "top1"].title
    panels = {f"{figure} on val (%) against steps": ("step", by_step)}
    if by_time and "step_s" in found.table.metrics:
        panels["against time"] = ("seconds of one core, or of the GPU", by_time)
    return panels
