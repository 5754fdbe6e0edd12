"""Recipes: all settings of a training run, as YAML files and as frozen dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, TypeVar

from tokenlabel.core.config import ErasingConfig, Inference, LossConfig, MixConfig
from tokenlabel.data.config import AugmentConfig
from tokenlabel.data.decoding import ImageCheck
from tokenlabel.runtime.arguments import Parser, add_config_arguments
from tokenlabel.runtime.coercion import (
    COUNT,
    NATURAL,
    ONE_OPTION,
    PART,
    POSITIVE,
    SEED,
    SHARE,
    check_numbers,
    coerced_fields,
)
from tokenlabel.runtime.configuration import check_keys, config_from_dict, overlaid, read_yaml, with_types
from tokenlabel.runtime.errors import ConfigError, MissingError, near_names, refuse
from tokenlabel.runtime.hub import local_name, options_without_weights
from tokenlabel.runtime.runlog import RECIPE_FILE

_UNSET = (0, -1)  # an image size that was not given, and that no wrong number becomes


class Labelled:
    """A group of a recipe that may name label stores."""

    labels: str | list[str] | None

    @property
    def label_folders(self) -> list[str]:
        """The folders of `labels`; empty without labels."""
        return [self.labels] if isinstance(self.labels, str) else self.labels or []


@dataclass(frozen=True, kw_only=True)
@coerced_fields
class DataConfig(Labelled):
    """Training and validation data."""

    train: str
    """Training images: a folder of class folders, a list, or tar files; with labels, classes may be missing."""
    unlabelled: str | None = None
    """More training images, in any layout, without classes; their targets are their token labels."""
    val: str | None = None
    """Images to evaluate on, whose classes are among those of `train`, by name; none to skip evaluation."""
    labels: str | list[str] | None = None
    """Label store that `tokenlabel annotate` made for `train`, or several, read as one; none trains without token
    labels."""
    skip_broken: bool = False
    """Skip images that cannot be decoded; by default one of them is an error before training starts."""
    check: ImageCheck = ImageCheck.AUTO
    """How broken images are found, once in a run: decode every image; ends: read the ends of every file, which finds
    truncated ones; none; auto: decode up to 10,000 images, ends above, except, without skip_broken, labelled images."""
    max_missing: float = 0.1
    """Fraction of the images that may have no label in the store; the targets of their tokens have weight 0."""
    num_workers: int = 2
    """Processes that decode and augment images, in evaluation for 5,000 images or more."""
    tar_window: int | None = None
    """Read tar files sequentially, and shuffle the images of this many at a time: for data that fits neither memory
    nor a fast disk. None shuffles all images."""

    def __post_init__(self) -> None:
        check_numbers(self, "data.", max_missing=SHARE, num_workers=COUNT, tar_window=NATURAL)

    @property
    def image_folders(self) -> list[str | None]:
        """The folders of images, in which no run folder may be."""
        return [self.train, self.unlabelled, self.val]


@dataclass(frozen=True, kw_only=True)
@coerced_fields
class ModelConfig:
    """The network to train."""

    name: str = ""
    """`lvvit_t`, `lvvit_s`, `lvvit_m`, `lvvit_l`, `t2t_vit_14`, ..., or the name of any timm model. By default that of
    the run in `weights`, with its img_size and options unless they are given."""
    img_size: tuple[int, int] = _UNSET
    """Height and width of the images in training and evaluation; (224, 224) by default."""
    options: dict[str, Any] = field(default_factory=dict)
    """Other arguments of the model's constructor, such as `depth` or `drop_path`."""
    weights: str | None = None
    """Initial weights: a published file (.pth.tar, .safetensors), one of our run or checkpoint folders, or one on the
    hub (hf://USER/NAME)."""
    average: bool | None = False
    """Begin with the EMA weights in that checkpoint; null: with those if there are any."""
    frozen_layers: int = 0
    """Number of frozen layers, counted from the stem."""

    def __post_init__(self) -> None:
        of_run = {} if self.name else _model_of_run(self.weights)
        if self.img_size == _UNSET:
            object.__setattr__(self, "img_size", tuple(of_run.get("img_size", (224, 224))))
        if of_run:
            object.__setattr__(self, "name", of_run["name"])
            object.__setattr__(self, "options", {**of_run.get("options", {}), **self.options})
        check_numbers(self, "model.", img_size=NATURAL, frozen_layers=COUNT)
        taken = self.options.keys() & {"name", "num_classes", "img_size", "size_px"}
        names = ", ".join(sorted(taken))
        where = "which images, model.name and model.img_size decide; leave it out there"
        refuse({f"model.options names {names}, {where}": taken})


