"""Names that are URLs: told from paths, expanded, and shown to others without the secrets in them. No torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenlabel.runtime.errors import RemoteError

_OF_PATHS = ("hf-dataset", "local-dir", "masks")  # names of ours that a path follows, so they are no URLs

# Of a URL in a text, also with the one slash that `Path` leaves of two: the user and the query are outside of the
# groups. It ends at a blank or `"`, but marks before that, as in `(URL?a=b): no such file`, are the text's.
_IN_TEXT = re.compile(
    r"\b(?P<scheme>(?:https?|s3|gc?s|hf|s?ftp|ssh|az|abfss?)(?=:/)|[a-z][a-z0-9+.-]+(?=://)):/{1,2}(?:[^/\s?#]*@)?"
    r"(?P<place>[^\s\"<>?]*)(?:\?[^\s\"<>]+?(?=[\])}':;,.]*(?:[\s\"<>]|$)))?",
    re.IGNORECASE,
)


def as_url(name: str | Path) -> str | None:
    """Return a name that is a URL, None for a path. `Path` drops one of two slashes, which is put back.

    Raises RemoteError for `file://`.
    """
    text = os.fspath(name)
    if text.startswith("file:/"):
        path = re.sub("^file:/+", "/", text)
        raise RemoteError(f"file://{path}: is on this machine; give it as a path, {path}")
    found = re.fullmatch(r"([a-zA-Z][a-zA-Z0-9+.-]+):(//?)([^/].*)", text, re.DOTALL)
    if found is None or (found[2] == "/" and not isinstance(name, Path)) or found[1] in _OF_PATHS:
        return None
    return f"{found[1].lower()}://{found[3]}"


def expanded(name: str) -> list[str]:
    """Expand braces: train-{000..127}.tar, {a,b}.tar. Raises RemoteError for a range that is none."""
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


def last_part(url: str) -> str:
    """Return what a file or a folder behind a URL is called there."""
    return url.partition("?")[0].rstrip("/").rpartition("/")[2]


def without_secrets(value: Any) -> Any:
    """Return a text, or nested data with texts in it, as others may read it.

    URLs lose their query, which may be a signature, and `USER:PASSWORD@`; the slash that `Path` drops is put back.
    """
    if isinstance(value, str):
        return _IN_TEXT.sub(r"\g<scheme>://\g<place>", value)
    if isinstance(value, Mapping):
        return {key: without_secrets(entry) for key, entry in value.items()}
    return [without_secrets(entry) for entry in value] if isinstance(value, (list, tuple)) else value
