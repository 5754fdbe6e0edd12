from __future__ import annotations

import struct
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.ops import roi_align

from tokenlabel.cli import main
from tokenlabel.core.align import align
from tokenlabel.core.batch import collate_score_maps
from tokenlabel.core.config import LogitsMode
from tokenlabel.core.geometry import Box, View, stack_views
from tokenlabel.core.scores import Kind, ScoreMap, from_probabilities, from_top
from tokenlabel.labels.options import ImportConfig, PublishedLayout
from tokenlabel.labels.published import import_labels, label_path, read_label_file
from tokenlabel.labels.store import LabelStore
from tokenlabel.runtime.errors import StoreError

NUM_CLASSES = 30


def draw_file(seed: int, *, height=6, width=6, topk=5, num_classes=NUM_CLASSES) -> torch.Tensor:
    """Return the content of a label file as the toolboxes write it."""
    rng = np.random.default_rng(seed)
    palette = rng.permutation(num_classes)[:9]
    ids = palette[rng.random((height, width, len(palette))).argsort(axis=2)[..., :topk]]
    logits = -np.sort(-rng.normal(3, 4, size=(height, width, topk)), axis=2)
    return torch.from_numpy(np.stack([logits, ids]).transpose(0, 3, 1, 2)).half()


def as_map(content: torch.Tensor, region: Box | None = None) -> ScoreMap:
    logits, ids = content.float().permute(0, 2, 3, 1).numpy()
    return from_top(ids.astype(np.int64), logits, num_classes=NUM_CLASSES, kind=Kind.LOGITS, region=region or Box())


def spread(content: torch.Tensor, num_classes: int = NUM_CLASSES) -> torch.Tensor:
    """Return the dense map of logits [C, H, W], 0 where a class was not kept."""
    logits, ids = content.double()
    return torch.zeros(num_classes, *logits.shape[1:], dtype=torch.float64).scatter_(0, ids.long(), logits)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    grid=st.sampled_from([(1, 1), (3, 3), (14, 14), (4, 7)]),
    sizes=st.lists(st.sampled_from([(6, 6), (6, 9), (18, 18), (15, 15)]), min_size=1, max_size=3),
    mirrored=st.booleans(),
    upside_down=st.booleans(),
)
def test_the_published_mode_equals_the_dense_computation(seed, grid, sizes, mirrored, upside_down):
    """Zero-filled maps of all classes, roi_align with x and y in the right order, softmax of every token."""
    rng = np.random.default_rng(seed)
    files, boxes, views = [], [], []
    for i, (height, width) in enumerate(sizes):
        files.append(draw_file(seed + i, height=height, width=width))
        box_width, box_height = rng.uniform(0.2, 1, 2)
        left, top = rng.uniform(0, 1 - box_width), rng.uniform(0, 1 - box_height)
        boxes.append(Box(left, top, left + box_width, top + box_height))
        view = View.crop(boxes[-1])
        view = view.then(View.flip_horizontal()) if mirrored else view
        views.append(view.then(View.flip_vertical()) if upside_down else view)
    targets = align(
        collate_score_maps([as_map(content) for content in files]),
        torch.from_numpy(stack_views(views)),
        grid,
        logits=LogitsMode.PUBLISHED,
    )
    for i, (content, box) in enumerate(zip(files, boxes, strict=True)):
        height, width = content.shape[2:]
        corners = [box.left * width, box.top * height, box.right * width, box.bottom * height]
        rois = torch.tensor([[0.0, *(corner - 0.5 for corner in corners)]], dtype=torch.float64)
        pooled = roi_align(spread(content)[None], rois, grid, aligned=False)[0]
        pooled = pooled.flip(2) if mirrored else pooled
        pooled = pooled.flip(1) if upside_down else pooled
        expected = pooled.softmax(dim=0).flatten(1).T  # [N, C]
        found = targets.dense(NUM_CLASSES)[i].double()
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(targets.weight, torch.ones_like(targets.weight))


def test_the_top_right_crop_gets_the_top_right_label():
    """What the published toolboxes got wrong: a box whose x and y changed places."""
    logits = torch.full((1, 8, 8), 12.0)
    ids = torch.zeros(1, 8, 8)
    ids[:, :4, 4:] = 7  # top right
    ids[:, 4:, :4] = 9  # bottom left
    maps = collate_score_maps([as_map(torch.stack([logits, ids]))])
    view = torch.from_numpy(stack_views([View.crop(Box(0.5, 0, 1, 0.5))]))
    for mode in LogitsMode:
        assert align(maps, view, (2, 2), logits=mode).dense(NUM_CLASSES).argmax(dim=2).tolist() == [[7] * 4]


