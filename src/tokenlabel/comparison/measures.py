"""What a finished run of a comparison is measured by: figures by name, written beside the run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tokenlabel.comparison.defects import DefectiveDataset
from tokenlabel.core.align import align
from tokenlabel.core.batch import Batch
from tokenlabel.core.config import Inference
from tokenlabel.data.augment import TrainTransform
from tokenlabel.data.batches import ScoreMaps, TokenLabelDataset, collate
from tokenlabel.data.sources import open_images
from tokenlabel.evaluation.evaluators import Accuracy, Calibration, TokenTruth
from tokenlabel.evaluation.observation import MaskFolder, agreement, evaluation_set, observe
from tokenlabel.evaluation.probe import image_figures, probe_figures
from tokenlabel.labels.store import LabelStore
from tokenlabel.runtime.files import write_whole
from tokenlabel.runtime.runlog import read_metrics
from tokenlabel.training.checkpoint import TrainedModel, load_model

MEASURES_FILE = "measures.json"
COST_FILE = "cost.jsonl"
BATCH_SIZE = 250
# Labels of so many augmented training images are held against the masks.
NUM_LABELLED = 1000


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A run that has been trained.

    `folders`: those that there are of `masks_train`, `masks_val`, `labels_val`, and of `images_train`, `images_val`,
    the images with their classes, where a run may have been trained without.
    """

    run: Path
    trained: TrainedModel
    folders: Mapping[str, Path]
    defect: str | None
    device: torch.device

    def val_batches(self, truth: ScoreMaps | None) -> Iterator[Batch]:
        """Yield the val images, with the score maps of `truth`."""
        yield from self._batches(self.folders.get("images_val", self.trained.recipe.data.val), truth)

    def train_batches(self, truth: ScoreMaps | None) -> Iterator[Batch]:
        """Yield the training images as evaluation sees them, with the score maps of `truth`."""
        yield from self._batches(self.folders.get("images_train", self.trained.recipe.data.train), truth)

    def _batches(self, folder: Any, truth: ScoreMaps | None) -> Iterator[Batch]:
        dataset = evaluation_set(self.trained.recipe, class_names=self.class_names, data=folder)
        dataset.store = truth
        yield from _batches(dataset, self.device)

    @cached_property
    def class_names(self) -> list[str]:
        """The classes of the images, also of a run that was trained without."""
        return self.trained.class_names or open_images(self.folders["images_train"]).class_names

    def masks(self, name: str) -> MaskFolder:
        """Return true masks by the name of their folder."""
        return MaskFolder(self.folders[name], num_classes=len(self.class_names))


Figures = dict[str, float]


def predictions(finished: Finished) -> Figures:
    """Return accuracy, loss and calibration on the val images, and what the tokens get right where masks are known.

    Without token labels the tokens' head was never trained: it has nothing to get right.
    """
    recipe, model = finished.trained.recipe, finished.trained.model
    if not model.num_classes:
        return {}
    speaks_classes = recipe.uses_token_labels and finished.trained.token_classes is None
    tells_tokens = speaks_classes and "masks_val" in finished.folders
    truth = finished.masks("masks_val") if tells_tokens else None
    evaluators = {recipe.eval.inference: [Accuracy(), Calibration(), TokenTruth()]}
    found = observe(
        model, finished.val_batches(truth), evaluators, device=finished.device, precision=recipe.precision
    )
    return found[recipe.eval.inference]


def teacher_agreement(finished: Finished) -> Figures:
    """Return how far the tokens agree with the teacher's labels of the val images."""
    recipe, model = finished.trained.recipe, finished.trained.model
    if not recipe.uses_token_labels or finished.trained.token_classes is not None:
        return {}
    store = LabelStore(finished.folders["labels_val"])
    evaluators = {Inference.CLASS: [TokenTruth("teacher")]}
    found = observe(
        model, finished.val_batches(store), evaluators, device=finished.device, precision=recipe.precision
    )
    return found[Inference.CLASS]


def probe(finished: Finished) -> Figures:
    """Return how well a linear probe of the frozen tokens finds the true masks."""
    train = finished.train_batches(finished.masks("masks_train"))
    val = finished.val_batches(finished.masks("masks_val"))
    return probe_figures(finished.trained.model, train, val, num_classes=len(finished.class_names))


def of_images(finished: Finished) -> Figures:
    """Return how well probes of the frozen mean token name the val images."""
    model = finished.trained.model
    train, val = finished.train_batches(None), finished.val_batches(None)
    return image_figures(model, train, val, num_classes=len(finished.class_names))


