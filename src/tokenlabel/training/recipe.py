"""A recipe: everything that decides what a training run does, as YAML and as frozen dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, TypeVar

from tokenlabel.core.config import ErasingConfig, Inference, LossConfig, MixConfig
from tokenlabel.data.config import AugmentConfig
from tokenlabel.data.decoding import ImageCheck
from tokenlabel.runtime.arguments import Parser, add_config_arguments
from tokenlabel.runtime.coercion import COUNT, NATURAL, ONE_OPTION, PART, POSITIVE, SHARE, check_numbers, coerced_fields
from tokenlabel.runtime.configuration import check_keys, config_from_dict, overlaid, read_yaml, with_types
from tokenlabel.runtime.errors import ConfigError, near_names
from tokenlabel.runtime.hub import local_name
from tokenlabel.runtime.runlog import RECIPE_FILE

_UNSAID = (0, 0)  # an image size that nobody gave


@dataclass(frozen=True, kw_only=True)
@coerced_fields
class DataConfig:
    """What to train and evaluate on."""

    train: str
    """Training images: a folder with one folder a class, a list or tar files; with labels images without classes do."""
    unlabelled: str | None = None
    """More training images, in any layout, without classes: they are learnt from where they have token labels."""
    val: str | None = None
    """Images to evaluate on, of the classes of `train` by name, all or some; none to skip evaluation."""
    labels: str | list[str] | None = None
    """Label store that `tokenlabel annotate` made for `train`, or several that are read as one; none trains without
    token labels."""
    skip_broken: bool = False
    """Leave out images that cannot be decoded; by default one of them stops the run before it starts."""
    check: ImageCheck = ImageCheck.AUTO
    """How that is found out, once a run: decode every image; look at the ends of every file, which finds what was cut
    off; none; auto: decode up to 10,000, ends above; what a teacher has labelled is sound, without skip_broken."""
    max_missing: float = 0.1
    """Share of the images that may have no label in the store; their tokens learn from nothing."""
    num_workers: int = 2
    """Processes that decode and augment images; those of evaluation, too, from 5,000 images on."""
    tar_window: int | None = None
    """Read tar files whole and one after the other, images of this many at a time in random order: for data that
    fits neither memory nor a fast disk. None for one random order over all images."""

    def __post_init__(self) -> None:
        check_numbers(self, "data.", max_missing=SHARE, num_workers=COUNT, tar_window=NATURAL)

    @property
    def label_folders(self) -> list[str]:
        """The folders of the labels; empty without labels."""
        return [self.labels] if isinstance(self.labels, str) else self.labels or []

    @property
    def image_folders(self) -> list[str | None]:
        """Where images are: no run may lie in there."""
        return [self.train, self.unlabelled, self.val]


@dataclass(frozen=True, kw_only=True)
@coerced_fields
class ModelConfig:
    """Which network to train."""

    name: str = ""
    """`lvvit_t`, `lvvit_s`, `lvvit_m`, `lvvit_l`, `t2t_vit_14`, ..., or the name of any timm model. Left out, it is
    that of the run in `weights`, with its image size and its options, as far as these say nothing else."""
    img_size: tuple[int, int] = _UNSAID
    """Height and width of the images that it sees in training and evaluation; (224, 224) by default."""
    options: dict[str, Any] = field(default_factory=dict)
    """What else the model's constructor takes, such as `depth` or `drop_path`."""
    weights: str | None = None
    """Checkpoint to begin with: a published file (.pth.tar, .safetensors), one of our run or checkpoint folders, or one
    on the hub (hf://USER/NAME)."""
    average: bool = False
    """Begin with the running average (EMA) of the weights in that checkpoint."""
    frozen_layers: int = 0
    """How many layers, counted from the stem, keep the weights that they begin with."""

    def __post_init__(self) -> None:
        of_run = {} if self.name else _model_of_run(self.weights)
        if self.img_size == _UNSAID:
            object.__setattr__(self, "img_size", tuple(of_run.get("img_size", (224, 224))))
        if of_run:
            object.__setattr__(self, "name", of_run["name"])
            object.__setattr__(self, "options", {**of_run.get("options", {}), **self.options})
        check_numbers(self, "model.", img_size=NATURAL, frozen_layers=COUNT)
        taken = self.options.keys() & {"name", "num_classes", "img_size", "size_px"}
        if taken:
            raise ConfigError(
                f"model.options names {', '.join(sorted(taken))}, which images, model.name and model.img_size decide; "
                "leave it out there"
            )


