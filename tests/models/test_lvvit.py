"""LV-ViT: the published architecture, any patch size and input, MixToken on embeddings."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from golden_values import formula_image, formula_weights, golden_outputs, published_keys
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from tokenlabel.core.config import Inference
from tokenlabel.core.kernels import Linear, linear, product
from tokenlabel.core.losses import token_label_loss
from tokenlabel.core.mix import MixPlan, mix_images
from tokenlabel.core.targets import class_targets
from tokenlabel.models import LVViT, LVViTConfig, Outputs, TimmAdapter, TokenModel, create_model
from tokenlabel.models.lvvit import LVVIT_CONFIGS
from tokenlabel.models.positions import resize_positions

NUM_PARAMETERS = {"lvvit_t": 8_534_720, "lvvit_s": 26_151_824, "lvvit_m": 55_830_544, "lvvit_l": 150_021_968}


def tiny_model(**options: object) -> TokenModel:
    shape = {"patch_size": 6, "depth": 3, "width": 32, "num_heads": 4, "stem_width": 8, "drop_path": 0.0}
    return create_model("lvvit_t", num_classes=10, img_size=(48, 48), **{**shape, **options})


def tiny(**options: object) -> LVViT:
    backbone = tiny_model(**options).get_submodule("backbone")
    assert isinstance(backbone, LVViT)
    return backbone


@pytest.mark.parametrize("name", LVVIT_CONFIGS)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    with torch.device("meta"):
        model = LVViT(LVVIT_CONFIGS[name])
    assert sum(parameter.numel() for parameter in model.parameters()) == NUM_PARAMETERS[name]


@pytest.mark.parametrize("name", ["lvvit_m", "lvvit_l"])
def test_names_of_large_models_are_those_of_small_ones_with_more_blocks(name: str) -> None:
    with torch.device("meta"):
        model = LVViT(LVVIT_CONFIGS[name])
    expected = {
        re.sub(r"^blocks\.\d+", f"blocks.{index}", key)
        for key in published_keys("lvvit_s")
        for index in range(LVVIT_CONFIGS[name].depth)
    }
    assert model.state_dict().keys() == expected


@pytest.mark.parametrize("name", ["lvvit_t", "lvvit_s"])
def test_outputs_equal_the_published_implementation(name: str) -> None:
    backbone = LVViT(LVVIT_CONFIGS[name])
    assert {key: list(value.shape) for key, value in backbone.state_dict().items()} == published_keys(name)
    backbone.load_state_dict(formula_weights(published_keys(name)))
    model = TimmAdapter(backbone, name=name, num_classes=1000, img_size=(224, 224)).eval()
    golden = golden_outputs(name)
    for autocast in (False, True):
        with torch.no_grad(), torch.autocast("cpu", enabled=autocast):
            outputs = model(formula_image())
            found = {
                "cls": outputs.class_logits[0],
                "tokens_every_13": outputs.token_logits[0, ::13],
                "combined": outputs.logits(Inference.COMBINED)[0],
            }
        for key, value in found.items():
            difference = value.float().numpy() - golden[key]
            if autocast:
                assert np.linalg.norm(difference) <= 0.1 * np.linalg.norm(golden[key]), key
            else:
                assert np.abs(difference).max() <= 1e-4, key


@pytest.mark.parametrize(
    ("patch_size", "img_size", "grid"), [(6, (48, 48), (8, 8)), (4, (24, 40), (6, 10)), (10, (30, 20), (3, 2))]
)
def test_any_patch_size_and_input_the_patch_divides(
    patch_size: int, img_size: tuple[int, int], grid: tuple[int, int]
) -> None:
    model = create_model(
        "lvvit_s", num_classes=7, img_size=img_size, patch_size=patch_size, depth=1, width=16, num_heads=2, stem_width=4
    )
    outputs = model(torch.randn(2, 3, *img_size))
    assert outputs.grid == model.grid_for(img_size) == grid
    assert outputs.token_logits.shape == (2, grid[0] * grid[1], 7)


def test_another_size_at_run_time_resizes_the_positions() -> None:
    model = tiny_model().eval()
    outputs = model(torch.randn(1, 3, 24, 60))
    assert outputs.grid == (4, 10)
    with pytest.raises(ValueError, match=r"50 x 48 pixels .* patches of 6"):
        model(torch.randn(1, 3, 50, 48))


def test_tokens_are_where_the_grid_says() -> None:
    torch.manual_seed(0)
    models = [tiny().eval() for _ in range(8)]  # one random stem may look mostly past its middle
    image = torch.zeros(1, 3, 24, 60)
    for row, column in [(0, 0), (1, 7), (3, 2)]:
        brighter = image.clone()
        brighter[..., 6 * row + 2 : 6 * row + 4, 6 * column + 2 : 6 * column + 4] = 3.0
        changed = sum((model.embed(brighter) - model.embed(image))[0, 1:].norm(dim=1) for model in models)
        assert isinstance(changed, torch.Tensor)
        assert changed.argmax() == row * 10 + column


def naive_resize_positions(positions: Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Resize one channel and one output place at a time, with the cubic kernel written out (a = -.75)."""

    def kernel(t: float) -> float:
        t = abs(t)
        if t <= 1:
            return 1.25 * t**3 - 2.25 * t**2 + 1
        return -0.75 * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0

    h, w = grid
    num_prefix = positions.shape[1] - h * w
    out = [positions[0, index] for index in range(num_prefix)]
    for row in range(new_grid[0]):
        for column in range(new_grid[1]):
            y, x = (row + 0.5) * h / new_grid[0] - 0.5, (column + 0.5) * w / new_grid[1] - 0.5
            total = torch.zeros(positions.shape[2])
            for i in range(int(np.floor(y)) - 1, int(np.floor(y)) + 3):
                for j in range(int(np.floor(x)) - 1, int(np.floor(x)) + 3):
                    at = min(max(i, 0), h - 1) * w + min(max(j, 0), w - 1)
                    total += kernel(y - i) * kernel(x - j) * positions[0, num_prefix + at]
            out.append(total)
    return torch.stack(out)[None]


