"""Stochastic rounding to a few points a coordinate, and streams of b-bit numbers."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from shoal.kernels.cpu.bits import NO_SHIFTS, V, cell_scale
from shoal.kernels.cpu.philox import TILE, fill_halves, key, word
from shoal.kernels.draw import Draw


@njit(cache=True, nogil=True)
def _encode_levels(u, r, out, slots, index, stream, tie, k0, k1, levels, strata, place, shifts):
    m, d = u.shape
    h = np.empty(TILE, np.int32)
    base, width = (levels - 1) * strata * 32768, strata * 65536
    for i in range(m):
        slot, spot = np.uint64(slots[i]), np.int64(place[i])
        lift, s = cell_scale(r[i], (levels - 1) * strata)
        for lo in range(0, d, TILE):
            count = min(TILE, d - lo)
            fill_halves(h[: (count + 127) // 128 * 128], lo // 128, slot, index, stream, k0, k1)
            x = u[i, lo : lo + count]
            ties = 0
            if strata == 1:
                for j in range(count):
                    y = np.int64(np.floor((x[j] * lift) * s)) + base
                    t = y & 65535
                    ties += h[j] == t
                    out[i, lo + j] = min(max((y >> 16) + np.int64(h[j] < t), 0), levels - 1)
            else:
                shift = shifts[lo : lo + count]
                for j in range(count):
                    p = spot + np.int64(shift[j])
                    p = p - strata if p >= strata else p
                    y = np.int64(np.floor((x[j] * lift) * s)) + base
                    whole = y // width
                    t = y - whole * width - (p << 16)
                    ties += h[j] == t
                    out[i, lo + j] = min(max(whole + np.int64(h[j] < t), 0), levels - 1)
            if ties:
                for j in range(count):
                    p = 0 if strata == 1 else (spot + np.int64(shifts[lo + j])) % strata
                    z = (x[j] * lift) * s
                    cell = np.floor(z)
                    y = np.int64(cell) + base
                    whole = y // width
                    if h[j] == y - whole * width - (p << 16):
                        up = np.float32(word(lo + j, slot, index, tie, k0, k1) >> np.uint64(8)) * V < z - cell
                        out[i, lo + j] = min(max(whole + np.int64(up), 0), levels - 1)


def encode_levels(
    u: Tensor,
    r: Tensor,
    private: Draw,
    tie: Draw,
    levels: int,
    strata: int = 1,
    place: Tensor | None = None,
    shifts: Tensor | None = None,
) -> Tensor:
    code = np.empty(u.shape, np.int64)
    index, stream, k0, k1 = key(private)
    shift = NO_SHIFTS if shifts is None else shifts.numpy().reshape(-1)
    if shifts is None and strata > 1:
        shift = np.zeros(u.shape[1], np.int32)
    spot = np.zeros(len(u), np.int64) if place is None else place.numpy()
    _encode_levels(
        u.numpy(), r.numpy(), code, private.slots.numpy(), index, stream, np.uint64(tie.stream), k0, k1, levels, strata,
        spot, shift,
    )  # fmt: skip
    return pack(torch.from_numpy(code), (levels - 1).bit_length())


@njit(cache=True, nogil=True)
def _decode_levels(code, r, out, levels):
    for i in range(out.shape[0]):
        ri = np.float64(r[i])
        for j in range(out.shape[1]):
            out[i, j] = np.float32(ri * np.float64(2 * code[i, j] - (levels - 1)) / np.float64(levels - 1))


def decode_levels(code: Tensor, r: Tensor, levels: int) -> Tensor:
    out = np.empty(code.shape, np.float32)
    _decode_levels(code.numpy(), r.numpy(), out, levels)
    return torch.from_numpy(out)


@njit(cache=True, nogil=True)
def _mean_levels(code, r, out, levels, cohort):
    out[:] = 0.0
    for i in range(code.shape[0]):
        ri = np.float64(r[i])
        for j in range(out.size):
            out[j] += ri * np.float64(2 * code[i, j] - (levels - 1)) / np.float64(levels - 1)
    for j in range(out.size):
        out[j] /= cohort


def mean_levels(code: Tensor, r: Tensor, levels: int, cohort: int) -> Tensor:
    out = np.empty(code.shape[1])
    _mean_levels(code.numpy(), r.numpy(), out, levels, cohort)
    return torch.from_numpy(out)


@njit(cache=True, nogil=True)
def _pack(values, out, bits):
    for i in range(values.shape[0]):
        held, count, at = np.uint64(0), 0, 0
        for j in range(values.shape[1]):
            held |= np.uint64(values[i, j]) << np.uint64(count)
            count += bits
            while count >= 8:
                out[i, at] = np.uint8(held & np.uint64(0xFF))
                held >>= np.uint64(8)
                count -= 8
                at += 1
        if count:
            out[i, at] = np.uint8(held & np.uint64(0xFF))


def pack(values: Tensor, bits: int) -> Tensor:
    out = np.empty((len(values), (values.shape[1] * bits + 7) // 8), np.uint8)
    _pack(values.numpy(), out, bits)
    return torch.from_numpy(out)


@njit(cache=True, nogil=True)
def _unpack(payload, out, bits):
    mask = np.uint64((1 << bits) - 1)
    for i in range(out.shape[0]):
        held, count, at = np.uint64(0), 0, 0
        for j in range(out.shape[1]):
            while count < bits:
                held |= np.uint64(payload[i, at]) << np.uint64(count)
                count += 8
                at += 1
            out[i, j] = np.int64(held & mask)
            held >>= np.uint64(bits)
            count -= bits


def unpack(payload: Tensor, count: int, bits: int) -> Tensor:
    out = np.empty((len(payload), count), np.int64)
    _unpack(payload.numpy(), out, bits)
    return torch.from_numpy(out)
