"""Which images a call to `annotate` labels (those without a label, and those to label again), and a better size."""

from __future__ import annotations

import os
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path

import torch
from PIL import Image

from tokenlabel.data.decoding import decode_image
from tokenlabel.data.images import ImageSource
from tokenlabel.labels.fingerprints import MAX_READ, Replaced, find_replaced
from tokenlabel.labels.store import LabelStore
from tokenlabel.labels.writer import LabelStoreWriter, remove_leftovers
from tokenlabel.runtime.distributed import Ranks
from tokenlabel.runtime.errors import ImageError, ModelError, StoreError
from tokenlabel.runtime.process import listed, say
from tokenlabel.teachers.input import TeacherInput
from tokenlabel.teachers.labelling import Labelling, TeacherImage, as_tensor
from tokenlabel.teachers.networks import NetworkTeacher
from tokenlabel.teachers.vectors import spread

CHANGED = "changed"

NUM_TRIED = 128
ENOUGH_IMAGES = 10_000
"""From so many images on, sizes are tried, which costs as much as labelling some 750 images."""

_FACTORS = (1.25, 1.5)
_MIN_GAIN = 4  # images; fewer of 128 may well be chance


@dataclass(frozen=True, kw_only=True)
class Todo:
    """The indices of the images to label. `anew`: of those that have a label. Others: see `LabelStoreWriter`."""

    indices: list[int]
    anew: list[int]
    generation: int
    request: str

    def share(self, source: ImageSource, ranks: Ranks) -> list[int]:
        """Return the images of a rank: of tar files a contiguous part, so that most files are read by one rank only."""
        groups = getattr(source, "groups", None)
        if groups is None:
            return self.indices[ranks.rank :: ranks.world_size]
        in_order = sorted(self.indices, key=groups.__getitem__)
        start, end = (len(in_order) * rank // ranks.world_size for rank in (ranks.rank, ranks.rank + 1))
        return in_order[start:end]


def find_todo(job: Labelling, source: ImageSource, folder: Path, again: str | None) -> Todo:
    """Create the store if there is none; return the images to label, and print which others were replaced.

    `again`: see `AnnotateConfig`. Raises StoreError for a store of other labels, or one that cannot be written to.
    """
    asked, request = _request(Path(again), source) if again not in (None, CHANGED) else ([], "")
    with LabelStoreWriter(folder, job.manifest):
        remove_leftovers(folder)
    store = LabelStore(folder)
    missing = {index for index, key in enumerate(source.keys) if key not in store}
    replaced = find_replaced(store, source, max_read=None if again == CHANGED else MAX_READ)
    present = [index for index in range(len(source)) if index not in missing]
    sample = spread(len(present), len(present) if again == CHANGED else NUM_TRIED)
    of_other_masks = job.changed_masks(store, [present[i] for i in sample])
    if again == CHANGED:
        anew = {*replaced.indices, *of_other_masks}
        if not anew:
            unknown = replaced.num_unknown
            but = f", but {unknown:,} labels do not say what image they were made of" if unknown else ""
            say(f"{folder}: no image is known to have been replaced since labelling{but}")
    else:
        # A call that continues another one skips the labels that this one made, if they are intact and the image is
        # still the same.
        done = store.answers(request) if asked else set()
        done.difference_update(source.keys[index] for index in replaced.indices)
        keys = ((index, source.keys[index]) for index in asked if index not in missing)
        anew = {index for index, key in keys if key not in done or not _is_sound(store, key)}
        if asked and not anew and missing.isdisjoint(asked):
            say(
                f"{again}: the images that it lists were labelled again before; to do so once more, change the "
                "file, if only by a line that begins with #"
            )
    others, masks = ([source.keys[i] for i in of if i not in anew] for of in (replaced.indices, of_other_masks))
    _say_replaced(folder, others, replaced, are_all=len(others) == len(present), masks=masks)
    indices = sorted(missing | anew)
    if indices and not os.access(folder, os.W_OK):
        raise StoreError(
            f"{folder}: cannot be written to, which the labels of {len(indices):,} more images need (the first: "
            f"{source.keys[indices[0]]})"
        )
    newest = max((shard.generation for shard in store.shards), default=0)
    return Todo(indices=indices, anew=sorted(anew), generation=newest + 1 if anew else 0, request=request)


def _say_replaced(folder: Path, keys: list[str], replaced: Replaced, *, are_all: bool, masks: list[str]) -> None:
    """Print which images (or `masks`) were replaced and keep their old label. `are_all`: all labelled images were."""
    if keys:
        elsewhere = "; if these are other images of the same names, give them a folder of their own"
        say(
            f"{folder}: {_images_were(len(keys))} replaced since labelling ({listed(keys)}); --again {CHANGED} labels "
            f"them again{elsewhere if are_all else ''}"
        )
    if masks:
        say(
            f"{folder}: of the masks looked at, {len(masks):,} were replaced since labelling ({listed(masks)}); "
            f"--again {CHANGED} labels their images again"
        )
    if replaced.num_unsure:
        say(
            f"{folder}: {_images_were(replaced.num_unsure)} modified since labelling and kept their size; --again "
            f"{CHANGED} reads them, and labels those again that were replaced"
        )


def _request(path: Path, source: ImageSource) -> tuple[list[int], str]:
    """Return the indices of the images whose keys a file lists, and an id of this request, a hash of the file.

    Raises ValueError if the file cannot be read, lists nothing, or lists something that is no key of an image.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"--again {path}: cannot be read ({error.strerror}); expected a text file with a key a line, or {CHANGED}"
        ) from error
    indices = {key: index for index, key in enumerate(source.keys)}
    # Keys that are not UTF-8 keep their bytes, as in stores; editors of other systems may have added a BOM and CRs.
    lines = content.decode("utf-8", "surrogateescape").removeprefix("\ufeff").replace("\r\n", "\n").split("\n")
    lines = [line for line in lines if line in indices or (line.strip() and line[0] != "#")]  # a key may begin with #
    asked = [*dict.fromkeys(_key_of(line, indices, getattr(source, "root", None)) for line in lines)]
    unknown = [line for line in asked if line not in indices]
    if unknown or not asked:
        found = f"{len(unknown):,} are not ({listed(unknown)})" if unknown else "it lists none"
        raise ValueError(f"--again {path}: expected keys of the images, such as {source.keys[0]}; {found}")
    return [indices[key] for key in asked], blake2b(content, digest_size=8).hexdigest()


def _key_of(line: str, keys: Container[str], root: Path | None) -> str:
    """Return the key that a line names, as a key or as a path to the image; the line itself if it names none."""
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


def proposed_size(
    teacher: NetworkTeacher, source: ImageSource, indices: Sequence[int], device: torch.device
) -> str | None:
    """Return a message that proposes a larger size, if it labels the first images better; None if none does.

    Better: on more images, the mean over the locations of the whole image has the class that the network predicts for
    the crop that it was evaluated on. None for teachers whose size or crop was chosen by the user.
    """
    crop = teacher.evaluated_on
    if crop is None or teacher.input.size is None:
        return None
    images: list[Image.Image] = []
    for index in indices[:NUM_TRIED]:
        try:
            images.append(decode_image(source.read(index), source.keys[index]))
        except ImageError:
            continue
    own = [_class_of(teacher, crop, image, device, whole=False) for image in images]

    def _agreeing(input: TeacherInput) -> int:
        found = (_class_of(teacher, input, image, device, whole=True) for image in images)
        return sum(ours == theirs for ours, theirs in zip(own, found, strict=True))

    size, stride_px = teacher.input.size, teacher.input.stride_px
    others = [round(size * factor / stride_px) * stride_px for factor in _FACTORS]
    try:
        counts = {other: _agreeing(replace(teacher.input, size=other)) for other in [size, *others]}
    except (ModelError, ValueError):  # the network does not take larger images
        return None
    best = max(counts, key=lambda other: (counts[other], -other))  # of equal ones the cheapest
    if counts[best] - counts[size] < _MIN_GAIN:
        return None
    return (
        f"{teacher.description['name']}: of {len(images)} whole images at {size} px it names the class of its own crop "
        f"in {counts[size]}, at {best} px in {counts[best]}: --size {best}, into another folder, may label better, for "
        f"{(best / size) ** 2:.1f} times the work"
    )


def _class_of(
    teacher: NetworkTeacher, input: TeacherInput, image: Image.Image, device: torch.device, *, whole: bool
) -> int:
    """Return the class of the mean over all locations (`whole`), or of the network's own output."""
    with torch.inference_mode():
        logits = teacher.logits(as_tensor([TeacherImage("", *input.of(image))], device))
    scores = logits.locations.float().mean(dim=(1, 2)) if whole else logits.image.float()
    return int(scores.argmax(dim=1))
