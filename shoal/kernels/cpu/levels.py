"""Stochastic rounding to a few points a coordinate: from floats to packed bytes, and back, without a stop in memory."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from shoal.kernels.cpu.bits import NO_SHIFTS, V, cell_scale
from shoal.kernels.cpu.buffers import ready
from shoal.kernels.cpu.codes import ROOM, SPAN, TRITS, pack_tile, put_four, room
from shoal.kernels.cpu.lanes import cells_256
from shoal.kernels.cpu.philox import copy, fill_halves, key, place_row, shift_rows, word
from shoal.kernels.cpu.tables import decode_table, mean_table
from shoal.kernels.cpu.threads import LEAST, spread
from shoal.kernels.draw import Draw

NARROW = 1 << 15  # (levels - 1) strata below which a coordinate's 16-bit cell and all sums with it fit an int32


@njit
def _strata(x, h, code, shift, spot, lift, s, reach, strata):
    """The same where U lies in the stratum spot + shift_j: code = floor((cell + strata - 1 - place) / strata)."""
    ties, base, inverse = 0, np.int32(reach) + np.int32(65535), np.float32(1) / np.float32(strata)
    for j in range(x.size):
        p = np.int32(spot + shift[j])
        p = np.int32(p - strata) if p >= strata else p
        z = (x[j] * lift) * s
        z = min(max(z, -reach), reach)
        q = np.int32(np.int32(np.floor(z)) + base - h[j])
        # cell < 2^16: half of 1/strata away from an integer, the product's rounding cannot reach it.
        cell = np.float32(np.int32((q >> 16) + (strata - 1 - p))) + np.float32(0.5)
        code[j] = np.uint16(np.int32(cell * inverse))
        ties += (q & 65535) == 65535
    return ties


@njit
def _wide(x, h, code, shift, spot, lift, s, levels, strata):
    """The same in 64 bits, for any number of strata."""
    ties, base, width = 0, (levels - 1) * strata * 32768, strata * 65536
    for j in range(x.size):
        p = spot + np.int64(shift[j])
        p = p - strata if p >= strata else p
        y = np.int64(np.floor((x[j] * lift) * s)) + base
        whole = y // width
        t = y - whole * width - (p << 16)
        ties += h[j] == t
        code[j] = np.uint16(min(max(whole + np.int64(h[j] < t), 0), levels - 1))
    return ties


@njit
def _settle(x, h, code, lo, shift, spot, lift, s, levels, strata, slot, index, tie, k0, k1):
    """Decide the coordinates that tie by their second word."""
    base, width = (levels - 1) * strata * 32768, strata * 65536
    for j in range(x.size):
        p = 0 if strata == 1 else (spot + np.int64(shift[j])) % strata
        z = (x[j] * lift) * s
        cell = np.floor(z)
        y = np.int64(cell) + base
        whole = y // width
        if h[j] == y - whole * width - (p << 16):
            up = np.float32(word(lo + j, slot, index, tie, k0, k1) >> np.uint64(8)) * V < z - cell
            code[j] = np.uint16(min(max(whole + np.int64(up), 0), levels - 1))


@njit
def _cells(x, h, code, lo, lift, s, levels, slot, index, stream, tie, k0, k1, pad):
    """One stratum: codes from registers, 256 at a time; where one of these ties, all of them are looked at again."""
    draw, reach = (slot, index, stream, k0, k1), np.float32((levels - 1) * 32768)
    for j in range(0, x.size, 256):
        row, at, count = x, j, min(256, x.size - j)
        if count < 256:
            copy(x[j:], pad)
            row, at = pad, 0
        if cells_256(row, at, lift, s, reach, code, j, np.uint64((lo + j) // 8), draw):
            fill_halves(h[:256], (lo + j) // 128, slot, index, stream, k0, k1)
            some = code[j : j + count]
            _settle(x[j : j + count], h, some, lo + j, NO_SHIFTS, 0, lift, s, levels, 1, slot, index, tie, k0, k1)


@njit(cache=True, nogil=True)
def _encode_levels(u, r, out, start, slots, index, stream, tie, k0, k1, levels, strata, place, shifts, bits, low, high):
    """Tiles low..high-1 of all rows."""
    d = u.shape[1]
    tiles, steps = (d + SPAN - 1) // SPAN, (levels - 1) * strata
    h, code, buffer = np.empty(SPAN, np.int32), np.empty(SPAN, np.uint16), np.empty(ROOM, np.uint8)
    pad, scales = np.zeros(256, np.float32), r.view(np.uint32)
    for t in range(low, high):
        i, lo = t // tiles, t % tiles * SPAN
        count, slot, spot = min(SPAN, d - lo), np.uint64(slots[i]), np.int64(place[i])
        x, shift = u[i, lo : lo + count], shifts[lo : lo + count]
        lift, s = cell_scale(r[i], steps)
        if start and lo == 0:
            put_four(out[i], 0, scales[i])
        if strata == 1 and steps < NARROW:
            _cells(x, h, code, lo, lift, s, levels, slot, index, stream, tie, k0, k1, pad)
        else:
            fill_halves(h[: (count + 127) // 128 * 128], lo // 128, slot, index, stream, k0, k1)
            if steps < NARROW:
                ties = _strata(x, h, code, shift, np.int32(spot), lift, s, np.float32(steps * 32768), np.int32(strata))
            else:
                ties = _wide(x, h, code, shift, spot, lift, s, levels, strata)
            if ties:
                _settle(x, h, code, lo, shift, spot, lift, s, levels, strata, slot, index, tie, k0, k1)
        at = start + room(lo, bits)
        pack_tile(code, count, out[i, at : at + room(count, bits)], buffer, bits)


def _encoded(
    u: Tensor, r: Tensor, private: Draw, tie: Draw, levels: int, bits: int, strata: int, place: np.ndarray,
    shifts: np.ndarray, start: int,
) -> Tensor:  # fmt: skip
    m, d = u.shape
    out = ready((m, start + room(d, bits)), np.uint8)
    index, stream, k0, k1 = key(private)
    head = (u.numpy(), r.numpy(), out, start, private.slots.numpy(), index, stream, np.uint64(tie.stream), k0, k1)
    tail = (levels, strata, place, shifts, bits)
    spread(_encode_levels, (*head, *tail), m * -(-d // SPAN), least=LEAST // SPAN)
    return torch.from_numpy(out)


def encode_levels(
    u: Tensor,
    r: Tensor,
    private: Draw,
    tie: Draw,
    levels: int,
    strata: int = 1,
    place: Tensor | Draw | None = None,
    shifts: Tensor | Draw | None = None,
    head: bool = False,
) -> Tensor:
    (m, d), shift = u.shape, NO_SHIFTS
    if isinstance(shifts, Draw):
        shift = shift_rows(shifts, d, strata)[0]
    elif strata > 1:
        shift = np.zeros(d, np.int32) if shifts is None else shifts.numpy().reshape(-1)
    if isinstance(place, Draw):
        spot = place_row(place, strata, private.slots.numpy())
    else:
        spot = np.zeros(m, np.int64) if place is None else place.numpy()
    return _encoded(u, r, private, tie, levels, (levels - 1).bit_length(), strata, spot, shift, 4 if head else 0)


@njit(cache=True, nogil=True)
def _level_values(r, levels, codes, out):
    for i in range(out.shape[0]):
        for k in range(out.shape[1]):
            c = k % codes
            v = np.float64(r[i]) * np.float64(2 * c - (levels - 1)) / np.float64(levels - 1)
            out[i, k] = v if c < levels else np.nan


def _values(r: Tensor, levels: int, bits: int, dtype: type) -> np.ndarray:
    """The numbers of all codes, as `decode_table` has them: NaN for what no encoder writes; none where it is long."""
    codes = 4 if bits == TRITS else 1 << bits
    out = np.empty((len(r), 0 if bits > 8 else max(codes, 16)), dtype)
    _level_values(r.numpy(), levels, codes, out)
    return out


def decode_levels(payload: Tensor, r: Tensor, levels: int, d: int) -> tuple[Tensor, bool]:
    bits = (levels - 1).bit_length()
    return decode_table(payload, r.numpy(), _values(r, levels, bits, np.float32), bits, levels, d)


def mean_levels(payload: Tensor, r: Tensor, levels: int, d: int, cohort: int) -> tuple[Tensor, bool]:
    bits = (levels - 1).bit_length()
    return mean_table(payload, r.numpy(), _values(r, levels, bits, np.float64), bits, levels, d, cohort)


def encode_trits(u: Tensor, r: Tensor, private: Draw, tie: Draw) -> Tensor:
    place = np.zeros(len(u), np.int64)
    return _encoded(u, r, private, tie, 3, TRITS, 1, place, NO_SHIFTS, 4)


def decode_trits(payload: Tensor, r: Tensor, d: int) -> tuple[Tensor, bool]:
    return decode_table(payload, r.numpy(), _values(r, 3, TRITS, np.float32), TRITS, 3, d)


def mean_trits(payload: Tensor, r: Tensor, d: int, cohort: int) -> tuple[Tensor, bool]:
    return mean_table(payload, r.numpy(), _values(r, 3, TRITS, np.float64), TRITS, 3, d, cohort)
