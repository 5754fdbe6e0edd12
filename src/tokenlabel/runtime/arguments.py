"""What the verbs of the command line share: their parsers, recipes by name, devices, and how figures are printed."""

from __future__ import annotations

import json
import re
from argparse import SUPPRESS, Action, ArgumentParser, HelpFormatter, Namespace
from collections.abc import Callable, Iterable
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, get_args, get_origin

import yaml

from tokenlabel.runtime.coercion import arms_of, is_choice
from tokenlabel.runtime.configuration import (
    NULL,
    REQUIRED,
    TRUTH,
    Config,
    Setting,
    built,
    check_keys,
    completed,
    is_config,
    meant,
    missing_fields,
    overlaid,
    plain,
    settings_of,
    with_types,
)
from tokenlabel.runtime.errors import near_names
from tokenlabel.runtime.process import is_replaced, why_unwritable, write_whole

if TYPE_CHECKING:
    import torch

# Other names of options, which help does not show.
_SHORT = {"--data.ignore": "--data.ignore-index", "--run": "--out"}


class Parser(ArgumentParser):
    """A parser that raises ValueError of one line instead of ending the process, and takes the fields of a dataclass.

    `config`: the dataclass. `settings`: its fields by the options that set them. They are read in this module, by the
    annotations of the fields; argparse lists them in the help, and names those that are missing. `written`: what the
    file of an option is, and how one begins: an earlier call's is replaced, any other file is refused.
    """

    def __init__(self, verb: str, description: str) -> None:
        super().__init__(f"tokenlabel {verb}", description=description, allow_abbrev=False, formatter_class=_Formatter)
        self.config: type | None = None
        self.settings: dict[str, Setting] = {}
        self.written: dict[str, tuple[str, bytes]] = {}

    def error(self, message: str) -> NoReturn:
        """Raise ValueError for what argparse says."""
        message = re.sub(r"^argument (.+?): invalid (\w+) value: ", r"\1: expected \2, got ", message)
        if choice := re.match(r"argument (.+?): invalid choice: (.+) \(choose from (.+)\)", message):
            message = f"{choice[1]}: expected one of {choice[3]}; got {choice[2]}".replace("'", "")
        raise ValueError(message)

    @property
    def options(self) -> list[str]:
        """All options that the parser takes, by the spelling that help shows."""
        own = [action.option_strings[-1] for action in self._actions if action.option_strings]
        return list(dict.fromkeys([*own, *self.settings]))

    def find(self, written: str) -> tuple[str, str] | None:
        """Return the option that a word spells, and a key: of `--model.options.depth` `--model.options` and `depth`."""
        option, keys = _SHORT.get(written, written).replace("_", "-"), list[str]()
        while option.startswith("-"):
            is_mapping = option in self.settings and get_origin(self.settings[option].kind) is dict
            if is_mapping or (not keys and (option in self.settings or option in self._option_string_actions)):
                return option, ".".join(keys).replace("-", "_")
            option, _, last = option.rpartition(".")
            keys.insert(0, last)
        return None

    def words_of_switch(self, option: str) -> dict[str, str]:
        """Return what may follow a switch, and what it means: true, false, or, of a field that may be None, null."""
        is_optional = option in self.settings and NoneType in arms_of(self.settings[option].kind)
        return TRUTH | dict.fromkeys(NULL, "null") if is_optional else TRUTH


class _Formatter(HelpFormatter):
    """Shows defaults, and keeps the line breaks of help texts: one field of a group a line."""

    def _get_help_string(self, action: Action) -> str | None:
        has_default = action.option_strings and action.nargs != 0 and action.default not in (None, SUPPRESS, [])
        return f"{action.help} (default: %(default)s)" if has_default else action.help

    def _split_lines(self, text: str, width: int) -> list[str]:
        return [line for part in text.split("\n") for line in super(_Formatter, self)._split_lines(part, width)]


