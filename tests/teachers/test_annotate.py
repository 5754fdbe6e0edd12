from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from annotation_ranks import CPU, ByColour, start_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from tokenlabel.cli import main
from tokenlabel.core.align import align
from tokenlabel.core.batch import collate_score_maps
from tokenlabel.core.geometry import WHOLE_IMAGE, Box, View, stack_views
from tokenlabel.data.images import ImageFolder
from tokenlabel.data.sources import open_images
from tokenlabel.data.tars import TarImages
from tokenlabel.labels.encoding import DEFAULT_TOLERANCE, Encoding
from tokenlabel.labels.fingerprints import find_replaced
from tokenlabel.labels.inspection import InspectConfig, inspect_store
from tokenlabel.labels.presentation import as_text
from tokenlabel.labels.store import LabelStore
from tokenlabel.labels.writer import LabelStoreWriter
from tokenlabel.models import create_model
from tokenlabel.models.load import load_model
from tokenlabel.runtime.errors import ConfigError, DataError, ImageError, ModelError, StoreError
from tokenlabel.runtime.process import ahead, thread_pool
from tokenlabel.teachers import labelling, networks
from tokenlabel.teachers.annotation import annotate, annotate_by, make_teacher
from tokenlabel.teachers.classmap import class_map_for
from tokenlabel.teachers.labelling import TeacherImage, by_shape
from tokenlabel.teachers.masks import MaskTeacher
from tokenlabel.teachers.networks import load_teacher
from tokenlabel.teachers.options import AnnotateConfig, TeacherConfig
from tokenlabel.training.checkpoint import TrainState, save_checkpoint
from tokenlabel.training.recipe import DataConfig, ModelConfig, OptimConfig, Recipe

COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}


