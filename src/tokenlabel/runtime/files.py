"""Files that are there whole or not at all, whatever stops the process that writes them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

UNFINISHED = ".*.tmp"
"""What files that are being written, or were when their process was killed, are called."""

_WRITE_BYTES = 1 << 20


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
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
