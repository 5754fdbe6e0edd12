"""What each stage from a file to a normalised batch takes beside the plain way with Pillow and PyTorch, on one thread.

Both ways make the same pixels (the tests say so). Times are for one image: a JPEG of 500 x 375 pixels, or its crop at
224 x 224.
"""

from __future__ import annotations

import io
import tarfile
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from benchmarks.data_speed import write_photos
from benchmarks.measure import Row, Settings, interleave, ratios
from tokenlabel.core.batch import normalize_images
from tokenlabel.core.geometry import View
from tokenlabel.data.colours import brightened, contrasted, sharpened
from tokenlabel.data.config import Interpolation
from tokenlabel.data.decoding import decode_pixels
from tokenlabel.data.resampling import MEAN_COLOUR, RESAMPLING, resize, warp
from tokenlabel.data.tar_index import scan_tars
from tokenlabel.data.tars import read_index, write_index

NUM_IMAGES, SIDE_PX, NUM_IN_TAR = 32, 224, 5000
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FACTOR = 1.81  # what RandAugment's magnitude 9 gives

Ways = tuple[Callable[[], object], Callable[[], object]]


def run(settings: Settings) -> list[Row]:
    """Measure decoding, resampling, colours and normalising, and opening tar files."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_photos(folder, NUM_IMAGES)
        photos = [path.read_bytes() for path in sorted(folder.rglob("*.jpg"))]
        write_tar(folder / "0.tar")
        write_index(folder)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        for what, (ours, plain) in (stages(photos) | tar_files(folder)).items():
            seconds = interleave({"ours": ours, "plain": plain}, settings)
            count = NUM_IN_TAR if "tar" in what else NUM_IMAGES
            for way, values in seconds.items():
                rows.append(Row(f"{what}, {way}", [1e3 * s / count for s in values], "ms"))
            rows.append(Row(f"{what}, plain / ours", ratios(seconds["plain"], seconds["ours"]), "x"))
        torch.set_num_threads(threads)
    return rows


def stages(photos: list[bytes]) -> dict[str, Ways]:
    """Return our way and the plain way through each stage, for all photos."""
    decoded = [decode_pixels(photo, "photo") for photo in photos]
    crops = [resize(pixels, (SIDE_PX, SIDE_PX), Interpolation.BILINEAR) for pixels in decoded]
    pictures, wholes = [Image.fromarray(crop) for crop in crops], [Image.fromarray(p) for p in decoded]
    batch = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)
    ways: dict[str, Ways] = {
        "decode": (
            lambda: [decode_pixels(photo, "photo") for photo in photos],
            lambda: [np.array(Image.open(io.BytesIO(photo)).convert("RGB")) for photo in photos],
        ),
        "normalise": (lambda: normalize_images(batch, mean=MEAN, std=STD), lambda: plainly_normalised(batch)),
    }
    sheared = View.shear(0.27, 0, img_size=(SIDE_PX, SIDE_PX))
    for name in (Interpolation.BILINEAR, Interpolation.BICUBIC):
        ways[f"resize, {name}"] = (
            lambda name=name: [resize(pixels, (SIDE_PX, SIDE_PX), name) for pixels in decoded],
            lambda name=name: [np.array(p.resize((SIDE_PX, SIDE_PX), RESAMPLING[name])) for p in wholes],
        )
        ways[f"shear, {name}"] = (
            lambda name=name: [warp(crop, sheared, name) for crop in crops],
            lambda name=name: [plainly_warped(crop, sheared, name) for crop in crops],
        )
    turned = View.rotation(27, img_size=(SIDE_PX, SIDE_PX)).then(sheared)
    y, x = (np.mgrid[:SIDE_PX, :SIDE_PX] + 0.5) / SIDE_PX
    ways["what two warps cover"] = (
        lambda: [turned.covered_pixels((SIDE_PX, SIDE_PX)) for _ in photos],
        lambda: [turned.covers(np.stack([x, y], axis=-1)) for _ in photos],
    )
    for what, ours, plain in (
        ("brightness", brightened, ImageEnhance.Brightness),
        ("contrast", contrasted, ImageEnhance.Contrast),
        ("sharpness", sharpened, ImageEnhance.Sharpness),
    ):
        ways[what] = (
            lambda change=ours: [change(FACTOR)(picture) for picture in pictures],
            lambda kind=plain: [kind(picture).enhance(FACTOR) for picture in pictures],
        )
    return ways


def tar_files(folder: Path) -> dict[str, Ways]:
    """Return the ways to open a folder of tar files: by its index and by looking at every header."""
    paths = sorted(folder.glob("*.tar"))
    return {"open tar files": (partial(read_index, folder, paths), partial(scan_tars, paths))}


def plainly_normalised(images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return images.float().div_(255).sub_(mean).div_(std)


def plainly_warped(pixels: NDArray[np.uint8], view: View, interpolation: Interpolation) -> NDArray[np.uint8]:
    matrix = view.matrix * SIDE_PX * np.array([1 / SIDE_PX, 1 / SIDE_PX, 1])
    return np.array(
        Image.fromarray(pixels).transform(
            (SIDE_PX, SIDE_PX),
            Image.Transform.AFFINE,
            matrix.ravel().tolist(),
            RESAMPLING[interpolation],
            fillcolor=MEAN_COLOUR,
        )
    )


def write_tar(path: Path) -> None:
    """Write a tar file of small members, each image with the number of its class, as WebDataset does."""
    with tarfile.open(path, "w") as tar:
        for number in range(NUM_IN_TAR):
            for ending, data in ((".jpg", b"x" * 1500), (".cls", b"%d" % (number % 100))):
                member = tarfile.TarInfo(f"{number:08d}{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
