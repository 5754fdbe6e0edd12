from __future__ import annotations

import struct
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenlabel.core.geometry import Box
from tokenlabel.core.scores import Kind, ScoreMap, from_mask, from_probabilities, from_top
from tokenlabel.labels import encoding as encoding_module
from tokenlabel.labels.encoding import (
    COMPACT_STEPS,
    MAX_BODY_BYTES,
    RAW_STEPS,
    Encoding,
    EncodingError,
    on_grid,
    pack,
    unpack,
)

STEPS = {Encoding.RAW: RAW_STEPS, Encoding.COMPACT: COMPACT_STEPS}
EVERY = list(Encoding)


def random_map(seed: int = 0, *, height=5, width=7, num_classes=30, topk=4, sharpness=3.0) -> ScoreMap:
    logits = sharpness * np.random.default_rng(seed).normal(size=(height, width, num_classes))
    probs = np.exp(logits - logits.max(axis=2, keepdims=True))
    return from_probabilities(probs / probs.sum(axis=2, keepdims=True), topk)


def kept(score_map: ScoreMap) -> np.ndarray:
    """Return the kept probability of each class [H, W, C], 0 for the others."""
    full = np.zeros((*score_map.codes.shape[:2], score_map.num_classes))
    for (row, column, entry), prob in np.ndenumerate(score_map.probs):
        full[row, column, score_map.palette[score_map.codes[row, column, entry]]] += prob
    return full


@settings(max_examples=40, deadline=None)
@given(
    encoding=st.sampled_from(EVERY),
    seed=st.integers(0, 10**6),
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    num_classes=st.sampled_from([2, 10, 1000]),
    topk=st.integers(1, 10),
    sharpness=st.sampled_from([0.0, 1.0, 5.0, 50.0]),
)
def test_no_probability_is_a_step_off_and_the_mass_stays(
    encoding, seed, height, width, num_classes, topk, sharpness
):
    original = random_map(
        seed, height=height, width=width, num_classes=num_classes, topk=topk, sharpness=sharpness
    )
    read = unpack(pack(original, encoding), num_classes=num_classes)
    step = 1 / STEPS[encoding]
    assert step <= 1 / 500
    assert np.abs(kept(read) - kept(original)).max() < step
    mass, original_mass = read.probs.sum(axis=2, dtype=float), original.probs.sum(axis=2, dtype=float)
    assert np.abs(mass - original_mass).max() <= step / 2 + 1e-6
    assert read.probs.dtype == np.float32
    assert (read.num_classes, read.region, read.kind) == (num_classes, original.region, original.kind)


@pytest.mark.parametrize("encoding", EVERY)
def test_certain_cells_stay_certain(encoding):
    mask = np.array([[0, 1, 2], [255, 2, 2]])
    read = unpack(pack(from_mask(mask, num_classes=3), encoding), num_classes=3)
    assert np.array_equal(kept(read).sum(axis=2), [[1, 1, 1], [0, 1, 1]])
    assert np.array_equal(read.top_class_ids[mask < 255], mask[mask < 255])


@pytest.mark.parametrize("encoding", EVERY)
@pytest.mark.parametrize("num_classes", [2, 1000, 21_841, 70_000])
def test_any_number_of_classes(encoding, num_classes):
    class_ids = np.array([[[num_classes - 1, 0], [0, 1]], [[0, num_classes - 1], [num_classes - 1, 1]]])
    probs = np.array([[[0.75, 0.25], [0.5, 0.5]], [[0.5, 0.25], [1.0, 0.0]]])
    read = unpack(
        pack(from_top(class_ids, probs, num_classes=num_classes), encoding), num_classes=num_classes
    )
    # All of these lie between steps of 1/510, so compact records are allowed their step.
    expected = kept(from_top(class_ids, probs, num_classes=num_classes))
    assert np.abs(kept(read) - expected).max() < 1 / STEPS[encoding]


