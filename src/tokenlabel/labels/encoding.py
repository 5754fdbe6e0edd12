"""The bytes of one score map: pure functions from a map to a record and back. NumPy only.

A record is a head and a body. `Encoding.RAW` keeps the cells as they are, for speed; `Encoding.LZMA` and
`Encoding.ZSTD` keep one plane of bytes per class, which is mostly zeros and smooth elsewhere, and compress
it. docs/labels.md describes every byte.

Probabilities are stored as whole steps of 1/32768 (raw) or 1/510 (planes), so no probability is off by as
much as one step. A cell's kept mass is rounded to the nearest step first and shared by largest remainder, so
entries never add up to another mass, and a cell that was certain stays certain.
"""

from __future__ import annotations

import lzma
import struct
from enum import StrEnum
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenlabel.method.geometry import WHOLE_IMAGE, Box
from tokenlabel.method.scores import Kind, ScoreMap


class Encoding(StrEnum):
    """How the score maps of a store are written. Every record says for itself how it was."""

    RAW = "raw"
    LZMA = "lzma"
    ZSTD = "zstd"


class EncodingError(ValueError):
    """A map that a record cannot hold, or bytes that are no record."""


# Encoding and flags, H and W, two bytes of 0, K, U; little endian, like everything here.
_HEAD = struct.Struct("<BBHHxxII")
_REGION = struct.Struct("<4d")
_BODY_BYTES = struct.Struct("<I")
_HAS_REGION, _IS_LOGITS = 1, 2
_NUMBERS = {Encoding.RAW: 0, Encoding.LZMA: 1, Encoding.ZSTD: 2}
_FROM_NUMBER = {number: encoding for encoding, number in _NUMBERS.items()}

RAW_STEPS = 32768
PLANE_STEPS = 510  # two bytes' worth: an entry of 255 steps or more continues in a second byte
# A map whose planes would take more than this is stored raw, and no reader unpacks more than twice as much.
MAX_PLANE_BYTES = 1 << 22
_UINT8, _UINT16, _UINT32 = np.dtype("<u1"), np.dtype("<u2"), np.dtype("<u4")
_INT32, _FLOAT16 = np.dtype("<i4"), np.dtype("<f2")
# The match finder is the writer's business; the rest has to be known to read.
_LZMA_FILTERS = [
    {"id": lzma.FILTER_LZMA1, "preset": 6, "mf": lzma.MF_HC4, "lc": 3, "lp": 0, "pb": 0, "dict_size": 1 << 16}
]
_ZSTD_LEVEL = 12  # 19 is 3% smaller and takes seven times as long to write
_RAW_SCALE = np.float32(1 / RAW_STEPS)


def pack(score_map: ScoreMap, encoding: Encoding) -> bytes:
    """Return the record of a score map.

    Planes hold probabilities only and drop entries that round to nothing; a map of logits (kept as float16)
    and a map of so many classes that its planes would pass MAX_PLANE_BYTES are written raw whatever
    `encoding` says. Raises EncodingError for maps of more than 65,535 rows or columns, and for logits beyond
    float16.
    """
    height, width, _ = score_map.codes.shape
    if max(height, width) > 0xFFFF:
        raise EncodingError(f"a record holds at most 65535 rows and columns, this map has {height} x {width}")
    num_plane_bytes = len(score_map.palette) * (height * width + 4)
    if encoding is Encoding.RAW or score_map.kind is Kind.LOGITS or num_plane_bytes > MAX_PLANE_BYTES:
        head = _head(score_map, Encoding.RAW, num_classes_named=len(score_map.palette))
        return head + _raw_body(score_map)
    palette, planes = _planes(score_map)
    body = _plane_body(palette, planes)
    head = _head(score_map, encoding, num_classes_named=len(palette))
    return head + _BODY_BYTES.pack(len(body)) + _compress(body, encoding)


