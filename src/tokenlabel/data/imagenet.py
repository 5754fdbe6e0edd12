"""The data sets that ImageNet classifiers are evaluated on, each read from its own layout.

A reader makes of a folder an `EvaluationSet`: images whose class ids are those of the model, and the classes that
compete. `SETS` names the readers; `folder` is for images of your own.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import timm.data
from numpy.typing import NDArray

from tokenlabel.data.class_names import class_order, imagenet_names, match_classes, say_imagenet
from tokenlabel.data.classes import are_numbers, ids_among, strangers
from tokenlabel.data.images import ImageSource, ImageSubset, has_classes
from tokenlabel.data.sources import open_aloud
from tokenlabel.runtime.errors import DataError
from tokenlabel.runtime.process import listed, read_json, say

NUM_IMAGENET_CLASSES = 1000

# Mean errors of AlexNet over the five severities, which the mean corruption error divides by (Hendrycks and
# Dietterich 2019).
ALEXNET_ERRORS = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
SEVERITIES = (1, 2, 3, 4, 5)


@dataclass(frozen=True, eq=False)
class EvaluationSet:
    """Images with the model's class ids. `competing` [C]: which classes predictions choose from; all if None."""

    source: ImageSource
    competing: NDArray[np.bool_] | None = None


def read_folder(
    root: Path,
    class_names: Sequence[str],
    num_classes: int,
    *,
    assumed: bool = False,
    order: str | None = None,
    needed: bool = True,
) -> EvaluationSet:
    """Read images whose folders are named after classes of the model, all of them or some; all classes compete.

    ImageNet-1k's val images in folders of WordNet ids and ImageNet-Sketch are such. Of a model that does not know the
    names of its classes, numbers are ids, and as many folders as it has classes are these in sorted order. `assumed`,
    `order`: see `match_classes` and `class_order`. Unless `needed`, they may have no classes at all.
    """
    source = open_aloud(root)
    if not needed and not has_classes(source).any():
        return EvaluationSet(source)
    if order is not None:
        known = () if assumed else class_names
        class_names, assumed = class_order(order, source.class_names, known, count=num_classes), False
    return EvaluationSet(as_classes_of(source, class_names, num_classes, root, assumed=assumed, option="--class-order"))


def read_v2(root: Path, class_names: Sequence[str], num_classes: int) -> EvaluationSet:
    """Read ImageNet-V2: the folders 0 to 999 are class ids."""
    ids = imagenet_ids(class_names, num_classes, root)
    source = open_aloud(root)
    strange = [
        name
        for name in source.class_names
        if not (name.isdecimal() and str(int(name)) == name and int(name) < NUM_IMAGENET_CLASSES)
    ]
    if strange:
        raise DataError(f"{root}: ImageNet-V2 has folders named by class ids, 0 to 999; found {strange[0]!r}")
    ids = ids[[int(name) for name in source.class_names]]
    return EvaluationSet(ImageSubset(source, class_ids=ids[source.class_ids], class_names=class_names))


def _read_subset(root: Path, class_names: Sequence[str], num_classes: int, *, name: str) -> EvaluationSet:
    """Read ImageNet-A or -R: WordNet ids of 200 classes, among which predictions choose."""
    # The WordNet id of each of the model's classes, in the model's order.
    of_model = np.empty(NUM_IMAGENET_CLASSES, object)
    of_model[imagenet_ids(class_names, num_classes, root)] = imagenet_names(num_classes)
    data = pkgutil.get_data(timm.data.__name__, f"_info/{name.lower().replace('-', '_')}_synsets.txt")
    assert data is not None, f"timm ships the classes of {name}"
    wanted = data.decode().split()
    source = open_aloud(root)
    strange = [found for found in source.class_names if found not in wanted]
    if strange:
        raise DataError(f"{root}: {name} has {len(wanted)} classes, and {strange[0]!r} is none of them")
    competing = np.isin(of_model.astype(str), wanted)
    return EvaluationSet(as_classes_of(source, of_model.tolist(), num_classes, root), competing)


SETS: dict[str, Callable[[Path, Sequence[str], int], EvaluationSet]] = {
    "folder": read_folder,
    "imagenet-v2": read_v2,
    "imagenet-a": partial(_read_subset, name="ImageNet-A"),
    "imagenet-r": partial(_read_subset, name="ImageNet-R"),
}


def corruption_folders(root: Path) -> dict[tuple[str, int], Path]:
    """Return the folder of class folders of each corruption and severity of ImageNet-C.

    Raises DataError unless all 15 corruptions are there at all 5 severities; the four extra ones are left out.
    """
    folders = {(name, severity): root / name / str(severity) for name in ALEXNET_ERRORS for severity in SEVERITIES}
    missing = [str(path.relative_to(root)) for path in folders.values() if not path.is_dir()]
    if missing:
        raise DataError(
            f"{root}: ImageNet-C has a folder CORRUPTION/SEVERITY for 15 corruptions and severities 1 to 5; "
            f"{len(missing)} are missing ({listed(missing)})"
        )
    return folders


