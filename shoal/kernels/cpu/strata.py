"""Rounding in strata onto grids that start at an offset, one a coordinate."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from shoal.kernels.cpu.bits import V, cell_scale
from shoal.kernels.cpu.buffers import ready
from shoal.kernels.cpu.codes import ROOM, SPAN, pack_tile, put_four, room
from shoal.kernels.cpu.philox import fill_halves, half_rows, key, place_row, shift_rows, unsigned, word
from shoal.kernels.cpu.threads import LEAST, spread
from shoal.kernels.draw import Draw


@njit
def _codes(x, h, shift, offset, spot, lift, s, steps, strata, levels, code):
    """The codes of x but for the second word; how many coordinates tie."""
    base, width, ties = steps * 32768, strata * 65536, 0
    inverse = 1.0 / np.float64(width)
    for j in range(x.size):
        p = spot + np.int64(shift[j])
        p = p - strata if p >= strata else p
        y = np.int64(np.floor((x[j] * lift) * s)) + base + np.int64(offset[j])
        # The product may round to the integer beyond: what is left over says so.
        whole = np.int64(np.floor(np.float64(y) * inverse))
        left = y - whole * width
        over = np.int64(left >= width) - np.int64(left < 0)
        t = left - over * width - (p << 16)
        ties += h[j] == t
        code[j] = np.uint16(min(max(whole + over + np.int64(h[j] < t), 0), levels - 1))
    return ties


@njit
def _settle(x, h, code, lo, shift, offset, spot, lift, s, steps, strata, levels, slot, key, tie):
    """Decide the coordinates that tie by their second word."""
    base, width, (index, _, k0, k1) = steps * 32768, strata * 65536, key
    for j in range(x.size):
        z = (x[j] * lift) * s
        cell = np.floor(z)
        y = np.int64(cell) + base + np.int64(offset[j])
        whole = y // width
        if h[j] == y - whole * width - ((spot + np.int64(shift[j])) % strata << 16):
            up = np.float32(word(lo + j, slot, index, tie, k0, k1) >> np.uint64(8)) * V < z - cell
            code[j] = np.uint16(min(max(whole + np.int64(up), 0), levels - 1))


@njit(cache=True, nogil=True)
def _encode_strata(u, r, out, start, slots, key, tie, levels, strata, place, shifts, steps, offset, bits, low, high):
    """Tiles low..high-1 of all rows."""
    d, (index, stream, k0, k1), scales = u.shape[1], key, r.view(np.uint32)
    h, code, buffer = np.empty(SPAN, np.int32), np.empty(SPAN, np.uint16), np.empty(ROOM, np.uint8)
    tiles = (d + SPAN - 1) // SPAN
    for t in range(low, high):
        i, lo = t // tiles, t % tiles * SPAN
        count, slot, spot = min(SPAN, d - lo), np.uint64(slots[i]), np.int64(place[i])
        x, shift, begins = u[i, lo : lo + count], shifts[lo : lo + count], offset[lo : lo + count]
        lift, s = cell_scale(r[i], steps)
        if start and lo == 0:
            put_four(out[i], 0, scales[i])
        fill_halves(h[: (count + 127) // 128 * 128], lo // 128, slot, index, stream, k0, k1)
        if _codes(x, h, shift, begins, spot, lift, s, steps, strata, levels, code):
            _settle(x, h, code, lo, shift, begins, spot, lift, s, steps, strata, levels, slot, key, tie)
        at = start + room(lo, bits)
        pack_tile(code, count, out[i, at : at + room(count, bits)], buffer, bits)


def _offsets(offset: Tensor | Draw, d: int) -> np.ndarray:
    return half_rows(offset, d, np.int32)[0] if isinstance(offset, Draw) else offset.numpy()


def encode_strata(
    u: Tensor,
    r: Tensor,
    private: Draw,
    tie: Draw,
    levels: int,
    strata: int,
    place: Tensor | Draw,
    shifts: Tensor | Draw,
    steps: int,
    offset: Tensor | Draw,
    head: bool = False,
) -> Tensor:
    (m, d), bits, slots, start = u.shape, (levels - 1).bit_length(), private.slots.numpy(), 4 if head else 0
    out = ready((m, start + room(d, bits)), np.uint8)
    spot = place_row(place, strata, slots) if isinstance(place, Draw) else place.numpy()
    shift = shift_rows(shifts, d, strata)[0] if isinstance(shifts, Draw) else shifts.numpy().reshape(-1)
    rows = (u.numpy(), r.numpy(), out, start, slots, key(private), unsigned(tie.stream))
    args = (*rows, levels, strata, spot, shift, steps, _offsets(offset, d), bits)
    spread(_encode_strata, args, m * -(-d // SPAN), least=LEAST // SPAN)
    return torch.from_numpy(out)


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


def decode_strata(code: Tensor, r: Tensor, strata: int, steps: int, offset: Tensor | Draw) -> Tensor:
    out = ready(code.shape, np.float32)
    _decode_strata(code.numpy(), r.numpy(), out, strata, steps, _offsets(offset, code.shape[1]))
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


def mean_strata(code: Tensor, r: Tensor, strata: int, steps: int, offset: Tensor | Draw, cohort: int) -> Tensor:
    out = np.empty(code.shape[1])
    _mean_strata(code.numpy(), r.numpy(), out, strata, steps, _offsets(offset, code.shape[1]), cohort)
    return torch.from_numpy(out)
