"""Upload a run, a label store or a head to the Hugging Face hub, with a model or dataset card.

RUN    of a classifier: timm's config.json and model.safetensors, and the run's last checkpoint without the optimizer
STORE  the manifest and the label files, as a dataset; without images
HEAD   head.safetensors

`runtime/hub.py` reads all three by `hf://USER/NAME`. Secrets in URLs (`runtime/urls.py`) stay on this machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import yaml

from tokenlabel.labels.manifest import MANIFEST_FILE, members_of, read_manifest
from tokenlabel.labels.shards import SHARD_SUFFIX
from tokenlabel.labels.store import LabelStore
from tokenlabel.models.names import OUR_MODELS
from tokenlabel.models.runs import is_run, newest_checkpoint, read_state, refuse_other_task
from tokenlabel.runtime.errors import ConfigError, StoreError, first_line, refuse
from tokenlabel.runtime.hub import HEAD_FILE, LICENCES, hub_answers, licence_metadata, status_of
from tokenlabel.runtime.process import listed, naming, read_json, say
from tokenlabel.runtime.runlog import RECIPE_FILE, read_metrics
from tokenlabel.runtime.urls import as_url, without_secrets
from tokenlabel.teachers.heads import Head
from tokenlabel.teachers.options import HEAD_SUFFIX
from tokenlabel.training.checkpoint import load_run
from tokenlabel.training.export import REGISTER, write_hub_folder

_MAX_NAMES = 1000  # classes that a card lists
# What an earlier push may have left there, and would be read in place of, or beside, what this one brings.
_REPLACED = {"dataset": [f"*{SHARD_SUFFIX}"], "model": ["checkpoints/*", "token_head.safetensors", HEAD_FILE]}

HEAD_CARD = """# {title}: {num_classes:,} {what} on {backbone}

A head of `tokenlabel` (pip install tokenlabel): with its frozen backbone, which is not included, it is a teacher that
predicts class probabilities at every location of an image.

```
tokenlabel annotate IMAGES labels --teacher hf://{repo}
```"""

STORE_CARD = """# {title}: dense labels of {num_labels:,} images

The class scores of a pretrained teacher at every location of each image, by the image's key: its path relative to the
folder of images, which are not included. Any model trains with them (pip install tokenlabel):

```
tokenlabel train --recipe small_data --data.train IMAGES --data.val VAL --out runs/first \\
    --data.labels hf://datasets/{repo}
```

```python
import tokenlabel as tl

score_map = tl.LabelStore("hf://datasets/{repo}")[KEY]
```"""

RUN_CARD = """# {title}: {name}{trained}

{name} for {what}, at {size} px, after {step:,} steps of the recipe in `recipe.yaml`.

```python
import timm
{register}model = timm.create_model("hf-hub:{repo}", pretrained=True)
```

With `tokenlabel` (pip install tokenlabel), which also loads the token head:

