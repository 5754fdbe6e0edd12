"""Photographs with an orientation tag: pixels, labels and masks all lie upright, whatever the file stores."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from annotation_ranks import CPU, ByColour
from PIL import Image, ImageOps, features

from tokenlabel.cli import main
from tokenlabel.core.align import align
from tokenlabel.core.config import LogitsMode
from tokenlabel.core.geometry import OPPOSITE, Box, turned, turned_box
from tokenlabel.core.scores import Kind, Orientation, from_top, turned_map
from tokenlabel.data import decoding
from tokenlabel.data.augment import EvalTransform, TrainTransform
from tokenlabel.data.batches import TokenLabelDataset, collate
from tokenlabel.data.config import AugmentConfig
from tokenlabel.data.decoding import decode_image, decode_pixels, orientation_of
from tokenlabel.data.images import ImageFolder
from tokenlabel.evaluation.masks import MaskFolder, mask_agreement
from tokenlabel.labels.manifest import Manifest
from tokenlabel.labels.presentation import write_pictures
from tokenlabel.labels.store import LabelStore
from tokenlabel.labels.writer import LabelStoreWriter
from tokenlabel.runtime.errors import StoreError
from tokenlabel.teachers.annotation import annotate, annotate_by
from tokenlabel.teachers.options import AnnotateConfig

TAGS = range(1, 9)


def encode(pixels: np.ndarray, tag: int, kind: str = "PNG", **options) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = tag
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, exif=exif, **options)
    return buffer.getvalue()


def colours(ids: np.ndarray) -> np.ndarray:
    """Return pixels [height, width, 3] that say their classes by their colours, as `ByColour` reads them."""
    return np.eye(3, dtype=np.uint8)[::-1][ids] * np.uint8(255)


# Of the upright image, in blocks of 8 pixels: no turn and no flip of it is the same.
UPRIGHT = np.array([[0, 1, 1, 2], [2, 2, 0, 1]])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight images that look the same, stored in the eight ways."""
    whole = UPRIGHT.repeat(8, axis=0).repeat(8, axis=1)
    for tag in TAGS:
        path = tmp_path / "images" / ["blue", "green", "red"][tag % 3] / f"{tag}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(colours(turned(whole, OPPOSITE[tag])), tag))
    return tmp_path / "images"


@pytest.mark.parametrize("tag", [*TAGS, 0, 9])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", *(["AVIF"] if features.check("avif") else [])])
def test_every_decoder_turns_pixels_as_pillow_does(kind, tag, monkeypatch):
    pixels = np.random.default_rng(tag).integers(0, 256, (5, 8, 3), dtype=np.uint8)
    data = encode(pixels, tag, kind)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    np.testing.assert_array_equal(decode_pixels(data, "x"), expected)
    np.testing.assert_array_equal(np.asarray(decode_image(data, "x")), expected)
    monkeypatch.setattr(decoding, "simplejpeg", None)
    np.testing.assert_array_equal(decode_pixels(data, "x"), expected)


