"""The options of `tokenlabel annotate` and `tokenlabel fit-head`. No torch, so that help comes at once."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from tokenlabel.labels.encoding import Encoding
from tokenlabel.runtime.coercion import COUNT, NATURAL, POSITIVE, SEED, check_numbers, coerced_fields
from tokenlabel.runtime.errors import ModelError, refuse
from tokenlabel.runtime.process import listed

MASKS = "masks:"  # --teacher masks:DIR, --from masks:DIR
HEAD_SUFFIX = ".safetensors"
Kind = Literal["labels", "masks", "words", "text", "file"]

FROM = "labels, words, text, masks:DIR, or a file of embeddings (.npy, .safetensors)"
# The options that only some kinds of heads use.
OPTIONS_OF = {
    "words": ("words",),
    "topk": ("words",),
    "temperature": ("words", "text", "file"),
    "pooling": ("labels",),
    "class_names": ("masks",),
    "ignore_index": ("masks",),
}


@dataclass(frozen=True, kw_only=True)
@coerced_fields
class TeacherConfig:
    """Which network labels the images, and how it sees them."""

    teacher: str | list[str]
    """A run folder, of segmentation too, the name of a model (timm's, lvvit_s and the like), or a head that `fit-head`
    made (HEAD.safetensors, which knows its backbone); several are averaged. masks:DIR takes segmentation masks (PNG
    ids, laid out like the images; or masks:FILE.json, COCO's) in place of a network."""
    weights: str | list[str] | None = None
    """Checkpoint file (.safetensors, or .pth without code in it), one for each teacher ("" for one that needs none);
    timm's pretrained weights if none."""
    size: int | None = None
    """Images are resized to an area of size x size pixels, masks are averaged down to size x size cells; the teacher's
    own size if none."""
    cells: int | None = None
    """Maps have about cells x cells cells, at the image's aspect ratio; by default the teacher's own grid."""
    scales: list[float] | None = None
    """Of a segmentation run: average its predictions at these sizes, relative to the image's; by default those of its
    recipe."""
    crop: Literal["none", "center"] = "none"
    """none: the whole image at its own aspect ratio; center: the square crop that the teacher was evaluated on."""
    head: Literal["auto", "classifier", "tokens"] = "auto"
    """Which head predicts the locations; auto: the one for tokens if it was trained, else the classifier."""
    flip: bool = False
    """Average with the predictions for the mirror image."""
    class_map: str | None = None
    """How the teacher's classes become those of the images: a file with a pair of names or ids a line; `names` to
    match equal names; `order` if they are the same by another name. By default they must be the same."""
    outside: Literal["renormalise", "spread"] = "renormalise"
    """What to do with the probability of classes that a class map maps to none. renormalise: the others are scaled to
    sum to 1, and a location with less than .001 of its probability on them keeps nothing; spread: all classes share
    it."""
    class_order: str | None = None
    """The classes of a teacher that does not name them: `sorted` or `natural` (10 after 9, as timm's scripts sort
    folders) for those of the images in this order; else a file with its class names, one a line, or `.json`."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 runs the teacher under autocast."""
    compile: bool = False
    """Compile the teacher (torch.compile); pays off on a GPU for images of one shape."""

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise ModelError(f"size must be at least 1, got {self.size}; none takes the teacher's own")
        if self.teacher in ("", []):
            raise ModelError("--teacher names no network; give a run folder, a model's name, a head or masks:DIR")
        check_numbers(self, cells=NATURAL, scales=POSITIVE)
        if self.outside != "renormalise" and self.class_map is None:
            raise ModelError(
                "--outside is about classes that a class map leaves out; give --class-map, or leave it out"
            )


@dataclass(frozen=True, kw_only=True)
class AnnotateConfig(TeacherConfig):
    """How to label images.

    >>> tl.AnnotateConfig(teacher="masks:masks", encoding="raw").topk
    5
    >>> tl.AnnotateConfig(teacher="resnet50", topk=0)
    Traceback (most recent call last):
    ...
    tokenlabel.runtime.errors.ConfigError: topk must be at least 1, got 0
    """

    topk: int = 5
    """Classes that each location keeps; the probability of the others is stored as one number."""
    encoding: Encoding | None = None
    """How records are written: compact takes a fifth of the size of raw, which is more exact and faster to read. By
    default compact, and in an existing store the encoding that it began with."""
    tolerance: float | None = None
    """Of compact records: entries of less probability are dropped, the others are rounded to steps of 1.25 times this;
    0 keeps all, in steps of 1/510. By default .008, and in an existing store the tolerance that it began with."""
    batch_size: int | None = None
    """Images a batch; by default 64 on a GPU and 16 on a CPU."""
    num_workers: int = 2
    """Threads that decode images, and as many that pack score maps."""
    shard_s: float = 300.0
    """Labels are written to disk after at most so many seconds, which is what a kill may cost."""
    ignore_index: int | None = None
    """Of masks: the id of pixels without a class; by default 255, with more than 255 classes 65535."""
    strict: bool = False
    """Stop at the first image that does not decode; by default such images are skipped and listed."""
    again: str | None = None
    """Label images again that have a label: a text file of their keys, one a line, or `changed` for those that were
    replaced since, or whose masks were. A new label is used as soon as it is written; until then the old one is."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, topk=NATURAL, batch_size=NATURAL, num_workers=COUNT, shard_s=POSITIVE, tolerance="[0, 1)")
        is_raw = self.tolerance is not None and self.encoding is Encoding.RAW
        refuse({"--tolerance is of compact records; leave it or --encoding raw out": is_raw})


@dataclass(frozen=True, kw_only=True)
@coerced_fields
class FitConfig:
    """Which head to fit, on which backbone.

    >>> tl.FitConfig(backbone="test_vit", from_="words", words=64).words
    64
    """

    backbone: str
    """A run folder, or the name of a model (timm's, lvvit_s and the like), with or without a classifier of its own."""
    from_: str
    """labels: class labels of the images. masks:DIR: masks of (some of) the images, PNG class ids laid out like them;
    masks:FILE.json: COCO's file of them. words: the images alone (visual words). text: class names; IMAGES is a file
    with one a line. A file: embeddings [C, D] (.npy, .safetensors) of the class names in IMAGES."""
    weights: str | None = None
    """Checkpoint file of the backbone (.safetensors, or .pth without code in it); timm's pretrained weights if none."""
    size: int | None = None
    """Images are resized to an area of size x size pixels; the backbone's own size if none."""
    words: int = 8192
    """Number of visual words."""
    topk: int = 5
    """The temperature of words is chosen so that the topk most probable ones of a location hold .9 of the probability:
    as many as `annotate` keeps."""
    temperature: float | None = None
    """Of the cosines of words, texts and embeddings; by default fitted, the text tower's own, and .01."""
    pooling: Literal["auto", "mean", "instances"] = "auto"
    """How locations learn from the class label of their image. mean: the mean of their vectors shows the class;
    instances: at least one of them does; auto: whichever is better on held-out images."""
    class_names: str | None = None
    """Names of the masks' classes by their ids, a file of one a line; by default COCO's categories, the images' classes
    in their order, or, if these have none, classes.txt beside the masks."""
    ignore_index: int | None = None
    """Of masks: the id of pixels without a class; by default 255, with more than 255 classes 65535."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 runs the backbone under autocast."""
    batch_size: int = 64
    """Images a batch."""
    num_workers: int = 2
    """Threads that decode images."""
    seed: int = 0
    """Of the random choices: locations, initial words."""

    def __post_init__(self) -> None:
        check_numbers(self, "--", size=NATURAL, words="[2, inf)", topk=NATURAL, batch_size=NATURAL, num_workers=COUNT)
        check_numbers(self, "--", temperature=POSITIVE, seed=SEED)
        kind = kind_of(self.from_)
        given = {field.name for field in fields(self) if getattr(self, field.name) != field.default}
        misplaced = [f"--{n.replace('_', '-')}" for n, kinds in OPTIONS_OF.items() if n in given and kind not in kinds]
        if misplaced:
            raise ModelError(f"{listed(misplaced)}: means nothing for a head --from {self.from_}; leave it out")


def kind_of(from_: str) -> Kind:
    """Return the kind of head that `--from` names."""
    if from_.startswith(MASKS) and from_ != MASKS:
        return "masks"
    if Path(from_).suffix in (".npy", HEAD_SUFFIX):
        return "file"
    for kind in ("labels", "words", "text"):
        if from_ == kind:
            return kind
    raise ModelError(f"--from is {FROM}; got {from_!r}")
