"""A few masks, many images: a teacher from the masks, its maps in a store, and a network that learns from both."""

import json
import multiprocessing
import os
import shutil
import socket
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from segment_cases import recipe_for
from torch import nn

from tokenlabel.cli import main
from tokenlabel.core.scores import from_mask, from_probabilities
from tokenlabel.data.scenes import write_scenes
from tokenlabel.data.sources import open_images
from tokenlabel.labels.fingerprints import FingerprintedImages
from tokenlabel.labels.manifest import Manifest
from tokenlabel.labels.store import LabelStore
from tokenlabel.labels.writer import LabelStoreWriter
from tokenlabel.runtime.distributed import Ranks, joined_ranks
from tokenlabel.runtime.runlog import read_metrics
from tokenlabel.segmentation.task import build
from tokenlabel.training.engine import run_task
from tokenlabel.training.trainer import prepare

CPU = torch.device("cpu")
NAMES = [*"0123456789"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Scenes in one folder, `few` of them with masks and the names of their classes."""
    root = tmp_path_factory.mktemp("soft")
    write_scenes(root / "scenes", num_train=20, num_val=10, seed=0)
    paths = sorted((root / "scenes/train").rglob("*.png"))
    for folder in ("images", "few/images", "few/masks", "val/images", "val/masks"):
        (root / folder).mkdir(parents=True)
    for number, path in enumerate(paths):
        mask = root / "scenes/masks/train" / path.relative_to(root / "scenes/train")
        shutil.copy(path, root / "images" / path.name)
        if number % 2 == 0:
            shutil.copy(path, root / "few/images" / path.name)
            shutil.copy(mask, root / "few/masks" / path.name)
    for path in sorted((root / "scenes/val").rglob("*.png")):
        shutil.copy(path, root / "val/images" / path.name)
        shutil.copy(root / "scenes/masks/val" / path.relative_to(root / "scenes/val"), root / "val/masks")
    (root / "few/classes.txt").write_text("\n".join(NAMES) + "\n")
    (root / "small.yaml").write_text(yaml.safe_dump(small_recipe()))
    write_store(root / "labels", [path.name for path in paths])
    return root


def small_recipe():
    options = {"patch_size": 6, "depth": 1, "width": 16, "num_heads": 2, "stem_width": 8, "drop_path": 0.0}
    return {
        "data": {"layout": "folders", "num_workers": 0},
        "model": {
            "name": "lvvit_t", "img_size": [24, 24], "options": options, "neck_width": 16, "head_width": 8,
        },
        "augment": {"scale": [0.5, 1.0]},
        "optim": {
            "lr": 2e-3, "lr_batch_size": 8, "schedule": "poly", "min_lr": 0.0, "warmup_steps": 1,
            "ema_decay": None,
        },
        "checkpoint": {"every_epochs": 9},
        "eval": {"every_epochs": 9, "mode": "whole"},
        "num_steps": 2,
        "batch_size": 4,
    }  # fmt: skip


def write_store(folder, keys, *, names=tuple(NAMES), grid=(6, 6)):
    rng = np.random.default_rng(0)
    with LabelStoreWriter(folder, Manifest(num_classes=len(names), topk=3, class_names=names)) as writer:
        for key in keys:
            probs = rng.dirichlet([0.3] * len(names), size=grid).astype(np.float32)
            writer.add(key, from_probabilities(probs, topk=3))


@pytest.fixture
def here(made, monkeypatch, tmp_path):
    for path in made.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


BOTH = ("--data.train", "images", "--data.labels", "labels", "--data.masks", "few/masks")


def train(capsys, *words):
    status = main(["segment", "train", "--recipe", "small.yaml", "--device", "cpu", *words])
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def test_a_teacher_of_few_masks_labels_all_images_and_a_network_learns_from_both(here, capsys):
    status, said = train(capsys, "--data.train", "few", "--data.val", "val", "--out", "runs/teacher")
    assert status == 0, said
    assert "10 images with masks of 10 classes" in said
    words = ("--teacher", "runs/teacher", "--cells", "8", "--flip", "--device", "cpu")
    assert main(["annotate", "images", "maps", *words]) == 0
    assert "bytes an image" in capsys.readouterr().out
    maps = ("--data.labels", "maps", "--data.masks", "few/masks")
    status, said = train(capsys, "--data.train", "images", *maps, "--out", "runs/small")
    assert status == 0, said
    assert "10 images with masks of 10 classes (0, 1, 2, ...), 10 without" in said
    manifest = LabelStore("maps").manifest
    assert manifest.class_names == tuple(NAMES)
    assert {LabelStore("maps")[path.name].codes.shape[:2] for path in Path("images").iterdir()} == {(8, 8)}
    losses = [line["loss"] for line in read_metrics(Path("runs/small")) if line["kind"] == "train"]
    assert np.isfinite(losses).all()
    assert Path("runs/small/pictures/train.json").is_file()


@pytest.mark.parametrize(
    ("cells", "finer", "changes"),
    [
        ((6, 6), 1, {}),  # 8 px a cell, shown at 5.7 in the middle of the scales; the head's are of 1.5
        ((72, 72), 3, {}),  # shown at .47 px
        ((72, 36), 2, {}),
        ((144, 144), 4, {}),  # as fine as it gets by itself
        ((72, 72), 2, {"augment": {"scale": [1.0, 1.0]}}),
        ((72, 72), 1, {"loss": {"finer": 1}}),
    ],
)
def test_maps_are_learnt_as_finely_as_they_are(here, cells, finer, changes):
    masked = {path.name for path in Path("few/masks").iterdir()}
    write_store("fine", [path.name for path in Path("images").iterdir() if path.name not in masked][:1], grid=cells)
    task = build(recipe_for(Path("none"), **plain(data__labels="fine", **changes)), device=CPU)
    assert task.loss.finer == finer
    times = f", {finer} times as fine, by fine" if finer > 1 else "that of each location by fine"
    assert times in task.summary().targets


def test_maps_alone_teach_with_the_classes_of_the_labels(here, capsys):
    status, said = train(capsys, *BOTH[:4], "--data.val", "val", "--out", "run")
    assert status == 0, said
    assert "images: 20 images without masks" in said
    state = json.loads(next(Path("run/checkpoints").glob("0*/state.json")).read_text())
    assert state["class_names"] == NAMES
    assert "miou" in [line for line in read_metrics(Path("run")) if line["kind"] == "eval"][-1]


def test_labels_that_name_the_classes_are_opened_once(here, capsys):
    write_store("more", [min(path.name for path in Path("images").iterdir())], grid=(5, 5))
    words = ("--data.train", "images", "--data.labels=[labels,more]", "--data.val", "val", "--dry-run", "--out", "run")
    status, said = train(capsys, *words)
    assert status == 0, said
    assert said.count("1 image has different labels in several files") == 1


def test_labels_behind_a_url_name_the_classes(here, capsys, monkeypatch):
    monkeypatch.setenv("TOKENLABEL_CACHE", "cache")
    files = fsspec.filesystem("memory")
    files.put("labels", "/labels", recursive=True)
    status, said = train(capsys, *BOTH[:2], "--data.labels", "memory://labels", "--data.val", "val", "--out", "far")
    assert status == 0, said


def test_a_list_of_classes_beside_masks_is_what_their_values_mean(here, capsys):
    status, said = train(capsys, "--data.train", "few", "--data.val", "val", "--out", "run")
    assert status == 0, said
    Path("val/classes.txt").write_text("\n".join(reversed(NAMES)) + "\n")
    try:
        unlike = "val/classes.txt: class 0 is '9' to this file and '0' to the images"
        status, said = train(capsys, "--data.train", "few", "--data.val", "val", "--out", "other")
        assert status == 2
        assert unlike in said
        assert main(["segment", "eval", "run"]) == 2
        assert unlike in capsys.readouterr().err
        assert main(["segment", "eval", "run", "--images", "val/images", "--masks", "val/masks"]) == 2
        assert unlike in capsys.readouterr().err
        named = f"--data.class-names=[{','.join(NAMES)}]"
        status, said = train(capsys, "--data.train", "few", "--data.val", "val", "--out", "other", named)
        assert status == 0, said
        assert "data.class_names holds" in said
        # 1 = a: whether the masks hold 1 or 0 there, only their owner knows
        Path("val/classes.txt").write_text("".join(f"{i} {name}\n" for i, name in enumerate("abc", 1)))
        status, said = train(capsys, "--data.train", "val", "--out", "third")
        assert status == 2
        assert "its ids begin at 1, values in masks at 0" in said
    finally:
        Path("val/classes.txt").unlink()


def test_images_that_changed_since_they_were_labelled_are_named(here, capsys):
    shutil.copytree("images", "changed")
    source = FingerprintedImages(open_images("changed", classes=False))
    with LabelStoreWriter("maps", Manifest(num_classes=10, topk=1, class_names=tuple(NAMES))) as writer:
        for index, key in enumerate(source.keys):
            source.read(index)
            writer.add(key, from_mask(np.zeros((4, 4), np.int64), num_classes=10), source.take(key))
    masked = {path.name for path in Path("few/masks").iterdir()}
    key = next(key for key in source.keys if key not in masked)
    Image.new("RGB", (48, 48)).save(Path("changed") / key)
    words = ("--data.train", "changed", "--data.labels", "maps", "--data.masks", "few/masks")
    status, said = train(capsys, *words, "--out", "run", "--num-steps", "1")
    assert status == 0, said
    assert f"1 of 10 images that were looked at are not those that were labelled ({key})" in said


def test_an_image_with_both_learns_from_its_mask(here):
    recipe = recipe_for(Path("none"), **plain(), batch_size=20)
    task = build(recipe, device=CPU)
    batch = next(iter(task.batches(prepare(task, Ranks()).sampler(0))))
    masked = {batch.keys[number] for number in batch.masked}
    assert masked == {path.name for path in Path("few/masks").iterdir()}
    assert {batch.keys[number] for number in batch.soft} == {*batch.keys} - masked
    assert (batch.masks[batch.soft] == -1).all()


def plain(**changes):
    """Settings of a run on masks and maps without what depends on how a batch is divided."""
    return {
        "data": {
            "layout": "folders", "train": "images", "labels": "labels", "masks": "few/masks", "num_workers": 0,
        },
        "model__auxiliary": False,
        "eval": {"every_epochs": 9.0},
        "checkpoint": {"every_epochs": 9.0},
        "num_steps": 2,
        **changes,
    }  # fmt: skip


def train_plainly(recipe, out, ranks):
    """Train without dropout and with the BatchNorm of evaluation, whose statistics would be those of a process."""
    task = build(recipe, device=CPU)
    task.model.train = lambda mode=True: nn.Module.train(task.model, False)  # pyright: ignore
    run_task(task, out, ranks=ranks, eval_every_epochs=9, changed_numerics=True)


def rank_of_two(rank, port, recipe, out):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with joined_ranks(CPU) as ranks:
        train_plainly(recipe, out, ranks)


def test_two_processes_and_small_parts_have_the_loss_of_one(here):
    recipe = recipe_for(Path("none"), **plain())
    train_plainly(recipe, here / "one", Ranks())
    train_plainly(recipe_for(Path("none"), **plain(micro_batch_size=2)), here / "parts", Ranks())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    processes = [context.Process(target=rank_of_two, args=(rank, port, recipe, here / "two")) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    one, parts, two = (read_metrics(here / name) for name in ("one", "parts", "two"))
    for alone, others in zip(one, zip(parts, two, strict=True), strict=True):
        for other in others:
            for name in ("loss", "gradient_norm"):
                assert other[name] == pytest.approx(alone[name], rel=1e-4)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("--data.train=images", "--data.labels=others", "--data.masks=few/masks"),
            "others: labels of other classes than the masks'",
        ),
        (("--data.train=images", "--data.labels=strange"), "20 of 20 images without a mask have no label ("),
        (
            ("--data.train=images", "--data.labels=labels", "--data.masks=foreign"),
            "foreign: 20 of 20 images have no mask there",
        ),
        (("--data.train=few", "--loss.hard=true"), "about label maps, and there are none; give data.labels"),
        (("--data.train=images",), "images/images: no such folder"),
        (("--data.train=images", "--data.masks=few/masks"), "few/masks: 10 of 20 images have no mask there"),
    ],
)
def test_what_cannot_be_learnt_from_is_said_in_one_line(here, capsys, words, said):
    write_store("others", [path.name for path in Path("images").iterdir()], names=("a", "b", "c"))
    write_store("strange", ["x/1.png"])
    Path("foreign").mkdir()
    Image.fromarray(np.zeros((48, 48), np.uint8)).save("foreign/elsewhere.png")
    status, told = train(capsys, *words, "--out", "run")
    assert status == 2
    assert said in told
    assert len([line for line in told.splitlines() if "error" in line]) == 1


def test_maps_that_are_coarser_than_a_classs_objects_are_said_with_the_figure(here, capsys):
    mask = np.zeros((40, 40), np.uint8)
    mask[:, ::10] = 1  # poles of a pixel
    for folder in ("thin/images", "thin/masks"):
        Path(folder).mkdir(parents=True)
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save("thin/images/a.png")
    Image.fromarray(mask).save("thin/masks/a.png")
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save("thin/images/b.png")
    Path("thin/classes.txt").write_text("road\npole\n")
    with LabelStoreWriter("coarse", Manifest(num_classes=2, topk=2, class_names=("road", "pole"))) as writer:
        for key in ("a.png", "b.png"):
            writer.add(key, from_mask(np.zeros((4, 4), np.int64), num_classes=2))
    words = ("--data.train", "thin/images", "--data.masks", "thin/masks", "--data.labels", "coarse")
    status, said = train(capsys, *words, "--out", "run", "--num_steps", "1", "--batch_size", "2")
    assert status == 0, said
    assert "label maps of 4 x 4 cells are coarser than the objects of 'pole': 100% of its pixels" in said
    assert "'road'" not in said


def test_a_segmentation_run_refuses_what_is_for_other_teachers(here, capsys):
    assert train(capsys, "--data.train", "few", "--out", "run", "--num_steps", "1")[0] == 0
    assert main(["annotate", "images", "maps", "--teacher", "run", "--crop", "center", "--device", "cpu"]) == 2
    assert "run is a segmentation run, for which there is no --crop" in capsys.readouterr().err
    assert main(["annotate", "images", "maps", "--teacher", "run", "--size", "48", "--scales=[1,1.5]"]) == 0
    assert len(LabelStore("maps")) == 20
