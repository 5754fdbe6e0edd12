"""The adapter: every family of timm models gives class logits and tokens on the grid that it reports."""

from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tokenlabel.core.losses import token_label_loss
from tokenlabel.core.mix import MixPlan, mix_images, mix_tokens
from tokenlabel.core.targets import TokenTargets, class_targets
from tokenlabel.models import TimmAdapter, create_model
from tokenlabel.runtime.errors import ModelError

NUM_CLASSES = 5

Case = tuple[tuple[int, int], dict[str, Any]]
VIT = {"depth": 2, "embed_dim": 32, "num_heads": 2}
SWIN = {"depths": (1, 1, 1, 1), "embed_dim": 16, "num_heads": (1, 1, 1, 1), "window_size": 2}
CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (8, 16, 32, 64)}

# One small model of each family, with an image of 2 x 3 tokens (VOLO: 4 x 6) and what makes it smaller still.
FAMILIES: dict[str, Case] = {
    "vit_tiny_patch16_224": ((32, 48), VIT),
    "vit_wee_patch16_reg1_gap_256": ((32, 48), VIT),
    "vit_small_patch16_dinov3": ((32, 48), {**VIT, "embed_dim": 64}),
    "vit_small_patch14_dinov2": ((28, 42), VIT),
    "vit_small_patch14_reg4_dinov2": ((28, 42), VIT),
    "deit_tiny_patch16_224": ((32, 48), VIT),
    "deit_tiny_distilled_patch16_224": ((32, 48), VIT),
    "deit3_small_patch16_224": ((32, 48), VIT),
    "eva02_tiny_patch14_224": ((28, 42), {**VIT, "embed_dim": 64}),
    "beit_base_patch16_224": ((32, 48), VIT),
    "cait_xxs24_224": ((32, 48), VIT),
    "xcit_nano_12_p16_224": ((32, 48), {**VIT, "cls_attn_layers": 1}),
    "volo_d1_224": ((64, 96), {}),
    "swin_tiny_patch4_window7_224": ((64, 96), SWIN),
    "swinv2_tiny_window8_256": ((64, 96), SWIN),
    "pvt_v2_b0": ((64, 96), {"depths": (1, 1, 1, 1)}),
    "pit_ti_224": ((64, 96), {"depth": (1, 1, 1), "base_dims": (16, 16, 16)}),
    "pit_ti_distilled_224": ((64, 96), {"depth": (1, 1, 1), "base_dims": (16, 16, 16)}),
    "hiera_tiny_224": ((64, 96), {"stages": (1, 1, 1, 1), "embed_dim": 16, "num_heads": 1}),
    "maxvit_pico_rw_256": ((64, 96), {}),
    "mixer_s32_224": ((64, 96), {}),
    "resmlp_12_224": ((32, 48), {}),
    "gmlp_ti16_224": ((32, 48), {}),
    "convnext_atto": ((64, 96), CONVNEXT),
    "convnextv2_atto": ((64, 96), CONVNEXT),
    "test_resnet": ((64, 96), {}),
    "resnest14d": ((64, 96), {"channels": (8, 16, 16, 16)}),
    "test_nfnet": ((64, 96), {}),
    "test_efficientnet": ((64, 96), {}),
    "mobilenetv4_conv_small_035": ((64, 96), {}),
    "mambaout_femto": ((64, 96), {"depths": (1, 1, 1, 1), "dims": (16, 16, 32, 32)}),
}


def create(name: str, **options: Any) -> TimmAdapter:
    img_size, smaller = FAMILIES[name]
    model = create_model(name, num_classes=NUM_CLASSES, img_size=img_size, **{**smaller, **options})
    assert isinstance(model, TimmAdapter)
    return model


def small_vit(img_size: tuple[int, int] = (32, 48), **options: Any) -> TimmAdapter:
    model = create_model("vit_tiny_patch16_224", num_classes=NUM_CLASSES, img_size=img_size, **{**VIT, **options})
    assert isinstance(model, TimmAdapter)
    return model


