"""COCO's files: masks of instances and segments against loops and pycocotools, and what is refused, in one line."""

import itertools
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tokenlabel.data.masks import CROWD, CocoMasks, instance_mask, painted, run_lengths
from tokenlabel.runtime.errors import DataError

pycoco: Any = pycocotools.mask  # its stubs know of no lists of polygons
CATEGORIES = [{"id": 18, "name": "dog"}, {"id": 3, "name": "car"}]  # by their ids: car is 0, dog 1
NOTHING = 255


def square(height: int, width: int, box: tuple[int, int, int, int]) -> np.ndarray:
    """Return a mask of a box (top, left, bottom, right)."""
    mask = np.zeros((height, width), np.uint8, order="F")
    mask[box[0] : box[2], box[1] : box[3]] = 1
    return mask


def compressed(mask: np.ndarray) -> dict[str, Any]:
    """Return a mask as COCO's compressed run lengths."""
    runs = pycoco.encode(np.asfortranarray(mask))
    return {"size": [int(side) for side in runs["size"]], "counts": runs["counts"].decode()}


def uncompressed(mask: np.ndarray) -> dict[str, Any]:
    """Return a mask as lists of run lengths, by going through its pixels column by column."""
    counts, last = [0], 0
    for pixel in mask.T.ravel():
        if pixel != last:
            counts.append(0)
            last = pixel
        counts[-1] += 1
    return {"size": list(mask.shape), "counts": counts}


def write_coco(path: Path, annotations: list[dict[str, Any]], **changes: Any) -> Path:
    """Write a file about the images a/1.jpg and a/2.jpg of 5 x 6 pixels (height x width)."""
    images = [{"id": n, "file_name": f"a/{n}.jpg", "height": 5, "width": 6} for n in (1, 2)]
    content = {"images": images, "annotations": annotations, "categories": CATEGORIES, **changes}
    path.write_text(json.dumps(content))
    return path


def instance(number: int, segmentation: Any, category: int = 3, **more: Any) -> dict[str, Any]:
    return {"id": number, "image_id": 1, "category_id": category, "segmentation": segmentation, **more}


masks = st.tuples(st.integers(1, 7), st.integers(1, 9), st.integers(0, 10_000), st.floats(0, 1)).map(
    lambda drawn: (np.random.default_rng(drawn[2]).random(drawn[:2]) < drawn[3]).astype(np.uint8)
)


@settings(max_examples=60)
@given(masks)
def test_run_lengths_compressed_or_not_give_the_mask_again(mask: np.ndarray) -> None:
    as_list, as_text = uncompressed(mask), compressed(mask)
    assert run_lengths(as_text["counts"]) == as_list["counts"]
    for runs in (as_list, as_text):
        assert (instance_mask(runs, mask.shape) == mask).all()


def test_long_runs_and_shrinking_ones_survive_compression() -> None:
    mask = square(700, 600, (3, 2, 690, 9))
    mask[100, 300:] = 1
    assert (instance_mask(compressed(mask), (700, 600)) == mask).all()


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in pycocotools
@settings(max_examples=40)
@given(
    st.lists(st.lists(st.floats(-2, 12), min_size=6, max_size=12), min_size=1, max_size=3),
    st.integers(1, 9),
    st.integers(1, 9),
)
def test_polygons_are_filled_as_pycocotools_fills_them(polygons: list[list[float]], height: int, width: int) -> None:
    polygons = [polygon[: len(polygon) // 2 * 2] for polygon in polygons]
    expected = np.zeros((height, width), bool)
    for runs in pycoco.frPyObjects(polygons, height, width):  # together they are one instance
        expected |= pycoco.decode(runs).astype(bool)
    assert (instance_mask(polygons, (height, width)) == expected).all()


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 999), st.sampled_from([0, 1, 2, CROWD])), max_size=6))
def test_the_smallest_piece_of_a_pixel_wins_and_crowds_lie_below(drawn: list[tuple[int, int]]) -> None:
    pieces = [(np.random.default_rng(seed).random((4, 5)) < 0.4, value) for seed, value in drawn]
    found = painted(pieces, (4, 5), unlabelled=NOTHING)
    for row, column in itertools.product(range(4), range(5)):
        best = (1_000, NOTHING)
        for piece, value in pieces:
            if piece[row, column] and value != CROWD and piece.sum() <= best[0]:
                best = (int(piece.sum()), value)
        is_crowd = any(piece[row, column] for piece, value in pieces if value == CROWD)
        assert found[row, column] == (CROWD if best[1] == NOTHING and is_crowd else best[1])


def test_a_file_of_instances(tmp_path: Path) -> None:
    dog, car, crowd = square(5, 6, (1, 1, 3, 3)), square(5, 6, (0, 0, 5, 4)), square(5, 6, (0, 3, 1, 6))
    path = write_coco(
        tmp_path / "instances.json",
        [
            instance(7, compressed(dog), 18),
            instance(8, [[0, 0, 4, 0, 4, 5, 0, 5]]),
            instance(9, uncompressed(crowd), iscrowd=1),
        ],
    )
    found = pickle.loads(pickle.dumps(CocoMasks(path)))
    assert found.class_names == ["car", "dog"]
    assert list(found.names) == ["a/1.jpg", "a/2.jpg"]
    expected = np.full((5, 6), NOTHING)
    expected[crowd > 0], expected[car > 0], expected[dog > 0] = CROWD, 0, 1
    assert found.read("a/1.jpg").tolist() == expected.tolist()
    assert (found.read("a/2.jpg") == NOTHING).all()  # an image that shows nothing


