"""Stopping a run without losing a step: SIGINT and SIGTERM wait until the state can be saved."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


class Interrupted(Exception):  # noqa: N818  (not an error: somebody asked the run to stop)
    """The run was asked to stop, has saved its state, and will continue when started again."""

    def __init__(self, step: int, signal_number: int) -> None:
        super().__init__(f"stopped after step {step:,}; the same command continues from there")
        self.exit_status = 128 + signal_number


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list, so that a step is never cut in two; a second one ends at once."""
    received: list[int] = []

    def remember(number: int, _: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
