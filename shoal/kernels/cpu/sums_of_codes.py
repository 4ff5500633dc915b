"""Sums of many messages' codes to digits of a few bytes, and back to means.

A group of digits is one number of at most 64 bits. Digits come out of it several at a time: one division yields a part
of at most `PART` values, whose digits' means stand in a table.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numba import njit
from torch import Tensor

from shoal.kernels.cpu.buffers import ready
from shoal.kernels.cpu.codes import ROOM, SPAN, unpack_tile
from shoal.kernels.cpu.lanes import count_512
from shoal.kernels.cpu.philox import copy
from shoal.kernels.cpu.threads import LEAST, spread
from shoal.kernels.reference.sums_of_codes import group, packed_bytes

BLOCK = 512  # coordinates that are counted at a time
PART = 4096  # values of a table's rows: 16 KiB for each of their digits


@njit(cache=True, nogil=True)
def _count_bits(payload, out, lo, hi):
    """out[lo:hi] = how many rows have the bit set. Eight bits a coordinate count 255 rows at a time."""
    m = payload.shape[0]
    counts, pad = np.empty(BLOCK, np.uint8), np.zeros(64, np.uint8)
    for at in range(lo, hi, BLOCK):
        count = min(BLOCK, hi - at)
        sums = out[at : at + count]
        sums[:] = 0
        for first in range(0, m, 255):
            counts[:] = 0
            for i in range(first, min(first + 255, m)):
                if count == BLOCK:
                    count_512(payload[i], at // 8, counts)
                else:
                    copy(payload[i, at // 8 : (at + count + 7) // 8], pad)
                    count_512(pad, 0, counts)
            for j in range(count):
                sums[j] += counts[j]


@njit(cache=True, nogil=True)
def _add_codes(payload, out, bits, levels, lo, hi):
    """out[lo:hi] = the sums of the codes; whether one is not below `levels`."""
    code, buffer, beyond = np.empty(SPAN, np.uint16), np.empty(ROOM, np.uint8), False
    for at in range(lo, hi, SPAN):
        count = min(SPAN, hi - at)
        sums = out[at : at + count]
        sums[:] = 0
        for i in range(payload.shape[0]):
            unpack_tile(payload[i, at * bits // 8 : ((at + count) * bits + 7) // 8], code, buffer, bits)
            worst = np.uint16(0)
            for j in range(count):
                sums[j] += code[j]
                worst = max(worst, code[j])
            beyond |= worst >= levels
    return beyond


@njit(cache=True, nogil=True)
def _pack_digits(sums, out, base, digits, size, lo, hi):
    """Groups lo..hi-1; the last of all may be shorter, in digits and in bytes."""
    for g in range(lo, hi):
        number, at = np.uint64(0), g * digits
        for j in range(min(at + digits, sums.size) - 1, at - 1, -1):
            number = number * base + np.uint64(sums[j])
        for b in range(g * size, min(g * size + size, out.size)):
            out[b] = np.uint8(number & np.uint64(0xFF))
            number >>= np.uint64(8)


def fold_codes(payload: Tensor, levels: int, d: int) -> tuple[Tensor, bool]:
    rows = (payload if payload.stride(-1) == 1 else payload.contiguous()).numpy()
    sums, bits = ready(d, np.uint16), (levels - 1).bit_length()  # slices.MOST sums at most
    found: list[bool] = []
    least = max(SPAN, LEAST // max(len(rows), 1))
    if levels == 2:
        spread(lambda lo, hi: _count_bits(rows, sums, lo, hi), d, BLOCK, least)
    else:
        spread(lambda lo, hi: found.append(_add_codes(rows, sums, bits, levels, lo, hi)), d, SPAN, least)
    base = len(rows) * (levels - 1) + 1
    digits, size = group(base)
    out = np.empty(packed_bytes(d, base), np.uint8)
    args = (sums, out, np.uint64(base), digits, size)
    spread(lambda lo, hi: _pack_digits(*args, lo, hi), -(-d // digits), least=LEAST // digits)
    return torch.from_numpy(out), any(found)


def _tables(values: np.ndarray) -> np.ndarray:
    """(base^s, s) float32: the values of the s digits of every number below base^s <= PART, s >= 1."""
    base, some = len(values), 1
    while base ** (some + 1) <= PART:
        some += 1
    numbers = np.arange(base**some)[:, None]
    return np.ascontiguousarray(values[numbers // base ** np.arange(some) % base])


@njit(cache=True, nogil=True)
def _read(body, start, size):
    number = np.uint64(0)
    for b in range(min(start + size, body.size) - 1, start - 1, -1):
        number = (number << np.uint64(8)) | np.uint64(body[b])
    return number


@njit(cache=True, nogil=True)
def _unpack_digits(body, table, base, digits, size, out, lo, hi):
    """Groups lo..hi-1. A number that no digits make leaves something after the last of them."""
    by, some, beyond = np.uint64(table.shape[0]), table.shape[1], False
    for g in range(lo, hi):
        number, j = _read(body, g * size, size), g * digits
        end = min(j + digits, out.size)
        while j + some <= end:
            rest = number // by
            row = np.int64(number - rest * by)
            for k in range(some):
                out[j + k] = table[row, k]
            number, j = rest, j + some
        while j < end:
            rest = number // base
            out[j] = table[np.int64(number - rest * base), 0]
            number, j = rest, j + 1
        beyond |= number != 0
    return beyond


def unfold_codes(bodies: Sequence[Tensor], values: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    base, out, good, at = len(values), ready(sum(counts), np.float32), list[bool](), 0
    (digits, size), table = group(base), _tables(values.numpy())
    for body, count in zip(bodies, counts, strict=True):
        part = out[at : at + count]
        good.append(_unfold_digits(body.contiguous().numpy(), table, base, digits, size, part))
        at += count
    return torch.from_numpy(out), torch.tensor(good)


def _unfold_digits(body: np.ndarray, table: np.ndarray, base: int, digits: int, size: int, out: np.ndarray) -> bool:
    args, found = (body, table, np.uint64(base), digits, size, out), list[bool]()
    groups = -(-len(out) // digits)
    spread(lambda lo, hi: found.append(_unpack_digits(*args, lo, hi)), groups, least=LEAST // digits)
    if any(found):
        out[:] = np.nan
    return not any(found)