def test_tokens_outside_of_what_the_teacher_saw_carry_no_loss():
    content = draw_file(0)
    maps = collate_score_maps([as_map(content, Box(0.25, 0, 0.75, 1))])
    views = torch.from_numpy(stack_views([View.identity()]))
    targets = align(maps, views, (1, 8), logits=LogitsMode.PUBLISHED)
    torch.testing.assert_close(targets.weight, torch.tensor([[0, 0, 1.0, 1, 1, 1, 0, 0]]))
    torch.testing.assert_close(targets.dense(NUM_CLASSES).sum(dim=2), targets.weight)
    mirrored = torch.from_numpy(stack_views([View.crop(Box(0, 0, 0.5, 1)).then(View.flip_horizontal())]))
    turned = align(maps, mirrored, (1, 4), logits=LogitsMode.PUBLISHED)
    torch.testing.assert_close(turned.weight, torch.tensor([[1.0, 1, 0, 0]]))


def test_the_published_mode_is_for_logits_and_for_crops_only():
    probabilities = from_probabilities(np.full((2, 2, 4), 0.25), 2)
    identity = torch.from_numpy(stack_views([View.identity()]))
    with pytest.raises(ValueError, match="for labels of logits"):
        align(collate_score_maps([probabilities]), identity, (1, 1), logits=LogitsMode.PUBLISHED)
    turned = torch.from_numpy(stack_views([View.rotation(10, img_size=(4, 4))]))
    with pytest.raises(ValueError, match="crops and flips only"):
        align(collate_score_maps([as_map(draw_file(0))]), turned, (1, 1), logits=LogitsMode.PUBLISHED)


@pytest.mark.parametrize("mode", [LogitsMode.ZERO, LogitsMode.KEPT])
def test_our_own_modes_make_probabilities_of_each_cell(mode):
    """With as many tokens as cells and one sample in the middle of each, a token's target is its cell's."""
    contents = [draw_file(1, height=4, width=6), draw_file(2, height=4, width=6, topk=3)]
    maps = collate_score_maps([as_map(content) for content in contents])
    views = torch.from_numpy(stack_views([View.identity()] * 2))
    targets = align(maps, views, (4, 6), samples=1, logits=mode)
    for i, content in enumerate(contents):
        expected = spread(content)
        if mode is LogitsMode.KEPT:
            kept = torch.zeros_like(expected).scatter_(0, content[1].long(), 1.0)
            expected = expected.masked_fill(kept == 0, -torch.inf)
        found = targets.dense(NUM_CLASSES)[i].double()
        torch.testing.assert_close(found, expected.softmax(dim=0).flatten(1).T, atol=1e-5, rtol=1e-4)


def test_one_sharp_logit_says_the_same_whatever_the_number_of_classes_in_kept_mode():
    content = torch.tensor([[[[8.0]]], [[[3.0]]]])
    maps = collate_score_maps([as_map(content)])
    views = torch.from_numpy(stack_views([View.identity()]))
    assert align(maps, views, (1, 1), logits=LogitsMode.KEPT).dense(NUM_CLASSES)[0, 0, 3] == 1
    expected = np.exp(8) / (np.exp(8) + NUM_CLASSES - 1)
    found = align(maps, views, (1, 1), logits=LogitsMode.ZERO).dense(NUM_CLASSES)[0, 0, 3]
    assert float(found) == pytest.approx(expected, abs=1e-5)


# --- the files ---


