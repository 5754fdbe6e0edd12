"""What LV-ViT and T2T-ViT share: a class token, positions, transformer blocks, two heads, and timm's methods."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Float
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers.drop import DropPath
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tokenlabel.core.kernels import Linear
from tokenlabel.core.mix import MixPlan, mix_tokens
from tokenlabel.models.positions import resize_positions
from tokenlabel.runtime.coercion import NATURAL, POSITIVE, Size, check_numbers, coerced_fields, pair


@dataclass(frozen=True, slots=True, kw_only=True)
@coerced_fields
class TransformerConfig:
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
        check_numbers(self, depth=NATURAL, width=NATURAL, num_heads=NATURAL)
        check_numbers(self, residual_divisor=POSITIVE, mlp_ratio=POSITIVE, drop_path="[0, 1)")
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not a multiple of num_heads {self.num_heads}; change one of them")


Config = TypeVar("Config", bound=TransformerConfig)


def configured(config: Config, options: Mapping[str, Any]) -> Config:
    """Return a configuration with some fields replaced, timm's `drop_path_rate` among them; refuse unknown ones."""
    given = dict(options)
    if given.pop("in_chans", 3) != 3:
        raise ValueError(f"takes images of 3 channels, not in_chans={options['in_chans']}")
    if (rate := given.pop("drop_path_rate", None)) is not None:
        given["drop_path"] = rate
    known = [field.name for field in fields(config)]
    for option in given.keys() - set(known):
        near = get_close_matches(option, known)
        hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(known)}"
        raise ValueError(f"there is no option {option!r}; {hint}")
    return replace(config, **given)


