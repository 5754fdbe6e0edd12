"""Load weights into networks of other image sizes and class counts, or with other names that timm translates."""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from tokenlabel.data.class_names import imagenet_names
from tokenlabel.data.classes import are_numbers, difference, ids_among, say_order
from tokenlabel.models.positions import grid_of, resize_all_positions
from tokenlabel.models.runs import read_description
from tokenlabel.models.vision_transformer import VisionTransformer
from tokenlabel.models.weight_files import Weights, find_weights, read_class_names
from tokenlabel.runtime.errors import ModelError, first_line
from tokenlabel.runtime.hub import hub_or_cache, options_without_weights
from tokenlabel.runtime.process import say

LOGGER = logging.getLogger(__name__)

Tokens = Literal["classes", "same", "other"]

# Names of classifiers in files that timm renames. The names in its own models are in their configurations.
CLASSIFIERS = ("head", "head.fc", "fc", "classifier", "last_linear")

# Where timm looks for weights, and how many rows of the classifier in its own files it skips.
HUB_FIELDS = ("url", "file", "hf_hub_id", "hf_hub_filename", "source", "label_offset")


@dataclass(frozen=True, slots=True)
class Loaded:
    """The tensors of a model that a file did not fill as they are.

    `new_heads`: parameters of heads that the file lacks or has for other classes. `resized`: resized tensors, such as
    position embeddings for another grid.
    """

    new_heads: tuple[str, ...]
    resized: tuple[str, ...]


def load_published(
    model: Any,
    path: str | Path,
    *,
    average: bool | None = False,
    grid: tuple[int, int] | None = None,
    rows: Callable[[int], Mapping[int, int]] | None = None,
    tokens: Tokens = "classes",
) -> Loaded:
    """Load a checkpoint of anybody's into a model, which may be of another image size or class count.

    `model`: a `TimmAdapter`, such as `create_model` returns. `path`: `.safetensors`, `.pth`, `.pth.tar` and the like,
    or one of our checkpoint folders. `average`: take the EMA weights in the file; None if it has some. For the rest
    see `load`.
    """
    weights = find_weights(path, model.backbone.state_dict(), average=average)
    return load(model, weights, grid=grid, rows=rows, tokens=tokens)


def load(
    model: Any,
    weights: Weights,
    *,
    grid: tuple[int, int] | None = None,
    rows: Callable[[int], Mapping[int, int]] | None = None,
    tokens: Tokens = "classes",
    spared: Collection[str] = (),
) -> Loaded:
    """Load the tensors of a file into a model; timm itself adapts other sizes and names.

    `grid`: token grid (h, w) of the file's position embeddings; by default that of the image size which a file of ours
    states, else a square or the model's, whichever their number and what they hold suggest.
    `rows`: a function from the row count of a head in the file to the row of each class that the model and the file
    share by name; a head of another class count without shared classes stays new, with a warning. A token head that the
    file lacks begins as the classifier. `tokens`: the classes of the file's token head: "classes", those of its
    classifier, as in the model; "same", others than those, but the model's; "other": the model's token head stays new.
    `spared`: names in the model that need not fit. Raises ModelError if anything else does not fit; the model is then
    unchanged.
    """
    path, wanted = weights.path, model.state_dict()
    if tokens == "other":
        weights = replace(weights, token_head={})
    modules = ("token_head.", *(f"backbone.{name}." for name in classifiers(model.backbone)))
    heads = [name for name in wanted if name.startswith(modules)]
    grid = grid or grid_of(model.backbone, model.grid, weights)
    found, adapted = _adapt(model, weights, grid=grid, spared={*heads, *spared})
    by_name = [name for name in heads if tokens == "classes" or not name.startswith("token_head.")] if rows else []
    new_heads = tuple(sorted(fit_heads(found, wanted, heads, path, rows, by_name)[0] - {*spared}))
    as_classifier = _begin_as_classifier(model, found, new_heads) if tokens == "classes" else []
    fitting = {name: found[name] for name in wanted if name in found and found[name].shape == wanted[name].shape}
    model.load_state_dict(fitting, strict=False)
    resized = tuple(name for name in fitting if name not in heads and name in adapted)
    if anew := [name for name in new_heads if name not in as_classifier]:
        LOGGER.warning("%s has nothing for %s: they are newly initialised", path, ", ".join(anew))
    if as_classifier:
        say(f"{path} has no token head: it begins as the classifier")
    if resized:
        LOGGER.info("%s: resized to other images: %s", path, ", ".join(resized))
    return Loaded(new_heads=new_heads, resized=resized)


