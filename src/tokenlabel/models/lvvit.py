"""LV-ViT: a vision transformer with a convolutional patch embedding and scaled residuals.

Source: Jiang et al., "All Tokens Matter", NeurIPS 2021. Parameters are named as in the published
checkpoints.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers.drop import DropPath
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tokenlabel.mixing import MixPlan, mix_images, mix_tokens
from tokenlabel.models.outputs import Outputs, TokenModel


@dataclass(frozen=True, slots=True, kw_only=True)
class LVViTConfig:
    """The shape of an LV-ViT and how it trains.

    `stem_width`: channels of the convolutions before the patch embedding; `patch_size` in pixels, even.
    `residual_divisor`: each residual branch is divided by it. `drop_path`: the rate of the last block; the
    others' grow linearly from 0 at the first. `conv_stem`: False embeds each patch by one linear map, as the
    plain ViT does.
    `gradient_checkpointing`: keep no activations inside blocks, compute them again in the backward pass.
    """

    depth: int
    width: int
    num_heads: int
    stem_width: int = 64
    patch_size: int = 16
    mlp_ratio: float = 3.0
    residual_divisor: float = 1.0
    drop_path: float = 0.0
    conv_stem: bool = True
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise ValueError(
                f"width {self.width} is not a multiple of num_heads {self.num_heads}; change one of them"
            )
        if self.patch_size < 2 or self.patch_size % 2:
            raise ValueError(
                f"patch_size must be even (the stem halves the image first), got {self.patch_size}"
            )


CONFIGS = {
    "lvvit_t": LVViTConfig(depth=12, width=240, num_heads=4, residual_divisor=1.0, drop_path=0.1),
    "lvvit_s": LVViTConfig(depth=16, width=384, num_heads=6, residual_divisor=2.0, drop_path=0.1),
    "lvvit_m": LVViTConfig(depth=20, width=512, num_heads=8, residual_divisor=2.0, drop_path=0.2),
    "lvvit_l": LVViTConfig(
        depth=24, width=768, num_heads=12, stem_width=128, residual_divisor=3.0, drop_path=0.3
    ),
}


class LVViT(TokenModel):
    """LV-ViT with a head for the class token and one for the other tokens.

    `size_px` (height, width) sets how many position embeddings are learned; images of any other size that the
    patch divides are taken too, with the embeddings resized bicubically.
    Raises ValueError for a size that is no multiple of the patch.
    """

    mean = IMAGENET_DEFAULT_MEAN
    std = IMAGENET_DEFAULT_STD

    def __init__(self, config: LVViTConfig, *, num_classes: int, size_px: tuple[int, int]) -> None:
        super().__init__()
        self.config = config
        self.num_classes = num_classes
        self.grid = self.grid_for(size_px)
        stem = ConvStem if config.conv_stem else LinearStem
        self.patch_embed = stem(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid[0] * self.grid[1], config.width))
        self.blocks = nn.ModuleList(
            Block(config, drop_path=config.drop_path * index / max(1, config.depth - 1))
            for index in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, num_classes)
        self.aux_head = nn.Linear(config.width, num_classes)
        self.apply(_initialise)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def grid_for(self, size_px: tuple[int, int]) -> tuple[int, int]:
        """Return the token grid (h, w) of images of `size_px` (height, width)."""
        patch_size = self.config.patch_size
        if any(length < patch_size or length % patch_size for length in size_px):
            raise ValueError(
                f"images of {size_px[0]} x {size_px[1]} pixels (height x width) do not divide into patches "
                f"of {patch_size}; choose multiples of {patch_size} or another patch_size"
            )
        return size_px[0] // patch_size, size_px[1] // patch_size

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters that weight decay leaves alone, beside biases and norms."""
        return {"pos_embed", "cls_token"}

    def embed(
        self, images: Float[Tensor, "B 3 height width"], plan: MixPlan | None = None
    ) -> Float[Tensor, "B M D"]:
        """Return the tokens that enter the first block, the class token first."""
        grid = self.grid_for((images.shape[2], images.shape[3]))
        if plan is not None and not plan.on_tokens:
            images = mix_images(images, plan)
        patches = self.patch_embed(images).permute(0, 2, 3, 1)  # [B, h, w, D]
        if plan is not None and plan.on_tokens:
            patches = mix_tokens(patches, plan)
        class_token = self.cls_token.expand(len(images), -1, -1)
        tokens = torch.cat([class_token, patches.flatten(1, 2)], dim=1)  # [B, M = 1 + h * w, D]
        return tokens + resize_positions(self.pos_embed, self.grid, grid)

    def forward(self, images: Float[Tensor, "B 3 height width"], plan: MixPlan | None = None) -> Outputs:
        """Return class logits and tokens of normalised images.

        A plan on the token grid mixes patch embeddings (MixToken), any other mixes pixels.
        """
        tokens = self.embed(images, plan)
        for block in self.blocks:
            tokens = self._run(block, tokens)
        tokens = self.norm(tokens)
        return Outputs(
            class_logits=self.head(tokens[:, 0]),
            tokens=tokens[:, 1:],
            token_head=self.aux_head,
            grid=self.grid_for((images.shape[2], images.shape[3])),
        )

    def features_after(
        self, images: Float[Tensor, "B 3 height width"], blocks: Collection[int]
    ) -> list[Float[Tensor, "B D h w"]]:
        """Return the tokens after some blocks (counted from 0, in ascending order) as maps, for dense tasks.

        The class token is left out; the last norm is not applied.
        """
        grid = self.grid_for((images.shape[2], images.shape[3]))
        tokens, features = self.embed(images), []
        for index, block in enumerate(self.blocks):
            tokens = self._run(block, tokens)
            if index in blocks:
                features.append(tokens[:, 1:].unflatten(1, grid).permute(0, 3, 1, 2))
        return features

    def _run(self, block: nn.Module, tokens: Float[Tensor, "B M D"]) -> Float[Tensor, "B M D"]:
        if self.config.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, tokens, use_reentrant=False)  # pyright: ignore[reportReturnType]
        return block(tokens)


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

    def forward(self, images: Float[Tensor, "B 3 height width"]) -> Float[Tensor, "B D h w"]:
        """Return one embedding a patch."""
        features = F.relu(self.bn1(self.conv1(images)))  # [B, stem, height / 2, width / 2]
        features = F.relu(self.bn2(self.conv2(features)))
        features = F.relu(self.bn3(self.conv3(features)))
        return self.proj(features)


