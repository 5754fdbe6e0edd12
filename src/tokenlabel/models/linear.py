"""Linear maps in float32 on the CPU by way of oneDNN.

PyTorch hands them to MKL, which leaves AVX-512 alone on processors that are not Intel's: there oneDNN takes half the
time for the same sums.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

HAS_ONEDNN = torch.backends.mkldnn.is_available()


class Linear(nn.Linear):
    """One linear map of every token, PyTorch's own but for the library that computes it."""

    def forward(self, input: Float[Tensor, "*places D"]) -> Float[Tensor, "*places D2"]:
        """Return the mapped tokens."""
        return linear(input, self.weight, self.bias)


def linear(
    input: Float[Tensor, "*places D"], weight: Float[Tensor, "D2 D"], bias: Float[Tensor, " D2"] | None
) -> Float[Tensor, "*places D2"]:
    """Return `input @ weight.T + bias`, in float32 on the CPU by oneDNN, else as PyTorch does it."""
    if not _wants_onednn(input):
        return F.linear(input, weight, bias)
    product: Any = _Product.apply(input.flatten(0, -2), weight, bias)
    return product.view(*input.shape[:-1], -1)


def _wants_onednn(input: Tensor) -> bool:
    return (
        input.is_cpu
        and input.dtype == torch.float32
        and HAS_ONEDNN
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_exporting()
    )


class _Product(torch.autograd.Function):
    """`left @ right.T + bias` for two matrices; its gradients are products of the same kind."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(left, right)
        return torch.ops.mkldnn._linear_pointwise(left, right, bias, "none", [], "")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, Any, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        left, right = ctx.saved_tensors
        wants_left, wants_right, wants_bias = ctx.needs_input_grad
        return (
            _Product.apply(gradient, right.T, None) if wants_left else None,
            _Product.apply(gradient.T, left.T, None) if wants_right else None,
            gradient.sum(dim=0) if wants_bias else None,
        )
