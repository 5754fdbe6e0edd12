"""Train a classifier with token labels: its images, step and evaluation.

The step is in `core/step.py`, the loop in `training/engine.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from tokenlabel.classification.data import open_training_data, open_val_set
from tokenlabel.classification.pictures import NUM_TRAIN, Answering, batch_album, shown_keys
from tokenlabel.core.batch import Batch
from tokenlabel.core.config import Inference, TokenChoice
from tokenlabel.core.step import Part, Supervision, TrainStep
from tokenlabel.data.augment import EvalTransform, TrainTransform
from tokenlabel.data.batches import TokenLabelDataset, make_loader
from tokenlabel.data.classes import ClassList
from tokenlabel.data.decoding import decode_pixels
from tokenlabel.data.images import has_classes
from tokenlabel.data.remote import read_ahead
from tokenlabel.data.samplers import BatchSampler, EvalBatchSampler, shard_order
from tokenlabel.drawing.pictures import Album
from tokenlabel.evaluation.evaluators import Accuracy, Calibration, Evaluator, TokenTruth, observe
from tokenlabel.evaluation.probe import image_figures, probe_sets
from tokenlabel.models import TokenModel, create_model, load_published
from tokenlabel.models.runs import read_description
from tokenlabel.models.weights import class_rows
from tokenlabel.runtime.distributed import Ranks, autocast, current_ranks
from tokenlabel.runtime.errors import ConfigError, ImageError
from tokenlabel.runtime.process import say
from tokenlabel.runtime.runlog import Tracker
from tokenlabel.teachers.ensemble import load_online_teacher
from tokenlabel.training.engine import train_in
from tokenlabel.training.recipe import ModelConfig, Recipe
from tokenlabel.training.run_folder import initial_model
from tokenlabel.training.run_images import RunImages
from tokenlabel.training.tasks import Summary, Task

# Below this many images evaluation decodes in its own process: starting workers takes seconds.
_MANY_IMAGES = 5000


def train(
    recipe: Recipe,
    run: str | Path,
    *,
    device: torch.device | str,
    trackers: Sequence[Tracker] = (),
    changed_numerics: bool = False,
) -> dict[str, Any]:
    """Train by a recipe in a run folder, from its newest checkpoint if there is one; return the last evaluation.

    Under torchrun all processes train together. Writes recipe.yaml, metrics.jsonl and checkpoints/; `trackers` are
    called with every line of the metrics. `changed_numerics`: continue although rounding changes (see
    `check_run_folder`). Raises ConfigError if the folder holds a run of another recipe or another process trains there,
    ValueError for data that cannot be trained on, `Interrupted` after SIGINT or SIGTERM.
    """
    try:
        return train_in(run, recipe, build, device=device, trackers=trackers, changed_numerics=changed_numerics)
    except ImageError as error:
        # An image that was not decoded before, or broke since. A data worker's error begins with its traceback.
        reason = str(error).rstrip().splitlines()[-1].rpartition("ImageError: ")[2]
        raise ImageError(
            f"{reason}; restore it (or remove a val image), or start a run with --data.skip-broken, which "
            "skips such images"
        ) from error


@dataclass(eq=False)
class ClassifierTask(Task[Recipe]):
    """Training of a classifier on class labels, token labels, or both.

    `counts`: describes the images in a dry run. `probe_sets`: images with classes to train and test probes on.
    """

    recipe: Recipe
    model: TokenModel
    train_set: TokenLabelDataset
    val_set: TokenLabelDataset | None
    supervision: Supervision
    device: torch.device
    counts: str
    token_classes: ClassList | None = None
    probe_sets: tuple[TokenLabelDataset, TokenLabelDataset] | None = None
    images: RunImages | None = None

    def __post_init__(self) -> None:
        self.class_names = self.train_set.source.class_names
        # The first that exists: accuracy, probes of the features, agreement with the teacher.
        self.metric = "top1" if self._judges_classes else "knn" if self.probe_sets else "teacher_accuracy"
        self.num_images = len(self.train_set)
        self.grid = self.model.grid_for(self.recipe.model.img_size)
        self.inference = self.recipe.eval.inference
        if self.inference is not Inference.CLASS and not self.supervision.labels_tokens:
            say(f"no token learns, so class logits are evaluated, not eval.inference {self.inference}")
            self.inference = Inference.CLASS
        if self.supervision.labels_tokens:
            loss = self.recipe.loss
            sure = f" as sure as loss.token_threshold {loss.token_threshold:g}"
            few = sure if loss.tokens is TokenChoice.CONFIDENT else " that keeps a class"
            self.zero_means = {"token_loss": "none of their tokens has a label" + few}
        for dataset in (self.val_set, *(self.probe_sets or ())):  # for its errors, which come too late after an epoch
            if dataset is not None:
                self._eval_sampler(dataset, current_ranks())
        self.step = TrainStep(
            self.model,
            self.supervision,
            erasing=self.recipe.erase,
            mixing=self.recipe.mix,
            autocast=autocast(self.device, self.recipe.precision),
        )

    def batches(self, sampler: BatchSampler) -> Iterable[Batch]:
        """Return the augmented batches in the order of a sampler."""
        loader = make_loader(
            self.train_set, sampler, num_workers=self.recipe.data.num_workers, pin_memory=self.device.type == "cuda"
        )
        return read_ahead(self.train_set.source, sampler, loader)

    def order(self) -> Callable[[int], NDArray[np.int64]] | None:
        """Return the order that reads tar files one after the other, if the recipe has `data.tar_window`."""
        window, seed = self.recipe.data.tar_window, self.recipe.seed
        if window is None:
            return None
        groups = getattr(self.train_set.source, "groups", None)
        if groups is None:
            raise ConfigError(
                f"data.tar_window is for images in tar files; {self.recipe.data.train} is none, leave it out"
            )
        return lambda epoch: shard_order(groups, seed=seed, epoch=epoch, window=window)

    @property
    def token_class_names(self) -> list[str]:
        """The class names of the tokens; numbers if they are unknown."""
        return self.class_names if self.token_classes is None else self.token_classes.labels

    @property
    def _judges_classes(self) -> bool:
        """True if there are val images with classes, and a class head."""
        val_set = self.val_set
        return val_set is not None and bool(self.class_names) and bool(has_classes(val_set.source).any())

    def picture(self, batch: Batch, part: Part, indices: Sequence[tuple[int, int]]) -> Album:
        """Return an album of the first images of a batch as they are trained on."""
        source = self.train_set.source
        shown = [index for _, index in indices[:NUM_TRAIN]]
        assert isinstance(self.step, TrainStep)
        return batch_album(
            self.step,
            batch,
            part,
            [decode_pixels(source.read(index), source.keys[index]) for index in shown],
            class_names=self.class_names,
            token_class_names=self.token_class_names,
        )

    def summary(self) -> Summary:
        """Return the description of the task in a dry run."""
        recipe, (rows, columns) = self.recipe, self.grid
        height_px, width_px = recipe.model.img_size
        tokens = f" and {self.token_classes} for the tokens" if self.token_classes is not None else ""
        classes = f"{len(self.class_names):,} classes" if self.class_names else "no classes"
        labels = " + ".join(recipe.data.label_folders) if self.supervision.stored else recipe.loss.teacher.name
        source = f"labels of tokens by {labels}" if self.supervision.labels_tokens else "no labels of tokens"
        return Summary(
            network=recipe.model.name,
            images=f"{self.counts}; {classes}{tokens}, {width_px} x {height_px} px",
            targets=f"{rows} x {columns} tokens; {source}",
        )

    def evaluate(self, model: nn.Module, ranks: Ranks, *, run: Path | None = None, **about: Any) -> dict[str, Any]:
        """Evaluate a model on the val images and by probes; write predictions and pictures into `run`."""
        assert isinstance(model, TokenModel)
        figures: dict[str, Any] = {}
        if self.probe_sets is not None:
            learn, test = (self._eval_batches(dataset, ranks) for dataset in self.probe_sets)
            names = self.probe_sets[0].source.class_names
            figures |= image_figures(model.eval(), learn, test, num_classes=len(names), ranks=ranks)
        val_set = self.val_set
        if val_set is None:
            return figures
        evaluators: list[Evaluator] = [Accuracy(), Calibration()] if self._judges_classes else []
        evaluators += [TokenTruth("teacher")] if val_set.store is not None else []
        keys, recipe = val_set.source.keys, self.recipe
        answering = Answering(shown_keys(keys), of_tokens=self.supervision.labels_tokens)
        observed = observe(
            model,
            self._eval_batches(val_set, ranks),
            {self.inference: [*evaluators, answering]},
            precision=recipe.precision,
            ranks=ranks,
        )
        if run is not None and ranks.is_first:
            # A sharded model cannot run on one rank alone.
            if not self.supervision.labels_tokens and not recipe.sharded:
                answering.ask_classifier(model, recipe.model.name, autocast(self.device, recipe.precision))
            answering.write(run, keys, self.class_names, self.token_class_names, **about)
        return figures | observed[self.inference]

    def _eval_batches(self, dataset: TokenLabelDataset, ranks: Ranks) -> Iterable[Batch]:
        """Yield this rank's share of a data set for evaluation, on the device."""
        sampler = self._eval_sampler(dataset, ranks)
        num_workers = self.recipe.data.num_workers if len(dataset) >= _MANY_IMAGES else 0
        loader = make_loader(dataset, sampler, num_workers=num_workers)
        for batch in read_ahead(dataset.source, sampler, loader):
            yield batch.to(self.device)

    def _eval_sampler(self, dataset: TokenLabelDataset, ranks: Ranks) -> EvalBatchSampler:
        batch_size = self.recipe.eval.batch_size
        return EvalBatchSampler(
            num_images=len(dataset), batch_size=batch_size, rank=ranks.rank, world_size=ranks.world_size
        )


