"""Find the tensors of a network in a checkpoint of any layout: under which key and prefix, and with which classes.

Files cannot run code: pickles are read with `weights_only=True`.
"""

from __future__ import annotations

import json
import pathlib
import re
from argparse import Namespace
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta, timezone
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.torch_version import TorchVersion

from tokenlabel.models.runs import checkpoint_or_file
from tokenlabel.runtime.errors import ModelError, first_line
from tokenlabel.runtime.process import listed, say

# Keys and prefixes of averaged weights: state_dict_ema, model_ema.module., teacher. (DINO's).
AVERAGE = re.compile(r"(^|[._/])(ema|swa|avg|averaged?|teacher)([._/]|$)", re.IGNORECASE)

# Inserted into names, at any depth, by torch.compile, FSDP and activation checkpointing.
WRAPPED = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

# Usual names of a network inside another, as they precede names that only timm can translate; and the beginnings of
# names in such layouts that look like these.
_WRAPPERS = (
    "module", "_forward_module", "model", "net", "network", "backbone", "encoder", "student", "teacher",
)  # fmt: skip
_NO_WRAPPER = re.compile(r"network\.\d|backbone\.input_stem\.")

# Token heads: ours, and those of networks that have one themselves.
TOKEN_HEADS = ("token_head.", "aux_head.")

# How files of torch.save begin: a zip archive, or, before PyTorch 1.6, a pickle.
_PICKLES = (b"P", b"\x80")

# Keys of class names beside the weights.
NAMES_KEYS = ("class_names", "classes", "class_to_idx", "idx_to_class", "id2label", "label2id")

# Beside tensors, pickles often hold the options and figures of a run. Unpickling these types runs no code.
# A path of another operating system becomes a pure one, and `pathlib._local` is where Python 3.13 pickles them from.
_PATHS = {"PosixPath": pathlib.PurePosixPath, "WindowsPath": pathlib.PureWindowsPath}
_PATHS |= {f"Pure{name}": kind for name, kind in _PATHS.items()}
_NUMPY_VALUES = {"scalar": np.float32(0).__reduce__()[0], "_reconstruct": np.zeros(1).__reduce__()[0]}
# NumPy 2 renamed `numpy.core` to `numpy._core`; pickles have the name of the version that wrote them.
HARMLESS: list[Any] = [
    *(Namespace, date, datetime, time, timedelta, timezone, np.dtype, np.ndarray),
    *(TorchVersion, frozenset, range, slice),
    *{type(np.dtype(code)) for code in "?bBhHiIlLqQefdgFDSUOM"},
    *((kind, f"{room}.{name}") for name, kind in _PATHS.items() for room in ("pathlib", "pathlib._local")),
    *((f, f"numpy.{room}.multiarray.{name}") for name, f in _NUMPY_VALUES.items() for room in ("core", "_core")),
]


@dataclass(frozen=True, slots=True)
class Weights:
    """The tensors of a network in a file, by the network's names. `prefix`: what precedes these in the file."""

    path: Path
    prefix: str
    backbone: dict[str, Tensor]
    token_head: dict[str, Tensor]

    def name_in_file(self, name: str) -> str:
        """Return the name in the file of a tensor of a `TimmAdapter`."""
        if name.startswith("backbone."):
            return self.prefix + name.removeprefix("backbone.")
        return self.prefix.removesuffix("backbone.") + name


def find_weights(path: str | Path, wanted: Collection[str], *, average: bool | None = False) -> Weights:
    """Return the tensors of a network with the names `wanted`, at any key and prefix; print which others are skipped.

    `average`: see `load_published`; None takes averaged weights if there are any.
    """
    path = checkpoint_or_file(path)
    if path.suffix == ".npz" and path.is_file():
        return Weights(path, "", {}, {})
    path, groups = _read(path, average=average)
    group, prefix = _choose(groups, wanted, average=average, path=path)
    outer, tensors = prefix.removesuffix("backbone."), groups[group]
    backbone, token_head, outside = {}, {}, []
    for name, tensor in tensors.items():
        if (inner := name.removeprefix(outer)).startswith(TOKEN_HEADS):
            token_head[inner.partition("head.")[2]] = tensor
        elif name.startswith(prefix):
            backbone[name[len(prefix) :]] = tensor
        else:
            outside.append(name)
    _refuse_bad(path, {name: tensor for name, tensor in tensors.items() if name not in {*outside}})
    if skipped := _skipped(path, group, prefix, outside):
        say(skipped)
    return Weights(path, prefix, backbone, token_head)


def read_checkpoint(
    path: str | Path, wanted: Collection[str] = (), *, average: bool = False
) -> tuple[dict[str, Tensor], str]:
    """Return the tensors of a checkpoint by name, without what precedes the names `wanted`, and which are left out.

    Without `wanted` only a usual wrapper's name is taken off, such as `module.` of DataParallel. `path`: a file, or a
    folder with `model.safetensors` (with `average` `ema.safetensors`), as in our runs. Raises ModelError for what
    cannot be read without running code, for a file without averaged weights, and for NaN.
    """
    path, groups = _read(checkpoint_or_file(path), average=average)
    group, prefix = _choose(groups, wanted, average=average, path=path)
    found = {name[len(prefix) :]: tensor for name, tensor in groups[group].items() if name.startswith(prefix)}
    _refuse_bad(path, found)
    return found, _skipped(path, group, prefix, [name for name in groups[group] if not name.startswith(prefix)])


