"""One training step, from a batch to its losses, in the order in which it runs.

    1  normalise            pixels as the model takes them                          core/batch.py
    2  erase_and_draw       boxes of noise; which image is mixed with which         core/erase.py, mix.py
    3  make_targets         labels aligned to tokens; smoothed, mixed               core/align.py, targets.py
    4  model(images, mix)   class logits, tokens and the head that reads them       core/outputs.py, models/
    5  student_loss         H(class) + beta * mean over tokens of H(token)          core/losses.py

`TrainStep.forward` is these five lines. The engine (training/engine.py) calls it for each part of a batch, adds up
gradients over parts and processes, and lets the optimizer move. A step is a function of the weights, the recipe and its
number: everything random is seeded by (seed, step, index in the batch).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from tokenlabel.core.align import align
from tokenlabel.core.batch import Batch, ScoreMapBatch, normalize_images
from tokenlabel.core.config import (
    ClassTarget,
    ErasingConfig,
    Extent,
    LossConfig,
    MixConfig,
    Mixing,
    TokenChoice,
)
from tokenlabel.core.erase import erase, erased_share
from tokenlabel.core.losses import TokenLabelLoss, sparse_cross_entropy, token_label_loss
from tokenlabel.core.mix import MixPlan, join_plans, mix_targets, sample_mix
from tokenlabel.core.outputs import Outputs, TokenModel
from tokenlabel.core.pooling import every_class, image_labels, most_probable, one_hot, softened, whole_views
from tokenlabel.core.targets import TokenTargets, class_targets
from tokenlabel.runtime.errors import ConfigError
from tokenlabel.runtime.runlog import Stopwatch


class TrainStep(nn.Module):
    """The losses of one part of a batch; a module, since processes and compilers wrap what is called once a step.

    `erase`, `mix`: how images are erased and mixed. `supervision`: who labels what. `autocast`: the context of the
    forward pass.
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
        """Return the loss, a mean over the images of the batch, and its class and token parts, all of shape []."""
        model, supervision = self.model, self.supervision
        images = normalize_images(batch.images, mean=model.mean, std=model.std)  # [B, 3, height, width]
        grid = model.grid_for((images.shape[2], images.shape[3]))
        with watch.part("targets"):
            images, gone, mix = erase_and_draw(images, grid, part, erase_by=self.erase, mix_by=self.mix)
            targets = make_targets(batch, supervision, grid, mix=mix, gone=gone)
        with self.autocast:
            outputs = model(images, mix)  # mixes pixels, or (MixToken) the embeddings of patches
            loss = student_loss(outputs, targets, supervision)
        return {"loss": loss.total, "class_loss": loss.class_part, "token_loss": loss.token_part}


@dataclass(frozen=True, slots=True)
class Part:
    """The images that a process takes through the model at once: those from index `start` on of a step's batch."""

    seed: int
    step: int
    start: int

    def random_seed(self, index: int = 0) -> int:
        """Return the seed of everything random about the images from the given index within the part on."""
        entropy = np.random.SeedSequence([self.seed, self.step, self.start + index])
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
    """Return normalised images after erasing, and how they are to be mixed.

    Between them: which pixels are gone, where tokens are to lose weight by it (`ignore_erased`), else None.
    Each group of `mix_by.group_size` images draws for itself, from a seed of its index in the batch: so nothing depends
    on how a batch is divided among parts and processes. Raises ConfigError for a part that is not made of groups.
    """
    size = mix_by.group_size or len(images)
    if len(images) % size:
        raise ConfigError(
            f"mix.group_size {size} does not divide the {len(images)} images that go through the model at once"
        )
    kept, gone, plans = [], [], []
    for index in range(0, len(images), size):
        generator = part.generator(index)
        group = images[index : index + size]
        if erase_by.probability > 0:
            group, mask = erase(group, erase_by, generator=generator)
            gone.append(mask)
        kept.append(group)
        plans.append(draw_mix(mix_by, size, grid, (images.shape[2], images.shape[3]), generator=generator))
    plan = join_plans(plans, size)
    if gone:
        images = kept[0] if len(kept) == 1 else torch.cat(kept)
    counted = torch.cat(gone) if gone and erase_by.ignore_erased else None
    return images, counted, plan and plan.to(images.device)


def draw_mix(
    config: MixConfig,
    num_images: int,
    grid: tuple[int, int],
    img_size: tuple[int, int],
    *,
    generator: torch.Generator,
) -> MixPlan | None:
    """Draw how images are mixed; None if they are not."""
    if torch.rand((), generator=generator) >= config.probability:
        return None
    kind, alpha = config.kind, config.alpha
    if config.mixup_share > 0 and torch.rand((), generator=generator) < config.mixup_share:
        kind, alpha = Mixing.MIXUP, config.mixup_alpha
    return sample_mix(
        kind,
        num_images,
        grid=grid,
        img_size=img_size,
        alpha=alpha,
        per_sample=config.per_sample,
        generator=generator,
    )


@runtime_checkable
class OnlineTeacher(Protocol):
    """Says of augmented images what they show, as distributions over the classes of the data set, or 0 for all."""

    def probabilities(
        self, images: UInt8[Tensor, "B 3 height width"]
    ) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B h w C"]]:
        """Return those of whole images and of every location of them, in float32 and without gradients."""
        ...


