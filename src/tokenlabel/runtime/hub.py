"""Runs, label stores, heads and models on the Hugging Face hub: download them by name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import Thread
from typing import Any

from tokenlabel.runtime.errors import ConfigError, first_line, refuse
from tokenlabel.runtime.urls import as_url

REACH_WITHIN_S = 5.0
HEAD_FILE = "head.safetensors"  # what a head is called on the hub, whatever it was called before
# Those that a card may name by themselves (https://huggingface.co/docs/hub/repositories-licenses).
LICENCES = {
    "afl-3.0", "agpl-3.0", "apache-2.0", "apple-amlr", "apple-ascl", "artistic-2.0", "bigcode-openrail-m",
    "bigscience-bloom-rail-1.0", "bigscience-openrail-m", "bsd", "bsd-2-clause", "bsd-3-clause",
    "bsd-3-clause-clear", "bsl-1.0", "c-uda", "cc", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0",
    "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0",
    "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc0-1.0",
    "cdla-permissive-1.0", "cdla-permissive-2.0", "cdla-sharing-1.0", "creativeml-openrail-m",
    "deepfloyd-if-license", "ecl-2.0", "epl-1.0", "epl-2.0", "etalab-2.0", "eupl-1.1", "eupl-1.2",
    "fair-noncommercial-research-license", "gemma", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "grok2-community",
    "h-research", "intel-research", "isc", "lgpl", "lgpl-2.1", "lgpl-3.0", "lgpl-lr", "llama2", "llama3",
    "llama3.1", "llama3.2", "llama3.3", "llama4", "lppl-1.3c", "mit", "mpl-2.0", "ms-pl", "ncsa", "odbl", "odc-by",
    "ofl-1.1", "openmdw-1.0", "openmdw-1.1", "openrail", "openrail++", "osl-3.0", "other", "pddl", "postgresql",
    "unknown", "unlicense", "wtfpl", "zlib",
}  # fmt: skip
# One slash is what pathlib leaves of two.
_NAME = re.compile(r"hf:/{1,2}(?P<kind>datasets/)?(?P<repo>[\w.-]+/[\w.-]+?)(@(?P<revision>[\w./-]+))?/?")


def local_name(name: str | Path) -> str:
    """Return a name as it is; for `hf://USER/NAME[@REVISION]`, what it means on this machine, downloaded if need be.

    That is a folder for a run or a label store (`hf://datasets/USER/NAME`), a file for a head, and `local-dir:FOLDER`
    for another model of timm's. REVISION is a branch, a tag or a commit. Everything comes from the hub's cache where
    the hub cannot be reached. Raises ConfigError in one line for what is not there, or is nothing of the kind, and for
    other URLs.
    """
    text, url = str(name), as_url(name)
    if not text.startswith("hf:/"):
        refuse({f"{url}: expected a path, or a name on the hub (hf://USER/NAME); copy it here first": url})
        return text
    found = _NAME.fullmatch(text)
    if found is None:
        raise ConfigError(
            f"{text}: expected hf://USER/NAME or hf://USER/NAME@REVISION (labels: hf://datasets/USER/NAME)"
        )
    folder = _download(found["repo"], "dataset" if found["kind"] else "model", found["revision"])
    if (folder / HEAD_FILE).exists():
        return str(folder / HEAD_FILE)
    if (folder / "checkpoints").is_dir() or (folder / "manifest.json").exists():
        return str(folder)
    if (folder / "config.json").exists():
        return f"local-dir:{folder}"
    raise ConfigError(
        f"{text}: holds no run, label store or head of `tokenlabel push`, and no model of timm's (config.json)"
    )


def licence_metadata(name: str) -> dict[str, str]:
    """Return how a card states a licence; one that the hub does not list is `other`, by its name."""
    spelled = re.sub(r"[^a-z0-9.+-]+", "-", name.lower()).strip("-")
    refuse({f"--licence {name!r}: names none; expected one of the hub, such as apache-2.0": not spelled})
    return {"license": spelled} if spelled in LICENCES else {"license": "other", "license_name": spelled}


def is_hub_name(name: str | Path) -> bool:
    """Return True for the name of a whole repository of the hub, False for a file or folder in one."""
    return _NAME.fullmatch(str(name)) is not None


@cache
def _download(repo: str, kind: str, revision: str | None) -> Path:
    """Return the folder of a repository in the hub's cache: once a process, so that a store stays as it was opened."""
    from huggingface_hub import snapshot_download

    name = f"hf://{'datasets/' if kind == 'dataset' else ''}{repo}"
    try:
        with hub_or_cache():
            return Path(snapshot_download(repo, repo_type=kind, revision=revision))
    except Exception as error:  # the hub's library and its network library raise whatever they run into
        reason = _NOT_THERE if status_of(error) in (401, 403, 404) else first_line(error)
        raise ConfigError(f"{name}: {reason}") from error


_NOT_THERE = "not there, or private and not yours: check the name and REVISION, and log in (`hf auth login`, HF_TOKEN)"


def status_of(error: Exception) -> int:
    """Return the status that the hub answered with, 0 for errors of other kinds."""
    return getattr(getattr(error, "response", None), "status_code", 0)


@contextmanager
def hub_or_cache(*, online: bool = True) -> Iterator[None]:
    """Let huggingface_hub read from its cache alone where the hub does not answer, or if not `online`.

    Raises OSError for what is not in the cache.
    """
    # By itself it tries each file six times before it looks into the cache: a minute for one model.
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    before = constants.HF_HUB_OFFLINE  # read at each call, so setting it works after the import
    constants.HF_HUB_OFFLINE = before or not online or not hub_answers()
    try:
        yield
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        reason = "cannot be reached" if online else "is not asked where a file is given"
        raise OSError(f"not in the cache of the hub, and {constants.ENDPOINT} {reason}") from error
    finally:
        constants.HF_HUB_OFFLINE = before


def hub_answers() -> bool:
    """Return True if the hub answers within REACH_WITHIN_S."""
    # In a thread: a DNS lookup, or a firewall that drops packets, has no time limit of its own.
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    answers: list[bool] = []

    def _ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=REACH_WITHIN_S)
            answers.append(True)
        except Exception:  # whatever networks, proxies and their libraries raise
            answers.append(False)

    thread = Thread(target=_ask, daemon=True)
    thread.start()
    thread.join(REACH_WITHIN_S)
    return answers == [True]


def options_without_weights(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's options without those that make timm download or read weights."""
    return {k: v for k, v in options.items() if k not in ("pretrained", "checkpoint_path", "cache_dir")}
