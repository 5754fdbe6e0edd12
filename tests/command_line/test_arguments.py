"""How options may be written on a command line."""

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import tokenlabel
from tokenlabel.cli import VERBS, main
from tokenlabel.drawing.page import Page
from tokenlabel.runtime.arguments import Parser, add_figures, configured, device_of, parse, parse_config
from tokenlabel.runtime.configuration import config_from_dict, read_yaml
from tokenlabel.runtime.process import write_whole
from tokenlabel.teachers.folds import FoldPredictions
from tokenlabel.teachers.options import AnnotateConfig
from tokenlabel.training.recipe import Recipe, add_recipe_arguments, recipe_content


def read(*arguments: str) -> AnnotateConfig:
    parser = Parser("annotate", "")
    parser.add_argument("images")
    parser.add_argument("store")
    return parse_config(parser, [*arguments], AnnotateConfig)[1]


@pytest.mark.parametrize(
    ("arguments", "changes"),
    [
        (("images", "labels", "--strict"), {"strict": True}),
        (("--strict", "images", "labels"), {"strict": True}),
        (("images", "labels", "--flip", "--strict", "false"), {"flip": True, "strict": False}),
        (("images", "labels", "--strict=true", "--flip=false"), {"strict": True, "flip": False}),
        (("images", "labels", "--class-map", "a-b.csv"), {"class_map": "a-b.csv"}),
        (("images", "labels", "--class_map=a-b.csv"), {"class_map": "a-b.csv"}),
        (("images", "labels", "--batch-size=3"), {"batch_size": 3}),
        (("images", "labels", "--topk", "1", "--topk", "2"), {"topk": 2}),
        (("images", "labels", "--weights", "a.pth", "--weights=b.pth"), {"weights": ["a.pth", "b.pth"]}),
    ],
)
def test_options_may_be_written_short(arguments, changes):
    assert read("--teacher", "t", *arguments) == AnnotateConfig(teacher="t", **changes)


def test_several_teachers():
    one, two, three = (["--teacher", name] for name in ("resnet18", "local-dir:x", "masks:y"))
    assert read("images", "labels", *one).teacher == "resnet18"
    assert read(*one, "images", "labels", *two, *three).teacher == ["resnet18", "local-dir:x", "masks:y"]


def test_an_option_that_does_not_exist_is_an_error():
    with pytest.raises(ValueError, match="unrecognized arguments: --strct; did you mean --strict"):
        read("images", "labels", "--teacher", "t", "--strct")


# What used to be taken for an option, or was lost: `./batch-size` spells --batch-size from its third letter on.
VALUES = (
    "./batch-size",
    "./teacher",
    "xxteacher",
    "r.json",
    "-1",
    "-x.png",
    "--no-option",
    "teacher",
    "a=b",
    "a b",
    "#1",
    "&a",
    "2024",
    "true",
    "=",
)


@pytest.mark.parametrize("value", VALUES)
def test_a_word_after_an_option_is_its_value(value):
    config = read("--class-map", value, "images", "labels", "--teacher", value, f"--weights={value}")
    assert (config.class_map, config.teacher, config.weights) == (value, value, value)


def test_an_option_is_no_value_but_behind_an_equals_sign():
    with pytest.raises(ValueError, match="--teacher: expected a value, got the option --strict"):
        read("images", "labels", "--teacher", "--strict")
    with pytest.raises(ValueError, match=r"--teacher: expected a value$"):
        read("images", "labels", "--teacher")
    assert read("images", "labels", "--teacher=--strict").teacher == "--strict"


def test_an_empty_word_is_a_variable_that_is_not_set():
    with pytest.raises(ValueError, match="--class-map: expected a value, got an empty word"):
        read("images", "labels", "--teacher", "t", "--class-map", "")
    with pytest.raises(ValueError, match="an empty word among the arguments"):
        read("", "labels", "--teacher", "t")
    assert read("images", "labels", "--teacher", "t", "--weights", "").weights == ""


@pytest.mark.parametrize("written", ["-strict", "\u2013strict", "\u2014strict", "\u2013-strict"])
def test_dashes_of_other_kinds_are_not_taken_for_values(written):
    with pytest.raises(ValueError, match=f"unrecognized arguments: {written}; did you mean --strict"):
        read("images", "labels", "--teacher", "t", written)


