"""T2T-ViT: the published architecture, checked against loops and against published outputs."""

import math

import numpy as np
import pytest
import torch
from golden_values import formula_image, formula_weights, golden_outputs, published_keys
from torch import Tensor

from tokenlabel.core.mix import MixPlan
from tokenlabel.models import T2TViT, create_model
from tokenlabel.models.t2t_vit import T2T_VIT_CONFIGS, Performer, TokensToToken, sinusoids

# All parameters of the published model, and those that train.
NUM_PARAMETERS = {
    "t2t_vit_14": (21_545_550, 21_465_806),
    "t2t_vit_19": (39_177_422, 39_085_070),
    "t2t_vit_24": (64_105_934, 64_000_974),
}


def tiny(**options: object) -> T2TViT:
    shape = {"depth": 2, "width": 32, "num_heads": 4, "drop_path": 0.0}
    model = create_model("t2t_vit_14", num_classes=5, img_size=(32, 48), **{**shape, **options})
    backbone = model.get_submodule("backbone")
    assert isinstance(backbone, T2TViT)
    return backbone


@pytest.mark.parametrize("name", T2T_VIT_CONFIGS)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    with torch.device("meta"):
        model = T2TViT(T2T_VIT_CONFIGS[name])
    published = [value for key, value in model.named_parameters() if not key.startswith("aux_head")]
    total = sum(value.numel() for value in published)
    trained = sum(value.numel() for value in published if value.requires_grad)
    assert (total, trained) == NUM_PARAMETERS[name]


def test_outputs_equal_the_published_implementation() -> None:
    model = T2TViT(T2T_VIT_CONFIGS["t2t_vit_14"]).eval()
    keys = published_keys("t2t_vit_14")
    ours = {key: list(value.shape) for key, value in model.state_dict().items() if not key.startswith("aux_head")}
    assert ours == keys
    model.load_state_dict(formula_weights(keys), strict=False)
    model.aux_head = None
    golden = golden_outputs("t2t_vit_14")
    with torch.no_grad():
        embedding = model.tokens_to_token(formula_image())[0, ::13].numpy()
        np.testing.assert_allclose(embedding, golden["embedding_every_13"], atol=1e-4)
        np.testing.assert_allclose(model(formula_image())[0].numpy(), golden["cls"], atol=1e-4)
        with torch.autocast("cpu"):
            difference = model(formula_image())[0].float().numpy() - golden["cls"]
    assert np.linalg.norm(difference) <= 0.1 * np.linalg.norm(golden["cls"])


def naive_windows(planes: Tensor, *, size: int, stride: int, padding: int) -> Tensor:
    """Return each window's values, channel by channel and row by row, windows row by row."""
    channels, height, width = planes.shape
    windows = []
    for top in range(-padding, height + padding - size + 1, stride):
        for left in range(-padding, width + padding - size + 1, stride):
            values = [
                planes[channel, row, column] if 0 <= row < height and 0 <= column < width else torch.tensor(0.0)
                for channel in range(channels)
                for row in range(top, top + size)
                for column in range(left, left + size)
            ]
            windows.append(torch.stack(values))
    return torch.stack(windows)


def test_tokens_to_token_agrees_with_loops() -> None:
    module = TokensToToken(width=6)
    image = torch.randn(3, 16, 32)
    with torch.no_grad():
        tokens = module.attention1(naive_windows(image, size=7, stride=4, padding=2)[None])[0]  # 4 x 8
        planes = tokens.T.reshape(64, 4, 8)
        tokens = module.attention2(naive_windows(planes, size=3, stride=2, padding=1)[None])[0]  # 2 x 4
        planes = tokens.T.reshape(64, 2, 4)
        expected = module.project(naive_windows(planes, size=3, stride=2, padding=1))
        torch.testing.assert_close(module(image[None])[0], expected, atol=1e-5, rtol=1e-4)


