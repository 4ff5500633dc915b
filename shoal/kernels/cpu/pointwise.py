"""Signs and powers of two."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from shoal.kernels.cpu.bits import pack_flags
from shoal.kernels.cpu.buffers import ready
from shoal.kernels.cpu.codes import ROOM, SPAN, bytes_of, pack_tile, room, unpack_tile
from shoal.kernels.cpu.philox import fill_words, key
from shoal.kernels.cpu.sums import added_lanes, block_sums
from shoal.kernels.cpu.tables import decode_table, mean_table
from shoal.kernels.cpu.threads import LEAST, spread
from shoal.kernels.draw import Draw
from shoal.kernels.reference.sums import LANES, SUM_BLOCK


@njit(cache=True, nogil=True)
def _abs_sums(u, blocks, out, lo, hi):
    for k in range(lo, hi):
        first = k % blocks * SUM_BLOCK
        block = u[k // blocks, first : min(first + SUM_BLOCK, u.shape[1])]
        lanes = np.zeros(LANES)
        whole = block.size // LANES * LANES
        for at in range(0, whole, LANES):
            for lane in range(LANES):
                lanes[lane] += abs(np.float64(block[at + lane]))
        for j in range(whole, block.size):
            lanes[j - whole] += abs(np.float64(block[j]))
        out[k] = added_lanes(lanes)


def mean_abs(u: Tensor) -> Tensor:
    sums = block_sums(_abs_sums, u.numpy())
    return torch.from_numpy((np.add.accumulate(sums, axis=1)[:, -1] / u.shape[1]).astype(np.float32))


@njit(cache=True, nogil=True)
def _sign_bits(u, out, low, high):
    d = u.shape[1]
    tiles, flags = (d + SPAN - 1) // SPAN, np.zeros(SPAN, np.uint8)
    for t in range(low, high):
        i, lo = t // tiles, t % tiles * SPAN
        count = min(SPAN, d - lo)
        x, size = u[i, lo : lo + count], (count + 7) // 8
        for j in range(count):
            flags[j] = x[j] >= np.float32(0)
        flags[count : 8 * size] = 0
        pack_flags(flags[: 8 * size], out[i, lo // 8 : lo // 8 + size])


def sign_bits(u: Tensor) -> Tensor:
    m, d = u.shape
    out = np.empty((m, (d + 7) // 8), np.uint8)
    spread(_sign_bits, (u.numpy(), out), m * -(-d // SPAN), least=LEAST // SPAN)
    return torch.from_numpy(out)


# ------------------------------------------------------------------------------------------------ powers of two
@njit
def _carried(bits, words, code):
    for j in range(bits.size):
        exponent = ((bits[j] & np.uint32(0x7FFFFFFF)) + (words[j] >> np.uint32(9))) >> np.uint32(23)
        code[j] = np.uint16(exponent | ((bits[j] >> np.uint32(31)) << np.uint32(8)))


@njit(cache=True, nogil=True)
def _encode_natural(bits, out, slots, index, stream, k0, k1, low, high):
    d = bits.shape[1]
    tiles = (d + SPAN - 1) // SPAN
    words, code, buffer = np.empty(SPAN, np.uint32), np.empty(SPAN, np.uint16), np.empty(ROOM, np.uint8)
    for t in range(low, high):
        i, lo = t // tiles, t % tiles * SPAN
        count, at = min(SPAN, d - lo), room(lo, 9)
        fill_words(words[: (count + 63) // 64 * 64], lo // 64, np.uint64(slots[i]), index, stream, k0, k1)
        _carried(bits[i, lo : lo + count], words, code)
        pack_tile(code, count, out[i, at : at + room(count, 9)], buffer, 9)


def encode_natural(u: Tensor, private: Draw) -> Tensor:
    m, d = u.shape
    out = ready((m, (9 * d + 7) // 8), np.uint8)
    args = (u.numpy().view(np.uint32), out, private.slots.numpy(), *key(private))
    spread(_encode_natural, args, m * -(-d // SPAN), least=LEAST // SPAN)
    return torch.from_numpy(out)


@njit
def _powers(row, code, buffer, out):
    """out: float32's bits of the powers of two; whether some exponent is 255."""
    unpack_tile(row, code, buffer, 9)
    bad = np.uint16(0)
    for j in range(out.size):
        bad |= ((code[j] & np.uint16(255)) + np.uint16(1)) & np.uint16(256)
        c = np.uint32(code[j])
        out[j] = ((c & np.uint32(255)) << np.uint32(23)) | ((c >> np.uint32(8)) << np.uint32(31))
    return bad != 0


@njit(cache=True, nogil=True)
def _decode_natural(flat, stride, out, low, high):
    d, bad = out.shape[1], False
    tiles, code, buffer = (d + SPAN - 1) // SPAN, np.empty(SPAN, np.uint16), np.empty(ROOM, np.uint8)
    for t in range(low, high):
        i, lo = t // tiles, t % tiles * SPAN
        count, at = min(SPAN, d - lo), i * stride + room(lo, 9)
        bad |= _powers(flat[at : at + room(count, 9)], code, buffer, out[i, lo : lo + count])
    return bad


