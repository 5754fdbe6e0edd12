import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from tokenlabel.cli import main
from tokenlabel.core.config import Mixing
from tokenlabel.runtime.configuration import config_as_dict, config_from_dict, read_yaml, settings, write_config
from tokenlabel.runtime.errors import ConfigError
from tokenlabel.training.recipe import ModelConfig, Recipe, find_recipe, read_recipe, recipe_content, recipe_names

MINIMAL = {
    "data": {"train": "images"},
    "model": {"name": "lvvit_t"},
    "optim": {"lr": 1e-3, "lr_batch_size": 100},
    "epochs": 3,
    "batch_size": 10,
}


def read(path):
    return config_from_dict(read_yaml(path), Recipe, name=str(path))


@pytest.fixture
def write(tmp_path):
    def write_yaml(nested):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(nested))
        return path

    return write_yaml


def test_a_recipe_survives_being_written_and_read(write, tmp_path):
    recipe = read(write(MINIMAL | {"mix": {"kind": "mixtoken"}, "model": {"name": "x", "options": {"depth": 2}}}))
    assert recipe.mix.kind is Mixing.MIXTOKEN
    write_config(recipe, tmp_path / "again.yaml")
    assert read(tmp_path / "again.yaml") == recipe


def test_a_written_recipe_names_every_field(write):
    recipe = read(write(MINIMAL))
    assert set(config_as_dict(recipe)) == {f.name for f in dataclasses.fields(recipe)}
    assert settings(recipe)["optim.weight_decay"] == 0.05


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bach_size": 3}, ["bach_size", "did you mean batch_size"]),
        ({"optim": {"lr": 1e-3, "lr_batch_size": 100, "wieght_decay": 1}}, ["wieght_decay", "optim.weight_decay"]),
        ({"epochs": "many"}, ["epochs", "many"]),
        ({"mix": {"kind": "mixtokens"}}, ["mix.kind", "mixtokens"]),
        ({"precision": "fp12"}, ["precision", "fp12"]),
    ],
)
def test_a_mistake_is_one_line_that_names_the_file_and_the_key(write, change, words):
    path = write(MINIMAL | change)
    with pytest.raises(ConfigError) as caught:
        read(path)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in [str(path), *words])


def test_a_missing_key_is_named(write):
    with pytest.raises(ConfigError, match="batch_size"):
        read(write({k: v for k, v in MINIMAL.items() if k != "batch_size"}))


def test_no_yaml(tmp_path):
    (tmp_path / "bad.yaml").write_text("a: [1, 2")
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        read(tmp_path / "bad.yaml")
    (tmp_path / "twice.yaml").write_text("optim: {lr: 1}\noptim: {lr_batch_size: 1}\n")
    with pytest.raises(ConfigError, match=r"twice\.yaml.* the key optim stands there twice .*line 2"):
        read(tmp_path / "twice.yaml")
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(ConfigError, match="mapping"):
        read(tmp_path / "list.yaml")


def test_an_unknown_recipe_is_answered_with_the_near_name():
    with pytest.raises(ConfigError, match="did you mean demo_teacher"):
        find_recipe("demo_techer")


@pytest.mark.parametrize("name", [name for name in recipe_names() if not name.startswith("segment_")])
def test_every_recipe_of_the_package_is_read(name):
    text = find_recipe(name).read_text()
    assert text.startswith("#"), "a recipe's head says what it does and what it costs"
    nested = recipe_content(name, Recipe)
    nested["data"] = {"train": "images"} | nested.get("data", {})
    nested["model"] = {"name": "lvvit_t"} | nested.get("model", {})  # or that of the run in model.weights
    config_from_dict(nested, Recipe, name=name)


# A recipe of one's own, in a folder of its own, that extends another of one's own, which extends one of the package.
FAMILY = {
    "base.yaml": "extends: lvvit_s\ndata: {train: images}\nmodel: {name: t2t_vit_14, options: {}}\nepochs: 9\n",
    "trials/one.yaml": "extends: ../base.yaml\noptim: {lr: 2.0e-3}\nmix:\n",
}


