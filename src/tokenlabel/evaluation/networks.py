"""Networks to evaluate: a run, one of its checkpoints, or a model by its name, with how it looks at images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokenlabel.core.config import Inference
from tokenlabel.data.classes import ClassList
from tokenlabel.data.config import Interpolation
from tokenlabel.evaluation.pretrained import load_pretrained
from tokenlabel.models import Outputs, TokenModel, create_model
from tokenlabel.models.weights import resize_all_positions
from tokenlabel.training.checkpoint import is_run, load_model, options_without_weights
from tokenlabel.training.recipe import Recipe


class NetworkError(ValueError):
    """A network that cannot do what is asked of it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Network:
    """A network with what its evaluation needs. `img_size`: (height, width) of the images that it is given.

    `class_names`: empty if nobody knows them; `names_assumed`: they are ImageNet's, by their number alone. `heads`:
    the ways to predict that were trained, the usual one first. `recipe`, `step`: of the run that it comes from.
    `tokens_trained`: whether its head for tokens was. `token_classes`: what the tokens are about, if not these.
    """

    name: str
    model: TokenModel | PlainClassifier
    num_classes: int
    class_names: tuple[str, ...]
    img_size: tuple[int, int]
    crop_fraction: float
    interpolation: Interpolation
    heads: tuple[Inference, ...]
    names_assumed: bool = False
    recipe: Recipe | None = None
    step: int | None = None
    token_classes: ClassList | None = None
    tokens_trained: bool = False

    def chosen_heads(self, wanted: str | None) -> tuple[Inference, ...]:
        """Return the ways to predict that `wanted` means: one by name, `all`, or the usual one.

        Raises NetworkError for a head that was never trained.
        """
        if wanted is None:
            return self.heads[:1]
        if wanted == "all":
            return tuple(head for head in Inference if head in self.heads)
        wanted = Inference(wanted)
        if wanted not in self.heads and self.token_classes is not None:
            raise NetworkError(
                f"{self.name}: its tokens are about {self.token_classes}, not its {self.num_classes:,} classes; "
                "evaluate it with --inference class"
            )
        if wanted not in self.heads:
            raise NetworkError(
                f"{self.name} was trained without token labels, so its token head says nothing; "
                "evaluate it with --inference class"
            )
        return (wanted,)


class PlainClassifier(nn.Module):
    """Any timm classifier, asked for its own logits alone; the one token that it has repeats them."""

    def __init__(self, backbone: nn.Module, *, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.backbone, self.mean, self.std = backbone, tuple(mean), tuple(std)

    def forward(self, images: Float[Tensor, "B 3 height width"]) -> Outputs:
        """Return the network's logits of normalised images."""
        logits = self.backbone(images)
        return Outputs(logits, logits[:, None], nn.Identity(), (1, 1))


def find_network(name: str, *, weights: str | None = None, size: int | None = None) -> Network:
    """Return a network by the path of a run or checkpoint, or by the name of a model, in evaluation mode.

    `weights`: a checkpoint file for a model's name; timm's pretrained weights if None. `size`: of the square images
    that it shall see, in px; its own by default (timm's models: the size that timm validates at). Raises
    PretrainedError for a name that means nothing and weights that cannot be loaded, NetworkError for weights beside
    a run's own.
    """
    path = Path(name)
    if is_run(path):
        if weights is not None:
            raise NetworkError(f"{name} is a run and has weights of its own; leave --weights out")
        return _from_run(path, size)
    return _from_name(name, weights, size)


def _from_run(path: Path, size: int | None) -> Network:
    trained = load_model(path)
    recipe, model = trained.recipe, trained.model
    img_size = (size, size) if size else recipe.model.img_size
    if img_size != recipe.model.img_size:
        tensors = model.state_dict()
        other = create_model(
            recipe.model.name,
            num_classes=model.num_classes,
            num_token_classes=model.num_token_classes,
            img_size=img_size,
            **options_without_weights(recipe.model.options),
        )
        resize_all_positions(tensors, other, grid=model.grid, name=str(path))
        other.load_state_dict(tensors)
        model = other
    usual = recipe.eval.inference
    predicts = recipe.uses_token_labels and trained.token_classes is None
    heads = dict.fromkeys([usual, *Inference] if predicts else [Inference.CLASS])
    return Network(
        name=str(path),
        model=model.eval(),
        num_classes=model.num_classes,
        class_names=tuple(trained.class_names),
        img_size=img_size,
        crop_fraction=recipe.eval.crop_fraction,
        interpolation=Interpolation.BICUBIC,
        heads=tuple(heads),
        recipe=recipe,
        step=trained.step,
        token_classes=trained.token_classes,
        tokens_trained=recipe.uses_token_labels,
    )


def _from_name(name: str, weights: str | None, size: int | None) -> Network:
    found = load_pretrained(name, weights=weights, size=size, at_test_size=True)
    model = found.model
    heads = [Inference.CLASS]
    if not isinstance(model, TokenModel):
        model = PlainClassifier(model, mean=found.mean, std=found.std)
    elif found.has_token_head:
        heads = [Inference.COMBINED, Inference.CLASS, Inference.TOKENS]
    return Network(
        name=name,
        model=model.eval(),
        num_classes=found.num_classes,
        class_names=found.class_names,
        names_assumed=found.names_assumed,
        img_size=(size, size) if size else found.img_size,
        crop_fraction=found.crop_fraction,
        interpolation=found.interpolation,
        heads=tuple(heads),
        tokens_trained=Inference.TOKENS in heads,
    )


def move(network: Network, device: torch.device) -> None:
    """Move a network's model to a device, channels last in memory, with nothing to train."""
    model: nn.Module = network.model.to(device).requires_grad_(False)
    model.to(memory_format=torch.channels_last)
