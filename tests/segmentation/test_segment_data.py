"""Images with masks: every layout, what masks mean, clear errors, and augmentation that moves both alike."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from segment_cases import write_image, write_mask

from tokenlabel.data.masks import decode_mask
from tokenlabel.data.scenes import write_scenes
from tokenlabel.runtime.errors import DataError, ImageError
from tokenlabel.segmentation.data import (
    SegmentDataset,
    SegmentTransform,
    collate,
    distorted,
    draw_crop,
    fitted_size,
    padded,
    resize_mask,
)
from tokenlabel.segmentation.layouts import classes_of, open_pairs, other_pairs
from tokenlabel.segmentation.pairs import IGNORED, known_classes, numbered_classes
from tokenlabel.segmentation.recipe import Layout, SegmentAugmentConfig, SegmentDataConfig, Split


def pairs_of(split: Split = "train", **config: Any):
    pairs = open_pairs(SegmentDataConfig(**config), split)
    assert pairs is not None
    return pairs


def test_an_image_that_is_its_own_mask_is_refused(tmp_path: Path) -> None:
    write_image(tmp_path / "data/1.jpg", (4, 5))
    write_mask(tmp_path / "data/1.png", np.zeros((4, 5), np.uint8))
    folder = str(tmp_path / "data")
    with pytest.raises(DataError, match=r"1\.png: is an image and its own mask"):
        pairs_of(layout=Layout.FOLDERS, train=folder, masks=folder, class_names=("a",))


def test_settings_of_other_layouts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.layout ade20k has its own classes"):
        SegmentDataConfig(layout=Layout.ADE20K, root=str(tmp_path), background="sky")
    with pytest.raises(
        ValueError, match=r"ade20k takes its images from data\.root, .* leave data\.train, data\.val out"
    ):
        SegmentDataConfig(layout=Layout.ADE20K, root=str(tmp_path), train="a", val="b")
    with pytest.raises(ValueError, match=r"folders takes its images from .* leave data\.root, data\.val_split out"):
        SegmentDataConfig(layout=Layout.FOLDERS, train="a", root=str(tmp_path), val_split="test")
    write_image(tmp_path / "images/1.png", (4, 5))
    write_mask(tmp_path / "masks/1.png", np.zeros((4, 5), np.uint8))
    config = SegmentDataConfig(
        layout=Layout.FOLDERS, train=str(tmp_path / "images"), masks=str(tmp_path / "masks"), class_names=("a",)
    )
    with pytest.raises(DataError, match="layout folders has no splits"):
        other_pairs(config, ["a"], split="train")


def test_ade20k_folders(tmp_path: Path) -> None:
    write_image(tmp_path / "images/training/ADE_train_1.jpg", (4, 6))
    write_mask(tmp_path / "annotations/training/ADE_train_1.png", [[0, 1, 2, 150, 0, 1]] * 4)
    write_image(tmp_path / "images/validation/ADE_val_1.jpg", (4, 6))
    write_mask(tmp_path / "annotations/validation/ADE_val_1.png", np.zeros((4, 6)))
    pairs = pairs_of(layout=Layout.ADE20K, root=str(tmp_path))
    pixels, mask = pairs.read(0)
    assert pixels.shape == (4, 6, 3)
    assert mask[0].tolist() == [IGNORED, 0, 1, 149, IGNORED, 0]  # reduced by the zero label
    names = pairs.classes.names
    assert (len(names), names[0], names[-1]) == (150, "wall", "flag")
    assert pairs.classes.colours[0].tolist() == [120, 120, 120]
    assert (pairs_of("val", layout=Layout.ADE20K, root=str(tmp_path)).read(0)[1] == IGNORED).all()


def test_pascal_voc_lists_and_palettes(tmp_path: Path) -> None:
    for name in ("2007_1", "2007_2", "2007_3"):
        write_image(tmp_path / f"JPEGImages/{name}.jpg", (2, 3))
        write_mask(tmp_path / f"SegmentationClass/{name}.png", [[0, 20, 255]] * 2, palette=True)
    lists = tmp_path / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_2\n2007_1\n")
    (lists / "val.txt").write_text("2007_3\n")
    pairs = pairs_of(layout=Layout.VOC, root=str(tmp_path))
    assert list(pairs.keys) == ["2007_1.jpg", "2007_2.jpg"]
    assert pairs.read(0)[1].tolist() == [[0, 20, IGNORED]] * 2
    assert pairs.classes.names[20] == "tvmonitor"
    assert pairs.classes.colours[1].tolist() == [128, 0, 0]
    assert list(pairs_of("val", layout=Layout.VOC, root=str(tmp_path)).keys) == ["2007_3.jpg"]
    with pytest.raises(DataError, match=r"trainval\.txt: cannot be read .* such as VOC2012"):
        pairs_of(layout=Layout.VOC, root=str(tmp_path), train_split="trainval")


def test_cityscapes_label_ids_become_the_19_classes(tmp_path: Path) -> None:
    write_image(tmp_path / "leftImg8bit/train/aachen/aachen_0_leftImg8bit.png", (2, 4))
    write_mask(tmp_path / "gtFine/train/aachen/aachen_0_gtFine_labelIds.png", [[7, 33, 0, 255]] * 2)
    pairs = pairs_of(layout=Layout.CITYSCAPES, root=str(tmp_path))
    assert list(pairs.keys) == ["aachen/aachen_0_leftImg8bit.png"]
    assert pairs.read(0)[1].tolist() == [[0, 18, IGNORED, IGNORED]] * 2
    assert (pairs.classes.names[0], pairs.classes.names[18]) == ("road", "bicycle")


def folders(tmp_path: Path, values: Any = ((0, 1), (1, 255)), **changes: Any) -> dict[str, Any]:
    write_image(tmp_path / "images/a/1.jpg", (2, 2))
    write_mask(tmp_path / "masks/a/1.png", values)
    return {
        "layout": Layout.FOLDERS,
        "train": str(tmp_path / "images"),
        "masks": str(tmp_path / "masks"),
        "class_names": ("road", "other"),
        **changes,
    }


def test_any_two_folders(tmp_path: Path) -> None:
    pairs = pairs_of(**folders(tmp_path))
    assert list(pairs.keys) == ["a/1.jpg"]
    assert pairs.read(0)[1].tolist() == [[0, 1], [1, IGNORED]]
    with_background = pairs_of(**folders(tmp_path, background="nothing"))
    assert with_background.classes.names == ["road", "other", "nothing"]
    assert with_background.read(0)[1].tolist() == [[0, 1], [1, 2]]
    assert open_pairs(SegmentDataConfig(**folders(tmp_path)), "val") is None


def test_the_embedded_scenes_have_their_background_as_a_class(tmp_path: Path) -> None:
    write_scenes(tmp_path / "scenes", num_train=20, num_val=10, seed=0)
    config = {"layout": Layout.SCENES, "root": str(tmp_path / "scenes")}
    pairs = pairs_of(**config, background="background")
    assert pairs.classes.names == [*"0123456789", "background"]
    assert 10 in pairs.read(0)[1]
    assert IGNORED in pairs_of("val", **config).read(0)[1]  # left out, unless it is asked for


def test_what_is_wrong_is_said_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"layout folders needs data\.train"):
        SegmentDataConfig(layout=Layout.FOLDERS)
    with pytest.raises(ValueError, match=r"layout voc needs data\.root"):
        SegmentDataConfig(layout=Layout.VOC)
    with pytest.raises(ValueError, match="masks of images; name these"):
        SegmentDataConfig(**folders(tmp_path), val_masks="here")
    with pytest.raises(DataError, match=r"images/training: no such folder"):
        pairs_of(layout=Layout.ADE20K, root=str(tmp_path))
    config = folders(tmp_path)
    write_image(tmp_path / "images/a/2.jpg", (2, 2))
    with pytest.raises(DataError, match=r"masks: 1 of 2 images have no mask there \(a/2\.jpg\); expected a/2\.png"):
        pairs_of(**config)


def test_masks_that_are_none_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"1\.png: holds the values 7, 9, .* 2 classes have the values 0-1, 255"):
        pairs_of(**folders(tmp_path, ((7, 1), (1, 9)))).read(0)
    with pytest.raises(DataError, match=r"has 1 x 4 pixels \(height x width\), its image .* 2 x 2"):
        pairs_of(**folders(tmp_path, ((0, 0, 0, 0),))).check()
    config = folders(tmp_path)
    write_image(tmp_path / "masks/a/1.png", (2, 2))
    with pytest.raises(DataError, match=r"has 3 channels; a mask has one"):
        pairs_of(**config).read(0)
    (tmp_path / "masks/a/1.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"does not decode as an image \(it is of no known format\)"):
        pairs_of(**config).read(0)
    config = folders(tmp_path)
    (tmp_path / "images/a/1.jpg").write_bytes(b"no image")
    for look in (lambda pairs: pairs.read(0), lambda pairs: pairs.check()):
        with pytest.raises(ImageError, match=r"does not decode.*; repair it, or remove it and its mask"):
            look(pairs_of(**config))


def test_masks_of_16_bits_and_of_one_bit(tmp_path: Path) -> None:
    for array in (np.array([[0, 1]], np.uint16), np.array([[False, True]])):
        Image.fromarray(array).save(tmp_path / "mask.png")
        values = decode_mask((tmp_path / "mask.png").read_bytes(), "mask")
        assert numbered_classes(["a", "b"]).ids(values, name="mask").tolist() == [[0, 1]]
    Image.fromarray(np.array([[300]], np.uint16)).save(tmp_path / "mask.png")
    values = decode_mask((tmp_path / "mask.png").read_bytes(), "mask")
    with pytest.raises(DataError, match="value 300"):
        numbered_classes(["a"]).ids(values, name="mask")


@pytest.mark.parametrize("data_set", ["ade20k", "voc", "cityscapes"])
def test_known_classes_are_told_apart(data_set: str) -> None:
    classes = known_classes(data_set)
    assert len(set(classes.names)) == len(classes.names) == len(classes.colours)
    ids = classes.ids_of_values
    assert sorted(set(ids[(ids >= 0) & (ids != IGNORED)].tolist())) == list(range(len(classes.names)))


def test_other_folders_and_splits(tmp_path: Path) -> None:
    config = SegmentDataConfig(**folders(tmp_path))
    with pytest.raises(DataError, match="no val images of its own"):
        other_pairs(config, ["road", "other"])
    with pytest.raises(DataError, match="go together"):
        other_pairs(config, ["road", "other"], images="here")
    masks = str(tmp_path / "masks")
    found = other_pairs(config, ["road", "other"], images=str(tmp_path / "images"), masks=masks)
    assert found.classes.names == ["road", "other"]
    own = SegmentDataConfig(**folders(tmp_path), val=str(tmp_path / "images"), val_masks=masks)
    with pytest.raises(DataError, match=r"the images have 2 \(road against road, other\)"):
        other_pairs(own, ["road"])
    assert classes_of(config, ["road", "other"]).names == ["road", "other"]


def test_pairs_pickle_and_batches_are_functions_of_seed_epoch_and_index(tmp_path: Path) -> None:
    pairs = pickle.loads(pickle.dumps(pairs_of(**folders(tmp_path))))
    dataset = SegmentDataset(pairs, SegmentTransform(SegmentAugmentConfig(scale=(2.0, 9.0)), (8, 8)), seed=1)
    one, again, other = dataset[0, 0], dataset[0, 0], dataset[1, 0]
    assert (one.image == again.image).all()
    assert (one.image != other.image).any()
    batch = collate([one, other])
    assert batch.images.shape == (2, 3, 8, 8)
    assert batch.masks.shape == (2, 8, 8)
    assert batch.keys == ["a/1.jpg"] * 2


sizes = st.tuples(st.integers(1, 20), st.integers(1, 20))


@settings(max_examples=30)
@given(sizes, sizes)
def test_masks_are_resized_to_the_class_at_each_centre(old: tuple[int, int], new: tuple[int, int]) -> None:
    mask = np.random.default_rng(0).integers(0, 9, old).astype(np.int16)
    found = resize_mask(mask, new)
    for row in range(new[0]):
        for column in range(new[1]):
            y, x = (row + 0.5) * old[0] / new[0], (column + 0.5) * old[1] / new[1]
            assert found[row, column] == mask[int(y + 1e-9), int(x + 1e-9)]


@settings(max_examples=30)
@given(sizes, st.integers(2, 24), st.integers(2, 24), st.integers(0, 99))
def test_image_and_mask_move_alike(size: tuple[int, int], height: int, width: int, seed: int) -> None:
    mask = np.random.default_rng(seed).integers(0, 200, size).astype(np.int16)
    pixels = np.repeat(mask[..., None].astype(np.uint8), 3, axis=2)  # an image that says its own classes
    config = SegmentAugmentConfig(scale=(1.0, 1.0), photometric=False)
    transform = SegmentTransform(config, (height, width))
    shown, classes, view = transform(pixels, mask, np.random.default_rng(seed))
    assert shown.shape == (height, width, 3)
    inside = classes != IGNORED
    assert (shown[inside] == classes[inside][:, None]).all()
    assert inside.sum() == min(height, size[0]) * min(width, size[1])
    assert (view.covered_pixels((height, width)) == inside).all()
    for row, column in np.argwhere(inside):
        x, y = view.to_source(np.array([(column + 0.5) / width, (row + 0.5) / height]))
        assert mask[int(y * size[0]), int(x * size[1])] == classes[row, column]
    assert (transform(pixels, None, np.random.default_rng(seed))[1] == IGNORED).all()


def test_sizes_keep_the_aspect_and_both_limits() -> None:
    assert fitted_size((600, 800), 512, max_aspect=4) == (512, 683)
    assert fitted_size((100, 900), 512, max_aspect=4) == (228, 2048)
    assert fitted_size((600, 800), None, max_aspect=4, factor=0.5) == (300, 400)
    assert fitted_size((1, 999), 1, max_aspect=4, factor=0.1) == (1, 1)


def test_crops_avoid_those_that_one_class_fills() -> None:
    mask = np.zeros((20, 20), np.int16)
    mask[:, 14:] = 1
    mask[:, :4] = IGNORED
    starts = [draw_crop(mask, (8, 8), max_ratio=0.75, rng=np.random.default_rng(s)) for s in range(60)]
    shares = [np.bincount(mask[:, left : left + 8].ravel() + 1, minlength=3)[1:] for _, left in starts]
    assert np.mean([two.max() < 0.75 * two.sum() for two in shares]) > 0.9  # of all places a third is like this
    assert all(0 <= top <= 12 and 0 <= left <= 12 for top, left in starts)
    first = [draw_crop(mask, (8, 8), max_ratio=1.0, rng=np.random.default_rng(s))[1] for s in range(60)]
    assert min(first) < 4


def test_what_is_too_small_is_filled_up_and_does_not_count() -> None:
    pixels, mask = padded(np.full((2, 3, 3), 9, np.uint8), np.zeros((2, 3), np.int16), (4, 4))
    assert (mask == IGNORED).sum() == 10
    assert pixels[3, 3].tolist() == [124, 116, 104]


@settings(max_examples=30)
@given(st.integers(0, 1000))
def test_distorted_colours_stay_colours(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    found = distorted(pixels, rng)
    assert found.shape == pixels.shape
    assert found.dtype == np.uint8


def test_half_of_the_colour_changes_happen() -> None:
    pixels = np.full((1, 1, 3), (200, 100, 50), np.uint8)
    shown = [distorted(pixels, np.random.default_rng(seed))[0, 0].tolist() for seed in range(400)]
    assert 0.02 < np.mean([levels == [200, 100, 50] for levels in shown]) < 0.12  # 1/16: none of four
    assert len({tuple(levels) for levels in shown}) > 200


def test_augmentation_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"augment\.scale"):
        SegmentAugmentConfig(scale=(2.0, 1.0))
    with pytest.raises(ValueError, match="category_max_ratio"):
        SegmentAugmentConfig(category_max_ratio=0.0)
