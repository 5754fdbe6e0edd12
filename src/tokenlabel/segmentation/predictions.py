"""What a segmentation model says about images, as files: masks with a palette, and classes laid over the images."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int16, UInt8
from numpy.typing import NDArray
from PIL import Image

from tokenlabel.core.scores import from_probabilities
from tokenlabel.data.decoding import decode_pixels
from tokenlabel.data.folders import EXTENSIONS, list_images, skipped_text
from tokenlabel.data.sources import open_aloud
from tokenlabel.labels.fingerprints import FingerprintedImages
from tokenlabel.labels.manifest import Manifest
from tokenlabel.labels.store import LabelStore
from tokenlabel.labels.writer import LabelStoreWriter
from tokenlabel.runtime.errors import DataError
from tokenlabel.runtime.process import say
from tokenlabel.segmentation.classes import Classes
from tokenlabel.segmentation.inference import Segmenter

OPACITY = 0.5
STORED_TOPK = 5  # classes that a cell of a stored prediction keeps, as `annotate` does


def predict_files(
    segmenter: Segmenter, images: Sequence[Path], out: Path, *, classes: Classes, device: torch.device
) -> int:
    """Segment images and write the results under the folder `out`; return how many there were.

    Writes masks/NAME.png (class ids: of up to 255 classes with their colours as palette, of more with 16 bits),
    overlays/NAME.png and classes.json.
    `images`: files, or folders with images at any depth; names are relative to the folder.
    Raises DataError for what holds no image, ImageError for an image that does not decode.
    """
    found = {}
    for folder, path in (pair for place in images for pair in _files(place, out)):
        name = path.relative_to(folder).with_suffix(".png")
        if name in found:
            raise DataError(f"{path} and {found[name]} would both be written to {name}; rename one of them")
        found[name] = path
    for kind in ("masks", "overlays"):
        (out / kind).mkdir(parents=True, exist_ok=True)
    legend = {
        name: f"#{bytes(colour).hex()}" for name, colour in zip(classes.names, classes.colours.tolist(), strict=True)
    }
    (out / "classes.json").write_text(json.dumps(legend, indent=1) + "\n", encoding="utf-8")
    segmenter.model.eval()
    for name, path in found.items():
        pixels = decode_pixels(path.read_bytes(), str(path))
        predicted = segmenter(torch.from_numpy(pixels).permute(2, 0, 1).to(device))
        ids = predicted.cpu().numpy().astype(np.int16)
        for kind, picture in (
            ("masks", mask_image(ids, classes)),
            ("overlays", Image.fromarray(overlay(pixels, ids, classes))),
        ):
            (out / kind / name).parent.mkdir(parents=True, exist_ok=True)
            picture.save(out / kind / name)
    return len(found)


def store_predictions(
    segmenter: Segmenter,
    images: Path,
    folder: Path,
    *,
    class_names: Sequence[str],
    teacher: Mapping[str, Any],
    device: torch.device,
) -> int:
    """Write soft predictions of the images in a folder into a label store; return how many it did not hold before.

    Maps lie on the grid that the head ends on; keys are relative to `images`. `teacher`: what the manifest says of the
    model. Raises StoreError where `folder` holds other labels, ImageError for an image that does not decode.
    """
    source = FingerprintedImages(open_aloud(images, classes=False))
    topk = min(STORED_TOPK, len(class_names))
    manifest = Manifest(
        num_classes=len(class_names),
        class_names=tuple(class_names),
        topk=topk,
        teacher=dict(teacher),
        preprocessing=asdict(segmenter.config),
    )
    segmenter.model.eval()
    num_new = 0
    with LabelStoreWriter(folder, manifest) as writer:
        there = {*LabelStore(folder).keys()}  # of a call that was stopped: the same call goes on
        for index, key in enumerate(source.keys):
            if key in there:
                continue
            pixels = decode_pixels(source.read(index), key)
            probs = segmenter.probabilities(torch.from_numpy(pixels).permute(2, 0, 1).to(device))
            writer.add(key, from_probabilities(probs.cpu().numpy(), topk, name=key), source.take(key))
            num_new += 1
    return num_new


def mask_image(ids: Int16[NDArray[np.int16], "height width"], classes: Classes) -> Image.Image:
    """Return class ids as an image of one channel: with the classes' colours as its palette, or 16 bits of many."""
    if len(classes.names) > 255:  # with 8 bits, 255 is no class
        return Image.fromarray(ids.astype(np.uint16))
    image = Image.fromarray(ids.astype(np.uint8))
    image.putpalette(classes.colours.reshape(-1).tolist())
    return image


def overlay(
    pixels: UInt8[NDArray[np.uint8], "height width 3"],
    ids: Int16[NDArray[np.int16], "height width"],
    classes: Classes,
    *,
    opacity: float = OPACITY,
) -> UInt8[NDArray[np.uint8], "height width 3"]:
    """Return an image with the colour of each pixel's class over it; pixels of no class (-1) stay as they are."""
    known = ids >= 0
    tints = classes.colours[np.where(known, ids, 0)]
    mixed = pixels * np.float32(1 - opacity) + tints * np.float32(opacity)
    return np.where(known[..., None], mixed.round(), pixels).astype(np.uint8)


def _files(place: Path, out: Path) -> list[tuple[Path, Path]]:
    """Return image files with the folder that their names are relative to; none of what was written to `out` before."""
    if place.is_file():
        return [(place.parent, place)]
    written = [(out / kind).resolve() for kind in ("masks", "overlays")]
    listing = list_images(place)
    found = [place / name for name in sorted(listing.images)]
    found = [path for path in found if not any(path.resolve().is_relative_to(folder) for folder in written)]
    if found:
        skipped = f"; {skipped_text(listing.skipped)}" if listing.skipped else ""
        say(f"{place}: {len(found):,} images{skipped}")
    else:
        raise DataError(f"{place}: no image file, and no folder of images ({', '.join(EXTENSIONS)})")
    return [(place, path) for path in found]
