import json
import os
import resource
from contextlib import contextmanager

import pytest
import torch

from tokenlabel.models import create_model
from tokenlabel.models.load import load_model
from tokenlabel.models.runs import list_checkpoints, read_state, read_tensors
from tokenlabel.runtime.configuration import config_from_dict
from tokenlabel.runtime.errors import ModelError
from tokenlabel.training.checkpoint import TrainState, load_checkpoint, load_run, prune_checkpoints, save_checkpoint
from tokenlabel.training.recipe import OptimConfig, Recipe
from tokenlabel.training.trainer import create_ema, create_optimizer

OPTIONS = {"patch_size": 8, "depth": 1, "width": 16, "num_heads": 2, "stem_width": 8}
RECIPE = config_from_dict(
    {
        "data": {"train": "images"},
        "model": {"name": "lvvit_t", "img_size": [16, 16], "options": OPTIONS},
        "optim": {"lr": 1e-3, "lr_batch_size": 4},
        "epochs": 1,
        "batch_size": 4,
    },
    Recipe,
    name="test",
)
CLASS_NAMES = ["ant", "bee", "cat"]


def trained_for(steps, *, seed=0, config=None):
    config = config or OptimConfig(lr=1e-2, lr_batch_size=4)
    torch.manual_seed(seed)
    model = create_model("lvvit_t", num_classes=3, img_size=(16, 16), **OPTIONS)
    model.to(memory_format=torch.channels_last)
    trained = TrainState(model, create_optimizer(model, config), create_ema(model, config))
    for step in range(steps):
        take_step(trained, step)
    return trained


def take_step(trained, step):
    torch.manual_seed(step)
    trained.optimizer.zero_grad()
    trained.model(torch.randn(4, 3, 16, 16)).class_logits.square().sum().backward()
    trained.optimizer.step()
    trained.ema.update(trained.model, step=step)


def save(run, step, trained):
    return save_checkpoint(run, step, trained, recipe=RECIPE, class_names=CLASS_NAMES)


def same_weights(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_a_loaded_state_goes_on_bit_by_bit(tmp_path):
    unbroken = trained_for(3)
    folder = save(tmp_path, 3, unbroken)
    continued = trained_for(0, seed=1)
    assert load_checkpoint(folder, continued) == 3
    for step in (3, 4):
        take_step(unbroken, step)
        take_step(continued, step)
    assert unbroken.ema is not None
    assert continued.ema is not None
    assert same_weights(unbroken.model, continued.model)
    assert same_weights(unbroken.ema.module, continued.ema.module)


def test_a_model_comes_back_with_its_average_and_its_classes(tmp_path):
    trained = trained_for(2)
    save(tmp_path, 2, trained)
    loaded = load_run(tmp_path)
    assert (loaded.class_names, loaded.step, loaded.recipe) == (tuple(CLASS_NAMES), 2, RECIPE)
    assert not loaded.model.training
    assert trained.ema is not None
    assert same_weights(loaded.model, trained.ema.module)


def test_without_an_average_the_weights_themselves_come_back(tmp_path):
    config = OptimConfig(lr=1e-2, lr_batch_size=4, ema_decay=None)
    trained = trained_for(0, config=config)
    save(tmp_path, 0, trained)
    assert same_weights(load_run(tmp_path).model, trained.model)


def test_pruning_keeps_what_is_spared_and_leads_to_the_best(tmp_path):
    trained = trained_for(1)
    for step in (1, 5, 10, 100_000_000):
        save(tmp_path, step, trained)
    (tmp_path / "checkpoints" / ".writing-00000003").mkdir()
    for best in (10, 5):  # the link is made, then moved
        prune_checkpoints(tmp_path, {5, 10, 100_000_000}, best=best)
        assert load_run(tmp_path / "checkpoints" / "best").step == best
    assert [int(path.name) for path in list_checkpoints(tmp_path)] == [5, 10, 100_000_000]
    assert not list((tmp_path / "checkpoints").glob(".*"))


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize(
    "damage", [lambda data: data[:-5], lambda data: data[:-9] + b"x" + data[-8:], lambda data: b""]
)
def test_a_damaged_file_is_named(tmp_path, name, damage):
    folder = save(tmp_path, 1, trained_for(1))
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(damage(data))
    with pytest.raises(ModelError, match=f"{name}.*altered.*remove this folder"):
        load_checkpoint(folder, trained_for(0))


def test_tensors_come_in_the_same_order_in_every_process(tmp_path):
    """Ranks would wait for each other with different ones."""
    folder = save(tmp_path, 1, trained_for(1))
    for name in ("model.safetensors", "optimizer.safetensors"):
        names = [*read_tensors(folder, name, read_state(folder))]
        assert names == sorted(names)
        assert len(names) > 9


def test_colleagues_may_read_what_the_umask_lets_them(tmp_path):
    before = os.umask(0o027)
    try:
        folder = save(tmp_path, 1, trained_for(1))
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o640}


