"""From a recipe to trained weights: build, step, loop.

A step is a function of the weights, the recipe and the number of the step: its images, their augmentation, the
mix and every random draw inside the model follow from (seed, step). So a run that was stopped anywhere
continues from its last checkpoint to the very same weights, and nothing random is ever stored.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor

from tokenlabel.alignment import align
from tokenlabel.augment import TrainTransform
from tokenlabel.checkpoint import Trained, list_checkpoints, load_checkpoint, save_checkpoint
from tokenlabel.data import (
    Batch,
    BatchSampler,
    EvalBatchSampler,
    TokenLabelDataset,
    check_images,
    check_labels,
    make_loader,
    normalize_images,
)
from tokenlabel.erasing import Erased, erase
from tokenlabel.evaluate import Evaluation, evaluate, evaluation_set
from tokenlabel.losses import token_label_loss
from tokenlabel.mixing import MixPlan, mix_targets, sample_mix
from tokenlabel.models import TokenModel, create_model, load_published
from tokenlabel.optim import create_ema, create_optimizer, learning_rate, set_learning_rate
from tokenlabel.recipe import (
    RECIPE_FILE,
    ModelConfig,
    Recipe,
    RecipeError,
    read_recipe,
    settings,
    write_recipe,
)
from tokenlabel.runlog import RunLog, Stopwatch
from tokenlabel.sources import open_images
from tokenlabel.store import LabelStore
from tokenlabel.targets import TokenTargets, class_targets

LOG_EVERY_STEPS = 10


class Interrupted(Exception):  # noqa: N818  (not an error: somebody asked the run to stop)
    """The run was asked to stop, has saved its state, and will continue when started again."""

    def __init__(self, step: int, signal_number: int) -> None:
        super().__init__(f"stopped after step {step:,}; the same command continues from there")
        self.exit_status = 128 + signal_number


class DivergedError(ValueError):
    """The loss is no longer a number."""


@dataclass(frozen=True, eq=False)
class Training:
    """Everything that a step needs, built from a recipe."""

    recipe: Recipe
    model: TokenModel
    optimizer: torch.optim.Optimizer
    ema: ModelEmaV3 | None
    train_set: TokenLabelDataset
    val_set: TokenLabelDataset | None
    steps_per_epoch: int
    device: torch.device

    @property
    def num_steps(self) -> int:
        """Steps of the whole run."""
        return self.recipe.epochs * self.steps_per_epoch

    @property
    def trained(self) -> Trained:
        """What changes as it trains."""
        return Trained(self.model, self.optimizer, self.ema)

    @property
    def grid(self) -> tuple[int, int]:
        """The token grid (h, w) of the model."""
        return self.model.grid_for(self.recipe.model.size_px)


def train(recipe: Recipe, run: Path, *, device: torch.device) -> Evaluation | None:
    """Train by a recipe in a run folder, from its newest checkpoint if there is one; return the last evaluation.

    The folder receives recipe.yaml, metrics.jsonl and checkpoints/. Raises RecipeError if it holds a run of
    another recipe, ValueError for data that cannot be trained on, `Interrupted` after SIGINT or SIGTERM.
    """
    claim(run, recipe)
    training = build(recipe, device=device)
    checkpoints = list_checkpoints(run)
    step = load_checkpoint(checkpoints[-1], training.trained) if checkpoints else 0
    log = RunLog(run, start_step=step, num_steps=training.num_steps, title=run.name)
    try:
        return _loop(training, run, log, start_step=step)
    finally:
        log.close()


def claim(run: Path, recipe: Recipe) -> None:
    """Make the run folder, or make sure that it belongs to a run of this very recipe."""
    path = run / RECIPE_FILE
    if path.exists():
        ours, theirs = settings(recipe), settings(read_recipe(path))
        differing = [key for key in ours | theirs if ours.get(key) != theirs.get(key)]
        if differing:
            key = differing[0]
            raise RecipeError(
                f"{run} holds a run of another recipe ({key}: {theirs.get(key)} there, {ours.get(key)} here; "
                f"{len(differing)} differ); choose another --run, or remove the folder"
            )
        return
    run.mkdir(parents=True, exist_ok=True)
    write_recipe(recipe, path)


def build(recipe: Recipe, *, device: torch.device) -> Training:
    """Build data, model and optimizer of a recipe, and check that they fit together."""
    source = check_images(open_images(recipe.data.train), skip_broken=recipe.data.skip_broken)
    store = LabelStore(recipe.data.labels) if recipe.data.labels and recipe.loss.beta > 0 else None
    if store is not None:
        check_labels(source, store)
    torch.manual_seed(recipe.seed)
    size_px = recipe.model.size_px
    model = _begin(recipe.model, num_classes=len(source.class_names)).to(device)
    return Training(
        recipe=recipe,
        model=model,
        optimizer=create_optimizer(model, recipe.optim),
        ema=create_ema(model, recipe.optim),
        train_set=TokenLabelDataset(
            source, TrainTransform(recipe.augment, size_px), seed=recipe.seed, store=store
        ),
        val_set=evaluation_set(recipe, class_names=source.class_names) if recipe.data.val else None,
        steps_per_epoch=max(1, len(source) // recipe.batch_size),
        device=device,
    )


def _begin(config: ModelConfig, *, num_classes: int) -> TokenModel:
    """Return the model as it is before the first step."""
    model = create_model(config.name, num_classes=num_classes, size_px=config.size_px, **config.options)
    if config.weights is not None:
        load_published(model, config.weights, average=config.average)
    model.freeze(config.frozen_layers)
    for parameter in model.parameters():  # convolutions run faster so
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return model


def step_seed(seed: int, step: int) -> int:
    """Return the seed of everything random in a step, different for each run seed and step."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> 1)


