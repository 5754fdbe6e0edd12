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
from tokenlabel.core.config import ClassTarget, Inference
from tokenlabel.core.step import Part, Supervision, TrainStep
from tokenlabel.data.augment import EvalTransform, TrainTransform
from tokenlabel.data.batches import TokenLabelDataset, check_labels, classes_of_labels, make_loader
from tokenlabel.data.class_names import imagenet_names
from tokenlabel.data.classes import ClassList, difference, ids_among
from tokenlabel.data.decoding import ImageCheck, decode_pixels, find_broken
from tokenlabel.data.folders import NEED_CLASSES
from tokenlabel.data.images import ImageSource, JoinedImages, describe, has_classes, without_classes
from tokenlabel.data.remote import read_ahead
from tokenlabel.data.samplers import BatchSampler, EvalBatchSampler, shard_order
from tokenlabel.data.sources import open_aloud, refuse_single_class
from tokenlabel.drawing.pictures import Album
from tokenlabel.evaluation.evaluators import Accuracy, Calibration, Evaluator, TokenTruth
from tokenlabel.evaluation.observation import evaluation_set, observe
from tokenlabel.evaluation.probe import image_figures, probe_sets
from tokenlabel.labels.store import LabelStore
from tokenlabel.models import TokenModel, create_model, load_published
from tokenlabel.models.weights import read_class_names, read_description
from tokenlabel.runtime.cache import NUM_AHEAD, refuse_small_cache
from tokenlabel.runtime.configuration import ConfigError
from tokenlabel.runtime.distributed import Ranks, autocast, current_ranks
from tokenlabel.runtime.errors import DataError, ImageError
from tokenlabel.runtime.process import say
from tokenlabel.runtime.runlog import Tracker
from tokenlabel.teachers.online import load_online_teacher
from tokenlabel.training.engine import train_in
from tokenlabel.training.recipe import ModelConfig, Recipe
from tokenlabel.training.run_folder import RunImages, sound_images
from tokenlabel.training.tasks import Summary, Task

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
    try:
        return train_in(
            run, recipe, build, device=device, trackers=trackers, changed_numerics=changed_numerics
        )
    except ImageError as error:
        # Of an image that was trusted, or broke since; from a data worker it comes after its traceback.
        reason = str(error).rstrip().splitlines()[-1].rpartition("ImageError: ")[2]
        raise ImageError(
            f"{reason}; restore it (of val images: or remove it), or begin a run with --data.skip-broken, which "
            "leaves such images out"
        ) from error


@dataclass(frozen=True, slots=True)
class Counts:
    """How many training images there are, with a class of their own, and with a map of a label store."""

    images: int
    with_class: int
    with_map: int

    def __str__(self) -> str:
        return f"{self.images:,} images, {self.with_class:,} with a class, {self.with_map:,} with a label map"


