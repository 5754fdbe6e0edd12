"""What token labels are worth on the embedded data: the demo's matched comparison over several seeds.

    python -m benchmarks.study --out runs/study --seeds 5 --jobs 2

One teacher labels the scenes once; then, for each seed, the same recipe is trained with class labels only, with the
teacher's token labels, and with the true masks as token labels. Nothing else differs, and a seed gives all three the
same initial weights, order of images, crops and mixes. Every run is an ordinary `tokenlabel train`, so the command
continues where it was stopped. Writes OUT/study.md and OUT/study.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch

from tokenlabel.alignment import align
from tokenlabel.augment import TrainTransform
from tokenlabel.data import TokenLabelDataset, collate
from tokenlabel.evaluate import MaskFolder, agreement
from tokenlabel.configuration import read_config
from tokenlabel.recipe import Recipe
from tokenlabel.runlog import read_metrics
from tokenlabel.scenes import write_scenes
from tokenlabel.sources import open_images
from tokenlabel.store import LabelStore

ROWS = {
    "class": "class labels only",
    "token": "token labels of the teacher",
    "truth": "token labels from the true masks",
}
# The 0.975 quantile of Student's t, by degrees of freedom: half widths of 95% intervals over few seeds.
STUDENT_T = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}


def main() -> None:
    """Run what is missing of the study and write its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rows", nargs="+", choices=[*ROWS], default=[*ROWS], help="what to compare")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    options = parser.parse_args()
    out: Path = options.out
    write_scenes(out / "scenes", num_train=1500, num_val=1000, seed=0)
    prepare_labels(out)
    with ThreadPoolExecutor(options.jobs) as pool:
        runs = [(row, seed) for seed in range(options.seeds) for row in options.rows]
        list(pool.map(lambda run: train_row(out, *run), runs))
    result = collect(out, options.rows, options.seeds)
    (out / "study.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (out / "study.md").write_text(as_markdown(result), encoding="utf-8")
    print(as_markdown(result))


def prepare_labels(out: Path) -> None:
    """Train the teacher and let it, and the true masks, label the training scenes."""
    train_images = out / "scenes" / "train"
    tokenlabel(out, "teacher", "train", "--recipe=demo_teacher", f"--run={out / 'teacher'}", *data_of(out))
    tokenlabel(
        out,
        "labels",
        "annotate",
        train_images,
        out / "labels-token",
        "--teacher",
        out / "teacher",
        "--size=64",
    )
    masks = f"masks:{out / 'scenes' / 'masks' / 'train'}"
    tokenlabel(out, "truth", "annotate", train_images, out / "labels-truth", "--teacher", masks, "--size=24")


def train_row(out: Path, row: str, seed: int) -> None:
    """Train one row of the comparison with one seed."""
    name = f"{row}-{seed}"
    labels = [] if row == "class" else [f"--data.labels={out / f'labels-{row}'}"]
    recipe = "demo_class_labels" if row == "class" else "demo_token_labels"
    tokenlabel(
        out,
        name,
        "train",
        f"--recipe={recipe}",
        f"--run={out / name}",
        f"--seed={seed}",
        *data_of(out),
        *labels,
    )
    tokenlabel(
        out,
        name,
        "eval",
        out / name,
        "--masks",
        out / "scenes" / "masks" / "val",
        "--output",
        out / name / "eval.json",
    )


def data_of(out: Path) -> list[str]:
    """Return the data options of every training run."""
    scenes = out / "scenes"
    return [f"--data.train={scenes / 'train'}", f"--data.val={scenes / 'val'}", "--data.num_workers=0"]


def tokenlabel(out: Path, log: str, *words: str | Path) -> None:
    """Run one command with one thread, its output in OUT/LOG.log."""
    with (out / f"{log}.log").open("ab") as file:
        subprocess.run(
            [sys.executable, "-m", "tokenlabel", *map(str, words)],
            stdout=file,
            stderr=subprocess.STDOUT,
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )


def collect(out: Path, rows: Sequence[str], num_seeds: int) -> dict[str, object]:
    """Return the figures of all runs."""
    evals = {
        row: [json.loads((out / f"{row}-{seed}" / "eval.json").read_text()) for seed in range(num_seeds)]
        for row in rows
    }
    halfway = {row: [halfway_top1(out / f"{row}-{seed}") for seed in range(num_seeds)] for row in rows}
    return {
        "top1": {row: [e["top1"] for e in evals[row]] for row in rows},
        "top1_halfway": halfway,
        "token_agreement": {row: [e["token_agreement"] for e in evals[row]] for row in rows},
        "label_agreement": label_agreement(out),
    }


def halfway_top1(run: Path) -> float:
    """Return the accuracy at the evaluation nearest to the middle of a run."""
    lines = [line for line in read_metrics(run) if line["kind"] == "eval"]
    return min(lines, key=lambda line: abs(line["step"] - lines[-1]["step"] / 2))["top1"]


def label_agreement(out: Path, num_images: int = 1000) -> dict[str, float]:
    """Return how often aligned labels name the object that a token of an augmented image shows.

    For the right geometry, and for crops whose x and y are swapped as in the published code.
    """
    recipe = read_config(out / "token-0" / "recipe.yaml", Recipe)
    source = open_images(out / "scenes" / "train")
    masks = MaskFolder(out / "scenes" / "masks" / "train", num_classes=10)
    transform = TrainTransform(recipe.augment, recipe.model.size_px)
    labelled, true = (
        collate([TokenLabelDataset(source, transform, seed=0, store=store)[0, i] for i in range(num_images)])
        for store in (LabelStore(out / "labels-token"), masks)
    )
    assert labelled.score_maps is not None
    assert true.score_maps is not None
    grid = (8, 8)
    truth = align(true.score_maps, true.views, grid)
    swapped = labelled.views.flip(2)[..., [1, 0, 2]]  # x for y in the crop's place and in its size
    right = {}
    for name, views in {"aligned": labelled.views, "x and y swapped": swapped}.items():
        hits, total = agreement(align(labelled.score_maps, views, grid), truth, 10)
        right[name] = hits / total
    return right


def as_markdown(result: dict[str, object]) -> str:
    """Return the tables as Markdown: means, the standard deviation over seeds, and paired differences."""
    top1, halfway, tokens = (as_rows(result[name]) for name in ("top1", "top1_halfway", "token_agreement"))
    lines = [
        "| trained on | top-1 | halfway | tokens that name their digit |",
        "|---|---|---|---|",
        *(
            f"| {ROWS[row]} | {spread(top1[row])} | {spread(halfway[row])} | {spread(tokens[row])} |"
            for row in top1
        ),
        "",
        "| top-1, seed by seed | mean difference | 95% interval | each seed |",
        "|---|---|---|---|",
    ]
    for row in (row for row in top1 if row != "class"):
        gains = [100 * (a - b) for a, b in zip(top1[row], top1["class"], strict=True)]
        half = (
            STUDENT_T[len(gains) - 1] * stdev(gains) / np.sqrt(len(gains)) if len(gains) > 1 else float("nan")
        )
        each = ", ".join(f"{gain:+.1f}" for gain in gains)
        lines.append(f"| {ROWS[row]} over class labels only | {mean(gains):+.2f} | ±{half:.2f} | {each} |")
    lines += ["", "| aligned labels that name the digit under the token | share |", "|---|---|"]
    label_shares = result["label_agreement"]
    assert isinstance(label_shares, dict)
    lines += [f"| {name} | {share:.1%} |" for name, share in label_shares.items()]
    return "\n".join(lines) + "\n"


def as_rows(figures: object) -> dict[str, Sequence[float]]:
    """Return figures by row, checked to be such."""
    assert isinstance(figures, dict)
    return figures


def spread(shares: Sequence[float]) -> str:
    """Return mean and standard deviation of shares, in per cent."""
    deviation = stdev(shares) if len(shares) > 1 else float("nan")
    return f"{100 * mean(shares):.1f} ± {100 * deviation:.1f}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
