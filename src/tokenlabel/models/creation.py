"""Create any model by its name."""

from __future__ import annotations

from typing import Any

from tokenlabel.core.outputs import TokenModel
from tokenlabel.models.adapter import create_timm_adapter
from tokenlabel.models.names import register_with_timm, why_unknown
from tokenlabel.runtime.coercion import COUNT, Size, check_number, coerced, pair


def create_model(
    name: str, *, num_classes: int, img_size: Size, num_token_classes: int | None = None, **options: Any
) -> TokenModel:
    """Return a new model; docs/models.md lists them.

    `name`: `lvvit_t|s|m|l`, `t2t_vit_14|19|24`, or any name of a timm model. `img_size`: (height, width) of the images.
    `num_classes`: 0 for no class head. `num_token_classes`: number of classes of the tokens, if they differ from the
    images'. `options`: `stage` (see `TimmAdapter`), the fields of `LVViTConfig` or `T2TViTConfig`, for timm's models
    any argument of `timm.create_model`. Raises ValueError for unknown names and options, and for unsupported sizes.

    >>> model = tl.create_model("test_vit", num_classes=2, img_size=64)
    >>> outputs = model(torch.zeros(1, 3, 64, 64))
    >>> outputs.class_logits.shape, outputs.token_logits.shape, outputs.grid
    (torch.Size([1, 2]), torch.Size([1, 16, 2]), (4, 4))
    """
    name, img_size = coerced(name, str, name="name"), pair(img_size)
    num_classes = coerced(num_classes, int, name="num_classes")
    num_token_classes = coerced(num_token_classes, int | None, name="num_token_classes")
    check_number(num_token_classes, COUNT, name="num_token_classes")
    if num_classes < 0 or (num_classes == 0 and not num_token_classes):
        raise ValueError(
            f"num_classes: expected at least 1, or 0 for a model without class head beside num_token_classes, got "
            f"{num_classes}"
        )
    register_with_timm()
    reason = why_unknown(name, weights_option="--model.weights")
    if reason is not None:
        raise ValueError(f"there is no model {name!r}; {reason or 'see docs/models.md for what there is'}")
    return create_timm_adapter(
        name, num_classes=num_classes, img_size=img_size, num_token_classes=num_token_classes, **options
    )
