"""One power iteration on small matrices, in a fixed order of summation: library products have none."""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import njit
from torch import Tensor

from shoal.kernels.cpu.threads import LEAST, spread
from shoal.kernels.reference.lowrank import LOST


@njit(inline="always")
def _dot(x, y):
    total = 0.0
    for i in range(x.size):
        total += x[i] * y[i]
    return total


@njit(cache=True, nogil=True)
def _low_rank(u, start, left, right, first, last):
    a, b, rank = u.shape[1], u.shape[2], start.shape[2]
    p = np.empty((rank, a))  # a column is contiguous here
    q = np.empty((rank, b))
    for k in range(first, last):
        p[:] = 0.0
        q[:] = 0.0
        for i in range(a):
            for c in range(rank):
                total = 0.0
                for j in range(b):
                    total += np.float64(u[k, i, j]) * np.float64(start[k, j, c])
                p[c, i] = total
        for c in range(rank):
            x = p[c]
            size = math.sqrt(_dot(x, x))
            for e2 in range(2 * c):
                y = p[e2 % c]
                along = _dot(x, y)
                for i in range(a):
                    x[i] -= along * y[i]
            rest = math.sqrt(_dot(x, x))
            for i in range(a):
                x[i] = x[i] / rest if rest > LOST * size else 0.0
        for i in range(a):
            for c in range(rank):
                x = p[c, i]
                for j in range(b):
                    q[c, j] += np.float64(u[k, i, j]) * x
        for c in range(rank):
            for i in range(a):
                left[k, i, c] = np.float32(p[c, i])
            for j in range(b):
                right[k, j, c] = np.float32(q[c, j])


def low_rank(u: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    (m, a, b), rank = u.shape, start.shape[2]
    left, right = np.empty((m, a, rank), np.float32), np.empty((m, b, rank), np.float32)
    args = (u.contiguous().numpy(), start.contiguous().numpy(), left, right)
    spread(_low_rank, args, m, least=LEAST // (a * b))
    return torch.from_numpy(left), torch.from_numpy(right)


@njit(cache=True, nogil=True)
def _outer(left, right, out, first, last):
    for k in range(first, last):
        for i in range(out.shape[1]):
            for j in range(out.shape[2]):
                total = 0.0
                for c in range(left.shape[2]):
                    total += np.float64(left[k, i, c]) * np.float64(right[k, j, c])
                out[k, i, j] = np.float32(total)


def outer(left: Tensor, right: Tensor) -> Tensor:
    m, a, b = len(left), left.shape[1], right.shape[1]
    out = np.empty((m, a, b), np.float32)
    spread(_outer, (left.contiguous().numpy(), right.contiguous().numpy(), out), m, least=LEAST // (a * b))
    return torch.from_numpy(out)
