"""`python -m studies`: its tables and testbeds, runs that are shared and continue, and what is written."""

import io
import json
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from studies.__main__ import main, parsed, study_of
from studies.measures import FinishedRun, label_truth, predictions
from studies.records import RunRecord, read_records, write_records
from studies.runs import counted_cost, environment_of_one, finished_runs, run_job, write_list
from studies.tables import Step, Study, StudyError, filled, names_in, read_table, read_testbed
from tokenlabel.cli import main as tokenlabel
from tokenlabel.data.images import has_classes
from tokenlabel.data.scenes import write_scenes
from tokenlabel.data.sources import open_images
from tokenlabel.runtime.process import Interrupted
from tokenlabel.training.checkpoint import load_run
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


def run_here(command, *, stdout, **_):
    """Run the command of a step in this process, in place of `subprocess.run`: torch loads slowly."""
    python, dash_m, program, *arguments = map(str, command)
    assert (python, dash_m, program) == (sys.executable, "-m", "tokenlabel")
    with io.TextIOWrapper(stdout, write_through=True) as log, redirect_stdout(log), redirect_stderr(log):
        return subprocess.CompletedProcess(command, tokenlabel(arguments))


@pytest.fixture
def steps_here(monkeypatch):
    monkeypatch.setattr("studies.runs.subprocess.run", run_here)


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


def study_in(folder):
    return Study(
        tables=[read_table(str(folder / "tiny.yaml"))],
        testbed=read_testbed(str(folder / "bed.yaml")),
        out=folder / "out",
    )


def test_a_call_runs_what_is_missing_in_a_process_of_its_own(tiny, capsys):
    """Three of four runs are there; the fourth is a defect, which a recipe cannot name."""
    before = (tiny / "out" / "runs" / "base" / "0" / "measures.json").stat().st_mtime_ns
    (tiny / "results.bed.md").write_text("Swapped labels are worse.\n")
    (tiny / "results.md").write_text("# Results\n\n<!-- part: other -->\n\n## Of another testbed\n")
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
    assert page.endswith("\n\n<!-- part: other -->\n\n## Of another testbed\n")
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
    capsys.readouterr()
    elsewhere = [*words(tiny)[:-1], str(tmp_path / "elsewhere")]
    assert main([*elsewhere, "--record", str(record)]) == 0
    assert "tiny:" not in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "elsewhere").iterdir()) == [
        "tiny-curves.svg", "tiny.json", "tiny.md", "tiny.svg"
    ]  # fmt: skip
    for name in ("tiny.json", "tiny.md", "tiny-curves.svg"):
        assert (tmp_path / "elsewhere" / name).read_text() == (tiny / "out" / name).read_text()


def test_a_record_is_of_a_plan_with_its_steps_and_knows_no_folder(tiny):
    ours = study_in(tiny)
    plan = ours.plans["tiny"]["token"]
    assert replace(ours, out=Path("elsewhere")).plans["tiny"]["token"].digest == plan.digest
    steps = {**ours.testbed.steps, "labels": Step(command="annotate {scenes}/train {here} --teacher resnet18")}
    other = replace(ours, testbed=replace(ours.testbed, steps=steps))
    assert other.plans["tiny"]["token"].digest != plan.digest
    assert ours.plans["tiny"]["swapped"].digest != plan.digest


def test_records_in_the_repository_are_of_the_plans_of_today():
    """A change of a recipe, a table or a testbed that trains a published run anew is seen here."""
    docs = Path(__file__).parents[2] / "docs"
    for words, name in (
        (["all"], "results"),
        (["segmentation"], "segmentation"),
        (["worth", "finetune", "choices", "--data", "d"], "photographs"),
        (["words", "partial", "pretrained"], "unlabelled"),
        (["tolerance"], "tolerance"),
        (["soft_masks"], "soft_masks"),
        (["token_head"], "token_head"),
        (["streets", "--data", "d"], "streets"),
    ):
        study = study_of(parsed([*words, "--out", "out"]))
        known = {(job.plan.digest, job.plan.name, job.seed) for job in study.jobs()}
        kept = {(r.plan, r.name, r.seed) for r in read_records(docs / f"{name}.jsonl").values()}
        assert (
            len(kept & known)
            >= {
                "results": 150,
                "segmentation": 45,
                "photographs": 100,
                "unlabelled": 95,
                "tolerance": 20,
                "soft_masks": 35,
                "token_head": 20,
                "streets": 9,
            }[name]
        )


