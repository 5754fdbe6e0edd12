"""From an image source to batches: the data set and the loader.

A sample is a function of (seed, epoch, index) and a batch one of (seed, step), whatever the number of worker
processes or ranks. No random state exists that could be lost, so a run resumes at any step by asking for it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import partial
from os import PathLike
from typing import Any, Protocol, SupportsIndex, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torch.utils.data._utils.collate import default_collate_fn_map  # where PyTorch wants new types entered

from tokenlabel.core.batch import Batch, Sample, collate_score_maps
from tokenlabel.core.geometry import View, stack_views
from tokenlabel.core.scores import Kind, Orientation, ScoreMap, turned_map, unknown_map
from tokenlabel.data.classes import ClassList, difference, ids_among, say_order
from tokenlabel.data.decoding import decode_pixels, orientation_of
from tokenlabel.data.images import ImageSource, has_classes
from tokenlabel.data.samplers import FOR_SAMPLE, BatchSampler, EvalBatchSampler
from tokenlabel.data.workers import prepare_worker, process_context, say_crowded, stack_shared
from tokenlabel.runtime.coercion import COUNT, NATURAL, check_number, check_several, coerced
from tokenlabel.runtime.errors import DataError
from tokenlabel.runtime.process import listed, say

Transform = Callable[[NDArray[np.uint8], np.random.Generator], tuple[NDArray[np.uint8], View]]
"""From RGB pixels [h, w, 3] and a source of randomness to pixels [height, width, 3] and the view that they show."""

_SETTLED = "class_names in their manifest.json would settle it"

SampleIndex = SupportsIndex | tuple[SupportsIndex, SupportsIndex]
"""What names a sample: the index of an image, or an epoch and the index."""


@runtime_checkable
class ScoreMaps(Protocol):
    """Score maps by the keys of images, such as a label store. It must pickle, and cheaply.

    They lie on upright images, unless a `manifest` says `orientation: stored`.
    """

    def __getitem__(self, key: str, /) -> ScoreMap:
        """Return the score map of an image."""
        ...


@runtime_checkable
class CheckableLabels(ScoreMaps, Protocol):
    """A label store: score maps, which of them there are, and a manifest that says what they are about."""

    @property
    def manifest(self) -> Any:
        """Describes the labels; has `num_classes` and `class_names`, and may have `classes` (a `ClassList`)."""
        ...

    def __contains__(self, key: str, /) -> bool:
        """Return whether there is a score map for an image."""
        ...


class TokenLabelDataset(Dataset[Sample]):
    """Augmented images with the score maps of their sources, as a function of (seed, epoch, index).

    `dataset[epoch, index]` draws every random number of a sample anew from these three. `store` maps keys to
    score maps; an image that a label store lacks has a map that says nothing. `num_classes` is of the images,
    `num_token_classes` of the score maps (`token_classes`), which may be about others. Raises DataError for a store
    that names the images' classes in another order, or some of them, and ImageError for an image that does not decode.
    A subclass that changes samples overrides `__getitems__`, which makes them all: the data
    loader asks for whole batches and nothing else.

    `dataset[index]` takes the epoch from the last `set_epoch`, so that any sampler and a plain `DataLoader` do.

    >>> transform = tl.TrainTransform(tl.AugmentConfig(), 32)
    >>> dataset = tl.TokenLabelDataset(tl.open_images("images"), transform, store=tl.LabelStore("labels"))
    >>> batch = next(iter(torch.utils.data.DataLoader(dataset, batch_size=4, collate_fn=tl.collate)))
    >>> batch.images.shape
    torch.Size([4, 3, 32, 32])
    """

    def __init__(
        self, source: ImageSource, transform: Transform, *, seed: int = 0, store: ScoreMaps | None = None
    ) -> None:
        for name, value, opened_by in (("source", source, "open_images"), ("store", store, "LabelStore")):
            if isinstance(value, (str, PathLike, list, tuple)):
                raise ValueError(f"{name}: expected what tokenlabel.{opened_by}(...) returns, got {value!r}")
        if not hasattr(source, "class_ids"):  # a dataset of another library, say, perhaps one that streams
            raise ValueError(
                f"source: expected what tokenlabel.open_images(...) returns, got {type(source).__name__}; datasets of "
                "Hugging Face are opened by name (hf-dataset:NAME:SPLIT), with an index, not streamed"
            )
        if not callable(transform):
            raise ValueError(f"transform: expected a TrainTransform or an EvalTransform, got {transform!r}")
        seed = coerced(seed, int, name="seed")
        check_number(seed, COUNT, name="seed")
        # In memory that data workers share, however they were started: the epoch, and how many samples were drawn by
        # their index alone while nobody had set one (-1: somebody has, or the line about it is out).
        self._clock = torch.zeros(2, dtype=torch.int64).share_memory_()
        self.source, self.transform, self.seed, self.store = source, transform, seed, store
        self._num_images, self.num_classes = len(source), len(source.class_names)
        self._has_class = has_classes(source)
        self._labels = store if isinstance(store, CheckableLabels) else None
        names = source.class_names
        self.token_classes = ClassList.of(names)
        if self._labels is not None:
            self.token_classes = classes_of_labels(names, self._labels, aloud=False)
        self.num_token_classes = self.token_classes.count

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._clock.share_memory_()  # it still is in a worker; a copy or one that was unpickled has its own

    def set_epoch(self, epoch: SupportsIndex) -> None:
        """Set the epoch of `dataset[index]` in this process and in its data workers; call it before each epoch.

        Without it the augmentations of every epoch are the same. (A `BatchSampler` names the epoch of each image
        itself, and a `DistributedSampler` has a `set_epoch` of its own, to be called as well.)
        """
        number = coerced(epoch, int, name="epoch")
        check_number(number, COUNT, name="epoch")
        self._clock.copy_(torch.tensor([number, -1]))

    def _with_epochs(self, indices: Sequence[SampleIndex]) -> list[tuple[int, int]]:
        """Return epoch and index of each; negative indices count from the end. Raises IndexError beyond it."""
        now, num_drawn = self._clock.tolist()
        pairs = [index if isinstance(index, tuple) else (now, index) for index in indices]
        places = range(self._num_images)
        try:
            found = [(operator.index(epoch), places[operator.index(index)]) for epoch, index in pairs]
        except IndexError as error:  # by which loops over a data set end
            raise IndexError(
                f"index {', '.join(map(repr, indices))}: the data set has {self._num_images:,} images"
            ) from error
        except (TypeError, ValueError) as error:
            raise ValueError(
                "index: expected the number of an image, or a pair of epoch and number, got "
                f"{', '.join(map(repr, indices))}; for several: [dataset[i] for i in range(8)]"
            ) from error
        if num_drawn >= 0 and found:
            num_drawn += sum(not isinstance(index, tuple) for index in indices)
            self._clock[1] = num_drawn if num_drawn <= len(self) else -1
            if num_drawn > len(self) and self._draws(found[0][1]):  # not in evaluation
                say(
                    "dataset: images come again, augmented as before, since set_epoch was never called; call "
                    "dataset.set_epoch(epoch) at the start of each epoch"
                )
        return found

    def _draws(self, index: int) -> bool:
        """Return whether the transform draws random numbers for an image."""
        rng = np.random.default_rng(0)
        before = rng.bit_generator.state
        self.transform(decode_pixels(self.source.read(index), self.source.keys[index]), rng)
        return rng.bit_generator.state != before

    def __getitem__(self, index: SampleIndex) -> Sample:
        (sample,) = self.__getitems__([index])
        return sample

    def __getitems__(self, indices: Sequence[SampleIndex]) -> list[Sample]:
        """Return the samples of a batch (the data loader calls this), by indices or pairs of epoch and index."""
        epochs_and_indices = self._with_epochs(indices)
        images = [self._image(epoch, index) for epoch, index in epochs_and_indices]
        # All labels after all images: decoding evicts the CPU caches, and a label right after it takes twice as long.
        return [
            Sample(
                image=torch.from_numpy(pixels).permute(2, 0, 1),
                class_id=int(self.source.class_ids[index]),
                num_classes=self.num_classes,
                view=view,
                score_map=self._score_map(self.source.keys[index], orientation),
                key=self.source.keys[index],
                has_class=bool(self._has_class[index]),
            )
            for (_, index), (pixels, view, orientation) in zip(epochs_and_indices, images, strict=True)
        ]

    def _image(self, epoch: int, index: int) -> tuple[NDArray[np.uint8], View, int]:
        """Return augmented pixels, their view, and the orientation that the image's map lies in."""
        rng, data = np.random.default_rng((self.seed, FOR_SAMPLE, epoch, index)), self.source.read(index)
        pixels, view = self.transform(decode_pixels(data, self.source.keys[index]), rng)
        manifest = getattr(self.store, "manifest", None)
        is_stored = getattr(manifest, "orientation", None) == Orientation.STORED
        return pixels, view, orientation_of(data) if is_stored else 1

    def _score_map(self, key: str, orientation: int) -> ScoreMap | None:
        """Return the upright score map of an image, of one without a label a map that says nothing."""
        if self._labels is not None and key not in self._labels:
            manifest = self._labels.manifest
            return unknown_map(manifest.num_classes, kind=getattr(manifest, "kind", Kind.PROBABILITIES))
        return None if self.store is None else turned_map(self.store[key], orientation)

    def __len__(self) -> int:
        """Return how many images there are."""
        return self._num_images


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples of one size and one list of classes. Either all have a score map or none has.

    >>> dataset = tl.TokenLabelDataset(tl.open_images("images"), tl.EvalTransform(32))
    >>> batch = tl.collate([dataset[0, index] for index in range(8)])
    >>> batch.images.shape, batch.class_ids
    (torch.Size([8, 3, 32, 32]), tensor([0, 0, 0, 0, 1, 1, 1, 1]))
    """
    check_several(samples, Sample, name="samples", made_by="dataset[index]")
    score_maps = [sample.score_map for sample in samples if sample.score_map is not None]
    if score_maps and len(score_maps) < len(samples):
        raise DataError(f"{len(samples) - len(score_maps)} of the {len(samples)} samples of a batch have no score map")
    if len(counts := sorted({sample.num_classes for sample in samples})) > 1:
        raise DataError(
            f"samples of {' and '.join(map(str, counts))} classes in a batch; open all images as one source"
        )
    # Channels last, as decoders write them: each image is copied into shared memory as one block.
    rows = [sample.image.permute(1, 2, 0) for sample in samples]
    pixels = torch.stack(rows) if get_worker_info() is None else stack_shared(rows)  # [B, height, width, 3]
    return Batch(
        images=pixels.permute(0, 3, 1, 2),
        class_ids=torch.tensor([sample.class_id for sample in samples]),
        has_class=torch.tensor([sample.has_class for sample in samples]),
        num_classes=samples[0].num_classes,
        views=torch.from_numpy(stack_views([sample.view for sample in samples])),
        score_maps=collate_score_maps(score_maps) if score_maps else None,
        keys=[sample.key for sample in samples],
    )


# A plain DataLoader, without a `collate_fn`, makes batches of samples, too.
default_collate_fn_map[Sample] = lambda samples, **_: collate(samples)


def classes_of_labels(class_names: Sequence[str], store: CheckableLabels, *, aloud: bool = True) -> ClassList:
    """Return what the labels in a store are about: the images' classes, or others, which is said if `aloud`.

    Raises DataError for a list that was meant to be that of the images, and is not: one that names some of them, or
    all in another order.
    """
    ours, theirs = ClassList.of(class_names), _classes_of(store)
    if theirs.is_same(ours):
        if not theirs.names and aloud:
            say_order(class_names, them="the labels'", overrule=_SETTLED)
        return ours
    common = sum(place >= 0 for place in ids_among(ours.names, theirs.names)) if not theirs.words else 0
    if common and (common < ours.count or theirs.count == ours.count):
        raise _other_classes(theirs, ours)
    if ours.count and aloud:
        say(f"tokens learn the {theirs} of the labels, the class token the {ours} of the images")
    return theirs


def _other_classes(theirs: ClassList, ours: ClassList) -> DataError:
    if theirs.words or ours.words:
        return DataError(
            f"the labels are about {theirs.described()}, not {ours.described()}; give labels by the same head"
        )
    differ = difference(theirs.names, ours.names, count=theirs.count, them="the labels")
    return DataError(f"{differ}; annotate these images, with their own classes")


def _classes_of(store: CheckableLabels) -> ClassList:
    manifest = store.manifest
    return getattr(manifest, "classes", None) or ClassList(manifest.num_classes, tuple(manifest.class_names or ()))


def check_labels(
    source: ImageSource, store: CheckableLabels, *, max_missing: float = 0.1, classes: ClassList | None = None
) -> int:
    """Return how many images have no label in a store, and say so.

    `classes`: what the labels have to be about; the images' classes if None. Raises DataError for labels of other
    classes, and for more than `max_missing` of the images, or all, without one.
    """
    ours = classes or ClassList.of(source.class_names)
    theirs = _classes_of(store)
    if not theirs.is_same(ours):
        raise _other_classes(theirs, ours)
    if not theirs.names and not theirs.words:
        say_order(source.class_names, them="the labels'", overrule=_SETTLED)
    holds = getattr(store, "holds", None)  # of a million keys at once, where a store can
    held = holds(source.keys) if holds else [key in store for key in source.keys]
    missing = [key for key, is_held in zip(source.keys, held, strict=True) if not is_held]
    said = f"{len(missing):,} of {len(source):,} images have no label in the store ({listed(missing)})"
    if len(missing) == len(source):
        raise DataError(
            f"{said}; it is empty or about others, so give the store that `tokenlabel annotate` made of these"
        )
    if len(missing) > max_missing * len(source):
        raise DataError(
            f"{said}; `tokenlabel annotate` labels what is missing and lists what it cannot label, and "
            f"--data.max-missing, now {max_missing:g}, is the share that may go without"
        )
    if missing:
        say(f"{said}: their tokens learn from nothing")
    return len(missing)


class _Loader(DataLoader[Any]):
    def check_worker_number_rationality(self) -> None:
        """Print one line where PyTorch warns, twice and at length."""
        say_crowded(self.num_workers)


def make_loader(
    dataset: Dataset[Any],
    batches: BatchSampler | EvalBatchSampler,
    *,
    num_workers: int,
    pin_memory: bool = False,
    prefetch: int = 4,
    collate_fn: Callable[[Any], Any] = collate,
) -> DataLoader[Any]:
    """Return a loader of `Batch`es, or of what `collate_fn` makes of samples; with 0 workers they are made here.

    Workers stay alive between iterations and each prepares `prefetch` batches ahead. They are started from a
    clean server process ("forkserver"; "spawn" where there is none): forking a process with threads or CUDA
    may deadlock. As always then, a script that makes a loader needs `if __name__ == "__main__":` around its
    start.

    >>> dataset = tl.TokenLabelDataset(tl.open_images("images"), tl.TrainTransform(tl.AugmentConfig(), 32))
    >>> batches = tl.BatchSampler(num_images=8, batch_size=4, seed=0, num_steps=3)
    >>> [len(batch.images) for batch in tl.make_loader(dataset, batches, num_workers=0)]
    [4, 4, 4]
    """
    check_number(num_workers, COUNT, name="num_workers")
    check_number(prefetch, NATURAL, name="prefetch")
    return _Loader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate_fn,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        prefetch_factor=prefetch if num_workers else None,
        multiprocessing_context=process_context() if num_workers else None,
        worker_init_fn=partial(prepare_worker, prefetch=prefetch),
        generator=torch.Generator(),  # a loader without one of its own draws from the global one
    )
