"""The examples in the docstrings of the public names run, and docs/api.md is made from these docstrings."""

import json
import subprocess
import sys
from pathlib import Path

import api_examples
import pytest

import tokenlabel as tl

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    words = [sys.executable, api_examples.__file__]
    folder = tmp_path_factory.mktemp("examples")
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", tl.__all__)
def test_the_example_of_a_public_name_runs(name, outcomes):
    assert outcomes[name] == ""


def test_the_page_is_what_the_docstrings_say():
    words = [sys.executable, "-m", "release.api", "--check"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