def test_the_page_of_results_is_made_again_to_the_last_byte(tmp_path, monkeypatch):
    """Each part by the command that stands in it, in any order."""
    docs = Path(__file__).parents[2] / "docs"
    shutil.copytree(docs, tmp_path / "docs", ignore=shutil.ignore_patterns("results.md"))
    monkeypatch.chdir(tmp_path)
    page = (docs / "results.md").read_text()
    commands = [line for line in page.splitlines() if line.startswith("    python -m studies ")]
    for command in reversed(commands):
        assert main([*command.split()[3:], "--collect"]) == 0
    assert Path("docs/results.md").read_text() == page


def test_a_file_that_is_no_page_of_results_is_kept(tiny):
    readme = tiny / "README.md"
    readme.write_text("# Mine\n")
    with pytest.raises(StudyError, match=r"README\.md: no page of results"):
        main([*words(tiny), "--results", str(readme)])
    assert readme.read_text() == "# Mine\n"


def test_records_are_written_as_they_were_read_and_a_broken_line_is_named(tmp_path):
    record = RunRecord(
        plan="ab12", name="base", seed=3, figures={"top1": 0.5, "label_bytes": None}, curve=((15, 0.25),)
    )
    path = tmp_path / "kept" / "study.jsonl"
    assert read_records(path) == {}
    write_records(path, {("ab12", 3): record})
    assert read_records(path) == {("ab12", 3): record}
    path.write_text(path.read_text() + '{"plan": "ab12"}\n')
    with pytest.raises(StudyError, match=r"study\.jsonl, line 2: .*'figures'"):
        read_records(path)


def test_a_run_is_measured_by_what_all_of_its_tables_ask():
    both = study_of(parsed(["architecture", "defects", "--out", "out"]))
    architecture, defects = both.tables
    plan = both.plans["architecture"]["lvvit"]
    assert plan == both.plans["defects"]["aligned"]
    assert both.metrics(plan) == list(dict.fromkeys([*architecture.metrics, *defects.metrics]))
    assert both.metrics(both.plans["architecture"]["linear"]) == list(architecture.metrics)


def test_what_has_not_run_is_named(tiny):
    assert main([*words(tiny), "--seeds", "3", "--collect"]) == 0
    assert "Not run: token labels (seed 2); x and y swapped (seed" in (tiny / "out" / "tiny.md").read_text()
    assert len(replace(study_in(tiny), seeds=3).jobs()) == 6


def test_a_run_of_something_else_is_not_taken(tiny):
    ours = study_in(tiny)
    other = replace(ours, testbed=replace(ours.testbed, set={**ours.testbed.set, "epochs": 3}))
    with pytest.raises(ValueError, match="was made by another table, testbed or recipe"):
        run_job(other, other.jobs()[0], device=CPU)


def test_a_run_by_an_edited_recipe_is_another(tiny, tmp_path):
    """A recipe of one's own has the same name before and after; what it says decides."""
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(find_recipe("demo_token_labels").read_text())
    ours = study_in(tiny)
    ours = replace(ours, testbed=replace(ours.testbed, recipe=str(recipe)))
    before = ours.plans["tiny"]["token"].digest
    recipe.write_text(recipe.read_text().replace("lr: 2.0e-3", "lr: 3.0e-3"))
    assert replace(ours).plans["tiny"]["token"].digest != before


def test_what_was_kept_stands_where_the_folder_holds_the_same_run(tiny):
    ours = study_in(tiny)
    found = finished_runs(ours, {})
    key, record = next(iter(found.items()))
    kept = replace(record, figures={**record.figures, "top1": 0.123, "label_bytes": 5.0})
    assert finished_runs(ours, {key: kept})[key] == kept
    poorer = replace(kept, figures={"top1": 0.123})
    assert finished_runs(ours, {key: poorer})[key] == record


def test_settings_for_all_rows_come_after_those_of_a_preset(tiny):
    """A preset may set all of `model.options`; --set may be given more than once."""
    given = ["--set", "model.options.depth=2", "epochs=1", "--set", "batch_size=7"]
    ours = study_of(parsed(["models", "--out", "x", *given]))
    recipe = ours.recipe(ours.plans["models"]["t2t"], 0)
    assert (recipe.model.options["depth"], recipe.model.options["width"]) == (2, 64)
    assert (recipe.epochs, recipe.batch_size) == (1, 7)


def test_a_job_on_its_own_writes_no_results(tiny):
    with pytest.raises(ValueError, match="leave --record, --results and --collect out"):
        main([*words(tiny), "--only", "tiny:token:0", "--collect"])
    with pytest.raises(StudyError, match="--seeds 0"):
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
    assert environment_of_one(1)["CUDA_VISIBLE_DEVICES"] == "1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    assert environment_of_one(1)["CUDA_VISIBLE_DEVICES"] == "5"


