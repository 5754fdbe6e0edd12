"""What a finished run of a study is measured by: figures by name, written beside the run, and how they are shown."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from studies.defects import DEFECTS, DefectiveDataset
from tokenlabel.core.align import align
from tokenlabel.core.batch import Batch, normalize_images
from tokenlabel.core.config import Inference
from tokenlabel.core.targets import TokenTargets
from tokenlabel.data.augment import TrainTransform
from tokenlabel.data.batches import ScoreMaps, TokenLabelDataset, collate
from tokenlabel.data.sources import open_images
from tokenlabel.evaluation.assessment import evaluation_set
from tokenlabel.evaluation.evaluators import Accuracy, Calibration, TokenTruth, object_tokens, observe
from tokenlabel.evaluation.masks import MaskFolder, agreement
from tokenlabel.evaluation.probe import fit_probe, image_figures
from tokenlabel.labels.store import LabelStore
from tokenlabel.models import TokenModel
from tokenlabel.models.load import LoadedModel
from tokenlabel.runtime.process import write_whole
from tokenlabel.runtime.runlog import read_metrics
from tokenlabel.training.checkpoint import load_run

MEASURES_FILE = "measures.json"
COST_FILE = "cost.jsonl"
BATCH_SIZE = 250
CPU = torch.device("cpu")
# Labels of so many augmented training images are held against the masks.
NUM_LABELLED = 1000

Figures = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """A run that has been trained.

    `folders`: those that there are of `masks_train`, `masks_val`, `labels_val`, and of `images_train`, `images_val`,
    the images with their classes, where a run may have been trained without.
    """

    run: Path
    folders: Mapping[str, Path]
    defect: str | None
    device: torch.device

    @cached_property
    def trained(self) -> LoadedModel:
        """The model, on the device."""
        trained = load_run(self.run)
        trained.model.to(self.device)
        return trained

    def images(self, split: str, truth: ScoreMaps | None) -> Iterator[Batch]:
        """Yield the images of `train` or `val`, as evaluation sees them, with the score maps of `truth`."""
        recipe = self.trained.recipe
        data = self.folders.get(f"images_{split}", recipe.data.train if split == "train" else None)
        dataset = evaluation_set(recipe, class_names=self.class_names, data=data)
        dataset.store = truth
        yield from _batches(dataset, self.device)

    def masks(self, split: str) -> MaskFolder:
        """Return the true masks of `train` or `val`."""
        return MaskFolder(self.folders[f"masks_{split}"], num_classes=len(self.class_names))

    @cached_property
    def class_names(self) -> Sequence[str]:
        """The classes of the images, also of a run that was trained without."""
        return self.trained.class_names or open_images(self.folders["images_train"]).class_names

    @property
    def speaks_classes(self) -> bool:
        """Whether the head for tokens was trained, on the images' classes."""
        return self.trained.recipe.uses_token_labels and self.trained.token_classes is None

    def evals(self) -> list[dict[str, Any]]:
        """Return the lines of its evaluations."""
        return [line for line in read_metrics(self.run) if line["kind"] == "eval"]


def predictions(finished: FinishedRun) -> Figures:
    """Return accuracy, loss and calibration on the val images, and what the tokens get right where masks are known.

    Without token labels the tokens' head was never trained: it has nothing to get right.
    """
    recipe = finished.trained.recipe
    if not finished.trained.class_names:
        return {}
    tells_tokens = finished.speaks_classes and "masks_val" in finished.folders
    truth = finished.masks("val") if tells_tokens else None
    return _observed(finished, truth, recipe.eval.inference, [Accuracy(), Calibration(), TokenTruth()])


def teacher_agreement(finished: FinishedRun) -> Figures:
    """Return how far the tokens agree with the teacher's labels of the val images."""
    if not finished.speaks_classes:
        return {}
    store = LabelStore(finished.folders["labels_val"])
    return _observed(finished, store, Inference.CLASS, [TokenTruth("teacher")])


