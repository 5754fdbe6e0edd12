"""What the whole way from score maps to a gradient may hold and call, counted: a guard for its speed and memory."""

import numpy as np
import pytest
import torch
from label_cases import TensorSizes
from torch import nn

from benchmarks.label_path import GRID, dense_targets, draw_boxes, draw_score_map, make_case
from benchmarks.measure import Settings, peak_bytes
from tokenlabel.core import kernels
from tokenlabel.core.align import align
from tokenlabel.core.batch import collate_score_maps
from tokenlabel.core.config import Mixing
from tokenlabel.core.geometry import View, stack_views
from tokenlabel.core.losses import linear_cross_entropy, sparse_cross_entropy, token_label_loss
from tokenlabel.core.mix import mix_targets, sample_mix
from tokenlabel.core.outputs import Outputs
from tokenlabel.core.targets import class_targets

SETTINGS = Settings(torch.device("cpu"), quick=True)
WIDTH = 16


def make_step(num_images, num_classes, grid):
    """Return a function that goes from score maps to gradients as training does, for one set of maps and features."""
    rng = np.random.default_rng(0)
    maps = collate_score_maps([draw_score_map(rng, num_classes, num_named=20) for _ in range(num_images)])
    views = torch.from_numpy(stack_views([View.crop(box) for box in draw_boxes(rng, num_images)]))
    tokens = torch.randn(num_images, grid[0] * grid[1], WIDTH, requires_grad=True)
    class_head, token_head = nn.Linear(WIDTH, num_classes), nn.Linear(WIDTH, num_classes)

    def step():
        plan = sample_mix(
            Mixing.MIXTOKEN, num_images, grid=grid, img_size=(224, 224), generator=torch.Generator().manual_seed(0)
        )
        on_tokens = mix_targets(align(maps, views, grid).smoothed(0.1, num_classes), plan, grid)
        on_class = class_targets(torch.zeros(num_images, dtype=torch.long)).smoothed(0.1, num_classes)
        outputs = Outputs(class_head(tokens.mean(dim=1)), tokens, token_head, grid)
        token_label_loss(outputs, mix_targets(on_class, plan, (1, 1)), on_tokens).total.backward()

    return step


def test_nothing_is_made_for_all_tokens_and_all_of_21841_classes():
    num_images, num_classes, grid = 4, 21_841, (7, 7)
    step = make_step(num_images, num_classes, grid)
    with TensorSizes() as made:
        step()
    assert made.largest <= 49 * num_classes  # the logits of one image's tokens
    with TensorSizes() as made:
        step()
    large = [size for size in made.fresh if size > num_images * num_classes]
    # For each of four blocks its logits; the buffer; the gradients of both heads, made and handed on.
    assert sum(large) <= 5 * 49 * num_classes + 12 * WIDTH * num_classes


def test_the_number_of_calls_does_not_grow_with_the_batch():
    counts = []
    for num_images in (2, 16):
        step = make_step(num_images, 50, (4, 4))
        step()  # from the second step on gradients are added up, not set
        with TensorSizes() as made:
            step()
        counts.append(made.num_calls)
    assert counts[0] == counts[1]


def test_targets_take_a_twentieth_of_the_memory_of_the_dense_form():
    case = make_case(1000, SETTINGS)
    sparse = peak_bytes(lambda: align(case.score_maps, case.views, GRID), SETTINGS)
    assert 20 * sparse < peak_bytes(lambda: dense_targets(case), SETTINGS)


def test_the_fused_head_takes_a_tenth_of_the_memory_of_head_and_loss(monkeypatch):
    """With blocks as small beside the batch as they are beside 12,544 tokens and 21,841 classes."""
    monkeypatch.setitem(kernels.BLOCK_SIZE, "cpu", 1 << 18)
    case = make_case(4000, SETTINGS, num_images=16)
    targets = align(case.score_maps, case.views, GRID)
    tokens, head = torch.randn(16, GRID[0] * GRID[1], WIDTH, requires_grad=True), nn.Linear(WIDTH, 4000)

    def fused():
        linear_cross_entropy(tokens, head, targets).backward()

    def unfused():
        sparse_cross_entropy(head(tokens), targets).mean().backward()

    assert 10 * peak_bytes(fused, SETTINGS) < peak_bytes(unfused, SETTINGS)


@pytest.mark.parametrize("num_classes", [10, 21_841])
def test_the_targets_do_not_grow_with_the_classes(num_classes):
    rng = np.random.default_rng(0)
    maps = collate_score_maps([draw_score_map(rng, num_classes, num_named=10) for _ in range(4)])
    views = torch.from_numpy(stack_views([View.identity()] * 4))
    with TensorSizes() as made:
        align(maps, views, GRID).smoothed(0.1, num_classes)
    assert sum(made.fresh) < 600_000
