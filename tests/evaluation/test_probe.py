"""The linear probe against gradient-free algebra written out, and what it must find."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tokenlabel.evaluation.probe import RIDGE, fit_probe, nearest_classes


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_the_fit_is_the_minimum(seed):
    """Moving any weight a little makes the penalised error no smaller."""
    rng = np.random.default_rng(seed)
    x, classes = rng.normal(0, 1, (30, 4)), rng.integers(0, 3, 30)
    probe = fit_probe(torch.from_numpy(x), torch.from_numpy(classes), num_classes=3, ridge=0.1)
    shrinkage = 0.1 * x.var(axis=0).mean()

    def error(weight, bias):
        residual = x @ weight + bias - np.eye(3)[classes]
        return (residual**2).sum(axis=1).mean() + shrinkage * (weight**2).sum()

    weight, bias = probe.weight.numpy(), probe.bias.numpy()
    least = error(weight, bias)
    for _ in range(10):
        step = rng.normal(0, 1e-3, weight.shape)
        assert error(weight + step, bias) >= least
        assert error(weight, bias + rng.normal(0, 1e-3, 3)) >= least


def test_classes_that_a_line_divides_are_told_apart():
    rng = np.random.default_rng(0)
    x = rng.normal(0, 1, (400, 6)).astype(np.float32)
    classes = (x[:, 2] > 0).astype(np.int64)
    probe = fit_probe(torch.from_numpy(x), torch.from_numpy(classes), num_classes=3)
    right = probe.classes(torch.from_numpy(x)).numpy() == classes
    assert right.mean() > 0.97


def test_features_that_repeat_each_other_are_no_obstacle():
    x = torch.ones(10, 4)
    x[:5, :2] = -1
    probe = fit_probe(x, torch.tensor([0] * 5 + [1] * 5), num_classes=2)
    assert probe.classes(x).tolist() == [0] * 5 + [1] * 5


def test_features_that_are_all_alike_name_the_most_frequent_class():
    probe = fit_probe(torch.full((10, 4), 0.3), torch.tensor([0] * 4 + [1] * 6), num_classes=3)
    assert probe.classes(torch.zeros(2, 4)).tolist() == [1, 1]
    assert not probe.weight.any()


def test_a_shift_of_all_features_changes_nothing():
    rng = np.random.default_rng(1)
    x, classes = torch.from_numpy(rng.normal(0, 1, (50, 3))), torch.from_numpy(rng.integers(0, 2, 50))
    near, far = (fit_probe(x + shift, classes, num_classes=2, ridge=RIDGE) for shift in (0, 100))
    torch.testing.assert_close(near.weight, far.weight, atol=1e-6, rtol=0)
    assert near.classes(x).tolist() == far.classes(x + 100).tolist()
    assert near.weight.shape == (3, 2)
    assert float(near.bias.sum() + (x @ near.weight).sum(dim=1).mean()) == pytest.approx(1)


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.integers(1, 12))
def test_neighbours_vote_as_in_loops(seed: int, k: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    features, queries = (torch.randn(n, 4, generator=generator) for n in (9, 5))
    classes = torch.randint(3, (9,), generator=generator)
    found = nearest_classes(features, classes, queries, num_classes=3, k=k)
    centre = features.mean(dim=0)
    for query, answer in zip(queries, found.tolist(), strict=True):
        similar = [float(F.cosine_similarity(query - centre, f - centre, dim=0)) for f in features]
        nearest = sorted(range(9), key=lambda i: -similar[i])[:k]
        votes = [[similar[i] for i in nearest if classes[i] == c] for c in range(3)]
        assert answer == max(range(3), key=lambda c: (len(votes[c]), sum(votes[c])))
