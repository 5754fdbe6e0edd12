"""WordNet's ids, by which ImageNet's classes go: their words, and their order in ImageNet-1k. No torch.

Read from the tables that timm ships, without importing timm, which takes seconds.
"""

from __future__ import annotations

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from textwrap import shorten

_MAX_WORDS = 40


def with_words(name: str) -> str:
    """Return a class name; a WordNet id with its words: `n01440764 (tench, Tinca tinca)`."""
    words = _words_of_ids().get(name) if re.fullmatch(r"n\d{8}", name) else None
    return f"{name} ({shorten(words, _MAX_WORDS, placeholder='...')})" if words else name


def words_of(name: str) -> str:
    """Return the first of the words of a WordNet id (`n01440764`: tench); any other class name as it is."""
    return _words_of_ids().get(name, name).partition(",")[0]


@cache
def imagenet_ids() -> tuple[str, ...]:
    """Return the ids of ImageNet-1k's classes in the order that its teachers and label files use."""
    return tuple(_table("imagenet_synsets.txt"))


@cache
def _words_of_ids() -> dict[str, str]:
    return dict(line.split("\t", 1) for line in _table("imagenet_synset_to_lemma.txt"))


def _table(name: str) -> list[str]:
    timm = find_spec("timm")
    assert timm is not None
    assert timm.origin is not None
    return (Path(timm.origin).parent / "data" / "_info" / name).read_text(encoding="utf-8").splitlines()
