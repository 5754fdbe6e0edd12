"""Export: what comes out works without us, and says what the model says."""

import json
import resource
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tokenlabel import Head
from tokenlabel.cli import main
from tokenlabel.core.config import Inference
from tokenlabel.models import create_model, load_published
from tokenlabel.models.load import LoadedModel, load_model, of_run
from tokenlabel.models.positions import resize_positions
from tokenlabel.models.weights import adapter_name
from tokenlabel.runtime.configuration import config_as_dict, config_from_dict
from tokenlabel.runtime.errors import ConfigError
from tokenlabel.training.checkpoint import TrainState, load_run, save_checkpoint, with_recipe
from tokenlabel.training.export import export_run, write_hub_folder, write_onnx, write_safetensors
from tokenlabel.training.recipe import Recipe
from tokenlabel.training.trainer import create_ema, create_optimizer

CLASS_NAMES = ["ant", "bee", "cat"]
LVVIT = ("lvvit_t", (24, 36), {"patch_size": 6, "depth": 2, "width": 32, "num_heads": 4, "stem_width": 8})
RESNET = ("test_resnet", (64, 96), {"stage": 3})
VIT = ("vit_tiny_patch16_224", (32, 48), {"depth": 2, "embed_dim": 32, "num_heads": 2})
T2T = ("t2t_vit_14", (32, 32), {"depth": 1, "width": 32, "num_heads": 4})


def trained_model(
    name: str, img_size: tuple[int, int], options: dict[str, Any], *, labels: str | None = "labels"
) -> LoadedModel:
    recipe = config_from_dict(
        {
            "data": {"train": "images", "labels": labels},
            "model": {"name": name, "img_size": list(img_size), "options": options},
            "optim": {"lr": 1e-3, "lr_batch_size": 4},
            "epochs": 1,
            "batch_size": 4,
        },
        Recipe,
        name="test",
    )
    model = create_model(name, num_classes=3, img_size=img_size, **options)
    return with_recipe(of_run(model, config_as_dict(recipe), CLASS_NAMES, step=1))


def test_safetensors_hold_what_it_takes_to_build_the_model_again(tmp_path: Path) -> None:
    trained = trained_model(*LVVIT)
    path = tmp_path / "model.safetensors"
    write_safetensors(trained, path)
    with safe_open(path, framework="pt") as file:
        description = {key: json.loads(value) for key, value in file.metadata().items() if key != "format"}
    assert description["class_names"] == CLASS_NAMES
    assert description["mean"] == list(trained.model.mean)
    again = create_model(
        description["model"], num_classes=3, img_size=tuple(description["img_size"]), **description["options"]
    ).eval()
    load_published(again, path)
    images = torch.randn(1, 3, 24, 36)
    torch.testing.assert_close(again(images).class_logits, trained.model(images).class_logits)


