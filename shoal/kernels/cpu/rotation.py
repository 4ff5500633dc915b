"""The Hadamard transform, its signs, and scalar products."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from shoal.kernels.cpu.philox import words
from shoal.kernels.cpu.sums import added_lanes, block_sums
from shoal.kernels.draw import Draw
from shoal.kernels.reference import LANES, SUM_BLOCK

BLOCK = 4096  # coordinates whose butterflies are done while they stay in the first-level cache: 16 KiB
COLUMNS = 128  # coordinates that are gathered from every block for the longer strides


@njit(cache=True, nogil=True)
def _rademacher(words, out):
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            out[i, j] = np.float32(1) - np.float32(2) * np.float32((words[i, j >> 5] >> np.uint32(j & 31)) & 1)


def rademacher(draw: Draw, d: int) -> Tensor:
    out = np.empty((len(draw.slots), d), np.float32)
    _rademacher(words(draw, -(-d // 32)).numpy(), out)
    return torch.from_numpy(out)


@njit(inline="always")
def _eights(x, u, scale):
    """x = scale u after the strides 1, 2 and 4."""
    for o in range(0, x.size, 8):
        a0, a1, a2, a3 = u[o] * scale, u[o + 1] * scale, u[o + 2] * scale, u[o + 3] * scale
        a4, a5, a6, a7 = u[o + 4] * scale, u[o + 5] * scale, u[o + 6] * scale, u[o + 7] * scale
        b0, b1, b2, b3 = a0 + a1, a0 - a1, a2 + a3, a2 - a3
        b4, b5, b6, b7 = a4 + a5, a4 - a5, a6 + a7, a6 - a7
        c0, c1, c2, c3 = b0 + b2, b1 + b3, b0 - b2, b1 - b3
        c4, c5, c6, c7 = b4 + b6, b5 + b7, b4 - b6, b5 - b7
        x[o], x[o + 1], x[o + 2], x[o + 3] = c0 + c4, c1 + c5, c2 + c6, c3 + c7
        x[o + 4], x[o + 5], x[o + 6], x[o + 7] = c0 - c4, c1 - c5, c2 - c6, c3 - c7


@njit(inline="always")
def _stages(x, stride):
    """The stages with strides stride, 2 stride, ... of x, in place: two at a time, so that x is read half as often."""
    while 2 * stride < x.size:
        for lo in range(0, x.size, 4 * stride):
            a, b = x[lo : lo + stride], x[lo + stride : lo + 2 * stride]
            c, e = x[lo + 2 * stride : lo + 3 * stride], x[lo + 3 * stride : lo + 4 * stride]
            for j in range(stride):
                p, q, r, s = a[j] + b[j], a[j] - b[j], c[j] + e[j], c[j] - e[j]
                a[j], b[j], c[j], e[j] = p + r, q + s, p - r, q - s
        stride *= 4
    if stride < x.size:
        a, b = x[:stride], x[stride:]
        for j in range(stride):
            p, q = a[j], b[j]
            a[j], b[j] = p + q, p - q


@njit(cache=True, nogil=True)
def _hadamard(u, out, scale):
    m, d = u.shape
    block = min(d, BLOCK)
    across = d // block
    held = np.empty(across * COLUMNS, np.float32)
    for i in range(m):
        for lo in range(0, d, block):
            x = out[i, lo : lo + block]
            if d >= 8:
                _eights(x, u[i, lo : lo + block], scale)
                _stages(x, 8)
            else:
                for j in range(d):
                    x[j] = u[i, j] * scale
                _stages(x, 1)
        if across > 1:
            for column in range(0, block, COLUMNS):
                for b in range(across):
                    x, y = out[i, b * block + column :], held[b * COLUMNS : (b + 1) * COLUMNS]
                    for j in range(COLUMNS):
                        y[j] = x[j]
                _stages(held, COLUMNS)
                for b in range(across):
                    x, y = out[i, b * block + column :], held[b * COLUMNS : (b + 1) * COLUMNS]
                    for j in range(COLUMNS):
                        x[j] = y[j]


def hadamard(u: Tensor) -> Tensor:
    out = torch.empty(u.shape)
    _hadamard(u.numpy(), out.numpy(), np.float32(u.shape[1] ** -0.5))
    return out


@njit(cache=True, nogil=True)
def _dot_sums(u, v, blocks, out, lo, hi):
    for k in range(lo, hi):
        first, lanes = k % blocks * SUM_BLOCK, np.zeros(LANES)
        for j in range(first, min(first + SUM_BLOCK, u.shape[1])):
            lanes[j % LANES] += np.float64(u[k // blocks, j]) * np.float64(v[k // blocks, j])
        out[k] = added_lanes(lanes)


def dots(u: Tensor, v: Tensor) -> Tensor:
    a, b = u.numpy(), v.numpy()
    sums = block_sums(lambda *part: _dot_sums(a, b, *part), *a.shape)
    return torch.from_numpy(np.ascontiguousarray(np.add.accumulate(sums, axis=1)[:, -1]))
