import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from label_cases import dense_targets, draw_targets

from tokenlabel.core.mix import MixPlan, mix_targets
from tokenlabel.core.targets import TokenTargets, class_targets

cases = st.tuples(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 6), st.integers(2, 12))


def draw(case, **options):
    seed, num_images, num_tokens, num_classes = case
    return draw_targets(np.random.default_rng(seed), (num_images, num_tokens), num_classes, **options)


@given(cases)
def test_dense_adds_up_the_entries(case):
    targets = draw(case, weighted=True)
    dense = targets.dense(case[3])
    torch.testing.assert_close(dense, dense_targets(targets, case[3]))
    torch.testing.assert_close(dense.sum(dim=2), targets.weight)


def test_a_class_named_twice_adds_up_and_padding_adds_nothing():
    targets = TokenTargets(
        classes=torch.tensor([[2, 0, 2, 0]]),
        excess=torch.tensor([[[0.3, 0.2, 0.1, 0.0]]]),
        floor=torch.tensor([[0.1]]),
        weight=torch.tensor([[1.0]]),
    )
    torch.testing.assert_close(targets.dense(4), torch.tensor([[[0.3, 0.1, 0.5, 0.1]]]))


@given(cases, st.floats(0, 1))
def test_smoothing_keeps_the_sum(case, epsilon):
    targets, num_classes = draw(case, weighted=True), case[3]
    dense, weight = dense_targets(targets, num_classes), targets.weight[..., None]
    smoothed = targets.smoothed(epsilon, num_classes)
    torch.testing.assert_close(smoothed.dense(num_classes), (1 - epsilon) * dense + epsilon / num_classes * weight)
    torch.testing.assert_close(smoothed.dense(num_classes).sum(dim=2), targets.weight)
    torch.testing.assert_close(smoothed.weight, targets.weight)


@given(cases)
def test_blending_is_a_weighted_mean_of_each_token(case):
    num_classes = case[3]
    ours, theirs = draw(case, weighted=True), draw((case[0] + 1, *case[1:]), weighted=True)
    share = torch.from_numpy(np.random.default_rng(case[0]).uniform(0, 1, tuple(ours.weight.shape)))
    blended = ours.blended(theirs, share)
    expected = (1 - share)[..., None] * dense_targets(ours, num_classes)
    expected += share[..., None] * dense_targets(theirs, num_classes)
    torch.testing.assert_close(blended.dense(num_classes), expected)
    torch.testing.assert_close(blended.weight, (1 - share) * ours.weight + share * theirs.weight)


def test_targets_of_other_images():
    targets = draw((0, 3, 4, 9), weighted=True)
    chosen = targets.of_images(torch.tensor([2, 0, 0]))
    torch.testing.assert_close(chosen.dense(9), targets.dense(9)[[2, 0, 0]])
    torch.testing.assert_close(chosen.weight, targets.weight[[2, 0, 0]])


@pytest.mark.parametrize("num_classes", [2, 21_841])
def test_class_targets_are_certain(num_classes):
    class_ids = torch.tensor([0, num_classes - 1, 1])
    dense = class_targets(class_ids).dense(num_classes)
    assert torch.equal(dense, torch.nn.functional.one_hot(class_ids, num_classes)[:, None].float())


def test_targets_are_mixed_on_their_own_grid_and_over_their_own_classes_only():
    targets = draw((0, 2, 6, 4))
    plan = MixPlan(torch.full((2, 1, 1), 0.5), torch.tensor([1, 0]), on_tokens=False)
    assert mix_targets(targets, plan, (2, 3)).weight.shape == (2, 6)
    with pytest.raises(ValueError, match=r"shares of \(2, 1\) .* targets of \(2, 6\)"):
        mix_targets(targets, plan, (1, 1))
    ours, theirs = (class_targets([0, 1], num_classes=count) for count in (3, 5))
    with pytest.raises(ValueError, match="3 and 5 classes"):
        ours.blended(theirs, torch.full((2, 1), 0.5))


def test_how_many_classes_there_are_is_known_or_asked_for():
    assert class_targets([0, 1], num_classes=3).smoothed(0.3).dense().shape == (2, 1, 3)
    with pytest.raises(ValueError, match="give num_classes"):
        class_targets([0, 1]).dense()
