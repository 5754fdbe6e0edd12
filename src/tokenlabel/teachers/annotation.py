"""Annotate: a teacher looks at every image once, and its dense score maps go into a label store.

Threads decode images ahead and pack score maps behind the teacher, so that it never waits for either. What
the store has already is left out, unless it is to be labelled again, so a call that was stopped is continued by the
same call. Under torchrun the ranks divide what is to be done at the start; each writes files of its own.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from hashlib import blake2b
from pathlib import Path

import torch
from tqdm import tqdm

from tokenlabel.data.classes import say_order
from tokenlabel.data.folders import why_passed_over
from tokenlabel.data.images import ImageFolder, ImageSource
from tokenlabel.data.remote import read_ahead
from tokenlabel.data.sources import open_aloud
from tokenlabel.labels.encoding import DEFAULT_TOLERANCE, Encoding
from tokenlabel.labels.fingerprints import MAX_READ, FingerprintedImages, find_replaced
from tokenlabel.labels.manifest import MANIFEST_FILE, Failure, Manifest, read_manifest, update_failures
from tokenlabel.labels.store import LabelStore
from tokenlabel.labels.writer import LabelStoreWriter, remove_leftovers
from tokenlabel.runtime.coercion import COUNT, NATURAL, POSITIVE, check_numbers, coerced
from tokenlabel.runtime.distributed import Ranks, joined_ranks, usable_device
from tokenlabel.runtime.errors import ModelError, StoreError
from tokenlabel.runtime.process import listed, say
from tokenlabel.teachers.classmap import MIN_MASS, class_map_for
from tokenlabel.teachers.ensemble import Ensemble, load_teachers
from tokenlabel.teachers.labelling import Labelling
from tokenlabel.teachers.masks import MASKS, MAX_IDS, MaskTeacher
from tokenlabel.teachers.networks import NetworkTeacher, Teacher, TeacherConfig
from tokenlabel.teachers.sizes import MANY_IMAGES, proposed_size

CHANGED = "changed"


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
        check_numbers(
            self, topk=NATURAL, batch_size=NATURAL, num_workers=COUNT, shard_s=POSITIVE, tolerance="[0, 1)"
        )


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
    of_networks = (
        "weights",
        "crop",
        "head",
        "flip",
        "cells",
        "scales",
        "class_order",
        "precision",
        "compile",
    )
    given = [
        f"--{name.replace('_', '-')}" for name in of_networks if getattr(config, name) != getattr(plain, name)
    ]
    if len(names) > 1 or given:
        raise ModelError(
            f"masks go with no other teacher and no network's options; leave {', '.join(given) or 'one'} out"
        )
    if not folders[0]:
        raise ModelError("--teacher masks: names no folder; expected masks:DIR")
    class_map = None
    if config.class_map is None:
        overrule = "overrule with --class-map FILE, an id and a class a line"
        say_order(source.class_names, them="the masks'", overrule=overrule)
    else:
        class_map = class_map_for(config.class_map, (), source.class_names, num_theirs=MAX_IDS)
    if class_map is not None and config.ignore_index is not None:
        raise ModelError("--class-map says which ids are classes, others are none; leave --ignore-index out")
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
    started = time.perf_counter()
    if device.type == "cuda":
        torch.cuda.set_device(device)  # pinned memory would open the first GPU otherwise
    is_asked = config.class_map is None and source.class_names
    if is_asked and isinstance(teacher, Teacher) and not (teacher.words or teacher.own_classes):
        class_map = class_map_for(
            None,
            teacher.class_names,
            source.class_names,
            num_theirs=teacher.num_classes,
            assumed=teacher.names_assumed,
        )
        if class_map is not None:
            teacher = Ensemble([teacher], class_map=replace(class_map, outside=config.outside))
    images, manifest = FingerprintedImages(source), _manifest(teacher, source, config)
    if (Path(folder) / MANIFEST_FILE).exists():
        manifest = _going_on(manifest, Path(folder), config.tolerance)
    job = Labelling(
        teacher=teacher,
        source=images,
        manifest=manifest,
        device=device,
        batch_size=config.batch_size or (16 if device.type == "cpu" else 64),
        num_workers=config.num_workers,
        strict=config.strict,
    )
    with joined_ranks() as ranks:
        todo = ranks.on_main(lambda: _todo(source, Path(folder), job.manifest, config.again))
        mine, num_bytes = _share(source, todo.indices, ranks), 0
        with (
            _sigterm_stops(),
            LabelStoreWriter(
                folder,
                job.manifest,
                max_shard_s=config.shard_s,
                generation=todo.generation,
                again=todo.request,
            ) as writer,
            tqdm(total=len(mine), desc=f"annotate {folder}", unit="img", disable=not ranks.is_first) as bar,
        ):
            for key, record in read_ahead(source, ([(0, index)] for index in mine), job.labels(mine)):
                num_bytes += len(record)
                writer.add_record(key, record, images.take(key))
                bar.update()
                if bar.n == 1 and len(mine) >= MANY_IMAGES:  # once the first label is there
                    _say_size(teacher, source, mine, device)
        failures = [failure for of_rank in ranks.all_gather(job.failures) for failure in of_rank]
        cells = sum(ranks.all_gather(job.cells), Counter())
        num_bytes = sum(ranks.all_gather(num_bytes))
        if ranks.is_first:
            _note_failures(Path(folder), source, failures)
        if isinstance(teacher, MaskTeacher) and len(todo.indices) == len(source):
            held = {class_id for of_rank in ranks.all_gather(teacher.held) for class_id in of_rank}
            absent = [name for class_id, name in enumerate(source.class_names) if class_id not in held]
            if absent:
                say(
                    f"no mask holds {len(absent):,} of {len(source.class_names):,} classes ({listed(absent)})"
                )
    num_labelled = len(todo.indices) - len(failures)
    anew = {source.keys[index] for index in todo.anew}
    empty_cells = cells["empty"] / cells["all"] if cells["all"] else None
    if empty_cells is not None and isinstance(teacher, Ensemble) and teacher.renormalises:
        say(
            f"{folder}: {empty_cells:.1%} of {cells['all']:,} cells keep nothing, since the teacher has less than "
            f"{MIN_MASS} of its probability there on these classes: they carry no loss"
        )
    return Annotation(
        num_images=len(source),
        num_present=len(source) - len(todo.indices),
        num_labelled=num_labelled,
        num_anew=len(anew.difference(failure.key for failure in failures)),
        failures=tuple(failures),
        images_per_s=num_labelled / (time.perf_counter() - started),
        bytes_per_image=num_bytes / num_labelled if num_labelled else None,
        empty_cells=empty_cells,
    )


def _say_size(
    teacher: Teacher | MaskTeacher, source: ImageSource, indices: list[int], device: torch.device
) -> None:
    """Say which size agrees better with a single network's own crops, if one does."""
    while isinstance(teacher, Ensemble) and len(teacher.members) == 1:  # with a class map
        teacher = teacher.members[0]
    if isinstance(teacher, NetworkTeacher) and (advice := proposed_size(teacher, source, indices, device)):
        say(advice)


