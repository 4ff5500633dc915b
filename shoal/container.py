"""A file of named tensors that is either whole and as it was written, or refused. Nothing in it is ever run.

    offset   bytes  field
    0        8      magic, b"SHOALCK1"
    8        4      length H of the header, at most 2^20
    12       4      CRC-32 (zlib) of the header
    16       H      header, JSON: {"meta": {...}, "tensors": [[name, dtype, shape, CRC-32 of its bytes], ...]}
    16 + H          the tensors' bytes, little-endian, in the header's order: no gaps, no overlap, nothing behind them
    end-32   32     SHA-256 of every byte before

A tensor's place follows from the shapes before it, so that no header can make two of them overlap. The SHA-256 alone
would find every flipped bit; the checksums say where it is, and keep a damaged header from being parsed.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import stat
import struct
import zlib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from shoal.errors import CheckpointCorrupt, CheckpointWriteFailed

MAGIC = b"SHOALCK1"
PREFIX = struct.Struct("<8sII")
MAX_HEADER = 2**20
MAX_DIMENSIONS = 8
DIGEST = 32
DTYPES = {"float32": "<f4", "float64": "<f8", "int32": "<i4", "int64": "<i8", "uint8": "|u1"}


class Contents(NamedTuple):
    """What a file holds; `sha256` (32 bytes) is its own digest, which names these very contents."""

    meta: dict[str, Any]
    tensors: dict[str, Tensor]
    sha256: bytes


# ------------------------------------------------------------------------------------------------ writing
def place(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """The file is there whole, on the disk, or it is what it was before.

    Written beside its name, fsync, renamed, and the folder's fsync. Raises CheckpointWriteFailed with errno and path;
    whatever cuts the writing, nothing is left beside the name.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as stream:
            for piece in pieces:
                stream.write(piece)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(beside, path)
        settle(path.parent)
    except OSError as error:
        raise CheckpointWriteFailed(error.errno, error.strerror, str(path)) from error
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def settle(folder: Path) -> None:
    """The folder's entries are on the disk: a rename is not, until its folder is."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _bytes(tensor: Tensor) -> tuple[str, memoryview]:
    """The dtype's name, and the little-endian bytes without a copy where they are that already."""
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise TypeError(f"a container holds {', '.join(DTYPES)}; got {name}.")
    flat = tensor.detach().cpu().contiguous().reshape(-1).numpy()
    return name, flat.astype(DTYPES[name], copy=False).data.cast("B") if flat.size else memoryview(b"")


def write(path: Path, meta: dict[str, Any], tensors: dict[str, Tensor]) -> bytes:
    """Write the file whole or not at all; its SHA-256. Raises CheckpointWriteFailed."""
    pieces = pack(meta, tensors)
    place(path, pieces)
    return bytes(pieces[-1])


def pack(meta: dict[str, Any], tensors: dict[str, Tensor]) -> list[bytes | memoryview]:
    """The file's bytes in pieces, the last of which is its SHA-256."""
    named = {name: _bytes(tensor) for name, tensor in tensors.items()}
    rows = [[k, kind, list(tensors[k].shape), zlib.crc32(raw)] for k, (kind, raw) in named.items()]
    header = json.dumps({"meta": meta, "tensors": rows}, allow_nan=False).encode()
    if len(header) > MAX_HEADER:
        raise ValueError(f"a header of {len(header)} bytes: at most {MAX_HEADER}; put long things into tensors.")
    pieces: list[bytes | memoryview] = [PREFIX.pack(MAGIC, len(header), zlib.crc32(header)), header]
    pieces += [raw for _, raw in named.values()]
    sha = hashlib.sha256()
    for piece in pieces:
        sha.update(piece)
    return [*pieces, sha.digest()]


# ------------------------------------------------------------------------------------------------ reading
def read(path: Path) -> Contents:
    """Everything in the file, checked. Raises CheckpointCorrupt for whatever else a file can be.

    Memory: the tensors' bytes, of which there are no more than the file has, and a header of at most 1 MiB.
    """
    try:
        with open(path, "rb", opener=_regular) as stream:
            return _Reader(str(path), stream, os.fstat(stream.fileno()).st_size).contents()
    except OSError as error:
        raise CheckpointCorrupt(f"{path}: {error.strerror or error}.") from error


