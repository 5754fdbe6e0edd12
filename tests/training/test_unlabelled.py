"""Images without classes, with a few, and tokens that are about other things than the classes: from files to runs."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from test_train import nested_recipe
from torch.nn import functional as F
from training_ranks import train_together

from tokenlabel.classification.task import build
from tokenlabel.classification.task import train as train_by_recipe
from tokenlabel.cli import main
from tokenlabel.core.batch import normalize_images
from tokenlabel.core.losses import sparse_cross_entropy
from tokenlabel.core.scores import ScoreMap
from tokenlabel.core.step import make_targets, student_loss
from tokenlabel.data.scenes import write_scenes
from tokenlabel.labels.manifest import Manifest
from tokenlabel.labels.store import LabelStore
from tokenlabel.labels.writer import LabelStoreWriter
from tokenlabel.models import register_with_timm
from tokenlabel.runtime.configuration import config_from_dict
from tokenlabel.runtime.distributed import Ranks
from tokenlabel.runtime.runlog import read_metrics
from tokenlabel.training.recipe import Recipe
from tokenlabel.training.trainer import prepare

NUM_WORDS = 12
WORDS = {"teacher": {"name": "words", "words": "abc"}}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Scenes in class folders, the same in one flat folder, stores of words of both, and lists with some classes."""
    root = tmp_path_factory.mktemp("unlabelled")
    write_scenes(root / "scenes", num_train=40, num_val=20, seed=0)
    for split in ("train", "val"):
        keys = [path.relative_to(root / "scenes" / split) for path in sorted((root / "scenes" / split).rglob("*.png"))]
        flat = root / f"flat_{split}"
        flat.mkdir()
        for key in keys:
            shutil.copy(root / "scenes" / split / key, flat / key.as_posix().replace("/", "_"))
        write_words(root / f"words_{split}", [key.as_posix() for key in keys], root / "scenes" / split)
        write_words(root / f"flat_words_{split}", [path.name for path in sorted(flat.iterdir())], flat)
    keys = sorted(path.relative_to(root / "scenes").as_posix() for path in (root / "scenes/train").rglob("*.png"))
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
    return run(capsys, "train", "--recipe", "small.yaml", "--data.num_workers", "0", "--device", "cpu", *words)


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


def test_a_token_head_that_nobody_trains_is_not_judged(here, capsys):
    data = ("--data.train", "scenes/train", "--data.val", "scenes/val", "--eval.labels", "words_val")
    status, said = train(capsys, *data, "--loss.beta", "0", "--out", "run")
    assert status == 0, said
    assert "eval.labels: the token head is not trained" in said
    assert "teacher_accuracy" not in figures("run")


def test_class_labels_beside_words_are_one_run(here, capsys):
    labelled = ("--data.train", "scenes/train", "--data.labels", "words_train", "--data.val", "scenes/val")
    status, said = train(capsys, *labelled, "--out", "run")
    assert status == 0, said
    assert "tokens learn the 12 visual words of the labels, the class token the 10 classes" in said
    assert "top1" in figures("run")
    status, said = train(capsys, *labelled, "--out", "combined", "--eval.inference", "combined")
    assert status == 2
    assert "give --eval.inference class" in said


