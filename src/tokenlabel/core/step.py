"""One training step, from a batch to its losses, in the order in which it runs.

    1  normalize_images     uint8 pixels -> normalised floats                       core/batch.py
    2  erase_and_draw       random erasing; the plan by which images are mixed      core/erase.py, mix.py
    3  make_targets         labels aligned to tokens; smoothed, mixed               core/align.py, targets.py
    4  model(images, mix)   class logits, tokens and the head that reads them       core/outputs.py, models/
    5  student_loss         H(class) + beta * mean over tokens of H(token)          core/losses.py

`TrainStep.forward` calls these five. The engine (training/engine.py) calls it for each micro-batch (`Part`), averages
gradients over micro-batches and processes, and takes the optimizer step. A step is a function of the weights, the
recipe and its number: everything random is seeded by (seed, step, index in the batch).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from tokenlabel.core.align import align, image_labels, most_probable, one_hot, softened, whole_views
from tokenlabel.core.batch import Batch, ScoreMapBatch, moved, normalize_images
from tokenlabel.core.config import ClassTarget, ErasingConfig, Extent, LossConfig, MixConfig, Mixing, TokenChoice
from tokenlabel.core.erase import erase
from tokenlabel.core.losses import TokenLabelLoss, sparse_cross_entropy, token_label_loss
from tokenlabel.core.mix import MixPlan, cell_means, join_plans, mix_targets, sample_mix
from tokenlabel.core.outputs import Outputs, TokenModel
from tokenlabel.core.targets import TokenTargets, class_targets
from tokenlabel.runtime.errors import ConfigError
from tokenlabel.runtime.runlog import Stopwatch


class TrainStep(nn.Module):
    """Computes the loss of one micro-batch. An `nn.Module`, so that DistributedDataParallel can wrap it.

    `erasing`, `mixing`: how images are erased and mixed. `supervision`: where the labels come from. `autocast`: the
    context of the forward pass.
    """

    def __init__(
        self,
        model: TokenModel,
        supervision: Supervision,
        *,
        erasing: ErasingConfig,
        mixing: MixConfig,
        autocast: torch.autocast,
    ) -> None:
        super().__init__()
        self.model, self.supervision, self.autocast = model, supervision, autocast
        self.erasing, self.mixing = erasing, mixing
        if not supervision.labels_tokens:
            model.freeze_token_head()

    def forward(self, batch: Batch, part: Part, watch: Stopwatch) -> dict[str, Tensor]:
        """Return the loss, averaged over the micro-batch, and its class and token parts, all of shape []."""
        model, supervision = self.model, self.supervision
        images = normalize_images(batch.images, mean=model.mean, std=model.std)  # [B, 3, height, width]
        grid = model.grid_for((images.shape[2], images.shape[3]))
        with watch.part("targets"):
            # `erased`: which pixels, if tokens lose weight by them. `mix`: the plan only, the model applies it.
            images, erased, mix = erase_and_draw(images, grid, part, erasing=self.erasing, mixing=self.mixing)
            targets = make_targets(batch, supervision, grid, mix=mix, erased=erased)
        with self.autocast:
            outputs = model(images, mix)  # mixes by the plan: pixels, or patch embeddings (MixToken)
            loss = student_loss(outputs, targets, supervision)
        return {"loss": loss.total, "class_loss": loss.class_part, "token_loss": loss.token_part}


FOR_MODEL = 1
"""The purpose of the seed of what a model draws: drop path and dropout."""


@dataclass(frozen=True, slots=True)
class Part:
    """One micro-batch of a step; `start` is the index of its first image in the batch of all processes."""

    seed: int
    step: int
    start: int

    def random_seed(self, index: int = 0, *, purpose: int | None = None) -> int:
        """Return the random seed of a group of images, whose first one has the given index in the micro-batch.

        `purpose`: a number above 0 for what must not repeat the random numbers of erasing and mixing (`FOR_MODEL`).
        """
        words = [self.seed, self.step, self.start + index]
        entropy = np.random.SeedSequence(words if purpose is None else [*words, purpose])
        # 63 bits: the seed is not negative as a signed integer either.
        return int(entropy.generate_state(1, np.uint64)[0] >> 1)

    def generator(self, index: int = 0) -> torch.Generator:
        """Return a source of random numbers on the CPU with that seed."""
        return torch.Generator().manual_seed(self.random_seed(index))


def erase_and_draw(
    images: Float[Tensor, "B 3 height width"],
    grid: tuple[int, int],
    part: Part,
    *,
    erasing: ErasingConfig,
    mixing: MixConfig,
) -> tuple[Float[Tensor, "B 3 height width"], Bool[Tensor, "B height width"] | None, MixPlan | None]:
    """Erase boxes of normalised images and draw a mixing plan; return the images, the erased pixels and the plan.

    The erased pixels are None unless `erasing.ignore_erased`: then they lower the weight of their tokens. The plan is
    None where nothing is mixed. Each group of `mixing.group_size` images has random numbers of its own, seeded by its
    index in the batch, so the result does not depend on how a batch is divided among micro-batches and processes.
    Raises ConfigError for a micro-batch that does not divide into groups.
    """
    group_size = mixing.size_of_groups(len(images))
    img_size = (images.shape[2], images.shape[3])
    groups, masks, plans = [], [], []
    for index in range(0, len(images), group_size):
        generator = part.generator(index)
        group = images[index : index + group_size]
        if erasing.probability > 0:
            group, mask = erase(group, erasing, generator=generator)
            masks.append(mask)
        groups.append(group)
        plans.append(draw_mix(mixing, group_size, grid, img_size, generator=generator))
    plan = join_plans(plans, group_size)
    if masks:
        images = groups[0] if len(groups) == 1 else torch.cat(groups)
    erased = torch.cat(masks) if masks and erasing.ignore_erased else None
    return images, erased, plan and plan.to(images.device)


def draw_mix(
    config: MixConfig, num_images: int, grid: tuple[int, int], img_size: tuple[int, int], *, generator: torch.Generator
) -> MixPlan | None:
    """Draw how images are mixed; None if they are not."""
    if torch.rand((), generator=generator) >= config.probability:
        return None
    kind, alpha = config.kind, config.alpha
    if config.mixup_share > 0 and torch.rand((), generator=generator) < config.mixup_share:
        kind, alpha = Mixing.MIXUP, config.mixup_alpha
    return sample_mix(
        kind, num_images, grid=grid, img_size=img_size, alpha=alpha, per_sample=config.per_sample, generator=generator
    )


@runtime_checkable
class OnlineTeacher(Protocol):
    """Predicts distributions over the data set's classes for augmented images; all 0 where it has no prediction."""

    def probabilities(
        self, images: UInt8[Tensor, "B 3 height width"]
    ) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B h w C"]]:
        """Return one distribution per image and one per location, in float32 and without gradients."""
        ...


