"""Fit a head on a backbone: from class labels, from masks, from class names, from nothing, or from a file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from tokenlabel.core.batch import normalize_images
from tokenlabel.data.images import ImageSource
from tokenlabel.data.sources import open_aloud
from tokenlabel.labels.manifest import Failure
from tokenlabel.runtime.coercion import coerced, coerced_fields
from tokenlabel.runtime.distributed import usable_device
from tokenlabel.runtime.notices import listed, say
from tokenlabel.runtime.ranges import COUNT, NATURAL, check_numbers
from tokenlabel.teachers.backbone import Backbone, check_locations, load_backbone
from tokenlabel.teachers.dense import DenseLogits
from tokenlabel.teachers.heads import SUFFIX, Head, HeadError, read_about
from tokenlabel.teachers.labelling import TeacherImage, as_tensor, seen_batches
from tokenlabel.teachers.words import KEPT_MASS, fit_words

VECTORS_PER_WORD, LEAST_VECTORS = 32, 1 << 16
"""Size of the sample that words are fitted on. In half precision: 64 bytes x words x width, or 131 kB x width."""

VECTORS_PER_IMAGE = 8
"""The least that is taken of an image, where there are more than enough images."""


@dataclass(frozen=True, kw_only=True)
@coerced_fields
class FitConfig:
    """Which head to fit, on which backbone."""

    backbone: str
    """A run folder, or the name of a model (timm's, lvvit_s and the like), with or without a classifier of its own."""
    from_: str
    """What the head is fitted on. words: nothing but the images (visual words)."""
    weights: str | None = None
    """Checkpoint file of the backbone (.safetensors, or .pth without code in it); timm's pretrained weights if none."""
    size: int | None = None
    """The image is seen at an area of size x size pixels; the backbone's own size if none."""
    words: int = 8192
    """How many visual words."""
    topk: int = 5
    """The temperature of words lets the topk most probable ones of a location hold .9 of its mass: as many as
    `annotate` is going to keep."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 runs the backbone under autocast."""
    batch_size: int = 64
    """Images that the backbone sees at once."""
    num_workers: int = 2
    """Threads that decode images."""
    seed: int = 0
    """Of what is drawn: locations, first words."""

    def __post_init__(self) -> None:
        check_numbers(
            self, "--", size=NATURAL, words="[2, inf)", topk=NATURAL, batch_size=NATURAL, num_workers=COUNT
        )


def fit_head(
    images: str | Path | ImageSource,
    file: str | Path,
    config: FitConfig,
    *,
    device: torch.device | str | None = None,
    overwrite: bool = False,
) -> Head:
    """Fit a head, write it to `file` (.safetensors) and return it; return what is there if it was fitted likewise.

    Raises HeadError where there is another head, or where what it is to be fitted on does not do; errors of the
    images and of the backbone as `annotate` does.
    """
    config, file = coerced(config, FitConfig, name="config"), Path(file)
    asked = {**asdict(config), "images": str(images) if isinstance(images, (str, Path)) else None}
    if (there := _there(file, asked, overwrite=overwrite)) is not None:
        return there
    if config.from_ != "words":
        raise HeadError(f"--from is words, got {config.from_!r}")
    device = usable_device(device)
    source = open_aloud(images) if isinstance(images, (str, Path)) else images
    backbone = load_backbone(config.backbone, device, weights=config.weights, size=config.size)
    head = _from_words(Vectors(backbone, source, config, device))
    head.fitted["asked"] = asked
    head.save(file)
    return head


def _there(file: Path, asked: dict[str, Any], *, overwrite: bool) -> Head | None:
    """Return the head that a file holds if it was fitted as is asked for; refuse to write over anything else."""
    if file.suffix != SUFFIX:
        raise HeadError(f"{file}: a head is a {SUFFIX} file; name one")
    if not file.exists():
        return None
    try:
        fitted = read_about(file)["fitted"]
    except HeadError as error:
        raise HeadError(f"{file}: is in the way and no head; move it, or name another file") from error
    if overwrite:
        return None
    others = [key for key, value in asked.items() if fitted.get("asked", {}).get(key) != value]
    if others:
        raise HeadError(
            f"{file}: holds a head that was fitted with other options ({listed(others)}); name another file, or "
            "--overwrite this one"
        )
    say(f"{file}: is there, fitted by the same command; --overwrite fits it anew")
    return Head.load(file)


@dataclass(frozen=True, eq=False)
class Vectors:
    """The vectors of images, streamed through a backbone: never more than a batch of them at once."""

    backbone: Backbone
    source: ImageSource
    config: FitConfig
    device: torch.device

    def of(
        self, indices: Sequence[int], failures: list[Failure]
    ) -> Iterator[tuple[list[TeacherImage], DenseLogits]]:
        """Yield images and the vectors of them and their locations, batch by batch; check the first batch."""
        config, input = self.config, self.backbone.input
        batches = seen_batches(
            self.source,
            input,
            indices,
            batch_size=config.batch_size,
            num_workers=config.num_workers,
            strict=False,
            failures=failures,
        )
        with tqdm(total=len(indices), desc=f"fit-head {config.from_}", unit="img") as bar:
            for number, seen in enumerate(batches):
                images = normalize_images(as_tensor(seen, self.device), mean=input.mean, std=input.std)
                images = images.contiguous(memory_format=torch.channels_last)
                bf16 = config.precision == "bf16"
                with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
                    if number == 0:
                        say(
                            check_locations(
                                self.backbone.network,
                                images,
                                name=config.backbone,
                                precision=config.precision,
                            )
                        )
                    vectors = self.backbone.network(images)
                yield seen, vectors
                bar.update(len(seen))
        if len(failures) == len(indices):
            raise HeadError(f"none of {len(indices):,} images decodes ({failures[0].reason})")
        if failures:
            say(
                f"{len(failures):,} images were passed over ({listed([failure.reason for failure in failures])})"
            )

    def sample(self, most: int) -> tuple[Float[Tensor, "n D"], int]:
        """Return up to `most` vectors of locations in half precision, drawn evenly from images, and of how many."""
        count = len(self.source)
        of_each = max(VECTORS_PER_IMAGE, math.ceil(most / count))
        indices = np.unique(np.linspace(0, count - 1, min(count, math.ceil(most / of_each))).astype(int))
        size = min(most, of_each * len(indices))
        sample = torch.empty(size, self.backbone.width, dtype=torch.half, device=self.device)
        filled = num_images = 0
        for seen, vectors in self.of(indices.tolist(), []):
            for item, locations in zip(seen, vectors.locations.flatten(1, 2), strict=True):
                rng = np.random.default_rng((self.config.seed, *item.key.encode("utf-8", "surrogateescape")))
                chosen = rng.permutation(len(locations))[: min(of_each, size - filled)]
                sample[filled : filled + len(chosen)] = locations[
                    torch.from_numpy(chosen).to(locations.device)
                ]
                filled, num_images = filled + len(chosen), num_images + 1
        return sample[:filled], num_images


def _from_words(vectors: Vectors) -> Head:
    config = vectors.config
    sample, num_images = vectors.sample(max(LEAST_VECTORS, VECTORS_PER_WORD * config.words))
    if len(sample) < config.words:
        raise HeadError(
            f"{num_images:,} images have {len(sample):,} locations, too few for {config.words:,} words; give more "
            f"images, a larger --size, or --words of at most {max(2, len(sample) // VECTORS_PER_WORD):,}"
        )
    words = fit_words(sample, config.words, topk=config.topk, seed=config.seed)
    if words.num_unused:
        say(f"{words.num_unused:,} of {config.words:,} words are the nearest of no location")
    return Head(
        words.matrix,
        kind="words",
        center=words.center,
        scale=words.scale,
        normalised=True,
        fitted={
            "images": num_images,
            "locations": len(sample),
            "topk": config.topk,
            "kept_mass": KEPT_MASS,
            "mean_cosine": round(words.cosine, 4),
            "unused_words": words.num_unused,
        },
        backbone=vectors.backbone.description,
    )
