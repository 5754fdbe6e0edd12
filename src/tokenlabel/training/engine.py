"""The training loop, whatever is trained: step, average, evaluate, save, resume; in one process or in many.

A `Task` says what the model, the images and the loss are. A step is a function of the weights, the recipe and the
number of the step: its images, their augmentation, the mix and every random draw inside the model follow from
(seed, step). So a run that was stopped anywhere continues from its last checkpoint to the very same weights, and
nothing random is ever stored.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.fsdp import FSDPModule

from tokenlabel.drawing.pictures import PICTURES_FOLDER
from tokenlabel.models.runs import list_checkpoints
from tokenlabel.runtime.distributed import Ranks, joined_ranks, usable_device
from tokenlabel.runtime.errors import ModelError, OutputError
from tokenlabel.runtime.process import Interrupted, caught_signals
from tokenlabel.runtime.runlog import CHANGED_NUMERICS, RunLog, Stopwatch, Tracker, open_trackers, read_metrics
from tokenlabel.training.checkpoint import load_checkpoint, prune_checkpoints, save_checkpoint
from tokenlabel.training.run_folder import check_apart, check_run_folder, evaluated_as, locked
from tokenlabel.training.tasks import Task
from tokenlabel.training.trainer import (
    StepResult,
    Trainer,
    outer_steps,
    parts_of_batch,
    peak_memory_bytes,
    prepare,
    train_step,
)

LOG_EVERY_STEPS = 10
# Figures of an evaluation that are printed beside the task's own.
_SHOWN_FIGURES = ("knn", "image_probe", "teacher_accuracy")


def train_in(
    run: str | Path,
    recipe: Any,
    build: Callable[..., Task[Any]],
    *,
    device: torch.device | str,
    trackers: Sequence[Tracker] = (),
    changed_numerics: bool = False,
) -> dict[str, Any]:
    """Train the task that `build` makes of a recipe, holding the lock of the run folder; see `run_task`."""
    device, run = usable_device(device), Path(run)
    check_apart(run, *recipe.data.image_folders)
    with joined_ranks(device) as ranks, locked(run, ranks), ExitStack() as opened:
        parts_of_batch(recipe, ranks, device)  # for its errors, before the images are looked at
        entered = list[Tracker]()
        ranks.on_main(lambda: entered.extend(open_trackers(trackers, opened)))
        return run_task(
            build(recipe, device=device, run=run),
            run,
            ranks=ranks,
            eval_every_epochs=recipe.eval.every_epochs,
            trackers=entered,
            changed_numerics=changed_numerics,
        )


def run_task(
    task: Task[Any],
    run: Path,
    *,
    ranks: Ranks,
    eval_every_epochs: float,
    trackers: Sequence[Tracker] = (),
    changed_numerics: bool = False,
) -> dict[str, Any]:
    """Train a task in a run folder, from its newest checkpoint if there is one; return its last evaluation.

    `trackers` receive every line of metrics (on the first rank). `changed_numerics`: go on with another rounding (see
    `check_run_folder`).
    The folder receives recipe.yaml, metrics.jsonl and checkpoints/. Raises ConfigError if it holds a run of
    another recipe or other images, `Interrupted` after SIGINT or SIGTERM on any rank, ValueError.
    """
    outcome = _train(task, run, ranks, eval_every_epochs, trackers, changed_numerics)
    if isinstance(outcome, Interrupted):
        # Raised here, where nothing of the training is left: what ranks share must be gone before they part.
        raise outcome
    return outcome


def _train(
    task: Task[Any],
    run: Path,
    ranks: Ranks,
    eval_every_epochs: float,
    trackers: Sequence[Tracker],
    changed_numerics: bool,
) -> dict[str, Any] | Interrupted:
    trainer = prepare(task, ranks)
    changed = ranks.on_main(
        lambda: check_run_folder(
            run,
            task.recipe,
            task.class_names,
            task.images,
            token_classes=task.token_classes,
            changed_numerics=changed_numerics,
        )
    )
    step = _resume(trainer, run)
    log = RunLog(
        run, start_step=step, num_steps=trainer.num_steps, title=run.name, active=ranks.is_first, trackers=trackers
    )
    figures = ranks.on_main(lambda: _logged_evaluation(run, step, _how(task)))
    if changed:
        log.write(step, kind=CHANGED_NUMERICS, **changed)
        said = ", ".join(f"{name} {now} in place of {before}" for name, (before, now) in changed.items())
        log.say(f"from step {step:,} on with {said}")
    _say_learning_rate(trainer, log)
    try:
        return _loop(trainer, run, log, figures, start_step=step, eval_every=eval_every_epochs)
    finally:
        log.close()


def _resume(trainer: Trainer, run: Path) -> int:
    """Load the newest checkpoint of a run, on all ranks; return its step, 0 without one."""
    checkpoints = list_checkpoints(run)
    step = load_checkpoint(checkpoints[-1], trainer.state) if checkpoints else 0
    steps = trainer.ranks.all_gather(step)
    if len(set(steps)) > 1:
        raise ModelError(
            f"{run}: the processes find checkpoints of different steps ({', '.join(map(str, steps))}); "
            "the run folder must be the same one for all"
        )
    return step


def _loop(
    trainer: Trainer, run: Path, log: RunLog, figures: dict[str, Any] | None, *, start_step: int, eval_every: float
) -> dict[str, Any] | Interrupted:
    """Take the steps that are left; return the last evaluation, or after which step the run was asked to stop.

    `figures`: of an evaluation at the first step, if it counts. `eval_every`: epochs.
    """
    ranks, checkpoint = trainer.ranks, trainer.task.recipe.checkpoint
    batches = iter(trainer.task.batches(trainer.sampler(start_step)))
    # A checkpoint is written before the evaluation of its step.
    if figures is None and start_step and trainer.due(start_step, eval_every):
        figures = _evaluate(trainer, run, log, start_step)  # the run was stopped before it could
        _prune(trainer, run, start_step)
    watch, results = Stopwatch(), list[StepResult]()  # of the steps since the last report

    def save(done: int) -> None:
        _report(trainer, run, log, done, results, watch)  # a state that diverged is never saved
        with watch.paused():
            _write_checkpoint(trainer, run, done)

    with caught_signals() as received:
        batches = _pictured(trainer, run, batches, start_step, watch)
        for step in range(start_step, trainer.num_steps):
            results.append(train_step(trainer, batches, step, watch))
            done, is_last = step + 1, step + 1 == trainer.num_steps
            log.bar.update()
            if done % LOG_EVERY_STEPS == 0:
                _report(trainer, run, log, done, results, watch)
            # The ranks agree on whether to stop: a signal may have reached some of them only.
            stopping = ranks.all_reduce_max(received[0] if received else 0)
            saved = trainer.due(done, checkpoint.every_epochs) or stopping > 0
            if saved:  # before the evaluation, which may take longer than whoever stops the run will wait
                save(done)
            if trainer.due(done, eval_every) and (is_last or not stopping):
                with watch.paused():
                    figures = _evaluate(trainer, run, log, done)
                stopping = ranks.all_reduce_max(received[0] if received else 0)
            if stopping and not saved:
                save(done)
            if saved or stopping:
                _prune(trainer, run, done)
            if stopping and not is_last:
                return Interrupted(done, stopping)
    return figures or {}


def _pictured(trainer: Trainer, run: Path, batches: Iterator[Any], step: int, watch: Stopwatch) -> Iterator[Any]:
    """Write pictures of the first batch that a run takes, unless it has some; return all batches, that one included."""
    folder, task = run / PICTURES_FOLDER, trainer.task
    is_known = step > 0 and (folder / "train.json").exists()
    if not trainer.ranks.is_first or is_known or step == trainer.num_steps:
        return batches
    with watch.part("data"):
        first = next(batches)
    with watch.paused():
        indices = next(iter(trainer.sampler(step)))
        album = task.picture(first.to(task.device), trainer.part(step, 0), indices)
        if album is not None:
            album.write(folder, "train", step=step, num_steps=trainer.num_steps)
    return itertools.chain([first], batches)


def _how(task: Task[Any]) -> str:
    return evaluated_as(task.recipe, task.images, task.metric)


def _logged_evaluation(run: Path, step: int, how: str) -> dict[str, Any] | None:
    """Return the figures of an evaluation at a step that was written down; None if there was none.

    `how`: its settings, see `evaluated_as`.
    """
    lines = [line for line in read_metrics(run) if line["kind"] == "eval" and line["step"] == step]
    lines = [line for line in lines if line.get("evaluated_as") == how]
    return {k: v for k, v in lines[-1].items() if k not in ("step", "kind", "evaluated_as")} if lines else None


def _say_learning_rate(trainer: Trainer, log: RunLog) -> None:
    recipe = trainer.task.recipe
    if recipe.batch_size != recipe.optim.lr_batch_size:
        scaled = recipe.optim.lr * recipe.batch_size / recipe.optim.lr_batch_size
        log.say(
            f"learning rate {scaled:.3g} for batches of {recipe.batch_size} "
            f"({recipe.optim.lr:.3g} for {recipe.optim.lr_batch_size})"
        )
    warmup, cooldown = outer_steps(recipe.optim, trainer.steps_per_epoch)
    if warmup + cooldown >= trainer.num_steps:
        log.say(
            f"warm-up ({warmup:,} steps) and cool-down ({cooldown:,}) leave the schedule nothing of the "
            f"{trainer.num_steps:,} steps: good for trying things out, not for learning much"
        )
    optim, num_steps = recipe.optim, trainer.num_steps
    # Without its warm-up the average begins as the initial weights, and forgets them at the same rate all along.
    left = 0.0 if optim.ema_decay is None or optim.ema_warmup else optim.ema_decay**num_steps
    if left > 0.05:
        log.say(
            f"the averaged weights, which are evaluated, will be {left:.0%} the initial ones after {num_steps:,} "
            f"steps: ema_decay {optim.ema_decay} is for longer runs; give --optim.ema-warmup true"
        )


@dataclass(frozen=True)
class Divergence:
    """The first step at which `what` (loss or gradient) was not finite, on the rank that had it first."""

    step: int
    what: str
    value: float
    keys: Sequence[str]


def _means(results: Sequence[StepResult], ranks: Ranks, done: int) -> tuple[dict[str, float], Divergence | None]:
    """Return the mean of each value over some steps and all ranks. All ranks call this.

    `done`: the number of steps that the run has done, the last of `results` included.
    """
    # The first look at the steps' tensors: only here is the device waited for.
    values = {
        name: torch.stack([result.values[name].float() for result in results]).tolist() for name in results[0].values
    }
    every = ranks.all_gather(values)
    means = {name: float(np.mean([rank[name] for rank in every])) for name in values}
    for name, what in (("loss", "loss"), ("gradient_norm", "norm of the gradient")):
        if math.isfinite(means.get(name, 0.0)):
            continue
        of_steps = np.array([rank[name] for rank in every])  # [ranks, steps]
        number = int(np.argmin(np.isfinite(of_steps).all(axis=0)))
        rank = int(np.argmin(np.isfinite(of_steps[:, number])))
        keys = ranks.all_gather(results[number].keys)[rank]
        return means, Divergence(done - len(results) + number, what, of_steps[rank, number], keys)
    return means, None


def _report(trainer: Trainer, run: Path, log: RunLog, done: int, results: list[StepResult], watch: Stopwatch) -> None:
    """Write the means over the steps since the last report, and forget these. Raises ValueError for a loss that is
    not finite.
    """
    if not results:
        return
    num_steps, seconds = len(results), watch.lap()
    means, divergence = _means(results, trainer.ranks, done)
    results.clear()
    if divergence is not None:
        _raise_divergence(trainer, run, done, divergence)
    if done == num_steps:  # the first ones of the run
        for name, cause in trainer.task.zero_means.items():
            if means[name] == 0:
                log.say(f"{name} is 0 in the first {num_steps} steps: {cause}")
    total_s = seconds.pop("total")
    shares = {f"{name}_share": part_s / total_s for name, part_s in seconds.items()}
    images_per_s = trainer.task.recipe.batch_size * num_steps / total_s
    log.write(
        done,
        kind="train",
        lr=trainer.learning_rate(done - 1),
        images_per_s=images_per_s,
        memory_bytes=peak_memory_bytes(trainer.task.device),
        **shares,
        model_share=1 - sum(shares.values()),
        **means,
    )
    log.bar.set_postfix(loss=f"{means['loss']:.3f}", images_per_s=f"{images_per_s:.0f}")


def _raise_divergence(trainer: Trainer, run: Path, done: int, divergence: Divergence) -> None:
    """Save what is left of a run that diverged, away from its checkpoints, and raise ValueError."""
    folder = _write_checkpoint(trainer, run / "diverged", done)
    keys = divergence.keys
    raise ValueError(
        f"the {divergence.what} was {divergence.value} at step {divergence.step} on the images {', '.join(keys[:4])}"
        f"{', ...' if len(keys) > 4 else ''}; the last good checkpoint is as it was, the state after step {done - 1} "
        f"lies in {folder}; in another run folder, try a lower optim.lr, optim.clip_grad_norm, or precision fp32"
    )


def _write_checkpoint(trainer: Trainer, run: Path, done: int) -> Path:
    task = trainer.task
    return save_checkpoint(
        run, done, trainer.state, recipe=task.recipe, class_names=task.class_names, token_classes=task.token_classes
    )


def _prune(trainer: Trainer, run: Path, done: int) -> None:
    """Drop the states that are not to be kept, and let the link `best` lead to the one that evaluated best."""
    if not trainer.ranks.is_first:
        return
    task, config = trainer.task, trainer.task.recipe.checkpoint
    steps = [int(folder.name) for folder in list_checkpoints(run)]
    spared = set(steps[-config.keep :]) | {done}
    if config.keep_every_epochs is not None:
        spared |= {step for step in steps if trainer.due(step, config.keep_every_epochs)}
    lines = read_metrics(run) if config.keep_best else []
    evals = [line for line in lines if line["kind"] == "eval" and line["step"] in steps and task.metric in line]
    # Figures of other val images, or by other settings, do not compare; they count until there are some that do.
    how = _how(task).partition("/")[0]
    evals = [line for line in evals if line.get("evaluated_as", how).partition("/")[0] == how] or evals
    best = max(evals, key=lambda line: line[task.metric])["step"] if evals else None
    prune_checkpoints(run, spared | ({best} if best else set()), best=best)


def _evaluate(trainer: Trainer, run: Path, log: RunLog, done: int) -> dict[str, Any]:
    """Evaluate the averaged weights where there are some, and write the figures down."""
    task, state = trainer.task, trainer.state
    model = state.ema.module if state.ema is not None else state.model
    trainer.ranks.share_buffers(model)  # each has its own, the checkpoint the first one's
    try:
        figures = task.evaluate(model, trainer.ranks, run=run, step=done, num_steps=trainer.num_steps)
    except OutputError as error:  # on all ranks; the weights may go on learning, or be evaluated otherwise
        log.say(f"step {done:,}: not evaluated: {error}")
        figures = {}
    if isinstance(model, FSDPModule):
        model.reshard()  # what the forward pass put together for this rank
    if figures:
        log.write(done, kind="eval", evaluated_as=_how(task), **figures)
        shown = [name for name in dict.fromkeys((task.metric, *_SHOWN_FIGURES)) if name in figures]
        log.say(f"step {done:,}: {', '.join(f'{name} {figures[name]:.1%}' for name in shown)}")
    return figures
