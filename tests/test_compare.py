"""`tokenlabel compare`: tables and testbeds of the package, runs that are shared and continue, and what is written."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from tokenlabel.comparison import tables
from tokenlabel.comparison.jobs import _counted_cost as counted_cost
from tokenlabel.comparison.jobs import _environment as environment_of
from tokenlabel.comparison.jobs import _options as options_of
from tokenlabel.comparison.jobs import _settings as settings_of
from tokenlabel.comparison.jobs import finished_runs, jobs_of, main, run_job, steps_needed
from tokenlabel.comparison.measures import Finished, label_truth, predictions
from tokenlabel.comparison.metrics import METRICS
from tokenlabel.comparison.records import RunRecord, read_records, write_records
from tokenlabel.comparison.tables import (
    Comparison,
    Job,
    Step,
    TableError,
    filled,
    plan_row,
    read_table,
    read_testbed,
    recipe_of,
    table_names,
)
from tokenlabel.runtime.process import Interrupted, write_whole
from tokenlabel.training.checkpoint import load_model
from tokenlabel.training.recipe import find_recipe

CPU = torch.device("cpu")

TABLE = """
title: Tiny
question: Does it run?
seeds: 2
metrics: [top1, token_accuracy, probe_accuracy, label_truth, step_s]
rows:
  token: {title: token labels}
  swapped: {title: x and y swapped, defect: swapped}
differences: [[swapped, token]]
"""

TESTBED = """
title: tiny scenes
about: Tiny scenes.
recipe: demo_token_labels
set:
  data.train: "{scenes}/train"
  data.val: "{scenes}/val"
  data.labels: "{labels}"
  data.num_workers: 0
  epochs: 1
  batch_size: 10
  model.options.depth: 1
