"""How a command runs and ends: its exit status, its one line of error, and pipes that nobody reads any longer."""

from __future__ import annotations

import io
import os
import select
import signal
import sys
from collections.abc import Callable
from typing import TextIO

from tokenlabel.runtime.errors import FirstRankError
from tokenlabel.runtime.process import Interrupted, environment_number

USAGE_ERROR = 2


def with_open_streams(run: Callable[[], int]) -> int:
    """Return the exit status of a command whose output may go to a pipe, such as `tokenlabel inspect labels | head`."""
    try:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # names of files need not be UTF-8, nor need the terminal
                stream.reconfigure(errors="backslashreplace")
        try:
            return run()
        finally:
            sys.stdout.flush()  # here, where it can be handled, not when the interpreter ends
    except BrokenPipeError as error:
        unread = [stream for stream in (sys.stdout, sys.stderr) if _nobody_reads(stream)]
        for stream in unread:  # no error, and nothing is left to say: not by the interpreter either
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if not unread:
            print(f"tokenlabel: error: {error}", file=sys.stderr)
        return 128 + signal.SIGPIPE if unread else USAGE_ERROR


def run_command(command: str, run: Callable[[list[str]], int], arguments: list[str]) -> int:
    """Run a function on its arguments; return the exit status, after one line of what stopped it."""
    try:
        return run(arguments)
    except Interrupted as stop:
        print(f"{command}: {stop}", file=sys.stderr)
        return stop.exit_status
    except KeyboardInterrupt:
        print(f"\n{command}: stopped; the same command continues", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError) or os.environ.get("TOKENLABEL_TRACEBACK"):
            raise
        if not isinstance(error, FirstRankError) or environment_number("LOCAL_RANK") == 0:  # once a machine
            print(f"{command}: error: {_own_message(error)}", file=sys.stderr)
        return USAGE_ERROR


def _own_message(error: Exception) -> str:
    """Return the message of an error; one from a data worker comes with the worker's traceback before it."""
    if isinstance(error, OSError) and isinstance(error.filename, str) and error.strerror:
        return f"{error.filename}: {error.strerror}"  # without its number
    message = str(error).rstrip()
    if message.startswith("Caught ") and "Traceback" in message:
        return message.splitlines()[-1].partition(": ")[2]
    return message


def _nobody_reads(stream: TextIO) -> bool:
    """Say whether a stream is a pipe whose other end was closed."""
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
