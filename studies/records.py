"""Finished runs of a study as lines of a file that can be kept in git: a study outlives its machine.

A record holds what results are made of, a run's figures and its learning curve, not the run. Records and run folders
of the same plan and seed are the same to a study, which trains neither again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from studies.tables import StudyError
from tokenlabel.runtime.process import write_whole


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A finished run.

    `plan`: the digest of what decided it. `figures`: by the names of metrics, None for one that it cannot have.
    `curve`: (step, top-1 or mIoU on the val images) of each evaluation.
    """

    plan: str
    name: str
    seed: int
    figures: Mapping[str, float | None]
    curve: tuple[tuple[int, float], ...]


Records = dict[tuple[str, int], RunRecord]
"""Records by the digest of their plan and their seed."""


def read_records(path: Path | None) -> Records:
    """Return the records of a file, none if there is no such file. Raises StudyError that names a broken line."""
    if path is None or not path.exists():
        return {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError(f"{path}: cannot be read as a file of records ({error})") from error
    records = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = _record(json.loads(line))
        except (ValueError, TypeError, KeyError) as error:
            raise StudyError(
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
    figures = {str(k): None if v is None else float(v) for k, v in content["figures"].items()}
    curve = tuple((int(step), float(value)) for step, value in content["curve"])
    plan, name, seed = str(content["plan"]), str(content["name"]), int(content["seed"])
    return RunRecord(plan=plan, name=name, seed=seed, figures=figures, curve=curve)