def corruption_figures(top1: Mapping[tuple[str, int], float]) -> dict[str, float]:
    """Return mce, the mean top-1, and the corruption error of each corruption.

    A corruption's error is its mean error over severities divided by AlexNet's; mce is the mean over corruptions.
    """
    errors = {
        name: float(np.mean([1 - top1[name, severity] for severity in SEVERITIES])) / alexnet
        for name, alexnet in ALEXNET_ERRORS.items()
    }
    by_name = {f"ce_{name}": error for name, error in errors.items()}
    return {"mce": float(np.mean([*errors.values()])), "top1": float(np.mean([*top1.values()]))} | by_name


def read_real_labels(path: Path) -> dict[str, list[int]]:
    """Return the class ids of each of ImageNet's val images by file name, from `real.json`.

    The file lists one list of ids for each of the 50,000 images in their order. Raises DataError for anything else.
    """
    labels = read_json(path)
    known = range(NUM_IMAGENET_CLASSES)
    if not isinstance(labels, list) or not all(
        isinstance(ids, list) and all(type(class_id) is int and class_id in known for class_id in ids) for ids in labels
    ):
        raise DataError(f"{path}: expected a list with a list of class ids, 0 to 999, for each val image")
    return {f"ILSVRC2012_val_{number:08d}.JPEG": ids for number, ids in enumerate(labels, start=1)}


def read_multi_labels(path: Path, class_names: Sequence[str]) -> dict[str, list[int]]:
    """Return the class ids of each image by key, from a JSON file of {"path of the image": [names or ids, ...]}.

    Raises DataError for a class that the model does not have.
    """
    found = read_json(path)
    lists = [*found.values()] if isinstance(found, dict) else []
    if not any(lists) or not all(isinstance(classes, list) for classes in lists):
        raise DataError(f"{path}: expected a mapping from paths of images to lists of classes")
    named = sorted({c for classes in found.values() for c in classes if isinstance(c, str)})
    ids = dict(zip(named, ids_among(named, class_names), strict=True))
    of_image = {key: [ids[c] if isinstance(c, str) else c for c in classes] for key, classes in found.items()}
    known = range(len(class_names))
    for key, classes in of_image.items():
        strange = [c for c, i in zip(found[key], classes, strict=True) if type(i) is not int or i not in known]
        if strange:
            raise DataError(
                f"{path}: {key} has the class {strange[0]!r}, which the model does not: it knows "
                f"{listed(class_names)} ({len(class_names):,} classes)"
            )
    return of_image


def as_classes_of(
    source: ImageSource,
    class_names: Sequence[str],
    num_classes: int,
    where: str | Path,
    *,
    assumed: bool = False,
    option: str = "",
) -> ImageSource:
    """Return images with the class ids of a model, of whose classes they may hold some (see `match_classes`).

    Raises DataError for classes that the model does not have; `where`: what it calls the images.
    """
    ours, known = source.class_names, has_classes(source)
    if not known.any():
        tokens = "; --masks DIR or --labels STORE compare the tokens alone" if option else ""
        raise DataError(f"{where}: the images have no classes that answers could be held against{tokens}")
    if not known.all():
        say(f"{where}: {(~known).sum():,} of {len(source):,} images have no class, and are left out")
        source = ImageSubset(source, np.flatnonzero(known))
    ids = match_classes(ours, class_names, count=num_classes, assumed=assumed, option=option)
    used = np.unique(source.class_ids).tolist()  # a list of class ids may leave some out
    if any(ids[class_id] == -1 for class_id in used):
        if not class_names:
            advice = f", or give {option} FILE" if option else ""
            raise DataError(
                f"{where} has {len(ours)} classes, the model {num_classes} whose names it does not know; "
                f"they must be as many, in the order of their sorted names{advice}"
            )
        of_images = ([ours[class_id] for class_id in used], class_names, [ids[class_id] for class_id in used])
        reason = strangers(*of_images, count=num_classes, them="the model")
        advice = f"; {option} overrules its names, which are ImageNet's by their number" if assumed else ""
        raise DataError(f"{where}: {reason}; name each folder after the model's class{advice}")
    if ids == list(range(num_classes)):
        return source
    names = list(class_names) or [str(i) for i in range(num_classes)]
    return ImageSubset(source, class_ids=np.array(ids)[source.class_ids], class_names=names)


def imagenet_ids(class_names: Sequence[str], num_classes: int, where: str | Path) -> NDArray[np.int64]:
    """Return the id that each class of ImageNet-1k has in a model. Raises DataError for models of other classes."""
    names = imagenet_names(NUM_IMAGENET_CLASSES)
    if num_classes == len(names) and are_numbers(class_names):
        say_imagenet(names, them="the model", option="--class-order")
        return np.arange(num_classes)
    ids = np.array(ids_among(names, class_names))
    if num_classes != len(names) or ids.min() < 0:
        has = f" has {num_classes}" if num_classes != len(names) else f"'s are others ({listed(class_names)})"
        raise DataError(f"{where} is for models of ImageNet-1k's 1,000 classes, this one{has}; read it as a folder")
    return ids
