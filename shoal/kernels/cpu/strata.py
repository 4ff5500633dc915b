"""Rounding in strata onto grids that start at an offset, one a coordinate."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from shoal.kernels.cpu.bits import V, cell_scale
from shoal.kernels.cpu.buffers import ready
from shoal.kernels.cpu.codes import pack
from shoal.kernels.cpu.philox import TILE, fill_halves, key, word
from shoal.kernels.draw import Draw


@njit(cache=True, nogil=True)
def _encode_strata(u, r, out, slots, index, stream, tie, k0, k1, levels, strata, place, shifts, steps, offset):
    m, d = u.shape
    h = np.empty(TILE, np.int32)
    base, width = steps * 32768, strata * 65536
    for i in range(m):
        slot, spot = np.uint64(slots[i]), np.int64(place[i])
        lift, s = cell_scale(r[i], steps)
        for lo in range(0, d, TILE):
            count = min(TILE, d - lo)
            fill_halves(h[: (count + 127) // 128 * 128], lo // 128, slot, index, stream, k0, k1)
            for j in range(count):
                z = (u[i, lo + j] * lift) * s
                cell = np.floor(z)
                p = spot + np.int64(shifts[lo + j])
                p = p - strata if p >= strata else p
                y = np.int64(cell) + base + np.int64(offset[lo + j])
                whole = y // width
                t = y - whole * width - (p << 16)
                up = h[j] < t
                if h[j] == t:
                    up = np.float32(word(lo + j, slot, index, tie, k0, k1) >> np.uint64(8)) * V < z - cell
                out[i, lo + j] = min(max(whole + np.int64(up), 0), levels - 1)


def encode_strata(
    u: Tensor,
    r: Tensor,
    private: Draw,
    tie: Draw,
    levels: int,
    strata: int,
    place: Tensor,
    shifts: Tensor,
    steps: int,
    offset: Tensor,
) -> Tensor:
    code = ready(u.shape, np.int64)
    index, stream, k0, k1 = key(private)
    _encode_strata(
        u.numpy(), r.numpy(), code, private.slots.numpy(), index, stream, np.uint64(tie.stream), k0, k1, levels, strata,
        place.numpy(), shifts.numpy().reshape(-1), steps, offset.numpy(),
    )  # fmt: skip
    return pack(torch.from_numpy(code), (levels - 1).bit_length())


@njit(inline="always")
def point(code, r, strata, steps, offset):
    """The grid point of a code, before it is rounded to float32: see reference.strata._points."""
    at = code * (strata * 65536) - np.int64(offset) - steps * 32768
    return r * np.float64(at) / np.float64(steps * 32768)


@njit(cache=True, nogil=True)
def _decode_strata(code, r, out, strata, steps, offset):
    for i in range(out.shape[0]):
        ri = np.float64(r[i])
        for j in range(out.shape[1]):
            out[i, j] = np.float32(point(code[i, j], ri, strata, steps, offset[j]))


def decode_strata(code: Tensor, r: Tensor, strata: int, steps: int, offset: Tensor) -> Tensor:
    out = ready(code.shape, np.float32)
    _decode_strata(code.numpy(), r.numpy(), out, strata, steps, offset.numpy())
    return torch.from_numpy(out)


@njit(cache=True, nogil=True)
def _mean_strata(code, r, out, strata, steps, offset, cohort):
    out[:] = 0.0
    for i in range(code.shape[0]):
        ri = np.float64(r[i])
        for j in range(out.size):
            out[j] += point(code[i, j], ri, strata, steps, offset[j])
    for j in range(out.size):
        out[j] /= cohort


def mean_strata(code: Tensor, r: Tensor, strata: int, steps: int, offset: Tensor, cohort: int) -> Tensor:
    out = np.empty(code.shape[1])
    _mean_strata(code.numpy(), r.numpy(), out, strata, steps, offset.numpy(), cohort)
    return torch.from_numpy(out)
