"""LV-ViT as timm sees it: a classifier that returns logits, with timm's own methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import timm
from jaxtyping import Float
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from tokenlabel.models.lvvit import CONFIGS, LVViTConfig, LVViTTrunk
from tokenlabel.models.trunk import initialise_linear
from tokenlabel.models.weights import resize_all_positions

__all__ = ["TimmLVViT", "register_with_timm"]

# Read by timm when a model of this module is registered.
default_cfgs = generate_default_cfgs(
    {
        name: {
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "fixed_input_size": True,  # the model takes `img_size`
            "crop_pct": 0.9,
            "interpolation": "bicubic",
            "mean": LVViTTrunk.mean,
            "std": LVViTTrunk.std,
            "first_conv": "patch_embed.conv1",
            "classifier": ("head", "aux_head"),
        }
        for name in CONFIGS
    }
)


def register_with_timm() -> None:
    """Make `timm.create_model("lvvit_t")` and its three sisters work; calling it again does nothing."""
    for name in CONFIGS:
        if not timm.is_model(name):
            register_model(_entry_point(name))


class TimmLVViT(LVViTTrunk):
    """An LV-ViT that returns logits: class logits + 0.5 * max over tokens of the token logits, as published.

    Parameter names are those of `LVViT`. `img_size`: (height, width) in pixels, or one number for both.
    `drop_path_rate`: in place of the configuration's. `options`: fields of `LVViTConfig`.
    """

    num_prefix_tokens = 1
    pretrained_cfg: dict[str, Any]  # set by timm

    def __init__(
        self,
        config: LVViTConfig,
        *,
        num_classes: int = 1000,
        img_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        drop_path_rate: float | None = None,
        **options: Any,
    ) -> None:
        if in_chans != 3:
            raise ValueError(f"LV-ViT takes images of 3 channels, not in_chans={in_chans}")
        if drop_path_rate is not None:
            options["drop_path"] = drop_path_rate
        size_px = (img_size, img_size) if isinstance(img_size, int) else (img_size[0], img_size[1])
        super().__init__(replace(config, **options), num_classes=num_classes, size_px=size_px)
        self.num_features = self.head_hidden_size = self.embed_dim = self.config.width
        self.feature_info = [
            {"module": f"blocks.{index}", "num_chs": self.config.width, "reduction": self.patch_size_px}
            for index in range(self.config.depth)
        ]

    def forward(self, x: Float[Tensor, "B 3 height width"]) -> Float[Tensor, "B C"]:
        """Return one row of logits an image."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Float[Tensor, "B 3 height width"]) -> Float[Tensor, "B M D"]:
        """Return the normalised tokens, the class token first."""
        return self.features(x)

    def forward_head(self, x: Float[Tensor, "B M D"], pre_logits: bool = False) -> Float[Tensor, "B C"]:
        """Return the logits, or the class token's features."""
        if pre_logits:
            return x[:, 0]
        logits = self.head(x[:, 0])
        if self.aux_head is None:
            return logits
        return logits + 0.5 * self.aux_head(x[:, 1:]).amax(dim=1)

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
            tokens = self.run(block, tokens)
            if index in wanted:
                patches = (self.norm(tokens) if norm else tokens)[:, 1:]
                found.append(
                    patches.unflatten(1, grid).permute(0, 3, 1, 2) if output_fmt == "NCHW" else patches
                )
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
                f"LV-ViT classifies by its class token; global_pool={global_pool!r} is not possible"
            )
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.aux_head = nn.Linear(self.num_features, num_classes) if num_classes else None
        for head in (self.head, self.aux_head):
            if head is not None:
                initialise_linear(head)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return patterns of parameter names for timm's layer-wise learning rates."""
        blocks = [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^cls_token|pos_embed|patch_embed", "blocks": blocks}


def _block_indices(indices: int | Sequence[int] | None, *, depth: int) -> list[int]:
    """Return the blocks that are meant: all for None, the last n for a number, else those, negative from the end."""
    if indices is None or isinstance(indices, int):
        indices = list(range(-(depth if indices is None else indices), 0))
    if not indices or not all(-depth <= index < depth for index in indices):
        raise ValueError(f"there are blocks 0 to {depth - 1}, not all of {indices}")
    return [index % depth for index in indices]


def _entry_point(name: str) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build_model_with_cfg(
            TimmLVViT,
            name,
            pretrained,
            config=CONFIGS[name],
            pretrained_filter_fn=_fit_weights,
            feature_cfg={"out_indices": 4, "feature_cls": "getter"},
            **kwargs,
        )

    create.__name__ = name  # timm registers a model under its function's name
    return create


def _fit_weights(tensors: dict[str, Any], model: TimmLVViT) -> dict[str, Tensor]:
    """Return a checkpoint's tensors for a model of this image size; timm itself sees to the class count."""
    inner = tensors.get("state_dict", tensors)
    found = {name.removeprefix("module."): tensor for name, tensor in inner.items()}
    _, height_px, width_px = model.pretrained_cfg["input_size"]  # of the images that they were saved for
    grid = (height_px // model.patch_size_px, width_px // model.patch_size_px)
    fits = found["pos_embed"].shape[1] == 1 + grid[0] * grid[1]
    resize_all_positions(found, model, grid=grid if fits else None, name="the pretrained weights")
    return found
