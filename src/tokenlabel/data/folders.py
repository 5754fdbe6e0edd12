"""What is in folders and archives: images, files that are skipped and why, and layouts that are clearly no classes."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from tokenlabel.runtime.errors import DataError
from tokenlabel.runtime.process import listed

EXTENSIONS = (
    ".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp",
)  # fmt: skip

# Pictures that Pillow does not read, or not without more than it comes with.
UNREAD_PICTURES = (
    ".heic", ".heif", ".hif", ".jxl", ".jp2", ".j2k", ".jpx", ".jpeg2000", ".cr2", ".cr3", ".nef", ".arw", ".dng",
    ".raf", ".orf", ".rw2", ".raw", ".psd", ".svg", ".eps", ".exr", ".hdr",
)  # fmt: skip

_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")

# Folders that file systems, disk stations and archivers leave behind, with thumbnails or with files of their own.
_LEAVINGS = (
    "__macosx", "__pycache__", "@eadir", "@tmp", "#recycle", "@recycle", "$recycle.bin", "lost+found",
    "system volume information", "network trash folder", "temporary items", "#snapshot", "~snapshot", "recycler",
    "found.000", "@__thumb", "@sharebin", "@recently-snapshot", "cvs", "_vti_cnf",
)  # fmt: skip

# Below a class; beside other classes one may be called so.
_THUMBNAILS = ("thumbnails", "thumbnail", "thumbs", "thumb", "_thumbs", "_thumbnails")

# Pictures that tools draw or shrink of an image, and put beside it.
_MASK_WORDS = (
    "seg|segmentation|semseg|instances?|panoptic|(?:colou?r[_-])?masks?|gt|depth|disparity|trimap|matte|labelids|"
    "annotations?|superpixels?|thumb(?:nail)?s?"
)
_MASK = re.compile(
    rf"(?:[._-](?:{_MASK_WORDS})|\.(?:labels?|targets?|output|alpha|normals?|edges?))(?:[._-]?\d+)?\.\w+$",
    re.IGNORECASE,
)

_PARTS = {
    **dict.fromkeys(("train", "training", "trainset", "trainval", "labeled", "labelled"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "valset", "dev", "devset", "eval", "evaluation"), "val"),
    **dict.fromkeys(("test", "testing", "testset", "pred", "holdout", "unlabeled", "unlabelled", "extra"), "test"),
}  # fmt: skip
_BESIDE_PARTS = {"set", "split", "seg", "data", "images", "image", "imgs", "img"}  # seg_train, test_set, train2017
_IMAGE_FOLDERS = {"images", "image", "imgs", "img", "jpegimages", "leftimg8bit", "photos", "pictures"}
_TRUTH_FOLDERS = {
    "masks", "mask", "annotations", "annotation", "labels", "segmentationclass", "gtfine", "gt", "segmentation",
}  # fmt: skip
_NO_CLASSES = {*_IMAGE_FOLDERS, *_TRUTH_FOLDERS}
_CONTAINERS = {*_IMAGE_FOLDERS, "dataset", "datasets", "data", "classes", "categories", "imagefolder"}

NEED_CLASSES = "put each into a folder named after its class, or list paths and classes in a .csv file"
IF_NO_CLASSES = "If folders are no classes here, list the paths alone in a .txt file and name that"


@dataclass
class Listing:
    """What is below a folder: paths of images relative to it, the folders in it, and the skipped files by kind.

    `read`: the modification time of each folder that was read, in ns. `num_links`: symbolic links that were met.
    """

    images: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    read: dict[str, int] = field(default_factory=dict)
    num_links: int = 0


class _Folder(NamedTuple):
    """A folder to look through. `above`: the real paths from which links led here, the root's first."""

    path: str
    real: str
    above: tuple[str, ...]

    def inner(self, entry: os.DirEntry[str]) -> _Folder:
        """Return a folder in this one."""
        path = f"{self.path}/{entry.name}" if self.path else entry.name
        if entry.is_symlink():
            return _Folder(path, os.path.realpath(entry.path), (*self.above, self.real))
        return _Folder(path, f"{self.real}/{entry.name}", self.above)


def list_images(root: Path) -> Listing:
    """List the images below a folder, following links; each folder is read once, however many links lead to it.

    So a link to a folder above (`ant/up -> ..`) adds nothing. Raises DataError for a folder that links put into two
    classes, and for one that cannot be read.
    """
    found, seen = Listing(), dict[str, str]()  # by real path
    here = os.path.realpath(root)
    folders, links = [_Folder("", here, (here,))], list[_Folder]()
    while folders or links:  # links last, so that a folder counts under its own name rather than under a link's
        folder = (folders or links).pop()
        if folder.real in seen:
            first = seen[folder.real]
            if first.split("/", 1)[0] != folder.path.split("/", 1)[0]:
                raise DataError(
                    f"{root}: {first} and {folder.path} are one folder, by a link; an image has one class: remove the "
                    "link"
                )
            found.skipped["linked to a folder that was read"] += 1
            continue
        seen[folder.real] = folder.path
        for entry in _entries(root, folder.path, found):
            inner = folder.inner(entry)
            if kind := _skipped_entry(entry, inner):
                found.skipped[kind] += 1
            elif entry.is_dir():
                (links if entry.is_symlink() else folders).append(inner)
                found.folders += [] if folder.path else [inner.path]
            else:
                found.images.append(inner.path)
    return found


