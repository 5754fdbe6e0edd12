"""Export a trained model: one safetensors file, an ONNX graph, or a folder for the Hugging Face hub.

ONNX needs the extra: pip install 'tokenlabel[export]'.
"""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from timm.models import save_for_hf
from torch import Tensor, nn

from tokenlabel.core.config import Inference
from tokenlabel.models import TimmAdapter, TokenModel
from tokenlabel.models.load import LoadedModel
from tokenlabel.models.names import OUR_MODELS
from tokenlabel.models.runs import description_of
from tokenlabel.runtime.configuration import config_as_dict
from tokenlabel.runtime.errors import ConfigError, refuse
from tokenlabel.runtime.hub import options_without_weights
from tokenlabel.runtime.process import naming
from tokenlabel.training.checkpoint import load_run

# Tolerance between the outputs of an ONNX graph and PyTorch, relative to the largest output.
EXPORT_TOLERANCE = 1e-3
REGISTER = "import tokenlabel.models  # pip install tokenlabel\n\ntokenlabel.models.register_with_timm()\n"
_MODEL_CARD = """---
library_name: timm
tags: [image-classification, timm, token-labeling]
---

# {name}, trained with token labels

```python
import timm
{register}model = timm.create_model("local-dir:FOLDER", pretrained=True)  # or "hf-hub:USER/NAME"
```
"""
# A folder with any other file may be a run, or a folder of runs, and is never replaced.
_HUB_FILES = {"config.json", "model.safetensors", "token_head.safetensors", "README.md"}


