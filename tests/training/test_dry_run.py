"""What is tried out before a run: that it says what is true, and leaves nothing that a run would continue from."""

import pytest
import torch
from test_train import nested_recipe, write_labels

from tokenlabel.classification.task import build
from tokenlabel.cli import main
from tokenlabel.data.scenes import write_scenes
from tokenlabel.runtime.configuration import config_from_dict, write_config
from tokenlabel.training.dry_run import PICTURES_NAME, dry_run
from tokenlabel.training.recipe import Recipe

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def nested(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(root, num_train=40, num_val=20, seed=0)
    write_labels(root / "masks" / "train", root.parent / "labels")
    return nested_recipe(root)


def recipe_of(nested, **changes):
    return config_from_dict({**nested, **changes}, Recipe, name="recipe")


def test_a_dry_run_says_sizes_schedule_and_cost_and_draws_the_first_images(nested, tmp_path):
    recipe = recipe_of(nested)
    told = dry_run(recipe, build, tmp_path / "run", device=CPU)
    num_parameters = sum(p.numel() for p in build(recipe, device=CPU).model.parameters())
    assert f"lvvit_t: {num_parameters:,} parameters" in told
    assert "40 with a label map; 10 classes, 24 x 24 px" in told
    assert f"4 x 4 tokens; labels of tokens by {nested['data']['labels']}" in told
    assert "8 images: 1 process x 1 part of 8; fp32" in told
    assert "15, 5 an epoch" in told
    assert "1e-06 at 0, " in told
    assert "0.002 at 5, " in told
    for name in ("a step", "the run", "memory", "losses         loss "):
        assert name in told
    assert [path.name for path in (tmp_path / "run").iterdir()] == [PICTURES_NAME]
    page = (tmp_path / "run" / PICTURES_NAME).read_text()
    assert page.count("<small>targets of its tokens") == 6


def test_a_dry_run_without_token_labels(nested, tmp_path):
    data = {**nested["data"], "labels": None}
    recipe = recipe_of(nested, data=data)
    told = dry_run(recipe, build, tmp_path, device=CPU)
    assert "no labels of tokens" in told


def test_the_command_line_dry_runs_in_place_of_training(nested, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    write_config(recipe_of(nested), path)
    arguments = ["train", "--recipe", str(path), "--out", str(tmp_path / "run"), "--device", "cpu"]
    assert main([*arguments, "--dry-run"]) == 0
    assert "learning rate" in capsys.readouterr().out
    assert not (tmp_path / "run" / "checkpoints").exists()
