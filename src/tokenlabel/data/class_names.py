"""The names of a network's classes: from a file, ImageNet's lists or WordNet's words, or by assumption.

ImageNet's are read from the tables that timm ships, where possible without timm, which imports torch and takes seconds.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from textwrap import shorten

from tokenlabel.data.classes import (
    are_numbers,
    assumed_order,
    composed,
    difference,
    ids_among,
    natural_order,
    same_classes,
)
from tokenlabel.runtime.errors import ConfigError, refuse
from tokenlabel.runtime.process import listed, say

CLASSES_FILE = "classes.txt"  # beside a folder of masks: the names of their classes, a line each
SORTED, NATURAL = "sorted", "natural"
WORDNET_ID = re.compile(r"n\d{8}")

_MAX_WORDS = 40

# Where models keep their classes: ours and timm's, those of transformers and ultralytics, those of people's scripts.
_CONFIG_KEYS = (
    "class_names", "label_names", "classes", "class_to_idx", "idx_to_class", "id2label", "label2id", "names",
)  # fmt: skip


def match_classes(
    ours: Sequence[str],
    theirs: Sequence[str],
    *,
    count: int,
    assumed: bool = False,
    them: str = "the model",
    option: str = "--class-order",
) -> list[int]:
    """Return the id that each of the images' classes has among a network's `count`, -1 for none; print assumptions.

    `theirs`: the network's class names in its order, empty if nobody knows them; `assumed`: they are ImageNet's by
    their number alone. Names decide where any is known to both. Where none is, as many classes as a network without
    names has are its own in their order, numbers are class ids, and words are those of WordNet. `them`, `option`: what
    lines call the network, and what overrules them.
    """
    is_open = option and (assumed or are_numbers(theirs))  # a network's own names cannot be overruled
    overrule = f"; overrule with {option} natural, sorted or FILE" if is_open else ""
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
            say(assumed_order(ours, them) + overrule)
            return list(range(count))
    if ours and min(numbers) >= 0 and max(numbers) < count and len(set(numbers)) == len(ours):
        pairs = listed([f"{name} = {theirs[i]}" if theirs else name for name, i in zip(ours, numbers, strict=True)])
        say(f"assuming the images' class numbers are ids of {them}'s {count:,} classes: {pairs}{overrule}")
        return numbers
    ids = _ids_by_words(ours, theirs)
    if max(ids, default=-1) >= 0:
        pairs = listed([f"{name} = {theirs[i]}" for name, i in zip(ours, ids, strict=True) if i >= 0])
        say(f"assuming the images' classes are called by WordNet's words: {pairs}{overrule}")
    return ids


def say_imagenet(names: Sequence[str], *, them: str, option: str) -> None:
    """Print that a network's classes are assumed to be ImageNet's, by their number."""
    pairs = ", ".join(f"{i} = {name}" for i, name in enumerate(names[:3]))
    say(
        f"assuming {them}'s {len(names):,} classes are ImageNet's, by their number: {pairs}; overrule with {option} "
        "natural, sorted or FILE"
    )


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
        names = sorted(ours, key=natural_order if order == NATURAL else None)
    else:
        raise ConfigError(f"{option} {order}: the images have no classes; give a file of names")
    refuse(
        {
            f"{option} {order}: the network says itself that its classes are {listed(known)}, not "
            f"{listed(names)}; leave the option out, or map them": not are_numbers(known)
            and not same_classes(known, names),
            f"{option} {order}: that is {len(names):,} classes, the network knows {count:,}; give a file with the name "
            "of each of them, in its order": len(names) != count,
        }
    )
    return names


def read_class_names(
    path: str | Path, ours: Sequence[str] = (), *, option: str = "", of_masks: bool = False
) -> list[str]:
    """Return the class names of a file in their order; see `class_order`. Raises ConfigError.

    `option`: what the file was given to; none for an argument that has to be such a file. `of_masks`: ids are values in
    masks, where the first name has 0; others are refused.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if Path(path).suffix.lower() == ".json":
            names = _in_json_order(json.loads(text))
        else:
            lines = [line.strip() for line in text.split("\n") if not line.startswith("#")]
            names = _in_line_order([line for line in lines if line], ours, of_masks=of_masks)
    except (OSError, ValueError, RecursionError) as error:
        kinds = "neither `natural` nor `sorted`, nor a file" if option.endswith("class-order") else "no file"
        raise ConfigError(f"{option} {path}: {kinds} of class names ({error})".lstrip()) from error
    if repeated := [name for name, times in Counter(map(composed, names)).items() if times > 1]:
        raise ConfigError(f"{option} {path}: names several classes {listed([*map(repr, repeated)])}".lstrip())
    return names


