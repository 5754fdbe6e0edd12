"""RandAugment by timm's names, such as `rand-m9-mstd0.5-inc1`, with exact geometry.

Changes of colour make the same pixels as timm's. Geometric operations don't touch pixels: each says which view it
makes, so that several become one resampling and labels follow all of them.
Source: Cubuk et al., "RandAugment", 2019; names, ranges and defaults from timm.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from PIL import ImageOps

from tokenlabel.core.geometry import View
from tokenlabel.data.colours import (
    ColourChange,
    blurred,
    brightened,
    contrasted,
    posterized,
    saturated,
    sharpened,
    solarize_added,
    solarized,
)
from tokenlabel.runtime.errors import ConfigError

# An operation's strength is a level: 1 is the end of its range (timm's magnitude 10), and the sign is drawn
# for all alike; those that have only one direction ignore it.
_FULL_MAGNITUDE = 10.0


@dataclass(frozen=True, slots=True)
class Changes:
    """What was drawn for one image: views to warp it by, then changes of colour, each in order."""

    warps: list[View]
    colours: list[ColourChange]


@dataclass(frozen=True, slots=True, kw_only=True)
class RandAugment:
    """Draws `num_ops` operations for each image, and applies each with a probability.

    `weights`: the operations to draw from, and how often each. `replace`: an operation may be drawn again for
    the same image. `magnitude`: how strong, of 10; `magnitude_std`: the deviation of its normal noise, where
    infinity draws evenly from 0 to `magnitude`; `max_magnitude`: what it can't exceed.
    """

    weights: Mapping[str, float]
    replace: bool = True
    magnitude: float = _FULL_MAGNITUDE
    magnitude_std: float = 0.0
    max_magnitude: float = _FULL_MAGNITUDE
    num_ops: int = 2
    probability: float = 0.5

    def draw(self, rng: np.random.Generator, *, img_size: tuple[int, int]) -> Changes:
        """Draw what happens to an image of `img_size` (height, width)."""
        shares = np.fromiter(self.weights.values(), float)
        names = rng.choice(list(self.weights), self.num_ops, replace=self.replace, p=shares / shares.sum())
        changes = Changes([], [])
        for name in names.tolist():
            level = self._draw_level(rng)
            if rng.random() >= self.probability:
                continue
            if name in WARPS:
                changes.warps.append(WARPS[name](level, img_size))
            else:
                changes.colours.append(COLOURS[name](level))
        return changes

    def _draw_level(self, rng: np.random.Generator) -> float:
        magnitude = self.magnitude
        if math.isinf(self.magnitude_std):
            magnitude = rng.uniform(0, magnitude)
        elif self.magnitude_std > 0:
            magnitude = rng.normal(magnitude, self.magnitude_std)
        sign = 1 if rng.random() < 0.5 else -1
        return sign * min(max(magnitude, 0.0), self.max_magnitude) / _FULL_MAGNITUDE


def parse_randaugment(name: str) -> RandAugment:
    """Return what a name of timm's means: `rand`, then options divided by dashes, in any order.

    `m9` magnitude, `n2` operations an image, `p0.5` probability of each, `mstd0.5` noise of the magnitude (above
    100 or `inf`: even from 0), `mmax10` its bound, `inc1` stronger colours with more magnitude, `t3a` which set of
    operations (weights, 3a, 3aw), `w0` the weights of timm's early versions. Raises ConfigError for anything else.
    """
    start, *options = name.split("-")
    if start != "rand":
        raise ConfigError(f"randaugment {name!r}: expected a name that begins with 'rand-', as rand-m9-mstd0.5-inc1")
    given = dict(_parse_option(option, name) for option in options)
    if len(given) < len(options):
        raise ConfigError(f"randaugment {name!r}: names an option twice")
    weights, replace = _choose_operations(name, given)
    num_ops = int(given.get("n", 2))
    if not replace and num_ops > len(weights):
        raise ConfigError(f"randaugment {name!r}: draws {num_ops} different operations of only {len(weights)}")
    magnitude_std = float(given.get("mstd", 0))
    return RandAugment(
        weights=weights,
        replace=replace,
        magnitude=int(given.get("m", _FULL_MAGNITUDE)),
        magnitude_std=math.inf if magnitude_std > 100 else magnitude_std,
        max_magnitude=int(given.get("mmax", _FULL_MAGNITUDE)),
        num_ops=num_ops,
        probability=float(given.get("p", 0.5)),
    )


def _parse_option(option: str, name: str) -> tuple[str, str]:
    """Split "mstd0.5" into its key and value, and check both."""
    key = "t" if option.startswith("t") else re.sub(r"(\d.*|inf)$", "", option)
    value = option[len(key) :]
    if key not in _OPTIONS:
        raise ConfigError(f"randaugment {name!r}: no option {option!r}{_near(key, _OPTIONS)}")
    if not re.fullmatch(_OPTIONS[key], value):
        hint = _near(value, _OPERATION_SETS) if key == "t" else f"; expected {key} followed by a number"
        raise ConfigError(f"randaugment {name!r}: {option!r} has no value that is known{hint}")
    return key, value


def _choose_operations(name: str, given: Mapping[str, str]) -> tuple[Mapping[str, float], bool]:
    """Return the weighted operations of a policy, and whether one may be drawn twice for an image."""
    operations = _INCREASING if given.get("inc", "0") != "0" else _PLAIN
    if "t" in given and "w" in given:
        raise ConfigError(f"randaugment {name!r}: t and w both choose the operations; give one of them")
    if "w" in given:
        return {operation: weight for operation, weight in operations.items() if weight > 0}, False
    if "t" in given:
        weights = _OPERATION_SETS[given["t"]]
        return weights, len(set(weights.values())) == 1
    return dict.fromkeys(operations, 1.0), True


def _near(name: str, known: Iterable[str]) -> str:
    """Return what to say about a name that is not known."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; there are {', '.join(known)}"


