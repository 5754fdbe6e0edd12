"""The token labeling objective, exact and without a B x N x C target.

The fused form (`linear_cross_entropy`) goes without B x N x C logits too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tokenlabel.core.kernels import Linear, blocks, linear
from tokenlabel.core.outputs import Outputs
from tokenlabel.core.targets import TokenTargets, check_class_ids
from tokenlabel.core.targets import class_targets as targets_of
from tokenlabel.runtime.coercion import COUNT, check_number, described


@dataclass(frozen=True, eq=False)
class TokenLabelLoss:
    """The loss and its parts; `total` is what to call backward() on."""

    total: Float[Tensor, ""]
    class_part: Float[Tensor, ""]
    token_part: Float[Tensor, ""]


def token_label_loss(
    outputs: Outputs,
    class_targets: TokenTargets | Integer[Tensor, " B"] | Float[Tensor, "B C"],
    token_targets: TokenTargets | None,
    *,
    beta: float = 0.5,
) -> TokenLabelLoss:
    """Return H(class token) + beta * mean over tokens of H(token), the token labeling objective.

    `class_targets`: class ids or probabilities, as `F.cross_entropy` takes them, or targets of one token an image.
    `token_targets`: one for each output token (None: no token labels, the token part is 0). A model without class head
    (logits [B, 0]) has a class part of 0. Tokens of weight 0 carry no
    loss but count in the mean, so that the mean over two ranks is the mean over both batches.
    Raises ValueError for class targets of another type, and for targets that do not fit the outputs' images, tokens
    and classes.
    Source: Jiang et al., "All Tokens Matter", NeurIPS 2021, equation 4.

    >>> outputs = tl.Outputs(torch.zeros(2, 4), torch.zeros(2, 9, 8), torch.nn.Linear(8, 4), grid=(3, 3))
    >>> loss = tl.token_label_loss(outputs, torch.tensor([0, 3]), None)
    >>> round(loss.total.item(), 4), loss.token_part.item()  # log 4, and no token labels
    (1.3863, 0.0)
    """
    check_number(beta, COUNT, name="beta")
    if not hasattr(outputs, "class_logits"):
        raise ValueError(f"outputs: expected what a model of create_model returns, got {described(outputs)}")
    if num_classes := outputs.class_logits.shape[1]:
        if not isinstance(class_targets, TokenTargets):
            class_targets = targets_of(class_targets, num_classes=num_classes)
        class_part = sparse_cross_entropy(outputs.class_logits[:, None], class_targets).mean()
    else:  # no class head: 0, yet with gradients of 0, as DDP waits for one of every parameter
        class_part = outputs.class_logits.float().sum()
    if token_targets is None:
        return TokenLabelLoss(class_part, class_part.detach(), torch.zeros_like(class_part))
    if getattr(token_targets, "grid", None) not in (None, tuple(outputs.grid)):
        raise ValueError(
            f"targets on a grid of {token_targets.grid} tokens (h, w) for outputs on {tuple(outputs.grid)}; align the "
            "score maps to the grid that the model reports (outputs.grid)"
        )
    token_part = head_cross_entropy(outputs.tokens, outputs.token_head, token_targets)
    return TokenLabelLoss(class_part + beta * token_part, class_part.detach(), token_part.detach())


def head_cross_entropy(tokens: Float[Tensor, "B N D"], head: nn.Module, targets: TokenTargets) -> Float[Tensor, ""]:
    """Return the mean over tokens of weight * H(target, softmax(head(tokens))), the fused way where that saves memory.

    `head`: any module that maps the features of tokens, or a 1 x 1 convolution, which is a linear map of channels.
    """
    # Exactly such a layer: what wraps or parametrises one has a type of its own.
    if type(head) not in (nn.Linear, Linear, nn.Conv2d):
        return sparse_cross_entropy(head(tokens), targets).mean()
    assert isinstance(head, (nn.Linear, nn.Conv2d))
    # The fused form keeps a gradient of [B, N, D], the plain one logits of [B, N, C].
    if head.weight.shape[0] > head.weight.shape[1]:
        return linear_cross_entropy(tokens, head, targets)
    logits = linear(tokens, head.weight.flatten(1), head.bias) if isinstance(head, nn.Conv2d) else head(tokens)
    return sparse_cross_entropy(logits, targets).mean()


def sparse_cross_entropy(logits: Float[Tensor, "B N C"], targets: TokenTargets) -> Float[Tensor, "B N"]:
    """Return weight * H(target, softmax(logits)) of each token, differentiable in the logits.

        weight * H = - sum over u of excess[u] * z[classes[u]] - floor * sum over c of z[c],  z = log softmax

    (With raw logits in place of z, weight * logsumexp is added: excesses and floors of all classes sum to the weight.)
    Equal to the dense soft cross entropy, in float32 (float64 for float64 logits) whatever the logits' dtype.
    Beside the logits and their gradient it takes B x N x U numbers and one block; the dense form takes the
    target, the log-softmax and their product, each B x N x C.
    Raises ValueError if logits and targets are not of the same images, tokens and classes. Class ids are compared with
    the logits on the CPU only: on a GPU the check would wait for the device.

    >>> logits = torch.zeros(2, 1, 4)  # two images, one token, four classes
    >>> tl.sparse_cross_entropy(logits, tl.class_targets([2, 0])).exp()
    tensor([[4.],
            [4.]])
    """
    _check_same_tokens(logits, targets, num_classes=logits.shape[2])
    loss = _SparseCrossEntropy.apply(logits, targets.classes, targets.excess, targets.floor, targets.weight)
    assert isinstance(loss, Tensor)
    return loss


def linear_cross_entropy(
    tokens: Float[Tensor, "B N D"], head: nn.Linear | nn.Conv2d, targets: TokenTargets
) -> Float[Tensor, ""]:
    """Return the mean over tokens of weight * H(target, softmax(head(tokens))), without the logits of all tokens.

    The same number and the same gradients (of tokens, weight and bias) as `sparse_cross_entropy(head(tokens),
    targets).mean()`, but logits and their gradient exist for one block of images at a time, under autocast in its
    dtype. The gradients are computed together with the loss; backward() only scales them. A convolution must be 1 x 1.
    """
    _check_same_tokens(tokens, targets, num_classes=head.weight.shape[0])
    loss = _LinearCrossEntropy.apply(
        tokens,
        head.weight.flatten(1),  # itself, unless the head is a convolution
        head.bias,
        (targets.classes, targets.excess, targets.floor, targets.weight),
        torch.is_grad_enabled(),  # in forward() it is off for every Function
    )
    assert isinstance(loss, Tensor)
    return loss


def _check_same_tokens(outputs: Tensor, targets: TokenTargets, *, num_classes: int) -> None:
    if not isinstance(targets, TokenTargets):
        raise ValueError(
            f"expected TokenTargets, as `align` and `class_targets` make them, got {type(targets).__name__}"
        )
    if outputs.shape[:2] != targets.weight.shape:
        raise ValueError(
            f"outputs of {tuple(outputs.shape[:2])} (images, tokens) do not fit targets of "
            f"{tuple(targets.weight.shape)}; align the score maps to the grid that the model reports"
        )
    if targets.num_classes not in (None, num_classes):
        raise ValueError(
            f"logits over {num_classes:,} classes, targets over {targets.num_classes:,}; create the model with as many "
            "classes as its labels have (num_classes, and num_token_classes for those of the tokens)"
        )
    check_class_ids(targets.classes, num_classes)


class _SparseCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, classes: Tensor, excess: Tensor, floor: Tensor, weight: Tensor) -> Tensor:
        """Return the loss of each token [B, N]; only the logits are kept, not their softmax."""
        exact = torch.promote_types(logits.dtype, torch.float32)
        loss = torch.empty_like(floor, dtype=exact)
        slices, buffer = _blocks(logits, logits.shape[2], exact)
        for images in slices:
            z = logits[images]
            z = torch.log_softmax(z, dim=2, dtype=exact, out=buffer[: len(z)])
            loss[images] = _cross_entropy(z, classes[images], excess[images], floor[images])
        ctx.save_for_backward(logits, classes, excess, floor, weight)
        return loss

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_loss: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Return the gradient of the logits, (weight * softmax - target) * grad_loss, block by block."""
        logits, classes, excess, floor, weight = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)
        slices, buffer = _blocks(logits, logits.shape[2], grad_loss.dtype)
        for images in slices:
            z, scale = logits[images], grad_loss[images]
            probs = torch.softmax(z, dim=2, dtype=grad_loss.dtype, out=buffer[: len(z)])  # [b, N, C]
            grad_logits[images] = _to_gradient(
                probs, classes[images], scale[..., None] * excess[images], scale * floor[images], scale * weight[images]
            )
        return grad_logits, None, None, None, None


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        head_weight: Tensor,
        head_bias: Tensor | None,
        targets: tuple[Tensor, ...],
        with_gradients: bool,
    ) -> Tensor:
        """Return the mean loss; gradients are computed here, where a block's logits are at hand."""
        narrow, exact = _linear_dtype(tokens), torch.promote_types(tokens.dtype, torch.float32)
        matrix, bias = head_weight.to(narrow), None if head_bias is None else head_bias.to(narrow)
        num_classes, width = head_weight.shape
        loss = tokens.new_zeros((), dtype=exact)
        grad_tokens = torch.empty_like(tokens, dtype=narrow)
        # In float32 for weights in half precision, too: they are sums over all tokens.
        grad_weight, grad_bias = torch.zeros_like(head_weight, dtype=exact), loss.new_zeros(num_classes)
        slices, buffer = _blocks(tokens, num_classes, exact)
        gradient_scale = _float16_scale(narrow, tokens_a_block=slices[0].stop * tokens.shape[1])
        for images in slices:
            block, of_block = tokens[images].to(narrow), tuple(t[images] for t in targets)
            logits, out = linear(block, matrix, bias), buffer[: len(block)]
            scale = gradient_scale if with_gradients else None
            loss += _loss_with_gradient(logits, of_block, out, gradient_scale=scale)
            if with_gradients:
                grad_bias += out.sum(dim=(0, 1))
                gradient = out.to(narrow)
                grad_tokens[images] = linear(gradient, matrix.T, None)
                features, divisor = _scaled_down(block.flatten(0, 1))
                for rows in blocks(num_classes, width, tokens.device):
                    grad_weight[rows] += linear(gradient[:, :, rows].flatten(0, 1).T, features.T, None) * divisor
        ctx.save_for_backward(grad_tokens, grad_weight, None if head_bias is None else grad_bias)
        num_tokens = tokens.shape[0] * tokens.shape[1]
        ctx.divisor = gradient_scale * num_tokens
        return loss / num_tokens

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_loss: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of tokens, weight and bias, scaled by that of the mean loss."""
        grad_tokens, grad_weight, grad_bias = ctx.saved_tensors
        # Shape [1], not []: multiplied by a scalar tensor, float16 gradients would stay in float16.
        scale = (grad_loss / ctx.divisor).view(1)
        return (grad_tokens * scale, grad_weight * scale, None if grad_bias is None else grad_bias * scale, None, None)


def _loss_with_gradient(
    logits: Tensor, targets: tuple[Tensor, ...], out: Tensor, *, gradient_scale: float | None
) -> Tensor:
    """Return the sum of the loss over a block, and leave its gradient times `gradient_scale` in `out` [b, N, C]."""
    classes, excess, floor, weight = targets
    logits = logits.to(out.dtype)
    loss = _cross_entropy(torch.log_softmax(logits, dim=2, out=out), classes, excess, floor).sum()
    if gradient_scale is not None:
        probs = torch.softmax(logits, dim=2, out=out)  # cheaper than exp of the log-softmax
        _to_gradient(probs, classes, gradient_scale * excess, gradient_scale * floor, gradient_scale * weight)
    return loss


def _cross_entropy(log_probs: Tensor, classes: Tensor, excess: Tensor, floor: Tensor) -> Tensor:
    """Return weight * H of each token [B, N]."""
    named = log_probs.gather(2, classes[:, None, :].expand_as(excess))  # [B, N, U]
    return -(excess * named).sum(dim=2) - floor * log_probs.sum(dim=2)


def _to_gradient(probs: Tensor, classes: Tensor, excess: Tensor, floor: Tensor, weight: Tensor) -> Tensor:
    """Turn probabilities [B, N, C] into the gradient of the loss in place: weight * probs - target."""
    probs.mul_(weight[..., None]).sub_(floor[..., None])
    return probs.scatter_add_(2, classes[:, None, :].expand_as(excess), -excess.to(probs.dtype))


def _blocks(rows: Tensor, num_classes: int, dtype: torch.dtype) -> tuple[list[slice], Tensor]:
    """Return slices of the batch [B, N, ...], and a buffer for the logits of one of them.

    Memory that is new to a process costs more to touch than the arithmetic on it, hence one buffer for all.
    """
    num_images, num_tokens = rows.shape[:2]
    slices = blocks(num_images, num_tokens * num_classes, rows.device)
    return slices, rows.new_empty(slices[0].stop, num_tokens, num_classes, dtype=dtype)


# The gradient of the weights is a sum over a block's tokens of (at most 1) * (a feature), and float16 ends at 65,504.
# GradScaler cannot prevent this overflow: these gradients are computed in the forward pass, before the loss is scaled.
# So the sum of the first factors is kept to 1,024, and features are divided so that the largest is at most 60.


def _float16_scale(dtype: torch.dtype, *, tokens_a_block: int) -> float:
    return min(1.0, 1024 / tokens_a_block) if dtype is torch.float16 else 1.0


def _scaled_down(features: Tensor) -> tuple[Tensor, Tensor | float]:
    if features.dtype is not torch.float16:
        return features, 1.0
    divisor = (features.abs().amax() / 60).clamp_min(1).float().view(1)  # of shape [1], it makes products float32
    return (features / divisor).half(), divisor


def _linear_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype in which a linear layer takes this tensor: autocast's where it is on."""
    device = tensor.device.type
    autocast = torch.is_autocast_enabled(device) and tensor.dtype is not torch.float64
    return torch.get_autocast_dtype(device) if autocast else tensor.dtype
