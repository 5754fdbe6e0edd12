"""What a report shows of segmentation runs: figures, classes, curves, and what they say about val images."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from matplotlib.figure import Figure
from PIL import Image

from tokenlabel.data.images import DataError
from tokenlabel.drawing.page import gallery, section, settings_table, svg, table
from tokenlabel.drawing.pictures import enlarged
from tokenlabel.runtime.configuration import read_config
from tokenlabel.runtime.notices import listed
from tokenlabel.runtime.runlog import read_metrics
from tokenlabel.segmentation.inference import Segmenter
from tokenlabel.segmentation.pairs import open_pairs
from tokenlabel.segmentation.predictions import overlay
from tokenlabel.segmentation.recipe import SegmentRecipe
from tokenlabel.segmentation.task import load_segmenter
from tokenlabel.training.checkpoint import CheckpointError
from tokenlabel.training.recipe import RECIPE_FILE

NUM_PICTURES = 6
COLUMNS = {"miou": "mIoU", "mean_accuracy": "mean accuracy", "pixel_accuracy": "pixel accuracy"}


@dataclass(frozen=True, eq=False)
class SegmentRecord:
    """What a run folder says about a segmentation run; `final` as `tokenlabel segment eval --output` left it there."""

    name: str
    folder: Path
    recipe: SegmentRecipe
    train_lines: list[dict[str, Any]]
    eval_lines: list[dict[str, Any]]
    final: dict[str, Any]


def is_segmentation_run(run: Path) -> bool:
    """Say whether a folder holds a run of segmentation, by its recipe."""
    path = run / RECIPE_FILE
    nested = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return "head" in (nested.get("model") or {})


def segmentation_sections(names: Mapping[Path, str]) -> list[str]:
    """Return the parts of a page about segmentation runs side by side. `names`: what it calls each run folder.

    The first run that has a checkpoint and val images lends the pictures.
    """
    records = [_read(run, name) for run, name in names.items()]
    sections = [
        section("Segmentation", _results(records)),
        section("Segmentation: curves", svg(_curves(records))),
    ]
    if any("class_iou" in record.final for record in records):
        sections.append(section("Segmentation: IoU of each class", _classes(records)))
    for record in records:
        pictures = _pictures(record)
        if pictures:
            sections.append(section(f"What {record.name} says about val images", gallery(pictures)))
            break
    named = [(record.name, record.recipe) for record in records]
    return [*sections, section("Segmentation: recipes", settings_table(named))]


def _read(run: Path, name: str) -> SegmentRecord:
    lines = read_metrics(run)
    evals = [line for line in lines if line["kind"] == "eval"]
    written = run / "eval.json"
    final = json.loads(written.read_text(encoding="utf-8")) if written.is_file() else (evals or [{}])[-1]
    trains = [line for line in lines if line["kind"] == "train"]
    return SegmentRecord(name, run, read_config(run / RECIPE_FILE, SegmentRecipe), trains, evals, final)


def _results(records: Sequence[SegmentRecord]) -> str:
    rows = []
    for record in records:
        shown = [f"{record.final[name]:.1%}" if name in record.final else "–" for name in COLUMNS]
        if absent := record.final.get("absent_classes"):
            shown[0] += f" (no mask holds {listed(absent)})"
        speeds = [line["images_per_s"] for line in record.train_lines]
        rows.append([record.name, *shown, f"{np.median(speeds):,.0f}" if speeds else "–"])
    return table(["run", *COLUMNS.values(), "train images/s"], rows)


def _classes(records: Sequence[SegmentRecord]) -> str:
    of_run = [record.final.get("class_iou", {}) for record in records]
    names = dict.fromkeys(name for classes in of_run for name in classes)
    rows = [
        [name, *("–" if found.get(name) is None else f"{found[name]:.1%}" for found in of_run)]
        for name in names
    ]
    return table(["class", *(record.name for record in records)], rows)


def _curves(records: Sequence[SegmentRecord]) -> Figure:
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    plots = (("training loss", "train_lines", "decode_loss"), ("mIoU on val", "eval_lines", "miou"))
    for panel, (title, lines, name) in zip(figure.subplots(1, 2), plots, strict=True):
        for record in records:
            points = [(line["step"], line[name]) for line in getattr(record, lines) if name in line]
            if points:
                panel.plot(*zip(*points, strict=True), label=record.name, marker=".", linewidth=1.3)
        panel.set(title=title, xlabel="step")
        panel.grid(alpha=0.3)
        if panel.lines:
            panel.legend(fontsize=8)
    return figure


def _pictures(record: SegmentRecord) -> list[tuple[Image.Image, str]]:
    """Return val images with the true classes over them, and with those that the run says."""
    try:
        trained, pairs = load_segmenter(record.folder), open_pairs(record.recipe.data, "val")
    except (CheckpointError, DataError):  # no checkpoint yet, or the data are on another machine
        return []
    if pairs is None:
        return []
    segmenter = Segmenter(trained.model, record.recipe.eval, window_px=record.recipe.model.img_size)
    pictures = []
    for index in np.linspace(0, len(pairs) - 1, min(NUM_PICTURES, len(pairs))).astype(int).tolist():
        pixels, mask = pairs.read(index)
        said = segmenter(torch.from_numpy(pixels).permute(2, 0, 1)).numpy().astype(np.uint8)
        counted = mask < len(pairs.classes.names)
        right = (said == mask)[counted].mean() if counted.any() else float("nan")
        pictures += [
            (enlarged(overlay(pixels, mask, pairs.classes)), f"{pairs.keys[index]}: the truth"),
            (enlarged(overlay(pixels, said, pairs.classes)), f"said: {right:.0%} of the pixels right"),
        ]
    return pictures
