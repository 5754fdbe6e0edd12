"""Differences between rows of a comparison, seed by seed, and whether they are larger than their spread."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

# The 0.975 quantile of Student's t for 1 to 10 degrees of freedom; beyond, a series in their inverse is
# good to 0.001 (Cornish and Fisher, as in Abramowitz and Stegun, 26.7.5).
_STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
_NORMAL = 1.959964


def student_t(degrees: int) -> float:
    """Return the 0.975 quantile of Student's t: half of a 95% interval, in standard errors."""
    if degrees < 1:
        raise ValueError(f"an interval needs at least one degree of freedom, got {degrees}")
    if degrees <= len(_STUDENT_T):
        return _STUDENT_T[degrees - 1]
    z = _NORMAL
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / degrees + second / degrees**2 + third / degrees**3


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Mean of some values and half of its 95% interval; infinite for a single value."""

    values: tuple[float, ...]
    mean: float
    half: float

    @property
    def is_resolved(self) -> bool:
        """Whether the interval leaves out 0: the mean is larger than its spread."""
        return abs(self.mean) > self.half


def spread_of(values: Sequence[float]) -> Spread:
    """Return the mean of values and the half width of its 95% interval by Student's t; NaN ± infinity if one of them
    is not finite.
    """
    half = math.inf
    if not all(map(math.isfinite, values)):
        return Spread(values=tuple(values), mean=math.nan, half=half)
    if len(values) > 1:
        half = student_t(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return Spread(values=tuple(values), mean=fmean(values), half=half)


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Spread | None:
    """Return the spread of ours - theirs over the seeds (the keys) that both have; None if there are none.

    A seed gives both rows the same initial weights, order of images, crops and mixes wherever they can be the
    same, so differences vary less than the values.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    return spread_of([ours[seed] - theirs[seed] for seed in seeds]) if seeds else None