def write_segments(png: Path, numbers: Any) -> None:
    """Write the numbers of segments as COCO's panoptic PNGs hold them."""
    png.parent.mkdir(exist_ok=True)
    numbers = np.asarray(numbers)
    Image.fromarray(np.stack([numbers // 256**place % 256 for place in range(3)], 2).astype(np.uint8)).save(png)


def panoptic(path: Path, segments: list[dict[str, Any]]) -> CocoMasks:
    annotation = {"image_id": 1, "file_name": "1.png", "segments_info": segments}
    return CocoMasks(write_coco(path, [annotation]))


def test_a_panoptic_file(tmp_path: Path) -> None:
    write_segments(tmp_path / "panoptic/1.png", [[0, 7, 7], [70_000, 300, 7]])
    segments = [
        {"id": 7, "category_id": 18},
        {"id": 300, "category_id": 3, "iscrowd": 1},
        {"id": 70_000, "category_id": 3, "iscrowd": 0},
    ]
    found = panoptic(tmp_path / "panoptic.json", segments)
    assert list(found.names) == ["a/1.jpg"]  # the other image has no mask
    assert found.read("a/1.jpg").tolist() == [[NOTHING, 1, 1], [0, CROWD, 1]]
    with pytest.raises(DataError, match=r"1\.png: holds the segments 7, which .*panoptic\.json does not des"):
        panoptic(tmp_path / "panoptic.json", segments[1:]).read("a/1.jpg")
    (tmp_path / "panoptic/1.png").unlink()
    with pytest.raises(DataError, match=r"1\.png: the segments of .* cannot be read"):
        panoptic(tmp_path / "panoptic.json", segments).read("a/1.jpg")


def test_images_are_found_by_their_path_or_else_by_a_file_name_that_is_unique(tmp_path: Path) -> None:
    found = CocoMasks(write_coco(tmp_path / "i.json", []))
    assert found.names_of(["a/1.jpg", "3.jpg"]) == {"a/1.jpg": "a/1.jpg"}
    assert found.names_of(["b/c/1.jpg", "2.jpg"]) == {"b/c/1.jpg": "a/1.jpg", "2.jpg": "a/2.jpg"}
    assert found.names_of(["b/1.jpg", "c/1.jpg"]) == {}


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ({"size": [6, 5], "counts": [30]}, "is of 6 x 5 pixels (height x width), its image of 5 x 6"),
        ({"size": [5, 6], "counts": [20, 5]}, "has runs of 25 pixels, its image 5 x 6 = 30"),
        ({"size": [5, 6], "counts": [40, -10]}, "has runs of 30 pixels"),
        ({"size": [5, 6], "counts": compressed(square(9, 9, (1, 1, 3, 3)))["counts"]}, "has runs of 81 pixels"),
        ({"size": [5, 6], "counts": "1 2"}, "has counts with the character ' '"),
        ({"size": [5, 6], "counts": "o"}, "has counts that end in the middle of a number"),
        ([[1, 1, 2, 2]], "has a polygon of 4 numbers, expected x and y of 3 points or more"),
        ([], "has no segmentation; a box alone is no mask"),
        (None, "has no segmentation"),
    ],
)  # fmt: skip
def test_what_does_not_fit_its_image_is_refused_by_name(segmentation: Any, message: str, tmp_path: Path) -> None:
    found = CocoMasks(write_coco(tmp_path / "i.json", [instance(7, segmentation)]))
    with pytest.raises(DataError) as refused:
        found.read("a/1.jpg")
    assert f"i.json: annotation 7 of a/1.jpg {message}" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("annotations", "changes", "message"),
    [
        ([instance(7, [], 99)], {}, "annotation 7 of a/1.jpg has the category 99, which is none of its 2"),
        ([instance(7, []) | {"image_id": 5}], {}, "annotation 7 is of the image 5, which it does not list"),
        ([{"id": 7, "image_id": 1}], {}, "(lacks 'category_id')"),
        ([], {"images": [{"id": 1, "file_name": "a"}]}, "(lacks 'height')"),
        ([], {"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}, "two of its categories"),
        ([], {"categories": []}, "lists 0 categories"),
        ([], {"images": 3}, "is no COCO file; expected the lists images, annotations, categories"),
    ],
)
def test_files_that_are_not_whole_are_refused(
    annotations: list[dict[str, Any]], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError) as refused:
        CocoMasks(write_coco(tmp_path / "i.json", annotations, **changes))
    assert message in str(refused.value)
    assert str(refused.value).startswith(f"{tmp_path}/i.json: ")


def test_what_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "i.json").write_text("{")
    with pytest.raises(DataError, match=r"i\.json: cannot be read as JSON"):
        CocoMasks(tmp_path / "i.json")
    with pytest.raises(DataError, match=r"none\.json: cannot be read"):
        CocoMasks(tmp_path / "none.json")