def probe(finished: FinishedRun) -> Figures:
    """Return how well a linear probe of the frozen tokens finds the true masks."""
    model, num_classes = finished.trained.model, len(finished.class_names)
    train, val = (finished.images(split, finished.masks(split)) for split in ("train", "val"))
    features, classes = [], []
    with torch.inference_mode():
        for tokens, truth in _tokens_and_truth(model, train):
            objects, of_objects = object_tokens(truth)
            features.append(tokens[objects])
            classes.append(of_objects[objects])
        fitted = fit_probe(torch.cat(features), torch.cat(classes), num_classes=num_classes)
        judge = TokenTruth("probe")
        for tokens, truth in _tokens_and_truth(model, val):
            judge.add_tokens(fitted.classes(tokens), truth, num_classes=num_classes)
    return dict(judge.figures())


def _tokens_and_truth(model: TokenModel, batches: Iterable[Batch]) -> Iterator[tuple[torch.Tensor, TokenTargets]]:
    """Yield the features of the tokens [B, N, D] and the classes that they show."""
    for batch in batches:
        assert batch.score_maps is not None
        outputs = model(normalize_images(batch.images, mean=model.mean, std=model.std))
        yield outputs.tokens, align(batch.score_maps, batch.views, outputs.grid)


def of_images(finished: FinishedRun) -> Figures:
    """Return how well probes of the frozen mean token name the val images."""
    train, val = (finished.images(split, None) for split in ("train", "val"))
    return image_figures(finished.trained.model, train, val, num_classes=len(finished.class_names))


def label_truth(finished: FinishedRun) -> Figures:
    """Return how often the aligned labels of augmented training images name the object that a token shows."""
    recipe, model = finished.trained.recipe, finished.trained.model
    about_others = finished.trained.token_classes is not None
    if recipe.data.labels is None or not recipe.loss.reads_labels or about_others:
        return {}
    source, transform = open_images(recipe.data.train), TrainTransform(recipe.augment, recipe.model.img_size)
    stores = LabelStore(*recipe.data.label_folders), finished.masks("train")
    labelled, true = (TokenLabelDataset(source, transform, seed=recipe.seed, store=store) for store in stores)
    labelled = DefectiveDataset(labelled, finished.defect) if finished.defect in DEFECTS else labelled
    chosen = np.linspace(0, len(source) - 1, min(len(source), NUM_LABELLED)).astype(int)  # of all classes
    grid = model.grid_for(recipe.model.img_size)
    share = share_right(labelled, true, chosen.tolist(), grid, num_classes=model.num_classes)
    return {} if share is None else {"label_truth": share}


def share_right(
    labelled: TokenLabelDataset,
    true: TokenLabelDataset,
    chosen: Sequence[int],
    grid: tuple[int, int],
    *,
    num_classes: int,
) -> float | None:
    """Return how often a data set's aligned labels name what another one's, which knows the truth, say of a token.

    `chosen`: indices of images; both draw the same crops of them. None where the truth is known of no token.
    """
    right = total = 0
    for both in zip(*(_batches(dataset, CPU, chosen) for dataset in (labelled, true)), strict=True):
        guess, truth = (align(b.score_maps, b.views, grid) for b in both if b.score_maps is not None)
        counts = agreement(guess, truth, num_classes)
        right, total = right + counts[0], total + counts[1]
    return right / total if total else None


def label_bytes(finished: FinishedRun) -> Figures:
    """Return the bytes that a label of the run's store takes, with everything in its folder."""
    recipe = finished.trained.recipe
    if recipe.data.labels is None or not recipe.loss.reads_labels:
        return {}
    folders = recipe.data.label_folders
    files = (path for folder in folders for path in Path(folder).iterdir() if path.is_file())
    return {"label_bytes": sum(path.stat().st_size for path in files) / len(LabelStore(*folders))}


def halfway(finished: FinishedRun) -> Figures:
    """Return the accuracy at the evaluation nearest to the middle of the run."""
    lines = [line for line in finished.evals() if "top1" in line]
    if not lines:
        return {}
    middle = lines[-1]["step"] / 2
    return {"top1_halfway": min(lines, key=lambda line: abs(line["step"] - middle))["top1"]}


