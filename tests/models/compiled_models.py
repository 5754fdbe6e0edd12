"""Compile models without a graph break, mix in several ways, print the name of each that kept to one graph."""

from __future__ import annotations

import copy
from typing import Any

import torch

from tokenlabel.core.mix import MixPlan
from tokenlabel.models import TokenModel, create_model

SMALL: dict[str, Any] = {"depth": 1, "width": 32, "num_heads": 4}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"lvvit_{size}": (f"lvvit_{size}", {**SMALL, "stem_width": 8}) for size in "tsml"},
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


def main() -> None:
    """Check all cases."""
    torch.manual_seed(0)
    img_size = (64, 96)
    for name, (model_name, options) in CASES.items():
        check(create_model(model_name, num_classes=5, img_size=img_size, **options), img_size=img_size)
        print(name, flush=True)


if __name__ == "__main__":
    main()
