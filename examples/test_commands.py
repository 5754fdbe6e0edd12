"""The commands of the README and of docs/guides.md, one by one as they stand there, from folders as they describe.

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

import tokenlabel as tl
from tokenlabel.data.scenes import write_scenes

ROOT = Path(__file__).parents[1]
SHORT = "--epochs 1 --min-epoch-steps 1 --batch-size 10 --micro-batch-size 10 --data.num-workers 0 --precision fp32"
TINY = "--model.img-size 48 --model.options {patch_size: 6, depth: 1, width: 16, num_heads: 2, stem_width: 8}"
PRETRAINED = "--model.options.pretrained false --model.img-size 64 --model.weights ../"
# What each command needs beside its own words, by a part of it.
SMALL = {
    "--from words": "--weights ../vit_small_patch16_dinov3.lvd1689m.safetensors --size 64 --words 8",
    "--from masks": "--weights ../vit_small_patch16_dinov3.lvd1689m.safetensors --size 64",
    "--from labels": "--weights ../convnextv2_nano.fcmae.safetensors --size 64",
    "--out-of-fold": "--weights ../convnextv2_nano.fcmae.safetensors --size 64",
    "--size 448": "--size 96",
    "--recipe pretrain": f"{SHORT} {TINY}",
    "--recipe finetune": SHORT,
    "convnextv2_nano.fcmae_ft": f"{SHORT} {PRETRAINED}convnextv2_nano.fcmae_ft_in22k_in1k.safetensors",
    "convnextv2_tiny.fcmae_ft": f"{SHORT} {PRETRAINED}convnextv2_tiny.fcmae_ft_in22k_in1k.safetensors",
    "vit_small_patch16_224.a": f"{SHORT} {PRETRAINED}vit_small_patch16_224.augreg_in21k_ft_in1k.safetensors",
    "--recipe segment_": "--num-steps 1 --batch-size 2 --data.num-workers 0 --precision fp32 --model.name resnet10t "
    "--model.options.pretrained false --model.img-size 48 --model.head-width 8",
    "--out runs/first": f"{SHORT} {PRETRAINED}resnet10t.safetensors --model.name resnet10t",
    "import-labels": "--num-classes 10",
    "--recipe lvvit_s": f"{SHORT} {TINY} --micro-batch-size 5",
}
# Each block of commands: where it stands, what it needs to find, what it makes.
STORIES = {
    "README.md: no labels": ("flat few_labelled", "runs/few/recipe.yaml"),
    "README.md: some labels": ("flat few_labelled", "labels/manifest.json"),
    "README.md: few masks": ("flat few", "runs/small/recipe.yaml"),
    "README.md: all labels": ("images", "report.html"),
    "docs/guides.md: class labels": ("images", "report.html"),
    "docs/guides.md: none": ("flat few_labelled", "runs/few/recipe.yaml"),
    "docs/guides.md: masks": ("flat masks", "again/manifest.json"),
    "docs/guides.md: wrong labels": ("classes", "probabilities.npz"),
    "docs/guides.md: fine-tune": ("images", "exported/config.json"),
    "docs/guides.md: ImageNet": ("imagenet", "runs/lvvit_s/recipe.yaml"),
}


def stories(document: str) -> list[list[list[str]]]:
    """Return the blocks of commands of a document's part about images of one's own, each command as words."""
    text = (ROOT / document).read_text(encoding="utf-8")
    text = text.split("## On your own images")[-1].split("\n## In Python")[0].split("\n## Share")[0]
    blocks = re.findall(r"(?:^    .+\n)+", text, flags=re.MULTILINE)
    commands = [block.replace("\\\n", " ").strip().splitlines() for block in blocks]
    return [[shlex.split(line) for line in lines] for lines in commands if lines[0].startswith("tokenlabel ")]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    root = tmp_path_factory.mktemp("commands")
    write_scenes(root / "scenes", num_train=20, num_val=10, seed=0)
    torch.manual_seed(0)
    for name in {Path(word).stem for text in SMALL.values() for word in text.split() if ".safe" in word}:
        save_file(timm.create_model(name).state_dict(), root / f"{name}.safetensors")
    return root


def test_every_block_of_commands_is_run():
    numbers = {document: len(stories(document)) for document in ("README.md", "docs/guides.md")}
    assert numbers == {name: sum(story.startswith(name) for story in STORIES) for name in numbers}


@pytest.mark.parametrize("story", STORIES)
def test_the_commands_of_a_story_work_in_turn(here, story):
    document = story.partition(":")[0]
    number = [name for name in STORIES if name.startswith(document)].index(story)
    needed, made = STORIES[story]
    folder = here / re.sub(r"\W+", "_", story)
    folder.mkdir()
    for what in needed.split():
        lay_out(what, here / "scenes", folder)
    for words in stories(document)[number]:
        text = " ".join(words)
        extra = [option for part, options in SMALL.items() if part in text for option in split(options)]
        if words[0] == "torchrun":
            words = ["torch.distributed.run", *("2" if word == "8" else word for word in words[1:])]
        done = subprocess.run(
            [sys.executable, "-m", *words, *extra], cwd=folder, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{text}\n{done.stderr[-2000:]}"
    assert (folder / made).is_file()


def test_the_loop_of_the_guide_computes_a_loss(here, monkeypatch):
    text = (ROOT / "docs/guides.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"(?:^    import tokenlabel as tl\n)(?:(?:    .*)?\n)+", text, flags=re.MULTILINE)
    folder = here / "loop"
    folder.mkdir()
    lay_out("images", here / "scenes", folder)
    monkeypatch.chdir(folder)
    tl.annotate("images/train", "labels", tl.AnnotateConfig(teacher="masks:images/masks/train"))
    model = tl.create_model("resnet10t", num_classes=10, img_size=64)
    names = {"transform": tl.TrainTransform(tl.AugmentConfig(), 64), "model": model}
    exec("\n".join(line[4:] for line in lines.replace("range(32)", "range(16)").splitlines()), names)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def lay_out(what: str, scenes: Path, folder: Path) -> None:
    """Copy scenes into a folder as some commands expect them."""
    train = sorted((scenes / "train").glob("*/*.png"))
    if what == "flat":
        (folder / "images").mkdir()
        for path in train:
            shutil.copy(path, folder / "images")
    elif what in ("few", "masks"):  # every other scene with its mask, and the names of the classes
        images, masks, names = folder / "images", folder / "masks", folder / "names.txt"
        if what == "few":
            images, masks, names = (folder / "few" / name for name in ("images", "masks", "classes.txt"))
            images.mkdir(parents=True)
        masks.mkdir()
        for image in train[::2]:
            shutil.copy(image, images)
            shutil.copy(scenes / "masks/train" / image.relative_to(scenes / "train"), masks)
        names.write_text("".join(f"{digit}\n" for digit in range(10)))
    elif what == "classes":
        for path in train:  # even and odd digits: of each class there have to be five for heads out of fold
            parity = folder / "images" / ("even", "odd")[int(path.parent.name) % 2]
            parity.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, parity)
    else:
        shutil.copytree(scenes, folder / what)
    if what == "imagenet":
        for path in train:
            file = (folder / "label_top5_train_nfnet" / path.relative_to(scenes / "train")).with_suffix(".pt")
            file.parent.mkdir(parents=True, exist_ok=True)
            others = [digit for digit in range(10) if digit != int(path.parent.name)][:4]
            ids = torch.tensor([int(path.parent.name), *others]).view(5, 1, 1).expand(5, 18, 18)
            torch.save(torch.stack([torch.arange(5, 0, -1).view(5, 1, 1) + 0 * ids, ids]).half(), file)


def split(options: str) -> list[str]:
    """Return words, one in braces as one."""
    return re.findall(r"\{.*?\}|\S+", options)
