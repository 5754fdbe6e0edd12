"""Annotate: a teacher looks at every image once, and its dense score maps go into a label store.

Threads decode images ahead and pack score maps behind the teacher, so that it never waits for either. What
the store has already is left out, unless it is to be labelled again, so a call that was stopped is continued by the
same call. Under torchrun the ranks divide what is to be done at the start; each writes files of its own.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from tqdm import tqdm

from tokenlabel.data.classes import say_order
from tokenlabel.data.folders import why_passed_over
from tokenlabel.data.images import ImageFolder, ImageSource
from tokenlabel.data.remote import read_ahead
from tokenlabel.data.sources import open_aloud
from tokenlabel.labels.encoding import DEFAULT_TOLERANCE, Encoding
from tokenlabel.labels.fingerprints import FingerprintedImages
from tokenlabel.labels.manifest import MANIFEST_FILE, Failure, Manifest, read_manifest, update_failures
from tokenlabel.labels.writer import LabelStoreWriter
from tokenlabel.runtime.coercion import COUNT, NATURAL, POSITIVE, check_numbers, coerced
from tokenlabel.runtime.distributed import Ranks, joined_ranks, usable_device
from tokenlabel.runtime.errors import ModelError, StoreError, refuse
from tokenlabel.runtime.process import listed, say
from tokenlabel.teachers.classmap import MIN_MASS, class_map_for
from tokenlabel.teachers.ensemble import Ensemble, class_map_of, load_teachers
from tokenlabel.teachers.labelling import Labelling
from tokenlabel.teachers.masks import MASKS, MAX_IDS, MaskTeacher
from tokenlabel.teachers.networks import NetworkTeacher, Teacher, TeacherConfig
from tokenlabel.teachers.sizes import ENOUGH_IMAGES, proposed_size
from tokenlabel.teachers.todo import Todo, find_todo

# Options that mean nothing for masks.
OF_NETWORKS = (
    "weights", "crop", "head", "flip", "cells", "scales", "class_order", "precision", "compile",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AnnotateConfig(TeacherConfig):
    """Which labels to make, and how.

    >>> tl.AnnotateConfig(teacher="masks:masks", encoding="raw").topk
    5
    >>> tl.AnnotateConfig(teacher="resnet50", topk=0)
    Traceback (most recent call last):
    ...
    tokenlabel.runtime.errors.ConfigError: topk must be at least 1, got 0
    """

    topk: int = 5
    """Classes that each location keeps; the probability of the others is kept as one number."""
    encoding: Encoding = Encoding.COMPACT
    """How records are written: compact is a fifth of the size of raw, which is finer and faster to read."""
    tolerance: float | None = None
    """Of compact records: the least probability that is worth its bytes. Less is left out, what stays is in steps of
    1.25 times this; 0 keeps all in steps of 1/510. By default .008, and in a store that is there what it began with."""
    batch_size: int | None = None
    """Images that the teacher sees at once; by default 64 on a GPU and 16 on a CPU."""
    num_workers: int = 2
    """Threads that decode images, and as many that pack score maps."""
    shard_s: float = 300.0
    """Seconds after which labels are on the disk at the latest, so what a kill may cost."""
    ignore_index: int | None = None
    """Of masks: the id of pixels without a class; by default 255, with more than 255 classes 65535."""
    strict: bool = False
    """Stop at the first image that does not decode; by default they are listed and passed over."""
    again: str | None = None
    """Label images anew that have a label: a text file of their keys, one a line, or `changed` for those that were
    replaced since. Their new labels count as soon as they are written; until then the old ones do."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, topk=NATURAL, batch_size=NATURAL, num_workers=COUNT, shard_s=POSITIVE, tolerance="[0, 1)")


@dataclass(frozen=True, kw_only=True)
class Annotation:
    """What a call to annotate did, on all ranks together."""

    num_images: int
    num_present: int
    """Images that had a label before, and keep it."""
    num_labelled: int
    num_anew: int
    """How many of these had a label before."""
    failures: tuple[Failure, ...]
    images_per_s: float
    bytes_per_image: float | None
    """Of the records of these labels; None where there are none."""
    empty_cells: float | None
    """Share of the cells labelled in this call that keep no class; None where networks labelled none."""


def annotate(
    images: str | Path | ImageSource,
    folder: str | Path,
    config: AnnotateConfig,
    *,
    device: torch.device | str | None = None,
) -> Annotation:
    """Label every image that has no label yet in the store `folder`, which is made if there is none.

    With `again`, label some images anew as well; a call that was stopped is continued by the same call there, too.
    Raises ModelError for a teacher that cannot do it, StoreError if the folder holds other labels,
    ValueError for scores that are not finite (naming the image), ImageError for an image that does not decode
    if `strict`.

    >>> done = tl.annotate("images", "labels", tl.AnnotateConfig(teacher="masks:masks", size=8))
    >>> done.num_present + done.num_labelled, done.failures
    (8, ())
    """
    config = coerced(config, AnnotateConfig, name="config")
    source = open_aloud(images) if isinstance(images, (str, Path)) else images
    _refuse_amid_images(Path(folder), source)
    device = usable_device(device)
    return annotate_by(make_teacher(config, source, device), source, folder, config=config, device=device)