def unlike_list(masks: Path, names: Sequence[str]) -> str:
    """Return how classes.txt beside a folder of masks differs from the classes of their values; "" if it does not.

    The file may be missing, or lack the last classes.
    """
    path = masks.parent / CLASSES_FILE
    if not path.is_file():
        return ""
    theirs = read_class_names(path, of_masks=True)
    if same_classes(theirs, names[: len(theirs)]):
        return ""
    return f"{path}: {difference(theirs, names, count=len(theirs), them='this file')}"


def _in_line_order(lines: list[str], ours: Sequence[str], *, of_masks: bool) -> list[str]:
    """Return the names that lines hold, in the order of their ids if they have such: in front or behind, all different.

    A first line may be headings. Names that the images have count as they are: "class 1" is no class of id 1 then.
    """
    names = [line.partition("\t")[0].strip() for line in lines]
    if max(ids_among(names, ours), default=-1) >= 0:
        return names
    # Ids in front or behind count only where they are all of them, each once: else numbers are parts of names.
    for pattern in (r"(?P<id>\d+)[\s,;:=]+(?P<name>.+)", r"(?P<name>.+?)[\s,;:=]+(?P<id>\d+)"):
        for rows in (lines, lines[1:]):
            found = [match for line in rows if (match := re.fullmatch(pattern, line))]
            by_id = {int(match["id"]): match["name"].strip("\"', ") for match in found}
            first = min(by_id, default=-1)
            is_counted = first in (0, 1) and sorted(by_id) == list(range(first, first + len(rows)))
            if is_counted and len(set(by_id.values())) == len(rows):
                if of_masks and first:
                    raise ValueError("its ids begin at 1, values in masks at 0; give the names alone, in that order")
                return [by_id[i] for i in sorted(by_id)]
    if all(re.match(rf"{WORDNET_ID.pattern}[\s,:]", line) for line in lines):  # n01440764 tench, Tinca tinca
        return [line[:9] for line in lines]
    return names


def _in_json_order(content: object) -> list[str]:
    if isinstance(content, dict):
        inside = (content[key] for key in _CONFIG_KEYS if isinstance(content.get(key), (dict, list)))
        content = next(inside, content)
    if isinstance(content, dict) and all(type(number) is int for number in content.values()):
        content = {number: name for name, number in content.items()}
    if isinstance(content, dict):
        by_id = {int(number) if str(number).isdecimal() else -1: name for number, name in content.items()}
        content = [by_id[i] for i in sorted(by_id)] if sorted(by_id) == list(range(len(by_id))) else None
    if isinstance(content, list):  # Keras has ["n01440764", "tench"] for each
        content = [name[0] if isinstance(name, list) and name else name for name in content]
    if not isinstance(content, list) or not all(isinstance(name, str) for name in content):
        raise ValueError("expected a list of names, or a mapping between names and all ids from 0")
    return [name for name in content if isinstance(name, str)]


def _ids_by_words(ours: Sequence[str], theirs: Sequence[str]) -> list[int]:
    """Return which WordNet id each name is a word for, -1 where none or several are, or `theirs` are no such ids."""
    if not theirs or not all(map(WORDNET_ID.fullmatch, theirs)):
        return [-1] * len(ours)
    of_ids = wordnet_words()
    words = [
        (_as_word(word), index)
        for index, name in enumerate(theirs)
        for word in {*of_ids.get(name, "").split(", ")} - {""}
    ]
    indices = ids_among([_as_word(name) for name in ours], [word for word, _ in words])
    return [words[index][1] if index >= 0 else -1 for index in indices]


def _as_word(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", composed(name).casefold()).strip()


def with_words(name: str) -> str:
    """Return a class name; a WordNet id with its words: `n01440764 (tench, Tinca tinca)`."""
    words = wordnet_words().get(name) if WORDNET_ID.fullmatch(name) else None
    return f"{name} ({shorten(words, _MAX_WORDS, placeholder='...')})" if words else name


def words_of(name: str) -> str:
    """Return the first of the words of a WordNet id (`n01440764`: tench); any other class name as it is."""
    return wordnet_words().get(name, name).partition(",")[0]


@cache
def imagenet_ids() -> tuple[str, ...]:
    """Return the ids of ImageNet-1k's classes in the order that its teachers and label files use."""
    return tuple(_table("imagenet_synsets.txt"))


def imagenet_names(count: int) -> tuple[str, ...]:
    """Return ImageNet's names of so many classes (WordNet ids); none for another number."""
    from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": count})
    return tuple(ImageNetInfo(subset).label_names()) if subset else ()


@cache
def wordnet_words() -> dict[str, str]:
    """Return the words of every id, divided by ", "."""
    return dict(line.split("\t", 1) for line in _table("imagenet_synset_to_lemma.txt"))


def _table(name: str) -> list[str]:
    timm = find_spec("timm")
    assert timm is not None
    assert timm.origin is not None
    return (Path(timm.origin).parent / "data" / "_info" / name).read_text(encoding="utf-8").splitlines()
