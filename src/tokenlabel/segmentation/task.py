"""Train a segmentation model: its images, loss and evaluation. The loop is in `training/engine.py`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Int16, UInt8
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from tokenlabel.core.batch import normalize_images
from tokenlabel.core.losses import head_cross_entropy
from tokenlabel.core.step import Part
from tokenlabel.data.batches import make_loader
from tokenlabel.data.samplers import BatchSampler
from tokenlabel.drawing.pictures import PICTURES_FOLDER, Album, ClassGrid, Tile, fitted, make_album, top_classes
from tokenlabel.models.decoders import HeadOutputs
from tokenlabel.models.options import HeadKind
from tokenlabel.models.segmentation import (
    SegmentationModel,
    SegmentOutputs,
    create_segmentation_model,
    load_segmentation_weights,
)
from tokenlabel.runtime.distributed import Ranks, autocast, current_ranks
from tokenlabel.runtime.errors import ConfigError
from tokenlabel.runtime.runlog import Stopwatch, Tracker
from tokenlabel.segmentation.data import (
    SegmentBatch,
    SegmentDataset,
    SegmentSample,
    SegmentTransform,
    collate,
    resize_mask,
)
from tokenlabel.segmentation.inference import Segmenter, evaluate_segmentation
from tokenlabel.segmentation.label_maps import check_labels, finer_for_maps, open_labels, soft_targets
from tokenlabel.segmentation.layouts import open_pairs
from tokenlabel.segmentation.pairs import IGNORED, ImageMaskPairs
from tokenlabel.segmentation.recipe import SegmentLossConfig, SegmentRecipe
from tokenlabel.training.engine import train_in
from tokenlabel.training.run_folder import initial_model
from tokenlabel.training.run_images import RunImages
from tokenlabel.training.tasks import Summary, Task

NUM_TRAIN, NUM_VAL = 6, 12  # images in the albums of a run
_PICTURE_CELL_PX = 8  # of label maps in pictures


def train_segmentation(
    recipe: SegmentRecipe,
    run: str | Path,
    *,
    device: torch.device | str,
    trackers: Sequence[Tracker] = (),
    changed_numerics: bool = False,
) -> dict[str, Any]:
    """Train by a recipe in a run folder like `classification.task.train`; return the last evaluation."""
    return train_in(run, recipe, build, device=device, trackers=trackers, changed_numerics=changed_numerics)


@dataclass(eq=False)
class SegmentTask(Task):
    """Training of a segmentation model. `loss`: the recipe's, with the default of `finer` filled in."""

    recipe: SegmentRecipe
    loss: SegmentLossConfig
    model: SegmentationModel  # pyright: ignore[reportIncompatibleVariableOverride]
    train_set: SegmentDataset
    val_pairs: ImageMaskPairs | None
    device: torch.device
    images: RunImages | None = None
    metric = "miou"

    def __post_init__(self) -> None:
        self.class_names = self.train_set.pairs.classes.names
        self.num_images = len(self.train_set)
        self.zero_means = {"decode_loss": "none of their pixels and cells has a label that counts"}
        self.step = SegmentStep(self.model, self.recipe, self.loss, self.device)

    def batches(self, sampler: BatchSampler) -> Iterable[SegmentBatch]:
        """Return the augmented batches in the order of a sampler."""
        return make_loader(
            self.train_set,
            sampler,
            num_workers=self.recipe.data.num_workers,
            pin_memory=self.device.type == "cuda",
            collate_fn=collate,
        )

    def picture(self, batch: SegmentBatch, part: Part, indices: Sequence[tuple[int, int]]) -> Album:
        """Return the first images of a batch with their masks or label maps."""
        pictures = []
        for i, key in enumerate(batch.keys[:NUM_TRAIN]):
            pixels = batch.images[i].permute(1, 2, 0).cpu().numpy()
            if i in batch.soft:
                tile = Tile(pixels, "its label map", _soft_map(batch, i, self.loss))
            else:
                tile = Tile(pixels, "its mask", _class_map(batch.masks[i].cpu().numpy(), pixels))
            pictures.append(([Tile(pixels, "augmented image"), tile], {"key": key}))
        return make_album(pictures, self.class_names, colours=self.train_set.pairs.classes.colours)

    def summary(self) -> Summary:
        """Return the description of the task in a dry run."""
        recipe, pairs = self.recipe, self.train_set.pairs
        height_px, width_px = recipe.model.img_size
        rows, columns = self.model.grid_for(recipe.model.img_size)
        num_masked = len(pairs.with_mask)
        labels = f", {len(pairs) - num_masked:,} without" if num_masked < len(pairs) else ""
        times = f", {self.loss.finer} times as fine," if self.loss.finer not in (None, 1) else ""
        cells = f"; without a mask that of each location{times} by {' + '.join(recipe.data.label_folders)}"
        rows_of_masks = pairs.classes.table(pairs.pixels) if num_masked else []
        return Summary(
            network=f"{recipe.model.name} with {recipe.model.head.value} head",
            images=f"{num_masked:,} with masks{labels}; {len(self.class_names):,} classes, {width_px} x {height_px} px",
            targets=f"the class of each pixel; {rows} x {columns} locations of the head{cells if labels else ''}",
            title="Pixels of each value in the training masks",
            table=[("value", "class", "pixels", "share"), *rows_of_masks] if rows_of_masks else [],
        )

    def evaluate(self, model: nn.Module, ranks: Ranks, *, run: Path | None = None, **about: Any) -> dict[str, Any]:
        """Evaluate a model on the val images of the recipe; write pictures of some of them into `run`."""
        pairs = self.val_pairs
        if pairs is None:
            return {}
        assert isinstance(model, SegmentationModel)
        shown = [pairs.keys[i] for i in np.unique(np.linspace(0, len(pairs) - 1, NUM_VAL).astype(int)).tolist()]
        pictures: dict[str, tuple[list[Tile], dict[str, str]]] = {}

        def _keep(sample: SegmentSample, predicted: Int[Tensor, "height width"]) -> None:
            if sample.key in shown:
                pictures[sample.key] = _val_picture(sample, predicted.cpu().numpy().astype(np.int16))

        figures = evaluate_segmentation(
            Segmenter(model, self.recipe.eval, window_px=self.recipe.model.img_size),
            pairs,
            autocast=autocast(self.device, self.recipe.precision),
            ranks=ranks,
            on_sample=_keep,
        )
        of_ranks = ranks.all_gather(pictures)  # each rank has segmented other images
        if run is not None and ranks.is_first:
            found = {key: picture for of_rank in of_ranks for key, picture in of_rank.items()}
            about["class_iou"] = figures["class_iou"]
            album = make_album([found[key] for key in shown], self.class_names, colours=pairs.classes.colours, **about)
            album.write(run / PICTURES_FOLDER, "val")
        return {name: value for name, value in figures.items() if not name.startswith("class_")}


