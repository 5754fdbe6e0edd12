"""What the verbs of the command line share: their parsers, recipes by name, devices, and figures as files.

What parsing needs is imported when it parses, so that `tokenlabel --help` answers at once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin

import yaml

from tokenlabel.runtime.files import write_whole

if TYPE_CHECKING:
    from argparse import Action

    import torch
    from jsonargparse import ArgumentParser, Namespace

Config = TypeVar("Config")


def new_parser(verb: str, description: str) -> ArgumentParser:
    """Return a parser that raises instead of ending the process."""
    import jsonargparse

    return jsonargparse.ArgumentParser(
        prog=f"tokenlabel {verb}",
        description=description,
        exit_on_error=False,
        allow_abbrev=False,
        print_config="--print-config",
    )


def parse(
    parser: ArgumentParser, arguments: list[str], *, find_recipe: Callable[[str], Path] | None = None
) -> Namespace:
    """Return parsed arguments. Raises ValueError of one line, with the near names of an unknown one.

    `find_recipe`: the file of a `--recipe` that is given by its name.
    """
    from jsonargparse import ArgumentError

    from tokenlabel.runtime.configuration import explain, read_yaml

    words = spelled_out(parser, arguments)
    recipes = ""
    for i, word in enumerate(words):
        if find_recipe and word.startswith("--recipe="):
            path = find_recipe(word.partition("=")[2])
            read_yaml(path)  # names the file if it is none
            words[i], recipes = f"--recipe={path}", f"{path}: "
    try:
        options = parser.parse_args(words)
    except ArgumentError as error:
        message = explain(error, [action.dest for action in parser._actions], options=_options(parser))
        of_file = message.startswith(("unknown key", "Unexpected config"))
        raise ValueError(f"{recipes}{message}" if of_file else message) from error
    for option, _, value in (word.partition("=") for word in words):
        action = parser._option_string_actions.get(option)
        is_name = str in get_args(getattr(action, "_typehint", None)) and value.lower() not in ("null", "~")
        if action and is_name and options.get(action.dest) is None:
            options[action.dest] = value  # YAML reads #1 and &a as nothing
    return options


def configured(parser: ArgumentParser, options: Namespace, config: type[Config]) -> Config:
    """Return the dataclass whose fields are among parsed arguments; its errors name options."""
    from tokenlabel.runtime.configuration import config_of

    try:
        return config_of(parser, options, config)
    except ValueError as error:
        known = _options(parser)

        def option(found: re.Match[str]) -> str:
            # A message may leave the group out.
            fields = (field for field in known if f".{field}".endswith(f".{found[0]}"))
            return known.get(next(fields, ""), found[0])

        keys = r"^[\w.]+(?= must )|(?<![-\w./])[a-z][a-z.]*_[\w.]*\w"
        raise ValueError(re.sub(keys, option, str(error))) from error


def _options(parser: ArgumentParser) -> dict[str, str]:
    """Return the options by the keys that they set."""
    return {action.dest: action.option_strings[-1] for action in parser._actions if action.option_strings}


def spelled_out(parser: ArgumentParser, arguments: list[str]) -> list[str]:
    """Return arguments as the parser wants them: `--option=value`, so that no value is taken for an option.

    `--strict` alone is `--strict=true`; `--class_map` is `--class-map`; an option that takes one name or several
    (`--teacher A --teacher B`) adds to what it was given before. A value is any word but an option's name; that it may
    be behind a `=`. Raises ValueError for options that do not exist and for those without a value.
    """
    words: list[str] = []
    given: set[str] = set()
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word == "--":  # only positional arguments follow
            return [*words, word, *rest]
        written, equals, value = word.partition("=")
        found = _find_option(parser, written)
        if found is None:
            if written.startswith("--"):
                raise ValueError(f"unrecognized arguments: {word}{_near_options(parser, written)}")
            words.append(word)
            continue
        option, action = found
        kind = getattr(action, "_typehint", None)
        if kind is bool and not equals:
            value = rest.pop(0) if rest and rest[0].lower() in ("true", "false") else "true"
        elif action.nargs is not None:
            words.append(f"{option}{equals}{value}")  # a flag, or several values, which argparse counts
            continue
        elif not equals:
            if not rest or _find_option(parser, rest[0].partition("=")[0]):
                raise ValueError(
                    f"{option}: expected a value" + (f", got the option {rest[0]}" if rest else "")
                )
            value = rest.pop(0)
        if value.startswith("[") and (list[str] in get_args(kind) or get_args(kind) == (str, ...)):
            with suppress(yaml.YAMLError):  # names such as 0 and no, which YAML reads as something else
                value = json.dumps(yaml.load(value, yaml.BaseLoader))
        adds = option in given and str in get_args(kind) and f"{option}+" in parser._option_string_actions
        given.add(option)
        words.append(f"{option}{'+' if adds else ''}={value}")
    return words


def _find_option(parser: ArgumentParser, written: str) -> tuple[str, Action] | None:
    """Return an option as help shows it and its action, from any spelling; `--model.options.depth` is of a mapping."""
    group, key = written.replace("_", "-"), ""
    while group.startswith("-"):
        action = parser._option_string_actions.get(group)
        if action is not None and (not key or get_origin(getattr(action, "_typehint", None)) is dict):
            return action.option_strings[-1] + key.replace("-", "_"), action
        group, _, last = group.rpartition(".")
        key = f".{last}{key}"
    return None


def _near_options(parser: ArgumentParser, written: str) -> str:
    from tokenlabel.runtime.configuration import near_names

    known = [option[2:] for option in _options(parser).values()]
    return near_names(written[2:].replace("_", "-"), known, prefix="--")


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
