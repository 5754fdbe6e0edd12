"""`python -m studies TABLE ... --out FOLDER`: train the rows of tables with several seeds, and compare them."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from studies.records import read_records, write_records
from studies.results import parts_of, write_results
from studies.runs import finished_runs, run_all, run_job
from studies.tables import Study, StudyError, names_in, read_table, read_testbed
from tokenlabel.runtime.arguments import Parser, add_device, device_of, parse
from tokenlabel.runtime.coercion import NATURAL, check_numbers
from tokenlabel.runtime.distributed import launched_ranks
from tokenlabel.runtime.process import run_command

COMMAND = "python -m studies"


def main(arguments: Sequence[str]) -> int:
    """Run or continue a study; return the exit status: 1 if any run failed."""
    options = parsed(arguments)
    if options.only and (options.record or options.results or options.collect):
        raise StudyError("--only runs one job and writes no results: leave --record, --results and --collect out")
    study = study_of(options)
    if options.only:
        jobs = {job.name: job for job in study.jobs()}
        if options.only not in jobs:
            raise StudyError(f"--only {options.only}: no such run; the first of {len(jobs)} is {next(iter(jobs))}")
        print(json.dumps(run_job(study, jobs[options.only], device=device_of(options.device))))
        return 0
    if options.results is not None:
        parts_of(options.results)  # refuses a file of something else before anything is trained
    failures: list[str] = []
    if not options.collect:
        done = finished_runs(study, read_records(options.record))
        failures = run_all(study, done, _words(options), num_jobs=options.jobs)
    if launched_ranks().is_first:
        # Read again: another call may have added to the file since.
        records = finished_runs(study, read_records(options.record))
        if options.record is not None:
            write_records(options.record, records)
        words = [word for word in arguments if word != "--collect"]
        write_results(study, records, page=options.results, command=f"{COMMAND} {shlex.join(words)}")
    for line in failures:
        print(line, file=sys.stderr)
    return 1 if failures else 0


def parsed(arguments: Sequence[str]) -> Any:
    """Return what the words of the command line say."""
    parser = Parser(
        "studies",
        "Train every row of tables with several seeds, measure, and say which differences are larger than their "
        "spread. The same command continues; under torchrun each process trains whole runs.",
    )
    parser.prog = COMMAND
    path: dict[str, Any] = {"type": Path}
    several: dict[str, Any] = {"nargs": "*", "action": "append", "default": []}
    choices: tuple[tuple[str, dict[str, Any], str], ...] = (
        ("tables", {"nargs": "+"}, f"{', '.join(names_in('tables'))}, all, or YAML files"),
        ("--on", {}, f"{', '.join(names_in('testbeds'))}, or a YAML file; what the table says by default"),
        ("--out", path | {"required": True}, "folder of steps, runs and results"),
        ("--data", path, "the images, for testbeds that need yours"),
        ("--seeds", {"type": int}, "seeds of each row; what the table says by default"),
        ("--set", several | {"metavar": "KEY=VALUE"}, "settings of every run"),
        ("--jobs", {"type": int, "default": 1}, "runs at a time, each a process with one thread"),
        ("--only", {"metavar": "TABLE:ROW:SEED"}, "this run alone, here and now"),
        ("--results", path, "also write the results as the testbed's part of this Markdown page"),
        ("--record", path, "keep finished runs in this file too; train none that it has, whichever machine did"),
        ("--collect", {"action": "store_true"}, "run nothing: write the results of what there is"),
    )
    for name, more, text in choices:
        parser.add_argument(name, help=text, **more)
    add_device(parser)
    options = parse(parser, list(arguments))
    check_numbers(options, "--", jobs=NATURAL)
    return options


def study_of(options: Any) -> Study:
    """Return the study that options ask for.

    `all` are the tables that run on any testbed; those that name one are asked for by name.
    """
    every = {name: read_table(name) for name in options.tables if name != "all"}
    on = options.on or next((table.testbed for table in every.values() if table.testbed), "embedded")
    if "all" in options.tables:
        every = {name: read_table(name) for name in names_in("tables")} | every
        every = {name: table for name, table in every.items() if not table.testbed or name in options.tables}
    settings = {}
    for text in (text for group in options.set for text in group):
        key, equals, value = text.partition("=")
        if not equals:
            raise StudyError(f"--set takes KEY=VALUE, got {text!r}")
        try:
            settings[key.replace("-", "_")] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise StudyError(f"--set {text}: {' '.join(str(error).split())}") from error
    return Study(
        tables=[*every.values()],
        testbed=read_testbed(on),
        out=options.out,
        data=options.data,
        overrides=settings,
        seeds=options.seeds,
    )


def _words(options: Any) -> list[str]:
    """Return the arguments that make the same study in another process."""
    words = [*options.tables, "--out", str(options.out), "--device", options.device]
    words += ["--on", options.on] if options.on else []
    words += ["--data", str(options.data)] if options.data else []
    words += ["--seeds", str(options.seeds)] if options.seeds is not None else []
    return words + [word for texts in options.set for word in ("--set", *texts)]


if __name__ == "__main__":
    sys.exit(run_command(COMMAND, main, sys.argv[1:]))
