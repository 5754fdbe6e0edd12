"""The token labeling objective, exact and without a B x N x C target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from tokenlabel.blocks import blocks
from tokenlabel.models.outputs import Outputs
from tokenlabel.targets import TokenTargets


@dataclass(frozen=True, eq=False)
class TokenLabelLoss:
    """The loss and its parts; `total` is what to call backward() on."""

    total: Float[Tensor, ""]
    class_part: Float[Tensor, ""]
    token_part: Float[Tensor, ""]


def token_label_loss(
    outputs: Outputs, class_targets: TokenTargets, token_targets: TokenTargets | None, *, beta: float = 0.5
) -> TokenLabelLoss:
    """Return H(class token) + beta * mean over tokens of H(token), the token labeling objective.

    `class_targets` has one token an image, `token_targets` one for each output token (None: no token labels,
    the token part is 0). Tokens of weight 0 carry no loss but count in the mean, so that the mean over two
    ranks is the mean over both batches.
    Source: Jiang et al., "All Tokens Matter", NeurIPS 2021, equation 4.
    """
    class_part = sparse_cross_entropy(outputs.class_logits[:, None], class_targets).mean()
    if token_targets is None:
        return TokenLabelLoss(class_part, class_part.detach(), torch.zeros_like(class_part))
    token_part = sparse_cross_entropy(outputs.token_logits, token_targets).mean()
    return TokenLabelLoss(class_part + beta * token_part, class_part.detach(), token_part.detach())


def sparse_cross_entropy(logits: Float[Tensor, "B N C"], targets: TokenTargets) -> Float[Tensor, "B N"]:
    """Return weight * H(target, softmax(logits)) of each token, differentiable in the logits.

        weight * H = - sum over u of excess[u] * z[classes[u]] - floor * sum over c of z[c],  z = log softmax

    Equal to the dense soft cross entropy, in float32 (float64 for float64 logits) whatever the logits' dtype.
    Beside the logits and their gradient it takes B x N x U numbers and one block; the dense form takes the
    target, the log-softmax and their product, each B x N x C.
    Raises ValueError if logits and targets are not of the same images and tokens.
    """
    if logits.shape[:2] != targets.weight.shape:
        raise ValueError(
            f"logits of {tuple(logits.shape[:2])} (images, tokens) do not fit targets of "
            f"{tuple(targets.weight.shape)}; align the score maps to the grid that the model reports"
        )
    loss = _SparseCrossEntropy.apply(logits, targets.classes, targets.excess, targets.floor, targets.weight)
    assert isinstance(loss, Tensor)
    return loss


class _SparseCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, classes: Tensor, excess: Tensor, floor: Tensor, weight: Tensor
    ) -> Tensor:
        exact = torch.promote_types(logits.dtype, torch.float32)
        loss = torch.empty_like(floor, dtype=exact)
        slices, buffer = _blocks(logits, exact)
        for images in slices:
            z = logits[images]
            z = torch.log_softmax(z, dim=2, dtype=exact, out=buffer[: len(z)])
            named = z.gather(2, classes[images, None, :].expand_as(excess[images]))  # [b, N, U]
            loss[images] = -(excess[images] * named).sum(dim=2) - floor[images] * z.sum(dim=2)
        ctx.save_for_backward(logits, classes, excess, floor, weight)
        return loss

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_loss: Tensor
    ) -> tuple[Tensor | None, ...]:
        logits, classes, excess, floor, weight = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)
        slices, buffer = _blocks(logits, grad_loss.dtype)
        for images in slices:
            z, scale = logits[images], grad_loss[images, :, None]
            gradient = torch.softmax(z, dim=2, dtype=grad_loss.dtype, out=buffer[: len(z)])  # [b, N, C]
            gradient.mul_(scale * weight[images, :, None]).sub_(scale * floor[images, :, None])
            named = classes[images, None, :].expand_as(excess[images])
            gradient.scatter_add_(2, named, (-scale * excess[images]).to(gradient.dtype))
            grad_logits[images] = gradient
        return grad_logits, None, None, None, None


def _blocks(logits: Tensor, dtype: torch.dtype) -> tuple[list[slice], Tensor]:
    """Return slices of the batch, and room for one of them.

    Memory that is new to a process costs more to touch than the arithmetic on it, hence one buffer for all.
    """
    slices = blocks(len(logits), logits[0].numel(), logits.device)
    return slices, torch.empty_like(logits[slices[0]], dtype=dtype)
