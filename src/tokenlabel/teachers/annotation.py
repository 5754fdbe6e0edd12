"""`tokenlabel annotate`: a teacher predicts a dense score map of every image, which is written to a label store.

Images that have a label are skipped, unless they are to be labelled again, so the same call continues one that was
stopped. Under torchrun the images are divided among the ranks at the start, and each rank writes files of its own.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import torch
from tqdm import tqdm

from tokenlabel.data.class_names import CLASSES_FILE
from tokenlabel.data.folders import why_skipped
from tokenlabel.data.images import ImageFolder, ImageSource
from tokenlabel.data.remote import read_ahead
from tokenlabel.data.sources import open_aloud
from tokenlabel.evaluation.masks import stated_classes
from tokenlabel.labels.encoding import DEFAULT_TOLERANCE, Encoding
from tokenlabel.labels.fingerprints import FingerprintedImages
from tokenlabel.labels.manifest import MANIFEST_FILE, Failure, Manifest, read_manifest, update_failures
from tokenlabel.labels.writer import LabelStoreWriter
from tokenlabel.runtime.coercion import check_path, coerced
from tokenlabel.runtime.distributed import Ranks, joined_ranks, usable_device
from tokenlabel.runtime.errors import ModelError, StoreError, refuse
from tokenlabel.runtime.process import listed, say
from tokenlabel.teachers.classmap import BY_NAME, BY_ORDER, MIN_MASS, class_map_for
from tokenlabel.teachers.ensemble import Ensemble, class_map_of, load_teachers
from tokenlabel.teachers.labelling import Labelling
from tokenlabel.teachers.masks import MAX_IDS, MaskTeacher
from tokenlabel.teachers.networks import NetworkTeacher, Teacher
from tokenlabel.teachers.options import MASKS, AnnotateConfig
from tokenlabel.teachers.todo import ENOUGH_IMAGES, Todo, find_todo, proposed_size

# Options that have no effect for masks.
OF_NETWORKS = (
    "weights", "crop", "head", "flip", "cells", "scales", "outside", "class_order", "precision", "compile",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Annotation:
    """The result of a call to `annotate`, over all ranks."""

    num_images: int
    num_present: int
    """Images that had a label and keep it."""
    num_labelled: int
    num_anew: int
    """How many of these had a label."""
    failures: tuple[Failure, ...]
    images_per_s: float
    bytes_per_image: float | None
    """Mean size of the new records; None if there are none."""
    empty_cells: float | None
    """Share of the cells labelled in this call that keep no class; None if networks labelled none."""


def annotate(
    images: str | Path | ImageSource,
    folder: str | Path,
    config: AnnotateConfig,
    *,
    device: torch.device | str | None = None,
) -> Annotation:
    """Label every image that has no label in the store `folder`, which is created if there is none.

    With `again`, label some images again, too. The same call continues one that was stopped. Raises ModelError for a
    teacher that has no dense map or does not fit the classes, StoreError if the folder holds other labels, ValueError
    that names the image for scores that are not finite, and, if `strict`, ImageError for an image that does not decode.

    >>> done = tl.annotate("images", "labels", tl.AnnotateConfig(teacher="masks:masks", size=8))
    >>> done.num_present + done.num_labelled, done.failures
    (8, ())
    """
    config = coerced(config, AnnotateConfig, name="config")
    check_path(folder, name="folder")
    source = open_aloud(images) if isinstance(images, (str, Path)) else images
    if not hasattr(source, "class_ids"):
        raise ValueError(f"images: expected a path or what open_images returns, got {source!r}")
    _refuse_amid_images(Path(folder), source)
    device = usable_device(device)
    return annotate_by(make_teacher(config, source, device), source, folder, config=config, device=device)


def _refuse_amid_images(folder: Path, source: ImageSource) -> None:
    """Raise StoreError for a store inside the folder of the images, where it would count as a class later on."""
    if isinstance(source, ImageFolder):
        root, folder_path = source.root.resolve(), folder.resolve()
        inside = root in folder_path.parents and folder_path.relative_to(root).as_posix()
        if inside and why_skipped(f"{inside}/0.jpg") is None:
            raise StoreError(
                f"{folder}: lies among the images of {source.root}, where it would count as a class; name a folder "
                "elsewhere"
            )


def make_teacher(config: AnnotateConfig, source: ImageSource, device: torch.device) -> Teacher | MaskTeacher:
    """Return the teacher of a configuration, over the images' classes; of masks, over their own if there are none."""
    names = [config.teacher] if isinstance(config.teacher, str) else config.teacher
    folders = [name.removeprefix(MASKS) for name in names if name.startswith(MASKS)]
    if not folders:
        if config.ignore_index is not None:
            raise ModelError("--ignore-index is for masks (--teacher masks:DIR); leave it out")
        return load_teachers(config, source.class_names, device)
    plain = AnnotateConfig(teacher=config.teacher)
    given = [f"--{name.replace('_', '-')}" for name in OF_NETWORKS if getattr(config, name) != getattr(plain, name)]
    alone = f"masks go with no other teacher and no network's options; leave {', '.join(given) or 'one'} out"
    has_two = config.class_map is not None and config.ignore_index is not None
    refuse(
        {
            alone: len(names) > 1 or given,
            "--teacher masks: names no folder; expected masks:DIR": not folders[0],
            f"--class-map {config.class_map}: masks hold ids, not names; give a file with an id and a class a line, or "
            "leave it out if the ids are those of the images' classes": config.class_map in (BY_NAME, BY_ORDER),
            "with --class-map, ids that it does not name are no class; leave --ignore-index out": has_two,
        },
        ModelError,
    )
    masks, class_map = Path(folders[0]), None
    class_names = source.class_names or stated_classes(masks)
    if not class_names and masks.is_dir():
        raise ModelError(
            "masks hold ids of the images' classes, and these images have none; list the classes of the masks in "
            f"{masks.parent / CLASSES_FILE}, one a line"
        )
    if config.class_map is not None:
        class_map = class_map_for(config.class_map, (), class_names, num_theirs=MAX_IDS)
    teacher = MaskTeacher(
        masks,
        class_names=class_names,
        size=config.size,
        class_map=class_map,
        ignore_index=config.ignore_index,
        source=source,
    )
    overrule = "overrule with --class-map FILE, an id and a class a line"
    teacher.masks.check(class_names, all_needed=False, overrule=overrule)
    return teacher


