"""One network by all its names: its run, its checkpoint, its exports, and what `eval` says of each by default."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tokenlabel.core.config import Inference
from tokenlabel.data.scenes import write_scenes
from tokenlabel.models.load import load_model
from tokenlabel.runtime.errors import ModelError

TRAIN = """train --out run --data.train scenes/train --data.val scenes/val --data.labels labels --data.num-workers 0
 --recipe demo_token_labels --model.name lvvit_t --model.img-size 32,24 --num-steps 3 --batch-size 8 --precision bf16
 --eval.inference tokens --eval.crop-fraction .8 --eval.batch-size 16 --device cpu
 --model.options {"depth":1,"width":16,"num_heads":2,"patch_size":8,"stem_width":8}"""


def tokenlabel(*words: str) -> str:
    done = subprocess.run([sys.executable, "-m", "tokenlabel", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("load"))
        write_scenes(Path("scenes"), num_train=40, num_val=20, seed=0)
        tokenlabel("annotate", "scenes/train", "labels", "--teacher", "masks:scenes/masks/train", "--size", "6")
        tokenlabel(*TRAIN.split())
        tokenlabel("export", "run", "run.safetensors")
        tokenlabel("export", "run", "hub")
        yield Path.cwd()


def test_a_run_and_its_export_have_the_same_figures_by_default(folder, monkeypatch):
    monkeypatch.chdir(folder)
    found = {}
    for name, words in {"run": ["run"], "export": ["lvvit_t", "--weights", "run.safetensors"]}.items():
        data = [] if len(words) == 1 else ["--data", "scenes/val"]
        figures = json.loads(tokenlabel("eval", *words, *data, "--json", "--num-workers", "0", "--device", "cpu"))
        for key in ("network", "images_per_s", "step"):
            figures.pop(key, None)
        found[name] = figures
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
