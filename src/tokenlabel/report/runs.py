"""A run, or several side by side, as one self-contained HTML file: tables, curves and pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from tokenlabel.classification.task import build
from tokenlabel.core.batch import Batch
from tokenlabel.core.mix import MixPlan, mix_images
from tokenlabel.core.step import Part, Supervision, draw_mix, make_targets
from tokenlabel.core.targets import TokenTargets
from tokenlabel.data.batches import collate
from tokenlabel.data.images import decode_image
from tokenlabel.drawing.charts import Points, curve_chart
from tokenlabel.drawing.page import gallery, section, settings_table, svg, table, write_page
from tokenlabel.drawing.pictures import enlarged, mask_picture, with_cells
from tokenlabel.evaluation.observation import evaluation_set
from tokenlabel.report.contrast import contrast_sections, guesses_of, load_for_pictures, location_maps
from tokenlabel.report.names import short_names
from tokenlabel.report.segmentation import is_segmentation_run, segmentation_sections
from tokenlabel.runtime.configuration import read_config
from tokenlabel.runtime.runlog import read_metrics
from tokenlabel.training.recipe import RECIPE_FILE, Recipe

NUM_PICTURES = 6
COLUMNS = {
    "top1": ("top-1", "{:.1%}"),
    "top5": ("top-5", "{:.1%}"),
    "loss": ("loss", "{:.3f}"),
    "ece": ("ECE", "{:.1%}"),
    "token_accuracy": ("tokens right", "{:.1%}"),
    "teacher_accuracy": ("tokens as the teacher", "{:.1%}"),
    "knn": ("nearest neighbours", "{:.1%}"),
    "image_probe": ("linear probe", "{:.1%}"),
    "images_per_s": ("train images/s", "{:,.0f}"),
    "data_share": ("waiting for data", "{:.1%}"),
    "targets_share": ("making targets", "{:.1%}"),
}


@dataclass(frozen=True, eq=False)
class RunRecord:
    """What a run folder says about a run. `name`: what it is called on the page."""

    name: str
    folder: Path
    recipe: Recipe
    train_lines: list[dict[str, Any]]
    eval_lines: list[dict[str, Any]]
    final: dict[str, Any]
    """The figures of `tokenlabel eval` if its output lies in the run folder, of the last evaluation otherwise."""

    def minutes_at(self, step: int) -> float:
        """Return how long the training steps before a step took; evaluations and pauses are left out."""
        seconds, before = 0.0, 0
        for line in self.train_lines:
            if before >= step:
                break
            seconds += (min(line["step"], step) - before) * self.recipe.batch_size / line["images_per_s"]
            before = line["step"]
        return seconds / 60


def write_report(runs: Sequence[Path], output: Path) -> None:
    """Write the report of run folders to an HTML file, which needs no other file and no network.

    The first run that was trained with token labels lends the pictures of labels, the first that has a checkpoint
    those of predictions; runs of segmentation have parts of their own. Raises ValueError that names a folder that
    holds no run.
    """
    names = short_names(runs)
    segmentation_runs = {run: name for run, name in names.items() if is_segmentation_run(run)}
    sections = segmentation_sections(segmentation_runs) if segmentation_runs else []
    records = [read_run(run, name) for run, name in names.items() if run not in segmentation_runs]
    if records:
        sections = [*_classifier_sections(records), *sections]
    write_page("tokenlabel: " + ", ".join(names.values()), sections, output)


def _classifier_sections(records: Sequence[RunRecord]) -> list[str]:
    return [
        section("Results", _results_table(records)),
        section("Curves", svg(_curves(records))),
        *contrast_sections({record.folder: record.name for record in records}),
        *_picture_sections(records),
        section("Recipes", settings_table([(record.name, record.recipe) for record in records])),
    ]


def read_run(run: Path, name: str) -> RunRecord:
    """Return what a run folder holds, under a name. Raises ValueError if it is none."""
    if not (run / RECIPE_FILE).is_file():
        raise ValueError(f"{run}: holds no {RECIPE_FILE}; give a run folder that `tokenlabel train` made")
    lines = read_metrics(run)
    evals = [line for line in lines if line["kind"] == "eval"]
    written = run / "eval.json"
    final = json.loads(written.read_text(encoding="utf-8")) if written.is_file() else (evals or [{}])[-1]
    trains = [line for line in lines if line["kind"] == "train"]
    recipe = read_config(run / RECIPE_FILE, Recipe)
    return RunRecord(name, run, recipe, trains, evals, final.get(recipe.eval.inference.value, final))


def _results_table(records: Sequence[RunRecord]) -> str:
    rows = []
    for record in records:
        speeds = {
            name: float(np.median([line[name] for line in record.train_lines]))
            for name in ("images_per_s", "data_share", "targets_share")
            if record.train_lines
        }
        figures = {**record.final, **speeds}
        shown = (
            form.format(figures[name]) if name in figures else "–" for name, (_, form) in COLUMNS.items()
        )
        rows.append([record.name, *shown])
    return table(["run", *(heading for heading, _ in COLUMNS.values())], rows)


def _curves(records: Sequence[RunRecord]) -> Figure:
    """Return losses and accuracy against steps, and accuracy against time."""

    def lines(kind: str, name: str, *, scale: float = 1.0) -> dict[str, Points]:
        return {
            record.name: [
                (line["step"], scale * line[name]) for line in getattr(record, kind) if line.get(name)
            ]
            for record in records
        }

    against_time = {
        record.name: [
            (record.minutes_at(line["step"]), 100 * line["top1"])
            for line in record.eval_lines
            if "top1" in line
        ]
        for record in records
    }
    return curve_chart(
        {
            "training loss, class token": ("step", lines("train_lines", "class_loss")),
            "training loss, tokens": ("step", lines("train_lines", "token_loss")),
            "top-1 on val, %": ("step", lines("eval_lines", "top1", scale=100)),
            "top-1 on val, %, against time": ("minutes of training", against_time),
        },
        columns=2,
    )


def _picture_sections(records: Sequence[RunRecord]) -> list[str]:
    sections = []
    labelled = next((record for record in records if _has_stored_labels(record.recipe)), None)
    if labelled is not None:
        sections += _label_sections(labelled.recipe)
    for record in records:
        if (of_record := _prediction_section(record)) is not None:
            sections.append(of_record)
            break
    return sections


def _has_stored_labels(recipe: Recipe) -> bool:
    return recipe.data.labels is not None and recipe.loss.beta > 0


def _label_sections(recipe: Recipe) -> list[str]:
    """Return pictures of score maps, of augmented images with their labels, and of mixed ones."""
    training = build(recipe, device=torch.device("cpu"))
    dataset, grid = training.train_set, training.grid
    assert dataset.store is not None
    names = training.token_names
    chosen = np.linspace(0, len(dataset) - 1, NUM_PICTURES).astype(int).tolist()
    maps, augmented = [], []
    samples = [dataset[0, index] for index in chosen]
    batch = collate(samples)
    plain = Supervision(loss=replace(recipe.loss, label_smoothing=0.0), stored=True)
    targets = make_targets(batch, plain, grid).tokens
    assert targets is not None
    labels = _cells(targets, grid, len(names))
    for i, index in enumerate(chosen):
        key = batch.keys[i]
        original = np.asarray(decode_image(dataset.source.read(index), key))
        score_map = samples[i].score_map
        assert score_map is not None
        maps += [(enlarged(original), key), (with_cells(original, score_map.dense(), names), "teacher's map")]
        pixels = _pixels(batch, i)
        augmented += [(enlarged(pixels), key), (with_cells(pixels, labels[i], names), "aligned token labels")]
    sections = [
        section("Training images and their score maps", gallery(maps)),
        section("Augmented images and the labels of their tokens", gallery(augmented)),
    ]
    plan = draw_mix(
        replace(recipe.mix, probability=1.0),
        len(batch.images),
        grid,
        recipe.model.img_size,
        generator=Part(recipe.seed, 0, 0).generator(),
    )
    if plan is not None:
        mixed = _mixed_pairs(
            plain, batch, plan, grid=grid, class_names=training.class_names, token_names=names
        )
        sections.append(section(f"Mixed pairs ({recipe.mix.kind})", mixed))
    return sections


def _mixed_pairs(
    supervision: Supervision,
    batch: Batch,
    plan: MixPlan,
    *,
    grid: tuple[int, int],
    class_names: list[str],
    token_names: list[str],
) -> str:
    targets = make_targets(batch, supervision, grid, mix=plan)
    assert targets.tokens is not None
    labels = _cells(targets.tokens, grid, len(token_names))
    images = mix_images(batch.images.float(), plan).round().to(torch.uint8)
    aspect = images.shape[2] / images.shape[3]
    pictures = []
    for i in range(len(images) // 2):
        partner = int(plan.partner[i])
        classes = targets.class_token.dense(max(1, len(class_names)))[i, 0]
        said = ", ".join(
            f"{class_names[c]}: {classes[c]:.2f}"
            for c in classes.argsort(descending=True)[:2]
            if class_names and classes[c] > 0
        )
        mixed = images[i].permute(1, 2, 0).numpy()
        pictures += [
            (enlarged(_pixels(batch, i)), batch.keys[i]),
            (enlarged(_pixels(batch, partner)), f"partner {batch.keys[partner]}"),
            (mask_picture(plan.mask[i].numpy(), aspect=aspect), "mask: white from the partner"),
            (with_cells(mixed, labels[i], token_names), f"mixed targets; class {said or 'unknown'}"),
        ]
    return gallery(pictures)


def _prediction_section(record: RunRecord) -> str | None:
    """Return what a run says of locations of val images; None if it has no checkpoint yet, or no val images."""
    trained = load_for_pictures(record.folder)
    if trained is None:
        return None
    dataset = evaluation_set(trained.recipe, class_names=trained.class_names)
    chosen = np.linspace(0, len(dataset) - 1, 2 * NUM_PICTURES).astype(int).tolist()
    batch = collate([dataset[0, index] for index in chosen])
    guesses, maps = guesses_of(trained, chosen).tolist(), location_maps(record.folder, batch.images)
    pictures = []
    for i, (guess, truth) in enumerate(zip(guesses, batch.class_ids.tolist(), strict=True)):
        verdict = "right" if guess == truth else f"wrong, it is {trained.class_names[truth]}"
        said = f"says {trained.class_names[guess]}: {verdict}"
        pixels, key = _pixels(batch, i), batch.keys[i]
        if maps is None:
            pictures.append((enlarged(pixels), f"{key}: {said}"))
        else:
            pictures += [(enlarged(pixels), key), (with_cells(pixels, maps[i], trained.token_names), said)]
    title = "val images" if maps is None else "the locations of val images"
    return section(f"What {record.name} says about {title}", gallery(pictures))


def _cells(targets: TokenTargets, grid: tuple[int, int], num_classes: int) -> NDArray[np.float32]:
    """Return targets as [B, h, w, C]."""
    return targets.dense(num_classes).unflatten(1, grid).numpy()


def _pixels(batch: Batch, index: int) -> NDArray[np.uint8]:
    return batch.images[index].permute(1, 2, 0).numpy()
