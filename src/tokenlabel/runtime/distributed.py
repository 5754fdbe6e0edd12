"""The processes that torchrun started: their ranks, and how they exchange values."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tokenlabel.runtime.coercion import coerced
from tokenlabel.runtime.errors import FirstRankError
from tokenlabel.runtime.process import T, environment_number, keep_freed_memory

Precision = Literal["fp32", "bf16", "fp16"]

# Before ranks exchange objects, each has done a share of its own (labelled, evaluated, checked images), which may take
# the slowest very long. In a training step they run in lockstep: one that is late by STEP_PATIENCE hangs, so all end.
PATIENCE = timedelta(days=7)
STEP_PATIENCE = timedelta(minutes=30)


@dataclass(frozen=True, slots=True)
class Ranks:
    """The processes of a job; `rank` is this one's number, `local_rank` that among those of its machine.

    `patient`: the group in which they exchange objects and wait for each other for days; the default one if None.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    patient: dist.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    def broadcast(self, value: T) -> T:
        """Return the first rank's value on every rank; it must pickle."""
        if self.world_size == 1:
            return value
        values = [value]  # of the other ranks, replaced in place
        dist.broadcast_object_list(values, src=0, group=self.patient)
        return values[0]

    def on_main(self, action: Callable[[], T]) -> T:
        """Call a function on the first rank only; return its result on every rank, which must pickle.

        If it raises, all ranks raise: the first one its error, the others FirstRankError with its message.
        """
        if self.world_size == 1:
            return action()
        result, error = None, None
        if self.is_first:
            try:
                result = action()
            except Exception as raised:  # whatever it is: the others must not wait for ever
                error = raised
        result, message = self.broadcast((result, str(error) if error else None))
        if error is not None:
            raise error
        if message is not None:
            raise FirstRankError(message)
        return result  # type: ignore[return-value]

    def share_buffers(self, model: nn.Module) -> None:
        """Copy the buffers of a model, such as BatchNorm's means, from the first rank to all."""
        if self.world_size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    def all_gather(self, value: T) -> list[T]:
        """Return the values of all ranks, in order, on every rank; they must pickle."""
        if self.world_size == 1:
            return [value]
        values: list[T] = [value] * self.world_size
        dist.all_gather_object(values, value, group=self.patient)
        return values

    def all_reduce_max(self, number: int) -> int:
        """Return the highest of the ranks' numbers on every rank; cheap enough for every step."""
        if self.world_size == 1:
            return number
        tensor = torch.tensor(number)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)


def launched_ranks() -> Ranks:
    """Return the ranks by torchrun's environment variables; a single rank without torchrun."""
    rank, world_size, local_rank = map(environment_number, ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    return Ranks(rank, world_size, local_rank)


_joined = Ranks()


def current_ranks() -> Ranks:
    """Return the ranks that this process has joined; a single one outside of `joined_ranks`."""
    return _joined


@contextmanager
def joined_ranks(device: torch.device | None = None) -> Iterator[Ranks]:
    """Join the ranks that torchrun started, and leave them afterwards.

    They can send messages between CPUs, and between GPUs if this rank's `device` is one.
    """
    global _joined
    ranks = launched_ranks()
    # A single rank of torchrun joins, too: FSDP needs a group of processes, be it of one.
    if ranks.world_size == 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
        yield ranks
        return
    if device is not None and device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=STEP_PATIENCE)
    else:
        dist.init_process_group("gloo", timeout=STEP_PATIENCE)
    _joined = replace(ranks, patient=dist.new_group(backend="gloo", timeout=PATIENCE))
    try:
        yield _joined
    finally:
        _joined = Ranks()
        dist.destroy_process_group()


def usable_device(device: torch.device | str | None, *, option: str = "device") -> torch.device:
    """Return a device that computes here; "auto" and None take a GPU if there is one. "cuda" is this rank's own.

    Where that is the CPU, this process keeps the memory that it frees (`keep_freed_memory`). `option`: what the error
    calls it. Raises ValueError of one line for what is none.
    """
    if device in (None, "auto"):
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if str(device) == "cuda" and torch.cuda.is_available():
        is_launched, local_rank = "LOCAL_RANK" in os.environ, launched_ranks().local_rank
        number = local_rank % torch.cuda.device_count() if is_launched else torch.cuda.current_device()
        found = torch.device("cuda", number)
    else:
        found = _named_device(device, option)
    if found.type == "cpu":
        keep_freed_memory()
    return found


def autocast(device: torch.device, precision: Precision | str) -> torch.autocast:
    """Return the context of a forward pass: fp32 is plain arithmetic. Raises ValueError for another precision."""
    dtypes = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = dtypes[coerced(precision, Precision, name="precision")]
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def _named_device(device: torch.device | str, option: str) -> torch.device:
    try:
        found = torch.device(device)
        torch.empty(0, device=found).cpu()  # a name alone says nothing: `cuda:7` parses anywhere
    except (AssertionError, RuntimeError, TypeError) as error:  # by name; without CUDA; `meta`; numbers of no device
        reason = str(error).splitlines()[0].partition(". ")[0]
        if "device type at start" in reason or "Invalid device" in reason:
            reason = "no such device"
        raise ValueError(f"{option} {device}: expected cpu, cuda, cuda:1, ... or auto; {reason}") from error
    return found


def shard(model: nn.Module, parts: Iterable[nn.Module], device: torch.device) -> None:
    """Shard a model's weights over all ranks (FSDP2); each part is gathered only while it computes.

    What belongs to none of the parts stays gathered from the forward to the end of the backward pass, since losses
    may call a head of the model after its forward pass.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()  # FSDP2 takes no other layout
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for part in parts:
        fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