def test_tags_are_read_in_either_byte_order_from_xmp_and_not_from_damage():
    pixels = np.zeros((2, 3, 3), np.uint8)
    plain = encode(pixels, 6, "JPEG")
    intel = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x08\0\0\0\0\0\0\0"
    assert orientation_of(b"\xff\xd8\xff\xe1" + (len(intel) + 2).to_bytes(2) + intel + plain[2:]) == 8
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", xmp=b'<x:xmpmeta tiff:Orientation="3"/>')
    assert orientation_of(buffer.getvalue()) == 3
    Image.fromarray(pixels).save(buffer := io.BytesIO(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\xff\xff")
    for data in (buffer.getvalue(), b"", plain[:3], plain[:30], b"\x89PNG eXIf"):
        assert orientation_of(data) == 1
    assert decode_pixels(buffer.getvalue(), "x").shape == (2, 3, 3)


@pytest.mark.parametrize("tag", TAGS)
def test_maps_turn_as_pixels_do(tag):
    rng = np.random.default_rng(tag)
    stored = from_top(rng.integers(0, 9, (3, 4, 1)), rng.random((3, 4, 1)), num_classes=9, region=Box(0.1, 0.2, 0.5, 1))
    upright = turned_map(stored, tag)
    np.testing.assert_array_equal(upright.class_ids, turned(stored.class_ids, tag))
    back = turned_map(upright, OPPOSITE[tag])
    np.testing.assert_array_equal(back.dense(), stored.dense())
    # A point of the region, as a pixel of an image of 10 x 10.
    pixels = np.zeros((10, 10))
    pixels[2:10, 1:5] = 1
    rows, columns = np.nonzero(turned(pixels, tag))
    box = turned_box(stored.region, tag)
    np.testing.assert_allclose(
        [box.left, box.top, box.right, box.bottom],
        np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / 10,
    )


def taught_as_shown(dataset: TokenLabelDataset, *, mode: LogitsMode = LogitsMode.ZERO) -> bool:
    """Say whether the label of each token is the colour that it shows."""
    wrong = 0
    for epoch in range(3):
        batch = collate([dataset[epoch, index] for index in range(len(dataset))])
        assert batch.score_maps is not None
        targets = align(batch.score_maps, batch.views, (batch.images.shape[2] // 8, 4), logits=mode)
        shown = 2 - batch.images[:, :, 4::8, 4::8].flatten(2).long().argmax(dim=1)  # [B, N]
        wrong += int((targets.dense(3).argmax(dim=2) != shown).sum())
    return wrong == 0


FLIPS = AugmentConfig(crop_scale=(1, 1), crop_ratio=(2, 2), vertical_flip=0.5)
LABEL = AnnotateConfig(teacher="by colour", batch_size=4, topk=3)


def test_teacher_and_student_see_every_photograph_upright(folder, tmp_path):
    source = ImageFolder(folder)
    annotate_by(ByColour(cell_px=8, size=23), source, tmp_path / "labels", config=LABEL, device=CPU)
    assert json.loads((tmp_path / "labels/manifest.json").read_text())["orientation"] == "upright"
    store = LabelStore(tmp_path / "labels")
    for key in source.keys:
        np.testing.assert_array_equal(store[key].top_class_ids, UPRIGHT)
    dataset = TokenLabelDataset(source, TrainTransform(FLIPS, (16, 32)), seed=0, store=store)
    assert taught_as_shown(dataset)
    whole = EvalTransform((16, 32), crop_fraction=1.0)
    assert taught_as_shown(TokenLabelDataset(source, whole, seed=0, store=store))


@pytest.mark.parametrize("kind", Kind)
def test_maps_of_older_stores_lie_on_stored_pixels_and_follow_them(folder, tmp_path, kind):
    source, labels = ImageFolder(folder), tmp_path / "labels"
    manifest = Manifest(num_classes=3, topk=1, kind=kind, teacher={"name": "by colour"})
    with LabelStoreWriter(labels, manifest) as writer:
        for key in source.keys:
            ids = turned(UPRIGHT, OPPOSITE[int(Path(key).stem)])[..., None]
            writer.add(key, from_top(ids, np.full(ids.shape, 0.75), num_classes=3, kind=kind))
    dataset = TokenLabelDataset(source, TrainTransform(FLIPS, (16, 32)), seed=0, store=LabelStore(labels))
    mode = LogitsMode.PUBLISHED if kind is Kind.LOGITS else LogitsMode.ZERO
    assert not taught_as_shown(dataset, mode=mode)  # the manifest says upright, which they are not
    written = json.loads((labels / "manifest.json").read_text())
    del written["orientation"]
    (labels / "manifest.json").write_text(json.dumps(written))
    dataset.store = LabelStore(labels)
    assert dataset.store.manifest.orientation is Orientation.STORED
    assert taught_as_shown(dataset, mode=mode)
    # Pictures show the maps where they would lie in a store of upright ones.
    with LabelStoreWriter(tmp_path / "upright", manifest) as writer:
        for key in source.keys:
            writer.add(key, turned_map(dataset.store[key], int(Path(key).stem)))
    pages = []
    for folder in (labels, tmp_path / "upright"):
        write_pictures(LabelStore(folder), source, tmp_path / "page.html")
        pages.append((tmp_path / "page.html").read_text().replace("<wbr>", "").replace(str(folder), ""))
    assert pages[0] == pages[1]


def test_stores_of_two_orientations_are_not_read_as_one(tmp_path):
    for orientation in Orientation:
        manifest = Manifest(num_classes=3, topk=1, orientation=orientation)
        LabelStoreWriter(tmp_path / orientation, manifest).flush()
    with pytest.raises(StoreError, match='orientation is "upright" there, "stored" here'):
        LabelStore(tmp_path / "upright", tmp_path / "stored")


def test_an_older_store_goes_on_in_its_own_orientation(folder, tmp_path):
    source, labels = ImageFolder(folder), tmp_path / "labels"
    teacher = ByColour(cell_px=8, size=23)
    annotate_by(teacher, ImageFolder(folder), labels, config=LABEL, device=CPU)
    written = json.loads((labels / "manifest.json").read_text())
    del written["orientation"]
    (labels / "manifest.json").write_text(json.dumps(written))
    for path in labels.glob("*.safetensors"):
        path.unlink()
    done = annotate_by(teacher, source, labels, config=LABEL, device=CPU)
    assert done.num_labelled == 8
    store = LabelStore(labels)
    for key in source.keys:
        expected = turned(UPRIGHT, OPPOSITE[int(Path(key).stem)])
        np.testing.assert_array_equal(store[key].top_class_ids, expected)
    dataset = TokenLabelDataset(source, TrainTransform(FLIPS, (16, 32)), seed=0, store=store)
    assert taught_as_shown(dataset)


def write_masks(folder: Path, masks: Path, *, upright: bool = True) -> None:
    for path in folder.rglob("*.png"):
        ids = UPRIGHT if upright else turned(UPRIGHT, OPPOSITE[int(path.stem)])
        to = masks / path.relative_to(folder)
        to.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(ids.astype(np.uint8)).save(to)


def test_masks_lie_upright_or_are_refused_by_name(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source = ImageFolder(folder)
    write_masks(folder, tmp_path / "masks")
    done = annotate(folder, "labels", AnnotateConfig(teacher="masks:masks"), device=CPU)
    assert done.failures == ()
    store = LabelStore("labels")
    dataset = TokenLabelDataset(source, TrainTransform(FLIPS, (16, 32)), seed=0, store=store)
    assert taught_as_shown(dataset)
    dataset.store = MaskFolder(Path("masks"), num_classes=3, source=source)
    assert taught_as_shown(dataset)
    assert mask_agreement(store, Path("masks"), source=source) == 1
    # An older store is held against upright masks too, where the images say how they lie.
    manifest = tmp_path / "labels/manifest.json"
    old = json.loads(manifest.read_text()) | {"orientation": "stored"}
    (tmp_path / "old").mkdir()
    (tmp_path / "old/manifest.json").write_text(json.dumps(old))
    assert main(["annotate", "images", "old", "--teacher", "masks:masks", "--device", "cpu"]) == 0
    assert mask_agreement(LabelStore("old"), Path("masks"), source=source) == 1
    capsys.readouterr()
    assert mask_agreement(LabelStore("old"), Path("masks")) < 1
    assert "name the images (--images)" in capsys.readouterr().err

    write_masks(folder, tmp_path / "sideways", upright=False)
    done = annotate(folder, "none", AnnotateConfig(teacher="masks:sideways"), device=CPU)
    assert sorted(Path(failure.key).stem for failure in done.failures) == list("5678")
    reason = next(failure.reason for failure in done.failures if failure.key.endswith("6.png"))
    assert "sideways/blue/6.png: lies as blue/6.png stores its pixels (32 x 16, height x width)" in reason
    assert "turned to 16 x 32 by its orientation tag (EXIF 6); turn the mask" in reason
    assert main(["inspect", "labels", "--images", "images", "--masks", "sideways"]) == 2
    assert "stores its pixels" in capsys.readouterr().err