def write_image(path, img_size=(4, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((img_size[1], img_size[0], 3), np.uint8)).save(path)


def write_file(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)


@pytest.fixture
def data(tmp_path):
    """Four images of two classes with label files."""
    for i, key in enumerate(["ape/1.png", "ape/2.x.png", "bee/1.png", "bee/3.png"]):
        write_image(tmp_path / "images" / key, (20, 10))
        write_file(label_path(tmp_path / "files", key), draw(i))
    return tmp_path


def draw(i):
    return draw_file(i, num_classes=2, topk=2, width=9)


def run(data, **changes):
    config = ImportConfig(**{"num_classes": 2, **changes})
    return import_labels(data / "files", data / "labels", data / "images", config)


def test_files_are_matched_with_images(data):
    (data / "files" / "bee" / "3.pt").unlink()
    done = run(data)
    assert (done.num_images, done.num_present, done.num_imported) == (4, 0, 3)
    assert [(f.key, "no such label file" in f.reason) for f in done.failures] == [("bee/3.png", True)]
    store = LabelStore(data / "labels")
    assert store.manifest.failures == done.failures
    assert store.manifest.kind is Kind.LOGITS
    assert store.manifest.class_names == ("ape", "bee")
    for i, key in enumerate(["ape/1.png", "ape/2.x.png", "bee/1.png"]):
        logits, ids = draw(i).float().permute(0, 2, 3, 1).numpy()
        assert np.array_equal(store[key].probs, logits)
        assert np.array_equal(store[key].class_ids, ids)
    write_file(data / "files" / "bee" / "3.pt", draw(3))
    again = run(data)
    assert (again.num_present, again.num_imported, again.failures) == (3, 1, ())


def test_a_first_file_that_is_broken_or_keeps_fewer_classes_costs_only_itself(data):
    (data / "files" / "ape" / "1.pt").write_bytes(b"cut short")
    done = run(data)
    assert (done.num_imported, [failure.key for failure in done.failures]) == (3, ["ape/1.png"])
    for path in (data / "files").rglob("*.pt"):
        path.write_bytes(b"cut short")
    with pytest.raises(StoreError, match="no label file can be read"):
        run(data)


def test_an_image_that_is_broken_or_claims_to_be_huge_costs_only_itself(data):
    huge = data / "images" / "ape" / "1.png"
    pixels = bytearray(huge.read_bytes())
    pixels[16:24] = struct.pack(">II", 30_000, 30_000)  # width and height, and the checksum of the header
    pixels[29:33] = struct.pack(">I", crc32(pixels[12:29]))
    huge.write_bytes(pixels)
    (data / "images" / "bee" / "1.png").write_bytes(b"no image")
    done = run(data, region="center:80")
    assert done.num_imported == 2
    reasons = {failure.key: failure.reason for failure in done.failures}
    assert "ape/1.png: does not decode as an image (Image size (900000000 pixels)" in reasons["ape/1.png"]
    assert reasons["bee/1.png"] == "bee/1.png: does not decode as an image (it is of no known format)"


def test_images_whose_names_collide_get_no_label(data):
    write_image(data / "images" / "ape" / "2.y.png")
    done = run(data)
    assert {failure.key for failure in done.failures} == {"ape/2.x.png", "ape/2.y.png"}
    assert "equal up to the first dot" in done.failures[0].reason


def test_only_the_class_folder_and_the_stem_count(tmp_path):
    assert label_path(tmp_path, "train/n01/n01_7.a.JPEG") == tmp_path / "n01" / "n01_7.pt"


def test_layout_and_region(data):
    run(data, layout=PublishedLayout.WH, region="center:80")
    score_map = LabelStore(data / "labels")["ape/1.png"]
    logits, _ = draw(0).float().permute(0, 3, 2, 1).numpy()
    assert np.array_equal(score_map.probs, logits)
    region = score_map.region
    assert (region.left, region.right) == pytest.approx((0.3, 0.7))
    assert (region.top, region.bottom) == pytest.approx((0.1, 0.9))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.zeros(3, 2, 4, 4), r"expected a tensor \[2, K, H, W\]"),
        ({"a": 1}, "got dict"),
        (torch.stack([torch.zeros(1, 2, 2), torch.full((1, 2, 2), 2048.0)]), "names class 2048"),
        (torch.stack([torch.zeros(1, 2, 2), torch.full((1, 2, 2), 0.5)]), "should be class ids"),
        (torch.stack([torch.zeros(1, 2, 2), torch.full((1, 2, 2), -1.0)]), "should be class ids"),
        (torch.stack([torch.zeros(1, 2, 2), torch.full((1, 2, 2), torch.nan)]), "should be class ids"),
    ],
)
def test_broken_files_are_refused_by_name(tmp_path, content, message):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(StoreError, match=rf"x\.pt: .*{message}"):
        read_label_file(tmp_path / "x.pt", num_classes=5000)


def test_files_that_hold_code_or_nothing_are_refused(tmp_path):
    torch.save({"x": print}, tmp_path / "code.pt")
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04 not really")
    (tmp_path / "empty.pt").write_bytes(b"")
    for name in ("code", "cut", "empty", "missing"):
        with pytest.raises(StoreError, match=name):
            read_label_file(tmp_path / f"{name}.pt", num_classes=5)


def test_ids_and_logits_that_no_map_can_hold(tmp_path):
    torch.save(torch.stack([torch.zeros(1, 2, 2), torch.full((1, 2, 2), 7.0)]), tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt: class ids run from 7 to 7, expected 0 to 4"):
        read_label_file(tmp_path / "x.pt", num_classes=5)
    torch.save(torch.stack([torch.full((1, 2, 2), torch.inf), torch.zeros(1, 2, 2)]), tmp_path / "y.pt")
    with pytest.raises(ValueError, match=r"y\.pt: 4 of 4 scores are not finite"):
        read_label_file(tmp_path / "y.pt", num_classes=5)
    torch.save(torch.stack([torch.ones(2, 2, 2), torch.zeros(2, 2, 2)]), tmp_path / "z.pt")
    with pytest.raises(ValueError, match=r"z\.pt: a cell names the same class twice"):
        read_label_file(tmp_path / "z.pt", num_classes=5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"region": "centre"}, "--region centre: expected full, or center:PCT"),
        ({"region": "center:120"}, "--region center:120"),
    ],
)
def test_options_that_fit_nothing(data, changes, message):
    with pytest.raises(StoreError, match=message):
        run(data, **changes)


