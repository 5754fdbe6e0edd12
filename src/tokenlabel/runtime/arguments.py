"""What the verbs of the command line share: their parsers, recipes by name, devices, and figures as files.

What parsing needs is imported when it parses, so that `tokenlabel --help` answers at once.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, TypeVar, Union, get_args, get_origin

import yaml

from tokenlabel.runtime.errors import near_names
from tokenlabel.runtime.process import is_main_process, write_whole

if TYPE_CHECKING:
    from argparse import Action

    import torch
    from jsonargparse import ArgumentParser, Namespace

Config = TypeVar("Config")

# Options that have a shorter name, too.
_SHORT = {"--data.ignore": "--data.ignore-index"}
_TRUTH: dict[str, str] = {
    **dict.fromkeys(("true", "yes", "on", "1"), "true"),
    **dict.fromkeys(("false", "no", "off", "0"), "false"),
}


def new_parser(verb: str, description: str) -> ArgumentParser:
    """Return a parser that raises instead of ending the process."""
    import jsonargparse

    from tokenlabel.runtime.configuration import HIDDEN

    class Formatter(jsonargparse.DefaultHelpFormatter):
        """Lists what is not hidden, and keeps the line breaks of help texts: one field of a group a line."""

        def add_usage(self, usage: Any, actions: Any, *others: Any, **options: Any) -> None:
            listed = [action for action in actions if not hasattr(action, HIDDEN)]
            super().add_usage(usage, listed, *others, **options)

        def add_argument(self, action: Action) -> None:
            if not hasattr(action, HIDDEN):
                super().add_argument(action)

        def _split_lines(self, text: str, width: int) -> list[str]:
            return [line for part in text.split("\n") for line in super(Formatter, self)._split_lines(part, width)]

    return jsonargparse.ArgumentParser(
        prog=f"tokenlabel {verb}",
        formatter_class=Formatter,
        description=description,
        exit_on_error=False,
        allow_abbrev=False,
        print_config="--print-config",
    )


def parse(
    parser: ArgumentParser, arguments: list[str], *, read_recipe: Callable[[str], dict[str, Any]] | None = None
) -> Namespace:
    """Return parsed arguments. Raises ValueError of one line, with the near names of an unknown one.

    `read_recipe`: what the recipe that `--recipe` names sets, as nested dicts.
    """
    from jsonargparse import ArgumentError

    from tokenlabel.runtime.configuration import explain, fitted

    words = spelled_out(parser, arguments)
    if read_recipe:
        names = [word.partition("=")[2] for word in words if word.startswith("--recipe=")]
        # Read here, so that errors name the file; before all else, so that options override it.
        recipes = [f"--recipe={json.dumps(fitted(read_recipe(name), parser))}" for name in names]
        words = [*recipes, *(word for word in words if not word.startswith("--recipe="))]
    try:
        namespace = parser.parse_args(words)
    except ArgumentError as error:
        message = explain(error, [action.dest for action in parser._actions], options=_options(parser))
        raise ValueError(message + _advice(parser, message, words)) from error
    for option, _, value in (word.partition("=") for word in words):
        action = parser._option_string_actions.get(option)
        is_name = str in get_args(getattr(action, "_typehint", None)) and value.lower() not in ("null", "~")
        if action and is_name and namespace.get(action.dest) is None:
            namespace[action.dest] = value  # YAML reads #1 and &a as nothing
    for name in ("out", "output", "pictures", "head"):  # before the work, not after it
        path = namespace.get(name)
        if isinstance(path, Path) and (problem := _why_unwritable(path, name if name in _options(parser) else "")):
            raise ValueError(problem)
    return namespace


def _why_unwritable(path: Path, option: str) -> str | None:
    """Return why nothing can be made at a path, or, of what is there, why it is not what an option takes."""
    if path.exists():
        if option == "out" and path.is_file():
            return f"--out {path}: is a file; name a folder"
        if option in ("output", "pictures") and path.is_dir():
            return f"--{option} {path}: is a folder; name a file, which may be in it"
        return None
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    reason = f"nothing can be made in {folder}" if folder.is_dir() else f"{folder} is a file"
    if folder.is_dir() and os.access(folder, os.W_OK):
        return None
    return f"{path}: cannot be written ({reason}); choose another place"


def _advice(parser: ArgumentParser, message: str, words: list[str]) -> str:
    """Return what to do about an error of the parser, where it does not say that itself."""
    options = _options(parser)
    if message.startswith("the following") and "recipe" in options and not words[0].startswith("--recipe="):
        return "; --recipe NAME has most that a run needs (--help lists the names)"
    if "nrecognized arguments" in message:
        given = [action for action in parser._actions if any(word.startswith(f"--{action.dest}=") for word in words)]
        several = [
            options[action.dest] for action in given if list[str] in get_args(getattr(action, "_typehint", None))
        ]
        return f"; to name several, write {several[0]} before each" if several else ""
    if re.match(r"--[\w.-]+: expected dict, got '\{", message):
        return "; write '{NAME: VALUE, NAME: VALUE}', in quotes and with a space behind each colon"
    if group := re.match(r"(--[\w.-]+): expected a mapping", message):
        inside = [option for option in options.values() if option.startswith(f"{group[1]}.")]
        return f"; one value goes to {', '.join(inside)}"
    return ""


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


def parse_config(parser: ArgumentParser, arguments: list[str], config: type[Config]) -> tuple[Namespace, Config]:
    """Return parsed arguments, and the dataclass whose fields a parser takes beside those that it has already."""
    from tokenlabel.runtime.configuration import add_config_arguments

    add_config_arguments(parser, config)
    options = parse(parser, arguments)
    return options, configured(parser, options, config)


def _options(parser: ArgumentParser) -> dict[str, str]:
    """Return the options by the keys that they set."""
    return {action.dest: action.option_strings[-1] for action in parser._actions if action.option_strings}


def spelled_out(parser: ArgumentParser, arguments: list[str]) -> list[str]:
    """Return arguments as the parser wants them: `--option=value`, so that no value is taken for an option.

    `--strict` alone is `--strict=true`; `--class_map` is `--class-map`; an option that takes one name or several
    (`--teacher A --teacher B`) adds to what it was given before; numbers and names of a tuple may stand between commas,
    one number for a pair. A value is any word but an option's name; that it may be behind a `=`. Raises ValueError for
    options that do not exist, for those without a value, and for empty words.
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
            _refuse_unknown(parser, word)
            words.append(word)
            continue
        option, action = found
        kind = getattr(action, "_typehint", None)
        if kind is bool or get_args(kind) == (bool, type(None)) or action.nargs == 0:
            if not equals:
                value = rest.pop(0) if rest and rest[0].lower() in _TRUTH else "true"
            words += _as_switch(option, value, takes_value=action.nargs != 0)
        elif action.nargs is not None:
            words.append(f"{option}{equals}{value}")  # a flag, or several values, which argparse counts
        else:
            value = _as_value(option, value if equals else _next_value(parser, option, rest), kind)
            adds = option in given and str in get_args(kind) and f"{option}+" in parser._option_string_actions
            given.add(option)
            words.append(f"{option}{'+' if adds else ''}={value}")
    return words