@dataclass(frozen=True, eq=False, kw_only=True)
class Supervision:
    """Who labels the class token and the tokens, and how much each counts.

    `stored`: batches come with score maps of a store. `teacher`: the teacher in the step, which is shown images before
    they are erased and mixed. What is unknown has weight 0 and counts in the means all the same, so that the mean
    over two processes is that over one, and an image weighs as much whether others have a class, or a map, or not.
    Raises ConfigError where targets are asked of a teacher that is not there, and where one would have nothing to say.
    """

    loss: LossConfig
    stored: bool
    teacher: OnlineTeacher | None = None

    def __post_init__(self) -> None:
        loss, asks_of_image = self.loss, self.loss.class_target is not ClassTarget.TRUTH
        if asks_of_image and not self.stored and self.teacher is None:
            raise ConfigError(
                f"loss.class_target {loss.class_target} needs a teacher, and there is none; "
                "give data.labels (with loss.beta above 0) or loss.teacher.name"
            )
        if self.teacher is not None and (self.stored or loss.beta == 0) and not asks_of_image:
            raise ConfigError(
                "loss.teacher would have nothing to say: tokens are labelled by the store or not at all; "
                "leave data.labels out, or let it label the class token by loss.class_target teacher"
            )
        if self.teacher is not None and loss.extent is Extent.IMAGE:
            raise ConfigError(
                "loss.extent image is for stored maps: loss.teacher sees the crop only; leave it at crop"
            )

    @property
    def labels_tokens(self) -> bool:
        """Whether tokens learn from labels of their own."""
        return self.loss.beta > 0 and (self.stored or self.teacher is not None)


@dataclass(frozen=True, eq=False)
class Targets:
    """What a step is trained towards.

    `class_token`, `softened`: one token an image; `softened` is for the class logits divided by the temperature.
    `tokens`: one for each output token, None without token labels.
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
    maps, views, of_image, known = _ask(batch, supervision)
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
    if of_image is not None:  # the class token learns from a teacher, alone or beside the truth
        probs = most_probable(of_image) if loss.hard else softened(of_image, loss.temperature)
        of_teacher = every_class(probs).scaled(known[:, None])
        share = 1.0 if loss.class_target is ClassTarget.TEACHER else loss.teacher_share
        shares = torch.full_like(class_token.weight, share)
        if loss.temperature == 1:
            class_token = class_token.blended(of_teacher, shares)
        else:
            class_token, soft = class_token.scaled(1 - shares), of_teacher.scaled(shares)
    class_token, soft = (
        part and mix_targets(part.smoothed(loss.label_smoothing, max(1, batch.num_classes)), mix, (1, 1))
        for part in (class_token, soft)
    )
    assert class_token is not None
    return Targets(class_token, tokens, soft)


def student_loss(outputs: Outputs, targets: Targets, supervision: Supervision) -> TokenLabelLoss:
    """Return H(class token) + beta * mean over tokens of H(token), and the distillation at a temperature.

    That is temperature**2 * H(softened target, softmax(class logits / temperature)), part of the class
    part: the divergence of Hinton et al. 2015 up to a constant.
    """
    loss = token_label_loss(outputs, targets.class_token, targets.tokens, beta=supervision.loss.beta)
    if targets.softened is None:
        return loss
    temperature = supervision.loss.temperature
    logits = outputs.class_logits.float() / temperature
    soft = temperature**2 * sparse_cross_entropy(logits[:, None], targets.softened).mean()
    return replace(loss, total=loss.total + soft, class_part=loss.class_part + soft.detach())


def _ask(
    batch: Batch, supervision: Supervision
) -> tuple[
    ScoreMapBatch | None,
    Float[Tensor, "B F 2 3"],
    Float[Tensor, "B C"] | None,
    Float[Tensor, " B"],
]:
    """Return the maps that label the tokens, their views, and the teacher's label of each image with its weight.

    The store labels the tokens where there is one; the teacher in the step is asked first for the image. An image of
    which a teacher says nothing keeps its ground truth, one without a map in the store has weight 0.
    """
    loss, maps, views, of_image = supervision.loss, batch.score_maps, batch.views, None
    known = batch.class_ids.new_ones(len(batch.class_ids), dtype=torch.float32)
    if supervision.teacher is not None:
        of_images, of_locations = supervision.teacher.probabilities(batch.images)
        is_labelled = of_images.amax(dim=1, keepdim=True) > 0
        of_image = torch.where(is_labelled, of_images, one_hot(batch.class_ids, of_images))
        known = (is_labelled[:, 0] | batch.has_class).to(known.dtype)
        if supervision.labels_tokens and not supervision.stored:
            maps = top_score_maps(of_locations, loss.teacher.topk)
            views = whole_views(len(of_locations), of_locations.device)
    elif loss.class_target is not ClassTarget.TRUTH and maps is not None:
        seen = views if loss.extent is Extent.CROP else whole_views(len(views), views.device)
        of_image, is_labelled = image_labels(maps, seen, batch.class_ids, map_mode=loss.map_mode)
        known = ((is_labelled | batch.has_class) & maps.are_known()).to(known.dtype)
    return maps, views, of_image if loss.class_target is not ClassTarget.TRUTH else None, known


def top_score_maps(probs: Float[Tensor, "B h w C"], topk: int) -> ScoreMapBatch:
    """Return maps that keep the `topk` classes of each image which are most probable on average over its locations.

    `probs`: a distribution at each location. Every location keeps the same classes; the others share its rest.
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
    """Say of which tokens the largest probability of a class, in their covered part, is at least `threshold`."""
    return targets.floor + targets.excess.amax(dim=2).clamp_min(0) >= threshold * targets.weight
