"""One network by all its names: its run, its checkpoint, its exports, and what `eval` says of each by default."""

import json
from pathlib import Path

import pytest
import torch
from command_process import CommandProcess

from tokenlabel.core.config import Inference
from tokenlabel.data.scenes import write_scenes
from tokenlabel.models.load import load_model
from tokenlabel.runtime.errors import ModelError

TRAIN = """train --out run --data.train scenes/train --data.val scenes/val --data.labels labels --data.num-workers 0
 --recipe demo_token_labels --model.name lvvit_t --model.img-size 32,24 --num-steps 3 --batch-size 8 --precision bf16
 --eval.inference tokens --eval.crop-fraction .8 --eval.batch-size 16 --device cpu
 --model.options {"depth":1,"width":16,"num_heads":2,"patch_size":8,"stem_width":8}"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a run, its exports and, in `run.json` and `export.json`, the figures of both."""
    folder = tmp_path_factory.mktemp("load")
    write_scenes(folder / "scenes", num_train=40, num_val=20, seed=0)
    with CommandProcess(folder) as process:
        process.check("annotate", "scenes/train", "labels", "--teacher", "masks:scenes/masks/train", "--size", "6")
        process.check(*TRAIN.split())
        process.check("export", "run", "run.safetensors")
        process.check("export", "run", "hub")
        of_export = ["lvvit_t", "--weights", "run.safetensors", "--data", "scenes/val"]
        for name, words in (("run", ["run"]), ("export", of_export)):
            process.check("eval", *words, "--output", f"{name}.json", "--num-workers", "0", "--device", "cpu")
    return folder


def test_a_run_and_its_export_have_the_same_figures_by_default(folder):
    found = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("run", "export")}
    for figures in found.values():
        for key in ("network", "images_per_s", "step"):
            figures.pop(key, None)
    assert found["run"]["inference"] == "tokens"
    assert found["run"]["img_size"] == [32, 24]
    assert found["export"] == found["run"]


def test_all_names_lead_to_one_type(folder, monkeypatch):
    monkeypatch.chdir(folder)
    run, export = load_model("run"), load_model("lvvit_t", weights="run.safetensors")
    hub = load_model("local-dir:hub", at_test_size=True)
    images = torch.randn(2, 3, 32, 24, generator=torch.Generator().manual_seed(0))
    checkpoint = load_model(next(Path("run/checkpoints").glob("0*")))
    for other in (export, hub, checkpoint, load_model("lvvit_t", weights="run")):
        assert (other.img_size, other.crop_fraction) == (run.img_size, run.crop_fraction) == ((32, 24), 0.8)
        assert other.interpolation is run.interpolation
        assert other.class_names == run.class_names
        for name in ("class_logits", "token_logits"):
            torch.testing.assert_close(getattr(other.model(images), name), getattr(run.model(images), name))
    assert (run.heads[0], export.heads[0], run.precision, export.precision) == (
        Inference.TOKENS, Inference.TOKENS, "bf16", "bf16",
    )  # fmt: skip
    assert hub.heads[0] is Inference.COMBINED  # what timm itself says of it


def test_a_run_has_weights_of_its_own(folder, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(ModelError, match="run is a run and has weights of its own; leave --weights out"):
        load_model("run", weights="run.safetensors")


def test_weights_that_are_not_there_are_named(tmp_path):
    with pytest.raises(ModelError, match=r"nowhere\.pth: no such file; --weights takes a checkpoint file"):
        load_model("resnet18", weights=tmp_path / "nowhere.pth")