def load_all(model: nn.Module, tensors: Mapping[str, Tensor], *, name: str) -> None:
    """Load the tensors of a checkpoint of ours. Raises ModelError that says which are not those of the model."""
    if complaint := misfit(tensors, model.state_dict(), spared=()):
        raise ModelError(
            f"{name} holds another network than its recipe makes here: {complaint}; its state.json names the versions "
            "of the packages that it was trained with"
        )
    model.load_state_dict(tensors)


def _adapt(
    model: Any, weights: Weights, *, grid: tuple[int, int] | None, spared: Collection[str]
) -> tuple[dict[str, Tensor], set[str]]:
    """Return a file's tensors in the model's names and sizes, apart from `spared`; and which of them were resized."""
    wanted, name = model.state_dict(), str(weights.path)
    found = {f"backbone.{key}": tensor for key, tensor in weights.backbone.items()}
    token_head = {f"token_head.{key}": tensor for key, tensor in weights.token_head.items()}
    shapes, resized = {key: tensor.shape for key, tensor in found.items()}, set[str]()
    create: Callable[..., nn.Module] | None = model.rebuild
    # Our own networks have only position embeddings to resize; timm's may have more that depends on the grid.
    ours = isinstance(model.backbone, VisionTransformer) or create is None
    if ours or grid is not None:
        resized |= {*resize_all_positions(found, model, grid=grid, name=name)}
    differences = partial(misfit, wanted=wanted, spared=spared, called=weights.name_in_file)
    complaint = differences(found)
    if complaint and not ours and create is not None:
        backbone = {key.removeprefix("backbone."): tensor for key, tensor in found.items()}
        with suppress(ModelError):  # the list of names below says more than timm's error
            network = build_with(create, replace(weights, backbone=backbone), like=model.backbone)
            found = {adapter_name(key): tensor for key, tensor in network.state_dict().items()}
            complaint = differences(found)
    if complaint and not ours:  # timm cannot resize VOLO, CaiT and others
        with suppress(ModelError):
            resized |= {*resize_all_positions(found, model, grid=grid, name=name)}
            complaint = differences(found)
    if complaint:
        about, what = read_description(weights.path), "is for another model or other options"
        theirs, options = about.get("model", model.name), options_without_weights(about.get("options", {}))
        if theirs != model.name:
            like = f"--model.name {theirs} --model.options '{json.dumps(options)}'"
            what = f"holds {theirs}, not {model.name} ({like} makes a like one)"
        raise ModelError(f"{name} {what}: {complaint}")
    resized |= {key for key, shape in shapes.items() if key in found and found[key].shape != shape}
    return found | token_head, resized


