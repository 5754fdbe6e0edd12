"""The bytes of one score map: pure functions from a map to a record and back. NumPy and zstandard only.

A record is a head and a body. `Encoding.RAW` stores the entries as they are. `Encoding.COMPACT` drops the entries that
are not worth their bytes and lists the others class by class, which zstd compresses well: a class covers neighbouring
cells. docs/labels.md describes every byte.

Probabilities are stored as whole steps of 1/32768 (raw) or of the step that a compact record names, so each is off by
less than one step. A cell's sum is rounded to the nearest step first and then distributed by largest remainder, so
that entries add up to the rounded sum, and a cell of probability 1 keeps it.
"""

from __future__ import annotations

import struct
import threading
from functools import lru_cache
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from tokenlabel.core.geometry import WHOLE_IMAGE, Box
from tokenlabel.core.scores import SUM_TOLERANCE, Kind, ScoreMap
from tokenlabel.runtime.coercion import Choice
from tokenlabel.runtime.errors import StoreError


class Encoding(Choice):
    """How the score maps of a store are written. Each record names its own encoding.

    >>> [str(encoding) for encoding in tl.Encoding]
    ['raw', 'compact']
    """

    RAW = "raw"
    COMPACT = "compact"


# Encoding and flags, H and W, steps of probability 1 (compact), K, U; little-endian, like everything here.
_HEAD = struct.Struct("<BBHHHII")
_REGION = struct.Struct("<4d")
_HAS_REGION, _IS_LOGITS = 1, 2
_RAW, _BY_CELL, _BY_CLASS = 0, 1, 2  # encodings of records; the first compact ones were written by cell

RAW_STEPS = 32768
FINEST_STEPS = 510  # of compact records
# A real map of 18 x 18 cells, 5 of 1,000 classes, then takes a kilobyte: see the curve in docs/labels.md.
DEFAULT_TOLERANCE = 0.008
# Measured on real maps: with this ratio, coarser steps and dropped entries cost equally much per byte saved.
_STEP_OF_TOLERANCE = 1.25
# The bytes that each new class costs beyond those of its places: a gap in the palette, and a long jump to its cells.
_PLACES_OF_A_CLASS = 2
_LOW_BITS = 3
# Larger maps are stored raw, and no reader unpacks more: a forged record cannot exhaust the memory.
MAX_BODY_BYTES = 1 << 22
MAX_COMPACT_ENTRIES = 1 << 20
_UINT16, _UINT32, _INT32, _FLOAT16 = (np.dtype(name) for name in ("<u2", "<u4", "<i4", "<f2"))
_ZSTD_LEVEL = 19  # 12 takes 2% more space
_RAW_SCALE = np.float32(1 / RAW_STEPS)


def pack(score_map: ScoreMap, encoding: Encoding | str, *, tolerance: float = DEFAULT_TOLERANCE) -> bytes:
    """Return the record of a score map.

    `tolerance`: compact records drop entries of less probability, and classes whose entries exceed it by too little in
    sum; the dropped mass joins the rest. What is kept is rounded to steps of 1.25 times the tolerance, at the finest
    1/510. A cell that keeps something keeps its best entry, unless `score_map.empty_is_even`. Maps of logits (stored as
    float16), and maps beyond MAX_BODY_BYTES or MAX_COMPACT_ENTRIES, are written raw whatever `encoding` is. Raises
    StoreError for maps of more than 65,535 rows or columns, and for logits beyond float16.
    """
    height, width, topk = score_map.codes.shape
    if max(height, width) > 0xFFFF:
        raise StoreError(f"a record holds at most 65535 rows and columns, this map has {height} x {width}")
    if Encoding(encoding) is Encoding.COMPACT and score_map.kind is Kind.PROBABILITIES:
        step = max(tolerance * _STEP_OF_TOLERANCE, 1 / FINEST_STEPS)
        num_steps = max(1, round(1 / step))
        steps = _worthy_steps(score_map, tolerance, num_steps)
        if (record := _compact(score_map, steps, num_steps)) is not None:
            return record
    head = _head(score_map, _RAW, num_steps=0, topk=topk, num_named=len(score_map.palette))
    return head + _raw_body(score_map)