class VisionTransformer(nn.Module, ABC):
    """A transformer over patches with timm's methods, a head for the class token and `aux_head` for the others.

    `img_size`: (height, width) in pixels, or one number for both; it sets the token grid (h, w) that the position
    embeddings are for. Images of any other size that the patch divides are taken too, with the embeddings resized
    bicubically. Called, it returns one row of logits an image: class logits + 0.5 * max over tokens of the token
    logits, as LV-ViT publishes it; class logits alone where `aux_head` is None.
    Raises ValueError for a size that is no multiple of the patch.
    """

    mean = IMAGENET_DEFAULT_MEAN
    std = IMAGENET_DEFAULT_STD
    num_prefix_tokens = 1
    mixes_embeddings = True
    """`forward_features` takes a plan and mixes what the stem makes of the patches (MixToken)."""
    stem_names: ClassVar[str]
    """A pattern of the names of the parameters before the first block."""
    pos_embed: nn.Parameter
    pretrained_cfg: dict[str, Any]  # set by timm

    def __init__(
        self,
        config: TransformerConfig,
        *,
        num_classes: int,
        patch_size_px: int,
        img_size: Size,
        attention_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.patch_size_px = patch_size_px
        self.num_classes = num_classes
        self.grad_checkpointing = False
        self.grid = self.grid_for(img_size)
        self.num_features = self.head_hidden_size = self.embed_dim = config.width
        self.feature_info = [
            {"module": f"blocks.{index}", "num_chs": config.width, "reduction": patch_size_px}
            for index in range(config.depth)
        ]
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.blocks = nn.ModuleList(
            Block(
                config, drop_path=config.drop_path * index / max(1, config.depth - 1), attention_scale=attention_scale
            )
            for index in range(config.depth)
        )
        self.norm: nn.Module = nn.LayerNorm(config.width)
        self.head: nn.Module = nn.Linear(config.width, num_classes) if num_classes else nn.Identity()
        self.aux_head: nn.Module | None = Linear(config.width, num_classes) if num_classes else None

    @abstractmethod
    def embed_patches(self, images: Float[Tensor, "B 3 height width"]) -> Float[Tensor, "B h w D"]:
        """Return one embedding a patch."""

    def grid_for(self, img_size: Size) -> tuple[int, int]:
        """Return the token grid (h, w) of images of `img_size` (height, width)."""
        img_size = img_size if isinstance(img_size, tuple) else pair(img_size)  # no more: it is compiled
        patch_size_px = self.patch_size_px
        if any(length < patch_size_px or length % patch_size_px for length in img_size):
            raise ValueError(
                f"images of {img_size[0]} x {img_size[1]} pixels (height x width) do not divide into patches "
                f"of {patch_size_px}; choose multiples of {patch_size_px} or a model with other patches"
            )
        return img_size[0] // patch_size_px, img_size[1] // patch_size_px

    def forward(self, x: Float[Tensor, "B 3 height width"]) -> Float[Tensor, "B C"]:
        """Return one row of logits an image."""
        return self.forward_head(self.forward_features(x))

    def embed(self, images: Float[Tensor, "B 3 height width"], plan: MixPlan | None = None) -> Float[Tensor, "B M D"]:
        """Return the tokens that enter the first block, the class token first; a plan mixes patch embeddings."""
        patches = self.embed_patches(images)
        if plan is not None:
            patches = mix_tokens(patches, plan)
        class_token = self.cls_token.expand(images.shape[0], -1, -1)  # not len(): export keeps B open
        tokens = torch.cat([class_token, patches.flatten(1, 2)], dim=1)  # [B, M = 1 + h * w, D]
        return tokens + resize_positions(self.pos_embed, self.grid, (patches.shape[1], patches.shape[2]))

    def forward_features(
        self, x: Float[Tensor, "B 3 height width"], plan: MixPlan | None = None
    ) -> Float[Tensor, "B M D"]:
        """Return the tokens after the last norm, the class token first; a plan mixes patch embeddings."""
        tokens = self.embed(x, plan)
        for block in self.blocks:
            tokens = self._run(block, tokens)
        return self.norm(tokens)

    def forward_head(self, x: Float[Tensor, "B M D"], pre_logits: bool = False) -> Float[Tensor, "B C"]:
        """Return the logits, or the class token's features."""
        if pre_logits:
            return x[:, 0]
        logits = self.head(x[:, 0])
        return logits if self.aux_head is None else logits + 0.5 * self.aux_head(x[:, 1:]).amax(dim=1)

    def forward_intermediates(
        self,
        x: Float[Tensor, "B 3 height width"],
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Return the tokens after some blocks, as maps ("NCHW") or sequences ("NLC"), as timm's models do.

        With `intermediates_only` a list of them, else the final normalised tokens and that list. `norm`: apply
        the last norm to them. `stop_early`: run no block after the last that is asked for.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be NCHW or NLC, got {output_fmt!r}")
        wanted = _block_indices(indices, depth=len(self.blocks))
        grid = self.grid_for((x.shape[2], x.shape[3]))
        tokens, found = self.embed(x), []
        for index, block in enumerate(self.blocks):
            tokens = self._run(block, tokens)
            if index in wanted:
                patches = (self.norm(tokens) if norm else tokens)[:, 1:]
                found.append(patches.unflatten(1, grid).permute(0, 3, 1, 2) if output_fmt == "NCHW" else patches)
            if stop_early and intermediates_only and index == max(wanted):
                break
        return found if intermediates_only else (self.norm(tokens), found)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks after the last that is asked for; return those that are asked for, counted from 0."""
        wanted = _block_indices(indices, depth=len(self.blocks))
        self.blocks = self.blocks[: max(wanted) + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0)
        return wanted

    def get_classifier(self) -> nn.Module:
        """Return the head of the class token."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put new heads, or none for 0 classes: `forward` then returns the class token's features."""
        if global_pool not in (None, "token"):
            raise ValueError(
                f"{type(self).__name__} classifies by its class token; global_pool={global_pool!r} is not possible"
            )
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.aux_head = nn.Linear(self.num_features, num_classes) if num_classes else None
        for head in (self.head, self.aux_head):
            if head is not None:
                initialise_linear(head)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return patterns of parameter names for timm's layer-wise learning rates."""
        return {"stem": self.stem_names, "blocks": r"^blocks\.(\d+)"}  # the last norm goes with the heads

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters that weight decay leaves alone, beside biases and norms."""
        return {"pos_embed", "cls_token"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep no activations inside blocks, compute them again in the backward pass."""
        self.grad_checkpointing = enable

    def _run(self, block: nn.Module, tokens: Float[Tensor, "B M D"]) -> Float[Tensor, "B M D"]:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, tokens, use_reentrant=False)  # pyright: ignore[reportReturnType]
        return block(tokens)


def _block_indices(indices: int | Sequence[int] | None, *, depth: int) -> list[int]:
    """Return the blocks that are meant: all for None, the last n for a number, else those, negative from the end."""
    if indices is None or isinstance(indices, int):
        indices = list(range(-(depth if indices is None else indices), 0))
    if not indices or not all(-depth <= index < depth for index in indices):
        raise ValueError(f"there are blocks 0 to {depth - 1}, not all of {indices}")
    return [index % depth for index in indices]


class Block(nn.Module):
    """Attention, then an MLP, each normalised before and divided by the residual divisor after."""

    def __init__(self, config: TransformerConfig, *, drop_path: float, attention_scale: float | None = None) -> None:
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


def initialise_linear(module: nn.Module) -> None:
    """Start a linear map as truncated normals of deviation .02 without bias; leave other modules alone."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
