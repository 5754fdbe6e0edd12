"""Networks with logits, or vectors, for every location of an image.

The dense map of a network is its own head, whatever layers it has, applied at every position of its last features: the
output for an image that shows the features of this position everywhere. These are logits of a classifier, or vectors
of a backbone, to which a head from a file is applied (heads.py). Networks with a head for their tokens (LV-ViT, VOLO)
use that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tokenlabel.models import TokenModel
from tokenlabel.models.features import (
    REFUSALS,
    FeatureLayout,
    Features,
    classifier_features,
    one_position_each,
    run_blank,
)
from tokenlabel.runtime.errors import ModelError, first_line
from tokenlabel.teachers.heads import Head

# At most so many logits of a head are computed at once, 128 MiB of float32; 64 images and 65,536 words have 4 GB.
MAX_LOGITS = 1 << 25

TopClasses = tuple[Int[Tensor, "B h w K"], Float[Tensor, "B h w K"]]
"""The ids and the probabilities of the K most probable classes of each location, the most probable first."""


@dataclass(frozen=True, eq=False)
class DenseLogits:
    """The logits, or vectors, of whole images [B, C] and of all their locations [B, h, w, C]."""

    image: Float[Tensor, "B C"]
    locations: Float[Tensor, "B h w C"]


class DenseNetwork(nn.Module, ABC):
    """A network with logits for the image and for every location. `answers_with`: the head that gives the latter."""

    num_classes: int
    answers_with: Literal["classifier", "tokens", "head"]

    @abstractmethod
    def forward(self, images: Float[Tensor, "B 3 height width"]) -> DenseLogits:
        """Return the logits of normalised images."""

    @abstractmethod
    def grid_for(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Return rows and columns of the locations of images of (height, width); ValueError if it cannot take them."""

    def averages_linearly(self, images: Float[Tensor, "B 3 height width"]) -> bool:
        """Return True if `evidence` of whole images must be the mean of that of their locations."""
        return False

    def evidence(self, images: Float[Tensor, "B 3 height width"]) -> DenseLogits:
        """Return the network's own outputs: its logits, or the vectors that are the input of a head."""
        return self(images)

    def top(self, images: Float[Tensor, "B 3 height width"], k: int) -> TopClasses:
        """Return the k most probable classes of every location and their probabilities, the most probable first."""
        top = self(images).locations.float().softmax(dim=3).topk(k, dim=3)
        return top.indices, top.values


