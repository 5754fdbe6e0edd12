"""Objectives: what the outputs of a step are trained towards, and the loss that says how far off they are.

Ground truth, a label store and a teacher in the step are the three sources of targets. Whatever the source, the
outcome has the form of `TokenTargets`: one for the class token, one for the other tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import inf
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from tokenlabel.core.align import align
from tokenlabel.core.batch import Batch, ScoreMapBatch
from tokenlabel.core.erase import Erased
from tokenlabel.core.losses import TokenLabelLoss, sparse_cross_entropy, token_label_loss
from tokenlabel.core.mix import MixPlan, mix_targets
from tokenlabel.core.outputs import Outputs
from tokenlabel.core.pooling import (
    corrected,
    every_class,
    image_labels,
    is_wrong,
    most_probable,
    one_hot,
    softened,
    whole_views,
)
from tokenlabel.core.published import LogitsMode
from tokenlabel.core.targets import TokenTargets, class_targets
from tokenlabel.runtime.coercion import Choice, coerced_fields
from tokenlabel.runtime.ranges import NATURAL, check_numbers


class ObjectiveError(ValueError):
    """Options of an objective that contradict each other or the data."""


class ClassTarget(Choice):
    """What the class token is trained to say."""

    TRUTH = "truth"
    TEACHER = "teacher"
    BOTH = "both"


class TokenChoice(Choice):
    """Which tokens count: all, those of which the teacher is sure, or those that show the image's own class."""

    ALL = "all"
    CONFIDENT = "confident"
    OBJECT = "object"


class Extent(Choice):
    """What the teacher's one label of an image is about: the crop that the model sees, or all of the image."""

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
    """Which head answers for the places; auto: one for tokens where it was trained, else the classifier."""
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
        check_numbers(self, "loss.teacher.", size=NATURAL)


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
    correct_teacher: float = 0.0
    """Share of the ground truth in every label that the teacher gives to an image whose class it gets wrong."""
    tokens: TokenChoice = TokenChoice.ALL
    """Which tokens count: all; confident: those whose most probable class reaches token_threshold; object: those to
    which the teacher gives the image's own class with at least token_threshold."""
    token_threshold: float = 0.5
    """Least probability of tokens that count, see tokens."""
    map_mode: LogitsMode = LogitsMode.ZERO
    """What imported maps of logits mean: zero, kept, or published (see docs/labels.md)."""
    teacher: OnlineTeacherConfig = field(default_factory=OnlineTeacherConfig)
    """A teacher in the step: it labels the class token if class_target wants it, the tokens if there is no store."""

    def __post_init__(self) -> None:
        for name in ("label_smoothing", "teacher_share", "correct_teacher", "token_threshold"):
            share = getattr(self, name)
            if not 0 <= share <= 1:
                raise ObjectiveError(f"loss.{name} is a share from 0 to 1, got {share}")
        if not (0 <= self.beta < inf and 0 < self.temperature < inf and self.teacher.topk >= 1):
            raise ObjectiveError(
                "loss.beta must be at least 0, loss.temperature above 0 and loss.teacher.topk at least 1, got "
                f"{self.beta}, {self.temperature} and {self.teacher.topk}"
            )
        if self.hard and self.temperature != 1:
            raise ObjectiveError(
                f"loss.hard leaves nothing to soften; leave loss.temperature at 1, got {self.temperature}"
            )
        if self.class_target is ClassTarget.TRUTH and (self.hard or self.temperature != 1):
            raise ObjectiveError(
                "loss.hard and loss.temperature change what a teacher tells the class token, and it is told the "
                "truth; set loss.class_target to teacher or both"
            )

    @property
    def has_online_teacher(self) -> bool:
        """Whether a teacher looks at the images of each step."""
        return self.teacher.name is not None

    @property
    def asks_teacher_of_image(self) -> bool:
        """Whether one label an image is asked of a teacher, for the class token or to tell where it is wrong."""
        return self.class_target is not ClassTarget.TRUTH or self.correct_teacher > 0

    @property
    def reads_labels(self) -> bool:
        """Whether a label store, where there is one, is read."""
        return self.beta > 0 or (self.class_target is not ClassTarget.TRUTH and not self.has_online_teacher)


@runtime_checkable
class OnlineTeacher(Protocol):
    """Says of augmented images what they show, as distributions over the classes of the data set, or 0 for all."""

    def probabilities(
        self, images: UInt8[Tensor, "B 3 height width"]
    ) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B h w C"]]:
        """Return those of whole images and of every place of them, in float32 and without gradients."""
        ...


