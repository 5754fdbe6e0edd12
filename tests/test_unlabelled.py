"""Images without classes, with a few, and tokens that are about other things than the classes: from files to runs."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from test_train import nested_recipe

from tokenlabel.cli import main
from tokenlabel.core.scores import ScoreMap
from tokenlabel.data.scenes import write_scenes
from tokenlabel.labels.store import LabelStoreWriter, Manifest
from tokenlabel.runtime.runlog import read_metrics

NUM_WORDS = 12
WORDS = {"teacher": {"name": "words", "words": "abc"}}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Scenes in class folders, the same in one flat folder, stores of words of both, and lists with some classes."""
    root = tmp_path_factory.mktemp("unlabelled")
    write_scenes(root / "scenes", num_train=40, num_val=20, seed=0)
    for split in ("train", "val"):
        keys = [
            path.relative_to(root / "scenes" / split)
            for path in sorted((root / "scenes" / split).rglob("*.png"))
        ]
        flat = root / f"flat_{split}"
        flat.mkdir()
        for key in keys:
            shutil.copy(root / "scenes" / split / key, flat / key.as_posix().replace("/", "_"))
        write_words(root / f"words_{split}", [key.as_posix() for key in keys], root / "scenes" / split)
        write_words(root / f"flat_words_{split}", [path.name for path in sorted(flat.iterdir())], flat)
    keys = sorted(
        path.relative_to(root / "scenes").as_posix() for path in (root / "scenes/train").rglob("*.png")
    )
    lines = [f"{key},{key.split('/')[1] if number % 4 == 0 else ''}" for number, key in enumerate(keys)]
    (root / "scenes" / "some.csv").write_text("path,label\n" + "\n".join(lines) + "\n")
    write_words(root / "words_some", keys[::2], root / "scenes")
    return root


def write_words(folder, keys, images, **manifest):
    """A store of words by brightness: what a token learns has nothing to do with the digits' classes."""
    manifest = {**WORDS, **manifest}
    with LabelStoreWriter(folder, Manifest(num_classes=NUM_WORDS, topk=2, **manifest)) as writer:
        for key in keys:
            grey = np.asarray(Image.open(images / key).convert("L").resize((4, 4)), np.int64)
            word = grey * NUM_WORDS // 256
            ids = np.stack([word, (word + 1) % NUM_WORDS], axis=2)
            writer.add(key, score_map(ids))


def score_map(ids):
    palette, codes = np.unique(ids, return_inverse=True)
    probs = np.broadcast_to(np.array([0.7, 0.2], np.float32), ids.shape)
    return ScoreMap(
        palette=palette, codes=codes.reshape(ids.shape).astype(np.uint8), probs=probs, num_classes=NUM_WORDS
    )


@pytest.fixture
def here(made, monkeypatch, tmp_path):
    """Work in a folder of its own beside the data, so that all paths are relative."""
    for path in made.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    recipe = nested_recipe(made / "scenes", checkpoint={"every_epochs": 1})
    del recipe["data"]
    Path("small.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


def run(capsys, *words):
    status = main(list(words))
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def train(capsys, *words):
    return run(
        capsys, "train", "--recipe", "small.yaml", "--data.num_workers", "0", "--device", "cpu", *words
    )


FLAT = ("--data.train", "flat_train", "--data.labels", "flat_words_train")


def figures(run_folder):
    return [line for line in read_metrics(Path(run_folder)) if line["kind"] == "eval"][-1]


def test_images_without_classes_train_a_network_without_class_head(here, capsys):
    val = ("--data.val", "flat_val", "--eval.labels", "flat_words_val", "--eval.probe", "scenes/val")
    status, said = train(capsys, *FLAT, *val, "--out", "run")
    assert status == 0, said
    assert "training images: 40 images, 0 with a class, 40 with a label map" in said
    found = figures("run")
    assert found.keys() >= {"teacher_accuracy", "knn", "image_probe"}
    assert "top1" not in found
    lines = [line for line in read_metrics(Path("run")) if line["kind"] == "train"]
    assert all(line["class_loss"] == 0 and line["token_loss"] > 0 for line in lines)
    state = json.loads(next(Path("run/checkpoints").glob("0*/state.json")).read_text())
    assert (state["class_names"], state["token_classes"]["count"]) == ([], NUM_WORDS)
    assert Path("run/checkpoints/best").is_dir()


def test_class_labels_beside_words_are_one_run(here, capsys):
    labelled = ("--data.train", "scenes/train", "--data.labels", "words_train", "--data.val", "scenes/val")
    status, said = train(capsys, *labelled, "--out", "run")
    assert status == 0, said
    assert "tokens learn the 12 visual words of the labels, the class token the 10 classes" in said
    assert "top1" in figures("run")
    status, said = train(capsys, *labelled, "--out", "combined", "--eval.inference", "combined")
    assert status == 2
    assert "give --eval.inference class" in said