def label_truth(finished: Finished) -> Figures:
    """Return how often the aligned labels of augmented training images name the object that a token shows."""
    recipe, model = finished.trained.recipe, finished.trained.model
    if (
        recipe.data.labels is None
        or not recipe.loss.reads_labels
        or finished.trained.token_classes is not None
    ):
        return {}
    img_size, source = recipe.model.img_size, open_images(recipe.data.train)
    transform = TrainTransform(recipe.augment, img_size)
    seed, store = recipe.seed, LabelStore(*recipe.data.label_folders)
    labelled = TokenLabelDataset(source, transform, seed=seed, store=store)
    labelled = DefectiveDataset(labelled, finished.defect) if finished.defect else labelled
    true = TokenLabelDataset(source, transform, seed=seed, store=finished.masks("masks_train"))
    count = min(len(source.keys), NUM_LABELLED)
    chosen = np.linspace(0, len(source.keys) - 1, count).astype(int).tolist()  # of all classes
    grid, right, total = model.grid_for(img_size), 0, 0
    for batch, true_batch in zip(
        _batches(labelled, finished.device, chosen), _batches(true, finished.device, chosen), strict=True
    ):
        assert batch.score_maps is not None
        assert true_batch.score_maps is not None
        guess = align(batch.score_maps, batch.views, grid)
        truth = align(true_batch.score_maps, true_batch.views, grid)
        counts = agreement(guess, truth, model.num_classes)
        right, total = right + counts[0], total + counts[1]
    return {"label_truth": right / total} if total else {}


def label_bytes(finished: Finished) -> Figures:
    """Return the bytes that a label of the run's store takes, with everything in its folder."""
    recipe = finished.trained.recipe
    if recipe.data.labels is None or not recipe.loss.reads_labels:
        return {}
    folders = recipe.data.label_folders
    files = (path for folder in folders for path in Path(folder).iterdir() if path.is_file())
    return {"label_bytes": sum(path.stat().st_size for path in files) / len(LabelStore(*folders))}


def halfway(finished: Finished) -> Figures:
    """Return the accuracy at the evaluation nearest to the middle of the run."""
    lines = [line for line in read_metrics(finished.run) if line["kind"] == "eval" and "top1" in line]
    if not lines:
        return {}
    middle = lines[-1]["step"] / 2
    return {"top1_halfway": min(lines, key=lambda line: abs(line["step"] - middle))["top1"]}


def cost(finished: Finished) -> Figures:
    """Return the seconds of a step, with all that goes with it (data, evaluation): of the one core that the run had on
    the CPU, by the clock on a GPU.
    """
    path = finished.run / COST_FILE
    if not path.is_file():
        return {}  # a run that was trained elsewhere
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    name = "cpu_s" if finished.device.type == "cpu" else "wall_s"
    return {"step_s": sum(line[name] for line in lines) / sum(line["num_steps"] for line in lines)}


_MEASURES: dict[str, Callable[[Finished], Figures]] = {
    "top1": predictions,
    "top5": predictions,
    "loss": predictions,
    "ece": predictions,
    "token_accuracy": predictions,
    "token_miou": predictions,
    "teacher_accuracy": teacher_agreement,
    "probe_accuracy": probe,
    "probe_miou": probe,
    "image_probe": of_images,
    "knn": of_images,
    "label_truth": label_truth,
    "label_bytes": label_bytes,
    "top1_halfway": halfway,
    "step_s": cost,
}
# Folders without which a testbed has no such figures.
_NEEDS: dict[Callable[[Finished], Figures], tuple[str, ...]] = {
    teacher_agreement: ("labels_val",),
    probe: ("masks_train", "masks_val"),
    label_truth: ("masks_train",),
}


def measure_run(
    run: Path, folders: Mapping[str, Path], *, wanted: Sequence[str], defect: str | None, device: torch.device
) -> dict[str, float | None]:
    """Return the figures of a finished run by name, and write them to its measures.json.

    Those that are there already are not measured again; those that the run or the testbed cannot have are None.
    """
    path = run / MEASURES_FILE
    figures: dict[str, float | None] = {}
    if path.is_file():
        figures = json.loads(path.read_text(encoding="utf-8"))
    missing = [_MEASURES[name] for name in wanted if name not in figures]
    if missing:
        trained = load_model(run)
        trained = replace(trained, model=trained.model.to(device))
        finished = Finished(run=run, trained=trained, folders=folders, defect=defect, device=device)
        for measure in dict.fromkeys(missing):
            if all(name in folders for name in _NEEDS.get(measure, ())):
                figures |= measure(finished)
        figures |= {name: None for name in wanted if name not in figures}
        write_whole(path, json.dumps(figures, indent=1) + "\n")
    return figures


def _batches(dataset: Any, device: torch.device, chosen: Sequence[int] | None = None) -> Iterator[Batch]:
    indices = range(len(dataset)) if chosen is None else chosen
    for start in range(0, len(indices), BATCH_SIZE):
        yield collate([dataset[0, i] for i in indices[start : start + BATCH_SIZE]]).to(device)