def _model_of_run(weights: str | None) -> dict[str, Any]:
    """Return the model section of a run's or a checkpoint's recipe. Raises ConfigError for anything else."""
    folder = Path(local_name(weights)) if weights else None
    for path in (folder / "state.json", folder / RECIPE_FILE) if folder else ():
        if path.is_file():
            saved = read_yaml(path)
            model = saved.get("recipe", saved).get("model") or {}
            if "name" in model:
                return {**model, "options": options_without_weights(model.get("options", {}))}
    what = "is no run" if Path(weights or ".").exists() else "is not there"
    found = f"model.weights {weights} {what}" if weights else "there is no model.weights"
    raise (ConfigError if weights else MissingError)(
        f"model.name is missing, and {found} to take it from; give model.weights a run folder, or name a model "
        "(docs/models.md); a run that has begun continues by its own recipe: --recipe RUN/recipe.yaml --out RUN"
    )


@dataclass(frozen=True, kw_only=True)
@coerced_fields
class OptimConfig:
    """AdamW and the schedule of its learning rate."""

    lr: float
    """Peak learning rate for `lr_batch_size`; scales linearly with the batch size."""
    lr_batch_size: int
    """Batch size for which `lr`, `min_lr` and `warmup_lr` are given."""
    schedule: Literal["cosine", "poly", "constant"] = "cosine"
    """Learning rate after the warm-up: half a cosine, poly (of power 1: linear), or constant until the cool-down."""
    min_lr: float = 1e-5
    """Final learning rate of the schedule, and that of the cool-down. Scales like `lr`."""
    warmup_lr: float = 1e-6
    """Initial learning rate of the warm-up. Scales like `lr`."""
    warmup_epochs: float = field(default=5.0, metadata={"instead_of": "warmup_steps"})
    """Epochs of linear warm-up, part of the recipe's epochs; as an option in place of a recipe's warmup_steps."""
    warmup_steps: int | None = None
    """Steps of linear warm-up, in place of epochs."""
    cooldown_epochs: float = 0.0
    """Epochs at `min_lr` at the end, part of the recipe's epochs."""
    weight_decay: float = 0.05
    """Weight decay, except of biases, norms and what the model names (position embedding, class token)."""
    layer_decay: float = 1.0
    """Learning rate of a layer relative to that of the layer above it; 1 for none, .65-.9 to fine-tune."""
    clip_grad_norm: float | None = None
    """Clip gradients to this norm; none by default, as in the paper."""
    ema_decay: float | None = 0.99992
    """Decay of the EMA weights, which are evaluated; none evaluates the weights themselves."""
    ema_warmup: bool = True
    """Increase the EMA decay from 0 as 1 - (1 + step) ** -2/3: .99992 alone needs a long run."""

    def __post_init__(self) -> None:
        check_numbers(self, "optim.", lr=POSITIVE, lr_batch_size=NATURAL, clip_grad_norm=POSITIVE)
        at_least_0 = ("min_lr", "warmup_lr", "warmup_epochs", "warmup_steps", "cooldown_epochs", "weight_decay")
        check_numbers(self, "optim.", **dict.fromkeys(at_least_0, COUNT))
        check_numbers(self, "optim.", layer_decay=PART, ema_decay="[0, 1)")


