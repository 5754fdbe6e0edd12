import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from label_cases import dense_map, draw_score_map

from tokenlabel.core.geometry import Box
from tokenlabel.core.scores import Kind, from_mask, from_probabilities, from_top

CERTAIN = np.ones((2, 3, 1), np.float32)


def draw_distributions(seed, height, width, num_classes):
    logits = np.random.default_rng(seed).normal(0, 3, (height, width, num_classes))
    probs = np.exp(logits)
    return probs / probs.sum(axis=2, keepdims=True)


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 5), st.integers(1, 9), st.integers(1, 12))
def test_truncation_keeps_the_most_probable_and_spreads_the_rest(seed, height, width, num_classes, topk):
    probs = draw_distributions(seed, height, width, num_classes)
    score_map = from_probabilities(probs, topk)
    topk = min(topk, num_classes)
    assert score_map.codes.shape == (height, width, topk)
    dense = score_map.dense()
    for i in range(height):
        for j in range(width):
            by_rank = sorted(range(num_classes), key=lambda c: -probs[i, j, c])
            kept, dropped = by_rank[:topk], by_rank[topk:]
            assert score_map.class_ids[i, j].tolist() == kept
            np.testing.assert_allclose(dense[i, j, kept], probs[i, j, kept], rtol=1e-6)
            rest = sum(probs[i, j, c] for c in dropped)
            np.testing.assert_allclose(dense[i, j, dropped], rest / max(len(dropped), 1), atol=1e-6)
    np.testing.assert_array_equal(score_map.top_class_ids, probs.argmax(axis=2))


@given(st.integers(0, 2**32 - 1), st.integers(2, 40))
def test_dense_is_a_distribution_and_the_one_that_was_defined(seed, num_classes):
    score_map = draw_score_map(np.random.default_rng(seed), num_classes)
    np.testing.assert_allclose(score_map.dense(), dense_map(score_map), atol=1e-6)
    np.testing.assert_allclose(score_map.dense().sum(axis=2), 1, atol=1e-5)


@pytest.mark.parametrize("num_classes", [2, 1000, 21_841, 70_000])
@pytest.mark.parametrize("topk", [1, 5])
def test_any_number_of_classes(num_classes, topk):
    probs = draw_distributions(0, 2, 3, num_classes).astype(np.float32)
    score_map = from_probabilities(probs, topk)
    best = np.argsort(-probs, axis=2)[..., :topk]
    np.testing.assert_array_equal(score_map.class_ids, best)  # no id is rounded, 2,049 no more than 69,999
    assert score_map.dense().shape == (2, 3, num_classes)
    np.testing.assert_allclose(score_map.dense().sum(axis=2), 1, atol=1e-4)


@pytest.mark.parametrize(("palette", "dtype"), [(256, np.uint8), (257, np.uint16), (65_537, np.uint32)])
def test_codes_are_as_small_as_the_palette_allows(palette, dtype):
    class_ids = np.arange(palette).reshape(1, -1, 1)
    score_map = from_top(class_ids, np.ones(class_ids.shape), num_classes=70_000)
    assert score_map.codes.dtype == dtype
    np.testing.assert_array_equal(score_map.class_ids, class_ids)


def test_entries_come_in_descending_order_with_their_classes():
    score_map = from_top(np.array([[[7, 3, 5]]]), np.array([[[0.1, 0.6, 0.2]]]), num_classes=9)
    assert score_map.class_ids.tolist() == [[[3, 5, 7]]]
    np.testing.assert_allclose(score_map.probs, [[[0.6, 0.2, 0.1]]], rtol=1e-6)
    assert score_map.palette.tolist() == [3, 5, 7]


def test_classes_of_probability_0_are_not_kept():
    """They may be named twice, stay out of the palette and share the rest."""
    class_ids, probs = np.array([[[2, 4, 4], [0, 0, 0]]]), np.array([[[0.6, 0, 0], [0, 0, 0]]])
    score_map = from_top(class_ids, probs, num_classes=5)
    assert score_map.palette.tolist() == [2]
    assert score_map.class_ids.shape == (1, 2, 3)  # every code is one of the palette's
    np.testing.assert_allclose(score_map.dense(), [[[0.1, 0.1, 0.6, 0.1, 0.1], [0.2] * 5]], rtol=1e-6)


def test_a_map_that_keeps_nothing_is_uniform():
    score_map = from_top(np.full((2, 2, 1), 3), np.zeros((2, 2, 1)), num_classes=4)
    np.testing.assert_allclose(score_map.dense(), np.full((2, 2, 4), 0.25))


def test_where_all_classes_are_kept_nothing_is_missing():
    score_map = from_top(np.array([[[0, 1]]]), np.array([[[0.6, 0.2]]]), num_classes=2)
    np.testing.assert_allclose(score_map.dense(), [[[0.75, 0.25]]], rtol=1e-6)


