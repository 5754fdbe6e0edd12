"""A slice of the tests runs as people run: plain Python, without the type checker that the other tests run under."""

import inspect
import json
import subprocess
import sys

import pytest
import users_calls

HELPERS = ("refuses", "data", "labels", "dataset", "batch_of_logits", "epoch", "lines_of_epochs")
CASES = [
    name
    for name, value in vars(users_calls).items()
    if inspect.isfunction(value) and value.__module__ == users_calls.__name__ and name not in HELPERS
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    words = [sys.executable, users_calls.__file__, *CASES]
    done = subprocess.run(words, cwd=tmp_path_factory.mktemp("plain"), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CASES)
def test_what_users_call(name, outcomes):
    assert outcomes[name] is None, outcomes[name]