def _refuse_unknown(parser: ArgumentParser, word: str) -> None:
    """Raise ValueError for an empty word, and for one that looks like an option."""
    if not word:
        raise ValueError("an empty word among the arguments; is a variable of the shell not set?")
    written = word.partition("=")[0]
    dashed = "--" + written.lstrip("-\u2013\u2014")  # as word processors write two dashes
    if written.startswith("--") or (written[:1] in "-\u2013\u2014" and _find_option(parser, dashed)):
        raise ValueError(f"unrecognized arguments: {word}{_near_options(parser, written)}")


def _as_switch(option: str, value: str, *, takes_value: bool) -> list[str]:
    """Return a switch that is on or off, with its value or, where it takes none, as it stands or not at all."""
    value = _TRUTH.get(value.lower(), value)
    if value not in ("true", "false"):
        raise ValueError(f"{option}: expected true or false, got {value!r}")
    return [f"{option}={value}"] if takes_value else [option] * (value == "true")


def _next_value(parser: ArgumentParser, option: str, rest: list[str]) -> str:
    """Take the value of an option from the words behind it."""
    if not rest or _find_option(parser, rest[0].partition("=")[0]):
        raise ValueError(f"{option}: expected a value" + (f", got the option {rest[0]}" if rest else ""))
    return rest.pop(0)


