"""Measure how many planted label errors `tokenlabel inspect` finds: by the teacher's maps, and by heads out of fold.

    python -m studies.suspects IMAGES LABELS BACKBONE [--weights FILE] [--size PX] [--seeds N]

Wrong classes are drawn for 1, 5 and 10% of the images. For each share and way it prints the precision of the first 20
suspects and the average precision of all, mean and half of a 95% interval (Student's t) over seeds of what is planted.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import t

from tokenlabel.data.classes import ids_among
from tokenlabel.data.sources import open_aloud
from tokenlabel.labels.inspection import by_doubt, summarize
from tokenlabel.labels.store import LabelStore
from tokenlabel.runtime.distributed import usable_device
from tokenlabel.teachers.backbone import load_backbone
from tokenlabel.teachers.folds import FoldPredictions, fit_folds
from tokenlabel.teachers.vectors import Vectors

SHARES = (0.01, 0.05, 0.1)
NUM_FIRST = 20


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("images", type=Path)
    parser.add_argument("labels", type=Path)
    parser.add_argument("backbone")
    parser.add_argument("--weights")
    parser.add_argument("--size", type=int)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    source, device = open_aloud(options.images), usable_device(None)
    store = LabelStore(options.labels)
    of_store = ids_among(source.class_names, store.manifest.class_names)
    summaries = [summarize(key, store[key]) for key in source.keys]
    backbone = load_backbone(options.backbone, device, weights=options.weights, size=options.size)
    found, keys = Vectors(backbone=backbone, source=source).of_images(range(len(source)))
    row_of = {key: row for row, key in enumerate(source.keys)}
    found = found[torch.tensor(np.argsort([row_of[key] for key in keys]))]
    print("| planted | way | precision of 20 | average precision |\n|---|---|---|---|")
    names = list(source.class_names)
    for share in SHARES:
        scores: dict[str, list[tuple[float, float]]] = {"maps": [], "out of fold": []}
        for seed in range(options.seeds):
            rng = np.random.default_rng(seed)
            wrong = rng.choice(len(source), round(share * len(source)), replace=False)
            ids = source.class_ids.copy()
            ids[wrong] = (ids[wrong] + rng.integers(1, len(names), len(wrong))) % len(names)
            planted = np.isin(np.arange(len(source)), wrong)
            known = [(summary, of_store[class_id]) for summary, class_id in zip(summaries, ids, strict=True)]
            order = [row_of[summary.key] for summary, _ in by_doubt(known)]
            scores["maps"].append(judged(planted, order))
            probs = fit_folds(found, torch.from_numpy(ids), num_classes=len(names)).numpy()
            predictions = FoldPredictions(list(source.keys), ids, probs, names)
            order = [row_of[suspect.key] for suspect in predictions.suspects(len(source))]
            scores["out of fold"].append(judged(planted, order))
        for way, values in scores.items():
            columns = " | ".join(shown([value[i] for value in values]) for i in range(2))
            print(f"| {share:.0%} | {way} | {columns} |", flush=True)


def judged(planted: NDArray[np.bool_], order: list[int]) -> tuple[float, float]:
    """Return the precision of the first suspects, and the average precision; what is not suspected is found last."""
    hits = planted[order]
    precisions = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    return float(hits[:NUM_FIRST].mean()), float(precisions[hits].sum() / planted.sum())


def shown(values: list[float]) -> str:
    """Return "90.0 ± 1.2", in per cent."""
    half = t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{100 * np.mean(values):.1f} ± {100 * half:.1f}"


if __name__ == "__main__":
    main()
