"""What a run says while it goes: metrics.jsonl for programs, a progress bar for people."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tokenlabel.runtime.environment import is_main_process
from tokenlabel.runtime.files import write_whole
from tokenlabel.runtime.trackers import Tracker

METRICS_FILE = "metrics.jsonl"


class RunLog:
    """Appends one JSON object a line to RUN/metrics.jsonl and keeps a progress bar on the terminal.

    Every line has `step`, the number of steps that were done when it was written. A run that continues from an
    earlier step drops the lines that it will write again, so that the file reads like that of an unbroken run.
    One that is not `active` says and writes nothing: of many processes, one speaks for all. `trackers` hear every
    line that is written.
    """

    def __init__(
        self,
        run: Path,
        *,
        start_step: int,
        num_steps: int,
        title: str,
        active: bool = True,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        self._path, self._trackers = run / METRICS_FILE, trackers
        self._file = None
        if active:
            kept = [line for line in read_metrics(run) if line["step"] <= start_step]
            write_whole(self._path, "".join(json.dumps(line) + "\n" for line in kept))
            self._file = self._path.open("a", encoding="utf-8")
        # A bar for people; plain lines, now and then, for logs that cannot move a cursor.
        self.bar = tqdm(
            total=num_steps,
            initial=start_step,
            desc=title,
            unit="step",
            mininterval=0.2 if sys.stderr.isatty() else 20.0,
            disable=not active,
        )

    def write(self, step: int, **values: Any) -> None:
        """Write one line of metrics."""
        if self._file is not None:
            line = {"step": step, **values}
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
            for tracker in self._trackers:
                tracker(line)

    def say(self, message: str) -> None:
        """Print a line above the progress bar."""
        if self._file is not None:
            self.bar.write(message, file=sys.stderr)

    def close(self) -> None:
        """Close the file and the bar."""
        self.bar.close()
        if self._file is not None:
            self._file.close()


def print_figures(figures: Mapping[str, Any], run: Path) -> None:
    """Print a finished run's figures as JSON, once a job; without val images what its last steps said."""
    if is_main_process():
        print(json.dumps(figures or read_metrics(run)[-1]))


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics, oldest first, but for what a kill or a power cut left of the last ones."""
    path = run / METRICS_FILE
    if not path.exists():
        return []
    text, found = path.read_text(encoding="utf-8", errors="replace"), []
    for line in text.splitlines():
        try:
            values = json.loads(line)
        except ValueError:  # cut short, or zeros, which file systems put where nothing had reached the disk
            continue
        if isinstance(values, dict) and {"step", "kind"} <= values.keys():
            found.append(values)
    return found


class Stopwatch:
    """Adds up the seconds spent in named parts of a step.

    On a GPU work is only queued, so times of parts are those of the host; a part that waits (for data, for the
    loss) shows what it waited for.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.started = time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time inside the block as `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let the time inside the block count as nothing."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.started += time.perf_counter() - start

    def lap(self) -> dict[str, float]:
        """Return the seconds of each part and in `total` since the last lap, and start anew."""
        now = time.perf_counter()
        seconds, self.seconds = {**self.seconds, "total": now - self.started}, {}
        self.started = now
        return seconds
