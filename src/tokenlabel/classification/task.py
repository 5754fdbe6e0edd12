"""Training a classifier with token labels: what its images, its step and its evaluation are.

What a step does is in `core/step.py`; the engine does the rest.
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

from tokenlabel.classification.pictures import NUM_TRAIN, Answering, batch_album, shown_keys
from tokenlabel.core.batch import Batch
from tokenlabel.core.step import Part, Supervision, TrainStep
from tokenlabel.data.augment import TrainTransform
from tokenlabel.data.batches import TokenLabelDataset, check_labels, make_loader
from tokenlabel.data.classes import difference, ids_among, imagenet_names
from tokenlabel.data.images import ImageCheck, ImageError, ImageSource, decode_pixels, describe, find_broken
from tokenlabel.data.samplers import BatchSampler, EvalBatchSampler, shard_order
from tokenlabel.data.sources import open_aloud, refuse_single_class
from tokenlabel.data.tars import TarImages
from tokenlabel.drawing.pictures import Album
from tokenlabel.evaluation.evaluators import Accuracy, Calibration
from tokenlabel.evaluation.observation import evaluation_set, observe
from tokenlabel.labels.store import LabelStore
from tokenlabel.models import TokenModel, create_model, load_published
from tokenlabel.models.weights import read_class_names
from tokenlabel.runtime.configuration import ConfigError
from tokenlabel.runtime.distributed import Ranks, current_ranks, joined_ranks, usable_device
from tokenlabel.runtime.process import say
from tokenlabel.runtime.runlog import Tracker
from tokenlabel.teachers.online import load_online_teacher
from tokenlabel.training.checkpoint import is_run, newest_checkpoint
from tokenlabel.training.engine import run_task
from tokenlabel.training.recipe import ModelConfig, Recipe
from tokenlabel.training.run_folder import RunImages, check_apart, locked, sound_images
from tokenlabel.training.tasks import Task, autocast

# Starting processes takes seconds: below this many images evaluation decodes them itself.
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

    Under torchrun all processes train together. The folder receives recipe.yaml, metrics.jsonl and checkpoints/;
    `trackers` hear every line of the metrics. `changed_numerics`: go on with another rounding (see `check_run_folder`).
    Raises ConfigError if it holds a run of another recipe or another process trains there, ValueError for data that
    cannot be trained on, `Interrupted` after SIGINT or SIGTERM.
    """
    device, run = usable_device(device), Path(run)
    check_apart(run, recipe.data.train, recipe.data.val)
    with joined_ranks(device) as ranks, locked(run, ranks):
        try:
            return run_task(
                build(recipe, device=device, run=run),
                run,
                ranks=ranks,
                eval_every_epochs=recipe.eval.every_epochs,
                trackers=trackers,
                changed_numerics=changed_numerics,
            )
        except ImageError as error:
            # Of an image that was trusted, or broke since; from a data worker it comes after its traceback.
            reason = str(error).rstrip().splitlines()[-1].rpartition("ImageError: ")[2]
            raise ImageError(
                f"{reason}; restore it (of val images: or remove it), or begin a run with --data.skip-broken, which "
                "leaves such images out"
            ) from error


@dataclass(eq=False)
class ClassifierTask(Task[Recipe]):
    """A classifier that learns from class labels and token labels."""

    recipe: Recipe
    model: TokenModel
    train_set: TokenLabelDataset
    val_set: TokenLabelDataset | None
    supervision: Supervision
    device: torch.device
    images: RunImages | None = None
    metric = "top1"

    def __post_init__(self) -> None:
        self.class_names = self.train_set.source.class_names
        self.num_images = len(self.train_set)
        self.grid = self.model.grid_for(self.recipe.model.img_size)
        store, is_same = self.train_set.store, self.model.num_token_classes == len(self.class_names)
        manifest = store.manifest if isinstance(store, LabelStore) else None
        self.token_class_names = self.class_names if is_same or manifest is None else manifest.class_names
        self.step = TrainStep(
            self.model,
            self.supervision,
            erase=self.recipe.erase,
            mix=self.recipe.mix,
            autocast=autocast(self.device, self.recipe.precision),
        )

    def batches(self, sampler: BatchSampler) -> Iterable[Batch]:
        """Return the augmented batches of a sampler."""
        return make_loader(
            self.train_set,
            sampler,
            num_workers=self.recipe.data.num_workers,
            pin_memory=self.device.type == "cuda",
        )

    def order(self) -> Callable[[int], NDArray[np.int64]] | None:
        """Return the order that goes from tar file to tar file, if the recipe wants it."""
        window, seed = self.recipe.data.tar_window, self.recipe.seed
        if window is None:
            return None
        groups = getattr(self.train_set.source, "groups", None)
        if groups is None:
            raise ConfigError(
                f"data.tar_window is for images in tar files; {self.recipe.data.train} is none, leave it out"
            )
        return lambda epoch: shard_order(groups, seed=seed, epoch=epoch, window=window)

    def picture(self, batch: Batch, part: Part, indices: Sequence[tuple[int, int]]) -> Album:
        """Return the first images of a batch as they are trained on."""
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

    def evaluate(
        self, model: nn.Module, ranks: Ranks, *, run: Path | None = None, **about: Any
    ) -> dict[str, Any]:
        """Return the figures of a model on the val images of the recipe; write answers and pictures into `run`."""
        recipe, dataset = self.recipe, self.val_set
        if dataset is None:
            return {}
        assert isinstance(model, TokenModel)
        sampler = EvalBatchSampler(
            num_images=len(dataset),
            batch_size=recipe.eval.batch_size,
            rank=ranks.rank,
            world_size=ranks.world_size,
        )
        num_workers = recipe.data.num_workers if len(dataset) >= _MANY_IMAGES else 0
        keys, inference = dataset.source.keys, recipe.eval.inference
        answering = Answering(shown_keys(keys), of_tokens=self.supervision.labels_tokens)
        figures = observe(
            model,
            make_loader(dataset, sampler, num_workers=num_workers),
            {inference: [Accuracy(), Calibration(), answering]},
            device=self.device,
            precision=recipe.precision,
            ranks=ranks,
        )[inference]
        if run is not None and ranks.is_first:
            if not self.supervision.labels_tokens and not recipe.sharded:
                answering.ask_classifier(model, recipe.model.name, autocast(self.device, recipe.precision))
            answering.write(run, keys, self.class_names, self.token_class_names, **about)
        return figures


