"""The engine: parts, precisions, processes, what is kept, and what it says when something is wrong."""

import itertools
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_train import CPU, nested_recipe, recipe_for, scenes, start, weights_of  # noqa: F401  (scenes is a fixture)
from training_ranks import train_together

from tokenlabel.classification.task import build, train
from tokenlabel.core.scores import from_mask
from tokenlabel.labels.store import LabelStore
from tokenlabel.labels.writer import LabelStoreWriter
from tokenlabel.models.runs import list_checkpoints
from tokenlabel.runtime.distributed import Ranks
from tokenlabel.runtime.errors import ConfigError, FirstRankError, OutputError
from tokenlabel.runtime.runlog import Stopwatch, read_metrics
from tokenlabel.training.checkpoint import load_run
from tokenlabel.training.engine import run_task
from tokenlabel.training.trainer import prepare, train_step

# No BatchNorm, whose statistics are those of a part, and no drop path: so nothing depends on the parts.
VIT = {
    "name": "vit_tiny_patch16_224",
    "img_size": [24, 24],
    "options": {"patch_size": 6, "depth": 2, "embed_dim": 8, "num_heads": 2},
}


def recipe_in_groups(scenes, **changes):  # noqa: F811
    return recipe_for(scenes, **({"model": VIT, "mix__group_size": 2, "erase": {"probability": 0.5}} | changes))


def losses_of(recipe, *, num_steps=4):
    training = prepare(build(recipe, device=CPU), Ranks())
    batches = iter(training.task.batches(training.sampler(0)))
    results = [train_step(training, batches, step, Stopwatch()) for step in range(num_steps)]
    return [[float(value) for value in result.values.values()] for result in results]


@pytest.fixture(scope="module")
def plain_losses(scenes):  # noqa: F811
    return losses_of(recipe_in_groups(scenes))


@pytest.mark.parametrize("changes", [{"micro_batch_size": 2}, {"micro_batch_size": 4}, {"micro_batch_size": 100}])
def test_parts_of_a_batch_add_up_to_it(scenes, plain_losses, changes):  # noqa: F811
    for found, expected in zip(losses_of(recipe_in_groups(scenes, **changes)), plain_losses, strict=True):
        assert found == pytest.approx(expected, abs=1e-5)


