"""Whose class is which: two lists of classes compared by name, and what has to be assumed said aloud.

Networks, label stores and images all have classes. Wherever two of them meet, they are compared here: as they are
spelt, else in one Unicode form (macOS writes an é as two characters). Where one side has no names the order is a
guess, and a line says which.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenlabel.runtime.errors import ConfigError
from tokenlabel.runtime.process import listed, say

SORTED, NATURAL = "sorted", "natural"

# Where models keep their classes: ours and timm's, those of transformers and ultralytics, those of people's scripts.
_CONFIG_KEYS = (
    "class_names", "label_names", "classes", "class_to_idx", "idx_to_class", "id2label", "label2id", "names",
)  # fmt: skip

_WORDNET_ID = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class ClassList:
    """What logits are about: `count` classes, known by their names, or visual words, known by the hash of their head.

    `names`: empty where nobody says them. `words`: the hash of the head that made the words; empty for classes.
    """

    count: int
    names: tuple[str, ...] = ()
    words: str = ""

    def is_same(self, other: ClassList) -> bool:
        """Say whether two lists are one, as far as they tell: without names their number has to do."""
        if self.count != other.count or self.words != other.words:
            return False
        return not (self.names and other.names) or bool(self.words) or same_classes(self.names, other.names)

    @property
    def labels(self) -> list[str]:
        """What to call the classes: their names, else their numbers; words are `word 7`."""
        return list(self.names) or [f"word {i}" if self.words else str(i) for i in range(self.count)]

    @staticmethod
    def from_dict(values: dict[str, Any]) -> ClassList:
        """Return the list that `dataclasses.asdict` made these values of, perhaps by way of JSON."""
        return ClassList(values["count"], tuple(values["names"]), values["words"])

    def described(self) -> str:
        """Return the list in words, of visual words with what they are known by."""
        return f"{self} of the head {self.words}" if self.words else str(self)

    def __str__(self) -> str:
        what = "visual words" if self.words else "classes"
        return f"{self.count:,} {what}" + (
            f" ({listed(list(self.names))})" if self.names and not self.words else ""
        )


def ids_among(names: Sequence[str], others: Sequence[str]) -> list[int]:
    """Return the place of each name among other names; -1 where there is none, or more than one."""

    def places(forms: list[str]) -> dict[str, int]:
        times = Counter(forms)
        return {form: i for i, form in enumerate(forms) if times[form] == 1}

    spelt, alike = places(list(others)), places([composed(name) for name in others])
    return [spelt.get(name, alike.get(composed(name), -1)) for name in names]


def same_classes(names: Sequence[str], others: Sequence[str]) -> bool:
    """Say whether two lists name the same classes in the same order."""
    return len(names) == len(others) and ids_among(names, others) == list(range(len(others)))


def difference(theirs: Sequence[str], ours: Sequence[str], *, count: int, them: str) -> str:
    """Return in what the images' classes differ from `count` others, `theirs` by name where names are known."""
    both = f"{_knows(them)} {count:,} classes, the images have {len(ours):,}"
    if not theirs:
        return both
    if count != len(ours):
        return f"{both} ({listed(list(theirs))} against {listed(list(ours)) or 'none'})"
    first = next(i for i, place in enumerate(ids_among(ours, theirs)) if place != i)
    a, b = _told_apart(theirs[first], ours[first])
    num_common = sum(place >= 0 for place in ids_among(ours, theirs))
    return (
        f"class {first} is {a} to {them} and {b} to the images; {num_common:,} names are common to both "
        f"({listed(list(theirs))} against {listed(list(ours))})"
    )


def strangers(
    ours: Sequence[str], theirs: Sequence[str], ids: Sequence[int], *, count: int, them: str
) -> str:
    """Return which of the images' classes, those whose id is -1, are none of theirs; what looks alike is told apart."""
    first, *others = (name for name, place in zip(ours, ids, strict=True) if place < 0)
    text = f"{first!r} is no class of {them}"
    if others:
        text += f", nor {len(others):,} more of {len(ours):,} ({listed(list(map(repr, others)))})"
    if all(name.isdecimal() for name in ours):
        text += f"; class numbers are ids from 0 to {count - 1:,}, these run to {max(map(int, ours)):,}"
    text += f"; {_knows(them)} {listed(list(theirs)) or 'no names'} ({count:,} classes)"
    if num_so_called := Counter(theirs)[first]:
        return f"{text}, and {num_so_called} of these are called {first!r}"
    alike = next((name for name in theirs if _outline(name) == _outline(first)), None)
    return text if alike is None else f"{text}; {first!a} looks like {alike!a} and is another name"


