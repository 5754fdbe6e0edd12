"""The four stories of the README, command by command as they stand there, from a folder as it describes.

Nothing can be downloaded here and no test may take long: each command gets weights of the same network from a file, and
options at its end that make it small.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from tokenlabel.data.scenes import write_scenes

README = Path(__file__).parents[1] / "README.md"
SHORT = "--epochs 1 --min-epoch-steps 1 --batch-size 10 --micro-batch-size 10 --data.num-workers 0 --precision fp32"
TINY = "--model.img-size 48 --model.options {patch_size: 6, depth: 1, width: 16, num_heads: 2, stem_width: 8}"
PRETRAINED = "--model.options.pretrained false --model.img-size 64"
# What each command needs beside its own words, by a part of it.
SMALL = {
    "--from words": "--weights ../vit_small_patch16_dinov3.lvd1689m.safetensors --size 64 --words 8",
    "--from labels": "--weights ../convnextv2_nano.fcmae.safetensors --size 64",
    "--recipe pretrain": f"{SHORT} {TINY}",
    "--recipe finetune": SHORT,
    "small_data --out runs/teacher": f"{SHORT} {PRETRAINED} "
    "--model.weights ../convnextv2_nano.fcmae_ft_in22k_in1k.safetensors",
    "--recipe segment_": "--num-steps 1 --batch-size 2 --data.num-workers 0 --precision fp32 --model.name resnet10t "
    "--model.options.pretrained false --model.img-size 48 --model.head-width 8",
    "--out runs/first": f"{SHORT} {PRETRAINED} --model.name resnet10t --model.weights ../resnet10t.safetensors",
}


def stories() -> list[list[list[str]]]:
    """Return the blocks of commands under "On your own images", each command as words."""
    section = README.read_text(encoding="utf-8").split("## On your own images")[1].split("\n## ")[0]
    blocks = re.findall(r"(?:^    .+\n)+", section, flags=re.MULTILINE)
    commands = [block.replace("\\\n", " ").strip().splitlines() for block in blocks]
    return [
        [shlex.split(line) for line in lines] for lines in commands if lines[0].split()[0] == "tokenlabel"
    ]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    root = tmp_path_factory.mktemp("readme")
    write_scenes(root / "scenes", num_train=20, num_val=10, seed=0)
    torch.manual_seed(0)
    for name in {
        Path(word).stem for text in SMALL.values() for word in text.split() if ".safetensors" in word
    }:
        save_file(timm.create_model(name).state_dict(), root / f"{name}.safetensors")
    return root


def test_the_readme_has_four_stories():
    assert [len(story) for story in stories()] == [4, 2, 3, 6]


@pytest.mark.parametrize("number", range(4))
def test_the_commands_of_a_story_work_in_turn(here, number):
    folder = here / f"story_{number}"
    folder.mkdir()
    shutil.copytree(here / "scenes", folder / "few_labelled")
    if number == 3:
        shutil.copytree(here / "scenes", folder / "images")
    else:
        (folder / "images").mkdir()
        for path in (here / "scenes" / "train").glob("*/*.png"):
            shutil.copy(path, folder / "images")
    if number == 2:
        write_few(here / "scenes", folder / "few")
    for words in stories()[number]:
        text = " ".join(words)
        extra = [option for part, options in SMALL.items() if part in text for option in split(options)]
        done = subprocess.run(
            [sys.executable, "-m", *words, *extra], cwd=folder, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{text}\n{done.stderr[-2000:]}"
    made = ("runs/few/recipe.yaml", "labels/manifest.json", "runs/small/recipe.yaml", "report.html")[number]
    assert (folder / made).is_file()


def write_few(scenes: Path, folder: Path) -> None:
    """Write every other scene with its mask, and the names of the classes."""
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for image in sorted((scenes / "train").glob("*/*.png"))[::2]:
        shutil.copy(image, folder / "images")
        shutil.copy(scenes / "masks/train" / image.relative_to(scenes / "train"), folder / "masks")
    (folder / "classes.txt").write_text("".join(f"{digit}\n" for digit in range(10)))


def split(options: str) -> list[str]:
    """Return words, one in braces as one."""
    return re.findall(r"\{.*?\}|\S+", options)