@dataclass(eq=False)
class ClassifierTask(Task[Recipe]):
    """A network that learns from class labels and token labels, or from one of them.

    `probe_sets`: images with classes that probes of frozen features learn from, and that they are tested on.
    """

    recipe: Recipe
    model: TokenModel
    train_set: TokenLabelDataset
    val_set: TokenLabelDataset | None
    supervision: Supervision
    device: torch.device
    counts: Counts
    token_classes: ClassList | None = None
    probe_sets: tuple[TokenLabelDataset, TokenLabelDataset] | None = None
    images: RunImages | None = None

    def __post_init__(self) -> None:
        self.class_names = self.train_set.source.class_names
        # What there is of: the accuracy, else what probes find in the features, else agreement with the teacher.
        self.metric = "top1" if self._judges_classes else "knn" if self.probe_sets else "teacher_accuracy"
        self.num_images = len(self.train_set)
        self.grid = self.model.grid_for(self.recipe.model.img_size)
        self.step = TrainStep(
            self.model,
            self.supervision,
            erase=self.recipe.erase,
            mix=self.recipe.mix,
            autocast=autocast(self.device, self.recipe.precision),
        )

    def batches(self, sampler: BatchSampler) -> Iterable[Batch]:
        """Return the augmented batches of a sampler."""
        loader = make_loader(
            self.train_set,
            sampler,
            num_workers=self.recipe.data.num_workers,
            pin_memory=self.device.type == "cuda",
        )
        return read_ahead(self.train_set.source, sampler, loader)

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

    @property
    def token_class_names(self) -> list[str]:
        """The names of what the tokens are about; numbers where nobody says them."""
        return self.class_names if self.token_classes is None else self.token_classes.labels

    @property
    def _judges_classes(self) -> bool:
        """Whether there are val images with classes that the class head may name."""
        val_set = self.val_set
        return val_set is not None and bool(self.class_names) and bool(has_classes(val_set.source).any())

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

    def summary(self) -> Summary:
        """Return what a dry run says of the task."""
        recipe, (rows, columns) = self.recipe, self.grid
        height_px, width_px = recipe.model.img_size
        tokens = f" and {self.token_classes} for the tokens" if self.token_classes is not None else ""
        classes = f"{len(self.class_names):,} classes" if self.class_names else "no classes"
        labels = (
            " + ".join(recipe.data.label_folders) if self.supervision.stored else recipe.loss.teacher.name
        )
        source = f"labels of tokens by {labels}" if self.supervision.labels_tokens else "no labels of tokens"
        return Summary(
            network=recipe.model.name,
            images=f"{self.counts}; {classes}{tokens}, {width_px} x {height_px} px",
            targets=f"{rows} x {columns} tokens; {source}",
        )

    def evaluate(
        self, model: nn.Module, ranks: Ranks, *, run: Path | None = None, **about: Any
    ) -> dict[str, Any]:
        """Return the figures of a model on the val images, and of probes; write answers and pictures into `run`."""
        assert isinstance(model, TokenModel)
        figures: dict[str, Any] = {}
        if self.probe_sets is not None:
            learn, test = (self._eval_batches(dataset, ranks) for dataset in self.probe_sets)
            names = self.probe_sets[0].source.class_names
            figures |= image_figures(model.eval(), learn, test, num_classes=len(names), ranks=ranks)
        if self.val_set is not None:
            evaluators: list[Evaluator] = [Accuracy(), Calibration()] if self._judges_classes else []
            evaluators += [TokenTruth("teacher")] if self.val_set.store is not None else []
            keys, inference = self.val_set.source.keys, self.recipe.eval.inference
            answering = Answering(shown_keys(keys), of_tokens=self.supervision.labels_tokens)
            observed = observe(
                model,
                self._eval_batches(self.val_set, ranks),
                {inference: [*evaluators, answering]},
                device=self.device,
                precision=self.recipe.precision,
                ranks=ranks,
            )
            figures |= observed[inference]
            if run is not None and ranks.is_first:
                self._write_answers(answering, model, run, **about)
        return figures

    def _write_answers(self, answering: Answering, model: TokenModel, run: Path, **about: Any) -> None:
        assert self.val_set is not None
        recipe = self.recipe
        if not self.supervision.labels_tokens and not recipe.sharded:
            answering.ask_classifier(model, recipe.model.name, autocast(self.device, recipe.precision))
        keys = self.val_set.source.keys
        answering.write(run, keys, self.class_names, self.token_class_names, **about)

    def _eval_batches(self, dataset: TokenLabelDataset, ranks: Ranks) -> Iterable[Batch]:
        """Yield this rank's part of images that are evaluated on, on the device."""
        recipe = self.recipe
        sampler = EvalBatchSampler(
            num_images=len(dataset),
            batch_size=recipe.eval.batch_size,
            rank=ranks.rank,
            world_size=ranks.world_size,
        )
        num_workers = recipe.data.num_workers if len(dataset) >= _MANY_IMAGES else 0
        loader = make_loader(dataset, sampler, num_workers=num_workers)
        for batch in read_ahead(dataset.source, sampler, loader):
            yield batch.to(self.device)