def _entries(root: Path, path: str, found: Listing) -> list[os.DirEntry[str]]:
    """Return the entries of a folder; note its modification time and its links in the listing."""
    try:
        found.read[path] = (root / path).stat().st_mtime_ns  # before its content: what comes meanwhile is newer
        with os.scandir(root / path) as entries:
            inside = list(entries)
    except OSError as error:
        raise DataError(f"{root / path}: cannot be listed ({error.strerror})") from error
    found.num_links += sum(entry.is_symlink() for entry in inside)
    return inside


def _skipped_entry(entry: os.DirEntry[str], inner: _Folder) -> str | None:
    """Return the kind as which an entry of a folder is skipped; None for an image and for a folder to look through."""
    if entry.is_dir():
        if _skipped_folder(inner.path):
            return f"{entry.name}/"
        is_above = entry.is_symlink() and any(f"{path}/".startswith(f"{inner.real}/") for path in inner.above)
        return "linked to a folder above" if is_above else None
    if not entry.is_file():
        return "linked to nothing" if entry.is_symlink() else "special"
    return _skipped_file(entry.name)


def holds_images_alone(root: Path) -> bool:
    """Return True if a folder holds images itself, and no folders but such as are skipped."""
    with os.scandir(root) as entries:
        inside = [(entry.name, entry.is_dir()) for entry in entries]
    has_folders = any(is_dir and not _skipped_folder(name) for name, is_dir in inside)
    return not has_folders and any(not is_dir and _skipped_file(name) is None for name, is_dir in inside)


def why_skipped(path: str) -> str | None:
    """Return what kind of file is skipped: hidden, or by its folder or its extension; None for an image."""
    folder, _, name = path.rpartition("/")
    return _skipped_folder(folder) or _skipped_file(name)


def _skipped_file(name: str) -> str | None:
    if name.startswith("."):
        return "hidden"
    _, dot, extension = name.lower().rpartition(".")
    return None if dot + extension in EXTENSIONS else dot + extension if dot else "without an extension"


@lru_cache(1024)
def _skipped_folder(path: str) -> str | None:
    for depth, name in enumerate(path.split("/")):
        if name.startswith("."):
            return "hidden"
        if name.lower() in _LEAVINGS or (depth and name.lower() in _THUMBNAILS):
            return f"in {name}"
    return None


def skipped_text(skipped: Mapping[str, int]) -> str:
    """Return "skipped 15 files and 1 folder: 12 .heic (not read: convert them), 3 hidden, 1 @eaDir/"."""
    kinds = sorted(skipped.items(), key=lambda kind: (-kind[1], kind[0]))
    remedies = {**dict.fromkeys(UNREAD_PICTURES, "convert"), **dict.fromkeys(_ARCHIVES, "unpack")}
    notes = [
        f"{count:,} {kind}" + (f" (not read: {remedies[kind]} them)" if kind in remedies else "")
        for kind, count in kinds
    ]
    num_folders = sum(count for kind, count in kinds if kind.endswith("/"))
    numbers = {"file": sum(skipped.values()) - num_folders, "folder": num_folders}
    counts = [f"{n:,} {noun}{'' if n == 1 else 's'}" for noun, n in numbers.items() if n]
    return f"skipped {' and '.join(counts)}: {listed(notes, most=8)}"


def in_brackets(skipped: Mapping[str, int]) -> str:
    """Return " (skipped ...)", to go behind an error; "" where nothing was."""
    return f" ({skipped_text(skipped)})" if skipped else ""


def without_masks(paths: Sequence[str], skipped: Counter[str]) -> list[str]:
    """Return paths less those of masks beside their image (x.seg.png, x_mask.png by x.jpg), which are counted."""
    masks = {path: path[: found.start()] for path in paths if (found := _MASK.search(path))}
    stems = {path.rpartition(".")[0] for path in paths} if masks else set()
    kept = [path for path in paths if masks.get(path) not in stems]
    if len(kept) < len(paths):
        skipped["named as masks or thumbnails of images beside them"] = len(paths) - len(kept)
    return kept


def is_named_as_mask(path: str) -> bool:
    """Return True if a file is named like a mask or a depth map: x.seg.png, x_mask.png."""
    return _MASK.search(path) is not None


