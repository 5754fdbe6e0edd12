"""Files behind URLs (s3://, gs://, https://, hf://), through fsspec: whole ones, in a cache of a stated size.

TOKENLABEL_CACHE names the folder of the cache, by default ~/.cache/tokenlabel; TOKENLABEL_CACHE_SIZE what it may
hold, such as 500GB, by default 100GB; TOKENLABEL_TIMEOUT the seconds for which a server may say nothing, by default
30. Credentials and endpoints are those of the libraries: AWS_PROFILE, HF_TOKEN, FSSPEC_S3_ENDPOINT_URL, ... No torch.
"""

from __future__ import annotations

import fcntl
import math
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

from tokenlabel.runtime.errors import RemoteError, first_line
from tokenlabel.runtime.process import say

T = TypeVar("T")

NUM_AHEAD = 3
"""Files that are fetched while others are read."""

_NUM_TRIES = 3
_NUM_THREADS = 16  # that ask for the sizes of files
_ABANDONED_S = 600.0  # an unfinished file that nobody has written to for so long is a killed process's
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
# What file systems call the version of a file, the surest first.
_VERSIONS = (
    "ETag",
    "etag",
    "crc32c",
    "md5Hash",
    "blob_id",
    "LastModified",
    "Last-Modified",
    "mtime",
    "updated",
)
_CREDENTIALS = {
    "s3": "AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, name them; FSSPEC_S3_ANON=true needs none",
    "gs": "`gcloud auth application-default login` makes them; FSSPEC_GS_TOKEN=anon needs none",
    "hf": "`hf auth login` or HF_TOKEN name them",
}


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file behind a URL as it was found: `version` is what its server tells versions apart by, "" if by nothing."""

    url: str
    num_bytes: int
    version: str

    @property
    def cached_as(self) -> str:
        """The name of its copy in the cache, another one for another version."""
        name = self.url.partition("?")[0].rstrip("/").rpartition("/")[2]
        return f"{digest_of([self])}-{name[-100:]}"


def as_url(name: str | Path) -> str | None:
    """Return the URL that a name is, None for a path; a URL that went through `Path` gets its second slash back."""
    found = re.fullmatch(r"([a-zA-Z][a-zA-Z0-9+.-]+):(//?)([^/].*)", os.fspath(name), re.DOTALL)
    if found is None or (found[2] == "/" and not isinstance(name, Path)):
        return None
    if found[1] == "hf-dataset":  # of a folder: see data/hf_datasets.py
        return None
    return f"{found[1].lower()}://{found[3]}"


def expanded(name: str) -> list[str]:
    """Return the names that braces stand for: train-{000..127}.tar, {a,b}.tar. Raises RemoteError for no range."""
    found = re.search(r"\{([^{}]*)\}", name)
    if found is None:
        return [name]
    words = found[1].split(",")
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", found[1]):
        first, last = map(int, numbers.groups())
        if first > last or len(numbers[1]) > len(numbers[2]):
            raise RemoteError(f"{name}: {found[0]} is no range; expected one such as {{000..127}}")
        words = [f"{number:0{len(numbers[1])}}" for number in range(first, last + 1)]
    return [full for word in words for full in expanded(name[: found.start()] + word + name[found.end() :])]


def remote_files(urls: Sequence[str]) -> list[RemoteFile]:
    """Ask for the size and the version of files, many at a time. Raises RemoteError that names one of them."""
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        return list(pool.map(_described, urls))


def folder_urls(url: str, *, maxdepth: int | None = None) -> list[str]:
    """Return the URLs of all files in a folder, at any depth, or of those that a pattern with `*` stands for, sorted.

    Raises RemoteError where there are none, and for servers that list nothing.
    """
    filesystem, path = _filesystem(url)
    find = filesystem.glob if "*" in path else filesystem.find
    names = _patiently(url, lambda _: find(path, maxdepth=maxdepth))
    if not names:
        raise RemoteError(f"{url}: no such files; or its server does not list folders, then name the files")
    return sorted(filesystem.unstrip_protocol(name) for name in names)


def fetch(file: RemoteFile, check: Callable[[Path], None] = lambda path: None) -> Path:
    """Return the copy of a file in the cache, which is made if it is not there; the least recently used ones go for it.

    A file that breaks off is tried again, three times in all. `check`: is called with a new copy before it counts.
    Processes that want the same file wait for the first of them. Raises RemoteError that names the file.
    """
    path = _folder("files") / file.cached_as
    if _is_there(path, file):
        return path
    with exclusive(f"{path.name[:2]}.lock"):  # one of 256
        if not _is_there(path, file):
            with _room(file.num_bytes, file.url) as moved:
                _download(file, path, moved, check)
    return path


def local_copy(name: str | Path) -> Path:
    """Return a path as it is; of the URL of a file or a folder, a copy of all of it in the cache, checked by size.

    It is made once for each version of the files, is whole or not there, and stays while this process runs.
    """
    url = as_url(name)
    if url is None:
        return Path(name)
    filesystem, path = _filesystem(url)
    single = not _patiently(url, lambda _: filesystem.isdir(path))
    files = remote_files([url] if single else folder_urls(url))
    if single:
        return fetch(files[0])
    target = _folder("folders") / f"{digest_of(files)}-{url.rstrip('/').rpartition('/')[2]}"
    with exclusive("folders.lock"):
        if not _hold(target):
            num_bytes = sum(file.num_bytes for file in files)
            say(f"{url}: fetching {len(files):,} files, {_size(num_bytes)}")
            unfinished = target.with_name(f".{target.name}")
            shutil.rmtree(unfinished, ignore_errors=True)
            base = filesystem.unstrip_protocol(path).rstrip("/") + "/"
            with _room(num_bytes, url) as moved, ThreadPoolExecutor(NUM_AHEAD) as pool:
                list(pool.map(lambda f: _download(f, unfinished / f.url.removeprefix(base), moved), files))
            unfinished.replace(target)
            _hold(target)
    return target


@contextmanager
def fetched_ahead(wanted: Iterable[tuple[int, RemoteFile]], reached: Callable[[], int]) -> Iterator[None]:
    """Fetch files in the background, in the order in which they are wanted, a few ahead of who reads them.

    `wanted`: when a file is wanted first (a number of a batch, say), and which. `reached`: that number, now. A file
    that cannot be had is left to its reader, who names it.
    """
    stop, order, waiting = threading.Event(), threading.Lock(), list[int]()
    todo = iter(wanted)

    def work() -> None:
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
        threading.Thread(target=work, daemon=True).start()
    try:
        yield
    finally:
        stop.set()


def cache_bytes() -> int:
    """Return how much the cache may hold. Raises RemoteError for a size that is none."""
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


def digest_of(files: Iterable[RemoteFile]) -> str:
    """Return what identifies files in these versions, in 16 letters."""
    text = "\n".join(f"{file.url}\t{file.num_bytes}\t{file.version}" for file in files)
    return blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()


def cached_index(digest: str, *, make: bool = True) -> Path:
    """Return where the cache keeps what was found in files or folders of a digest."""
    return _folder("indexes", make=make) / f"{digest}.npz"


def _described(url: str) -> RemoteFile:
    filesystem, path = _filesystem(url)
    info = _patiently(url, lambda _: filesystem.info(path))
    if info.get("type") == "directory":
        raise RemoteError(f"{url}: is a folder; expected a file")
    if info.get("size") is None:
        raise RemoteError(f"{url}: its server does not say how large it is, so a copy cannot be checked")
    version = next((str(info[name]) for name in _VERSIONS if info.get(name)), "")
    return RemoteFile(url, int(info["size"]), version)


def _filesystem(url: str) -> tuple[Any, str]:
    """Return fsspec's file system of a URL, and what the file is called in it."""
    try:
        from fsspec.config import conf
        from fsspec.core import url_to_fs

        protocol, options = url.partition("://")[0], {}
        if protocol in ("http", "https"):
            import aiohttp

            # Of itself aiohttp gives a file five minutes, however large it is.
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=_patience_s(), sock_read=_patience_s())
            configured = conf.get(protocol, {}).get("client_kwargs", {})
            options = {"client_kwargs": {"timeout": timeout, "trust_env": True, **configured}}
        return url_to_fs(url, **options)
    except ImportError as error:
        raise RemoteError(f"{url}: needs `pip install 'tokenlabel[cloud]'` ({first_line(error)})") from error
    except ValueError as error:
        raise RemoteError(
            f"{url}: expected s3://, gs://, https://, hf:// or a path ({first_line(error)})"
        ) from error


