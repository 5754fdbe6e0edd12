"""Whose a run folder is: what a run may go on with, what it reads at its start, and who else trains there."""

import contextlib
import errno
import json
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from segment_cases import nested_recipe as nested_segments
from test_engine import VIT
from test_train import CPU, nested_recipe, scenes, weights_of  # noqa: F401  (scenes is a fixture)

import tokenlabel as tl
from tokenlabel import cli
from tokenlabel.classification.task import ClassifierTask, build, train
from tokenlabel.cli import main
from tokenlabel.core.align import align
from tokenlabel.core.batch import collate_score_maps, normalize_images
from tokenlabel.core.config import LogitsMode
from tokenlabel.core.losses import sparse_cross_entropy
from tokenlabel.core.scores import Kind, from_top, unknown_map
from tokenlabel.core.step import make_targets, student_loss
from tokenlabel.data.batches import collate
from tokenlabel.data.decoding import ImageCheck
from tokenlabel.data.images import ImageFiles
from tokenlabel.data.sources import open_images
from tokenlabel.evaluation.assessment import evaluation_set
from tokenlabel.labels.store import LabelStore
from tokenlabel.labels.writer import LabelStoreWriter
from tokenlabel.models.runs import list_checkpoints
from tokenlabel.runtime import distributed
from tokenlabel.runtime.configuration import config_from_dict
from tokenlabel.runtime.distributed import Ranks, current_ranks, joined_ranks
from tokenlabel.runtime.errors import ConfigError, DataError, FirstRankError
from tokenlabel.runtime.runlog import read_metrics
from tokenlabel.segmentation.recipe import SegmentRecipe
from tokenlabel.segmentation.task import train_segmentation
from tokenlabel.training import engine
from tokenlabel.training.recipe import Recipe
from tokenlabel.training.run_folder import LOCK_FILE, check_run_folder, locked
from tokenlabel.training.run_images import sound_images


def nested(data, **changes):
    checkpoint = {"every_epochs": 1, "keep": 9, "keep_best": False}
    plain = {"model": VIT, "eval__every_epochs": 9, "epochs": 2, "checkpoint": checkpoint}
    return nested_recipe(data / "scenes", **(plain | changes))


def recipe(data, **changes):
    return config_from_dict(nested(data, **changes), Recipe, name="test")


@pytest.fixture(scope="module")
def stopped(scenes, tmp_path_factory):  # noqa: F811
    """Data and a run in a folder each, the run stopped after its first epoch (5 steps of 10)."""
    root = tmp_path_factory.mktemp("stopped")
    shutil.copytree(scenes.parent, root / "data")
    with contextlib.chdir(root):
        train(recipe(Path("data")), Path("run"), device=CPU)
    shutil.rmtree(list_checkpoints(root / "run")[-1])
    (root / "recipe.json").write_text(json.dumps(nested(Path("data"))))
    return root


@pytest.fixture
def here(stopped, tmp_path, monkeypatch):
    """A copy of them, as the current folder."""
    shutil.copytree(stopped, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def continued(*words, run="./run"):
    return main(["train", "--recipe", "recipe.json", f"--out={run}", "--device", "cpu", *words])


def fails_at_its_first_step(monkeypatch, *words, run="./run"):
    def fail(*_):
        raise MemoryError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "train_step", fail)
        assert continued(*words, run=run) == 2


