"""A segmentation recipe: everything that decides what a run does."""

from __future__ import annotations

from dataclasses import dataclass, field

from tokenlabel.core.config import TokenChoice
from tokenlabel.runtime.coercion import COUNT, NATURAL, ONE_OPTION, SHARE, check_numbers, coerced_fields
from tokenlabel.runtime.configuration import ConfigError
from tokenlabel.segmentation.augment import SegmentAugmentConfig
from tokenlabel.segmentation.inference import SegmentEvalConfig
from tokenlabel.segmentation.layouts import SegmentDataConfig
from tokenlabel.segmentation.model import SegmentModelConfig
from tokenlabel.training.recipe import TrainingConfig


@dataclass(frozen=True, kw_only=True)
@coerced_fields
class SegmentLossConfig:
    """What the heads are trained towards: the cross entropy of every pixel, and of every cell of a label map."""

    auxiliary_weight: float = 0.4
    """Weight of the second head's loss."""
    tokens: TokenChoice = TokenChoice.ALL
    """Which cells of label maps count: all; confident: those whose most probable class reaches token_threshold."""
    token_threshold: float = 0.5
    """Least probability of cells that count, see tokens."""
    finer: int | None = None
    """Cells of label maps are learnt on a grid so many times as fine as the head's; by default as fine as the maps are,
    up to 4 times. Memory grows with its square."""
    hard: bool = False
    """The label of a cell is its most probable class alone."""

    def __post_init__(self) -> None:
        check_numbers(self, "loss.", auxiliary_weight=COUNT, token_threshold=SHARE, finer=NATURAL)


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
        of_maps = self.loss.hard or self.loss.finer or self.loss.tokens is not TokenChoice.ALL
        if not self.data.labels and of_maps:
            raise ConfigError(
                "loss.hard, loss.finer and loss.tokens are about label maps, and there are none; give data.labels"
            )
        if self.sharded:
            raise ConfigError(
                "sharded training is for classifiers; segmentation models fit on one GPU: leave sharded out, "
                "and take grad_checkpointing or micro_batch_size if memory is short"
            )
