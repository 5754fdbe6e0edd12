"""Which records of a store are of keys that have others, and which of them count."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from tokenlabel.labels.shards import Shard, key_text


def find_duplicates(
    shards: Sequence[Shard], hashes: NDArray[np.uint64], places: NDArray[np.uint64]
) -> tuple[NDArray[np.int64], list[str]]:
    """Find the records of keys that have several, among hashes [N] in order; the first of each key counts.

    Returns the positions of those that do not count, and the keys that have different ones in one generation.
    """
    alike = hashes[1:] == hashes[:-1]
    positions = np.flatnonzero(np.append(alike, False) | np.insert(alike, 0, False))
    if not len(positions):
        return positions, []
    # The rows of these records, with their keys in one buffer; files without any are not read again.
    numbers = (places[positions] >> np.uint64(32)).astype(np.int64)
    tables = {i: shards[i].table() for i in np.unique(numbers).tolist()}
    keys = np.concatenate([of_shard for _, of_shard in tables.values()])
    first_rows, first_keys = np.zeros((2, len(shards)), np.int64)
    first_rows[[*tables]] = [0, *accumulate(len(rows) for rows, _ in tables.values())][:-1]
    first_keys[[*tables]] = [0, *accumulate(len(of_shard) for _, of_shard in tables.values())][:-1]
    row_numbers = first_rows[numbers] + (places[positions] & np.uint64(0xFFFFFFFF)).astype(np.int64)
    rows = np.concatenate([rows for rows, _ in tables.values()])[row_numbers]
    starts, lengths = first_keys[numbers] + rows["key_start"], rows["key_length"].astype(np.int64)

    def text(i: int) -> str:
        return key_text(keys[starts[i] : starts[i] + lengths[i]].tobytes())

    # Which of its neighbours has the same key, and not only the same hash.
    same = np.append(False, rows["hash"][1:] == rows["hash"][:-1]) & (lengths == np.roll(lengths, 1))
    for length in np.unique(lengths[same]).tolist():
        second = np.flatnonzero(same & (lengths == length))
        windows = sliding_window_view(keys, length) if length else np.zeros((len(keys) + 1, 0))
        same[second] = (windows[starts[second]] == windows[starts[second - 1]]).all(axis=1)
    # The record that counts for each, which is the last one before it that is not like its neighbour ...
    counts = np.maximum.accumulate(np.where(same, 0, np.arange(len(rows))))
    # ... but where keys share a hash, which is chance in 1e-7 stores of a million, those of one may lie apart.
    shared = ~same & np.append(False, rows["hash"][1:] == rows["hash"][:-1])
    for wanted in np.unique(rows["hash"][shared]):
        firsts: dict[str, int] = {}
        for i in np.flatnonzero(rows["hash"] == wanted).tolist():
            counts[i] = firsts.setdefault(text(i), i)
    superseded = counts != np.arange(len(rows))
    generations = np.array([shard.generation for shard in shards])[numbers]
    differ = superseded & (generations == generations[counts])
    differ &= (rows["record_length"] != rows["record_length"][counts]) | (
        rows["checksum"] != rows["checksum"][counts]
    )
    return positions[superseded], sorted(map(text, np.unique(counts[differ]).tolist()))