def _as_value(option: str, value: str, kind: Any) -> str:
    """Return an option's value as the parser wants it."""
    if not value and option != "--weights":  # there it stands for a teacher's own
        raise ValueError(
            f"{option}: expected a value, got an empty word; is a variable of the shell not set? (null is none)"
        )
    if value.startswith("~/"):  # which shells leave alone behind a `=`
        value = str(Path(value).expanduser())
    value = _as_list(value, kind)
    if value.startswith("[") and (list[str] in get_args(kind) or get_args(kind) == (str, ...)):
        with suppress(yaml.YAMLError):  # names such as 0 and no, which YAML reads as something else
            value = json.dumps(yaml.load(value, yaml.BaseLoader))
    return value


def _as_list(value: str, kind: Any) -> str:
    """Return a tuple as YAML's list: from `a,b` and `(1,2)`, a pair of whole numbers from `96` and `96x64`, too."""
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    tuples = [kind for kind in kinds if get_origin(kind) is tuple]
    if not tuples or value.startswith("[") or value == "null" or (int in kinds and "," not in value):
        return value
    if tuples == [tuple[int, int]]:
        value = re.sub(r"^(\d+)x(\d+)$", r"\1,\2", value)
        value = f"{value},{value}" if value.isdecimal() else value
    return f"[{value.removeprefix('(').removesuffix(')')}]"


def _find_option(parser: ArgumentParser, written: str) -> tuple[str, Action] | None:
    """Return an option as help shows it and its action, from any spelling; `--model.options.depth` is of a mapping."""
    group, key = _SHORT.get(written, written).replace("_", "-"), ""
    while group.startswith("-"):
        action = parser._option_string_actions.get(group)
        if action is not None and (not key or get_origin(getattr(action, "_typehint", None)) is dict):
            return action.option_strings[-1] + key.replace("-", "_"), action
        group, _, last = group.rpartition(".")
        key = f".{last}{key}"
    return None


def _near_options(parser: ArgumentParser, written: str) -> str:
    known = [option[2:] for option in _options(parser).values()]
    return near_names(written.lstrip("-\u2013\u2014").replace("_", "-"), known, prefix="--")


def write_json(path: Path | None, figures: dict[str, Any]) -> None:
    """Write figures to a file, if there is to be one."""
    if path is not None:
        write_whole(path, json.dumps(figures, indent=1) + "\n")


def add_device(parser: ArgumentParser) -> None:
    """Let a parser take `--device`."""
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one")


def add_run_arguments(parser: ArgumentParser) -> None:
    """Let a parser take where a run goes, on what device, who hears of it, and whether its numerics may change."""
    parser.add_argument(
        "--out", "--run", type=Path, required=True, help="folder of the run: recipe, metrics, checkpoints"
    )
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


def train_by_arguments(train: Callable[..., dict[str, Any]], recipe: Any, options: Namespace) -> int:
    """Train by the options of `add_run_arguments`, and print its figures as JSON, or else its last metrics."""
    from tokenlabel.runtime.runlog import read_metrics, trackers_of

    with trackers_of(options.out, tensorboard=options.tensorboard, wandb=options.wandb) as trackers:
        figures = train(
            recipe,
            options.out,
            device=device_of(options.device),
            trackers=trackers,
            changed_numerics=options.changed_numerics,
        )
    if is_main_process():
        print(json.dumps(figures or read_metrics(options.out)[-1]))
    return 0


def device_of(name: str) -> torch.device:
    """Return the device that `--device` names. Raises ValueError if it cannot be used."""
    from tokenlabel.runtime.distributed import usable_device

    return usable_device(name, option="--device")