def export_run(
    run: str | Path,
    out: str | Path,
    *,
    inference: Inference | str | None = None,
    dense: bool = False,
    overwrite: bool = False,
) -> None:
    """Export the model of a run (its EMA weights, if there are any).

    `out`: a name in `.safetensors` or `.onnx`, or without a suffix for a folder for timm and the hub. `inference`:
    the kind of logits in ONNX, by default the recipe's, or class logits if no token was trained. `dense`: token logits
    as a second output, ONNX only. `overwrite`: replace an earlier export. Nothing half-written is left behind. Raises
    ConfigError.
    """
    run, out, inference = Path(run), Path(out), None if inference is None else Inference(inference)
    is_known, is_onnx = out.suffix in (".safetensors", ".onnx", ""), out.suffix == ".onnx"
    chooses_outputs = dense or inference is not None
    replaces_other = out.is_dir() and not {path.name for path in out.iterdir()} <= _HUB_FILES
    refuse(
        {
            f"{out}: expected a name in .safetensors or .onnx, or a folder without a suffix": not is_known,
            f"{out}: only .onnx has outputs to choose; leave `dense` and `inference` out": chooses_outputs
            and not is_onnx,
            f"{out} exists already; give another name, or --overwrite it": out.exists() and not overwrite,
            f"{out}: holds no model that an export wrote, so it is not replaced; give another name": out.is_file()
            and out.suffix == ".safetensors"
            and not _is_export(out),
            f"{out}: is no folder that an export made, so it is not replaced; give another name": replaces_other
            or (out.is_file() and not out.suffix),
        }
    )
    trained = load_run(run)
    temporary = out.with_name(f".writing-{out.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        written = temporary / out.name
        with naming(out):
            if is_onnx:
                write_onnx(trained, written, inference=inference or trained.heads[0], dense=dense)
            elif out.suffix:
                write_safetensors(trained, written)
            else:
                write_hub_folder(trained, written)
        if out.is_dir():
            shutil.rmtree(out)  # a folder cannot be replaced in one step
        # The weights of an ONNX graph of 2 GB and more are in a file beside it, which the graph names.
        for path in sorted(temporary.iterdir(), key=lambda path: path == written):
            path.replace(out.with_name(path.name))
    finally:
        shutil.rmtree(temporary)


def _is_export(path: Path) -> bool:
    """Return True for what `write_safetensors` wrote: no head, and no weights of a checkpoint or of elsewhere."""
    try:
        with safe_open(path, framework="pt") as file:
            return "model" in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def write_safetensors(trained: LoadedModel, path: Path) -> None:
    """Write all tensors by the network's own names (`head.weight`, `aux_head.weight`, ...).

    The metadata of the file describes how to build the model.
    """
    description = {key: json.dumps(value) for key, value in _description(trained).items()}
    model = trained.model
    assert isinstance(model, TimmAdapter)
    tensors = {name: tensor.contiguous() for name, tensor in model.backbone.state_dict().items()}
    adds_up = hasattr(model.backbone, "aux_head") and trained.token_classes is None
    token_head = "aux_head" if adds_up else "token_head"
    tensors |= {f"{token_head}.{name}": value.contiguous() for name, value in model.token_head.state_dict().items()}
    path.write_bytes(save(tensors, metadata={"format": "pt", **description}))


def write_onnx(trained: LoadedModel, path: Path, *, inference: Inference, dense: bool) -> None:
    """Write an ONNX graph, and compare its outputs in onnxruntime with PyTorch's.

    Input: `pixels` [batch, 3, height, width], float32 in [0, 1], RGB, of the recipe's size; the graph normalises them.
    Outputs: `logits` [batch, C], by `inference`, or `features` [batch, D], the mean token, of a model without class
    head; `token_logits` [batch, h, w, C] if `dense`. The batch is of any size. Raises ConfigError without the packages
    of the extra `export`, or if the outputs differ.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  torch.onnx imports it late and fails with a long traceback
    except ImportError as error:
        raise ConfigError(f"ONNX needs {error.name}: pip install 'tokenlabel[export]'") from error
    if inference not in trained.heads:
        of_others = f"tokens are about {trained.token_classes}, not the classes"
        why = of_others if trained.token_classes else "it was trained without token labels"
        raise ConfigError(f"{why}; leave --inference {inference} out (--dense gives the tokens' logits)")
    names = ["logits" if trained.model.num_classes else "features", *(["token_logits"] if dense else [])]
    network = _PixelsToLogits(trained.model, inference=inference, dense=dense)
    # A batch of 2: torch.export takes a size of 1 for a constant, not for a dynamic dimension.
    example = torch.rand(2, 3, *trained.recipe.model.img_size, generator=torch.Generator().manual_seed(0))
    program = torch.onnx.export(
        network,
        (example,),
        dynamo=True,
        dynamic_shapes=({0: "batch"},),  # torch 2.9 refuses Dim("batch") where its trace tells one image from more
        input_names=["pixels"],
        output_names=names,
        verbose=False,
    )
    assert program is not None
    description = _description(trained) | {"inference": inference.value}
    program.model.metadata_props.update({key: json.dumps(value) for key, value in description.items()})
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for pixels in (example, example[:1]):
        with torch.no_grad():
            expected = network(pixels)
        found = session.run(None, {"pixels": pixels.numpy()})
        for name, ours, theirs in zip(names, expected, found, strict=True):
            error = np.abs(ours.numpy() - theirs).max() / ours.abs().max().item()
            if not error <= EXPORT_TOLERANCE:
                raise ConfigError(f"{name} of the ONNX graph are {error:.1e} off; this model does not export")


def write_hub_folder(trained: LoadedModel, folder: Path) -> None:
    """Write a folder for `timm.create_model("local-dir:FOLDER", pretrained=True)` and the hub.

    timm's model returns class logits; those of LV-ViT, T2T-ViT and VOLO are combined with their token logits, as
    published, if these were trained. The token head of any other model is not part of timm's model: it is in
    `token_head.safetensors`.
    """
    folder.mkdir()
    model, recipe = trained.model, trained.recipe.model
    factory_only = ("stage", "pretrained_cfg", "pretrained_cfg_overlay")  # timm passes the rest to the constructor
    options = options_without_weights(recipe.options)
    options = {key: value for key, value in options.items() if key not in factory_only}
    assert isinstance(model, TimmAdapter)
    adds_up = trained.recipe.uses_token_labels and trained.token_classes is None
    network = _backbone_with_token_head(model, trained=adds_up)
    if network is model.backbone or trained.token_classes is not None:
        (folder / "token_head.safetensors").write_bytes(save(model.token_head.state_dict()))
    fixed = network.pretrained_cfg.get("fixed_input_size")
    if fixed:
        options["img_size"] = recipe.img_size
    network = copy.copy(network)  # a copy: its configuration is the recipe's preprocessing, not timm's
    network.pretrained_cfg = {
        **{key: value for key, value in network.pretrained_cfg.items() if not key.startswith("test_")},
        "input_size": (3, *recipe.img_size),
        "crop_pct": trained.recipe.eval.crop_fraction,
        "crop_mode": "center",
        "interpolation": "bicubic",
        "mean": model.mean,
        "std": model.std,
    }
    labels = {"label_names": list(trained.class_names)} if trained.class_names else {}
    save_for_hf(network, str(folder), model_config=labels, model_args=options, safe_serialization=True)
    register = REGISTER if recipe.name in OUR_MODELS else ""
    (folder / "README.md").write_text(_MODEL_CARD.format(name=recipe.name, register=register), encoding="utf-8")
    shutil.copymode(folder / "README.md", folder / "model.safetensors")  # safetensors writes with mode 600


def _backbone_with_token_head(model: TimmAdapter, *, trained: bool) -> Any:
    """Return the backbone as timm builds it: with its own token head again, if it has one (LV-ViT, VOLO).

    A token head that was not `trained` on the images' classes becomes zeros, which add nothing to the class logits.
    """
    own = model.token_head
    if not (hasattr(model.backbone, "aux_head") and isinstance(own, nn.Linear)) or model.num_classes == 0:
        return model.backbone
    network, token_head = copy.copy(model.backbone), copy.deepcopy(own)
    if not trained:
        token_head = nn.Linear(own.in_features, model.num_classes)
        for parameter in token_head.parameters():
            nn.init.zeros_(parameter)
    network._modules = {**network._modules, "aux_head": token_head}  # of the shallow copy alone
    return network


class _PixelsToLogits(nn.Module):
    """The exported graph, on the CPU: from pixels in [0, 1] to logits and, if `dense`, a map of token logits."""

    def __init__(self, model: TokenModel, *, inference: Inference, dense: bool) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).cpu().float()
        self.inference = inference
        self.dense = dense
        self.channel_mean = torch.tensor(model.mean).view(3, 1, 1)
        self.channel_std = torch.tensor(model.std).view(3, 1, 1)
        self.eval()

    def forward(self, pixels: Float[Tensor, "B 3 height width"]) -> tuple[Tensor, ...]:
        outputs = self.model((pixels - self.channel_mean) / self.channel_std)
        has_classes = outputs.class_logits.shape[1] > 0
        logits = outputs.logits(self.inference) if has_classes else outputs.tokens.mean(dim=1)
        return (logits, outputs.token_logits.unflatten(1, outputs.grid)) if self.dense else (logits,)


def _description(trained: LoadedModel) -> dict[str, Any]:
    return {
        **description_of(config_as_dict(trained.recipe)),
        "mean": trained.model.mean,
        "std": trained.model.std,
        "class_names": trained.class_names,
        "token_classes": trained.token_classes and asdict(trained.token_classes),
    }
