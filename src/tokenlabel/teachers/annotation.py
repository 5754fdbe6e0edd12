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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from tokenlabel.data.images import ImageSource
from tokenlabel.data.sources import open_images
from tokenlabel.labels.encoding import Encoding
from tokenlabel.labels.store import (
    Failure,
    LabelStore,
    LabelStoreWriter,
    Manifest,
    remove_leftovers,
    update_failures,
)
from tokenlabel.runtime.distributed import default_device, joined_ranks
from tokenlabel.runtime.ranges import COUNT, NATURAL, POSITIVE, check_numbers
from tokenlabel.teachers.classmap import class_map_for
from tokenlabel.teachers.ensemble import load_teachers
from tokenlabel.teachers.labelling import Labelling
from tokenlabel.teachers.masks import MAX_IDS, MaskTeacher
from tokenlabel.teachers.networks import Teacher, TeacherConfig, TeacherError

MASKS = "masks:"


@dataclass(frozen=True, kw_only=True)
class AnnotateConfig(TeacherConfig):
    """Which labels to make, and how."""

    topk: int = 5
    """Classes that each place keeps; the probability of the others is kept as one number."""
    encoding: Encoding = Encoding.COMPACT
    """How records are written: compact is a third of the size of raw, which is finer and faster to read."""
    batch_size: int = 64
    """Images that the teacher sees at once."""
    num_workers: int = 2
    """Threads that decode images, and as many that pack score maps."""
    shard_s: float = 300.0
    """Seconds after which labels are on the disk at the latest, so what a kill may cost."""
    strict: bool = False
    """Stop at the first image that does not decode; by default they are listed and passed over."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, topk=NATURAL, batch_size=NATURAL, num_workers=COUNT, shard_s=POSITIVE)


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
    return annotate_by(make_teacher(config, source, device), source, folder, config=config, device=device)


def make_teacher(config: AnnotateConfig, source: ImageSource, device: torch.device) -> Teacher | MaskTeacher:
    """Return what labels the images, over their classes."""
    names = [config.teacher] if isinstance(config.teacher, str) else config.teacher
    folders = [name.removeprefix(MASKS) for name in names if name.startswith(MASKS)]
    if not folders:
        return load_teachers(config, source.class_names, device)
    plain = AnnotateConfig(teacher=config.teacher)
    of_networks = ("weights", "crop", "head", "flip", "precision", "compile")
    given = [f"--{name}" for name in of_networks if getattr(config, name) != getattr(plain, name)]
    if len(names) > 1 or given:
        raise TeacherError(
            f"masks go with no other teacher and no network's options; leave {', '.join(given) or 'one'} out"
        )
    class_map = None
    if config.class_map is not None:
        class_map = class_map_for(config.class_map, (), source.class_names, num_theirs=MAX_IDS)
    return MaskTeacher(folders[0], num_classes=len(source.class_names), size=config.size, class_map=class_map)


def annotate_by(
    teacher: Teacher | MaskTeacher,
    source: ImageSource,
    folder: str | Path,
    *,
    config: AnnotateConfig,
    device: torch.device,
) -> Annotation:
    """Do what `annotate` does with a teacher of your own, which must be on the device."""
    started = time.perf_counter()
    if device.type == "cuda":
        torch.cuda.set_device(device)  # pinned memory would open the first GPU otherwise
    if isinstance(teacher, Teacher) and config.class_map is None:
        class_map_for(None, teacher.class_names, source.class_names, num_theirs=teacher.num_classes)
    job = Labelling(
        teacher=teacher,
        source=source,
        manifest=_manifest(teacher, source, config),
        device=device,
        batch_size=config.batch_size,
        num_workers=config.num_workers,
        strict=config.strict,
    )
    with joined_ranks() as ranks:
        missing = ranks.by_first(lambda: _missing(source, Path(folder), job.manifest))
        mine = missing[ranks.rank :: ranks.world_size]
        with (
            _sigterm_stops(),
            LabelStoreWriter(folder, job.manifest, max_shard_s=config.shard_s) as writer,
            tqdm(total=len(mine), desc=f"annotate {folder}", unit="img", disable=not ranks.is_first) as bar,
        ):
            for key, record in job.labels(mine):
                writer.add_record(key, record)
                bar.update()
        failures = [failure for of_rank in ranks.all(job.failures) for failure in of_rank]
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


def _manifest(teacher: Teacher | MaskTeacher, source: ImageSource, config: AnnotateConfig) -> Manifest:
    networks = isinstance(teacher, Teacher)
    return Manifest(
        num_classes=teacher.num_classes,
        class_names=tuple(source.class_names) or (teacher.class_names if networks else ()),
        topk=min(config.topk, teacher.num_classes),
        encoding=config.encoding,
        teacher=teacher.description,
        preprocessing=teacher.sight.as_dict() if networks else teacher.preprocessing,
    )


def _missing(source: ImageSource, folder: Path, manifest: Manifest) -> list[int]:
    """Make the store if there is none; return the indices of the images that it has no label of."""
    with LabelStoreWriter(folder, manifest):
        remove_leftovers(folder)
    store = LabelStore(folder)
    return [index for index, key in enumerate(source.keys) if key not in store]


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
