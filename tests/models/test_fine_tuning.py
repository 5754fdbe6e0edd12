"""What fine-tuning asks of every model: which layer a parameter belongs to, and layers that stand still."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from tokenlabel.models import TokenModel, create_model

CASES: dict[str, dict[str, Any]] = {
    "lvvit_t": {"depth": 3, "width": 32, "num_heads": 4, "stem_width": 8, "drop_path": 0.5},
    "t2t_vit_14": {"depth": 3, "width": 32, "num_heads": 4},
    "vit_tiny_patch16_224": {"depth": 3, "embed_dim": 32, "num_heads": 2},
    "test_resnet": {},
    "swin_tiny_patch4_window7_224": {"depths": (1, 1, 1, 1), "embed_dim": 16, "num_heads": (1,) * 4, "window_size": 2},
}


def create(name: str) -> TokenModel:
    return create_model(name, num_classes=5, img_size=(64, 64), **CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_layers_run_from_the_stem_to_the_heads(name: str) -> None:
    model = create(name)
    layers = model.layers()
    assert layers.keys() == {key for key, _ in model.named_parameters()}
    assert set(layers.values()) == set(range(max(layers.values()) + 1))
    heads = {key for key in layers if key.startswith(("backbone.head.", "token_head."))}
    assert heads
    assert {layers[key] for key in heads} == {max(layers.values())}


def test_layers_of_lvvit() -> None:
    found = create("lvvit_t").layers()
    layers = {name.removeprefix("backbone."): layer for name, layer in found.items()}
    assert layers["pos_embed"] == layers["patch_embed.conv1.weight"] == 0
    assert [layers[f"blocks.{block}.attn.qkv.weight"] for block in range(3)] == [1, 2, 3]
    assert layers["norm.weight"] == layers["head.weight"] == 4


@pytest.mark.parametrize("name", CASES)
def test_frozen_layers_stand_still(name: str) -> None:
    model = create(name).train()
    model.freeze(2)
    model.train()
    layers = model.layers()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    for _ in range(2):
        outputs = model(torch.randn(2, 3, 64, 64))
        (outputs.class_logits.square().mean() + outputs.token_logits.square().mean()).backward()
        optimizer.step()
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert {layers[key] for key in moved & layers.keys()} == set(range(2, max(layers.values()) + 1))
    frozen_norms = [
        module
        for key, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d) and layers[f"{key}.weight"] < 2
    ]
    assert not any(module.training for module in frozen_norms)
    statistics = {key for key in moved - layers.keys() if layers[f"{key.rpartition('.')[0]}.weight"] < 2}
    assert statistics == set()


def test_frozen_blocks_do_not_drop_paths() -> None:
    model = create("lvvit_t").train()
    model.freeze(4)  # all but the heads; the last block's drop path is .5
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(images).class_logits, model(images).class_logits)
    assert model.get_submodule("backbone.head").training


def test_freezing_everything_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot freeze 5 layers: the model has 4 below its heads"):
        create("lvvit_t").freeze(5)


def test_a_model_that_is_frozen_whole_stays_in_evaluation_mode():
    model = create_model("lvvit_t", num_classes=3, img_size=(32, 32), depth=1)
    model.requires_grad_(False)
    model.freeze(1)
    model.train()
    assert not any(module.training for module in model.children())
