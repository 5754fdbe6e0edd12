"""One file of a label store: a safetensors file of records that is written whole and never changed.

It holds three uint8 tensors, one after the other:

    index    [N, 32]   a row a record: hash of its key, where key and record lie, their lengths, a checksum
    keys     [bytes]   the keys in UTF-8, one after the other, filled up with zeros to a multiple of 8
    payload  [bytes]   the records, each beginning at a multiple of 8

and, in its metadata, the format's version and the CRC-32 of `index` and of `keys`. Where the images that the
records were made of are known, `payload` ends with N rows of 16 bytes that say so: older readers never look there.
docs/labels.md describes every byte.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from tokenlabel.runtime.errors import StoreError
from tokenlabel.runtime.process import write_whole

SHARD_SUFFIX = ".safetensors"
STORE_FORMAT = "tokenlabel-labels"
VERSION = "1"
MAX_HEADER_BYTES = 1 << 16
MAX_KEY_BYTES = 0xFFFF

# Hash of the key, first byte of the record, its length, first byte of the key, its length, 0, the checksum.
_ROW = struct.Struct("<QQIIHHI")
_ROW_TYPE = np.dtype(
    [
        ("hash", "<u8"),
        ("record_start", "<u8"),
        ("record_length", "<u4"),
        ("key_start", "<u4"),
        ("key_length", "<u2"),
        ("zero", "<u2"),
        ("checksum", "<u4"),
    ]
)
_IMAGE = struct.Struct("<qII")  # a Fingerprint
_HASH = _HEADER_BYTES = struct.Struct("<Q")
_ALIGNMENT = 8
_ANNOTATE_AGAIN = "remove the file and annotate again: only its images are done anew"


class Fingerprint(NamedTuple):
    """What the file of an image was when it was labelled.

    `time_ns`: when it was last modified, 0 if unknown. `num_bytes`: its length, modulo 2**32; 0 if nothing is known of
    the image. `crc32`: of its bytes.
    """

    time_ns: int = 0
    num_bytes: int = 0
    crc32: int = 0


UNKNOWN = Fingerprint()


def key_bytes(key: str) -> bytes:
    """Return a key as it is stored; file names that are not valid UTF-8 keep their bytes."""
    return os.fspath(key).encode("utf-8", "surrogateescape")


def key_text(name: bytes) -> str:
    """Return the key of its stored bytes."""
    return name.decode("utf-8", "surrogateescape")


def key_hash(name: bytes) -> int:
    """Return the 64-bit hash by which a key is found: BLAKE2b of 8 bytes, read little endian."""
    return _HASH.unpack(blake2b(name, digest_size=_HASH.size).digest())[0]


def write_shard(
    folder: Path,
    records: Sequence[tuple[str, bytes]],
    *,
    images: Sequence[Fingerprint] = (),
    generation: int = 0,
    again: str = "",
) -> Path:
    """Write (key, record) pairs into a new file of the folder and return it.

    The file is complete and on the disk before it gets its name, which is made of its content. `images`: the
    fingerprint of each record's image, or nothing. `generation`, `again`: see `Shard`.
    """
    names = [key_bytes(key) for key, _ in records]
    # Keys lie apart from records, so that opening a store of a million reads 32 bytes and a name each, and no label.
    rows, payload, key_start, record_start = [], [], 0, 0
    for name, (key, record) in zip(names, records, strict=True):
        if len(name) > MAX_KEY_BYTES:
            raise StoreError(f"{key[:80]}...: a key has at most {MAX_KEY_BYTES} bytes, this one {len(name)}")
        checksum = crc32(record, crc32(name))  # of both: a record under another key is found, too
        rows.append(_ROW.pack(key_hash(name), record_start, len(record), key_start, len(name), 0, checksum))
        payload += (record, _padding(len(record)))
        key_start += len(name)
        record_start += len(record) + len(payload[-1])
    index, keys = b"".join(rows), b"".join([*names, _padding(key_start)])
    fingerprints = b"".join(_IMAGE.pack(*image) for image in images)
    metadata = {
        "format": STORE_FORMAT,
        "version": VERSION,
        "index_crc32": str(crc32(index)),
        "keys_crc32": str(crc32(keys)),
    }
    if any(fingerprints):
        assert len(images) == len(records)
        metadata["images_crc32"] = str(crc32(fingerprints))
        payload.append(fingerprints)
        record_start += len(fingerprints)
    metadata |= {"generation": str(generation)} if generation else {}
    metadata |= {"again": again} if again else {}
    header = json.dumps({"__metadata__": metadata, **_tensors(len(rows), len(keys), record_start)}).encode()
    header += b" " * (-len(header) % _ALIGNMENT)  # so that arrays may be views of the mapped file
    # The header holds the checksums of all but the records, and the index those of the records.
    path = folder / f"{blake2b(header + index, digest_size=10).hexdigest()}{SHARD_SUFFIX}"
    write_atomically(path, [_HEADER_BYTES.pack(len(header)), header, index, keys, *payload])
    return path


def write_atomically(path: Path, parts: Iterable[bytes]) -> None:
    """Write a file, part by part, so that it appears under its name only when all of it is on the disk."""
    try:
        write_whole(path, parts)
    except OSError as error:
        raise StoreError(
            f"{path}: could not be written ({error.strerror or error}); what was there is intact"
        ) from error


@dataclass(slots=True, eq=False)
class Shard:
    """A file of records for reading. Made by `open_shard`, which has checked its structure and index.

    `generation`: how often images had been labelled anew when it was written; a key's record of the highest one
    counts. `again`: the request for that which it answers, if one. `images_crc32`: of the fingerprints; None if it
    has none.
    """

    path: Path
    num_bytes: int
    num_records: int
    index_start: int
    keys_start: int
    payload_start: int
    generation: int
    again: str
    images_crc32: str | None
    _mapped: mmap.mmap | None = field(default=None, repr=False)
    _images: bytes | None = field(default=None, repr=False)

    def key(self, row: int) -> bytes:
        """Return the key of a row, as it is stored."""
        mapped = self._mapped or self._map()
        _, _, _, start, length, _, _ = _ROW.unpack_from(mapped, self.index_start + row * _ROW.size)
        return mapped[self.keys_start + start : self.keys_start + start + length]

    def read(self, row: int) -> bytes:
        """Return the record of a row. Raises StoreError if it does not have its checksum."""
        mapped = self._mapped or self._map()
        _, start, length, _, _, _, checksum = _ROW.unpack_from(mapped, self.index_start + row * _ROW.size)
        start, name = start + self.payload_start, self.key(row)
        record = mapped[start : start + length]
        if crc32(record, crc32(name)) != checksum:
            raise StoreError(
                f"{self.path}: the record of {key_text(name)!r} was altered (its checksum is another); `tokenlabel "
                "annotate --again FILE` labels the images anew whose keys FILE lists"
            )
        return record

    def image(self, row: int) -> Fingerprint:
        """Return the fingerprint of the image that a row's record was made of."""
        if self.images_crc32 is None:
            return UNKNOWN
        if self._images is None:
            images = (self._mapped or self._map())[self.num_bytes - self.num_records * _IMAGE.size :]
            if str(crc32(images)) != self.images_crc32:
                raise StoreError(
                    f"{self.path}: what it says of its images was altered (its checksum is another); {_ANNOTATE_AGAIN}"
                )
            self._images = images
        return Fingerprint(*_IMAGE.unpack_from(self._images, row * _IMAGE.size))

    def table(self) -> tuple[NDArray[Any], NDArray[np.uint8]]:
        """Read the rows [N] of the index, and the bytes of the keys that they point into."""
        with _opened(self.path) as file:
            file.seek(self.index_start)
            index = file.read(self.keys_start - self.index_start)
            keys = file.read(self.payload_start - self.keys_start)
        return np.frombuffer(index, _ROW_TYPE), np.frombuffer(keys, np.uint8)

    def _map(self) -> mmap.mmap:
        """Map the file: at the first read, so that every process makes its own."""
        with _opened(self.path) as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if len(mapped) != self.num_bytes:
            raise StoreError(f"{self.path}: changed its size after it was opened; open the store again")
        self._mapped = mapped
        return mapped


