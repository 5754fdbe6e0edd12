"""Imports the label files that the token labeling and ReLabel toolboxes published in 2021 into a label store.

One `.pt` file an image, CLASSFOLDER/NAME.pt with the image's name up to its first dot: a tensor [2, K, H, W] of the top
logits (float16) and their class ids in the same type. ReLabel's files differ only in their size (15 x 15); its one
label for each image is what `align` gives for a grid of 1 x 1.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from tokenlabel.core.geometry import WHOLE_IMAGE, Box
from tokenlabel.core.scores import Kind, Orientation, ScoreMap, from_top
from tokenlabel.data.class_names import imagenet_ids
from tokenlabel.data.decoding import stored_size
from tokenlabel.data.images import ImageSource, has_classes
from tokenlabel.data.sources import open_aloud
from tokenlabel.labels.encoding import Encoding
from tokenlabel.labels.inspection import summarize
from tokenlabel.labels.manifest import Failure, Manifest, update_failures
from tokenlabel.labels.options import ImportConfig, PublishedLayout
from tokenlabel.labels.store import LabelStore
from tokenlabel.labels.writer import LabelStoreWriter, pack_for
from tokenlabel.runtime.errors import StoreError, first_line
from tokenlabel.runtime.process import ahead, listed, say, thread_pool

# Class ids are stored as float16, which represents integers exactly only up to this one.
FIRST_UNCERTAIN_ID = 2048
MAX_FILE_BYTES = 1 << 26
NUM_READ_AHEAD = 1024
# Files that are read at the start to find K, how many classes a cell keeps.
NUM_PROBED = 10
# Maps whose best class is compared with their image's class, and the least share that should agree: teachers of
# ImageNet reach 80%, with the classes in another order .1%.
NUM_COMPARED, MIN_AGREEMENT = 1000, 0.3


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What a call to `import_labels` did."""

    num_images: int
    num_present: int
    num_imported: int
    failures: tuple[Failure, ...]


def import_labels(
    files: str | Path, folder: str | Path, images: str | Path | ImageSource, config: ImportConfig
) -> Imported:
    """Write published label files into the store `folder`, as logits, for the images that have no label in it.

    `files`: a folder of class folders of `.pt` files, of which the images may have only some. Prints which class each
    id is assumed to be if names do not tell, and how often the best class of a map is that of its image. Images without
    a file, with a corrupt one, or with equal names up to the first dot are listed in the store's manifest. Raises
    StoreError if there is no file for any image, and if the folder holds other labels.
    """
    source = open_aloud(images) if isinstance(images, (str, Path)) else images
    class_names = _class_names(source.class_names, config.num_classes)
    paths = [label_path(Path(files), key) for key in source.keys]
    manifest = Manifest(
        num_classes=config.num_classes,
        class_names=class_names,
        topk=_topk_of(paths, folder=files),
        kind=Kind.LOGITS,
        encoding=Encoding.RAW,
        orientation=Orientation.STORED,
        teacher={"name": "published label files"},
        preprocessing={"region": config.region, "layout": config.layout.value},
    )
    shared = {path for path, count in Counter(paths).items() if count > 1}
    job = _Job(source, paths, shared, has_classes(source), manifest, config.layout, _crop_fraction(config.region))
    failures: list[Failure] = []
    # Threads, not processes: reading files and decoding them release the GIL.
    with LabelStoreWriter(folder, manifest) as writer, thread_pool(config.num_workers) as pool:
        store = LabelStore(folder)
        missing = [index for index, key in enumerate(source.keys) if key not in store]
        outcomes = ahead(pool, job.record, missing, NUM_READ_AHEAD)
        for key, outcome in tqdm(outcomes, total=len(missing), desc=f"import {folder}", unit="img"):
            if isinstance(outcome, Failure):
                failures.append(outcome)
            else:
                writer.add_record(key, outcome)
    update_failures(folder, failures)
    if looks := job.agreements:
        share = sum(looks) / len(looks)
        doubt = ": perhaps these are other images, or other classes in this order" if share <= MIN_AGREEMENT else ""
        say(f"the best class of {share:.0%} of {len(looks):,} maps looked at is their image's{doubt}")
    return Imported(
        num_images=len(source),
        num_present=len(source) - len(missing),
        num_imported=len(missing) - len(failures),
        failures=tuple(failures),
    )


def _class_names(ours: Sequence[str], num_classes: int) -> tuple[str, ...]:
    """Return the names of the files' classes, derived from those of the images; () if they are unknown.

    WordNet ids and numbers identify a class, so the images may have only some classes. Other names are assumed to be in
    order, if there are as many as classes. Raises StoreError for more.
    """
    if len(ours) > num_classes:
        raise StoreError(f"--num-classes {num_classes:,}, but the images have {len(ours):,} classes ({listed(ours)})")
    if num_classes == len(imagenet_ids()) and set(ours) <= set(imagenet_ids()):
        return imagenet_ids() if ours else ()
    if ours and all(name.isdecimal() and int(name) < num_classes for name in ours):
        named = {int(name): name for name in ours}
        if len(named) == len(ours):
            say(f"classes that are called by numbers ({listed(ours)}) are taken for the files' of these ids")
            return tuple(named.get(class_id, str(class_id)) for class_id in range(num_classes))
    if len(ours) == num_classes:
        pairs = [f"{class_id} is {name!r}" for class_id, name in enumerate(ours)]
        say(f"the files do not name their classes; taken to be those of the images, in order: {listed(pairs)}")
        return tuple(ours)
    if ours:
        say(
            f"the images have {len(ours):,} of the files' {num_classes:,} classes ({listed(ours)}), and nothing "
            "says which; labels keep their class ids, without names"
        )
    return ()


