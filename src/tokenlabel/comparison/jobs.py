"""Comparisons: every row of a table trained with several seeds, measured, and set side by side.

Runs are ordinary run folders, OUT/runs/PLAN/SEED, each in a process of its own with one thread (on the CPU) or one
GPU, so a call that was stopped is continued by the same call, and tables share the runs that they have in common.
Under torchrun, each rank trains whole runs of its own.
"""

from __future__ import annotations

import json
import os
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from filelock import FileLock

from tokenlabel.classification.task import build
from tokenlabel.comparison.defects import DefectiveDataset
from tokenlabel.comparison.measures import COST_FILE, MEASURES_FILE, measure_run
from tokenlabel.comparison.pages import write_results
from tokenlabel.comparison.records import Records, read_records, record_of, write_records
from tokenlabel.comparison.tables import (
    PLAN_FILE,
    Comparison,
    Job,
    RunPlan,
    Step,
    TableError,
    filled,
    read_table,
    read_testbed,
    recipe_of,
    steps_of,
    table_names,
    testbed_names,
)
from tokenlabel.data.scenes import write_scenes
from tokenlabel.data.sources import open_images
from tokenlabel.runtime.arguments import add_device, device_of, new_parser, parse
from tokenlabel.runtime.distributed import Ranks, joined_ranks, launched_ranks
from tokenlabel.runtime.files import write_whole
from tokenlabel.runtime.interruption import Interrupted
from tokenlabel.runtime.ranges import NATURAL, check_numbers
from tokenlabel.training.checkpoint import list_checkpoints
from tokenlabel.training.engine import run_task


class CompareError(ValueError):
    """Runs or steps of a comparison that failed, or that were made by another table."""


def jobs_of(comparison: Comparison, *, shared: bool = True) -> list[Job]:
    """Return the jobs: all rows of all tables at the first seed, then at the second.

    `shared`: name a run that several rows have in common once.
    """
    found: dict[Any, Job] = {}
    for seed in range(max(comparison.num_seeds(table) for table in comparison.tables)):
        for table in comparison.tables:
            for row in table.rows if seed < comparison.num_seeds(table) else ():
                job = Job(table, row, seed)
                folder = comparison.run_folder(comparison.plan(table, row), seed)
                found.setdefault(folder if shared else str(job), job)
    return list(found.values())


def steps_needed(comparison: Comparison, jobs: Sequence[Job]) -> list[str]:
    """Return the steps that jobs and their metrics need, in the order to make them."""
    settings = [value for job in jobs for value in comparison.plan(job.table, job.row).settings.values()]
    return steps_of([*comparison.testbed.measure.values(), *settings], comparison.testbed)


def make_steps(comparison: Comparison, names: Sequence[str]) -> None:
    """Make what rows need, one after the other, each once. Raises CompareError for a step that fails."""
    for name in names:
        step, marker = comparison.testbed.steps[name], _marker(comparison, name)
        marker.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(marker.with_suffix(".lock")):  # another process may be making it
            if not _is_made(comparison, name):
                _make_step(comparison, step, comparison.out / name, log=marker.with_suffix(".log"))
                write_whole(marker, _made(step))


def _is_made(comparison: Comparison, name: str) -> bool:
    """Say whether a step has been made. Raises CompareError where its folder was made by something else."""
    marker = _marker(comparison, name)
    if not marker.is_file():
        return False
    if marker.read_text(encoding="utf-8") != _made(comparison.testbed.steps[name]):
        raise CompareError(
            f"{comparison.out / name} was made by another command ({marker}); choose another --out"
        )
    return True


def _marker(comparison: Comparison, name: str) -> Path:
    return comparison.out / "steps" / f"{name}.json"


def _made(step: Step) -> str:
    return json.dumps({"command": step.command, "scenes": step.scenes and dict(step.scenes)}) + "\n"


def _make_step(comparison: Comparison, step: Step, folder: Path, *, log: Path) -> None:
    if step.scenes is not None:
        lists = step.scenes.get("lists", {})
        write_scenes(folder, **{name: value for name, value in step.scenes.items() if name != "lists"})
        for name, (num_labelled, others) in lists.items():
            write_list(folder / "train", name, num_labelled=num_labelled, others=others)
        return
    words = shlex.split(filled(step.command or "", comparison.folders | {"here": str(folder)}))
    status = _tokenlabel(words, log=log, environment=_environment(None))
    if status:
        raise CompareError(
            f"step {folder.name} failed with exit status {status}: {_last_line(log)} (see {log})"
        )


