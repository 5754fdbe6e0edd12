"""Small data sets in the layouts of large ones, and small segmentation recipes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tokenlabel.runtime.configuration import config_from_dict
from tokenlabel.segmentation.recipe import SegmentRecipe

BACKBONE = {"patch_size": 6, "depth": 2, "width": 16, "num_heads": 2, "stem_width": 8, "drop_path": 0.2}


def write_image(path: Path, img_size: tuple[int, int], *, seed: int = 0) -> None:
    """Write random pixels of (height, width), as the suffix says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*img_size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_mask(path: Path, values: Any, *, palette: bool = False) -> None:
    """Write values as a PNG of one channel."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(values, np.uint8))
    if palette:
        image.putpalette([255 - i // 3 for i in range(768)])
    image.save(path)


def write_segmentation_state(checkpoint: Path) -> None:
    """Write what tells the checkpoint of a segmentation run from a classifier's."""
    checkpoint.mkdir(parents=True)
    state = {"format": 2, "step": 1, "recipe": {"data": {"layout": "folders"}}, "class_names": ["road"], "sha256": {}}
    (checkpoint / "state.json").write_text(json.dumps(state))


def nested_recipe(root: Path, **changes: Any) -> dict[str, Any]:
    """Return a recipe on the embedded scenes as nested dicts; `a__b=value` changes a field."""
    recipe: dict[str, Any] = {
        "data": {"layout": "scenes", "root": str(root), "background": "background", "num_workers": 0},
        "model": {"name": "lvvit_t", "img_size": [24, 24], "options": BACKBONE, "neck_width": 16, "head_width": 8},
        "augment": {"scale": [0.5, 1.0]},
        "optim": {
            "lr": 2e-3,
            "lr_batch_size": 8,
            "schedule": "poly",
            "min_lr": 0.0,
            "warmup_steps": 2,
            "ema_decay": 0.9,
        },
        "eval": {"every_epochs": 1.0, "short_side_px": 24},
        "checkpoint": {"every_epochs": 0.4},
        "num_steps": 9,
        "batch_size": 8,
    }
    for dotted, value in changes.items():
        *parents, last = dotted.split("__")
        place = recipe
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return recipe


def recipe_for(root: Path, **changes: Any) -> SegmentRecipe:
    """Return a recipe on the embedded scenes."""
    return config_from_dict(nested_recipe(root, **changes), SegmentRecipe, name="test")
