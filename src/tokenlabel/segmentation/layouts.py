"""Find the images and masks of ADE20K, Pascal VOC, Cityscapes, the embedded scenes, two folders, or COCO's files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from tokenlabel.data.class_names import CLASSES_FILE, read_class_names, unlike_list
from tokenlabel.data.classes import difference, same_classes
from tokenlabel.data.folders import EXTENSIONS, list_images, skipped_text, without_masks
from tokenlabel.data.masks import COCO_SUFFIX, CROWD, CocoMasks, find_masks, mask_names, unlabelled_value
from tokenlabel.labels.manifest import read_manifest
from tokenlabel.labels.store import store_folder
from tokenlabel.runtime.coercion import coerced
from tokenlabel.runtime.errors import DataError, refuse
from tokenlabel.runtime.process import listed, say
from tokenlabel.segmentation.pairs import Classes, ImageMaskPairs, known_classes, numbered_classes
from tokenlabel.segmentation.recipe import Layout, SegmentDataConfig, Split

# What ADE20K calls its splits; the other data sets call them `train` and `val`.
_ADE20K_SPLITS = {"train": "training", "val": "validation"}


def open_pairs(config: SegmentDataConfig, split: Split) -> ImageMaskPairs | None:
    """Return the pairs to train on (`split` "train") or to evaluate on ("val"); None if the recipe names none.

    Raises DataError for folders that are missing or empty, and for images without a mask.
    """
    split = coerced(split, Split, name="split")
    if config.layout is Layout.FOLDERS:
        folders = config.folders(split)
        if folders is None:
            return None
        names = config.class_names or _default_names(config)
        return _two_folders(config, names, *folders, all_needed=split == "val" or not config.labels)
    assert config.root is not None
    root = Path(config.root)
    given = config.train_split if split == "train" else config.val_split
    part = given or (_ADE20K_SPLITS[split] if config.layout is Layout.ADE20K else split)
    match config.layout:
        case Layout.ADE20K:
            return _checked(known_classes("ade20k"), root / "images" / part, root / "annotations" / part)
        case Layout.VOC:
            names = [f"{name}.jpg" for name in _voc_list(root, part)]
            return _checked(known_classes("voc"), root / "JPEGImages", root / "SegmentationClass", names=names)
        case Layout.CITYSCAPES:
            return _checked(
                known_classes("cityscapes"),
                root / "leftImg8bit" / part,
                root / "gtFine" / part,
                mask_of=lambda name: [name.replace("_leftImg8bit", "_gtFine_labelIds")],
            )
        case Layout.SCENES:
            digits = sorted(path.name for path in (root / part).glob("*") if path.is_dir())
            return _checked(
                _numbered(config, config.class_names or digits or ["0"]), root / part, root / "masks" / part
            )


def _voc_list(root: Path, split: str) -> list[str]:
    path = root / "ImageSets" / "Segmentation" / f"{split}.txt"
    try:
        return path.read_text(encoding="utf-8").split()
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); data.root is the folder of one year, such as VOC2012"
        ) from error


def _default_names(config: SegmentDataConfig) -> list[str]:
    """Return the class names of COCO's file, of classes.txt beside the training masks, or of the labels."""
    folders = config.folders("train")
    assert folders is not None
    images, masks = folders
    if masks is not None and masks.suffix == COCO_SUFFIX:
        return CocoMasks(masks).class_names
    _check_folders(*folders)
    path = (masks or images).parent / CLASSES_FILE
    if path.is_file():
        return read_class_names(path, of_masks=True)
    names = [*read_manifest(store_folder(config.label_folders[0])).class_names] if config.labels else []
    if not names:
        raise DataError(
            f"{path}: no such file, and nothing else names the classes; write it, a name a line, or give "
            "--data.class-names"
        )
    return names


def _check_folders(*folders: Path | None) -> None:
    for folder in folders:
        if folder is not None and not folder.is_dir():
            raise DataError(f"{folder}: no such folder; docs/segmentation.md shows how data sets are laid out")


