"""The dry run: what can be known of a long run before it starts. It saves nothing that a run would continue from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain
from pathlib import Path

import torch

from tokenlabel.classification.task import ClassifierTask, build
from tokenlabel.core.batch import Batch
from tokenlabel.core.step import Part
from tokenlabel.drawing.page import Page
from tokenlabel.runtime.distributed import joined_ranks
from tokenlabel.runtime.runlog import Stopwatch
from tokenlabel.training.engine import Trainer, prepare, train_step
from tokenlabel.training.progress import peak_memory_bytes
from tokenlabel.training.recipe import Recipe
from tokenlabel.training.run_folder import check_apart

PICTURES_NAME = "first_batch.html"

_NUM_STEPS = 3  # of a dry run, after one that is not counted


@dataclass(frozen=True)
class _Steps:
    """What a few steps took, on average, and what the last one said."""

    seconds: dict[str, float]
    values: dict[str, float]


def dry_run(recipe: Recipe, out: Path, *, device: torch.device) -> str:
    """Take a few steps of a run and return, as text, all that follows: sizes, schedule, time, memory, loss.

    Also draws the first images of the first batch, as they are trained on, into OUT/first_batch.html. Under torchrun
    all processes take part; the text is that of the first.
    """
    with joined_ranks(device) as ranks:
        check_apart(out, recipe.data.train, recipe.data.unlabelled, recipe.data.val)
        task = build(recipe, device=device)
        trainer = prepare(task, ranks)
        sampler = trainer.sampler(0)
        batches = iter(task.batches(sampler))
        first = next(batches)
        if ranks.is_first:
            part = Part(recipe.seed, 0, sampler.part_start(0))
            album = task.picture(first.to(device), part, next(iter(sampler)))
            page = Page(f"Dry run of {out}", [album])
            page.add_album("The first batch, with the targets of its tokens", album)
            page.write(out / PICTURES_NAME)
        steps = _take_steps(trainer, chain([first], batches))
        lines = [*_sizes(trainer, task), *_schedule(trainer), *_costs(trainer, steps)]
        where = f"{out / PICTURES_NAME}: augmented images, with the targets of their tokens"
        lines.append(("pictures", where))
        return "\n".join(f"{name:<14} {text}" for name, text in lines)


def _take_steps(trainer: Trainer, batches: Iterator[Batch]) -> _Steps:
    """Take one step to warm up and `_NUM_STEPS` that are timed."""
    watch = Stopwatch()
    num_steps = min(1 + _NUM_STEPS, trainer.num_steps)
    values: dict[str, float] = {}
    for step in range(num_steps):
        if step == 1:
            watch.lap()
        result = train_step(trainer, batches, step, watch)
        values = {name: float(value) for name, value in result.values.items()}  # waits for the device
    num_timed = max(1, num_steps - 1)
    return _Steps({name: part_s / num_timed for name, part_s in watch.lap().items()}, values)


def _sizes(trainer: Trainer, task: ClassifierTask) -> list[tuple[str, str]]:
    recipe, ranks, parameters = task.recipe, trainer.ranks, list(task.model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    height_px, width_px = recipe.model.img_size
    part = recipe.batch_size // ranks.world_size // trainer.grad_accum_steps
    rows, columns = task.grid
    folders = " + ".join(recipe.data.label_folders)
    labels = folders if task.supervision.stored else recipe.loss.teacher.name
    others = f" and {task.token_classes} for the tokens" if task.token_classes is not None else ""
    about = f"{len(task.class_names):,} classes{others}" if task.class_names else f"no classes{others}"
    told = f"tokens are told by {labels}" if task.supervision.labels_tokens else "tokens are told nothing"
    return [
        (
            "model",
            f"{recipe.model.name}: {sum(p.numel() for p in parameters):,} parameters, {trained:,} trained",
        ),
        ("images", f"{task.counts}; {about}, {width_px} x {height_px} px"),
        ("targets", f"{rows} x {columns} tokens; {told}"),
        (
            "batch",
            f"{recipe.batch_size:,} images: {ranks.world_size} process{'es' * (ranks.world_size > 1)} x "
            f"{trainer.grad_accum_steps} part{'s' * (trainer.grad_accum_steps > 1)} of {part:,}; {recipe.precision}",
        ),
    ]


def _schedule(trainer: Trainer) -> list[tuple[str, str]]:
    num_steps, optim = trainer.num_steps, trainer.task.recipe.optim
    warmup = optim.warmup_steps
    if warmup is None:
        warmup = round(optim.warmup_epochs * trainer.steps_per_epoch)
    quarters = [num_steps * quarter // 4 for quarter in (1, 2, 3)]
    places = sorted({0, min(warmup, num_steps - 1), *quarters, num_steps - 1})
    rates = ", ".join(f"{trainer.learning_rate(step):.3g} at {step:,}" for step in places)
    return [
        ("steps", f"{num_steps:,}, {trainer.steps_per_epoch:,} an epoch"),
        ("learning rate", rates),
    ]


def _costs(trainer: Trainer, steps: _Steps) -> list[tuple[str, str]]:
    seconds = dict(steps.seconds)
    total_s = seconds.pop("total")
    shares = {**seconds, "model": total_s - sum(seconds.values())}
    told = ", ".join(f"{name} {part_s / total_s:.0%}" for name, part_s in shares.items())
    where = "of the GPU" if trainer.task.device.type == "cuda" else "of this process"
    return [
        ("a step", f"{total_s:.3g} s: {told}"),
        (
            "the run",
            f"{timedelta(seconds=round(total_s * trainer.num_steps))} on this machine, without evaluation",
        ),
        ("memory", f"{peak_memory_bytes(trainer.task.device) / 1e9:.3g} GB at most, {where}"),
        ("says", _spelled(steps.values)),
    ]


def _spelled(values: dict[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in values.items())
