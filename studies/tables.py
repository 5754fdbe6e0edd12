"""Tables of recipes, the testbeds that they are trained on, and what each row trains.

A table (tables/NAME.yaml) lists rows, each by what it changes in a base recipe. A testbed (testbeds/NAME.yaml) says
what the base recipe is, where the data lie, and which commands make teachers and labels; `{name}` in a setting or a
command is the folder of the step of that name. So the same table runs on any testbed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from studies.defects import DEFECTS, NEW_TOKEN_HEAD
from studies.measures import METRICS
from tokenlabel.runtime.coercion import coerced, coerced_fields
from tokenlabel.runtime.configuration import config_from_dict, read_yaml
from tokenlabel.runtime.errors import near_names
from tokenlabel.segmentation.recipe import SegmentRecipe
from tokenlabel.training.recipe import Recipe, recipe_content

Kind = TypeVar("Kind")
Settings = dict[str, Any]
"""Dotted names of a recipe's fields to values."""

PLACEHOLDER = re.compile(r"\{(\w+)\}")


class StudyError(ValueError):
    """A study that cannot be: a table or a testbed with a mistake, or a folder that another one was made in."""


@dataclass(frozen=True, kw_only=True)
@coerced_fields
class Step:
    """Something to be made before rows can run: the words of a tokenlabel command, or the embedded scenes.

    `{here}` in a command is the folder that it makes; a command with `{seed}` is run for each seed.
    """

    command: str | None = None
    scenes: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
@coerced_fields
class Row:
    """One row of a table: what it changes in the testbed's recipe."""

    title: str
    use: tuple[str, ...] = ()  # presets of the testbed, applied before `set`
    set: Settings = field(default_factory=dict)
    defect: str | None = None  # what is made worse: studies/defects.py


@dataclass(frozen=True, kw_only=True)
@coerced_fields
class Table:
    """A comparison. `name`: of its file."""

    name: str
    title: str
    question: str
    rows: dict[str, Row]
    metrics: tuple[str, ...]
    differences: tuple[tuple[str, str], ...]  # the first row is held against the second, seed by seed
    twin: str = ""  # what the paper has in its place
    testbed: str = ""  # the one that its rows need, if they do
    seeds: int = 5
    use: tuple[str, ...] = ()  # for all rows; a row's own come after, and so for `set`
    set: Settings = field(default_factory=dict)
    limits: str = ""  # what cannot be seen at the scale of the embedded data


@dataclass(frozen=True, kw_only=True)
@coerced_fields
class Testbed:
    """What tables run on. `name`: of its file; `title`: of its part in a page of results."""

    __test__ = False  # pytest takes names that begin so for tests

    name: str
    recipe: str
    set: Settings
    segments: bool = False  # whether its recipes are of segmentation
    steps: dict[str, Step] = field(default_factory=dict)
    presets: dict[str, Settings] = field(default_factory=dict)
    measure: dict[str, str] = field(default_factory=dict)  # folders that metrics need: masks_train, ...
    title: str = ""
    about: str = ""  # what results on it say of themselves
    needs_data: bool = False  # whether {data} has to be given

    def is_seeded(self, step: str) -> bool:
        """Say whether a step is made once for each seed."""
        return "{seed}" in (self.steps[step].command or "")


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """A row of a table on a testbed, without its seed: equal plans are one run in all tables.

    `steps`: what it needs, in the order to make them. `digest`: a name for all that decides a run but its seed: recipe,
    settings, defect and steps. It says nothing of folders, nor of the version of the program.
    """

    name: str
    settings: Settings
    recipe: str
    defect: str | None
    steps: Sequence[str]
    digest: str


@dataclass(frozen=True)
class Job:
    """One run that a row asks for. `name`: TABLE:ROW:SEED."""

    name: str
    plan: RunPlan
    seed: int


def read_table(name: str) -> Table:
    """Return a table by its name or that of a YAML file. Raises StudyError that names the file and the key."""
    path, nested = _read(name, "tables")
    _check_keys(Table, nested, where=path)
    rows = coerced(nested.pop("rows", {}), dict[str, Any], name=f"{path}: rows")
    rows = {str(key): _build(Row, row, where=f"{path}: rows.{key}") for key, row in rows.items()}
    table = _build(Table, {"differences": (), **nested, "rows": rows, "name": path.stem}, where=path)
    if not rows or table.seeds < 1:
        raise StudyError(f"{path}: has {len(rows)} rows of {table.seeds} seeds; expected one of each at least")
    for key in (key for pair in table.differences for key in pair if key not in rows):
        raise StudyError(f"{path}: differences name a row {key!r}; rows are {', '.join(rows)}")
    unknown = [name for name in table.metrics if name not in METRICS]
    if unknown or not table.metrics:
        raise StudyError(f"{path}: metrics: no metric {unknown or 'at all'}; known: {', '.join(METRICS)}")
    for key, row in rows.items():
        if row.defect not in (None, NEW_TOKEN_HEAD, *DEFECTS):
            known = ", ".join([*DEFECTS, NEW_TOKEN_HEAD])
            raise StudyError(f"{path}: rows.{key}: no defect {row.defect!r}; known: {known}")
    return table