def add_config_arguments(parser: Parser, config: type) -> None:
    """Let a parser take every field of a dataclass, nested ones as `--a.b value`, groups as a mapping of fields.

    Help lists the fields of a group, or, of one that is ONE_OPTION, the group with its fields. Whatever it lists, the
    parser takes both: `--erase '{probability: .25, mode: pixel}'` and `--erase.mode pixel`.
    """
    parser.config = config
    sections = {"": parser.add_argument_group(_title(config))}
    for setting in settings_of(config):
        group, _, field = setting.name.rpartition(".")
        option = f"--{setting.name.replace('_', '-')}".rstrip("-")  # a field that is a keyword ends in _: from_
        parser.settings[option] = setting
        if group not in sections:
            continue  # in a group that help lists as one option
        if not is_config(setting.kind):
            choices, is_required = _choices(setting.kind), setting.default is REQUIRED
            text = setting.text
            if is_required:
                text += " (required)"
            elif "by default" not in text.lower():  # else the value stands for what the text explains
                text += f" (default: {_default(setting)})"
            metavar = choices or field.upper().rstrip("_")
        elif setting.one_option:
            inside = (_described(inner) for inner in settings_of(setting.kind) if not is_config(inner.kind))
            metavar, is_required = "FIELDS", False
            text = "\n".join([f"as '{{FIELD: VALUE, ...}}', or each as {option}.FIELD VALUE:", *inside])
        else:
            sections[setting.name] = parser.add_argument_group(_title(setting.kind))
            continue
        more: dict[str, Any] = {"help": text.replace("%", "%%"), "metavar": metavar, "default": SUPPRESS}
        sections[group].add_argument(option, dest=setting.name, required=is_required, **more)


def _title(config: type) -> str:
    return " ".join((config.__doc__ or "").split("\n\n")[0].split()).rstrip(".")


def _choices(kind: Any) -> str:
    """Return the values that a field takes, in braces; "" where it takes others."""
    (arm, *others) = (arm for arm in arms_of(kind) if arm is not NoneType)
    values = ("true", "false") if arm is bool else get_args(arm) if get_origin(arm) is Literal else ()
    values = tuple(arm) if is_choice(arm) else values
    return "" if others or not values else "{" + ",".join(values) + "}"


def _default(setting: Setting) -> str:
    return json.dumps(plain(setting.default)).replace('"', "")


def _described(setting: Setting) -> str:
    """Return the line of a field in the help of its group."""
    choices = "" if setting.kind is bool else _choices(setting.kind)
    return f"{setting.name}{choices and ' '}{choices} ({_default(setting)}): {setting.text}"


def parse(
    parser: Parser, arguments: list[str], *, read_recipe: Callable[[str], dict[str, Any]] | None = None
) -> Namespace:
    """Return parsed arguments; `fields` of them is what options say of the parser's dataclass, as nested dicts.

    Raises ValueError of one line, with the near names of an unknown option. `read_recipe`: what the recipe that
    `--recipe` names sets, as nested dicts; other options override it wherever they stand.
    """
    words, given = _spelled_out(parser, arguments)
    recipes = [word.partition("=")[2] for word in words if word.startswith("--recipe=")] if read_recipe else []
    fields: dict[str, Any] = {}
    prints_config = "--print-config" in words  # which needs nothing else
    if config := parser.config:
        for name in recipes:
            fields = overlaid(fields, read_recipe(name), config)  # type: ignore[misc]
        fields = _typed(parser, fields, given)
        known, missing = {setting.name for setting in parser.settings.values()}, missing_fields(fields, config)
        for action in parser._actions:  # so that one error names what is missing of these and of argparse's own
            is_missing = action.dest in missing if action.dest in known else action.required
            action.required = is_missing and not prints_config
    try:
        options, strangers = parser.parse_known_args(words)
    except ValueError as error:
        lacks_recipe = read_recipe and not recipes and "are required" in str(error)
        advice = "; --recipe NAME has most that a run needs (--help lists the names)" if lacks_recipe else ""
        raise ValueError(f"{error}{advice}") from error
    if strangers:
        several = [option for option, _, _ in given if list[str] in arms_of(parser.settings[option].kind)]
        advice = f"; to name several, write {several[0]} before each" if several else ""
        before = arguments[max(0, arguments.index(strangers[0]) - 1)] if strangers[0] in arguments else ""
        if found := parser.find(before):  # a switch, which stands alone where no word for it follows
            advice = f"; {before} takes {_either(parser.words_of_switch(found[0]))}"
        raise ValueError(f"unrecognized arguments: {' '.join(strangers)}{advice}")
    if prints_config and parser.config:
        try:
            print(yaml.safe_dump(completed(fields, parser.config), sort_keys=False), end="")
        except ValueError as error:
            raise _naming_options(parser, error) from error
        raise SystemExit(0)
    for name in ("out", "output", "pictures", "probabilities", "head"):  # before the work, not after it
        path = getattr(options, name, None)
        option = name if f"--{name}" in parser.options else ""
        if isinstance(path, Path) and (problem := _why_unwritable(path, option, parser.written.get(option))):
            raise ValueError(problem)
    options.fields = fields
    return options