```
tokenlabel eval hf://{repo} --data IMAGES/val
tokenlabel annotate IMAGES labels --teacher hf://{repo}
tokenlabel train --recipe finetune --model.weights hf://{repo} --out runs/mine \\
    --data.train IMAGES/train --data.val IMAGES/val
```"""


class Card(NamedTuple):
    """The kind of repository on the hub, and its card: YAML metadata and paragraphs."""

    kind: Literal["model", "dataset"]
    metadata: dict[str, Any]
    paragraphs: list[str]


def push(
    thing: str | Path, repo: str, *, licence: str | None = None, public: bool = False, folder: str | Path | None = None
) -> str:
    """Upload a run of a classifier, a label store or a head to the hub with a card; return its `hf://` name.

    `repo`: USER/NAME; created if needed, private unless `public`. `licence`: by the hub's name, such as apache-2.0; by
    default that of the backbone of a head, or of all teachers that made the labels, if it is known. `folder`: write the
    files into this new folder instead. Raises ConfigError, also if the hub refuses, and ModelError for a run of
    segmentation.
    """
    if url := as_url(thing):
        raise ConfigError(f"{url}: is not on this machine; push takes a run folder, a label store or a head that is")
    thing = Path(thing)
    target = None if folder is None else Path(folder)
    is_new = target is None or not target.exists() or (target.is_dir() and not any(target.iterdir()))
    is_name = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo)
    refuse(
        {
            f"{repo!r}: expected USER/NAME, a user or organisation of the hub and a name": not is_name,
            f"{target}: exists already; name a new folder": not is_new,
        }
    )
    if target is None and not hub_answers():
        raise ConfigError(f"{repo}: the hub cannot be reached; --dry-run FOLDER writes what would be sent")
    beside: Path | None = (thing if target is None else target).absolute().parent  # on one disk hard links work
    if target is not None:
        beside.mkdir(parents=True, exist_ok=True)
    elif not os.access(beside, os.W_OK):
        beside = None
    with TemporaryDirectory(prefix=".writing-", dir=beside) as temporary:
        written = Path(temporary) / "files"
        with naming(target or Path(temporary)):
            kind = _pack(thing, written, repo, licence)
        if target is None:
            _send(written, repo, kind, public=public)
        else:
            written.replace(target)
    return f"hf://{'datasets/' if kind == 'dataset' else ''}{repo}"


def _pack(thing: Path, folder: Path, repo: str, licence: str | None) -> str:
    """Write all files into a new folder; return the kind of repository."""
    if thing.suffix == HEAD_SUFFIX:
        head = Head.load(thing)
        of_teachers, write = [("its backbone", head.backbone.get("licence"))], partial(_pack_head, head)
    elif is_run(thing):
        refuse_other_task(str(thing), read_state(newest_checkpoint(thing)), segments=False)
        of_teachers, write = [], partial(_pack_run, thing)
    elif (thing / MANIFEST_FILE).exists():
        store = LabelStore(thing)
        of_teachers, write = [*_licences(store.manifest.teacher)], partial(_pack_store, store)
    else:
        raise ConfigError(f"{thing}: expected a run folder, a label store or a head (HEAD{HEAD_SUFFIX})")
    stated = licence_metadata(licence or _common_licence(thing, of_teachers))
    if licence and "license_name" in stated:
        near = "".join(f" (did you mean {name}?)" for name in get_close_matches(stated["license_name"], LICENCES, n=1))
        say(f"--licence {licence}: is none that the hub lists{near}; the card states other, {stated['license_name']}")
    card = write(folder, repo)
    metadata = yaml.safe_dump({**stated, **card.metadata}, sort_keys=False)
    text = "\n\n".join((f"---\n{metadata}---", *card.paragraphs, _checksums(folder)))
    (folder / "README.md").write_text(text + "\n", encoding="utf-8")
    return card.kind


def _licences(teacher: Mapping[str, Any]) -> Iterator[tuple[str, str | None]]:
    """Yield name and licence (None if it is not known) of each teacher of a manifest's description."""
    for member in members_of(teacher):
        backbone = member.get("backbone")
        licence = member.get("licence") or (backbone.get("licence") if isinstance(backbone, dict) else None)
        yield str(member.get("name")), licence


def _common_licence(thing: Path, of_teachers: Sequence[tuple[str, str | None]]) -> str:
    """Return the licence of all teachers. Raises ConfigError that names them if there is no such, or not of all."""
    licences = {licence for _, licence in of_teachers}
    (first, *others) = licences or {None}
    if first and not others:
        return first
    named = [f"{licence or 'unknown'} for {name}" for name, licence in of_teachers]
    found = f"its teachers have several ({listed(named, len(named))})" if others else "none is known"
    raise ConfigError(
        f"{thing}: its card needs a licence, and {found}; give --licence apache-2.0, or whatever its teacher and "
        "images allow, as the hub names it"
    )


def _pack_head(head: Head, folder: Path, repo: str) -> Card:
    folder.mkdir()
    head.fitted = without_secrets(head.fitted)  # names the images
    head.save(folder / HEAD_FILE)
    about = HEAD_CARD.format(
        title=repo.split("/")[1],
        num_classes=head.num_classes,
        what="visual words" if head.kind == "words" else f"classes from {head.kind}",
        backbone=head.backbone.get("name", "a backbone"),
        repo=repo,
    )
    facts = _facts({"backbone": head.backbone, "fitted": {"from": head.kind, **head.fitted}})
    names = head.class_names if head.kind != "words" else ()
    return Card("model", {"tags": ["token-labeling"]}, [about, facts, *_names_of_classes(names)])


def _pack_store(store: LabelStore, folder: Path, repo: str) -> Card:
    folder.mkdir()
    (source,) = store.folders
    about = read_json(source / MANIFEST_FILE)
    about |= {name: without_secrets(about[name]) for name in ("teacher", "preprocessing", "failures") if name in about}
    (folder / MANIFEST_FILE).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    for shard in store.shards:
        _link(source / shard.path.name, folder / shard.path.name)
    manifest = store.manifest
    about = STORE_CARD.format(title=repo.split("/")[1], num_labels=len(store), repo=repo)
    facts = {
        "images": len(store),
        "bytes": store.num_bytes(),
        "classes": manifest.num_classes,
        "classes that a location keeps": manifest.topk,
        "teacher": manifest.teacher,
        "seen": manifest.preprocessing,
    }
    names = _names_of_classes(manifest.class_names)
    return Card("dataset", {"tags": ["token-labeling"]}, [about, _facts(facts), *names])


