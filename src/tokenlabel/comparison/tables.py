"""Tables of comparisons: which rows are trained, on what, and which differences between them are asked for.

A table (tables/NAME.yaml) lists rows, each by what it changes in a base recipe. A testbed (testbeds/NAME.yaml) says
what the base recipe is, where the data lie, and which commands make teachers and labels; `{name}` in a setting or a
command is the folder of the step of that name. So the same table runs on any testbed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import yaml

from tokenlabel.comparison.defects import DEFECTS
from tokenlabel.comparison.metrics import METRICS
from tokenlabel.runtime.configuration import config_from_dict
from tokenlabel.training.recipe import Recipe, recipe_content

Kind = TypeVar("Kind")

PLACEHOLDER = re.compile(r"\{(\w+)\}")
NUM_SEEDS = 5
PLAN_FILE = "plan.json"


class TableError(ValueError):
    """A table or a testbed that does not exist or says something that cannot be."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """Something to be made before rows can run: the words of a tokenlabel command, or the embedded scenes.

    `{here}` in a command is the folder that it makes.
    """

    command: str | None = None
    scenes: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a table: what it changes in the testbed's recipe."""

    title: str
    use: Sequence[str] = ()
    """Presets of the testbed, applied before `set`."""
    set: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the recipe by dotted names."""
    defect: str | None = None
    """How the labels' places are made wrong; None for right ones."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A comparison. `name`: of its file."""

    name: str
    title: str
    question: str
    rows: Mapping[str, Row]
    metrics: Sequence[str]
    differences: Sequence[tuple[str, str]]
    """Pairs of rows; the first is held against the second, seed by seed."""
    twin: str = ""
    """What the paper has in its place."""
    seeds: int = NUM_SEEDS
    use: Sequence[str] = ()
    """Presets of the testbed for all rows."""
    set: Mapping[str, Any] = field(default_factory=dict)
    """Settings of all rows; a row's own come after."""
    limits: str = ""
    """What cannot be seen at the scale of the embedded data."""


@dataclass(frozen=True, kw_only=True)
class Testbed:
    """What tables run on. `name`: of its file."""

    __test__ = False  # pytest takes names that begin so for tests

    name: str
    title: str
    recipe: str
    set: Mapping[str, Any]
    steps: Mapping[str, Step] = field(default_factory=dict)
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    measure: Mapping[str, str] = field(default_factory=dict)
    """Folders that metrics need: `masks_train`, `masks_val`, `labels_val`; left out where there are none."""
    about: str = ""
    """What results on it say of themselves."""
    needs_data: bool = False
    """Whether `{data}` has to be given."""


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """A row of a table on a testbed, without its seed: equal plans are one run in all tables."""

    name: str
    settings: Mapping[str, Any]
    """Dotted names to values, with placeholders."""
    recipe: str
    defect: str | None


def read_table(name: str) -> Table:
    """Return a table of the package, or of a YAML file. Raises TableError that names the file and the key."""
    path, nested = _read(name, "tables")
    _check_keys(Table, nested, where=path)
    rows = {key: _build(Row, row, where=f"{path}: rows.{key}") for key, row in nested.pop("rows", {}).items()}
    pairs = [_pair(pair, rows, where=path) for pair in nested.pop("differences", [])]
    table = _build(Table, {**nested, "rows": rows, "differences": pairs, "name": Path(path).stem}, where=path)
    unknown = [name for name in table.metrics if name not in METRICS]
    if unknown or not table.metrics:
        raise TableError(f"{path}: metrics: no metric {unknown or 'at all'}; known: {', '.join(METRICS)}")
    for key, row in rows.items():
        if row.defect is not None and row.defect not in DEFECTS:
            raise TableError(f"{path}: rows.{key}: no defect {row.defect!r}; known: {', '.join(DEFECTS)}")
    return table


def _pair(pair: Any, rows: Mapping[str, Row], *, where: str) -> tuple[str, str]:
    if not (isinstance(pair, list) and len(pair) == 2):
        raise TableError(f"{where}: differences: expected pairs of rows, [one, other], got {pair!r}")
    for name in pair:
        if name not in rows:
            raise TableError(f"{where}: differences name a row {name!r}; rows are {', '.join(rows)}")
    return pair[0], pair[1]