def build(recipe: Recipe, *, device: torch.device, run: Path | None = None) -> ClassifierTask:
    """Build the data, the model and the supervision of a recipe, and check that they fit together.

    `run`: the folder of the run, where an earlier start may have written down which images decode. Of several ranks the
    first one looks at images and labels.
    """
    source = _open(recipe)
    folders = recipe.data.label_folders if recipe.loss.reads_labels else []
    # Opened by the first rank for all, so that labels that are added meanwhile are seen by none.
    store = current_ranks().on_main(lambda: LabelStore(*folders)) if folders else None
    source = _with_classes(recipe, source, store)
    images = RunImages(run, source.class_names)
    source = _sound(recipe, images, "train", source, store)
    token_classes, num_missing = _token_classes(recipe, source, store), 0
    if store is not None:
        check = partial(
            check_labels, source, store, max_missing=recipe.data.max_missing, classes=token_classes
        )
        num_missing = current_ranks().on_main(check)
        newest = max((shard.generation for shard in store.shards), default=0)
        told = {"num_missing": num_missing, "annotated_again": newest or None}  # those are other labels
        images.entries["labels"] = {**told, **store.manifest.origin()}
    num_images, num_with_class = len(source), int(has_classes(source).sum())
    counts = Counts(num_images, num_with_class, num_images - num_missing if store is not None else 0)
    say(f"training images: {counts}")
    torch.manual_seed(recipe.seed)
    model = _begin(recipe.model, class_names=source.class_names, token_classes=token_classes).to(device)
    supervision = Supervision(
        loss=recipe.loss,
        stored=store is not None,
        teacher=load_online_teacher(recipe.loss.teacher, source.class_names, device),
    )
    val_set = None
    if recipe.data.val:
        sound = partial(_sound, recipe, images, "val")
        val_set = evaluation_set(recipe, class_names=source.class_names, sound=sound)
        say(describe(val_set.source, recipe.data.val or ""))
        val_set.store = _val_labels(recipe, val_set.source, token_classes)
    probes = None
    if recipe.eval.probe is not None:
        plain = EvalTransform(recipe.model.img_size, crop_fraction=recipe.eval.crop_fraction)
        probes = probe_sets(recipe.eval.probe, recipe.eval.probe_test, plain)
    transform = TrainTransform(recipe.augment, recipe.model.img_size)
    return ClassifierTask(
        recipe=recipe,
        model=model,
        train_set=TokenLabelDataset(source, transform, seed=recipe.seed, store=store),
        val_set=val_set,
        supervision=supervision,
        device=device,
        counts=counts,
        token_classes=None if token_classes.is_same(_list_of(source)) else token_classes,
        probe_sets=probes,
        images=images,
    )


def _open(recipe: Recipe) -> ImageSource:
    """Return the training images, those without classes last."""
    data = recipe.data
    source = open_aloud(data.train)
    if data.unlabelled is not None:
        source = JoinedImages(source, open_aloud(data.unlabelled, classes=False))
    if files := getattr(source, "files", None):
        remedy = "" if data.tar_window else "--data.tar-window 8 reads them a few at a time, or "
        refuse_small_cache(
            [*files.values()], at_once=data.tar_window and data.tar_window + 1 + NUM_AHEAD, remedy=remedy
        )
    streamed = getattr(source, "streamed", None)
    return source if data.tar_window is None or streamed is None else streamed()


def _with_classes(recipe: Recipe, source: ImageSource, store: LabelStore | None) -> ImageSource:
    """Return images with the classes that the class head is for.

    Images without classes leave no class head, unless the teacher labels the class token: then it is for the classes of
    the store. Raises DataError where there is nothing to learn from.
    """
    place = recipe.data.train
    if has_classes(source).any():
        refuse_single_class(source, place)
        return source
    if store is None:
        beta = "" if recipe.data.labels is None else " and loss.beta above 0"
        above = Path(place).absolute().name if Path(place).is_dir() else ""
        folder = f", or name the folder above if {above} is a class" if above else ""
        raise DataError(
            f"{place}: its images have no classes, and without labels there is nothing to learn from; let `tokenlabel "
            f"annotate` make labels and give --data.labels{beta}, or {NEED_CLASSES}{folder}"
        )
    classes = store.manifest.classes
    return (
        without_classes(source, classes.labels)
        if _takes_classes_of_maps(recipe) and not classes.words
        else source
    )


