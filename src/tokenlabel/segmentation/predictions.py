"""Write predictions of a segmentation model: masks with a palette, overlays, or soft maps in a label store."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from tokenlabel.core.scores import from_probabilities
from tokenlabel.data.decoding import decode_pixels
from tokenlabel.data.folders import EXTENSIONS, list_images, skipped_text
from tokenlabel.data.sources import open_aloud
from tokenlabel.labels.fingerprints import FingerprintedImages, find_replaced
from tokenlabel.labels.manifest import WITHOUT_EFFECT, Failure, Manifest, update_failures
from tokenlabel.labels.store import LabelStore
from tokenlabel.labels.writer import LabelStoreWriter
from tokenlabel.runtime.errors import DataError, ImageError
from tokenlabel.runtime.process import listed, say, write_whole
from tokenlabel.segmentation.inference import Segmenter
from tokenlabel.segmentation.pairs import Classes

_OPACITY = np.float32(0.5)  # of the colours of an overlay
_KINDS = ("masks", "overlays")
_LEGEND_FILE = "classes.json"
_STORED_TOPK = 5  # classes that a cell of a stored prediction keeps, as `annotate` does


def predict_files(
    segmenter: Segmenter, images: Sequence[Path], out: Path, *, classes: Classes, device: torch.device
) -> int:
    """Segment images and write the results into the folder `out`; return the number of images.

    Writes masks/NAME.png (class ids: 8 bits with the classes' colours as palette, or 16 bits for more than 255
    classes), overlays/NAME.png (the colours over the image) and classes.json. `images`: files,
    or folders with images at any depth; names are relative to the folder. An image that does not decode is skipped, and
    said. Raises DataError for folders without images, if none decodes, and for an `out` that `check_out` refuses.
    """
    check_out(out, classes)
    found: dict[Path, Path] = {}
    for place in images:
        for folder, path in _files(place, out):
            name = path.relative_to(folder).with_suffix(".png")
            if name in found:
                raise DataError(f"{path} and {found[name]} would both be written to {name}; rename one of them")
            found[name] = path
    write_whole(out / _LEGEND_FILE, _legend(classes))
    segmenter.model.eval()
    failures = list[Failure]()
    for name, path in tqdm(found.items(), desc=f"predict {out}", unit="img", disable=None):
        pixels = _decoded(path.read_bytes, str(path), failures)
        if pixels is None:
            continue
        ids = segmenter(torch.from_numpy(pixels).permute(2, 0, 1).to(device), name=str(path)).cpu().numpy()
        if len(classes.names) > 255:  # in 8 bits, 255 is the ignored value
            mask = Image.fromarray(ids.astype(np.uint16))
        else:
            mask = Image.fromarray(ids.astype(np.uint8))
            mask.putpalette(classes.colours.reshape(-1).tolist())
        mixed = pixels * (1 - _OPACITY) + classes.colours[ids] * _OPACITY
        overlay = Image.fromarray(mixed.round().astype(np.uint8))
        for kind, picture in zip(_KINDS, (mask, overlay), strict=True):
            encoded = io.BytesIO()
            picture.save(encoded, "PNG")
            write_whole(out / kind / name, [encoded.getvalue()])
    _refuse_none(failures, len(found))
    return len(found) - len(failures)


def check_out(out: Path, classes: Classes) -> None:
    """Raise DataError for a folder of results with masks of another origin, which predictions would replace."""
    earlier = out / _LEGEND_FILE
    is_ours = earlier.is_file() and earlier.read_bytes() == _legend(classes).encode()
    if any((out / kind).exists() for kind in _KINDS) and not is_ours:
        raise DataError(
            f"{out}: holds masks/ or overlays/ already, and no {_LEGEND_FILE} says that they are predictions over "
            "these classes; name another folder, so that nothing is overwritten"
        )


def _legend(classes: Classes) -> str:
    colours = [f"#{bytes(colour).hex()}" for colour in classes.colours.tolist()]
    return json.dumps(dict(zip(classes.names, colours, strict=True)), indent=1) + "\n"


def _decoded(read: Callable[[], bytes], name: str, failures: list[Failure]) -> NDArray[np.uint8] | None:
    """Return the pixels of an image; None, and a line about it, for one that does not decode, added to `failures`."""
    try:
        return decode_pixels(read(), name)
    except (ImageError, OSError) as error:
        say(f"skipped: {error}")
        failures.append(Failure(name, str(error)))
        return None


def _refuse_none(failures: list[Failure], num_images: int) -> None:
    if len(failures) == num_images:
        raise DataError(f"none of {num_images:,} images decodes ({failures[0].reason})")


def _files(place: Path, out: Path) -> list[tuple[Path, Path]]:
    """Return image files, each with the folder that its name is relative to, without earlier results in `out`."""
    if place.is_file():
        return [(place.parent, place)]
    written = [(out / kind).resolve() for kind in _KINDS]
    masks = place / "masks"
    if (place / "images").is_dir() and masks.is_dir() and masks.resolve() not in written:
        raise DataError(f"{place}: holds masks beside its images; name {place / 'images'}")
    listing = list_images(place)
    found = [place / name for name in sorted(listing.images)]
    found = [path for path in found if not any(path.resolve().is_relative_to(folder) for folder in written)]
    if not found:
        raise DataError(f"{place}: no image file, and no folder of images ({', '.join(EXTENSIONS)})")
    skipped = f"; {skipped_text(listing.skipped)}" if listing.skipped else ""
    say(f"{place}: {len(found):,} images{skipped}")
    return [(place, path) for path in found]


def store_predictions(
    segmenter: Segmenter,
    images: Path,
    folder: Path,
    *,
    class_names: Sequence[str],
    teacher: Mapping[str, Any],
    device: torch.device,
) -> int:
    """Write soft predictions for a folder of images into a label store; return the number of new labels.

    Maps are on the grid of the model's head; keys are relative to `images`. `teacher`: the manifest's description of
    the model. An image that does not decode is skipped, said, and listed in the manifest. Raises StoreError where
    `folder` holds other labels, DataError if no image decodes.
    """
    source = FingerprintedImages(open_aloud(images, classes=False))
    topk = min(_STORED_TOPK, len(class_names))
    manifest = Manifest(
        num_classes=len(class_names),
        class_names=tuple(class_names),
        topk=topk,
        teacher=dict(teacher),
        preprocessing={name: value for name, value in asdict(segmenter.config).items() if name not in WITHOUT_EFFECT},
    )
    segmenter.model.eval()
    num_new, failures = 0, list[Failure]()
    with LabelStoreWriter(folder, manifest) as writer:
        there = LabelStore(folder)  # an interrupted call made some: this one continues it
        if replaced := [source.keys[index] for index in find_replaced(there, source).indices]:
            say(
                f"{folder}: {len(replaced):,} images were replaced since their predictions were stored "
                f"({listed(replaced)}), which stay as they are; name another --store to predict these images again"
            )
        for index, key in enumerate(tqdm(source.keys, desc=f"predict {folder}", unit="img", disable=None)):
            if key in there:
                continue
            pixels = _decoded(partial(source.read, index), key, failures)
            if pixels is None:
                continue
            probs = segmenter.probabilities(torch.from_numpy(pixels).permute(2, 0, 1).to(device))
            writer.add(key, from_probabilities(probs.cpu().numpy(), topk, name=key), source.take(key))
            num_new += 1
    update_failures(folder, failures)
    _refuse_none(failures, len(source))
    return num_new
