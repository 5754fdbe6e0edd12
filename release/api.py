"""Write docs/api.md: each public name with its signature, its fields or members, and its docstring with its example.

Usage: python -m release.api [--check]
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from enum import Enum
from itertools import pairwise
from pathlib import Path
from typing import Any

import tokenlabel

PAGE = Path(__file__).parents[1] / "docs" / "api.md"
INTRODUCTION = """# Python

Every public name (`tokenlabel.__all__`), made from its docstring by `make api`. The examples run as tests, each after
`import numpy as np, torch, tokenlabel as tl` and in a folder with eight images of two classes in `images`, their
masks in `masks` and a store of their labels in `labels`.

Sizes are a number or a pair (height, width), paths strings or `Path`s, and wherever an enum is taken its value does.
Errors that a user can cause are `ValueError`s of one line: `ModelError`, `DataError`, `StoreError`, `ImageError` and
`ConfigError` among them.
"""
# Sections in the order of the way from images to a gradient: heading, and the room whose names it holds.
SECTIONS = {
    "Images": "data",
    "From images to labels": "teachers",
    "Label stores": "labels",
    "Models": "models",
    "The step": "core",
}


def page() -> str:
    """Return the page as Markdown."""
    parts = [INTRODUCTION]
    for heading, room in SECTIONS.items():
        names = [name for name in tokenlabel.__all__ if _room_of(getattr(tokenlabel, name)) == room]
        parts += [f"\n## {heading}\n", *(_entry(name, getattr(tokenlabel, name)) for name in names)]
    return "\n".join(parts)


def _room_of(thing: Any) -> str:
    return thing.__module__.split(".")[1]


def _entry(name: str, thing: Any) -> str:
    lines = [f"### {name}\n"]
    if not _is_enum(thing):
        lines.append(f"```python\n{signature(name, thing)}\n```\n")
    lines.append(_as_markdown(inspect.getdoc(thing) or ""))
    fields = dict(_documented_fields(thing)) if inspect.isclass(thing) else {}
    lines += [f"- `{field}`: {text}" for field, text in fields.items()]
    if inspect.isclass(thing) and not _is_enum(thing):
        lines += [""] * bool(fields)
        lines += [f"- `{shown}`: {text}" for shown, text in _methods(thing)]
    return "\n".join(lines).rstrip() + "\n"


def signature(name: str, thing: Callable[..., Any]) -> str:
    """Return the call of a function or class as Python, a parameter a line where one line would be long."""
    found = inspect.signature(thing)
    words, keyword_only = [], False
    for parameter in found.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            if not any(word.startswith("*") for word in words):
                words.append("*")
        words.append(_parameter(parameter))
    result = _annotation(found.return_annotation)
    arrow = f" -> {result}" if result and not inspect.isclass(thing) else ""
    line = f"{name}({', '.join(words)}){arrow}"
    return line if len(line) <= 110 else f"{name}(\n    {f',{chr(10)}    '.join(words)},\n){arrow}"


def _parameter(parameter: inspect.Parameter) -> str:
    stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    kind, default = _annotation(parameter.annotation), parameter.default
    text = f"{stars}{parameter.name}" + (f": {kind}" if kind else "")
    if default is parameter.empty:
        return text
    if isinstance(default, Enum):
        default = default.value
    shown = getattr(default, "__name__", None) or ("..." if "factory" in repr(default) else repr(default))
    return f"{text} = {shown}"


def _annotation(kind: Any) -> str:
    if kind is inspect.Signature.empty:
        return ""
    return str(kind).strip("'\"") if isinstance(kind, str) else getattr(kind, "__name__", str(kind))


def _documented_fields(kind: type) -> Iterator[tuple[str, str]]:
    """Yield the fields of a dataclass, inherited ones first, that have a docstring behind them, with it."""
    for base in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body  # type: ignore[attr-defined]
        for statement, after in pairwise(body):
            if isinstance(statement, ast.AnnAssign) and isinstance(after, ast.Expr):
                assert isinstance(statement.target, ast.Name)
                assert isinstance(after.value, ast.Constant)
                yield statement.target.id, " ".join(inspect.cleandoc(str(after.value.value)).split())


def _methods(kind: type) -> Iterator[tuple[str, str]]:
    """Yield the public methods and properties of a class, and the first paragraphs of what they say."""
    for name, value in vars(kind).items():
        method = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
        text = inspect.getdoc(method)
        if name.startswith("_") or not text or not (isinstance(value, property) or inspect.isfunction(method)):
            continue
        shown = name if isinstance(value, property) else re.sub(r"\(self(, )?", "(", signature(name, method))
        yield " ".join(shown.split()).replace("( ", "(").replace(", )", ")"), " ".join(text.split())


def _is_enum(thing: Any) -> bool:
    return inspect.isclass(thing) and issubclass(thing, Enum)


def _as_markdown(text: str) -> str:
    """Return a docstring with its example as a block of Python."""
    prose, start, example = text.partition(">>> ")
    block = f"```python\n{start}{example.rstrip()}\n```\n" if start else ""
    return f"{prose.rstrip()}\n\n{block}"


def main(arguments: list[str]) -> int:
    """Write the page, or compare it; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m release.api", description="Write docs/api.md.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the page is out of date")
    options, text = parser.parse_args(arguments), page()
    if options.check:
        if PAGE.exists() and PAGE.read_text(encoding="utf-8") == text:
            return 0
        print(f"{PAGE}: is not what the docstrings say; run `make api`", file=sys.stderr)
        return 1
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