def test_a_missing_file_is_named(tmp_path):
    folder = save(tmp_path, 1, trained_for(1))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors: cannot be read"):
        load_checkpoint(folder, trained_for(0))


def test_another_network_than_the_recipe_makes_is_refused(tmp_path):
    folder = save(tmp_path, 1, trained_for(1))
    state = json.loads((folder / "state.json").read_text())
    state["recipe"]["model"]["options"]["depth"] = 2
    (folder / "state.json").write_text(json.dumps(state))
    other = create_model("lvvit_t", num_classes=3, img_size=(16, 16), **OPTIONS | {"depth": 2})
    with pytest.raises(ModelError, match=r"another network than its recipe makes here: it lacks backbone\.blocks\.1"):
        load_checkpoint(folder, TrainState(other, torch.optim.SGD(other.parameters()), None))
    with pytest.raises(ModelError, match=r"another network than its recipe makes here: it lacks backbone\.blocks\.1"):
        load_run(tmp_path)


def test_another_format_is_refused(tmp_path):
    folder = save(tmp_path, 1, trained_for(1))
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"format": 99}))
    with pytest.raises(ModelError, match=r"format 99.*train in another folder"):
        load_run(folder)


@pytest.mark.parametrize("content", ["[]", "null", '{"format": 2, "step": 1}'])
def test_a_state_that_lacks_something_is_named(tmp_path, content):
    folder = save(tmp_path, 1, trained_for(1))
    (folder / "state.json").write_text(content)
    with pytest.raises(ModelError, match=r"state\.json was altered.*remove this folder"):
        load_run(folder)


def test_a_segmentation_model_is_sent_to_its_verbs(tmp_path):
    folder = save(tmp_path, 1, trained_for(1))
    state = json.loads((folder / "state.json").read_text())
    state["recipe"]["data"] = {"layout": "folders"}
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(ModelError, match=f"{tmp_path}: holds a segmentation model, .*`tokenlabel segment eval`"):
        load_run(tmp_path)


def test_a_folder_without_a_run_says_what_to_give(tmp_path):
    with pytest.raises(ModelError, match="run folder that `tokenlabel train` made"):
        load_run(tmp_path)


@contextmanager
def files_of_at_most(num_bytes):
    """Let writing a larger file fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("file", ["model.safetensors", "state.json"])
def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, file):
    trained = trained_for(1)
    first = save(tmp_path, 1, trained)
    room = 1000  # less than either file
    if file == "state.json":  # smaller than the tensors: these must not be what fails
        trained = TrainState(torch.nn.Identity(), torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]), None)
    with files_of_at_most(room), pytest.raises(ModelError, match=r"(?i)too large.*earlier checkpoints are intact"):
        save(tmp_path, 2, trained)
    assert [int(path.name) for path in list_checkpoints(tmp_path)] == [1]
    assert load_checkpoint(first, trained_for(0)) == 1
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_a_run_from_pretrained_weights_is_loaded_without_fetching_them(tmp_path, monkeypatch):
    recipe = {
        "data": {"train": "images"},
        "model": {"name": "resnet10t", "img_size": [64, 64], "options": {"pretrained": True}},
        "optim": {"lr": 1e-3, "lr_batch_size": 4, "ema_decay": None},
        "epochs": 1,
        "batch_size": 4,
    }
    model = create_model("resnet10t", num_classes=3, img_size=(64, 64))
    trained = TrainState(model, torch.optim.SGD(model.parameters()), None)
    save_checkpoint(tmp_path, 1, trained, recipe=config_from_dict(recipe, Recipe, name="test"), class_names=CLASS_NAMES)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert same_weights(load_run(tmp_path).model, model)
    larger = load_model(tmp_path, img_size=96)
    assert larger.img_size == (96, 96)
    assert same_weights(larger.model, model)