def _pack_run(path: Path, folder: Path, repo: str) -> Card:
    checkpoint = newest_checkpoint(path)
    state, trained = read_state(checkpoint), load_run(checkpoint)
    write_hub_folder(trained, folder)
    recipe = without_secrets(state["recipe"])
    (folder / RECIPE_FILE).write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    inside = folder / "checkpoints" / checkpoint.name
    inside.mkdir(parents=True)
    weights = {name: digest for name, digest in state["sha256"].items() if name != "optimizer.safetensors"}
    for name in weights:  # the EMA weights and those of the last step: fine-tuning may begin with either
        _link(checkpoint / name, inside / name)
    shorter = {**state, "recipe": recipe, "sha256": weights}
    (inside / "state.json").write_text(json.dumps(shorter, indent=1) + "\n", encoding="utf-8")
    names = trained.class_names
    about = RUN_CARD.format(
        title=repo.split("/")[1],
        name=recipe["model"]["name"],
        trained=", trained with token labels" if trained.has_token_head else "",
        what=f"{len(names):,} classes" if names else "no classes, a backbone to fine-tune",
        size="x".join(map(str, recipe["model"]["img_size"])),
        step=state["step"],
        register=REGISTER if recipe["model"]["name"] in OUR_MODELS else "",
        repo=repo,
    )
    facts = {
        "training images": recipe["data"]["train"],
        "began with": recipe["model"]["weights"],
        "pretrained": recipe["model"]["options"].get("pretrained"),
        "labels": recipe["data"]["labels"],
        "teacher": dict(_teacher_of(state["recipe"])),
        "versions": state["versions"],
    }
    metadata = {"library_name": "timm", "tags": ["timm", "token-labeling"]}
    metadata |= {"pipeline_tag": "image-classification"} if names else {}
    return Card("model", metadata, [about, *_figures(path, state["step"]), _facts(facts), *_names_of_classes(names)])


def _teacher_of(recipe: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the entries about the teacher in the manifest of a run's labels, if the store is still on this machine."""
    labels = recipe["data"]["labels"] or []
    for folder in [labels] if isinstance(labels, str) else labels:
        with suppress(StoreError):
            yield from read_manifest(folder).teacher.items()


def _figures(run: Path, step: int) -> Iterator[str]:
    """Yield the figures of a run's evaluation at a step, and the command that reproduces them."""
    lines = [line for line in read_metrics(run) if line["kind"] == "eval" and line["step"] == step]
    for line in lines[-1:]:
        yield f"On the val images of its recipe (`tokenlabel eval {run}`):"
        untold = ("step", "kind", "evaluated_as", "images_per_s")
        yield _facts({name: value for name, value in line.items() if name not in untold})


def _facts(facts: Mapping[str, Any]) -> str:
    """Return a Markdown table of a nested mapping without its empty values, and without secrets."""

    def _rows(name: str, value: Any) -> Iterator[str]:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                yield from _rows(f"{name} {key}".replace("_", " ").strip(), inner)
        elif value not in (None, "", [], ()):
            yield f"| {name} | {f'{value:.4g}' if isinstance(value, float) else value} |"

    return "\n".join(("| | |", "|---|---|", *_rows("", without_secrets(facts))))


def _names_of_classes(names: tuple[str, ...]) -> list[str]:
    return [f"Classes, in the order of their ids: {listed(names, _MAX_NAMES)}."] if 0 < len(names) <= _MAX_NAMES else []


def _checksums(folder: Path) -> str:
    sums = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "README.md"):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        sums.append(f"{digest}  {path.relative_to(folder).as_posix()}")
    return "\n".join(("SHA-256, for `sha256sum --check`:\n", "```", *sums, "```"))


def _link(source: Path, target: Path) -> None:
    """Hard-link a file, which is never changed, or copy it where the file system has no links."""
    try:
        os.link(source.resolve(), target)  # resolved: a link to a symlink would be dangling elsewhere
    except OSError:
        shutil.copyfile(source, target)


def _send(folder: Path, repo: str, kind: str, *, public: bool) -> None:
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repo, repo_type=kind, private=not public, exist_ok=True)
        about = {"commit_message": "Upload by tokenlabel", "delete_patterns": _REPLACED[kind]}
        api.upload_folder(repo_id=repo, repo_type=kind, folder_path=folder, **about)
    except Exception as error:  # huggingface_hub and its HTTP library raise errors of many kinds
        status, reason = status_of(error), f"was not sent ({first_line(error)}); the same command sends it"
        if isinstance(error, ValueError) or 400 <= status < 500:  # a card's faults stand below the first line
            reason = f"the hub refuses it: {' '.join(str(error).split())}"
        reason = {
            401: "the hub does not know you; log in (`hf auth login`, or HF_TOKEN)",
            403: "you may not write there; it takes a name of yours, and a token with the right to write",
        }.get(status, reason)
        raise ConfigError(f"{repo}: {reason}") from error
