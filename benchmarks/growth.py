"""What the label path costs as the batch, the tokens, the palette and the classes grow.

    python -m benchmarks.growth [--out docs/images/growth.png]

*Targets* is `align`; *targets + head + loss* adds the fused token head (width 240, LV-ViT-T's), forward and
backward. From 8 images, 196 tokens, palettes of 40 and 1,000 classes on one number changes at a time. Memory is the
peak above the inputs; the weight of the head and its gradient grow with the classes, too.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import nn

from benchmarks.label_path import draw_boxes, draw_score_map
from benchmarks.measure import Row, Settings, interleave, peak_bytes
from tokenlabel.core.align import align
from tokenlabel.core.batch import collate_score_maps
from tokenlabel.core.geometry import View, stack_views
from tokenlabel.core.losses import linear_cross_entropy

WIDTH = 240
WAYS = ("targets", "targets + head + loss")


@dataclass(frozen=True, slots=True)
class Point:
    """The sizes of one measurement."""

    images: int = 8
    tokens: int = 196
    palette: int = 40
    classes: int = 1000


AXES: Mapping[str, Sequence[int]] = {
    "images": (2, 8, 32),
    "tokens": (49, 196, 784),
    "palette": (5, 20, 80),
    "classes": (100, 1000, 10_000),
}


@dataclass(frozen=True, slots=True)
class Cost:
    """What one way takes at a point: the seconds of every round, and bytes."""

    seconds: Sequence[float]
    peak_bytes: int

    @property
    def ms(self) -> float:
        """The median time in milliseconds."""
        return 1e3 * median(self.seconds)

    @property
    def mib(self) -> float:
        """The peak in MiB."""
        return self.peak_bytes / 2**20


Costs = Mapping[tuple[str, Point], Cost]


def run(settings: Settings) -> list[Row]:
    """Measure how many times time and memory grow from one end of each axis to the other."""
    return rows_of(measure(settings))


def measure(settings: Settings) -> Costs:
    """Return what each way costs at each point of each axis; an axis takes its turns together."""
    costs: dict[tuple[str, Point], Cost] = {}
    for axis, sizes in AXES.items():
        chosen = (sizes[0], sizes[-1]) if settings.quick else sizes
        ways: dict[tuple[str, Point], Callable[[], object]] = {}
        for size in chosen:
            point = replace(Point(), **{axis: size})
            for way, function in zip(WAYS, _functions(point, settings), strict=True):
                ways[way, point] = function
        named = {str(number): function for number, function in enumerate(ways.values())}
        seconds = interleave(named, settings, rounds=3 if settings.quick else 11)
        for (key, function), values in zip(ways.items(), seconds.values(), strict=True):
            costs[key] = Cost(values, peak_bytes(function, settings))
    return costs


def rows_of(costs: Costs) -> list[Row]:
    """Return the growth of time and memory along each axis."""
    rows = []
    for axis, sizes in AXES.items():
        first, last = (replace(Point(), **{axis: size}) for size in (sizes[0], sizes[-1]))
        title = f"{axis} x {sizes[-1] // sizes[0]} ({sizes[0]:,} to {sizes[-1]:,})"
        for way in WAYS:
            few, many = costs[way, first], costs[way, last]
            times = [b / a for a, b in zip(few.seconds, many.seconds, strict=True)]
            rows.append(Row(f"{title}: time of {way}", times, "x"))
            rows.append(Row(f"{title}: memory of {way}", [many.peak_bytes / few.peak_bytes], "x"))
    return rows


def draw(costs: Costs, out: Path) -> None:
    """Draw time and memory against each axis, on logarithmic scales, with the line of proportional growth."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, len(AXES), figsize=(11, 5), sharey="row", layout="constrained")
    colours = dict(zip(WAYS, ("#1f77b4", "#d95f02"), strict=True))
    for column, (axis, sizes) in enumerate(AXES.items()):
        points = [replace(Point(), **{axis: size}) for size in sizes]
        for row, (quantity, unit) in enumerate((("ms", "time (ms)"), ("mib", "peak memory (MiB)"))):
            panel = panels[row][column]
            dotted: str | None = "in proportion"
            for way in WAYS:
                values = [getattr(costs[way, point], quantity) for point in points]
                panel.loglog(sizes, values, "o-", label=way, color=colours[way])
                middle = len(sizes) // 2
                proportional = [values[middle] * size / sizes[middle] for size in sizes]
                panel.loglog(sizes, proportional, ":", color=colours[way], alpha=0.5, label=dotted)
                dotted = None
            panel.set_xticks(sizes, [f"{size:,}" for size in sizes])
            panel.minorticks_off()
            panel.grid(alpha=0.3)
            if column == 0:
                panel.set_ylabel(unit)
            if row == 1:
                panel.set_xlabel(axis)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=80)
    pyplot.close(figure)


def _functions(point: Point, settings: Settings) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return both ways on inputs of a point's sizes."""
    rng, device, side = np.random.default_rng(0), settings.device, math.isqrt(point.tokens)
    maps = [draw_score_map(rng, point.classes, point.palette) for _ in range(point.images)]
    score_maps = collate_score_maps(maps).to(device)
    views = stack_views([View.crop(box) for box in draw_boxes(rng, point.images)])
    targets = partial(align, score_maps, torch.from_numpy(views).to(device), (side, side))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(point.images, point.tokens, WIDTH, generator=generator).to(device).requires_grad_()
    head = nn.Linear(WIDTH, point.classes).to(device)

    def whole() -> None:
        torch.autograd.grad(linear_cross_entropy(tokens, head, targets()), [tokens, *head.parameters()])

    return targets, whole


def _table(costs: Costs) -> str:
    lines = ["| images | tokens | palette | classes | " + " | ".join(WAYS) + " |", "|---" * 6 + "|"]
    for point in dict.fromkeys(point for _, point in costs):
        cells = [f"{costs[way, point].ms:.1f} ms, {costs[way, point].mib:.1f} MiB" for way in WAYS]
        sizes = (point.images, point.tokens, point.palette, point.classes)
        lines.append(f"| {' | '.join(f'{size:,}' for size in sizes)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure every point, print the table and draw the picture."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/images/growth.png"), help="the picture")
    options = parser.parse_args()
    costs = measure(Settings(torch.device("cpu")))
    print(_table(costs))
    draw(costs, options.out)


if __name__ == "__main__":
    main()