def build_with(create: Callable[..., nn.Module], weights: Weights, *, like: nn.Module) -> nn.Module:
    """Return a new timm model with a file's weights and classes: timm adapts names, image size and patch size.

    `create`: makes the model as `timm.create_model` does. `like`: one that it made. Raises ModelError.
    """
    # timm adapts weights only while it creates a model, so the file is passed off as the pretrained weights.
    overlay: dict[str, Any] = dict.fromkeys(HUB_FIELDS) | {"num_classes": count_classes(weights, like)}
    if weights.path.suffix == ".npz":  # of the original ViTs in JAX, which timm has a loader for
        overlay |= {"file": str(weights.path), "custom_load": True}
    else:
        tensors = dict(weights.backbone)
        if hasattr(like, "aux_head"):
            tensors |= {f"aux_head.{name}": tensor for name, tensor in weights.token_head.items()}
        overlay |= {"state_dict": tensors, "custom_load": False}
    network: Any = None
    # Forked, so that the initialisation of this network does not change the random numbers of the run.
    with _missing_in_timm() as missing, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"timm\.layers\.interpolate")  # about how it indexes
        try:
            with torch.random.fork_rng(devices=[]), hub_or_cache(online=False):
                network = create(num_classes=overlay["num_classes"], pretrained=True, pretrained_cfg_overlay=overlay)
        except Exception as error:  # timm's loaders raise whatever they run into
            missing.append(first_line(error))
    if missing:
        wanted = like.state_dict()
        heads = tuple(f"{name}." for name in ("aux_head", *classifiers(like)))
        complaint = misfit(
            weights.backbone,
            wanted,
            spared=[name for name in wanted if name.startswith(heads)],
            called=lambda name: weights.name_in_file(f"backbone.{name}"),
        )
        why = complaint if weights.backbone and complaint else missing[0]
        if weights.path.suffix == ".npz" and "load_pretrained" in why:  # timm's, about a function of its own
            why = (
                "it has not the arrays of a ViT of JAX, the only .npz files that are read; save weights as .safetensors"
            )
        raise ModelError(f"{weights.path} is for another model or other options: {why}")
    network.pretrained_cfg.pop("state_dict", None)
    return network