def open_shard(path: Path) -> tuple[Shard, NDArray[np.uint64]]:
    """Return a shard and the hashes of its keys [N], in the order of the rows.

    Raises StoreError if the file is no shard, was cut short, or has an altered index; its records are checked
    when they are read.
    """
    with _opened(path) as file:
        num_bytes = os.fstat(file.fileno()).st_size
        (header_bytes,) = _HEADER_BYTES.unpack(file.read(8).ljust(8, b"\0"))
        if not 2 <= header_bytes <= min(MAX_HEADER_BYTES, num_bytes - 8):
            raise StoreError(
                f"{path}: not a label file, or cut short (a header of {header_bytes} bytes); {_ANNOTATE_AGAIN}"
            )
        num_records, index_end, keys_end, metadata = _layout(
            path, file.read(header_bytes), num_bytes - 8 - header_bytes
        )
        index, keys = file.read(index_end), file.read(keys_end - index_end)
    if [str(crc32(index)), str(crc32(keys))] != [metadata.get("index_crc32"), metadata.get("keys_crc32")]:
        raise StoreError(f"{path}: its index was altered (its checksum is another); {_ANNOTATE_AGAIN}")
    rows = np.frombuffer(index, _ROW_TYPE)
    if (rows["key_start"] + rows["key_length"].astype(np.uint64) > len(keys)).any():
        raise StoreError(f"{path}: its index was altered (a key lies outside of the keys); {_ANNOTATE_AGAIN}")
    data_start = 8 + header_bytes
    shard = Shard(
        path,
        num_bytes,
        num_records,
        data_start,
        data_start + index_end,
        data_start + keys_end,
        int(metadata.get("generation", "0")),
        str(metadata.get("again", "")),
        str(metadata["images_crc32"]) if "images_crc32" in metadata else None,
    )
    return shard, rows["hash"].copy()  # a quarter of the index, which can go


