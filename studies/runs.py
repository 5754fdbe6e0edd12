"""The runs of a study: every row of its tables trained with several seeds, and measured.

Runs are ordinary run folders, OUT/runs/PLAN/SEED, each in a process of its own with one thread (on the CPU) or one
GPU, so a call that was stopped is continued by the same call, and tables share the runs that they have in common.
Under torchrun, each rank trains whole runs of its own.
"""

from __future__ import annotations

import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock

from studies.defects import make_worse
from studies.measures import COST_FILE, MEASURES_FILE, FinishedRun, measure_run
from studies.records import Records, RunRecord
from studies.tables import Job, RunPlan, Study, StudyError, filled
from tokenlabel.classification import task as classification
from tokenlabel.data.images import ImageSource
from tokenlabel.data.scenes import write_scenes
from tokenlabel.data.sources import open_images
from tokenlabel.models.runs import list_checkpoints
from tokenlabel.runtime.distributed import Ranks, joined_ranks, launched_ranks
from tokenlabel.runtime.process import Interrupted, write_whole
from tokenlabel.runtime.runlog import read_metrics
from tokenlabel.segmentation import task as segmentation
from tokenlabel.segmentation.recipe import SegmentRecipe
from tokenlabel.training.engine import run_task

PLAN_FILE = "plan.json"


def run_all(study: Study, records: Records, arguments: Sequence[str], *, num_jobs: int) -> list[str]:
    """Make the steps and run every job that is missing, `num_jobs` at a time; return what failed, a line each.

    `records`: of the runs that are finished. `arguments`: the words after `python -m studies` that make this study, for
    the processes of single jobs, which make the steps that each seed has of its own.
    """
    missing: dict[Any, Job] = {}
    for job in unfinished(study, records):
        missing.setdefault((job.plan.name, job.seed), job)  # rows may have a run in common
    jobs = [*missing.values()]
    shared = dict.fromkeys(s for job in jobs for s in job.plan.steps if not study.testbed.is_seeded(s))
    with joined_ranks() as ranks:
        ranks.on_main(lambda: make_steps(study, [*shared], seed=0))
        mine = jobs[ranks.rank :: ranks.world_size]
        with ThreadPoolExecutor(num_jobs) as pool:
            failures = list(pool.map(lambda job: _run_apart(study, job, arguments), mine))
        return [line for of_rank in ranks.all_gather(failures) for line in of_rank if line]


def unfinished(study: Study, records: Records) -> list[Job]:
    """Return the jobs without a record, or with one that lacks a figure."""
    found = {key: record.figures.keys() for key, record in records.items()}
    return [job for job in study.jobs() if set(study.metrics(job.plan)) - found.get((job.plan.digest, job.seed), set())]


def finished_runs(study: Study, kept: Records) -> Records:
    """Return the records of all finished runs: those that were kept, and those in the folder for what these lack.

    Raises StudyError where steps in the folder were made by other commands than the testbed's.
    """
    for job in study.jobs():
        for step in job.plan.steps:
            _is_made(study, step, job.seed)
    found = {(job.plan.digest, job.seed): _record_of(study, job) for job in unfinished(study, kept)}
    return kept | {key: record for key, record in found.items() if record is not None}


def _record_of(study: Study, job: Job) -> RunRecord | None:
    """Return the record of a run by its folder; None if that holds no finished run of the plan."""
    run = study.run_folder(job.plan, job.seed)
    if not (_is_of(job.plan, run) and (run / MEASURES_FILE).is_file()):
        return None
    figure = "miou" if study.testbed.segments else "top1"
    curve = {line["step"]: line[figure] for line in read_metrics(run) if line["kind"] == "eval"}
    figures = json.loads((run / MEASURES_FILE).read_text(encoding="utf-8"))
    plan, name = job.plan.digest, job.plan.name
    return RunRecord(plan=plan, name=name, seed=job.seed, figures=figures, curve=tuple(curve.items()))


