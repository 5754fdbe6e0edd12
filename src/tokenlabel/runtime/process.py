"""What any process does beside its work: how it ends, lines for people, signals, whole files, locks, threads, memory.

No torch, so that every command may ask at once.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import io
import json
import os
import platform
import re
import select
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, TextIO, TypeVar

from safetensors import SafetensorError
from tqdm import tqdm

from tokenlabel.runtime.errors import DataError, FirstRankError, first_line
from tokenlabel.runtime.urls import without_secrets

S = TypeVar("S")
T = TypeVar("T")


def environment_number(name: str) -> int:
    """Return a number that torchrun sets (RANK, WORLD_SIZE, LOCAL_RANK); that of a single process without it."""
    return int(os.environ.get(name, 1 if name == "WORLD_SIZE" else 0))


def is_main_process() -> bool:
    """Return True in the process that prints and writes for all (rank 0)."""
    return environment_number("RANK") == 0


def say(line: str) -> None:
    """Print one line to stderr, from the main process of a job only; progress bars stay whole."""
    if is_main_process():
        tqdm.write(printable(line), file=sys.stderr)


def printable(text: str) -> str:
    """Return a line without control characters, which a terminal would obey, and without secrets in URLs.

    Names of files may hold any of the former, and logs are read by others.
    """
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", "?", without_secrets(text)).encode("utf-8", "backslashreplace").decode()


def listed(names: Sequence[str], most: int = 3) -> str:
    """Return the first names, and ", ..." if there are more: `a, b, c, ...`; those with a comma in them in quotes."""
    return ", ".join(map(quoted, names[:most])) + (", ..." if len(names) > most else "")


def quoted(name: str) -> str:
    """Return a name as it is, but in quotes where it has a comma in it that would look like the end of the name."""
    return name if ", " not in name or name[0] in "'\"" else f'"{name}"'


class Interrupted(Exception):  # noqa: N818  (not an error: somebody asked the run to stop)
    """The run was asked to stop, has saved its state, and will continue when started again."""

    def __init__(self, step: int, signal_number: int) -> None:
        super().__init__(f"stopped after step {step:,}; the same command continues from there")
        self.exit_status = 128 + signal_number


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Yield a list that collects SIGINT and SIGTERM, so that no step is interrupted; a second one raises at once.

    In another thread than the main one, which alone may catch signals, nothing is collected.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def _remember(number: int, _: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, _remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


USAGE_ERROR = 2

# What to do about errors of PyTorch and NumPy that the code is not to blame for, by what they say.
_REMEDIES = {
    "maximum recursion depth exceeded while decoding a JSON": "a JSON file is nested too deeply",
    "out of memory|can't allocate memory|not enough memory|Unable to allocate": (
        "not enough memory; take fewer images at a time (--batch-size, in training --micro-batch-size), smaller "
        "ones, or less of what else was asked for"
    ),
    r"DataLoader worker .*(killed|exited)": (
        "a process that reads images was killed, most often since memory ran out; take fewer by --num-workers (in "
        "training --data.num-workers)"
    ),
}


def with_open_streams(run: Callable[[], int]) -> int:
    """Return the exit status of a command whose output may go to a pipe, such as `tokenlabel inspect labels | head`."""
    try:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # names of files need not be UTF-8, nor need the terminal
                stream.reconfigure(errors="backslashreplace")
        try:
            return run()
        finally:
            sys.stdout.flush()  # here, where it can be handled, not when the interpreter ends
    except OSError as error:
        is_of_streams = isinstance(error, BrokenPipeError) or error.errno in (errno.ENOSPC, errno.EIO)
        if not is_of_streams or error.filename or os.environ.get("TOKENLABEL_TRACEBACK"):
            raise
        unread = [stream for stream in (sys.stdout, sys.stderr) if _nobody_reads(stream)]
        for stream in unread or [sys.stdout]:  # nothing is left to say: not by the interpreter either
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if not unread:  # a full disk, for one; else it is no error
            print(f"tokenlabel: error: the output cannot be written ({error.strerror or error})", file=sys.stderr)
        return 128 + signal.SIGPIPE if unread else USAGE_ERROR


def run_command(command: str, run: Callable[[list[str]], int], arguments: list[str]) -> int:
    """Run a function on its arguments; return the exit status, after one line of what stopped it."""
    try:
        return run(arguments)
    except Interrupted as stop:
        print(f"{command}: {stop}", file=sys.stderr)
        return stop.exit_status
    except KeyboardInterrupt:
        print(f"\n{command}: stopped; the same command continues", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        message = _own_message(error)
        if isinstance(error, BrokenPipeError) or not message or os.environ.get("TOKENLABEL_TRACEBACK"):
            raise
        if not isinstance(error, FirstRankError) or environment_number("LOCAL_RANK") == 0:  # once a machine
            print(f"{command}: error: {printable(message)}", file=sys.stderr)
        return USAGE_ERROR


def _own_message(error: Exception) -> str:
    """Return the message of an error, "" for one that the code is to blame for.

    One from a data worker comes with the worker's traceback before it.
    """
    if not isinstance(error, (ValueError, OSError)):
        remedies = (remedy for pattern, remedy in _REMEDIES.items() if re.search(pattern, str(error)))
        return next((f"{remedy} ({first_line(error)})" for remedy in remedies), "")
    if isinstance(error, OSError) and isinstance(error.filename, str) and error.strerror:
        return f"{error.filename}: {error.strerror}"  # without its number
    message = str(error).rstrip()
    if message.startswith("Caught ") and "Traceback" in message:
        return message.splitlines()[-1].partition(": ")[2]
    return message


def _nobody_reads(stream: TextIO) -> bool:
    """Return True if a stream is a pipe whose reader has closed it."""
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


UNFINISHED = ".*.tmp"
"""The pattern of names of files that are being written, or were when their process was killed."""
ABANDONED_S = 600.0
"""An unfinished file that was not written to for so many seconds belongs to a killed process."""

_WRITE_BYTES = 1 << 20
_STRETCH = 256  # items a task: scheduling them one by one takes longer than the function does
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>


def write_whole(path: Path, content: str | Iterable[bytes]) -> None:
    """Write a file, text (UTF-8) or bytes part by part, in place of what it held; its folder is made.

    It appears under its name only when all of it is on the disk. What is no file, such as /dev/null or a pipe, is
    written into, not replaced.
    """
    parts = [content.encode()] if isinstance(content, str) else content
    if _is_stream(path):
        with path.open("wb") as file:
            file.writelines(parts)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # Random rather than the process id, which threads share, and which may be the same on another machine.
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")
    try:
        with temporary.open("wb", buffering=_WRITE_BYTES) as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        error.filename = str(path)  # not the temporary one, and of a full disk Python names none
        raise
    finally:
        temporary.unlink(missing_ok=True)
    # The new name itself survives a power cut only once the folder is on the disk, too.
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def why_unwritable(path: Path) -> str | None:
    """Return why no file can be made at a path, or in a folder; None if one can, as far as permissions tell."""
    # A file is replaced by another, so it is its folder that counts.
    folder = path if path.is_dir() else next(folder for folder in path.absolute().parents if folder.exists())
    if not folder.is_dir():
        return f"{folder} is a file"
    return None if os.access(folder, os.W_OK) else f"nothing can be made in {folder}"


def is_replaced(path: Path, beginning: bytes) -> bool:
    """Return True if `write_whole` may write there: there is no file, an empty one, or one with a known beginning.

    `beginning`: a regular expression for up to 256 bytes. Raises OSError for a folder, and what cannot be read.
    """
    if _is_stream(path):
        return True
    try:
        with path.open("rb") as file:
            start = file.read(256)  # no more: it may be gigabytes of weights
    except (FileNotFoundError, NotADirectoryError):
        return True
    return not start or re.match(beginning, start, re.DOTALL) is not None


def _is_stream(path: Path) -> bool:
    """Return True for what is written into, not replaced: devices and pipes."""
    return path.parent in (Path("/dev"), Path("/dev/fd")) or (path.exists() and not (path.is_file() or path.is_dir()))


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let errors of a block that writes name `path`: of a full disk Python names no file, or that it copies from."""
    try:
        yield
    except SafetensorError as error:  # its own for every failure to write
        raise OSError(errno.EIO, first_line(error), str(path)) from error
    except OSError as error:
        if error.filename is None or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            error.filename, error.filename2 = str(path), None
        raise


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lock a folder, or a file that is made if it is not there: of several processes one at a time."""
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with suppress(OSError):  # some network file systems have no locks: two processes may then do the same work
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def read_json(path: Path) -> Any:
    """Return what a JSON file holds. Raises DataError that names the file."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{path}: cannot be read as JSON ({reason})") from error