def train_step(training: Training, batch: Batch, step: int, watch: Stopwatch) -> dict[str, Tensor]:
    """Move the weights by one batch; return the loss, its parts and the gradient norm, not yet waited for."""
    recipe, model = training.recipe, training.model
    model.train()
    torch.manual_seed(step_seed(recipe.seed, step))  # drop path and dropout
    generator = step_generator(recipe, step)
    images = normalize_images(batch.images, mean=model.mean, std=model.std)
    erased = erase(images, recipe.erase, generator=generator) if recipe.erase.probability > 0 else None
    images = erased.images if erased is not None else images
    with watch.part("targets"):
        plan = draw_plan(recipe, len(images), grid=training.grid, generator=generator)
        plan = plan and plan.to(training.device)
        class_target, token_target = make_targets(recipe, batch, plan, grid=training.grid, erased=erased)
    with torch.autocast(training.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
        outputs = model(images, plan)
        loss = token_label_loss(outputs, class_target, token_target, beta=recipe.loss.beta)
    training.optimizer.zero_grad()
    loss.total.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optim.clip_grad_norm or math.inf)
    set_learning_rate(training.optimizer, _learning_rate(training, step))
    training.optimizer.step()
    if training.ema is not None:
        training.ema.update(model, step=step)
    return {
        "loss": loss.total.detach(),
        "class_loss": loss.class_part,
        "token_loss": loss.token_part,
        "gradient_norm": norm,
    }


def step_generator(recipe: Recipe, step: int) -> torch.Generator:
    """Return the source of what a step erases and mixes, on the CPU."""
    return torch.Generator().manual_seed(step_seed(recipe.seed, step))


def draw_plan(
    recipe: Recipe, num_images: int, *, grid: tuple[int, int], generator: torch.Generator
) -> MixPlan | None:
    """Draw how a step mixes its images; None if it does not."""
    if torch.rand((), generator=generator) >= recipe.mix.probability:
        return None
    return sample_mix(
        recipe.mix.kind,
        num_images,
        grid=grid,
        size_px=recipe.model.size_px,
        alpha=recipe.mix.alpha,
        per_sample=recipe.mix.per_sample,
        generator=generator,
    )


def make_targets(
    recipe: Recipe,
    batch: Batch,
    plan: MixPlan | None,
    *,
    grid: tuple[int, int],
    erased: Erased | None = None,
) -> tuple[TokenTargets, TokenTargets | None]:
    """Return what the class token (the ground truth) and the other tokens are trained to say.

    Images are erased first and mixed then, and so are their targets.
    """
    smoothing, num_classes = recipe.loss.label_smoothing, batch.num_classes
    class_target = class_targets(batch.class_ids).smoothed(smoothing, num_classes)
    class_target = mix_targets(class_target, plan, (1, 1))
    if batch.score_maps is None:
        return class_target, None
    token_target = align(batch.score_maps, batch.views, grid).smoothed(smoothing, num_classes)
    if erased is not None and recipe.erase.ignore_erased:
        token_target = erased.reweight(token_target, grid)
    return class_target, mix_targets(token_target, plan, grid)