def annotate_by(
    teacher: Teacher | MaskTeacher,
    source: ImageSource,
    folder: str | Path,
    *,
    config: AnnotateConfig,
    device: torch.device,
) -> Annotation:
    """Label images as `annotate` does, with a teacher of your own, which must be on the device."""
    started, folder = time.perf_counter(), Path(folder)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # otherwise pinning memory creates a context on the first GPU, too
    teacher = _over_classes_of(source, teacher, config)
    job = Labelling(
        teacher=teacher,
        source=FingerprintedImages(source),
        manifest=_manifest(teacher, source, folder, config),
        device=device,
        batch_size=config.batch_size or (16 if device.type == "cpu" else 64),
        num_workers=config.num_workers,
        strict=config.strict,
    )
    todo, num_bytes, failures, cells = _label(job, source, folder, config)
    num_labelled = len(todo.indices) - len(failures)
    empty_cells = cells["empty"] / cells["all"] if cells["all"] else None
    class_map = teacher.class_map if isinstance(teacher, Ensemble) else None
    if empty_cells is not None and class_map is not None and class_map.renormalises:
        say(
            f"{folder}: {empty_cells:.1%} of {cells['all']:,} cells keep nothing, since the teacher has less than "
            f"{MIN_MASS} of its probability there on these classes: they carry no loss"
        )
    return Annotation(
        num_images=len(source),
        num_present=len(source) - len(todo.indices),
        num_labelled=num_labelled,
        num_anew=len({source.keys[index] for index in todo.anew} - {failure.key for failure in failures}),
        failures=tuple(failures),
        images_per_s=num_labelled / (time.perf_counter() - started),
        bytes_per_image=num_bytes / num_labelled if num_labelled else None,
        empty_cells=empty_cells,
    )


def _label(
    job: Labelling, source: ImageSource, folder: Path, config: AnnotateConfig
) -> tuple[Todo, int, list[Failure], Counter[str]]:
    """Label images with all ranks; return which, the size of the records in bytes, the failures, and `job.cells`."""
    with joined_ranks() as ranks:
        todo = ranks.on_main(lambda: find_todo(job, source, folder, config.again))
        num_bytes = sum(ranks.all_gather(_write_labels(job, source, folder, todo, config, ranks)))
        failures = [failure for of_rank in ranks.all_gather(job.failures) for failure in of_rank]
        cells = sum(ranks.all_gather(job.cells), Counter())
        if ranks.is_first:
            _write_failures(folder, source, failures)
        if isinstance(job.teacher, MaskTeacher) and len(todo.indices) == len(source):
            held = set().union(*ranks.all_gather(job.teacher.held))
            names = job.teacher.class_names
            if absent := [name for class_id, name in enumerate(names) if class_id not in held]:
                say(f"no mask holds {len(absent):,} of {len(names):,} classes ({listed(absent)})")
    return todo, num_bytes, failures, cells


