"""Who else hears what a run writes into its metrics.jsonl: TensorBoard, Weights & Biases, or a function of your own."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tokenlabel.runtime.environment import is_main_process
from tokenlabel.runtime.errors import first_line

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Tracker = Callable[[dict[str, Any]], None]
"""Is called with each line of metrics: `step`, `kind` (train or eval) and figures by name; in one process only."""


class TrackerError(ValueError):
    """A tracker whose package is not installed."""


class TensorBoard:
    """Writes every figure as a scalar such as train/loss or eval/top1 into a folder that TensorBoard reads.

    A run that continues hides what the stopped one had written beyond the step that it continues from. Raises
    TrackerError if the extra is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise TrackerError(
                "TensorBoard is not installed; pip install 'tokenlabel[tensorboard]', or leave --tensorboard out"
            ) from error
        self._folder, self._make = folder, SummaryWriter
        self._writer: SummaryWriter | None = None

    def __call__(self, line: dict[str, Any]) -> None:
        """Write the figures of a line of metrics."""
        if self._writer is None:  # made when the first step is known
            self._writer = self._make(str(self._folder), purge_step=line["step"])
        for name, value in line.items():
            if name != "step" and isinstance(value, int | float):
                self._writer.add_scalar(f"{line['kind']}/{name}", value, line["step"])
        self._writer.flush()

    def close(self) -> None:
        """Close the files."""
        if self._writer is not None:
            self._writer.close()


class WandB:
    """Logs every figure to Weights & Biases as train/loss, eval/top1 and so on, against the step.

    The project is `tokenlabel` unless WANDB_PROJECT names another. A run folder is one run there, also when it was
    stopped and continues: RUN/wandb.id names it. WANDB_MODE=offline writes RUN/wandb, for `wandb sync`. Raises
    TrackerError if the extra is not installed or nobody is logged in.
    """

    def __init__(self, folder: Path) -> None:
        try:
            import wandb
        except ImportError as error:
            raise TrackerError(
                "Weights & Biases is not installed; pip install 'tokenlabel[wandb]', or leave --wandb out"
            ) from error
        folder.mkdir(parents=True, exist_ok=True)
        id_file = folder / "wandb.id"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(8), encoding="utf-8")
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "tokenlabel"),
                name=folder.resolve().name,
                id=id_file.read_text(encoding="utf-8").strip(),
                resume="allow",
                dir=str(folder),
                settings=wandb.Settings(console="off", silent=True, init_timeout=30),
            )
        except (wandb.Error, OSError) as error:
            raise TrackerError(
                f"--wandb: {first_line(error).rstrip('.')}; log in by `wandb login`, or set WANDB_MODE=offline"
            ) from error
        # A continued run says some steps again, which W&B's own step would refuse.
        self._run.define_metric("*", step_metric="step")
        self._recipe: Path | None = folder / "recipe.yaml"

    def __call__(self, line: dict[str, Any]) -> None:
        """Log the figures of a line of metrics."""
        if self._recipe is not None:  # written when the first step was taken
            if self._recipe.exists():
                recipe = yaml.safe_load(self._recipe.read_text(encoding="utf-8"))
                self._run.config.update(recipe, allow_val_change=True)
            self._recipe = None
        figures = {
            f"{line['kind']}/{name}": value for name, value in line.items() if isinstance(value, int | float)
        }
        figures.pop(f"{line['kind']}/step")
        self._run.log({"step": line["step"], **figures})

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


@contextmanager
def trackers_of(run: Path, *, tensorboard: bool, wandb: bool) -> Iterator[list[Tracker]]:
    """Yield the trackers that a run is to have, on the rank that speaks for all; closed in the end."""
    with ExitStack() as stack:
        kinds = [kind for kind, wanted in ((TensorBoard, tensorboard), (WandB, wandb)) if wanted]
        folders = {TensorBoard: run / "tensorboard", WandB: run}
        trackers = [kind(folders[kind]) for kind in kinds if is_main_process()]
        for tracker in trackers:
            stack.callback(tracker.close)
        yield [*trackers]