measure: {masks_train: "{scenes}/masks/train", masks_val: "{scenes}/masks/val"}
steps:
  scenes: {scenes: {num_train: 20, num_val: 10, seed: 0}}
  labels: "annotate {scenes}/train {here} --teacher masks:{scenes}/masks/train --size 12"
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a table, a testbed and, in `out`, its steps and all of its runs, made in this process."""
    folder = tmp_path_factory.mktemp("compare")
    (folder / "tiny.yaml").write_text(TABLE)
    (folder / "bed.yaml").write_text(TESTBED)
    for job in ("tiny:token:0", "tiny:swapped:0", "tiny:token:1"):
        assert main([*words(folder), "--only", job]) == 0
    return folder


def words(folder):
    return [str(folder / "tiny.yaml"), "--on", str(folder / "bed.yaml"), "--out", str(folder / "out")]


def comparison_of(folder):
    return Comparison(
        tables=[read_table(str(folder / "tiny.yaml"))],
        testbed=read_testbed(str(folder / "bed.yaml")),
        out=folder / "out",
    )


def test_a_call_runs_what_is_missing_in_a_process_of_its_own(tiny, capsys):
    """Three of four runs are there; the fourth is a defect, which a recipe cannot name."""
    before = (tiny / "out" / "runs" / "base" / "0" / "measures.json").stat().st_mtime_ns
    (tiny / "results.notes.md").write_text("Swapped labels are worse.\n")
    assert main([*words(tiny), "--results", str(tiny / "results.md")]) == 0
    assert capsys.readouterr().err.count("...") == 1
    assert (tiny / "out" / "runs" / "base" / "0" / "measures.json").stat().st_mtime_ns == before
    found = json.loads((tiny / "out" / "tiny.json").read_text())
    assert not found["not_run"]
    assert [d["metric"] for d in found["differences"]] == METRICS_OF_TINY
    by_metric = {d["metric"]: d for d in found["differences"]}
    assert by_metric["label_truth"]["mean"] < 0  # swapped labels name fewer objects
    page = (tiny / "results.md").read_text()
    assert "x and y swapped" in page
    assert "\n\nSwapped labels are worse.\n\n" in page
    assert "images/results-tiny.svg" in page
    assert (tiny / "images" / "results-tiny.svg").is_file()


METRICS_OF_TINY = ["top1", "token_accuracy", "probe_accuracy", "label_truth", "step_s"]


def test_both_rows_differ_in_the_labels_places_and_in_nothing_else(tiny):
    recipes = [
        yaml.safe_load((tiny / "out" / "runs" / name / "0" / "recipe.yaml").read_text())
        for name in ("base", "defect=swapped")
    ]
    assert recipes[0] == recipes[1]
    metrics = [
        json.loads((tiny / "out" / "runs" / name / "0" / "metrics.jsonl").read_text().splitlines()[0])
        for name in ("base", "defect=swapped")
    ]
    assert metrics[0]["token_loss"] != metrics[1]["token_loss"]


def test_a_study_goes_on_from_its_record_on_another_machine(tiny, tmp_path, capsys):
    """Records stand for runs and their steps: in an empty folder, only what no record has is trained."""
    record = tmp_path / "study.jsonl"
    assert main([*words(tiny), "--record", str(record)]) == 0
    assert len(record.read_text().splitlines()) == 4
    elsewhere = [*words(tiny)[:-1], str(tmp_path / "elsewhere")]
    assert main([*elsewhere, "--record", str(record)]) == 0
    assert "tiny:" not in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "elsewhere").iterdir()) == [
        "tiny-curves.svg", "tiny.json", "tiny.md", "tiny.svg"
    ]  # fmt: skip
    for name in ("tiny.json", "tiny.md", "tiny-curves.svg"):
        assert (tmp_path / "elsewhere" / name).read_text() == (tiny / "out" / name).read_text()


def test_a_record_is_of_a_plan_with_its_steps_and_knows_no_folder(tiny):
    ours = comparison_of(tiny)
    plan = ours.plan(ours.tables[0], "token")
    assert replace(ours, out=Path("elsewhere")).digest(plan) == ours.digest(plan)
    steps = {
        **ours.testbed.steps,
        "labels": Step(command="annotate {scenes}/train {here} --teacher resnet18"),
    }
    assert replace(ours, testbed=replace(ours.testbed, steps=steps)).digest(plan) != ours.digest(plan)
    assert ours.digest(ours.plan(ours.tables[0], "swapped")) != ours.digest(plan)


def test_records_are_written_as_they_were_read_and_a_broken_line_is_named(tmp_path):
    record = RunRecord(
        plan="ab12", name="base", seed=3, figures={"top1": 0.5, "label_bytes": None}, curve=((15, 0.25),)
    )
    path = tmp_path / "kept" / "study.jsonl"
    assert read_records(path) == {}
    write_records(path, {("ab12", 3): record})
    assert read_records(path) == {("ab12", 3): record}
    path.write_text(path.read_text() + '{"plan": "ab12"}\n')
    with pytest.raises(TableError, match=r"study\.jsonl, line 2: .*'name'"):
        read_records(path)


def test_a_run_is_measured_by_what_all_of_its_tables_ask():
    both = Comparison(
        tables=[read_table("architecture"), read_table("defects")],
        testbed=read_testbed("embedded"),
        out=Path("out"),
    )
    plan = both.plan(both.tables[0], "lvvit")
    assert plan == both.plan(both.tables[1], "aligned")
    assert both.metrics(plan) == list(dict.fromkeys([*both.tables[0].metrics, *both.tables[1].metrics]))
    assert both.metrics(both.plan(both.tables[0], "linear")) == both.tables[0].metrics


def test_what_has_not_run_is_named(tiny):
    assert main([*words(tiny), "--seeds", "3", "--collect"]) == 0
    assert "Not run: token labels (seed 2); x and y swapped (seed" in (tiny / "out" / "tiny.md").read_text()
    assert len(jobs_of(replace(comparison_of(tiny), seeds=3))) == 6


def test_a_run_of_something_else_is_not_taken(tiny):
    ours = comparison_of(tiny)
    other = replace(ours, testbed=replace(ours.testbed, set={**ours.testbed.set, "epochs": 3}))
    with pytest.raises(ValueError, match="was made by another table, testbed or recipe"):
        run_job(other, Job(other.tables[0], "token", 0), device=CPU)


def test_a_run_by_an_edited_recipe_is_not_taken(tiny, tmp_path):
    """A recipe of one's own has the same name before and after; what it says decides."""
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(find_recipe("demo_token_labels").read_text())
    ours = comparison_of(tiny)
    ours = replace(ours, testbed=replace(ours.testbed, recipe=str(recipe)))
    plan, folder = ours.plan(ours.tables[0], "token"), tmp_path / "run"
    write_whole(folder / "plan.json", ours.described(plan))
    assert ours.is_of(plan, folder)
    recipe.write_text(recipe.read_text().replace("lr: 2.0e-3", "lr: 3.0e-3"))
    assert not ours.is_of(plan, folder)


