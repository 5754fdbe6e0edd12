"""Masks: a class number for every pixel, in image files, or described by COCO's annotation files.

COCO's are instances (polygons and run lengths), or panoptic segments in PNGs. Instances may overlap. A pixel belongs to
the smallest instance that covers it (by its number of pixels; among equal ones to the later in the file); one that only
a crowd region covers does not count; one that nothing covers has no class. pycocotools (extra: coco) fills polygons,
so that their edges lie where everybody's do. Format: https://cocodataset.org/#format-data
"""

from __future__ import annotations

import io
import json
import re
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32, UInt16
from numpy.typing import NDArray
from PIL import Image, ImageFile

from tokenlabel.core.geometry import turned
from tokenlabel.data.decoding import orientation_of, stored_size, undecodable
from tokenlabel.data.folders import list_images
from tokenlabel.data.listings import Strings
from tokenlabel.runtime.errors import DataError, import_extra
from tokenlabel.runtime.process import listed, read_json

MAX_CLASSES = 32_767  # ids of training masks have 16 bits with a sign
SUFFIXES = (".png", ".PNG", ".tif", ".tiff", ".bmp", ".gif", ".pgm")  # formats that keep numbers as they are
# What tools put between the name of an image and that of its mask.
_ENDINGS = ("_mask", "_seg", "_segmentation", "_gt", "_label", "_labels", "_L", ".mask", ".seg")
COCO_SUFFIX = ".json"
CROWD = 65_534  # the value of pixels of a crowd region, which do not count
_LOSSY = ("JPEG", "MPO", "WEBP", "AVIF")


def unlabelled_value(num_classes: int) -> int:
    """Return the value in masks of pixels of no class, where nobody says it: 255, or 65535 where 255 is a class."""
    return 255 if num_classes <= 255 else 65_535


def mask_names(key: str) -> Iterator[str]:
    """Yield what the mask of `a/1.jpg` may be called: first `a/1.png`, then `a/1.jpg.png`, last `a/1_mask.png`."""
    path = PurePosixPath(key)
    yield from (path.with_suffix(suffix).as_posix() for suffix in SUFFIXES)
    yield f"{key}.png"
    for ending in _ENDINGS:
        yield path.with_name(f"{path.stem}{ending}.png").as_posix()


def find_masks(
    masks: Path, keys: Iterable[str], names: Callable[[str], Iterable[str]] = mask_names
) -> tuple[dict[str, str], list[str]]:
    """Return the mask of each image in a folder, "" for none, and the images in it that are no mask of these.

    `names`: yields possible names of the mask of an image.
    """
    # One walk through the folder, as asking for each file would be slow on network file systems.
    there = {*list_images(masks).images}
    found = {key: next((name for name in names(key) if name in there), "") for key in keys}
    return found, sorted(there.difference(found.values()))


def decode_mask(data: bytes, name: str) -> NDArray[np.integer]:
    """Return the values [height, width] of an encoded mask; of one with a palette, the numbers of its colours.

    Channels of red, green and blue that are equal are the values of a grey one, as many tools save it. A mask with an
    orientation tag is turned upright, as images are. Raises DataError for anything else.
    """
    try:
        image = Image.open(io.BytesIO(data))
        spread = _spread(image)
        values = np.asarray(image)
        values = values if spread == 1 else np.rint(values / spread).astype(np.uint16)
        orientation = orientation_of(data, image)
    except Exception as error:  # Pillow's decoders raise whatever their parsing runs into
        raise DataError(undecodable(name, error)) from error
    if image.format in _LOSSY:
        raise DataError(f"{name}: is a {image.format}, which rounds the numbers of classes; save masks as PNG")
    if values.ndim == 3 and _is_grey(values):
        values = values[:, :, 0]
    if values.ndim == 3:
        num_colours = len(np.unique(values.reshape(-1, values.shape[2]), axis=0))
        raise DataError(
            f"{name}: has {values.shape[2]} channels; a mask has one channel of class numbers: turn its "
            f"{num_colours:,} colours ({image.mode}) into numbers first"
        )
    if values.dtype.kind == "f" and not (np.isfinite(values) & (values == np.rint(values))).all():
        raise DataError(f"{name}: holds fractions; a mask holds whole numbers of classes")
    return turned(values if values.dtype.kind in "iu" else values.astype(np.int64), orientation)