def _typed(parser: Parser, fields: dict[str, Any], given: list[tuple[str, str, str]]) -> dict[str, Any]:
    """Return the fields of a recipe as options change them, each with the type of its annotation."""
    assert parser.config
    for i, (option, key, text) in enumerate(given):
        before = [other for name, _, other in given[:i] if name == option]
        adds = before and list[str] in arms_of(parser.settings[option].kind)  # --teacher A --teacher B
        fields = _with_option(parser, fields, option, key, [*before, text] if adds else text)
    try:
        return with_types(fields, parser.config)
    except ValueError as error:
        raise _naming_options(parser, error) from error


def _with_option(
    parser: Parser, fields: dict[str, Any], option: str, key: str, text: str | list[str]
) -> dict[str, Any]:
    """Return fields of a dataclass with one that an option sets, or one `key` in the mapping that it takes."""
    setting, value = parser.settings[option], text
    if key:
        mapping: Any = fields
        for name in setting.name.split("."):
            mapping = mapping.get(name) or {}
        value = {**mapping, key: meant(text, Any)}
    elif is_config(setting.kind) or get_origin(setting.kind) is dict:
        value = meant(text, dict)
        if isinstance(value, dict) and any(":" in str(name) and value[name] is None for name in value):
            raise ValueError(
                f"{option}: expected '{{NAME: VALUE, NAME: VALUE}}', in quotes and with a space behind each colon, "
                f"got {text!r}"
            )
    if is_config(setting.kind):
        if not isinstance(value, dict):
            inside = ", ".join(name for name in parser.settings if name.startswith(f"{option}."))
            raise ValueError(f"{option}: expected a mapping of fields, got {text!r}; one value goes to {inside}")
        check_keys(value, setting.kind, f"{setting.name}.")
    for name in reversed(setting.name.split(".")):
        value = {name: value}
    assert parser.config
    return overlaid(fields, value, parser.config)  # type: ignore[arg-type]


def _why_unwritable(path: Path, option: str, written: tuple[str, bytes] | None) -> str | None:
    """Return why nothing can be made at a path, or, of what is there, why it is not what an option takes."""
    if option == "out" and path.is_file():
        return f"--out {path}: is a file; name a folder"
    if option in ("output", "pictures", "probabilities") and path.is_dir():
        return f"--{option} {path}: is a folder; name a file, which may be in it"
    if path.exists() and not (path.is_file() or path.is_dir()):
        return None  # a device or a pipe
    if written and not is_replaced(path, written[1]):
        return f"--{option} {path}: exists and is no {written[0]}; choose another file, or remove it"
    reason = why_unwritable(path)
    return reason and f"{path}: cannot be written ({reason}); choose another place"


def configured(parser: Parser, options: Namespace, config: type[Config]) -> Config:
    """Return the dataclass whose fields are among parsed arguments; its errors name options."""
    try:
        return built(options.fields, config)
    except ValueError as error:
        raise _naming_options(parser, error) from error


def _naming_options(parser: Parser, error: ValueError) -> ValueError:
    """Return an error whose message has options in place of the fields of the parser's dataclass."""
    known = {setting.name: option for option, setting in parser.settings.items()}

    def option(found: re.Match[str]) -> str:
        # A message may leave the group out.
        fields = (field for field in known if f".{field}".endswith(f".{found[0]}"))
        return known.get(next(fields, ""), found[0])

    keys = r"^[\w.]+(?= must |: expected )|(?<![-\w./])[a-z][a-z.]*_[\w.]*\w"
    return ValueError(re.sub(keys, option, str(error)))