def classes_of(config: SegmentDataConfig, names: Sequence[str]) -> Classes:
    """Return the classes of a data set, without opening it. `names`: of all its classes."""
    if config.layout in (Layout.ADE20K, Layout.VOC, Layout.CITYSCAPES):
        return known_classes(config.layout.value)
    return _numbered(config, _without_background(config, names))


def _without_background(config: SegmentDataConfig, names: Sequence[str]) -> tuple[str, ...]:
    is_last = config.background is not None and list(names)[-1:] == [config.background]
    return tuple(names[:-1] if is_last else names)


def _numbered(config: SegmentDataConfig, names: Sequence[str]) -> Classes:
    ignored = (config.ignore_index,) if isinstance(config.ignore_index, int) else config.ignore_index
    if config.layout is Layout.SCENES and config.background is None:
        ignored = (255,)  # known there, not assumed
    return numbered_classes(names, background=config.background, values=config.class_values, ignored=ignored)


def other_pairs(
    config: SegmentDataConfig,
    names: Sequence[str],
    *,
    split: str | None = None,
    images: str | None = None,
    masks: str | None = None,
) -> ImageMaskPairs:
    """Return the pairs that a recipe evaluates on, those of another `split`, or those of two folders.

    `names`: the classes of the model. Raises DataError if there are no pairs, or if their classes differ.
    """
    has_no_splits = config.layout is Layout.FOLDERS
    refuse(
        {
            "images and masks go together: give both folders or none": bool(images) != bool(masks),
            "layout folders has no splits; name folders with --images and --masks": split is not None and has_no_splits,
        },
        DataError,
    )
    # The classes of a run are those of its checkpoint: what the recipe took them from may have changed since.
    folders = (Path(images), Path(masks)) if images and masks else config.folders("val") if has_no_splits else None
    if folders is not None:
        pairs = _two_folders(config, names, *folders, all_needed=True)
        names, theirs = _without_background(config, names), config.class_names
    else:
        pairs = None if has_no_splits else open_pairs(replace(config, val_split=split or config.val_split), "val")
        theirs = () if pairs is None else pairs.classes.names
    if pairs is None:
        raise DataError("the run has no val images of its own; name folders with --images and --masks")
    if theirs and not same_classes(theirs, names):
        raise DataError(f"{difference(names, theirs, count=len(names), them='the model')}; they must be the same")
    return pairs


def _two_folders(
    config: SegmentDataConfig, names: Sequence[str], images: Path, masks: Path | None, *, all_needed: bool
) -> ImageMaskPairs:
    """Return the pairs of a folder of images and one of masks, COCO's file about them, or no masks."""
    if masks is not None and masks.suffix == COCO_SUFFIX:
        return _coco_pairs(config, names, images, CocoMasks(masks), all_needed=all_needed)
    if masks is None:
        return _unmasked(classes_of(config, names), images)
    if unlike := unlike_list(masks, _without_background(config, names)):
        if not config.class_names:
            raise DataError(f"{unlike}; number the masks as those of the training, or mend the file if it is wrong")
        say(f"{unlike}; data.class_names holds")
    return _checked(classes_of(config, names), images, masks, all_needed=all_needed)


def _unmasked(classes: Classes, images: Path) -> ImageMaskPairs:
    _check_folders(images)
    found = sorted(list_images(images).images)
    if not found:
        raise DataError(f"{images}: no images ({', '.join(EXTENSIONS)})")
    say(f"{images}: {len(found):,} images without masks")
    return ImageMaskPairs(classes, images, images, [(image, "") for image in found])