def test_a_network_without_classes_is_evaluated_by_its_tokens_and_its_features(here, capsys):
    assert train(capsys, *FLAT, "--out", "run", "--epochs", "1")[0] == 0
    asked = ("--labels", "flat_words_val", "--probe", "scenes/val", "--num-workers", "0", "--json")
    status, said = run(capsys, "eval", "run", "--data", "flat_val", *asked)
    assert status == 0, said
    found = json.loads(next(line for line in said.splitlines() if line.startswith("{")))
    assert found.keys() >= {"teacher_accuracy", "teacher_miou", "knn", "image_probe"}
    assert "inference" not in found  # of a class head
    status, said = run(capsys, "report", "run", "--output", "page.html")
    assert status == 0, said
    assert re.search(r"</i>word \d+</span>", Path("page.html").read_text())
    status, said = run(
        capsys, "eval", "run", "--probe", "scenes/train", "--probe-test", "scenes/val", "--num-workers=0"
    )
    assert status == 0, said
    assert "learn from 40 images, and are tested on 20 others" in said
    status, said = run(capsys, "eval", "run", "--data", "scenes/val")
    assert status == 2
    assert "has no class head and cannot be evaluated on the classes of scenes/val; give --probe DIR" in said


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lvvit_t", {"patch_size": 6, "depth": 2, "width": 16, "num_heads": 2, "stem_width": 8}),
        ("test_resnet", {"stage": 2}),
    ],
)
def test_probes_of_an_export_without_a_token_head_are_those_of_the_run(here, capsys, name, options):
    recipe = yaml.safe_load(Path("small.yaml").read_text()) | {"loss": {"beta": 0}, "epochs": 1}
    recipe["model"] = {"name": name, "img_size": [48, 48], "options": options}
    Path("small.yaml").write_text(yaml.safe_dump(recipe))
    data = ("--data.train", "scenes/train", "--data.val", "scenes/val")
    status, said = train(capsys, *data, "--out", "run")
    assert status == 0, said
    assert main(["export", "run", "run.safetensors"]) == 0
    found = []
    for network in (["run"], [name, "--weights", "run.safetensors"]):
        asked = ("--data", "scenes/val", "--probe", "scenes/train", "--num-workers", "0", "--json")
        status, said = run(capsys, "eval", *network, *asked)
        assert status == 0, said
        of_network = json.loads(next(line for line in said.splitlines() if line.startswith("{")))
        found.append({key: of_network[key] for key in ("top1", "image_probe", "knn")})
    assert found[0] == found[1]
    if name == "test_resnet":  # at its last stage, which the file does not ask for, there is one cell
        torch.save(timm.create_model(name, num_classes=10).state_dict(), "plain.pth")
        status, said = run(capsys, "eval", name, "--weights", "plain.pth", *asked, "--size", "32")
        assert status == 2
        assert "test_resnet has no token grid for images of 32 x 32 pixels: its features are 1 x 1" in said


def test_tokens_are_compared_where_images_or_network_have_no_classes(here, capsys):
    data = ("--data.train", "scenes/train", "--data.labels", "words_train", "--data.val", "flat_val")
    status, said = train(capsys, *data, "--eval.labels", "flat_words_val", "--out", "run", "--epochs", "1")
    assert status == 0, said
    status, said = run(capsys, "eval", "run", "--num-workers", "0", "--json")
    assert status == 0, said
    found = json.loads(next(line for line in said.splitlines() if line.startswith("{")))
    assert found["teacher_accuracy"] == figures("run")["teacher_accuracy"]
    assert "--labels STORE compare the tokens" in run(capsys, "eval", "run", "--data", "flat_val")[1]
    keys = [path.name for path in sorted(Path("flat_train").iterdir())]
    names = {"class_names": tuple(f"shade {i}" for i in range(NUM_WORDS)), "teacher": {"name": "shades"}}
    write_words(Path("shades"), keys, Path("flat_train"), **names)
    status, said = train(capsys, *FLAT[:3], "shades", "--out", "dense", "--epochs", "1")
    assert status == 0, said
    masked = ("--data", "flat_val", "--masks", "masks", "--num-workers", "0")
    for path in Path("flat_val").iterdir():
        mask = np.asarray(Image.open(path).convert("L")) // (256 // NUM_WORDS + 1)
        Path("masks").mkdir(exist_ok=True)
        Image.fromarray(mask).save(Path("masks") / path.name)
    status, said = run(capsys, "eval", "dense", *masked)
    assert (status, "token_accuracy" in said) == (0, True), said
    assert "its tokens are about 12 visual words, no masks" in run(capsys, "eval", "run", *masked)[1]


def test_a_classifier_begins_with_the_network_of_a_run_and_new_heads(here, capsys):
    assert train(capsys, *FLAT, "--out", "run", "--epochs", "1")[0] == 0
    few = ("--data.train", "scenes/some.csv", "--data.val", "scenes/val", "--model.weights", "run", "--out", "few")
    small = ("--epochs", "2", "--min_epoch_steps", "3", "--precision", "fp32", "--device", "cpu")
    status, said = run(capsys, "train", "--recipe", "finetune", *few, *small, "--data.num_workers", "0")
    assert status == 0, said
    made = yaml.safe_load(Path("few/recipe.yaml").read_text())["model"]
    before = yaml.safe_load(Path("run/recipe.yaml").read_text())["model"]
    assert (made["name"], made["img_size"], made["options"]) == (before["name"], before["img_size"], before["options"])
    state = json.loads(next(Path("few/checkpoints").glob("0*6/state.json")).read_text())  # 2 epochs of 3 steps
    assert (len(state["class_names"]), state["token_classes"]) == (10, None)
    assert "top1" in figures("few")


