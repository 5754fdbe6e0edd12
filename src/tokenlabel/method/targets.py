"""What tokens are trained to say: soft labels over all classes, stored sparsely.

The probability of class c at token n is

    target[n, c] = floor[n] + sum over u with classes[u] == c of excess[n, u]

so a target costs U numbers a token, not C. Everything that training does to targets (interpolation,
coverage, label smoothing, mixing) is linear in (excess, floor, weight); excess and floor are kept already
multiplied by the weight. The class token's target has the same form, with one token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TokenTargets:
    """Sparse soft labels of a batch: B images, N tokens, U palette entries.

    `classes`: class ids. Padding names any class with excess 0; a class named twice adds up.
    `excess`, `floor`: see the module's head; both already multiplied by `weight`.
    `weight`: how much of a token is labelled, in [0, 1]; a token of weight 0 carries no loss.
    """

    classes: Int[Tensor, "B U"]
    excess: Float[Tensor, "B N U"]
    floor: Float[Tensor, "B N"]
    weight: Float[Tensor, "B N"]

    def smoothed(self, epsilon: float, num_classes: int) -> TokenTargets:
        """Return (1 - epsilon) * target + epsilon / C: label smoothing that keeps the sum at 1."""
        return TokenTargets(
            classes=self.classes,
            excess=self.excess * (1 - epsilon),
            floor=self.floor * (1 - epsilon) + self.weight * (epsilon / num_classes),
            weight=self.weight,
        )

    def blended(self, other: TokenTargets, share: Float[Tensor, "B N"]) -> TokenTargets:
        """Return (1 - share) * self + share * other, token by token."""
        ours, num_ours = 1 - share, self.classes.shape[1]
        classes = torch.cat([self.classes, other.classes], dim=1)
        excess = self.excess.new_empty(
            *share.shape, classes.shape[1]
        )  # written once, not joined from products
        torch.mul(self.excess, ours[..., None], out=excess[..., :num_ours])
        torch.mul(other.excess, share[..., None], out=excess[..., num_ours:])
        return TokenTargets(
            classes=classes,
            excess=excess,
            floor=self.floor * ours + other.floor * share,
            weight=self.weight * ours + other.weight * share,
        )

    def scaled(self, share: Float[Tensor, "B N"]) -> TokenTargets:
        """Return the targets with each token's weight multiplied by a share in [0, 1]."""
        return TokenTargets(
            classes=self.classes,
            excess=self.excess * share[..., None],
            floor=self.floor * share,
            weight=self.weight * share,
        )

    def of_images(self, indices: Int[Tensor, " B"]) -> TokenTargets:
        """Return the targets of other images of the batch."""
        return TokenTargets(
            classes=self.classes[indices],
            excess=self.excess[indices],
            floor=self.floor[indices],
            weight=self.weight[indices],
        )

    def dense(self, num_classes: int) -> Float[Tensor, "B N C"]:
        """Return the targets (times weight) of all classes. In training for one token an image at the most."""
        full = self.floor[..., None].repeat(1, 1, num_classes)  # [B, N, C]
        return full.scatter_add(2, self.classes[:, None, :].expand_as(self.excess), self.excess)


def class_targets(class_ids: Int[Tensor, " B"]) -> TokenTargets:
    """Return the ground truth as the target of one token an image: probability 1 for the image's class."""
    ones = torch.ones(len(class_ids), 1, device=class_ids.device)
    return TokenTargets(
        classes=class_ids[:, None],  # [B, 1]
        excess=ones[..., None],  # [B, 1, 1]
        floor=torch.zeros_like(ones),
        weight=ones,
    )