def test_performer_agrees_with_loops() -> None:
    performer = Performer(input_width=5)
    windows = torch.randn(1, 4, 5)
    with torch.no_grad():
        keys, queries, values = performer.kqv(performer.norm1(windows[0])).split(64, dim=1)

        def kernel(query: Tensor, key: Tensor) -> float:
            estimate = 0.0
            for direction in performer.w:
                of_query = math.exp(direction @ query - query @ query / 2)
                estimate += of_query * math.exp(direction @ key - key @ key / 2) / 32
            return estimate

        for place in range(4):
            weights = torch.tensor([kernel(queries[place], key) for key in keys])
            gathered = (weights[:, None] * values).sum(dim=0) / (weights.sum() + 1e-8)
            token = values[place] + performer.proj(gathered)
            expected = token + performer.mlp(performer.norm2(token))
            torch.testing.assert_close(performer(windows)[0, place], expected, atol=1e-5, rtol=1e-4)


def test_performer_estimates_softmax_attention() -> None:
    """Averaged over many draws of random features, the kernel is exp(x . y)."""
    x, y = 0.2 * torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    estimates = []
    for seed in range(200):
        torch.manual_seed(seed)
        performer = Performer(input_width=5)
        performer.w = torch.nn.Parameter(torch.randn(32, 64), requires_grad=False)
        features_x, features_y = performer._features(torch.stack([x, y])[None])[0]
        estimates.append(features_x @ features_y)
    assert torch.stack(estimates).mean() == pytest.approx(math.exp(x @ y), rel=0.2)


def test_positions_are_sinusoids() -> None:
    positions = sinusoids(7, 10)
    for position in range(7):
        for channel in range(10):
            angle = position / 10000 ** (2 * (channel // 2) / 10)
            expected = math.cos(angle) if channel % 2 else math.sin(angle)
            assert positions[position, channel] == pytest.approx(expected, abs=1e-6)


def test_grid_is_where_it_says() -> None:
    """The upper left quarter of a cell is lit: there the padded strides put the centres of tokens."""
    torch.manual_seed(0)
    model = tiny().eval()
    assert model.grid_for((32, 48)) == (2, 3)
    image = torch.randn(1, 3, 32, 48)
    for cell in range(6):
        top, left = cell // 3 * 16, cell % 3 * 16
        brighter = image.clone()
        brighter[..., top : top + 8, left : left + 8] += 10
        changed = (model.embed_patches(brighter) - model.embed_patches(image))[0].norm(dim=2)
        assert changed.flatten().argmax() == cell
    with pytest.raises(ValueError, match="patches of 16"):
        model(torch.randn(1, 3, 40, 48))


def test_mixtoken_mixes_embeddings() -> None:
    model = tiny().eval()
    images = torch.randn(2, 3, 32, 48)
    mask = torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 1.0]])
    plan = MixPlan(mask.expand(2, 2, 3), torch.tensor([1, 0]), on_tokens=True)
    mixed, plain = model.embed(images, plan)[:, 1:], model.embed(images)[:, 1:]
    for cell in range(6):
        source = int(mask.flatten()[cell])
        assert torch.equal(mixed[0, cell], plain[source, cell])


def test_all_but_positions_and_random_features_train() -> None:
    model = T2TViT(T2T_VIT_CONFIGS["t2t_vit_14"], num_classes=5, img_size=(32, 48), depth=2, width=32, num_heads=4)
    model(torch.randn(2, 3, 32, 48)).square().mean().backward()
    untrained = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert untrained == {"pos_embed", "tokens_to_token.attention1.w", "tokens_to_token.attention2.w"}


def test_scale_by_width_changes_attention() -> None:
    plain, scaled = tiny().eval(), tiny(scale_by_width=True).eval()
    scaled.load_state_dict(plain.state_dict())
    assert scaled.get_submodule("blocks.0.attn").scale == 32**-0.5
    images = torch.randn(1, 3, 32, 48)
    assert not torch.equal(plain(images), scaled(images))