def _loop(training: Training, run: Path, log: RunLog, *, start_step: int) -> Evaluation | None:
    recipe, num_steps = training.recipe, training.num_steps
    sampler = BatchSampler(
        num_images=len(training.train_set),
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        start_step=start_step,
        num_steps=num_steps,
    )
    batches = iter(make_loader(training.train_set, sampler, num_workers=recipe.data.num_workers))
    watch, window, evaluation = Stopwatch(), _Window(), None
    with _signals() as stop:
        for step in range(start_step, num_steps):
            with watch.part("data"):
                batch = next(batches).to(training.device)
            window.add(train_step(training, batch, step, watch), num_images=len(batch.images))
            done = step + 1
            stopping = stop[0] if stop else None  # asked now: what comes later waits for the next step
            saving = _due(training, done, recipe.checkpoint_every_epochs) or stopping is not None
            log.bar.update()
            if done % LOG_EVERY_STEPS == 0 or saving:  # a state that diverged is never saved
                window.report(log, done, seconds=watch.lap(), learning_rate=_learning_rate(training, step))
            if _due(training, done, recipe.eval.every_epochs):
                evaluation = _evaluate(training, log, done)
                watch.lap()
            if saving:
                class_names = training.train_set.source.class_names
                save_checkpoint(run, done, training.trained, recipe=recipe, class_names=class_names)
            if stopping is not None and done < num_steps:
                raise Interrupted(done, stopping)
    return evaluation or _evaluate(training, log, num_steps)


def _learning_rate(training: Training, step: int) -> float:
    return learning_rate(
        step,
        training.recipe.optim,
        batch_size=training.recipe.batch_size,
        steps_per_epoch=training.steps_per_epoch,
        num_steps=training.num_steps,
    )


def _due(training: Training, done: int, every_epochs: float) -> bool:
    """Whether something that happens every so many epochs, and at the end, happens after `done` steps."""
    return done == training.num_steps or done % max(1, round(every_epochs * training.steps_per_epoch)) == 0


def _evaluate(training: Training, log: RunLog, done: int) -> Evaluation | None:
    """Evaluate the averaged weights where there are some, and write the figures down."""
    if training.val_set is None:
        return None
    recipe = training.recipe
    sampler = EvalBatchSampler(num_images=len(training.val_set), batch_size=recipe.eval.batch_size)
    evaluation = evaluate(
        training.ema.module if training.ema is not None else training.model,
        make_loader(training.val_set, sampler, num_workers=0),
        inference=recipe.eval.inference,
        device=training.device,
        precision=recipe.precision,
    )
    log.write(done, kind="eval", **evaluation.as_dict())
    log.say(f"step {done:,}: top-1 {evaluation.top1:.1%}, loss {evaluation.loss:.3f}")
    return evaluation


@dataclass(eq=False)
class _Window:
    """Adds up what steps return until it is reported, so that the device need not be waited for at each."""

    num_images: int = 0
    num_steps: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, values: dict[str, Tensor], *, num_images: int) -> None:
        self.num_images += num_images
        self.num_steps += 1
        self.sums = {name: self.sums.get(name, 0) + value for name, value in values.items()}

    def report(self, log: RunLog, done: int, *, seconds: dict[str, float], learning_rate: float) -> None:
        """Write the means of the window, then forget them. Raises DivergedError if the loss is not finite."""
        means = {name: float(total) / self.num_steps for name, total in self.sums.items()}
        if not math.isfinite(means["loss"]):
            raise DivergedError(
                f"the loss was {means['loss']} within steps {done - self.num_steps} to {done - 1}; "
                "the last checkpoint is from before; try a lower optim.lr, optim.clip_grad_norm, or precision fp32"
            )
        total_s = seconds.pop("total")
        shares = {f"{name}_share": part_s / total_s for name, part_s in seconds.items()}
        images_per_s = self.num_images / total_s
        log.write(done, kind="train", lr=learning_rate, images_per_s=images_per_s, **shares, **means)
        log.bar.set_postfix(loss=f"{means['loss']:.3f}", images_per_s=f"{images_per_s:.0f}")
        self.num_images, self.num_steps, self.sums = 0, 0, {}


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list, so that a step is never cut in two; a second one ends at once."""
    received: list[int] = []

    def remember(number: int, _: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
