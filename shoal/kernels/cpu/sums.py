"""Sums in a fixed order, norms and largest magnitudes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from shoal.kernels.cpu.buffers import ready
from shoal.kernels.cpu.lanes import add_squares_16, add_squares_256
from shoal.kernels.cpu.threads import LEAST, spread
from shoal.kernels.reference.sums import LANES, SUM_BLOCK

TOGETHER = 2048  # coordinates whose sums stay in the first-level cache


@njit(inline="always")
def added_lanes(lanes):
    """The lanes' sum, from 0 to 15."""
    total = lanes[0]
    for lane in range(1, LANES):
        total += lanes[lane]
    return total


@njit(cache=True, nogil=True)
def square_sum(block):
    """sum_j block_j^2 in float64 of at most SUM_BLOCK coordinates: LANES partial sums, added from 0 to 15."""
    lanes = np.zeros(LANES)
    most, whole = block.size // 256 * 256, block.size // LANES * LANES
    for lo in range(0, most, 256):
        add_squares_256(block, lo, lanes)
    for lo in range(most, whole, LANES):
        add_squares_16(block, lo, lanes)
    for j in range(whole, block.size):
        v = np.float64(block[j])
        lanes[j - whole] += v * v
    return added_lanes(lanes)


@njit(cache=True, nogil=True)
def _square_sums(u, blocks, out, lo, hi):
    """out[k] for k in lo..hi-1: block k % blocks of row k // blocks."""
    for k in range(lo, hi):
        first = k % blocks * SUM_BLOCK
        out[k] = square_sum(u[k // blocks, first : min(first + SUM_BLOCK, u.shape[1])])


@njit(cache=True, nogil=True)
def _roots(sums, out):
    for i in range(out.size):
        total = sums[i, 0]
        for b in range(1, sums.shape[1]):
            total += sums[i, b]
        s = math.sqrt(total)
        r = np.float32(s)
        if np.float64(r) < s:
            r = np.nextafter(r, np.float32(np.inf))
        out[i] = r


def block_sums(kernel: Any, u: np.ndarray) -> np.ndarray:
    """(m, blocks) float64 of kernel(u, blocks, out, lo, hi), which fills out[lo:hi] of the blocks in row order.

    Add a row's blocks from left to right.
    """
    (m, d), blocks = u.shape, -(-u.shape[1] // SUM_BLOCK)
    out = np.empty(m * blocks)
    spread(kernel, (u, blocks, out), m * blocks, least=LEAST // min(d, SUM_BLOCK))
    return out.reshape(m, blocks)


def norms(u: Tensor) -> Tensor:
    out = np.empty(len(u), np.float32)
    _roots(block_sums(_square_sums, u.numpy()), out)
    return torch.from_numpy(out)


@njit(inline="always")
def _top(block):
    """The bits of the largest magnitude: NaNs have an order there."""
    top = np.uint32(0)
    for j in range(block.size):
        top = max(top, block[j] & np.uint32(0x7FFFFFFF))
    return top


@njit(inline="always")
def top_of(x):
    """The largest magnitude; NaN if there is one."""
    return np.uint32(_top(x.view(np.uint32))).view(np.float32)


@njit(cache=True, nogil=True)
def _maxes(u, blocks, out, lo, hi):
    bits, largest = u.view(np.uint32), out.view(np.uint32)
    for k in range(lo, hi):
        first = k % blocks * SUM_BLOCK
        largest[k] = _top(bits[k // blocks, first : min(first + SUM_BLOCK, bits.shape[1])])


def _row_maxes(u: np.ndarray) -> np.ndarray:
    """(m,) float32: the largest magnitudes."""
    (m, d), blocks = u.shape, -(-u.shape[1] // SUM_BLOCK)
    out = np.empty(m * blocks, np.float32)
    spread(_maxes, (u, blocks, out), m * blocks, least=LEAST // min(d, SUM_BLOCK))
    return out if blocks == 1 else out.view(np.uint32).reshape(m, blocks).max(1).view(np.float32)


def maxes(u: Tensor) -> Tensor:
    return torch.from_numpy(_row_maxes(u.numpy()))


@njit(cache=True, nogil=True)
def _greatest(u):
    top, bits = np.uint32(0), u.view(np.uint32)
    for i in range(u.shape[0]):
        top = max(top, _top(bits[i]))
    return np.uint32(top).view(np.float32)


def greatest(u: Tensor) -> float:
    rows = u.numpy()
    if rows.size < 2 * LEAST:
        return float(_greatest(rows))
    return float(_row_maxes(rows).view(np.uint32).max().view(np.float32))


def square_norm(x: Tensor) -> float:
    total = 0.0
    for block in block_sums(_square_sums, x.numpy()[None])[0]:
        total += float(block)
    return total


@njit(cache=True, nogil=True)
def _add_rows(u, total, lo, hi):
    for first in range(lo, hi, TOGETHER):
        sums = total[first : min(first + TOGETHER, hi)]
        for i in range(u.shape[0]):
            row = u[i, first : first + sums.size]
            for j in range(sums.size):
                sums[j] += np.float64(row[j])


def add_rows(u: Tensor, total: Tensor) -> None:
    spread(_add_rows, (u.numpy(), total.numpy()), total.shape[0], TOGETHER, LEAST // max(len(u), 1))


@njit(cache=True, nogil=True)
def _mean_rows(u, mean, cohort, share, lo, hi):
    room = np.empty(TOGETHER)
    for first in range(lo, hi, TOGETHER):
        sums = room[: min(TOGETHER, hi - first)]
        sums[:] = 0.0
        for i in range(u.shape[0]):
            row = u[i, first : first + sums.size]
            for j in range(sums.size):
                sums[j] += np.float64(row[j])
        for j in range(sums.size):
            mean[first + j] = np.float32(sums[j] / cohort / share)


def mean_rows(u: Tensor, cohort: int, share: float = 1.0) -> Tensor:
    mean = ready(u.shape[1], np.float32)
    args = (u.numpy(), mean, cohort, float(share))
    spread(_mean_rows, args, mean.size, TOGETHER, LEAST // max(len(u), 1))
    return torch.from_numpy(mean)
