"""`tokenlabel train` and `tokenlabel segment train`: one command, of two tasks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenlabel.runtime.arguments import Parser, add_device, configured, device_of, parse
from tokenlabel.runtime.process import is_main_process
from tokenlabel.runtime.runlog import TensorBoard, Tracker, WandB, read_metrics
from tokenlabel.training.recipe import TrainingConfig, add_recipe_arguments, recipe_content


def run_train(
    parser: Parser,
    arguments: list[str],
    recipe_type: type[TrainingConfig],
    task: Callable[[], tuple[Callable[..., dict[str, Any]], Callable[..., Any]]],
) -> int:
    """Train by a recipe, or dry-run it; return the exit status.

    `task` imports, where help is not all that was asked for, the functions that train and that build a task.
    """
    parser.add_argument("--out", type=Path, required=True, help="folder of the run: recipe, metrics, checkpoints")
    add_device(parser)
    parser.add_argument("--tensorboard", action="store_true", help="write OUT/tensorboard as well (extra: tensorboard)")
    parser.add_argument(
        "--wandb", action="store_true", help="log to Weights & Biases as well (extra: wandb; WANDB_PROJECT, WANDB_MODE)"
    )
    parser.add_argument(
        "--changed-numerics",
        action="store_true",
        help="go on with another micro batch, precision, compile, ...: what changes rounding or which images go "
        "through the model together; noted in metrics.jsonl",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="take three steps, say sizes, schedule, time and memory, draw the first images; then stop",
    )
    add_recipe_arguments(parser, recipe_type)
    options = parse(parser, arguments, read_recipe=lambda name: recipe_content(name, recipe_type))
    recipe: Any = configured(parser, options, recipe_type)
    (train, build), device = task(), device_of(options.device)
    if options.dry_run:
        from tokenlabel.training.dry_run import dry_run

        text = dry_run(recipe, build, options.out, device=device)
    else:
        trackers: list[Tracker] = [TensorBoard(options.out / "tensorboard")] if options.tensorboard else []
        trackers += [WandB(options.out)] if options.wandb else []
        changed = options.changed_numerics
        figures = train(recipe, options.out, device=device, trackers=trackers, changed_numerics=changed)
        text = json.dumps(figures or (read_metrics(options.out) or [{}])[-1]) if is_main_process() else ""
    if is_main_process():
        print(text, flush=True)
    return 0
