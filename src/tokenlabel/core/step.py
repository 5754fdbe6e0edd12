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

from tokenlabel.core.align import align, every_class, image_labels, most_probable, one_hot, softened, whole_views
from tokenlabel.core.batch import Batch, ScoreMapBatch, normalize_images
from tokenlabel.core.config import ClassTarget, ErasingConfig, Extent, LossConfig, MixConfig, Mixing, TokenChoice
from tokenlabel.core.erase import erase, erased_share
from tokenlabel.core.losses import TokenLabelLoss, sparse_cross_entropy, token_label_loss
from tokenlabel.core.mix import MixPlan, join_plans, mix_targets, sample_mix
from tokenlabel.core.outputs import Outputs, TokenModel
from tokenlabel.core.targets import TokenTargets, class_targets
from tokenlabel.runtime.errors import ConfigError
from tokenlabel.runtime.runlog import Stopwatch


class TrainStep(nn.Module):
    """Computes the loss of one micro-batch. An `nn.Module`, so that DistributedDataParallel can wrap it.

    `erase`, `mix`: how images are erased and mixed. `supervision`: where the labels come from. `autocast`: the context
    of the forward pass.
    """

    def __init__(
        self,
        model: TokenModel,
        supervision: Supervision,
        *,
        erase: ErasingConfig,
        mix: MixConfig,
        autocast: torch.autocast,
    ) -> None:
        super().__init__()
        self.model, self.supervision, self.autocast = model, supervision, autocast
        self.erase, self.mix = erase, mix
        if not supervision.labels_tokens:
            model.freeze_token_head()

    def forward(self, batch: Batch, part: Part, watch: Stopwatch) -> dict[str, Tensor]:
        """Return the loss, averaged over the micro-batch, and its class and token parts, all of shape []."""
        model, supervision = self.model, self.supervision
        images = normalize_images(batch.images, mean=model.mean, std=model.std)  # [B, 3, height, width]
        grid = model.grid_for((images.shape[2], images.shape[3]))
        with watch.part("targets"):
            # `gone`: the erased pixels, if tokens lose weight by them. `mix`: only the plan, the model applies it.
            images, gone, mix = erase_and_draw(images, grid, part, erase_by=self.erase, mix_by=self.mix)
            targets = make_targets(batch, supervision, grid, mix=mix, gone=gone)
        with self.autocast:
            outputs = model(images, mix)  # mixes by the plan: pixels, or patch embeddings (MixToken)
            loss = student_loss(outputs, targets, supervision)
        return {"loss": loss.total, "class_loss": loss.class_part, "token_loss": loss.token_part}


