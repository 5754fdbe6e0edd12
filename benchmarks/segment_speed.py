"""Training LV-ViT-S + UPerNet on crops of 512 x 512, and what its loss costs by hard masks and by soft maps."""

from __future__ import annotations

import resource
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.measure import Row, Settings, interleave, peak_bytes, ratios
from tokenlabel.core.geometry import View
from tokenlabel.core.scores import from_probabilities
from tokenlabel.models.decoders import HeadOutputs
from tokenlabel.models.options import SegmentModelConfig
from tokenlabel.models.segmentation import SegmentationModel, create_segmentation_model
from tokenlabel.segmentation.data import SegmentSample, collate
from tokenlabel.segmentation.recipe import SegmentLossConfig
from tokenlabel.segmentation.task import head_loss, pixel_loss

NUM_CLASSES = 150
WIDTH = 256  # of UPerNet's last features, which lie at a quarter of the crop's size
TOPK = 5
NUM_SHOWN = 30  # classes that the map of an image names


def run(settings: Settings) -> list[Row]:
    """Time whole training steps: on a GPU 16 crops in bf16, on the CPU 2 in fp32; smaller ones with `quick`."""
    on_gpu = settings.device.type == "cuda"
    rows = rows_of("lvvit_s", 16 if on_gpu else 2, 256 if settings.quick else 512, settings)
    for num_classes, num_images in ((11, 16), (150, 16), (1000, 2)):
        rows += loss_rows(num_classes, 2 if settings.quick else num_images, settings)
    return rows


def loss_rows(num_classes: int, num_images: int, settings: Settings) -> list[Row]:
    """Time the last convolution of a head and its loss, forward and backward, by hard masks and by soft maps.

    Both from the same features, channels last in memory as those of the networks are: 128 x 128 locations of crops of
    512 x 512 px, or 64 x 64 of 256 x 256 px with `quick`. The maps have as many cells as there are locations.
    """
    side_px = 256 if settings.quick else 512
    generator = torch.Generator().manual_seed(0)
    shape = (num_images, WIDTH, side_px // 4, side_px // 4)
    features = torch.randn(shape, generator=generator).to(settings.device).to(memory_format=torch.channels_last)
    features.requires_grad_()
    classifier = nn.Conv2d(WIDTH, num_classes, 1).to(settings.device)
    batches = {
        name: collate(
            [sample_of(seed, num_classes, side_px, soft=name == "soft maps") for seed in range(num_images)]
        ).to(settings.device)
        for name in ("hard masks", "soft maps")
    }

    def step_by(name: str) -> Callable[[], None]:
        def step() -> None:
            outputs = HeadOutputs(features, classifier)
            head_loss(outputs, batches[name], SegmentLossConfig()).backward()
            features.grad = None
            classifier.zero_grad()

        return step

    ways = {name: step_by(name) for name in batches}
    seconds = interleave(ways, settings, rounds=3)
    about = f"{num_classes:,} classes, {num_images} crops"
    rows = []
    for name, way in ways.items():
        rows.append(Row(f"{about}, loss of {name}", seconds[name], "s"))
        rows.append(Row(f"{about}, peak memory of {name}", [peak_bytes(way, settings) / 2**30], "GiB"))
    rows.append(Row(f"{about}, hard / soft", ratios(seconds["hard masks"], seconds["soft maps"]), ""))
    return rows


def sample_of(seed: int, num_classes: int, side_px: int, *, soft: bool) -> SegmentSample:
    """Return a black image with regions of at most 30 classes: as the soft map of a teacher, or as its hard mask."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.full((1, num_classes, 8, 8), -20.0)
    shown = torch.randperm(num_classes, generator=generator)[:NUM_SHOWN]
    coarse[:, shown] = 4 * torch.randn(1, len(shown), 8, 8, generator=generator)
    side = side_px // 4
    logits = F.interpolate(coarse, size=(side, side), mode="bilinear", align_corners=False)[0]
    mask = logits.argmax(dim=0).repeat_interleave(4, dim=0).repeat_interleave(4, dim=1).to(torch.int16)
    probs = logits.softmax(dim=0).permute(1, 2, 0).numpy().astype(np.float32)
    return SegmentSample(
        image=torch.zeros(3, side_px, side_px, dtype=torch.uint8),
        mask=mask,
        key=f"{seed}.jpg",
        view=View.identity(),
        score_map=from_probabilities(probs, topk=min(TOPK, num_classes)) if soft else None,
    )


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
        Row(f"peak memory, {title}", [peak_gib(settings.device)], "GiB", aim="under 24" if not on_gpu else ""),
    ]


def make_step(model: SegmentationModel, batch_size: int, *, side_px: int, device: torch.device) -> Callable[[], None]:
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
