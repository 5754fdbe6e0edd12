"""Weights from files: published checkpoints, other image sizes and class counts, files that must not run code."""

import io
import json
import logging
import re
import warnings
from argparse import Namespace
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save, save_file
from torch import Tensor
from torch.torch_version import TorchVersion

from tokenlabel.cli import main
from tokenlabel.models import Inference, TokenModel, create_model, register_with_timm
from tokenlabel.models.load import load_model, of_run
from tokenlabel.models.names import _from_file
from tokenlabel.models.positions import fit_pretrained_positions, resize_positions
from tokenlabel.models.weight_files import read_checkpoint
from tokenlabel.models.weights import load_published
from tokenlabel.runtime.configuration import config_as_dict, config_from_dict
from tokenlabel.runtime.errors import ModelError
from tokenlabel.teachers.dense import TokenNetwork
from tokenlabel.teachers.networks import NetworkTeacher, load_teacher
from tokenlabel.teachers.options import TeacherConfig
from tokenlabel.training.checkpoint import load_run, with_recipe
from tokenlabel.training.export import write_safetensors
from tokenlabel.training.recipe import Recipe

TINY = {"depth": 2, "width": 32, "num_heads": 4, "stem_width": 8, "patch_size": 4}


def tiny(img_size: tuple[int, int] = (16, 16), num_classes: int = 7, **options: Any) -> TokenModel:
    return create_model("lvvit_t", num_classes=num_classes, img_size=img_size, **{**TINY, **options})


