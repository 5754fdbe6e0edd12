"""Compile models, mixed in several ways, and losses without a graph break; print the name of each that kept to one."""

from __future__ import annotations

import copy
from typing import Any

import torch

from tokenlabel.core.losses import linear_cross_entropy, sparse_cross_entropy
from tokenlabel.core.mix import MixPlan
from tokenlabel.core.targets import TokenTargets
from tokenlabel.models import TokenModel, create_model

SMALL: dict[str, Any] = {"depth": 1, "width": 32, "num_heads": 4}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    # LV-ViT-S and M differ from T in numbers only.
    **{f"lvvit_{size}": (f"lvvit_{size}", {**SMALL, "stem_width": 8}) for size in "tl"},
    "t2t_vit_14": ("t2t_vit_14", SMALL),
    "vit": ("vit_tiny_patch16_224", {"depth": 2, "embed_dim": 32, "num_heads": 2}),
    "resnet": ("test_resnet", {}),
}


def check(model: TokenModel, *, img_size: tuple[int, int]) -> None:
    """Compare the compiled model with itself under three mixes of one shape; it may be traced once."""
    num_graphs = 0

    def backend(graph: Any, _: Any) -> Any:
        nonlocal num_graphs
        num_graphs += 1
        return graph.forward

    plain, images = copy.deepcopy(model), torch.randn(2, 3, *img_size)
    model.compile(backend=backend, fullgraph=True)
    for draw in range(3):
        mask = (torch.rand(2, *model.grid) < 0.5).float()
        plan = MixPlan(mask, torch.tensor([1, draw % 2]), on_tokens=True)
        torch.manual_seed(draw)  # drop path
        found = model(images, plan)
        torch.manual_seed(draw)
        expected = plain(images, plan)
        torch.testing.assert_close(found.class_logits, expected.class_logits)
        torch.testing.assert_close(found.token_logits, expected.token_logits)
        assert found.grid == expected.grid
        found.token_logits.sum().backward()
    assert num_graphs == 1, f"traced {num_graphs} times"


def check_losses() -> None:
    """Compare compiled losses, of logits and of tokens with their head, and their gradients with themselves."""
    weight = torch.rand(2, 3, dtype=torch.float64)
    probs = torch.rand(2, 3, 4, dtype=torch.float64).softmax(dim=2)
    targets = TokenTargets(
        classes=torch.stack([torch.randperm(20)[:4] for _ in range(2)]),
        excess=0.8 * probs * weight[..., None],
        floor=0.2 / 20 * weight,
        weight=weight,
    )
    logits = torch.randn(2, 3, 20, dtype=torch.float64, requires_grad=True)
    tokens = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    head = torch.nn.Linear(4, 20, dtype=torch.float64)

    def of_logits() -> torch.Tensor:
        return sparse_cross_entropy(logits, targets).mean()

    def of_tokens() -> torch.Tensor:
        return linear_cross_entropy(tokens, head, targets).mean()

    for name, loss, inputs in (
        ("sparse_cross_entropy", of_logits, [logits]),
        ("linear_cross_entropy", of_tokens, [tokens, head.weight, head.bias]),
    ):
        found = torch.compile(loss, backend="aot_eager", fullgraph=True)()
        torch.testing.assert_close(found, loss())
        torch.testing.assert_close(torch.autograd.grad(found, inputs), torch.autograd.grad(loss(), inputs))
        print(name, flush=True)


def main() -> None:
    """Check all cases."""
    torch.manual_seed(0)
    img_size = (64, 96)
    for name, (model_name, options) in CASES.items():
        check(create_model(model_name, num_classes=5, img_size=img_size, **options), img_size=img_size)
        print(name, flush=True)
    check_losses()


if __name__ == "__main__":
    main()
