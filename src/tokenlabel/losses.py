"""The token labeling objective, exact and without a B x N x C target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from tokenlabel.models.outputs import Outputs
from tokenlabel.targets import TokenTargets

# Logits are visited in blocks of about this many, so that float32 copies of bf16 logits stay small.
BLOCK_SIZE = 1 << 21


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

        weight * H = weight * logsumexp(z) - sum over u of excess[u] * z[classes[u]] - floor * sum over c of z[c]

    Equal to the dense soft cross entropy, in float32 (float64 for float64 logits) whatever the logits' dtype.
    Beside the logits and their gradient it takes B x N x U numbers and one block; the dense form takes the
    target, the log-softmax and their product, each B x N x C.
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
    def forward(ctx: Any, logits: Tensor, classes: Tensor, excess: Tensor, floor: Tensor, weight: Tensor) -> Tensor:
        exact = torch.promote_types(logits.dtype, torch.float32)
        lse, total = logits.new_empty((2, *logits.shape[:2]), dtype=exact).unbind()
        for rows in _blocks(logits):
            block = logits[rows].to(exact)
            torch.logsumexp(block, dim=2, out=lse[rows])
            torch.sum(block, dim=2, out=total[rows])
        named = logits.gather(2, classes[:, None, :].expand_as(excess)).to(exact)  # [B, N, U]
        ctx.save_for_backward(logits, classes, excess, floor, weight, lse)
        return weight * lse - (excess * named).sum(dim=2) - floor * total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        logits, classes, excess, floor, weight, lse = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)
        for rows in _blocks(logits):
            softmax = logits[rows].to(lse.dtype).sub_(lse[rows, :, None]).exp_()
            scale = grad_loss[rows, :, None]
            gradient = softmax.mul_(scale * weight[rows, :, None]).sub_(scale * floor[rows, :, None])
            named = classes[rows, None, :].expand_as(excess[rows])
            gradient.scatter_add_(2, named, (-scale * excess[rows]).to(gradient.dtype))
            grad_logits[rows] = gradient
        return grad_logits, None, None, None, None


def _blocks(logits: Tensor) -> list[slice]:
    """Return slices of the batch, each of about BLOCK_SIZE logits."""
    step = max(1, BLOCK_SIZE // max(1, logits[0].numel()))
    return [slice(start, start + step) for start in range(0, len(logits), step)]