def write_image(path: Path, left: str, right: str, img_size=(16, 16)) -> None:
    """Write an image whose halves have two colours; `img_size` is (width, height)."""
    pixels = np.empty((img_size[1], img_size[0], 3), np.uint8)
    pixels[:, : img_size[0] // 2], pixels[:, img_size[0] // 2 :] = COLOURS[left], COLOURS[right]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def images(tmp_path):
    """Nine images of three classes and three shapes, each with its class's colour on the left."""
    for class_name in COLOURS:
        write_image(tmp_path / "images" / class_name / "square.png", class_name, "blue")
        write_image(tmp_path / "images" / class_name / "wide.png", class_name, "green", (32, 8))
        write_image(tmp_path / "images" / class_name / "high.a.png", class_name, "red", (8, 32))
    return tmp_path / "images"


def config(**changes) -> AnnotateConfig:
    return AnnotateConfig(**{"teacher": "by colour", "batch_size": 4, "topk": 3, **changes})


def run(images, labels, teacher=None, **changes):
    return annotate_by(teacher or ByColour(), ImageFolder(images), labels, config=config(**changes), device=CPU)


def test_every_place_of_images_of_any_shape_is_labelled(images, tmp_path):
    done = run(images, tmp_path / "labels")
    assert (done.num_images, done.num_present, done.num_labelled, done.failures) == (9, 0, 9, ())
    store = LabelStore(tmp_path / "labels")
    assert sorted(store.keys()) == sorted(ImageFolder(images).keys)
    grids = {"square.png": (4, 4), "wide.png": (2, 8), "high.a.png": (8, 2)}
    right = {"square.png": "blue", "wide.png": "green", "high.a.png": "red"}
    names = list(COLOURS)
    for key in store.keys():  # noqa: SIM118  (not a dict)
        class_name, file_name = key.split("/")
        score_map = store[key]
        assert score_map.codes.shape[:2] == grids[file_name]
        assert score_map.region == WHOLE_IMAGE
        half = grids[file_name][1] // 2
        assert (score_map.top_class_ids[:, :half] == names.index(class_name)).all()
        assert (score_map.top_class_ids[:, half:] == names.index(right[file_name])).all()
    assert store.manifest.class_names == ("blue", "green", "red")
    assert store.manifest.teacher == {"name": "by colour"}
    assert store.manifest.preprocessing["size"] == 16


def test_a_store_goes_on_with_the_tolerance_that_it_was_begun_with(images, tmp_path, capsys):
    """Stores of the first version do not say any: they kept all entries."""
    labels, manifest = tmp_path / "labels", tmp_path / "labels" / "manifest.json"
    (images / "red" / "wide.png").rename(tmp_path / "later.png")
    run(images, labels)
    old = json.loads(manifest.read_text())
    assert old.pop("tolerance") == DEFAULT_TOLERANCE
    manifest.write_text(json.dumps(old))
    (tmp_path / "later.png").rename(images / "red" / "wide.png")
    capsys.readouterr()
    with pytest.raises(StoreError, match=r"was started with --tolerance 0, got --tolerance 0\.02; leave --tolerance"):
        run(images, labels, tolerance=0.02)
    assert run(images, labels).num_labelled == 1
    assert "continues with --tolerance 0, with which it was started" in capsys.readouterr().err
    store = LabelStore(labels)
    assert store.manifest.tolerance == 0
    run(images, tmp_path / "all", tolerance=0)
    assert store.packed("red/wide.png") == LabelStore(tmp_path / "all").packed("red/wide.png")


def test_a_store_goes_on_with_the_encoding_that_it_was_begun_with(images, tmp_path, capsys):
    run(images, tmp_path / "raw", encoding=Encoding.RAW)
    run(images, tmp_path / "compact")
    write_image(images / "red" / "new.png", "red", "red")
    with pytest.raises(
        StoreError, match="was started with --encoding compact, got --encoding raw; leave --encoding out"
    ):
        run(images, tmp_path / "compact", encoding=Encoding.RAW)
    with pytest.raises(
        StoreError, match=r"was started with --encoding raw, got --tolerance 0\.1; leave --tolerance out"
    ):
        run(images, tmp_path / "raw", tolerance=0.1)
    capsys.readouterr()
    assert run(images, tmp_path / "raw").num_labelled == 1
    assert "raw: continues with --encoding raw, with which it was started" in capsys.readouterr().err
    store = LabelStore(tmp_path / "raw")
    assert {store.packed(key)[0] for key in store.keys()} == {0}  # noqa: SIM118
    assert run(images, tmp_path / "compact", encoding=Encoding.COMPACT).num_labelled == 1


def test_a_second_call_labels_only_what_is_missing(images, tmp_path):
    run(images, tmp_path / "labels")
    write_image(images / "red" / "new.png", "red", "red")
    teacher = ByColour()
    done = run(images, tmp_path / "labels", teacher)
    assert (done.num_present, done.num_labelled, teacher.num_seen) == (9, 1, 1)
    assert len(LabelStore(tmp_path / "labels")) == 10


def test_a_teacher_by_name_states_its_licence_and_goes_on_with_a_store_without(images, tmp_path, monkeypatch):
    save_file(timm.create_model("resnet10t", num_classes=3).state_dict(), tmp_path / "own.safetensors")
    found = load_model("resnet10t", weights=tmp_path / "own.safetensors")
    monkeypatch.setattr(networks, "load_model", lambda *_, **__: replace(found, licence="cc-by-4.0"))
    by_name, by_file = (
        load_teacher("resnet10t", TeacherConfig(teacher="resnet10t", size=32), CPU, weights=weights)
        for weights in (None, "own.safetensors")
    )
    assert by_name.description["licence"] == "cc-by-4.0"
    assert "licence" not in by_file.description, "weights in a file may be anybody's"
    run(images, tmp_path / "labels", by_file)
    write_image(images / "red" / "new.png", "red", "red")
    assert run(images, tmp_path / "labels", by_name).num_labelled == 1


def test_another_teacher_does_not_write_into_the_store(images, tmp_path):
    run(images, tmp_path / "labels")
    differs = r"preprocessing\.size is 16 there, 32 here; `--size 16` continues that store\); choose another folder"
    with pytest.raises(StoreError, match=differs):
        run(images, tmp_path / "labels", ByColour(size=32))


def test_another_size_is_said_before_what_follows_from_it(images, tmp_path, monkeypatch, capsys):
    """Position embeddings are resized, so the hash of the same weights is another one."""
    monkeypatch.chdir(tmp_path)
    save_file(timm.create_model("test_vit", num_classes=3).state_dict(), "own.safetensors")
    save_file(timm.create_model("test_vit", num_classes=3).state_dict(), "other.safetensors")
    teacher = ["annotate", "images", "labels", "--teacher", "test_vit", "--weights"]
    assert main([*teacher, "own.safetensors", "--size", "64"]) == 0
    sized = "`--size 64` continues that store, if the weights are the same); choose another folder"
    cropped = "`--size 64` without --crop continues that store, if the weights are the same)"
    for words, message in (
        (["own.safetensors"], f"(preprocessing.size is 64 there, 160 here; {sized}"),
        (["own.safetensors", "--size", "96"], f"(preprocessing.size is 64 there, 96 here; {sized}"),
        (["own.safetensors", "--size", "96", "--crop", "center"], cropped),
        (["own.safetensors", "--size", "96", "--flip"], "the teacher is test_vit there, test_vit with --flip here)"),
        (["other.safetensors", "--size", "64"], "another one of the same name); choose"),
    ):
        assert main([*teacher, *words]) == 2
        assert message in capsys.readouterr().err
    assert main([*teacher, "own.safetensors", "--size", "64"]) == 0


def test_images_that_do_not_decode_are_listed_and_passed_over(images, tmp_path):
    (images / "red" / "broken.png").write_bytes(b"no image")
    done = run(images, tmp_path / "labels")
    (failure,) = done.failures
    assert failure.key == "red/broken.png"
    assert "does not decode" in failure.reason
    assert LabelStore(tmp_path / "labels").manifest.failures == (failure,)
    assert len(LabelStore(tmp_path / "labels")) == 9
    write_image(images / "red" / "broken.png", "red", "red")
    assert run(images, tmp_path / "labels").failures == ()
    assert LabelStore(tmp_path / "labels").manifest.failures == ()
    assert len(LabelStore(tmp_path / "labels")) == 10


@pytest.mark.parametrize("folder", [".", "red"])
def test_a_store_among_the_images_is_refused_before_it_counts_as_a_class(images, monkeypatch, folder):
    monkeypatch.chdir(images / folder)
    with pytest.raises(StoreError, match=r"labels: lies among the images of \., .* name a folder elsewhere"):
        annotate(".", "labels", config())
    assert not Path("labels").exists()


def test_other_images_of_the_same_names_are_no_replaced_ones(images, tmp_path, capsys):
    run(images, tmp_path / "labels")
    for path in images.glob("*/*.png"):
        write_image(path, "green", "red", (20, 20))
    assert run(images, tmp_path / "labels").num_labelled == 0
    assert "if these are other images of the same names, give them a folder" in capsys.readouterr().err


def test_strict_stops_at_an_image_that_does_not_decode(images, tmp_path):
    (images / "red" / "broken.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"red/broken\.png"):
        run(images, tmp_path / "labels", strict=True)


def keys_file(tmp_path: Path, *lines: str) -> str:
    """Write a file of keys, as an editor of another system leaves it."""
    path = tmp_path / "keys.txt"
    path.write_bytes(("\ufeff" + "\r\n".join([*lines, ""])).encode())
    return str(path)


def repaint(path: Path, left: str, right: str) -> None:
    """Replace an image by one of the same size on the disk."""
    before = path.stat().st_size
    with Image.open(path) as image:
        write_image(path, left, right, image.size)
    assert path.stat().st_size == before


def generations(folder: Path) -> list[str]:
    metadata = [safe_open(path, "np").metadata() for path in sorted(folder.glob("*.safetensors"))]
    return sorted(entries.get("generation", "0") for entries in metadata)


@pytest.fixture
def bitmaps(images):
    """The nine images in files whose size says nothing of what they show."""
    for path in images.rglob("*.png"):
        with Image.open(path) as image:
            image.save(path.with_suffix(".bmp"))
        path.unlink()
    return images


def test_images_that_are_listed_are_labelled_anew(bitmaps, tmp_path, capsys):
    run(bitmaps, tmp_path / "labels")
    repaint(bitmaps / "red" / "square.bmp", "green", "green")
    again = keys_file(tmp_path, "red/square.bmp", "blue/wide.bmp", "red/square.bmp")
    teacher = ByColour()
    done = run(bitmaps, tmp_path / "labels", teacher, again=again)
    assert (done.num_labelled, done.num_anew, done.num_present, teacher.num_seen) == (2, 2, 7, 2)
    store = LabelStore(tmp_path / "labels")
    assert (len(store), store.num_superseded) == (9, 2)
    assert (store["red/square.bmp"].top_class_ids == 1).all()
    assert generations(tmp_path / "labels") == ["0", "1"]
    capsys.readouterr()

    # The same command has nothing left to do, but for what was replaced once more, and for a record that is broken.
    assert run(bitmaps, tmp_path / "labels", again=again).num_labelled == 0
    assert "keys.txt: the images that it lists were labelled again before" in capsys.readouterr().err
    repaint(bitmaps / "red" / "square.bmp", "red", "blue")
    assert run(bitmaps, tmp_path / "labels", again=again).num_anew == 1
    assert LabelStore(tmp_path / "labels")["red/square.bmp"].top_class_ids[0, 0] == 2
    store = LabelStore(tmp_path / "labels")
    shard = next(shard for shard in store.shards if shard.generation == store.generation("blue/wide.bmp"))
    data = bytearray(shard.path.read_bytes())
    for i in range(shard.payload_start, len(data) - 32):
        data[i] ^= 1
    shard.path.write_bytes(data)
    assert run(bitmaps, tmp_path / "labels", again=again).num_anew == 1
    assert (LabelStore(tmp_path / "labels")["blue/wide.bmp"].top_class_ids[:, 0] == 0).all()

    # Another content of the file is another request, and another list labels the same images once more.
    assert run(bitmaps, tmp_path / "labels", again=keys_file(tmp_path, "blue/wide.bmp", "# once more")).num_anew == 1
    assert max(generations(tmp_path / "labels")) == "4"


def test_labelling_anew_goes_on_where_it_was_stopped(images, tmp_path):
    class Stopped(ByColour):
        def probabilities(self, images):
            if self.num_seen >= 4:
                raise KeyboardInterrupt
            return super().probabilities(images)

    run(images, tmp_path / "labels")
    write_image(images / "red" / "new.png", "red", "red")
    again = keys_file(tmp_path, *ImageFolder(images).keys)
    with pytest.raises(KeyboardInterrupt):
        run(images, tmp_path / "labels", Stopped(), batch_size=1, again=again)
    store = LabelStore(tmp_path / "labels")
    num_done = len(store.answers(max(shard.again for shard in store.shards)))
    assert 1 <= num_done <= 4
    assert len(store) >= 9  # those that were not reached have their old label
    done = run(images, tmp_path / "labels", again=again)
    assert done.num_labelled == 10 - num_done
    assert run(images, tmp_path / "labels", again=again).num_labelled == 0
    assert len(LabelStore(tmp_path / "labels")) == 10
    assert run(images, tmp_path / "new", again=again).num_labelled == 10  # there is nothing yet to be labelled again
    assert run(images, tmp_path / "new", again=again).num_labelled == 0


@pytest.mark.parametrize(
    "line", ["images/red/square.png", "./red/square.png", "red/square.png ", '"red/square.png"', "{}/red/square.png"]
)
def test_lists_as_find_and_spreadsheets_write_them_are_taken(images, tmp_path, monkeypatch, line):
    monkeypatch.chdir(images.parent)
    assert images.name == "images"
    run(images, tmp_path / "labels")
    again = keys_file(tmp_path, line.format(images), "", "  ")
    assert run(Path("images"), tmp_path / "labels", again=again).num_anew == 1
    assert LabelStore(tmp_path / "labels").generation("red/square.png") == 1


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ["red/square.png", "red/gone.png", "blue"],
            r"keys of the images, such as blue/high\.a\.png; 2 are not \(red/gone",
        ),
        (["", "# red"], "expected keys of the images, such as .*; it lists none"),
        (None, r"again nowhere\.txt: cannot be read \(No such file.* a key a line, or changed"),
    ],
)
def test_lists_of_what_are_no_keys_are_refused(images, tmp_path, lines, message):
    again = "nowhere.txt" if lines is None else keys_file(tmp_path, *lines)
    with pytest.raises(ValueError, match=message):
        run(images, tmp_path / "labels", again=again)
    assert not (tmp_path / "labels").exists()


