"""What any process does beside its work: lines for people, signals, whole files, locks, threads, memory.

No torch, so that every command may ask at once.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import platform
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from tokenlabel.runtime.errors import DataError


def environment_number(name: str) -> int:
    """Return a number that torchrun sets (RANK, WORLD_SIZE, LOCAL_RANK); that of a single process without it."""
    return int(os.environ.get(name, 1 if name == "WORLD_SIZE" else 0))


def is_main_process() -> bool:
    """Say whether this process speaks and writes for all."""
    return environment_number("RANK") == 0


def say(line: str) -> None:
    """Print one line to stderr, from the main process of a job only; progress bars stay whole."""
    if is_main_process():
        tqdm.write(line, file=sys.stderr)


def listed(names: list[str], most: int = 3) -> str:
    """Return the first names, and ", ..." only where there are more: `a, b, c` of three, `a, b, c, ...` of four."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


class Interrupted(Exception):  # noqa: N818  (not an error: somebody asked the run to stop)
    """The run was asked to stop, has saved its state, and will continue when started again."""

    def __init__(self, step: int, signal_number: int) -> None:
        super().__init__(f"stopped after step {step:,}; the same command continues from there")
        self.exit_status = 128 + signal_number


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list, so that a step is never cut in two; a second one ends at once."""
    received: list[int] = []

    def remember(number: int, _: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


UNFINISHED = ".*.tmp"
"""What files that are being written, or were when their process was killed, are called."""
ABANDONED_S = 600.0
"""An unfinished file that nobody has written to for so long is a killed process's."""

_WRITE_BYTES = 1 << 20
_STRETCH = 256  # items that a thread takes at a time: handing them out one by one takes longer than some take
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>


def write_whole(path: Path, content: str | Iterable[bytes]) -> None:
    """Write a file, text (UTF-8) or bytes part by part, in place of what it held; its folder is made.

    It appears under its name only when all of it is on the disk.
    """
    parts = [content.encode()] if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    # No process number: processes of two machines may have the same, and threads do.
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")
    try:
        with temporary.open("wb", buffering=_WRITE_BYTES) as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    # The name is on the disk only when its folder is, too.
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lock a folder, or a file that is made if it is not there: of several processes one at a time."""
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with suppress(OSError):  # some network file systems cannot: then two may do the same
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def read_json(path: Path) -> Any:
    """Return what a JSON file holds. Raises DataError that names the file."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{path}: cannot be read as JSON ({reason})") from error


S = TypeVar("S")
T = TypeVar("T")


def ahead(pool: ThreadPoolExecutor, function: Callable[[S], T], items: Iterable[S], depth: int) -> Iterator[T]:
    """Yield the function of each item in order, working on up to `depth` of them in the background."""
    waiting: deque[Future[T]] = deque()
    # What is done is given out before more is begun, so that few results wait in memory.
    for item in items:
        waiting.append(pool.submit(function, item))
        while waiting and (len(waiting) >= depth or waiting[0].done()):
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


@contextmanager
def thread_pool(num_workers: int) -> Iterator[ThreadPoolExecutor]:
    """Return a pool of threads that drops what it has not begun when it is left."""
    pool = ThreadPoolExecutor(max(1, num_workers))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def in_threads(function: Callable[[S], T], items: Sequence[S], num_threads: int) -> list[T]:
    """Return the function of each item, computed by several threads that take a stretch of items at a time."""
    stretches = [items[i : i + _STRETCH] for i in range(0, len(items), _STRETCH)]
    with ThreadPoolExecutor(num_threads) as pool:
        found = pool.map(lambda stretch: [function(item) for item in stretch], stretches)
        return [one for of_stretch in found for one in of_stretch]


@cache
def keep_freed_memory() -> bool:
    """Let the allocator keep what is freed for the next tensors, where that is glibc's; return whether it does.

    By default glibc gives blocks of more than 32 MiB back to the kernel as soon as they are free. The activations of a
    batch are such blocks, so a network on a CPU waits for new pages, filled with zeros, at every layer. The process
    stays as large as it was at its largest. An allocator put in glibc's place (LD_PRELOAD) goes its own way.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # Not `all`: a threshold that an older glibc refuses must not keep the other from being set.
    return mallopt(_M_MMAP_THRESHOLD, 1 << 30) + mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1) == 2
