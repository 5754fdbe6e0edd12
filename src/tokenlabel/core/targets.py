"""Soft labels of tokens over all classes, stored sparsely.

The probability of class c at token n is

    target[n, c] = floor[n] + sum over u with classes[u] == c of excess[n, u]

The floor is the probability of each class outside of the image's palette; the excess is how far a class of the palette
is above it (or below). So a target takes U numbers a token, not C. Everything that training does to targets
(interpolation, coverage, label smoothing, mixing) is linear in (excess, floor, weight). Excess and floor are stored
multiplied by the weight, so that a weight of 0 needs no special case. The class target has the same form, with one
token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from tokenlabel.runtime.coercion import SHARE, check_number

# Probabilities computed in half precision sum to 1 within this.
_SUM_TOLERANCE = 0.01


@dataclass(frozen=True, eq=False)
class TokenTargets:
    """Sparse soft labels of a batch: B images, N tokens, U palette entries.

    `classes`: class ids. Padding entries have excess 0. A class may occur twice: its excesses add.
    `excess`, `floor`: see the module's head; both already multiplied by `weight`.
    `weight`: how much of a token is labelled, in [0, 1]; a token of weight 0 carries no loss.
    `num_classes`, `grid`: the number of classes C, and the tokens (h, w), where they are known: the loss compares them
    with those of the logits.

    >>> tl.class_targets([2, 0], num_classes=3).smoothed(0.3).dense()[:, 0]
    tensor([[0.1000, 0.1000, 0.8000],
            [0.8000, 0.1000, 0.1000]])
    """

    classes: Int[Tensor, "B U"]
    excess: Float[Tensor, "B N U"]
    floor: Float[Tensor, "B N"]
    weight: Float[Tensor, "B N"]
    num_classes: int | None = None
    grid: tuple[int, int] | None = None

    def smoothed(self, epsilon: float, num_classes: int | None = None) -> TokenTargets:
        """Return (1 - epsilon) * target + epsilon / C: label smoothing that keeps the sum at 1.

        Raises ValueError for an epsilon outside of [0, 1], and for another number of classes than that of the targets.
        """
        check_number(epsilon, SHARE, name="epsilon")
        even = self.weight * (epsilon / self._count(num_classes))
        return replace(self, excess=self.excess * (1 - epsilon), floor=self.floor * (1 - epsilon) + even)

    def blended(self, other: TokenTargets, share: Float[Tensor, "B N"]) -> TokenTargets:
        """Return (1 - share) * self + share * other, token by token.

        Raises ValueError for shares and targets of other tokens, and for targets over another number of classes.
        """
        if not share.shape == self.weight.shape == other.weight.shape:
            raise ValueError(
                f"shares of {tuple(share.shape)} (images, tokens) for targets of {tuple(self.weight.shape)} and "
                f"{tuple(other.weight.shape)}; mix on the grid of the targets"
            )
        counts = {count for count in (self.num_classes, other.num_classes) if count is not None}
        if len(counts) > 1:
            raise ValueError(f"targets over {' and '.join(map(str, sorted(counts)))} classes cannot be blended")
        ours, num_ours = 1 - share, self.classes.shape[1]
        classes = torch.cat([self.classes, other.classes], dim=1)
        # Products are written where they end up; torch.cat of two products would copy both.
        excess = self.excess.new_empty(*share.shape, classes.shape[1])
        torch.mul(self.excess, ours[..., None], out=excess[..., :num_ours])
        torch.mul(other.excess, share[..., None], out=excess[..., num_ours:])
        return TokenTargets(
            classes=classes,
            excess=excess,
            floor=self.floor * ours + other.floor * share,
            weight=self.weight * ours + other.weight * share,
            num_classes=next(iter(counts), None),
            grid=self.grid,
        )

    def scaled(self, share: Float[Tensor, "B N"]) -> TokenTargets:
        """Return the targets with each token's weight multiplied by a share in [0, 1]."""
        return replace(
            self, excess=self.excess * share[..., None], floor=self.floor * share, weight=self.weight * share
        )

    def hardened(self) -> TokenTargets:
        """Return the targets with each token's whole weight on its most probable class; 0 where none is.

        For targets that name no class twice: before they are blended or mixed.
        """
        highest = self.excess.max(dim=2, keepdim=True)
        weight = self.weight * (highest.values[..., 0] > 0)
        excess = torch.zeros_like(self.excess).scatter_(2, highest.indices, weight[..., None])
        return replace(self, excess=excess, floor=torch.zeros_like(self.floor), weight=weight)

    def of_images(self, indices: Int[Tensor, " B"]) -> TokenTargets:
        """Return the targets of other images of the batch."""
        names = ("classes", "excess", "floor", "weight")
        return replace(self, **{name: getattr(self, name)[indices] for name in names})

    def dense(self, num_classes: int | None = None) -> Float[Tensor, "B N C"]:
        """Return the targets (times weight) of all classes. Training needs this for one token an image at most.

        Raises ValueError for another number of classes than that of the targets, and, on the CPU, for class ids beyond
        it.
        """
        count = self._count(num_classes)
        check_class_ids(self.classes, count)
        full = self.floor[..., None].repeat(1, 1, count)  # [B, N, C]
        return full.scatter_add(2, self.classes[:, None, :].expand_as(self.excess), self.excess)

    def _count(self, num_classes: int | None) -> int:
        counts = {count for count in (self.num_classes, num_classes) if count is not None}
        if not counts:
            raise ValueError("these targets do not know how many classes there are; give num_classes")
        if len(counts) > 1:
            raise ValueError(f"targets over {self.num_classes:,} classes, got num_classes {num_classes:,}")
        return counts.pop()


