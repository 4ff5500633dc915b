"""Digits to any base, packed into groups of a few bytes, and back to what they stand for.

A group is one number of at most 64 bits. Digits come out of it several at a time: one division yields a part of at most
`PART` values, whose digits stand in a table.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from shoal.kernels.cpu.threads import LEAST, spread
from shoal.kernels.reference.sums_of_codes import group, packed_bytes

PART = 4096  # values of a table's rows: 16 KiB for each of their digits


@njit(cache=True, nogil=True)
def _pack(sums, out, base, digits, size, lo, hi):
    """Groups lo..hi-1; the last of all may be shorter, in digits and in bytes."""
    for g in range(lo, hi):
        number, at = np.uint64(0), g * digits
        for j in range(min(at + digits, sums.size) - 1, at - 1, -1):
            number = number * base + np.uint64(sums[j])
        for b in range(g * size, min(g * size + size, out.size)):
            out[b] = np.uint8(number & np.uint64(0xFF))
            number >>= np.uint64(8)


def pack_digits(sums: np.ndarray, base: int) -> np.ndarray:
    """(bytes,) uint8: whole groups, and what is left in as few bytes as it needs."""
    digits, size = group(base)
    out = np.empty(packed_bytes(len(sums), base), np.uint8)
    spread(_pack, (sums, out, np.uint64(base), digits, size), -(-len(sums) // digits), least=LEAST // digits)
    return out


def _tables(values: np.ndarray) -> np.ndarray:
    """(base^s, s): the values of the s digits of every number below base^s <= PART, s >= 1."""
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
def _unpack(body, table, base, digits, size, out, lo, hi):
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


def unpack_digits(raw: np.ndarray, values: np.ndarray, out: np.ndarray) -> bool:
    """out = values[digit] for as many digits; whether every group is a number that digits make."""
    digits, size = group(len(values))
    args = (raw, _tables(values), np.uint64(len(values)), digits, size, out)
    return not spread(_unpack, args, -(-len(out) // digits), least=LEAST // digits)