def _refuse_bad(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise ModelError for weights that are NaN, or whole numbers.

    Here, not where a loss or a score of some image is found to be NaN. (Inf is in masks of attention.)
    """
    bad = [name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.float().isnan().any()]
    if bad:
        raise ModelError(f"{path} holds NaN in {listed(bad)} ({len(bad):,} tensors); take a checkpoint before that")
    whole = [name for name, tensor in tensors.items() if name.endswith(".weight") and not tensor.is_floating_point()]
    if whole:
        raise ModelError(
            f"{path} holds whole numbers ({tensors[whole[0]].dtype}) in {listed(whole)} ({len(whole):,} tensors): the "
            "scales of quantised weights are not read; take the weights before they were quantised"
        )


def _skipped(path: Path, group: str, prefix: str, names: Sequence[str]) -> str:
    """Return a line about tensors that lie outside; "" if there are none."""
    where = ": ".join(part for part in (group, prefix) if part)
    return f"{path}: takes {where}, and skips {listed(names)} ({len(names):,} tensors)" if names else ""


def _read(path: Path, *, average: bool | None) -> tuple[Path, dict[str, dict[str, Tensor]]]:
    """Return the file, and its dictionaries of tensors by key ("" for the outermost)."""
    if path.is_dir():
        averaged = path / "ema.safetensors"
        path = averaged if average is not False and averaged.exists() else path / "model.safetensors"
    if not path.is_file():
        raise ModelError(f"{path}: no such file; expected weights as .safetensors, .pth or .pth.tar")
    contents = _read_safetensors(path) if path.suffix.lower() == ".safetensors" else _read_pickle(path)
    groups = dict(_groups(contents))
    if path.name == "ema.safetensors":
        groups = {f"averaged{name}": tensors for name, tensors in groups.items()}
    if not groups:
        raise ModelError(f"{path} holds no tensors; it has {', '.join(map(str, contents)) or 'nothing'}")
    return path, groups


def _groups(contents: Mapping[Any, Any], name: str = "") -> Iterator[tuple[str, dict[str, Tensor]]]:
    # Checkpoints are nested: weights, their averages and the optimizer's state under keys of their own.
    named = {key: value for key, value in contents.items() if isinstance(key, str)}
    tensors = {WRAPPED.sub("", key): value for key, value in named.items() if isinstance(value, Tensor)}
    if tensors:
        yield name, tensors
    for key, value in named.items():
        if isinstance(value, Mapping):
            yield from _groups(value, f"{name}.{key}" if name else key)


def _choose(
    groups: dict[str, dict[str, Tensor]], wanted: Collection[str], *, average: bool | None, path: Path
) -> tuple[str, str]:
    """Return the key of a dictionary, and the prefix in it under which most of the wanted names are.

    If few are found, the names may be of a layout that timm translates: then the prefix is only that of a wrapper.
    """
    votes: Counter[tuple[str, str]] = Counter()
    for group, tensors in groups.items():
        for name in tensors:
            # A name votes for each prefix whose removal leaves a name of the network: `module.net.head.weight` for
            # `module.net.` and, if the network has a `net`, for `module.`. All tensors vote for the true prefix.
            starts = [0, *(match.end() for match in re.finditer(r"\.", name))]
            votes.update((group, name[:start]) for start in starts if name[start:] in wanted)
    most = max(votes.values(), default=0)
    if 4 * most < len(wanted) or not wanted:
        votes = Counter({(group, _wrapper(tensors, wanted)): len(tensors) for group, tensors in groups.items()})
        most = max(votes.values())
    places = [place for place, count in votes.most_common() if 2 * count >= most]
    averaged = [place for place in places if AVERAGE.search(".".join(place))]
    plain = [place for place in places if place not in averaged]
    if average and not averaged:
        there = listed([f"{group or 'tensors'} ({len(groups[group]):,} tensors)" for group in groups])
        raise ModelError(f"{path} has no averaged weights; it has {there}; load it as it is (--model.average false)")
    if averaged and average is not True and (average is None or not plain):
        say(f"{path}: takes the averaged weights ({': '.join(filter(None, averaged[0]))})")
    return (averaged if averaged and average is not False else plain or averaged)[0]


def _wrapper(tensors: Collection[str], wanted: Collection[str]) -> str:
    """Return the common prefix of most names if it is a usual one of a network inside another.

    None that would leave a wanted name, or a token head, outside.
    """
    prefix, inside = "", [*tensors]
    while True:
        parts = (name[len(prefix) :].partition(".") for name in inside)
        inner = Counter(first for first, dot, _ in parts if dot)  # names with others below them
        if not inner:
            return prefix
        (first, count), *_ = inner.most_common(1)
        deeper = f"{prefix}{first}."
        beside = (name[len(prefix) :] for name in inside if not name.startswith(deeper))
        if (
            first not in _WRAPPERS
            or 2 * count < len(tensors)
            or any(_NO_WRAPPER.match(name, len(prefix)) for name in inside)
            or any(name in wanted or name.startswith(TOKEN_HEADS) for name in beside)
        ):
            return prefix
        prefix, inside = deeper, [name for name in inside if name.startswith(deeper)]


def read_class_names(path: str | Path) -> tuple[str, ...]:
    """Return the class names that come with a file of weights; empty if there are none.

    They are in the metadata of our exports, the state.json of our checkpoints, the config.json of a folder for timm,
    or in a .pth as `class_names`, `classes`, or a mapping such as `class_to_idx`.
    """
    path = checkpoint_or_file(path)
    folder = path if path.is_dir() else path.parent
    found: Any = None
    with suppress(OSError, ValueError, SafetensorError, AttributeError, TypeError):
        if path.suffix.lower() == ".safetensors":
            with safe_open(path, framework="pt") as file:
                found = json.loads((file.metadata() or {}).get("class_names", "null"))
        elif path.is_file() and path.suffix != ".npz":  # the original ViTs
            contents = _read_pickle(path)
            stated = (contents[key] for key in NAMES_KEYS if isinstance(contents.get(key), (list, tuple, dict)))
            found = next(stated, None)
        if found is None and (path.is_dir() or path.name in ("model.safetensors", "ema.safetensors")):
            state = folder / "state.json"
            beside = json.loads((state if state.exists() else folder / "config.json").read_text("utf-8"))
            beside = {**beside.get("pretrained_cfg", {}), **beside}
            found = beside.get("class_names") or beside.get("label_names")
    return names_in_order(found)


def names_in_order(names: Any) -> tuple[str, ...]:
    """Return class names in the order of their ids, from a list, names by id (gaps allowed), or ids by name."""
    if isinstance(names, dict):
        is_by_name = all(isinstance(place, int) for place in names.values())
        pairs = [(place, name) if is_by_name else (name, place) for name, place in names.items()]
        by_id = {int(place): name for place, name in pairs if str(place).isdecimal()}
        names = [by_id.get(i, str(i)) for i in range(max(by_id, default=-1) + 1)]
    return tuple(map(str, names)) if isinstance(names, (list, tuple)) else ()


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ModelError(f"{path} is damaged or no safetensors file ({error}); get it again") from error


def _read_pickle(path: Path) -> dict[str, Any]:
    try:
        _refuse_other_kinds(path)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        with torch.serialization.safe_globals(HARMLESS):
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        stranger = re.search(r"GLOBAL (\S+)|global (\S+)", str(error))
        what = f" ({stranger[1] or stranger[2]})" if stranger else ""
        raise ModelError(
            f"{path} holds more than tensors{what}, and reading it could run any code. If you trust where it is from, "
            f"convert it once: python -c \"import torch; f = torch.load('{path}', weights_only=False); "
            "s = lambda v: v.state_dict() if hasattr(v, 'state_dict') else v; "
            "t = lambda d: {k: t(s(v)) if isinstance(s(v), dict) else v for k, v in s(d).items() "
            f"if torch.is_tensor(v) or isinstance(s(v), (dict, str, int))}}; torch.save(t(f), '{path}.tensors.pth')\""
        ) from error
    except (RuntimeError, EOFError, OSError, LookupError, TypeError, ValueError) as error:
        if "TorchScript" in str(error):
            raise ModelError(
                f"{path} is a TorchScript archive, which holds code beside its tensors; convert it once: python -c "
                f"\"import torch; torch.save(torch.jit.load('{path}').state_dict(), '{path}.tensors.pth')\""
            ) from error
        raise ModelError(f"{path} is damaged or no checkpoint ({first_line(error)}); get it again") from error
    if not isinstance(contents, dict):
        raise ModelError(f"{path} holds a {type(contents).__name__}, expected a dictionary of tensors")
    return contents


def _refuse_other_kinds(path: Path) -> None:
    """Raise ModelError for a file that torch.save did not write, as far as its first bytes tell."""
    with path.open("rb") as file:
        begin = file.read(40)
    if begin[8:9] == b"{" and int.from_bytes(begin[:8], "little") < path.stat().st_size:
        name = path.with_suffix(".safetensors").name
        raise ModelError(f"{path} is a safetensors file by another name; call it {name}")
    if begin.isascii() and begin[:1] in (b"<", b"{", b"v"):  # a web page, JSON, or what Git LFS leaves for a file
        raise ModelError(f"{path} is text that begins with {begin.decode()!r}, no checkpoint; get it again")
    if begin and begin[:1] not in _PICKLES:
        raise ModelError(f"{path} is no checkpoint (it begins with {begin[:8]!r}); expected a file of tensors")