def pickled(contents: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(contents, buffer)
    return buffer.getvalue()


def states_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def test_safetensors_round_trip(tmp_path: Path) -> None:
    one, other = tiny(), tiny()
    save_file(one.state_dict(), tmp_path / "model.safetensors")
    for path in (tmp_path / "model.safetensors", tmp_path, str(tmp_path)):
        loaded = load_published(other, path)
        assert loaded.new_heads == loaded.resized == ()
        assert states_equal(other.state_dict(), one.state_dict())


def test_averages_in_our_own_folders(tmp_path: Path) -> None:
    plain, average, model = tiny(), tiny(), tiny()
    save_file(plain.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"no averaged weights.*--model.average false"):
        load_published(model, tmp_path, average=True)
    save_file(average.state_dict(), tmp_path / "ema.safetensors")
    load_published(model, tmp_path, average=True)
    assert states_equal(model.state_dict(), average.state_dict())


@pytest.mark.parametrize("prefix", ["", "module."])
def test_pickles_as_published(tmp_path: Path, prefix: str) -> None:
    plain, average, model = tiny(), tiny(), tiny()
    path = tmp_path / "lvvit.pth.tar"
    contents = {
        "epoch": 299,
        "arch": "lvvit_t",
        "args": Namespace(lr=1e-3),
        "state_dict": {prefix + key: value for key, value in plain.state_dict().items()},
        "state_dict_ema": {prefix + key: value for key, value in average.state_dict().items()},
    }
    torch.save(contents, path)
    load_published(model, path)
    assert states_equal(model.state_dict(), plain.state_dict())
    load_published(model, path, average=True)
    assert states_equal(model.state_dict(), average.state_dict())


def test_bare_tensors(tmp_path: Path) -> None:
    one, other = tiny(), tiny()
    torch.save(one.state_dict(), tmp_path / "model.pth")
    load_published(other, tmp_path / "model.pth")
    assert states_equal(other.state_dict(), one.state_dict())


@pytest.mark.parametrize("img_size", [(24, 24), (8, 28)])
def test_positions_follow_the_image_size(tmp_path: Path, img_size: tuple[int, int]) -> None:
    one, other = tiny((16, 16)), tiny(img_size)
    save_file(one.state_dict(), tmp_path / "model.safetensors")
    assert load_published(other, tmp_path).resized == ("backbone.pos_embed",)
    expected = resize_positions(one.state_dict()["backbone.pos_embed"], (4, 4), other.grid)
    torch.testing.assert_close(other.state_dict()["backbone.pos_embed"], expected)
    image = torch.randn(1, 3, *img_size)  # the model of the other size had resized them on its way
    one.eval()
    other.eval()
    torch.testing.assert_close(other(image).class_logits, one(image).class_logits)


def test_as_many_positions_of_another_shape_are_a_square(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was trained is smooth; what is not, as new weights, is taken as it is."""
    one, other = tiny((16, 16)), tiny((8, 32))
    states = one.state_dict()
    ramps = torch.stack(torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij"), dim=2).flatten(0, 1)
    states["backbone.pos_embed"][0, 1:, :2] = ramps
    save_file(states, tmp_path / "model.safetensors")
    assert load_published(other, tmp_path).resized == ("backbone.pos_embed",)
    assert "position embeddings of a grid of 4 x 4, by what they hold; resized to 2 x 8" in capsys.readouterr().err
    expected = resize_positions(states["backbone.pos_embed"], (4, 4), (2, 8))
    torch.testing.assert_close(other.state_dict()["backbone.pos_embed"], expected)
    for model in (other, tiny((8, 32))):
        save_file(model.state_dict(), tmp_path / "model.safetensors")
        third = tiny((8, 32))
        assert load_published(third, tmp_path).resized == ()
        assert states_equal(third.state_dict(), model.state_dict())


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "lvvit_t"])
def test_a_teacher_by_name_takes_a_square_for_one(tmp_path: Path, name: str) -> None:
    register_with_timm()
    options: dict[str, Any] = {"depth": 1, "num_heads": 2, "width" if name == "lvvit_t" else "embed_dim": 32}
    states = timm.create_model(name, num_classes=2, img_size=(64, 64), **options).state_dict()
    ramps = torch.stack(torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij"), dim=2).flatten(0, 1)
    states["pos_embed"][0, 1:, :2] = ramps
    save_file(states, tmp_path / "model.safetensors")
    size, about = (32, 128), {"uses_token_labels": True}
    network = _from_file(name, str(tmp_path / "model.safetensors"), {"img_size": size, **options}, about, img_size=size)
    found = getattr(network, "backbone", network).state_dict()["pos_embed"]
    torch.testing.assert_close(found, resize_positions(states["pos_embed"], (4, 4), (2, 8)))
    if name != "lvvit_t":  # as timm itself loads the states of a square
        plain = timm.create_model(name, num_classes=2, img_size=size, **options)
        plain.load_state_dict(states)
        fit_pretrained_positions(plain)
        torch.testing.assert_close(plain.state_dict()["pos_embed"], found)


def test_positions_that_are_no_square_need_their_grid(tmp_path: Path) -> None:
    one, other = tiny((8, 28)), tiny((16, 16))
    save_file(one.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"14 positions are no square; say their grid"):
        load_published(other, tmp_path)
    with pytest.raises(ModelError, match=r"14 positions are not a grid of \(3, 5\)"):
        load_published(other, tmp_path, grid=(3, 5))
    load_published(other, tmp_path, grid=(2, 7))
    image = torch.randn(1, 3, 16, 16)
    one.eval()
    other.eval()
    torch.testing.assert_close(other(image).class_logits, one(image).class_logits)


def test_another_class_count_drops_the_heads_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one, other = tiny(num_classes=1000), tiny(num_classes=7)
    own_head = other.state_dict()["backbone.head.weight"].clone()
    save_file(one.state_dict(), tmp_path / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        loaded = load_published(other, tmp_path)
    assert loaded.new_heads == ("backbone.head.bias", "backbone.head.weight", "token_head.bias", "token_head.weight")
    assert "head.weight" in caplog.text
    assert "newly initialised" in caplog.text
    assert torch.equal(other.state_dict()["backbone.head.weight"], own_head)
    torch.testing.assert_close(other.state_dict()["backbone.norm.weight"], one.state_dict()["backbone.norm.weight"])
    torch.testing.assert_close(
        other.state_dict()["backbone.blocks.1.mlp.fc2.weight"], one.state_dict()["backbone.blocks.1.mlp.fc2.weight"]
    )


def test_a_checkpoint_without_token_head_leaves_a_new_one(tmp_path: Path) -> None:
    options = {"depth": 1, "width": 32, "num_heads": 4}
    one, other = (create_model("t2t_vit_14", num_classes=5, img_size=(32, 32), **options) for _ in range(2))
    published = one.get_submodule("backbone").state_dict()
    torch.save({"state_dict_ema": published}, tmp_path / "t2t.pth.tar")
    loaded = load_published(other, tmp_path / "t2t.pth.tar", average=True)
    assert loaded.new_heads == ("token_head.bias", "token_head.weight")


def test_adapters_too(tmp_path: Path) -> None:
    options = {"depth": 1, "embed_dim": 32, "num_heads": 2}
    one = create_model("vit_tiny_patch16_224", num_classes=5, img_size=(32, 32), **options)
    other = create_model("vit_tiny_patch16_224", num_classes=3, img_size=(48, 64), **options)
    save_file(one.state_dict(), tmp_path / "model.safetensors")
    loaded = load_published(other, tmp_path)
    assert loaded.resized == ("backbone.pos_embed",)
    assert "backbone.head.weight" in loaded.new_heads
    assert "token_head.bias" in loaded.new_heads


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 64}, r"for another model .* sizes differ: backbone\S+ \(.*\), .* more"),
        ({"depth": 3}, r"for another model .*: it lacks backbone.blocks.2.attn.proj.bias, .* and \d+ more"),
        ({"depth": 1}, r"for another model .*: it has backbone.blocks.1.attn.proj.bias, .* and \d+ more"),
    ],
)
def test_weights_of_another_model_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    model = tiny(**options)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    save_file(tiny().state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=message):
        load_published(model, tmp_path)
    assert states_equal(model.state_dict(), before)


class Malicious:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("this must never run",))


@pytest.mark.parametrize("key", ["state_dict", "model", ""])
def test_a_pickle_that_runs_code_is_refused_with_a_way_out(
    key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, weights = tmp_path / "evil.pth", tiny().state_dict()
    torch.save({**({key: weights} if key else weights), "extra": Malicious()}, path)
    with pytest.raises(ModelError, match=r"evil.pth holds more than tensors.*convert it once: python -c") as caught:
        read_checkpoint(path)
    assert "never run" not in capsys.readouterr().out
    command = str(caught.value).partition('python -c "')[2].removesuffix('"')
    exec(command, {})  # the way out works, for those who trust the file
    assert "never run" in capsys.readouterr().out
    assert read_checkpoint(f"{path}.tensors.pth")[0].keys() == tiny().state_dict().keys()


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("a.safetensors", b"no", r"a.safetensors is damaged"),
        ("a.pth", b"", r"a.pth is damaged"),
        ("a.pth", b"abc", r"a.pth is no checkpoint \(it begins with b'abc'\)"),
        ("a.pth", b"\xff\xd8\xff\xe0" + bytes(99), r"a.pth is no checkpoint \(it begins with b'.xff.xd8"),
        ("a.pth", b"\x1f\x8b\x08" + bytes(99), r"a.pth is no checkpoint"),
        ("a.pth", save({"w": torch.ones(1)}), r"a.pth is a safetensors file by another name; call it a.safetensors"),
        ("a.pth", pickled([1]), r"a.pth holds a list"),
        ("a.pth", b"<!DOCTYPE html><html>404", r"a.pth is text that begins with '<!DOCTYPE html>"),
        ("a.pth", pickled({"epoch": 3}), r"a.pth holds no tensors; it has epoch"),
        (
            "a.pth",
            pickled({"fc.weight": torch.ones(2, 2, dtype=torch.int8)}),
            r"a.pth holds whole numbers \(torch.int8\) in fc.weight .*take the weights before they were quantised",
        ),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, name: str, contents: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(ModelError, match=message):
        read_checkpoint(tmp_path / name)


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    model = tiny()
    next(model.parameters()).data[0] = float("nan")
    torch.save(model.state_dict(), tmp_path / "diverged.pth")
    with pytest.raises(ModelError, match=r"diverged\.pth holds NaN in .* \(1 tensors\); take a checkpoint before"):
        load_published(tiny(), tmp_path / "diverged.pth")


def test_a_torchscript_archive_is_refused_with_a_way_out(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch advises against TorchScript
        torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "a.pt")
        with pytest.raises(ModelError, match=r"a.pt is a TorchScript archive.*convert it once: python -c") as caught:
            read_checkpoint(tmp_path / "a.pt")
        exec(str(caught.value).partition('python -c "')[2].removesuffix('"'), {})
    assert read_checkpoint(tmp_path / "a.pt.tensors.pth")[0].keys() == {"weight", "bias"}


def test_missing_file_and_missing_average(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nothing.pth: no such file"):
        read_checkpoint(tmp_path / "nothing.pth")
    torch.save({"state_dict": tiny().state_dict()}, tmp_path / "a.pth")
    with pytest.raises(ModelError, match=r"a.pth has no averaged weights"):
        read_checkpoint(tmp_path / "a.pth", average=True)


VIT: dict[str, Any] = {"depth": 1, "embed_dim": 32, "num_heads": 2}
SWIN: dict[str, Any] = {"depths": (1, 1, 1, 1), "embed_dim": 16, "num_heads": (1,) * 4, "window_size": 2}


@pytest.mark.parametrize(
    ("name", "options", "old_px"),
    [
        ("vit_tiny_patch16_224", VIT, 32),
        ("vit_small_patch14_dinov2", VIT, 28),
        ("deit_tiny_distilled_patch16_224", VIT, 32),
        ("swin_tiny_patch4_window7_224", SWIN, 128),
        ("cait_xxs24_224", {"depth": 1}, 32),
        ("test_resnet", {}, None),
        ("lvvit_t", {**TINY, "patch_size": 16}, 32),
        ("t2t_vit_14", {"depth": 1, "width": 32, "num_heads": 4}, 32),
    ],
)
def test_files_of_timm_fit_other_images_and_classes(
    tmp_path: Path, name: str, options: dict[str, Any], old_px: int | None
) -> None:
    size: dict[str, Any] = {} if old_px is None else {"img_size": old_px}
    register_with_timm()
    theirs: Any = timm.create_model(name, num_classes=7, **options, **size)
    torch.save(theirs.state_dict(), tmp_path / "a.pth")
    new_px = 56 if "dinov2" in name else 64
    ours: Any = create_model(name, num_classes=3, img_size=(new_px, new_px), **options)
    before, head = torch.get_rng_state(), ours.token_head.state_dict()["weight"].clone()
    loaded = load_published(ours, tmp_path / "a.pth")
    assert torch.equal(torch.get_rng_state(), before)
    assert "token_head.weight" in loaded.new_heads
    assert torch.equal(ours.token_head.weight, head)
    same_size: dict[str, Any] = {"img_size": new_px} if size else {}
    same_px: Any = timm.create_model(name, num_classes=7, **options, **same_size)
    wanted = same_px.state_dict()
    for key, value in ours.backbone.state_dict().items():
        if key in theirs.state_dict() and theirs.state_dict()[key].shape == wanted[key].shape == value.shape:
            assert torch.equal(value, theirs.state_dict()[key]), key


CONVNEXT: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 16)}


def convnext_as_published(name: str) -> str:
    """Return what Facebook's own files call a tensor of timm's ConvNeXt."""
    name = re.sub(r"^stem\.", "downsample_layers.0.", name)
    name = re.sub(r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1.", name)
    name = re.sub(r"blocks\.(\d+)\.", r"\1.", name).replace("conv_dw", "dwconv")
    name = name.replace("mlp.fc", "pwconv").replace("head.norm", "norm")
    return name.replace("head.fc", "head")


@pytest.mark.parametrize(
    "prefix", ["backbone.", "student.backbone.", "teacher.", "module.encoder.", "_forward_module.model.", "network."]
)
def test_names_that_timm_changes_are_found_below_usual_prefixes(prefix: str, tmp_path: Path) -> None:
    theirs: Any = timm.create_model("convnext_atto", num_classes=5, **CONVNEXT)
    published = {convnext_as_published(name): tensor for name, tensor in theirs.state_dict().items()}
    beside = {"losses": {"student": torch.tensor(1.0), "teacher": torch.tensor(2.0)}, "lr": {"net": torch.ones(1)}}
    tensors = below(prefix, published, **{"loss.weight": torch.ones(1)})
    torch.save({"state_dict": tensors, **beside}, tmp_path / "a.ckpt")
    ours: Any = create_model("convnext_atto", num_classes=5, img_size=(64, 64), **CONVNEXT)
    load_published(ours, tmp_path / "a.ckpt")
    assert states_equal(ours.backbone.state_dict(), theirs.state_dict())


@pytest.mark.parametrize(
    "names",
    [
        ["network.0.0.mlp.fc1.weight", "network.0.1.mlp.fc1.weight", "norm.weight"],  # PoolFormer
        ["backbone.input_stem.0.weight", "backbone.stages.0.weight", "head.weight"],  # CPUBone
    ],
)
def test_names_that_timm_changes_may_begin_like_a_prefix(names: list[str], tmp_path: Path) -> None:
    torch.save({"model": {name: torch.ones(1) for name in names}}, tmp_path / "a.pth")
    assert [*read_checkpoint(tmp_path / "a.pth")[0]] == names


def test_names_that_timm_knows_how_to_change(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    theirs: Any = timm.create_model("convnext_atto", num_classes=5, **CONVNEXT)
    published = {convnext_as_published(name): tensor for name, tensor in theirs.state_dict().items()}
    wrapped = below("module.model.", published, **{"loss.weight": torch.ones(1)})
    torch.save({"model": wrapped}, tmp_path / "a.pth")
    ours: Any = create_model("convnext_atto", num_classes=5, img_size=(64, 64), **CONVNEXT)
    load_published(ours, tmp_path / "a.pth")
    assert states_equal(ours.backbone.state_dict(), theirs.state_dict())
    assert torch.equal(ours.token_head.weight, theirs.head.fc.weight)  # the dense head of `annotate`
    assert "begins as the classifier" in capfd.readouterr().err
    other = create_model("dla46_c", num_classes=5, img_size=(64, 64))  # timm loads it without strictness
    with pytest.raises(
        ModelError,
        match=r"it lacks module\.model\.base_layer\.0\.weight, .* it has module\.model\.downsample_layers\.0",
    ):
        load_published(other, tmp_path / "a.pth")


def test_arrays_of_the_original_vits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    block, attention = "Transformer/encoderblock_0", "MultiHeadDotProductAttention_1"
    shapes: dict[str, tuple[int, ...]] = {
        "cls": (1, 1, 32),
        "embedding/kernel": (16, 16, 3, 32),
        "embedding/bias": (32,),
        "Transformer/posembed_input/pos_embedding": (1, 5, 32),
        "head/kernel": (32, 7),
        "head/bias": (7,),
        f"{block}/{attention}/out/kernel": (2, 16, 32),
        f"{block}/{attention}/out/bias": (32,),
        f"{block}/MlpBlock_3/Dense_0/kernel": (32, 128),
        f"{block}/MlpBlock_3/Dense_0/bias": (128,),
        f"{block}/MlpBlock_3/Dense_1/kernel": (128, 32),
        f"{block}/MlpBlock_3/Dense_1/bias": (32,),
    }
    for part in ("query", "key", "value"):
        shapes |= {f"{block}/{attention}/{part}/kernel": (32, 2, 16), f"{block}/{attention}/{part}/bias": (2, 16)}
    for norm in ("Transformer/encoder_norm", f"{block}/LayerNorm_0", f"{block}/LayerNorm_2"):
        shapes |= {f"{norm}/scale": (32,), f"{norm}/bias": (32,)}
    generator = np.random.default_rng(0)
    arrays: dict[str, Any] = {name: generator.random(shape, np.float32) for name, shape in shapes.items()}
    np.savez("vit.npz", **arrays)
    ours: Any = create_model("vit_tiny_patch16_224", num_classes=7, img_size=(48, 48), **VIT)
    load_published(ours, "vit.npz")
    assert torch.equal(ours.backbone.norm.weight, torch.from_numpy(arrays["Transformer/encoder_norm/scale"]))
    assert torch.equal(ours.token_head.weight, torch.from_numpy(arrays["head/kernel"]).T)
    fewer: Any = create_model("vit_tiny_patch16_224", num_classes=3, img_size=(32, 32), **VIT)
    assert "backbone.head.weight" in load_published(fewer, "vit.npz").new_heads


BARE = timm.create_model("test_resnet", num_classes=5).state_dict()
AVERAGED = {name: tensor + 1 for name, tensor in BARE.items()}


def below(prefix: str, tensors: dict[str, Tensor], **others: Tensor) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()} | others


@pytest.mark.parametrize(
    ("contents", "passed_over"),
    [
        ({"state_dict": below("module.module.", BARE)}, ""),
        ({"model": below("module._orig_mod.model.", BARE)}, ""),
        ({"epoch": 3, "net": {"weights": below("net.", BARE)}}, ""),
        (
            {"state_dict": below("model.", BARE, **{"loss.weight": torch.ones(3)}), "hyper_parameters": {"a": 1}},
            "skips loss.weight (1 tensors)",
        ),
        (below("encoder.backbone.", BARE, n_averaged=torch.tensor(3)), "skips n_averaged"),
        (below("backbone.", BARE, **{"criterion.weight": torch.ones(3, dtype=torch.long)}), "skips criterion.weight"),
        ({"state_dict": {f"layer._orig_mod.{n}".removeprefix("layer."): t for n, t in BARE.items()}}, ""),
        (
            {"optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "names": below("m.", {"a": torch.ones(1)})}}
            | BARE,
            "",
        ),
    ],
)
def test_networks_are_found_below_any_key_and_prefix(
    contents: dict[str, Any], passed_over: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    torch.save(contents, tmp_path / "a.ckpt")
    model: Any = create_model("test_resnet", num_classes=5, img_size=(64, 64))
    load_published(model, tmp_path / "a.ckpt")
    assert states_equal(model.backbone.state_dict(), BARE)
    said = capfd.readouterr().err
    assert passed_over in said
    assert ("skips" in said) == bool(passed_over)


@pytest.mark.parametrize(
    "contents",
    [
        {"state_dict": BARE, "state_dict_ema": AVERAGED},
        {"model": BARE, "model_ema": {"module": below("module.", AVERAGED)}},
        {"model": BARE, "ema": {"state_dict": AVERAGED}},
        {"model": BARE, "EMA": AVERAGED},
        {"state_dict": below("model.", BARE) | below("ema_model.module.", AVERAGED)},
        {"student": below("backbone.", BARE), "teacher": below("backbone.", AVERAGED)},
    ],
)
def test_averages_are_taken_wherever_they_are(contents: dict[str, Any], tmp_path: Path) -> None:
    torch.save(contents, tmp_path / "a.pth")
    model: Any = create_model("test_resnet", num_classes=5, img_size=(64, 64))
    load_published(model, tmp_path / "a.pth", average=True)
    assert states_equal(model.backbone.state_dict(), AVERAGED)
    load_published(model, tmp_path / "a.pth")
    assert states_equal(model.backbone.state_dict(), BARE)


def test_a_missing_average_names_what_there_is(tmp_path: Path) -> None:
    torch.save({"state_dict": BARE, "epoch": 1}, tmp_path / "a.pth")
    model = create_model("test_resnet", num_classes=5, img_size=(64, 64))
    with pytest.raises(ModelError, match=r"a.pth has no averaged weights; it has state_dict \(92 tensors\)"):
        load_published(model, tmp_path / "a.pth", average=True)


def test_pickles_may_hold_what_is_harmless(tmp_path: Path) -> None:
    beside = {
        "args": Namespace(data=PurePosixPath("/data"), out=Path("run"), drive=PureWindowsPath("C:/x")),
        "best": np.float64(0.5),
        "curve": np.arange(3.0, dtype=np.float32),
        "kind": np.dtype("int16"),
        "started": datetime(2024, 1, 2, tzinfo=UTC),
        "took": timedelta(hours=2),
        "torch": TorchVersion("2.9.0"),
        "layers": range(3),
        "frozen": frozenset({"stem"}),
    }
    torch.save({"state_dict": BARE, **beside}, tmp_path / "a.pth")
    assert read_checkpoint(tmp_path / "a.pth")[0].keys() == BARE.keys()
    torch.save({"state_dict": BARE, "hook": Malicious()}, tmp_path / "b.pth")
    with pytest.raises(ModelError, match=r"b.pth holds more than tensors \(print\)"):
        read_checkpoint(tmp_path / "b.pth")


def test_what_differs_is_called_as_in_the_file(tmp_path: Path) -> None:
    deeper: dict[str, Any] = VIT | {"depth": 2}
    other = timm.create_model("vit_tiny_patch16_224", num_classes=5, **deeper).state_dict()
    model = create_model("vit_tiny_patch16_224", num_classes=5, img_size=(32, 32), **VIT)
    torch.save(other, tmp_path / "a.pth")
    with pytest.raises(ModelError, match=r"options: it has blocks\.1\.attn\.proj\.bias, .* and \d+ more") as error:
        load_published(model, tmp_path / "a.pth")
    assert "backbone." not in str(error.value)
    assert "\n" not in str(error.value)


def test_exports_label_evaluate_and_begin_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = config_from_dict(
        {
            "data": {"train": "images", "labels": "labels"},
            "model": {"name": "vit_tiny_patch16_224", "img_size": [32, 32], "options": VIT},
            "optim": {"lr": 1e-3, "lr_batch_size": 4},
            "eval": {"crop_fraction": 0.9, "inference": "tokens"},
            "precision": "bf16",
            "epochs": 1,
            "batch_size": 4,
        },
        Recipe,
        name="test",
    )
    model = create_model("vit_tiny_patch16_224", num_classes=3, img_size=(32, 32), **VIT).eval()
    images = torch.randn(2, 3, 32, 32)
    write_safetensors(
        with_recipe(of_run(model, config_as_dict(recipe), ["a", "b", "c"], step=1)), Path("x.safetensors")
    )
    network = load_model("vit_tiny_patch16_224", weights="x.safetensors")
    assert (network.heads[0], network.precision) == (Inference.TOKENS, "bf16")  # as the run's recipe says
    assert (network.img_size, network.crop_fraction, network.class_names) == ((32, 32), 0.9, ("a", "b", "c"))
    expected = model(images)
    torch.testing.assert_close(network.model(images).token_logits, expected.token_logits)
    config = TeacherConfig(teacher="vit_tiny_patch16_224")
    teacher = load_teacher("vit_tiny_patch16_224", config, torch.device("cpu"), weights="x.safetensors")
    assert isinstance(teacher, NetworkTeacher)
    assert isinstance(teacher.dense, TokenNetwork)
    again = create_model("vit_tiny_patch16_224", num_classes=3, img_size=(32, 32), **VIT).eval()
    load_published(again, "x.safetensors")
    assert states_equal(again.state_dict(), model.state_dict())
    other = create_model("test_resnet", num_classes=3, img_size=(64, 64))
    with pytest.raises(ModelError, match=r"x\.safetensors holds vit_tiny_patch16_224, not test_resnet \(--model\.name"):
        load_published(other, "x.safetensors")
    untaught = replace(recipe, data=replace(recipe.data, labels=None))
    write_safetensors(
        with_recipe(of_run(model, config_as_dict(untaught), ["a", "b", "c"], step=1)), Path("y.safetensors")
    )
    network = load_model("vit_tiny_patch16_224", weights="y.safetensors")
    assert network.heads == (Inference.CLASS,)
    torch.testing.assert_close(network.model(images).class_logits, expected.class_logits)


def test_heads_that_nobody_trained_say_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints have a token head in any case, timm's GoogLeNet another thing called aux."""
    monkeypatch.chdir(tmp_path)
    model = create_model("test_resnet", num_classes=5, img_size=(64, 64))
    save_file(model.state_dict(), "model.safetensors")
    recipe: dict[str, Any] = {
        "model": {"name": "test_resnet", "img_size": [64, 64], "options": {}},
        "data": {"labels": None},
        "loss": {"beta": 0.5, "teacher": {"name": None}},
        "eval": {"crop_fraction": 1.0, "inference": "class"},
        "precision": "fp32",
    }
    Path("state.json").write_text(json.dumps({"recipe": recipe}))
    for name in ("test_resnet", "test_resnet.r160_in1k"):
        assert load_model(name, weights="model.safetensors").heads == (Inference.CLASS,)
    recipe["data"]["labels"] = "labels"
    Path("state.json").write_text(json.dumps({"recipe": recipe}))
    assert len(load_model("test_resnet", weights="model.safetensors").heads) == 3
    other = dict(BARE) | {"aux_head.conv.weight": torch.ones(3)}
    torch.save(other, "other.pth")
    assert load_model("test_resnet", weights="other.pth").heads == (Inference.CLASS,)


def test_a_file_of_another_network_is_refused_by_its_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": below("module.", BARE)}, "a.pth")
    with pytest.raises(ModelError, match=r"cannot be loaded \(a.pth .*it lacks .*; it has module.conv1") as error:
        load_model("test_efficientnet", weights="a.pth")
    assert "\n" not in str(error.value)


def test_training_begins_with_the_rows_of_its_own_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    theirs: Any = timm.create_model("vit_tiny_patch16_224", img_size=64, **VIT)  # 1,000 classes
    torch.save({"state_dict": below("model.", theirs.state_dict())}, "imagenet.ckpt")
    ids = {"n01440764": 0, "n02123045": 281, "zebra crossing": None}
    for name in ids:
        Path("images", name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(Path("images", name, "1.png"))
    recipe = {
        "data": {"train": "images", "num_workers": 0},
        "model": {"name": "vit_tiny_patch16_224", "img_size": [32, 32], "options": VIT, "weights": "imagenet.ckpt"},
        "optim": {"lr": 1e-9, "lr_batch_size": 3},
        "loss": {"beta": 0},
        "epochs": 1,
        "batch_size": 3,
    }
    Path("recipe.json").write_text(json.dumps(recipe))
    assert main(["train", "--recipe", "recipe.json", "--out", "run", "--device", "cpu"]) == 0
    said = capfd.readouterr().err
    assert "imagenet.ckpt: 2 of 3 classes are initialised from its heads for 1,000, by name" in said
    assert "imagenet.ckpt has no token head: it begins as the classifier" in said
    begun: Any = load_run("run").model
    classifier, published = begun.backbone.head.weight, theirs.head.weight
    for row, place in enumerate(ids.values()):
        is_theirs = place is not None and torch.allclose(classifier[row], published[place], atol=1e-6)
        assert is_theirs == (place is not None)
    torch.testing.assert_close(begun.token_head.weight, classifier, atol=1e-5, rtol=0)
