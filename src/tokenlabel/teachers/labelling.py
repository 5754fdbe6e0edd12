"""The way of images through a teacher: decoded ahead of it, packed behind it, so that it waits for neither."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from numpy.typing import NDArray
from torch import Tensor

from tokenlabel.core.geometry import OPPOSITE, Box
from tokenlabel.core.scores import Orientation, from_top, turned_map
from tokenlabel.data.decoding import decode_image, orientation_of
from tokenlabel.data.images import ImageSource
from tokenlabel.labels.manifest import Failure, Manifest
from tokenlabel.labels.writer import pack_for
from tokenlabel.runtime.errors import DataError, ImageError
from tokenlabel.runtime.process import ahead, say, thread_pool
from tokenlabel.teachers.input import TeacherInput
from tokenlabel.teachers.masks import MaskTeacher
from tokenlabel.teachers.networks import Teacher

S = TypeVar("S")
T = TypeVar("T")

# Images that wait for others of their shape at the most, or four batches: photographs have a few dozen shapes.
MAX_WAITING_IMAGES = 256

# Score maps that may wait to be packed while the teacher goes on.
NUM_PACKED_AHEAD = 1024


@dataclass(frozen=True, eq=False)
class TeacherImage:
    """An image as its teacher sees it: pixels [height, width, 3], and the part of the image that they show.

    `orientation`: the tag of its file.
    """

    key: str
    pixels: NDArray[np.uint8]
    region: Box
    orientation: int = 1


@dataclass(frozen=True, eq=False)
class Labelling:
    """Who labels which images, how. `num_workers`: threads that decode, and as many that pack.

    `strict`: raise for an image that does not decode; by default it is added to `failures`. `cells`: counts
    `all` of them, and the `empty` ones, which keep no class.
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
        """Yield the key and the record of each image that has a label, in no particular order."""
        if isinstance(self.teacher, MaskTeacher):
            with thread_pool(self.num_workers) as pool:
                masks = partial(_from_mask, self.teacher, self.source, self.manifest, self.strict)
                yield from _sound(ahead(pool, masks, indices, 2 * self.batch_size), self.failures)
            return
        batches = seen_batches(
            self.source,
            self.teacher.input,
            indices,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            strict=self.strict,
            failures=self.failures,
        )
        yield from label_batches(
            self.teacher, batches, self.manifest, device=self.device, num_workers=self.num_workers, cells=self.cells
        )


def seen_batches(
    source: ImageSource,
    input: TeacherInput,
    indices: Sequence[int],
    *,
    batch_size: int,
    num_workers: int,
    strict: bool,
    failures: list[Failure],
) -> Iterator[list[TeacherImage]]:
    """Yield images as a teacher sees them in batches of one shape, decoded ahead by threads; add to the failures."""
    with thread_pool(num_workers) as pool:
        seen = ahead(pool, partial(_see, source, input, strict), indices, 2 * batch_size)
        yield from by_shape(_sound(seen, failures), batch_size)


def as_tensor(seen: Sequence[TeacherImage], device: torch.device) -> UInt8[Tensor, "B 3 height width"]:
    """Return images of one shape on a device, without waiting for a GPU."""
    images = torch.from_numpy(np.stack([item.pixels for item in seen])).permute(0, 3, 1, 2)
    return (images.pin_memory() if device.type == "cuda" else images).to(device, non_blocking=True)


def _sound(items: Iterable[T | Failure], failures: list[Failure]) -> Iterator[T]:
    """Yield what is no failure, and add the others to the failures."""
    for item in items:
        if isinstance(item, Failure):
            failures.append(item)
        else:
            yield item


def label_batches(
    teacher: Teacher,
    batches: Iterable[list[TeacherImage]],
    manifest: Manifest,
    *,
    device: torch.device,
    num_workers: int,
    cells: Counter[str],
) -> Iterator[tuple[str, bytes]]:
    """Yield the key and the record of each image of batches, packed by threads while the teacher goes on.

    Adds to `cells`, see `Labelling`.
    """

    def counted(batch: _Scored) -> Iterator[tuple[TeacherImage, NDArray[np.int64], NDArray[np.float32]]]:
        for seen, class_ids, probs in batch.images():
            highest = probs[:, :, 0]  # the most probable class comes first
            cells.update({"all": highest.size, "empty": int((highest == 0).sum())})
            yield seen, class_ids, probs

    with thread_pool(num_workers) as pool:
        scored = _one_behind(_scored(teacher, batches, manifest.topk, device))
        images = (item for batch in scored for item in counted(batch))
        yield from ahead(pool, partial(_packed, manifest), images, NUM_PACKED_AHEAD)


