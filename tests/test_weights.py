"""Weights from files: published checkpoints, other image sizes and class counts, files that must not run code."""

import io
import logging
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tokenlabel.models import TokenModel, create_model
from tokenlabel.models.vision_transformer import resize_positions
from tokenlabel.models.weights import WeightsError, load_published, read_checkpoint

TINY = {"depth": 2, "width": 32, "num_heads": 4, "stem_width": 8, "patch_size": 4}


def tiny(size_px: tuple[int, int] = (16, 16), num_classes: int = 7, **options: Any) -> TokenModel:
    return create_model("lvvit_t", num_classes=num_classes, size_px=size_px, **{**TINY, **options})


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
    with pytest.raises(WeightsError, match=r"ema.safetensors: no such file"):
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


@pytest.mark.parametrize("size_px", [(24, 24), (8, 28)])
def test_positions_follow_the_image_size(tmp_path: Path, size_px: tuple[int, int]) -> None:
    one, other = tiny((16, 16)), tiny(size_px)
    save_file(one.state_dict(), tmp_path / "model.safetensors")
    assert load_published(other, tmp_path).resized == ("backbone.pos_embed",)
    expected = resize_positions(one.state_dict()["backbone.pos_embed"], (4, 4), other.grid)
    torch.testing.assert_close(other.state_dict()["backbone.pos_embed"], expected)
    image = torch.randn(1, 3, *size_px)  # the model of the other size had resized them on its way
    one.eval()
    other.eval()
    torch.testing.assert_close(other(image).class_logits, one(image).class_logits)


def test_positions_that_are_no_square_need_their_grid(tmp_path: Path) -> None:
    one, other = tiny((8, 28)), tiny((16, 16))
    save_file(one.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"14 positions are no square; say their grid"):
        load_published(other, tmp_path)
    with pytest.raises(WeightsError, match=r"14 positions are not a grid of \(3, 5\)"):
        load_published(other, tmp_path, grid=(3, 5))
    load_published(other, tmp_path, grid=(2, 7))
    image = torch.randn(1, 3, 16, 16)
    one.eval()
    other.eval()
    torch.testing.assert_close(other(image).class_logits, one(image).class_logits)


def test_another_class_count_drops_the_heads_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one, other = tiny(num_classes=1000), tiny(num_classes=7)
    own_head = other.state_dict()["backbone.head.weight"].clone()
    save_file(one.state_dict(), tmp_path / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        loaded = load_published(other, tmp_path)
    assert loaded.new_heads == (
        "backbone.head.bias",
        "backbone.head.weight",
        "token_head.bias",
        "token_head.weight",
    )
    assert "head.weight" in caplog.text
    assert "start anew" in caplog.text
    assert torch.equal(other.state_dict()["backbone.head.weight"], own_head)
    torch.testing.assert_close(
        other.state_dict()["backbone.norm.weight"], one.state_dict()["backbone.norm.weight"]
    )
    torch.testing.assert_close(
        other.state_dict()["backbone.blocks.1.mlp.fc2.weight"],
        one.state_dict()["backbone.blocks.1.mlp.fc2.weight"],
    )


def test_a_checkpoint_without_token_head_leaves_a_new_one(tmp_path: Path) -> None:
    options = {"depth": 1, "width": 32, "num_heads": 4}
    one, other = (create_model("t2t_vit_14", num_classes=5, size_px=(32, 32), **options) for _ in range(2))
    published = one.get_submodule("backbone").state_dict()
    torch.save({"state_dict_ema": published}, tmp_path / "t2t.pth.tar")
    loaded = load_published(other, tmp_path / "t2t.pth.tar", average=True)
    assert loaded.new_heads == ("token_head.bias", "token_head.weight")


def test_adapters_too(tmp_path: Path) -> None:
    options = {"depth": 1, "embed_dim": 32, "num_heads": 2}
    one = create_model("vit_tiny_patch16_224", num_classes=5, size_px=(32, 32), **options)
    other = create_model("vit_tiny_patch16_224", num_classes=3, size_px=(48, 64), **options)
    save_file(one.state_dict(), tmp_path / "model.safetensors")
    loaded = load_published(other, tmp_path)
    assert loaded.resized == ("backbone.pos_embed",)
    assert "backbone.head.weight" in loaded.new_heads
    assert "token_head.bias" in loaded.new_heads


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"width": 64},
            r"for another model .* sizes differ: backbone\S+ \(.*\), .* more",
        ),
        ({"depth": 3}, r"for another model .*: it lacks backbone.blocks.2.attn.proj.bias, .* and \d+ more"),
        ({"depth": 1}, r"for another model .*: it has backbone.blocks.1.attn.proj.bias, .* and \d+ more"),
    ],
)
def test_weights_of_another_model_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    model = tiny(**options)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    save_file(tiny().state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=message):
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
    with pytest.raises(
        WeightsError, match=r"evil.pth holds more than tensors.*convert it once: python -c"
    ) as caught:
        read_checkpoint(path)
    assert "never run" not in capsys.readouterr().out
    command = str(caught.value).partition('python -c "')[2].removesuffix('"')
    exec(command, {})  # the way out works, for those who trust the file
    assert "never run" in capsys.readouterr().out
    assert read_checkpoint(f"{path}.tensors.pth").keys() == tiny().state_dict().keys()


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("a.safetensors", b"no", r"a.safetensors is damaged"),
        ("a.pth", b"", r"a.pth is damaged"),
        ("a.pth", b"abc", r"a.pth is damaged"),
        ("a.pth", pickled([1]), r"a.pth holds a list"),
        ("a.pth", pickled({"epoch": 3}), r"a.pth holds no tensors; it has epoch"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, name: str, contents: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(WeightsError, match=message):
        read_checkpoint(tmp_path / name)


def test_missing_file_and_missing_average(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"nothing.pth: no such file"):
        read_checkpoint(tmp_path / "nothing.pth")
    torch.save({"state_dict": tiny().state_dict()}, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=r"a.pth has no averaged weights"):
        read_checkpoint(tmp_path / "a.pth", average=True)
