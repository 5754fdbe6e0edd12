"""T2T-ViT: a vision transformer whose tokens are made of overlapping windows, step by step.

Source: Yuan et al., "Tokens-to-Token ViT", ICCV 2021; the layers between the steps are Performers
(Choromanski et al., "Rethinking Attention with Performers", ICLR 2021). Parameters are named as in the published
checkpoints; `aux_head`, the head for the tokens, is not in those.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from tokenlabel.models.vision_transformer import TransformerConfig, VisionTransformer, configured, initialise_linear
from tokenlabel.runtime.coercion import Size

# Pixels between the centres of neighbouring tokens: the windows move by 4, 2 and 2.
STRIDE_PX = 16

PERFORMER_WIDTH = 64
NUM_RANDOM_FEATURES = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class T2TViTConfig(TransformerConfig):
    """The shape of a T2T-ViT; see `TransformerConfig` for what concerns the blocks.

    `scale_by_width`: divide attention scores by sqrt(width) in place of sqrt(width of a head), as the released
    weights were trained.
    """

    scale_by_width: bool = False


T2T_VIT_CONFIGS = {
    "t2t_vit_14": T2TViTConfig(depth=14, width=384, num_heads=6, drop_path=0.1),
    "t2t_vit_19": T2TViTConfig(depth=19, width=448, num_heads=7, drop_path=0.1),
    "t2t_vit_24": T2TViTConfig(depth=24, width=512, num_heads=8, drop_path=0.1),
}


class T2TViT(VisionTransformer):
    """T2T-ViT as published, a timm-style classifier; `TimmAdapter` makes a `TokenModel` of it.

    Sides of images are multiples of 16. Position embeddings are sinusoids and do not train. `options`: fields of
    `T2TViTConfig` in place of those of `config`; `drop_path_rate` is timm's word for `drop_path`.
    """

    stem_names = r"^cls_token|pos_embed|tokens_to_token"

    def __init__(self, config: T2TViTConfig, *, num_classes: int = 1000, img_size: Size = 224, **options: Any) -> None:
        config = configured(config, options)
        scale = config.width**-0.5 if config.scale_by_width else None
        super().__init__(
            config, num_classes=num_classes, patch_size_px=STRIDE_PX, img_size=img_size, attention_scale=scale
        )
        self.tokens_to_token = TokensToToken(config.width)
        positions = sinusoids(1 + self.grid[0] * self.grid[1], config.width)
        self.pos_embed = nn.Parameter(positions[None], requires_grad=False)
        self.apply(initialise_linear)
        nn.init.trunc_normal_(self.cls_token, std=0.02)

    def embed_patches(self, images: Float[Tensor, "B 3 height width"]) -> Float[Tensor, "B h w D"]:
        """Return one embedding a token of the grid."""
        grid = self.grid_for((images.shape[2], images.shape[3]))
        return self.tokens_to_token(images).unflatten(1, grid)


class TokensToToken(nn.Module):
    """Three steps that each gather the neighbours of a location into one token; Performers between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention1 = Performer(3 * 7 * 7)
        self.attention2 = Performer(PERFORMER_WIDTH * 3 * 3)
        self.project = nn.Linear(PERFORMER_WIDTH * 3 * 3, width)

    def forward(self, images: Float[Tensor, "B 3 height width"]) -> Float[Tensor, "B N D"]:
        """Return tokens, row by row."""
        height, width = images.shape[2] // 4, images.shape[3] // 4
        windows = F.unfold(images, kernel_size=7, stride=4, padding=2).transpose(1, 2)
        tokens = self.attention1(windows)  # [B, height * width, 64]
        tokens = self.attention2(_gather_neighbours(tokens, (height, width)))  # a quarter as many
        return self.project(_gather_neighbours(tokens, (height // 2, width // 2)))


class Performer(nn.Module):
    """One-head attention in linear time, by positive random features, then an MLP.

    `w` holds the random features; it is part of checkpoints and does not train. The skip connection goes from
    the values, since the input has another width.
    """

    def __init__(self, input_width: int) -> None:
        super().__init__()
        width = PERFORMER_WIDTH
        self.norm1 = nn.LayerNorm(input_width)
        self.kqv = nn.Linear(input_width, 3 * width)  # keys, queries, values, in this order
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        directions = nn.init.orthogonal_(torch.empty(NUM_RANDOM_FEATURES, width))
        self.w = nn.Parameter(directions * math.sqrt(NUM_RANDOM_FEATURES), requires_grad=False)

    def forward(self, windows: Float[Tensor, "B N input_width"]) -> Float[Tensor, "B N D"]:
        """Return one token a window."""
        keys, queries, values = self.kqv(self.norm1(windows)).chunk(3, dim=2)  # each [B, N, D]
        keys, queries = self._features(keys), self._features(queries)  # each [B, N, features]
        gathered = queries @ (keys.transpose(1, 2) @ values)  # [B, N, D]
        totals = queries @ keys.sum(dim=1).unsqueeze(2)  # [B, N, 1]
        tokens = values + self.proj(gathered / (totals + 1e-8))
        return tokens + self.mlp(self.norm2(tokens))

    def _features(self, vectors: Float[Tensor, "B N D"]) -> Float[Tensor, "B N features"]:
        """Return features whose products estimate exp(x . y): exp(w . x - |x|^2 / 2) / sqrt(number of features)."""
        half_squares = vectors.square().sum(dim=2, keepdim=True) / 2
        return (vectors @ self.w.T - half_squares).exp() / math.sqrt(NUM_RANDOM_FEATURES)


def sinusoids(num_positions: int, width: int) -> Float[Tensor, "M D"]:
    """Return the position embeddings of Vaswani et al. 2017: sines in even channels, cosines in odd ones."""
    channels = torch.arange(width, dtype=torch.float64)
    rates = 10000.0 ** (-2 * (channels // 2) / width)
    angles = torch.arange(num_positions, dtype=torch.float64)[:, None] * rates
    return torch.where(channels % 2 == 0, angles.sin(), angles.cos()).float()


def _gather_neighbours(tokens: Float[Tensor, "B N D"], grid: tuple[int, int]) -> Float[Tensor, "B quarter nine_D"]:
    """Lay tokens on their grid and return the 3 x 3 neighbourhood of every second one in each direction."""
    planes = tokens.transpose(1, 2).unflatten(2, grid)  # [B, D, h, w]
    return F.unfold(planes, kernel_size=3, stride=2, padding=1).transpose(1, 2)
