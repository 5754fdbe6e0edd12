"""Probes of a network's frozen features: linear on tokens (by true masks), linear and nearest neighbours on images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from tokenlabel.core.batch import Batch, normalize_images
from tokenlabel.data.augment import EvalTransform
from tokenlabel.data.batches import TokenLabelDataset
from tokenlabel.data.imagenet import as_classes_of
from tokenlabel.data.images import ImageSource, ImageSubset, has_classes
from tokenlabel.data.sources import open_images
from tokenlabel.evaluation.evaluators import refuse_outputs
from tokenlabel.models import TokenModel
from tokenlabel.runtime.distributed import Ranks
from tokenlabel.runtime.errors import ConfigError
from tokenlabel.runtime.process import listed, say

# Ridge, relative to the mean of the features' variances: enough to make the solution exist, too little to shrink it.
RIDGE = 1e-3
NUM_NEIGHBOURS = 10


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
    x, y = x - x_mean, y - y_mean  # so that the ridge does not shrink the bias
    covariance = x.T @ x / len(x)
    # Features that are all alike have no variance: any ridge makes their weights 0, and the bias decides.
    shrinkage = ridge * (float(covariance.diagonal().mean()) or 1.0)
    covariance.diagonal().add_(shrinkage)
    weight = torch.linalg.solve(covariance, x.T @ y / len(x))
    return LinearProbe(weight=weight, bias=y_mean - x_mean @ weight)


def probe_sets(
    probe: str | Path, test: str | Path | None, transform: EvalTransform
) -> tuple[TokenLabelDataset, TokenLabelDataset]:
    """Return the images that probes are fitted on, from the folder `probe`, and those that they are tested on.

    Without `test`, every other image of each class is for the test. Raises ConfigError for images of fewer than two
    classes, or with one image of a class.
    """
    source = _with_classes(open_images(probe), probe)
    if test is not None:
        others = as_classes_of(open_images(test), source.class_names, len(source.class_names), test)
    else:
        order = np.argsort(source.class_ids, kind="stable")  # every other image of each class
        source, others = (ImageSubset(source, np.sort(order[start::2])) for start in (0, 1))
    say(f"probes of frozen features learn from {len(source):,} images, and are tested on {len(others):,} others")
    return TokenLabelDataset(source, transform), TokenLabelDataset(others, transform)


def _with_classes(source: ImageSource, place: str | Path) -> ImageSource:
    """Return the images that have a class. Raises ConfigError unless there are two, with two images each."""
    known = has_classes(source)
    counts = np.bincount(source.class_ids[known], minlength=1)
    found, single = ([source.class_names[i] for i in np.flatnonzero(which)] for which in (counts, counts == 1))
    if len(found) < 2 or single:
        what = "no classes" if not found else f"one class only ({found[0]})"
        what = what if len(found) < 2 else f"only one image of some classes ({listed(single)})"
        raise ConfigError(f"{place}: its images have {what}; probes need two classes at least, and two images of each")
    return source if known.all() else ImageSubset(source, np.flatnonzero(known))


@torch.inference_mode()
def image_figures(
    model: TokenModel,
    train: Iterable[Batch],
    val: Iterable[Batch],
    *,
    num_classes: int,
    ranks: Ranks = Ranks(),  # noqa: B008  (immutable)
) -> dict[str, float]:
    """Return image_probe and knn: the accuracy, on val batches, of probes of the mean token fitted on train batches.

    image_probe is linear (`fit_probe`); knn is the vote of the `NUM_NEIGHBOURS` nearest images by cosine, after the
    mean of the training images is subtracted. Batches are this rank's part of the images, in `num_classes` classes.
    """
    (features, classes), (val_features, val_classes) = (_mean_tokens(model, part, ranks) for part in (train, val))
    probe = fit_probe(features, classes, num_classes=num_classes)
    found = nearest_classes(features, classes, val_features, num_classes=num_classes)
    return {
        "image_probe": float((probe.classes(val_features) == val_classes).float().mean()),
        "knn": float((found == val_classes).float().mean()),
    }


def nearest_classes(
    features: Float[Tensor, "n D"],
    classes: Int[Tensor, " n"],
    queries: Float[Tensor, "m D"],
    *,
    num_classes: int,
    k: int = NUM_NEIGHBOURS,
) -> Int[Tensor, " m"]:
    """Return the class of most of the k nearest features, by cosine of centred features; ties go to the nearer."""
    centre = features.mean(dim=0)
    near = F.normalize(queries - centre, dim=1) @ F.normalize(features - centre, dim=1).T  # [m, n]
    similarity, index = near.topk(min(k, len(features)), dim=1)
    votes = queries.new_zeros(len(queries), num_classes)
    # A vote counts 1, plus at most 1 / (2k) for its similarity: k of these are less than a vote and only break ties.
    votes.scatter_add_(1, classes[index], 1 + (similarity + 1) / (4 * k))
    return votes.argmax(dim=1)


def _mean_tokens(
    model: TokenModel, batches: Iterable[Batch], ranks: Ranks
) -> tuple[Float[Tensor, "n D"], Int[Tensor, " n"]]:
    """Return the mean token and the class of each image, of all ranks. Raises OutputError for what is not finite."""
    features, classes, keys = [], [], []
    for batch in batches:
        outputs = model(normalize_images(batch.images, mean=model.mean, std=model.std))
        features.append(outputs.tokens.float().mean(dim=1))
        classes.append(batch.class_ids)
        keys += batch.keys
    of_ranks = ranks.all_gather((torch.cat(features).cpu(), torch.cat(classes).cpu(), keys))
    features, classes, keys = zip(*of_ranks, strict=True)
    finite = torch.cat(features).isfinite().all(dim=1).tolist()
    refuse_outputs([key for key, is_so in zip(chain(*keys), finite, strict=True) if not is_so], "fp32")
    return torch.cat(features), torch.cat(classes)