def test_recomputed_activations_give_the_same_losses(scenes):  # noqa: F811
    found = losses_of(recipe_for(scenes, grad_checkpointing=True))  # with BatchNorm and drop path
    for ours, theirs in zip(found, losses_of(recipe_for(scenes)), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


def test_a_compiled_model_gives_the_same_losses(scenes, tmp_path):  # noqa: F811
    """From the command line: PyTorch cannot compile the checks of shapes that tests add to every function."""
    process = start(nested_recipe(scenes, compile="aot_eager", epochs=2), tmp_path / "compiled")
    output, _ = process.communicate()
    assert process.returncode == 0, output
    train(recipe_for(scenes, epochs=2), tmp_path / "plain", device=CPU)
    ours, theirs = ([line["loss"] for line in read_metrics(tmp_path / name)] for name in ("compiled", "plain"))
    assert ours == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_gives_about_the_same_losses(scenes, plain_losses, precision):  # noqa: F811
    found = losses_of(recipe_in_groups(scenes, precision=precision))
    assert found != plain_losses
    for ours, theirs in zip(found, plain_losses, strict=True):
        assert ours[:3] == pytest.approx(theirs[:3], abs=0.05)


def test_a_scaled_loss_that_overflows_skips_the_step_and_says_so(scenes):  # noqa: F811
    training = prepare(build(recipe_in_groups(scenes, precision="fp16"), device=CPU), Ranks())
    batches = iter(training.task.batches(training.sampler(0)))
    scaler = training.state.scaler
    assert scaler is not None
    for scale, skipped in ((1e30, 1), (1.0, 0)):
        scaler.load_state_dict(scaler.state_dict() | {"scale": scale})
        before = [weight.detach().clone() for weight in training.task.model.parameters()]
        values = train_step(training, batches, 1, Stopwatch()).values
        same = [torch.equal(a, b) for a, b in zip(before, training.task.model.parameters(), strict=True)]
        assert float(values["skipped"]) == skipped
        assert all(same) == bool(skipped)


def test_a_scaled_loss_goes_on_where_it_was(scenes, tmp_path):  # noqa: F811
    recipe = recipe_in_groups(scenes, precision="fp16", checkpoint={"every_epochs": 1, "keep": 9})
    train(recipe, tmp_path / "run", device=CPU)
    unbroken = weights_of(tmp_path / "run")
    _, *later = list_checkpoints(tmp_path / "run")
    assert later
    for folder in later:
        shutil.rmtree(folder)
    train(recipe, tmp_path / "run", device=CPU)
    assert weights_of(tmp_path / "run") == unbroken


def test_a_run_may_count_steps_in_place_of_epochs(scenes, tmp_path):  # noqa: F811
    train(recipe_in_groups(scenes, epochs=None, num_steps=7), tmp_path / "run", device=CPU)
    assert load_run(tmp_path / "run").step == 7


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"epochs": None}, "epochs or num_steps"),
        ({"batch_size": 0}, "batch_size"),
        ({"micro_batch_size": 3}, "batch_size 8 over 1 processes in parts of 3"),
        ({"mix__group_size": 3}, "mix.group_size 3 does not divide the 8 images"),
        ({"sync_batchnorm": True}, "sync_batchnorm is for GPUs"),
        ({"sharded": True}, "sharded"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(scenes, tmp_path, changes, words):  # noqa: F811
    with pytest.raises(ValueError, match=words):
        train(recipe_in_groups(scenes, **changes), tmp_path / "run", device=CPU)


def test_what_the_processes_cannot_train_by_is_refused_before_images_are_looked_at(tmp_path):
    for changes in ({"micro_batch_size": 3}, {"sync_batchnorm": True}, {"sharded": True}, {"mix__group_size": 3}):
        with pytest.raises(ConfigError, match=next(iter(changes)).replace("__", ".")):
            train(recipe_in_groups(tmp_path / "nowhere", **changes), tmp_path / "run", device=CPU)


def test_the_newest_the_best_and_every_so_many_are_kept(scenes, tmp_path):  # noqa: F811
    keep = {"every_epochs": 1, "keep": 1, "keep_every_epochs": 4}
    recipe = recipe_in_groups(scenes, epochs=9, checkpoint=keep, eval__every_epochs=1)
    train(recipe, tmp_path / "run", device=CPU)
    evals = {line["step"]: line["top1"] for line in read_metrics(tmp_path / "run") if line["kind"] == "eval"}
    best = load_run(tmp_path / "run" / "checkpoints" / "best").step
    assert evals[best] == max(evals.values())
    assert {int(folder.name) for folder in list_checkpoints(tmp_path / "run")} == {20, 40, 45, best}


def test_a_loss_that_is_not_a_number_names_the_step_and_its_images(scenes, tmp_path):  # noqa: F811
    recipe = recipe_in_groups(scenes, optim__lr=1e30, optim__warmup_lr=1e30)
    with pytest.raises(ValueError, match=r"at step 1 on the images \d/\d+\.png, .* lies in .*diverged") as stop:
        train(recipe, tmp_path / "run", device=CPU)
    assert "optim.lr" in str(stop.value)
    (folder,) = list_checkpoints(tmp_path / "run" / "diverged")
    assert not all(torch.isfinite(w).all() for w in load_run(folder).model.state_dict().values())


def test_a_gradient_that_is_not_a_number_is_no_checkpoint(scenes, tmp_path, monkeypatch):  # noqa: F811
    """The loss of that step was still a number; the weights that it moved are not."""
    recipe = recipe_in_groups(scenes, checkpoint={"every_epochs": 0.4, "keep": 1})  # every 2 steps
    task = build(recipe, device=CPU)
    losses, calls = task.step.forward, itertools.count(1)

    def failing(*arguments):
        found = losses(*arguments)
        if next(calls) == 4:
            found["loss"] = found["loss"] + (found["loss"] * 0).sqrt()  # 0, of infinite slope
        return found

    monkeypatch.setattr(task.step, "forward", failing)
    with pytest.raises(ValueError, match="norm of the gradient was nan at step 3"):
        run_task(task, tmp_path / "run", ranks=Ranks(), eval_every_epochs=100)
    (folder,) = list_checkpoints(tmp_path / "run")
    assert int(folder.name) == 2
    assert all(torch.isfinite(w).all() for w in load_run(folder).model.state_dict().values())


def test_an_evaluation_with_outputs_that_are_no_numbers_costs_no_run(scenes, tmp_path, capsys, monkeypatch):  # noqa: F811
    def refused(*arguments, **others):
        raise OutputError("the outputs of the network for 1 images (a.png) are not finite in bf16")

    recipe = recipe_in_groups(scenes, epochs=1)
    task = build(recipe, device=CPU)
    monkeypatch.setattr(task, "evaluate", refused)
    assert run_task(task, tmp_path / "run", ranks=Ranks(), eval_every_epochs=1) == {}
    assert "step 5: not evaluated: the outputs of the network for 1 images (a.png)" in capsys.readouterr().err
    assert int(list_checkpoints(tmp_path / "run")[-1].name) == 5
    assert not [line for line in read_metrics(tmp_path / "run") if line["kind"] == "eval"]


def test_a_run_that_is_all_warm_up_says_so(scenes, tmp_path, capsys):  # noqa: F811
    train(recipe_in_groups(scenes, epochs=1, optim__warmup_epochs=5), tmp_path / "run", device=CPU)
    assert "leave the schedule nothing of the 5 steps" in capsys.readouterr().err


def test_a_threshold_that_no_token_reaches_is_said(scenes, tmp_path, capsys):  # noqa: F811
    unsure = replace(from_mask(np.full((4, 4), -1), num_classes=10, unlabelled=-1), empty_is_even=True)
    with LabelStoreWriter(tmp_path / "labels", LabelStore(scenes.parent / "labels").manifest) as writer:
        for path in (scenes / "train").rglob("*.png"):
            writer.add(path.relative_to(scenes / "train").as_posix(), unsure)
    changes = {"data__labels": str(tmp_path / "labels"), "loss": {"tokens": "confident"}}
    train(recipe_in_groups(scenes, epochs=1, **changes), tmp_path / "run", device=CPU)
    said = "token_loss is 0 in the first 2 steps: none of their tokens has a label as sure as loss.token_threshold 0.5"
    assert said in capsys.readouterr().err


def test_an_average_that_stays_at_the_initial_weights_is_said(scenes, tmp_path, capsys):  # noqa: F811
    changes = {"optim__ema_decay": 0.9999, "optim__ema_warmup": False}
    train(recipe_in_groups(scenes, epochs=1, **changes), tmp_path / "run", device=CPU)
    said = "the averaged weights, which are evaluated, will be 100% the initial ones after 5 steps"
    assert said in capsys.readouterr().err


def test_what_fails_on_the_first_rank_fails_on_all(monkeypatch):
    told: list = []
    monkeypatch.setattr(Ranks, "broadcast", lambda self, value: told.append(value) or told[0])

    def fail():
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        Ranks(0, 2).on_main(fail)
    with pytest.raises(FirstRankError, match="disk full"):
        Ranks(1, 2).on_main(fail)
    told.clear()
    assert Ranks(0, 2).on_main(lambda: 3) == 3
    assert Ranks(1, 2).on_main(fail) == 3


def some_labels(scenes, folder):  # noqa: F811
    """Labels of all images but four."""
    store = LabelStore(scenes.parent / "labels")
    with LabelStoreWriter(folder / "labels", store.manifest) as writer:
        for key in sorted(store.keys())[4:]:
            writer.add_record(key, store.packed(key))
    return str(folder / "labels")


def weights_differ_by(one, other):
    ours, theirs = (load_file(list_checkpoints(run)[-1] / "model.safetensors") for run in (one, other))
    return max(float((ours[name] - theirs[name]).abs().max()) for name in theirs)


def test_two_processes_train_as_one(scenes, tmp_path):  # noqa: F811
    changes = {"checkpoint": {"every_epochs": 1, "keep": 9}}
    alone = recipe_in_groups(scenes, **changes)
    train(alone, tmp_path / "alone", device=CPU)
    cases = {"together": {}, "in parts": {"micro_batch_size": 2}, "sharded": {"sharded": True}}
    recipes = {tmp_path / name: recipe_in_groups(scenes, **changes, **more) for name, more in cases.items()}
    # What a map says of the class token counts by the same constant as what it says of tokens.
    few = {"data__labels": some_labels(scenes, tmp_path), "loss": {"class_target": "teacher"}}
    recipes[tmp_path / "few"] = recipe_in_groups(scenes, **changes, **few)
    train(recipes[tmp_path / "few"], tmp_path / "few alone", device=CPU)
    recipes[tmp_path / "bare"] = recipe_in_groups(scenes, epochs=1, data__labels=None)
    continued = shutil.copytree(tmp_path / "alone", tmp_path / "continued")  # `best` becomes a folder
    _, *later = list_checkpoints(continued)
    assert later
    for folder in later:
        shutil.rmtree(folder)
    recipes[continued] = recipes[tmp_path / "sharded"]
    stopped = tmp_path / "stopped"
    recipes[stopped] = recipe_in_groups(scenes, epochs=10_000, checkpoint={"every_epochs": 10_000})
    (stops, reads), (other_stops, other_reads) = train_together(recipes, stopped=[stopped])

    for name, other in [*((name, "alone") for name in cases), ("few", "few alone")]:
        expected = [line for line in read_metrics(tmp_path / other) if line["kind"] == "train"]
        found = [line for line in read_metrics(tmp_path / name) if line["kind"] == "train"]
        for part in ("loss", "class_loss", "token_loss", "gradient_norm"):
            assert [line[part] for line in found] == pytest.approx([line[part] for line in expected], abs=1e-5)
        assert weights_differ_by(tmp_path / name, tmp_path / other) < 1e-4
        first, last = (
            [line for line in read_metrics(tmp_path / run) if line["kind"] == "eval"][-1] for run in (other, name)
        )
        assert (last["num_images"], last["top1"]) == (20, first["top1"])
        assert last["loss"] == pytest.approx(first["loss"], abs=1e-4)

    # Asked to stop on one rank, both saved the same step.
    assert stops == other_stops
    assert f"{load_run(stopped).step:,}" in stops[stopped]

    # The first rank looks once at images of which no teacher has said anything: 20 to evaluate on, 40 without labels.
    assert {run.name: len(keys) for run, keys in reads.items()} == {
        **dict.fromkeys([*cases, "continued", "stopped"], 20),
        "few": 24,
        "bare": 60,
    }
    assert not any(other_reads.values())

    # What one process began, two go on with, the model divided among them; and the other way round.
    assert weights_differ_by(continued, tmp_path / "alone") < 1e-4
    for name in ("together", "sharded"):
        for folder in list_checkpoints(tmp_path / name)[1:]:
            shutil.rmtree(folder)
        (tmp_path / name / "recipe.yaml").write_text((tmp_path / "alone" / "recipe.yaml").read_text())
        train(alone, tmp_path / name, device=CPU)
        assert weights_differ_by(tmp_path / name, tmp_path / "alone") < 1e-4


def test_processes_that_do_not_divide_the_batch_are_refused(scenes):  # noqa: F811
    task = build(recipe_in_groups(scenes), device=CPU)
    with pytest.raises(ConfigError, match="batch_size 8 over 3 processes"):
        prepare(task, Ranks(world_size=3))
