"""What importing the package costs, and that its public names are there."""

import importlib
import subprocess
import sys

import pytest

import tokenlabel


@pytest.mark.parametrize("name", tokenlabel.__all__)
def test_every_public_name_is_found(name):
    assert getattr(tokenlabel, name).__module__.startswith("tokenlabel.")


def test_functions_are_not_hidden_by_the_modules_that_hold_them():
    importlib.import_module("tokenlabel.alignment")
    importlib.import_module("tokenlabel.annotation")
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
        ("import tokenlabel.train", ["matplotlib"]),
    ],
)
def test_an_import_takes_nothing_heavy_with_it(statement, unwanted):
    code = f"{statement}\nimport sys\nprint(sorted(set({unwanted}) & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
