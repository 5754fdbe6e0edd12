"""RUN/answers.npz: the predictions of a run for its val images at its last evaluation. No torch."""

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
    """The predictions for n images, in the order of their data set.

    `truth`, `guesses`: class ids; a truth of -1 is unknown. `probs`: the probabilities of the guesses.
    """

    keys: tuple[str, ...]
    truth: Int[NDArray[np.int32], " n"]
    guesses: Int[NDArray[np.int32], " n"]
    probs: Float[NDArray[np.float16], " n"]
    class_names: tuple[str, ...]

    def write(self, run: Path) -> None:
        """Write the predictions into a run folder, in place of those of an earlier evaluation."""
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
    """Return the predictions in a run folder; None if there is no intact file."""
    try:
        with np.load(run / ANSWERS_FILE) as file:
            arrays = (file["truth"], file["guesses"], file["probs"])
            return Answers(_unpacked(file["keys"]), *arrays, _unpacked(file["class_names"]))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _packed(names: Sequence[str]) -> NDArray[np.uint8]:
    """Return names joined by 0, which no path contains: NumPy's arrays of strings take four bytes a character."""
    return np.frombuffer("\0".join(names).encode("utf-8", "surrogateescape"), np.uint8)


def _unpacked(packed: NDArray[np.uint8]) -> tuple[str, ...]:
    return tuple(packed.tobytes().decode("utf-8", "surrogateescape").split("\0"))