def _with_magnitude(change: Callable[[float], ColourChange]) -> Callable[[float], ColourChange]:
    """Make a factor of 0.1 to 1.9 out of a level, the sign of which does not matter."""
    return lambda level: change(abs(level) * 1.8 + 0.1)


def _increasing(change: Callable[[float], ColourChange]) -> Callable[[float], ColourChange]:
    """Make a factor out of a level: the further from 0, the further from 1, down to 0.1."""
    return lambda level: change(max(0.1, 1 + level * 0.9))


WARPS: dict[str, Callable[[float, tuple[int, int]], View]] = {
    "Rotate": lambda level, img_size: View.rotation(30 * level, img_size=img_size),
    "ShearX": lambda level, img_size: View.shear(0.3 * level, 0, img_size=img_size),
    "ShearY": lambda level, img_size: View.shear(0, 0.3 * level, img_size=img_size),
    "TranslateXRel": lambda level, img_size: View.translation(-0.45 * level, 0),
    "TranslateYRel": lambda level, img_size: View.translation(0, -0.45 * level),
}
"""From a level and an image's size (height, width) to the view that the operation makes."""

COLOURS: dict[str, Callable[[float], ColourChange]] = {
    "AutoContrast": lambda level: ImageOps.autocontrast,
    "Equalize": lambda level: ImageOps.equalize,
    "Invert": lambda level: ImageOps.invert,
    "Posterize": lambda level: posterized(int(abs(level) * 4)),
    "PosterizeIncreasing": lambda level: posterized(4 - int(abs(level) * 4)),
    "Solarize": lambda level: solarized(min(256, int(abs(level) * 256))),
    "SolarizeIncreasing": lambda level: solarized(256 - min(256, int(abs(level) * 256))),
    "SolarizeAdd": lambda level: solarize_added(min(128, int(abs(level) * 110))),
    "Color": _with_magnitude(saturated),
    "ColorIncreasing": _increasing(saturated),
    "Contrast": _with_magnitude(contrasted),
    "ContrastIncreasing": _increasing(contrasted),
    "Brightness": _with_magnitude(brightened),
    "BrightnessIncreasing": _increasing(brightened),
    "Sharpness": _with_magnitude(sharpened),
    "SharpnessIncreasing": _increasing(sharpened),
    "Desaturate": lambda level: saturated(0.5 - 0.5 * min(abs(level), 1)),
    "GaussianBlur": lambda level: blurred(0.1 + 1.9 * min(abs(level), 1)),
}
"""From a level to the change of colour that the operation makes."""

# The operations that are drawn by default, and the weights that timm's early versions gave them (`w0`).
_PLAIN = {
    "AutoContrast": 0.025,
    "Equalize": 0.005,
    "Invert": 0.0,
    "Rotate": 0.3,
    "Posterize": 0.0,
    "Solarize": 0.005,
    "SolarizeAdd": 0.005,
    "Color": 0.025,
    "Contrast": 0.005,
    "Brightness": 0.005,
    "Sharpness": 0.025,
    "ShearX": 0.2,
    "ShearY": 0.2,
    "TranslateXRel": 0.1,
    "TranslateYRel": 0.1,
}
_INCREASING = {f"{name}Increasing" if f"{name}Increasing" in COLOURS else name: w for name, w in _PLAIN.items()}

_OPERATION_SETS: dict[str, dict[str, float]] = {
    "3a": {"SolarizeIncreasing": 1, "Desaturate": 1, "GaussianBlur": 1},
    "3aw": {
        **dict.fromkeys(("SolarizeIncreasing", "Desaturate", "GaussianBlur"), 6),
        "Rotate": 3,
        "ShearX": 2,
        "ShearY": 2,
        **dict.fromkeys(("PosterizeIncreasing", "AutoContrast", "ColorIncreasing", "SharpnessIncreasing"), 1),
        **dict.fromkeys(("ContrastIncreasing", "BrightnessIncreasing", "Equalize", "Invert"), 1),
    },
    "weights": {
        "Rotate": 3,
        "ShearX": 2,
        "ShearY": 2,
        "TranslateXRel": 1,
        "TranslateYRel": 1,
        **dict.fromkeys(("ColorIncreasing", "SharpnessIncreasing", "AutoContrast"), 0.25),
        **dict.fromkeys(("SolarizeIncreasing", "SolarizeAdd", "ContrastIncreasing"), 0.05),
        **dict.fromkeys(("BrightnessIncreasing", "Equalize", "PosterizeIncreasing", "Invert"), 0.05),
    },
}

# What the value of each option looks like.
_NUMBER = r"\d+(\.\d+)?"
_OPTIONS = {
    "m": r"\d+",
    "n": r"\d+",
    "p": _NUMBER,
    "mstd": rf"{_NUMBER}|inf",
    "mmax": r"\d+",
    "inc": r"\d+",
    "t": "|".join(_OPERATION_SETS),
    "w": "0",
}