@pytest.mark.parametrize("encoding", EVERY)
def test_more_classes_in_a_map_than_a_byte_counts(encoding):
    num_classes = 400
    class_ids = np.arange(num_classes).reshape(20, 20, 1)
    probs = np.full((20, 20, 1), 0.5)
    read = unpack(
        pack(from_top(class_ids, probs, num_classes=num_classes), encoding), num_classes=num_classes
    )
    assert np.array_equal(read.class_ids, class_ids)


def test_entries_that_carry_nothing_are_dropped():
    class_ids = np.broadcast_to([7, 8, 9], (4, 4, 3))
    probs = np.broadcast_to([0.9, 0.1, 1e-4], (4, 4, 3))
    read = unpack(pack(from_top(class_ids, probs, num_classes=10), Encoding.COMPACT), num_classes=10)
    assert read.palette.tolist() == [7, 8]
    assert read.codes.shape == (4, 4, 2)


@pytest.mark.parametrize("encoding", EVERY)
def test_a_map_that_keeps_nothing(encoding):
    nothing = from_mask(np.full((3, 2), 255), num_classes=10)
    read = unpack(pack(nothing, encoding), num_classes=10)
    assert read.probs.shape == (3, 2, 1)
    assert not read.probs.any()


@pytest.mark.parametrize("encoding", EVERY)
def test_logits_are_kept_to_the_bit(encoding):
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=20, size=(6, 6, 5)).astype(np.float16).astype(np.float32)
    class_ids = np.stack([rng.permutation(1000)[:5] for _ in range(36)]).reshape(6, 6, 5)
    original = from_top(class_ids, logits, num_classes=1000, kind=Kind.LOGITS)
    read = unpack(pack(original, encoding), num_classes=1000)
    assert np.array_equal(read.probs, original.probs)
    assert np.array_equal(read.class_ids, original.class_ids)
    assert read.kind is Kind.LOGITS


def test_logits_beyond_float16_are_refused():
    huge = from_top(np.zeros((1, 1, 1), int), np.full((1, 1, 1), 1e6), num_classes=2, kind=Kind.LOGITS)
    with pytest.raises(EncodingError, match="float16"):
        pack(huge, Encoding.RAW)


@pytest.mark.parametrize("encoding", EVERY)
def test_the_region_is_kept_to_the_bit(encoding):
    region = Box(left=0.125, top=0.1, right=2 / 3, bottom=1.0)
    original = random_map()
    cropped = ScoreMap(original.palette, original.codes, original.probs, original.num_classes, region)
    assert unpack(pack(cropped, encoding), num_classes=30).region == region


def test_maps_whose_body_would_be_too_large_are_written_raw(monkeypatch):
    score_map = random_map()
    assert pack(score_map, Encoding.COMPACT) != pack(score_map, Encoding.RAW)
    monkeypatch.setattr(encoding_module, "MAX_BODY_BYTES", 200)
    assert pack(score_map, Encoding.COMPACT) == pack(score_map, Encoding.RAW)