@pytest.mark.parametrize("num_prefix", [0, 1, 3])
@pytest.mark.parametrize(("grid", "new_grid"), [((3, 4), (5, 2)), ((2, 2), (2, 2)), ((4, 3), (8, 7))])
def test_resize_positions_agrees_with_loops(num_prefix: int, grid: tuple[int, int], new_grid: tuple[int, int]) -> None:
    positions = torch.randn(1, num_prefix + grid[0] * grid[1], 3, generator=torch.Generator().manual_seed(0))
    resized = resize_positions(positions, grid, new_grid)
    torch.testing.assert_close(resized, naive_resize_positions(positions, grid, new_grid), atol=1e-5, rtol=1e-5)


def plan_of(mask: Tensor, *, on_tokens: bool) -> MixPlan:
    return MixPlan(mask.expand(2, *mask.shape), torch.tensor([1, 0]), on_tokens=on_tokens)


def test_mixtoken_mixes_embeddings_and_other_plans_mix_pixels() -> None:
    model = tiny_model().eval()
    backbone = model.get_submodule("backbone")
    assert isinstance(backbone, LVViT)
    images = torch.randn(2, 3, 48, 48)
    mask = torch.zeros(8, 8)
    mask[2:5, 3:8] = 1
    by_tokens, on_pixels = plan_of(mask, on_tokens=True), plan_of(mask, on_tokens=False)
    mixed = backbone.embed(images, by_tokens)[:, 1:]
    plain = backbone.embed(images)[:, 1:]
    for index in range(64):
        source = 1 if mask.flatten()[index] else 0
        assert torch.equal(mixed[0, index], plain[source, index])
    assert torch.equal(model(images, by_tokens).tokens, backbone.forward_features(images, by_tokens)[:, 1:])
    assert torch.equal(model(images, on_pixels).tokens, model(mix_images(images, on_pixels)).tokens)
    assert not torch.allclose(backbone.embed(mix_images(images, on_pixels))[:, 1:], mixed)  # over the seam


def test_without_conv_stem_mixing_pixels_is_mixing_tokens() -> None:
    model = tiny_model(conv_stem=False).eval()
    images = torch.randn(2, 3, 48, 48)
    mask = torch.zeros(8, 8)
    mask[2:5, 3:8] = 1
    by_tokens = model(images, plan_of(mask, on_tokens=True)).tokens
    torch.testing.assert_close(model(images, plan_of(mask, on_tokens=False)).tokens, by_tokens)


def test_a_plan_for_another_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="plan for the grid that the model reports"):
        tiny_model()(torch.randn(2, 3, 48, 48), plan_of(torch.zeros(7, 8), on_tokens=True))


