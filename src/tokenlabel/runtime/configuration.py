"""Configuration: frozen dataclasses, read from YAML and from `--a.b value`, written with every field.

An unknown key or a value of a wrong type is an error that names the key and the near names.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from enum import Enum
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NamedTuple, TypeGuard, TypeVar, get_args, get_origin, get_type_hints

import yaml
from yaml.constructor import ConstructorError

from tokenlabel.runtime.coercion import arms_of, coerced, is_choice
from tokenlabel.runtime.errors import ConfigError, MissingError, near_names
from tokenlabel.runtime.process import write_whole

Config = TypeVar("Config")

REQUIRED = dataclasses.MISSING

NULL = ("null", "~")

TRUTH: dict[str, str] = {
    **dict.fromkeys(("true", "yes", "on", "1"), "true"),
    **dict.fromkeys(("false", "no", "off", "0"), "false"),
}


class _FileLoader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which PyYAML drops the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return the mapping of a node, as PyYAML calls it. Raises ConstructorError."""
        found: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in found:
                raise ConstructorError(None, None, f"the key {key.value} stands there twice", key.start_mark)
            found.add(key.value)
        return super().construct_mapping(node, deep)


class _WordLoader(_FileLoader):
    """Reads 1e-3 as a number and 010 as ten, as YAML 1.2 does; PyYAML wants 1.0e-3, and takes 010 for eight."""

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        is_decimal = re.fullmatch(r"[-+]?\d+", node.value)
        return int(node.value) if is_decimal else super().construct_yaml_int(node)


_WordLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)
_WordLoader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?0[0-9]+$"), list("-+0"))
_WordLoader.add_constructor("tag:yaml.org,2002:int", _WordLoader.construct_yaml_int)


class Setting(NamedTuple):
    """A field of a dataclass, or of one nested in it: `name` is dotted, `kind` its annotation.

    `default`: REQUIRED if there is none. `one_option`: help lists the group as one option (see `ONE_OPTION`).
    """

    name: str
    kind: Any
    default: Any
    text: str
    one_option: bool


def settings_of(config: type, prefix: str = "") -> Iterator[Setting]:
    """Yield the fields of a dataclass, each group (a nested dataclass) before the fields in it."""
    hints, texts = get_type_hints(config), _field_docstrings(config)
    for field in dataclasses.fields(config):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        name, kind = prefix + field.name, hints[field.name]
        yield Setting(name, kind, default, texts.get(field.name, ""), bool(field.metadata.get("one_option")))
        if is_config(kind):
            yield from settings_of(kind, f"{name}.")


