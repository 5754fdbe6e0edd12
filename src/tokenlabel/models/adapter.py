"""Any timm classifier with a token grid, with a second head for its tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import timm
import torch
from jaxtyping import Float
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import get_pretrained_cfg, group_parameters
from torch import Tensor, nn

from tokenlabel.core.mix import MixPlan, mix_images
from tokenlabel.core.outputs import Outputs, TokenModel, check_ascending
from tokenlabel.models.features import REFUSALS, FeatureLayout, Features, classifier_features, run_blank
from tokenlabel.models.positions import fit_pretrained_positions
from tokenlabel.models.weights import begin_as_classifier, classifiers
from tokenlabel.runtime.coercion import Size, check_numbers, described, pair
from tokenlabel.runtime.errors import ModelError, first_line
from tokenlabel.runtime.hub import hub_or_cache, options_without_weights

# Where timm's classifiers keep a norm that they apply to pooled features. Tokens take it too, so that the
# token head sees what the classifier sees.
POOLED_NORMS = ("fc_norm", "head.norm")

TIMM_METHODS = ("forward_features", "forward_intermediates", "forward_head")


class TimmAdapter(TokenModel):
    """A timm classifier with a linear head for its tokens.

    `backbone`: any classifier with timm's `forward_features`, `forward_intermediates` and `forward_head`.
    `name`: what errors call it. `img_size`: (height, width) of the images to begin with; other sizes are taken
    where the backbone allows. `stage`: take the tokens from an earlier stage, for a finer grid; an index of
    timm's `forward_intermediates`, counted from 0. Their head begins with a LayerNorm, since the backbone's
    last norm has not seen them. `num_classes`: 0 for a backbone without classifier (timm's meaning).
    `num_token_classes`: what the tokens are about; the classes of the images if None.

    Class logits are the backbone's own. A backbone that has a token head (VOLO, LV-ViT) hands it over. Plans mix
    pixels, or, in VOLO and LV-ViT, whose stems overlap, patch embeddings.
    Raises ModelError for a backbone that has no token grid, ValueError for images that it cannot take.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        name: str,
        num_classes: int,
        img_size: Size,
        stage: int | None = None,
        num_token_classes: int | None = None,
    ) -> None:
        super().__init__()
        self.backbone: Any = backbone
        self.rebuild: Callable[..., nn.Module] | None = None  # makes the backbone again, to fit weights to it
        self.name = name
        self.num_classes, self.num_token_classes = num_classes, num_token_classes or num_classes
        self.stage = stage
        self._features_of: dict[tuple[int, int], Features] = {}
        preprocessing: dict[str, Any] = getattr(backbone, "pretrained_cfg", {})
        self.mean = _rgb(preprocessing.get("mean", IMAGENET_DEFAULT_MEAN))
        self.std = _rgb(preprocessing.get("std", IMAGENET_DEFAULT_STD))
        missing = [method for method in TIMM_METHODS if not hasattr(backbone, method)]
        if missing:
            raise ModelError(f"{name} has no token grid: it lacks timm's {' and '.join(missing)}")
        features = self._features(pair(img_size))
        self.grid = features.grid
        own_token_head = _take_own_token_head(backbone)
        if self.num_token_classes != num_classes:
            own_token_head = None  # it would be for the classes of the class head
        if features.from_stage is None:
            self._pooled_norm = _pooled_norm(backbone, features.width)
            self.token_head = own_token_head or _new_token_head(features, self.num_token_classes)
        else:
            self._pooled_norm = None
            self.token_head = _new_token_head(features, self.num_token_classes)

    def grid_for(self, img_size: Size) -> tuple[int, int]:
        """Return the token grid (h, w) of images of `img_size` (height, width), measured at the first call."""
        return self._features(pair(img_size)).grid

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters that weight decay leaves alone, beside biases and norms."""
        names = self.backbone.no_weight_decay() if hasattr(self.backbone, "no_weight_decay") else ()
        return {f"backbone.{name}" for name in names}

    def layers(self) -> dict[str, int]:
        """Return the layer of each parameter, as timm groups them: 0 for the stem, the highest for the heads."""
        if not hasattr(self.backbone, "group_matcher"):
            raise ValueError(f"{self.name} does not say which layers it has (timm's group_matcher)")
        matcher = self.backbone.group_matcher(coarse=False)
        found: Any = group_parameters(self.backbone, matcher, reverse=True)
        layers = {f"backbone.{name}": layer for name, layer in found.items()}
        heads = max(layers.values())
        return layers | {f"token_head.{name}": heads for name, _ in self.token_head.named_parameters()}

    def forward(self, images: Float[Tensor, "B 3 height width"], plan: MixPlan | None = None) -> Outputs:
        """Return class logits and tokens of normalised images, mixed by the plan."""
        are_numbers = isinstance(images, Tensor) and images.is_floating_point()
        if not (are_numbers and images.ndim == 4 and images.shape[1] == 3):
            raise ValueError(
                f"expected normalised images [B, 3, height, width], got {described(images)}; "
                "normalize_images(batch.images, ...) makes them"
            )
        if not (plan is None or isinstance(plan, MixPlan)):
            raise ValueError(f"plan: expected what sample_mix returns, got {plan!r}")
        features = self._features((images.shape[2], images.shape[3]))
        seen, dense = self._run(images, plan, features.from_stage)
        logits = self.backbone.forward_head(seen)
        return Outputs(
            # A backbone without a classifier pools all the same: its logits are [B, 0] (see `token_label_loss`).
            class_logits=logits if self.num_classes else logits.flatten(1)[:, :0],
            tokens=self._tokens(dense, features),
            token_head=self.token_head,
            grid=features.grid,
        )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep no activations inside blocks, as timm's own switch does it, compute them again in the backward pass.

        Raises ValueError for a backbone without that switch.
        """
        try:
            self.backbone.set_grad_checkpointing(enable)
        except (AttributeError, AssertionError) as error:
            raise ValueError(
                f"{self.name} cannot compute activations again ({first_line(error)}); train it without "
                "gradient checkpointing"
            ) from error

    def intermediates(
        self, images: Float[Tensor, "B 3 height width"], layers: Sequence[int]
    ) -> list[Float[Tensor, "B h w D"]]:
        """Return the features after some layers as maps; see `TokenModel.intermediates`."""
        check_ascending(layers, name=self.name)
        try:
            maps = self.backbone.forward_intermediates(
                images, indices=list(layers), stop_early=True, intermediates_only=True
            )
        except (AssertionError, IndexError, ValueError) as error:  # how timm and we say no
            size = f"{images.shape[2]} x {images.shape[3]} pixels"
            raise ValueError(
                f"{self.name} has no layers {list(layers)} of images of {size}: {first_line(error)}"
            ) from error
        return [features.permute(0, 2, 3, 1) for features in maps]

    def _run(
        self, images: Float[Tensor, "B 3 height width"], plan: MixPlan | None, from_stage: int | None
    ) -> tuple[Any, Tensor]:
        """Return what the classifier gets, and what the tokens are taken from."""
        if plan is not None and plan.on_tokens and from_stage is None and _mixes_embeddings(self.backbone):
            seen = _features_of_mixed_embeddings(self.backbone, images, plan)
            return seen, seen
        if plan is not None:
            images = mix_images(images, plan)
        if from_stage is None:
            seen = self.backbone.forward_features(images)
            return seen, seen
        seen, (dense,) = self.backbone.forward_intermediates(images, indices=[from_stage])
        return seen, dense

    def _tokens(self, dense: Tensor, features: Features) -> Float[Tensor, "B N D"]:
        if features.layout is FeatureLayout.SEQUENCE:
            dense = dense[:, features.num_prefix :]
        if self._pooled_norm is not None:
            dense = self.backbone.get_submodule(self._pooled_norm)(dense)
        match features.layout:
            case FeatureLayout.MAP:
                return dense.flatten(2).transpose(1, 2)
            case FeatureLayout.CHANNELS_LAST_MAP:
                return dense.flatten(1, 2)
            case FeatureLayout.SEQUENCE:
                return dense

    def _features(self, img_size: tuple[int, int]) -> Features:
        if img_size not in self._features_of:
            self._features_of[img_size] = self._measure(img_size)
        return self._features_of[img_size]

    def _measure(self, img_size: tuple[int, int]) -> Features:
        """Run one blank image of this size through the backbone and look at what comes out."""
        stage = -1 if self.stage is None else self.stage
        where = "" if self.stage is None else f" at stage {self.stage}"
        seen, dense = run_blank(self.backbone, img_size, stage=stage, name=self.name, where=where)
        grid = (dense.shape[2], dense.shape[3])
        found = Features(FeatureLayout.MAP, grid, width=dense.shape[1], from_stage=stage)
        if self.stage is None:
            found = classifier_features(seen, grid) or found
        self._check_grid(found, img_size)
        return found

    def _check_grid(self, features: Features, img_size: tuple[int, int]) -> None:
        grid, (height_px, width_px) = features.grid, img_size
        size = f"{height_px} x {width_px} pixels"
        if grid == (1, 1) and features.layout is not FeatureLayout.SEQUENCE:  # a map may be what pooling left
            raise ModelError(
                f"{self.name} has no token grid for images of {size}: its features are 1 x 1; take larger "
                "images, or an earlier stage (the option `stage`)"
            )
        patch = getattr(getattr(self.backbone, "patch_embed", None), "patch_size", None)
        if patch is None:
            return
        patch_height_px, patch_width_px = (patch, patch) if isinstance(patch, int) else patch
        is_patch_grid = grid == (height_px // patch_height_px, width_px // patch_width_px)
        if is_patch_grid and (height_px % patch_height_px or width_px % patch_width_px):
            raise ValueError(
                f"{self.name} would cut images of {size} (height x width) at the edges: its patches are "
                f"{patch_height_px} x {patch_width_px}; choose multiples of that"
            )


def create_timm_adapter(
    name: str,
    *,
    num_classes: int,
    img_size: tuple[int, int],
    stage: int | None = None,
    num_token_classes: int | None = None,
    **options: Any,
) -> TimmAdapter:
    """Return a timm model with a token head; `options` go to `timm.create_model` (pretrained, for example).

    Raises ValueError for options or a size that the model cannot take.
    """
    rates = [
        option for option, value in options.items() if option.endswith("_rate") and isinstance(value, (int, float))
    ]
    check_numbers(SimpleNamespace(**options), "model.options.", **dict.fromkeys(rates, "[0, 1)"))
    try:
        config = get_pretrained_cfg(name, allow_unregistered=True)
        if config is not None and config.fixed_input_size:  # timm's sign that the model takes `img_size`
            options["img_size"] = img_size
        with hub_or_cache() if "hub:" in name or options.get("pretrained") else nullcontext():
            backbone: Any = timm.create_model(name, num_classes=num_classes, **options)
    except (*REFUSALS, OSError) as error:
        missing = options.get("pretrained") and (isinstance(error, OSError) or "pretrained" in str(error))
        remedy = "; --model.weights FILE with --model.options.pretrained false needs no others" if missing else ""
        if unknown := re.search(r"unexpected keyword argument '(\w+)'", str(error)):
            others = {key: value for key, value in options.items() if key not in (unknown[1], "img_size")}
            remedy = f"; without it: --model.options '{json.dumps(others)}'"
        raise ValueError(f"{name} cannot be made with the options {options}: {first_line(error)}{remedy}") from error
    if options.get("pretrained"):
        fit_pretrained_positions(backbone)
    # Where timm keeps the classifier of its weights, a head for the tokens begins as that classifier, too.
    keeps = options.get("pretrained") and backbone.pretrained_cfg.get("num_classes") == num_classes
    if not keeps:
        _shrink_classifier(backbone)
    adapter = TimmAdapter(
        backbone,
        name=name,
        num_classes=num_classes,
        img_size=img_size,
        stage=stage,
        num_token_classes=num_token_classes,
    )
    if keeps and not hasattr(backbone, "aux_head"):
        begin_as_classifier(adapter)
    adapter.rebuild = partial(timm.create_model, name, **options_without_weights(options))
    return adapter


@torch.no_grad()
def _shrink_classifier(backbone: nn.Module) -> None:
    """Scale a new classifier of large weights to a standard deviation of .02, which most of timm's begin with.

    timm draws those of EfficientNets and MobileNets within 1 / sqrt(num_classes), which suits a thousand classes. For
    few, the first logits are so large that fine-tuning begins at several times the loss of a guess.
    """
    modules = dict(backbone.named_modules())
    for name in classifiers(backbone):
        weight = getattr(modules.get(name), "weight", None)
        if weight is None or weight.is_meta or weight.numel() < 2:  # a network of shapes only, or of no classes
            continue
        if (std := float(weight.std())) > 0.05:
            weight.mul_(0.02 / std)


def _pooled_norm(backbone: nn.Module, width: int) -> str | None:
    """Return the name of the norm between pooling and classifier, if one fits features of this width."""
    modules = dict(backbone.named_modules())
    for name in POOLED_NORMS:
        weight = getattr(modules.get(name), "weight", None)
        if weight is not None and len(weight) == width:
            return name
    return None


def _take_own_token_head(backbone: Any) -> nn.Module | None:
    """Take a token head away from a backbone that has one: it would add to the class logits."""
    token_head = getattr(backbone, "aux_head", None)
    if token_head is not None:
        backbone.aux_head = None
    return token_head


def _new_token_head(features: Features, num_classes: int) -> nn.Module:
    linear = nn.Linear(features.width, num_classes)
    nn.init.trunc_normal_(linear.weight, std=0.02)
    nn.init.zeros_(linear.bias)
    return linear if features.from_stage is None else nn.Sequential(nn.LayerNorm(features.width), linear)


def _mixes_embeddings(backbone: nn.Module) -> bool:
    """Return whether the backbone mixes patch embeddings (MixToken): ours, and of timm's VOLO."""
    return getattr(backbone, "mixes_embeddings", False) or hasattr(backbone, "mix_token")


def _features_of_mixed_embeddings(backbone: Any, images: Tensor, plan: MixPlan) -> Tensor:
    """Return the features of mixed patch embeddings; VOLO's lie on a finer grid than its tokens."""
    if getattr(backbone, "mixes_embeddings", False):
        return backbone.forward_features(images, plan)
    embeddings = mix_images(backbone.patch_embed(images), plan)  # [B, D, 2h, 2w]
    tokens = backbone.forward_tokens(embeddings.permute(0, 2, 3, 1))  # [B, N, D]
    return backbone.norm(backbone.forward_cls(tokens))


def _rgb(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = values
    return red, green, blue
