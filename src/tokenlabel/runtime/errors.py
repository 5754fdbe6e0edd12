"""Exception classes, renamed and removed options, and helpers for error messages.

An error that a user can cause is a ValueError with a message of one line.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

RENAMED = {"size_px": "img_size", "size-px": "img-size"}
"""Renamed fields and options."""

GONE = {
    "overfit": "for a few images by heart, train on a list file of them: --data.train FEW.txt --loss.label-smoothing 0",
    "profile": "--dry-run says what part of a step takes how long, torch.profiler which operations do",
    "optim.betas": "AdamW's are PyTorch's, 0.9 and 0.999; leave it out",
    "optim.eps": "AdamW's is PyTorch's, 1e-8; leave it out",
    "erase.min_aspect": "boxes are up to 1 / 0.3 times as high as wide, and as wide as high; leave it out",
    "eval.num_workers": "evaluation takes data.num_workers processes, from 5,000 images on",
    "loss.correct_teacher": "loss.class_target both mixes the truth into the teacher's labels of images, as "
    "loss.teacher_share says",
    "compare": "python -m studies compares recipes over seeds, from a clone of the repository",
}
"""Removed fields, options and verbs, and what to do instead."""


class ConfigError(ValueError):
    """A recipe, an option or an argument asks for something that does not exist or does not fit."""


class MissingError(ConfigError):
    """Something without a default, which another setting may give, is not named."""


class DataError(ValueError):
    """Images, masks or lists of images cannot be used as they are."""


class ImageError(ValueError):
    """An image does not decode. The message names it."""


class RemoteError(ValueError):
    """A file behind a URL cannot be downloaded. The message names it."""


class StoreError(ValueError):
    """Labels on disk cannot be used as they are."""


class ModelError(ValueError):
    """A network, its weights or a head does not exist, cannot be read, or cannot do what is asked."""


class OutputError(ModelError):
    """What a network makes of some images are no finite numbers. The message names one."""


class FirstRankError(ValueError):
    """The first rank failed at what it does for all ranks."""


def import_extra(module: str, extra: str, what: str, *, otherwise: str = "") -> Any:
    """Import a module of an extra. Raises ConfigError that says that `what` is not there, and how to install it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigError(f"{what} is not installed; pip install 'tokenlabel[{extra}]'{otherwise}") from error


def first_line(error: Exception) -> str:
    """Return the first line of the message of another library's error."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def near_names(word: str, known: Sequence[str], *, prefix: str = "") -> str:
    """Return a hint about an unknown word: what became of it, or the nearest known words, or those beside it.

    `prefix`: what stands before each name.
    """
    by_last_part = {name.split(".")[-1]: name for name in known}
    written = word.replace("-", "_")
    for name, instead in GONE.items():
        if written in (name, name.split(".")[-1]):
            return f"; it is gone: {instead}"
    now = by_last_part.get(RENAMED.get(word.split(".")[-1], ""))
    if now:
        return f"; it is called {prefix}{now} now"
    near = difflib.get_close_matches(word, known, n=2) or [
        by_last_part[part] for part in difflib.get_close_matches(word.split(".")[-1], by_last_part, n=2)
    ]
    if near:
        return f"; did you mean {' or '.join(prefix + name for name in near)}?"
    group = word.rpartition(".")[0]
    beside = [prefix + name for name in known if name.rpartition(".")[0] == group]
    return f"; known there: {', '.join(beside)}" if beside else ""


def refuse(faults: Mapping[str, object], error: type[ValueError] = ConfigError) -> None:
    """Raise an error with the first message whose condition is true."""
    for message, is_so in faults.items():
        if is_so:
            raise error(message)
