"""The trainer: what a run leaves, and that stopping it anywhere changes nothing."""

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from golden_values import GOLDEN, draw_weights
from PIL import Image
from safetensors.torch import load_file

from tokenlabel.classification.task import build, train
from tokenlabel.core.config import Inference
from tokenlabel.core.scores import from_mask
from tokenlabel.data.scenes import write_scenes
from tokenlabel.data.tars import TarImages
from tokenlabel.labels.manifest import Manifest
from tokenlabel.labels.store import LabelStore
from tokenlabel.labels.writer import LabelStoreWriter
from tokenlabel.models.runs import list_checkpoints
from tokenlabel.runtime.configuration import config_from_dict
from tokenlabel.runtime.distributed import Ranks
from tokenlabel.runtime.errors import ConfigError
from tokenlabel.runtime.process import Interrupted
from tokenlabel.runtime.runlog import Stopwatch, read_metrics
from tokenlabel.training.checkpoint import load_run
from tokenlabel.training.engine import run_task
from tokenlabel.training.recipe import Recipe
from tokenlabel.training.trainer import prepare, train_step

CPU = torch.device("cpu")
NUM_STEPS = 15  # 40 scenes, 8 a step, 3 epochs


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Scenes with a label store made from their true masks."""
    root = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(root, num_train=40, num_val=20, seed=0)
    write_labels(root / "masks" / "train", root.parent / "labels")
    return root


def write_labels(masks, folder):
    """A store as of a teacher of masks: pixels without a class are even distributions."""
    manifest = Manifest(num_classes=10, class_names=tuple(str(c) for c in range(10)), topk=1, empty_is_even=True)
    with LabelStoreWriter(folder, manifest) as writer:
        for path in sorted(masks.rglob("*.png")):
            score_map = from_mask(np.asarray(Image.open(path)), num_classes=10)
            writer.add(path.relative_to(masks).as_posix(), replace(score_map, empty_is_even=True))


def nested_recipe(scenes, **changes):
    recipe = {
        "data": {
            "train": str(scenes / "train"),
            "val": str(scenes / "val"),
            "labels": str(scenes.parent / "labels"),
            "num_workers": 0,
        },
        "model": {
            "name": "lvvit_t",
            "img_size": [24, 24],
            "options": {"patch_size": 6, "depth": 2, "width": 16, "num_heads": 2, "stem_width": 8, "drop_path": 0.2},
        },
        "optim": {"lr": 2e-3, "lr_batch_size": 8, "warmup_epochs": 1, "ema_decay": 0.9},
        "augment": {"crop_scale": [0.35, 1.0]},
        "mix": {"kind": "mixtoken"},
        "eval": {"every_epochs": 2, "crop_fraction": 1.0},
        "epochs": 3,
        "batch_size": 8,
        "checkpoint": {"every_epochs": 0.4},  # every 2 of 5 steps
    }
    for dotted, value in changes.items():
        *parents, last = dotted.split("__")
        place = recipe
        for parent in parents:
            place = place[parent]
        place[last] = value
    return recipe


def recipe_for(scenes, **changes):
    return config_from_dict(nested_recipe(scenes, **changes), Recipe, name="test")


def weights_of(run):
    (folder,) = list_checkpoints(run)[-1:]
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_a_run_leaves_its_recipe_metrics_and_model(scenes, tmp_path):
    recipe = recipe_for(scenes)
    evaluation = train(recipe, tmp_path / "run", device=CPU)
    assert evaluation["num_images"] == 20
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [10, NUM_STEPS]
    last = [line for line in lines if line["kind"] == "train"][-1]
    assert last["step"] == NUM_STEPS
    assert {"loss", "class_loss", "token_loss", "gradient_norm", "lr", "images_per_s", "targets_share"} <= set(last)
    assert last["loss"] == pytest.approx(last["class_loss"] + 0.5 * last["token_loss"])
    assert load_run(tmp_path / "run").class_names == tuple(map(str, range(10)))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mixtoken", {}),
        ("cutmix_erase", {"mix__kind": "cutmix", "erase": {"probability": 0.5}}),
        ("class", {"loss": {"beta": 0.0}}),
    ],
)
def test_every_step_gives_the_losses_that_it_always_gave(scenes, name, changes):
    task = build(recipe_for(scenes, **changes), device=CPU)
    draw_weights(task.model)
    training = prepare(task, Ranks())
    batches = iter(training.task.batches(training.sampler(0)))
    expected = json.loads((GOLDEN / "training.json").read_text())[name]
    for step, losses in enumerate(expected):
        values = train_step(training, batches, step, Stopwatch()).values
        found = [float(values[part]) for part in ("class_loss", "token_loss", "gradient_norm")]
        assert found == pytest.approx(losses, abs=2e-3 if step else 2e-5)


def test_training_learns_its_images_by_heart(scenes, tmp_path):
    recipe = recipe_for(
        scenes,
        epochs=60,
        mix__kind="none",
        augment={"crop_scale": [0.95, 1.0], "horizontal_flip": 0.0},
        eval__every_epochs=60,
        checkpoint__every_epochs=60,
        optim__lr=5e-3,
        model__options={"patch_size": 6, "depth": 2, "width": 32, "num_heads": 2, "stem_width": 16},
        loss={"label_smoothing": 0.0},
    )
    task = build(recipe, device=CPU)
    draw_weights(task.model)
    run_task(task, tmp_path / "run", ranks=Ranks(), eval_every_epochs=60)
    lines = [line for line in read_metrics(tmp_path / "run") if line["kind"] == "train"]
    assert lines[-1]["class_loss"] < lines[0]["class_loss"] - 0.4
    assert lines[-1]["token_loss"] < lines[0]["token_loss"] - 0.006  # most of a scene is background


def test_the_same_recipe_gives_the_same_weights_whatever_the_number_of_workers(scenes, tmp_path):
    train(recipe_for(scenes), tmp_path / "one", device=CPU)
    train(recipe_for(scenes, data__num_workers=2), tmp_path / "two", device=CPU)
    assert weights_of(tmp_path / "one") == weights_of(tmp_path / "two")


def test_labels_in_two_folders_are_read_as_one(scenes, tmp_path):
    whole = LabelStore(scenes.parent / "labels")
    halves = [str(tmp_path / name) for name in ("even", "odd")]
    for number, folder in enumerate(halves):
        with LabelStoreWriter(folder, whole.manifest) as writer:
            for key in [*whole.keys()][number::2]:
                writer.add_record(key, whole.packed(key))
    train(recipe_for(scenes, epochs=1), tmp_path / "one", device=CPU)
    train(recipe_for(scenes, epochs=1, data__labels=halves), tmp_path / "two", device=CPU)
    assert weights_of(tmp_path / "one") == weights_of(tmp_path / "two")


def test_another_seed_gives_other_weights(scenes, tmp_path):
    train(recipe_for(scenes), tmp_path / "one", device=CPU)
    train(recipe_for(scenes, seed=1), tmp_path / "two", device=CPU)
    assert weights_of(tmp_path / "one") != weights_of(tmp_path / "two")


def test_a_finished_run_is_not_trained_again(scenes, tmp_path):
    first = train(recipe_for(scenes), tmp_path / "run", device=CPU)
    before = weights_of(tmp_path / "run")
    again = train(recipe_for(scenes), tmp_path / "run", device=CPU)
    assert weights_of(tmp_path / "run") == before
    assert again == first
    evals = [line["step"] for line in read_metrics(tmp_path / "run") if line["kind"] == "eval"]
    assert evals == sorted(set(evals))


def test_an_evaluation_that_a_kill_prevented_is_made_up_for(scenes, tmp_path):
    """The checkpoint is written first: whoever stops a run may not wait for the evaluation."""
    first = train(recipe_for(scenes), tmp_path / "run", device=CPU)
    lines = read_metrics(tmp_path / "run")
    assert lines[-1]["kind"] == "eval"
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:-1]))
    best = tmp_path / "run" / "checkpoints" / "best"
    best.unlink()
    again = train(recipe_for(scenes), tmp_path / "run", device=CPU)
    assert (best / "state.json").exists()
    assert again["top1"] == first["top1"]
    assert [line["kind"] for line in read_metrics(tmp_path / "run")] == [line["kind"] for line in lines]


def test_a_signal_during_an_evaluation_is_obeyed_after_it(scenes, tmp_path, monkeypatch):
    task = build(recipe_for(scenes, checkpoint__every_epochs=500), device=CPU)
    evaluate = task.evaluate

    def stopped(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*arguments, **options)

    laps, lap = [], Stopwatch.lap
    monkeypatch.setattr(Stopwatch, "lap", lambda watch: laps.append(lap(watch)) or laps[-1])
    monkeypatch.setattr(task, "evaluate", stopped)
    with pytest.raises(Interrupted) as stop:
        run_task(task, tmp_path / "run", ranks=Ranks(), eval_every_epochs=1)
    evals = [line["step"] for line in read_metrics(tmp_path / "run") if line["kind"] == "eval"]
    assert [int(folder.name) for folder in list_checkpoints(tmp_path / "run")] == evals
    assert f"step {evals[0]:,}" in str(stop.value)
    assert len(laps) == 1  # no time of the reported steps was dropped with that of the evaluation


def test_a_token_head_that_does_not_learn_is_not_evaluated(scenes, capsys, monkeypatch):
    task = build(recipe_for(scenes, loss={"beta": 0.0}, eval__inference="combined"), device=CPU)
    assert "class logits are evaluated, not eval.inference combined" in capsys.readouterr().err
    assert task.inference is Inference.CLASS
    assert build(recipe_for(scenes, eval__inference="combined"), device=CPU).inference is Inference.COMBINED
    monkeypatch.setattr("tokenlabel.classification.task.current_ranks", lambda: Ranks(1, 50))
    with pytest.raises(ValueError, match="20 images don't give each of 50 processes one"):  # at once
        replace(task)


def test_copies_of_checkpoints_are_left_alone(scenes, tmp_path):
    train(recipe_for(scenes), tmp_path / "run", device=CPU)
    newest = list_checkpoints(tmp_path / "run")[-1]
    shutil.copytree(newest, newest.with_name(f"{newest.name}-backup"))
    assert list_checkpoints(tmp_path / "run")[-1] == newest


def test_intervals_and_numbers_that_mean_nothing_are_refused(scenes):
    with pytest.raises(ConfigError, match=r"checkpoint\.keep must be at least 1, got 0"):
        recipe_for(scenes, checkpoint__keep=0)
    with pytest.raises(ConfigError, match=r"eval\.every_epochs must be above 0, got 0"):
        recipe_for(scenes, eval__every_epochs=0)


def test_the_folder_of_another_run_is_not_touched(scenes, tmp_path):
    train(recipe_for(scenes), tmp_path / "run", device=CPU)
    before = weights_of(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"another recipe \(loss.beta|epochs: 3 there, 4 here"):
        train(recipe_for(scenes, epochs=4), tmp_path / "run", device=CPU)
    assert weights_of(tmp_path / "run") == before


def test_without_labels_the_token_head_stays_as_it_was_made(scenes, tmp_path):
    nested = nested_recipe(scenes, loss={"beta": 0.0})
    del nested["data"]["labels"]
    recipe = config_from_dict(nested, Recipe, name="test")
    made = {name: weight.clone() for name, weight in build(recipe, device=CPU).model.state_dict().items()}
    train(recipe, tmp_path / "run", device=CPU)
    trained = load_file(list_checkpoints(tmp_path / "run")[-1] / "model.safetensors")
    same = {name for name, weight in trained.items() if torch.equal(weight, made[name])}
    assert {"token_head.weight", "token_head.bias"} <= same
    assert {"backbone.head.weight", "backbone.head.bias"}.isdisjoint(same & trained.keys())
    assert len(same) < len(trained) / 4


def test_fine_tuning_begins_with_the_weights_of_another_run(scenes, tmp_path):
    train(recipe_for(scenes), tmp_path / "first", device=CPU)
    (folder,) = list_checkpoints(tmp_path / "first")[-1:]
    frozen = recipe_for(scenes, epochs=1, model__weights=str(folder), model__frozen_layers=1, optim__ema_decay=None)
    train(frozen, tmp_path / "second", device=CPU)
    before, after = (load_file(folder / "model.safetensors"), load_run(tmp_path / "second").model.state_dict())
    layers = load_run(tmp_path / "second").model.layers()
    assert all(torch.equal(after[name], before[name]) == (layer == 0) for name, layer in layers.items())


def test_a_loss_that_is_not_a_number_stops_the_run_and_is_not_saved(scenes, tmp_path):
    every_step = {"every_epochs": 0.2}
    recipe = recipe_for(scenes, optim__lr=1e30, optim__warmup_lr=1e30, checkpoint=every_step)
    with pytest.raises(ValueError, match=r"optim\.lr"):
        train(recipe, tmp_path / "run", device=CPU)
    saved = list_checkpoints(tmp_path / "run")
    assert saved
    for folder in saved:
        assert all(torch.isfinite(w).all() for w in load_run(folder).model.state_dict().values())


def kill_until_done(recipe, run, *, kills, rng):
    """Kill a run at random moments after its first new line of metrics, then let it end; return how many hit."""
    processes = multiprocessing.get_context("forkserver")  # imports once, then starts processes at once
    processes.set_forkserver_preload(["tokenlabel.classification.task"])
    for hits in range(kills + 1):
        process = processes.Process(target=train, args=(recipe, run), kwargs={"device": CPU})
        seen = len(read_metrics(run))
        process.start()
        while hits < kills and process.is_alive() and len(read_metrics(run)) <= seen:
            time.sleep(0.005)
        if hits < kills:
            time.sleep(rng.uniform(0, 0.15))
            process.kill()
        process.join()
        if process.exitcode == 0:
            return hits
        assert process.exitcode == -signal.SIGKILL
    raise AssertionError("the run that was not killed did not end well")


def check_kills(scenes, tmp_path, *, kills, epochs):
    # Evaluating after every few steps gives the test a sign of life to wait for.
    recipe = recipe_for(scenes, epochs=epochs, eval__every_epochs=0.4)
    train(recipe, tmp_path / "unbroken", device=CPU)
    assert kill_until_done(recipe, tmp_path / "killed", kills=kills, rng=random.Random(0)) == kills
    assert weights_of(tmp_path / "killed") == weights_of(tmp_path / "unbroken")
    traces = [
        [line["step"] for line in read_metrics(tmp_path / name) if line["kind"] == "eval"]
        for name in ("killed", "unbroken")
    ]
    assert traces[0] == traces[1]


def test_a_run_killed_three_times_ends_with_the_same_weights(scenes, tmp_path):
    check_kills(scenes, tmp_path, kills=3, epochs=15)


@pytest.mark.long
def test_a_run_killed_twenty_times_ends_with_the_same_weights(scenes, tmp_path):
    check_kills(scenes, tmp_path, kills=20, epochs=150)


def start(nested, run):
    """Start a run in a process of its own, from the command line."""
    path = run.with_suffix(".json")  # JSON is YAML
    path.write_text(json.dumps(nested))
    words = [sys.executable, "-m", "tokenlabel", "train", "--recipe", path, "--run", run, "--device", "cpu"]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_tar_files_are_read_one_after_the_other(scenes, tmp_path):
    tars = tmp_path / "tars"
    tars.mkdir()
    for part in range(4):
        with tarfile.open(tars / f"{part}.tar", "w") as tar:
            for path in sorted((scenes / "train").rglob("*.png"))[part::4]:
                tar.add(path, path.relative_to(scenes / "train"))
    recipe = recipe_for(scenes, data__train=str(tars), data__tar_window=1, batch_size=5)
    task = build(recipe, device=CPU)
    seen = [index for batch in prepare(task, Ranks()).sampler(0) for _, index in batch]
    source = task.train_set.source
    assert isinstance(source, TarImages)
    files = [int(source.groups[index]) for index in seen[:40]]
    assert sorted(seen[:40]) == list(range(40))
    assert max(abs(i - j) for i in range(40) for j in range(40) if files[i] == files[j]) < 20
    assert seen[40:80] != seen[:40]
    train(recipe, tmp_path / "run", device=CPU)
    with pytest.raises(ConfigError, match="tar_window is for images in tar files"):
        train(recipe_for(scenes, data__tar_window=1), tmp_path / "other", device=CPU)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_asked_to_stop_saves_its_state_first(scenes, tmp_path, number):
    run = tmp_path / "run"
    process = start(nested_recipe(scenes, epochs=500, checkpoint__every_epochs=500), run)
    while process.poll() is None and not read_metrics(run):
        time.sleep(0.05)
    process.send_signal(number)
    output, _ = process.communicate()
    assert process.returncode == 128 + number, output
    (step,) = (int(number.replace(",", "")) for number in re.findall(r"stopped after step ([\d,]+)", output))
    assert [int(folder.name) for folder in list_checkpoints(run)] == [step]
    assert "Traceback" not in output
