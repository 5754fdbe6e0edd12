"""What lies in folders and archives: images, files that are passed over and why, and layouts that are no classes."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from tokenlabel.runtime.notices import listed

EXTENSIONS = (
    ".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp",
)  # fmt: skip

# Pictures that Pillow does not read, or not without more than it comes with.
UNREAD_PICTURES = (
    ".heic", ".heif", ".hif", ".jxl", ".jp2", ".j2k", ".jpx", ".jpeg2000", ".cr2", ".cr3", ".nef", ".arw", ".dng",
    ".raf", ".orf", ".rw2", ".raw", ".psd", ".svg", ".eps", ".exr", ".hdr",
)  # fmt: skip

# Folders that file systems, disk stations and archivers leave behind, with thumbnails or with files of their own.
_LEAVINGS = (
    "__macosx", "__pycache__", "@eadir", "@tmp", "#recycle", "@recycle", "$recycle.bin", "lost+found",
    "system volume information", "network trash folder", "temporary items",
)  # fmt: skip

_MASK_WORDS = "seg|segmentation|semseg|instances?|panoptic|masks?|gt|depth|disparity|trimap|matte|labelids"
_MASK = re.compile(
    rf"(?:[._-](?:{_MASK_WORDS})|\.(?:labels?|targets?|output|alpha|normals?|edges?))(?:[._-]?\d+)?\.\w+$",
    re.IGNORECASE,
)

_PARTS = {
    **dict.fromkeys(("train", "training", "trainset"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "valset", "dev", "devset"), "val"),
    **dict.fromkeys(("test", "testing", "testset", "pred", "holdout", "unlabeled", "unlabelled", "extra"), "test"),
}  # fmt: skip
_BESIDE_PARTS = {
    "set",
    "split",
    "seg",
    "data",
    "images",
    "image",
    "imgs",
    "img",
}  # seg_train, test_set, train2017
_IMAGE_FOLDERS = {"images", "image", "imgs", "img", "jpegimages", "leftimg8bit", "photos", "pictures"}
_TRUTH_FOLDERS = {
    "masks", "mask", "annotations", "annotation", "labels", "segmentationclass", "gtfine", "gt", "segmentation",
}  # fmt: skip
_CONTAINERS = {*_IMAGE_FOLDERS, "dataset", "datasets", "data", "classes", "categories", "imagefolder"}

NEED_CLASSES = "put each into a folder named after its class, or list paths and classes in a .csv file"


class DataError(ValueError):
    """A folder of images that can't be used as it is."""


@dataclass
class Listing:
    """What is below a folder: paths of images relative to it, the folders in it, and what was passed over by kind."""

    images: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)


def list_images(root: Path) -> Listing:
    """Look through a folder, links followed; each folder is read once, whatever links lead to it.

    So a link to a folder above (`ant/up -> ..`) adds nothing, and of a folder and links to it the folder itself counts.
    Raises DataError for a folder that links put into two classes, and one that may not be read.
    """
    found, seen = Listing(), dict[str, str]()  # by real path
    here = os.path.realpath(root)
    folders: list[tuple[str, str, tuple[str, ...]]] = [
        ("", here, (here,))
    ]  # path, real path, real paths on the way
    links: list[tuple[str, str, tuple[str, ...]]] = []
    while folders or links:  # links last
        path, real, above = (folders or links).pop()
        if real in seen:
            _refuse_two_classes(root, seen[real], path)
            found.passed_over["linked to a folder that was read"] += 1
            continue
        seen[real] = path
        try:
            with os.scandir(root / path) as entries:
                inside = list(entries)
        except OSError as error:
            raise DataError(f"{root / path}: cannot be listed ({error.strerror})") from error
        for entry in inside:
            name = f"{path}/{entry.name}" if path else entry.name
            if entry.is_dir():
                target = os.path.realpath(entry.path) if entry.is_symlink() else f"{real}/{entry.name}"
                if _passed_over_folder(entry.name):
                    found.passed_over[f"{entry.name}/"] += 1
                elif any(f"{folder}/".startswith(f"{target}/") for folder in (*above, real)):
                    found.passed_over["linked to a folder above"] += 1
                else:
                    if not path:
                        found.folders.append(name)
                    if entry.is_symlink():
                        links.append((name, target, (*above, real)))
                    else:
                        folders.append((name, target, above))
            elif not entry.is_file():
                found.passed_over["linked to nothing" if entry.is_symlink() else "special"] += 1
            elif kind := _passed_over_file(entry.name):
                found.passed_over[kind] += 1
            else:
                found.images.append(name)
    return found


def _refuse_two_classes(root: Path, first: str, second: str) -> None:
    if first.split("/", 1)[0] != second.split("/", 1)[0]:
        raise DataError(
            f"{root}: {first} and {second} are one folder, by a link; an image has one class: remove the link"
        )


def why_passed_over(path: str) -> str | None:
    """Return what kind of file is passed over: hidden, or by its folder or its extension; None for an image."""
    folder, _, name = path.rpartition("/")
    return _passed_over_folder(folder) or _passed_over_file(name)


def _passed_over_file(name: str) -> str | None:
    if name.startswith("."):
        return "hidden"
    _, dot, extension = name.lower().rpartition(".")
    return None if dot + extension in EXTENSIONS else dot + extension if dot else "without an extension"


