"""A segmentation recipe: everything that decides what a run does."""

from __future__ import annotations

from dataclasses import dataclass, field

from tokenlabel.runtime.coercion import COUNT, check_numbers, coerced_fields
from tokenlabel.runtime.configuration import ConfigError
from tokenlabel.segmentation.augment import SegmentAugmentConfig
from tokenlabel.segmentation.inference import SegmentEvalConfig
from tokenlabel.segmentation.model import SegmentModelConfig
from tokenlabel.segmentation.pairs import SegmentDataConfig
from tokenlabel.training.recipe import TrainingConfig


@dataclass(frozen=True, kw_only=True)
@coerced_fields
class SegmentLossConfig:
    """What the heads are trained towards: the cross entropy of every pixel."""

    auxiliary_weight: float = 0.4
    """Weight of the second head's loss."""

    def __post_init__(self) -> None:
        check_numbers(self, "loss.", auxiliary_weight=COUNT)


@dataclass(frozen=True, kw_only=True)
class SegmentRecipe(TrainingConfig):
    """A training run of a segmentation model."""

    data: SegmentDataConfig
    model: SegmentModelConfig
    augment: SegmentAugmentConfig = field(default_factory=SegmentAugmentConfig)
    loss: SegmentLossConfig = field(default_factory=SegmentLossConfig)
    eval: SegmentEvalConfig = field(default_factory=SegmentEvalConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sharded:
            raise ConfigError(
                "sharded training is for classifiers; segmentation models fit on one GPU: leave sharded out, "
                "and take grad_checkpointing or micro_batch_size if memory is short"
            )