def compact_by_loops(record: bytes) -> tuple[list[int], dict[tuple[int, int], int]]:
    """Return the palette and {(cell, code): steps} of a compact record, byte by byte and bit by bit."""
    number, flags, height, width, topk, num_named = struct.unpack_from("<BBHHxxII", record)
    assert (number, flags) == (1, 0)
    body = zstandard.decompress(record[16:])
    palette, class_id = [], 0
    for i in range(num_named):
        class_id += sum(body[byte * num_named + i] << (8 * byte) for byte in range(4))
        palette.append(class_id)
    size, start = (1 if num_named < 256 else 2), 4 * num_named
    num_entries = height * width * topk
    codes = [int.from_bytes(body[start + size * i :][:size], "little") for i in range(num_entries)]
    start += size * num_entries
    kept = [(i // topk, code) for code in range(num_named) for i in range(num_entries) if codes[i] == code]
    bits = [byte >> (7 - i) & 1 for byte in body[start + len(kept) :] for i in range(8)]
    steps = {}
    for i, entry in enumerate(kept):
        lower = 4 * bits[i] + 2 * bits[len(kept) + i] + bits[2 * len(kept) + i]
        steps[entry] = 8 * body[start + i] + lower
    assert len(steps) == len(kept)  # no cell names a class twice
    return palette, steps


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    num_classes=st.sampled_from([2, 30, 1000]),
    topk=st.integers(1, 12),
    sharpness=st.sampled_from([0.0, 1.0, 5.0, 50.0]),
)
def test_compact_records_against_loops(seed, height, width, num_classes, topk, sharpness):
    original = random_map(
        seed, height=height, width=width, num_classes=num_classes, topk=topk, sharpness=sharpness
    )
    record = pack(original, Encoding.COMPACT)
    palette, steps = compact_by_loops(record)
    expected = {
        (cell, int(original.palette[code])): int(num_steps)
        for cell, (codes, cell_steps) in enumerate(
            zip(
                original.codes.reshape(-1, original.codes.shape[2]),
                on_grid(original.probs, COMPACT_STEPS).reshape(-1, original.codes.shape[2]),
                strict=True,
            )
        )
        for code, num_steps in zip(codes, cell_steps, strict=True)
        if num_steps
    }
    assert {(cell, palette[code]): n for (cell, code), n in steps.items()} == expected
    read = unpack(record, num_classes=num_classes)
    assert read.palette.tolist() == palette
    assert read.codes.max() < len(palette)
    num_steps = np.zeros((height * width, num_classes))
    for (cell, class_id), n in expected.items():
        num_steps[cell, class_id] = n
    np.testing.assert_allclose(kept(read).reshape(height * width, -1) * COMPACT_STEPS, num_steps, atol=1e-4)


@pytest.mark.parametrize("num_named", [255, 256])
def test_palettes_around_the_size_that_a_byte_counts(num_named):
    class_ids = np.arange(num_named).reshape(-1, 1, 1)
    original = from_top(class_ids, np.full(class_ids.shape, 0.5), num_classes=300)
    record = pack(original, Encoding.COMPACT)
    assert np.array_equal(unpack(record, num_classes=300).class_ids, class_ids)
    assert len(compact_by_loops(record)[1]) == num_named


def test_threads_pack_and_unpack_side_by_side():
    maps = [random_map(seed, height=30, width=30) for seed in range(8)]

    def there_and_back(score_map: ScoreMap) -> ScoreMap:
        return unpack(pack(score_map, Encoding.COMPACT), num_classes=30)

    with ThreadPoolExecutor(4) as threads:
        for original, read in zip(20 * maps, threads.map(there_and_back, 20 * maps), strict=True):
            assert np.abs(kept(read) - kept(original)).max() < 1 / COMPACT_STEPS


@settings(max_examples=50, deadline=None)
@given(
    weights=st.lists(st.floats(0, 1), min_size=1, max_size=6),
    mass=st.floats(0, 1),
    num_steps=st.sampled_from([COMPACT_STEPS, RAW_STEPS, 3]),
)
def test_on_grid_against_a_loop(weights, mass, num_steps):
    total = sum(weights)
    probs = [mass * w / total if total else 0.0 for w in weights]
    steps = [int(p * num_steps) for p in probs]
    fractions = [p * num_steps - n for p, n in zip(probs, steps, strict=True)]
    for _ in range(round(sum(p * num_steps for p in probs)) - sum(steps)):
        largest = max(range(len(probs)), key=lambda i: fractions[i])
        steps[largest] += 1
        fractions[largest] = -1
    assert on_grid(np.array(probs), num_steps).tolist() == steps


@pytest.mark.parametrize("encoding", EVERY)
def test_any_bytes_give_a_map_or_a_clear_error(encoding):
    rng = np.random.default_rng(0)
    record = pack(random_map(height=3, width=3, num_classes=9, topk=2), encoding)
    num_read = 0
    for _ in range(1500):
        mutated = bytearray(record)
        for _ in range(rng.integers(1, 4)):
            mutated[rng.integers(len(mutated))] = rng.integers(256)
        cut = rng.integers(len(mutated)) if rng.random() < 0.2 else len(mutated)
        try:
            read = unpack(bytes(mutated[:cut]), num_classes=9)
        except EncodingError:
            continue
        num_read += 1
        assert read.codes.max() < len(read.palette)
        assert read.palette.min() >= 0
        assert read.palette.max() < 9
        assert np.isfinite(read.probs).all()
        assert read.codes.shape == read.probs.shape
    assert num_read < 1500


def test_bytes_inside_the_frame_give_a_map_or_a_clear_error():
    """The frame is whole in each of these records; what it holds is not."""
    rng = np.random.default_rng(0)
    record = pack(random_map(height=3, width=3, num_classes=9, topk=2), Encoding.COMPACT)
    body, num_read = zstandard.decompress(record[16:]), 0
    for _ in range(1500):
        mutated = bytearray(body)
        for _ in range(rng.integers(1, 4)):
            mutated[rng.integers(len(mutated))] = rng.integers(256)
        cut = rng.integers(len(mutated)) if rng.random() < 0.2 else len(mutated)
        try:
            read = unpack(record[:16] + zstandard.compress(bytes(mutated[:cut])), num_classes=9)
        except EncodingError:
            continue
        num_read += 1
        assert read.codes.max() < len(read.palette)
        assert read.palette.min() >= 0
        assert read.palette.max() < 9
        assert np.isfinite(read.probs).all()
    assert 0 < num_read < 1500


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda body: zstandard.compress(body[:-1]), "kept entries ask for"),
        (lambda body: zstandard.compress(body + bytes(1)), "body of 454 bytes"),
        (lambda body: zstandard.compress(body[:9]), "body of 9 bytes"),
        (lambda body: zstandard.compress(body) + bytes(1), "not a zstd frame"),
        (lambda body: zstandard.compress(body)[:-1], "not a zstd frame"),
        (lambda body: zstandard.ZstdCompressor(write_content_size=False).compress(body), "body of -1"),
        (lambda body: b"", "zstd frame"),
    ],
)
def test_a_body_of_another_length_is_refused(change, message):
    record = pack(random_map(), Encoding.COMPACT)
    with pytest.raises(EncodingError, match=message):
        unpack(record[:16] + change(zstandard.decompress(record[16:])), num_classes=30)


