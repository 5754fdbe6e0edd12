"""RUN/answers.npz: the class that a run found in each val image at its last evaluation. No torch."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray

from tokenlabel.runtime.process import write_whole

ANSWERS_FILE = "answers.npz"


@dataclass(frozen=True, eq=False)
class Answers:
    """The answers to n images, in the order of their data set.

    `truth`, `guesses`: class ids, the truth -1 where it is not known. `probs`: of the guesses, as the run sees it.
    """

    keys: tuple[str, ...]
    truth: Int[NDArray[np.int32], " n"]
    guesses: Int[NDArray[np.int32], " n"]
    probs: Float[NDArray[np.float16], " n"]
    class_names: tuple[str, ...]

    def write(self, run: Path) -> None:
        """Write the answers into a run folder in place of those of an earlier evaluation."""
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            keys=_packed(self.keys),
            truth=self.truth.astype(np.int32),
            guesses=self.guesses.astype(np.int32),
            probs=self.probs.astype(np.float16),
            class_names=_packed(self.class_names),
        )
        write_whole(run / ANSWERS_FILE, [buffer.getvalue()])


def read_answers(run: Path) -> Answers | None:
    """Return what `Answers.write` left in a run folder; None where nothing is whole there."""
    try:
        with np.load(run / ANSWERS_FILE) as file:
            arrays = (file["truth"], file["guesses"], file["probs"])
            return Answers(_unpacked(file["keys"]), *arrays, _unpacked(file["class_names"]))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _packed(names: Sequence[str]) -> NDArray[np.uint8]:
    """Return names as bytes: no path and no name of a folder holds a 0, and arrays of text take four bytes a letter."""
    return np.frombuffer("\0".join(names).encode("utf-8", "surrogateescape"), np.uint8)


def _unpacked(packed: NDArray[np.uint8]) -> tuple[str, ...]:
    return tuple(packed.tobytes().decode("utf-8", "surrogateescape").split("\0"))
