"""Models by timm's names: why a name means none."""

from __future__ import annotations

import re
from difflib import get_close_matches
from pathlib import Path

import timm
from timm.models import get_arch_pretrained_cfgs

from tokenlabel.runtime.process import listed

FILE_ENDINGS = (".pth", ".pt", ".tar", ".safetensors", ".npz", ".bin", ".onnx", ".ckpt")


def why_unknown(name: str, ours: tuple[str, ...], *, weights_option: str) -> str | None:
    """Return why a name means no model, and what was meant perhaps ("" if nothing comes close); None if it means one.

    `ours`: names of models that timm does not have. `weights_option`: where a file of weights belongs.
    """
    if name in ours or name.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        return None
    architecture, dot, tag = name.partition(".")
    tags = [known.partition(".")[2] for known in get_arch_pretrained_cfgs(architecture)]
    if timm.is_model(architecture) and (not dot or tag in tags):
        return None  # whatever folder of this name there may be
    path, advice = Path(name), f"give the name of its network, and the file by {weights_option} {name}"
    if path.is_dir():
        return _about_folder(path)
    if path.is_file() and (path.parent / "state.json").exists():
        return f"it is a file of a checkpoint: give its folder, {path.parent}"
    if path.is_file():
        return f"it is a file: {advice}"
    if name.endswith(FILE_ENDINGS):
        return f"there is no such file; if there were, {advice}"
    if re.fullmatch(r"[\w-]+/[\w.-]+", name):
        return f"there is no such folder; a model of the Hugging Face hub is hf://{name}"
    if "/" in name or name.startswith((".", "~")):
        return "there is no such folder"
    if timm.is_model(architecture):
        if not any(tags):
            return f"{architecture} comes without a tag"
        near = get_close_matches(tag, tags) or [known for known in tags if known]
        return f"Invalid pretrained tag ({tag}) for {architecture}, which has {listed(near)}"
    models = sorted({*ours, *timm.list_models()})
    near = get_close_matches(name.lower(), models) or get_close_matches(architecture.lower(), models)
    return f"did you mean {' or '.join(near)}?" if near else ""


def _about_folder(folder: Path) -> str:
    if not any(folder.iterdir()):
        return "it is an empty folder"
    if folder.name == "checkpoints":
        return f"did you mean the run, {folder.parent}?"
    if (folder / "recipe.yaml").exists():
        return "it is a run that has no checkpoint yet"
    if (folder / "config.json").exists():
        return f"did you mean local-dir:{folder}?"
    return "that folder holds neither checkpoints nor a config.json"
