"""Trains several recipes in two processes, one after the other, as torchrun would start them."""

import multiprocessing
import os
import signal
import socket
import threading

import torch

from tokenlabel.classification.task import build
from tokenlabel.data.images import ImageFiles
from tokenlabel.runtime.distributed import joined_ranks
from tokenlabel.runtime.process import Interrupted
from tokenlabel.training.engine import run_task

CPU = torch.device("cpu")


def train_together(recipes, *, stopped=()):
    """Train recipes, by their run folders, on two ranks each; those in `stopped` are asked to stop by rank 1 alone.

    Returns for each rank the steps after which it stopped, and the keys of the images that it read before the first
    step, by run folder.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tokenlabel.classification.task"])
    answers = context.SimpleQueue()
    ranks = [context.Process(target=_train_rank, args=(rank, port, recipes, stopped, answers)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    said = dict(answers.get() for _ in ranks)
    for process in ranks:
        process.join()
        assert process.exitcode == 0
    return said[0], said[1]


def _train_rank(rank, port, recipes, stopped, answers):
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    stops, reads, read = {}, {}, ImageFiles.read
    with joined_ranks(CPU) as ranks:
        for run, recipe in recipes.items():
            if run in stopped and rank == 1:
                threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
            reads[run] = []
            ImageFiles.read = lambda self, index, keys=reads[run]: keys.append(self.keys[index]) or read(self, index)
            task = build(recipe, device=CPU)
            ImageFiles.read = read
            try:
                run_task(task, run, ranks=ranks, eval_every_epochs=1, changed_numerics=True)
            except Interrupted as stop:
                stops[run] = str(stop)
    answers.put((rank, (stops, reads)))
