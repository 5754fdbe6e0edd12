"""Whole files from behind URLs, in a cache of limited size that any number of processes share.

TOKENLABEL_CACHE is the folder of the cache, by default ~/.cache/tokenlabel; TOKENLABEL_CACHE_SIZE its size, such as
500GB, by default 100GB. No torch.

    files/     copies of files, named by a digest of their URL, size and version
    folders/   copies of whole folders; a process that uses one holds a shared lock on it
    indexes/   what was found in folders and tar files
    locks/     lock files

Names that begin with a dot belong to downloads in progress, and to folders that are being removed: a reservation's name
ends in the bytes that it reserves.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from tokenlabel.runtime.errors import RemoteError
from tokenlabel.runtime.process import ABANDONED_S, locked, say
from tokenlabel.runtime.remote import (
    RemoteFile,
    digest_of,
    download,
    filesystem_of,
    folder_urls,
    patiently,
    remote_files,
)
from tokenlabel.runtime.urls import as_url, last_part

NUM_AHEAD = 3
"""Files to download while others are read."""

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def fetch(file: RemoteFile, check: Callable[[Path], None] = lambda path: None) -> Path:
    """Return the copy of a file in the cache; download it if it is not there, in place of the least recently used.

    A download that breaks off is tried three times in all. `check` is called with a new copy before other processes
    see it. Processes that want the same file wait for the first of them. Raises RemoteError that names the file.
    """
    path = _folder("files") / file.cached_as
    if _is_there(path, file):  # without a lock: names are of versions, and files appear whole
        return path
    with exclusive(f"{path.name[:2]}.lock"):  # one of 256: a lock a file would leave as many lock files behind
        if not _is_there(path, file):
            with _room(file.num_bytes, file.url) as moved:
                download(file, path, moved, check)
    return path


def local_copy(name: str | Path) -> Path:
    """Return a path unchanged; for the URL of a file or a folder, the path of a whole copy in the cache.

    It is downloaded once for each version of the files, and kept at least as long as this process runs.
    """
    url = as_url(name)
    if url is None:
        return Path(name)
    filesystem, path = filesystem_of(url)
    single = not patiently(url, lambda _: filesystem.isdir(path))
    files = remote_files([url] if single else folder_urls(url))
    if single:
        return fetch(files[0])
    target = _folder("folders") / f"{digest_of(files)}-{last_part(url)}"
    with exclusive("folders.lock"):
        if not _hold(target):
            num_bytes = sum(file.num_bytes for file in files)
            say(f"{url}: fetching {len(files):,} files, {_size(num_bytes)}")
            unfinished = target.with_name(f".{target.name}")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(exist_ok=True)
            base = filesystem.unstrip_protocol(path).rstrip("/") + "/"
            with _room(num_bytes, url, unfinished) as moved, ThreadPoolExecutor(NUM_AHEAD) as pool:
                list(pool.map(lambda f: download(f, unfinished / f.url.removeprefix(base), moved), files))
            unfinished.replace(target)
            _hold(target)
    return target


@contextmanager
def fetched_ahead(wanted: Iterable[tuple[int, RemoteFile]], reached: Callable[[], int]) -> Iterator[None]:
    """Download files in the background, in the order in which they are needed, NUM_AHEAD of them ahead of the reader.

    `wanted`: the number of the batch that needs a file first, and the file. `reached` returns the number of the current
    batch. Errors are ignored here: the reader tries again, and raises them.
    """
    stop, order, waiting = threading.Event(), threading.Lock(), list[int]()
    todo = iter(wanted)

    def _work() -> None:
        while True:
            with order:
                when, file = next(todo, (0, None))
                while file is not None and len(waiting) >= NUM_AHEAD and not stop.is_set():
                    now = reached()
                    waiting[:] = [other for other in waiting if other > now]
                    stop.wait(0.05)
                if file is None or stop.is_set():
                    return
                waiting.append(when)
            with suppress(RemoteError):
                fetch(file)

    for _ in range(NUM_AHEAD):  # daemons, so that no server keeps a process from ending
        threading.Thread(target=_work, daemon=True).start()
    try:
        yield
    finally:
        stop.set()


def cache_bytes() -> int:
    """Return the size of the cache in bytes. Raises RemoteError if TOKENLABEL_CACHE_SIZE is no size."""
    text = os.environ.get("TOKENLABEL_CACHE_SIZE") or "100GB"
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?B?)", text.strip().upper())
    unit = found and (found[2] if found[2] in _UNITS else f"{found[2]}B")
    if found is None or unit not in _UNITS:
        raise RemoteError(f"TOKENLABEL_CACHE_SIZE={text}: expected a size such as 500GB")
    return int(float(found[1]) * _UNITS[unit])


def refuse_small_cache(files: Sequence[RemoteFile], *, at_once: int | None, remedy: str) -> None:
    """Raise RemoteError where the cache holds neither all files nor, of the largest, as many as are read at once."""
    total, room = sum(file.num_bytes for file in files), cache_bytes()
    needed = (at_once or len(files)) * max(file.num_bytes for file in files)
    if min(total, needed) > room:
        raise RemoteError(
            f"{len(files):,} files of {_size(total)} from {files[0].url} on, {_size(min(total, needed))} of them at "
            f"once, and the cache may hold {_size(room)}; {remedy}TOKENLABEL_CACHE_SIZE=500GB lets it hold more"
        )


def cached_index(digest: str, *, make: bool = True) -> Path:
    """Return where the cache keeps what was found in files or folders of a digest."""
    return _folder("indexes", make=make) / f"{digest}.npz"


def exclusive(name: str) -> AbstractContextManager[None]:
    """Hold a lock that one of the processes that share the cache has at a time."""
    return locked(_folder("locks") / name)


def _is_there(path: Path, file: RemoteFile) -> bool:
    """Return True if the cache has a file, and mark it as used now."""
    try:
        status = path.stat()
        if status.st_size != file.num_bytes:  # a disk that lost it
            return False
        # Set here, since many disks are mounted so that reading does not (noatime).
        os.utime(path, ns=(time.time_ns(), status.st_mtime_ns))
    except OSError:
        return False
    return True


@contextmanager
def _room(num_bytes: int, url: str, unfinished: Path | None = None) -> Iterator[Callable[[], None]]:
    """Reserve bytes in the cache, in place of the least recently used; yield a function to call at each progress.

    `unfinished`: the folder in the cache that the files are written to. Raises RemoteError if they never fit.
    """
    # Other processes count this file's name as bytes in use; modification times tell them that we are alive.
    reservation = _folder("files") / f".{os.urandom(4).hex()}-{num_bytes}.tmp"
    with exclusive("room.lock"):
        _make_room(num_bytes, url)
        reservation.touch()

    def _moved() -> None:
        os.utime(reservation)  # raises once it is gone, which ends an attempt that was given up
        if unfinished is not None:
            os.utime(unfinished)

    try:
        yield _moved
    finally:
        reservation.unlink(missing_ok=True)


def _make_room(num_bytes: int, url: str) -> None:
    """Remove the least recently used until so many bytes fit. The caller holds `room.lock`."""
    room = cache_bytes() - num_bytes
    if room < 0:
        raise RemoteError(
            f"{url}: {_size(num_bytes)}, and the cache may hold {_size(cache_bytes())}; "
            "TOKENLABEL_CACHE_SIZE=500GB lets it hold more"
        )
    found = list[tuple[int, int, Path]]()
    for path in [path for name in ("files", "folders", "indexes") for path in _folder(name).iterdir()]:
        with suppress(OSError):  # gone meanwhile
            if path.name.startswith("."):
                room -= _reserved_bytes(path)
            else:
                parts = path.rglob("*") if path.is_dir() else [path]
                found.append((path.stat().st_atime_ns, sum(part.stat().st_size for part in parts), path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total > room and (path.is_file() or _let_go(path)):
            _remove(path)
            total -= size


def _reserved_bytes(path: Path) -> int:
    """Return the bytes that a download in progress has reserved; remove one that was abandoned."""
    if time.time() - path.stat().st_mtime > ABANDONED_S:
        _remove(path)
        return 0
    return int(path.stem.rpartition("-")[2]) if path.suffix == ".tmp" else 0


def _remove(path: Path) -> None:
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    # Its name goes at once: what a process that is killed here leaves must not look like a whole folder.
    gone = path.with_name(f".{os.urandom(4).hex()}.gone")
    with suppress(OSError):  # another user's, of a cache that they share
        path.replace(gone)
        shutil.rmtree(gone, ignore_errors=True)


_held: dict[Path, int] = {}


def _hold(folder: Path) -> bool:
    """Keep a folder in the cache as long as this process runs, by a shared lock; return False if it is not there."""
    with exclusive("room.lock"):
        if not folder.is_dir():
            return False
        if folder not in _held:
            _held[folder] = os.open(folder, os.O_RDONLY)
            with suppress(OSError):  # some network file systems cannot
                fcntl.flock(_held[folder], fcntl.LOCK_SH)
        os.utime(folder)
    return True


def _let_go(folder: Path) -> bool:
    """Return True if no process holds a folder of the cache."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _folder(name: str, *, make: bool = True) -> Path:
    """Return a folder of the cache, which is made unless that is for later."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("TOKENLABEL_CACHE") or Path(base) / "tokenlabel") / name
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RemoteError(
            f"{folder}: the cache cannot be made ({error.strerror}); TOKENLABEL_CACHE names another place"
        ) from error
    return folder


def _size(num_bytes: int) -> str:
    unit = next(name for name in ("TB", "GB", "MB", "KB", "") if num_bytes >= _UNITS[name] or not name)
    return f"{num_bytes / _UNITS[unit]:.3g} {unit or 'bytes'}"