def unpack(content: bytes, name: str) -> Contents:
    """The same of bytes that have another source than a file. Raises CheckpointCorrupt."""
    return _Reader(name, io.BytesIO(content), len(content)).contents()


def _regular(name: str, flags: int) -> int:
    """A file and nothing else: opening a pipe would wait for ever."""
    handle = os.open(name, flags | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError("not a regular file")
    return handle


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name stands twice")
    return dict(pairs)


class _Reader:
    """One pass over the file: every byte goes through the digest."""

    def __init__(self, name: str, stream: BinaryIO, size: int) -> None:
        self.name, self.stream, self.size, self.sha = name, stream, size, hashlib.sha256()

    def corrupt(self, what: str) -> NoReturn:
        raise CheckpointCorrupt(f"{self.name}: {what}.")

    def take(self, count: int) -> bytes:
        piece = self.stream.read(count)
        if len(piece) != count:
            self.corrupt(f"it ends after {self.stream.tell()} bytes")
        self.sha.update(piece)
        return piece

    def contents(self) -> Contents:
        room = self.size - PREFIX.size - DIGEST
        if room < 0:
            self.corrupt(f"{self.size} bytes are too few for a checkpoint")
        magic, length, crc = PREFIX.unpack(self.take(PREFIX.size))
        if magic != MAGIC:
            self.corrupt(f"it starts with {magic!r}, not {MAGIC!r}")
        if length > min(room, MAX_HEADER):
            self.corrupt(f"a header of {length} bytes does not fit")
        header = self.take(length)
        if zlib.crc32(header) != crc:
            self.corrupt("the header's checksum does not match")
        meta, table = self.parsed(header, room - length)
        tensors = {name: self.tensor(name, *facts) for name, *facts in table}
        digest = self.sha.digest()
        if self.stream.read(DIGEST + 1) != digest:
            self.corrupt("the digest of the whole does not match")
        return Contents(meta, tensors, digest)

    def parsed(self, header: bytes, room: int) -> tuple[dict[str, Any], list[list[Any]]]:
        """meta, and the table of tensors, which fill the room exactly."""
        try:
            held = json.loads(header.decode(), parse_constant=_no_constant, object_pairs_hook=_no_twins)
            meta, table = held["meta"], held["tensors"]
            if held.keys() != {"meta", "tensors"} or not isinstance(meta, dict) or not isinstance(table, list):
                raise ValueError("meta is an object, tensors a list")
            total = sum(_extent(*row) for row in table)
            _no_twins([(row[0], None) for row in table])
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            self.corrupt(f"its header: {' '.join(str(error).split())[:200]}")
        if total != room:
            self.corrupt(f"its tensors have {total} bytes, the file has {room} for them")
        return meta, table

    def tensor(self, name: str, dtype: str, shape: list[int], crc: int) -> Tensor:
        flat = np.empty(math.prod(shape), DTYPES[dtype])
        view = flat.data.cast("B") if flat.size else memoryview(bytearray())
        if self.stream.readinto(view) != len(view):  # type: ignore[attr-defined]
            self.corrupt(f"it ends within {name}")
        self.sha.update(view)
        if zlib.crc32(view) != crc:
            self.corrupt(f"{name}: the checksum does not match")
        return torch.from_numpy(flat.astype(flat.dtype.newbyteorder("="), copy=False)).reshape(shape)


def _extent(name: Any, dtype: Any, shape: Any, crc: Any) -> int:
    """Bytes of a tensor that the header describes. Raises ValueError or TypeError for a description that is none."""
    words = isinstance(name, str) and len(name) <= 200 and isinstance(dtype, str)
    numbers = isinstance(shape, list) and len(shape) <= MAX_DIMENSIONS and type(crc) is int
    if not words or not numbers or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError("a tensor is [name, dtype, shape, checksum]")
    if math.prod(max(size, 1) for size in shape) >= 2**48:  # also beside a zero, where torch counts in int64
        raise ValueError(f"a shape of {len(shape)} dimensions is too large")
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype[:20]!r} is none of {', '.join(DTYPES)}")
    return math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
