"""Evaluators: metrics that accumulate over batches, and the loop that runs a model once for all of them.

An evaluator keeps sums, never means, so that processes can add theirs up exactly, however the images are divided.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from tokenlabel.core.align import align
from tokenlabel.core.batch import Batch, normalize_images
from tokenlabel.core.config import Inference
from tokenlabel.core.kernels import blocks
from tokenlabel.core.outputs import Outputs
from tokenlabel.core.targets import TokenTargets
from tokenlabel.runtime.distributed import Precision, Ranks, autocast
from tokenlabel.runtime.errors import OutputError
from tokenlabel.runtime.process import listed

# A token is judged if a class of the mask covers at least this share of its cell.
OBJECT_SHARE = 0.25
# Equal bins of confidence of the expected calibration error (Guo et al. 2017).
NUM_BINS = 15


@dataclass(frozen=True, eq=False)
class Predictions:
    """A batch, on the device, and the outputs of a model for it.

    `logits`: of one way to predict, in float32. `token_classes`: the most probable class of each token of the `grid`
    (h, w), if the batch has score maps to compare them with. `outputs`: all outputs.
    """

    batch: Batch
    grid: tuple[int, int]
    logits: Float[Tensor, "B C"]
    token_classes: Int[Tensor, "B N"] | None
    outputs: Outputs | None = None


class Evaluator(ABC):
    """A metric or several, computed from sums over batches."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    @abstractmethod
    def add(self, predictions: Predictions) -> None:
        """Add a batch to the sums."""

    @abstractmethod
    def figures(self) -> Iterator[tuple[str, float]]:
        """Yield names and values of the metrics: over the images of all ranks, once `join` was called."""

    def join(self, ranks: Ranks) -> None:
        """Add up the sums of all ranks, each of which must have seen other images."""
        of_ranks = ranks.all_gather(self.sums)
        names = dict.fromkeys(name for sums in of_ranks for name in sums)
        self.sums = {name: self._joined([sums[name] for sums in of_ranks if name in sums]) for name in names}

    def _joined(self, parts: list[Tensor]) -> Tensor:
        return torch.stack(parts).sum(dim=0)

    def _count(self, **counts: Tensor) -> None:
        for name, count in counts.items():
            added = count.detach().to("cpu", torch.float64)  # exact for counts up to 2^53
            self.sums[name] = self.sums[name] + added if name in self.sums else added

    def _total(self, name: str) -> float:
        return float(self.sums[name]) if name in self.sums else 0.0


@torch.inference_mode()
def observe(
    model: Any,
    batches: Iterable[Batch],
    evaluators: Mapping[Inference, Sequence[Evaluator]],
    *,
    precision: Precision = "fp32",
    ranks: Ranks = Ranks(),  # noqa: B008  (immutable)
    competing: Bool[Tensor, " C"] | None = None,
) -> dict[Inference, dict[str, Any]]:
    """Run a model once over batches on its device; return the metrics of each way to predict, and images_per_s.

    `model`: anything that returns `Outputs`. `batches`: this rank's part of the images. `competing`: the classes among
    which predictions choose; all if None. Raises OutputError, on all ranks, for outputs that are not finite: the first
    class, or every class, would be the most probable one.
    """
    model.eval()
    started, num_images, bad = time.perf_counter(), 0, list[str]()
    for batch in batches:
        device = batch.images.device
        with autocast(device, precision):
            outputs = model(normalize_images(batch.images, mean=model.mean, std=model.std))
            logits_of = {inference: outputs.logits(inference).float() for inference in evaluators}
            token_classes = _token_classes(outputs) if batch.score_maps is not None else None
        for inference, logits in logits_of.items():
            chosen = logits if competing is None else logits.masked_fill(~competing.to(device), -torch.inf)
            for evaluator in evaluators[inference]:
                evaluator.add(Predictions(batch, outputs.grid, chosen, token_classes, outputs))
        num_images += len(batch.images)
        bad += _not_finite(batch.keys, *logits_of.values(), *([] if token_classes is None else [outputs.tokens]))
    spent = ranks.all_gather((num_images, time.perf_counter() - started, bad))
    refuse_outputs([key for *_, keys in spent for key in keys], precision)
    # All ranks wait for the slowest one, so its time is the time that the evaluation takes.
    speed = {"images_per_s": sum(n for n, *_ in spent) / max(seconds for _, seconds, _ in spent)}
    for evaluator in (evaluator for of_one in evaluators.values() for evaluator in of_one):
        evaluator.join(ranks)
    return {
        inference: {name: value for evaluator in of_one for name, value in evaluator.figures()} | speed
        for inference, of_one in evaluators.items()
    }


def _not_finite(keys: Sequence[str], *outputs: Tensor) -> list[str]:
    """Return the keys of the images for which some output is not finite."""
    finite = torch.stack([output.isfinite().flatten(1).all(dim=1) for output in outputs]).all(dim=0)
    return [key for key, is_finite in zip(keys, finite.tolist(), strict=True) if not is_finite]


