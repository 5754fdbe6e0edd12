"""How to measure: interleaved times, peak memory, and the rows that report them."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True, slots=True)
class Settings:
    """What the command line asked for. `quick`: smaller and fewer, for a first look."""

    device: torch.device
    quick: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """One figure: all its measurements, their unit, and what it should reach (in words, may be empty)."""

    name: str
    values: Sequence[float]
    unit: str
    aim: str = ""

    @property
    def median(self) -> float:
        """The median of the measurements."""
        return statistics.median(self.values)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles; 0 for a single measurement."""
        if len(self.values) < 2:
            return 0.0
        lower, _, upper = statistics.quantiles(self.values, n=4, method="inclusive")
        return (upper - lower) / 2


def interleave(
    ways: Mapping[str, Callable[[], object]], settings: Settings, *, rounds: int | None = None
) -> dict[str, list[float]]:
    """Run each function once to warm up, then all in turns; return the seconds of every round by name.

    `rounds`: by default 5 with `quick`, otherwise 21. On a GPU a function's time ends with its last kernel.
    """
    for function in ways.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds or (5 if settings.quick else 21)):
        for name, function in ways.items():
            _wait(settings.device)
            start = time.perf_counter()
            function()
            _wait(settings.device)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratios(slow: Sequence[float], fast: Sequence[float]) -> list[float]:
    """Return how many times longer `slow` took than `fast`, round by round."""
    return [a / b for a, b in zip(slow, fast, strict=True)]


def peak_bytes(function: Callable[[], object], settings: Settings) -> int:
    """Return the most bytes of tensors that `function` held at once, above those that were there before."""
    function()  # what is allocated once and kept (thread pools, caches) is not the function's
    if settings.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(settings.device)
        before = torch.cuda.memory_allocated(settings.device)
        function()
        return torch.cuda.max_memory_allocated(settings.device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler writes of its own accord otherwise
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    held = peak = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
