"""Evaluators against the same figures counted image by image, and their sums over processes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenlabel.core.batch import Batch
from tokenlabel.core.geometry import View, stack_views
from tokenlabel.core.targets import TokenTargets
from tokenlabel.evaluation.evaluators import (
    NUM_BINS,
    Accuracy,
    Calibration,
    MultiLabel,
    PerClass,
    Predictions,
    RealLabels,
    TokenTruth,
    average_precision,
    rank_of_class,
)
from tokenlabel.runtime.distributed import Ranks


def seen(logits, class_ids, keys=None):
    batch = Batch(
        images=torch.zeros(len(logits), 3, 2, 2, dtype=torch.uint8),
        class_ids=torch.as_tensor(class_ids),
        num_classes=logits.shape[1],
        views=torch.from_numpy(stack_views([View.identity()] * len(logits))),
        score_maps=None,
        keys=keys or [str(i) for i in range(len(logits))],
        has_class=torch.ones(len(logits), dtype=torch.bool),
    )
    return Predictions(batch, (1, 1), torch.as_tensor(logits, dtype=torch.float32), None)


def figures(evaluator, *batches):
    for batch in batches:
        evaluator.add(batch)
    return dict(evaluator.figures())


def draw(rng, num_images=40, num_classes=7):
    return rng.normal(0, 2, (num_images, num_classes)).astype(np.float32), rng.integers(0, num_classes, num_images)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_accuracy_is_what_sorting_each_image_gives(seed):
    rng = np.random.default_rng(seed)
    logits, class_ids = draw(rng)
    found = figures(Accuracy(), seen(logits[:13], class_ids[:13]), seen(logits[13:], class_ids[13:]))
    places = [list(np.argsort(-row)).index(class_id) for row, class_id in zip(logits, class_ids, strict=True)]
    losses = [
        np.log(np.exp(row.astype(np.float64)).sum()) - row[class_id]
        for row, class_id in zip(logits, class_ids, strict=True)
    ]
    assert found["num_images"] == 40
    assert found["top1"] == pytest.approx(np.mean([place < 1 for place in places]))
    assert found["top5"] == pytest.approx(np.mean([place < 5 for place in places]))
    assert found["loss"] == pytest.approx(np.mean(losses), abs=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_calibration_is_what_filling_bins_one_by_one_gives(seed):
    rng = np.random.default_rng(seed)
    logits, class_ids = draw(rng)
    bins = [[] for _ in range(NUM_BINS)]
    for row, class_id in zip(logits.astype(np.float64), class_ids, strict=True):
        probs = np.exp(row) / np.exp(row).sum()
        for i, members in enumerate(bins):
            if i / NUM_BINS < probs.max() <= (i + 1) / NUM_BINS:
                members.append((probs.max(), probs.argmax() == class_id))
    ece = sum(
        len(members) / 40 * abs(np.mean([c for c, _ in members]) - np.mean([r for _, r in members]))
        for members in bins
        if members
    )
    found = figures(Calibration(), seen(logits, class_ids))["ece"]
    assert found == pytest.approx(ece, abs=1e-9)
    assert 0 <= found <= 1


def test_a_model_as_right_as_it_is_sure_is_calibrated():
    """Logits that give probability 0.75, right in three of four images."""
    logits = np.tile(np.array([[np.log(3), 0.0]], np.float32), (4, 1))
    assert figures(Calibration(), seen(logits, [0, 0, 0, 1]))["ece"] == pytest.approx(0, abs=1e-6)


def test_ties_count_against_a_model():
    assert rank_of_class(torch.zeros(2, 5), torch.tensor([0, 4])).tolist() == [4, 4]


def test_logits_that_are_no_numbers_are_never_right():
    logits = torch.tensor([[torch.nan] * 5, [0.0, 1.0, torch.nan, 3.0, 4.0]])
    assert rank_of_class(logits, torch.tensor([2, 4])).tolist() == [4, 1]
    assert rank_of_class(logits, torch.tensor([0, 2])).tolist() == [4, 4]


def test_each_class_has_its_own_accuracy():
    logits = np.eye(3, dtype=np.float32)[[0, 0, 1, 1]]
    found = figures(PerClass(["ant", "bee", "cat"]), seen(logits, [0, 1, 1, 1]))
    assert found == {"per_class/ant": 1.0, "per_class/bee": pytest.approx(2 / 3)}


def test_real_counts_any_of_an_images_labels_and_leaves_out_those_without():
    """Beyer et al. 2020: right if the guess is among the labels; images without a label don't count."""
    labels = {"a.JPEG": [1, 2], "b.JPEG": [], "c.JPEG": [0]}
    logits = np.eye(3, dtype=np.float32)[[2, 1, 1]]
    found = figures(RealLabels(labels), seen(logits, [0, 0, 0], keys=["n01/a.JPEG", "n01/b.JPEG", "n02/c.JPEG"]))
    assert found == {"num_real_images": 2, "real": 0.5}
    with pytest.raises(ValueError, match=r"know no image d\.JPEG"):
        RealLabels(labels).add(seen(logits[:1], [0], keys=["d.JPEG"]))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000))
