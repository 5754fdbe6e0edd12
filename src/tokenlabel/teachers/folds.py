"""Out-of-fold predictions: a label that a head contradicts, which was fitted without it, may be wrong.

Five linear heads on frozen vectors are each fitted on four fifths of the images and predict the others (Northcutt et
al., "Confident Learning", JAIR 2021).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from tokenlabel.data.images import ImageSource, has_classes
from tokenlabel.data.sources import refuse_single_class
from tokenlabel.labels.inspection import Suspect
from tokenlabel.runtime.distributed import usable_device
from tokenlabel.runtime.errors import ModelError
from tokenlabel.runtime.process import write_whole
from tokenlabel.teachers.fitting import load_vectors
from tokenlabel.teachers.options import FitConfig
from tokenlabel.teachers.solvers import Examples, choose_decay, cross_entropy, fit_linear

NUM_FOLDS = 5


@dataclass(frozen=True, eq=False)
class FoldPredictions:
    """Probabilities [n, C] of images by heads that were fitted without them, and the labels [n] of the images."""

    keys: list[str]
    class_ids: Int[NDArray[np.int64], " n"]
    probs: Float[NDArray[np.float32], "n C"]
    class_names: list[str]

    @property
    def agreement(self) -> float:
        """Share of the images whose most probable class is their label."""
        return float((self.probs.argmax(axis=1) == self.class_ids).mean())

    def suspects(self, count: int) -> list[Suspect]:
        """Return the images whose best class is not their label, by the quotient of the two probabilities."""
        rows = np.arange(len(self.keys))
        own, best = self.probs[rows, self.class_ids], self.probs.argmax(axis=1)
        doubt = own / self.probs[rows, best]
        order = [row for row in np.argsort(doubt, kind="stable").tolist() if best[row] != self.class_ids[row]]
        return [
            Suspect(
                key=self.keys[row],
                class_name=self.class_names[self.class_ids[row]],
                prob=float(own[row]),
                top_class_name=self.class_names[best[row]],
                top_prob=float(self.probs[row, best[row]]),
            )
            for row in order[:count]
        ]

    def figures(self, num_suspects: int) -> dict[str, Any]:
        """Return what `tokenlabel inspect` reports."""
        suspects = [asdict(suspect) for suspect in self.suspects(num_suspects)]
        return {"num_images": len(self.keys), "agreement": self.agreement, "suspects": suspects}

    def save(self, path: str | Path) -> None:
        """Write `pred_probs`, `labels`, `keys` and `class_names` to an .npz file, as cleanlab's functions name them."""
        file = BytesIO()
        np.savez_compressed(
            file, pred_probs=self.probs, labels=self.class_ids, keys=self.keys, class_names=self.class_names
        )
        write_whole(Path(path), [file.getvalue()])


def predict_out_of_fold(
    source: ImageSource, config: FitConfig, *, device: torch.device | str | None = None
) -> FoldPredictions:
    """Return the predictions of heads, fitted as `fit_head` does from labels, for images that they were fitted without.

    Keeps the vectors of all images, in half precision. Raises ModelError if no class has five images that can be read,
    or if there is only one class.
    """
    refuse_single_class(source, "--out-of-fold")
    found, keys = load_vectors(source, config, usable_device(device)).of_images(
        np.flatnonzero(has_classes(source)).tolist()
    )
    class_of = dict(zip(source.keys, source.class_ids.tolist(), strict=True))
    truth = torch.tensor([class_of[key] for key in keys], device=found.device)
    names = list(source.class_names)
    probs = fit_folds(found, truth, num_classes=len(names), seed=config.seed)
    return FoldPredictions(keys, truth.cpu().numpy(), probs.cpu().numpy(), names)


def fit_folds(
    vectors: Float[Tensor, "n D"], class_ids: Int[Tensor, " n"], *, num_classes: int, seed: int = 0
) -> Float[Tensor, "n C"]:
    """Return the class probabilities of each vector by a linear head that was fitted on the other folds.

    Raises ModelError if no class has as many examples as there are folds.
    """
    fold_of = folds(class_ids.cpu(), seed=seed).to(class_ids.device)
    if int(fold_of.max()) + 1 < NUM_FOLDS:
        raise ModelError(
            f"--out-of-fold: no class has {NUM_FOLDS} images that can be read, so labels cannot be left out in turn"
        )
    ones = torch.ones(len(class_ids), device=class_ids.device)
    examples = Examples(vectors[:, None], class_ids, ones, num_classes)
    # One decay for all folds, chosen on the second fold by heads fitted on the third to the last. By cross-entropy:
    # these heads are used for the probability of a label.
    judge = examples.of(fold_of == 1)
    decay = choose_decay(examples.of(fold_of > 1), lambda fit: cross_entropy(fit, judge)).decay
    probs = vectors.new_empty(len(vectors), num_classes, dtype=torch.float32)
    for fold in range(NUM_FOLDS):
        fit = fit_linear(examples.of(fold_of != fold), decay)
        probs[fold_of == fold] = fit.logits(vectors[fold_of == fold]).softmax(dim=1)
    return probs


def folds(class_ids: Int[Tensor, " n"], *, seed: int) -> Int[Tensor, " n"]:
    """Return the fold of each image, 0 to 4, drawn so that each class is divided evenly."""
    fold_of = torch.empty_like(class_ids)
    generator = torch.Generator().manual_seed(seed)
    for class_id in class_ids.unique():
        rows = (class_ids == class_id).nonzero()[:, 0]
        fold_of[rows[torch.randperm(len(rows), generator=generator)]] = torch.arange(len(rows)) % NUM_FOLDS
    return fold_of
