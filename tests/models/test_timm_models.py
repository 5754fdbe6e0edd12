"""LV-ViT under timm's roof: made, called, resized, saved and loaded by timm's own functions."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from golden_values import formula_image, formula_weights, golden_outputs, published_keys
from safetensors.torch import save_file
from timm.data.config import resolve_data_config
from timm.models import save_for_hf
from timm.optim import create_optimizer_v2  # pyright: ignore[reportPrivateImportUsage]  (timm lists no __all__)
from torch import nn

from tokenlabel.core.config import Inference
from tokenlabel.core.mix import MixPlan
from tokenlabel.models import TimmAdapter, create_model, register_with_timm
from tokenlabel.models.weights import adapter_name

SMALL = {"depth": 3, "width": 32, "num_heads": 4, "stem_width": 8}


@pytest.fixture(autouse=True)
def _registered() -> None:
    register_with_timm()
    register_with_timm()  # again: no warning about overwriting


def make(**options: Any) -> Any:
    return timm.create_model("lvvit_t", **{"num_classes": 7, "img_size": (32, 48), **SMALL, **options}).eval()


def test_all_sizes_are_there() -> None:
    assert timm.list_models("lvvit*") == ["lvvit_l", "lvvit_m", "lvvit_s", "lvvit_t"]
    assert timm.list_models("t2t*") == ["t2t_vit_14", "t2t_vit_19", "t2t_vit_24"]


def test_logits_are_the_published_ones() -> None:
    model = timm.create_model("lvvit_t").eval()
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == published_keys("lvvit_t")
    model.load_state_dict(formula_weights(published_keys("lvvit_t")))
    with torch.no_grad():
        logits = model(formula_image())[0]
    torch.testing.assert_close(logits.numpy(), golden_outputs("lvvit_t")["combined"], atol=1e-4, rtol=0)


def test_logits_combine_both_heads() -> None:
    model, ours = make(), create_model("lvvit_t", num_classes=7, img_size=(32, 48), **SMALL).eval()
    ours.load_state_dict({adapter_name(name): value for name, value in model.state_dict().items()})
    images = torch.randn(2, 3, 32, 48)
    torch.testing.assert_close(model(images), ours(images).logits(Inference.COMBINED))


def test_features_as_timm_gives_them() -> None:
    model = make()
    images = torch.randn(2, 3, 32, 48)
    features = model.forward_features(images)
    torch.testing.assert_close(model.forward_head(features), model(images))
    assert torch.equal(model.forward_head(features, pre_logits=True), features[:, 0])
    final, maps = model.forward_intermediates(images, indices=2, norm=True)
    torch.testing.assert_close(final, features)
    assert [tuple(features.shape) for features in maps] == [(2, 32, 2, 3)] * 2
    torch.testing.assert_close(maps[-1].flatten(2).transpose(1, 2), features[:, 1:])
    (early,) = model.forward_intermediates(
        images, indices=[0], stop_early=True, output_fmt="NLC", intermediates_only=True
    )
    assert early.shape == (2, 6, 32)
    with pytest.raises(ValueError, match="there are blocks 0 to 2"):
        model.forward_intermediates(images, indices=[3])


def test_features_only() -> None:
    model = make(features_only=True, out_indices=(0, 2))
    assert model.feature_info.channels() == [32, 32]
    assert model.feature_info.reduction() == [16, 16]
    assert [tuple(features.shape) for features in model(torch.randn(1, 3, 32, 48))] == [(1, 32, 2, 3)] * 2


def test_layers_that_nobody_asks_for_are_pruned() -> None:
    model, images = make(), torch.randn(1, 3, 32, 48)
    (expected,) = model.forward_intermediates(images, indices=[1], intermediates_only=True)
    assert model.prune_intermediate_layers([-2], prune_norm=True) == [1]
    assert {name.split(".")[0] for name in model.state_dict()} == {"pos_embed", "cls_token", "patch_embed", "blocks"}
    assert len(model.blocks) == 2
    torch.testing.assert_close(model.forward_intermediates(images, 1, intermediates_only=True), [expected])


def test_checkpoints_load_as_timm_validates(tmp_path: Path) -> None:
    model = make()
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "last.pth.tar")
    again = make(checkpoint_path=str(tmp_path / "last.pth.tar"), in_chans=3, scriptable=False, global_pool=None)
    assert resolve_data_config({}, model=again)["crop_pct"] == 0.9
    torch.testing.assert_close(again.head.weight, model.head.weight)


def test_classifier_can_be_reset() -> None:
    model = make()
    images = torch.randn(2, 3, 32, 48)
    model.reset_classifier(3)
    assert model(images).shape == (2, 3)
    assert model.get_classifier().out_features == 3
    model.reset_classifier(0)
    torch.testing.assert_close(model(images), model.forward_features(images)[:, 0])
    with pytest.raises(ValueError, match="global_pool='avg' is not possible"):
        model.reset_classifier(3, global_pool="avg")


def test_layer_decay_and_checkpointing() -> None:
    model = make(drop_path_rate=0.0).train()
    optimizer = create_optimizer_v2(model, opt="sgd", lr=1.0, layer_decay=0.5)
    scales = {group["lr_scale"] for group in optimizer.param_groups}
    assert scales == {1.0, 0.5, 0.25, 0.125, 0.0625}  # heads and norm, three blocks, stem
    images = torch.randn(2, 3, 32, 48)
    model(images).sum().backward()
    expected = {name: value.grad.clone() for name, value in model.named_parameters()}
    model.zero_grad()
    model.set_grad_checkpointing()
    model(images).sum().backward()
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.grad, expected[name])


def test_folders_for_the_hub_round_trip(tmp_path: Path) -> None:
    model = make()
    save_for_hf(model, str(tmp_path), model_args=SMALL, safe_serialization=True)
    images = torch.randn(2, 3, 32, 48)
    again: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    torch.testing.assert_close(again(images), model(images))
    finer: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=64, num_classes=3).eval()
    assert finer(torch.randn(1, 3, 64, 64)).shape == (1, 3)
    torch.testing.assert_close(finer.norm.weight, model.norm.weight)
    ours = create_model(f"local-dir:{tmp_path}", num_classes=7, img_size=(32, 48), pretrained=True).eval()
    assert isinstance(ours, TimmAdapter)
    torch.testing.assert_close(ours(images).logits(Inference.COMBINED), model(images))
    plan = MixPlan(torch.eye(2, 3).expand(2, 2, 3), torch.tensor([1, 0]), on_tokens=True)
    mixed = nn.Sequential(*model.blocks, model.norm)(
        model.embed(images, plan)
    )  # embeddings, not pixels: the stem overlaps
    torch.testing.assert_close(ours(images, plan).tokens, mixed[:, 1:])


def test_our_own_factory_needs_no_registration(tmp_path: Path) -> None:
    save_for_hf(make(), str(tmp_path), model_args=SMALL, safe_serialization=True)
    script = (
        "from tokenlabel.models import create_model\n"
        f"model = create_model('local-dir:{tmp_path}', num_classes=7, img_size=(32, 48), pretrained=True)\n"
        "print(type(model.backbone).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "LVViT\n", done.stderr


def test_a_published_file_loads_at_another_size(tmp_path: Path) -> None:
    model = make(img_size=(32, 32))
    save_file({f"module.{key}": value for key, value in model.state_dict().items()}, tmp_path / "a.safetensors")
    overlay = {"file": str(tmp_path / "a.safetensors"), "num_classes": 7}
    finer = make(img_size=(64, 48), pretrained=True, pretrained_cfg_overlay=overlay)
    assert finer.pos_embed.shape == (1, 13, 32)
    torch.testing.assert_close(finer.head.weight, model.head.weight)


def test_what_lvvit_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="in_chans=1"):
        make(in_chans=1)
    with pytest.raises(ValueError, match="output_fmt must be NCHW or NLC"):
        make().forward_intermediates(torch.randn(1, 3, 32, 48), output_fmt="NHWC")


def test_a_new_token_head_begins_as_the_classifier_that_timm_keeps(tmp_path: Path) -> None:
    network: Any = timm.create_model("test_resnet", num_classes=4)
    save_for_hf(network, str(tmp_path), model_args={}, safe_serialization=True)
    path = f"local-dir:{tmp_path}"
    model: Any = create_model(path, num_classes=4, img_size=64, pretrained=True)
    assert torch.equal(model.token_head.weight, network.get_classifier().weight)
    assert torch.equal(model.token_head.bias, network.get_classifier().bias)
    other: Any = create_model(path, num_classes=3, img_size=64, pretrained=True)  # timm keeps no classifier of these
    assert not torch.equal(other.token_head.weight, other.backbone.get_classifier().weight)
