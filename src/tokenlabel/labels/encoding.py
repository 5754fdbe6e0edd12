"""The bytes of one score map: pure functions from a map to a record and back. NumPy and zstandard only.

A record is a head and a body. `Encoding.RAW` keeps the entries as they are; `Encoding.COMPACT` orders them so
that zstd finds what repeats: neighbouring cells keep the same classes, and one class's probabilities change
little from cell to cell. docs/labels.md describes every byte.

Probabilities are stored as whole steps of 1/32768 (raw) or 1/510 (compact), so no probability is off by as
much as one step. A cell's kept mass is rounded to the nearest step first and shared by largest remainder, so
entries never add up to another mass, and a cell that was certain stays certain.
"""

from __future__ import annotations

import struct
import threading
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from tokenlabel.core.geometry import WHOLE_IMAGE, Box
from tokenlabel.core.scores import Kind, ScoreMap
from tokenlabel.runtime.coercion import Choice


class Encoding(Choice):
    """How the score maps of a store are written. Every record says for itself how it was."""

    RAW = "raw"
    COMPACT = "compact"


class EncodingError(ValueError):
    """A map that a record cannot hold, or bytes that are no record."""


# Encoding and flags, H and W, two bytes of 0, K, U; little endian, like everything here.
_HEAD = struct.Struct("<BBHHxxII")
_REGION = struct.Struct("<4d")
_HAS_REGION, _IS_LOGITS = 1, 2
_NUMBERS = {Encoding.RAW: 0, Encoding.COMPACT: 1}

RAW_STEPS = 32768
COMPACT_STEPS = 510
_LOW_BITS = 3
# A map whose compact body would be larger is stored raw, and no reader unpacks more.
MAX_BODY_BYTES = 1 << 22
_UINT8, _UINT16, _UINT32 = np.dtype("<u1"), np.dtype("<u2"), np.dtype("<u4")
_INT32, _FLOAT16 = np.dtype("<i4"), np.dtype("<f2")
_ZSTD_LEVEL = 19  # 12 takes 2% more space
_RAW_SCALE = np.float32(1 / RAW_STEPS)


def pack(score_map: ScoreMap, encoding: Encoding | str) -> bytes:
    """Return the record of a score map.

    Compact records hold probabilities only and drop entries that round to nothing; a map of logits (kept as
    float16) and a map whose body would pass MAX_BODY_BYTES are written raw whatever `encoding` says. Raises
    EncodingError for maps of more than 65,535 rows or columns, and for logits beyond float16.
    """
    height, width, _ = score_map.codes.shape
    if max(height, width) > 0xFFFF:
        raise EncodingError(f"a record holds at most 65535 rows and columns, this map has {height} x {width}")
    if Encoding(encoding) is Encoding.COMPACT and score_map.kind is Kind.PROBABILITIES:
        palette, codes, steps = _kept_entries(score_map)
        repeating, noise = _compact_body(palette, codes, steps)
        if len(repeating) + len(noise) <= MAX_BODY_BYTES:
            head = _head(score_map, Encoding.COMPACT, topk=codes.shape[1], num_named=len(palette))
            return head + _compress(repeating, noise)
    topk, num_named = score_map.codes.shape[2], len(score_map.palette)
    return _head(score_map, Encoding.RAW, topk=topk, num_named=num_named) + _raw_body(score_map)


