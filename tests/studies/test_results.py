"""What a comparison says in words follows from its figures."""

import json
from dataclasses import replace

import numpy as np
import pytest

from studies.charts import curve_chart
from studies.records import RunRecord
from studies.results import Found, as_json, as_markdown, interval_chart, learning_curves, spread_of, summary
from studies.tables import Row, Table
from tokenlabel.drawing.page import as_svg

TABLE = Table(
    name="made_up",
    title="Made up",
    question="Which is better?",
    twin="nothing",
    rows={name: Row(title=f"row {name}") for name in "abc"},
    metrics=("top1", "loss"),
    differences=(("a", "b"), ("c", "b")),
    limits="The data are made up.",
)


def found_of(**rows):
    """Rows as lists of (top1, loss) by seed; None for a run that is not there."""
    runs = {
        row: {
            seed: RunRecord(plan=row, name=row, seed=seed, figures={"top1": values[0], "loss": values[1]}, curve=())
            for seed, values in enumerate(rows.get(row, []))
            if values is not None
        }
        for row in TABLE.rows
    }
    return Found(table=TABLE, num_seeds=5, runs=runs)


CLEAR = found_of(
    a=[(0.80 + i / 100, 1.0 + (-1) ** i / 10) for i in range(5)],
    b=[(0.70 + i / 100, 1.0) for i in range(5)],
    c=[(0.70, 1.0), (0.73, 1.1), (0.71, 0.9), None, None],
)


def test_a_difference_that_never_varies_is_said_without_an_interval():
    text = as_markdown(CLEAR)
    assert "**row a** against row b (5 seeds): smaller: val loss" in text
    assert "; the same for every seed: top-1 +10.0." in text


def test_seeds_that_both_rows_have_are_compared():
    difference = next(d for d in as_json(CLEAR)["differences"] if d["row"] == "c" and d["metric"] == "top1")
    assert difference["each"] == pytest.approx((0.0, 0.02, -0.01))
    assert not difference["larger_than_spread"]


def test_less_is_better_for_losses():
    worse = found_of(a=[(0.5, 2.0 + seed / 1e6) for seed in range(5)], b=[(0.5, 1.0)] * 5)
    assert "larger than its spread: val loss +1.000 ± 0.000 (worse)" in as_markdown(worse)


def test_a_run_that_diverged_makes_its_row_no_number_and_no_claim():
    found = found_of(a=[(0.5, float("nan")), (0.5, 1.0)], b=[(0.4, 1.0), (0.4, 2.0)])
    assert "val loss +nan ± inf" in as_markdown(found)
    assert not spread_of([1.0, float("inf"), float("-inf")]).is_resolved


def test_what_is_missing_is_named_by_seed():
    assert "Not run: row c (seeds 3, 4)." in as_markdown(CLEAR)
    assert json.loads(json.dumps(as_json(CLEAR)))["not_run"] == {"c": [3, 4]}
    text = as_markdown(found_of(a=[(0.5, 1.0)]))
    assert "| row b |" not in text
    assert "Not run: row a (seeds 1, 2, 3, 4); row b; row c." in text


def test_a_claim_takes_five_seeds():
    lines = summary([CLEAR]).splitlines()
    assert "| row a | row b | 5 | **+10.0 ± 0.0** |" in lines
    resolved = found_of(a=[(0.8, 1.0)] * 3, b=[(0.7, 1.0)] * 3)
    assert "| row a | row b | 3 | +10.0 ± 0.0 |" in summary([resolved])


def test_the_same_runs_in_two_tables_are_summed_up_once():
    assert summary([CLEAR, CLEAR]) == summary([CLEAR])


def test_one_seed_has_no_spread():
    text = as_markdown(found_of(a=[(0.8, 1.0)], b=[(0.7, 1.0)]))
    assert "(one seed, no spread): top-1 +10.0" in text


def test_nothing_finished_is_a_table_without_figures():
    text = as_markdown(found_of())
    assert "| row a | 0 |" in text
    assert summary([found_of()]) == ""


def test_learning_curves_are_means_over_seeds():
    found = found_of(a=[(0.8, 1.0), (0.8, 1.0)])
    runs = {"a": {seed: replace(run, curve=((10, seed / 100), (20, 0.2))) for seed, run in found.runs["a"].items()}}
    curves = learning_curves(replace(found, runs=runs))
    (_, lines) = curves["top-1 on val (%) against steps"]
    assert lines["row a"] == [(10.0, pytest.approx(0.5)), (20.0, pytest.approx(20.0))]


def names_of_rows(figure):
    return [label.get_text() for label in figure.axes[0].get_yticklabels()]


def test_charts_show_every_row_and_are_the_same_for_the_same_figures():
    figure = interval_chart(CLEAR, ["top1", "loss"])
    assert names_of_rows(figure) == ["row a", "row b", "row c"]
    assert [axis.get_title() for axis in figure.axes] == ["top-1 (%)", "val loss"]
    svg = as_svg(figure)
    assert svg.startswith("<svg")
    assert svg == as_svg(interval_chart(CLEAR, ["top1", "loss"]))
    assert "<svg" in as_svg(curve_chart({"one": ("step", {"a": [(0, 1), (1, 2)], "b": []})}, columns=1))


def test_a_line_of_a_single_point_is_a_dot():
    figure = curve_chart({"one": ("step", {"short": [(2, 1)], "long": [(1, 1), (2, 3)]})})
    assert [line.get_marker() for line in figure.axes[0].lines] == ["o", ""]


def test_a_row_without_a_figure_leaves_its_place_in_the_chart_empty():
    found = found_of(a=[(0.8, None)], b=[(0.7, 1.0)])
    figure = interval_chart(found, ["top1", "loss"])
    assert names_of_rows(figure) == ["row a", "row b"]
    places = [float(y) for line in figure.axes[1].lines for y in np.asarray(line.get_ydata())]
    assert set(places) == {1.0}


def test_charts_show_the_probe_before_what_stands_first_in_the_table():
    names = ["top1", "loss", "ece", "probe_accuracy"]
    table = replace(TABLE, metrics=names)
    record = RunRecord(plan="a", name="a", seed=0, figures=dict.fromkeys(names, 0.5), curve=())
    found = Found(table=table, num_seeds=1, runs={"a": {0: record}, "b": {}, "c": {}})
    assert found.charted() == ["top1", "loss", "probe_accuracy"]
