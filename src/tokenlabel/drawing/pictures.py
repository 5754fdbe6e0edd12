"""Pictures of what tokens are told and what they say: images with a coloured cell for each soft label."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from PIL import Image, ImageDraw

WIDTH_PX = 224
# Cells that carry a name are drawn at least this large; names longer than this don't fit in one.
_NAME_CELL_PX, _NAME_LENGTH = 18, 3


def class_colour(class_id: int) -> tuple[int, int, int]:
    """Return a colour for a class; classes that are near in number get colours that are far apart."""
    hue = (class_id * 0.381966) % 1  # the golden angle
    lightness = (0.5, 0.62, 0.4)[class_id // 8 % 3]
    red, green, blue = colorsys.hls_to_rgb(hue, lightness, 0.85)
    return round(255 * red), round(255 * green), round(255 * blue)


def enlarged(pixels: UInt8[NDArray[np.uint8], "height width 3"]) -> Image.Image:
    """Return an image at the width of all pictures, its pixels kept square and sharp."""
    image = Image.fromarray(pixels)
    return image.resize((WIDTH_PX, round(WIDTH_PX * image.height / image.width)), Image.Resampling.NEAREST)


def with_cells(
    pixels: UInt8[NDArray[np.uint8], "height width 3"],
    probs: Float[NDArray[np.float32], "h w C"],
    class_names: Sequence[str],
) -> Image.Image:
    """Return the image with each cell of a grid tinted by its most probable class.

    `probs`: soft labels of a grid over the whole image, top row first. A cell's tint is as strong as its top
    probability stands out from an even guess; a cell without any label (all zeros) is dark.
    """
    picture = enlarged(pixels).convert("RGB")
    rows, columns, num_classes = probs.shape
    tint = Image.new("RGBA", picture.size)
    draw = ImageDraw.Draw(tint)
    named = picture.width / columns >= _NAME_CELL_PX and all(
        len(name) <= _NAME_LENGTH for name in class_names
    )
    for row in range(rows):
        for column in range(columns):
            corners = [
                (picture.width * column // columns, picture.height * row // rows),
                (picture.width * (column + 1) // columns - 1, picture.height * (row + 1) // rows - 1),
            ]
            cell = probs[row, column]
            if cell.sum() <= 0:
                draw.rectangle(corners, fill=(0, 0, 0, 170))
                continue
            best = int(cell.argmax())
            certainty = max(0.0, float(cell[best]) * num_classes - 1) / max(1, num_classes - 1)
            draw.rectangle(corners, fill=(*class_colour(best), round(30 + 150 * certainty)))
            if named and certainty > 0.1:
                centre = ((corners[0][0] + corners[1][0]) / 2, (corners[0][1] + corners[1][1]) / 2)
                draw.text(
                    centre,
                    class_names[best],
                    anchor="mm",
                    fill=(255, 255, 255, 235),
                    stroke_width=1,
                    stroke_fill=(0, 0, 0, 200),
                )
    return Image.alpha_composite(picture.convert("RGBA"), tint).convert("RGB")


def mask_picture(mask: Float[NDArray[np.float32], "rows columns"], *, aspect: float) -> Image.Image:
    """Return a mask in [0, 1] in grey, white where it is 1; `aspect` is the height of the image over its width."""
    grey = Image.fromarray((mask * 255).round().astype(np.uint8))
    return grey.resize((WIDTH_PX, round(WIDTH_PX * aspect)), Image.Resampling.NEAREST).convert("RGB")