def _refuse_amid_images(folder: Path, source: ImageSource) -> None:
    """Raise StoreError for a folder among those of the images: whoever opens them next would take it for a class."""
    if isinstance(source, ImageFolder):
        root, folder_path = source.root.resolve(), folder.resolve()
        inside = root in folder_path.parents and folder_path.relative_to(root).as_posix()
        if inside and why_passed_over(f"{inside}/0.jpg") is None:
            raise StoreError(
                f"{folder}: lies among the images of {source.root}, where it would count as a class; name a folder "
                "elsewhere"
            )


def make_teacher(config: AnnotateConfig, source: ImageSource, device: torch.device) -> Teacher | MaskTeacher:
    """Return what labels the images, over their classes."""
    names = [config.teacher] if isinstance(config.teacher, str) else config.teacher
    folders = [name.removeprefix(MASKS) for name in names if name.startswith(MASKS)]
    if not folders:
        if config.ignore_index is not None:
            raise ModelError("--ignore-index is for masks (--teacher masks:DIR); leave it out")
        return load_teachers(config, source.class_names, device)
    plain = AnnotateConfig(teacher=config.teacher)
    given = [f"--{name.replace('_', '-')}" for name in OF_NETWORKS if getattr(config, name) != getattr(plain, name)]
    refuse(
        {
            f"masks go with no other teacher and no network's options; leave {', '.join(given) or 'one'} out": len(
                names
            )
            > 1
            or given,
            "--teacher masks: names no folder; expected masks:DIR": not folders[0],
            "--class-map says which ids are classes, others are none; leave --ignore-index out": config.class_map
            is not None
            and config.ignore_index is not None,
        },
        ModelError,
    )
    class_map = None
    if config.class_map is None:
        overrule = "overrule with --class-map FILE, an id and a class a line"
        say_order(source.class_names, them="the masks'", overrule=overrule)
    else:
        class_map = class_map_for(config.class_map, (), source.class_names, num_theirs=MAX_IDS)
    teacher = MaskTeacher(
        folders[0],
        num_classes=len(source.class_names),
        size=config.size,
        class_map=class_map,
        ignore_index=config.ignore_index,
        source=source,
        class_names=source.class_names,
    )
    teacher.masks.check(source.class_names, all_needed=False)
    return teacher


def annotate_by(
    teacher: Teacher | MaskTeacher,
    source: ImageSource,
    folder: str | Path,
    *,
    config: AnnotateConfig,
    device: torch.device,
) -> Annotation:
    """Do what `annotate` does with a teacher of your own, which must be on the device."""
    started, folder = time.perf_counter(), Path(folder)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # pinned memory would open the first GPU otherwise
    teacher = _over_classes_of(source, teacher, config)
    manifest = _manifest(teacher, source, config)
    if (folder / MANIFEST_FILE).exists():
        manifest = _going_on(manifest, folder, config.tolerance)
    job = Labelling(
        teacher=teacher,
        source=FingerprintedImages(source),
        manifest=manifest,
        device=device,
        batch_size=config.batch_size or (16 if device.type == "cpu" else 64),
        num_workers=config.num_workers,
        strict=config.strict,
    )
    with joined_ranks() as ranks:
        todo = ranks.on_main(lambda: find_todo(source, folder, manifest, config.again))
        num_bytes = sum(ranks.all_gather(_write_labels(job, source, folder, todo, config, ranks)))
        failures = [failure for of_rank in ranks.all_gather(job.failures) for failure in of_rank]
        cells = sum(ranks.all_gather(job.cells), Counter())
        if ranks.is_first:
            _note_failures(folder, source, failures)
        if isinstance(teacher, MaskTeacher) and len(todo.indices) == len(source):
            _say_absent(ranks.all_gather(teacher.held), source.class_names)
    if cells["all"] and isinstance(teacher, Ensemble) and teacher.renormalises:
        say(
            f"{folder}: {cells['empty'] / cells['all']:.1%} of {cells['all']:,} cells keep nothing, since the teacher "
            f"has less than {MIN_MASS} of its probability there on these classes: they carry no loss"
        )
    num_labelled = len(todo.indices) - len(failures)
    anew = {source.keys[index] for index in todo.anew}
    return Annotation(
        num_images=len(source),
        num_present=len(source) - len(todo.indices),
        num_labelled=num_labelled,
        num_anew=len(anew.difference(failure.key for failure in failures)),
        failures=tuple(failures),
        images_per_s=num_labelled / (time.perf_counter() - started),
        bytes_per_image=num_bytes / num_labelled if num_labelled else None,
        empty_cells=cells["empty"] / cells["all"] if cells["all"] else None,
    )


