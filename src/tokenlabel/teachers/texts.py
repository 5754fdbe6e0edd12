"""Embeddings of class names: from a file, or by the text tower of an image-text network (open_clip; extra `text`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import normalize

from tokenlabel.runtime.errors import ModelError, first_line
from tokenlabel.runtime.hub import hub_or_cache
from tokenlabel.runtime.process import listed
from tokenlabel.teachers.backbone import Backbone
from tokenlabel.teachers.heads import Head

FILE_TEMPERATURE = 0.01

# A location often shows a part of an object, so prompts name parts and close-ups, too.
PROMPTS = (
    "{}",
    "a photo of a {}.",
    "a photo of the {}.",
    "a close-up of a {}.",
    "a part of a {}.",
    "a picture in which there is a {}.",
    "a blurry photo of a {}.",
    "many {}.",
)

_SIGLIP = {
    "base_patch16_siglip_224": "B-16-SigLIP",
    "base_patch16_siglip_256": "B-16-SigLIP-256",
    "base_patch16_siglip_384": "B-16-SigLIP-384",
    "base_patch16_siglip_512": "B-16-SigLIP-512",
    "large_patch16_siglip_256": "L-16-SigLIP-256",
    "large_patch16_siglip_384": "L-16-SigLIP-384",
    "so400m_patch14_siglip_224": "SO400M-14-SigLIP",
    "so400m_patch14_siglip_378": "SO400M-14-SigLIP-378",
}

# By timm's name of an image tower: open_clip's name of the whole network, and of its weights.
PAIRS: dict[str, tuple[str, str]] = {
    "vit_base_patch32_clip_224.openai": ("ViT-B-32-quickgelu", "openai"),
    "vit_base_patch16_clip_224.openai": ("ViT-B-16-quickgelu", "openai"),
    "vit_large_patch14_clip_224.openai": ("ViT-L-14-quickgelu", "openai"),
    "vit_large_patch14_clip_336.openai": ("ViT-L-14-336-quickgelu", "openai"),
    "vit_base_patch32_clip_224.laion2b": ("ViT-B-32", "laion2b_s34b_b79k"),
    "vit_base_patch16_clip_224.laion2b": ("ViT-B-16", "laion2b_s34b_b88k"),
    "vit_large_patch14_clip_224.laion2b": ("ViT-L-14", "laion2b_s32b_b82k"),
    "vit_huge_patch14_clip_224.laion2b": ("ViT-H-14", "laion2b_s32b_b79k"),
    "vit_base_patch32_clip_224.datacompxl": ("ViT-B-32", "datacomp_xl_s13b_b90k"),
    "vit_base_patch16_clip_224.datacompxl": ("ViT-B-16", "datacomp_xl_s13b_b90k"),
    "vit_large_patch14_clip_224.datacompxl": ("ViT-L-14", "datacomp_xl_s13b_b90k"),
    "vit_pe_core_tiny_patch16_384.fb": ("PE-Core-T-16-384", "meta"),
    "vit_pe_core_small_patch16_384.fb": ("PE-Core-S-16-384", "meta"),
    "vit_pe_core_base_patch16_224.fb": ("PE-Core-B-16", "meta"),
    "vit_pe_core_large_patch14_336.fb": ("PE-Core-L-14-336", "meta"),
    **{f"vit_{timm}.webli": (f"ViT-{clip}", "webli") for timm, clip in _SIGLIP.items()},
    **{f"vit_{timm}.v2_webli": (f"ViT-{clip}".replace("LIP", "LIP2"), "webli") for timm, clip in _SIGLIP.items()},
}


@dataclass(frozen=True, eq=False)
class OpenClipTower:
    """The text tower of an open_clip network, with its tokenizer. `scale`: the learned inverse temperature."""

    network: Any
    tokenizer: Any
    scale: float

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> Float[Tensor, "n D"]:
        """Return the vector of each text."""
        return self.network.encode_text(self.tokenizer(list(texts))).float()


def load_tower(backbone: str) -> OpenClipTower:
    """Return the text tower of a backbone by timm's name. Raises ModelError if it has none, or is unknown."""
    if backbone not in PAIRS:
        raise ModelError(
            f"{backbone}: its text tower is not known, if it has one; known are those of {listed(sorted(PAIRS), 5)}. "
            "Make embeddings of the names yourself and give them by --from FILE, or fit a head --from labels"
        )
    try:
        import open_clip  # pyright: ignore[reportMissingImports]  (the extra `text`)
    except ImportError:
        raise ModelError("--from text needs open_clip, which is not installed: pip install tokenlabel[text]") from None
    name, pretrained = PAIRS[backbone]
    try:
        with hub_or_cache():
            network: Any = open_clip.create_model(name, pretrained=pretrained).eval()
            tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # open_clip, the hub and tokenizers raise whatever they run into
        raise ModelError(
            f"the text tower of {backbone} ({name}, {pretrained}) cannot be loaded ({first_line(error)})"
        ) from error
    return OpenClipTower(network, tokenizer, float(network.logit_scale.exp()))


