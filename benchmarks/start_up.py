"""How long the command line takes to answer: whole processes, from start to exit, in turns.

`--help` lists the verbs. `inspect` describes a store of 20,000 labels as large as ImageNet's from its manifest and a
sample, without importing torch. The training run takes one step at batch 100 on the embedded data set, workers,
resolved recipe and checkpoint included, so its first step is done earlier than that.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.label_path import draw_score_map
from benchmarks.measure import Row, Settings, interleave
from benchmarks.synthetic_maps import NUM_CLASSES, TOPK, synthetic_maps
from tokenlabel.data.scenes import write_scenes
from tokenlabel.data.sources import open_images
from tokenlabel.labels.encoding import Encoding, pack
from tokenlabel.labels.manifest import Manifest
from tokenlabel.labels.writer import LabelStoreWriter

NUM_LABELS = 20_000
NUM_SCENES = 1500


def run(settings: Settings) -> list[Row]:
    """Measure each command, the page cache warm."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_labels(folder / "labels")
        _write_embedded(folder, 200 if settings.quick else NUM_SCENES)
        quickly: dict[str, Callable[[], object]] = {
            "tokenlabel --help": partial(_tokenlabel, "--help"),
            f"tokenlabel inspect, {NUM_LABELS:,} labels": partial(_tokenlabel, "inspect", folder / "labels"),
        }
        seconds = interleave(quickly, settings)
        train = partial(_train_one_step, folder, settings)
        name = "tokenlabel train, one step on the embedded data"
        seconds |= interleave({name: train}, settings, rounds=1 if settings.quick else 7)
    aims = ("under 0.3", "under 1", "under 10")
    return [Row(name, values, "s", aim) for (name, values), aim in zip(seconds.items(), aims, strict=True)]


def _tokenlabel(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "tokenlabel", *map(str, arguments)]
    subprocess.run(command, check=True, capture_output=True)


def _train_one_step(folder: Path, settings: Settings) -> None:
    with tempfile.TemporaryDirectory() as runs:
        _tokenlabel(
            *("train", "--recipe", "demo_token_labels", "--out", Path(runs) / "run", "--num-steps=1"),
            *("--data.train", folder / "scenes" / "train", "--data.labels", folder / "scene-labels"),
            *("--device", str(settings.device)),
        )


def _write_labels(folder: Path) -> None:
    records = [pack(score_map, Encoding.COMPACT) for score_map in synthetic_maps(20)]
    with LabelStoreWriter(folder, Manifest(num_classes=NUM_CLASSES, topk=TOPK)) as writer:
        for i in range(NUM_LABELS):
            writer.add_record(f"n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG", records[i % len(records)])


def _write_embedded(folder: Path, num_scenes: int) -> None:
    """Write the embedded data set, and labels for it."""
    write_scenes(folder / "scenes", num_train=num_scenes, num_val=10, seed=0)
    source, rng = open_images(folder / "scenes" / "train"), np.random.default_rng(0)
    records = [pack(draw_score_map(rng, 10, num_named=10), Encoding.COMPACT) for _ in range(10)]
    with LabelStoreWriter(folder / "scene-labels", Manifest(num_classes=10, topk=TOPK)) as writer:
        for i, key in enumerate(source.keys):
            writer.add_record(key, records[i % len(records)])
