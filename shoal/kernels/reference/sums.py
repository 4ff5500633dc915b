"""Sums in a fixed order, norms and largest magnitudes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

LANES = 16  # partial sums of a block: lane l takes coordinates l, l + 16, ...; the lanes are then added from 0 to 15
SUM_BLOCK = 1 << 16  # coordinates of a block: what threads share; the blocks' sums are then added in order


def _lane_sums(terms: np.ndarray) -> np.ndarray:
    """(m,): blocks of SUM_BLOCK coordinates, each summed in its lanes, and the blocks' sums added in order."""
    m, d = terms.shape
    blocks = []
    for lo in range(0, d, SUM_BLOCK):
        part = terms[:, lo : lo + SUM_BLOCK]
        padded = np.zeros((m, -(-part.shape[1] // LANES) * LANES))
        padded[:, : part.shape[1]] = part
        lanes = np.add.accumulate(padded.reshape(m, -1, LANES), axis=1)[:, -1]
        blocks.append(np.add.accumulate(lanes, axis=1)[:, -1])
    return np.add.accumulate(np.stack(blocks, 1), axis=1)[:, -1]


def norms(u: Tensor) -> Tensor:
    """(m,) float32: the Euclidean norm of every row, rounded up, so that no |u_ij| exceeds it."""
    s = np.sqrt(_lane_sums(u.numpy().astype(np.float64) ** 2))
    with np.errstate(over="ignore"):
        r = s.astype(np.float32)
        return torch.from_numpy(np.where(r < s, np.nextafter(r, np.float32(np.inf)), r))


def maxes(u: Tensor) -> Tensor:
    """(m,) float32: max_j |u_ij|; a NaN or infinity in the row is returned as such (the largest bit pattern)."""
    bits = u.numpy().view(np.uint32) & np.uint32(0x7FFFFFFF)
    return torch.from_numpy(bits.max(1).view(np.float32))


def greatest(u: Tensor) -> float:
    """max_ij |u_ij| of all rows; a NaN or infinity among them is returned as such, 0 if there are no numbers."""
    return float(maxes(u).numpy().view(np.uint32).max().view(np.float32)) if u.numel() else 0.0


def square_norm(x: Tensor) -> float:
    """||x||^2 of one float64 vector, in the lanes' order."""
    return float(_lane_sums(x.numpy()[None] ** 2)[0])


def total_of(rows: np.ndarray) -> np.ndarray:
    """The sum of float64 rows, from 0.0 on, row by row: a sum of negative zeros is then a positive one everywhere."""
    total = np.zeros(rows.shape[1])
    for row in rows:
        total += row
    return total


def add_rows(u: Tensor, total: Tensor) -> None:
    """total (d,) float64 += sum_i u_i, in place, from row 0 to row m-1: chunk after chunk gives one call's bits."""
    for row in u.numpy():
        total.numpy()[:] += row


def mean_rows(u: Tensor, cohort: int, share: float = 1.0) -> Tensor:
    """(d,) float32: ((1/cohort) sum_i u_i) / share, in float64 from row 0 to row m-1, then rounded."""
    total = torch.zeros(u.shape[1], dtype=torch.float64)
    add_rows(u, total)
    return (total / cohort / share).float()


def mean_abs(u: Tensor) -> Tensor:
    """(m,) float32: ||u_i||_1 / d, summed in float64 and rounded to nearest, so that it never exceeds max_j |u_ij|."""
    sums = _lane_sums(np.abs(u.numpy().astype(np.float64)))
    return torch.from_numpy((sums / u.shape[1]).astype(np.float32))


def block_sums(terms: np.ndarray) -> Tensor:
    """(m,) float64: `_lane_sums`, where a sum of negative zeros is a positive one."""
    return torch.from_numpy(_lane_sums(terms) + 0.0)


def dots(u: Tensor, v: Tensor) -> Tensor:
    """(m,) float64: sum_j u_ij v_ij, in the blocks' order."""
    return block_sums(u.numpy().astype(np.float64) * v.numpy().astype(np.float64))
