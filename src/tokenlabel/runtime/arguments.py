"""What the verbs of the command line share: their parsers, recipes by name, devices, and figures as files.

What parsing needs is imported when it parses, so that `tokenlabel --help` answers at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from tokenlabel.runtime.files import write_whole

if TYPE_CHECKING:
    import torch
    from jsonargparse import ArgumentParser, Namespace


def new_parser(verb: str, description: str) -> ArgumentParser:
    """Return a parser that raises instead of ending the process."""
    import jsonargparse

    return jsonargparse.ArgumentParser(
        prog=f"tokenlabel {verb}", description=description, exit_on_error=False
    )


def parse(parser: ArgumentParser, arguments: list[str]) -> Namespace:
    """Return parsed arguments. Raises ValueError of one line, with the near names of an unknown one."""
    from jsonargparse import ArgumentError

    try:
        return parser.parse_args(spelled_out(parser, arguments))
    except ArgumentError as error:
        from tokenlabel.runtime.configuration import explain

        raise ValueError(explain(error, [action.dest for action in parser._actions])) from error


def spelled_out(parser: ArgumentParser, arguments: list[str]) -> list[str]:
    """Return arguments as the parser wants them, which may be given shorter.

    `--strict` alone is `--strict true`; `--class-map` is `--class_map`; an option that takes one name or
    several (`--teacher A --teacher B`) adds to what it was given before.
    """
    actions = {option: action for action in parser._actions for option in action.option_strings}
    words: list[str] = []
    given: set[str] = set()
    for word, following in zip_longest(arguments, arguments[1:], fillvalue=""):
        option, equals, value = word.partition("=")
        underscored = f"--{option[2:].replace('-', '_')}"
        option = underscored if option not in actions and underscored in actions else option
        kind = getattr(actions.get(option), "_typehint", None)
        adds = option in given and str in get_args(kind) and f"{option}+" in actions
        given.add(option)
        words.append(f"{option}{'+' if adds else ''}{equals}{value}")
        if kind is bool and not equals and following.lower() not in ("true", "false"):
            words.append("true")
    return words


def with_recipe_path(arguments: list[str], find_recipe: Callable[[str], Path]) -> list[str]:
    """Return the arguments with the name of each recipe replaced by its file."""
    resolved = list(arguments)
    for i, argument in enumerate(arguments):
        if argument == "--recipe" and i + 1 < len(arguments):
            resolved[i + 1] = str(find_recipe(arguments[i + 1]))
        elif argument.startswith("--recipe="):
            resolved[i] = f"--recipe={find_recipe(argument.removeprefix('--recipe='))}"
    return resolved


def write_json(path: Path | None, figures: dict[str, Any]) -> None:
    """Write figures to a file, if there is to be one."""
    if path is not None:
        write_whole(path, json.dumps(figures, indent=1) + "\n")


def add_device(parser: ArgumentParser) -> None:
    """Let a parser take `--device`."""
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one"
    )


def add_tensorboard(parser: ArgumentParser) -> None:
    """Let a parser take `--tensorboard`."""
    parser.add_argument(
        "--tensorboard", action="store_true", help="write OUT/tensorboard as well (extra: tensorboard)"
    )


def add_changed_numerics(parser: ArgumentParser) -> None:
    """Let a parser take `--changed-numerics`."""
    parser.add_argument(
        "--changed-numerics",
        action="store_true",
        help="go on with another micro batch, precision, compile, ...: what changes rounding or which images go "
        "through the model together; noted in metrics.jsonl",
    )


def device_of(name: str) -> torch.device:
    """Return the device that `--device` names. Raises ValueError if it cannot be used."""
    import torch

    if name == "auto":
        from tokenlabel.runtime.distributed import default_device

        return default_device()
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except RuntimeError as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device