def test_weights_that_are_no_run_do_not_say_which_network_is_meant(here, capsys):
    few = ("--data.train", "scenes/train", "--model.weights", "some.pth", "--out", "few")
    status, said = run(capsys, "train", "--recipe", "finetune", *few)
    assert status == 2
    assert "model.name is missing, and model.weights some.pth is not there" in said


@pytest.mark.parametrize("name", ["run.safetensors", "run_hub"])
def test_a_network_without_classes_is_exported(here, capsys, name):
    assert train(capsys, *FLAT, "--out", "run", "--epochs", "1")[0] == 0
    status, said = run(capsys, "export", "run", name)
    assert status == 0, said
    if name == "run_hub":
        register_with_timm()
        model = timm.create_model("local-dir:run_hub", pretrained=True)
        assert model(torch.zeros(1, 3, 24, 24)).shape == (1, 16)  # features, as timm does without classes
        assert Path("run_hub/token_head.safetensors").is_file()


def test_some_images_have_a_class_and_some_a_label(here, capsys):
    data = ("--data.train", "scenes/some.csv", "--data.labels", "words_some", "--data.max-missing", ".5")
    status, said = train(capsys, *data, "--data.val", "scenes/val", "--out", "run")
    assert status == 0, said
    assert "40 images, 10 of them of" in said
    assert "training images: 40 images, 10 with a class, 20 with a label map" in said
    status, said = train(capsys, *data, "--out", "dry", "--dry-run")
    assert status == 0, said
    assert "40 images, 10 with a class, 20 with a label map; 10 classes and 12 visual words for the tokens" in said


def test_images_of_another_folder_have_no_classes_whatever_its_layout(here, capsys):
    Path("more/album/2024").mkdir(parents=True)
    for number, path in enumerate(sorted(Path("flat_val").iterdir())):
        shutil.copy(path, f"more/album/2024/{path.name}" if number % 2 else f"more/{path.name}")
    keys = [path.relative_to("more").as_posix() for path in sorted(Path("more").rglob("*.png"))]
    write_words(Path("more_words"), keys, Path("more"))
    data = ("--data.train", "scenes/train", "--data.unlabelled", "more", "--data.labels", "words_train")
    status, said = train(capsys, *data, "--data.labels", "more_words", "--out", "run", "--epochs", "1")
    assert status == 0, said
    assert "training images: 60 images, 40 with a class, 60 with a label map" in said


def test_the_loss_is_a_mean_over_images_whatever_is_known_of_each(here):
    """An image weighs as much whether others have a class or a map, or not: no factor makes few count for many."""
    recipe = recipe_of("scenes/some.csv", "words_some", batch_size=40)
    task = build(recipe, device=torch.device("cpu"))
    batch = next(iter(task.batches(prepare(task, Ranks()).sampler(0))))
    targets = make_targets(batch, task.supervision, task.grid)
    assert targets.class_token.weight.sum() == 10
    assert targets.tokens is not None
    weight = targets.tokens.weight.mean(dim=1)
    assert (weight > 0).sum() == 20
    outputs = task.model.eval()(normalize_images(batch.images, mean=task.model.mean, std=task.model.std))
    loss = student_loss(outputs, targets, task.supervision)
    known = batch.has_class
    of_known = F.cross_entropy(outputs.class_logits[known], batch.class_ids[known], label_smoothing=0.1)
    assert float(loss.class_part) == pytest.approx(float(of_known.detach()) * 10 / 40, rel=1e-5)
    tokens = sparse_cross_entropy(outputs.token_logits, targets.tokens).mean(dim=1)
    assert float(loss.token_part) == pytest.approx(float(tokens[weight > 0].detach().sum()) / 40, rel=1e-5)


def recipe_of(train, labels, **changes):
    data = {"train": train, "labels": labels, "num_workers": 0, "max_missing": 0.5}
    nested = nested_recipe(Path("scenes"), mix__kind="none", eval__every_epochs=9)
    nested["model"]["options"] |= {"conv_stem": False, "drop_path": 0.0}  # without BatchNorm, over a process's images
    return config_from_dict({**nested, "data": data, **changes}, Recipe, name="test")


