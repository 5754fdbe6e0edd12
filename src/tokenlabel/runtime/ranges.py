"""Numbers that mean something: the interval that each field of a configuration lies in, said where the field is."""

from __future__ import annotations

import math
from typing import Any

from tokenlabel.runtime.errors import ConfigError

NATURAL, COUNT = "[1, inf)", "[0, inf)"
POSITIVE, SHARE, PART = "(0, inf)", "[0, 1]", "(0, 1]"


def check_numbers(config: Any, prefix: str = "", /, **intervals: str) -> None:
    """Raise ConfigError for a number outside of its interval, such as `(0, 1]`.

    None passes; of a tuple each number is checked. `inf` as an end is no value, and NaN lies in no interval.
    `prefix`: what stands before the names of the fields: `mix.` in a recipe, `--` for options of a verb.
    """
    for name, interval in intervals.items():
        value = getattr(config, name)
        low, high = map(float, interval[1:-1].split(","))
        for number in value if isinstance(value, (tuple, list)) else (value,):
            if number is None:
                continue
            above = low <= number if interval[0] == "[" else low < number
            below = number <= high if interval[-1] == "]" else number < high
            if not (above and below):
                shown = list(value) if isinstance(value, tuple) else value
                field = f"--{name.replace('_', '-')}" if prefix == "--" else prefix + name
                raise ConfigError(f"{field} must be {_in_words(interval, low, high, number)}, got {shown}")


def _in_words(interval: str, low: float, high: float, number: float) -> str:
    if not math.isfinite(number):
        return "a finite number"
    least = f"{'at least' if interval[0] == '[' else 'above'} {low:g}"
    most = f"{'at most' if interval[-1] == ']' else 'below'} {high:g}"
    return least if high == math.inf else f"{least} and {most}"