def _model_of_run(weights: str | None) -> dict[str, Any]:
    """Return which network a run trained, or a checkpoint holds. Raises ConfigError for anything else."""
    folder = Path(local_name(weights)) if weights else None
    for path in (folder / "state.json", folder / RECIPE_FILE) if folder else ():
        if path.is_file():
            saved = read_yaml(path)
            model = dict(saved.get("recipe", saved)["model"])
            sources = ("pretrained", "checkpoint_path", "cache_dir")  # the weights are at hand
            options = {key: value for key, value in model.get("options", {}).items() if key not in sources}
            return {**model, "options": options}
    what = "is no run" if Path(weights or ".").exists() else "is not there"
    found = f"model.weights {weights} {what}" if weights else "there is no model.weights"
    raise ConfigError(
        f"model.name is missing, and {found} to say which network it is; give model.weights a run folder, or name a "
        "model (docs/models.md)"
    )


@dataclass(frozen=True, kw_only=True)
@coerced_fields
class OptimConfig:
    """How weights move: AdamW under a warm-up and a schedule."""

    lr: float
    """Peak learning rate at `lr_batch_size`; it scales linearly with the batch size."""
    lr_batch_size: int
    """The batch size that `lr` and the other rates are stated for."""
    schedule: Literal["cosine", "poly", "constant"] = "cosine"
    """How the rate falls after the warm-up: as half a cosine, in a straight line (poly of power 1), or not before the
    cool-down."""
    min_lr: float = 1e-5
    """Where the schedule ends; held during the cool-down. Scaled like `lr`."""
    warmup_lr: float = 1e-6
    """Where the warm-up starts. Scaled like `lr`."""
    warmup_epochs: float = 5.0
    """Epochs of linear warm-up, counted within the recipe's epochs."""
    warmup_steps: int | None = None
    """Steps of linear warm-up, in place of epochs."""
    cooldown_epochs: float = 0.0
    """Epochs at `min_lr` at the end, counted within the recipe's epochs."""
    weight_decay: float = 0.05
    """Decay of weights; biases, norms and what the model names (position embedding, class token) take none."""
    layer_decay: float = 1.0
    """Each layer learns at this times the rate of the layer above it; 1 for all alike, .65-.9 to fine-tune."""
    clip_grad_norm: float | None = None
    """Scale gradients down to this norm; none by default, as in the paper."""
    ema_decay: float | None = 0.99992
    """Average of the weights for evaluation; none to evaluate the weights themselves."""
    ema_warmup: bool = True
    """Let the average's decay grow from 0 as 1 - (1 + step) ** -2/3: in a short run .99992 alone is useless."""

    def __post_init__(self) -> None:
        check_numbers(self, "optim.", lr=POSITIVE, lr_batch_size=NATURAL, clip_grad_norm=POSITIVE)
        at_least_0 = ("min_lr", "warmup_lr", "warmup_epochs", "warmup_steps", "cooldown_epochs", "weight_decay")
        check_numbers(self, "optim.", **dict.fromkeys(at_least_0, COUNT))
        check_numbers(self, "optim.", layer_decay=PART, ema_decay="[0, 1)")


@dataclass(frozen=True, kw_only=True)
@coerced_fields
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
    labels: str | list[str] | None = None
    """Label store of the val images, made as that of the training images: how far the tokens agree with it."""
    probe: str | None = None
    """A few images with classes, any: how well a linear probe of frozen features and nearest neighbours name them."""
    probe_test: str | None = None
    """Images that the probes are tested on; by default every other image of `probe`, which learns from the rest."""

    @property
    def label_folders(self) -> list[str]:
        """The folders of the val images' labels; empty without."""
        return [self.labels] if isinstance(self.labels, str) else self.labels or []

    def __post_init__(self) -> None:
        positive = {"every_epochs": POSITIVE, "crop_fraction": PART}
        check_numbers(self, "eval.", **positive, batch_size=NATURAL)
        if self.probe_test is not None and self.probe is None:
            raise ConfigError("eval.probe_test tests probes that learn from eval.probe; name that folder, too")


