"""Intervals over seeds."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from studies.results import paired, spread_of


def test_an_interval_covers_the_mean_of_normal_draws_as_often_as_it_says():
    draws = np.random.default_rng(0).standard_normal((20_000, 5))
    covered = sum(abs(spread.mean) <= spread.half for spread in map(spread_of, draws.tolist()))
    assert covered / len(draws) == pytest.approx(0.95, abs=0.005)


@pytest.mark.parametrize(("count", "quantile"), [(2, 12.706), (5, 2.776), (11, 2.228), (21, 2.086)])
def test_quantiles_are_those_of_printed_tables(count, quantile):
    """Values of standard deviation 1."""
    values = np.arange(count) / np.std(np.arange(count), ddof=1)
    assert spread_of(values.tolist()).half * math.sqrt(count) == pytest.approx(quantile)


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
