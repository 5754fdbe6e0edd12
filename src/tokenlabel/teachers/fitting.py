"""Fit a head on a backbone: from class labels, masks, class names, a file of embeddings, or from images alone.

The backbone, the expensive part, sees each image once. A sample of its vectors is kept, in half precision and of
bounded size (MAX_SAMPLE_BYTES, or proportional to the number of words), and the head is fitted on that.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokenlabel.data.class_names import read_class_names
from tokenlabel.data.images import ImageSource, has_classes
from tokenlabel.data.masks import COCO_SUFFIX, mask_names
from tokenlabel.data.sources import open_aloud, refuse_single_class
from tokenlabel.evaluation.masks import MaskFolder, stated_classes
from tokenlabel.runtime.coercion import coerced
from tokenlabel.runtime.distributed import usable_device
from tokenlabel.runtime.errors import ModelError
from tokenlabel.runtime.process import listed, say
from tokenlabel.teachers.backbone import load_backbone
from tokenlabel.teachers.heads import Head, read_about
from tokenlabel.teachers.options import HEAD_SUFFIX, MASKS, FitConfig, kind_of
from tokenlabel.teachers.solvers import (
    KEPT_MASS,
    Examples,
    LinearFit,
    choose_decay,
    cross_entropy,
    fit_linear,
    fit_words,
)
from tokenlabel.teachers.texts import head_of_embeddings
from tokenlabel.teachers.vectors import VECTORS_PER_IMAGE, Vectors, spread

# Vectors that words are fitted on. In half precision these are 64 bytes x words x width, or 131 kB x width.
VECTORS_PER_WORD, LEAST_VECTORS = 32, 1 << 16
# Of the vectors that heads from labels and masks are fitted on; some images are left out if there are too many.
MAX_SAMPLE_BYTES = 2 << 30
# The most that are taken from an image with a class label.
MAX_LOCATIONS = 64
# Share of the images on which the weight decay and the pooling are chosen.
HELD_OUT = 0.2


def fit_head(
    images: str | Path | ImageSource,
    file: str | Path,
    config: FitConfig,
    *,
    device: torch.device | str | None = None,
    overwrite: bool = False,
) -> Head:
    """Fit a head, write it to `file` (.safetensors) and return it; one fitted by the same config before is returned.

    Raises ModelError if the file holds another head, or if the images, labels or masks do not allow the fit; and what
    `annotate` raises for images and backbones.

    >>> config = tl.FitConfig(backbone="test_vit", weights="test_vit.safetensors", size=64, from_="labels")
    >>> tl.fit_head("images", "head.safetensors", config).class_names
    ('ant', 'bee')
    """
    config, file = coerced(config, FitConfig, name="config"), Path(file)
    asked = {**asdict(config), "images": str(images) if isinstance(images, (str, Path)) else _digest(images)}
    if (existing := _existing(file, asked, overwrite=overwrite)) is not None:
        return existing
    kind, device = kind_of(config.from_), usable_device(device)
    if kind in ("text", "file"):
        if not isinstance(images, (str, Path)):
            raise ModelError(f"--from {config.from_}: takes a file of class names in place of images")
        names = read_class_names(images)
        backbone = load_backbone(config.backbone, device, weights=config.weights, size=config.size)
        head = head_of_embeddings(config.from_, names, backbone, config.temperature)
    else:
        source = open_aloud(images) if isinstance(images, (str, Path)) else images
        masks = _check_masks(source, config) if kind == "masks" else None  # before anything is downloaded
        if kind == "labels":
            refuse_single_class(source, "--from labels")
        vectors = load_vectors(source, config, device)
        if masks is not None:
            head = _from_masks(vectors, config, *masks)
        else:
            head = _from_labels(vectors, config) if kind == "labels" else _from_words(vectors, config)
    head.fitted["asked"] = asked
    head.save(file)
    return head


def _digest(source: ImageSource) -> str:
    """Return what stands for a source in the description of a head: a hash of its keys and classes."""
    class_ids = np.where(has_classes(source), source.class_ids, -1)
    text = json.dumps([[*source.keys], class_ids.tolist(), [*source.class_names]])
    return f"blake2b:{blake2b(text.encode(), digest_size=16).hexdigest()}"


def load_vectors(source: ImageSource, config: FitConfig, device: torch.device) -> Vectors:
    """Load the backbone of a configuration and return the vectors of images by it."""
    return Vectors(
        backbone=load_backbone(config.backbone, device, weights=config.weights, size=config.size),
        source=source,
        precision=config.precision,
        batch_size=config.batch_size,
        num_workers=config.num_workers,
        seed=config.seed,
    )


def _existing(file: Path, asked: dict[str, Any], *, overwrite: bool) -> Head | None:
    """Return the head in a file if it was fitted with the same options; refuse to overwrite anything else."""
    if file.suffix != HEAD_SUFFIX:
        raise ModelError(f"{file}: a head is a {HEAD_SUFFIX} file; name one")
    if not file.exists():
        return None
    try:
        fitted = read_about(file)["fitted"]
    except ModelError as error:
        raise ModelError(f"{file}: exists and is no head; move it, or name another file") from error
    if overwrite:
        return None
    if others := [key for key, value in asked.items() if fitted.get("asked", {}).get(key) != value]:
        raise ModelError(
            f"{file}: holds a head that was fitted with other options ({listed(others)}); name another file, or "
            "--overwrite this one"
        )
    say(f"{file}: exists, fitted by the same command; --overwrite fits it again")
    return Head.load(file)


def _enough_words(num_vectors: int) -> int:
    return max(2, num_vectors // VECTORS_PER_WORD)


def _from_words(vectors: Vectors, config: FitConfig) -> Head:
    sample, num_images = vectors.locations(max(LEAST_VECTORS, VECTORS_PER_WORD * config.words))
    if len(sample) < config.words:
        raise ModelError(
            f"{num_images:,} images have {len(sample):,} locations, too few for {config.words:,} words; give more "
            f"images, a larger --size, or --words of at most {len(sample):,}, better {_enough_words(len(sample)):,}"
        )
    if len(sample) < VECTORS_PER_WORD * config.words:
        say(
            f"{num_images:,} images have {len(sample):,} locations, {len(sample) / config.words:.1f} for each of "
            f"{config.words:,} words: many will be of one image alone; --words {_enough_words(len(sample)):,} have "
            f"{VECTORS_PER_WORD} each"
        )
    words = fit_words(sample, config.words, topk=config.topk, seed=config.seed)
    if words.num_unused:
        say(f"{words.num_unused:,} of {config.words:,} words are the nearest of no location")
    return Head(
        words.matrix,
        kind="words",
        center=words.center,
        scale=1 / config.temperature if config.temperature else words.scale,
        normalised=True,
        fitted={
            "images": num_images,
            "locations": len(sample),
            "topk": config.topk,
            "kept_mass": None if config.temperature else KEPT_MASS,
            "mean_cosine": round(words.cosine, 4),
            "unused_words": words.num_unused,
        },
        backbone=vectors.backbone.description,
    )


def _from_labels(vectors: Vectors, config: FitConfig) -> Head:
    """Fit on the means of locations, and on bags of locations of which one shows the class; return the better head."""
    bags, truth = _labelled_bags(vectors)
    num_classes, weights = len(vectors.source.class_names), torch.ones(len(truth), device=bags.device)
    held_out = _held_out(truth.cpu(), seed=config.seed).to(bags.device)
    if not held_out.any():
        raise ModelError(f"--from labels: none of {num_classes:,} classes has two images, so none can be held out")
    accuracy_of = partial(_map_accuracy, bags=bags[held_out, 1:], truth=truth[held_out])
    tried: dict[str, tuple[float, float, Examples]] = {}
    for pooling in ("mean", "instances") if config.pooling == "auto" else (config.pooling,):
        examples = Examples(bags[:, :1] if pooling == "mean" else bags[:, 1:], truth, weights, num_classes)
        # By the accuracy of the maps, not by cross-entropy: that prefers decays so weak that single locations, which
        # lie farther apart than the means that were fitted, are overconfident.
        fit = choose_decay(examples.of(~held_out), lambda fit: -accuracy_of(fit))
        tried[pooling] = (accuracy_of(fit), fit.decay, examples)
    best = max(tried, key=lambda pooling: tried[pooling][0])
    measured = " and ".join(f"{accuracy:.1%} ({pooling})" for pooling, (accuracy, *_) in tried.items())
    say(f"the mean of the map is right for {measured} of {int(held_out.sum()):,} held-out images; takes {best}")
    accuracy, decay, examples = tried[best]
    fit = fit_linear(examples, decay)  # on all images, the held-out ones included
    return Head(
        fit.matrix,
        kind="labels",
        bias=fit.bias,
        class_names=vectors.source.class_names,
        fitted={
            "images": len(truth),
            "held_out_images": int(held_out.sum()),
            "held_out_accuracy": round(accuracy, 4),
            "pooling": best,
            "weight_decay": decay,
        },
        backbone=vectors.backbone.description,
    )


def _labelled_bags(vectors: Vectors) -> tuple[Float[Tensor, "n L D"], Int[Tensor, " n"]]:
    """Return, within MAX_SAMPLE_BYTES, the mean and some of the locations of each labelled image, and its class."""
    source, of_a_vector = vectors.source, 2 * vectors.backbone.width  # bytes
    labelled = np.flatnonzero(has_classes(source))
    indices = labelled[spread(len(labelled), MAX_SAMPLE_BYTES // (of_a_vector * (1 + VECTORS_PER_IMAGE)))]
    length = min(MAX_LOCATIONS, MAX_SAMPLE_BYTES // (of_a_vector * len(indices)) - 1)
    bags, keys = vectors.bags(indices.tolist(), length)
    class_of = dict(zip((source.keys[i] for i in indices.tolist()), source.class_ids[indices].tolist(), strict=True))
    return bags, torch.tensor([class_of[key] for key in keys], device=bags.device)


def _map_accuracy(fit: LinearFit, bags: Float[Tensor, "n L D"], truth: Int[Tensor, " n"]) -> float:
    """Return the share of images for which the mean distribution of their locations has the right class."""
    guesses = [fit.logits(block).softmax(dim=2).mean(dim=1).argmax(dim=1) for block in bags.split(256)]
    return float((torch.cat(guesses) == truth).float().mean())


def _held_out(class_ids: Tensor, *, seed: int) -> Bool[Tensor, " n"]:
    """Draw a fifth of each class that has at least two images, and at least one image of it."""
    held_out = torch.zeros(len(class_ids), dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    for class_id in class_ids.unique():
        rows = (class_ids == class_id).nonzero()[:, 0]
        count = max(1, round(HELD_OUT * len(rows))) if len(rows) > 1 else 0
        held_out[rows[torch.randperm(len(rows), generator=generator)[:count]]] = True
    return held_out


def _check_masks(source: ImageSource, config: FitConfig) -> tuple[MaskFolder, list[str], list[int]]:
    folder = Path(config.from_.removeprefix(MASKS))
    names = list(source.class_names)
    if config.class_names is not None:
        names = read_class_names(config.class_names, option="--class-names", of_masks=folder.suffix != COCO_SUFFIX)
    elif folder.suffix == COCO_SUFFIX or not names:
        names = stated_classes(folder)
    if len(names) < 2:
        raise ModelError("masks need the names of their classes by id: give --class-names FILE, one a line")
    masks = MaskFolder(
        folder, num_classes=len(names), ignore_index=config.ignore_index, source=source, class_names=names
    )
    overrule = None if config.class_names else "overrule with --class-names FILE, one a line"
    masks.check(names, all_needed=False, overrule=overrule, given=config.class_names and "--class-names")
    indices = [index for index, key in enumerate(source.keys) if key in masks]
    if len(indices) < 2:
        raise ModelError(
            f"--from {config.from_}: has masks of {len(indices)} of {len(source):,} images; two at least are needed, "
            f"to hold some out, laid out like the images ({next(mask_names(source.keys[0]))} for {source.keys[0]})"
        )
    return masks, names, indices


def _from_masks(
    vectors: Vectors, config: FitConfig, masks: MaskFolder, names: Sequence[str], indices: Sequence[int]
) -> Head:
    """Fit on locations; the targets are the shares of the classes in their cells."""
    of_a_location = 2 * vectors.backbone.width + 4 * len(names)  # bytes
    most = max(1, MAX_SAMPLE_BYTES // (of_a_location * len(indices)))
    sample, cells, owners = vectors.cells(masks, indices, most)
    areas = cells.sum(dim=1)
    examples = Examples(sample[:, None], cells / areas[:, None], areas, len(names))
    num_images = int(owners.max()) + 1
    held_out = _held_out(torch.zeros(num_images), seed=config.seed).to(owners.device)[owners.long()]
    fit = choose_decay(examples.of(~held_out), partial(cross_entropy, examples=examples.of(held_out)))
    guesses = fit.logits(sample[held_out]).argmax(dim=1, keepdim=True)
    right = float(cells[held_out].gather(1, guesses).sum() / areas[held_out].sum())
    say(f"{right:.1%} of the area of held-out masks is right")
    fit = fit_linear(examples, fit.decay)
    return Head(
        fit.matrix,
        kind="masks",
        bias=fit.bias,
        class_names=names,
        fitted={
            "images": num_images,
            "locations": len(examples),
            "held_out_images": int(owners[held_out].unique().numel()),
            "held_out_accuracy": round(right, 4),
            "weight_decay": fit.decay,
        },
        backbone=vectors.backbone.description,
    )
