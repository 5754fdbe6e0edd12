"""A recipe: everything that decides what a training run does, as YAML and as frozen dataclasses."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, TypeGuard, TypeVar, get_type_hints

import jsonargparse
import yaml
from jsonargparse.typing import register_type

from tokenlabel.augment import AugmentConfig
from tokenlabel.erasing import ErasingConfig
from tokenlabel.mixing import Mixing
from tokenlabel.models import Inference
from tokenlabel.optim import OptimConfig

RECIPE_FILE = "recipe.yaml"

Config = TypeVar("Config")


class RecipeError(ValueError):
    """A recipe that does not exist or cannot be read as one."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to train and evaluate on."""

    train: str
    """Training images: a folder with one folder a class."""
    val: str | None = None
    """Images to evaluate on, laid out like `train`; none to skip evaluation."""
    labels: str | None = None
    """Label store that `tokenlabel annotate` made for `train`; none trains without token labels."""
    skip_broken: bool = False
    """Leave out images that cannot be decoded; by default one of them stops the run before it starts."""
    num_workers: int = 2
    """Processes that decode and augment images."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which network to train."""

    name: str
    """`lvvit_t`, `lvvit_s`, `lvvit_m`, `lvvit_l`, `t2t_vit_14`, ..., or the name of any timm model."""
    size_px: tuple[int, int] = (224, 224)
    """Height and width of the images that it sees in training and evaluation."""
    options: dict[str, Any] = field(default_factory=dict)
    """What else the model's constructor takes, such as `depth` or `drop_path`."""
    weights: str | None = None
    """Checkpoint to begin with: a published file (.pth.tar, .safetensors) or one of our checkpoint folders."""
    average: bool = False
    """Begin with the running average (EMA) of the weights in that checkpoint."""
    frozen_layers: int = 0
    """How many layers, counted from the stem, keep the weights that they begin with."""