def _val_picture(
    sample: SegmentSample, predicted: Int16[NDArray[np.int16], "height width"]
) -> tuple[list[Tile], dict[str, str]]:
    """Return the tiles of a val image (image, mask, prediction) and its caption."""
    truth, pixels = sample.mask.numpy(), np.asarray(fitted(sample.image.permute(1, 2, 0).numpy()))
    counted = truth != IGNORED
    right = f"{(predicted == truth)[counted].mean():.0%} of the pixels right" if counted.any() else "no pixel counts"
    tiles = [
        Tile(pixels, "image"),
        Tile(pixels, "the truth", _class_map(truth, pixels)),
        Tile(pixels, "prediction", _class_map(predicted, pixels)),
    ]
    return tiles, {"key": sample.key, "answer": right}


def _class_map(ids: Int16[NDArray[np.int16], "_ _"], photo: UInt8[NDArray[np.uint8], "_ _ 3"]) -> ClassGrid:
    # At the size at which the photograph is shown: masks of large images would fill the memory of the album.
    ids = resize_mask(ids, (photo.shape[0], photo.shape[1]))
    return ClassGrid(ids, np.full(ids.shape, 0.6))


def _soft_map(batch: SegmentBatch, number: int, config: SegmentLossConfig) -> ClassGrid:
    """Return the most probable class of the soft targets of an image, tinted by target times weight."""
    height, width = batch.masks.shape[1:]
    grid = (max(1, height // _PICTURE_CELL_PX), max(1, width // _PICTURE_CELL_PX))
    targets = soft_targets(batch, grid, config).of_images(torch.tensor([batch.soft.index(number)]))
    highest = targets.excess[0].max(dim=1)
    probs = (highest.values + targets.floor[0]).view(grid).cpu().numpy()
    ids = targets.classes[0].cpu()[highest.indices.cpu()].view(grid).numpy()
    return top_classes(ids, probs, batch.score_maps.num_classes if batch.score_maps else 1)


class SegmentStep(nn.Module):
    """The forward pass and the losses of a part of a batch: `core.step.TrainStep` for segmentation."""

    def __init__(
        self, model: SegmentationModel, recipe: SegmentRecipe, loss: SegmentLossConfig, device: torch.device
    ) -> None:
        super().__init__()
        self.model, self.recipe, self.loss = model, recipe, loss
        self.autocast = autocast(device, recipe.precision)

    def forward(self, batch: SegmentBatch, part: Part, watch: Stopwatch) -> dict[str, Tensor]:
        """Return the loss, averaged over the micro-batch, and those of the two heads, all of shape []."""
        recipe = self.recipe
        if len(batch.images) == 1 and recipe.model.head is HeadKind.UPERNET and not recipe.sync_batchnorm:
            raise ConfigError(
                "UPerNet pools an image to one place, of which BatchNorm needs two: take at least 2 images at once "
                "in each process (batch_size, micro_batch_size), or sync_batchnorm on several GPUs"
            )
        images = normalize_images(batch.images, mean=self.model.mean, std=self.model.std)
        with self.autocast:
            outputs: SegmentOutputs = self.model(images)
            decode_loss = head_loss(outputs.head, batch, self.loss)
            if outputs.second is None:
                return {"loss": decode_loss, "decode_loss": decode_loss}
            auxiliary_loss = head_loss(outputs.second, batch, self.loss)
        loss = decode_loss + self.loss.auxiliary_weight * auxiliary_loss
        return {"loss": loss, "decode_loss": decode_loss, "auxiliary_loss": auxiliary_loss}


def head_loss(outputs: HeadOutputs, batch: SegmentBatch, config: SegmentLossConfig) -> Float[Tensor, ""]:
    """Return the loss of a head: the mean over the images of a batch, masks and label maps alike.

    The loss of an image with a mask is the mean cross entropy of its pixels; that of another image the mean of
    weight * H(soft target) over the cells of the head's grid, or of one `finer` times as fine. Either divides by all
    pixels or cells, so the loss of a batch is the mean of the losses of its micro-batches. Logits are computed here,
    under the caller's autocast.
    """
    if not batch.soft:
        return pixel_loss(outputs.logits, batch.masks)
    num_images, soft = len(batch.masks), outputs.of_images(batch.soft)
    if config.finer is not None and config.finer > 1:
        soft = soft.enlarged(config.finer)
    targets = soft_targets(batch, soft.grid, config)
    cells = soft.features.permute(0, 2, 3, 1).flatten(1, 2)  # [S, N, D]
    loss = head_cross_entropy(cells, soft.classifier, targets) * (len(batch.soft) / num_images)
    if batch.masked:
        logits, masks = outputs.of_images(batch.masked).logits, batch.masks[batch.masked]
        loss = loss + pixel_loss(logits, masks) * (len(batch.masked) / num_images)
    return loss


def pixel_loss(logits: Float[Tensor, "B C h w"], masks: Int16[Tensor, "B height width"]) -> Float[Tensor, ""]:
    """Return the cross entropy of pixels, summed over those that are not ignored, divided by the number of all.

    Logits are resized to the masks first. Dividing by all pixels, as published, makes the loss of a batch the mean of
    the losses of its micro-batches, and 0, not NaN, where all pixels are ignored.
    """
    enlarged = F.interpolate(logits.float(), size=masks.shape[1:], mode="bilinear", align_corners=False)
    total = F.cross_entropy(enlarged, masks.long(), ignore_index=IGNORED, reduction="sum")
    return total / masks.numel()


def build(recipe: SegmentRecipe, *, device: torch.device, run: Path | None = None) -> SegmentTask:
    """Build the data and the model of a recipe, and check that they fit together.

    `run`: the run folder, where an earlier start may have recorded that the pairs were checked; else the first rank
    checks them.
    """
    train_pairs, val_pairs = (open_pairs(recipe.data, split) for split in ("train", "val"))
    assert train_pairs is not None
    store = open_labels(recipe.data, train_pairs)
    names = train_pairs.classes.names
    images = RunImages(run, names)
    for split, pairs in (("train", train_pairs), ("val", val_pairs)):
        if pairs is not None:
            images.broken(split, pairs.keys, [], check="decode", find=partial(_check, pairs, split))
    if store is not None:
        num_missing = current_ranks().on_main(lambda: check_labels(store, train_pairs))
        counts = {"num_missing": num_missing, "num_masks": len(train_pairs.with_mask)}
        current_ranks().on_main(lambda: images.note_labels(store, train_pairs.keys, **counts))
    torch.manual_seed(recipe.seed)
    config = initial_model(recipe.model, run)
    model = create_segmentation_model(config, num_classes=len(names))
    if config.weights is not None:
        load_segmentation_weights(model, config.weights, class_names=names, average=config.average)
    transform = SegmentTransform(recipe.augment, recipe.model.img_size)
    loss = recipe.loss
    if store is not None and loss.finer is None:
        crop = (recipe.model.img_size, model.grid_for(recipe.model.img_size))
        finer = current_ranks().on_main(lambda: finer_for_maps(store, train_pairs, recipe.augment, crop))
        loss = replace(loss, finer=finer)
    return SegmentTask(
        recipe=recipe,
        loss=loss,
        model=model.to(device),
        train_set=SegmentDataset(train_pairs, transform, seed=recipe.seed, store=store),
        val_pairs=val_pairs,
        device=device,
        images=images,
    )


def _check(pairs: ImageMaskPairs, split: str, _: list[int] | None) -> list[int]:
    pairs.check(to_train=split == "train")
    return []  # it raises for a broken pair