class TestWhatMayChange:
    def test_before_the_first_checkpoint_everything_may(self, here, monkeypatch):
        fails_at_its_first_step(monkeypatch, run="new")
        (here / "data/scenes/train/0").rename(here / "data/scenes/train/zero")
        (here / "data/scenes/val/0").rename(here / "data/scenes/val/zero")
        words = ("--micro-batch-size", "4", "--seed", "3", "--loss.beta", "0", "--num_steps", "1")
        assert continued(*words, run="new") == 0
        assert "micro_batch_size: 4" in (here / "new/recipe.yaml").read_text()

    def test_what_is_learnt_may_not_and_all_that_differs_is_named(self, here, capsys):
        assert continued("--epochs", "3", "--seed=5", "--micro_batch_size=4", "--changed-numerics") == 2
        (error,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        for difference in (
            "epochs: 2 there, 3 here",
            "seed: 0 there, 5 here",
            "micro_batch_size: None there, 4 here",
            "--out",
        ):
            assert difference in error
        assert "epochs: 2" in (here / "run/recipe.yaml").read_text()

    def test_workers_checkpoints_evaluation_and_places_may(self, here, capsys):
        unbroken = here / "unbroken"
        shutil.copytree(here / "run", unbroken)
        assert continued(run="unbroken") == 0
        (here / "data").rename(here / "moved")
        assert main(["eval", "run"]) == 2
        assert "data/scenes/val: no such folder of images (the val images of its recipe" in capsys.readouterr().err
        words = ["--data.train", "./moved/scenes/train", "--data.val", "./moved/scenes/val"]
        words += ["--data.labels", "./moved/labels", "--checkpoint.keep", "1", "--eval.crop_fraction", "0.9"]
        words += ["--eval.batch-size", "8", "--data.max-missing", "0", "--data.check", "none"]
        assert continued(*words) == 0
        assert weights_of(here / "run") == weights_of(unbroken)
        assert "crop_fraction: 0.9" in (here / "run/recipe.yaml").read_text()
        more = recipe(Path("data"), data__num_workers=9)
        assert check_run_folder(unbroken, more, [*"0123456789"], None) == {}

    def test_the_initial_weights_may_be_gone(self, here):
        (here / "run").rename(here / "first")
        assert continued("--model.weights", "first") == 0
        unbroken = weights_of(here / "run")
        shutil.rmtree(list_checkpoints(here / "run")[-1])
        shutil.rmtree(here / "first")
        assert continued("--model.weights", "first") == 0
        assert weights_of(here / "run") == unbroken
        segments = segment_recipe("data/scenes", model__weights="seg")
        train_segmentation(segment_recipe("data/scenes"), Path("seg"), device=CPU)
        train_segmentation(segments, Path("more"), device=CPU)
        shutil.rmtree(list_checkpoints(Path("more"))[-1])
        shutil.rmtree("seg")
        train_segmentation(segments, Path("more"), device=CPU)

    @pytest.mark.parametrize("option", ["--micro_batch_size=4", "--precision=fp16"])
    def test_rounding_may_by_an_option_and_the_metrics_say_so(self, here, capsys, option):
        name, _, value = option[2:].partition("=")
        assert continued(option) == 2
        error = capsys.readouterr().err
        assert f"{name}: " in error
        assert "--changed-numerics" in error
        assert continued(option, "--changed-numerics", "--num_steps=10") == 2  # and no more than that
        assert continued(option, "--changed-numerics") == 0
        assert name in capsys.readouterr().err
        (line,) = [line for line in read_metrics(here / "run") if line["kind"] == "changed_numerics"]
        assert (line["step"], str(line[name][1]).lower()) == (5, value)
        assert int(list_checkpoints(here / "run")[-1].name) == 10
        assert continued(option) == 0  # the run has it now

    def test_a_change_that_was_tried_in_vain_may_be_taken_back(self, here, monkeypatch):
        fails_at_its_first_step(monkeypatch, "--precision=bf16", "--changed-numerics")
        assert [line["step"] for line in read_metrics(here / "run") if line["kind"] == "changed_numerics"] == [5]
        assert continued() == 0
        assert not [line for line in read_metrics(here / "run") if line["kind"] == "changed_numerics"]

    def test_a_change_may_be_tried_again_without_being_asked_for_again(self, here, monkeypatch):
        fails_at_its_first_step(monkeypatch, "--precision=bf16", "--changed-numerics")
        assert continued("--precision=bf16") == 0
        (line,) = [line for line in read_metrics(here / "run") if line["kind"] == "changed_numerics"]
        assert line["precision"] == ["fp32", "bf16"]

    def test_an_edited_recipe_of_the_folder_is_no_way_around(self, here, capsys):
        path = here / "run/recipe.yaml"
        path.write_text(path.read_text().replace("seed: 0", "seed: 7"))
        assert main(["train", "--recipe", "run/recipe.yaml", "--out", "run", "--device", "cpu"]) == 2
        assert "seed: 0 there, 7 here" in capsys.readouterr().err

    def test_figures_before_a_change_that_was_killed_are_not_those_after_it(self, here, capsys, monkeypatch):
        assert continued() == 0
        first = json.loads(capsys.readouterr().out)
        with monkeypatch.context() as killed:
            killed.setattr(ClassifierTask, "evaluate", lambda *_, **__: signal.raise_signal(signal.SIGINT))
            assert continued("--eval.inference=tokens") == 130
        capsys.readouterr()
        assert continued("--eval.inference=tokens") == 0
        assert json.loads(capsys.readouterr().out)["loss"] != first["loss"]

    def test_the_best_is_not_judged_by_figures_of_other_images(self, here):
        for name, how in (("other", "other images"), ("same", None)):
            shutil.copytree("run", name)
            line = {"step": 5, "kind": "eval", "top1": 2.0, **({"evaluated_as": how} if how else {})}
            with Path(name, "metrics.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
            assert continued("--checkpoint.keep-best", "true", run=name) == 0
        best = [int(Path(name, "checkpoints/best").resolve().name) for name in ("other", "same")]
        assert best == [10, 5]

    def test_the_best_stays_where_images_moved_and_figures_were_added(self, here):
        shutil.copytree("run", "moved")
        assert continued("--checkpoint.keep-best", "true") == 0
        (line,) = [line for line in read_metrics(here / "run") if line["kind"] == "eval"]
        with Path("moved/metrics.jsonl").open("a") as file:
            file.write(json.dumps(line | {"step": 5, "top1": 2.0}) + "\n")
        Path("data/scenes/val").rename("data/elsewhere")
        words = ("--data.val", "data/elsewhere", "--eval.probe", "data/elsewhere")
        assert continued("--checkpoint.keep-best", "true", *words, run="moved") == 0
        assert int(Path("moved/checkpoints/best").resolve().name) == 5

    def test_a_finished_run_says_its_figures_again_or_those_of_another_evaluation(self, here, capsys):
        assert continued() == 0
        first = json.loads(capsys.readouterr().out)
        assert continued() == 0
        assert json.loads(capsys.readouterr().out) == first
        assert continued("--eval.inference=tokens") == 0
        other = json.loads(capsys.readouterr().out)
        assert other["loss"] != first["loss"]
        assert continued("--eval.inference=tokens") == 0
        assert json.loads(capsys.readouterr().out) == other
        assert continued() == 0
        assert json.loads(capsys.readouterr().out)["loss"] == first["loss"]

    def test_the_command_of_segmentation_minds_the_same(self, here, capsys):
        config = segment_recipe("data/scenes")
        train_segmentation(config, Path("seg"), device=CPU)
        shutil.rmtree(list_checkpoints(Path("seg"))[-1])
        with pytest.raises(ConfigError, match=r"num_steps: 2 there, 3 here; seed: 0 there, 1 here"):
            train_segmentation(segment_recipe("data/scenes", seed=1, num_steps=3), Path("seg"), device=CPU)
        smaller = segment_recipe("data/scenes", precision="bf16")
        with pytest.raises(ConfigError, match="--changed-numerics"):
            train_segmentation(smaller, Path("seg"), device=CPU)
        Path("data").rename("moved")
        smaller = segment_recipe("moved/scenes", precision="bf16")
        Path("moved/scenes/train/3/new.png").write_bytes(Path("moved/scenes/train/3/00003.png").read_bytes())
        Path("moved/scenes/masks/train/3/new.png").write_bytes(
            Path("moved/scenes/masks/train/3/00003.png").read_bytes()
        )
        with pytest.raises(ConfigError, match=r"40 images there, 41 here; 1 new \(3/new\.png\)"):
            train_segmentation(smaller, Path("seg"), device=CPU, changed_numerics=True)
        Path("moved/scenes/train/3/new.png").unlink()
        train_segmentation(smaller, Path("seg"), device=CPU, changed_numerics=True)
        assert int(list_checkpoints(Path("seg"))[-1].name) == 2
        with pytest.raises(ConfigError, match=r"other classes, 11 there, 11 here \(gone: background; new: rest"):
            train_segmentation(
                segment_recipe("moved/scenes", precision="bf16", data__background="rest"), Path("seg"), device=CPU
            )


def segment_recipe(root, **changes):
    nested = nested_segments(Path(root))
    nested |= {"num_steps": 2, "checkpoint": {"every_epochs": 0.2, "keep": 9}}
    for dotted, value in changes.items():
        *parents, last = dotted.split("__")
        place = nested
        for parent in parents:
            place = place[parent]
        place[last] = value
    return config_from_dict(nested, SegmentRecipe, name="test")


class TestWhoseClassesAndImages:
    def test_a_renamed_class_is_named(self, here, capsys):
        for split in ("train", "val"):
            (here / f"data/scenes/{split}/4").rename(here / f"data/scenes/{split}/four")
        assert continued() == 2
        (error,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert "gone: 4; new: four" in error
        assert "class 4 was '4', and is '5'" in error

    def test_classes_that_change_places_are_named(self, here, capsys):
        """A class less, and another more at the end: as many as before."""
        train_folder = here / "data/scenes/train"
        (train_folder / "0").rename(train_folder / "zero")
        assert continued() == 2
        assert "class 0 was '0', and is '1'" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda root: shutil.copy(root / "3/00003.png", root / "3/new.png"), ["41 here", "1 new (3/new.png)"]),
            (lambda root: (root / "3/00003.png").unlink(), ["39 here", "1 gone (3/00003.png)"]),
            (
                lambda root: (root / "3/00003.png").rename(root / "3/other.png"),
                ["40 here", "1 gone (3/00003.png)", "1 new (3/other.png)"],
            ),
        ],
    )
    def test_images_that_came_and_went_are_named(self, here, capsys, change, words):
        change(here / "data/scenes/train")
        assert continued() == 2
        error = capsys.readouterr().err
        assert all(word in error for word in ["40 images there", *words])

    def test_images_of_another_class_are_named(self, here, capsys):
        """A list says the class beside the image, so the keys stay."""
        images = sorted((here / "data/scenes/train").rglob("*.png"))
        lines = [f"scenes/train/{path.parent.name}/{path.name} {path.parent.name}" for path in images]
        (here / "data/list.txt").write_text("\n".join(lines))
        words = ("--data.train", "data/list.txt", "--data.labels=null", "--loss.beta=0")
        assert continued(*words, run="listed") == 0
        lines[0] = lines[0][:-1] + "1"
        (here / "data/list.txt").write_text("\n".join(lines))
        assert continued(*words, run="listed") == 2
        assert f"1 of another class ({lines[0].split()[0]})" in capsys.readouterr().err

    def test_labels_of_another_teacher_are_named(self, here, capsys):
        relabelled("data/labels", "data/others", lambda key: True, teacher={"name": "another"})
        assert continued("--data.labels", "data/others") == 2
        assert "labels.teacher.name: None there, another here" in capsys.readouterr().err
        relabelled("data/labels", "data/fewer", lambda key: key != "3/00003.png")
        assert continued("--data.labels", "data/fewer") == 2
        assert "labels.num_missing: 0 there, 1 here" in capsys.readouterr().err
        with LabelStoreWriter("data/labels", LabelStore("data/labels").manifest, generation=1) as writer:
            writer.add_record("3/00003.png", LabelStore("data/labels").packed("4/00004.png"))
        assert continued() == 2
        assert "labels.annotated_again: None there, 1 here" in capsys.readouterr().err

    def test_labels_that_say_something_else_are_named(self, here, capsys):
        store = LabelStore("data/labels")
        keys = [*store.keys()]
        with LabelStoreWriter("data/moved", store.manifest) as writer:
            for key, other in zip(keys, keys[1:] + keys[:1], strict=True):
                writer.add_record(key, store.packed(other))
        assert continued("--data.labels", "data/moved") == 2
        assert "labels.content: " in capsys.readouterr().err
        tl.merge_stores("data/labels", "data/merged")
        assert continued("--data.labels", "data/merged") == 0

    def test_a_list_in_another_order_is_said(self, here, capsys):
        paths = [*Path("data/scenes/train").rglob("*.png")]
        lines = [f"scenes/train/{path.parent.name}/{path.name} {path.parent.name}\n" for path in paths]
        words = ("--data.train", "data/list.txt")
        Path("data/list.txt").write_text("".join(sorted(lines)))
        store = LabelStore("data/labels")
        with LabelStoreWriter("data/listed", store.manifest) as writer:
            for key in store.keys():  # noqa: SIM118  (a store is no dict)
                writer.add_record(f"scenes/train/{key}", store.packed(key))
        words = (*words, "--data.labels=data/listed")
        assert continued(*words, run="listed") == 0
        assert "another order" not in capsys.readouterr().err
        Path("data/list.txt").write_text("".join(sorted(lines, reverse=True)))
        assert continued(*words, run="listed") == 0
        assert capsys.readouterr().err.count("the training images come in another order than before") == 1

    def test_files_of_the_run_that_are_damaged_are_named(self, here, capsys):
        images = (here / "run/images.json").read_text()
        (here / "run/images.json").write_text(images[:50])
        assert continued() == 2
        assert "run/images.json: is damaged" in capsys.readouterr().err
        (here / "run/images.json").write_text(images)
        (here / "run/images.gz").write_bytes(b"\0\0")
        shutil.copy(here / "data/scenes/train/3/00003.png", here / "data/scenes/train/3/9.png")
        assert continued("--data.labels=null", "--loss.beta=0") == 2
        assert "other images or labels: the images (images.gz, their list, is missing" in capsys.readouterr().err
        (here / "data/scenes/train/3/9.png").unlink()
        (here / "run/images.json").unlink()
        assert continued() == 0
        assert "run: holds no images.json; images and labels are taken to be" in capsys.readouterr().err


