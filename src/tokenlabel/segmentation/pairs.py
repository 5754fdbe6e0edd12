"""Images with a mask each: ADE20K, Pascal VOC, Cityscapes, the embedded scenes, and any two folders."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from numpy.typing import NDArray
from PIL import Image

from tokenlabel.data.images import DECODE_ALL_UP_TO, EXTENSIONS, DataError, Strings, decode_pixels
from tokenlabel.runtime.ranges import COUNT, check_numbers
from tokenlabel.segmentation.classes import Classes, MaskError, known_classes, numbered_classes


class Layout(StrEnum):
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


SPLITS = {
    Layout.ADE20K: {"train": "training", "val": "validation"},
    Layout.VOC: {"train": "train", "val": "val"},
    Layout.CITYSCAPES: {"train": "train", "val": "val"},
    Layout.SCENES: {"train": "train", "val": "val"},
}


@dataclass(frozen=True, kw_only=True)
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
    train_images: str | None = None
    """Layout folders: training images, at any depth."""
    train_masks: str | None = None
    """Layout folders: their masks, PNGs of one channel at the same paths."""
    val_images: str | None = None
    """Layout folders: images to evaluate on; none to skip evaluation."""
    val_masks: str | None = None
    """Layout folders: their masks."""
    class_names: tuple[str, ...] = ()
    """Layout folders: the name of the class of each value in the masks, from 0."""
    background: str | None = None
    """Layouts scenes and folders: name of one more class, of the pixels of value 255; none leaves them out."""
    num_workers: int = 2
    """Processes that decode and augment images."""

    def __post_init__(self) -> None:
        check_numbers(self, "data.", num_workers=COUNT)
        is_folders = self.layout is Layout.FOLDERS
        if is_folders and not (self.train_images and self.train_masks and self.class_names):
            raise ValueError(
                "data.layout folders needs data.train_images, data.train_masks and data.class_names"
            )
        if not is_folders and self.root is None:
            raise ValueError(f"data.layout {self.layout.value} needs data.root, the folder of the data set")
        if self.layout not in (Layout.FOLDERS, Layout.SCENES) and (self.class_names or self.background):
            raise ValueError(
                f"data.layout {self.layout.value} has its own classes; leave data.class_names and data.background out"
            )
        if bool(self.val_images) != bool(self.val_masks):
            raise ValueError("data.val_images and data.val_masks go together; give both or none")


class ImageMaskPairs:
    """Images and the masks of their classes, by index.

    `keys`: the paths of the images relative to their root. Pickles, and cheaply.
    """

    def __init__(self, classes: Classes, images: Path, masks: Path, names: Sequence[tuple[str, str]]) -> None:
        self.classes = classes
        self._images, self._masks = images, masks
        self.keys = Strings([image for image, _ in names])
        self._mask_names = Strings([mask for _, mask in names])

    def __len__(self) -> int:
        """Return how many pairs there are."""
        return len(self.keys)

    def read(
        self, index: int
    ) -> tuple[UInt8[NDArray[np.uint8], "height width 3"], UInt8[NDArray[np.uint8], "height width"]]:
        """Return RGB pixels and class ids, 255 where none counts. Raises ImageError or MaskError, by name."""
        image, mask = self._images / self.keys[index], self._masks / self._mask_names[index]
        pixels = decode_pixels(_bytes(image), str(image))
        ids = self.classes.ids(decode_mask(_bytes(mask), str(mask)), name=str(mask))
        if ids.shape != pixels.shape[:2]:
            raise MaskError(
                f"{mask}: has {ids.shape[0]} x {ids.shape[1]} pixels (height x width), its image {image} "
                f"{pixels.shape[0]} x {pixels.shape[1]}; they must be the same"
            )
        return pixels, ids

    def check(self) -> None:
        """Read every pair of up to `DECODE_ALL_UP_TO`; raise the first error, as training would later."""
        if len(self) <= DECODE_ALL_UP_TO:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                for stretch in range(0, len(self), 256):
                    list(pool.map(self.read, range(stretch, min(stretch + 256, len(self)))))


def decode_mask(data: bytes, name: str) -> NDArray[np.integer]:
    """Return the values [height, width] of an encoded mask; of one with a palette, the numbers of its colours."""
    try:
        values = np.asarray(Image.open(io.BytesIO(data)))
    except Exception as error:  # Pillow's decoders raise whatever their parsing runs into
        raise MaskError(f"{name}: does not decode as an image ({error or type(error).__name__})") from error
    if values.ndim != 2:
        raise MaskError(
            f"{name}: has {values.shape[2]} channels; a mask has one, of class numbers: turn colours into numbers first"
        )
    return values.astype(np.int64) if values.dtype.kind not in "iu" else values


def open_pairs(config: SegmentDataConfig, split: str) -> ImageMaskPairs | None:
    """Return the pairs to train on (`split` "train") or to evaluate on ("val"); None if there are none to be.

    Raises DataError for folders that are missing or empty, and for images without a mask.
    """
    if config.layout is Layout.FOLDERS:
        images = config.train_images if split == "train" else config.val_images
        masks = config.train_masks if split == "train" else config.val_masks
        if images is None or masks is None:
            return None
        classes = numbered_classes(config.class_names, background=config.background)
        return _checked(classes, Path(images), Path(masks), _same_names(Path(images)))
    assert config.root is not None
    root = Path(config.root)
    given = config.train_split if split == "train" else config.val_split
    part = given or SPLITS[config.layout][split]
    match config.layout:
        case Layout.ADE20K:
            images = root / "images" / part
            return _checked(known_classes("ade20k"), images, root / "annotations" / part, _same_names(images))
        case Layout.VOC:
            names = ((f"{name}.jpg", f"{name}.png") for name in _listed(root, part))
            return _checked(known_classes("voc"), root / "JPEGImages", root / "SegmentationClass", names)
        case Layout.CITYSCAPES:
            images = root / "leftImg8bit" / part
            names = ((name, name.replace("_leftImg8bit", "_gtFine_labelIds")) for name in _images_in(images))
            return _checked(known_classes("cityscapes"), images, root / "gtFine" / part, names)
        case Layout.SCENES:
            images = root / part
            digits = sorted(path.name for path in images.glob("*") if path.is_dir())
            classes = numbered_classes(digits or ["0"], background=config.background)
            return _checked(classes, images, root / "masks" / part, _same_names(images))


def classes_of(config: SegmentDataConfig, names: Sequence[str]) -> Classes:
    """Return the classes of a data set that need not be there: `names` are those of all its classes."""
    if config.layout in (Layout.ADE20K, Layout.VOC, Layout.CITYSCAPES):
        return known_classes(config.layout.value)
    if config.background is not None and list(names)[-1:] == [config.background]:
        names = names[:-1]
    return numbered_classes(names, background=config.background)


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
        return _checked(classes_of(config, names), Path(images), Path(masks), _same_names(Path(images)))
    if split is not None and config.layout is Layout.FOLDERS:
        raise DataError("layout folders has no splits; name folders with --images and --masks")
    pairs = open_pairs(replace(config, val_split=split or config.val_split), "val")
    if pairs is None:
        raise DataError("the run has no val images of its own; name folders with --images and --masks")
    if pairs.classes.names != list(names):
        raise DataError(
            f"the data have {len(pairs.classes.names)} classes ({', '.join(pairs.classes.names[:3])}, ...), the model "
            f"{len(names)} ({', '.join(names[:3])}, ...); they must be the same"
        )
    return pairs


def _checked(classes: Classes, images: Path, masks: Path, names: Iterator[tuple[str, str]]) -> ImageMaskPairs:
    """Return the pairs, each of whose masks is there."""
    for folder in (images, masks):
        if not folder.is_dir():
            raise DataError(
                f"{folder}: no such folder; docs/segmentation.md shows how data sets are laid out"
            )
    pairs = sorted(names)
    if not pairs:
        raise DataError(f"{images}: no images ({', '.join(EXTENSIONS)})")
    own = [image for image, mask in pairs if image == mask] if images.resolve() == masks.resolve() else []
    if own:
        raise DataError(
            f"{images / own[0]}: is an image and its own mask; keep images and masks in two folders"
        )
    there = {path.relative_to(masks).as_posix() for path in masks.rglob("*") if path.is_file()}
    bare = [image for image, mask in pairs if mask not in there]
    if bare:
        more = ", ..." if len(bare) > 3 else ""
        raise DataError(
            f"{masks}: {len(bare):,} of {len(pairs):,} images have no mask there ({', '.join(bare[:3])}{more}); "
            f"expected {dict(pairs)[bare[0]]} for {bare[0]}"
        )
    return ImageMaskPairs(classes, images, masks, pairs)


def _same_names(images: Path) -> Iterator[tuple[str, str]]:
    return ((name, Path(name).with_suffix(".png").as_posix()) for name in _images_in(images))


def _images_in(folder: Path) -> Iterator[str]:
    for path in folder.rglob("*"):
        if path.suffix.lower() in EXTENSIONS and not path.name.startswith("."):
            yield path.relative_to(folder).as_posix()


def _listed(root: Path, split: str) -> list[str]:
    """Return the names that a list of Pascal VOC holds."""
    path = root / "ImageSets" / "Segmentation" / f"{split}.txt"
    try:
        return path.read_text(encoding="utf-8").split()
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); data.root is the folder of one year, such as VOC2012"
        ) from error


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
