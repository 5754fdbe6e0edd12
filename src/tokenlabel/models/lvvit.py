"""LV-ViT: a vision transformer with a convolutional patch embedding and scaled residuals.

Source: Jiang et al., "All Tokens Matter", NeurIPS 2021. Parameters are named as in the published
checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from tokenlabel.core.kernels import linear
from tokenlabel.models.vision_transformer import TransformerConfig, VisionTransformer, configured, initialise_linear
from tokenlabel.runtime.coercion import Size


@dataclass(frozen=True, slots=True, kw_only=True)
class LVViTConfig(TransformerConfig):
    """The shape of an LV-ViT; see `TransformerConfig` for what concerns the blocks.

    `stem_width`: channels of the convolutions before the patch embedding; `patch_size` in pixels, even.
    `conv_stem`: False embeds each patch by one linear map, as the plain ViT does.
    """

    stem_width: int = 64
    patch_size: int = 16
    conv_stem: bool = True

    def __post_init__(self) -> None:
        TransformerConfig.__post_init__(self)  # with slots, `super()` would look at the class before they were made
        if self.patch_size < 2 or self.patch_size % 2:
            raise ValueError(f"patch_size must be even (the stem halves the image first), got {self.patch_size}")


LVVIT_CONFIGS = {
    "lvvit_t": LVViTConfig(depth=12, width=240, num_heads=4, residual_divisor=1.0, drop_path=0.1),
    "lvvit_s": LVViTConfig(depth=16, width=384, num_heads=6, residual_divisor=2.0, drop_path=0.1),
    "lvvit_m": LVViTConfig(depth=20, width=512, num_heads=8, residual_divisor=2.0, drop_path=0.2),
    "lvvit_l": LVViTConfig(depth=24, width=768, num_heads=12, stem_width=128, residual_divisor=3.0, drop_path=0.3),
}


class LVViT(VisionTransformer):
    """LV-ViT as published, a timm-style classifier; `TimmAdapter` makes a `TokenModel` of it.

    `options`: fields of `LVViTConfig` in place of those of `config`; `drop_path_rate` is timm's word for `drop_path`.
    """

    config: LVViTConfig
    stem_names = r"^cls_token|pos_embed|patch_embed"

    def __init__(self, config: LVViTConfig, *, num_classes: int = 1000, img_size: Size = 224, **options: Any) -> None:
        config = configured(config, options)
        super().__init__(config, num_classes=num_classes, patch_size_px=config.patch_size, img_size=img_size)
        self.patch_embed = ConvStem(config) if config.conv_stem else LinearStem(config)
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid[0] * self.grid[1], config.width))
        self.apply(initialise_linear)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def embed_patches(self, images: Float[Tensor, "B 3 height width"]) -> Float[Tensor, "B h w D"]:
        """Return one embedding a patch."""
        self.grid_for((images.shape[2], images.shape[3]))  # a stem would cut what does not divide
        return self.patch_embed(images)


class ConvStem(nn.Module):
    """Three convolutions at half resolution, then patches of their output: the embeddings overlap."""

    def __init__(self, config: LVViTConfig) -> None:
        super().__init__()
        conv = partial(nn.Conv2d, bias=False)
        width = config.stem_width
        self.conv1 = conv(3, width, 7, stride=2, padding=3)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv(width, width, 3, padding=1)
        self.bn3 = nn.BatchNorm2d(width)
        half_patch = config.patch_size // 2
        self.proj = nn.Conv2d(width, config.width, half_patch, stride=half_patch)

    def forward(self, images: Float[Tensor, "B 3 height width"]) -> Float[Tensor, "B h w D"]:
        """Return one embedding a patch."""
        features = F.relu_(self.bn1(self.conv1(images)))  # [B, stem, height / 2, width / 2]
        features = F.relu_(self.bn2(self.conv2(features)))
        features = F.relu_(self.bn3(self.conv3(features)))
        return embed_patches(features, self.proj)


class LinearStem(nn.Module):
    """One linear map of each patch, as in the plain ViT: the embeddings don't overlap."""

    def __init__(self, config: LVViTConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size)

    def forward(self, images: Float[Tensor, "B 3 height width"]) -> Float[Tensor, "B h w D"]:
        """Return one embedding a patch."""
        return embed_patches(images, self.proj)


def embed_patches(features: Float[Tensor, "B D height width"], proj: nn.Conv2d) -> Float[Tensor, "B h w D2"]:
    """Return what a convolution whose stride is its kernel makes of each patch.

    It is one product of matrices, which the libraries do faster than such a convolution.
    """
    patch_height, patch_width = proj.kernel_size
    h, w = features.shape[2] // patch_height, features.shape[3] // patch_width
    patches = features.permute(0, 2, 3, 1).unflatten(1, (h, patch_height)).unflatten(3, (w, patch_width))
    patches = patches.transpose(2, 3).flatten(3)  # [B, h, w, patch height * patch width * D]
    return linear(patches, proj.weight.permute(0, 2, 3, 1).flatten(1), proj.bias)
