"""Albums: photographs with class maps, which runs write and HTML pages show. No torch.

A run writes an album of each kind (`train`, `val`) while its data is loaded, so that a report needs neither images nor
network:

    RUN/pictures/KIND-CHECKSUM.jpg    a contact sheet of all photographs of the album
    RUN/pictures/KIND.json            their places on it, texts, and the class of each cell of the maps

The sheet is written first and the JSON names it: a run that is killed in between leaves the old album intact.
"""

from __future__ import annotations

import base64
import colorsys
import io
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8
from numpy.typing import NDArray
from PIL import Image

from tokenlabel.runtime.process import write_whole

PICTURES_FOLDER = "pictures"
# Photographs are reduced to fit into (width, height), never enlarged.
PHOTO_PX = (224, 320)
_COLUMNS, _QUALITY = 6, 88
# Photographs are aligned to JPEG's blocks, so that compression does not mix neighbours.
_BLOCK_PX = 16


@dataclass(frozen=True, eq=False)
class ClassGrid:
    """The class of each cell of a grid over a region of an image.

    `ids` [h, w]: class ids, -1 without a label. `strength` [h, w] in [0, 1]: opacity of a cell; 1 if None. `region`:
    left, top, right and bottom, as fractions of the image.
    """

    ids: Int[NDArray[np.integer[Any]], "h w"]
    strength: Float[NDArray[np.floating[Any]], "h w"] | None = None
    region: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)


def top_classes(
    ids: Int[NDArray[np.integer[Any]], "h w"], probs: Float[NDArray[np.floating[Any]], "h w"], num_classes: int
) -> ClassGrid:
    """Return a map of the most probable classes; its strength is the probability above chance, scaled to [0, 1].

    A cell of probability 0 has no label.
    """
    above = (probs * num_classes - 1) / max(1, num_classes - 1)
    return ClassGrid(np.where(probs > 0, ids, -1), above.clip(0, 1))


@dataclass(frozen=True, eq=False)
class Tile:
    """A photograph, with a class map over it or not. Tiles of the same array share a photograph of the sheet."""

    photo: UInt8[NDArray[np.uint8], "height width 3"]
    text: str
    classes: ClassGrid | None = None


@dataclass(frozen=True, eq=False)
class Album:
    """Pictures as they are stored.

    `sheet`: a JPEG of all photographs. `about`: the content of KIND.json: `size` of the sheet and `photos`, left, top,
    width and height of each on it; `classes`, the names of those that occur, and their `colours` or None; `pictures`,
    dicts with the `tiles` of each picture and its other entries.
    """

    sheet: bytes
    about: dict[str, Any] = field(repr=False)

    @property
    def name(self) -> str:
        """The checksum of the sheet."""
        return f"{zlib.crc32(self.sheet):08x}"

    def write(self, folder: Path, kind: str, **more: Any) -> None:
        """Write the album into a folder, in place of another of its kind, with `more` entries in the JSON."""
        sheet = f"{kind}-{self.name}.jpg"
        write_whole(folder / sheet, [self.sheet])
        write_whole(folder / f"{kind}.json", json.dumps({**more, "sheet": sheet, **self.about}) + "\n")
        for older in folder.glob(f"{kind}-*.jpg"):
            if older.name != sheet:
                older.unlink(missing_ok=True)

    def class_map(self, tile: Mapping[str, Any]) -> ClassGrid | None:
        """Return the map of a tile in `about["pictures"]`, with ids into `about["classes"]`, or None."""
        packed = tile.get("map")
        if packed is None:
            return None
        height, width = packed["size"]
        ids, strength = (_unpacked(packed[part]).reshape(height, width) for part in ("ids", "strength"))
        return ClassGrid(ids.astype(np.int64) - 1, strength / np.float32(255), tuple(packed["region"]))


