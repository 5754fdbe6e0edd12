"""Lines for people: what a command assumes, counts or passes over, on stderr above any progress bar.

Results go to stdout; whatever a user must know to trust them goes through here.
"""

from __future__ import annotations

import sys

from tqdm import tqdm

from tokenlabel.runtime.environment import is_main_process


def say(line: str) -> None:
    """Print one line to stderr, from the main process of a job only; progress bars stay whole."""
    if is_main_process():
        tqdm.write(line, file=sys.stderr)


def listed(names: list[str], most: int = 3) -> str:
    """Return the first names, and ", ..." only where there are more: `a, b, c` of three, `a, b, c, ...` of four."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
