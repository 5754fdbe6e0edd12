"""What every model returns, in training and in evaluation alike."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from jaxtyping import Float
from torch import Tensor, nn


class Inference(StrEnum):
    """How class logits and token logits become one prediction an image.

    CLASS: the class token (or pooled features) alone. TOKENS: the mean of the token logits.
    COMBINED: class logits + 0.5 * max over tokens of the token logits, as the LV-ViT authors publish it.
    """

    CLASS = "class"
    TOKENS = "tokens"
    COMBINED = "combined"


@dataclass(frozen=True, eq=False)
class Outputs:
    """Class logits, token features and the head that turns the features into token logits.

    `tokens` run row by row over `grid` (h, w), top left first. The head is kept apart from its result so that a
    loss can work through it in pieces.
    """

    class_logits: Float[Tensor, "B C"]
    tokens: Float[Tensor, "B N D"]
    token_head: nn.Module
    grid: tuple[int, int]

    @property
    def token_logits(self) -> Float[Tensor, "B N C"]:
        """The logits of every token, computed anew at each access."""
        return self.token_head(self.tokens)

    def logits(self, inference: Inference) -> Float[Tensor, "B C"]:
        """Return one row of logits an image."""
        match inference:
            case Inference.CLASS:
                return self.class_logits
            case Inference.TOKENS:
                return self.token_logits.mean(dim=1)
            case Inference.COMBINED:
                return self.class_logits + 0.5 * self.token_logits.amax(dim=1)
