"""The command line as its users meet it: the demo's stages, and one clear line for whatever is wrong."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from tokenlabel.cli import VERBS, main
from tokenlabel.core.scores import from_mask
from tokenlabel.data.scenes import write_scenes
from tokenlabel.demo import DemoSize, run_demo
from tokenlabel.labels.manifest import Manifest
from tokenlabel.labels.store import LabelStore
from tokenlabel.labels.writer import LabelStoreWriter
from tokenlabel.models.weights import adapter_name
from tokenlabel.training.checkpoint import load_run

TINY = DemoSize(
    num_train=40,
    num_val=20,
    teacher_overrides=("--epochs=2", "--batch-size=10", "--data.num-workers=0", "--model.options.channels=[8,8,8,8]"),
    student_overrides=("--epochs=2", "--batch-size=10", "--data.num-workers=0", "--model.options.depth=1"),
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The folder of a tiny demo."""
    out = tmp_path_factory.mktemp("demo") / "out"
    assert run_demo(out, TINY, main) == 0
    return out


def test_the_demo_writes_its_figures_under_stable_names(demo):
    result = json.loads((demo / "result.json").read_text())
    assert set(result) == {
        "top1_teacher",
        "top1_token_labels",
        "top1_class_labels",
        "teacher_map_agreement",
        "student_token_agreement",
        "images_per_s_token_labels",
        "images_per_s_class_labels",
        "labels_share_of_step",
        "label_bytes_per_image",
        "last_call_s",
    }
    assert all(0 <= result[name] <= 1 for name in result if name.startswith("top1") or "agreement" in name)
    assert result["label_bytes_per_image"] > 0