def packed_in_tar(images: Path) -> TarImages:
    path = images.parent / "images.tar"
    with tarfile.open(path, "w") as tar:
        for class_name in COLOURS:
            tar.add(images / class_name, class_name)
    return TarImages([path])


@pytest.mark.parametrize("opened", [ImageFolder, packed_in_tar])
def test_images_that_were_replaced_are_named_and_labelled_anew(bitmaps, tmp_path, capsys, monkeypatch, opened):
    def run_on_it(**changes):
        capsys.readouterr()
        done = annotate_by(ByColour(), opened(bitmaps), tmp_path / "labels", config=config(**changes), device=CPU)
        return done.num_labelled, capsys.readouterr().err

    run_on_it()
    os.utime(bitmaps / "red" / "wide.bmp", (0, 0))  # a copy, say
    assert run_on_it()[0] == 0
    assert "replaced since" not in run_on_it()[1]
    assert "no image is known to have been replaced" in run_on_it(again="changed")[1]
    repaint(bitmaps / "red" / "square.bmp", "green", "green")
    Image.new("RGB", (9, 9)).save(bitmaps / "blue" / "wide.bmp")
    expected = "2 images were replaced since labelling (blue/wide.bmp, red/square.bmp); --again changed labels them"
    count, said = run_on_it()
    assert (count, expected in said) == (0, True)
    monkeypatch.setattr("tokenlabel.teachers.todo.MAX_READ", 0)
    said = run_on_it()[1]
    assert "1 image was replaced since labelling (blue/wide.bmp)" in said
    assert "images were modified since labelling and kept their size; --again changed reads them" in said
    inspect = partial(inspect_store, LabelStore(tmp_path / "labels"), source=opened(bitmaps))
    assert inspect().replaced == inspect(InspectConfig(verify=True)).replaced == ("blue/wide.bmp", "red/square.bmp")
    assert "replaced                2 of the images since" in as_text(inspect().as_dict())
    monkeypatch.setattr("tokenlabel.labels.inspection.find_replaced", partial(find_replaced, max_read=0))
    assert "which kept their size: --verify reads them" in as_text(inspect().as_dict())
    count, said = run_on_it(again="changed")
    assert (count, "replaced since" in said) == (2, False)
    assert (LabelStore(tmp_path / "labels")["red/square.bmp"].top_class_ids == 1).all()
    assert run_on_it(again="changed")[0] == 0


