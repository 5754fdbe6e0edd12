"""Albums of a classifier's run: its first batch with its targets, and its predictions for the val images."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from numpy.typing import NDArray
from torch import Tensor

from tokenlabel.core.batch import Batch, ScoreMapBatch, normalize_images
from tokenlabel.core.geometry import Box
from tokenlabel.core.mix import MixPlan, mix_images
from tokenlabel.core.scores import ScoreMap
from tokenlabel.core.step import Part, TrainStep, erase_and_draw, make_targets
from tokenlabel.core.targets import TokenTargets
from tokenlabel.data.class_names import with_words
from tokenlabel.drawing.pictures import PICTURES_FOLDER, Album, ClassGrid, Tile, make_album, top_classes
from tokenlabel.evaluation.answers import Answers
from tokenlabel.evaluation.evaluators import Evaluator, Predictions
from tokenlabel.labels.presentation import map_of_scores
from tokenlabel.models import TimmAdapter, TokenModel
from tokenlabel.runtime.distributed import Ranks
from tokenlabel.runtime.errors import ModelError
from tokenlabel.teachers.dense import ClassifierNetwork

NUM_TRAIN, NUM_VAL = 6, 24


@torch.no_grad()
def batch_album(
    step: TrainStep,
    batch: Batch,
    part: Part,
    originals: Sequence[UInt8[NDArray[np.uint8], "_ _ 3"]],
    *,
    class_names: Sequence[str],
    token_class_names: Sequence[str],
) -> Album:
    """Return an album of the first images of a micro-batch as the step trains on them: erased, mixed, with targets.

    `originals`: those images before augmentation. All random numbers are functions of `part`, so drawing them again
    changes nothing.
    """
    model, supervision = step.model, step.supervision
    images = normalize_images(batch.images, mean=model.mean, std=model.std)
    grid = model.grid_for((images.shape[2], images.shape[3]))
    images, erased, mix = erase_and_draw(images, grid, part, erasing=step.erasing, mixing=step.mixing)
    # The targets before mixing, for the picture, and those of training.
    alone = make_targets(batch, supervision, grid, erased=erased)
    mixed = make_targets(batch, supervision, grid, mix=mix, erased=erased)
    pictures = []
    for i, original in enumerate(originals):
        tiles = []
        if supervision.stored and batch.score_maps is not None and batch.score_maps.are_known()[i]:
            tiles.append(Tile(original, "the teacher's map", map_of_scores(_score_map(batch.score_maps, i))))
        crop = _pixels(images[i], model)
        tiles.append(Tile(crop, "augmented image"))
        if alone.tokens is not None:
            classes = map_of_targets(alone.tokens, i, grid, len(token_class_names))
            tiles.append(Tile(crop, "targets of its tokens", classes))
        if mix is not None:
            partner = int(mix.partner[i])
            tiles.append(Tile(_pixels(images[partner], model), f"partner {batch.keys[partner]}"))
            blend = _pixels(_mixed(images, mix, i), model)
            classes = mixed.tokens and map_of_targets(mixed.tokens, i, grid, len(token_class_names))
            tiles.append(Tile(blend, "mixed, as trained on", classes))
        pictures.append((tiles, {"key": batch.keys[i], "caption": _class_target(mixed.class_token, i, class_names)}))
    return make_album(pictures, [*map(with_words, token_class_names)])


def map_of_targets(targets: TokenTargets, i: int, grid: tuple[int, int], num_classes: int) -> ClassGrid:
    """Return the most probable class of each token (h, w) of image `i` of a batch, with its target times weight."""
    classes, excess = _excess(targets, i)
    best, entry = excess.max(dim=1)
    ids, probs = classes[entry].cpu().numpy(), (best + targets.floor[i]).cpu().numpy()
    return top_classes(ids.reshape(grid), probs.reshape(grid), num_classes)


def _excess(targets: TokenTargets, i: int) -> tuple[Int[Tensor, " U"], Float[Tensor, "N U"]]:
    """Return the classes of an image's targets, each once, and the excess of each token for each of them."""
    classes, place = targets.classes[i].unique(return_inverse=True)  # after mixing a class may have two entries
    excess = targets.excess[i]
    return classes, excess.new_zeros(len(excess), len(classes)).index_add(1, place, excess)


