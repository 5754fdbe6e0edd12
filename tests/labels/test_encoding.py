from __future__ import annotations

import struct
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenlabel.core.geometry import Box
from tokenlabel.core.scores import Kind, ScoreMap, from_mask, from_probabilities, from_top
from tokenlabel.labels import encoding as encoding_module
from tokenlabel.labels.encoding import (
    FINEST_STEPS,
    MAX_BODY_BYTES,
    MAX_COMPACT_ENTRIES,
    RAW_STEPS,
    Encoding,
    on_grid,
    pack,
    unpack,
)
from tokenlabel.runtime.errors import StoreError

STEPS = {Encoding.RAW: RAW_STEPS, Encoding.COMPACT: FINEST_STEPS}
EVERY = list(Encoding)
# What the first version of this package wrote as a compact record: 3 x 2 cells of classes 3, 7 and 299, with a region.
OF_THE_FIRST_VERSION = bytes.fromhex(
    "010103000200000002000000030000000000000000000000000000000000d03f000000000000f03f000000000000f03f"
    "28b52ffd20250801000304240000010000000000000002000100020103010300032f261900063f130f1f210000a5e6e6e0"
)


def pack_all(score_map: ScoreMap, encoding: Encoding) -> bytes:
    return pack(score_map, encoding, tolerance=0)


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
def test_no_probability_is_a_step_off_and_the_mass_stays(encoding, seed, height, width, num_classes, topk, sharpness):
    original = random_map(seed, height=height, width=width, num_classes=num_classes, topk=topk, sharpness=sharpness)
    read = unpack(pack_all(original, encoding), num_classes=num_classes)
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
    read = unpack(pack_all(from_top(class_ids, probs, num_classes=num_classes), encoding), num_classes=num_classes)
    # All of these lie between steps of 1/510, so compact records are allowed their step.
    expected = kept(from_top(class_ids, probs, num_classes=num_classes))
    assert np.abs(kept(read) - expected).max() < 1 / STEPS[encoding]