def ahead(pool: ThreadPoolExecutor, function: Callable[[S], T], items: Iterable[S], depth: int) -> Iterator[T]:
    """Yield the results of a function for each item, in order; compute up to `depth` of them in the background."""
    waiting: deque[Future[T]] = deque()
    # Finished results are yielded before more work is submitted, so that few wait in memory.
    for item in items:
        waiting.append(pool.submit(function, item))
        while waiting and (len(waiting) >= depth or waiting[0].done()):
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


@contextmanager
def thread_pool(num_workers: int) -> Iterator[ThreadPoolExecutor]:
    """Yield a thread pool that cancels what it has not started on exit."""
    pool = ThreadPoolExecutor(max(1, num_workers))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def in_threads(function: Callable[[S], T], items: Sequence[S], num_threads: int) -> list[T]:
    """Return the results of a function for each item, computed by several threads."""
    stretches = [items[i : i + _STRETCH] for i in range(0, len(items), _STRETCH)]
    with ThreadPoolExecutor(num_threads) as pool:
        found = pool.map(lambda stretch: [function(item) for item in stretch], stretches)
        return [one for of_stretch in found for one in of_stretch]


@cache
def keep_freed_memory() -> bool:
    """Let glibc's allocator keep freed memory for the next tensors; return False for another allocator.

    The process stays as large as it was at its largest.
    """
    # By default glibc returns blocks of more than 32 MiB to the kernel as soon as they are freed. The activations of a
    # batch are such blocks, so a network on a CPU would wait for new, zeroed pages at every layer.
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # Not `all`: a threshold that an older glibc refuses must not keep the other from being set.
    return mallopt(_M_MMAP_THRESHOLD, 1 << 30) + mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1) == 2
