import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._utils import ExceptionWrapper
from torch.utils.data import TensorDataset

from tokenlabel import cli
from tokenlabel.data.batches import make_loader
from tokenlabel.data.samplers import BatchSampler
from tokenlabel.data.workers import Slabs, say_crowded
from tokenlabel.runtime.errors import ImageError

SCRIPT = f"""if __name__ == "__main__":
    import os, signal, sys, time
    sys.path.insert(0, {str(Path(__file__).parent)!r})
    from test_data import BatchSampler, dataset, make_loader
    signal.signal(signal.SIGTERM, lambda *_: print("told to stop", flush=True))
    sampler = BatchSampler(num_images=10, batch_size=4, seed=1, num_steps=12)
    batches = iter(make_loader(dataset(), sampler, num_workers=1, prefetch=1))
    next(batches)
    print("ready", flush=True)
    sys.stdin.readline()
    print(sum(1 for _ in batches), flush=True)
    worker = batches._workers[0]
    worker.terminate()
    worker.join(20)
    print(worker.is_alive())"""


def test_a_signal_to_the_whole_group_stops_no_worker_before_the_trainer_ends_it():
    trainer = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert trainer.stdin is not None
    assert trainer.stdout is not None
    assert trainer.stdout.readline() == "ready\n"
    os.killpg(trainer.pid, signal.SIGTERM)
    assert trainer.stdout.readline() == "told to stop\n"
    time.sleep(0.3)  # whoever is going to die of it is dead by then
    rest, _ = trainer.communicate("\n", timeout=60)
    assert rest.split() == ["11", "False"]
    assert trainer.returncode == 0


def test_more_workers_than_cores_are_one_line(monkeypatch, capsys):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0}, raising=False)
    say_crowded.cache_clear()
    images = TensorDataset(torch.zeros(3))
    for num_workers in (1, 3, 3):
        make_loader(images, BatchSampler(num_images=3, batch_size=1, seed=1, num_steps=2), num_workers=num_workers)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("3 processes are to read images on 1 core:")


@given(
    sizes=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3)), min_size=1, max_size=12), count=st.integers(1, 4)
)
def test_slabs_hold_as_many_batches_at_a_time_as_asked(sizes, count):
    slabs, kept = Slabs(count), []
    for number, (num_images, width) in enumerate(sizes):
        images = [torch.full((2, width), number * 10 + i) for i in range(num_images)]
        stacked = slabs.stack(images)
        assert stacked.is_shared()
        kept = [*kept, (stacked, torch.stack(images))][-count:]
        for ours, theirs in kept:
            assert torch.equal(ours, theirs)


def test_a_slab_is_used_again():
    slabs = Slabs(2)
    places = [slabs.stack([torch.zeros(3)] * n).data_ptr() for n in (4, 4, 3, 4, 1)]
    assert places[0] == places[2] == places[4]
    assert places[1] == places[3] != places[0]


def test_an_error_in_a_worker_is_told_in_its_own_words(monkeypatch, capsys):
    def meet_a_broken_image(_):
        try:
            raise ImageError("cat/7.jpg: does not decode as an image (broken data stream)")
        except ImageError:
            ExceptionWrapper(where="in DataLoader worker process 0").reraise()

    monkeypatch.setitem(cli.VERBS, "train", (meet_a_broken_image, ""))
    assert cli.main(["train"]) == 2
    message = "cat/7.jpg: does not decode as an image (broken data stream)"
    assert capsys.readouterr().err == f"tokenlabel train: error: {message}\n"
