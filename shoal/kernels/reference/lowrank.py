"""Matrices of low rank, in a fixed order of summation."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

LOST = 2.0**-40  # what is left of a column after it was made orthogonal, below which it is rounding


def _unit_columns(p: np.ndarray) -> np.ndarray:
    """Gram and Schmidt's method, each column twice; a column that depends on earlier ones becomes zero."""
    q = np.zeros_like(p)
    for c in range(p.shape[1]):
        x = p[:, c].copy()
        size = math.sqrt(_in_order(x, x))
        for e in [*range(c), *range(c)]:
            x -= _in_order(x, q[:, e]) * q[:, e]
        left = math.sqrt(_in_order(x, x))
        if left > LOST * size:
            q[:, c] = x / left
    return q


def _in_order(x: np.ndarray, y: np.ndarray) -> float:
    total = 0.0
    for a, b in zip(x.tolist(), y.tolist(), strict=True):
        total += a * b
    return total


def low_rank(u: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """((m, a, r), (m, b, r)) float32: P, the unit columns of M G, and M' P, of matrices M (m, a, b) and G (m, b, r).

    In float64; M G is summed by ascending column of M, the others by ascending row.
    """
    left, right = [], []
    for M, G in zip(u.numpy().astype(np.float64), start.numpy().astype(np.float64), strict=True):
        p, q = np.zeros((len(M), G.shape[1])), np.zeros(G.shape)
        for j in range(M.shape[1]):
            p += M[:, j : j + 1] * G[j]
        unit = _unit_columns(p)
        for i in range(len(M)):
            q += M[i][:, None] * unit[i]
        left.append(unit)
        right.append(q)
    shapes = (len(u), u.shape[1], start.shape[2]), tuple(start.shape)
    with np.errstate(over="ignore"):
        both = [np.array(x).reshape(s).astype(np.float32) for x, s in zip((left, right), shapes, strict=True)]
    return torch.from_numpy(both[0]), torch.from_numpy(both[1])


def outer(left: Tensor, right: Tensor) -> Tensor:
    """(m, a, b) float32: sum_c left_c right_c', c ascending, in float64."""
    p, q = left.numpy().astype(np.float64), right.numpy().astype(np.float64)
    total = np.zeros((len(p), p.shape[1], q.shape[1]))
    for c in range(p.shape[2]):
        total += p[:, :, None, c] * q[:, None, :, c]
    with np.errstate(over="ignore"):
        return torch.from_numpy(total.astype(np.float32))
