"""One file of a label store: a safetensors file of records that is written whole and never changed.

It holds three uint8 tensors, one after the other:

    index    [N, 32]   a row a record: hash of its key, offsets and lengths of key and record, a checksum
    keys     [bytes]   the keys in UTF-8, one after the other, padded with zeros to a multiple of 8
    payload  [bytes]   the records, each starting at a multiple of 8

The metadata holds the format's version and the CRC-32 of `index` and of `keys`. If the images that were labelled are
known, `payload` ends with N fingerprints of 16 bytes, where older readers never look.
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
_ANNOTATE_AGAIN = "remove the file and annotate again: only its images are labelled again"


class Fingerprint(NamedTuple):
    """The file of an image at the time when it was labelled.

    `time_ns`: its modification time, 0 if unknown. `num_bytes`: its length, modulo 2**32; 0 if nothing is known about
    the image. `crc32`: of its bytes.
    """

    time_ns: int = 0
    num_bytes: int = 0
    crc32: int = 0


UNKNOWN = Fingerprint()


def key_bytes(key: str) -> bytes:
    """Return a key as it is stored. File names that are not valid UTF-8 keep their bytes."""
    try:
        name = os.fspath(key)
    except TypeError:
        raise ValueError(f"expected the key of an image, such as 'ant/0.png', got {key!r}") from None
    return name.encode("utf-8", "surrogateescape")


def key_text(name: bytes) -> str:
    """Return the key of its stored bytes."""
    return name.decode("utf-8", "surrogateescape")


def key_hash(name: bytes) -> int:
    """Return the 64-bit hash of a stored key: BLAKE2b with a digest of 8 bytes, little-endian."""
    return _HASH.unpack(blake2b(name, digest_size=_HASH.size).digest())[0]


def write_shard(
    folder: Path,
    records: Sequence[tuple[str, bytes]],
    *,
    images: Sequence[Fingerprint] = (),
    generation: int = 0,
    again: str = "",
) -> Path:
    """Write (key, record) pairs into a new file of the folder and return its path.

    The file gets its name, a hash of its content, once it is complete and on disk. `images`: the fingerprint of each
    record's image, or nothing. `generation`, `again`: see `Shard`.
    """
    names = [key_bytes(key) for key, _ in records]
    # Keys are stored apart from the records, so that opening a store reads 32 bytes and a key a record, and no maps.
    rows, payload, key_start, record_start = [], [], 0, 0
    for name, (key, record) in zip(names, records, strict=True):
        if len(name) > MAX_KEY_BYTES:
            raise StoreError(f"{key[:80]}...: a key has at most {MAX_KEY_BYTES} bytes, this one {len(name)}")
        checksum = crc32(record, crc32(name))  # of both, so that a record under another's key is detected
        rows.append(_ROW.pack(key_hash(name), record_start, len(record), key_start, len(name), 0, checksum))
        payload += (record, bytes(-len(record) % _ALIGNMENT))
        key_start += len(name)
        record_start += len(record) + len(payload[-1])
    index, keys = b"".join(rows), b"".join([*names, bytes(-key_start % _ALIGNMENT)])
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
    header += b" " * (-len(header) % _ALIGNMENT)  # so that arrays can be views of the mapped file
    # The header holds the checksums of everything but the records, and the index those of the records.
    path = folder / f"{blake2b(header + index, digest_size=10).hexdigest()}{SHARD_SUFFIX}"
    write_atomically(path, [_HEADER_BYTES.pack(len(header)), header, index, keys, *payload])
    return path


def write_atomically(path: Path, parts: Iterable[bytes]) -> None:
    """Write a file part by part; it gets its name once all of it is on disk. Raises StoreError if it cannot."""
    try:
        write_whole(path, parts)
    except OSError as error:
        raise StoreError(
            f"{path}: could not be written ({error.strerror or error}); what was there is intact"
        ) from error


@dataclass(slots=True, eq=False)
class Shard:
    """A file of records, open for reading. Made by `open_shard`, which checks its structure and its index.

    `generation`: how often images had been labelled again when it was written; the record of a key with the highest
    one is used. `again`: the id of the request (`annotate --again FILE`) that it was written for, "" if there was none.
    `images_crc32`: of the fingerprints; None if it has none.
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

    def checksum(self, row: int) -> tuple[int, int]:
        """Return length and checksum of the record of a row, which two equal records of a key have in common."""
        mapped = self._mapped or self._map()
        _, _, length, _, _, _, checksum = _ROW.unpack_from(mapped, self.index_start + row * _ROW.size)
        return length, checksum

    def read(self, row: int) -> bytes:
        """Return the record of a row. Raises StoreError if its checksum is wrong."""
        mapped = self._mapped or self._map()
        _, start, length, _, _, _, checksum = _ROW.unpack_from(mapped, self.index_start + row * _ROW.size)
        start, name = start + self.payload_start, self.key(row)
        record = mapped[start : start + length]
        if crc32(record, crc32(name)) != checksum:
            raise StoreError(
                f"{self.path}: the record of {key_text(name)!r} was altered (its checksum is another); `tokenlabel "
                "annotate --again FILE` labels the images again whose keys FILE lists"
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
                    f"{self.path}: its fingerprints were altered (their checksum is another); {_ANNOTATE_AGAIN}"
                )
            self._images = images
        return Fingerprint(*_IMAGE.unpack_from(self._images, row * _IMAGE.size))

    def _map(self) -> mmap.mmap:
        """Map the file into memory, at the first read: a store of many files opens without mapping any."""
        with _opened(self.path) as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if len(mapped) != self.num_bytes:
            raise StoreError(f"{self.path}: changed its size after it was opened; open the store again")
        self._mapped = mapped
        return mapped


def open_shard(path: Path) -> tuple[Shard, NDArray[np.uint64]]:
    """Return a shard and the hashes of its keys [N], in the order of the rows.

    Raises StoreError if the file is no shard, is truncated, or has a corrupt index. Records are checked when they are
    read.
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
        path=path,
        num_bytes=num_bytes,
        num_records=num_records,
        index_start=data_start,
        keys_start=data_start + index_end,
        payload_start=data_start + keys_end,
        generation=int(metadata.get("generation", "0")),
        again=str(metadata.get("again", "")),
        images_crc32=str(metadata["images_crc32"]) if "images_crc32" in metadata else None,
    )
    return shard, rows["hash"].copy()  # a copy, so that the rest of the index, three quarters of it, is freed


def _layout(path: Path, header: bytes, num_data_bytes: int) -> tuple[int, int, int, dict[str, Any]]:
    """Parse a header: return the number of records, where index and keys end, and the metadata."""
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
    if all(
        type(count) is int and count >= 0 for count in (num_records, num_key_bytes)
    ):  # `type`: JSON's true is an int
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
    """Return the safetensors header of the three uint8 tensors."""
    tensors, start = {}, 0
    shapes = {"index": [num_records, _ROW.size], "keys": [num_key_bytes], "payload": [num_payload_bytes]}
    for name, shape in shapes.items():
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
