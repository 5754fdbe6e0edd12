"""The scripts of the guides run in small, and docs/guides.md shows them. Run by `make examples`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from tokenlabel.data.scenes import write_scenes

FOLDER = Path(__file__).parent
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.sh"))


def lines_of(name: str) -> list[str]:
    """Return the commands of a script."""
    lines = (FOLDER / f"{name}.sh").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.startswith(("tokenlabel ", "torchrun "))]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Scenes, weights, and a `tokenlabel` and a `torchrun` that do all in small."""
    root = tmp_path_factory.mktemp("guides")
    write_scenes(root / "scenes", num_train=60, num_val=20, seed=0)
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit", num_classes=10).state_dict(), root / "network.safetensors")
    (root / "bin").mkdir()
    for name, words in (
        ("tokenlabel", '"$@"'),
        ("torchrun", '"${@:5}"'),
    ):  # --nproc-per-node N -m tokenlabel ...
        script = f'#!/usr/bin/env bash\nexec "{sys.executable}" "{FOLDER / "in_small.py"}" {words}\n'
        (root / "bin" / name).write_text(script)
        (root / "bin" / name).chmod(0o755)
    return root


def lay_out(name: str, made: Path, folder: Path) -> None:
    """Write what a guide begins with into an empty folder."""
    scenes, images = made / "scenes", folder / "images"
    if name in ("labelled", "fine_tuning"):
        shutil.copytree(scenes, images)
    elif name == "label_errors":
        shutil.copytree(scenes / "train", images)
    elif name == "imagenet":
        shutil.copytree(scenes, folder / "imagenet")
        for path in (folder / "imagenet" / "train").rglob("*.png"):
            ids = torch.arange(5.0)[:, None, None].expand(5, 4, 4)
            label = folder / "label_top5_train_nfnet" / path.parent.name / f"{path.stem}.pt"
            label.parent.mkdir(parents=True, exist_ok=True)
            torch.save(torch.stack([torch.randn(5, 4, 4), ids]).half(), label)
    else:
        images.mkdir()
        for path in (scenes / "train").rglob("*.png"):
            shutil.copy(path, images / path.name)
        shutil.copytree(scenes, folder / "few_labelled")
        (folder / "masks").mkdir()
        for path in sorted((scenes / "masks" / "train").rglob("*.png"))[::3]:
            shutil.copy(path, folder / "masks" / path.name)
        (folder / "names.txt").write_text("".join(f"digit {i}\n" for i in range(10)))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_guide_runs_from_what_it_begins_with(name, made, tmp_path):
    """Each command succeeds, and what it is told to make is there."""
    lay_out(name, made, tmp_path)
    path = f"{made / 'bin'}{os.pathsep}{os.environ['PATH']}"
    run = {"PATH": path, "NETWORK": str(made / "network.safetensors"), "OMP_NUM_THREADS": "1"}
    words = ["bash", str(FOLDER / f"{name}.sh")]
    done = subprocess.run(
        words, cwd=tmp_path, env=os.environ | run, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
    for line in lines_of(name):
        for option in ("--out", "--output", "--pictures", "--probabilities"):
            words = line.split()
            assert option not in words or (tmp_path / words[words.index(option) + 1]).exists(), line


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_page_shows_the_script(name):
    """Word by word."""
    page = (FOLDER.parent / "docs" / "guides.md").read_text(encoding="utf-8")
    assert "".join(f"    {line}\n" for line in lines_of(name)) in page
