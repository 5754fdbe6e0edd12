"""Training LV-ViT-S + UPerNet on crops of 512 x 512: images a second and memory."""

from __future__ import annotations

import resource
from collections.abc import Callable

import torch

from benchmarks.measure import Row, Settings, interleave
from tokenlabel.models.segmentation import SegmentationModel, SegmentModelConfig, create_segmentation_model
from tokenlabel.segmentation.task import pixel_loss

NUM_CLASSES = 150


def run(settings: Settings) -> list[Row]:
    """Time whole training steps: on a GPU 16 crops in bf16, on the CPU 2 in fp32; smaller ones with `quick`."""
    on_gpu = settings.device.type == "cuda"
    return rows_of("lvvit_s", 16 if on_gpu else 2, 256 if settings.quick else 512, settings)


def rows_of(name: str, batch_size: int, side_px: int, settings: Settings) -> list[Row]:
    """Time whole training steps of one backbone on crops of one size."""
    on_gpu = settings.device.type == "cuda"
    precision = "bf16" if on_gpu else "fp32"
    config = SegmentModelConfig(name=name, img_size=(side_px, side_px), options={"drop_path": 0.1})
    model = create_segmentation_model(config, num_classes=NUM_CLASSES).to(settings.device).train()
    step = make_step(model, batch_size, side_px=side_px, device=settings.device)
    title = f"{batch_size} crops of {side_px} x {side_px}, {precision}"
    seconds = interleave({title: step}, settings, rounds=20 if on_gpu else 1 if settings.quick else 3)[title]
    return [
        Row(f"training, {title}", [batch_size / s for s in seconds], "images/s"),
        Row(
            f"peak memory, {title}", [peak_gib(settings.device)], "GiB", aim="under 24" if not on_gpu else ""
        ),
    ]


def make_step(
    model: SegmentationModel, batch_size: int, *, side_px: int, device: torch.device
) -> Callable[[], None]:
    """Return a whole step of training on random pixels and masks: forward, both losses, backward, AdamW."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, 3, side_px, side_px, generator=generator).to(device)
    shape = (batch_size, side_px, side_px)
    masks = torch.randint(0, NUM_CLASSES, shape, generator=generator, dtype=torch.uint8).to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=6e-5)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            outputs = model(images)
        assert outputs.auxiliary is not None
        (pixel_loss(outputs.logits, masks) + 0.4 * pixel_loss(outputs.auxiliary, masks)).backward()
        optimizer.step()

    return step


def peak_gib(device: torch.device) -> float:
    """Return the most memory that was in use: of the GPU's, or what the process held of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB
