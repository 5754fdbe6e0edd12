"""Configuration: frozen dataclasses, read from YAML and from `--a.b value`, written with every field.

An unknown key or a value of a wrong type is an error that names the key and the near names.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeGuard, TypeVar, get_args, get_type_hints

import jsonargparse
import yaml
from jsonargparse.typing import register_type

from tokenlabel.runtime.errors import ConfigError, near_names
from tokenlabel.runtime.process import write_whole

Config = TypeVar("Config")

HIDDEN = "_hidden"
"""Attribute of an option that help does not list (`help=SUPPRESS` would leave it out of --print-config as well)."""


def add_config_arguments(parser: jsonargparse.ArgumentParser, config: type) -> None:
    """Let a parser take every field of a dataclass, nested ones as `--a.b value`; enums go by their values.

    Help and messages show one name of each option, with dashes; others of it (underscores, `--run` for `--out`) go on
    working in silence: argparse looks names up in a table of its own, and shows those that the action lists.
    """
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    for kind in enums_of(config):
        register_type(
            kind,
            serializer=lambda member: member.value,
            deserializer=kind,
            fail_already_registered=False,  # by another parser of this process
        )
    parser.add_class_arguments(config)
    for action in parser._actions:  # argparse keeps what `--help` shows nowhere else
        kind = getattr(action, "_typehint", None)
        if isinstance(kind, type) and issubclass(kind, Enum):
            action.metavar = "{" + ",".join(member.value for member in kind) + "}"
            action.default = kind[action.default].value if isinstance(action.default, str) else action.default
    _list_groups(parser, config)
    for name, action in list(parser._option_string_actions.items()):
        # The table that argparse finds options in takes all spellings; the action's own list is what help shows.
        dashed = name.replace("_", "-").rstrip("-")  # a field that is a keyword ends in _, as PEP 8 says: from_
        parser._option_string_actions[dashed] = action
        if name == action.option_strings[0] and name != "-h":
            action.option_strings = [dashed]


def _list_groups(parser: jsonargparse.ArgumentParser, config: type, prefix: str = "") -> None:
    """Let help list the fields of each nested dataclass, or, of one that is ONE_OPTION, the dataclass with its fields.

    Whatever help lists, the parser takes both: `--erase '{probability: .25, mode: pixel}'` and `--erase.mode pixel`.
    """
    hints = get_type_hints(config)
    for field in (field for field in dataclasses.fields(config) if _is_config(hints[field.name])):
        name = prefix + field.name
        (group,) = (action for action in parser._actions if action.dest == name)
        inside = [action for action in parser._actions if action.dest.startswith(f"{name}.")]
        if not field.metadata.get("one_option"):
            setattr(group, HIDDEN, True)
            _list_groups(parser, hints[field.name], f"{name}.")
            continue
        texts = [f"as '{{FIELD: VALUE, ...}}', or each as --{name}.FIELD VALUE:"]
        for action in inside:
            shown = str(action.metavar or "")
            of_choices = f" {shown}" if shown.startswith("{") and action.type is not bool else ""
            default = "null" if action.default is None else str(action.default).lower()
            written = " ".join((action.help or "").split())
            texts.append(f"{action.dest.removeprefix(f'{name}.')}{of_choices} ({default}): {written}")
            setattr(action, HIDDEN, True)
        group.metavar, group.help = "FIELDS", "\n".join(texts)


def config_of(parser: jsonargparse.ArgumentParser, namespace: jsonargparse.Namespace, config: type[Config]) -> Config:
    """Return the dataclass whose fields are among parsed arguments (see `add_config_arguments`)."""
    parsed = parser.instantiate(namespace)
    names = get_type_hints(config)
    return config(**{name: parsed[name] for name in names})


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return the mapping that a YAML file holds. Raises ConfigError that names the file."""
    try:
        nested = yaml.safe_load(Path(path).read_text(encoding="utf-8-sig"))  # as some editors begin a file
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(nested, dict):
        raise ConfigError(f"{path}: expected a mapping of keys to values, got {type(nested).__name__}")
    return nested


