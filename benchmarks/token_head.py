"""The token head and its loss: fused, block by block, against the linear layer, then the loss of its logits.

Both forward and backward, down to the gradients of the features, the weight and the bias. Widths and counts
are LV-ViT-S's at 224 px, batch 64: 12,544 tokens of width 384.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.measure import Row, Settings, interleave, peak_bytes, ratios
from tokenlabel.core.losses import linear_cross_entropy, sparse_cross_entropy
from tokenlabel.core.targets import TokenTargets

NUM_TOKENS = 196
WIDTH = 384
PALETTE = 60

Loss = Callable[[Tensor, nn.Linear, TokenTargets], Tensor]


def run(settings: Settings) -> list[Row]:
    """Measure time and peak memory at 1,000 classes, and peak memory at 21,841."""
    num_images = 8 if settings.quick else 64
    rows = []
    for precision in ("float32", "bfloat16"):
        name = f"{precision}, 1,000 classes, {num_images * NUM_TOKENS:,} tokens"
        ways = make_ways(num_images, 1000, precision, settings)
        seconds = interleave(ways, settings)
        rows += [Row(f"{name}: {way}", [1e3 * s for s in values], "ms") for way, values in seconds.items()]
        speed = ratios(seconds["unfused"], seconds["fused"])
        rows.append(Row(f"{name}: unfused / fused", speed, "x", "not slower"))
        rows += _peaks(name, ways, settings, aim="")
    for precision in ("float32", "bfloat16"):
        name = f"{precision}, 21,841 classes, {num_images * NUM_TOKENS:,} tokens"
        aim = "" if settings.quick else "at least 10"
        rows += _peaks(name, make_ways(num_images, 21_841, precision, settings), settings, aim=aim)
    return rows


def _peaks(name: str, ways: dict[str, Callable[[], object]], settings: Settings, *, aim: str) -> list[Row]:
    mib = {way: peak_bytes(function, settings) / 2**20 for way, function in ways.items()}
    rows = [Row(f"{name}: {way} peak", [value], "MiB") for way, value in mib.items()]
    return [*rows, Row(f"{name}: unfused / fused peak", [mib["unfused"] / mib["fused"]], "x", aim)]


def make_ways(num_images: int, num_classes: int, precision: str, settings: Settings) -> dict[str, Callable[[], object]]:
    """Return the fused and the unfused form on the same tokens, forward and backward."""
    generator, device = torch.Generator().manual_seed(0), settings.device
    tokens = torch.randn(num_images, NUM_TOKENS, WIDTH, generator=generator).to(device).requires_grad_()
    head = nn.Linear(WIDTH, num_classes).to(device)
    excess = torch.rand(num_images, NUM_TOKENS, PALETTE, generator=generator).to(device)
    excess = 0.9 * excess / excess.sum(dim=2, keepdim=True)
    floor = torch.full((num_images, NUM_TOKENS), 0.1 / num_classes, device=device)
    classes = torch.randint(num_classes, (num_images, PALETTE), generator=generator).to(device)
    targets = TokenTargets(classes, excess, floor, torch.ones_like(floor))

    def step(loss: Loss) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            value = loss(tokens, head, targets)
        torch.autograd.grad(value, [tokens, *head.parameters()])

    def unfused(tokens: Tensor, head: nn.Linear, targets: TokenTargets) -> Tensor:
        return sparse_cross_entropy(head(tokens), targets).mean()

    return {"unfused": lambda: step(unfused), "fused": lambda: step(linear_cross_entropy)}