def refuse_outputs(keys: Sequence[str], precision: str) -> None:
    """Raise OutputError if the outputs for any images, by their keys, were not finite."""
    if keys:
        wider = "; --precision fp32 has a wider range" if precision != "fp32" else "; its weights have overflowed"
        raise OutputError(
            f"the outputs of the network for {len(keys):,} images ({listed(keys)}) are not finite in {precision}{wider}"
        )


def _token_classes(outputs: Outputs) -> Int[Tensor, "B N"]:
    """Return the most probable class of each token, by blocks of images: logits of 65,536 words take gigabytes."""
    tokens, head = outputs.tokens, outputs.token_head
    num_numbers = tokens.shape[1] * head(tokens[:1, :1]).shape[2]
    return torch.cat([head(tokens[part]).argmax(dim=2) for part in blocks(len(tokens), num_numbers, tokens.device)])


class Accuracy(Evaluator):
    """Top-1, top-5 and the mean cross-entropy; ties count against the model."""

    def add(self, predictions: Predictions) -> None:
        """Add a batch to the sums."""
        class_ids = predictions.batch.class_ids
        ranks = rank_of_class(predictions.logits, class_ids)
        self._count(
            images=torch.tensor(len(ranks)),
            top1=(ranks < 1).sum(),
            top5=(ranks < 5).sum(),
            loss=F.cross_entropy(predictions.logits, class_ids, reduction="sum"),
        )

    def figures(self) -> Iterator[tuple[str, float]]:
        """Yield num_images, top1, top5 and loss."""
        num_images = self._total("images")
        if not num_images:
            raise ValueError("there are no images to evaluate on")
        yield "num_images", int(num_images)
        for name in ("top1", "top5", "loss"):
            yield name, self._total(name) / num_images


class Calibration(Evaluator):
    """Expected calibration error over 15 equal bins of confidence; bin i of n holds confidences in (i/n, (i+1)/n].

    ece = sum over bins of (images of the bin / all images) * |accuracy of the bin - mean confidence of the bin|
    """

    def add(self, predictions: Predictions) -> None:
        """Add a batch to the sums."""
        confidence, guess = predictions.logits.double().softmax(dim=1).max(dim=1)
        right = (guess == predictions.batch.class_ids).double()
        # Sums over the images of each bin, as products with one-hot rows.
        bins = (confidence * NUM_BINS).ceil().long().clamp(1, NUM_BINS) - 1
        one_hot = F.one_hot(bins, NUM_BINS).double()  # [B, bins]
        self._count(images=one_hot.sum(dim=0), confidence=confidence @ one_hot, right=right @ one_hot)  # each [bins]

    def figures(self) -> Iterator[tuple[str, float]]:
        """Yield ece."""
        gaps = (self.sums["confidence"] - self.sums["right"]).abs()
        yield "ece", float(gaps.sum() / self.sums["images"].sum())


class PerClass(Evaluator):
    """Top-1 of the images of each class. `class_names`: of the model."""

    def __init__(self, class_names: Sequence[str]) -> None:
        super().__init__()
        self.class_names = list(class_names)

    def add(self, predictions: Predictions) -> None:
        """Add a batch to the sums."""
        class_ids = predictions.batch.class_ids
        right = rank_of_class(predictions.logits, class_ids) < 1
        num_classes = len(self.class_names)
        self._count(
            images=class_ids.bincount(minlength=num_classes), right=class_ids[right].bincount(minlength=num_classes)
        )

    def figures(self) -> Iterator[tuple[str, float]]:
        """Yield the top-1 of each class that has images as per_class/NAME."""
        counts = (self.sums[name].tolist() for name in ("right", "images"))
        for name, right, num_images in zip(self.class_names, *counts, strict=True):
            if num_images:
                yield f"per_class/{name}", right / num_images


class TokenTruth(Evaluator):
    """Accuracy and mean IoU of the tokens against the score maps of the batches, which are true masks or a teacher's.

    The most probable class of a token is compared with the class that covers most of its cell, over the tokens of which
    a class covers at least `OBJECT_SHARE`. miou: the mean over classes of hits / (hits + misses + false alarms), over
    these tokens. `name`: the prefix of the metrics' names.
    """

    def __init__(self, name: str = "token") -> None:
        super().__init__()
        self.name = name

    def add(self, predictions: Predictions) -> None:
        """Add a batch to the sums."""
        batch = predictions.batch
        if batch.score_maps is None or predictions.token_classes is None:
            return
        truth = align(batch.score_maps, batch.views, predictions.grid)
        self.add_tokens(predictions.token_classes, truth, num_classes=batch.score_maps.num_classes)

    def add_tokens(self, predicted: Int[Tensor, "B N"], truth: TokenTargets, *, num_classes: int) -> None:
        """Add the predicted class of each token to the sums. `truth`: targets aligned from true masks."""
        objects, classes = object_tokens(truth)
        shown, found = classes[objects], predicted[objects]
        of_class = {"shown": shown, "found": found, "hits": shown[shown == found]}  # three rows of C, not C x C
        self._count(**{name: ids.bincount(minlength=num_classes) for name, ids in of_class.items()})

    def absent(self, class_names: Sequence[str]) -> list[str]:
        """Return the classes that no judged token shows."""
        shown = self.sums["shown"] if "shown" in self.sums else torch.zeros(len(class_names))
        return [name for name, count in zip(class_names, shown.tolist(), strict=True) if not count]

    def figures(self) -> Iterator[tuple[str, float]]:
        """Yield num_NAMEs_judged, NAME_accuracy and NAME_miou; nothing if no token was judged."""
        if "shown" not in self.sums or not self.sums["shown"].sum():
            return
        hits, shown = self.sums["hits"], self.sums["shown"]  # [C]
        unions, there = shown + self.sums["found"] - hits, shown > 0
        yield f"num_{self.name}s_judged", int(shown.sum())
        yield f"{self.name}_accuracy", float(hits.sum() / shown.sum())
        yield f"{self.name}_miou", float((hits[there] / unions[there]).mean())