def text_embeddings(tower: Any, class_names: Sequence[str]) -> Float[Tensor, "C D"]:
    """Return the mean direction of the embeddings of each class in all PROMPTS, of length 1. `tower`: has `encode`."""
    rows = []
    for name in class_names:
        vectors = tower.encode([prompt.format(name.replace("_", " ")) for prompt in PROMPTS])
        rows.append(normalize(normalize(vectors, dim=1).mean(dim=0), dim=0))
    return torch.stack(rows)


def head_of_embeddings(from_: str, names: Sequence[str], backbone: Backbone, temperature: float | None) -> Head:
    """Return the head whose logits are scaled cosines with the embeddings of class names.

    `from_`: `text` for the backbone's own text tower, or a file of embeddings. `temperature`: of the cosines; if None
    that of the tower, or .01. Raises ModelError for embeddings of another number of classes or another dimension.
    """
    name = backbone.description["name"]
    if from_ == "text":
        tower = load_tower(name)
        matrix, usual = text_embeddings(tower, names), 1 / tower.scale
    else:
        matrix, usual = _read_embeddings(Path(from_)), FILE_TEMPERATURE
    if len(names) < 2 or matrix.shape != (len(names), backbone.width):
        raise ModelError(
            f"--from {from_}: expected an embedding of {backbone.width} numbers, the width of {name}, for each of "
            f"{len(names):,} class names (two at least); got {tuple(matrix.shape)}"
        )
    return Head(
        normalize(matrix.float(), dim=1),
        kind="text" if from_ == "text" else "file",
        scale=1 / (temperature or usual),
        normalised=True,
        class_names=names,
        fitted={"prompts": len(PROMPTS)} if from_ == "text" else {"file": Path(from_).name},
        backbone=backbone.description,
    )


def _read_embeddings(path: Path) -> Float[Tensor, "C D"]:
    """Return the matrix in a file, or the one called `embeddings` if there are several."""
    try:
        if path.suffix == ".npy":
            array = np.load(path, allow_pickle=False)
            if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
                raise ValueError("expected one array of real numbers")
            tensors = {"": torch.from_numpy(array.astype(np.float32))}
        else:
            tensors = load_file(path)
    except (OSError, ValueError, EOFError, SafetensorError) as error:
        raise ModelError(f"--from {path}: cannot be read as embeddings ({first_line(error)})") from error
    matrices = [tensors["embeddings"]] if "embeddings" in tensors else [t for t in tensors.values() if t.ndim == 2]
    if len(matrices) != 1 or matrices[0].ndim != 2:
        raise ModelError(f"--from {path}: expected one tensor [classes, width], or one called `embeddings`")
    if not matrices[0].isfinite().all():
        raise ModelError(f"--from {path}: holds numbers that are not finite")
    if empty := (matrices[0] == 0).all(dim=1).nonzero()[:, 0].tolist():  # all cosines would be 0, above negative ones
        raise ModelError(f"--from {path}: row {empty[0]} (from 0) holds zeros alone, which is no embedding")
    return matrices[0].float()
