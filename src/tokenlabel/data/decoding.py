"""Encoded images as pixels, upright and in RGB, and the check before a run that they decode."""

from __future__ import annotations

import io
import os
import re
import struct
from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from tokenlabel.core.geometry import turned
from tokenlabel.data.images import ImageSource, ImageSubset, counted, has_classes
from tokenlabel.runtime.coercion import Choice
from tokenlabel.runtime.errors import DataError, ImageError
from tokenlabel.runtime.process import in_threads, listed, say

try:
    import simplejpeg
except ImportError:  # the extra "fast"
    simplejpeg = None

# Up to this many images `check_images` decodes every one by default (about 10 ms each for 500 x 375 JPEGs).
DECODE_ALL_UP_TO = 10_000

_JPEG = b"\xff\xd8\xff"
_MANY_PIXELS = 1 << 27  # more may be a few bytes that would fill the memory: Pillow has a limit, simplejpeg has none
_ORIENTATION = 0x0112  # the tag of EXIF data
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')


def decode_image(data: bytes, name: str) -> Image.Image:
    """Decode to RGB; `name` is what the ImageError calls an image that does not decode.

    Transparency is dropped, 16-bit greys keep their upper byte, and of an animation the first picture counts.
    Pixels lie upright, as people see them: the orientation tag (EXIF) is applied, other than in torchvision and timm.
    """
    try:
        image = Image.open(io.BytesIO(data))
        rgb = _as_rgb(image)
        orientation = orientation_of(data, image)
        if orientation == 1:
            return rgb
        return Image.fromarray(np.ascontiguousarray(turned(np.asarray(rgb), orientation)))
    except Exception as error:  # Pillow's decoders raise whatever their parsing runs into
        raise ImageError(undecodable(name, error)) from error


def undecodable(name: str, error: Exception) -> str:
    """Return the message for an image that Pillow does not decode, and raises an error of whatever type for."""
    reason = "it is of no known format" if isinstance(error, UnidentifiedImageError) else str(error)
    return f"{name}: does not decode as an image ({reason or type(error).__name__})"


def decode_pixels(data: bytes, name: str) -> NDArray[np.uint8]:
    """Decode to RGB pixels [height, width, 3], as `decode_image` does.

    JPEGs take simplejpeg where it is installed: the same pixels, without Pillow's copy of them.
    """
    if simplejpeg is not None and data.startswith(_JPEG):
        try:
            height, width = map(int, simplejpeg.decode_jpeg_header(data)[:2])
            if height * width <= _MANY_PIXELS:
                return np.ascontiguousarray(turned(simplejpeg.decode_jpeg(data), orientation_of(data)))
        except ValueError:
            pass  # four inks, say, or damage: what can be done is for Pillow to decide, as of huge images
    return np.array(decode_image(data, name))


def stored_size(data: bytes, name: str) -> tuple[int, int]:
    """Return width and height of an encoded image as it is stored, by its header alone. Raises ImageError for none."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.size
    except Exception as error:  # as in `decode_image`; of too large an image it is no OSError either
        raise ImageError(undecodable(name, error)) from error


def orientation_of(data: bytes, image: Image.Image | None = None) -> int:
    """Return the orientation tag of an encoded image, 1 to 8: see `geometry.turned`; 1 where it has none.

    `image`: what Pillow opened of it, where it has; a PNG may name its orientation behind its pixels.
    """
    if data.startswith(_JPEG):
        return _orientation_of_jpeg(data)
    if data.startswith(b"\x89PNG") and not any(word in data for word in (b"eXIf", b"exif", b"xmp")):
        return 1  # without a word of it Pillow would decode all pixels to look behind them
    try:
        image = image or Image.open(io.BytesIO(data))
        # Pillow turns TIFFs itself, when it decodes them.
        tag = 1 if image.format == "TIFF" else image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a broken tag is none
        return 1
    return tag if tag in range(1, 9) else 1


# By hand, since Pillow takes 20 to 100 us for the same, and warns of every broken tag, of which ImageNet has some.
def _orientation_of_jpeg(data: bytes) -> int:
    """Return the orientation that a JPEG's EXIF data name, or else its XMP data; in microseconds, from its head."""
    offset, of_xmp = 2, 1
    while data[offset : offset + 1] == b"\xff" and offset + 4 <= len(data):
        marker, length = data[offset + 1], int.from_bytes(data[offset + 2 : offset + 4])
        if marker == 0xFF:  # a byte of filling
            offset += 1
            continue
        if marker == 0xDA:  # the pixels
            break
        if marker == 0xE1:
            segment = data[offset + 4 : offset + 2 + length]
            if segment.startswith(b"Exif\0\0") and (tag := _orientation_of_exif(segment[6:])) is not None:
                return tag if tag in range(1, 9) else 1
            if found := _XMP_ORIENTATION.search(segment):
                of_xmp = int(found[1])
        offset += 2 + length
    return of_xmp


