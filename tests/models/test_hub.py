"""Names of models that mean none, and weights without a network: one line each, at once."""

import socket
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import pytest
import timm
import torch
from huggingface_hub import constants, utils
from safetensors.torch import save_file
from segment_cases import write_image, write_segmentation_state

from tokenlabel.cli import main
from tokenlabel.models import create_model
from tokenlabel.models.load import load_model
from tokenlabel.runtime import hub
from tokenlabel.runtime.errors import ModelError

TINY = "test_vit"  # of timm, .4 million parameters


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in: files and folders that are no networks."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "stopped").mkdir()
    (tmp_path / "stopped" / "recipe.yaml").touch()
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "config.json").touch()
    (tmp_path / "other" / "sub").mkdir(parents=True)
    torch.save({"a": torch.zeros(1)}, tmp_path / "resnet50.pth")
    (tmp_path / "00000001").mkdir()
    for name in ("state.json", "model.safetensors"):
        (tmp_path / "00000001" / name).touch()
    return tmp_path


REASONS = {
    "resnet50.a1_in22k": "Invalid pretrained tag (a1_in22k) for resnet50, which has a1_in1k, ",
    "resnet50.": "Invalid pretrained tag () for resnet50",
    "./resnet50.pth": "it is a file: give the name of its network, and the file by",
    "resnet50.pth": "it is a file: give the name of its network, and the file by",
    "resnet18.pth": "there is no such file",
    "00000001/model.safetensors": "it is a file of a checkpoint: give its folder, 00000001",
    "empty": "it is an empty folder",
    "./stopped": "it is a run that has no checkpoint yet",
    "exported": "did you mean local-dir:exported?",
    "other": "that folder holds neither checkpoints nor a config.json",
    "./teacher": "there is no such folder",
    "runs/teacher": "there is no such folder; a model of the Hugging Face hub is hf://runs/teacher",
    "resnt50": "did you mean resnet50 or ",
    "lvvit_x": "did you mean lvvit_",
}


@pytest.mark.parametrize("name", REASONS)
def test_a_name_that_means_no_network_is_refused_with_what_was_meant(name: str, folder: Path) -> None:
    with pytest.raises(ModelError, match=r"^no network") as caught:
        load_model(name)
    assert REASONS[name] in str(caught.value)
    with pytest.raises(ValueError, match=r"^there is no model") as caught:
        create_model(name, num_classes=2, img_size=(32, 32))
    assert REASONS[name] in str(caught.value)


def test_a_run_is_no_name_of_a_model(folder: Path) -> None:
    (folder / "run/checkpoints/00000001").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"'run'; it is a run: --model.weights run takes its weights"):
        create_model("run", num_classes=2, img_size=32)


@pytest.mark.parametrize("name", ["hf://me/road", Path("hf://me/road")])
def test_a_run_of_the_other_task_is_refused_by_the_name_that_was_typed(
    name: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_segmentation_state(tmp_path / "checkpoints/00000001")
    monkeypatch.setattr(hub, "_download", lambda *_: tmp_path)
    with pytest.raises(ModelError, match=r"^hf://me/road: holds a segmentation model, .*push and fit-head take"):
        load_model(name)


@pytest.mark.parametrize(
    "command", ["eval NAME --data images", "export NAME out", "annotate ./images out --teacher NAME"]
)
def test_what_is_no_name_on_the_hub_is_refused_as_it_was_typed(
    command: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_image(folder / "images" / "a" / "0.png", (32, 32))
    assert main(command.replace("NAME", "https://host/run").split()) == 2
    assert "error: https://host/run: expected a path, or a name on the hub" in capsys.readouterr().err


def test_a_folder_does_not_hide_the_model_of_its_name(folder: Path) -> None:
    (folder / TINY).mkdir()
    assert create_model(TINY, num_classes=2, img_size=(160, 160)).num_classes == 2


@pytest.mark.parametrize(
    "command",
    [
        "annotate ./images ./labels --teacher NAME",
        "eval NAME --data ./images",
        "train --recipe demo_teacher --out ./out --data.train ./images --batch-size 2 --model.name NAME",
        "train --recipe demo_teacher --out ./out --data.train ./images --batch-size 2 --loss.teacher.name NAME",
    ],
)
@pytest.mark.parametrize("name", ["resnet50.a1_in22k", "./resnet50.pth", "./empty"])
def test_every_verb_says_so_in_a_line(
    command: str, name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for image in ("a/0.png", "b/0.png"):
        write_image(folder / "images" / image, (32, 32))
    assert main(command.replace("NAME", name).split()) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("tokenlabel"))
    assert REASONS.get(name, REASONS[name.removeprefix("./")]) in line


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The hosts that were looked up, in vain: as without a network."""
    hosts: list[str] = []

    def look_up(host: str, *_: object, **__: object) -> None:
        hosts.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return hosts


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache, empty."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.parametrize("name", [TINY, f"hf-hub:timm/{TINY}.r160_in1k"])
def test_without_a_network_weights_are_asked_for_once(name: str, cache: Path, asked: list[str]) -> None:
    with pytest.raises(ModelError, match=r"cannot be reached.*give a checkpoint file by --weights"):
        load_model(name)
    assert len(asked) == 1, "each retry would wait longer than the one before"
    assert not constants.HF_HUB_OFFLINE, "for this load only"


def test_a_student_that_begins_with_them_fails_as_fast(cache: Path, asked: list[str]) -> None:
    with pytest.raises(ValueError, match=r"cannot be reached; --model\.weights FILE with"):
        create_model(TINY, num_classes=3, img_size=(160, 160), pretrained=True)
    assert len(asked) == 1


def test_what_is_in_the_cache_needs_no_network(cache: Path, asked: list[str]) -> None:
    stored = cache / f"models--timm--{TINY}.r160_in1k"
    for path in (stored / "refs", stored / "snapshots" / "abc"):
        path.mkdir(parents=True)
    (stored / "refs" / "main").write_text("abc")
    network = timm.create_model(TINY)
    save_file(network.state_dict(), stored / "snapshots" / "abc" / "model.safetensors")
    loaded = load_model(TINY).model
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), loaded.parameters(), strict=True))
    assert len(asked) == 1


def test_beside_a_file_of_weights_nobody_is_asked(tmp_path: Path, cache: Path, asked: list[str]) -> None:
    path = tmp_path / "weights.pth"
    torch.save(timm.create_model(TINY, num_classes=3).state_dict(), path)
    assert load_model(TINY, weights=str(path)).num_classes == 3
    with pytest.raises(ModelError, match=r"not in the cache of the hub, and .* is not asked"):
        load_model(f"hf-hub:timm/{TINY}.r160_in1k", weights=str(path))
    with pytest.raises(ModelError, match=r"nowhere\.npz: no such file"):
        load_model(TINY, weights="nowhere.npz")
    assert asked == []


def test_a_model_that_nobody_trained_is_no_teacher(asked: list[str]) -> None:
    with pytest.raises(ModelError, match="regnetz_b16_evos has no weights that could be downloaded"):
        load_model("regnetz_b16_evos")
    assert asked == []


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[Event]:
    """A network that swallows what is sent to it, until the event."""
    answer = Event()
    session = SimpleNamespace(head=lambda url, timeout: answer.wait(60))
    monkeypatch.setattr(utils, "get_session", lambda: session)
    yield answer
    answer.set()


def test_a_network_that_never_answers_is_given_up(silent: Event, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "REACH_WITHIN_S", 0.01)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with hub.hub_or_cache():
        assert constants.HF_HUB_OFFLINE
    assert not silent.is_set()
    assert not constants.HF_HUB_OFFLINE