def unpack(record: bytes, *, num_classes: int, empty_is_even: bool = False) -> ScoreMap:
    """Return the score map of a record; raw ones share the record's memory. `empty_is_even`: see `ScoreMap`.

    Raises StoreError for anything that is not a record of a map over `num_classes` classes, before taking more memory
    than the record and 16 times MAX_BODY_BYTES.
    """
    if len(record) < _HEAD.size:
        raise StoreError(f"a record has at least {_HEAD.size} bytes, this one {len(record)}")
    number, flags, height, width, num_steps, topk, num_named = _HEAD.unpack_from(record)
    if flags > _HAS_REGION | _IS_LOGITS:
        raise StoreError(f"flags {flags:#x} are unknown: a newer tokenlabel?")
    kind = Kind.LOGITS if flags & _IS_LOGITS else Kind.PROBABILITIES
    region, start = _read_region(record) if flags & _HAS_REGION else (WHOLE_IMAGE, _HEAD.size)
    if not (height and width and topk and num_named):
        raise StoreError(f"a map of {height} x {width} cells, {topk} entries, {num_named} classes holds nothing")
    shape = (height, width, topk)
    if number == _RAW:
        palette, codes, probs = _read_raw(record, start, shape, num_named, kind)
    elif number == _BY_CLASS:
        palette, codes, probs = _read_by_class(record, start, shape, num_named, num_steps)
    elif number == _BY_CELL:
        palette, codes, probs = _read_by_cell(record, start, shape, num_named)
    else:
        raise StoreError(f"a record of encoding {number}, known are {_RAW} to {_BY_CLASS}: a newer tokenlabel?")
    # Codes and ids index into tensors later on, where a wrong one could crash the process. For arrays this small,
    # argmax is twice as fast as max. As unsigned numbers, negative ids are too large.
    if codes.item(codes.argmax()) >= num_named:
        raise StoreError(f"a code of {codes.max()} in a palette of {num_named}")
    ids = palette.view(_UINT32)
    if ids.item(ids.argmax()) >= num_classes:
        raise StoreError(f"class ids from {palette.min()} to {palette.max()}, expected 0 to {num_classes - 1}")
    if kind is Kind.LOGITS:
        if not np.isfinite(probs).all():
            raise StoreError("some of its logits are not finite")
        return ScoreMap(palette, codes, probs, num_classes, region, kind, empty_is_even)
    # All cells at once, in half the time of one by one, which is for `inspect --verify`. A cell may have been rounded.
    if (mean := probs.ravel().dot(_ones(probs.size)) / (height * width)) > 1 + 2 * SUM_TOLERANCE:
        raise StoreError(f"the probabilities of a cell sum to {mean:.4g} in the mean")
    return ScoreMap(palette, codes, probs, num_classes, region, kind, empty_is_even)


def _read_region(record: bytes) -> tuple[Box, int]:
    """Return the region of a record that has one, and where what follows it begins."""
    end = _HEAD.size + _REGION.size
    if len(record) < end:
        raise StoreError("the record ends inside its region")
    try:
        return Box(*_REGION.unpack_from(record, _HEAD.size)), end
    except ValueError as error:
        raise StoreError(str(error)) from error


@lru_cache(16)
def _ones(count: int) -> NDArray[np.float32]:
    return np.ones(count, np.float32)


def on_grid(probs: NDArray[np.floating[Any]], num_steps: int) -> NDArray[np.int32]:
    """Return probabilities [..., K] as whole steps of 1 / num_steps.

    A cell's sum is rounded to the nearest step, and its entries are rounded down or up (largest remainders first) so
    that they add up to it. Each is off by less than one step.
    """
    exact = probs.astype(np.float64) * num_steps  # in float32 some sums would be rounded to another step
    steps = np.floor(exact)
    # The entries with the largest remainders get the missing steps; stable, so that all machines write equal records.
    missing = np.rint(exact.sum(axis=-1, keepdims=True)) - steps.sum(axis=-1, keepdims=True)
    order = np.argsort(steps - exact, axis=-1, kind="stable")
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.broadcast_to(np.arange(probs.shape[-1]), order.shape), axis=-1)
    return (steps + (rank < missing)).astype(np.int32)


