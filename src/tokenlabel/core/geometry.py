"""Where an augmented image came from: boxes and affine views, in fractions of an image.

A point is (x, y): (0, 0) is the outer corner of the top left pixel, (1, 1) the outer corner of the bottom
right one, so pixel i of n covers [i/n, (i+1)/n). The same holds for the cells of a score map and for the
tokens of a model, which is why nothing here needs to know how many pixels, cells or tokens there are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from tokenlabel.runtime.coercion import Size, check_several, described, pair

Scalar = TypeVar("Scalar", bound=np.generic)

# A point may miss a frame by this much (a tenth of a pixel at 10,000 px) before it counts as outside.
EDGE_TOLERANCE = 1e-5

_UNIT_CORNERS = np.array([[0.0, 0.0, 1.0], [1.0, 0.0, 1.0], [0.0, 1.0, 1.0], [1.0, 1.0, 1.0]])


@dataclass(frozen=True, slots=True)
class Box:
    """An axis-aligned part of an image, in fractions of its width and height, half open.

    >>> box = tl.Box(left=0.25, right=0.75)
    >>> box.width, box.height
    (0.5, 1.0)
    >>> tl.Box.from_pixels(left_px=0, top_px=0, width_px=32, height_px=48, img_size=(48, 64))
    Box(left=0.0, top=0.0, right=0.5, bottom=1.0)
    """

    left: float = 0.0
    top: float = 0.0
    right: float = 1.0
    bottom: float = 1.0

    def __post_init__(self) -> None:
        sides = (self.left, self.top, self.right, self.bottom)
        finite = all(isinstance(side, Real) and math.isfinite(side) for side in sides)
        if not (finite and self.left < self.right and self.top < self.bottom):
            raise ValueError(f"a box needs left < right and top < bottom, all finite; got {self}")

    @property
    def width(self) -> float:
        """Width as a fraction of the image's width."""
        return self.right - self.left

    @property
    def height(self) -> float:
        """Height as a fraction of the image's height."""
        return self.bottom - self.top

    @classmethod
    def from_pixels(cls, *, left_px: float, top_px: float, width_px: float, height_px: float, img_size: Size) -> Box:
        """Return the box of a rectangle of pixels of an image of `img_size` (height, width)."""
        image_height_px, image_width_px = pair(img_size)
        return cls(
            left=left_px / image_width_px,
            top=top_px / image_height_px,
            right=(left_px + width_px) / image_width_px,
            bottom=(top_px + height_px) / image_height_px,
        )


WHOLE_IMAGE = Box()

# EXIF orientation -> what makes the stored pixels upright: (transpose, then flip the rows, then flip the columns).
_TURNS = {
    1: (False, False, False),
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}
# The orientation that turns upright pixels back into stored ones: the same one, but for the two quarter turns.
OPPOSITE = {orientation: orientation for orientation in _TURNS} | {6: 8, 8: 6}


def turned(values: NDArray[Scalar], orientation: int) -> NDArray[Scalar]:
    """Return values [rows, columns, ...] in upright orientation; `values` are in that of the file's stored pixels.

    `orientation`: the file's EXIF tag, 1 to 8; `OPPOSITE[orientation]` turns them back. Nothing is copied.
    """
    swapped, rows, columns = _TURNS[orientation]
    values = values.swapaxes(0, 1) if swapped else values
    return values[:: -1 if rows else 1, :: -1 if columns else 1]


