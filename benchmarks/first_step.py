"""How long training takes to know its images: `python -m benchmarks.first_step [--images 1281167]`.

Of as many images as ImageNet has, with a label each, as a folder, a list and indexed tar files: what is done between
the imports and the first batch (`build`), in a process of its own, the first time and once the cache knows them.
Seconds of processor time, and memory with the imports. The images are links to tiny files; writing them takes longer
than all else.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from tokenlabel.core.scores import from_mask
from tokenlabel.data.tars import write_index
from tokenlabel.labels.manifest import Manifest
from tokenlabel.labels.writer import LabelStoreWriter, pack_for

NUM_CLASSES = 1000
NUM_TARS = 128


def main() -> None:
    """Write the images, open them in every form, print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1_281_167)
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.open:
        print(json.dumps(_built(options.open)))
        return
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        _write(root, options.images)
        print("| images | seconds, first | again | MiB of imports | MiB | at most |\n|---|---|---|---|---|---|")
        for form in ("train", "train/list.tsv", "tars"):
            first, again = _measured(root, form), _measured(root, form)
            memory = " | ".join(f"{again[part]:,.0f}" for part in ("imports", "held", "most"))
            print(f"| {form} | {first['seconds']:.1f} | {again['seconds']:.1f} | {memory} |", flush=True)


def _measured(root: Path, form: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.first_step", "--open", str(root / form)]
    environment = {**os.environ, "TOKENLABEL_CACHE": str(root / "cache"), "OMP_NUM_THREADS": "1"}
    time.sleep(2.5)  # a folder that has just been written is not kept
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return json.loads(done.stdout)


def _built(images: Path) -> dict[str, float]:
    """Build a training run on images, in this process; return processor seconds, and memory in MiB."""
    import torch

    from tokenlabel.classification.task import build
    from tokenlabel.runtime.configuration import config_from_dict
    from tokenlabel.training.recipe import Recipe

    options = {"patch_size": 6, "depth": 2, "width": 64, "num_heads": 2, "stem_width": 16}
    data = {"train": str(images), "labels": str(images.parents[images.is_file()] / "labels")}
    nested = {
        "data": data,
        "model": {"name": "lvvit_t", "img_size": [48, 48], "options": options},
        "optim": {"lr": 1e-3, "lr_batch_size": 8},
        "epochs": 1,
        "batch_size": 8,
    }
    recipe = config_from_dict(nested, Recipe, name="first step")
    imports, began_s = _resident_mib(), time.process_time()
    with tempfile.TemporaryDirectory() as run:
        build(recipe, device=torch.device("cpu"), run=Path(run))
        seconds = time.process_time() - began_s
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": seconds, "imports": imports, "held": _resident_mib(), "most": most}


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def _write(root: Path, num_images: int) -> None:
    """Write the images in all three forms, and their labels."""
    names = [f"n{number:08d}" for number in range(NUM_CLASSES)]
    image, manifest = root / "image.jpg", Manifest(num_classes=NUM_CLASSES, class_names=tuple(names), topk=1)
    manifest.teacher["name"] = "a network"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(image)
    record = pack_for(manifest, "", from_mask(np.array([[0, 1]]), num_classes=NUM_CLASSES, unlabelled=-1))
    keys = [f"{names[i % NUM_CLASSES]}/{names[i % NUM_CLASSES]}_{i}.JPEG" for i in range(num_images)]
    with LabelStoreWriter(root / "labels", manifest) as writer:
        for key in keys:
            writer.add_record(key, record)
    for i, key in enumerate(keys):
        path = root / "train" / key
        if i < NUM_CLASSES:  # a file has room for 65,000 links at the most
            path.parent.mkdir(parents=True)
            path.write_bytes(image.read_bytes())
        else:
            os.link(root / "train" / keys[i % NUM_CLASSES], path)
    (root / "train" / "list.tsv").write_text("".join(f"{key}\t{key.partition('/')[0]}\n" for key in keys))
    (root / "tars").mkdir()
    for number in range(NUM_TARS):
        with tarfile.open(root / "tars" / f"part-{number:04}.tar", "w") as tar:
            for key in keys[number::NUM_TARS]:
                tar.add(image, key)
    write_index(root / "tars")


if __name__ == "__main__":
    main()