@dataclass(frozen=True, kw_only=True)
@coerced_fields
class EvalConfig(Labelled):
    """Evaluation during training and at its end."""

    every_epochs: float = 1.0
    """Epochs between evaluations; the last step is always evaluated."""
    batch_size: int = 256
    """Images in a batch of evaluation."""
    inference: Inference = Inference.CLASS
    """The evaluated prediction: class, tokens, or combined (class + 0.5 max over tokens, as published)."""
    crop_fraction: float = 0.875
    """Fraction of the resized image's shorter side that the centre crop keeps."""
    labels: str | list[str] | None = None
    """Label store of the val images, by the same teacher: evaluates how often tokens agree with it."""
    probe: str | None = None
    """A few images with any classes: evaluates a linear probe and nearest neighbours of the frozen features on them."""
    probe_test: str | None = None
    """Images to test the probes on; by default every other image of `probe`."""

    def __post_init__(self) -> None:
        positive = {"every_epochs": POSITIVE, "crop_fraction": PART}
        check_numbers(self, "eval.", **positive, batch_size=NATURAL)
        has_no_probe = self.probe_test is not None and self.probe is None
        refuse({"eval.probe_test tests probes that learn from eval.probe; name that folder, too": has_no_probe})


@dataclass(frozen=True, kw_only=True)
@coerced_fields
class CheckpointConfig:
    """When checkpoints are written, and which are kept."""

    every_epochs: float = 1.0
    """Epochs between checkpoints; the last step always writes one."""
    keep: int = 2
    """Number of newest checkpoints to keep."""
    keep_best: bool = True
    """Also keep the best evaluated one; `checkpoints/best` links to it."""
    keep_every_epochs: float | None = None
    """Also keep one every so many epochs for good."""

    def __post_init__(self) -> None:
        check_numbers(self, "checkpoint.", keep=NATURAL, every_epochs=POSITIVE, keep_every_epochs=POSITIVE)


@dataclass(frozen=True, kw_only=True)
@coerced_fields
class TrainingConfig:
    """The settings of a run of any task."""

    optim: OptimConfig
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig, metadata=ONE_OPTION)
    epochs: int | None = field(default=None, metadata={"instead_of": "num_steps"})
    """Passes over the training images; as an option in place of a recipe's num_steps."""
    num_steps: int | None = None
    """Steps of the run, in place of epochs."""
    min_epoch_steps: int = 1
    """Minimum steps of an epoch; with fewer images than that they are seen several times in an epoch."""
    batch_size: int
    """Global batch size: images of a step over all processes and micro-batches."""
    micro_batch_size: int | None = None
    """Maximum images of a forward pass in a process; gradients are accumulated over several. None for its whole share
    of the batch."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """bf16 and fp16 run the forward pass under autocast, fp16 with a scaled loss; weights and EMA stay fp32."""
    compile: Literal["no", "inductor", "aot_eager"] = "no"
    """Backend of torch.compile; inductor is the fast one and needs a C++ compiler."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    sync_batchnorm: bool = False
    """Synchronise BatchNorm's statistics over all GPUs."""
    sharded: bool = False
    """Shard weights, EMA and optimizer state over the processes (FSDP2): for models too large for one GPU."""
    seed: int = 0
    """Seed of the initial weights, the order of the images and all augmentation."""

    def __post_init__(self) -> None:
        refuse({"a recipe needs epochs or num_steps": self.epochs is None and self.num_steps is None})
        check_numbers(self, epochs=NATURAL, num_steps=NATURAL, min_epoch_steps=NATURAL)
        check_numbers(self, batch_size=NATURAL, micro_batch_size=NATURAL)
        check_numbers(self, seed=SEED)

    def check_part(self, num_images: int) -> None:
        """Raise ConfigError if a training step cannot take so many images through the model at once."""