def decode_natural(payload: Tensor, d: int) -> tuple[Tensor, bool]:
    m, out = len(payload), ready((len(payload), d), np.uint32)
    bad = spread(_decode_natural, (*bytes_of(payload), out), m * -(-d // SPAN), least=LEAST // SPAN)
    return torch.from_numpy(out.view(np.float32)), bad


@njit(cache=True, nogil=True)
def _mean_natural(flat, stride, m, out, cohort, low, high):
    bad, acc, bits = False, np.empty(SPAN), np.empty(SPAN, np.uint32)
    code, buffer, values = np.empty(SPAN, np.uint16), np.empty(ROOM, np.uint8), bits.view(np.float32)
    for lo in range(low, high, SPAN):
        count = min(SPAN, high - lo)
        acc[:] = 0.0
        for i in range(m):
            at = i * stride + room(lo, 9)
            bad |= _powers(flat[at : at + room(count, 9)], code, buffer, bits[:count])
            for j in range(count):
                acc[j] += np.float64(values[j])
        for j in range(count):
            out[lo + j] = np.float32(acc[j] / cohort)
    return bad


def mean_natural(payload: Tensor, d: int, cohort: int) -> tuple[Tensor, bool]:
    m, out = len(payload), ready(d, np.float32)
    bad = spread(_mean_natural, (*bytes_of(payload), m, out, cohort), d, SPAN, max(SPAN, LEAST // max(m, 1)))
    return torch.from_numpy(out), bad


# ------------------------------------------------------------------------------------------------ halves of a scale
_MANTISSA = (1 << 52) - 1


@njit
def _halved(x, words, t, code, scale, top, levels):
    bits = t.view(np.int64)
    for j in range(x.size):
        t[j] = abs(np.float64(x[j])) * top / scale
    for j in range(x.size):
        exponent = max((bits[j] >> 52) - 1022, 0)  # frexp's, by the bits of a float64 that is never denormal
        frac = np.float64(bits[j] & _MANTISSA) * 2.0**-52 if exponent > 0 else t[j]
        up = np.int64((np.float64(words[j]) + 0.5) * 2.0**-32 < frac)
        level = min(exponent + up, levels)
        code[j] = np.uint16(levels - level if x[j] < np.float32(0) else levels + level)


@njit(cache=True, nogil=True)
def _encode_natural_levels(u, r, out, start, slots, index, stream, k0, k1, levels, top, bits, low, high):
    d = u.shape[1]
    tiles, words, t = (d + SPAN - 1) // SPAN, np.empty(SPAN, np.uint32), np.empty(SPAN)
    code, buffer = np.empty(SPAN, np.uint16), np.empty(ROOM, np.uint8)
    for n in range(low, high):
        i, lo = n // tiles, n % tiles * SPAN
        count, at = min(SPAN, d - lo), start + room(lo, bits)
        if r[i] > np.float32(0):
            fill_words(words[: (count + 63) // 64 * 64], lo // 64, np.uint64(slots[i]), index, stream, k0, k1)
            _halved(u[i, lo : lo + count], words, t, code, np.float64(r[i]), top, levels)
        else:
            code[:count] = levels
        pack_tile(code, count, out[i, at : at + room(count, bits)], buffer, bits)


def encode_natural_levels(u: Tensor, r: Tensor, private: Draw, levels: int) -> Tensor:
    (m, d), bits = u.shape, (2 * levels).bit_length()
    out = ready((m, 4 + (d * bits + 7) // 8), np.uint8)
    out[:, :4] = r.numpy().view(np.uint8).reshape(m, 4)
    args = (u.numpy(), r.numpy(), out, 4, private.slots.numpy(), *key(private), levels, 2.0 ** (levels - 1), bits)
    spread(_encode_natural_levels, args, m * -(-d // SPAN), least=LEAST // SPAN)
    return torch.from_numpy(out)


@njit(cache=True, nogil=True)
def _natural_values(r, levels, codes, out):
    for i in range(out.shape[0]):
        for k in range(out.shape[1]):
            level = k % codes - levels
            value = np.float32(0 if level == 0 else 2.0 ** np.float64(abs(level) - levels) * np.float64(r[i]))
            out[i, k] = np.nan if level > levels else -value if level < 0 else value


def _values(r: Tensor, levels: int, dtype: type) -> np.ndarray:
    codes = 1 << (2 * levels).bit_length()
    out = np.empty((len(r), max(codes, 16)), dtype)
    _natural_values(r.numpy(), levels, codes, out)
    return out


def decode_natural_levels(payload: Tensor, r: Tensor, levels: int, d: int) -> tuple[Tensor, bool]:
    values = _values(r, levels, np.float32)
    return decode_table(payload, r.numpy(), values, (2 * levels).bit_length(), 2 * levels + 1, d)


def mean_natural_levels(payload: Tensor, r: Tensor, levels: int, d: int, cohort: int) -> tuple[Tensor, bool]:
    values = _values(r, levels, np.float64)
    return mean_table(payload, r.numpy(), values, (2 * levels).bit_length(), 2 * levels + 1, d, cohort)
