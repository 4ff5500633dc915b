"""Coordinates dealt round among parts, block by block: gathered, scattered, added; nothing is ever listed.

The stride pattern is computed from one shared word a block, a tile of blocks at a time, and once for all rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from shoal.kernels.cpu.buffers import ready
from shoal.kernels.cpu.philox import TILE, fill_words, shared_key, word
from shoal.kernels.cpu.threads import LEAST, spread
from shoal.kernels.cpu.vectors import FAR, expect
from shoal.kernels.draw import Draw

AHEAD = 128  # blocks: the lines that are gathered from come in faster than the processor itself would have them come
CHUNK = 16384  # coordinates that are cleared or added up while they stay in the cache
_SHIFT = np.uint64(32)


@njit(inline="always")
def _shifts(drawn, out, lo, count, parts, slot, index, stream, k0, k1):
    """out[:count]: the shifts of blocks lo, lo + 1, ..., lo a multiple of 64; `drawn` is room for their words."""
    fill_words(drawn[: (count + 63) // 64 * 64], lo // 64, slot, index, stream, k0, k1)
    for b in range(count):
        out[b] = np.int64((np.uint64(drawn[b]) * np.uint64(parts)) >> _SHIFT)


@njit(inline="always")
def _turn(part, shift, parts):
    """Where in a block the part's coordinate stands."""
    t = part - shift
    return t + parts if t < 0 else t


@njit(cache=True, nogil=True)
def _lengths(out, part, parts, d, slot, index, stream, k0, k1):
    whole, left = d // parts, d % parts
    shift = np.int64((word(whole, slot, index, stream, k0, k1) * np.uint64(parts)) >> _SHIFT) if left else 0
    for i in range(out.size):
        out[i] = whole + (_turn(part[i], shift, parts) < left)


def dealt_lengths(draw: Draw, part: Tensor, parts: int, d: int) -> Tensor:
    out = np.empty(len(part), np.int64)
    _lengths(out, part.numpy(), parts, d, *shared_key(draw))
    return torch.from_numpy(out)


@njit(cache=True, nogil=True)
def _gather(u, out, part, parts, slot, index, stream, k0, k1, lo, hi):
    d, width, far = u.shape[1], out.shape[1], u.size >= FAR
    drawn, shifts = np.empty(TILE, np.uint32), np.empty(TILE, np.int64)
    for start in range(lo, hi, TILE):
        count = min(TILE, hi - start)
        whole = min(count, d // parts - start)
        _shifts(drawn, shifts, start, count, parts, slot, index, stream, k0, k1)
        for i in range(u.shape[0]):
            row, to, own = u[i, start * parts :], out[i, start:], part[i]
            for b in range(whole):
                if far:
                    later = min(b + AHEAD, whole - 1) if parts > 16 else b  # up to 16, any shift has the same line
                    expect(row, (b + AHEAD) * parts + _turn(own, shifts[later], parts))
                to[b] = row[b * parts + _turn(own, shifts[b], parts)]
            if whole < count and start + whole < width:
                t = _turn(own, shifts[whole], parts)
                to[whole] = row[whole * parts + t] if (start + whole) * parts + t < d else np.float32(0)


def gather_dealt(u: Tensor, draw: Draw, part: Tensor, parts: int, width: int) -> Tensor:
    out = ready((len(u), width), np.float32)
    _blocks(_gather, (u.numpy(), out, part.numpy(), parts, *shared_key(draw)), u.shape[1], parts)
    return torch.from_numpy(out)


@njit(cache=True, nogil=True)
def _scatter(values, out, part, parts, scale, slot, index, stream, k0, k1, lo, hi):
    d, step = out.shape[1], max(1, CHUNK // parts)
    drawn, shifts = np.empty(TILE, np.uint32), np.empty(TILE, np.int64)
    for start in range(lo, hi, TILE):
        count = min(TILE, hi - start)
        _shifts(drawn, shifts, start, count, parts, slot, index, stream, k0, k1)
        for i in range(out.shape[0]):
            own = part[i]
            for first in range(start, start + count, step):
                last = min(first + step, start + count)
                row, sent = out[i, first * parts : min(d, last * parts)], values[i, first:]
                row[:] = 0
                for b in range(min(last, d // parts) - first):
                    at = b * parts + _turn(own, shifts[first - start + b], parts)
                    row[at] = np.float32(np.float64(sent[b]) * scale)
                if last > d // parts:
                    b = d // parts - first
                    at = b * parts + _turn(own, shifts[first - start + b], parts)
                    if at < row.size:
                        row[at] = np.float32(np.float64(sent[b]) * scale)


def scatter_dealt(values: Tensor, draw: Draw, part: Tensor, parts: int, d: int, scale: float) -> Tensor:
    out = ready((len(values), d), np.float32)
    _blocks(_scatter, (values.numpy(), out, part.numpy(), parts, float(scale), *shared_key(draw)), d, parts)
    return torch.from_numpy(out)


@njit(cache=True, nogil=True)
def _mean(values, out, part, parts, scale, cohort, slot, index, stream, k0, k1, lo, hi):
    d, step = out.size, max(16, CHUNK // parts)
    drawn, shifts = np.empty(TILE, np.uint32), np.empty(TILE, np.int64)
    held = np.empty(min(step, hi - lo) * parts)
    for start in range(lo, hi, TILE):
        count = min(TILE, hi - start)
        _shifts(drawn, shifts, start, count, parts, slot, index, stream, k0, k1)
        for first in range(start, start + count, step):
            last = min(first + step, start + count)
            total = held[: min(d, last * parts) - first * parts]
            total[:] = 0.0
            for i in range(values.shape[0]):
                sent, own = values[i, first:], part[i]
                for b in range(min(last, d // parts) - first):
                    total[b * parts + _turn(own, shifts[first - start + b], parts)] += np.float64(sent[b])
                if last > d // parts:
                    b = d // parts - first
                    at = b * parts + _turn(own, shifts[first - start + b], parts)
                    if at < total.size:
                        total[at] += np.float64(sent[b])
            row = out[first * parts : first * parts + total.size]
            for j in range(total.size):
                row[j] = np.float32(total[j] * scale / cohort)


def mean_dealt(values: Tensor, draw: Draw, part: Tensor, parts: int, d: int, scale: float, cohort: int) -> Tensor:
    out = ready(d, np.float32)
    _blocks(_mean, (values.numpy(), out, part.numpy(), parts, float(scale), cohort, *shared_key(draw)), d, parts)
    return torch.from_numpy(out)


def _blocks(kernel: Any, args: tuple[Any, ...], d: int, parts: int) -> None:
    """Spread the blocks, the last of them perhaps cut short, in ranges that begin with a tile."""
    spread(kernel, args, -(-d // parts), unit=TILE, least=LEAST // parts)