def import_folder(folders: dict[str, int], num_classes: int = 1000) -> int:
    """Import, by the command line, a file for an image of each class folder, whose maps say the given class."""
    for name, class_id in folders.items():
        write_image(Path("images", name, "1.png"))
        logits, ids = torch.full((2, 3, 3), 9.0), torch.tensor([class_id, (class_id + 1) % num_classes])
        logits[1] = 2
        write_file(Path("files", name, "1.pt"), torch.stack([logits, ids[:, None, None].expand(2, 3, 3)]).half())
    arguments = ["import-labels", "files", "labels", "--images", "images", "--num-classes", str(num_classes)]
    return main(arguments)


def test_a_folder_of_some_of_imagenets_classes(tmp_path, monkeypatch, capsys):
    """WordNet ids say which of the thousand they are."""
    monkeypatch.chdir(tmp_path)
    assert import_folder({"n01443537": 1, "n15075141": 999}) == 0
    assert "the best class of 100% of 2 maps looked at is their image's\n" in capsys.readouterr().err
    store = LabelStore("labels")
    assert (store.manifest.num_classes, store.manifest.class_names[1]) == (1000, "n01443537")
    assert store["n15075141/1.png"].class_ids[0, 0, 0] == 999
    assert main(["inspect", "labels"]) == 0
    assert "100.0% of the images' best class is their own" in capsys.readouterr().out
    assert import_folder({"n01443537": 1, "n15075141": 999, "n01440764": 0}) == 0, "another class joins"
    assert "1 labels imported, 2 had been" in capsys.readouterr().out


def test_class_folders_that_are_numbers_are_the_ids(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert import_folder({"2": 2, "010": 10, "7": 7}, 11) == 0
    shown = capsys.readouterr().err
    assert "called by numbers (010, 2, 7) are taken for the files' of these ids" in shown
    assert "the best class of 100% of 3 maps" in shown
    assert LabelStore("labels").manifest.class_names == ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "010")


def test_names_that_do_not_say_which_classes_they_are(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert import_folder({"ape": 1, "bee": 2}) == 0
    assert "2 of the files' 1,000 classes (ape, bee), and nothing says which" in capsys.readouterr().err
    assert LabelStore("labels").manifest.class_names == ()
    assert LabelStore("labels")["bee/1.png"].class_ids[0, 0, 0] == 2


def test_an_order_that_is_a_guess_is_stated_and_held_against_the_maps(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert import_folder({"ape": 1, "bee": 2, "cat": 3, "dog": 0}, 4) == 0
    shown = capsys.readouterr().err
    assert "taken to be those of the images, in order: 0 is 'ape', 1 is 'bee', 2 is 'cat', ..." in shown
    assert "the best class of 0% of 4 maps looked at is their image's: perhaps these are other images, or" in shown


def test_maps_are_held_against_the_classes_that_are_known(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert import_folder({"2": 2, "0": 0, "1": 1}, 3) == 0
    capsys.readouterr()
    Path("some.csv").write_text("path,label\nimages/0/1.png,0\nimages/1/1.png,1\nimages/2/1.png,\n")
    assert main(["import-labels", "files", "others", "--images", "some.csv", "--num-classes", "3"]) == 0
    assert "the best class of 100% of 2 maps looked at" in capsys.readouterr().err


def test_no_files_at_all(data):
    with pytest.raises(StoreError, match=r"no label file of any image; expected, for example, .*ape/1\.pt"):
        import_labels(data, data / "labels", data / "images", ImportConfig(num_classes=2))
    run(data)
    with pytest.raises(StoreError, match=r"preprocessing\.layout"):
        run(data, layout=PublishedLayout.WH)


def test_kept_logits_far_below_0_are_a_distribution_all_the_same():
    content = torch.stack([torch.full((2, 1, 1), -300.0), torch.tensor([3.0, 5.0])[:, None, None]])
    maps = collate_score_maps([as_map(content)])
    views = torch.from_numpy(stack_views([View.identity()]))
    found = align(maps, views, (1, 1), logits=LogitsMode.KEPT).dense(NUM_CLASSES)[0, 0]
    assert (float(found[3]), float(found[5])) == (0.5, 0.5)
