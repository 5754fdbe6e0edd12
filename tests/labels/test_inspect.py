from __future__ import annotations

import json
import math
import os
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from tokenlabel.cli import main
from tokenlabel.core.geometry import Box
from tokenlabel.core.scores import Kind, from_mask, from_probabilities, from_top
from tokenlabel.data.images import ImageFolder, JoinedImages
from tokenlabel.data.sources import open_images
from tokenlabel.labels.encoding import Encoding, pack
from tokenlabel.labels.fingerprints import FingerprintedImages, say_replaced
from tokenlabel.labels.inspection import InspectConfig, as_probabilities, class_finder, inspect_store, verify
from tokenlabel.labels.manifest import Failure, Manifest
from tokenlabel.labels.presentation import as_text, write_pictures
from tokenlabel.labels.store import LabelStore
from tokenlabel.labels.writer import LabelStoreWriter
from tokenlabel.runtime.errors import StoreError

NAMES = ("ape", "bee", "cat", "dog")


def manifest(**changes) -> Manifest:
    return Manifest(**{"num_classes": 4, "class_names": NAMES, "topk": 2, "encoding": Encoding.RAW, **changes})


def certain(class_id: int, share: float = 1.0, size=(4, 5)):
    """Return a map whose places are all of one class, with this probability; the rest is even."""
    class_ids = np.full((*size, 1), class_id)
    return from_top(class_ids, np.full((*size, 1), share), num_classes=4)


@pytest.fixture
def folder(tmp_path):
    """Three labels that agree with their class and one that does not."""
    with LabelStoreWriter(tmp_path / "labels", manifest()) as writer:
        writer.add("ape/1.png", certain(0))
        writer.add("bee/1.png", certain(1, 0.5))
        writer.add("bee/2.png", certain(1, 0.25))  # no more than chance: nothing is preferred
        writer.add("cat/1.png", certain(3, 0.75, size=(2, 2)))
    return tmp_path / "labels"


def test_figures(folder):
    found = inspect_store(LabelStore(folder))
    assert (found.num_images, found.num_classes, found.num_sampled, found.num_files) == (4, 4, 4, 1)
    assert found.map_sizes == {"4 x 5": 3, "2 x 2": 1}
    assert found.classes_per_map == 1
    assert found.top1_prob == pytest.approx((1 + 0.5 + 0.25 + 0.75) / 4)
    assert found.rest == pytest.approx((0 + 0.5 + 0.75 + 0.25) / 4)
    by_hand = [0, 0.5 + 0.5 * math.log2(6), 2, 0.75 * math.log2(4 / 3) + 0.25 * math.log2(12)]
    assert found.entropy_bits == pytest.approx(np.mean(by_hand))
    assert found.class_agreement == 0.75
    assert found.place_agreement == 0.75
    assert found.num_verified is None
    (suspect,) = found.suspects
    assert (suspect.key, suspect.class_name, suspect.top_class_name) == ("cat/1.png", "cat", "dog")
    assert suspect.prob == 0
    assert suspect.top_prob == pytest.approx(0.75)
    json.dumps(found.as_dict())


def test_images_are_ranked_by_how_uncertain_their_teacher_is(folder):
    found = inspect_store(LabelStore(folder))
    assert [image.key for image in found.uncertain] == ["bee/2.png", "bee/1.png", "cat/1.png"]  # of ape it is certain
    assert [image.below_half for image in found.uncertain] == [1.0, 0.0, 0.0]
    assert found.uncertain[0].entropy_bits == pytest.approx(2)
    lines = as_text(found.as_dict()).splitlines()
    first = lines.index("least certain: a mask of these would teach most")
    assert lines[first + 1] == "  bee/2.png: 2.00 bits a place, 100% of the places below 50%"
    some = inspect_store(LabelStore(folder), InspectConfig(sample=2, num_suspects=1))
    assert len(some.uncertain) == 1
    assert "least certain of those looked at (--sample 0: all): a mask" in as_text(some.as_dict())


def test_classes_come_from_the_images_where_they_are_given(folder, tmp_path):
    for key in ("ape/1.png", "bee/1.png", "cat/1.png", "dog/9.png"):
        (tmp_path / "images" / key).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (10, 8)).save(tmp_path / "images" / key)
    found = inspect_store(LabelStore(folder), source=ImageFolder(tmp_path / "images"))
    assert found.class_agreement == pytest.approx(2 / 3)


