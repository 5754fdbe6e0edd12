"""What a training step does, as data: the parts of a recipe that the method reads, and their choices. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tokenlabel.runtime.coercion import (
    COUNT,
    NATURAL,
    ONE_OPTION,
    POSITIVE,
    SHARE,
    Choice,
    check_numbers,
    coerced_fields,
)
from tokenlabel.runtime.errors import ConfigError


class Inference(Choice):
    """How class logits and token logits become one prediction an image.

    CLASS: the class token (or pooled features) alone. TOKENS: the mean of the token logits.
    COMBINED: class logits + 0.5 * max over tokens of the token logits, as the LV-ViT authors publish it.

    >>> outputs = tl.Outputs(torch.ones(1, 3), torch.zeros(1, 4, 8), torch.nn.Linear(8, 3, bias=False), (2, 2))
    >>> outputs.logits("combined").tolist()
    [[1.0, 1.0, 1.0]]
    """

    CLASS = "class"
    TOKENS = "tokens"
    COMBINED = "combined"


class Mixing(Choice):
    """Which mix to draw.

    MixToken: Jiang et al. 2021, section 3.2. CutMix: Yun et al. 2019. Mixup: Zhang et al. 2018.

    >>> [str(mixing) for mixing in tl.Mixing]
    ['none', 'mixtoken', 'cutmix', 'mixup']
    """

    NONE = "none"
    MIXTOKEN = "mixtoken"
    CUTMIX = "cutmix"
    MIXUP = "mixup"


@dataclass(frozen=True, kw_only=True)
@coerced_fields
class MixConfig:
    """How pairs of images are mixed."""

    kind: Mixing = Mixing.NONE
    """none, mixtoken, cutmix or mixup."""
    alpha: float = 1.0
    """Both parameters of the Beta distribution of the share that an image keeps."""
    mixup_share: float = 0.0
    """Share of the mixes that are Mixup in place of cutmix: .5 for DeiT's taking turns."""
    mixup_alpha: float = 0.8
    """Both parameters of the Beta distribution of Mixup."""
    per_sample: bool = False
    """Draw a mix for each image, with random partners; by default one for the batch, as published."""
    group_size: int | None = None
    """Erase and mix within groups of this many images, so that nothing depends on the number of processes or on
    the micro batch; none for as many as go through the model at once."""
    probability: float = 1.0
    """Share of the batches that are mixed."""

    def __post_init__(self) -> None:
        check_numbers(self, "mix.", probability=SHARE, mixup_share=SHARE, alpha=POSITIVE, mixup_alpha=POSITIVE)
        check_numbers(self, "mix.", group_size=NATURAL)
        if self.mixup_share > 0 and self.kind is not Mixing.CUTMIX:
            raise ConfigError(
                f"mix.mixup_share is for mix.kind cutmix, got {self.kind.value}; take kind mixup for Mixup alone"
            )

    def size_of_groups(self, num_images: int) -> int:
        """Return how many images a group has if `num_images` go through the model at once.

        Raises ConfigError if they do not divide into groups of `group_size`.
        """
        if num_images % (self.group_size or num_images):
            raise ConfigError(
                f"mix.group_size {self.group_size} does not divide the {num_images} images that go through the model "
                "at once; choose a divisor, or another batch_size or micro_batch_size"
            )
        return self.group_size or num_images


class ErasingMode(Choice):
    """What fills a box: CONST the mean colour, RAND one random colour, PIXEL a random colour for each pixel.

    >>> [str(mode) for mode in tl.ErasingMode]
    ['const', 'rand', 'pixel']
    """

    CONST = "const"
    RAND = "rand"
    PIXEL = "pixel"


@dataclass(frozen=True, kw_only=True)
@coerced_fields
class ErasingConfig:
    """Whether and how parts of images are erased.

    >>> tl.ErasingConfig(probability=0.25, mode="const").mode
    <ErasingMode.CONST: 'const'>
    """

    probability: float = 0.0
    """Share of the images of which something is erased."""
    mode: ErasingMode = ErasingMode.PIXEL
    """const (the mean colour), rand (one random colour a box) or pixel (one a pixel)."""
    area: tuple[float, float] = (0.02, 1 / 3)
    """Range of the share of the image that is erased."""
    max_boxes: int = 1
    """The number of boxes is drawn from 1 to this; they share the area."""
    ignore_erased: bool = False
    """Take erased tokens out of the loss by their erased share; by default they keep their label."""

    def __post_init__(self) -> None:
        low, high = self.area
        check_numbers(self, "erase.", probability=SHARE, area="(0, 1)", max_boxes=NATURAL)
        if low > high:
            raise ConfigError(f"erase.area must be two numbers with first <= second, got {low} and {high}")


class LogitsMode(Choice):
    """How logits of stored maps become probabilities; maps of probabilities ignore it.

    ZERO: each cell's softmax, classes that it did not keep counting as logit 0. KEPT: each cell's softmax
    over the classes that it kept. PUBLISHED: as in the published toolboxes, the softmax comes last, after
    logits were sampled as `roi_align` does it; for crops and flips only.

    >>> [str(mode) for mode in tl.LogitsMode]
    ['zero', 'kept', 'published']
    """

    ZERO = "zero"
    KEPT = "kept"
    PUBLISHED = "published"