def label_path(folder: Path, key: str) -> Path:
    """Return the path of an image's label file: its class folder, and its name up to the first dot."""
    path = PurePosixPath(key)
    return folder / path.parent.name / f"{path.name.split('.', 1)[0]}.pt"


def read_label_file(
    path: str | Path, *, num_classes: int, layout: PublishedLayout | str = PublishedLayout.HW, region: Box = WHOLE_IMAGE
) -> ScoreMap:
    """Return a published label file as a map of logits.

    No code in the file is run. Raises StoreError for other files and for class ids that float16 cannot represent, and
    ValueError for ids beyond `num_classes` and for logits that are not finite.
    """
    path = Path(path)
    logits, ids = _read_file(path)
    if PublishedLayout(layout) is PublishedLayout.WH:
        logits, ids = logits.swapaxes(1, 2), ids.swapaxes(1, 2)
    class_ids = np.moveaxis(ids, 0, 2)  # [H, W, K]
    if not (class_ids == np.floor(class_ids)).all() or class_ids.min() < 0:
        raise StoreError(f"{path}: its second half should be class ids, got {class_ids.min()} to {class_ids.max()}")
    # float16 rounds 2049 to 2048: larger ids may have been other ones.
    if class_ids.max() >= FIRST_UNCERTAIN_ID:
        raise StoreError(
            f"{path}: names class {class_ids.max():.0f}, but float16 tells ids apart only below {FIRST_UNCERTAIN_ID}; "
            "annotate again instead"
        )
    return from_top(
        class_ids.astype(np.int64),
        np.moveaxis(logits, 0, 2).astype(np.float32),
        num_classes=num_classes,
        region=region,
        kind=Kind.LOGITS,
        name=str(path),
    )


@dataclass(frozen=True, eq=False)
class _Job:
    """Where the label file of each image is, and how to read it, for the threads that do.

    `shared`: paths that belong to several images. `known`: which images' classes are known. `agreements`: whether the
    best class of a map is its image's.
    """

    source: ImageSource
    paths: list[Path]
    shared: set[Path]
    known: NDArray[np.bool_]
    manifest: Manifest
    layout: PublishedLayout
    crop: float | None
    agreements: list[bool] = field(default_factory=list)

    def record(self, index: int) -> tuple[str, bytes | Failure]:
        """Return the key of an image and its record, or why it has none."""
        key, path = self.source.keys[index], self.paths[index]
        if path in self.shared:
            reason = f"shares {path.name} with another image: their names are equal up to the first dot"
            return key, Failure(key, reason)
        try:
            region = WHOLE_IMAGE
            if self.crop is not None:
                region = _centre(stored_size(self.source.read(index), key), self.crop)
            score_map = read_label_file(path, num_classes=self.manifest.num_classes, layout=self.layout, region=region)
            if len(self.agreements) < NUM_COMPARED and self.manifest.class_names and self.known[index]:
                own = self.source.class_names[int(self.source.class_ids[index])]
                best = summarize(key, score_map).best_class
                self.agreements.append(own == self.manifest.class_names[best])
            return key, pack_for(self.manifest, key, score_map)
        except (ValueError, OSError) as error:
            return key, Failure(key, str(error))


def _topk_of(paths: Sequence[Path], *, folder: str | Path) -> int:
    """Return how many classes a cell keeps: the most of the first few files that can be read."""
    found: list[int] = []
    problem: Exception | None = None
    for path in (path for path in paths if path.exists()):
        try:
            found.append(len(_read_file(path)[0]))
        except (StoreError, OSError) as error:
            problem = problem or error
        if len(found) == NUM_PROBED:
            break
    if found:
        return max(found)
    if problem is None:
        raise StoreError(f"{folder}: no label file of any image; expected, for example, {paths[0]}")
    raise StoreError(f"{folder}: no label file can be read; the first: {problem}") from problem


def _read_file(path: Path) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return logits and class ids [K, H, W] as they are in the file."""
    if not path.is_file():
        raise StoreError(f"{path}: no such label file")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise StoreError(f"{path}: {path.stat().st_size:,} bytes are too many for a label file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises errors of many types for corrupt files
        raise StoreError(f"{path}: cannot be read as a label file ({first_line(error)})") from error
    if not isinstance(content, torch.Tensor) or content.ndim != 4 or content.shape[0] != 2 or not content.numel():
        got = list(content.shape) if isinstance(content, torch.Tensor) else type(content).__name__
        raise StoreError(f"{path}: expected a tensor [2, K, H, W] of logits and class ids, got {got}")
    logits, ids = content.float().numpy()
    return logits, ids


def _crop_fraction(region: str) -> float | None:
    if region == "full":
        return None
    found = re.fullmatch(r"center:(\d+(?:\.\d+)?)", region)
    if found is None or not 0 < float(found[1]) <= 100:
        raise StoreError(f"--region {region}: expected full, or center:PCT such as center:95.6")
    return float(found[1]) / 100


def _centre(size_px: tuple[int, int], fraction: float) -> Box:
    """Return the centred square of an image of (width, height)."""
    width_px, height_px = size_px
    side_px = fraction * min(size_px)
    left, top = (1 - side_px / width_px) / 2, (1 - side_px / height_px) / 2
    return Box(left=left, top=top, right=1 - left, bottom=1 - top)