def test_keys_that_name_no_class(tmp_path):
    with LabelStoreWriter(tmp_path, manifest(class_names=())) as writer:
        writer.add("ape/1.png", certain(0))
    found = inspect_store(LabelStore(tmp_path))
    assert found.class_agreement is None
    assert found.suspects == ()


def test_an_empty_store(tmp_path):
    LabelStoreWriter(tmp_path, manifest())
    found = inspect_store(LabelStore(tmp_path), InspectConfig(verify=True))
    assert (found.num_images, found.num_verified, found.top1_prob) == (0, 0, 0.0)


def test_names_that_a_terminal_would_obey_are_shown_without(tmp_path):
    with LabelStoreWriter(tmp_path, manifest(preprocessing={"unlabelled": 0, "size": None})) as writer:
        writer.add("ape/\x1b[31m\n.png", certain(1, 0.5))
    lines = as_text(inspect_store(LabelStore(tmp_path)).as_dict()).splitlines()
    assert sum(line.startswith("  ape/?[31m?.png: ") for line in lines) == 2
    assert not any("\x1b" in line for line in lines)
    assert f"{'preprocessing':<24}unlabelled 0" in lines


def test_a_sample_is_drawn(folder):
    assert inspect_store(LabelStore(folder), InspectConfig(sample=2)).num_sampled == 2
    assert inspect_store(LabelStore(folder), InspectConfig(sample=0)).num_sampled == 4


def test_verify_names_every_broken_record(folder):
    store = LabelStore(folder)
    assert list(verify(store)) == []
    (path,) = folder.glob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    data[-100] ^= 1
    path.write_bytes(bytes(data))
    found = inspect_store(LabelStore(folder), InspectConfig(verify=True))
    assert (found.num_verified, found.num_sampled) == (4, 2)
    assert len(found.broken) == 2
    assert all("was altered" in line for line in found.broken)


def test_verify_finds_what_no_teacher_writes(tmp_path):
    """Records of another program, say: our own writes no such map."""
    score_map = from_probabilities(np.full((1, 1, 4), 0.25), 2)
    too_much, twice = replace(score_map, probs=score_map.probs * 3.6), replace(score_map, codes=score_map.codes * 0)
    with LabelStoreWriter(tmp_path, manifest()) as writer:
        writer.add_record("too much", pack(too_much, Encoding.RAW))
        writer.add_record("twice", pack(twice, Encoding.RAW))
    found = dict(verify(LabelStore(tmp_path)))
    assert list(found) == ["too much", "twice"]
    assert "of a cell sum to 1.8" in found["too much"]
    assert found["twice"] == "twice: a cell names the same class twice"


def test_replaced_images_are_found_among_those_with_and_without_classes(tmp_path, capsys):
    for key in ("images/ape/1.png", "images/ape/2.png", "more/3.png", "more/4.png"):
        (tmp_path / key).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / key).write_bytes(b"png")
    source = JoinedImages(ImageFolder(tmp_path / "images"), ImageFolder(tmp_path / "more", classes=False))
    fingerprinted = FingerprintedImages(source)
    with LabelStoreWriter(tmp_path / "labels", manifest()) as writer:
        for index, key in enumerate(source.keys):
            fingerprinted.read(index)
            writer.add(key, certain(0), fingerprinted.take(key))
    say_replaced(LabelStore(tmp_path / "labels"), source)
    assert not capsys.readouterr().err
    (tmp_path / "more/3.png").write_bytes(b"larger")
    (tmp_path / "more/4.png").write_bytes(b"PNG")
    os.utime(tmp_path / "more/4.png", (0, 0))
    say_replaced(LabelStore(tmp_path / "labels"), source)
    assert (
        "2 of 4 images that were looked at are not those that were labelled (3.png, 4.png)" in capsys.readouterr().err
    )
    say_replaced(LabelStore(tmp_path / "labels"), ImageFolder(tmp_path / "more", classes=False))
    said = capsys.readouterr().err
    assert "all 2 images that were looked at are others than those that were labelled (3.png, 4.png)" in said
    assert "other images of the same names need labels of their own" in said
    assert "--again" not in said  # which would put their labels in place of the others'


def test_logits_are_inspected_as_probabilities():
    logits = from_top(np.array([[[1, 2]]]), np.array([[[2.0, -1.0]]]), num_classes=4, kind=Kind.LOGITS)
    full = np.array([0, 2, -1, 0.0])
    expected = np.exp(full) / np.exp(full).sum()
    np.testing.assert_allclose(as_probabilities(logits).dense()[0, 0], expected, atol=1e-6)


