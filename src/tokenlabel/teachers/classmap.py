"""From a teacher's classes to those of the data set."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

BY_ORDER, BY_NAME = "order", "names"

# Below this much on classes of ours, a place shows something else: what is left of it is no evidence.
MIN_MASS = 1e-3


class ClassMapError(ValueError):
    """Classes of a teacher and of images that don't fit each other."""


@dataclass(frozen=True, eq=False)
class ClassMap:
    """Where each of a teacher's classes goes: `targets` [teacher's classes], -1 for nowhere.

    Many may go to one, whose probability is their sum. `outside` says what becomes of what goes nowhere. renormalise:
    it is left out, and the others are probabilities given that one of our classes is shown; all are 0, so that nothing
    is kept, where less than .001 goes to them. spread: it is spread evenly over all classes.
    """

    targets: NDArray[np.int64]
    num_classes: int
    outside: Literal["renormalise", "spread"] = "spread"

    def __post_init__(self) -> None:
        if self.outside not in ("renormalise", "spread"):
            raise ClassMapError(f"--outside is renormalise or spread, got {self.outside!r}")

    @property
    def renormalises(self) -> bool:
        """Whether anything is left out."""
        return self.outside == "renormalise" and bool((self.targets < 0).any())

    @property
    def description(self) -> dict[str, Any]:
        """What it does, for the manifest of a store."""
        return {
            "targets": self.targets.tolist(),
            "nowhere": "renormalise" if self.renormalises else "spread evenly",
        }

    def apply(self, probs: Float[Tensor, "*places T"]) -> Float[Tensor, "*places C"]:
        """Return the probabilities of the data set's classes.

        Averages over members and mirror images come before: the mean of renormalised ones is another one.
        """
        mapped = np.flatnonzero(self.targets >= 0)
        kept = probs[..., torch.from_numpy(mapped).to(probs.device)]
        targets = torch.from_numpy(self.targets[mapped]).to(probs.device)
        found = probs.new_zeros(*probs.shape[:-1], self.num_classes).index_add_(-1, targets, kept)
        if self.renormalises:
            mass = found.sum(dim=-1, keepdim=True)
            # NaN is not below anything: it stays, and whoever packs the map refuses it.
            return torch.where(mass < MIN_MASS, 0.0, found / mass)
        nowhere = (probs.sum(dim=-1, keepdim=True) - kept.sum(dim=-1, keepdim=True)).clamp_min(0)
        return found + nowhere / self.num_classes


def class_map_for(
    spec: str | None, theirs: Sequence[str], ours: Sequence[str], *, num_theirs: int
) -> ClassMap | None:
    """Return how a teacher's classes become those of the images; None where they are the same.

    `spec`: None if they must be the same; "order" if they are in the same order, whatever they are called;
    "names" to match equal names; else a file of pairs (see `read_class_map`). `theirs`: the teacher's class
    names, empty if it does not know them. `ours`: the images' class names, empty if they have no classes.
    """
    if spec not in (None, BY_ORDER) and not ours:
        raise ClassMapError(
            f"--class-map {spec}: the images have no classes that it could lead to; leave it out"
        )
    if spec == BY_ORDER or not ours:
        if ours and num_theirs != len(ours):
            raise ClassMapError(
                f"the teacher knows {num_theirs:,} classes, the images have {len(ours):,}: no common order"
            )
        return None
    if spec is None:
        _check_same(theirs, ours, num_theirs=num_theirs)
        return None
    if spec == BY_NAME:
        places = {name: place for place, name in enumerate(ours)}
        targets = [places.get(name, -1) for name in theirs]
    else:
        targets = read_class_map(spec, theirs, ours, num_theirs=num_theirs)
    reached = set(targets) - {-1}
    if len(reached) < len(ours):
        lacking = [name for place, name in enumerate(ours) if place not in reached]
        raise ClassMapError(
            f"--class-map {spec}: no class of the teacher goes to {len(lacking):,} of {len(ours):,} classes "
            f"({', '.join(lacking[:3])}{', ...' if len(lacking) > 3 else ''})"
        )
    return ClassMap(np.array(targets), len(ours))


def read_class_map(
    path: str | Path, theirs: Sequence[str], ours: Sequence[str], *, num_theirs: int
) -> list[int]:
    """Return for each of the teacher's classes the class that a file sends it to, -1 for none.

    A line of the file holds the teacher's class and the images' class, each by name or by id (counted from
    0), with a tab or a comma between; lines that begin with # are passed over. Raises ClassMapError that
    names the line.
    """
    targets = [-1] * num_theirs
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ClassMapError(f"{path}: no class map ({error})") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        fields = [
            field.strip() for field in next(csv.reader([line], delimiter="\t" if "\t" in line else ","))
        ]
        where = f"{path}, line {number}"
        if len(fields) != 2:
            raise ClassMapError(
                f"{where}: expected the teacher's class, a tab or comma, and ours; got {line!r}"
            )
        source = _place(fields[0], theirs, num_theirs, where=where, whose="teacher's")
        target = _place(fields[1], ours, len(ours), where=where, whose="images'")
        if targets[source] not in (-1, target):
            raise ClassMapError(f"{where}: the teacher's class {fields[0]!r} goes to two classes")
        targets[source] = target
    return targets


def _place(text: str, names: Sequence[str], count: int, *, where: str, whose: str) -> int:
    if text in names:
        return names.index(text)
    if text.isdecimal() and int(text) < count:
        return int(text)
    raise ClassMapError(f"{where}: {text!r} is none of the {whose} {count:,} classes, by name or by id")


def _check_same(theirs: Sequence[str], ours: Sequence[str], *, num_theirs: int) -> None:
    """Refuse classes that are not the same, and say in what they differ."""
    if theirs and list(theirs) == list(ours):
        return
    if not theirs and num_theirs == len(ours):
        return
    common = len(set(theirs) & set(ours))
    if num_theirs != len(ours):
        differ = f"the teacher knows {num_theirs:,} classes, the images have {len(ours):,}"
    else:
        first = next(i for i, (a, b) in enumerate(zip(theirs, ours, strict=True)) if a != b)
        differ = f"class {first} is {theirs[first]!r} to the teacher and {ours[first]!r} to the images"
    raise ClassMapError(
        f"{differ}; {common:,} names are common to both. Give --class-map a file of pairs (or `{BY_NAME}` to match "
        f"equal names, `{BY_ORDER}` if the classes are the same by another name)"
    )
