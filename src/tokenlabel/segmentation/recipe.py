"""The recipe of a segmentation run, as frozen dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tokenlabel.core.config import TokenChoice
from tokenlabel.models.options import SegmentModelConfig
from tokenlabel.runtime.coercion import (
    COUNT,
    NATURAL,
    ONE_OPTION,
    PART,
    POSITIVE,
    SHARE,
    Choice,
    check_numbers,
    coerced_fields,
)
from tokenlabel.runtime.errors import MissingError, refuse
from tokenlabel.runtime.process import listed
from tokenlabel.training.recipe import Labelled, TrainingConfig

Split = Literal["train", "val"]


class Layout(Choice):
    """The folder structure of a data set.

    ADE20K: images/training/NAME.jpg and annotations/training/NAME.png. VOC: JPEGImages, SegmentationClass and
    ImageSets/Segmentation/train.txt. CITYSCAPES: leftImg8bit/train/CITY and gtFine/train/CITY. SCENES: the scenes of
    `tokenlabel demo`. FOLDERS: a folder of images and one of masks with the same names.
    """

    ADE20K = "ade20k"
    VOC = "voc"
    CITYSCAPES = "cityscapes"
    SCENES = "scenes"
    FOLDERS = "folders"


@dataclass(frozen=True, kw_only=True)
@coerced_fields
class SegmentDataConfig(Labelled):
    """Images, masks and labels for training and evaluation."""

    layout: Layout
    """ade20k, voc, cityscapes, scenes, or folders."""
    root: str | None = None
    """Folder of the data set (ADEChallengeData2016, VOC2012, cityscapes, the demo's scenes); not for folders."""
    train_split: str | None = None
    """Split to train on; the data set's train split by default."""
    val_split: str | None = None
    """Split to evaluate on; the data set's val split by default."""
    train: str | None = None
    """Layout folders: training images, at any depth; without masks and labels the folder of images/ and masks/."""
    masks: str | None = None
    """Layout folders: their masks, PNGs of one channel at the same paths, or COCO's file about them (.json); with
    labels, not every image needs one."""
    labels: str | list[str] | None = None
    """Layout folders: label store that `tokenlabel annotate` made for the training images, or several, read as one:
    targets of the images without a mask."""
    val: str | None = None
    """Layout folders: images to evaluate on, as train; none to skip evaluation."""
    val_masks: str | None = None
    """Layout folders: their masks, likewise."""
    class_names: tuple[str, ...] = ()
    """Layouts folders and scenes: the name of the class of each value in the masks, from 0; by default the categories
    of COCO's file, a line each in classes.txt beside the masks, or the classes of the labels."""
    class_values: tuple[int, ...] = ()
    """Layout folders: the value of each class in the masks, such as [0,255]; 0, 1, 2, ... by default."""
    ignore_index: int | tuple[int, ...] | None = None
    """Layout folders: value, or values, of ignored pixels; 255 by default, 65535 for more than 255 classes."""
    background: str | None = None
    """Layouts scenes and folders: name of one more class, of the pixels that are ignored by default."""
    num_workers: int = 2
    """Processes that decode and augment images."""

    @property
    def image_folders(self) -> list[str | None]:
        """The folders of images, in which no run folder may be."""
        return [self.train, self.val]

    def __post_init__(self) -> None:
        check_numbers(self, "data.", num_workers=COUNT)
        kind, is_folders = f"data.layout {self.layout}", self.layout is Layout.FOLDERS
        names_are_known = self.layout not in (Layout.FOLDERS, Layout.SCENES)
        gives_values = self.class_values or self.ignore_index is not None
        others = (
            ("root", "train_split", "val_split") if is_folders else ("train", "masks", "labels", "val", "val_masks")
        )
        misplaced = listed([f"data.{name}" for name in others if getattr(self, name)], len(others))
        finds = "the folders that are named" if is_folders else "data.root, which has masks of its own"
        refuse(
            {
                f"{kind} takes its images from {finds}; leave {misplaced} out": misplaced,
                f"{kind} has its own classes; leave data.class_names and data.background out": names_are_known
                and (self.class_names or self.background),
                f"{kind} has its own values; leave data.class_values and data.ignore_index out": not is_folders
                and gives_values,
                "data.val_masks are masks of images; name these with data.val": self.val_masks and not self.val,
            }
        )
        refuse(
            {
                "data.layout folders needs data.train: images, with data.masks, data.labels or both, or a folder of "
                "images/ and masks/": is_folders and not self.train,
                f"{kind} needs data.root, the folder of the data set": not is_folders and self.root is None,
            },
            MissingError,
        )

    def folders(self, split: Split) -> tuple[Path, Path | None] | None:
        """Return the folders of images and masks of layout folders.

        The masks are None where all targets are labels; the result is None for a split without images.
        """
        images, masks = (self.train, self.masks) if split == "train" else (self.val, self.val_masks)
        if images is None:
            return None
        if masks is None and (split == "val" or not self.labels):
            return Path(images) / "images", Path(images) / "masks"
        return Path(images), Path(masks) if masks else None


@dataclass(frozen=True, kw_only=True)
@coerced_fields
class SegmentAugmentConfig:
    """How training images and masks are augmented."""

    short_side_px: int | None = None
    """Resize images to this shorter side before the random scale; none keeps their size."""
    max_aspect: float = 4.0
    """Longer side at most this many times short_side_px; longer images are resized by their longer side."""
    scale: tuple[float, float] = (0.5, 2.0)
    """Range of the random scale."""
    category_max_ratio: float = 0.75
    """Crops of which one class covers more than this are drawn again, up to ten times; 1 takes the first."""
    horizontal_flip: float = 0.5
    """Probability of a horizontal flip."""
    photometric: bool = True
    """Change brightness, contrast, saturation and hue, each with probability 1/2."""

    def __post_init__(self) -> None:
        check_numbers(self, "augment.", short_side_px=NATURAL, max_aspect=NATURAL, scale=POSITIVE)
        check_numbers(self, "augment.", category_max_ratio=PART, horizontal_flip=SHARE)
        low, high = self.scale
        refuse({f"augment.scale must be two numbers with 0 < first <= second, got {low} and {high}": low > high})


@dataclass(frozen=True, kw_only=True)
@coerced_fields
class SegmentLossConfig:
    """The loss: cross entropy of each pixel of a mask, and of each cell of a label map."""

    auxiliary_weight: float = 0.4
    """Weight of the second head's loss."""
    tokens: TokenChoice = TokenChoice.ALL
    """Which cells of label maps count: all; confident: those whose most probable class reaches token_threshold."""
    token_threshold: float = 0.5
    """Minimum probability for tokens: confident."""
    finer: int | None = None
    """Evaluate the loss of label maps on a grid this many times as fine as the head's; by default as fine as the maps,
    up to 4 times. Memory grows with its square."""
    hard: bool = False
    """Replace the label of a cell by its most probable class."""

    def __post_init__(self) -> None:
        check_numbers(self, "loss.", auxiliary_weight=COUNT, token_threshold=SHARE, finer=NATURAL)


@dataclass(frozen=True, kw_only=True)
@coerced_fields
class SegmentEvalConfig:
    """How images are segmented in evaluation and prediction."""

    every_epochs: float = 1.0
    """Epochs between evaluations in training; the last step is always evaluated."""
    mode: Literal["slide", "whole"] = "slide"
    """slide: windows of the size of the training crops; whole: the whole image at once."""
    stride_px: tuple[int, int] | None = None
    """Distance of windows, down and across; by default two thirds of them, as published (341 of 512)."""
    short_side_px: int | None = None
    """Resize images to this shorter side, and the logits back; none keeps their size."""
    max_aspect: float = 4.0
    """Longer side at most this many times short_side_px; longer images are resized by their longer side."""
    scales: tuple[float, ...] = (1.0,)
    """Average the predictions at these relative sizes (.5, .75, ... 1.75 as published)."""
    flip: bool = False
    """Average with the prediction for the mirrored image."""
    windows_at_once: int = 4
    """Windows in a batch."""

    def __post_init__(self) -> None:
        refuse({"eval.scales must be numbers above 0, got none": not self.scales})
        check_numbers(self, "eval.", scales=POSITIVE, every_epochs=POSITIVE, stride_px=NATURAL)
        check_numbers(self, "eval.", windows_at_once=NATURAL, short_side_px=NATURAL, max_aspect=NATURAL)


@dataclass(frozen=True, kw_only=True)
class SegmentRecipe(TrainingConfig):
    """A training run of a segmentation model."""

    data: SegmentDataConfig
    model: SegmentModelConfig
    augment: SegmentAugmentConfig = field(default_factory=SegmentAugmentConfig, metadata=ONE_OPTION)
    loss: SegmentLossConfig = field(default_factory=SegmentLossConfig)
    eval: SegmentEvalConfig = field(default_factory=SegmentEvalConfig, metadata=ONE_OPTION)

    def __post_init__(self) -> None:
        super().__post_init__()
        is_about_maps = self.loss.hard or self.loss.finer or self.loss.tokens is not TokenChoice.ALL
        refuse(
            {
                "loss.hard, loss.finer and loss.tokens are about label maps, and there are none; give "
                "data.labels": is_about_maps and not self.data.labels,
                "sharded training is for classifiers; segmentation models fit on one GPU: leave sharded out, and take "
                "grad_checkpointing or micro_batch_size if memory is short": self.sharded,
            }
        )
