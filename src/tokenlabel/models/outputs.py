"""What every model returns, in training and in evaluation alike."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import StrEnum

from jaxtyping import Float
from torch import Tensor, nn

from tokenlabel.mixing import MixPlan


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

    `tokens` run row by row over `grid` (h, w), top left first. The head is kept apart from its result so that
    a loss can work through it in pieces.
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


class TokenModel(nn.Module, ABC):
    """A classifier that gives every token its own logits.

    `grid`: the tokens (h, w) of the images that it was made for. `mean` and `std`: what to normalise pixels in
    [0, 1] with, one number a channel (RGB).
    """

    num_classes: int
    grid: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @abstractmethod
    def forward(self, images: Float[Tensor, "B 3 height width"], plan: MixPlan | None = None) -> Outputs:
        """Return the outputs of normalised images, mixed by the plan."""

    @abstractmethod
    def grid_for(self, size_px: tuple[int, int]) -> tuple[int, int]:
        """Return the token grid (h, w) of images of `size_px` (height, width).

        Raises ValueError for a size that the model cannot take.
        """

    @abstractmethod
    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters that weight decay leaves alone, beside biases and norms."""
