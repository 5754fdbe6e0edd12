"""Where images and masks lie: ADE20K, Pascal VOC, Cityscapes, the embedded scenes, any two folders, COCO's files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from tokenlabel.data.class_names import read_class_names
from tokenlabel.data.classes import difference, same_classes
from tokenlabel.data.coco import COCO_SUFFIX, CROWD, CocoMasks
from tokenlabel.data.folders import EXTENSIONS, list_images, passed_over_text, without_masks
from tokenlabel.data.masks import mask_names, unlabelled_value
from tokenlabel.labels.manifest import read_manifest
from tokenlabel.runtime.coercion import COUNT, Choice, check_numbers, coerced, coerced_fields
from tokenlabel.runtime.errors import DataError
from tokenlabel.runtime.process import listed, say
from tokenlabel.segmentation.classes import Classes, known_classes, numbered_classes
from tokenlabel.segmentation.pairs import ImageMaskPairs

CLASSES_FILE = "classes.txt"  # beside masks: the names of their classes, a line each


class Layout(Choice):
    """How images and masks lie on the disk.

    ADE20K: images/training/NAME.jpg and annotations/training/NAME.png. VOC: JPEGImages, SegmentationClass and
    ImageSets/Segmentation/train.txt. CITYSCAPES: leftImg8bit/train/CITY and gtFine/train/CITY. SCENES: what
    `tokenlabel demo` writes. FOLDERS: a folder of images and one of masks of the same names.
    """

    ADE20K = "ade20k"
    VOC = "voc"
    CITYSCAPES = "cityscapes"
    SCENES = "scenes"
    FOLDERS = "folders"


Split = Literal["train", "val"]
SPLITS = {
    Layout.ADE20K: {"train": "training", "val": "validation"},
    Layout.VOC: {"train": "train", "val": "val"},
    Layout.CITYSCAPES: {"train": "train", "val": "val"},
    Layout.SCENES: {"train": "train", "val": "val"},
}


@dataclass(frozen=True, kw_only=True)
@coerced_fields
class SegmentDataConfig:
    """Which images and masks to train and evaluate on."""

    layout: Layout
    """ade20k, voc, cityscapes, scenes, or folders."""
    root: str | None = None
    """Folder of the data set (ADEChallengeData2016, VOC2012, cityscapes, the demo's scenes); not for folders."""
    train_split: str | None = None
    """Part of the data set to train on; by default the one that is called so there."""
    val_split: str | None = None
    """Part of the data set to evaluate on; by default the one that is called so there."""
    train: str | None = None
    """Layout folders: training images, at any depth; without masks and labels the folder of images/ and masks/."""
    masks: str | None = None
    """Layout folders: their masks, PNGs of one channel at the same paths, or COCO's file about them (.json); with
    labels, those that there are."""
    labels: str | list[str] | None = None
    """Layout folders: label store that `tokenlabel annotate` made for the training images, or several that are read as
    one: images without a mask learn from it."""
    val: str | None = None
    """Layout folders: images to evaluate on, as train; none to skip evaluation."""
    val_masks: str | None = None
    """Layout folders: their masks, likewise."""
    class_names: tuple[str, ...] = ()
    """Layout folders: the name of the class of each value in the masks, from 0; by default the categories of
    COCO's file, a line each in classes.txt beside the masks, or the classes of the labels."""
    class_values: tuple[int, ...] = ()
    """Layout folders: the value of each class in the masks, such as [0,255]; 0, 1, 2, ... by default."""
    ignore_index: int | tuple[int, ...] | None = None
    """Layout folders: value, or values, of pixels that do not count; 255 by default, of more than 255 classes 65535."""
    background: str | None = None
    """Layouts scenes and folders: one more class, of the pixels that do not count by default; none leaves them out."""
    num_workers: int = 2
    """Processes that decode and augment images."""

    @property
    def image_folders(self) -> list[str | None]:
        """Where images are: no run may lie in there."""
        return [self.train, self.val]

    def __post_init__(self) -> None:
        check_numbers(self, "data.", num_workers=COUNT)
        is_folders = self.layout is Layout.FOLDERS
        if is_folders and not self.train:
            raise ValueError(
                "data.layout folders needs data.train: images, with data.masks, data.labels or both, or a folder of "
                "images/ and masks/"
            )
        if not is_folders and (self.masks or self.labels):
            raise ValueError(
                f"data.layout {self.layout.value} has masks of its own; data.masks and data.labels are for folders"
            )
        if not is_folders and self.root is None:
            raise ValueError(f"data.layout {self.layout.value} needs data.root, the folder of the data set")
        if self.layout not in (Layout.FOLDERS, Layout.SCENES) and (self.class_names or self.background):
            raise ValueError(
                f"data.layout {self.layout.value} has its own classes; leave data.class_names and data.background out"
            )
        if not is_folders and (self.class_values or self.ignore_index is not None):
            raise ValueError(
                f"data.layout {self.layout.value} has its own values; leave data.class_values and data.ignore_index out"
            )
        if self.val_masks and not self.val:
            raise ValueError("data.val_masks are masks of images; name these with data.val")

    @property
    def label_folders(self) -> list[str]:
        """The folders of the labels; empty without labels."""
        return [self.labels] if isinstance(self.labels, str) else self.labels or []

    def folders(self, split: Split) -> tuple[Path, Path | None] | None:
        """Return the folders of images and masks of layout folders; no masks where labels alone teach, or no images."""
        images, masks = (self.train, self.masks) if split == "train" else (self.val, self.val_masks)
        if images is None:
            return None
        if masks is None and (split == "val" or not self.labels):
            return Path(images) / "images", Path(images) / "masks"
        return Path(images), Path(masks) if masks else None


def open_pairs(config: SegmentDataConfig, split: Split) -> ImageMaskPairs | None:
    """Return the pairs to train on (`split` "train") or to evaluate on ("val"); None if there are none to be.

    Raises DataError for folders that are missing or empty, and for images without a mask.
    """
    split = coerced(split, Split, name="split")
    if config.layout is Layout.FOLDERS:
        folders = config.folders(split)
        if folders is None:
            return None
        names = config.class_names or _names_beside(config)
        return _two_folders(config, names, *folders, all_needed=split == "val" or not config.labels)
    assert config.root is not None
    root = Path(config.root)
    given = config.train_split if split == "train" else config.val_split
    part = given or SPLITS[config.layout][split]
    match config.layout:
        case Layout.ADE20K:
            images = root / "images" / part
            return _checked(known_classes("ade20k"), images, root / "annotations" / part)
        case Layout.VOC:
            images, names = root / "JPEGImages", [f"{name}.jpg" for name in _listed(root, part)]
            return _checked(known_classes("voc"), images, root / "SegmentationClass", names=names)
        case Layout.CITYSCAPES:
            images = root / "leftImg8bit" / part
            return _checked(
                known_classes("cityscapes"),
                images,
                root / "gtFine" / part,
                mask_of=lambda name: [name.replace("_leftImg8bit", "_gtFine_labelIds")],
            )
        case Layout.SCENES:
            images = root / part
            digits = sorted(path.name for path in images.glob("*") if path.is_dir())
            classes = _numbered(config, digits or ["0"])
            return _checked(classes, images, root / "masks" / part)


def _names_beside(config: SegmentDataConfig) -> list[str]:
    """Return the class names that lie in or beside the training masks, or else those of the labels."""
    folders = config.folders("train")
    assert folders is not None
    images, masks = folders
    if masks is not None and masks.suffix == COCO_SUFFIX:
        return CocoMasks(masks).class_names
    _check_folders(*folders)
    path = (masks or images).parent / CLASSES_FILE
    if path.is_file():
        return read_class_names(path)
    names = [*read_manifest(config.label_folders[0]).class_names] if config.labels else []
    if not names:
        raise DataError(
            f"{path}: no such file, and nothing else names the classes; write it, a name a line, or give "
            "data.class_names"
        )
    return names


def _check_folders(*folders: Path | None) -> None:
    for folder in folders:
        if folder is not None and not folder.is_dir():
            raise DataError(
                f"{folder}: no such folder; docs/segmentation.md shows how data sets are laid out"
            )


def classes_of(config: SegmentDataConfig, names: Sequence[str]) -> Classes:
    """Return the classes of a data set that need not be there: `names` are those of all its classes."""
    if config.layout in (Layout.ADE20K, Layout.VOC, Layout.CITYSCAPES):
        return known_classes(config.layout.value)
    return _numbered(config, _without_background(config, names))


def _without_background(config: SegmentDataConfig, names: Sequence[str]) -> tuple[str, ...]:
    is_last = config.background is not None and list(names)[-1:] == [config.background]
    return tuple(names[:-1] if is_last else names)


def _numbered(config: SegmentDataConfig, names: Sequence[str]) -> Classes:
    ignored = (config.ignore_index,) if isinstance(config.ignore_index, int) else config.ignore_index
    if config.layout is Layout.SCENES and config.background is None:
        ignored = (255,)  # which is known there, not assumed
    return numbered_classes(names, background=config.background, values=config.class_values, ignored=ignored)


def other_pairs(
    config: SegmentDataConfig,
    names: Sequence[str],
    *,
    split: str | None = None,
    images: str | None = None,
    masks: str | None = None,
) -> ImageMaskPairs:
    """Return the pairs that a recipe evaluates on, or those of another split, or of any two folders.

    `names`: of all the classes of the model. Raises DataError if there are none, or if their classes are others.
    """
    if bool(images) != bool(masks):
        raise DataError("images and masks go together: give both folders or none")
    if images and masks:
        return _two_folders(config, names, Path(images), Path(masks), all_needed=True)
    if split is not None and config.layout is Layout.FOLDERS:
        raise DataError("layout folders has no splits; name folders with --images and --masks")
    if config.layout is Layout.FOLDERS and not config.class_names:  # where they lay once, others may lie now
        config = replace(config, class_names=_without_background(config, names))
    pairs = open_pairs(replace(config, val_split=split or config.val_split), "val")
    if pairs is None:
        raise DataError("the run has no val images of its own; name folders with --images and --masks")
    if not same_classes(pairs.classes.names, names):
        raise DataError(
            f"{difference(names, pairs.classes.names, count=len(names), them='the model')}; they must be the same"
        )
    return pairs


def _checked(
    classes: Classes,
    images: Path,
    masks: Path | None,
    *,
    names: Sequence[str] | None = None,
    mask_of: Callable[[str], Iterable[str]] = mask_names,
    all_needed: bool = True,
) -> ImageMaskPairs:
    """Return the pairs, each of whose masks is there; say how many there are, and what was passed over.

    `names`: of the images, all by default. `mask_of`: what the mask of an image may be called. `all_needed`: whether an
    image without a mask is an error.
    """
    _check_folders(images, masks)
    if masks is None:
        listing = list_images(images)
        if not listing.images:
            raise DataError(f"{images}: no images ({', '.join(EXTENSIONS)})")
        say(f"{images}: {len(listing.images):,} images without masks")
        return ImageMaskPairs(classes, images, images, [(image, "") for image in sorted(listing.images)])
    there = {path.relative_to(masks).as_posix() for path in masks.rglob("*") if path.is_file()}
    listing = list_images(images)
    if images.resolve() == masks.resolve():  # x_mask.png beside x.jpg
        listing.images = without_masks(listing.images, Counter())
    pairs, bare = [], {}
    for image in sorted(listing.images if names is None else names):
        expected = [*mask_of(image)]
        mask = next((name for name in expected if name in there), None)
        if mask is None:
            bare[image] = expected[0]
        elif image == mask and images.resolve() == masks.resolve():
            raise DataError(
                f"{images / image}: is an image and its own mask; keep images and masks in two folders"
            )
        else:
            pairs.append((image, mask))
    if bare and (all_needed or not pairs):
        image, expected = next(iter(bare.items()))
        others = sorted(there - {mask for _, mask in pairs})
        lossy = "; JPEG rounds the numbers of classes: save masks as PNG" if {*others} & {*bare} else ""
        raise DataError(
            f"{masks}: {len(bare):,} of {len(bare) + len(pairs):,} images have no mask there ({listed([*bare])}); "
            f"expected {expected} for {image}{f', found {listed(others)}' if others else ''}{lossy}"
        )
    passed_over = f"; {passed_over_text(listing.passed_over)}" if listing.passed_over else ""
    if not pairs:
        raise DataError(f"{images}: no images ({', '.join(EXTENSIONS)}){passed_over}")
    say(
        f"{images}: {len(pairs):,} images with masks of {len(classes.names):,} classes ({listed(list(classes.names))})"
        f"{f', {len(bare):,} without' if bare else ''}{passed_over}"
    )
    return ImageMaskPairs(classes, images, masks, sorted([*pairs, *((image, "") for image in bare)]))


def _two_folders(
    config: SegmentDataConfig, names: Sequence[str], images: Path, masks: Path | None, *, all_needed: bool
) -> ImageMaskPairs:
    """Return the pairs of two folders, or of one and COCO's file; say which masks are of no image, and of several."""
    if masks is not None and masks.suffix == COCO_SUFFIX:
        return _described(config, names, images, CocoMasks(masks), all_needed=all_needed)
    pairs = _checked(classes_of(config, names), images, masks, all_needed=all_needed)
    if masks is None:
        return pairs
    images_of = Counter(pairs.mask_names[index] for index in pairs.with_mask)
    shared = [mask for mask, count in images_of.items() if count > 1]
    if shared:
        say(f"{images}: several images have the same mask, and count each: {listed(shared)}")
    alone = sorted(name for name in list_images(masks).images if name not in images_of)
    if alone:
        say(f"{masks}: {len(alone):,} masks belong to no image and are passed over ({listed(alone)})")
    return pairs


def _described(
    config: SegmentDataConfig, names: Sequence[str], images: Path, masks: CocoMasks, *, all_needed: bool
) -> ImageMaskPairs:
    """Return the pairs of a folder of images and of COCO's file; say which of its images are not there."""
    if config.class_values or config.ignore_index is not None:
        raise DataError(
            f"{masks}: says itself which class each pixel has; leave data.class_values and data.ignore_index out"
        )
    names, theirs = _without_background(config, names), masks.class_names
    if {*names} != {*theirs}:
        unlike = difference(names, theirs, count=len(names), them="the model or data.class_names")
        raise DataError(f"{masks}: {unlike}; its categories must be these classes")
    none = (unlabelled_value(len(names)),) if config.background is None else ()
    classes = numbered_classes(
        names,
        background=config.background,
        values=[theirs.index(name) for name in names],
        ignored=(CROWD, *none),
    )
    keys = sorted(list_images(images).images)
    name_of = masks.names_of(keys)
    bare = [key for key in keys if key not in name_of]
    if not name_of or (bare and all_needed):
        raise DataError(
            f"{masks}: {len(bare):,} of {len(keys):,} images in {images} have no mask there ({listed(bare)}); it has "
            f"those of {len(masks.names):,} ({listed(masks.names[:9])})"
        )
    say(f"{images}: {len(name_of):,} images with masks of {len(names):,} classes ({listed(list(names))})")
    if absent := sorted({*masks.names}.difference(name_of.values())):
        say(
            f"{masks}: {len(absent):,} of its images are not in {images} and are passed over ({listed(absent)})"
        )
    return ImageMaskPairs(classes, images, masks, [(key, name_of.get(key, "")) for key in keys])


def _listed(root: Path, split: str) -> list[str]:
    """Return the names that a list of Pascal VOC holds."""
    path = root / "ImageSets" / "Segmentation" / f"{split}.txt"
    try:
        return path.read_text(encoding="utf-8").split()
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); data.root is the folder of one year, such as VOC2012"
        ) from error