def test_labels_are_held_against_the_masks_of_other_crops_for_each_seed(tiny):
    """And tokens have nothing to get right in a run that never trained their head."""
    figures = [json.loads((tiny / "out" / "runs" / "base" / seed / "measures.json").read_text()) for seed in "01"]
    assert 0.9 < figures[0]["label_truth"] <= 1
    trained = load_run(tiny / "out" / "runs" / "base" / "0")
    without = replace(trained.recipe, loss=replace(trained.recipe.loss, beta=0.0))
    run = tiny / "out" / "runs" / "base" / "0"
    folders = {f"masks_{split}": tiny / "out" / "scenes" / "masks" / split for split in ("train", "val")}
    finished = FinishedRun(run=run, folders=folders, defect=None, device=CPU)
    assert "token_accuracy" in predictions(finished)
    finished.__dict__["trained"] = replace(trained, recipe=without)
    assert "token_accuracy" not in predictions(finished)
    assert label_truth(finished) == {}


def test_a_step_by_another_command_is_not_taken(tiny):
    ours = study_in(tiny)
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


@pytest.mark.parametrize("testbed_name", names_in("testbeds"))
def test_every_row_is_a_recipe_on_every_testbed(testbed_name):
    """Each run once; ImageNet has no masks, and labels in one encoding."""
    own = [name for name in names_in("tables") if read_table(name).testbed == testbed_name]
    own = {"embedded": []}.get(testbed_name, own) or ["all"]
    study = study_of(parsed([*own, "--on", testbed_name, "--data", "images", "--out", "out"]))
    lacking = () if testbed_name == "embedded" else ("truth", "truth_swapped", "exact")
    tables = study.tables
    tables = [
        replace(table, differences=[], rows={name: row for name, row in table.rows.items() if name not in lacking})
        for table in tables
    ]
    study = replace(study, tables=tables)
    jobs = {job.plan.name: job for job in study.jobs() if job.seed == 0}
    for job in jobs.values():
        for key, text in job.plan.settings.items():
            assert "{" not in str(filled(text, study.folders(0))) or key == "model.options"
    for job in list(jobs.values())[::4]:  # each takes a while to parse
        assert study.recipe(job.plan, 3).seed == 3


def test_rows_that_are_the_same_run_once():
    """MixToken with token labels is a row of `mixing`, `defects`, `labels` and `distillation`."""
    four = study_of(parsed(["mixing", "defects", "labels", "distillation", "--seeds", "1", "--out", "out"]))
    rows = [("mixing", "token_mixtoken"), ("defects", "aligned"), ("labels", "token"), ("distillation", "token")]
    assert {four.plans[table][row].name for table, row in rows} == {"base"}
    assert [job.seed for job in four.jobs()] == [0] * sum(len(t.rows) for t in four.tables)


def test_steps_are_made_in_the_order_of_their_needs():
    steps = study_of(parsed(["labels", "--out", "out"])).plans["labels"]["own"].steps
    assert steps.index("scenes") < steps.index("teacher") < steps.index("labels") < steps.index("student")
    assert steps[-1] == "labels_own"
    assert "labels_coarse" not in steps


def test_each_seed_of_segmentation_begins_with_a_backbone_of_its_own():
    """And the tables that `all` names leave it out, as its testbed is another."""
    study = study_of(parsed(["segmentation", "--out", "out"]))
    assert study.testbed.name == "masks"
    plan = study.plans["segmentation"]["fcn_token"]
    assert [str(study.step_folder(step, 3)) for step in plan.steps] == [
        "out/scenes", "out/teacher", "out/labels", "out/token_labels-3"
    ]  # fmt: skip
    recipe = study.recipe(plan, 3)
    assert (recipe.seed, recipe.model.weights) == (3, "out/token_labels-3")
    assert "segmentation" not in {table.name for table in study_of(parsed(["all", "--out", "out"])).tables}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("rows:", "rwos:"), "unknown key 'rwos'; did you mean rows"),
        (("defect: swapped", "defect: swaped"), "no defect 'swaped'; known: swapped"),
        (("[swapped, token]", "[swapped, tokne]"), "name a row 'tokne'"),
        (("title: Tiny\n", ""), "title"),
        (("[top1, token_accuracy", "[top1, tokens"), r"no metric \['tokens'\]; known: top1"),
        (("metrics: [top1, token_accuracy, probe_accuracy, label_truth, step_s]", "metrics: []"), "no metric at all"),
        (("[[swapped, token]]", "[[swapped]]"), r"differences: expected tuple\[str, str\], got \['swapped'\]"),
        (("[[swapped, token]]", "token"), r"t.yaml: differences: expected tuple.*, got 'token'"),
        (("seeds: 2", "seeds: five"), "t.yaml: seeds: expected int, got 'five'"),
        (("seeds: 2", "seeds: 0"), "t.yaml: has 2 rows of 0 seeds"),
        (("rows:", "set: [epochs]\nrows:"), r"t.yaml: set: expected dict, got \['epochs'\]"),
        (("token: {title: token labels}", "token:"), "rows.token: expected a mapping"),
    ],
)
def test_mistakes_in_a_table_are_named(change, message, tmp_path):
    (tmp_path / "t.yaml").write_text(TABLE.replace(*change))
    with pytest.raises(StudyError, match=message):
        read_table(str(tmp_path / "t.yaml"))


