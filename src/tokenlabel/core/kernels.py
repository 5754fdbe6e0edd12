"""What makes the arithmetic fast on a CPU: batches in blocks that fit its cache, linear layers computed by oneDNN."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

# Numbers held at once, about: what fits the cache of a CPU; elsewhere, enough to keep a GPU busy.
BLOCK_SIZE = {"cpu": 1 << 20}
BLOCK_SIZE_ELSEWHERE = 1 << 24


def blocks(count: int, numbers_each: int, device: torch.device) -> list[slice]:
    """Return slices that cover `count` rows of `numbers_each` numbers, as many a slice as a block holds."""
    rows = max(1, BLOCK_SIZE.get(device.type, BLOCK_SIZE_ELSEWHERE) // max(1, numbers_each))
    return [slice(start, end) for start, end in pairwise([*range(0, count, rows), count])]


# PyTorch calls MKL, which does not use AVX-512 on processors other than Intel's: there oneDNN takes half the time.
HAS_ONEDNN = torch.backends.mkldnn.is_available()


class Linear(nn.Linear):
    """One linear map of every token, PyTorch's own but for the library that computes it."""

    def forward(self, input: Float[Tensor, "*dims D"]) -> Float[Tensor, "*dims D2"]:
        """Return the mapped tokens."""
        return linear(input, self.weight, self.bias)


def linear(
    input: Float[Tensor, "*dims D"], weight: Float[Tensor, "D2 D"], bias: Float[Tensor, " D2"] | None
) -> Float[Tensor, "*dims D2"]:
    """Return `input @ weight.T + bias`, in float32 on the CPU by oneDNN, else as PyTorch does it."""
    if not _wants_onednn(input):
        return F.linear(input, weight, bias)
    return product(input.flatten(0, -2), weight, bias).view(*input.shape[:-1], weight.shape[0])


def _wants_onednn(input: Tensor) -> bool:
    return (
        input.is_cpu
        and input.dtype == torch.float32
        and HAS_ONEDNN
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_exporting()
    )


@torch.library.custom_op(
    "tokenlabel::product", mutates_args=(), schema="(Tensor left, Tensor right, Tensor? bias) -> Tensor"
)
def product(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    """Return `left @ right.T + bias` for matrices [M, K] and [N, K], a bias [N] and a result [M, N].

    An operator of its own, since torch.compile takes oneDNN's only for weights that never change.
    """
    return torch.ops.mkldnn._linear_pointwise(left, right, bias, "none", [], "")


@product.register_fake
def _(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    return left.new_empty(left.shape[0], right.shape[0])


def _save_inputs(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    left, right, _ = inputs
    ctx.save_for_backward(left, right)


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of `product`: products of the same kind, so they have gradients, too."""
    left, right = ctx.saved_tensors
    wants_left, wants_right, wants_bias = ctx.needs_input_grad
    return (
        product(gradient, right.T, None) if wants_left else None,
        product(gradient.T, left.T, None) if wants_right else None,
        gradient.sum(dim=0) if wants_bias else None,
    )


product.register_autograd(_gradients, setup_context=_save_inputs)