def build(recipe: Recipe, *, device: torch.device, run: Path | None = None) -> ClassifierTask:
    """Build the data, the model and the supervision of a recipe, and check that they fit together.

    `run`: the folder of the run, where an earlier start may have written down which images decode. Of several ranks the
    first one looks at images and labels.
    """
    source = open_aloud(recipe.data.train)
    refuse_single_class(source, recipe.data.train)
    if recipe.data.tar_window is not None and isinstance(source, TarImages):
        source = source.streamed()
    folders = recipe.data.label_folders if recipe.loss.reads_labels else []
    # Opened by the first rank for all, so that labels that are added meanwhile are seen by none.
    store = current_ranks().on_main(lambda: LabelStore(*folders)) if folders else None
    images = RunImages(run, source.class_names)
    source = _sound(recipe, images, "train", source, store)
    num_missing = 0
    if store is not None:
        check = partial(check_labels, source, store, max_missing=recipe.data.max_missing)
        num_missing = current_ranks().on_main(check)
        newest = max((shard.generation for shard in store.shards), default=0)
        told = {"num_missing": num_missing, "annotated_again": newest or None}  # those are other labels
        images.entries["labels"] = {**told, **store.manifest.origin()}
    torch.manual_seed(recipe.seed)
    model = _begin(recipe.model, class_names=source.class_names).to(device)
    supervision = Supervision(
        loss=recipe.loss,
        stored=store is not None,
        teacher=load_online_teacher(recipe.loss.teacher, source.class_names, device),
        map_weight=len(source) / (len(source) - num_missing),
    )
    val_set = None
    if recipe.data.val:
        sound = partial(_sound, recipe, images, "val")
        val_set = evaluation_set(recipe, class_names=source.class_names, sound=sound)
        say(describe(val_set.source, recipe.data.val or ""))
    transform = TrainTransform(recipe.augment, recipe.model.img_size)
    return ClassifierTask(
        recipe=recipe,
        model=model,
        train_set=TokenLabelDataset(source, transform, seed=recipe.seed, store=store),
        val_set=val_set,
        supervision=supervision,
        device=device,
        images=images,
    )


def _sound(
    recipe: Recipe, images: RunImages, split: str, source: ImageSource, store: LabelStore | None = None
) -> ImageSource:
    """Return the images that decode, as an earlier start of the run found, or a teacher that labelled them.

    Who wants broken images left out does not trust the labels: images may have broken since.
    """
    check, skip_broken = recipe.data.check, recipe.data.skip_broken
    trusts_labels = check is ImageCheck.AUTO and not skip_broken
    labelled = store if store and trusts_labels and store.manifest.saw_images else None

    def find(among: list[int] | None) -> list[int]:
        if labelled is not None and among is None:
            among = [number for number, key in enumerate(source.keys) if key not in labelled]
        return find_broken(source, check, among)

    names = source.class_names
    found = partial(
        images.broken,
        split,
        source.keys,
        [names[class_id] for class_id in source.class_ids] if names else [],
        check=f"{check}, but for images with labels" if labelled else check.value,
        find=find,
    )
    option = "--data.skip-broken"
    return sound_images(source, skip_broken=skip_broken, check=check, option=option, find=found)


def _begin(config: ModelConfig, *, class_names: list[str]) -> TokenModel:
    """Return the model as it is before the first step."""
    num_classes = len(class_names)
    model = create_model(config.name, num_classes=num_classes, img_size=config.img_size, **config.options)
    if config.weights is not None:
        weights = Path(config.weights)
        weights = newest_checkpoint(weights) if is_run(weights) else weights
        rows = partial(_rows, weights, class_names)
        load_published(model, weights, average=config.average, rows=rows)
    model.freeze(config.frozen_layers)
    for parameter in model.parameters():  # convolutions run faster so
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return model


def _rows(path: Path, class_names: list[str], count: int) -> dict[int, int]:
    """Return which row of the heads in a file each class has, by the names that it states, else by ImageNet's."""
    stated = read_class_names(path)
    theirs = stated if len(stated) == count else () if stated else imagenet_names(count)
    rows = {row: i for row, i in enumerate(ids_among(class_names, theirs)) if i >= 0}
    if stated and not rows and count == len(class_names):
        unlike = difference(theirs, class_names, count=count, them="the file")
        say(f"{path}: {unlike}: its heads begin with what they knew of the others")
    return rows