def test_the_report_is_one_file_with_pictures_and_curves(demo):
    page = (demo / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 30
    assert "<svg" in page
    for title in (
        "What token-labels is trained on: its first batch",
        "the teacher&#x27;s map",
        "targets of its tokens",
        "mixed, as trained on",
        "What token-labels, class-labels, teacher say about val images",
    ):
        assert title in page
    links = re.findall(r'(?:src|href)="(?!data:)([^"#]+)"', page)
    assert all("w3.org" in link for link in links), "a self-contained page loads nothing"


def test_the_demo_again_does_nothing_twice(demo, capsys):
    before = {path: path.stat().st_mtime_ns for path in demo.rglob("*.safetensors")}
    assert run_demo(demo, TINY, main) == 0
    assert {path: path.stat().st_mtime_ns for path in demo.rglob("*.safetensors")} == before
    assert "0 images labelled, 40 had been" in capsys.readouterr().out


def test_both_students_differ_in_their_labels_and_in_nothing_else(demo):
    recipes = [yaml.safe_load((demo / name / "recipe.yaml").read_text()) for name in ("token-labels", "class-labels")]
    assert recipes[0].pop("loss") == recipes[1].pop("loss") | {"beta": 0.5}
    assert recipes[0]["data"].pop("labels") is not None
    assert recipes[1]["data"].pop("labels") is None
    assert recipes[0] == recipes[1]


def test_eval_prints_one_line_of_json(demo, capsys):
    assert main(["eval", str(demo / "token-labels"), "--num-workers", "0", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["num_images"] == 20


def test_eval_reports_all_three_ways_to_predict(demo, capsys):
    arguments = ["--num-workers", "0", "--inference", "all", "--json"]
    assert main(["eval", str(demo / "token-labels"), *arguments]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"class", "tokens", "combined"}


def test_eval_takes_another_size_and_a_teachers_labels(demo, tmp_path, capsys):
    write_labels(tmp_path / "labels", demo / "scenes", num_classes=10)
    options = ["--num-workers", "0", "--json", "--size", "72", "--per-class"]
    options += ["--data", str(demo / "scenes" / "train"), "--labels", str(tmp_path / "labels")]
    assert main(["eval", str(demo / "token-labels"), *options]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["num_images"], figures["img_size"]) == (40, [72, 72])
    assert 0 <= figures["teacher_accuracy"] <= 1
    assert len(figures["per_class"]) == 10


def test_eval_asks_no_token_head_that_was_never_trained(demo, capsys):
    message = complaint(capsys, ["eval", demo / "class-labels", "--inference", "combined"])
    assert "trained without token labels" in message


def test_inspect_verifies_and_draws(demo, tmp_path, capsys):
    arguments = ["--verify=true", "--images", demo / "scenes" / "train", "--pictures", tmp_path / "maps.html"]
    assert main(list(map(str, ["inspect", demo / "labels", "--json", *arguments]))) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["num_images"], figures["num_verified"], figures["broken"]) == (40, 40, [])
    assert "data:image/png;base64," in (tmp_path / "maps.html").read_text()


def test_merge_makes_one_store_of_two(data, tmp_path, capsys):
    write_labels(tmp_path / "other", data / "scenes", num_classes=10, rename=lambda key: f"other/{key}")
    stores = [data / "labels", tmp_path / "other", tmp_path / "merged"]
    assert main(["merge", *map(str, stores)]) == 0
    assert "40 labels" in capsys.readouterr().out
    assert len(LabelStore(tmp_path / "merged")) == 40


def test_published_label_files_are_imported(data, tmp_path, capsys):
    for path in sorted((data / "scenes" / "train").rglob("*.png")):
        label = tmp_path / "files" / path.parent.name / f"{path.stem}.pt"
        label.parent.mkdir(parents=True, exist_ok=True)
        logits, ids = torch.randn(5, 4, 4), torch.stack([torch.arange(5)] * 16, dim=1).view(5, 4, 4)
        torch.save(torch.stack([logits.half(), ids.half()]), label)
    words = ["import-labels", tmp_path / "files", tmp_path / "labels", "--images", data / "scenes" / "train"]
    assert main([*map(str, words), "--num-classes=10"]) == 0
    assert "20 labels imported" in capsys.readouterr().out
    message = complaint(capsys, [*words, "--num-classes=12"])
    assert "12" in message


def test_export_writes_weights_that_load(demo, tmp_path):
    assert main(["export", str(demo / "token-labels"), str(tmp_path / "model.safetensors")]) == 0
    found = {adapter_name(name) for name in load_file(tmp_path / "model.safetensors")}
    assert found == load_run(demo / "token-labels").model.state_dict().keys()


def test_help_explains_every_verb(capsys):
    assert main([]) == 0
    overview = capsys.readouterr().out
    for name in VERBS:
        assert name in overview
        try:
            status = main([name, "--help"])
        except SystemExit as ended:
            status = ended.code
        assert status == 0
        assert f"usage: tokenlabel {name}" in capsys.readouterr().out


def test_the_help_of_train_explains_every_field(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "{none,mixtoken,cutmix,mixup}" in text
    assert "Weight of the token part" in text


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Scenes, labels for them, and the options of a run that would work."""
    root = tmp_path_factory.mktemp("cli")
    write_scenes(root / "scenes", num_train=20, num_val=10, seed=0)
    write_labels(root / "labels", root / "scenes", num_classes=10)
    return root


def write_labels(folder, scenes, *, num_classes, rename=lambda key: key):
    masks = scenes / "masks" / "train"
    manifest = Manifest(num_classes=num_classes, class_names=tuple(map(str, range(num_classes))), topk=1)
    with LabelStoreWriter(folder, manifest) as writer:
        for path in sorted(masks.rglob("*.png")):
            score_map = from_mask(np.asarray(Image.open(path)), num_classes=num_classes)
            writer.add(rename(path.relative_to(masks).as_posix()), score_map)


def options_for(data, run, **changes):
    options = {
        "recipe": "demo_token_labels",
        "run": run,
        "data.train": data / "scenes" / "train",
        "data.val": data / "scenes" / "val",
        "data.labels": data / "labels",
        "data.num_workers": 0,
        "epochs": 1,
        "batch_size": 10,
        "model.options.depth": 1,
    }
    options |= {name.replace("__", "."): value for name, value in changes.items()}
    return ["train", *(f"--{name}={value}" for name, value in options.items() if value is not None)]


def complaint(capsys, arguments):
    """Run a command that must refuse; return the one line that it says."""
    capsys.readouterr()
    assert main(list(map(str, arguments))) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tokenlabel")]
    assert len(lines) == 1
    return lines[0]


def test_images_that_are_not_there(data, tmp_path, capsys):
    message = complaint(capsys, options_for(data, tmp_path / "run", data__train=tmp_path / "nowhere"))
    assert f"{tmp_path / 'nowhere'}: no such folder" in message
    (tmp_path / "empty").mkdir()
    message = complaint(capsys, options_for(data, tmp_path / "run2", data__train=tmp_path / "empty"))
    assert "expected one folder a class" in message


def test_labels_of_other_images(data, tmp_path, capsys):
    write_labels(tmp_path / "labels", data / "scenes", num_classes=10, rename=lambda key: f"other/{key}")
    message = complaint(capsys, options_for(data, tmp_path / "run", data__labels=tmp_path / "labels"))
    assert "20 of 20 images have no label" in message
    assert "0/00000.png" in message


def test_labels_about_other_classes_teach_the_tokens_and_that_is_said(data, tmp_path, capsys):
    write_labels(tmp_path / "labels", data / "scenes", num_classes=12)
    assert main(options_for(data, tmp_path / "run", data__labels=tmp_path / "labels")) == 0
    assert "tokens learn the 12 classes (0, 1, 2, ...) of the labels, the class token the 10 classes" in (
        capsys.readouterr().err
    )


def test_labels_that_are_not_there(data, tmp_path, capsys):
    message = complaint(capsys, options_for(data, tmp_path / "run", data__labels=tmp_path / "nowhere"))
    assert "nowhere" in message


def test_a_shard_that_was_cut_short(data, tmp_path, capsys):
    shutil.copytree(data / "labels", tmp_path / "labels")
    (shard,) = [path for path in (tmp_path / "labels").iterdir() if path.suffix == ".safetensors"]
    shard.write_bytes(shard.read_bytes()[:-100])
    message = complaint(capsys, options_for(data, tmp_path / "run", data__labels=tmp_path / "labels"))
    assert shard.name in message


def test_an_image_that_does_not_decode(data, tmp_path, capsys):
    shutil.copytree(data / "scenes" / "train", tmp_path / "train")
    (tmp_path / "train" / "3" / "00003.png").write_bytes(b"not an image")
    arguments = options_for(data, tmp_path / "run", data__train=tmp_path / "train")
    message = complaint(capsys, arguments)
    assert "3/00003.png" in message
    assert "skip" in message
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    assert main([*map(str, arguments), "--data.skip-broken=true"]) == 0


def test_images_that_changed_after_they_were_labelled_are_said_before_training(data, tmp_path, capsys):
    images, labels = tmp_path / "train", tmp_path / "labels"
    shutil.copytree(data / "scenes" / "train", images)
    masks = data / "scenes" / "masks" / "train"
    assert main(["annotate", str(images), str(labels), "--teacher", f"masks:{masks}"]) == 0
    options = [str(option) for option in options_for(data, tmp_path / "run", data__train=images, data__labels=labels)]
    assert main([*options, "--dry-run"]) == 0
    assert "were labelled" not in capsys.readouterr().err
    shutil.copy(images / "3" / "00003.png", images / "4" / "00004.png")
    assert main([*options, "--dry-run"]) == 0
    assert (
        "1 of 20 images that were looked at are not those that were labelled (4/00004.png)" in capsys.readouterr().err
    )


def test_annotate_fails_where_no_image_decodes(demo, tmp_path, capsys):
    for name in ("3/a.png", "5/b.png"):
        (tmp_path / "train" / name).parent.mkdir(parents=True)
        (tmp_path / "train" / name).write_bytes(b"not an image")
    options = ["--teacher", str(demo / "teacher"), "--class-map", "names"]
    assert main(["annotate", str(tmp_path / "train"), str(tmp_path / "labels"), *options]) == 2
    assert "2 failed" in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["train", "segment train", "segment eval", "segment predict", "annotate", "merge"])
def test_a_verb_without_a_word_says_what_it_needs(verb, capsys):
    assert "the following arguments are required: " in complaint(capsys, verb.split())


def test_a_want_of_memory_is_one_line(monkeypatch, capsys):
    def allocate(words: list[str]) -> int:
        return len(torch.empty(2**60))

    monkeypatch.setitem(VERBS, "train", (allocate, ""))
    message = complaint(capsys, ["train"])
    assert "not enough memory; take fewer images at a time (--batch-size, in training --micro-batch-size)" in message


def test_annotate_lists_what_does_not_decode_and_goes_on(demo, data, tmp_path, capsys):
    shutil.copytree(data / "scenes" / "train", tmp_path / "train")
    (tmp_path / "train" / "3" / "00003.png").write_bytes(b"not an image")
    arguments = ["annotate", tmp_path / "train", tmp_path / "labels", "--teacher", demo / "teacher"]
    assert main(list(map(str, arguments))) == 0
    printed = capsys.readouterr().out
    assert "1 failed" in printed
    assert "3/00003.png" in printed
    assert len(LabelStore(tmp_path / "labels")) == 19


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--optim.lrr=3", "did you mean --optim.lr"),
        ("--mix.kind=mixtokens", "none, mixtoken, cutmix, mixup"),
        ("--epochs=many", "epochs"),
        ("--recipe=demo_techer", "did you mean demo_teacher"),
        ("--model.name=resnet5", "resnet5"),
        ("--device=tpu9", "tpu9"),
    ],
)
def test_mistakes_in_options(data, tmp_path, capsys, option, words):
    assert words in complaint(capsys, [*options_for(data, tmp_path / "run"), option])


def test_a_model_without_a_token_grid(data, tmp_path, capsys):
    arguments = options_for(data, tmp_path / "run", model__name="resnet10t", model__options__depth=None)
    message = complaint(capsys, [*arguments, "--model.options={}", "--model.img-size=[32,32]"])
    assert "resnet10t has no token grid" in message


def test_a_run_of_another_recipe_is_not_touched(data, tmp_path, capsys):
    arguments = options_for(data, tmp_path / "run")
    assert main(list(map(str, arguments))) == 0
    message = complaint(capsys, [*arguments, "--seed=5"])
    assert "seed: 0 there, 5 here" in message


def test_help_of_a_verb_may_be_asked_for_in_two_orders(capsys):
    shown = []
    for words in (["help", "merge"], ["merge", "--help"]):
        with pytest.raises(SystemExit):
            main(words)
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]


@pytest.mark.parametrize(
    "command",
    [
        ("fit-head", "images", "taken/head.safetensors", "--backbone", "run", "--from", "words"),
        ("export", "run", "taken/model.safetensors"),
        ("eval", "run", "--output", "taken/figures.json"),
        ("inspect", "labels", "--output", "taken/figures.json"),
        ("demo", "--out", "taken/a/demo"),
    ],
)
def test_what_cannot_be_written_is_said_before_the_work(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("taken").touch()
    said = complaint(capsys, command)
    assert "cannot be written" in said
    assert "taken is a file); choose another place" in said


def test_an_unknown_verb(capsys):
    assert "did you mean train?" in complaint(capsys, ["trian"])


def test_a_folder_that_is_no_run(tmp_path, capsys):
    assert "neither a run folder with a checkpoint" in complaint(capsys, ["eval", tmp_path])
    assert "holds no recipe.yaml" in complaint(capsys, ["report", tmp_path])
    words = ("train", "--recipe", "finetune", "--data.train", tmp_path, "--out", tmp_path / "out")
    assert "gone is not there to take it from" in complaint(capsys, [*words, "--model.weights", "gone"])
    assert "no such folder; give a run folder" in complaint(capsys, ["report", tmp_path / "run"])
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.yaml").touch()
    assert f"give its runs {tmp_path}/first, {tmp_path}/second" in complaint(capsys, ["report", tmp_path])


def test_the_demo_needs_no_arguments(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("tokenlabel.demo.run_demo", lambda out, size, command: asked.append(out) or 0)
    assert main(["demo"]) == 0
    assert main(["demo", "--fast"]) == 0
    assert main(["demo", "--fast", "--out", str(tmp_path)]) == 0
    assert asked == [Path("runs/demo"), Path("runs/demo-fast"), tmp_path]
