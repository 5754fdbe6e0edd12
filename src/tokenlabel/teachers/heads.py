"""Heads: what makes a teacher of a backbone without classes, in a small file of its own.

HEAD.safetensors holds the tensors `matrix` [C, D] and, where the head has them, `bias` [C] and `center` [D]; all else
is JSON under the key `head` of the file's metadata.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from tokenlabel.runtime.errors import ModelError, first_line, refuse
from tokenlabel.runtime.hub import local_name
from tokenlabel.runtime.process import write_whole

HEAD_SUFFIX = ".safetensors"
Kind = Literal["labels", "masks", "words", "text", "file"]

_HEAD_FORMAT = 1
_KEY = "head"  # of the metadata


class Head(nn.Module):
    """A distribution over C classes for each vector of a backbone: `softmax(scale * x @ matrix.T + bias)`.

    `matrix` [C, D] float32, `bias` [C], `center` [D]. Where `normalised`, x is the vector minus `center`, at length 1,
    and so are the rows of the matrix: scaled cosines. `kind`: what it was made from. `class_names`: C of them;
    words have none but their numbers. `fitted`, `backbone`: what it was fitted on and how well, and the backbone that
    its vectors come from; both as JSON holds them.

    >>> head = tl.Head(torch.eye(2), kind="labels", class_names=["ant", "bee"])
    >>> ids, probs = head.top(torch.tensor([[0.0, 3.0]]), k=1)
    >>> head.class_names[ids.item()], round(probs.item(), 2)
    ('bee', 0.95)
    """

    matrix: Tensor
    bias: Tensor | None
    center: Tensor | None

    def __init__(
        self,
        matrix: Float[Tensor, "C D"],
        *,
        kind: Kind,
        bias: Float[Tensor, " C"] | None = None,
        center: Float[Tensor, " D"] | None = None,
        scale: float = 1.0,
        normalised: bool = False,
        class_names: Sequence[str] = (),
        fitted: Mapping[str, Any] | None = None,
        backbone: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        for name, tensor in (("matrix", matrix), ("bias", bias), ("center", center)):
            self.register_buffer(name, None if tensor is None else tensor.detach().float().contiguous())
        self.kind: Kind = kind
        self.scale, self.normalised = float(scale), normalised
        self.fitted, self.backbone = (json.loads(json.dumps(dict(d or {}))) for d in (fitted, backbone))
        self._class_names = tuple(class_names)
        _check(self)

    @property
    def num_classes(self) -> int:
        """C: how many classes, or words."""
        return len(self.matrix)

    @property
    def width(self) -> int:
        """D: the numbers of a vector."""
        return self.matrix.shape[1]

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes; `word 0` and so on for visual words, which mean nothing without the head's hash."""
        return self._class_names or tuple(f"word {i}" for i in range(self.num_classes))

    @property
    def hash(self) -> str:
        """What tells this head from any other: of all numbers, the class names and the backbone's weights."""
        digest = hashlib.blake2b(digest_size=16)
        about = [self.kind, self.scale, self.normalised, self._class_names, self.backbone.get("weights")]
        digest.update(json.dumps(about).encode())
        for tensor in (self.matrix, self.bias, self.center):
            digest.update(b"" if tensor is None else tensor.cpu().numpy().tobytes())
        return f"blake2b:{digest.hexdigest()}"

    def forward(self, features: Float[Tensor, "*locations D"]) -> Float[Tensor, "*locations C"]:
        """Return the logits of vectors, in float32 whatever their precision: a cosine times 50 is too fine for bf16."""
        with torch.autocast(features.device.type, enabled=False):
            x = features.float()
            if self.center is not None:
                x = x - self.center
            if self.normalised:
                x = nn.functional.normalize(x, dim=-1)
            return nn.functional.linear(x * self.scale, self.matrix, self.bias)

    def top(self, features: Float[Tensor, "n D"], k: int) -> tuple[Int[Tensor, "n k"], Float[Tensor, "n k"]]:
        """Return the k most probable classes of vectors and their probabilities, the most probable first."""
        logits = self(features)
        top = logits.topk(k, dim=1)
        return top.indices, (top.values - logits.logsumexp(dim=1, keepdim=True)).exp()

    def extra_repr(self) -> str:
        """Return what the head is in a few words, for people."""
        licence = self.backbone.get("licence")
        return (
            f"{self.num_classes:,} {'words' if self.kind == 'words' else f'classes from {self.kind}'} of vectors of "
            f"{self.width} of {self.backbone.get('name', 'no backbone')}{f' ({licence})' if licence else ''}"
        )

    def save(self, path: str | Path) -> None:
        """Write the head to a file that appears whole or not at all."""
        tensors = {"matrix": self.matrix, "bias": self.bias, "center": self.center}
        about = {
            "format": _HEAD_FORMAT,
            "kind": self.kind,
            "scale": self.scale,
            "normalised": self.normalised,
            "class_names": self._class_names,
            "fitted": self.fitted,
            "backbone": self.backbone,
            "hash": self.hash,
        }
        present = {name: tensor.cpu() for name, tensor in tensors.items() if tensor is not None}
        write_whole(Path(path), [save(present, {_KEY: json.dumps(about)})])

    @staticmethod
    def load(path: str | Path) -> Head:
        """Return the head of a file. Raises ModelError for one that is missing, damaged, or holds something else."""
        path = local_name(path)
        about = read_about(path)
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            head = Head(
                tensors["matrix"],
                kind=about["kind"],
                bias=tensors.get("bias"),
                center=tensors.get("center"),
                scale=about["scale"],
                normalised=about["normalised"],
                class_names=about["class_names"],
                fitted=about["fitted"],
                backbone=about["backbone"],
            )
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise ModelError(f"{path}: is damaged ({first_line(error)}); fit it again") from error
        if head.hash != about.get("hash"):
            raise ModelError(f"{path}: is damaged (its numbers are not those that were written); fit it again")
        return head