def _head(score_map: ScoreMap, number: int, *, num_steps: int, topk: int, num_named: int) -> bytes:
    whole = score_map.region == WHOLE_IMAGE
    flags = (0 if whole else _HAS_REGION) | (_IS_LOGITS if score_map.kind is Kind.LOGITS else 0)
    head = _HEAD.pack(number, flags, *score_map.codes.shape[:2], num_steps, topk, num_named)
    region = score_map.region
    return head if whole else head + _REGION.pack(region.left, region.top, region.right, region.bottom)


# --- raw: palette int32 [U], values uint16 (steps) or float16 (logits) [H, W, K], codes [H, W, K] in the smallest type
# that holds U - 1 ---


def _raw_body(score_map: ScoreMap) -> bytes:
    if score_map.kind is Kind.LOGITS:
        with np.errstate(over="ignore"):
            values = score_map.probs.astype(_FLOAT16)
        if not np.isfinite(values).all():
            raise StoreError(f"logits are kept as float16, at most 65504; got {np.abs(score_map.probs).max():.6g}")
    else:
        values = on_grid(score_map.probs, RAW_STEPS).astype(_UINT16)
    codes = score_map.codes.astype(np.min_scalar_type(len(score_map.palette) - 1).newbyteorder("<"))
    return score_map.palette.astype(_INT32).tobytes() + values.tobytes() + codes.tobytes()


def _read_raw(
    record: bytes, start: int, shape: tuple[int, int, int], num_named: int, kind: Kind
) -> tuple[NDArray[np.int32], NDArray[np.unsignedinteger[Any]], NDArray[np.float32]]:
    num_entries = shape[0] * shape[1] * shape[2]
    code_type = np.min_scalar_type(num_named - 1).newbyteorder("<")
    values_start = start + 4 * num_named
    codes_start = values_start + 2 * num_entries
    end = codes_start + num_entries * code_type.itemsize
    if len(record) != end:
        raise StoreError(f"a map of {shape} over {num_named} classes takes {end} bytes, the record has {len(record)}")
    palette = np.ndarray(num_named, _INT32, record, start)
    codes = np.ndarray(shape, code_type, record, codes_start)
    if kind is Kind.LOGITS:
        return palette, codes, np.ndarray(shape, _FLOAT16, record, values_start).astype(np.float32)
    steps = np.ndarray(num_entries, _UINT16, record, values_start)  # with one axis, multiplied twice as fast
    return palette, codes, (steps * _RAW_SCALE).reshape(shape)


# --- compact: whole numbers, each the sum of some bytes of 255 and of the smaller byte that ends it: the gaps between
# the palette's ids [U], the gaps between the places (code * H * W + cell) of the kept entries [n], their steps [n] ---


def _worthy_steps(score_map: ScoreMap, tolerance: float, num_steps: int) -> NDArray[np.int32]:
    """Return the steps [cells, K] of the entries that are worth their bytes, 0 for the others."""
    topk = score_map.codes.shape[2]
    probs, codes = score_map.probs.reshape(-1, topk), score_map.codes.reshape(-1, topk)
    kept = (probs >= tolerance) & (probs > 0)
    surplus = np.bincount(codes[kept], probs[kept] - tolerance, minlength=len(score_map.palette))
    kept &= (surplus >= _PLACES_OF_A_CLASS * tolerance)[codes]  # not classes that cost more bytes than they are worth
    steps = on_grid(np.where(kept, probs, 0), num_steps)
    if not score_map.empty_is_even:  # a cell that keeps nothing would no longer contribute to the loss
        lost = np.flatnonzero(~steps.any(axis=1) & (probs > 0).any(axis=1))
        best = probs[lost].argmax(axis=1)
        steps[lost, best] = np.maximum(1, np.rint(probs[lost, best] * num_steps))
    return steps


