"""Backbones: networks without their classifier that give a vector for every location of an image."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tokenlabel.models.load import load_model
from tokenlabel.models.runs import is_run
from tokenlabel.models.weights import fingerprint
from tokenlabel.runtime.errors import ModelError
from tokenlabel.teachers.dense import ClassifierNetwork, DenseNetwork
from tokenlabel.teachers.heads import Head
from tokenlabel.teachers.input import TeacherInput, input_of, made_for


@dataclass(frozen=True, eq=False)
class Backbone:
    """A frozen network that gives vectors [B, D] of images and [B, h, w, D] of their locations.

    The vector of a location is the output of the network's own `forward_head` for an image that shows this location
    everywhere: the input of the last linear layer of a classifier, or, of an image-text network, the projection into
    the space of text embeddings. `description`: name, hash of the weights without the classifier, preprocessing and
    licence, as stored in head files.
    """

    network: ClassifierNetwork
    input: TeacherInput
    description: dict[str, Any]

    @property
    def width(self) -> int:
        """D, the dimension of a vector."""
        return self.network.num_classes

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return next(self.network.parameters()).device


def load_backbone(
    name: str,
    device: torch.device,
    *,
    weights: str | None = None,
    size: int | None = None,
    built_for: int | None = None,
    crop: Literal["none", "center"] = "none",
) -> Backbone:
    """Return a network without its classifier, by a name as for `--teacher`.

    `size`: images are resized to an area of size x size px; the network's own size if None. `built_for`: the size that
    it is built for, on which its position embeddings may depend; `size` if None. Raises ModelError if there is no such
    network, or if it gives no vector for each location.
    """
    found = load_model(name, weights=weights, img_size=made_for(name, built_for or size), as_backbone=True)
    model = found.model.backbone
    if not found.is_embedding:  # the last layer of an image-text network projects into the space of text embeddings
        model.reset_classifier(0)
    network = ClassifierNetwork(model, name=name).eval().to(device).requires_grad_(False)
    network = network.to(memory_format=torch.channels_last)
    input = input_of(found, network, size=size, crop=crop)
    description = {
        "name": name,
        "weights": fingerprint(model),
        "weights_file": weights,
        "licence": found.licence,
        "preprocessing": asdict(input),
    }
    return Backbone(network, input, description)


def backbone_of(
    head: Head,
    name: str,
    device: torch.device,
    *,
    weights: str | None = None,
    size: int | None = None,
    crop: Literal["none", "center"] = "none",
) -> Backbone:
    """Return the backbone that a head was fitted on, at the head's image size unless another one is given.

    `name`: the head's file. `weights`: the backbone's file of weights, or its run folder if that was moved; by default
    the one that was used to fit the head. Raises ModelError for a backbone with other weights.
    """
    about = head.backbone
    if not about:
        raise ModelError(f"{name}: does not say what backbone it belongs to; `tokenlabel fit-head` makes heads")
    fitted = about["preprocessing"]
    backbone_name, file = about["name"], weights or about["weights_file"]
    if weights is not None and is_run(weights):
        backbone_name, file = weights, None
    if fitted["fixed_size_px"] and size not in (None, fitted["size"]):
        raise ModelError(
            f"{name}: was fitted at --size {fitted['size']}, and its backbone has other weights at each size; leave "
            "--size out"
        )
    place = file or (backbone_name if "/" in backbone_name else "")
    is_path = place != "" and ":" not in place  # of a file or a run; the hub's names and local-dir: have a colon
    if is_path and not Path(place).exists():  # it was moved, or is relative to another working directory
        raise ModelError(
            f"{name}: {place}, the weights of its backbone {about['name']}, is not there; give their file or run by "
            "--weights"
        )
    own_size = fitted["size"]
    # A run that takes one size only knows it by height and width.
    size = None if fitted["fixed_size_px"] and is_run(backbone_name) else size or own_size
    found = load_backbone(backbone_name, device, weights=file, size=size, built_for=own_size, crop=crop)
    if found.description["weights"] != about["weights"]:
        raise ModelError(
            f"{name}: was fitted on {about['name']} with other weights ({about['weights']}; these are "
            f"{found.description['weights']}); give its own by --weights, or fit a head on these"
        )
    if found.width != head.width:
        raise ModelError(f"{name}: takes vectors of {head.width}, {backbone_name} gives {found.width}")
    return found


def check_locations(
    dense: DenseNetwork,
    images: Float[Tensor, "B 3 height width"],
    *,
    name: str,
    precision: str,
    has_classes: bool = True,
) -> str:
    """Return a sentence on how the mean over a network's locations agrees with its output for whole images.

    `images`: normalised. `has_classes`: the outputs are logits, which are compared by their largest one, not vectors,
    which are compared by their cosine. If the network averages features and its head is linear, the two must be equal;
    raises ModelError if they are not.
    """
    if dense.averages_linearly(images):
        outputs = dense.evidence(images)
        own, mean = outputs.image.float(), outputs.locations.float().mean(dim=(1, 2))
        # Rounding of float32, or of bf16, relative to the largest output.
        tolerance = (1e-3 if precision == "fp32" else 5e-2) * float(own.abs().max())
        off = float((own - mean).abs().max())
        if not off <= tolerance:  # written so that NaN is refused
            raise ModelError(
                f"{name}: averages its features, yet the mean over its locations is {off:.3g} off its own output"
            )
        return f"{name}: the mean over locations is its own output (off by {off:.1g} at most)"
    logits = dense(images)
    own, mean = logits.image.float(), logits.locations.float().mean(dim=(1, 2))
    if not has_classes:
        cosine = float(torch.cosine_similarity(own, mean, dim=1).mean())
        return f"{name}: the mean over locations has a cosine of {cosine:.2f} with its own vector of an image"
    share = float((own.argmax(dim=1) == mean.argmax(dim=1)).float().mean())
    return f"{name}: the mean of the map's logits has its own top-1 for {share:.0%} of {len(images)} images"