class TokenNetwork(DenseNetwork):
    """A network with a head for its tokens, which gives the logits of the locations.

    `has_one_list`: whether its class token has the same classes; if not, the image has the mean logits of the tokens.
    """

    answers_with = "tokens"

    def __init__(self, model: TokenModel, *, has_one_list: bool = True) -> None:
        super().__init__()
        self.model, self.has_one_list = model, has_one_list
        self.num_classes = model.num_token_classes

    def forward(self, images: Float[Tensor, "B 3 height width"]) -> DenseLogits:
        """Return the logits of normalised images."""
        outputs = self.model(images)
        of_tokens = outputs.token_logits
        of_image = outputs.class_logits if self.has_one_list else of_tokens.mean(dim=1)
        return DenseLogits(of_image, of_tokens.unflatten(1, outputs.grid))

    def grid_for(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Return rows and columns of the tokens of images of (height, width)."""
        return self.model.grid_for(img_size)


class HeadNetwork(DenseNetwork):
    """A backbone with a head from a file, which is applied to the vectors of all locations."""

    answers_with = "head"

    def __init__(self, backbone: ClassifierNetwork, head: Head) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head
        self.num_classes = head.num_classes

    def forward(self, images: Float[Tensor, "B 3 height width"]) -> DenseLogits:
        """Return the logits of normalised images."""
        vectors = self.backbone(images)
        return DenseLogits(self.head(vectors.image), self.head(vectors.locations))

    def evidence(self, images: Float[Tensor, "B 3 height width"]) -> DenseLogits:
        """Return the vectors of images and locations."""
        return self.backbone(images)

    def top(self, images: Float[Tensor, "B 3 height width"], k: int) -> TopClasses:
        """Return the k most probable classes of every location, by blocks of locations: see MAX_LOGITS."""
        vectors = self.backbone(images).locations
        blocks = vectors.flatten(0, 2).split(max(1, MAX_LOGITS // self.num_classes))
        class_ids, probs = zip(*(self.head.top(block, k) for block in blocks), strict=True)
        grid = vectors.shape[:3]
        return torch.cat(class_ids).unflatten(0, grid), torch.cat(probs).unflatten(0, grid)

    def grid_for(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Return rows and columns of the backbone's locations of images of (height, width)."""
        return self.backbone.grid_for(img_size)

    def averages_linearly(self, images: Float[Tensor, "B 3 height width"]) -> bool:
        """Return True if the vector of an image must be the mean of the vectors of its locations."""
        return self.backbone.averages_linearly(images)


class ClassifierNetwork(DenseNetwork):
    """A timm network whose head is applied at every position.

    `num_classes`: the size of the head's output. Of a network without classifier it is the dimension of its vectors,
    known after the first `grid_for`. `name`: for error messages. Raises ModelError if the head cannot be applied so.
    """

    answers_with = "classifier"

    def __init__(self, backbone: nn.Module, *, name: str) -> None:
        super().__init__()
        self.backbone: Any = backbone
        self.name = name
        self.num_classes = self.backbone.num_classes
        self._features_of: dict[tuple[int, int], Features] = {}

    def forward(self, images: Float[Tensor, "B 3 height width"]) -> DenseLogits:
        """Return the logits of normalised images."""
        seen = self.backbone.forward_features(images)
        features = self._laid_out(seen, (images.shape[2], images.shape[3]))
        logits = self.backbone.forward_head(one_position_each(seen, features))  # [B * h * w, C]
        return DenseLogits(self.backbone.forward_head(seen), logits.view(len(images), *features.grid, -1))

    def grid_for(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Return rows and columns of the features of images of (height, width), measured at the first call."""
        return self._features(img_size).grid

    def averages_linearly(self, images: Float[Tensor, "B 3 height width"]) -> bool:
        """Return True if the head is linear in the features and ignores prefix tokens, by a test on the images."""
        num_prefix = self._features((images.shape[2], images.shape[3])).num_prefix
        head, seen = self.backbone.forward_head, self.backbone.forward_features(images)
        # A linear map takes the mean of two inputs to the mean of their outputs; any second input will do.
        other = 1 - 2 * seen.flip(1)
        if num_prefix:
            of_other_prefix = torch.cat([other[:, :num_prefix], seen[:, num_prefix:]], dim=1)
            if not torch.allclose(head(of_other_prefix), head(seen)):
                return False
        return torch.allclose(head((seen + other) / 2), (head(seen) + head(other)) / 2, rtol=1e-3, atol=1e-4)

    def _features(self, img_size: tuple[int, int]) -> Features:
        if img_size not in self._features_of:
            self._features_of[img_size] = self._measure(img_size)
        return self._features_of[img_size]

    def _laid_out(self, seen: Any, img_size: tuple[int, int]) -> Features:
        """Return the layout of the features in the head's input, for images of a size.

        For a new size it is derived from that of another size: photographs have so many shapes that running a blank
        image for each would double the work.
        """
        if img_size not in self._features_of and self._features_of and isinstance(seen, Tensor):
            (height_px, width_px), known = next(iter(self._features_of.items()))
            grid = (img_size[0] * known.grid[0] // height_px, img_size[1] * known.grid[1] // width_px)
            if known.layout is FeatureLayout.MAP:
                grid = (seen.shape[-2], seen.shape[-1])
            elif known.layout is FeatureLayout.CHANNELS_LAST_MAP:
                grid = (seen.shape[1], seen.shape[2])
            found = classifier_features(seen, grid)
            if found is not None and (found.layout, found.num_prefix) == (known.layout, known.num_prefix):
                self._features_of[img_size] = found
        return self._features(img_size)

    @torch.no_grad()
    def _measure(self, img_size: tuple[int, int]) -> Features:
        """Run a blank image of this size to find the layout of its features, and check the head at each position."""
        if not hasattr(self.backbone, "forward_intermediates"):
            raise ModelError(f"{self.name} has no dense map: it lacks timm's forward_intermediates")
        seen, last = run_blank(self.backbone, img_size, stage=-1, name=self.name)
        grid = (last.shape[2], last.shape[3])
        features = classifier_features(seen, grid)
        if features is None:
            raise ModelError(
                f"{self.name} has no dense map: its head is given {_shapes(seen)}, not one vector for each of "
                f"{grid[0]} x {grid[1]} positions"
            )
        try:
            logits = self.backbone.forward_head(one_position_each(seen, features))
        except REFUSALS as error:
            raise ModelError(
                f"{self.name} has no dense map: its head does not work at one position ({first_line(error)})"
            ) from error
        if self.num_classes == 0 and logits.ndim == 2:
            self.num_classes = logits.shape[1]
        if logits.shape != (grid[0] * grid[1], self.num_classes):
            raise ModelError(
                f"{self.name} has no dense map: its head gives {tuple(logits.shape)} for {grid[0] * grid[1]} positions "
                f"and {self.num_classes} classes"
            )
        return features


def _shapes(seen: Any) -> str:
    if isinstance(seen, Tensor):
        return f"{' x '.join(map(str, seen.shape[1:]))} numbers an image"
    return "the features of several branches"
