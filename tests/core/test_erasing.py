import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.data.random_erasing import RandomErasing

from tokenlabel.core.config import ErasingConfig, ErasingMode
from tokenlabel.core.erase import box_masks, draw_boxes, erase
from tokenlabel.core.mix import cell_means
from tokenlabel.core.targets import TokenTargets

fast = settings(max_examples=30, deadline=None)


def images(num_images=4, img_size=(24, 32), seed=0):
    return torch.randn(num_images, 3, *img_size, generator=torch.Generator().manual_seed(seed))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@given(
    num_images=st.integers(1, 5),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    max_boxes=st.integers(1, 3),
    mode=st.sampled_from(ErasingMode),
    seed=st.integers(0, 99),
)
@fast
def test_pixels_change_in_boxes_that_lie_in_the_image_and_nowhere_else(
    num_images, height, width, max_boxes, mode, seed
):
    config = ErasingConfig(probability=0.7, mode=mode, max_boxes=max_boxes)
    before = images(num_images, (height, width))
    after, gone = erase(before, config, generator=generator(seed))
    boxes = draw_boxes(num_images, (height, width), config, generator(seed))
    expected = torch.zeros(num_images, height, width, dtype=torch.bool)
    for box in boxes.reshape(-1, num_images, 4):
        for image, (top, left, box_height, box_width) in enumerate(box.tolist()):
            assert top + box_height <= height
            assert left + box_width <= width
            for y in range(top, top + box_height):
                for x in range(left, left + box_width):
                    expected[image, y, x] = True
    assert torch.equal(gone, expected)
    changed = (after != before).any(dim=1)
    assert torch.equal(changed, expected)


def test_it_is_a_function_of_its_generator_alone():
    config = ErasingConfig(probability=1, max_boxes=2)
    first, again, other = (erase(images(), config, generator=generator(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_modes_fill_with_noise_a_colour_or_the_mean():
    def inside(mode):
        erased, gone = erase(images(), ErasingConfig(probability=1, mode=mode), generator=generator(5))
        return [image[:, mask] for image, mask in zip(erased, gone, strict=True)]  # [3, pixels]

    assert all((pixels == 0).all() for pixels in inside(ErasingMode.CONST))
    for pixels in inside(ErasingMode.RAND):
        assert (pixels == pixels[:, :1]).all()
        assert len(set(pixels[:, 0].tolist())) == 3
    noise = torch.cat(inside(ErasingMode.PIXEL), dim=1)
    assert noise.std() == pytest.approx(1, abs=0.1)


def test_boxes_are_like_timms():
    img_size, num_images = (40, 56), 1500
    config = ErasingConfig(probability=0.6, max_boxes=2)
    ours = box_masks(draw_boxes(num_images, img_size, config, generator()), img_size).any(dim=0)
    random.seed(0)  # timm draws from here
    timms_erasing = RandomErasing(0.6, mode="const", max_count=2, device="cpu")
    timms = torch.stack([(timms_erasing(torch.ones(1, *img_size)) == 0)[0] for _ in range(num_images)])
    for measure in (
        lambda masks: masks.any(dim=(1, 2)).float().mean(),
        lambda masks: masks.float().mean() / masks.any(dim=(1, 2)).float().mean(),
        lambda masks: masks[:, :10].float().mean(),
        lambda masks: masks[:, :, :10].float().mean(),
        lambda masks: masks.any(dim=1).float().mean() / masks.any(dim=2).float().mean(),
    ):
        assert float(measure(ours)) == pytest.approx(float(measure(timms)), rel=0.12)


def test_tokens_lose_weight_by_their_erased_share():
    mask = torch.zeros(1, 4, 8, dtype=torch.bool)
    mask[0, :2, :3] = True
    targets = TokenTargets(
        classes=torch.tensor([[1]]),
        excess=torch.full((1, 4, 1), 0.6),
        floor=torch.full((1, 4), 0.1),
        weight=torch.full((1, 4), 0.8),
    )
    reweighted = targets.scaled(1 - cell_means(mask.float(), (2, 2)))
    kept = np.array([1 - 6 / 8, 1, 1, 1])
    np.testing.assert_allclose(reweighted.weight[0], 0.8 * kept, rtol=1e-6)
    np.testing.assert_allclose(reweighted.dense(4), targets.dense(4).numpy() * kept[None, :, None], rtol=1e-6)


@pytest.mark.parametrize(
    "options", [{"probability": 1.5}, {"area": (0.5, 0.2)}, {"area": (0.5, 1.0)}, {"max_boxes": 0}]
)
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError, match=r"^erase\.(probability|area|max_boxes) must be [^()]+, got "):
        ErasingConfig(**options)