@dataclass(frozen=True, eq=False, kw_only=True)
class Supervision:
    """Where the labels of class token and tokens come from, and how the loss weights them.

    `stored`: batches have score maps from a label store. `teacher`: an online teacher; its input is the augmented
    images before they are erased and mixed. An image without a class or a map has targets of weight 0, but counts in
    the means: so two processes have the loss of one, and the weight of an image does not depend on the others' labels.
    Raises ConfigError for a loss that needs a teacher where there is none, and for a teacher that labels nothing.
    """

    loss: LossConfig
    stored: bool
    teacher: OnlineTeacher | None = None

    def __post_init__(self) -> None:
        loss, needs_image_label = self.loss, self.loss.class_target is not ClassTarget.TRUTH
        if needs_image_label and not self.stored and self.teacher is None:
            raise ConfigError(
                f"loss.class_target {loss.class_target} needs a teacher, and there is none; "
                "give data.labels (with loss.beta above 0) or loss.teacher.name"
            )
        if self.teacher is not None and (self.stored or loss.beta == 0) and not needs_image_label:
            raise ConfigError(
                "loss.teacher would have nothing to say: tokens are labelled by the store or not at all; "
                "leave data.labels out, or let it label the class token by loss.class_target teacher"
            )
        if self.teacher is not None and loss.extent is Extent.IMAGE:
            raise ConfigError("loss.extent image is for stored maps: loss.teacher sees the crop only; leave it at crop")

    @property
    def labels_tokens(self) -> bool:
        """Whether tokens learn from labels of their own."""
        return self.loss.beta > 0 and (self.stored or self.teacher is not None)