def match_classes(
    ours: Sequence[str],
    theirs: Sequence[str],
    *,
    count: int,
    assumed: bool = False,
    them: str = "the model",
    option: str = "--class-order",
) -> list[int]:
    """Return which of a network's `count` classes each of the images' classes is, -1 for none; say what is assumed.

    `theirs`: the network's class names in its order, empty if nobody knows them; `assumed`: they are ImageNet's by
    their number alone. Names decide where any is known to both. Where none is, as many classes as a network without
    names has are its own in their order, numbers are class ids, and words are those of WordNet. `them`, `option`: what
    lines call the network, and what overrules them.
    """
    overrule = f"; overrule with {option} natural, sorted or FILE" if option else ""
    ids = ids_among(ours, theirs)
    if max(ids, default=-1) >= 0:
        if assumed:
            say_imagenet(theirs, them=them, option=option)
        return ids
    numbers = [int(name) if name.isdecimal() else -1 for name in ours]
    if are_numbers(theirs):
        imagenet = imagenet_names(count)
        if max(ids_among(ours, imagenet), default=-1) >= 0:
            return match_classes(ours, imagenet, count=count, assumed=True, them=them, option=option)
        if len(ours) == count:
            say(_assumed_order(ours, them) + overrule)
            return list(range(count))
    if ours and min(numbers) >= 0 and max(numbers) < count and len(set(numbers)) == len(ours):
        pairs = listed(
            [f"{name} = {theirs[i]}" if theirs else name for name, i in zip(ours, numbers, strict=True)]
        )
        say(f"assuming the images' class numbers are ids of {them}'s {count:,} classes: {pairs}{overrule}")
        return numbers
    ids = _ids_by_words(ours, theirs)
    if max(ids, default=-1) >= 0:
        pairs = listed([f"{name} = {theirs[i]}" for name, i in zip(ours, ids, strict=True) if i >= 0])
        say(f"assuming the images' classes are called by WordNet's words: {pairs}{overrule}")
    return ids


def say_imagenet(names: Sequence[str], *, them: str, option: str) -> None:
    """Say that a network's classes are taken for ImageNet's by their number."""
    pairs = ", ".join(f"{i} = {name}" for i, name in enumerate(names[:3]))
    say(
        f"assuming {them}'s {len(names):,} classes are ImageNet's, by their number: {pairs}; overrule with {option} "
        "natural, sorted or FILE"
    )


def say_order(ours: Sequence[str], *, them: str, overrule: str) -> None:
    """Say that what has class ids without names is taken to have the images' classes, unless these are numbers."""
    if not are_numbers(ours):
        say(f"{_assumed_order(ours, them)}; {overrule}")


def class_order(
    order: str, ours: Sequence[str], known: Sequence[str], *, count: int, option: str = "--class-order"
) -> list[str]:
    """Return the names of a network's `count` classes in its order, as the user says it.

    `order`: "sorted" or "natural", of the images' classes; else a file of one name a line, alone, with its id (from 0
    or 1) or with a description behind a tab; or a `.json` of a list of names or of a mapping between names and ids,
    also inside a model's configuration (`label_names`, `id2label`). `known`: what the network says
    itself; it must be no other. Raises ConfigError.
    """
    if order not in (SORTED, NATURAL):
        names = read_class_names(order, ours, option=option)
    elif ours:
        names = sorted(ours, key=_natural if order == NATURAL else None)
    else:
        raise ConfigError(f"{option} {order}: the images have no classes; give a file of names")
    if not are_numbers(known) and not same_classes(known, names):
        raise ConfigError(
            f"{option} {order}: the network says itself that its classes are {listed(list(known))}, not "
            f"{listed(names)}; leave the option out, or map them"
        )
    if len(names) != count:
        raise ConfigError(
            f"{option} {order}: that is {len(names):,} classes, the network knows {count:,}; give a file with the name "
            "of each of them, in its order"
        )
    return names


def read_class_names(path: str | Path, ours: Sequence[str] = (), *, option: str = "") -> list[str]:
    """Return the class names of a file in their order; see `class_order`. Raises ConfigError.

    `option`: what the file was given to; none for an argument that has to be such a file.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if Path(path).suffix.lower() == ".json":
            names = _in_json_order(json.loads(text))
        else:
            lines = [line.strip() for line in text.split("\n") if not line.startswith("#")]
            names = _in_line_order([line for line in lines if line], ours)
    except (OSError, ValueError) as error:
        kinds = "neither `natural` nor `sorted`, nor a file" if option.endswith("class-order") else "no file"
        raise ConfigError(f"{option} {path}: {kinds} of class names ({error})".lstrip()) from error
    if repeated := [name for name, times in Counter(map(composed, names)).items() if times > 1]:
        raise ConfigError(
            f"{option} {path}: names several classes {listed(list(map(repr, repeated)))}".lstrip()
        )
    return names


def _in_line_order(lines: list[str], ours: Sequence[str]) -> list[str]:
    """Return the names that lines hold, in the order of their ids if they have such: in front or behind, all different.

    A first line may be headings. Names that the images have count as they are: "class 1" is no class of id 1 then.
    """
    names = [line.partition("\t")[0].strip() for line in lines]
    if max(ids_among(names, ours), default=-1) >= 0:
        return names
    for pattern in (r"(?P<id>\d+)[\s,;:=]+(?P<name>.+)", r"(?P<name>.+?)[\s,;:=]+(?P<id>\d+)"):
        for rows in (lines, lines[1:]):
            found = [match for line in rows if (match := re.fullmatch(pattern, line))]
            by_id = {int(match["id"]): match["name"].strip("\"', ") for match in found}
            first = min(by_id, default=-1)
            is_counted = first in (0, 1) and sorted(by_id) == list(range(first, first + len(rows)))
            if is_counted and len(set(by_id.values())) == len(rows):
                return [by_id[i] for i in sorted(by_id)]
    if all(re.match(rf"{_WORDNET_ID.pattern}[\s,:]", line) for line in lines):  # n01440764 tench, Tinca tinca
        return [line[:9] for line in lines]
    return names


def imagenet_names(count: int) -> tuple[str, ...]:
    """Return ImageNet's names of so many classes (WordNet ids); none for another number."""
    from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset  # timm imports torch

    subset = infer_imagenet_subset({"num_classes": count})
    return tuple(ImageNetInfo(subset).label_names()) if subset else ()