@dataclass(frozen=True, kw_only=True)
@coerced_fields
class CheckpointConfig:
    """When the state of a run is saved, and which states are kept."""

    every_epochs: float = 1.0
    """Epochs between checkpoints; the last step always writes one."""
    keep: int = 2
    """How many of the newest are kept."""
    keep_best: bool = True
    """Keep the one that evaluated best, too; `checkpoints/best` leads to it."""
    keep_every_epochs: float | None = None
    """Keep one every so many epochs for good, too."""

    def __post_init__(self) -> None:
        check_numbers(self, "checkpoint.", keep=NATURAL, every_epochs=POSITIVE, keep_every_epochs=POSITIVE)


@dataclass(frozen=True, kw_only=True)
@coerced_fields
class TrainingConfig:
    """What the engine needs to know of a run, whatever it trains."""

    optim: OptimConfig
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig, metadata=ONE_OPTION)
    epochs: int | None = None
    """Passes over the training images."""
    num_steps: int | None = None
    """Steps of the run, in place of epochs."""
    min_epoch_steps: int = 1
    """The least steps of an epoch, however few images there are: they are then seen several times in one."""
    batch_size: int
    """Images a step: those of all processes, and of all parts that a process takes one after the other."""
    micro_batch_size: int | None = None
    """The most images that a process takes through the model at once; gradients of several such parts add up to
    the batch. None for its whole share."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """bf16 and fp16 run the forward pass under autocast, fp16 with a scaled loss; weights and averages stay fp32."""
    compile: Literal["no", "inductor", "aot_eager"] = "no"
    """Compile the model by this backend of torch.compile; inductor is the fast one and needs a C++ compiler."""
    grad_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, about a third more time."""
    sync_batchnorm: bool = False
    """Let BatchNorm take its statistics over the images of all GPUs."""
    sharded: bool = False
    """Divide weights, averages and optimizer state among the processes (FSDP2): for models too large for one."""
    seed: int = 0
    """Decides the initial weights, the order of the images and every augmentation."""

    def __post_init__(self) -> None:
        if self.epochs is None and self.num_steps is None:
            raise ConfigError("a recipe needs epochs or num_steps")
        check_numbers(self, epochs=NATURAL, num_steps=NATURAL, min_epoch_steps=NATURAL)
        check_numbers(self, batch_size=NATURAL, micro_batch_size=NATURAL)
        check_numbers(self, seed=f"[0, {2**63}]")


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

    @property
    def uses_token_labels(self) -> bool:
        """Whether tokens are trained on labels of their own."""
        return self.loss.beta > 0 and (self.data.labels is not None or self.loss.has_online_teacher)


RecipeKind = TypeVar("RecipeKind", bound=TrainingConfig)


def add_recipe_arguments(parser: Parser, kind: type[TrainingConfig] = Recipe) -> None:
    """Let a parser take `--recipe NAME|FILE` and every field of a recipe as `--a.b value`."""
    names = ", ".join(recipe_names())
    parser.add_argument("--recipe", help=f"one of {names}, or a YAML file; options override it")
    parser.add_argument("--print-config", action="store_true", help="print the recipe as options change it, and stop")
    add_config_arguments(parser, kind)


def recipe_names() -> list[str]:
    """Return the names of the recipes in the package."""
    return sorted(path.name.removesuffix(".yaml") for path in _folder().iterdir() if path.name.endswith(".yaml"))


def find_recipe(name: str | Path, *, beside: Path | None = None) -> Path:
    """Return the file of a recipe given by name or as a path. Raises ConfigError with the near names.

    `beside`: the recipe that names it, from whose folder its path leads; that of the process if None.
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
    """Return a recipe of the package by its name, or that of a YAML file. Raises ConfigError that names the file."""
    return config_from_dict(recipe_content(name, kind), kind, name=str(name))


def recipe_content(name: str | Path, kind: type[TrainingConfig]) -> dict[str, Any]:
    """Return the fields that a recipe sets, as nested dicts, those of the recipes that it extends included.

    `extends: lvvit_s` in a file (a recipe of the package, or a path from the file's folder) takes what that recipe
    says and changes what is said here: a group (`optim`) field by field, anything else, `model.options` too, as a
    whole. Raises ConfigError that names the file for one that cannot be read, for keys that `kind` does not have, and
    for recipes that extend each other.
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