def test_figures_of_a_store_of_logits(tmp_path):
    logits = from_top(np.array([[[1, 2]]]), np.array([[[2.0, -1.0]]]), num_classes=4, kind=Kind.LOGITS)
    with LabelStoreWriter(tmp_path, manifest(kind=Kind.LOGITS)) as writer:
        writer.add("bee/1.png", logits)
    found = inspect_store(LabelStore(tmp_path), InspectConfig(verify=True))
    assert found.broken == ()
    assert found.class_agreement == 1


def test_pictures_show_the_most_and_the_least_certain(folder, tmp_path):
    for key in ("ape/1.png", "bee/1.png", "bee/2.png", "cat/1.png"):
        (tmp_path / "images" / key).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (10, 8)).save(tmp_path / "images" / key)
    write_pictures(LabelStore(folder), ImageFolder(tmp_path / "images"), tmp_path / "out" / "x.html", count=2)
    page = (tmp_path / "out" / "x.html").read_text()
    shown = re.findall(r"<figcaption><b>([^<]*)</b>, class (\w+), certainty (\d+)%", page)
    certain_ones = [("ape/1.png", "ape", "100"), ("cat/1.png", "cat", "75")]
    uncertain_ones = [("bee/2.png", "bee", "25"), ("bee/1.png", "bee", "50")]
    assert shown == [*certain_ones, *uncertain_ones, ("cat/1.png", "cat", "75")]
    assert page.count("data:image/png;base64") == 5
    assert page.count("data:image/jpeg;base64") == 1
    assert re.findall(r"</i>([^<]*)</span>", page) == ["bee", "ape", "dog"]
    assert "4 labels; all of them were looked at. Right of each image its map:" in page
    assert page.count("dog: 75%") == 2, "the most probable class of the doubtful one"
    assert "http" not in page


def test_pictures_of_some_of_the_images(folder, tmp_path):
    (tmp_path / "images" / "ape").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "images" / "ape" / "1.png")
    write_pictures(LabelStore(folder), ImageFolder(tmp_path / "images"), tmp_path / "x.html")
    assert "4 labels; these are from 1. Right of each image" in (tmp_path / "x.html").read_text()


def test_pictures_of_other_images(folder, tmp_path):
    (tmp_path / "images" / "ape").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "images" / "ape" / "9.png")
    with pytest.raises(StoreError, match="none of the 1 images has a label"):
        write_pictures(LabelStore(folder), ImageFolder(tmp_path / "images"), tmp_path / "x.html")


def test_maps_lie_on_the_part_of_the_image_that_the_teacher_saw(tmp_path):
    (tmp_path / "images" / "ape").mkdir(parents=True)
    Image.new("RGB", (40, 10)).save(tmp_path / "images" / "ape" / "1.png")
    mask = from_mask(np.zeros((2, 2), int), num_classes=4)

    with LabelStoreWriter(tmp_path / "labels", manifest()) as writer:
        writer.add("ape/1.png", replace(mask, region=Box(0.375, 0, 0.625, 1)))
    output = tmp_path / "x.html"
    write_pictures(LabelStore(tmp_path / "labels"), ImageFolder(tmp_path / "images"), output, count=1)
    assert "ape: 100%" in output.read_text()
    assert "left: 37.500%; top: 0.000%; width: 25.000%; height: 100.000%" in output.read_text()


def test_suspects_are_ranked_by_the_quotient_of_their_own_and_the_best_class(tmp_path):
    """Planted errors among right classes that the teacher is unsure of; oracle: the mean of dense maps."""
    rng, wrong = np.random.default_rng(0), []
    num_classes, size = 12, (4, 4)
    names = tuple(f"class{i}" for i in range(num_classes))
    expected = {}
    with LabelStoreWriter(tmp_path, manifest(num_classes=num_classes, class_names=names, topk=3)) as writer:
        for i in range(300):
            seen, taken_for = rng.choice(num_classes, 2, replace=False)
            own = seen
            strength = np.full(num_classes, 0.1)
            strength[seen] = rng.uniform(0.5, 8)
            if i % 15 == 0:
                own = rng.choice([c for c in range(num_classes) if c not in (seen, taken_for)])
                wrong.append(f"{names[own]}/{i}.png")
            elif i % 2:
                strength[taken_for] = 3 * strength[seen]  # hard images: sure of another class, but not of that alone
            score_map = from_probabilities(rng.dirichlet(strength, size), 3)
            writer.add(f"{names[own]}/{i}.png", score_map)
            mean = score_map.dense().mean(axis=(0, 1))
            if mean.argmax() != own:
                expected[f"{names[own]}/{i}.png"] = mean[own] / mean.max()
    found = inspect_store(LabelStore(tmp_path), InspectConfig(num_suspects=20)).suspects
    assert [s.key for s in found] == sorted(expected, key=expected.__getitem__)[:20]
    assert np.mean([s.key in wrong for s in found]) >= 0.95  # .85 by the difference


