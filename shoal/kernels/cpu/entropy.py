"""The entropy code: asymmetric numeral systems over the exact counts of a row's symbols."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from shoal.kernels.cpu.threads import LEAST, spread
from shoal.kernels.reference.entropy import DIGIT, LOW, state_bytes


@njit(inline="always")
def _write_counts(counts, out):
    """Bytes that the counts take, or -1 where `out` is too short."""
    at = 0
    for s in range(counts.size):
        if s == (counts.size - 1) // 2:
            continue
        number, k = counts[s] + 1, 0
        while number >> (k + 1):
            k += 1
        if at + 2 * k + 1 > 8 * out.size:
            return -1
        at += k
        out[at >> 3] |= np.uint8(1 << (at & 7))
        at += 1
        for i in range(k):
            out[at >> 3] |= np.uint8(((number >> i) & 1) << (at & 7))
            at += 1
    return (at + 7) >> 3


@njit(cache=True, nogil=True)
def _encode(code, out, nbytes, levels, width, first, last):
    d, limit = code.shape[1], out.shape[1]
    counts, below = np.empty(levels, np.int64), np.empty(levels, np.int64)
    gone = np.empty(limit, np.uint8)
    for i in range(first, last):
        counts[:] = 0
        for j in range(d):
            counts[code[i, j]] += 1
        below[0] = 0
        for s in range(1, levels):
            below[s] = below[s - 1] + counts[s - 1]
        head = _write_counts(counts, out[i])
        room, left, x = limit - 1 - head - width, 0, d << LOW
        j = d - 1 if head >= 0 and room >= 0 else -1
        short = j >= 0
        while j >= 0 and short:
            c = counts[code[i, j]]
            while x >= c << (LOW + DIGIT):
                if left == room:  # it does not pay: nothing more is written
                    short = False
                    break
                gone[left] = np.uint8(x & 255)
                left += 1
                x >>= DIGIT
            q = x // c
            x = q * d + below[code[i, j]] + (x - q * c)
            j -= 1
        if not short:
            out[i, :] = 0
            nbytes[i] = limit
            continue
        for b in range(width):
            out[i, head + b] = np.uint8((x >> (8 * b)) & 255)
        for b in range(left):
            out[i, head + width + b] = gone[left - 1 - b]
        nbytes[i] = head + width + left


def encode_entropy(code: Tensor, levels: int, limit: int) -> tuple[Tensor, Tensor]:
    m, d = code.shape
    out, nbytes, rows = np.zeros((m, limit), np.uint8), np.empty(m, np.int64), code.numpy()
    spread(_encode, (rows, out, nbytes, levels, state_bytes(d)), m, least=LEAST // d)
    return torch.from_numpy(out), torch.from_numpy(nbytes)


@njit(inline="always")
def _read_counts(row, size, d, counts):
    """Bytes that the counts took, or -1 where the bits are no counts of d symbols."""
    at, total, end = 0, 0, 8 * size
    for s in range(counts.size):
        if s == (counts.size - 1) // 2:
            continue
        k = 0
        while at + k < end and k <= 40 and (row[(at + k) >> 3] >> ((at + k) & 7)) & 1 == 0:
            k += 1
        if k > 40 or at + 2 * k + 1 > end:
            return -1
        at += k + 1
        number = 1 << k
        for i in range(k):
            number += np.int64((row[at >> 3] >> (at & 7)) & 1) << i
            at += 1
        counts[s] = number - 1
        total += number - 1
        if total > d:
            return -1
    while at & 7:
        if (row[at >> 3] >> (at & 7)) & 1:
            return -1
        at += 1
    counts[(counts.size - 1) // 2] = d - total
    return at >> 3


@njit(inline="always")
def _find(below, alive, slot):
    """The last of the first `alive` places whose number is at most `slot`."""
    low, high = 0, alive
    while high - low > 1:
        middle = (low + high) >> 1
        if below[middle] <= slot:
            low = middle
        else:
            high = middle
    return low


@njit(cache=True, nogil=True)
def _decode(payload, nbytes, out, good, levels, width, first, last):
    d = out.shape[1]
    counts, seen = np.empty(levels, np.int64), np.empty(levels, np.int64)
    symbol, below, often = np.empty(levels, np.int64), np.empty(levels, np.int64), np.empty(levels, np.int64)
    floor = d << LOW
    for i in range(first, last):
        row, size = payload[i], nbytes[i]
        at = _read_counts(row, size, d, counts)
        if at < 0 or at + width > size:
            continue
        alive, total = 0, 0
        for s in range(levels):
            if counts[s]:
                symbol[alive], below[alive], often[alive] = s, total, counts[s]
                total += counts[s]
                alive += 1
        x = 0
        for b in range(width):
            x |= np.int64(row[at + b]) << (8 * b)
        at += width
        fine = floor <= x < d << (LOW + DIGIT)
        seen[:] = 0
        j = 0
        while fine and j < d:
            q = x // d
            slot = x - q * d
            a = _find(below, alive, slot)
            out[i, j] = symbol[a]
            seen[a] += 1
            x = often[a] * q + slot - below[a]
            while x < floor and at < size:
                x = (x << DIGIT) | np.int64(row[at])
                at += 1
            fine = x >= floor
            j += 1
        for a in range(alive):
            fine = fine and seen[a] == often[a]
        good[i] = fine and at == size and x == floor
        if not good[i]:
            out[i, :] = 0


def decode_entropy(payload: Tensor, nbytes: Tensor, d: int, levels: int) -> tuple[Tensor, Tensor]:
    m = len(payload)
    out, good = np.zeros((m, d), np.int64), np.zeros(m, np.bool_)
    rows, sizes = payload.contiguous().numpy(), nbytes.contiguous().numpy()
    spread(_decode, (rows, sizes, out, good, levels, state_bytes(d)), m, least=LEAST // d)
    return torch.from_numpy(out), torch.from_numpy(good)
