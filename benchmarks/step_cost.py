"""What token labels add to a whole training step, and to the loading of a sample.

The step is the engine's own, from a batch of uint8 images to moved weights and their average: LV-ViT at 224 px,
MixToken in each step, the published optimizer. With token labels it also aligns, smooths and mixes the targets
and runs the token head and its loss. Both ways have the same weights, images and mixes, and take turns. What is
added also runs alone, so that it can be seen what a difference of two long times says: its share is arithmetic of
the token head (N x D x C, forward and twice backward) and little else.

A sample is a 500 x 375 JPEG, decoded and augmented in one process; with token labels its score map is read from
a store of each encoding, too, and the maps of a batch are stacked; that runs alone, too.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.data_speed import write_photos
from benchmarks.label_path import draw_boxes, draw_score_map
from benchmarks.measure import Row, Settings, interleave, ratios
from benchmarks.synthetic_maps import NUM_CLASSES, TOPK, synthetic_maps
from tokenlabel.classification.task import ClassifierTask
from tokenlabel.core.batch import Batch, collate_score_maps
from tokenlabel.core.config import LossConfig, MixConfig, Mixing
from tokenlabel.core.geometry import View, stack_views
from tokenlabel.core.losses import linear_cross_entropy
from tokenlabel.core.scores import ScoreMap
from tokenlabel.core.step import Supervision, make_targets
from tokenlabel.data.augment import TrainTransform
from tokenlabel.data.batches import TokenLabelDataset, collate
from tokenlabel.data.config import AugmentConfig
from tokenlabel.data.sources import open_images
from tokenlabel.labels.encoding import Encoding
from tokenlabel.labels.manifest import Manifest
from tokenlabel.labels.store import LabelStore
from tokenlabel.labels.writer import LabelStoreWriter
from tokenlabel.models import create_model
from tokenlabel.runtime.distributed import Ranks, autocast
from tokenlabel.runtime.runlog import Stopwatch
from tokenlabel.training.recipe import DataConfig, ModelConfig, OptimConfig, Recipe
from tokenlabel.training.trainer import Trainer, prepare, train_step

SIZE_PX = (224, 224)
POLICY = "rand-m9-inc1"
AIMS = {"lvvit_t": "at most 5", "lvvit_s": "at most 3"}


@dataclass(frozen=True, slots=True)
class Case:
    """One model, number of classes and precision."""

    model: str
    num_classes: int
    precision: str
    num_images: int

    @property
    def aim(self) -> str:
        """What the extra time should be; with 21,841 classes the head's arithmetic alone is more."""
        return AIMS[self.model] if self.num_classes <= 1000 else ""


def run(settings: Settings) -> list[Row]:
    """Measure the extra time of steps, then of samples."""
    num_images = 128 if settings.device.type == "cuda" else 8 if settings.quick else 16
    if settings.quick:
        cases = [Case("lvvit_t", 1000, "bf16", num_images)]
    else:
        every = itertools.product(AIMS, ("bf16", "fp32"), (10, 1000, 21_841))
        cases = [Case(model, count, precision, num_images) for model, precision, count in every]
    steps = [row for case in cases for row in step_rows(case, settings)]
    return steps + loader_rows(settings)


def step_rows(case: Case, settings: Settings) -> list[Row]:
    """Return the times of a step with class labels only and with token labels, and of what the latter add."""
    batch = _batch(case, settings)
    trainings = {"class labels": _training(case, settings, 0.0), "token labels": _training(case, settings, 0.5)}
    ways: dict[str, Callable[[], object]] = {name: _stepper(trainer, batch) for name, trainer in trainings.items()}
    ways["added"] = _added(trainings["token labels"], batch)
    seconds = interleave(ways, settings, rounds=5 if settings.quick else 11)
    title = f"{case.model}, {case.precision}, {case.num_classes:,} classes"
    rows = [Row(f"{title}: {name}", [1e3 * s for s in values], "ms") for name, values in seconds.items()]
    without = seconds["class labels"]
    extra = [100 * (ratio - 1) for ratio in ratios(seconds["token labels"], without)]
    alone = [100 * ratio for ratio in ratios(seconds["added"], without)]
    return [
        *rows,
        Row(f"{title}: extra time of a step", extra, "%", case.aim),
        Row(f"{title}: what is added, alone", alone, "%", case.aim),
    ]


def loader_rows(settings: Settings) -> list[Row]:
    """Return the times of samples without and with score maps of each encoding."""
    rows, num_images = [], 32 if settings.quick else 96
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_photos(folder / "photos", num_images)
        source = open_images(folder / "photos")
        maps = list(synthetic_maps(16))
        stores = {encoding: _write_store(folder / encoding, source.keys, maps, encoding) for encoding in Encoding}
        for what, policy in (("crop + flip", None), ("RandAugment", POLICY)):
            transform = TrainTransform(AugmentConfig(randaugment=policy), SIZE_PX)
            datasets = {"no labels": TokenLabelDataset(source, transform, seed=0)}
            for encoding, store in stores.items():
                datasets[encoding] = TokenLabelDataset(source, transform, seed=0, store=store)
            ways = {way: partial(_load, dataset) for way, dataset in datasets.items()}
            ways |= {f"{e}, label alone": partial(_read, store, source.keys) for e, store in stores.items()}
            seconds = interleave(ways, settings, rounds=5 if settings.quick else 15)
            for way, values in seconds.items():
                rows.append(Row(f"sample, {what}: {way}", [1e6 * s / num_images for s in values], "µs"))
            for encoding in stores:
                without = seconds["no labels"]
                extra = [100 * (ratio - 1) for ratio in ratios(seconds[encoding], without)]
                alone = [100 * ratio for ratio in ratios(seconds[f"{encoding}, label alone"], without)]
                rows.append(Row(f"sample, {what}: extra time, {encoding}", extra, "%", "at most 5"))
                rows.append(Row(f"sample, {what}: label alone, {encoding}", alone, "%", "at most 5"))
    return rows


