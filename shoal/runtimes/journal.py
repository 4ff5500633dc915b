"""A rank's journal: its clients' rows of the last two rounds, where they survive its death by SIGKILL.

Two slots of one length, round t in slot t mod 2, so that a death in the middle of writing costs that round alone.

    offset  bytes  field
    0       4      magic, b"SHOJ"
    4       4      CRC-32 (zlib) of the header with this field zero, then the rows
    8       8      digest of the run's config
    16      8      round
    24      8      bytes this rank has moved
    32      8      bytes of rows
    40      24     zero
    64             the rows of every field that has a row a client, little-endian, in the fields' order

Nothing is synced: the bytes belong to the kernel once they are written, and outlive the process, not the machine (that
is what checkpoints are for). The rows are a function of the config and the round, so what an older run of the same
config left here is as good.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from shoal.errors import CheckpointWriteFailed
from shoal.runtimes import crash

HEADER = 64
_FIELDS = struct.Struct("<4sI8sQQQ24x")
_MAGIC = b"SHOJ"


def _raw(rows: Tensor) -> memoryview:
    flat = rows.detach().contiguous().reshape(-1)
    return flat.numpy().data.cast("B") if len(flat) else memoryview(b"")


class Journal:
    """The journal of `rank` in a file of its own; `like` are its fields, as a fresh state has them."""

    def __init__(self, path: Path, rank: int, digest: bytes, like: Sequence[Tensor]) -> None:
        self.path, self.rank, self.digest = path, rank, digest
        self.like = [(rows.shape, rows.dtype) for rows in like]
        self.length = sum(rows.numel() * rows.element_size() for rows in like)
        self._file: int | None = None

    def _header(self, index: int, moved: int, crc: int) -> bytes:
        return _FIELDS.pack(_MAGIC, crc, self.digest, index, moved, self.length)

    def write(self, index: int, rows: Sequence[Tensor], moved: int) -> None:
        """The round is committed when this returns. Raises CheckpointWriteFailed."""
        pieces = [_raw(part) for part in rows]
        crc = zlib.crc32(self._header(index, moved, 0))
        for piece in pieces:
            crc = zlib.crc32(piece, crc)
        place = index % 2 * (HEADER + self.length)
        try:
            if self._file is None:
                self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            if crash.armed("mid-journal", self.rank, index):
                os.pwrite(self._file, (self._header(index, moved, crc) + b"".join(pieces))[: HEADER - 9], place)
                crash.here("mid-journal", self.rank, index)
            written = os.pwritev(self._file, [self._header(index, moved, crc), *pieces], place)
            if written != HEADER + self.length:
                raise OSError(28, "only a part of it could be written")
        except OSError as error:
            raise CheckpointWriteFailed(error.errno, error.strerror, str(self.path)) from error

    def read(self) -> dict[int, tuple[list[Tensor], int]]:
        """Round -> (rows, bytes moved), of the slots that are whole and this run's; none where there is no journal."""
        try:
            content = self.path.read_bytes() if self.path.stat().st_size <= 2 * (HEADER + self.length) else b""
        except OSError:
            return {}
        size = HEADER + self.length
        found = (self._slot(content[k * size : (k + 1) * size], k) for k in range(2))
        return {index: (rows, moved) for index, rows, moved in filter(None, found)}

    def _slot(self, slot: bytes, parity: int) -> tuple[int, list[Tensor], int] | None:
        if len(slot) != HEADER + self.length:
            return None
        _, crc, _, index, moved, _ = _FIELDS.unpack_from(slot)
        clean = slot[:HEADER] == self._header(index, moved, crc) and index % 2 == parity
        if not clean or crc != zlib.crc32(slot[HEADER:], zlib.crc32(self._header(index, moved, 0))):
            return None
        rows, at = [], HEADER
        for shape, dtype in self.like:
            part = torch.zeros(shape, dtype=dtype)
            end = at + part.numel() * part.element_size()
            if end > at:
                part = torch.frombuffer(bytearray(slot[at:end]), dtype=dtype).reshape(shape)
            rows.append(part)
            at = end
        return index, rows, moved

    def close(self, remove: bool = False) -> None:
        """Leave it, or remove it where the run has ended."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
        if remove:
            self.path.unlink(missing_ok=True)