def relabelled(folder, output, keeps, **changes):
    store = LabelStore(folder)
    with LabelStoreWriter(output, replace(store.manifest, **changes)) as writer:
        for key in [*store.keys()]:
            if keeps(key):
                writer.add_record(key, store.packed(key))


class TestImagesWithoutALabel:
    def some(self, number, **changes):
        """Return a recipe whose labels lack those of the first images."""
        lacking = [*sorted(LabelStore("data/labels").keys())][:number]
        shutil.rmtree("data/some", ignore_errors=True)
        relabelled("data/labels", "data/some", lambda key: key not in lacking)
        return recipe(Path("data"), data__labels="data/some", data__val=None, **changes), lacking

    def test_an_image_that_does_not_decode_is_labelled_and_trained_around(self, here, capsys):
        """The teacher passed it over, and then it was mended: training says so and goes on."""
        path = here / "data/scenes/train/3/00003.png"
        sound = path.read_bytes()
        path.write_bytes(b"not an image")
        words = ["annotate", "data/scenes/train", "own", "--teacher", "run", "--device", "cpu", "--size", "24"]
        assert main(words) == 0
        path.write_bytes(sound)
        capsys.readouterr()
        assert continued("--data.labels", "own", run="new") == 0
        error = capsys.readouterr().err
        assert "1 of 40 images have no label in the store (3/00003.png): their tokens learn from nothing" in error

    def test_more_than_a_tenth_is_refused_with_an_option_that_helps(self, here, capsys):
        self.some(5)
        assert continued("--data.labels", "data/some", run="new") == 2
        error = capsys.readouterr().err
        assert "5 of 40 images have no label in the store (0/00000.png, 0/00010.png, 0/00020.png, ...)" in error
        assert "--data.max-missing, now 0.1" in error
        assert continued("--data.max-missing=2", run="new") == 2
        assert "--data.max-missing must be at least 0 and at most 1" in capsys.readouterr().err
        words = ("--data.labels", "data/some", "--num_steps=1", "--epochs=null")
        assert continued(*words, "--data.max-missing", ".125", run="new") == 0
        self.some(40)
        assert continued(*words, "--data.max-missing", "1", run="new2") == 2
        assert "40 of 40 images have no label" in capsys.readouterr().err

    def test_they_have_weight_0_and_the_others_weigh_what_they_always_do(self, here, monkeypatch):
        config, lacking = self.some(4, mix__kind="none")
        task, whole = build(config, device=CPU), build(recipe(Path("data"), mix__kind="none"), device=CPU)
        batch, other = (collate([of.train_set[0, i] for i in range(0, 40, 3)]) for of in (task, whole))
        assert torch.equal(batch.images, other.images)
        outputs = task.model(normalize_images(batch.images, mean=task.model.mean, std=task.model.std))
        targets, others = (make_targets(b, of.supervision, task.grid) for of, b in ((task, batch), (whole, other)))
        assert targets.tokens is not None
        assert others.tokens is not None
        known = torch.tensor([key not in lacking for key in batch.keys])
        assert 0 < known.sum() < len(known)
        assert torch.equal(targets.tokens.weight, others.tokens.weight * known[:, None])
        losses = sparse_cross_entropy(outputs.token_logits, others.tokens)
        expected = float(losses[known].sum().detach()) / losses.numel()
        loss = student_loss(outputs, targets, task.supervision)
        assert float(loss.token_part) == pytest.approx(expected, rel=1e-6)
        assert float(loss.total.detach()) == pytest.approx(float(loss.class_part) + 0.5 * expected, rel=1e-6)
        assert float(loss.class_part) == float(student_loss(outputs, others, whole.supervision).class_part)

    @pytest.mark.parametrize(("target", "share"), [("teacher", 1.0), ("both", 0.3)])
    def test_what_the_teacher_tells_the_class_token_counts_alike(self, here, target, share):
        loss = {"class_target": target, "teacher_share": share, "label_smoothing": 0.0}
        config, lacking = self.some(4, mix__kind="none", loss=loss)
        task, whole = build(config, device=CPU), build(recipe(Path("data"), loss=loss), device=CPU)
        batch, other = (collate([of.train_set[0, i] for i in range(0, 40, 3)]) for of in (task, whole))
        dense, others = (
            make_targets(b, of.supervision, task.grid).class_token.dense(10)[:, 0]
            for of, b in ((task, batch), (whole, other))
        )
        known = torch.tensor([key not in lacking for key in batch.keys])[:, None]
        truth = torch.nn.functional.one_hot(batch.class_ids, 10)
        taught = others - (1 - share) * truth
        torch.testing.assert_close(dense, (1 - share) * truth + taught * known)

    def test_maps_of_logits_too(self, here):
        maps = [
            unknown_map(3, kind=Kind.LOGITS),
            from_top(np.ones((2, 2, 1), int), np.ones((2, 2, 1)), num_classes=3, kind=Kind.LOGITS),
        ]
        views = torch.eye(2, 3).expand(2, 1, 2, 3) + torch.tensor([[0, 0, -0.4], [0, 0, 0.3]])
        for mode in LogitsMode:
            targets = align(collate_score_maps(maps), views, (3, 3), logits=mode)
            assert targets.weight[0].abs().sum() == targets.excess[0].abs().sum() == targets.floor[0].sum() == 0
            assert targets.weight[1].sum() > 0

    def test_eval_holds_the_tokens_against_the_labels_that_there_are(self, here, capsys):
        self.some(30)
        words = ["eval", "run", "--data=data/scenes/train", "--num-workers=0", "--device=cpu", "--json"]
        assert main([*words, "--labels", "data/some"]) == 0
        printed = capsys.readouterr()
        assert "30 of 40 images have no label" in printed.err
        few = json.loads(printed.out)["num_teachers_judged"]
        assert main([*words, "--labels", "data/labels"]) == 0
        assert 0 < few < json.loads(capsys.readouterr().out)["num_teachers_judged"]

    def test_figures_of_a_run_name_no_option_where_there_is_none(self, here, capsys):
        """As a report does, which reads the run's val images; pictures of a store do without the broken ones."""
        (here / "data/scenes/val/3/00003.png").write_bytes(b"not an image")
        with pytest.raises(DataError, match=r"of 20; repair or remove them$"):
            evaluation_set(recipe(Path("data")), class_names=[*"0123456789"])
        relabelled("data/labels", "data/two", lambda key: key in ("3/00003.png", "4/00004.png"))
        words = ["inspect", "data/two", "--images=data/scenes/val", "--pictures=page.html"]
        assert main(words) == 0
        assert "3/00003.png: does not decode as an image" in capsys.readouterr().err
        assert "4/00004.png" in Path("page.html").read_text()


