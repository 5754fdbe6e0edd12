"""The label store: one of the size of ImageNet, opened and read by processes of their own.

It repeats 200 synthetic maps (see `synthetic_maps`) under 1.28 million keys of ImageNet's form (100,000 with
--quick), in the uncompressed encoding. The first pass over the keys maps the pages of the files into the process (they
are in the page cache already, having just been written); the others show what reading itself costs. Memory is what a
process takes for itself beyond its imports: pages of files are the page cache's, and exist once.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measure import Row, Settings
from benchmarks.synthetic_maps import NUM_CLASSES, TOPK, synthetic_maps
from tokenlabel.core.scores import ScoreMap
from tokenlabel.labels.encoding import Encoding, pack
from tokenlabel.labels.manifest import Manifest
from tokenlabel.labels.writer import LabelStoreWriter

NUM_IMAGES = 1_281_167
NUM_READS = 100_000

READER = """
import json, os, random, sys, time
from tokenlabel.labels.store import LabelStore
def own_bytes():
    with open("/proc/self/status") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith("RssAnon"))
folder, num_images, num_reads, seed = sys.argv[1], *map(int, sys.argv[2:])
before, started = own_bytes(), time.perf_counter()
store = LabelStore(folder)
open_s, open_bytes = time.perf_counter() - started, own_bytes() - before
rng = random.Random(seed)
keys = [f"train/n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG" for i in rng.sample(range(num_images), num_reads)]
rates = []
before_reading = own_bytes()
for _ in range(6):
    started = time.perf_counter()
    for key in keys:
        store[key]
    rates.append(num_reads / (time.perf_counter() - started))
worker_bytes = open_bytes + own_bytes() - before_reading
print(json.dumps({"open_s": open_s, "worker_bytes": worker_bytes, "reads_per_s": rates}))
"""


def run(settings: Settings) -> list[Row]:
    """Measure a store of the size of ImageNet."""
    maps = list(synthetic_maps(40 if settings.quick else 200))
    num_images = 100_000 if settings.quick else NUM_IMAGES
    with tempfile.TemporaryDirectory() as folder:
        _write_large(Path(folder) / "labels", maps, num_images)
        return _large_rows(Path(folder) / "labels", num_images)


def _large_rows(folder: Path, num_images: int) -> list[Row]:
    """Return how a large store opens and reads."""
    opened = [_read(folder, num_images, num_reads=1, workers=1)[0] for _ in range(5)]
    (one,) = _read(folder, num_images, num_reads=NUM_READS, workers=1)
    two = _read(folder, num_images, num_reads=NUM_READS, workers=2)
    both = [a + b for a, b in zip(two[0]["reads_per_s"], two[1]["reads_per_s"], strict=True)]
    memory = [figures["worker_bytes"] / 2**20 for figures in (one, *two)]
    title = f"{num_images:,} records"
    return [
        Row(f"{title}: open", [figures["open_s"] for figures in opened], "s", "under 2"),
        Row(f"{title}: memory of a process that has it open", memory, "MiB", "under 300"),
        Row(f"{title}: random reads, 1 process, first pass", one["reads_per_s"][:1], "1/s"),
        Row(f"{title}: random reads, 1 process", one["reads_per_s"][1:], "1/s", "at least 100,000"),
        Row(f"{title}: random reads, 2 processes together", both[1:], "1/s"),
        Row(f"{title}: tokenlabel inspect", [_inspect_s(folder) for _ in range(3)], "s", "under 1"),
    ]


def _read(folder: Path, num_images: int, *, num_reads: int, workers: int) -> list[dict]:
    """Return what processes that read at the same time measured."""
    commands = [
        [sys.executable, "-c", READER, str(folder), str(num_images), str(num_reads), str(seed)]
        for seed in range(workers)
    ]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE) for command in commands]
    return [json.loads(process.communicate()[0]) for process in processes]


def _inspect_s(folder: Path) -> float:
    """Return how long the command takes, the start of Python included."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "tokenlabel", "inspect", str(folder)], stdout=subprocess.PIPE, check=True)
    return time.perf_counter() - started


def _write_large(folder: Path, maps: list[ScoreMap], num_images: int) -> None:
    records = [pack(score_map, Encoding.RAW) for score_map in maps]
    with LabelStoreWriter(folder, _manifest(Encoding.RAW)) as writer:
        for i in range(num_images):
            writer.add_record(_key(i), records[i % len(records)])


def _manifest(encoding: Encoding) -> Manifest:
    return Manifest(num_classes=NUM_CLASSES, topk=TOPK, encoding=encoding)


def _key(i: int) -> str:
    return f"train/n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG"