def unpack(record: bytes, *, num_classes: int) -> ScoreMap:
    """Return the score map of a record; raw ones share the record's memory.

    Raises EncodingError for anything that is not a record of a map over `num_classes` classes, before it
    takes more memory than the record itself and a few times MAX_PLANE_BYTES.
    """
    if len(record) < _HEAD.size:
        raise EncodingError(f"a record has at least {_HEAD.size} bytes, this one {len(record)}")
    number, flags, height, width, topk, num_named = _HEAD.unpack_from(record)
    start = _HEAD.size
    region, kind = WHOLE_IMAGE, Kind.PROBABILITIES
    if flags:
        if flags > _HAS_REGION | _IS_LOGITS:
            raise EncodingError(f"flags {flags:#x} are unknown: a newer tokenlabel?")
        kind = Kind.LOGITS if flags & _IS_LOGITS else kind
        if flags & _HAS_REGION:
            region, start = _region(record, start), start + _REGION.size
    if not (height and width and topk and num_named):
        raise EncodingError(
            f"a map of {height} x {width} cells, {topk} entries, {num_named} classes holds nothing"
        )
    if number == 0:
        palette, codes, probs = _read_raw(record, start, (height, width, topk), num_named, kind)
    else:
        body = _decompress(record, start, number, num_named * (height * width + 4))
        palette, codes, probs = _read_planes(body, (height, width, topk), num_named)
    # Codes and ids index into tensors later on, where a wrong one could end the program.
    if _largest(codes) >= num_named:
        raise EncodingError(f"a code of {codes.max()} in a palette of {num_named}")
    if _largest(palette.view(_UINT32)) >= num_classes:
        raise EncodingError(
            f"class ids from {palette.min()} to {palette.max()}, expected 0 to {num_classes - 1}"
        )
    return ScoreMap(palette, codes, probs, num_classes, region, kind)


def on_grid(probs: NDArray[np.floating[Any]], num_steps: int) -> NDArray[np.int32]:
    """Return probabilities [..., K] as whole steps of 1 / num_steps.

    A cell's sum is rounded to the nearest step; its entries are rounded down or up (largest remainders first)
    so that they add up to it. Each is off by less than one step.
    """
    exact = probs.astype(np.float64) * num_steps
    steps = np.floor(exact)
    missing = np.rint(exact.sum(axis=-1, keepdims=True)) - steps.sum(axis=-1, keepdims=True)
    order = np.argsort(steps - exact, axis=-1, kind="stable")
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.broadcast_to(np.arange(probs.shape[-1]), order.shape), axis=-1)
    return (steps + (rank < missing)).astype(np.int32)


def _largest(numbers: NDArray[np.unsignedinteger[Any]]) -> int:
    """Return the largest number; argmax starts twice as fast as max, which matters for arrays this small."""
    return numbers.item(numbers.argmax())


def _head(score_map: ScoreMap, encoding: Encoding, *, num_classes_named: int) -> bytes:
    whole = score_map.region == WHOLE_IMAGE
    flags = (0 if whole else _HAS_REGION) | (_IS_LOGITS if score_map.kind is Kind.LOGITS else 0)
    head = _HEAD.pack(_NUMBERS[encoding], flags, *score_map.codes.shape, num_classes_named)
    region = score_map.region
    return head if whole else head + _REGION.pack(region.left, region.top, region.right, region.bottom)


def _region(record: bytes, start: int) -> Box:
    if len(record) < start + _REGION.size:
        raise EncodingError("the record ends inside its region")
    try:
        return Box(*_REGION.unpack_from(record, start))
    except ValueError as error:
        raise EncodingError(str(error)) from error


# --- raw: palette int32 [U], values uint16 (steps) or float16 (logits) [H, W, K], codes [H, W, K] ---


def _code_type(num_named: int) -> np.dtype[Any]:
    return _UINT8 if num_named <= 1 << 8 else _UINT16 if num_named <= 1 << 16 else _UINT32