class RealLabels(Evaluator):
    """ReaL accuracy: a prediction is right if it is one of the image's labels; images without labels are left out.

    `labels`: the class ids of each image, by the last part of its key. Source: Beyer et al., "Are we done with
    ImageNet?", 2020.
    """

    def __init__(self, labels: Mapping[str, Sequence[int]]) -> None:
        super().__init__()
        self.labels = labels

    def add(self, predictions: Predictions) -> None:
        """Add a batch to the sums. Raises ValueError for an image that the labels do not name."""
        names = [key.rpartition("/")[2] for key in predictions.batch.keys]
        unknown = [name for name in names if name not in self.labels]
        if unknown:
            raise ValueError(f"the ReaL labels know no image {unknown[0]}; they belong to ImageNet's val images")
        guesses = predictions.logits.argmax(dim=1).tolist()
        judged = [(guess, self.labels[name]) for guess, name in zip(guesses, names, strict=True)]
        self._count(
            images=torch.tensor(sum(bool(labels) for _, labels in judged)),
            right=torch.tensor(sum(guess in labels for guess, labels in judged)),
        )

    def figures(self) -> Iterator[tuple[str, float]]:
        """Yield num_real_images and real."""
        yield "num_real_images", int(self._total("images"))
        if self._total("images"):
            yield "real", self._total("right") / self._total("images")


class MultiLabel(Evaluator):
    """Mean average precision over the classes that occur. `labels`: the class ids of each image, by key.

    Average precision: the mean, over the images of a class, of the precision among all images with at least its score.
    """

    def __init__(self, labels: Mapping[str, Sequence[int]]) -> None:
        super().__init__()
        self.labels = labels

    def add(self, predictions: Predictions) -> None:
        """Keep the scores and the labels of a batch: average precision needs all of them."""
        truth = torch.zeros_like(predictions.logits, dtype=torch.bool)
        for row, key in enumerate(predictions.batch.keys):
            truth[row, list(self.labels[key])] = True
        for name, part in (("scores", predictions.logits), ("truth", truth)):
            kept = part.cpu()
            self.sums[name] = torch.cat([self.sums[name], kept]) if name in self.sums else kept

    def _joined(self, parts: list[Tensor]) -> Tensor:
        return torch.cat(parts)

    def figures(self) -> Iterator[tuple[str, float]]:
        """Yield num_images and map."""
        scores, truth = self.sums["scores"], self.sums["truth"]
        found = [average_precision(scores[:, c], truth[:, c]) for c in truth.any(dim=0).nonzero()[:, 0]]
        yield "num_images", len(scores)
        yield "map", float(np.mean(found))


def average_precision(scores: Float[Tensor, " n"], truth: Bool[Tensor, " n"]) -> float:
    """Return the mean precision at the ranks of the true ones, by descending score; ties have one rank."""
    order = scores.argsort(descending=True)
    ranked, right = scores[order], truth[order]
    hits = right.cumsum(dim=0)
    # The precision at a score counts all images with that score, so it is taken at the last one of a tie.
    last = torch.searchsorted(-ranked, -ranked, right=True) - 1
    return float((hits[last] / (last + 1))[right].double().mean())


def rank_of_class(logits: Float[Tensor, "B C"], class_ids: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
    """Return the rank of each image's class, from 0; ties and NaN count against it."""
    # By what is smaller, not by what is larger: a comparison with NaN or with an equal logit is false.
    own = logits.gather(1, class_ids[:, None])
    return logits.shape[1] - 1 - (logits < own).sum(dim=1)


def object_tokens(truth: TokenTargets) -> tuple[Bool[Tensor, "B N"], Int[Tensor, "B N"]]:
    """Return which tokens are judged, given targets aligned from true masks, and the class that each token shows."""
    share, entry = truth.excess.max(dim=2)  # [B, N]
    return share >= OBJECT_SHARE, truth.classes.gather(1, entry)