def _share(source: ImageSource, indices: list[int], ranks: Ranks) -> list[int]:
    """Return what a rank does of the images: of tar files a stretch, so that each file is read once, by one rank."""
    groups = getattr(source, "groups", None)
    if groups is None:
        return indices[ranks.rank :: ranks.world_size]
    in_order = sorted(indices, key=groups.__getitem__)
    start, end = (len(indices) * rank // ranks.world_size for rank in (ranks.rank, ranks.rank + 1))
    return in_order[start:end]


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


@dataclass(frozen=True, kw_only=True)
class _Todo:
    """The indices of the images to label, of those among them that have a label, and what files of the new ones say."""

    indices: list[int]
    anew: list[int]
    generation: int
    request: str


def _todo(source: ImageSource, folder: Path, manifest: Manifest, again: str | None) -> _Todo:
    """Make the store if there is none; return what is to be done, and say what else was replaced."""
    asked, request = _request(Path(again), source) if again not in (None, CHANGED) else ([], "")
    with LabelStoreWriter(folder, manifest):
        remove_leftovers(folder)
    store = LabelStore(folder)
    missing = {index for index, key in enumerate(source.keys) if key not in store}
    replaced = find_replaced(store, source, max_read=None if again == CHANGED else MAX_READ)
    if again == CHANGED:
        anew = set(replaced.indices)
    else:
        # A call that goes on leaves out what the one before it did, if that is sound and of the image as it is now.
        done = store.answers(request) if asked else set()
        done.difference_update(source.keys[index] for index in replaced.indices)
        keys = ((index, source.keys[index]) for index in asked if index not in missing)
        anew = {index for index, key in keys if key not in done or not _is_sound(store, key)}
    if again == CHANGED and not anew:
        unknown = replaced.num_unknown
        but = f", but {unknown:,} labels do not say what image they were made of" if unknown else ""
        say(f"{folder}: no image is known to have been replaced since labelling{but}")
    elif asked and not anew and missing.isdisjoint(asked):
        say(
            f"{again}: what it lists was labelled anew before; to do so once more, change the file, if only by a "
            "line that begins with #"
        )
    if others := [source.keys[index] for index in replaced.indices if index not in anew]:
        are_others = len(others) == len(source) - len(missing)
        say(
            f"{folder}: {_images_were(len(others))} replaced since labelling ({listed(others)}); "
            f"--again {CHANGED} labels anew what was"
            + (
                "; if these are other images of the same names, give them a folder of their own"
                if are_others
                else ""
            )
        )
    if replaced.num_unsure:
        say(
            f"{folder}: {_images_were(replaced.num_unsure)} modified since labelling and kept their size; --again "
            f"{CHANGED} reads them, and labels anew what was replaced"
        )
    indices = sorted(missing | anew)
    if indices and not os.access(folder, os.W_OK):
        raise StoreError(
            f"{folder}: cannot be written to, which the labels of {len(indices):,} more images need (the first: "
            f"{source.keys[indices[0]]})"
        )
    newest = max((shard.generation for shard in store.shards), default=0)
    return _Todo(indices=indices, anew=sorted(anew), generation=newest + 1 if anew else 0, request=request)


def _request(path: Path, source: ImageSource) -> tuple[list[int], str]:
    """Return the indices of the images whose keys a file lists, and a name for this request, made of its content.

    Raises ValueError for a file that cannot be read, lists nothing, or lists what is no key of the images.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"--again {path}: cannot be read ({error.strerror}); expected a text file with a key a line, or {CHANGED}"
        ) from error
    indices = {key: index for index, key in enumerate(source.keys)}
    lines = (
        content.decode("utf-8", "surrogateescape").removeprefix("\ufeff").replace("\r\n", "\n").split("\n")
    )
    lines = [line for line in lines if line in indices or (line.strip() and line[0] != "#")]
    asked = [*dict.fromkeys(_key_of(line, indices, getattr(source, "root", None)) for line in lines)]
    unknown = [line for line in asked if line not in indices]
    if unknown or not asked:
        found = f"{len(unknown):,} are not ({listed(unknown)})" if unknown else "it lists none"
        raise ValueError(f"--again {path}: expected keys of the images, such as {source.keys[0]}; {found}")
    return [indices[key] for key in asked], blake2b(content, digest_size=8).hexdigest()


def _key_of(line: str, keys: Container[str], root: Path | None) -> str:
    """Return the key that a line names, as it is or as a path to the image; the line itself if it names none."""
    if line in keys:
        return line
    text = line.strip().strip("\"'")
    names = [text, os.path.normpath(text), *([os.path.relpath(text, root)] if root and text else [])]
    return next((name for name in names if name in keys), line)


def _images_were(count: int) -> str:
    return "1 image was" if count == 1 else f"{count:,} images were"


def _is_sound(store: LabelStore, key: str) -> bool:
    try:
        store.packed(key)
    except StoreError:
        return False
    return True


def _note_failures(folder: Path, source: ImageSource, failures: list[Failure]) -> None:
    """Write down which images failed; those of other images that lie beside these stay noted while they exist."""
    mine = cache(lambda: frozenset(source.keys))
    root = getattr(source, "root", None)
    update_failures(
        folder,
        failures,
        others=lambda key: root is not None and key not in mine() and (root / key).is_file(),
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