def unpack(record: bytes, *, num_classes: int, empty_is_even: bool = False) -> ScoreMap:
    """Return the score map of a record; raw ones share the record's memory. `empty_is_even`: see `ScoreMap`.

    Raises EncodingError for anything that is not a record of a map over `num_classes` classes, before it
    takes more memory than the record itself and 16 times MAX_BODY_BYTES.
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
    elif number == 1:
        palette, codes, probs = _read_compact(record, start, (height, width, topk), num_named)
    else:
        raise EncodingError(
            f"a record of encoding {number}, known are {sorted(_NUMBERS.values())}: a newer tokenlabel?"
        )
    # Codes and ids index into tensors later on, where a wrong one could end the program.
    if _largest(codes) >= num_named:
        raise EncodingError(f"a code of {codes.max()} in a palette of {num_named}")
    if _largest(palette.view(_UINT32)) >= num_classes:
        raise EncodingError(
            f"class ids from {palette.min()} to {palette.max()}, expected 0 to {num_classes - 1}"
        )
    return ScoreMap(palette, codes, probs, num_classes, region, kind, empty_is_even)


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


def _head(score_map: ScoreMap, encoding: Encoding, *, topk: int, num_named: int) -> bytes:
    whole = score_map.region == WHOLE_IMAGE
    flags = (0 if whole else _HAS_REGION) | (_IS_LOGITS if score_map.kind is Kind.LOGITS else 0)
    head = _HEAD.pack(_NUMBERS[encoding], flags, *score_map.codes.shape[:2], topk, num_named)
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


# --- compact: gaps of the palette as uint32 in byte order [4, U], codes [H, W, K] (U: nothing kept), then the
# kept entries' steps, class by class: their upper bits as uint8 [n], their lower bits as bits [3, n] ---


def _kept_entries(
    score_map: ScoreMap,
) -> tuple[NDArray[np.integer[Any]], NDArray[np.integer[Any]], NDArray[np.int32]]:
    """Return the class ids that still carry something [U], and codes and steps [cells, K], codes ascending.

    A cell that keeps fewer than K has entries of code U and 0 steps at its end.
    """
    topk = score_map.codes.shape[2]
    steps = on_grid(score_map.probs, COMPACT_STEPS).reshape(-1, topk)
    codes = score_map.codes.reshape(-1, topk)
    kept = steps > 0
    used = np.unique(codes[kept]) if kept.any() else codes[0, :1]  # a map that keeps nothing names a class
    codes = np.where(kept, np.searchsorted(used, codes), len(used))
    order = np.argsort(codes, axis=1, kind="stable")[:, : max(1, kept.sum(axis=1).max())]
    codes, steps = np.take_along_axis(codes, order, axis=1), np.take_along_axis(steps, order, axis=1)
    return score_map.palette[used], codes, steps


def _compact_body(
    palette: NDArray[np.integer[Any]], codes: NDArray[np.integer[Any]], steps: NDArray[np.int32]
) -> tuple[bytes, bytes]:
    """Return what compresses and what hardly does, which a table of its own would only lengthen."""
    gaps = np.diff(palette.astype(_UINT32), prepend=np.uint32(0)).astype(_UINT32)
    by_byte = gaps.view(np.uint8).reshape(-1, 4).T  # [4, U]: the high bytes are nearly all 0
    codes = codes.astype(_code_type(len(palette) + 1)).ravel()
    by_class = steps.ravel()[codes.argsort(kind="stable")[: np.count_nonzero(steps)]]
    upper = (by_class >> _LOW_BITS).astype(np.uint8)
    lower = [by_class >> bit & 1 for bit in reversed(range(_LOW_BITS))]
    noise = np.packbits(np.stack(lower).astype(np.uint8))
    return by_byte.tobytes() + codes.tobytes() + upper.tobytes(), noise.tobytes()


def _read_compact(
    record: bytes, start: int, shape: tuple[int, int, int], num_named: int
) -> tuple[NDArray[np.int32], NDArray[np.unsignedinteger[Any]], NDArray[np.float32]]:
    num_entries = shape[0] * shape[1] * shape[2]
    code_type = _code_type(num_named + 1)
    codes_end = 4 * num_named + num_entries * code_type.itemsize
    body = _decompress(record[start:], codes_end, codes_end + num_entries + _lower_bytes(num_entries))
    by_byte = np.frombuffer(body, np.uint8, 4 * num_named).reshape(4, num_named)
    palette = np.ascontiguousarray(by_byte.T).view(_INT32)[:, 0].cumsum(dtype=np.int32)
    codes = np.frombuffer(body, code_type, num_entries, 4 * num_named)
    num_kept = int(np.count_nonzero(codes < num_named))
    if len(body) != codes_end + num_kept + _lower_bytes(num_kept):
        raise EncodingError(
            f"{num_kept} kept entries ask for {num_kept + _lower_bytes(num_kept)} bytes of probabilities, "
            f"the body has {len(body) - codes_end}"
        )
    upper = np.frombuffer(body, np.uint8, num_kept, codes_end)
    lower = np.frombuffer(body, np.uint8, offset=codes_end + num_kept)
    bits = np.unpackbits(lower, count=_LOW_BITS * num_kept).reshape(_LOW_BITS, num_kept)
    steps = upper.astype(np.uint16) << _LOW_BITS | (bits[0] << 2 | bits[1] << 1 | bits[2])
    probs = np.zeros(num_entries, np.float32)
    probs[codes.argsort(kind="stable")[:num_kept]] = np.divide(steps, COMPACT_STEPS, dtype=np.float32)
    # Entries that are not kept may name any class, but one that exists.
    return palette, np.minimum(codes, num_named - 1).reshape(shape), probs.reshape(shape)


def _lower_bytes(num_kept: int) -> int:
    return (_LOW_BITS * num_kept + 7) // 8


class _Zstd(threading.local):
    """Each thread's own: they may not be shared, and making one takes longer than a record does."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(level=_ZSTD_LEVEL)
        self.decompressor = zstandard.ZstdDecompressor()


_zstd = _Zstd()


def _compress(repeating: bytes, noise: bytes) -> bytes:
    """Return one frame that says its length; what is noise has a block of its own."""
    stream = _zstd.compressor.compressobj(size=len(repeating) + len(noise))
    first = stream.compress(repeating) + stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    return first + stream.compress(noise) + stream.flush()


def _decompress(frame: bytes, min_bytes: int, max_bytes: int) -> bytes:
    """Return what a frame holds. It says how much that is, and the library takes as much memory: ask first."""
    try:
        num_bytes = zstandard.frame_content_size(frame)
        if not min_bytes <= num_bytes <= min(max_bytes, MAX_BODY_BYTES):
            raise EncodingError(
                f"a body of {num_bytes} bytes, where the map's shape asks for {min_bytes} to {max_bytes} "
                f"and {MAX_BODY_BYTES} are allowed"
            )
        return _zstd.decompressor.decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise EncodingError(f"not a zstd frame ({error})") from error