def _in_json_order(content: object) -> list[str]:
    if isinstance(content, dict):
        inside = (content[key] for key in _CONFIG_KEYS if isinstance(content.get(key), (dict, list)))
        content = next(inside, content)
    if isinstance(content, dict) and all(type(place) is int for place in content.values()):
        content = {place: name for name, place in content.items()}
    if isinstance(content, dict):
        by_id = {int(place) if str(place).isdecimal() else -1: name for place, name in content.items()}
        content = [by_id[i] for i in sorted(by_id)] if sorted(by_id) == list(range(len(by_id))) else None
    if isinstance(content, list):  # Keras has ["n01440764", "tench"] for each
        content = [name[0] if isinstance(name, list) and name else name for name in content]
    if not isinstance(content, list) or not all(isinstance(name, str) for name in content):
        raise ValueError("expected a list of names, or a mapping between names and all ids from 0")
    return [name for name in content if isinstance(name, str)]


def _assumed_order(ours: Sequence[str], them: str) -> str:
    """Return the line that says in which order classes without names are taken, loud where another is as likely."""
    natural = sorted(ours, key=_natural)
    is_sorted = list(ours) == sorted(ours)
    other = next((i for i in range(len(ours)) if is_sorted and natural[i] != ours[i]), None)
    telling = [] if other is None else [other]
    shown = sorted([*dict.fromkeys([*telling, *range(len(ours))])][:3])
    whose = them if them.endswith("'") else f"{them}'s"
    line = (
        f"assuming {whose} {len(ours):,} classes are the images' in {'sorted' if is_sorted else 'their'} order: "
        + ", ".join(f"{i} = {ours[i]}" for i in shown)
    )
    if other is None:
        return line
    return f"WARNING: {line}; in natural order, which timm's scripts train in, {other} is {natural[other]}"


def _ids_by_words(ours: Sequence[str], theirs: Sequence[str]) -> list[int]:
    """Return which WordNet id each name is a word for, -1 where none or several are, or `theirs` are no such ids."""
    if not theirs or not all(map(_WORDNET_ID.fullmatch, theirs)):
        return [-1] * len(ours)
    from timm.data.imagenet_info import ImageNetInfo

    info, words = ImageNetInfo(), []
    for place, name in enumerate(theirs):
        try:
            lemmas = info.label_name_to_description(name)
        except KeyError:  # no class of any ImageNet
            continue
        words += [(_as_word(lemma), place) for lemma in {*lemmas.split(", ")}]
    places = ids_among([_as_word(name) for name in ours], [word for word, _ in words])
    return [words[place][1] if place >= 0 else -1 for place in places]


def are_numbers(names: Sequence[str]) -> bool:
    """Say whether names are the ids themselves, or none at all: they don't say what the classes are."""
    return list(names) == [str(i) for i in range(len(names))]


def _as_word(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", composed(name).casefold()).strip()


def composed(name: str) -> str:
    """Return a name in the Unicode form that names are compared in."""
    return unicodedata.normalize("NFC", name)


def _outline(name: str) -> str:
    """Return what a reader sees of a name: without case, spaces and invisible signs."""
    plain = unicodedata.normalize("NFKC", name).casefold()
    return "".join(
        c for c in plain if not (c.isspace() or unicodedata.category(c) in ("Cf", "Cc") or c in "_-")
    )


def _knows(them: str) -> str:
    return f"{them} {'know' if them.endswith('s') else 'knows'}"


def _told_apart(a: str, b: str) -> tuple[str, str]:
    return (ascii(a), ascii(b)) if _outline(a) == _outline(b) else (repr(a), repr(b))


def _natural(name: str) -> list[str | int]:
    """Return what timm sorts folders by: numbers inside names compare as numbers, case does not count."""
    parts = re.split(r"(\d+)", name.lower())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]
