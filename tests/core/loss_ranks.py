"""A model that returns its loss, and two ranks that take one step with it in processes of their own."""

from __future__ import annotations

from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from label_cases import draw_targets
from torch import Tensor, distributed, nn

from tokenlabel.core.losses import token_label_loss
from tokenlabel.core.outputs import Outputs
from tokenlabel.core.targets import TokenTargets, class_targets

NUM_CLASSES = 9
GRID = (1, 3)


class ModelWithLoss(nn.Module):
    """A linear layer for each token, and heads that the loss works through inside of forward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.class_head, self.token_head = (
            nn.Linear(6, 4),
            nn.Linear(4, NUM_CLASSES),
            nn.Linear(4, NUM_CLASSES),
        )

    def forward(self, images: Tensor, class_ids: Tensor, targets: TokenTargets) -> Tensor:
        """Return the loss of a batch."""
        tokens = self.trunk(images)  # [B, N, 4]
        outputs = Outputs(self.class_head(tokens.mean(dim=1)), tokens, self.token_head, GRID)
        return token_label_loss(outputs, class_targets(class_ids), targets).total


def batch() -> tuple[Tensor, Tensor, TokenTargets]:
    """Return features, class ids and targets of 4 images of 3 tokens."""
    targets = draw_targets(np.random.default_rng(0), (4, 3), NUM_CLASSES, weighted=True)
    features = torch.rand(4, 3, 6, generator=torch.Generator().manual_seed(0))
    return features, torch.tensor([1, 8, 0, 2]), targets


def gradients(model: nn.Module, indices: Tensor, *, grad_accum_steps: int = 1) -> list[Tensor]:
    """Return the gradients of some images' loss, accumulated over parts of equal size."""
    features, class_ids, targets = batch()
    model.zero_grad()
    for part in indices.chunk(grad_accum_steps):
        (model(features[part], class_ids[part], targets.of_images(part)) / grad_accum_steps).backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def _run_rank(rank: int, folder: Path) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = nn.parallel.DistributedDataParallel(ModelWithLoss())
    mine = torch.tensor([0, 1]) + 2 * rank
    torch.save([gradients(model, mine), gradients(model, mine, grad_accum_steps=2)], folder / f"{rank}.pt")
    distributed.destroy_process_group()


def gradients_of_ranks(folder: Path) -> list[list[list[Tensor]]]:
    """Return what each of two ranks has after one backward pass, and after two of half its batch."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["tokenlabel.core.losses"])
    ranks = [context.Process(target=_run_rank, args=(rank, folder)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]