def uniform_targets(num_images: int, num_tokens: int) -> TokenTargets:
    return TokenTargets(
        classes=torch.zeros(num_images, 1, dtype=torch.int64),
        excess=torch.zeros(num_images, num_tokens, 1),
        floor=torch.full((num_images, num_tokens), 1 / NUM_CLASSES),
        weight=torch.ones(num_images, num_tokens),
    )


def check_that_both_heads_learn(model: TimmAdapter, images: Tensor) -> None:
    outputs = model.train()(images)
    num_tokens = outputs.grid[0] * outputs.grid[1]
    assert outputs.token_logits.shape == (len(images), num_tokens, NUM_CLASSES)
    targets = class_targets(torch.arange(len(images))), uniform_targets(len(images), num_tokens)
    token_label_loss(outputs, *targets, beta=0.5).total.backward()
    classifiers = model.backbone.get_classifier()
    heads = [model.token_head, *(classifiers if isinstance(classifiers, tuple) else (classifiers,))]
    for head in heads:
        for parameter in head.parameters():
            assert parameter.grad is not None
            assert parameter.grad.abs().sum() > 0


def narrow_kernels(model: nn.Module) -> None:
    """Keep the centres of padded kernels only: at random weights a stack of them sees everything evenly."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.padding != (0, 0):
            height, width = module.kernel_size
            kept = torch.zeros_like(module.weight)
            centre = (..., height // 2, width // 2)
            kept[centre] = module.weight[centre].detach()
            module.weight = nn.Parameter(kept)


def check_that_tokens_are_in_place(model: TimmAdapter, img_size: tuple[int, int]) -> None:
    """Light up a cell and see its token change most, and see each token change most by its own cell.

    The upper left quarter of the cell: there the padded strides of CNNs put the centres of their tokens.
    """
    narrow_kernels(model)
    h, w = model.grid_for(img_size)
    cell_height, cell_width = img_size[0] // h, img_size[1] // w
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, *img_size, generator=generator).repeat(1 + h * w, 1, 1, 1)
    for cell in range(h * w):
        top, left = cell // w * cell_height, cell % w * cell_width
        images[1 + cell, :, top : top + cell_height // 2, left : left + cell_width // 2] += 10
    with torch.no_grad():
        tokens = model.eval()(images).tokens
    changes = (tokens[1:] - tokens[:1]).norm(dim=2)  # [cells, tokens]
    assert changes.argmax(dim=0).tolist() == list(range(h * w))
    assert changes.argmax(dim=1).tolist() == list(range(h * w))


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name: str) -> None:
    torch.manual_seed(0)
    img_size, _ = FAMILIES[name]
    model = create(name)
    assert model.grid_for(img_size) == ((4, 6) if name.startswith("volo") else (2, 3))
    check_that_both_heads_learn(model, torch.randn(2, 3, *img_size))
    check_that_tokens_are_in_place(create(name), img_size)
    with torch.no_grad():  # class logits are those of the model as timm runs it
        images = torch.randn(2, 3, *img_size)
        torch.testing.assert_close(model(images).class_logits, model.backbone(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "num_prefix"),
    [("vit_tiny_patch16_224", 1), ("deit_tiny_distilled_patch16_224", 2), ("vit_small_patch14_reg4_dinov2", 5)],
)
def test_prefix_tokens_are_left_out(name: str, num_prefix: int) -> None:
    model = create(name).eval()
    images = torch.randn(2, 3, *FAMILIES[name][0])
    features = model.backbone.forward_features(images)
    torch.testing.assert_close(model(images).tokens, features[:, num_prefix:])


@pytest.mark.parametrize(
    "name",
    ["convnext_atto", "mambaout_femto", "hiera_tiny_224", "eva02_tiny_patch14_224", "vit_wee_patch16_reg1_gap_256"],
)
def test_tokens_take_the_norm_between_pooling_and_classifier(name: str) -> None:
    """Where all places have the same features, each token is what the classifier sees."""
    model = create(name).eval()
    for parameter in model.parameters():  # norms that are not the identity
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    features = model.backbone.forward_features(torch.randn(1, 3, *FAMILIES[name][0]))
    match features.ndim, name:
        case 4, "mambaout_femto":
            same = features[:, :1, :1].expand_as(features)
        case 4, _:
            same = features[:, :, :1, :1].expand_as(features)
        case _:
            same = features[:, -1:].expand_as(features)
    tokens = model._tokens(same, model._features(FAMILIES[name][0]))
    if name == "mambaout_femto":  # its classifier has a hidden layer behind the norm
        seen = model.backbone.head.norm(same.mean((1, 2)))
    else:
        seen = model.backbone.forward_head(same, pre_logits=True)
    torch.testing.assert_close(tokens, seen[:, None].expand_as(tokens), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "stage", "grid"),
    [("test_resnet", -2, (4, 6)), ("test_resnet", 2, (8, 12)), ("swin_tiny_patch4_window7_224", 1, (8, 12))],
)
def test_an_earlier_stage_gives_a_finer_grid(name: str, stage: int, grid: tuple[int, int]) -> None:
    img_size = FAMILIES[name][0]
    model = create(name, stage=stage)
    assert model.grid_for(img_size) == grid
    check_that_both_heads_learn(model, torch.randn(2, 3, *img_size))
    check_that_tokens_are_in_place(create(name, stage=stage), img_size)


def test_other_sizes_where_the_backbone_takes_them() -> None:
    model = create("test_resnet")
    assert model.grid_for((128, 64)) == (4, 2)
    assert model(torch.randn(1, 3, 128, 64)).grid == (4, 2)
    flexible = small_vit(dynamic_img_size=True)
    assert flexible(torch.randn(1, 3, 64, 32)).grid == (4, 2)
    with pytest.raises(ValueError, match="vit_tiny_patch16_224 cannot take images of 64 x 32 pixels"):
        small_vit().grid_for((64, 32))


def test_measuring_the_grid_leaves_no_trace() -> None:
    model = create("test_resnet")
    model.train()
    frozen = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    frozen.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.grid_for((96, 96))
    assert model.training
    assert model.backbone.training
    assert not frozen.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@settings(max_examples=20, deadline=None)
@given(cells=st.lists(st.booleans(), min_size=12, max_size=12))
def test_mixing_pixels_on_the_grid_is_mixtoken_where_patches_do_not_overlap(cells: list[bool]) -> None:
    model = small_vit((48, 64)).eval()
    images = torch.randn(2, 3, 48, 64, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor(cells).float().view(1, 3, 4).expand(2, -1, -1)
    plan = MixPlan(mask, torch.tensor([1, 0]), on_tokens=True)
    embed = model.backbone.patch_embed
    mixed = mix_tokens(embed(images).unflatten(1, (3, 4)), plan).flatten(1, 2)
    torch.testing.assert_close(embed(mix_images(images, plan)), mixed, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(images, plan).class_logits, model(mix_images(images, plan)).class_logits)


def test_volo_mixes_embeddings() -> None:
    model = create("volo_d1_224").eval()
    images = torch.randn(2, 3, 64, 96)
    mask = torch.zeros(4, 6)
    mask[1:3, 2:6] = 1
    plan = MixPlan(mask.expand(2, 4, 6), torch.tensor([1, 0]), on_tokens=True)
    with torch.no_grad():
        embeddings = model.backbone.patch_embed(images)  # [2, D, 8, 12]
        expected = embeddings.clone()
        for row in range(8):
            for column in range(12):
                if mask[row // 2, column // 2]:
                    expected[:, :, row, column] = embeddings[[1, 0], :, row, column]
        tokens = model.backbone.forward_tokens(expected.permute(0, 2, 3, 1))
        features = model.backbone.norm(model.backbone.forward_cls(tokens))
        outputs = model(images, plan)
        torch.testing.assert_close(outputs.tokens, features[:, 1:])
        torch.testing.assert_close(outputs.class_logits, model.backbone.forward_head(features))
        on_pixels = model(images, MixPlan(plan.mask, plan.partner, on_tokens=False))
        torch.testing.assert_close(on_pixels.tokens, model(mix_images(images, plan)).tokens)
    assert not torch.allclose(on_pixels.tokens, outputs.tokens, atol=1e-3)


def test_volo_hands_over_its_own_token_head() -> None:
    model = create("volo_d1_224").eval()
    assert model.backbone.aux_head is None
    assert sum(name.endswith("aux_head.weight") for name in model.state_dict()) == 0
    assert model.token_head.weight.shape == (NUM_CLASSES, 384)


def test_what_the_trainer_asks_for() -> None:
    model = small_vit()
    assert model.num_classes == NUM_CLASSES
    assert model.mean == (0.5, 0.5, 0.5)
    assert model.std == (0.5, 0.5, 0.5)
    assert {"backbone.pos_embed", "backbone.cls_token"} <= model.no_weight_decay()
    assert create("test_resnet").no_weight_decay() == set()


class Pooled(nn.Module):
    """A classifier that is none of timm's."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(images.mean((2, 3)))


