"""Heads and pyramids: published shapes, agreement with an independent implementation, every kind of backbone."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead

from tokenlabel.models.decoders import DecodeHead, FCNHead, LinearHead, UPerNetHead, find_levels, resized
from tokenlabel.models.options import HeadKind, NeckKind, SegmentModelConfig
from tokenlabel.models.segmentation import SegmentationModel, create_segmentation_model

WIDTHS = [8, 12, 16, 24]
# Small backbones: of one scale, without a class token, of stages, of stages and windows.
BACKBONES: dict[str, dict[str, Any]] = {
    "lvvit_t": {"depth": 3, "width": 16, "num_heads": 2, "stem_width": 8, "drop_path": 0.1},
    "t2t_vit_14": {"depth": 4, "width": 16, "num_heads": 2},
    "vit_tiny_patch16_224": {"depth": 5, "embed_dim": 16, "num_heads": 2},
    "test_resnet": {},
    "test_convnext": {},
    "swin_tiny_patch4_window7_224": {"depths": (1, 1, 1, 1), "embed_dim": 16, "num_heads": (1,) * 4, "window_size": 2},
}


def maps(batch: int = 2, *, side: int = 12) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sides = [side, side // 2, side // 4, side // 4]
    return [torch.randn(batch, w, s, s + 1, generator=generator) for w, s in zip(WIDTHS, sides, strict=True)]


def shaken(module: nn.Module) -> nn.Module:
    """Give every parameter and every statistic of a module values that are not those it starts with."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(noise.abs() + 0.5 if name.endswith("var") else noise * 0.3)
    return module


def theirs_of(ours: DecodeHead, theirs: nn.Module) -> nn.Module:
    """Give the other implementation the weights of ours."""
    renamed = {
        name.replace("conv_seg", "classifier").replace(".bn.", ".batch_norm."): tensor
        for name, tensor in ours.state_dict().items()
    }
    theirs.load_state_dict(renamed)
    return theirs