def test_images_of_the_same_size_and_time_are_told_apart_by_their_bytes(bitmaps, tmp_path):
    path = bitmaps / "red" / "square.bmp"
    run(bitmaps, tmp_path / "labels")
    before = path.stat().st_mtime_ns
    repaint(path, "green", "green")
    os.utime(path, ns=(before, before))
    store, source = LabelStore(tmp_path / "labels"), ImageFolder(bitmaps)
    assert inspect_store(store, source=source).num_replaced == 0
    assert inspect_store(store, InspectConfig(verify=True), source=source).replaced == ("red/square.bmp",)
    assert inspect_store(store).num_replaced is None


def test_stores_that_do_not_say_what_images_they_are_of(images, tmp_path, capsys):
    run(images, tmp_path / "labels")
    store = LabelStore(tmp_path / "labels")
    with LabelStoreWriter(tmp_path / "old", store.manifest) as writer:
        for key in store.keys():  # noqa: SIM118  (not a dict)
            writer.add_record(key, store.packed(key))
    write_image(images / "red" / "square.png", "green", "green", (20, 20))
    assert run(images, tmp_path / "old").num_labelled == 0
    assert "replaced since" not in capsys.readouterr().err
    run(images, tmp_path / "old", again="changed")
    assert "but 9 labels do not say what image they were made of" in capsys.readouterr().err


