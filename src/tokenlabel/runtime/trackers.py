"""Who else hears what a run writes into its metrics.jsonl: TensorBoard, or a function of your own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

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


@contextmanager
def tensorboard(run: Path, *, wanted: bool) -> Iterator[list[Tracker]]:
    """Yield the trackers of a run: one that writes RUN/tensorboard, closed in the end, or none."""
    if not wanted:
        yield []
        return
    board = TensorBoard(run / "tensorboard")
    try:
        yield [board]
    finally:
        board.close()
