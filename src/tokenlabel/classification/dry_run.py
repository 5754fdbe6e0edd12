"""Rehearsals: what can be known of a long run before it starts. Nothing is saved that a run would continue from."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.profiler import ProfilerActivity

from tokenlabel.classification.task import ClassifierTask, build
from tokenlabel.core.batch import Batch, normalize_images
from tokenlabel.core.config import ErasingConfig, MixConfig
from tokenlabel.core.step import make_targets
from tokenlabel.data.augment import EvalTransform
from tokenlabel.data.batches import TokenLabelDataset, collate
from tokenlabel.data.images import ImageSubset
from tokenlabel.drawing.pictures import enlarged, with_cells
from tokenlabel.runtime.configuration import ConfigError
from tokenlabel.runtime.distributed import joined_ranks
from tokenlabel.runtime.runlog import Stopwatch
from tokenlabel.training.engine import Training, prepare, train_step
from tokenlabel.training.progress import peak_memory_bytes
from tokenlabel.training.recipe import Recipe
from tokenlabel.training.run_folder import check_apart
from tokenlabel.training.tasks import autocast

PICTURE_NAME, TRACE_NAME = "first_batch.png", "trace.json"

_NUM_STEPS = 3  # of a dry run and a profile, after one that is not counted
_NUM_PICTURES, _NUM_COLUMNS, _GAP_PX = 12, 3, 8
_NUM_OPERATIONS = 15  # that a profile lists
_CERTAIN = 0.5  # what a token's label gives to one class where it names one


@dataclass(frozen=True)
class _Steps:
    """What a few steps took, on average, and what the last one said."""

    seconds: dict[str, float]
    values: dict[str, float]


def dry_run(recipe: Recipe, out: Path, *, device: torch.device) -> str:
    """Take a few steps of a run and return, as text, all that follows: sizes, schedule, time, memory, loss.

    Also draws the first augmented images beside the labels of their tokens into OUT/first_batch.png (before
    erasing and mixing). Under torchrun all processes take part; the text is that of the first.
    """
    with joined_ranks(device) as ranks:
        check_apart(out, recipe.data.train, recipe.data.unlabelled, recipe.data.val)
        task = build(recipe, device=device)
        training = prepare(task, ranks)
        pictures = _first_pictures(training, task)
        steps = _take_steps(training, lambda: None)
        if ranks.is_first:
            out.mkdir(parents=True, exist_ok=True)
            pictures.save(out / PICTURE_NAME)
        lines = [*_sizes(training, task), *_schedule(training), *_costs(training, steps)]
        where = f"{out / PICTURE_NAME}: augmented images, each beside what its tokens are told"
        lines.append(("pictures", where))
        return "\n".join(f"{name:<14} {text}" for name, text in lines)


def profile(recipe: Recipe, out: Path, *, device: torch.device) -> str:
    """Take a few steps of a run under PyTorch's profiler; write OUT/trace.json, return the costliest operations.

    The trace opens in Chrome (chrome://tracing) and at ui.perfetto.dev. Of several processes the first is
    profiled.
    """
    with joined_ranks(device) as ranks:
        training = prepare(build(recipe, device=device), ranks)
        on_gpu = device.type == "cuda"
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler writes of its own accord otherwise
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        timetable = torch.profiler.schedule(wait=0, warmup=1, active=_NUM_STEPS, repeat=1)
        with torch.profiler.profile(activities=activities, schedule=timetable) as profiler:
            _take_steps(training, profiler.step)
        if ranks.is_first:
            out.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(out / TRACE_NAME))
        costliest = profiler.key_averages().table(
            sort_by=f"self_{'device' if on_gpu else 'cpu'}_time_total",
            row_limit=_NUM_OPERATIONS,
            max_name_column_width=40,
        )
        return f"{costliest}\n{_NUM_STEPS} steps in {out / TRACE_NAME}: open it at ui.perfetto.dev"


def overfit(recipe: Recipe, num_images: int, *, device: torch.device, num_steps: int = 200) -> Iterator[str]:
    """Train on a few images again and again, without augmentation, and yield lines that say how it goes.

    Data, labels, model, loss and optimizer are those of the recipe; its regularisation is left out (augmentation,
    mixing, erasing, label smoothing, weight decay), and the learning rate is its peak, unscaled. A model that
    cannot learn a few images by heart will not learn many.
    """
    if num_images < 1:
        raise ConfigError(f"--overfit takes at least 1 image, got {num_images}")
    with joined_ranks(device) as ranks:
        task = _on_few_images(recipe, num_images, num_steps, device)
        training = prepare(task, ranks)
        batches = iter(task.batches(training.sampler(0)))
        for step in range(num_steps):
            values = train_step(training, batches, step, Stopwatch()).values
            if (step + 1) % (num_steps // 10) == 0:
                yield f"step {step + 1:>4}  {_spelled({name: float(value) for name, value in values.items()})}"
        top1, tokens = _learnt(task)
    learnt = [f"{top1:.1%} of the images are learnt"] if top1 is not None else []
    learnt += [f"{tokens:.1%} of the tokens that are told a class name it"] if tokens is not None else []
    yield f"{num_images} images, {num_steps} steps: {', '.join(learnt) or 'nothing that could be told'}"
    if top1 is not None and top1 < 1:
        yield "Too few: look at the pictures of --dry-run, at optim.lr, and at whether the classes can be told apart."


def _take_steps(training: Training, after_step: Callable[[], Any]) -> _Steps:
    """Take one step to warm up and `_NUM_STEPS` that are timed."""
    batches, watch = iter(training.task.batches(training.sampler(0))), Stopwatch()
    num_steps = min(1 + _NUM_STEPS, training.num_steps)
    values: dict[str, float] = {}
    for step in range(num_steps):
        if step == 1:
            watch.lap()
        result = train_step(training, batches, step, watch)
        values = {name: float(value) for name, value in result.values.items()}  # waits for the device
        after_step()
    num_timed = max(1, num_steps - 1)
    return _Steps({name: part_s / num_timed for name, part_s in watch.lap().items()}, values)


def _sizes(training: Training, task: ClassifierTask) -> list[tuple[str, str]]:
    recipe, ranks, parameters = task.recipe, training.ranks, list(task.model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    height_px, width_px = recipe.model.img_size
    part = recipe.batch_size // ranks.world_size // training.grad_accum_steps
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
            f"{training.grad_accum_steps} part{'s' * (training.grad_accum_steps > 1)} of {part:,}; {recipe.precision}",
        ),
    ]


def _schedule(training: Training) -> list[tuple[str, str]]:
    num_steps, optim = training.num_steps, training.task.recipe.optim
    warmup = optim.warmup_steps
    if warmup is None:
        warmup = round(optim.warmup_epochs * training.steps_per_epoch)
    quarters = [num_steps * quarter // 4 for quarter in (1, 2, 3)]
    places = sorted({0, min(warmup, num_steps - 1), *quarters, num_steps - 1})
    rates = ", ".join(f"{training.learning_rate(step):.3g} at {step:,}" for step in places)
    return [
        ("steps", f"{num_steps:,}, {training.steps_per_epoch:,} an epoch"),
        ("learning rate", rates),
    ]


def _costs(training: Training, steps: _Steps) -> list[tuple[str, str]]:
    seconds = dict(steps.seconds)
    total_s = seconds.pop("total")
    shares = {**seconds, "model": total_s - sum(seconds.values())}
    told = ", ".join(f"{name} {part_s / total_s:.0%}" for name, part_s in shares.items())
    where = "of the GPU" if training.task.device.type == "cuda" else "of this process"
    return [
        ("a step", f"{total_s:.3g} s: {told}"),
        (
            "the run",
            f"{timedelta(seconds=round(total_s * training.num_steps))} on this machine, without evaluation",
        ),
        ("memory", f"{peak_memory_bytes(training.task.device) / 1e9:.3g} GB at most, {where}"),
        ("says", _spelled(steps.values)),
    ]


def _spelled(values: dict[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in values.items())


def _first_pictures(training: Training, task: ClassifierTask) -> Image.Image:
    """Return the first augmented images of a run, each beside the labels of its tokens."""
    first = next(iter(training.sampler(0)))[:_NUM_PICTURES]
    batch = collate([task.train_set[place] for place in first])
    targets = make_targets(batch.to(task.device), task.supervision, task.grid).tokens
    pairs = []
    for i in range(len(first)):
        pixels = batch.images[i].permute(1, 2, 0).numpy()
        pictures = [enlarged(pixels)]
        if targets is not None:
            probs = targets.dense(task.model.num_token_classes)[i].reshape(*task.grid, -1).cpu().numpy()
            pictures.append(with_cells(pixels, probs, task.token_names))
        pairs.append(pictures)
    return _sheet(pairs)


def _sheet(rows_of_pictures: list[list[Image.Image]]) -> Image.Image:
    """Return groups of pictures of one size on one sheet, `_NUM_COLUMNS` groups a row."""
    width, height = rows_of_pictures[0][0].size
    group_width = width * len(rows_of_pictures[0]) + _GAP_PX
    num_rows = -(-len(rows_of_pictures) // _NUM_COLUMNS)
    sheet = Image.new("RGB", (group_width * _NUM_COLUMNS, (height + _GAP_PX) * num_rows), "white")
    for number, pictures in enumerate(rows_of_pictures):
        row, column = divmod(number, _NUM_COLUMNS)
        for place, picture in enumerate(pictures):
            sheet.paste(picture, (group_width * column + width * place, (height + _GAP_PX) * row))
    return sheet


def _on_few_images(recipe: Recipe, num_images: int, num_steps: int, device: torch.device) -> ClassifierTask:
    """Return a task of a recipe that learns a few of its images by heart."""
    few = replace(
        recipe,
        data=replace(recipe.data, num_workers=0, val=None, tar_window=None),
        optim=replace(
            recipe.optim,
            lr_batch_size=num_images,
            schedule="constant",
            warmup_steps=num_steps // 10,
            cooldown_epochs=0.0,
            weight_decay=0.0,
            ema_decay=None,
        ),
        mix=MixConfig(),
        erase=ErasingConfig(),
        loss=replace(recipe.loss, label_smoothing=0.0),
        batch_size=num_images,
        micro_batch_size=None,
        epochs=None,
        num_steps=num_steps,
    )
    task = build(few, device=device)
    if num_images > task.num_images:
        raise ConfigError(
            f"--overfit takes at most the {task.num_images:,} images that there are, got {num_images}"
        )
    source = task.train_set.source
    chosen = (
        np.linspace(0, len(source) - 1, num_images).round().astype(np.int64)
    )  # images are sorted by class
    plain = EvalTransform(recipe.model.img_size, crop_fraction=1.0)
    images = TokenLabelDataset(
        ImageSubset(source, chosen), plain, seed=recipe.seed, store=task.train_set.store
    )
    return replace(task, train_set=images)


def _learnt(task: ClassifierTask) -> tuple[float | None, float | None]:
    """Return the shares of the images, and of their tokens that are told one class, whose class the model names.

    None where nothing is known.
    """
    batch: Batch = collate([task.train_set[0, i] for i in range(task.num_images)]).to(task.device)
    model = task.model.eval()
    with torch.inference_mode(), autocast(task.device, task.recipe.precision):
        outputs = model(normalize_images(batch.images, mean=model.mean, std=model.std))
        known, top1 = batch.has_class, None
        if known.any():
            right = outputs.class_logits[known].argmax(dim=1) == batch.class_ids[known]
            top1 = float(right.float().mean())
        targets = make_targets(batch, task.supervision, task.grid).tokens
        if targets is None:
            return top1, None
        certainty, told = targets.dense(task.model.num_token_classes).max(dim=2)  # [B, N]
        named = (outputs.token_logits.argmax(dim=2) == told)[certainty >= _CERTAIN]
        return top1, float(named.float().mean()) if len(named) else None