def check_class_ids(ids: Integer[Tensor, "*dims"], num_classes: int | None) -> None:
    """Raise ValueError for ids outside of the classes, on the CPU only: on a GPU the check would wait for the device.

    Nor in compiled code: a value that decides what is computed would break its graph.
    """
    if not ids.is_cpu or not ids.numel() or torch.compiler.is_compiling():
        return
    low, high = ids.aminmax()
    if low < 0 or (num_classes is not None and high >= num_classes):
        end = "" if num_classes is None else f" to {num_classes - 1}"
        raise ValueError(f"class ids run from {int(low)} to {int(high)}, expected them from 0{end}")


def class_targets(
    labels: Integer[Tensor, " B"] | Float[Tensor, "B C"] | Sequence[int], *, num_classes: int | None = None
) -> TokenTargets:
    """Return ground truth as the target of one token an image.

    `labels`: class ids, or probabilities of all classes (mixed or soft labels), as `F.cross_entropy` takes them.
    Raises ValueError for tensors that are neither. Values are checked on the CPU only: on a GPU the check would wait
    for the device.

    >>> tl.class_targets([2, 0]).dense(3)[:, 0]
    tensor([[0., 0., 1.],
            [1., 0., 0.]])
    """
    if labels is None or isinstance(labels, str):
        raise ValueError(f"class targets are whole class ids [B] or probabilities [B, C], got {labels!r}")
    labels = torch.as_tensor(labels)
    is_ids = labels.ndim == 1 and not (labels.is_floating_point() or labels.dtype == torch.bool)
    if not is_ids and not (labels.ndim == 2 and labels.is_floating_point()):
        raise ValueError(
            "class targets are whole class ids [B] or probabilities [B, C], "
            f"got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    if is_ids:
        check_class_ids(labels, num_classes)
        ones = torch.ones(len(labels), 1, device=labels.device)
        return TokenTargets(
            classes=labels.long()[:, None],  # [B, 1]
            excess=ones[..., None],  # [B, 1, 1]
            floor=torch.zeros_like(ones),
            weight=ones,
            num_classes=num_classes,
        )
    if num_classes not in (None, labels.shape[1]):
        raise ValueError(f"probabilities of {labels.shape[1]} classes for a model of {num_classes}")
    labels = labels.to(torch.promote_types(labels.dtype, torch.float32))
    weight = labels.sum(dim=1, keepdim=True)  # [B, 1]
    if labels.is_cpu and not ((labels >= 0).all() and ((weight - 1).abs() <= _SUM_TOLERANCE).all()):
        raise ValueError(
            "class probabilities must be at least 0 and sum to 1 an image (apply softmax to logits); got a smallest of "
            f"{float(labels.min()):.3g} and sums from {float(weight.min()):.3g} to {float(weight.max()):.3g}"
        )
    classes = torch.arange(labels.shape[1], device=labels.device).expand(len(labels), -1)
    floor = torch.zeros_like(weight)
    return TokenTargets(classes, excess=labels[:, None], floor=floor, weight=weight, num_classes=labels.shape[1])