def _orientation_of_exif(tiff: bytes) -> int | None:
    """Return the orientation that EXIF data name, whatever it is; None if they name none or are broken."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return None
    try:
        (start,) = struct.unpack_from(f"{order}I", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(f"{order}HH", tiff, entry)
            if tag == _ORIENTATION:
                return struct.unpack_from(f"{order}{'I' if kind == 4 else 'H'}", tiff, entry + 8)[0]
    except struct.error:
        pass
    return None


def _as_rgb(image: Image.Image) -> Image.Image:
    is_wide_pgm = image.mode == "I" and image.format == "PPM"  # which Pillow opens so, scaled to 16 bits
    if image.mode in ("I", "F") and not is_wide_pgm:
        raise ValueError("its pixels have 32 bits, which nothing says the range of; save it with 8 or 16")
    if image.mode.startswith("I;16") or is_wide_pgm:
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # without this step Pillow warns
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


class ImageCheck(Choice):
    """How closely to look at images before training.

    DECODE decodes every image: certain, and costs what an epoch's decoding costs. ENDS reads every image and
    looks at its header and last bytes, which finds what downloads and full disks leave behind (empty, cut
    off, not an image) at about the cost of reading the files once. NONE trusts them, for instance because the
    teacher has already decoded every image that has a label. AUTO decodes sources of up to `DECODE_ALL_UP_TO`
    images and looks at the ENDS of larger ones.

    >>> [str(check) for check in tl.ImageCheck]
    ['auto', 'decode', 'ends', 'none']
    """

    AUTO = "auto"
    DECODE = "decode"
    ENDS = "ends"
    NONE = "none"


def check_images(
    source: ImageSource,
    *,
    skip_broken: bool = False,
    check: ImageCheck | str = ImageCheck.AUTO,
    option: str | None = "skip_broken=True",
) -> ImageSource:
    """Return the source if all its images are sound, or those that are if `skip_broken`.

    `option`: how to skip broken images, where the error is read. Raises DataError that counts and names broken images.

    >>> len(tl.check_images(tl.open_images("images"), check="decode"))
    8
    """
    if not hasattr(source, "class_ids"):
        raise ValueError(f"source: expected what tokenlabel.open_images(...) returns, got {source!r}")
    return leave_out(source, find_broken(source, ImageCheck(check)), skip_broken=skip_broken, option=option)


def find_broken(
    source: ImageSource, check: ImageCheck = ImageCheck.AUTO, among: Sequence[int] | None = None
) -> list[int]:
    """Return the indices of the images that do not decode, of all or of those `among` them.

    All cores take part, tar file by tar file.
    """
    indices = np.arange(len(source)) if among is None else np.array(among, np.int64)
    if check is ImageCheck.AUTO:
        check = ImageCheck.DECODE if len(indices) <= DECODE_ALL_UP_TO else ImageCheck.ENDS
    if check is ImageCheck.NONE:
        return []
    look = _decodes if check is ImageCheck.DECODE else _has_sound_ends
    groups = getattr(source, "groups", None)
    # Tar file by tar file, so that each is read once from end to end.
    order = indices if groups is None else indices[np.argsort(groups[indices], kind="stable")]
    is_sound = in_threads(partial(look, source), order.tolist(), os.cpu_count() or 1)
    return sorted(order[~np.array(is_sound, bool)].tolist())


def leave_out(
    source: ImageSource, broken: Sequence[int], *, skip_broken: bool, option: str | None = None
) -> ImageSource:
    """Return the images that are not broken. Raises DataError for any that are, unless `skip_broken`, and for all."""
    if not broken:
        return source
    names = [source.keys[index] for index in broken]
    if not skip_broken or len(broken) == len(source):
        advice = f", or leave them out with {option}" if option and not skip_broken else ""
        raise DataError(
            f"{counted(names, 'image')} that cannot be decoded, of {len(source):,}; repair or remove them{advice}"
        )
    rest = ImageSubset(source, np.delete(np.arange(len(source)), broken))
    before, after = (images.class_ids[has_classes(images)] for images in (source, rest))
    gone = np.setdiff1d(before, after)
    more = counted([source.class_names[i] for i in gone], "class", "classes") if len(gone) else ""
    more = more and f"; none is left of {more}"
    say(f"{len(names):,} of {len(source):,} images do not decode, and are left out: {listed(names)}{more}")
    return rest


def _decodes(source: ImageSource, index: int) -> bool:
    try:
        decode_image(source.read(index), source.keys[index])
    except ImageError:
        return False
    return True


def _has_sound_ends(source: ImageSource, index: int) -> bool:
    """Return whether header and end are those of a whole file; formats without such an end are decoded."""
    try:
        data = source.read(index)
    except ImageError:
        return False
    is_png = data.startswith(b"\x89PNG\r\n\x1a\n") and data.endswith(b"IEND\xaeB`\x82")
    is_jpeg = data.startswith(_JPEG) and data.endswith(b"\xff\xd9")
    return is_png or is_jpeg or _decodes(source, index)