def _spread(image: ImageFile.ImageFile) -> float:
    """Return by how much Pillow multiplies the numbers of an image that is open, but not loaded.

    Greys of 2 and 4 bits are spread over 0 to 255, and those of a PGM up to its `maxval` over 0 to 255 or 65535.
    """
    if not image.tile:  # of formats that are decoded as a whole
        return 1
    codec, _, _, args = image.tile[0]
    mode, *rest = args if isinstance(args, tuple) else (args,)
    if codec in ("ppm", "ppm_plain") and image.mode in "LI":
        return (65_535 if image.mode == "I" else 255) / rest[0]
    few_bits = re.match(r"L;([24])", str(mode))
    return 255 / (2 ** int(few_bits[1]) - 1) if few_bits else 1


def _is_grey(values: NDArray[np.integer]) -> bool:
    """Return True if channels are one opaque grey: only then do they hold class numbers."""
    num_colours = 1 if values.shape[2] == 2 else 3  # two channels are grey and alpha
    colours, alpha = values[:, :, :num_colours], values[:, :, num_colours:]
    return bool((colours == colours[:, :, :1]).all() and (alpha == 255).all())


def palette_of(data: bytes) -> list[bytes]:
    """Return the colours (RGB) of an encoded mask's palette; none of a mask without one."""
    image = Image.open(io.BytesIO(data))
    colours = bytes(image.getpalette("RGB") or ()) if image.mode == "P" else b""
    return [colours[start : start + 3] for start in range(0, len(colours), 3)]


def check_upright(size_px: tuple[int, ...], data: bytes, *, mask: str, image: str) -> None:
    """Raise DataError for a mask of (height, width) that has the sides of its image as stored, not as people see it.

    `data`: the encoded image. Half turns and mirror images have the same sides: nothing tells them apart.
    """
    orientation = orientation_of(data)
    if orientation < 5:
        return
    width, height = stored_size(data, image)
    if _fits(size_px, (height, width)) and not _fits(size_px, (width, height)):
        raise DataError(
            f"{mask}: lies as {image} stores its pixels ({height} x {width}, height x width), but people see the "
            f"photograph turned to {width} x {height} by its orientation tag (EXIF {orientation}); turn the mask "
            "likewise, or remove the tag if the stored pixels are upright"
        )


def is_stretched(mask_px: tuple[int, ...], data: bytes, *, image: str) -> bool:
    """Return True if a mask of (height, width) has another aspect ratio than its image, whose file holds `data`."""
    width, height = stored_size(data, image)
    return not _fits(mask_px, (width, height) if orientation_of(data) >= 5 else (height, width))


def _fits(mask_px: tuple[int, ...], image_px: tuple[int, int]) -> bool:
    """Return True if a mask has the aspect ratio of an image, up to the rounding of its sides."""
    return abs(mask_px[0] * image_px[1] - mask_px[1] * image_px[0]) <= max(image_px)


