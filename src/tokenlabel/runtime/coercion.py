"""Convert arguments to their annotated types: enums from their values, tuples from lists, paths from strings.

Public functions convert their arguments and configurations their fields; inner functions get exact types. A value that
cannot be converted is a ValueError of one line that names what was expected.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import StrEnum
from functools import cache
from numbers import Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, SupportsIndex, TypeGuard, Union, get_args, get_origin, get_type_hints

import numpy as np

from tokenlabel.runtime.errors import ConfigError, near_names
from tokenlabel.runtime.process import T

NATURAL, COUNT = "[1, inf)", "[0, inf)"
POSITIVE, SHARE, PART = "(0, inf)", "[0, 1]", "(0, 1]"
SEED = f"[0, {2**63}]"
"""What `torch.manual_seed` and NumPy's generators both take."""

_UNLIKE = object()

Size = SupportsIndex | Sequence[Any]
"""A size as functions take it: a pair, or one number for both sides."""

ONE_OPTION = {"one_option": True}
"""Metadata of a field whose type is a dataclass: help lists it as one option, `--erase`, not each of its fields."""


class Choice(StrEnum):
    """An enum whose members can be given by their values: `Mixing("cutmix")`. Anything else is a ValueError."""

    @classmethod
    def _missing_(cls, value: object) -> Any:
        raise ValueError(f"{cls.__name__}: expected one of {', '.join(cls)}; got {value!r}")


def is_choice(kind: Any) -> TypeGuard[type[Choice]]:
    """Return True if an annotation is an enum whose members can be given by their values."""
    return isinstance(kind, type) and issubclass(kind, Choice)


