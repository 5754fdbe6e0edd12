"""Annotate: a teacher looks at every image once, and its dense score maps go into a label store.

Threads decode images ahead and pack score maps behind the teacher, so that it never waits for either. What
the store has already is left out, so a call that was stopped is continued by the same call. Under torchrun
the ranks divide what is missing at the start; each writes files of its own.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from tokenlabel.distributed import default_device, joined_ranks
from tokenlabel.encoding import Encoding
from tokenlabel.geometry import Box
from tokenlabel.images import ImageError, ImageSource, decode_image, open_images
from tokenlabel.scores import from_top
from tokenlabel.sight import Sight
from tokenlabel.store import (
    Failure,
    LabelStore,
    LabelStoreWriter,
    Manifest,
    pack_for,
    remove_leftovers,
    update_failures,
)
from tokenlabel.teachers import Teacher, TeacherConfig, TeacherError, load_teacher

S = TypeVar("S")
T = TypeVar("T")

# Images that wait for others of their shape fill this many batches at the most.
MAX_WAITING_BATCHES = 4


@dataclass(frozen=True, kw_only=True)
class AnnotateConfig(TeacherConfig):
    """Which labels to make, and how."""

    teacher: str
    """A run folder, or the name of a model (timm's, or lvvit_s and the like)."""
    topk: int = 5
    """Classes that each place keeps; the probability of the others is kept as one number."""
    encoding: Encoding = Encoding.LZMA
    """How records are written: lzma is smallest, zstd nearly as small and faster to read, raw fastest to read."""
    batch_size: int = 64
    """Images that the teacher sees at once."""
    num_workers: int = 2
    """Threads that decode images, and as many that pack score maps."""
    strict: bool = False
    """Stop at the first image that does not decode; by default they are listed and passed over."""


@dataclass(frozen=True, kw_only=True)
class Annotation:
    """What a call to annotate did, on all ranks together."""

    num_images: int
    num_present: int
    """Images that had a label before."""
    num_labelled: int
    failures: tuple[Failure, ...]
    images_per_s: float


def annotate(
    images: str | Path | ImageSource,
    folder: str | Path,
    config: AnnotateConfig,
    *,
    device: torch.device | None = None,
) -> Annotation:
    """Label every image that has no label yet in the store `folder`, which is made if there is none.

    Raises TeacherError for a teacher that cannot do it, StoreError if the folder holds other labels,
    ScoreError for scores that are not finite (naming the image), ImageError for an image that does not decode
    if `strict`.
    """
    source = open_images(images) if isinstance(images, (str, Path)) else images
    device = device or default_device()
    return annotate_by(
        load_teacher(config.teacher, config, device), source, folder, config=config, device=device
    )


def annotate_by(
    teacher: Teacher, source: ImageSource, folder: str | Path, *, config: AnnotateConfig, device: torch.device
) -> Annotation:
    """Do what `annotate` does with a teacher of your own, which must be on the device."""
    started = time.perf_counter()
    _check_classes(teacher, source)
    manifest = Manifest(
        num_classes=teacher.num_classes,
        class_names=tuple(source.class_names),
        topk=min(config.topk, teacher.num_classes),
        encoding=config.encoding,
        teacher=teacher.description,
        preprocessing=teacher.sight.as_dict(),
    )
    with joined_ranks() as ranks:
        missing = ranks.of_first(_missing(source, Path(folder), manifest) if ranks.is_first else [])
        mine = missing[ranks.rank :: ranks.world_size]
        failures: list[Failure] = []
        with (
            _sigterm_stops(),
            LabelStoreWriter(folder, manifest) as writer,
            tqdm(total=len(mine), desc=f"annotate {folder}", unit="img", disable=not ranks.is_first) as bar,
        ):
            labels = _labels(teacher, source, mine, failures, config=config, manifest=manifest, device=device)
            for key, record in labels:
                writer.add_record(key, record)
                bar.update()
        failures = [failure for of_rank in ranks.all(failures) for failure in of_rank]
        if ranks.is_first:
            update_failures(folder, failures)
    num_labelled = len(missing) - len(failures)
    return Annotation(
        num_images=len(source),
        num_present=len(source) - len(missing),
        num_labelled=num_labelled,
        failures=tuple(failures),
        images_per_s=num_labelled / (time.perf_counter() - started),
    )


def _check_classes(teacher: Teacher, source: ImageSource) -> None:
    """Refuse a teacher whose classes are not those of the images."""
    ours, theirs = source.class_names, teacher.class_names
    if teacher.num_classes != len(ours):
        raise TeacherError(
            f"the teacher knows {teacher.num_classes:,} classes, the images have {len(ours):,}; give a teacher of the "
            "same classes"
        )
    if theirs and list(theirs) != list(ours):
        first = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
        raise TeacherError(
            f"class {first} is {theirs[first]!r} to the teacher and {ours[first]!r} to the images; give a teacher of "
            "the same classes"
        )


def _missing(source: ImageSource, folder: Path, manifest: Manifest) -> list[int]:
    """Make the store if there is none; return the indices of the images that it has no label of."""
    with LabelStoreWriter(folder, manifest):
        remove_leftovers(folder)
    store = LabelStore(folder)
    return [index for index, key in enumerate(source.keys) if key not in store]


@dataclass(frozen=True, eq=False)
class _Seen:
    """An image as its teacher sees it: pixels [height, width, 3], and the part of the image that they show."""

    key: str
    pixels: NDArray[np.uint8]
    region: Box


def _labels(
    teacher: Teacher,
    source: ImageSource,
    indices: Sequence[int],
    failures: list[Failure],
    *,
    config: AnnotateConfig,
    manifest: Manifest,
    device: torch.device,
) -> Iterator[tuple[str, bytes]]:
    """Yield the key and the record of each image, in no particular order; add those that have none to `failures`."""
    see = partial(_see, source, teacher.sight, config.strict)
    num_ahead = 2 * config.batch_size
    with _pool(config.num_workers) as decoding, _pool(config.num_workers) as packing:
        seen = _without_failures(_ahead(decoding, see, indices, num_ahead), failures)
        scored = _scored(teacher, _by_shape(seen, config.batch_size), manifest.topk, device)
        places = (item for batch in _one_behind(scored) for item in batch.images())
        yield from _ahead(packing, partial(_packed, manifest), places, num_ahead)


def _see(source: ImageSource, sight: Sight, strict: bool, index: int) -> _Seen | Failure:
    """Decode an image and show it to a teacher. Raises ImageError if it does not decode, if `strict`."""
    key = source.keys[index]
    try:
        image = decode_image(source.read(index), key)
    except ImageError as error:
        if strict:
            raise
        return Failure(key, str(error))
    return _Seen(key, *sight.of(image))


def _without_failures(items: Iterable[_Seen | Failure], failures: list[Failure]) -> Iterator[_Seen]:
    for item in items:
        if isinstance(item, Failure):
            failures.append(item)
        else:
            yield item


def _by_shape(items: Iterable[_Seen], batch_size: int) -> Iterator[list[_Seen]]:
    """Yield batches of images of one shape; smaller ones at the end, and where many shapes wait for company."""
    waiting: dict[tuple[int, ...], list[_Seen]] = {}
    num_waiting = 0
    for item in items:
        batch = waiting.setdefault(item.pixels.shape, [])
        batch.append(item)
        num_waiting += 1
        if num_waiting >= MAX_WAITING_BATCHES * batch_size:
            batch = max(waiting.values(), key=len)
        if len(batch) >= batch_size or num_waiting >= MAX_WAITING_BATCHES * batch_size:
            num_waiting -= len(batch)
            yield waiting.pop(batch[0].pixels.shape)
    yield from waiting.values()


@dataclass(frozen=True, eq=False)
class _Scored:
    """The most probable classes of the places of a batch, perhaps still on their way from the device."""

    seen: list[_Seen]
    class_ids: Int[Tensor, "B h w K"]
    probs: Float[Tensor, "B h w K"]
    arrived: torch.cuda.Event | None

    def images(self) -> Iterator[tuple[_Seen, NDArray[np.int64], NDArray[np.float32]]]:
        """Wait for the numbers; yield each image with its class ids and probabilities [h, w, K]."""
        if self.arrived is not None:
            self.arrived.synchronize()
        yield from zip(self.seen, self.class_ids.numpy(), self.probs.numpy(), strict=True)


def _scored(
    teacher: Teacher, batches: Iterable[list[_Seen]], topk: int, device: torch.device
) -> Iterator[_Scored]:
    """Yield what the teacher says of each batch, without waiting for a GPU; say how well it is placed at first."""
    for number, seen in enumerate(batches):
        with torch.inference_mode():
            images = torch.from_numpy(np.stack([item.pixels for item in seen])).permute(0, 3, 1, 2)
            images = (images.pin_memory() if device.type == "cuda" else images).to(device, non_blocking=True)
            if number == 0:
                tqdm.write(teacher.check(images), file=sys.stderr)
            top = teacher.probabilities(images).topk(topk, dim=3)  # [B, h, w, K]
            scored = _Scored(seen, *_on_cpu(top.indices, top.values))
        yield scored


def _on_cpu(class_ids: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, torch.cuda.Event | None]:
    """Start copying results to the CPU; return them with the event of their arrival."""
    if class_ids.device.type != "cuda":
        return class_ids, probs, None
    landing = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in (class_ids, probs)]
    for target, result in zip(landing, (class_ids, probs), strict=True):
        target.copy_(result, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return landing[0], landing[1], arrived


def _packed(
    manifest: Manifest, scored: tuple[_Seen, NDArray[np.int64], NDArray[np.float32]]
) -> tuple[str, bytes]:
    """Return the record of an image. Raises ScoreError, naming the image, for scores that are not finite."""
    seen, class_ids, probs = scored
    score_map = from_top(
        class_ids, probs, num_classes=manifest.num_classes, region=seen.region, name=seen.key
    )
    return seen.key, pack_for(manifest, seen.key, score_map)


def _ahead(
    pool: ThreadPoolExecutor, function: Callable[[S], T], items: Iterable[S], depth: int
) -> Iterator[T]:
    """Yield the function of each item in order, working on up to `depth` of them in the background."""
    waiting: deque[Future[T]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) >= depth:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _one_behind(items: Iterable[T]) -> Iterator[T]:
    """Yield each item only when the next one has been asked for, so that a GPU has work meanwhile."""
    last: deque[T] = deque()
    for item in items:
        last.append(item)
        if len(last) > 1:
            yield last.popleft()
    yield from last


@contextmanager
def _pool(num_workers: int) -> Iterator[ThreadPoolExecutor]:
    """Return a pool of threads that drops what it has not begun when it is left."""
    pool = ThreadPoolExecutor(max(1, num_workers))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _sigterm_stops() -> Iterator[None]:
    """Let SIGTERM end this process the orderly way, writing what is finished."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
