"""Run benchmarks: `python -m benchmarks [NAME ...] [--quick] [--device cpu|cuda] [--json FILE]`."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks import annotate_speed, data_speed, label_path, model_speed, store_speed, token_head
from benchmarks.measure import Row, Settings

BENCHMARKS: dict[str, Callable[[Settings], list[Row]]] = {
    "data_speed": data_speed.run,
    "label_path": label_path.run,
    "model_speed": model_speed.run,
    "token_head": token_head.run,
    "store_speed": store_speed.run,
    "annotate_speed": annotate_speed.run,
}

PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow", "safetensors", "tokenlabel")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmarks that the command line names, all by default."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Measure speed, memory and storage."
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"which to run: {', '.join(BENCHMARKS)} (default: all)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="smaller and fewer rounds: all under two minutes"
    )
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every measurement here as well")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"no benchmark is called {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    settings = Settings(device=_device(parser, options.device), quick=options.quick)

    about = machine(settings.device)
    print("\n".join(f"| {what} | {value} |" for what, value in about.items()), flush=True)
    results = {}
    for name in options.names or BENCHMARKS:
        results[name] = BENCHMARKS[name](settings)
        print(f"\n{table(name, results[name])}", flush=True)
    if options.json:
        rows = {name: [_as_dict(row) for row in found] for name, found in results.items()}
        options.json.write_text(
            json.dumps({"machine": about, "quick": settings.quick, "rows": rows}, indent=1) + "\n"
        )


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


def table(name: str, rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table: median, half the interquartile range, unit, aim."""
    lines = [f"| {name} | median | ± | unit | aim |", "|---|---|---|---|---|"]
    lines += [f"| {r.name} | {r.median:.4g} | {r.spread:.2g} | {r.unit} | {r.aim} |" for r in rows]
    return "\n".join(lines)


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