class TestOneAtATime:
    def test_another_process_is_told_so_and_a_kill_leaves_nothing_behind(self, here, capsys):
        hold = f"from filelock import FileLock; l = FileLock('run/{LOCK_FILE}'); l.acquire(); print('held'); input()"
        words, pipe = [sys.executable, "-u", "-c", hold], subprocess.PIPE
        with subprocess.Popen(words, text=True, stdin=pipe, stdout=pipe) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            assert continued() == 2
            error = capsys.readouterr().err.strip()
            assert error == (
                "tokenlabel train: error: run: another process trains in this folder; wait until it has ended, "
                "or choose another --out"
            )
            with pytest.raises(ConfigError, match="another process trains"):
                train_segmentation(segment_recipe("data/scenes"), Path("run"), device=CPU)
            process.kill()
        assert (here / "run" / LOCK_FILE).exists()
        assert continued() == 0

    def test_a_file_system_without_locks_is_said_and_stops_nobody(self, tmp_path, monkeypatch, capsys):
        def refuse(*_):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr("fcntl.flock", refuse)
        with locked(tmp_path / "run", Ranks()):
            assert "its file system has no locks (No locks available)" in capsys.readouterr().err

    def test_a_folder_that_cannot_be_made_is_named(self, tmp_path):
        (tmp_path / "file").touch()
        for out in ("file", "file/run"):
            with (
                pytest.raises(ConfigError, match=f"{out}: cannot be made .*choose another --out"),
                locked(tmp_path / out, Ranks()),
            ):
                pass

    def test_a_start_that_is_refused_leaves_no_new_folder(self, here):
        words = ["train", "--recipe", "small_data", "--data.train", "data/scenes/train", "--loss.beta", "0"]
        assert main([*words, "--model.name", "no_such_model", "--out", "new"]) == 2
        assert not Path("new").exists()
        Path("own").mkdir()
        assert main([*words, "--model.name", "no_such_model", "--out", "own"]) == 2
        assert Path("own").exists()

    def test_only_the_first_rank_takes_the_lock(self, tmp_path, monkeypatch):
        monkeypatch.setattr(Ranks, "broadcast", lambda self, value: (None, None))
        with locked(tmp_path / "run", Ranks(1, 2)):
            assert not (tmp_path / "run").exists()