class ClassTarget(Choice):
    """What the class token is trained to say.

    >>> [str(target) for target in tl.ClassTarget]
    ['truth', 'teacher', 'both']
    """

    TRUTH = "truth"
    TEACHER = "teacher"
    BOTH = "both"


class TokenChoice(Choice):
    """Which tokens count: all, or those of which the teacher is sure.

    >>> [str(choice) for choice in tl.TokenChoice]
    ['all', 'confident']
    """

    ALL = "all"
    CONFIDENT = "confident"


class Extent(Choice):
    """What the teacher's one label of an image is about: the crop that the model sees, or all of the image.

    >>> [str(extent) for extent in tl.Extent]
    ['crop', 'image']
    """

    CROP = "crop"
    IMAGE = "image"


@dataclass(frozen=True, kw_only=True)
@coerced_fields
class OnlineTeacherConfig:
    """A teacher that looks at the augmented images of each step, before they are erased and mixed."""

    name: str | None = None
    """A run folder or the name of a model, as for `tokenlabel annotate`; none for no teacher in the step."""
    weights: str | None = None
    """Checkpoint file of the teacher; timm's pretrained weights if none."""
    size: int | None = None
    """The teacher sees images at about size x size pixels; at the size of the model's own input if none."""
    head: Literal["auto", "classifier", "tokens"] = "auto"
    """Which head answers for the locations; auto: one for tokens where it was trained, else the classifier."""
    class_map: str | None = None
    """How the teacher's classes become those of the images, as for `tokenlabel annotate`."""
    outside: Literal["renormalise", "spread"] = "renormalise"
    """What becomes of probability that a class map sends to no class, as for `tokenlabel annotate`."""
    class_order: str | None = None
    """The classes of a teacher that does not say their names, as for `tokenlabel annotate`."""
    topk: int = 16
    """Classes that label the tokens of an image: its most probable ones; the others share what is left."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 runs the teacher under autocast."""
    compile: bool = False
    """Compile the teacher (torch.compile)."""

    def __post_init__(self) -> None:
        check_numbers(self, "loss.teacher.", size=NATURAL, topk=NATURAL)
        given = [name for name in ("weights", "class_map", "class_order") if getattr(self, name) is not None]
        if self.name is None and given:
            raise ConfigError(f"loss.teacher.{given[0]} is of a teacher in the step; name that by loss.teacher.name")
        if self.class_map is None and self.outside != "renormalise":
            raise ConfigError("loss.teacher.outside is about what loss.teacher.class_map leaves out; give that, too")


@dataclass(frozen=True, kw_only=True)
@coerced_fields
class LossConfig:
    """What the outputs are trained towards."""

    beta: float = 0.5
    """Weight of the token part; 0 trains without token labels."""
    label_smoothing: float = 0.1
    """Share of every target that is spread evenly over all classes, class and token targets alike."""
    class_target: ClassTarget = ClassTarget.TRUTH
    """truth: the ground truth (the paper); teacher: the teacher's label of the crop (the published code, ReLabel,
    distillation); both: mixed by teacher_share."""
    teacher_share: float = 0.5
    """Share of the teacher in a class target of both."""
    extent: Extent = Extent.CROP
    """What stored maps are averaged over for the teacher's label of an image: the crop that is seen, or the image."""
    hard: bool = False
    """The teacher's label of an image is its most probable class alone."""
    temperature: float = 1.0
    """Soften the teacher's label of an image and the class token's answer to it (Hinton et al. 2015)."""
    tokens: TokenChoice = TokenChoice.ALL
    """Which tokens count: all; confident: those whose most probable class reaches token_threshold."""
    token_threshold: float = 0.5
    """Least probability of tokens that count, see tokens."""
    map_mode: LogitsMode = LogitsMode.ZERO
    """What imported maps of logits mean: zero, kept, or published (see docs/labels.md)."""
    teacher: OnlineTeacherConfig = field(default_factory=OnlineTeacherConfig, metadata=ONE_OPTION)
    """A teacher in the step: it labels the class token if class_target wants it, the tokens if there is no store."""

    def __post_init__(self) -> None:
        check_numbers(self, "loss.", label_smoothing=SHARE, teacher_share=SHARE, token_threshold=SHARE)
        check_numbers(self, "loss.", beta=COUNT, temperature=POSITIVE)
        if self.hard and self.temperature != 1:
            raise ConfigError(
                f"loss.hard leaves nothing to soften; leave loss.temperature at 1, got {self.temperature}"
            )
        if self.class_target is ClassTarget.TRUTH and (self.hard or self.temperature != 1):
            raise ConfigError(
                "loss.hard and loss.temperature change what a teacher tells the class token, and it is told the "
                "truth; set loss.class_target to teacher or both"
            )

    @property
    def has_online_teacher(self) -> bool:
        """Whether a teacher looks at the images of each step."""
        return self.teacher.name is not None

    @property
    def reads_labels(self) -> bool:
        """Whether a label store, where there is one, is read."""
        return self.beta > 0 or (self.class_target is not ClassTarget.TRUTH and not self.has_online_teacher)
