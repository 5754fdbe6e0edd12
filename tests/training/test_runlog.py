import json
import time

import pytest

from tokenlabel.runtime.runlog import METRICS_FILE, RunLog, Stopwatch, read_metrics


def write_steps(run, steps, start_step=0):
    log = RunLog(run, start_step=start_step, num_steps=10, title="test")
    for step in steps:
        log.write(step, kind="train", loss=1 / step)
    log.close()


def test_a_continued_run_reads_like_an_unbroken_one(tmp_path):
    write_steps(tmp_path, range(1, 8))
    write_steps(tmp_path, range(5, 11), start_step=4)
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 11))


def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path):
    write_steps(tmp_path, [1, 2])
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 3, "lo')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
    write_steps(tmp_path, [3], start_step=2)
    lines = (tmp_path / METRICS_FILE).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


@pytest.mark.parametrize("left", ["\0" * 9, "\n", '{"step": 3, "ki\n{"st', '{"step": 3}\n', "3\n"])
def test_what_a_power_cut_leaves_is_dropped(tmp_path, left):
    write_steps(tmp_path, [1, 2])
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write(left)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]


def test_a_run_that_begins_anew_keeps_the_figures_from_before(tmp_path, capsys):
    write_steps(tmp_path, [1, 2])
    write_steps(tmp_path, [1])  # nothing was evaluated: a run that failed at once
    assert not (tmp_path / "metrics.earlier.jsonl").exists()
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 10, "kind": "eval", "top1": 0.5}\n')
    write_steps(tmp_path, [1])
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]
    assert '"top1": 0.5' in (tmp_path / "metrics.earlier.jsonl").read_text()
    assert "metrics.earlier.jsonl has the figures from before" in capsys.readouterr().err


def test_no_metrics_yet(tmp_path):
    assert read_metrics(tmp_path) == []


def test_the_parts_of_a_lap_fit_into_it():
    watch = Stopwatch()
    for _ in range(2):
        with watch.part("data"):
            time.sleep(0.01)
    first, second = watch.lap(), watch.lap()
    assert 0.02 <= first["data"] <= first["total"]
    assert "data" not in second
