"""The demo: every stage on the embedded data, each an ordinary command that is printed before it runs.

Running it again continues where it stopped: each command knows what it has already done.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tokenlabel.data.scenes import write_scenes
from tokenlabel.runtime.arguments import write_json
from tokenlabel.runtime.runlog import read_metrics

Command = Callable[[Sequence[str]], int]


@dataclass(frozen=True, kw_only=True)
class DemoSize:
    """How much the demo does; `overrides` go to each recipe."""

    num_train: int
    num_val: int
    teacher_overrides: tuple[str, ...] = ()
    student_overrides: tuple[str, ...] = ()


FULL = DemoSize(
    num_train=1500,
    num_val=1000,
    student_overrides=("--epochs=60",),
)
FAST = DemoSize(
    num_train=500,
    num_val=200,
    teacher_overrides=("--epochs=15", "--optim.warmup-epochs=1", "--eval.every-epochs=5"),
    student_overrides=("--epochs=15", "--optim.warmup-epochs=1", "--eval.every-epochs=5"),
)


class StageFailed(Exception):  # noqa: N818  (it carries the exit status of a command that has already explained itself)
    """A command of the demo did not succeed."""

    def __init__(self, status: int) -> None:
        super().__init__(f"exit status {status}")
        self.status = status


def run_demo(out: Path, size: DemoSize, command: Command) -> int:
    """Run all stages in the folder `out` through `command` (the command line); return the exit status.

    Leaves scenes/, labels/, the runs teacher/, token-labels/ and class-labels/, result.json and report.html.
    """
    started = time.perf_counter()
    try:
        print(f"writing {size.num_train:,} + {size.num_val:,} scenes to {out / 'scenes'}")
        write_scenes(out / "scenes", num_train=size.num_train, num_val=size.num_val, seed=0)
        _run_stages(out, size, command)
    except StageFailed as failure:
        return failure.status
    result = collect_result(out)
    result["last_call_s"] = round(time.perf_counter() - started, 1)
    write_json(out / "result.json", result)
    print(_table(result))
    return 0


def _run_stages(out: Path, size: DemoSize, command: Command) -> None:
    scenes, labels = out / "scenes", out / "labels"
    data = [f"--data.train={scenes / 'train'}", f"--data.val={scenes / 'val'}"]

    def run(*arguments: str | Path) -> None:
        words = [str(argument) for argument in arguments]
        print(f"\n$ tokenlabel {shlex.join(words)}", flush=True)
        status = command(words)
        if status:
            raise StageFailed(status)

    def train(name: str, recipe: str, *overrides: str) -> None:
        run("train", "--recipe", recipe, "--out", out / name, *data, *overrides)

    train("teacher", "demo_teacher", *size.teacher_overrides)
    run("annotate", scenes / "train", labels, "--teacher", out / "teacher", "--size", "64")
    run("inspect", labels, "--masks", scenes / "masks" / "train", "--output", out / "labels.json")
    train("token-labels", "demo_token_labels", f"--data.labels={labels}", *size.student_overrides)
    train("class-labels", "demo_class_labels", *size.student_overrides)
    of_tokens = ("--masks", scenes / "masks" / "val")  # of the one run whose tokens were taught
    for name, more in (("teacher", ()), ("token-labels", of_tokens), ("class-labels", ())):
        run("eval", out / name, *more, "--output", out / name / "eval.json", "--num-workers", "0")
    runs = [out / name for name in ("token-labels", "class-labels", "teacher")]
    run("report", *runs, "--output", out / "report.html")


def collect_result(out: Path) -> dict[str, Any]:
    """Return the figures of a finished demo under stable names; shares are in [0, 1]."""
    evals = {
        name: _read_json(out / name / "eval.json") for name in ("teacher", "token-labels", "class-labels")
    }
    with_labels, without = (_training_figures(out / name) for name in ("token-labels", "class-labels"))
    labels = _read_json(out / "labels.json")
    return {
        "top1_teacher": evals["teacher"]["top1"],
        "top1_token_labels": evals["token-labels"]["top1"],
        "top1_class_labels": evals["class-labels"]["top1"],
        "teacher_map_agreement": labels["mask_agreement"],
        "student_token_agreement": evals["token-labels"]["token_accuracy"],
        "images_per_s_token_labels": with_labels["images_per_s"],
        "images_per_s_class_labels": without["images_per_s"],
        "labels_share_of_step": with_labels["targets_share"],
        "label_bytes_per_image": labels["bytes_per_image"],
    }


def _training_figures(run: Path) -> dict[str, float]:
    """Return the medians of what a run's training lines say of speed."""
    lines = [line for line in read_metrics(run) if line["kind"] == "train"]
    return {
        name: float(np.median([line[name] for line in lines])) for name in ("images_per_s", "targets_share")
    }


def _table(result: dict[str, Any]) -> str:
    rows = [
        ("top-1 of the teacher (CNN, class labels only)", f"{result['top1_teacher']:.1%}"),
        ("top-1 with token labels + MixToken", f"{result['top1_token_labels']:.1%}"),
        ("top-1 without token labels, all else equal", f"{result['top1_class_labels']:.1%}"),
        ("teacher's maps agree with the true dense labels", f"{result['teacher_map_agreement']:.1%}"),
        ("student's tokens agree with the true dense labels", f"{result['student_token_agreement']:.1%}"),
        ("training images/s with token labels", f"{result['images_per_s_token_labels']:.0f}"),
        ("training images/s without", f"{result['images_per_s_class_labels']:.0f}"),
        ("share of a step spent on making targets", f"{result['labels_share_of_step']:.1%}"),
        ("label bytes an image", f"{result['label_bytes_per_image']:.0f}"),
    ]
    return "\n" + "\n".join(f"{name:<52} {value:>8}" for name, value in rows)


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