class CocoMasks:
    """The masks that a file describes, by the names of its images. Pickles as a few buffers.

    `class_names`: the file's categories in the order of their ids: those of the values 0, 1, 2, ... in masks; pixels of
    none have `unlabelled_value(len(class_names))`, those of crowds `CROWD`. `names`: the images that have a mask,
    ascending; `bare`: those of them without an instance, or with crowds alone. Raises DataError for a file of another
    kind, and for what refers to an image or a category that is not there.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        content = _content(self.path)
        try:
            ids = sorted((int(category["id"]), str(category["name"])) for category in content["categories"])
            self.class_names = [name for _, name in ids]
            if len({category for category, _ in ids}) < len(ids):
                raise ValueError("two of its categories have the same id")
            self._is_panoptic = any("segments_info" in annotation for annotation in content["annotations"])
            values = {category: value for value, (category, _) in enumerate(ids)}
            described = _described(content, values, is_panoptic=self._is_panoptic)
        except (KeyError, TypeError, ValueError) as error:
            what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            raise DataError(f"{self.path}: does not read as COCO's annotations ({what})") from error
        if not 0 < len(self.class_names) <= MAX_CLASSES:
            raise DataError(f"{self.path}: lists {len(ids):,} categories, expected 1 to {MAX_CLASSES:,}")
        self.names = Strings(sorted(described))
        self.bare = frozenset(name for name, mask in described.items() if _has_nothing(mask))
        self._masks = Strings([json.dumps(described[name]) for name in self.names])

    def __str__(self) -> str:
        return str(self.path)

    def ids_of(self, class_names: Sequence[str], *, unlabelled: int) -> Int32[NDArray[np.int32], " _"]:
        """Return the id in a list of classes of each value that masks may hold, `unlabelled` for what is none of them.

        Without a list values stay as they are. Raises DataError where no category is in the list.
        """
        names = list(class_names) or self.class_names
        numbers = {name: number for number, name in enumerate(names)}
        ids = np.full(unlabelled_value(MAX_CLASSES) + 1, unlabelled, np.int32)
        ids[: len(self.class_names)] = [numbers.get(name, unlabelled) for name in self.class_names]
        if not numbers.keys() & {*self.class_names}:
            raise DataError(
                f"{self.path}: its categories ({listed(self.class_names)}) are none of the classes {listed(names)}"
            )
        return ids

    def names_of(self, keys: Iterable[str]) -> dict[str, str]:
        """Return which of the file's images each key is: that of the same path, or the only one of the same file name.

        Keys that are none of them are left out.
        """
        exact, by_file = {*self.names}, defaultdict[str, list[str]](list)
        for name in self.names:
            by_file[PurePosixPath(name).name].append(name)
        keys = list(keys)
        twice = Counter(PurePosixPath(key).name for key in keys)
        found = {}
        for key in keys:
            file = PurePosixPath(key).name
            if key in exact:
                found[key] = key
            elif twice[file] == len(by_file[file]) == 1:
                found[key] = by_file[file][0]
        return found

    def read(self, name: str) -> UInt16[NDArray[np.uint16], "height width"]:
        """Return the values of the mask of one of `names`. Raises DataError where it is broken."""
        index = bisect_left(self.names, name)
        assert self.names[index] == name
        mask = json.loads(self._masks[index])
        if self._is_panoptic:
            return self._panoptic(mask["segments"], self._folder / mask["png"])
        size_px = (mask["height"], mask["width"])
        pieces = []
        for number, category, is_crowd, segmentation in mask["instances"]:
            try:
                piece = instance_mask(segmentation, size_px)
            except (TypeError, ValueError, OverflowError) as error:
                raise DataError(f"{self.path}: annotation {number} of {name} {error}") from error
            pieces.append((piece, CROWD if is_crowd else category))
        return painted(pieces, size_px, unlabelled=unlabelled_value(len(self.class_names)))

    @property
    def _folder(self) -> Path:
        """Where the PNGs of a panoptic file lie: in the folder of its name beside it, as published."""
        return self.path.with_suffix("")

    def _panoptic(self, segments: Sequence[Sequence[int]], png: Path) -> UInt16[NDArray[np.uint16], "height width"]:
        """Return the values of a PNG whose colours are the numbers of segments: red + 256 green + 65,536 blue."""
        try:
            pixels = np.asarray(Image.open(io.BytesIO(png.read_bytes())).convert("RGB"), np.int64)
        except Exception as error:  # Pillow's decoders raise whatever their parsing runs into
            raise DataError(f"{png}: the segments of {self.path} cannot be read ({error})") from error
        found, places = np.unique(pixels @ (1, 256, 65_536), return_inverse=True)
        value_of = {number: CROWD if is_crowd else category for number, category, is_crowd in segments}
        value_of[0] = unlabelled_value(len(self.class_names))
        if unknown := [str(number) for number in found.tolist() if number not in value_of]:
            raise DataError(f"{png}: holds the segments {listed(unknown)}, which {self.path} does not describe")
        values = np.array([value_of[number] for number in found.tolist()], np.uint16)
        return values[places.reshape(pixels.shape[:2])]


def instance_mask(segmentation: Any, size_px: tuple[int, int]) -> Bool[NDArray[np.bool_], "height width"]:
    """Return the pixels of an instance in an image of (height, width): polygons, or run lengths, compressed or not.

    Raises ValueError, which says what is wrong, for what does not fit the image.
    """
    if isinstance(segmentation, dict):
        if list(segmentation.get("size", ())) != list(size_px):
            given = " x ".join(map(str, segmentation.get("size", ())))
            raise ValueError(f"is of {given} pixels (height x width), its image of {size_px[0]} x {size_px[1]}")
        counts = segmentation.get("counts")
        runs = np.array(run_lengths(counts) if isinstance(counts, str) else counts, np.int64)
        num_px = size_px[0] * size_px[1]
        if runs.ndim != 1 or (runs < 0).any() or runs.sum() != num_px:
            raise ValueError(f"has runs of {runs.sum():,} pixels, its image {size_px[0]} x {size_px[1]} = {num_px:,}")
        # The first run is outside of the instance, the second inside, and so on.
        inside = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
        return inside.reshape(size_px[::-1]).T  # runs go down the columns
    if not segmentation:
        raise ValueError("has no segmentation; a box alone is no mask")
    for polygon in segmentation:
        if len(polygon) < 6 or len(polygon) % 2:
            raise ValueError(f"has a polygon of {len(polygon)} numbers, expected x and y of 3 points or more")
    coco = import_extra("pycocotools.mask", "coco", "pycocotools, which polygons need,")
    runs: Any = coco.merge(coco.frPyObjects(segmentation, *size_px))
    return instance_mask({**runs, "counts": runs["counts"].decode()}, size_px)


def run_lengths(text: str) -> list[int]:
    """Return the run lengths that COCO's compressed counts hold.

    Each number takes characters of 5 bits, the lowest first, the last one with its sign; from the fourth number on
    it is the difference to the one two before. Raises ValueError for what is none.
    """
    lengths: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            raise ValueError(f"has counts with the character {character!r}, which is none of COCO's")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits & 16) << shift - 4
            lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError("has counts that end in the middle of a number")
    return lengths


def painted(
    pieces: Sequence[tuple[Bool[NDArray[np.bool_], "height width"], int]], size_px: tuple[int, int], *, unlabelled: int
) -> UInt16[NDArray[np.uint16], "height width"]:
    """Return the value of each pixel of (height, width): of the smallest piece there, of equal ones the later.

    Pieces of the value `CROWD` lie below all others, whatever their size.
    """
    values = np.full(size_px, unlabelled, np.uint16)
    # Painted from the largest to the smallest, so that what is left of each is what nothing smaller covers.
    for piece, value in sorted(pieces, key=lambda item: (item[1] != CROWD, -int(item[0].sum()))):
        values[piece] = value
    return values


def _content(path: Path) -> dict[str, Any]:
    content = read_json(path)
    lists = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(isinstance(content.get(name), list) for name in lists):
        raise DataError(f"{path}: is no COCO file; expected the lists {', '.join(lists)}")
    return content


def _has_nothing(mask: dict[str, Any]) -> bool:
    """Return True if no pixel of a described mask counts, for want of an instance that is no crowd."""
    return "instances" in mask and all(is_crowd for _, _, is_crowd, _ in mask["instances"])


def _described(content: dict[str, Any], values: dict[int, int], *, is_panoptic: bool) -> dict[str, dict[str, Any]]:
    """Return what is known of the mask of each image, by its name: as `CocoMasks.read` takes it.

    `values`: of each category's id. Raises ValueError for references to nothing, KeyError for what is left out.
    """
    names = {image["id"]: str(image["file_name"]) for image in content["images"]}
    if len({*names.values()}) < len(content["images"]):
        raise ValueError("two of its images have the same id or the same file_name")
    described: dict[str, dict[str, Any]] = {}
    if not is_panoptic:
        described = {
            names[image["id"]]: {"height": image["height"], "width": image["width"], "instances": []}
            for image in content["images"]
        }
    for annotation in content["annotations"]:
        number = annotation["file_name" if is_panoptic else "id"]
        if annotation["image_id"] not in names:
            raise ValueError(f"annotation {number} is of the image {annotation['image_id']}, which it does not list")
        name = names[annotation["image_id"]]
        pieces = annotation["segments_info"] if is_panoptic else [annotation]
        for piece in pieces:
            if piece["category_id"] not in values:
                raise ValueError(
                    f"annotation {number} of {name} has the category {piece['category_id']}, which is none of its "
                    f"{len(values):,}"
                )
        kinds = [(values[piece["category_id"]], piece.get("iscrowd", 0)) for piece in pieces]
        if is_panoptic:
            segments = [(piece["id"], *kind) for piece, kind in zip(pieces, kinds, strict=True)]
            described[name] = {"png": number, "segments": segments}
        else:
            described[name]["instances"].append((number, *kinds[0], annotation.get("segmentation")))
    return described
