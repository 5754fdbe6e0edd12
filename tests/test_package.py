"""What importing the package costs, and that its public names are there."""

import importlib
import subprocess
import sys

import numpy as np
import pytest

import tokenlabel
from tokenlabel.labels.store import LabelStoreWriter, Manifest
from tokenlabel.method.scores import from_mask


@pytest.mark.parametrize("name", tokenlabel.__all__)
def test_every_public_name_is_found(name):
    assert getattr(tokenlabel, name).__module__.startswith("tokenlabel.")


def test_functions_are_not_hidden_by_the_modules_that_hold_them():
    importlib.import_module("tokenlabel.method.alignment")
    importlib.import_module("tokenlabel.teachers.annotation")
    assert callable(tokenlabel.align)
    assert callable(tokenlabel.annotate)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="tokenlable"):
        tokenlabel.tokenlable  # noqa: B018


@pytest.mark.parametrize(
    ("statement", "unwanted"),
    [
        ("import tokenlabel", ["torch", "timm", "matplotlib", "numpy"]),
        ("from tokenlabel import LabelStore, ScoreMap", ["torch", "timm", "matplotlib"]),
        ("import tokenlabel.cli", ["torch", "timm", "matplotlib", "jsonargparse"]),
        ("import tokenlabel.classification.task", ["matplotlib"]),
    ],
)
def test_an_import_takes_nothing_heavy_with_it(statement, unwanted):
    code = f"{statement}\nimport sys\nprint(sorted(set({unwanted}) & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_label_store_is_inspected_without_torch(tmp_path):
    with LabelStoreWriter(tmp_path, Manifest(num_classes=2, topk=1)) as writer:
        writer.add("a/1.png", from_mask(np.array([[0, 1]]), num_classes=2))
    code = (
        f"from tokenlabel.cli import main; assert main(['inspect', {str(tmp_path)!r}]) == 0\n"
        "import sys; print({'torch', 'timm', 'matplotlib'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
