"""What a launcher such as torchrun says in the environment; no torch, so that every command may ask at once."""

from __future__ import annotations

import os


def environment_number(name: str) -> int:
    """Return a number that torchrun sets (RANK, WORLD_SIZE, LOCAL_RANK); that of a single process without it."""
    return int(os.environ.get(name, 1 if name == "WORLD_SIZE" else 0))


def is_main_process() -> bool:
    """Say whether this process speaks and writes for all."""
    return environment_number("RANK") == 0