def config_from_dict(nested: dict[str, Any], config: type[Config], *, name: str) -> Config:
    """Return the dataclass of nested dicts, as in a YAML file; `name` is what errors call it."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    add_config_arguments(parser, config)
    try:
        return config_of(parser, parser.parse_object(fitted(nested, parser)), config)
    except (jsonargparse.ArgumentError, ValueError) as error:
        raise ConfigError(f"{name}: {explain(error, _field_names(config))}") from error


def check_keys(nested: dict[str, Any], config: type, *, name: str) -> None:
    """Raise ConfigError, which begins with `name`, for a key that a dataclass does not have, and for a group that is
    no mapping.
    """
    known = _field_names(config)

    def check(nested: dict[str, Any], kind: type, prefix: str) -> None:
        hints = get_type_hints(kind)
        for key, value in nested.items():
            if key not in hints:
                raise ConfigError(f"{name}: unknown key {prefix}{key}{near_names(f'{prefix}{key}', known)}")
            if _is_config(hints[key]) and value is not None:
                if not isinstance(value, dict):
                    raise ConfigError(f"{name}: {prefix}{key}: expected a mapping of fields, got {value!r}")
                check(value, hints[key], f"{prefix}{key}.")

    check(nested, config, "")


def overlaid(base: dict[str, Any], nested: dict[str, Any], config: type) -> dict[str, Any]:
    """Return what `nested` says of a dataclass over what `base` says: groups field by field, values as a whole."""
    hints, result = get_type_hints(config), dict(base)
    for key, value in nested.items():
        if not _is_config(hints[key]):
            result[key] = value
        elif value is not None or key not in base:
            result[key] = overlaid(base.get(key) or {}, value or {}, hints[key])
    return result


def fitted(nested: dict[str, Any], parser: jsonargparse.ArgumentParser) -> dict[str, Any]:
    """Return what a YAML file holds with what people write there in place of what fields take, as on the command line.

    One number stands for a pair of them, a group without fields sets none, and YAML reads the word `no` as false.
    """
    for action in parser._actions:
        kind, (*groups, name) = getattr(action, "_typehint", None), action.dest.split(".")
        inner: Any = nested
        for group in groups:
            if isinstance(inner, dict) and inner.get(group, group) is None:
                del inner[group]
            inner = inner.get(group) if isinstance(inner, dict) else None
        value = inner.get(name) if isinstance(inner, dict) else None
        if kind == tuple[int, int] and type(value) is int:
            inner[name] = [value, value]
        elif value is False and "no" in get_args(kind):
            inner[name] = "no"
    return nested


def write_config(config: Any, path: str | Path) -> None:
    """Write a dataclass as YAML with every field, so that later defaults don't change what it meant."""
    write_whole(Path(path), yaml.safe_dump(config_as_dict(config), sort_keys=False))


def config_as_dict(config: Any) -> dict[str, Any]:
    """Return a dataclass as nested dicts of what YAML and JSON know."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(entry) for key, entry in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(entry) for entry in value]
        return value.value if isinstance(value, Enum) else value

    return plain(dataclasses.asdict(config))


def settings(config: Any) -> dict[str, Any]:
    """Return every field of a dataclass under its dotted name, as on the command line."""
    return flattened(config_as_dict(config))


def flattened(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested dicts under dotted names."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= flattened(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def explain(error: Exception, known: Sequence[str], *, options: Mapping[str, str] = MappingProxyType({})) -> str:
    """Return the message of a parser's error on one line, with the near names of an unknown key among `known`.

    `options`: what keys are called where they were typed.
    """
    message = " ".join(str(error).split())
    if unknown := re.search(r"(?:Group '(.+?)' does not accept option|Option) '(.+?)'", message):
        key = ".".join(filter(None, unknown.groups()))
        return f"unknown key {key}{near_names(key, known)}"
    if required := re.search(r"arguments are required: (.+)", message):
        missing = [options.get(key, key) for key in required[1].split(", ")]
        return f"the following arguments are required: {', '.join(missing)}"
    if wrong := re.fullmatch(r'Parser key "(.+?)"(?: element \d+)?: (?:Not of type \w+: )?(.+)', message):
        key, reason = wrong.groups()
        if mismatch := re.search(r"Expected an? (.+?)\. Got value: (.*)|types: \[(.+?)\] Err.* value: (.*)", reason):
            kind, value = filter(None, mismatch.groups())
            kind = re.sub(r"<class '(.+?)'>|typing\.", r"\1", kind).replace("NoneType", "null")
            kind = re.sub(r"Literal\[(.+?)\]", lambda found: f"one of {found[1]}".replace("'", ""), kind)
            reason = f"expected {kind.replace(', ', ' or ') if mismatch[3] else kind}, got {value!r}"
        if group := re.match(r"Unable to load config '(.*?)'", reason):
            reason = f"expected a mapping of fields or a YAML file, got {group[1]!r}"
        return f"{options.get(key, key)}: {reason}"
    return message


def _is_config(kind: Any) -> TypeGuard[type]:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def _field_names(config: type, prefix: str = "") -> list[str]:
    names = []
    for name, kind in get_type_hints(config).items():
        nested = _field_names(kind, f"{prefix}{name}.") if _is_config(kind) else []
        names += nested or [prefix + name]
    return names


def enums_of(config: type) -> set[type[Enum]]:
    """Return the enums among the fields of a dataclass and of those nested in it."""
    found: set[type[Enum]] = set()
    for kind in get_type_hints(config).values():
        if _is_config(kind):
            found |= enums_of(kind)
        elif isinstance(kind, type) and issubclass(kind, Enum):
            found.add(kind)
    return found
