"""Images a second from files to normalised batches: our loader and timm's own, one worker process each.

Both read the same JPEGs of 500 x 375 pixels (quality 90, about 55 kB, in the page cache) and return normalised
float32 batches of 224 x 224; each round is one pass over all of them. The last rows need no worker: one core
from PNG files of 48 x 48 (the embedded data set) to augmented uint8 samples.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.dataset import ImageDataset
from timm.data.loader import create_loader

from benchmarks.measure import Row, Settings, interleave, ratios
from tokenlabel.core.batch import normalize_images
from tokenlabel.data.augment import TrainTransform
from tokenlabel.data.batches import TokenLabelDataset, make_loader
from tokenlabel.data.config import AugmentConfig
from tokenlabel.data.samplers import BatchSampler
from tokenlabel.data.scenes import write_scenes
from tokenlabel.data.sources import open_images

BATCH_SIZE = 32
SIZE_PX = (224, 224)
POLICY = "rand-m9-inc1"  # timm's posterize fails with recent Pillows where mstd's noise reaches magnitude 10


def run(settings: Settings) -> list[Row]:
    """Measure crop + flip + normalise, the same with RandAugment, and small images in one process."""
    rows = []
    num_images = BATCH_SIZE * (6 if settings.quick else 16)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for what, policy, aim in (("crop + flip", None, "at least 1.5"), ("with RandAugment", POLICY, "")):
            rows += against_timm(what, policy, num_images, settings, aim=aim)
        write_scenes(folder / "scenes", num_train=400, num_val=10, seed=0)
        seconds = interleave({"scenes": _scenes_pass(folder / "scenes" / "train")}, settings)["scenes"]
        rows.append(Row("48 x 48 PNG, no worker", [400 / s for s in seconds], "images/s", aim="over 2,000"))
    return rows


def against_timm(what: str, policy: str | None, num_images: int, settings: Settings, *, aim: str = "") -> list[Row]:
    """Measure our loader and timm's on the same photographs, one worker process each."""
    with tempfile.TemporaryDirectory() as name:
        write_photos(Path(name), num_images)
        ways = {
            "ours": _our_pass(Path(name), num_images, policy, settings),
            "timm": _timms_pass(Path(name), policy, settings),
        }
        seconds = interleave(ways, settings, rounds=3 if settings.quick else 9)
    rows = [Row(f"{what}, {way}", [num_images / s for s in values], "images/s") for way, values in seconds.items()]
    return [*rows, Row(f"{what}, timm / ours", ratios(seconds["timm"], seconds["ours"]), "x", aim=aim)]


def write_photos(folder: Path, num_images: int) -> None:
    """Write JPEGs of 500 x 375 pixels with the contours and the grain of photographs, in two classes."""
    rng = np.random.default_rng(0)
    for number in range(num_images):
        shapes = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize((500, 375))
        grainy = np.asarray(shapes) + rng.normal(0, 10, (375, 500, 1))
        path = folder / str(number % 2) / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(grainy.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def _our_pass(folder: Path, num_images: int, policy: str | None, settings: Settings) -> Callable[[], None]:
    transform = TrainTransform(AugmentConfig(randaugment=policy), SIZE_PX)
    dataset = TokenLabelDataset(open_images(folder), transform, seed=0)
    num_steps = num_images // BATCH_SIZE
    batches = BatchSampler(num_images=num_images, batch_size=BATCH_SIZE, seed=0, num_steps=num_steps)
    loader = make_loader(dataset, batches, num_workers=1, pin_memory=settings.device.type == "cuda")

    def one_pass() -> None:
        for batch in loader:
            images = batch.to(settings.device).images
            normalize_images(images, mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD)

    return one_pass


def _timms_pass(folder: Path, policy: str | None, settings: Settings) -> Callable[[], None]:
    loader = create_loader(
        ImageDataset(str(folder)),
        input_size=(3, *SIZE_PX),
        batch_size=BATCH_SIZE,
        is_training=True,
        auto_augment=policy,
        color_jitter=0.0,
        interpolation="random",
        num_workers=1,
        pin_memory=settings.device.type == "cuda",
        device=settings.device,
    )

    def one_pass() -> None:
        for _ in loader:
            pass

    return one_pass


def _scenes_pass(folder: Path) -> Callable[[], None]:
    transform = TrainTransform(AugmentConfig(crop_scale=(0.35, 1)), (48, 48))
    dataset = TokenLabelDataset(open_images(folder), transform, seed=0)

    def one_pass() -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        for index in range(len(dataset)):
            dataset[0, index]
        torch.set_num_threads(threads)

    return one_pass