@pytest.mark.parametrize("encoding", EVERY)
def test_more_classes_in_a_map_than_a_byte_counts(encoding):
    num_classes = 400
    class_ids = np.arange(num_classes).reshape(20, 20, 1)
    probs = np.full((20, 20, 1), 0.5)
    read = unpack(pack(from_top(class_ids, probs, num_classes=num_classes), encoding), num_classes=num_classes)
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
    with pytest.raises(StoreError, match="float16"):
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
    """Return the palette and {(cell, code): steps} of a compact record, byte by byte."""
    number, flags, height, width, _, topk, num_named = struct.unpack_from("<BBHHHII", record)
    assert (number, flags) == (2, 0)
    numbers, so_far = [], 0
    for byte in zstandard.decompress(record[16:]):
        so_far += byte
        if byte < 255:
            numbers.append(so_far)
            so_far = 0
    num_kept = (len(numbers) - num_named) // 2
    palette, place, entries = [], -1, []
    for gap in numbers[:num_named]:
        palette.append((palette[-1] if palette else -1) + gap + 1)
    for gap in numbers[num_named : num_named + num_kept]:
        place += gap + 1
        entries.append((place % (height * width), place // (height * width)))
    steps = dict(zip(entries, numbers[num_named + num_kept :], strict=True))
    assert len(steps) == num_kept  # no cell names a class twice
    assert max((sum(cell == c for c, _ in entries) for cell, _ in entries), default=1) == topk
    return palette, steps


def worthy_by_loops(
    original: ScoreMap, tolerance: float, num_steps: int
) -> tuple[dict[tuple[int, int], int], set[int]]:
    """Return {(cell, class id): steps} of the entries that a compact record keeps, and the cells that it empties."""
    topk = original.codes.shape[2]
    cells = [
        {
            int(original.palette[code]): float(prob)
            for code, prob in zip(codes, probs, strict=True)
            if prob >= tolerance and prob > 0
        }
        for codes, probs in zip(original.codes.reshape(-1, topk), original.probs.reshape(-1, topk), strict=True)
    ]
    expected, emptied = {}, set()
    for cell, entries in enumerate(cells):
        worthy = {
            class_id: prob
            for class_id, prob in entries.items()
            if sum(other[class_id] - tolerance for other in cells if class_id in other) >= 2 * tolerance
        }
        steps = on_grid(np.array([*worthy.values(), 0.0]), num_steps)
        kept = {(cell, class_id): int(n) for class_id, n in zip(worthy, steps, strict=False) if n}
        if not kept and original.probs.reshape(-1, topk)[cell].any():
            emptied.add(cell)
        expected |= kept
    return expected, emptied


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    num_classes=st.sampled_from([2, 30, 1000]),
    topk=st.integers(1, 12),
    sharpness=st.sampled_from([0.0, 1.0, 5.0, 50.0]),
    tolerance=st.sampled_from([0.0, 0.001, 0.008, 0.03, 0.2]),
    even=st.booleans(),
)
def test_compact_records_against_loops(seed, height, width, num_classes, topk, sharpness, tolerance, even):
    original = random_map(seed, height=height, width=width, num_classes=num_classes, topk=topk, sharpness=sharpness)
    record = pack(replace(original, empty_is_even=even), Encoding.COMPACT, tolerance=tolerance)
    num_steps = struct.unpack_from("<H", record, 6)[0]
    assert num_steps == (round(0.8 / tolerance) if tolerance > 0.0016 else FINEST_STEPS)
    palette, steps = compact_by_loops(record)
    expected, emptied = worthy_by_loops(original, tolerance, num_steps)
    found = {(cell, palette[code]): n for (cell, code), n in steps.items()}
    if not even:  # these cells keep their best entry
        for cell in emptied:
            best = original.probs.reshape(height * width, -1)[cell].max()
            ((_, n),) = [entry for entry in found.items() if entry[0][0] == cell]
            assert n == max(1, round(float(best) * num_steps))
        found = {entry: n for entry, n in found.items() if entry[0] not in emptied}
    assert found == expected
    read = unpack(record, num_classes=num_classes)
    assert read.palette.tolist() == palette
    dense = np.zeros((height * width, num_classes))
    for (cell, code), n in steps.items():
        dense[cell, palette[code]] = n / num_steps
    np.testing.assert_allclose(kept(read).reshape(height * width, -1), dense, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    sharpness=st.sampled_from([0.0, 1.0, 5.0]),
    tolerance=st.sampled_from([0.004, 0.008, 0.03]),
)
def test_what_a_tolerance_may_leave_out(seed, sharpness, tolerance):
    """An entry above three times the tolerance is kept to a step, and a larger tolerance takes no more bytes."""
    original = replace(
        random_map(seed, height=8, width=8, num_classes=1000, topk=5, sharpness=sharpness), empty_is_even=True
    )
    record = pack(original, Encoding.COMPACT, tolerance=tolerance)
    off = np.abs(kept(unpack(record, num_classes=1000)) - kept(original))
    assert off.max() < 3 * tolerance
    assert off[kept(original) >= 3 * tolerance].max(initial=0) < 1.25 * tolerance + 0.5 / FINEST_STEPS
    assert len(record) <= len(pack_all(original, Encoding.COMPACT))


def test_a_small_object_is_never_left_out():
    """One cell of a class that occurs nowhere else, in a map that is certain of another everywhere."""
    mask = np.zeros((18, 18), int)
    mask[7, 9] = 777
    read = unpack(
        pack(from_mask(mask, num_classes=1000, unlabelled=-1), Encoding.COMPACT, tolerance=0.2), num_classes=1000
    )
    assert np.array_equal(read.top_class_ids, mask)
    assert (read.probs.sum(axis=2) == 1).all()


def test_a_record_of_the_first_version_is_read():
    read = unpack(OF_THE_FIRST_VERSION, num_classes=300)
    assert read.palette.tolist() == [3, 7, 299]
    assert read.region == Box(0, 0.25, 1, 1)
    expected = np.zeros((3, 2, 300))
    expected[0, 0, [3, 299]] = 383, 127
    expected[0, 1, [3, 7]] = 306, 51
    expected[1, 0, [3, 299]] = 204, 255
    expected[1, 1, 7] = 510
    expected[2, 0, 7] = 153
    expected[2, 1, 3] = 1
    np.testing.assert_allclose(kept(read) * 510, expected, atol=1e-4)


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
        return unpack(pack_all(score_map, Encoding.COMPACT), num_classes=30)

    with ThreadPoolExecutor(4) as threads:
        for original, read in zip(20 * maps, threads.map(there_and_back, 20 * maps), strict=True):
            assert np.abs(kept(read) - kept(original)).max() < 1 / FINEST_STEPS


@settings(max_examples=50, deadline=None)
@given(
    weights=st.lists(st.floats(0, 1), min_size=1, max_size=6),
    mass=st.floats(0, 1),
    num_steps=st.sampled_from([FINEST_STEPS, RAW_STEPS, 3]),
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


def small_records() -> list[bytes]:
    """One of each encoding, of classes below 9, or below 300 that of the first version."""
    return [*(pack(random_map(height=3, width=3, num_classes=9, topk=2), e) for e in EVERY), OF_THE_FIRST_VERSION]


@pytest.mark.parametrize("record", small_records(), ids=["raw", "compact", "first version"])
def test_any_bytes_give_a_map_or_a_clear_error(record):
    rng = np.random.default_rng(0)
    num_read, num_classes = 0, 300 if record is OF_THE_FIRST_VERSION else 9
    for _ in range(1500):
        mutated = bytearray(record)
        for _ in range(rng.integers(1, 4)):
            mutated[rng.integers(len(mutated))] = rng.integers(256)
        cut = rng.integers(len(mutated)) if rng.random() < 0.2 else len(mutated)
        try:
            read = unpack(bytes(mutated[:cut]), num_classes=num_classes)
        except StoreError:
            continue
        num_read += 1
        assert read.codes.max() < len(read.palette)
        assert read.palette.min() >= 0
        assert read.palette.max() < num_classes
        assert np.isfinite(read.probs).all()
        assert read.codes.shape == read.probs.shape
    assert num_read < 1500


@pytest.mark.parametrize("record", small_records()[1:], ids=["compact", "first version"])
def test_bytes_inside_the_frame_give_a_map_or_a_clear_error(record):
    """The frame is whole in each of these records; what it holds is not."""
    rng = np.random.default_rng(0)
    start, num_classes = (48, 300) if record is OF_THE_FIRST_VERSION else (16, 9)
    body, num_read = zstandard.decompress(record[start:]), 0
    for _ in range(1500):
        mutated = bytearray(body)
        for _ in range(rng.integers(1, 4)):
            mutated[rng.integers(len(mutated))] = rng.integers(256)
        cut = rng.integers(len(mutated)) if rng.random() < 0.2 else len(mutated)
        try:
            read = unpack(record[:start] + zstandard.compress(bytes(mutated[:cut])), num_classes=num_classes)
        except StoreError:
            continue
        num_read += 1
        assert read.codes.max() < len(read.palette)
        assert read.palette.min() >= 0
        assert read.palette.max() < num_classes
        assert np.isfinite(read.probs).all()
    assert 0 < num_read < 1500


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda body: zstandard.compress(body[:-1]), "its numbers do not fit 30 classes"),
        (lambda body: zstandard.compress(body + bytes(1)), "its numbers do not fit 30 classes"),
        (lambda body: zstandard.compress(body[:-1] + b"\xff"), "its numbers do not fit 30 classes"),
        (lambda body: zstandard.compress(body[:30] + b"\xff" * 9 + body[30:]), "class that is not one of"),
        (lambda body: zstandard.compress(body[:9]), "body of 9 bytes"),
        (lambda body: zstandard.compress(body) + bytes(1), "not a zstd frame"),
        (lambda body: zstandard.compress(body)[:-1], "not a zstd frame"),
        (lambda body: zstandard.ZstdCompressor(write_content_size=False).compress(body), "body of -1"),
        (lambda body: b"", "zstd frame"),
    ],
)
def test_a_body_of_another_length_is_refused(change, message):
    record = pack(random_map(), Encoding.COMPACT)
    with pytest.raises(StoreError, match=message):
        unpack(record[:16] + change(zstandard.decompress(record[16:])), num_classes=30)