def _raw_body(score_map: ScoreMap) -> bytes:
    if score_map.kind is Kind.LOGITS:
        with np.errstate(over="ignore"):
            values = score_map.probs.astype(_FLOAT16)
        if not np.isfinite(values).all():
            raise EncodingError(
                f"logits are kept as float16, at most 65504; got {np.abs(score_map.probs).max():.6g}"
            )
    else:
        values = on_grid(score_map.probs, RAW_STEPS).astype(_UINT16)
    codes = score_map.codes.astype(_code_type(len(score_map.palette)))
    return score_map.palette.astype(_INT32).tobytes() + values.tobytes() + codes.tobytes()


def _read_raw(
    record: bytes, start: int, shape: tuple[int, int, int], num_named: int, kind: Kind
) -> tuple[NDArray[np.int32], NDArray[np.unsignedinteger[Any]], NDArray[np.float32]]:
    num_entries = shape[0] * shape[1] * shape[2]
    code_type = _code_type(num_named)
    values_start = start + 4 * num_named
    codes_start = values_start + 2 * num_entries
    end = codes_start + num_entries * code_type.itemsize
    if len(record) != end:
        raise EncodingError(
            f"a map of {shape} over {num_named} classes takes {end} bytes, the record has {len(record)}"
        )
    palette = np.ndarray(num_named, _INT32, record, start)
    codes = np.ndarray(shape, code_type, record, codes_start)
    if kind is Kind.LOGITS:
        return palette, codes, np.ndarray(shape, _FLOAT16, record, values_start).astype(np.float32)
    steps = np.ndarray(num_entries, _UINT16, record, values_start)  # one axis: multiplied twice as fast
    return palette, codes, (steps * _RAW_SCALE).reshape(shape)


# --- planes: palette gaps as uint32 in byte order [4, U], steps uint8 [U, H, W], second bytes ---


def _planes(score_map: ScoreMap) -> tuple[NDArray[np.integer[Any]], NDArray[np.int32]]:
    """Return the class ids that still carry something [U] and the steps of each cell [U, H, W]."""
    height, width, _ = score_map.codes.shape
    rows, columns = np.ogrid[:height, :width]
    planes = np.zeros((len(score_map.palette), height, width), np.int32)
    steps = on_grid(score_map.probs, PLANE_STEPS)
    # Entries of probability 0 may name any class; added, they change nothing.
    np.add.at(planes, (score_map.codes, rows[..., None], columns[..., None]), steps)
    used = np.flatnonzero(planes.any(axis=(1, 2)))
    if len(used) == 0:
        used = np.zeros(1, np.intp)  # a map that keeps nothing still names a class
    return score_map.palette[used], planes[used]


def _plane_body(palette: NDArray[np.integer[Any]], planes: NDArray[np.int32]) -> bytes:
    gaps = np.diff(palette.astype(_UINT32), prepend=np.uint32(0))
    second = planes[planes >= 255] - 255
    first = np.minimum(planes, 255)
    by_byte = gaps.view(np.uint8).reshape(-1, 4).T  # [4, U]: the high bytes are nearly all 0
    return by_byte.tobytes() + first.astype(np.uint8).tobytes() + second.astype(np.uint8).tobytes()


def _read_planes(
    body: bytes, shape: tuple[int, int, int], num_named: int
) -> tuple[NDArray[np.int32], NDArray[np.unsignedinteger[Any]], NDArray[np.float32]]:
    height, width, max_entries = shape
    by_byte = np.frombuffer(body, np.uint8, 4 * num_named).reshape(4, num_named)
    palette = np.cumsum(np.ascontiguousarray(by_byte.T).view(_UINT32)[:, 0], dtype=np.int64)
    if palette[-1] > np.iinfo(np.int32).max:
        raise EncodingError(f"class ids reach {palette[-1]}")
    first = np.frombuffer(body, np.uint8, num_named * height * width, 4 * num_named)
    second = np.frombuffer(body, np.uint8, offset=4 * num_named + first.size)
    places = np.flatnonzero(first != 0)  # five times as fast as of bytes
    steps = first[places].astype(np.int64)
    goes_on = steps == 255
    if np.count_nonzero(goes_on) != len(second):
        raise EncodingError(
            f"{np.count_nonzero(goes_on)} entries have a second byte, {len(second)} are there"
        )
    steps[goes_on] += second
    codes, steps = _by_cell(places, steps, num_cells=height * width, max_entries=max_entries)
    codes = codes.reshape(height, width, -1).astype(_code_type(num_named))
    probs = (steps / PLANE_STEPS).astype(np.float32).reshape(height, width, -1)
    return palette.astype(np.int32), codes, probs


