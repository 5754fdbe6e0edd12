"""Heads: linear layers that make a backbone a teacher, each in a small file.

HEAD.safetensors holds the tensors `matrix` [C, D] and, optionally, `bias` [C] and `center` [D]; everything else is JSON
under the key `head` of the file's metadata.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from tokenlabel.runtime.coercion import described
from tokenlabel.runtime.errors import ModelError, first_line, refuse
from tokenlabel.runtime.hub import local_name
from tokenlabel.runtime.process import write_whole
from tokenlabel.teachers.options import Kind

_HEAD_FORMAT = 1
_KEY = "head"  # of the metadata


class Head(nn.Module):
    """A distribution over C classes for each vector of a backbone: `softmax(scale * x @ matrix.T + bias)`.

    `matrix` [C, D] float32, `bias` [C], `center` [D]. If `normalised`, x is the vector minus `center`, scaled to length
    1, as the rows of the matrix are, so logits are scaled cosines. `kind`: what the head was fitted on.
    `class_names`: C names; visual words have none. `fitted`, `backbone`: how it was fitted and how well, and the
    backbone of its vectors, both as JSON.

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
        if not (isinstance(matrix, Tensor) and matrix.ndim == 2):
            raise ValueError(f"matrix: expected a tensor [classes, width], got {described(matrix)}")
        for name, tensor in (("bias", bias), ("center", center)):
            if not (tensor is None or isinstance(tensor, Tensor)):
                raise ValueError(f"{name}: expected a tensor or None, got {described(tensor)}")
        if isinstance(class_names, str) or not all(isinstance(name, str) for name in class_names):
            raise ValueError(f"class_names: expected a list of names, got {class_names!r}")
        # Buffers, not parameters: a head is frozen, and moves with `.to(device)`.
        for name, tensor in (("matrix", matrix), ("bias", bias), ("center", center)):
            self.register_buffer(name, None if tensor is None else tensor.detach().float().contiguous())
        self.kind: Kind = kind
        self.scale, self.normalised = float(scale), normalised
        self.fitted, self.backbone = (json.loads(json.dumps(dict(d or {}))) for d in (fitted, backbone))
        self._class_names = tuple(class_names)
        _check(self)

    @property
    def num_classes(self) -> int:
        """C, the number of classes or words."""
        return len(self.matrix)

    @property
    def width(self) -> int:
        """D, the dimension of a vector."""
        return self.matrix.shape[1]

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes; `word 0` and so on for visual words, whose numbers mean nothing in another head."""
        return self._class_names or tuple(f"word {i}" for i in range(self.num_classes))

    @property
    def hash(self) -> str:
        """A hash of all tensors, the class names and the backbone's weights, which identifies this head."""
        digest = hashlib.blake2b(digest_size=16)
        about = [self.kind, self.scale, self.normalised, self._class_names, self.backbone.get("weights")]
        digest.update(json.dumps(about).encode())
        for tensor in (self.matrix, self.bias, self.center):
            digest.update(b"" if tensor is None else tensor.cpu().numpy().tobytes())
        return f"blake2b:{digest.hexdigest()}"

    def forward(self, features: Float[Tensor, "*locations D"]) -> Float[Tensor, "*locations C"]:
        """Return the logits of vectors, always in float32: bf16 is too coarse for a cosine times 50."""
        if not (isinstance(features, Tensor) and features.shape[-1:] == (self.width,)):
            raise ValueError(
                f"expected a tensor [..., {self.width}], the width of the vectors of "
                f"{self.backbone.get('name', 'the backbone of this head')}, got {described(features)}"
            )
        with torch.autocast(features.device.type, enabled=False):
            x = features.float()
            if self.center is not None:
                x = x - self.center
            if self.normalised:
                x = nn.functional.normalize(x, dim=-1)
            return nn.functional.linear(x * self.scale, self.matrix, self.bias)

    def top(self, features: Float[Tensor, "n D"], k: int) -> tuple[Int[Tensor, "n k"], Float[Tensor, "n k"]]:
        """Return the k most probable classes of vectors and their probabilities, the most probable first."""
        if not 1 <= k <= self.num_classes or features.ndim != 2:
            raise ValueError(
                f"expected vectors [n, {self.width}] and k from 1 to {self.num_classes}, got {described(features)} "
                f"and {k}"
            )
        logits = self(features)
        top = logits.topk(k, dim=1)
        return top.indices, (top.values - logits.logsumexp(dim=1, keepdim=True)).exp()

    def extra_repr(self) -> str:
        """Return a short description of the head."""
        licence = self.backbone.get("licence")
        return (
            f"{self.num_classes:,} {'words' if self.kind == 'words' else f'classes from {self.kind}'} of vectors of "
            f"{self.width} of {self.backbone.get('name', 'no backbone')}{f' ({licence})' if licence else ''}"
        )

    def save(self, path: str | Path) -> None:
        """Write the head to a file, atomically."""
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
        """Return the head of a file. Raises ModelError if it is missing, damaged, or holds something else."""
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
        if head.hash != about.get("hash"):  # safetensors has no checksum
            raise ModelError(f"{path}: is damaged (its numbers are not those that were written); fit it again")
        return head


def read_about(path: str | Path) -> dict[str, Any]:
    """Return the metadata of a head file, without its tensors. Raises ModelError as `Head.load` does."""
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
    (num_classes, width), names = head.matrix.shape, head._class_names
    bias, center = (None if tensor is None else tuple(tensor.shape) for tensor in (head.bias, head.center))
    finite = all(bool(tensor.isfinite().all()) for tensor in head.buffers())
    refuse(
        {
            f"expected a kind of {', '.join(get_args(Kind))}, got {head.kind!r}": head.kind not in get_args(Kind),
            f"expected 2 classes at least, and a bias for each; got {num_classes}": num_classes < 2
            or bias not in (None, (num_classes,)),
            f"expected a center of {width} numbers, got {center}": center not in (None, (width,)),
            f"{num_classes} classes, but {len(names)} class names": names and len(names) != num_classes,
            f"a head from {head.kind} needs the names of its {num_classes} classes": not names and head.kind != "words",
            "expected finite numbers and a positive scale": not 0 < head.scale < math.inf or not finite,
        },
        ValueError,
    )
