"""Compare two lists of classes by name, and print what has to be assumed.

Networks, label stores and images all have classes. Names are compared as they are spelt, else in one Unicode form
(macOS writes an é as two characters). Where one side has no names, their order is assumed, and a line says which.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenlabel.runtime.errors import DataError
from tokenlabel.runtime.process import listed, say

# More classes than this, numbers in a list or in .cls files are something else: 21,841 are in all of ImageNet.
_MAX_CLASSES = 1_000_000


@dataclass(frozen=True)
class ClassList:
    """What logits are about: `count` classes, known by their names, or visual words, known by the hash of their head.

    `names`: empty where nobody says them. `words`: the hash of the head that made the words; empty for classes.
    """

    count: int
    names: tuple[str, ...] = ()
    words: str = ""

    def is_same(self, other: ClassList) -> bool:
        """Return True if two lists are the same, by their names if both have some, else by their number."""
        if self.count != other.count or self.words != other.words:
            return False
        return not (self.names and other.names) or bool(self.words) or same_classes(self.names, other.names)

    @property
    def labels(self) -> list[str]:
        """What to call the classes: their names, else their numbers; words are `word 7`."""
        return list(self.names) or [f"word {i}" if self.words else str(i) for i in range(self.count)]

    @staticmethod
    def of(names: Sequence[str]) -> ClassList:
        """Return the list of classes with these names."""
        return ClassList(len(names), tuple(names))

    @staticmethod
    def from_dict(values: dict[str, Any]) -> ClassList:
        """Return the list that `dataclasses.asdict` made these values of, perhaps by way of JSON."""
        return ClassList(values["count"], tuple(values["names"]), values["words"])

    def described(self) -> str:
        """Return the list in words, of visual words with what they are known by."""
        return f"{self} of the head {self.words}" if self.words else str(self)

    def __str__(self) -> str:
        what = "visual words" if self.words else "classes"
        return f"{self.count:,} {what}" + (f" ({listed(self.names)})" if self.names and not self.words else "")


def ids_among(names: Sequence[str], others: Sequence[str]) -> list[int]:
    """Return the index of each name among other names; -1 where there is none, or more than one."""

    def places(forms: list[str]) -> dict[str, int]:
        times = Counter(forms)
        return {form: i for i, form in enumerate(forms) if times[form] == 1}

    spelt, alike = places(list(others)), places([composed(name) for name in others])
    return [spelt.get(name, alike.get(composed(name), -1)) for name in names]


def same_classes(names: Sequence[str], others: Sequence[str]) -> bool:
    """Return True if two lists name the same classes in the same order."""
    return len(names) == len(others) and ids_among(names, others) == list(range(len(others)))


def difference(theirs: Sequence[str], ours: Sequence[str], *, count: int, them: str) -> str:
    """Return in what the images' classes differ from `count` others, `theirs` by name where names are known."""
    both = f"{_knows(them)} {count:,} classes, the images have {len(ours):,}"
    if not theirs:
        return both
    if count != len(ours):
        return f"{both} ({listed(theirs)} against {listed(ours) or 'none'})"
    first = next(i for i, index in enumerate(ids_among(ours, theirs)) if index != i)
    show = ascii if _outline(theirs[first]) == _outline(ours[first]) else repr  # escapes tell lookalikes apart
    num_common = sum(index >= 0 for index in ids_among(ours, theirs))
    return (
        f"class {first} is {show(theirs[first])} to {them} and {show(ours[first])} to the images; {num_common:,} names "
        "are common to both "
        f"({listed(theirs)} against {listed(ours)})"
    )


def strangers(ours: Sequence[str], theirs: Sequence[str], ids: Sequence[int], *, count: int, them: str) -> str:
    """Return which of the images' classes, those whose id is -1, are none of theirs; what looks alike is told apart."""
    first, *others = (name for name, index in zip(ours, ids, strict=True) if index < 0)
    text = f"{first!r} is no class of {them}"
    if others:
        text += f", nor {len(others):,} more of {len(ours):,} ({listed([*map(repr, others)])})"
    if all(name.isdecimal() for name in ours):
        text += f"; class numbers are ids from 0 to {count - 1:,}, these run to {max(map(int, ours)):,}"
    text += f"; {_knows(them)} {listed(theirs) or 'no names'} ({count:,} classes)"
    if num_so_called := Counter(theirs)[first]:
        return f"{text}, and {num_so_called} of these are called {first!r}"
    alike = next((name for name in theirs if _outline(name) == _outline(first)), None)
    return text if alike is None else f"{text}; {first!a} looks like {alike!a} and is another name"


