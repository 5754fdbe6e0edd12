"""Runs the example in the docstring of each public name in the current folder, without the type checker of the tests.

Prints {name: what went wrong, or ""} as one line of JSON.
"""

import doctest
import inspect
import io
import json
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import tokenlabel as tl


def write_what_examples_find() -> None:
    """Write images, masks and labels of two classes, as docs/api.md says, and weights of a network."""
    rng = np.random.default_rng(0)
    for i in range(8):
        for kind, shape, values in (("images", (40, 48, 3), 256), ("masks", (40, 48), 2)):
            path = Path(kind, ("ant", "bee")[i % 2], f"{i}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, values, shape, np.uint8)).save(path)
    tl.annotate("images", "labels", tl.AnnotateConfig(teacher="masks:masks", size=8))
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit").state_dict(), "test_vit.safetensors")


def outcome(name: str) -> str:
    """Return what went wrong with an example, "" if nothing did."""
    names = {"tl": tl, "np": np, "torch": torch}
    text = inspect.getdoc(getattr(tl, name)) or ""
    example = doctest.DocTestParser().get_doctest(text, names, name, None, 0)
    if not example.examples:
        return "has no example"
    said = io.StringIO()
    doctest.DocTestRunner().run(example, out=said.write)
    return said.getvalue()


if __name__ == "__main__":
    write_what_examples_find()
    print(json.dumps({name: outcome(name) for name in tl.__all__}))