@dataclass(frozen=True, eq=False)
class Targets:
    """What a step is trained towards.

    `class_token`, `softened`: one token an image; their weights add up to 1. `softened` is for the class logits
    divided by the temperature. `tokens`: one for each output token, None without token labels.
    """

    class_token: TokenTargets
    tokens: TokenTargets | None
    softened: TokenTargets | None = None


class Objective:
    """Makes the targets of a batch, and the loss.

    `labelled`: whether batches come with score maps of a store. `teacher`: the teacher in the step, if
    `config` names one. `ignore_erased`: take erased tokens out of the loss. `map_weight`: images / images with a
    map in the store, by which the part of the loss that maps label is multiplied, so that it is not drowned by images
    without one: a constant, whatever the images of a batch, and so two ranks still equal one. Raises ObjectiveError
    where targets are asked of a teacher that is not there, and where one would have nothing to say or cannot know.
    """

    def __init__(
        self,
        config: LossConfig,
        *,
        labelled: bool,
        teacher: OnlineTeacher | None = None,
        ignore_erased: bool = False,
        map_weight: float = 1.0,
    ) -> None:
        self.config, self.labelled, self.teacher = config, labelled, teacher
        self.ignore_erased, self.map_weight = ignore_erased, map_weight
        self.labels_tokens = config.beta > 0 and (labelled or teacher is not None)
        self._check()

    def _check(self) -> None:
        config, has_teacher = self.config, self.teacher is not None
        if config.asks_teacher_of_image and not self.labelled and not has_teacher:
            field = "class_target" if config.class_target is not ClassTarget.TRUTH else "correct_teacher"
            raise ObjectiveError(
                f"loss.{field} {getattr(config, field)} needs a teacher, and there is none; "
                "give data.labels (with loss.beta above 0) or loss.teacher.name"
            )
        if has_teacher and (self.labelled or config.beta == 0) and not config.asks_teacher_of_image:
            raise ObjectiveError(
                "loss.teacher would have nothing to say: tokens are labelled by the store or not at all; "
                "leave data.labels out, or let it label the class token by loss.class_target teacher"
            )
        if has_teacher and config.extent is Extent.IMAGE:
            raise ObjectiveError(
                "loss.extent image is for stored maps: loss.teacher sees the crop only; leave it at crop"
            )

    def targets(
        self, batch: Batch, plan: MixPlan | None, *, grid: tuple[int, int], erased: Erased | None = None
    ) -> Targets:
        """Return the targets of a batch on the model's token grid (h, w), erased first and mixed then.

        A teacher in the step sees `batch.images`, which are neither.
        """
        config = self.config
        score_maps, views, label = self._asked(batch)
        tokens = None
        if self.labels_tokens:
            assert score_maps is not None
            tokens = self._token_targets(score_maps, views, label, batch, grid)
            if erased is not None and self.ignore_erased:
                tokens = erased.reweight(tokens, grid)
            tokens = mix_targets(tokens.smoothed(config.label_smoothing, batch.num_classes), plan, grid)
        class_token, softened = self._class_targets(label, batch)
        parts = [
            part and mix_targets(part.smoothed(config.label_smoothing, batch.num_classes), plan, (1, 1))
            for part in (class_token, softened)
        ]
        assert parts[0] is not None
        return Targets(parts[0], tokens, parts[1])

    def loss(self, outputs: Outputs, targets: Targets) -> TokenLabelLoss:
        """Return H(class token) + beta * mean over tokens of H(token), and the distillation at a temperature.

        That is temperature**2 * H(softened target, softmax(class logits / temperature)), part of the class
        part: the divergence of Hinton et al. 2015 up to a constant.
        """
        weight = self.map_weight if self.labelled else 1.0
        loss = token_label_loss(outputs, targets.class_token, targets.tokens, beta=self.config.beta * weight)
        loss = replace(loss, token_part=loss.token_part * weight)
        if targets.softened is None:
            return loss
        temperature = self.config.temperature
        logits = outputs.class_logits.float() / temperature
        softened = temperature**2 * sparse_cross_entropy(logits[:, None], targets.softened).mean()
        return replace(loss, total=loss.total + softened, class_part=loss.class_part + softened.detach())

    def _asked(
        self, batch: Batch
    ) -> tuple[ScoreMapBatch | None, Float[Tensor, "B F 2 3"], Float[Tensor, "B C"] | None]:
        """Return the maps that label the tokens, their views, and the teacher's label of each image if one is asked.

        The store labels the tokens where there is one; the teacher in the step is asked first for the image, which
        keeps the ground truth where the teacher says nothing of it.
        """
        score_maps, views, label = batch.score_maps, batch.views, None
        if self.teacher is not None:
            of_images, of_places = self.teacher.probabilities(batch.images)
            label = torch.where(
                of_images.amax(dim=1, keepdim=True) > 0, of_images, one_hot(batch.class_ids, of_images)
            )
            if self.labels_tokens and not self.labelled:
                score_maps = top_score_maps(of_places, self.config.teacher.topk)
                views = whole_views(len(of_places), of_places.device)
        elif self.config.asks_teacher_of_image and score_maps is not None:
            seen = views if self.config.extent is Extent.CROP else whole_views(len(views), views.device)
            label = image_labels(score_maps, seen, batch.class_ids, map_mode=self.config.map_mode)
        return score_maps, views, label

    def _token_targets(
        self,
        score_maps: ScoreMapBatch,
        views: Float[Tensor, "B F 2 3"],
        label: Float[Tensor, "B C"] | None,
        batch: Batch,
        grid: tuple[int, int],
    ) -> TokenTargets:
        config = self.config
        targets = align(score_maps, views, grid, logits=config.map_mode)
        counting = tokens_that_count(targets, batch.class_ids, config.tokens, config.token_threshold)
        if config.correct_teacher > 0:
            assert label is not None
            share = config.correct_teacher * is_wrong(label, batch.class_ids)
            targets = corrected(targets, batch.class_ids, share)
        return targets if counting is None else targets.scaled(counting.to(targets.weight.dtype))

    def _class_targets(
        self, label: Float[Tensor, "B C"] | None, batch: Batch
    ) -> tuple[TokenTargets, TokenTargets | None]:
        """Return the target of the class token, and the one at the temperature if that is not 1."""
        config, truth = self.config, class_targets(batch.class_ids)
        if config.class_target is ClassTarget.TRUTH:
            return truth, None
        assert label is not None
        said = most_probable(label) if config.hard else softened(label, config.temperature)
        taught = every_class(said)
        if self.map_weight != 1 and self.teacher is None:
            assert batch.score_maps is not None
            taught = taught.scaled(batch.score_maps.are_known()[:, None] * self.map_weight)
        if config.correct_teacher > 0:
            share = config.correct_teacher * is_wrong(label, batch.class_ids)
            taught = corrected(taught, batch.class_ids, share)
        share = 1.0 if config.class_target is ClassTarget.TEACHER else config.teacher_share
        shares = torch.full_like(truth.weight, share)
        if config.temperature == 1:
            return truth.blended(taught, shares), None
        return truth.scaled(1 - shares), taught.scaled(shares)


