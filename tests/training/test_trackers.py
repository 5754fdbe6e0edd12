import os
import subprocess
import sys

import pytest
import torch
from command_process import CommandProcess
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_train import nested_recipe, write_labels

from tokenlabel.classification.task import train
from tokenlabel.data.scenes import write_scenes
from tokenlabel.runtime.configuration import config_from_dict
from tokenlabel.runtime.distributed import Ranks
from tokenlabel.runtime.errors import ConfigError
from tokenlabel.runtime.runlog import RunLog, TensorBoard, WandB, read_metrics
from tokenlabel.training.recipe import Recipe
from tokenlabel.training.run_folder import locked


def write_steps(run, steps, tracker, **options):
    log = RunLog(run, num_steps=10, title="test", trackers=[tracker], **options)
    for step in steps:
        log.write(step, kind="train", loss=1 / step, keys=["a.jpg"])
    log.write(max(steps), kind="eval", top1=0.5)
    log.close()


def test_a_tracker_hears_every_line_of_the_metrics(tmp_path):
    heard = []
    write_steps(tmp_path, [1, 2], heard.append, start_step=0)
    assert heard == read_metrics(tmp_path)
    assert [line["kind"] for line in heard] == ["train", "train", "eval"]


def test_it_hears_nothing_on_other_ranks(tmp_path):
    heard = []
    write_steps(tmp_path, [1, 2], heard.append, start_step=0, active=False)
    assert heard == []


def test_tensorboard_reads_the_figures_of_a_run_that_was_stopped_and_continued(tmp_path):
    for start, steps in ((0, range(1, 8)), (4, range(5, 11))):
        with TensorBoard(tmp_path / "tensorboard") as tensorboard:
            write_steps(tmp_path, steps, tensorboard, start_step=start)
    figures = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert figures.Tags()["scalars"] == ["train/loss", "eval/top1"]
    losses = figures.Scalars("train/loss")
    assert [event.step for event in losses] == list(range(1, 11))
    assert [event.value for event in losses] == pytest.approx([1 / step for step in range(1, 11)])


def test_tensorboard_that_is_not_installed_is_an_error_that_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"pip install 'tokenlabel\[tensorboard\]'"):
        TensorBoard(tmp_path)


def test_wandb_that_is_not_installed_is_an_error_that_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"pip install 'tokenlabel\[wandb\]'"):
        WandB(tmp_path)


def test_wandb_offline_holds_the_figures_of_a_run_that_was_stopped_and_continued(tmp_path):
    write_scenes(tmp_path / "scenes", num_train=20, num_val=10, seed=0)
    command = ["train", "--recipe", "demo_class_labels", "--out", "runs/first"]
    more = ["--data.train", "scenes/train", "--data.val", "scenes/val", "--batch-size", "10", "--device", "cpu"]
    few = ["--epochs", "2", "--optim.warmup-epochs", "0", "--data.num-workers", "0", "--wandb"]
    with CommandProcess(tmp_path, {"WANDB_MODE": "offline"}) as process:
        for _ in range(2):
            process.check(*command, *more, *few)
    (run_id,) = {path.name for path in (tmp_path / "runs" / "first" / "wandb").glob("offline-*/run-*.wandb")}
    assert (tmp_path / "runs" / "first" / "wandb.id").read_text() in run_id
    first, _ = sorted((tmp_path / "runs" / "first" / "wandb").glob("offline-*/run-*.wandb"))
    logged = first.read_bytes()
    assert all(name in logged for name in (b"train/loss", b"eval/top1", b"lr_batch_size"))


def test_wandb_is_not_sent_the_signature_of_a_url(tmp_path):
    url = "http://me:PASSWORD@host/p.tar?X-Amz-Signature=SECRET"
    (tmp_path / "recipe.yaml").write_text(f"data: {{train: '{url}', val: seen}}")
    code = (
        "from pathlib import Path; from tokenlabel.runtime.runlog import WandB; tracker = WandB(Path('.')); "
        "tracker.__enter__()({'step': 1, 'kind': 'train', 'loss': 1.0}); tracker.__exit__()"
    )
    words, environment = ["--data.train", url], {**os.environ, "WANDB_MODE": "offline"}
    subprocess.run([sys.executable, "-c", code, *words], cwd=tmp_path, env=environment, check=True)
    sent = b"".join(path.read_bytes() for path in (tmp_path / "wandb").rglob("*") if path.is_file())
    assert b"http://host/p.tar" in sent
    assert b"seen" in sent
    assert not [secret for secret in (b"PASSWORD", b"SECRET") if secret in sent]


def test_wandb_without_a_login_is_one_line(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    code = "from pathlib import Path; from tokenlabel.runtime.runlog import WandB; WandB(Path('.')).__enter__()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment | {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none")},
        capture_output=True,
        text=True,
    )
    assert "ConfigError: --wandb: No API key" in done.stderr.splitlines()[-1]
    assert done.stderr.rstrip().endswith("log in by `wandb login`, or set WANDB_MODE=offline")


def test_a_run_tells_its_trackers_what_it_writes(tmp_path):
    write_scenes(tmp_path / "scenes", num_train=40, num_val=20, seed=0)
    write_labels(tmp_path / "scenes" / "masks" / "train", tmp_path / "labels")
    recipe = config_from_dict({**nested_recipe(tmp_path / "scenes"), "epochs": 2}, Recipe, name="recipe")
    heard = []
    train(recipe, tmp_path / "run", device=torch.device("cpu"), trackers=[heard.append])
    assert heard == read_metrics(tmp_path / "run")
    assert {line["kind"] for line in heard} == {"train", "eval"}


def test_a_tracker_is_opened_in_a_folder_that_is_locked(tmp_path):
    class Tracker:
        entered = exited = 0

        def __enter__(self):
            self.entered += 1
            return self

        def __exit__(self, *_):
            self.exited += 1

        def __call__(self, line):
            raise AssertionError(line)

    tracker = Tracker()
    recipe = config_from_dict(nested_recipe(tmp_path / "nowhere"), Recipe, name="recipe")
    with locked(tmp_path / "run", Ranks()), pytest.raises(ConfigError, match="another process trains"):
        train(recipe, tmp_path / "run", device="cpu", trackers=[tracker])
    assert (tracker.entered, tracker.exited) == (0, 0)
    with pytest.raises(ValueError, match="nowhere"):
        train(recipe, tmp_path / "run", device="cpu", trackers=[tracker])
    assert (tracker.entered, tracker.exited) == (1, 1)
