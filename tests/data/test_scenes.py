import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tokenlabel.data.scenes import BACKGROUND, NUM_CLASSES, _load_digits, draw_scene, write_scenes
from tokenlabel.runtime.errors import DataError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes") / "deep" / "data"
    write_scenes(root, num_train=60, num_val=20, seed=3)
    return root


def read(path):
    with Image.open(path) as image:
        return np.asarray(image), image.mode


def contents(root):
    return {path.relative_to(root): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_every_scene_lies_in_its_class_folder_with_a_mask_of_the_same_name(root):
    for split, num_scenes in (("train", 60), ("val", 20)):
        images = sorted((root / split).glob("*/*.png"))
        masks = sorted((root / "masks" / split).glob("*/*.png"))
        assert len(images) == num_scenes
        assert [p.relative_to(root / split) for p in images] == [p.relative_to(root / "masks" / split) for p in masks]
        per_class = [len(list((root / split / str(c)).iterdir())) for c in range(NUM_CLASSES)]
        assert per_class == [num_scenes // NUM_CLASSES] * NUM_CLASSES


def test_scenes_are_rgb_and_masks_name_the_class_of_four_to_six_visible_digits(root):
    for path in sorted((root / "train").glob("*/*.png")):
        pixels, mode = read(path)
        mask, mask_mode = read(root / "masks" / path.relative_to(root))
        assert (pixels.shape, pixels.dtype, mode) == ((48, 48, 3), np.uint8, "RGB")
        assert (mask.shape, mask.dtype, mask_mode) == ((48, 48), np.uint8, "L")
        present = set(np.unique(mask)) - {BACKGROUND}
        assert int(path.parent.name) in present
        assert max(present) < NUM_CLASSES
        assert 0.05 < (mask != BACKGROUND).mean() < 0.5


def test_the_largest_digit_names_the_class_and_is_clearly_the_largest():
    block = [[Image.new("L", (8, 8), 255)]] * NUM_CLASSES
    for seed in range(20):
        class_id = seed % NUM_CLASSES
        _, mask = draw_scene(block, class_id, np.random.default_rng(seed))
        sides = {c: side_of_largest_square(mask == c) for c in set(np.unique(mask)) - {BACKGROUND}}
        own = sides.pop(class_id)
        assert own >= 1.15 * max(sides.values(), default=0)


def side_of_largest_square(inside):
    side = 1
    while np.lib.stride_tricks.sliding_window_view(inside, (side + 1, side + 1)).all(axis=(2, 3)).any():
        side += 1
    return side


def test_digits_stand_out_from_their_background():
    digits = _load_digits(0)[0]
    for seed in range(10):
        pixels, mask = draw_scene(digits, 3, np.random.default_rng(seed))
        inside = pixels[mask == 3].mean(axis=0)
        outside = pixels[mask == BACKGROUND].mean(axis=0)
        assert np.linalg.norm(inside - outside) > 20


def test_the_digits_of_val_scenes_never_appear_in_train_scenes():
    train, val = _load_digits(7)
    assert sum(map(len, train)) + sum(map(len, val)) == 1797
    for of_train, of_val in zip(train, val, strict=True):
        assert len(of_val) >= 50
        seen = {(image.size, image.tobytes()) for image in of_train}
        twins = [image for image in of_val if (image.size, image.tobytes()) in seen]
        assert not twins


def test_the_same_parameters_make_the_same_files_and_another_seed_others(root, tmp_path):
    write_scenes(tmp_path / "again", num_train=60, num_val=20, seed=3)
    assert contents(tmp_path / "again") == contents(root)
    write_scenes(tmp_path / "other", num_train=60, num_val=20, seed=4)
    other = contents(tmp_path / "other")
    images = [path for path in contents(root) if path.suffix == ".png"]
    assert all(other[path] != contents(root)[path] for path in images[:5])


def test_more_scenes_begin_with_the_same_ones(root, tmp_path):
    write_scenes(tmp_path / "fewer", num_train=20, num_val=10, seed=3)
    more = contents(root)
    assert all(more[path] == data for path, data in contents(tmp_path / "fewer").items() if path.suffix == ".png")


def test_writing_the_same_scenes_again_changes_nothing(root):
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    write_scenes(root, num_train=60, num_val=20, seed=3)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_other_parameters_over_existing_scenes_are_refused(root):
    before = contents(root)
    with pytest.raises(DataError, match=r"'seed': 3.*asked for.*'seed': 5"):
        write_scenes(root, num_train=60, num_val=20, seed=5)
    assert contents(root) == before


def test_a_folder_with_other_data_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("words")
    with pytest.raises(DataError, match="expected a new folder"):
        write_scenes(tmp_path, num_train=10, num_val=10, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_an_empty_folder_is_filled_and_the_parameters_are_written_down(tmp_path):
    (tmp_path / "data").mkdir()
    write_scenes(tmp_path / "data", num_train=10, num_val=10, seed=0)
    description = json.loads((tmp_path / "data" / "scenes.json").read_text())
    assert {key: description[key] for key in ("num_train", "num_val", "seed")} == {
        "num_train": 10,
        "num_val": 10,
        "seed": 0,
    }


def test_an_interrupted_run_leaves_nothing_behind(tmp_path, monkeypatch):
    def stop(self, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", stop)
    with pytest.raises(KeyboardInterrupt):
        write_scenes(tmp_path / "data", num_train=10, num_val=10, seed=0)
    assert list(tmp_path.iterdir()) == []


def test_without_scikit_learn_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'tokenlabel\[demo\]'"):
        write_scenes(tmp_path / "data", num_train=10, num_val=10, seed=0)
    assert list(tmp_path.iterdir()) == []
