"""Open and check the training and validation data of a classifier's recipe: images, classes and labels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from tokenlabel.core.config import ClassTarget, Inference
from tokenlabel.data.batches import TokenLabelDataset, check_labels, classes_of_labels
from tokenlabel.data.classes import ClassList
from tokenlabel.data.decoding import ImageCheck, find_broken
from tokenlabel.data.folders import NEED_CLASSES
from tokenlabel.data.images import ImageSource, JoinedImages, describe, has_classes, without_classes
from tokenlabel.data.sources import open_aloud, refuse_single_class
from tokenlabel.evaluation.assessment import evaluation_set
from tokenlabel.labels.fingerprints import say_replaced
from tokenlabel.labels.store import LabelStore
from tokenlabel.runtime.cache import NUM_AHEAD, refuse_small_cache
from tokenlabel.runtime.distributed import current_ranks
from tokenlabel.runtime.errors import ConfigError, DataError
from tokenlabel.runtime.process import say
from tokenlabel.training.recipe import Recipe
from tokenlabel.training.run_images import RunImages, sound_images


@dataclass(frozen=True, eq=False)
class TrainingData:
    """Training images that decode, and their labels.

    `token_classes`: the classes of the tokens, those of the images or others in the `store`. `counts`: "N images, ...",
    for messages. `images`: what the run folder records about them.
    """

    source: ImageSource
    store: LabelStore | None
    token_classes: ClassList
    counts: str
    images: RunImages

    @property
    def other_token_classes(self) -> ClassList | None:
        """The classes of the tokens if they differ from the images', else None."""
        return None if self.token_classes.is_same(class_list(self.source)) else self.token_classes


def open_training_data(recipe: Recipe, run: Path | None) -> TrainingData:
    """Return the training images and labels of a recipe, and print how many there are.

    `run`: the run folder, where an earlier start may have recorded which images decode. The first rank checks images
    and labels for all. Raises ValueError for data that cannot be trained on.
    """
    source = _open(recipe)
    folders = recipe.data.label_folders if recipe.loss.reads_labels else []
    # Opened on the first rank and sent to all: labels may be added meanwhile, and all ranks must see the same ones.
    store = current_ranks().on_main(lambda: LabelStore(*folders)) if folders else None
    source = _with_classes(recipe, source, store)
    images = RunImages(run, source.class_names)
    source = _sound(recipe, images, "train", source, store)
    token_classes, num_missing = _token_classes(recipe, source, store), 0
    if store is not None:
        most = recipe.data.max_missing
        check = partial(check_labels, source, store, max_missing=most, classes=token_classes)
        num_missing = current_ranks().on_main(check)
        current_ranks().on_main(lambda: say_replaced(store, source))
        current_ranks().on_main(lambda: images.note_labels(store, source.keys, num_missing=num_missing))
    num_with_map = len(source) - num_missing if store is not None else 0
    num_with_class = int(has_classes(source).sum())
    counts = f"{len(source):,} images, {num_with_class:,} with a class, {num_with_map:,} with a label map"
    say(f"training images: {counts}")
    return TrainingData(source, store, token_classes, counts, images)


def open_val_set(recipe: Recipe, data: TrainingData) -> TokenLabelDataset | None:
    """Return the val images of a recipe and their labels, if it names some; None without val images."""
    if not recipe.data.val:
        return None
    sound = partial(_sound, recipe, data.images, "val")
    val_set = evaluation_set(recipe, class_names=data.source.class_names, sound=sound)
    say(describe(val_set.source, recipe.data.val))
    val_set.store = _val_labels(recipe, val_set.source, data.token_classes)
    return val_set


def _open(recipe: Recipe) -> ImageSource:
    """Return the training images; those of `data.unlabelled` come last."""
    data = recipe.data
    source = open_aloud(data.train)
    if data.unlabelled is not None:
        source = JoinedImages(source, open_aloud(data.unlabelled, classes=False))
    if files := getattr(source, "files", None):
        remedy = "" if data.tar_window else "--data.tar-window 8 reads them a few at a time, or "
        refuse_small_cache(
            [*files.values()], at_once=data.tar_window and data.tar_window + 1 + NUM_AHEAD, remedy=remedy
        )
    # With a window, tar files are read one after the other, without jumping to single images.
    streamed = getattr(source, "streamed", None)
    return source if data.tar_window is None or streamed is None else streamed()


def _with_classes(recipe: Recipe, source: ImageSource, store: LabelStore | None) -> ImageSource:
    """Return images with the classes of the class head.

    If no image has a class, there is no class head, unless the store labels the class token: then its classes are the
    store's. Raises DataError if there is nothing to learn from.
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
    return without_classes(source, classes.labels) if _takes_classes_of_maps(recipe) and not classes.words else source


def _token_classes(recipe: Recipe, source: ImageSource, store: LabelStore | None) -> ClassList:
    """Return the classes of the tokens: those of the images, or others in the store.

    Raises DataError for labels whose classes almost match those of the images, ConfigError for class targets from
    labels of other classes, and for inference that adds logits of different classes.
    """
    ours, loss = class_list(source), recipe.loss
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
    """Return True if the targets of the class token come from a store's maps."""
    return recipe.loss.class_target is not ClassTarget.TRUTH and not recipe.loss.has_online_teacher


def class_list(source: ImageSource) -> ClassList:
    """Return the classes of images."""
    return ClassList.of(source.class_names)


def _val_labels(recipe: Recipe, source: ImageSource, token_classes: ClassList) -> LabelStore | None:
    """Return the labels of the val images. Raises ConfigError if they have neither labels nor classes."""
    folders = recipe.eval.label_folders
    if folders and not recipe.uses_token_labels:
        untrained = "eval.labels: the token head is not trained, so it is not compared with them"
        if not has_classes(source).any():
            raise ConfigError(f"{untrained}, and {recipe.data.val} has no classes; leave data.val out")
        say(untrained)
    elif folders:
        store = current_ranks().on_main(lambda: LabelStore(*folders))
        current_ranks().on_main(lambda: check_labels(source, store, max_missing=1.0, classes=token_classes))
        current_ranks().on_main(lambda: say_replaced(store, source))
        return store
    if not has_classes(source).any():
        raise ConfigError(
            f"{recipe.data.val}: without labels, evaluation needs classes, of these images and of the training images; "
            "give --eval.labels, made by the head that labelled those, or leave data.val out (--eval.probe takes a few "
            "images with classes)"
        )
    return None


def _sound(
    recipe: Recipe, images: RunImages, split: str, source: ImageSource, store: LabelStore | None = None
) -> ImageSource:
    """Return the images that decode, by an earlier start of the run or by the teacher that labelled them."""
    check, skip_broken = recipe.data.check, recipe.data.skip_broken
    # With skip_broken all images are decoded again: some may have broken since they were labelled.
    trusts_labels = check is ImageCheck.AUTO and not skip_broken
    labelled = store if store and trusts_labels and store.manifest.saw_images else None

    def _find(among: list[int] | None) -> list[int]:
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
        find=_find,
    )
    option = "--data.skip-broken"
    return sound_images(source, skip_broken=skip_broken, check=check, option=option, find=found)
