"""LV-ViT forward + backward against a plain reading of the published architecture, in turns.

The plain form: explicit softmax attention, everything in PyTorch's default layout, nothing compiled. On a GPU a step
also updates the weights: the plain form by AdamW as it comes, ours by its fused form.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import Row, Settings, interleave, ratios
from tokenlabel.models import LVViT, LVViTConfig, TimmAdapter
from tokenlabel.models.lvvit import LVVIT_CONFIGS

NUM_CLASSES = 1000
SIZE_PX = (224, 224)
PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}

# How many times the plain form's images/s ours should reach.
CPU_AIMS = {"bf16": "at least 1.1", "fp32": "at least 1.2"}
GPU_AIMS = {"bf16": "at least 2", "fp32": ""}

# What the profiler's operators belong to, the first that fits; all others are "the rest".
KINDS = {
    "attention": ("aten::bmm", "aten::baddbmm", "_scaled_dot_product", "_softmax"),
    "linear maps": ("aten::mm", "aten::addmm", "_linear_pointwise"),
    "stem convolutions": ("convolution",),
    "norms": ("native_layer_norm", "native_batch_norm"),
}


@dataclass(frozen=True, slots=True)
class Step:
    """One way to train: a model, its input and how a step runs."""

    model: nn.Module
    images: Tensor
    precision: torch.dtype
    optimizer: torch.optim.Optimizer | None

    def __call__(self) -> None:
        """Run it once."""
        self.model.zero_grad(set_to_none=True)
        mixed = self.precision is not torch.float32
        with torch.autocast(self.images.device.type, dtype=self.precision if mixed else None, enabled=mixed):
            outputs = self.model(self.images)
            loss = outputs[0].float().square().mean() + outputs[1].float().square().mean()
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()


def run(settings: Settings) -> list[Row]:
    """Measure images/s of both forms, their ratio, and the share of the device's matrix product rate."""
    names = ("lvvit_t",) if settings.quick else ("lvvit_t", "lvvit_s")
    precisions = ("bf16",) if settings.quick else PRECISIONS
    num_images = 256 if settings.device.type == "cuda" else 8
    return [row for name in names for precision in precisions for row in compare(name, precision, num_images, settings)]


def compare(name: str, precision: str, num_images: int, settings: Settings) -> list[Row]:
    """Measure one model at one precision and batch size."""
    on_gpu = settings.device.type == "cuda"
    steps = _steps(LVVIT_CONFIGS[name], PRECISIONS[precision], num_images, settings)
    with FlopCounterMode(display=False) as counter:
        steps["plain"]()
    operations = counter.get_total_flops()
    rate = _product_rate(PRECISIONS[precision], settings)
    seconds = interleave(steps, settings, rounds=3 if settings.quick else 9)
    title, aims = f"{name}, {precision}, batch {num_images}", GPU_AIMS if on_gpu else CPU_AIMS
    rows = [Row(f"{title}: matrix products alone", [rate / 1e12], "Tflop/s")]
    for way, values in seconds.items():
        rows.append(Row(f"{title}: {way}", [num_images / value for value in values], "images/s"))
        shares = [100 * operations / value / rate for value in values]
        rows.append(Row(f"{title}: {way}, of the product rate", shares, "%"))
        if way != "plain":
            rows.append(Row(f"{title}: {way} / plain", ratios(seconds["plain"], values), "times", aims[precision]))
    return rows + [
        Row(f"{title}: {way}, time in {kind}", [share], "%")
        for way in ("plain", "ours")
        for kind, share in _shares(steps[way], on_gpu=on_gpu).items()
    ]


def _steps(
    config: LVViTConfig, precision: torch.dtype, num_images: int, settings: Settings
) -> dict[str, Callable[[], None]]:
    """Return the plain form, ours, and (unless in a hurry) ours compiled, on the same images."""
    torch.manual_seed(0)
    config, device = replace(config, drop_path=0.0), settings.device
    plain = PlainLVViT(config).to(device)
    ours = Ours(config).to(device).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    images = torch.randn(num_images, 3, *SIZE_PX, device=device)
    fast = images.contiguous(memory_format=torch.channels_last)
    adamw, fused = None, None
    if device.type == "cuda":
        adamw = torch.optim.AdamW(plain.parameters())
        fused = torch.optim.AdamW(ours.parameters(), fused=True)
    steps: dict[str, Callable[[], None]] = {
        "plain": Step(plain, images, precision, adamw),
        "ours": Step(ours, fast, precision, fused),
    }
    if not settings.quick:
        compiled = torch.compile(ours)
        assert isinstance(compiled, nn.Module)
        steps["ours, compiled"] = Step(compiled, fast, precision, fused)
    return steps