def test_attention_agrees_with_loops() -> None:
    attention = tiny().blocks[0].attn
    assert isinstance(attention, nn.Module)
    tokens = torch.randn(2, 5, 32)
    qkv = tokens @ attention.qkv.weight.T  # pyright: ignore[reportAttributeAccessIssue, reportOperatorIssue]
    gathered = torch.zeros(2, 5, 32)
    for head in range(4):
        channels = slice(8 * head, 8 * head + 8)
        queries, keys, values = (part[..., channels] for part in qkv.split(32, dim=2))
        scores = (queries @ keys.transpose(1, 2)) / 8**0.5
        gathered[..., channels] = scores.softmax(dim=2) @ values
    expected = F.linear(gathered, attention.proj.weight, attention.proj.bias)  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
    torch.testing.assert_close(attention(tokens), expected, atol=1e-5, rtol=1e-4)


def test_attention_in_bf16_is_the_same_attention() -> None:
    """On the CPU it runs through other kernels than in fp32."""
    attention = tiny().blocks[0].attn
    assert isinstance(attention, nn.Module)
    tokens = torch.randn(2, 9, 32)
    with torch.autocast("cpu", torch.bfloat16):
        found = attention(tokens)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), attention(tokens), atol=2e-2, rtol=2e-2)


@settings(max_examples=20)
@given(
    images=st.integers(1, 17),
    places=st.integers(1, 9),
    widths=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    bias=st.booleans(),
)
def test_linear_maps_by_another_library_are_linear_maps(
    images: int, places: int, widths: tuple[int, int], bias: bool
) -> None:
    module = Linear(*widths, bias=bias)
    tokens = torch.randn(images, places, widths[0], requires_grad=True)
    upstream = torch.randn(images, places, widths[1])
    parameters = [tokens, *module.parameters()]
    expected = F.linear(tokens, module.weight, module.bias)
    torch.testing.assert_close(module(tokens), expected, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(
        torch.autograd.grad(module(tokens), parameters, upstream),
        torch.autograd.grad(expected, parameters, upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_the_product_keeps_the_rules_of_operators() -> None:
    left, right = torch.randn(5, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    for bias in (None, torch.randn(4, requires_grad=True)):
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(product, (left, right, bias), test_utils=checks)
    (gradient,) = torch.autograd.grad(linear(left, right, None).pow(3).sum(), left, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), right)
    (expected,) = torch.autograd.grad((left @ right.T).pow(3).sum(), left, create_graph=True)
    torch.testing.assert_close(second, torch.autograd.grad(expected.sum(), right)[0])


def test_residuals_are_divided() -> None:
    block = tiny(residual_divisor=4.0).blocks[0]
    tokens = torch.randn(2, 5, 32)
    middle = tokens + block.attn(block.norm1(tokens)) / 4  # pyright: ignore[reportCallIssue]
    expected = middle + block.mlp(block.norm2(middle)) / 4  # pyright: ignore[reportCallIssue]
    torch.testing.assert_close(block(tokens), expected)


def test_drop_path_grows_with_depth_and_is_off_in_evaluation() -> None:
    model = tiny(drop_path=0.4)
    assert [getattr(block.drop_path, "drop_prob", 0.0) for block in model.blocks] == pytest.approx([0, 0.2, 0.4])
    images = torch.randn(2, 3, 48, 48)
    model.eval()
    assert torch.equal(model(images), model(images))


def gradients(model: TokenModel, images: Tensor) -> dict[str, Tensor | None]:
    outputs: Outputs = model(images)
    loss = (
        token_label_loss(outputs, class_targets(torch.tensor([3, 5])), None).total
        + outputs.token_logits.square().mean()
    )
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_every_parameter_gets_a_gradient() -> None:
    for name, gradient in gradients(tiny_model(), torch.randn(2, 3, 48, 48)).items():
        assert gradient is not None, name
        assert gradient.abs().sum() > 0, name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 30}, "width 30 is not a multiple of num_heads 4"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
        ({"residual_divisor": 0.0}, "residual_divisor must be above 0, got 0.0"),
        ({"patch_size": 3}, "patch_size must be even .* got 3"),
        ({"patch_size": 10}, "48 x 48 pixels .* patches of 10"),
    ],
)
def test_impossible_shapes_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**options)


def test_class_token_and_positions_are_not_decayed() -> None:
    model = tiny()
    assert model.no_weight_decay() <= dict(model.named_parameters()).keys()
    assert LVViTConfig(depth=1, width=8, num_heads=1).patch_size == 16
