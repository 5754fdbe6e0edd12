"""What importing the package costs, and that its public names are there."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path

import numpy as np
import pytest

import tokenlabel
from tokenlabel.cli import VERBS
from tokenlabel.core.scores import from_mask
from tokenlabel.core.step import TrainStep
from tokenlabel.labels.manifest import Manifest
from tokenlabel.labels.writer import LabelStoreWriter
from tokenlabel.runtime.configuration import settings_of
from tokenlabel.training.recipe import Recipe

# The rooms of the package from the ground up, and which of those below them each may import (docs/architecture.md).
ROOMS = {
    "runtime": "",
    "core": "runtime",
    "drawing": "runtime",
    "data": "runtime core",
    "models": "runtime core data",
    "labels": "runtime core drawing data",
    "training": "runtime core drawing data models",
    "evaluation": "runtime core data models labels training",
    "segmentation": "runtime core drawing data models labels training evaluation",
    "teachers": "runtime core data models labels training evaluation segmentation",
    "classification": "runtime core drawing data models labels training evaluation teachers",
}
ON_TOP = {"__init__", "__main__", "cli", "demo", "push", "report"}
SOURCES = Path(tokenlabel.__file__).parent


@pytest.mark.parametrize("name", tokenlabel.__all__)
def test_every_public_name_is_found(name):
    assert getattr(tokenlabel, name).__module__.startswith("tokenlabel.")


def test_the_citation_is_of_this_version_and_types_are_shipped():
    citation = (Path(__file__).parents[1] / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {tokenlabel.__version__}\n" in citation
    assert (SOURCES / "py.typed").exists()


def test_every_enum_that_a_public_configuration_takes_is_public():
    taken = {
        setting.kind.__name__
        for config in (tokenlabel.AnnotateConfig, tokenlabel.AugmentConfig, tokenlabel.ErasingConfig, Recipe)
        for setting in settings_of(config)
        if isinstance(setting.kind, type) and issubclass(setting.kind, Enum)
    }
    assert taken
    assert taken <= set(tokenlabel.__all__)


def test_functions_are_not_hidden_by_the_modules_that_hold_them():
    importlib.import_module("tokenlabel.core.align")
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
        ("import tokenlabel.cli", ["torch", "timm", "matplotlib"]),
        ("import tokenlabel.classification.task", ["matplotlib"]),
    ],
)
def test_an_import_takes_nothing_heavy_with_it(statement, unwanted):
    code = f"{statement}\nimport sys\nprint(sorted(set({unwanted}) & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_takes_nothing_heavy_with_it():
    verbs = [*sorted(VERBS.keys() - {"segment"}), "segment train", "segment eval", "segment predict"]
    code = (
        "import sys; from contextlib import suppress; from tokenlabel.cli import main\n"
        f"for verb in {verbs}:\n"
        "    with suppress(SystemExit): main([*verb.split(), '--help'])\n"
        "    if heavy := {'torch', 'timm', 'matplotlib'} & sys.modules.keys(): sys.exit(f'{verb} {heavy}')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_label_store_is_inspected_without_torch(tmp_path):
    with LabelStoreWriter(tmp_path, Manifest(num_classes=2, topk=1)) as writer:
        writer.add("a/1.png", from_mask(np.array([[0, 1]]), num_classes=2))
    code = (
        f"from tokenlabel.cli import main; assert main(['inspect', {str(tmp_path)!r}]) == 0\n"
        "import sys; print({'torch', 'timm', 'matplotlib'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_rooms_import_only_the_rooms_below_them():
    assert misplaced(SOURCES, ROOMS) == []


def test_the_page_shows_the_rooms_and_none_before_one_that_it_imports():
    page = Path(__file__).parents[1] / "docs" / "architecture.md"
    rooms = re.findall(r"^\| `(\w+)/` \|", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert rooms == list(ROOMS)
    assert all(rooms.index(below) < rooms.index(room) for room in rooms for below in ROOMS[room].split())


def test_every_module_is_in_a_room_or_on_top():
    assert {path.stem for path in SOURCES.glob("*.py")} == ON_TOP
    assert {path.parent.name for path in SOURCES.glob("*/*.py")} == ROOMS.keys()


def test_no_room_hides_a_public_name():
    assert ROOMS.keys().isdisjoint(tokenlabel.__all__)


@pytest.mark.parametrize(
    "statement",
    [
        "from tokenlabel.upper.windows import open_window",
        "from tokenlabel.upper import windows",
        "from tokenlabel import upper",
        "import tokenlabel.upper.windows",
        "def late():\n    from tokenlabel.upper import windows",
        "from tokenlabel.cli import main",
        "from tokenlabel import cli",
        "from tokenlabel import ScoreMap",
        "from ..upper import windows",
    ],
)
def test_an_import_of_a_room_above_is_found(tmp_path, statement):
    (tmp_path / "lower").mkdir()
    (tmp_path / "lower" / "stones.py").write_text(f"import json\nfrom tokenlabel.lower import sand\n{statement}\n")
    assert len(misplaced(tmp_path, {"lower": "", "upper": "lower"})) == 1


def misplaced(sources: Path, rooms: Mapping[str, str]) -> list[str]:
    """Return each import, wherever in a file of a room, of another room than its own and those it may import."""
    return [
        f"{path.relative_to(sources)} imports {found}"
        for room, below in rooms.items()
        for path in sorted((sources / room).rglob("*.py"))
        for found in imports(path)
        if found not in {room, *below.split()}
    ]


def imports(path: Path) -> Iterator[str]:
    """Yield the rooms (or modules on top) of tokenlabel that a file imports; relative imports as they stand."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield "." * node.level + (node.module or "")
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (name.split(".")[1] for name in names if name.startswith("tokenlabel."))


@pytest.mark.parametrize("page", ["README.md", "docs/architecture.md"])
def test_pages_show_the_step_as_it_is(page):
    step = textwrap.dedent(inspect.getsource(TrainStep.__dict__["forward"]))
    text = (Path(__file__).parents[1] / page).read_text(encoding="utf-8")
    assert f"```python\n{step}```" in text
