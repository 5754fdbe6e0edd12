import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from label_cases import dense_targets, draw_targets
from torch.nn import functional as F

from tokenlabel.core.config import Mixing
from tokenlabel.core.mix import MixPlan, cell_means, join_plans, mix_images, mix_targets, mix_tokens, sample_mix
from tokenlabel.core.targets import class_targets

MIXES = [Mixing.MIXTOKEN, Mixing.CUTMIX, Mixing.MIXUP]

seeds = st.integers(0, 2**32 - 1)
lengths = st.integers(1, 12)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draw_plan(rng, num_images, rows, columns):
    mask = torch.from_numpy(rng.random((num_images, rows, columns))).float()
    return MixPlan(mask, torch.from_numpy(rng.permutation(num_images)), on_tokens=True)


def overlap(cell, num_cells, piece, num_pieces):
    """The part of one of `num_cells` equal parts of [0, 1] that one of `num_pieces` equal parts covers."""
    start, end = (max(cell / num_cells, piece / num_pieces), min((cell + 1) / num_cells, (piece + 1) / num_pieces))
    return max(0.0, end - start) * num_cells


@given(seeds, lengths, lengths, lengths, lengths)
def test_shares_are_the_covered_parts_of_any_grid(seed, rows, columns, h, w):
    plan = draw_plan(np.random.default_rng(seed), 2, rows, columns)
    share = plan.partner_fraction((h, w)).view(2, h, w)
    for b in range(2):
        for i in range(h):
            for j in range(w):
                expected = sum(
                    overlap(i, h, r, rows) * overlap(j, w, c, columns) * float(plan.mask[b, r, c])
                    for r in range(rows)
                    for c in range(columns)
                )
                assert float(share[b, i, j]) == pytest.approx(expected, abs=1e-5)
    torch.testing.assert_close(share.mean(dim=(1, 2)), plan.partner_fraction((1, 1))[:, 0])


def test_shares_on_the_grid_of_the_plan_are_its_mask():
    plan = draw_plan(np.random.default_rng(0), 2, 7, 5)
    assert torch.equal(plan.partner_fraction((7, 5)), plan.mask.flatten(1))


def test_shares_keep_their_precision_under_autocast():
    mask = torch.zeros(1, 224, 224)
    mask[0, :101, :77] = 1
    plan = MixPlan(mask, torch.zeros(1, dtype=torch.int64), on_tokens=False)
    with torch.autocast("cpu", torch.bfloat16):
        share = plan.partner_fraction((1, 1))
    assert share.dtype == torch.float32
    assert float(share) == pytest.approx(101 * 77 / 224**2, rel=1e-5)


@pytest.mark.parametrize("mixing", MIXES)
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("num_images", [1, 2, 5])
def test_plans_of_any_batch(mixing, per_sample, num_images):
    """Batches of one and per-sample plans crash elsewhere."""
    plan = sample_mix(mixing, num_images, grid=(3, 5), img_size=(24, 40), per_sample=per_sample, generator=generator())
    assert plan is not None
    shape = {Mixing.MIXTOKEN: (3, 5), Mixing.CUTMIX: (24, 40), Mixing.MIXUP: (1, 1)}[mixing]
    assert plan.mask.shape == (num_images, *shape)
    assert plan.mask.dtype == torch.float32
    assert plan.mask.min() >= 0
    assert plan.mask.max() <= 1
    assert sorted(plan.partner.tolist()) == list(range(num_images))
    assert plan.on_tokens == (mixing is Mixing.MIXTOKEN)
    images, targets = torch.rand(num_images, 3, 24, 40), class_targets(torch.arange(num_images))
    assert mix_images(images, plan).shape == images.shape
    mixed = mix_targets(targets, plan, (1, 1))
    torch.testing.assert_close(mixed.dense(6).sum(dim=2), torch.ones(num_images, 1))
    if num_images == 1:
        torch.testing.assert_close(mix_images(images, plan), images)
    if not per_sample:
        assert plan.partner.tolist() == list(reversed(range(num_images)))
        assert (plan.mask == plan.mask[:1]).all()


def test_no_mixing_is_no_plan():
    assert sample_mix(Mixing.NONE, 4, grid=(2, 2), img_size=(8, 8), generator=generator()) is None
    targets = class_targets(torch.tensor([1, 2]))
    assert mix_targets(targets, None, (1, 1)) is targets


@pytest.mark.parametrize("mixing", MIXES)
def test_the_generator_alone_decides(mixing):
    def draw(seed):
        torch.manual_seed(np.random.default_rng().integers(1000))  # the global state does not matter ...
        before = torch.random.get_rng_state()
        plan = sample_mix(mixing, 6, grid=(14, 14), img_size=(56, 56), per_sample=True, generator=generator(seed))
        assert torch.equal(before, torch.random.get_rng_state())  # ... and is left alone
        assert plan is not None
        return plan

    first, again, other = draw(7), draw(7), draw(8)
    assert torch.equal(first.mask, again.mask)
    assert torch.equal(first.partner, again.partner)
    assert not torch.equal(first.mask, other.mask)