class LinearStem(nn.Module):
    """One linear map of each patch, as in the plain ViT: the embeddings don't overlap."""

    def __init__(self, config: LVViTConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size)

    def forward(self, images: Float[Tensor, "B 3 height width"]) -> Float[Tensor, "B D h w"]:
        """Return one embedding a patch."""
        return self.proj(images)


class Block(nn.Module):
    """Attention, then an MLP, each normalised before and divided by the residual divisor after."""

    def __init__(self, config: LVViTConfig, *, drop_path: float) -> None:
        super().__init__()
        self.residual_divisor = config.residual_divisor
        self.norm1 = nn.LayerNorm(config.width)
        self.attn = Attention(config.width, config.num_heads)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(config.width)
        self.mlp = MLP(config.width, int(config.width * config.mlp_ratio))

    def forward(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        """Return the tokens after this block."""
        tokens = tokens + self.drop_path(self.attn(self.norm1(tokens))) / self.residual_divisor
        return tokens + self.drop_path(self.mlp(self.norm2(tokens))) / self.residual_divisor


class Attention(nn.Module):
    """Multi-head self-attention; queries, keys and values come from one matrix without bias."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        """Return what each token gathers from all others."""
        B, N, D = tokens.shape
        qkv = self.qkv(tokens).view(B, N, 3, self.num_heads, D // self.num_heads)
        queries, keys, values = qkv.permute(2, 0, 3, 1, 4).unbind()  # each [B, heads, N, D / heads]
        gathered = F.scaled_dot_product_attention(queries, keys, values)
        return self.proj(gathered.transpose(1, 2).reshape(B, N, D))


class MLP(nn.Module):
    """Two linear maps with a GELU between them."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden_width)
        self.fc2 = nn.Linear(hidden_width, width)

    def forward(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        """Return each token's own transformation."""
        return self.fc2(F.gelu(self.fc1(tokens)))


def resize_positions(
    positions: Float[Tensor, "1 M D"], grid: tuple[int, int], new_grid: tuple[int, int]
) -> Float[Tensor, "1 M2 D"]:
    """Return position embeddings for another token grid (h, w), resized bicubically.

    The last h * w embeddings are those of the grid, row by row; what comes before (a class token's) stays.
    """
    if grid == new_grid:
        return positions
    num_prefix = positions.shape[1] - grid[0] * grid[1]
    planes = positions[:, num_prefix:].unflatten(1, grid).permute(0, 3, 1, 2)  # [1, D, h, w]
    resized = F.interpolate(planes.float(), size=new_grid, mode="bicubic", align_corners=False)
    return torch.cat(
        [positions[:, :num_prefix], resized.to(positions.dtype).flatten(2).transpose(1, 2)], dim=1
    )


def _initialise(module: nn.Module) -> None:
    """Linear maps start as truncated normals of deviation .02 without bias; all else as PyTorch makes it."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