def _over_classes_of(
    source: ImageSource, teacher: Teacher | MaskTeacher, config: AnnotateConfig
) -> Teacher | MaskTeacher:
    """Map the classes of a teacher of the caller's to those of the images; `make_teacher` has done it for others."""
    is_asked = config.class_map is None and source.class_names
    if not is_asked or not isinstance(teacher, Teacher) or teacher.words or teacher.own_classes:
        return teacher
    class_map = class_map_of(teacher, None, source.class_names)
    return Ensemble([teacher], class_map=replace(class_map, outside=config.outside)) if class_map else teacher


def _write_labels(
    job: Labelling, source: ImageSource, folder: Path, todo: Todo, config: AnnotateConfig, ranks: Ranks
) -> int:
    """Write the labels of this rank's share of the images; return the size of the records in bytes."""
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
            if bar.n == 1 and len(mine) >= ENOUGH_IMAGES:  # once the teacher has shown that it works
                _say_size(job.teacher, source, mine, job.device)
    return num_bytes


def _say_size(teacher: Teacher | MaskTeacher, source: ImageSource, indices: list[int], device: torch.device) -> None:
    """Print which size labels better, if one does, for a single network."""
    while isinstance(teacher, Ensemble) and len(teacher.members) == 1:  # a network with a class map
        teacher = teacher.members[0]
    if isinstance(teacher, NetworkTeacher) and (advice := proposed_size(teacher, source, indices, device)):
        say(advice)


def _manifest(teacher: Teacher | MaskTeacher, source: ImageSource, folder: Path, config: AnnotateConfig) -> Manifest:
    """Return the manifest of the labels. An existing store keeps its encoding, tolerance and orientation.

    Raises StoreError for others; what it keeps by default is printed where that is not the default of new stores.
    """
    networks = isinstance(teacher, Teacher)
    is_own = not source.class_names or (networks and teacher.own_classes)
    names = teacher.class_names if is_own else tuple(source.class_names)
    manifest = Manifest(
        num_classes=teacher.num_classes,
        class_names=() if networks and teacher.words else names,
        topk=min(config.topk, teacher.num_classes),
        encoding=config.encoding or Encoding.COMPACT,
        tolerance=DEFAULT_TOLERANCE if config.tolerance is None else config.tolerance,
        teacher=teacher.description,
        preprocessing=asdict(teacher.input) if networks else teacher.preprocessing,
    )
    if not (folder / MANIFEST_FILE).exists():
        return manifest
    began = read_manifest(folder)
    manifest = replace(manifest, orientation=began.orientation, encoding=began.encoding, tolerance=began.tolerance)
    if began.differences(manifest):  # the writer refuses this store, and says why
        return manifest
    for name, given, there, default in (
        ("encoding", config.encoding, began.encoding, Encoding.COMPACT),
        ("tolerance", config.tolerance, began.tolerance, DEFAULT_TOLERANCE),
    ):
        is_moot = name == "tolerance" and began.encoding is Encoding.RAW
        if given is not None and (is_moot or given != there):
            with_what = "--encoding raw" if is_moot else f"--{name} {_as_typed(there)}"
            raise StoreError(
                f"{folder}: was started with {with_what}, got --{name} {_as_typed(given)}; leave --{name} out, or "
                "choose another folder"
            )
        if given is None and there != default and not is_moot:
            say(
                f"{folder}: continues with --{name} {_as_typed(there)}, with which it was started (the default is "
                f"{_as_typed(default)})"
            )
    return manifest


def _as_typed(value: Encoding | float) -> str:
    return value.value if isinstance(value, Encoding) else f"{value:g}"


def _write_failures(folder: Path, source: ImageSource, failures: list[Failure]) -> None:
    """Write the failures of these images to the manifest; those of other images beside them stay while these exist."""
    mine = cache(lambda: frozenset(source.keys))
    root = getattr(source, "root", None)
    update_failures(
        folder, failures, others=lambda key: root is not None and key not in mine() and (root / key).is_file()
    )


@contextmanager
def _sigterm_stops() -> Iterator[None]:
    """Let SIGTERM raise SystemExit, so that the labels in memory are written."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
