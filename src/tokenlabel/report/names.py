"""What runs are called on a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def short_names(runs: Sequence[Path]) -> dict[Path, str]:
    """Return for each run folder the end of its path, as long as it takes to tell all of them apart."""
    paths = dict.fromkeys(runs)
    parts = {run: run.resolve().parts for run in paths}
    for count in range(1, max(map(len, parts.values()), default=0)):
        names = {run: "/".join(of_run[-count:]) for run, of_run in parts.items()}
        if len(set(names.values())) == len(names):
            return names
    return {run: str(run) for run in paths}
