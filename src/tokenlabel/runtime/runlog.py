"""Logging of a run: metrics.jsonl, a progress bar, and trackers such as TensorBoard."""

from __future__ import annotations

import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tokenlabel.runtime.configuration import read_yaml
from tokenlabel.runtime.errors import ConfigError, first_line, import_extra
from tokenlabel.runtime.process import naming, printable, say, write_whole
from tokenlabel.runtime.urls import without_secrets

Tracker = Callable[[dict[str, Any]], None]
"""Called in the main process with each line of metrics: `step`, `kind` (train or eval) and figures by name.

A context manager in its place is entered there when the run folder is locked, and exited in the end: the tracker is
what it enters as.
"""


class TensorBoard:
    """Writes every figure as a scalar such as train/loss or eval/top1 into a folder that TensorBoard reads.

    A run that continues hides what the stopped one had written beyond the step that it continues from. Raises
    ConfigError if the extra is not installed.
    """

    def __init__(self, folder: Path) -> None:
        module = import_extra(
            "torch.utils.tensorboard", "tensorboard", "TensorBoard", otherwise=", or leave --tensorboard out"
        )
        self._folder, self._make = folder, module.SummaryWriter
        self._writer: Any = None

    def __call__(self, line: dict[str, Any]) -> None:
        """Write the figures of a line of metrics."""
        if self._writer is None:  # made when the first step is known
            self._writer = self._make(str(self._folder), purge_step=line["step"])
        for name, value in line.items():
            if name != "step" and isinstance(value, int | float):
                self._writer.add_scalar(f"{line['kind']}/{name}", value, line["step"])
        self._writer.flush()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()


class WandB:
    """Logs every figure to Weights & Biases as train/loss, eval/top1 and so on, against the step.

    The project is `tokenlabel` unless WANDB_PROJECT names another. A run folder is one run there, also when it was
    stopped and continues: RUN/wandb.id names it. WANDB_MODE=offline writes RUN/wandb, for `wandb sync`. It gets recipe
    and command line without the secrets in their URLs. Raises ConfigError if the extra is not installed or nobody is
    logged in.
    """

    def __init__(self, folder: Path) -> None:
        self._wandb = import_extra("wandb", "wandb", "Weights & Biases", otherwise=", or leave --wandb out")
        self._folder, self._recipe_told = folder, False
        self._run: Any = None

    def __enter__(self) -> Tracker:
        id_file = self._folder / "wandb.id"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(8), encoding="utf-8")
        words = sys.argv[:]
        sys.argv[:] = without_secrets(words)  # where W&B finds the command line, which it sends
        try:
            self._run = self._wandb.init(
                project=os.environ.get("WANDB_PROJECT", "tokenlabel"),
                name=self._folder.resolve().name,
                id=id_file.read_text(encoding="utf-8").strip(),
                resume="allow",
                dir=str(self._folder),
                settings=self._wandb.Settings(console="off", silent=True, init_timeout=30),
            )
        except (self._wandb.Error, OSError) as error:
            raise ConfigError(
                f"--wandb: {first_line(error).rstrip('.')}; log in by `wandb login`, or set WANDB_MODE=offline"
            ) from error
        finally:
            sys.argv[:] = words
        # A continued run says some steps again, which W&B's own step would refuse.
        self._run.define_metric("*", step_metric="step")
        return self

    def __call__(self, line: dict[str, Any]) -> None:
        """Log the figures of a line of metrics."""
        if not self._recipe_told:
            recipe = read_yaml(self._folder / RECIPE_FILE)
            self._run.config.update(without_secrets(recipe), allow_val_change=True)
            self._recipe_told = True
        figures = {f"{line['kind']}/{name}": value for name, value in line.items() if isinstance(value, int | float)}
        figures.pop(f"{line['kind']}/step")
        self._run.log({"step": line["step"], **figures})

    def __exit__(self, *_: object) -> None:
        self._run.finish()  # sends what is left


def open_trackers(trackers: Sequence[Tracker], stack: ExitStack) -> Iterator[Tracker]:
    """Yield trackers, what those that are context managers enter as; `stack` exits them."""
    for tracker in trackers:
        yield stack.enter_context(tracker) if isinstance(tracker, AbstractContextManager) else tracker


METRICS_FILE, RECIPE_FILE = "metrics.jsonl", "recipe.yaml"  # of a run folder
CHANGED_NUMERICS = "changed_numerics"
"""The kind of the line which says that the steps from there on round otherwise."""


class RunLog:
    """Appends a JSON object per line to RUN/metrics.jsonl and shows a progress bar.

    Every line has `step`, the number of steps that were done when it was written. A run that continues from an
    earlier step drops the lines that it will write again, so that the file reads like that of an unbroken run.
    Unless `active` (in the main process), it writes and prints nothing. `trackers` are called with every line.
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
            lines = read_metrics(run)
            if start_step == 0 and any(line["kind"] == "eval" for line in lines):
                with (run / "metrics.earlier.jsonl").open("a", encoding="utf-8") as file:
                    file.write(_as_text(lines))
                say(f"{run}: holds no checkpoint and begins anew; metrics.earlier.jsonl has the figures from before")
            # What the stopped run wrote beyond its last checkpoint comes again.
            again = (CHANGED_NUMERICS, start_step)  # said at each start from there, unless it was undone
            kept = [line for line in lines if line["step"] <= start_step and (line["kind"], line["step"]) != again]
            write_whole(self._path, _as_text(kept))
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
            with naming(self._path):
                self._file.write(json.dumps(line) + "\n")
                self._file.flush()
            for tracker in self._trackers:
                tracker(line)

    def say(self, message: str) -> None:
        """Print a line above the progress bar."""
        if self._file is not None:
            self.bar.write(printable(message), file=sys.stderr)

    def close(self) -> None:
        """Close the file and the bar."""
        self.bar.close()
        if self._file is not None:
            self._file.close()


def _as_text(lines: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


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

    On a GPU these are the times of the host, which only queues work; a part that synchronizes includes the wait.
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
        """Do not count the time inside the block."""
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
