"""Datasets of Hugging Face as images: the same images as in a folder, in Python and as commands."""

import io
import pickle
import sys

import numpy as np
import pytest
from command_process import CommandProcess
from PIL import Image

import tokenlabel as tl
from tokenlabel.data.decoding import decode_pixels
from tokenlabel.data.images import describe, has_classes
from tokenlabel.data.scenes import write_scenes
from tokenlabel.labels.fingerprints import find_replaced
from tokenlabel.runtime.errors import ImageError

datasets = pytest.importorskip("datasets")


TRAIN = """--recipe lvvit_s --out runs/first --data.train hf-dataset:saved:train --data.val hf-dataset:saved:val
--data.labels labels --data.num-workers 1 --epochs 1 --min-epoch-steps 1 --batch-size 10 --micro-batch-size 10
--precision fp32 --model.img-size 48"""
OPTIONS = "{patch_size: 6, depth: 1, width: 16, num_heads: 2, stem_width: 8}"


def rows(files, names):
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=names), "note": datasets.Value("string")}
    )
    images = [{"bytes": path.read_bytes(), "path": None} for path in files]
    ids = [names.index(path.parent.name) for path in files]
    table = {"image": images, "label": ids, "note": ["x"] * len(files)}
    return datasets.Dataset.from_dict(table, features=features)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with scenes as image files and, in `saved`, as a dataset of two splits."""
    root = tmp_path_factory.mktemp("hf")
    write_scenes(root, num_train=20, num_val=10, seed=0)
    datasets.disable_progress_bars()
    names = [str(digit) for digit in range(10)]
    splits = {split: rows(sorted((root / split).glob("*/*.png")), names) for split in ("train", "val")}
    datasets.DatasetDict(splits).save_to_disk(root / "saved")
    return root


@pytest.fixture
def within(here, monkeypatch):
    monkeypatch.chdir(here)


def save(table, features, place):
    datasets.Dataset.from_dict(table, features=datasets.Features(features)).save_to_disk(place)
    return f"hf-dataset:{place}"


@pytest.mark.usefixtures("within")
def test_a_dataset_holds_the_images_and_classes_of_the_folder_it_was_made_of():
    folder, dataset = tl.open_images("train"), tl.open_images("hf-dataset:saved:train")
    assert [*dataset.keys] == [f"train/{i}" for i in range(20)]
    assert dataset.class_names == folder.class_names
    np.testing.assert_array_equal(dataset.class_ids, folder.class_ids)
    again = pickle.loads(pickle.dumps(dataset))  # as in a data worker
    assert [again.read(i) for i in range(20)] == [folder.read(i) for i in range(20)]
    assert "images from column image, classes from label; not read: note" in describe(dataset, "it")
    assert [*tl.open_images("hf-dataset:saved/val").keys] == [f"train/{i}" for i in range(10)]
    assert not has_classes(tl.open_images("hf-dataset:saved:val", classes=False)).any()


def test_photographs_lie_upright_and_classes_may_be_unknown(tmp_path):
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", exif=exif)
    images = [{"bytes": buffer.getvalue(), "path": None}] * 2 + [None]
    features = {"photo": datasets.Image(), "kind": datasets.ClassLabel(names=["a", "b"])}
    source = tl.open_images(save({"photo": images, "kind": [1, -1, None]}, features, tmp_path / "saved"))
    upright = decode_pixels(source.read(0), source.keys[0])
    assert upright.shape == (16, 8, 3)
    assert upright[0].min() == 255
    assert upright[-1].max() == 0
    assert has_classes(source).tolist() == [True, False, False]
    assert source.class_ids.tolist() == [1, 0, 0]
    with pytest.raises(ImageError, match=r"row 2 \(train/2\) has no image"):
        source.read(2)


def test_a_column_is_named_where_there_are_several(tmp_path):
    encoded = [{"bytes": bytes([i]), "path": None} for i in range(2)]
    kinds = {"fine": datasets.ClassLabel(names=["a", "b"]), "coarse": datasets.ClassLabel(names=["c"])}
    features = {"left": datasets.Image(), "right": datasets.Image(), **kinds}
    table = {"left": encoded, "right": encoded[::-1], "fine": [0, 1], "coarse": [0, 0]}
    name = save(table, features, tmp_path / "saved")
    with pytest.raises(ValueError, match=r"2 columns of type Image \(left, right\); choose one: .*,image=left"):
        tl.open_images(name)
    with pytest.raises(ValueError, match=r"2 columns of type ClassLabel \(fine, coarse\)"):
        tl.open_images(f"{name},image=left")
    source = tl.open_images(f"{name},image=right,label=fine")
    assert (source.read(0), source.class_names) == (b"\1", ["a", "b"])
    assert not tl.open_images(f"{name},image=left", classes=False).class_names


def test_labels_tell_a_dataset_that_was_saved_again_with_other_images(tmp_path, here, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files, names = sorted((here / "train").glob("*/*.png")), [str(digit) for digit in range(10)]
    for i, path in enumerate(files):
        (tmp_path / "masks/train").mkdir(parents=True, exist_ok=True)
        mask = np.full((8, 8), names.index(path.parent.name), np.uint8)
        Image.fromarray(mask).save(f"masks/train/{i}.png")
    rows(files, names).save_to_disk("saved")
    tl.annotate("hf-dataset:saved", "labels", tl.AnnotateConfig(teacher="masks:masks", size=4))
    rows([files[1], files[0], *files[2:]], names).save_to_disk("again")
    store = tl.LabelStore("labels")
    assert find_replaced(store, tl.open_images("hf-dataset:saved")).indices == []
    assert find_replaced(store, tl.open_images("hf-dataset:again")).indices == [0, 1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("saved", "2 splits; name one: hf-dataset:saved:train, hf-dataset:saved:val"),
        ("saved:trian", "no split trian; name one: hf-dataset:saved:train"),
        ("saved:train,image=label", r"label is no column of type Image; its columns are image \(Image\), label"),
        ("train", "train is no folder that save_to_disk wrote; name image files without hf-dataset:"),
        ("texts", r"no column of type Image; its columns are text \(Value\)"),
        ("a:b:c:d", "expected hf-dataset:NAME, hf-dataset:NAME:SPLIT or hf-dataset:NAME:CONFIG:SPLIT"),
    ],
)
@pytest.mark.usefixtures("within")
def test_what_is_no_such_dataset_is_said_in_one_line(name, message):
    if name == "texts":
        save({"text": ["a"]}, {"text": datasets.Value("string")}, name)
    with pytest.raises(ValueError, match=message) as caught:
        tl.open_images(f"hf-dataset:{name}")
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("within")
def test_the_extra_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"hf-dataset:saved: needs `pip install 'tokenlabel\[datasets\]'`"):
        tl.open_images("hf-dataset:saved")


def test_commands_label_a_dataset_and_train_on_it(here):
    for i, path in enumerate(sorted((here / "train").glob("*/*.png"))):
        (here / "masks/train").mkdir(parents=True, exist_ok=True)
        mask = here / "masks/train" / path.relative_to(here / "train")
        mask.rename(here / "masks/train" / f"{i}.png")
    with CommandProcess(here, {"HF_HUB_OFFLINE": "1"}) as process:
        done = process.run("annotate", "hf-dataset:saved:train", "labels", "--teacher", "masks:masks", "--size", "8")
        assert done.status == 0, done
        assert "hf-dataset:saved:train: 20 images of 10 classes" in done.err
        done = process.run("train", *TRAIN.split(), "--model.options", OPTIONS)
        assert done.status == 0, done
        assert "training images: 20 images, 20 with a class, 20 with a label map" in done.err
        done = process.run("eval", "runs/first", "--data", "hf-dataset:nowhere:val")
        assert done.status == 2, done
        assert "no folder nowhere here, nor on the hub" in done.err.splitlines()[-1]