def read_testbed(name: str) -> Testbed:
    """Return a testbed of the package, or of a YAML file. Raises TableError that names the file and the key."""
    path, nested = _read(name, "testbeds")
    steps = {
        key: _build(Step, step if isinstance(step, dict) else {"command": step}, where=f"{path}: steps.{key}")
        for key, step in nested.pop("steps", {}).items()
    }
    return _build(Testbed, {**nested, "steps": steps, "name": Path(path).stem}, where=path)


def table_names() -> list[str]:
    """Return the names of the tables in the package."""
    return _names("tables")


def testbed_names() -> list[str]:
    """Return the names of the testbeds in the package."""
    return _names("testbeds")


def plan_row(table: Table, row_name: str, testbed: Testbed, overrides: Mapping[str, Any]) -> RunPlan:
    """Return what a row of a table trains on a testbed.

    `overrides`: settings of all rows, from the command line. Raises TableError for a preset that the testbed lacks.
    """
    row = table.rows[row_name]
    changes: dict[str, Any] = {}
    for preset in (*table.use, *row.use):
        if preset not in testbed.presets:
            raise TableError(
                f"testbed {testbed.name} has no preset {preset!r}, which row {row_name} of table {table.name} uses"
            )
        changes |= testbed.presets[preset]
    changes |= {**table.set, **row.set}
    recipe = changes.pop("recipe", testbed.recipe)
    base = {**testbed.set, **overrides}
    changes = {key: value for key, value in {**changes, **overrides}.items() if base.get(key, _NONE) != value}
    given = dict(changes) if recipe == testbed.recipe else {"recipe": recipe, **changes}
    before = {key: value for key, value in {**base, **changes}.items() if key not in overrides}
    # Overrides come last: a preset may set all of `model.options`, an override one of them.
    return RunPlan(
        name=_slug(given, row.defect), settings={**before, **overrides}, recipe=recipe, defect=row.defect
    )


_NONE = object()  # what no setting equals


def recipe_of(plan: RunPlan, seed: int, folders: Mapping[str, str]) -> Recipe:
    """Return the recipe of a run; `folders` are what placeholders stand for."""
    settings = {key: filled(value, folders) for key, value in plan.settings.items()}
    nested = _with_settings(plan.recipe, {**settings, "seed": seed})
    return config_from_dict(nested, Recipe, name=f"run {plan.name} (recipe {plan.recipe})")


def _with_settings(recipe: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a recipe's file with settings by dotted names in it."""
    nested = recipe_content(recipe, Recipe)
    for key, value in settings.items():
        *groups, last = key.split(".")
        inner = nested
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[last] = value
    return nested


def filled(value: Any, folders: Mapping[str, str]) -> Any:
    """Return a setting with its placeholders replaced. Raises TableError for one that stands for nothing."""
    if not isinstance(value, str):
        return value

    def folder(match: re.Match[str]) -> str:
        if match[1] not in folders:
            raise TableError(f"{value!r}: nothing is called {match[1]!r}; known: {', '.join(folders)}")
        return folders[match[1]]

    return PLACEHOLDER.sub(folder, value)


def steps_of(texts: Sequence[Any], testbed: Testbed) -> list[str]:
    """Return the steps that settings or commands name, and those that these need, in the order to make them."""

    def needed(text: Any) -> Iterator[str]:
        for name in PLACEHOLDER.findall(text) if isinstance(text, str) else ():
            if name in testbed.steps:
                yield from needed(testbed.steps[name].command)
                yield name

    return list(dict.fromkeys(name for text in texts for name in needed(text)))


def _slug(changes: Mapping[str, Any], defect: str | None) -> str:
    """Return a name for what differs from the base: readable, and cut to size by a hash where it is long."""
    parts = [f"{key}={json.dumps(value)}" for key, value in sorted(changes.items())]
    parts += [f"defect={defect}"] if defect else []
    text = re.sub(r"[^\w.=,+-]+", "", ",".join(parts)) or "base"
    if len(text) <= 60:
        return text
    return f"{text[:50]}-{hashlib.sha256(','.join(parts).encode()).hexdigest()[:9]}"


def _read(name: str, folder: str) -> tuple[str, dict[str, Any]]:
    path = Path(name) if name.endswith((".yaml", ".yml")) else Path(str(_folder(folder) / f"{name}.yaml"))
    if not path.is_file():
        known = _names(folder)
        near = get_close_matches(name, known, n=1)
        advice = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}, or give a YAML file"
        raise TableError(f"no {folder.removesuffix('s')} {name!r}; {advice}")
    try:
        nested = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise TableError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(nested, dict):
        raise TableError(f"{path}: expected a mapping of keys to values, got {type(nested).__name__}")
    return str(path), nested