def _checked(
    classes: Classes,
    images: Path,
    masks: Path,
    *,
    names: Sequence[str] | None = None,
    mask_of: Callable[[str], Iterable[str]] = mask_names,
    all_needed: bool = True,
) -> ImageMaskPairs:
    """Return the pairs of images and the masks that exist; print their number and that of skipped files.

    `names`: of the images, by default all in the folder. `mask_of`: yields possible names of the mask of an image.
    `all_needed`: an image without a mask is an error.
    """
    _check_folders(images, masks)
    listing, is_one_folder = list_images(images), images.resolve() == masks.resolve()
    if is_one_folder:  # x_mask.png beside x.jpg
        listing.images = without_masks(listing.images, Counter())
    keys = sorted(listing.images if names is None else names)
    found, others = find_masks(masks, keys, mask_of)
    if is_one_folder:
        others = [name for name in others if name not in found]
        if own := [image for image, mask in found.items() if image == mask]:
            raise DataError(f"{images / own[0]}: is an image and its own mask; keep images and masks in two folders")
    bare = [image for image, mask in found.items() if not mask]
    num_masked = len(found) - len(bare)
    if bare and (all_needed or not num_masked):
        lossy = "; JPEG rounds the numbers of classes: save masks as PNG" if {*others} & {*bare} else ""
        raise DataError(
            f"{masks}: {len(bare):,} of {len(found):,} images have no mask there ({listed(bare)}); expected "
            f"{next(iter(mask_of(bare[0])))} for {bare[0]}{f', found {listed(others)}' if others else ''}{lossy}"
        )
    skipped = f"; {skipped_text(listing.skipped)}" if listing.skipped else ""
    if not found:
        raise DataError(f"{images}: no images ({', '.join(EXTENSIONS)}){skipped}")
    say(
        f"{images}: {num_masked:,} images with masks of {len(classes.names):,} classes ({listed(list(classes.names))})"
        f"{f', {len(bare):,} without' if bare else ''}{skipped}"
    )
    if shared := [mask for mask, count in Counter(filter(None, found.values())).items() if count > 1]:
        say(f"{images}: several images have the same mask, and count each: {listed(shared)}")
    # Lists of a part of the images, and pictures for people beside the masks (Cityscapes), leave others.
    if others and names is None and mask_of is mask_names:
        say(f"{masks}: {len(others):,} masks belong to no image and are skipped ({listed(others)})")
    return ImageMaskPairs(classes, images, masks, [*found.items()])


def _coco_pairs(
    config: SegmentDataConfig, names: Sequence[str], images: Path, masks: CocoMasks, *, all_needed: bool
) -> ImageMaskPairs:
    """Return the pairs of a folder of images and COCO's file; print which of its images are not there."""
    if config.class_values or config.ignore_index is not None:
        raise DataError(
            f"{masks}: defines the class of each pixel itself; leave data.class_values and data.ignore_index out"
        )
    names, theirs = _without_background(config, names), masks.class_names
    if {*names} != {*theirs}:
        unlike = difference(names, theirs, count=len(names), them="the model or data.class_names")
        raise DataError(f"{masks}: {unlike}; its categories must be these classes")
    none = (unlabelled_value(len(names)),) if config.background is None else ()
    classes = numbered_classes(
        names, background=config.background, values=[theirs.index(name) for name in names], ignored=(CROWD, *none)
    )
    keys = sorted(list_images(images).images)
    described = masks.names_of(keys)
    # Where nothing counts a label map has more to say.
    passed_over = masks.bare if not all_needed and config.background is None else frozenset[str]()
    name_of = {key: name for key, name in described.items() if name not in passed_over}
    bare = [key for key in keys if key not in name_of]
    if not name_of or (bare and all_needed):
        raise DataError(
            f"{masks}: {len(bare):,} of {len(keys):,} images in {images} have no mask there ({listed(bare)}); it has "
            f"those of {len(masks.names):,} ({listed(masks.names[:9])})"
        )
    without = f", {len(bare):,} without" if bare else ""
    say(f"{images}: {len(name_of):,} images with masks of {len(names):,} classes ({listed(list(names))}){without}")
    if absent := sorted({*masks.names}.difference(described.values())):
        say(f"{masks}: {len(absent):,} of its images are not in {images} and are skipped ({listed(absent)})")
    return ImageMaskPairs(classes, images, masks, [(key, name_of.get(key, "")) for key in keys])
