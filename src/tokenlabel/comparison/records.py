"""Finished runs of a comparison as lines of a file that can be kept in git: a study outlives its machine.

A record holds what results are made of, a run's figures and its learning curve, not the run. Records and run folders
of the same plan and seed are the same to a comparison, which trains neither again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokenlabel.comparison.measures import MEASURES_FILE
from tokenlabel.comparison.tables import Comparison, RunPlan, TableError
from tokenlabel.runtime.process import write_whole
from tokenlabel.runtime.runlog import read_metrics


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A finished run.

    `plan`: the digest of what decided it (`Comparison.digest`). `figures`: by the names of metrics, None for one that
    it cannot have.
    `curve`: (step, top-1 on the val images) of each evaluation.
    """

    plan: str
    name: str
    seed: int
    figures: Mapping[str, float | None]
    curve: tuple[tuple[int, float], ...]


Records = dict[tuple[str, int], RunRecord]
"""Records by the digest of their plan and their seed."""


def record_of(comparison: Comparison, plan: RunPlan, seed: int) -> RunRecord | None:
    """Return the record of a run by its folder; None if that holds no finished run of the plan."""
    run = comparison.run_folder(plan, seed)
    path = run / MEASURES_FILE
    if not (comparison.is_of(plan, run) and path.is_file()):
        return None
    curve = {line["step"]: line["top1"] for line in read_metrics(run) if line["kind"] == "eval"}
    figures = json.loads(path.read_text(encoding="utf-8"))
    return RunRecord(
        plan=comparison.digest(plan), name=plan.name, seed=seed, figures=figures, curve=tuple(curve.items())
    )


def read_records(path: Path) -> Records:
    """Return the records of a file, none if there is no such file. Raises TableError that names a broken line."""
    if not path.exists():
        return {}
    records = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TableError(f"{path}: cannot be read as a file of records ({error})") from error
    for number, line in enumerate(lines, start=1):
        try:
            record = _record(json.loads(line))
        except (ValueError, TypeError, KeyError) as error:
            raise TableError(
                f"{path}, line {number}: expected a run's record as JSON ({error}); remove the line, and its run is "
                "trained again"
            ) from error
        records[record.plan, record.seed] = record
    return records


def write_records(path: Path, records: Records) -> None:
    """Write records, sorted by plan and seed, whole or not at all."""
    ordered = sorted(records.values(), key=lambda record: (record.name, record.plan, record.seed))
    write_whole(path, "".join(json.dumps(asdict(record)) + "\n" for record in ordered))


def _record(content: Any) -> RunRecord:
    return RunRecord(
        plan=str(content["plan"]),
        name=str(content["name"]),
        seed=int(content["seed"]),
        figures={str(k): None if value is None else float(value) for k, value in content["figures"].items()},
        curve=tuple((int(step), float(top1)) for step, top1 in content["curve"]),
    )