def test_average_precision_is_what_counting_gives(seed):
    rng = np.random.default_rng(seed)
    scores, truth = rng.integers(0, 6, 20) / 2, rng.random(20) < 0.4
    truth[0] = True
    precisions = [np.mean(truth[scores >= score]) for score, right in zip(scores, truth, strict=True) if right]
    found = average_precision(torch.from_numpy(scores).float(), torch.from_numpy(truth))
    assert found == pytest.approx(np.mean(precisions), abs=1e-6)


def test_mean_average_precision_is_over_classes_that_occur():
    logits = np.array([[3, 0, 9], [2, 5, 9], [1, 4, 9]], np.float32)
    labels = {"a": [0], "b": [0, 1], "c": []}  # of class 2 there is none
    found = figures(MultiLabel(labels), seen(logits, [0, 0, 0], keys=["a", "b", "c"]))
    assert found == {"num_images": 3, "map": 1.0}


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_tokens_are_judged_as_a_confusion_matrix_written_out(seed):
    rng = np.random.default_rng(seed)
    num_classes, shape = 5, (3, 8)
    truth, said, shares = rng.integers(0, 5, shape), rng.integers(0, 5, shape), rng.random(shape)
    targets = TokenTargets(
        classes=torch.arange(num_classes).expand(3, -1),
        excess=torch.from_numpy(np.eye(num_classes, dtype=np.float32)[truth] * shares[..., None]).float(),
        floor=torch.zeros(shape),
        weight=torch.ones(shape),
    )
    judged = [
        (int(t), int(s))
        for t, s, share in zip(truth.flat, said.flat, shares.flat, strict=True)
        if np.float32(share) >= 0.25
    ]
    unions = {
        c: (sum(t == s == c for t, s in judged), sum(c in (t, s) for t, s in judged)) for c in {t for t, _ in judged}
    }
    evaluator = TokenTruth()
    evaluator.add_tokens(torch.from_numpy(said), targets, num_classes=num_classes)
    found = dict(evaluator.figures())
    assert found["num_tokens_judged"] == len(judged)
    assert found["token_accuracy"] == pytest.approx(np.mean([t == s for t, s in judged]))
    assert found["token_miou"] == pytest.approx(np.mean([hits / union for hits, union in unions.values()]))


class TwoRanks(Ranks):
    """The first of two processes, as it sees the other's sums."""

    def __init__(self, other):
        super().__init__(rank=0, world_size=2)
        object.__setattr__(self, "other", other)

    def all_gather(self, value):
        return [value, self.other]  # type: ignore[attr-defined]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 39))
def test_processes_that_divide_the_images_find_what_one_finds(seed, first):
    logits, class_ids = draw(np.random.default_rng(seed))
    labels = {str(i): [int(class_ids[i])] for i in range(40)}
    keys = list(labels)
    for make in (Accuracy, Calibration, lambda: PerClass("abcdefg"), lambda: MultiLabel(labels)):
        whole = figures(make(), seen(logits, class_ids, keys))
        ours, theirs = make(), make()
        ours.add(seen(logits[:first], class_ids[:first], keys[:first]))
        theirs.add(seen(logits[first:], class_ids[first:], keys[first:]))
        ours.join(TwoRanks(theirs.sums))
        assert dict(ours.figures()) == pytest.approx(whole)
