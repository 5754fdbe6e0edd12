"""What every model returns, in training and in evaluation alike."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from tokenlabel.core.config import Inference
from tokenlabel.core.mix import MixPlan
from tokenlabel.runtime.coercion import Size


@dataclass(frozen=True, eq=False)
class Outputs:
    """Class logits, token features and the head that turns the features into token logits.

    `tokens` run row by row over `grid` (h, w), top left first. The head is kept apart from its result so that
    a loss can work through it in pieces.

    >>> outputs = tl.Outputs(torch.zeros(2, 10), torch.zeros(2, 6, 16), torch.nn.Linear(16, 10), grid=(2, 3))
    >>> outputs.token_logits.shape
    torch.Size([2, 6, 10])
    """

    class_logits: Float[Tensor, "B C"]
    tokens: Float[Tensor, "B N D"]
    token_head: nn.Module
    grid: tuple[int, int]

    def __post_init__(self) -> None:
        if self.tokens.shape[1] != self.grid[0] * self.grid[1]:
            raise ValueError(f"{self.tokens.shape[1]} tokens do not fill a grid of {self.grid} (h, w)")

    @property
    def token_logits(self) -> Float[Tensor, "B N C"]:
        """The logits of every token, computed anew at each access, by a head that takes [B, N, D]."""
        return self.token_head(self.tokens)

    def logits(self, inference: Inference | str) -> Float[Tensor, "B C"]:
        """Return one row of logits an image. Raises ValueError for tokens that are about other classes."""
        inference = Inference(inference)
        if inference is Inference.CLASS:
            return self.class_logits
        of_tokens = self.token_logits  # [B, N, C]
        if of_tokens.shape[2] != self.class_logits.shape[1]:
            raise ValueError(
                f"tokens are about {of_tokens.shape[2]:,} classes, the class token about "
                f"{self.class_logits.shape[1]:,}; predict by the class token alone"
            )
        if inference is Inference.TOKENS:
            return of_tokens.mean(dim=1)
        return self.class_logits + 0.5 * of_tokens.amax(dim=1)  # the authors' constant, whatever loss.beta was


class TokenModel(nn.Module, ABC):
    """A network that gives every token its own logits, over `num_token_classes`, perhaps others than `num_classes`.

    With `num_classes` 0 it has no class head, and its class logits are [B, 0].

    `grid`: the tokens (h, w) of the images that it was made for. `mean` and `std`: what to normalise pixels in
    [0, 1] with, one number a channel (RGB).
    """

    num_classes: int
    num_token_classes: int
    grid: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    token_head: nn.Module
    """Turns the features of tokens into logits."""

    @abstractmethod
    def forward(self, images: Float[Tensor, "B 3 height width"], plan: MixPlan | None = None) -> Outputs:
        """Return the outputs of normalised images, mixed by the plan."""

    @abstractmethod
    def grid_for(self, img_size: Size) -> tuple[int, int]:
        """Return the token grid (h, w) of images of `img_size` (height, width).

        Raises ValueError for a size that the model cannot take.
        """

    @abstractmethod
    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters that weight decay leaves alone, beside biases and norms."""

    @abstractmethod
    def layers(self) -> dict[str, int]:
        """Return the layer of each parameter by its name: 0 for the stem, the highest for the heads."""

    @abstractmethod
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep no activations inside blocks, compute them again in the backward pass, with the same random numbers.

        Raises ValueError where the network cannot.
        """

    @abstractmethod
    def intermediates(
        self, images: Float[Tensor, "B 3 height width"], layers: Sequence[int]
    ) -> list[Float[Tensor, "B h w D"]]:
        """Return the features after some layers as maps, for dense tasks.

        `layers`: which, counted from 0, in ascending order: blocks of LV-ViT and T2T-ViT, what `forward_intermediates`
        counts in timm's (blocks of a ViT, stages of a CNN, whose maps differ in size and width). The class token and
        other prefix tokens are left out, the last norm is not applied. Images of other sizes than the model's own are
        taken wherever `forward` takes them, position embeddings resized bicubically.
        Raises ValueError for layers that the network does not have.
        """

    def fsdp_blocks(self) -> list[nn.Module]:
        """Return the blocks that the network repeats, in order, none inside another: what sharded training wraps.

        They are found by structure: the smallest members of a ModuleList or Sequential that hold more than one layer
        with parameters. Stem, norms between stages and heads are not among them; a network without such lists
        returns an empty one.
        """
        return _fsdp_blocks(self)

    def freeze_token_head(self) -> None:
        """Stop the head of the tokens from training: for runs that label no token."""
        self.token_head.requires_grad_(False)

    def freeze(self, num_layers: int) -> None:
        """Stop the first layers from training: no gradients, no new statistics, no drop path, from now on.

        Raises ValueError for a number that would freeze the heads, too, and, for any but 0, in networks that do not say
        which layers they have.
        """
        if num_layers == 0:
            return
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
            if module is not self
            and any(True for _ in module.parameters())
            and not any(p.requires_grad for p in module.parameters())
        ]
        self.train(self.training)

    def train(self, mode: bool = True) -> TokenModel:
        """Set training or evaluation mode, as PyTorch does, but leave what is frozen in evaluation mode."""
        super().train(mode)
        for module in getattr(self, "_frozen", ()):
            module.eval()
        return self


def check_ascending(layers: Sequence[int], *, name: str) -> None:
    """Raise ValueError unless the layers are at least one number from 0 up, each larger than the one before."""
    if not layers or layers[0] < 0 or list(layers) != sorted(set(layers)):
        raise ValueError(f"layers of {name} are counted from 0 and named in ascending order, got {list(layers)}")


def _fsdp_blocks(module: nn.Module) -> list[nn.Module]:
    containers = (nn.Sequential, nn.ModuleList)
    found: list[nn.Module] = []
    for child in module.children():
        inner = _fsdp_blocks(child)
        is_part = isinstance(module, containers) and not isinstance(child, containers)
        found += inner or ([child] if is_part and _num_layers(child) > 1 else [])
    return found


def _num_layers(module: nn.Module) -> int:
    """Return how many modules inside hold parameters of their own."""
    return sum(any(True for _ in part.parameters(recurse=False)) for part in module.modules())
