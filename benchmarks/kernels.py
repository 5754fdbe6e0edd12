"""What the project's own CPU kernels are worth: oneDNN's linear maps in fp32, attention by products in bf16.

Forward + backward of LV-ViT as it comes against the same model on PyTorch's `F.linear` and
`scaled_dot_product_attention`, in turns. Where a ratio falls to 1, the kernel can go.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measure import Row, Settings, interleave, ratios
from tokenlabel.core import kernels
from tokenlabel.models import create_model, vision_transformer

SMALL = {"patch_size": 8, "depth": 4, "width": 128, "num_heads": 4, "stem_width": 32}

# The model, its options, the side of its images in pixels and the size of a batch.
CASES: list[tuple[str, dict[str, Any], int, int]] = [("lvvit_s", SMALL, 64, 50), ("lvvit_t", {}, 224, 4)]


def run(settings: Settings) -> list[Row]:
    """Measure the time of a step by PyTorch's kernels and by ours, and their ratio."""
    return [
        row
        for case in (CASES[:1] if settings.quick else CASES)
        for precision in ("fp32", "bf16")
        for row in _compare(*case, precision, settings)
    ]


def _compare(
    name: str, options: dict[str, Any], side: int, num_images: int, precision: str, settings: Settings
) -> list[Row]:
    torch.manual_seed(0)
    model = create_model(name, num_classes=1000, img_size=(side, side), **options).to(settings.device)
    images = torch.randn(num_images, 3, side, side, device=settings.device)
    images = images.contiguous(memory_format=torch.channels_last)

    def step() -> None:
        model.zero_grad()
        with torch.autocast(settings.device.type, torch.bfloat16, enabled=precision == "bf16"):
            outputs = model(images)
            loss = outputs.class_logits.float().square().mean() + outputs.token_logits.float().square().mean()
        loss.backward()

    def step_of_pytorch() -> None:
        with ExitStack() as swaps:
            swaps.enter_context(patch.object(kernels, "_wants_onednn", lambda input: False))
            swaps.enter_context(patch.object(vision_transformer.Attention, "forward", _attention))
            step()

    seconds = interleave({"PyTorch's": step_of_pytorch, "ours": step}, settings, rounds=7)
    shape = "small" if options else "as published"
    title = f"{name} {shape}, {side} px, batch {num_images}, {precision}"
    return [
        *(Row(f"{title}: {way}", [1000 * value for value in values], "ms") for way, values in seconds.items()),
        Row(f"{title}: PyTorch's / ours", ratios(*seconds.values()), "times", "over 1"),
    ]


def _attention(self: vision_transformer.Attention, tokens: Tensor) -> Tensor:
    B, N, D = tokens.shape
    qkv = self.qkv(tokens).view(B, N, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4)
    gathered = F.scaled_dot_product_attention(*qkv.unbind(), scale=self.scale)
    return self.proj(gathered.transpose(1, 2).reshape(B, N, D))