def test_a_model_without_token_grid_is_refused() -> None:
    with pytest.raises(ModelError, match="mine has no token grid: it lacks timm's forward_features and "):
        TimmAdapter(Pooled(), name="mine", num_classes=NUM_CLASSES, img_size=(32, 32))
    with pytest.raises(ModelError, match=r"test_resnet has no token grid for images of 32 x 32 .* 1 x 1"):
        create_model("test_resnet", num_classes=NUM_CLASSES, img_size=(32, 32))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet19", {}, r"no model 'resnet19'; did you mean resnet18 or "),
        ("no such thing", {}, r"no model 'no such thing'; see docs/models.md"),
        ("test_resnet", {"stage": 9}, r"test_resnet cannot take images of 64 x 64 pixels at stage 9"),
        ("test_resnet", {"dept": 9}, r"test_resnet cannot be made with .*'dept'; without it: --model.options '{}'"),
        ("test_resnet.no_such_tag", {}, r"Invalid pretrained tag \(no_such_tag\) for test_resnet, which has"),
        ("vit_tiny_patch14_224", {}, r"no model 'vit_tiny_patch14_224'; did you mean "),
        ("vit_small_patch14_dinov2", VIT, r"would cut images of 64 x 64 .* its patches are 14 x 14"),
        ("lvvit_t", {"dept": 3}, r"lvvit_t .* there is no option 'dept'; did you mean depth\?"),
        ("lvvit_t", {"xyz": 3}, r"lvvit_t .* there is no option 'xyz'; it has depth, width"),
    ],
)
def test_what_cannot_be_made_is_refused_with_a_hint(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model(name, num_classes=NUM_CLASSES, img_size=(64, 64), **options)


def test_a_new_classifier_for_few_classes_begins_near_the_loss_of_a_guess():
    """timm draws an EfficientNet's for a thousand: for three, the first logits would be about 30 times as large."""
    model, images = create_model("test_efficientnet", num_classes=3, img_size=64), torch.randn(8, 3, 64, 64)
    weight = model.get_submodule("backbone.classifier").get_parameter("weight").detach()
    assert float(weight.std()) == pytest.approx(0.02, rel=1e-4)
    assert float(model.eval()(images).class_logits.detach().std()) < 1
    torch.manual_seed(0)
    ours = create_model("test_efficientnet", num_classes=1000, img_size=64).get_submodule("backbone").state_dict()
    torch.manual_seed(0)
    theirs = timm.create_model("test_efficientnet", num_classes=1000).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