def top_score_maps(probs: Float[Tensor, "B h w C"], topk: int) -> ScoreMapBatch:
    """Return maps that keep the `topk` classes of each image which are most probable on average over its places.

    `probs`: a distribution at each place. Every place keeps the same classes; the others share its rest.
    """
    num_images, height, width, num_classes = probs.shape
    classes = probs.mean(dim=(1, 2)).topk(min(topk, num_classes), dim=1).indices  # [B, U]
    kept = probs.gather(3, classes[:, None, None].expand(-1, height, width, -1))  # [B, h, w, U]
    return ScoreMapBatch(
        classes=classes,
        codes=torch.arange(classes.shape[1], device=probs.device).expand_as(kept),
        probs=kept,
        sizes=probs.new_tensor([width, height]).expand(num_images, 2),
        regions=probs.new_tensor([0, 0, 1, 1]).expand(num_images, 4),
        empty_is_even=torch.zeros(num_images, dtype=torch.bool, device=probs.device),
        num_classes=num_classes,
        shapes=((height, width),) * num_images,
    )


def tokens_that_count(
    targets: TokenTargets, class_ids: Int[Tensor, " B"], choice: TokenChoice | str, threshold: float
) -> Bool[Tensor, "B N"] | None:
    """Say which tokens count, judged by their labels; None for all.

    `CONFIDENT`: the largest probability of a named class, or of any other, is at least `threshold`. `OBJECT`: the
    probability of the image's class is. Probabilities are those of the covered part of a token.
    """
    match TokenChoice(choice):
        case TokenChoice.ALL:
            return None
        case TokenChoice.CONFIDENT:
            excess = targets.excess.amax(dim=2).clamp_min(0)
        case TokenChoice.OBJECT:
            named = targets.classes == class_ids[:, None]  # [B, U]
            excess = (targets.excess * named[:, None]).sum(dim=2)
    return targets.floor + excess >= threshold * targets.weight