def named_classes(names: Sequence[str]) -> tuple[list[str], NDArray[np.int64]]:
    """Return class names and ids: numbers stand for themselves (also 3.0, as pandas writes them), names are sorted.

    Raises DataError for numbers below 0 or far too large, and for numbers with missing values among them.
    """
    numbers = {name for name in set(names) if re.fullmatch(r"[+-]?\d+(\.0*)?", name)}
    others = set(names) - numbers
    if others:
        missing = [name for name in others if name.lower() in ("nan", "none", "null", "na", "n/a")]
        if numbers and missing:
            raise DataError(f"{missing[0]} is no class among numbers such as {min(numbers)}; remove these images")
        return sorted_classes(names)
    of_name = {name: int(name.split(".")[0]) for name in numbers}
    if wrong := [name for name, number in of_name.items() if not 0 <= number < _MAX_CLASSES]:
        raise DataError(f"{wrong[0]} is no class: numbers of classes are ids, 0 and up, below {_MAX_CLASSES:,}")
    ids = np.array([of_name[name] for name in names], np.int64)
    return [str(number) for number in range(int(ids.max()) + 1)], ids


def sorted_classes(names: Sequence[str]) -> tuple[list[str], NDArray[np.int64]]:
    """Return class names and ids in the order of the names, as those of class folders are."""
    distinct = sorted(set(names))
    if alike := equal_looking(distinct):
        raise DataError(f"the images: {alike}")
    ids = {name: class_id for class_id, name in enumerate(distinct)}
    return distinct, np.array([ids[name] for name in names], np.int64)


def equal_looking(names: Iterable[str]) -> str | None:
    """Return an error message if two classes look the same (an accent in two Unicode forms); None if none do."""
    seen = dict[str, str]()
    for name in names:
        if (other := seen.setdefault(composed(name).strip(), name)) != name:
            return f"two classes look the same, {other!a} and {name!a}; make them one"
    return None


def say_order(ours: Sequence[str], *, them: str, overrule: str, whose: str = "the images'") -> None:
    """Print that class ids without names are assumed to be of the images' classes, unless these are numbers."""
    if not are_numbers(ours):
        say(f"{assumed_order(ours, them, whose=whose)}; {overrule}")


def assumed_order(ours: Sequence[str], them: str, *, whose: str = "the images'") -> str:
    """Return the line that says in which order classes without names are taken, loud where another is as likely.

    `whose`: the classes that they are assumed to be.
    """
    natural = sorted(ours, key=natural_order)
    is_sorted = list(ours) == sorted(ours)
    other = next((i for i in range(len(ours)) if is_sorted and natural[i] != ours[i]), None)
    telling = [] if other is None else [other]
    shown = sorted([*dict.fromkeys([*telling, *range(len(ours))])][:3])
    theirs = them if them.endswith("'") else f"{them}'s"
    line = (
        f"assuming {theirs} {len(ours):,} classes are {whose} in {'sorted' if is_sorted else 'their'} order: "
        + ", ".join(f"{i} = {ours[i]}" for i in shown)
    )
    if other is None:
        return line
    return f"WARNING: {line}; in natural order, which timm's scripts train in, {other} is {natural[other]}"


def are_numbers(names: Sequence[str]) -> bool:
    """Return True if names are just the ids, or if there are none: they do not tell what the classes are."""
    return list(names) == [str(i) for i in range(len(names))]


def composed(name: str) -> str:
    """Return a name in the Unicode form that names are compared in."""
    return unicodedata.normalize("NFC", name)


def _outline(name: str) -> str:
    """Return what a reader sees of a name: without case, spaces and invisible signs."""
    plain = unicodedata.normalize("NFKC", name).casefold()
    return "".join(c for c in plain if not (c.isspace() or unicodedata.category(c) in ("Cf", "Cc") or c in "_-"))


def _knows(them: str) -> str:
    return f"{them} {'know' if them.endswith('s') else 'knows'}"


def natural_order(name: str) -> list[str | int]:
    """Return what timm sorts folders by: numbers inside names compare as numbers, case does not count."""
    parts = re.split(r"(\d+)", name.lower())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]