def make_album(
    pictures: Iterable[tuple[Sequence[Tile], Mapping[str, Any]]],
    class_names: Sequence[str],
    *,
    colours: UInt8[NDArray[np.uint8], "C 3"] | None = None,
    **more: Any,
) -> Album:
    """Return an album of pictures, given as tiles and other entries such as `key` and `caption`.

    `class_names`: of the ids in the maps; further ids are named by their number. `more`: entries of the album.
    """
    photos: list[Image.Image] = []
    numbers: dict[int, int] = {}
    pictures = list(pictures)  # keeps all arrays alive: they are identified by id() below
    maps = [tile.classes for tiles, _ in pictures for tile in tiles if tile.classes]
    found = sorted({i for classes in maps for i in np.unique(classes.ids[classes.ids >= 0]).tolist()})
    entries = []
    for tiles, facts in pictures:
        packed = []
        for tile in tiles:
            if id(tile.photo) not in numbers:
                numbers[id(tile.photo)] = len(photos)
                photos.append(fitted(tile.photo))
            number = numbers[id(tile.photo)]
            packed.append({"photo": number, "text": tile.text, "map": _packed(tile.classes, found, photos[number])})
        entries.append({**facts, "tiles": packed})
    sheet, boxes = _contact_sheet(photos)
    names = [class_names[i] if i < len(class_names) else str(i) for i in found]
    about: dict[str, Any] = {**more, "size": sheet.size, "photos": boxes, "classes": names}
    about["colours"] = None if colours is None else colours[found].tolist()
    return Album(_jpeg(sheet), {**about, "pictures": entries})


def read_album(folder: Path, kind: str) -> Album | None:
    """Return the album of a kind that `Album.write` wrote into a folder; None if it is missing or damaged."""
    try:
        about = json.loads((folder / f"{kind}.json").read_text(encoding="utf-8"))
        is_whole = {"size", "photos", "classes", "colours", "pictures"} <= about.keys()
        return Album((folder / about["sheet"]).read_bytes(), about) if is_whole else None
    except (OSError, ValueError, KeyError, AttributeError):
        return None


def fitted(pixels: UInt8[NDArray[np.uint8], "height width 3"]) -> Image.Image:
    """Return an image reduced to `PHOTO_PX` if it is larger, keeping its aspect ratio."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.thumbnail(PHOTO_PX, Image.Resampling.BICUBIC)
    return image


def class_colour(number: int) -> tuple[int, int, int]:
    """Return a colour for a class; ids close to each other have distant colours."""
    hue = (number * 0.381966) % 1  # the golden angle
    lightness = (0.5, 0.62, 0.4)[number // 8 % 3]
    red, green, blue = colorsys.hls_to_rgb(hue, lightness, 0.85)
    return round(255 * red), round(255 * green), round(255 * blue)


def _packed(classes: ClassGrid | None, found: Sequence[int], photo: Image.Image) -> dict[str, Any] | None:
    """Return a map as JSON, no finer than its photo. Ids are indices into the classes found plus 1, 0 for none."""
    if classes is None:
        return None
    # A map of one cell a pixel, as of a mask, would be larger than the photograph.
    rows, columns = (
        np.arange(min(length, most)) * length // min(length, most)
        for length, most in zip(classes.ids.shape, (photo.height, photo.width), strict=True)
    )
    ids = classes.ids[np.ix_(rows, columns)]
    strength = np.ones(ids.shape) if classes.strength is None else classes.strength[np.ix_(rows, columns)]
    places = np.where(ids >= 0, np.searchsorted(found, ids) + 1, 0)
    return {
        "size": ids.shape,
        "region": [round(float(edge), 5) for edge in classes.region],
        "ids": _text(places.astype("<u4")),
        "strength": _text((strength * 255).round().astype("<u4")),
    }


def _text(numbers: NDArray[np.unsignedinteger[Any]]) -> str:
    return base64.b64encode(zlib.compress(numbers.tobytes(), 9)).decode()


def _unpacked(text: str) -> NDArray[np.unsignedinteger[Any]]:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), "<u4")


def _contact_sheet(photos: Sequence[Image.Image]) -> tuple[Image.Image, list[list[int]]]:
    """Return one image of all photographs, and left, top, width and height of each."""
    widest, highest = (
        -(-max((photo.size[axis] for photo in photos), default=1) // _BLOCK_PX) * _BLOCK_PX for axis in (0, 1)
    )
    columns = max(1, min(_COLUMNS, len(photos)))
    sheet = Image.new("RGB", (widest * columns, highest * max(1, -(-len(photos) // columns))), "white")
    boxes = []
    for number, photo in enumerate(photos):
        row, column = divmod(number, columns)
        sheet.paste(photo, (column * widest, row * highest))
        boxes.append([column * widest, row * highest, *photo.size])
    return sheet, boxes


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_QUALITY, subsampling=0)  # full resolution of colours: pictures are small
    return buffer.getvalue()