class Answering(Evaluator):
    """Collects the prediction for each image, and for the tokens of the images whose keys are in `shown`.

    `of_tokens`: the token head was trained.
    """

    def __init__(self, shown: Collection[str], *, of_tokens: bool) -> None:
        super().__init__()
        self.shown, self.of_tokens = {*shown}, of_tokens
        self.answers: dict[str, tuple[int, int, float]] = {}
        self.pixels: dict[str, NDArray[np.uint8]] = {}
        self.maps: dict[str, ClassGrid] = {}

    def add(self, predictions: Predictions) -> None:
        """Keep the predictions for a batch."""
        batch, outputs = predictions.batch, predictions.outputs
        if predictions.logits.shape[1]:  # the model has a class head
            probs, guesses = predictions.logits.softmax(dim=1).max(dim=1)
            truth = torch.where(batch.has_class, batch.class_ids, -1)
            rows = zip(truth.tolist(), guesses.tolist(), probs.tolist(), strict=True)
            self.answers |= dict(zip(batch.keys, rows, strict=True))
        for i, key in enumerate(batch.keys):
            if key not in self.shown:
                continue
            self.pixels[key] = batch.images[i].permute(1, 2, 0).cpu().numpy()
            if self.of_tokens and outputs is not None:
                # In float32, like the head's weights: evaluators are called outside autocast.
                logits = outputs.token_head(outputs.tokens[i : i + 1].float())[0]
                self.maps[key] = map_of_logits(logits.unflatten(0, outputs.grid))

    def join(self, ranks: Ranks) -> None:
        """Collect the predictions of all ranks."""
        for answers, pixels, maps in ranks.all_gather((self.answers, self.pixels, self.maps)):
            self.answers |= answers
            self.pixels |= pixels
            self.maps |= maps

    def figures(self) -> Iterator[tuple[str, float]]:
        """Yield nothing: this evaluator has no figures."""
        yield from ()

    @torch.inference_mode()
    def ask_classifier(self, model: TokenModel, name: str, autocast: torch.autocast) -> None:
        """Replace the maps by the classifier applied at every location, as dense teachers do, if the model allows."""
        device, pixels = next(model.parameters()).device, np.stack([*self.pixels.values()])
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(device)
        network = ClassifierNetwork(model.backbone if isinstance(model, TimmAdapter) else model, name=name)
        try:
            with autocast:
                found = network(normalize_images(images, mean=model.mean, std=model.std)).locations
        except ModelError:
            return
        self.maps = {key: map_of_logits(logits) for key, logits in zip(self.pixels, found, strict=True)}

    def write(
        self, run: Path, keys: Sequence[str], class_names: Sequence[str], token_class_names: Sequence[str], **more: Any
    ) -> None:
        """Write predictions and pictures into a run folder. `keys`: of all images, in order."""
        names = [*map(with_words, class_names)]
        if self.answers:
            truth, guesses, probs = map(np.array, zip(*(self.answers[key] for key in keys), strict=True))
            Answers(tuple(keys), truth, guesses, probs, tuple(class_names)).write(run)
        pictures = []
        for key in (key for key in keys if key in self.pixels):
            facts = {"key": key, "caption": "", "answer": ""}
            if key in self.answers:
                own, guess, prob = self.answers[key]
                verdict = "" if own < 0 else ": right" if own == guess else ": wrong"
                facts["answer"] = f"{names[guess]}, {prob:.0%}{verdict}"
                facts["caption"] = "" if own < 0 else f"class {names[own]}"
            tiles = [Tile(self.pixels[key], "image")]
            tiles += [Tile(self.pixels[key], "prediction", self.maps[key])] if key in self.maps else []
            pictures.append((tiles, facts))
        album = make_album(pictures, [*map(with_words, token_class_names)])
        album.write(run / PICTURES_FOLDER, "val", **more)


def map_of_logits(logits: Float[Tensor, "h w C"]) -> ClassGrid:
    """Return the most probable class of each location and its probability."""
    probs, ids = logits.float().softmax(dim=2).max(dim=2)
    return top_classes(ids.cpu().numpy(), probs.cpu().numpy(), logits.shape[2])


def shown_keys(keys: Sequence[str]) -> list[str]:
    """Return the keys of the val images in the album, evenly spaced: the same ones in every evaluation."""
    chosen = np.linspace(0, len(keys) - 1, min(NUM_VAL, len(keys))).astype(int)
    return [str(keys[i]) for i in chosen.tolist()]


def _class_target(targets: TokenTargets, i: int, names: Sequence[str]) -> str:
    """Return the two classes with the highest class target of an image, as text."""
    classes, excess = _excess(targets, i)
    probs, entries = excess[0].topk(min(2, len(classes)))
    floor = targets.floor[i, 0]
    shares = [(int(classes[e]), float(p + floor)) for p, e in zip(probs, entries, strict=True) if p > 0]
    text = ", ".join(f"{with_words(names[c])} {share:.2f}" for c, share in shares)
    return f"target of the class token: {text}" if text else ""


def _mixed(images: Float[Tensor, "B 3 height width"], mix: MixPlan, i: int) -> Float[Tensor, "3 height width"]:
    # A batch of this image and its partner: mixing all images for one picture would be slow.
    pair, mask = images[[i, int(mix.partner[i])]], mix.mask[[i, i]]
    return mix_images(pair, MixPlan(mask, torch.tensor([1, 0], device=pair.device), mix.on_tokens))[0]


def _pixels(image: Float[Tensor, "3 height width"], model: TokenModel) -> NDArray[np.uint8]:
    mean, std = (torch.tensor(numbers, device=image.device)[:, None, None] for numbers in (model.mean, model.std))
    pixels = ((image * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(1, 2, 0).cpu().numpy()


def _score_map(maps: ScoreMapBatch, i: int) -> ScoreMap:
    """Return the score map of an image without the padding of its batch."""
    rows, columns = maps.shapes[i]
    left, top, right, bottom = maps.regions[i].tolist()
    return ScoreMap(
        palette=maps.classes[i].cpu().numpy(),
        codes=maps.codes[i, :rows, :columns].cpu().numpy().astype(np.uint32),
        probs=maps.probs[i, :rows, :columns].cpu().numpy(),
        num_classes=maps.num_classes,
        region=Box(left, top, right, bottom),
        kind=maps.kind,
    )
