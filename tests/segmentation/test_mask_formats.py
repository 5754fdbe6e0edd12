"""Masks as people have them: many classes, COCO's files, and what is said of them before training."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import yaml
from PIL import Image
from safetensors.torch import save_file
from segment_cases import BACKBONE, write_image, write_mask

from tokenlabel import Head, LabelStore
from tokenlabel.cli import main
from tokenlabel.segmentation.layouts import open_pairs
from tokenlabel.segmentation.pairs import IGNORED, numbered_classes
from tokenlabel.segmentation.recipe import Layout, SegmentDataConfig

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
    assert main(["segment", "eval", "run", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(figures["class_iou"]) == NUM_CLASSES
    assert figures["absent_classes"] == []
    assert main(["segment", "predict", "run", "images", "--out", "predicted"]) == 0
    predicted = np.stack([np.asarray(Image.open(f"predicted/masks/{number}.png")) for number in range(4)])
    assert predicted.dtype == np.uint16
    counted = np.stack(masks) < NUM_CLASSES
    assert (predicted == np.stack(masks))[counted].mean() == figures["pixel_accuracy"]


def write_streets() -> None:
    """Write three images with masks of 0 (sky), 1 (road) and 11 (nothing); no mask holds 2 (car)."""
    for number in range(3):
        write_image(Path(f"images/{number}.png"), (24, 30), seed=number)
        write_mask(Path(f"masks/{number}.png"), np.repeat([[0] * 12 + [1] * 15 + [11] * 3], 24, axis=0))


def test_a_dry_run_says_what_the_values_of_masks_mean_and_draws_the_first_pairs(folder, capsys):
    write_streets()
    write_recipe({"class_names": ["sky", "road", "car"]})
    command = ["segment", "train", "--recipe", "recipe.yaml", "--out", "run", "--dry-run"]
    assert main([*command, "--data.ignore", "11"]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert "none of 3 masks holds 1 of 3 classes (car); 10% of the pixels are 11 and do not count" in captured.err
    assert lines[0].startswith("model          lvvit_t with fcn head: ")
    assert "images         3 with masks; 3 classes, 24 x 24 px" in lines
    table = lines[lines.index("Pixels of each value in the training masks:") + 2 :]
    assert [line.split() for line in table] == [
        ["0", "sky", "864", "40.0%"],
        ["1", "road", "1,080", "50.0%"],
        ["11", "(ignored)", "216", "10.0%"],
        ["2", "car", "0", "in", "no", "mask"],
    ]
    page = Path("run/first_batch.html").read_text()
    assert page.count("<small>its mask</small>") == 2
    for text in ("</i>sky</span>", "</i>road</span>", "no label</span>", "<td>(ignored)</td>"):
        assert text in page
    assert [path.name for path in Path("run").iterdir()] == ["first_batch.html"]
    assert main(["segment", "train", "--recipe", "recipe.yaml", "--out", "images/run", "--dry-run"]) == 2
    assert "--out images/run: is inside the images images" in capsys.readouterr().err


def test_a_value_that_is_no_class_is_named_with_what_to_say(folder, capsys):
    write_streets()
    write_recipe({"class_names": [*"abcdefghijk"]})  # 11 classes, 0 to 10
    for number in range(3):
        write_mask(Path(f"masks/{number}.png"), np.arange(720).reshape(24, 30) % 12)
    assert main(["segment", "train", "--recipe", "recipe.yaml", "--out", "run"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "0.png: holds the value 11, which is no class; 11 classes have the values 0-10, 255" in error
    assert "; if 11 is none, set --data.ignore-index 11; if 0 is none of them, set --data.class-values=[1,2," in error


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


def write_coco(
    path: str,
    numbers: Sequence[int],
    *,
    categories: Sequence[str] = ("box", "stripe"),
    rle: dict[str, Any] | None = None,
) -> None:
    """Write COCO's file about images of 24 x 30: each shows a box (a polygon), a stripe over it and a crowd (RLE)."""
    stripe = {"size": [24, 30], "counts": [24 * 10, 24 * 5, 24 * 15], **(rle or {})}  # the columns 10 to 14
    crowd = {"size": [24, 30], "counts": [24 * 25, 24 * 5]}  # the columns 25 to 29
    annotations = []
    for number in numbers:
        for category, segmentation in ((1, [[0, 0, 20, 0, 20, 24, 0, 24]]), (2, stripe), (1, crowd)):
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": number,
                    "category_id": category,
                    "segmentation": segmentation,
                    "iscrowd": int(segmentation is crowd),
                }
            )
    content = {
        "images": [{"id": number, "file_name": f"{number}.png", "height": 24, "width": 30} for number in numbers],
        "annotations": annotations,
        "categories": [{"id": 1 + i, "name": name} for i, name in enumerate(categories)],
    }
    Path(path).write_text(json.dumps(content))


COCO_ROW = [0] * 10 + [1] * 5 + [0] * 5 + [IGNORED] * 10  # the smaller instance wins; neither nothing nor crowds count


