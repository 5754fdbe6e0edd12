"""Files behind URLs (s3://, gs://, https://, hf://), through fsspec: what they are, and their bytes.

TOKENLABEL_TIMEOUT is for how many seconds a server may say nothing, by default 30. Credentials and endpoints are those
of the libraries: AWS_PROFILE, HF_TOKEN, FSSPEC_S3_ENDPOINT_URL, ... No torch.
"""

from __future__ import annotations

import math
import operator
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from tokenlabel.runtime.errors import RemoteError, first_line
from tokenlabel.runtime.process import T
from tokenlabel.runtime.urls import last_part

_NUM_TRIES = 3
_NUM_ASKED = 16  # requests at a time, for sizes of files
# What file systems call the version of a file, the surest first.
_VERSIONS = ("ETag", "etag", "crc32c", "md5Hash", "blob_id", "LastModified", "Last-Modified", "mtime", "updated")
_CREDENTIALS = {
    "s3": "AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, name them; FSSPEC_S3_ANON=true needs none",
    "gs": "`gcloud auth application-default login` makes them; FSSPEC_GS_TOKEN=anon needs none",
    "hf": "`hf auth login` or HF_TOKEN name them",
}


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file behind a URL. `version`: what its server tells versions apart by (an ETag, a checksum, a time), or ""."""

    url: str
    num_bytes: int
    version: str

    @property
    def cached_as(self) -> str:
        """The name of its copy in the cache; other versions have other names."""
        return f"{digest_of([self])}-{last_part(self.url)[-100:]}"


def remote_files(urls: Sequence[str]) -> list[RemoteFile]:
    """Ask for the size and the version of files, many at a time. Raises RemoteError that names one of them."""
    with ThreadPoolExecutor(_NUM_ASKED) as pool:
        return list(pool.map(_described, urls))


def folder_urls(url: str, *, maxdepth: int | None = None) -> list[str]:
    """Return the URLs of all files in a folder, at any depth, or of those that a pattern with `*` stands for, sorted.

    Raises RemoteError where there are none, and for servers that list nothing.
    """
    filesystem, path = filesystem_of(url)
    find = filesystem.glob if "*" in path else filesystem.find
    names = patiently(url, lambda _: find(path, maxdepth=maxdepth))
    if not names:
        raise RemoteError(f"{url}: no such files; or its server does not list folders, then name the files")
    return sorted(filesystem.unstrip_protocol(name) for name in names)


def digest_of(files: Iterable[RemoteFile]) -> str:
    """Return what identifies files in these versions, in 16 letters."""
    text = "\n".join(f"{file.url}\t{file.num_bytes}\t{file.version}" for file in files)
    return blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()


def download(
    file: RemoteFile, path: Path, moved: Callable[[], None], check: Callable[[Path], None] = lambda path: None
) -> None:
    """Write a file's bytes to a path, where they appear all at once.

    `moved`: is called at each progress. `check`: is called with the file before it gets its name.
    """
    from fsspec.callbacks import Callback

    filesystem, name = filesystem_of(file.url)
    path.parent.mkdir(parents=True, exist_ok=True)

    def _attempt(progress: Callable[[], None]) -> Path:
        watch = Callback(hooks={"progress": lambda *_, **__: progress(), "moved": lambda *_, **__: moved()})
        # A name of its own: an attempt that was given up may still write.
        temporary = path.with_name(f".{os.urandom(4).hex()}.part")
        try:
            temporary.touch()
            filesystem.get_file(name, str(temporary), callback=watch)
            found = temporary.stat().st_size
            if found != file.num_bytes:
                raise ConnectionError(f"broke off after {found:,} of {file.num_bytes:,} bytes")
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        return temporary

    temporary = patiently(file.url, _attempt)
    try:
        check(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _described(url: str) -> RemoteFile:
    filesystem, path = filesystem_of(url)
    info = patiently(url, lambda _: filesystem.info(path))
    if info.get("type") == "directory":
        raise RemoteError(f"{url}: is a folder; expected a file")
    if info.get("size") is None:
        raise RemoteError(f"{url}: its server does not say how large it is, so a copy cannot be checked")
    version = next((str(info[name]) for name in _VERSIONS if info.get(name)), "")
    return RemoteFile(url, int(info["size"]), version)


def filesystem_of(url: str) -> tuple[Any, str]:
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
        raise RemoteError(f"{url}: expected s3://, gs://, https://, hf:// or a path ({first_line(error)})") from error


def _patience_s() -> float:
    text = os.environ.get("TOKENLABEL_TIMEOUT") or "30"
    seconds = float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else 0.0
    if not 0 < seconds < math.inf:
        raise RemoteError(f"TOKENLABEL_TIMEOUT={text}: expected seconds, more than 0")
    return seconds


def patiently(url: str, attempt: Callable[[Callable[[], None]], T]) -> T:
    """Call `attempt` with a function to call at each progress, up to three times if errors are transient."""
    for number in range(_NUM_TRIES):  # half a second, then a second, between tries
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
    """Return what a call returns. Raises TimeoutError once it made no progress for TOKENLABEL_TIMEOUT seconds."""
    # In a thread, which is abandoned on a timeout: not every file system takes a timeout, or keeps to it.
    outcome, moved, patience = Future[T](), [time.monotonic()], _patience_s()

    def _run() -> None:
        try:
            outcome.set_result(attempt(lambda: operator.setitem(moved, 0, time.monotonic())))
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=_run, daemon=True).start()
    while not wait([outcome], timeout=patience / 10).done:
        if time.monotonic() - moved[0] > patience:
            raise TimeoutError
    return outcome.result()


def _is_final(error: Exception) -> bool:
    """Return True if the same call would fail again."""
    kinds = (FileNotFoundError, PermissionError, NotADirectoryError, ImportError, ValueError)
    return (
        (isinstance(error, kinds) and not isinstance(error, UnicodeError))
        or type(error).__name__ in ("NoCredentialsError", "DefaultCredentialsError")
        or _status_of(error) in (401, 403, 404, 410)
        or getattr(error, "filename", None) is not None  # the cache's own disk is full
    )


def _status_of(error: Exception) -> int | None:
    """Return the status of an HTTP answer, wherever the library of a protocol keeps it."""
    return getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)


def _reason(url: str, error: Exception) -> str:
    status, kind = _status_of(error), type(error).__name__
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
