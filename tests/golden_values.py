"""What is in `golden/`, and the weights and the image that it is for: outputs of the published implementations, and
losses of steps."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).parent / "golden"


def published_keys(name: str) -> dict[str, list[int]]:
    return json.loads((GOLDEN / f"{name}.keys.json").read_text())


def formula_weights(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """Return the weights that the golden outputs were computed with, by each tensor's name and rank."""
    norms = tuple(f"{norm}.weight" for norm in ("norm", "norm1", "norm2", "bn1", "bn2", "bn3"))
    weights = {}
    for k, name in enumerate(sorted(shapes)):
        shape = shapes[name]
        i = np.arange(np.prod(shape))
        wave = np.sin(0.7 * (k + 1) + 1.7 * i + 0.31 * np.sqrt(i) * (k % 7 + 1)).reshape(shape)
        if name.endswith("num_batches_tracked"):
            values = np.zeros(shape)
        elif name.endswith("running_var"):
            values = 1 + 0.5 * np.abs(wave)
        elif name.endswith(norms):
            values = 1 + 0.1 * wave
        elif name.endswith(("bias", "running_mean")):
            values = 0.05 * wave
        elif name in ("pos_embed", "cls_token"):
            values = wave * np.sqrt(2 / 2500)
        else:
            values = wave * np.sqrt(2 / np.prod(shape[1:]))
        weights[name] = torch.from_numpy(np.asarray(values, dtype=np.float32))
    return weights


def formula_image() -> Tensor:
    i = np.arange(3 * 224 * 224)
    return torch.from_numpy(np.sin(0.013 * i + 0.5 * np.sin(0.00071 * i)).astype(np.float32)).view(1, 3, 224, 224)


def golden_outputs(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


@torch.no_grad()
def draw_weights(model: nn.Module) -> None:
    """Fill a model with weights that no version of PyTorch decides: NumPy draws them, in the order of their names.

    What steps draw after that (mixing, erasing, dropout, drop path) is the same in torch 2.9 and 2.14; of the functions
    that initialise models only `trunc_normal_` is not.
    """
    rng = np.random.Generator(np.random.PCG64(0))
    for name, weight in sorted(model.named_parameters()):
        if weight.ndim == 1:  # shifts, and scales of norms
            weight.fill_(0 if name.endswith("bias") else 1)
        else:  # kernels, then matrices and embeddings
            std = np.prod(weight.shape[1:]) ** -0.5 if weight.ndim == 4 else 0.02
            weight.copy_(torch.from_numpy(rng.normal(0, std, tuple(weight.shape)).astype(np.float32)))
