"""Sums in a fixed order, norms and largest magnitudes."""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import njit
from torch import Tensor

from shoal.kernels.reference import LANES


@njit(inline="always")
def _lane_sum(row):
    """sum_j row_j^2 in float64: LANES partial sums, added from 0 to 15."""
    lanes = np.zeros(LANES)
    whole = row.size // LANES * LANES
    for lo in range(0, whole, LANES):
        for lane in range(LANES):
            v = np.float64(row[lo + lane])
            lanes[lane] += v * v
    for j in range(whole, row.size):
        v = np.float64(row[j])
        lanes[j - whole] += v * v
    total = lanes[0]
    for lane in range(1, LANES):
        total += lanes[lane]
    return total


@njit(cache=True, nogil=True)
def _norms(u, out):
    for i in range(u.shape[0]):
        s = math.sqrt(_lane_sum(u[i]))
        r = np.float32(s)
        if np.float64(r) < s:
            r = np.nextafter(r, np.float32(np.inf))
        out[i] = r


def norms(u: Tensor) -> Tensor:
    out = np.empty(len(u), np.float32)
    _norms(u.numpy(), out)
    return torch.from_numpy(out)


@njit(cache=True, nogil=True)
def _maxes(bits, out):
    for i in range(bits.shape[0]):
        top = np.uint32(0)
        for j in range(bits.shape[1]):
            top = max(top, bits[i, j] & np.uint32(0x7FFFFFFF))
        out[i] = top


def maxes(u: Tensor) -> Tensor:
    out = np.empty(len(u), np.uint32)
    _maxes(u.numpy().view(np.uint32), out)
    return torch.from_numpy(out.view(np.float32))


@njit(cache=True, nogil=True)
def _square_norm(x):
    return _lane_sum(x)


def square_norm(x: Tensor) -> float:
    return float(_square_norm(x.numpy()))


@njit(cache=True, nogil=True)
def _add_rows(u, total):
    for i in range(u.shape[0]):
        for j in range(u.shape[1]):
            total[j] += np.float64(u[i, j])


def add_rows(u: Tensor, total: Tensor) -> None:
    _add_rows(u.numpy(), total.numpy())


def mean_rows(u: Tensor, cohort: int) -> Tensor:
    total = np.zeros(u.shape[1])
    _add_rows(u.numpy(), total)
    total /= cohort
    return torch.from_numpy(total)