def _layout(path: Path, header: bytes, num_data_bytes: int) -> tuple[int, int, int, dict[str, Any]]:
    """Return the number of records, where index and keys end, and the metadata that a header tells."""
    try:
        tensors = json.loads(header)
        metadata = tensors.pop("__metadata__")
        version = (metadata["format"], metadata["version"])
        num_records, num_key_bytes = tensors["index"]["shape"][0], tensors["keys"]["shape"][0]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise StoreError(
            f"{path}: its header is not that of a label file, or was altered; {_ANNOTATE_AGAIN}"
        ) from error
    if version != (STORE_FORMAT, VERSION):
        raise StoreError(f"{path}: holds {version}, this version of tokenlabel reads {(STORE_FORMAT, VERSION)}")
    generation = str(metadata.get("generation", "0"))
    if all(type(count) is int and count >= 0 for count in (num_records, num_key_bytes)):
        index_end = num_records * _ROW.size
        keys_end = index_end + num_key_bytes
        fingerprint_bytes = num_records * _IMAGE.size if "images_crc32" in metadata else 0
        num_payload_bytes = num_data_bytes - keys_end
        if (
            num_payload_bytes >= fingerprint_bytes
            and tensors == _tensors(num_records, num_key_bytes, num_payload_bytes)
            and re.fullmatch(r"\d{1,9}", generation, re.ASCII)
        ):
            return num_records, index_end, keys_end, metadata
    raise StoreError(
        f"{path}: was cut short or altered: {num_data_bytes} bytes do not fit its header; {_ANNOTATE_AGAIN}"
    )


def _tensors(num_records: int, num_key_bytes: int, num_payload_bytes: int) -> dict[str, Any]:
    """Return what safetensors' header says of three uint8 tensors that lie one after the other."""
    tensors, start = {}, 0
    for name, shape in (
        ("index", [num_records, _ROW.size]),
        ("keys", [num_key_bytes]),
        ("payload", [num_payload_bytes]),
    ):
        end = start + math.prod(shape)
        tensors[name] = {"dtype": "U8", "shape": shape, "data_offsets": [start, end]}
        start = end
    return tensors


def _opened(path: Path) -> Any:
    try:
        return path.open("rb")
    except OSError as error:
        problem = f"cannot be read ({error.strerror}); too many files: `tokenlabel merge` makes fewer"
        if isinstance(error, FileNotFoundError):
            problem = "was removed while the store was open; start again, and keep the files of a store that is read"
        raise StoreError(f"{path}: {problem}") from error


def _padding(num_bytes: int) -> bytes:
    return bytes(-num_bytes % _ALIGNMENT)
