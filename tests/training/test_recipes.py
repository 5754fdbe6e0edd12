"""The recipes of the package: each builds at full size, and takes a step with a small version of its model."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from tokenlabel.classification.task import build, train
from tokenlabel.core.align import align
from tokenlabel.core.config import LogitsMode, MixConfig, Mixing
from tokenlabel.core.mix import join_plans
from tokenlabel.core.scores import from_mask
from tokenlabel.core.step import draw_mix, make_targets
from tokenlabel.data.scenes import write_scenes
from tokenlabel.labels.manifest import Manifest
from tokenlabel.labels.options import ImportConfig
from tokenlabel.labels.published import import_labels
from tokenlabel.labels.writer import LabelStoreWriter
from tokenlabel.models import create_model
from tokenlabel.runtime.arguments import Parser
from tokenlabel.runtime.configuration import config_from_dict
from tokenlabel.runtime.distributed import Ranks
from tokenlabel.runtime.errors import ConfigError
from tokenlabel.runtime.runlog import Stopwatch, read_metrics
from tokenlabel.teachers.annotation import annotate
from tokenlabel.teachers.options import AnnotateConfig
from tokenlabel.training.checkpoint import load_checkpoint
from tokenlabel.training.recipe import (
    ModelConfig,
    Recipe,
    add_recipe_arguments,
    find_recipe,
    recipe_content,
    recipe_names,
)
from tokenlabel.training.trainer import prepare, train_step

CPU = torch.device("cpu")
NAMES = [name for name in recipe_names() if not name.startswith("segment_")]
NETWORKS = [name for name in NAMES if name != "finetune"]  # whose network is that of the run that it begins with

# The beginning of a model's name: options that make it small, and a size that it takes.
SMALL = {
    "lvvit": ({"depth": 1, "width": 16, "num_heads": 2, "stem_width": 8}, 32),
    "t2t_vit": ({"depth": 1, "width": 16, "num_heads": 2}, 32),
    "deit": ({"depth": 1, "embed_dim": 24, "num_heads": 2}, 32),
    "vit": ({"depth": 1, "embed_dim": 24, "num_heads": 2, "pretrained": False}, 32),
    "mixer": ({}, 32),
    "resnest": ({"layers": [1, 1, 1, 1], "base_width": 16}, 64),
    "resnet": ({"layers": [1, 1, 1, 1], "channels": [8, 16, 24, 32]}, 64),
}
PARAMETERS = {"lvvit_t": 8_534_720, "lvvit_s": 26_151_824, "lvvit_m": 55_830_544, "t2t_vit_14": 21_930_550}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Ten scenes, their masks as labels, and the weights of a tiny teacher."""
    root = tmp_path_factory.mktemp("data")
    write_scenes(root / "scenes", num_train=10, num_val=10, seed=0)
    masks = root / "scenes" / "masks" / "train"
    manifest = Manifest(num_classes=10, class_names=tuple(str(c) for c in range(10)), topk=1)
    with LabelStoreWriter(root / "labels", manifest) as writer:
        for path in sorted(masks.rglob("*.png")):
            mask = from_mask(np.asarray(Image.open(path)), num_classes=10)
            writer.add(path.relative_to(masks).as_posix(), mask)
    torch.manual_seed(0)
    save_file(timm.create_model("test_resnet", num_classes=10).state_dict(), root / "teacher.safetensors")
    return root


def nested(name):
    return recipe_content(name, Recipe)


def head(name):
    lines = find_recipe(name).read_text().splitlines()
    return "\n".join(line for line in lines if line.startswith("#"))


def small(name, data, *, labels):
    """The recipe with a small model, ten images a step, on the scenes."""
    recipe = nested(name)
    options, img_size = next(small for prefix, small in SMALL.items() if recipe["model"]["name"].startswith(prefix))
    recipe["model"] |= {"img_size": [img_size, img_size], "options": options}
    recipe["model"]["name"] = recipe["model"]["name"].replace("mixer_b16", "mixer_s16")  # has no options
    recipe["data"] = {"train": str(data / "scenes" / "train"), "num_workers": 0}
    if labels:
        recipe["data"]["labels"] = str(data / "labels")
    if "teacher" in recipe.get("loss", {}):
        tiny = {"name": "test_resnet", "weights": str(data / "teacher.safetensors"), "size": 64}
        recipe["loss"]["teacher"] |= tiny
    recipe |= {"epochs": None, "num_steps": 2, "batch_size": 10, "micro_batch_size": 5}
    return config_from_dict(recipe, Recipe, name=name)