def test_a_class_that_no_place_kept_has_its_even_share_and_ties_go_by_certainty(tmp_path):
    """Maps of one cell: (kept probabilities of classes 1, 2) of images of class 0, or with a little of class 0."""
    cells = {
        "sure": ([1], [1.0]),  # nothing is left for its own class, nor in the next two
        "less sure": ([1, 2], [0.6, 0.4]),
        "even less": ([1, 2, 3], [0.4, 0.3, 0.3]),
        "kept": ([1, 0], [0.9, 0.09]),  # a tenth of the best one's
        "left over": ([1], [0.7]),  # (.3 / 3) / .7: a seventh of it
    }
    with LabelStoreWriter(tmp_path, manifest(topk=3)) as writer:
        for name, (classes, probs) in reversed(cells.items()):
            score_map = from_top(np.array([[classes]]), np.array([[probs]]), num_classes=4)
            writer.add(f"ape/{name}", score_map)
    found = inspect_store(LabelStore(tmp_path)).suspects
    assert [s.key.split("/")[1] for s in found] == list(cells)


@pytest.mark.parametrize(
    ("class_names", "images", "why"),
    [
        (NAMES, None, r"keys \('in/ape/1.png'\) are none of its classes \(ape, bee, cat, ...\); name the images"),
        ((), None, r"keys \('in/ape/1.png'\) are no classes: these have no names; name the images"),
        (NAMES, ["ape/1.png", "bee/2.png"], r"keys are 'in/ape/1.png', theirs 'ape/1.png', 'bee/2.png'$"),
        (NAMES, ["in/ape/1.png", "out/ape/1.png"], r"classes \(ape, .*\) are not those of the images \(in, out\)"),
        ((), ["in/ape/1.png", "out/ape/1.png"], "about 4 classes without names, the images have 2"),
        (NAMES, ["list"], "the images have no classes"),
    ],
)
def test_why_agreement_is_missing(class_names, images, why, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with LabelStoreWriter("labels", manifest(class_names=class_names)) as writer:
        writer.add("in/ape/1.png", certain(0))
    options = []
    if images == ["list"]:
        images, options = [], ["--images", "list.txt"]
        (tmp_path / "list.txt").write_text("in/ape/1.png\n")
        (tmp_path / "in" / "ape").mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "in" / "ape" / "1.png")
    for key in images or ():
        (tmp_path / "images" / key).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "images" / key)
        options = ["--images", "images"]
    assert main(["inspect", "labels", *options]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("agreement")]
    assert re.search(f"unknown: .*{why}", line)


def test_the_order_of_classes_without_names_is_stated_as_it_is_taken(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with LabelStoreWriter("labels", manifest(class_names=())) as writer:
        writer.add("bee/1.png", certain(1))
    for name in NAMES:
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "images" / name / "1.png")
    assert main(["inspect", "labels", "--images", "images"]) == 0
    shown = capsys.readouterr()
    assert "are the images' in sorted order: 0 = ape, 1 = bee, 2 = cat" in shown.err
    assert "100.0% of the images' best class is their own" in shown.out


