"""The files that a comparison leaves: a page, figures and charts of each table, and one page of all.

Runs that an earlier version of a table or testbed left in the same folder do not count. What people have to say of
the figures stands beside the page of all (results.md: results.notes.md) and becomes its introduction.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenlabel.comparison.records import Records
from tokenlabel.comparison.results import (
    Found,
    as_json,
    as_markdown,
    found_in,
    interval_panels,
    learning_curves,
    summary,
)
from tokenlabel.comparison.tables import Comparison, Table
from tokenlabel.runtime.arguments import write_json

_METHOD = """\
The command continues where it was stopped, and this page is what it writes. Every row is trained with several seeds;
a seed gives all rows the same initial weights, order of images, crops and mixes wherever they can be the same.
Figures are means over seeds ± half of a 95% interval (Student's t). A difference is taken seed by seed, and is called
larger than its spread where its interval leaves out 0; of twenty that do not exist, one looks so by chance. Time a step
is that of the core or GPU that a run had, where and when it ran: rows that were trained on different machines do not
compare in it."""


def write_results(comparison: Comparison, records: Records, *, page: Path | None, command: str) -> None:
    """Write OUT/TABLE.md, .json and .svg of each table from the records of finished runs, and the page of all.

    `command`: what makes the page, as it says itself.
    """
    comparison.out.mkdir(parents=True, exist_ok=True)
    everything = [_found(comparison, table, records) for table in comparison.tables]
    sections = []
    for found in everything:
        name = found.table.name
        write_json(comparison.out / f"{name}.json", as_json(found))
        charts = _charts(found)
        for suffix, svg in charts.items():
            (comparison.out / f"{name}{suffix}.svg").write_text(svg, encoding="utf-8")
        text = as_markdown(found, images=[f"{name}{suffix}.svg" for suffix in charts])
        (comparison.out / f"{name}.md").write_text(text, encoding="utf-8")
        print(text)
        if page is not None and any(found.runs.values()):
            (page.parent / "images").mkdir(parents=True, exist_ok=True)
            for suffix, svg in charts.items():
                (page.parent / "images" / f"results-{name}{suffix}.svg").write_text(svg, encoding="utf-8")
            links = [f"images/results-{name}{suffix}.svg" for suffix in charts]
            sections.append(as_markdown(found, images=links))
    if page is not None:
        head = _page_head(comparison, everything, command, notes=page.with_suffix(".notes.md"))
        page.write_text("\n".join([head, *sections]), encoding="utf-8")


def _found(comparison: Comparison, table: Table, records: Records) -> Found:
    seeds = range(comparison.num_seeds(table))
    plans = {row: comparison.digest(comparison.plan(table, row)) for row in table.rows}
    runs = {
        row: {seed: records[plan, seed] for seed in seeds if (plan, seed) in records}
        for row, plan in plans.items()
    }
    return found_in(table, len(seeds), runs)


def _charts(found: Found) -> dict[str, str]:
    """Return charts as SVG by what follows the table's name in the name of their file."""
    panels = interval_panels(found, found.charted())
    if not panels:
        return {}
    from tokenlabel.comparison.intervals import interval_chart
    from tokenlabel.drawing.charts import as_svg, curve_chart

    return {
        "": as_svg(interval_chart(panels)),
        "-curves": as_svg(curve_chart(learning_curves(found), columns=2)),
    }


def _page_head(comparison: Comparison, everything: Sequence[Found], command: str, *, notes: Path) -> str:
    unstarted = [found.table.title for found in everything if not any(found.runs.values())]
    lines = ["# Results", "", comparison.testbed.about.strip(), "", f"    {command}", "", _METHOD, ""]
    lines += [notes.read_text(encoding="utf-8").strip(), ""] if notes.is_file() else []
    lines += ["## Every difference in short", "", summary(everything), ""]
    lines += [f"Tables of which nothing was run: {', '.join(unstarted)}.", ""] if unstarted else []
    return "\n".join(lines)
