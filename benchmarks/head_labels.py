"""How many labelled images a head needs: `python -m benchmarks.head_labels SCENES RUN`.

SCENES, RUN: `scenes` and `teacher` of `tokenlabel demo`. Fits heads from the labels of 5, 20 and all training images of
each class on the run's network without its classifier, five times on other images where some are left out. Each labels
the training images; printed is how often its maps agree with the true masks, beside those of the run's own classifier.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import numpy as np

from tokenlabel import AnnotateConfig, FitConfig, LabelStore, annotate, fit_head, open_images
from tokenlabel.evaluation.masks import mask_agreement


def main() -> None:
    """Print a line for each number of images a class."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.head_labels", description=__doc__)
    parser.add_argument("scenes", type=Path)
    parser.add_argument("run", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        own = _agreement(str(options.run), options.scenes, Path(name) / "own")
        print(f"trained classifier: {own:.1%}", flush=True)
        for count in (5, 20, None):
            found = [
                _from_few(options, count, seed, Path(name) / f"{count}-{seed}") for seed in range(5 if count else 1)
            ]
            mean, spread = statistics.mean(found), max(found) - min(found)
            print(
                f"{count or 'all'} images a class: {mean:.1%} (range {spread:.1%}), {mean / own:.1%} of it", flush=True
            )


def _from_few(options: argparse.Namespace, count: int | None, seed: int, folder: Path) -> float:
    folder.mkdir()
    train = (options.scenes / "train").absolute()
    source, rng = open_images(train), np.random.default_rng(seed)
    chosen = [
        source.keys[int(index)]
        for class_id in range(len(source.class_names))
        for index in rng.permutation(np.flatnonzero(source.class_ids == class_id))[:count]
    ]
    lines = [f"{train / key}\t{key.split('/')[0]}\n" for key in chosen]
    (folder / "few.txt").write_text("".join(lines))
    config = FitConfig(backbone=str(options.run), from_="labels", size=64)
    fit_head(folder / "few.txt", folder / "head.safetensors", config)
    return _agreement(str(folder / "head.safetensors"), options.scenes, folder / "labels")


def _agreement(teacher: str, scenes: Path, labels: Path) -> float:
    annotate(scenes / "train", labels, AnnotateConfig(teacher=teacher, size=64))
    return mask_agreement(LabelStore(labels), scenes / "masks" / "train")


if __name__ == "__main__":
    main()
