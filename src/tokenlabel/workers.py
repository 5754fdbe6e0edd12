"""The processes that prepare data: where they are forked from, which signals they heed, and when they end.

A signal to a whole process group or job step, as Ctrl-C, `timeout` and Slurm send it, reaches these processes, too.
They must outlive it: the trainer still needs them while it saves its state, and ends them itself.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from typing import Any


def process_context() -> Any:
    """Return the multiprocessing context of data workers: "forkserver", or "spawn" where there is none.

    Forking a process with threads or CUDA may deadlock, so workers are forked from a clean server process.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # The server imports these once, not every worker; the second one is there for what it does when imported.
    context.set_forkserver_preload(["tokenlabel.data", "tokenlabel.worker_server"])
    return context


def prepare_worker(worker: int) -> None:
    """Heed no signal but SIGTERM of the main process (and SIGKILL), and die when the main process dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS, where there is no telling who sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_told, daemon=True).start()
    threading.Thread(target=_die_with_main_process, daemon=True).start()


def _end_when_told() -> None:
    main_process = multiprocessing.parent_process()
    assert main_process is not None
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main_process.pid:
        pass
    os._exit(128 + signal.SIGTERM)


def _die_with_main_process() -> None:
    """Wait for the end of the main process. PyTorch's own watch sees only the server, which outlives it."""
    main_process = multiprocessing.parent_process()
    assert main_process is not None
    main_process.join()
    os._exit(1)
