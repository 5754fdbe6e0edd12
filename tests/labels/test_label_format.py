"""The format of label files as docs/labels.md describes it: the program in that page reads what stores hold."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tokenlabel.core.geometry import Box
from tokenlabel.core.scores import Kind, ScoreMap, from_probabilities, from_top
from tokenlabel.labels.encoding import Encoding
from tokenlabel.labels.manifest import Manifest
from tokenlabel.labels.shards import Fingerprint
from tokenlabel.labels.store import LabelStore
from tokenlabel.labels.writer import LabelStoreWriter

NUM_CLASSES = 700
REGION = Box(0.125, 0.0, 0.875, 1.0)


@pytest.fixture(scope="module")
def program() -> dict[str, Any]:
    """The names that the program in the page defines."""
    page = (Path(__file__).parents[2] / "docs" / "labels.md").read_text(encoding="utf-8")
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "read_record" in block)
    assert "tokenlabel" not in code
    names: dict[str, Any] = {}
    exec(compile(code, "docs/labels.md", "exec"), names)
    return names


def some_maps(kind: Kind) -> dict[str, ScoreMap]:
    """Maps of several sizes and certainties, one of more than 256 classes, one of a part of its image."""
    rng = np.random.default_rng(0)
    if kind is Kind.LOGITS:
        ids = rng.permuted(np.tile(np.arange(NUM_CLASSES), (3, 4, 1)), axis=2)[..., :5]
        logits = rng.normal(scale=4, size=ids.shape).astype(np.float16)
        return {"a/logits.jpg": from_top(ids, logits, num_classes=NUM_CLASSES, region=REGION, kind=kind)}
    shapes = {"a/flat.jpg": (5, 3, 1.0), "b/sharp ü.jpg": (2, 7, 0.01), "b/many.jpg": (16, 16, 0.2)}
    maps = {}
    for key, (height, width, spread) in shapes.items():
        probs = rng.dirichlet(np.full(NUM_CLASSES, spread / 10), size=(height, width))
        maps[key] = from_probabilities(probs, 5, region=REGION if "flat" in key else Box())
    assert len(maps["b/many.jpg"].palette) > 256
    return maps


@pytest.mark.parametrize(
    ("encoding", "kind"), [*((encoding, Kind.PROBABILITIES) for encoding in Encoding), (Encoding.RAW, Kind.LOGITS)]
)
def test_the_page_says_all_that_a_reader_needs(program, tmp_path, encoding, kind):
    manifest = Manifest(num_classes=NUM_CLASSES, topk=5, kind=kind, encoding=encoding)
    generation = 0 if kind is Kind.LOGITS else 7
    images = (
        {} if kind is Kind.LOGITS else {"a/flat.jpg": Fingerprint(1_700_000_000_123_456_789, 1 << 31, 3_000_000_000)}
    )
    with LabelStoreWriter(tmp_path, manifest, generation=generation, again="list") as writer:
        for key, score_map in some_maps(kind).items():
            writer.add(key, score_map, images.get(key, Fingerprint()))
    (path,) = tmp_path.glob("*.safetensors")
    store, num_read = LabelStore(tmp_path), 0
    for key, of_generation, record, image in program["read_label_file"](path):
        assert of_generation == store.generation(key) == generation
        assert image == store.image(key) == images.get(key, Fingerprint())
        palette, planes, region = program["read_record"](record)
        ours = store[key]
        assert np.array_equal(palette, ours.palette)
        assert Box(*region) == ours.region
        rows, columns = np.ogrid[: ours.codes.shape[0], : ours.codes.shape[1]]
        expected = np.zeros((len(ours.palette), *ours.codes.shape[:2]))
        np.add.at(expected, (ours.codes, rows[..., None], columns[..., None]), ours.probs)
        np.testing.assert_allclose(planes, expected, atol=1e-7)
        num_read += 1
    assert num_read == len(store) == len(some_maps(kind))
