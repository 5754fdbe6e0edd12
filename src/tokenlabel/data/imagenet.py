"""The data sets that ImageNet classifiers are evaluated on, each read from its own layout.

A reader makes of a folder an `EvaluationSet`: images whose class ids are those of the model, and the classes that
compete. `SETS` names the readers; `folder` is for images of your own.
"""

from __future__ import annotations

import json
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm.data
from numpy.typing import NDArray

from tokenlabel.data.images import DataError, ImageSource
from tokenlabel.data.sources import open_aloud

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


class RenumberedImages:
    """The images of another source, their classes those of a model. `class_ids`: one an image."""

    def __init__(self, source: ImageSource, class_ids: NDArray[np.int64], class_names: Sequence[str]) -> None:
        self._source, self._class_ids, self._class_names = source, class_ids, list(class_names)

    @property
    def keys(self) -> Sequence[str]:
        """The name of each image."""
        return self._source.keys

    @property
    def class_ids(self) -> NDArray[np.int64]:
        """The model's class of each image."""
        return self._class_ids

    @property
    def class_names(self) -> list[str]:
        """The names of the model's classes."""
        return self._class_names

    @property
    def passed_over(self) -> Mapping[str, int]:
        """How many files the source passed over, by kind."""
        return getattr(self._source, "passed_over", {})

    def read(self, index: int) -> bytes:
        """Return the encoded image."""
        return self._source.read(index)

    def __len__(self) -> int:
        return len(self._source)


def read_folder(root: Path, class_names: Sequence[str], num_classes: int) -> EvaluationSet:
    """Read images whose folders are named after classes of the model, all of them or some; all classes compete.

    ImageNet-1k's val images in folders of WordNet ids and ImageNet-Sketch are such. A model that does not know the
    names of its classes takes as many folders as it has classes, in sorted order.
    """
    source = open_aloud(root)
    if not class_names:
        if len(source.class_names) != num_classes:
            raise DataError(
                f"{root} has {len(source.class_names)} classes, the model {num_classes} whose names it does not know; "
                "they must be as many, in the order of their sorted names"
            )
        return EvaluationSet(source)
    return EvaluationSet(_renumbered(source, class_names, root))


def read_v2(root: Path, class_names: Sequence[str], num_classes: int) -> EvaluationSet:
    """Read ImageNet-V2: the folders 0 to 999 are class ids."""
    _check_imagenet(num_classes, root)
    source = open_aloud(root)
    strange = [
        name
        for name in source.class_names
        if not (name.isdecimal() and str(int(name)) == name and int(name) < NUM_IMAGENET_CLASSES)
    ]
    if strange:
        raise DataError(f"{root}: ImageNet-V2 has folders named by class ids, 0 to 999; found {strange[0]!r}")
    ids = np.array([int(name) for name in source.class_names])
    return EvaluationSet(RenumberedImages(source, ids[source.class_ids], class_names))


def read_a(root: Path, class_names: Sequence[str], num_classes: int) -> EvaluationSet:
    """Read ImageNet-A: WordNet ids of 200 classes, among which predictions choose."""
    return _read_subset(root, class_names, num_classes, file="imagenet_a_synsets.txt", name="ImageNet-A")


def read_r(root: Path, class_names: Sequence[str], num_classes: int) -> EvaluationSet:
    """Read ImageNet-R: WordNet ids of 200 classes, among which predictions choose."""
    return _read_subset(root, class_names, num_classes, file="imagenet_r_synsets.txt", name="ImageNet-R")


SETS: dict[str, Callable[[Path, Sequence[str], int], EvaluationSet]] = {
    "folder": read_folder,
    "imagenet-v2": read_v2,
    "imagenet-a": read_a,
    "imagenet-r": read_r,
}


def corruption_folders(root: Path) -> dict[tuple[str, int], Path]:
    """Return the folder of class folders of each corruption and severity of ImageNet-C.

    Raises DataError unless all 15 corruptions are there at all 5 severities; the four extra ones are left out.
    """
    folders = {
        (name, severity): root / name / str(severity) for name in ALEXNET_ERRORS for severity in SEVERITIES
    }
    missing = [str(path.relative_to(root)) for path in folders.values() if not path.is_dir()]
    if missing:
        raise DataError(
            f"{root}: ImageNet-C has a folder CORRUPTION/SEVERITY for 15 corruptions and severities 1 to 5; "
            f"{len(missing)} are missing ({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''})"
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
    labels = _read_json(path)
    if not isinstance(labels, list) or not all(isinstance(ids, list) for ids in labels):
        raise DataError(f"{path}: expected a list with a list of class ids for each val image")
    return {f"ILSVRC2012_val_{number:08d}.JPEG": ids for number, ids in enumerate(labels, start=1)}


def read_multi_labels(path: Path, class_names: Sequence[str]) -> dict[str, list[int]]:
    """Return the class ids of each image by key, from a JSON file of {"path of the image": [names or ids, ...]}.

    Raises DataError for a class that the model does not have.
    """
    found = _read_json(path)
    if not isinstance(found, dict):
        raise DataError(f"{path}: expected a mapping from paths of images to lists of classes")
    ids = {name: class_id for class_id, name in enumerate(class_names)}
    for key, classes in found.items():
        strange = [
            c for c in classes if not (c in ids if isinstance(c, str) else c in range(len(class_names)))
        ]
        if strange:
            raise DataError(f"{path}: {key} has the class {strange[0]!r}, which the model does not")
    return {key: [ids[c] if isinstance(c, str) else c for c in classes] for key, classes in found.items()}


def _read_subset(
    root: Path, class_names: Sequence[str], num_classes: int, *, file: str, name: str
) -> EvaluationSet:
    _check_imagenet(num_classes, root)
    data = pkgutil.get_data(timm.data.__name__, f"_info/{file}")
    assert data is not None, f"timm ships {file}"
    wanted = data.decode().split()
    source = open_aloud(root)
    strange = [found for found in source.class_names if found not in wanted]
    if strange:
        raise DataError(f"{root}: {name} has {len(wanted)} classes, and {strange[0]!r} is none of them")
    competing = np.isin(np.array(class_names), wanted)
    return EvaluationSet(_renumbered(source, class_names, root), competing)


def _renumbered(source: ImageSource, class_names: Sequence[str], root: Path) -> ImageSource:
    if source.class_names == list(class_names):
        return source
    ids = {name: class_id for class_id, name in enumerate(class_names)}
    strange = [name for name in source.class_names if name not in ids]
    if strange:
        raise DataError(
            f"{root}: {strange[0]!r} is no class of the model, which knows {', '.join(class_names[:3])}, ... "
            f"({len(class_names)} classes); name each folder after the model's class"
        )
    of_folder = np.array([ids[name] for name in source.class_names], np.int64)
    return RenumberedImages(source, of_folder[source.class_ids], class_names)


def _check_imagenet(num_classes: int, root: Path) -> None:
    if num_classes != NUM_IMAGENET_CLASSES:
        raise DataError(
            f"{root} is for models of ImageNet-1k's 1,000 classes, this one has {num_classes}; read it as a folder"
        )


def _read_json(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error})") from error