def test_two_calls_at_once(images, tmp_path, capsys):
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(run, images, tmp_path / "labels", ByColour(seconds_a_batch=0.2)) for _ in range(2)]
        assert [call.result().num_labelled for call in calls] == [9, 9]
    capsys.readouterr()
    assert len(LabelStore(tmp_path / "labels", duplicates="refuse")) == 9
    assert run(images, tmp_path / "labels").num_present == 9
    assert "different labels" not in capsys.readouterr().err


def test_failures_of_other_images_stay_noted_while_they_exist(images, tmp_path):
    for name in "ab":
        (images / f"{name}.png").write_bytes(b"no image")
        (images / f"{name}.txt").write_text(f"{name}.png\nred/square.png\n")

    def label(name):
        source = open_images(images / f"{name}.txt")
        annotate_by(ByColour(), source, tmp_path / "labels", config=config(), device=CPU)
        return [failure.key for failure in LabelStore(tmp_path / "labels").manifest.failures]

    assert label("a") == ["a.png"]
    assert label("b") == ["a.png", "b.png"]
    (images / "a.png").unlink()
    assert label("b") == ["b.png"]


def test_a_store_that_cannot_be_written_is_enough_where_nothing_is_missing(images, tmp_path, monkeypatch):
    run(images, tmp_path / "labels")
    before = {path.name: path.stat().st_mtime_ns for path in [tmp_path / "labels", *(tmp_path / "labels").iterdir()]}
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert run(images, tmp_path / "labels").num_present == 9
    assert before == {
        path.name: path.stat().st_mtime_ns for path in [tmp_path / "labels", *(tmp_path / "labels").iterdir()]
    }
    write_image(images / "red" / "new.png", "red", "red")
    with pytest.raises(StoreError, match="labels: cannot be written to, which the labels of 1 more images"):
        run(images, tmp_path / "labels")


