"""What LV-ViT and T2T-ViT share: a class token, positions, transformer blocks and two heads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers.drop import DropPath
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tokenlabel.method.linear import Linear
from tokenlabel.method.mixing import MixPlan, mix_images, mix_tokens
from tokenlabel.method.outputs import Outputs, check_ascending
from tokenlabel.runtime.coercion import Size, coerced_fields, pair

HEAD_PARTS = ("norm", "head", "aux_head")


@dataclass(frozen=True, slots=True, kw_only=True)
@coerced_fields
class TrunkConfig:
    """The shape of the blocks and how they train.

    `residual_divisor`: each residual branch is divided by it. `drop_path`: the rate of the last block; the
    others' grow linearly from 0 at the first.
    """

    depth: int
    width: int
    num_heads: int
    mlp_ratio: float = 3.0
    residual_divisor: float = 1.0
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        for name in ("depth", "width", "num_heads"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if not (self.residual_divisor > 0 and self.mlp_ratio > 0 and 0 <= self.drop_path < 1):
            raise ValueError(
                "residual_divisor and mlp_ratio must be above 0, drop_path in [0, 1); "
                f"got {self.residual_divisor}, {self.mlp_ratio} and {self.drop_path}"
            )
        if self.width % self.num_heads:
            raise ValueError(
                f"width {self.width} is not a multiple of num_heads {self.num_heads}; change one of them"
            )


class Trunk(nn.Module, ABC):
    """A transformer over patches, with a head for the class token and one for the other tokens.

    `grid`: the token grid (h, w) that the position embeddings are for; they are resized bicubically for others.
    """

    mean = IMAGENET_DEFAULT_MEAN
    std = IMAGENET_DEFAULT_STD
    pos_embed: nn.Parameter

    token_head_name = "aux_head"

    def __init__(
        self,
        config: TrunkConfig,
        *,
        num_classes: int,
        patch_size_px: int,
        size_px: Size,
        attention_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.patch_size_px = patch_size_px
        self.num_classes = num_classes
        self.recomputes = False
        self.grid = self.grid_for(size_px)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.blocks = nn.ModuleList(
            Block(
                config,
                drop_path=config.drop_path * index / max(1, config.depth - 1),
                attention_scale=attention_scale,
            )
            for index in range(config.depth)
        )
        self.norm: nn.Module = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, num_classes)
        self.aux_head = Linear(config.width, num_classes)

    @abstractmethod
    def embed_patches(self, images: Float[Tensor, "B 3 height width"]) -> Float[Tensor, "B h w D"]:
        """Return one embedding a patch."""

    def grid_for(self, size_px: Size) -> tuple[int, int]:
        """Return the token grid (h, w) of images of `size_px` (height, width)."""
        size_px = size_px if isinstance(size_px, tuple) else pair(size_px)  # no more: it is compiled
        patch_size_px = self.patch_size_px
        if any(length < patch_size_px or length % patch_size_px for length in size_px):
            raise ValueError(
                f"images of {size_px[0]} x {size_px[1]} pixels (height x width) do not divide into patches "
                f"of {patch_size_px}; choose multiples of {patch_size_px} or a model with other patches"
            )
        return size_px[0] // patch_size_px, size_px[1] // patch_size_px

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters that weight decay leaves alone, beside biases and norms."""
        return {"pos_embed", "cls_token"}

    def layers(self) -> dict[str, int]:
        """Return the layer of each parameter: 0 for the stem, 1 for the first block, the highest for the heads."""
        heads = len(self.blocks) + 1
        layers = {}
        for name, _ in self.named_parameters():
            part, *rest = name.split(".")
            layers[name] = int(rest[0]) + 1 if part == "blocks" else heads if part in HEAD_PARTS else 0
        return layers

    def embed(
        self, images: Float[Tensor, "B 3 height width"], plan: MixPlan | None = None
    ) -> Float[Tensor, "B M D"]:
        """Return the tokens that enter the first block, the class token first.

        A plan on the token grid mixes patch embeddings (MixToken), any other mixes pixels.
        """
        if plan is not None and not plan.on_tokens:
            images = mix_images(images, plan)
        patches = self.embed_patches(images)
        if plan is not None and plan.on_tokens:
            patches = mix_tokens(patches, plan)
        class_token = self.cls_token.expand(images.shape[0], -1, -1)  # not len(): export keeps B open
        tokens = torch.cat([class_token, patches.flatten(1, 2)], dim=1)  # [B, M = 1 + h * w, D]
        return tokens + resize_positions(self.pos_embed, self.grid, (patches.shape[1], patches.shape[2]))

    def features(
        self, images: Float[Tensor, "B 3 height width"], plan: MixPlan | None = None
    ) -> Float[Tensor, "B M D"]:
        """Return the tokens after the last norm, the class token first, of images mixed by the plan (see `embed`)."""
        tokens = self.embed(images, plan)
        for block in self.blocks:
            tokens = self.run(block, tokens)
        return self.norm(tokens)

    def outputs(self, images: Float[Tensor, "B 3 height width"], plan: MixPlan | None = None) -> Outputs:
        """Return class logits and tokens of normalised images, mixed by the plan."""
        tokens = self.features(images, plan)
        return Outputs(
            class_logits=self.head(tokens[:, 0]),
            tokens=tokens[:, 1:],
            token_head=self.aux_head,
            grid=self.grid_for((images.shape[2], images.shape[3])),
        )

    def intermediates(
        self, images: Float[Tensor, "B 3 height width"], layers: Sequence[int]
    ) -> list[Float[Tensor, "B h w D"]]:
        """Return the tokens after some blocks as maps; see `TokenModel.intermediates`."""
        check_ascending(layers, name=type(self).__name__)
        if layers[-1] >= len(self.blocks):
            raise ValueError(f"there are layers 0 to {len(self.blocks) - 1}, got {list(layers)}")
        grid = self.grid_for((images.shape[2], images.shape[3]))
        tokens, features = self.embed(images), []
        for index in range(layers[-1] + 1):
            tokens = self.run(self.blocks[index], tokens)
            if index in layers:
                features.append(tokens[:, 1:].unflatten(1, grid))  # [B, h, w, D]
        return features

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep no activations inside blocks, compute them again in the backward pass."""
        self.recomputes = enable

    def run(self, block: nn.Module, tokens: Float[Tensor, "B M D"]) -> Float[Tensor, "B M D"]:
        """Return the tokens after a block, its activations kept or computed again when needed."""
        if self.recomputes and torch.is_grad_enabled():
            return checkpoint(block, tokens, use_reentrant=False)  # pyright: ignore[reportReturnType]
        return block(tokens)


class Block(nn.Module):
    """Attention, then an MLP, each normalised before and divided by the residual divisor after."""

    def __init__(
        self, config: TrunkConfig, *, drop_path: float, attention_scale: float | None = None
    ) -> None:
        super().__init__()
        self.residual_divisor = config.residual_divisor
        self.norm1 = nn.LayerNorm(config.width)
        self.attn = Attention(config.width, config.num_heads, scale=attention_scale)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(config.width)
        self.mlp = MLP(config.width, int(config.width * config.mlp_ratio))

    def forward(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        """Return the tokens after this block."""
        share = 1 / self.residual_divisor
        tokens = torch.add(tokens, self.drop_path(self.attn(self.norm1(tokens))), alpha=share)
        return torch.add(tokens, self.drop_path(self.mlp(self.norm2(tokens))), alpha=share)


class Attention(nn.Module):
    """Multi-head self-attention; queries, keys and values come from one matrix without bias.

    `scale`: what scores are multiplied by; None: 1 / sqrt(width of a head).
    """

    def __init__(self, width: int, num_heads: int, *, scale: float | None = None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (width // num_heads) ** -0.5 if scale is None else scale
        self.qkv = Linear(width, 3 * width, bias=False)
        self.proj = Linear(width, width)

    def forward(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        """Return what each token gathers from all others."""
        B, N, D = tokens.shape
        qkv = self.qkv(tokens).view(B, N, 3, self.num_heads, D // self.num_heads)
        qkv = qkv.permute(2, 0, 3, 1, 4).contiguous()  # [3, B, heads, N, D / heads]
        if tokens.is_cpu and qkv.dtype == torch.bfloat16:
            # There PyTorch's fused kernel takes 2.5 times as long as the products one by one.
            queries, keys, values = qkv.flatten(1, 2).unbind()
            scores = torch.baddbmm(
                queries.new_empty(()), queries, keys.transpose(1, 2), beta=0, alpha=self.scale
            )  # [B * heads, N, N]
            gathered = (scores.softmax(dim=2) @ values).unflatten(0, (B, self.num_heads))
        else:
            gathered = F.scaled_dot_product_attention(*qkv.unbind(), scale=self.scale)
        return self.proj(gathered.transpose(1, 2).reshape(B, N, D))


class MLP(nn.Module):
    """Two linear maps with a GELU between them."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden_width)
        self.fc2 = Linear(hidden_width, width)

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


def initialise_linear(module: nn.Module) -> None:
    """Start a linear map as truncated normals of deviation .02 without bias; leave other modules alone."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