@pytest.mark.parametrize("encoding", EVERY)
def test_values_that_no_teacher_writes_are_refused(encoding):
    """Such as those of another program, whose checksums are right."""
    original = random_map()
    record = pack(replace(original, probs=(2 * original.probs).clip(max=1.9)), encoding)
    with pytest.raises(StoreError, match=r"probabilities of a cell sum to [12]\."):
        unpack(record, num_classes=30)
    record = pack(replace(original, kind=Kind.LOGITS), encoding)
    start, nan = 16 + 4 * len(original.palette), struct.pack("<e", np.nan)  # values lie behind head and palette
    with pytest.raises(StoreError, match="logits are not finite"):
        unpack(record[:start] + nan + record[start + 2 :], num_classes=30)


def test_records_of_encodings_to_come_are_refused():
    record = pack(random_map(), Encoding.COMPACT)
    with pytest.raises(StoreError, match=r"encoding 3, known are 0 to 2"):
        unpack(b"\x03" + record[1:], num_classes=30)


def test_shapes_that_would_take_all_memory_are_refused():
    bomb = zstandard.compress(bytes(1 << 28))
    for frame in (bomb, zstandard.compress(bytes(100)), bytes(100)):
        for number in (1, 2):
            head = struct.pack("<BBHHHII", number, 0, 65535, 65535, 100, 2**32 - 1, 2**32 - 1)
            with pytest.raises(StoreError, match=r"body of|not a zstd frame|more than is written so"):
                unpack(head + frame, num_classes=10)
    for number in (1, 2):
        with pytest.raises(StoreError, match=r"body of|more than is written so"):
            unpack(struct.pack("<BBHHHII", number, 0, 1 << 14, 1 << 14, 100, 1, 1) + bomb, num_classes=10)
    with pytest.raises(StoreError, match="body of"):
        unpack(struct.pack("<BBHHHII", 2, 0, 4, 4, 100, 1, 1) + bomb, num_classes=10)
    with pytest.raises(StoreError, match="takes"):
        unpack(struct.pack("<BBHHHII", 0, 0, 65535, 65535, 0, 2**32 - 1, 2**32 - 1), num_classes=10)


