"""Run benchmarks: `python -m benchmarks [NAME ...] [--quick] [--device cpu|cuda] [--json FILE] [--compare FILE]`."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks import (
    annotate_speed,
    data_speed,
    data_stages,
    growth,
    kernels,
    label_path,
    model_speed,
    record_size,
    segment_speed,
    start_up,
    step_cost,
    store_speed,
    token_head,
)
from benchmarks.measure import Row, Settings
from tokenlabel.runtime.process import write_whole

BENCHMARKS: dict[str, Callable[[Settings], list[Row]]] = {
    "label_path": label_path.run,
    "token_head": token_head.run,
    "step_cost": step_cost.run,
    "growth": growth.run,
    "start_up": start_up.run,
    "record_size": record_size.run,
    "store_speed": store_speed.run,
    "annotate_speed": annotate_speed.run,
    "data_speed": data_speed.run,
    "data_stages": data_stages.run,
    "model_speed": model_speed.run,
    "kernels": kernels.run,
    "segment_speed": segment_speed.run,
}

Medians = Mapping[tuple[str, str], float]

PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow", "safetensors", "tokenlabel")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmarks that the command line names, all by default."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure speed, memory and storage.")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"which to run: {', '.join(BENCHMARKS)} (default: all)"
    )
    parser.add_argument("--quick", action="store_true", help="smaller and fewer rounds: all under two minutes")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every measurement here as well")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="show an earlier --json beside each figure")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"no benchmark is called {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    settings = Settings(device=_device(parser, options.device), quick=options.quick)
    earlier = _medians(parser, options.compare) if options.compare else None

    about = machine(settings.device)
    print("\n".join(f"| {what} | {value} |" for what, value in about.items()), flush=True)
    results, started = {}, time.perf_counter()
    for name in options.names or BENCHMARKS:
        results[name] = BENCHMARKS[name](settings)
        seconds = time.perf_counter() - started
        print(f"\n{table(name, results[name], earlier)}\n\n{seconds:.0f} s since the start", flush=True)
    if options.json:
        rows = {name: [_as_dict(row) for row in found] for name, found in results.items()}
        measured = {"machine": about, "quick": settings.quick, "rows": rows}
        write_whole(options.json, json.dumps(measured, indent=1) + "\n")


def machine(device: torch.device) -> dict[str, str]:
    """Return what the figures depend on: processor, cores, memory, device and versions."""
    about = {
        "processor": _processor(),
        "cores": f"{os.cpu_count()}, {torch.get_num_threads()} threads used",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "python": platform.python_version(),
    }
    return about | {package: version(package) for package in PACKAGES}


def table(name: str, rows: Sequence[Row], earlier: Medians | None = None) -> str:
    """Return the rows as a Markdown table: median, half the interquartile range, unit, aim.

    With `earlier` medians, also those, and by which factor today's differ.
    """
    lines = [f"| {name} | median | ± | unit | aim |", "|---|---|---|---|---|"]
    lines += [f"| {r.name} | {r.median:.4g} | {r.spread:.2g} | {r.unit} | {r.aim} |" for r in rows]
    if earlier is not None:
        lines[0] += " earlier | now / earlier |"
        lines[1] += "---|---|"
        befores = [earlier.get((name, row.name)) for row in rows]
        for i, (row, before) in enumerate(zip(rows, befores, strict=True), start=2):
            lines[i] += f" {before:.4g} | {row.median / before:.2f} |" if before else " | |"
    return "\n".join(lines)


def _medians(parser: argparse.ArgumentParser, path: Path) -> Medians:
    """Return the medians of an earlier run by benchmark and row."""
    try:
        rows = json.loads(path.read_text())["rows"]
        return {(name, row["name"]): row["median"] for name, found in rows.items() for row in found}
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"--compare {path}: expected a file that --json wrote, got {type(error).__name__}: {error}")


def _as_dict(row: Row) -> dict[str, object]:
    return {
        "name": row.name,
        "median": row.median,
        "spread": row.spread,
        "unit": row.unit,
        "aim": row.aim,
        "values": list(row.values),
    }


def _device(parser: argparse.ArgumentParser, name: str) -> torch.device:
    if name != "cpu" and not name.startswith("cuda"):
        parser.error(f"--device is {name}, expected cpu, cuda or cuda:N")
    if name.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device is {name}, but PyTorch sees no CUDA device; leave it out to use the CPU")
    return torch.device(name)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