def read_testbed(name: str) -> Testbed:
    """Return a testbed by its name or that of a YAML file. Raises StudyError that names the file and the key."""
    path, nested = _read(name, "testbeds")
    steps = {
        key: _build(Step, step if isinstance(step, dict) else {"command": step}, where=f"{path}: steps.{key}")
        for key, step in coerced(nested.pop("steps", {}), dict[str, Any], name=f"{path}: steps").items()
    }
    return _build(Testbed, {**nested, "steps": steps, "name": path.stem}, where=path)


def names_in(folder: str) -> list[str]:
    """Return the names of the `tables` or of the `testbeds` beside this file."""
    return sorted(path.stem for path in (Path(__file__).parent / folder).glob("*.yaml"))


def _read(name: str, folder: str) -> tuple[Path, dict[str, Any]]:
    is_file = name.endswith((".yaml", ".yml"))
    path = Path(name) if is_file else Path(__file__).parent / folder / f"{name}.yaml"
    if not path.is_file():
        near = near_names(name, names_in(folder))
        raise StudyError(f"no {folder.removesuffix('s')} {name!r}{near}, or give a YAML file")
    return path, read_yaml(path)


def _build(kind: type[Kind], nested: Any, *, where: Path | str) -> Kind:
    if not isinstance(nested, dict):
        raise StudyError(f"{where}: expected a mapping of keys to values, got {nested!r}")
    _check_keys(kind, nested, where=where)
    try:
        return kind(**nested)
    except (TypeError, ValueError) as error:  # a key is missing, or a value is of another type
        raise StudyError(
            f"{where}: {str(error).removeprefix(f'{kind.__name__}.').removeprefix('__init__() ')}"
        ) from error


def _check_keys(kind: Any, nested: dict[str, Any], *, where: Path | str) -> None:
    known = [f.name for f in fields(kind)]
    for key in map(str, nested):
        if key not in known:
            raise StudyError(f"{where}: unknown key {key!r}{near_names(key, known)}")


def filled(value: Any, folders: Mapping[str, str]) -> Any:
    """Return a setting with its placeholders replaced. Raises StudyError for one that stands for nothing."""
    for name in PLACEHOLDER.findall(value) if isinstance(value, str) else ():
        if name not in folders:
            raise StudyError(f"{value!r}: nothing is called {name!r}; known: {', '.join(folders)}")
        value = value.replace(f"{{{name}}}", folders[name])
    return value


