"""What pre-training is worth to segmentation: three heads on the embedded masks, from three starts, over seeds.

`python -m benchmarks.segment_study [--out runs/segment_study] [--seeds 5] [--jobs 2]` continues where it was stopped;
with `--record FILE`, which keeps the mIoU of each finished run, also on another machine.
The starts are random weights, a run by class labels alone, and one by token labels (`--backbones`: folder of class-SEED
and token-SEED; made where they are missing). A linear probe trains one linear map on the frozen backbone; FCN and
UPerNet train everything. Seed by seed, all starts share the recipe, the head's first weights and the order of crops.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

from tokenlabel.comparison.spread import paired, spread_of
from tokenlabel.data.scenes import write_scenes
from tokenlabel.runtime.runlog import read_metrics

Run = tuple[str, str, int]
"""A head, a start and a seed."""

STARTS = {"scratch": "random weights", "class": "class labels only", "token": "token labels"}
HEADS = {
    "linear": ["--model.freeze-backbone=true", "--optim.lr=1e-2", "--num-steps=150"],
    "fcn": ["--model.neck=none"],
    "upernet": [],
}


def main() -> None:
    """Run what is missing of the study and write its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/segment_study"))
    parser.add_argument(
        "--backbones", type=Path, help="folder with the runs class-SEED and token-SEED; OUT by default"
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--heads", nargs="+", choices=[*HEADS], default=[*HEADS])
    parser.add_argument("--record", type=Path, help="file of what is finished: runs in it are not made again")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    options = parser.parse_args()
    out: Path = options.out
    backbones = options.backbones or out
    record = Record(options.record)
    runs = [
        (head, start, seed) for head in options.heads for seed in range(options.seeds) for start in STARTS
    ]
    missing = [run for run in runs if run not in record]
    out.mkdir(parents=True, exist_ok=True)
    if missing:
        write_scenes(out / "scenes", num_train=1500, num_val=1000, seed=0)
    with ThreadPoolExecutor(options.jobs) as pool:
        if options.backbones is None and missing:
            prepare_labels(out)
            list(pool.map(lambda seed: train_backbones(out, seed), sorted({seed for _, _, seed in missing})))
        list(pool.map(lambda run: record.add(run, segment(out, backbones, *run)), missing))
    found = {
        head: {start: [record[head, start, seed] for seed in range(options.seeds)] for start in STARTS}
        for head in options.heads
    }
    (out / "segment_study.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    text = as_markdown(found)
    (out / "segment_study.md").write_text(text, encoding="utf-8")
    print(text)


class Record:
    """The mIoU of finished runs by (head, start, seed), kept in a file (None: in memory) from one run to the next."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.lock = path, Lock()
        kept = json.loads(path.read_text(encoding="utf-8")) if path is not None and path.exists() else []
        self.values = {(line["head"], line["start"], line["seed"]): line["miou"] for line in kept}

    def __contains__(self, run: Run) -> bool:
        """Say whether a run is finished."""
        return run in self.values

    def __getitem__(self, run: Run) -> float:
        """Return the mIoU of a run."""
        return self.values[run]

    def add(self, run: Run, miou: float) -> None:
        """Keep what a run came to, from any thread."""
        with self.lock:
            self.values[run] = miou
            if self.path is not None:
                lines = [
                    {"head": head, "start": start, "seed": seed, "miou": self.values[head, start, seed]}
                    for head, start, seed in sorted(self.values)
                ]
                temporary = self.path.with_name(f".{self.path.name}.tmp")
                temporary.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")
                temporary.replace(self.path)


def prepare_labels(out: Path) -> None:
    """Train the demo's teacher and let it label the training scenes."""
    teacher, train_images = out / "teacher", out / "scenes" / "train"
    tokenlabel(out, "teacher", "train", "--recipe=demo_teacher", f"--out={teacher}", *images_of(out))
    tokenlabel(out, "labels", "annotate", train_images, out / "labels", f"--teacher={teacher}", "--size=64")


def train_backbones(out: Path, seed: int) -> None:
    """Train one backbone by class labels and one by token labels, alike in all else."""
    labels = {"class": [], "token": [f"--data.labels={out / 'labels'}"]}
    for start, more in labels.items():
        recipe, run = f"--recipe=demo_{start}_labels", out / f"{start}-{seed}"
        tokenlabel(out, run.name, "train", recipe, f"--out={run}", f"--seed={seed}", *images_of(out), *more)


def segment(out: Path, backbones: Path, head: str, start: str, seed: int) -> float:
    """Train one head from one start with one seed; return its mIoU."""
    run = out / f"{head}-{start}-{seed}"
    if any(line["kind"] == "eval" for line in read_metrics(run)):  # the recipe evaluates at the end alone
        return last_miou(run)
    weights = [] if start == "scratch" else [f"--model.weights={backbones / f'{start}-{seed}'}"]
    tokenlabel(
        out,
        run.name,
        *("segment", "train", "--recipe=segment_scenes", f"--out={run}", f"--seed={seed}"),
        f"--data.root={out / 'scenes'}",
        f"--model.head={head}",
        *HEADS[head],
        *weights,
    )
    return last_miou(run)


def images_of(out: Path) -> list[str]:
    """Return the data options of a classifier's run."""
    scenes = out / "scenes"
    return [f"--data.train={scenes / 'train'}", f"--data.val={scenes / 'val'}", "--data.num-workers=0"]


def tokenlabel(out: Path, log: str, *words: str | Path) -> None:
    """Run one command with one thread, its output in OUT/LOG.log."""
    with (out / f"{log}.log").open("ab") as file:
        subprocess.run(
            [sys.executable, "-m", "tokenlabel", *map(str, words)],
            stdout=file,
            stderr=subprocess.STDOUT,
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )


def last_miou(run: Path) -> float:
    """Return the mIoU of a run's last evaluation."""
    return [line for line in read_metrics(run) if line["kind"] == "eval"][-1]["miou"]


def as_markdown(found: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Return the tables as Markdown: means ± half of a 95% interval, and differences seed by seed."""
    lines = [
        f"| mIoU, % | {' | '.join(STARTS.values())} | token - class labels | class labels - random |",
        "|---|---|---|---|---|---|",
    ]
    for head, of_start in found.items():
        cells = [shown([100 * miou for miou in of_start[start]]) for start in STARTS]
        for ours, theirs in (("token", "class"), ("class", "scratch")):
            a, b = ({s: 100 * v for s, v in enumerate(of_start[start])} for start in (ours, theirs))
            gain = paired(a, b)
            assert gain is not None
            each = ", ".join(f"{value:+.1f}" for value in gain.values)
            cells.append(f"{gain.mean:+.1f} ± {gain.half:.1f} ({each})")
        lines.append(f"| {head} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def shown(values: Sequence[float]) -> str:
    """Return the mean of values and half of its 95% interval."""
    spread = spread_of(values)
    return f"{spread.mean:.1f} ± {spread.half:.1f}"


if __name__ == "__main__":
    main()