@dataclass(frozen=True, eq=False)
class Targets:
    """The training targets of a micro-batch.

    `class_token`: of the class logits, one token an image. `tokens`: one for each output token, None without token
    labels. `softened`: the teacher's target of the class logits divided by the temperature, where that is not 1; at
    temperature 1 it is blended into `class_token`.
    """

    class_token: TokenTargets
    tokens: TokenTargets | None
    softened: TokenTargets | None = None


def make_targets(
    batch: Batch,
    supervision: Supervision,
    grid: tuple[int, int],
    *,
    mix: MixPlan | None = None,
    erased: Bool[Tensor, "B height width"] | None = None,
) -> Targets:
    """Return the targets of a batch: its labels aligned to the token grid (h, w), smoothed, and mixed by the plan.

    `erased`: pixels that were erased; each token's weight is lowered by its share of them. Class token and tokens may
    be about different classes; each part is smoothed over its own. Images without classes have class targets of weight
    0.
    """
    teacher, smoothing = supervision.teacher, supervision.loss.label_smoothing
    online = None if teacher is None else teacher.probabilities(batch.images)
    tokens = None
    if supervision.labels_tokens:
        tokens = token_targets(batch, supervision, grid, online)
        if erased is not None:
            tokens = tokens.scaled(1 - cell_means(erased.float(), grid))
        tokens = mix_targets(tokens.smoothed(smoothing), mix, grid)
    class_token, soft = class_token_targets(batch, supervision, online)
    # Without any class (C = 0) there is no class head, and nothing reads these targets.
    num_classes = max(1, batch.num_classes)
    class_token = mix_targets(class_token.smoothed(smoothing, num_classes), mix, (1, 1))
    if soft is not None:
        soft = mix_targets(soft.smoothed(smoothing, num_classes), mix, (1, 1))
    return Targets(class_token, tokens, soft)


OnlineLabels = tuple[Float[Tensor, "B C"], Float[Tensor, "B h w C"]]
"""What an online teacher predicts for a batch (`OnlineTeacher.probabilities`)."""


def token_targets(
    batch: Batch, supervision: Supervision, grid: tuple[int, int], online: OnlineLabels | None
) -> TokenTargets:
    """Return the targets of the tokens, by the stored maps if there are some, else by those of an online teacher."""
    loss, maps, views = supervision.loss, batch.score_maps, batch.views
    if not supervision.stored:
        assert online is not None
        maps = top_score_maps(online[1], loss.teacher.topk)
        # The teacher saw the augmented images themselves: its maps need no crop, so the last frame is the identity. The
        # views stay frames before it: what a warp moved in from outside of the image is not covered.
        views = torch.cat([views, whole_views(len(views), views.device)], dim=1)
    tokens = align(maps, views, grid, logits=loss.map_mode)  # [B, N]
    if loss.tokens is TokenChoice.CONFIDENT:
        tokens = tokens.scaled(are_confident(tokens, loss.token_threshold).to(tokens.weight.dtype))
    return tokens


def class_token_targets(
    batch: Batch, supervision: Supervision, online: OnlineLabels | None
) -> tuple[TokenTargets, TokenTargets | None]:
    """Return the targets of the class logits, and those of the logits divided by the temperature, if that is not 1."""
    loss, truth = supervision.loss, batch.class_targets()
    if loss.class_target is ClassTarget.TRUTH:
        return truth, None
    probs, weight = _teacher_of_images(batch, supervision, online)
    probs = most_probable(probs) if loss.hard else softened(probs, loss.temperature)
    from_teacher = class_targets(probs).scaled(weight[:, None])
    # With `both`, an image without a class counts with the teacher's share only: each part has the weight of its share.
    share = 1.0 if loss.class_target is ClassTarget.TEACHER else loss.teacher_share
    shares = torch.full_like(truth.weight, share)
    if loss.temperature == 1:
        return truth.blended(from_teacher, shares), None
    # Two cross-entropies, of different logits: one target cannot hold both.
    return truth.scaled(1 - shares), from_teacher.scaled(shares)


