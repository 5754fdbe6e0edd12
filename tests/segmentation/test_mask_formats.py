"""Masks as people have them: many classes, COCO's files, and what is said of them before training."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from segment_cases import BACKBONE, write_image

from tokenlabel.cli import main
from tokenlabel.segmentation.classes import IGNORED, numbered_classes
from tokenlabel.segmentation.pairs import Layout, SegmentDataConfig, open_pairs

NUM_CLASSES = 300


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to work in, by relative paths."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_recipe(data: dict[str, Any], **changes: Any) -> None:
    """Write recipe.yaml of a small model on two folders."""
    folders = {"train": "images", "masks": "masks", "val": "images", "val_masks": "masks"}
    recipe = {
        "data": {"layout": "folders", "num_workers": 0, **folders, **data},
        "model": {"name": "lvvit_t", "img_size": [24, 24], "options": BACKBONE, "head": "fcn", "neck_width": 16,
                  "head_width": 8},
        "optim": {"lr": 1e-3, "lr_batch_size": 2},
        "num_steps": 1,
        "batch_size": 2,
        **changes,
    }  # fmt: skip
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))


def write_many_classes() -> list[np.ndarray]:
    """Write four images whose masks of 16 bits hold 300 classes and, once each, 65535; return the masks."""
    rng, masks = np.random.default_rng(0), []
    Path("masks").mkdir()
    for number in range(4):
        mask = rng.permutation(24 * 30).reshape(24, 30).astype(np.uint16) % NUM_CLASSES
        mask[-1, -1] = 65_535
        write_image(Path(f"images/{number}.png"), (24, 30), seed=number)
        Image.fromarray(mask).save(f"masks/{number}.png")
        masks.append(mask)
    return masks


def test_more_than_255_classes_are_trained_evaluated_and_predicted(folder, capsys):
    masks = write_many_classes()
    names = [f"kind {number}" for number in range(NUM_CLASSES)]
    write_recipe({"class_names": names})
    assert main(["segment", "train", "--recipe", "recipe.yaml", "--out", "run"]) == 0
    assert main(["segment", "eval", "run"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(figures["class_iou"]) == NUM_CLASSES
    assert figures["absent_classes"] == []
    assert main(["segment", "predict", "run", "images", "--out", "predicted"]) == 0
    predicted = np.stack([np.asarray(Image.open(f"predicted/masks/{number}.png")) for number in range(4)])
    assert predicted.dtype == np.uint16
    counted = np.stack(masks) < NUM_CLASSES
    assert (predicted == np.stack(masks))[counted].mean() == figures["pixel_accuracy"]


def test_ids_beyond_8_bits_keep_their_numbers(folder):
    write_many_classes()
    names = tuple(map(str, range(NUM_CLASSES)))
    config = SegmentDataConfig(layout=Layout.FOLDERS, train="images", masks="masks", class_names=names)
    pairs = open_pairs(config, "train")
    assert pairs is not None
    pairs.check()
    _, ids = pairs.read(0)
    values = np.asarray(Image.open("masks/0.png")).astype(int)
    assert (ids == np.where(values == 65_535, IGNORED, values)).all()
    assert 255 in ids


def test_65535_is_none_of_more_than_255_classes_and_the_number_of_classes_has_a_limit():
    many = numbered_classes([*map(str, range(256))])
    assert (many.id_of(255), many.id_of(65_535)) == (255, IGNORED)
    assert numbered_classes([*map(str, range(255))]).id_of(255) == IGNORED
    with_background = numbered_classes([*map(str, range(256))], background="nothing")
    assert with_background.id_of(65_535) == 256
    with pytest.raises(ValueError, match=r"expected 1 to 32,767 different names of classes, got 32,768"):
        numbered_classes([*map(str, range(32_768))])
