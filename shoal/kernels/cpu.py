"""The kernels of `reference`, compiled by numba: same names, same arguments, same bytes.

Every compiled function is at module level (numba finds only those again in its cache), serial, and releases the
interpreter lock; whoever wants more cores runs more threads or processes. No fastmath: results are defined bit for
bit. Philox runs in 64-bit lanes, where one multiplication yields both halves of the 32 x 32 product.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import njit
from torch import Tensor

from shoal.kernels.draw import Draw
from shoal.kernels.reference import LANES, LIFT, TINY

TILE = 1024  # coordinates a pass: their random words and flags stay in the first-level cache
_LOW, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_HALF = np.uint64(0xFFFF)
_V = np.float32(2.0**-24)
_MAGIC, _TOP = np.uint64(0x0102040810204080), np.uint64(56)


# ------------------------------------------------------------------------------------------------ random words
@njit(inline="always")
def _philox(c0, c1, c2, c3, k0, k1):
    for _ in range(10):
        p0 = _M0 * c0
        p1 = _M1 * c2
        c0, c1, c2, c3 = (p1 >> _SHIFT) ^ c1 ^ k0, p1 & _LOW, (p0 >> _SHIFT) ^ c3 ^ k1, p0 & _LOW
        k0 = (k0 + _W0) & _LOW
        k1 = (k1 + _W1) & _LOW
    return c0, c1, c2, c3


@njit(inline="always")
def _fill_words(out, block, slot, index, stream, k0, k1):
    """out (64 b) uint32: the words of whole blocks of 64 coordinates, from `block` on."""
    for b in range(out.size // 64):
        for lane in range(16):
            c = np.uint64((block + b) * 16 + lane)
            w0, w1, w2, w3 = _philox(c, slot, index, stream, k0, k1)
            out[64 * b + lane] = np.uint32(w0)
            out[64 * b + 16 + lane] = np.uint32(w1)
            out[64 * b + 32 + lane] = np.uint32(w2)
            out[64 * b + 48 + lane] = np.uint32(w3)


@njit(inline="always")
def _fill_halves(out, block, slot, index, stream, k0, k1):
    """out (128 b) int32: the 16-bit halves of whole blocks of 128 coordinates, from `block` on."""
    for b in range(out.size // 128):
        for lane in range(16):
            c = np.uint64((block + b) * 16 + lane)
            w0, w1, w2, w3 = _philox(c, slot, index, stream, k0, k1)
            at = 128 * b + lane
            out[at] = np.int32(w0 & _HALF)
            out[at + 16] = np.int32(w0 >> np.uint64(16))
            out[at + 32] = np.int32(w1 & _HALF)
            out[at + 48] = np.int32(w1 >> np.uint64(16))
            out[at + 64] = np.int32(w2 & _HALF)
            out[at + 80] = np.int32(w2 >> np.uint64(16))
            out[at + 96] = np.int32(w3 & _HALF)
            out[at + 112] = np.int32(w3 >> np.uint64(16))


@njit(inline="always")
def _word(j, slot, index, stream, k0, k1):
    """Word j of a stream alone: what a tie asks for."""
    w0, w1, w2, w3 = _philox(np.uint64((j // 64) * 16 + j % 16), slot, index, stream, k0, k1)
    w = (j % 64) // 16
    if w == 0:
        return w0
    if w == 1:
        return w1
    return w2 if w == 2 else w3


@njit(cache=True, nogil=True)
def _words(out, slots, index, stream, k0, k1):
    d = out.shape[1]
    tile = np.empty(TILE, np.uint32)
    for i in range(out.shape[0]):
        for lo in range(0, d, TILE):
            count = min(TILE, d - lo)
            slot = np.uint64(slots[i])
            if count % 64 == 0:
                _fill_words(out[i, lo : lo + count], lo // 64, slot, index, stream, k0, k1)
            else:
                _fill_words(tile[: (count + 63) // 64 * 64], lo // 64, slot, index, stream, k0, k1)
                for j in range(count):
                    out[i, lo + j] = tile[j]


@njit(cache=True, nogil=True)
def _halves(out, slots, index, stream, k0, k1):
    d = out.shape[1]
    tile = np.empty(TILE, np.int32)
    for i in range(out.shape[0]):
        for lo in range(0, d, TILE):
            count = min(TILE, d - lo)
            _fill_halves(tile[: (count + 127) // 128 * 128], lo // 128, np.uint64(slots[i]), index, stream, k0, k1)
            for j in range(count):
                out[i, lo + j] = np.uint16(tile[j])


def _key(draw: Draw) -> tuple[np.uint64, np.uint64, np.uint64, np.uint64]:
    """(round, stream, key low, key high) as the compiled loops take them."""
    return (
        np.uint64(draw.round & 0xFFFFFFFF),
        np.uint64(draw.stream),
        np.uint64(draw.seed & 0xFFFFFFFF),
        np.uint64(draw.seed >> 32),
    )


def words(draw: Draw, d: int) -> Tensor:
    out = np.empty((len(draw.slots), d), np.uint32)
    _words(out, draw.slots.numpy(), *_key(draw))
    return torch.from_numpy(out)


def halves(draw: Draw, d: int) -> Tensor:
    out = np.empty((len(draw.slots), d), np.uint16)
    _halves(out, draw.slots.numpy(), *_key(draw))
    return torch.from_numpy(out)


@njit(cache=True, nogil=True)
def _permutation(out, w):
    for t in range(out.size):
        out[t] = t
    for t in range(out.size - 1, 0, -1):
        j = np.int64((np.uint64(w[t]) * np.uint64(t + 1)) >> _SHIFT)
        out[t], out[j] = out[j], out[t]


def permutation(draw: Draw, d: int) -> Tensor:
    out = np.empty(d, np.int64)
    _permutation(out, words(draw, d).numpy()[0])
    return torch.from_numpy(out)


@njit(cache=True, nogil=True)
def _support(out, w, d):
    m, k = out.shape
    taken = np.zeros(d, np.bool_)
    for i in range(m):
        for c in range(k):
            t = d - k + c
            j = np.int64((np.uint64(w[i, c]) * np.uint64(t + 1)) >> _SHIFT)
            if taken[j]:
                j = t
            taken[j] = True
            out[i, c] = j
        if 16 * k >= d:  # dense enough that reading all flags in order is cheaper than sorting
            c = 0
            for j in range(d):
                if taken[j]:
                    out[i, c] = j
                    taken[j] = False
                    c += 1
        else:
            for c in range(k):
                taken[out[i, c]] = False
            out[i].sort()


def support(draw: Draw, d: int, k: int) -> Tensor:
    out = np.empty((len(draw.slots), k), np.int64)
    _support(out, words(draw, k).numpy(), d)
    return torch.from_numpy(out)


# ------------------------------------------------------------------------------------------------ sums and scales
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


# ------------------------------------------------------------------------------------------------ stochastic rounding
@njit(inline="always")
def _scale(r, steps):
    """(lift, s) with cell = floor((u lift) s): see reference._cells."""
    if r == np.float32(0):
        return np.float32(1), np.float32(0)
    lift = LIFT if r < TINY else np.float32(1)
    return lift, np.float32(steps * 32768) / (r * lift)


@njit(inline="always")
def _pack_flags(flags, out):
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
        lift, s = _scale(r[i], strata)
        base, spot = strata * 32768, np.int64(place[i])
        for lo in range(0, d, TILE):
            count = min(TILE, d - lo)
            _fill_halves(h[: (count + 127) // 128 * 128], lo // 128, slot, index, stream, k0, k1)
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
                        v = np.float32(_word(lo + j, slot, index, tie, k0, k1) >> np.uint64(8)) * _V
                        flags[j] = v < z - cell
            flags[count : (count + 7) // 8 * 8] = 0
            _pack_flags(flags[: (count + 7) // 8 * 8], out[i, lo // 8 : (lo + count + 7) // 8])


_NO_SHIFTS = np.zeros(0, np.int32)


def encode_bits(
    u: Tensor, r: Tensor, private: Draw, tie: Draw, strata: int, place: Tensor, shifts: Tensor | None
) -> Tensor:
    out = np.empty((len(u), (u.shape[1] + 7) // 8), np.uint8)
    index, stream, k0, k1 = _key(private)
    shift = _NO_SHIFTS if shifts is None else shifts.numpy().reshape(-1)
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


@njit(cache=True, nogil=True)
def _encode_levels(u, r, out, slots, index, stream, tie, k0, k1, levels, strata, place, shifts):
    m, d = u.shape
    h = np.empty(TILE, np.int32)
    base, width = (levels - 1) * strata * 32768, strata * 65536
    for i in range(m):
        slot, spot = np.uint64(slots[i]), np.int64(place[i])
        lift, s = _scale(r[i], (levels - 1) * strata)
        for lo in range(0, d, TILE):
            count = min(TILE, d - lo)
            _fill_halves(h[: (count + 127) // 128 * 128], lo // 128, slot, index, stream, k0, k1)
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
                        up = np.float32(_word(lo + j, slot, index, tie, k0, k1) >> np.uint64(8)) * _V < z - cell
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
    index, stream, k0, k1 = _key(private)
    shift = _NO_SHIFTS if shifts is None else shifts.numpy().reshape(-1)
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


# ------------------------------------------------------------------------------------------------ bit streams
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


# ------------------------------------------------------------------------------------------------ sparse rows
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


# ------------------------------------------------------------------------------------------------ pointwise codes
@njit(cache=True, nogil=True)
def _mean_abs(u, out):
    for i in range(u.shape[0]):
        lanes = np.zeros(LANES)
        row = u[i]
        whole = row.size // LANES * LANES
        for lo in range(0, whole, LANES):
            for lane in range(LANES):
                lanes[lane] += abs(np.float64(row[lo + lane]))
        for j in range(whole, row.size):
            lanes[j - whole] += abs(np.float64(row[j]))
        total = lanes[0]
        for lane in range(1, LANES):
            total += lanes[lane]
        out[i] = np.float32(total / row.size)


def mean_abs(u: Tensor) -> Tensor:
    out = np.empty(len(u), np.float32)
    _mean_abs(u.numpy(), out)
    return torch.from_numpy(out)


@njit(cache=True, nogil=True)
def _sign_bits(u, out):
    d = u.shape[1]
    flags = np.zeros(TILE, np.uint8)
    for i in range(u.shape[0]):
        for lo in range(0, d, TILE):
            count = min(TILE, d - lo)
            for j in range(count):
                flags[j] = u[i, lo + j] >= np.float32(0)
            flags[count : (count + 7) // 8 * 8] = 0
            _pack_flags(flags[: (count + 7) // 8 * 8], out[i, lo // 8 : (lo + count + 7) // 8])


def sign_bits(u: Tensor) -> Tensor:
    out = np.empty((len(u), (u.shape[1] + 7) // 8), np.uint8)
    _sign_bits(u.numpy(), out)
    return torch.from_numpy(out)


@njit(cache=True, nogil=True)
def _pack_trits(code, out):
    d = code.shape[1]
    for i in range(code.shape[0]):
        for b in range(d // 5):
            c = code[i, 5 * b : 5 * b + 5]
            out[i, b] = np.uint8(c[0] + 3 * c[1] + 9 * c[2] + 27 * c[3] + 81 * c[4])
        if d % 5:
            byte = 0
            for j in range(d - 1, d // 5 * 5 - 1, -1):
                byte = 3 * byte + code[i, j]
            out[i, d // 5] = np.uint8(byte)


def pack_trits(code: Tensor) -> Tensor:
    out = np.empty((len(code), (code.shape[1] + 4) // 5), np.uint8)
    _pack_trits(code.numpy(), out)
    return torch.from_numpy(out)


@njit(cache=True, nogil=True)
def _unpack_trits(payload, out):
    d = out.shape[1]
    for i in range(out.shape[0]):
        for b in range((d + 4) // 5):
            byte = np.uint32(payload[i, b])
            for j in range(5 * b, min(5 * b + 5, d)):
                out[i, j] = byte % np.uint32(3)
                byte //= np.uint32(3)


def unpack_trits(payload: Tensor, count: int) -> Tensor:
    out = np.empty((len(payload), count), np.int64)
    _unpack_trits(payload.numpy(), out)
    return torch.from_numpy(out)


@njit(cache=True, nogil=True)
def _encode_natural(bits, out, slots, index, stream, k0, k1):
    d = bits.shape[1]
    tile = np.empty(TILE, np.uint32)
    for i in range(bits.shape[0]):
        for lo in range(0, d, TILE):
            count = min(TILE, d - lo)
            _fill_words(tile[: (count + 63) // 64 * 64], lo // 64, np.uint64(slots[i]), index, stream, k0, k1)
            for j in range(count):
                b = np.int64(bits[i, lo + j])
                exponent = ((b & 0x7FFFFFFF) + (np.int64(tile[j]) >> 9)) >> 23
                out[i, lo + j] = exponent | ((b >> 31) << 8)


def encode_natural(u: Tensor, private: Draw) -> Tensor:
    code = np.empty(u.shape, np.int64)
    _encode_natural(u.numpy().view(np.uint32), code, private.slots.numpy(), *_key(private))
    return pack(torch.from_numpy(code), 9)


@njit(cache=True, nogil=True)
def _decode_natural(code, out):
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            c = np.uint32(code[i, j])
            out[i, j] = ((c & np.uint32(255)) << np.uint32(23)) | ((c >> np.uint32(8)) << np.uint32(31))


def decode_natural(code: Tensor) -> Tensor:
    out = np.empty(code.shape, np.uint32)
    _decode_natural(code.numpy(), out)
    return torch.from_numpy(out.view(np.float32))


_MANTISSA = (1 << 52) - 1


@njit(cache=True, nogil=True)
def _encode_natural_levels(u, r, out, slots, index, stream, k0, k1, levels, top):
    d = u.shape[1]
    tile, t = np.empty(TILE, np.uint32), np.empty(TILE)
    bits = t.view(np.int64)
    for i in range(u.shape[0]):
        ri = np.float64(r[i])
        for lo in range(0, d, TILE):
            count = min(TILE, d - lo)
            _fill_words(tile[: (count + 63) // 64 * 64], lo // 64, np.uint64(slots[i]), index, stream, k0, k1)
            x = u[i, lo : lo + count]
            for j in range(count):
                t[j] = abs(np.float64(x[j])) * top / ri if ri > 0.0 else 0.0
            for j in range(count):
                exponent = max((bits[j] >> 52) - 1022, 0)  # frexp's, by the bits of a float64 that is never denormal
                frac = np.float64(bits[j] & _MANTISSA) * 2.0**-52 if exponent > 0 else t[j]
                up = np.int64((np.float64(tile[j]) + 0.5) * 2.0**-32 < frac)
                level = min(exponent + up, levels)
                out[i, lo + j] = levels - level if x[j] < np.float32(0) else levels + level


def encode_natural_levels(u: Tensor, r: Tensor, private: Draw, levels: int) -> Tensor:
    code = np.empty(u.shape, np.int64)
    top = 2.0 ** (levels - 1)
    _encode_natural_levels(u.numpy(), r.numpy(), code, private.slots.numpy(), *_key(private), levels, top)
    return pack(torch.from_numpy(code), (2 * levels).bit_length())


@njit(cache=True, nogil=True)
def _decode_natural_levels(code, r, table, out, levels):
    for i in range(out.shape[0]):
        ri = np.float64(r[i])
        for j in range(out.shape[1]):
            level = code[i, j] - levels
            value = np.float32(table[abs(level)] * ri)
            out[i, j] = -value if level < 0 else value


def decode_natural_levels(code: Tensor, r: Tensor, levels: int) -> Tensor:
    out = np.empty(code.shape, np.float32)
    table = np.array([0.0] + [2.0 ** (level - levels) for level in range(1, levels + 1)])
    _decode_natural_levels(code.numpy(), r.numpy(), table, out, levels)
    return torch.from_numpy(out)


# ------------------------------------------------------------------------------------------------ rotations
BLOCK = 4096  # coordinates whose butterflies are done while they stay in the first-level cache: 16 KiB
COLUMNS = 128  # coordinates that are gathered from every block for the longer strides


@njit(cache=True, nogil=True)
def _rademacher(words, out):
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            out[i, j] = np.float32(1) - np.float32(2) * np.float32((words[i, j >> 5] >> np.uint32(j & 31)) & 1)


def rademacher(draw: Draw, d: int) -> Tensor:
    out = np.empty((len(draw.slots), d), np.float32)
    _rademacher(words(draw, -(-d // 32)).numpy(), out)
    return torch.from_numpy(out)


@njit(inline="always")
def _eights(x, u, scale):
    """x = scale u after the strides 1, 2 and 4."""
    for o in range(0, x.size, 8):
        a0, a1, a2, a3 = u[o] * scale, u[o + 1] * scale, u[o + 2] * scale, u[o + 3] * scale
        a4, a5, a6, a7 = u[o + 4] * scale, u[o + 5] * scale, u[o + 6] * scale, u[o + 7] * scale
        b0, b1, b2, b3 = a0 + a1, a0 - a1, a2 + a3, a2 - a3
        b4, b5, b6, b7 = a4 + a5, a4 - a5, a6 + a7, a6 - a7
        c0, c1, c2, c3 = b0 + b2, b1 + b3, b0 - b2, b1 - b3
        c4, c5, c6, c7 = b4 + b6, b5 + b7, b4 - b6, b5 - b7
        x[o], x[o + 1], x[o + 2], x[o + 3] = c0 + c4, c1 + c5, c2 + c6, c3 + c7
        x[o + 4], x[o + 5], x[o + 6], x[o + 7] = c0 - c4, c1 - c5, c2 - c6, c3 - c7


@njit(inline="always")
def _stages(x, stride):
    """The stages with strides stride, 2 stride, ... of x, in place: two at a time, so that x is read half as often."""
    while 2 * stride < x.size:
        for lo in range(0, x.size, 4 * stride):
            a, b = x[lo : lo + stride], x[lo + stride : lo + 2 * stride]
            c, e = x[lo + 2 * stride : lo + 3 * stride], x[lo + 3 * stride : lo + 4 * stride]
            for j in range(stride):
                p, q, r, s = a[j] + b[j], a[j] - b[j], c[j] + e[j], c[j] - e[j]
                a[j], b[j], c[j], e[j] = p + r, q + s, p - r, q - s
        stride *= 4
    if stride < x.size:
        a, b = x[:stride], x[stride:]
        for j in range(stride):
            p, q = a[j], b[j]
            a[j], b[j] = p + q, p - q


@njit(cache=True, nogil=True)
def _hadamard(u, out, scale):
    m, d = u.shape
    block = min(d, BLOCK)
    across = d // block
    held = np.empty(across * COLUMNS, np.float32)
    for i in range(m):
        for lo in range(0, d, block):
            x = out[i, lo : lo + block]
            if d >= 8:
                _eights(x, u[i, lo : lo + block], scale)
                _stages(x, 8)
            else:
                for j in range(d):
                    x[j] = u[i, j] * scale
                _stages(x, 1)
        if across > 1:
            for column in range(0, block, COLUMNS):
                for b in range(across):
                    x, y = out[i, b * block + column :], held[b * COLUMNS : (b + 1) * COLUMNS]
                    for j in range(COLUMNS):
                        y[j] = x[j]
                _stages(held, COLUMNS)
                for b in range(across):
                    x, y = out[i, b * block + column :], held[b * COLUMNS : (b + 1) * COLUMNS]
                    for j in range(COLUMNS):
                        x[j] = y[j]


def hadamard(u: Tensor) -> Tensor:
    out = torch.empty(u.shape)
    _hadamard(u.numpy(), out.numpy(), np.float32(u.shape[1] ** -0.5))
    return out


@njit(cache=True, nogil=True)
def _dots(u, v, out):
    for i in range(u.shape[0]):
        lanes = np.zeros(LANES)
        for j in range(u.shape[1]):
            lanes[j % LANES] += np.float64(u[i, j]) * np.float64(v[i, j])
        total = lanes[0]
        for lane in range(1, LANES):
            total += lanes[lane]
        out[i] = total


def dots(u: Tensor, v: Tensor) -> Tensor:
    out = np.empty(len(u))
    _dots(u.numpy(), v.numpy(), out)
    return torch.from_numpy(out)