def test_wordnets_words_stand_beside_its_ids_and_lines_stay_short(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = ("n01440764", "n01443537", "n02123045", "mine")
    targets = [-1] * 900 + [place % 4 for place in range(100)]
    member = {"name": "/very/long" * 30, "weights": "blake2b:0"}
    teacher = {"members": [member] * 9, "flip": True, "class_map": {"targets": targets, "nowhere": "renormalise"}}
    with LabelStoreWriter("labels", manifest(class_names=names, teacher=teacher)) as writer:
        writer.add("n01440764/1.png", certain(1, 0.75))
        writer.add("mine/" + "deep/" * 1000 + "1.png", certain(2, 0.75))
    for key in ("n01440764/1.png",):
        (tmp_path / "images" / key).parent.mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "images" / key)
    assert main(["inspect", "labels"]) == 0
    shown = capsys.readouterr().out
    assert "n01440764 (tench, Tinca tinca) has 0.0%, n01443537 (goldfish, Carassius auratus) 75.0%" in shown
    assert "class_map 100 of 1,000 classes to 4 (renormalise)" in shown
    assert max(map(len, shown.splitlines())) < 700
    assert main(["inspect", "labels", "--images", "images", "--pictures", "x.html"]) == 0
    assert "class n01440764 (tench, Tinca tinca)" in (tmp_path / "x.html").read_text()
    assert "of 1 labels, whose images' class is known" in capsys.readouterr().out


def test_classes_are_matched_by_name(folder, tmp_path):
    for key in ("bee/1.png", "cat/1.png"):  # without the first class, ids are others than the store's
        (tmp_path / "images" / key).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (10, 8)).save(tmp_path / "images" / key)
    class_of = class_finder(LabelStore(folder), ImageFolder(tmp_path / "images"))
    assert [class_of(key) for key in ("bee/1.png", "cat/1.png", "ape/1.png")] == [1, 2, None]


def test_keys_by_number(folder):
    with LabelStoreWriter(folder, manifest()) as writer:
        writer.add("dog/1.png", certain(3))
    store = LabelStore(folder)
    assert [store.key_at(i) for i in range(5)] == list(store.keys())


def test_figures_for_people(folder):
    figures = inspect_store(LabelStore(folder), InspectConfig(verify=True)).as_dict()
    text = as_text(figures | {"mask_agreement": 0.625})
    assert "4 labels (probabilities), top 2 of 4 classes; 0 images failed" in text
    assert "4 x 5 (3), 2 x 2 (1)" in text
    assert "75.0% of the images' best class is their own" in text
    assert "62.5% of the places' best class is what the masks show there" in text
    assert "cat/1.png: cat has 0.0%, dog 75.0%" in text
    assert "verified 4 labels, 0 broken" in text


def test_who_made_labels_fits_a_line(tmp_path):
    teachers = {"members": [{"name": "a"}, {"name": "b"}], "flip": True, "class_map": None}
    LabelStoreWriter(tmp_path, manifest(teacher=teachers, preprocessing={"size": 64, "crop_fraction": None}))
    text = as_text(inspect_store(LabelStore(tmp_path)).as_dict())
    assert re.search(r"^teacher +name a \+ name b; flip True$", text, re.MULTILINE)
    assert re.search(r"^preprocessing +size 64$", text, re.MULTILINE)


def test_failures_are_counted(tmp_path):
    LabelStoreWriter(tmp_path, manifest(failures=(Failure("x", "y"),)))
    found = inspect_store(LabelStore(tmp_path))
    assert found.num_failures == 1
    assert "1 image failed: manifest.json says why" in as_text(found.as_dict())


def test_failures_of_all_folders_count_but_not_those_that_another_labelled(folder, tmp_path):
    failures = (Failure("ape/1.png", "broken"), Failure("ape/9.png", "broken"))
    LabelStoreWriter(tmp_path / "more", manifest(failures=failures))
    assert inspect_store(LabelStore(folder, tmp_path / "more")).num_failures == 1
    assert inspect_store(LabelStore(tmp_path / "more", folder)).num_failures == 1


def test_maps_that_say_nothing_agree_with_no_class(tmp_path):
    nothing = from_mask(np.full((2, 2), 255), num_classes=4)
    with LabelStoreWriter(tmp_path / "labels", manifest()) as writer:
        writer.add("ape/1.png", nothing)
    found = inspect_store(LabelStore(tmp_path / "labels"))
    assert (found.class_agreement, found.place_agreement, found.suspects, found.empty) == (0, 0, (), 1)
    assert "100.0% of the places keep nothing" in as_text(found.as_dict())


def test_classes_beyond_those_of_a_store_are_unknown(tmp_path):
    with LabelStoreWriter(tmp_path / "labels", manifest(class_names=())) as writer:
        writer.add("f/1.png", certain(0))
    for name in "abcdef":
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "images" / name / "1.png")
    found = inspect_store(LabelStore(tmp_path / "labels"), source=open_images(tmp_path / "images"))
    assert found.class_agreement is None
