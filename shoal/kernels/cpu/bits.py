"""Stochastic rounding to one bit a coordinate, and its means."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from shoal.kernels.cpu.philox import TILE, fill_halves, key, word
from shoal.kernels.draw import Draw
from shoal.kernels.reference import LIFT, TINY

V = np.float32(2.0**-24)
_MAGIC, _TOP = np.uint64(0x0102040810204080), np.uint64(56)


@njit(inline="always")
def cell_scale(r, steps):
    """(lift, s) with cell = floor((u lift) s): see reference._cells."""
    if r == np.float32(0):
        return np.float32(1), np.float32(0)
    lift = LIFT if r < TINY else np.float32(1)
    return lift, np.float32(steps * 32768) / (r * lift)


@njit(inline="always")
def pack_flags(flags, out):
    """Eight 0/1 bytes to one byte, least significant first, by one multiplication."""
    eights = flags.view(np.uint64)
    for b in range(out.size):
        out[b] = np.uint8((eights[b] * _MAGIC) >> _TOP)


@njit(cache=True, nogil=True)
def _encode_bits(u, r, out, slots, index, stream, tie, k0, k1, strata, place, shifts):
    m, d = u.shape
    h = np.empty(TILE, np.int32)
    flags = np.zeros(TILE, np.uint8)
    for i in range(m):
        slot = np.uint64(slots[i])
        lift, s = cell_scale(r[i], strata)
        base, spot = strata * 32768, np.int64(place[i])
        for lo in range(0, d, TILE):
            count = min(TILE, d - lo)
            fill_halves(h[: (count + 127) // 128 * 128], lo // 128, slot, index, stream, k0, k1)
            x = u[i, lo : lo + count]
            ties = 0
            if strata == 1:
                for j in range(count):
                    t = np.int64(np.floor((x[j] * lift) * s)) + 32768
                    flags[j] = h[j] < t
                    ties += h[j] == t
            else:
                shift = shifts[lo : lo + count]
                for j in range(count):
                    p = spot + np.int64(shift[j])
                    p = p - strata if p >= strata else p
                    t = np.int64(np.floor((x[j] * lift) * s)) + (base - (p << 16))
                    flags[j] = h[j] < t
                    ties += h[j] == t
            if ties:
                for j in range(count):
                    p = 0 if strata == 1 else (spot + np.int64(shifts[lo + j])) % strata
                    z = (x[j] * lift) * s
                    cell = np.floor(z)
                    if h[j] == np.int64(cell) + (base - (p << 16)):
                        v = np.float32(word(lo + j, slot, index, tie, k0, k1) >> np.uint64(8)) * V
                        flags[j] = v < z - cell
            flags[count : (count + 7) // 8 * 8] = 0
            pack_flags(flags[: (count + 7) // 8 * 8], out[i, lo // 8 : (lo + count + 7) // 8])


NO_SHIFTS = np.zeros(0, np.int32)


def encode_bits(
    u: Tensor, r: Tensor, private: Draw, tie: Draw, strata: int, place: Tensor, shifts: Tensor | None
) -> Tensor:
    out = np.empty((len(u), (u.shape[1] + 7) // 8), np.uint8)
    index, stream, k0, k1 = key(private)
    shift = NO_SHIFTS if shifts is None else shifts.numpy().reshape(-1)
    if shifts is None and strata > 1:
        shift = np.zeros(u.shape[1], np.int32)
    _encode_bits(
        u.numpy(), r.numpy(), out, private.slots.numpy(), index, stream, np.uint64(tie.stream), k0, k1, strata,
        place.numpy(), shift,
    )  # fmt: skip
    return torch.from_numpy(out)


@njit(cache=True, nogil=True)
def _decode_bits(payload, r, out):
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            out[i, j] = r[i] if (payload[i, j >> 3] >> (j & 7)) & 1 else -r[i]


def decode_bits(payload: Tensor, r: Tensor, d: int) -> Tensor:
    out = np.empty((len(payload), d), np.float32)
    _decode_bits(payload.numpy(), r.numpy(), out)
    return torch.from_numpy(out)


@njit(cache=True, nogil=True)
def _mean_bits(payload, r, out, cohort):
    # Tile by tile, so that the sums of a tile stay in the first-level cache while all rows pass over it.
    d = out.size
    out[:] = 0.0
    for lo in range(0, d, TILE):
        count = min(TILE, d - lo)
        acc = out[lo : lo + count]
        for i in range(payload.shape[0]):
            ri = np.float64(r[i])
            row = payload[i, lo // 8 : (lo + count + 7) // 8]
            for b in range(count // 8):
                byte = row[b]
                for q in range(8):
                    acc[8 * b + q] += ri if (byte >> q) & 1 else -ri
            for j in range(count // 8 * 8, count):
                acc[j] += ri if (row[j >> 3] >> (j & 7)) & 1 else -ri
    for j in range(d):
        out[j] /= cohort


# Bit q of a byte as the byte q of a word: eight coordinates are counted by one addition, 255 rows at a time.
_SPREAD = np.array([sum(1 << (8 * q) for q in range(8) if (b >> q) & 1) for b in range(256)], np.uint64)


@njit(cache=True, nogil=True)
def _count_bits(payload, spread, counts):
    """counts (8 b,) int32: how many rows have each bit set."""
    width = payload.shape[1]
    tile = np.empty(TILE // 8, np.uint64)
    bytes_ = tile.view(np.uint8)
    for lo in range(0, width, TILE // 8):
        size = min(TILE // 8, width - lo)
        acc = counts[8 * lo : 8 * (lo + size)]
        acc[:] = 0
        for first in range(0, payload.shape[0], 255):
            tile[:] = 0
            for i in range(first, min(first + 255, payload.shape[0])):
                for b in range(size):
                    tile[b] += spread[payload[i, lo + b]]
            for j in range(8 * size):
                acc[j] += bytes_[j]


def mean_bits(payload: Tensor, r: Tensor, d: int, cohort: int) -> Tensor:
    scales = r.numpy()
    # With one scale a sum of ±r is r (2 count - m), exact in float64: counting gives the very bits of adding in order.
    if len(scales) and scales[0] > 0 and (scales == scales[0]).all():
        counts = np.empty(8 * payload.shape[1], np.int32)
        _count_bits(payload.numpy(), _SPREAD, counts)
        return torch.from_numpy(np.float64(scales[0]) * (2 * counts[:d] - np.int32(len(payload))) / cohort)
    out = np.empty(d)
    _mean_bits(payload.numpy(), scales, out, cohort)
    return torch.from_numpy(out)