def test_unknown_names_have_their_neighbours():
    with pytest.raises(StudyError, match="did you mean mixing"):
        read_table("mixin")
    table = replace(read_table("mixing"), use=("no_such",))
    with pytest.raises(StudyError, match="testbed embedded has no preset 'no_such'"):
        Study(tables=[table], testbed=read_testbed("embedded"), out=Path("out")).jobs()
    table = replace(read_table("mixing"), set={"epocs": 3})
    with pytest.raises(ValueError, match="unknown key epocs; did you mean epochs"):  # before a teacher is made
        Study(tables=[table], testbed=read_testbed("embedded"), out=Path("out")).jobs()
    with pytest.raises(StudyError, match=r"--set epochs=\{a: while parsing"):
        study_of(parsed(["mixing", "--out", "out", "--set", "epochs={a"]))
    with pytest.raises(StudyError, match="name their folder with --data"):
        Study(tables=[table], testbed=read_testbed("imagenet"), out=Path("out"))


@pytest.mark.usefixtures("steps_here")
def test_segmentation_begins_with_the_backbone_of_its_seed(tmp_path):
    (tmp_path / "bed.yaml").write_text(
        """
segments: true
recipe: segment_scenes
set: {data.root: "{scenes}", model.weights: "{backbone}", num_steps: 2, eval.short_side_px: 24}
steps:
  scenes: {scenes: {num_train: 20, num_val: 10, seed: 0}}
  backbone: >-
    train --recipe demo_class_labels --out {here} --seed {seed} --data.train {scenes}/train --data.val {scenes}/val
    --num_steps 1 --batch_size 2 --data.num_workers 0
"""
    )
    table = "{title: A, question: B, metrics: [miou], rows: {a: {title: a}}, differences: []}"
    (tmp_path / "tiny.yaml").write_text(table)
    given = [str(tmp_path / "tiny.yaml"), "--on", str(tmp_path / "bed.yaml"), "--out", str(tmp_path / "out")]
    assert main([*given, "--only", "tiny:a:1"]) == 0
    assert (tmp_path / "out" / "backbone-1" / "checkpoints").is_dir()
    assert main([*given, "--collect", "--seeds", "2"]) == 0
    found = json.loads((tmp_path / "out" / "tiny.json").read_text())
    assert found["rows"]["a"]["figures"]["miou"].keys() == {"1"}
    assert found["not_run"] == {"a": [0]}


@pytest.mark.usefixtures("steps_here")
def test_a_few_masks_beside_soft_maps_are_a_row_that_runs(tmp_path):
    testbed = (Path(__file__).parents[2] / "studies/testbeds/few_masks.yaml").read_text()
    for full, small in (
        ("num_train: 1500, num_val: 1000", "num_train: 20, num_val: 10"),
        ("few: 150", "few: 10"),
        ("num_steps: 600", "num_steps: 1"),
        ("--num_steps 600", "--num_steps 1 --batch_size 4"),
        ("--data.num_workers 0\n", "--data.num_workers 0 --num_steps 1 --batch_size 4\n"),
    ):
        assert full in testbed
        testbed = testbed.replace(full, small)
    (tmp_path / "bed.yaml").write_text(testbed)
    words = ["soft_masks", "--on", str(tmp_path / "bed.yaml"), "--out", str(tmp_path / "out")]
    assert main([*words, "--set", "batch_size=4", "--only", "soft_masks:soft:0"]) == 0
    (run,) = (tmp_path / "out/runs").glob("*/0")
    assert "miou" in json.loads((run / "measures.json").read_text())
    masks = {path.name for path in (tmp_path / "out/scenes/few/masks").rglob("*.png")}
    assert len(masks) == 10


def test_lists_name_as_many_images_of_each_class(tmp_path):
    write_scenes(tmp_path / "scenes", num_train=40, num_val=10, seed=0)
    for name, others in (("some", True), ("few", False)):
        write_list(tmp_path / "scenes/train", name, num_labelled=20, others=others)
    some, few = (open_images(tmp_path / f"scenes/train/{name}.csv") for name in ("some", "few"))
    assert (len(some), len(few)) == (40, 20)
    assert few.class_names == [str(number) for number in range(10)]
    assert [few.class_ids.tolist().count(number) for number in range(10)] == [2] * 10
    named = [key for key, known in zip(some.keys, has_classes(some), strict=True) if known]
    assert named == list(few.keys)
