"""Runs on the same images: which classes one is better at, and which images one gets right and the other wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tokenlabel.core.batch import normalize_images
from tokenlabel.data.batches import collate
from tokenlabel.drawing.page import gallery, section, table
from tokenlabel.drawing.pictures import enlarged, with_cells
from tokenlabel.evaluation.observation import evaluation_set
from tokenlabel.teachers.dense import NoDenseMapError
from tokenlabel.teachers.networks import TeacherConfig, load_teacher
from tokenlabel.training.checkpoint import CheckpointError, TrainedModel, load_model

# The most images that are looked at, and that are shown of each kind.
NUM_IMAGES = 2000
NUM_SHOWN = 6
NUM_CLASSES_SHOWN = 20
BATCH_SIZE = 250


@dataclass(frozen=True, eq=False)
class Answers:
    """What a run says of the images that all runs are asked about.

    `name`: of the run on the page. `guesses` [n]: class ids.
    """

    name: str
    run: Path
    trained: TrainedModel
    guesses: NDArray[np.int64]


def contrast_sections(names: Mapping[Path, str]) -> list[str]:
    """Return sections about runs that were evaluated on the same images as the first of them that has a checkpoint.

    `names`: what the page calls each run folder.

    Accuracy by class, with how the first run changes the second, and the images on which these two differ.
    """
    loaded = [(run, trained) for run in names if (trained := load_for_pictures(run))]
    if not loaded:
        return []
    first = loaded[0][1]
    same = [
        (run, trained)
        for run, trained in loaded
        if (trained.recipe.data.val, trained.class_names) == (first.recipe.data.val, first.class_names)
    ]
    dataset = evaluation_set(first.recipe, class_names=first.class_names)
    chosen = np.unique(np.linspace(0, len(dataset) - 1, min(len(dataset), NUM_IMAGES)).astype(int))
    truth = dataset.source.class_ids[chosen]
    answers = [
        Answers(names[run], run, trained, guesses_of(trained, chosen.tolist())) for run, trained in same
    ]
    title = "Accuracy by class"
    if len(chosen) < len(dataset):
        title += f", of {len(chosen):,} of {len(dataset):,} images"
    sections = [section(title, _class_table(answers, truth, first.class_names))]
    if len(answers) > 1:
        sections += _disagreements(answers[0], answers[1], chosen, truth)
    return sections


def class_accuracies(
    guesses: NDArray[np.int64], truth: NDArray[np.int64], num_classes: int
) -> NDArray[np.float64]:
    """Return the share of each class's images that is guessed right; NaN for a class without images."""
    totals = np.bincount(truth, minlength=num_classes)
    right = np.bincount(truth[guesses == truth], minlength=num_classes)
    return np.divide(right, totals, out=np.full(num_classes, np.nan), where=totals > 0)


def load_for_pictures(run: Path) -> TrainedModel | None:
    """Return the model of a run that has a checkpoint, a class head and val images; None of another."""
    try:
        trained = load_model(run)
    except CheckpointError:
        return None  # a run that has not come to its first checkpoint has nothing to predict with
    return trained if trained.recipe.data.val and trained.class_names else None


@torch.inference_mode()
def guesses_of(trained: TrainedModel, indices: Sequence[int]) -> NDArray[np.int64]:
    """Return the class that a model finds in each of its val images of these indices."""
    dataset = evaluation_set(trained.recipe, class_names=trained.class_names)
    model, inference = trained.model, trained.recipe.eval.inference
    found = []
    for start in range(0, len(indices), BATCH_SIZE):
        batch = collate([dataset[0, i] for i in indices[start : start + BATCH_SIZE]])
        outputs = model(normalize_images(batch.images, mean=model.mean, std=model.std))
        found.append(outputs.logits(inference).argmax(dim=1).numpy())
    return np.concatenate(found)


def _class_table(answers: Sequence[Answers], truth: NDArray[np.int64], class_names: Sequence[str]) -> str:
    """Return the classes that change most, or for a single run the worst."""
    of_runs = np.stack([class_accuracies(a.guesses, truth, len(class_names)) for a in answers])
    change = of_runs[0] - of_runs[min(1, len(answers) - 1)]
    order = np.argsort(of_runs[0] if len(answers) == 1 else -abs(change))
    order = [i for i in order.tolist() if not np.isnan(of_runs[0, i])][:NUM_CLASSES_SHOWN]
    headings = ["class", *(a.name for a in answers)]
    rows = [[class_names[i], *(f"{accuracy:.1%}" for accuracy in of_runs[:, i])] for i in order]
    if len(answers) > 1:
        headings.append(f"{answers[0].name} over {answers[1].name}, points")
        rows = [[*row, f"{100 * change[i]:+.1f}"] for row, i in zip(rows, order, strict=True)]
    return table(headings, rows)


def _disagreements(
    ours: Answers, theirs: Answers, chosen: NDArray[np.int64], truth: NDArray[np.int64]
) -> list[str]:
    """Return the images that one of two runs gets right and the other wrong, with what both say of every location."""
    sections = []
    for right, wrong in ((ours, theirs), (theirs, ours)):
        places = np.flatnonzero((right.guesses == truth) & (wrong.guesses != truth))
        shown = places[np.linspace(0, len(places) - 1, min(NUM_SHOWN, len(places))).astype(int)]
        title = f"Right by {right.name}, wrong by {wrong.name}: {len(places)} of {len(truth)} images"
        sections.append(section(title, _pictures(right, wrong, chosen[shown].tolist(), shown)))
    return sections


def _pictures(right: Answers, wrong: Answers, indices: Sequence[int], places: NDArray[np.int64]) -> str:
    if not indices:
        return "<p>None.</p>"
    names = right.trained.class_names
    dataset = evaluation_set(right.trained.recipe, class_names=names)
    pictures: list[tuple[Image.Image, str]] = []
    both = [(answers, _maps(answers, indices)) for answers in (right, wrong)]
    for i, index in enumerate(indices):
        pixels = dataset[0, index].image.permute(1, 2, 0).numpy()
        for answers, maps in both:
            said = names[int(answers.guesses[places[i]])]
            caption = f"{dataset.source.keys[index]}: {answers.name} says {said}"
            picture = enlarged(pixels) if maps is None else with_cells(pixels, maps[i], names)
            pictures.append((picture, caption))
    return gallery(pictures)


def _maps(answers: Answers, indices: Sequence[int]) -> NDArray[np.float32] | None:
    dataset = evaluation_set(answers.trained.recipe, class_names=answers.trained.class_names)
    return location_maps(answers.run, collate([dataset[0, index] for index in indices]).images)


def location_maps(run: Path, images: UInt8[Tensor, "n 3 height width"]) -> NDArray[np.float32] | None:
    """Return what a run says of all locations of images [n, h, w, C]: by the head for tokens where it was trained,
    else by its classifier; None where that cannot answer for single locations.
    """
    try:
        teacher = load_teacher(str(run), TeacherConfig(teacher=str(run)), torch.device("cpu"))
    except NoDenseMapError:
        return None
    with torch.inference_mode():
        return teacher.probabilities(images).numpy()