@dataclass(frozen=True, kw_only=True)
class Study:
    """Tables on a testbed, and the folder that they are made in.

    `overrides`: settings of every run, beside those of its row. `seeds`: of each row; what each table says if None.
    """

    tables: Sequence[Table]
    testbed: Testbed
    out: Path
    data: Path | None = None
    overrides: Settings = field(default_factory=dict)
    seeds: int | None = None

    def __post_init__(self) -> None:
        if self.testbed.needs_data and self.data is None:
            raise StudyError(f"testbed {self.testbed.name} needs images of yours: name their folder with --data")
        if self.seeds is not None and self.seeds < 1:
            raise StudyError(f"--seeds {self.seeds}: a row needs at least one seed")

    @cached_property
    def plans(self) -> dict[str, dict[str, RunPlan]]:
        """What each row trains, by the names of tables and rows. Raises ValueError for presets and settings of none."""
        plans = {table.name: {row: self._plan(table, row) for row in table.rows} for table in self.tables}
        for plan in (plan for of_table in plans.values() for plan in of_table.values()):
            self.recipe(plan, 0)  # a wrong one is refused here, not when teachers and labels are made
        return plans

    def _plan(self, table: Table, row_name: str) -> RunPlan:
        row, testbed, changes = table.rows[row_name], self.testbed, dict[str, Any]()
        for preset in (*table.use, *row.use):
            if preset not in testbed.presets:
                raise StudyError(
                    f"testbed {testbed.name} has no preset {preset!r}, which row {row_name} of table {table.name} uses"
                )
            changes |= testbed.presets[preset]
        changes |= {**table.set, **row.set}
        recipe = changes.pop("recipe", testbed.recipe)
        base = {**testbed.set, **self.overrides}
        changes |= self.overrides
        changes = {key: value for key, value in changes.items() if key not in base or base[key] != value}
        # Overrides come last: a preset may set all of `model.options`, an override one of them.
        settings = {key: value for key, value in {**base, **changes}.items() if key not in self.overrides}
        settings |= self.overrides
        steps = self._steps([*testbed.measure.values(), *settings.values()])
        decided = {
            "recipe": _with_settings(recipe, settings, self.kind),
            "defect": row.defect,
            "steps": {name: asdict(testbed.steps[name]) for name in steps},
        }
        text = json.dumps(decided, sort_keys=True, default=str)
        return RunPlan(
            name=_slug(changes if recipe == testbed.recipe else {"recipe": recipe, **changes}, row.defect),
            settings=settings,
            recipe=recipe,
            defect=row.defect,
            steps=steps,
            digest=hashlib.blake2b(text.encode(), digest_size=8).hexdigest(),
        )

    def _steps(self, texts: Sequence[Any]) -> list[str]:
        """Return the steps that settings or commands name, and those that these need, in the order to make them."""

        def needed(text: Any) -> Iterator[str]:
            for name in PLACEHOLDER.findall(text) if isinstance(text, str) else ():
                if name in self.testbed.steps:
                    yield from needed(self.testbed.steps[name].command)
                    yield name

        return list(dict.fromkeys(name for text in texts for name in needed(text)))

    def num_seeds(self, table: Table) -> int:
        """Return how many seeds each row of a table has."""
        return table.seeds if self.seeds is None else self.seeds

    def jobs(self) -> list[Job]:
        """Return the jobs: all rows of all tables at the first seed, then at the second."""
        return [
            Job(f"{table.name}:{row}:{seed}", plan, seed)
            for seed in range(max(map(self.num_seeds, self.tables)))
            for table in self.tables
            if seed < self.num_seeds(table)
            for row, plan in self.plans[table.name].items()
        ]

    def metrics(self, plan: RunPlan) -> list[str]:
        """Return what every table that has a row of this plan wants to know of its runs."""
        tables = (table for table in self.tables if plan in self.plans[table.name].values())
        return list(dict.fromkeys(name for table in tables for name in table.metrics))

    def recipe(self, plan: RunPlan, seed: int) -> Recipe | SegmentRecipe:
        """Return the recipe of a run."""
        settings = {key: filled(value, self.folders(seed)) for key, value in plan.settings.items()}
        nested = _with_settings(plan.recipe, {**settings, "seed": seed}, self.kind)
        return config_from_dict(nested, self.kind, name=f"run {plan.name} (recipe {plan.recipe})")

    @property
    def kind(self) -> type[Recipe] | type[SegmentRecipe]:
        """What its recipes are."""
        return SegmentRecipe if self.testbed.segments else Recipe

    def folders(self, seed: int) -> dict[str, str]:
        """Return what placeholders stand for."""
        steps = {name: str(self.step_folder(name, seed)) for name in self.testbed.steps}
        return steps | ({"data": str(self.data)} if self.data else {}) | {"seed": str(seed)}

    def step_folder(self, step: str, seed: int) -> Path:
        """Return the folder of a step."""
        return self.out / (f"{step}-{seed}" if self.testbed.is_seeded(step) else step)

    def run_folder(self, plan: RunPlan, seed: int) -> Path:
        """Return the folder of a run."""
        return self.out / "runs" / plan.name / str(seed)


def _with_settings(recipe: str, settings: Settings, kind: Any) -> dict[str, Any]:
    """Return the fields that a recipe sets with settings in them."""
    nested = recipe_content(recipe, kind)
    for key, value in settings.items():
        *groups, last = key.split(".")
        inner = nested
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[last] = deepcopy(value)  # a later setting may be one of a mapping
    return nested


def _slug(changes: Settings, defect: str | None) -> str:
    """Return a name for what differs from the base: readable, and cut to size by a hash where it is long."""
    parts = [f"{key}={json.dumps(value)}" for key, value in sorted(changes.items())]
    parts += [f"defect={defect}"] if defect else []
    text = re.sub(r"[^\w.=,+-]+", "", ",".join(parts)) or "base"
    if len(text) <= 60:
        return text
    return f"{text[:50]}-{hashlib.sha256(','.join(parts).encode()).hexdigest()[:9]}"