@cache
def _field_docstrings(config: type) -> dict[str, str]:
    """Return the string below each field, which Python itself drops."""
    texts: dict[str, str] = {}
    for kind in reversed(config.__mro__[:-1]):  # not `object`, whose source is not Python
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
        assert isinstance(definition, ast.ClassDef)
        for field, below in pairwise(definition.body):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(field.target, ast.Name):
                texts[field.target.id] = " ".join(str(ast.literal_eval(below.value)).split())
    return texts


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return the mapping that a YAML file holds. Raises ConfigError that names the file."""
    try:
        nested = yaml.load(Path(path).read_text(encoding="utf-8-sig"), _FileLoader)  # as some editors begin a file
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(nested, dict):
        raise ConfigError(f"{path}: expected a mapping of keys to values, got {type(nested).__name__}")
    return nested


def config_from_dict(nested: dict[str, Any], config: type[Config], *, name: str) -> Config:
    """Return the dataclass of nested dicts, as in a YAML file. Raises ConfigError that begins with `name`."""
    try:
        check_keys(nested, config)
        typed = with_types(nested, config)
        if missing := missing_fields(typed, config):
            raise ConfigError(f"the following fields are required: {', '.join(missing)}")
        return built(typed, config)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from error


def check_keys(nested: dict[str, Any], config: type, prefix: str = "") -> None:
    """Raise ConfigError for a key that a dataclass does not have, and for a group that is no mapping."""
    known = {setting.name: setting.kind for setting in settings_of(config, prefix)}
    for key, value in nested.items():
        name = f"{prefix}{key}"
        if name not in known:
            raise ConfigError(f"unknown key {name}{near_names(name, [k for k in known if not is_config(known[k])])}")
        if is_config(known[name]) and value is not None:
            if not isinstance(value, dict):
                raise ConfigError(f"{name}: expected a mapping of fields, got {value!r}")
            check_keys(value, known[name], f"{name}.")


def missing_fields(nested: dict[str, Any], config: type) -> list[str]:
    """Return the dotted names of the fields without a default that nested dicts do not set."""
    given = flattened(nested)
    return [
        s.name for s in settings_of(config) if s.default is REQUIRED and not is_config(s.kind) and s.name not in given
    ]


def with_types(nested: dict[str, Any], config: type, prefix: str = "") -> dict[str, Any]:
    """Return nested dicts, whose keys were checked, with each value as its field has it.

    Raises ValueError that begins with the dotted name of a field.
    """
    hints, typed = get_type_hints(config), dict[str, Any]()
    for key, value in nested.items():
        kind, name = hints[key], f"{prefix}{key}"
        is_group = is_config(kind)
        typed[key] = (
            with_types(value or {}, kind, f"{name}.") if is_group else coerced(meant(value, kind), kind, name=name)
        )
    return typed


def built(typed: dict[str, Any], config: type[Config]) -> Config:
    """Return the dataclass of what `with_types` returned."""
    groups = {key: kind for key, kind in get_type_hints(config).items() if is_config(kind)}
    return config(**typed | {key: built(typed.get(key, {}), kind) for key, kind in groups.items()})


def meant(value: Any, kind: Any) -> Any:
    """Return what a word of the command line, or of a YAML file, stands for where a field has an annotation.

    Names stay as they are written, also `no` and `1`. A tuple may be written `1,2` or `(1, 2)`, a pair of whole numbers
    96x64 or, where both are the same, 96. What is no text passes as it is.
    """
    arms = arms_of(kind)
    if value is False and any("no" in get_args(arm) for arm in arms):
        return "no"  # YAML reads the bare word as false
    if not isinstance(value, str):
        return value
    if value in NULL and NoneType in arms:
        return None
    if any(get_origin(arm) is tuple for arm in arms) and not value.startswith("["):
        value = re.sub(r"^(\d+)x(\d+)$", r"\1,\2", value) if tuple[int, int] in arms else value
        if "," in value or not (int in arms or tuple[int, int] in arms):
            value = f"[{value.removeprefix('(').removesuffix(')')}]"
    loader = _WordLoader
    if value.startswith("[") and (list[str] in arms or tuple[str, ...] in arms):
        loader = yaml.BaseLoader  # leaves names such as 0 and no as they are
    elif any(arm in (str, Path) or get_origin(arm) is Literal or is_choice(arm) for arm in arms):
        return value
    with suppress(yaml.YAMLError):
        return yaml.load(TRUTH.get(value.lower(), value) if bool in arms else value, loader)  # type: ignore[arg-type]
    return value


def overlaid(base: dict[str, Any], nested: dict[str, Any], config: type) -> dict[str, Any]:
    """Return what `nested` says of a dataclass over what `base` says: groups field by field, values as a whole.

    A field whose metadata has `instead_of`, another field, takes its place.
    """
    hints, result = get_type_hints(config), dict(base)
    instead = {field.name: field.metadata.get("instead_of", "") for field in dataclasses.fields(config)}
    for key, value in nested.items():
        if not is_config(hints[key]):
            result[key] = value
            if meant(value, hints[key]) is not None and instead[key] not in nested:
                result.pop(instead[key], None)
        elif value is not None or key not in base:
            result[key] = overlaid(base.get(key) or {}, value or {}, hints[key])
    return result


_FROM_ELSEWHERE = ("", (0, -1))  # a name, and an image size, that no value becomes


def completed(typed: dict[str, Any], config: type) -> dict[str, Any]:
    """Return nested dicts of what YAML knows, with every field of the dataclass that `typed` (`with_types`) makes.

    Where something is missing, fields without a default are None, and so are those whose default says that another one
    gives them, such as the run that a model comes from.
    """
    if not missing_fields(typed, config):
        with suppress(MissingError):
            return config_as_dict(built(typed, config))
    whole: dict[str, Any] = {}
    for name, kind, default, *_ in (setting for setting in settings_of(config) if "." not in setting.name):
        if is_config(kind):
            whole[name] = completed(typed.get(name, {}), kind)
        else:
            whole[name] = plain(typed.get(name, None if default in (REQUIRED, *_FROM_ELSEWHERE) else default))
    return whole


def write_config(config: Any, path: str | Path) -> None:
    """Write a dataclass as YAML with every field, so that later defaults don't change what it meant."""
    write_whole(Path(path), yaml.safe_dump(config_as_dict(config), sort_keys=False))


def config_as_dict(config: Any) -> dict[str, Any]:
    """Return a dataclass as nested dicts of what YAML and JSON know."""
    return plain(dataclasses.asdict(config))


def plain(value: Any) -> Any:
    """Return a value with lists for tuples and values for members of enums, as YAML and JSON know them."""
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return value.value if isinstance(value, Enum) else value


def settings(config: Any) -> dict[str, Any]:
    """Return every field of a dataclass under its dotted name, as on the command line."""
    return flattened(config_as_dict(config))


def flattened(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested dicts under dotted names."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= flattened(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def is_config(kind: Any) -> TypeGuard[type]:
    """Return True if an annotation is a dataclass: a group of fields."""
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)