@dataclass(frozen=True, kw_only=True)
class Recipe(TrainingConfig):
    """A training run of a classifier."""

    data: DataConfig
    model: ModelConfig
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    erase: ErasingConfig = field(default_factory=ErasingConfig, metadata=ONE_OPTION)
    mix: MixConfig = field(default_factory=MixConfig, metadata=ONE_OPTION)
    loss: LossConfig = field(default_factory=LossConfig)
    eval: EvalConfig = field(default_factory=EvalConfig, metadata=ONE_OPTION)

    def check_part(self, num_images: int) -> None:
        """See the base class: `mix.group_size` must divide them."""
        self.mix.size_of_groups(num_images)

    @property
    def uses_token_labels(self) -> bool:
        """True if the token head is trained."""
        return self.loss.beta > 0 and (self.data.labels is not None or self.loss.has_online_teacher)


RecipeKind = TypeVar("RecipeKind", bound=TrainingConfig)


def add_recipe_arguments(parser: Parser, kind: type[TrainingConfig] = Recipe) -> None:
    """Add `--recipe NAME|FILE` and each field of a recipe, as `--a.b value`, to a parser."""
    names = ", ".join(recipe_names())
    parser.add_argument("--recipe", help=f"one of {names}, or a YAML file; options override it")
    parser.add_argument("--print-config", action="store_true", help="print the recipe as options change it, and stop")
    add_config_arguments(parser, kind)


def recipe_names() -> list[str]:
    """Return the names of the recipes in the package."""
    return sorted(path.name.removesuffix(".yaml") for path in _folder().iterdir() if path.name.endswith(".yaml"))


def find_recipe(name: str | Path, *, beside: Path | None = None) -> Path:
    """Return the file of a recipe given by name or as a path. Raises ConfigError that suggests similar names.

    `beside`: the recipe file that names it; paths are relative to its folder, by default to the current one.
    """
    path = Path(name) if beside is None else beside.parent / name
    if path.is_file():
        return path
    if str(name) in recipe_names():
        return Path(str(_folder() / f"{name}.yaml"))
    where = "" if beside is None else f"{beside}: extends: "
    near = near_names(str(name), recipe_names())
    raise ConfigError(f"{where}no recipe {str(name)!r}, neither a file nor one of the package{near}")


def read_recipe(name: str | Path, kind: type[RecipeKind]) -> RecipeKind:
    """Return a recipe by name, or from a YAML file. Raises ConfigError that names the file."""
    return config_from_dict(recipe_content(name, kind), kind, name=str(name))


def recipe_content(name: str | Path, kind: type[TrainingConfig]) -> dict[str, Any]:
    """Return the fields that a recipe and those that it extends set, as nested dicts.

    `extends: lvvit_s` in a file (a recipe of the package, or a path relative to the file) inherits the fields of that
    recipe. The file overrides groups (`optim`) field by field, anything else, such as `model.options`, as a whole.
    Raises ConfigError that names the file if it cannot be read, has unknown keys, or if recipes extend each other.
    """
    chain: dict[Path, dict[str, Any]] = {}
    path: Path | None = find_recipe(name)
    while path is not None:
        if path.resolve() in {file.resolve() for file in chain}:
            files = ", which extends ".join(map(str, [*chain, path]))
            raise ConfigError(f"{files}: recipes that extend each other have no beginning; leave one extends out")
        chain[path] = nested = read_yaml(path)
        base = nested.pop("extends", None)
        if base is not None and not isinstance(base, str):
            raise ConfigError(f"{path}: extends takes the name of one recipe or a file, got {base!r}")
        path = None if base is None else find_recipe(base, beside=path)
    content: dict[str, Any] = {}
    for path, nested in reversed(chain.items()):
        try:
            check_keys(nested, kind)
            with_types(nested, kind)  # for its errors, which name the file here
            content = overlaid(content, nested, kind)
        except ValueError as error:
            segments = any("layout" in (each.get("data") or {}) for each in chain.values())
            verb = "segment train" if segments else "train"
            advice = f" (is it a recipe of tokenlabel {verb}?)" if segments == issubclass(kind, Recipe) else ""
            raise ConfigError(f"{path}: {error}{advice}") from error
    return content


def _folder() -> Any:
    return files("tokenlabel") / "recipes"