@dataclass(frozen=True, kw_only=True)
class MixConfig:
    """How pairs of images are mixed."""

    kind: Mixing = Mixing.NONE
    """none, mixtoken, cutmix or mixup."""
    alpha: float = 1.0
    """Both parameters of the Beta distribution of the share that an image keeps."""
    per_sample: bool = False
    """Draw a mix for each image, with random partners; by default one for the batch, as published."""
    probability: float = 1.0
    """Share of the batches that are mixed."""


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What the outputs are trained towards."""

    beta: float = 0.5
    """Weight of the token part; 0 trains without token labels."""
    label_smoothing: float = 0.1
    """Share of every target that is spread evenly over all classes, class and token targets alike."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """How the model is evaluated while it trains and at the end."""

    every_epochs: float = 1.0
    """Epochs between evaluations; the last step is always evaluated."""
    batch_size: int = 256
    """Images a step of evaluation."""
    inference: Inference = Inference.CLASS
    """Which prediction counts: class, tokens, or combined (class + 0.5 max over tokens, as published)."""
    crop_fraction: float = 0.875
    """Share of the resized image's shorter side that the centre crop keeps."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training run."""

    data: DataConfig
    model: ModelConfig
    optim: OptimConfig
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    erase: ErasingConfig = field(default_factory=ErasingConfig)
    mix: MixConfig = field(default_factory=MixConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    epochs: int
    """Passes over the training images."""
    batch_size: int
    """Images a step."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 runs the forward pass under autocast; weights, loss and averages stay in fp32."""
    checkpoint_every_epochs: float = 1.0
    """Epochs between checkpoints; the last step always writes one."""
    seed: int = 0
    """Decides the initial weights, the order of the images and every augmentation."""

    @property
    def uses_token_labels(self) -> bool:
        """Whether tokens are trained on labels of their own."""
        return self.data.labels is not None and self.loss.beta > 0


def add_recipe_arguments(parser: jsonargparse.ArgumentParser) -> None:
    """Let a parser take `--recipe NAME|FILE` and every field of a recipe as `--a.b value`."""
    names = ", ".join(recipe_names())
    parser.add_argument(
        "--recipe", action="config", help=f"one of {names}, or a YAML file; options after it override it"
    )
    add_config_arguments(parser, Recipe)


def add_config_arguments(parser: jsonargparse.ArgumentParser, config: type) -> None:
    """Let a parser take every field of a dataclass, nested ones as `--a.b value`; enums go by their values."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    for kind in _enums(config):
        register_type(kind, serializer=lambda member: member.value, deserializer=partial(_member, kind))
    parser.add_class_arguments(config)
    for action in parser._actions:  # argparse keeps what `--help` shows nowhere else
        kind = getattr(action, "_typehint", None)
        if isinstance(kind, type) and issubclass(kind, Enum):
            action.metavar = "{" + ",".join(member.value for member in kind) + "}"
            action.default = kind[action.default].value if isinstance(action.default, str) else action.default


def read_recipe(path: Path) -> Recipe:
    """Return the recipe of a YAML file. Raises RecipeError that names the file and the key."""
    try:
        nested = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise RecipeError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from error
    return recipe_from_dict(nested, name=str(path))


def recipe_from_dict(nested: Any, *, name: str) -> Recipe:
    """Return the recipe of nested dicts, as in a YAML file; `name` is what errors call it."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    add_config_arguments(parser, Recipe)
    if not isinstance(nested, dict):
        raise RecipeError(f"{name}: a recipe is a mapping of keys to values, got {type(nested).__name__}")
    try:
        return config_of(parser, parser.parse_object(nested), Recipe)
    except jsonargparse.ArgumentError as error:
        raise RecipeError(f"{name}: {explain(error, _field_names(Recipe))}") from error


def config_of(
    parser: jsonargparse.ArgumentParser, namespace: jsonargparse.Namespace, config: type[Config]
) -> Config:
    """Return the dataclass whose fields are among parsed arguments (see `add_config_arguments`)."""
    parsed = parser.instantiate(namespace)
    names = get_type_hints(config)
    return config(**{name: parsed[name] for name in names})


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Write a recipe with every field, so that later defaults don't change what a run was."""
    path.write_text(yaml.safe_dump(recipe_as_dict(recipe), sort_keys=False), encoding="utf-8")


def recipe_as_dict(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as nested dicts of what YAML and JSON know."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(entry) for key, entry in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(entry) for entry in value]
        return value.value if isinstance(value, Enum) else value

    return plain(dataclasses.asdict(recipe))


def settings(recipe: Recipe) -> dict[str, Any]:
    """Return every field of a recipe under its dotted name, as on the command line."""

    def leaves(nested: dict[str, Any], prefix: str) -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for key, value in nested.items():
            flat |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        return flat

    return leaves(recipe_as_dict(recipe), "")


def recipe_names() -> list[str]:
    """Return the names of the recipes in the package."""
    return sorted(
        path.name.removesuffix(".yaml") for path in _folder().iterdir() if path.name.endswith(".yaml")
    )


def find_recipe(name: str) -> Path:
    """Return the file of a recipe given by name or as a path. Raises RecipeError with the near names."""
    if Path(name).is_file():
        return Path(name)
    if name in recipe_names():
        return Path(str(_folder() / f"{name}.yaml"))
    raise RecipeError(
        f"no recipe {name!r}, neither a file nor one of the package{_near(name, recipe_names())}"
    )


def explain(error: Exception, known: Sequence[str]) -> str:
    """Return the message of a parser's error on one line, with the near names of an unknown key among `known`."""
    message = " ".join(str(error).split())
    if in_group := re.search(r"Group '(.+?)' does not accept option '(.+?)'", message):
        group, key = in_group.groups()
        return f"unknown key {group}.{key}{_near(f'{group}.{key}', known)}"
    if alone := re.search(r"Option '(.+?)' is not accepted", message):
        return f"unknown key {alone[1]}{_near(alone[1], known)}"
    for word in re.findall(r"--([^\s=]+)", message.partition("unrecognized arguments:")[2]):
        message += _near(word, known)
    return message


def _near(word: str, known: Sequence[str]) -> str:
    """Return a clause that names the known words nearest to `word`, or those beside it."""
    by_last_part = {name.split(".")[-1]: name for name in known}
    near = difflib.get_close_matches(word, known, n=2) or [
        by_last_part[part] for part in difflib.get_close_matches(word.split(".")[-1], by_last_part, n=2)
    ]
    if near:
        return f"; did you mean {' or '.join(near)}?"
    group = word.rpartition(".")[0]
    beside = [name for name in known if name.rpartition(".")[0] == group]
    return f"; known there: {', '.join(beside)}" if beside else ""


def _is_config(kind: Any) -> TypeGuard[type]:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def _field_names(config: type, prefix: str = "") -> list[str]:
    names = []
    for name, kind in get_type_hints(config).items():
        nested = _field_names(kind, f"{prefix}{name}.") if _is_config(kind) else []
        names += nested or [prefix + name]
    return names


def _enums(config: type) -> set[type[Enum]]:
    """Return the enums among the fields of a dataclass and of those nested in it."""
    found: set[type[Enum]] = set()
    for kind in get_type_hints(config).values():
        if _is_config(kind):
            found |= _enums(kind)
        elif isinstance(kind, type) and issubclass(kind, Enum):
            found.add(kind)
    return found


def _member(kind: type[Enum], value: Any) -> Enum:
    try:
        return kind(value)
    except ValueError:
        known = ", ".join(member.value for member in kind)
        raise ValueError(f"expected one of {known}; got {value!r}") from None


def _folder() -> Any:
    return files("tokenlabel") / "recipes"
