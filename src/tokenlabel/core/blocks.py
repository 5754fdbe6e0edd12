"""Working through a batch in blocks, so that what is needed on the way stays small."""

from __future__ import annotations

from itertools import pairwise

import torch

# Numbers held at once, about: what fits the cache of a CPU; elsewhere, enough to keep a GPU busy.
BLOCK_SIZE = {"cpu": 1 << 20}
BLOCK_SIZE_ELSEWHERE = 1 << 24


def blocks(count: int, numbers_each: int, device: torch.device) -> list[slice]:
    """Return slices that cover `count` rows of `numbers_each` numbers, as many a slice as a block holds."""
    rows = max(1, BLOCK_SIZE.get(device.type, BLOCK_SIZE_ELSEWHERE) // max(1, numbers_each))
    return [slice(start, end) for start, end in pairwise([*range(0, count, rows), count])]