def test_rounding_of_half_precision_is_forgiven():
    probs = np.full((1, 1, 7), 1 / 7, np.float16) + np.float16(2e-4)
    assert probs.sum(dtype=np.float64) > 1
    np.testing.assert_allclose(from_probabilities(probs, 3).dense().sum(axis=2), 1, atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["kept", "dropped"])
def test_scores_that_are_not_finite_are_refused_with_the_name(bad, where):
    probs = draw_distributions(0, 2, 2, 6)
    place = probs[1, 0].argmax() if where == "kept" else probs[1, 0].argmin()
    probs[1, 0, place] = bad
    with pytest.raises(ValueError, match=r"dogs/rex\.png: 1 of 24 scores are not finite"):
        from_probabilities(probs, 2, name="dogs/rex.png")


def test_scores_that_are_no_distributions_are_refused():
    logits = np.random.default_rng(0).normal(0, 3, (2, 2, 6))
    with pytest.raises(ValueError, match=r"rex: .* at least 0 and sum to 1"):
        from_probabilities(logits, 2, name="rex")
    with pytest.raises(ValueError, match=r"sums from 0\.5 to 0\.5"):
        from_probabilities(np.full((2, 2, 5), 0.1), 2)
    with pytest.raises(ValueError, match=r"largest sum of 1\.2"):
        from_top(np.array([[[0, 1]]]), np.array([[[0.6, 0.6]]]), num_classes=3)
    with pytest.raises(ValueError, match=r"smallest of -0\.1"):
        from_top(np.array([[[0, 1]]]), np.array([[[0.6, -0.1]]]), num_classes=3)


@pytest.mark.parametrize("class_id", [-1, 10])
def test_classes_that_do_not_exist_are_refused(class_id):
    with pytest.raises(ValueError, match=r"rex: class ids run from .* expected 0 to 9"):
        from_top(np.array([[[0], [class_id]]]), np.ones((1, 2, 1)), num_classes=10, name="rex")


def test_a_class_named_twice_is_refused():
    with pytest.raises(ValueError, match="rex: a cell names the same class twice"):
        from_top(np.array([[[2, 1, 2]]]), np.full((1, 1, 3), 0.2), num_classes=3, name="rex")


def test_maps_of_the_wrong_shape_are_refused():
    with pytest.raises(ValueError, match=r"rex: .*\(2, 3\) and \(2, 3\)"):
        from_top(np.zeros((2, 3), int), np.ones((2, 3)), num_classes=3, name="rex")
    with pytest.raises(ValueError, match=r"\(2, 3, 1\) and \(2, 3, 2\)"):
        from_top(np.zeros((2, 3, 1), int), np.ones((2, 3, 2)), num_classes=3)
    with pytest.raises(ValueError, match="not empty"):
        from_top(np.zeros((0, 3, 1), int), np.ones((0, 3, 1)), num_classes=3)
    with pytest.raises(ValueError, match=r"rex: probabilities must be \[H, W, C\]"):
        from_probabilities(np.ones((4, 4)), 1, name="rex")
    with pytest.raises(ValueError, match="topk 0"):
        from_probabilities(CERTAIN, 0)


def test_logits_are_kept_as_they_are():
    logits = np.array([[[-2.0, 8.5, 0.0]]], np.float16)
    score_map = from_top(np.array([[[5, 6, 7]]]), logits, num_classes=10, kind=Kind.LOGITS)
    assert score_map.kind is Kind.LOGITS
    assert score_map.class_ids.tolist() == [[[6, 7, 5]]]
    assert score_map.probs.tolist() == [[[8.5, 0.0, -2.0]]]
    with pytest.raises(ValueError, match="logits"):
        score_map.dense()


def test_the_region_is_remembered():
    region = Box(0.1, 0, 0.9, 1)
    assert from_top(np.zeros((2, 3, 1), int), CERTAIN, num_classes=2, region=region).region == region
    assert from_probabilities(CERTAIN, 1, region=region).region == region


def test_masks_become_certainties():
    mask = np.array([[0, 1, 255], [9, 9, 0]], np.uint8)
    score_map = from_mask(mask, num_classes=10)
    assert np.where(score_map.probs[..., 0] > 0, score_map.top_class_ids, 255).tolist() == mask.tolist()
    np.testing.assert_allclose(score_map.dense()[0, 2], 0.1)
    with pytest.raises(ValueError, match="scene: class ids run from 0 to 255"):
        from_mask(mask, num_classes=10, unlabelled=-1, name="scene")
    with pytest.raises(ValueError, match="scene: 255 stands for unlabelled pixels"):
        from_mask(mask, num_classes=1000, name="scene")