def segmentation(finished: FinishedRun) -> Figures:
    """Return the mIoU of a segmentation run's last evaluation."""
    return {"miou": finished.evals()[-1]["miou"]}


def cost(finished: FinishedRun) -> Figures:
    """Return the seconds of a step, with all that goes with it (data, evaluation): of the one core that the run had on
    the CPU, by the clock on a GPU.
    """
    path = finished.run / COST_FILE
    if not path.is_file():
        return {}  # a run that was trained elsewhere
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    name = "cpu_s" if finished.device.type == "cpu" else "wall_s"
    return {"step_s": sum(line[name] for line in lines) / sum(line["num_steps"] for line in lines)}


@dataclass(frozen=True)
class Metric:
    """A figure in tables.

    `measure`: what finds it, `needs`: the folders without which a testbed has no such figure. `scale` and `digits`: how
    it is shown; `lower`: whether less is better.
    """

    title: str
    measure: Callable[[FinishedRun], Figures]
    needs: Sequence[str] = ()
    scale: float = 100
    digits: int = 1
    unit: str = "%"
    lower: bool = False

    def shown(self, value: float, *, sign: str = "") -> str:
        """Return a value as tables show it, without the unit."""
        return f"{self.scale * value:{sign}.{self.digits}f}"


_BOTH_MASKS = ("masks_train", "masks_val")
METRICS = {
    "top1": Metric("top-1", predictions),
    "top1_halfway": Metric("top-1 halfway", halfway),
    "top5": Metric("top-5", predictions),
    "loss": Metric("val loss", predictions, scale=1, digits=3, unit="", lower=True),
    "ece": Metric("ECE", predictions, lower=True),
    "token_accuracy": Metric("tokens right", predictions),
    "token_miou": Metric("tokens, mIoU", predictions),
    "teacher_accuracy": Metric("tokens as the teacher", teacher_agreement, ("labels_val",)),
    "probe_accuracy": Metric("linear probe of the tokens", probe, _BOTH_MASKS),
    "probe_miou": Metric("linear probe, mIoU", probe, _BOTH_MASKS),
    "image_probe": Metric("linear probe of the mean token", of_images),
    "knn": Metric("nearest neighbours", of_images),
    "label_truth": Metric("labels right", label_truth, ("masks_train",)),
    "label_bytes": Metric("label bytes an image", label_bytes, scale=1, digits=0, unit=" B", lower=True),
    "step_s": Metric("time a step", cost, scale=1000, digits=0, unit=" ms", lower=True),
    "miou": Metric("mIoU", segmentation),
}


def measure_run(finished: FinishedRun, *, wanted: Sequence[str]) -> dict[str, float | None]:
    """Return the figures of a finished run by name, and write them to its measures.json.

    Those that are there already are not measured again; those that the run or the testbed cannot have are None.
    """
    path = finished.run / MEASURES_FILE
    figures: dict[str, float | None] = {}
    if path.is_file():
        figures = json.loads(path.read_text(encoding="utf-8"))
    missing = [METRICS[name] for name in wanted if name not in figures]
    if missing:
        able = [metric.measure for metric in missing if all(name in finished.folders for name in metric.needs)]
        for measure in dict.fromkeys(able):
            figures |= measure(finished)
        figures |= {name: None for name in wanted if name not in figures}
        write_whole(path, json.dumps(figures, indent=1) + "\n")
    return figures


def _observed(
    finished: FinishedRun, truth: ScoreMaps | None, inference: Inference, evaluators: Sequence[Any]
) -> Figures:
    model, precision = finished.trained.model, finished.trained.recipe.precision
    return observe(model, finished.images("val", truth), {inference: evaluators}, precision=precision)[inference]


def _batches(dataset: Any, device: torch.device, chosen: Sequence[int] | None = None) -> Iterator[Batch]:
    indices = range(len(dataset)) if chosen is None else chosen
    for start in range(0, len(indices), BATCH_SIZE):
        yield collate([dataset[0, i] for i in indices[start : start + BATCH_SIZE]]).to(device)