def write_list(folder: Path, name: str, *, num_labelled: int, others: bool) -> None:
    """Write FOLDER/NAME.csv: so many images with their class, as many of each; with the `others` those without."""
    source = open_images(folder)
    place = np.zeros(len(source), np.int64)  # of each image within its class
    for class_id in np.unique(source.class_ids):
        of_class = np.flatnonzero(source.class_ids == class_id)
        place[of_class] = np.random.default_rng(int(class_id)).permutation(len(of_class))
    chosen = {*np.lexsort((source.class_ids, place))[:num_labelled].tolist()}
    rows = [
        f"{key},{source.class_names[source.class_ids[i]] if i in chosen else ''}"
        for i, key in enumerate(source.keys)
        if i in chosen or others
    ]
    write_whole(folder / f"{name}.csv", "path,label\n" + "\n".join(rows) + "\n")


def run_job(comparison: Comparison, job: Job, *, device: torch.device) -> dict[str, Any]:
    """Train one row with one seed, as far as it is not trained yet, and measure it; return its figures.

    Raises CompareError where the folder holds a run of something else.
    """
    plan = comparison.plan(job.table, job.row)
    folder = comparison.run_folder(plan, job.seed)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / PLAN_FILE
    with FileLock(folder / ".lock"):  # another process may be training it
        if path.is_file() and not comparison.is_of(plan, folder):
            raise CompareError(
                f"{path}: the run was made by another table, testbed or recipe; remove {folder} or choose another --out"
            )
        write_whole(path, comparison.described(plan))
        if not (folder / MEASURES_FILE).is_file():
            _train(comparison, plan, job.seed, folder, device=device)
        return measure_run(
            folder,
            comparison.measure_folders(),
            wanted=comparison.metrics(plan),
            defect=plan.defect,
            device=device,
        )


def _train(comparison: Comparison, plan: RunPlan, seed: int, folder: Path, *, device: torch.device) -> None:
    recipe = recipe_of(plan, seed, comparison.folders)
    task = build(recipe, device=device, run=folder)
    if plan.defect is not None:
        task.train_set = DefectiveDataset(task.train_set, plan.defect)
    with _counted_cost(folder):
        run_task(task, folder, ranks=Ranks(), eval_every_epochs=recipe.eval.every_epochs)


@contextmanager
def _counted_cost(run: Path) -> Iterator[None]:
    """Add a line to the run's cost: the steps that were made, the seconds of the clock and of this process's cores.

    An attempt that failed leaves none: what it did after its last checkpoint is lost, and done again.
    """
    first_step, interrupted = _last_step(run), None
    started, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    try:
        yield
    except Interrupted as error:  # it has saved its last step
        interrupted = error
    now = resource.getrusage(resource.RUSAGE_SELF)
    line = {
        "num_steps": _last_step(run) - first_step,
        "wall_s": time.perf_counter() - started,
        "cpu_s": now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime,
    }
    with (run / COST_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    if interrupted is not None:
        raise interrupted


def _last_step(run: Path) -> int:
    checkpoints = list_checkpoints(run)
    return int(checkpoints[-1].name) if checkpoints else 0


def run_all(
    comparison: Comparison, records: Records, arguments: Sequence[str], *, num_jobs: int
) -> list[str]:
    """Make the steps and run every job that is missing, `num_jobs` at a time; return what failed, a line each.

    `records`: of the runs that are finished. `arguments`: the words after `tokenlabel compare` that make this
    comparison, for the processes of single jobs.
    """
    jobs = [job for job in jobs_of(comparison) if not _is_done(comparison, job, records)]
    with joined_ranks() as ranks:
        ranks.on_main(lambda: make_steps(comparison, steps_needed(comparison, jobs) if jobs else []))
        mine = jobs[ranks.rank :: ranks.world_size]
        with ThreadPoolExecutor(num_jobs) as pool:
            failures = list(pool.map(lambda job: _run_apart(comparison, job, arguments), mine))
        return [line for of_rank in ranks.all_gather(failures) for line in of_rank if line]


def _is_done(comparison: Comparison, job: Job, records: Records) -> bool:
    plan = comparison.plan(job.table, job.row)
    record = records.get((comparison.digest(plan), job.seed))
    return record is not None and not set(comparison.metrics(plan)) - record.figures.keys()


def finished_runs(comparison: Comparison, kept: Records) -> Records:
    """Return the records of all finished runs: those that were kept, and those in the folder for what these lack.

    Raises CompareError where steps in the folder were made by other commands than the testbed's.
    """
    found, jobs = dict(kept), jobs_of(comparison)
    for name in steps_needed(comparison, jobs):
        _is_made(comparison, name)
    for job in (job for job in jobs if not _is_done(comparison, job, kept)):
        plan = comparison.plan(job.table, job.row)
        record = record_of(comparison, plan, job.seed)
        if record is not None:
            found[record.plan, record.seed] = record
    return found


def _run_apart(comparison: Comparison, job: Job, arguments: Sequence[str]) -> str | None:
    """Run a job in a process of its own; return what went wrong, if anything did."""
    log = comparison.out / "logs" / f"{str(job).replace(':', '-')}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"{job} ...", file=sys.stderr, flush=True)
    words = ["compare", *arguments, "--only", str(job)]
    status = _tokenlabel(words, log=log, environment=_environment(launched_ranks().local_rank))
    return f"{job}: exit status {status}: {_last_line(log)} (see {log})" if status else None


def _environment(gpu: int | None) -> dict[str, str]:
    """Return the environment of a process that works alone: one thread, one of the GPUs that this one may use, and
    none of torchrun's variables.
    """
    alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    alone.setdefault("OMP_NUM_THREADS", "1")
    if gpu is not None and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = allowed.split(",") if allowed else [str(number) for number in range(torch.cuda.device_count())]
        alone["CUDA_VISIBLE_DEVICES"] = gpus[gpu % len(gpus)].strip()
    return alone


def _tokenlabel(words: Sequence[str], *, log: Path, environment: Mapping[str, str]) -> int:
    with log.open("ab") as file:
        command = [sys.executable, "-m", "tokenlabel", *words]
        return subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][-300:] if lines else "no output"


