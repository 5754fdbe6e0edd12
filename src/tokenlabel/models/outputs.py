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

    @abstractmethod
    def layers(self) -> dict[str, int]:
        """Return the layer of each parameter by its name: 0 for the stem, the highest for the heads."""

    def freeze(self, num_layers: int) -> None:
        """Stop the first layers from training: no gradients, no new statistics, no drop path, from now on.

        Raises ValueError for a number that would freeze the heads, too.
        """
        layers = self.layers()
        if not 0 <= num_layers <= max(layers.values()):
            raise ValueError(
                f"cannot freeze {num_layers} layers: the model has {max(layers.values())} below its heads; "
                "choose a number from 0 to that"
            )
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and layers[name] >= num_layers)
        self._frozen = [
            module
            for module in self.modules()
            if any(True for _ in module.parameters())
            and not any(p.requires_grad for p in module.parameters())
        ]
        self.train(self.training)

    def train(self, mode: bool = True) -> TokenModel:
        """Set training or evaluation mode, as PyTorch does, but leave what is frozen in evaluation mode."""
        super().train(mode)
        for module in getattr(self, "_frozen", ()):
            module.eval()
        return self