def _training(case: Case, settings: Settings, beta: float) -> Trainer:
    """Return everything that a step needs, by the published recipe; `beta` 0 for class labels only."""
    recipe = Recipe(
        data=DataConfig(train="(in memory)"),
        model=ModelConfig(name=case.model, img_size=SIZE_PX),
        optim=OptimConfig(lr=1.6e-3, lr_batch_size=1024),
        mix=MixConfig(kind=Mixing.MIXTOKEN),
        loss=LossConfig(beta=beta),
        epochs=1,
        batch_size=case.num_images,
        precision=case.precision,  # pyright: ignore[reportArgumentType]
        compile="inductor" if settings.device.type == "cuda" else "no",
    )
    torch.manual_seed(0)
    model = create_model(case.model, num_classes=case.num_classes, img_size=SIZE_PX).to(settings.device)
    model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    source = Unread(case.num_images, case.num_classes)
    task = ClassifierTask(
        recipe=recipe,
        model=model,
        train_set=TokenLabelDataset(source, TrainTransform(recipe.augment, SIZE_PX), seed=0),
        val_set=None,
        supervision=Supervision(loss=recipe.loss, stored=beta > 0),
        counts=f"{case.num_images:,} images",
        device=settings.device,
    )
    return prepare(task, Ranks())


@dataclass(frozen=True)
class Unread:
    """An image source of so many images and classes, for tasks whose batches are given."""

    num_images: int
    num_classes: int

    @property
    def keys(self) -> Sequence[str]:
        """One number an image."""
        return [str(i) for i in range(self.num_images)]

    @property
    def class_ids(self) -> NDArray[np.int64]:
        """All of class 0."""
        return np.zeros(self.num_images, np.int64)

    @property
    def class_names(self) -> list[str]:
        """One number a class."""
        return [str(i) for i in range(self.num_classes)]

    def read(self, index: int) -> bytes:
        """Fail: there is nothing to read."""
        raise IndexError(index)

    def __len__(self) -> int:
        """Return how many images there are."""
        return self.num_images


def _stepper(trainer: Trainer, batch: Batch) -> Callable[[], object]:
    return partial(train_step, trainer, itertools.repeat(batch), 0, Stopwatch())


def _added(trainer: Trainer, batch: Batch) -> Callable[[], None]:
    """Return a function that makes targets, and runs the token head with its loss, on random features."""
    task = trainer.task
    assert isinstance(task, ClassifierTask)
    head = task.model.token_head
    assert isinstance(head, torch.nn.Linear)
    num_tokens = task.grid[0] * task.grid[1]
    dtype = torch.bfloat16 if task.recipe.precision == "bf16" else torch.float32
    tokens = torch.randn(len(batch.images), num_tokens, head.in_features, device=task.device)
    tokens = tokens.to(dtype).requires_grad_()

    def added() -> None:
        targets = make_targets(batch, task.supervision, task.grid).tokens
        assert targets is not None
        with autocast(task.device, task.recipe.precision):
            loss = linear_cross_entropy(tokens, head, targets)
        torch.autograd.grad(loss, [tokens, *head.parameters()])

    return added


def _batch(case: Case, settings: Settings) -> Batch:
    rng = np.random.default_rng(0)
    shape = (case.num_images, *SIZE_PX, 3)
    pixels = torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8)).permute(0, 3, 1, 2)
    score_maps = [draw_score_map(rng, case.num_classes, num_named=40) for _ in range(case.num_images)]
    views = stack_views([View.crop(box) for box in draw_boxes(rng, case.num_images)])
    batch = Batch(
        images=pixels,
        class_ids=torch.from_numpy(rng.integers(0, case.num_classes, case.num_images)),
        num_classes=case.num_classes,
        views=torch.from_numpy(views),
        score_maps=collate_score_maps(score_maps),
        keys=[str(i) for i in range(case.num_images)],
        has_class=torch.ones(case.num_images, dtype=torch.bool),
    )
    return batch.to(settings.device)


def _write_store(folder: Path, keys: Sequence[str], maps: Sequence[ScoreMap], encoding: Encoding) -> LabelStore:
    manifest = Manifest(num_classes=NUM_CLASSES, topk=TOPK, encoding=encoding)
    with LabelStoreWriter(folder, manifest) as writer:
        for i, key in enumerate(keys):
            writer.add(key, maps[i % len(maps)])
    return LabelStore(folder)


def _read(store: LabelStore, keys: Sequence[str]) -> None:
    collate_score_maps([store[key] for key in keys])


def _load(dataset: TokenLabelDataset) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker process
    collate(dataset.__getitems__([(0, index) for index in range(len(dataset))]))  # as the loader does
    torch.set_num_threads(threads)