def _build(kind: type[Kind], nested: Any, *, where: str) -> Kind:
    if not isinstance(nested, dict):
        raise TableError(f"{where}: expected a mapping of keys to values, got {nested!r}")
    _check_keys(kind, nested, where=where)
    try:
        return kind(**nested)
    except TypeError as error:  # a key is missing
        raise TableError(f"{where}: {str(error).partition(' ')[2]}") from error


def _check_keys(kind: type, nested: Mapping[str, Any], *, where: str) -> None:
    known = [f.name for f in fields(kind)]
    for key in nested:
        if key not in known:
            near = get_close_matches(key, known, n=1)
            raise TableError(
                f"{where}: unknown key {key!r}; {f'did you mean {near[0]}?' if near else f'known: {known}'}"
            )


def _names(folder: str) -> list[str]:
    return sorted(path.name.removesuffix(".yaml") for path in _folder(folder).iterdir())


def _folder(name: str) -> Any:
    return files("tokenlabel") / name


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Tables on a testbed, and the folder that they are made in."""

    tables: Sequence[Table]
    testbed: Testbed
    out: Path
    data: Path | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Settings of every run, beside those of its row."""
    seeds: int | None = None
    """Seeds of each row; what each table says if None."""

    def __post_init__(self) -> None:
        if self.testbed.needs_data and self.data is None:
            raise TableError(
                f"testbed {self.testbed.name} needs images of yours: name their folder with --data"
            )
        if self.seeds is not None and self.seeds < 1:
            raise TableError(f"--seeds {self.seeds}: a row needs at least one seed")

    @property
    def folders(self) -> dict[str, str]:
        """What placeholders stand for."""
        places = {name: str(self.out / name) for name in self.testbed.steps}
        return places | ({"data": str(self.data)} if self.data else {})

    def num_seeds(self, table: Table) -> int:
        """Return how many seeds each row of a table has."""
        return table.seeds if self.seeds is None else self.seeds

    def plan(self, table: Table, row: str) -> RunPlan:
        """Return what a row trains."""
        return plan_row(table, row, self.testbed, self.overrides)

    def metrics(self, plan: RunPlan) -> list[str]:
        """Return what every table that has a row of this plan wants to know of its runs."""
        wanted = {
            name: None
            for table in self.tables
            if any(self.plan(table, row) == plan for row in table.rows)
            for name in table.metrics
        }
        return list(wanted)

    def digest(self, plan: RunPlan) -> str:
        """Return a name for all that decides a run but its seed: recipe, settings, defect, and the steps it needs.

        It says nothing of folders, nor of the version of the program.
        """
        steps = steps_of([*self.testbed.measure.values(), *plan.settings.values()], self.testbed)
        decided = {
            "recipe": _with_settings(plan.recipe, plan.settings),
            "defect": plan.defect,
            "steps": {name: asdict(self.testbed.steps[name]) for name in steps},
        }
        text = json.dumps(decided, sort_keys=True, default=str)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def described(self, plan: RunPlan) -> str:
        """Return what decides a run, as JSON, for the file beside it."""
        described = {"recipe": plan.recipe, "settings": dict(plan.settings), "defect": plan.defect}
        return json.dumps({"digest": self.digest(plan), **described}, indent=1, default=str) + "\n"

    def is_of(self, plan: RunPlan, run: Path) -> bool:
        """Say whether a run folder is of this plan, with its recipe and its steps as they are now."""
        path = run / PLAN_FILE
        return path.is_file() and path.read_text(encoding="utf-8") == self.described(plan)

    def run_folder(self, plan: RunPlan, seed: int) -> Path:
        """Return the folder of a run."""
        return self.out / "runs" / plan.name / str(seed)

    def measure_folders(self) -> dict[str, Path]:
        """Return the folders that metrics read, by what they are called in `measures.py`."""
        return {name: Path(filled(text, self.folders)) for name, text in self.testbed.measure.items()}


@dataclass(frozen=True)
class Job:
    """One run that a row asks for."""

    table: Table
    row: str
    seed: int

    def __str__(self) -> str:
        return f"{self.table.name}:{self.row}:{self.seed}"
