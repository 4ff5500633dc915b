"""Frames: a 64-byte header around a payload, checked before any number in it is used.

    offset  bytes  field
    0       4      magic, b"SHOL"
    4       2      format version, 1
    6       1      layout of the random streams (rng.LAYOUT)
    7       1      kind: 0 down, 1 up
    8       4      attempt (restarts of a group of processes)
    12      4      round
    16      4      slot of the sender
    20      4      cohort
    24      8      d
    32      8      payload bytes
    40      8      digest of the run's config
    48      4      CRC-32 (zlib) of the header with this field zero, then the payload
    52      12     zero

All little-endian. The whole of a message's bits is 8 (64 + payload bytes) when framed.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from shoal.errors import BadMagic, ChecksumError, ConfigMismatch, LengthError, RoundMismatch, VersionMismatch

HEADER = 64
VERSION = 1
DOWN, UP = 0, 1
PADDING = 12
_FIELDS = struct.Struct(f"<4sHBBIIIIQQ8sI{PADDING}x")
_MAGIC = b"SHOL"


def digest(config: dict[str, Any]) -> bytes:
    """8 bytes of the SHA-256 of a config: what ranks and checkpoints compare."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).digest()[:8]


class Stamp(NamedTuple):
    """What both ends of a frame must agree on."""

    layout: int
    kind: int
    round: int
    cohort: int
    d: int
    digest: bytes  # 8 bytes
    attempt: int = 0


def _header(stamp: Stamp, slot: int, nbytes: int, crc: int) -> bytes:
    s = stamp
    return _FIELDS.pack(
        _MAGIC, VERSION, s.layout, s.kind, s.attempt, s.round, slot, s.cohort, s.d, nbytes, s.digest, crc
    )  # fmt: skip


def frame(payload: Tensor, nbytes: Tensor, slots: Tensor, stamp: Stamp, width: int) -> Tensor:
    """(m, 64 + width) uint8: each row's header and payload, padded with zeros."""
    out = np.zeros((len(payload), HEADER + width), np.uint8)
    rows = payload.numpy()
    for i, (size, slot) in enumerate(zip(nbytes.tolist(), slots.tolist(), strict=True)):
        body = rows[i, :size].tobytes()
        crc = zlib.crc32(body, zlib.crc32(_header(stamp, slot, size, 0)))
        out[i, :HEADER] = np.frombuffer(_header(stamp, slot, size, crc), np.uint8)
        out[i, HEADER : HEADER + size] = np.frombuffer(body, np.uint8)
    return torch.from_numpy(out)


def unframe(frames: Tensor, stamp: Stamp) -> tuple[Tensor, Tensor, Tensor]:
    """(payload, nbytes, slots) of (m, 64 + width) frames.

    Raises a WireError, before any payload is used: BadMagic, VersionMismatch, ConfigMismatch (digest, d, cohort),
    RoundMismatch (round, attempt, kind), LengthError, ChecksumError. Names the sender's slot.
    """
    raw, width = frames.numpy(), frames.shape[1] - HEADER
    if width < 0:
        raise LengthError(f"frames of {frames.shape[1]} bytes: a header alone has {HEADER}.")
    nbytes, slots = np.empty(len(raw), np.int64), np.empty(len(raw), np.int64)
    for i, row in enumerate(raw):
        magic, version, layout, kind, attempt, index, slot, cohort, d, size, digest, crc = _FIELDS.unpack(
            row[:HEADER].tobytes()
        )
        if magic != _MAGIC:
            raise BadMagic(f"frame {i}: starts with {magic!r}, not {_MAGIC!r}.")
        if (version, layout) != (VERSION, stamp.layout):
            raise VersionMismatch(f"slot {slot}: format {version}, layout {layout}; here {VERSION}, {stamp.layout}.")
        if (digest, d, cohort) != (stamp.digest, stamp.d, stamp.cohort):
            raise ConfigMismatch(f"slot {slot}: config {digest.hex()}, d={d}, cohort={cohort}; here "
                                 f"{stamp.digest.hex()}, {stamp.d}, {stamp.cohort}.")  # fmt: skip
        if (index, attempt, kind) != (stamp.round, stamp.attempt, stamp.kind):
            raise RoundMismatch(f"slot {slot}: round {index}, attempt {attempt}, kind {kind}; here {stamp.round}, "
                                f"{stamp.attempt}, {stamp.kind}.")  # fmt: skip
        if slot >= cohort:
            raise RoundMismatch(f"slot {slot} in a cohort of {cohort}.")
        if size > width:
            raise LengthError(f"slot {slot}: {size} bytes where at most {width} were agreed.")
        head = _header(stamp, slot, size, 0)
        # The CRC is of the header as it ought to be: what must be zero is looked at apart.
        clean = not row[HEADER - PADDING : HEADER].any() and not row[HEADER + size :].any()
        if not clean or crc != zlib.crc32(row[HEADER : HEADER + size].tobytes(), zlib.crc32(head)):
            raise ChecksumError(f"slot {slot}, round {index}: the checksum does not match.")
        nbytes[i], slots[i] = size, slot
    return frames[:, HEADER:], torch.from_numpy(nbytes), torch.from_numpy(slots)
