"""The optimizer, its parameter groups, the schedule as a function of the step, and the averaged weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.utils.model_ema import ModelEmaV3
from torch import nn

from tokenlabel.training.recipe import OptimConfig


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
