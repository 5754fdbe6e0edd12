import dataclasses

import pytest
import yaml

from tokenlabel.core.config import Mixing
from tokenlabel.runtime.configuration import ConfigError, config_as_dict, read_config, settings, write_config
from tokenlabel.training.recipe import Recipe, find_recipe, recipe_names

MINIMAL = {
    "data": {"train": "images"},
    "model": {"name": "lvvit_t"},
    "optim": {"lr": 1e-3, "lr_batch_size": 100},
    "epochs": 3,
    "batch_size": 10,
}


def read(path):
    return read_config(path, Recipe)


@pytest.fixture
def write(tmp_path):
    def write_yaml(nested):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(nested))
        return path

    return write_yaml


def test_a_recipe_survives_being_written_and_read(write, tmp_path):
    recipe = read(
        write(MINIMAL | {"mix": {"kind": "mixtoken"}, "model": {"name": "x", "options": {"depth": 2}}})
    )
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
        (
            {"optim": {"lr": 1e-3, "lr_batch_size": 100, "wieght_decay": 1}},
            ["wieght_decay", "optim.weight_decay"],
        ),
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
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(ConfigError, match="mapping"):
        read(tmp_path / "list.yaml")


def test_an_unknown_recipe_is_answered_with_the_near_name():
    with pytest.raises(ConfigError, match="did you mean demo_teacher"):
        find_recipe("demo_techer")


@pytest.mark.parametrize("name", [name for name in recipe_names() if not name.startswith("segment_")])
def test_every_recipe_of_the_package_is_read(name, write):
    text = find_recipe(name).read_text()
    assert text.startswith("#"), "a recipe's head says what it does and what it costs"
    nested = yaml.safe_load(text)
    read(write(nested | {"data": {"train": "images"} | nested.get("data", {})}))