@pytest.mark.parametrize(
    ("case", "patch", "new_grid"), [(LVVIT, 6, (6, 4)), (LVVIT, 6, (6, 8)), (VIT, 16, (3, 2)), (VIT, 16, (6, 8))]
)
def test_positions_of_images_that_are_not_square_are_those_of_their_grid(
    tmp_path: Path, case: tuple[str, tuple[int, int], dict[str, Any]], patch: int, new_grid: tuple[int, int]
) -> None:
    """Also where the model's grid has as many tokens."""
    trained, (name, (height, width), options) = trained_model(*case), case
    write_safetensors(trained, tmp_path / "model.safetensors")
    again = create_model(name, num_classes=3, img_size=(new_grid[0] * patch, new_grid[1] * patch), **options)
    load_published(again, tmp_path / "model.safetensors")
    theirs, ours = (model.state_dict()["backbone.pos_embed"] for model in (trained.model, again))
    torch.testing.assert_close(ours, resize_positions(theirs, (height // patch, width // patch), new_grid))


def test_a_run_opens_for_images_of_another_size(tmp_path: Path) -> None:
    """BEiT's biases by relative position are of one size; its options make it small."""
    beit = ("beit_base_patch16_224", (64, 64), {"depth": 1, "embed_dim": 32, "num_heads": 2})
    for case in (beit, VIT):
        save_run(tmp_path / case[0], case)
        loaded = load_model(tmp_path / case[0], img_size=(96, 128))
        assert (loaded.model.grid, loaded.img_size) == ((6, 8), (96, 128))
        assert loaded.model(torch.zeros(1, 3, 96, 128)).class_logits.shape == (1, 3)


@pytest.mark.parametrize("name", ["model.safetensors", "model.onnx", "folder"])
def test_a_disk_that_is_full_is_an_error_that_names_the_export(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_run(Path("run"), RESNET)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # a file of more bytes cannot be written
    try:
        status = main(["export", "run", name])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    assert status == 2
    assert error.startswith(f"tokenlabel export: error: {name}: ")
    assert error.count("\n") == 1
    assert "File too large" in error
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("case", "inference", "dense"), [(LVVIT, Inference.COMBINED, True), (RESNET, Inference.CLASS, False)]
)
def test_onnx_says_what_the_model_says(
    tmp_path: Path, case: tuple[str, tuple[int, int], dict[str, Any]], inference: Inference, dense: bool
) -> None:
    trained = trained_model(*case)
    write_onnx(trained, tmp_path / "model.onnx", inference=inference, dense=dense)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    pixels = torch.rand(3, 3, *case[1])  # another batch than the exported one
    found: Any = session.run(None, {"pixels": pixels.numpy()})
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (trained.model.mean, trained.model.std))
    with torch.no_grad():
        outputs = trained.model((pixels - mean) / std)
        expected = [outputs.logits(inference)]
        if dense:
            expected.append(outputs.token_logits.view(3, *outputs.grid, 3))
    assert len(found) == len(expected)
    for theirs, ours in zip(found, expected, strict=True):
        np.testing.assert_allclose(theirs, ours.numpy(), atol=1e-4)
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["class_names"]) == CLASS_NAMES
    assert json.loads(metadata["inference"]) == inference.value


@pytest.mark.parametrize("case", [LVVIT, T2T, VIT, RESNET])
def test_timm_opens_the_folder(tmp_path: Path, case: tuple[str, tuple[int, int], dict[str, Any]]) -> None:
    trained = trained_model(*case)
    folder = tmp_path / "hub"
    write_hub_folder(trained, folder)
    again: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.randn(2, 3, *case[1])
    outputs = trained.model(images)
    combined = case in (LVVIT, T2T)
    torch.testing.assert_close(again(images), outputs.logits(Inference.COMBINED if combined else Inference.CLASS))
    assert json.loads((folder / "config.json").read_text())["label_names"] == CLASS_NAMES
    evaluated = load_model(f"local-dir:{folder}", at_test_size=True)  # as `tokenlabel eval` opens it
    assert (evaluated.img_size, evaluated.class_names) == (case[1], tuple(CLASS_NAMES))
    assert (evaluated.crop_fraction, evaluated.interpolation.value) == (trained.recipe.eval.crop_fraction, "bicubic")
    assert ("register_with_timm" in (folder / "README.md").read_text()) == combined
    if not combined:
        token_head = load_file(folder / "token_head.safetensors")
        assert token_head.keys() == trained.model.get_submodule("token_head").state_dict().keys()


def test_token_heads_that_were_never_trained_add_nothing(tmp_path: Path) -> None:
    trained = trained_model(*LVVIT, labels=None)
    write_hub_folder(trained, tmp_path / "hub")
    again: Any = timm.create_model(f"local-dir:{tmp_path}/hub", pretrained=True).eval()
    images = torch.randn(2, 3, *LVVIT[1])
    torch.testing.assert_close(again(images), trained.model(images).class_logits)
    with pytest.raises(ConfigError, match="it was trained without token labels; leave --inference combined out"):
        write_onnx(trained, tmp_path / "model.onnx", inference=Inference.COMBINED, dense=False)


def test_volo_gets_its_token_head_back(tmp_path: Path) -> None:
    trained = trained_model("volo_d1_224", (64, 64), {})
    write_hub_folder(trained, tmp_path / "hub")
    again: Any = timm.create_model(f"local-dir:{tmp_path}/hub", pretrained=True).eval()
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(again(images), trained.model(images).logits(Inference.COMBINED))
    assert trained.model.get_submodule("backbone").aux_head is None


def save_run(run: Path, case: tuple[str, tuple[int, int], dict[str, Any]]) -> LoadedModel:
    trained = trained_model(*case)
    optim = trained.recipe.optim
    state = TrainState(trained.model, create_optimizer(trained.model, optim), create_ema(trained.model, optim))
    save_checkpoint(run, 1, state, recipe=trained.recipe, class_names=CLASS_NAMES)
    return trained


def test_runs_are_exported_by_the_suffix_and_nothing_is_lost(tmp_path: Path) -> None:
    trained = save_run(tmp_path / "run", LVVIT)
    out = tmp_path / "deep" / "model.safetensors"
    export_run(tmp_path / "run", out)
    assert {adapter_name(name) for name in load_file(out)} == trained.model.state_dict().keys()
    with pytest.raises(ConfigError, match=r"model.safetensors exists already"):
        export_run(tmp_path / "run", out)
    export_run(tmp_path / "run", out, overwrite=True)
    folder = tmp_path / "hub"
    for overwrite in (False, True):
        export_run(tmp_path / "run", folder, overwrite=overwrite)
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "README.md"}


