"""Coordinates dealt block by block: each block of `parts` coordinates is shifted by one shared number."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from shoal.kernels.draw import Draw
from shoal.kernels.reference.philox import word_array


def _owners(draw: Draw, parts: int, d: int) -> np.ndarray:
    """(d,): coordinate j of block b = floor(j / parts) belongs to part (j + s_b) mod parts, s_b = floor(word_b parts /
    2^32) with the words of the draw's first row."""
    shifts = word_array(draw, -(-d // parts))[0].astype(np.uint64) * np.uint64(parts) >> np.uint64(32)
    j = np.arange(d)
    return (j + shifts.astype(np.int64)[j // parts]) % parts


def dealt_lengths(draw: Draw, part: Tensor, parts: int, d: int) -> Tensor:
    """(m,) int64: how many of d coordinates part_i has, floor(d / parts) or one more."""
    return torch.from_numpy(np.bincount(_owners(draw, parts, d), minlength=parts)[part.numpy()].astype(np.int64))


def gather_dealt(u: Tensor, draw: Draw, part: Tensor, parts: int, width: int) -> Tensor:
    """(m, width) float32: row i holds the coordinates of u[i] that belong to part_i, ascending, then zeros."""
    out, owner = np.zeros((len(u), width), np.float32), _owners(draw, parts, u.shape[1])
    for row, sent, own in zip(u.numpy(), out, part.tolist(), strict=True):
        sent[: (owner == own).sum()] = row[owner == own]
    return torch.from_numpy(out)


def scatter_dealt(values: Tensor, draw: Draw, part: Tensor, parts: int, d: int, scale: float) -> Tensor:
    """(m, d) float32: scale times the values at the coordinates of part_i, zero elsewhere."""
    out, owner = np.zeros((len(values), d), np.float32), _owners(draw, parts, d)
    for row, sent, own in zip(out, values.numpy(), part.tolist(), strict=True):
        row[owner == own] = (sent[: (owner == own).sum()].astype(np.float64) * scale).astype(np.float32)
    return torch.from_numpy(out)


def mean_dealt(values: Tensor, draw: Draw, part: Tensor, parts: int, d: int, scale: float, cohort: int) -> Tensor:
    """(d,) float32: (scale/cohort) sum_i of the rows, added in float64 from row 0 to row m-1."""
    out, owner = np.zeros(d), _owners(draw, parts, d)
    for sent, own in zip(values.numpy(), part.tolist(), strict=True):
        out[owner == own] += sent[: (owner == own).sum()].astype(np.float64)
    with np.errstate(over="ignore"):
        return torch.from_numpy((out * scale / cohort).astype(np.float32))
