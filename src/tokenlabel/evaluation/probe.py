"""How much a network's frozen tokens know about their places: a linear probe on true masks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from tokenlabel.core.align import align
from tokenlabel.core.batch import Batch, normalize_images
from tokenlabel.core.targets import TokenTargets
from tokenlabel.evaluation.evaluators import TokenTruth, object_tokens
from tokenlabel.models import TokenModel

# Ridge, relative to the mean of the features' variances: enough to make the solution exist, too little to shrink it.
RIDGE = 1e-3


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """Class scores of a token as a linear function of its features."""

    weight: Float[Tensor, "D C"]
    bias: Float[Tensor, " C"]

    def classes(self, tokens: Float[Tensor, "*batch D"]) -> Int[Tensor, "*batch"]:
        """Return the class of the highest score of each token."""
        return (tokens.double() @ self.weight + self.bias).argmax(dim=-1)


def fit_probe(
    features: Float[Tensor, "n D"], classes: Int[Tensor, " n"], *, num_classes: int, ridge: float = RIDGE
) -> LinearProbe:
    """Return the least squares fit of one-hot classes to features, in closed form, in float64.

    Minimises mean |x W + b - y|^2 + ridge * (mean variance of x) * |W|^2; b is not shrunk.
    """
    x, y = features.double(), F.one_hot(classes, num_classes).double()
    x_mean, y_mean = x.mean(dim=0), y.mean(dim=0)
    x, y = x - x_mean, y - y_mean
    covariance = x.T @ x / len(x)
    shrinkage = (
        ridge * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=x.dtype, device=x.device)
    )
    weight = torch.linalg.solve(covariance + shrinkage, x.T @ y / len(x))
    return LinearProbe(weight=weight, bias=y_mean - x_mean @ weight)


@torch.inference_mode()
def probe_figures(model: TokenModel, train: Iterable[Batch], val: Iterable[Batch]) -> dict[str, float]:
    """Return probe_accuracy and probe_miou on val batches of a probe fitted to train batches; both carry true masks.

    Tokens that show an object take part, and are judged as those of `TokenTruth`.
    """
    num_classes = model.num_classes
    features, classes = [], []
    for batch in train:
        tokens, truth = _tokens_and_truth(model, batch)
        objects, of_objects = object_tokens(truth)
        features.append(tokens[objects])
        classes.append(of_objects[objects])
    probe = fit_probe(torch.cat(features), torch.cat(classes), num_classes=num_classes)
    judge = TokenTruth("probe")
    for batch in val:
        tokens, truth = _tokens_and_truth(model, batch)
        judge.add_tokens(probe.classes(tokens), truth, num_classes=num_classes)
    return dict(judge.figures())


def _tokens_and_truth(model: TokenModel, batch: Batch) -> tuple[Float[Tensor, "B N D"], TokenTargets]:
    assert batch.score_maps is not None
    outputs = model(normalize_images(batch.images, mean=model.mean, std=model.std))
    return outputs.tokens, align(batch.score_maps, batch.views, outputs.grid)