def _token_classes(recipe: Recipe, source: ImageSource, store: LabelStore | None) -> ClassList:
    """Return what the tokens are about: the classes of the images, or others in the store.

    Raises DataError for labels of a list that was meant to be that of the images and is not, ConfigError for class
    targets out of labels that are about something else, and for predictions that add up logits of two lists.
    """
    ours, loss = _list_of(source), recipe.loss
    theirs = ours if store is None else classes_of_labels(source.class_names, store)
    if theirs.is_same(ours):
        return theirs
    if _takes_classes_of_maps(recipe):
        unlike = f"not the {ours} of the images" if ours.count else "no classes"
        raise ConfigError(
            f"loss.class_target {loss.class_target} takes the classes of images from the labels, and these are about "
            f"{theirs}, {unlike}; leave it at truth"
        )
    if recipe.eval.inference is not Inference.CLASS:
        raise ConfigError(
            f"eval.inference {recipe.eval.inference} takes token and class token to be about one list of classes, and "
            f"they are about {theirs} and {ours}; give --eval.inference class"
        )
    return theirs


def _takes_classes_of_maps(recipe: Recipe) -> bool:
    """Say whether the class token learns what a store's maps say of the images."""
    return recipe.loss.class_target is not ClassTarget.TRUTH and not recipe.loss.has_online_teacher


def _list_of(source: ImageSource) -> ClassList:
    return ClassList(len(source.class_names), tuple(source.class_names))


def _val_labels(recipe: Recipe, source: ImageSource, token_classes: ClassList) -> LabelStore | None:
    """Return the labels of the val images. Raises ConfigError where nothing could be held against the model."""
    folders = recipe.eval.label_folders
    if folders:
        store = current_ranks().on_main(lambda: LabelStore(*folders))
        current_ranks().on_main(lambda: check_labels(source, store, max_missing=1.0, classes=token_classes))
        return store
    if not has_classes(source).any():
        raise ConfigError(
            f"{recipe.data.val}: without classes and without labels nothing can be said of these images; give "
            "--eval.labels, made by the head that labelled the training images, or leave data.val out (--eval.probe "
            "takes a few images with classes)"
        )
    return None


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
            among = np.flatnonzero(~labelled.holds(source.keys)).tolist()
        return find_broken(source, check, among)

    names, known = source.class_names, has_classes(source)
    classes = [names[i] if has else "" for i, has in zip(source.class_ids, known, strict=True)]
    found = partial(
        images.broken,
        split,
        source.keys,
        classes if known.any() else [],
        check=f"{check}, but for images with labels" if labelled else check.value,
        find=find,
    )
    option = "--data.skip-broken"
    return sound_images(source, skip_broken=skip_broken, check=check, option=option, find=found)


def _begin(config: ModelConfig, *, class_names: list[str], token_classes: ClassList) -> TokenModel:
    """Return the model as it is before the first step."""
    model = create_model(
        config.name,
        num_classes=len(class_names),
        num_token_classes=token_classes.count,
        img_size=config.img_size,
        **config.options,
    )
    if config.weights is not None:
        rows = partial(_rows, config.weights, class_names)
        others = read_description(config.weights).get("token_classes")
        ours = (
            None if token_classes.is_same(ClassList(len(class_names), tuple(class_names))) else token_classes
        )
        theirs = others and ClassList.from_dict(others)
        tokens = "classes" if ours is None and theirs is None else "other"
        if ours is not None and theirs is not None and ours.is_same(theirs):
            tokens = "same"
        load_published(model, config.weights, average=config.average, rows=rows, tokens=tokens)
    model.freeze(config.frozen_layers)
    for parameter in model.parameters():  # convolutions run faster so
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return model


def _rows(path: str, class_names: list[str], count: int) -> dict[int, int]:
    """Return which row of the heads in a file each class has, by the names that it states, else by ImageNet's."""
    stated = read_class_names(path)
    theirs = stated if len(stated) == count else () if stated else imagenet_names(count)
    rows = {row: i for row, i in enumerate(ids_among(class_names, theirs)) if i >= 0}
    if stated and not rows and count == len(class_names):
        unlike = difference(theirs, class_names, count=count, them="the file")
        say(f"{path}: {unlike}: its heads begin with what they knew of the others")
    return rows
