"""Measure how often aligned labels name the object that a token shows, right and with x and y swapped.

    python -m studies.boxes IMAGES LABELS MASKS [--size PX] [--grid N] [--seeds N]

IMAGES with class folders, their label store, and masks that say where each image's object is (of photographs with
boxes: `studies/photographs.py` writes them). Crops and flips are drawn as in training, the same for both columns; the
range is over seeds of these draws. Nothing is trained.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from studies.defects import DefectiveDataset
from studies.measures import share_right
from tokenlabel.data.augment import TrainTransform
from tokenlabel.data.batches import TokenLabelDataset
from tokenlabel.data.config import AugmentConfig
from tokenlabel.data.sources import open_aloud
from tokenlabel.evaluation.masks import MaskFolder
from tokenlabel.labels.store import LabelStore

CROPS = ((0.25, 1.0), (0.08, 1.0))
NUM_IMAGES = 2_000


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("images", "labels", "masks"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--grid", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    source, store = open_aloud(options.images), LabelStore(options.labels)
    truth = MaskFolder(options.masks, num_classes=len(source.class_names))
    grid = (options.grid, options.grid)
    chosen = np.linspace(0, len(source) - 1, min(len(source), NUM_IMAGES)).astype(int).tolist()
    print("| crops | aligned | x and y swapped |\n|---|---|---|")
    for crop_scale in CROPS:
        transform = TrainTransform(AugmentConfig(crop_scale=crop_scale), (options.size, options.size))
        right: dict[str, list[float]] = {"aligned": [], "swapped": []}
        for seed in range(options.seeds):
            labelled, true = (TokenLabelDataset(source, transform, seed=seed, store=s) for s in (store, truth))
            for name, dataset in (("aligned", labelled), ("swapped", DefectiveDataset(labelled, "swapped"))):
                share = share_right(dataset, true, chosen, grid, num_classes=len(source.class_names))
                assert share is not None, "no mask covers a token"
                right[name].append(share)
        cells = " | ".join(f"{min(v):.1%} to {max(v):.1%}" for v in right.values())
        print(f"| {crop_scale[0]:g}-{crop_scale[1]:g} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