def test_records_of_encodings_to_come_are_refused():
    record = pack(random_map(), Encoding.COMPACT)
    with pytest.raises(EncodingError, match=r"encoding 2, known are \[0, 1\]"):
        unpack(b"\x02" + record[1:], num_classes=30)


def test_shapes_that_would_take_all_memory_are_refused():
    bomb = zstandard.compress(bytes(1 << 28))
    for frame in (bomb, zstandard.compress(bytes(100)), bytes(100)):
        head = struct.pack("<BBHHxxII", 1, 0, 65535, 65535, 2**32 - 1, 2**32 - 1)
        with pytest.raises(EncodingError, match=r"body of|not a zstd frame"):
            unpack(head + frame, num_classes=10)
    with pytest.raises(EncodingError, match="body of"):
        unpack(struct.pack("<BBHHxxII", 1, 0, 1 << 14, 1 << 14, 1, 1) + bomb, num_classes=10)
    with pytest.raises(EncodingError, match="takes"):
        unpack(struct.pack("<BBHHxxII", 0, 0, 65535, 65535, 2**32 - 1, 2**32 - 1), num_classes=10)


@pytest.mark.parametrize("side", [1300, 2047])
def test_the_largest_body_takes_no_more_memory_than_promised(side):
    num_cells = side * side
    codes, probs = bytes(num_cells), bytes(num_cells + (3 * num_cells + 7) // 8)
    if side == 2047:  # nothing is kept
        codes, probs = b"\x01" * num_cells, b""
    body = bytes(4) + codes + probs
    assert 0.9 * MAX_BODY_BYTES < len(body) <= MAX_BODY_BYTES
    record = struct.pack("<BBHHxxII", 1, 0, side, side, 1, 1) + zstandard.compress(body)
    tracemalloc.start()
    unpack(record, num_classes=10)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 16 * MAX_BODY_BYTES