def test_two_processes_have_the_loss_of_one_where_classes_and_labels_are_missing(here):
    recipes = {
        "some": recipe_of("scenes/some.csv", "words_some", epochs=1),
        "none": recipe_of("flat_train", "flat_words_train", epochs=1),
    }
    train_together({Path(f"two_{name}"): recipe for name, recipe in recipes.items()})
    for name, recipe in recipes.items():
        train_by_recipe(recipe, Path(f"one_{name}"), device="cpu")
        one, two = (read_metrics(Path(f"{count}_{name}")) for count in ("one", "two"))
        for alone, together in zip(one, two, strict=True):
            for part in ("loss", "class_loss", "token_loss"):
                assert together[part] == pytest.approx(alone[part], rel=1e-4, abs=1e-7)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--data.train", "flat_train"), "without labels there is nothing to learn from"),
        ((*FLAT, "--loss.beta", "0"), "and loss.beta above 0"),
        ((*FLAT, "--loss.class-target", "teacher"), "12 visual words, no classes; leave it at truth"),
        (
            ("--data.train=scenes/train", "--data.labels=words_train", "--loss.class-target=both"),
            "these are about 12 visual words, not the 10 classes",
        ),
        ((*FLAT, "--data.val", "flat_val"), "give --eval.labels"),
        ((*FLAT, "--eval.probe", "one"), "one class only (3); probes need two classes at least"),
        ((*FLAT, "--eval.probe-test", "one"), "name that folder, too"),
        ((*FLAT, "--eval.inference", "combined"), "give --eval.inference class"),
        (
            ("--data.train", "torn.csv", "--data.labels", "words_some"),
            "torn.csv, line 3: expected the path of an image",
        ),
        (
            ("--data.train=scenes/train", "--data.unlabelled=scenes/train", "--data.labels=words_train"),
            "is the name of two images, one with classes and one without",
        ),
    ],
)
def test_what_cannot_be_learnt_from_is_said_in_one_line(here, capsys, words, said):
    Path("one/3").mkdir(parents=True)
    shutil.copytree("scenes/train/3", "one/3", dirs_exist_ok=True)
    Path("torn.csv").write_text("path,label\nscenes/train/3/0003.png,3\n,,3\n3\n")
    status, told = train(capsys, *words, "--out", "run")
    assert status == 2
    assert said in told
    assert len([line for line in told.splitlines() if "error" in line]) == 1
    assert not Path("run/checkpoints").exists()


def test_a_run_goes_on_with_the_words_that_it_began_with_alone(here, capsys):
    assert train(capsys, *FLAT, "--out", "run", "--epochs", "1")[0] == 0
    other = {"teacher": {"name": "words", "words": "another"}}
    write_words(
        Path("other"), [path.name for path in sorted(Path("flat_train").iterdir())], Path("flat_train"), **other
    )
    again = ("--data.train", "flat_train", "--data.labels", "other", "--out", "run", "--epochs", "1")
    status, said = train(capsys, *again)
    assert status == 2
    assert "12 visual words of the head abc, these labels are about 12 visual words of the head another" in said


def test_a_run_that_speaks_words_teaches_is_a_backbone_and_is_reported(here, capsys):
    val = ("--data.val", "flat_val", "--eval.labels", "flat_words_val")
    assert train(capsys, *FLAT, *val, "--out", "run", "--epochs", "1")[0] == 0
    status, said = run(capsys, "annotate", "scenes/train", "own", "--teacher", "run", "--device", "cpu")
    assert status == 0, said
    manifest = LabelStore("own").manifest
    assert (manifest.num_classes, manifest.class_names, manifest.words) == (NUM_WORDS, (), "abc")
    # The same words, so the successor of a run may learn from it where the run itself learnt from the head.
    labelled = ("--data.train", "scenes/train", "--data.labels", "own", "--out", "next", "--epochs", "1")
    status, said = train(capsys, *labelled, "--model.weights", "run")
    assert status == 0, said
    assert "token_head" not in said  # which goes on with what it knows
    head = ("fit-head", "scenes/train", "head.safetensors", "--backbone", "run", "--from", "words", "--words", "8")
    status, said = run(capsys, *head, "--device", "cpu")
    assert status == 0, said
    status, said = run(capsys, "report", "run", "next", "--output", "report.html")
    assert status == 0, said
    assert "tokens as the teacher" in Path("report.html").read_text()