def test_one_generator_draws_new_plans_each_time():
    source = generator(0)
    plans = [sample_mix(Mixing.MIXUP, 1, grid=(2, 2), img_size=(4, 4), generator=source) for _ in range(3)]
    assert len({float(plan.mask) for plan in plans if plan}) == 3


@pytest.mark.parametrize("alpha", [0.01, 0.2, 1.0, 4.0])
def test_mixup_draws_from_the_beta_distribution(alpha):
    plan = sample_mix(
        Mixing.MIXUP, 20_000, grid=(1, 1), img_size=(2, 2), alpha=alpha, per_sample=True, generator=generator()
    )
    assert plan is not None
    assert float(plan.mask.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(plan.mask.var()) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.05)


@pytest.mark.parametrize("grid", [(14, 14), (8, 12)])
def test_boxes_are_drawn_as_published(grid):
    """Sides in the image's aspect, any centre, cut at the edges: the same distribution of places and areas."""
    num_draws = 20_000
    plan = sample_mix(Mixing.MIXTOKEN, num_draws, grid=grid, img_size=(8, 8), per_sample=True, generator=generator())
    assert plan is not None
    rng, expected = np.random.default_rng(1), np.zeros((num_draws, *grid))
    for draw in range(num_draws):
        cut = np.sqrt(1 - rng.beta(1, 1))
        cut_rows, cut_columns = int(grid[0] * cut), int(grid[1] * cut)
        row, column = rng.integers(grid[0]), rng.integers(grid[1])
        top, bottom = max(0, row - cut_rows // 2), min(grid[0], row + cut_rows // 2)
        left, right = max(0, column - cut_columns // 2), min(grid[1], column + cut_columns // 2)
        expected[draw, top:bottom, left:right] = 1
    masks = plan.mask.numpy()
    np.testing.assert_allclose(masks.mean(axis=0), expected.mean(axis=0), atol=0.02)
    areas, expected_areas = masks.mean(axis=(1, 2)), expected.mean(axis=(1, 2))
    np.testing.assert_allclose(
        np.quantile(areas, [0.1, 0.3, 0.5, 0.7, 0.9, 1]),
        np.quantile(expected_areas, [0.1, 0.3, 0.5, 0.7, 0.9, 1]),
        atol=0.03,
    )


@given(seeds, st.integers(1, 20), st.integers(1, 20))
def test_masks_are_boxes(seed, rows, columns):
    plan = sample_mix(
        Mixing.CUTMIX, 4, grid=(1, 1), img_size=(rows, columns), per_sample=True, generator=generator(seed)
    )
    assert plan is not None
    for mask in plan.mask.numpy():
        assert set(np.unique(mask)) <= {0, 1}
        in_rows, in_columns = mask.max(axis=1), mask.max(axis=0)
        np.testing.assert_array_equal(mask, np.outer(in_rows, in_columns))
        for inside in (in_rows, in_columns):
            assert np.count_nonzero(np.diff(inside, prepend=0, append=0)) in (0, 2)  # in one piece


@given(seeds, st.sampled_from(MIXES), st.booleans())
def test_targets_mix_by_place_and_class_targets_by_area(seed, mixing, per_sample):
    rng, num_classes, grid = np.random.default_rng(seed), 9, (4, 6)
    targets = draw_targets(rng, (3, 24), num_classes, weighted=True)
    plan = sample_mix(mixing, 3, grid=grid, img_size=(20, 18), per_sample=per_sample, generator=generator(seed))
    assert plan is not None
    dense, mixed = dense_targets(targets, num_classes), mix_targets(targets, plan, grid)
    rows, columns = plan.mask.shape[1:]
    mask, got = plan.mask.numpy(), dense_targets(mixed, num_classes)
    for b, partner in enumerate(plan.partner.tolist()):
        for n in range(24):
            parts = [overlap(n // 6, 4, r, rows) * overlap(n % 6, 6, c, columns) for r, c in np.ndindex(rows, columns)]
            share = float(np.dot(parts, mask[b].ravel()))
            expected = (1 - share) * dense[b, n] + share * dense[partner, n]
            torch.testing.assert_close(got[b, n], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.sum(dim=2), mixed.weight, atol=1e-5, rtol=1e-5)
    classes = dense_targets(mix_targets(class_targets(torch.tensor([0, 4, 8])), plan, (1, 1)), num_classes)
    for b, partner in enumerate(plan.partner.tolist()):
        expected = torch.zeros(num_classes, dtype=torch.float64)
        expected[4 * b] += 1 - float(mask[b].mean())
        expected[4 * partner] += float(mask[b].mean())
        torch.testing.assert_close(classes[b, 0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("per_sample", [False, True])
def test_mixing_pixels_on_the_grid_is_mixtoken_where_patches_do_not_overlap(per_sample):
    images, weight = (torch.rand(4, 3, 20, 28, dtype=torch.float64), torch.rand(8, 3, 4, 4, dtype=torch.float64))
    plan = sample_mix(Mixing.MIXTOKEN, 4, grid=(5, 7), img_size=(20, 28), per_sample=per_sample, generator=generator(1))
    assert plan is not None
    assert 0 < plan.mask.mean() < 1

    def embed(pixels):
        return F.conv2d(pixels, weight, stride=4).permute(0, 2, 3, 1)

    torch.testing.assert_close(mix_tokens(embed(images), plan), embed(mix_images(images, plan)))


def test_mixed_images_show_the_partner_in_the_box():
    images = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 3, 4, 4).contiguous()
    mask = torch.zeros(3, 4, 4)
    mask[:, 1:3, :2] = 1
    mixed = mix_images(images, MixPlan(mask, torch.tensor([1, 2, 0]), on_tokens=False))
    for b, partner in enumerate([1, 2, 0]):
        expected = np.full((4, 4), float(b))
        expected[1:3, :2] = partner
        np.testing.assert_array_equal(mixed[b, 0], expected)


def test_mixup_blends_by_the_share():
    images = torch.rand(2, 3, 5, 5)
    plan = MixPlan(torch.full((2, 1, 1), 0.3), torch.tensor([1, 0]), on_tokens=False)
    torch.testing.assert_close(mix_images(images, plan), 0.7 * images + 0.3 * images.flip(0))


def test_channels_last_images_stay_so():
    images = torch.rand(2, 3, 8, 8).to(memory_format=torch.channels_last)
    plan = sample_mix(Mixing.CUTMIX, 2, grid=(2, 2), img_size=(8, 8), generator=generator())
    assert plan is not None
    assert mix_images(images, plan).is_contiguous(memory_format=torch.channels_last)


def test_gradients_of_mixed_tokens_reach_both_images():
    tokens = torch.rand(3, 2, 2, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(3, 2, 2, generator=generator())
    partner = torch.tensor([2, 0, 1])
    upstream = torch.rand(3, 2, 2, 4, dtype=torch.float64)
    mix_tokens(tokens, MixPlan(mask, partner, on_tokens=True)).backward(upstream)
    expected = (1 - mask.double())[..., None] * upstream
    for b, other in enumerate(partner.tolist()):
        expected[other] += mask.double()[b, ..., None] * upstream[b]
    torch.testing.assert_close(tokens.grad, expected)


def test_half_precision_tokens_and_images_keep_their_dtype():
    plan = MixPlan(torch.full((2, 2, 2), 0.5), torch.tensor([1, 0]), on_tokens=True)
    assert mix_tokens(torch.rand(2, 2, 2, 4).bfloat16(), plan).dtype == torch.bfloat16
    assert mix_images(torch.rand(2, 3, 4, 4).bfloat16(), plan).dtype == torch.bfloat16


def test_a_plan_for_another_grid_is_refused():
    plan = MixPlan(torch.zeros(1, 2, 3), torch.tensor([0]), on_tokens=True)
    with pytest.raises(ValueError, match=r"mask is \(2, 3\), the token grid \(3, 2\)"):
        mix_tokens(torch.zeros(1, 3, 2, 4), plan)


def test_plans_move_to_a_device():
    plan = draw_plan(np.random.default_rng(0), 2, 3, 3).to(torch.device("meta"))
    assert (plan.mask.device.type, plan.partner.device.type, plan.on_tokens) == ("meta", "meta", True)


def test_joined_plans_mix_each_group_within_itself():
    images = torch.arange(6.0)[:, None, None, None].expand(6, 1, 4, 4)
    plans = [plan_of(Mixing.CUTMIX, num_images=2, seed=seed) for seed in (0, 1)]
    joined = join_plans([plans[0], None, plans[1]], 2)
    assert joined is not None
    first, last = plans
    assert first is not None
    assert last is not None
    apart = [mix_images(images[:2], first), images[2:4], mix_images(images[4:], last)]
    assert torch.equal(mix_images(images, joined), torch.cat(apart))
    assert join_plans([None, None], 2) is None
    assert join_plans([plans[0]], 2) is plans[0]


def plan_of(mixing, *, num_images, seed):
    return sample_mix(
        mixing, num_images, grid=(2, 2), img_size=(4, 4), per_sample=True, generator=torch.Generator().manual_seed(seed)
    )


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.integers(1, 5), st.integers(0, 99))
def test_means_of_cells_are_those_of_the_pixels_that_they_cover(height, width, h, w, seed):
    """Also where pixels do not divide by cells: of a mask each pixel of which is h x w finer ones."""
    mask = torch.rand(2, height, width, generator=torch.Generator().manual_seed(seed))
    finer = mask.repeat_interleave(h, dim=1).repeat_interleave(w, dim=2)  # [2, h * height, w * width]
    expected = finer.unflatten(2, (w, width)).unflatten(1, (h, height)).mean(dim=(2, 4))
    torch.testing.assert_close(cell_means(mask, (h, w)), expected.flatten(1))