def test_cocos_file_stands_in_place_of_a_folder_of_masks(folder, capsys):
    for number in range(3):
        write_image(Path(f"images/{number}.png"), (24, 30), seed=number)
    write_coco("few.json", [0, 1, 2, 7])
    write_recipe({"masks": "few.json", "val_masks": "few.json"})
    assert main(["segment", "train", "--recipe", "recipe.yaml", "--out", "run"]) == 0
    captured = capsys.readouterr()
    assert "images: 3 images with masks of 2 classes (box, stripe)" in captured.err
    assert "few.json: 1 of its images are not in images and are skipped (7.png)" in captured.err
    write_coco("turned.json", [0, 1, 2], categories=("stripe", "box"))  # other ids, the same names
    assert main(["segment", "eval", "run", "--images", "images", "--masks", "turned.json", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["class_iou"]) == {"box", "stripe"}
    for broken, message in (
        ({"size": [30, 24]}, "few.json: annotation 1 of 0.png is of 30 x 24 pixels (height x width), its"),
        ({"counts": [5]}, "annotation 1 of 0.png has runs of 5 pixels, its image 24 x 30 = 720 (and 2 more of 3"),
    ):  # fmt: skip
        write_coco("few.json", [0, 1, 2], rle=broken)
        assert main(["segment", "train", "--recipe", "recipe.yaml", "--out", "other"]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]


def test_cocos_file_teaches_heads_and_stores_and_judges_labels(folder, capsys):
    model = timm.create_model("test_convnext", num_classes=0)
    save_file(model.state_dict(), "convnext.safetensors")
    for number, name in enumerate(["box", "stripe", "stripe"]):
        write_image(Path(f"photos/{name}/{number}.png"), (24, 30), seed=number)
    write_coco("coco.json", [0, 1, 2, 7], categories=("stripe", "box"))  # in another order than the folders
    for part in ("photos", "photos/stripe"):  # a data set of two classes, and a folder of images without any
        backbone = ["--backbone", "test_convnext", "--weights", "convnext.safetensors", "--overwrite"]
        assert main(["fit-head", part, "head.safetensors", "--from", "masks:coco.json", *backbone]) == 0
        assert Head.load("head.safetensors").class_names == ("stripe", "box")
    assert main(["annotate", "photos", "labels", "--teacher", "masks:coco.json", "--device", "cpu"]) == 0
    cells = LabelStore("labels")["stripe/1.png"].dense().argmax(axis=2)
    assert (cells[:, :10] == 1).all()  # photos/stripe is class 1; the polygon is of the category "stripe" here
    assert (cells[:, 10:15] == 0).all()
    capsys.readouterr()
    assert main(["inspect", "labels", "--masks", "coco.json", "--images", "photos"]) == 0
    assert "100.0%" in capsys.readouterr().out
    write_coco("other.json", [0, 1, 2], categories=("cat", "dog"))
    assert main(["annotate", "photos", "more", "--teacher", "masks:other.json", "--device", "cpu"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "other.json: its categories (cat, dog) are none of the classes box, stripe" in said


def test_what_cocos_file_says_becomes_class_ids(folder):
    write_image(Path("images/deep/0.png"), (24, 30))
    write_coco("all.json", [0])

    def row(**changes: Any) -> list[int]:
        pairs = open_pairs(
            SegmentDataConfig(layout=Layout.FOLDERS, train="images", masks="all.json", **changes), "train"
        )
        assert pairs is not None
        _, ids = pairs.read(0)
        assert (ids == ids[0]).all()
        return ids[0].tolist()

    assert row() == COCO_ROW
    assert row(class_names=("stripe", "box")) == [{0: 1, 1: 0}.get(class_id, class_id) for class_id in COCO_ROW]
    assert row(background="rest") == [*COCO_ROW[:20], *[2] * 5, *[IGNORED] * 5]
    for changes, message in (
        ({"class_names": ("box", "car")}, r"all\.json: .*its categories must be these classes"),
        ({"ignore_index": 3}, r"all\.json: defines the class of each pixel itself"),
    ):
        with pytest.raises(ValueError, match=message):
            row(**changes)
    write_image(Path("images/1.png"), (24, 30))
    with pytest.raises(ValueError, match=r"all\.json: 1 of 2 images in images have no mask there \(1\.png\)"):
        row()


def test_an_image_of_cocos_file_without_an_instance_learns_from_its_label_map(folder):
    for number in range(3):
        write_image(Path(f"images/{number}.png"), (24, 30), seed=number)
    write_coco("all.json", [0, 1, 2])
    content = json.loads(Path("all.json").read_text())
    # Nothing is said of 1.png, and of 2.png only where a crowd is.
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] == 0 or a["iscrowd"]][:4]
    Path("all.json").write_text(json.dumps(content))
    config = SegmentDataConfig(layout=Layout.FOLDERS, train="images", masks="all.json")

    def with_mask(config: SegmentDataConfig) -> list[int]:
        pairs = open_pairs(config, "train")
        assert pairs is not None
        return pairs.with_mask

    assert with_mask(replace(config, labels="labels")) == [0]
    assert with_mask(config) == [0, 1, 2]  # nobody else could say anything of them
    assert with_mask(replace(config, labels="labels", background="rest")) == [0, 1, 2]


def test_a_mask_of_cocos_file_that_lies_as_its_image_is_stored_is_refused(folder, capsys):
    turned = Image.Exif()
    turned[0x0112] = 6
    for number, name in enumerate(["box", "stripe"]):
        path = Path(f"photos/{name}/{number}.png")
        write_image(path, (24, 30), seed=number)
        Image.open(path).save(path, exif=turned)
    write_coco("coco.json", [0, 1])
    save_file(timm.create_model("test_convnext", num_classes=0).state_dict(), "convnext.safetensors")
    backbone = ["--backbone", "test_convnext", "--weights", "convnext.safetensors"]
    for command in (
        ["annotate", "photos", "labels", "--teacher", "masks:coco.json", "--device", "cpu"],
        ["fit-head", "photos", "head.safetensors", "--from", "masks:coco.json", *backbone],
    ):
        assert main(command) == 2
        assert "coco.json: the mask of 0.png: lies as box/0.png stores its pixels" in "".join(capsys.readouterr())
