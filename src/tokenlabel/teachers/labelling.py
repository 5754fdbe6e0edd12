"""The pipeline from images to records: threads decode ahead of the teacher and pack behind it, so it never waits."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from torch import Tensor

from tokenlabel.core.geometry import OPPOSITE, Box
from tokenlabel.core.scores import Orientation, from_top, turned_map
from tokenlabel.data.decoding import decode_image, orientation_of
from tokenlabel.data.images import ImageSource
from tokenlabel.labels.manifest import Failure, Manifest
from tokenlabel.labels.store import LabelStore
from tokenlabel.labels.writer import pack_for
from tokenlabel.runtime.errors import DataError, ImageError, StoreError
from tokenlabel.runtime.process import T, ahead, say, thread_pool
from tokenlabel.teachers.input import TeacherInput
from tokenlabel.teachers.masks import MaskTeacher
from tokenlabel.teachers.networks import Teacher

# At most so many images (or four batches) wait for others of their shape: photographs have a few dozen shapes.
MAX_WAITING_IMAGES = 256

# At most so many score maps wait to be packed.
NUM_PACKED_AHEAD = 1024


@dataclass(frozen=True, eq=False)
class TeacherImage:
    """An image as its teacher sees it: pixels [height, width, 3], and the region of the image that they show.

    `orientation`: the EXIF orientation of its file, 1 to 8.
    """

    key: str
    pixels: NDArray[np.uint8]
    region: Box
    orientation: int = 1


@dataclass(frozen=True, eq=False)
class Labelling:
    """A teacher, the images that it labels, and how.

    `num_workers`: threads that decode, and as many that pack. `strict`: raise if an image does not decode; by default
    it is added to `failures`. `cells`: counts `all` cells, and the `empty` ones, which keep no class.
    """

    teacher: Teacher | MaskTeacher
    source: ImageSource
    manifest: Manifest
    device: torch.device
    batch_size: int
    num_workers: int
    strict: bool
    failures: list[Failure] = field(default_factory=list)
    cells: Counter[str] = field(default_factory=Counter)

    def labels(self, indices: Sequence[int]) -> Iterator[tuple[str, bytes]]:
        """Yield the key and the record of each image that can be labelled, in no particular order."""
        failures = None if self.strict else self.failures
        if isinstance(self.teacher, MaskTeacher):
            with thread_pool(self.num_workers) as pool:
                masks = partial(_from_mask, self.teacher, self.source, self.manifest, self.strict)
                yield from _without_failures(ahead(pool, masks, indices, 2 * self.batch_size), failures)
            return
        sizes = {"batch_size": self.batch_size, "num_workers": self.num_workers}
        batches = seen_batches(self.source, self.teacher.input, indices, **sizes, failures=failures)
        yield from label_batches(
            self.teacher, batches, self.manifest, device=self.device, num_workers=self.num_workers, cells=self.cells
        )

    def changed_masks(self, store: LabelStore, indices: Sequence[int]) -> list[int]:
        """Return the labelled images whose masks are not those that the labels were made of; none for a network."""
        if not isinstance(self.teacher, MaskTeacher):
            return []
        with thread_pool(self.num_workers) as pool:
            masks = partial(_from_mask, self.teacher, self.source, self.manifest, False)
            made = ahead(pool, masks, indices, 2 * self.batch_size)
            return [index for index, item in zip(indices, made, strict=True) if _differs(store, item)]


def seen_batches(
    source: ImageSource,
    input: TeacherInput,
    indices: Sequence[int],
    *,
    batch_size: int,
    num_workers: int,
    failures: list[Failure] | None,
) -> Iterator[list[TeacherImage]]:
    """Yield images as a teacher sees them, in batches of one shape, decoded ahead by threads.

    Images that do not decode are added to `failures`; if that is None, the first one raises ImageError.
    """
    with thread_pool(num_workers) as pool:
        seen = ahead(pool, partial(_see, source, input, failures is None), indices, 2 * batch_size)
        yield from by_shape(_without_failures(seen, failures), batch_size)


def as_tensor(seen: Sequence[TeacherImage], device: torch.device) -> UInt8[Tensor, "B 3 height width"]:
    """Return images of one shape on a device. Copies from pinned memory, so that a GPU is not waited for."""
    images = torch.from_numpy(np.stack([item.pixels for item in seen])).permute(0, 3, 1, 2)
    return (images.pin_memory() if device.type == "cuda" else images).to(device, non_blocking=True)


def label_batches(
    teacher: Teacher,
    batches: Iterable[list[TeacherImage]],
    manifest: Manifest,
    *,
    device: torch.device,
    num_workers: int,
    cells: Counter[str],
) -> Iterator[tuple[str, bytes]]:
    """Yield the key and the record of each image, packed by threads while the teacher continues.

    Adds to `cells`, see `Labelling`.
    """

    def counted() -> Iterator[_Scored]:
        for scored in _scored(teacher, batches, manifest.topk, device):
            highest = scored[2][:, :, 0]  # classes are sorted by probability
            cells.update({"all": highest.size, "empty": int((highest == 0).sum())})
            yield scored

    with thread_pool(num_workers) as pool:
        yield from ahead(pool, partial(_packed, manifest), counted(), NUM_PACKED_AHEAD)


def _without_failures(items: Iterable[T | Failure], failures: list[Failure] | None) -> Iterator[T]:
    for item in items:
        if isinstance(item, Failure):
            assert failures is not None
            failures.append(item)
        else:
            yield item


def _from_mask(
    teacher: MaskTeacher, source: ImageSource, manifest: Manifest, strict: bool, index: int
) -> tuple[str, bytes] | Failure:
    key = source.keys[index]
    with suppress(ImageError):
        source.read(index)  # for the fingerprint: the label belongs to the image, though it is made from the mask
    try:
        score_map = teacher.score_map(key, manifest.topk)
        if manifest.orientation == Orientation.STORED:
            score_map = turned_map(score_map, OPPOSITE[orientation_of(source.read(index))])
    except (DataError, ImageError) as error:  # other ValueErrors are ids of no class: then the class list is wrong
        if strict:
            raise
        return Failure(key, str(error))
    return key, pack_for(manifest, key, score_map)


def _differs(store: LabelStore, made: tuple[str, bytes] | Failure) -> bool:
    """Return True if a store holds another record of an image, False if it cannot be told."""
    try:
        return not isinstance(made, Failure) and store.packed(made[0]) != made[1]
    except StoreError:  # a damaged record
        return False


def _see(source: ImageSource, input: TeacherInput, strict: bool, index: int) -> TeacherImage | Failure:
    key = source.keys[index]
    try:
        data = source.read(index)
        image = decode_image(data, key)
    except ImageError as error:
        if strict:
            raise
        return Failure(key, str(error))
    return TeacherImage(key, *input.of(image), orientation_of(data))


def by_shape(items: Iterable[TeacherImage], batch_size: int) -> Iterator[list[TeacherImage]]:
    """Yield batches of images of one shape; smaller ones at the end, and if too many images wait for others."""
    waiting: dict[tuple[int, ...], list[TeacherImage]] = {}
    num_waiting, max_waiting = 0, max(MAX_WAITING_IMAGES, 4 * batch_size)
    for item in items:
        batch = waiting.setdefault(item.pixels.shape, [])
        batch.append(item)
        num_waiting += 1
        if num_waiting >= max_waiting:  # there are too many shapes: the largest batch goes as it is
            batch = max(waiting.values(), key=len)
        if len(batch) >= batch_size or num_waiting >= max_waiting:
            num_waiting -= len(batch)
            yield waiting.pop(batch[0].pixels.shape)
    yield from waiting.values()


_Scored = tuple[TeacherImage, NDArray[np.int64], NDArray[np.float32]]
"""An image, and class ids and probabilities [h, w, K] of its locations."""


def _scored(
    teacher: Teacher, batches: Iterable[list[TeacherImage]], topk: int, device: torch.device
) -> Iterator[_Scored]:
    """Yield the most probable classes of each image; print at the start how well the locations fit the whole image."""
    pending: deque[tuple[list[TeacherImage], Tensor, Tensor, torch.cuda.Event | None]] = deque()
    for number, seen in enumerate(batches):
        with torch.inference_mode():
            images = as_tensor(seen, device)
            if number == 0:  # eight images show it, and cost little
                say(teacher.check(images[:8]))
            pending.append((seen, *_on_cpu(*teacher.top(images, topk))))
        # One batch behind: while this thread waits for the results of a batch, the GPU works on the next one.
        if len(pending) > 1:
            yield from _arrived(*pending.popleft())
    for batch in pending:
        yield from _arrived(*batch)


def _on_cpu(class_ids: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, torch.cuda.Event | None]:
    """Start copying results to the CPU; return them and the event of their arrival."""
    if class_ids.device.type != "cuda":
        return class_ids, probs, None
    landing = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in (class_ids, probs)]
    for target, result in zip(landing, (class_ids, probs), strict=True):
        target.copy_(result, non_blocking=True)
    arrived = torch.cuda.Event()
    # On the stream of the results' GPU: by default an event is recorded on the current GPU, which may be another.
    arrived.record(torch.cuda.current_stream(class_ids.device))
    return landing[0], landing[1], arrived


def _arrived(
    seen: list[TeacherImage], class_ids: Tensor, probs: Tensor, arrived: torch.cuda.Event | None
) -> Iterator[_Scored]:
    if arrived is not None:
        arrived.synchronize()
    yield from zip(seen, class_ids.numpy(), probs.numpy(), strict=True)


def _packed(manifest: Manifest, scored: _Scored) -> tuple[str, bytes]:
    """Return key and record of an image. Raises ValueError that names the image if scores are not finite."""
    seen, class_ids, probs = scored
    score_map = from_top(class_ids, probs, num_classes=manifest.num_classes, region=seen.region, name=seen.key)
    if manifest.orientation == Orientation.STORED:
        score_map = turned_map(score_map, OPPOSITE[seen.orientation])
    return seen.key, pack_for(manifest, seen.key, score_map)