def _patience_s() -> float:
    text = os.environ.get("TOKENLABEL_TIMEOUT") or "30"
    seconds = float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else 0.0
    if not 0 < seconds < math.inf:
        raise RemoteError(f"TOKENLABEL_TIMEOUT={text}: expected seconds, more than 0")
    return seconds


def _patiently(url: str, attempt: Callable[[Callable[[], None]], T]) -> T:
    """Do something with a server, again if it fails in passing. `attempt` is given what to call at each progress."""
    for number in range(_NUM_TRIES):
        try:
            return _while_moving(attempt)
        except Exception as error:
            # HTTP calls whatever goes wrong a missing file, caused by what really did.
            cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
            if number == _NUM_TRIES - 1 or _is_final(cause):
                raise RemoteError(f"{url}: {_reason(url, cause)}") from error
            time.sleep(2**number / 2)
    raise AssertionError


def _while_moving(attempt: Callable[[Callable[[], None]], T]) -> T:
    """Return what a call returns. Raises TimeoutError once there was no progress for longer than patience is.

    A thread does it, which is left to itself then: not every file system takes a timeout, or keeps to it.
    """
    outcome, moved, patience = Future[T](), [time.monotonic()], _patience_s()

    def progress() -> None:
        moved[0] = time.monotonic()

    def run() -> None:
        try:
            outcome.set_result(attempt(progress))
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    while not wait([outcome], timeout=patience / 10).done:
        if time.monotonic() - moved[0] > patience:
            raise TimeoutError
    return outcome.result()