def test_what_was_kept_stands_where_the_folder_holds_the_same_run(tiny):
    ours = comparison_of(tiny)
    found = finished_runs(ours, {})
    key, record = next(iter(found.items()))
    kept = replace(record, figures={**record.figures, "top1": 0.123, "label_bytes": 5.0})
    assert finished_runs(ours, {key: kept})[key] == kept
    poorer = replace(kept, figures={"top1": 0.123})
    assert finished_runs(ours, {key: poorer})[key] == record


def test_settings_for_all_rows_come_after_those_of_a_preset(tiny):
    """A preset may set all of `model.options`; --set may be given more than once."""
    given = ["--set", "model.options.depth=2", "epochs=1", "--set", "batch_size=7"]
    ours = Comparison(
        tables=[read_table("models")],
        testbed=read_testbed("embedded"),
        out=Path("out"),
        overrides=settings_of(options_of(["models", "--out", "x", *given]).set),
    )
    recipe = recipe_of(ours.plan(ours.tables[0], "t2t"), 0, {"data": "d", **ours.folders})
    assert (recipe.model.options["depth"], recipe.model.options["width"]) == (2, 64)
    assert (recipe.epochs, recipe.batch_size) == (1, 7)


def test_a_job_on_its_own_writes_no_results(tiny):
    with pytest.raises(ValueError, match="leave --record, --results and --collect out"):
        main([*words(tiny), "--only", "tiny:token:0", "--collect"])
    with pytest.raises(TableError, match="--seeds 0"):
        main([*words(tiny), "--seeds", "0"])


def test_an_attempt_that_failed_costs_nothing(tmp_path):
    with pytest.raises(OSError, match="full"), counted_cost(tmp_path):
        raise OSError("disk full")
    with pytest.raises(Interrupted), counted_cost(tmp_path):
        raise Interrupted(3, 15)
    (line,) = (tmp_path / "cost.jsonl").read_text().splitlines()
    assert json.loads(line)["num_steps"] == 0