def _run_apart(study: Study, job: Job, arguments: Sequence[str]) -> str | None:
    """Run a job in a process of its own; return what went wrong, if anything did."""
    log = study.out / "logs" / f"{job.name.replace(':', '-')}.log"
    print(f"{job.name} ...", file=sys.stderr, flush=True)
    words = ["studies", *arguments, "--only", job.name]
    problem = _run_module(words, log=log, environment=environment_of_one(launched_ranks().local_rank))
    return problem and f"{job.name}: {problem}"


def run_job(study: Study, job: Job, *, device: torch.device) -> dict[str, float | None]:
    """Train one row with one seed, as far as it is not trained yet, and measure it; return its figures.

    Raises StudyError where the folder holds a run of something else.
    """
    make_steps(study, job.plan.steps, seed=job.seed)
    folder = study.run_folder(job.plan, job.seed)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / PLAN_FILE
    with FileLock(folder / ".lock"):  # another process may be training it
        if path.is_file() and not _is_of(job.plan, folder):
            raise StudyError(
                f"{path}: the run was made by another table, testbed or recipe; remove {folder} or choose another --out"
            )
        write_whole(path, _described(job.plan))
        if not (folder / MEASURES_FILE).is_file():
            _train(study, job, folder, device=device)
        measured = {name: Path(filled(text, study.folders(job.seed))) for name, text in study.testbed.measure.items()}
        run = FinishedRun(run=folder, folders=measured, defect=job.plan.defect, device=device)
        return measure_run(run, wanted=study.metrics(job.plan))


def _described(plan: RunPlan) -> str:
    described = {name: value for name, value in asdict(plan).items() if name not in ("name", "steps")}
    return json.dumps(described, indent=1, sort_keys=True, default=str) + "\n"


def _is_of(plan: RunPlan, run: Path) -> bool:
    """Say whether a run folder is of a plan, with its recipe and its steps as they are now."""
    path = run / PLAN_FILE
    return path.is_file() and json.loads(path.read_text(encoding="utf-8"))["digest"] == plan.digest


def _train(study: Study, job: Job, folder: Path, *, device: torch.device) -> None:
    recipe = study.recipe(job.plan, job.seed)
    if isinstance(recipe, SegmentRecipe):
        task = segmentation.build(recipe, device=device, run=folder)
    else:
        task = classification.build(recipe, device=device, run=folder)
        if job.plan.defect is not None:
            make_worse(task, job.plan.defect, seed=job.seed)
    with counted_cost(folder):
        run_task(task, folder, ranks=Ranks(), eval_every_epochs=recipe.eval.every_epochs)


@contextmanager
def counted_cost(run: Path) -> Iterator[None]:
    """Add a line to the run's cost: the steps that were made, the seconds of the clock and of this process's cores.

    An attempt that failed leaves none: what it did after its last checkpoint is lost, and done again.
    """

    def spent() -> tuple[int, float, float]:
        usage, checkpoints = resource.getrusage(resource.RUSAGE_SELF), list_checkpoints(run)
        last_step = int(checkpoints[-1].name) if checkpoints else 0
        return last_step, time.perf_counter(), usage.ru_utime + usage.ru_stime

    before, interrupted = spent(), None
    try:
        yield
    except Interrupted as error:  # it has saved its last step
        interrupted = error
    steps, wall_s, cpu_s = (now - then for now, then in zip(spent(), before, strict=True))
    with (run / COST_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"num_steps": steps, "wall_s": wall_s, "cpu_s": cpu_s}) + "\n")
    if interrupted is not None:
        raise interrupted