def test_no_run_is_replaced_by_an_export(tmp_path: Path) -> None:
    save_run(tmp_path / "runs" / "run", LVVIT)
    for out in (tmp_path / "runs" / "run", tmp_path / "runs"):
        with pytest.raises(ConfigError, match="is no folder that an export made"):
            export_run(tmp_path / "runs" / "run", out, overwrite=True)
    assert load_run(tmp_path / "runs" / "run").step == 1


@pytest.mark.parametrize("name", ["head.safetensors", "run/checkpoints/00000001/model.safetensors"])
def test_no_file_of_another_origin_is_replaced_by_an_export(tmp_path: Path, name: str) -> None:
    save_run(tmp_path / "run", LVVIT)
    Head(torch.ones(2, 3), kind="words").save(tmp_path / "head.safetensors")
    before = (tmp_path / name).read_bytes()
    with pytest.raises(ConfigError, match="holds no model that an export wrote"):
        export_run(tmp_path / "run", tmp_path / name, overwrite=True)
    assert (tmp_path / name).read_bytes() == before


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    save_run(tmp_path / "run", T2T)
    (tmp_path / "notes").touch()
    with pytest.raises(ConfigError, match="notes: is no folder that an export made"):
        export_run(tmp_path / "run", tmp_path / "notes", overwrite=True)
    (tmp_path / "notes").unlink()
    with pytest.raises(ConfigError, match=r"model.pt: expected a name in .safetensors or .onnx"):
        export_run(tmp_path / "run", tmp_path / "model.pt")
    with pytest.raises(ConfigError, match=r"only .onnx has outputs"):
        export_run(tmp_path / "run", tmp_path / "hub", dense=True)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_weights_of_a_large_graph_lie_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 0)
    save_run(tmp_path / "run", LVVIT)
    export_run(tmp_path / "run", tmp_path / "model.onnx")
    assert {path.name for path in tmp_path.iterdir()} == {"run", "model.onnx", "model.onnx.data"}
    onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])


def test_a_graph_that_says_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenlabel.training.export.EXPORT_TOLERANCE", -1.0)
    with pytest.raises(ConfigError, match=r"logits of the ONNX graph are .* off"):
        write_onnx(trained_model(*VIT), tmp_path / "model.onnx", inference=Inference.CLASS, dense=False)