def _compact(score_map: ScoreMap, steps: NDArray[np.int32], num_steps: int) -> bytes | None:
    """Return the record of the entries with steps [cells, K] above 0; None if it would be too large."""
    codes = score_map.codes.reshape(steps.shape)
    cells, entries = np.nonzero(steps)
    codes_kept, topk = codes[cells, entries], max(1, int(np.bincount(cells, minlength=1).max()))
    # A map that keeps nothing still names one class: a record has no empty palette.
    used, codes_kept = np.unique(codes_kept, return_inverse=True) if len(cells) else (codes[0, :1], cells)
    places = codes_kept.astype(np.int64) * len(steps) + cells
    order = places.argsort()
    palette, places = score_map.palette[used].astype(np.int64), places[order]
    gaps = (np.diff(ascending, prepend=-1) - 1 for ascending in (palette, places))
    where = b"".join(map(_number_bytes, gaps))
    # All places, then all steps: zstd compresses bytes of one kind better than pairs of both.
    values = _number_bytes(steps[cells, entries][order].astype(np.int64))
    if len(where) + len(values) > MAX_BODY_BYTES or len(steps) * topk > MAX_COMPACT_ENTRIES:
        return None
    head = _head(score_map, _BY_CLASS, num_steps=num_steps, topk=topk, num_named=len(palette))
    return head + _compress(where, values)


def _number_bytes(numbers: NDArray[np.int64]) -> bytes:
    """Return each number as bytes: as many of 255 as fit into it, then the remainder."""
    num_full = numbers // 255
    # Without a loop: fill all bytes with 255, then put each remainder where the bytes of its number end.
    coded = np.full(len(numbers) + int(num_full.sum()), 255, np.uint8)
    coded[(num_full + 1).cumsum() - 1] = numbers % 255
    return coded.tobytes()


def _read_by_class(
    record: bytes, start: int, shape: tuple[int, int, int], num_named: int, num_steps: int
) -> tuple[NDArray[np.int32], NDArray[np.unsignedinteger[Any]], NDArray[np.float32]]:
    num_cells, topk = shape[0] * shape[1], shape[2]
    if num_cells * topk > MAX_COMPACT_ENTRIES or not num_steps:
        raise StoreError(f"a compact map of {shape} in {num_steps} steps, more than is written so, or none")
    body = np.frombuffer(_decompress(record[start:], num_named, MAX_BODY_BYTES), np.uint8)
    ends = body < 255
    num_kept, odd = divmod(int(np.count_nonzero(ends)) - num_named, 2)
    if num_kept < 0 or num_kept > num_cells * topk or odd or not ends[-1]:
        raise StoreError(f"its numbers do not fit {num_named} classes in a map of {shape}")
    sums = body.cumsum(dtype=np.int32)[ends]  # cumulative sums of the numbers: at most 255 * 2^22 < 2^30
    palette = sums[:num_named] + np.arange(num_named, dtype=np.int32)
    sums = sums[num_named - 1 :] - sums[num_named - 1]  # of the numbers behind the palette; the first is 0
    places = sums[1 : num_kept + 1] + np.arange(num_kept, dtype=np.int32)  # ascending
    if num_kept and places[-1] >= num_named * num_cells:
        raise StoreError(f"an entry of a class that is not one of the {num_named} of the palette")
    named, cells = np.divmod(places, np.int32(num_cells))
    # In the smallest type: up to 16 bits NumPy uses radix sort, several times as fast as comparisons.
    order = cells.astype(np.min_scalar_type(num_cells)).argsort(kind="stable")
    counts = np.bincount(cells, minlength=num_cells)
    if counts.max() > topk:
        raise StoreError(f"a cell of {counts.max()} entries, where {topk} are the most")
    # Entries of a cell fill its row from the left.
    rows = np.arange(num_cells) * topk - counts.cumsum() + counts
    targets = rows.repeat(counts) + np.arange(num_kept)
    codes = np.zeros(num_cells * topk, np.min_scalar_type(num_named - 1))
    probs = np.zeros(num_cells * topk, np.float32)
    codes[targets] = named[order]
    probs[targets] = np.diff(sums[num_kept:])[order] * np.float32(1 / num_steps)
    return palette, codes.reshape(shape), probs.reshape(shape)