def read_about(path: str | Path) -> dict[str, Any]:
    """Return what a head file says of itself, without its tensors. Raises ModelError as `Head.load` does."""
    path = local_name(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file; `tokenlabel fit-head` makes heads") from None
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: is damaged or no head file ({first_line(error)}); fit it again") from error
    if _KEY not in metadata:
        raise ModelError(
            f"{path}: holds no head, but other tensors; weights of a network go with its name: --teacher NAME "
            f"--weights {path}. `tokenlabel fit-head` makes heads"
        )
    try:
        about = json.loads(metadata[_KEY])
        version = about["format"]
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{path}: is damaged ({first_line(error)}); fit it again") from error
    if version != _HEAD_FORMAT:
        raise ModelError(f"{path}: head format {version!r}, this version of tokenlabel reads {_HEAD_FORMAT}")
    return about


def _check(head: Head) -> None:
    """Raise ValueError for what is no head."""
    num_classes, width = head.matrix.shape
    bias, center, names = head.bias, head.center, head._class_names
    tensors = [tensor for tensor in (head.matrix, bias, center) if tensor is not None]
    refuse(
        {
            f"expected a kind of {', '.join(get_args(Kind))}, got {head.kind!r}": head.kind not in get_args(Kind),
            f"expected 2 classes at least, and a bias for each; got {num_classes}": num_classes < 2
            or (bias is not None and bias.shape != (num_classes,)),
            f"expected a center of {width} numbers, got {center is not None and tuple(center.shape)}": center
            is not None
            and center.shape != (width,),
            f"{num_classes} classes, but {len(names)} class names": names and len(names) != num_classes,
            f"a head from {head.kind} needs the names of its {num_classes} classes": not names and head.kind != "words",
            "expected finite numbers and a positive scale": not head.scale > 0
            or not all(bool(tensor.isfinite().all()) for tensor in tensors),
        },
        ValueError,
    )
