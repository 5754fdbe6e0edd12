"""One optimizer step: a task with its optimizer, schedule and EMA, made ready for the processes, and how it moves.

A step's batch is that of all processes. Each takes its share through the model in equal parts, one after the other,
and the gradients of all parts of all processes are averaged before the weights move.
"""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from timm.layers.norm_act import convert_sync_batchnorm
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tokenlabel.core.step import FOR_MODEL, Part
from tokenlabel.data.samplers import BatchSampler
from tokenlabel.runtime.distributed import Ranks, shard
from tokenlabel.runtime.errors import ConfigError
from tokenlabel.runtime.runlog import Stopwatch
from tokenlabel.training.checkpoint import TrainState
from tokenlabel.training.recipe import OptimConfig, TrainingConfig
from tokenlabel.training.tasks import Task


@dataclass(frozen=True, eq=False)
class Trainer:
    """A task with everything that moves its weights."""

    task: Task[Any]
    ranks: Ranks
    state: TrainState
    forward: nn.Module
    grad_accum_steps: int

    @cached_property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch of the schedule: each image once, or more often to make `min_epoch_steps`."""
        recipe = self.task.recipe
        return max(recipe.min_epoch_steps, self.task.num_images // recipe.batch_size)

    @cached_property
    def num_steps(self) -> int:
        """Steps of the whole run."""
        recipe = self.task.recipe
        return recipe.num_steps or (recipe.epochs or 0) * self.steps_per_epoch

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        recipe = self.task.recipe
        return learning_rate(
            step,
            recipe.optim,
            batch_size=recipe.batch_size,
            steps_per_epoch=self.steps_per_epoch,
            num_steps=self.num_steps,
        )

    def due(self, done: int, every_epochs: float) -> bool:
        """Whether something that happens every so many epochs, and at the end, happens after `done` steps."""
        return done == self.num_steps or done % max(1, round(every_epochs * self.steps_per_epoch)) == 0

    def sampler(self, start_step: int) -> BatchSampler:
        """Return which images this process takes from a step on."""
        recipe = self.task.recipe
        return BatchSampler(
            num_images=self.task.num_images,
            batch_size=recipe.batch_size,
            seed=recipe.seed,
            start_step=start_step,
            num_steps=self.num_steps,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            grad_accum_steps=self.grad_accum_steps,
            order=self.task.order(),
        )

    @cached_property
    def _sampler(self) -> BatchSampler:
        return self.sampler(0)

    def part(self, step: int, number: int) -> Part:
        """Return micro-batch `number` of this process in a step; its random numbers are seeded by it."""
        return Part(self.task.recipe.seed, step, self._sampler.part_start(number))


def prepare(task: Task[Any], ranks: Ranks) -> Trainer:
    """Return a task with its optimizer and average, made ready for the processes and the precision of its recipe."""
    recipe, model = task.recipe, task.model
    grad_accum_steps = parts_of_batch(recipe, ranks, task.device)
    for parameter in model.parameters():  # channels last, as the images: faster convolutions
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    if recipe.grad_checkpointing:
        model.set_grad_checkpointing()
    if recipe.sync_batchnorm:
        convert_sync_batchnorm(model)  # PyTorch's own would drop the activations that timm fuses with norms
    ema = create_ema(model, recipe.optim, sharded=recipe.sharded)
    if recipe.sharded:
        for module in (model, ema.module) if ema else (model,):
            shard(module, module.fsdp_blocks(), task.device)
    if recipe.compile != "no":
        model.compile(backend=recipe.compile)
    forward: nn.Module = task.step
    if ranks.world_size > 1 and not recipe.sharded:
        forward = DistributedDataParallel(forward)
    optimizer = create_optimizer(model, recipe.optim)
    scaler = torch.amp.GradScaler(task.device.type) if recipe.precision == "fp16" else None
    return Trainer(task, ranks, TrainState(model, optimizer, ema, scaler), forward, grad_accum_steps)


def parts_of_batch(recipe: TrainingConfig, ranks: Ranks, device: torch.device) -> int:
    """Return in how many parts a process takes its share of a batch through the model.

    Raises ConfigError for a recipe that these processes or this device cannot train by.
    """
    if recipe.sync_batchnorm and device.type != "cuda":
        raise ConfigError("sync_batchnorm is for GPUs; on the CPU set sync_batchnorm to false")
    if recipe.sharded and not dist.is_initialized():
        raise ConfigError("sharded divides a model among processes; start them with torchrun, or set it to false")
    share, rest = divmod(recipe.batch_size, ranks.world_size)
    most = recipe.micro_batch_size or share
    num_images = min(most, share)
    if rest or share % num_images:
        raise ConfigError(
            f"batch_size {recipe.batch_size} over {ranks.world_size} processes in parts of {most} images leaves a "
            "rest; choose batch_size as a multiple of processes x micro_batch_size"
        )
    recipe.check_part(num_images)
    return share // num_images


@dataclass(frozen=True, eq=False)
class StepResult:
    """The values of a step, losses and the norm of its gradient, and the keys of this rank's images."""

    values: dict[str, Tensor]
    keys: Sequence[str]