def of_the_first_version(side: int) -> bytes:
    """A record whose body is nearly as large as allowed; with the side of 2047 it keeps nothing."""
    num_cells = side * side
    codes, probs = bytes(num_cells), bytes(num_cells + (3 * num_cells + 7) // 8)
    if side == 2047:
        codes, probs = b"\x01" * num_cells, b""
    body = bytes(4) + codes + probs
    assert 0.9 * MAX_BODY_BYTES < len(body) <= MAX_BODY_BYTES
    return struct.pack("<BBHHHII", 1, 0, side, side, 0, 1, 1) + zstandard.compress(body)


def of_many_classes() -> bytes:
    """As many entries as a compact record may have, in steps that take several bytes."""
    num_named, num_entries = 4096, MAX_COMPACT_ENTRIES
    places, steps = bytes(num_entries), (b"\xff" + bytes(1)) * (num_entries // 2) + bytes(num_entries // 2)
    frame = zstandard.compress(bytes(num_named) + places + steps)
    return struct.pack("<BBHHHII", 2, 0, 16, 16, 100, num_entries // 256, num_named) + frame


@pytest.mark.parametrize(
    "record", [of_the_first_version(1300), of_the_first_version(2047), of_many_classes()], ids=["full", "empty", "many"]
)
def test_the_largest_body_takes_no_more_memory_than_promised(record):
    tracemalloc.start()
    with suppress(StoreError):  # the last one is refused at the end: its probabilities sum to more than 1
        unpack(record, num_classes=5000)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 16 * MAX_BODY_BYTES
