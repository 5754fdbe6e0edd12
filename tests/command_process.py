"""Commands as users give them, without the tests' type checker: several in one process, as torch loads slowly."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Self

# Answers have a stream of their own: what else a command's threads and workers print goes to stderr.
PROGRAM = """
import contextlib, io, json, os, sys, traceback
from tokenlabel.cli import main

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
exec(sys.argv[1])
for line in sys.stdin:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(json.loads(line))
        except BaseException:
            status = traceback.format_exc()
    print(json.dumps([status, out.getvalue(), err.getvalue()]), file=answers, flush=True)
"""


class Outcome(NamedTuple):
    """The exit status of a command, or the traceback that ended it, and what it printed."""

    status: int | str
    out: str
    err: str


class CommandProcess:
    """A process in a folder, in which `tokenlabel` runs one command after the other, as in a shell.

    `environment` adds to that of the tests; `setup` is Python that runs first.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str] | None = None, *, setup: str = "") -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed with the process)
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, setup],
            cwd=folder,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()
        self._errors.close()

    def run(self, *words: str) -> Outcome:
        """Run a command; return what came of it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(words), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        assert answer, self.errors()
        return Outcome(*json.loads(answer))

    def check(self, *words: str) -> str:
        """Run a command that has to end well; return what it printed to stdout."""
        outcome = self.run(*words)
        assert outcome.status == 0, f"{words}: {outcome.status}\n{outcome.err}"
        return outcome.out

    def errors(self) -> str:
        """Return what the process itself printed, outside of its commands' own lines."""
        self._errors.seek(0)
        return self._errors.read()