@dataclass(frozen=True, slots=True)
class Part:
    """One micro-batch of a step; `start` is the index of its first image in the batch of all processes."""

    seed: int
    step: int
    start: int

    def random_seed(self, index: int = 0) -> int:
        """Return the random seed of a group of images, whose first one has the given index in the micro-batch."""
        entropy = np.random.SeedSequence([self.seed, self.step, self.start + index])
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
    erase_by: ErasingConfig,
    mix_by: MixConfig,
) -> tuple[Float[Tensor, "B 3 height width"], Bool[Tensor, "B height width"] | None, MixPlan | None]:
    """Erase boxes of normalised images and draw a mixing plan; return the images, the erased pixels and the plan.

    The erased pixels are None unless `erase_by.ignore_erased`: then they lower the weight of their tokens. The plan is
    None where nothing is mixed. Each group of `mix_by.group_size` images has random numbers of its own, seeded by its
    index in the batch, so the result does not depend on how a batch is divided among micro-batches and processes.
    Raises ConfigError for a micro-batch that does not divide into groups.
    """
    group_size = mix_by.group_size or len(images)
    if len(images) % group_size:
        raise ConfigError(
            f"mix.group_size {group_size} does not divide the {len(images)} images that go through the model at once"
        )
    img_size = (images.shape[2], images.shape[3])
    groups, masks, plans = [], [], []
    for index in range(0, len(images), group_size):
        generator = part.generator(index)
        group = images[index : index + group_size]
        if erase_by.probability > 0:
            group, mask = erase(group, erase_by, generator=generator)
            masks.append(mask)
        groups.append(group)
        plans.append(draw_mix(mix_by, group_size, grid, img_size, generator=generator))
    plan = join_plans(plans, group_size)
    if masks:
        images = groups[0] if len(groups) == 1 else torch.cat(groups)
    gone = torch.cat(masks) if masks and erase_by.ignore_erased else None
    return images, gone, plan and plan.to(images.device)


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
    labels. `softened`: the teacher's for the class logits divided by the temperature; None at temperature 1, where
    `class_token` includes it, and without a teacher of the class token.
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
    gone: Bool[Tensor, "B height width"] | None = None,
) -> Targets:
    """Return the targets of a batch: its labels aligned to the token grid (h, w), smoothed, and mixed by the plan.

    `gone`: pixels that were erased; each token's weight is lowered by its share of them. Class token and tokens may be
    about different classes; each part is smoothed over its own. Images without classes have class targets of weight 0.
    """
    loss = supervision.loss
    maps, views, teacher_probs, teacher_weight = _teacher_labels(batch, supervision)
    tokens = None
    if supervision.labels_tokens:
        assert maps is not None
        tokens = align(maps, views, grid, logits=loss.map_mode)  # [B, N]
        if loss.tokens is TokenChoice.CONFIDENT:
            tokens = tokens.scaled(are_confident(tokens, loss.token_threshold).to(tokens.weight.dtype))
        if gone is not None:
            tokens = tokens.scaled(1 - erased_share(gone, grid))
        tokens = mix_targets(tokens.smoothed(loss.label_smoothing, maps.num_classes), mix, grid)
    class_token = class_targets(batch.class_ids).scaled(batch.has_class[:, None].to(torch.float32))
    soft = None
    if teacher_probs is not None:  # the class token learns from a teacher, alone or beside the ground truth
        probs = most_probable(teacher_probs) if loss.hard else softened(teacher_probs, loss.temperature)
        from_teacher = every_class(probs).scaled(teacher_weight[:, None])
        share = 1.0 if loss.class_target is ClassTarget.TEACHER else loss.teacher_share
        shares = torch.full_like(class_token.weight, share)
        if loss.temperature == 1:
            class_token = class_token.blended(from_teacher, shares)
        else:  # two cross-entropies, of different logits: one target cannot hold both
            class_token, soft = class_token.scaled(1 - shares), from_teacher.scaled(shares)
    class_token, soft = (
        target and mix_targets(target.smoothed(loss.label_smoothing, max(1, batch.num_classes)), mix, (1, 1))
        for target in (class_token, soft)
    )
    assert class_token is not None
    return Targets(class_token, tokens, soft)


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


def _teacher_labels(
    batch: Batch, supervision: Supervision
) -> tuple[ScoreMapBatch | None, Float[Tensor, "B F 2 3"], Float[Tensor, "B C"] | None, Float[Tensor, " B"]]:
    """Return score maps for the tokens with their views, and the teacher's label of each whole image with its weight.

    Tokens are labelled by the store if there is one, whole images by the online teacher if there is one. An image for
    which the teacher predicts nothing gets its ground truth instead; one without a map in the store has weight 0.
    """
    loss, maps, views, teacher_probs = supervision.loss, batch.score_maps, batch.views, None
    weight = batch.class_ids.new_ones(len(batch.class_ids), dtype=torch.float32)
    if supervision.teacher is not None:
        image_probs, location_probs = supervision.teacher.probabilities(batch.images)
        is_labelled = image_probs.amax(dim=1, keepdim=True) > 0
        teacher_probs = torch.where(is_labelled, image_probs, one_hot(batch.class_ids, image_probs))
        weight = (is_labelled[:, 0] | batch.has_class).to(weight.dtype)
        if supervision.labels_tokens and not supervision.stored:
            maps = top_score_maps(location_probs, loss.teacher.topk)
            # The teacher saw the augmented images themselves, so its maps need no crop.
            views = whole_views(len(location_probs), location_probs.device)
    elif loss.class_target is not ClassTarget.TRUTH and maps is not None:
        image_views = views if loss.extent is Extent.CROP else whole_views(len(views), views.device)
        teacher_probs, is_labelled = image_labels(maps, image_views, batch.class_ids, map_mode=loss.map_mode)
        weight = ((is_labelled | batch.has_class) & maps.are_known()).to(weight.dtype)
    return maps, views, teacher_probs if loss.class_target is not ClassTarget.TRUTH else None, weight


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
        sizes=probs.new_tensor([width, height]).expand(num_images, 2),
        regions=probs.new_tensor([0, 0, 1, 1]).expand(num_images, 4),
        empty_is_even=torch.zeros(num_images, dtype=torch.bool, device=probs.device),
        num_classes=num_classes,
        shapes=((height, width),) * num_images,
    )


def are_confident(targets: TokenTargets, threshold: float) -> Bool[Tensor, "B N"]:
    """Return a mask of the tokens whose most probable class has a probability of at least `threshold`."""
    # Floor and excess are multiplied by the weight: comparing with threshold * weight needs no division by it.
    return targets.floor + targets.excess.amax(dim=2).clamp_min(0) >= threshold * targets.weight