def wants_labels(name):
    return "--data.labels" in head(name)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_says_what_it_costs_and_how_it_is_run(name):
    text = head(name)
    assert f"--recipe {name} " in text
    assert re.search(r"[Cc]ost|minute", text)
    if not name.startswith("demo_"):
        assert "Expected top-1" in text or "No top-1 is published" in text


@pytest.mark.parametrize("name", NETWORKS)
def test_a_recipe_builds_its_model_at_full_size(name):
    """On the meta device: nothing is computed and nothing downloaded."""
    model = nested(name)["model"]
    options = {key: value for key, value in model.get("options", {}).items() if key != "pretrained"}
    with torch.device("meta"):
        made = create_model(model["name"], num_classes=1000, img_size=tuple(model["img_size"]), **options)
    if name in PARAMETERS:
        assert sum(p.numel() for p in made.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_recipe_takes_a_step(name, data):
    recipe = small(name, data, labels=wants_labels(name))
    training = prepare(build(recipe, device=CPU), Ranks())
    batches = iter(training.task.batches(training.sampler(0)))
    before = {key: p.detach().clone() for key, p in training.task.model.named_parameters()}
    values = train_step(training, batches, 1, Stopwatch()).values
    assert all(torch.isfinite(value) for value in values.values())
    assert (values["token_loss"] > 0) == recipe.uses_token_labels
    assert values["class_loss"] > 0
    moved = [key for key, p in training.task.model.named_parameters() if not torch.equal(p, before[key])]
    assert moved


@pytest.mark.parametrize("name", [name for name in NAMES if re.fullmatch(r"lvvit_[tsm]", name)])
def test_lvvit_recipes_are_the_published_ones(name):
    recipe = config_from_dict(nested(name) | {"data": {"train": "images"}}, Recipe, name=name)
    assert (recipe.optim.lr, recipe.optim.lr_batch_size, recipe.batch_size) == (1.6e-3, 1024, 1024)
    assert (recipe.optim.min_lr, recipe.optim.warmup_lr, recipe.optim.warmup_epochs) == (1e-5, 1e-6, 5)
    assert (recipe.epochs, recipe.optim.cooldown_epochs, recipe.optim.weight_decay) == (310, 10, 0.05)
    assert (recipe.optim.ema_decay, recipe.optim.ema_warmup) == (0.99992, False)
    assert (recipe.augment.randaugment, recipe.erase.probability) == ("rand-m9-mstd0.5-inc1", 0.25)
    assert (recipe.mix.kind, recipe.mix.alpha, recipe.mix.probability) == (Mixing.MIXTOKEN, 1, 1)
    assert (recipe.loss.beta, recipe.loss.label_smoothing, recipe.loss.class_target) == (0.5, 0.1, "truth")
    assert recipe.model.options["drop_path"] == (0.2 if name == "lvvit_m" else 0.1)


def test_fine_tuning_at_another_size_begins_with_the_average_of_the_first_run(data, tmp_path):
    train(small("lvvit_s", data, labels=True), tmp_path / "first", device=CPU)
    recipe = nested("lvvit_s_384")
    recipe["model"] |= {
        "img_size": [48, 48],
        "options": SMALL["lvvit"][0],
        "weights": str(tmp_path / "first" / "checkpoints" / "00000002"),
    }
    recipe["data"] = {"train": str(data / "scenes" / "train"), "num_workers": 0}
    recipe |= {"batch_size": 10, "micro_batch_size": None}
    task = build(config_from_dict(recipe, Recipe, name="fine"), device=CPU)
    first = build(small("lvvit_s", data, labels=True), device=CPU)
    averaged = prepare(first, Ranks())
    load_checkpoint(tmp_path / "first" / "checkpoints" / "00000002", averaged.state)
    assert averaged.state.ema is not None
    expected = averaged.state.ema.module.state_dict()
    assert torch.equal(task.model.state_dict()["backbone.norm.weight"], expected["backbone.norm.weight"])
    assert task.model.state_dict()["backbone.pos_embed"].shape[1] == 9 + 1


def test_mixup_takes_turns_with_cutmix(data):
    recipe = small("deit_s", data, labels=False)
    plans = [
        draw_mix(recipe.mix, 5, (2, 2), (32, 32), generator=torch.Generator().manual_seed(seed)) for seed in range(200)
    ]
    num_mixups = sum(plan is not None and plan.mask.shape[1:] == (1, 1) for plan in plans)
    assert 70 <= num_mixups <= 130
    joined = join_plans(plans, 5)
    assert joined is not None
    for number, plan in enumerate(plans):
        assert plan is not None
        group = slice(5 * number, 5 * number + 5)
        torch.testing.assert_close(joined.partner_fraction((2, 2))[group], plan.partner_fraction((2, 2)))
        assert torch.equal(joined.partner[group], plan.partner + 5 * number)


def test_mixup_takes_no_turns_with_mixtoken():
    with pytest.raises(ConfigError, match="mixup_share is for mix"):
        MixConfig(kind=Mixing.MIXTOKEN, mixup_share=0.5)
    with pytest.raises(ConfigError, match=r"mix\.probability must be at least 0 and at most 1, got 1.5"):
        MixConfig(probability=1.5)
    with pytest.raises(ConfigError, match=r"mix\.group_size must be at least 1, got -1"):
        MixConfig(group_size=-1)
    with pytest.raises(ConfigError, match=r"mix\.alpha must be above 0"):
        MixConfig(alpha=0)
    with pytest.raises(ConfigError, match=r"model\.options names num_classes"):
        ModelConfig(name="lvvit_t", options={"num_classes": 5})


def test_relabel_takes_the_published_files_as_they_are(data, tmp_path):
    """Maps of logits, pooled over the crop before the softmax."""
    for path in (data / "scenes" / "train").rglob("*.png"):
        logits = torch.randn(5, 15, 15)
        class_ids = torch.rand(10, 15, 15).argsort(dim=0)[:5]
        file = tmp_path / "files" / path.parent.name / f"{path.stem}.pt"
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(torch.stack([logits, class_ids]).half(), file)
    config = ImportConfig(num_classes=10)
    import_labels(tmp_path / "files", tmp_path / "labels", data / "scenes" / "train", config)
    recipe = small("relabel", data, labels=False)
    recipe = replace(
        recipe,
        data=replace(recipe.data, labels=str(tmp_path / "labels")),
        loss=replace(recipe.loss, map_mode=LogitsMode.PUBLISHED),
    )
    task = build(recipe, device=CPU)
    (batch, *_) = task.batches(prepare(task, Ranks()).sampler(0))
    label = make_targets(batch, task.supervision, task.grid).class_token.dense(10)[:, 0]
    assert batch.score_maps is not None
    expected = align(batch.score_maps, batch.views, (1, 1), logits=LogitsMode.PUBLISHED).dense(10)[:, 0]
    torch.testing.assert_close(label, expected)


def test_a_run_labels_the_images_for_its_successor(data, tmp_path):
    images = data / "scenes" / "train"
    train(small("lvvit_s", data, labels=True), tmp_path / "first", device=CPU)
    annotate(images, tmp_path / "own", AnnotateConfig(teacher=str(tmp_path / "first"), size=64), device=CPU)
    recipe = small("self_labels", data, labels=False)
    recipe = replace(recipe, data=replace(recipe.data, labels=str(tmp_path / "own")))
    train(recipe, tmp_path / "second", device=CPU)
    lines = [line for line in read_metrics(tmp_path / "second") if line["kind"] == "train"]
    assert lines[-1]["token_loss"] > 0


def test_the_training_guide_and_the_heads_name_options_that_exist():
    parser = Parser("train", "")
    add_recipe_arguments(parser)
    known = {*parser.options}
    known |= {"--out", "--dry-run", "--tensorboard", "--changed-numerics", "--output", "--teacher", "--size"}
    known |= {"--class-map", "--images", "--num-classes", "--precision", "--model.options", "--recipe"}
    known |= {"--backbone", "--from"}
    guide = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    text = re.sub(r"torchrun[^`]*?-m|#SBATCH.*", "", guide + "\n".join(head(name) for name in NAMES))
    named = set(re.findall(r"(?<![\w-])--[a-zA-Z][\w.-]*\w", text))
    wrong = {name for name in named - known if not name.startswith("--model.options.")}
    assert wrong <= {"--loss.FIELD", "--a.b"}
    fields = re.findall(r"^\| `(\w+)` \([^|]*\) \|", guide, re.MULTILINE)
    assert "class_target" in fields
    assert {f"--loss.{field}".replace("_", "-") for field in fields} <= known


def test_the_training_guide_lists_every_recipe():
    guide = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"`(\w+)`", guide[guide.index("## Recipes") :]))
    assert {name for name in NAMES if name not in listed and name.removesuffix("_token") not in listed} == set()