@pytest.mark.parametrize("training", [False, True])
def test_upernet_agrees_with_an_independent_implementation(training: bool) -> None:
    ours = shaken(UPerNetHead(WIDTHS, 7, width=10, dropout=0.0))
    config = SimpleNamespace(pool_scales=[1, 2, 3, 6], hidden_size=10, num_labels=7)
    assert isinstance(ours, DecodeHead)
    theirs = theirs_of(ours, UperNetHead(config, WIDTHS))
    for head in (ours, theirs):
        head.train(training)
    torch.testing.assert_close(ours(maps()), theirs(maps()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("auxiliary", [False, True])
def test_fcn_agrees_with_an_independent_implementation(auxiliary: bool) -> None:
    ours = shaken(FCNHead(WIDTHS, 7, width=10, auxiliary=auxiliary, level=2))
    config = SimpleNamespace(
        auxiliary_in_channels=None,
        auxiliary_channels=10,
        auxiliary_num_convs=1 if auxiliary else 2,
        auxiliary_concat_input=not auxiliary,
        num_labels=7,
    )
    assert isinstance(ours, DecodeHead)
    theirs = theirs_of(ours, UperNetFCNHead(config, WIDTHS, in_index=2))
    torch.testing.assert_close(ours.eval()(maps()), theirs.eval()(maps()), rtol=1e-5, atol=1e-5)


def test_the_linear_head_is_one_linear_map_of_each_place() -> None:
    head = shaken(LinearHead(WIDTHS, 7)).eval()
    assert isinstance(head, LinearHead)
    last = maps()[-1]
    logits = head([last])
    weight, bias = head.conv_seg.weight[:, :, 0, 0], head.state_dict()["conv_seg.bias"]
    norm = F.batch_norm(last, head.bn.running_mean, head.bn.running_var, head.bn.weight, head.bn.bias)
    for row in range(last.shape[2]):
        for column in range(last.shape[3]):
            expected = norm[:, :, row, column] @ weight.T + bias
            torch.testing.assert_close(logits[:, :, row, column], expected)


@settings(max_examples=20)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.integers(2, 5))
def test_upernet_takes_maps_of_any_number_and_size(levels: int, height: int, width: int, classes: int) -> None:
    head = UPerNetHead(WIDTHS[:levels], classes, width=4).eval()
    found = head([torch.randn(1, w, height, width) for w in WIDTHS[:levels]])
    assert found.shape == (1, classes, height, width)


def test_a_map_of_the_right_size_is_left_alone() -> None:
    features = torch.randn(1, 3, 4, 5)
    assert resized(features, torch.empty(1, 2, 4, 5)) is features


def small(name: str, **changes: Any) -> SegmentationModel:
    config = {
        "name": name,
        "img_size": (64, 96),
        "options": BACKBONES[name],
        "neck_width": 24,
        "head_width": 8,
        **changes,
    }
    return create_segmentation_model(SegmentModelConfig(**config), num_classes=5)


@pytest.mark.parametrize("head", HeadKind)
@pytest.mark.parametrize("name", BACKBONES)
def test_every_kind_of_backbone_trains_under_every_head(name: str, head: HeadKind) -> None:
    model = small(name, head=head).train()
    outputs = model(torch.randn(2, 3, 64, 96))
    loss = outputs.logits.square().mean()
    assert outputs.logits.shape[:2] == (2, 5)
    if head is not HeadKind.LINEAR:
        assert outputs.auxiliary is not None
        loss = loss + outputs.auxiliary.square().mean()
    loss.backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without  # parallel training would wait for them for ever
    assert model.eval()(torch.randn(1, 3, 64, 96)).auxiliary is None


@pytest.mark.parametrize(
    "changes",
    [
        {"head": HeadKind.FCN, "auxiliary": False},
        {"head": HeadKind.LINEAR, "neck": NeckKind.PYRAMID},
        {"head": HeadKind.UPERNET, "auxiliary": False},
        {"head": HeadKind.FCN, "layers": (0, 1)},
    ],
)
def test_what_no_head_reads_is_not_trained(changes: dict[str, Any]) -> None:
    """Nor waited for by parallel training: a neck's sides that the head leaves out, too."""
    model = small("lvvit_t", **changes).train()
    outputs = model(torch.randn(2, 3, 64, 96))
    loss = outputs.logits.square().mean()
    if outputs.auxiliary is not None:
        loss = loss + outputs.auxiliary.square().mean()
    loss.backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_more_layers_than_a_neck_takes_are_refused() -> None:
    config = SegmentModelConfig(
        name="lvvit_t",
        img_size=(64, 96),
        layers=(0, 1, 2, 3, 4),
        options={"depth": 5, "width": 16, "num_heads": 2, "patch_size": 16},
    )
    with pytest.raises(ValueError, match=r"model\.layers names 5 layers \(0, 1, 2, 3, 4\); a neck takes 4"):
        create_segmentation_model(config, num_classes=5)


@pytest.mark.parametrize("name", ["lvvit_t", "vit_tiny_patch16_224"])
def test_token_grids_follow_images_of_other_sizes(name: str) -> None:
    model = small(name).eval()
    for height, width in ((64, 96), (32, 32), (128, 48)):
        assert model(torch.randn(1, 3, height, width)).logits.shape == (1, 5, height // 4, width // 4)


def test_the_neck_makes_strides_of_4_8_16_and_16() -> None:
    found = small("lvvit_t").eval().maps(torch.randn(1, 3, 64, 96))
    assert [tuple(m.shape[1:]) for m in found] == [(16, 16, 24), (16, 8, 12), (16, 4, 6), (24, 4, 6)]


def test_the_neck_of_fcn_makes_its_last_map_finer() -> None:
    found = small("lvvit_t", head=HeadKind.FCN).eval().maps(torch.randn(1, 3, 64, 96))
    assert [tuple(m.shape[1:]) for m in found] == [(16, 4, 6)] * 3 + [(24, 8, 12)]


@pytest.mark.parametrize(
    ("name", "layers", "width", "num_parameters"),
    [
        ("lvvit_s", (6, 9, 12, 15), 256, 44),
        ("lvvit_m", (10, 13, 16, 19), 256, 77),
        ("lvvit_l", (14, 17, 20, 23), 512, 208),
    ],
)
def test_the_published_models_have_their_layers_and_sizes(
    name: str, layers: tuple[int, ...], width: int, num_parameters: int
) -> None:
    with torch.device("meta"):
        config = SegmentModelConfig(name=name, img_size=(32, 32), head_width=width)
        model = create_segmentation_model(config, num_classes=150)
    assert model.levels.layers == layers
    used = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert round(used / 1e6) == num_parameters


def test_a_backbone_of_stages_gives_its_four_coarsest() -> None:
    model = small("test_resnet")
    assert model.neck is None
    assert len(model.levels.layers) == 4
    found = model.eval().maps(torch.randn(1, 3, 64, 96))
    strides = [64 // m.shape[2] for m in found]
    assert strides == sorted(strides)


def test_layers_can_be_chosen() -> None:
    assert small("lvvit_t", layers=(0, 2)).levels.layers == (0, 2)
    with pytest.raises(ValueError, match="there are blocks 0 to 2"):
        small("lvvit_t", layers=(0, 3))


def test_a_neck_is_refused_where_there_are_stages() -> None:
    with pytest.raises(ValueError, match=r"model\.neck is pyramid, .* differ in width"):
        small("test_resnet", neck=NeckKind.PYRAMID)


def test_finding_levels_leaves_the_backbone_as_it_was() -> None:
    model = small("test_resnet").train()
    before = {name: tensor.clone() for name, tensor in model.backbone.state_dict().items()}
    find_levels(model.backbone, (64, 64))
    assert model.backbone.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.backbone.state_dict().items())


def test_a_frozen_backbone_stands_still() -> None:
    model = small("test_resnet", freeze_backbone=True).train()
    assert not model.backbone.training
    assert model.decode_head.training
    assert not any(p.requires_grad for p in model.backbone.parameters())


def test_layers_and_decay_are_those_of_the_backbone() -> None:
    model = small("lvvit_t")
    layers = model.layers()
    assert layers.keys() == {name for name, _ in model.named_parameters()}
    top = max(layers.values())
    assert {layer for name, layer in layers.items() if not name.startswith("backbone.")} == {top}
    assert layers["backbone.backbone.blocks.0.attn.qkv.weight"] == 1
    assert model.no_weight_decay() == {"backbone.backbone.pos_embed", "backbone.backbone.cls_token"}


def test_layer_norms_take_another_epsilon() -> None:
    model = small("lvvit_t", norm_eps=1e-6)
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}


def test_checkpointing_gives_the_same_gradients() -> None:
    model = small("lvvit_t", options={**BACKBONES["lvvit_t"], "drop_path": 0.0}, dropout=0.0).train()
    images, gradients = torch.randn(2, 3, 64, 96), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(images).logits.square().mean().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)