def test_the_command_line_labels_anew_and_says_what_a_store_holds_twice(bitmaps, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tokenlabel.teachers.annotation.load_teachers", lambda *_: ByColour())

    def tell(*words, status=0):
        assert main(list(words)) == status
        captured = capsys.readouterr()
        return captured.err if status else captured.out + captured.err

    label = ["annotate", "./images", "./labels", "--teacher", "by colour", "--size", "16"]
    assert "labels: 9 images labelled, 0 had been, 0 failed" in tell(*label)
    repaint(bitmaps / "red" / "square.bmp", "green", "green")
    assert "1 image was replaced since labelling (red/square.bmp); --again changed" in tell(*label)
    assert "1 of the images since labelling (red/square.bmp): annotate --again" in tell(
        "inspect", "./labels", "--images", "images"
    )
    assert "2 images labelled (2 anew), 7 had been" in tell(
        *label, "--again", keys_file(tmp_path, "red/square.bmp", "blue/wide.bmp")
    )
    assert "superseded              2 records, by newer, equal or earlier ones" in tell(
        "inspect", "./labels", "--images", "images"
    )
    assert "2 are not (x, y)" in tell(*label, "--again", keys_file(tmp_path, "x", "y"), status=2)
    tell("annotate", "./images", "./others", "--teacher", "by colour", "--encoding", "raw")
    twice = ["./labels", "./others"]
    assert "7 images have different labels in several files" in tell("inspect", *twice)
    for words in (["inspect", *twice], ["merge", *twice, "./merged"]):
        assert "7 images have different labels" in tell(*words, "--duplicates", "refuse", status=2)
    assert "9 labels" in tell("merge", *twice, "./merged")
    assert "is the store that is to be copied" in tell("merge", "./merged", "merged", status=2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_refused_by_the_images_name(images, tmp_path, value):
    class Broken(ByColour):
        def probabilities(self, images):
            probs = super().probabilities(images)
            if probs.shape[1:3] == (2, 8):
                probs[-1, 1, 3, 2] = value
            return probs

    with pytest.raises(ValueError, match=r"wide\.png: .* scores are not finite"):
        run(images, tmp_path / "labels", Broken())


def test_an_interruption_keeps_what_is_finished(images, tmp_path, monkeypatch):
    monkeypatch.setattr(labelling, "NUM_PACKED_AHEAD", 1)  # nothing that a slow thread has yet to finish

    class Stopped(ByColour):
        def probabilities(self, images):
            if self.num_seen >= 4:
                raise KeyboardInterrupt
            return super().probabilities(images)

    with pytest.raises(KeyboardInterrupt):
        run(images, tmp_path / "labels", Stopped(), batch_size=1)
    num_kept = len(LabelStore(tmp_path / "labels"))
    assert 1 <= num_kept <= 4
    assert run(images, tmp_path / "labels").num_labelled == 9 - num_kept


def test_a_centre_crop_says_what_the_teacher_saw(images, tmp_path):
    run(images, tmp_path / "labels", ByColour(crop_fraction=1.0))
    store = LabelStore(tmp_path / "labels")
    assert store["red/wide.png"].region == Box(left=0.375, top=0, right=0.625, bottom=1)
    assert store["red/square.png"].region == WHOLE_IMAGE


def test_a_run_of_our_own_as_teacher(images, tmp_path):
    recipe = Recipe(
        data=DataConfig(train="nowhere"),
        model=ModelConfig(name="resnet10t", img_size=(32, 32), options={"output_stride": 8}),
        optim=OptimConfig(lr=0.1, lr_batch_size=1),
        epochs=1,
        batch_size=1,
    )
    torch.manual_seed(0)
    model = create_model("resnet10t", num_classes=3, img_size=(32, 32), output_stride=8)
    trained = TrainState(model, torch.optim.SGD(model.parameters()), None)
    save_checkpoint(tmp_path / "run", 7, trained, recipe=recipe, class_names=list(COLOURS))
    settings_ = config(teacher=str(tmp_path / "run"), size=64)
    teacher = load_teacher(str(tmp_path / "run"), settings_, CPU)
    assert teacher.class_names == tuple(COLOURS)
    assert (teacher.input.size, teacher.input.stride_px) == (64, 8)
    annotate(images, tmp_path / "labels", replace(settings_, tolerance=0), device=CPU)
    score_map = LabelStore(tmp_path / "labels")["red/square.png"]
    pixels, _ = teacher.input.of(Image.open(images / "red" / "square.png"))
    expected = teacher.probabilities(torch.from_numpy(pixels).permute(2, 0, 1)[None])[0].detach()
    assert np.abs(score_map.dense() - expected.numpy()).max() < 1 / 500


def test_a_teacher_of_other_classes_is_refused(images, tmp_path):
    (images / "green").rename(images / "grass")
    with pytest.raises(ConfigError, match="'green' to the teacher and 'grass' to the images"):
        run(images, tmp_path / "labels")


@pytest.fixture
def many_classes(images, tmp_path, monkeypatch):
    """A teacher of seven classes, four of which go to three of ours, in the folder where the commands run."""
    torch.manual_seed(0)
    network: Any = timm.create_model("test_resnet", num_classes=7)
    torch.nn.init.normal_(network.fc.weight, std=0.5)
    save_file(network.state_dict(), tmp_path / "teacher.safetensors")
    (tmp_path / "map.csv").write_text("0,red\n1,red\n2,blue\n3,green\n")
    monkeypatch.chdir(tmp_path)
    return network


def weights_of(store: LabelStore, key: str) -> torch.Tensor:
    """Return the weights of the labels of four tokens that show an image."""
    views = torch.from_numpy(stack_views([View.identity()]))
    return align(collate_score_maps([store[key]]), views, (2, 2)).weight


def annotate_with_map(*options: str) -> int:
    teacher = ["--teacher", "test_resnet", "--weights", "teacher.safetensors", "--size", "64"]
    keep = ["--class-map", "map.csv", "--encoding", "raw", "--topk", "3"]
    return main(["annotate", "images", "labels", *teacher, *keep, *options])


def test_what_a_class_map_leaves_out_is_renormalised_by_default(many_classes, capsys):
    assert annotate_with_map() == 0
    assert re.search(r"labels: 0\.0% of [\d,]+ cells keep nothing", capsys.readouterr().err)
    store = LabelStore("labels")
    assert store.manifest.teacher["class_map"]["nowhere"] == "renormalise"
    teacher = load_teacher("test_resnet", config(teacher="test_resnet", size=64), CPU, weights="teacher.safetensors")
    pixels, _ = teacher.input.of(Image.open("images/red/wide.png"))
    probs = teacher.probabilities(torch.from_numpy(pixels).permute(2, 0, 1)[None])[0].detach().numpy()
    ours = np.stack([probs[..., 2], probs[..., 3], probs[..., :2].sum(axis=2)], axis=2)
    expected = ours / ours.sum(axis=2, keepdims=True)
    np.testing.assert_allclose(store["red/wide.png"].dense(), expected, atol=1e-4)


def test_options_without_effect_are_refused():
    with pytest.raises(ModelError, match="give --class-map, or leave it out"):
        config(outside="spread")
    with pytest.raises(ConfigError, match="--tolerance is of compact records"):
        config(encoding=Encoding.RAW, tolerance=0.1)


def test_a_class_map_in_json_takes_names_as_they_are(tmp_path):
    (tmp_path / "map.json").write_text(json.dumps({"#1": "a,b", 'tab\t"x"': "c"}))
    class_map = class_map_for(str(tmp_path / "map.json"), ["#1", 'tab\t"x"'], ["c", "a,b"], num_theirs=2)
    assert class_map is not None
    assert class_map.targets.tolist() == [1, 0]


def test_a_store_goes_on_with_what_it_was_made_with(many_classes, images, capsys):
    assert annotate_with_map("--outside", "spread") == 0
    assert "keep nothing" not in capsys.readouterr().err
    assert LabelStore("labels").manifest.teacher["class_map"]["nowhere"] == "spread evenly"
    assert annotate_with_map() == 2
    assert "made with --outside spread there, renormalise here; `--outside spread` continues" in capsys.readouterr().err
    write_image(images / "red" / "new.png", "red", "red")
    (images.parent / "map.csv").write_text("0,red\n1,blue\n2,blue\n3,green\n")
    assert annotate_with_map() == 2, "and another class map"
    assert "(teacher.class_map.targets[1] is 2 there, 0 here)" in capsys.readouterr().err
    (images.parent / "map.csv").write_text("0,red\n1,red\n2,blue\n3,green\n")
    assert annotate_with_map("--outside", "spread") == 0
    assert "1 images labelled, 9 had been" in capsys.readouterr().out


def test_places_that_show_nothing_of_ours_keep_nothing(many_classes, capsys):
    many_classes.fc.bias.data[6] += 100
    save_file(many_classes.state_dict(), "teacher.safetensors")
    assert annotate_with_map("--encoding", "compact") == 0
    assert "labels: 100.0% of" in capsys.readouterr().err
    store = LabelStore("labels")
    assert not any(store[key].probs.any() for key in store.keys())  # noqa: SIM118
    assert not weights_of(store, "red/wide.png").any()


def write_mask(path: Path, mask: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask.astype(np.uint8)).save(path)


def test_masks_as_teacher(images, tmp_path):
    source = ImageFolder(images)
    rng = np.random.default_rng(0)
    masks = {key: rng.choice([0, 1, 2, 255], size=(6, 5)) for key in source.keys}
    for key, mask in masks.items():
        write_mask((tmp_path / "masks" / key).with_suffix(".png"), mask)
    (tmp_path / "masks" / "red" / "wide.png").unlink()
    done = annotate(images, tmp_path / "labels", config(teacher=f"masks:{tmp_path / 'masks'}"), device=CPU)
    assert [failure.key for failure in done.failures] == ["red/wide.png"]
    store = LabelStore(tmp_path / "labels")
    write_image(images / "red" / "square.png", "red", "green", (20, 20))
    assert inspect_store(store, source=source).replaced == ("red/square.png",)
    for key, mask in masks.items():
        if key in store:
            certain = np.eye(3)[np.where(mask == 255, 0, mask)]
            expected = np.where((mask == 255)[..., None], 1 / 3, certain)
            np.testing.assert_allclose(store[key].dense(), expected, atol=1e-6)
            assert (weights_of(store, key) == 1).all(), "unlabelled pixels are spread evenly"


def test_masks_that_changed_since_are_named_and_labelled_anew(images, tmp_path, capsys):
    keys = ImageFolder(images).keys
    for key in keys:
        write_mask((tmp_path / "masks" / key).with_suffix(".png"), np.array([[0, 1], [2, 255]]))
    masks = {"teacher": f"masks:{tmp_path / 'masks'}"}
    annotate(images, tmp_path / "labels", config(**masks), device=CPU)
    write_mask(tmp_path / "masks" / "red" / "wide.png", np.array([[0, 1], [2, 2]]))
    assert annotate(images, tmp_path / "labels", config(**masks), device=CPU).num_labelled == 0
    said = "of the masks looked at, 1 were replaced since labelling (red/wide.png); --again changed"
    assert said in capsys.readouterr().err
    assert annotate(images, tmp_path / "labels", config(**masks, again="changed"), device=CPU).num_anew == 1
    assert LabelStore(tmp_path / "labels")["red/wide.png"].top_class_ids.tolist() == [[0, 1], [2, 2]]
    assert annotate(images, tmp_path / "labels", config(**masks, again="changed"), device=CPU).num_labelled == 0
    assert "were replaced" not in capsys.readouterr().err


@settings(max_examples=20, deadline=None)
@given(height=st.integers(1, 9), width=st.integers(1, 9), size=st.integers(1, 9), seed=st.integers(0, 1000))
def test_large_masks_are_averaged_over_cells(tmp_path_factory, height, width, size, seed):
    folder = tmp_path_factory.mktemp("masks")
    mask = np.random.default_rng(seed).choice([0, 1, 4, 255], size=(height, width))
    write_mask(folder / "x.png", mask)
    read = MaskTeacher(folder, class_names="abcde", size=size).score_map("x.jpg", topk=5)
    h, w, _ = read.codes.shape
    assert (h, w) == (height, width) if height * width <= size**2 else h * w <= size**2 + height + width
    for row in range(h):
        for column in range(w):
            rows = slice(height * row // h, -(-height * (row + 1) // h))
            columns = slice(width * column // w, -(-width * (column + 1) // w))
            cell = mask[rows, columns]
            for class_id in (0, 1, 4):
                share = (cell == class_id).mean() + (cell == 255).mean() / 5
                assert read.dense()[row, column, class_id] == pytest.approx(share, abs=1e-6)


def test_masks_of_unknown_ids_stop_and_class_maps_mend_them(images, tmp_path):
    for key in ImageFolder(images).keys:
        write_mask((tmp_path / "masks" / key).with_suffix(".png"), np.array([[7, 2], [9, 255]]))
    teacher = f"masks:{tmp_path / 'masks'}"
    with pytest.raises(DataError, match="holds 7, 9, which is no id of 3 classes"):
        annotate(images, tmp_path / "labels", config(teacher=teacher), device=CPU)
    (tmp_path / "map.csv").write_text("7,red\n2,red\n3,blue\n4,green\n")
    with_map = config(teacher=teacher, class_map=str(tmp_path / "map.csv"))
    annotate(images, tmp_path / "mapped", with_map, device=CPU)
    probs = LabelStore(tmp_path / "mapped")["red/wide.png"].dense()
    np.testing.assert_allclose(probs[0], [[0, 0, 1], [0, 0, 1]], atol=1e-6)
    np.testing.assert_allclose(probs[1], 1 / 3, atol=1e-6)


def test_masks_go_with_no_other_teacher(images):
    with pytest.raises(ModelError, match="masks go with no other teacher"):
        make_teacher(config(teacher=["masks:x", "resnet18"]), ImageFolder(images), CPU)


@settings(max_examples=50, deadline=None)
@given(shapes=st.lists(st.sampled_from([(4, 4, 3), (2, 8, 3), (8, 2, 3)]), max_size=40), size=st.integers(1, 5))
def test_batches_have_one_shape_and_hold_every_image_once(shapes, size):
    images = [TeacherImage(str(i), np.zeros(shape, np.uint8), WHOLE_IMAGE) for i, shape in enumerate(shapes)]
    batches = list(by_shape(images, size))
    assert sorted(int(item.key) for batch in batches for item in batch) == list(range(len(shapes)))
    assert all(len({item.pixels.shape for item in batch}) == 1 for batch in batches)
    assert all(len(batch) <= size for batch in batches)


def test_few_images_wait_for_others_of_their_shape():
    waiting = max_waiting = 0

    def shown():
        nonlocal waiting, max_waiting
        for i in range(1000):
            waiting += 1
            max_waiting = max(max_waiting, waiting)
            yield TeacherImage(str(i), np.zeros((i % 300 + 1, 1, 3), np.uint8), WHOLE_IMAGE)

    for batch in by_shape(shown(), 4):
        waiting -= len(batch)
    assert max_waiting <= labelling.MAX_WAITING_IMAGES


def test_working_ahead_keeps_the_order_and_passes_errors_on():
    def inverse(i):
        time.sleep(random.random() * 1e-3)
        return 1 / i

    with thread_pool(3) as pool:
        assert list(ahead(pool, inverse, range(1, 40), 5)) == [1 / i for i in range(1, 40)]
        with pytest.raises(ZeroDivisionError):
            list(ahead(pool, inverse, [1, 0, 2], 2))


def kill_ranks_at_random(images, labels, *, num_kills: int, rng: random.Random) -> int:
    """Annotate on two ranks, kill one at random and then end the other; return how often this was done."""
    kills = before = 0
    while kills < num_kills and before < len(ImageFolder(images)):
        ranks = start_ranks(rng.choice([2, 2, 3]), images, labels)
        while num_labels(labels) <= before and all(process.is_alive() for process in ranks):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.15))
        ranks = rng.sample(ranks, len(ranks))
        for process, number in zip(ranks, [signal.SIGKILL, signal.SIGTERM, signal.SIGTERM], strict=False):
            if process.pid and process.is_alive():
                os.kill(process.pid, number)
        for process in ranks:
            process.join()
        kills += ranks[0].exitcode == -signal.SIGKILL
        before = num_labels(labels)
    return kills


def num_labels(folder) -> int:
    return len(LabelStore(folder)) if (folder / "manifest.json").exists() else 0


@pytest.mark.parametrize(("num_images", "num_kills"), [(300, 3), pytest.param(1500, 20, marks=pytest.mark.long)])
def test_killed_ranks_lose_nothing_but_their_open_files(tmp_path, num_images, num_kills):
    rng = random.Random(0)
    for i in range(num_images):
        names = rng.choices(list(COLOURS), k=2)
        write_image(tmp_path / "images" / names[0] / f"{i}.png", *names)
    images, labels = tmp_path / "images", tmp_path / "labels"
    assert kill_ranks_at_random(images, labels, num_kills=num_kills, rng=rng) == num_kills
    num_before = num_labels(labels)
    assert 0 < num_before < num_images
    for process in start_ranks(3, images, labels):
        process.join()
        assert process.exitcode == 0
    store = LabelStore(labels)
    assert sorted(store.keys()) == sorted(ImageFolder(images).keys)
    expected = tmp_path / "expected"
    annotate_by(ByColour(), ImageFolder(images), expected, config=config(), device=CPU)
    unbroken = LabelStore(expected)
    for key in ImageFolder(images).keys:
        assert np.array_equal(store[key].dense(), unbroken[key].dense())


@pytest.mark.long
def test_torchrun_divides_the_work(images, tmp_path):
    code = (
        "from annotation_ranks import *; import sys; "
        "config = AnnotateConfig(teacher='by colour', topk=3); "
        "annotate_by(ByColour(), ImageFolder(sys.argv[1]), sys.argv[2], config=config, device=CPU)"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", str(script)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([*command, str(images), str(tmp_path / "labels")], check=True, env=environment)
    assert len(LabelStore(tmp_path / "labels")) == 9
    assert len(json.loads((tmp_path / "labels" / "manifest.json").read_text())["class_names"]) == 3
