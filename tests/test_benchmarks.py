import json
from dataclasses import replace

import pytest
import torch

from benchmarks import __main__ as runner
from benchmarks import growth
from benchmarks.measure import Row, Settings, interleave, peak_bytes, ratios

SETTINGS = Settings(torch.device("cpu"), quick=True)


def test_functions_take_turns():
    calls = []
    seconds = interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, SETTINGS, rounds=3)
    assert calls == ["a", "b"] * 4  # the first turn warms up
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def test_rows_report_median_and_half_the_interquartile_range():
    row = Row("x", [1, 2, 3, 4, 100], "ms")
    assert (row.median, row.spread) == (3, 1)
    assert Row("x", [7], "ms").spread == 0
    assert ratios([4, 9], [2, 3]) == [2, 3]


def test_the_peak_is_what_was_held_at_once():
    kept = []

    def run():
        kept.clear()
        for _ in range(3):
            torch.zeros(1 << 20).add_(1)  # 4 MiB, given back each time
        kept.append(torch.zeros(1 << 18))

    assert peak_bytes(run, SETTINGS) == pytest.approx(4 << 20, rel=0.01)


def test_the_command_prints_a_table_and_writes_every_measurement(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(runner.BENCHMARKS, "sums", lambda settings: [Row("sum", [1.0, 3.0], "ms", "at most 5")])
    runner.main(["sums", "--quick", "--json", str(tmp_path / "new/out.json")])
    printed = capsys.readouterr().out
    assert "| torch |" in printed
    assert "| sum | 2 | 0.5 | ms | at most 5 |" in printed
    saved = json.loads((tmp_path / "new/out.json").read_text())
    assert saved["rows"]["sums"][0]["values"] == [1.0, 3.0]
    assert saved["machine"]["device"] == "cpu"
    monkeypatch.setitem(runner.BENCHMARKS, "sums", lambda _: [Row("sum", [3], "ms"), Row("new", [1], "ms")])
    runner.main(["sums", "--compare", str(tmp_path / "new/out.json")])
    printed = capsys.readouterr().out
    assert "| sum | 3 | 0 | ms |  | 2 | 1.50 |" in printed
    assert "| new | 1 | 0 | ms |  | | |" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sumz"], "no benchmark is called sumz"),
        (["--device", "tpu"], "expected cpu, cuda or cuda:N"),
        (["--compare", "nowhere.json"], "nowhere.json: expected a file that --json wrote"),
    ],
)
def test_what_does_not_exist_is_an_error(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        runner.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_growth_is_reported_and_drawn_from_one_end_of_an_axis_to_the_other(tmp_path):
    costs = {}
    for axis, sizes in growth.AXES.items():
        for size in sizes:
            point = replace(growth.Point(), **{axis: size})
            for way in growth.WAYS:
                seconds = [0.5 * size, 1.0 * size, 1.5 * size]
                costs[way, point] = growth.Cost(seconds, peak_bytes=size**2)
    rows = {row.name: row.median for row in growth.rows_of(costs)}
    assert rows["images x 16 (2 to 32): time of targets"] == 16
    assert rows["classes x 100 (100 to 10,000): memory of targets + head + loss"] == 100**2
    growth.draw(costs, tmp_path / "growth.png")
    assert 10_000 < (tmp_path / "growth.png").stat().st_size < 100_000