def turned_box(box: Box, orientation: int) -> Box:
    """Return where a box on the stored pixels lies on the upright image; see `turned`."""
    swapped, rows, columns = _TURNS[orientation]
    left, top, right, bottom = box.left, box.top, box.right, box.bottom
    if swapped:
        left, top, right, bottom = top, left, bottom, right
    if rows:
        top, bottom = 1 - bottom, 1 - top
    if columns:
        left, right = 1 - right, 1 - left
    return Box(left, top, right, bottom)


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """Maps points of an augmented image back to points of its source image.

    `frames` [F, 2, 3], float64: affine maps from the augmented image to the source (the last one) and to the
    intermediate images that a chain of warps went through. Most views have one frame. A view keeps an intermediate
    frame only where that image cut something off: a point is covered if it lies inside all frames. (Rotating by 30
    degrees and back composes to the identity, and yet the corners are lost.)

    Views chain in the order in which the image was changed: `View.crop(box).then(View.flip_horizontal())`.

    >>> view = tl.View.crop(tl.Box(right=0.5)).then(tl.View.flip_horizontal())
    >>> view.to_source(np.array([0.0, 0.5]))  # the left edge of what the model sees is the middle of the image
    array([0.5, 0.5])
    """

    frames: NDArray[np.float64]

    def __post_init__(self) -> None:
        if not isinstance(self.frames, np.ndarray) or self.frames.ndim != 3 or self.frames.shape[1:] != (2, 3):
            raise ValueError(f"a view needs frames [F, 2, 3] as a NumPy array, got {described(self.frames)}")

    @property
    def matrix(self) -> NDArray[np.float64]:
        """The map [2, 3] from a point of the augmented image to a point of the source image."""
        return self.frames[-1]

    def then(self, later: View) -> View:
        """Return the view of an image that `later` made out of the image that this view describes.

        Frames that contain the whole augmented image can cut nothing off, and are dropped: crops and flips
        never add one.
        """
        if not isinstance(later, View):
            raise ValueError(f"later: expected a View, such as View.crop(box), got {described(later)}")
        frames = [*later.frames, *(_compose(frame, later.matrix) for frame in self.frames[:-1])]
        kept = [frame for frame in frames if not _contains_unit_square(frame)]
        return View(np.stack([*kept, _compose(self.matrix, later.matrix)]))

    def to_source(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the source points [..., 2] of points [..., 2] of the augmented image."""
        return points @ self.matrix[:, :2].T + self.matrix[:, 2]

    def covers(self, points: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Return for each point [..., 2] of the augmented image whether it shows a part of the source."""
        in_frames = np.einsum("fij,...j->...fi", self.frames[:, :, :2], points) + self.frames[:, :, 2]
        inside = (in_frames >= -EDGE_TOLERANCE) & (in_frames <= 1 + EDGE_TOLERANCE)  # [..., F, 2]
        return np.asarray(inside.all(axis=(-2, -1)))

    def covered_pixels(self, img_size: Size) -> NDArray[np.bool_]:
        """Return `covers` for all pixel centres of an augmented image of `img_size` (height, width): [height, width].

        The terms of x and y are computed separately and broadcast, which is tens of times as fast.
        """
        img_size = pair(img_size)
        y, x = ((np.arange(side) + 0.5) / side for side in img_size)
        covered = np.ones(img_size, np.bool_)
        for along_x, along_y, shift in self.frames.reshape(-1, 3):
            point = along_x * x + (along_y * y + shift)[:, None]  # [height, width]
            covered &= (point >= -EDGE_TOLERANCE) & (point <= 1 + EDGE_TOLERANCE)
        return covered

    @classmethod
    def identity(cls) -> View:
        """Return the view of an image that was not changed (or only resized: fractions do not notice)."""
        return cls(_matrix(1, 0, 0, 0, 1, 0)[None])

    @classmethod
    def crop(cls, box: Box) -> View:
        """Return the view of a crop. The box may reach over the image's edges (padding)."""
        if not isinstance(box, Box):  # four numbers would not say in which order they are, nor in which unit
            raise ValueError(
                "box: expected a Box in fractions of the image, such as Box(left=0, top=0, right=0.5, bottom=1) or "
                f"Box.from_pixels(...), got {box!r}"
            )
        return cls(_matrix(box.right - box.left, 0, box.left, 0, box.bottom - box.top, box.top)[None])

    @classmethod
    def flip_horizontal(cls) -> View:
        """Return the view of an image whose left and right changed places."""
        return cls(_matrix(-1, 0, 1, 0, 1, 0)[None])

    @classmethod
    def flip_vertical(cls) -> View:
        """Return the view of an image whose top and bottom changed places."""
        return cls(_matrix(1, 0, 0, 0, -1, 1)[None])

    @classmethod
    def translation(cls, right: float, down: float) -> View:
        """Return the view of an image whose content moved, in fractions of its width and height."""
        return cls(_matrix(1, 0, -right, 0, 1, -down)[None])

    @classmethod
    def rotation(cls, degrees: float, *, img_size: Size) -> View:
        """Return the view of an image of `img_size` (height, width) turned counter-clockwise about its centre."""
        height_px, width_px = pair(img_size)
        sine, cosine = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
        # Pixels are square, fractions are not: the turn happens in pixels.
        to_y, to_x = sine * width_px / height_px, -sine * height_px / width_px
        return cls(_matrix(cosine, to_x, (1 - cosine - to_x) / 2, to_y, cosine, (1 - cosine - to_y) / 2)[None])

    @classmethod
    def shear(cls, x: float, y: float, *, img_size: Size) -> View:
        """Return the view of an image of `img_size` (height, width) sheared about its top left corner.

        The point (u, v) shows the source at (u + x * v, v + y * u), in pixels.
        """
        height_px, width_px = pair(img_size)
        return cls(_matrix(1, x * height_px / width_px, 0, y * width_px / height_px, 1, 0)[None])


def stack_views(views: Sequence[View]) -> NDArray[np.float32]:
    """Return the frames [B, F, 2, 3] of a batch of views, the source last.

    Views with fewer frames are padded in front with identities, inside which every point of the augmented image lies.

    >>> tl.stack_views([tl.View.identity(), tl.View.flip_horizontal()]).shape
    (2, 1, 2, 3)
    """
    check_several(views, View, name="views", made_by="View.crop")
    num_frames = max(len(view.frames) for view in views)
    stacked = np.broadcast_to(_matrix(1, 0, 0, 0, 1, 0), (len(views), num_frames, 2, 3)).astype(np.float32)
    for row, view in zip(stacked, views, strict=True):
        row[num_frames - len(view.frames) :] = view.frames
    return stacked


def _matrix(*entries: float) -> NDArray[np.float64]:
    if not all(map(math.isfinite, entries)):
        raise ValueError(f"a view needs finite numbers, got the matrix {entries}")
    return np.array(entries, dtype=np.float64).reshape(2, 3)


def _compose(outer: NDArray[np.float64], inner: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the map that applies `inner` first."""
    composed = outer[:, :2] @ inner
    composed[:, 2] += outer[:, 2]
    return composed


def _contains_unit_square(frame: NDArray[np.float64]) -> bool:
    corners = _UNIT_CORNERS @ frame.T
    return bool(((corners >= -EDGE_TOLERANCE) & (corners <= 1 + EDGE_TOLERANCE)).all())
