"""A real teacher on real photographs: the demo's first chapter, and what its maps know of two of the images."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import tokenlabel as tl
from tokenlabel.data.class_names import words_of
from tokenlabel.demo import TEACHER, draw_method, write_photographs


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """The folder of the demo's photographs, labelled from another folder by a process of its own."""
    root = tmp_path_factory.mktemp("some place") / "photographs"
    write_photographs(root)
    command = ["annotate", "photographs/images.csv", "photographs/labels", "--teacher", TEACHER, "--size", "288"]
    more = ["--weights", "photographs/teacher.safetensors", "--device", "cpu"]
    subprocess.run([sys.executable, "-m", "tokenlabel", *command, *more], cwd=root.parent, check=True)
    return root


def test_the_teacher_knows_a_cat_and_a_cup_of_coffee_and_where_they_are(photographs):
    store = tl.LabelStore(photographs / "labels")
    names = [words_of(name) for name in store.manifest.class_names]
    cat, coffee = (store[f"images/{name}.png"].dense() for name in ("cat", "coffee"))
    cats = [names.index(name) for name in ("Egyptian cat", "tiger cat", "tabby", "Siamese cat", "lynx")]
    cat_share, espresso = cat[..., cats].sum(axis=2), coffee[..., names.index("espresso")]
    rows, columns = espresso.shape
    assert cat_share[2:-2, 2:-2].mean() > 0.7  # the face fills the image
    cup = espresso[rows // 4 : rows // 2, columns // 3 : 2 * columns // 3]
    assert cup.mean() > 0.5
    assert espresso[:2, :2].mean() < 0.1  # a table


def test_the_picture_tints_what_the_teacher_is_sure_of_and_names_it(photographs, tmp_path):
    draw_method(photographs, tmp_path / "method.png")
    with Image.open(tmp_path / "method.png") as picture:
        pixels = np.asarray(picture.convert("HSV"))
    tinted = pixels[..., 1] > 60
    assert 0.15 < tinted[:750].mean() < 0.6  # cells over grey photographs
    assert len(np.unique(pixels[750:][tinted[750:]][:, 0])) >= 8  # the legend's classes


def test_the_photographs_are_written_once_and_say_what_is_missing(photographs, monkeypatch, tmp_path):
    weights = photographs / "teacher.safetensors"
    before = weights.stat().st_mtime_ns
    write_photographs(photographs)
    assert weights.stat().st_mtime_ns == before
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(ValueError, match=r"skimage.*pip install 'tokenlabel\[demo\]'"):
        write_photographs(tmp_path)


def test_inspect_names_what_is_in_the_photographs(photographs):
    done = subprocess.run(
        [sys.executable, "-m", "tokenlabel", "inspect", "photographs/labels", "--json"],
        cwd=photographs.parent,
        check=True,
        capture_output=True,
        text=True,
    )
    assert json.loads(done.stdout)["num_images"] == 4