@lru_cache(1024)
def _passed_over_folder(path: str) -> str | None:
    for name in path.split("/"):
        if name.startswith("."):
            return "hidden"
        if name.lower() in _LEAVINGS:
            return f"in {name}"
    return None


def passed_over_text(passed_over: Mapping[str, int]) -> str:
    """Return "passed over 15 files and 1 folder: 12 .heic (not read: convert them), 3 hidden, 1 @eaDir/"."""
    kinds = sorted(passed_over.items(), key=lambda kind: (-kind[1], kind[0]))
    notes = [
        f"{count:,} {kind}{' (not read: convert them)' if kind in UNREAD_PICTURES else ''}"
        for kind, count in kinds
    ]
    num_folders = sum(count for kind, count in kinds if kind.endswith("/"))
    numbers = {"file": sum(passed_over.values()) - num_folders, "folder": num_folders}
    counts = [f"{n:,} {noun}{'' if n == 1 else 's'}" for noun, n in numbers.items() if n]
    return f"passed over {' and '.join(counts)}: {listed(notes, most=8)}"


def without_masks(paths: Sequence[str]) -> tuple[list[str], int]:
    """Return paths less those of masks beside their image (x.seg.png, x_mask.png by x.jpg), and how many these are."""
    masks = {path: path[: found.start()] for path in paths if (found := _MASK.search(path))}
    if not masks:
        return list(paths), 0
    stems = {path.rpartition(".")[0] for path in paths}
    kept = [path for path in paths if masks.get(path) not in stems]
    return kept, len(paths) - len(kept)


def is_named_as_mask(path: str) -> bool:
    """Say whether a name ends as those of masks and depth maps do: x.seg.png, x_mask.png."""
    return _MASK.search(path) is not None


def part_of(name: str) -> str | None:
    """Return which part of a data set (train, val, test) a folder is by its name; None if it may as well be a class."""
    words = [word for word in re.findall(r"[a-z]+", name.lower()) if word not in _BESIDE_PARTS]
    return _PARTS.get(words[0]) if len(words) == 1 else None


def mistaken_layout(
    place: str | Path, folders: Sequence[str], images: Sequence[str], *, packed: bool = False
) -> str | None:
    """Say what is wrong if `folders`, the first ones of all paths, are clearly no classes, and what was meant.

    `packed`: they lie in tar files, which cannot be opened in part.
    """
    how = "pack what lies in it: tar -C {0} -cf NAME.tar ." if packed else "name {1}/{0}"
    overrule = "if they are classes, rename them or write a list of images with their classes"
    parts = {name: part for name in folders if (part := part_of(name))}
    in_parts = [path.split("/") for path in images if path.split("/", 1)[0] in parts] if parts else []
    inside = {names[1] for names in in_parts if len(names) > 2}
    if len(set(parts.values())) > 1 or (parts and len(parts) == len(folders)) or inside & set(folders):
        meant = next((name for name, part in parts.items() if part == "train"), next(iter(parts)))
        bare = any(names[0] == meant and len(names) == 2 for names in in_parts)
        advice = f"; its images lie in no class folders: {NEED_CLASSES}" if bare else ""
        amid = len(parts) < len(folders) and len(set(parts.values())) == 1  # ant, bee, val
        remedy = "move it out from among the classes" if amid else f"{how.format(meant, place)}{advice}"
        return f"{place}: {listed(sorted(parts))}: parts of a data set, no classes; {remedy} ({overrule})"
    kinds = {name.lower() for name in folders}
    if kinds & _IMAGE_FOLDERS and kinds & _TRUTH_FOLDERS:
        return (
            f"{place}: {listed(sorted(folders))} are images and what was drawn or written of them, no classes; "
            f"expected one folder a class ({overrule}). `tokenlabel segment train` takes images with masks"
        )
    if len(folders) == 1 and all(path.count("/") > 1 for path in images):
        (only,) = folders
        if only.lower() in {*_CONTAINERS, Path(place).name.lower()}:
            inner = sorted({path.split("/")[1] for path in images})
            return f"{place}: all lies in {only}, which holds {listed(inner)}; {how.format(only, place)} ({overrule})"
    return None


def doubtful_layout(place: str | Path, folders: Sequence[str], images: Sequence[str]) -> list[str]:
    """Say what else may be the classes if all folders hold the same folders and no image besides (art/ant, ink/ant)."""
    if len(folders) < 2 or any(path.count("/") == 1 for path in images):
        return []
    inner: dict[str, set[str]] = {name: set() for name in folders}
    for path in images:
        outer, name, _ = path.split("/", 2)
        inner[outer].add(name)
    first, *others = inner.values()
    if len(first) < 2 or any(names != first for names in others) or all(map(str.isdecimal, first)):
        return []
    return [
        f"each of these folders holds {listed(sorted(first))}: if these are the classes, name {place}/{folders[0]}"
    ]


def refuse_equal_looking(names: Iterable[str], where: str | Path) -> None:
    """Raise DataError for classes whose names look the same (an accent in two Unicode forms)."""
    seen = dict[str, str]()
    for name in names:
        looks = unicodedata.normalize("NFC", name).strip()
        if looks in seen:
            raise DataError(
                f"{where}: two classes look the same, {seen[looks]!a} and {name!a}; make them one"
            )
        seen[looks] = name
