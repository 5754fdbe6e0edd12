"""`tokenlabel train` and `tokenlabel segment train`: one command, of two tasks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tokenlabel.runtime.arguments import add_run_arguments, configured, device_of, new_parser, parse, train_by_arguments
from tokenlabel.runtime.process import is_main_process
from tokenlabel.training.recipe import TrainingConfig, add_recipe_arguments, recipe_content


def run_train(
    arguments: list[str],
    recipe_type: type[TrainingConfig],
    task: Callable[[], tuple[Callable[..., dict[str, Any]], Callable[..., Any]]],
    *,
    verb: str,
    description: str,
) -> int:
    """Train by a recipe, or dry-run it; return the exit status.

    `task` imports, where help is not all that was asked for, the functions that train and that build a task.
    """
    parser = new_parser(verb, f"{description} The same command continues a run that was stopped.")
    add_run_arguments(parser)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="take three steps, say sizes, schedule, time and memory, draw the first images; then stop",
    )
    add_recipe_arguments(parser, recipe_type)
    options = parse(parser, arguments, read_recipe=lambda name: recipe_content(name, recipe_type))
    recipe: Any = configured(parser, options, recipe_type)
    train, build = task()
    if not options.dry_run:
        return train_by_arguments(train, recipe, options)

    from tokenlabel.training.dry_run import dry_run
    from tokenlabel.training.run_folder import check_apart

    check_apart(options.out, *recipe.data.image_folders)
    device = device_of(options.device)
    text = dry_run(partial(build, recipe, device=device), options.out, device=device)
    if is_main_process():
        print(text, flush=True)
    return 0