@pytest.mark.parametrize(("word", "value"), [("yes", True), ("1", True), ("off", False), ("False", False)])
def test_other_words_for_true_and_false(word, value):
    for words in (["--strict", word], [f"--strict={word}"]):
        assert read("images", "labels", "--teacher", "t", *words).strict is value
    parser = Parser("x", "")
    parser.add_argument("--fast", action="store_true")
    assert parse(parser, ["--fast", word]).fast is value
    with pytest.raises(ValueError, match="--fast: expected true or false, got 'perhaps'"):
        parse(parser, ["--fast=perhaps"])


def test_a_home_folder_behind_an_equals_sign(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert read("images", "labels", "--teacher", "t", "--class-map=~/a.csv").class_map == "/home/me/a.csv"


@pytest.mark.parametrize(("option", "is_file"), [("--out", True), ("--output", False), ("--probabilities", False)])
def test_a_file_is_no_folder_and_a_folder_no_file(option, is_file, tmp_path):
    parser = Parser("x", "")
    parser.add_argument(option, type=Path)
    path = tmp_path / "there"
    path.write_text("") if is_file else path.mkdir()
    with pytest.raises(ValueError, match=f"{option} {path}: is a f"):
        parse(parser, [option, str(path)])


def test_what_is_there_but_cannot_be_written_to_is_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
    for option, path in (("--output", tmp_path / "file"), ("--out", tmp_path)):
        parser = Parser("x", "")
        parser.add_argument(option, type=Path)
        with pytest.raises(ValueError, match=f"{path}: cannot be written .nothing can be made in {tmp_path}"):
            parse(parser, [option, str(path)])


def test_figures_replace_no_file_of_another_kind(tmp_path):
    parser = Parser("x", "")
    add_figures(parser)
    of_all = json.dumps({"class": {"network": "run"}}, indent=1)
    for text in ("", '{\n "network": "run"\n}\n', '{\n "num_images": 8\n}\n', of_all):
        (tmp_path / "there").write_text(text)
        parse(parser, ["--output", str(tmp_path / "there")])
    # a recipe, metrics.jsonl, a store's manifest, a page
    for text in ("epochs: 30\n", '{"step": 10}\n{"step": 20}\n', '{\n "format_version": 1\n}\n', "<!doctype html>\n"):
        (tmp_path / "there").write_text(text)
        with pytest.raises(ValueError, match="there: exists and is no file of figures; choose another file"):
            parse(parser, ["--output", str(tmp_path / "there")])


def test_a_page_and_probabilities_replace_their_like_only(tmp_path, capsys):
    Page("older").write(tmp_path / "page")
    FoldPredictions([], np.zeros(0, np.int64), np.zeros((0, 2), np.float32), ["a", "b"]).save(tmp_path / "probs")
    (tmp_path / "own.html").write_text("<!doctype html>\n<html><head><title>mine</title>")
    np.savez(tmp_path / "own.npz", a=np.zeros(3))
    options = ["--images", "images", "--out-of-fold", "resnet10t"]
    for option, good, bad in (("--pictures", "page", "own.html"), ("--probabilities", "probs", "own.npz")):
        assert main(["inspect", "nowhere", *options, option, str(tmp_path / good)]) == 2
        assert "nowhere" in capsys.readouterr().err
        assert main(["inspect", "nowhere", *options, option, str(tmp_path / bad)]) == 2
        assert f"{bad}: exists and is no " in capsys.readouterr().err


def test_a_page_is_written_into_a_pipe():
    reader, writer = os.pipe()
    Page("piped").write(Path(f"/dev/fd/{writer}"))
    os.close(writer)
    with os.fdopen(reader) as file:
        assert file.read().startswith("<!doctype html>")


def test_a_file_is_written_into_a_pipe_or_a_device():
    reader, writer = os.pipe()
    write_whole(Path(f"/dev/fd/{writer}"), '{"top1": 0.5}\n')
    os.close(writer)
    with os.fdopen(reader) as file:
        assert file.read() == '{"top1": 0.5}\n'


def test_options_that_take_several_words_or_none():
    parser = Parser("x", "")
    parser.add_argument("--scales", type=float, nargs="+")
    parser.add_argument("--set", nargs="*", action="append", default=[])
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("images", type=Path)
    options = parse(parser, ["--fast", "./scales", "--scales", ".5", "-1", "--set", "a=./set", "b=--fast", "--set"])
    assert (options.fast, options.images, options.scales) == (True, Path("scales"), [0.5, -1])
    assert options.set == [["a=./set", "b=--fast"], []]
    assert parse(parser, ["--", "--fast"]).images == Path("--fast")
    with pytest.raises(ValueError, match="--fas; did you mean --fast"):  # nothing is abbreviated
        parse(parser, ["./images", "--fas"])


def test_names_in_a_list_stay_words():
    assert read("images", "labels", "--teacher", "[1, no, ~]").teacher == ["1", "no", "~"]
    assert read("images", "labels", "--teacher", "[a").teacher == "[a"


def recipe_of(*arguments: str) -> Recipe:
    parser = Parser("train", "")
    parser.add_argument("--out", "--run", type=Path, required=True)
    add_recipe_arguments(parser)
    options = parse(
        parser, ["--recipe", "demo_teacher", *arguments], read_recipe=lambda name: recipe_content(name, Recipe)
    )
    assert options.out == Path("out")
    return configured(parser, options, Recipe)


def test_every_spelling_of_a_recipes_options():
    dashed = recipe_of("--out", "./out", "--data.train", "./data.val", "--data.num-workers", "3", "--eval.batch-size=4")
    assert (dashed.data.train, dashed.data.num_workers, dashed.eval.batch_size) == ("./data.val", 3, 4)
    assert dashed == recipe_of("--run=out", "--data.train=./data.val", "--data.num_workers=3", "--eval.batch_size", "4")
    options = recipe_of("--out", "out", "--data.train", "a", "--model.options.drop-path-rate", "./x").model.options
    assert options["drop_path_rate"] == "./x"
    assert recipe_of("--out", "out", "--data.train", "a", "--seed", "010").seed == 10


@pytest.mark.parametrize(
    ("words", "img_size"),
    [("96", (96, 96)), ("96x64", (96, 64)), ("96,64", (96, 64)), ("(96, 64)", (96, 64)), ("[96, 64]", (96, 64))],
)
def test_every_spelling_of_a_pair(words, img_size):
    recipe = recipe_of("--out", "out", "--data.train", "a", "--model.img-size", words, "--augment.crop-scale", ".8,.9")
    assert (recipe.model.img_size, recipe.augment.crop_scale) == (img_size, (0.8, 0.9))


def test_options_override_a_recipe_wherever_they_stand():
    recipe = recipe_of("--out", "out", "--epochs", "3", "--data.train", "a", "--recipe", "small_data")
    assert recipe.epochs == 3
    assert recipe.model.name == recipe_of("--out", "out", "--data.train", "a", "--recipe", "small_data").model.name


def test_a_recipe_as_editors_and_people_write_it(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("model: {name: x, img_size: 96}\ncompile: no\noptim: {lr: 1e-3}\naugment:\n", encoding="utf-8-sig")
    for recipe in (
        recipe_of("--recipe", str(path), "--out", "out", "--data.train", "a"),
        config_from_dict(
            read_yaml(path) | {"data": {"train": "a"}, "optim": {"lr": 1e-3, "lr_batch_size": 8}}
            | {"batch_size": 8, "epochs": 1}, Recipe, name="own",
        ),
    ):  # fmt: skip
        assert (recipe.model.img_size, recipe.compile, recipe.optim.lr) == ((96, 96), "no", 1e-3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model", "lvvit_s"), "--model: expected a mapping .* one value goes to --model.name"),
        (("--data.labels", "a", "b"), "arguments: b; to name several, write --data.labels before each"),
        (("--loss.hard", "maybe"), "arguments: maybe; --loss.hard takes true or false"),
        (("--epochs", ""), "--epochs: expected a value"),
        (("--model.options", "{depth:2,width:48}"), "in quotes and with a space behind each colon"),
    ],
)
def test_an_error_says_what_to_write(words, message):
    with pytest.raises(ValueError, match=message):
        recipe_of("--out", "out", "--data.train", "a", *words)


def test_each_process_of_a_job_takes_a_gpu_of_its_own(monkeypatch):
    for name, value in {"is_available": True, "device_count": 4}.items():
        monkeypatch.setattr(f"torch.cuda.{name}", lambda value=value: value)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert [str(device_of(name)) for name in ("auto", "cuda")] == ["cuda:3", "cuda:3"]


@pytest.mark.parametrize("name", ["gpu", "CPU", "cuda:0:1", "meta", "mps"])
def test_a_device_that_is_none(name):
    with pytest.raises(ValueError, match=f"--device {name}: expected cpu, cuda, cuda:1, ... or auto; ") as error:
        device_of(name)
    assert len(str(error.value)) < 160


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "own.yaml: cannot be read as YAML"),
        ("- 3", "own.yaml: expected a mapping of keys to values, got list"),
        (
            "optim: {lr: 1, wieght_decay: 2}",
            "own.yaml: unknown key optim.wieght_decay; did you mean optim.weight_decay",
        ),
        ("data: a", "own.yaml: data: expected a mapping of fields, got 'a'"),
        ("data: {train: [a]}", "own.yaml: data.train: expected str, got"),
    ],
)
def test_a_recipe_that_is_none_is_named_and_keeps_its_keys(text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("own.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        recipe_of("--recipe", "./own.yaml", "--out", "out", "--data.train", "a")


@pytest.mark.parametrize("verb", ["train", "segment train"])
def test_help_lists_what_can_be_read_and_every_field(verb, capsys):
    with pytest.raises(SystemExit):
        main([*verb.split(), "--help"])
    shown = capsys.readouterr().out
    assert len(re.findall("^  --", shown, re.MULTILINE)) <= 75
    assert "[0, -1]" not in shown  # what stands for a size that is not given
    assert "keep_every_epochs (null): Also keep one every so many epochs for good" in " ".join(shown.split())


@pytest.mark.parametrize(
    "words",
    [
        ("--mix.kind", "cutmix", "--mix.alpha", ".5"),
        ("--mix", "{kind: cutmix, alpha: 0.5}"),
        ("--mix={alpha: 0.5}", "--mix.kind=cutmix"),
    ],
)
def test_a_group_is_given_as_a_whole_or_by_its_fields(words):
    """Over a recipe: what an option does not name stays."""
    mix = recipe_of("--out", "out", "--data.train", "a", *words).mix
    assert (mix.kind, mix.alpha, mix.probability) == ("cutmix", 0.5, 0.5)


@pytest.mark.parametrize(
    ("words", "instead"),
    [
        (("--overfit", "8"), "--overfit; it is gone: for a few images by heart"),
        (("--profile",), "--profile; it is gone: --dry-run says"),
        (("--optim.eps", "1e-6"), "--optim.eps; it is gone: AdamW's is PyTorch's"),
        (("--optim", "{betas: [0.9, 0.95]}"), "optim.betas; it is gone: AdamW's are PyTorch's"),
        (("--eval.num_workers", "3"), "--eval.num_workers; it is gone: evaluation takes data.num_workers"),
        (("--erase.min-aspect", ".5"), "--erase.min-aspect; it is gone: boxes are"),
        (("--loss.correct-teacher", "true"), "--loss.correct-teacher; it is gone: loss.class_target both"),
    ],
)
def test_an_option_that_is_gone_is_named_with_what_to_do_instead(words, instead):
    with pytest.raises(ValueError, match=re.escape(instead)):
        recipe_of("--out", "out", "--data.train", "a", *words)


def test_what_the_changelog_calls_gone_or_renamed_is_answered_with_what_to_do_instead(capsys):
    changes = (Path(__file__).parents[2] / "CHANGELOG.md").read_text("utf-8").partition("### Changed since 0.1")[2]
    bullet = next(text for text in changes.split("\n- ") if "are gone, and an error says" in text)
    verb, renamed, gone = (re.findall(r"`(.+?)`", part) for part in bullet.split("; "))
    assert main(verb[0].split()[1:]) == 2
    assert f"it is gone: {verb[1]}" in capsys.readouterr().err
    assert len(gone) == 7
    answers = {renamed[0]: f"it is called --model.{renamed[1].replace('_', '-')}"} | dict.fromkeys(gone, "it is gone: ")
    for name, answer in answers.items():
        with pytest.raises(ValueError, match=answer):
            recipe_of("--out", "out", "--data.train", "a", f"--{name.lstrip('-')}", "1")


def test_help_shows_one_spelling(capsys):
    verbs = [name for name in VERBS if name != "segment"] + ["segment train", "segment eval", "segment predict"]
    for verb in verbs:
        with pytest.raises(SystemExit):
            main([*verb.split(), "--help"])
        shown = capsys.readouterr().out
        assert re.findall(r"--[a-z.-]*_[a-z_.]*|--run\b|--[a-z.-]+\+", shown) == [], verb


def test_a_gone_name_is_refused_by_its_new_one(tmp_path):
    with pytest.raises(ValueError, match=r"--model\.size-px; it is called --model\.img-size now"):
        recipe_of("--out", "out", "--data.train", "a", "--model.size-px", "96")
    path = tmp_path / "own.yaml"
    path.write_text("model: {name: x, size_px: 96}\n")
    with pytest.raises(ValueError, match=r"own\.yaml: unknown key model\.size_px; it is called model\.img_size now"):
        recipe_of("--recipe", str(path), "--out", "out", "--data.train", "a")


@pytest.mark.parametrize(
    "verb", [*sorted(VERBS.keys() - {"demo", "segment"}), "segment train", "segment eval", "segment predict"]
)
def test_a_verb_alone_says_what_it_needs(verb, capsys):
    assert main(verb.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert ": error: the following arguments are required: " in line


def test_what_print_config_prints_is_a_recipe(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["--recipe", "demo_teacher", "--epochs", "3", "--model.options.depth", "2", "--data.train", "a"]
    with pytest.raises(SystemExit):
        main(["train", *words, "--print-config"])
    Path("own.yaml").write_text(capsys.readouterr().out)
    assert recipe_of("--recipe", "own.yaml", "--out", "out") == recipe_of(*words, "--out", "out")


def printed(capsys, *words: str) -> dict[str, Any]:
    with pytest.raises(SystemExit):
        main(["train", *words, "--print-config"])
    return yaml.safe_load(capsys.readouterr().out)


def test_print_config_prints_what_a_run_takes(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("model: {name: lvvit_t, img_size: [96, 64], options: {depth: 2}}\n")
    words = ("--recipe", "finetune", "--model.weights", str(tmp_path))
    of_run = {"name": "lvvit_t", "img_size": [96, 64], "options": {"depth": 2}, "average": None}
    for more in (("--data.train", "a"), ()):  # without the images the rest is as complete as it can be
        found = printed(capsys, *words, *more)
        assert found["data"]["train"] == (more[1] if more else None)
        assert of_run.items() <= found["model"].items()
    assert printed(capsys, "--model.name", "test_vit")["model"]["img_size"] == [224, 224]
    for more in (("--data.train", "a"), ()):  # the run is not known yet
        found = printed(capsys, "--recipe", "finetune", *more)["model"]
        assert found == {
            "name": None, "img_size": None, "options": {}, "weights": None, "average": None, "frozen_layers": 0
        }  # fmt: skip


@pytest.mark.parametrize("path", sorted((Path(tokenlabel.__file__).parent / "recipes").glob("*.yaml")), ids=str)
def test_every_recipe_can_be_printed_as_it_is(path, capsys):
    verb = "segment train" if path.name.startswith("segment") else "train"
    with pytest.raises(SystemExit) as stop:
        main([*verb.split(), "--recipe", path.stem, "--print-config"])
    assert not stop.value.code
    assert len(yaml.safe_load(capsys.readouterr().out)["data"]) > 8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("garbage", "words"), "unrecognized arguments: garbage words"),
        (("--model.img-size", "0"), "--model.img-size must be at least 1, got [0, 0]"),
    ],
)
def test_print_config_refuses_what_a_run_refuses(words, message, capsys):
    for more in ((), ("--data.train", "a")):
        assert main(["train", "--recipe", "demo_teacher", "--print-config", *more, *words]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("words", [("--model.average", "null"), ("--model.average=~",), ("--model", "{average: null}")])
def test_a_switch_may_be_null_where_that_means_something(words):
    assert recipe_of("--out", "out", "--data.train", "a", *words).model.average is None
    with pytest.raises(ValueError, match=r"--model\.average: expected true or false or null, got 'no one'"):
        recipe_of("--out", "out", "--data.train", "a", "--model.average=no one")
    with pytest.raises(ValueError, match=r"null; --loss\.hard takes true or false$"):
        recipe_of("--out", "out", "--data.train", "a", "--loss.hard", "null")