def part_of(name: str, beside: Iterable[str] = ()) -> str | None:
    """Return which part of a data set (train, val, test) a folder is by its name; None if it may as well be a class.

    `beside`: words that say nothing, since all folders have them (imagenet_train, imagenet_val).
    """
    words = [word for word in _words(name) if word not in _BESIDE_PARTS and word not in beside]
    return _PARTS.get(words[0]) if len(words) == 1 else None


def _words(name: str) -> list[str]:
    return re.findall(r"[a-z]+", name.lower())


_OVERRULE = "if they are classes, rename them or write a list of images with their classes"


def mistaken_layout(
    place: str | Path, folders: Sequence[str], images: Sequence[str], *, packed: bool = False, within: str = ""
) -> str | None:
    """Return an error message if `folders`, the first ones of all paths, are clearly no classes; None if they may be.

    `packed`: they lie in tar files, which cannot be opened in part. `within`: the folder below `place` where they lie.
    """

    def instead(folder: str) -> str:
        where = f"{within}{folder}"
        return f"pack what lies in it: tar -C {where} -cf NAME.tar ." if packed else f"name {place}/{where}"

    kinds = {name.lower() for name in folders}
    if problem := _taken_parts(folders, images, instead) or _taken_container(folders, images):
        return f"{place}: {problem}"
    if kinds & _IMAGE_FOLDERS and kinds & _TRUTH_FOLDERS:
        return (
            f"{place}: {listed(sorted(folders))} are images and what was drawn or written of them, no classes; "
            f"expected one folder a class ({_OVERRULE}). `tokenlabel segment train` takes images with masks"
        )
    if len(folders) != 1 or any(path.count("/") < 2 for path in images):
        return None
    (only,) = folders  # whatever was meant lies in it
    inner = sorted({path.split("/")[1] for path in images})
    below = [path.split("/", 1)[1] for path in images]
    if deeper := mistaken_layout(place, inner, below, packed=packed, within=f"{within}{only}/"):
        return deeper
    if only.lower() in {*_CONTAINERS, Path(place).name.lower()}:
        return f"{place}: all lies in {within}{only}, which holds {listed(inner)}; {instead(only)} ({_OVERRULE})"
    return None


def _taken_parts(folders: Sequence[str], images: Sequence[str], instead: Callable[[str], str]) -> str | None:
    """Return an error message if folders are splits (train, val): several ones, all, or one that holds its siblings.

    `instead`: what to do to get what a folder holds.
    """
    common = set[str].intersection(*(set(_words(name)) for name in folders)) - {*_PARTS} if folders else set()
    parts = {name: part for name in folders if (part := part_of(name, common))}
    if not parts:
        return None
    in_parts = [path.split("/") for path in images if path.split("/", 1)[0] in parts]
    inside = {names[1] for names in in_parts if len(names) > 2}
    kinds = set(parts.values())
    if len(kinds) == 1 and len(parts) < len(folders) and not inside & set(folders):
        return None
    remedy = "move it out from among the classes"
    if len(kinds) > 1 or len(parts) == len(folders):  # not ant, bee, val
        meant = next((name for name, part in parts.items() if part == "train"), next(iter(parts)))
        is_flat = any(names[0] == meant and len(names) == 2 for names in in_parts)
        advice = f"; its images lie in no class folders: {NEED_CLASSES}" if is_flat else ""
        remedy = f"{instead(meant)}{advice}"
    return f"{listed(sorted(parts))}: parts of a data set, no classes; {remedy} ({_OVERRULE})"


def _taken_container(folders: Sequence[str], images: Sequence[str]) -> str | None:
    """Return an error message if a folder such as `images` holds folders with the names of those beside it."""
    for name in (name for name in folders if name.lower() in _NO_CLASSES):
        inner = {path.split("/", 2)[1] for path in images if path.startswith(f"{name}/") and path.count("/") > 1}
        if both := sorted(inner & {*folders}):
            return (
                f"{name} holds {listed(both)}, as the folder beside it is called, so it is no class; move it "
                f"away ({_OVERRULE})"
            )
    return None


def doubtful_layout(place: str | Path, folders: Sequence[str], images: Sequence[str]) -> list[str]:
    """Return warnings: folders that may be no classes by their names, and folders that may be the classes instead.

    These are the folders in the only one, or those that all hold, without an image besides (art/ant, ink/ant).
    """
    odd = [name for name in folders if part_of(name) or name.lower() in _NO_CLASSES]
    remarks = [f"taken for classes, as any folder: {listed(odd)}; move away what is none"] if odd else []
    if any(path.count("/") == 1 for path in images):
        return remarks
    inner: dict[str, set[str]] = {name: set() for name in folders}
    for path in images:
        outer, name, _ = path.split("/", 2)
        inner[outer].add(name)
    first, *others = inner.values()
    if len(first) < 2 or any(names != first for names in others) or all(map(str.isdecimal, first)):
        return remarks
    each = "each of these folders" if others else "this folder"
    return [*remarks, f"{each} holds {listed(sorted(first))}: if these are the classes, name {place}/{folders[0]}"]
