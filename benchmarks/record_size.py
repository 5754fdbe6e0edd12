"""What a score map takes, and what is lost by it: each tolerance of compact records, and raw ones.

On synthetic maps, as they are and with their logits times 4; or on your teacher's own:

    python -m benchmarks.record_size FILE.safetensors

where `logits` [images, H, W, C] are those of central squares. What is lost is the total variation between a cell's
distribution over all classes and that of its record, above what the exact top 5 loses.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file

from benchmarks.measure import Row, Settings
from benchmarks.synthetic_maps import TOPK, synthetic_probabilities
from tokenlabel.core.scores import ScoreMap, from_probabilities
from tokenlabel.labels.encoding import DEFAULT_TOLERANCE, Encoding, pack, unpack
from tokenlabel.labels.manifest import Manifest
from tokenlabel.labels.store import LabelStore
from tokenlabel.labels.writer import LabelStoreWriter

TOLERANCES = (0, 0.002, 0.004, 0.006, DEFAULT_TOLERANCE, 0.01, 0.015, 0.02, 0.03)
SHARPNESS = (1, 4)
PUBLISHED_BYTES = 8041


def run(settings: Settings) -> list[Row]:
    """Measure records of synthetic maps."""
    rows = []
    for sharpness in SHARPNESS:
        rng = np.random.default_rng(0)
        probs = [synthetic_probabilities(rng, sharpness=sharpness) for _ in range(16 if settings.quick else 100)]
        rows += _rows(f"logits x {sharpness}", probs)
    return rows


def _rows(title: str, probs: Sequence[NDArray[np.float32]]) -> list[Row]:
    """Return what the maps are like, and size, loss and speed of their records."""
    maps = [replace(from_probabilities(p, TOPK), empty_is_even=True) for p in probs]
    exact = float(np.mean([_total_variation(m, p) for m, p in zip(maps, probs, strict=True)]))
    entries = np.concatenate([m.probs.ravel() for m in maps])
    rows = [
        Row(f"{title}: distinct classes a map", [len(m.palette) for m in maps], ""),
        Row(f"{title}: mean probability of the best class", [float(p.max(axis=2).mean()) for p in probs], ""),
        Row(f"{title}: mean of what the top {TOPK} hold", [float(m.probs.sum(axis=2).mean()) for m in maps], ""),
        *(
            Row(f"{title}: entries of at least {least}", [float((entries >= least).mean())], "")
            for least in (0.003, 0.008, 0.03, 0.1, 0.3)
        ),
        Row(f"{title}: total variation of the exact top {TOPK}", [exact], ""),
    ]
    rows += _of_records(f"{title}, raw", maps, probs, exact, Encoding.RAW, 0.0)
    for tolerance in TOLERANCES:
        rows += _of_records(f"{title}, tolerance {tolerance}", maps, probs, exact, Encoding.COMPACT, tolerance)
    return rows


def _of_records(
    title: str,
    maps: Sequence[ScoreMap],
    probs: Sequence[NDArray[np.float32]],
    exact: float,
    encoding: Encoding,
    tolerance: float,
) -> list[Row]:
    records, pack_ms, unpack_us, lost = [], [], [], []
    for score_map, true in zip(maps, probs, strict=True):
        started = time.perf_counter()
        records.append(pack(score_map, encoding, tolerance=tolerance))
        pack_ms.append(1e3 * (time.perf_counter() - started))
        started = time.perf_counter()
        reads = [unpack(records[-1], num_classes=true.shape[2], empty_is_even=True) for _ in range(10)]
        unpack_us.append(1e5 * (time.perf_counter() - started))
        lost.append(_total_variation(reads[0], true))
    at_default = tolerance == DEFAULT_TOLERANCE
    return [
        Row(
            f"{title}: bytes an image, index and key included",
            [_bytes_each(records, encoding, probs[0].shape[2])],
            "B",
            f"at most {PUBLISHED_BYTES // (8 if 'x 1' in title else 5)}" if at_default else "",
        ),
        Row(f"{title}: total variation added", [float(np.mean(lost)) - exact], "", "at most 0.01" * at_default),
        Row(f"{title}: pack", pack_ms, "ms"),
        Row(f"{title}: unpack", unpack_us, "µs", "at most 60" * at_default),
    ]


def _bytes_each(records: Sequence[bytes], encoding: Encoding, num_classes: int) -> float:
    manifest = Manifest(num_classes=num_classes, topk=TOPK, encoding=encoding)
    with tempfile.TemporaryDirectory() as folder:
        with LabelStoreWriter(folder, manifest) as writer:
            for i, record in enumerate(records):
                writer.add_record(f"train/n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG", record)
        return LabelStore(folder).num_bytes() / len(records)


def _total_variation(score_map: ScoreMap, true: NDArray[np.float32]) -> float:
    """Return half the sum of differences to distributions [H, W, C], the mean over cells."""
    return float(0.5 * np.abs(score_map.dense() - true).sum(axis=2).mean())


def main(path: Path) -> None:
    """Measure records of the maps in a file."""
    from benchmarks.__main__ import table  # which imports this module

    logits = load_file(path)["logits"]
    for sharpness in SHARPNESS:
        probs = [torch.from_numpy(sharpness * of.astype(np.float32)).softmax(dim=2).numpy() for of in logits]
        print(table(path.name, _rows(f"logits x {sharpness}", probs)), end="\n\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