def _from_mask(
    teacher: MaskTeacher, source: ImageSource, manifest: Manifest, strict: bool, index: int
) -> tuple[str, bytes] | Failure:
    """Return the record of an image's mask. Raises ValueError for ids that are no class; if `strict`, for any."""
    key = source.keys[index]
    with suppress(ImageError):
        source.read(index)  # for its fingerprint: the label is made of the mask, but belongs to this image
    try:
        score_map = teacher.score_map(key, manifest.topk)
        if manifest.orientation == Orientation.STORED:
            score_map = turned_map(score_map, OPPOSITE[orientation_of(source.read(index))])
    except (DataError, ImageError) as error:  # not for ids that are no class: then the class list is wrong
        if strict:
            raise
        return Failure(key, str(error))
    return key, pack_for(manifest, key, score_map)


def _see(source: ImageSource, input: TeacherInput, strict: bool, index: int) -> TeacherImage | Failure:
    """Decode an image and show it to a teacher. Raises ImageError if it does not decode, if `strict`."""
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
    """Yield batches of images of one shape; smaller ones at the end, and where many shapes wait for company."""
    waiting: dict[tuple[int, ...], list[TeacherImage]] = {}
    num_waiting, max_waiting = 0, max(MAX_WAITING_IMAGES, 4 * batch_size)
    for item in items:
        batch = waiting.setdefault(item.pixels.shape, [])
        batch.append(item)
        num_waiting += 1
        if num_waiting >= max_waiting:  # of too many shapes: the fullest batch goes as it is
            batch = max(waiting.values(), key=len)
        if len(batch) >= batch_size or num_waiting >= max_waiting:
            num_waiting -= len(batch)
            yield waiting.pop(batch[0].pixels.shape)
    yield from waiting.values()


@dataclass(frozen=True, eq=False)
class _Scored:
    """The most probable classes of the locations of a batch, perhaps still on their way from the device."""

    seen: list[TeacherImage]
    class_ids: Int[Tensor, "B h w K"]
    probs: Float[Tensor, "B h w K"]
    arrived: torch.cuda.Event | None

    def images(self) -> Iterator[tuple[TeacherImage, NDArray[np.int64], NDArray[np.float32]]]:
        """Wait for the numbers; yield each image with its class ids and probabilities [h, w, K]."""
        if self.arrived is not None:
            self.arrived.synchronize()
        yield from zip(self.seen, self.class_ids.numpy(), self.probs.numpy(), strict=True)


def _scored(
    teacher: Teacher, batches: Iterable[list[TeacherImage]], topk: int, device: torch.device
) -> Iterator[_Scored]:
    """Yield what the teacher says of each batch, without waiting for a GPU; say how well it is placed at first."""
    for number, seen in enumerate(batches):
        with torch.inference_mode():
            images = as_tensor(seen, device)
            if number == 0:  # eight show whether the map is right, and cost next to nothing
                say(teacher.check(images[:8]))
            scored = _Scored(seen, *_on_cpu(*teacher.top(images, topk)))
        yield scored


def _on_cpu(class_ids: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, torch.cuda.Event | None]:
    """Start copying results to the CPU; return them with the event of their arrival."""
    if class_ids.device.type != "cuda":
        return class_ids, probs, None
    landing = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in (class_ids, probs)]
    for target, result in zip(landing, (class_ids, probs), strict=True):
        target.copy_(result, non_blocking=True)
    arrived = torch.cuda.Event()
    # Of the results' own GPU: by default it would be recorded on the current one, where nothing is to be waited for.
    arrived.record(torch.cuda.current_stream(class_ids.device))
    return landing[0], landing[1], arrived


def _packed(
    manifest: Manifest, scored: tuple[TeacherImage, NDArray[np.int64], NDArray[np.float32]]
) -> tuple[str, bytes]:
    """Return the record of an image. Raises ValueError, naming the image, for scores that are not finite."""
    seen, class_ids, probs = scored
    score_map = from_top(class_ids, probs, num_classes=manifest.num_classes, region=seen.region, name=seen.key)
    if manifest.orientation == Orientation.STORED:
        score_map = turned_map(score_map, OPPOSITE[seen.orientation])
    return seen.key, pack_for(manifest, seen.key, score_map)


def _one_behind(items: Iterable[T]) -> Iterator[T]:
    """Yield each item only when the next one has been asked for, so that a GPU has work meanwhile."""
    last: deque[T] = deque()
    for item in items:
        last.append(item)
        if len(last) > 1:
            yield last.popleft()
    yield from last
