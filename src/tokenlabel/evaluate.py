"""How good a model is: accuracy and loss of its predictions, and what its tokens say about their places."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from tokenlabel.alignment import align, collate_score_maps
from tokenlabel.augment import EvalTransform
from tokenlabel.checkpoint import TrainedModel
from tokenlabel.data import (
    Batch,
    EvalBatchSampler,
    TokenLabelDataset,
    check_images,
    make_loader,
    normalize_images,
)
from tokenlabel.geometry import View, stack_views
from tokenlabel.models import Inference, TokenModel
from tokenlabel.recipe import Recipe
from tokenlabel.scores import ScoreMap, from_mask
from tokenlabel.sources import open_images
from tokenlabel.store import LabelStore
from tokenlabel.targets import TokenTargets

# A token shows an object, and can be right or wrong about it, if its mask covers this much of the token's cell.
OBJECT_SHARE = 0.25


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Figures over a set of images; shares are in [0, 1]."""

    num_images: int
    top1: float
    top5: float
    loss: float
    """Mean cross entropy against the images' classes."""
    images_per_s: float
    num_object_tokens: int = 0
    """Tokens that show a labelled object, where the truth of places is known."""
    token_agreement: float | None = None
    """Share of these whose most probable class is the object's."""

    def as_dict(self) -> dict[str, Any]:
        """Return the figures under their names, without those that were not measured."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class MaskFolder:
    """True dense labels: a folder of masks laid out like the images, read like a label store.

    The mask of `3/0001.jpg` is `3/0001.png`: one channel of class ids, 255 where no class is shown.
    """

    def __init__(self, folder: Path, *, num_classes: int) -> None:
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder of masks")
        self._folder, self.num_classes = folder, num_classes

    def __getitem__(self, key: str) -> ScoreMap:
        """Return the mask of an image as a score map of certainties."""
        path = (self._folder / key).with_suffix(".png")
        try:
            mask = np.asarray(Image.open(path))
        except OSError as error:
            raise ValueError(f"{path}: the mask of {key} cannot be read ({error})") from error
        if mask.ndim != 2:
            raise ValueError(f"{path}: a mask has one channel of class ids, this one has shape {mask.shape}")
        return from_mask(mask, num_classes=self.num_classes, name=str(path))


@torch.inference_mode()
def evaluate(
    model: TokenModel, batches: Iterable[Batch], *, inference: Inference, device: torch.device, precision: str
) -> Evaluation:
    """Evaluate a model on batches of images, each counted once.

    Where the batches carry score maps (true masks, or a teacher's), the tokens are held against them: the class
    that a token finds most probable against the one that covers most of its cell, over the tokens of which a
    class covers at least `OBJECT_SHARE`.
    """
    model.eval()
    sums: dict[str, float] = dict.fromkeys(("images", "top1", "top5", "loss", "objects", "agreeing"), 0.0)
    started = time.perf_counter()
    for cpu_batch in batches:
        batch = cpu_batch.to(device)
        images = normalize_images(batch.images, mean=model.mean, std=model.std)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            outputs = model(images)
            logits = outputs.logits(inference).float()
            said = outputs.token_logits.argmax(dim=2) if batch.score_maps is not None else None
        ranks = _rank_of_class(logits, batch.class_ids)
        sums["images"] += len(ranks)
        sums["top1"] += float((ranks < 1).sum())
        sums["top5"] += float((ranks < 5).sum())
        sums["loss"] += float(F.cross_entropy(logits, batch.class_ids, reduction="sum"))
        if batch.score_maps is not None and said is not None:
            truth = align(batch.score_maps, batch.views, outputs.grid)
            objects, classes = object_tokens(truth)
            sums["objects"] += float(objects.sum())
            sums["agreeing"] += float((objects & (said == classes)).sum())
    return Evaluation(
        num_images=int(sums["images"]),
        top1=sums["top1"] / sums["images"],
        top5=sums["top5"] / sums["images"],
        loss=sums["loss"] / sums["images"],
        images_per_s=sums["images"] / (time.perf_counter() - started),
        num_object_tokens=int(sums["objects"]),
        token_agreement=sums["agreeing"] / sums["objects"] if sums["objects"] else None,
    )


def object_tokens(truth: TokenTargets) -> tuple[Bool[Tensor, "B N"], Int[Tensor, "B N"]]:
    """Return which tokens show an object, by targets aligned from true masks, and the class of each."""
    share, entry = truth.excess.max(dim=2)  # [B, N]
    return share >= OBJECT_SHARE, truth.classes.gather(1, entry)


def agreement(guess: TokenTargets, truth: TokenTargets, num_classes: int) -> tuple[int, int]:
    """Return how many object tokens `guess` (aligned scores of a teacher) gets right, and how many there are."""
    objects, classes = object_tokens(truth)
    right = objects & (guess.dense(num_classes).argmax(dim=2) == classes)
    return int(right.sum()), int(objects.sum())


def mask_agreement(store: LabelStore, masks: Path) -> float:
    """Return the share of object cells of a store's maps whose most probable class is that of the true mask.

    `masks`: a folder of true dense labels, laid out like the images.
    """
    num_classes = store.manifest.num_classes
    truth_of = MaskFolder(masks, num_classes=num_classes)
    whole = torch.from_numpy(stack_views([View.identity()]))
    right = total = 0
    for key in store.keys():  # noqa: SIM118  (a store is no dict)
        score_map = store[key]
        height, width, _ = score_map.codes.shape
        guess, truth = (
            align(collate_score_maps([m]), whole, (height, width)) for m in (score_map, truth_of[key])
        )
        counts = agreement(guess, truth, num_classes)
        right, total = right + counts[0], total + counts[1]
    if not total:
        raise ValueError(f"{masks}: no mask shows an object in any cell of the maps")
    return right / total


def _rank_of_class(logits: Float[Tensor, "B C"], class_ids: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
    """Return how many classes come before the image's own; ties count against it."""
    own = logits.gather(1, class_ids[:, None])
    return (logits >= own).sum(dim=1) - 1


def evaluation_set(
    recipe: Recipe, *, class_names: list[str], data: Path | None = None, masks: Path | None = None
) -> TokenLabelDataset:
    """Return the images that a recipe evaluates on, or those in the folder `data`, as the model sees them.

    `masks`: a folder of true dense labels, laid out like the images, to hold the tokens against.
    Raises ValueError if there are no images or their classes are not those of the model.
    """
    folder = data or recipe.data.val
    if folder is None:
        raise ValueError("the run has no val images of its own; name images with --data")
    source = check_images(open_images(folder), skip_broken=recipe.data.skip_broken)
    if source.class_names != class_names:
        raise ValueError(
            f"{folder} has {len(source.class_names)} classes ({', '.join(source.class_names[:3])}, ...), the model "
            f"{len(class_names)} ({', '.join(class_names[:3])}, ...); they must be the same, in folders of these names"
        )
    transform = EvalTransform(recipe.model.size_px, crop_fraction=recipe.eval.crop_fraction)
    truth = MaskFolder(masks, num_classes=len(class_names)) if masks else None
    return TokenLabelDataset(source, transform, seed=recipe.seed, store=truth)


def evaluate_run(
    trained: TrainedModel,
    dataset: TokenLabelDataset,
    *,
    inference: Inference | None,
    batch_size: int,
    num_workers: int,
    device: torch.device,
) -> dict[str, Any]:
    """Return the figures of a run's model on a data set that `evaluation_set` made.

    `inference`: which prediction counts; the recipe's if None.
    """
    inference = inference or trained.recipe.eval.inference
    sampler = EvalBatchSampler(num_images=len(dataset), batch_size=batch_size)
    evaluation = evaluate(
        trained.model.to(device),
        make_loader(dataset, sampler, num_workers=num_workers),
        inference=inference,
        device=device,
        precision=trained.recipe.precision,
    )
    return {"step": trained.step, "inference": inference.value, **evaluation.as_dict()}
