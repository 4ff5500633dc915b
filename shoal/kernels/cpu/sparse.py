"""Kept coordinates: gathered, scattered, added, and the largest found."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor


@njit(cache=True, nogil=True)
def _gather(u, index, pointer, out):
    out[:] = 0
    for i in range(u.shape[0]):
        lo = pointer[i]
        for c in range(pointer[i + 1] - lo):
            out[i, c] = u[i, index[lo + c]]


def gather(u: Tensor, index: Tensor, pointer: Tensor, width: int) -> Tensor:
    out = np.empty((len(u), width), np.float32)
    _gather(u.numpy(), index.numpy(), pointer.numpy(), out)
    return torch.from_numpy(out)


@njit(cache=True, nogil=True)
def _scatter(values, index, pointer, out, scale):
    out[:] = 0
    for i in range(values.shape[0]):
        lo = pointer[i]
        for c in range(pointer[i + 1] - lo):
            out[i, index[lo + c]] = np.float32(np.float64(values[i, c]) * scale)


def scatter(values: Tensor, index: Tensor, pointer: Tensor, d: int, scale: float) -> Tensor:
    out = np.empty((len(values), d), np.float32)
    _scatter(values.numpy(), index.numpy(), pointer.numpy(), out, float(scale))
    return torch.from_numpy(out)


@njit(cache=True, nogil=True)
def _mean_sparse(values, index, pointer, out, scale, cohort):
    out[:] = 0.0
    for i in range(values.shape[0]):
        lo = pointer[i]
        for c in range(pointer[i + 1] - lo):
            out[index[lo + c]] += np.float64(values[i, c])
    for j in range(out.size):
        out[j] = out[j] * scale / cohort


def mean_sparse(values: Tensor, index: Tensor, pointer: Tensor, d: int, scale: float, cohort: int) -> Tensor:
    out = np.empty(d)
    _mean_sparse(values.numpy(), index.numpy(), pointer.numpy(), out, float(scale), cohort)
    return torch.from_numpy(out)


@njit(cache=True, nogil=True)
def _topk(bits, out):
    m, d = bits.shape
    k = out.shape[1]
    near = np.empty(d, np.uint32)
    count = np.empty(2048, np.int64)
    for i in range(m):
        row = bits[i]
        count[:] = 0
        for j in range(d):
            count[(row[j] & np.uint32(0x7FFFFFFF)) >> np.uint32(20)] += 1
        # The bucket that holds the k-th largest: its members alone are put in order.
        bucket, above = 2047, 0
        while above + count[bucket] < k:
            above += count[bucket]
            bucket -= 1
        c = 0
        for j in range(d):
            size = row[j] & np.uint32(0x7FFFFFFF)
            near[c] = size
            c += (size >> np.uint32(20)) == bucket
            if c == d:
                break
        held = near[:c]
        place = c - (k - above)
        least = np.partition(held, place)[place]
        for j in range(c):
            above += held[j] > least
        ties, c = k - above, 0
        for j in range(d):
            size = row[j] & np.uint32(0x7FFFFFFF)
            if size >= least and (size > least or ties > 0):
                ties -= size == least
                out[i, c] = j
                c += 1


def topk(u: Tensor, k: int) -> Tensor:
    out = np.empty((len(u), k), np.int64)
    _topk(u.numpy().view(np.uint32), out)
    return torch.from_numpy(out)