def make_steps(study: Study, steps: Sequence[str], *, seed: int) -> None:
    """Make what rows need, one after the other, each once. Raises StudyError for a step that fails."""
    for name in steps:
        step, folder, marker = (study.testbed.steps[name], study.step_folder(name, seed), _marker(study, name, seed))
        marker.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(marker.with_suffix(".lock")):  # another process may be making it
            if _is_made(study, name, seed):
                continue
            if step.scenes is not None:
                parts = ("lists", "few")  # what is written beside the scenes
                write_scenes(folder, **{key: value for key, value in step.scenes.items() if key not in parts})
                if "few" in step.scenes:
                    write_few(folder, step.scenes["few"])
                for key, (num_labelled, others) in step.scenes.get("lists", {}).items():
                    write_list(folder / "train", key, num_labelled=num_labelled, others=others)
            else:
                words = shlex.split(filled(step.command, study.folders(seed) | {"here": str(folder)}))
                environment = environment_of_one(None)
                problem = _run_module(["tokenlabel", *words], log=marker.with_suffix(".log"), environment=environment)
                if problem:
                    raise StudyError(f"step {folder.name} failed: {problem}")
            write_whole(marker, json.dumps(asdict(step)) + "\n")


def write_list(folder: Path, name: str, *, num_labelled: int, others: bool) -> None:
    """Write FOLDER/NAME.csv: so many images with their class, as many of each; with the `others` those without."""
    source = open_images(folder)
    chosen = {*_chosen(source, num_labelled)}
    rows = [
        f"{key},{source.class_names[source.class_ids[i]] if i in chosen else ''}"
        for i, key in enumerate(source.keys)
        if i in chosen or others
    ]
    write_whole(folder / f"{name}.csv", "path,label\n" + "\n".join(rows) + "\n")


def write_few(scenes: Path, count: int) -> None:
    """Write SCENES/few: images/ and masks/ of so many of the training scenes, as many of each class."""
    source = open_images(scenes / "train")
    for key in (source.keys[index] for index in _chosen(source, count)):
        for theirs, ours in (("train", "images"), ("masks/train", "masks")):
            (scenes / "few" / ours / key).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(scenes / theirs / key, scenes / "few" / ours / key)


def _chosen(source: ImageSource, count: int) -> list[int]:
    """Return the indices of so many images, as many of each class, the same ones each time."""
    place = np.zeros(len(source), np.int64)  # of each image within its class
    for class_id in np.unique(source.class_ids):
        of_class = np.flatnonzero(source.class_ids == class_id)
        place[of_class] = np.random.default_rng(int(class_id)).permutation(len(of_class))
    return np.lexsort((source.class_ids, place))[:count].tolist()


def _is_made(study: Study, name: str, seed: int) -> bool:
    """Say whether a step has been made. Raises StudyError where its folder was made by something else."""
    marker = _marker(study, name, seed)
    if marker.is_file() and json.loads(marker.read_text(encoding="utf-8")) != asdict(study.testbed.steps[name]):
        folder = study.step_folder(name, seed)
        raise StudyError(f"{folder} was made by another command ({marker}); choose another --out")
    return marker.is_file()


def _marker(study: Study, name: str, seed: int) -> Path:
    return study.out / "steps" / f"{study.step_folder(name, seed).name}.json"


def environment_of_one(gpu: int | None) -> dict[str, str]:
    """Return the environment of a process that works alone: one thread, one of the GPUs that this one may use, and
    none of torchrun's variables.
    """
    alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    alone.setdefault("OMP_NUM_THREADS", "1")
    if gpu is not None and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = allowed.split(",") if allowed else [str(number) for number in range(torch.cuda.device_count())]
        alone["CUDA_VISIBLE_DEVICES"] = gpus[gpu % len(gpus)].strip()
    return alone


def _run_module(words: Sequence[str], *, log: Path, environment: Mapping[str, str]) -> str | None:
    """Run `python -m` with its output in a log; return what went wrong, if anything did."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        command = [sys.executable, "-m", *words]
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode
    if status == 0:
        return None
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no output"]
    return f"exit status {status}: {lines[-1][-300:]} (see {log})"
