"""Stochastic rounding to one bit a coordinate, and its means."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from shoal.kernels.cpu.buffers import ready
from shoal.kernels.cpu.codes import put_four, take_four
from shoal.kernels.cpu.lanes import (
    MOST_COUNTED,
    MOST_STRATA,
    PLANES,
    add_signs_64,
    bits_256,
    count_1,
    count_8,
    count_512,
    far_signs_64,
    named_512,
    signs_64,
    strata_256,
)
from shoal.kernels.cpu.philox import (
    TILE,
    copy,
    fill_below,
    fill_halves,
    fill_shifts,
    key,
    place_row,
    shared_key,
    unsigned,
    word,
)
from shoal.kernels.cpu.sums import top_of
from shoal.kernels.cpu.threads import LEAST, spread
from shoal.kernels.cpu.vectors import beyond_caches, expect, fence
from shoal.kernels.draw import Draw
from shoal.kernels.reference.bits import LIFT, TINY
from shoal.kernels.reference.philox import FEW_STRATA

V = np.float32(2.0**-24)
WIDE = 4 * TILE  # coordinates that share a pass of shifts: 16 KiB, and a row's turn costs as much as some hundred bits
MANY = 1 << 19  # coordinates from which on rows are foreseen: a third less time where they come from memory
AHEAD = 512  # bytes of a row that are on their way while 64 are counted: of so many rows, none is foreseen
MOST = float(np.finfo(np.float32).max)
_MAGIC, _TOP = np.uint64(0x0102040810204080), np.uint64(56)


@njit(inline="always")
def cell_scale(r, steps):
    """(lift, s) with cell = floor((u lift) s): see reference.bits.cells."""
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
def _settled(x, r, strata, spot, shift, at, private, tie, out):
    """out = the bits of x, coordinates at, at + 1, ..., by the definition: for ties, and for unusual rows."""
    slot, index, stream, k0, k1 = private
    count, width = x.size, out.size
    h = np.empty((count + 127) // 128 * 128, np.int32)
    flags = np.zeros(8 * width, np.uint8)
    fill_halves(h, at // 128, slot, index, stream, k0, k1)
    lift, s = cell_scale(r, strata)
    base = strata * 32768
    for j in range(count):
        p = (spot + np.int64(shift[j])) % strata if strata > 1 else np.int64(0)
        z = (x[j] * lift) * s
        cell = np.floor(z)
        t = np.int64(cell) + (base - (p << 16))
        flags[j] = h[j] < t
        if h[j] == t:
            v = np.float32(word(at + j, slot, index, tie, k0, k1) >> np.uint64(8)) * V
            flags[j] = v < z - cell
    pack_flags(flags, out)


@njit(cache=True, nogil=True)
def _row(x, r, strata, spot, shift, at, private, tie, out, pad, sent):
    """The bits of one row's coordinates at, ..., at + x.size - 1 (a tile, or its beginning)."""
    lift, s = cell_scale(r, strata)
    if lift != np.float32(1) or strata > MOST_STRATA:
        _settled(x, r, strata, spot, shift, at, private, tie, out)
        return
    whole = x.size // 256 * 256
    place, n = np.int32(spot), np.int32(strata)
    for j in range(0, whole, 256):
        counter = np.uint64((at + j) // 8)
        if strata == 1:
            tied = bits_256(x, j, s, out, j // 8, counter, private)
        else:
            tied = strata_256(x, j, s, out, j // 8, counter, private, shift, j, place, n)
        if tied:
            _settled(x[j : j + 256], r, strata, spot, shift[j:], at + j, private, tie, out[j // 8 : j // 8 + 32])
    if whole == x.size:
        return
    rest, end = x.size - whole, out[whole // 8 :]
    copy(x[whole:], pad)
    counter = np.uint64((at + whole) // 8)
    if strata == 1:
        tied = bits_256(pad, 0, s, sent, 0, counter, private)
    else:
        tied = strata_256(pad, 0, s, sent, 0, counter, private, shift, whole, place, n)
    if tied:
        _settled(x[whole:], r, strata, spot, shift[whole:], at + whole, private, tie, end)
        return
    copy(sent[: end.size], end)
    if rest % 8:
        end[end.size - 1] &= np.uint8((1 << (rest % 8)) - 1)


@njit(inline="always")
def part(rows, long, lo, hi):
    """(lo, hi, first, last): coordinates lo..hi-1 of all rows if they are `long`, else all of rows lo..hi-1."""
    return (lo, hi, 0, rows.shape[0]) if long else (0, rows.shape[1], lo, hi)


@njit(cache=True, nogil=True)
def _encode_bits(u, r, out, start, slots, key, tie, strata, place, given, shared, watch, long, lo, hi):
    """A part as `part` has it. Tile by tile, so that shared shifts are drawn once for all rows.

    True if it is to watch, and an entry is larger than its row's scale or no number.
    """
    (lo, hi, first, last), beyond = part(u, long, lo, hi), False
    if first == last:
        return False
    index, stream, k0, k1 = key
    shift, scales = np.zeros(WIDE if strata > 1 else 1, np.int32), r.view(np.uint32)
    pad, sent, ties, row = np.zeros(256, np.float32), np.zeros(32, np.uint8), np.zeros(8, np.uint32), u[first]
    for at in range(lo, hi, WIDE):
        count = min(WIDE, hi - at)
        if strata > 1 and given.size:
            copy(given[at : at + count], shift)
        elif 1 < strata <= FEW_STRATA:
            for k in range(0, count, 256):
                for line in range(at + k, at + k + 256, 16):
                    expect(row, line)  # the row comes while shifts are drawn: a fifth less time where it is far
                fill_shifts(shift, k, at + k, shared, strata, ties)
        elif strata > 1:
            fill_below(shift[: (count + 63) // 64 * 64], at // 64, shared, strata)
        for i in range(first, last):
            private = (np.uint64(slots[i]), index, stream, k0, k1)
            if watch:
                beyond |= not top_of(u[i, at : at + count]) <= r[i]
            if start and at == 0:
                put_four(out[i], 0, scales[i])
            sends = out[i, start + at // 8 : start + (at + count + 7) // 8]
            _row(u[i, at : at + count], r[i], strata, place[i], shift, at, private, tie, sends, pad, sent)
    return beyond


def encode_bits(
    u: Tensor,
    r: Tensor,
    private: Draw,
    tie: Draw,
    strata: int,
    place: Tensor | Draw,
    shifts: Tensor | Draw | None,
    head: bool = False,
) -> Tensor:
    return _encoded(u, r, private, tie, strata, place, shifts, head, watch=False)[0]


def encode_within(
    u: Tensor, r: Tensor, private: Draw, tie: Draw, strata: int, place: Tensor | Draw, shifts: Tensor | Draw | None
) -> tuple[Tensor, bool]:
    return _encoded(u, r, private, tie, strata, place, shifts, head=False, watch=True)


def _encoded(
    u: Tensor, r: Tensor, private: Draw, tie: Draw, strata: int, place: Tensor | Draw, shifts: Tensor | Draw | None,
    head: bool, watch: bool,
) -> tuple[Tensor, bool]:  # fmt: skip
    (m, d), start, slots = u.shape, 4 if head else 0, private.slots.numpy()
    out = ready((m, start + (d + 7) // 8), np.uint8)
    given, shared = NO_SHIFTS, NO_DRAW
    if isinstance(shifts, Draw):
        shared = shared_key(shifts)
    elif strata > 1:
        given = np.zeros(d, np.int32) if shifts is None else shifts.numpy().reshape(-1)
    args = (
        u.numpy(), r.numpy(), out, start, slots, key(private), unsigned(tie.stream), strata,
        place_row(place, strata, slots) if isinstance(place, Draw) else place.numpy(), given, shared, watch,
    )  # fmt: skip
    beyond = share(_encode_bits, args, m, d)
    return torch.from_numpy(out), not beyond


NO_SHIFTS = np.zeros(0, np.int32)
NO_DRAW = (np.uint64(0),) * 5


def share(kernel: Any, args: tuple[Any, ...], m: int, d: int) -> bool:
    """kernel(*args, long, lo, hi) for parts of m rows of d coordinates: tiles of rows that are `long`, else rows.

    Whether one of the parts returns True.
    """
    if d < 2 * LEAST:
        return spread(kernel, (*args, False), m, least=LEAST // d)
    return spread(kernel, (*args, True), d, TILE)


@njit(cache=True, nogil=True)
def _read_scales(payload, gain, most, out):
    good, bits = True, out.view(np.uint32)
    for i in range(out.size):
        bits[i] = take_four(payload[i], 0)
        good &= out[i] >= np.float32(0) and np.float64(out[i]) * gain <= most
    return good


def read_scales(payload: Tensor, gain: float) -> tuple[Tensor, bool]:
    out = np.empty(len(payload), np.float32)
    good = _read_scales(payload.numpy(), gain, MOST, out)
    return torch.from_numpy(out), good


def _rows(payload: Tensor) -> np.ndarray:
    """Bytes of a row side by side; rows themselves may lie apart, as after a column slice."""
    return (payload if payload.stride(-1) == 1 else payload.contiguous()).numpy()


@njit(cache=True, nogil=True)
def _decode_bits(payload, r, out, long, lo, hi):
    lo, hi, first, last = part(out, long, lo, hi)
    for i in range(first, last):
        row, values = payload[i], out[i]
        whole = lo + (hi - lo) // 64 * 64
        if beyond_caches(out, values):
            for j in range(lo, whole, 64):
                far_signs_64(row, j // 8, r[i], values, j)
        else:
            for j in range(lo, whole, 64):
                signs_64(row, j // 8, r[i], values, j)
        for j in range(whole, hi):
            values[j] = r[i] if (row[j >> 3] >> (j & 7)) & 1 else -r[i]
    fence()


def decode_bits(payload: Tensor, r: Tensor, d: int) -> Tensor:
    m = len(payload)
    values = ready((m, d), np.float32)
    share(_decode_bits, (_rows(payload), r.numpy(), values), m, d)
    return torch.from_numpy(values)


@njit(cache=True, nogil=True)
def _mean_bits(payload, r, out, cohort, lo, hi):
    # Tile by tile, so that the sums of a tile stay in the first-level cache while all rows pass over it.
    total = np.empty(TILE)
    for at in range(lo, hi, TILE):
        count = min(TILE, hi - at)
        total[:] = 0.0
        for i in range(payload.shape[0]):
            ri, row = np.float64(r[i]), payload[i, at // 8 : (at + count + 7) // 8]
            whole = count // 64 * 64
            for j in range(0, whole, 64):
                add_signs_64(row, j // 8, ri, total, j)
            for j in range(whole, count):
                total[j] += ri if (row[j >> 3] >> (j & 7)) & 1 else -ri
        for j in range(count):
            out[at + j] = np.float32(total[j] / cohort)


@njit(cache=True, nogil=True)
def _few_bits(payload, r, cohort, out, lo, hi):
    """The mean of at most MOST_COUNTED rows with one scale: as many numbers as there are counts, looked up.

    The counts stand in planes, a bit of 512 counts in each, to which rows are added as carries are saved.
    """
    m, table = payload.shape[0], np.zeros(32, np.float32)
    planes, pad, room = np.zeros(8 * PLANES, np.uint64), np.zeros((m, 64), np.uint8), np.empty(512, np.float32)
    for c in range(m + 1):
        table[c] = np.float32((r * np.float64(2 * c - m)) / cohort)
    for at in range(lo, hi, 512):
        rows, byte, count, planes[:] = payload, at // 8, min(512, hi - at), 0
        if out.size >= MANY:
            for i in range(m):
                expect(payload[i], byte + AHEAD)
        if count < 512:
            for i in range(m):
                copy(payload[i, byte : (at + count + 7) // 8], pad[i])
            rows, byte = pad, 0
        for i in range(0, m - 7, 8):
            count_8(rows, i, byte, planes)
        for i in range(m // 8 * 8, m):
            count_1(rows, i, byte, planes)
        if count < 512:
            named_512(planes, table, room, 0)
            copy(room[:count], out[at:])
        else:
            named_512(planes, table, out, at)


@njit(cache=True, nogil=True)
def _factor(r, m, cohort):
    """r / cohort if (r c) / cohort and c (r / cohort) are one float32 for all sums c = -m, 2 - m, ..., m; else 0."""
    factor = r / cohort
    for c in range(-m, m + 1, 2):
        if np.float32((r * c) / cohort) != np.float32(c * factor):
            return 0.0
    return factor


@njit(cache=True, nogil=True)
def _weigh(counts, m, r, factor, cohort, out):
    if factor > 0.0:  # a division a coordinate would take as long as all the counting
        for j in range(out.size):
            out[j] = np.float32(np.float64(2 * np.int32(counts[j]) - np.int32(m)) * factor)
    else:
        for j in range(out.size):
            out[j] = np.float32((r * np.float64(2 * np.int32(counts[j]) - np.int32(m))) / cohort)


@njit(cache=True, nogil=True)
def _count_bits(payload, r, factor, cohort, out, lo, hi):
    """The mean of rows with one scale. Eight bits a coordinate count 255 rows at a time."""
    m = payload.shape[0]
    counts, total, pad = np.empty(512, np.uint8), np.empty(512, np.int32), np.zeros(64, np.uint8)
    for at in range(lo, hi, 512):
        count = min(512, hi - at)
        end = (at + count + 7) // 8
        if m > 255:
            total[:] = 0
        for first in range(0, m, 255):
            counts[:] = 0
            for i in range(first, min(first + 255, m)):
                if out.size >= MANY:
                    expect(payload[i], at // 8 + AHEAD)
                if count == 512:
                    count_512(payload[i], at // 8, counts)
                else:
                    copy(payload[i, at // 8 : end], pad)
                    count_512(pad, 0, counts)
            if m > 255:
                for j in range(512):
                    total[j] += counts[j]
        if m > 255:
            _weigh(total, m, r, factor, cohort, out[at : at + count])
        else:
            _weigh(counts, m, r, factor, cohort, out[at : at + count])


def mean_bits(payload: Tensor, r: Tensor, d: int, cohort: int) -> Tensor:
    scales, rows = r.numpy(), _rows(payload)
    mean, least = ready(d, np.float32), max(TILE, 4 * LEAST // max(len(scales), 4))
    # With one scale a sum of ±r is r (2 count - m), exact in float64: counting gives the very bits of adding in order.
    if len(scales) and scales[0] > 0 and (scales == scales[0]).all():
        one = float(scales[0])
        if len(scales) <= MOST_COUNTED:
            spread(_few_bits, (rows, one, cohort, mean), d, TILE, least)
            return torch.from_numpy(mean)
        factor = _factor(one, len(scales), cohort)
        spread(_count_bits, (rows, one, factor, cohort, mean), d, TILE, least)
    else:
        spread(_mean_bits, (rows, scales, mean, cohort), d, TILE, least)
    return torch.from_numpy(mean)
