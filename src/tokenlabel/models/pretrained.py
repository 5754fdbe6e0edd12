"""A network by its name, with timm's pretrained weights or those of a file, as timm makes it or with a token head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import timm
import torch
from jaxtyping import Float
from timm.data.config import resolve_data_config
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from tokenlabel.core.outputs import Outputs
from tokenlabel.models.adapter import TimmAdapter
from tokenlabel.models.features import REFUSALS
from tokenlabel.models.runs import options_without_weights
from tokenlabel.models.weight_files import find_weights, read_class_names
from tokenlabel.models.weights import build_with, count_classes, load, misfit
from tokenlabel.runtime.coercion import pair
from tokenlabel.runtime.errors import ModelError, first_line
from tokenlabel.runtime.hub import hub_or_cache


class PlainClassifier(nn.Module):
    """Any timm classifier, asked for its own logits alone; the one token that it has repeats them."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        data = resolve_data_config({}, model=backbone)
        self.backbone, self.mean, self.std = backbone, tuple(data["mean"]), tuple(data["std"])
        self.num_classes: int = backbone.num_classes

    def forward(self, images: Float[Tensor, "B 3 height width"]) -> Outputs:
        """Return the network's logits of normalised images."""
        logits = self.backbone(images)
        return Outputs(logits, logits[:, None], nn.Identity(), (1, 1))


def network_by_name(
    name: str, weights: str | None, about: Mapping[str, Any], *, img_size: tuple[int, int] | None, as_backbone: bool
) -> tuple[Any, dict[str, Any]]:
    """Return a network with pretrained weights or those of a file, and the options that it was made with."""
    preset = get_pretrained_cfg(name, allow_unregistered=True)
    options = options_without_weights(about.get("options", {}))
    wanted = img_size or about.get("img_size")
    if preset is not None and preset.fixed_input_size:
        if as_backbone and _takes_any_size(name, options):
            options["dynamic_img_size"] = True
        elif wanted:
            options["img_size"] = pair(wanted)
    try:
        if weights is not None:
            return _from_file(name, weights, options, about, img_size=wanted), options
        with hub_or_cache(online=not name.startswith("local-dir:")):
            return timm.create_model(name, pretrained=True, **options), options
    except Exception as error:  # timm, the hub and its network library raise whatever they run into
        advice = "give a checkpoint file by --weights" if weights is None else "is it of this model?"
        raise ModelError(f"the weights of {name} cannot be loaded ({first_line(error)}); {advice}") from error


def _takes_any_size(name: str, options: Mapping[str, Any]) -> bool:
    """Say whether timm can make the model so that it takes images of any size, resizing its position embeddings."""
    try:
        with torch.device("meta"):
            timm.create_model(name, **{**options, "dynamic_img_size": True})
    except REFUSALS:  # models without that option are not told apart otherwise
        return False
    return True


def _from_file(name: str, path: str, options: dict[str, Any], about: Mapping[str, Any], *, img_size: Any) -> Any:
    """Return a network with a file's weights: an adapter where these have a trained token head, else timm's own.

    It is made once, unless the file has another number of classes than it says, or timm has to adapt its tensors.
    """
    stage = options.pop("stage", None)
    create = partial(timm.create_model, name, **options)
    stated = read_class_names(path)
    with hub_or_cache(online=False):
        network: Any = create(**({"num_classes": len(stated)} if stated else {}))
    weights = find_weights(path, network.state_dict(), average=None)
    num_classes = count_classes(weights, network)
    if num_classes != network.num_classes:
        with hub_or_cache(online=False):
            network = create(num_classes=num_classes)
    if weights.token_head and about["uses_token_labels"]:
        size = pair(img_size or network.pretrained_cfg["input_size"][1:])
        others = about.get("token_classes")
        model = TimmAdapter(
            network,
            name=name,
            num_classes=num_classes,
            img_size=size,
            stage=stage,
            num_token_classes=others and others["count"],
        )
        model.rebuild = create
        new_heads = load(model, weights, tokens="same" if others else "classes").new_heads
        untrained = any(name.startswith("token_head.") for name in new_heads)
        return network if untrained else model
    if hasattr(network, "aux_head"):
        network.aux_head = None  # it would be one that says nothing
    if weights.path.suffix == ".npz" or misfit(weights.backbone, network.state_dict(), spared=()):
        network = build_with(create, replace(weights, token_head={}), like=network)
        if hasattr(network, "aux_head"):
            network.aux_head = None
    else:
        network.load_state_dict(weights.backbone, strict=False)  # counts of batches may be left out
    return network
