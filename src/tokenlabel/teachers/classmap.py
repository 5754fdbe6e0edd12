"""Maps a teacher's classes to those of the data set."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from tokenlabel.data.class_names import match_classes, say_imagenet
from tokenlabel.data.classes import difference, ids_among, strangers
from tokenlabel.data.folders import IF_NO_CLASSES
from tokenlabel.runtime.errors import ConfigError
from tokenlabel.runtime.process import listed, say

BY_ORDER, BY_NAME = "order", "names"

# With less probability than this on the data set's classes, a location shows something else, and keeps nothing.
MIN_MASS = 1e-3


@dataclass(frozen=True, eq=False)
class ClassMap:
    """The class that each of a teacher's classes is mapped to: `targets` [teacher's classes], -1 for none.

    Probabilities of classes that are mapped to the same one are added. `outside`: what to do with those of classes that
    are mapped to none. renormalise: drop them and scale the others to sum to 1, or set all to 0 (nothing is kept) if
    these have less than .001 together. spread: spread them evenly over all classes.
    """

    targets: NDArray[np.int64]
    num_classes: int
    outside: Literal["renormalise", "spread"] = "spread"

    def __post_init__(self) -> None:
        if self.outside not in ("renormalise", "spread"):
            raise ConfigError(f"--outside is renormalise or spread, got {self.outside!r}")

    @property
    def renormalises(self) -> bool:
        """Whether the probability of some classes is dropped."""
        return self.outside == "renormalise" and bool((self.targets < 0).any())

    @property
    def description(self) -> dict[str, Any]:
        """The map as JSON, for the manifest of a store."""
        return {"targets": self.targets.tolist(), "nowhere": "renormalise" if self.renormalises else "spread evenly"}

    def apply(self, probs: Float[Tensor, "*dims T"]) -> Float[Tensor, "*dims C"]:
        """Return the probabilities of the data set's classes.

        To be applied after averaging over members and mirrored images: renormalising first gives another mean.
        """
        mapped = np.flatnonzero(self.targets >= 0)
        kept = probs[..., torch.from_numpy(mapped).to(probs.device)]
        targets = torch.from_numpy(self.targets[mapped]).to(probs.device)
        found = probs.new_zeros(*probs.shape[:-1], self.num_classes).index_add_(-1, targets, kept)
        if self.renormalises:
            mass = found.sum(dim=-1, keepdim=True)
            # NaN < MIN_MASS is false, so NaN is kept, and raises an error when the map is packed.
            return torch.where(mass < MIN_MASS, 0.0, found / mass)
        nowhere = (probs.sum(dim=-1, keepdim=True) - kept.sum(dim=-1, keepdim=True)).clamp_min(0)
        return found + nowhere / self.num_classes


def class_map_for(
    spec: str | None,
    theirs: Sequence[str],
    ours: Sequence[str],
    *,
    num_theirs: int,
    assumed: bool = False,
    options: str = "--",
) -> ClassMap | None:
    """Return the map from a teacher's classes to those of the images; None if they are the same in the same order.

    `spec`: None if they must be the same; "order" if they are in the same order by other names; "names" to match equal
    names; else a file of pairs (see `_read_class_map`). `theirs`: the teacher's class names, empty if unknown;
    `assumed`: see `match_classes`. `ours`: the images' class names, empty if they have no classes. `options`: what
    precedes the names of the options `class-map` and `class-order` in messages.
    """
    option = f"{options}class-map"
    if not ours:
        if spec not in (None, BY_ORDER):
            raise ConfigError(f"{option} {spec}: the images have no classes that it could lead to; leave it out")
        if assumed:
            say_imagenet(theirs, them="the teacher", option=f"{options}class-order")
        return None
    if len(ours) == 1:
        raise ConfigError(
            f"the images are of one class ({ours[0]}), of which labels would say nothing. {IF_NO_CLASSES}"
        )
    if spec == BY_ORDER:
        _take_order(theirs, ours, num_theirs=num_theirs, option=option)
        return None
    if spec not in (None, BY_NAME):
        return _map_of_file(spec, theirs, ours, num_theirs=num_theirs, option=option)
    ids = match_classes(
        ours, theirs, count=num_theirs, assumed=assumed, them="the teacher", option=f"{options}class-order"
    )
    if len(set(ids)) < len(ids) or -1 in ids or (spec is None and num_theirs != len(ours)):
        problem = _refusal(spec, theirs, ours, ids, count=num_theirs, options=options)
        if assumed and spec is None:
            overrule = f"{options}class-order natural, sorted or FILE overrules"
            problem += f". Its names are ImageNet's, by their number; {overrule}"
        raise ConfigError(problem)
    targets = np.full(num_theirs, -1)
    targets[ids] = np.arange(len(ours))
    return None if spec is None and ids == list(range(len(ours))) else ClassMap(targets, len(ours))


def _take_order(theirs: Sequence[str], ours: Sequence[str], *, num_theirs: int, option: str) -> None:
    """Print which class of the teacher is taken for which of the images."""
    if num_theirs != len(ours):
        raise ConfigError(f"{difference((), ours, count=num_theirs, them='the teacher')}: no common order")
    pairs = [f"{theirs[i] if theirs else i} = {name}" for i, name in enumerate(ours)]
    turned = any(j not in (-1, i) for i, j in enumerate(ids_among(ours, theirs)))
    say(f"{'WARNING: ' if turned else ''}{option} order: the teacher's class is the images', {listed(pairs)}")


def _map_of_file(path: str, theirs: Sequence[str], ours: Sequence[str], *, num_theirs: int, option: str) -> ClassMap:
    targets = _read_class_map(path, theirs, ours, num_theirs=num_theirs)
    reached = set(targets)
    if lacking := [name for i, name in enumerate(ours) if i not in reached]:
        raise ConfigError(
            f"{option} {path}: no class of the teacher goes to {len(lacking):,} of {len(ours):,} classes "
            f"({listed(lacking)})"
        )
    return ClassMap(np.array(targets), len(ours))


def _refusal(
    spec: str | None, theirs: Sequence[str], ours: Sequence[str], ids: Sequence[int], *, count: int, options: str
) -> str:
    """Return the message for a teacher whose classes do not match those of the images."""
    option = f"{options}class-map"
    if -1 not in ids and len(set(ids)) < len(ids):
        times = Counter(ids)
        same = [name for name, i in zip(ours, ids, strict=True) if times[i] > 1]
        return f"classes of the images have one name to the teacher: {listed(list(map(ascii, same)))}; merge them"
    if spec == BY_NAME:
        advice = "" if theirs else f"; name its classes with {options}class-order FILE"
        return f"{option} names: {strangers(ours, theirs, ids, count=count, them='the teacher')}{advice}"
    return (
        f"{difference(theirs, ours, count=count, them='the teacher')}. Give {option} a file of pairs (or `{BY_NAME}` "
        f"to match equal names, `{BY_ORDER}` if the classes are the same by another name). {IF_NO_CLASSES}"
    )


def _read_class_map(path: str | Path, theirs: Sequence[str], ours: Sequence[str], *, num_theirs: int) -> list[int]:
    """Return for each of the teacher's classes the class that a file maps it to, -1 for none.

    A line holds the teacher's class and the images' class, each by name or by id (from 0), separated by a tab or a
    comma; lines that begin with # are skipped. A `.json` file is a mapping from the teacher's classes to those of the
    images. Raises ConfigError that names the line.
    """
    targets = [-1] * num_theirs
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if Path(path).suffix.lower() == ".json":
            found = {f"{path}, {a!r}": [str(a), str(b)] for a, b in dict(json.loads(text)).items()}
        else:
            lines = enumerate(text.splitlines(), start=1)
            found = {f"{path}, line {i}": _fields(line) for i, line in lines if line.strip() and line[0] != "#"}
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{path}: no class map ({error}); expected a file of pairs, `{BY_NAME}` or `{BY_ORDER}`"
        ) from error
    rows: list[tuple[str, str, str]] = []
    for where, fields in found.items():
        if len(fields) != 2:
            found_text = shorten(", ".join(fields), 80)
            raise ConfigError(f"{where}: expected the teacher's class, a tab or comma, and ours; got {found_text!r}")
        rows.append((where, fields[0], fields[1]))
    named = zip(ids_among([row[1] for row in rows], theirs), ids_among([row[2] for row in rows], ours), strict=True)
    for (where, source_name, target_name), (source, target) in zip(rows, named, strict=True):
        if source < 0:
            source = _number(source_name, theirs, num_theirs, where=where, whose="teacher's")
        if target < 0:
            target = _number(target_name, ours, len(ours), where=where, whose="images'")
        if targets[source] not in (-1, target):
            raise ConfigError(f"{where}: the teacher's class {source_name!r} goes to two classes")
        targets[source] = target
    return targets


def _fields(line: str) -> list[str]:
    delimiter = "\t" if "\t" in line else ","
    try:
        return [field.strip() for field in next(csv.reader([line], delimiter=delimiter))]
    except csv.Error:  # a field is too long
        return [shorten(line, 80)]


def _number(text: str, names: Sequence[str], count: int, *, where: str, whose: str) -> int:
    """Return the class id in a field of a class map that is no name of a class."""
    if text.isdecimal() and int(text) < count:
        return int(text)
    known = f" ({listed(list(names))})" if names else ""
    raise ConfigError(f"{where}: {text!r} is none of the {whose} {count:,} classes{known}, by name or by id")