def _is_final(error: Exception) -> bool:
    """Say whether the same call would fail again."""
    kinds = (FileNotFoundError, PermissionError, NotADirectoryError, ImportError, ValueError)
    return (
        (isinstance(error, kinds) and not isinstance(error, UnicodeError))
        or type(error).__name__ in ("NoCredentialsError", "DefaultCredentialsError")
        or getattr(error, "status", None) in (401, 403, 404, 410)
        or getattr(error, "filename", None) is not None  # the cache's own disk is full
    )


def _reason(url: str, error: Exception) -> str:
    status, kind = getattr(error, "status", None), type(error).__name__
    if isinstance(error, RemoteError):
        return str(error)
    if isinstance(error, PermissionError) or status in (401, 403) or "Credentials" in kind:
        remedy = _CREDENTIALS.get(url.partition("://")[0], "")
        return f"no credentials for it, or not these{remedy and '; '}{remedy}"
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return "no such file"
    tried = f" (tried {_NUM_TRIES} times)"
    if isinstance(error, TimeoutError) or "Timeout" in kind:
        return f"its server said nothing for {_patience_s():g} s{tried}; TOKENLABEL_TIMEOUT sets how long to wait"
    return f"cannot be had ({first_line(error)}){'' if _is_final(error) else tried}"


def _download(
    file: RemoteFile, path: Path, moved: Callable[[], None], check: Callable[[Path], None] = lambda path: None
) -> None:
    """Write a file's bytes to a path, where they appear all at once. `moved`: is called at each progress."""
    from fsspec.callbacks import Callback

    class Progress(Callback):
        def __init__(self, *watching: Callable[[], None]) -> None:
            super().__init__()
            self._watching = watching

        def call(self, *_: Any, **__: Any) -> None:
            for watch in self._watching:
                watch()

    filesystem, name = _filesystem(file.url)
    path.parent.mkdir(parents=True, exist_ok=True)

    def attempt(progress: Callable[[], None]) -> Path:
        # A name of its own: an attempt that was given up may still write.
        temporary = path.with_name(f".{os.urandom(4).hex()}.part")
        try:
            temporary.touch()
            filesystem.get_file(name, str(temporary), callback=Progress(progress, moved))
            found = temporary.stat().st_size
            if found != file.num_bytes:
                raise ConnectionError(f"broke off after {found:,} of {file.num_bytes:,} bytes")
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        return temporary

    temporary = _patiently(file.url, attempt)
    try:
        check(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _is_there(path: Path, file: RemoteFile) -> bool:
    """Say whether the cache has a file, and note that it is used."""
    try:
        status = path.stat()
        if status.st_size != file.num_bytes:  # a disk that lost it
            return False
        os.utime(path, ns=(time.time_ns(), status.st_mtime_ns))
    except OSError:
        return False
    return True


@contextmanager
def _room(num_bytes: int, url: str) -> Iterator[Callable[[], None]]:
    """Keep room for so many bytes in the cache; what was used least recently goes for them.

    Returns what is to be called at each progress. Raises RemoteError where they never fit.
    """
    reservation = _folder("files") / f".{os.urandom(4).hex()}-{num_bytes}.tmp"
    with exclusive("room.lock"):
        _make_room(num_bytes, url)
        reservation.touch()
    try:
        yield lambda: os.utime(reservation)
    finally:
        reservation.unlink(missing_ok=True)


def _make_room(num_bytes: int, url: str) -> None:
    room, found = cache_bytes() - num_bytes, list[tuple[int, int, Path]]()
    if room < 0:
        raise RemoteError(
            f"{url}: {_size(num_bytes)}, and the cache may hold {_size(cache_bytes())}; "
            "TOKENLABEL_CACHE_SIZE=500GB lets it hold more"
        )
    for path in [path for name in ("files", "folders", "indexes") for path in _folder(name).iterdir()]:
        with suppress(OSError):
            status, is_folder = path.stat(), path.is_dir()
            if path.name.startswith("."):  # of a download, which a reservation stands for
                if time.time() - status.st_mtime > _ABANDONED_S:
                    _remove(path)
                elif path.suffix == ".tmp":
                    room -= int(path.stem.rpartition("-")[2])
                continue
            parts = path.rglob("*") if is_folder else [path]
            found.append((status.st_atime_ns, sum(part.stat().st_size for part in parts), path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total > room and (path.is_file() or _let_go(path)):
            _remove(path)
            total -= size


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


_held: dict[Path, int] = {}


def _hold(folder: Path) -> bool:
    """Keep a folder of the cache from being removed for as long as this process runs; say whether it is there."""
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
    """Say whether no process holds a folder of the cache."""
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


@contextmanager
def exclusive(name: str) -> Iterator[None]:
    """Do something that one process does at a time, of those that share the cache."""
    descriptor = os.open(_folder("locks") / name, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with suppress(OSError):  # some network file systems cannot: then two may fetch the same
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _size(num_bytes: int) -> str:
    unit = next(name for name in ("TB", "GB", "MB", "KB", "") if num_bytes >= _UNITS[name] or not name)
    return f"{num_bytes / _UNITS[unit]:.3g} {unit or 'bytes'}"