def _product_rate(dtype: torch.dtype, settings: Settings) -> float:
    """Return the operations/s of a large matrix product, by whichever of PyTorch's libraries is faster at it."""
    side = 8192 if settings.device.type == "cuda" else 2048
    left, right = torch.randn(2, side, side, device=settings.device, dtype=dtype)
    planes = left.view(16, side // 16, 1, side).permute(0, 3, 1, 2)  # rows as places, channels last
    ways = {"product": lambda: left @ right.T, "convolution": lambda: F.conv2d(planes, right[:, :, None, None])}
    return 2 * side**3 / min(min(seconds) for seconds in interleave(ways, settings, rounds=9).values())


def _shares(step: Callable[[], None], *, on_gpu: bool) -> dict[str, float]:
    """Return the percentage of a step's time by kind of operator, over three steps."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with profile(activities=activities) as profiler:
        for _ in range(3):
            step()
    times: Counter[str] = Counter()
    for event in profiler.key_averages():
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        times[_kind(event.key)] += spent
    return {kind: 100 * spent / sum(times.values()) for kind, spent in times.most_common()}


def _kind(operator: str) -> str:
    return next((kind for kind, parts in KINDS.items() if any(part in operator for part in parts)), "the rest")


class Ours(nn.Module):
    """Our LV-ViT, its outputs unpacked."""

    def __init__(self, config: LVViTConfig) -> None:
        super().__init__()
        self.model = TimmAdapter(
            LVViT(config, num_classes=NUM_CLASSES, img_size=SIZE_PX),
            name="lvvit",
            num_classes=NUM_CLASSES,
            img_size=SIZE_PX,
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return class logits and token logits."""
        outputs = self.model(images)
        return outputs.class_logits, outputs.token_logits


class PlainLVViT(nn.Module):
    """LV-ViT as one would write it down from the paper."""

    def __init__(self, config: LVViTConfig) -> None:
        super().__init__()
        stem, width = config.stem_width, config.width
        self.stem = nn.Sequential(
            *(nn.Conv2d(3, stem, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(stem), nn.ReLU(inplace=True)),
            *(nn.Conv2d(stem, stem, 3, padding=1, bias=False), nn.BatchNorm2d(stem), nn.ReLU(inplace=True)),
            *(nn.Conv2d(stem, stem, 3, padding=1, bias=False), nn.BatchNorm2d(stem), nn.ReLU(inplace=True)),
            nn.Conv2d(stem, width, 8, stride=8),
        )
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, 1 + (SIZE_PX[0] // 16) * (SIZE_PX[1] // 16), width))
        self.blocks = nn.Sequential(*(PlainBlock(config) for _ in range(config.depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, NUM_CLASSES)
        self.token_head = nn.Linear(width, NUM_CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return class logits and token logits."""
        patches = self.stem(images).flatten(2).transpose(1, 2)  # [B, N, D]
        tokens = torch.cat([self.class_token.expand(len(images), -1, -1), patches], dim=1) + self.positions
        tokens = self.norm(self.blocks(tokens))
        return self.head(tokens[:, 0]), self.token_head(tokens[:, 1:])


class PlainBlock(nn.Module):
    """Attention and MLP with scaled residuals."""

    def __init__(self, config: LVViTConfig) -> None:
        super().__init__()
        width, hidden = config.width, int(config.width * config.mlp_ratio)
        self.divisor, self.num_heads = config.residual_divisor, config.num_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the tokens after this block."""
        tokens = tokens + self._attention(self.norm1(tokens)) / self.divisor
        return tokens + self.mlp(self.norm2(tokens)) / self.divisor

    def _attention(self, tokens: Tensor) -> Tensor:
        B, N, D = tokens.shape
        qkv = self.qkv(tokens).reshape(B, N, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4)
        queries, keys, values = qkv.unbind()
        scores = (queries @ keys.transpose(-2, -1)) * (D // self.num_heads) ** -0.5
        return self.proj((scores.softmax(dim=-1) @ values).transpose(1, 2).reshape(B, N, D))