def train_step(trainer: Trainer, batches: Iterator[Any], step: int, watch: Stopwatch) -> StepResult:
    """Run one optimizer step; return the losses as tensors, without a device sync."""
    task, state, grad_accum_steps = trainer.task, trainer.state, trainer.grad_accum_steps
    recipe, sums, keys = task.recipe, {}, []
    state.model.train()
    state.optimizer.zero_grad()
    for number in range(grad_accum_steps):
        # Each part is a mean over equally many images: the mean of the parts' losses is the loss of the batch.
        with watch.part("data"):
            batch = next(batches).to(task.device)
        part = trainer.part(step, number)
        torch.manual_seed(part.random_seed(purpose=FOR_MODEL))
        with _sync_only_last(trainer, number == grad_accum_steps - 1):
            losses = trainer.forward(batch, part, watch)
            loss = losses["loss"] / grad_accum_steps
            (state.scaler.scale(loss) if state.scaler else loss).backward()
        sums = {name: sums.get(name, 0) + loss.detach() / grad_accum_steps for name, loss in losses.items()}
        keys += batch.keys
    set_learning_rate(state.optimizer, trainer.learning_rate(step))
    sums |= _optimizer_step(state, recipe.optim.clip_grad_norm)
    if state.ema is not None:
        state.ema.update(state.model, step=step)
    return StepResult(sums, keys)


def _optimizer_step(state: TrainState, clip_norm: float | None) -> dict[str, Tensor]:
    """Clip gradients and take the optimizer step; return the norm of the gradient.

    With a scaled loss that overflowed there is no step and the norm counts as 0; `skipped` says so.
    """
    if state.scaler is not None:
        state.scaler.unscale_(state.optimizer)
    # In two parts: `clip_grad_norm_` without a bound would still multiply every gradient by 1.
    norm = nn.utils.get_total_norm([p.grad for p in state.model.parameters() if p.grad is not None])
    if clip_norm is not None:
        nn.utils.clip_grads_with_norm_(state.model.parameters(), clip_norm, norm)
    if state.scaler is not None:
        state.scaler.step(state.optimizer)
        state.scaler.update()
    else:
        state.optimizer.step()
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if state.scaler is None:
        return {"gradient_norm": norm}
    return {"gradient_norm": norm.nan_to_num(0, 0, 0), "skipped": (~norm.isfinite()).float()}


def _sync_only_last(trainer: Trainer, last: bool) -> AbstractContextManager[None]:
    """Return a context in which backward() averages gradients over processes only if it is a step's last."""
    model, forward = trainer.state.model, trainer.forward
    # Averaging after each part would send gradients as often as there are parts, for the same sum.
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    if isinstance(forward, DistributedDataParallel) and not last:
        return forward.no_sync()
    return nullcontext()


def create_optimizer(model: Any, config: OptimConfig) -> torch.optim.AdamW:
    """Return AdamW over the trainable parameters, grouped by layer and by whether they decay.

    `model`: says which they are by `layers()` and `no_weight_decay()`, as every `TokenModel` and `SegmentationModel`.
    A group's `lr_scale` is what the learning rate of a step is multiplied with (`set_learning_rate`).
    """
    spared = model.no_weight_decay()
    layers = model.layers() if config.layer_decay != 1 else {}  # not every network can say
    top = max(layers.values(), default=0)
    groups: dict[tuple[bool, int], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and name not in spared  # biases and norms have one dimension
            layer = layers.get(name, top)
            weight_decay = config.weight_decay if decays else 0.0
            scale = config.layer_decay ** (top - layer)
            new = {"params": [], "weight_decay": weight_decay, "lr_scale": scale}
            groups.setdefault((decays, layer), new)["params"].append(parameter)
    ordered = [groups[key] for key in sorted(groups, reverse=True)]
    on_gpu = next(model.parameters()).is_cuda
    # One kernel for all weights on a GPU; None leaves the choice, and so each bit of the CPU's results, to PyTorch.
    return torch.optim.AdamW(ordered, lr=config.lr, fused=True if on_gpu else None)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of a step, each group's by its layer."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


def create_ema(model: nn.Module, config: OptimConfig, *, sharded: bool = False) -> ModelEmaV3 | None:
    """Return a copy of the model that will hold the average of its weights, if the config wants one.

    `sharded`: both will be divided among processes, which the fast joint update of many tensors cannot take.
    """
    if config.ema_decay is None:
        return None
    return ModelEmaV3(model, decay=config.ema_decay, use_warmup=config.ema_warmup, foreach=not sharded)


def outer_steps(config: OptimConfig, steps_per_epoch: int) -> tuple[int, int]:
    """Return the steps of warm-up and of cool-down, between which the schedule runs."""
    warmup = config.warmup_steps
    if warmup is None:
        warmup = round(config.warmup_epochs * steps_per_epoch)
    return warmup, round(config.cooldown_epochs * steps_per_epoch)


def learning_rate(step: int, config: OptimConfig, *, batch_size: int, steps_per_epoch: int, num_steps: int) -> float:
    """Return the learning rate of a step: linear warm-up, schedule, cool-down; scaled by the batch size."""
    scale = batch_size / config.lr_batch_size
    warmup, cooldown = outer_steps(config, steps_per_epoch)
    falling = num_steps - warmup - cooldown
    if step < warmup:
        return scale * (config.warmup_lr + (config.lr - config.warmup_lr) * step / warmup)
    progress = min(1.0, (step - warmup) / falling) if falling > 0 else 1.0
    match config.schedule:
        case "cosine":
            height = (1 + math.cos(math.pi * progress)) / 2
        case "poly":
            height = 1 - progress
        case "constant":
            height = float(progress < 1)
    return scale * (config.min_lr + (config.lr - config.min_lr) * height)


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory that tensors on a GPU, or this process on the CPU, ever held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