def _teacher_of_images(
    batch: Batch, supervision: Supervision, online: OnlineLabels | None
) -> tuple[Float[Tensor, "B C"], Float[Tensor, " B"]]:
    """Return the teacher's label of each whole image, by the online teacher if there is one, and its weight.

    Where the teacher says nothing of what is seen (of a crop beside its region, say) the ground truth takes its place.
    An image without a stored map has weight 0: it was never looked at, and counts as unknown. So has one of which
    neither teacher nor truth say anything.
    """
    loss, maps, views = supervision.loss, batch.score_maps, batch.views
    if online is not None:
        probs, _ = online
        is_labelled = probs.amax(dim=1) > 0
        probs = torch.where(is_labelled[:, None], probs, one_hot(batch.class_ids, probs))
        is_known = is_labelled | batch.has_class
    else:
        assert maps is not None
        image_views = views if loss.extent is Extent.CROP else whole_views(len(views), views.device)
        probs, is_labelled = image_labels(maps, image_views, batch.class_ids, map_mode=loss.map_mode)
        is_known = (is_labelled | batch.has_class) & maps.are_known()
    return probs, is_known.float()


def student_loss(outputs: Outputs, targets: Targets, supervision: Supervision) -> TokenLabelLoss:
    """Return H(class token) + beta * mean over tokens of H(token), H the cross-entropy; with a temperature, distil too.

    The distillation loss is temperature**2 * H(softened target, softmax(class logits / temperature)): the KL divergence
    of Hinton et al. 2015 up to a constant. It is added to the class part.
    """
    loss = token_label_loss(outputs, targets.class_token, targets.tokens, beta=supervision.loss.beta)
    if targets.softened is None:
        return loss
    temperature = supervision.loss.temperature
    logits = outputs.class_logits.float() / temperature
    soft = temperature**2 * sparse_cross_entropy(logits[:, None], targets.softened).mean()
    return replace(loss, total=loss.total + soft, class_part=loss.class_part + soft.detach())


def top_score_maps(probs: Float[Tensor, "B h w C"], topk: int) -> ScoreMapBatch:
    """Return score maps that keep, for each image, the `topk` classes with the highest mean probability.

    `probs`: a distribution at each location. All locations of an image keep the same classes; the probability that is
    left at a location is spread evenly over the other classes.
    """
    num_images, height, width, num_classes = probs.shape
    classes = probs.mean(dim=(1, 2)).topk(min(topk, num_classes), dim=1).indices  # [B, U]
    kept = probs.gather(3, classes[:, None, None].expand(-1, height, width, -1))  # [B, h, w, U]
    return ScoreMapBatch(
        classes=classes,
        codes=torch.arange(classes.shape[1], device=probs.device).expand_as(kept),
        probs=kept,
        sizes=moved(torch.tensor([width, height], dtype=probs.dtype), probs.device).expand(num_images, 2),
        regions=moved(torch.tensor([0, 0, 1, 1], dtype=probs.dtype), probs.device).expand(num_images, 4),
        empty_is_even=torch.zeros(num_images, dtype=torch.bool, device=probs.device),
        num_classes=num_classes,
        shapes=((height, width),) * num_images,
    )


def are_confident(targets: TokenTargets, threshold: float) -> Bool[Tensor, "B N"]:
    """Return a mask of the tokens whose most probable class has a probability of at least `threshold`."""
    # Floor and excess are multiplied by the weight: comparing with threshold * weight needs no division by it.
    return targets.floor + targets.excess.amax(dim=2).clamp_min(0) >= threshold * targets.weight
