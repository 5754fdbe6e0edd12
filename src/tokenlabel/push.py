"""A run, a label store or a head for others: a folder with a card, and its way to the Hugging Face hub.

RUN    timm's own config.json and model.safetensors, and the run's last checkpoint without its optimizer
STORE  the manifest and the label files, a data set of the hub; images are not part of it
HEAD   head.safetensors

`runtime/hub.py` reads all three by `hf://USER/NAME`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import yaml

from tokenlabel.labels.manifest import read_manifest
from tokenlabel.labels.store import LabelStore
from tokenlabel.models.names import OUR_MODELS
from tokenlabel.models.runs import is_run, newest_checkpoint, read_state
from tokenlabel.runtime.errors import ConfigError, StoreError, first_line
from tokenlabel.runtime.hub import HEAD_FILE, hub_answers, status_of
from tokenlabel.runtime.runlog import read_metrics
from tokenlabel.teachers.heads import HEAD_SUFFIX, Head
from tokenlabel.training.checkpoint import load_run
from tokenlabel.training.export import write_hub_folder

MOST_NAMES = 1000  # classes that a card lists

HEAD_CARD = """# {title}: {num_classes:,} {what} on {backbone}

A head of `tokenlabel` (pip install tokenlabel): it makes a teacher of a frozen backbone, which is not part of it, and
gives every location of an image a distribution over its classes.

```
tokenlabel annotate IMAGES labels --teacher hf://{repo}
```"""

STORE_CARD = """# {title}: dense labels of {num_labels:,} images

What a pretrained teacher says of every location of each image, once and for all, by the image's key: its path below
the folder of images, which are not part of it. Any model trains with them (pip install tokenlabel):

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

With `tokenlabel` (pip install tokenlabel), which also knows the head of its tokens:

```
tokenlabel eval hf://{repo} --data IMAGES/val
tokenlabel annotate IMAGES labels --teacher hf://{repo}
tokenlabel train --recipe finetune --model.weights hf://{repo} --out runs/mine \\
    --data.train IMAGES/train --data.val IMAGES/val
```"""

REGISTER = "import tokenlabel.models  # pip install tokenlabel\n\ntokenlabel.models.register_with_timm()\n"


@dataclass(frozen=True, kw_only=True)
class Parcel:
    """What goes to the hub as which kind: the head of its card, of YAML, and the card's paragraphs."""

    kind: Literal["model", "dataset"]
    tags: dict[str, Any]
    card: list[str]


def push(
    thing: str | Path, repo: str, *, licence: str | None = None, public: bool = False, folder: str | Path | None = None
) -> str:
    """Send a run, a label store or a head to the hub, with a card of what is known; return how others name it.

    `repo`: USER/NAME; made, and private unless `public`, if it is not there. `licence`: as the hub calls it, such as
    apache-2.0; by default that of the backbone of a head, or of the head that made the labels, where it is known.
    `folder`: write what would be sent to this new folder instead. Raises ConfigError in one line where it cannot be.
    """
    thing = Path(thing)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo):
        raise ConfigError(f"{repo!r}: expected USER/NAME, a user or organisation of the hub and a name")
    target = None if folder is None else Path(folder)
    if target is not None and target.exists() and (target.is_file() or any(target.iterdir())):
        raise ConfigError(f"{target}: is there already; name a new folder")
    if target is None and not hub_answers():
        raise ConfigError(f"{repo}: the hub cannot be reached; --dry-run FOLDER writes what would be sent")
    beside = target.parent if target is not None else thing.parent  # on one disk, files need no second place
    beside.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".writing-", dir=beside) as temporary:
        written = Path(temporary) / "parcel"
        parcel = _pack(thing, written, repo, licence)
        if target is None:
            _send(written, repo, parcel.kind, public=public)
        else:
            written.replace(target)
    return f"hf://{'datasets/' if parcel.kind == 'dataset' else ''}{repo}"


def _pack(thing: Path, folder: Path, repo: str, licence: str | None) -> Parcel:
    """Write everything that is sent into a new folder."""
    if thing.suffix == HEAD_SUFFIX:
        head = Head.load(thing)
        licence = _licence(thing, licence or head.backbone.get("licence"))
        parcel = _pack_head(thing, head, folder, repo)
    elif is_run(thing):
        licence = _licence(thing, licence)
        parcel = _pack_run(thing, folder, repo)
    elif (thing / "manifest.json").exists():
        store = LabelStore(thing)
        licence = _licence(thing, licence or store.manifest.teacher.get("backbone", {}).get("licence"))
        parcel = _pack_store(store, folder, repo)
    else:
        raise ConfigError(f"{thing}: expected a run folder, a label store or a head (HEAD{HEAD_SUFFIX})")
    front = yaml.safe_dump({"license": licence, **parcel.tags}, sort_keys=False)
    card = "\n\n".join((f"---\n{front}---", *parcel.card, _checksums(folder)))
    (folder / "README.md").write_text(card + "\n", encoding="utf-8")
    return parcel