def arms_of(kind: Any) -> tuple[Any, ...]:
    """Return the types of which an annotation takes any: those of a union, else itself."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def coerced_fields(config: type[T]) -> type[T]:
    """Convert the fields of a dataclass before its `__post_init__`; goes below `@dataclass`, subclasses inherit it."""
    check: Callable[[Any], None] | None = getattr(config, "__post_init__", None)

    def __post_init__(self: Any) -> None:  # noqa: N807
        for name, kind in _hints(type(self)).items():
            value = coerced(getattr(self, name), kind, name=f"{type(self).__name__}.{name}")
            object.__setattr__(self, name, value)
        if check is not None:
            check(self)

    setattr(config, "__post_init__", __post_init__)  # noqa: B010  (pyright knows no such attribute of a type)
    return config


def coerced(value: Any, kind: Any, *, name: str) -> Any:
    """Convert a value to the annotated type `kind`, without loss; raise ValueError that begins with `name`.

    Enums are made from their values, dataclasses from dicts, tuples from any sequence (a pair of ints from one int),
    `Path` and `str` from each other, numbers from NumPy's. Other types pass unchecked.
    """
    result = _converted(value, kind, name)
    if result is _UNLIKE:
        expected = " or ".join("null" if arm is NoneType else _called(arm) for arm in arms_of(kind))
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
    return result


def _converted(value: Any, kind: Any, name: str) -> Any:
    """Return the converted value, or _UNLIKE if it cannot be converted; a wrong part of it raises."""
    origin, arms = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        if value is None and NoneType in arms:
            return None
        arms = [arm for arm in arms if arm is not NoneType]
        if len(arms) == 1:
            return _converted(value, arms[0], name)
        for arm in arms:  # in the order in which they are written: `int | float` keeps 1 an int
            try:
                return coerced(value, arm, name=name)
            except ValueError:
                pass
        return _UNLIKE
    if origin is Literal:
        if not (isinstance(value, str) and value in arms):
            raise ValueError(f"{name}: expected one of {', '.join(arms)}; got {value!r}")
        return arms[arms.index(value)]
    if origin is dict:
        return dict(value) if isinstance(value, Mapping) else _UNLIKE
    if origin in (tuple, list):
        if arms == (int, int) and _is_whole(value):
            return (int(value),) * 2
        if isinstance(value, (str, bytes, Mapping, set)) or not isinstance(value, Iterable):
            return _UNLIKE
        items = list(value)
        kinds = arms if origin is tuple and arms[1:] != (...,) else arms[:1] * len(items)
        if len(items) != len(kinds):
            return _UNLIKE
        return origin(coerced(item, kind, name=name) for item, kind in zip(items, kinds, strict=True))
    return _plain(value, kind, name=name) if isinstance(kind, type) else value


def described(value: Any) -> str:
    """Return what messages call an argument of the wrong kind: its type, and of arrays dtype and shape."""
    shape, kind = getattr(value, "shape", None), f"{type(value).__module__.partition('.')[0]}.{type(value).__name__}"
    return kind.removeprefix("builtins.") if shape is None else f"{kind} of {value.dtype} and shape {tuple(shape)}"


def check_several(values: Any, kind: type, *, name: str, made_by: str) -> None:
    """Raise ValueError for anything but at least one value of a type, in a list or another sequence."""
    if not isinstance(values, Sequence):
        found = described(values)
    elif all(isinstance(value, kind) for value in values):
        found = "" if values else "an empty list"
    else:
        found = f"a list with {described(next(value for value in values if not isinstance(value, kind)))}"
    if found:
        raise ValueError(
            f"{name}: expected a list of at least one {kind.__name__}, as {made_by} makes them, got {found}"
        )


def check_path(value: Any, *, name: str) -> None:
    """Raise ValueError for anything but a string or a path; unlike `coerced` it leaves URLs as they are."""
    if not _is_path(value):
        raise ValueError(f"{name}: expected a path as str or Path, got {value!r}")


def pair(size: Size, *, name: str = "img_size") -> tuple[int, int]:
    """Return a size as two numbers of at least 1; one number stands for both."""
    # What the code itself passes on, several times a step, needs no second look.
    if type(size) is tuple and len(size) == 2 and all(type(side) is int and side > 0 for side in size):
        return size
    sides = coerced(size, tuple[int, int], name=name)
    check_number(sides, NATURAL, name=name)
    return sides


def _plain(value: Any, kind: type, *, name: str) -> Any:
    """Convert to a type without type arguments."""
    if is_choice(kind):
        if value not in [*kind]:
            raise ValueError(f"{name}: expected one of {', '.join(kind)}; got {value!r}")
        return kind(value)
    if is_dataclass(kind) and isinstance(value, Mapping):
        known = [field.name for field in fields(kind)]
        for key in value:
            if key not in known:
                raise ValueError(f"{name}: unknown key {key}{near_names(key, known)}")
        try:
            return kind(**value)
        except (TypeError, ValueError) as error:  # a key is missing, or a value means nothing
            raise ValueError(f"{name}: {error}") from error
    if kind not in _SCALARS:
        return _UNLIKE if is_dataclass(kind) and not isinstance(value, kind) else value
    stands_for_it, make = _SCALARS[kind]
    return make(value) if stands_for_it(value) else _UNLIKE


def _called(kind: Any) -> str:
    """Return what messages call an annotation."""
    return getattr(get_origin(kind) or kind, "__name__") if get_origin(kind) in (None, dict) else str(kind)  # noqa: B009


def _is_whole(value: Any) -> bool:
    try:
        operator.index(value)
    except TypeError:
        return False
    return not isinstance(value, bool)


def _is_path(value: Any) -> bool:
    return isinstance(value, (str, os.PathLike))


_SCALARS: dict[type, tuple[Callable[[Any], bool], Callable[[Any], Any]]] = {
    Path: (_is_path, Path),
    str: (_is_path, lambda value: str(os.fspath(value))),
    bool: (lambda value: isinstance(value, (bool, np.bool_)), bool),
    int: (_is_whole, int),
    float: (lambda value: isinstance(value, Real) and not isinstance(value, bool), float),
}
_hints = cache(get_type_hints)


def check_numbers(config: Any, prefix: str = "", /, **intervals: str) -> None:
    """Raise ConfigError for a number outside of its interval, such as `(0, 1]`.

    None passes; of a tuple each number is checked. `inf` as an end is no value, and NaN lies in no interval.
    `prefix`: what stands before the names of the fields: `mix.` in a recipe, `--` for options of a verb.
    """
    for name, interval in intervals.items():
        field = f"--{name.replace('_', '-')}" if prefix == "--" else prefix + name
        check_number(getattr(config, name), interval, name=field)


def check_number(value: Any, interval: str, *, name: str) -> None:
    """Raise ConfigError for one value, as `check_numbers` does."""
    low, high = map(float, interval[1:-1].split(","))
    for number in value if isinstance(value, (tuple, list)) else (value,):
        if number is None:
            continue
        try:
            above = low <= number if interval[0] == "[" else low < number
            below = number <= high if interval[-1] == "]" else number < high
        except TypeError:
            raise ConfigError(f"{name} must be a number, got {number!r}") from None
        if not (above and below):  # so NaN, which no comparison is true of, is refused
            shown = list(value) if isinstance(value, tuple) else value
            raise ConfigError(f"{name} must be {_in_words(interval, low, high, number)}, got {shown}")


def _in_words(interval: str, low: float, high: float, number: float) -> str:
    if not math.isfinite(number):
        return "a finite number"
    least = f"{'at least' if interval[0] == '[' else 'above'} {low:g}"
    most = f"{'at most' if interval[-1] == ']' else 'below'} {high:g}"
    return least if high == math.inf else f"{least} and {most}"
