"""Intervals over seeds."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenlabel.comparison.spread import paired, spread_of, student_t


@pytest.mark.parametrize(
    ("degrees", "quantile"), [(1, 12.706), (4, 2.776), (10, 2.228), (11, 2.201), (20, 2.086), (100, 1.984)]
)
def test_quantiles_are_those_of_printed_tables(degrees, quantile):
    assert student_t(degrees) == pytest.approx(quantile, abs=1.5e-3)


def test_quantiles_are_those_of_draws():
    """Half of a 95% interval: 97.5% of t-distributed draws lie below it."""
    draws = np.random.default_rng(0).standard_t(4, 400_000)
    assert (draws < student_t(4)).mean() == pytest.approx(0.975, abs=1e-3)


def test_an_interval_over_few_seeds():
    """1, 2, 3, 4, 5: mean 3, standard deviation sqrt(2.5), 2.776 standard errors."""
    spread = spread_of([1, 2, 3, 4, 5])
    assert (spread.mean, spread.half) == (3, pytest.approx(2.776 * math.sqrt(2.5 / 5)))
    assert spread.is_resolved
    assert not spread_of([-1, 2, -3, 4]).is_resolved


def test_one_seed_says_nothing():
    assert not spread_of([5.0]).is_resolved


def test_differences_are_taken_seed_by_seed():
    """The rows vary by 10 and their difference by nothing."""
    spread = paired({0: 11.0, 1: 21.0, 2: 31.0, 7: 0.0}, {0: 10.0, 1: 20.0, 2: 30.0, 8: 5.0})
    assert spread is not None
    assert (spread.values, spread.half) == ((1.0, 1.0, 1.0), 0.0)
    assert paired({0: 1.0}, {1: 1.0}) is None


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=8), st.floats(-50, 50))
def test_an_interval_moves_with_its_values(values, shift):
    spread, moved = spread_of(values), spread_of([v + shift for v in values])
    assert moved.mean == pytest.approx(spread.mean + shift, abs=1e-9)
    assert moved.half == pytest.approx(spread.half, abs=1e-9)