@contextmanager
def _missing_in_timm() -> Iterator[list[str]]:
    """Collect what timm logs about missing parameters: it loads some models, such as dla, with strict=False."""
    found: list[str] = []
    logger = logging.getLogger("timm.models._builder")

    def _collect(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if message.startswith("Missing keys"):
            found.append(message)
        return record.levelno >= level and not message.startswith("Unexpected keys")

    level = logger.getEffectiveLevel()
    before = logger.level
    logger.setLevel(logging.INFO)
    logger.addFilter(_collect)
    try:
        yield found
    finally:
        logger.removeFilter(_collect)
        logger.setLevel(before)


def classifiers(network: Any) -> tuple[str, ...]:
    """Return the names of a timm model's classifiers."""
    names = getattr(network, "pretrained_cfg", {}).get("classifier") or CLASSIFIERS
    return (names,) if isinstance(names, str) else tuple(names)


def count_classes(weights: Weights, network: nn.Module) -> int:
    """Return the number of classes of a network's classifier in a file; 0 if it has none."""
    if weights.path.suffix == ".npz":
        with np.load(weights.path) as arrays:
            return len(arrays["head/bias"]) if "head/bias" in arrays else 0
    for name in (*classifiers(network), *CLASSIFIERS):
        weight = weights.backbone.get(f"{name}.weight")
        if weight is not None and weight.ndim in (2, 4):
            return len(weight)
    return 0


def class_rows(path: str | Path, class_names: Sequence[str], count: int) -> dict[int, int]:
    """Return each class's row in heads of `count` rows in a file, by the class names in the file, else by ImageNet's.

    Prints whose classes the rows are taken for where no name tells, and there are as many.
    """
    stated = read_class_names(path)
    theirs = stated if len(stated) == count else () if stated else imagenet_names(count)
    rows = {row: i for row, i in enumerate(ids_among(class_names, theirs)) if i >= 0}
    if rows or count != len(class_names):
        return rows
    if len(stated) != count or are_numbers(stated):
        say_order(class_names, them=str(path), overrule="class_names in the file would settle it")
    else:
        unlike = difference(stated, class_names, count=count, them="the file")
        say(f"{path}: {unlike}: its heads are loaded although they are for other classes")
    return rows


def fit_heads(
    found: dict[str, Tensor],
    wanted: Mapping[str, Tensor],
    heads: Collection[str],
    path: Path,
    rows: Callable[[int], Mapping[int, int]] | None,
    by_name: Collection[str],
) -> tuple[set[str], set[str]]:
    """Fit the heads in `found` to the model's classes.

    `rows`: see `load`. `by_name`: the heads whose rows are classes that `rows` knows. Returns the names of the heads
    that stay new, and of those that share only some of their classes with the file.
    """
    new, mixed = set[str](), set[str]()
    kept: dict[tuple[int, int], Mapping[int, int]] = {}
    for name in heads:
        own, theirs = wanted[name], found.pop(name, None)
        if theirs is None or theirs.shape[1:] != own.shape[1:]:
            new.add(name)
            continue
        counts = (len(own), len(theirs))
        if rows and counts not in kept and name in by_name:
            kept[counts] = rows(len(theirs))
        # Rows of shared classes are copied, the others stay as the model has them. Without shared names a head for as
        # many classes is loaded as it is.
        taken = kept[counts] if name in by_name else {}
        if taken and max(taken) < len(own):
            found[name] = own.clone()
            found[name][list(taken)] = theirs[list(taken.values())].to(own)
            if len(taken) < max(counts):
                mixed.add(name)
        elif len(theirs) == len(own):
            found[name] = theirs
        else:
            new.add(name)
    for (ours, count), taken in kept.items():
        if taken and taken != {row: row for row in range(max(ours, count))}:
            say(f"{path}: {len(taken):,} of {ours:,} classes are initialised from its heads for {count:,}, by name")
    return new, mixed


def _begin_as_classifier(model: Any, found: dict[str, Tensor], new: Collection[str]) -> list[str]:
    """Initialise a new linear token head with the classifier, which reads the same features; return its names."""
    if model.stage is not None or not isinstance(model.token_head, nn.Linear):
        return []
    names = {f"token_head.{name}": own for name, own in model.token_head.state_dict().items()}
    head = f"backbone.{classifiers(model.backbone)[0]}"
    for name, own in names.items():
        classifier = found.get(name.replace("token_head", head))
        if name not in new or classifier is None or classifier.flatten(1 if own.ndim > 1 else 0).shape != own.shape:
            return []
    found |= {name: found[name.replace("token_head", head)].reshape(own.shape) for name, own in names.items()}
    return list(names)


def begin_as_classifier(model: Any) -> None:
    """Initialise a new linear token head with the classifier of its model, if both have as many classes."""
    found = {f"backbone.{name}": tensor for name, tensor in model.backbone.state_dict().items()}
    new = [f"token_head.{name}" for name in model.token_head.state_dict()]
    names = _begin_as_classifier(model, found, new)
    model.load_state_dict({name: found[name] for name in names}, strict=False)


def fingerprint(network: nn.Module) -> str:
    """Return a hash of all weights, which identifies a trained network."""
    digest = hashlib.blake2b(digest_size=16)
    # Sorted by name, as the order of modules may differ between versions of timm.
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return f"blake2b:{digest.hexdigest()}"


def misfit(
    found: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    *,
    spared: Collection[str],
    called: Callable[[str], str] = str,
) -> str:
    """Return the first names that either side lacks or that differ in size, as one line; "" if all fit.

    `spared`: names in the model that need not fit. `called`: returns the name in the file of a tensor of the model.
    """

    def _size(tensor: Tensor) -> str:
        return " x ".join(map(str, tensor.shape)) or "a number"

    lacking, extra = wanted.keys() - found.keys() - {*spared}, found.keys() - wanted.keys()
    names = {
        # Counts of batches, which only BatchNorm without momentum reads, may be left out.
        "it lacks": sorted(called(name) for name in lacking if not name.endswith("num_batches_tracked")),
        "it has": sorted(called(name) for name in extra if not name.startswith("token_head.")),
        "sizes differ:": [
            f"{called(name)} ({_size(found[name])}, not {_size(wanted[name])})"
            for name in sorted(found.keys() & wanted.keys() - {*spared})
            if found[name].shape != wanted[name].shape
        ],
    }
    return "; ".join(
        f"{what} {', '.join(some[:3])}" + (f" and {len(some) - 3} more" if len(some) > 3 else "")
        for what, some in names.items()
        if some
    )


def adapter_name(name: str) -> str:
    """Return the name in a `TimmAdapter` of a tensor in a file of ours or of its backbone's."""
    if name.startswith(("backbone.", "token_head.")):
        return name
    head, dot, rest = name.partition("aux_head.")
    return f"token_head.{rest}" if dot and not head else f"backbone.{name}"