@pytest.fixture
def reads(monkeypatch):
    """How often each image is read, by its key."""
    counts = Counter()
    read = ImageFiles.read

    def counted(self, index):
        counts[len(self), self.keys[index]] += 1  # train and val images have the same names
        return read(self, index)

    monkeypatch.setattr(ImageFiles, "read", counted)
    return counts


def rests(reads):
    """How often images were read that are in no first batch, whose images are read to train on and for pictures."""
    val = {times for (num_images, _), times in reads.items() if num_images == 20}
    return val | {min(reads.values())}


class TestWhatIsRead:
    def test_nothing_that_a_teacher_has_labelled(self, here, reads):
        build(recipe(Path("data"), data__val=None), device=CPU)
        assert not reads

    def test_what_has_no_label(self, here, reads):
        relabelled("data/labels", "data/some", lambda key: not key.startswith("3/0000"))
        build(recipe(Path("data"), data__val=None, data__labels="data/some"), device=CPU)
        assert set(reads.values()) == {1}
        assert {key[:6] for _, key in reads} == {"3/0000"}

    @pytest.mark.parametrize("name", ["masks", "published label files"])
    def test_all_if_the_labels_were_made_without_the_images(self, here, reads, name):
        relabelled("data/labels", "data/masks", lambda key: True, teacher={"name": name})
        build(recipe(Path("data"), data__val=None, data__labels="data/masks"), device=CPU)
        assert set(reads.values()) == {1}
        assert len(reads) == 40

    def test_the_rest_once_in_a_run(self, here, reads, monkeypatch):
        Path("recipe.json").write_text(json.dumps(nested(Path("data"), data__labels=None)))
        for _ in range(2):  # the second start knows
            fails_at_its_first_step(monkeypatch, run="new")
            assert rests(reads) == {1}
            assert len(reads) == 60  # val images as well
        fails_at_its_first_step(monkeypatch, "--data.check", "ends", run="new")  # looks in another way
        assert rests(reads) == {2}

    def test_none_if_told_so_val_images_included(self, here, reads):
        build(recipe(Path("data"), data__check="none"), device=CPU)
        assert not reads

    def test_what_was_left_out_stays_left_out(self, here, capsys):
        broken = [here / "data/scenes/train/3/00003.png", here / "data/scenes/val/3/00003.png"]
        for path in broken:
            path.write_bytes(b"not an image")
        relabelled("data/labels", "data/some", lambda key: key != "3/00003.png")
        words = ("--data.labels=data/some", "--data.skip-broken")
        assert continued(*words[:1], run="new") == 2
        error = capsys.readouterr().err
        assert "1 image (3/00003.png) that cannot be decoded, of 40" in error
        assert words[1] in error  # and this goes through:
        assert continued(*words, run="new") == 0
        assert "\n1 of 40 images do not decode, and are left out: 3/00003.png\n" in (said := capsys.readouterr().err)
        assert said.count("3/00003.png") == 2, "once for each split"
        assert json.loads((here / "new/images.json").read_text())["train"]["broken"] == ["3/00003.png"]
        shutil.copy(here / "data/scenes/train/3/00013.png", broken[0])
        assert continued(*words, run="new") == 0
        assert "1 of 40 images do not decode" in capsys.readouterr().err
        # Before the first checkpoint it counts again.
        for folder in list_checkpoints(here / "new"):
            shutil.rmtree(folder)
        assert continued(*words, run="new") == 0
        assert json.loads((here / "new/images.json").read_text())["train"]["broken"] == []

    @pytest.mark.parametrize("num_workers", [0, 1])
    def test_an_image_that_broke_after_it_was_labelled_stops_the_run_with_an_option_that_helps(
        self, here, capsys, num_workers
    ):
        (here / "data/scenes/train/3/00003.png").write_bytes(b"not an image")
        assert continued(f"--data.num_workers={num_workers}", run="new") == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("tokenlabel train: error: 3/00003.png: does not decode as an image (")
        assert "restore it (or remove a val image), or start a run with --data.skip-broken" in error
        if not num_workers:
            assert continued("--data.skip-broken", run="new") == 0

    def test_eval_leaves_broken_images_out_as_the_run_did_and_names_its_option(self, here, capsys):
        (here / "data/scenes/val/3/00003.png").write_bytes(b"not an image")
        assert main(["eval", "./run", "--num-workers=0", "--device=cpu"]) == 2
        assert "leave them out with --skip-broken" in capsys.readouterr().err
        assert main(["eval", "./run", "--num-workers=0", "--device=cpu", "--json", "--skip-broken"]) == 0
        assert json.loads(capsys.readouterr().out)["num_images"] == 19
        assert continued("--data.skip-broken", run="new") == 0
        capsys.readouterr()
        assert main(["eval", "./new", "--num-workers=0", "--device=cpu", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["num_images"] == 19


def test_a_class_of_which_no_image_is_left_is_said(here, capsys):
    for path in (here / "data/scenes/train/3").iterdir():
        path.write_bytes(b"not an image")
    sound_images(open_images("data/scenes/train"), skip_broken=True, check=ImageCheck.DECODE, option=None)
    said = capsys.readouterr().err
    assert said.startswith("4 of 40 images do not decode, and are left out: 3/00003.png, ")
    assert said.endswith(", ...; none is left of 1 class (3)\n")


def test_what_stopped_the_first_rank_is_said_once_on_each_machine(monkeypatch, capsys):
    def fail(_):
        raise FirstRankError("disk full")

    monkeypatch.setitem(cli.VERBS, "train", (fail, ""))
    said = []
    for local_rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        assert main(["train"]) == 2
        said.append(capsys.readouterr().err)
    assert said == ["tokenlabel train: error: disk full\n", ""]


class TestTimeouts:
    def test_a_step_waits_for_minutes_and_what_ranks_do_apart_for_days(self, monkeypatch):
        waits = {}
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setattr(distributed.dist, "init_process_group", lambda *_, timeout: waits.update(step=timeout))
        monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda: None)
        monkeypatch.setattr(distributed.dist, "new_group", lambda backend, timeout: waits.update({backend: timeout}))
        with joined_ranks(CPU) as ranks:
            assert current_ranks() is ranks
        assert current_ranks().world_size == 1
        assert waits["step"].total_seconds() <= 3600
        assert waits["gloo"].days >= 1
