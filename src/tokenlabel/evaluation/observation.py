"""How good a model is: evaluators over a set of images, in one pass, in one process or in many."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tokenlabel.core.batch import Batch, normalize_images
from tokenlabel.core.config import Inference
from tokenlabel.core.kernels import blocks
from tokenlabel.data.augment import EvalTransform
from tokenlabel.data.batches import TokenLabelDataset
from tokenlabel.data.imagenet import as_classes_of
from tokenlabel.data.images import ImageSource, has_classes
from tokenlabel.data.sources import open_images
from tokenlabel.evaluation.evaluators import Evaluator, Predictions
from tokenlabel.evaluation.masks import MaskFolder
from tokenlabel.models import Outputs
from tokenlabel.runtime.distributed import Precision, Ranks, autocast, usable_device
from tokenlabel.training.recipe import Recipe
from tokenlabel.training.run_folder import sound_images


@torch.inference_mode()
def observe(
    model: Any,
    batches: Iterable[Batch],
    evaluators: Mapping[Inference, Sequence[Evaluator]],
    *,
    device: torch.device | str,
    precision: Precision = "fp32",
    ranks: Ranks = Ranks(),  # noqa: B008  (immutable)
    competing: Bool[Tensor, " C"] | None = None,
) -> dict[Inference, dict[str, Any]]:
    """Show batches to evaluators; return for each way to predict the figures of its evaluators, and images_per_s.

    The model runs once a batch; it is any that returns `Outputs`. `batches`: this rank's part of the images.
    `competing`: the classes of which predictions choose; all if None.
    """
    model.eval()
    device = usable_device(device)
    forward_pass = autocast(device, precision)
    out = None if competing is None else ~competing.to(device)
    started, num_images = time.perf_counter(), 0
    for cpu_batch in batches:
        batch = cpu_batch.to(device)
        images = normalize_images(batch.images, mean=model.mean, std=model.std)
        with forward_pass:
            outputs = model(images)
            logits_of = {inference: outputs.logits(inference).float() for inference in evaluators}
            token_classes = classes_of_tokens(outputs) if batch.score_maps is not None else None
        for inference, logits in logits_of.items():
            chosen = logits if out is None else logits.masked_fill(out, -torch.inf)
            for evaluator in evaluators[inference]:
                evaluator.add(Predictions(batch, outputs.grid, chosen, token_classes, outputs))
        num_images += len(batch.images)
    spent = ranks.all_gather((num_images, time.perf_counter() - started))  # the slowest rank sets the speed
    speed = {"images_per_s": sum(n for n, _ in spent) / max(seconds for _, seconds in spent)}
    return {inference: _figures(of_one, ranks) | speed for inference, of_one in evaluators.items()}


def classes_of_tokens(outputs: Outputs) -> Int[Tensor, "B N"]:
    """Return the most probable class of each token, without the logits of all of them: of 65,536 words they are GBs."""
    tokens, head = outputs.tokens, outputs.token_head
    num_numbers = tokens.shape[1] * head(tokens[:1, :1]).shape[2]
    slices = blocks(len(tokens), num_numbers, tokens.device)
    return torch.cat([head(tokens[images]).argmax(dim=2) for images in slices])


def _figures(evaluators: Sequence[Evaluator], ranks: Ranks) -> dict[str, Any]:
    for evaluator in evaluators:
        evaluator.join(ranks)
    return {name: value for evaluator in evaluators for name, value in evaluator.figures()}


def evaluation_set(
    recipe: Recipe,
    *,
    class_names: Sequence[str],
    data: str | Path | None = None,
    masks: str | Path | None = None,
    sound: Callable[[ImageSource], ImageSource] | None = None,
) -> TokenLabelDataset:
    """Return the images that a recipe evaluates on, or those in the folder `data`, as the model sees them.

    `class_names`: of the model; none where it has no class head, and images of any layout do.
    `masks`: a folder of true dense labels, laid out like the images, to hold the tokens against. `sound`: tells the
    images that decode; by default they are looked at as the recipe says.
    Raises ValueError if there are no images or one has a class that the model does not have.
    """
    folder = data or recipe.data.val
    if folder is None:
        raise ValueError("the run has no val images of its own; name images with --data")
    if sound is None:
        skip_broken, check = recipe.data.skip_broken, recipe.data.check
        sound = partial(sound_images, skip_broken=skip_broken, check=check, option=None)
    source = sound(open_images(folder, classes=bool(class_names)))
    if class_names and (has_classes(source).any() or not recipe.eval.labels):
        source = as_classes_of(source, class_names, len(class_names), folder)
    transform = EvalTransform(recipe.model.img_size, crop_fraction=recipe.eval.crop_fraction)
    truth = MaskFolder(masks, num_classes=len(class_names)) if masks else None
    return TokenLabelDataset(source, transform, seed=recipe.seed, store=truth)
