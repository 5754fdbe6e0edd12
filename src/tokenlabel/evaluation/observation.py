"""How good a model is: evaluators over a set of images, in one pass, in one process or in many."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool
from PIL import Image
from torch import Tensor

from tokenlabel.data.augment import EvalTransform
from tokenlabel.data.batches import Batch, ImageSource, TokenLabelDataset, normalize_images
from tokenlabel.data.sources import open_images
from tokenlabel.evaluation.evaluators import Accuracy, Calibration, Evaluator, Seen, TokenTruth, object_tokens
from tokenlabel.labels.store import LabelStore
from tokenlabel.method.alignment import align, collate_score_maps
from tokenlabel.method.geometry import View, stack_views
from tokenlabel.method.scores import ScoreMap, from_mask
from tokenlabel.method.targets import TokenTargets
from tokenlabel.models import Inference, Outputs, TokenModel
from tokenlabel.runtime.distributed import Ranks
from tokenlabel.training.recipe import Recipe
from tokenlabel.training.run_folder import sound_images

_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Figures over a set of images; shares are in [0, 1]."""

    num_images: int
    top1: float
    top5: float
    loss: float
    """Mean cross entropy against the images' classes."""
    ece: float
    """Expected calibration error, 15 equal bins of confidence."""
    images_per_s: float
    token_accuracy: float | None = None
    """Share of the tokens that show an object whose most probable class is the object's, where masks are known."""
    token_miou: float | None = None
    """Mean over classes of the intersection over union of these tokens."""
    num_tokens_judged: int | None = None

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
        except Exception as error:  # Pillow's decoders raise whatever their parsing runs into
            raise ValueError(f"{path}: the mask of {key} cannot be read ({error})") from error
        if mask.ndim != 2:
            raise ValueError(f"{path}: a mask has one channel of class ids, this one has shape {mask.shape}")
        return from_mask(mask, num_classes=self.num_classes, name=str(path))


def evaluate(
    model: TokenModel,
    batches: Iterable[Batch],
    *,
    inference: Inference,
    device: torch.device,
    precision: str,
    ranks: Ranks = Ranks(),  # noqa: B008  (immutable)
) -> Evaluation:
    """Evaluate a model on batches of images, each counted once, over all ranks.

    Where the batches carry score maps (true masks), the tokens are held against them (see `TokenTruth`).
    """
    evaluators: list[Evaluator] = [Accuracy(), Calibration(), TokenTruth()]
    figures = observe(
        model, batches, {inference: evaluators}, device=device, precision=precision, ranks=ranks
    )
    return Evaluation(**figures[inference])


@runtime_checkable
class Predictor(Protocol):
    """A network that predicts: any `TokenModel`, or one that only classifies."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def eval(self) -> Any:
        """Set evaluation mode."""
        ...

    def __call__(self, images: Tensor, /) -> Outputs:
        """Return the outputs of normalised images [B, 3, height, width]."""
        ...


@torch.inference_mode()
def observe(
    model: Predictor,
    batches: Iterable[Batch],
    evaluators: Mapping[Inference, Sequence[Evaluator]],
    *,
    device: torch.device,
    precision: str,
    ranks: Ranks = Ranks(),  # noqa: B008  (immutable)
    competing: Bool[Tensor, " C"] | None = None,
) -> dict[Inference, dict[str, Any]]:
    """Show batches to evaluators; return for each way to predict the figures of its evaluators, and images_per_s.

    The model runs once a batch. `batches`: this rank's part of the images. `competing`: the classes of which
    predictions choose; all if None.
    """
    model.eval()
    dtype = _DTYPES[precision]
    out = None if competing is None else ~competing.to(device)
    started, num_images = time.perf_counter(), 0
    for cpu_batch in batches:
        batch = cpu_batch.to(device)
        images = normalize_images(batch.images, mean=model.mean, std=model.std)
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            outputs = model(images)
            predictions = {inference: outputs.logits(inference).float() for inference in evaluators}
            said = outputs.token_logits.argmax(dim=2) if batch.score_maps is not None else None
        for inference, logits in predictions.items():
            chosen = logits if out is None else logits.masked_fill(out, -torch.inf)
            for evaluator in evaluators[inference]:
                evaluator.add(Seen(batch, outputs.grid, chosen, said))
        num_images += len(batch.images)
    spent = ranks.all((num_images, time.perf_counter() - started))
    speed = {"images_per_s": sum(n for n, _ in spent) / max(seconds for _, seconds in spent)}
    return {inference: _figures(of_one, ranks) | speed for inference, of_one in evaluators.items()}


def _figures(evaluators: Sequence[Evaluator], ranks: Ranks) -> dict[str, Any]:
    for evaluator in evaluators:
        evaluator.join(ranks)
    return {name: value for evaluator in evaluators for name, value in evaluator.figures()}


def agreement(guess: TokenTargets, truth: TokenTargets, num_classes: int) -> tuple[int, int]:
    """Return how many object tokens `guess` (aligned scores of a teacher) gets right, and how many it labels.

    A token that lies outside what the teacher saw has no label, and is not judged.
    """
    objects, classes = object_tokens(truth)
    objects &= guess.weight > 0
    right = objects & (guess.dense(num_classes).argmax(dim=2) == classes)
    return int(right.sum()), int(objects.sum())


def mask_agreement(store: LabelStore, masks: Path) -> float:
    """Return the share of object cells of a store's maps whose most probable class is that of the true mask.

    `masks`: a folder of true dense labels, laid out like the images.
    """
    num_classes = store.manifest.num_classes
    truth_of = MaskFolder(masks, num_classes=num_classes)
    right = total = 0
    for key in store.keys():  # noqa: SIM118  (a store is no dict)
        score_map = store[key]
        height, width, _ = score_map.codes.shape
        seen = torch.from_numpy(stack_views([View.crop(score_map.region)]))  # places are then the map's cells
        guess, truth = (
            align(collate_score_maps([m]), seen, (height, width)) for m in (score_map, truth_of[key])
        )
        counts = agreement(guess, truth, num_classes)
        right, total = right + counts[0], total + counts[1]
    if not total:
        raise ValueError(f"{masks}: no mask shows an object in any cell of the maps")
    return right / total


def evaluation_set(
    recipe: Recipe,
    *,
    class_names: list[str],
    data: Path | None = None,
    masks: Path | None = None,
    sound: Callable[[ImageSource], ImageSource] | None = None,
) -> TokenLabelDataset:
    """Return the images that a recipe evaluates on, or those in the folder `data`, as the model sees them.

    `masks`: a folder of true dense labels, laid out like the images, to hold the tokens against. `sound`: tells the
    images that decode; by default they are looked at as the recipe says.
    Raises ValueError if there are no images or their classes are not those of the model.
    """
    folder = data or recipe.data.val
    if folder is None:
        raise ValueError("the run has no val images of its own; name images with --data")
    if sound is None:
        skip_broken, check = recipe.data.skip_broken, recipe.data.check
        sound = partial(sound_images, skip_broken=skip_broken, check=check, option=None)
    source = sound(open_images(folder))
    if source.class_names != class_names:
        raise ValueError(
            f"{folder} has {len(source.class_names)} classes ({', '.join(source.class_names[:3])}, ...), the model "
            f"{len(class_names)} ({', '.join(class_names[:3])}, ...); they must be the same, in folders of these names"
        )
    transform = EvalTransform(recipe.model.size_px, crop_fraction=recipe.eval.crop_fraction)
    truth = MaskFolder(masks, num_classes=len(class_names)) if masks else None
    return TokenLabelDataset(source, transform, seed=recipe.seed, store=truth)