def main(arguments: Sequence[str]) -> int:
    """Run `tokenlabel compare` by its arguments; return the exit status: 1 if any run failed."""
    options = _options(arguments)
    if options.only and (options.record or options.results or options.collect):
        raise CompareError(
            "--only runs one job and writes no results: leave --record, --results and --collect out"
        )
    names = table_names() if options.tables == ["all"] else options.tables
    comparison = Comparison(
        tables=[read_table(name) for name in names],
        testbed=read_testbed(options.on),
        out=options.out,
        data=options.data,
        overrides=_settings(options.set),
        seeds=options.seeds,
    )
    if options.only:
        job = _job(comparison, options.only)
        make_steps(comparison, steps_needed(comparison, [job]))
        print(json.dumps(run_job(comparison, job, device=device_of(options.device))))
        return 0
    kept = {} if options.record is None else read_records(options.record)
    failures: list[str] = []
    if not options.collect:
        done = finished_runs(comparison, kept)
        failures = run_all(comparison, done, _words(options), num_jobs=options.jobs)
    if launched_ranks().is_first:
        # Read again: another call may have added to the file since.
        records = finished_runs(comparison, read_records(options.record) if options.record else {})
        if options.record is not None:
            write_records(options.record, records)
        words = [word for word in arguments if word != "--collect"]
        command = shlex.join(["tokenlabel", "compare", *words])
        write_results(comparison, records, page=options.results, command=command)
    for line in failures:
        print(line, file=sys.stderr)
    return 1 if failures else 0


def _options(arguments: Sequence[str]) -> Any:
    parser = new_parser(
        "compare",
        "Train every row of tables with several seeds, measure, and say which differences are larger than their "
        "spread. The same command continues; under torchrun each process trains whole runs.",
    )
    parser.add_argument("tables", nargs="+", help=f"{', '.join(table_names())}, all, or YAML files")
    parser.add_argument("--on", default="embedded", help=f"{', '.join(testbed_names())}, or a YAML file")
    parser.add_argument("--out", type=Path, required=True, help="folder of steps, runs and results")
    parser.add_argument("--data", type=Path, help="the images, for testbeds that need yours")
    parser.add_argument("--seeds", type=int, help="seeds of each row; what the table says by default")
    parser.add_argument(
        "--set", nargs="*", action="append", default=[], metavar="KEY=VALUE", help="settings of every run"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each a process with one thread")
    parser.add_argument("--only", metavar="TABLE:ROW:SEED", help="this run alone, here and now")
    parser.add_argument(
        "--results", type=Path, help="also write the results as one Markdown page to this file"
    )
    parser.add_argument(
        "--record",
        type=Path,
        metavar="FILE",
        help="keep the figures of finished runs in this file too, and train none again that it has, whatever "
        "machine trained it",
    )
    parser.add_argument(
        "--collect", action="store_true", help="run nothing: write the results of what there is"
    )
    add_device(parser)
    options = parse(parser, list(arguments))
    check_numbers(options, "--", jobs=NATURAL)
    return options


def _words(options: Any) -> list[str]:
    """Return the arguments that make the same comparison in another process."""
    words = [*options.tables, "--on", options.on, "--out", str(options.out), "--device", options.device]
    words += ["--data", str(options.data)] if options.data else []
    words += ["--seeds", str(options.seeds)] if options.seeds is not None else []
    return words + [word for texts in options.set for word in ("--set", *texts)]


def _settings(groups: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Return what `--set`, given any number of times, says."""
    settings = {}
    for text in (text for group in groups for text in group):
        key, equals, value = text.partition("=")
        if not equals:
            raise TableError(f"--set takes KEY=VALUE, got {text!r}")
        settings[key.replace("-", "_")] = yaml.safe_load(value)
    return settings


def _job(comparison: Comparison, text: str) -> Job:
    found = {str(job): job for job in jobs_of(comparison, shared=False)}
    if text not in found:
        raise TableError(f"--only {text}: no such run; the first of {len(found)} is {next(iter(found))}")
    return found[text]