def parse_config(parser: Parser, arguments: list[str], config: type[Config]) -> tuple[Namespace, Config]:
    """Return parsed arguments, and the dataclass whose fields a parser takes beside those that it has already."""
    add_config_arguments(parser, config)
    options = parse(parser, arguments)
    return options, configured(parser, options, config)


def _either(meanings: dict[str, str]) -> str:
    return " or ".join(dict.fromkeys(meanings.values()))


def _spelled_out(parser: Parser, arguments: Iterable[str]) -> tuple[list[str], list[tuple[str, str, str]]]:
    """Return arguments for argparse, and the options of the parser's dataclass: option, key in its mapping, value.

    A word behind an option is its value, whatever it looks like, unless it is the name of an option; that it may be
    behind a `=`. `--strict` alone is true; `--class_map` is `--class-map`. Raises ValueError for options that do not
    exist, for those without a value, and for empty words.
    """
    words, given, rest = list[str](), list[tuple[str, str, str]](), list(arguments)
    while rest:
        word = rest.pop(0)
        if word == "--":  # only positional arguments follow
            return [*words, word, *rest], given
        written, equals, value = word.partition("=")
        found = parser.find(written)
        if found is None:
            _refuse_unknown(parser, word)
            words.append(word)
            continue
        option, key = found
        setting, shown = parser.settings.get(option), f"{option}.{key}".rstrip(".")
        num_values = None if setting else parser._option_string_actions[option].nargs
        if num_values == 0 or (setting and bool in arms_of(setting.kind)):  # a switch
            meanings = parser.words_of_switch(option)
            if not equals:
                value = rest.pop(0) if rest and rest[0].lower() in meanings else "true"
            if value.lower() not in meanings:
                raise ValueError(f"{shown}: expected {_either(meanings)}, got {value!r}")
            value = meanings[value.lower()]
        elif num_values is None:
            if not equals and (not rest or parser.find(rest[0].partition("=")[0])):
                raise ValueError(f"{shown}: expected a value" + (f", got the option {rest[0]}" if rest else ""))
            value = value if equals else rest.pop(0)
            if not value and option != "--weights":  # there it stands for a teacher's own
                raise ValueError(
                    f"{shown}: expected a value, got an empty word; is a variable of the shell not set? (null is none)"
                )
            value = str(Path(value).expanduser()) if value.startswith("~/") else value  # no shell expands it behind a =
        if setting:
            given.append((option, key, value))
        elif num_values == 0:
            words += [option] * (value == "true")
        else:  # several values follow, which argparse counts
            words.append(f"{option}={value}" if num_values is None else f"{option}{equals}{value}")
    return words, given


def _refuse_unknown(parser: Parser, word: str) -> None:
    """Raise ValueError for an empty word, and for one that looks like an option."""
    if not word:
        raise ValueError("an empty word among the arguments; is a variable of the shell not set?")
    written = word.partition("=")[0]
    bare = written.lstrip("-\u2013\u2014")  # as word processors write two dashes
    if written.startswith("--") or (written[:1] in "-\u2013\u2014" and parser.find(f"--{bare}")):
        known = [option[2:] for option in parser.options]
        raise ValueError(f"unrecognized arguments: {word}{near_names(bare.replace('_', '-'), known, prefix='--')}")


def add_figures(parser: Parser) -> None:
    """Let a parser take how `print_figures` prints, and `--device`."""
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.add_argument("--output", type=Path, help="also write the figures to this JSON file")
    # The first figure of each verb, or of each way to predict.
    beginning = rb'\{\n "(network|num_images|(class|tokens|combined)": \{\n  "network)": '
    parser.written["output"] = ("file of figures", beginning)
    add_device(parser)


def print_figures(options: Namespace, figures: dict[str, Any], as_text: Callable[[dict[str, Any]], str]) -> None:
    """Write figures to `--output`, and print them as text, or as JSON with `--json`."""
    if options.output is not None:
        write_whole(options.output, json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures) if options.json else as_text(figures))


def add_device(parser: Parser) -> None:
    """Let a parser take `--device`."""
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one")


def device_of(name: str) -> torch.device:
    """Return the device that `--device` names. Raises ValueError if it cannot be used."""
    from tokenlabel.runtime.distributed import usable_device

    return usable_device(name, option="--device")
