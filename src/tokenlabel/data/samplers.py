"""Which images each step takes: the order of an epoch, and each rank's part of every batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray

from tokenlabel.runtime.coercion import COUNT, NATURAL, check_number, check_numbers, coerced_fields

# Part of each seed, so that the order of images and the augmentation of a sample draw independent numbers.
FOR_ORDER, FOR_SAMPLE = 0, 1


def shard_order(
    groups: Int[NDArray[np.int64], " images"], *, seed: int, epoch: int, window: int
) -> Int[NDArray[np.int64], " images"]:
    """Return an order of an epoch's images that goes from group (tar file) to group, a few of them at a time.

    `groups`: the group of each image. The groups lie on a circle in random order, and each image moves forward by a
    random distance of up to `window` groups. So at any time images of about `window` groups are read in random order,
    and each group is read once, but for `window` ones, which are read at the start and at the end. With `window` >= the
    number of groups it is a plain permutation. A function of its arguments, the same on every rank.
    """
    check_number(window, NATURAL, name="window")
    rng = np.random.default_rng((seed, FOR_ORDER, epoch))
    present, number = np.unique(groups, return_inverse=True)
    moved = min(window, len(present)) * rng.random(len(groups))
    # On a circle: on a line, the images of the last groups would be moved to nothing but the end.
    return np.argsort((rng.permutation(len(present))[number] + moved) % len(present), kind="stable")


@dataclass(frozen=True, kw_only=True)
@coerced_fields
class BatchSampler:
    """The images of each training step from `start_step` on, as lists of (epoch, index).

    An epoch is a permutation of the images drawn from (seed, epoch), without the last incomplete batch (which holds
    other images in each epoch). `batch_size` counts the images of all ranks together: each rank takes an equal part, in
    order, so that the parts of all ranks side by side are the batch of a single rank, and yields it in
    `grad_accum_steps` equal lists. `order` returns another permutation for each epoch (`shard_order`). With fewer
    images than a batch, permutations follow one another without a gap: a batch then holds an image more than once,
    each time with the augmentation of another epoch.

    >>> batches = list(tl.BatchSampler(num_images=5, batch_size=2, seed=0, num_steps=4))
    >>> [epoch for epoch, _ in sum(batches, [])]
    [0, 0, 0, 0, 1, 1, 1, 1]
    """

    num_images: int
    batch_size: int
    seed: int
    num_steps: int
    start_step: int = 0
    rank: int = 0
    world_size: int = 1
    grad_accum_steps: int = 1
    order: Callable[[int], NDArray[np.int64]] | None = None

    def __post_init__(self) -> None:
        check_numbers(self, num_images=NATURAL, batch_size=NATURAL, num_steps=COUNT, seed=COUNT)
        check_numbers(self, start_step=COUNT, grad_accum_steps=NATURAL)
        _check_rank(self.rank, self.world_size)
        if self.batch_size % (self.world_size * self.grad_accum_steps):
            raise ValueError(
                f"a batch of {self.batch_size} images does not divide among {self.world_size} processes in "
                f"{self.grad_accum_steps} parts each; change batch_size to a multiple"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Steps that an epoch takes; 1 where the images don't fill a batch."""
        return max(1, self.num_images // self.batch_size)

    def __len__(self) -> int:
        return max(0, self.num_steps - self.start_step) * self.grad_accum_steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        orders: dict[int, NDArray[np.int64]] = {}
        # Images beyond the last full batch are dropped; each epoch's order drops others.
        epoch_size = min(self.num_images, self.steps_per_epoch * self.batch_size)
        for step in range(self.start_step, self.num_steps):
            for part in range(self.grad_accum_steps):
                first = step * self.batch_size + self.part_start(part)
                epochs, places = np.divmod(first + np.arange(self.part_size), epoch_size)
                in_use = {int(epoch) for epoch in epochs}  # two where images are fewer than a batch
                orders = {epoch: orders[epoch] if epoch in orders else self._order(epoch) for epoch in in_use}
                yield [(int(e), int(orders[int(e)][place])) for e, place in zip(epochs, places, strict=True)]

    @cached_property
    def part_size(self) -> int:
        """How many images each list has."""
        return self.batch_size // (self.world_size * self.grad_accum_steps)

    def part_start(self, part: int) -> int:
        """Return the place within a step's batch of the first image of this rank's given part."""
        return (self.rank * self.grad_accum_steps + part) * self.part_size

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if self.order is not None:
            return self.order(epoch)
        return np.random.default_rng((self.seed, FOR_ORDER, epoch)).permutation(self.num_images)


@dataclass(frozen=True, kw_only=True)
class EvalBatchSampler:
    """Every image once, in order, as lists of (0, index).

    Each rank takes one contiguous part of the images; together they cover every image once. Ranks may differ by one in
    their number of images, so sum over ranks, don't average. All have the same number of batches, since each forward
    pass of a sharded model is a collective operation. `batch_size`: the maximum, on each rank.
    """

    num_images: int
    batch_size: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        _check_rank(self.rank, self.world_size)
        # With batches of one, a rank with one image more would need one batch more.
        check_numbers(self, batch_size=NATURAL if self.world_size == 1 else "[2, inf)")
        if self.num_images < self.world_size:
            raise ValueError(
                f"{self.num_images} images don't give each of {self.world_size} processes one; use fewer processes"
            )

    def __len__(self) -> int:
        longest = -(-self.num_images // self.world_size)
        return -(-longest // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        # Batches of nearly one size, not full ones and a rest, of which a rank with fewer images might have one less.
        start, end = (self.num_images * r // self.world_size for r in (self.rank, self.rank + 1))
        for batch in range(len(self)):
            first, last = (start + (end - start) * b // len(self) for b in (batch, batch + 1))
            yield [(0, index) for index in range(first, last)]


def _check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of {world_size}: ranks run from 0 to world_size - 1")
