"""Streams of b-bit numbers, and digits in base 3."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def pack(values: Tensor, bits: int) -> Tensor:
    """(m, ceil(c bits / 8)) uint8 of (m, c) integers < 2^bits: value j takes bits j b .. j b + b - 1 of a stream that
    starts at the least significant bit of byte 0; the last byte is filled with zeros."""
    planes = (values.numpy()[..., None] >> np.arange(bits)) & 1
    return torch.from_numpy(np.packbits(planes.reshape(len(values), -1).astype(np.uint8), axis=1, bitorder="little"))


def unpack(payload: Tensor, count: int, bits: int) -> Tensor:
    """(m, count) int64: the inverse of `pack`."""
    planes = np.unpackbits(payload.numpy(), axis=1, count=count * bits, bitorder="little")
    planes = planes.reshape(len(payload), count, bits).astype(np.int64)
    return torch.from_numpy((planes << np.arange(bits)).sum(2))


TRITS = np.array([1, 3, 9, 27, 81])


def pack_trits(code: Tensor) -> Tensor:
    """(m, ceil(d/5)) uint8 of (m, d) integers 0..2: byte b is sum_l 3^l code[5 b + l], with zeros beyond d."""
    m, d = code.shape
    padded = np.zeros((m, -(-d // 5) * 5), np.int64)
    padded[:, :d] = code.numpy()
    return torch.from_numpy((padded.reshape(m, -1, 5) @ TRITS).astype(np.uint8))


def unpack_trits(payload: Tensor, count: int) -> Tensor:
    """(m, count) int64: the inverse of `pack_trits`; a byte from 243 on, no five digits, becomes five times 3."""
    byte = payload.numpy().astype(np.int64)[..., None]
    digits = np.where(byte < 243, byte // TRITS % 3, 3).reshape(len(payload), -1)
    return torch.from_numpy(np.ascontiguousarray(digits[:, :count]))
