"""Streams images through a backbone and keeps a sample of bounded size of their vectors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from tokenlabel.core.batch import normalize_images
from tokenlabel.data.images import ImageSource
from tokenlabel.evaluation.masks import MaskFolder
from tokenlabel.labels.manifest import Failure
from tokenlabel.runtime.errors import ModelError
from tokenlabel.runtime.process import listed, say
from tokenlabel.teachers.backbone import Backbone, check_locations
from tokenlabel.teachers.dense import DenseLogits
from tokenlabel.teachers.labelling import TeacherImage, as_tensor, seen_batches
from tokenlabel.teachers.masks import shares

_LEAST = 2**-10  # where the smaller numbers of a vector begin to be rounded
VECTORS_PER_IMAGE = 8
"""The least number of vectors that is taken from an image, if there are more than enough images."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Vectors:
    """The vectors of images by a backbone: never more than a batch of them at once, except for the samples below.

    Samples are in half precision, on the backbone's device, and drawn by `seed` and the keys of the images.
    """

    backbone: Backbone
    source: ImageSource
    precision: Literal["fp32", "bf16"] = "fp32"
    batch_size: int = 64
    num_workers: int = 2
    seed: int = 0

    def of(self, indices: Sequence[int]) -> Iterator[tuple[list[TeacherImage], DenseLogits]]:
        """Yield images with the vectors of the whole image and of its locations, batch by batch.

        Images that do not decode are skipped, and listed at the end. Raises ModelError if none does, and for vectors
        beyond half precision.
        """
        input, network, failures = self.backbone.input, self.backbone.network, list[Failure]()
        name, device = self.backbone.description["name"], self.backbone.device
        sizes = {"batch_size": self.batch_size, "num_workers": self.num_workers}
        batches = seen_batches(self.source, input, indices, **sizes, failures=failures)
        bf16 = self.precision == "bf16"
        with tqdm(total=len(indices), desc=f"vectors of {name}", unit="img") as bar:
            for number, seen in enumerate(batches):
                images = normalize_images(as_tensor(seen, device), mean=input.mean, std=input.std)
                images = images.contiguous(memory_format=torch.channels_last)
                with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    if number == 0:
                        say(check_locations(network, images, name=name, precision=self.precision, has_classes=False))
                    vectors = network(images)
                self._check_range(vectors.locations)
                yield seen, vectors
                bar.update(len(seen))
        if len(failures) == len(indices):
            raise ModelError(f"none of {len(indices):,} images decodes ({failures[0].reason})")
        if failures:
            reasons = listed([failure.reason for failure in failures])
            say(f"{len(failures):,} of {len(indices):,} images were skipped ({reasons})")

    def locations(self, most: int) -> tuple[Float[Tensor, "n D"], int]:
        """Return up to `most` vectors of locations, drawn evenly from the images, and the number of these images."""
        count = len(self.source)
        # A few vectors from each of many images differ more than many from a few.
        of_each = max(VECTORS_PER_IMAGE, math.ceil(most / count))
        indices = spread(count, math.ceil(most / of_each))
        sample = self._empty(min(most, of_each * len(indices)))
        filled = num_images = 0
        for seen, vectors in self.of(indices.tolist()):
            for item, locations in zip(seen, vectors.locations.flatten(1, 2), strict=True):
                chosen = self._drawn(item.key, len(locations), min(of_each, len(sample) - filled, len(locations)))
                sample[filled : filled + len(chosen)] = locations[chosen]
                filled, num_images = filled + len(chosen), num_images + 1
        return sample[:filled], num_images

    def of_images(self, indices: Sequence[int]) -> tuple[Float[Tensor, "n D"], list[str]]:
        """Return the vector of each whole image, and the keys of the images."""
        kept, keys = self._empty(len(indices)), list[str]()
        for seen, vectors in self.of(indices):
            kept[len(keys) : len(keys) + len(seen)] = vectors.image
            keys += [item.key for item in seen]
        return kept[: len(keys)], keys

    def bags(self, indices: Sequence[int], length: int) -> tuple[Float[Tensor, "n L D"], list[str]]:
        """Return for each image the mean of its locations, then `length` of them; and the keys of the images."""
        bags, keys = self._empty(len(indices), 1 + length), list[str]()
        for seen, vectors in self.of(indices):
            for item, locations in zip(seen, vectors.locations.flatten(1, 2), strict=True):
                bags[len(keys), 0] = locations.float().mean(dim=0)
                bags[len(keys), 1:] = locations[self._drawn(item.key, len(locations), length)]
                keys.append(item.key)
        return bags[: len(keys)], keys

    def cells(
        self, masks: MaskFolder, indices: Sequence[int], most: int
    ) -> tuple[Float[Tensor, "n D"], Float[Tensor, "n C"], Float[Tensor, " n"]]:
        """Return up to `most` locations of each image, the share of each class in their cells, and their image.

        Locations that show no class are left out. Raises ModelError if fewer than two images have others.
        """
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        for seen, vectors in self.of(indices):
            grid = (vectors.locations.shape[1], vectors.locations.shape[2])
            for item, locations in zip(seen, vectors.locations.flatten(1, 2), strict=True):
                mask = masks[item.key]
                of_class = torch.zeros(len(locations), masks.num_classes)
                of_class[:, mask.palette.astype(np.int64)] = torch.from_numpy(shares(mask, grid)).flatten(0, 1)
                chosen = self._drawn(item.key, len(locations), min(most, len(locations)))
                chosen = chosen[of_class[chosen].sum(dim=1).numpy() > 0]
                owner, device = torch.full((len(chosen),), float(len(parts))), self.backbone.device
                if len(chosen):
                    parts.append((locations[chosen].half(), of_class[chosen].to(device), owner.to(device)))
        if len(parts) < 2:
            raise ModelError(
                f"{masks.folder}: {len(parts)} of {len(indices):,} images have a mask that shows a class; two at least "
                "are needed, to hold some out"
            )
        vectors, of_class, owners = (torch.cat(part) for part in zip(*parts, strict=True))
        return vectors, of_class, owners

    def _check_range(self, vectors: Tensor) -> None:
        """Raise ModelError for vectors that half precision cannot hold: as infinite, or all as 0."""
        largest = float(vectors.abs().max())
        if largest and not _LEAST <= largest <= torch.finfo(torch.half).max:
            raise ModelError(
                f"{self.backbone.description['name']}: its vectors have numbers up to {largest:.2g}, and samples of "
                f"them are kept in half precision, which holds {_LEAST:.2g} to {torch.finfo(torch.half).max:,.0f}; "
                "are these the weights that it was trained to?"
            )

    def _empty(self, *size: int) -> Tensor:
        return torch.empty(*size, self.backbone.width, dtype=torch.half, device=self.backbone.device)

    def _drawn(self, key: str, count: int, most: int) -> NDArray[np.int64]:
        """Draw `most` of `count` locations of an image, with repetition only if there are fewer."""
        # Seeded by the key, not by the index: when images are added, the old ones give the same vectors.
        rng = np.random.default_rng((self.seed, *key.encode("utf-8", "surrogateescape")))
        return np.resize(rng.permutation(count), most)


def spread(count: int, most: int) -> NDArray[np.int64]:
    """Return at most `most` of the numbers below `count`, evenly spaced."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64))