def _over_classes_of(
    source: ImageSource, teacher: Teacher | MaskTeacher, config: AnnotateConfig
) -> Teacher | MaskTeacher:
    """Return a teacher of the caller's over the classes of the images, which one by `make_teacher` has already."""
    is_asked = config.class_map is None and source.class_names
    if not is_asked or not isinstance(teacher, Teacher) or teacher.words or teacher.own_classes:
        return teacher
    class_map = class_map_of(teacher, None, source.class_names)
    if class_map is None:
        return teacher
    return Ensemble([teacher], class_map=replace(class_map, outside=config.outside))


def _write_labels(
    job: Labelling, source: ImageSource, folder: Path, todo: Todo, config: AnnotateConfig, ranks: Ranks
) -> int:
    """Write the labels of this rank's share of the images; return how many bytes the records have."""
    images, mine, num_bytes = job.source, todo.share(source, ranks), 0
    assert isinstance(images, FingerprintedImages)
    writer = LabelStoreWriter(
        folder, job.manifest, max_shard_s=config.shard_s, generation=todo.generation, again=todo.request
    )
    bar = tqdm(total=len(mine), desc=f"annotate {folder}", unit="img", disable=not ranks.is_first)
    with _sigterm_stops(), writer, bar:
        for key, record in read_ahead(source, ([(0, index)] for index in mine), job.labels(mine)):
            num_bytes += len(record)
            writer.add_record(key, record, images.take(key))
            bar.update()
            if bar.n == 1 and len(mine) >= ENOUGH_IMAGES:  # once the first label is there
                _say_size(job.teacher, source, mine, job.device)
    return num_bytes


def _say_absent(held_by_ranks: Sequence[set[int]], class_names: Sequence[str]) -> None:
    held = set().union(*held_by_ranks)
    absent = [name for class_id, name in enumerate(class_names) if class_id not in held]
    if absent:
        say(f"no mask holds {len(absent):,} of {len(class_names):,} classes ({listed(absent)})")


def _say_size(teacher: Teacher | MaskTeacher, source: ImageSource, indices: list[int], device: torch.device) -> None:
    """Say which size agrees better with a single network's own crops, if one does."""
    while isinstance(teacher, Ensemble) and len(teacher.members) == 1:  # with a class map
        teacher = teacher.members[0]
    if isinstance(teacher, NetworkTeacher) and (advice := proposed_size(teacher, source, indices, device)):
        say(advice)


def _manifest(teacher: Teacher | MaskTeacher, source: ImageSource, config: AnnotateConfig) -> Manifest:
    networks = isinstance(teacher, Teacher)
    names = tuple(source.class_names) or (teacher.class_names if networks else ())
    if networks and teacher.own_classes:
        names = teacher.class_names
    return Manifest(
        num_classes=teacher.num_classes,
        class_names=() if networks and teacher.words else names,
        topk=min(config.topk, teacher.num_classes),
        encoding=config.encoding,
        tolerance=DEFAULT_TOLERANCE if config.tolerance is None else config.tolerance,
        teacher=teacher.description,
        preprocessing=teacher.input.as_dict() if networks else teacher.preprocessing,
    )


def _going_on(manifest: Manifest, folder: Path, tolerance: float | None) -> Manifest:
    """Return a manifest with what the store in a folder began with, and say so where it is not the default."""
    began = read_manifest(folder)
    if tolerance not in (None, began.tolerance):
        raise StoreError(
            f"{folder}: was begun with --tolerance {began.tolerance:g}, got {tolerance:g}; leave --tolerance out, or "
            "choose another folder"
        )
    if tolerance is None and began.tolerance != DEFAULT_TOLERANCE and manifest.encoding is Encoding.COMPACT:
        say(
            f"{folder}: goes on with --tolerance {began.tolerance:g}, with which it was begun (the default is "
            f"{DEFAULT_TOLERANCE:g})"
        )
    return replace(manifest, orientation=began.orientation, tolerance=began.tolerance)


def _note_failures(folder: Path, source: ImageSource, failures: list[Failure]) -> None:
    """Write down which images failed; those of other images that lie beside these stay noted while they exist."""
    mine = cache(lambda: frozenset(source.keys))
    root = getattr(source, "root", None)
    update_failures(
        folder, failures, others=lambda key: root is not None and key not in mine() and (root / key).is_file()
    )


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