def _licence(thing: Path, licence: Any) -> str:
    if not licence:
        raise ConfigError(
            f"{thing}: its card needs a licence, and none is known; give --licence apache-2.0, or whatever its "
            "teacher and images allow, as the hub names it"
        )
    return str(licence).lower()


def _pack_head(path: Path, head: Head, folder: Path, repo: str) -> Parcel:
    folder.mkdir()
    shutil.copyfile(path, folder / HEAD_FILE)
    about = HEAD_CARD.format(
        title=repo.split("/")[1],
        num_classes=head.num_classes,
        what="visual words" if head.kind == "words" else f"classes from {head.kind}",
        backbone=head.backbone.get("name", "a backbone"),
        repo=repo,
    )
    facts = _facts({"backbone": head.backbone, "fitted": {"from": head.kind, **head.fitted}})
    names = head.class_names if head.kind != "words" else ()
    return Parcel(kind="model", tags={"tags": ["token-labeling"]}, card=[about, facts, *_names_of_classes(names)])


def _pack_store(store: LabelStore, folder: Path, repo: str) -> Parcel:
    folder.mkdir()
    (source,) = store.folders
    for name in ("manifest.json", *(shard.path.name for shard in store.shards)):
        _link(source / name, folder / name)
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
    card = [about, _facts(facts), *_names_of_classes(manifest.class_names)]
    return Parcel(kind="dataset", tags={"tags": ["token-labeling"]}, card=card)


def _pack_run(path: Path, folder: Path, repo: str) -> Parcel:
    checkpoint = newest_checkpoint(path)
    state, trained = read_state(checkpoint), load_run(checkpoint)
    write_hub_folder(trained, folder)
    recipe = state["recipe"]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    inside = folder / "checkpoints" / checkpoint.name
    inside.mkdir(parents=True)
    weights = {name: digest for name, digest in state["sha256"].items() if name != "optimizer.safetensors"}
    for name in weights:  # those of the last step and their average: who begins with them may want either
        _link(checkpoint / name, inside / name)
    shorter = {**state, "sha256": weights}
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
        "teacher": dict(_teacher_of(recipe)),
        "versions": state["versions"],
    }
    tags = {"library_name": "timm", "tags": ["timm", "token-labeling"]}
    tags |= {"pipeline_tag": "image-classification"} if names else {}
    card = [about, *_figures(path, state["step"]), _facts(facts), *_names_of_classes(names)]
    return Parcel(kind="model", tags=tags, card=card)


def _teacher_of(recipe: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield what is known of who labelled a run's images: what their store says, where it still is."""
    labels = recipe["data"]["labels"] or []
    for folder in [labels] if isinstance(labels, str) else labels:
        with suppress(StoreError):
            yield from read_manifest(folder).teacher.items()


def _figures(run: Path, step: int) -> Iterator[str]:
    """Yield what a run's evaluation at its checkpoint found, and the command that finds it again."""
    lines = [line for line in read_metrics(run) if line["kind"] == "eval" and line["step"] == step]
    for line in lines[-1:]:
        unwanted = ("step", "kind", "images_per_s")
        figures = {name: value for name, value in line.items() if name not in unwanted}
        yield f"On the val images of its recipe (`tokenlabel eval {run}`):"
        yield _facts(figures)


def _facts(facts: Mapping[str, Any]) -> str:
    """Return a Markdown table of a nested description; what is empty is left out."""

    def rows(name: str, value: Any) -> Iterator[str]:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                yield from rows(f"{name} {key}".replace("_", " ").strip(), inner)
        elif value not in (None, "", [], ()):
            yield f"| {name} | {f'{value:.4g}' if isinstance(value, float) else value} |"

    return "\n".join(("| | |", "|---|---|", *rows("", facts)))


def _names_of_classes(names: tuple[str, ...]) -> list[str]:
    return [f"Classes, in the order of their ids: {', '.join(names)}."] if 0 < len(names) <= MOST_NAMES else []


def _checksums(folder: Path) -> str:
    sums = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "README.md"):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        sums.append(f"{digest}  {path.relative_to(folder).as_posix()}")
    return "\n".join(("SHA-256, as `sha256sum --check` takes them:\n", "```", *sums, "```"))


def _link(source: Path, target: Path) -> None:
    """Copy a file that nobody changes, without a second place on the disk where the disk can."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def _send(folder: Path, repo: str, kind: str, *, public: bool) -> None:
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repo, repo_type=kind, private=not public, exist_ok=True)
        api.upload_folder(repo_id=repo, repo_type=kind, folder_path=folder, commit_message="Upload by tokenlabel")
    except Exception as error:  # the hub's library and its network library raise whatever they run into
        reason = {
            401: "the hub does not know you; log in (`hf auth login`, or HF_TOKEN)",
            403: "you may not write there; it takes a name of yours, and a token with the right to write",
        }.get(status_of(error), f"was not sent ({first_line(error)}); the same command sends it")
        raise ConfigError(f"{repo}: {reason}") from error
