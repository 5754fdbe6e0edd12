"""Images in datasets of the library `datasets` of Hugging Face: of the hub, or a folder that `save_to_disk` wrote.

`hf-dataset:NAME:SPLIT` names them, in full `hf-dataset:NAME@REVISION:CONFIG:SPLIT,image=COLUMN,label=COLUMN`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tokenlabel.data.images import ImageFiles
from tokenlabel.data.listings import Strings
from tokenlabel.runtime.errors import DataError, ImageError, first_line
from tokenlabel.runtime.process import listed

if TYPE_CHECKING:
    from datasets import Dataset

PREFIX = "hf-dataset:"


class HFImages(ImageFiles):
    """The images of one split of a dataset, encoded as they are stored. Keys are `SPLIT/INDEX`.

    `name`: as above. `classes`: False for images whose classes are not looked at. The image is the column of type
    Image, the class that of type ClassLabel, if there is one; a class of -1 or none is unknown. Raises DataError for
    what cannot be had or is no such dataset, and where there are several splits or columns to choose from.
    """

    def __init__(self, name: str, *, classes: bool = True) -> None:
        chosen = dict(re.findall(r",(image|label)=([^,]+)", name))
        split, dataset = _load(name, re.sub(r",(image|label)=[^,]+", "", name).removeprefix(PREFIX))
        image = _column(name, dataset, "Image", chosen.get("image"))
        if image is None:
            raise DataError(f"{name}: no column of type Image; its columns are {_columns(dataset)}")
        label = _column(name, dataset, "ClassLabel", chosen.get("label")) if classes else None
        ids, class_names = np.full(len(dataset), -1, np.int64), list[str]()
        if label is not None:
            stored = dataset.select_columns(label).with_format("arrow")[:][label]
            ids, class_names = stored.fill_null(-1).to_numpy().astype(np.int64), dataset.features[label].names
        keys = Strings([f"{split}/{index}" for index in range(len(dataset))])
        class_names = class_names if (ids >= 0).any() else []
        super().__init__(Path(), keys, np.maximum(ids, 0), class_names, has_class=ids >= 0)
        self.remarks = [f"images from column {image}" + (f", classes from {label}" if label else "")]
        others = [column for column in dataset.column_names if column not in (image, label)]
        self.remarks += [f"not read: {listed(others)}"] if classes and others else []
        self._name, self._image = name, image
        # Not decoded here: who reads images decodes them once, and upright.
        undecoded = type(dataset.features[image])(decode=False)
        self._dataset = dataset.select_columns(image).cast_column(image, undecoded)
        self._num_bytes = _num_bytes(self._dataset, image)
        self._time_ns = max((Path(f["filename"]).stat().st_mtime_ns for f in dataset.cache_files), default=0)

    def read(self, index: int) -> bytes:
        """Return the encoded image. Raises ImageError for a row without one, and if a file of it is gone."""
        row = self._row(index)
        if (data := row.get("bytes")) is not None:
            return data
        if row.get("path") is None:
            raise ImageError(f"{self._name}: row {index} ({self.keys[index]}) has no image")
        try:
            return Path(row["path"]).read_bytes()
        except OSError as error:
            raise ImageError(f"{row['path']}: cannot be read ({error.strerror})") from error

    def stat(self, index: int) -> tuple[int, int]:
        """Return the bytes of the image and when its file was written, in ns. Raises OSError if that is gone."""
        if self._num_bytes[index]:
            return int(self._num_bytes[index]), self._time_ns
        status = Path(self._row(index).get("path") or "/no/image").stat()
        return status.st_size, status.st_mtime_ns

    def _row(self, index: int) -> Mapping[str, Any]:
        return self._dataset[index][self._image] or {}


def as_hf_dataset(name: str | Path) -> str | None:
    """Return a name that is one of a dataset as text, None for any other."""
    return str(name) if str(name).startswith(PREFIX) else None


def _load(name: str, text: str) -> tuple[str, Dataset]:
    """Return the split that a name asks for, and what it is called; `text`: NAME@REVISION:CONFIG:SPLIT."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{name}: needs `pip install 'tokenlabel[datasets]'` ({first_line(error)})") from error
    place, *parts = [text] if Path(text).is_dir() else text.split(":")
    if not place or len(parts) > 2 or not all(parts):
        raise DataError(f"{name}: expected {PREFIX}NAME, {PREFIX}NAME:SPLIT or {PREFIX}NAME:CONFIG:SPLIT")
    try:
        if not Path(place).is_dir():
            place, _, revision = place.partition("@")
            config = parts[0] if len(parts) == 2 else None
            found = datasets.load_dataset(place, config, revision=revision or None)
        elif any(Path(place, file).is_file() for file in ("state.json", "dataset_dict.json")):
            found = datasets.load_from_disk(place)
        else:
            raise ValueError(f"{place} is no folder that save_to_disk wrote; name image files without {PREFIX}")
    except Exception as error:  # of the hub, of Arrow, of what files hold
        where = "" if Path(place).is_dir() else f"no folder {place} here, nor on the hub: "
        raise DataError(f"{name}: {where}{first_line(error)}") from error
    named = found.items() if isinstance(found, datasets.DatasetDict) else [(found.split or "train", found)]
    splits = {str(split): dataset for split, dataset in named}
    split = parts[-1] if parts else next(iter(splits)) if len(splits) == 1 else ""
    if split not in splits:
        what = f"no split {split}" if split else f"{len(splits)} splits"
        raise DataError(f"{name}: {what}; name one: {listed([f'{PREFIX}{place}:{each}' for each in splits])}")
    if not len(splits[split]):
        raise DataError(f"{name}: no rows in it")
    return split, splits[split]


def _column(name: str, dataset: Dataset, kind: str, chosen: str | None) -> str | None:
    """Return the column of a type, or the chosen one, which has to be of it; None if there is none."""
    of_kind = [column for column, feature in dataset.features.items() if type(feature).__name__ == kind]
    if chosen in of_kind or (chosen is None and len(of_kind) < 2):
        return chosen or next(iter(of_kind), None)
    if chosen is not None:
        raise DataError(f"{name}: {chosen} is no column of type {kind}; its columns are {_columns(dataset)}")
    option = "image" if kind == "Image" else "label"
    columns = f"{len(of_kind)} columns of type {kind} ({', '.join(of_kind)})"
    raise DataError(f"{name}: {columns}; choose one: {name},{option}={of_kind[0]}")


def _columns(dataset: Dataset) -> str:
    return ", ".join(f"{column} ({type(feature).__name__})" for column, feature in dataset.features.items())


def _num_bytes(dataset: Dataset, image: str) -> NDArray[np.int64]:
    """Return the bytes [n] of each image, 0 where they lie in a file of their own; no image is read for it."""
    from pyarrow.compute import call_function

    table: Any = dataset.with_format("arrow")[:]
    encoded = table.select([image]).flatten().column(f"{image}.bytes")
    return call_function("binary_length", [encoded]).fill_null(0).to_numpy().astype(np.int64)
