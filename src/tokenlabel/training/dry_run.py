"""Dry run: print size, schedule, time and memory of a run before it starts. Saves nothing that a run continues from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from tokenlabel.drawing.page import Page, table
from tokenlabel.runtime.distributed import joined_ranks
from tokenlabel.runtime.runlog import Stopwatch
from tokenlabel.training.run_folder import check_apart
from tokenlabel.training.tasks import Summary, Task
from tokenlabel.training.trainer import Trainer, outer_steps, parts_of_batch, peak_memory_bytes, prepare, train_step

PICTURES_NAME = "first_batch.html"

_NUM_STEPS = 3  # of a dry run, after one that is not counted
_MAX_ROWS = 40  # of a table, as text


def dry_run(recipe: Any, build: Callable[..., Task[Any]], out: Path, *, device: torch.device) -> str:
    """Take a few steps of a run; return sizes, schedule, time, memory and losses as text.

    Also draws the first images of the first batch, as they are trained on, into OUT/first_batch.html. `build` makes the
    task of the recipe. Under torchrun all ranks take part.
    """
    check_apart(out, *recipe.data.image_folders)
    with joined_ranks(device) as ranks:
        parts_of_batch(recipe, ranks, device)  # for its errors, before the images are looked at
        task = build(recipe, device=device)
        trainer = prepare(task, ranks)
        summary = task.summary()
        sampler = trainer.sampler(0)
        batches = iter(task.batches(sampler))
        first = next(batches)
        if ranks.is_first:
            album = task.picture(first.to(device), trainer.part(0, 0), next(iter(sampler)))
            assert album is not None
            page = Page(f"Dry run of {out}", [album])
            page.add_album("The first batch, with its targets", album)
            if summary.table:
                headings, *rows = summary.table
                page.add(summary.title, table(headings, rows))
            page.write(out / PICTURES_NAME)
        lines = [*_sizes(trainer, summary), *_schedule(trainer), *_costs(trainer, chain([first], batches))]
        lines.append(("pictures", f"{out / PICTURES_NAME}: augmented images, with their targets"))
        return "\n".join([*(f"{name:<14} {text}" for name, text in lines), *_rows(summary)])


def _sizes(trainer: Trainer, summary: Summary) -> list[tuple[str, str]]:
    recipe, ranks, parameters = trainer.task.recipe, trainer.ranks, list(trainer.task.model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    part = recipe.batch_size // ranks.world_size // trainer.grad_accum_steps
    return [
        ("model", f"{summary.network}: {sum(p.numel() for p in parameters):,} parameters, {trained:,} trained"),
        ("images", summary.images),
        ("targets", summary.targets),
        (
            "batch",
            f"{recipe.batch_size:,} images: {ranks.world_size} process{'es' * (ranks.world_size > 1)} x "
            f"{trainer.grad_accum_steps} part{'s' * (trainer.grad_accum_steps > 1)} of {part:,}; {recipe.precision}",
        ),
    ]


def _schedule(trainer: Trainer) -> list[tuple[str, str]]:
    num_steps = trainer.num_steps
    warmup, _ = outer_steps(trainer.task.recipe.optim, trainer.steps_per_epoch)
    quarters = [num_steps * quarter // 4 for quarter in (1, 2, 3)]
    places = sorted({0, min(warmup, num_steps - 1), *quarters, num_steps - 1})
    rates = ", ".join(f"{trainer.learning_rate(step):.3g} at {step:,}" for step in places)
    return [("steps", f"{num_steps:,}, {trainer.steps_per_epoch:,} an epoch"), ("learning rate", rates)]


def _costs(trainer: Trainer, batches: Iterator[Any]) -> list[tuple[str, str]]:
    """Take one step to warm up and `_NUM_STEPS` timed ones; return time, memory and the last losses."""
    watch = Stopwatch()
    num_steps = min(1 + _NUM_STEPS, trainer.num_steps)
    losses: dict[str, float] = {}
    for step in range(num_steps):
        if step == 1:
            watch.lap()
        result = train_step(trainer, batches, step, watch)
        losses = {name: float(value) for name, value in result.values.items()}  # float() waits for the device
    seconds = {name: part_s / max(1, num_steps - 1) for name, part_s in watch.lap().items()}
    total_s = seconds.pop("total")
    shares = {**seconds, "model": total_s - sum(seconds.values())}
    parts = ", ".join(f"{name} {part_s / total_s:.0%}" for name, part_s in shares.items())
    where = "of the GPU" if trainer.task.device.type == "cuda" else "of this process"
    return [
        ("a step", f"{total_s:.3g} s: {parts}"),
        ("the run", f"{timedelta(seconds=round(total_s * trainer.num_steps))} on this machine, without evaluation"),
        ("memory", f"{peak_memory_bytes(trainer.task.device) / 1e9:.3g} GB at most, {where}"),
        ("losses", ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in losses.items())),
    ]


def _rows(summary: Summary) -> list[str]:
    """Return the lines of the summary's table in columns; a long one is cut, and whole only in the HTML page."""
    if not summary.table:
        return []
    shown = summary.table[: 1 + _MAX_ROWS]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in shown
    ]
    if more := len(summary.table) - len(shown):
        lines.append(f"... and {more:,} more rows in {PICTURES_NAME}")
    return ["", f"{summary.title}:", *lines]