@pytest.fixture
def family(tmp_path, monkeypatch):
    for name, text in FAMILY.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_recipe_says_only_in_what_it_differs_from_another(family):
    recipe = read_recipe("trials/one.yaml", Recipe)
    content = recipe_content("lvvit_s", Recipe)
    s = config_from_dict(content | {"data": content["data"] | {"train": "images"}}, Recipe, name="lvvit_s")
    assert recipe.epochs == 9
    assert recipe.optim == dataclasses.replace(s.optim, lr=2e-3)  # a group field by field
    assert recipe.model.options == {}  # a value as a whole
    assert recipe.mix == s.mix  # a group that says nothing changes nothing
    assert recipe.data == s.data


def test_options_override_a_recipe_that_extends_another_and_what_is_printed_is_whole(family, capsys):
    words = ["--recipe", "trials/one.yaml", "--out", "out", "--epochs", "3", "--print-config"]
    with pytest.raises(SystemExit):
        main(["train", *words])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["epochs"], printed["optim"]["lr"], printed["model"]["name"]) == (3, 2e-3, "t2t_vit_14")
    assert "extends" not in printed


def test_epochs_take_the_place_of_the_steps_of_a_recipe(family, capsys):
    Path("steps.yaml").write_text("extends: base.yaml\nnum_steps: 7\noptim: {warmup_steps: 3}\n")
    Path("epochs.yaml").write_text("extends: steps.yaml\nepochs: 2\noptim: {warmup_epochs: 1}\n")
    found = [read_recipe(name, Recipe) for name in ("steps.yaml", "epochs.yaml")]
    assert [(recipe.num_steps, recipe.optim.warmup_steps) for recipe in found] == [(7, 3), (None, None)]
    with pytest.raises(SystemExit):
        main(["train", "--recipe", "steps.yaml", "--out", "out", "--epochs", "3", "--print-config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["epochs"], printed["num_steps"], printed["optim"]["warmup_steps"]) == (3, None, 3)


def test_a_folder_whose_recipe_names_no_model_is_no_run(tmp_path):
    for text in ("epochs: 3\n", "model:\n"):
        (tmp_path / "recipe.yaml").write_text(text)
        with pytest.raises(ConfigError, match=f"model.weights {tmp_path} is no run to take it from"):
            ModelConfig(weights=str(tmp_path))


@pytest.mark.parametrize(
    ("base", "words"),
    [
        ("lvvit_x", ["one.yaml: extends: no recipe 'lvvit_x'", "did you mean lvvit_"]),
        ("one.yaml", ["one.yaml, which extends", "no beginning"]),
        ("two.yaml", ["one.yaml, which extends", "two.yaml, which extends", "no beginning"]),
        ("bad.yaml", ["bad.yaml: unknown key optim.wieght_decay", "did you mean optim.weight_decay"]),
        ("[deit_s, deit_b]", ["one.yaml: extends takes the name of one recipe", "['deit_s', 'deit_b']"]),
        ("flat.yaml", ["flat.yaml: optim: expected a mapping of fields, got 3"]),
        ("segment_scenes", ["segment_scenes.yaml: unknown key", "is it a recipe of tokenlabel segment train?"]),
    ],
)
def test_a_recipe_that_cannot_be_extended_is_named_in_one_line(base, words, tmp_path, capsys):
    (tmp_path / "one.yaml").write_text(f"extends: {base}\n")
    (tmp_path / "two.yaml").write_text("extends: one.yaml\n")
    (tmp_path / "bad.yaml").write_text("optim: {wieght_decay: 1}\n")
    (tmp_path / "flat.yaml").write_text("optim: 3\n")
    status = main(["train", "--recipe", str(tmp_path / "one.yaml"), "--out", str(tmp_path / "run")])
    (line,) = capsys.readouterr().err.splitlines()
    assert status == 2
    assert all(word in line for word in words), line


def test_a_command_in_a_head_is_not_wrapped_through():
    """An option and its value stand on one line, so that they can be copied."""
    for name in recipe_names():
        for line in find_recipe(name).read_text().splitlines():
            assert not re.search(r"^#.*--[a-z.-]+$", line), f"{name}: {line}"