def _by_cell(
    places: NDArray[np.intp], steps: NDArray[np.int64], *, num_cells: int, max_entries: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return codes and steps [cells, K], largest first, from places in planes [U, cells] and their steps."""
    codes, cells = np.divmod(places, num_cells)
    # One sort of one number an entry: by cell, then the largest step, then the code.
    entries = np.sort((cells << 40) | ((PLANE_STEPS - steps) << 30) | codes)
    counts = np.bincount(cells, minlength=num_cells)
    num_kept = max(1, counts.max())
    if num_kept > max_entries:
        raise EncodingError(f"a cell keeps {num_kept} entries, the record says at most {max_entries}")
    first_slots = np.arange(num_cells) * num_kept - (np.cumsum(counts) - counts)
    table = np.full(num_cells * num_kept, PLANE_STEPS << 30)  # what is not kept has 0 steps
    table[np.arange(len(entries)) + np.repeat(first_slots, counts)] = entries
    codes, steps = table & ((1 << 30) - 1), PLANE_STEPS - (table >> 30 & 1023)
    return codes.reshape(num_cells, num_kept), steps.reshape(num_cells, num_kept)


def _compress(body: bytes, encoding: Encoding) -> bytes:
    if encoding is Encoding.ZSTD:
        return _zstandard().ZstdCompressor(level=_ZSTD_LEVEL).compress(body)
    return lzma.compress(body, format=lzma.FORMAT_RAW, filters=_LZMA_FILTERS)


def _decompress(record: bytes, start: int, number: int, min_bytes: int) -> bytes:
    """Return the body, taking no more memory than the head says, and that no more than the limit."""
    if len(record) < start + _BODY_BYTES.size:
        raise EncodingError("the record ends inside its head")
    (num_bytes,) = _BODY_BYTES.unpack_from(record, start)
    if not min_bytes <= num_bytes <= 2 * min(min_bytes, MAX_PLANE_BYTES):
        raise EncodingError(
            f"a body of {num_bytes} bytes, where the map's shape asks for {min_bytes} or a little more"
        )
    packed = record[start + _BODY_BYTES.size :]
    match _FROM_NUMBER.get(number):
        case Encoding.LZMA:
            body = _from_lzma(packed, num_bytes)
        case Encoding.ZSTD:
            body = _from_zstd(packed, num_bytes)
        case _:
            raise EncodingError(
                f"a record of encoding {number}, known are {sorted(_FROM_NUMBER)}: a newer tokenlabel?"
            )
    if len(body) != num_bytes:
        raise EncodingError(f"the body unpacks to {len(body)} bytes, the record says {num_bytes}")
    return body


def _from_lzma(packed: bytes, num_bytes: int) -> bytes:
    decompressor = lzma.LZMADecompressor(format=lzma.FORMAT_RAW, filters=_LZMA_FILTERS)
    try:
        return decompressor.decompress(packed, max_length=num_bytes)
    except (lzma.LZMAError, EOFError) as error:
        raise EncodingError(f"not an LZMA stream ({error})") from error


def _from_zstd(packed: bytes, num_bytes: int) -> bytes:
    zstandard = _zstandard()
    try:
        # The frame says how large it is, and the library takes that much: ask first.
        if zstandard.frame_content_size(packed) != num_bytes:
            raise EncodingError("the zstd frame holds another number of bytes than the record says")
        return zstandard.ZstdDecompressor().decompress(packed)
    except zstandard.ZstdError as error:
        raise EncodingError(f"not a zstd frame ({error})") from error


def _zstandard() -> ModuleType:
    try:
        import zstandard
    except ImportError as error:
        raise EncodingError("zstd needs one more package: pip install 'tokenlabel[zstd]'") from error
    return zstandard