def build(recipe: Recipe, *, device: torch.device, run: Path | None = None) -> ClassifierTask:
    """Build the data, the model and the supervision of a recipe, and check that they fit together.

    `run`: the run folder, see `open_training_data`.
    """
    data = open_training_data(recipe, run)
    source, img_size = data.source, recipe.model.img_size
    torch.manual_seed(recipe.seed)  # right before the model: no earlier draw changes its initial weights
    config = initial_model(recipe.model, run)
    model = _initial_model(config, class_names=source.class_names, token_classes=data.token_classes)
    teacher = load_online_teacher(recipe.loss.teacher, source.class_names, device)
    val_set = open_val_set(recipe, data)
    probes = None
    if recipe.eval.probe is not None:
        plain = EvalTransform(img_size, crop_fraction=recipe.eval.crop_fraction)
        probes = probe_sets(recipe.eval.probe, recipe.eval.probe_test, plain)
    train_set = TokenLabelDataset(source, TrainTransform(recipe.augment, img_size), seed=recipe.seed, store=data.store)
    return ClassifierTask(
        recipe=recipe,
        model=model.to(device),
        train_set=train_set,
        val_set=val_set,
        supervision=Supervision(loss=recipe.loss, stored=data.store is not None, teacher=teacher),
        device=device,
        counts=data.counts,
        token_classes=data.other_token_classes,
        probe_sets=probes,
        images=data.images,
    )


def _initial_model(config: ModelConfig, *, class_names: list[str], token_classes: ClassList) -> TokenModel:
    """Return the model with its initial weights, new or from `config.weights`."""
    model = create_model(
        config.name,
        num_classes=len(class_names),
        num_token_classes=token_classes.count,
        img_size=config.img_size,
        **config.options,
    )
    if config.weights is not None:
        rows = partial(class_rows, config.weights, class_names)
        others = read_description(config.weights).get("token_classes")
        theirs = ClassList.from_dict(others) if others else None
        if token_classes.is_same(ClassList.of(class_names)):
            tokens = "classes" if theirs is None else "other"
        else:
            tokens = "same" if theirs is not None and token_classes.is_same(theirs) else "other"
        load_published(model, config.weights, average=config.average, rows=rows, tokens=tokens)
    model.freeze(config.frozen_layers)
    return model