def test_a_process_gets_one_of_the_gpus_that_this_one_may_use(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert environment_of(1)["CUDA_VISIBLE_DEVICES"] == "1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    assert environment_of(1)["CUDA_VISIBLE_DEVICES"] == "5"


def test_labels_are_held_against_the_masks_of_other_crops_for_each_seed(tiny):
    """And tokens have nothing to get right in a run that never trained their head."""
    figures = [
        json.loads((tiny / "out" / "runs" / "base" / seed / "measures.json").read_text()) for seed in "01"
    ]
    assert 0.9 < figures[0]["label_truth"] <= 1
    ours = comparison_of(tiny)
    trained = load_model(tiny / "out" / "runs" / "base" / "0")
    without = replace(trained.recipe, loss=replace(trained.recipe.loss, beta=0.0))
    finished = Finished(
        run=tiny / "out" / "runs" / "base" / "0",
        trained=replace(trained, recipe=without),
        folders=ours.measure_folders(),
        defect=None,
        device=CPU,
    )
    assert "token_accuracy" not in predictions(finished)
    assert "token_accuracy" in predictions(replace(finished, trained=trained))
    assert label_truth(finished) == {}


def test_a_step_by_another_command_is_not_taken(tiny):
    ours = comparison_of(tiny)
    steps = {**ours.testbed.steps, "labels": replace(ours.testbed.steps["labels"], command="x")}
    other = replace(ours, testbed=replace(ours.testbed, steps=steps))
    with pytest.raises(ValueError, match="made by another command"):
        finished_runs(other, {})


def test_a_run_that_fails_is_named_and_the_others_go_on(tiny, tmp_path, capsys):
    text = TABLE.replace("defect: swapped", "set: {model.options.depht: 2}").replace("seeds: 2", "seeds: 1")
    (tmp_path / "tiny.yaml").write_text(text)
    arguments = [str(tmp_path / "tiny.yaml"), *words(tiny)[1:]]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert "tiny:swapped:0: exit status 2" in error
    assert "depht" in error


@pytest.mark.parametrize("testbed_name", tables.testbed_names())
def test_every_row_of_the_package_is_a_recipe_on_every_testbed(testbed_name):
    """Each run once; ImageNet has no masks, and labels in one encoding."""
    testbed = read_testbed(testbed_name)
    folders = {name: f"out/{name}" for name in (*testbed.steps, "data")}
    plans = {}
    for table in map(read_table, table_names()):
        assert set(table.metrics) <= METRICS.keys()
        for name, row in table.rows.items():
            if testbed_name == "embedded" or not {"truth_labels", "raw_labels"} & {*row.use}:
                plan = plan_row(table, name, testbed, {})
                plans[plan.name] = plan
    for plan in plans.values():
        assert find_recipe(plan.recipe).is_file()
        for key, text in plan.settings.items():
            assert "{" not in str(filled(text, folders)) or key == "model.options"
    chosen = list(plans.values())[::4]
    for plan in chosen:  # each takes a while to parse
        assert recipe_of(plan, 3, folders).seed == 3


def test_rows_that_are_the_same_run_once():
    """MixToken with token labels is a row of `mixing`, `defects`, `labels` and `distillation`."""
    tables = [read_table(name) for name in ("mixing", "defects", "labels", "distillation")]
    four = Comparison(tables=tables, testbed=read_testbed("embedded"), out=Path("out"), seeds=1)
    rows = [(0, "token_mixtoken"), (1, "aligned"), (2, "token"), (3, "token")]
    assert {four.plan(tables[i], row).name for i, row in rows} == {"base"}
    assert len(jobs_of(four)) < sum(len(table.rows) for table in tables)
    assert [job.seed for job in jobs_of(four, shared=False)] == [0] * sum(len(t.rows) for t in tables)


def test_steps_are_made_in_the_order_of_their_needs():
    table, testbed = read_table("labels"), read_testbed("embedded")
    ours = Comparison(tables=[table], testbed=testbed, out=Path("out"))
    steps = steps_needed(ours, [Job(table, "own", 0)])
    assert steps.index("scenes") < steps.index("teacher") < steps.index("labels") < steps.index("student")
    assert steps[-1] == "labels_own"
    assert "labels_coarse" not in steps


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("rows:", "rwos:"), "unknown key 'rwos'; did you mean rows"),
        (("defect: swapped", "defect: swaped"), "no defect 'swaped'; known: swapped"),
        (("[swapped, token]", "[swapped, tokne]"), "name a row 'tokne'"),
        (("title: Tiny\n", ""), "title"),
        (("[top1, token_accuracy", "[top1, tokens"), r"no metric \['tokens'\]; known: top1"),
        (
            ("metrics: [top1, token_accuracy, probe_accuracy, label_truth, step_s]", "metrics: []"),
            "no metric at all",
        ),
        (("[[swapped, token]]", "[[swapped]]"), r"expected pairs of rows.*\['swapped'\]"),
        (("token: {title: token labels}", "token:"), "rows.token: expected a mapping"),
    ],
)
def test_mistakes_in_a_table_are_named(change, message, tmp_path):
    (tmp_path / "t.yaml").write_text(TABLE.replace(*change))
    with pytest.raises(TableError, match=message):
        read_table(str(tmp_path / "t.yaml"))


def test_unknown_names_have_their_neighbours():
    with pytest.raises(TableError, match="did you mean mixing"):
        read_table("mixin")
    table = replace(read_table("mixing"), use=["no_such"])
    with pytest.raises(TableError, match="testbed embedded has no preset 'no_such'"):
        plan_row(table, "class_none", read_testbed("embedded"), {})
    with pytest.raises(TableError, match="name their folder with --data"):
        Comparison(tables=[table], testbed=read_testbed("imagenet"), out=Path("out"))