# --- by cell, as the first compact records were written: gaps of the palette as uint32, transposed to bytes [4, U],
# codes [H, W, K] (U: nothing kept), then the steps of the kept entries, class by class: their upper bits as uint8 [n],
# their lower bits as bits [3, n] ---


def _read_by_cell(
    record: bytes, start: int, shape: tuple[int, int, int], num_named: int
) -> tuple[NDArray[np.int32], NDArray[np.unsignedinteger[Any]], NDArray[np.float32]]:
    num_entries = shape[0] * shape[1] * shape[2]
    code_type = np.min_scalar_type(num_named).newbyteorder("<")
    codes_end = 4 * num_named + num_entries * code_type.itemsize
    body = _decompress(record[start:], codes_end, codes_end + num_entries + _lower_bytes(num_entries))
    by_byte = np.frombuffer(body, np.uint8, 4 * num_named).reshape(4, num_named)
    palette = np.ascontiguousarray(by_byte.T).view(_INT32)[:, 0].cumsum(dtype=np.int32)
    codes = np.frombuffer(body, code_type, num_entries, 4 * num_named)
    num_kept = int(np.count_nonzero(codes < num_named))
    if len(body) != codes_end + num_kept + _lower_bytes(num_kept):
        raise StoreError(
            f"{num_kept} kept entries ask for {num_kept + _lower_bytes(num_kept)} bytes of probabilities, "
            f"the body has {len(body) - codes_end}"
        )
    upper = np.frombuffer(body, np.uint8, num_kept, codes_end)
    lower = np.frombuffer(body, np.uint8, offset=codes_end + num_kept)
    bits = np.unpackbits(lower, count=_LOW_BITS * num_kept).reshape(_LOW_BITS, num_kept)
    steps = upper.astype(np.uint16) << _LOW_BITS | (bits[0] << 2 | bits[1] << 1 | bits[2])
    probs = np.zeros(num_entries, np.float32)
    probs[codes.argsort(kind="stable")[:num_kept]] = np.divide(steps, FINEST_STEPS, dtype=np.float32)
    # Entries that are not kept may name any class, but one that exists.
    return palette, np.minimum(codes, num_named - 1).reshape(shape), probs.reshape(shape)


def _lower_bytes(num_kept: int) -> int:
    return (_LOW_BITS * num_kept + 7) // 8


class _Zstd(threading.local):
    """One pair for each thread: they are not thread-safe, and making one takes longer than a record."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(level=_ZSTD_LEVEL)
        self.decompressor = zstandard.ZstdDecompressor()


_zstd = _Zstd()


def _compress(where: bytes, values: bytes) -> bytes:
    """Return one zstd frame with its content size; each part is a block, so has its own table of symbols."""
    stream = _zstd.compressor.compressobj(size=len(where) + len(values))
    first = stream.compress(where) + stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    return first + stream.compress(values) + stream.flush()


def _decompress(frame: bytes, min_bytes: int, max_bytes: int) -> bytes:
    """Decompress a frame. The library allocates the size that the frame claims, so that is checked first."""
    try:
        num_bytes = zstandard.frame_content_size(frame)
        if not min_bytes <= num_bytes <= min(max_bytes, MAX_BODY_BYTES):
            raise StoreError(
                f"a body of {num_bytes} bytes, where the map's shape asks for {min_bytes} to {max_bytes} "
                f"and {MAX_BODY_BYTES} are allowed"
            )
        return _zstd.decompressor.decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise StoreError(f"not a zstd frame ({error})") from error
