"""Data worker processes: how they start, which signals they handle, and when they end.

Ctrl-C, `timeout` and Slurm signal the whole process group, workers included. Workers ignore it: the main process needs
them until it has saved its state, and then ends them itself.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from tokenlabel.runtime.process import say


def process_context() -> Any:
    """Return the multiprocessing context of data workers: "forkserver", or "spawn" where there is none.

    Forking a process with threads or CUDA may deadlock, so workers are forked from a clean server process.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # The server imports these once, not every worker; the second one is there for what it does when imported.
    context.set_forkserver_preload(["tokenlabel.data.batches", "tokenlabel.data.worker_server"])
    return context


@cache
def say_crowded(num_workers: int) -> None:
    """Print, once, that there are more workers than cores."""
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if num_workers > num_cores:
        say(
            f"{num_workers} processes are to read images on {num_cores} core{'s' * (num_cores > 1)}: more than cores "
            "seldom help (--data.num-workers, --num-workers)"
        )


class Slabs:
    """Shared memory that a worker reuses for its batches, since new pages cost more than the copy.

    `count` batches in turn share it: a batch must be copied out before the `count`-th after it is written. A DataLoader
    has at most `prefetch_factor` batches of a worker in flight, so one more than that is enough.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._slabs: list[Tensor] = []
        self._turn = 0

    def stack(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return tensors of one shape as one in shared memory, which stays as it is for `count` - 1 more."""
        shape = (len(tensors), *tensors[0].shape)
        if not self._slabs or shape[1:] != self._slabs[0].shape[1:] or shape[0] > self._slabs[0].shape[0]:
            self._slabs = [tensors[0].new_empty(shape).share_memory_() for _ in range(self._count)]
        self._turn = (self._turn + 1) % self._count
        return torch.stack(tuple(tensors), out=self._slabs[self._turn][: len(tensors)])


_slabs: Slabs | None = None


def stack_shared(tensors: Sequence[Tensor]) -> Tensor:
    """Return tensors of one shape as one, in a worker: in memory that is shared with the main process."""
    # A loader that somebody else made has workers without slabs.
    return default_collate(list(tensors)) if _slabs is None else _slabs.stack(tensors)


def prepare_worker(worker: int, *, prefetch: int) -> None:
    """Ignore SIGINT, and SIGTERM unless the main process sends it; exit when the main process dies.

    `prefetch`: the number of batches of this worker in flight.
    """
    global _slabs
    _slabs = Slabs(prefetch + 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS, where there is no telling who sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_told, daemon=True).start()
    threading.Thread(target=_die_with_main_process, daemon=True).start()


def _end_when_told() -> None:
    main_process = multiprocessing.parent_process()
    assert main_process is not None
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main_process.pid:
        pass
    os._exit(128 + signal.SIGTERM)


def _die_with_main_process() -> None:
    """Wait for the end of the main process. PyTorch's own watch sees only the server, which outlives it."""
    main_process = multiprocessing.parent_process()
    assert main_process is not None
    main_process.join()
    os._exit(1)
