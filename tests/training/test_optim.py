import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenlabel.models import create_model
from tokenlabel.training.recipe import OptimConfig
from tokenlabel.training.trainer import create_ema, create_optimizer, learning_rate, set_learning_rate

PAPER = OptimConfig(lr=1.6e-3, lr_batch_size=1024, cooldown_epochs=10.0)


def rate(step, config=PAPER, batch_size=1024, epochs=310):
    return learning_rate(step, config, batch_size=batch_size, steps_per_epoch=100, num_steps=100 * epochs)


def test_the_schedule_of_the_paper_at_its_corners():
    assert rate(0) == pytest.approx(1e-6)
    assert rate(500) == pytest.approx(1.6e-3)
    assert rate(500 + 14750) == pytest.approx((1.6e-3 + 1e-5) / 2)
    assert rate(30000) == pytest.approx(1e-5)
    assert rate(30999) == pytest.approx(1e-5)


def test_a_constant_schedule_cools_down_as_the_others_do():
    constant = OptimConfig(lr=1.6e-3, lr_batch_size=1024, schedule="constant", cooldown_epochs=10.0)
    assert [rate(step, constant) for step in (500, 15_000, 29_999)] == [pytest.approx(1.6e-3)] * 3
    assert [rate(step, constant) for step in (30_000, 30_999)] == [pytest.approx(1e-5)] * 2


@pytest.mark.parametrize("schedule", ["cosine", "poly", "constant"])
def test_a_run_that_is_all_warm_up_and_cool_down_has_no_step_at_the_peak(schedule):
    config = OptimConfig(lr=1.6e-3, lr_batch_size=1024, schedule=schedule, cooldown_epochs=10.0)
    assert rate(500, config, epochs=15) == pytest.approx(1e-5)


def test_all_rates_scale_with_the_batch_size():
    assert rate(7000, batch_size=256) == pytest.approx(rate(7000) / 4)


@given(step=st.integers(0, 30998))
def test_the_rate_rises_in_the_warm_up_and_never_after(step):
    if step < 500:
        assert rate(step + 1) > rate(step)
    else:
        assert rate(step + 1) <= rate(step)


def small_model():
    return create_model(
        "lvvit_t", num_classes=3, img_size=(16, 16), patch_size=8, depth=1, width=16, num_heads=2, stem_width=8
    )


def test_weights_decay_and_the_rest_does_not():
    model = small_model()
    optimizer = create_optimizer(model, PAPER)
    names = {id(parameter): name.removeprefix("backbone.") for name, parameter in model.named_parameters()}
    decayed, plain = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert (optimizer.param_groups[0]["weight_decay"], optimizer.param_groups[1]["weight_decay"]) == (0.05, 0)
    assert {"pos_embed", "cls_token", "norm.weight", "norm.bias", "head.bias"} <= plain
    assert {"head.weight", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"} <= decayed
    assert len(decayed) + len(plain) == len(names)


def test_layers_learn_the_slower_the_nearer_to_the_stem_they_are():
    model = small_model()
    optimizer = create_optimizer(model, OptimConfig(lr=1.0, lr_batch_size=1, layer_decay=0.5))
    set_learning_rate(optimizer, 0.1)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    layers = model.layers()
    for name, parameter in model.named_parameters():
        assert rates[id(parameter)] == pytest.approx(0.1 * 0.5 ** (max(layers.values()) - layers[name]))


def test_frozen_parameters_are_left_to_nobody():
    model = small_model()
    model.get_parameter("backbone.head.weight").requires_grad_(False)
    optimizer = create_optimizer(model, PAPER)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert all(p is not model.get_parameter("backbone.head.weight") for p in held)


def test_the_average_follows_quickly_at_first():
    model = small_model()
    ema = create_ema(model, PAPER)
    assert ema is not None
    with torch.no_grad():
        model.get_parameter("backbone.head.weight").fill_(1.0)
    for step in range(50):
        ema.update(model, step=step)
    # A bare decay of .99992 would still hold 99.6% of the start.
    assert ema.module.get_parameter("backbone.head.weight").min() > 0.9


def test_no_average_by_choice():
    assert create_ema(small_model(), OptimConfig(lr=1.0, lr_batch_size=1, ema_decay=None)) is None
