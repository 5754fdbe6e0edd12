"""What every model offers beside its outputs: recomputation, its blocks, features on the way, compilation."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_adapter import FAMILIES, NUM_CLASSES, create
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from tokenlabel.models import TimmAdapter, TokenModel, create_model
from tokenlabel.models.positions import resize_positions

SMALL = {"depth": 3, "width": 32, "num_heads": 4}
OURS: dict[str, dict[str, Any]] = {"lvvit_t": {**SMALL, "stem_width": 8}, "t2t_vit_14": SMALL}

# Of the families here only timm's PiT has no switch for it.
CANNOT_RECOMPUTE = ("pit_ti_224", "pit_ti_distilled_224")


def ours(name: str, **options: Any) -> TimmAdapter:
    model = create_model(name, num_classes=NUM_CLASSES, img_size=(32, 48), **{**OURS[name], **options})
    assert isinstance(model, TimmAdapter)
    return model


def loss_and_gradients(model: TokenModel, images: Tensor) -> tuple[Tensor, dict[str, Tensor], int]:
    """Return the loss, its gradients and the bytes that were kept for them, parameters not counted."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(1)
    model.zero_grad()
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = model(images)
        loss = outputs.class_logits.square().mean() + outputs.token_logits.square().mean()
    loss.backward()
    gradients = {key: value.grad for key, value in model.named_parameters() if value.grad is not None}
    return loss.detach(), gradients, sum(kept.values())


def check_recomputing_changes_nothing_but_memory(model: TokenModel, images: Tensor) -> None:
    loss, gradients, kept = loss_and_gradients(model.train(), images)
    model.set_grad_checkpointing()
    loss2, gradients2, kept2 = loss_and_gradients(model, images)
    model.set_grad_checkpointing(False)
    torch.testing.assert_close(loss2, loss)
    assert gradients2.keys() == gradients.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradients2[key], gradient, atol=1e-6, rtol=1e-4)
    assert kept2 < kept


def check_fsdp_blocks_hold_no_parameter_twice(model: TokenModel) -> None:
    parts = model.fsdp_blocks()
    assert len(parts) >= 2
    inside = [id(parameter) for part in parts for parameter in part.parameters()]
    assert len(inside) == len(set(inside))
    heads = {f"{key}.{name}" for key in ("head", "aux_head", "token_head") for name in ("weight", "bias")}
    assert not {id(value) for key, value in model.named_parameters() if key in heads} & set(inside)


def check_intermediates_are_timms_maps(model: TimmAdapter, images: Tensor) -> None:
    with torch.no_grad():
        first, second = model.eval().intermediates(images, [0, 1])
        _, (again,) = model.backbone.forward_intermediates(images, indices=[1])
    for features in (first, second):
        B, h, w, _ = features.shape
        assert len(images) == B
        assert w / h == pytest.approx(images.shape[3] / images.shape[2], rel=0.1)  # PiT's first is 7 x 11
    torch.testing.assert_close(second, again.permute(0, 2, 3, 1))


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name: str) -> None:
    torch.manual_seed(0)
    model, images = create(name), torch.randn(2, 3, *FAMILIES[name][0])
    check_fsdp_blocks_hold_no_parameter_twice(model)
    check_intermediates_are_timms_maps(model, images)
    model.freeze(0)  # as every run does: also in networks that do not say which layers they have
    assert all(parameter.requires_grad for parameter in model.parameters())
    if name not in CANNOT_RECOMPUTE:
        check_recomputing_changes_nothing_but_memory(model, images)


@pytest.mark.parametrize("name", OURS)
def test_ours(name: str) -> None:
    torch.manual_seed(0)
    model, images = ours(name, drop_path=0.5), torch.randn(2, 3, 32, 48)
    check_fsdp_blocks_hold_no_parameter_twice(model)
    check_recomputing_changes_nothing_but_memory(model, images)
    check_recomputing_changes_nothing_but_memory(model, images)  # it had been switched off again


@pytest.mark.parametrize("name", CANNOT_RECOMPUTE)
def test_a_network_that_cannot_recompute_says_so(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} cannot compute activations again .* train it without"):
        create(name).set_grad_checkpointing()


def test_fsdp_blocks_are_the_blocks_in_order() -> None:
    for name in OURS:
        model = ours(name)
        assert model.fsdp_blocks() == list(model.backbone.blocks)
    vit, swin = create("vit_tiny_patch16_224"), create("swin_tiny_patch4_window7_224")
    assert vit.fsdp_blocks() == list(vit.backbone.blocks)
    assert swin.fsdp_blocks() == [block for stage in swin.backbone.layers for block in stage.blocks]


@pytest.mark.parametrize("name", OURS)
@settings(max_examples=15)
@given(grid=st.tuples(st.integers(1, 4), st.integers(1, 4)), layers=st.sets(st.integers(0, 2), min_size=1))
def test_intermediates_are_what_blocks_give_at_any_size(name: str, grid: tuple[int, int], layers: set[int]) -> None:
    model = ours(name).eval()
    backbone = model.backbone
    img_size = (16 * grid[0], 16 * grid[1])
    images = torch.randn(2, 3, *img_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = model.intermediates(images, sorted(layers))
        patches = backbone.embed_patches(images)
        tokens = torch.cat([backbone.cls_token.expand(2, -1, -1), patches.flatten(1, 2)], dim=1)
        tokens = tokens + resize_positions(backbone.pos_embed, (2, 3), grid)
        for index, block in enumerate(backbone.blocks):
            tokens = block(tokens)
            if index in layers:
                expected = tokens[:, 1:].reshape(2, *grid, 32)
                torch.testing.assert_close(found.pop(0), expected)
    assert found == []


def test_the_last_intermediate_is_what_the_last_norm_sees() -> None:
    model, vit = ours("lvvit_t").eval(), create("vit_tiny_patch16_224", dynamic_img_size=True).eval()
    images = torch.randn(2, 3, 48, 80)
    (features,) = model.intermediates(images, [2])
    torch.testing.assert_close(F.layer_norm(features, (32,)).flatten(1, 2), model(images).tokens)
    (features,) = vit.intermediates(images, [1])
    torch.testing.assert_close(vit.backbone.norm(features).flatten(1, 2), vit(images).tokens)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], "counted from 0 and named in ascending order, got []"),
        ([1, 0], "ascending order, got [1, 0]"),
        ([-1], "ascending order, got [-1]"),
        ([0, 9], "got [0, 9]|has no layers [0, 9] of images of 32 x 48 pixels"),
    ],
)
def test_layers_that_there_are_not(layers: list[int], message: str) -> None:
    pattern = message.replace("[", r"\[").replace("]", r"\]")
    for model in (ours("lvvit_t"), create("vit_tiny_patch16_224")):
        with pytest.raises(ValueError, match=pattern):
            model.intermediates(torch.randn(1, 3, 32, 48), layers)


def test_models_compile_to_one_graph_whatever_the_mix_and_losses_to_another() -> None:
    """In a process of its own: PyTorch cannot compile the checks of shapes that tests add to every function."""
    script = Path(__file__).with_name("compiled_models.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    models, losses = [f"lvvit_{size}" for size in "tl"], ["sparse_cross_entropy", "linear_cross_entropy"]
    assert done.stdout.split() == [*models, "t2t_vit_14", "vit", "resnet", *losses]
