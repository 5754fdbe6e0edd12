"""What a classifier's run writes down while it has its data: its first batch, and its answers to the val images."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
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
    """Return the first images of a part of a batch as the step is trained on them: erased, mixed, with their targets.

    Everything random in it is a function of the part, so drawing it once more changes nothing. `originals`: the
    images before augmentation, of as many as are to be shown.
    """
    model, supervision = step.model, step.supervision
    images = normalize_images(batch.images, mean=model.mean, std=model.std)
    grid = model.grid_for((images.shape[2], images.shape[3]))
    images, erased, mix = erase_and_draw(images, grid, part, erasing=step.erasing, mixing=step.mixing)
    # What a token would learn without the mix, and what it is trained on.
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
    """Return the most probable class of each token (h, w) of an image of a batch."""
    ids, probs = _most_probable(targets, i)
    return top_classes(ids.reshape(grid), probs.reshape(grid), num_classes)


class Answering(Evaluator):
    """Keeps what a model says of each image, and of every token of some.

    `shown`: the keys of these images; `of_tokens`: whether tokens were trained to say something.
    """

    def __init__(self, shown: Collection[str], *, of_tokens: bool) -> None:
        super().__init__()
        self.shown, self.of_tokens = {*shown}, of_tokens
        self.answers: dict[str, tuple[int, int, float]] = {}
        self.pixels: dict[str, NDArray[np.uint8]] = {}
        self.maps: dict[str, ClassGrid] = {}

    def add(self, predictions: Predictions) -> None:
        """Keep the answers to a batch."""
        batch, outputs = predictions.batch, predictions.outputs
        if predictions.logits.shape[1]:  # else there are no classes to answer with
            probs, guesses = predictions.logits.softmax(dim=1).max(dim=1)
            truth = torch.where(batch.has_class, batch.class_ids, -1)
            rows = zip(truth.tolist(), guesses.tolist(), probs.tolist(), strict=True)
            self.answers |= dict(zip(batch.keys, rows, strict=True))
        for i, key in enumerate(batch.keys):
            if key not in self.shown:
                continue
            self.pixels[key] = batch.images[i].permute(1, 2, 0).cpu().numpy()
            if self.of_tokens and outputs is not None:
                # In float32, as the head is: evaluators are called outside of autocast.
                logits = outputs.token_head(outputs.tokens[i : i + 1].float())[0]
                self.maps[key] = map_of_logits(logits.unflatten(0, outputs.grid))

    def join(self, ranks: Ranks) -> None:
        """Put together what all ranks kept."""
        self.merge(ranks.all_gather((self.answers, self.pixels, self.maps)))

    def merge(self, kept: Iterable[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]) -> None:
        """Add what others kept of other images."""
        for answers, pixels, maps in kept:
            self.answers |= answers
            self.pixels |= pixels
            self.maps |= maps

    def figures(self) -> Iterator[tuple[str, float]]:
        """Yield no figures."""
        yield from ()

    @torch.inference_mode()
    def ask_classifier(self, model: TokenModel, name: str, autocast: torch.autocast) -> None:
        """Keep what the classifier of a model says when it is moved from location to location, if it can be."""
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
        """Write the answers and the pictures into a run folder. `keys`: of all images, in order."""
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
    """Return the most probable class of each location."""
    probs, ids = logits.float().softmax(dim=2).max(dim=2)
    return top_classes(ids.cpu().numpy(), probs.cpu().numpy(), logits.shape[2])


def shown_keys(keys: Sequence[str]) -> list[str]:
    """Return the keys of the val images that are drawn: spread over all, always the same ones."""
    chosen = np.linspace(0, len(keys) - 1, min(NUM_VAL, len(keys))).astype(int)
    return [str(keys[i]) for i in chosen.tolist()]


def _most_probable(targets: TokenTargets, i: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the class with the highest target of each token of an image, and the target (times weight)."""
    classes, place = targets.classes[i].unique(return_inverse=True)  # a mix may name a class twice
    excess = targets.excess[i]  # [N, U]
    sums = excess.new_zeros(len(excess), len(classes)).index_add(1, place, excess)
    best, entry = sums.max(dim=1)
    return classes[entry].cpu().numpy(), (best + targets.floor[i]).cpu().numpy()


def _class_target(targets: TokenTargets, i: int, names: Sequence[str]) -> str:
    """Return the two classes that the class token of an image is trained most towards."""
    classes, place = targets.classes[i].unique(return_inverse=True)
    sums = targets.excess.new_zeros(len(classes)).index_add(0, place, targets.excess[i, 0])
    probs, entries = sums.topk(min(2, len(sums)))
    floor = targets.floor[i, 0]
    shares = [(int(classes[e]), float(p + floor)) for p, e in zip(probs, entries, strict=True) if p > 0]
    told = ", ".join(f"{with_words(names[c])} {share:.2f}" for c, share in shares)
    return f"target of the class token: {told}" if told else ""


def _mixed(images: Float[Tensor, "B 3 height width"], mix: MixPlan, i: int) -> Float[Tensor, "3 height width"]:
    pair, mask = images[[i, int(mix.partner[i])]], mix.mask[[i, i]]
    return mix_images(pair, MixPlan(mask, torch.tensor([1, 0], device=pair.device), mix.on_tokens))[0]


def _pixels(image: Float[Tensor, "3 height width"], model: TokenModel) -> NDArray[np.uint8]:
    mean, std = (torch.tensor(numbers, device=image.device)[:, None, None] for numbers in (model.mean, model.std))
    pixels = ((image * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(1, 2, 0).cpu().numpy()


def _score_map(maps: ScoreMapBatch, i: int) -> ScoreMap:
    """Return the map of an image as it was before it was padded for its batch."""
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
